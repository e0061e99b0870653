"""What antisd.py must prove: `python -m pytest -q`, about a minute, no network, no GPU needed.

Models here are real Hugging Face models, only tiny and random, with a word-level tokenizer that is
built below. Wherever possible a test compares with an independent implementation (autograd over an
enumerated vocabulary, whole logits, one row at a time, one process) instead of stored numbers.
Two ranks are two real processes: this file starts itself under torchrun, see "Two ranks".
"""
import ast
import dataclasses
import html.parser
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.dom.minidom
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")             # nothing here may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # the claims are exact on the CPU

import datasets
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoConfig, AutoModelForCausalLM, GenerationConfig,
                          PreTrainedTokenizerFast)
from transformers.cache_utils import DynamicLayer

import antisd
import eval as evaluation

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "antisd.py").read_text()
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# Tiny models, a tokenizer, a data set
# ------------------------------------------------------------------------------------------------

# Words that are one id but read as two: text that holds them does not encode back to the same ids.
# Many of them carry a box, so that a random model earns a reward now and then.
PHRASES = [f"{word} \\boxed{{{n}}}" for word in ("so", "thus", "hence", "then") for n in (0, 1)]
TEMPLATE = ("{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}"
            "{% if add_generation_prompt and think %}<think> {% endif %}")


def make_tokenizer():
    """Word level; the pad token is the end token, which also stands inside every prompt."""
    text = antisd.teacher_messages("a b c", "x y", True)[0]["content"] + " incorrect."
    words = ["a", "<unk>", "<end>", "<user>", "<assistant>", "<think>", "</think>", "\\boxed{0}",
             "\\boxed{1}", "The answer is", *PHRASES, *text.split(), *(f"n{i}" for i in range(40))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>",
                                        pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
V, END = len(TOKENIZER), TOKENIZER.eos_token_id
ARCHITECTURES = {
    "qwen3": dict(head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                      decoder_sparse_step=1, mlp_only_layers=[]),
    "olmo3": dict(num_hidden_layers=4, sliding_window=8),
    "llama": {},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=512),
}


def tiny(kind="qwen3", seed=0, **settings):
    """A random model whose logits spread by a nat or two, so that its choices are not arbitrary."""
    common = dict(vocab_size=V, eos_token_id=END, bos_token_id=None, pad_token_id=END,
                  initializer_range=0.25)
    if kind != "gpt2":
        common |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **common | ARCHITECTURES[kind] | settings))


def save(model, folder):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
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
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session", autouse=True)
def one_process():
    torch.set_num_threads(1)
    antisd.setup()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def signals():
    """train() installs handlers of its own."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a saved model per architecture and train.jsonl, shared by all tests."""
    folder = tmp_path_factory.mktemp("root")
    for kind in ARCHITECTURES:
        save(tiny(kind), folder / kind)
    write(folder / "train.jsonl", [
        {"problem": f"a n{i} b" + " c" * (i % 4), "answer": str(i % 2),
         "solution": f"n{i} then \\boxed{{{i % 2}}}" if i % 3 else None} for i in range(7)])
    return folder


def config(root, **flags):
    """Small enough for a test; everything else is the default."""
    small = dict(model=str(root / "qwen3"), dataset=str(root / "train.jsonl"), max_tokens=12,
                 problems_per_step=4, group_size=2, steps=1, lr=1e-3, save_every=0)
    return antisd.Config(**small | flags)


def run(root, output, **flags):
    """Trains in this process; returns the metrics."""
    antisd.train(config(root, output=str(output), **flags))
    return read(Path(output) / "metrics.jsonl")


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def brute_force(model, prompt, response, temperature=1.0):
    """log pi and entropy of a response's tokens: one row, no padding, whole logits, float64."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].double()
    logps = (logits / temperature).log_softmax(-1)
    return logps[range(len(response)), response], -(logps.exp() * logps).sum(-1)


def words(ids):
    return TOKENIZER.decode(ids)


# ------------------------------------------------------------------------------------------------
# The method: phi, the arms, advantages
# ------------------------------------------------------------------------------------------------

LOG2 = math.log(2)


def enumerated(seed=0, size=7):
    """A student's logits with gradient, log pi_S, log pi_T and u over a whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    z, w = torch.randn(2, size, generator=generator, dtype=torch.float64) * 2
    z.requires_grad_()
    logp, teacher = z.log_softmax(-1), w.log_softmax(-1)
    return z, logp, teacher, (teacher - logp).detach()


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def jsd(p, q):
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


def ascent(z, logp, u, method):
    """E_{v ~ pi_S}[A_v grad log pi_S(v)] through the trainer's own loss, A_seq = 0, lambda = 1."""
    advantages = antisd.token_advantages(torch.zeros(1), u[None], 1.0, method)
    probability = logp.detach().exp()                    # the mask may hold weights
    loss = antisd.policy_loss(logp[None], logp[None], advantages, probability[None], 1)
    return -torch.autograd.grad(loss, z, retain_graph=True)[0]


@pytest.mark.parametrize("method, divergence, sign", [
    ("antisd", jsd, +1), ("sd_jsd", jsd, -1), ("antisd_kl", kl, +1), ("sd", kl, -1)])
def test_policy_gradient_is_the_exact_gradient_of_the_divergence(method, divergence, sign):
    for seed in range(5):
        z, logp, teacher, u = enumerated(seed)
        exact = torch.autograd.grad(divergence(logp, teacher), z, retain_graph=True)[0]
        torch.testing.assert_close(ascent(z, logp, u, method), sign * exact, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method, divergence, sign", [("antisd", jsd, +1), ("sd", kl, -1)])
def test_a_small_antisd_step_raises_jsd_and_an_sd_step_lowers_kl(method, divergence, sign):
    for seed in range(5):
        z, logp, teacher, u = enumerated(seed)
        moved = (z + 1e-3 * ascent(z, logp, u, method)).detach().log_softmax(-1)
        assert sign * (divergence(moved, teacher) - divergence(logp.detach(), teacher)) > 0


def test_phi_table_slope_and_bound():
    u = torch.tensor([-20.0, -5, -1, 0, 1, 5, 20], dtype=torch.float64)
    table = torch.tensor([-0.3466, -0.3432, -0.1899, 0, 0.3101, 2.157, 9.653], dtype=torch.float64)
    torch.testing.assert_close(antisd.phi(u), table, rtol=0, atol=5e-4)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert antisd.phi(zero).item() == 0
    assert torch.autograd.grad(antisd.phi(zero).sum(), zero)[0].item() == pytest.approx(0.25)
    line = antisd.phi(torch.linspace(-30, 30, 601, dtype=torch.float64))
    assert (line.diff() > 0).all() and line.min() >= -LOG2 / 2


def test_phi_does_not_overflow():
    for dtype in (torch.float32, torch.bfloat16):
        values = antisd.phi(torch.tensor([-1e4, -100, 100, 1e4], dtype=dtype)).float()
        expected = torch.tensor([-LOG2 / 2, -LOG2 / 2, 50 - LOG2 / 2, 5000 - LOG2 / 2])
        torch.testing.assert_close(values, expected, rtol=8e-3, atol=1e-3)


def test_group_advantages_by_hand():
    """Consecutive groups, unbiased std: a lone success of four has (1 - 1/4) / (1/2) = 1.5."""
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    r = math.sqrt(3) / 2
    expected = torch.tensor([1.5, -.5, -.5, -.5, -1.5, .5, .5, .5, r, r, -r, -r])
    torch.testing.assert_close(antisd.group_advantages(rewards, 4), expected, rtol=1e-5, atol=0)


def test_an_equal_group_has_exactly_zero_advantage_and_keeps_the_antisd_term():
    rewards = torch.tensor([0.1] * 3 + [0.7] * 3 + [1.0] * 3 + [0.0] * 3)   # 0.1's mean is inexact
    a_seq = antisd.group_advantages(rewards, 3)
    assert a_seq.tolist() == [0.0] * 12
    u = torch.randn(12, 5)
    assert torch.equal(antisd.token_advantages(a_seq, u, 0.5), -0.5 * antisd.phi(u))


@pytest.mark.parametrize("method, delta", [
    ("grpo", lambda u: 0.0),
    ("sd", lambda u: u),
    ("sd_jsd", lambda u: (math.log(1 + math.exp(u)) - LOG2) / 2),
    ("antisd", lambda u: -(math.log(1 + math.exp(u)) - LOG2) / 2),
    ("antisd_kl", lambda u: -u),
    ("no_teacher", lambda u: -(math.log(1 + math.exp(u)) - LOG2) / 2)])
def test_every_arm_by_hand(method, delta):
    u, a_seq = torch.tensor([[-2.0, 0, 3], [1, -1, 4]]), torch.tensor([2.0, -1.5])
    for compose, mix in ("add", lambda a, d: a + 0.3 * d), ("mul", lambda a, d: a * (1 + 0.3 * d)):
        expected = [[mix(a, delta(x)) for x in row] for a, row in zip(a_seq.tolist(), u.tolist())]
        found = antisd.token_advantages(a_seq, u, 0.3, method, compose)
        torch.testing.assert_close(found, torch.tensor(expected))


def test_the_arms_are_these_six_and_the_gate_is_antisds_alone():
    assert list(antisd.METHODS) == ["grpo", "sd", "sd_jsd", "antisd", "antisd_kl", "no_teacher"]
    assert set(antisd.GATED) == {"antisd", "antisd_kl", "no_teacher"}


def test_advantages_carry_no_gradient_and_inputs_stay_untouched():
    u, a_seq = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    before = u.detach().clone()
    for method, compose in itertools.product(antisd.METHODS, ("add", "mul")):
        assert not antisd.token_advantages(a_seq, u, 0.5, method, compose).requires_grad
    assert torch.equal(u, before)


# ------------------------------------------------------------------------------------------------
# The entropy gate
# ------------------------------------------------------------------------------------------------

# H, the g that comes back. W = 3, tau_down = 0.5, H_warm = median(4, 1, 2) = 2; shut below 1.
SCRIPT = [(4.0, 0), (1.0, 0), (2.0, 0),                  # warm-up, whatever H is
          (1.9, 1), (1.0, 1), (0.999, 0),                # starts open; equality does not shut
          (1.0, 0), (1.999, 0), (2.0, 1),                # stays shut in between; equality reopens
          (1.2, 1), (0.0, 0), (5.0, 1)]


def test_gate_follows_the_script_with_equality_at_both_thresholds():
    gate = antisd.EntropyGate(warmup_steps=3, tau_down=0.5)
    assert [gate.update(h) for h, _ in SCRIPT] == [g for _, g in SCRIPT]
    assert gate.h_warm == 2.0


def test_gate_state_survives_json_at_any_step():
    for cut in range(len(SCRIPT)):
        first, second = antisd.EntropyGate(3, 0.5), antisd.EntropyGate(3, 0.5)
        for h, _ in SCRIPT[:cut]:
            first.update(h)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.h_warm == first.h_warm
        assert [second.update(h) for h, _ in SCRIPT[cut:]] == [g for _, g in SCRIPT[cut:]]


def test_h_warm_is_the_median_of_the_steps_and_exists_after_the_last_of_them():
    gate = antisd.EntropyGate()
    for h in (9.0, 1.0, 2.0, 8.0):
        assert gate.update(h) == 0 and gate.h_warm is None
    assert gate.update(3.0) == 0 and gate.h_warm == 3.0
    assert gate.update(0.93 * 3.0) == 1 and gate.update(2.78) == 0    # the default ratio
    even = antisd.EntropyGate(2)
    even.update(1.0), even.update(4.0)
    assert even.h_warm == 2.5


def test_tau_down_zero_never_shuts():
    gate = antisd.EntropyGate(1, 0)
    assert [gate.update(h) for h in (1.0, 0.0, 1e-9, 0.0)] == [0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, ratio, counts", [
    (+2.0, 1.3, 1.2), (+2.0, 0.5, None), (-2.0, 0.5, 0.8), (-2.0, 1.3, None), (+2.0, 1.1, None)])
def test_clip_binds_on_the_side_that_would_overshoot(advantage, ratio, counts):
    """`counts` is the clipped ratio that stays in the loss, without gradient; None: not clipped."""
    logp = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    loss = antisd.policy_loss(logp, torch.tensor([[-1.0]]), torch.tensor([[advantage]]),
                              torch.ones(1, 1), 4)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage * (counts or ratio) / 4)
    assert logp.grad.item() == pytest.approx(0 if counts else -advantage * ratio / 4)


def test_loss_masks_weighs_and_divides_by_the_count_it_is_given():
    logp = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 0], [0.5, 0, 0]])
    advantages = torch.tensor([[1.0, 2, 99], [4, 99, 99]])
    loss = antisd.policy_loss(logp, logp, advantages, mask, 10)
    loss.backward()
    assert loss.item() == pytest.approx(-(1 + 2 + 2) / 10)
    torch.testing.assert_close(logp.grad, -advantages * mask / 10)    # ratio 1: REINFORCE


# ------------------------------------------------------------------------------------------------
# Log-probabilities and entropies
# ------------------------------------------------------------------------------------------------


def head_and_hidden(rows=11, dim=6, size=9):
    torch.manual_seed(0)
    head = torch.nn.Linear(dim, size, bias=False)
    return head, torch.randn(rows, dim, requires_grad=True), torch.randint(size, (rows,))


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 11, 12, 1024])
def test_log_probs_entropies_and_gradients_equal_brute_force_for_any_chunk(chunk):
    head, hidden, targets = head_and_hidden()
    weight = torch.randn(len(targets))
    found = []
    for way in "chunked", "whole":
        if way == "chunked":
            logp, entropy = antisd.token_logprobs(hidden, head, targets, 0.7, chunk)
        else:
            logps = (head(hidden) / 0.7).log_softmax(-1)
            logp, entropy = logps[range(11), targets], -(logps.exp() * logps).sum(-1)
        gradients = torch.autograd.grad((logp * weight).sum(), [hidden, head.weight])
        found.append([logp, entropy.detach(), *gradients])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs)


def test_no_gradient_flows_through_the_entropy():
    head, hidden, targets = head_and_hidden()
    logp, entropy = antisd.token_logprobs(hidden, head, targets)
    assert logp.requires_grad and not entropy.requires_grad


def test_entropy_of_certain_and_of_uniform_distributions():
    head = torch.nn.Linear(1, 8, bias=False)
    torch.nn.init.zeros_(head.weight)
    logp, entropy = antisd.token_logprobs(torch.ones(1, 1), head, torch.tensor([3]))
    assert entropy.item() == pytest.approx(math.log(8)) == -logp.item()
    for rest in 0.0, -math.inf:                          # 0 log 0 is 0, not NaN
        head.weight.data[:] = rest
        head.weight.data[3] = 1e4
        logp, entropy = antisd.token_logprobs(torch.ones(1, 1), head, torch.tensor([3]))
        assert entropy.item() == 0 and logp.item() == 0


def test_log_softmax_runs_in_float32_on_bfloat16_logits():
    head, hidden, targets = head_and_hidden(64, 16, 500)
    head, hidden = head.bfloat16(), hidden.bfloat16()
    logp, _ = antisd.token_logprobs(hidden, head, targets)
    exact = head(hidden).double().log_softmax(-1)[range(64), targets]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact.float(), rtol=0, atol=1e-5)


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_no_more_than_one_chunk_of_logits_is_ever_held():
    """Not in the forward, not for the backward: the largest tensor saved is the input itself."""
    head, hidden, targets = head_and_hidden(40, 6, 100)
    calls, saved = [], []
    head.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x,
                                                  lambda x: x):
        logp, _ = antisd.token_logprobs(hidden, head, targets, chunk=8)
    assert calls == [8] * 5
    assert max(saved, default=0) < 8 * 100
    with Operators() as operators:
        logp.sum().backward()
    assert calls == [8] * 10                             # recomputed, again chunk by chunk
    # but for the entropy, which backward does not need
    assert "aten._log_softmax.default" in operators.seen
    assert "aten.clamp_min.default" not in operators.seen


