"""Benchmarks with error bars, the PMI view, and the curves of runs.

    python eval.py --model runs/antisd/model --benchmarks aime24,aime25,aime26,hmmt25,minerva
    torchrun --nproc-per-node 8 eval.py @the.args      # the same flags; ranks split the responses
    python eval.py --model M --data rows.jsonl --pmi --output pmi.html        # the paper's Figure 2
    python eval.py --curves toy/results/grpo_? toy/results/antisd_? --output c.svg    # and Figure 4

Prompt, renderer, sampler, scorer and grader are antisd.py's own: what is measured here is what was
trained there. A folder of results is continued by the same command, however it was stopped.
"""
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import statistics
import sys
import zlib
from html import escape
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from antisd import (Config, InputError, _checksum, check_flags, compute_dtype, extract_boxed, flag,
                    gather, load_policy, load_problems, load_tokenizer, main, mean_error,
                    parse_config, phase, phi, render, roll_out, score, setup, student_messages,
                    teacher_prompts, write_whole)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    data: str               # hub id
    split: str
    rows: int               # checked: another count is another benchmark
    samples: int            # responses per problem (Table 5; below Minerva: our choice)
    config: str = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 30, 32),
    "aime25": Benchmark("math-ai/aime25", "test", 30, 32),
    "aime26": Benchmark("math-ai/aime26", "test", 30, 32),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", 30, 32),
    "minerva": Benchmark("math-ai/minervamath", "test", 272, 4),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 500, 4),
    "gsm8k": Benchmark("openai/gsm8k", "test", 1319, 1, "main"),
    "amc23": Benchmark("math-ai/amc23", "test", 40, 32),
}


@dataclasses.dataclass
class EvalConfig:
    model: str = flag("", "Hugging Face folder or hub id of a chat model")
    benchmarks: str = flag("", f"comma-separated, of {', '.join(BENCHMARKS)}")
    data: str = flag("", "problems of your own: .jsonl, .json or .parquet file, or hub id (split "
                     "test)")
    samples: int = flag(0, "responses per problem; 0: the benchmark's own number, 4 for --data",
                        least=0)
    temperature: float = flag(None, "0 is greedy, one sample; unset: 0.7 (Table 5), 1 with --pmi",
                              least=0)
    top_p: float = flag(None, "unset: 0.95 (Table 5), 1 with --pmi, as in training")
    max_tokens: int = flag(32768, "longest response, in tokens (Table 5)", least=1)
    limit: int = flag(0, "only the first so many problems of each set; 0: all, 16 with --pmi",
                      least=0)
    seed: int = flag(0, "of the responses")
    output: str = flag("", "folder of the results, or the page's file [runs/eval, pmi.html, "
                       "curves.svg]")
    pmi: bool = flag(False, "write a page that shows every token's u = log pi_T - log pi_S")
    curves: list = flag((), "run folders to compare: a table, and an SVG picture")
    rollout_batch: int = flag(64, "responses decoded at once on a rank; what a kill can cost",
                              least=1)
    micro_tokens: int = flag(16384, "tokens of one scoring micro-batch (--pmi)", least=1)
    chat_template_kwargs: str = flag("{}", "JSON for the chat template, as in training")
    trust_remote_code: bool = flag(False, "run model code that comes with the checkpoint")
    dtype: str = flag("auto", "of the weights; auto is bfloat16 on CUDA and float32 on the CPU",
                      choices=["auto", "bfloat16", "float32"])

    def __post_init__(self):
        if self.temperature is None:
            self.temperature = 1.0 if self.pmi else 0.7
        if self.top_p is None:
            self.top_p = 1.0 if self.pmi else 0.95
        check_flags(self)
        unknown = [name for name in self.names if name not in BENCHMARKS]
        for wrong, text in (
            (self.curves and self.pmi, "--curves and --pmi make two pictures: choose one"),
            (not self.curves and not self.model, "--model is required: a folder or a hub id"),
            (not self.curves and not self.names and not self.data,
             "nothing to answer: name --benchmarks or --data"),
            (unknown, f"--benchmarks {','.join(unknown)}: choose from {', '.join(BENCHMARKS)}"),
            (Path(self.data).stem in self.names, "--data has the name of a benchmark: rename it"),
            (not 0 < self.top_p <= 1, "--top_p must be above 0 and at most 1"),
            (not self.temperature and self.samples > 1, "--temperature 0 is greedy: one sample"),
            (not self.temperature and self.pmi, "--pmi draws samples: --temperature above 0"),
        ):
            if wrong:
                raise InputError(text)

    @property
    def names(self):
        return [name.strip() for name in self.benchmarks.split(",") if name.strip()]

    @property
    def template_kwargs(self):
        return json.loads(self.chat_template_kwargs)

    @property
    def group_size(self):                                # what teacher_prompts calls it
        return self.samples or 4


# ------------------------------------------------------------------------------------------------
# 1. Accuracy
# ------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Chance that k of n responses, drawn without replacement, hold one of the c correct ones:
    1 - C(n-c, k) / C(n, k), unbiased in c / n. ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not {n=}, {c=}, {k=}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)     # exact integers up to the one division


