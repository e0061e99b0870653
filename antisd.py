r"""AntiSD, Anti-Self-Distillation for reasoning RL, in one readable file.

The method is that of "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information"
(Shen et al., 2026, arXiv 2605.11609); equation and table numbers below are the paper's. A language
model, the student pi_S, answers a problem, a verifier grades the answer, and GRPO reinforces the
responses that beat their group. The same network, as the teacher pi_T, also reads the problem with
c, a verified solution and a verdict on the response, and scores the student's tokens. Self-
distillation pulls the student towards that teacher. AntiSD pushes it away, with a capped reward for
tokens that the teacher finds unlikely. A gate ends the push when the teacher's entropy collapses.

    torchrun antisd.py @toy/demo.args                                    # a laptop, minutes
    torchrun --nproc-per-node 8 antisd.py --model Qwen/Qwen3-4B-Instruct-2507 --max_tokens 8192

Algorithm 1 is the function train(), where each line carries its number:
    1  y ~ pi_S(.|x), G responses per problem, and their rewards R(x, y)     roll_out
    2  s_t = log pi_S(y_t)                                                   Policy.forward
    3  t_t = log pi_T(y_t): the same weights, with c in the prompt           score
    4  u_t = t_t - s_t, the pointwise mutual information, Eq. (4)
    5  phi(u_t), bounded below, Eq. (6)                                      phi, METHODS
    6  H, the teacher's entropy over the batch                               global_mean
    7  g, a Schmitt trigger on H; lambda = g * lambda_max, Eq. (7)           EntropyGate
    8  A_t = A_seq - lambda * sg[phi(u_t)], Eq. (2), (6)                     token_advantages
    9  one policy-gradient update                                            policy_loss
The forward pass that line 9 needs also yields s, so train() runs lines 2, 4, 5 and 8 in line 9's
loop. Where the gate reads the student's H, or a batch has several updates, 2 and 4 come before it.

Sections 1 to 5 are the paper. Then come flags (6; cfg.NAME is --NAME), data (7), FSDP (8), files
(9), records (10). Left out: critic, KL term, reference model, reward model, inference engine.
Shapes: this rank has B problems with G responses each, N = B * G responses in all; the responses of
one problem, a group, are consecutive. T is the length of the longest response; V words, D hidden
units. A micro-batch has n of the N responses and M response tokens; its longest response has T'
tokens, its longest prompt with response L. Nats throughout; sg is detach; _S: student, _T: teacher.
Where the paper is silent or we depart from it, a comment says "our choice"; the README lists these.
"""
import ctypes
import dataclasses
import datetime
import gc
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import unicodedata
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

os.environ.setdefault("SYMPY_GROUND_TYPES", "python")    # gmpy2 would abort on too big a number
os.environ.setdefault("GOMP_SPINCOUNT", "1000")          # longer spinning starves a busy machine
import datasets
import filelock
import jinja2
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from safetensors import SafetensorError
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache,
                          GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast)
from transformers.cache_utils import DynamicLayer

# --- 1. The method: pure tensor functions ---------------------------------------------------------


def group_advantages(rewards, group_size):
    """GRPO's sequence advantage A_seq = (R - mean R) / std R within each group.

    rewards (N,), where each group is `group_size` consecutive entries; returns (N,).
    """
    groups = rewards.view(-1, group_size)                                            # (B, G)
    groups = groups - groups[:, :1]      # equal rewards are now exact zeros; a mean could round
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).view(-1)     # our choice: unbiased std


def phi(u):
    """Eq. (6): phi(u) = (softplus(u) - log 2) / 2, any shape. It increases strictly.

        u << 0     -> -log(2) / 2      deliberation ("Wait"), which the teacher finds unlikely
        u = 0      -> 0, slope 1/4
        u >> 0     -> (u - log 2) / 2  shortcuts, which the solution already implies

    With the JSD's generator f(r) = (r log r - (r + 1) log((r + 1) / 2)) / 2, phi(u) is -f'(r) at
    r = pi_S / pi_T = exp(-u). F.softplus does not overflow, as log(1 + exp(u)) would.
    """
    return 0.5 * (F.softplus(u) - math.log(2))


# The arms: the per-token term delta in A_t = A_seq + lambda * delta(u), u = log pi_T - log pi_S.
# A signal of your own is one more entry here, and one in GATED if the gate should rule it. With v a
# next token drawn from pi_S, u_v its u, and the teacher held fixed,
#     grad JSD(pi_S || pi_T) = E[-phi(u_v) grad log pi_S(v)]     so delta = -phi ascends the JSD,
#     grad  KL(pi_S || pi_T) = E[  -u_v    grad log pi_S(v)]     so delta = +u descends the KL.
METHODS = {
    "grpo": torch.zeros_like,           # the baseline
    "sd": lambda u: u,                  # self-distillation, Eq. (3)
    "sd_jsd": phi,                      # self-distillation that descends the JSD
    "antisd": lambda u: -phi(u),        # Eq. (6)
    "antisd_kl": lambda u: -u,          # ablation: ascends the KL, so it has no cap
    "no_teacher": lambda u: -phi(u),    # ablation: train() sets t to 0, u = -s; H stays pi_T's
}
GATED = ("antisd", "antisd_kl", "no_teacher")    # our choice: the sd arms act from step 0, ungated


def token_advantages(seq_advantages, u, lam, method="antisd", compose="add"):
    """Every token's advantage, Eq. (2): A_t = A_seq + lambda * sg[delta(u_t)].

    seq_advantages (N,), u (N, T) in nats, lam >= 0 a number or (N, 1), one per row; returns (N, T)
    without gradient. lam = 0 is GRPO. compose="mul" is Table 3's A_seq * (1 + lambda * delta). It
    is 0 where all responses of a group are right or all are wrong; the sum still acts there.
    """
    delta = METHODS[method](u.detach())
    a_seq = seq_advantages.detach()[:, None]
    if compose == "mul":
        return a_seq * (1 + lam * delta)
    return a_seq + lam * delta


class EntropyGate:
    """The Schmitt trigger (a switch with hysteresis) of Eq. (7) on the teacher's entropy H.

    The first `warmup_steps` steps return g = 0 and record H; h_warm is the median of these H. Then
    the gate is open (g = 1), and each step sets
        g = 1          if H >= h_warm,
        g = 0          if H < tau_down * h_warm,
        g unchanged    in between.
    With tau_down = 0 the gate never shuts after the warm-up.
    """

    def __init__(self, warmup_steps=5, tau_down=0.93):
        self.warmup_steps, self.tau_down = warmup_steps, tau_down
        self.history, self.h_warm, self.g = [], None, 1.0    # our choice: open after the warm-up

    def update(self, entropy):
        """Takes this step's H (a float, nats per token) and returns this step's g, 0.0 or 1.0."""
        if not math.isfinite(entropy):                   # a broken batch must not calibrate h_warm
            return 0.0
        if len(self.history) < self.warmup_steps:
            self.history.append(float(entropy))
            if len(self.history) == self.warmup_steps:
                # our choice: the paper does not say how it pools the warm-up steps
                self.h_warm = statistics.median(self.history)
            return 0.0
        if self.h_warm is None:                          # warmup_steps=0, with tau_down=0 alone
            return self.g
        if entropy >= self.h_warm:       # our choice: equality opens, and does not shut
            self.g = 1.0
        elif entropy < self.tau_down * self.h_warm:
            self.g = 0.0
        return self.g

    def state_dict(self):
        return {"history": list(self.history), "h_warm": self.h_warm, "g": self.g}

    def load_state_dict(self, state):
        self.history, self.h_warm, self.g = list(state["history"]), state["h_warm"], state["g"]


def policy_loss(logp, old_logp, advantages, mask, num_tokens, clip=0.2):
    """PPO's clipped surrogate: -sum(mask * min(r A, clip(r) A)) / num_tokens, r = pi / pi_old.

    logp, old_logp, advantages, mask: (N, T); mask may hold weights; returns a scalar. num_tokens is
    the sum of the mask over the WHOLE update, all micro-batches and ranks, so that the losses of
    micro-batches add up to that of the update. With one update per batch old_logp equals logp:
    r = 1, the clip is inert, the loss is -mean A, and its gradient is -mean(A grad log pi).
    """
    ratio = torch.exp(logp - old_logp.detach())
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -(surrogate * mask).sum() / num_tokens


# --- 2. What the student and the teacher read -----------------------------------------------------


def student_messages(problem):
    """What pi_S reads (Appendix C): a problem's text -> chat messages."""
    return [{"role": "user", "content": "Solve the following math problem. Place the final answer "
             "in \\boxed{}.\n\n" + problem}]


def teacher_messages(problem, solution, correct):
    """What pi_T reads (Appendix C): the student's turn followed by c, which is a verified solution
    and the verdict on the student's own response. Without a solution: the student's messages."""
    messages = student_messages(problem)
    if solution:
        # The paper's wording, odd as it reads: a right solution called "your attempt", and then the
        # verdict on y. Concatenated, because str.format trips over the braces of a solution.
        messages[-1]["content"] += (
            "\n\nYour previous attempt:\n" + solution
            + "\n\nPrevious assessment: Your answer is " + ("correct." if correct else "incorrect.")
            + "\n\nNow solve this problem step by step.")
    return messages


