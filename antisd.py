r"""AntiSD, Anti-Self-Distillation for reasoning RL, in one readable file.

The method is that of "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information"
(Shen et al., 2026, arXiv 2605.11609); equation and table numbers below are the paper's. A language
model answers a problem, a verifier grades the answer, and GRPO reinforces what beat its group.
Beside that, the same network reads the problem once more together with a verified solution c (it
is then called the self-teacher) and scores the student's own tokens. Self-distillation would pull
the student towards that teacher. AntiSD pushes it away, with a capped reward for what the teacher
finds unlikely, and a gate switches the push off when the teacher's entropy collapses.

    torchrun antisd.py @toy/demo.args                                    # a laptop, minutes
    torchrun --nproc-per-node 8 antisd.py --model Qwen/Qwen3-4B-Instruct-2507 \
        --max_tokens 8192 --rollout_batch 16 --gradient_checkpointing --output runs/qwen3-4b

Algorithm 1, line by line, all of it in train():
    1  y ~ pi_S(.|x), G responses per problem, R(x, y)                   roll_out
    2  s_t = log pi_S(y_t)                                               update's forward pass
    3  t_t = log pi_T(y_t), with c in the prompt                         score
    4  u_t = t_t - s_t, the pointwise mutual information, Eq. (4)        advantages
    5  phi(u_t), bounded below, Eq. (6)                                  METHODS, phi
    6  H, the teacher's entropy over the batch                           global_mean
    7  g, the Schmitt trigger; lambda = g * lambda_max, Eq. (7)          EntropyGate
    8  A_t = A_seq - lambda * sg[phi(u_t)], Eq. (2), (6)                 token_advantages
    9  one policy-gradient update                                        update, policy_loss

Read sections 1 to 4 and 10; sections 5 to 9 are what any trainer needs around them: cfg.NAME is
the flag --NAME, explained in section 5. Left out on purpose: critic, KL term, reference model,
reward model, inference engine, tensor parallelism.
Shapes: B problems on this rank with G responses each, which are N = B * G rows, groups consecutive;
T tokens of the longest response, L of the longest prompt with its response, V words, D hidden. Of a
micro-batch, n rows and T' tokens; M response tokens without padding, m of them at a time.
Logarithms are natural, so log-probabilities, u and entropies are in nats. Where the paper is silent
the line says `our choice` or `not in the paper`; the README lists the choices that change results.
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
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

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
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache,
                          GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast)

# --- 1. The method: pure tensor functions ---------------------------------------------------------


def group_advantages(rewards, group_size):
    """GRPO's sequence advantage A_seq = (R - mean R) / std R within each group.

    rewards (N,), where each group is `group_size` consecutive entries; returns (N,).
    """
    groups = rewards.view(-1, group_size)                                            # (B, G)
    centred = groups - groups.mean(1, keepdim=True)
    # our choice: unbiased std + 1e-6; an all-equal group gets exactly 0, not rounding noise / 1e-6
    advantages = centred / (groups.std(1, keepdim=True) + 1e-6)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def phi(u):
    """Eq. (6): minus the derivative of the JSD's generator at pi_S / pi_T = exp(-u); any shape.

    Rises from -log(2)/2 (u << 0: deliberation, such as "Wait", which the teacher finds unlikely)
    through phi(0) = 0 with slope 1/4 to (u - log(2))/2 (u >> 0: shortcuts that the solution
    implies). softplus and not log(1 + exp(u)), because that one overflows.
    """
    return 0.5 * (F.softplus(u) - math.log(2))


# The arms: the per-token term delta in A_t = A_seq + lambda * delta(u), u = log pi_T - log pi_S.
# To try a signal of your own, add it here, and to GATED if the gate should rule it. With v drawn
# from pi_S and the teacher held fixed,
#     grad JSD(pi_S || pi_T) = E[-phi(u_v) grad log pi_S(v)]     so delta = -phi ascends the JSD,
#     grad  KL(pi_S || pi_T) = E[  -u_v    grad log pi_S(v)]     so delta = +u descends the KL,
#     grad  KL(pi_T || pi_S) = E[-exp(u_v) grad log pi_S(v)]     so delta = 1 - exp(u) ascends it.
METHODS = {
    "grpo": torch.zeros_like,           # the baseline
    "sd": lambda u: u,                  # self-distillation, Eq. (3)
    "sd_jsd": phi,                      # descends the JSD, as the paper's table probably did
    "antisd": lambda u: -phi(u),        # Eq. (6)
    "antisd_kl": lambda u: -u,          # ablation: ascends the reverse KL, without the cap
    "no_teacher": lambda u: -phi(u),    # ablation: train() sets log pi_T := 0, so that u = -s;
                                        # the gate still reads the teacher's entropy
}

GATED = ("antisd", "antisd_kl", "no_teacher")    # our choice: warm-up and gate are AntiSD's alone


def token_advantages(seq_advantages, u, lam, method="antisd", compose="add"):
    """Every token's advantage, Eq. (2): A_t = A_seq + lambda * sg[delta(u_t)].

    seq_advantages (N,), u (N, T) in nats, lam >= 0; returns (N, T) without gradient. With lam = 0
    this is GRPO. compose="mul" is Table 3's A_seq * (1 + lambda * delta), which vanishes where a
    group is all right or all wrong; the additive form still acts there.
    """
    delta = METHODS[method](u.detach())
    a_seq = seq_advantages.detach()[:, None]
    if compose == "mul":
        return a_seq * (1 + lam * delta)
    return a_seq + lam * delta


class EntropyGate:
    """The Schmitt trigger of Eq. (7) on the teacher's entropy H, in nats per token.

    For `warmup_steps` steps it returns 0 and records H; h_warm is their median. Then it is open,
    g = 1, and g <- 1 if H >= h_warm; g <- 0 if H < tau_down * h_warm; else unchanged. tau_down=0:
    never shuts.
    """

    def __init__(self, warmup_steps=5, tau_down=0.93):
        self.warmup_steps, self.tau_down = warmup_steps, tau_down
        self.history, self.h_warm, self.g = [], None, 1.0        # our choice: it starts open

    def update(self, entropy):
        """Takes this step's H (a float), returns this step's g: 0.0 or 1.0."""
        if not math.isfinite(entropy):                   # a broken batch calibrates nothing
            return 0.0
        if len(self.history) < self.warmup_steps:
            self.history.append(float(entropy))
            if len(self.history) == self.warmup_steps:
                # our choice: the median of the step values; the paper does not say how it pools
                self.h_warm = statistics.median(self.history)
            return 0.0
        if self.h_warm is None:                          # warmup_steps=0: nothing to compare with
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
    the mask's sum over the WHOLE update, all its micro-batches and ranks, so that the losses of the
    micro-batches add up to the update's loss however it was split. With one update per batch
    old_logp is logp itself: r = 1, the clip is inert, the loss is -mean A, and its gradient
    -mean(A grad log pi).
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
    """What pi_T reads (Appendix C): the student's turn and then c, a verified solution and the
    verdict on the student's own response. No solution means no c: the student's messages."""
    messages = student_messages(problem)
    if solution:
        # the verdict is of the student's own response, not of the solution above it: the paper's
        # words. Concatenated, because solutions are full of braces, backslashes and percent signs
        messages[-1]["content"] += (
            "\n\nYour previous attempt:\n" + solution
            + "\n\nPrevious assessment: Your answer is " + ("correct." if correct else "incorrect.")
            + "\n\nNow solve this problem step by step.")
    return messages


def render(tokenizer, messages, template_kwargs):
    """Chat messages -> prompt ids, the same call for student, teacher and evaluation: whatever
    differed besides c would show up in u."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                         return_dict=False, **template_kwargs)


@dataclasses.dataclass
class Rollout:
    problem: dict           # a row of load_problems, with the student's prompt ids as "prompt"
    ids: list               # the response's ids, up to and including its first end-of-sequence id
    text: str               # ids decoded: what is graded and, if right, shown to the teacher
    truncated: bool         # ran into max_tokens
    reward: float           # R in {0, 1}