def load_benchmark(name):
    """The problems of BENCHMARKS[name]; InputError where their number is not the benchmark's."""
    b = BENCHMARKS[name]
    problems = load_problems(b.data, b.split, config=b.config)
    if len(problems) != b.rows:
        raise InputError(f"{name} ({b.data}, split {b.split}) has {len(problems)} problems instead "
                         f"of {b.rows}: the data set has changed, scores would not compare")
    return problems


def load_sets(cfg, tokenizer, context):
    """{set's name: (problems with their "prompt" ids, samples per problem)}."""
    sets = {name: (load_benchmark(name), cfg.samples or BENCHMARKS[name].samples)
            for name in cfg.names}
    if cfg.data:
        sets[Path(cfg.data).stem] = load_problems(cfg.data, "test"), cfg.samples or 4
    for name, (problems, k) in sets.items():
        problems = problems[:cfg.limit or None]
        for p in problems:
            p["prompt"] = render(tokenizer, student_messages(p["problem"]), cfg.template_kwargs)
            if len(p["prompt"]) + cfg.max_tokens > context:      # left out, it would flatter
                raise InputError(f"{name}: problem {p['id']} takes {len(p['prompt'])} tokens; with "
                                 f"--max_tokens {cfg.max_tokens} it does not fit the model's "
                                 f"context of {context}")
        sets[name] = problems, k if cfg.temperature else 1
    return sets


def chunks(sets, world, rollout_batch):
    """What is decoded at once: lists of (set, place of the problem, sample), every pair in one.

    They depend on nothing but the arguments, so a run that was killed draws the same ones again.
    Their number is a multiple of the ranks where it can be: 30 problems keep 8 GPUs busy. Samples
    come in rounds over all problems, so that the running accuracy is one over all of them.
    """
    plan = []
    for name, (problems, k) in sets.items():
        pairs = [(name, i, j) for j in range(k) for i in range(len(problems))]
        rounds = math.ceil(len(pairs) / (world * rollout_batch))
        size = math.ceil(len(pairs) / (world * rounds))
        plan += [pairs[first:first + size] for first in range(0, len(pairs), size)]
    return plan


def collect(output, sets):
    """The lines of responses.jsonl and of the other ranks' parts, put into the one file in order.

    Each (problem, sample) stays once; a line that a kill cut short is dropped.
    """
    rows = {}
    for file in sorted(output.glob("responses*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    row = json.loads(line)
                    rows.setdefault((row["benchmark"], row["problem_id"], row["sample"]), row)
    ordered = [rows[key] for name, (problems, k) in sets.items() for p in problems
               for key in [(name, p["id"], j) for j in range(k)] if key in rows]
    write_whole(output / "responses.jsonl", "".join(json.dumps(row) + "\n" for row in ordered))
    for part in output.glob("responses.*.jsonl"):        # only now: a kill before costs nothing
        part.unlink()
    return ordered


def open_output(cfg, sets, output):
    """Settings into results.json; returns them, the pairs answered so far, and the folder's lock.
    InputError on a mix of settings, or while another process works in the folder."""
    output.mkdir(parents=True, exist_ok=True)
    lock = open(output / ".lock", "w")                   # the kernel frees it, even after kill -9
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another eval.py is at work in {output} (a torchrun that was killed "
                         "leaves its ranks behind)") from None
    free = ("output", "rollout_batch", "micro_tokens", "pmi", "curves", "trust_remote_code")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in free}
    weights = sorted(Path(cfg.model).glob("*.safetensors"))      # a later model under this name
    commit = getattr(transformers.AutoConfig.from_pretrained(
        cfg.model, trust_remote_code=cfg.trust_remote_code), "_commit_hash", None)
    settings["model_hash"] = "-".join(_checksum(file)[:8] for file in weights) or commit
    settings["data_hash"] = hashlib.sha256(repr(sets).encode()).hexdigest()[:16]
    old = output / "results.json"
    if old.exists():
        before = json.loads(old.read_text())["settings"]
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            raise InputError(f"{output} holds results of other settings ({', '.join(changed)}): "
                             "choose another --output")
    elif any(output.glob("responses*.jsonl")):
        raise InputError(f"{output} holds responses without the settings that made them")
    head = {"settings": settings, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__}}
    if not old.exists():
        write_whole(old, json.dumps(head, indent=1) + "\n")
    rows = collect(output, sets)
    return head, {(r["benchmark"], r["problem_id"], r["sample"]) for r in rows}, lock


def summarise(rows, k):
    """One benchmark's scores from its lines of responses.jsonl, k responses to each problem."""
    marks = {}
    for row in rows:
        marks.setdefault(row["problem_id"], []).append(row["correct"])
    complete = [row["correct"] for row in rows if not row["truncated"]]
    accuracy, error = mean_error([statistics.fmean(m) for m in marks.values()])
    return {"n": len(marks), "k": k, "accuracy": accuracy, "error": error,
            "pass": {2**i: statistics.fmean(pass_at_k(k, sum(m), 2**i) for m in marks.values())
                     for i in range(k.bit_length())},
            "truncated": statistics.fmean(row["truncated"] for row in rows),
            "accuracy_complete": statistics.fmean(complete) if complete else None,
            "no_answer": statistics.fmean(extract_boxed(r["response"]) is None for r in rows),
            "length": statistics.fmean(row["tokens"] for row in rows),
            # of one rank, so that it compares over any number of them
            "tokens_per_s": sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows)}


