"""What antisd.py must prove: `python -m pytest -q`, minutes, no network, no GPU.

Models here are real Hugging Face models, only tiny and random, with a word-level tokenizer that is
built below. Wherever possible a test compares with an independent implementation (autograd over an
enumerated vocabulary, whole logits, one row at a time, one process) instead of stored numbers.
Two ranks are two real processes: this file starts itself under torchrun, see "Two ranks".
"""
import ast
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")             # nothing here may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # the claims are exact on the CPU

import antisd                                            # first: it says how sympy counts
import datasets
import pytest
import safetensors.torch
import sympy
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoConfig, AutoModelForCausalLM, GenerationConfig,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real rows in ../shared/data")
SOURCE = (HERE / "antisd.py").read_text(encoding="utf-8")
CPU = torch.device("cpu")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


# --- Tiny models, a tokenizer, a data set --------------------------------------------------------

# Words that are one id but read as two: text that holds them does not encode back to the same ids.
# Many of them carry a box, so that a random model earns a reward now and then.
PHRASES = [f"{word} \\boxed{{{n}}}" for word in ("so", "thus", "hence", "then") for n in (0, 1)]
TEMPLATE = ("{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}"
            "{% if add_generation_prompt and think %}<think> {% endif %}")


def make_tokenizer(special=()):
    """Word level; the pad token is the end token, which also stands inside every prompt."""
    text = antisd.teacher_messages("a b c", "x y", True)[0]["content"] + " incorrect."
    words = ["a", "<unk>", "<end>", "<user>", "<assistant>", "<think>", "</think>", "\\boxed{0}",
             "\\boxed{1}", "The answer is", *PHRASES, *text.split(), *(f"n{i}" for i in range(40))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>",
                                        pad_token="<end>", additional_special_tokens=list(special))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
V, END = len(TOKENIZER), TOKENIZER.eos_token_id
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1,
           mlp_only_layers=[])
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
LINEAR = dict(layer_types=["linear_attention", "full_attention"], head_dim=16,
              linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
              linear_value_head_dim=16)
ARCHITECTURES = {
    "qwen3": dict(head_dim=16, tie_word_embeddings=True), "qwen3_moe": dict(head_dim=16, **MOE),
    "llama": {}, "phi": {}, "olmo3": SLIDING, "gemma3_text": dict(head_dim=16, **SLIDING),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=512),
    "gpt_oss": dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, **SLIDING),
    "qwen3_5_text": dict(tie_word_embeddings=True, **LINEAR),
    "qwen3_next": dict(shared_expert_intermediate_size=32, **LINEAR, **MOE),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "falcon": dict(num_kv_heads=1, attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "deepseek_v3": dict(num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
                        kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                        v_head_dim=16),
}
TRAINED = [kind for kind in ARCHITECTURES if kind not in ("phi", "deepseek_v3")]     # on two ranks


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=512)


def tiny(kind="qwen3", seed=0, **settings):
    """A random model whose logits spread by a nat or two, so that its choices are not arbitrary."""
    common = dict(vocab_size=V, eos_token_id=END, bos_token_id=None, pad_token_id=END,
                  initializer_range=0.25)
    common |= {} if kind == "gpt2" else SIZES
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **common | ARCHITECTURES[kind] | settings)).eval()


def save(model, folder, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    """Rows as .jsonl, .json or .parquet, by the path's suffix."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session", autouse=True)
def one_process(tmp_path_factory):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    antisd.setup()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(call, *fragments):
    with pytest.raises(antisd.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for fragment in fragments:
        assert fragment in message


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a saved model per architecture and train.jsonl, shared by all tests."""
    folder = tmp_path_factory.mktemp("root")
    for kind in TRAINED:
        save(tiny(kind), folder / kind)
    write(folder / "train.jsonl", [
        {"problem": f"a n{i} b" + " c" * (i % 4), "answer": str(i % 2),
         "solution": f"n{i} then \\boxed{{{i % 2}}}" if i % 3 else None} for i in range(7)])
    return folder


def config(root, **flags):
    """Small enough for a test; everything else is the default."""
    small = dict(model=str(root / "qwen3"), dataset=str(root / "train.jsonl"), max_tokens=12,
                 problems_per_step=4, group_size=2, steps=1, lr=1e-3, save_every=0,
                 gradient_checkpointing=False)
    return antisd.Config(**small | flags)


def run(root, output, **flags):
    """Trains in this process; returns the metrics."""
    antisd.train(config(root, output=str(output), **flags))
    return read(Path(output) / "metrics.jsonl")


def strip(rows):
    """Without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "peak_memory_gib")
             and not k.startswith("seconds")} for row in rows]


def weights(folder):
    return {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto").state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def brute_force(model, prompt, response, temperature=1.0):
    """log pi and entropy of a response's tokens: one row, no padding, whole logits, float64."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].double()
    logps = (logits / temperature).log_softmax(-1)
    return logps[range(len(response)), response], -(logps.exp() * logps).sum(-1)


def words(ids):
    return TOKENIZER.decode(ids)


def spy(monkeypatch, name):
    """Lets antisd.<name> run as it is and keeps (arguments, result) of every call."""
    calls, original = [], getattr(antisd, name)

    def wrapper(*args, **options):
        calls.append((args, original(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(antisd, name, wrapper)
    return calls


# --- The method: phi, the arms, advantages, the gate, the loss -----------------------------------

LOG2 = math.log(2)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def jsd(p, q):
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


@pytest.mark.parametrize("method, divergence, sign", [
    ("antisd", jsd, +1), ("sd_jsd", jsd, -1), ("antisd_kl", kl, +1), ("sd", kl, -1)])
def test_policy_gradient_is_the_exact_gradient_of_the_divergence(method, divergence, sign):
    """E_{v ~ pi_S}[A_v grad log pi_S(v)] over a whole vocabulary, through the trainer's own loss,
    with A_seq = 0 and lambda = 1; the mask holds the probabilities."""
    for seed in range(5):
        z, w = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).double() * 2
        z.requires_grad_()
        logp, teacher = z.log_softmax(-1), w.log_softmax(-1)
        u = (teacher - logp).detach()
        exact = torch.autograd.grad(divergence(logp, teacher), z, retain_graph=True)[0]
        advantages = antisd.token_advantages(torch.zeros(1), u[None], 1.0, method)
        loss = antisd.policy_loss(logp[None], logp[None], advantages, logp.detach().exp()[None], 1)
        ascent = -torch.autograd.grad(loss, z)[0]
        torch.testing.assert_close(ascent, sign * exact, rtol=0, atol=1e-15)


def test_phi_table_slope_bound_and_no_overflow():
    u = torch.tensor([-20.0, -5, -1, 0, 1, 5, 20], dtype=torch.float64)
    table = torch.tensor([-0.3466, -0.3432, -0.1899, 0, 0.3101, 2.157, 9.653], dtype=torch.float64)
    torch.testing.assert_close(antisd.phi(u), table, rtol=0, atol=5e-4)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert antisd.phi(zero).item() == 0
    assert torch.autograd.grad(antisd.phi(zero).sum(), zero)[0].item() == pytest.approx(0.25)
    line = antisd.phi(torch.linspace(-30, 30, 601, dtype=torch.float64))
    assert (line.diff() > 0).all() and line.min() >= -LOG2 / 2
    for dtype in (torch.float32, torch.bfloat16):
        values = antisd.phi(torch.tensor([-1e4, -100, 100, 1e4], dtype=dtype)).float()
        expected = torch.tensor([-LOG2 / 2, -LOG2 / 2, 50 - LOG2 / 2, 5000 - LOG2 / 2])
        torch.testing.assert_close(values, expected, rtol=8e-3, atol=1e-3)


def test_group_advantages_by_hand_and_what_token_advantages_add():
    """Consecutive groups, unbiased std: a lone success of four has (1 - 1/4) / (1/2) = 1.5."""
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    r = math.sqrt(3) / 2
    expected = torch.tensor([1.5, -.5, -.5, -.5, -1.5, .5, .5, .5, r, r, -r, -r])
    torch.testing.assert_close(antisd.group_advantages(rewards, 4), expected, rtol=1e-5, atol=0)
    rewards = torch.tensor([.11] * 3 + [.88] * 3 + [1.] * 3 + [0.] * 3)  # .11's mean is inexact
    a_seq = antisd.group_advantages(rewards, 3).requires_grad_()
    assert a_seq.tolist() == [0.0] * 12                  # exactly; AntiSD's term still acts
    u = torch.randn(12, 5, requires_grad=True)
    added = antisd.token_advantages(a_seq, u, 0.5)
    assert torch.equal(added, -0.5 * antisd.phi(u)) and not added.requires_grad
    for compose in "add", "mul":                         # a lambda for each row
        rows = antisd.token_advantages(a_seq + 1, u, torch.ones(12, 1) / 2, compose=compose)
        assert torch.equal(rows, antisd.token_advantages(a_seq + 1, u, 0.5, compose=compose))


# H, the g that comes back. W = 3, tau_down = 0.5, H_warm = median(4, 1, 2) = 2; shut below 1.
SCRIPT = [(4.0, 0), (math.nan, 0), (1.0, 0), (2.0, 0),   # warm-up; a broken batch is no step of it
          (1.9, 1), (1.0, 1), (math.inf, 0), (1.5, 1),   # starts open; equality does not shut
          (0.999, 0), (1.0, 0), (1.999, 0), (2.0, 1),    # stays shut in between; equality reopens
          (1.2, 1), (0.0, 0), (5.0, 1)]


def test_gate_follows_the_script_with_equality_at_both_thresholds_and_through_json_at_any_step():
    for cut in range(len(SCRIPT)):
        first, second = antisd.EntropyGate(3, 0.5), antisd.EntropyGate(3, 0.5)
        assert [first.update(h) for h, _ in SCRIPT[:cut]] == [g for _, g in SCRIPT[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.h_warm == first.h_warm == (2.0 if cut >= 4 else None)
        assert [second.update(h) for h, _ in SCRIPT[cut:]] == [g for _, g in SCRIPT[cut:]]


def test_h_warm_exists_after_the_last_warm_up_step_and_without_tau_down_no_gate_shuts():
    gate = antisd.EntropyGate()
    for h in (9.0, 1.0, 2.0, 8.0):
        assert gate.update(h) == 0 and gate.h_warm is None
    assert gate.update(3.0) == 0 and gate.h_warm == 3.0
    assert gate.update(0.93 * 3.0) == 1 and gate.update(2.78) == 0    # the default ratio
    for warmup in 0, 1:
        gate = antisd.EntropyGate(warmup, 0)
        assert [gate.update(h) for h in (1.0, 0.0, 1e-9, 0.0)] == [1 - warmup, 1, 1, 1]


@pytest.mark.parametrize("advantage, ratio, counts", [
    (+2.0, 1.3, 1.2), (+2.0, 0.5, None), (-2.0, 0.5, 0.8), (-2.0, 1.3, None), (+2.0, 1.1, None)])
def test_clip_binds_on_the_side_that_would_overshoot(advantage, ratio, counts):
    """`counts` is the clipped ratio that stays in the loss, without gradient; None: not clipped."""
    logp = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    old = torch.tensor([[-1.0]], requires_grad=True)
    loss = antisd.policy_loss(logp, old, torch.tensor([[advantage]]), torch.ones(1, 1), 4)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage * (counts or ratio) / 4)
    assert logp.grad.item() == pytest.approx(0 if counts else -advantage * ratio / 4)
    assert old.grad is None
    wide = antisd.policy_loss(logp, old, torch.tensor([[advantage]]), torch.ones(1, 1), 4, clip=0.6)
    assert wide.item() == pytest.approx(-advantage * ratio / 4)


# --- Log-probabilities and entropies -------------------------------------------------------------


def head_and_hidden(rows=11, dim=6, size=9):
    torch.manual_seed(0)
    head = torch.nn.Linear(dim, size, bias=False)
    return head, torch.randn(rows, dim, requires_grad=True), torch.randint(size, (rows,))


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12, 1024])
def test_log_probs_entropies_and_gradients_equal_brute_force_for_any_chunk(chunk):
    head, hidden, targets = head_and_hidden()
    weight = torch.randn(len(targets))
    found = []
    for way in "chunked", "whole":
        if way == "chunked":
            logp, entropy = antisd.token_logprobs(hidden, head, targets, 0.7, chunk)
            assert not entropy.requires_grad
        else:
            logps = (head(hidden) / 0.7).log_softmax(-1)
            logp, entropy = logps[range(11), targets], -(logps.exp() * logps).sum(-1)
        gradients = torch.autograd.grad((logp * weight).sum(), [hidden, head.weight])
        found.append([logp, entropy.detach(), *gradients])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs)


def test_certain_tokens_have_no_entropy_and_no_nan_and_bfloat16_logits_are_scored_in_float32():
    head = torch.nn.Linear(1, 8, bias=False)
    for rest in 0.0, -math.inf:                          # 0 log 0 is 0
        head.weight.data[:] = rest
        head.weight.data[3] = 1e4
        logp, entropy = antisd.token_logprobs(torch.ones(1, 1), head, torch.tensor([3]))
        assert entropy.item() == 0 and logp.item() == 0
    head, hidden, targets = head_and_hidden(64, 16, 500)
    head, hidden = head.bfloat16(), hidden.bfloat16()
    logp, _ = antisd.token_logprobs(hidden, head, targets)
    exact = head(hidden).double().log_softmax(-1)[range(64), targets]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact.float(), rtol=0, atol=1e-5)