def render(tokenizer, messages, template_kwargs):
    """Chat messages -> prompt ids. Student, teacher and evaluation share this call, because any
    difference other than c would show up in u."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                         return_dict=False, **template_kwargs)


@dataclasses.dataclass
class Rollout:
    problem: dict           # one of load_problems; its key "prompt" holds the student's prompt ids
    ids: list               # the response's ids, up to and including its first end-of-sequence id
    text: str               # ids decoded: what is graded and, if right, shown to the teacher
    truncated: bool         # the response reached max_tokens before it ended
    reward: float           # R in {0, 1}


def pick_solutions(group, rng):
    """For each response of a group, the solution that its teacher reads: [(solution, origin), ...].

    It is a correct sibling, the same one for the whole group. For that sibling it is another
    correct one: shown the text that it is to score, a teacher would only copy. Without a correct
    sibling it is the data set's worked solution, else its bare answer.
    """
    correct = [r for r in group if r.reward == 1.0]
    rng.shuffle(correct)                                 # our choice: a seeded random sibling
    picks = []
    for r in group:
        sibling = next((other for other in correct if other is not r), None)     # our choice
        worked = final_part(r.problem["solution"] or "")
        if sibling:
            picks.append((final_part(sibling.text), "sibling"))
        elif worked:
            picks.append((worked, "solution"))
        else:
            picks.append(("The answer is \\boxed{" + r.problem["answer"] + "}.", "answer"))
    return picks


def teacher_prompts(tokenizer, rollouts, group_size, template_kwargs, max_prompt, seed, position=0):
    """pi_T's prompt ids for each rollout, and the origin of its solution: two lists of length N.

    A solution that makes a prompt longer than `max_prompt` tokens loses its head, since the answer
    stands in its tail; nothing else is ever cut. position: the index of the first problem in the
    data order. It seeds the choice of siblings, so that the choice is the same on any rank.
    """
    def prompt_with(solution, r):
        messages = teacher_messages(r.problem["problem"], solution, r.reward == 1.0)
        return render(tokenizer, messages, template_kwargs)

    prompts, origins = [], []
    for start in range(0, len(rollouts), group_size):
        group = rollouts[start:start + group_size]
        # Python hashes tuples of integers alike in every process, unlike strings.
        rng = random.Random(hash((seed, position + start // group_size)))
        for r, (solution, origin) in zip(group, pick_solutions(group, rng)):
            prompt = prompt_with(solution, r)
            tail = tokenizer.encode(solution, add_special_tokens=False)
            while len(prompt) > max_prompt and tail:     # a cut text may encode to more ids: repeat
                tail = tail[len(prompt) - max_prompt:]
                prompt = prompt_with("..." + tokenizer.decode(tail), r)
            prompts.append(prompt)
            origins.append(origin)
    return prompts, origins


# --- 3. The verifiable reward ---------------------------------------------------------------------


def final_part(text):
    """What follows the last </think>, stripped; "" where a <think> is still open."""
    tail = text.rpartition("</think>")[2].strip()
    return "" if "<think>" in tail else tail


def is_correct(response, answer):
    """R(x, y): whether the last box after the thoughts equals the reference; two texts -> bool."""
    gold, box = answer.strip(), (extract_boxed(response) or "").strip()      # section 7
    if not 0 < len(box) <= max(300, 2 * len(gold)):      # longer is no answer, but slow to parse
        return False
    if re.fullmatch("[0-9]+", gold) and re.fullmatch("[0-9]+", box):     # all of DAPO-Math, AIME
        return gold.lstrip("0") == box.lstrip("0")
    return same_value(gold, box)                         # LaTeX, by math-verify: section 7


# --- 4. The policy: log-probabilities and rollouts from one set of weights, on all ranks ----------


def token_logprobs(hidden, lm_head, targets, temperature=1.0, chunk=1024):
    """log pi(target) and the entropy of pi, from hidden states, without ever holding all logits.

    hidden (M, D), lm_head: a module (m, D) -> (m, V) logits, targets (M,) ids; returns ((M,), (M,))
    in nats, float32; no gradient flows through the entropy. At most m = `chunk` rows of logits
    exist at a time, fewer for big vocabularies (2^26 logits, 256 MiB), and the backward pass
    recomputes them: 32K tokens x 152K words in float32 would be 20 GB.
    """
    def one_chunk(h, y):
        # float32 before log_softmax: in bfloat16 it would err by 0.01 nats, the size of many u
        logps = F.log_softmax(lm_head(h).float() / temperature, dim=-1)              # (m, V)
        logp = logps.gather(-1, y[:, None]).squeeze(-1)
        with torch.no_grad():            # last, so that recomputation in backward stops before it
            # the clamp gives 0 * -1e9 = 0 where p = 0; 0 * -inf would be NaN
            entropy = -torch.linalg.vecdot(logps.exp(), logps.clamp_min(-1e9))
        return logp, entropy

    if hasattr(lm_head, "weight"):
        chunk = max(1, min(chunk, 2**26 // lm_head.weight.shape[0]))
    chunks = [checkpoint(one_chunk, h, y, use_reentrant=False, preserve_rng_state=False)
              for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    logp, entropy = zip(*chunks)
    return torch.cat(logp), torch.cat(entropy)


class Policy(nn.Module):
    """A causal language model whose logits are lm_head(hidden); pi_S and pi_T are this network."""

    def __init__(self, model, eos_ids):
        super().__init__()
        self.model, self.eos_ids = model.eval(), sorted(eos_ids)
        model.generation_config = GenerationConfig()     # none of the checkpoint's top_k, penalties
        # anchor.device is where we compute. With --offload the parameters lie in host memory.
        self.register_buffer("anchor", torch.empty(0, device=model.device), persistent=False)

    def forward(self, ids, response_mask, temperature=1.0):
        """Log-probabilities and entropies of the response tokens of right-padded rows (see `pack`).

        ids (n, L); response_mask (n, L-1) bool, true at j where token j+1 belongs to the response.
        Returns (n, T') and (n, T') in nats, with zeros after a response's end. The padding stands
        on the right, where causal attention never looks, so the model needs no attention mask.
        """
        hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]            # (n, L, D)
        logp, entropy = token_logprobs(hidden[:, :-1][response_mask],
                                       self.model.get_output_embeddings(),
                                       ids[:, 1:][response_mask], temperature)       # (M,), (M,)
        # Boolean indexing took the tokens row by row. masked_scatter puts them back in that order.
        lengths = response_mask.sum(1)
        mask = torch.arange(max(1, int(lengths.max())), device=ids.device) < lengths[:, None]
        zeros = torch.zeros(mask.shape, device=ids.device)                           # (n, T')
        return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)

    def generate(self, **inputs):
        return self.model.generate(**inputs)             # our own method: FSDP's hooks surround it

    def train(self, mode=True):
        """Sets the flag `training` on the decoder layers alone, where it means that the backward
        pass recomputes them. The modules inside them stay in eval mode: with dropout, student and
        teacher would not be one function."""
        layer_class = transformers.modeling_layers.GradientCheckpointingLayer
        for module in self.modules():
            module.training = mode and isinstance(module, layer_class)
        return self


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank, for any Python object."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def as_many_everywhere(batches):
    """Appends empty batches, up to the number of batches of the rank that has most.

    In a forward pass of a sharded model all ranks communicate, so each must run as many passes as
    the others. A rank without work is idle: `pack` makes one row without response tokens out of an
    empty batch; its log-probabilities are (1, 1), and its loss is 0.
    """
    return batches + [[]] * (max(all_gather(len(batches))) - len(batches))


def pack(prompts, responses, device):
    """Prompts + responses, right-padded -> ids (n, L), response_mask (n, L-1); one row if empty."""
    rows = [p + y for p, y in zip(prompts, responses)] or [[0, 0]]
    width = max(map(len, rows))                          # L
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    response_mask = torch.zeros(len(rows), width - 1, dtype=torch.bool, device=device)
    for i, (p, y) in enumerate(zip(prompts, responses)):
        response_mask[i, len(p) - 1:len(p) + len(y) - 1] = True
    return ids, response_mask


@torch.no_grad()
def score(policy, prompts, responses, micro_tokens, temperature=1.0):
    """log pi(y_t | prompt, y_<t) and entropies: (N, T) each, in nats, zeros after the end."""
    policy.eval()
    device = policy.anchor.device
    logp = torch.zeros(len(prompts), max(map(len, responses)), device=device)        # (N, T)
    entropy = torch.zeros_like(logp)
    widths = [len(p) + len(y) for p, y in zip(prompts, responses)]
    for micro in as_many_everywhere(micro_batches(widths, micro_tokens)):
        batch = pack([prompts[i] for i in micro], [responses[i] for i in micro], device)
        micro_logp, micro_entropy = policy(*batch, temperature)                      # (n, T')
        at = (micro, slice(micro_logp.shape[1]))         # selects nothing where this rank is idle
        logp[at], entropy[at] = micro_logp, micro_entropy
    return logp, entropy


@torch.no_grad()
def sample(policy, prompts, group_size, max_tokens, temperature=1.0, top_p=1.0, rollout_batch=0,
           sharded=False, stride=32):
    """`group_size` responses to every prompt: y ~ pi_S(.|x), line 1 of Algorithm 1.

    prompts: lists of ids. Returns len(prompts) * group_size lists of ids, groups consecutive, each
    up to and including its first end-of-sequence id, or max_tokens long. temperature 0 is greedy.
    rollout_batch: the most responses decoded at once, in whole groups, at least one group; 0: what
    a cache of 2^18 tokens holds. sharded: weights stay split, and the ranks decode in step.
    """
    policy.eval()        # in train mode, gradient checkpointing makes generate() drop its cache
    # generate()'s own default is top_k=50, which would truncate the distribution
    settings = dict(do_sample=temperature > 0, top_k=0, eos_token_id=policy.eos_ids,
                    pad_token_id=policy.eos_ids[0], synced_gpus=sharded,
                    logits_processor=[refuse_nan])
    if temperature > 0:
        settings |= dict(temperature=temperature, top_p=top_p)
    most = rollout_batch or 2**18 // (max_tokens + max(map(len, prompts), default=0))
    size = max(1, most // group_size)
    batches = [prompts[i:i + size] for i in range(0, len(prompts), size)]
    if sharded:          # one stride: a rank that stops after fewer would leave the others waiting
        batches, stride = as_many_everywhere(batches), max_tokens
    responses = []
    for batch in batches:                                # an idle rank decodes the prompt [0, 0]
        drawn = decode(policy, batch or [[0, 0]], group_size, max_tokens, stride, settings)
        responses += drawn if batch else []
    return responses


class RoomyLayer(DynamicLayer):
    """A layer's cached keys and values, (n, heads, tokens, dim) each, in buffers with spare room.

    Its parent copies the whole cache for every new token; this class writes the token in place.
    """

    room = 32                    # spare tokens of a new buffer: those of a stride of `decode`
    buffers = None               # `keys` and `values` are views of the first tokens of these two

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        if start == 0:
            return super().update(key_states, value_states)
        end = start + key_states.shape[2]
        if self.buffers is None or end > self.buffers[0].shape[2]:
            more = (0, 0, 0, end - start + self.room)
            self.buffers = F.pad(self.keys, more), F.pad(self.values, more)
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        self.buffers = None                              # the rows are copied, without spare room
        super().reorder_cache(beam_idx)


def decode(policy, prompts, group_size, max_tokens, stride, settings):
    """The responses to one batch of prompts. It decodes `stride` tokens at a time; after each
    stride, the responses that have ended leave the batch, so that no work is spent on them."""
    device, width = policy.anchor.device, max(map(len, prompts))
    eos_ids = torch.tensor(policy.eos_ids, device=device)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # left-padded
    attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=policy.model.config)     # a sliding window has another class
    cache.layers = [RoomyLayer() if type(each) is DynamicLayer else each for each in cache.layers]
    # Each prompt, but for its last token, is read once for its whole group. generate() cannot read
    # without drawing a token, which is thrown away here.
    policy.generate(input_ids=ids[:, :-1], attention_mask=attend[:, :-1], past_key_values=cache,
                    max_new_tokens=1, **settings)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    responses = [[] for _ in range(len(prompts) * group_size)]
    growing = list(range(len(responses)))                # row i is responses[growing[i]]
    for done in range(0, max_tokens, stride):
        # `rows` repeats each prompt G times at first and later keeps the growing responses.
        # reorder_cache is the only method that selects rows in linear-attention layers, too.
        cache.reorder_cache(rows)
        ids, attend = ids[rows], attend[rows]
        longer = policy.generate(input_ids=ids, attention_mask=attend, past_key_values=cache,
                                 max_new_tokens=min(stride, max_tokens - done), **settings)
        new = longer[:, ids.shape[1]:]                   # (growing responses, at most `stride`)
        is_end = torch.isin(new, eos_ids)
        ended = is_end.any(1)
        # argmax finds the first end token. It is an action like any other, so it is kept.
        lengths = torch.where(ended, is_end.int().argmax(1) + 1, new.shape[1])
        for i, tokens, length in zip(growing, new.tolist(), lengths.tolist()):
            responses[i] += tokens[:length]
        if ended.all():
            break
        rows = (~ended).nonzero().squeeze(1)
        growing = [growing[i] for i in rows.tolist()]
        ids, attend = longer, F.pad(attend, (0, new.shape[1]), value=1)
    return responses


def roll_out(policy, tokenizer, problems, group_size, sampler="generate", **settings):
    """`group_size` graded responses to each problem, groups consecutive; settings: `sample`'s."""
    prompts, sharded = [p["prompt"] for p in problems], sampler == "sharded"
    with nullcontext() if sharded else gathered(policy):         # gathered: whole on every rank
        responses = sample(policy, prompts, group_size, sharded=sharded, **settings)
    # The text lacks special tokens, but keeps <think> and </think>, special in some tokenizers.
    special = {i for i, token in tokenizer.added_tokens_decoder.items()
               if token.special and token.content not in ("<think>", "</think>")}
    rollouts = []
    for i, ids in enumerate(responses):
        problem = problems[i // group_size]
        text = tokenizer.decode([x for x in ids if x not in special])
        if tokenizer.decode(problem["prompt"][-16:]).rstrip().endswith("<think>"):
            text = "<think>" + text                      # the template has opened the thought
        rollouts.append(Rollout(problem, ids, text, truncated=ids[-1] not in policy.eos_ids,
                                reward=float(is_correct(text, problem["answer"]))))
    return rollouts


# --- 5. Training: Algorithm 1 ---------------------------------------------------------------------


def global_mean(values, mask):
    """The mean of values (N, T) where mask (N, T) is true, over ALL ranks; 0 without tokens."""
    sums = all_gather((values[mask].double().sum().item(), int(mask.sum())))
    total, count = map(sum, zip(*sums))
    return total / max(1, count)


def global_median(values, mask):
    """The median over the tokens of ALL ranks; the mean of the ranks' medians would be another."""
    ordered = torch.cat(all_gather(values[mask].cpu())).double().sort().values
    return ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean().item()


def token_weights(mask, truncated, loss_agg="token", mask_truncated=False):
    """Each token's weight in the loss: mask (N, T) and truncated (N,), both bool -> (N, T).

    The loss is divided by the sum of the weights. loss_agg "token": every token weighs 1. "seq":
    every token weighs 1 / length of its response, so that every response weighs 1.
    """
    weights = mask.float()                               # our choice: "token" is the default
    if loss_agg == "seq":
        weights = weights / mask.sum(1, keepdim=True)
    # our choice: truncated responses count, unless mask_truncated takes them out of the loss
    return weights * ~truncated[:, None] if mask_truncated else weights


def train(cfg):
    """Algorithm 1 for cfg.steps steps. Everything that it makes lies in the folder cfg.output."""
    rank, world, device = setup()
    tokenizer, model_folder, max_prompt, problems, held_out = prepare(cfg, world)
    policy, optimizer = build(cfg, tokenizer, device)
    gate, g = EntropyGate(cfg.warmup_steps, cfg.tau_down), None
    progress = restore(cfg, policy, optimizer, {
        "step": 0, "position": 0, "skipped_updates": 0, "failures": 0, "gate": gate.state_dict()})
    gate.load_state_dict(progress["gate"])               # h_warm, and whether the gate is open
    B = cfg.problems_per_step // world                   # problems of this rank
    # our choice: the mean; the paper takes the median, which is near 0 in a chain of thought
    pool = {"mean": global_mean, "median": global_median}[cfg.gate_stat]
    gate_reads_student = cfg.method in GATED and cfg.gate_source == "student"
    # Several updates share one s (pi_old). Write True to have all of s, u and H_S before the loop.
    s_first = gate_reads_student or cfg.updates_per_batch > 1
    bar = tqdm(range(progress["step"], cfg.steps), initial=progress["step"], total=cfg.steps,
               disable=rank > 0, dynamic_ncols=True)

    for step in bar:
        metrics = {"step": step}
        if held_out and step % cfg.eval_every == 0:
            metrics |= evaluate(policy, tokenizer, held_out, cfg, step)

        # line 1: y ~ pi_S(.|x) and R(x, y). A seed for each step makes a resumed run draw the same.
        position = progress["position"] + rank * B       # of this rank's first problem in the data
        torch.manual_seed(hash((cfg.seed, step, rank)))
        with timer("rollout", metrics):
            rollouts = roll_out(policy, tokenizer,
                                next_problems(problems, position, B, cfg.seed), cfg.group_size,
                                cfg.sampler, max_tokens=cfg.max_tokens,
                                temperature=cfg.temperature, rollout_batch=cfg.rollout_batch)
        prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
        rewards = torch.tensor([r.reward for r in rollouts], device=device)          # (N,)
        truncated = torch.tensor([r.truncated for r in rollouts], device=device)     # (N,)
        lengths = torch.tensor([len(y) for y in responses], device=device)           # (N,)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]    # (N, T)
        a_seq = group_advantages(rewards, cfg.group_size)                            # (N,)

        # line 3: log pi_T(y_t) and the teacher's entropies H_T: the same weights, c in the prompt
        t, H_T = torch.zeros(2, *mask.shape, device=device)                          # (N, T) each
        s, u, H_S, origins = None, None, None, []        # filled below; origins: each c's source
        with timer("score", metrics):
            if cfg.method != "grpo":                     # grpo has no teacher; its delta ignores u
                prompts_T, origins = teacher_prompts(tokenizer, rollouts, cfg.group_size,
                                                     cfg.template_kwargs, max_prompt, cfg.seed,
                                                     position)
                t, H_T = score(policy, prompts_T, responses, cfg.micro_tokens, cfg.temperature)
            if cfg.method == "no_teacher":
                t = torch.zeros_like(t)
            if s_first:                                                              # lines 2, 4
                s, H_S = score(policy, prompts, responses, cfg.micro_tokens, cfg.temperature)
                u = t - s        # u = 0 gives a token no term; this line runs only if s_first

        # lines 6 and 7: one H over the tokens of all ranks, so that all ranks have the same gate
        lam = cfg.lam
        if cfg.method in GATED:
            g_before, g = g, gate.update(pool(H_S if gate_reads_student else H_T, mask))
            lam = g * cfg.lam                                                        # Eq. (7)
            if rank == 0 and g_before not in (None, g):  # None: the first step of this process
                tqdm.write(f"step {step}: the gate {'opens' if g else 'shuts'}")

        # lines 2, 4, 5, 8, 9: updates_per_batch updates of `size` responses each, whole groups, in
        # micro-batches. lr and decay are set anew, because a loaded optimizer brings its old ones.
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_lr_steps))
            group["weight_decay"] = cfg.weight_decay
        weights = token_weights(mask, truncated, cfg.loss_agg, cfg.mask_truncated)   # (N, T)
        widths = [len(p) + len(y) for p, y in zip(prompts, responses)]
        losses, norms, size = [], [], len(rollouts) // cfg.updates_per_batch
        if not s_first:                                  # the loop fills them
            s, u, H_S = torch.zeros(3, *mask.shape, device=device)
        policy.train(cfg.gradient_checkpointing)         # whether layers recompute in backward
        with timer("train", metrics):
            for start in range(0, len(rollouts), size):                              # one update
                total_weight = sum(all_gather(weights[start:start + size].sum().item()))
                loss_sum = 0.0
                for micro in as_many_everywhere(micro_batches(widths[start:start + size],
                                                              cfg.micro_tokens)):
                    rows = [start + i for i in micro]    # n of the N; none where this rank is idle
                    logp, H = policy(*pack([prompts[i] for i in rows], [responses[i] for i in rows],
                                           device), cfg.temperature)
                    at = (rows, slice(logp.shape[1]))                                # (n, T')
                    if not s_first:
                        s[at], H_S[at] = logp.detach(), H                            # line 2
                        u[at] = t[at] - s[at]                                        # line 4
                    A = token_advantages(a_seq[rows], u[at], lam, cfg.method, cfg.compose)  # 5, 8
                    loss = policy_loss(logp, s[at], A, weights[at], total_weight or 1.0, cfg.clip)
                    (loss * world).backward()            # FSDP averages over ranks; this undoes it
                    loss_sum += loss.item()
                # Each rank holds a part of the gradients; this norm is that of the whole.
                norm = nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                norms.append(norm.full_tensor().item())
                losses.append(sum(all_gather(loss_sum)))
                if total_weight and math.isfinite(losses[-1]) and math.isfinite(norms[-1]):
                    optimizer.step()                                                 # line 9
                else:
                    progress["skipped_updates"] += 1
                optimizer.zero_grad()

        metrics |= summary(rollouts, origins, mask, a_seq, u, H_S, H_T, cfg, metrics) | {
            "gate": g, "h_warm": gate.h_warm, "lam": None if cfg.method == "grpo" else lam,
            "loss": statistics.mean(losses), "grad_norm": statistics.mean(norms),
            "lr": optimizer.param_groups[0]["lr"], "skipped_updates": progress["skipped_updates"]}
        if rank == 0:
            record(cfg, metrics, bar, rollouts, origins, u, H_T, tokenizer)
        failures = 0 if all(map(math.isfinite, losses + norms)) else progress["failures"] + 1
        progress |= {"step": step + 1, "position": progress["position"] + cfg.problems_per_step,
                     "failures": failures, "gate": gate.state_dict()}
        save(cfg, policy, optimizer, progress, model_folder)     # raises after 3 failures in a row

    finish(cfg, policy, tokenizer, held_out, model_folder)


