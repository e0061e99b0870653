"""Learning curves: a table of the arms, and one picture in the manner of the paper's Figure 4.

    python analysis/curves.py runs/grpo_? runs/antisd_? --output curves.png
    python analysis/curves.py toy/results.csv --arms grpo,antisd,sd --output curves.svg

Reads folders that antisd.py wrote, and .csv files with the columns arm, seed, step, eval_accuracy
and any others; an empty cell means that nothing was measured. An arm of folders is a method and
those flags in which the folders differ. The baseline is GRPO from the start, never a run that goes
on from another one (--init_from). What else differs between the runs is warned about.
"""
import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from antisd import Config, InputError, one_line, read_lines

# Flags that change no result, flags that GRPO does not read, and what makes runs incomparable.
FREE = ("seed", "output", "method", "resume", "steps", "tracker", "save_every", "export_every",
        "eval_every", "micro_tokens", "rollout_batch", "sampler", "gradient_checkpointing")
TERM = ("lam", "compose", "tau_down", "warmup_steps", "gate_stat", "gate_source")
SAME = ("model", "dataset", "dataset_config", "split", "data", "eval_dataset", "lr",
        "last step", "antisd.py")
GREY = "#787e87"                                 # of text and axes: legible on white and on black
COLOURS = ("#8a8f98", "#3b82d6", "#e0604f", "#3f9e6b", "#a06ad0", "#d08b26", "#2aa3ad", "#c75d9b")