def pick_solutions(group, rng):
    """The verified solution that each response of one group is shown: [(text, source), ...].

    A correct sibling, the same one for the whole group. That sibling itself is shown another
    correct one, because the teacher would only copy what it is to score. Without a correct sibling
    it is the data set's worked solution, else its bare answer. group: a list of Rollout; rng: a
    random.Random.
    """
    correct = [r for r in group if r.reward == 1.0]
    rng.shuffle(correct)                                 # our choice: seeded random, not the first
    picks = []
    for r in group:
        sibling = next((c for c in correct if c is not r), None)         # our choice: never itself
        worked = final_part(r.problem["solution"] or "")
        if sibling:
            picks.append((final_part(sibling.text), "sibling"))
        elif worked:
            picks.append((worked, "solution"))
        else:
            picks.append(("The answer is \\boxed{" + r.problem["answer"] + "}.", "answer"))
    return picks


def teacher_prompts(tokenizer, rollouts, group_size, template_kwargs, longest, seed, position=0):
    """pi_T's prompt for each rollout, and where its solution came from: two lists of N.

    A solution that makes a prompt longer than `longest` tokens loses its head (the answer is in the
    tail); nothing else is ever cut. position: of the first problem in the data order, which seeds
    the choice of siblings, so that it is the same for any number of ranks.
    """
    def view(r, solution):
        messages = teacher_messages(r.problem["problem"], solution, r.reward == 1.0)
        return render(tokenizer, messages, template_kwargs)

    prompts, sources = [], []
    for first in range(0, len(rollouts), group_size):
        group = rollouts[first:first + group_size]
        # tuples of integers hash alike in every process
        rng = random.Random(hash((seed, position + first // group_size)))
        for r, (solution, source) in zip(group, pick_solutions(group, rng)):
            prompt, tail = view(r, solution), tokenizer.encode(solution, add_special_tokens=False)
            while len(prompt) > longest and tail:        # again, as decoded text may be more ids
                tail = tail[len(prompt) - longest:]
                prompt = view(r, "..." + tokenizer.decode(tail))
            prompts.append(prompt)
            sources.append(source)
    return prompts, sources


# --- 3. The verifiable reward ---------------------------------------------------------------------

def final_part(text):
    """What follows the last thought, stripped; "" where a thought is still open."""
    tail = text.rpartition("</think>")[2].strip()
    return "" if "<think>" in tail else tail


def extract_boxed(text):
    r"""What the last complete \boxed{...} or \fbox{...} after the thoughts holds, or None."""
    opened, box, text = [], None, final_part(text)       # opened: where the braces' boxes start
    for m in re.finditer(r"\\(?:boxed|fbox)\s*(?:(\{)|(-?\d+))|(?<!\\)\\[{}]|([{}])", text):
        if m[2]:
            box = m[2]                                   # \boxed 5
        elif m[1] or m[3] == "{":
            opened.append(m.end() if m[1] else None)
        elif m[3] and opened and (start := opened.pop()):
            box = text[start:m.start()]                  # an outer box closes last
    return box


def is_correct(response, answer):
    """Whether the response's last box equals the reference answer, both text: bool. It never
    raises, nor must what you put in its place. The box is ours, because math-verify would join
    several boxes and fall back on numbers in the prose."""
    gold, box = answer.strip(), (extract_boxed(response) or "").strip()
    if not 0 < len(box) <= max(300, 2 * len(gold)):
        return False
    if gold.isdecimal() and box.isdecimal():             # all of DAPO-Math and AIME
        return int(gold) == int(box)
    try:
        return same_value(gold, box)                     # section 6
    except Exception:                                    # whatever it stumbles over is no answer
        return False


# --- 4. The policy: rollouts and log-probabilities from one set of weights, on all ranks ----------


def token_logprobs(hidden, lm_head, targets, temperature=1.0, chunk=1024):
    """log pi(target) and the entropy of pi, from hidden states, without ever holding all logits.

    hidden (M, D), lm_head: a module (m, D) -> (m, V) logits, targets (M,) ids; returns ((M,), (M,))
    in nats, fp32; no gradient flows through the entropy. At most `chunk` rows of logits exist at a
    time, fewer for big vocabularies (2^26 logits, 256 MiB), and backward recomputes them: 32K
    tokens x 152K words in fp32 would be 20 GB.
    """
    def piece(h, y):
        # upcast first: a bf16 log-softmax would err by 0.01 nats. The bf16 head's own rounding, up
        # to 0.06 for logits of 16 to 32, stays, as in generation
        logps = F.log_softmax(lm_head(h).float() / temperature, dim=-1)              # (m, V)
        logp = logps.gather(-1, y[:, None]).squeeze(-1)
        with torch.no_grad():            # last, so that backward's recomputation stops before it
            # clamped, because p = 0 with log p = -inf would give nan
            entropy = -torch.linalg.vecdot(logps.exp(), logps.clamp_min(-1e9))
        return logp, entropy

    if hasattr(lm_head, "weight"):
        chunk = max(1, min(chunk, 2**26 // lm_head.weight.shape[0]))
    parts = [checkpoint(piece, h, y, use_reentrant=False, preserve_rng_state=False)
             for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


class Policy(nn.Module):
    """A Hugging Face causal language model; pi_S and pi_T are this one network on two prompts."""

    def __init__(self, model, eos_ids):
        super().__init__()
        self.model, self.eos_ids, self.source_dtype = model.eval(), sorted(eos_ids), model.dtype
        # student and teacher must be one function: no dropout, not even in the train mode that
        # gradient checkpointing needs. Its rates are p of nn.Dropout, or numbers of that name in a
        # module or in the configuration
        for part in (model.config, *model.modules()):
            for name, value in vars(part).items():
                if "drop" in f"{type(part).__name__} {name}".lower() and isinstance(value, float):
                    setattr(part, name, 0.0)
        # the checkpoint's top_k, penalties and so on would change the distribution we sample from
        model.generation_config = GenerationConfig()

    def forward(self, ids, predicts, temperature=1.0):
        """Log-probs and entropies of the response tokens of right-padded rows (see `pack`).

        ids (n, L); predicts (n, L-1) bool: token j+1 is a response token. Returns (n, T), (n, T)
        in nats, zeros past a response's end. Padding stands on the right, where causal attention
        never looks, so no attention mask is needed.
        """
        hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]            # (n, L, D)
        logp, entropy = token_logprobs(hidden[:, :-1][predicts], self.model.get_output_embeddings(),
                                       ids[:, 1:][predicts], temperature)            # (M,), (M,)
        lengths = predicts.sum(1)
        mask = torch.arange(max(1, int(lengths.max())), device=ids.device) < lengths[:, None]
        empty = torch.zeros(mask.shape, device=ids.device)                           # (n, T)
        return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)

    def generate(self, **inputs):
        return self.model.generate(**inputs)


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; the one collective besides FSDP's."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def global_mean(values, mask):
    """Mean of values (N, T) where mask, over ALL ranks; 0 where nothing is."""
    parts = gather((values[mask].double().sum().item(), int(mask.sum())))
    total, count = map(sum, zip(*parts))
    return total / max(1, count)


def global_median(values, mask):
    """Median over ALL ranks' tokens (our choice: an average of ranks' medians is not a median)."""
    ordered = torch.cat(gather(values[mask].cpu())).double().sort().values
    return ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean().item()


def micro_batches(lengths, budget):
    """Row indices in micro-batches of similar length, longest first: rows * longest <= budget, at
    most a tenth of it padding; a row beyond the budget goes alone."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] + [i] if batches else []
        padded = len(last) * max((lengths[j] for j in last), default=0)
        if last and padded <= budget and sum(lengths[j] for j in last) >= 0.9 * padded:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def as_many_everywhere(batches):
    """`batches` and then empty ones, up to the count of the rank that has most.

    Every forward pass of a sharded model is a communication that all ranks must take part in. A
    rank that has run out of work is idle: `pack` makes a row without response tokens of its empty
    batch, which has no log-probs and a loss of 0.
    """
    return batches + [[]] * (max(gather(len(batches))) - len(batches))


def pack(prompts, responses, device):
    """prompt + response, right-padded -> ids (n, L), predicts (n, L-1). No rows: one idle row."""
    rows = [p + r for p, r in zip(prompts, responses)] or [[0, 0]]
    width = max(map(len, rows))                          # L
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (n, L)
    predicts = torch.zeros(len(rows), width - 1, dtype=torch.bool, device=device)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        predicts[i, len(prompt) - 1:len(prompt) + len(response) - 1] = True
    return ids, predicts


@torch.no_grad()
def sample(policy, prompts, group_size, max_tokens, temperature=1.0, top_p=1.0, rollout_batch=0,
           sharded=False, stride=32):
    """`group_size` responses to every prompt: y ~ pi_S(.|x), Algorithm 1 line 1.

    prompts: lists of ids. Returns len(prompts) * group_size lists of ids, groups consecutive, each
    up to and including its first end-of-sequence id, or max_tokens long. temperature 0 is greedy;
    rollout_batch > 0 bounds the responses decoded at once (to whole groups). sharded: the weights
    stay split over the ranks, so that every rank decodes, if idly, until the last one has ended.
    """
    policy.eval()       # in train mode gradient checkpointing would drop the cache without a word
    # top_k=0, because its default of 50 would truncate the law; remove_invalid_values, because
    # with weights that are NaN `update` should end the run, with one line, and not the draw
    settings = dict(do_sample=temperature > 0, top_k=0, eos_token_id=policy.eos_ids,
                    pad_token_id=policy.eos_ids[0], synced_gpus=sharded, remove_invalid_values=True)
    if temperature > 0:
        settings |= dict(temperature=temperature, top_p=top_p)
    size = max(1, rollout_batch // group_size if rollout_batch else len(prompts))
    parts, responses = [prompts[i:i + size] for i in range(0, len(prompts), size)], []
    for part in as_many_everywhere(parts) if sharded else parts:
        drawn = decode(policy, part or [[0, 0]], group_size, max_tokens,     # [[0, 0]]: idle row
                       max_tokens if sharded else stride, settings)
        responses += drawn if part else []
    return responses


def decode(policy, prompts, group_size, max_tokens, stride, settings):
    """The part of `sample` that is one batch. Every `stride` tokens ended rows leave it."""
    device, width = next(policy.parameters()).device, max(map(len, prompts))
    ends = torch.tensor(policy.eos_ids, device=device)   # what ends a response
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=policy.model.config)     # knows windows and linear attention
    # read each prompt, but for its last token, once for its group; generate() must draw one token
    # here, which is not used
    policy.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                    max_new_tokens=1, **settings)
    keep = torch.arange(len(prompts), device=device).repeat_interleave(group_size)   # G copies
    ids, mask, responses = ids[keep], mask[keep], [[] for _ in keep]
    alive = list(responses)                              # those of these lists that still grow
    for done in range(0, max_tokens, stride):
        cache.reorder_cache(keep)        # its rows; the one way that every kind of layer offers
        whole = policy.generate(input_ids=ids, attention_mask=mask, past_key_values=cache,
                                max_new_tokens=min(stride, max_tokens - done), **settings)
        new = whole[:, ids.shape[1]:]                                              # (n, <= stride)
        ended = torch.isin(new, ends)                    # (n, <= stride)
        stops = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
        for response, tokens, stop in zip(alive, new.tolist(), stops.tolist()):
            response += tokens[:stop]                    # the end token is an action too: it stays
        keep = (~ended.any(1)).nonzero().squeeze(1)      # those that go on
        if not len(keep):
            break
        ids, alive = whole[keep], [alive[i] for i in keep.tolist()]
        mask = torch.cat([mask[keep], mask.new_ones(len(keep), new.shape[1])], 1)
    return responses


def roll_out(policy, tokenizer, problems, group_size, sampler="generate", **settings):
    """`group_size` graded responses to each problem, consecutive; settings: those of `sample`."""
    sharded = sampler == "sharded"
    with nullcontext() if sharded else gathered(policy):
        responses = sample(policy, [p["prompt"] for p in problems], group_size, sharded=sharded,
                           **settings)
    # special tokens are no text, but <think> and </think> are, which some tokenizers call special
    special = {i for i, token in tokenizer.added_tokens_decoder.items()
               if token.special and token.content not in ("<think>", "</think>")}
    rollouts = []                                        # in the problems' order
    for i, ids in enumerate(responses):
        problem = problems[i // group_size]
        text = tokenizer.decode([x for x in ids if x not in special])
        if tokenizer.decode(problem["prompt"][-16:]).rstrip().endswith("<think>"):
            text = "<think>" + text                      # which the template had opened
        rollouts.append(Rollout(problem, ids, text, ids[-1] not in policy.eos_ids,
                                float(is_correct(text, problem["answer"]))))
    return rollouts


@torch.no_grad()
def score(policy, prompts, responses, micro_tokens, temperature=1.0):
    """log pi(y_t | prompt, y_<t) and the entropies, (N, T) each, in nats, zeros past the end."""
    policy.eval()                                        # see sample
    device = next(policy.parameters()).device
    logp = torch.zeros(len(prompts), max(map(len, responses)), device=device)  # (N, T)
    entropy = torch.zeros_like(logp)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    for rows in as_many_everywhere(micro_batches(lengths, micro_tokens)):
        part = policy(*pack([prompts[i] for i in rows], [responses[i] for i in rows], device),
                      temperature)                                                   # (n, T') each
        # no rows: an idle pass beside other ranks'
        logp[rows, :part[0].shape[1]], entropy[rows, :part[1].shape[1]] = part
    return logp, entropy


# --- 5. Configuration (safe to skip): every field is a flag, defaults are the paper's or say so ---


class InputError(ValueError):
    """Something that the user can mend: `main` prints it as one line and exits with code 2."""


@contextmanager
def one_line(what):
    """Whatever goes wrong inside is about the user's input, and becomes an InputError."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:        # that one is no Exception
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from None


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


def template_variables(text):
    with one_line("--chat_template_kwargs must be a JSON object"):
        return dict(json.loads(text).items())


@dataclasses.dataclass
class Config:
    # the model and what it reads
    model: str = flag("", "Hugging Face folder or hub id of a chat model (required)")
    dataset: str = flag("open-r1/DAPO-Math-17k-Processed", "training problems (Table 5): .jsonl, "
                        ".json or .parquet file, or hub id, also as id:config:split")
    dataset_config: str = flag("", "configuration of a hub data set (of the default set: all)")
    split: str = flag("train", "split of a hub data set")
    max_prompt_tokens: int = flag(2048, "longer problems are dropped and counted (not the paper's)")
    chat_template_kwargs: str = flag("{}", "JSON for the chat template, of student and teacher: "
                                     """'{"enable_thinking": false}' for Qwen3 hybrids""")
    # the method
    method: Literal[tuple(METHODS)] = flag("antisd", "which per-token term joins GRPO")
    compose: Literal["add", "mul"] = flag("add", "A + lam * delta, or A * (1 + lam * delta)")
    lam: float = flag(0.5, "lambda_max, weight of the per-token term (Table 5)")
    warmup_steps: int = flag(5, "W: steps with lambda 0 that calibrate H_warm (Table 5)")
    tau_down: float = flag(0.93, "the gate shuts below tau_down * H_warm; 0: no gate (Table 5)")
    gate_stat: Literal["mean", "median"] = flag("mean", "of token entropies; paper: median")
    gate_source: Literal["teacher", "student"] = flag("teacher", "whose entropy (Table 3)")
    # the rollout
    problems_per_step: int = flag(32, "B, over all ranks (Table 5)")
    group_size: int = flag(8, "G, responses per problem (Table 5)")
    max_tokens: int = flag(32768, "longest response, in tokens (Table 5)")
    temperature: float = flag(1.0, "of rollouts; scoring divides by it too (Table 5)")
    rollout_batch: int = flag(0, "responses decoded at once on a rank; bounds the cache; 0: all")
    sampler: Literal["generate", "sharded"] = flag("generate", "generate: whole weights on every "
        "rank; sharded: they stay split, slow, for models that do not fit on one GPU")
    # the update
    lr: float = flag(1e-6, "AdamW's constant learning rate (Table 5)")
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
    gradient_checkpointing: bool = flag(False, "recompute layers in backward: slower, leaner")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "to compute in; auto: bfloat16 on "
                                                         "CUDA, else float32; masters: float32")
    seed: int = flag(0, "of data order, rollouts and the choice of solutions")
    # validation and records
    eval_dataset: str = flag("", "held-out problems, file or id:config:split; temperature 0.7")
    eval_every: int = flag(20, "steps between evaluations, one response to every problem")
    output: str = flag("runs/antisd", "folder of this run")
    save_every: int = flag(20, "steps between checkpoints, of which two stay; 0: none")
    export_every: int = flag(0, "steps between folders model-000100/; 0: the last, model/, only")
    resume: bool = flag(False, "continue the run in --output from its newest checkpoint")
    init_from: str = flag("", "continual AntiSD: a run whose weights, optimizer and data position "
                          "to start from, with step count and gate fresh")
    tracker: Literal["", "wandb", "trackio"] = flag("", "where to log as well, if installed")

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
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.error = refuse
    with one_line("flags"):                              # an @file may lack a closing quote
        flags = parser.parse_args(argv)
    return kind(**vars(flags))


# --- 6. Answers and problems (safe to skip) -------------------------------------------------------

LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none",
    equations=False))]
