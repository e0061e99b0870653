"""Math benchmarks: avg@k with standard errors, and unbiased pass@k.

    python eval.py --model runs/antisd/model --data toy/test.jsonl
    torchrun --nproc-per-node 8 eval.py --model runs/qwen3-4b/model \\
        --benchmarks aime24,aime25,aime26,hmmt25,minerva --output runs/bench

Prompt, sampler and grader are antisd.py's own, so that what is measured here is what was trained
there. The defaults are the paper's: temperature 0.7, top-p 0.95, 32 responses to each problem of
the competitions and 4 to those of MinervaMath, 32,768 tokens each.

Two files appear in --output. responses.jsonl has one line per response: benchmark, problem_id (row
of the data set), sample, answer (the reference), response, correct, truncated, tokens. results.json
has the settings, and at the end the numbers of the table that is printed.

How it stays whole: all (problem, sample) pairs stand in one list, which is cut into batches, and
every batch has a seed of its own. So the same command goes on with a run that was stopped in any
way, and ends with the responses of an undisturbed one. Ranks share the batches; each holds the
whole model. Left out on purpose: majority votes, several models at once, sharded weights.
"""
import dataclasses
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Literal, NamedTuple

# before torch, because antisd.py sets what torch's threads read when it is loaded
from antisd import (InputError, add_prompts, all_gather, append, extract_boxed, flag, load_policy,
                    load_problems, load_tokenizer, main, one_line, read_lines, roll_out, setup,
                    template_variables, write_whole)

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

# --- 1. Settings: every field is a flag -----------------------------------------------------------


class Benchmark(NamedTuple):
    data: str               # hub id, or a file
    split: str              # of the hub id
    rows: int | None        # checked, because scores on another version would not compare
    samples: int            # k, responses per problem
    config: str = None      # of the hub id


# The paper's five, and then three that others report, whose k is our choice
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 30, 32),         # 0 to 999
    "aime25": Benchmark("math-ai/aime25", "test", 30, 32),                   # 0 to 999
    "aime26": Benchmark("math-ai/aime26", "test", 30, 32),                   # 0 to 999
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", 30, 32),         # LaTeX, one a list
    "minerva": Benchmark("math-ai/minervamath", "test", 272, 4),             # LaTeX without units
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 500, 4),          # of MATH's test set
    "gsm8k": Benchmark("openai/gsm8k", "test", 1319, 1, "main"),             # whole numbers
    "amc23": Benchmark("math-ai/amc23", "test", 40, 32),
}


@dataclasses.dataclass
class EvalConfig:
    model: str = flag("", "Hugging Face folder or hub id of a chat model (required)")
    benchmarks: str = flag("", f"comma-separated, of {', '.join(BENCHMARKS)}")
    data: str = flag("", "problems of your own: .jsonl, .json, .parquet file, or id:config:split")
    samples: int = flag(0, "responses per problem; 0: the benchmark's own number, 4 for --data")
    temperature: float = flag(0.7, "0 is greedy, one response per problem (Table 5)")
    top_p: float = flag(0.95, "nucleus sampling; 1: none (Table 5)")
    max_tokens: int | None = flag(None, "unset: 32768 (Table 5), or what the context leaves")
    limit: int = flag(0, "only the first so many problems of each set; 0: all")
    seed: int = flag(0, "of the responses")
    output: str = flag("runs/eval", "folder of the results, in which the same command goes on")
    rollout_batch: int = flag(32, "most responses decoded at once on a rank, in a cache of at most "
                                  "2^18 tokens; free to change at a rerun")
    chat_template_kwargs: str = flag("{}", "JSON for the chat template, as in training")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "auto: bfloat16 on CUDA only")

    def __post_init__(self):
        self.template_kwargs = template_variables(self.chat_template_kwargs)
        self.names = [name.strip() for name in self.benchmarks.split(",") if name.strip()]
        unknown = ", ".join(name for name in self.names if name not in BENCHMARKS)
        for name in "samples", "temperature", "limit", "seed", "max_tokens", "rollout_batch":
            value, least = getattr(self, name), name in ("max_tokens", "rollout_batch")
            if value is not None and not least <= value < math.inf:      # NaN is neither
                raise InputError(f"--{name} {value}: must be at least {least:d}")
        for wrong, text in (
            (not self.model, "--model is required: a Hugging Face folder or a hub id"),
            (not self.names and not self.data, "nothing to answer: name --benchmarks or --data"),
            (unknown, f"--benchmarks {unknown}: choose from {', '.join(BENCHMARKS)}"),
            (Path(self.data).stem in self.names, "--data has the name of a benchmark: rename it"),
            (not 0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1"),
            (not self.temperature and self.samples > 1, "--temperature 0 is greedy: one sample"),
        ):
            if wrong:
                raise InputError(text)


# --- 2. Scores ------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Chance that k of n responses, drawn without replacement, hold one of the c correct ones.

    1 - C(n-c, k) / C(n, k), unbiased: over n independent responses it is on average the chance that
    one of k is right, which 1 - (1 - c/n)^k falls short of. ValueError unless 0 <= c <= n and
    1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not {n=}, {c=}, {k=}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)     # whole numbers up to the one division


