"""The lab: every arm on several seeds, and every table of LAB.md from toy/results.csv.

    python toy/lab.py run grpo antisd --seeds 20 21 22      # what results.csv does not hold yet
    python toy/lab.py ends                                  # a row an arm: learned when, ends where
    python toy/lab.py seeds grpo antisd                     # a row an arm: every seed's steps
    python toy/lab.py kinds p20_antisd p20_sd               # u and mistakes by kind of token
    python toy/lab.py gate                                  # when the gate moved
    python toy/lab.py map                                   # steps to 90% against P(go on)
    python toy/lab.py predict                               # what the model of eight logits says
    python toy/lab.py picture                               # both as toy/map.svg

A run is `antisd.py @toy/demo.args`, the arm's flags and a seed, in a process of one thread, --jobs
of them at a time; its folder is runs/lab/ARM_SEED. When it has ended, its lines are added to
toy/results.csv, a line a step; an empty cell was not measured. Runs that results.csv holds are
skipped, so an interrupted lab goes on where it stopped.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOY = Path(__file__).resolve().parent
ROOT, RUNS, RESULTS = TOY.parent, TOY.parent / "runs" / "lab", TOY / "results.csv"
WORDS = ("wait", "hmm", "but", "maybe")

# --- The arms -------------------------------------------------------------------------------------

# Flags after @toy/demo.args. {runs}: runs/lab, {base}: an arm's prefix, {seed}: the seed. Runs that
# learn are at the top by step 50 or so: STEPS is enough for all but those that wait for chance.
STEPS = 60
FLAGS = {
    "grpo": "--method grpo --steps 100",
    "antisd": "--steps 70",
    "sd": "--method sd",
    "sd_jsd": "--method sd_jsd",
    "antisd_kl": "--method antisd_kl",
    "no_teacher": "--method no_teacher",
    "no_gate": "--tau_down 0",
    "tau_90": "--tau_down 0.90",
    "tau_95": "--tau_down 0.95",
    "mul": "--compose mul",
    "student_gate": "--gate_source student",
    "lam_01": "--lam 0.1",
    "undecided": "",                    # with the fork below
    # stopped before anything is learned; then both go on from there
    "grpo_stopped": "--method grpo --steps 15 --save_every 15",
    "grpo_on": "--method grpo --init_from {runs}/{base}grpo_stopped_{seed} --steps 85",
    "continual": "--init_from {runs}/{base}grpo_stopped_{seed}",
    # four training problems of ten have an answer that no sum is
    "unsolvable_grpo": "--method grpo --dataset {runs}/unsolvable.jsonl",
    "unsolvable": "--dataset {runs}/unsolvable.jsonl",
    "unsolvable_no_gate": "--tau_down 0 --dataset {runs}/unsolvable.jsonl",
    # three times as long
    "long": "--steps 180",
    "long_no_gate": "--tau_down 0 --steps 180",
    # the gate's statistic is a mean over fewer tokens
    "batch_8": "--problems_per_step 8",
    "batch_8_no_gate": "--problems_per_step 8 --tau_down 0",
}

# The bases: P(go on) without and with a solution in view. "" is toy/model.
BASES = {"": (0.27, 0.09), "p15_": (0.15, 0.06), "p20_": (0.20, 0.08), "p25_": (0.25, 0.10),
         "p30_": (0.30, 0.12), "p37_": (0.37, 0.148)}
ARMS = {}
for base in BASES:
    on_base = base and f"--model {{runs}}/{base}base/model "
    whole_lab = base in ("", "p20_")                     # on the others the map alone
    ARMS |= {base + arm: on_base + flags for arm, flags in FLAGS.items()} if whole_lab else {
        f"{base}grpo": f"{on_base}--method grpo --steps 75", f"{base}antisd": on_base}

# The fork that is "undecided": the one line of `train` where u is formed. A token on which the
# student's entropy is below a tenth of a nat gets no AntiSD term.
FORK = ("u[at] = t[at] - s ", "u[at] = (t[at] - s) * (H_S > 0.1) ")



def base_of(arm):
    return next((base for base in BASES if base and arm.startswith(base)), "")


# --- One run --------------------------------------------------------------------------------------


def kinds_of(tokens, problem):
    """What each token of a response is for, by the grammar of the traces: a list of names."""
    terms, kinds, total, depth = dict(re.findall(r"([A-Z])(\d)", problem)), [], None, 0
    letters, body = sorted(terms), True
    expect = ["start", "A", "term"]
    for i, token in enumerate(tokens):
        want = expect.pop(0) if expect else "choice" if body else None
        if want == "choice" and token == "so":
            body, expect = False, ["the", "answer", "is", "\\boxed{", "box", "}", "<|im_end|>"]
            kinds.append("so" if depth < len(letters) - 1 else "last so")
        elif want == "choice" and token in WORDS and depth < len(letters) - 1:
            depth += 1
            kinds.append("go on")
            expect = [letters[depth], "term", "makes", "sum"]
        elif want == "term" and token.isdigit():
            kinds.append("term" if token == terms[letters[depth]] else "misread term")
            added = int(token)
            total = added if total is None else total
        elif want == "sum" and token.isdigit():
            kinds.append("sum" if int(token) == (total + added) % 5 else "slip")
            total = int(token)
        elif want == "box" and token.isdigit():
            kinds.append("box" if depth == len(letters) - 1 else "early box")
        elif want == token:
            kinds.append("fixed")
        else:                                            # off the grammar: the rest is garbage
            return kinds + ["garbage"] * (len(tokens) - i)
    return kinds


def count_kinds(tokenizer, rollouts, u):
    """{"n/KIND": tokens of that kind, "u/KIND": their mean u} and the share of whole chains."""
    found, whole = {}, 0
    for i, r in enumerate(rollouts):
        kinds = kinds_of(tokenizer.convert_ids_to_tokens(r.ids), r.problem["problem"])
        whole += "last so" in kinds
        for kind, value in zip(kinds, u[i].tolist()):
            found.setdefault(kind, []).append(value)
    return {"whole": whole / len(rollouts)} | {
        f"{name}/{kind}": f(values) for kind, values in found.items()
        for name, f in (("n", len), ("u", statistics.fmean))}


def one(arm, seed, source):
    """Runs one arm on one seed in this process, antisd.py's `summary` extended by the kinds."""
    text = source.read_text()
    if arm.endswith("undecided"):
        assert text.count(FORK[0]) == 1, f"{source} forms u in another way: mend FORK"
        text = text.replace(*FORK)
    antisd = types.ModuleType("antisd")
    antisd.__file__ = str(source)
    sys.modules["antisd"] = antisd                       # dataclasses look their module up
    exec(compile(text, str(source), "exec"), antisd.__dict__)
    from transformers import AutoTokenizer
    tokenizer, plain = AutoTokenizer.from_pretrained(TOY / "model"), antisd.summary

    def summary(rollouts, sources, mask, a_seq, u, *rest):
        return (plain(rollouts, sources, mask, a_seq, u, *rest)
                | count_kinds(tokenizer, rollouts, u))

    antisd.summary = summary
    flags = ARMS[arm].format(runs=RUNS, base=base_of(arm), seed=seed).split()
    sys.argv = [str(source), f"@{TOY / 'demo.args'}", "--steps", str(STEPS), "--save_every", "0",
                *flags, "--seed", str(seed), "--output", str(RUNS / f"{arm}_{seed}")]
    antisd.main(antisd.train)


