"""The rows of the paper's tables on the toy: runs what toy/results/ does not hold yet.

    python toy/lab.py                                     # every arm on every seed
    python toy/lab.py --arms grpo antisd --seeds 0 1      # some of them
    python eval.py --curves toy/results/*/ --output toy/results/curves.svg     # table and picture

A run is `python antisd.py @toy/demo.args --lam 0.5`, the arm's flags below and a seed. Of each,
config.json, metrics.jsonl and tokens.json stay; the last one counts tokens by kind, with their u,
in the two responses a step that samples.jsonl keeps. It prints that as a table, and when the gate
moved.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOY = Path(__file__).resolve().parent
RUNS = TOY.parent / "runs" / "lab"
RESULTS = TOY / "results"
DELIBERATION = ("wait", "hmm", "but", "maybe")

ARMS = {                                        # "{run}": the folder of the same seed's GRPO run
    "grpo": "--method grpo",
    "sd": "--method sd",
    "sd_jsd": "--method sd_jsd",
    "antisd": "--method antisd",
    "lam_01": "--lam 0.1",
    "antisd_kl": "--method antisd_kl",
    "no_gate": "--tau_down 0",
    "tau_90": "--tau_down 0.90",
    "tau_95": "--tau_down 0.95",
    "mul": "--compose mul",
    "student_gate": "--gate_source student",
    "no_teacher": "--method no_teacher",
    "continual": "--init_from {run}",
    "grpo_on": "--method grpo --init_from {run}",          # what continual is to be compared with
}
SEEDS = (0, 1, 2, 3, 4)


def kind(tokens, i):
    """What a response's i-th token is for."""
    word, before = tokens[i], tokens[i - 1] if i else ""
    if word in DELIBERATION:
        return "deliberation"
    if word == "so":
        return "stop"
    if word.isdigit() and before == "makes":             # "start with 3 wait B 2 makes 0"
        earlier, term = tokens[:max(0, i - 2)], tokens[i - 2]
        sums = [int(digit) for opens, digit in zip(earlier, earlier[1:])
                if opens in ("with", "makes") and digit.isdigit()]
        right = sums and term.isdigit() and (sums[-1] + int(term)) % 5 == int(word)
        return "right sum" if right else "wrong sum"
    if word.isdigit():
        return "boxed digit" if before == "\\boxed{" else "term"
    return "other"


def by_kind(samples):
    """{kind: count and, but for grpo, mean u and share of u < 0}, deliberation words a response."""
    values = {}
    for row in samples:
        for i, u in enumerate(row["u"]):
            values.setdefault(kind(row["tokens"], i), []).append(u)
    table = {name: {"count": len(us)} | ({} if us[0] is None else {
        "u": round(statistics.fmean(us), 4),
        "negative": round(statistics.fmean(u < 0 for u in us), 4)})
        for name, us in sorted(values.items())}
    words = sum(token in DELIBERATION for row in samples for token in row["tokens"])
    return {"kinds": table, "deliberation words": round(words / max(1, len(samples)), 3)}


def rounded(row):
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(arm, seed):
    """One run, condensed into toy/results/<arm>_<seed>; nothing where that is there."""
    kept = RESULTS / f"{arm}_{seed}"
    if (kept / "tokens.json").exists():
        return
    folder = RUNS / f"{arm}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ARMS[arm].format(run=f"runs/lab/grpo_{seed}").split()
    command = [sys.executable, "antisd.py", "@toy/demo.args", "--lam", "0.5", *flags,
               "--seed", str(seed), "--sample_every", "1", "--output", f"runs/lab/{arm}_{seed}"]
    ended = subprocess.run(command, cwd=TOY.parent, capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stderr[-2000:]}")
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "config.json", kept)
    metrics, samples = lines(folder / "metrics.jsonl"), lines(folder / "samples.jsonl")
    (kept / "metrics.jsonl").write_text("".join(json.dumps(rounded(r)) + "\n" for r in metrics))
    steps = sorted({row["step"] for row in samples})
    parts = {"first 10 steps": steps[:10], "last 10 steps": steps[-10:]}
    (kept / "tokens.json").write_text(json.dumps(
        {name: by_kind([r for r in samples if r["step"] in part]) for name, part in parts.items()},
        indent=1) + "\n")
    print(f"{kept} is done", flush=True)


def show(arms):
    """For each arm deliberation words a response, the share of sums that are wrong, u by kind of
    token, and when the gate moved."""
    print(f"{'arm':14}{'steps':16}{'words':>6}{'slips':>7}  mean u (share of u < 0) by kind")
    for arm in arms:
        files = sorted(RESULTS.glob(f"{arm}_[0-9]*/tokens.json"))
        runs = [json.loads(file.read_text()) for file in files]
        for part in ("first 10 steps", "last 10 steps") if runs else ():
            words = statistics.fmean(r[part]["deliberation words"] for r in runs)
            right, wrong = (sum(r[part]["kinds"].get(f"{name} sum", {"count": 0})["count"]
                                for r in runs) for name in ("right", "wrong"))
            cells = []
            for name in ("deliberation", "stop", "term", "right sum", "wrong sum",
                         "boxed digit"):
                found = [r[part]["kinds"].get(name, {}) for r in runs]
                found = [f for f in found if "u" in f]
                n = sum(f["count"] for f in found)
                if n:
                    u, negative = (sum(f[k] * f["count"] for f in found) / n
                                   for k in ("u", "negative"))
                    cells.append(f"{name} {u:+.2f} ({negative:.0%})")
            print(f"{arm:14}{part:16}{words:6.1f}{wrong / max(1, right + wrong):7.0%}  "
                  + ", ".join(cells))
    print("\nsteps at which the gate moved, by seed")
    for arm in arms:
        moves = []
        for file in sorted(RESULTS.glob(f"{arm}_[0-9]*/metrics.jsonl")):
            gates = [row["gate"] for row in lines(file) if "gate" in row]
            moves.append(" ".join(str(i) for i in range(1, len(gates)) if gates[i] != gates[i - 1]))
        if any(moves):
            print(f"{arm:14}{'; '.join(move or 'never' for move in moves)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    for arms in [[a for a in args.arms if "{run}" not in ARMS[a]],
                 [a for a in args.arms if "{run}" in ARMS[a]]]:          # these need the others'
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, *zip(*[(arm, seed) for seed in args.seeds for arm in arms]))
                 if arms else [])
    show(args.arms)


if __name__ == "__main__":
    main()
