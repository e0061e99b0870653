"""GiB that a run needs on each GPU and on the host, by purpose, before anyone rents a card.

    python analysis/memory.py --gpus 1 8 --gradient_checkpointing --rollout_batch 16
    python analysis/memory.py --model Qwen/Qwen3-14B --gpus 8 --max_tokens 32768

From configurations alone: parameters are counted on the meta device and no weights are read.
Without --model the table has the models below, which need no network. Parameters, state and cache
are exact; activations are an estimate of what backward keeps in gated transformer layers. The peak
is the state and the largest of decoding, training and the optimizer's step. The CUDA context, NCCL
and the allocator's fragments come on top.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from antisd import InputError, flag, one_line, parse_config

# name: (family, layers, hidden, MLP, heads, KV heads, vocabulary, tied embeddings, anything else)
SHAPES = {
    "SmolLM2-135M": ("llama", 30, 576, 1536, 9, 3, 49152, True, {}),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 151936, True, {}),
    "Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 151936, True, {}),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 151936, False, {}),
    "Olmo-3-7B": ("olmo3", 32, 4096, 11008, 32, 32, 100278, False, {"sliding_window": 4096}),
    "Qwen3-30B-A3B": ("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, False, {
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768}),
}


@dataclasses.dataclass
class Plan:
    """The flags; what the trainer has too means the same there and has the same default."""
    model: list[str] = dataclasses.field(default_factory=list, metadata={
        "help": "hub ids, Hugging Face folders or config.json files; none: the built-in table"})
    gpus: list[int] = dataclasses.field(default_factory=lambda: [8], metadata={
        "help": "numbers of GPUs, of which a machine has at most 8"})
    max_tokens: int = flag(8192, "longest response")
    max_prompt_tokens: int = flag(2048, "longest problem")
    problems_per_step: int = flag(32, "B, over all GPUs")
    group_size: int = flag(8, "G")
    rollout_batch: int = flag(0, "responses decoded at once on a GPU; 0: all of its share")
    micro_tokens: int = flag(16384, "tokens of a training micro-batch")
    gradient_checkpointing: bool = flag(False, "recompute layers in backward")
    sampler: Literal["generate", "sharded"] = flag("generate", "sharded: weights stay split")
    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "compute type")

    def __post_init__(self):
        for name in ("gpus", "max_tokens", "max_prompt_tokens", "problems_per_step", "group_size",
                     "micro_tokens"):
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value]) < 1:
                raise InputError(f"--{name} must be at least 1")
        for gpus in self.gpus:
            if self.problems_per_step % gpus:
                raise InputError(f"--problems_per_step {self.problems_per_step} must be a multiple "
                                 f"of --gpus {gpus}")


def load_config(name):
    """A Hugging Face configuration of a name in SHAPES, a hub id, a folder or a config.json."""
    if name not in SHAPES:
        with one_line(f"--model {name}: no configuration can be loaded"):
            return AutoConfig.from_pretrained(name).get_text_config()
    family, layers, hidden, mlp, heads, kv_heads, vocabulary, tied, rest = SHAPES[name]
    return AutoConfig.for_model(
        family, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=tied, **rest)


def count_parameters(config):
    with torch.device("meta"):                           # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def attention_shape(c):
    """Attention heads, key-value heads and the size of a head."""
    heads = c.num_attention_heads
    return (heads, getattr(c, "num_key_value_heads", None) or heads,
            getattr(c, "head_dim", None) or c.hidden_size // heads)


def cache_bytes(config, tokens, dtype):
    """Of one response: keys and values of every layer, a sliding layer's only as far as it looks;
    the cache's own classes are asked, on the meta device."""
    cache, (_, kv_heads, head_dim) = DynamicCache(config=config), attention_shape(config)
    part = torch.empty(1, kv_heads, tokens, head_dim, dtype=dtype, device="meta")
    for layer in range(config.num_hidden_layers):
        cache.update(part, part, layer)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def estimate(config, parameters, gpus, plan):
    """{purpose: GiB} where every prompt and response is as long as allowed. plan: see Plan."""
    c, dtype = config, getattr(torch, plan.dtype)
    width, tokens = dtype.itemsize, plan.max_prompt_tokens + plan.max_tokens
    rows = plan.problems_per_step // gpus * plan.group_size
    if plan.rollout_batch:                               # whole groups, at least one
        rows = min(rows, max(1, plan.rollout_batch // plan.group_size) * plan.group_size)
    sharded = plan.sampler == "sharded"
    # gathered at once: the root (embeddings and head), a layer, and the next one on its way
    root = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    some = root + 2 * (parameters - root) / c.num_hidden_layers
    heads, kv_heads, head_dim = attention_shape(c)
    inner = (getattr(c, "moe_intermediate_size", None) or getattr(c, "intermediate_size", None)
             or 4 * c.hidden_size) * (getattr(c, "num_experts_per_tok", None) or 1)
    # what backward keeps of one token in one layer
    layer = width * (10 * c.hidden_size + (3 * heads + 4 * kv_heads) * head_dim + 4 * inner)
    # of all layers: after the forward pass, where the logits are computed, and at most. With
    # checkpointing that is each layer's input, and later one layer, recomputed
    inputs = c.num_hidden_layers * width * c.hidden_size
    kept, most = ((inputs, inputs + layer) if plan.gradient_checkpointing
                  else 2 * [c.num_hidden_layers * layer])
    micro = max(plan.micro_tokens, tokens)               # a longer row is a micro-batch of its own
    parts = {
        "state": 12 * parameters / gpus,                 # float32: weights, AdamW's two moments
        "weights": width * (some if sharded else parameters),
        "cache": rows * cache_bytes(c, tokens, dtype),
        "layers": width * some,
        # float32: whole until the last micro-batch, where each layer's are summed over the ranks;
        # sharded sums every micro-batch's
        "gradients": 4 * (parameters / gpus + some if sharded else parameters),
        "activations": micro * most,
        # a chunk at a time, float32: log pi, and pi, a copy and a product for the entropy
        "logits": 4 * 4 * min(2**26, 1024 * c.vocab_size, micro * c.vocab_size),
        "step": 8 * parameters / gpus}                   # the split gradients, and AdamW's roots
    parts = {name: size / 2**30 for name, size in parts.items()}
    training = parts["layers"] + parts["gradients"] + max(
        parts["activations"], micro * kept / 2**30 + parts["logits"])
    # every process reads the whole checkpoint: a dense one is mapped, so that a machine holds one
    # copy of it in its file cache; experts are put together in every process's own memory
    stored = (c.dtype or torch.bfloat16).itemsize
    copies = min(gpus, 8) if getattr(c, "num_experts_per_tok", None) else 1
    return parts | {
        "peak": parts["state"] + max(parts["weights"] + parts["cache"], training, parts["step"]),
        "host: load": copies * stored * parameters / 2**30,
        # the first rank gathers all of it in float32 and converts that
        "host: export": (4 + stored) * parameters / 2**30}


def table(plan):
    """Prints Markdown: a line per model and number of GPUs."""
    lines = ["| model | parameters | GPUs | state | rollout: weights | cache | training: layers | "
             "gradients | activations | logits | step | peak per GPU | host: load | host: export |",
             "|---" * 14 + "|"]
    for name in plan.model or SHAPES:
        config = load_config(name)
        with one_line(f"--model {name} is of a kind that this script does not know"):
            parameters = count_parameters(config)
            for gpus in plan.gpus:
                sizes = estimate(config, parameters, gpus, plan).values()
                lines.append(f"| {name} | {parameters / 1e9:.2f}B | {gpus} | "
                             + " | ".join(f"{size:.1f}" for size in sizes) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    try:
        table(parse_config(kind=Plan))
    except InputError as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        sys.exit(2)
