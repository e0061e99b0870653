"""GiB that a run needs on each GPU and on the host, by purpose, before anyone rents a card.

    python analysis/memory.py --gpus 1 8                                  # the trainer's defaults
    python analysis/memory.py --model Qwen/Qwen3-4B --gpus 1 --offload --max_tokens 4096 \\
        --rollout_batch 8                                                 # one card of 24 GB

From configurations alone: parameters are counted on the meta device and no weights are read.
Without --model the table has the models below, which need no network. Parameters, state and cache
are exact; activations are an estimate of what backward keeps in gated transformer layers. The peak
is the state and the largest of decoding, scoring and training, where every prompt, solution and
response is as long as allowed. The CUDA context, NCCL and the allocator's fragments come on top:
leave a tenth of the card.
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

# name: (family, layers, hidden, MLP, heads, KV heads, vocabulary, tied embeddings, context, more)
SHAPES = {
    "SmolLM2-135M": ("llama", 30, 576, 1536, 9, 3, 49152, True, 8192, {}),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 151936, True, 40960, {"head_dim": 128}),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 151936, True, 40960, {}),
    "Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 151936, True, 262144, {}),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 151936, False, 40960, {}),
    "Olmo-3-7B": ("olmo3", 32, 4096, 11008, 32, 32, 100278, False, 65536, {"sliding_window": 4096}),
    "Qwen3-30B-A3B": ("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, False, 40960, {
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
    max_tokens: int = flag(32768, "longest response")
    max_prompt_tokens: int = flag(2048, "longest problem")
    problems_per_step: int = flag(32, "B, over all GPUs")
    group_size: int = flag(8, "G")
    rollout_batch: int = flag(0, "most responses decoded at once; 0: a cache of 2^18 tokens")
    micro_tokens: int = flag(16384, "tokens of a scoring or training micro-batch")
    gradient_checkpointing: bool = flag(True, "recompute layers in backward")
    offload: bool = flag(False, "float32 weights, gradients and AdamW's state in host memory")
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
    family, layers, hidden, mlp, heads, kv_heads, vocabulary, tied, context, rest = SHAPES[name]
    return AutoConfig.for_model(
        family, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=context, **rest)


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


def mask_bytes(config, tokens, micro, width):
    """(bool, bias) of one pass, for layers that look back over a window shorter than the row.

    transformers gives its SDPA path a dense mask for those, (tokens, tokens) bool, once for all
    layers and rows; and PyTorch makes each such layer a bias of it, in the layer's own dtype and
    for every row, which backward keeps. "flash_attention_2" needs neither.
    """
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()) or tokens < window:
        return 0, 0
    return tokens * tokens, width * micro * tokens


def estimate(config, parameters, gpus, plan):
    """{purpose: GiB} where every prompt and response is as long as allowed. plan: see Plan."""
    c, dtype = config, getattr(torch, plan.dtype)
    width, tokens = dtype.itemsize, plan.max_prompt_tokens + plan.max_tokens
    rows = plan.problems_per_step // gpus * plan.group_size
    most = plan.rollout_batch or 2**18 // tokens         # in whole groups, at least one
    rows = min(rows, max(1, most // plan.group_size) * plan.group_size)

    # weights: the root holds embeddings and head. With several ranks the next layer is gathered
    # while one computes. On its way from the host a layer is there in float32 as well
    root = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    layer = (parameters - root) / c.num_hidden_layers
    some = width * (root + layer * (1 if gpus == 1 else 2)) + plan.offload * 4 * layer / gpus
    split = 0 if plan.offload else parameters / gpus     # what of the float32 state is on this GPU

    # gradients: the split ones, and before they are split, in the compute dtype and then in
    # float32, those of the root (which wait for its other end) and of a layer
    def unsplit(weights):
        return weights * (width + 4 + 4 / gpus)
    gradients = 4 * split + width * root + unsplit(layer)

    # activations: what backward keeps of one token in one layer. With checkpointing that is each
    # layer's input, and later one layer, recomputed
    heads, kv_heads, head_dim = attention_shape(c)
    inner = (getattr(c, "moe_intermediate_size", None) or getattr(c, "intermediate_size", None)
             or 4 * c.hidden_size) * (getattr(c, "num_experts_per_tok", None) or 1)
    one = width * (10 * c.hidden_size + (3 * heads + 4 * kv_heads) * head_dim + 4 * inner)
    micro = max(plan.micro_tokens, tokens)               # a longer row is a micro-batch of its own
    mask, bias = mask_bytes(c, tokens, micro, width)
    windows = (getattr(c, "layer_types", None) or []).count("sliding_attention")
    if plan.gradient_checkpointing:
        kept = micro * c.num_hidden_layers * width * c.hidden_size + mask
        most = kept + micro * one + bias
    else:
        kept = most = micro * c.num_hidden_layers * one + mask + windows * bias

    # logits: a chunk at a time, float32: log pi, and pi, a copy and a product for the entropy
    logits = 4 * 4 * min(2**26, 1024 * c.vocab_size, micro * c.vocab_size)
    # scoring keeps nothing, but the teacher also reads a solution, at most another response
    longest = max(tokens, min(tokens + plan.max_tokens, c.max_position_embeddings))
    many = max(plan.micro_tokens, longest)
    scoring = max(some + many * width * (2 * c.hidden_size + 3 * inner)
                  + sum(mask_bytes(c, longest, many, width)),
                  width * (root + 2 * many * c.hidden_size) + logits)
    cache = rows * cache_bytes(c, tokens, dtype)
    weights = some if plan.sampler == "sharded" else width * parameters
    # a layer's cache is copied when it outgrows its buffer; a draw needs the logits of all rows
    decoding = weights + cache * (1 + 1 / c.num_hidden_layers) + 4 * 4 * rows * c.vocab_size
    training = max(
        2 * width * root + 4 * split + kept + logits,    # at the end of the forward pass
        some + gradients + most,                         # in a layer's backward pass
        width * root + 4 * split + unsplit(root) + 4 * layer)            # in the embeddings'

    # the host. Every process reads the whole checkpoint: a dense one is mapped, so that a machine
    # holds one copy of it in its file cache; experts are put together in every process's memory.
    # For the export the first rank gathers all of it in float32 and converts that
    stored, machine = (c.dtype or torch.bfloat16).itemsize, min(gpus, 8)
    copies = machine if getattr(c, "num_experts_per_tok", None) else 1
    held = plan.offload * parameters * machine / gpus    # float32 weights of a machine's ranks
    load, export = copies * stored * parameters, (4 + stored) * parameters
    sizes = {
        "state": 12 * split,                             # float32: weights, AdamW's two moments
        "weights": weights, "cache": cache, "scoring": scoring,
        "layers": some, "gradients": gradients, "activations": most, "logits": logits,
        "peak": 12 * split + max(decoding, scoring, training),
        "host: state": 16 * held, "host: load": load, "host: export": export,
        # gradients are gone when a model is exported
        "host: peak": max(4 * held + load, 16 * held, 12 * held + export)}
    return {name: size / 2**30 for name, size in sizes.items()}


def table(plan):
    """Prints Markdown: a line per model and number of GPUs."""
    lines = ["| model | parameters | GPUs | state | rollout: weights | cache | scoring | training: "
             "layers | gradients | activations | logits | peak per GPU | host: state | load | "
             "export | peak |", "|---" * 16 + "|"]
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
