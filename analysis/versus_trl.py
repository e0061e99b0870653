"""The same work here and in TRL's SDPOTrainer, the nearest peer: speed and memory side by side.

    python -m venv trl && trl/bin/pip install "trl>=1.16"
    python analysis/versus_trl.py --trl_python trl/bin/python --model SMOLLM2 --data gsm8k.jsonl

For every method, both programs answer the same problems at every step, with the same prompts, group
size, longest response, dtype, threads and allocator settings. The reward of both is whether the
response has an even number of characters, so that groups are mixed and both teachers are shown a
sibling's response. TRL runs as a GRPO term plus a live self-teacher on the sampled tokens
(distillation_weight 0.5), or as GRPO alone (0). The runs alternate, each in a process of its own,
and the first step of a process is not counted: AdamW's state and what the allocator keeps come
with it. Responses end where the model ends them, so the programs draw other lengths: compare the
times per decoding step and per token as well as the whole. Peak memory is the highest resident
memory of the process from its second step on (on CUDA: of the allocated memory).
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def even(text):
    """The reward of both programs."""
    return float(len(text) % 2 == 0)


def reset_peak():
    import torch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")    # Linux: VmHWM starts anew at VmRSS


def peak_gib():
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def run_ours(args):
    """Trains with antisd.py -> a list of steps, each a dict of seconds and response lengths."""
    sys.path.insert(0, str(Path(args.antisd).resolve().parent))
    import antisd
    import torch
    torch.set_num_threads(args.threads)
    antisd.is_correct = lambda text, answer: even(text)
    steps, roll_out, update = [], antisd.roll_out, antisd.update

    def timed_roll_out(*positional, **named):
        if len(steps) == 1:
            reset_peak()
        start = time.perf_counter()
        rollouts = roll_out(*positional, **named)
        steps.append({"generate": time.perf_counter() - start,
                      "lengths": [len(r.ids) for r in rollouts]})
        return rollouts

    def watched_update(*positional, **named):
        result = update(*positional, **named)
        steps[-1]["peak_gib"] = peak_gib()
        return result

    antisd.roll_out, antisd.update = timed_roll_out, watched_update
    antisd.train(antisd.Config(
        model=args.model, dataset=f"{args.work}/problems.jsonl", method=args.method,
        problems_per_step=args.problems, group_size=args.group, max_tokens=args.max_tokens,
        steps=args.steps, micro_tokens=args.micro_tokens, dtype=args.dtype, save_every=0,
        output=f"{args.work}/ours-{time.time_ns()}"))
    rows = sorted(Path(args.work).glob("ours-*/metrics.jsonl"), key=lambda f: f.stat().st_mtime)[-1]
    for step, row in zip(steps, map(json.loads, rows.read_text().splitlines())):
        step["whole"] = sum(step["lengths"]) / row["tokens_per_s"]
    return steps, {}


def run_trl(args):
    """The same by trl.experimental.sdpo; imports nothing of this project."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    torch.set_num_threads(args.threads)
    steps, start = [], 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, *positional, **named):
            nonlocal start
            if len(steps) == 1:
                reset_peak()
            steps.append({})
            start = time.perf_counter()

        def on_step_end(self, *positional, **named):
            steps[-1] |= {"whole": time.perf_counter() - start, "peak_gib": peak_gib()}

    def reward(completions, **named):
        return [even(turns[0]["content"]) for turns in completions]

    rows = [json.loads(line) for line in open(f"{args.work}/prompts.jsonl", encoding="utf-8")]
    config = SDPOConfig(
        output_dir=f"{args.work}/trl", max_steps=args.steps, learning_rate=1e-6,
        per_device_train_batch_size=args.micro, num_generations=args.group,
        gradient_accumulation_steps=args.problems * args.group // args.micro,
        max_completion_length=args.max_tokens, max_prompt_length=None, temperature=1.0,
        distillation_weight=0.0 if args.method == "grpo" else 0.5, teacher_model_kind="live",
        model_init_kwargs={"dtype": args.dtype}, bf16=False, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, shuffle_dataset=False, report_to=[], save_strategy="no",
        logging_steps=1000, disable_tqdm=True)
    trainer = SDPOTrainer(model=args.model, args=config, train_dataset=Dataset.from_list(rows),
                          reward_funcs=[reward], callbacks=[Clock()])
    generate = trainer._generate

    def timed_generate(*positional, **named):
        begun = time.perf_counter()
        out = generate(*positional, **named)
        steps[-1] |= {"generate": time.perf_counter() - begun, "lengths": [*map(len, out[1])]}
        return out

    trainer._generate = timed_generate
    trainer.train()
    return steps, {"trl": trl.__version__}