# --- results.csv ----------------------------------------------------------------------------------

COLUMNS = {                                              # column -> (key in metrics.jsonl, digits)
    "eval_accuracy": ("eval_accuracy", 4), "reward": ("reward", 3), "length": ("length", 2),
    "truncated": ("truncated", 3), "zero_std_groups": ("zero_std_groups", 3),
    "student_entropy": ("student_entropy", 4), "teacher_entropy": ("teacher_entropy", 5),
    "gate": ("gate", 0), "lam": ("lam", 2), "whole": ("whole", 3),
    "go_on": ("n/go on", 0), "early_so": ("n/so", 0), "sums": ("n/sum", 0), "slips": ("n/slip", 0),
    "misread": ("n/misread term", 0), "garbage": ("n/garbage", 0), "u_go_on": ("u/go on", 3),
    "u_early_so": ("u/so", 3), "u_sum": ("u/sum", 3), "u_slip": ("u/slip", 2),
    "u_term": ("u/term", 3), "u_fixed": ("u/fixed", 3), "u_early_box": ("u/early box", 2),
    "u_box": ("u/box", 3),
}


def read():
    """{(arm, seed): [row]}, numbers as floats, empty cells as None."""
    runs = {}
    if RESULTS.exists():
        with open(RESULTS, newline="") as stream:
            for row in csv.DictReader(stream):
                runs.setdefault((row["arm"], int(row["seed"])), []).append(
                    {k: float(v) if v else None for k, v in row.items() if k != "arm"})
    return runs


