"""What the scripts in analysis/ must prove: `python -m pytest -q analysis`; no network, no GPU."""
import ast
import dataclasses
import html.parser
import json
import math
import os
import random
import re
import runpy
import shlex
import sys
import weakref
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import antisd
import curves
import decode_bench
import memory
import pmi
import test_antisd

TOY = HERE.parent / "toy"
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="module")
def one_process():
    torch.set_num_threads(1)
    antisd.setup()


# --- The PMI page ---------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text of the element "data"."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("id") == "data":
            self.data += data


EVIL = ["<script>", "alert('x')", "</script>", '"><img src=http://a.b/c onerror=f>', "&amp;", "\n"]


def evil_data():
    u = torch.tensor([-5.0, -1.0, 0.0, 0.5, 2.0, -3.0])
    s = torch.full((6,), -6.0)
    values = torch.stack([s.exp(), (s + u).exp(), u, -antisd.phi(u), s.abs(), s.abs()], 1)
    r = antisd.Rollout({"id": 3}, list(range(6)), "", False, 1.0)
    return pmi.page_data([r, r], [EVIL, EVIL], [values, values], ["sibling", "answer"],
                         ["</script><b>c</b>"] * 2, "<i>model</i> __DATA__")


def test_page_holds_the_data_as_data_and_fetches_nothing():
    template, page = (HERE / "pmi.html").read_text(), Page(pmi.page(evil_data()))
    assert json.loads(page.data) == evil_data()
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(template).tags]
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    # the script sets text and attributes only, so that nothing becomes markup in the browser either
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(",
                 "import", "http", "url("):
        assert word not in template.replace("!important", ""), word


def test_page_counts_right():
    data = evil_data()
    facts = {name: value for value, name in data["facts"]}
    assert facts["tokens"] == "12" and facts["have u < 0"] == "50.0%"
    assert facts["at the cap, u < -3.3"] == "16.7%" and facts["mean u, nats"] == "-1.083"
    assert facts["of 2 responses correct"] == "100%"
    assert data["low"] == [["<script>", -5.0, 2], ["alert('x')", -1.0, 2]]       # "\n" is no word
    assert data["high"] == [["&amp;", 2.0, 2], [EVIL[3], .5, 2]]
    assert data["responses"][1]["title"] == "Problem 3, correct"
    assert data["responses"][1]["note"] == "6 tokens, mean u -1.083, c: answer"
    # log10 of exp(-6) is -2.61, box (4 - 2.61) / 4 * 32 = 11 of the student's axis
    assert sum(n for x, y, n in data["map"]) == 12 and {x for x, y, n in data["map"]} == {11}
    assert {y for x, y, n in data["map"]} == {0, 0, 7, 11, 12, 18}
    at = torch.tensor(pmi.CAP_U, dtype=torch.float64)
    assert (-antisd.phi(at)).item() == pytest.approx(0.95 * math.log(2) / 2)


def brute_force(model, prompt, response):
    """log pi and entropy of a response's tokens: one row, no padding, whole logits, float64."""
    logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].double()
    logps = logps.log_softmax(-1)
    return logps[range(len(response)), response], -(logps.exp() * logps).sum(-1)


def test_page_shows_the_trainers_scores(tmp_path):
    cfg = pmi.View(model=str(TOY / "model"), data=str(TOY / "test.jsonl"), limit=2, samples=3,
                   max_tokens=24, seed=5, micro_tokens=100, output=str(tmp_path / "new" / "x.html"))
    data = pmi.view(cfg)
    assert json.loads(Page((tmp_path / "new" / "x.html").read_text()).data) == data
    tokenizer, context, _ = antisd.load_tokenizer(cfg.model, {})
    problems = antisd.load_problems(cfg.data, limit=2)
    for p in problems:
        p["prompt"] = antisd.render(tokenizer, antisd.student_messages(p["problem"]), {})
    torch.manual_seed(5)
    policy = antisd.load_policy(cfg.model, torch.float32, tokenizer)
    rollouts = antisd.roll_out(policy, tokenizer, problems, 3, max_tokens=24)
    views, sources = antisd.teacher_prompts(tokenizer, rollouts, 3, {}, context - 24, 5)
    assert len(data["responses"]) == 6
    for r, view, source, shown in zip(rollouts, views, sources, data["responses"]):
        (s, H_S), (t, H_T) = (brute_force(policy.model, p, r.ids) for p in (r.problem["prompt"],
                                                                            view))
        assert shown["u"] == pytest.approx((t - s).tolist(), abs=2e-3)
        cards = torch.tensor([[float(x) for x in card.split()] for card in shown["card"]])
        torch.testing.assert_close(cards, torch.stack(
            [s.exp(), t.exp(), t - s, -antisd.phi(t - s), H_S, H_T], 1).float(),
            atol=6e-3, rtol=6e-3)
        assert "".join(shown["tokens"]) == tokenizer.decode(r.ids)
        assert shown["view"] == tokenizer.decode(view) and shown["note"].endswith(source)


