"""Builds the embedded toy: model/, train.jsonl and test.jsonl, from a seed, in some minutes.

    python toy/make_toy.py                             # overwrites the files beside this script
    python toy/make_toy.py --check                     # only checks the model that lies there
    python toy/make_toy.py --go_on 0.4 --init toy --output runs/base_40    # re-tunes, in a minute

**The task.** `Sum modulo 5 of C4 A3 E1 ... B2.` names nine terms in a shuffled order. A response
adds them from A on, and may after any of them say "so" and box what it has, which is right by luck
once in five:

    start A3 wait B2 makes 0 hmm C4 makes 4 so the answer is \\boxed{4}

The order is shuffled so that a term has to be looked up by its letter. By its place would do as
well where the problem always stands in the same spot, but a teacher reads solutions of every length
in between, and then cannot find its way back. A term is one token, so that to compare a solution
with the problem is to ask of each term whether it stood there before. With letter and number as two
tokens a small network did not find that out within 800 steps.

**The base** has every sub-skill at every depth and stops too early: after each term it goes on with
probability --go_on. With a verified solution *of this problem* in view (the self-teacher) it goes
on with --go_on_told and boxes that solution's answer. Where c says nothing about this problem, the
teacher does as the student does: it goes on with --go_on and boxes its own sum. That is so under
another problem's solution and under the teacher's headings with nothing below them. A foreign
solution whose few terms fit by luck counts as the problem's own, and so does the bare answer: only
what can be seen is taught.

All of this is taught as it stands. Every trace is *forced* to a random depth, and where the trace
chooses (to go on, or to say "so") the loss is the cross entropy against the intended probabilities,
whatever this trace does there. Free traces would hardly ever get deep: they would neither teach the
later terms, nor would a check that reads them see that. The first steps show whole chains of the
student alone, short prompts with many sums: with the teacher's prompts mixed in from the start,
addition modulo 5 was not found within 2,500 steps. A linear probe that is thrown away afterwards
asks the last layer's input, at each term of a solution, whether it fits; that is how the network
comes to compare. The last steps, at a tenth of the learning rates, set the probabilities; --init
takes the skills of another base and does these alone.

**The check** forces chains as well, some with slips, and reads the probability of every token that
follows from what stands before it. It ends with exit code 1 when a kind of token is below 99.9%
right at any depth, for the student or for the teacher under any kind of solution, own, foreign
or empty, or when P(go on) is off by more than 0.02.

**What is authored.** All of it. In particular *we wrote that a solution of this problem in view
makes the teacher eager to stop*. It is modelled on what the paper reports of large models and did
not emerge here. What the toy can show is what each training signal does with such a teacher.
LAB.md has the rest.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from antisd import render, student_messages, teacher_messages  # noqa: E402

LETTERS = "ABCDEFGHI"       # one a term; LAST decisions to go on stand between a start and the end
LAST = len(LETTERS) - 1
MODULUS = 5
WORDS = ("wait", "hmm", "but", "maybe")     # in turn: the word follows from the depth, so all that
                                            # is undecided is whether to go on
TRAIN, TEST = 1500, 320     # problems; no test problem is trained on

TOLD = 0.6                  # the share of warm-up traces of the teacher, c being of these kinds:
SOLUTIONS = {"empty": 0.10, "bare": 0.10, "full": 0.20, "lucky": 0.25, "short": 0.35}
CHAINS = ("full", "lucky", "short")         # the kinds that name terms
FOREIGN = 0.4               # P(a chain is another problem's solution)
SLIP = 0.05                 # the share of sums that are forced wrong: what follows is then computed
                            # from the sum that stands there, by student and teacher alike

WIDTH, LAYERS, BATCH = 128, 2, 32
STEPS, DRILL = 2400, 450   # of the skills; the first on whole chains of the student alone
GO_ON, GO_ON_TOLD = 0.27, 0.09           # while the skills are learned
STEPS_TUNE, RATE_TUNE = 200, 0.1        # then --go_on is set, at a tenth of the learning rates
FIT_WEIGHT, FIT_UNTIL = 1.0, 0.8        # of the probe's loss, and for what share of the steps
WEIGHTS = {"sum": 5, "boxed digit": 5, "go on": 3}  # in the loss; other kinds of token count 1


# --- Problems and traces --------------------------------------------------------------------------


def make_problem(rng):
    """A problem's text, terms in the order of the letters, answer and worked solution."""
    terms = [rng.randrange(MODULUS) for _ in LETTERS]
    listed = [f"{letter}{term}" for letter, term in zip(LETTERS, terms)]
    rng.shuffle(listed)
    q = {"problem": f"Sum modulo {MODULUS} of {' '.join(listed)}.", "terms": terms,
         "answer": str(sum(terms) % MODULUS)}
    return q | {"solution": text(trace(q, LAST))}


