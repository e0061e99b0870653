"""AntiSD, Anti-Self-Distillation for reasoning RL, in one readable file.

The method is that of "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information"
(Shen et al., 2026, arXiv 2605.11609); equation and table numbers below are the paper's. A language
model answers a problem, a verifier grades the answer, GRPO reinforces what beat its group. Beside
that, the same network reads the problem once more together with a verified solution c (the
self-teacher) and scores the student's own tokens. Self-distillation would pull the student towards
that teacher; AntiSD pushes it away, by a bounded amount, and a gate stops it when the teacher
collapses.

    torchrun antisd.py @toy/demo.args                                    # a laptop, minutes
    torchrun --nproc-per-node 8 antisd.py --model Qwen/Qwen3-4B-Instruct-2507 \\
        --max_tokens 8192 --rollout_batch 16 --gradient_checkpointing --output runs/qwen3-4b

Algorithm 1, line by line                                                in train():
    1  y ~ pi_S(.|x), G responses per problem, R(x, y)                   sample, is_correct
    2  s_t = log pi_S(y_t)                                               Policy.forward, in update
    3  t_t = log pi_T(y_t), c in the prompt                              score on teacher_prompts
    4  u_t = t_t - s_t, the pointwise mutual information, Eq. (4)        u, in update
    5  phi(u_t), the bounded shape, Eq. (6)                              METHODS, phi
    6  H, the teacher's entropy over the batch                           global_mean, _median
    7  g, the Schmitt trigger; lambda = g * lambda_max, Eq. (7)          EntropyGate
    8  A_t = A_seq - lambda * sg[phi(u_t)], Eq. (2), (6)                 token_advantages
    9  one policy-gradient update                                        policy_loss

What is not here: no critic, no KL term, no reference model, no reward model, no inference engine.
Shapes: B problems x G responses = N rows, T response tokens, L tokens with the prompt, V words,
D hidden. Logs are natural, so log-probabilities, u and entropies are in nats. Where the paper is
silent the line says `our choice`; the README lists every one.
"""
import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import operator
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

# before torch is loaded: how long idle OpenMP threads spin. At GNU's default of 300,000 two runs on
# two cores took 59 s a step instead of 2; without spinning one run alone decodes 30% slower
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import datasets
import mpmath
import numpy
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          ContinuousBatchingConfig, DynamicCache, GenerationConfig)
from transformers.cache_utils import DynamicLayer


# --- 1. The method: pure tensor functions ---------------------------------------------------------


def group_advantages(rewards, group_size):
    """GRPO's sequence advantage A_seq = (R - mean R) / std R within each group.

    rewards (N,), groups are consecutive runs of `group_size`; returns (N,).
    """
    groups = rewards.view(-1, group_size)                                            # (B, G)
    centred = groups - groups.mean(1, keepdim=True)
    # our choice: unbiased std + 1e-6; an all-equal group gets 0 itself, not rounding noise / 1e-6
    advantages = centred / (groups.std(1, keepdim=True) + 1e-6)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def phi(u):
    """The f-divergence derivative of the JSD at pi_S / pi_T = exp(-u), Eq. (6); any shape.

    Rises from -log(2)/2 (u << 0, deliberation) through phi(0) = 0 with slope 1/4, then as u/2
    (u >> 0, shortcuts). softplus and not log(1 + exp(u)): that one overflows.
    """
    return 0.5 * (F.softplus(u) - math.log(2))


# The arms: the per-token term delta in A_t = A_seq + lambda * delta(u), u = log pi_T - log pi_S.
# Add a signal of your own here, and to GATED if the gate should rule it; every delta(0) is 0, so
# u = 0 takes a token out. With v drawn from pi_S and the teacher held fixed,
#     grad JSD(pi_S || pi_T) = E[-phi(u_v) grad log pi_S(v)]     so delta = -phi ascends the JSD,
#     grad  KL(pi_S || pi_T) = E[  -u_v    grad log pi_S(v)]     so delta = +u descends the KL.
METHODS = {
    "grpo": torch.zeros_like,           # the baseline
    "sd": lambda u: u,                  # self-distillation, Eq. (3)
    "sd_jsd": phi,                      # our choice: also as the paper's table probably ran it
    "antisd": lambda u: -phi(u),        # Eq. (6)
    "antisd_kl": lambda u: -u,          # ablation: ascend the reverse KL, unbounded
    "no_teacher": lambda u: -phi(u),    # ablation: the trainer passes u = -s (log pi_T := 0)
}

GATED = ("antisd", "antisd_kl", "no_teacher")    # our choice: warm-up and gate are AntiSD's alone


def token_advantages(seq_advantages, u, lam, method="antisd", compose="add"):
    """Every token's advantage, Eq. (2): A_t = A_seq + lambda * sg[delta(u_t)].

    seq_advantages (N,), u (N, T) in nats, lam >= 0; returns (N, T) without gradient.
    compose="mul" is Table 3's A_seq * (1 + lambda * delta), which is silent where A_seq = 0.
    """
    delta = METHODS[method](u.detach())
    a_seq = seq_advantages.detach()[:, None]
    if compose == "mul":
        return a_seq * (1 + lam * delta)
    return a_seq + lam * delta


class EntropyGate:
    """The Schmitt trigger of Eq. (7) on the teacher's entropy H, in nats per token.

    For `warmup_steps` steps it returns 0 and records H; h_warm is their median. From then on
    g <- 1 if H >= h_warm; g <- 0 if H < tau_down * h_warm; else unchanged. tau_down=0: never shuts.
    """

    def __init__(self, warmup_steps=5, tau_down=0.93):
        self.warmup_steps, self.tau_down = warmup_steps, tau_down
        self.history, self.h_warm, self.g = [], None, 1.0        # our choice: it starts open

    def update(self, entropy):
        """Takes this step's H (a float), returns this step's g: 0.0 or 1.0."""
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
    the count of the WHOLE step, over all micro-batches and ranks, so that adding the micro-batches'
    losses gives the step's loss however the batch was split. With one update per batch old_logp is
    logp itself: r = 1, the clip is inert, the loss is -mean A and its gradient -A grad log pi.
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
        # plain concatenation: solutions are full of braces, backslashes and percent signs
        messages[0]["content"] += (
            "\n\nYour previous attempt:\n" + solution
            + "\n\nPrevious assessment: Your answer is " + ("correct." if correct else "incorrect.")
            + "\n\nNow solve this problem step by step.")
    return messages