# === The paper ends here. What follows is needed around it in any trainer. ========================

# --- 6. Configuration: every field is a flag; defaults are those of the tables that texts name ----


class InputError(ValueError):
    """A condition that the user can mend: `main` prints it as one line and exits with code 2."""


@contextmanager
def one_line(what, *errors):
    """Turns errors of these types (default: OSError, ValueError) into an InputError. Any other is a
    mistake in the program, or in a fork of it, and keeps its traceback."""
    try:
        yield
    except errors or (OSError, ValueError) as error:
        reason = f"{error} {error.__cause__ or ''}"
        raise InputError(f"{what}: {' '.join(reason.split())[:300]}") from error


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


def template_variables(text):
    with one_line("--chat_template_kwargs must be a JSON object", TypeError, ValueError):
        return dict(**json.loads(text))


@dataclasses.dataclass
class Config:
    # the model and what it reads
    model: str = flag("", "Hugging Face folder or hub id of a chat model (required)")
    dataset: str = flag("open-r1/DAPO-Math-17k-Processed:all", "training problems (Table 5): "
                        ".jsonl, .json or .parquet file, or hub id, also as id:config:split")
    max_prompt_tokens: int = flag(2048, "longer problems are dropped and counted (not the paper's)")
    chat_template_kwargs: str = flag("{}", """JSON, template flags: '{"enable_thinking": false}'""")
    # the method
    method: Literal[tuple(METHODS)] = flag("antisd", "which per-token term joins GRPO")
    compose: Literal["add", "mul"] = flag("add", "A + lam * delta, or A * (1 + lam * delta)")
    lam: float = flag(0.5, "lambda_max, weight of the per-token term (Table 5)")
    warmup_steps: int = flag(5, "W: steps with lambda 0 that calibrate H_warm (Table 5)")
    tau_down: float = flag(0.93, "the gate shuts below tau_down * H_warm; 0: no gate (Table 5)")
    gate_stat: Literal["mean", "median"] = flag("mean", "of token entropies; paper: median")
    gate_source: Literal["teacher", "student"] = flag("teacher", "whose entropy (Table 3)")
    # the rollout
    problems_per_step: int = flag(32, "problems of a step, over all ranks (Table 5)")
    group_size: int = flag(8, "responses per problem, a group (Table 5)")
    max_tokens: int = flag(32768, "longest response, in tokens (Table 5)")
    temperature: float = flag(1.0, "of rollouts; scoring divides by it too (Table 5)")
    rollout_batch: int = flag(0, "most responses decoded at once; 0: a cache of 2^18 tokens")
    sampler: Literal["generate", "sharded"] = flag(
        "generate", "sharded: decode with split weights; slow, for models beyond one GPU")
    # the update
    lr: float = flag(1e-6, "AdamW's learning rate, constant after --warmup_lr_steps (Table 5)")
    warmup_lr_steps: int = flag(0, "linear learning-rate warm-up, in steps")
    weight_decay: float = flag(0.01, "AdamW's (not in the paper)")
    max_grad_norm: float = flag(1.0, "gradient clipping (not in the paper)")
    clip: float = flag(0.2, "PPO clip; inert while updates_per_batch is 1 (Table 5)")
    steps: int = flag(200, "training steps (Table 5)")
    updates_per_batch: int = flag(1, "optimizer updates per rollout batch (not in the paper)")
    loss_agg: Literal["token", "seq"] = flag("token", "mean over tokens, or responses' means")
    mask_truncated: bool = flag(False, "leave truncated responses out (not in the paper)")
    # the machine
    micro_tokens: int = flag(16384, "tokens (with padding) of a scoring or training micro-batch")
    gradient_checkpointing: bool = flag(True, "recompute layers in backward: slower, leaner")
    offload: bool = flag(False, "keep float32 weights, gradients and AdamW's state in host memory")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "to compute; auto: bf16 on CUDA")
    seed: int = flag(0, "of data order, rollouts and the choice of solutions")
    # validation and records
    eval_dataset: str = flag("", "held-out problems, file or id:config:split; temperature 0.7")
    eval_every: int = flag(20, "steps between evaluations, one response to every problem")
    output: str = flag("runs/antisd", "folder of this run")
    save_every: int = flag(20, "steps between checkpoints, of which two stay; 0: none")
    export_every: int = flag(0, "steps between folders model-000100/; 0: the last, model/, only")
    resume: bool = flag(False, "continue the run in --output from its newest checkpoint")
    init_from: str = flag("", "continual AntiSD: a run to start from, at step 0 with a new gate")
    tracker: Literal["", "wandb", "trackio"] = flag("", "log metrics there as well, if installed")

    def __post_init__(self):
        self.template_kwargs = template_variables(self.chat_template_kwargs)
        may_be_0 = ("lam", "warmup_steps", "tau_down", "rollout_batch", "lr", "warmup_lr_steps",
                    "weight_decay", "seed", "save_every", "export_every")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in may_be_0 else 1e-9
            if field.type in (int, float) and not least <= value < math.inf:
                bound = "above 0" if least else "at least 0"
                raise InputError(f"--{field.name} {value}: must be {bound}")
        for wrong, text in (
            (not self.model, "--model is required: a Hugging Face folder or a hub id"),
            (self.group_size < 2, "--group_size 1: a group of one has no advantage"),
            (not self.warmup_steps and self.tau_down and self.method in GATED,
             "--warmup_steps 0 leaves the gate without H_warm; no gate at all is --tau_down 0"),
            (self.tracker and not importlib.util.find_spec(self.tracker),
             f"--tracker {self.tracker}: pip install {self.tracker} first"),
        ):
            if wrong:
                raise InputError(text)