# what would keep a computer algebra system busy: towers of powers, big exponents and factorials,
# sums; and what it misreads: ratios, and digits in another base
REFUSED = re.compile(r"\^\W*\w*\W*\^|\^[^^]*[)}]\s*\^|\^\W*\d{4}|\)\s*\^\W*\d{3}|\d{60}"
                     r"|\d{4}\W*!|!\W*!|\d_|[?:]|binom\D*\d{4}|(?:[({\[][^)}\]]*){12}"
                     r"|\\(?:sum|prod|i*nt|lim)(?![a-z])")
UNIT = (r"(?!\W*(?:\w*illion|thousand|hundred|dozen|not|is|if|or|and|than|to|[eidxyzn])s?\b)"
        r"[A-Za-z][^{}\d,?=+-]{0,30}(?:\^\{?-?\d\}?)?")
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    # marks without a value go, and signs get their LaTeX name
    ("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    ("[！-～]", lambda m: unicodedata.normalize("NFKC", m[0])),                # full width
    ("[−–]", "-"), (r"×|·|\\cdot", r"\\times "), ("√", r"\\sqrt "), ("[、；;&]", ","),
    (r"\\?%", r"\\%"), (r"\\\\(?:\[\w+\])?", ",row,"), (r"\\[{}]", ""),
    (r"\\begin\{\w*matrix\}", "("), (r"\\end\{\w*matrix\}", ")"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boldsymbol|bf|[lL]arge|color\{\w+\})(?![a-z])"
     r"|\\?\$|\*\*|\^\{?\s*(?:\\circ|°)\s*\}?|\\degree|°", ""),
    (r"\\(?:text|math|mbox|operatorname)(?!bb|cal)[a-z]*\s*\{", r"\\text{"),
    # 3{,}159 and 3\,159 and 3 159 and 3,159, but not (3,159), are one number; then units
    (r"(?<=\d)(?:\{,\}|,?\s*\\!\s*|\\,|[ ~])(?=\d{3}(?!\d))", ""), (r"\\[,:;!> ]|~|\s+", " "),
    (r"(?<![\d,.([{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"[\s,]*(?:\\text\{,?\s*(?:or|and)\s*\}|\b(?:or|and)\b)", ","),
    (rf"(?<=[\w)}}.%])(?:[\s/]*\\text\{{\s*{UNIT}\s*\}}(?:\^\{{?-?\d\}}?)?)+", ""),
    (r"\\text\{([^{}]*)\}", r" \1 "), (r"\(?(\d+)\)?_\{?\s*(\d+)\s*\}?", r"\1_\2"),
    (r"([A-Za-z])_(\w)", r"\1_{\2}"),
    # 1 3/4, 4.5e33, decimals as fractions, sqrt(2), arctan, x'
    (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"), (r"(?<=\d) +(?=\d)", ","),
    (r"(?<=\d)\s*(?:[eE]\+?|x\s*10\^)\{?(-?\d+)\}?", r" \\times 10^{\1}"),
    (r"(?<=\d)\.0*(?!\d)", ""),
    (r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}"),
    (r"(?:np\.)?(?<![\\a-z])(arc[a-z]+|sqrt|pi)(?![a-z])", r"\\\1"),
    (r"\\sqrt\s*\(?(\d+)\)?", r"\\sqrt{\1}"),
    (r"([A-Za-z])(?:'|\^\{?\s*\\prime\s*\}?)", r"\1_{1}"), (r"([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2"),
    (r"^[({]+([^(),{}]*)[)}]+$", r"\1"))]