def render(tokenizer, messages, template_kwargs):
    """Chat messages -> prompt ids, the same call for student, teacher and evaluation: whatever
    differed besides c would show up in u."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                         return_dict=False, **template_kwargs)


def pick_solutions(group, rng):
    """The verified solution that each response of one group is shown: [(text, source), ...].

    A correct sibling serves the whole group (rows that share a prompt can share its work), and that
    one gets another correct one: never itself, the teacher would only copy. Without one: the data
    set's worked solution, else its bare answer. rng: a random.Random; group: a list of Rollout.
    """
    correct = [i for i, rollout in enumerate(group) if rollout.reward == 1.0]
    rng.shuffle(correct)                                 # our choice: seeded random, not the first
    picks = []
    for i in range(len(group)):
        sibling = next((j for j in correct if j != i), None)     # our choice: never itself
        problem = group[i].problem
        if sibling is not None:                          # of a thinking model: what follows it
            picks.append((group[sibling].text.rpartition("</think>")[2].strip(), "sibling"))
        elif problem["solution"]:
            picks.append((problem["solution"].rpartition("</think>")[2].strip(), "solution"))
        else:
            picks.append(("The answer is \\boxed{" + problem["answer"] + "}.", "answer"))
    return picks


def teacher_prompt(tokenizer, problem, solution, correct, template_kwargs, longest):
    """The teacher's prompt ids, at most `longest`: a solution that is too long loses its head (the
    tail has the answer); problem, headings and generation prompt are never cut."""
    prompt = render(tokenizer, teacher_messages(problem, solution, correct), template_kwargs)
    if len(prompt) > longest:
        ids, cut = tokenizer.encode(solution, add_special_tokens=False), 0
        while len(prompt) > longest and cut < len(ids):  # decoded text may not re-encode in place
            cut += len(prompt) - longest
            messages = teacher_messages(problem, "..." + tokenizer.decode(ids[cut:]), correct)
            prompt = render(tokenizer, messages, template_kwargs)
    return prompt


def teacher_prompts(tokenizer, rollouts, cfg, longest, position):
    """pi_T's prompt for each rollout, and where its solution came from; position: of the first
    group's problem in the data order, which seeds the choice whatever the number of ranks."""
    prompts, sources = [], []
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first:first + cfg.group_size]
        rng = random.Random(hash((cfg.seed, position + first // cfg.group_size)))
        for r, (solution, source) in zip(group, pick_solutions(group, rng)):
            prompts.append(teacher_prompt(tokenizer, r.problem["problem"], solution,
                                          r.reward == 1.0, cfg.template_kwargs, longest))
            sources.append(source)
    return prompts, sources


# --- 3. The verifiable reward ---------------------------------------------------------------------
# `extract_boxed` and, at the end of the section, `is_correct`; what stands between (safe to skip)
# rewrites spellings by rules, computes expressions to 100 digits, symbols at random points, and
# compares values. Everything is bounded by construction: no library call that could hang a step.


def extract_boxed(text):
    r"""What the last complete outermost \boxed{...} or \fbox{...} after </think> holds, or None."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    opened, box = [], None  # opened: for each open brace where its box's content starts, or None
    token = r"\\(?:boxed|fbox)(?:\s*(\{)|\s+([^\s${}\\]+))|(?<!\\)\\[{}]|([{}])"
    for m in re.finditer(token, text):  # one pass, as a hostile text may open 20,000 boxes
        if m[2]:
            box = m[2]
        elif m[1] or m[3] == "{":
            opened.append(m.end() if m[1] else None)
        elif m[3] and opened and (start := opened.pop()):
            box = text[start:m.start()]  # an outer box closes last
    return box


FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|sqrt|factorial)(?![A-Za-z])"
SYMBOL = r"(?:\\[A-Za-z]+|[A-Za-z]|\d+(?=_))(?:_\{[^{}]*\}|'|\([t0]\))*"  # x_{0}', I(0), 52_8
NUMBER = r"(?<=frac)\d|(?<=frac\d)\d|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\.?\d)"  # \frac12
# Words after a number are units, and mean nothing, but for those that change the value.
NO_UNIT = r"(?!\W*(?:\w*(?:illion|sand|dred|zen)|not?|is|if|than|[eidxyzn])\b)"
WORD = (rf"[\s/]*{NO_UNIT}(?:(?<!\d)[A-Za-z]{{3,14}}|[kcmn]?[mgs]|[hWJNVKC]|eV)(?![A-Za-z])"
        r"(?:\^\{?\d\}?)?")
TEXT = rf"\\text\{{{NO_UNIT}(?:[^{{}}\d,?]|\\,|\^\{{?-?\d\}}?){{0,30}}\}}(?:\^\{{?-?\d\}}?)?"
REWRITE = (  # (pattern, replacement), in this order
    # Layout, fonts (all become \text{}), currency, degrees and braces of sets have no value.
    ("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    (r"\s*([][{}()^_])\s*|(?<=frac)\s+", r"\1"), (r"\\cdot|\\times|[×·]", "*"), ("[−–]", "-"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|f?box(?:ed)?)(?![A-Za-z])|\\?\$|\\[{}]", ""),
    (r"\\(?:text|math|mbox|operatorname)(?!bb|cal)[a-z]*\{", r"\\text{"), ("√", r"\\sqrt "),
    (r"\^\{?(?:\\circ|°)\}?|\\degree|°|^\*\*|\*\*$", ""), ("π", r"\\pi "), ("∞", r"\\infty "),
    # 3,159 and 3{,}159 and 3\,159, but not (3,159), are numbers; "or" parts a list; then units.
    (r"(?<=\d)(?:\{,\}|,?\s*\\!\s*|\\,|[~ ])(?=\d{3}(?!\d))", ""),
    (r"(?<![\d,.([{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"[\s,]*(?:\\text\{,?(?:or|and)\}|\b(?:or|and)\b)", ","),
    (rf"(?<=[\w)}}%.])(?:(?:[\s/~*]|\\[,; ])*{TEXT})+", ""), (r"\\text\{([^{}]*)\}", r" \1 "),
    # Matrices are lists of rows; names of curves, as in MR=SRMC, are no products.
    (r"[([]?\\begin\{(?:\w*matrix|array)\}(?:\{\w+\})?", "[["), ("&", ","),
    (r"\\end\{(?:\w*matrix|array)\}[])]?", "]]"), (r"\\\\(?:\[\w+\])?", "],["),
    (r"^([A-Z]{2,})\s*=\s*([A-Z]{2,})$", r"\\\1=\\\2"), (r"\\sim\b|≈", r"\\approx"),
    # Other spellings: sqrt(2), x_0, 26!, 4.5x10^33, 1\frac12 (a sum); digits apart are a list.
    (r"\\[,:;!> ]|\\[()[\]]|~|\\q?quad\b", " "), (r"\\%", "%"), (r"(\d+)!", r"\\factorial{\1}"),
    (r"(?<![\\A-Za-z])(?:np\.)?((?:arc)?(?:sin|cos|tan)|ln|exp|sqrt|pi)(?![A-Za-z])", r"\\\1"),
    (r"_(\w|\\[A-Za-z]+)", r"_{\1}"), (r"\((\d+)\)_", r"\1_"), (r"(?<=\d)\s*x\s*(?=10\^)", "*"),
    (r"\\(sin|cos|tan)\^\{-1\}", r"\\arc\1"), (r"\\sqrt\[(\d)\](\{[^{}]*\})", r"\2^{1/\1}"),
    (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"), (r"\\in\b", "="),
    (r"(?<![\w^.])(\d+)\s*(\\[dt]?frac(?:\{\d+\}|\d){2})", r"(\1+\2)"), (r"(?<=\d)\s+(?=\d)", ","),
    # x^{\prime}, \dot{x} and \frac{dx}{dt} are x'; the inequalities 1 < x \le 2 the interval (1,2].
    (r"\^\{?\\prime\}?", "'"), (rf"\\d?frac\{{d\s*({SYMBOL})\}}\{{d\s*\w\}}", r"\1'"),
    (rf"\\d?frac\{{d\^\{{?2\}}?\s*({SYMBOL})\}}\{{d\s*\w\^\{{?2\}}?\}}", r"\1''"),
    (rf"\\(d?d)ot\s*\{{?({SYMBOL})\}}?", lambda m: m[2] + "'" * len(m[1])),
    (r"('+)(_\{[^{}]*\})", r"\2\1"), (r"\\leq?\b", "≤"), (r"\\geq?\b", "≥"),
    (r"(?<![^,])\\?[A-Za-z]+\s*([>≥])([^,]+)", lambda m: "(["[m[1] == "≥"] + m[2] + r",\infty)"),
    (r"(?<![^,])(?:([^,<≤]+)([<≤]))?\s*\\?[A-Za-z]+\s*([<≤])([^,<≤]+)", lambda m:
     "(["[m[2] == "≤"] + (m[1] or r"-\infty") + "," + m[4] + ")]"[m[3] == "≤"]),
    (r"[\s.,:;]+$", ""))


def _split(text, separator):
    """The parts between separators that no bracket encloses; (a, b] is closed, too."""
    def cut(m):
        depth = [text.count(bracket, 0, m.start()) for bracket in "([{)]}"]
        return m[0] if sum(depth[:3]) > sum(depth[3:]) else "\0"
    return [part.strip() for part in re.sub(separator, cut, text).split("\0")]


BINDS = dict(zip(")]}+-*/^", (0, 0, 0, 1, 1, 2, 2, 4)))  # and a product without a sign 3
APPLY = dict(zip("+-*/^", (operator.add, operator.sub, operator.mul, operator.truediv, pow)))


def _value(text, trial, mp):
    """The value of an expression, its symbols drawn by name and trial; what grows is given up."""
    tokens = [")", *re.findall(rf"{FUNCTION}|{SYMBOL}|{NUMBER}|\S", text)[::-1]]

    def read(level=0):  # precedence climbing: an operand, and what binds tighter than level
        token = tokens.pop()
        name = re.sub(r"[\s{}\\]|\(t\)", "", token)
        if token in "+-":
            value = read(level or 1) * int(token + "1")
        elif token in "([{":
            value, _ = read(), tokens.pop()
        elif name.endswith("frac"):
            value = read(4) / read(4)
        elif re.fullmatch(FUNCTION, token):
            power = read(5) if tokens[-1] == "^" and tokens.pop() else 1  # \sin^2 x
            argument = read(4 if tokens[-1] in "([{" or name == "sqrt" else 2)
            value = getattr(mp, name.replace("arc", "a"))(argument) ** power
        elif name.endswith("binom"):
            value = mp.binomial(read(4), read(4))
        elif token[0] == "\\" and tokens[-1] == "{":  # some command that is not known here
            raise ValueError(token)
        elif re.fullmatch(SYMBOL, token):
            drawn = mp.mpf(random.Random(name + str(trial)).uniform(0.5, 1.5))
            value = {"e": +mp.e, "i": mp.j, "pi": +mp.pi}.get(name, drawn)
        else:
            value = mp.mpf(token)
        while (binds := BINDS.get(tokens[-1], 2 if re.match(FUNCTION, tokens[-1]) else 3)) > level:
            sign = tokens.pop() if tokens[-1] in BINDS else "*"
            binds += sign == "^" or sign == "/" and not tokens[-1][0].isalpha()  # t/RC is t/(RC)
            value = APPLY[sign](value, read(binds))
        if mp.mag(value) > (14 if level == 5 else 3000):  # bits; level 5 reads exponents
            raise OverflowError
        return value

    value = read()
    [_] = tokens  # or else a bracket too many has ended the expression
    return value


def _same(gold, box, mp):
    """Whether two tidied answers are equal: as lists, equations, tuples, or at last values."""
    # Lists, sets and unions: any order, but each element as often; a \pm b is two of them.
    golds, boxes = ([part.replace(r"\pm", sign) for part in _split(text, r",|\\cup\b|∪")
                     for sign in ("+-" if r"\pm" in part else "+")] for text in (gold, box))
    if len(golds) + len(boxes) > 2:
        return len(golds) == len(boxes) and all(sum(_same(each, g, mp) for g in golds) == sum(
            _same(each, b, mp) for b in boxes) for each in golds)
    left, right = _split(golds[0], "="), _split(boxes[0], "=")
    gold, box, equations = left[-1], right[-1], len(left) > 1 < len(right) and left[0] != right[0]
    if equations:  # are equal up to a factor
        gold, box = (f"{side[0]}-({side[-1]})" for side in (left, right))
    elif len(left) > 1 == len(right) and not re.fullmatch(SYMBOL, left[0]):
        return False  # a right-hand side answers an assignment only
    elif len(left) + len(right) > 2:
        return _same(gold, box, mp)
    rows = [_split(text[1:-1], ",") if text[0] in "([" else [text] for text in (gold, box)]
    if len(rows[0]) + len(rows[1]) > 2:  # tuples, intervals, matrices: in order
        return (gold[0] + gold[-1] == box[0] + box[-1] and len(rows[0]) == len(rows[1])
                and all(_same(g, b, mp) for g, b in zip(*rows)))
    decimal = re.search(r"\.\d|\de[+-]?\d", gold)
    exact, *rounded = _split(box, r"\\approx")
    box = rounded[-1] if rounded and (decimal or re.fullmatch(f"({SYMBOL})?", exact)) else exact
    if not re.search(r"(?<![\\A-Za-z])[A-Za-z](?![+-]?\d)", gold):  # a word could be a symbol
        box = re.sub(rf"(?<=[\d)}}.])(?:{WORD})+$", "", box)
    if box.count("%") == 1 and box.endswith("%"):  # 50% answers 50 and 1/2
        return _same(gold, box[:-1], mp) or _same(gold, f"({box[:-1]})/100", mp)
    values = [(_value(gold, trial, mp), _value(box, trial, mp)) for trial in range(3)]
    factor = values[0][0] / values[0][1] if equations else 1
    close = mp.mpf("1e-4" if decimal else "1e-80")
    return all(abs(g - b * factor) <= close * abs(g) + mp.mpf("1e-80") for g, b in values)


_given_up = []


def grader_timeouts():
    """How many answers this process has given up so far because their numbers grew too large."""
    return len(_given_up)


def is_correct(response, answer):
    """Whether the response's last box equals the reference answer; never raises on any response.

    Equal means: integers, fractions, roots exactly, decimal references to 1e-4; in any spelling,
    with or without units; lists in any order, tuples and interval ends strictly; no hedging.
    """
    box, answer = extract_boxed(response), answer.strip()
    if not box or len(box) > max(400, 2 * len(answer)):  # nothing so long is an answer
        return False
    if box.isdecimal() and answer.isdecimal():
        return int(box) == int(answer)
    if answer.startswith(r"\text"):  # words
        return len({re.sub(r"\\\w+|\W", "", words).casefold() for words in (box, answer)}) == 1
    mp = mpmath.MPContext()  # not the global one, whose precision other threads may set
    mp.dps = 100
    try:
        gold, box = (functools.reduce(lambda text, rule: re.sub(*rule, text.strip()), REWRITE, text)
                     for text in (answer, box))
        return gold == box or _same(gold, box, mp)
    except (OverflowError, RecursionError):
        _given_up.append(len(box))
    except (ArithmeticError, LookupError, TypeError, ValueError):
        pass  # what cannot be read is not equal
    return False


# --- 4. The policy: rollouts and log-probabilities from one set of weights ------------------------


@dataclasses.dataclass
class Rollout:
    problem: dict           # a row of load_problems, with the student's prompt ids as "prompt"
    ids: list               # the response's ids, up to and including its first end-of-sequence id
    text: str               # ids decoded, without special tokens: graded, shown to the teacher
    truncated: bool         # ran into max_tokens
    reward: float           # R in {0, 1}
    logp: list = ()         # log pi_S of each id, as it was drawn


def pick(logits, targets, temperature=1.0):
    """log pi(target) and the entropy of pi in nats: logits (m, V), targets (m,) -> (m,), (m,), in
    float32; no gradient flows through the entropy. The only log_softmax here."""
    # upcast first: a bf16 log-softmax errs by 0.01 nats, the size of a typical u
    logps = F.log_softmax(logits.float() / temperature, dim=-1)                      # (m, V)
    logp = logps.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():        # last, so that a checkpoint's second forward ends before it
        entropy = -torch.linalg.vecdot(logps.exp(), logps.clamp_min(-1e9))       # 0 * -inf is nan
    return logp, entropy


def token_logprobs(hidden, lm_head, targets, temperature=1.0, chunk=1024):
    """log pi(target) and the entropy of pi, from hidden states, without ever holding all logits.

    hidden (M, D), lm_head: a module (m, D) -> (m, V) logits, targets (M,) ids; returns ((M,), (M,))
    in nats, fp32; no gradient flows through the entropy. At most `chunk` rows of logits exist at a
    time, fewer for big vocabularies (2^26 logits, 256 MiB in fp32), and backward recomputes them.
    """
    vocabulary = lm_head.weight.shape[0] if hasattr(lm_head, "weight") else 1    # else: as told
    rows = max(1, min(chunk, 2**26 // vocabulary))

    def piece(h, y):
        return pick(lm_head(h), y, temperature)

    parts = [checkpoint(piece, h, y, use_reentrant=False, preserve_rng_state=False)
             for h, y in zip(hidden.split(rows), targets.split(rows))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


class Policy(nn.Module):
    """A Hugging Face causal language model; pi_S and pi_T are this one network on two prompts."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        # student and teacher must be one function: no dropout, not even in the train mode that
        # gradient checkpointing needs
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        # the checkpoint's top_k, penalties and so on would change the law we sample from: they are
        # kept for export and cleared for rollouts
        self.checkpoint_generation_config = model.generation_config
        model.generation_config = GenerationConfig()
        eos = self.checkpoint_generation_config.eos_token_id    # an id, a list of ids, or None
        self.eos_ids = sorted(eos if isinstance(eos, list) else {eos} - {None})

    def forward(self, ids, predicts, temperature=1.0, cache=None):
        """Log-probs and entropies of the response tokens of right-padded rows (see `pack`).

        ids (n, L); predicts (n, L-1) bool: token j+1 is a response token. Returns (n, T), (n, T)
        in nats, zeros past a response's end. Padding stands on the right, where causal attention
        never looks, so no mask is needed; positions go on from what the cache holds (0 without).
        """
        hidden = self.model.base_model(input_ids=ids, past_key_values=cache,
                                       use_cache=cache is not None)[0]               # (n, L, D)
        logp, entropy = token_logprobs(hidden[:, :-1][predicts], self.model.get_output_embeddings(),
                                       ids[:, 1:][predicts], temperature)            # (M,), (M,)
        lengths = predicts.sum(1)
        mask = torch.arange(max(1, int(lengths.max())), device=ids.device) < lengths[:, None]
        empty = torch.zeros(mask.shape, device=ids.device)                           # (n, T)
        return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)

    def generate(self, **inputs):
        return self.model.generate(**inputs)

    def generate_batch(self, *inputs):
        return self.model.generate_batch(*inputs)


def pack(prompts, responses, device):
    """prompt + response, right-padded -> ids (n, L), predicts (n, L-1). No rows: one idle row, with
    which a rank that has run out of micro-batches takes part in the others' communication."""
    rows = [p + r for p, r in zip(prompts, responses)] or [[0, 0]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    predicts = torch.zeros(len(rows), width - 1, dtype=torch.bool, device=device)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        predicts[i, len(prompt) - 1:len(prompt) + len(response) - 1] = True
    return ids, predicts


class RoomyLayer(DynamicLayer):
    """DynamicLayer copies a layer's whole cache for every token; this one for every 32nd, and
    writes those between into the room that it has left."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.get_seq_length():                    # the prompt
            return super().update(key_states, value_states)

        def append(held, new):                           # (n, heads, L, d), (n, heads, 1, d)
            whole, end = held._base, held.shape[2] + new.shape[2]
            # selected or repeated rows are no view, or one of something of another shape
            if whole is None or whole.shape[:2] != held.shape[:2] or whole.shape[2] < end:
                whole = F.pad(held, (0, 0, 0, new.shape[2] + 31))
            whole[:, :, held.shape[2]:end] = new
            return whole[:, :, :end]

        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


def roomy_cache(policy):
    """A cache for rollouts; layers with a sliding window keep their own kind."""
    cache = DynamicCache(config=policy.model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    return cache


@torch.no_grad()
def sample(policy, prompts, group_size, max_tokens, temperature=1.0, top_p=1.0, rollout_batch=0,
           sharded=False, stride=32):
    """Draws `group_size` responses to every prompt: y ~ pi_S(.|x), Algorithm 1 line 1.

    prompts: lists of ids. Returns len(prompts) * group_size pairs (ids, log-probs), groups
    consecutive: the ids up to and including the first end-of-sequence id, or `max_tokens` of them,
    and log pi_S of each as it was drawn. temperature 0 is greedy; rollout_batch > 0 bounds the
    responses that are decoded at once (to whole groups). sharded: the weights are split over the
    ranks, so every rank decodes, if idly, until the last one has ended.
    """
    policy.eval()       # in train mode gradient checkpointing would drop the cache without a word
    device = next(policy.parameters()).device
    # every setting is explicit: what is left out falls back to defaults that truncate (top_k=50)
    settings = dict(do_sample=temperature > 0, top_k=0, eos_token_id=policy.eos_ids,
                    pad_token_id=policy.eos_ids[0], synced_gpus=sharded,
                    return_dict_in_generate=True, output_scores=True,
                    remove_invalid_values=True)          # NaN reaches the check in update instead
    if temperature > 0:
        settings |= dict(temperature=temperature, top_p=top_p)
    step = max(1, rollout_batch // group_size if rollout_batch else len(prompts))
    parts, idle = [prompts[i:i + step] for i in range(0, len(prompts), step)], [[0, 0]]
    ends, drawn = torch.tensor(policy.eos_ids, device=device), []
    for part in as_many_everywhere(parts, idle) if sharded else parts:
        width = max(map(len, part))                      # left-padded: the last column is real
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
        cache = roomy_cache(policy)
        # each prompt is read once for its whole group (the token drawn by this call is not used)
        policy.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                        max_new_tokens=1, **settings)
        cache.batch_repeat_interleave(group_size)
        ids, mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
        alive = torch.arange(0 if part is idle else len(ids), device=device) + len(drawn)
        drawn += [([], []) for _ in alive]
        for done in range(0, max_tokens, stride):
            out = policy.generate(input_ids=ids, attention_mask=mask, past_key_values=cache,
                                  max_new_tokens=min(stride, max_tokens - done), **settings)
            new = out.sequences[:, ids.shape[1]:]                                  # (n, <= stride)
            logp = torch.stack([pick(scores, y)[0] for scores, y in zip(out.scores, new.T)], 1)
            ended = torch.isin(new, ends)
            stops = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
            for i, row, logps, stop in zip(alive.tolist(), new.tolist(), logp.tolist(),
                                           stops.tolist()):
                drawn[i][0].extend(row[:stop])           # the end token is an action too: it stays
                drawn[i][1].extend(logps[:stop])
            going = (~ended.any(1)).nonzero().squeeze(1)[:len(alive)]    # an idle row is not alive
            if not any(gather(len(going)) if sharded else [len(going)]):
                break
            if not len(going):                           # others go on: one idle row, never kept
                cache, alive = roomy_cache(policy), alive[:0]
                ids, mask = ids.new_zeros(1, 1), mask.new_ones(1, 1)
                continue
            if len(going) < len(alive):                  # rows that have ended leave the batch
                cache.batch_select_indices(going)
            ids, alive = out.sequences[going], alive[going]
            mask = torch.cat([mask[going], mask.new_ones(len(going), new.shape[1])], 1)
    return drawn


def sample_paged(policy, prompts, group_size, max_tokens, temperature=1.0, top_p=1.0,
                 rollout_batch=0):
    """`sample` by transformers' continuous batching: waiting responses take the place of ended ones
    and the cache is paged. Meant for CUDA, where it was not measured; on the CPU it is slower."""
    settings = GenerationConfig(
        do_sample=temperature > 0, max_new_tokens=max_tokens, eos_token_id=policy.eos_ids,
        pad_token_id=policy.eos_ids[0],
        **(dict(temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else {}))
    page = 256                                           # tokens; the cache is as big as they need
    pages = rollout_batch * math.ceil((max(map(len, prompts), default=0) + max_tokens) / page)
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=pages or None, return_logprobs=True,
        seed=int(torch.randint(2**31, ())))              # from the generator that train has seeded
    policy.eval()
    rows = [prompt for prompt in prompts for _ in range(group_size)]     # it shares their pages
    outputs = policy.generate_batch(rows, settings, batching)
    if len(outputs) < len(rows) or any(out.error for out in outputs.values()):
        raise RuntimeError("generate_batch lost responses, its log says why; --sampler generate "
                           "does without it")
    return [(out.generated_tokens, out.logprobs) for out in outputs.values()]


def roll_out(policy, tokenizer, problems, k, sampler="generate", **settings):
    """k graded responses to each problem, groups consecutive; settings are those of `sample`."""
    draw = {"generate": sample, "paged": sample_paged,
            "sharded": functools.partial(sample, sharded=True)}[sampler]
    with gathered(policy) if sampler != "sharded" else nullcontext():
        responses = draw(policy, [p["prompt"] for p in problems], k, **settings)
    rollouts = []
    for i, (ids, logp) in enumerate(responses):
        problem, text = problems[i // k], tokenizer.decode(ids, skip_special_tokens=True)
        reward = float(is_correct(text, problem["answer"]))
        rollouts.append(Rollout(problem, ids, text, ids[-1] not in policy.eos_ids, reward, logp))
    return rollouts


@torch.no_grad()
def score(policy, prompts, responses, micro_tokens, temperature=1.0):
    """log pi(y_t | prompt, y_<t) and the entropies, (N, T) each, in nats, zeros past the end.

    A head that several rows share is read once, into a cache.
    """
    policy.eval()                                        # see sample
    device = next(policy.parameters()).device
    logp = torch.zeros(len(prompts), max(map(len, responses)), device=device)
    entropy = torch.zeros_like(logp)
    calls = []           # (head, rows); without rows: read the head, whose rows follow directly
    for head, rows in shared_heads(prompts, responses):
        lengths = [len(prompts[i]) - len(head) + len(responses[i]) for i in rows]
        calls += [(head, [])] * bool(head)
        for micro in micro_batches(lengths, micro_tokens):
            calls.append((head, [rows[k] for k in micro]))
    for head, rows in as_many_everywhere(calls, ([], [])):
        if not rows:
            cache = DynamicCache(config=policy.model.config)
            policy(*pack([head or [0]], [[]], device), cache=cache)
            continue
        ids, predicts = pack([prompts[i][len(head):] for i in rows], [responses[i] for i in rows],
                             device)
        copy = None
        if head:
            copy = deepcopy(cache)
            copy.batch_repeat_interleave(len(rows))
        part = policy(ids, predicts, temperature, copy)
        logp[rows, :part[0].shape[1]], entropy[rows, :part[1].shape[1]] = part
    return logp, entropy


# --- 5. Configuration (safe to skip): every field is a flag, defaults are the paper's or say so ---


class InputError(ValueError):
    """Something the user can mend. Printed as one line; the process ends with code 2."""


def flag(default, text, **options):
    """least, choices: checked below; free: may differ between a run and its --resume."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


def check_flags(cfg):
    """Raises InputError where a field breaks its own metadata, or the template's JSON is none."""
    for field in dataclasses.fields(cfg):
        value, rules = getattr(cfg, field.name), field.metadata
        if value not in rules.get("choices", [value]):
            raise InputError(f"--{field.name} {value!r}: choose from {rules['choices']}")
        if "least" in rules and not rules["least"] <= value < math.inf:
            raise InputError(f"--{field.name} {value}: must be at least {rules['least']}")
    try:
        dict(cfg.template_kwargs.items())
    except (ValueError, AttributeError):
        raise InputError("--chat_template_kwargs must be a JSON object, such as "
                         """'{"enable_thinking": false}'""") from None


@dataclasses.dataclass
class Config:
    # the model and what it reads
    model: str = flag("", "Hugging Face folder or hub id of a chat model (required)")
    dataset: str = flag("open-r1/DAPO-Math-17k-Processed",
                        "training problems: .jsonl, .json or .parquet file, or hub id (Table 5)")
    dataset_config: str = flag("all", "configuration of a hub data set; not used for files")
    split: str = flag("train", "split of a hub data set; not used for files")
    max_prompt_tokens: int = flag(2048, "longer problems are dropped and counted (not the paper's)",
                                  least=1)
    chat_template_kwargs: str = flag("{}", "JSON for the chat template, the same for student and "
                                     """teacher: '{"enable_thinking": false}' for Qwen3 hybrids""")
    trust_remote_code: bool = flag(False, "run model code that comes with the checkpoint",
                                   free=True)
    # the method
    method: str = flag("antisd", "which per-token term joins GRPO", choices=list(METHODS))
    compose: str = flag("add", "A + lam * delta, or mul: A * (1 + lam * delta) (Table 3)",
                        choices=["add", "mul"])
    lam: float = flag(0.5, "lambda_max, weight of the per-token term (Table 5)", least=0)
    warmup_steps: int = flag(5, "W: steps with lambda 0 that calibrate H_warm (Table 5)", least=0)
    tau_down: float = flag(0.93, "the gate shuts below tau_down * H_warm; 0: no gate (Table 5)",
                           least=0)
    gate_stat: str = flag("mean", "the gate's statistic of token entropies; median is the paper's "
                          "text, but a token median is near 0 nats", choices=["mean", "median"])
    gate_source: str = flag("teacher", "whose entropy moves the gate (Table 3)",
                            choices=["teacher", "student"])
    # the rollout
    problems_per_step: int = flag(32, "B, over all ranks (Table 5)", least=1)
    group_size: int = flag(8, "G, responses per problem (Table 5)", least=2)
    max_tokens: int = flag(32768, "longest response, in tokens (Table 5)", least=1)
    temperature: float = flag(1.0, "of rollouts; scoring divides by it too (Table 5)")
    rollout_batch: int = flag(0, "responses decoded at once on a rank, in whole groups, at least "
                              "one; bounds the KV cache; 0: all", least=0, free=True)
    sampler: str = flag("generate", "generate: whole weights on every rank; paged: the same with "
                        "continuous batching, meant for CUDA; sharded: weights stay split and "
                        "are gathered for every token: slow, for models that do not fit on a GPU",
                        choices=["generate", "paged", "sharded"], free=True)
    # the update
    lr: float = flag(1e-6, "AdamW's constant learning rate (Table 5)", least=0)
    warmup_lr_steps: int = flag(0, "linear learning-rate warm-up, in steps", least=0)
    weight_decay: float = flag(0.01, "AdamW's (not in the paper)", least=0)
    max_grad_norm: float = flag(1.0, "gradient clipping (not in the paper)")
    clip: float = flag(0.2, "PPO clip; inert while updates_per_batch is 1 (Table 5)")
    steps: int = flag(200, "training steps (Table 5)", least=1, free=True)
    updates_per_batch: int = flag(1, "optimizer updates per rollout batch (Table 5: a clip)",
                                  least=1)
    loss_agg: str = flag("token", "token: sum over tokens / tokens of the step; seq: mean over "
                         "responses of their means (not in the paper)", choices=["token", "seq"])
    mask_truncated: bool = flag(False, "leave truncated responses out of the loss")
    # the machine
    micro_tokens: int = flag(16384, "tokens (padding included) of one scoring or training "
                             "micro-batch; a longer response goes alone", least=1, free=True)
    gradient_checkpointing: bool = flag(False, "recompute layers in backward: slower, leaner")
    dtype: str = flag("auto", "compute type; auto is bfloat16 on CUDA and float32 on the CPU; "
                      "master weights are float32", choices=["auto", "bfloat16", "float32"])
    seed: int = flag(0, "of data order, rollouts and the choice of solutions")
    # validation, records
    eval_dataset: str = flag("", "held-out problems; evaluated before the first and after the last "
                             "step")
    eval_every: int = flag(0, "also evaluate every so many steps", least=0, free=True)
    eval_samples: int = flag(1, "responses per held-out problem", least=1)
    eval_temperature: float = flag(0.7, "of evaluation (Table 5); 0 is greedy", least=0)
    eval_top_p: float = flag(0.95, "of evaluation (Table 5)")
    output: str = flag("runs/antisd", "folder of this run", free=True)
    save_every: int = flag(20, "steps between checkpoints; 0: none", least=0, free=True)
    keep: int = flag(2, "newest checkpoints kept", least=1, free=True)
    resume: bool = flag(False, "continue the run in --output from its newest whole checkpoint",
                        free=True)
    init_from: str = flag("", "folder of a run whose weights, optimizer and data position to start "
                          "from, with step count and gate fresh (continual AntiSD)")
    sample_every: int = flag(10, "steps between rollouts shown and kept in samples.jsonl", least=1,
                             free=True)
    tracker: str = flag("", "wandb or trackio, if installed", choices=["", "wandb", "trackio"],
                        free=True)

    def __post_init__(self):
        check_flags(self)
        for wrong, text in (
            (not self.model, "--model is required: a Hugging Face folder or a hub id"),
            (not 0 < self.temperature < math.inf, "--temperature: rollouts are samples, it must be "
             "above 0"),
            (not 0 < self.eval_top_p <= 1, "--eval_top_p must be above 0 and at most 1"),
            (not 0 < self.clip < 1, "--clip must be between 0 and 1"),
            (not self.max_grad_norm > 0, "--max_grad_norm must be above 0"),
            (not self.warmup_steps and self.tau_down and self.method in GATED,
             "--warmup_steps 0 leaves the gate without H_warm; no gate at all is --tau_down 0"),
        ):
            if wrong:
                raise InputError(text)

    @property
    def template_kwargs(self):
        return json.loads(self.chat_template_kwargs)


class FlagParser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):            # @file: several words a line, # comments
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"{error} in the line {line!r}")

    def error(self, message):                            # one line instead of the whole usage
        raise InputError(message)


def parse_config(argv=None, kind=Config, text=__doc__):
    """Flags (default: the command line) -> a dataclass of fields made by `flag`; raises InputError
    with one line on bad input."""
    parser = FlagParser(description=text.split("\n\n")[0], fromfile_prefix_chars="@",
                        allow_abbrev=False)
    for field in dataclasses.fields(kind):
        names = list(dict.fromkeys([f"--{field.name}", "--" + field.name.replace("_", "-")]))
        options = ({"action": argparse.BooleanOptionalAction} if field.type is bool
                   else {"nargs": "+"} if field.type is list
                   else {"type": field.type, "choices": field.metadata.get("choices")})
        parser.add_argument(*names, default=field.default,
                            help=f"{field.metadata['help']} [{field.default}]".replace("%", "%%"),
                            **options)
    return kind(**vars(parser.parse_args(argv)))


# --- 6. Data (safe to skip) -----------------------------------------------------------------------

DAPO_HEAD = ("Solve the following math problem step by step. The last line of your response should "
             "be of the form Answer:")

DAPO_TAIL = 'Remember to put your answer on its own line after "Answer:".'


def load_problems(path, split=None, limit=None, config=None):
    """Problems from a .jsonl, .json or .parquet file, or from a hub data set.

    Returns a list of {"id": row number, "problem": str, "answer": str, "solution": str or None};
    rows with the same problem are merged, the first one stays. Columns recognised:
    problem | question | prompt (text or chat messages); answer | final_answer |
    reward_model.ground_truth | Answer; solution. Raises InputError, which names the columns found.
    """
    problems = {}
    for number, row in enumerate(_rows(path, split, config)):
        where = f"{path}: row {number + 1}"
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object with named fields; a .json "
                             "file holds a list of them")
        found = f"the columns are {', '.join(map(str, row))}"
        text = next((row[k] for k in ("problem", "question", "prompt") if row.get(k)), None)
        if isinstance(text, list):                       # chat messages: the user's last turn
            turns = [t for t in text if isinstance(t, dict) and t.get("role") == "user"]
            text = turns[-1].get("content") if turns else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where} has no problem (problem, question or prompt); {found}")
        if isinstance(row.get("reward_model"), dict):
            row = {**row, "reward_model.ground_truth": row["reward_model"].get("ground_truth")}
        keys = ("answer", "final_answer", "reward_model.ground_truth", "Answer")
        answer = next((str(row[k]) for k in keys if row.get(k) not in (None, "")), None)
        if answer is None:
            raise InputError(f"{where} has no answer ({', '.join(keys)}); {found}")
        solution = row.get("solution")
        if "####" in answer:                             # GSM8K: the working, #### and the number
            solution, answer = answer, answer.rsplit("####", 1)[1].replace(",", "")
        if text.startswith(DAPO_HEAD):                   # asks for "Answer:", our reward for a box
            text = text.split("\n\n", 1)[-1].replace(DAPO_TAIL, "")
        text, answer = text.strip(), answer.strip()
        problems.setdefault(text, {"id": number, "problem": text, "answer": answer,
                                   "solution": _worked_solution(solution, answer)})
        if limit and len(problems) >= limit:
            break
    if not problems:
        raise InputError(f"{path} holds no problems")
    return list(problems.values())


