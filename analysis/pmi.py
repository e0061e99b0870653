"""One page that shows what changes once the solution is known: the paper's Figure 2 on your model.

    python analysis/pmi.py --model toy/model --data toy/test.jsonl --output pmi.html

A model answers problems, and every token of its own responses is scored twice, as in training: as
the student, and as the teacher that has also read a solution c. The page colours each token by
u = log pi_T - log pi_S, Eq. (4), in nats. Look at it before you train: where the words of search
are not blue and the shortcuts not red, the teacher does not read c as AntiSD supposes, and the
chat template or the data are the first suspects. Prompts, choice of c, sampler and scorer are
antisd.py's own. One process; the page is one file that fetches nothing.

    python analysis/pmi.py --model M --data D --contexts own,other,answer        # the preflight

Whether u is about *this* solution, another one tells. The same responses are scored under three c:
own, as in training; other, the solutions that two other problems are shown; answer, the bare
answer. Printed are a table by kind of token and, last, `the teacher reads c: yes (...)` or `the
teacher reads c: no (...)`, by an effect size:

    w_t   = 1 - pi_S(y_t), half the L1 norm of the gradient of log pi_S(y_t) by the logits: a token
            that the student is sure of moves nothing, however many nats of u lie on it
    own_t = (|u_own - u_other1| + |u_own - u_other2|) / 2 - |u_other1 - u_other2|: what the own
            solution changes beyond what exchanging one foreign solution for another changes
    share = sum of w_t own_t / sum of w_t |u_own|: yes from READS = 20% on

Where the teacher does not tell solutions apart, its three u are exchangeable and the share is 0;
where only the own solution does anything, it is 1. CALIBRATED says what it was on which models. A
no means that AntiSD, or self-distillation, would follow the style of having a solution, or noise.
"""
import dataclasses
import json
import math
import os
import random
import re
import statistics
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# before torch, because antisd.py sets what torch's threads read when it is loaded
from antisd import (InputError, add_prompts, extract_boxed, flag, load_policy, load_problems,
                    load_tokenizer, one_line, parse_config, phi, pick_solutions, render, roll_out,
                    score, setup, teacher_messages, teacher_prompts, template_variables,
                    write_whole)

import torch
import transformers
from tqdm import tqdm

CAP_U = math.log(2**0.05 - 1)    # below this u, -phi(u) is above 95% of its bound log(2) / 2
BINS, FLOOR = 32, -4.0           # of the map: boxes on each axis, from 10^-4 or less to 1
CONTEXTS = ("own", "other", "answer")
READS = 0.2                      # from this share of own-specific u on the teacher reads c
CALIBRATED = ("random weights -2 to -1% (4 draws); a toy base that hurries with any solution in "
              "view 0%; SmolLM2-135M-Instruct on GSM8K 7% +- 3%; the toy's base, which was taught "
              "to compare the solution with the problem, 84 to 99% (3 seeds)")
KINDS = ("digits", "operators, LaTeX", "words of deliberation", "other words",
         "punctuation, spaces", "end of sequence")
# a character's kind; whatever matches nothing is punctuation
CHARACTERS = re.compile(r"(\d)|(\\[A-Za-z]+|\\.|[-+*/=<>^_{}|%$~\u00b1\u00d7\u00f7\u221a\u2264"
                        r"\u2265\u2260\u2248\u2212])|([^\W\d_]+(?:['\u2019][^\W\d_]+)?)")
DELIBERATION = re.compile(
    "wait|hm+|but|maybe|perhaps|however|alternatively|actually|instead|or|if|let|let's|lets|try|"
    "check|recheck|verify|suppose|assume|consider|think|could|might|unless|otherwise|again|another",
    re.IGNORECASE)