def trace(q, stop, box=None, slip=0.0, rng=None):
    """Adds terms 0 to `stop` and boxes the sum, or `box` where that is given.

    Returns [(token, kind, depth)]. slip: P(a sum is wrong). kind: one of KINDS, or "slip"; "go on"
    is either side of that choice, so also the "so" of a trace that stops early. depth: how many
    terms were added before."""
    total = q["terms"][0]
    terms = [f"{letter}{term}" for letter, term in zip(LETTERS, q["terms"])]
    tokens = [("start", "fixed word", 0), (terms[0], "term", 0)]
    for k in range(1, stop + 1):
        total, kind = (total + q["terms"][k]) % MODULUS, "sum"
        if slip and rng.random() < slip:
            total, kind = (total + rng.randrange(1, MODULUS)) % MODULUS, "slip"
        tokens += [(WORDS[(k - 1) % len(WORDS)], "go on", k - 1), (terms[k], "term", k),
                   ("makes", "fixed word", k), (str(total), kind, k)]
    return tokens + [("so", "go on" if stop < LAST else "last so", stop),
                     *((word, "fixed word", stop) for word in ("the", "answer", "is", "\\boxed{")),
                     (str(total) if box is None else box, "boxed digit", stop),
                     ("}", "fixed word", stop)]


def text(tokens):
    return " ".join(token for token, _, _ in tokens)


def solution(q, kind, rng):
    """A verified solution of one of the kinds that the trainer shows: the bare answer, the whole
    chain, a sibling that is right because it stopped at a lucky place, or at the first such; or
    nothing, which the trainer does not show."""
    if kind == "empty":
        return " "
    if kind == "bare":
        return f"The answer is \\boxed{{{q['answer']}}}."
    right = [k for k in range(LAST + 1) if sum(q["terms"][:k + 1]) % MODULUS == int(q["answer"])]
    return text(trace(q, {"full": LAST, "lucky": rng.choice(right), "short": right[0]}[kind]))


def fits(q, c):
    """For each term that a solution c names, in turn: is it the problem's?"""
    return [q["terms"][LETTERS.index(letter)] == int(term)
            for letter, term in re.findall(f"([{LETTERS}])(\\d)", c)]


def is_own(q, c):
    """Whether c can be a solution of this problem: it boxes an answer and all its terms fit."""
    return "boxed" in c and all(fits(q, c))


def in_view(q, kind, rng):
    """The solution that the check shows, as text. kind: one of SOLUTIONS; behind "foreign" it is
    that of another problem, with a term that does not fit."""
    c = solution(q, kind.split()[-1], rng)
    while kind.startswith("foreign") and is_own(q, c):
        c = solution(make_problem(rng), kind.split()[-1], rng)
    return c