def _rows(path, split, config):
    """The raw rows. JSON is read here: errors name the line, and a column may mix types."""
    file, line = Path(path), ""
    if file.suffix in (".jsonl", ".json", ".parquet") and not file.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if file.suffix == ".jsonl":
            for number, text in enumerate(file.open("rb"), 1):
                line = f"line {number} is not JSON: "
                if text.strip():
                    yield json.loads(text)
        elif file.suffix == ".json":
            line = "not JSON: "
            yield from json.loads(file.read_bytes())
        elif file.suffix == ".parquet":
            yield from datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            sets = datasets.load_dataset(path, config or None, split=split)
            yield from sets if split else sets.get("test") or next(iter(sets.values()))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot load the data set {path}: {line}"
                         + " ".join(str(error).split())) from None


def _worked_solution(solution, answer):
    """A solution for the teacher, or None where the column repeats the answer (DAPO-Math does)."""
    if not solution or str(solution).strip() == answer:
        return None
    text = re.sub(r"<<[^<>]*>>", "", str(solution)).strip()        # GSM8K's calculator notes
    work, mark, final = text.rpartition("\n####")
    return f"{work}\nThe answer is \\boxed{{{final.strip()}}}." if mark else text


def next_problems(problems, position, count, seed):
    """`count` problems from `position` on; the order is a function of (seed, epoch) alone."""
    batch = []
    for p in range(position, position + count):
        epoch, place = divmod(p, len(problems))
        shuffle = torch.Generator().manual_seed(seed * 100_003 + epoch)
        batch.append(problems[int(torch.randperm(len(problems), generator=shuffle)[place])])
    return batch