def test_pack_marks_exactly_the_response_tokens():
    ids, predicts = antisd.pack([[5, 6, 7], [8]], [[1, 2], [3, 4, END]], CPU)
    assert ids.tolist() == [[5, 6, 7, 1, 2], [8, 3, 4, END, 0]]
    assert [ids[i, 1:][predicts[i]].tolist() for i in (0, 1)] == [[1, 2], [3, 4, END]]
    ids, predicts = antisd.pack([], [], CPU)             # an idle rank still runs a forward
    assert len(ids) == 1 and not predicts.any()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_do_not_depend_on_padding_or_micro_batches(kind):
    """Rows of unequal length, with the pad = end token and id 0 inside prompts and responses."""
    model = tiny(kind)
    policy = antisd.Policy(model)
    prompts = [[END, 0, 5], [7] * 20, [0, END], [9, 8, 7, 6]]
    responses = [[4, END, 0, 11, END], [3], [END], list(range(20, 44))]
    for budget in (1, 40, 10**6):
        logp, entropy = antisd.score(policy, prompts, responses, budget, 0.7)
        assert logp.shape == (4, 24)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            n = len(response)
            exact = brute_force(model, prompt, response, 0.7)
            torch.testing.assert_close(logp[i, :n].double(), exact[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(entropy[i, :n].double(), exact[1], rtol=1e-4, atol=1e-4)
            assert not logp[i, n:].any() and not entropy[i, n:].any()


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)),
    ("llama", dict(attention_dropout=0.3))])
def test_dropout_is_off_in_train_mode_too(kind, settings):
    policy = antisd.Policy(tiny(kind, **settings))
    rows = antisd.pack([PROMPTS[1]], [list(range(20, 40))], CPU)
    torch.testing.assert_close(policy.train()(*rows)[0], policy.eval()(*rows)[0])


HEADS = [[9] * 300 + [k, 3] for k in (5, 6, 7)]         # what the rows of a group share


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_shared_head_is_read_once_and_changes_no_score(kind, monkeypatch):
    """Two groups of three, with the same solution each but other verdicts, and a row of its own."""
    policy = antisd.Policy(tiny(kind, max_position_embeddings=512))
    if kind == "olmo3":                                  # the head is longer than its window
        assert policy.model.config.sliding_window < 300
    prompts = HEADS + [[4, 8, 3]] + [[11] + head for head in HEADS]
    responses = [[4, END, 0, 11, END], [3], [END], list(range(20, 44)), [5, 6], [7] * 9, [END]]
    read, forward = [], policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, *rest, **more: (
        read.append(ids.numel()), forward(ids, *rest, **more))[1])
    logp, entropy = antisd.score(policy.train(), prompts, responses, 10**6, 0.7)
    assert sum(read) < 1.3 * (300 + 301 + 24 + 70)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = policy(*antisd.pack([prompt], [response], CPU), 0.7)
        torch.testing.assert_close(logp[i, :len(response)], alone[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy[i, :len(response)], alone[1][0], rtol=1e-4, atol=1e-4)


def test_heads_are_shared_only_where_that_saves_work():
    assert antisd.shared_heads(HEADS, [[1]] * 3) == [([9] * 300, [0, 1, 2]), ([], [])]
    assert antisd.shared_heads(HEADS[:2], [[1]] * 2) == [([], [0, 1])]       # saves 300 tokens
    assert antisd.shared_heads(HEADS, [[1]] * 2 + [[1] * 1201]) == [([], [0, 1, 2])]
    assert antisd.shared_heads(HEADS, [[1]] * 2 + [[1] * 1200])[0][0] == [9] * 300
    other = [[9] * 100 + [8] * 300] * 3                  # begins alike, but for a quarter only
    assert [rows for _, rows in antisd.shared_heads(HEADS + other, [[1]] * 6)] == [
        [3, 4, 5], [0, 1, 2], []]
    twins = [[5] * 400] * 3                              # the last token is never part of a head
    assert antisd.shared_heads(twins, [[1]] * 3)[0] == ([5] * 399, [0, 1, 2])


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 30, 7, 7, 90, 1, 12, 30]
    batches = antisd.micro_batches(lengths, 60)
    assert sorted(sum(batches, [])) == list(range(8))
    assert [4] in batches                                # beyond the budget: alone
    assert all(len(b) * max(lengths[i] for i in b) <= 60 for b in batches if b != [4])
    assert [sorted(b) for b in batches] == [[4], [1, 7], [6], [0, 2, 3], [5]]


def test_at_most_a_tenth_is_padding_on_long_tails():
    lengths = [int(20 * 1.02 ** k) for k in range(200)]
    batches = antisd.micro_batches(lengths, 16384)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded >= 0.9
    assert len(batches) < 30


def test_memory_estimate_against_what_is_there(root):
    """Parameters, cache and state in bytes against real tensors; a bound for the activations."""
    for kind in ("qwen3", "llama"):
        model = tiny(kind)
        c, count = model.config, sum(p.numel() for p in model.parameters())
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: (kept.append((x.data_ptr(), x.numel() * x.element_size())), x)[1],
                lambda x: x):
            model.base_model(input_ids=torch.zeros(1, 256, dtype=torch.long), use_cache=False)
        cache = antisd.DynamicCache(config=c)
        model(input_ids=torch.zeros(3, 11, dtype=torch.long), past_key_values=cache)
        need = antisd.memory_estimate(c, count, 2, 3, 4, 7, 256, width=4)
        held = sum(k.nbytes + v.nbytes for k, v, *_ in cache)
        assert need["cache"] * 2**30 == pytest.approx(held + 3 * 32 * 4 * c.vocab_size)
        assert need["state"] * 2**30 == 8 * count and need["weights"] * 2**30 == 4 * count
        owned = sum(dict(kept).values()) - 4 * count
        assert 0.7 * owned < need["activations"] * 2**30 < 1.5 * owned
        deep = tiny(kind).config
        deep.num_hidden_layers = 8
        for world, sharded, whole in ((2, False, True), (1, False, False), (2, True, False)):
            held = antisd.memory_estimate(deep, 10**9, world, 3, 4, 7, 256, False, sharded)
            assert (held["gradients"] * 2**30 == 4 * 10**9) == whole     # until they are reduced
        training = sum(need[k] for k in ("layers", "gradients", "activations", "logits"))
        assert need["peak"] == need["state"] + max(need["weights"] + need["cache"], training)
        leaner = antisd.memory_estimate(c, count, 2, 3, 4, 7, 256, True, True, width=4)
        assert leaner["activations"] < need["activations"] and leaner["weights"] <= need["weights"]


# ------------------------------------------------------------------------------------------------
# Rollouts
# ------------------------------------------------------------------------------------------------

PROMPTS = [[3, 5, 8], [3, 9, 12, 14, 6, 7, 30, 31, 8, 40, 41], [0, END, 21, 22, 8], [17, 8]]


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


def ids_of(drawn):
    return [ids for ids, _ in drawn]


def spread_ends(references, stride):
    """Two end ids with which one row stops before the stride, one after it, and one never."""
    for ends in itertools.combinations(sorted(set(sum(references, []))), 2):
        lengths = [len(cut(row, ends)) for row in references]
        stopped = [n for n, row in zip(lengths, references) if set(row[:n]) & set(ends)]
        both = all(any(row[n - 1] == end for n, row in zip(lengths, references)) for end in ends)
        if both and len(stopped) < 4 and min(stopped) < stride < max(stopped):
            return list(ends), lengths
    raise AssertionError("no such ids: choose another seed")


@pytest.mark.parametrize("kind, seed", [("qwen3", 0), ("gpt2", 0), ("olmo3", 0)])
def test_greedy_rollouts_equal_a_step_by_step_argmax(kind, seed):
    """Gradient checkpointing on, in train mode, left padding, learned positions (GPT-2), a sliding
    window (Olmo-3), two end ids, rows that stop before and after the cache is cut, or never."""
    model = tiny(kind, seed)
    model.eval()
    references = [argmax_decode(model, prompt, 20) for prompt in PROMPTS]
    ends, lengths = spread_ends(references, stride=6)
    model.generation_config.eos_token_id = ends
    policy = antisd.Policy(model)
    assert policy.eos_ids == ends
    model.activation_checkpointing_enable({"use_reentrant": False})
    expected = [cut(row, ends) for row in references for _ in range(2)]
    for rollout_batch in (0, 2, 5):
        policy.train()
        found = ids_of(antisd.sample(policy, PROMPTS, 2, 20, 0, rollout_batch=rollout_batch,
                                     stride=6))
        assert found == expected
    n = min(lengths)                                     # an end token may be the last one allowed
    assert ids_of(antisd.sample(policy, PROMPTS, 2, n, 0, stride=6)) == [r[:n] for r in expected]


def test_a_roomy_cache_holds_what_a_dynamic_one_does_and_copies_it_rarely():
    """More heads than tokens, rows repeated and selected, room used up twice."""
    ours, theirs, moved = antisd.RoomyLayer(), DynamicLayer(), 0
    torch.manual_seed(0)
    with torch.no_grad():
        for step in range(80):
            rows, length = (3, 2) if step == 0 else (len(ours.keys), 1)
            new = torch.randn(2, rows, 8, length, 4).unbind()
            before = ours.keys.data_ptr() if step else 0
            for mine, exact in zip(ours.update(*new), theirs.update(*new)):
                assert torch.equal(mine, exact)
            moved += before != ours.keys.data_ptr()
            for layer in (ours, theirs):
                if step == 0:
                    layer.batch_repeat_interleave(2)
                if step == 50:
                    layer.batch_select_indices(torch.tensor([4, 1, 2]))
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert moved == 4                                    # steps 0, 1, 33 and, rows selected, 51


def test_rollouts_keep_sliding_windows_and_make_room_elsewhere():
    policy, kinds = antisd.Policy(tiny("olmo3")), set()
    generate = policy.generate

    def watched(past_key_values, **inputs):
        kinds.update(type(layer).__name__ for layer in past_key_values.layers)
        return generate(past_key_values=past_key_values, **inputs)
    policy.generate = watched
    antisd.sample(policy, PROMPTS, 2, 4)
    assert kinds == {"RoomyLayer", "DynamicSlidingWindowLayer"}


def hostile(model):
    """A checkpoint whose own sampling defaults would distort the law that is scored."""
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, min_p=0.2, typical_p=0.5, temperature=0.1,
        repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[5], eos_token_id=END,
        max_length=3)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollouts_sample_the_whole_softmax_under_a_hostile_generation_config(temperature):
    model = hostile(tiny())
    policy = antisd.Policy(model)
    prompt, n = PROMPTS[1], 20_000
    torch.manual_seed(0)
    drawn = antisd.sample(policy, [prompt], n, 1, temperature)
    first = torch.tensor([ids[0] for ids, _ in drawn])
    logits = model(torch.tensor([prompt])).logits[0, -1].detach() / temperature
    p = logits.softmax(-1)
    frequency = torch.bincount(first, minlength=V) / n
    error = (p * (1 - p) / n).sqrt()
    assert ((frequency - p).abs() <= 5 * error + 1 / n).all()
    assert (frequency[p > 10 / n] > 0).all() and (p > 10 / n).sum() > 30


def test_top_p_truncates_only_where_it_is_asked_for():
    policy = antisd.Policy(tiny())
    p = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = {ids[0] for ids, _ in antisd.sample(policy, [PROMPTS[0]], 500, 1, top_p=0.2)}
    ranked = p.argsort(descending=True)
    nucleus = ranked[:int((p[ranked].cumsum(0) < 0.2).sum()) + 1]
    assert drawn == set(nucleus.tolist())


def test_groups_are_consecutive_and_their_members_differ():
    policy = antisd.Policy(tiny())
    torch.manual_seed(1)
    a, b = [3, 5, 8], [3, 9, 12, 14]
    rows = ids_of(antisd.sample(policy, [a, b], 300, 1))
    first = torch.bincount(torch.tensor([r[0] for r in rows[:300]]), minlength=V) / 300
    second = torch.bincount(torch.tensor([r[0] for r in rows[300:]]), minlength=V) / 300
    law = [policy.model(torch.tensor([x])).logits[0, -1].softmax(-1) for x in (a, b)]
    far = (law[0] - law[1]).abs().sum()
    assert (first - law[0]).abs().sum() < far / 2 and (second - law[1]).abs().sum() < far / 2
    assert len({r[0] for r in rows[:300]}) > 10


@pytest.mark.parametrize("sampler", ["sample", "sample_paged"])
def test_no_prompts_give_no_responses(sampler):
    """A rank may get no held-out problem at all."""
    assert getattr(antisd, sampler)(antisd.Policy(tiny()), [], 2, 4) == []


@pytest.mark.parametrize("kind", ["qwen3", "olmo3"])
def test_paged_rollouts_equal_greedy_ones_and_follow_the_seed(kind):
    model = tiny(kind)
    policy = antisd.Policy(model.eval())
    policy.eos_ids, _ = spread_ends([argmax_decode(model, p, 20) for p in PROMPTS], stride=6)
    greedy = antisd.sample_paged(policy, PROMPTS, 2, 20, 0, rollout_batch=8)
    assert ids_of(greedy) == ids_of(antisd.sample(policy, PROMPTS, 2, 20, 0))

    def draw(seed):
        torch.manual_seed(seed)
        return ids_of(antisd.sample_paged(policy, PROMPTS, 2, 20, rollout_batch=8))
    assert draw(0) == draw(0) != draw(1) and draw(0)[0] != draw(0)[1]


@pytest.mark.parametrize("sampler, temperature", [
    ("sample", 1.0), ("sample", 0.6), ("sample_paged", 1.0), ("sample_paged", 0.6)])
def test_generation_and_scoring_agree_on_every_token(sampler, temperature):
    policy = antisd.Policy(tiny())
    policy.eos_ids = list(range(30, 36))                 # rows end early, late and never
    torch.manual_seed(0)
    drawn = getattr(antisd, sampler)(policy, PROMPTS, 3, 20, temperature, rollout_batch=6)
    scores, _ = antisd.score(policy, [p for p in PROMPTS for _ in range(3)], ids_of(drawn), 100,
                             temperature)
    assert len({len(ids) for ids, _ in drawn}) > 3
    for (ids, logp), row in zip(drawn, scores):
        assert logp == pytest.approx(row[:len(ids)].tolist(), abs=1e-4)


def test_roll_out_grades_marks_truncation_and_keeps_the_end_token(root):
    policy, _, _ = antisd.build(config(root), TOKENIZER, CPU)
    policy.eos_ids = sorted({*policy.eos_ids, *range(30, 60)})    # so that some rows end at once
    problems = [{"problem": "p", "answer": str(n), "prompt": PROMPTS[n]} for n in (0, 1)]
    torch.manual_seed(0)
    rollouts = antisd.roll_out(policy, TOKENIZER, problems, 40, max_tokens=3)
    assert [r.problem["answer"] for r in rollouts] == ["0"] * 40 + ["1"] * 40
    for r in rollouts:
        ended = [token in policy.eos_ids for token in r.ids]
        assert not any(ended[:-1]) and r.truncated == (not ended[-1])
        assert ended[-1] or len(r.ids) == 3
        assert r.text == TOKENIZER.decode(r.ids, skip_special_tokens=True)
        boxes = re.findall(r"\\boxed{(.)}", r.text)
        assert r.reward == float(boxes[-1:] == [r.problem["answer"]])
    kinds = {(r.truncated, len(r.ids) == 3) for r in rollouts}
    assert kinds == {(True, True), (False, True), (False, False)}
    assert {r.reward for r in rollouts} == {0.0, 1.0}


def test_both_the_models_and_the_tokenizers_end_tokens_end_a_response(root, tmp_path):
    model = tiny()
    model.generation_config.eos_token_id = [7, 4]
    policy, _, _ = antisd.build(config(root, model=save(model, tmp_path)), TOKENIZER, CPU)
    assert policy.eos_ids == sorted([7, 4, END])


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