class Memory(TorchDispatchMode):
    """Notes how many bytes of the results of operators are alive, at the end and at most."""

    def __init__(self, *inputs):
        super().__init__()
        self.peak, self.sizes = 0, {x.untyped_storage()._cdata: 0 for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        for x in (x.untyped_storage() for x in results if isinstance(x, torch.Tensor)):
            if x._cdata not in self.sizes:               # views cost nothing
                self.sizes[x._cdata] = x.nbytes()
                weakref.finalize(x, self.sizes.pop, x._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_logits_never_exist_whole_in_forward_or_backward():
    """4,096 tokens x 151,936 words, on tensors that have shapes but no memory: whole logits would
    be 2.3 GiB, a chunk is at most 256 MiB; the inputs are not counted, their gradients are."""
    with FakeTensorMode():
        head, hidden, targets = head_and_hidden(4096, 8, 151_936)
        with Memory(hidden, head.weight, targets) as forward:
            logp, entropy = antisd.token_logprobs(hidden, head, targets)
        with Memory(hidden, head.weight, targets) as backward:
            logp.sum().backward()
    assert sum(forward.sizes.values()) < 2**20           # what stays alive: no logits
    assert max(forward.peak, backward.peak) < 1.5 * 2**30


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_do_not_depend_on_padding_or_micro_batches(kind):
    """Rows of unequal length, with the pad = end token and id 0 inside prompts and responses."""
    model = tiny(kind)
    policy = antisd.Policy(model, [END])
    prompts = [[END, 0, 5], [7] * 20, [0, END], [9, 8, 7, 6]]
    responses = [[4, END, 0, 11, END], [3], [END], list(range(20, 44))]
    for budget in (1, 40, 10**6):
        logp, entropy = antisd.score(policy.train(), prompts, responses, budget, 0.7)
        assert logp.shape == (4, 24)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            n = len(response)
            exact = brute_force(model, prompt, response, 0.7)
            torch.testing.assert_close(logp[i, :n].double(), exact[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(entropy[i, :n].double(), exact[1], rtol=1e-4, atol=1e-4)
            assert not logp[i, n:].any() and not entropy[i, n:].any()


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)),
    ("phi", dict(resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3)),
    ("llama", dict(attention_dropout=0.3)),
    ("falcon", dict(hidden_dropout=0.3, attention_dropout=0.3))])
def test_train_mode_recomputes_the_layers_and_no_dropout_acts(tmp_path, kind, settings):
    """Falcon's layers read their rates from the configuration, so load_policy sets them to 0."""
    model, forwards, found = tiny(kind, **settings), [], []
    policy = antisd.Policy(model, [END])
    if kind == "falcon":
        policy = antisd.load_policy(save(model, tmp_path), "auto", TOKENIZER)
        model = policy.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
    next(layer.children()).register_forward_hook(lambda *args: forwards.append(1))
    rows = antisd.pack([PROMPTS[1]], [list(range(20, 40))], CPU)
    for mode in False, True:
        forwards.clear()
        logp = policy.train(mode)(*rows, 1.0)[0]
        found.append([logp, *torch.autograd.grad(logp.sum(), list(model.parameters()))])
        assert len(forwards) == 1 + mode
    for plain, recomputed in zip(*found):
        assert torch.equal(plain, recomputed)


def test_micro_batches_hold_every_row_once_within_the_budget_and_a_tenth_of_padding():
    lengths = [5, 30, 7, 7, 90, 1, 12, 30]
    batches = antisd.micro_batches(lengths, 60)
    assert [sorted(b) for b in batches] == [[4], [1, 7], [6], [0, 2, 3], [5]]    # [4]: too long
    lengths = [int(20 * 1.02 ** k) for k in range(200)]
    batches = antisd.micro_batches(lengths, 16384)
    assert sorted(sum(batches, [])) == list(range(200)) and len(batches) < 30
    padded = [len(b) * max(lengths[i] for i in b) for b in batches]
    assert max(padded) <= 16384 and sum(lengths) / sum(padded) >= 0.9


# --- Rollouts ------------------------------------------------------------------------------------

PROMPTS = [[3, 5, 8], [3, 9, 12, 14, 6, 7, 30, 31, 8, 40, 41], [0, END, 21, 22, 8], [17, 8]]


def test_passes_are_as_small_as_asked_and_gathered_unless_sharded(root, tmp_path, monkeypatch):
    """rollout_batch bounds the rows of a decoding pass, micro_tokens the tokens of a scoring or
    training pass; only --sampler sharded leaves the weights split; and gradient_checkpointing runs
    each of the two layers of a training pass twice."""
    drawn, split, plain = [], [], antisd.Policy.generate
    layer, passes = type(tiny().model.layers[0].mlp), []
    forward = layer.forward

    def generate(policy, input_ids, **inputs):
        drawn.append(len(input_ids))
        split.append(isinstance(
            policy.model.model.layers[0].mlp.up_proj.weight, torch.distributed.tensor.DTensor))
        return plain(policy, input_ids=input_ids, **inputs)
    monkeypatch.setattr(antisd.Policy, "generate", generate)
    monkeypatch.setattr(layer, "forward", lambda self, x: (
        passes.append(torch.is_grad_enabled()), forward(self, x))[1])
    packed, rolled, viewed = (spy(monkeypatch, name)
                              for name in ("pack", "roll_out", "teacher_prompts"))
    for sampler, recompute in ("generate", False), ("sharded", True):
        for calls in drawn, split, packed, rolled, viewed, passes:
            calls.clear()
        run(root, tmp_path / sampler, sampler=sampler, gradient_checkpointing=recompute,
            rollout_batch=5, micro_tokens=70, temperature=1e-4)      # so cold that it is greedy
        assert max(drawn) == 4 and set(split) == {sampler == "sharded"}
        shapes, rollouts = [tuple(ids.shape) for _, (ids, _) in packed], rolled[0][1]
        for r in rollouts:
            assert r.ids == cut(argmax_decode(tiny(), r.problem["prompt"], 12), [END])
        assert [r.problem for r in rollouts[::2]] == [r.problem for r in rollouts[1::2]]
        fewest = antisd.micro_batches([len(r.problem["prompt"]) + len(r.ids) for r in rollouts], 70)
        teachers = antisd.micro_batches([len(view) + len(r.ids) for view, r in zip(
            viewed[0][1][0], rollouts)], 70)
        assert 2 < len(fewest) < 8 and len(shapes) == len(teachers) + len(fewest)    # s is free
        assert sum(passes) == 2 * len(fewest) * (1 + recompute)
        assert shapes[-len(fewest):] == [
            (len(rows), max(len(rollouts[i].problem["prompt"] + rollouts[i].ids) for i in rows))
            for rows in fewest]
        assert all(n * length <= 70 or n == 1 for n, length in shapes)


def test_without_rollout_batch_a_pass_holds_a_cache_of_so_many_tokens(monkeypatch):
    decoded, policy = [], antisd.Policy(tiny(), [END])
    monkeypatch.setattr(antisd, "decode", lambda policy, prompts, group_size, *rest: (
        decoded.append(len(prompts)), [[END]] * len(prompts) * group_size)[1])
    antisd.sample(policy, [[0], *[[0] * 96] * 8], 2, 2**15 - 96)      # 2^18 / 2^15 = 8 responses
    assert decoded == [4, 4, 1]


def test_gathered_weights_decode_without_hooks_which_are_back_afterwards(root):
    policy, _ = antisd.build(config(root), TOKENIZER, CPU)
    layers = [m for m in policy.modules() if isinstance(m, FSDPModule)]

    def hooks():
        return [dict(h) for m in layers for h in (m._forward_pre_hooks, m._forward_hooks)]
    before, split = hooks(), antisd.sample(policy, PROMPTS, 1, 9, 0, sharded=True)
    assert len(layers) == 3 and all(before)
    with antisd.gathered(policy):
        assert not any(hooks())
        assert antisd.sample(policy, PROMPTS, 1, 9, 0) == split
    assert hooks() == before
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in policy.parameters())
    assert antisd.sample(policy, PROMPTS, 1, 9, 0, sharded=True) == split