# --- 7. Many GPUs and micro-batches (safe to skip): one process is a group of one -----------------


def setup():
    """Joins torchrun's process group, or makes one of a single process -> rank, world, device.

    One code path for 1 and for N processes: FSDP on a single one measured 3% slower than none.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        # a rank may wait hours for another one's longest response; a dead one torchrun notices
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), **alone)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; the one collective besides FSDP's."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function, *args):
    """Runs it on rank 0; what it returns, or the one line of its error, reaches every rank."""
    result = problem = None
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except (InputError, OSError, safetensors.SafetensorError) as error:
            problem = str(error)
    result, problem = gather((result, problem))[0]
    if problem:
        raise InputError(problem)
    return result


def shard(policy, dtype, device):
    """FSDP2: float32 parameters, gradients and optimizer state are split over the ranks, and each
    layer is gathered in `dtype` while it computes. The root holds embeddings and head together,
    which may be tied, and reshards too, else a forward before step() would leave stale weights."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    options = dict(mesh=mesh, reshard_after_forward=True,
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for module in list(policy.modules()):
        if type(module).__name__ in (policy.model._no_split_modules or ()):  # the decoder layers
            fully_shard(module, **options)
    fully_shard(policy, **options)
    for method in ("generate", "generate_batch"):        # the root must be the first to run
        register_fsdp_forward_method(policy, method)
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