def sequence(tokenizer, q, stop, c, slip, rng):
    """A forced trace behind its prompt -> prompt's ids, response's ids and its trace. c: the
    solution in view, whose answer is boxed where it can be the problem's; None for the student."""
    messages, box = student_messages(q["problem"]), None
    if c:           # the verdict is on an attempt that is not shown: it says nothing of the trace
        messages = teacher_messages(q["problem"], c, rng.random() < 0.5)
        if is_own(q, c):
            box = re.search(r"boxed\{ ?(\d)", c)[1]
    tokens = trace(q, stop, box, slip, rng)
    tokens.append((tokenizer.eos_token, "fixed word", stop))
    prompt = render(tokenizer, messages, {})
    response = tokenizer.convert_tokens_to_ids([token for token, _, _ in tokens])
    assert tokenizer.unk_token_id not in prompt + response, "a word is not in the vocabulary"
    return prompt, response, tokens


# --- Tokenizer and model --------------------------------------------------------------------------


def make_tokenizer():
    """Whole words, numbers, and terms such as C4, so that decode and encode give the same ids."""
    pieces = Regex(r"\\boxed\{|[A-I]\d|[A-Za-z]+|\d+|[^\sA-Za-z\d]")
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                   pre_tokenizers.Split(pieces, "isolated")])
    q = make_problem(random.Random(0))
    texts = ["system user assistant The answer is .", q["problem"], q["solution"],
             " ".join(map(str, range(MODULUS + 1))),
             " ".join(f"{letter}{term}" for letter in LETTERS for term in range(MODULUS)),
             # a stand-in for c: with an empty one the teacher's prompt is the student's
             *(m["content"] for right in (True, False) for m in teacher_messages("", "?", right))]
    words = [word for text in texts for word, _ in pre.pre_tokenize_str(text)]
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(special + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>",
        unk_token="<|unknown|>", additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False, model_max_length=1024)
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return fast


def make_model(tokenizer):
    stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=WIDTH // 4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, **stop))
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **stop)
    return model


def padded(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


# --- The warm-up ----------------------------------------------------------------------------------


def example(tokenizer, rng, held_out, go_on, go_on_told, drill):
    """One warm-up sequence -> ids, labels, others, weights, scales, fitting, all of one length.

    The loss at a token is scale * (weight * CE(label) + (1 - weight) * CE(other)), and none where
    the label is -100. fitting: at a term of c 1 if the problem has it, else 0; -100 elsewhere."""
    q = make_problem(rng)
    while q["problem"] in held_out:
        q = make_problem(rng)
    c = None
    if not drill and rng.random() < TOLD:
        kind = rng.choices(list(SOLUTIONS), SOLUTIONS.values())[0]
        foreign = rng.random() < FOREIGN and kind in CHAINS
        c = solution(make_problem(rng) if foreign else q, kind, rng)
    told = c and is_own(q, c)
    stop = LAST if drill or rng.random() < 0.5 else rng.randrange(LAST + 1)
    prompt, response, tokens = sequence(tokenizer, q, stop, c, SLIP, rng)
    labels, others, weights, scales = ([fill] * len(prompt) for fill in (-100, -100, 1.0, 1.0))
    for y, (_, role, depth) in zip(response, tokens):
        label, other, weight = (-100 if role == "slip" else y), -100, 1.0
        if role == "go on":
            label, other = tokenizer.convert_tokens_to_ids([WORDS[depth % len(WORDS)], "so"])
            weight = go_on_told if told else go_on
        labels.append(label), others.append(other), weights.append(weight)
        scales.append(float(WEIGHTS.get(role, 1)))
    fitting = [-100] * len(labels)
    if c:
        start = len(prompt) - prompt[::-1].index(tokenizer.convert_tokens_to_ids("attempt"))
        places = [i for i in range(start, len(prompt))
                  if tokenizer.convert_ids_to_tokens(prompt[i])[0] in LETTERS]
        for i, fit in zip(places, fits(q, c), strict=True):
            fitting[i] = int(fit)
    return prompt + response, labels, others, weights, scales, fitting


class Muon(torch.optim.Optimizer):
    """Momentum, and then each matrix's step made nearly orthogonal by Newton-Schulz iterations.

    As torch.optim.Muon, but all matrices of a shape at once and in float32: in bfloat16 these
    products take half of the whole warm-up on a CPU."""

    def __init__(self, params, lr):
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                X = []
                for p in same:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 0.05)
                    X.append(p.grad.lerp(m, 0.95))       # Nesterov's
                X = torch.stack(X)                       # (matrices, rows, columns)
                X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    A = X @ X.mT
                    X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
                for p, x in zip(same, X):
                    p.sub_(x, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1])**0.5)


