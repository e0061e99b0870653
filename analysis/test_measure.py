"""Runs of versus_trl.py, growth.py and gpu_hour.sh on the toy's model; cached and peak memory."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import antisd
import growth
import versus_trl

MODEL, DATA = HERE.parent / "toy/model", HERE.parent / "toy/train.jsonl"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(*command):
    ended = subprocess.run(list(map(str, command)), cwd=HERE.parent, capture_output=True, text=True,
                           timeout=300, env=ENV)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def cells(text):
    """The table's rows as lists of cells, without the head."""
    return [[cell.strip() for cell in line.strip("|\n ").split("|")]
            for line in text.splitlines() if line.startswith("|")][2:]


def test_the_peak_is_that_of_the_second_step_on():
    watch = versus_trl.Watch()
    step = watch.generating(lambda n: torch.ones(n << 18).sum(), lambda result: [1])
    for mib in 400, 50, 50:
        step(mib)
        watch.end()
    first, second, third = [s["peak_gib"] for s in watch.steps]
    assert first - second > 0.25 and second == pytest.approx(third, abs=0.1)


def test_a_new_token_is_cached_without_a_copy_of_the_tokens_before_it():
    ours, theirs, moves = antisd.RoomyLayer(), antisd.DynamicLayer(), []
    ours.room = 10
    for i, length in enumerate([5, 3, *[1] * 23]):
        states, before = (torch.randn(3, 2, length, 4), torch.randn(3, 2, length, 6)), ours.keys
        for found, expected in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(found, expected)
        if i and ours.keys.data_ptr() != before.data_ptr():
            moves.append(i)
        if i == 13:
            for layer in ours, theirs:
                layer.reorder_cache(torch.tensor([2, 0, 2]))
    assert moves == [1, 12, 14]          # after the prompt, in a full buffer, after the reordering


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_run_frees_goes_back_to_the_system():
    """Big blocks, each below a small one that stays, so that a heap could not shrink."""
    code = """if True:
        import antisd, pathlib, torch
        antisd.setup()
        status = pathlib.Path("/proc/self/status")
        resident = lambda: int(status.read_text().split("VmRSS:")[1].split()[0]) >> 10       # MiB
        before, stays = resident(), []
        for _ in range(3):
            big = []
            for _ in range(30):
                big.append(torch.ones(2 << 20))
                stays.append(torch.ones(1000))
            full = resident()
            del big
        print(full - before, resident() - before)
        torch.distributed.destroy_process_group()"""
    full, after = map(int, run(sys.executable, "-c", code).split())
    assert full > 200 and after < 50


def test_columns_by_hand():
    steps = [{"whole": 10.0, "generate": 4.0, "lengths": [2, 8], "peak_gib": 3.0},
             {"whole": 20.0, "generate": 8.0, "lengths": [1, 4], "peak_gib": 2.0}]
    assert list(versus_trl.summarise(steps).values()) == pytest.approx(
        [15 / 30, 6, 9, 1e3 * (0.5 + 2) / 2, 1e3 * 18 / 15, 3, 3.75, 6])


def test_rounds_show_their_spread():
    rounds = [{"tokens/s": 20.0}, {"tokens/s": 10.0}, {"tokens/s": 33.0}]
    assert cells(versus_trl.table({"ours": rounds, "theirs": rounds[:1]})) == [
        ["tokens/s", "21 (10 to 33)", "20"]]


@pytest.mark.parametrize("python", [[], [sys.executable]])
def test_versus_prints_its_table(python):
    if python and not importlib.util.find_spec("trl"):
        pytest.skip("needs TRL")
    out = run(sys.executable, HERE / "versus_trl.py", "--model", MODEL, "--data", DATA,
              "--trl_python", *python, "--method", "antisd", "--problems", 1, "--group", 2,
              "--max_tokens", 6, "--micro", 2, "--threads", 1)
    rows = {row[0]: list(map(float, row[1:])) for row in cells(out)}
    assert len(rows["tokens/s of a whole step"]) == 1 + len(python)
    assert all(value > 0 for row in rows.values() for value in row)
    assert max(rows["longest response, tokens"]) <= 6


def test_growth_prints_its_table():
    out = run(sys.executable, HERE / "growth.py", "--model", MODEL, "--data", DATA, "--lengths", 20,
              "--groups", "--problems", "--ranks", "--threads", 1)
    [row] = cells(out)
    assert row[:2] == ["length", "20"] and row[3] == row[5] == row[7] == ""
    assert all(float(row[i]) > 0 for i in (2, 4, 6)) and float(row[8]) > 0.1


def test_growth_forces_the_lengths_on_two_ranks(tmp_path):
    """Left to itself the toy's model ends its responses well before 70 tokens."""
    (tmp_path / "problems.jsonl").write_text("\n".join(DATA.read_text().splitlines()[:2]))
    step = growth.measure(str(tmp_path), 2, dict(
        model=str(MODEL), problems_per_step=2, group_size=3, steps=2, max_tokens=70), threads=2)
    assert step["lengths"] == [70] * 3 and step["whole"] > step["generate"] > 0


def test_exponents():
    assert growth.exponent(3.0, 12.0, 2) == "2.00" and growth.exponent(3.0, 12.0, 1) == ""