def micro_batches(lengths, budget):
    """Row indices in micro-batches of similar length, longest first: rows * longest <= budget, at
    most a tenth of it padding; a row beyond the budget goes alone."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            real = sum(lengths[j] for j in batches[-1]) + lengths[i]
            if padded <= budget and real >= 0.9 * padded:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


def as_many_everywhere(calls, idle):
    """`calls`, followed by `idle` ones up to the count of the rank that has most: every forward and
    backward pass of a sharded model is a communication, which all ranks must take part in."""
    return calls + [idle] * (max(gather(len(calls))) - len(calls))


def shared_heads(prompts, responses):
    """Rows whose prompts begin alike, as a list of (the head they share, their indices).

    One correct sibling serves a whole group, so the teacher reads nearly the same long prompt for
    all of it. The head is worth a call of its own where that saves 512 tokens and where responses
    are not much longer; all other rows stand together with the head []."""
    clusters, others = [], []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):  # like heads are neighbours
        # commonprefix takes any lists
        head = os.path.commonprefix([clusters[-1][0], prompts[i][:-1]]) if clusters else []
        if 4 * len(head) >= 3 * len(prompts[i]):
            clusters[-1] = head, clusters[-1][1] + [i]
        else:
            clusters.append((prompts[i][:-1], [i]))      # the last token predicts the response
    shared = []
    for head, rows in clusters:
        longest = max(len(responses[i]) for i in rows)
        if (len(rows) - 1) * len(head) >= 512 and 4 * len(head) >= longest:
            shared.append((head, rows))
        else:
            others += rows
    return shared + [([], others)]


# --- 8. Checkpoints (safe to skip) ----------------------------------------------------------------


def _checksum(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(policy, optimizer):
    fresh = not optimizer.state
    model, optim = dcp_state.get_state_dict(policy, optimizer)
    if fresh:        # that took a step at lr 0 to make AdamW's state: its bias terms would be off
        for state in (*optimizer.state.values(), *optim["state"].values()):
            state["step"].zero_()
    return {"model": model, "optimizer": optim}


def checkpoints(run):
    """A run's whole checkpoints, oldest first: progress.json is written last and deleted first."""
    return sorted(file.parent for file in Path(run).glob("checkpoints/step-*/progress.json"))


