"""One page that shows what changes once the solution is known: the paper's Figure 2 on your model.

    python analysis/pmi.py --model toy/model --data toy/test.jsonl --output pmi.html

A model answers problems, and every token of its own responses is scored twice, as in training: as
the student, and as the teacher that has also read a solution c. The page colours each token by
u = log pi_T - log pi_S, Eq. (4), in nats. Look at it before you train: where the words of search
are not blue and the shortcuts not red, the teacher does not read c as AntiSD supposes, and the
chat template or the data are the first suspects. Prompts, choice of c, sampler and scorer are
antisd.py's own. One process; the page is one file that fetches nothing.
"""
import dataclasses
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from antisd import (InputError, flag, load_policy, load_problems, load_tokenizer, one_line,
                    parse_config, phi, render, roll_out, score, setup, student_messages,
                    teacher_messages, teacher_prompts, template_variables, write_whole)

CAP_U = math.log(2**0.05 - 1)    # below this u, -phi(u) is above 95% of its bound log(2) / 2
BINS, FLOOR = 32, -4.0           # of the map: boxes on each axis, from 10^-4 or less to 1


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
    output: str = flag("pmi.html", "the page")

    def __post_init__(self):
        self.template_kwargs = template_variables(self.chat_template_kwargs)
        for name in ("limit", "samples", "temperature", "rollout_batch", "micro_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.max_tokens < 0 or not self.model or not self.data:
            raise InputError("--max_tokens must be at least 0" if self.max_tokens < 0 else
                             "--model and --data are required")


def load_prompts(cfg, tokenizer, context):
    """The problems with their student's "prompt" ids, and the longest response, in tokens."""
    problems = load_problems(cfg.data, limit=cfg.limit)
    longest = 0                          # of both prompts, without a solution
    for p in problems:
        with one_line(f"{cfg.data}: the problem of row {p['id'] + 1} cannot be rendered"):
            p["prompt"] = render(tokenizer, student_messages(p["problem"]), cfg.template_kwargs)
            teacher = teacher_messages(p["problem"], "...", False)
            longest = max(longest, len(render(tokenizer, teacher, cfg.template_kwargs)))
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


def view(cfg):
    """Samples responses, scores them under both prompts as train() does, writes the page."""
    rank, world, device = setup()
    if world > 1:
        raise InputError("pmi.py runs on one process: start it without torchrun")
    tokenizer, context, _ = load_tokenizer(cfg.model, cfg.template_kwargs)
    problems, max_tokens = load_prompts(cfg, tokenizer, context)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_policy(cfg.model, dtype, tokenizer).to(device)
    torch.manual_seed(cfg.seed)
    rollouts = roll_out(policy, tokenizer, problems, cfg.samples, max_tokens=max_tokens,
                        temperature=cfg.temperature, rollout_batch=cfg.rollout_batch)
    views, sources = teacher_prompts(tokenizer, rollouts, cfg.samples, cfg.template_kwargs,
                                     context - max_tokens, cfg.seed)
    prompts, responses = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
    s, H_S = score(policy, prompts, responses, cfg.micro_tokens, cfg.temperature)    # (N, T) each
    t, H_T = score(policy, views, responses, cfg.micro_tokens, cfg.temperature)
    u = t - s                                                                        # Eq. (4)
    values = torch.stack([s.exp(), t.exp(), u, -phi(u), H_S, H_T], 2).cpu()          # (N, T, 6)
    data = page_data(
        rollouts, [pieces(tokenizer, ids) for ids in responses],
        [rows[:len(ids)] for rows, ids in zip(values, responses)], sources,
        [tokenizer.decode(ids) for ids in views],
        f"{cfg.model} on {cfg.data}: {len(problems)} problems x {cfg.samples} responses, "
        f"temperature {cfg.temperature:g}, at most {max_tokens} tokens, seed {cfg.seed}")
    output = Path(cfg.output)
    with one_line(f"cannot write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page(data))
    print(f"{output}: {len(rollouts)} responses, {sum(map(len, responses))} tokens")
    return data


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        view(parse_config(kind=View))
    except InputError as error:
        print(f"pmi.py: error: {error}", file=sys.stderr)
        sys.exit(2)