def average(scores):
    """The paper's average row: every benchmark counts alike; errors are independent."""
    def mean(values):
        return None if None in values else statistics.fmean(values)

    row = {key: mean([s[key] for s in scores]) for key in scores[0]
           if key not in ("n", "k", "error", "pass")}
    row["pass"] = {i: mean([s["pass"][i] for s in scores]) for i in scores[0]["pass"]
                   if all(i in s["pass"] for s in scores)}
    return row | {"error": math.hypot(*(s["error"] for s in scores)) / len(scores)}


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def table(results):
    """Text: shares in percent, +- is the standard error over problems."""
    ks = sorted({k for row in results.values() for k in row["pass"]})
    lines = [["benchmark", "n", "k", "avg@k", *(f"pass@{k}" for k in ks), "truncated",
              "avg, complete", "no answer", "length", "tok/s/rank"]]
    for name, r in results.items():
        lines.append([name, str(r.get("n", "")), str(r.get("k", "")),
                      f"{percent(r['accuracy'])} +- {percent(r['error'])}",
                      *(percent(r["pass"].get(k)) for k in ks), percent(r["truncated"]),
                      percent(r["accuracy_complete"]), percent(r["no_answer"]),
                      f"{r['length']:.0f}", f"{r['tokens_per_s']:.0f}"])
    return align(lines)


def align(lines):
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                     for line in lines)


def measure(cfg):
    """Answers every problem, grades, writes responses.jsonl and results.json, prints the table."""
    rank, world, device = setup()
    tokenizer, context = load_tokenizer(cfg)
    sets, output = load_sets(cfg, tokenizer, context), Path(cfg.output or "runs/eval")
    head = done = lock = problem = None
    if rank == 0:
        try:
            head, done, lock = open_output(cfg, sets, output)    # held until the process ends
        except InputError as error:                      # every rank must leave, not rank 0 alone
            problem = str(error)
    head, done, problem = gather((head, done, problem))[0]
    if problem:
        raise InputError(problem)
    ids = {name: [p["id"] for p in problems] for name, (problems, k) in sets.items()}
    plan = [chunk for chunk in chunks(sets, world, cfg.rollout_batch)
            if any((name, ids[name][i], j) not in done for name, i, j in chunk)][rank::world]
    if plan:        # the weights are whole on every rank: nothing is trained, nothing to shard
        policy = load_policy(cfg, tokenizer, compute_dtype(cfg, device)).to(device)
    marks = []
    part = output / (f"responses.{rank}.jsonl" if rank else "responses.jsonl")
    with open(part, "a", encoding="utf-8") as file, tqdm(
            total=sum(map(len, plan)), disable=rank > 0, dynamic_ncols=True,
            desc=f"rank 0 of {world}" if world > 1 else None) as bar:
        for chunk in plan:
            # drawn whole with its own seed even where a kill left some of it: then the responses
            # are those of an undisturbed run, and none is likelier to stay for being short
            torch.manual_seed(zlib.crc32(repr((cfg.seed, chunk[0])).encode()))
            seconds = {}
            with phase("rollout", seconds):
                rollouts = roll_out(policy, tokenizer, [sets[name][0][i] for name, i, j in chunk],
                                    1, max_tokens=cfg.max_tokens, temperature=cfg.temperature,
                                    top_p=cfg.top_p)
            rows = [{"benchmark": name, "problem_id": ids[name][i], "sample": j, "response": r.text,
                     "correct": r.reward == 1.0, "truncated": r.truncated, "tokens": len(r.ids),
                     "seconds": seconds["rollout"] / len(chunk)}
                    for (name, i, j), r in zip(chunk, rollouts)
                    if (name, ids[name][i], j) not in done]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            marks += [row["correct"] for row in rows]
            bar.set_postfix_str(f"accuracy {statistics.fmean(marks):.3f}")
            bar.update(len(chunk))
    gather(None)                                         # every part is whole
    if rank == 0:
        rows = collect(output, sets)
        assert len(rows) == sum(len(problems) * k for problems, k in sets.values())
        results = {name: summarise([r for r in rows if r["benchmark"] == name], k)
                   for name, (problems, k) in sets.items()}
        if len(results) > 1:
            results["average"] = average(list(results.values()))
        write_whole(output / "results.json", json.dumps(head | {"results": results}, indent=1)
                    + "\n")
        print(table(results))


# ------------------------------------------------------------------------------------------------
# 2. The PMI view: one page, everything in it, nothing fetched
# ------------------------------------------------------------------------------------------------