def _drop(folder):
    (folder / "progress.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(run, policy, optimizer, now, keep):
    """Every rank writes its shards into checkpoints/step-N, then rank 0 progress.json, which makes
    it count, and drops all but the `keep` newest. A full disk costs this checkpoint and one printed
    line; the older ones stay. Returns whether it was saved."""
    rank, folder = dist.get_rank(), run / "checkpoints" / f"step-{now['step']:06d}"
    sums, error = {}, None
    if gather((folder / "progress.json").exists())[0]:   # stopped again before the next step
        return True
    if rank == 0:
        _drop(folder)                                    # what a kill has left of it
    gather(None)                                         # nobody writes before it is gone
    try:
        dcp.save(_state(policy, optimizer), checkpoint_id=folder)
        sums = {file.name: _checksum(file) for file in folder.glob(f"__{rank}_*")}
    except (OSError, dcp.api.CheckpointException) as problem:
        error = " ".join(str(problem).split())[-300:]
    ranks = gather((sums, error))
    if rank == 0:
        error = next((error for _, error in ranks if error), None)
        try:
            if not error:
                sums = {name: digest for part, _ in ranks for name, digest in part.items()}
                sums[".metadata"] = _checksum(folder / ".metadata")
                write_whole(folder / "progress.json", json.dumps({"now": now, "checksums": sums}))
                for old in checkpoints(run)[:-keep]:
                    _drop(old)
        except OSError as problem:
            error = str(problem)
        if error:
            _drop(folder)                                # give the space back
            tqdm.write(f"no checkpoint at step {now['step']}, older ones are whole: {error}")
    return not gather(error)[0]


def load_checkpoint(path, policy, optimizer):
    """Loads weights and optimizer in place, for any number of ranks; returns the saved `now`."""
    rank, world, bad = dist.get_rank(), dist.get_world_size(), []
    try:
        saved = json.loads((path / "progress.json").read_text())
        for i, (name, digest) in enumerate(sorted(saved["checksums"].items())):
            if i % world == rank and _checksum(path / name) != digest:
                bad.append(name)
    except (OSError, ValueError) as error:
        bad.append(str(error))
    bad = sum(gather(bad), [])
    if bad:
        older = [p.name for p in checkpoints(path.parent.parent) if p.name < path.name]
        raise InputError(f"{path} is damaged ({bad[0]}); " + (
            f"delete it, and --resume continues from {older[-1]}" if older else "none is older"))
    state = _state(policy, optimizer)
    dcp.load(state, checkpoint_id=path)
    dcp_state.set_state_dict(policy, optimizer, model_state_dict=state["model"],
                             optim_state_dict=state["optimizer"])
    return saved["now"]


def restore(cfg, run, policy, optimizer, fresh):
    """Where the run stands: at its newest checkpoint, at --init_from's data position, or fresh."""
    if cfg.resume and checkpoints(run):
        return load_checkpoint(checkpoints(run)[-1], policy, optimizer)
    if cfg.init_from:                                    # continual AntiSD: step and gate are fresh
        if not checkpoints(cfg.init_from):
            raise InputError(f"--init_from {cfg.init_from} holds no checkpoint")
        old = load_checkpoint(checkpoints(cfg.init_from)[-1], policy, optimizer)
        return fresh | {"position": old["position"]}
    return fresh


def export_model(folder, policy, tokenizer, dtype):
    """The weights as a Hugging Face folder, of the dtype and with the settings they came with."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(policy, options=options)      # on rank 0; else empty

    def write():
        writing = folder.with_name(folder.name + ".writing")
        shutil.rmtree(writing, ignore_errors=True)
        named = [*policy.model.named_parameters(), *policy.model.named_buffers()]   # tied ones once
        policy.model.save_pretrained(writing, state_dict={
            name: x.to(dtype) if x.is_floating_point() else x for name, _ in named
            if (x := state.get(f"model.{name}")) is not None})
        policy.model.config.dtype = dtype                # save_pretrained wrote the master weights'
        policy.model.config.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
        policy.checkpoint_generation_config.to_json_file(writing / "generation_config.json")
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)

    on_rank_0(write)


# --- 9. Records (safe to skip) --------------------------------------------------------------------


def write_whole(path, text):
    """A kill leaves the old file or the new one, never a half."""
    writing = path.with_name(path.name + ".writing")
    with open(writing, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


def open_run(cfg):
    """Makes the output folder and writes config.json; refuses to mix two runs in one folder."""
    output, flags = Path(cfg.output), dataclasses.asdict(cfg)
    record = output / "config.json"
    if record.exists():
        if not cfg.resume:
            raise InputError(f"{output} already holds a run: add --resume, or choose another "
                             "--output")
        before = json.loads(record.read_text())["flags"]
        changed = [field.name for field in dataclasses.fields(cfg) if not field.metadata.get("free")
                   and before.get(field.name) != flags[field.name]]
        if changed:
            raise InputError(f"--resume with other settings than the run's: {', '.join(changed)}")
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
                         capture_output=True, text=True)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps({
        "flags": flags, "git": git.stdout.strip() or None, "source": _checksum(__file__),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "world_size": dist.get_world_size()}, indent=1) + "\n")
    return output


class Log:
    """metrics.jsonl, samples.jsonl, the bar, the tracker; on rank 0 alone."""

    def __init__(self, cfg, run, step, rank):
        self.cfg, self.run, self.rank = cfg, run, rank
        self.tracker = None
        self.bar = tqdm(total=cfg.steps, initial=step, disable=rank != 0, dynamic_ncols=True)
        if rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):     # drop what a resumed run redoes
                if (run / name).exists():                # a kill may have cut the last line
                    lines = (run / name).read_text().splitlines(keepends=True)
                    write_whole(run / name, "".join(line for line in lines if line.endswith("\n")
                                                    and json.loads(line)["step"] < step))
            if cfg.tracker:
                self.tracker = importlib.import_module(cfg.tracker)
                self.tracker.init(project="antisd", name=run.name, config=dataclasses.asdict(cfg))

    def append(self, name, row):
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)      # NaN is not JSON
        with open(self.run / name, "a") as file:         # ASCII: NUL, emoji and surrogates escaped
            file.write(json.dumps(row) + "\n")

    def step(self, row, batch, tokenizer):
        if self.rank != 0:
            return
        self.append("metrics.jsonl", row)
        if self.tracker:
            self.tracker.log(row, step=row["step"])
        if row["step"] % self.cfg.sample_every == 0:
            u = batch.t - batch.s if batch.sources else torch.full_like(batch.s, math.nan)
            for i in (0, len(batch.rollouts) - 1):
                r, n = batch.rollouts[i], len(batch.rollouts[i].ids)
                self.append("samples.jsonl", {
                    "step": row["step"], "problem_id": r.problem["id"],
                    "problem": r.problem["problem"], "answer": r.problem["answer"],
                    "response": r.text, "reward": r.reward, "truncated": r.truncated,
                    "context": batch.sources[i] if batch.sources else None,
                    "tokens": tokenizer.convert_ids_to_tokens(r.ids), "u": u[i, :n].tolist(),
                    "teacher_entropy": batch.entropy_t[i, :n].tolist()})
            r = batch.rollouts[0]
            text = r.text if len(r.text) < 1200 else r.text[:600] + " [...] " + r.text[-600:]
            tqdm.write(f"\n[step {row['step']}: reward {r.reward:.0f}, mean u "
                       f"{u[0, :len(r.ids)].mean():+.3f}, answer {r.problem['answer']}] {text}\n")
        teacher = "" if row["teacher_entropy"] is None else (
            f"H_T {row['teacher_entropy']:.3f}, gate {row['gate']:g}, lambda {row['lam']:g}, ")
        self.bar.set_postfix_str(
            f"reward {row['reward']:.3f}, length {row['length']:.0f}, truncated "
            f"{row['truncated']:.0%}, {teacher}{row['tokens_per_s']:.0f} tok/s")
        self.bar.update()

    def close(self):
        self.bar.close()
        if self.tracker:
            self.tracker.finish()


def peak_memory_gib():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20    # KiB on Linux


def memory_estimate(config, parameters, world, rows, prompt, response, micro_tokens,
                    checkpointing=False, sharded=False, width=2):
    """GiB that one GPU needs at most, by purpose; config: the Hugging Face model's text config.

    rows are decoded at once on a GPU, all of them as long as prompt + response; `width` is the
    compute type's bytes. Activations are an estimate of what backward keeps of gated layers.
    """
    c, layers = config, config.num_hidden_layers
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    kv = 2 * (getattr(c, "num_key_value_heads", None) or heads) * head_dim
    expert = getattr(c, "moe_intermediate_size", None)
    inner = (expert * c.num_experts_per_tok if expert
             else getattr(c, "intermediate_size", None) or 4 * c.hidden_size)
    tokens = max(micro_tokens, prompt + response)
    layer = width * (10 * c.hidden_size + 3 * heads * head_dim + 2 * kv + 4 * inner)     # a token's
    kept = layer + layers * width * c.hidden_size if checkpointing else layers * layer
    root = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    gathered_at_once = root + 2 * (parameters - root) / layers           # the root and two layers
    parts = {
        "state": 16 * parameters / world,         # float32: weights, gradients, AdamW's two moments
        # for rollouts: weights in the compute type; the cache, and 32 tokens' scores in float32
        "weights": width * (gathered_at_once if sharded else parameters),
        "cache": rows * ((prompt + response) * layers * kv * width + 32 * 4 * c.vocab_size),
        # for training: weights, and gradients until they are summed over the ranks
        "layers": width * gathered_at_once,
        "gradients": 4 * (gathered_at_once if sharded or world == 1 else parameters),
        "activations": tokens * kept,
        "logits": 4 * 4 * min(2**26, tokens * c.vocab_size)}     # float32: log-softmax, gradients
    parts = {name: size / 2**30 for name, size in parts.items()}
    rollout = ("weights", "cache")
    training = ("layers", "gradients", "activations", "logits")
    return parts | {"peak": parts["state"] + max(sum(parts[name] for name in rollout),
                                                 sum(parts[name] for name in training))}


def say_memory(cfg, policy, world, device, say):
    """Prints the estimate, and a warning where the card is smaller."""
    rows = cfg.problems_per_step // world * cfg.group_size
    if cfg.rollout_batch:                                # whole groups, at least one
        rows = min(rows, max(1, cfg.rollout_batch // cfg.group_size) * cfg.group_size)
    need = memory_estimate(
        policy.model.config.get_text_config(), sum(p.numel() for p in policy.parameters()), world,
        rows, cfg.max_prompt_tokens, cfg.max_tokens, cfg.micro_tokens, cfg.gradient_checkpointing,
        cfg.sampler == "sharded", compute_dtype(cfg, device).itemsize)
    say("memory per process at most, GiB: {peak:.1f} = state {state:.1f} + the larger of rollouts "
        "(weights {weights:.1f}, cache {cache:.1f}) and training (layers {layers:.1f}, gradients "
        "{gradients:.1f}, activations {activations:.1f}, logits {logits:.1f})".format(**need))
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).total_memory / 2**30
        if need["peak"] > card:
            say(f"that is more than the card's {card:.0f} GiB: lower --rollout_batch, "
                "--micro_tokens or --max_tokens, set --gradient_checkpointing or "
                "--sampler sharded, or use more GPUs")


# --- 10. Start-up (safe to skip) ------------------------------------------------------------------


def load_tokenizer(cfg):
    """The tokenizer of cfg.model and its context in tokens; InputError where it cannot serve."""
    try:
        options = dict(trust_remote_code=cfg.trust_remote_code)
        model_config = AutoConfig.from_pretrained(cfg.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--model {cfg.model} cannot be loaded, from a folder or the hub "
                         f"({reason})") from None
    if not tokenizer.chat_template:
        raise InputError(f"--model {cfg.model} has no chat template: it must be a chat model")
    text_config = model_config.get_text_config()
    return tokenizer, getattr(text_config, "max_position_embeddings", None) or 10**9


def prepare(cfg, world):
    """Everything that can be wrong and costs little to find out, before any weight is loaded.

    Returns tokenizer, training problems, held-out problems (each with its "prompt" ids), and the
    longest teacher prompt, in tokens.
    """
    if cfg.problems_per_step % (world * cfg.updates_per_batch):
        raise InputError(f"--problems_per_step {cfg.problems_per_step} must be a multiple of ranks "
                         f"({world}) x --updates_per_batch ({cfg.updates_per_batch})")
    if cfg.tracker and not importlib.util.find_spec(cfg.tracker):
        raise InputError(f"--tracker {cfg.tracker}: pip install {cfg.tracker} first")
    tokenizer, context = load_tokenizer(cfg)
    longest, checked = context - cfg.max_tokens, []
    for path, split, config in ((cfg.dataset, cfg.split, cfg.dataset_config),
                                (cfg.eval_dataset, None, None)):
        problems, kept = load_problems(path, split, config=config) if path else [], []
        for problem in problems:
            text = problem["problem"]
            problem["prompt"] = render(tokenizer, student_messages(text), cfg.template_kwargs)
            bare = render(tokenizer, teacher_messages(text, "...", False), cfg.template_kwargs)
            if len(problem["prompt"]) <= cfg.max_prompt_tokens and len(bare) <= longest:
                kept.append(problem)
        if path and not kept:
            raise InputError(f"{path}: every problem is longer than --max_prompt_tokens "
                             f"{cfg.max_prompt_tokens}, or does not fit the model's context of "
                             f"{context} tokens beside --max_tokens {cfg.max_tokens}")
        if len(kept) < len(problems) and dist.get_rank() == 0:
            print(f"{path}: dropped {len(problems) - len(kept)} of {len(problems)} (too long)")
        checked.append(kept)
    return tokenizer, *checked, longest


def compute_dtype(cfg, device):
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bfloat16": torch.bfloat16, "float32": torch.float32}[cfg.dtype]


def load_policy(cfg, tokenizer, dtype):
    """cfg.model as a Policy on the CPU, whole; dtype "auto" is the checkpoint's own."""
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype,
                                                 trust_remote_code=cfg.trust_remote_code)
    with torch.no_grad():
        probe = torch.tensor([[0, 1]])
        ours = model.get_output_embeddings()(model.base_model(input_ids=probe)[0])
        if not torch.allclose(ours, model(input_ids=probe).logits, equal_nan=True):
            raise InputError(f"--model {cfg.model} changes its logits after lm_head (soft-capping "
                             "or scaling); Policy.forward would have to do the same")
    policy = Policy(model)
    policy.eos_ids = sorted({*policy.eos_ids, tokenizer.eos_token_id} - {None})
    if not policy.eos_ids:
        raise InputError(f"--model {cfg.model} has no end-of-sequence token")
    return policy