def measure(args, python, program, method):
    """One run in a process of its own -> (counted steps, versions)."""
    flags = dict(vars(args), program=program, method=method)
    command = [python, __file__, "--child", json.dumps(flags)]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode:
        sys.exit(f"{program} --method {method} failed:\n{ended.stderr[-3000:]}")
    result = json.loads(ended.stdout.splitlines()[-1])
    return result["steps"][1:], result["versions"]


def summarise(steps):
    """Counted steps of one program -> tokens/s, seconds by phase, per decoding step and per token,
    peak memory, mean and longest response."""
    mean, tokens = statistics.fmean, sum(sum(s["lengths"]) for s in steps)
    rest = sum(s["whole"] - s["generate"] for s in steps)
    return {"tokens/s": tokens / sum(s["whole"] for s in steps),
            "generation, s": mean(s["generate"] for s in steps),
            "scoring + training, s": rest / len(steps),
            "a decoding step, ms": 1e3 * mean(s["generate"] / max(s["lengths"]) for s in steps),
            "scoring + training, ms a token": 1e3 * rest / tokens,
            "peak memory, GiB": max(s["peak_gib"] for s in steps),
            "mean length": mean(n for s in steps for n in s["lengths"]),
            "longest": mean(max(s["lengths"]) for s in steps)}


def table(results, note):
    """{(program, method): summary} -> a table in Markdown, then the ratios of ours to TRL's."""
    lines = ["| | " + " | ".join(f"{p}, {m}" for p, m in results) + " |",
             "|---|" + "---:|" * len(results)]
    for key in next(iter(results.values())):
        lines.append(f"| {key} | " + " | ".join(f"{s[key]:.3g}" for s in results.values()) + " |")
    for key in ("tokens/s", "a decoding step, ms", "scoring + training, ms a token",
                "peak memory, GiB"):
        for _, method in list(results)[::2]:
            if ("TRL", method) in results:
                ratio = results["ours", method][key] / results["TRL", method][key]
                lines.append(f"\n{method}, {key}: ours is {ratio:.2f} of TRL's.")
    if {("ours", "antisd"), ("ours", "grpo")} <= set(results):
        a, g = (results["ours", m]["tokens/s"] for m in ("antisd", "grpo"))
        lines.append(f"\nA token of an AntiSD step costs {g / a:.2f} of one of a GRPO step, ours.")
    return "\n".join([*lines, "", note])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="problems, any file that antisd.py reads")
    parser.add_argument("--trl_python", default=sys.executable, help="its interpreter; '': no TRL")
    parser.add_argument("--antisd", default=str(HERE.parent / "antisd.py"), help="another version")
    parser.add_argument("--methods", nargs="+", default=["antisd", "grpo"])
    for name, default, text in (
            ("problems", 4, ""), ("group", 8, "responses per problem"), ("max_tokens", 384, ""),
            ("steps", 2, "of a process; the first is not counted"), ("rounds", 1, "alternations"),
            ("micro", 4, "TRL's responses per micro-batch"),
            ("micro_tokens", 0, "ours; 0: micro * (max_tokens + 128)"), ("threads", 2, "")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    args.micro_tokens = args.micro_tokens or args.micro * (args.max_tokens + 128)
    sys.path.insert(0, str(HERE.parent))
    import antisd
    found, versions = {}, {}
    with tempfile.TemporaryDirectory() as args.work:
        rows = antisd.load_problems(args.data, limit=args.problems)
        for name, lines in ("problems", rows), ("prompts", [
                {"prompt": antisd.student_messages(row["problem"])} for row in rows]):
            Path(args.work, f"{name}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        programs = {"ours": sys.executable, "TRL": args.trl_python}
        order = [(p, m) for m in args.methods for p in programs if programs[p]]
        for repeat in range(args.rounds):
            for program, method in order if repeat % 2 == 0 else reversed(order):
                steps, own = measure(args, programs[program], program, method)
                found.setdefault((program, method), []).extend(steps)
                versions[program] = own
                print(program, method, json.dumps(summarise(steps)), file=sys.stderr, flush=True)
    own = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"}
    print(table({key: summarise(found[key]) for key in order},
                f"{args.problems} problems x {args.group} responses up to {args.max_tokens} tokens, "
                f"{args.dtype}, {args.threads} threads of {os.cpu_count()} cores "
                f"({platform.machine()}), micro-batches of {args.micro} responses and "
                f"{args.micro_tokens} tokens, {args.rounds} x {args.steps - 1} steps counted, "
                f"allocator {own or platform.libc_ver()[0] + ' with its defaults'} for both, load "
                f"average at the end {os.getloadavg()[0]:.1f}; {versions}"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child = argparse.Namespace(**json.loads(sys.argv[2]))
        steps, versions = (run_ours if child.program == "ours" else run_trl)(child)
        import torch
        import transformers
        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"steps": steps, "versions": versions}))
    else:
        main()