LEVELS, U_MAX = 8, 4.0                                   # shades on each side; the darkest, in nats
CAP_U = math.log(2**0.05 - 1)                            # below it -phi(u) > 95% of log(2)/2
STYLE = """
:root{color-scheme:light dark;--page:#fcfcfa;--ink:#1c1e22;--soft:#666b75;--line:#dcddd8;
--blue:#4f97e8;--red:#ee6a5f;--card:#fff}
@media(prefers-color-scheme:dark){:root{--page:#15171b;--ink:#e6e6e3;--soft:#9a9fa9;--line:#33373e;
--blue:#2f74c9;--red:#c8453c;--card:#1e2126}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1080px;padding:32px 20px 120px;
background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
h1{font-size:27px;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:0 0 10px}
h2{font-size:17px;font-weight:650;margin:38px 0 10px}p{max-width:72ch;margin:0 0 12px}
.soft,figcaption,summary span{color:var(--soft);font-size:14px}p b{font-weight:550;
padding:1px 5px;border-radius:3px}.facts{display:grid;
grid-template-columns:repeat(auto-fit,minmax(118px,1fr));
gap:14px 20px;margin:24px 0;padding:16px 0;border:solid var(--line);border-width:1px 0}
.facts b{display:block;font-size:22px;font-weight:600;line-height:1.25}
.facts span{color:var(--soft);font-size:13px;line-height:1.3;display:block}
.scale{display:flex;max-width:430px;height:12px;margin-top:14px}.scale i{flex:1}
.ends{display:flex;justify-content:space-between;max-width:430px;font-size:13px;color:var(--soft)}
details{border-top:1px solid var(--line);padding:10px 0}summary{cursor:pointer}
summary b{font-weight:600;margin-right:.6em}.y{white-space:pre-wrap;overflow-wrap:anywhere;
line-height:1.85;margin:10px 0 16px}.y i{font-style:normal;border-radius:3px;padding:2px 0}
.y i:hover{outline:2px solid var(--ink)}pre{white-space:pre-wrap;overflow-wrap:anywhere;
font-size:13px;color:var(--soft);margin:8px 0}.grid{display:grid;gap:0 40px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));border-top:1px solid var(--line)}
sub{font-size:.7em;line-height:0}figure{margin:0}svg text{fill:var(--soft)}
svg{display:block;width:100%;max-width:440px;font:12px system-ui,sans-serif}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
td,th{text-align:right;padding:3px 0 3px 12px;font-weight:400}th{color:var(--soft)}
td:first-child,th:first-child{text-align:left;padding:3px 0;font-family:ui-monospace,monospace;
overflow-wrap:anywhere}td i{display:inline-block;height:9px;border-radius:2px;min-width:2px}
#card{position:fixed;display:none;background:var(--card);border:1px solid var(--line);z-index:1;
border-radius:8px;padding:10px 14px;box-shadow:0 6px 24px #0003;font-size:14px;width:190px;
pointer-events:none}#card b{display:block;font-family:ui-monospace,monospace;overflow:hidden;
text-overflow:ellipsis;white-space:pre;margin-bottom:4px}#card div{display:flex;
justify-content:space-between;font-variant-numeric:tabular-nums}
@media(max-width:600px){body{padding:20px 14px 150px}h1{font-size:22px}
#card{left:14px!important;right:14px;bottom:14px;top:auto!important;width:auto}}
""" + "".join(f".{side}{i}{{background:color-mix(in srgb,var(--{name}) {100 * i // LEVELS}%,"
              "transparent)}" for side, name in (("n", "blue"), ("p", "red"))
              for i in range(1, LEVELS + 1))
SCRIPT = """
const card = document.getElementById("card"),
  names = ["\u03c0_S", "\u03c0_T", "u, nats", "\u2212\u03c6(u)", "H_S, nats", "H_T, nats"];
function show(event) {
  const token = event.target.closest("[data-t]");
  card.style.display = token ? "block" : "none";
  if (!token) return;
  card.replaceChildren(document.createElement("b"));
  card.firstChild.textContent = token.textContent.replaceAll(" ", "\u2423");
  token.dataset.t.split(" ").forEach((value, i) => {
    const row = card.appendChild(document.createElement("div"));
    for (const text of [names[i], value.replace("-", "\u2212")])
      row.appendChild(document.createElement("span")).textContent = text;
  });
  card.style.left = Math.min(event.clientX + 14, innerWidth - 210) + "px";
  card.style.top = Math.min(event.clientY + 18, innerHeight - 190) + "px";
}
for (const kind of ["pointerover", "click"]) document.addEventListener(kind, show);
"""


def shade(u):
    """The class of u's colour: n8 (deep blue) ... n1, none, p1 ... p8 (deep red)."""
    level = min(LEVELS, round(abs(u) / U_MAX * LEVELS))
    return f"{'n' if u < 0 else 'p'}{level}" if level else ""


def pieces(tokenizer, ids):
    """Each token's share of the decoded text. Decoded in its neighbourhood: alone, a token loses
    its leading space in some vocabularies, and half a character has no text at all."""
    def text(part):
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    out = []
    for i in range(len(ids)):
        before, after = text(ids[max(0, i - 6):i]), text(ids[max(0, i - 6):i + 1])
        same = len(os.path.commonprefix([before, after]))
        out.append(after[same:])
    return out


def response_html(tokens, values):
    """tokens: T texts; values: T rows of pi_S, pi_T, u, -phi(u), H_S, H_T."""
    spans = []
    for token, row in zip(tokens, values):
        numbers = "{:.3g} {:.3g} {:+.2f} {:+.3f} {:.2f} {:.2f}".format(*row)
        spans.append(f'<i class="{shade(row[2])}" data-t="{numbers}">'
                     + escape(token).replace("\n", "\u21b5\n") + "</i>")
    return '<div class="y">' + "".join(spans) + "</div>"