def summarise(rows, k):
    """The scores of one set from its rows of responses.jsonl, k of them to each problem. Shares lie
    in [0, 1], length is in tokens, None is what cannot be computed."""
    marks = {}
    for row in rows:
        marks.setdefault(row["problem_id"], []).append(row["correct"])
    means = [statistics.fmean(m) for m in marks.values()]
    complete = [row["correct"] for row in rows if not row["truncated"]]
    return {"n": len(marks), "k": k,
            "accuracy": statistics.fmean(means),         # avg@k
            # over problems, since k responses to one problem say little about the next problem
            "error": statistics.stdev(means) / len(means)**0.5 if len(means) > 1 else None,
            "pass": {i: statistics.fmean(pass_at_k(k, sum(m), i) for m in marks.values())
                     for i in sorted({k, *(2**j for j in range(k.bit_length()))})},
            "truncated": statistics.fmean(row["truncated"] for row in rows),     # at max_tokens
            "accuracy_complete": statistics.fmean(complete) if complete else None,   # of the others
            "no_answer": statistics.fmean(extract_boxed(r["response"]) is None for r in rows),
            "length": statistics.fmean(row["tokens"] for row in rows)}


def average(scores):
    """The paper's average row: every set counts alike, whatever its size; their errors are
    independent. No pass@k, since the sets differ in k."""
    columns = {key: [s[key] for s in scores] for key in scores[0] if key not in ("n", "k", "pass")}
    row = {key: None if None in column else statistics.fmean(column)
           for key, column in columns.items()}
    if row["error"] is not None:
        row["error"] = math.hypot(*columns["error"]) / len(scores)
    return row