WRAPPED = ("Solve the following math problem step by step. The last line of your response should "
           "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
           "problem.\n\nWhat is\n\n$x$?\n\nRemember to put your answer on its own line after "
           '"Answer:".')
SCHEMAS = {   # rows -> (problem, answer, solution)
    "plain": ([{"problem": " p ", "answer": " 3 ", "solution": "s"}], [("p", "3", "s")]),
    "no solution": ([{"problem": "p", "answer": 0}], [("p", "0", None)]),
    "final_answer": ([{"question": "p", "final_answer": "3", "solution": ""}],
                     [("p", "3", None)]),
    "aime24": ([{"id": 60, "problem": "p", "solution": "s", "answer": "033", "url": "u",
                 "year": "2024"}], [("p", "033", "s")]),
    "aime25": ([{"problem": "p", "answer": "70", "id": "0"}], [("p", "70", None)]),
    "hmmt": ([{"problem_idx": 1, "problem": "p", "answer": "\\frac{1}{2}, -3",
               "problem_type": ["Algebra"]}], [("p", "\\frac{1}{2}, -3", None)]),
    "minerva": ([{"question": "p", "answer": "4.5e33"}], [("p", "4.5e33", None)]),
    "math500": ([{"problem": "p", "solution": "so $\\boxed{3}$", "answer": "3", "subject": "x",
                  "level": 2, "unique_id": "test/x/1.json"}], [("p", "3", "so $\\boxed{3}$")]),
    "gsm8k": ([{"question": "q", "answer": "He has 3*4=<<3*4=12>>12\nso 1,200.\n#### 1,200"}],
              [("q", "1200", "He has 3*4=12\nso 1,200.\nThe answer is \\boxed{1,200}.")]),
    "dapo processed": ([{"prompt": "p", "solution": "34", "data_source": "math_dapo",
                         "reward_model": {"ground_truth": "34", "style": "rule"},
                         "extra_info": {"index": "a"}}], [("p", "34", None)]),
    "raw dapo": ([{"data_source": "math_dapo", "prompt": [{"content": WRAPPED, "role": "user"}],
                   "ability": "MATH", "extra_info": {"index": str(i)},
                   "reward_model": {"ground_truth": "34", "style": "rule"}} for i in range(3)],
                 [("What is\n\n$x$?", "34", None)]),
    "chat": ([{"prompt": [{"role": "system", "content": "be good"},
                          {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "p"}, {"role": "assistant", "content": "L"}],
               "Answer": "3"}],
             [("p", "3", None)]),
    "merged": ([{"problem": p, "answer": a} for p, a in ["p1", "q2", "p3", "r4"]],
               [("p", "1", None), ("q", "2", None), ("r", "4", None)]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_loads_from_every_format(schema, suffix, tmp_path):
    rows, expected = SCHEMAS[schema]
    problems = antisd.load_problems(write(tmp_path / f"data{suffix}", rows))
    assert [(p["problem"], p["answer"], p["solution"]) for p in problems] == expected
    assert len({p["id"] for p in problems}) == len(problems)


def test_hub_style_data_sets_take_split_and_config(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: test, path: b.jsonl}\n- config_name: cn\n  data_files: c.jsonl\n---\n")
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"problem": name, "answer": "1"}])
    for split, name, found in ("train", "en", "a"), ("test", "en", "b"), ("train", "cn", "c"):
        problems = antisd.load_problems(str(tmp_path), split, config=name)
        assert [p["problem"] for p in problems] == [found]


def test_limit_counts_distinct_problems(tmp_path):
    rows = [{"problem": p, "answer": "1"} for p in "aabbcc"]
    path = write(tmp_path / "d.jsonl", rows)
    assert [p["problem"] for p in antisd.load_problems(path, limit=2)] == ["a", "b"]


def test_next_problems_cover_every_problem_once_an_epoch_in_a_reproducible_order():
    problems = list(range(10))
    stream = [p for position in range(0, 40, 4)
              for p in antisd.next_problems(problems, position, 4, seed=3)]
    epochs = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == problems for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4             # shuffled anew each time
    assert antisd.next_problems(problems, 8, 12, seed=3) == stream[8:20]    # whatever the count
    assert antisd.next_problems(problems, 0, 10, seed=4) != epochs[0]


# ------------------------------------------------------------------------------------------------
# What the student and the teacher read
# ------------------------------------------------------------------------------------------------

NASTY = "{prompt} {0} {{}} \\boxed{1} \\\\ \\1 \\g<0> %s %(x)s $1 \x00 {% if %} {{ x }} \U0001f600"


def test_both_prompts_word_for_word():
    student = ("Solve the following math problem. Place the final answer in \\boxed{}.\n\n"
               "What is 1 + 1?")
    assert antisd.student_messages("What is 1 + 1?") == [{"role": "user", "content": student}]
    for correct, verdict in (False, "incorrect"), (True, "correct"):
        assert antisd.teacher_messages("What is 1 + 1?", "It is \\boxed{2}.", correct) == [
            {"role": "user", "content": student + "\n\nYour previous attempt:\nIt is \\boxed{2}."
             f"\n\nPrevious assessment: Your answer is {verdict}.\n\nNow solve this problem step "
             "by step."}]


def test_empty_c_is_the_students_prompt():
    for correct in (True, False):
        assert antisd.teacher_messages("p", "", correct) == antisd.student_messages("p")


def test_braces_backslashes_and_percent_signs_survive_the_template():
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
    for solution in (None, ""):
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


@pytest.mark.parametrize("text", ["so \\boxed{1}", "<think> hm </think> so \\boxed{1}",
                                  "hm </think> so \\boxed{1}",    # opened in the prompt
                                  "<think> a </think> b <think> c </think>\n\nso \\boxed{1}"])
def test_thinking_never_reaches_the_teacher(text):
    siblings = [rollout(text, 1.0), rollout("wrong", 0.0)]
    assert antisd.pick_solutions(siblings, random.Random(0))[1] == ("so \\boxed{1}", "sibling")
    alone = [rollout("wrong", 0.0, text)]
    assert antisd.pick_solutions(alone, random.Random(0))[0] == ("so \\boxed{1}", "solution")


def test_a_long_solution_loses_its_head_and_nothing_else():
    solution = " ".join(f"n{i}" for i in range(40))
    whole = antisd.teacher_prompt(TOKENIZER, "a b c", solution, False, {}, 10**6)
    assert antisd.teacher_prompt(TOKENIZER, "a b c", solution, False, {}, len(whole)) == whole
    head, tail = words(whole).split(solution)
    for longest in range(len(whole) - 39, len(whole)):
        prompt = antisd.teacher_prompt(TOKENIZER, "a b c", solution, False, {}, longest)
        assert longest - 1 <= len(prompt) <= longest     # cut no more than needed
        text = words(prompt)
        assert text.startswith(head) and text.endswith(tail)
        kept = text[len(head):-len(tail)].split()[1:]    # after the word that "..." is glued to
        assert kept == solution.split()[40 - len(kept):]


def test_each_row_gets_the_verdict_on_its_own_response(root):
    group = [rollout("so \\boxed{1}", 1.0), *(rollout(text, 0.0) for text in ("x", "n1", "n2"))]
    prompts, sources = antisd.teacher_prompts(TOKENIZER, group, config(root), 10**6, position=0)
    assert ["Your answer is incorrect." in words(p) for p in prompts] == [False, True, True, True]
    assert sources == ["solution", "sibling", "answer", "answer"] or sources == [
        "solution", "sibling", "solution", "solution"]   # groups of two: the last has no success
    assert "so \\boxed{1}" not in words(prompts[0]) and "so \\boxed{1}" not in words(prompts[2])


def test_template_flags_are_the_same_for_student_and_teacher(root):
    cfg = config(root, chat_template_kwargs='{"think": true}')
    _, problems, _, _ = antisd.prepare(cfg, 1)
    plain = antisd.prepare(config(root), 1)[1]
    group = [antisd.Rollout(p, [5], "x", False, 0.0) for p in problems[:2]]
    views, _ = antisd.teacher_prompts(TOKENIZER, group, cfg, 10**6, position=0)
    for student, teacher, bare in zip(problems, views, plain):
        assert words(student["prompt"]) == words(bare["prompt"]) + " <think>"
        assert words(teacher).endswith("<assistant> <think>")
        first = words(student["prompt"]).split(" <end>")[0]
        assert words(teacher).startswith(first)          # c comes after the student's own turn


# ------------------------------------------------------------------------------------------------
# The grader: classes of the rules, hostile input, bounds, and the development cases where they are
# ------------------------------------------------------------------------------------------------

SHARED = Path(os.environ.get("ANTISD_SHARED", HERE.parent / "shared")) / "data"     # or skipped


def correct(box, answer):
    return antisd.is_correct(r"So $\boxed{" + box + "}$.", answer)


@pytest.mark.parametrize("text, box", [
    (r"\boxed{1} then \boxed{2}", "2"),  # the last one, never joined
    (r"\fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"thus $\boxed 7$", "7"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\boxed{3}, 4}", r"\boxed{3}, 4"),  # the outer box
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),  # an escaped brace opens nothing
    (r"} \boxed{3}", "3"),
    (r"\boxed{8} and \boxed{9", "8"),  # the last complete one
    (r"\boxed{\boxed{8}", "8"),
    (r"\boxed{8", None),
    ("the answer is 8", None),
    (r"\boxed{8}</think> I am sure.", None),
    (r"<think>\boxed{8}</think> \boxed{9}", "9"),
    (r"a</think>\boxed{8}</think>\boxed{9}", "9"),
    (r"\boxed{7} <think> or \boxed{8}", "7"),  # thoughts that never end
    ("", None),
])
def test_extraction(text, box):
    assert antisd.extract_boxed(text) == box


RIGHT = [  # (answer, boxes that must be right)
    # integers: zeros, signs, separators, marks
    ("61", ["61", "061", "+61", "61.", "61.0", r"\text{61}", "(61)", "{61}", r"\boxed{61}"]),
    ("007", ["7", "07", "7.0"]),
    ("120", [r"\binom{10}{3}", r"\dbinom{10}{7}", "5!"]),
    ("-12", ["-12", "−12", "- 12", r"-\frac{24}{2}"]),
    ("45600", ["45,600", "45{,}600", r"45,\!600", r"45\,600", "45 600", r"4.56 \times 10^4",
         "4.56e4"]),
    ("2,345,678", ["2345678", r"2,\!345,\!678"]),
    ("64", ["2^6", "8^{2}", r"4 \cdot 16", "x = 64", r"a+b = 60+4 = 64", r"n \approx 64",
         "64 = 64"]),
    ("60", [r"\$60", "$60$", "60%", r"60\%", r"60^\circ", "60°", r"60 \text{ km/h}",
         r"60~\mathrm{m}^2",
            "60 miles", "60cm", r"60 \mathrm{~kg} \mathrm{~s}^{-1}", r"60\ \text{square units}",
            "60 s",
         "**60**"]),
    (r"\$7.50", ["7.5", r"7.50 \text{ dollars}", r"\$7.50", r"\frac{15}{2}"]),
    (r"35^\circ", ["35", r"35^{\circ}", r"35 \text{ degrees}", r"x = 35^\circ"]),
    (r"48 \mbox{ feet}^2", ["48", r"48 \text{ ft}^2"]),
    # fractions, mixed numbers, roots, pi
    (r"\frac{7}{4}", ["7/4", r"\frac74", r"\dfrac{14}{8}", r"1\frac{3}{4}", r"1 \tfrac34", "1 3/4",
         "1.75",
                      r"\frac{-7}{-4}", r"\frac{7}4", r"\frac{7}{4} \approx 1.7",
                      "7 / 4"]),
    (r"-\frac{5}{2}", ["-2.5", r"\frac{-5}{2}", r"\frac{5}{-2}", r"-2\frac12"]),
    (r"5\sqrt{7}", [r"5\sqrt7", r"5 \sqrt 7", r"\sqrt{175}", r"5 \cdot 7^{1/2}", "5√7",
         "5sqrt(7)",
                    r"\frac{35}{\sqrt{7}}"]),
    (r"\sqrt{12}", [r"\sqrt 12", r"\sqrt12", r"2\sqrt{3}", "sqrt(12)"]),
    (r"6\pi", ["6π", r"6 \cdot \pi", r"\pi \cdot 6", r"\frac{12\pi}{2}", r"6\pi \text{ cm}^2",
         "6pi"]),
    (r"3^{20} \cdot 12!", [r"12! \cdot 3^{20}", r"3^{19} \cdot 3 \cdot 12!"]),
    # decimals and scientific notation: relative tolerance 1e-4
    ("0.375", ["3/8", ".375", "0.37503", r"37.5\%", r"\sqrt{0.140625}"]),
    ("6.02e23", [r"6.02 \times 10^{23}", r"6.02\cdot10^{23}", "6.02×10²³", "6.02 x 10^23",
         "6.02E23", "6.02e+23",
                 r"60.2 \times 10^{22} \mathrm{~mol}^{-1}", r"N \approx 6.02\times 10^{23}",
                 "6.02*10^23"]),
    ("1e-7", ["10^{-7}", "10⁻⁷", "0.0000001", r"1.0 \times 10^{-7}\text{ m}"]),
    # lists and sets: any order; \pm is two values; tuples, intervals, unions, matrices
    ("4,-9", ["-9, 4", r"\{4, -9\}", r"x = 4 \text{ or } x = -9", r"-9 \text{ and } 4",
         "x=-9, x=4"]),
    ("100, 200", ["200, 100"]),
    (r"2 \pm \sqrt{3}", [r"2-\sqrt3, 2+\sqrt3", r"x = 2 \pm \sqrt{3}", r"\frac{4\pm\sqrt{12}}{2}"]),
    (r"\{\pm 1, 6\}", ["6, 1, -1", r"\{-1, 1, 6\}"]),
    ("(2, -5)", [r"\left(2,\,-5\right)", "(x,y) = (2,-5)", r"(\frac42, -5)"]),
    ("(1,234)", ["(1, 234)"]),
    (r"[2, \infty)", [r"x \ge 2", r"x \in [2,\infty)", r"\left[2, +\infty\right)"]),
    ("(-3, 8]", [r"-3 < x \leq 8", r"x\in(-3,8]"]),
    (r"(-\infty, 1) \cup (5, 6)", [r"(5,6)\cup(-\infty,1)", r"x < 1 \text{ or } 5 < x < 6"]),
    (r"\begin{pmatrix} 1/2 & 0 \\ 3 & -1 \end{pmatrix}",
     [r"\begin{bmatrix}0.5&0\\[2pt]3&-1\end{bmatrix}",
          r"A = \begin{pmatrix} \frac12&0\\3&-1\end{pmatrix}"]),
    # text, options, bases
    (r"\text{Maria}", ["Maria", r"\textbf{Maria}", r"\mathrm{maria}", r"\text{ Maria. }"]),
    (r"\text{(D)}", ["D", "(D)", r"\textbf{(D)}", r"\mathrm{D}"]),
    ("3021_4", ["3021_{4}", "(3021)_4", r"3021_{\text{4}}"]),
    # expressions: equal algebraically, however the symbols are spelled
    ("(a+1)(b-2)", ["ab - 2a + b - 2", "(b-2)(1+a)"]),
    (r"\frac{A}{B} e^{-t/\tau}", [r"A e^{-\frac{t}{\tau}} / B", r"\frac{A}{B}\exp(-t/\tau)"]),
    ("3 + 4i", ["4i+3", r"3+4\mathrm{i}", "z = 3+4i"]),
    (r"v_{0} t", ["v_0 t", r"t v_{0}", "x(t) = v_0 t"]),
    (r"\sin^2 x", [r"1-\cos^2 x", r"\sin(x)^2"]),
    (r"\dot{q}_{0} u(t)", [r"u(t) \dot{q}_0", r"u(t)\dot q_0"]),
    ("np.arctan(2/3)", [r"\arctan(2/3)", r"\tan^{-1}\left(\frac23\right)"]),
    ("5.2 k", [r"5.2k \text{ J}", r"\frac{26}{5} k"]),
    ("Q\n", ["Q"]),
    (r"k \theta(t)", [r"\theta k"]),
    (r"x+$ $y", ["y+x"]),
    ("-3./4", [r"-\frac34", "-0.75"]),
    # equations
    ("x=9", ["9", "x = 9", "9.0"]),
    ("y = 3x-1", ["3x-1", "y=-1+3x", "y - 3x = -1"]),
    ("2x+3y-4=0", ["2x+3y=4", "4x+6y-8=0", "3y = 4-2x"]),
    (r"y^{\prime}+k y=0", ["y' + ky = 0", "y' = -ky"]),
    (r"\frac{d M}{d t}=2 M-b", [r"\dot{M} = 2M - b", "M' - 2M + b = 0", r"\frac{dM}{dt}+b=2M"]),
    (r"l \ddot{\theta}(t)=g \sin \theta(t)", [r"l\ddot\theta(t) - g\sin\theta = 0"]),
    ("MC=AVC", [r"\text{MC}=\text{AVC}", "AVC = MC"]),
]