def parse_config(argv=None, kind=Config):
    """Flags (default: the command line) -> a dataclass; `@file` reads flags from a file, where #
    starts a comment. InputError, with one line, on whatever is wrong."""
    def refuse(message):
        raise InputError(message)

    parser = HfArgumentParser(kind, fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line.lstrip("\ufeff"), comments=True)
    parser.error = refuse
    with one_line("flags"):                              # an @file may lack a closing quote
        flags = parser.parse_args(argv)
    return kind(**{name: os.path.expanduser(value) if isinstance(value, str) else value
                   for name, value in vars(flags).items()})


# --- 7. Answers and problems ----------------------------------------------------------------------


def extract_boxed(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} after the thoughts, or None."""
    text, box = final_part(text), None
    starts = []          # for every brace that is open: where its box's content starts, or None
    for m in re.finditer(r"\\(?:boxed|fbox)\s*(?:(\{)|(-?\d+))|(?<!\\)\\[{}]|([{}])", text):
        opens_box, bare_number, brace = m.groups()
        if bare_number:
            box = bare_number                            # \boxed 5
        elif opens_box or brace == "{":
            starts.append(m.end() if opens_box else None)
        elif brace and starts and (start := starts.pop()):
            box = text[start:m.start()]                  # of nested boxes the outer one closes last
    return box


LATEX = [LatexExtractionConfig(normalization_config=NormalizationConfig(
    malformed_operators=True, nits=True, boxed="none"))]
# what takes sympy too long (towers, sums, factorials of anything big), and what it misreads (3:4)
REFUSED = re.compile(r"\^\W*\w*\W*\^|\^[^^]*[)}]\s*\^|\^\W*\d{4}|\)\s*\^\W*\d{3}|\d{60}|\d_|[?:]"
                     r"|(?:\d{4}|[^\w) ]|\^\w+|\)[^(]*\)|\([^()]*(?:\d\d|[^\w+-])[^()]*\))\s*!"
                     r"|\^\{[^}]*!|!\s*[!^]|choose|binom(?!(?:\s*\{[\w +-]{1,5}\}){2})|binom.*\d{4}"
                     r"|(?:[({\[][^)}\]]*){12}|\\(?:sum|prod|i*nt|lim)(?![a-z])")
# text behind a number that is no unit: it has a numeral in it, or starts with one of these words
NO_UNIT = (r"(?![^{}]*\b(?:one|two|three|four|fi[fv]|six|seven|eigh|nine|nint|ten|eleven|twel|twen"
           r"|thir|fort[iy]|\w+illion|\w+teen|hundred|thousand|hal[fv]|quarter|dozen|lakh|crore"
           r"|gross|mod\b))(?!\W*(?:not|is|are|if|and|than|to|at|less|more|over|times|plus|minus"
           r"|squared|cubed|factorial|pi|[bm]n|[^\WmgshlJNWVAKCFHL])\b)")
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    # every sign gets its LaTeX name, marks without a value go, words and lists get one spelling
    ("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"), ("[−–]", "-"),
    ("[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % (*unicodedata.normalize("NFKC", m[0]).split("⁄"),)),
    (r"[！-～\s]", lambda m: unicodedata.normalize("NFKC", m[0])), ("[·×]", r"\\times "),
    ("√", r"\\sqrt "), ("∞", r"\\infty "), ("∈", r"\\in "), (r"(?<=[a-z]) ?! ?=", r"\\ne "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boldsymbol|[lL]arge|color\{\w+\})(?![a-z])"
     r"|\\[{}]|\\?\$|\*\*|\^\{?(?:\\circ|°)\}?|°", ""), (r"\\\\(?:\[\w+\])?", ",row,"),
    (r"\\begin\{\w*matrix\}", "("), (r"\\end\{\w*matrix\}", ")"), ("[、;&]", ","),
    (r"\\(?:text|math|mbox|operatorname)(?!bb|cal)[a-z]*\s*\{", r"\\text{"),
    (r"[\s,]*(?:\\text\{,?\s*(?:or|and)\s*\}|\b(?:or|and)\b)", ","),
    # joins 3{,}159, 3 159 and 3,159, but not (3,159); drops units; rewrites 1 3/4, 4.5e33, .5, x'
    (r"(?<=\d)(?:\{,\}|,?\s*\\!\s*|\\,|[ ~])(?=\d{3}(?!\d))", ""), (r"\\[,:;!> ]|~|\s+", " "),
    (r"(?<![\d,.([{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (rf"(?<=[\w)}}.%])(?:[\s/]*\\text\{{\s*{NO_UNIT}[A-Za-z][^{{}}\d,?=<>+-]{{0,30}}\}}"
     r"(?:\^\{?-?\d\}?)?)+", ""), (r"\\text\{([^{}]*)\}", r" \1 "), (r"\((\w+)\)_", r"\1_"),
    (rf"(?<=[\d}}])(?: *(?:[kcm]m|kg|m[gl])| {NO_UNIT}(?:cups?|days?|[a-z]{{4,}})(?: [a-z]+)*"
     r"| *(?!分之|.方$)(?:(?![万亿千百十半打以多余或至不的])[一-龥])+) *$", ""), (r"_(\w)", r"_{\1}"),
    (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"), (r"([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2"),
    (r"^(?:\\\w+|[a-z]) *\\in\b|^\w* *\\approx|(?<=\d)\.0*(?!\d)", ""), (r"(?<=\d) +(?=\d)", ","),
    (r"(?<=\d)\s*(?:[eE]\+?|x\s*10\^)\{?(-?\d+)\}?", r" \\times 10^{\1}"),
    (r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}"),
    (r"(?:np\.)?(?<![\\a-z])(arc\w+|exp|pi)\b", r"\\\1"), (r"\\?sqrt\s*\(?(\d+)\)?", r"\\sqrt{\1}"),
    (r"([A-Za-z])(?:'|\^\{?\s*\\prime\s*\}?)", r"\1_{1}"), (r"^[({]+([^(),{}]*)[)}]+$", r"\1"))]


logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns where its own limits are off


@contextmanager
def cpu_limit(seconds):
    """Raises TimeoutException in its body every `seconds` of CPU time, as libraries may swallow the
    exception. A clock on the wall would let a busy machine change rewards. Main thread only."""
    def stop(*_):
        raise TimeoutException

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def same_value(gold, box):
    """Whether two LaTeX answers mean the same, by math-verify behind our own rewrite rules and
    guards: it is lax about words, capitals, the count of a list and the kind of its brackets."""
    decimal = re.search(r"\.\d*[1-9]|\d[eE][+-]?\d", gold)            # a rounded number
    for pattern, replacement in SPELLINGS:
        gold, box = (pattern.sub(replacement, text).strip().rstrip(".") for text in (gold, box))
    if "=" in gold and "=" not in box:                   # P(x) = x^2, (x, y) = (1, 2)
        gold = re.sub(r"^(?:(?:\\\w+|[A-Za-z])(?:[_^]\{[^{}]*\})?)?(?:\([a-z, ]*\))? *=", "", gold)
    elif "=" not in gold and not re.search(r"[<>!≠≤≥]|\\(?:not|n?[lg]?eq?)(?![a-z])", box):
        box = re.sub(r"(?:^|(?<=,))(?:\([a-z, ]*\)\s*|[^,]*)=", "", box)         # m + n = 204
    plain = [text.replace(" ", "") for text in (gold, box)]
    words = [text.strip("()").casefold() for text in plain]
    if plain[0] == plain[1] or re.fullmatch(r"[a-z]{2,}", words[0]):
        return words[0] == words[1]
    relation = re.search(r"[<>≤≥]|\\[gl]eq?(?![a-z])|\\cup", gold + box)
    shapes = [(not relation and "," in text and (text.count(","), re.findall(r"^[([]|[])]$", text)),
               {*re.findall("[A-Z]", text)}) for text in (gold, box)]                # K is not k
    if shapes[0] != shapes[1] or REFUSED.search(gold) or REFUSED.search(box):
        return False
    if decimal and not re.search(r"[,=]|(?<![\\A-Za-z])[A-Za-z]", gold):
        # right within 1e-4: a smaller relative error, divided by 2e8, is 0 to 12 digits
        percent = "/100" if decimal.string.startswith(("0.", ".")) else ""
        gold, box = "0.0", re.sub(r"\\?%", percent, rf"(\frac{{{box}}}{{{gold}}}-1)/200000000")
    try:
        with cpu_limit(5):                               # math-verify's own limits are wall-clock
            gold, box = (parse(f"${text}$", LATEX, "no_fallback", parsing_timeout=None)
                         for text in (gold, box))
            return verify(gold, box, 12, 60, allow_set_relation_comp=True, timeout_seconds=None)
    except (ArithmeticError, ValueError, RecursionError, TimeoutException):
        return False                                     # what the libraries raise is no answer


def load_problems(path, split=None, limit=None, config=None):
    """Problems from a .jsonl, .json or .parquet file, or from a hub data set `id:config:split`.

    Returns a list of {"id": row number, "problem": str, "answer": str, "solution": str or None};
    of rows with the same problem the first. Columns: problem | question | prompt (text or chat);
    answer | final_answer | reward_model.ground_truth | Answer; solution. A file's row without
    problem or answer is an InputError, a hub set's is skipped, and so is an answer for no box.
    """
    problems, skipped, chats, row = {}, 0, 0, {}
    rows, quiet = read_rows(path, split, config), os.environ.get("RANK", "0") != "0"
    for number, row in enumerate(tqdm(rows, path, delay=5, disable=quiet)):      # a sign of life
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number + 1} is not an object with named fields")
        problem = read_problem(row)
        if problem["problem"] and problem["answer"]:
            problems.setdefault(problem["problem"], {"id": number, **problem})
            chats += isinstance(row.get("prompt"), list) and len(row["prompt"]) > 1
        elif Path(path).is_file() and problem["answer"] is not None:
            raise InputError(f"{path}: no problem or answer in row {number + 1}: {', '.join(row)}")
        else:
            skipped += 1
        if len(problems) == limit:
            break
    if not problems:
        raise InputError(f"{path}: no problem with an answer; its columns are {', '.join(row)}")
    if (skipped or chats) and not quiet:
        tqdm.write(f"{path}: {skipped} rows without answer skipped, {chats} chats cut to one turn")
    return list(problems.values())


def read_rows(path, split, config):
    """The raw rows. JSON is read here: errors name the line, and a column may mix types."""
    with one_line(f"cannot load the data set {path}", OSError, ValueError, RuntimeError, EOFError,
                  datasets.exceptions.DatasetsError):
        if path.endswith(".jsonl"):
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        with one_line(f"line {number} is not JSON", ValueError):
                            row = json.loads(line)
                        yield row
        elif path.endswith(".json"):
            rows = json.loads(Path(path).read_bytes())
            yield from rows if isinstance(rows, list) else [rows]
        elif path.endswith(".parquet"):
            yield from datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            name, *own = path.split(":")
            config, split = [*own, *(config, split)[len(own):]][:2]     # what `path` names wins
            rows = datasets.load_dataset(name, config or None, split=split or None)
            yield from rows if split else rows.get("test") or next(iter(rows.values()))


def read_problem(row):
    """A row of any known schema -> {"problem", "answer", "solution"}, "" where it has none."""
    def text(value):     # of chat messages the user's last turn; of a list its items, with commas
        if isinstance(value, str) and value.startswith('["'):
            with suppress(ValueError):                   # Skywork-OR1 writes a list as JSON
                value = json.loads(value)
        if isinstance(value, list):
            turns = [turn.get("content") for turn in value
                     if isinstance(turn, dict) and turn.get("role") == "user"]
            return text(turns[-1]) if turns else ", ".join(filter(None, map(text, value)))
        if isinstance(value, dict):                      # {"type": "text", "text": ...}
            value = value.get("text")
        value = "" if value is None or value != value else str(value)            # NaN is not NaN
        # "\frac" with one backslash is a form feed and "rac" in JSON: give the backslash back
        return re.sub(r"[\a\x08\v\f](?=[a-z])|\t(?=imes|ext|heta|frac)|\n(?=eq [^(])|\r(?=ight)",
                       lambda m: "\\" + "abtnvfr"[ord(m[0]) - 7], value).strip()

    def cell(*keys):
        return next(filter(None, (text(row.get(key)) for key in keys)), "")

    truth = row.get("reward_model")
    row = {**row, "reward_model": truth.get("ground_truth") if isinstance(truth, dict) else None}
    problem, solution = cell("problem", "question", "prompt"), cell("solution")
    answer = cell("answer", "final_answer", "reward_model", "Answer")
    if "####" in answer:                                 # GSM8K: the working, #### and the number
        solution, answer = answer, answer.rsplit("####", 1)[1].replace(",", "").strip()
    if "\n####" in solution:                             # it also has calculator notes <<1+1=2>>
        work, final = re.sub(r"<<[^<>]*>>", "", solution).rsplit("\n####", 1)
        solution = f"{work.strip()}\nThe answer is \\boxed{{{final.strip()}}}."
    # This cuts what other prompts ask for (DAPO-Math "Answer:", verl "####"); ours asks for a box.
    problem = re.sub(r"^Solve the following math problem step by step\. The last line [^\n]*\n\n|"
                     r"\s+(?:Remember to put your answer|Let's think step|Please reason step)[^\n]*"
                     r"(?:Answer:|####|\\boxed)[^\n]*$", "", problem)
    # proofs, nothing, tests of programs: no box could hold these answers
    boxless = re.fullmatch(r'(?is)proof|not ?found|n/a|assert\b.*|[{[]+\s*".*', answer)
    # DAPO-Math's "solution" only repeats the answer: nothing that a teacher could read
    return {"problem": problem, "answer": None if boxless else answer,
            "solution": solution if solution and solution != answer else None}


def next_problems(problems, position, count, seed):
    """`count` problems from `position` on; the order is a function of (seed, epoch) alone."""
    batch = []
    while len(batch) < count:
        epoch, place = divmod(position + len(batch), len(problems))
        shuffle = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
        order = torch.randperm(len(problems), generator=shuffle)[place:place + count - len(batch)]
        batch += [problems[i] for i in order]
    return batch


# --- 8. Many GPUs and memory; one process is a group of one ---------------------------------------


def setup():
    """Joins torchrun's process group, or makes one of a single process -> rank, world, device."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD (-3): a freed block of 4 MiB or more goes back to the system. Left alone,
        # glibc raises this bound up to 32 MiB and keeps what is below it, more with every step.
        libc.mallopt(-3, 4 << 20)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # Where torchrun is killed with -9, its ranks would go on, and write beside the run that
            # is then resumed. PR_SET_PDEATHSIG (1) makes the kernel kill (9) them as well. If
            # torchrun died before this line, its store is gone: fail now, not after a day.
            libc.prctl(1, 9)
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address).close()
    cuda, launched = torch.cuda.is_available(), dist.is_torchelastic_launched()
    if not dist.is_initialized():
        alone = {} if launched else dict(store=dist.HashStore(), rank=0, world_size=1)
        # A rank may wait for hours for another rank's longest response; torchrun sees dead ranks.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(days=1), **alone)
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK'] if launched else 0}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def shard(policy, dtype, device, offload=False):
    """FSDP2: float32 parameters, gradients and optimizer state are split over the ranks (and with
    `offload` lie in host memory). Every layer is gathered in `dtype` while it computes. The root
    holds the embeddings and the head, because the two may be tied."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    options = dict(mesh=mesh, reshard_after_forward=True,
                   mp_policy=fsdp.MixedPrecisionPolicy(dtype, torch.float32))
    if offload:                                          # pinned memory is for CUDA alone
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in list(policy.modules()):
        if type(module).__name__ in policy.model._no_split_modules:      # the decoder layers
            fsdp.fully_shard(module, **options)
    fsdp.fully_shard(policy, **options)                  # moves all to the device, layer by layer
    fsdp.register_fsdp_forward_method(policy, "generate")        # gathers the root as forward does
    # After the split, so that no rank ever holds a whole float32 copy. In bfloat16, AdamW at lr
    # 1e-6 would round every update away.
    return policy.float()


@contextmanager
def gathered(policy):
    """Inside, every rank holds whole weights: decoding communicates nothing, and the ranks may
    decode responses of different lengths."""
    # empty where nothing was split, as in eval.py
    layers = [module for module in policy.modules() if isinstance(module, fsdp.FSDPModule)]
    hooks = [(layer._forward_pre_hooks, layer._forward_hooks) for layer in layers]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
        # FSDP's hooks have nothing to gather here, but would cost time in every layer and token.
        layer._forward_pre_hooks, layer._forward_hooks = {}, {}
    yield
    for layer, (before, after) in zip(layers, hooks):
        layer._forward_pre_hooks, layer._forward_hooks = before, after
        layer.set_reshard_after_forward(True, recurse=False)
        layer.reshard()


def micro_batches(lengths, budget):
    """Splits rows of these lengths into lists of row indices, longest rows first. A micro-batch has
    at most `budget` tokens, at most a tenth of them padding; a longer row goes alone."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        bigger = batches[-1] + [i] if batches else []    # the last micro-batch with row i added
        padded = len(bigger) * max((lengths[j] for j in bigger), default=0)
        if bigger and padded <= budget and sum(lengths[j] for j in bigger) >= 0.9 * padded:
            batches[-1] = bigger
        else:
            batches.append([i])
    return batches


