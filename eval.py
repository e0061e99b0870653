"""Benchmarks with error bars, the PMI view, and the curves of runs.

    python eval.py --model runs/antisd/model --benchmarks aime24,aime25,aime26,hmmt25,minerva
    torchrun --nproc-per-node 8 eval.py @the.args      # the same flags; ranks split the responses
    python eval.py --model M --data rows.jsonl --pmi --output pmi.html        # the paper's Figure 2
    python eval.py --curves runs/grpo runs/antisd --output curves.svg         # the paper's Figure 4

Prompt, renderer, sampler, scorer and grader are antisd.py's own: what is measured here is what was
trained there. A folder of results is continued by the same command, however it was stopped.
"""
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
import zlib
from html import escape
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from antisd import (Config, InputError, _checksum, check_flags, compute_dtype, extract_boxed, flag,
                    gather, load_policy, load_problems, load_tokenizer, main, mean_error,
                    parse_config, phase, phi, render, roll_out, score, setup, student_messages,
                    teacher_prompts)


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
    curves: list = flag((), "run folders to compare: a table, and a picture (.svg or .html)")
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


def write_whole(path, text):
    """A kill leaves the old file or the new one, never a half."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)


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
    """Settings into results.json; what is answered so far. InputError on a mix of settings."""
    free = ("output", "rollout_batch", "micro_tokens", "pmi", "curves", "trust_remote_code")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in free}
    weights = sorted(Path(cfg.model).glob("*.safetensors"))      # a later model under this name
    commit = getattr(transformers.AutoConfig.from_pretrained(
        cfg.model, trust_remote_code=cfg.trust_remote_code), "_commit_hash", None)
    settings["model_hash"] = "-".join(f"{_checksum(file):08x}" for file in weights) or commit
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
    output.mkdir(parents=True, exist_ok=True)
    head = {"settings": settings, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__}}
    if not old.exists():
        write_whole(old, json.dumps(head, indent=1) + "\n")
    return head, {(r["benchmark"], r["problem_id"], r["sample"]) for r in collect(output, sets)}


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


def table(results):
    """Text: shares in percent, +- is the standard error over problems."""
    ks = sorted({k for row in results.values() for k in row["pass"]})

    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}"

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
    opened = problem = None
    if rank == 0:
        try:
            opened = open_output(cfg, sets, output)
        except InputError as error:                      # every rank must leave, not rank 0 alone
            problem = str(error)
    (opened, problem) = gather((opened, problem))[0]
    if problem:
        raise InputError(problem)
    head, done = opened
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
        results = {name: summarise([r for r in rows if r["benchmark"] == name], k)
                   for name, (problems, k) in sets.items()}
        if len(results) > 1:
            results["average"] = average(list(results.values()))
        write_whole(output / "results.json", json.dumps(head | {"results": results}, indent=1)
                    + "\n")
        print(table(results))


