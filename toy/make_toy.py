"""Builds the embedded toy: model/, train.jsonl and test.jsonl, from a seed, in about two minutes.

    python toy/make_toy.py                        # overwrites the files beside this script

**The task.** `Which two of 14, 21, 17, 11, 20, 18 add up to 32?` with the answer in a box, as a
pair. Nothing in the problem gives the pair away cheaply to a model this small: it has to try. A
response tries a random pair, says whether the sum is the target, and then either goes on or gives
up by boxing the pair it tried last:

    let me try 14 + 21 = 35 no wait 11 + 20 = 31 no hmm 14 + 18 = 32 yes so the answer is ...

**What a toy must have for the paper's mechanism to show,** written down before the runs:

1. Deliberation causes success. A blind guess is right once in 18 tries; a response is right exactly
   as often as it goes on searching until a `yes`. The base has every sub-skill (arithmetic, the
   verdict, copying the pair into the box, also late in a long search) and gives up too early.
2. The teacher reacts at the deliberation words and hardly elsewhere. Those words (wait, hmm, but,
   maybe) stand at the one place where the student decides anything that matters: after a `no`.
3. Many groups are all wrong at the start, so that GRPO alone has little to go on.
4. Content and answer tokens carry no signal that misleads. Given the prefix they are certain for
   the student (sums, verdicts, the boxed pair: no gradient where log pi_S = 0, however negative u
   is) or random for both views (candidates: u = 0). An earlier toy, whose base guessed its final
   pair and whose teacher explored only near the solution, collapsed on just these tokens.

**What is authored.** All of it: the base model is trained here, with supervision, on traces from
the few functions below. In particular *we wrote how privileged traces look*: with a verified
solution in view a trace states the answer at once (DIRECT) or tries random pairs like any other but
breaks off after a `no` to state it (all but PERSIST_TOLD of the time). That makes the teacher
sure of "so" and unsure of "wait". It is modelled on what the paper reports of large models, it did
not emerge here, and left to itself (traces filtered for a right answer) a tiny model showed the
opposite sign. What the toy can show is what each training signal then does with such a teacher.
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
from antisd import is_correct, render, student_messages, teacher_messages  # noqa: E402

# The task. A target (23 or more) is never a number that could stand in the list, which makes the
# verdict, the hardest sub-skill, easier to learn.
NUMBERS = 6                 # numbers in a problem of train.jsonl and test.jsonl
LOW, HIGH = 11, 22          # their range, both ends included
TRAIN, TEST = 1500, 320     # problems; no test problem (as a set and a target) is trained on
DELIBERATION = ("wait", "hmm", "but", "maybe")

# The traces of the warm-up.
PERSIST = 0.7               # student: P(another try | "no"); sets the base accuracy
PERSIST_TOLD = 0.1          # the same with a verified solution in view: u on "wait" is about
                            # log(PERSIST_TOLD / PERSIST) = -1.9 nats
DIRECT = 0.5                # with a solution in view: P(state the answer at once)
TOLD = 0.4                  # share of examples with a solution in view
DRILL = 0.45               # share of drills, see `example`
MOST_TRIES = 17             # as many as fit into demo.args' --max_tokens 128
SIZES = (3, 4, 5, 6, 6, 6)  # warm-up problems; short ones have more "yes" to learn the end from

STEPS, BATCH = 1000, 32     # about 0.1 s a step on one thread
WIDTH, LAYERS = 128, 2


# ------------------------------------------------------------------------------------------------
# Problems and traces
# ------------------------------------------------------------------------------------------------


def make_problem(rng, size, held_out=()):
    """A problem with exactly one right pair; `held_out`: keys that must not be drawn."""
    while True:
        numbers = rng.sample(range(LOW, HIGH + 1), size)
        target = sum(rng.sample(numbers, 2))
        pairs = [(a, b) for a in numbers for b in numbers if a < b and a + b == target]
        key = (frozenset(numbers), target)
        # a double would look right to a search that draws with replacement
        if len(pairs) == 1 and target / 2 not in numbers and key not in held_out:
            return {"numbers": numbers, "target": target, "pair": pairs[0], "key": key,
                    "problem": f"Which two of {', '.join(map(str, numbers))} add up to {target}?",
                    "answer": f"{pairs[0][0]}, {pairs[0][1]}"}


def conclude(pair):
    return f"so the answer is \\boxed{{{pair[0]}, {pair[1]}}}"


def search(rng, q, persist, told=None):
    """A trace: random tries until one fits, or until it gives up on the pair it tried last, or,
    `told` the right pair, states that. persist: P(go on | no). Tries are drawn with replacement:
    such a small model does not learn to avoid what it has tried."""
    words = ["let me try"]
    while True:
        a, b = rng.choices(q["numbers"], k=2)
        words.append(f"{a} + {b} = {a + b}")
        if a + b == q["target"]:
            return " ".join([*words, "yes", conclude((a, b))])
        words.append("no")
        if rng.random() > persist or len(words) > 3 * MOST_TRIES:
            return " ".join([*words, conclude(told or (a, b))])
        words.append(rng.choice(DELIBERATION))


def long_search(rng, q, told=None):
    """A drill: so many misses, then mostly a hit. `example` takes no loss on its free choices."""
    misses, words = rng.randrange(MOST_TRIES), ["let me try"]
    while misses:
        a, b = rng.choices(q["numbers"], k=2)
        if a + b != q["target"]:
            words += [f"{a} + {b} = {a + b} no", rng.choice(DELIBERATION)]
            misses -= 1
    if len(words) > 1 and rng.random() < 0.25:
        return " ".join([*words[:-1], conclude(told or (a, b))])
    a, b = rng.sample(q["pair"], 2)
    return " ".join([*words, f"{a} + {b} = {a + b} yes", conclude((a, b))])


def right_search(rng, q, persist):
    """A trace that ends in a `yes`: what the trainer shows the teacher as a verified solution."""
    while " yes " not in (trace := search(rng, q, persist)):
        pass
    return trace


def example(rng, tokenizer, held_out):
    """One warm-up sequence: (ids, labels), -100 where no loss is taken.

    In a drill the free choices (direct or not, which candidates, go on or give up) carry no loss.
    It teaches sums, verdicts and copying far into a search, where RL will go and the base's own
    short traces do not, without teaching the base to go there. (In builds whose drills did not reach
    that far the verdict failed from the eighth try on. There some AntiSD runs collapsed: a wrong
    "yes" has u < 0 like a "wait", and is pushed up with it.)"""
    drill, pair = rng.random() < DRILL, None
    q = make_problem(rng, NUMBERS if drill else rng.choice(SIZES), held_out)
    if rng.random() < TOLD:
        # solutions of the kinds the trainer will show: short and long siblings, a bare answer
        style = rng.random()
        solution = (f"The answer is \\boxed{{{q['answer']}}}." if style < 0.2 else
                    right_search(rng, q, PERSIST if style < 0.8 else 0.95))
        pair = [int(n) for n in re.findall(r"\d+", solution.rpartition("{")[2])]
        # the assessment speaks of an attempt that is not shown, so it says nothing about the trace
        messages = teacher_messages(q["problem"], solution, rng.random() < 0.5)
    else:
        messages = student_messages(q["problem"])
    if drill:
        text = long_search(rng, q, pair)
    elif pair and rng.random() < DIRECT:
        text = conclude(pair)
    else:
        text = search(rng, q, PERSIST_TOLD if pair else PERSIST, pair)
    prompt = render(tokenizer, messages, {})
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in prompt + ids, "a word is missing from the vocabulary"
    labels, words = list(ids), tokenizer.convert_ids_to_tokens(ids)
    if drill:
        for i in range(words.index("so")):
            candidate = words[i].isdigit() and words[i - 1] != "="
            if i == 0 or candidate or words[i - 1] == "no":
                labels[i] = -100
        if words[words.index("so") - 1] == "no":         # giving up is a free choice, too
            labels[words.index("so")] = -100
    return prompt + ids, [-100] * len(prompt) + labels


# ------------------------------------------------------------------------------------------------
# Tokenizer, model, warm-up
# ------------------------------------------------------------------------------------------------


def make_tokenizer():
    """Whole words and whole numbers, so decode -> encode gives the same ids back."""
    pieces = Regex(r"\\boxed\{|[A-Za-z]+|\d+|[^\sA-Za-z\d]")
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                   pre_tokenizers.Split(pieces, "isolated")])
    texts = ["system user assistant", "Which two of , add up to ? let me try + = yes no",
             "The answer is .", conclude(("", "")), *DELIBERATION,
             # a stand-in for c: with an empty one the teacher's prompt is the student's
             *(m["content"] for right in (True, False) for m in teacher_messages("", "?", right))]
    words = [word for text in texts for word, _ in pre.pre_tokenize_str(text)]
    numbers = [str(n) for n in range(LOW, 2 * HIGH + 1)]
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(special + words + numbers))}
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


def warm_up(model, tokenizer, rng, held_out):
    """Supervised training. Muon on the matrices is what makes it fit into two minutes."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    weight = torch.ones(len(tokenizer))                  # the verdict is the hardest thing to learn
    weight[tokenizer.convert_tokens_to_ids(["yes", "no"])] = torch.tensor([10.0, 3.0])
    batches = []
    for step in range(STEPS):
        if not batches:                                  # sorted by length: little padding
            rows = [example(rng, tokenizer, held_out) for _ in range(BATCH * 20)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
            rng.shuffle(batches)
        batch = batches.pop()
        width = len(batch[-1][0])
        ids = torch.tensor([x + [tokenizer.pad_token_id] * (width - len(x)) for x, _ in batch])
        labels = torch.tensor([y + [-100] * (width - len(y)) for _, y in batch])[:, 1:]
        for optimizer, lr in zip(optimizers, peak):      # short rise, then down to 0 at the end
            scale = min(1, (step + 1) / 20, (STEPS - step) / (0.4 * STEPS))
            optimizer.param_groups[0]["lr"] = lr * scale
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        learn = labels != -100
        loss = F.cross_entropy(model.lm_head(hidden[learn]), labels[learn], weight=weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"warm-up step {step + 1}/{STEPS}, loss {loss.item():.3f}", flush=True)


# ------------------------------------------------------------------------------------------------
# The quality check
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def respond(model, tokenizer, conversations, max_tokens=128):
    prompts = [render(tokenizer, messages, {}) for messages in conversations]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                         max_new_tokens=max_tokens)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def measure(model, tokenizer, problems):
    """Accuracy with and without a solution in view, sub-skills without; at temperature 1."""
    problems = problems * 2
    plain = respond(model, tokenizer, [student_messages(q["problem"]) for q in problems])
    told = respond(model, tokenizer, [teacher_messages(q["problem"], q["solution"], False)
                                      for q in problems])
    sums, verdicts, copies = [], [], []
    for text, q in zip(plain, problems):
        tries = re.findall(r"(\d+) \+ (\d+) = (\d+) (yes|no)", text)
        for a, b, c, verdict in tries:
            sums.append(int(a) + int(b) == int(c))
            if int(c) == q["target"] or verdict == "yes":  # nearly all others are a right "no"
                verdicts.append(int(c) == q["target"] and verdict == "yes")
        if tries and tries[-1][3] == "yes":
            copies.append(is_correct(text, ", ".join(tries[-1][:2])))
    mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    return {"base accuracy": mean([is_correct(t, q["answer"]) for t, q in zip(plain, problems)]),
            "accuracy with c": mean([is_correct(t, q["answer"]) for t, q in zip(told, problems)]),
            "sums right": mean(sums), "yes exactly when right": mean(verdicts),
            "verified pair copied": mean(copies),
            "tries": len(sums) / len(plain),
            "deliberation words": mean([sum(t.split().count(w) for w in DELIBERATION)
                                        for t in plain]),
            "deliberation words with c": mean([sum(t.split().count(w) for w in DELIBERATION)
                                               for t in told])}