def test_pieces_join_to_the_text_even_where_a_character_is_several_tokens():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    found = pmi.pieces(Bytes(), list("aé🎉 b".encode()))
    assert len(found) == 9 and "".join(found).replace("\ufffd", "") == "aé🎉 b"


# --- The preflight --------------------------------------------------------------------------------


def response(number, reward, text, solution=None):
    problem = {"id": number, "problem": f"p{number}", "answer": str(number), "solution": solution}
    return antisd.Rollout(problem, [1], text, False, reward)


def test_foreign_solutions_are_other_problems_of_the_same_kind():
    rollouts = [response(0, 1.0, "zero"), response(0, 1.0, "zero again"),
                response(1, 0.0, "a", "one, worked out"), response(1, 0.0, "b", "one, worked out"),
                response(2, 1.0, "two"), response(2, 1.0, "two"),
                response(3, 0.0, "c", "three, worked out"), response(3, 0.0, "d"),
                response(4, 1.0, "two"), response(4, 1.0, "two")]
    first, second = pmi.foreign_solutions(rollouts, 2, seed=0)
    # after 1 come 2, 3, 4, 0; a worked solution is first, then the siblings in this order
    assert first[2:4] == ("three, worked out",) * 2 and second[2:4] == ("two",) * 2
    assert first[6:8] == ("one, worked out",) * 2 and second[6:8] == ("two",) * 2
    # of 2 and 4, which share a text, it is not foreign; of the siblings only 0's is left
    assert {*first[4:6], *first[8:]} < {"zero", "zero again"}
    assert second[4:6] == ("three, worked out",) * 2 and second[8:] == ("one, worked out",) * 2
    assert first[:2] == ("two",) * 2 and second[:2] == ("one, worked out",) * 2
    assert pmi.foreign_solutions(rollouts, 2, seed=0) == [first, second]
    # two problems: the other one's solution and its bare answer
    first, second = pmi.foreign_solutions(rollouts[2:4] + rollouts[6:8], 2, seed=0)
    assert first[0] == "three, worked out" and second[0] == "The answer is \\boxed{3}."
    with pytest.raises(antisd.InputError, match="other problems"):
        pmi.foreign_solutions(rollouts[2:4], 2, seed=0)


def test_kinds_of_tokens():
    class Words:
        all_special_ids = [9]

    texts = ["Wa", "it", ",", " 1", "2", " +", " \\", "frac", "{", " so", "\n\n", "", " but", "ter",
             " let's", "</s>"]
    kinds = pmi.token_kinds(Words(), [0] * 15 + [9], texts)
    names = dict(zip("dowtpe", pmi.KINDS))
    assert [pmi.KINDS[k] for k in kinds] == [names[c] for c in "wwpddooootppttwe"]


def scored(own, others, pi, answer=None):
    """compare() of responses of one token each."""
    column = lambda values: torch.tensor(values)[:, None].double()  # noqa: E731
    u = {"own": [column(own)], "other": [column(other) for other in others]}
    s = column(pi).log()
    return pmi.compare(s, u, torch.ones_like(s).bool(), torch.zeros_like(s).long())


def test_the_share_is_what_the_own_solution_adds_by_hand():
    # weights .5, .5 and 0: the nats on the certain third token count for nothing
    rows, (share, error) = scored([-1.0, 2.0, -9.0], [[-1.0, 0.5, 0.0], [-0.5, 0.0, 0.0]],
                                  [0.5, 0.5, 1.0])
    # first: (0 + .5) / 2 - .5 = -.25; second: (1.5 + 2) / 2 - .5 = 1.25
    assert share == pytest.approx((-0.25 + 1.25) / (1 + 2))
    # a response off by above - share * below: -.25 - 1/3, 1.25 - 2/3; two of weight above 0
    assert error == pytest.approx((2 * 2 * (7 / 12) ** 2) ** 0.5 / 3)
    own, other = [r for r in rows if r["kind"] == "all, by weight"]
    assert own["u"][0] == pytest.approx(0.5) and own["size"][0] == pytest.approx(1.5)
    # overlap: 1 and .5 of the first, .5 and 0 of the second, of 3
    assert other["shared"][0] == pytest.approx((1.5 + 0.5) / 2 / 3)
    [plain] = [r for r in rows if r["kind"] == "all" and r["c"] == "own"]
    assert plain["below"][0] == pytest.approx(2 / 3) and plain["tokens"] == 3
    assert plain["u"] == pytest.approx((-8 / 3, (3 / 2 * sum(
        (x + 8 / 3) ** 2 for x in (-1, 2, -9))) ** 0.5 / 3))