def same_value(gold, box):
    """Whether two LaTeX answers mean the same, by math-verify behind our own rewrite rules.

    Both are rewritten by SPELLINGS, and units and labels that only the box has are dropped. Equal
    text is right then, words compare as words, and what math-verify would be lax about (the count
    of a list, the kind of its brackets, capitals) is compared here. It decides the rest.
    """
    decimal = re.search(r"\.\d*[1-9]|\d[eE][+-]?\d", gold)            # known to some digits only
    for pattern, replacement in SPELLINGS:
        gold, box = (pattern.sub(replacement, text).strip().rstrip(".") for text in (gold, box))
    if not re.search(r"(?<!\\)\b[A-Za-z]", gold):        # letters in the box can only be a unit
        box = re.sub(rf"(?<=[\d)}}])(?: +{UNIT}|[kcm]?m|kg|s|(?![万亿千百半])[一-龥]+)$", "", box)
    if "=" not in gold:                                  # labels: x = 4, m + n = 204, x \in [2, 3]
        exact, sign, rounded = box.partition(r"\approx")
        if sign:
            box = rounded if decimal or re.search(r"(?<![\\A-Za-z])[A-Za-z]", exact) else exact
        box = re.sub(r"(?:^|(?<=,))(?:\([a-z, ]*\)\s*|[^,]*)(?:=|\\in\b)", "", box)
    elif "=" not in box and re.match(r"\s*\w\s*=", gold):
        gold = gold.partition("=")[2]                    # x = 9 is answered by 9
    if gold.replace(" ", "") == box.replace(" ", ""):
        return True
    words = [re.sub(r"[\s()]", "", text).casefold() for text in (gold, box)]
    if re.fullmatch(r"[a-z]{2,}", words[0]):
        return words[0] == words[1]
    shapes = [("=" in text, text.count(","), text[:1] + text[-1:] if text[:1] in ("(", "[") else "")
              for text in (gold, box)]                   # math-verify is lax about all three
    relation = re.search(r"[<>]|\\[gl]eq?(?![a-z])|\\cup", gold + box)
    capitals = [{*re.findall("[A-Z]", text)} for text in (gold, box)]    # K is not k
    if (capitals[0] != capitals[1] or REFUSED.search(gold) or REFUSED.search(box)
            or not relation and "," in gold + box and shapes[0] != shapes[1]
            or shapes[0][0] != shapes[1][0]):
        return False
    # math-verify's limit, in seconds, is an alarm signal, which only the main thread may set
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold, *boxes = (
        parse(f"${text}$".replace(r"\%", ""), LATEX, "no_fallback", parsing_timeout=limit)
        for text in (gold, box, f"({box})/100")[:2 + (r"\%" in box)])
    if decimal and gold[0].is_number:
        return any(bool(abs(gold[0] - b[0]) <= 1e-4 * abs(gold[0])) for b in boxes)
    return any(verify(gold, b, float_rounding=12, allow_set_relation_comp=True,
                      timeout_seconds=limit) for b in boxes)