def argmax_decode(model, prompt, count):
    """One full forward a token, no cache, no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def cut(ids, ends):
    """Up to and including the first end."""
    return next((ids[:i + 1] for i, token in enumerate(ids) if token in ends), ids)


def spread_ends(references, stride):
    """Two end ids: rows stop before the stride, after it, and never; and the shortest length."""
    for ends in itertools.combinations(sorted(set(sum(references, []))), 2):
        lengths = [len(cut(row, ends)) for row in references]
        stopped = [n for n, row in zip(lengths, references) if set(row[:n]) & set(ends)]
        both = all(any(row[n - 1] == end for n, row in zip(lengths, references)) for end in ends)
        if both and len(stopped) < 4 and min(stopped) < stride < max(stopped):
            return list(ends), min(lengths)
    raise AssertionError("no such ids: choose another seed")


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "olmo3", "gemma3_text", "lfm2"])
def test_greedy_rollouts_equal_a_step_by_step_argmax(monkeypatch, kind):
    """Gradient checkpointing on, train mode, left padding, learned positions (GPT-2), windows
    (Olmo-3, Gemma-3), convolutions (LFM2), two end ids, rows that stop early, late, or never."""
    model = tiny(kind, 6 if kind == "gemma3_text" else 0)
    references = [argmax_decode(model, prompt, 20) for prompt in PROMPTS]
    ends, n = spread_ends(references, stride=6)          # an end may be the last token allowed
    policy = antisd.Policy(model, ends)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    copy = antisd.DynamicLayer.update                    # copies the cache: only prompts may use it
    monkeypatch.setattr(antisd.DynamicLayer, "update",
                        lambda layer, *new: None if layer.get_seq_length() else copy(layer, *new))
    monkeypatch.setattr(antisd.RoomyLayer, "room", 3)    # the cache grows within a stride
    expected = [cut(row, ends) for row in references for _ in range(2)]
    for most in (0, 2, 5):
        policy.train()
        assert antisd.sample(policy, PROMPTS, 2, 20, 0, rollout_batch=most, stride=6) == expected
    assert antisd.sample(policy, PROMPTS, 2, n, 0, stride=6) == [r[:n] for r in expected]


def hostile(model):
    """A checkpoint whose own sampling defaults would distort the law that is scored."""
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, min_p=0.2, typical_p=0.5, temperature=0.1, max_length=3,
        repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[5], eos_token_id=[7, 4])
    return model


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.5)])
def test_rollouts_follow_the_softmax_under_a_hostile_generation_config(temperature, top_p):
    """Two prompts, whose groups are consecutive: a swap would show."""
    policy, n = antisd.Policy(hostile(tiny()), [END]), 20_000
    torch.manual_seed(0)
    drawn = antisd.sample(policy, PROMPTS[:2], n, 1, temperature, top_p)
    assert len(drawn) == 2 * n
    laws = []
    for prompt, rows in zip(PROMPTS, (drawn[:n], drawn[n:])):
        logits = policy.model(torch.tensor([prompt])).logits[0, -1].detach() / temperature
        p, order = logits.softmax(-1).sort(descending=True)
        p[p.cumsum(0) - p >= top_p] = 0                  # the nucleus: up to what crosses top_p
        p = torch.zeros(V).scatter(0, order, p / p.sum())
        frequency = torch.bincount(torch.tensor([ids[0] for ids in rows]), minlength=V) / n
        error = (p * (1 - p) / n).sqrt()
        assert ((frequency - p).abs() <= 5 * error + 1 / n).all() and not frequency[p == 0].any()
        assert (frequency[p > 10 / n] > 0).all() and (p > 10 / n).sum() > 3
        laws.append(p)
    assert (laws[0] - laws[1]).abs().sum() > 0.5


# --- What the student and the teacher read -------------------------------------------------------

NASTY = "{prompt} {0} {{}} \\boxed{1} \\\\ \\1 \\g<0> %s %(x)s $1 \x00 {% if %} {{ x }} \U0001f600"


def test_both_prompts_word_for_word_and_empty_c_is_the_students():
    student = ("Solve the following math problem. Place the final answer in \\boxed{}.\n\n"
               "What is 1 + 1?")
    assert antisd.student_messages("What is 1 + 1?") == [{"role": "user", "content": student}]
    for correct, verdict in (False, "incorrect"), (True, "correct"):
        assert antisd.teacher_messages("What is 1 + 1?", "It is \\boxed{2}.", correct) == [
            {"role": "user", "content": student + "\n\nYour previous attempt:\nIt is \\boxed{2}."
             f"\n\nPrevious assessment: Your answer is {verdict}.\n\nNow solve this problem step "
             "by step."}]
        assert antisd.teacher_messages("p", "", correct) == antisd.student_messages("p")
    # braces, backslashes and percent signs survive the template
    content = antisd.teacher_messages(NASTY, "<" + NASTY + ">", False)[0]["content"]
    assert content.count(NASTY) == 2 and "<" + NASTY + ">" in content
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(NASTY)                          # one token, if it arrives in one piece
    ids = antisd.render(tokenizer, antisd.teacher_messages(NASTY, NASTY, False), {})
    assert ids.count(tokenizer.convert_tokens_to_ids(NASTY)) == 2


def rollout(text, reward, solution="worked", answer="7", problem="a b"):
    row = {"id": 0, "problem": problem, "answer": answer, "solution": solution, "prompt": [3, 4]}
    return antisd.Rollout(row, [5], text, False, reward)


def test_picker_without_a_correct_sibling_falls_back_on_solution_then_answer():
    group = [rollout("wrong", 0.0), rollout("right", 1.0), rollout("wrong", 0.0)]
    picks = antisd.pick_solutions(group, random.Random(0))
    assert picks == [("right", "sibling"), ("worked", "solution"), ("right", "sibling")]
    group = [rollout("wrong", 0.0, "<think> a </think> b <think> c </think>\n\nso 1")]
    assert antisd.pick_solutions(group, random.Random(0)) == [("so 1", "solution")]
    for solution in (None, "", "<think> never ended"):
        group = [rollout("wrong", 0.0, solution)] * 2
        assert antisd.pick_solutions(group, random.Random(0)) == [
            ("The answer is \\boxed{7}.", "answer")] * 2


def test_picker_shows_one_seeded_sibling_to_the_group_and_never_a_response_to_itself():
    group = [rollout(f"text {i}", float(i in (1, 2, 4, 5))) for i in range(6)]
    serving = set()
    for seed in range(40):
        picks = antisd.pick_solutions(group, random.Random(seed))
        assert picks == antisd.pick_solutions(group, random.Random(seed))
        texts = [text for text, source in picks if source == "sibling"]
        assert len(texts) == 6
        chosen = max(set(texts), key=texts.count)
        assert texts.count(chosen) == 5                  # all but the chosen one itself
        assert texts[int(chosen[-1])] != chosen and texts[int(chosen[-1])] in {
            "text 1", "text 2", "text 4", "text 5"}
        serving.add(chosen)
    assert serving == {"text 1", "text 2", "text 4", "text 5"}


def views(group, longest=10**6, seed=0, **rest):
    return antisd.teacher_prompts(TOKENIZER, group, 2, {}, longest, seed, **rest)


def test_a_long_solution_loses_its_head_and_nothing_else():
    solution = " ".join(f"n{i}" for i in range(40))
    group = [rollout("wrong", 0.0, solution, problem="a b c")] * 2
    [whole, _], _ = views(group)
    assert views(group, len(whole))[0][0] == whole
    head, tail = words(whole).split(solution)
    for longest in range(len(whole) - 39, len(whole)):
        prompt = views(group, longest)[0][0]
        assert len(prompt) == longest                    # cut no more than needed
        text = words(prompt)
        assert text.startswith(head) and text.endswith(tail)
        kept = text[len(head):-len(tail)].split()[1:]    # after the word that "..." is glued to
        assert kept == solution.split()[40 - len(kept):]


def test_each_row_gets_the_verdict_on_its_own_response():
    group = [rollout("n9 \\boxed{1}", 1.0), *(rollout(text, 0.0) for text in ("x", "n1", "n2"))]
    prompts, sources = views(group)                      # groups of two
    assert ["Your answer is incorrect." in words(p) for p in prompts] == [False, True, True, True]
    assert sources == ["solution", "sibling", "solution", "solution"]


def test_the_choice_of_siblings_follows_seed_and_data_position_for_any_number_of_ranks():
    def group():
        return [rollout("so \\boxed{0}", 1.0), rollout("so \\boxed{1}", 1.0), rollout("x", 0.0)]
    def chosen(count, **where):
        rollouts = [r for _ in range(count) for r in group()]
        found, _ = antisd.teacher_prompts(TOKENIZER, rollouts, 3, {}, 10**6, **where)
        return found
    whole = chosen(12, seed=1, position=5)
    assert len(set(map(tuple, whole[2::3]))) == 2        # both are shown to somebody
    assert chosen(4, seed=1, position=9) == whole[12:24]             # the second rank's share
    assert chosen(12, seed=2, position=5) != whole


def test_template_flags_are_the_same_for_student_and_teacher(root, tmp_path):
    plain, same, problems = (antisd.prepare(config(
        root, output=str(tmp_path / str(flags)), chat_template_kwargs=json.dumps(flags)), 1)[3]
        for flags in ({}, {"think": False}, {"think": True}))
    assert same == plain
    group = [antisd.Rollout(p, [5], "x", False, 0.0) for p in problems[:2]]
    found, _ = antisd.teacher_prompts(TOKENIZER, group, 2, {"think": True}, 10**6, 0)
    for student, teacher, bare in zip(problems, found, plain):
        assert words(student["prompt"]) == words(bare["prompt"]) + " <think>"
        assert words(teacher).endswith("<assistant> <think>")
        first = words(student["prompt"]).split(" <end>")[0]
        assert words(teacher).startswith(first)          # c comes after the student's own turn


# --- train(): one step against a second implementation -------------------------------------------

DELTAS = {"grpo": lambda u: 0 * u, "sd": lambda u: u, "antisd_kl": lambda u: -u,
          "sd_jsd": lambda u: (torch.log1p(u.exp()) - LOG2) / 2,
          "ones": lambda u: -torch.tanh(u)}              # an entry of one's own
DELTAS["antisd"] = DELTAS["no_teacher"] = lambda u: -DELTAS["sd_jsd"](u)


def by_hand(cfg, rows, lam, optimizer_of):
    """One step of Algorithm 1 by other means: whole logits, row by row, no FSDP, no micro-batches.

    rows: (prompt, the teacher's prompt, ids, truncated, reward) -> what the step must log; the
    weights after it; u; and how many tokens' ratios the clip held.
    """
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    parameters, scale, held, losses, norms = list(model.parameters()), cfg.temperature, 0, [], []
    optimizer, us, advantages, seq = optimizer_of(parameters), [], [], []
    with torch.no_grad():
        student = [brute_force(model, p, ids, scale) for p, _, ids, _, _ in rows]
        teacher = [brute_force(model, view, ids, scale) for _, view, ids, _, _ in rows]
    for i, ((s, _), (t, _)) in enumerate(zip(student, teacher)):
        first = i - i % cfg.group_size
        rewards = [row[4] for row in rows[first:first + cfg.group_size]]
        a = (rows[i][4] - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6)
        u = -s if cfg.method == "no_teacher" else t - s
        us.append(u)
        seq += [abs(a)] * len(rows[i][2])
        delta = DELTAS[cfg.method](u)
        advantages.append(a * (1 + lam * delta) if cfg.compose == "mul" else a + lam * delta)
    size = len(rows) // cfg.updates_per_batch
    for first in range(0, len(rows), size):
        kept = [i for i in range(first, first + size) if not (cfg.mask_truncated and rows[i][3])]
        tokens, loss = sum(len(rows[i][2]) for i in kept), 0.0
        for i in kept:
            prompt, _, ids, _, _ = rows[i]
            ratio = (brute_force(model, prompt, ids, scale)[0] - student[i][0]).exp()
            reach = torch.where(advantages[i] > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
            held += int((reach != ratio).sum())
            share = len(ids) * len(kept) if cfg.loss_agg == "seq" else tokens
            loss = loss - (advantages[i] * reach).sum() / share
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        for p in parameters:
            p.grad *= min(1, cfg.max_grad_norm / norms[-1])
        optimizer.step()
        losses.append(loss.item())
    u, h = torch.cat(us), torch.cat([h for _, h in teacher])
    logged = {"loss": statistics.mean(losses), "grad_norm": statistics.mean(norms),
              "seq_adv_abs": statistics.mean(seq),
              "student_entropy": torch.cat([h for _, h in student]).mean().item()}
    if cfg.method != "grpo":
        ranked = h.sort().values                         # an even count: the mean of the middle two
        middle = ranked[[(len(h) - 1) // 2, len(h) // 2]]
        logged |= {"u_mean": u.mean().item(), "u_negative": (u < 0).double().mean().item(),
                   "phi_abs": DELTAS[cfg.method](u).abs().mean().item(),
                   "teacher_entropy": h.mean().item(),
                   "teacher_entropy_median": middle.mean().item()}
    return logged, model.state_dict(), us, held


# prompt, response, truncated, reward; groups of two. The first half (rank 0's, of two) has most of
# the tokens and needs more micro-batches than the second.
HAND_MADE = (
    ([3, 5, 8], range(20, 50), True, 0.0), ([3, 5, 8], [11, END], False, 1.0),
    ([3] * 17, range(40, 69), True, 0.0), ([3] * 17, range(60, 20, -2), False, 0.0),
    ([0, END, 9, 4], [4, END], False, 1.0), ([0, END, 9, 4], [END], False, 0.0),
    ([7, 8], [0, 1, 2, 0, END], False, 1.0), ([7, 8], [33, 34, 35], True, 0.0))
C = [44, 45, 46, END, 47]                                # stands for the privileged context
NO_GATE = dict(warmup_steps=0, tau_down=0.0)
SMALL = dict(micro_tokens=40)
CASES = {
    "plain": {}, "small micro-batches": SMALL, "untied": dict(model="llama", method="sd"),
    "recomputed layers": dict(gradient_checkpointing=True), "offload": dict(offload=True, **SMALL),
    "mean of response means": dict(loss_agg="seq"), "multiplied": dict(compose="mul"),
    "without truncated": dict(mask_truncated=True, **SMALL),
    "means without truncated": dict(loss_agg="seq", mask_truncated=True),
    "clipped gradient": dict(max_grad_norm=0.05),
    "student's gate": dict(gate_source="student", **SMALL),
    "two updates": dict(updates_per_batch=2, micro_tokens=70), "grpo": dict(method="grpo", **SMALL),
    "sd_jsd": dict(method="sd_jsd"), "antisd_kl": dict(method="antisd_kl"),
    "no_teacher": dict(method="no_teacher"), "an entry of one's own": dict(method="ones")}
# with two updates, two ranks split the groups otherwise; the arms differ in one line
TWO_RANK_CASES = list(CASES)[:list(CASES).index("two updates")]
NOTHING_MOVES = {"all truncated": dict(mask_truncated=True), "not finite": dict(method="nan")}


def case_config(root, name, **more):
    flags = dict(NO_GATE, temperature=0.7, max_grad_norm=1e9, lr=0.3, weight_decay=0.0)
    flags |= (CASES | NOTHING_MOVES)[name] | more
    return config(root, **flags | {"model": str(root / flags.get("model", "qwen3"))})


@functools.cache
def run_case(root, name):
    """The real train() for a step of SGD on this rank's share of HAND_MADE -> what it logs; the
    weights that it exports; the u of this rank's first and last response."""
    rank, world = dist.get_rank(), dist.get_world_size()
    out = root / f"cases-{world}" / name
    cfg, size = case_config(root, name, output=str(out)), len(HAND_MADE) // world
    mine = [antisd.Rollout({"prompt": p, "problem": "p", "answer": "1"}, list(ids), "",
                           cut_off or name == "all truncated", reward)
            for p, ids, cut_off, reward in HAND_MADE[rank * size:(rank + 1) * size]]
    build = antisd.build

    def build_sgd(*args):
        policy, _ = build(*args)
        return policy, torch.optim.SGD(policy.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(antisd, "build", build_sgd)
        patch.setattr(antisd, "roll_out", lambda *args, **options: mine)
        patch.setattr(antisd, "teacher_prompts", lambda tokenizer, rollouts, *rest: (
            [r.problem["prompt"] + C for r in rollouts], ["sibling"] * len(rollouts)))
        patch.setitem(antisd.METHODS, "ones", DELTAS["ones"])
        patch.setitem(antisd.METHODS, "nan", lambda u: u * math.nan)
        antisd.train(cfg)
    [row] = strip(read(out / "metrics.jsonl"))
    return row, weights(out / "model"), [line["u"] for line in read(out / "samples.jsonl")]


@functools.cache
def reference(root, name):
    rows = [(p, p + C, list(ids), cut_off, reward) for p, ids, cut_off, reward in HAND_MADE]
    cfg = case_config(root, name)
    return by_hand(cfg, rows, cfg.lam, lambda p: torch.optim.SGD(p, lr=cfg.lr))


def assert_equal_updates(root, name, found):
    """Against by_hand: everything that is logged, and every weight moved by the same amount."""
    row, after, us = found
    logged, state, expected, held = reference(root, name)
    assert {key: row[key] for key in logged} == pytest.approx(logged, rel=1e-4, abs=1e-6)
    before = weights(case_config(root, name).model)
    assert logged["grad_norm"] > 0.05 and after.keys() == state.keys() == before.keys()
    for key, value in after.items():
        torch.testing.assert_close(value - before[key], state[key] - before[key], rtol=1e-3,
                                   atol=1e-5)
    return held, us, expected


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_an_independent_one(root, name):
    found = run_case(root, name)
    held, us, expected = assert_equal_updates(root, name, found)
    assert (held > 0) == (name == "two updates")         # one update: the clip is inert
    assert found[0]["skipped_updates"] == 0
    if name == "grpo":
        assert us == [None, None]
        assert {found[0][key] for key in (*TEACHERS, "gate", "h_warm", "lam")} == {None}
    else:
        for mine, theirs in zip(us, (expected[0], expected[-1]), strict=True):
            assert mine == pytest.approx(theirs.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name, loss", [("all truncated", 0), ("not finite", None)])
def test_an_update_that_is_empty_or_not_finite_changes_nothing(root, name, loss):
    row, after, _ = run_case(root, name)
    assert same(weights(root / "qwen3"), after) and row["skipped_updates"] == 1
    assert row["loss"] == row["grad_norm"] == loss       # JSON has null for NaN


# --- train(): Algorithm 1 as a whole -------------------------------------------------------------

KEYS = """step reward reward_complete length truncated zero_std_groups seq_adv_abs student_entropy
    gate h_warm lam context/sibling context/solution context/answer loss grad_norm lr tokens_per_s
    skipped_updates seconds/rollout seconds/score seconds/train peak_memory_gib""".split()
TEACHERS = "u_mean u_negative phi_abs teacher_entropy teacher_entropy_median".split()


def test_a_training_step_equals_algorithm_1_by_hand(root, tmp_path, monkeypatch):
    """What train() logs and exports, against brute force on the rollouts that it drew."""
    rolled, viewed = spy(monkeypatch, "roll_out"), spy(monkeypatch, "teacher_prompts")
    packed, sampled = spy(monkeypatch, "pack"), spy(monkeypatch, "sample")
    flags = dict(NO_GATE, temperature=1.4, seed=8, lr=1e-2)
    [row] = run(root, tmp_path, **flags)
    rollouts, (prompts, origins) = rolled[0][1], viewed[0][1]

    # the ids that were drawn are the ids that are scored and trained on: never text in between
    assert [r.ids for r in rollouts] == sampled[0][1]
    drawn = {tuple(ids) for ids in sampled[0][1]}
    assert {tuple(ids) for (_, ids, _), _ in packed for ids in ids} == drawn
    assert any(TOKENIZER.encode(TOKENIZER.decode(ids)) != list(ids) for ids in drawn)

    rows = [(r.problem["prompt"], view, r.ids, r.truncated, r.reward)
            for r, view in zip(rollouts, prompts, strict=True)]
    logged, state, *_ = by_hand(config(root, **flags), rows, 0.5,
                                lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.01))
    assert {key: row[key] for key in logged} == pytest.approx(logged, rel=1e-3, abs=1e-6)
    after, before = weights(tmp_path / "model"), weights(root / "qwen3")
    for name, value in after.items():                    # where rounding cannot turn a sign
        moved, by = value - before[name], state[name] - before[name]
        assert ((moved - by).abs() < 1e-4).float().mean() > 0.98 and moved.abs().max() > 5e-3

    for r in rollouts:
        assert r.truncated == (END not in r.ids) and END not in r.ids[:-1]
        assert len(r.ids) == 12 or not r.truncated
        assert r.text == TOKENIZER.decode(r.ids, skip_special_tokens=True)
        assert r.reward == antisd.is_correct(r.text, r.problem["answer"])
    rewards = torch.tensor([r.reward for r in rollouts]).view(4, 2)
    equal = (rewards[:, 0] == rewards[:, 1]).float().mean()
    assert 0 < rewards.mean() < 1 and 0 < equal < 1 and row["zero_std_groups"] == equal
    assert row["reward"] == rewards.mean() and row["truncated"] > 0
    complete = [r.reward for r in rollouts if not r.truncated]
    assert row["reward_complete"] == pytest.approx(sum(complete) / len(complete))
    assert row["length"] * 8 == sum(len(r.ids) for r in rollouts)
    for name in "sibling", "solution", "answer":
        assert row[f"context/{name}"] * 8 == origins.count(name)


def test_warm_up_steps_are_grpos_bit_for_bit_and_the_next_one_is_not(root, tmp_path):
    runs = {"grpo": dict(method="grpo"), "warm": dict(warmup_steps=5), "past": dict(warmup_steps=2)}
    rows = {name: run(root, tmp_path / name, steps=3, **flags) for name, flags in runs.items()}
    grpo, warm, past = (weights(tmp_path / name / "model") for name in runs)
    assert same(grpo, warm) and not same(grpo, past) and not same(grpo, weights(root / "qwen3"))
    assert [(r["gate"], r["lam"]) for r in rows["warm"]] == [(0, 0)] * 3
    assert rows["past"][2]["lam"] == 0.5 * rows["past"][2]["gate"] == 0.5
    assert all(r["teacher_entropy"] > 0 for r in rows["warm"])    # H is measured all the same


@pytest.mark.parametrize("key, flags", [
    ("teacher_entropy", {}), ("teacher_entropy_median", dict(gate_stat="median")),
    ("student_entropy", dict(gate_source="student"))])
def test_lambda_follows_the_gate_on_that_steps_entropy(root, tmp_path, capsys, key, flags):
    rows = run(root, tmp_path, steps=5, warmup_steps=1, tau_down=0.99, lam=0.7, lr=1e-2, seed=3,
               **flags)
    gate = antisd.EntropyGate(1, 0.99)
    for row in rows:
        assert row["gate"] == gate.update(row[key]) and row["lam"] == 0.7 * row["gate"]
        assert row["h_warm"] == pytest.approx(gate.h_warm)
    assert {row["lam"] for row in rows[1:]} == {0.0, 0.7}    # with this seed it is open, then shut
    shut = min(row["step"] for row in rows[1:] if not row["gate"])
    assert f"step {shut}: the gate shuts" in capsys.readouterr().out


def test_a_run_in_parts_equals_an_uninterrupted_one_whatever_befell_it(root, tmp_path):
    """A checkpoint that was cut, one that was not finished, a full disk, model/ moved and linked
    back. The gate is resumed in its warm-up; a step after the checkpoint is done once more."""
    flags = dict(warmup_steps=4, updates_per_batch=2, eval_dataset=str(root / "train.jsonl"))
    run(root, tmp_path / "whole", steps=5, **flags)
    parts, model, elsewhere = (tmp_path / name for name in ("parts", "parts/model", "elsewhere"))
    run(root, parts, steps=4, save_every=1, **flags)
    older, newest = antisd.checkpoints(parts)            # two stay
    assert (older.name, newest.name) == ("step-000003", "step-000004")
    assert len({file.stat().st_mode for file in model.iterdir()}) == 1
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')                   # a kill cut this line
    resumed = flags | dict(steps=5, save_every=1, resume=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))       # the longest file
    try:
        refuse(lambda: run(root, parts, **resumed), "cannot write", "step-000005")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shard = next(newest.glob("__0_*"))
    os.truncate(shard, shard.stat().st_size // 2)
    refuse(lambda: run(root, parts, **resumed), "step-000004 cannot be loaded", "delete")
    (newest / ".metadata").unlink()                      # as if killed while saving
    model.rename(elsewhere)
    model.symlink_to(elsewhere)
    write(parts / "checkpoints/step-notes.txt", [])           # somebody's file stays
    run(root, parts, **resumed)
    assert same(weights(tmp_path / "whole/model"), weights(elsewhere)) and model.is_symlink()
    for name in "metrics.jsonl", "samples.jsonl":
        assert strip(read(tmp_path / "whole" / name)) == strip(read(parts / name))
    assert [row["step"] for row in read(parts / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert (parts / "checkpoints/step-notes.txt").exists()
    (parts / "metrics.jsonl").unlink(), model.unlink()   # checkpoints alone are a run, too
    refuse(lambda: run(root, parts, **resumed | dict(resume=False)), "already holds a run")


def test_offload_changes_no_bit_of_any_run_resumed_or_continued(root, tmp_path, monkeypatch):
    policies, fully_shard = set(), antisd.fsdp.fully_shard
    monkeypatch.setattr(antisd.fsdp, "fully_shard", lambda module, **options: (
        policies.add(type(options.get("offload_policy"))), fully_shard(module, **options)))

    def go(name, steps=3, **flags):
        policies.clear()
        rows = run(root, tmp_path / name, **dict(steps=steps, save_every=1, lr=1e-2, warmup_steps=1,
                                                 **flags))
        assert policies == {CPUOffloadPolicy if flags["offload"] else type(None)}
        return strip(rows), [v.tolist() for v in weights(tmp_path / name / "model").values()]
    plain = go("plain", offload=False)
    assert go("offload", offload=True) == plain
    for first in False, True:
        go(f"resumed {first}", steps=2, offload=first)
        assert go(f"resumed {first}", offload=not first, resume=True) == plain
    assert (go("on", offload=True, init_from=str(tmp_path / "plain"))
            == go("off", offload=False, init_from=str(tmp_path / "offload")))


def test_init_from_keeps_all_but_the_step_and_the_gate(root, tmp_path, monkeypatch):
    run(root, tmp_path / "first", warmup_steps=1, steps=2, save_every=2, lr=1e-2)
    asked, made = spy(monkeypatch, "next_problems"), spy(monkeypatch, "build")
    flags = dict(init_from=str(tmp_path / "first"), lr=2e-30, weight_decay=0.02, warmup_steps=1)
    [row] = run(root, tmp_path / "antisd", save_every=1, **flags)
    assert same(weights(tmp_path / "first/model"), weights(tmp_path / "antisd/model"))
    assert [args[1] for args, _ in asked] == [8]         # 2 steps x 4 problems were used up
    assert row["step"] == 0 and row["h_warm"] == row["teacher_entropy"] and row["lam"] == 0
    optimizer = made[0][1][1]
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    [group] = optimizer.param_groups                     # this run's flags, not the old one's
    assert (group["lr"], group["weight_decay"]) == (2e-30, 0.02)
    shutil.rmtree(tmp_path / "first")                    # the run has checkpoints of its own now
    rows = run(root, tmp_path / "antisd", steps=2, resume=True, **flags)
    assert rows[0] == row and len(rows) == 2


def test_three_updates_that_are_not_finite_end_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setitem(antisd.METHODS, "nan", lambda u: u * math.nan)
    refuse(lambda: run(root, tmp_path, method="nan", steps=9, save_every=1),
           "three steps in a row were not finite, up to step 2", "checkpoint is none")
    assert [row["skipped_updates"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    for name in "metrics.jsonl", "samples.jsonl":
        assert "NaN" not in (tmp_path / name).read_text()        # JSON has null


def test_nan_is_never_drawn_from():
    policy = antisd.Policy(tiny("llama"), [END])
    policy.model.model.embed_tokens.weight.data[41] = math.nan       # stands in one of the prompts
    refuse(lambda: antisd.sample(policy, PROMPTS, 1, 3), "logits are NaN")
    logits = torch.tensor([[0.0, -math.inf], [1.0, 2.0]])
    assert antisd.refuse_nan(None, logits) is logits     # a token may be impossible


def test_a_tracker_gets_every_line_in_one_run_also_after_a_resume(root, tmp_path, monkeypatch):
    calls, begun, held_out = [], [], str(root / "train.jsonl")
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(__spec__=True, **{
        called: lambda *args, called=called, **options: calls.append((called, args, options))
        for called in ("init", "log", "finish")}))       # trackio's init takes no id
    for steps in 2, 3:
        calls.clear()
        rows = run(root, tmp_path, tracker="trackio", steps=steps, eval_dataset=held_out,
                   save_every=1, resume=steps > 2)
        assert [name for name, *_ in calls] == ["init", *["log"] * len(calls[1:-1]), "finish"]
        logged = [args[0] for _, args, _ in calls[1:-1]]
        assert logged == rows[-len(logged):] and "eval_accuracy" in rows[-1]
        assert [options["step"] for *_, options in calls[1:-1]] == [row["step"] for row in logged]
        begun.append(calls[0][2])
    assert begun[0]["name"] == begun[1]["name"] == os.environ.pop("WANDB_RUN_ID")
    assert begun[1]["config"]["steps"] == 3 and begun[1]["resume"] == "allow"


def test_records_of_a_run_are_complete_and_valid_json(root, tmp_path, capsys):
    nasty = NASTY + " \u2028 \" \' </s>"
    data = write(tmp_path / "nasty.jsonl", [{"problem": nasty, "answer": "1", "solution": nasty}])
    rows = run(root, tmp_path / "run", dataset=data, eval_dataset=str(root / "train.jsonl"),
               eval_every=2, steps=3, warmup_lr_steps=4, warmup_steps=1, export_every=2)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]     # the last one is the evaluation alone
    assert ["eval_accuracy" in row for row in rows] == [True, False, True, True]
    p = rows[3]["eval_accuracy"]
    assert 0 < p < 1 and rows[3]["eval_error"] == pytest.approx((p * (1 - p) / 7)**0.5)
    for i, row in enumerate(rows[:3]):
        assert set(KEYS + TEACHERS) <= set(row) and row["peak_memory_gib"] is None
        assert row["lr"] == pytest.approx(0.25e-3 * (i + 1))
        took = sum(row[f"seconds/{part}"] for part in ("rollout", "score", "train"))
        assert row["tokens_per_s"] == pytest.approx(row["length"] * 8 / took)
    samples = read(tmp_path / "run/samples.jsonl")
    assert {(r["problem"], r["answer"], r["step"]) for r in samples} == {(nasty, "1", 0)}
    for row in samples:
        assert len(row["tokens"]) == len(row["u"]) == len(row["teacher_entropy"])
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["flags"]["warmup_lr_steps"] == 4 and len(record["source"]) == 64
    assert record["torch"] == torch.__version__ and "transformers" in record
    assert not same(*(weights(tmp_path / "run" / name) for name in ("model", "model-000002")))
    assert "step 3: held-out accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("gates, marks, said", [
    ([0, 0, 1, 1, 0], [.25, None, None, .5, .75],
     ["held-out accuracy: 0.250 before, 0.750 after", "the gate opened at step 2, shut at step 4"]),
    ([0, 0], [None, None], ["the gate never moved"]), ([None, None], [None, None], [])])
def test_the_last_lines_say_what_happened(root, tmp_path, monkeypatch, capsys, gates, marks, said):
    write(tmp_path / "metrics.jsonl", [
        {"step": i, "gate": g} | ({"eval_accuracy": mark} if mark else {})
        for i, (g, mark) in enumerate(zip(gates, marks))])
    monkeypatch.setattr(antisd, "export_model", lambda *args: None)
    antisd.finish(config(root, output=str(tmp_path)), None, None, [], None)
    assert capsys.readouterr().out.splitlines() == said


def test_export_is_the_checkpoints_own_kind_of_folder(root, tmp_path):
    """bfloat16 and tied goes in, trains in float32 still tied, and comes out so; all other files
    are the source's, also the generation settings that rollouts had to ignore. Of these settings
    one counts: the model's end tokens end a response, and so does the tokenizer's."""
    folder = save(hostile(tiny()).bfloat16(), tmp_path / "bf16")
    old_style = json.loads((tmp_path / "bf16/config.json").read_text()) | {"rope_theta": 1e6}
    (tmp_path / "bf16/config.json").write_text(json.dumps(old_style))
    cfg = config(root, model=folder, output=str(tmp_path / "run"), **NO_GATE)
    policy, _ = antisd.build(cfg, TOKENIZER, CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert policy.eos_ids == sorted([7, 4, END])
    antisd.train(cfg)
    out = tmp_path / "run/model"
    trained, before = weights(out), weights(folder)
    assert {v.dtype for v in trained.values()} == {torch.bfloat16}
    assert not torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])
    names = {p.name for p in Path(folder).iterdir()}
    assert names == {p.name for p in out.iterdir()} and len(names) >= 5
    for name in names - {"model.safetensors"}:
        assert (out / name).read_bytes() == (Path(folder) / name).read_bytes()


def test_every_tensor_is_exported_in_the_dtype_that_it_has_in_the_source(root, tmp_path):
    """DeepSeek's router adds a float32 bias, in a checkpoint that is bfloat16 otherwise."""
    model = tiny("deepseek_v3").bfloat16()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = torch.randn(4)
    source, out = save(model, tmp_path / "source"), tmp_path / "run/model"
    run(root, tmp_path / "run", model=source, lr=0)
    before, after = (safetensors.torch.load_file(Path(folder) / "model.safetensors")
                     for folder in (source, out))
    assert {v.dtype for v in before.values()} == {torch.float32, torch.bfloat16}
    assert same(before, after)


def test_a_turn_that_ends_with_no_end_token_is_said(root, capsys):
    tokenizer = make_tokenizer(["<im_end>"])
    tokenizer.add_tokens(["RESPONSE"])
    for end, said in ("<end>", 0), ("<im_end>", 1), ("{{ raise_exception('no') }}", 0):
        tokenizer.chat_template = TEMPLATE.replace("<end>", end)
        antisd.load_policy(str(root / "qwen3"), "auto", tokenizer)
        assert capsys.readouterr().out.count("ends a turn with <im_end>") == said


def test_compute_in_bfloat16_is_close_but_master_weights_are_float32(root):
    policies = [antisd.build(config(root, dtype=dtype), TOKENIZER, CPU)[0]
                for dtype in ("float32", "bfloat16")]
    assert {p.dtype for policy in policies for p in policy.parameters()} == {torch.float32}
    exact, close = (antisd.score(p, PROMPTS[:1], [list(range(20, 40))], 99)[0] for p in policies)
    assert close.dtype == torch.float32 and 0 < (exact - close).abs().max() < 0.5


# --- Two ranks: torchrun starts this file, which ends in worker() --------------------------------

TWO = "--standalone", "--nproc-per-node", "2"
LONG = dict(steps=10, save_every=2, lr=1e-2, warmup_steps=1, gate_stat="median", seed=3)


def architecture(root, kind):
    """Two steps by each sampler -> the gradient norms; and how far, in nats, the logits that tokens
    were drawn from lie from `score`."""
    norms, gaps, rank, seen = [], [], dist.get_rank(), []
    for sampler in ("generate", "sharded"):
        out = root / f"two/{kind}-{sampler}"
        cfg = config(root, model=str(root / kind), output=str(out), steps=2, sampler=sampler,
                     warmup_steps=1, tau_down=0.0)
        antisd.train(cfg)
        norms += [row["grad_norm"] for row in read(out / "metrics.jsonl")]
    policy, _ = antisd.build(cfg, TOKENIZER, CPU)
    policy.eos_ids, prompts = [V + 1], (PROMPTS[:2], PROMPTS[1:])[rank]      # no row ever ends
    policy.model.register_forward_hook(lambda module, args, out: seen.append(out.logits[:, -1]))
    for sharded in True, False:
        seen.clear()
        with contextlib.nullcontext() if sharded else antisd.gathered(policy):
            drawn = antisd.sample(policy, prompts, 2, 12, 0.6, stride=5, sharded=sharded)
        laws = torch.stack([logits / 0.6 for logits in seen[1:]], 1).log_softmax(-1)
        found = laws.gather(-1, torch.tensor(drawn)[..., None])[..., 0]      # seen[0]: the prompts
        scores, _ = antisd.score(policy, [p for p in prompts for _ in range(2)], drawn, 64, 0.6)
        gaps.append((found - scores).abs().max().item())
    return norms, max(antisd.all_gather(max(gaps)))


def uneven_rollouts(root):
    """Greedy, with weights that stay split, and gathered: one prompt on rank 0, three on rank 1,
    all of other lengths -> (expected, [rank 0's, rank 1's], the same)."""
    references = [argmax_decode(tiny(), prompt, 20) for prompt in PROMPTS]
    ends, _ = spread_ends(references, stride=6)
    policy, _ = antisd.build(config(root), TOKENIZER, CPU)
    policy.eos_ids = ends
    mine = PROMPTS[1:] if dist.get_rank() else PROMPTS[:1]
    assert any(isinstance(p, torch.distributed.tensor.DTensor) for p in policy.parameters())
    split = antisd.sample(policy, mine, 1, 20, 0, rollout_batch=1, sharded=True, stride=6)
    with antisd.gathered(policy):
        assert antisd.sample(policy, [], 1, 20) == []    # a rank may get no held-out problem
        whole = antisd.sample(policy, mine, 1, 20, 0, rollout_batch=4)
    expected = [cut(row, ends) for row in references]
    return expected, antisd.all_gather(split), antisd.all_gather(whole)


def worker(root):
    """Everything that needs two processes, in one launch; rank 0 leaves the results in root."""
    torch.set_num_threads(1)
    antisd.setup()
    results = {name: run_case(root, name) for name in TWO_RANK_CASES}
    results["uneven"] = uneven_rollouts(root)
    results |= {kind: architecture(root, kind) for kind in TRAINED}
    rolled, original = [], antisd.roll_out

    def kept(*args, **options):
        rolled.append(original(*args, **options))
        return rolled[-1]
    antisd.roll_out = kept
    antisd.train(config(root, output=str(root / "two/whole"), **LONG))
    results["drawn"] = antisd.all_gather(
        [[(r.problem["id"], r.ids) for r in rows] for rows in rolled])
    half = LONG | dict(output=str(root / "two/offload"), offload=True)
    antisd.train(config(root, **half | dict(steps=4)))
    antisd.train(config(root, **half, resume=True))
    if dist.get_rank() == 0:
        torch.save(results, root / "two.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(root):
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", *TWO, __file__, root],
                           cwd=HERE, capture_output=True, text=True, timeout=900, env=ENV)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(root / "two.pt")


@pytest.mark.parametrize("name", TWO_RANK_CASES)
def test_two_ranks_equal_one(root, two_ranks, name):
    assert_equal_updates(root, name, two_ranks[name])
    one, two = ({key: -1 if value is None else value for key, value in row.items()}
                for row, *_ in (run_case(root, name), two_ranks[name]))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", TRAINED)
def test_every_architecture_trains_and_agrees_with_its_rollouts_on_two_ranks(root, two_ranks, kind):
    norms, gap = two_ranks[kind]
    assert len(norms) == 4 and all(norm < math.inf for norm in norms) and norms[1] > 0
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-4)           # both samplers drew the same
    assert gap < (1e-3 if kind in ("qwen3_5_text", "qwen3_next") else 1e-4)      # nats, any token
    before, after = weights(root / kind), weights(root / f"two/{kind}-sharded/model")
    assert before.keys() == after.keys() and not same(before, after)


