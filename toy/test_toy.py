"""Tests of the toy: its base, its grammar and the lab's bookkeeping. `python -m pytest -q toy`"""

import random
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOY = Path(__file__).resolve().parent
sys.path[:0] = [str(TOY), str(TOY.parent)]
import lab  # noqa: E402
import make_toy  # noqa: E402
from antisd import is_correct  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "model")


def problems(count, seed=7):
    rng = random.Random(seed)
    return [make_toy.make_problem(rng) for _ in range(count)]


def test_every_solution_that_the_warm_up_shows_is_right_and_survives_the_tokenizer(tokenizer):
    rng = random.Random(0)
    for q in problems(60):
        for kind in ("bare", *make_toy.CHAINS):
            text = make_toy.solution(q, kind, rng)
            assert is_correct(text, q["answer"])
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            again = tokenizer.decode(ids, skip_special_tokens=True)
            assert tokenizer.encode(again, add_special_tokens=False) == ids


def test_a_short_solution_is_right_by_luck_at_the_first_such_place():
    q = {"problem": "", "terms": [1, 0, 2, 3, 0, 0, 0, 0, 0], "answer": "1"}
    words = make_toy.solution(q, "short", random.Random(0)).split()
    assert words[:3] == ["start", "A1", "so"]


@pytest.mark.parametrize("kind", ["full", "lucky", "short"])
def test_a_foreign_solution_is_right_elsewhere_and_shows_it(kind):
    rng = random.Random(1)
    for q in problems(40):
        own, foreign = (make_toy.in_view(q, k, rng) for k in (kind, f"foreign {kind}"))
        assert all(make_toy.fits(q, own)) and not all(make_toy.fits(q, foreign))
        assert lab.terms_fit(own, q["problem"]) and not lab.terms_fit(foreign, q["problem"])
        assert len(make_toy.fits(q, foreign)) == foreign.count("makes") + 1


def test_what_is_boxed_under_own_and_foreign_solutions(tokenizer):
    """Stopped after one term: the solution's answer if it can be this problem's, else the term."""
    rng, q = random.Random(2), problems(1)[0]
    while q["answer"] == str(q["terms"][0]):
        q = make_toy.make_problem(rng)
    for kind, boxed in (("bare", q["answer"]), ("full", q["answer"]),
                        ("foreign full", str(q["terms"][0])), ("empty", str(q["terms"][0])),
                        (None, str(q["terms"][0]))):
        c = kind and make_toy.in_view(q, kind, rng)
        _, _, tokens = make_toy.sequence(tokenizer, q, 0, c, 0.0, rng)
        assert [token for token, role, _ in tokens if role == "boxed digit"] == [boxed]


def test_what_the_loss_is_taken_on(tokenizer):
    rng, slips, choices, seen = random.Random(3), 0, set(), set()
    so = tokenizer.convert_tokens_to_ids("so")
    for _ in range(60):
        ids, labels, others, weights, scales, fitting = make_toy.example(
            tokenizer, rng, set(), 0.3, 0.1, False)
        assert len({*map(len, (ids, labels, others, weights, scales, fitting))}) == 1
        start = ids.index(tokenizer.convert_tokens_to_ids("assistant")) + 1
        assert set(labels[:start]) == {-100} and set(fitting[start:]) == {-100}
        slips += labels[start:].count(-100)
        prompt = tokenizer.convert_ids_to_tokens(ids[:start])
        # The instruction holds one box and a solution another; empty headings hold none.
        told = "attempt" in prompt and prompt.count("\\boxed{") == 2 and 0 not in fitting
        seen |= {fit for fit in fitting if fit != -100}
        for y, other, weight in zip(labels, others, weights):
            if other != -100:                            # a choice: both of its sides are taught
                assert other == so and y != so and weight == (0.1 if told else 0.3)
                choices.add(told)
            else:
                assert weight == 1.0
    assert slips and choices == seen == {0, 1}


