"""The same work here and in TRL's SDPOTrainer, the nearest peer: speed and memory side by side.

    python -m venv trl && trl/bin/pip install "trl>=1.16"
    python analysis/versus_trl.py --trl_python trl/bin/python --model SMOLLM2 --data gsm8k.jsonl

Both programs answer the same problems at every step, with the same prompts, group size, longest
response, dtype and threads; antisd.py sets glibc's mmap threshold itself. Both reward a response of
an even number of characters, so that groups are mixed and teachers are shown a sibling's response.
TRL runs as GRPO plus a live self-teacher on the sampled tokens (distillation_weight 0.5), or as
GRPO alone (0). The runs alternate, each in its own process, whose first step is not counted:
AdamW's state, and what the allocator keeps, come with it. Responses end where the model ends them,
so the programs draw other lengths: read the times per decoding step and per token beside the
tokens/s. Peak memory is the highest resident memory from the second step on (Linux; on CUDA, of
allocated memory). With several --rounds the table has their means, and least and most.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def even(text):          # the reward of both programs
    return float(len(text) % 2 == 0)


class Watch:
    """Steps of a program, from generation on: {"whole", "generate" (s), "lengths", "peak_gib"}."""

    def __init__(self):
        import torch
        self.cuda, self.steps = torch.cuda if torch.cuda.is_available() else None, []
        # CPU seconds are what can be compared on a machine that others use, too
        self.clock = time.process_time if os.environ.get("CPU_TIME") else time.perf_counter

    def generating(self, function, lengths):
        """The function that generates, timed; lengths(its result) lists those of the responses."""
        def timed(*positional, **named):
            if len(self.steps) == 1 and self.cuda:
                self.cuda.reset_peak_memory_stats()
            elif len(self.steps) == 1:                   # VmHWM starts anew at what is resident
                Path("/proc/self/clear_refs").write_text("5")
            self.start = self.clock()
            result = function(*positional, **named)
            self.steps.append({"generate": self.clock() - self.start, "lengths": lengths(result)})
            return result
        return timed

    def end(self):
        resident = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        self.steps[-1] |= {"whole": self.clock() - self.start, "peak_gib": (
            self.cuda.max_memory_allocated() if self.cuda else 1024 * int(resident)) / 2**30}


def run_ours(work, source, flags):
    """Trains with the antisd.py at `source` -> steps, of each rank its own."""
    sys.path.insert(0, str(Path(source).parent))
    import antisd
    watch, summary = Watch(), antisd.summary

    def after_the_update(*positional):
        watch.end()
        return summary(*positional)

    antisd.summary, antisd.is_correct = after_the_update, lambda text, answer: even(text)
    antisd.roll_out = watch.generating(antisd.roll_out, lambda rows: [len(r.ids) for r in rows])
    run = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())             # the same on all ranks
    antisd.train(antisd.Config(dataset=f"{work}/problems.jsonl", output=f"{work}/{run}",
                               save_every=0, gradient_checkpointing=False, **flags))
    return watch.steps


def run_trl(work, prompts, micro, flags):
    """The same by TRL; imports nothing of this project."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    watch = Watch()

    class Clock(TrainerCallback):
        def on_step_end(self, *positional, **named):
            watch.end()

    def reward(completions, **named):
        return [even(turns[0]["content"]) for turns in completions]

    config = SDPOConfig(
        output_dir=f"{work}/trl", max_steps=flags["steps"], learning_rate=1e-6, temperature=1.0,
        per_device_train_batch_size=micro, num_generations=flags["group_size"],
        gradient_accumulation_steps=flags["problems_per_step"] * flags["group_size"] // micro,
        max_completion_length=flags["max_tokens"], max_prompt_length=None, shuffle_dataset=False,
        distillation_weight=0.0 if flags["method"] == "grpo" else 0.5, teacher_model_kind="live",
        model_init_kwargs={"dtype": flags["dtype"]}, bf16=False, gradient_checkpointing=False,
        use_cpu=not watch.cuda, report_to=[], save_strategy="no", disable_tqdm=True)
    rows = Dataset.from_list([{"prompt": messages} for messages in prompts])
    trainer = SDPOTrainer(model=flags["model"], args=config, train_dataset=rows,
                          reward_funcs=[reward], callbacks=[Clock()])
    trainer._generate = watch.generating(trainer._generate, lambda out: [*map(len, out[1])])
    trainer.train()
    return watch.steps


