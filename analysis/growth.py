"""What one more of everything costs: a step's time and peak memory against the length of responses,
the group size, the number of problems, the ranks and the model.

    python analysis/growth.py --data gsm8k.jsonl --model toy/model SMOLLM2

Each line of the table is one run of two steps, of which the second is shown, and differs from the
line above it in one respect. All responses of a run have the same length: the model is given an end
token that lies outside its vocabulary, which it can never draw. "grows as" is the exponent e
between two lines, cost ~ size^e: 1 is linear, 2 quadratic, 0 constant. What to expect, and why:

    length      decoding reads all weights for every token (linear) and the cache so far (a share
                that grows); attention makes scoring and training quadratic in the end; below 1
                where the prompts, which every row brings along, are most of the row
    group size, scoring and training are linear; decoding is less, for as long as reading the
    problems    weights, which all rows share, outweighs the arithmetic
    ranks       one problem on each of two ranks against two problems on one: the ranks of one
                machine share its cores and its memory's speed
    memory      a constant (float32 weights, gradients, AdamW's two moments) and then linear in the
                tokens of a micro-batch, which --micro_tokens bounds: flat from there
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import versus_trl

ANTISD = Path(__file__).resolve().parent.parent / "antisd.py"


def run_forced(work, flags):
    """run_ours with responses of exactly max_tokens -> rank 0's steps with all ranks' peak."""
    sys.path.insert(0, str(ANTISD.parent))
    import antisd
    load_policy = antisd.load_policy

    def without_end(*positional):
        policy = load_policy(*positional)
        policy.eos_ids = [policy.model.config.vocab_size + 10**6]
        return policy

    antisd.load_policy = without_end
    steps = versus_trl.run_ours(work, str(ANTISD), flags)
    peaks = antisd.all_gather([step["peak_gib"] for step in steps])      # of every rank
    return [step | {"peak_gib": max(column)} for step, column in zip(steps, zip(*peaks))]


def measure(work, ranks, flags, threads):
    """One run on `ranks` ranks -> its second step: {"whole", "generate", "peak_gib", ...}."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), __file__, "--child", json.dumps([work, flags])]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {
        "OMP_NUM_THREADS": str(max(1, threads // ranks))})
    if ended.returncode:
        sys.exit(f"{flags} on {ranks} ranks failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])[1]


def exponent(old, new, size):
    """e of cost ~ size^e between two runs whose sizes have the ratio `size`; "" where it is 1."""
    return f"{math.log(new / old) / math.log(size):.2f}" if size != 1 else ""


def series(base, args):
    """[(name, [(label, ranks, settings, size)])]: each series varies one thing about `base`."""
    return [
        ("length", [(n, 1, base | {"max_tokens": n}, n) for n in args.lengths]),
        ("group size", [(n, 1, base | {"group_size": n}, n) for n in args.groups]),
        ("problems", [(n, 1, base | {"problems_per_step": n}, n) for n in args.problems]),
        ("ranks", [(n, n, base | {"problems_per_step": 2}, n) for n in args.ranks]),
        ("model", [(m, 1, base | {"model": m}, 1) for m in args.model if len(args.model) > 1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="problems, any file that antisd.py reads")
    parser.add_argument("--model", nargs="+", required=True, help="the first one serves all lines")
    for name, default in (("lengths", (64, 128, 256, 512, 1024)), ("groups", (2, 4, 8, 16)),
                          ("problems", (1, 2, 4, 8)), ("ranks", (1, 2))):
        parser.add_argument(f"--{name}", type=int, nargs="*", default=default)
    for name, default in ("max_tokens", 128), ("micro_tokens", 4096), ("threads", 2):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    sys.path.insert(0, str(ANTISD.parent))
    import antisd
    base = dict(model=args.model[0], problems_per_step=1, group_size=4, steps=2, dtype="float32",
                max_tokens=args.max_tokens, micro_tokens=args.micro_tokens)
    print(f"1 problem x 4 responses of {args.max_tokens} tokens, but for what a line names; "
          f"micro-batches of {args.micro_tokens} tokens; {args.threads} threads in all, "
          f"{os.cpu_count()} cores\n\n| | | step, s | grows as | generation, s | grows as "
          "| scoring + training, s | grows as | peak, GiB a rank |\n|---|---|" + "---:|" * 7)
    with tempfile.TemporaryDirectory() as work:
        rows = antisd.load_problems(args.data, limit=max([2, *args.problems]))
        Path(work, "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for name, lines in series(base, args):
            old = None
            for label, ranks, flags, size in lines:
                step = measure(work, ranks, flags, args.threads)
                costs = step["whole"], step["generate"], step["whole"] - step["generate"]
                cells = [f"{cost:.2f} | {exponent(before, cost, size / old[1]) if old else ''}"
                         for before, cost in zip(old[0] if old else costs, costs)]
                print(f"| {name} | {label} | {' | '.join(cells)} | {step['peak_gib']:.2f} |",
                      flush=True)
                old = costs, size


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        found = run_forced(*json.loads(sys.argv[2]))
        if os.environ["RANK"] == "0":
            print("\n" + json.dumps(found))
        torch.distributed.destroy_process_group()        # else gloo's threads may abort the exit
    else:
        main()