DAPO_HEAD = ("Solve the following math problem step by step. The last line of your response should "
             "be of the form Answer:")
DAPO_TAIL = 'Remember to put your answer on its own line after "Answer:".'


def load_problems(path, split=None, limit=None, config=None):
    """Problems from a .jsonl, .json or .parquet file, or from a hub data set `id:config:split`.

    Returns a list of {"id": row number, "problem": str, "answer": str, "solution": str or None};
    rows with the same problem are merged, the first one stays. Columns recognised:
    problem | question | prompt (text or chat messages); answer | final_answer |
    reward_model.ground_truth | Answer; solution. InputError on a row of a file without problem or
    answer; such rows of a hub set are skipped and counted.
    """
    problems, skipped, row = {}, 0, {}
    with one_line(f"cannot load the data set {path}"):
        for number, row in enumerate(read_rows(path, split, config)):
            if not isinstance(row, dict):
                raise ValueError(f"row {number + 1} is not an object with named fields")
            problem = read_problem(row)
            if problem["problem"] and problem["answer"]:
                problems.setdefault(problem["problem"], {"id": number, **problem})
            elif Path(path).is_file():
                raise ValueError(f"row {number + 1} has no problem or no answer; its columns are "
                                 + ", ".join(row))
            else:
                skipped += 1
            if len(problems) == limit:
                break
        if not problems:
            raise ValueError(f"no problem with an answer in it; its columns are {', '.join(row)}")
    if skipped:
        tqdm.write(f"{path}: {skipped} rows without a problem or an answer were skipped")
    return list(problems.values())


def read_rows(path, split, config):
    """The raw rows. JSON is read here: errors name the line, and a column may mix types."""
    if path.endswith(".jsonl"):
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    with one_line(f"line {number} is not JSON"):
                        row = json.loads(line)
                    yield row
    elif path.endswith(".json"):
        yield from json.loads(Path(path).read_bytes())
    elif path.endswith(".parquet"):
        yield from datasets.load_dataset("parquet", data_files=path, split="train")
    else:
        name, *own = path.split(":")
        config, split = [*own, *(config, split)[len(own):]][:2]
        rows = datasets.load_dataset(name, config or None, split=split or None)
        yield from rows if split else rows.get("test") or next(iter(rows.values()))


def read_problem(row):
    """A row of any known schema -> {"problem", "answer", "solution"}, "" where it has none."""
    def text(value):     # of chat messages the user's last turn; of a list its items, with commas
        if isinstance(value, dict):                      # {"type": "text", "text": ...}
            value = value.get("text")
        if isinstance(value, str) and value.startswith('["'):
            with suppress(ValueError):                   # Skywork-OR1 writes a list as JSON
                value = json.loads(value)
        if isinstance(value, list):
            turns = [turn.get("content") for turn in value
                     if isinstance(turn, dict) and turn.get("role") == "user"]
            return text(turns[-1]) if turns else ", ".join(map(text, value))
        return "" if value is None or value != value else str(value).strip()     # NaN is not NaN

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
    if problem.startswith(DAPO_HEAD):                    # asks for "Answer:", our reward for a box
        problem = problem.split("\n\n", 1)[-1].replace(DAPO_TAIL, "").strip()
    # DAPO-Math's "solution" only repeats the answer: nothing that a teacher could read
    return {"problem": problem, "answer": answer,
            "solution": solution if solution and solution != answer else None}


def next_problems(problems, position, count, seed):
    """`count` problems from `position` on; the order is a function of (seed, epoch) alone."""
    batch = []
    for p in range(position, position + count):
        epoch, place = divmod(p, len(problems))
        shuffle = torch.Generator().manual_seed(seed * 100_003 + epoch)
        batch.append(problems[int(torch.randperm(len(problems), generator=shuffle)[place])])
    return batch


# --- 7. Many GPUs (safe to skip): one process is a group of one -----------------------------------


def setup():
    """Joins torchrun's process group, or makes one of a single process -> rank, world, device."""
    if sys.platform == "linux" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # ranks must not outlive a killed torchrun and write beside the run that is then resumed:
        # option 1 of prctl, PR_SET_PDEATHSIG, has the kernel end them with it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # where it died before that, its store is gone, too: fail now, not after a day's timeout
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address).close()
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        # a rank may wait hours for another one's longest response; a dead one torchrun notices
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(days=1), **alone)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def shard(policy, dtype, device):
    """FSDP2: float32 parameters, gradients and optimizer state are split over the ranks, and each
    layer is gathered in `dtype` while it computes. The root holds embeddings and head together,
    which may be tied, and reshards too, else a forward before step() would leave stale weights."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    options = dict(mesh=mesh, reshard_after_forward=True,
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for module in list(policy.modules()):
        if type(module).__name__ in policy.model._no_split_modules:      # the decoder layers
            fully_shard(module, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "generate")     # the root must be the first to run
    # after the split, so that no rank ever holds a whole float32 copy; AdamW at lr 1e-6 on bf16
    # weights would round every update away
    return policy.float().to(device)


@contextmanager
def gathered(policy):
    """Weights are whole inside: decoding communicates nothing, ranks may stop at other lengths."""
    layers = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for layer in layers:                                 # none in eval.py, which never splits
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


# --- 8. Checkpoints (safe to skip): a run may be stopped in any way, and goes on with --resume ----


def checkpoints(run):
    """A run's whole checkpoints, oldest first: progress.json is written last and deleted first."""
    return sorted(file.parent for file in Path(run).glob("checkpoints/step-*/progress.json"))


def checksum(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path, text):
    """A kill leaves the old file or the new one, never a half."""
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)


def save_checkpoint(run, policy, optimizer, now):
    """Every rank writes its shards; then rank 0 writes `now` (step, data position, gate) and the
    checksums, which makes the checkpoint count, and drops all but the newest two."""
    rank, folder = dist.get_rank(), run / "checkpoints" / f"step-{now['step']:06d}"
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)        # what a kill has left of it
    gather(None)                                         # nobody writes before it is gone
    model, optim = dcp_state.get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=folder)
    files = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    sums = sum(gather([(file.name, checksum(file)) for file in files]), [])
    if rank == 0:
        write_whole(folder / "progress.json", json.dumps({"now": now, "checksums": dict(sums)}))
        for old in checkpoints(run)[:-2]:
            (old / "progress.json").unlink()
            shutil.rmtree(old)


def load_checkpoint(folder, policy, optimizer):
    """Loads weights and optimizer in place, for any number of ranks; returns the saved `now`."""
    saved = json.loads((folder / "progress.json").read_text())
    mine = sorted(saved["checksums"].items())[dist.get_rank()::dist.get_world_size()]
    bad = [name for name, digest in mine
           if not (folder / name).exists() or checksum(folder / name) != digest]
    if bad := sum(gather(bad), []):                      # a flipped bit would load without a word
        raise InputError(f"{folder} is damaged ({bad[0]}): delete that folder, and --resume goes "
                         "on from the checkpoint before it")
    model, optim = dcp_state.get_state_dict(policy, optimizer)
    with one_line(f"{folder} cannot be loaded into this --model"):
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=folder)
    dcp_state.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return saved["now"]


def restore(cfg, policy, optimizer, fresh):
    """Where the run stands: at its newest checkpoint, at --init_from's data position, or fresh."""
    if cfg.resume and checkpoints(cfg.output):
        return load_checkpoint(checkpoints(cfg.output)[-1], policy, optimizer)
    if cfg.resume and dist.get_rank() == 0:
        print(f"--resume: {cfg.output} holds no checkpoint, so the run starts at step 0")
    if cfg.init_from:                                    # continual AntiSD: step and gate are fresh
        old = load_checkpoint(checkpoints(cfg.init_from)[-1], policy, optimizer)
        return fresh | {"position": old["position"]}
    return fresh