def test_uneven_lengths_on_two_ranks(two_ranks):
    expected, *by_sampler = two_ranks["uneven"]
    for first, second in by_sampler:
        assert (len(first), len(second)) == (1, 3) and len({len(row) for row in expected}) > 2
        assert first + second == expected


def test_ranks_share_problems_draw_different_responses_and_obey_one_gate(root, two_ranks):
    ids = [p["id"] for p in antisd.load_problems(str(root / "train.jsonl"))]
    gate, uneven = antisd.EntropyGate(1), 0
    for step, row in enumerate(read(root / "two/whole/metrics.jsonl")):
        rows = [pair for rank in two_ranks["drawn"] for pair in rank[step]]
        expected = antisd.next_problems(ids, 4 * step, 4, seed=3)
        assert [i for i, _ in rows] == [i for i in expected for _ in range(2)]
        assert len({tuple(tokens) for _, tokens in rows}) > 4
        assert row["length"] * 8 == sum(len(tokens) for _, tokens in rows)
        uneven += len({sum(len(t) for _, t in rank[step]) for rank in two_ranks["drawn"]}) > 1
        assert row["gate"] == gate.update(row["teacher_entropy_median"])     # of the whole batch
        assert row["h_warm"] == pytest.approx(gate.h_warm)
    assert uneven                                        # decoding of uneven lengths did not hang
    whole, offload = root / "two/whole", root / "two/offload"            # --offload changes no bit
    assert same(weights(whole / "model"), weights(offload / "model"))
    assert strip(read(whole / "metrics.jsonl")) == strip(read(offload / "metrics.jsonl"))