def summarise(steps):
    """Counted steps of one program -> the table's column."""
    mean, tokens = statistics.fmean, sum(sum(s["lengths"]) for s in steps)
    rest = sum(s["whole"] - s["generate"] for s in steps)
    return {"tokens/s of a whole step": tokens / sum(s["whole"] for s in steps),
            "generation, s": mean(s["generate"] for s in steps),
            "scoring + training, s": rest / len(steps),
            "a decoding step, ms": 1e3 * mean(s["generate"] / max(s["lengths"]) for s in steps),
            "scoring + training, ms a token": 1e3 * rest / tokens,
            "peak memory, GiB": max(s["peak_gib"] for s in steps),
            "mean response, tokens": mean(n for s in steps for n in s["lengths"]),
            "longest response, tokens": mean(max(s["lengths"]) for s in steps)}


def table(columns):
    """{name: [summary of a round, ...]} -> Markdown: means, and least and most of several."""
    def cell(values):
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3g}{spread}"

    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join(rows + [
        f"| {key} | " + " | ".join(cell([s[key] for s in rounds]) for rounds in columns.values())
        + " |" for key in next(iter(columns.values()))[0]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="problems, any file that antisd.py reads")
    parser.add_argument("--trl_python", nargs="*", default=[sys.executable], help="none: no TRL")
    parser.add_argument("--antisd", nargs="+", default=[str(HERE.parent / "antisd.py")])
    parser.add_argument("--method", nargs="+", default=["antisd", "grpo"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, not the wall's")
    for name, default in dict(problems=4, group=8, max_tokens=384, steps=2, rounds=1, threads=2,
                              micro=4).items():          # rows of TRL's micro-batch; of ours as
        parser.add_argument(f"--{name}", type=int, default=default)      # many tokens, see budget
    args, found = parser.parse_args(), {}
    flags = dict(model=args.model, problems_per_step=args.problems, group_size=args.group,
                 max_tokens=args.max_tokens, steps=args.steps, dtype=args.dtype)
    budget = args.micro * (args.max_tokens + 128)
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CPU_TIME": "1" * args.cpu_time}
    sys.path.insert(0, str(HERE.parent))
    import antisd
    with tempfile.TemporaryDirectory() as work:
        rows = antisd.load_problems(args.data, limit=args.problems)
        Path(work, "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
        prompts = [antisd.student_messages(row["problem"]) for row in rows]
        programs = []
        for method in args.method:
            own = flags | {"method": method}
            programs += [(f"{'ours' if source == args.antisd[0] else source}, {method}",
                          sys.executable, "run_ours", work, source, own | {"micro_tokens": budget})
                         for source in args.antisd]
            programs += [(f"TRL, {method}", python, "run_trl", work, prompts, args.micro, own)
                         for python in args.trl_python]
        for repeat in range(args.rounds):
            for name, python, *call in programs[::-1 if repeat % 2 else 1]:
                ended = subprocess.run([python, __file__, "--child", json.dumps(call)], env=env,
                                       capture_output=True, text=True)
                if ended.returncode:
                    sys.exit(f"{name} failed:\n{ended.stderr[-3000:]}")
                steps, versions = json.loads(ended.stdout.splitlines()[-1])
                found.setdefault(name, []).append(summarise(steps[1:]))
                print(name, versions, found[name][-1], file=sys.stderr, flush=True)
    print(table(found))
    allocator = {k: v for k, v in os.environ.items() if k[:7] in ("MALLOC_", "LD_PREL")}
    print(f"\n{args.problems} problems x {args.group} responses up to {args.max_tokens} tokens; "
          f"{args.dtype}; {'CPU' if args.cpu_time else 'wall'} seconds, {args.threads} threads, "
          f"{os.cpu_count()} cores, load average {os.getloadavg()[2]:.1f}; micro-batches of "
          f"{args.micro} responses, {budget} tokens; {args.rounds} x {args.steps - 1} steps "
          f"counted; allocator's environment: {allocator or 'unset'}; {versions}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        function, *arguments = json.loads(sys.argv[2])
        done = globals()[function](*arguments)
        import torch
        import transformers
        print("\n" + json.dumps([done, f"torch {torch.__version__}, transformers "
                                       f"{transformers.__version__}"]))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()    # else its threads may abort the exit
    else:
        main()