def heat_map(s, t, bins=32, floor=-4.0):
    """SVG of how many tokens have each (pi_S, pi_T), both on a logarithmic axis. s, t: (M,)."""
    place = [((x / math.log(10)).clamp(floor, 0) - floor) / -floor * (bins - 1e-3) for x in (s, t)]
    cells, counts = torch.stack(place, 1).long().unique(dim=0, return_counts=True)   # (C, 2), (C,)
    size, left, top, most = 340 / bins, 64, 24, math.log1p(int(counts.max()))
    out = [f'<rect x="{left}" y="{top}" width="340" height="340" fill="none" '
           'stroke="var(--line)"/>']
    for (x, y), n in zip(cells.tolist(), counts.tolist()):
        colour = "var(--soft)" if x == y else "var(--red)" if y > x else "var(--blue)"
        out.append(f'<rect x="{left + x * size:.1f}" y="{top + 340 - (y + 1) * size:.1f}" '
                   f'width="{size:.1f}" height="{size:.1f}" fill="{colour}" fill-opacity="'
                   f'{0.15 + 0.85 * math.log1p(n) / most:.2f}"><title>{n} tokens</title></rect>')
    for power in range(int(floor), 1):
        at = round(340 * (power - floor) / -floor)
        label = ("\u2264 " if power == floor else "") + f"{10.0**power:g}"
        out.append(f'<text x="{left + at}" y="384" text-anchor="middle">{label}</text>'
                   f'<text x="{left - 7}" y="{top + 344 - at}" text-anchor="end">{label}</text>')
    out.append(f'<line x1="{left}" y1="{top + 340}" x2="{left + 340}" y2="{top}" '
               'stroke="var(--soft)" stroke-dasharray="3 4"/>'
               f'<text x="{left + 14}" y="{top + 24}">teacher surer, u &gt; 0</text>'
               f'<text x="{left + 326}" y="{top + 326}" text-anchor="end">student surer, u &lt; 0'
               f'</text><text x="{left + 170}" y="402" text-anchor="middle">\u03c0_S</text>'
               f'<text x="{left - 7}" y="12" text-anchor="end">\u03c0_T</text>')
    return f'<svg viewBox="0 0 416 408" role="img">{"".join(out)}</svg>'


def token_table(words, largest, title):
    """HTML table of (token, mean u, count); bars in proportion to |mean u| / largest."""
    marks, minus = str.maketrans({" ": "\u2423", "\n": "\u21b5"}), "\u2212"
    rows = "".join(
        f"<tr><td>{escape(word.translate(marks))}</td><td><i class"
        f'="{"n" if u < 0 else "p"}{LEVELS}" style="width:{70 * abs(u) / largest:.0f}px"></i></td>'
        f"<td>{f'{u:+.2f}'.replace('-', minus)}</td><td>{n}</td></tr>" for word, u, n in words)
    return (f"<div><h2>{title}</h2><table><tr><th>token</th><th></th><th>mean u</th><th>count</th>"
            f"</tr>{rows}</table></div>")