def table(results):
    """{name: scores} as text, shares in percent. "+-" is the standard error, "complete" the
    accuracy of the responses that were not truncated, "no answer" the share without a box."""
    wide = max(map(len, results))
    lines = [" " * wide + "".join(f"{title:>10}" for title in (
        "n", "k", "avg@k", "+-", "pass@k", "complete", "truncated", "no answer", "length"))]
    for name, r in results.items():
        shares = (r["accuracy"], r["error"], r.get("pass", {}).get(r.get("k")),
                  r["accuracy_complete"], r["truncated"], r["no_answer"])
        percents = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        cells = [r.get("n", "-"), r.get("k", "-"), *percents, round(r["length"])]
        lines.append(f"{name:{wide}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


# --- 3. Problems, and the folder of the results ---------------------------------------------------


def load_sets(cfg, tokenizer):
    """{set's name: (problems, each with its student's "prompt" ids; responses per problem)}."""
    sets = {name: BENCHMARKS[name] for name in cfg.names}
    if cfg.data:
        sets[Path(cfg.data).stem] = Benchmark(cfg.data, None, None, 4)
    for name, b in sets.items():
        problems = load_problems(b.data, b.split, config=b.config)
        if b.rows not in (None, len(problems)):
            raise InputError(f"{name} ({b.data}, split {b.split}) has {len(problems)} problems "
                             f"instead of {b.rows}: another version, scores would not compare")
        problems = problems[:cfg.limit or None]
        add_prompts(problems, name, tokenizer, cfg.template_kwargs)
        sets[name] = problems, (cfg.samples or b.samples) if cfg.temperature else 1
    return sets


def response_length(cfg, sets, context):
    """The longest response in tokens, the same for every problem: to drop a long problem, or to cut
    its responses shorter than the others', would bend the score. InputError where it cannot be."""
    longest = max(len(p["prompt"]) for problems, k in sets.values() for p in problems)
    room = context - longest
    if room < (cfg.max_tokens or 1):
        raise InputError(f"the longest problem takes {longest} tokens of the model's context of "
                         f"{context}, which leaves no room for --max_tokens {cfg.max_tokens or 1}")
    chosen = cfg.max_tokens or min(room, 32768)          # the paper's (Table 5)
    if not cfg.max_tokens and dist.get_rank() == 0:
        print(f"--max_tokens {chosen}: the paper's 32768, or what the context of {context} leaves")
    return chosen


def fingerprint(cfg, sets, source):
    """Everything that the responses depend on, {name: value}: the flags, the problems as the model
    reads them, and the content of its files, since a later model may have the same name."""
    settings = {key: value for key, value in dataclasses.asdict(cfg).items()
                if key not in ("output", "rollout_batch")}               # may differ at a rerun
    model = source.name                                  # of a hub id: the commit
    if Path(cfg.model).is_dir():
        model = [(file.name, hashlib.file_digest(file.open("rb"), "sha256").hexdigest())
                 for file in sorted(source.iterdir())
                 if file.suffix in (".safetensors", ".bin", ".json")]
    for name, value in ("the model's files", model), ("the problems", sets):
        settings[name] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return settings


def read_responses(output):
    """{(set, problem id, sample): row} of responses.jsonl and of the other ranks' parts. A line
    that a kill has cut short is dropped; where a response stands twice, one stays."""
    rows = [row for file in sorted(output.glob("responses*.jsonl")) for row in read_lines(file)]
    return {(row["benchmark"], row["problem_id"], row["sample"]): row for row in rows}


def write_responses(output, rows):
    """All rows into responses.jsonl, in order; the other ranks' parts go only after that."""
    write_whole(output / "responses.jsonl",
                "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
    for part in output.glob("responses.*.jsonl"):
        part.unlink()


def open_output(output, settings):
    """The rows that are there already; InputError where other settings made them. A folder without
    rows, which a start that failed leaves behind, is free for any settings."""
    with one_line(f"cannot read what {output} holds"):
        rows = read_responses(output)
        old = json.loads((output / "results.json").read_text())["settings"] if rows else settings
    if changed := [key for key in settings if old.get(key) != settings[key]]:
        raise InputError(f"{output} holds responses of other settings ({', '.join(changed)}): "
                         "choose another --output")
    all_gather(None)                                     # every rank has read; now rank 0 writes
    if dist.get_rank() == 0:
        if not rows:
            write_whole(output / "results.json", json.dumps({"settings": settings}, indent=1))
        write_responses(output, rows)
    all_gather(None)                                     # the other ranks' parts begin anew
    return rows


# --- 4. The evaluation ----------------------------------------------------------------------------


def answer(cfg, tokenizer, batches, device, part):
    """Draws and grades every batch, (seed, [(key, problem), ...]), and adds its rows to the file
    `part`. A batch that a kill cut in the middle of its rows is drawn whole again, because its
    responses follow from its seed and all of its rows; none is kept or lost for its length."""
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(cfg.dtype, cfg.dtype)
    policy = load_policy(cfg.model, getattr(torch, dtype), tokenizer).to(device)
    bar, marks = tqdm(batches, disable=dist.get_rank() > 0, unit="batch", dynamic_ncols=True), []
    for seed, batch in bar:
        torch.manual_seed(seed)
        rollouts = roll_out(policy, tokenizer, [problem for key, problem in batch], 1,
                            max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_p=cfg.top_p)
        for ((name, number, sample), problem), r in zip(batch, rollouts):
            append(part, {"benchmark": name, "problem_id": number, "sample": sample,
                          "answer": problem["answer"], "response": r.text,
                          "correct": r.reward == 1.0, "truncated": r.truncated,
                          "tokens": len(r.ids)})
        marks += [r.reward for r in rollouts]
        bar.set_postfix_str(f"accuracy {statistics.fmean(marks):.3f}")


def measure(cfg):
    """Answers every problem, grades, writes both files and prints the table."""
    rank, world, device = setup()
    output = Path(cfg.output)
    # whatever can be refused is refused before the weights are loaded
    tokenizer, context, source = load_tokenizer(cfg.model, cfg.template_kwargs)
    sets = load_sets(cfg, tokenizer)
    cfg = dataclasses.replace(cfg, max_tokens=response_length(cfg, sets, context))
    settings = fingerprint(cfg, sets, source)
    done = open_output(output, settings)
    # one sample of every problem, then the next: the progress bar's accuracy is soon one over all
    pairs = [((name, p["id"], sample), p) for name, (problems, k) in sets.items()
             for sample in range(k) for p in problems]
    batches = [(hash((cfg.seed, first)), pairs[first:first + cfg.rollout_batch])
               for first in range(0, len(pairs), cfg.rollout_batch)]     # (seed, rows)
    left = [batch for batch in batches if any(key not in done for key, problem in batch[1])]
    if left[rank::world]:
        part = output / (f"responses.{rank}.jsonl" if rank else "responses.jsonl")
        answer(cfg, tokenizer, left[rank::world], device, part)
    all_gather(None)                                     # every part is whole
    if rank == 0:
        rows = read_responses(output)
        assert len(rows) == len(pairs), f"do all ranks write into the same {output}?"
        write_responses(output, rows)
        results = {name: summarise([r for key, r in rows.items() if key[0] == name], k)
                   for name, (problems, k) in sets.items()}
        if len(results) > 1:
            results["average"] = average(list(results.values()))
        report = {"settings": settings, "torch": torch.__version__,
                  "transformers": transformers.__version__, "results": results}
        write_whole(output / "results.json", json.dumps(report, indent=1) + "\n")
        print(table(results))


if __name__ == "__main__":
    main(measure, EvalConfig)