WRONG = [  # (answer, boxes that must be wrong)
    ("120", [r"\binom{10}{4}", "4!"]),
    (r"\foo{3}{10}", [r"\foo{10}{3}", "30"]),  # what a command means must be known
    ("61", ["16", "6 1", "60, 61", "60 or 61", r"60 \text{ or } 61", "61, 62", "{60, 61}",
         "61.0001", "-61", "61x",
            "6.1", "610", "61?", "61!", "61 million", r"61 \text{ thousand}", r"\text{not } 61",
            r"61 \pm 1", "61i",
            "60 < x < 62", "x \\ge 61", "61 = x", r"61_7", "", " ", "?", r"\text{None}", "(60, 61)",
            r"\infty",
            r"60.99999999999999999999999", r"\sqrt{3721.0001}", r"\frac{61}{0}", "61\\text{x}",
            "61ab", r"61\pi",
            r"61 \text{ not}", "61abc", "61?!", "7 or 61",
            r"61 \text{ is what the others say it must be}"]),
    (r"\frac{2}{3}", ["0.667", "0.6666666667", r"66.7\%", r"\frac{3}{2}", "2:3", "2, 3",
         r"\frac{2}{3}x", r"0.67 \approx \frac{2}{3}"]),
    (r"\pi", ["3.14", "3.14159265358979323846", r"\frac{355}{113}"]),
    (r"\sqrt{3}", ["1.732", r"\pm\sqrt{3}", "3", r"\sqrt{1}3"]),
    (r"3^{20} \cdot 12!", [r"3^{20} + 12!", r"1.67 \times 10^{18}"]),
    ("0.375", ["0.3751", "0.38", "3.75"]),
    ("6.02e23", ["6.02e22", "6.02", r"6.03 \times 10^{23}", r"10^{23}", "0"]),
    ("2.5e-19", ["3.5e-19", "0", "2.5e-18"]),
    ("4,-9", ["4", "4, 9", "4,-9,1", "4,4,-9", "(4,-9)", "49", "x=4"]),
    ("3,3,5", ["3,5", "3,5,5"]),
    ("100, 200", ["100200"]),
    (r"2 \pm \sqrt{3}", [r"2+\sqrt3", r"-2 \pm \sqrt{3}", r"2 \pm \sqrt{2}"]),
    ("(2, -5)", ["(-5, 2)", "[2,-5]", "(2,-5,0)", r"\{2, -5, 2\}", "-5, 2"]),
    (r"[2, \infty)", [r"(2,\infty)", "x > 2", r"x \le 2", r"[2, 10^9)"]),
    ("(-3, 8]", ["(-3,8)", "[-3,8]", "[-3,8)", r"-3 \le x \le 8", "-3, 8"]),
    (r"(-\infty, 1) \cup (5, 6)", [r"(-\infty,1)", r"(-\infty,1]\cup(5,6)", r"(-\infty,6)"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}",
                                               r"\begin{pmatrix} 1 & 2 \end{pmatrix}"]),
    (r"\text{Maria}", ["Mario", r"\text{Maria or Ana}", "M", r"\text{not Maria}"]),
    (r"\text{(D)}", ["(B)", r"\text{(D) or (E)}", "DE"]),
    ("3021_4", ["3021_5", "201", "3021", "3020_4"]),
    ("(a+1)(b-2)", ["(a-2)(b+1)", "ab-2"]),
    ("R", ["r", "2R", "1"]),
    ("v_{0}", ["v_1", "v", "v_{00}"]),
    (r"\alpha", ["a", r"\beta"]),
    ("5.2 k", ["5.2", "5.3k", "k"]),
    ("3 + 4i", ["4+3i", "3-4i", "7"]),
    ("x=9", ["y=9", "x=-9", "x=9,10", r"x \ge 9"]),
    ("2x+3y-4=0", ["2x+3y+4=0", "2x+3y-4", "0", "3x+2y=4"]),
    ("MC=AVC", ["MC=AC", "AVC"]),
    ("SAC=LAC", ["SMC=LMC"]),  # names, not products
    ("xy=0", ["x=0"]),
    ("9 m", ["9"]),  # a letter of the reference is a symbol, not a unit
    ("np.arctan(2/3)", [r"\arctan(3/2)", "0.588"]),
]


@pytest.mark.parametrize("answer, boxes", RIGHT, ids=[a for a, _ in RIGHT])
def test_right(answer, boxes):
    assert [b for b in [answer] + boxes if not correct(b, answer)] == []


@pytest.mark.parametrize("answer, boxes", WRONG, ids=[a for a, _ in WRONG])
def test_wrong(answer, boxes):
    assert [b for b in boxes if correct(b, answer)] == []


def test_no_box_and_last_box():
    assert not antisd.is_correct("The final answer is $5$.", "5")
    assert not antisd.is_correct(r"\boxed{5} \boxed{6}", "5")
    assert not antisd.is_correct(r"\boxed{5} \boxed{6}", "56")
    assert antisd.is_correct(r"\boxed{4} no, \boxed{5}", "5")


HOSTILE = [
    "9^{9^{9}}", "(10^{6})!", "100000000!", r"\binom{10^9}{5\cdot10^8}", "7!!!!", "2^{999999999}",
    "(" * 3000 + "5" + ")" * 3000, r"\frac{" * 90 + "1" + "}{2}" * 90, "{" * 190, "x^" * 150,
    "1," * 190, r"\sqrt{" * 60 + "2" + "}" * 60, "9" * 390, r"\pm" * 120, "\x00\ud800{}",
    "__import__('os').system('true')", r"\exp(" * 60 + "9" + ")" * 60, "((9^{9999})^{9999})" * 20,
    "7" + "%" * 300, "x=" * 190, r"\arcsin(9)" * 36, r"\tan(10^{900})" * 25, r"7\approx" * 40,
    "(" * 390, ")" * 390, "5" + ")" * 9, r"\cot(10^{-900})" * 20, "(1," * 130, "1,000" * 79]


@pytest.fixture
def clock():
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


@pytest.mark.parametrize("box", HOSTILE, ids=[repr(b[:12]) for b in HOSTILE])
def test_hostile_is_wrong_within_two_seconds(box, clock):
    assert not correct(box, r"\sqrt{5}")
    assert clock() < 2


@pytest.mark.parametrize("text", [
    r"\boxed{" * 20_000, "{" * 100_000, r"\boxed " * 20_000, "wait, " * 20_000,
    r"\boxed{" * 20_000 + "3" + "}" * 20_000, r"\boxed" + " " * 100_000])
def test_long_text_is_linear(text, clock):
    assert not antisd.is_correct(text, "5")
    assert clock() < 0.5


def test_many_hostile_pieces_share_one_budget(clock):
    assert not correct(",".join(["9^{9^{9}}"] * 20), ",".join([r"\sqrt{5}"] * 20))
    assert clock() < 2


def test_what_grows_too_large_is_given_up_and_counted():
    before = antisd.grader_timeouts()
    for box in ("9^{9^{9}}", r"\exp(\exp(\exp(\exp(9))))"):
        assert not correct(box, r"\sqrt{5}")
    assert antisd.grader_timeouts() == before + 2
    assert correct(r"\sqrt{12}", r"2\sqrt{3}") and antisd.grader_timeouts() == before + 2