def export_model(folder, policy, source):
    """The weights as a Hugging Face folder, in the dtype they came in. Configuration, tokenizer and
    template are the source's own files: as this version of transformers would write them, older
    ones and engines built on them misread them (rope_theta) or cannot read them at all."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(policy, options=options)      # on rank 0; else empty
    if dist.get_rank() == 0:
        writing, model = folder.with_name(folder.name + ".writing"), policy.model
        shutil.rmtree(writing, ignore_errors=True)
        named = [*model.named_parameters(), *model.named_buffers()]      # tied ones once
        model.save_pretrained(writing, state_dict={
            name: x.to(policy.source_dtype) if x.is_floating_point() else x for name, _ in named
            if (x := state.get(f"model.{name}")) is not None})
        (writing / "generation_config.json").unlink(missing_ok=True)     # ours is that of rollouts
        # a part, say without its vision tower, needs the configuration that save_pretrained wrote
        whole = AutoConfig.from_pretrained(source).model_type == model.config.model_type
        for file in source.iterdir():
            if (file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
                    and not file.name.endswith(".index.json")
                    and (whole or file.name != "config.json")):
                shutil.copyfile(file, writing / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
    gather(None)                                         # nobody leaves while rank 0 writes


# --- 9. Start-up and records (safe to skip) -------------------------------------------------------


def load_tokenizer(name, template_kwargs):
    """A chat model's tokenizer, its context in tokens and the folder of its files. Whatever can be
    refused before weights are read is refused here, with an InputError."""
    with one_line(f"--model {name} cannot be loaded, from the hub or a folder (RUN/model)"):
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        source = Path(transformers.utils.cached_file(name, "config.json")).parent
        if (source / "tokenizer.json").exists():         # some classes would split text otherwise
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        with torch.device("meta"):                       # every layer, and no memory
            model = AutoModelForCausalLM.from_config(config)
        # a clock that stands still, because many templates print the day: it must tell neither
        # student from teacher nor a resumed run from its first half
        tokenizer.chat_template = re.sub(
            r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(
                datetime.date(2026, 1, 1).strftime(call[2])), tokenizer.get_chat_template())
        render(tokenizer, teacher_messages("?", "?", False), template_kwargs)    # may it be read?
    names = {value for _, kind, value in jinja2.Environment().lex(tokenizer.chat_template)
             if kind == "name"}
    unknown, text = [key for key in template_kwargs if key not in names], config.get_text_config()
    scaled = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling",
                              "logits_soft_cap", "lm_head_multiplier")
              if getattr(text, key, None) not in (None, 1)]
    for wrong, reason in (
        (unknown, f"has a chat template that does not know {unknown} (--chat_template_kwargs)"),
        (getattr(config, "quantization_config", None), "is quantized: save a dequantized copy"),
        (not any(type(m).__name__ in (model._no_split_modules or ()) for m in model.modules()),
         "does not name the layers that FSDP would split"),
        (not model._supports_default_dynamic_cache()
         or not {"past_key_values", "cache"} & {*inspect.signature(model.forward).parameters},
         "keeps a cache of its own kind, whose rows cannot be chosen"),
        (scaled, f"changes its logits after lm_head ({scaled}), which Policy.forward does not do"),
    ):
        if wrong:
            raise InputError(f"--model {name} {reason}")
    context = getattr(text, "max_position_embeddings", None) or 10**9
    rope = getattr(text, "rope_parameters", None) or {}
    for rule in (rope, *(r for r in rope.values() if isinstance(r, dict))):
        if rule.get("rope_type") in ("longrope", "dynamic"):     # beyond their original context a
            # token's log-prob would depend on the longest row of its batch
            context = min(context, rule.get("original_max_position_embeddings") or context)
    if dist.get_rank() == 0 and model.config.model_type != config.model_type:
        print(f"of {name} only the part {type(model).__name__} is trained and exported")
    return tokenizer, context, source


def load_policy(name, dtype, tokenizer):
    """A Policy on the CPU, whole, in eval mode; dtype "auto" is the checkpoint's own."""
    with one_line(f"--model {name} cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype,
                                                            output_loading_info=True)
        if found["missing_keys"]:                        # they would be drawn at random, silently
            raise ValueError(f"its files hold no weights for {sorted(found['missing_keys'])[0]}")
    # Policy.forward puts lm_head on the hidden states itself: is that the model's own output?
    with torch.no_grad():
        probe = torch.tensor([[0, 1]])
        ours = model.get_output_embeddings()(model.base_model(input_ids=probe)[0])
        same = torch.allclose(ours, model(input_ids=probe).logits, equal_nan=True)
    eos = model.generation_config.eos_token_id           # an id, a list of ids, or None
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not (same and eos):
        raise InputError(f"--model {name} " + ("has no end-of-sequence token" if same else
                         "changes its logits after lm_head, which Policy.forward does not do"))
    return Policy(model, eos)


def build(cfg, tokenizer, device):
    """The policy, split over the ranks, and its optimizer."""
    policy = load_policy(cfg.model, "auto", tokenizer)
    if cfg.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    auto = "bfloat16" if device.type == "cuda" else "float32"
    shard(policy, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype), device)
    return policy, torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.999),
                                     weight_decay=cfg.weight_decay)      # our choice: verl's


# what may differ between a run and its --resume
FREE = {"resume", "steps", "output", "save_every", "export_every", "eval_every", "tracker",
        "micro_tokens", "rollout_batch", "sampler"}


def open_run(cfg, data):
    """Writes config.json; refuses, with an InputError, to mix two runs in one folder. A folder that
    holds neither a checkpoint nor metrics is no run."""
    run = Path(cfg.output)
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()       # prompts and solutions
    flags = dataclasses.asdict(cfg) | {"data": digest}
    if checkpoints(run) or read_lines(run / "metrics.jsonl"):
        if not cfg.resume:
            raise InputError(f"{run} already holds a run: add --resume, or choose another --output")
        old = json.loads((run / "config.json").read_text())["flags"]
        if changed := [key for key in flags if key not in FREE and old.get(key) != flags[key]]:
            raise InputError("--resume with other settings than the run's: " + ", ".join(changed))
    elif (run / "model").exists():                       # say, --output toy
        raise InputError(f"{run / 'model'} exists and no run made it: choose another --output")
    if cfg.init_from and not checkpoints(cfg.init_from):
        raise InputError(f"--init_from {cfg.init_from} holds no checkpoint")
    # a machine without git, or a copy without its history, runs as well
    failed, commit = subprocess.getstatusoutput(
        f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD")
    gather(None)                                         # every rank has read the old one
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.json", json.dumps({
            "flags": flags, "git": None if failed else commit, "source": checksum(__file__),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "world_size": dist.get_world_size()}, indent=1) + "\n")


def prepare(cfg, world):
    """Everything that can be wrong and costs little to find out, before any weight is loaded.

    Returns tokenizer, the folder of the model's files, the longest teacher prompt (tokens), and the
    training and held-out problems, each with its student's "prompt" ids.
    """
    if cfg.problems_per_step % (world * cfg.updates_per_batch):
        raise InputError(f"--problems_per_step {cfg.problems_per_step} must be a multiple of ranks "
                         f"({world}) x --updates_per_batch ({cfg.updates_per_batch})")
    tokenizer, context, source = load_tokenizer(cfg.model, cfg.template_kwargs)
    room = min(cfg.max_prompt_tokens, context - cfg.max_tokens - 150)    # 150: teacher's headings
    own, sets = cfg.dataset_config or ("all" if cfg.dataset == Config.dataset else None), []
    for path, split, config in ((cfg.dataset, cfg.split, own), (cfg.eval_dataset, None, None)):
        problems = load_problems(path, split, config=config) if path else []
        for p in problems:
            with one_line(f"{path}: the problem of row {p['id'] + 1} cannot be rendered"):
                p["prompt"] = render(tokenizer, student_messages(p["problem"]), cfg.template_kwargs)
                tokenizer.encode(p["solution"] or p["answer"])           # no lone surrogates
        sets.append([p for p in problems if len(p["prompt"]) <= room])
        if path and not sets[-1]:
            raise InputError(f"{path}: no problem fits into the {room} tokens that the model's "
                             f"context ({context}), --max_tokens and --max_prompt_tokens leave")
        if len(sets[-1]) < len(problems) and dist.get_rank() == 0:
            print(f"{path}: dropped {len(problems) - len(sets[-1])} of {len(problems)} (too long)")
    open_run(cfg, sets)
    return tokenizer, source, context - cfg.max_tokens, *sets


