"""What the scripts in analysis/ must prove: `python -m pytest -q analysis`; no network, no GPU."""
import html.parser
import json
import math
import os
import re
import runpy
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
import memory
import pmi

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
            [s.exp(), t.exp(), t - s, -antisd.phi(t - s), H_S, H_T], 1).float(), atol=6e-3, rtol=6e-3)
        assert "".join(shown["tokens"]) == tokenizer.decode(r.ids)
        assert shown["view"] == tokenizer.decode(view) and shown["note"].endswith(source)


def test_pieces_join_to_the_text_even_where_a_character_is_several_tokens():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    found = pmi.pieces(Bytes(), list("aé🎉 b".encode()))
    assert len(found) == 9 and "".join(found).replace("\ufffd", "") == "aé🎉 b"


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
    curves.main([str(tmp_path / "r.csv"), "--arms", "antisd,sd,grpo_on", "--thresholds", "50", "90"])
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
        "grpo": ["0"], "grpo init_from=run": ["0"], "antisd": ["0", "1"], "antisd tau_down=0": ["0"]}
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


def test_picture_has_a_line_per_seed_and_arm(tmp_path):
    for suffix in ("svg", "png"):
        curves.main([write_csv(tmp_path / "r.csv", HAND), "--output", str(tmp_path / f"c.{suffix}")])
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_training_is_that_of_a_real_update(checkpointing):
    policy = antisd.Policy(AutoModelForCausalLM.from_config(small("qwen3", head_dim=16)), [1])
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    antisd.shard(policy, torch.float32, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    cfg = antisd.Config(model="m", micro_tokens=512, gradient_checkpointing=checkpointing)
    rollouts = [antisd.Rollout({"prompt": [2] * 16}, [3] * 112, "", False, 1.0) for _ in range(8)]
    for _ in range(2):                                   # the first step has no optimizer state yet
        with Live([*policy.parameters(), [[*x.values()] for x in optimizer.state.values()]]) as live:
            antisd.update(policy, optimizer, rollouts, torch.ones(8, 112),
                          lambda rows, s, entropy: torch.ones_like(s), cfg)
    plan = memory.Plan(max_prompt_tokens=16, max_tokens=112, micro_tokens=512, dtype="float32",
                       gpus=[1], gradient_checkpointing=checkpointing, rollout_batch=8)
    config = policy.model.config
    need = memory.estimate(config, memory.count_parameters(config), 1, plan)
    assert need["peak"] * 2**30 == pytest.approx(live.peak, rel=0.12)


def test_table_of_the_built_in_models_and_of_a_config_json(tmp_path, capsys):
    file, plan = tmp_path / "config.json", dict(gradient_checkpointing=True, rollout_batch=16)
    file.write_text(memory.load_config("Qwen3-8B").to_json_string())
    memory.table(memory.Plan(model=[str(file), "Qwen3-30B-A3B"], **plan))
    _, _, dense, experts = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert dense[1] == "8.19B" and experts[1] == "30.53B"        # as their model cards say
    # 12 bytes of 8.19e9 over 8 GPUs; 2 x 36 layers x 8 heads x 128 x 2 bytes x 10240 tokens x 16
    assert dense[3] == f"{12 * 8190735360 / 8 / 2**30:.1f}" and dense[5] == "22.5"
    assert dense[-2] == "15.3" and experts[-2] == "455.0"        # one mapped copy, eight of experts
    config = memory.load_config("Qwen3-30B-A3B")
    split = memory.estimate(config, 30532122624, 8, memory.Plan(sampler="sharded", **plan))
    assert split["peak"] < 80 < memory.estimate(config, 30532122624, 8, memory.Plan(**plan))["peak"]


@pytest.mark.parametrize("script, argv", [
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