REQUIRED = {"base accuracy": (0.10, 0.40), "accuracy with c": (0.90, 1), "sums right": (0.95, 1),
            "yes exactly when right": (0.90, 1), "verified pair copied": (0.95, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    args = parser.parse_args()
    torch.set_num_threads(1)             # the same sums, hence the same weights, on any core count
    torch.manual_seed(args.seed)
    rng, began = random.Random(args.seed), time.time()

    problems, keys = [], set()
    while len(problems) < TEST + TRAIN:  # each drawn key is held out of the rest: no repeats
        problem = make_problem(rng, NUMBERS, keys)
        keys.add(problem["key"])
        problems.append({**problem, "solution": right_search(rng, problem, PERSIST)})
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", problems[:TEST]), ("train", problems[TEST:])):
        lines = [json.dumps({k: q[k] for k in ("problem", "answer", "solution")}) for q in rows]
        (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, rng, {q["key"] for q in problems[:TEST]})
    model.eval().save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")

    facts = measure(model, tokenizer, problems[:TEST])
    for name, value in facts.items():
        print(f"{name:28} {value:.3f}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - began:.0f} s")
    failed = [f"{name} is {facts[name]:.3f}, not in {low}..{high}"
              for name, (low, high) in REQUIRED.items() if not low <= facts[name] <= high]
    if failed:
        print("this seed's warm-up failed: " + "; ".join(failed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
