"""The lab: every arm on several seeds, and every table of LAB.md from toy/results.csv.

    python toy/lab.py run grpo antisd --seeds 40 41 42      # what results.csv does not hold yet
    python toy/lab.py ends                                  # a row an arm: learned when, ends where
    python toy/lab.py seeds grpo antisd foreign             # a row an arm: every seed's steps
    python toy/lab.py kinds antisd foreign                  # u and mistakes by kind of token
    python toy/lab.py gate                                  # when the gate moved
    python toy/lab.py views                                 # u of the base by whose solution is c

A run is `antisd.py @toy/demo.args`, the arm's flags and a seed, in a process of one thread, --jobs
of them at a time; its folder is runs/lab/ARM_SEED. When it has ended, its lines are added to
toy/results.csv, a line a step; an empty cell was not measured. Runs that results.csv holds are
skipped, so an interrupted lab goes on where it stopped.

Arms that antisd.py has no flag for are forks: one line of its source, found by its text, is
replaced before the source is executed (FORKS).
"""

import argparse
import csv
import json
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

# Flags after @toy/demo.args. {runs}: runs/lab, {seed}: the seed. Runs that learn are at the top by
# step 60 or so: STEPS is enough for all but those that wait for chance.
STEPS = 70
ARMS = {
    "grpo": "--method grpo --steps 100",
    "antisd": "",
    # whose solution is it? Forks of what c holds; the rest is antisd's
    "foreign": "--steps 100",
    "foreign_any": "",
    "spoilt": "",
    "shuffled": "",
    "bare": "",
    "empty": "--steps 100",
    # other signals, and other ways to add them
    "sd": "--method sd --steps 40",
    "sd_jsd": "--method sd_jsd --steps 40",
    "antisd_kl": "--method antisd_kl",
    "no_teacher": "--method no_teacher --steps 40",
    "mul": "--compose mul --steps 60",
    "right_only": "",                   # a fork: the term acts on right responses only
    # the gate
    "no_gate": "--tau_down 0",
    "student_gate": "--gate_source student",
    # stopped before anything is learned; then both go on from there
    "grpo_stopped": "--method grpo --steps 15 --save_every 15",
    "grpo_on": "--method grpo --init_from {runs}/grpo_stopped_{seed} --steps 85",
    "continual": "--init_from {runs}/grpo_stopped_{seed}",
    # four training problems of ten have an answer that no sum is
    "unsolvable_grpo": "--method grpo --dataset {runs}/unsolvable.jsonl",
    "unsolvable": "--dataset {runs}/unsolvable.jsonl",
    "unsolvable_no_gate": "--tau_down 0 --dataset {runs}/unsolvable.jsonl",
    # three times as long
    "long": "--steps 180",
    "long_no_gate": "--tau_down 0 --steps 180",
    "long_grpo": "--method grpo --steps 180",
    # the gate's statistic is a mean over fewer tokens
    "batch_8": "--problems_per_step 8",
}

# arm -> (a line's text in antisd.py, what stands there instead). `lab` is this module.
PICKS, SIGNAL = "zip(group, pick_solutions(group, rng))", "u[at] = t[at] - s[at]"
FORKS = {
    # shown to the teacher as this problem's own solution:
    "foreign": (PICKS, "zip(group, lab.foreign(group, rollouts, pick_solutions, rng))"),
    "foreign_any": (PICKS, "zip(group, lab.foreign(group, rollouts, pick_solutions, rng, True))"),
    "spoilt": (PICKS, "zip(group, lab.changed(lab.spoil, pick_solutions(group, rng), rng))"),
    "shuffled": (PICKS, "zip(group, lab.changed(lab.shuffle, pick_solutions(group, rng), rng))"),
    "bare": (PICKS, "zip(group, lab.bare(group))"),
    "empty": (PICKS, 'zip(group, [(" ", "answer")] * len(group))'),
    "right_only": (SIGNAL, "u[at] = (t[at] - s[at]) * rewards[rows, None]"),
}


def terms_fit(solution, problem):
    """Whether every term that a solution names is the problem's, both text."""
    terms = dict(re.findall(r"([A-I])(\d)", problem))
    return all(terms[letter] == term for letter, term in re.findall(r"([A-I])(\d)", solution))


def foreign(group, rollouts, pick_solutions, rng, any_of_them=False):
    """For each response of a group the solution that a response to another problem of the batch is
    shown; one with a term that does not fit this problem, or any_of_them."""
    size, problem, picks = len(group), group[0].problem["problem"], []
    groups = [rollouts[i:i + size] for i in range(0, len(rollouts), size)]
    others = [g for g in groups if g[0].problem["problem"] != problem]
    for _ in group:
        while True:
            c, source = rng.choice(pick_solutions(rng.choice(others), rng))
            if any_of_them or not terms_fit(c, problem):
                break
        picks.append((c, source))
    return picks