def test_hostile_boxes_take_little_memory():
    code = ("import resource, test_antisd as t; peak = lambda: resource.getrusage(0).ru_maxrss\n"
            "t.correct('1/2', '0.5'); before = peak(); [t.correct(b, '5') for b in t.HOSTILE]\n"
            "print((peak() - before) // 1024)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert int(run.stdout) < 20, run.stderr  # MiB


def test_from_threads():
    results = []
    cases = [(rf"\sqrt{{{k * k * 2 + k % 2}}}", rf"{k}\sqrt{{2}}", k % 2 == 0)
             for k in range(2, 42)]

    def work(k):
        mine = cases[k:] + [("9^{9^{9}}", "3", False)] * (k == 0)
        results.extend(correct(box, answer) is expect for box, answer, expect in mine)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4 * 40 - 6 + 1 and all(results)


def test_after_a_fork():
    assert correct(r"\sqrt{8}", r"2\sqrt{2}")
    child = os.fork()
    if child == 0:
        right, wrong = correct(r"\sqrt{18}", r"3\sqrt{2}"), correct(r"\sqrt{2}", r"\sqrt{3}")
        os._exit(not right or wrong)
    assert correct(r"\sqrt{27}", r"3\sqrt{3}") and os.waitpid(child, 0)[1] == 0


def test_callers_alarm_still_fires():
    fired = []
    old = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.perf_counter()))
    began = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        while not fired and time.perf_counter() - began < 3:
            assert not correct("9^{9^{9}}", r"\sqrt{5}") and correct(r"\sqrt{8}", r"2\sqrt{2}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(fired) == 1 and 0.25 < fired[0] - began < 1


def test_callers_alarm_may_raise_at_any_moment():
    def expire(*_):
        raise TimeoutError

    interrupted = 0
    old = signal.signal(signal.SIGALRM, expire)
    try:
        for k in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-5 * k)
                while True:
                    correct(r"\sqrt{\frac{1}{2}+\sin^2 1}", r"2\sqrt{2}")
            except TimeoutError:
                interrupted += 1
            assert correct(r"\sqrt{8}", r"2\sqrt{2}") and not correct(r"\sqrt{8}", r"2\sqrt{3}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted == 200  # no alarm is swallowed


def fuzz_strings(count, seed):
    """Boxes of random LaTeX, cut anywhere; control characters, surrogates, huge numbers."""
    rng = random.Random(seed)
    atoms = [
        r"\frac", r"\sqrt", "{", "}", "{1}", "^", "_", "(", ")", "[", "]", ",", "=", "+", "-", "x",
        "e", "i", "9", "10", "0.5", "12345678901234567890", "!", r"\pm", r"\pi", r"\infty",
        r"\cup", r"\text{ cm}", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\",
        "&", r"\boxed{", "<", r"\le", "\x00", "\x1b", "\ud800", "\udfff", "é", "²", "½", "%", r"\%",
        "$", "|", "'", '"', "\n", " ", r"\sum_{n=1}^{", r"\int", r"\log_", r"\sin", "</think>",
        r"\text{or}", "e99", r"\cdot", r"\times 10^{", "^{9^{9", r"\binom", r"\dot{", r"\approx"]
    for k in range(count):
        body = "".join(rng.choices(atoms, k=rng.randint(1, 40)))
        if k % 10 == 0:
            body = rng.choice([r"\frac{1}{", r"\sqrt{", "(", "{"]) * rng.randint(1, 80) + body
        if k % 4:  # most of them balanced, so that they reach the comparison
            body = re.sub(r"^[^{]*\}", "", body)
            body += "}" * max(0, body.count("{") - body.count("}"))
        text = r"so \boxed{" + body + "}" * (rng.randint(0, 3) if k % 4 == 0 else 1)
        yield text[: rng.randint(1, len(text))] if rng.random() < 0.3 else text


def random_latex(rng, depth=3):
    """An expression in numbers and x; no (5)(5), which math-verify reads as the mixed number 10."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["2", "3", "7", "x", "5", "1.5", r"\pi"])
    a, b = random_latex(rng, depth - 1), random_latex(rng, depth - 1)
    return rng.choice([f"{a} + {b}", f"{a} - ({b})", rf"\frac{{{a}}}{{{b}}}", rf"({a}) \cdot ({b})",
                       rf"\sqrt{{{a}}}", f"({a})^{{2}}", rf"e^{{-\frac{{{a}}}{{9}}}}"])


def test_math_verify_reads_the_same_expressions():
    """A second opinion: what math-verify parses and sympy rewrites and prints is still equal, and
    no longer where 1/7 is added."""
    sympy = pytest.importorskip("sympy")
    from math_verify import parse
    rng, seen = random.Random(3), 0
    while seen < 60:
        text = random_latex(rng)
        parsed = parse(f"${text}$", parsing_timeout=None)[0]
        x = sympy.Symbol("x", positive=True)             # sqrt(x^2) is x and not |x|
        parsed = parsed.subs({name: x for name in parsed.free_symbols if str(name) == "x"})
        value = parsed.subs({name: 1.25 for name in parsed.free_symbols}).evalf()
        if not value.is_real or not 1e-3 < abs(value) < 1e6 or "x" not in text:
            continue                                     # a root of a negative, 1 / 0, too large
        seen += 1
        rewritten = sympy.latex(sympy.expand(sympy.nsimplify(parsed)))
        assert correct(rewritten, text), (text, rewritten)
        assert not correct(rf"\frac{{1}}{{7}} + {rewritten}", text), (text, rewritten)


def test_fuzz_500():
    answers = ["5", r"\frac{1}{2}", r"\sqrt{2}", "1.5", "1,-2", "(1,2)", "x=5", "x^2+1",
               r"\text{no}", "[1,2)"]
    for k, text in enumerate(fuzz_strings(500, seed=11)):
        began = time.perf_counter()
        assert antisd.is_correct(text, answers[k % len(answers)]) in (True, False)
        assert time.perf_counter() - began < 2, text


def test_speed():
    def median(cases):
        times = []
        for box, answer in cases:
            began = time.perf_counter()
            correct(box, answer)
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    assert median([(str(k), str(k + k % 2)) for k in range(200)]) < 1e-3
    assert median([(f"{k}/7", rf"\frac{{{k}}}{{7}}") for k in range(1, 100)]) < 5e-3


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data (set ANTISD_SHARED)")
def test_development_cases():
    rows = [json.loads(line) for line in (SHARED / "grading_dev.jsonl").open()]
    assert [r["response"][-80:] for r in rows if not r.get("policy")
            and antisd.is_correct(r["response"], r["answer"]) != r["expect"]] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data (set ANTISD_SHARED)")
@pytest.mark.parametrize("name", [
    "aime24", "aime25", "aime26", "hmmt_feb_2025", "minerva_math", "math500", "gsm8k_train_small",
    "gsm8k_test_small", "dapo_math_sample"])
def test_answers_and_worked_solutions(name):
    rows = [json.loads(line) for line in (SHARED / f"{name}.jsonl").open()]
    assert [r["answer"] for r in rows if not correct(r["answer"], r["answer"])] == []
    if name.startswith(("minerva", "math500", "gsm8k")):
        solutions = [(re.sub(r"####\s*(.*)", r"\\boxed{\1}", r["solution"]), r["answer"])
                     for r in rows]
        assert [answer for text, answer in solutions if not antisd.is_correct(text, answer)] == []


# ------------------------------------------------------------------------------------------------
# One update against an independent one: whole logits, row by row, plain SGD
# ------------------------------------------------------------------------------------------------

# prompt, response, truncated, reward; groups of two. The first half (rank 0's, of two) has most of
# the tokens and needs more micro-batches than the second.
HAND_MADE = [
    ([3, 5, 8], list(range(20, 50)), True, 0.0), ([3, 5, 8], [11, END], False, 1.0),
    ([3] * 17, list(range(40, 69)), True, 0.0), ([3] * 17, list(range(60, 20, -2)), False, 0.0),
    ([0, END, 9, 4], [4, END], False, 1.0), ([0, END, 9, 4], [END], False, 0.0),
    ([7, 8], [0, 1, 2, 0, END], False, 1.0), ([7, 8], [33, 34, 35], True, 0.0)]
C = [44, 45, 46, END, 47]                                # stands for the privileged context
LAM, SGD_LR = 0.5, 0.3
CASES = {
    "plain": {},
    "small micro-batches": dict(micro_tokens=40),
    "recomputed layers": dict(gradient_checkpointing=True),
    "mean of response means": dict(loss_agg="seq"),
    "without truncated": dict(mask_truncated=True, micro_tokens=40),
    "means without truncated": dict(loss_agg="seq", mask_truncated=True),
    "multiplied": dict(compose="mul"),
    "sd": dict(method="sd"),
    "clipped gradient": dict(max_grad_norm=0.05),
    "two updates": dict(updates_per_batch=2, micro_tokens=70),
    "untied": dict(model="llama"),
}


def case_config(root, name):
    flags = dict(temperature=0.7, max_grad_norm=1e9) | CASES[name]
    return config(root, **flags | {"model": str(root / flags.get("model", "qwen3"))})


def run_case(root, name):
    """The trainer's own score() and update() on this rank's share of HAND_MADE."""
    cfg, rank, world = case_config(root, name), dist.get_rank(), dist.get_world_size()
    policy, _, _ = antisd.build(cfg, TOKENIZER, CPU)
    optimizer = torch.optim.SGD(policy.parameters(), lr=SGD_LR)
    size = len(HAND_MADE) // world
    rows = HAND_MADE[rank * size:(rank + 1) * size]
    prompts, responses, _, _ = zip(*rows)
    rollouts = [antisd.Rollout({"prompt": p}, ids, "", cut_off, r) for p, ids, cut_off, r in rows]
    lengths = torch.tensor([len(ids) for ids in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    a_seq = antisd.group_advantages(torch.tensor([row[3] for row in rows]), 2)
    scoring = cfg.micro_tokens, cfg.temperature
    t, entropy_t = antisd.score(policy, [p + C for p in prompts], responses, *scoring)
    s, entropy_s = torch.zeros_like(t), torch.zeros_like(t)
    known = cfg.updates_per_batch > 1
    if known:
        s, entropy_s = antisd.score(policy, prompts, responses, *scoring)
    batch = antisd.Batch(rollouts, ["sibling"] * len(rows), mask, a_seq, t, entropy_t, s, entropy_s)
    loss, norm, finite = antisd.update(policy, optimizer, batch, LAM, cfg, known)
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"loss": loss, "norm": norm, "finite": finite,
            "mean": antisd.global_mean(batch.entropy_t, mask),
            "median": antisd.global_median(batch.entropy_t, mask),
            "s": [row[:n] for part in antisd.gather((batch.s, lengths)) for row, n in zip(*part)],
            "summary": antisd.summary(batch, cfg),
            "state": dcp_state.get_model_state_dict(policy, options=whole)}


def reference(root, name):
    """The same by other means; also the number of tokens whose ratio the clip held."""
    cfg = case_config(root, name)
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    parameters, held, losses, norms = list(model.parameters()), 0, [], []
    with torch.no_grad():
        t = [brute_force(model, p + C, ids, 0.7) for p, ids, _, _ in HAND_MADE]
        s = [brute_force(model, p, ids, 0.7)[0] for p, ids, _, _ in HAND_MADE]
    entropies = torch.cat([entropy for _, entropy in t])
    size = len(HAND_MADE) // cfg.updates_per_batch
    for first in range(0, len(HAND_MADE), size):
        rows = [i for i in range(first, first + size)
                if not (cfg.mask_truncated and HAND_MADE[i][2])]
        tokens = sum(len(HAND_MADE[i][1]) for i in rows)
        loss = 0.0
        for i in rows:
            prompt, ids, _, reward = HAND_MADE[i]
            pair = torch.tensor([HAND_MADE[i - i % 2][3], HAND_MADE[i - i % 2 + 1][3]])
            a_seq = 0.0 if pair[0] == pair[1] else float((reward - pair.mean()) / pair.std())
            u = t[i][0] - s[i]
            delta = u if cfg.method == "sd" else -(torch.log1p(u.exp()) - LOG2) / 2
            a = a_seq * (1 + LAM * delta) if cfg.compose == "mul" else a_seq + LAM * delta
            ratio = (brute_force(model, prompt, ids, 0.7)[0] - s[i]).exp()
            reach = torch.where(a > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
            held += int((reach != ratio).sum())
            share = len(ids) * len(rows) if cfg.loss_agg == "seq" else tokens
            loss = loss - (a * reach).sum() / share
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p -= SGD_LR * g * min(1, cfg.max_grad_norm / norm)
        losses.append(loss.item())
        norms.append(norm)
    state = {"model." + k: v for k, v in model.state_dict().items()}
    return {"loss": sum(losses) / len(losses), "norm": sum(norms) / len(norms), "state": state,
            "mean": entropies.mean().item(), "median": entropies.median().item(), "s": s,
            "entropies": entropies, "held": held}


def assert_equal_updates(found, expected, before):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)
    assert found["mean"] == pytest.approx(expected["mean"], rel=1e-5)
    for mine, theirs in zip(found["s"], expected["s"], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-4)
    assert found["state"].keys() == expected["state"].keys()
    for key, value in found["state"].items():            # moved by the same amount, not just near
        start = before[key.removeprefix("model.")]
        torch.testing.assert_close(value - start, expected["state"][key] - start, rtol=1e-3,
                                   atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_update_equals_an_independent_one(root, name):
    found, expected = run_case(root, name), reference(root, name)
    assert found["finite"] and expected["norm"] > 0.05
    assert (expected["held"] > 0) == (name == "two updates")    # one update: the clip is inert
    assert_equal_updates(found, expected, weights(case_config(root, name).model))
    ranked = expected["entropies"].sort().values         # an even count: the mean of the middle two
    n = len(ranked)
    assert n % 2 == 0 and ranked[n // 2] - ranked[n // 2 - 1] > 1e-3
    assert found["median"] == pytest.approx((ranked[n // 2 - 1] + ranked[n // 2]).item() / 2)


def prepared(root, **flags):
    """Policy, SGD and a batch of two rows whose teacher has not spoken yet."""
    cfg = config(root, **flags)
    policy, _, _ = antisd.build(cfg, TOKENIZER, CPU)
    rows = [antisd.Rollout({"prompt": [3, 5, 8]}, [20, 21, 22], "", True, float(i)) for i in (0, 1)]
    zeros = torch.zeros(2, 3)
    batch = antisd.Batch(rows, [], zeros == 0, torch.tensor([-1.0, 1.0]), zeros.clone(),
                         zeros.clone(), zeros.clone(), zeros.clone())
    before = {k: v.clone() for k, v in dcp_state.get_model_state_dict(policy).items()}
    return cfg, policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch, before


def test_a_batch_of_truncated_responses_left_out_gives_zero_and_not_nan(root):
    cfg, policy, optimizer, batch, before = prepared(root, mask_truncated=True)
    assert antisd.update(policy, optimizer, batch, 0.5, cfg, False) == (0.0, 0.0, True)
    assert same(before, dcp_state.get_model_state_dict(policy))


def test_an_update_that_is_not_finite_changes_nothing(root):
    cfg, policy, optimizer, batch, before = prepared(root)
    batch.t[1, 2] = math.nan
    assert not antisd.update(policy, optimizer, batch, 0.5, cfg, False)[2]
    assert same(before, dcp_state.get_model_state_dict(policy))


def test_with_empty_c_u_is_zero_and_antisd_is_grpo(root):
    messages = [antisd.student_messages("a n1 b"), antisd.teacher_messages("a n1 b", "", False)]
    student, teacher = (antisd.render(TOKENIZER, m, {}) for m in messages)
    states = []
    for method in "antisd", "grpo":
        cfg, policy, optimizer, batch, before = prepared(root, method=method)
        responses = [r.ids for r in batch.rollouts]
        for r in batch.rollouts:
            r.problem["prompt"] = student
        batch.t, _ = antisd.score(policy, [teacher] * 2, responses, cfg.micro_tokens)
        antisd.update(policy, optimizer, batch, 0.5, cfg, False)
        assert batch.s.any() and (batch.t - batch.s).abs().max() < 1e-6
        states.append({k: v.clone() for k, v in dcp_state.get_model_state_dict(policy).items()})
        assert not same(before, states[-1])
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# train(): Algorithm 1 as a whole
# ------------------------------------------------------------------------------------------------

KEYS = """step reward reward_complete length truncated zero_std_groups seq_adv_abs u_mean u_negative
    phi_abs student_entropy teacher_entropy teacher_entropy_median gate h_warm lam context/sibling
    context/solution context/answer loss grad_norm lr tokens_per_s seconds/rollout seconds/score
    seconds/train seconds/save peak_memory_gib padding rollout_gap""".split()
NO_WARMUP = dict(warmup_steps=0, tau_down=0.0)


def spy(monkeypatch, name):
    """Lets antisd.<name> run as it is and keeps (arguments, result) of every call."""
    calls, original = [], getattr(antisd, name)

    def wrapper(*args, **options):
        calls.append((args, original(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(antisd, name, wrapper)
    return calls


@pytest.mark.parametrize("method, flags", [
    ("antisd", NO_WARMUP), ("no_teacher", NO_WARMUP), ("sd", {}),    # sd acts from step 0, ungated
    ("antisd", dict(temperature=1.4, gate_source="student", **NO_WARMUP)), ("grpo", {})])
def test_a_training_step_equals_algorithm_1_by_hand(root, tmp_path, monkeypatch, method, flags):
    """What the trainer logs, against brute force on the rollouts it drew."""
    packed, rolled = spy(monkeypatch, "pack"), spy(monkeypatch, "roll_out")
    sampled, viewed = spy(monkeypatch, "sample"), spy(monkeypatch, "teacher_prompts")
    [row] = run(root, tmp_path, method=method, seed=3, **flags)
    rollouts, temperature = rolled[0][1], flags.get("temperature", 1.0)

    # the ids that were drawn are the ids that are scored and trained on: never text in between
    assert [r.ids for r in rollouts] == ids_of(sampled[0][1])
    drawn = {tuple(ids) for ids in ids_of(sampled[0][1])}
    assert {tuple(ids) for (_, ids, _), _ in packed for ids in ids} == drawn
    assert any(TOKENIZER.encode(TOKENIZER.decode(ids)) != list(ids) for ids in drawn)

    model = AutoModelForCausalLM.from_pretrained(root / "qwen3")
    rewards = torch.tensor([r.reward for r in rollouts]).view(4, 2)
    assert 0 < rewards.mean() < 1 and (rewards[:, 0] != rewards[:, 1]).any()
    a_seq = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    views = viewed[0][1][0] if viewed else [None] * 8
    objective, us, entropies, count = 0.0, [], [], sum(len(r.ids) for r in rollouts)
    for r, a, view in zip(rollouts, a_seq.flatten(), views, strict=True):
        logp, _ = brute_force(model, r.problem["prompt"], r.ids, temperature)
        s, delta = logp.detach(), 0.0
        if view:
            t, h = brute_force(model, view, r.ids, temperature)
            u = -s if method == "no_teacher" else t.detach() - s
            delta = 0.5 * (u if method == "sd" else -antisd.phi(u))
            us.append(u)
            entropies.append(h.detach())
        objective = objective + ((a + delta) * logp).sum() / count
        # the loss's value at ratio 1 is -mean A, whatever logp is
        objective = objective + ((a + delta) * (1 - s)).sum() / count
    gradients = torch.autograd.grad(objective, list(model.parameters()))
    assert row["loss"] == pytest.approx(-objective.item(), rel=1e-4, abs=1e-6)
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["reward"] == rewards.mean().item() and row["length"] * 8 == count
    assert row["zero_std_groups"] == (rewards[:, 0] == rewards[:, 1]).float().mean().item()
    assert row["lam"] == (0.0 if method == "grpo" else 0.5)
    assert row["rollout_gap"] < 1e-5 and 0 <= row["padding"] <= 0.1
    if views[0]:
        u, h = torch.cat(us), torch.cat(entropies)
        assert row["u_mean"] == pytest.approx(u.mean().item(), rel=1e-4)
        assert row["u_negative"] == pytest.approx((u < 0).double().mean().item())
        size = u.abs() if method == "sd" else antisd.phi(u).abs()
        assert row["phi_abs"] == pytest.approx(size.mean().item(), rel=1e-4)
        assert row["teacher_entropy"] == pytest.approx(h.mean().item(), rel=1e-4)
    else:
        assert row["u_mean"] is None and row["context/sibling"] == 0


@pytest.mark.parametrize("sampler, name", [("generate", "sample"), ("sharded", "sample"),
                                           ("paged", "sample_paged")])
def test_every_sampler_trains_a_step(root, tmp_path, monkeypatch, sampler, name):
    drawn = spy(monkeypatch, name)
    [row] = run(root, tmp_path, sampler=sampler, rollout_batch=8)
    assert len(drawn) == 1 and row["rollout_gap"] < 1e-5 and row["grad_norm"] > 0


@pytest.mark.parametrize("flags, passes", [
    (dict(method="grpo", gate_source="student"), 0), (dict(method="sd", gate_source="student"), 1),
    (dict(method="antisd"), 1), (dict(method="antisd", gate_source="student"), 2),
    (dict(method="grpo", updates_per_batch=2), 1)])
def test_no_pass_is_paid_for_that_nobody_reads(root, tmp_path, monkeypatch, flags, passes):
    scored, bar = spy(monkeypatch, "score"), []
    monkeypatch.setattr(antisd.tqdm, "set_postfix_str", lambda self, text: bar.append(text))
    run(root, tmp_path, **flags)
    assert len(scored) == passes
    assert all(("H_T" in text) == (flags["method"] != "grpo") for text in bar) and bar


def test_rollouts_of_a_step_are_drawn_at_the_flags_temperature(root, tmp_path, monkeypatch):
    """So cold that it is greedy."""
    rolled = spy(monkeypatch, "roll_out")
    run(root, tmp_path, method="grpo", temperature=1e-4)
    model = AutoModelForCausalLM.from_pretrained(root / "qwen3")
    for r in rolled[0][1]:
        assert r.ids == cut(argmax_decode(model, r.problem["prompt"], 12), [END])


def test_warm_up_steps_are_grpos_bit_for_bit_and_the_next_one_is_not(root, tmp_path):
    runs = {"grpo": dict(method="grpo"), "warm": dict(warmup_steps=5), "past": dict(warmup_steps=2)}
    rows = {name: run(root, tmp_path / name, steps=3, **flags) for name, flags in runs.items()}
    grpo, warm, past = (weights(tmp_path / name / "model") for name in runs)
    assert same(grpo, warm) and not same(grpo, past) and not same(grpo, weights(root / "qwen3"))
    assert [r["lam"] for r in rows["warm"]] == [0, 0, 0]
    assert [r["lam"] for r in rows["past"]] == [0, 0, 0.5] or rows["past"][2]["gate"] == 0
    assert all(r["teacher_entropy"] > 0 for r in rows["warm"])    # H is measured all the same


@pytest.mark.parametrize("key, flags", [
    ("teacher_entropy", {}), ("teacher_entropy_median", dict(gate_stat="median")),
    ("student_entropy", dict(gate_source="student"))])
def test_lambda_follows_the_gate_on_the_logged_entropy_of_the_same_step(root, tmp_path, key, flags):
    rows = run(root, tmp_path, steps=5, warmup_steps=1, tau_down=0.99, lam=0.7, lr=1e-2, seed=3,
               **flags)
    gate = antisd.EntropyGate(1, 0.99)
    for row in rows:
        g = gate.update(row[key])
        assert row["lam"] == 0.7 * g and row["h_warm"] == pytest.approx(gate.h_warm)
    assert {row["lam"] for row in rows[1:]} == {0.0, 0.7}    # with this seed it is open, then shut


def strip(rows):
    """Without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "peak_memory_gib")
             and not k.startswith("seconds")} for row in rows]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(root, tmp_path):
    """The gate is resumed in its warm-up; a step done after the checkpoint is done once more."""
    flags = dict(warmup_steps=3, sample_every=1, updates_per_batch=2)
    run(root, tmp_path / "whole", steps=4, **flags)
    run(root, tmp_path / "parts", steps=3, save_every=2, **flags)
    names = [path.name for path in antisd.checkpoints(tmp_path / "parts")]
    assert names == ["step-000002", "step-000003"]
    (tmp_path / "parts/checkpoints/step-000003").rename(tmp_path / "gone")
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')                   # a kill cut this line
    run(root, tmp_path / "parts", steps=4, save_every=2, resume=True, **flags)
    assert same(weights(tmp_path / "whole/model"), weights(tmp_path / "parts/model"))
    for name in "metrics.jsonl", "samples.jsonl":
        whole, parts = read(tmp_path / "whole" / name), read(tmp_path / "parts" / name)
        assert strip(whole) == strip(parts)
    assert [row["step"] for row in read(tmp_path / "parts/metrics.jsonl")] == [0, 1, 2, 3]