def pmi_page(rollouts, tokens, values, sources, views, heading):
    """The whole page. tokens: per response its T token texts; values: per response (T, 6) of pi_S,
    pi_T, u, -phi(u), H_S, H_T; sources and views: what c was, and the teacher's prompt as text."""
    every = torch.cat(values)                                                        # (M, 6)
    u, total = every[:, 2], len(every)
    groups = {}
    for text, row in zip((word for part in tokens for word in part), u.tolist()):
        groups.setdefault(text, []).append(row)
    least = max(2, total // 5000)                        # a token seen once has no mean
    words = sorted(((w, statistics.fmean(v), len(v)) for w, v in groups.items()
                    if w.strip() and len(v) >= least), key=lambda row: row[1])
    low = [w for w in words if w[1] < -0.005][:14]       # what would print as 0.00 is neither
    high = [w for w in reversed(words) if w[1] > 0.005][:14]
    largest = max([abs(w[1]) for w in low + high], default=1.0)
    facts = [(f"{total:,}", "tokens"), (f"{(u < 0).float().mean():.1%}", "have u &lt; 0"),
             (f"{(u <= CAP_U).float().mean():.1%}", f"at the cap, u &lt; {CAP_U:.1f}"),
             (f"{u.mean():+.3f}", "mean u, nats"),
             (f"{every[:, 4].mean():.3f}", "student's entropy, nats"),
             (f"{every[:, 5].mean():.3f}", "teacher's entropy, nats"),
             (f"{statistics.fmean(r.reward for r in rollouts):.0%}",
              f"of {len(rollouts)} responses correct")]
    facts = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    scale = "".join(f'<i class="{shade(U_MAX * i / LEVELS)}"></i>'
                    for i in range(-LEVELS, LEVELS + 1))
    shown = []
    for i, (r, part, rows) in enumerate(zip(rollouts, tokens, values)):
        shown.append(
            f"<details{' open' * (i < 2)}><summary><b>Problem {r.problem['id']}, "
            f"{'correct' if r.reward else 'wrong'}</b><span>{len(part)} tokens"
            f"{', truncated' * r.truncated}, mean u {rows[:, 2].mean():+.3f}, c: {sources[i]}"
            f"</span></summary>{response_html(part, rows.tolist())}<details><summary><span>What "
            f"the teacher read</span></summary><pre>{escape(views[i])}</pre></details></details>")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PMI view</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>
<body><h1>What changes once the solution is known</h1><p class=soft>{escape(heading)}</p>
<p>The same network scores each token of its own response twice: as the student
(\u03c0<sub>S</sub>), and as a teacher that has also read a solution (\u03c0<sub>T</sub>).
<var>u</var> = log \u03c0<sub>T</sub> \u2212 log \u03c0<sub>S</sub>. <b class=n6>Blue</b>: knowing
the solution, one would hardly say it; deliberation, which AntiSD raises, by at most 0.35.
<b class=p6>Red</b>: the solution gives it away; a shortcut, which AntiSD lowers.</p>
<div class=scale>{scale}</div><div class=ends><span>u \u2264 \u2212{U_MAX:g}</span><span>0</span>
<span>u \u2265 +{U_MAX:g} nats</span></div><div class=facts>{facts}</div>
<p class=soft>Point at a token, or tap it.</p>{''.join(shown[:2])}
<div class=grid><figure><h2>Where the tokens lie</h2>{heat_map(*every[:, :2].log().T)}
<figcaption>Depth: logarithm of the number of tokens.</figcaption></figure>
{token_table(low, largest, 'Lowest mean u')}{token_table(high, largest, 'Highest mean u')}</div>
<p class=soft>Tokens that occur at least {least} times.</p>
<h2>More responses</h2>{''.join(shown[2:])}
<div id="card"></div><script>{SCRIPT}</script></body></html>
"""


def view_pmi(cfg):
    """Samples responses, scores them under both prompts as train() does, writes the page."""
    rank, world, device = setup()
    if world > 1:
        raise InputError("--pmi runs on one process: start it without torchrun")
    tokenizer, context = load_tokenizer(cfg)
    cfg = dataclasses.replace(cfg, limit=cfg.limit or 16, samples=cfg.group_size)
    problems = [p for part, k in load_sets(cfg, tokenizer, context).values() for p in part]
    policy = load_policy(cfg, tokenizer, compute_dtype(cfg, device)).to(device)
    torch.manual_seed(cfg.seed)
    with phase("rollout", {}):
        rollouts = roll_out(policy, tokenizer, problems, cfg.group_size, max_tokens=cfg.max_tokens,
                            temperature=cfg.temperature, top_p=cfg.top_p,
                            rollout_batch=cfg.rollout_batch)
    views, sources = teacher_prompts(tokenizer, rollouts, cfg, context - cfg.max_tokens, 0)
    prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
    with phase("score", {}):                                                         # (N, T) each
        s, entropy_s = score(policy, prompts, responses, cfg.micro_tokens, cfg.temperature)
        t, entropy_t = score(policy, views, responses, cfg.micro_tokens, cfg.temperature)
    u = t - s                                                                        # Eq. (4)
    values = torch.stack([s.exp(), t.exp(), u, -phi(u), entropy_s, entropy_t], 2).cpu()
    heading = (f"{cfg.model} on {cfg.data or cfg.benchmarks}: {len(problems)} problems x "
               f"{cfg.group_size} responses, temperature {cfg.temperature:g}, top-p {cfg.top_p:g}, "
               f"at most {cfg.max_tokens} tokens, seed {cfg.seed}")
    page = pmi_page(rollouts, [pieces(tokenizer, ids) for ids in responses],
                    [row[:len(ids)] for row, ids in zip(values, responses)], sources,
                    [tokenizer.decode(view) for view in views], heading)
    output = Path(cfg.output or "pmi.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page)
    print(f"{output}: {len(rollouts)} responses, {sum(map(len, responses))} tokens")


# ------------------------------------------------------------------------------------------------
# 3. The curves of runs
# ------------------------------------------------------------------------------------------------

PANELS = (("reward", "Reward of the rollouts"), ("eval_accuracy", "Held-out accuracy"),
          ("teacher_entropy", "Teacher's entropy, nats (dashed: H_warm; bar: gate shut)"),
          ("student_entropy", "Student's entropy, nats"), ("length", "Response length, tokens"),
          ("lam", "Lambda"))
SVG_STYLE = """svg{font:13px system-ui,sans-serif}text{fill:#666b75}
.axis{stroke:#dcddd8;stroke-width:1}.t{fill:#1c1e22;font-weight:600}
path{fill:none;stroke-width:1.8}.raw{stroke-width:1;opacity:.3}
.band{opacity:.18;stroke:none}.warm{stroke-width:1.2;stroke-dasharray:5 4}
.page{fill:#fcfcfa}@media(prefers-color-scheme:dark){text{fill:#9a9fa9}
.axis{stroke:#33373e}.t{fill:#e6e6e3}.page{fill:#15171b}}""" + "".join(
    f".a{i}{{stroke:{colour}}}.f{i}{{fill:{colour}}}" for i, colour in enumerate(
        ("#8a8f98", "#3b82d6", "#e0604f", "#3f9e6b", "#a06ad0", "#d08b26", "#2aa3ad", "#c75d9b")))


def load_runs(folders):
    """{arm: {seed: rows of metrics.jsonl}}. An arm is a method and, of the flags that differ
    between the runs besides seed and machine, those that are not the trainer's defaults."""
    runs = []
    for folder in map(Path, folders):
        try:
            flags = json.loads((folder / "config.json").read_text())["flags"]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError as error:
            missing = Path(error.filename).name if folder.is_dir() else "such folder"
            raise InputError(f"--curves {folder}: no {missing}") from None
        flags["init_from"] = "run" if flags.get("init_from") else ""     # each seed has its own
        runs.append((flags, [json.loads(line) for line in lines]))
    free = ("seed", "output", "method", "steps", "resume", "tracker", "save_every", "keep",
            "sample_every", "micro_tokens", "rollout_batch", "eval_every")
    usual = {field.name: field.default for field in dataclasses.fields(Config)}
    differ = [k for k in runs[0][0] if k not in free
              and len({json.dumps(flags.get(k)) for flags, rows in runs}) > 1]
    arms = {}
    for flags, rows in runs:
        label = " ".join([flags["method"], *(f"{k}={flags.get(k)}" for k in differ
                                             if flags.get(k) != usual.get(k))])
        if arms.setdefault(label, {}).setdefault(flags["seed"], rows) is not rows:
            raise InputError(f"--curves: two runs of {label} have seed {flags['seed']}")
    return dict(sorted(arms.items(), key=lambda arm: not arm[0].startswith("grpo")))


def trace(rows, key):
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def pooled(traces, pool=statistics.fmean):
    """Seeds of one arm -> one curve, over the steps that all of them have."""
    steps = set.intersection(*map(set, traces)) if traces else set()
    return {step: pool([t[step] for t in traces]) for step in sorted(steps)}


def rolling(values, width=20):
    """The mean over the last `width` steps, as in the paper's Figure 4."""
    steps = list(values)
    return {step: statistics.fmean(values[at] for at in steps[max(0, i - width + 1):i + 1])
            for i, step in enumerate(steps)}


def spread(values):
    """(mean, sd over seeds); the sd of one value is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(ours, theirs):
    """(mean, its standard error) of ours - theirs over the seeds both have; error None for one."""
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not gaps:
        return None
    mean, sd = spread(gaps)
    return mean, None if sd is None else sd / math.sqrt(len(gaps))


def compare(arms):
    """{arm: seeds; held-out accuracy before, at the best step of the seeds' mean, at the end, and
    its mean over the run; their paired differences against grpo; speed-up; and the end of the run
    in length, entropies and the gate's share}. Speed-up is the paper's: GRPO's best step / the
    first step at which the arm reaches GRPO's best."""
    seeds = {arm: {seed: trace(rows, "eval_accuracy") for seed, rows in runs.items()}
             for arm, runs in arms.items()}
    curves = {arm: pooled(list(part.values())) for arm, part in seeds.items()}
    base = min((arm for arm in arms if arm.startswith("grpo")), key=len, default=None)
    grpo = curves.get(base, {})
    goal, marks, out = max(grpo.values(), default=math.inf), {}, {}
    for arm, curve in curves.items():                    # max: the first of equals
        marks[arm] = {"before": min(curve, default=None), "final": max(curve, default=None),
                      "best": max(curve, key=curve.get, default=None)}
    for arm, curve in curves.items():
        row = out[arm] = {"seeds": len(arms[arm]), "best_step": marks[arm]["best"]}
        for name, step in marks[arm].items():
            row[name] = spread([c[step] for c in seeds[arm].values()]) if curve else None
            row[f"{name}_gap"] = paired(
                {seed: c[step] for seed, c in seeds[arm].items()},
                {seed: c[marks[base][name]] for seed, c in seeds[base].items()}
            ) if curve and grpo and arm != base else None
        means = {name: {seed: statistics.fmean(c.values()) for seed, c in seeds[name].items() if c}
                 for name in filter(None, (arm, base))}
        row["mean"] = spread(list(means[arm].values())) if curve else None
        row["mean_gap"] = paired(means[arm], means[base]) if base and arm != base else None
        reached = next((step for step, value in curve.items() if value >= goal), None)
        row["speed_up"] = marks[base]["best"] / reached if reached else None
        for key in ("length", "student_entropy", "teacher_entropy"):
            last = [trace(rows, key) for rows in arms[arm].values()]
            last = [t[max(t)] for t in last if t]
            row[key] = statistics.fmean(last) if last else None
        gates = [gate for rows in arms[arm].values()   # the first H_warm: still warm-up
                 for gate in [r["gate"] for r in rows if r.get("h_warm") is not None][1:]]
        row["gate"] = statistics.fmean(gates) if gates else None
    return out


def ticks(low, high):
    """About four round numbers from low to high."""
    high = high if high > low else low + 1.0             # a flat trace
    raw = (high - low) / 4
    power = 10.0**math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def panel(arms, key, title, x, y):
    """One plot as a nested <svg> at (x, y), 470 x 260: raw traces faded, their rolling mean, the
    range over seeds as a band. Held-out accuracy and the gate's steps are drawn as they are."""
    smooth = dict if key in ("eval_accuracy", "lam") else rolling
    traces = {arm: [trace(rows, key) for rows in runs.values() if trace(rows, key)]
              for arm, runs in arms.items()}
    h_warm = {arm: trace(next(iter(runs.values())), "h_warm") for arm, runs in arms.items()
              if key == "teacher_entropy" and traces[arm]}
    values = [v for t in [*sum(traces.values(), []), *h_warm.values()] for v in t.values()]
    last = max((step for t in sum(traces.values(), []) for step in t), default=0) or 1
    zero = [0.0] if key in ("reward", "lam") else []
    marks = ticks(min(values + zero, default=0.0), max(values + zero, default=1.0))

    def at(step, value):
        return (f"{52 + 400 * step / last:.1f},"
                f"{226 - 186 * (value - marks[0]) / (marks[-1] - marks[0]):.1f}")

    def path(points, style):
        return f'<path class="{style}" d="M{"L".join(at(*point) for point in points)}"/>'

    out = [f'<text class="t" x="6" y="20">{title}</text>']
    for mark in marks:
        height = at(0, mark).split(",")[1]
        out.append(f'<line class="axis" x1="52" x2="452" y1="{height}" y2="{height}"/>'
                   f'<text x="46" y="{float(height) + 4:.0f}" text-anchor="end">{mark:.4g}</text>')
    out += [f'<text x="{52 + 400 * mark / last:.0f}" y="252" text-anchor="middle">{mark:g}</text>'
            for mark in ticks(0, last) if mark <= last and mark == int(mark)]
    for i, (arm, part) in enumerate(traces.items()):
        curves = [smooth(t) for t in part]
        mean = pooled(curves).items()
        if smooth is rolling:
            out += [path(t.items(), f"raw a{i % 8}") for t in part]
        if len(curves) > 1:
            edge = [*pooled(curves, max).items(), *list(pooled(curves, min).items())[::-1]]
            out.append(path(edge, f"band f{i % 8}"))
        if mean:
            out.append(path(mean, f"a{i % 8}"))
        if h_warm.get(arm):
            out.append(path(h_warm[arm].items(), f"warm a{i % 8}"))
            shut = [row["step"] for rows in arms[arm].values() for row in rows
                    if row.get("h_warm") is not None and row["gate"] == 0]
            out += [f'<rect class="f{i % 8}" x="{at(step, 0).split(",")[0]}" y="{228 + 3 * i}" '
                    f'height="3" width="{400 / last:.2f}" opacity="{1 / len(arms[arm]):.2f}"/>'
                    for step in shut]
    return (f'<svg x="{x}" y="{y}" width="470" height="260" viewBox="0 0 470 260">'
            + "".join(out) + "</svg>")


def draw_curves(cfg):
    """Prints the table of `compare` and writes the picture, one self-contained SVG."""
    arms = load_runs(cfg.curves)
    lines, names = [["arm", "seeds", "before", "best", "at step", "- grpo", "final", "- grpo",
                     "mean", "- grpo", "speed-up", "length", "H_S", "H_T", "gate open"]], []

    def cell(pair, sign=""):
        if pair is None:
            return "-"
        mean, error = pair
        return f"{100 * mean:{sign}.1f}" + ("" if error is None else f" +- {100 * error:.1f}")

    def number(value, form):
        return "-" if value is None else format(value, form)

    for arm, row in compare(arms).items():
        speed = f"{row['speed_up']:.1f}x" if row["speed_up"] else "-"
        lines.append([arm, str(row["seeds"]), cell(row["before"]), cell(row["best"]),
                      str(row["best_step"]), cell(row["best_gap"], "+"), cell(row["final"]),
                      cell(row["final_gap"], "+"), cell(row["mean"]), cell(row["mean_gap"], "+"),
                      speed, number(row["length"], ".0f"),
                      number(row["student_entropy"], ".2f"), number(row["teacher_entropy"], ".2f"),
                      number(row["gate"], ".0%")])
        note = "1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
        names.append(f"{arm} ({note}{f', {speed}' if speed != '-' else ''})")
    print(align(lines))
    output = Path(cfg.output or "curves.svg")
    x, y, legend = 8, 24, ""
    for i, name in enumerate(names):
        width = 40 + 7 * len(name)
        if x + width > 960:
            x, y = 8, y + 22
        legend += (f'<circle class="f{i % 8}" cx="{x + 6}" cy="{y}" r="5"/>'
                   f'<text x="{x + 17}" y="{y + 5}">{escape(name)}</text>')
        x += width
    page = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {y + 846}">'
            f'<style>{SVG_STYLE}</style><rect class="page" width="960" height="{y + 846}"/>{legend}'
            + "".join(panel(arms, key, title, 480 * (i % 2), y + 20 + 272 * (i // 2))
                      for i, (key, title) in enumerate(PANELS)) + "</svg>\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page)
    print("held-out accuracy in percent, +- sd over seeds; - grpo: by seed, +- standard error\n"
          "length and entropies of the last step; gate open: share of the steps after the warm-up\n"
          f"speed-up: GRPO's best step / the first step at which the arm reaches GRPO's best\n"
          f"{output} holds the picture")


def run():
    cfg = parse_config(kind=EvalConfig, text=__doc__)
    (draw_curves if cfg.curves else view_pmi if cfg.pmi else measure)(cfg)


if __name__ == "__main__":
    main(run)