def changed(change, picks, rng):
    return [(change(c, rng), source) for c, source in picks]


def spoil(c, rng):
    """One term of a solution is another number, its sums and its box are as they were."""
    place = rng.choice([m.end() - 1 for m in re.finditer(r"[A-I]\d", c)])
    return c[:place] + str((int(c[place]) + rng.randrange(1, 5)) % 5) + c[place + 1:]


def shuffle(c, rng):
    """A solution's additions in a random order, each with its own term and sum."""
    chain, so, end = c.partition(" so ")
    parts = re.split(r" (?=wait|hmm|but|maybe)", chain)
    rng.shuffle(parts)
    return " ".join(parts) + so + end


def bare(group):
    return [("The answer is \\boxed{" + r.problem["answer"] + "}.", "answer") for r in group]


# --- One run --------------------------------------------------------------------------------------


def kinds_of(tokens, problem):
    """What each token of a response is for, by the grammar of the traces: a list of names."""
    terms, kinds, total, depth = dict(re.findall(r"([A-Z])(\d)", problem)), [], None, 0
    letters, body = sorted(terms), True
    expect = ["start", "term"]
    for i, token in enumerate(tokens):
        want = expect.pop(0) if expect else "choice" if body else None
        if want == "choice" and token == "so":
            body, expect = False, ["the", "answer", "is", "\\boxed{", "box", "}", "<|im_end|>"]
            kinds.append("so" if depth < len(letters) - 1 else "last so")
        elif want == "choice" and token in WORDS and depth < len(letters) - 1:
            depth += 1
            kinds.append("go on")
            expect = ["term", "makes", "sum"]
        elif want == "term" and re.fullmatch("[A-I]\\d", token):
            right = token == letters[depth] + terms[letters[depth]]
            kinds.append("term" if right else "misread term")
            added = int(token[1])
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
    if arm in FORKS:
        assert text.count(FORKS[arm][0]) == 1, f"{source} has other lines: mend FORKS of lab.py"
        text = text.replace(*FORKS[arm])
    antisd = types.ModuleType("antisd")
    antisd.__file__, antisd.lab = str(source), sys.modules[__name__]
    sys.modules["antisd"] = antisd                       # dataclasses look their module up
    exec(compile(text, str(source), "exec"), antisd.__dict__)
    from transformers import AutoTokenizer
    tokenizer, plain = AutoTokenizer.from_pretrained(TOY / "model"), antisd.summary

    def summary(rollouts, sources, mask, a_seq, u, *rest):
        return (plain(rollouts, sources, mask, a_seq, u, *rest)
                | count_kinds(tokenizer, rollouts, u))

    antisd.summary = summary
    flags = ARMS[arm].format(runs=RUNS, seed=seed).split()
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


def prepare():
    """The data that some arms need."""
    RUNS.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (TOY / "train.jsonl").read_text().splitlines()]
    for row in rows[:len(rows) * 4 // 10]:               # their order is random
        row["answer"] = "5"
        row["solution"] = ""
    (RUNS / "unsolvable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(arms, seeds, jobs, source):
    """Every arm on every seed that results.csv does not hold, in the order of the arms."""
    held, lock = read(), threading.Lock()
    prepare()

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
    middle = values[(len(values) - 1) // 2:len(values) // 2 + 1]         # one value or two
    mark = ">=" if any(never for _, never in middle) else ""
    return f"{mark}{statistics.fmean(value for value, _ in middle):g}"


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
        grpo = every.get("grpo", {})
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


def views(arms):
    """A row an arm: u by kind of token while lambda is 0, so nearly the base's, by the arm's c."""
    columns = [column for column in COLUMNS if column.startswith("u_")]
    print(f"{'arm':20}{'seeds':>6}" + "".join(f"{c[2:]:>11}" for c in columns))
    every = read()
    for arm in by_arm(arms):
        runs = [rows[:5] for (name, _), rows in every.items() if name == arm]
        if runs[0][4]["lam"] == 0 and runs[0][4]["step"] == 4:
            print(f"{arm:20}{len(runs):6}"
                  + "".join(f"{show(mean(sum(runs, []), c), 3):>11}" for c in columns))


def kinds(arms):
    """Every ten steps: P(go on), whole chains, mistakes in percent, and u by kind of token."""
    columns = [column for column in COLUMNS if column.startswith("u_")]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tables = {"ends": ends, "seeds": seeds, "kinds": kinds, "gate": gate, "views": views}
    parser.add_argument("command", choices=["run", "one", *tables])
    parser.add_argument("arms", nargs="*", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(40, 48)])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
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