@dataclasses.dataclass
class View:
    model: str = flag("", "Hugging Face folder or hub id of a chat model (required)")
    data: str = flag("", "problems: .jsonl, .json or .parquet file, or hub id, also as "
                     "id:config:split (required)")
    limit: int = flag(16, "only the first so many problems")
    samples: int = flag(4, "responses to each problem, a group; its members are each other's c")
    max_tokens: int = flag(0, "longest response; 0: the paper's 32768, or half of what the "
                           "model's context leaves, so that a response fits into c, too")
    temperature: float = flag(1.0, "of responses and scores, as in training")
    seed: int = flag(0, "of responses and of the choice of solutions")
    chat_template_kwargs: str = flag("{}", "JSON for the chat template, as in training")
    rollout_batch: int = flag(64, "responses decoded at once")
    micro_tokens: int = flag(16384, "tokens of one scoring micro-batch")
    contexts: str = flag("own", "what the teacher is shown, of own,other,answer: this problem's "
                         "solution, as in training; another problem's; the bare answer")
    output: str = flag("pmi.html", "the page")

    def __post_init__(self):
        self.template_kwargs = template_variables(self.chat_template_kwargs)
        self.shown = [name.strip() for name in self.contexts.split(",")]
        if "own" not in self.shown or not {*self.shown} <= {*CONTEXTS}:
            raise InputError(f"--contexts {self.contexts}: own, and any of other and answer")
        for name in ("limit", "samples", "temperature", "rollout_batch", "micro_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.max_tokens < 0 or not self.model or not self.data:
            raise InputError("--max_tokens must be at least 0" if self.max_tokens < 0 else
                             "--model and --data are required")


def load_prompts(cfg, tokenizer, context):
    """The problems with their student's "prompt" ids, and the longest response, in tokens."""
    problems = load_problems(cfg.data, limit=cfg.limit)
    add_prompts(problems, cfg.data, tokenizer, cfg.template_kwargs)
    longest = max(len(render(tokenizer, teacher_messages(p["problem"], "...", False),
                             cfg.template_kwargs)) for p in problems)    # without a solution
    max_tokens = cfg.max_tokens or max(1, min(32768, (context - longest) // 2))
    if longest + max_tokens > context:
        raise InputError(f"{cfg.data}: a prompt takes {longest} tokens; with {max_tokens} for the "
                         f"response it does not fit the model's context of {context}")
    return problems, max_tokens


def pieces(tokenizer, ids):
    """Each token's share of the decoded text. Decoded in its neighbourhood: alone, a token loses
    its leading space in some vocabularies, and half a character has no text at all."""
    out = []
    for i in range(len(ids)):
        before, after = tokenizer.decode(ids[max(0, i - 6):i]), tokenizer.decode(
            ids[max(0, i - 6):i + 1])
        out.append(after[len(os.path.commonprefix([before, after])):])
    return out


def heat_map(s, t):
    """[[x, y, number of tokens], ...] by box of (log pi_S, log pi_T), both on a log axis; (M,)."""
    place = [((x / math.log(10)).clamp(FLOOR, 0) - FLOOR) / -FLOOR * (BINS - 1e-3) for x in (s, t)]
    boxes, counts = torch.stack(place, 1).long().unique(dim=0, return_counts=True)   # (C, 2), (C,)
    return [[*box, n] for box, n in zip(boxes.tolist(), counts.tolist())]


def extreme_words(tokens, u, most=14):
    """Token texts by their mean u: the lowest, the highest, each [text, mean u, count], and how
    often a token must occur to be among them."""
    found = {}
    for text, value in zip(tokens, u):
        found.setdefault(text, []).append(value)
    least = max(2, len(u) // 5000)                       # a token seen once has no mean
    words = sorted(([text, statistics.fmean(v), len(v)] for text, v in found.items()
                    if text.strip() and len(v) >= least), key=lambda word: word[1])
    low = [word for word in words if word[1] < -0.005][:most]    # what prints as 0.00 is neither
    return low, [word for word in reversed(words) if word[1] > 0.005][:most], least


def page_data(rollouts, tokens, values, sources, views, heading):
    """What the page shows, as plain data. tokens: per response its T texts; values: per response
    (T, 6) of pi_S, pi_T, u, -phi(u), H_S, H_T; sources, views: what c was, the teacher's prompt."""
    every = torch.cat(values)                                                        # (M, 6)
    u = every[:, 2]
    low, high, least = extreme_words([text for part in tokens for text in part], u.tolist())
    return {
        "heading": heading, "low": low, "high": high, "least": least,
        "map": heat_map(*every[:, :2].log().T), "bins": BINS, "floor": FLOOR,
        "facts": [[f"{len(u):,}", "tokens"], [f"{(u < 0).float().mean():.1%}", "have u < 0"],
                  [f"{(u <= CAP_U).float().mean():.1%}", f"at the cap, u < {CAP_U:.1f}"],
                  [f"{u.mean():+.3f}", "mean u, nats"],
                  [f"{every[:, 4].mean():.3f}", "student's entropy, nats"],
                  [f"{every[:, 5].mean():.3f}", "teacher's entropy, nats"],
                  [f"{statistics.fmean(r.reward for r in rollouts):.0%}",
                   f"of {len(rollouts)} responses correct"]],
        "responses": [{
            "title": f"Problem {r.problem['id']}, {'correct' if r.reward else 'wrong'}",
            "note": f"{len(part)} tokens{', truncated' * r.truncated}, mean u "
                    f"{rows[:, 2].mean():+.3f}, c: {source}",
            "view": view, "tokens": part, "u": [round(row[2], 4) for row in rows.tolist()],
            "card": ["{:.3g} {:.3g} {:+.2f} {:+.3f} {:.2f} {:.2f}".format(*row)
                     for row in rows.tolist()],
        } for r, part, rows, source, view in zip(rollouts, tokens, values, sources, views)]}


def page(data):
    """The template with the data in it. Its script only ever sets text, so nothing that a model
    wrote can become markup; and without a "<" the data cannot end the element they stand in."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"), 1)


def foreign_solutions(rollouts, group_size, seed):
    """Two other problems' solutions for each response: two lists of N texts.

    A problem's candidates are what the problems after it, in the data's order and round its end,
    are shown in training. Those of its own kind (sibling, solution or answer) come first, so that
    own and other differ in content, not in style. Where too few problems are left, their bare
    answers follow. A text that the problem's own group is shown is not foreign.
    """
    groups = [rollouts[i:i + group_size] for i in range(0, len(rollouts), group_size)]
    picks = [pick_solutions(group, random.Random(hash((seed, i))))        # as teacher_prompts does
             for i, group in enumerate(groups)]
    bare = [pick_solutions([with_solution(group[0], None)], random.Random(0)) for group in groups]
    found = []
    for i, group in enumerate(groups):
        after = [*range(i + 1, len(groups)), *range(i)]
        after.sort(key=lambda j: picks[j][0][1] != picks[i][0][1])       # stable
        own = {text for text, _ in picks[i]}
        texts = [part[j][0][0] for part in (picks, bare) for j in after]
        texts = [text for text in dict.fromkeys(texts) if text not in own][:2]
        if len(texts) < 2:
            raise InputError("--contexts other needs other problems: raise --limit, or use a "
                             "larger --data")
        found += [texts] * len(group)
    return [*zip(*found)]


def with_solution(rollout, text):
    """The same response to a problem whose only known solution is `text`; None: its answer."""
    return dataclasses.replace(rollout, problem=rollout.problem | {"solution": text})


def token_kinds(tokenizer, ids, texts):
    """The kind of each token, an index into KINDS: that of its first character that is no space. A
    word that is several tokens is looked up whole. texts: `pieces` of the ids."""
    marks = []                                           # a kind for each character
    text = "".join(texts)
    for m in CHARACTERS.finditer(text):
        marks += [4] * (m.start() - len(marks))
        kind = m.lastindex - 1 if m.lastindex < 3 else 3 - bool(DELIBERATION.fullmatch(m[0]))
        marks += [kind] * len(m[0])
    marks += [4] * (len(text) - len(marks))
    kinds, start = [], 0
    for i, part in zip(ids, texts):
        first = start + len(part) - len(part.lstrip())
        start += len(part)
        kinds.append(5 if i in tokenizer.all_special_ids else marks[first] if first < start else 4)
    return kinds


def ratio(above, below):
    """sum(above) / sum(below) and its standard error over the responses: two (N,) -> two floats.
    Tokens of a response are no independent draws, so a response is the unit."""
    total = below.sum().item()
    value = above.sum().item() / total if total else 0.0
    n, off = max(2, int((below != 0).sum())), above - value * below
    return value, (n / (n - 1) * off.square().sum().item()) ** 0.5 / total if total else 0.0


def overlap(u, v):
    """How much of u is there in v, too: the smaller of both where their signs agree, else 0."""
    return torch.minimum(u.abs(), v.abs()) * (u * v > 0)


def compare(s, u, mask, kinds):
    """What the contexts do to each kind of token, and whether the teacher reads c.

    s, mask, kinds (N, T): log pi_S, where tokens are, indices into KINDS. u: {"own": [(N, T)],
    "other": [two of them], "answer": [(N, T)]}, the last two where they are asked for. Returns rows
    for the table, and (share, error) of u that is the own solution's, or None without others.
    """
    weight, own, rows = -torch.expm1(s) * mask, u["own"][0], []      # 1 - pi_S(y_t)
    for name, part in [*((name, (kinds == k) & mask) for k, name in enumerate(KINDS)),
                       ("all", mask), ("all, by weight", weight)]:
        part = part.double()
        for c, values in u.items() if part.sum() else ():
            def mean(function, size=None):
                above = torch.stack([function(v) * part for v in values]).mean(0).sum(1)
                return ratio(above, part.sum(1) if size is None else (size * part).sum(1))
            rows.append({"kind": name, "c": c, "tokens": int((part != 0).sum()),
                         "weight": (weight * (part != 0)).sum().item() / weight.sum().item(),
                         "u": mean(lambda v: v), "below": mean(lambda v: (v < 0).double()),
                         "size": mean(torch.abs),
                         "shared": mean(lambda v: overlap(own, v), own.abs())})
    if "other" not in u:
        return rows, None
    one, two = u["other"]
    specific = ((own - one).abs() + (own - two).abs()) / 2 - (one - two).abs()
    return rows, ratio((weight * specific).double().sum(1), (weight * own.abs()).double().sum(1))


def verdict(share, error):
    close = "; too few responses to be sure" * (abs(share - READS) < 2 * error)
    return (f"the teacher reads c: {'yes' if share >= READS else 'no'} ({round(100 * share)}% +- "
            f"{error:.0%} of u is this solution's own; yes from {READS:.0%} on{close})")


def table(rows):
    """What `compare` found, as text: a head and a line for each kind of token and context."""
    return [["kind of token", "tokens", "weight", "c", "mean u", "u < 0", "mean |u|",
             "own u there"]] + [
        [r["kind"], f"{r['tokens']:,}", f"{r['weight']:.0%}", r["c"],
         "{:+.3f} +- {:.3f}".format(*r["u"]), "{:.0%} +- {:.0%}".format(*r["below"]),
         "{:.3f} +- {:.3f}".format(*r["size"]),
         "" if r["c"] == "own" else "{:.0%} +- {:.0%}".format(*r["shared"])] for r in rows]


def check_output(output):
    """Whether the page can be written there is known before the hours, not after them."""
    with one_line(f"cannot write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a folder")
        trial = output.with_name(output.name + ".trial")
        trial.write_text("")
        trial.unlink()


def teacher_views(cfg, tokenizer, rollouts, longest):
    """{context: lists of N prompts} for the contexts besides own. The shown solution stands in the
    problem's place for one; a group of one response has no siblings that would replace it."""
    texts = {}
    if "other" in cfg.shown:
        texts["other"] = foreign_solutions(rollouts, cfg.samples, cfg.seed)
    if "answer" in cfg.shown:
        texts["answer"] = [[None] * len(rollouts)]
    return {name: [teacher_prompts(tokenizer, list(map(with_solution, rollouts, column)), 1,
                                   cfg.template_kwargs, longest, cfg.seed)[0] for column in columns]
            for name, columns in texts.items()}


def preflight(tokenizer, rollouts, tokens, s, u):
    """The table and the verdict, as text; s, u: see `compare`."""
    width = s.shape[1]
    kinds = torch.tensor([token_kinds(tokenizer, r.ids, part) + [-1] * (width - len(part))
                          for r, part in zip(rollouts, tokens)])                     # (N, T)
    rows, share = compare(s, u, kinds >= 0, kinds)
    boxes = statistics.fmean(extract_boxed(r.text) is not None for r in rollouts)
    return {"table": table(rows), "verdict": verdict(*share) if share else "",
            "boxes": f"{boxes:.0%} of the responses hold a box",
            "rule": f"Yes from {READS:.0%} on. Found so far: {CALIBRATED}."}


def print_preflight(facts):
    print(facts["boxes"] + "\n")
    widths = [max(map(len, column)) for column in zip(*facts["table"])]
    for line in facts["table"]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if facts["verdict"]:
        print("\n" + facts["verdict"])


def view(cfg):
    """Samples responses, scores them under every prompt as train() does, writes the page."""
    output = Path(cfg.output)
    check_output(output)
    rank, world, device = setup()
    if world > 1:
        raise InputError("pmi.py runs on one process: start it without torchrun")
    tokenizer, context, _ = load_tokenizer(cfg.model, cfg.template_kwargs)
    problems, max_tokens = load_prompts(cfg, tokenizer, context)
    longest = context - max_tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_policy(cfg.model, dtype, tokenizer).to(device)
    torch.manual_seed(cfg.seed)
    # the model runs once for each token of a batch of responses, at most so often:
    steps = max_tokens * -(-len(problems) // max(1, cfg.rollout_batch // cfg.samples))
    with progress(policy.model, "decoding", steps, lambda inputs: 1):
        rollouts = roll_out(policy, tokenizer, problems, cfg.samples, max_tokens=max_tokens,
                            temperature=cfg.temperature, rollout_batch=cfg.rollout_batch)
    views, sources = teacher_prompts(tokenizer, rollouts, cfg.samples, cfg.template_kwargs,
                                     longest, cfg.seed)
    others = teacher_views(cfg, tokenizer, rollouts, longest)
    prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
    passes = 2 + sum(map(len, others.values()))
    with progress(policy, "scoring", passes * len(rollouts), lambda inputs: len(inputs[0])):
        def scores(prompts):
            both = score(policy, prompts, responses, cfg.micro_tokens, cfg.temperature)
            return [values.cpu() for values in both]                                 # (N, T) each
        s, H_S = scores(prompts)
        t, H_T = scores(views)
        u = {"own": [t - s]} | {name: [scores(lists)[0] - s for lists in columns]    # Eq. (4)
                                for name, columns in others.items()}
    own = u["own"][0]
    values = torch.stack([s.exp(), t.exp(), own, -phi(own), H_S, H_T], 2)            # (N, T, 6)
    tokens = [pieces(tokenizer, ids) for ids in responses]
    data = page_data(
        rollouts, tokens, [rows[:len(ids)] for rows, ids in zip(values, responses)], sources,
        [tokenizer.decode(ids) for ids in views],
        f"{cfg.model} on {cfg.data}: {len(problems)} problems x {cfg.samples} responses, "
        f"temperature {cfg.temperature:g}, at most {max_tokens} tokens, seed {cfg.seed}")
    if others:
        data["contexts"] = preflight(tokenizer, rollouts, tokens, s, u)
    with one_line(f"cannot write {output}"):
        write_whole(output, page(data))
    print(f"{output}: {len(rollouts)} responses, {sum(map(len, responses))} tokens")
    if others:
        print_preflight(data["contexts"])
    return data


@contextmanager
def progress(module, what, total, count):
    """A bar that each forward pass of the module moves by `count` of the pass's arguments."""
    with tqdm(total=total, desc=what, dynamic_ncols=True) as bar:
        def moved(module, inputs, output):
            bar.update(count(inputs))
        hook = module.register_forward_hook(moved)
        try:
            yield
        finally:
            hook.remove()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)       # names that transformers 6 will drop
    try:
        view(parse_config(kind=View))
    except InputError as error:
        print(f"pmi.py: error: {error}", file=sys.stderr)
        sys.exit(2)