def refuse_nan(ids, logits):
    """Ends the run where NaN would be drawn from: ids and (rows, V) logits -> logits."""
    if logits[:, 0].isnan().any():                       # NaN in a hidden state reaches all
        raise InputError("the model's logits are NaN: its weights, or an attention kernel that "
                         "fails on left padding; try --dtype float32")
    return logits


# --- 9. Checkpoints: a run that is stopped in any way goes on with --resume -----------------------


STEP = "step-" + 6 * "[0-9]"                             # other names are somebody else's


def checkpoints(folder):
    """A run's complete checkpoints, oldest first. DCP writes .metadata last; we delete it first."""
    return sorted(file.parent for file in Path(folder).glob(f"checkpoints/{STEP}/.metadata"))


def write_whole(path, text):
    """Replaces a file such that a kill leaves the old content or the new, never half of it."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)


def save(cfg, policy, optimizer, progress, model_folder):
    """After a step: the export and the checkpoint that are due; two checkpoints stay. `progress` is
    where the run stands: steps done, data position, gate, skipped updates, failures in a row."""
    folder, step = Path(cfg.output), progress["step"]
    if progress["failures"] == 3:
        raise InputError(f"three steps in a row were not finite, up to step {step - 1}: lower "
                         f"--lr; the last checkpoint is {(checkpoints(folder) or ['none'])[-1]}")
    # The export comes first: if a kill cuts it short, the resumed run repeats this step.
    if cfg.export_every and step % cfg.export_every == 0:
        export_model(folder / f"model-{step:06d}", policy, model_folder)
    due = cfg.save_every and (step % cfg.save_every == 0 or step == cfg.steps)
    if due and not progress["failures"]:
        model, optim = dcp_state.get_state_dict(policy, optimizer)
        target = folder / "checkpoints" / f"step-{step:06d}"
        with one_line(f"cannot write {target}", OSError, RuntimeError, dcp.CheckpointException):
            dcp.save({"model": model, "optimizer": optim, "progress": json.dumps(progress)},
                     checkpoint_id=target)
        if dist.get_rank() == 0:
            for old in {*target.parent.glob(STEP)} - {*checkpoints(folder)[-2:]}:
                (old / ".metadata").unlink(missing_ok=True)      # a kill must not leave half of one
                shutil.rmtree(old)


def restore(cfg, policy, optimizer, progress):
    """Loads the newest checkpoint of the run, written by any number of ranks, and returns where the
    run stands. --init_from: weights, optimizer and data position of another run, the rest anew."""
    own = checkpoints(cfg.output) if cfg.resume else []
    if cfg.resume and not own and dist.get_rank() == 0:
        print(f"--resume: {cfg.output} holds no checkpoint, so the run starts at step 0")
    if found := own or (checkpoints(cfg.init_from) if cfg.init_from else []):
        model, optim = dcp_state.get_state_dict(policy, optimizer)
        state = {"model": model, "optimizer": optim, "progress": ""}
        with one_line(f"{found[-1]} cannot be loaded: damaged (delete it), or of another --model",
                      OSError, ValueError, RuntimeError, dcp.CheckpointException):
            dcp.load(state, checkpoint_id=found[-1])
        dcp_state.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
        old = json.loads(state["progress"])
        progress = old if own else progress | {"position": old["position"]}
    for name in ("metrics.jsonl", "samples.jsonl") if dist.get_rank() == 0 else ():
        if (file := Path(cfg.output, name)).exists():    # steps after the checkpoint are run again
            lines = [line for line in read_lines(file) if line["step"] < progress["step"]]
            write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
    return progress


def export_model(folder, policy, model_folder):
    """Writes a Hugging Face folder: tensors in the dtypes that they came in, and the source's own
    files, because engines on older transformers misread those of this version (rope_theta)."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(policy, options=options)      # on rank 0; else empty
    if dist.get_rank() == 0:
        model = policy.model
        named = [*model.named_parameters(), *model.named_buffers()]      # tied ones once
        with one_line(f"cannot write {folder}", OSError, SafetensorError):
            model.save_pretrained(folder, state_dict={
                name: x.to(policy.dtypes[name]) for name, _ in named
                if (x := state.get(f"model.{name}")) is not None})
        (folder / "generation_config.json").unlink(missing_ok=True)      # ours is that of rollouts
        # Where only the text model of a source is trained, save_pretrained's config.json is right.
        part = AutoConfig.from_pretrained(model_folder).model_type != model.config.model_type
        for file in model_folder.iterdir():
            if (re.search(r"(?<!index)\.(json|jinja|model|txt|tiktoken)$", file.name)
                    and not (part and file.name == "config.json")):
                shutil.copyfile(file, folder / file.name)
        for file in folder.glob("*.safetensors"):        # the library writes them with mode 0600
            file.chmod((folder / "config.json").stat().st_mode)
        tqdm.write(f"{folder} holds the model")
    all_gather(None)                                     # the other ranks wait for rank 0