def build(cfg, tokenizer, device):
    """The sharded policy, its optimizer, and the dtype the checkpoint came in."""
    policy = load_policy(cfg, tokenizer, "auto")
    if cfg.gradient_checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    source_dtype = policy.model.dtype
    shard(policy, compute_dtype(cfg, device), device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.999),  # our choice
                                  weight_decay=cfg.weight_decay)
    return policy, optimizer, source_dtype


def mean_error(values):
    """Mean and its standard error over problems: (float, float); a single value has error 0."""
    error = statistics.stdev(values) / len(values)**0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def evaluate(policy, tokenizer, problems, cfg):
    """Held-out accuracy (mean over problems, eval_samples each) and its standard error."""
    rank, world, k = dist.get_rank(), dist.get_world_size(), cfg.eval_samples
    torch.manual_seed(hash((cfg.seed, rank)))    # the same draws at every evaluation
    rollouts = roll_out(policy, tokenizer, problems[rank::world], k, max_tokens=cfg.max_tokens,
                        temperature=cfg.eval_temperature, top_p=cfg.eval_top_p,
                        rollout_batch=cfg.rollout_batch, sampler=cfg.sampler)
    mine = [statistics.fmean(r.reward for r in rollouts[i:i + k])
            for i in range(0, len(rollouts), k)]
    scores = sum(gather(mine), [])
    accuracy, error = mean_error(scores)
    return {"eval_accuracy": accuracy, "eval_error": error, "eval_problems": len(scores)}


@contextmanager
def phase(name, seconds):
    """Adds the time to seconds[name]; where CUDA runs out of memory it says what to lower."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"rank {dist.get_rank()} ran out of memory in the {name} phase: lower "
                       "--rollout_batch (rollout, eval) or --micro_tokens (score, train), set "
                       "--gradient_checkpointing, or use more ranks")
        raise
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


class Interrupt:
    """SIGTERM or SIGINT: the phase in hand is finished and the run saved. A later one kills."""

    def __init__(self):
        self.first = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        # Ctrl-C reaches a rank twice, from the terminal and from torchrun: that is one wish
        if self.first and time.monotonic() - self.first > 2:
            os._exit(128 + number)
        self.first = self.first or time.monotonic()

    def asked(self):
        return any(gather(self.first is not None))       # the same answer on every rank


# --- 11. Training: Algorithm 1 --------------------------------------------------------------------


def global_mean(values, mask):
    """Mean of values (N, T) where mask, over ALL ranks; 0 where nothing is."""
    parts = gather((values[mask].double().sum().item(), int(mask.sum())))
    total, count = map(sum, zip(*parts))
    return total / max(1, count)


def global_median(values, mask):
    """Median over ALL ranks' tokens (our choice: an average of ranks' medians is not a median)."""
    return float(numpy.median(torch.cat(gather(values[mask].cpu()))))    # torch's: the lower middle


@dataclasses.dataclass
class Batch:
    """One step's rows on this rank: N = problems x group_size of them, T the longest response."""
    rollouts: list
    sources: list                   # where each row's c came from; empty for grpo
    mask: torch.Tensor              # (N, T) bool: real response tokens
    seq_advantages: torch.Tensor    # (N,)
    t: torch.Tensor                 # (N, T) log pi_T(y_t)
    entropy_t: torch.Tensor         # (N, T)
    s: torch.Tensor                 # (N, T) log pi_S(y_t)
    entropy_s: torch.Tensor         # (N, T)


def update(policy, optimizer, batch, lam, cfg, s_is_known):
    """Lines 2, 4, 5, 8, 9: cfg.updates_per_batch clipped policy-gradient updates on whole groups.

    Where s is not known yet it is the training forward's own output, and is stored in the batch.
    Returns loss, gradient norm (means over the updates) and whether every update was finite; one
    that is not changes nothing.
    """
    rollouts, world = batch.rollouts, dist.get_world_size()
    policy.train(cfg.gradient_checkpointing)             # Hugging Face ties the one to the other
    weights = batch.mask.float()
    if cfg.mask_truncated:           # our choice: off; leaves numerator and denominator alike
        kept = torch.tensor([not r.truncated for r in rollouts], device=weights.device)
        weights = weights * kept[:, None]
    if cfg.loss_agg == "seq":                            # our choice: token; the same for every arm
        weights = weights / batch.mask.sum(1, keepdim=True)
    losses, norms = [], []
    size = len(rollouts) // cfg.updates_per_batch
    for first in range(0, len(rollouts), size):
        # of all ranks; for loss_agg "seq" the weights sum to the number of responses
        num_tokens = sum(gather(weights[first:first + size].sum().item()))
        lengths = [len(r.problem["prompt"]) + len(r.ids) for r in rollouts[first:first + size]]
        loss_sum = 0.0
        micros = as_many_everywhere(micro_batches(lengths, cfg.micro_tokens), [])
        for k, micro in enumerate(micros, 1):
            # gradients are summed over the ranks once, after the last micro-batch, where a rank can
            # hold them whole till then
            policy.set_requires_gradient_sync(
                k == len(micros) or world == 1 or cfg.sampler == "sharded")
            rows = [first + i for i in micro]
            ids, predicts = pack([rollouts[i].problem["prompt"] for i in rows],
                                 [rollouts[i].ids for i in rows], weights.device)
            logp, entropy = policy(ids, predicts, cfg.temperature)                   # (n, T')
            at = (rows, slice(logp.shape[1]))
            if rows and not s_is_known:
                batch.s[at], batch.entropy_s[at] = logp.detach(), entropy
            u = batch.t[at] - batch.s[at]                                            # Eq. (4)
            advantages = token_advantages(batch.seq_advantages[rows], u, lam, cfg.method,
                                          cfg.compose)                               # Eq. (2), (6)
            # an idle rank has no rows: a loss of 0, whose backward takes part in the reduction
            loss = policy_loss(logp, batch.s[at], advantages, weights[at], num_tokens or 1.0,
                               cfg.clip)
            (loss * world).backward()                    # FSDP averages over ranks; this undoes it
            loss_sum += loss.item()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm).full_tensor().item()
        losses.append(sum(gather(loss_sum)))
        norms.append(norm)
        if math.isfinite(losses[-1]) and math.isfinite(norm) and num_tokens:
            optimizer.step()
        optimizer.zero_grad()
    loss, norm = statistics.mean(losses), statistics.mean(norms)
    return loss, norm, math.isfinite(loss) and math.isfinite(norm)