def evaluate(policy, tokenizer, problems, cfg):
    """Held-out accuracy and its standard error; the same draws at every evaluation."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(hash((cfg.seed, rank)))
    rollouts = roll_out(policy, tokenizer, problems[rank::world], 1, cfg.sampler,
                        max_tokens=cfg.max_tokens, temperature=0.7, top_p=0.95,
                        rollout_batch=cfg.rollout_batch)
    marks = sum(gather([r.reward for r in rollouts]), [])
    return {"eval_accuracy": statistics.fmean(marks),
            "eval_error": statistics.pstdev(marks) / len(marks)**0.5}


@contextmanager
def timer(name, row):
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    row[f"seconds/{name}"] = time.perf_counter() - start


def read_lines(file):
    """The rows of a .jsonl file, without a last line that a kill has cut short; [] without one."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append(file, row):
    """One line of JSON; NaN is not JSON, so null stands for what is not finite."""
    row = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def open_records(cfg, step):
    """Drops from the records what a resumed run does again; returns the tracker, if any."""
    for file in (Path(cfg.output, "metrics.jsonl"), Path(cfg.output, "samples.jsonl")):
        rows = [row for row in read_lines(file) if row["step"] < step]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    tracker = importlib.import_module(cfg.tracker) if cfg.tracker else None
    if tracker:
        tracker.init(project="antisd", name=cfg.output, config=dataclasses.asdict(cfg))
    return tracker


def summary(rollouts, sources, mask, a_seq, u, student_entropy, teacher_entropy, cfg):
    """The step's metrics over all ranks: sums and counts are gathered, then divided once."""
    facts = sum(gather([(r.reward, len(r.ids), r.truncated) for r in rollouts]), [])  # of all ranks
    rewards, lengths, truncated = zip(*facts)
    complete = [reward for reward, cut in zip(rewards, truncated) if not cut]  # not truncated
    groups = [rewards[i:i + cfg.group_size] for i in range(0, len(rewards), cfg.group_size)]
    of_teacher = {"u_mean": global_mean(u, mask), "u_negative": global_mean((u < 0).float(), mask),
                  "phi_abs": global_mean(METHODS[cfg.method](u).abs(), mask),
                  "teacher_entropy": global_mean(teacher_entropy, mask),
                  "teacher_entropy_median": global_median(teacher_entropy, mask)}
    shown = sum(gather(sources), [])                     # where each c came from
    return {"reward": statistics.fmean(rewards),
            "reward_complete": statistics.fmean(complete) if complete else None,
            "length": statistics.fmean(lengths), "truncated": statistics.fmean(truncated),
            "zero_std_groups": statistics.fmean(len(set(group)) == 1 for group in groups),
            "seq_adv_abs": global_mean(a_seq.abs()[:, None].expand_as(mask), mask),
            "student_entropy": global_mean(student_entropy, mask),
            **(of_teacher if sources else dict.fromkeys(of_teacher)),
            **{f"context/{name}": shown.count(name) / len(rewards)
               for name in ("sibling", "solution", "answer")}}


def record(cfg, row, bar, tracker, rollouts, sources, u, teacher_entropy, tokenizer):
    """A step's metrics into metrics.jsonl, tracker and progress bar; every tenth step also two
    rollouts with their u into samples.jsonl, where bugs of templates and rewards show first."""
    run, step = Path(cfg.output), row["step"]
    append(run / "metrics.jsonl", row)
    if tracker:
        tracker.log(row, step=step)
    if step == cfg.warmup_steps - 1 and row["h_warm"] is not None and row["h_warm"] < 0.01:
        tqdm.write(f"H_warm is {row['h_warm']:.4f} nats a token: the gate will react to noise")
    if step % 10 == 0:
        for i in (0, len(rollouts) - 1):
            r, n = rollouts[i], len(rollouts[i].ids)
            append(run / "samples.jsonl", {
                "step": step, "problem": r.problem["problem"], "answer": r.problem["answer"],
                "response": r.text, "reward": r.reward, "truncated": r.truncated,
                "context": sources[i] if sources else None,
                "tokens": tokenizer.convert_ids_to_tokens(r.ids),
                "u": u[i, :n].tolist() if sources else None,
                "teacher_entropy": teacher_entropy[i, :n].tolist() if sources else None})
        text = r.text if len(r.text) < 1200 else r.text[:600] + " [...] " + r.text[-600:]
        tqdm.write(f"\n[step {step}, reward {r.reward:.0f}] {text}\n")
    if "eval_accuracy" in row:
        tqdm.write(f"step {step}: held-out accuracy {row['eval_accuracy']:.3f}")
    bar.set_postfix_str(f"reward {row['reward']:.3f}, length {row['length']:.0f}, lambda "
                        f"{row['lam'] or 0:g}, {row['tokens_per_s']:.0f} tok/s")


def farewell(run):
    """What happened, from the run's own records: accuracy before and after, the gate's moves."""
    rows = read_lines(run / "metrics.jsonl")
    marks = [row for row in rows if row.get("eval_accuracy") is not None]
    for row in (marks[0], marks[-1]) if marks else ():
        print(f"step {row['step']}: held-out accuracy {row['eval_accuracy']:.3f} "
              f"+- {row['eval_error']:.3f}")
    gates = [(row["step"], row["gate"]) for row in rows if row.get("gate") is not None]
    moves = [f"{'opened' if gate else 'shut'} at step {step}"
             for (_, old), (step, gate) in zip(gates, gates[1:]) if gate != old]
    if gates:
        print("the gate", ", ".join(moves) or
              ("was always open" if gates[0][1] else "never opened: no step had AntiSD's term"))
    print(f"{run / 'model'} holds the trained model")