# --- 10. Start-up and records ---------------------------------------------------------------------


def load_tokenizer(name, template_kwargs):
    """A chat model's tokenizer, its context in tokens and the folder of its files. InputError if it
    cannot be trained, before weights are read."""
    with one_line(f"--model {name} cannot be used, hub id or folder (RUN/model)", Exception):
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        model_folder = Path(transformers.utils.cached_file(name, "config.json")).parent
        if (model_folder / "tokenizer.json").exists():   # other classes may split text differently
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        # Many templates print the day. It is fixed, or a resumed run would differ from its start.
        tokenizer.chat_template = ("{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}"
                                   + tokenizer.get_chat_template())
        with torch.device("meta"):                       # all layers, without memory
            model = AutoModelForCausalLM.from_config(config)
        text_ids = {*tokenizer.get_vocab().values()} - {*tokenizer.added_tokens_decoder}
        for wrong, reason in (
            ([key for key in template_kwargs if key not in tokenizer.get_chat_template()],
             f"its chat template does not know all of {template_kwargs}"),
            (tokenizer.eos_token_id is None, "its tokenizer has no end-of-sequence token"),
            (max(text_ids) >= model.get_input_embeddings().weight.shape[0],
             "its tokenizer has more tokens than its embedding has rows"),
            (getattr(config, "quantization_config", None), "quantized: save a dequantized copy"),
            (not any(type(m).__name__ in (model._no_split_modules or ()) for m in model.modules()),
             "it does not name the layers that FSDP would split"),
            (not model._supports_default_dynamic_cache()
             or not {"past_key_values", "cache"} & {*inspect.signature(model.forward).parameters},
             "it keeps a cache of its own kind, whose rows cannot be chosen"),
            (not only_lm_head(model), "it changes its logits after lm_head"),
        ):
            if wrong:
                raise ValueError(reason)
        text_config = config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None) or 10**9
        rope = json.dumps(getattr(text_config, "rope_parameters", None))
        if re.search("longrope|dynamic", rope):          # beyond the original context, the longest
            # row of a batch would change the log-probabilities of all others
            context = min([context, *map(int, re.findall(r'original_max\w+": (\d+)', rope))])
    return tokenizer, context, model_folder