def read_csv(file):
    """[{"arm", "seed", "flags": {}, "rows": [{"step", column: number or None}, ...]}, ...]."""
    with one_line(f"{file} cannot be read"), open(file, newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        lines, columns = list(table), table.fieldnames or []
    if missing := {"arm", "seed", "step", "eval_accuracy"} - {*columns}:
        raise InputError(f"{file} has no column {', '.join(sorted(missing))}; its columns are "
                         f"{', '.join(columns) or 'none'}")
    runs = {}
    for number, line in enumerate(lines, 2):
        key = line.pop("arm"), line.pop("seed")
        run = runs.setdefault(key, {"arm": key[0], "seed": key[1], "flags": {}, "rows": []})
        with one_line(f"{file}: line {number} holds something else than numbers"):
            row = {name: float(cell) if cell else None for name, cell in line.items()}
            run["rows"].append(row | {"step": int(row["step"])})
    return list(runs.values())


def read_folder(folder):
    """The same of one run's config.json and metrics.jsonl; its arm is named by `name_arms`."""
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name if folder.is_dir() else 'such folder'}")
    with one_line(f"{folder} is no run of antisd.py"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        flags = config["flags"] | {"antisd.py": str(config.get("source"))[:8]}
        # which run it goes on from differs from seed to seed
        flags["init_from"] = "run" if flags.get("init_from") else ""
        return {"arm": flags["method"], "seed": str(flags["seed"]), "flags": flags,
                "rows": read_lines(folder / "metrics.jsonl")}


def name_arms(runs):
    """Names the arms of folders: the method, and of the flags in which the folders differ those
    that are not the trainer's defaults."""
    usual = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    differ = {"init_from"} | {key for run in runs for key in run["flags"] if key in usual
                              and len({repr(other["flags"].get(key)) for other in runs}) > 1}
    for run in runs:
        own = differ - {*FREE} - ({*TERM} if run["arm"] == "grpo" else set())
        run["arm"] = " ".join([run["arm"], *(
            f"{key}={run['flags'][key]}" for key in sorted(own)
            if run["flags"].get(key, usual[key]) != usual[key])])


def read_runs(paths):
    """({arm: {seed: rows}}, GRPO's arms first; lines of warning about what else differs)."""
    tables = [run for path in paths if path.endswith(".csv") for run in read_csv(path)]
    folders = [read_folder(Path(path)) for path in paths if not path.endswith(".csv")]
    name_arms(folders)
    arms, found = {}, {}
    for run in tables + folders:
        steps, name = [row["step"] for row in run["rows"]], f"{run['arm']}, seed {run['seed']}"
        if run["seed"] in arms.setdefault(run["arm"], {}) or len({*steps}) < len(steps):
            raise InputError(f"{name} is there twice, or one of its steps is")
        arms[run["arm"]][run["seed"]] = run["rows"]
        for key, value in (run["flags"] | {"last step": max(steps, default=None)}).items():
            found.setdefault(key, {}).setdefault(str(value)[-24:], {})[run["arm"]] = None
    warnings = [f"warning: the runs differ in {key}: " + "; ".join(
        f"{value} ({', '.join(names)})" for value, names in found[key].items())
        for key in SAME if len(found.get(key, ())) > 1]
    if tables and folders:
        warnings.append("warning: a .csv does not tell with which settings its runs were made")
    for arm in [arm for arm, seeds in arms.items() if not mean_curve(seeds)]:
        warnings.append(f"warning: {arm} is left out, for at no step has every seed of it a "
                        "held-out accuracy (--eval_dataset)")
        del arms[arm]
    return dict(sorted(arms.items(), key=lambda arm: arm[0].split()[0] != "grpo")), warnings


def trace(rows):
    """{step: held-out accuracy} of one run, where it was measured."""
    return {row["step"]: row["eval_accuracy"] for row in rows
            if row.get("eval_accuracy") is not None}


def mean_curve(seeds):
    """{seed: rows} -> {step: mean over the seeds}, over the steps that all of them have."""
    curves = [trace(rows) for rows in seeds.values()]
    return {step: statistics.fmean(curve[step] for curve in curves)
            for step in sorted(set.intersection(*map(set, curves)))}


def spread(values):
    """(mean, standard deviation over the seeds; None for one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(ours, theirs):
    """(mean, its standard error) of ours - theirs, both {seed: value}, over the seeds that both
    have: what a seed brings to both drops out. None without such seeds; error None for one."""
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not gaps:
        return None
    mean, sd = spread(gaps)
    return mean, None if sd is None else sd / math.sqrt(len(gaps))


def first_reach(curve, goal):
    """The first step at which {step: value} is at least `goal`; inf where it never is."""
    return min((step for step, value in curve.items() if value >= goal), default=math.inf)


def baseline(arms):
    """The name of GRPO from the start among the arms; None where none or several could be meant."""
    fresh = [arm for arm in arms if arm.split()[0] == "grpo" and "init_from=" not in arm]
    return fresh[0] if len(fresh) == 1 else "grpo" if "grpo" in fresh else None


def compare(arms, thresholds=(0.5, 0.9)):
    """{arm: facts}. end, best: (mean, sd) over seeds at the last step, at the mean's best one;
    end_gap, best_gap: paired, against the baseline at its own such step; reach: {threshold: sorted
    steps of the seeds}; first: the step at which the arm's mean reaches GRPO's best, inf for never;
    speed_up, the paper's: GRPO's best step / first. Without a baseline there are no such facts."""
    facts, base = {}, baseline(arms)
    for arm in sorted(arms, key=lambda arm: arm != base):            # the baseline comes first
        curves = {seed: trace(rows) for seed, rows in arms[arm].items()}
        mean, row = mean_curve(arms[arm]), facts.setdefault(arm, {})
        row["reach"] = {goal: sorted(first_reach(curve, goal) for curve in curves.values())
                        for goal in thresholds}
        for name, step in (("end", max(mean)), ("best", max(mean, key=mean.get))):
            row[name + "_seeds"] = {seed: curve[step] for seed, curve in curves.items()}
            row[name], row[name + "_step"] = spread(row[name + "_seeds"].values()), step
            if base and arm != base:
                row[name + "_gap"] = paired(row[name + "_seeds"], facts[base][name + "_seeds"])
        if base:
            first = row["first"] = first_reach(mean, facts[base]["best"][0])
            row["speed_up"] = facts[base]["best_step"] / first if first else math.inf
    return {arm: facts[arm] for arm in arms}


def cells(arm, seeds, row):
    """One line of the table, as texts; accuracies in percent."""
    def share(pair, sign=""):
        error = "" if pair is None or pair[1] is None else f" +- {100 * pair[1]:.1f}"
        return "-" if pair is None else f"{100 * pair[0]:{sign}.1f}{error}"

    def reach(steps):
        missed = sum(step == math.inf for step in steps)
        middle, low, high = (f"{step:g}".replace("inf", "never")
                             for step in (statistics.median(steps), steps[0], steps[-1]))
        if low == high:
            return middle
        return f"{middle} ({low} to {high}{f', {missed} of {len(steps)} never' * (missed > 0)})"

    speed = {None: "-", 0: "at once", math.inf: "never"}.get(row.get("first"))
    return [arm, str(len(seeds)), share(row["end"]), share(row.get("end_gap"), "+"),
            f"{share(row['best'])} @{row['best_step']}", share(row.get("best_gap"), "+"),
            *map(reach, row["reach"].values()), speed or f"{row['speed_up']:.1f}x"]


def draw(arms, facts, base, output):
    """Every seed thin and their mean bold; a dotted line at GRPO's best, and a dot on the mean of
    every arm where it first reaches that line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (arm, seeds) in enumerate(arms.items()):
        style = dict(color=COLOURS[i % 8], linestyle=("-", "--", ":")[i // 8 % 3])
        for rows in seeds.values() if len(seeds) > 1 else ():
            curve = trace(rows)
            axes.plot(list(curve), [100 * y for y in curve.values()], alpha=0.35, lw=0.9, **style)
        mean, first = mean_curve(seeds), facts[arm].get("first")
        speed = cells(arm, seeds, facts[arm])[-1]
        note = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        note += f", {speed}" if speed[-1] == "x" and arm != base else ""
        axes.plot(list(mean), [100 * y for y in mean.values()], lw=2.4, label=f"{arm} ({note})",
                  **style)
        if first in mean:
            axes.plot(first, 100 * mean[first], "o", color=style["color"])
    if base:
        axes.axhline(100 * facts[base]["best"][0], color=GREY, linestyle=":", lw=1)
    axes.set_ylabel("held-out accuracy, %", color=GREY)
    axes.set_xlabel("training step", color=GREY)
    axes.tick_params(colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=GREY)
    with one_line(f"cannot write {output}"):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, transparent=True, dpi=150)


def main(argv=None):
    def refuse(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", help="run folders and .csv files")
    parser.add_argument("--arms", help="only these, comma-separated, in this order")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[50, 90],
                        help="accuracies, in percent, whose first steps are shown [50 90]")
    parser.add_argument("--output", help="the picture: .png, .svg or .pdf; without it none")
    args = parser.parse_args(argv)
    arms, warnings = read_runs(args.runs)
    chosen = args.arms.split(",") if args.arms else list(arms)
    if unknown := [arm for arm in chosen if arm not in arms]:
        raise InputError(f"--arms {','.join(unknown)}: there are {', '.join(arms)}")
    if not chosen:
        raise InputError("these runs hold no held-out accuracy: train with --eval_dataset")
    base, facts = baseline(arms), compare(arms, [goal / 100 for goal in args.thresholds])
    if not base:
        warnings.append("warning: no arm, or more than one, is GRPO from the start: no differences")
    lines = [["arm", "seeds", "end", "- grpo", "best", "- grpo",
              *(f"steps to {goal:g}%" for goal in args.thresholds), "speed-up"],
             *(cells(arm, arms[arm], facts[arm]) for arm in chosen)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    print("accuracy in percent +- sd over seeds; - grpo: over common seeds, +- standard error; "
          "steps:\nmedian (first to last seed); speed-up: GRPO's best step / the first step at "
          "which the arm's\nmean reaches GRPO's best", *warnings, sep="\n")
    if args.output:
        draw({arm: arms[arm] for arm in chosen}, facts, base, args.output)
        print(f"{args.output} holds the picture")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"curves.py: error: {error}", file=sys.stderr)
        sys.exit(2)