def main(run, kind=Config):
    """The command line. What the user can mend costs one line and exit code 2; a programming error
    keeps its traceback. Rank 0 locks the output folder, until the process ends in whatever way."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)       # names that transformers 6 will drop
    first = os.environ.get("RANK", "0") == "0"
    try:
        cfg = parse_config(kind=kind)
        with one_line(f"cannot write into {cfg.output}, or another process is at work there"):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(Path(cfg.output, ".lock"))
            held = lock.acquire(timeout=0) if first else nullcontext()
        with held:
            run(cfg)
        gc.collect()         # gloo's threads must end with the model, not while the interpreter does
        dist.destroy_process_group()
    except InputError as error:
        if not first:                                    # rank 0 mostly says the same, and after
            time.sleep(5)                                # it torchrun ends this one
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


# --- 10. Training: Algorithm 1 --------------------------------------------------------------------


def token_weights(mask, truncated, loss_agg="token", mask_truncated=False):
    """What each token counts in the loss: mask (N, T) and truncated (N,), both bool -> (N, T).

    The loss divides by their sum. loss_agg "token": 1 each; "seq": 1 / length, so that every
    response counts alike and the sum is the number of responses. Our choice: truncated responses
    stay, unless mask_truncated takes them out of numerator and denominator alike.
    """
    weights = mask.float()
    if loss_agg == "seq":                                # our choice: token; the same for every arm
        weights = weights / mask.sum(1, keepdim=True)
    return weights * ~truncated[:, None] if mask_truncated else weights


def update(policy, optimizer, rollouts, weights, advantages, cfg, known=None):
    """A clipped policy gradient: cfg.updates_per_batch updates, each on whole groups of rollouts.

    weights (N, T): see token_weights. advantages(rows, s, entropy): a function of row numbers (n),
    log pi_S and entropies (n, T') of these rows, detached, that returns their per-token advantages,
    (n, T'). known: (s, entropy) of the whole batch, (N, T) each, if it was scored before; else they
    come from this forward pass. Returns loss and gradient norm (means over the updates), the
    entropies (N, T), and whether all was finite. An update with a loss or a norm that is not
    finite, or without any token, is skipped.
    """
    s, entropy = known or (torch.zeros_like(weights), torch.zeros_like(weights))
    policy.train(cfg.gradient_checkpointing)     # transformers recomputes layers in train mode only
    losses, norms = [], []                               # of the updates
    size = len(rollouts) // cfg.updates_per_batch        # rows of one update
    for first in range(0, len(rollouts), size):
        num_tokens = sum(gather(weights[first:first + size].sum().item()))   # of all ranks
        lengths = [len(r.problem["prompt"]) + len(r.ids) for r in rollouts[first:first + size]]
        micros, loss_sum = as_many_everywhere(micro_batches(lengths, cfg.micro_tokens)), 0.0
        for k, micro in enumerate(micros, 1):
            # gradients are reduced once an update, with its last micro-batch; sharded, every time,
            # because until then they lie whole on every GPU
            policy.set_requires_gradient_sync(k == len(micros) or cfg.sampler == "sharded")
            rows = [first + i for i in micro]            # in the whole batch
            logp, H = policy(
                *pack([rollouts[i].problem["prompt"] for i in rows],
                      [rollouts[i].ids for i in rows], weights.device), cfg.temperature)
            at = (rows, slice(logp.shape[1]))
            if not known:                                # line 2
                s[at], entropy[at] = logp.detach(), H
            # an idle rank has no rows: a loss of 0, whose backward takes part in the reduction
            a = advantages(rows, s[at], entropy[at]) if rows else s[at]
            loss = policy_loss(logp, s[at], a, weights[at], num_tokens or 1.0, cfg.clip)
            (loss * dist.get_world_size()).backward()    # FSDP averages over ranks; this undoes it
            loss_sum += loss.item()
        # of all ranks' shards together, before clipping
        norms.append(nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                     .full_tensor().item())
        losses.append(sum(gather(loss_sum)))
        if num_tokens and math.isfinite(losses[-1]) and math.isfinite(norms[-1]):
            optimizer.step()
        optimizer.zero_grad()                            # also after a skipped one
    finite = all(map(math.isfinite, losses + norms))
    return statistics.mean(losses), statistics.mean(norms), entropy, finite


def train(cfg):
    """Runs Algorithm 1 for cfg.steps steps; everything it makes lies in cfg.output."""
    rank, world, device = setup()
    tokenizer, source, longest, problems, held_out = prepare(cfg, world)
    policy, optimizer = build(cfg, tokenizer, device)
    gate = EntropyGate(cfg.warmup_steps, cfg.tau_down)
    statistic = {"mean": global_mean, "median": global_median}[cfg.gate_stat]
    watches_student = cfg.method in GATED and cfg.gate_source == "student"
    now = restore(cfg, policy, optimizer, {"step": 0, "position": 0, "skipped_updates": 0,
                                           "failures": 0, "gate": gate.state_dict()})
    gate.load_state_dict(now["gate"])                    # h_warm, and whether it is open
    run, share = Path(cfg.output), cfg.problems_per_step // world        # problems of this rank
    tracker = open_records(cfg, now["step"]) if rank == 0 else None
    bar = tqdm(range(now["step"], cfg.steps), initial=now["step"], total=cfg.steps,
               disable=rank > 0, dynamic_ncols=True)

    for step in bar:
        row = {"step": step}
        if held_out and step % cfg.eval_every == 0:
            with timer("eval", row):
                row |= evaluate(policy, tokenizer, held_out, cfg)

        # line 1: y ~ pi_S(.|x) and R(x, y). Seeding right here makes a resumed run draw the same
        first = now["position"] + rank * share           # of this rank, in the data order
        mine = next_problems(problems, first, share, cfg.seed)
        torch.manual_seed(hash((cfg.seed, step, rank)))
        started = time.perf_counter()
        with timer("rollout", row):
            rollouts = roll_out(policy, tokenizer, mine, cfg.group_size, cfg.sampler,
                                max_tokens=cfg.max_tokens, temperature=cfg.temperature,
                                rollout_batch=cfg.rollout_batch)
        prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
        rewards = torch.tensor([r.reward for r in rollouts], device=device)          # (N,)
        truncated = torch.tensor([r.truncated for r in rollouts], device=device)     # (N,)
        lengths = torch.tensor([len(r.ids) for r in rollouts], device=device)        # (N,)
        a_seq = group_advantages(rewards, cfg.group_size)                            # (N,)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]    # (N, T)

        # line 3: log pi_T(y_t) and the teacher's entropies: the same weights, c in the prompt
        t, H_T, u = (torch.zeros(mask.shape, device=device) for _ in range(3))       # (N, T)
        sources, known = [], None                        # without a teacher, sources stay empty
        with timer("score", row):
            if cfg.method != "grpo":
                prompts_T, sources = teacher_prompts(tokenizer, rollouts, cfg.group_size,
                                                     cfg.template_kwargs, longest, cfg.seed, first)
                t, H_T = score(policy, prompts_T, responses, cfg.micro_tokens, cfg.temperature)
            # line 2, s = log pi_S(y_t), is update's own forward pass, unless it is needed earlier
            if cfg.updates_per_batch > 1 or watches_student:
                known = score(policy, prompts, responses, cfg.micro_tokens, cfg.temperature)
        if cfg.method == "no_teacher":
            t = torch.zeros_like(t)                      # log pi_T := 0

        # lines 6, 7: one gate for all ranks, on every token of all of them
        g, lam = None, cfg.lam
        if cfg.method in GATED:
            g = gate.update(statistic(known[1] if watches_student else H_T, mask))
            lam = g * cfg.lam                                                        # Eq. (7)

        # called by update with each micro-batch; s, H_S: (n, T'), 0 on padding; fills u as well
        def advantages(rows, s, H_S):
            at = (rows, slice(s.shape[1]))
            u[at] = t[at] - s                                                # line 4, Eq. (4)
            return token_advantages(a_seq[rows], u[at], lam, cfg.method,     # lines 5, 8, Eq. (2)
                                    cfg.compose)

        # lines 2, 9
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_lr_steps))
        for group in optimizer.param_groups:             # --init_from brings the old run's
            group.update(lr=lr, weight_decay=cfg.weight_decay)
        weights = token_weights(mask, truncated, cfg.loss_agg, cfg.mask_truncated)
        with timer("train", row):
            loss, norm, H_S, finite = update(policy, optimizer, rollouts, weights, advantages, cfg,
                                             known)

        now = {"step": step + 1, "position": now["position"] + cfg.problems_per_step,
               "skipped_updates": now["skipped_updates"] + (not finite),
               "failures": 0 if finite else now["failures"] + 1, "gate": gate.state_dict()}
        row |= summary(rollouts, sources, mask, a_seq, u, H_S, H_T, cfg) | {
            "gate": g, "h_warm": gate.h_warm, "lam": lam if sources else None, "loss": loss,
            "grad_norm": norm, "lr": lr, "skipped_updates": now["skipped_updates"],
            "tokens_per_s": sum(gather(int(lengths.sum()))) / (time.perf_counter() - started),
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
            if device.type == "cuda" else None}
        if rank == 0:
            record(cfg, row, bar, tracker, rollouts, sources, u, H_T, tokenizer)
        if now["failures"] == 3:
            raise InputError(f"three updates in a row were not finite, up to step {step}; the last "
                             f"checkpoint is {(checkpoints(run) or ['none'])[-1]}")
        due = cfg.save_every and (now["step"] % cfg.save_every == 0 or now["step"] == cfg.steps)
        if due and finite:
            save_checkpoint(run, policy, optimizer, now)
        if cfg.export_every and now["step"] % cfg.export_every == 0:
            export_model(run / f"model-{now['step']:06d}", policy, source)

    last = {"step": cfg.steps} | evaluate(policy, tokenizer, held_out, cfg) if held_out else {}
    export_model(run / "model", policy, source)
    if rank == 0:
        if last:
            append(run / "metrics.jsonl", last)          # the learning curve's last point
        farewell(run)


if __name__ == "__main__":
    main(train)