def ranks_of(folder):
    """Processes that name this folder on their command line, launchers left out."""
    shown = subprocess.check_output(["ps", "-ww", "-eo", "pid=,args="], text=True)
    return [int(line.split()[0]) for line in shown.splitlines()
            if str(folder) in line and "torch.distributed.run" not in line]


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def launch(root, out, *options):
    """Starts the run in `out` under torchrun."""
    flags = dataclasses.asdict(config(root, output=str(out), **LONG))
    default = antisd.Config(model="m")
    command = [sys.executable, "-m", "torch.distributed.run", *options, "antisd.py", "--resume",
               *(word for key, value in flags.items() if value != getattr(default, key)
                 for word in (f"--{key}", str(value)))]
    return subprocess.Popen(command, cwd=HERE, env=ENV, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")


@LINUX
def test_a_rank_whose_launcher_died_before_it_came_up_ends_at_once(monkeypatch):
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionRefusedError):
        antisd.setup()
    antisd.ctypes.CDLL(None).prctl(1, 0)                 # this process is no rank


@LINUX
def test_killed_at_any_moment_resumed_on_any_number_of_ranks(root, two_ranks, tmp_path):
    """kill -9 of a rank, then of torchrun itself: no rank is left, and the run that goes on ends
    like the one that nobody killed, bit for bit. Then one rank goes on with what two have saved."""
    whole, out = root / "two/whole", tmp_path / "run"
    for least in 3, 6:
        started = launch(root, out, *TWO)
        wait_for(lambda: len(antisd.read_lines(out / "metrics.jsonl")) >= least
                 or started.poll() is not None)
        ranks = ranks_of(out)
        for rank in ranks:                               # so that they do not end before the kill
            os.kill(rank, signal.SIGSTOP)
        assert len(ranks) == 2, started.communicate()[1]
        if least == 3:
            os.kill(ranks[1], signal.SIGKILL)
            os.kill(ranks[0], signal.SIGCONT)
        else:
            second = launch(root, out, *TWO).communicate(timeout=300)[1]
            assert second.count("error: ") == 1 and "another process is at work" in second
            os.kill(started.pid, signal.SIGKILL)
        started.communicate(timeout=300)
        wait_for(lambda: not ranks_of(out), 20)
        assert started.returncode != 0
    ended = launch(root, out, *TWO)
    error = ended.communicate(timeout=300)[1]
    assert ended.returncode == 0, error[-4000:]
    assert same(weights(whole / "model"), weights(out / "model"))
    assert strip(read(whole / "metrics.jsonl")) == strip(read(out / "metrics.jsonl"))
    run(root, out, resume=True, **LONG)                  # no step: exports what it has loaded
    assert same(weights(whole / "model"), weights(out / "model"))
    rows = run(root, out, resume=True, **LONG | dict(steps=11))
    assert [row["step"] for row in rows] == list(range(11))
    assert not same(weights(whole / "model"), weights(out / "model"))


@LINUX
def test_two_machines_one_of_them_lost_then_resumed_equal_one(root, two_ranks, tmp_path):
    """Two launchers with a rank each, as on two machines: kill -9 of one, and both end; started
    again, the run ends like that of one launcher with two ranks, bit for bit."""
    whole, out = root / "two/whole", tmp_path / "run"

    def start():
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]               # is free
        return [launch(root, out, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
                       "c10d", "--rdzv-endpoint", f"localhost:{port}") for _ in range(2)]
    first, second = start()
    wait_for(lambda: len(antisd.read_lines(out / "metrics.jsonl")) >= 3)
    second.kill()
    first.communicate(timeout=300)
    assert first.returncode == 1
    wait_for(lambda: not ranks_of(out), 20)
    assert 3 <= len(read(out / "metrics.jsonl")) < LONG["steps"]
    for agent in start():
        error = agent.communicate(timeout=300)[1]
        assert agent.returncode == 0, error[-4000:]
    assert same(weights(whole / "model"), weights(out / "model"))
    assert strip(read(whole / "metrics.jsonl")) == strip(read(out / "metrics.jsonl"))


# --- Bad input: one line and exit code 2, before any weights are read ----------------------------

def main_on(monkeypatch, capsys, *words, name="antisd.py", run=antisd.train, kind=antisd.Config):
    """The command line, in this process -> exit code, lines of stderr."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        antisd.main(run, kind)
    return end.value.code, [line for line in capsys.readouterr().err.splitlines() if line]


def variant(root, name, template=TEMPLATE, weights=1.0, **settings):
    """The tiny qwen3 with another template, other settings in its config.json, or a part of its
    weights' file."""
    folder = shutil.copytree(root / "qwen3", root / name, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * weights))
    return ["--model", folder]


def of_kind(root, kind, **settings):
    """A configuration without weights."""
    AutoConfig.for_model(kind, vocab_size=V, **SIZES | settings).save_pretrained(root / kind)
    TOKENIZER.save_pretrained(root / kind)
    return ["--model", root / kind]


def row_of(root, **row):
    """A data set whose second row is this one."""
    return ["--dataset", write(root / "wrong.jsonl", [ROW, row])]


ROW = {"problem": "a n1", "answer": "1"}
ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8,
            original_max_position_embeddings=256)
BAD_INPUT = [   # flags, or a function of root that makes them; what the line must say
    ("--model=", "--model is required"), ("--method dpo", "dpo"), ("--tracker comet", "comet"),
    ("--lr -1", "--lr"), ("--group_size 1", "--group_size"), ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"), ("--lam nan", "--lam"), ("--steps 0", "--steps"),
    ("--eval_every 0", "--eval_every"), ("--lamb 0.3", "--lamb"), ("--max_token 3", "--max_token"),
    ("--steps many", "many"), ("stray", "stray"), ("@nowhere.args", "nowhere.args"),
    ("--warmup_steps 0", "--tau_down 0"), ("--chat_template_kwargs [1]", "JSON object"),
    ("--chat_template_kwargs {", "JSON object"), ('--chat_template_kwargs {"thnk":false}', "thnk"),
    ("--updates_per_batch 3", "--updates_per_batch"), ("--max_tokens 500", "context (512)"),
    ("--max_prompt_tokens 5", "--max_prompt_tokens"), ("--init_from nothing", "no checkpoint"),
    ("--model nobody/nothing", "nobody/nothing"), ("--dataset nobody/nothing", "nobody/nothing"),
    ("--dataset missing.jsonl", "No such file"), ("--dataset missing.parquet", "missing.parquet"),
    (lambda root: [f"@{root}/q.args"], "quotation"),
    (lambda root: variant(root, "raises", "{{ raise_exception('no') }}"), "no"),
    (lambda root: variant(root, "syntax", "{% for m in messages %}"), "endfor"),
    (lambda root: variant(root, "base", None), "chat"),
    (lambda root: variant(root, "fp8", quantization_config={"quant_method": "fp8"}), "quantized"),
    (lambda root: variant(root, "unknown", model_type="foo"), "foo"),
    (lambda root: variant(root, "more", num_hidden_layers=3, layer_types=["full_attention"] * 3),
     "fitting weights for model.layers.2"),
    (lambda root: variant(root, "wide", intermediate_size=40), "fitting weights for ('model."),
    (lambda root: variant(root, "cut", weights=0.5), "cut cannot be loaded"),
    (lambda root: variant(root, "short", vocab_size=V - 1), "more tokens than its embedding"),
    (lambda root: of_kind(root, "gemma2", head_dim=16), "logits after lm_head"),
    (lambda root: of_kind(root, "granite", logits_scaling=8.0), "logits after lm_head"),
    (lambda root: of_kind(root, "minimax", num_local_experts=2, num_experts_per_tok=1), "cache"),
    (lambda root: [*of_kind(root, "phi3", pad_token_id=0, rope_parameters=ROPE,
                            original_max_position_embeddings=256), "--max_tokens", 300], "context"),
    (lambda root: row_of(root, text="p", label="1"), "row 2"),
    (lambda root: row_of(root, problem="x \ud800", answer="1"), "row 2"),
    (lambda root: row_of(root, problem="x", answer="1", solution="\ud800"), "row 2")]


