"""What eval.py must prove. The tiny models and the helpers are those of test_antisd.py."""
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

import antisd
import eval as evaluation
from test_antisd import (ENV, HERE, TOKENIZER, main_on, one_process, read, root, save, spy, tiny,
                         write)


def eval_config(root, output, **flags):
    small = dict(model=str(root / "qwen3"), data=str(root / "train.jsonl"), max_tokens=8, samples=4,
                 rollout_batch=6, output=str(output))
    Path(output).mkdir(exist_ok=True)                    # main makes it otherwise
    return evaluation.EvalConfig(**small | flags)


def eval_main(*parts):
    return main_on(*parts, name="eval.py", run=evaluation.measure, kind=evaluation.EvalConfig)


def test_pass_at_k_equals_enumeration_of_all_draws():
    for n, c in [(n, c) for n in (1, 4, 7) for c in range(n + 1)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, draws)) / len(draws), abs=1e-15)
    for n, c, k in (4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(n, c, k)
    assert evaluation.pass_at_k(100_000, 50_000, 1) == 0.5
    assert evaluation.pass_at_k(20_000, 1, 19_999) == pytest.approx(0.99995, abs=1e-12)


def test_results_equal_a_recount_by_hand(root, tmp_path):
    out = tmp_path / "out"
    evaluation.measure(eval_config(root, out, max_tokens=48, model=str(root / "llama")))
    rows, counts = read(out / "responses.jsonl"), [0] * 7
    for n, r in enumerate(rows):
        i, j = divmod(n, 4)
        assert (r["benchmark"], r["problem_id"], r["sample"]) == ("train", i, j)
        assert r["correct"] == antisd.is_correct(r["response"], str(i % 2))
        assert 1 <= r["tokens"] <= 48 and (not r["truncated"] or r["tokens"] == 48)
        counts[i] += r["correct"]
    mean, complete = sum(counts) / 28, [r["correct"] for r in rows if not r["truncated"]]
    boxes = [antisd.extract_boxed(r["response"]) for r in rows]
    assert 0 < mean < 1 and 0 < len(complete) < 28 and None in boxes     # else nothing is shown
    assert json.loads((out / "results.json").read_text())["results"] == {"train": {
        "n": 7, "k": 4, "accuracy": pytest.approx(mean),
        "error": pytest.approx((sum((c / 4 - mean)**2 for c in counts) / 6 / 7)**0.5),
        "pass": {"1": pytest.approx(mean),
                 "2": pytest.approx(sum(1 - (4 - c) * (3 - c) / 12 for c in counts) / 7),
                 "4": pytest.approx(sum(c > 0 for c in counts) / 7)},
        "truncated": pytest.approx(1 - len(complete) / 28),
        "accuracy_complete": pytest.approx(sum(complete) / len(complete)),
        "no_answer": pytest.approx(boxes.count(None) / 28),
        "length": pytest.approx(sum(r["tokens"] for r in rows) / 28)}}


def test_benchmarks_are_the_papers_and_count_alike(root, tmp_path, monkeypatch, capsys):
    assert {name: b[2:4] for name, b in evaluation.BENCHMARKS.items()} == {
        "aime24": (30, 32), "aime25": (30, 32), "aime26": (30, 32), "hmmt25": (30, 32),
        "minerva": (272, 4), "math500": (500, 4), "gsm8k": (1319, 1), "amc23": (40, 32)}
    for name, rows in ("aime24", 3), ("amc23", 5):
        path = write(tmp_path / f"{name}.jsonl", [{"problem": f"n{i} a", "answer": str(rows // 5)}
                                                  for i in range(rows)])
        monkeypatch.setitem(evaluation.BENCHMARKS, name,
                            evaluation.Benchmark(path, "train", rows, rows - 1))
    cfg = eval_config(root, tmp_path, benchmarks="aime24, amc23", data="", samples=0, max_tokens=30)
    evaluation.measure(cfg)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    a, b, mean = results["aime24"], results["amc23"], results["average"]
    assert (a["n"], a["k"], b["n"], b["k"]) == (3, 2, 5, 4) and a["accuracy"] != b["accuracy"]
    for key in "accuracy", "truncated", "no_answer", "length":
        assert mean[key] == pytest.approx((a[key] + b[key]) / 2)
    assert mean["error"] == pytest.approx((a["error"]**2 + b["error"]**2)**0.5 / 2) != 0
    text = capsys.readouterr().out.splitlines()[-4:]
    assert [line[:8].strip() for line in text] == ["", "aime24", "amc23", "average"]
    assert text[2].split()[1:4] == ["5", "4", f"{100 * b['accuracy']:.1f}"]
    monkeypatch.setitem(evaluation.BENCHMARKS, "amc23", evaluation.Benchmark(path, None, 6, 1))
    with pytest.raises(antisd.InputError, match="amc23 .* has 5 problems instead of 6"):
        evaluation.measure(cfg)


def test_greedy_is_one_sample_of_the_trainers_prompt(root, tmp_path, monkeypatch):
    found, seen = [], spy(monkeypatch, "sample")
    # cold, or with a nucleus of one token, sampling is greedy, too
    for i, (temperature, top_p) in enumerate(((0, 0.9), (1e-4, 1.0), (1.5, 1e-6))):
        evaluation.measure(eval_config(root, tmp_path / str(i), samples=int(i > 0), limit=3,
                                       temperature=temperature, top_p=top_p))
        found.append(read(tmp_path / str(i) / "responses.jsonl"))
    assert found[0] == found[1] == found[2] and [r["sample"] for r in found[0]] == [0] * 3
    prompts = [antisd.render(TOKENIZER, antisd.student_messages(p["problem"]), {})
               for p in antisd.load_problems(str(root / "train.jsonl"), limit=3)]
    assert [args[1] for args, result in seen] == [prompts] * 3


def test_killed_at_any_time_it_goes_on_to_the_same_responses(root, tmp_path, monkeypatch, capsys):
    out, cfg = tmp_path / "out", dict(samples=40, rollout_batch=2)
    words = ["--model", str(root / "qwen3"), "--data", str(root / "train.jsonl"), "--samples", "40",
             "--max_tokens", "8", "--rollout_batch", "2", "--output", str(out)]
    options = dict(cwd=HERE, env=ENV, stderr=subprocess.DEVNULL)

    def lines():
        return sum(file.read_bytes().count(b"\n") for file in out.glob("responses*.jsonl"))

    for least in 1, 90:
        process = subprocess.Popen([sys.executable, "eval.py", *words], **options)
        while lines() < least and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert least <= lines() < 280
    with filelock.FileLock(out / ".lock"):               # as a living one holds it
        code, error = eval_main(monkeypatch, capsys, *words)
    assert code == 2 and len(error) == 1 and "another process is at work" in error[0]
    # what a kill in the middle of a write leaves: another rank's part, lines twice, a half line
    rows = (out / "responses.jsonl").read_bytes().splitlines(keepends=True)
    (out / "responses.1.jsonl").write_bytes(b"".join(rows[40:45]) + rows[45][:-9])
    (out / "responses.jsonl").write_bytes(b"".join(rows[:40] + rows[39:42]) + rows[43][:20])
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    table = subprocess.check_output([sys.executable, *two, "eval.py", *words], **options)
    assert table.count(b"avg@k") == 1                    # rank 0 alone prints
    found = []
    for seed in 0, 1:
        evaluation.measure(eval_config(root, tmp_path / str(seed), seed=seed, **cfg))
        rows = read(tmp_path / str(seed) / "responses.jsonl")
        found += [tuple(r["response"] for r in rows if r["sample"] == j) for j in range(40)]
    assert (out / "responses.jsonl").read_bytes() == (tmp_path / "0/responses.jsonl").read_bytes()
    assert {p.name for p in out.iterdir()} - {".lock"} == {"responses.jsonl", "results.json"}
    assert len(set(found)) == 80                         # every sample, and every seed, is another


def test_other_settings_model_or_problems_are_refused_and_named(root, tmp_path):
    model, data = Path(save(tiny(), tmp_path / "model")), tmp_path / "rows.jsonl"
    write(data, [{"problem": "a", "answer": "1"}])

    def evaluate(**flags):
        evaluation.measure(eval_config(root, tmp_path, model=str(model), data=str(data), **flags))

    def refused(name, **flags):
        with pytest.raises(antisd.InputError, match=f"other settings .*{name}"):
            evaluate(**flags)

    evaluate()
    for flags in (dict(temperature=1.0), dict(seed=1), dict(samples=5), dict(max_tokens=9),
                  dict(limit=3), dict(top_p=1.0), dict(dtype="bfloat16")):
        refused(*flags, **flags)
    evaluate(rollout_batch=3)                            # not a setting
    save(tiny(seed=1), model)
    refused("the model's files")
    save(tiny(), model)
    write(data, [{"problem": "a", "answer": "0"}])
    refused("the problems")
    (tmp_path / "responses.jsonl").unlink()              # as a start that failed leaves the folder
    (model / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), model / "pytorch_model.bin")
    evaluate(seed=1)
    torch.save(tiny(seed=2).state_dict(), model / "pytorch_model.bin")
    refused("the model's files", seed=1)


def test_max_tokens_is_the_papers_or_what_the_context_leaves(root, tmp_path, capsys):
    cfg = eval_config(root, tmp_path / "out", max_tokens=None, samples=1, limit=2)
    sets = evaluation.load_sets(cfg, TOKENIZER)
    room = 512 - max(len(p["prompt"]) for p in sets["train"][0])
    assert evaluation.response_length(cfg, sets, 10**6) == 32768
    evaluation.measure(cfg)
    written = json.loads((tmp_path / "out/results.json").read_text())["settings"]["max_tokens"]
    assert written == room and f"--max_tokens {room}: " in capsys.readouterr().out
    cfg.max_tokens = room - 1
    assert evaluation.response_length(cfg, sets, 512) == room - 1
    cfg.max_tokens = room + 1
    with pytest.raises(antisd.InputError, match=f"no room for --max_tokens {room + 1}"):
        evaluation.measure(cfg)


@pytest.mark.parametrize("argv, text", [
    ("", "--model is required"), ("--model m", "name --benchmarks or --data"),
    ("--benchmarks aime24,imo", "imo: choose from aime24"), ("--nonsense 1", "--nonsense"),
    ("--data d --temperature 0 --samples 2", "one sample"), ("--data d --limit -1", "--limit"),
    ("--data d --temperature nan", "--temperature"), ("--data d --top-p 0", "--top_p"),
    ("--data d --max_tokens 0", "--max_tokens"), ("--data d", "cannot load the data set d"),
    ("--data d --chat-template-kwargs []", "JSON object"), ("--data /no/x.jsonl", "/no/x.jsonl"),
    ("--data x/gsm8k.jsonl --benchmarks gsm8k", "rename it"),
])
def test_eval_errors_are_one_line_and_code_2(argv, text, root, tmp_path, monkeypatch, capsys):
    model = ["--model", str(root / "qwen3")] if argv and argv[:7] != "--model" else []
    code, error = eval_main(monkeypatch, capsys, *model, *argv.split(), "--output", str(tmp_path))
    assert code == 2 and len(error) == 1
    assert error[0].startswith("eval.py: error: ") and text in error[0]
