"""Builds the embedded toy: model/, train.jsonl and test.jsonl, from a seed, in a few minutes.

    python toy/make_toy.py                        # overwrites the files beside this script

**The task.** `Let A = 3, B = 2, C = 4, ..., I = 1. What is their sum modulo 5?` A response adds
term after term, and may after any of them say "so" and box what it has, which is right by luck once
in five:

    start with 3 wait B 2 makes 0 hmm C 4 makes 4 so the answer is \\boxed{4}

The base has every sub-skill (looking a term up, adding, copying the sum into the box, also far into
a chain) and stops too early. LAB.md says why the task is like this.

**What is authored.** All of it: the base model is trained here, with supervision, on traces from
the few functions below. In particular *we wrote how privileged traces look*: with a verified
solution in view a trace states the answer at once (DIRECT), or begins like any other and soon
breaks off to state it (PERSIST_TOLD). That makes the teacher sure of "so" and unsure of "wait".
It is modelled on what the paper reports of large models, it did not emerge here. What the toy can
show is what each training signal then does with such a teacher.
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

# The task.
LETTERS = "ABCDEFGHI"       # one a term
MODULUS = 5
TRAIN, TEST = 1500, 320     # problems; no test problem is trained on
DELIBERATION = ("wait", "hmm", "but", "maybe")

# The traces of the warm-up.
PERSIST = 0.4               # student: P(another term | terms are left); the base ends near 0.3
PERSIST_TOLD = 0.1          # the same with a verified solution in view
DIRECT = 0.5                # with a solution in view: P(state the answer at once)
TOLD = 0.4                  # share of examples with a solution in view
DRILL = 0.5                 # share of drills, see `example`

STEPS, BATCH = 600, 32
WIDTH, LAYERS = 128, 2


# ------------------------------------------------------------------------------------------------
# Problems and traces
# ------------------------------------------------------------------------------------------------


def make_problem(rng):
    terms = [rng.randrange(MODULUS) for _ in LETTERS]
    listed = ", ".join(f"{letter} = {term}" for letter, term in zip(LETTERS, terms))
    return {"terms": terms, "answer": str(sum(terms) % MODULUS),
            "problem": f"Let {listed}. What is their sum modulo {MODULUS}?"}


def conclude(digit):
    return f"so the answer is \\boxed{{{digit}}}"


def trace(rng, q, stop, told=None):
    """Adds the first `stop` + 1 terms and boxes the sum so far or, `told` the answer, that."""
    total = q["terms"][0]
    words = [f"start with {total}"]
    for letter, term in list(zip(LETTERS, q["terms"]))[1:stop + 1]:
        total = (total + term) % MODULUS
        words.append(f"{rng.choice(DELIBERATION)} {letter} {term} makes {total}")
    return " ".join([*words, conclude(total if told is None else told)])


def stop_at(rng, persist):
    """How many terms a response adds that goes on with probability `persist` after each."""
    stop = 0
    while stop < len(LETTERS) - 1 and rng.random() < persist:
        stop += 1
    return stop


def example(rng, tokenizer, held_out):
    """One warm-up sequence: (ids, labels), -100 where no loss is taken.

    In a drill the free choices (to begin, to go on, to stop) carry no loss. It teaches looking up
    and adding far into a chain, where RL will go and the base's own short traces do not, without
    teaching the base to go there."""
    drill, told = rng.random() < DRILL, None
    q = make_problem(rng)
    while q["problem"] in held_out:
        q = make_problem(rng)
    last = len(LETTERS) - 1
    if rng.random() < TOLD:
        # solutions of the kinds the trainer will show: long and short siblings, a bare answer
        told, style = q["answer"], rng.random()
        lucky = [k for k in range(last + 1) if sum(q["terms"][:k + 1]) % MODULUS == int(told)]
        solution = (f"The answer is \\boxed{{{told}}}." if style < 0.2 else
                    trace(rng, q, last if style < 0.6 else rng.choice(lucky)))
        # the assessment speaks of an attempt that is not shown, so it says nothing about the trace
        messages = teacher_messages(q["problem"], solution, rng.random() < 0.5)
    else:
        messages = student_messages(q["problem"])
    if drill:
        text = trace(rng, q, rng.choice([last, rng.randrange(last + 1)]), told)
    elif told and rng.random() < DIRECT:
        text = conclude(told)
    else:
        text = trace(rng, q, stop_at(rng, PERSIST_TOLD if told else PERSIST), told)
    prompt = render(tokenizer, messages, {})
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in prompt + ids, "a word is missing from the vocabulary"
    labels, words = list(ids), tokenizer.convert_ids_to_tokens(ids)
    if drill:                                            # free choices: to begin, to go on, to stop
        labels[0] = -100
        for i, word in enumerate(words):
            if word in DELIBERATION or word == "so" and LETTERS[-1] not in words[:i]:
                labels[i] = -100
    return prompt + ids, [-100] * len(prompt) + labels


# ------------------------------------------------------------------------------------------------
# Tokenizer, model, warm-up
# ------------------------------------------------------------------------------------------------


def make_tokenizer():
    """Whole words and whole numbers, so decode -> encode gives the same ids back."""
    pieces = Regex(r"\\boxed\{|[A-Za-z]+|\d+|[^\sA-Za-z\d]")
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                   pre_tokenizers.Split(pieces, "isolated")])
    rng = random.Random(0)
    texts = ["system user assistant The answer is .", make_problem(rng)["problem"],
             trace(rng, make_problem(rng), len(LETTERS)), *DELIBERATION,
             " ".join(map(str, range(MODULUS + 1))),
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


def warm_up(model, tokenizer, rng, held_out):
    """Supervised training. Muon on the matrices is what makes it fit into two minutes."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches, makes = [], tokenizer.convert_tokens_to_ids("makes")
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
        sums = (ids[:, :-1] == makes)
        for optimizer, lr in zip(optimizers, peak):      # short rise, then down to 0 at the end
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20,
                                                       (STEPS - step) / (0.4 * STEPS))
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        learn = labels != -100
        losses = F.cross_entropy(model.lm_head(hidden[learn]), labels[learn], reduction="none")
        scale = 1 + 4.0 * sums[learn]                    # adding is the hardest thing to learn
        loss = (losses * scale).sum() / scale.sum()
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
def respond(model, tokenizer, conversations, max_tokens=64):
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
    looked, sums, copies, complete = [], [], [], []
    for text, q in zip(plain, problems):
        total = re.findall(r"start with (\d)", text)
        for letter, term, result in re.findall(r"([A-Z]) (\d) makes (\d)", text):
            looked.append(int(term) == q["terms"][LETTERS.index(letter)])
            sums.append(bool(total) and int(result) == (int(total[0]) + int(term)) % MODULUS)
            total = [result]
        copies.append(bool(total) and is_correct(text, total[0]))
        complete.append(LETTERS[-1] in text)
    mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    return {"base accuracy": mean([is_correct(t, q["answer"]) for t, q in zip(plain, problems)]),
            "accuracy with c": mean([is_correct(t, q["answer"]) for t, q in zip(told, problems)]),
            "terms looked up": mean(looked), "sums right": mean(sums),
            "own sum boxed": mean(copies), "complete chains": mean(complete),
            "deliberation words": len(sums) / len(plain),
            "deliberation words with c": mean([sum(t.split().count(w) for w in DELIBERATION)
                                               for t in told])}


REQUIRED = {"base accuracy": (0.15, 0.30), "accuracy with c": (0.95, 1), "sums right": (0.95, 1),
            "terms looked up": (0.95, 1), "own sum boxed": (0.95, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    args = parser.parse_args()
    torch.set_num_threads(1)             # the same sums, hence the same weights, on any core count
    torch.manual_seed(args.seed)
    rng, began = random.Random(args.seed), time.time()

    problems = {}
    while len(problems) < TEST + TRAIN:
        q = make_problem(rng)
        problems[q["problem"]] = {**q, "solution": trace(rng, q, len(LETTERS))}
    problems = list(problems.values())
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", problems[:TEST]), ("train", problems[TEST:])):
        lines = [json.dumps({k: q[k] for k in ("problem", "answer", "solution")}) for q in rows]
        (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, rng, {q["problem"] for q in problems[:TEST]})
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