@pytest.mark.parametrize("given, fragment", BAD_INPUT, ids=[text for _, text in BAD_INPUT])
def test_what_the_user_can_mend_costs_one_line(root, monkeypatch, capsys, given, fragment):
    """All starts are in one folder: a start that fails leaves nothing there, not even its lock."""
    (root / "q.args").write_text("--output don't")
    words = given(root) if callable(given) else given.split(" ")
    if not re.search("fitting|loaded", fragment):        # only the weights' file can tell these
        monkeypatch.setattr(antisd, "load_policy", lambda *args: pytest.fail("weights were read"))
    code, lines = main_on(
        monkeypatch, capsys, "--model", root / "qwen3", "--dataset", root / "train.jsonl",
        "--output", root / "refused", "--max_tokens", 12, "--problems_per_step", 4, "--group_size",
        2, *words)
    assert code == 2 and len(lines) == 1 and len(lines[0]) < 700
    assert lines[0].startswith("antisd.py: error: ") and fragment in lines[0]


def test_programmers_mistakes_keep_their_traceback(root, tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(sys, "argv", ["antisd.py", "--model", "m", "--output", str(tmp_path)])
        antisd.main(lambda cfg: 1 / 0)
    out, model, hub = (str(path) for path in (tmp_path / "run", root / "qwen3", tmp_path / "hub"))
    Path(hub).mkdir()
    file = write(Path(hub) / "d.jsonl", [ROW])
    for place, name, error, call in (
            (antisd, "student_messages", TypeError, lambda: run(root, out)),
            (antisd, "teacher_messages", TypeError, lambda: run(root, out)),
            (antisd, "is_correct", NameError, lambda: run(root, out)),
            *((AutoModelForCausalLM, "from_pretrained", error,
               lambda: antisd.load_policy(model, "auto", TOKENIZER))
              for error in (torch.OutOfMemoryError, RuntimeError)),
            *((antisd, "read_problem", error, lambda path=path: antisd.load_problems(path))
              for error in (KeyError, NameError, ValueError, OSError, RuntimeError, TypeError)
              for path in (file, hub))):
        def broken(*args, error=error, **options):
            raise error("a mistake")
        with monkeypatch.context() as patch, pytest.raises(error, match="a mistake") as caught:
            patch.setattr(place, name, broken)
            call()
        assert type(caught.value) is error


def test_the_command_in_a_process_of_its_own(root, tmp_path):
    """A terminal that does not know what the model writes, RANK left behind by a scheduler, a home
    folder, a byte order mark, nanoseconds as the seed: the run ends well. Bad input: one line."""
    said = TOKENIZER.convert_tokens_to_ids(["<assistant>", "n39", "<end>"])
    folder = Path(save(says(*said), tmp_path / "model"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"n39"', '"\u221a"'))       # a square root
    (tmp_path / "f.args").write_text("\ufeff--output=~/run --steps 1  # no more\n", "utf-8")

    def start(*words):
        return subprocess.run(
            [sys.executable, "antisd.py", "--model", folder, f"@{tmp_path}/f.args", "--seed",
             str(time.time_ns()), "--max_tokens", "9", "--problems_per_step", "1", *words],
            cwd=HERE, capture_output=True, text=True, encoding="latin-1",
            env=ENV | {"PYTHONIOENCODING": "latin-1", "RANK": "0", "HOME": str(tmp_path)})
    ended = start("--dataset", str(root / "train.jsonl"))
    assert ended.returncode == 0, ended.stderr
    assert "[step 0, reward 0] ?" in ended.stdout
    assert read(tmp_path / "run/samples.jsonl")[0]["response"] == "\u221a"
    ended = start("--resume", *row_of(tmp_path, problem="no answer"))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "row 2" in ended.stderr


def test_arms_and_defaults_are_the_papers_and_flags_take_both_spellings_and_files(tmp_path):
    assert list(antisd.METHODS) == ["grpo", "sd", "sd_jsd", "antisd", "antisd_kl", "no_teacher"]
    assert set(antisd.GATED) == {"antisd", "antisd_kl", "no_teacher"}
    cfg = antisd.Config(model="m")
    assert (cfg.lam, cfg.warmup_steps, cfg.tau_down, cfg.lr, cfg.steps) == (0.5, 5, 0.93, 1e-6, 200)
    assert (cfg.problems_per_step, cfg.group_size, cfg.temperature, cfg.clip) == (32, 8, 1.0, 0.2)
    assert (cfg.method, cfg.compose, cfg.gate_stat, cfg.gate_source, cfg.loss_agg, cfg.max_tokens,
            cfg.updates_per_batch) == ("antisd", "add", "mean", "teacher", "token", 32768, 1)
    assert cfg.gradient_checkpointing
    for field in dataclasses.fields(cfg):
        if field.name != "tracker":                      # may not be installed
            given = getattr(field.type, "__args__", [getattr(cfg, field.name)])[-1]
            for name in {field.name, field.name.replace("_", "-")}:
                words = [f"--{name}"] if field.type is bool else [f"--{name}", str(given)]
                found = getattr(antisd.parse_config(["--model", "m", *words]), field.name)
                assert found == (True if field.type is bool else given)
    file = tmp_path / "run.args"
    file.write_text("# a comment\n--model 'two words'  # another\n\n--lam 0.25 --max-tokens 7\n")
    cfg = antisd.parse_config([f"@{file}", "--seed", "4"])
    assert (cfg.model, cfg.lam, cfg.max_tokens, cfg.seed) == ("two words", 0.25, 7, 4)
    assert antisd.parse_config([f"@{HERE}/toy/demo.args"]).model == "toy/model"


def test_long_problems_are_dropped_and_counted(root, tmp_path, capsys):
    rows = [{"problem": p, "answer": "1"} for p in ("a", "a " * 90, "b")]
    cfg = config(root, dataset=write(tmp_path / "d.jsonl", rows), max_prompt_tokens=50,
                 output=str(tmp_path / "run"))
    _, _, longest, problems, held_out = antisd.prepare(cfg, 1)
    assert [p["problem"] for p in problems] == ["a", "b"] and held_out == []
    assert "1 of 3" in capsys.readouterr().out and longest == 512 - 12
    refuse(lambda: antisd.prepare(cfg, 3), "--problems_per_step", "3")


def test_a_folder_holds_one_run_with_one_set_of_settings_and_data(root, tmp_path, capsys):
    rows = [ROW | {"problem": f"a n{i}", "solution": "so"} for i in range(4)]
    data = write(tmp_path / "d.jsonl", rows)
    flags = dict(method="grpo", dataset=data)
    refuse(lambda: run(root, tmp_path / "run", **flags | dict(dataset="nobody/nothing")), "nobody")
    (tmp_path / "run").mkdir()
    theirs = write(tmp_path / "run/problems.jsonl", [ROW | {"step": 3}])         # not of this run
    with pytest.MonkeyPatch.context() as patch:          # a start that fails is no run, too
        patch.setattr(antisd, "roll_out", None)
        with pytest.raises(TypeError):
            run(root, tmp_path / "run", resume=True, **flags | dict(method="sd"))
    [row] = run(root, tmp_path / "run", resume=True, **flags)
    assert read(theirs) == [ROW | {"step": 3}]
    assert "holds no checkpoint" in capsys.readouterr().out
    assert not row["lam"] and {row[key] for key in (*TEACHERS, "gate", "h_warm")} == {None}
    refuse(lambda: run(root, tmp_path / "run", **flags), "already holds a run", "--resume")
    flags["resume"] = True
    refuse(lambda: run(root, tmp_path / "run", **flags | dict(method="sd")), "method")
    for change in dict(answer="9"), dict(solution="other"), dict(problem="new"):
        write(tmp_path / "d.jsonl", [rows[0] | change, *rows[1:]])
        refuse(lambda: run(root, tmp_path / "run", **flags), "other settings")
    (tmp_path / "own/model").mkdir(parents=True)         # somebody's, which export would replace
    refuse(lambda: run(root, tmp_path / "own", **flags), "own holds no run")


def says(*chain):
    """A real model that answers the last of its prompt's tokens with the next of `chain`, and so
    on: one-hot embeddings, silent layers, and a head that holds the chain."""
    model = tiny("llama", hidden_size=128, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V, 128))
        model.lm_head.weight.zero_()
        for now, following in zip(chain, chain[1:]):
            model.lm_head.weight[following, now] = 100.0
    return model


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("said, reward", [
    (["<think>", "so \\boxed{1}", "n1", "<end>"], 0.0),              # the prompt opened it
    (["<think>", "so \\boxed{1}", "</think>", "n1", "<end>"], 0.0),  # a draft's box
    (["<think>", "n2", "</think>", "so \\boxed{1}", "<end>"], 1.0),
    (["<assistant>", "so \\boxed{1}", "<think>", "n1", "<end>"], 0.0),           # open again
    (["<assistant>", "<think>", "so \\boxed{1}", "</think>", "\\boxed{0}", "<end>"], 0.0),
    (["<assistant>", "so \\boxed{1}", "<end>"], 1.0)])
def test_a_thought_earns_nothing_and_is_never_shown(special, said, reward):
    tokenizer = make_tokenizer(special)
    policy = antisd.Policy(says(*tokenizer.convert_tokens_to_ids(said)), {END})
    prompt = antisd.render(tokenizer, antisd.student_messages("a"), {"think": said[0] == "<think>"})
    problem = {"id": 0, "problem": "a", "answer": "1", "solution": None, "prompt": prompt}
    rollouts = antisd.roll_out(policy, tokenizer, [problem], 2, max_tokens=8)
    assert [r.reward for r in rollouts] == [reward] * 2
    assert tokenizer.convert_ids_to_tokens(rollouts[0].ids) == said[1:]
    (shown, source), _ = antisd.pick_solutions(rollouts, random.Random(0))
    assert source == ("sibling" if reward else "answer") and "think" not in shown


@pytest.mark.parametrize("template", [
    "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    '{% macro head() %}{{ strftime_now( "%Y-%m-%d" ) }}{% endmacro %}{{ head() }} <user>'])
def test_the_clock_of_a_template_stands_still(root, monkeypatch, template):
    tokenizer, *_ = antisd.load_tokenizer(str(variant(root, "clock", template)[1]), {})
    shown = tokenizer.apply_chat_template(antisd.student_messages("a"), tokenize=False)
    assert shown.startswith("01 Jan 2026")


# --- The reward ----------------------------------------------------------------------------------

def correct(box, answer):
    return antisd.is_correct(r"So $\boxed{" + box + "}$.", answer)


def table(text):
    """answer :: box | box ;; answer :: box -> [(answer, boxes), ...]; line breaks are blanks."""
    rows = [row.split(" :: ") for row in text.strip().replace("\n", " ").split(" ;; ")]
    return [(answer, boxes.split(" | ")) for answer, boxes in rows]


RIGHT = r"""
61 :: 061 | +61 | 61. | 61.0 | \text{61} | (61) | {61} | \boxed{61} ;; 007 :: 7 | 07 | 7.0 ;;
120 :: \binom{10}{3} | \dbinom{10}{7} | 5! | 5! = 120 | \frac{6!}{3!} ;; -12 :: −12 | - 12 |
-\frac{24}{2} | 3–15 ;; 45600 :: 45,600 | 45{,}600 | 45,\!600 | 45\,600 | 45 600 |
4.56 \times 10^4 | 4.56e4 ;; 2,345,678 :: 2345678 | 2,\!345,\!678 ;; 64 :: 2^6 | 8^{2} |
4 \cdot 16 | x = 64 | a+b = 60+4 = 64 | n \approx 64 | 64 = 64 ;; 60 :: \$60 | $60$ | 60% | 60\% |
60^\circ | 60° | 60 \text{ km/h} | 60~\mathrm{m}^2 | 60 miles | 60cm |
60 \mathrm{~kg} \mathrm{~s}^{-1} | 60\ \text{square units} | **60** ;; \$7.50 :: 7.5 |
7.50 \text{ dollars} | \frac{15}{2} ;; 35^\circ :: 35 | 35^{\circ} | 35 \text{ degrees} |
x = 35^\circ ;; 48 \mbox{ feet}^2 :: 48 | 48 \text{ ft}^2 ;; \frac{7}{4} :: 7/4 | \frac74 |
\dfrac{14}{8} | 1\frac{3}{4} | 1 \tfrac34 | 1 3/4 | 1.75 | \frac{-7}{-4} | \frac{7}4 |
\frac{7}{4} \approx 1.7 | 7 / 4 ;; -\frac{5}{2} :: -2.5 | \frac{-5}{2} | \frac{5}{-2} | -2\frac12 ;;
5\sqrt{7} :: 5\sqrt7 | 5 \sqrt 7 | 5·√7 | \sqrt{175} | 5 \cdot 7^{1/2} | 5√7 | 5sqrt(7) |
\frac{35}{\sqrt{7}} ;; \sqrt{12} :: \sqrt 12 | \sqrt12 | 2\sqrt{3} | sqrt(12) ;; 6\pi :: 6π |
6 \cdot \pi | \pi \cdot 6 | \frac{12\pi}{2} | 6\pi \text{ cm}^2 | 6pi ;;
3^{20} \cdot 12! :: 12! \cdot 3^{20} | 12! · 3^{20} | 3^{19} \cdot 3 \cdot 12! ;; 0.375 :: 3/8 |
.375 | 0.37503 | 37.5\% | 37.5% | \sqrt{0.140625} ;; 6.02e23 :: 6.02 \times 10^{23} |
6.02\cdot10^{23} | 6.02×10²³ | 6.02 x 10^23 | 6.02E23 | 6.02e+23 |
60.2 \times 10^{22} \mathrm{~mol}^{-1} | N \approx 6.02\times 10^{23} | 6.02*10^23 ;;
1e-7 :: 10^{-7} | 10⁻⁷ | 0.0000001 | 1.0 \times 10^{-7}\text{ m} ;; 4,-9 :: -9, 4 | \{4, -9\} |
x = 4 \text{ or } x = -9 | -9 \text{ and } 4 | x=-9, x=4 ;; 100, 200 :: 200, 100 ;;
2 \pm \sqrt{3} :: 2-\sqrt3, 2+\sqrt3 | x = 2 \pm \sqrt{3} | \frac{4\pm\sqrt{12}}{2} ;;
\{\pm 1, 6\} :: 6, 1, -1 | \{-1, 1, 6\} ;; (2, -5) :: \left(2,\,-5\right) | (x,y) = (2,-5) |
(\frac42, -5) ;; (1,234) :: (1, 234) ;; [2, \infty) :: x \ge 2 | x \in [2,\infty) |
\left[2, +\infty\right) ;; (-3, 8] :: -3 < x \leq 8 | x\in(-3,8] ;;
(-\infty, 1) \cup (5, 6) :: (5,6)\cup(-\infty,1) ;;
\begin{pmatrix} 1/2 & 0 \\ 3 & -1 \end{pmatrix} :: \begin{bmatrix}0.5&0\\[2pt]3&-1\end{bmatrix} ;;
\text{Maria} :: Maria | \textbf{Maria} | \mathrm{maria} | \text{ Maria. } ;; \text{(D)} :: D | (D) |
\textbf{(D)} | \mathrm{D} ;; 3021_4 :: 3021_{4} | (3021)_4 | 3021_{\text{4}} ;;
(a+1)(b-2) :: ab - 2a + b - 2 | (b-2)(1+a) ;; \frac{A}{B} e^{-t/\tau} :: A e^{-\frac{t}{\tau}} / B |
\frac{A}{B}\exp(-t/\tau) ;; 3 + 4i :: 4i+3 | 3+4\mathrm{i} | z = 3+4i ;; v_{0} t :: v_0 t |
t v_{0} | x(t) = v_0 t ;; \sin^2 x :: 1-\cos^2 x | \sin(x)^2 ;;
\dot{q}_{0} u(t) :: u(t) \dot{q}_0 ;; np.arctan(2/3) :: \arctan(2/3) |
\tan^{-1}\left(\frac23\right) ;; 5.2 k :: 5.2k \text{ J} | \frac{26}{5} k ;; x+$ $y :: y+x ;;
-3./4 :: -\frac34 | -0.75 ;; x=9 :: 9 | x = 9 | 9.0 ;; y = 3x-1 :: 3x-1 | y=-1+3x | y - 3x = -1 ;;
2x+3y-4=0 :: 2x+3y=4 | 4x+6y-8=0 | 3y = 4-2x ;; y^{\prime}+k y=0 :: y' + ky = 0 | y' = -ky ;;
\frac{d M}{d t}=2 M-b :: \frac{dM}{dt}+b=2M ;; MC=AVC :: \text{MC}=\text{AVC} | AVC = MC ;;
6 :: \boldsymbol{6} | \color{red}{6} | {\Large 6} | ６ | 6个 | \mathbf{6} | 6 meters per second |
\{6\} ;; -3 :: －3 ;; (1,2) :: （1，2） ;; 12 :: １２ | 12元 ;; \text{Yes} :: yes | Yes | \textbf{yes} ;;
10\% :: 10 ;; (n-1)! :: (n - 1)! ;; 3:4 :: 3 : 4 ;;
\mathbb{R}\setminus\{2\} :: \mathbb{R} \setminus \{2\} ;; 27.0 :: 27 ;; 17 :: 17 \text{ apples} |
17 \text{ cities} | 17 \text{ square meters} | 17\text{th} | 17 units |
17 \mathrm{~m} / \mathrm{s}^2 | 17 \text{ W} | 17 \text{ meters squared} | 17 \text{ months} |
17 cm | 17 米 | 17平方米 | 17 \text{元} | 17 \% | f(3) = 17 | \angle ABC = 17^\circ | 17 分 ;;
60 cm :: 60 | 60 \text{ cm} ;; 12元 :: 12 | 12 \text{元} ;; 60 miles :: 60 ;; x \in [-2,7] :: [-2,7] |
-2 \le x \le 7 | x ∈ [-2,7] ;; P(x)=x^2 :: x^2 | P(x) = x^2 | x \cdot x ;; f^{-1}(x)=2x :: 2x ;;
(x,y)=(1,2) :: (1,2) ;; \theta = \frac{\pi}{3} :: \pi/3 ;; x=1, x=-2 :: x=-2, x=1 ;; \infty :: ∞ |
+\infty ;; [2,\infty) :: [2,∞) | x ≥ 2 | x >= 2 ;; 1/2 :: ½ | 0.5 | 50% ;; 5/2 :: 2½ ;;
12345 :: 12 345 | 12 345 | 12,345 ;; x \ne 3 :: x != 3 | x ≠ 3 | x \neq 3 ;; x \le 3 :: x <= 3 |
x ≤ 3 | x \leqslant 3 ;; 37.5 :: 37.5% | 37.5\% ;; \frac{(2n)!}{n!n!} :: \binom{2n}{n} ;;
2004! :: 2004! ;; \frac{1}{2^{99}} :: 2^{-99} ;; e^{16} - 1 :: -1 + exp(16) ;;
2x+4y-3=0 :: y = -1/2*x + 3/4
"""
WRONG = r"""
120 :: \binom{10}{4} | 4! ;; \foo{3}{10} :: \foo{10}{3} | 30 ;; 61 :: 16 | 6 1 | 60, 61 | 60 or 61 |
60 \text{ or } 61 | 61, 62 | {60, 61} | 61.0001 | -61 | 61x | 6.1 | 610 | 61? | 61! | 61 million |
61 \text{ thousand} | \text{not } 61 | 61 \pm 1 | 61i | 60 < x < 62 | x \ge 61 | 61 = x | 61_7 | ? |
\text{None} | (60, 61) | \infty | 60.99999999999999999999999 | \sqrt{3721.0001} | \frac{61}{0} |
61\text{x} | 61ab | 61\pi | 61 \text{ not} | 61abc | 61?! | 7 or 61 |
61 \text{ is what the others say it must be} ;; \frac{2}{3} :: 0.667 | 0.6666666667 | 66.7\% |
\frac{3}{2} | 2:3 | 2, 3 | \frac{2}{3}x | 0.67 \approx \frac{2}{3} ;; \pi :: 3.14 |
3.14159265358979323846 | \frac{355}{113} ;; \sqrt{3} :: 1.732 | \pm\sqrt{3} | 3 | \sqrt{1}3 ;;
3^{20} \cdot 12! :: 3^{20} + 12! | 1.67 \times 10^{18} ;; 0.375 :: 0.3751 | 0.38 | 3.75 ;;
6.02e23 :: 6.02e22 | 6.02 | 6.03 \times 10^{23} | 10^{23} | 0 ;; 2.5e-19 :: 3.5e-19 | 0 | 2.5e-18 ;;
4,-9 :: 4 | 4, 9 | 4,-9,1 | 4,4,-9 | (4,-9) | 49 | x=4 ;; 3,3,5 :: 3,5 ;; 100, 200 :: 100200 ;;
2 \pm \sqrt{3} :: 2+\sqrt3 | -2 \pm \sqrt{3} | 2 \pm \sqrt{2} ;; (2, -5) :: (-5, 2) | [2,-5] |
(2,-5,0) | \{2, -5, 2\} | -5, 2 ;; [2, \infty) :: (2,\infty) | x > 2 | x \le 2 | [2, 10^9) ;;
(-3, 8] :: (-3,8) | [-3,8] | [-3,8) | -3 \le x \le 8 | -3, 8 ;;
(-\infty, 1) \cup (5, 6) :: (-\infty,1) | (-\infty,1]\cup(5,6) | (-\infty,6) ;;
\begin{pmatrix} 1 \\ 2 \end{pmatrix} :: \begin{pmatrix} 2 \\ 1 \end{pmatrix} |
\begin{pmatrix} 1 & 2 \end{pmatrix} ;; \text{Maria} :: Mario | \text{Maria or Ana} | M |
\text{not Maria} ;; \text{(D)} :: (B) | \text{(D) or (E)} | DE ;; 3021_4 :: 3021_5 | 201 | 3021 |
3020_4 ;; (a+1)(b-2) :: (a-2)(b+1) | ab-2 ;; R :: r | 2R | 1 ;; \frac{K-1}{L} :: \frac{k-1}{l} |
\frac{k-1}{L} ;; 2k+2 :: 2K+2 ;; v_{0} :: v_1 | v | v_{00} ;; \alpha :: a | \beta ;; 5.2 k :: 5.2 |
5.3k | k ;; 3 + 4i :: 4+3i | 3-4i | 7 ;; x=9 :: y=9 | x=-9 | x=9,10 | x \ge 9 ;;
2x+3y-4=0 :: 2x+3y+4=0 | 2x+3y-4 | 0 | 3x+2y=4 ;; MC=AVC :: MC=AC | AVC ;; SAC=LAC :: SMC=LMC ;;
xy=0 :: x=0 ;; 9 m :: 9 ;; np.arctan(2/3) :: \arctan(3/2) | 0.588 ;; 6 :: \text{6 or 7} | 6^2 |
\sqrt{6} | 60% | 5 million | 6万 | six ;; no :: on | not ;; yes :: no ;;
\frac{3\sqrt3}{4} :: \sqrt[3]{\frac{3}{4}} ;; 2\sqrt{10} :: \sqrt[10]{2} ;; 0 :: 2^{-300} |
10^{-50} | 0.0000000001 ;; 0.5 :: 50 | 0.50006 | x | (1,2) | \emptyset ;; 3:4 :: 4:3 | 0.75 ;;
5 :: 5? | \text{about } 5 | \approx 5.1 ;; 10\% :: 100 | 1 | 1000\% ;; 17 :: x != 17 | x >= 17 |
x <= 17 | x \not= 17 | x \ne 17 | x \neq 17 | x ≠ 17 | x ! = 17 | x =! 17 | > 17 | \ge 17 | != 17 |
x => 17 | x \not\in 17 | 17 \text{ thirds} | 17 \text{ squared} | 17 \text{ lakh} | 17 t |
17 \text{ cubed} | 17 \text{ fourths} | 17 \text{ crore} | 17 \text{ or more} | 17 \text{ k} |
17 \text{ dozens} | 17 \text{ factorial} | 17 \text{ at least} | 17 \text{ to the fourth} |
17 \text{ halves} | 17 \text{ hundredths} | 17 \text{ million dollars} | 17 \text{ less than} |
17 \text{ mod p} | 17 \text{ x} | 17 \text{ pi} | 17 \text{ twentieths} | 17 \text{ sixteenths} |
17 \text{ bn} | 17 \text{ point five} | 17 thirds | 17 squared | 17 million | 17 xy | 17 m | 17分之一 |
17以上 | 17亿 | 17 平方 | 17 \text{万} ;; [2,3] :: x \not\in [2,3] | x \notin [2,3] | x ∉ [2,3] |
x \in (2,3) ;; x \in [-2,7] :: (-2,7) | x \in (-2,7] | x \notin [-2,7] | 7 ;; P(x)=x^2 :: P(x)=x^3 |
x^3 | 2 | x ;; \infty :: -\infty | 0 ;; 1/2 :: 1½ | ¼ ;; 2 xy :: 2 ;; 5 abc :: 5 ;;
4 :: 4\sqrt(2) ;; \frac{1}{2004!} :: \frac{1}{2006!} ;; \frac{1}{2^{99}} :: \frac{1}{2^{98}} ;;
n=2, 3, 4 :: n=1, 2, 3 ;; \pm 2021 :: 2021 ;;
1 - \frac{1}{\mathrm{e}} :: 1 + \frac{1}{\mathrm{e}} ;; 3*x-1*y+13=0 :: 3x + 4y + 14=0 ;;
f(x)=0 :: \forall x>0, f(x) = 0
"""
HOSTILE = ["9^{9^{9^9}}", "2^{99999}", "100000000!", "((10^{99})^{99})", "(x+y)^{999}", "0^{-1}",
           r"\frac{" * 40 + "1" + "}" * 40, "(" * 60 + "1" + ")" * 60, r"\sqrt{" * 40, "1/0",
           r"\int_0^1 x dx", "1e999999", "\0\1", "\U0001f600" * 50, "1" * 250, "x" * 2000,
           r"\exp(\exp(\exp(99)))", "$$", "x =", r"\text{}", ",", "(,)",
           "{@a 1276915 国 {1,1-3-10});5个}"]
# factorials that end or hang a process whose sympy counts with gmpy2
MONSTERS = ["(10^{18})!", "(10^9)!", r"\left(10^{18}\right)!", "10^{18}!", "1e18!", "[9^9]!",
            "(9!)!", r"(9 \cdot 9^9)!", "(9*9*9*9*9*9*9*9*9)!", r"\frac{10^{18}}{1}!", "2^{99!}",
            "(n+10^{9})!", "{10^{18}}!", r"|(10^{18})!|", r"\binom{10^9}{10^8}", "9!^{9!}",
            r"{10^{18} \choose 5}", r"\binom{x}{99999}", r"\frac{(10^9)!}{(10^9-1)!}", "(99999)!",
            "((9)9)!", "999!^{999}"]


@pytest.mark.parametrize("text, box", [   # the last complete one, never joined
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{8} and \boxed{9", "8"), (r"\boxed{8", None),
    (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), (r"thus $\boxed 7$", "7"), (r"} \boxed{3}", "3"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{3}, 4}", r"\boxed{3}, 4"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    ("the answer is 8", None), ("", None), (r"\boxed{8}</think> I am sure.", None),      # a draft
    (r"<think>\boxed{8}</think> \boxed{9}", "9"), (r"a</think>\boxed{8}</think>\boxed{9}", "9"),
    (r"\boxed{7} <think> wait", None), (r"<think>\boxed{5} hmm", None)])     # an open thought
def test_extraction(text, box):
    assert antisd.extract_boxed(text) == box


@pytest.mark.parametrize("right, answer, boxes", [
    *((True, answer, [answer, *boxes]) for answer, boxes in table(RIGHT)),
    *((False, *row) for row in table(WRONG))])
def test_a_box_is_graded_as_its_table_says(right, answer, boxes):
    assert [box for box in boxes if correct(box, answer) != right] == []


@pytest.mark.parametrize("box", HOSTILE, ids=[repr(box[:12]) for box in HOSTILE])
def test_hostile_boxes_are_wrong_within_seconds_and_never_raise(box):
    for answer in "61", "6.02e23":                       # exact, and within a tolerance
        started = time.process_time()
        assert not correct(box, answer)
        assert not antisd.is_correct(box, answer)
        assert time.process_time() - started < 12        # the limit is five seconds


@pytest.mark.parametrize("box", MONSTERS)
def test_sympy_is_never_asked_for_a_monstrous_factorial(box, monkeypatch):
    monkeypatch.setattr(antisd, "parse", lambda *args, **options: pytest.fail("it was parsed"))
    for answer in "61", r"\frac{1}{2}", "0.5", "x=2":
        assert not correct(box, answer)


def test_sympy_counts_with_pythons_integers_and_waiting_threads_sleep():
    # the variable shows it where gmpy2 is not installed; libgomp prints what it read when loaded
    code = ("import eval, os, sympy.external.gmpy as g; print(g.GROUND_TYPES, "
            "os.environ['SYMPY_GROUND_TYPES'])")
    env = {k: v for k, v in os.environ.items() if k[:4] not in ("SYMP", "OMP_", "GOMP")}
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                           env=env | {"OMP_DISPLAY_ENV": "VERBOSE"})
    assert found.stdout.split()[-2:] == ["python", "python"]
    assert "GOMP_SPINCOUNT = '1000'" in found.stdout + found.stderr


@pytest.mark.parametrize("text", [
    "{" * 130_000, "x = " * 30_000 + r"\boxed{5}", r"\boxed{" * 18_000, r"\text{" * 20_000,
    *(r"\boxed{" + box + "}" for box in (
        "1," * 149, " " * 290, r"\text{a}" * 41, "1" + r"\ " * 140, "^{\\circ " * 36 + "}" * 36,
        "[(" * 140, "3!" + "!" * 290))],
    ids=lambda text: repr(text[:16]))
def test_a_degenerate_response_costs_no_time(text):
    started = time.process_time()
    assert not antisd.is_correct(text, "2 cups, 3 thousand")
    assert time.process_time() - started < 5


def test_integers_never_reach_the_parser(monkeypatch):
    monkeypatch.setattr(antisd, "parse", None)
    assert correct("061", "61") and not correct("62", "61") and correct("000", "0")
    assert correct("61".zfill(300), "61") and not correct("61".zfill(301), "61")
    long = "12345678901" * 500                           # Python converts no more than 4,300 digits
    assert correct(long.zfill(10_000), long) and not correct("1" + long[1:-1] + "2", long)


@pytest.mark.parametrize("name", ["parse", "verify"])
def test_errors_of_the_libraries_are_no_answer_and_ours_are_a_traceback(name, monkeypatch):
    def raising(error):
        def fail(*args, **options):
            raise error
        return fail

    for error in (ZeroDivisionError(), OverflowError(), sympy.SympifyError("x"), RecursionError(),
                  antisd.TimeoutException(), ValueError()):
        monkeypatch.setattr(antisd, name, raising(error))
        assert not correct("x + y + 1", "1 + y + x")
    for error in NameError("x"), KeyError("x"), AttributeError("x"), TypeError("x"):
        monkeypatch.setattr(antisd, name, raising(error))
        with pytest.raises(type(error)):
            correct("x + y + 1", "1 + y + x")
    monkeypatch.setattr(antisd, "same_value", raising(ZeroDivisionError()))      # a fork's own
    with pytest.raises(ZeroDivisionError):
        correct("x + y", "y + x")


def test_the_time_limit_counts_our_own_seconds_and_other_threads_grade_without():
    handler = signal.getsignal(signal.SIGPROF)
    end = time.monotonic() + 20
    with antisd.cpu_limit(0.2):
        time.sleep(0.5)                                  # a busy machine changes no reward
        for _ in range(2):                               # a library may swallow the first one
            with pytest.raises(antisd.TimeoutException):
                while time.monotonic() < end:
                    pass
    assert not any(signal.getitimer(signal.ITIMER_PROF))
    assert signal.getsignal(signal.SIGPROF) == handler
    found = []
    thread = threading.Thread(target=lambda: found.append(correct(r"\frac{14}{8}", "7/4")))
    thread.start()
    thread.join()
    assert found == [True]


@real_data
def test_development_cases():
    rows = read(DATA / "grading_dev.jsonl")
    assert [row["why"] for row in rows
            if antisd.is_correct(row["response"], row["answer"]) != row["expect"]] == []


# --- Data ----------------------------------------------------------------------------------------

def user(content):
    return {"role": "user", "content": content}


ASSISTANT = {"role": "assistant", "content": "a"}
WRAPPED = ("Solve the following math problem step by step. The last line of your response should "
           "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
           "problem.\n\nWhat is\n\n$x$?\n\nRemember to put your answer on its own line after "
           '"Answer:".')
GSM8K_OF_VERL = "What?" + ' Let\'s think step by step and output the final answer after "####".'
QWEN = "What?\nPlease reason step by step, and put your final answer within \\boxed{}."
SCHEMAS = {   # rows -> (problem, answer, solution)
    "aime24": ([{"id": 60, "problem": " p ", "solution": "s", "answer": " 033 ", "url": "u"}],
               [("p", "033", "s")]),
    "final_answer": ([{"question": "p", "final_answer": "3", "solution": ""}], [("p", "3", None)]),
    "gsm8k": ([{"question": "q", "answer": "He has 3*4=<<3*4=12>>12\nso 1,200.\n#### 1,200"}],
              [("q", "1200", "He has 3*4=12\nso 1,200.\nThe answer is \\boxed{1,200}.")]),
    "dapo processed": ([{"prompt": "p", "solution": "34", "data_source": "math_dapo",
                         "reward_model": {"ground_truth": "34"}}], [("p", "34", None)]),
    "raw dapo": ([{"prompt": [user(WRAPPED)], "extra_info": {"index": str(i)},
                   "reward_model": {"ground_truth": "34", "style": "rule"}} for i in range(3)],
                 [("What is\n\n$x$?", "34", None)]),
    "verl's gsm8k": ([{"prompt": [user(GSM8K_OF_VERL)], "reward_model": {"ground_truth": "72"}}],
                     [("What?", "72", None)]),
    "another box": ([{"problem": QWEN, "answer": "3"}], [("What?", "3", None)]),
    "not a wrapper": ([{"problem": "Let's think step by step of 3.", "answer": "3"}],
                      [("Let's think step by step of 3.", "3", None)]),
    "chat": ([{"prompt": [{"role": "system", "content": "be good"}, user("q"), ASSISTANT, user("p"),
                          ASSISTANT], "Answer": "3"}], [("p", "3", None)]),
    "merged": ([{"problem": p, "answer": a} for p, a in ["p1", "q2", "p3", "r4"]],
               [("p", "1", None), ("q", "2", None), ("r", "4", None)]),
    "lists": ([{"question": "p", "final_answer": ["2", "3"], "solution": ["half"]}],
              [("p", "2, 3", "half")]),
    "a list as text": ([{"prompt": "p", "reward_model": {"ground_truth": '["7"]'}}],
                       [("p", "7", None)]),
    "an interval": ([{"problem": "p", "answer": "[1, 2)"}], [("p", "[1, 2)", None)]),
    "parts": ([{"prompt": [user([{"type": "text", "text": "p"}])], "answer": 5}],
              [("p", "5", None)]),
    "no answer for a box": ([{"problem": a, "answer": a} for a in (
        "proof", "notfound", "Not found", '{"inputs": ["3\\n"], "outputs": ["6\\n"]}',
        '[{"in": 1}]', '["assert f(1) == 2"]', "7")], [("7", "7", None)]),
    "lost backslashes": (
        [{"problem": "3\times 4 \neq 5 for $\beta$\nand\theta", "answer": "\frac13",
          "solution": "a\ntext\tof\nlines, eq 1, \b \f and \right)"}],
        [("3\\times 4 \\neq 5 for $\\beta$\nand\\theta", "\\frac13",
          "a\ntext\tof\nlines, eq 1, \b \f and \\right)")]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_loads_from_every_format(schema, suffix, tmp_path):
    rows, expected = SCHEMAS[schema]
    path = write(tmp_path / f"data{suffix}", rows)
    if suffix == ".jsonl":                               # with a byte order mark
        Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    problems = antisd.load_problems(path)
    assert [(p["problem"], p["answer"], p["solution"]) for p in problems] == expected
    assert len({p["id"] for p in problems}) == len(problems)


def test_hub_style_data_sets_take_config_and_split_as_arguments_or_in_their_name(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: test, path: b.jsonl}\n- config_name: cn\n  data_files: c.jsonl\n---\n")
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [
            {"problem": name + end, "answer": "1"} for end in ("", "", "2")])
    for split, name, found in ("train", "en", "a"), ("test", "en", "b"), ("train", "cn", "c"):
        for problems in (antisd.load_problems(str(tmp_path), split, config=name),
                         antisd.load_problems(f"{tmp_path}:{name}:{split}", "x", config="y")):
            assert [p["problem"] for p in problems] == [found, found + "2"]
    assert antisd.load_problems(f"{tmp_path}:en")[0]["problem"] == "b"       # test, if there is one
    refuse(lambda: antisd.load_problems(str(tmp_path), "train"), "config", str(tmp_path))
    path = write(tmp_path / "d.jsonl", [{"problem": p, "answer": "1"} for p in "aabbcc"])
    assert [p["problem"] for p in antisd.load_problems(path, limit=2)] == ["a", "b"]


def test_what_is_left_out_is_said_once_and_by_one_rank(tmp_path, monkeypatch, capsys):
    chat = [{"role": "system", "content": "s"}, user("p")]
    path = write(tmp_path / "d.jsonl", [{"prompt": turns, "answer": answer} for turns, answer in (
        (chat, "3"), ([user("q")], "proof"), (chat[1:], "4"))])
    [problem] = antisd.load_problems(path)
    [line] = capsys.readouterr().out.splitlines()
    assert "1 rows without" in line and "1 chats" in line and problem["answer"] == "3"
    monkeypatch.setenv("RANK", "1")
    antisd.load_problems(path)
    assert capsys.readouterr().out == ""
    antisd.load_problems(write(tmp_path / "e.jsonl", [{"problem": "p", "answer": "3"}]))
    assert capsys.readouterr().out == ""


def test_only_long_reading_shows_a_sign_of_life(tmp_path, monkeypatch, capsys):
    path, bar = write(tmp_path / "d.jsonl", [ROW, ROW]), antisd.tqdm
    antisd.load_problems(path)
    assert path not in capsys.readouterr().err
    monkeypatch.setattr(antisd, "tqdm", lambda *args, delay, **options: bar(
        *args, **options | {"mininterval": 0, "miniters": 1}))
    antisd.load_problems(path)
    assert f"{path}: 2it" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, fragment", [   # x/: the folder is loaded, as from the hub
    ("empty.jsonl", "", "empty.jsonl"), ("half.jsonl", '{"problem": "p"', "line 1"),
    ("half.json", '{"problem": ', "half.json"), ("number.json", "5", "number.json"),
    ("bad.parquet", "PAR1junk", "bad.parquet"), ("empty.parquet", "", "empty.parquet"),
    ("latin1.jsonl", b'{"problem": "caf\xe9"}', "line 1"), ("deep.json", "[" * 10**6, "deep.json"),
    ("s/s.py", "x = 1", "scripts"), ("list.jsonl", '{"problem": "a", "answer": "1"}\n[1]', "row 2"),
    ("b/b.jsonl.gz", b"\x1f\x8bjunk", "ended"), ("a/a.jsonl", '{"x":', "JSON parse error"),
    ("columns.jsonl", '{"text": "p", "label": "1"}', "text, label"),
    ("no_truth.jsonl", '{"problem": "p", "reward_model": "rule"}', "reward_model"),
    ("nan.jsonl", '{"problem": "b", "answer": NaN}', "row 1"),
    ("gsm8k.jsonl", '{"question": "b", "answer": "1\\n#### "}', "row 1"),
    ("dict.jsonl", '{"problem": "b", "answer": {"x": 1}}', "row 1"),
    ("system.jsonl", '{"prompt": [{"role": "system", "content": "b"}], "answer": "1"}', "row 1"),
    ("proofs.jsonl", '{"problem": "b", "answer": "proof"}', "no problem with an answer")])
def test_data_that_cannot_be_read_costs_one_line_that_says_why(name, content, fragment, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    path = str(file.parent if "/" in name else file)
    refuse(lambda: antisd.load_problems(path), path, fragment)


@real_data
@pytest.mark.parametrize("name, count", [
    ("aime24", 30), ("aime25", 30), ("aime26", 30), ("aime24_verl_raw_dup", 30), ("math500", 500),
    ("hmmt_feb_2025", 30), ("minerva_math", 272), ("dapo_math_sample", 500),
    ("gsm8k_train_small", 500)])
def test_real_files_load_whole_and_a_reference_is_right_in_a_box_but_not_its_neighbour(name, count):
    problems = antisd.load_problems(str(DATA / f"{name}.jsonl"))
    answers = [p["answer"] for p in problems]
    assert len(problems) == count and [a for a in answers if not correct(a, a)] == []
    assert not any("Answer:" in p["problem"] for p in problems)
    short = [a for a in dict.fromkeys(answers) if len(a) < 12 and a.isdigit()][:40]
    assert [pair for pair in zip(short, short[1:]) if correct(*pair)] == []


def test_next_problems_cover_every_problem_once_an_epoch_in_a_reproducible_order(monkeypatch):
    problems = list(range(10))
    stream = [p for position in range(0, 40, 4)
              for p in antisd.next_problems(problems, position, 4, seed=3)]
    epochs = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == problems for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4             # shuffled anew each time
    assert antisd.next_problems(problems, 8, 25, seed=3) == stream[8:33]    # whatever the count
    assert antisd.next_problems(problems, 0, 10, seed=4) != epochs[0]
    drawn, draw = [], antisd.torch.randperm
    monkeypatch.setattr(antisd.torch, "randperm", lambda *args, **options: (
        drawn.append(args), draw(*args, **options))[1])
    antisd.next_problems(problems, 8, 25, seed=3)
    assert len(drawn) == 4                               # one shuffle an epoch, not one a problem


# --- The source keeps its promises ---------------------------------------------------------------

def test_one_log_softmax_one_template_and_every_flag_is_read():
    used = collections.Counter(getattr(node, "attr", getattr(node, "id", None))
                               for node in ast.walk(ast.parse(SOURCE)))      # no comments
    assert used["log_softmax"] == 1 and used["logsumexp"] + used["cross_entropy"] == 0
    assert used["apply_chat_template"] == 1
    for field in dataclasses.fields(antisd.Config):
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", SOURCE), f"--{field.name} is dead"


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