def only_lm_head(model):
    """Whether a model's logits are lm_head(hidden) and no more, as Policy.forward computes them. It
    is asked with a small head and random hidden states in place of its layers."""
    class Output(tuple):             # what the layers return; all fields but the states are None
        def __getattr__(self, name):
            return self[0] if name == "last_hidden_state" else None

    # big hidden states, so that a soft cap on the logits shows
    hidden = 50 * torch.randn(1, 2, model.get_output_embeddings().weight.shape[1])
    head = nn.Linear(hidden.shape[2], 9)
    model.set_output_embeddings(head)
    model.base_model.forward = lambda *args, **options: Output([hidden])
    return torch.allclose(model(input_ids=torch.tensor([[0, 1]])).logits, head(hidden))


def load_policy(name, dtype, tokenizer):
    """A Policy on the CPU, whole, in eval mode; dtype "auto" is the checkpoint's own."""
    with one_line(f"--model {name} cannot be loaded", OSError, ValueError, SafetensorError):
        # Dropout rates become 0: some decoder layers apply them on their own (Falcon).
        rates = {key: 0.0 for key, value in vars(AutoConfig.from_pretrained(name)).items()
                 if "drop" in key and isinstance(value, float)}
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **rates)
        if lacking := {*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"])}:
            raise ValueError(f"its files hold no fitting weights for {min(lacking)}")
    eos = model.generation_config.eos_token_id           # an id, a list of ids, or None
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    chat, end = [*student_messages("?"), {"role": "assistant", "content": "RESPONSE"}], []
    with suppress(jinja2.TemplateError):                 # a template may refuse such a chat
        _, seen, after = tokenizer.decode(render(tokenizer, chat, {})).rpartition("RESPONSE")
        end = tokenizer.encode(after.strip(), add_special_tokens=False)[:1] if seen else []
    if {*end} & {*tokenizer.added_tokens_decoder} - eos and dist.get_rank() == 0:
        print(f"{name}: its template ends a turn with {tokenizer.decode(end)}, no end token of its "
              "tokenizer or generation_config.json, so responses may run on")
    policy = Policy(model, eos)
    policy.dtypes = {key: x.dtype for key, x in model.state_dict().items()}      # for the export
    return policy


def build(cfg, tokenizer, device):
    """The policy, split over the ranks, and its optimizer."""
    policy = load_policy(cfg.model, "auto", tokenizer)
    if cfg.gradient_checkpointing and policy.model.supports_gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    auto = "bfloat16" if device.type == "cuda" else "float32"
    shard(policy, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype), device, cfg.offload)
    # our choice: verl's betas and weight decay; fused, as the default is slowest on FSDP's tensors
    return policy, torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.999),
                                     weight_decay=cfg.weight_decay, fused=True)


# the flags that may differ between a run and its --resume
FREE = {"resume", "steps", "output", "save_every", "export_every", "eval_every", "micro_tokens",
        "rollout_batch", "sampler", "tracker", "offload"}