def condensed(arm, seed):
    """The lines of results.csv of a finished run."""
    metrics = RUNS / f"{arm}_{seed}" / "metrics.jsonl"
    for row in map(json.loads, metrics.read_text().splitlines()):
        cells = [arm, seed, row["step"]]
        for key, digits in COLUMNS.values():
            value = row.get(key)
            if value is None and key.startswith("n/") and "reward" in row:
                value = 0
            if key.startswith("u/") and not row.get("u_mean"):
                value = None                             # grpo has no teacher: its u is empty
            cells.append("" if value is None else f"{value:.{digits}f}")
        yield cells


def prepare(arms):
    """Bases and data that some arms need and that are made here."""
    RUNS.mkdir(parents=True, exist_ok=True)
    needed = {base_of(arm) for arm in arms} - {""}
    for base in ["p20_"] * bool(needed) + sorted(needed - {"p20_"}):
        if not (RUNS / f"{base}base" / "model").exists():
            go_on, told = map(str, BASES[base])          # p20_ from scratch, the others from that
            init = [] if base == "p20_" else ["--init", str(RUNS / "p20_base")]
            subprocess.run([sys.executable, str(TOY / "make_toy.py"), "--go_on", go_on,
                            "--go_on_told", told, *init, "--output", str(RUNS / f"{base}base")],
                           check=True)
    rows = [json.loads(line) for line in (TOY / "train.jsonl").read_text().splitlines()]
    for row in rows[:len(rows) * 4 // 10]:               # their order is random
        row["answer"] = "5"
        row["solution"] = ""
    (RUNS / "unsolvable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(arms, seeds, jobs, source):
    """Every arm on every seed that results.csv does not hold, in the order of the arms."""
    held, lock = read(), threading.Lock()
    prepare(arms)

    def work(arm, seed):
        command = [sys.executable, str(TOY / "lab.py"), "one", arm, "--seeds", str(seed),
                   "--source", str(source)]
        if (arm, seed) in held:
            return
        folder = RUNS / f"{arm}_{seed}"
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.mkdir()
        with open(folder / "log.txt", "w") as log:
            ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ended.returncode:
            print(f"{arm} {seed} failed, see {folder / 'log.txt'}", flush=True)
            return
        with lock:
            lines = [] if RESULTS.exists() else [["arm", "seed", "step", *COLUMNS]]
            lines += condensed(arm, seed)
            text = "".join(",".join(map(str, cells)) + "\n" for cells in lines)
            with open(RESULTS, "ab", buffering=0) as stream:  # whole: two labs may run
                stream.write(text.encode())
        print(f"{arm} {seed} is done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: work(*pair), [(arm, seed) for arm in arms for seed in seeds]))


# --- The tables -----------------------------------------------------------------------------------


def steps_to(rows, level):
    """The first evaluation at which held-out accuracy reaches `level`, or None."""
    return next((int(row["step"]) for row in rows
                 if row["eval_accuracy"] is not None and row["eval_accuracy"] >= level), None)


def mean(rows, column):
    values = [row[column] for row in rows if row[column] is not None]
    return statistics.fmean(values) if values else None


def trained(rows):
    """The rows of training steps: all but the last, which is an evaluation alone."""
    return [row for row in rows if row["reward"] is not None]


def mistakes(rows):
    """Shares: wrong sums of all sums, wrong terms of all terms, tokens off the grammar of all."""
    total = {k: sum(row[k] or 0 for row in rows)
             for k in ("sums", "slips", "misread", "garbage")}
    sums = total["sums"] + total["slips"]
    terms = sums + 256 * len(rows)                       # each response has a first one, unsummed
    tokens = sum(256 * row["length"] for row in rows)    # 32 problems x 8 responses
    return {"slips": total["slips"] / max(1, sums), "misread": total["misread"] / terms,
            "garbage": total["garbage"] / tokens}


def facts(rows):
    """One run's numbers. What was not reached counts as the run's length in `median` below."""
    curve = [row["eval_accuracy"] for row in rows if row["eval_accuracy"] is not None]
    steps = trained(rows)
    return {"length of run": len(steps), "before": curve[0], "best": max(curve), "end": curve[-1],
            "to50": steps_to(rows, 0.5), "to85": steps_to(rows, 0.85), "to90": steps_to(rows, 0.9),
            "tokens": mean(steps[-5:], "length"), **mistakes(steps[-10:]),
            "H_S": mean(steps[-5:], "student_entropy"), "H_T": mean(steps[-5:], "teacher_entropy"),
            "open": mean([r for r in steps if r["step"] >= 5], "lam"),
            "shut at end": steps[-1]["gate"] == 0}


def show(value, digits=2, factor=1):
    return "-" if value is None else f"{factor * value:.{digits}f}"


def median(runs, key):
    """The median over seeds; a run that never gets there counts as its length, marked by >=."""
    values = sorted((run[key] if run[key] is not None else run["length of run"], run[key] is None)
                    for run in runs)
    value, never = values[(len(values) - 1) // 2]
    return f"{'>=' if never else ''}{value}"


def paired(runs, others, key):
    """Mean difference over the seeds that both arms have, and its standard error."""
    both = sorted(set(runs) & set(others))
    gaps = [100 * (runs[seed][key] - others[seed][key]) for seed in both]
    if len(gaps) < 2:
        return "-"
    return f"{statistics.fmean(gaps):+.1f} +- {statistics.stdev(gaps) / len(gaps)**0.5:.1f}"


def by_arm(arms):
    """{arm: {seed: facts}} of the arms that results.csv holds, in the order of ARMS."""
    found = {}
    for (arm, seed), rows in sorted(read().items(), key=lambda item: item[0][1]):
        found.setdefault(arm, {})[seed] = facts(rows)
    return {arm: found[arm] for arm in ARMS if arm in found and (not arms or arm in arms)}


def ends(arms):
    """A row an arm: means over seeds, percent; "- grpo": at the end, paired by seed."""
    print(f"{'arm':20}{'seeds':>6}{'steps':>6}{'before':>8}{'best':>7}{'end':>7}{'worst':>7}"
          f"{'- grpo':>15}{'learn':>7}{'to 50':>7}{'to 85':>7}{'to 90':>7}{'tokens':>8}"
          f"{'slips %':>9}{'misread %':>11}{'garbage %':>11}{'H_S':>7}{'H_T':>7}{'open':>6}"
          f"{'shut':>6}")
    every = by_arm([])
    for arm, runs in by_arm(arms).items():
        grpo = every.get(f"{base_of(arm)}grpo", {})
        each = list(runs.values())
        of = lambda key: statistics.fmean(run[key] for run in each if run[key] is not None)  # noqa
        gated = each[0]["open"] is not None and each[0]["H_T"] is not None
        print(f"{arm:20}{len(each):6}{each[0]['length of run']:6}{100 * of('before'):8.1f}"
              f"{100 * of('best'):7.1f}{100 * of('end'):7.1f}"
              f"{100 * min(run['end'] for run in each):7.1f}{paired(runs, grpo, 'end'):>15}"
              f"{sum(run['to85'] is not None for run in each):>4}/{len(each)}"
              f"{median(each, 'to50'):>8}{median(each, 'to85'):>7}{median(each, 'to90'):>7}"
              f"{of('tokens'):8.1f}{100 * of('slips'):9.3f}{100 * of('misread'):11.2f}"
              f"{100 * of('garbage'):11.2f}{of('H_S'):7.3f}"
              f"{show(of('H_T') if gated else None, 3):>7}"
              f"{show(2 * of('open') if gated else None):>6}"
              f"{sum(run['shut at end'] for run in each) if gated else '-':>6}")


def seeds(arms):
    """A row a run: when it reached 50, 85 and 90% held-out, and its end."""
    for arm, runs in by_arm(arms).items():
        print(f"{arm:20}" + "   ".join(
            f"{seed}: {'/'.join(show(run[k], 0) for k in ('to50', 'to85', 'to90'))} -> "
            f"{100 * run['end']:.0f}" for seed, run in runs.items()))


def kinds(arms):
    """Every ten steps: P(go on), whole chains, mistakes in percent, and u by kind of token."""
    columns = ("u_go_on", "u_early_so", "u_sum", "u_slip", "u_term", "u_fixed", "u_early_box",
               "u_box")
    print(f"{'arm':20}{'steps':>8}{'P(go on)':>10}{'whole %':>9}{'slips %':>9}{'misread %':>11}"
          f"{'garbage %':>11}{'H_T':>8}" + "".join(f"{c[2:]:>11}" for c in columns))
    every = read()
    for arm in by_arm(arms):
        rows = [row for (name, _), run in every.items() if name == arm for row in trained(run)]
        for first in range(0, int(max(row["step"] for row in rows)) + 1, 10):
            part = [row for row in rows if first <= row["step"] < first + 10]
            go_on, stop = (sum(row[k] or 0 for row in part) for k in ("go_on", "early_so"))
            wrong = mistakes(part)
            print(f"{arm:20}{first:>4}-{first + 9:<3}{go_on / max(1, go_on + stop):10.2f}"
                  f"{100 * mean(part, 'whole'):9.1f}{100 * wrong['slips']:9.3f}"
                  f"{100 * wrong['misread']:11.2f}{100 * wrong['garbage']:11.2f}"
                  f"{show(mean(part, 'teacher_entropy'), 3):>8}"
                  + "".join(f"{show(mean(part, c)):>11}" for c in columns))


def gate(arms):
    """The steps at which the gate moved, by seed: -17 shut at step 17, +20 opened at step 20."""
    for arm in by_arm(arms):
        for (name, seed), run in read().items():
            gates = [(row["step"], row["gate"]) for row in trained(run) if row["step"] >= 4]
            if name != arm or gates[0][1] is None:
                continue
            gates[0] = (4, 1.0)                          # it starts open; the warm-up is no move
            moves = [f"{'+' if now else '-'}{int(step)}"
                     for (_, before), (step, now) in zip(gates, gates[1:]) if now != before]
            print(f"{arm:20}{seed:3}  {' '.join(moves) or 'open throughout'}")


# --- The prediction and the picture ---------------------------------------------------------------

# What the prediction knows of the network: how far one of Adam's steps, all in one direction, moves
# the logit of P(go on), and how much of that is of one depth alone. Set by the pilots on seeds 100
# and 101 (LAB.md), before any run that is reported.
STEP, OWN = 0.3, 0.5


def simulate(go_on, told, method, steps, runs=60, lam=0.5, problems=32, group=8):
    """Held-out accuracy (steps, runs) of a policy that is nothing but its 8 choices.

    The logit of P(go on) at depth k is a + b_k, the teacher's the same less a constant. 256 chains
    a step are drawn, graded (whole: right; else right by luck, 1 in 5, the same for all of a group
    that stop there), A_seq and Eq. (6) computed, and a and b_k moved by Adam. GRPO is then a random
    walk, whose drift at depth k is that of p^8; what AntiSD adds at every depth reached,
    p(1 - p) lambda (phi(u_so) - phi(u_go)), is steady."""
    import numpy as np
    depths, rng = 8, np.random.default_rng(0)
    start = np.log(go_on / (1 - go_on))
    shift = np.log(told / (1 - told)) - start
    weights, m, v = (np.zeros((runs, 1 + depths)) for _ in range(3))         # a, b_1 .. b_8
    rates = STEP * np.array([1 - OWN] + [OWN] * depths)
    gate, warm, curve, k = np.ones(runs), [], [], np.arange(depths)
    phi = lambda u: 0.5 * (np.logaddexp(0, u) - np.log(2))  # noqa: E731
    for step in range(steps):
        logits = start + weights[:, :1] + weights[:, 1:]
        p, q = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-logits - shift))  # (runs, depths)
        whole = p.prod(1)
        curve.append(whole + 0.2 * (1 - whole))
        goes = rng.random((runs, problems, group, depths)) < p[:, None, None]
        length = np.where(goes.all(-1), depths, (~goes).argmax(-1))          # (runs, B, G)
        right = rng.random((runs, problems, depths + 1)) < 0.2
        right[..., depths] = True
        rewards = np.take_along_axis(right, length, 2).astype(float)
        std = rewards.std(2, ddof=1, keepdims=True)
        a_seq = ((rewards - rewards.mean(2, keepdims=True)) / (std + 1e-6))[..., None]
        went, stopped = k < length[..., None], k == length[..., None]
        tokens = (11 + 5 * length).sum((1, 2))
        lam_now = np.zeros(runs)
        if method == "antisd":
            entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
            H = ((went | stopped) * entropy[:, None, None]).sum((1, 2, 3)) / tokens
            if step < 5:
                warm.append(H)
            else:
                h_warm = np.median(warm, 0)
                gate = np.where(H >= h_warm, 1, np.where(H < 0.93 * h_warm, 0, gate))
                lam_now = lam * gate
        pay_go, pay_so = (-(lam_now[:, None] * phi(u))[:, None, None] for u in (
            np.log(q / p), np.log((1 - q) / (1 - p))))
        gradient = (went * (a_seq + pay_go) * (1 - p[:, None, None])
                    - stopped * (a_seq + pay_so) * p[:, None, None]).sum((1, 2)) / tokens[:, None]
        gradient = np.concatenate([gradient.sum(1, keepdims=True), gradient], 1)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        scaled = (m / (1 - 0.9**(step + 1))) / (np.sqrt(v / (1 - 0.999**(step + 1))) + 1e-8)
        weights += rates * min(1, (step + 1) / 40) * scaled                  # --warmup_lr_steps 40
    return np.array(curve)


def first_at(accuracy, level=0.9):
    """(steps, runs) -> each run's first step at `level`, infinity where it never gets there."""
    hit = accuracy >= level
    return [float(column.argmax()) if column.any() else math.inf for column in hit.T]


def quartiles(values):
    values = sorted(values)
    return [values[int(share * (len(values) - 1))] for share in (0.25, 0.5, 0.75)]


def predict(_):
    """The model of eight logits: of 60 runs each, steps to 90%, and how many get there in 100."""
    print(f"{'P(go on)':>8}  {'GRPO: quartiles, learn':>32}  {'AntiSD: quartiles, learn':>32}")
    for go_on, told in sorted(BASES.values()):
        cells = []
        for method in ("grpo", "antisd"):
            steps = first_at(simulate(go_on, told, method, 100))
            q = " ".join(f"{x:4.0f}" for x in quartiles(steps))
            cells.append(f"{q}  {statistics.fmean(math.isfinite(x) for x in steps):4.0%}")
        print(f"{go_on:8.2f}  {cells[0]:>32}  {cells[1]:>32}")


def map_points():
    """{method: [(P(go on), [each run's steps to 90%, None for never])]}, the shipped base's too."""
    every = by_arm([])
    return {method: sorted((go_on, [run["to90"] for run in every.get(base + method, {}).values()])
                           for base, (go_on, _) in BASES.items())
            for method in ("grpo", "antisd")}


def map_table(_):
    """Steps to 90% held-out by P(go on), a number a seed, "-" for never."""
    for method, found in map_points().items():
        for p, steps in found:
            print(f"{method:8}{p:.2f}   " + "  ".join(show(s, 0) for s in steps))


def picture(_):
    """toy/map.svg: a dot a run, above the line those that never learned; behind, the prediction."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "antisd"       # the same picture gives the same file
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7.2, 4.2), facecolor="white")
    never = 112
    for method, colour, name, shift in (("grpo", "#c2410c", "GRPO", 0.003),
                                        ("antisd", "#1d4ed8", "AntiSD", -0.003)):
        bands = [quartiles(first_at(simulate(*base, method, 100))) for base in sorted(
            BASES.values())]
        grid = [go_on for go_on, _ in sorted(BASES.values())]
        low, middle, high = ([min(x, never) for x in line] for line in zip(*bands))
        axes.fill_between(grid, low, high, color=colour, alpha=0.13, lw=0)
        axes.plot(grid, middle, color=colour, lw=1.5, ls="--",
                  label=f"{name}, predicted (median, quartiles)")
        axes.plot([], [], "o", ms=5, color=colour, label=f"{name}, a run each")
        for p, steps in map_points()[method]:
            for i, step in enumerate(steps):
                axes.plot(p + shift + 0.0012 * (i - len(steps) / 2),
                          never if step is None else step, "o", ms=5, mec=colour, lw=0,
                          mfc="white" if step is None else colour)
    axes.axhline(104, color="#666666", lw=0.8)
    axes.set_yticks([*range(0, 101, 20), never], [*map(str, range(0, 101, 20)), "not in\nthe run"])
    axes.set(xlabel="the base's P(go on) at each of 8 decisions", ylim=(0, 118),
             ylabel="steps to 90% held-out accuracy")
    axes.legend(frameon=False, loc="lower center", ncols=2, fontsize=9)
    figure.tight_layout()
    figure.savefig(TOY / "map.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tables = {"ends": ends, "seeds": seeds, "kinds": kinds, "gate": gate, "map": map_table,
              "predict": predict, "picture": picture}
    parser.add_argument("command", choices=["run", "one", *tables])
    parser.add_argument("arms", nargs="*", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21, 22, 23, 24])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--source", type=Path, default=ROOT / "antisd.py", help="the trainer")
    args = parser.parse_args()
    unknown = set(args.arms) - set(ARMS)
    if unknown:
        parser.error(f"no such arm: {', '.join(sorted(unknown))}")
    if args.command == "run":
        run(args.arms or list(ARMS), args.seeds, args.jobs, args.source)
    elif args.command == "one":
        one(args.arms[0], args.seeds[0], args.source)
    else:
        tables[args.command](args.arms)


if __name__ == "__main__":
    main()