def test_what_has_the_other_sign_is_not_there():
    u, v = torch.tensor([1.0, 1.0, -2.0, 0.0]), torch.tensor([3.0, -3.0, -1.0, 5.0])
    assert pmi.overlap(u, v).tolist() == [1, 0, 1, 0]


def test_no_sibling_stands_in_for_the_solution_to_be_shown(monkeypatch):
    rollouts = [response(i // 2, 1.0, f"right {i}") for i in range(6)]
    monkeypatch.setattr(pmi, "teacher_prompts", lambda tokenizer, rollouts, size, *rest: (
        [text for i in range(0, len(rollouts), size) for text, _ in antisd.pick_solutions(
            rollouts[i:i + size], random.Random(0))], []))
    cfg = pmi.View(model="m", data="d", contexts="own,other,answer", samples=2)
    views = pmi.teacher_views(cfg, None, rollouts, 99)
    assert views["answer"] == [[f"The answer is \\boxed{{{i // 2}}}." for i in range(6)]]
    assert [*map(tuple, views["other"])] == pmi.foreign_solutions(rollouts, 2, 0)
    assert "right" in views["other"][0][0]


def test_what_any_solution_does_is_not_reading():
    torch.manual_seed(0)
    style, noise = torch.randn(2000), 0.5 * torch.randn(3, 2000)
    pi, (a, b, c) = [0.5] * 2000, (style + noise).tolist()
    assert abs(scored(a, [b, c], pi)[1][0]) < 0.05
    a = (style + noise[0] + 2 * torch.randn(2000)).tolist()
    assert scored(a, [b, c], pi)[1][0] > 0.5


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """The toy's tokenizer with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / "model")
    config = small("qwen3", vocab_size=len(tokenizer), head_dim=16,
                   eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def preflight(model, tmp_path, **settings):
    return pmi.view(pmi.View(**dict(
        model=model, data=str(TOY / "test.jsonl"), limit=3, samples=2, max_tokens=20,
        contexts="own,other,answer", output=str(tmp_path / "x.html")) | settings))


def test_the_preflight_says_no_to_random_weights(random_model, tmp_path, capsys):
    data = preflight(random_model, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("the teacher reads c: no (") and "own; yes from 20% on" in lines[-1]
    assert re.fullmatch(r"\d+% of the responses hold a box", lines[1])
    assert lines[3].startswith("kind of token")
    assert data == json.loads(Page((tmp_path / "x.html").read_text()).data)
    assert data["contexts"]["verdict"] == lines[-1]
    plain = preflight(random_model, tmp_path, contexts="own")
    assert "reads" not in capsys.readouterr().out and data | plain == data     # as without it


def test_the_teacher_is_shown_what_a_context_names(random_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pmi, "score", lambda policy, prompts, responses, *rest: seen.append(
        (prompts, responses)) or antisd.score(policy, prompts, responses, *rest))
    preflight(random_model, tmp_path)
    tokenizer, *_ = antisd.load_tokenizer(random_model, {})
    problems = antisd.load_problems(str(TOY / "test.jsonl"), limit=3)
    students, own, one, two, answer = [[tokenizer.decode(ids) for ids in prompts]
                                       for prompts, _ in seen]
    assert all(responses == seen[0][1] for _, responses in seen)
    words = [" ".join(tokenizer.tokenize(p["solution"])) for p in problems]
    for i in range(6):
        p = i // 2
        assert words[p] in own[i] and words[(p + 1) % 3] in one[i] and words[(p + 2) % 3] in two[i]
        assert words[p] not in one[i] + two[i] + answer[i] + students[i]
        assert answer[i] == own[i].replace(words[p], " ".join(tokenizer.tokenize(
            "The answer is \\boxed{" + problems[p]["answer"] + "}.")))
        assert one[i] == own[i].replace(words[p], words[(p + 1) % 3])


def test_the_preflight_says_yes_where_only_the_own_solution_counts(random_model, tmp_path,
                                                                   monkeypatch, capsys):
    calls = []

    def fake(policy, prompts, responses, *rest):
        calls.append(prompts)
        torch.manual_seed(len(calls))
        size = 1.0 if len(calls) == 2 else 0.1           # the second is the teacher on its own c
        values = torch.full((len(prompts), max(map(len, responses))), -0.7)
        return values + size * torch.randn(values.shape) * (len(calls) > 1), -values

    monkeypatch.setattr(pmi, "score", fake)
    preflight(random_model, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith("the teacher reads c: yes (")


def test_the_verdict_says_how_sure_it_is():
    assert pmi.verdict(0.07, 0.03) == ("the teacher reads c: no (7% +- 3% of u is this solution's "
                                       "own; yes from 20% on)")
    assert pmi.verdict(0.2, 0.03) == ("the teacher reads c: yes (20% +- 3% of u is this solution's "
                                      "own; yes from 20% on; too few responses to be sure)")


def test_the_output_is_tried_before_a_model_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x.html", tmp_path):
        with pytest.raises(antisd.InputError, match="cannot write"):
            preflight("/no/such/model", tmp_path, output=str(output))
    with pytest.raises(antisd.InputError, match="/no/such/model"):
        preflight("/no/such/model", tmp_path, output=str(tmp_path / "new" / "x.html"))
    assert not [*(tmp_path / "new").iterdir()]           # the trial leaves nothing


@pytest.mark.parametrize("contexts", ["other", "own,others", ""])
def test_contexts_that_are_none(contexts):
    with pytest.raises(antisd.InputError, match="--contexts"):
        pmi.View(model="m", data="d", contexts=contexts)


# --- The curves -----------------------------------------------------------------------------------


def write_csv(path, arms):
    """arms: {arm: {seed: accuracies, two steps apart}}; between them a row without accuracy."""
    lines = ["arm,seed,step,eval_accuracy,reward"]
    for arm, seeds in arms.items():
        for seed, values in seeds.items():
            for i, value in enumerate(values):
                lines += [f"{arm},{seed},{2 * i},{value},0.5", f"{arm},{seed},{2 * i + 1},,"]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


HAND = {"sd": {0: [.1, .05, 0, 0]}, "antisd": {0: [.1, .5, .7, .6], 1: [.1, .3, .9, .8]},
        "grpo": {0: [.1, .2, .4, .3], 1: [.1, .2, .2, .3]}, "grpo_on": {0: [.4, .4, .4, .4]}}


def test_table_by_hand(tmp_path, capsys):
    arms, warnings = curves.read_runs([write_csv(tmp_path / "r.csv", HAND)])
    assert list(arms) == ["grpo", "sd", "antisd", "grpo_on"] and not warnings
    facts = curves.compare(arms, [.5, .7])
    # GRPO's mean is .1 .2 .3 .3: its best is .3, first at step 4; antisd's is .1 .4 .8 .7
    assert facts["grpo"]["best_step"] == 4 and facts["grpo"]["best"][0] == pytest.approx(.3)
    assert facts["grpo"]["speed_up"] == 1 and "end_gap" not in facts["grpo"]
    row = facts["antisd"]
    assert row["best_step"] == 4 and row["best"] == pytest.approx((.8, .02 ** .5))       # .7, .9
    assert row["end"] == pytest.approx((.7, .02 ** .5)) and row["speed_up"] == 4 / 2
    assert row["end_gap"] == pytest.approx((.4, .1))     # .6 - .3 and .8 - .3
    assert row["best_gap"] == pytest.approx((.5, .2))    # .7 - .4 and .9 - .2
    assert row["reach"] == {.5: [2, 4], .7: [4, 4]}
    assert facts["sd"]["end_gap"] == (pytest.approx(-.3), None)          # one seed in common
    curves.main([str(tmp_path / "r.csv"), "--arms", "antisd,sd,grpo_on",
                 "--thresholds", "50", "90"])
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert lines[0] == ["antisd", "2", "70.0 +- 14.1", "+40.0 +- 10.0", "80.0 +- 14.1 @4",
                        "+50.0 +- 20.0", "3 (2 to 4)", "never (4 to never, 1 of 2 never)", "2.0x"]
    assert lines[1] == ["sd", "1", "0.0", "-30.0", "10.0 @0", "-30.0", "never", "never", "never"]
    assert lines[2][-1] == "at once"                     # it starts above GRPO's best


def test_paired_difference_by_hand():
    mean, error = curves.paired({1: .5, 2: .7, 3: .9}, {1: .4, 2: .3, 9: .0})
    assert mean == pytest.approx(.25) and error == pytest.approx(.15)    # gaps .1 and .4
    assert curves.paired({1: .5}, {2: .5}) is None


def write_run(folder, method, values, seed=0, **flags):
    folder.mkdir()
    flags = {"method": method, "seed": seed, "model": "m", "lr": 1e-6, "init_from": "", **flags}
    (folder / "config.json").write_text(json.dumps({"flags": flags, "source": "abc"}))
    rows = [{"step": step, "reward": .5, "eval_accuracy": value if step % 2 == 0 else None}
            for step, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    return str(folder)


def test_arms_of_folders_and_what_is_warned_about(tmp_path):
    runs = [write_run(tmp_path / "a0", "antisd", [.1, 0, .5], 0, lam=.5, tau_down=.93),
            write_run(tmp_path / "a1", "antisd", [.1, 0, .5], 1, lam=.5, tau_down=.93),
            write_run(tmp_path / "a2", "antisd", [.1, 0, .5], 0, lam=.5, tau_down=0),
            write_run(tmp_path / "g0", "grpo", [.1, 0, .3], 0, lam=.1, tau_down=.93),
            write_run(tmp_path / "g1", "grpo", [.9, 0, .9], 0, init_from="runs/g0")]
    arms, warnings = curves.read_runs(runs)
    assert {arm: list(seeds) for arm, seeds in arms.items()} == {
        "grpo": ["0"], "grpo init_from=run": ["0"], "antisd": ["0", "1"],
        "antisd tau_down=0": ["0"]}
    assert not warnings and curves.baseline(arms) == "grpo"
    assert curves.compare(arms)["antisd"]["best_gap"] == (pytest.approx(.2), None)
    assert list(curves.read_runs(runs[-1:])[0]) == ["grpo init_from=run"]
    del arms["grpo"]                                     # what goes on from a run is no baseline
    assert curves.baseline(arms) is None and "speed_up" not in curves.compare(arms)["antisd"]
    runs.append(write_run(tmp_path / "s", "sd", [.1, 0, .2, 0, .2], 0, model="other", lr=.5))
    runs.append(write_run(tmp_path / "e", "no_teacher", [None, 0, None]))
    arms, warnings = curves.read_runs(runs)
    text = "\n".join(warnings)
    assert "differ in model: m (" in text and "other (sd lr=0.5 model=other)" in text
    assert "differ in lr" in text and "differ in last step: 2 (" in text and "4 (sd" in text
    assert "no_teacher model=m is left out" in text and "no_teacher model=m" not in arms


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    file = Path(write_csv(tmp_path / "r.csv", HAND))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert list(curves.read_runs([str(file)])[0]) == ["grpo", "sd", "antisd", "grpo_on"]


def test_picture_has_a_line_per_seed_and_arm(tmp_path):
    for suffix in ("svg", "png"):
        curves.main([write_csv(tmp_path / "r.csv", HAND),
                     "--output", str(tmp_path / f"c.{suffix}")])
    svg = (tmp_path / "c.svg").read_text()
    assert svg.count("stroke-opacity: 0.35") == 4        # two seeds of two arms, thin
    for colour in curves.COLOURS[:4]:
        assert colour in svg
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("argv, text", [
    (["/no/such/run"], "no such folder"), ([str(HERE)], "no config.json"), (["x.csv"], "cannot be"),
    ([], "required"), (["BAD"], "line 2"), (["SHORT"], "no column eval_accuracy, seed"),
    (["GOOD", "--arms", "x"], "there are grpo"), (["GOOD", "GOOD"], "twice"),
    (["GOOD", "--output", "c.foo"], "cannot write c.foo")])
def test_bad_input_of_curves_is_one_line(argv, text, tmp_path):
    files = {"GOOD": write_csv(tmp_path / "good.csv", HAND), "BAD": str(tmp_path / "bad.csv"),
             "SHORT": str(tmp_path / "short.csv")}
    Path(files["BAD"]).write_text("arm,seed,step,eval_accuracy\ngrpo,0,0,much\n")
    Path(files["SHORT"]).write_text("arm,step\ngrpo,0\n")
    with pytest.raises(antisd.InputError, match=text) as error:
        curves.main([files.get(argument, argument) for argument in argv])
    assert "\n" not in str(error.value)


# --- The memory table -----------------------------------------------------------------------------


def small(kind, **settings):
    return AutoConfig.for_model(kind, **dict(
        vocab_size=500, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True) | settings)


@pytest.mark.parametrize("config", [
    small("qwen3", head_dim=32), small("llama", tie_word_embeddings=False),
    small("olmo3", sliding_window=8, num_key_value_heads=4, pad_token_id=0)],
    ids=lambda config: config.model_type)
def test_parameters_and_cache_are_exact(config):
    model, cache = AutoModelForCausalLM.from_config(config), DynamicCache(config=config)
    assert memory.count_parameters(config) == sum(p.numel() for p in model.parameters())
    for ids in torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long):
        model(input_ids=ids, past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * memory.cache_bytes(config, 12, torch.float32) == held


class Live(TorchDispatchMode):
    """The most bytes that tensors held at a time, of all that some operation has touched."""

    def __init__(self, held):
        super().__init__()
        self.alive, self.peak = weakref.WeakKeyDictionary(), 0
        self.see(held)

    def see(self, values):
        for x in tree_leaves(values):
            x = x._local_tensor if isinstance(x, DTensor) else x
            if isinstance(x, torch.Tensor):
                self.alive[x.untyped_storage()] = True
        self.peak = max(self.peak, sum(storage.nbytes() for storage in list(self.alive)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.see((args, out))
        return out


def micro_batch(policy, rows, prompt, response):
    """The trainer's forward pass over one micro-batch, and a loss."""
    logp, _ = policy(*antisd.pack([[2] * prompt] * rows, [[3] * response] * rows,
                                  torch.device("cpu")))
    return antisd.policy_loss(logp, logp.detach(), torch.ones_like(logp), torch.ones_like(logp), 1)


def split_policy(config, checkpointing):
    policy = antisd.Policy(AutoModelForCausalLM.from_config(config), [1])
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    antisd.shard(policy, torch.float32, torch.device("cpu"))
    return policy


WINDOWS = dict(sliding_window=16, num_key_value_heads=4, pad_token_id=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config, rows, response", [
    (small("qwen3", head_dim=16), 4, 112), (small("qwen3", head_dim=16, vocab_size=4000), 4, 112),
    (small("olmo3", **WINDOWS, max_position_embeddings=1024), 1, 1008)],
    ids=["plain", "many words", "windows"])
def test_peak_of_training_is_that_of_a_real_update(config, rows, response, checkpointing):
    policy = split_policy(config, checkpointing)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for _ in range(2):                                   # the first step has no optimizer state yet
        state = [[*x.values()] for x in optimizer.state.values()]
        with Live([*policy.parameters(), state]) as live:
            for _ in range(2):
                micro_batch(policy, rows, 16, response).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    plan = memory.Plan(max_prompt_tokens=16, max_tokens=response, micro_tokens=512, gpus=[1],
                       dtype="float32", gradient_checkpointing=checkpointing, rollout_batch=8)
    need = memory.estimate(config, memory.count_parameters(config), 1, plan)
    # what is decoded and scored takes less here; the estimate is never under the truth by much
    assert 0.97 < need["peak"] * 2**30 / live.peak < 1.18


@pytest.mark.parametrize("config, tokens", [
    (small("qwen3", hidden_size=128, intermediate_size=384, head_dim=32), 300),
    (small("olmo3", **WINDOWS), 500)], ids=["plain", "windows"])
def test_scoring_is_that_of_a_real_pass_over_a_response_and_a_solution(config, tokens):
    policy = split_policy(config, False)
    with torch.no_grad(), Live([*policy.parameters()]) as live:
        held = live.peak
        micro_batch(policy, 1, 12 + tokens, tokens)
    plan = memory.Plan(max_prompt_tokens=12, max_tokens=tokens, micro_tokens=8, dtype="float32")
    need = memory.estimate(config, memory.count_parameters(config), 1, plan)
    assert 0.8 < need["scoring"] * 2**30 / (live.peak - held) < 1.2


def test_masks_are_those_that_the_layers_keep():
    """Beyond the window: one bool mask and, in each sliding layer, a bias in the layer's dtype."""
    config, kept = small("olmo3", **WINDOWS, dtype="bfloat16"), {}

    def keep(x):
        if x.shape[-2:] == (256, 256):
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = AutoModelForCausalLM.from_config(config)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.base_model(input_ids=torch.zeros(1, 256, dtype=torch.long), use_cache=False)
    mask, bias = memory.mask_bytes(config, 256, 256, 2)
    assert mask == 256 * 256 and [*kept.values()] == [bias] * 3 and hidden[0].requires_grad
    assert memory.mask_bytes(config, 15, 15, 2) == (0, 0)        # within the window of 16
    assert memory.mask_bytes(small("qwen3"), 999, 999, 2) == (0, 0)


def test_offload_moves_the_state_to_the_host():
    config = memory.load_config("Qwen3-4B")
    count = memory.count_parameters(config)

    def need(**settings):
        return memory.estimate(config, count, settings.pop("gpus", 1), memory.Plan(
            max_tokens=4096, rollout_batch=8, **settings))

    whole, split = need(), need(offload=True)
    assert whole["state"] == pytest.approx(12 * count / 2**30) and whole["host: state"] == 0
    assert split["state"] == 0 and split["host: state"] == pytest.approx(16 * count / 2**30)
    assert split["peak"] < 21 < 60 < whole["peak"]       # a card of 24 GB with a tenth to spare
    # weights, moments and the export's two copies: 18 bytes a weight
    assert split["host: peak"] == pytest.approx(18 * count / 2**30)
    # the float32 gradients are on the GPU without it; on the way there is a layer more in float32
    layer = (count - 151936 * 2560) / 36
    assert whole["gradients"] - split["gradients"] == pytest.approx(4 * count / 2**30)
    assert split["layers"] - whole["layers"] == pytest.approx(4 * layer / 2**30)
    # a machine of eight ranks, then two machines
    assert need(gpus=8, offload=True)["host: state"] == pytest.approx(16 * count / 2**30)
    assert need(gpus=16, offload=True)["host: state"] == pytest.approx(8 * count / 2**30)


def test_table_of_the_built_in_models_and_of_a_config_json(tmp_path, capsys):
    file, plan = tmp_path / "config.json", dict(max_tokens=8192, rollout_batch=16)
    file.write_text(memory.load_config("Qwen3-8B").to_json_string())
    memory.table(memory.Plan(model=[str(file), "Qwen3-30B-A3B", "Qwen3-0.6B"], **plan))
    head, _, dense, experts, little = [line.split(" | ")
                                       for line in capsys.readouterr().out.splitlines()]
    assert len(head) == len(dense) == 16
    # as their model cards say
    assert dense[1] == "8.19B" and experts[1] == "30.53B" and little[1] == "0.60B"
    # 12 bytes of 8.19e9 over 8 GPUs; 2 x 36 layers x 8 heads x 128 x 2 bytes x 10240 tokens x 16
    assert dense[3] == f"{12 * 8190735360 / 8 / 2**30:.1f}" and dense[5] == "22.5"
    assert dense[-3] == "15.3" and experts[-3] == "455.0"        # one mapped copy, eight of experts
    config = memory.load_config("Qwen3-30B-A3B")
    split = memory.estimate(config, 30532122624, 8, memory.Plan(sampler="sharded", **plan))
    assert split["peak"] < 80 < memory.estimate(config, 30532122624, 8, memory.Plan(**plan))["peak"]


def test_a_token_step_is_timed_without_the_prompts(monkeypatch, capsys):
    """A decoder that takes 5 ms a token and 0.1 s for the prompts."""
    clock = [0.0]

    def sample(policy, prompts, group_size, tokens):
        clock[0] += 0.1 + 0.005 * tokens
        return [[1] * tokens for _ in range(len(prompts) * group_size)]

    monkeypatch.setattr(decode_bench, "sample", sample)
    monkeypatch.setattr(decode_bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(decode_bench, "bandwidth", lambda device: 1e9)
    decode_bench.bench(decode_bench.Bench(model=[str(TOY / "model")], rows=[16], tokens=40,
                                          prompt=5, group_size=8))
    line = capsys.readouterr().out.splitlines()[-1].split(" | ")
    config = memory.load_config(str(TOY / "model"))
    # float32: the weights, and 16 rows of the prompt and of half way from 10 to 40 tokens
    floor = 4 * memory.count_parameters(config) + 16 * memory.cache_bytes(config, 30, torch.float32)
    assert line[1:4] == ["16", "5.0", "3200"] and line[4] == f"{floor / 1e6:.1f}"
    assert line[5] == f"{5e6 / floor:.1f}"


def test_the_decoder_that_is_timed_is_the_trainers(capsys):
    decode_bench.bench(decode_bench.Bench(model=[str(TOY / "model")], rows=[2], tokens=8, prompt=4,
                                          group_size=2, repeats=1))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| {TOY / 'model'} | 2 | ")


@pytest.mark.parametrize("script, argv", [
    ("decode_bench.py", ["--rows", "0"]), ("decode_bench.py", ["--model", "/no/such"]),
    ("memory.py", ["--model", "/no/such"]), ("memory.py", ["--gpus", "3"]),
    ("pmi.py", ["--model", str(TOY / "model")]), ("pmi.py", ["--model", "/no/such", "--data", "x"]),
    ("pmi.py", ["--model", str(TOY / "model"), "--data", str(TOY / "test.jsonl"), "--max_tokens",
                "99999"]), ("curves.py", ["/no/such"])])
def test_the_commands_exit_with_2_and_one_line(script, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(HERE / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.startswith(f"{script}: error: ") and err.count("\n") == 1


# --- The README and the requirements --------------------------------------------------------------

def readme_peak(words, gpus, key="peak"):
    """What memory.py says of a trainer's command line, in GiB."""
    cfg = antisd.parse_config(words)
    name = max((n for n in memory.SHAPES if n in cfg.model), key=len)
    plan = memory.Plan(gpus=[gpus], **{
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(memory.Plan)
        if f.name not in ("model", "gpus", "dtype")})
    config = memory.load_config(name)
    return memory.estimate(config, memory.count_parameters(config), gpus, plan)[key]


def test_every_gpu_memory_figure_of_the_readme_is_what_memory_py_says():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    recipes = [shlex.split(line) for line in readme.splitlines() if line.startswith("--model ")]
    tiers = re.findall(r"\| `torchrun antisd.py (--model .*?)` \| ([\d.]+) GiB \|", readme)
    assert len(tiers) == 3 and len(recipes) == 5
    for command, figure in tiers:
        assert f"{readme_peak(shlex.split(command), 1):.1f}" == figure, command
    offload = next(shlex.split(command) for command, _ in tiers if "--offload" in command)
    host = re.search(r"the same, (\d+) GiB of host memory", readme)[1]
    assert f"{readme_peak(offload, 1, 'host: peak'):.0f}" == host
    peaks = sorted(readme_peak(words, 8) for words in recipes)
    assert f"| {peaks[0]:.0f} to {peaks[-1]:.0f} GiB each |" in readme
    table = {line.split(" | ")[0]: line.strip(" |").split(" | ")[1:] for line in
             readme[readme.index("## Memory and speed"):].splitlines() if line.startswith("| ")}
    for i, name in enumerate(("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Olmo-3-7B",
                              "Qwen3-30B-A3B")):
        words = ["--model", name, "--max_tokens", "8192"]
        words += ["--rollout_batch", "16"] if "Olmo" in name else []
        words += ["--sampler", "sharded"] if "30B" in name else []
        figures = [table[key][i] for key in (
            "| one GPU", "| each of eight", "| host memory of eight ranks, peak")]
        one = f"{readme_peak(words, 1):.0f}" if "30B" not in name else "-"     # it fits no card
        assert figures == [one, f"{readme_peak(words, 8):.0f}",
                           f"{readme_peak(words, 8, 'host: peak'):.0f}"], name


def test_what_the_readme_names_exists():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    scripts = {file.relative_to(HERE.parent).as_posix(): file.read_text(encoding="utf-8")
               for file in HERE.parent.rglob("*.py")}
    code, records = "\n".join(scripts.values()), test_antisd.KEYS + test_antisd.TEACHERS
    others = {"help", "nproc-per-node", "index-url"}
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", readme)) - others:
        name = flag.replace("-", "_")
        assert re.search(rf'^    {name}: |"--{flag}"', code, re.M), f"--{flag}"
    for name in set(re.findall(r"\b(?:toy|analysis)/[\w/]+(?:\.\w+)?", readme)):
        assert (HERE.parent / name).exists(), name
    for name in set(re.findall(r"[\w/]+\.py\b", readme)):
        assert any(file == name or file.endswith("/" + name) for file in scripts), name
    for name in set(re.findall(r"`(\w+)\(", readme)):
        assert re.search(rf"^ *(def|class) {name}\b", code, re.M), name
    for name in set(re.findall(r"`((?:context|seconds)/\w+)`", readme)):
        assert name in [*records, "seconds/eval"], name


def test_the_readmes_control_shows_the_solutions_of_the_group_before():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    control = re.search(r"`teacher_prompts\(\)` write `(pick_solutions\(.*?\))`", readme)[1]
    for start, shown in (0, "cc"), (2, "aa"), (4, "bb"):
        assert shown == eval(control, {"pick_solutions": lambda group, rng: group, "rng": None,
                                       "rollouts": "aabbcc", "start": start, "group_size": 2})


def test_what_is_imported_is_in_the_requirements():
    known = {"antisd", *sys.stdlib_module_names}
    for line in (HERE.parent / "requirements.txt").read_text().splitlines():
        known.add(re.match(r"[\w-]+", line)[0].replace("-", "_"))
    files = [HERE.parent / name for name in ("antisd.py", "eval.py")]
    for node in ast.walk(ast.parse("".join(file.read_text(encoding="utf-8") for file in files))):
        found = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module] if isinstance(node, ast.ImportFrom) else [])
        assert {name.split(".")[0] for name in found} <= known