def open_run(cfg, data):
    """Writes config.json. InputError where two runs would mix in one folder, or where a model would
    be replaced. A start that failed leaves nothing that counts as a run."""
    folder = Path(cfg.output)
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()       # of prompts and solutions
    flags = dataclasses.asdict(cfg) | {"data": digest}
    if checkpoints(folder) or any((folder / name).exists() for name in ("metrics.jsonl", "model")):
        if not cfg.resume:
            raise InputError(f"{folder} already holds a run or a model: add --resume, or choose "
                             "another --output")
        with one_line(f"--resume, but {folder} holds no run", OSError, ValueError, KeyError):
            old = json.loads((folder / "config.json").read_text())["flags"]
        if changed := [key for key in flags if key not in FREE and old.get(key) != flags[key]]:
            raise InputError("--resume with other settings than the run's: " + ", ".join(changed))
    if cfg.init_from and not (checkpoints(cfg.init_from) or cfg.resume and checkpoints(folder)):
        raise InputError(f"--init_from {cfg.init_from} holds no checkpoint")
    all_gather(None)                                     # every rank has read the old config.json
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps({
            "flags": flags, "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "world_size": dist.get_world_size()}, indent=1) + "\n")
        if cfg.tracker:                                  # one folder is one run, resumed or not
            name = re.sub(r"\W+", "-", str(folder.resolve()))[-64:]
            os.environ["WANDB_RUN_ID"] = name            # wandb resumes by id, trackio by name
            importlib.import_module(cfg.tracker).init(project="antisd", name=name, config=flags,
                                                      resume="allow")


def prepare(cfg, world):
    """Checks whatever can be wrong before any weights are loaded. Returns the tokenizer, the folder
    of the model's files, the most tokens of a teacher's prompt, training and held-out problems."""
    if cfg.problems_per_step % (world * cfg.updates_per_batch):
        raise InputError(f"--problems_per_step {cfg.problems_per_step} must be a multiple of ranks "
                         f"({world}) x --updates_per_batch ({cfg.updates_per_batch})")
    tokenizer, context, model_folder = load_tokenizer(cfg.model, cfg.template_kwargs)
    messages = teacher_messages("?", "?", False)
    with one_line(f"--model {cfg.model}: its chat template fails", jinja2.TemplateError):
        render(tokenizer, messages, cfg.template_kwargs)
    # 150 tokens are for the teacher's headings and the tail of a solution.
    room, sets = min(cfg.max_prompt_tokens, context - cfg.max_tokens - 150), []
    for path, split in ((cfg.dataset, "train"), (cfg.eval_dataset, None)):
        problems = load_problems(path, split) if path else []
        add_prompts(problems, path, tokenizer, cfg.template_kwargs)
        sets.append([p for p in problems if len(p["prompt"]) <= room])
        if path and not sets[-1]:
            raise InputError(f"{path}: no problem fits into the {room} tokens that the model's "
                             f"context ({context}), --max_tokens and --max_prompt_tokens leave")
        if len(sets[-1]) < len(problems) and dist.get_rank() == 0:
            print(f"{path}: dropped {len(problems) - len(sets[-1])} of {len(problems)} (too long)")
    open_run(cfg, sets)
    return tokenizer, model_folder, context - cfg.max_tokens, *sets


def add_prompts(problems, path, tokenizer, template_kwargs):
    """Gives each problem its student's "prompt" ids. InputError names a row that has none."""
    for p in problems:
        messages = student_messages(p["problem"])        # half a surrogate pair is a TypeError
        with one_line(f"{path}: the problem of row {p['id'] + 1} cannot be rendered",
                      jinja2.TemplateError, TypeError, UnicodeError):
            p["prompt"] = render(tokenizer, messages, template_kwargs)
            tokenizer.encode(p["solution"] or p["answer"])


def evaluate(policy, tokenizer, problems, cfg, step):
    """Held-out accuracy and its standard error, as metrics; every evaluation has the same seed."""
    metrics, rank, world = {}, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(hash((cfg.seed, rank)))
    with timer("eval", metrics):
        rollouts = roll_out(policy, tokenizer, problems[rank::world], 1, cfg.sampler,
                            max_tokens=cfg.max_tokens, temperature=0.7, top_p=0.95,
                            rollout_batch=cfg.rollout_batch)
    rewards = sum(all_gather([r.reward for r in rollouts]), [])
    mean, error = statistics.fmean(rewards), statistics.pstdev(rewards) / len(rewards)**0.5
    if rank == 0:
        tqdm.write(f"step {step}: held-out accuracy {mean:.3f} +- {error:.3f}")
    return metrics | {"eval_accuracy": mean, "eval_error": error}


@contextmanager
def timer(name, metrics):
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    metrics[f"seconds/{name}"] = time.perf_counter() - start


def read_lines(file):
    """The objects of a .jsonl file, without a last line that a kill cut short; [] if no file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append(file, value):
    """Adds a line of JSON. NaN is not JSON, so null stands for what is not finite."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(value) + "\n")


def log_metrics(cfg, metrics):
    append(Path(cfg.output, "metrics.jsonl"), metrics)
    if cfg.tracker:
        importlib.import_module(cfg.tracker).log(metrics, step=metrics["step"])


def summary(rollouts, origins, mask, a_seq, u, H_S, H_T, cfg, metrics):
    """The step's metrics over all ranks: sums and counts are gathered, then divided once."""
    facts = sum(all_gather([(r.reward, len(r.ids), r.truncated) for r in rollouts]), [])
    rewards, lengths, truncated = zip(*facts)
    complete = [reward for reward, cut in zip(rewards, truncated) if not cut]
    groups = [rewards[i:i + cfg.group_size] for i in range(0, len(rewards), cfg.group_size)]
    shown, peak = sum(all_gather(origins), []), None
    if torch.cuda.is_available():                        # of the fullest rank, since the last step
        peak = max(all_gather(torch.cuda.max_memory_allocated())) / 2**30
        torch.cuda.reset_peak_memory_stats()

    def of_teacher(pool, values):                        # null for grpo, which runs no teacher
        return pool(values, mask) if origins else None
    return {"reward": statistics.fmean(rewards),
            "reward_complete": statistics.fmean(complete) if complete else None,
            "length": statistics.fmean(lengths), "truncated": statistics.fmean(truncated),
            "zero_std_groups": statistics.fmean(len(set(group)) == 1 for group in groups),
            "seq_adv_abs": global_mean(a_seq.abs()[:, None].expand_as(mask), mask),
            "student_entropy": global_mean(H_S, mask),
            "teacher_entropy": of_teacher(global_mean, H_T),
            "teacher_entropy_median": of_teacher(global_median, H_T),
            "u_mean": of_teacher(global_mean, u),
            "u_negative": of_teacher(global_mean, (u < 0).float()),
            "phi_abs": of_teacher(global_mean, METHODS[cfg.method](u).abs()),
            **{f"context/{name}": shown.count(name) / len(rewards)
               for name in ("sibling", "solution", "answer")},
            "tokens_per_s": sum(lengths) / sum(metrics[f"seconds/{name}"]
                                               for name in ("rollout", "score", "train")),
            "peak_memory_gib": peak}


def record(cfg, metrics, bar, rollouts, origins, u, H_T, tokenizer):
    """A step's metrics into metrics.jsonl, tracker and progress bar; every tenth step also two
    rollouts with their u into samples.jsonl, where bugs of templates and rewards show first."""
    step = metrics["step"]
    log_metrics(cfg, metrics)
    if step == cfg.warmup_steps - 1 and metrics["h_warm"] is not None and metrics["h_warm"] < 0.01:
        tqdm.write(f"H_warm is {metrics['h_warm']:.4f} nats a token: too little for the gate")
    if step % 10 == 0:
        for i in (0, len(rollouts) - 1):
            r, n = rollouts[i], len(rollouts[i].ids)
            append(Path(cfg.output, "samples.jsonl"), {
                "step": step, "problem": r.problem["problem"], "answer": r.problem["answer"],
                "response": r.text, "reward": r.reward, "truncated": r.truncated,
                "context": origins[i] if origins else None,
                "tokens": tokenizer.convert_ids_to_tokens(r.ids),
                "u": u[i, :n].tolist() if origins else None,
                "teacher_entropy": H_T[i, :n].tolist() if origins else None})
        shown = r.text if len(r.text) < 1200 else r.text[:600] + " [...] " + r.text[-600:]
        tqdm.write(f"\n[step {step}, reward {r.reward:.0f}] {shown}\n")
    bar.set_postfix_str(f"reward {metrics['reward']:.3f}, length {metrics['length']:.0f}, lambda "
                        f"{metrics['lam'] or 0:g}, {metrics['tokens_per_s']:.0f} tok/s")


def finish(cfg, policy, tokenizer, held_out, model_folder):
    """After the last step: the learning curve's last point, the export, what happened in words."""
    last = evaluate(policy, tokenizer, held_out, cfg, cfg.steps) if held_out else {}
    export_model(Path(cfg.output, "model"), policy, model_folder)
    if dist.get_rank() == 0:
        if last:
            log_metrics(cfg, {"step": cfg.steps} | last)
        if cfg.tracker:
            importlib.import_module(cfg.tracker).finish()
        lines = read_lines(Path(cfg.output, "metrics.jsonl"))
        marks = [f"{line['eval_accuracy']:.3f}" for line in lines if "eval_accuracy" in line]
        gates = [(line["step"], line["gate"]) for line in lines if line.get("gate") is not None]
        moves = [f"{'opened' if g else 'shut'} at step {step}"
                 for (_, before), (step, g) in zip(gates, gates[1:]) if g != before]
        if marks:
            print(f"held-out accuracy: {marks[0]} before, {marks[-1]} after")
        if gates:
            print("the gate " + (", ".join(moves) or "never moved"))


def main(program, kind=Config):
    """The command line of `program`, a function of a `kind` of configuration. An InputError costs
    one line and exit code 2. Rank 0 locks the output folder until its process ends in any way."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)       # about names that transformers 6 drops
    for stream in (sys.stdout, sys.stderr):              # printing a character that the terminal
        stream.reconfigure(errors="replace")             # does not know must not end a run
    leads = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    try:
        cfg = parse_config(kind=kind)
        with one_line(f"cannot write into {cfg.output}, or another process is at work there",
                      OSError):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(Path(cfg.output, ".lock"))
            held = lock.acquire(timeout=0) if leads else nullcontext()
        with held:
            program(cfg)
        gc.collect()       # gloo's threads must end with the model, not while the interpreter does
        dist.destroy_process_group()
    except InputError as error:
        if not leads:                                    # rank 0 mostly prints the same, and then
            time.sleep(5)                                # torchrun ends this rank
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(train)
