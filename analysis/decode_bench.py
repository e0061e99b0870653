"""What a token costs the trainer's own decoder, beside what the card's memory would allow.

    python analysis/decode_bench.py --model Qwen3-1.7B Qwen3-4B --rows 16 64    # a GPU, minutes
    python analysis/decode_bench.py --model toy/model --rows 8 --tokens 48      # a laptop, seconds

Random weights of the models that memory.py knows, or of any configuration; no network. The weights
are split and gathered as in training, the prompts are random, and nothing ends early. A token step
is the difference of a long and a short rollout over the difference of their lengths, so that
reading the prompts does not count; the median of --repeats. The floor reads weights, keys and
values once, at the rate at which this device copies memory.
"""
import dataclasses
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from antisd import InputError, Policy, flag, gathered, parse_config, sample, setup, shard
from memory import cache_bytes, load_config


@dataclasses.dataclass
class Bench:
    model: list[str] = dataclasses.field(default_factory=lambda: ["Qwen3-4B"], metadata={
        "help": "names of memory.py's table, hub ids, folders or config.json files"})
    rows: list[int] = dataclasses.field(default_factory=lambda: [16, 64], metadata={
        "help": "responses decoded at once"})
    group_size: int = flag(8, "G, responses per prompt")
    prompt: int = flag(128, "tokens of a prompt")
    tokens: int = flag(256, "tokens of the long rollout; the short one has a quarter")
    repeats: int = flag(3, "pairs of rollouts, after one that does not count")

    def __post_init__(self):
        if min(*self.rows, self.group_size, self.prompt - 1, self.tokens // 4, self.repeats) < 1:
            raise InputError("--rows, --group_size and --repeats must be at least 1, --prompt 2 "
                             "and --tokens 4")


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device):
    """Bytes a second, of a copy: what it reads and what it writes."""
    size, best = (2**30 if device.type == "cuda" else 2**26), float("inf")
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def random_policy(config, dtype, device):
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    policy = Policy(model, [config.vocab_size - 1])      # random weights hardly ever draw that end
    shard(policy, dtype, device)
    return policy


def seconds(policy, prompts, cfg, tokens):
    synchronize()
    start = time.perf_counter()
    with gathered(policy):
        responses = sample(policy, prompts, cfg.group_size, tokens)
    synchronize()
    return time.perf_counter() - start, max(map(len, responses))


def measure(policy, config, rows, cfg, rate, device, dtype):
    """A line of the table, as a list of texts."""
    count = max(1, rows // cfg.group_size)
    prompts = torch.randint(0, config.vocab_size - 1, (count, cfg.prompt)).tolist()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = []
    for _ in range(1 + cfg.repeats):
        (long, most), (short, least) = (seconds(policy, prompts, cfg, n)
                                        for n in (cfg.tokens, cfg.tokens // 4))
        steps.append((long - short) / (most - least))
    step = statistics.median(steps[1:])
    rows = count * cfg.group_size                        # read at each step, on average:
    held = dtype.itemsize * sum(p.numel() for p in policy.parameters()) + rows * cache_bytes(
        config, cfg.prompt + 5 * cfg.tokens // 8, dtype)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
    return [f"{rows}", f"{1e3 * step:.1f}", f"{rows / step:.0f}", f"{1e3 * held / rate:.1f}",
            f"{step * rate / held:.1f}", f"{peak:.1f}" if peak else ""]


def bench(cfg):
    """Prints Markdown: a line per model and number of rows."""
    rank, world, device = setup()
    if world > 1:
        raise InputError("decode_bench.py runs on one process: start it without torchrun")
    configs = {model: load_config(model) for model in cfg.model}         # before anything is timed
    dtype, rate = torch.bfloat16 if device.type == "cuda" else torch.float32, bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {rate / 1e9:.0f} GB/s, torch {torch.__version__}, transformers "
          f"{transformers.__version__}\n\n| model | rows | ms a token step | tokens/s | "
          "floor, ms | times the floor | peak, GiB |\n|---|" + "---:|" * 6)
    for model, config in configs.items():
        policy = random_policy(config, dtype, device)
        for rows in tqdm(cfg.rows, desc=model, dynamic_ncols=True):
            line = measure(policy, config, rows, cfg, rate, device, dtype)
            tqdm.write(" | ".join([f"| {model}", *line]) + " |")
        del policy


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)       # names that transformers 6 will drop
    try:
        bench(parse_config(kind=Bench))
    except InputError as error:
        print(f"decode_bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)