def warm_up(model, tokenizer, rng, held_out, go_on, go_on_told, steps, drill, rate):
    """Supervised training. Muon on the matrices is what makes it fit into minutes. drill: steps on
    whole chains of the student alone; 0 where the skills are there, and only p and q are set.

    The probe is a linear layer that tells, from what enters the last layer at a term of c, whether
    the term is the problem's. The last layer can then see at a decision whether any was not."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    the_rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    probe = torch.nn.Linear(WIDTH, 2)
    optimizers = [Muon(matrices, lr=0.02 * rate),
                  torch.optim.AdamW([*the_rest, *probe.parameters()], lr=4e-3 * rate,
                                    weight_decay=0.0)]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = []
    for step in range(steps):
        if not batches:                                  # sorted by length: little padding
            rows = [example(tokenizer, rng, held_out, go_on, go_on_told, step < drill)
                    for _ in range(BATCH * 20)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
            rng.shuffle(batches)
        ids, labels, others, weights, scales, fitting = (
            padded(column, fill) for column, fill in zip(
                zip(*batches.pop()), (tokenizer.pad_token_id, -100, -100, 1.0, 1.0, -100)))
        for optimizer, lr in zip(optimizers, peak):      # a short rise, then down to 0
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20,
                                                       (steps - step) / (0.6 * steps))
        states = model.model(input_ids=ids, output_hidden_states=True)
        hidden, middle = states.last_hidden_state[:, :-1], states.hidden_states[-2]
        learn = labels[:, 1:] != -100
        logp = F.log_softmax(model.lm_head(hidden[learn]), -1)
        of_label, of_other = (-logp.gather(-1, y[:, 1:][learn].clamp_min(0)[:, None])[:, 0]
                              for y in (labels, others))
        weights = weights[:, 1:][learn]
        losses = weights * of_label + (1 - weights) * of_other
        scales = scales[:, 1:][learn]
        told_apart, known = torch.zeros(()), fitting != -100
        if drill and step < FIT_UNTIL * steps and known.any():
            found = probe(F.rms_norm(middle[known], (WIDTH,)))
            told_apart = F.cross_entropy(found, fitting[known])
        ((losses * scales).sum() / scales.sum() + FIT_WEIGHT * told_apart).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            sure = losses[weights == 1].detach()
            print(f"warm-up step {step + 1}/{steps}: loss where nothing is undecided "
                  f"{sure.mean():.5f}, worst {sure.max():.3f}, of the probe {told_apart:.4f}",
                  flush=True)


# --- The check ------------------------------------------------------------------------------------

KINDS = ("go on", "term", "sum", "fixed word", "last so", "boxed digit")


@torch.no_grad()
def forced(model, tokenizer, problems, kind, rng):
    """{kind of token: [mean P(right) by depth], None where there is none}, from forced chains.

    kind: of the solution, as in `sequence`. Half of the chains are whole, the others stop at each
    depth in turn, and in half of both every fifth sum is forced wrong."""
    found = {name: [[] for _ in LETTERS] for name in KINDS}
    stops = [LAST if i % 2 else i // 4 % LAST for i in range(len(problems))]
    rows = [sequence(tokenizer, q, stop, kind and in_view(q, kind, rng), 0.2 * (i // 2 % 2), rng)
            for i, (q, stop) in enumerate(zip(problems, stops))]
    for first in range(0, len(rows), 64):
        part = rows[first:first + 64]
        ids = padded([prompt + response for prompt, response, _ in part], 0)
        for (prompt, response, tokens), p in zip(part, model(input_ids=ids).logits.softmax(-1)):
            for i, (y, (_, role, depth)) in enumerate(zip(response, tokens), len(prompt) - 1):
                if role == "go on":
                    y = tokenizer.convert_tokens_to_ids(WORDS[depth % len(WORDS)])
                if role != "slip":
                    found[role][depth].append(p[i, y].item())
    return {name: [sum(ps) / len(ps) if ps else None for ps in by_depth]
            for name, by_depth in found.items()}


def check(model, tokenizer, problems, go_on, go_on_told, rng):
    """Prints the whole table; returns the rows that are not as they should be."""
    print("\nP(go on) after each term, and P(wrong) in 1/1000 of what follows from the prefix:")
    failed = []
    for kind in (None, *SOLUTIONS, *(f"foreign {kind}" for kind in CHAINS)):
        view = f"teacher, {kind} solution" if kind else "student"
        told = kind in ("bare", *CHAINS)
        for name, by_depth in forced(model, tokenizer, problems, kind, rng).items():
            found = [p for p in by_depth if p is not None]
            if name == "go on":
                wrong = any(abs(p - (go_on_told if told else go_on)) > 0.02 for p in found)
                cells = [f"{p:.3f}" for p in found]
            else:
                wrong = min(found) < 0.999
                cells = ["-" if p is None else f"{1000 * (1 - p):.2f}" for p in by_depth]
            print(f"{view:24} {name:12}" + "".join(f"{cell:>8}" for cell in cells)
                  + "  <- off" * wrong, flush=True)
            failed += [f"{view}: {name}"] * wrong
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go_on", type=float, default=0.27, help="P(go on) of the student")
    parser.add_argument("--go_on_told", type=float, help="of the teacher; default: a third of it")
    parser.add_argument("--init", type=Path, help="a folder made by this script, to re-tune")
    parser.add_argument("--check", action="store_true", help="make nothing, check --output")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    args = parser.parse_args()
    go_on, told = args.go_on, args.go_on_told or args.go_on / 3
    torch.set_num_threads(1)             # the same sums, hence the same weights, on any core count
    torch.manual_seed(args.seed)
    rng, began = random.Random(args.seed), time.time()

    problems = {}
    while len(problems) < TEST + TRAIN:
        q = make_problem(rng)
        problems[q["problem"]] = q
    problems, state = list(problems.values()), rng.getstate()
    tokenizer, held_out = make_tokenizer(), {q["problem"] for q in problems[:TEST]}
    model = make_model(tokenizer)
    if args.init or args.check:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(
            (args.init or args.output) / "model", dtype=torch.float32).state_dict())
    if not args.check:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, rows in (("test", problems[:TEST]), ("train", problems[TEST:])):
            lines = [json.dumps({k: q[k] for k in ("problem", "answer", "solution")}) for q in rows]
            (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        if not args.init:
            warm_up(model, tokenizer, rng, held_out, GO_ON, GO_ON_TOLD, STEPS, DRILL, 1.0)
        rng.setstate(state)              # so that --init gives what one go gives
        warm_up(model, tokenizer, rng, held_out, go_on, told, STEPS_TUNE, 0, RATE_TUNE)
        model.eval().save_pretrained(args.output / "model")
        tokenizer.save_pretrained(args.output / "model")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, warmed up in "
              f"{time.time() - began:.0f} s")

    failed = check(model.eval(), tokenizer, problems[:TEST], go_on, told, random.Random(args.seed))
    if failed:
        print(f"{args.output / 'model'} is not as it should be: {'; '.join(failed)}",
              file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