def test_sigterm_saves_and_resume_continues_bit_for_bit(root, tmp_path, monkeypatch):
    flags = dict(steps=3, warmup_steps=1)
    run(root, tmp_path / "whole", **flags)
    rolled = spy(monkeypatch, "roll_out")
    original = antisd.group_advantages

    def interrupted(*args):
        if len(rolled) == 3:                             # in the middle of the last step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    monkeypatch.setattr(antisd, "group_advantages", interrupted)
    run(root, tmp_path / "parts", **flags)
    assert len(rolled) == 3 and not (tmp_path / "parts/model").exists()
    assert [p.name for p in antisd.checkpoints(tmp_path / "parts")] == ["step-000002"]
    run(root, tmp_path / "parts", resume=True, **flags)
    assert same(weights(tmp_path / "whole/model"), weights(tmp_path / "parts/model"))


def test_gradient_checkpointing_recomputes_the_layers(root, tmp_path, monkeypatch):
    """That it changes no result is the case "recomputed layers" above."""
    forwards = {}
    for recompute in (False, True):
        count = forwards.setdefault(recompute, [])
        layer = type(AutoModelForCausalLM.from_pretrained(root / "qwen3").model.layers[0].mlp)
        original = layer.forward
        monkeypatch.setattr(layer, "forward", lambda self, x: (
            torch.is_grad_enabled() and count.append(1), original(self, x))[1])
        run(root, tmp_path / str(recompute), gradient_checkpointing=recompute, **NO_WARMUP)
        monkeypatch.undo()
    assert len(forwards[True]) == 2 * len(forwards[False]) > 0