def test_the_shipped_base_is_right_at_every_depth_and_a_spoilt_one_is_found(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float32).eval()
    arguments = (tokenizer, problems(72), 0.27, 0.09)
    assert make_toy.check(model, *arguments, random.Random(0)) == []
    with torch.no_grad():                                # one head of the last layer is lost
        model.model.layers[-1].self_attn.o_proj.weight[:, :32] = 0
    assert make_toy.check(model, *arguments, random.Random(0))


def test_the_warm_up_is_the_same_twice(tokenizer):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make_toy.make_model(tokenizer)
        make_toy.warm_up(model, tokenizer, random.Random(0), set(), 0.3, 0.1, 2, 1, 1.0)
        weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("response, kinds", [
    ("start A1 so the answer is \\boxed{ 1 } <|im_end|>",
     ["fixed", "term", "so"] + ["fixed"] * 4 + ["early box", "fixed", "fixed"]),
    ("start A1 wait B2 makes 4 so", ["fixed", "term", "go on", "term", "fixed", "slip", "so"]),
    ("start A2 wait B2 makes 4", ["fixed", "misread term", "go on", "term", "fixed", "sum"]),
    ("start A1 wait C2 makes 3", ["fixed", "term", "go on", "misread term", "fixed", "sum"]),
    ("start A1 wait wait B2", ["fixed", "term", "go on"] + ["garbage"] * 2),
])
def test_the_kinds_of_a_response(response, kinds):
    assert lab.kinds_of(response.split(), "Sum modulo 5 of B2 A1 C0.") == kinds


def test_a_whole_chain_has_no_early_so():
    q = problems(1)[0]
    kinds = lab.kinds_of((q["solution"] + " <|im_end|>").split(), q["problem"])
    assert kinds.count("go on") == kinds.count("sum") == make_toy.LAST
    assert "last so" in kinds and "box" in kinds and not {"so", "early box", "garbage"} & {*kinds}


def test_every_fork_finds_its_line_and_compiles():
    source = (TOY.parent / "antisd.py").read_text()
    for arm, (line, instead) in lab.FORKS.items():
        assert arm in lab.ARMS and source.count(line) == 1
        compile(source.replace(line, instead), arm, "exec")


def group_of(q, texts):
    return [types.SimpleNamespace(problem=q, text=text) for text in texts]


def test_the_forks_of_c():
    """Of four problems the last one's solution fits the second by luck: it names one term."""
    rng = random.Random(4)
    these = problems(4)
    texts = [q["solution"] for q in these[:3]] + [f"start A{these[1]['terms'][0]} so ..."]
    rollouts = sum((group_of(q, [text] * 2) for q, text in zip(these, texts)), [])
    pick = lambda group, rng: [(r.text, "sibling") for r in group]  # noqa: E731
    for any_of_them, expected in ((False, {texts[0], texts[2]}), (True, {*texts} - {texts[1]})):
        found = [lab.foreign(rollouts[2:4], rollouts, pick, rng, any_of_them) for _ in range(30)]
        assert {c for picks in found for c, _ in picks} == expected
    own = these[0]["solution"]
    spoilt, shuffled = lab.spoil(own, rng), lab.shuffle(own, rng)
    assert make_toy.fits(these[0], spoilt).count(False) == 1
    assert sum(a != b for a, b in zip(own.split(), spoilt.split(), strict=True)) == 1
    assert shuffled != own and sorted(shuffled.split()) == sorted(own.split())
    assert shuffled.split(" so ")[1] == own.split(" so ")[1]
    assert all(make_toy.fits(these[0], shuffled))


def test_steps_and_medians_of_runs_that_never_get_there():
    rows = [{"step": i, "eval_accuracy": x} for i, x in enumerate([0.2, None, 0.85, 0.9])]
    assert lab.steps_to(rows, 0.85) == 2 and lab.steps_to(rows, 0.95) is None
    runs = [{"to85": step, "length of run": 100} for step in (30, None, 40, None, None)]
    assert lab.median(runs, "to85") == ">=100" and lab.median(runs[:3], "to85") == "40"
    assert lab.median(runs[:4], "to85") == ">=70" and lab.median(runs[:3:2], "to85") == "35"