def summary(batch, cfg):
    """The step's metrics over all ranks: sums and counts are gathered, then divided once."""
    facts = [(r.reward, len(r.ids), r.truncated) for r in batch.rollouts]
    rewards, lengths, truncated = zip(*sum(gather(facts), []))
    whole = [len(r.problem["prompt"]) + len(r.ids) for r in batch.rollouts]
    micros = micro_batches(whole, cfg.micro_tokens)
    padded = sum(gather(sum(len(rows) * whole[rows[0]] for rows in micros)))
    drawn = torch.zeros_like(batch.s)
    for i, r in enumerate(batch.rollouts):
        drawn[i, :len(r.logp)] = torch.tensor(r.logp)
    complete = [reward for reward, cut in zip(rewards, truncated) if not cut]
    groups = [rewards[i:i + cfg.group_size] for i in range(0, len(rewards), cfg.group_size)]
    mask, u = batch.mask, batch.t - batch.s
    row = {"reward": statistics.fmean(rewards),
           "reward_complete": statistics.fmean(complete) if complete else None,
           "length": statistics.fmean(lengths), "truncated": statistics.fmean(truncated),
           "padding": 1 - sum(gather(sum(whole))) / padded,
           "rollout_gap": global_mean((drawn - batch.s).abs(), batch.mask),
           "zero_std_groups": statistics.fmean(len(set(group)) == 1 for group in groups),
           "seq_adv_abs": global_mean(batch.seq_advantages.abs()[:, None].expand_as(mask), mask),
           "student_entropy": global_mean(batch.entropy_s, mask),
           "student_entropy_median": global_median(batch.entropy_s, mask)}
    of_teacher = {"u_mean": global_mean(u, mask), "u_negative": global_mean((u < 0).float(), mask),
                  "phi_abs": global_mean(METHODS[cfg.method](u).abs(), mask),
                  "teacher_entropy": global_mean(batch.entropy_t, mask),
                  "teacher_entropy_median": global_median(batch.entropy_t, mask)}
    row |= of_teacher if batch.sources else dict.fromkeys(of_teacher)
    sources = sum(gather(batch.sources), [])
    return row | {f"context/{name}": sources.count(name) / len(rewards)
                  for name in ("sibling", "solution", "answer")}


def train(cfg):
    """Runs Algorithm 1 for cfg.steps steps; everything it makes lies in cfg.output."""
    rank, world, device = setup()
    say = tqdm.write if rank == 0 else lambda text: None
    tokenizer, problems, held_out, longest = prepare(cfg, world)
    run = on_rank_0(open_run, cfg)
    policy, optimizer, source_dtype = build(cfg, tokenizer, device)
    say_memory(cfg, policy, world, device, say)
    gate = EntropyGate(cfg.warmup_steps, cfg.tau_down)
    statistic = {"mean": global_mean, "median": global_median}[cfg.gate_stat]
    now = {"step": 0, "position": 0, "skipped_updates": 0, "failures": 0,
           "gate": gate.state_dict()}
    now = restore(cfg, run, policy, optimizer, now)
    gate.load_state_dict(now["gate"])
    log = Log(cfg, run, now["step"], rank)
    interrupt, finished = Interrupt(), False
    share = cfg.problems_per_step // world               # of the step's problems, for this rank

    while not interrupt.asked():
        step, seconds = now["step"], {}
        row = {"step": step}
        finished = step >= cfg.steps
        if held_out and (step == 0 or finished or cfg.eval_every and step % cfg.eval_every == 0):
            with phase("eval", seconds):
                row |= evaluate(policy, tokenizer, held_out, cfg)
            say("step {step}: held-out accuracy {eval_accuracy:.3f} +- {eval_error:.3f} (standard "
                "error over {eval_problems} problems)".format(**row))
        if finished:
            break

        # line 1: y ~ pi_S(.|x) and R(x, y). Seeding right here makes a resumed run draw the same;
        # tuples of integers hash alike in every process
        started = time.perf_counter()
        mine = next_problems(problems, now["position"], cfg.problems_per_step, cfg.seed)
        mine = mine[rank * share:(rank + 1) * share]
        torch.manual_seed(hash((cfg.seed, step, rank)))
        with phase("rollout", seconds):
            rollouts = roll_out(policy, tokenizer, mine, cfg.group_size, max_tokens=cfg.max_tokens,
                                temperature=cfg.temperature, rollout_batch=cfg.rollout_batch,
                                sampler=cfg.sampler)
        prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
        rewards = torch.tensor([r.reward for r in rollouts], device=device)          # (N,)
        lengths = torch.tensor([len(ids) for ids in responses], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]    # (N, T)
        batch = Batch(rollouts, [], mask, group_advantages(rewards, cfg.group_size),
                      *(torch.zeros(mask.shape, device=device) for _ in range(4)))
        if interrupt.asked():
            break

        # lines 3, 6: log pi_T(y_t) and the entropies of pi_T: the same weights, c in the prompt
        with phase("score", seconds):
            if cfg.method != "grpo":
                views, batch.sources = teacher_prompts(tokenizer, rollouts, cfg, longest,
                                                       now["position"] + rank * share)
                batch.t, batch.entropy_t = score(policy, views, responses, cfg.micro_tokens,
                                                 cfg.temperature)
            if cfg.method == "no_teacher":
                batch.t = torch.zeros_like(batch.t)      # log pi_T := 0, so u = -s
            # line 2 usually waits for the training forward, whose log-probs are s; not here:
            s_is_known = (cfg.updates_per_batch > 1
                          or cfg.method in GATED and cfg.gate_source == "student")
            if s_is_known:
                batch.s, batch.entropy_s = score(policy, prompts, responses, cfg.micro_tokens,
                                                 cfg.temperature)
        if interrupt.asked():
            break

        # line 7: one gate for all ranks, on every token of all of them
        lam = 0.0 if cfg.method == "grpo" else cfg.lam
        if cfg.method in GATED:
            entropy = batch.entropy_t if cfg.gate_source == "teacher" else batch.entropy_s
            entropy = statistic(entropy, mask)
            calibrated = gate.h_warm is not None
            lam = cfg.lam * gate.update(entropy) if math.isfinite(entropy) else 0.0  # Eq. (7)
            if not calibrated and gate.h_warm is not None and gate.h_warm < 0.01:
                say(f"H_warm is {gate.h_warm:.4f} nats a token: the gate will react to noise")

        # lines 2, 4, 5, 8, 9: s, u, phi, A and the update
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_lr_steps))
            group["weight_decay"] = cfg.weight_decay     # --init_from brings the old run's
        with phase("train", seconds):
            loss, norm, finite = update(policy, optimizer, batch, lam, cfg, s_is_known)
        now["failures"] = failures = 0 if finite else now["failures"] + 1
        now |= {"step": step + 1, "position": now["position"] + cfg.problems_per_step,
                "gate": gate.state_dict(), "skipped_updates": now["skipped_updates"] + (not finite)}

        row |= summary(batch, cfg) | {
            "gate": gate.g, "h_warm": gate.h_warm, "lam": lam, "loss": loss, "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"], "skipped_updates": now["skipped_updates"],
            "grader/timeouts": sum(gather(grader_timeouts()))}
        # three in a row may mean that the state is spoilt: it is saved, but evicts no good one
        if failures >= 3 or not failures and cfg.save_every and now["step"] % cfg.save_every == 0:
            with phase("save", seconds):
                save_checkpoint(run, policy, optimizer, now, cfg.keep + (failures >= 3))
        row |= {"tokens_per_s": row["length"] * cfg.group_size * cfg.problems_per_step
                / (time.perf_counter() - started), "peak_memory_gib": peak_memory_gib(),
                **{f"seconds/{name}": seconds.get(name, 0.0)
                   for name in ("rollout", "score", "train", "save", "eval")}}
        log.step(row, batch, tokenizer)
        if failures >= 3:
            ids = sorted(sum(gather([p["id"] for p in mine]), []))
            good = [p.name for p in checkpoints(run) if p.name <= f"step-{step - 2:06d}"]
            raise InputError(f"three updates in a row were not finite, up to step {step} (problems "
                             f"{ids}); state saved in {run}, last good checkpoint: "
                             f"{good[-1] if good else 'none'}")

    log.close()
    saved = True
    # a stop always saves; so does the end, where the last step did not
    if not finished or cfg.save_every and (now["step"] % cfg.save_every or now["failures"]):
        saved = save_checkpoint(run, policy, optimizer, now, cfg.keep)
    if not finished:
        say(f"stopped before step {now['step']}; the same command with --resume continues"
            + (" from the last checkpoint" if not saved else ""))
        return
    export_model(run / "model", policy, tokenizer, source_dtype)
    say(f"{run / 'model'} holds the trained model")
    if held_out and rank == 0:
        log.append("metrics.jsonl", row)                 # the learning curve's last point


def main(run):
    """The command line: one line and exit code 2 for what the user can mend."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        run()
        if dist.is_initialized():                        # after an error it might wait for others
            dist.destroy_process_group()
    except InputError as error:                          # every rank has it: one prints it
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(lambda: train(parse_config()))