def test_two_checkpoints_are_kept_and_a_damaged_one_is_refused_with_the_older_named(root, tmp_path):
    flags = dict(steps=3, save_every=1)
    run(root, tmp_path, **flags)
    older, newest = antisd.checkpoints(tmp_path)
    assert (older.name, newest.name) == ("step-000002", "step-000003")
    shard = next(newest.glob("__0_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1                      # one bit
    shard.write_bytes(content)
    with pytest.raises(antisd.InputError, match="damaged.*step-000002"):
        run(root, tmp_path, **flags | dict(steps=4, resume=True))


def test_a_run_stopped_before_its_first_update_resumes_bit_for_bit(root, tmp_path, monkeypatch):
    """Saving makes AdamW's state, which does not exist yet, and must not make it a step older."""
    flags = dict(steps=2, lr=1e-2)
    run(root, tmp_path / "whole", **flags)
    original = antisd.group_advantages

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    with monkeypatch.context() as patch:
        patch.setattr(antisd, "group_advantages", interrupted)
        antisd.train(config(root, output=str(tmp_path / "parts"), **flags))
    assert [p.name for p in antisd.checkpoints(tmp_path / "parts")] == ["step-000000"]
    whole = tmp_path / "parts/checkpoints/step-000000/progress.json"
    saved = whole.stat().st_mtime_ns
    with monkeypatch.context() as patch:                 # stopped at once again: nothing to redo
        patch.setattr(antisd, "group_advantages", interrupted)
        antisd.train(config(root, output=str(tmp_path / "parts"), resume=True, **flags))
    assert whole.stat().st_mtime_ns == saved
    run(root, tmp_path / "parts", resume=True, **flags)
    assert same(weights(tmp_path / "whole/model"), weights(tmp_path / "parts/model"))


def test_init_from_keeps_weights_and_data_position_and_starts_step_and_gate_anew(root, tmp_path,
                                                                                 monkeypatch):
    run(root, tmp_path / "first", warmup_steps=1, steps=2, save_every=2, lr=1e-2)
    asked = spy(monkeypatch, "next_problems")
    rows = run(root, tmp_path / "antisd", init_from=str(tmp_path / "first"), lr=0.0,
               weight_decay=0.0, warmup_steps=1)
    assert same(weights(tmp_path / "first/model"), weights(tmp_path / "antisd/model"))
    assert [args[1] for args, _ in asked] == [8]         # 2 steps x 4 problems were used up
    assert rows[0]["step"] == 0 and rows[0]["h_warm"] == pytest.approx(rows[0]["teacher_entropy"])


def test_a_full_disk_costs_one_checkpoint_and_one_line(root, tmp_path, monkeypatch, capsys):
    """A real write error: this process may write files of at most 4 KB while step 2 is saved."""
    original, limits = antisd.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(output, policy, optimizer, now, keep):
        if now["step"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            original(output, policy, optimizer, now, keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(antisd, "save_checkpoint", on_a_full_disk)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run(root, tmp_path, steps=3, save_every=1)
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000003"]       # and nothing half-written
    lines = [line for line in capsys.readouterr().out.splitlines() if "no checkpoint" in line]
    assert len(lines) == 1 and "step 2" in lines[0]


def test_three_updates_that_are_not_finite_stop_the_run_with_the_state_saved(root, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(root / "qwen3", dtype="auto")
    with torch.no_grad():
        next(model.parameters())[END] = float("nan")     # END stands in every prompt
    model.save_pretrained(tmp_path / "poisoned")
    TOKENIZER.save_pretrained(tmp_path / "poisoned")
    with pytest.raises(antisd.InputError, match="three updates.*up to step 2.*checkpoint: none"):
        run(root, tmp_path / "run", model=str(tmp_path / "poisoned"), steps=9, sample_every=1)
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [1, 2, 3]
    assert [path.name for path in antisd.checkpoints(tmp_path / "run")] == ["step-000003"]
    for name in "metrics.jsonl", "samples.jsonl":
        assert "NaN" not in (tmp_path / "run" / name).read_text()    # JSON has null


def test_a_run_goes_on_with_another_number_of_ranks(root, tmp_path):
    flags = dict(save_every=1, lr=1e-2)
    run(root, tmp_path / "run", steps=2, **flags)
    changed = {k: v for k, v in dataclasses.asdict(config(root, **flags)).items()
               if v != getattr(antisd.Config(model="m"), k)}
    words = [word for k, v in changed.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "antisd.py", *words, "--output", str(tmp_path / "run"), "--resume"]
    for steps in "2", "3":                               # as it was; then a step on two ranks
        shutil.copytree(tmp_path / "run/model", tmp_path / f"one-{steps}")
        ended = subprocess.run([*command, "--steps", steps], cwd=HERE, capture_output=True,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert same(weights(tmp_path / f"one-{steps}"), weights(tmp_path / "run/model")) == (
            steps == "2")
    shutil.copytree(tmp_path / "run/model", tmp_path / "two")
    run(root, tmp_path / "run", steps=3, resume=True, **flags)       # exports what it loaded
    assert same(weights(tmp_path / "two"), weights(tmp_path / "run/model"))
    assert [row["step"] for row in read(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]


def test_records_of_a_run_are_complete_and_valid_json(root, tmp_path):
    nasty = NASTY + " \u2028 \" \' </s>"
    data = write(tmp_path / "nasty.jsonl", [{"problem": nasty, "answer": "1", "solution": nasty}])
    rows = run(root, tmp_path / "run", dataset=data, eval_dataset=str(root / "train.jsonl"),
               steps=2, sample_every=1, warmup_lr_steps=4)
    assert [row["step"] for row in rows] == [0, 1, 2]    # the last one is the evaluation at the end
    for row in rows[:2]:
        assert set(KEYS) <= set(row)
    assert [row["lr"] for row in rows[:2]] == pytest.approx([0.25e-3, 0.5e-3])
    assert ["eval_accuracy" in row for row in rows] == [True, False, True]
    assert rows[0]["eval_problems"] == 7
    samples = read(tmp_path / "run/samples.jsonl")
    assert {row["problem"] for row in samples} == {nasty} and {r["step"] for r in samples} == {0, 1}
    for row in samples:
        assert len(row["tokens"]) == len(row["u"]) == len(row["teacher_entropy"])
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["flags"]["warmup_lr_steps"] == 4 and record["source"] and record["versions"]


def test_export_is_the_checkpoints_own_kind_of_folder(root, tmp_path):
    """bfloat16 and tied goes in, trains in float32 still tied, and comes out so, with the
    generation settings that rollouts had to ignore."""
    folder = save(hostile(tiny()).bfloat16(), tmp_path / "bf16")
    cfg = config(root, model=folder, output=str(tmp_path / "run"), **NO_WARMUP)
    policy, optimizer, _ = antisd.build(cfg, TOKENIZER, CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(
        map(id, policy.parameters()))
    antisd.train(cfg)
    out = tmp_path / "run/model"
    trained, before = weights(out), weights(folder)
    assert {v.dtype for v in trained.values()} == {torch.bfloat16}
    assert not torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.top_k, settings.repetition_penalty, settings.eos_token_id) == (2, 5.0, END)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE


def test_compute_in_bfloat16_is_close_but_master_weights_are_float32(root):
    scores = []
    for dtype in "float32", "bfloat16":
        policy, _, _ = antisd.build(config(root, dtype=dtype), TOKENIZER, CPU)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        scores.append(antisd.score(policy, [[3, 5, 8]], [list(range(20, 40))], 10**6)[0])
    assert scores[1].dtype == torch.float32
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.5


@pytest.mark.skipif(not (HERE / "toy/model").exists(), reason="toy/ is not made yet")
def test_the_embedded_default_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    antisd.train(antisd.parse_config(["@toy/demo.args", "--steps", "1", "--eval_dataset", "",
                                      "--max_tokens", "16", "--output", str(tmp_path / "run")]))
    assert math.isfinite(read(tmp_path / "run/metrics.jsonl")[0]["loss"])


# ------------------------------------------------------------------------------------------------
# Two ranks: torchrun starts this file, which ends in worker()
# ------------------------------------------------------------------------------------------------

KINDS = ["qwen3", "qwen3_moe", "olmo3", "llama"]


def greedy_evaluation(root):
    cfg = config(root, eval_temperature=0.0, eval_samples=1)
    policy, _, _ = antisd.build(cfg, TOKENIZER, CPU)
    problems = antisd.prepare(cfg, 1)[1]
    return [antisd.evaluate(policy, TOKENIZER, problems[:n], cfg) for n in EVALUATED]


def sharded_rollouts(root):
    """Greedy, with weights that stay split, and by continuous batching: one prompt on rank 0, three
    on rank 1, all of other lengths -> (expected, [rank 0's, rank 1's], the same)."""
    model = AutoModelForCausalLM.from_pretrained(root / "qwen3").eval()
    references = [argmax_decode(model, prompt, 20) for prompt in PROMPTS]
    ends, _ = spread_ends(references, stride=6)
    policy, _, _ = antisd.build(config(root, model=str(root / "qwen3")), TOKENIZER, CPU)
    policy.eos_ids = ends
    mine = PROMPTS[1:] if dist.get_rank() else PROMPTS[:1]
    assert any(isinstance(p, torch.distributed.tensor.DTensor) for p in policy.parameters())
    split = ids_of(antisd.sample(policy, mine, 1, 20, 0, rollout_batch=1, sharded=True, stride=6))
    with antisd.gathered(policy):                        # ranks with one and with three prompts
        paged = ids_of(antisd.sample_paged(policy, mine, 1, 20, 0, rollout_batch=4))
    return [cut(row, ends) for row in references], antisd.gather(split), antisd.gather(paged)


EVALUATED = (7, 1)                                       # with 1, the second rank has none


def worker(root):
    """Everything that needs two processes, in one launch; rank 0 leaves the results in root."""
    torch.set_num_threads(1)
    antisd.setup()
    results = {name: run_case(root, name) for name in CASES if name != "two updates"}
    results["evaluation"] = greedy_evaluation(root)
    results["sharded"] = sharded_rollouts(root)
    rolled, original = [], antisd.roll_out

    def kept(*args, **options):
        rolled.append(original(*args, **options))
        return rolled[-1]
    antisd.roll_out = kept
    for kind in KINDS:
        antisd.train(config(root, model=str(root / kind), output=str(root / "two" / kind),
                            **NO_WARMUP))
    rolled.clear()
    antisd.train(config(root, output=str(root / "two/gate"), steps=3, warmup_steps=1,
                        gate_stat="median", save_every=2, seed=3))
    results["drawn"] = antisd.gather([[(r.problem["id"], r.ids) for r in rows] for rows in rolled])
    if dist.get_rank() == 0:
        torch.save(results, root / "two.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(root):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", __file__, str(root)]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(root / "two.pt")


@pytest.mark.parametrize("name", [name for name in CASES if name != "two updates"])
def test_two_ranks_equal_one(root, two_ranks, name):
    found, expected = two_ranks[name], run_case(root, name)
    assert_equal_updates(found, expected, weights(case_config(root, name).model))
    assert found["median"] == pytest.approx(expected["median"], rel=1e-5)
    assert found["summary"] == pytest.approx(expected["summary"], rel=1e-4, abs=1e-6)


def test_evaluation_does_not_depend_on_the_ranks(root, two_ranks):
    expected = greedy_evaluation(root)
    for found, one in zip(two_ranks["evaluation"], expected, strict=True):
        assert found == pytest.approx(one)
    assert [e["eval_problems"] for e in expected] == list(EVALUATED)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains_a_step_on_two_ranks(root, two_ranks, kind):
    [row] = read(root / "two" / kind / "metrics.jsonl")
    assert math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf
    before, after = weights(root / kind), weights(root / "two" / kind / "model")
    assert before.keys() == after.keys()
    assert all(torch.isfinite(v).all() for v in after.values()) and not same(before, after)


def test_the_gate_reads_the_global_batch(root, two_ranks):
    rows = read(root / "two/gate/metrics.jsonl")
    gate = antisd.EntropyGate(1)
    for row in rows:
        assert row["lam"] == 0.5 * gate.update(row["teacher_entropy_median"])
        assert row["h_warm"] == pytest.approx(gate.h_warm)


@pytest.mark.parametrize("sampler", ["sharded", "paged"])
def test_uneven_lengths_on_two_ranks(two_ranks, sampler):
    expected, *drawn = two_ranks["sharded"]
    first, second = drawn[sampler == "paged"]
    assert (len(first), len(second)) == (1, 3) and len({len(row) for row in expected}) > 2
    assert first + second == expected


def test_ranks_share_out_the_problems_and_draw_different_responses(root, two_ranks):
    ids = [p["id"] for p in antisd.load_problems(str(root / "train.jsonl"))]
    for step in range(3):
        rows = [row for rank in two_ranks["drawn"] for row in rank[step]]
        expected = antisd.next_problems(ids, 4 * step, 4, seed=3)
        assert [i for i, _ in rows] == [i for i in expected for _ in range(2)]
        assert len({tuple(tokens) for _, tokens in rows}) > 6
        lengths = [sum(len(t) for _, t in rank[step]) for rank in two_ranks["drawn"]]
        assert step or lengths[0] != lengths[1]          # uneven decoding did not hang


# ------------------------------------------------------------------------------------------------
# eval.py: accuracy
# ------------------------------------------------------------------------------------------------

EVAL = [sys.executable, str(Path(evaluation.__file__)), "--max_tokens", "8", "--samples", "4",
        "--rollout_batch", "2"]


def eval_config(root, output, **flags):
    small = dict(model=str(root / "qwen3"), data=str(root / "train.jsonl"), max_tokens=8, samples=4,
                 rollout_batch=6, output=str(output))
    return evaluation.EvalConfig(**small | flags)


def keys(rows):
    return [(r["benchmark"], r["problem_id"], r["sample"]) for r in rows]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_equals_enumeration_of_all_draws(n):
    for c in range(n + 1):
        marks = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(marks, k))
            expected = sum(map(any, draws)) / len(draws)
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_refuses_what_it_cannot_estimate_and_survives_big_counts():
    for n, c, k in (4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(n, c, k)
    assert evaluation.pass_at_k(100_000, 50_000, 1) == 0.5
    assert evaluation.pass_at_k(20_000, 1, 19_999) == pytest.approx(0.99995, abs=1e-12)


def test_results_equal_a_recount_by_hand(root, tmp_path):
    out = tmp_path / "out"
    evaluation.measure(eval_config(root, out, max_tokens=48, model=str(root / "llama")))
    rows = read(out / "responses.jsonl")
    result = json.loads((out / "results.json").read_text())["results"]["train"]
    assert keys(rows) == [("train", i, j) for i in range(7) for j in range(4)]
    answers = [str(i % 2) for i in range(7)]
    for r in rows:                                       # the grader has tests of its own
        assert r["correct"] == antisd.is_correct(r["response"], answers[r["problem_id"]])
        assert 1 <= r["tokens"] <= 48 and (not r["truncated"] or r["tokens"] == 48)
    counts = [sum(r["correct"] for r in rows if r["problem_id"] == i) for i in range(7)]
    assert 0 < sum(counts) < 28 and 0 < sum(r["truncated"] for r in rows) < 28
    means = [c / 4 for c in counts]
    mean = sum(means) / 7
    variance = sum((m - mean)**2 for m in means) / 6
    assert (result["n"], result["k"]) == (7, 4)
    assert result["accuracy"] == pytest.approx(mean) == result["pass"]["1"]
    assert result["error"] == pytest.approx((variance / 7)**0.5)
    assert result["pass"]["4"] == pytest.approx(sum(c > 0 for c in counts) / 7)
    assert result["pass"]["2"] == pytest.approx(
        sum(1 - (4 - c) * (3 - c) / 12 for c in counts) / 7)
    assert list(result["pass"]) == ["1", "2", "4"]
    complete = [r["correct"] for r in rows if not r["truncated"]]
    assert result["accuracy_complete"] == pytest.approx(sum(complete) / len(complete))
    assert result["truncated"] == pytest.approx(1 - len(complete) / 28)
    boxes = [antisd.extract_boxed(r["response"]) for r in rows]
    assert result["no_answer"] == pytest.approx(boxes.count(None) / 28) and None in boxes
    assert result["length"] == pytest.approx(sum(r["tokens"] for r in rows) / 28)


def test_the_average_row_weighs_benchmarks_alike():
    def row(problem, correct):
        return {"problem_id": problem, "correct": correct, "truncated": False, "response": "",
                "tokens": 10, "seconds": 1.0}
    a = evaluation.summarise([row(0, True), row(0, True), row(1, False), row(1, True)], 2)
    b = evaluation.summarise([row(i, i == 0) for i in range(4)], 1)
    both = evaluation.average([a, b])
    assert both["accuracy"] == pytest.approx((0.75 + 0.25) / 2)
    assert both["error"] == pytest.approx((0.25**2 + 0.25**2)**0.5 / 2)
    assert both["pass"] == {1: pytest.approx(0.5)} and a["tokens_per_s"] == 10
    text = evaluation.table({"a": a, "b": b, "average": both}).splitlines()
    assert len(text) == 4 and "75.0 +- 25.0" in text[1] and "pass@2" in text[0]


def test_plan_holds_every_pair_once_and_keeps_every_rank_busy():
    sets = {"x": ([{"id": i} for i in range(30)], 32), "y": ([{"id": 0}], 1)}
    plan = evaluation.chunks(sets, 8, 64)
    pairs = sum(plan, [])
    assert len(pairs) == len(set(pairs)) == 961
    shares = [sum(map(len, plan[:-1][rank::8])) for rank in range(8)]
    assert set(shares) == {120} and max(map(len, plan)) <= 64
    assert {j for _, _, j in plan[0]} <= {0, 1}          # a round over all problems comes first


def test_greedy_is_one_sample_and_prompts_are_the_trainers(root, tmp_path, monkeypatch):
    seen = spy(monkeypatch, "sample")
    evaluation.measure(eval_config(root, tmp_path / "out", samples=0, temperature=0.0))
    rows = read(tmp_path / "out" / "responses.jsonl")
    assert [r["sample"] for r in rows] == [0] * 7
    prompts = [p for args, result in seen for p in args[1]]
    assert prompts == [antisd.render(TOKENIZER, antisd.student_messages(p["problem"]), {})
                       for p in antisd.load_problems(root / "train.jsonl")]


def test_samples_differ_between_chunks_and_follow_the_seed(root, tmp_path):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        evaluation.measure(eval_config(root, tmp_path / str(i), rollout_batch=7, seed=seed))
        rows = read(tmp_path / str(i) / "responses.jsonl")
        found.append([tuple(r["response"] for r in rows if r["sample"] == j) for j in range(4)])
    assert found[0] == found[1] and len({*found[0], *found[2]}) == 8     # a chunk is a sample here


def test_a_half_written_line_is_dropped_and_the_rest_stays_as_it_was(root, tmp_path):
    out, cfg = tmp_path / "out", eval_config(root, tmp_path / "out")
    evaluation.measure(cfg)
    whole = (out / "responses.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # what a kill may leave: rank 1's part, lines twice, one cut short in the middle of a chunk
    (out / "responses.jsonl").write_bytes(b"".join(lines[:5] + lines[2:4]) + lines[9][:40])
    (out / "responses.1.jsonl").write_bytes(b"".join(lines[20:26]) + lines[26][:-1])
    kept = lines[:5] + lines[20:26]
    evaluation.measure(cfg)
    rows = read(out / "responses.jsonl")
    assert without_seconds(rows) == without_seconds(list(map(json.loads, lines)))
    assert all(line.decode() in (out / "responses.jsonl").read_text() for line in kept)
    assert sorted(p.name for p in out.iterdir()) == [".lock", "responses.jsonl", "results.json"]


def test_killed_at_any_time_the_same_command_ends_with_the_same_responses(root, tmp_path):
    out, calm = tmp_path / "out", tmp_path / "calm"
    flags = [*EVAL[2:], "--model", str(root / "qwen3"), "--data", str(root / "train.jsonl"),
             "--samples", "12"]

    def lines():
        return sum(f.read_bytes().count(b"\n") for f in out.glob("responses*.jsonl"))

    process = subprocess.Popen([*EVAL[:2], *flags, "--output", str(out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while lines() < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < lines() < 84
    for folder in out, calm:
        evaluation.measure(eval_config(root, folder, samples=12, rollout_batch=2))
    found, expected = (read(folder / "responses.jsonl") for folder in (out, calm))
    assert keys(found) == [("train", i, j) for i in range(7) for j in range(12)]
    assert without_seconds(found) == without_seconds(expected)


def test_two_ranks_answer_the_same_pairs_and_a_busy_folder_is_refused(root, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(29000 + os.getpid() % 900), EVAL[1], *EVAL[2:], "--model",
               str(root / "qwen3"), "--data", str(root / "train.jsonl"), "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("avg@k") == 1               # rank 0 alone prints
    rows = read(out / "responses.jsonl")
    assert keys(rows) == [("train", i, j) for i in range(7) for j in range(4)]
    assert not list(out.glob("responses.*.jsonl"))
    cfg = eval_config(root, out)
    sets = evaluation.load_sets(cfg, TOKENIZER, 512)
    head, answered, lock = evaluation.open_output(cfg, sets, out)
    assert len(answered) == 28
    with pytest.raises(antisd.InputError, match="another eval.py is at work"):
        evaluation.open_output(cfg, sets, out)


@pytest.mark.parametrize("flags, name", [
    ({"temperature": 1.0}, "temperature"), ({"seed": 1}, "seed"), ({"samples": 5}, "samples"),
    ({"max_tokens": 9}, "max_tokens"), ({"limit": 3}, "limit")])
def test_changed_settings_are_refused_and_named(root, tmp_path, flags, name):
    evaluation.measure(eval_config(root, tmp_path / "out", rollout_batch=28))
    before = (tmp_path / "out" / "responses.jsonl").read_bytes()
    with pytest.raises(antisd.InputError, match=f"other settings .*{name}"):
        evaluation.measure(eval_config(root, tmp_path / "out", **flags))
    assert (tmp_path / "out" / "responses.jsonl").read_bytes() == before
    evaluation.measure(eval_config(root, tmp_path / "out", rollout_batch=3))    # not a setting


def test_another_model_or_other_rows_under_the_same_name_are_noticed(root, tmp_path):
    model, data = save(tiny(), tmp_path / "model"), write(tmp_path / "rows.jsonl", [
        {"problem": "a", "answer": "1"}])
    flags = dict(model=model, data=data, output=str(tmp_path / "out"))
    evaluation.measure(eval_config(root, **flags))
    save(tiny(seed=1), tmp_path / "model")
    with pytest.raises(antisd.InputError, match="model_hash"):
        evaluation.measure(eval_config(root, **flags))
    save(tiny(), tmp_path / "model")
    write(tmp_path / "rows.jsonl", [{"problem": "a", "answer": "0"}])
    with pytest.raises(antisd.InputError, match="data_hash"):
        evaluation.measure(eval_config(root, **flags))


def test_a_benchmark_of_another_size_is_an_error_that_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "b.jsonl", [{"problem": f"p{i}", "answer": "1"} for i in range(5)])
    monkeypatch.setitem(evaluation.BENCHMARKS, "aime24",
                        evaluation.Benchmark(path, "train", 6, 32))
    with pytest.raises(antisd.InputError, match="aime24 .* has 5 problems instead of 6"):
        evaluation.load_benchmark("aime24")
    monkeypatch.setitem(evaluation.BENCHMARKS, "aime24",
                        evaluation.Benchmark(path, "train", 5, 32))
    assert len(evaluation.load_benchmark("aime24")) == 5


def test_benchmarks_are_the_papers():
    table = {name: (b.rows, b.samples) for name, b in evaluation.BENCHMARKS.items()}
    assert table == {"aime24": (30, 32), "aime25": (30, 32), "aime26": (30, 32), "hmmt25": (30, 32),
                     "minerva": (272, 4), "math500": (500, 4), "gsm8k": (1319, 1),
                     "amc23": (40, 32)}


@pytest.mark.parametrize("argv, text", [
    ([], "--model is required"), (["--model", "m"], "name --benchmarks or --data"),
    (["--model", "m", "--benchmarks", "aime24,imo"], "imo: choose from aime24"),
    (["--model", "m", "--data", "d", "--temperature", "0", "--samples", "2"], "one sample"),
    (["--model", "m", "--data", "d", "--top-p", "0"], "--top_p"),
    (["--model", "m", "--data", "d", "--chat-template-kwargs", "[]"], "JSON object"),
    (["--model", "m", "--data", "d", "--pmi", "--temperature", "0"], "--pmi"),
    (["--model", "m", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["--curves", "/no/such/run"], "no such folder"), (["--curves", "/"], "no config.json"),
])
def test_eval_errors_are_one_line_and_code_2(argv, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)     # the tests' own group
    with pytest.raises(SystemExit) as end:
        antisd.main(evaluation.run)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(error) == 1
    assert error[0].startswith("eval.py: error: ") and text in error[0]


def test_a_prompt_beyond_the_context_is_an_error_not_a_dropped_problem(root, tmp_path):
    with pytest.raises(antisd.InputError, match="train: problem 0 .* context of 512"):
        evaluation.measure(eval_config(root, tmp_path / "out", max_tokens=500))


# ------------------------------------------------------------------------------------------------
# eval.py: the pages
# ------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text of every response."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.responses, self.depth = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "div":
            self.depth = self.depth + 1 if self.depth else int(("class", "y") in attributes)
            if self.depth == 1:
                self.responses.append("")

    def handle_endtag(self, tag):
        self.depth -= tag == "div" and self.depth > 0

    def handle_data(self, data):
        if self.depth:
            self.responses[-1] += data


def test_pmi_page_escapes_everything_fetches_nothing_and_counts_right():
    evil = ["<script>", "alert('x')", "</script>", '"><img src=http://a.b/c onerror=f>', "&amp;",
            "\n"]
    u = torch.tensor([-5.0, -1.0, 0.0, 0.5, 2.0, -3.0])
    s = torch.full((6,), -6.0)
    values = torch.stack([s.exp(), (s + u).exp(), u, -antisd.phi(u), s.abs(), s.abs()], 1)
    r = antisd.Rollout({"id": 3}, list(range(6)), "", False, 1.0)
    text = evaluation.pmi_page([r, r], [evil, evil], [values, values], ["sibling", "answer"],
                               ["<b>c</b>"] * 2, "<i>model</i>")
    page = Page(text)
    assert page.responses == ["".join(evil).replace("\n", "\u21b5\n")] * 2
    assert [tag for tag, _ in page.tags].count("script") == 1 and "<img" not in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    assert "<b>c</b>" not in text and "<i>model</i>" not in text
    shown = [found["data-t"].split() for tag, found in page.tags if "data-t" in found]
    assert shown[0] == ["0.00248", "1.67e-05", "-5.00", "+0.343", "6.00", "6.00"]
    classes = [attributes["class"] for _, attributes in page.tags if "data-t" in attributes]
    assert classes[:6] == ["n8", "n2", "", "p1", "p4", "n6"]
    assert "<b>50.0%</b><span>have u" in text and "<b>16.7%</b><span>at the cap" in text
    assert "problem 3, correct" in text.lower()


def test_cap_is_where_the_advantage_has_reached_95_percent_of_its_bound():
    at = torch.tensor(evaluation.CAP_U, dtype=torch.float64)
    assert (-antisd.phi(at)).item() == pytest.approx(0.95 * math.log(2) / 2)


def test_pmi_scores_are_the_trainers(root, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(evaluation, "pmi_page", lambda *args: made.update(args=args) or "page")
    evaluation.view_pmi(eval_config(root, tmp_path / "p" / "x.html", pmi=True, limit=2,
                                    temperature=None, top_p=None))
    assert (tmp_path / "p" / "x.html").read_text() == "page"
    rollouts, tokens, values, sources, views, heading = made["args"]
    assert len(rollouts) == 8 and "temperature 1, top-p 1" in heading
    model = tiny()
    for r, words_, rows, view in zip(rollouts, tokens, values, views):
        teacher = TOKENIZER(view, add_special_tokens=False)["input_ids"]
        s, entropy_s = brute_force(model, r.problem["prompt"], r.ids)
        assert rows.shape == (len(r.ids), 6) and len(words_) == len(r.ids)
        torch.testing.assert_close(rows[:, 0].double(), s.exp(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rows[:, 4].double(), entropy_s, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rows[:, 3], -antisd.phi(rows[:, 2]))
        torch.testing.assert_close(rows[:, 2], rows[:, 1].log() - rows[:, 0].log(), atol=1e-4,
                                   rtol=1e-4)
        if TOKENIZER.decode(teacher) == view:            # phrases of two words re-encode otherwise
            t, entropy_t = brute_force(model, teacher, r.ids)
            if "\\boxed" not in view.split("attempt:")[-1]:
                torch.testing.assert_close(rows[:, 1].double(), t.exp(), atol=1e-5, rtol=1e-4)
    assert set(sources) <= {"sibling", "solution", "answer"}


def test_pieces_join_to_the_text_even_where_a_character_is_several_tokens():
    tokens = list("a\u00e9\U0001f389 b".encode())

    class Bytes:
        def decode(self, ids, **kwargs):
            return bytes(ids).decode(errors="replace")

    found = evaluation.pieces(Bytes(), tokens)
    assert len(found) == len(tokens)
    assert "".join(found).replace("\ufffd", "") == "a\u00e9\U0001f389 b"


def metrics_of(folder, method, curve, seed=0, **flags):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(
        {"flags": {"method": method, "seed": seed, "output": str(folder), **flags}}))
    write(folder / "metrics.jsonl", [
        {"step": step, "reward": value, "eval_accuracy": value if step % 2 == 0 else None,
         "length": 10.0, "student_entropy": 0.5, "lam": 0.0, "gate": 1.0 - (step == 3),
         "h_warm": 0.4 if method != "grpo" else None,
         "teacher_entropy": 0.5 if method != "grpo" else None} for step, value in enumerate(curve)]
        + [{"step": len(curve), "eval_accuracy": curve[-1], "eval_error": 0.0}])   # eval keys alone
    return str(folder)


def test_curves_table_speed_up_and_picture_by_hand(tmp_path, capsys):
    runs = [metrics_of(tmp_path / "a0", "antisd", [.1, 0, .5, 0, .7, 0, .6, 0]),
            metrics_of(tmp_path / "a1", "antisd", [.1, 0, .3, 0, .9, 0, .8, 0], seed=1),
            metrics_of(tmp_path / "g0", "grpo", [.1, 0, .2, 0, .3, 0, .4, 0]),
            metrics_of(tmp_path / "s0", "sd", [.1, 0, .05, 0, .0, 0, .0, 0])]
    rows = evaluation.compare(evaluation.load_runs(runs))
    assert list(rows) == ["grpo", "antisd", "sd"]        # the baseline first
    # GRPO's best is 0.4 at step 6; the seeds of antisd average 0.1, 0.4, 0.8 at steps 0, 2, 4
    assert rows["grpo"]["best"] == (.4, None) and rows["grpo"]["best_step"] == 6
    assert rows["grpo"]["final"] == (0.0, None) and rows["grpo"]["speed_up"] == 1.0
    assert rows["grpo"]["best_gap"] is None and rows["grpo"]["gate"] is None
    assert rows["antisd"]["best"] == pytest.approx((.8, .02 ** .5))          # .7 and .9
    assert rows["antisd"]["best_step"] == 4 and rows["antisd"]["before"] == pytest.approx((.1, 0))
    # grpo has seed 0 only, so one pair: .7 - .4 at the best steps, 0 - 0 at the end
    assert rows["antisd"]["best_gap"] == (pytest.approx(.3), None)
    assert rows["antisd"]["final_gap"] == (0.0, None)
    # over steps 0 to 8: (.1 + .5 + .7 + .6 + 0) / 5 and .42; only seed 0 has a grpo run, of .2
    assert rows["antisd"]["mean"] == pytest.approx((.4, .02 * 2 ** .5))
    assert rows["antisd"]["mean_gap"] == (pytest.approx(.18), None)
    assert rows["antisd"]["length"] == 10 and rows["antisd"]["gate"] == 6 / 7
    assert rows["antisd"]["seeds"] == 2 and rows["antisd"]["speed_up"] == pytest.approx(6 / 2)
    assert rows["sd"]["speed_up"] is None
    evaluation.draw_curves(evaluation.EvalConfig(curves=runs, output=str(tmp_path / "c.svg")))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("antisd"))
    assert re.split("  +", line)[:7] == ["antisd", "2", "10.0 +- 0.0", "80.0 +- 14.1", "4",
                                         "+30.0", "0.0 +- 0.0"]
    svg = (tmp_path / "c.svg").read_text()
    xml.dom.minidom.parseString(svg)
    assert svg.count('class="band') == 6 and svg.count('class="warm') == 2    # 2 seeds; 2 gated
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_paired_difference_by_hand_and_two_runs_of_one_seed():
    mean, error = evaluation.paired({1: .5, 2: .7, 3: .9}, {1: .4, 2: .3, 9: .0})
    assert mean == pytest.approx(.25) and error == pytest.approx(.15)    # gaps .1 and .4
    assert evaluation.paired({1: .5}, {2: .5}) is None


def test_one_arm_takes_each_seed_once(tmp_path):
    runs = [metrics_of(tmp_path / name, "grpo", [.1]) for name in "ab"]
    with pytest.raises(antisd.InputError, match="two runs of grpo have seed 0"):
        evaluation.load_runs(runs)


def test_arms_differ_by_method_or_flags_but_not_by_seed(tmp_path):
    runs = [metrics_of(tmp_path / str(i), "antisd", [.1], seed=i, tau_down=tau, lam=.5)
            for i, tau in enumerate((.93, .93, 0))]
    assert {arm: len(part) for arm, part in evaluation.load_runs(runs).items()} == {
        "antisd": 2, "antisd tau_down=0": 1}


def test_the_baseline_is_grpo_from_the_start(tmp_path):
    runs = [metrics_of(tmp_path / "a", "grpo", [.9], init_from="runs/b"),
            metrics_of(tmp_path / "b", "grpo", [.1]), metrics_of(tmp_path / "c", "antisd", [.5])]
    rows = evaluation.compare(evaluation.load_runs(runs))
    assert rows["antisd"]["best_gap"][0] == pytest.approx(.4)
    assert rows["grpo init_from=run"]["best_gap"][0] == pytest.approx(.8)


def test_the_labs_table_of_tokens_by_hand():
    sys.path.insert(0, str(HERE / "toy"))
    import lab
    tokens = "start with 3 wait B 2 makes 0 so the answer is \\boxed{ 0 }".split()
    u = [0.0] * len(tokens)
    u[3], u[5], u[7], u[-2] = -1.5, -.5, .25, 2.0
    table = lab.by_kind([{"tokens": tokens, "u": u}, {"tokens": ["hmm", "wait"], "u": [.5, .5]}])
    assert table["deliberation words"] == 1.5
    assert table["kinds"]["deliberation"] == {"count": 3, "u": round(-.5 / 3, 4), "negative": .3333}
    assert {k: v["u"] for k, v in table["kinds"].items() if v["count"] == 1} == {
        "right sum": .25, "stop": 0.0, "boxed digit": 2.0}
    assert table["kinds"]["term"] == {"count": 2, "u": -.25, "negative": .5}     # 3 and 2
    for text, found in (("start with 3 wait B 2 makes 1", "wrong sum"), ("2 makes 0", "wrong sum"),
                        ("with 3 so B 4 makes 2 but C 4 makes 1", "right sum"),
                        ("makes 3 makes makes 3", "wrong sum")):
        assert lab.kind(text.split(), len(text.split()) - 1) == found
    assert lab.kind("makes 3 wait B 0".split(), 1) == "wrong sum"            # nothing to add to
    of_grpo = lab.by_kind([{"tokens": ["so"], "u": [None]}])                 # no teacher, no u
    assert of_grpo["kinds"] == {"stop": {"count": 1}}


def test_rolling_mean_is_over_the_last_20_steps():
    values = {step: float(step) for step in range(30)}
    smooth = evaluation.rolling(values)
    assert smooth[0] == 0 and smooth[9] == 4.5 and smooth[29] == sum(range(10, 30)) / 20


# ------------------------------------------------------------------------------------------------
# Bad input: one line, before any weights are read
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def weightless(root, tmp_path_factory):
    """Everything of a checkpoint but the weights: whoever tries to load it dies otherwise."""
    folder = tmp_path_factory.mktemp("weightless")
    TOKENIZER.save_pretrained(folder)
    AutoConfig.from_pretrained(root / "qwen3").save_pretrained(folder)
    return folder


def refuse(call, *fragments):
    with pytest.raises(antisd.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("arguments, fragments", [
    ("", ["--model"]), ("--model m --method dpo", ["dpo", "antisd_kl"]),
    ("--model m --group_size 1", ["--group_size"]),
    ("--model m --temperature 0", ["--temperature"]),
    ("--model m --temperature nan", ["--temperature"]), ("--model m --lam nan", ["--lam"]),
    ("--model m --lamb 0.3", ["--lamb"]), ("--model m --max_token 3", ["--max_token"]),
    ("--model m --steps many", ["--steps", "many"]), ("--model m --steps 0", ["--steps"]),
    ("--model m stray", ["stray"]), ("--model m @nowhere.args", ["nowhere.args"]),
    ("--model m --chat_template_kwargs [1]", ["--chat_template_kwargs"]),
    ("--model m --chat_template_kwargs {", ["--chat_template_kwargs"]),
    ("--model m --warmup_steps 0", ["--warmup_steps", "--tau_down 0"]),
    ("--model m --clip 0", ["--clip"]), ("--model m --eval_top_p 0", ["--eval_top_p"])])
def test_bad_flags_are_refused(arguments, fragments):
    refuse(lambda: antisd.parse_config(arguments.split()), *fragments)


def test_flags_take_both_spellings_and_files_with_comments(tmp_path):
    for field in dataclasses.fields(antisd.Config):
        value = getattr(antisd.Config(model="m"), field.name)
        for name in {field.name, field.name.replace("_", "-")}:
            given = field.metadata.get("choices", [value])[-1]
            given = "m" if given == "" else given
            arguments = [f"--{name}"] if field.type is bool else [f"--{name}", str(given)]
            found = getattr(antisd.parse_config(["--model", "m", *arguments]), field.name)
            assert found == (True if field.type is bool else given)
    file = tmp_path / "run.args"
    file.write_text("# a comment\n--model 'two words'  # another\n\n--lam 0.25 --max-tokens 7\n")
    cfg = antisd.parse_config([f"@{file}", "--seed", "4"])
    assert (cfg.model, cfg.lam, cfg.max_tokens, cfg.seed) == ("two words", 0.25, 7, 4)
    file.write_text("--output don't\n")
    refuse(lambda: antisd.parse_config([f"@{file}"]), "don't")


def test_defaults_are_the_papers():
    cfg = antisd.Config(model="m")
    assert (cfg.lam, cfg.warmup_steps, cfg.tau_down, cfg.lr, cfg.steps) == (0.5, 5, 0.93, 1e-6, 200)
    assert (cfg.problems_per_step, cfg.group_size, cfg.temperature, cfg.clip) == (32, 8, 1.0, 0.2)
    assert (cfg.method, cfg.compose, cfg.gate_stat, cfg.gate_source, cfg.loss_agg, cfg.max_tokens,
            cfg.eval_temperature, cfg.eval_top_p, cfg.updates_per_batch) == (
                "antisd", "add", "mean", "teacher", "token", 32768, 0.7, 0.95, 1)


@pytest.mark.parametrize("name, content, fragments", [
    ("missing.jsonl", None, ["no such file"]), ("missing.parquet", None, ["no such file"]),
    ("nobody/nothing", None, ["nobody/nothing"]),
    ("empty.jsonl", b"", ["no problems"]), ("empty.json", b"[]", ["no problems"]),
    ("bad.jsonl", b'{"problem": "p", "answer": "1"}\n{"problem": \n', ["line 2"]),
    ("bad.json", b'{"problem": ', ["not JSON"]), ("bad.parquet", b"PAR1junk", ["bad.parquet"]),
    ("number.jsonl", b"3\n", ["row 1"]), ("object.json", b'{"problem": "p"}', ["list"]),
    ("fields.jsonl", b'{"text": "p", "label": "1"}', ["problem", "text, label"]),
    ("answer.jsonl", b'{"problem": "p", "key": "1"}', ["answer", "problem, key"]),
    ("rule.jsonl", b'{"problem": "p", "reward_model": "rule"}', ["answer", "reward_model"]),
    ("chat.jsonl", b'{"prompt": [{"text": "p"}], "answer": "1"}', ["prompt"]),
    ("latin1.jsonl", b'{"problem": "caf\xe9", "answer": "1"}\n', ["latin1.jsonl"])])
def test_bad_data_is_refused(weightless, tmp_path, name, content, fragments):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = name if name == "nobody/nothing" else str(tmp_path / name)
    cfg = antisd.Config(model=str(weightless), dataset=path, max_tokens=100)
    refuse(lambda: antisd.prepare(cfg, 1), *fragments)


def test_bad_models_and_sizes_are_refused_before_weights_are_read(root, weightless, tmp_path):
    def attempt(world=1, **flags):
        return lambda: antisd.prepare(config(root, **{"model": str(weightless)} | flags), world)
    attempt()()                                          # nothing is wrong with the rest
    refuse(attempt(model=str(tmp_path / "nowhere")), "nowhere cannot be loaded")
    refuse(attempt(model="nobody/nothing"), "nobody/nothing")
    refuse(attempt(world=3), "--problems_per_step", "3")
    refuse(attempt(world=2, updates_per_batch=4), "--updates_per_batch")
    refuse(attempt(max_tokens=500), "--max_tokens", "512")
    refuse(attempt(max_prompt_tokens=5), "--max_prompt_tokens")
    refuse(attempt(tracker="wandb"), "wandb") if not importable("wandb") else None
    bare = make_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(weightless).save_pretrained(tmp_path)
    refuse(attempt(model=str(tmp_path)), "chat template")


def importable(name):
    return antisd.importlib.util.find_spec(name) is not None


def test_long_problems_are_dropped_and_counted(root, tmp_path, capsys):
    rows = [{"problem": p, "answer": "1"} for p in ("a", "a " * 90, "b")]
    cfg = config(root, dataset=write(tmp_path / "d.jsonl", rows), max_prompt_tokens=50)
    _, problems, held_out, longest = antisd.prepare(cfg, 1)
    assert [p["problem"] for p in problems] == ["a", "b"] and held_out == []
    assert "1 of 3" in capsys.readouterr().out
    assert longest == 512 - 12


def test_a_folder_that_holds_a_run_is_refused_and_so_is_resuming_another_run(root, tmp_path):
    output = str(tmp_path)
    run(root, output, method="grpo", save_every=1)
    missing = dict(output=output, model=str(root / "qwen3"))
    refuse(lambda: antisd.train(config(root, method="grpo", **missing)), output, "--resume")
    refuse(lambda: antisd.train(config(root, method="sd", resume=True, **missing)), "method")


def test_the_command_prints_one_line_and_exits_with_2(root, weightless, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}x\n")
    (tmp_path / "config.json").write_text("{}")          # what a run leaves in its folder
    fine = ["--model", str(weightless), "--dataset", str(root / "train.jsonl"), "--max-tokens", "8"]
    cases = [([], "--model"), (fine + ["--dataset", str(tmp_path / "bad.jsonl")], "line 1"),
             (fine + ["--output", str(tmp_path)], "--resume")]
    started = [subprocess.Popen([sys.executable, "antisd.py", *flags], cwd=HERE, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for flags, _ in cases]
    for process, (_, fragment) in zip(started, cases):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2 and len(error.splitlines()) == 1
        assert error.startswith("antisd.py: error: ") and fragment in error


# ------------------------------------------------------------------------------------------------
# The source keeps its promises
# ------------------------------------------------------------------------------------------------


def named(*names):
    """How often a name is used in code (comments and docstrings do not count)."""
    return sum(getattr(node, "attr", getattr(node, "id", None)) in names
               for node in ast.walk(ast.parse(SOURCE)))


def test_one_log_softmax_and_one_template():
    assert named("log_softmax") == 1 and named("logsumexp", "cross_entropy") == 0
    assert named("apply_chat_template") == 1


def test_every_flag_is_read_somewhere():
    for field in dataclasses.fields(antisd.Config):
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", SOURCE), f"--{field.name} is dead"


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
