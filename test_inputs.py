"""What users bring to antisd.py and eval.py: data, answers, flags, models, benchmarks.

The tiny models, the tokenizer and the other helpers are those of test_antisd.py.
"""
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from transformers import AutoConfig

import antisd
import eval as evaluation
from test_antisd import (END, ENV, HERE, TEACHERS, TEMPLATE, TOKENIZER, V, config, make_tokenizer,
                         one_process, read, refuse, root, run, save, spy, tiny, write)

# --- Data ----------------------------------------------------------------------------------------

WRAPPED = ("Solve the following math problem step by step. The last line of your response should "
           "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
           "problem.\n\nWhat is\n\n$x$?\n\nRemember to put your answer on its own line after "
           '"Answer:".')
SCHEMAS = {   # rows -> (problem, answer, solution)
    "plain": ([{"problem": " p ", "answer": " 3 ", "solution": "s"}], [("p", "3", "s")]),
    "final_answer": ([{"question": "p", "final_answer": "3", "solution": ""}],
                     [("p", "3", None)]),
    "aime24": ([{"id": 60, "problem": "p", "solution": "s", "answer": "033", "url": "u",
                 "year": "2024"}], [("p", "033", "s")]),
    "hmmt": ([{"problem_idx": 1, "problem": "p", "answer": "\\frac{1}{2}, -3",
               "problem_type": ["Algebra"]}], [("p", "\\frac{1}{2}, -3", None)]),
    "gsm8k": ([{"question": "q", "answer": "He has 3*4=<<3*4=12>>12\nso 1,200.\n#### 1,200"}],
              [("q", "1200", "He has 3*4=12\nso 1,200.\nThe answer is \\boxed{1,200}.")]),
    "dapo processed": ([{"prompt": "p", "solution": "34", "data_source": "math_dapo",
                         "reward_model": {"ground_truth": "34", "style": "rule"},
                         "extra_info": {"index": "a"}}], [("p", "34", None)]),
    "raw dapo": ([{"data_source": "math_dapo", "prompt": [{"content": WRAPPED, "role": "user"}],
                   "ability": "MATH", "extra_info": {"index": str(i)},
                   "reward_model": {"ground_truth": "34", "style": "rule"}} for i in range(3)],
                 [("What is\n\n$x$?", "34", None)]),
    "chat": ([{"prompt": [{"role": "system", "content": "be good"},
                          {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "p"}, {"role": "assistant", "content": "L"}],
               "Answer": "3"}],
             [("p", "3", None)]),
    "merged": ([{"problem": p, "answer": a} for p, a in ["p1", "q2", "p3", "r4"]],
               [("p", "1", None), ("q", "2", None), ("r", "4", None)]),
    "lists": ([{"question": "p", "final_answer": ["2", "3"], "solution": ["half"]}],
              [("p", "2, 3", "half")]),
    "a list as text": ([{"prompt": "p", "reward_model": {"ground_truth": '["7"]'}}],
                       [("p", "7", None)]),
    "an interval": ([{"problem": "p", "answer": "[1, 2)"}], [("p", "[1, 2)", None)]),
    "parts": ([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}],
                "answer": 5}], [("p", "5", None)]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_loads_from_every_format(schema, suffix, tmp_path):
    rows, expected = SCHEMAS[schema]
    problems = antisd.load_problems(write(tmp_path / f"data{suffix}", rows))
    assert [(p["problem"], p["answer"], p["solution"]) for p in problems] == expected
    assert len({p["id"] for p in problems}) == len(problems)


def test_hub_style_data_sets_take_config_and_split_as_arguments_or_in_their_name(tmp_path, capsys):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: test, path: b.jsonl}\n- config_name: cn\n  data_files: c.jsonl\n---\n")
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"problem": name + end, "answer": answer} for end, answer
                                           in (("", "1"), ("x", None), ("", "2"), ("2", "3"))])
    for split, name, found in ("train", "en", "a"), ("test", "en", "b"), ("train", "cn", "c"):
        for problems in (antisd.load_problems(str(tmp_path), split, config=name),
                         antisd.load_problems(f"{tmp_path}:{name}:{split}", "x", config="y")):
            assert [p["problem"] for p in problems] == [found, found + "2"]
        assert "1 rows without" in capsys.readouterr().out
    assert antisd.load_problems(f"{tmp_path}:en")[0]["problem"] == "b"       # test, if there is one
    refuse(lambda: antisd.load_problems(str(tmp_path), "train"), "config")
    path = write(tmp_path / "d.jsonl", [{"problem": p, "answer": "1"} for p in "aabbcc"])
    assert [p["problem"] for p in antisd.load_problems(path, limit=2)] == ["a", "b"]


def test_next_problems_cover_every_problem_once_an_epoch_in_a_reproducible_order():
    problems = list(range(10))
    stream = [p for position in range(0, 40, 4)
              for p in antisd.next_problems(problems, position, 4, seed=3)]
    epochs = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == problems for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4             # shuffled anew each time
    assert antisd.next_problems(problems, 8, 12, seed=3) == stream[8:20]    # whatever the count
    assert antisd.next_problems(problems, 0, 10, seed=4) != epochs[0]


# --- The reward ----------------------------------------------------------------------------------

DATA = HERE.parent / "shared" / "data"
RIGHT = r"""
61 :: 61 | 061 | +61 | 61. | 61.0 | \text{61} | (61) | {61} | \boxed{61}
007 :: 7 | 07 | 7.0
120 :: \binom{10}{3} | \dbinom{10}{7} | 5!
-12 :: -12 | −12 | - 12 | -\frac{24}{2} | 3–15
45600 :: 45,600 | 45{,}600 | 45,\!600 | 45\,600 | 45 600 | 4.56 \times 10^4 | 4.56e4
2,345,678 :: 2345678 | 2,\!345,\!678
64 :: 2^6 | 8^{2} | 4 \cdot 16 | x = 64 | a+b = 60+4 = 64 | n \approx 64 | 64 = 64
60 :: \$60 | $60$ | 60% | 60\% | 60^\circ | 60° | 60 \text{ km/h} | 60~\mathrm{m}^2 | 60 miles |
    60cm | 60 \mathrm{~kg} \mathrm{~s}^{-1} | 60\ \text{square units} | **60**
\$7.50 :: 7.5 | 7.50 \text{ dollars} | \$7.50 | \frac{15}{2}
35^\circ :: 35 | 35^{\circ} | 35 \text{ degrees} | x = 35^\circ
48 \mbox{ feet}^2 :: 48 | 48 \text{ ft}^2
\frac{7}{4} :: 7/4 | \frac74 | \dfrac{14}{8} | 1\frac{3}{4} | 1 \tfrac34 | 1 3/4 | 1.75 |
    \frac{-7}{-4} | \frac{7}4 | \frac{7}{4} \approx 1.7 | 7 / 4
-\frac{5}{2} :: -2.5 | \frac{-5}{2} | \frac{5}{-2} | -2\frac12
5\sqrt{7} :: 5\sqrt7 | 5 \sqrt 7 | 5·√7 | \sqrt{175} | 5 \cdot 7^{1/2} | 5√7 | 5sqrt(7) |
    \frac{35}{\sqrt{7}}
\sqrt{12} :: \sqrt 12 | \sqrt12 | 2\sqrt{3} | sqrt(12)
6\pi :: 6π | 6 \cdot \pi | \pi \cdot 6 | \frac{12\pi}{2} | 6\pi \text{ cm}^2 | 6pi
3^{20} \cdot 12! :: 12! \cdot 3^{20} | 12! · 3^{20} | 3^{19} \cdot 3 \cdot 12!
0.375 :: 3/8 | .375 | 0.37503 | 37.5\% | 37.5% | \sqrt{0.140625}
6.02e23 :: 6.02 \times 10^{23} | 6.02\cdot10^{23} | 6.02×10²³ | 6.02 x 10^23 | 6.02E23 |
    6.02e+23 | 60.2 \times 10^{22} \mathrm{~mol}^{-1} | N \approx 6.02\times 10^{23} | 6.02*10^23
1e-7 :: 10^{-7} | 10⁻⁷ | 0.0000001 | 1.0 \times 10^{-7}\text{ m}
4,-9 :: -9, 4 | \{4, -9\} | x = 4 \text{ or } x = -9 | -9 \text{ and } 4 | x=-9, x=4
100, 200 :: 200, 100
2 \pm \sqrt{3} :: 2-\sqrt3, 2+\sqrt3 | x = 2 \pm \sqrt{3} | \frac{4\pm\sqrt{12}}{2}
\{\pm 1, 6\} :: 6, 1, -1 | \{-1, 1, 6\}
(2, -5) :: \left(2,\,-5\right) | (x,y) = (2,-5) | (\frac42, -5)
(1,234) :: (1, 234)
[2, \infty) :: x \ge 2 | x \in [2,\infty) | \left[2, +\infty\right)
(-3, 8] :: -3 < x \leq 8 | x\in(-3,8]
(-\infty, 1) \cup (5, 6) :: (5,6)\cup(-\infty,1)
\begin{pmatrix} 1/2 & 0 \\ 3 & -1 \end{pmatrix} :: \begin{bmatrix}0.5&0\\[2pt]3&-1\end{bmatrix}
\text{Maria} :: Maria | \textbf{Maria} | \mathrm{maria} | \text{ Maria. }
\text{(D)} :: D | (D) | \textbf{(D)} | \mathrm{D}
3021_4 :: 3021_{4} | (3021)_4 | 3021_{\text{4}}
(a+1)(b-2) :: ab - 2a + b - 2 | (b-2)(1+a)
\frac{A}{B} e^{-t/\tau} :: A e^{-\frac{t}{\tau}} / B | \frac{A}{B}\exp(-t/\tau)
3 + 4i :: 4i+3 | 3+4\mathrm{i} | z = 3+4i
v_{0} t :: v_0 t | t v_{0} | x(t) = v_0 t
\sin^2 x :: 1-\cos^2 x | \sin(x)^2
\dot{q}_{0} u(t) :: u(t) \dot{q}_0
np.arctan(2/3) :: \arctan(2/3) | \tan^{-1}\left(\frac23\right)
5.2 k :: 5.2k \text{ J} | \frac{26}{5} k
x+$ $y :: y+x
-3./4 :: -\frac34 | -0.75
x=9 :: 9 | x = 9 | 9.0
y = 3x-1 :: 3x-1 | y=-1+3x | y - 3x = -1
2x+3y-4=0 :: 2x+3y=4 | 4x+6y-8=0 | 3y = 4-2x
y^{\prime}+k y=0 :: y' + ky = 0 | y' = -ky
\frac{d M}{d t}=2 M-b :: \frac{dM}{dt}+b=2M
MC=AVC :: \text{MC}=\text{AVC} | AVC = MC
6 :: \boldsymbol{6} | \color{red}{6} | {\Large 6} | ６ | 6 \text{ apples} | 6个 | 6\,\text{cm}^2 |
    \mathbf{6} | 6.0 | \frac{12}{2} | 6 meters per second | \text{6} | (6) | \{6\} | 6\%
-3 :: －3
(1,2) :: （1，2） | \left(1,2\right)
12 :: １２ | 12元
\text{Yes} :: yes | Yes | \textbf{yes}
10 :: 10\%
10\% :: 10
(n-1)! :: (n-1)! | (n - 1)!
3:4 :: 3:4 | 3 : 4
\mathbb{R}\setminus\{2\} :: \mathbb{R} \setminus \{2\}
27.0 :: 27
27 :: 27.0
"""
WRONG = r"""
120 :: \binom{10}{4} | 4!
\foo{3}{10} :: \foo{10}{3} | 30
61 :: 16 | 6 1 | 60, 61 | 60 or 61 | 60 \text{ or } 61 | 61, 62 | {60, 61} | 61.0001 | -61 | 61x |
    6.1 | 610 | 61? | 61! | 61 million | 61 \text{ thousand} | \text{not } 61 | 61 \pm 1 | 61i |
    60 < x < 62 | x \ge 61 | 61 = x | 61_7 | ? | \text{None} | (60, 61) | \infty |
    60.99999999999999999999999 | \sqrt{3721.0001} | \frac{61}{0} | 61\text{x} | 61ab | 61\pi |
    61 \text{ not} | 61abc | 61?! | 7 or 61 | 61 \text{ is what the others say it must be}
\frac{2}{3} :: 0.667 | 0.6666666667 | 66.7\% | \frac{3}{2} | 2:3 | 2, 3 | \frac{2}{3}x |
    0.67 \approx \frac{2}{3}
\pi :: 3.14 | 3.14159265358979323846 | \frac{355}{113}
\sqrt{3} :: 1.732 | \pm\sqrt{3} | 3 | \sqrt{1}3
3^{20} \cdot 12! :: 3^{20} + 12! | 1.67 \times 10^{18}
0.375 :: 0.3751 | 0.38 | 3.75
6.02e23 :: 6.02e22 | 6.02 | 6.03 \times 10^{23} | 10^{23} | 0
2.5e-19 :: 3.5e-19 | 0 | 2.5e-18
4,-9 :: 4 | 4, 9 | 4,-9,1 | 4,4,-9 | (4,-9) | 49 | x=4
3,3,5 :: 3,5
100, 200 :: 100200
2 \pm \sqrt{3} :: 2+\sqrt3 | -2 \pm \sqrt{3} | 2 \pm \sqrt{2}
(2, -5) :: (-5, 2) | [2,-5] | (2,-5,0) | \{2, -5, 2\} | -5, 2
[2, \infty) :: (2,\infty) | x > 2 | x \le 2 | [2, 10^9)
(-3, 8] :: (-3,8) | [-3,8] | [-3,8) | -3 \le x \le 8 | -3, 8
(-\infty, 1) \cup (5, 6) :: (-\infty,1) | (-\infty,1]\cup(5,6) | (-\infty,6)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} :: \begin{pmatrix} 2 \\ 1 \end{pmatrix} |
    \begin{pmatrix} 1 & 2 \end{pmatrix}
\text{Maria} :: Mario | \text{Maria or Ana} | M | \text{not Maria}
\text{(D)} :: (B) | \text{(D) or (E)} | DE
3021_4 :: 3021_5 | 201 | 3021 | 3020_4
(a+1)(b-2) :: (a-2)(b+1) | ab-2
R :: r | 2R | 1
\frac{K-1}{L} :: \frac{k-1}{l} | \frac{k-1}{L}
2k+2 :: 2K+2
v_{0} :: v_1 | v | v_{00}
\alpha :: a | \beta
5.2 k :: 5.2 | 5.3k | k
3 + 4i :: 4+3i | 3-4i | 7
x=9 :: y=9 | x=-9 | x=9,10 | x \ge 9
2x+3y-4=0 :: 2x+3y+4=0 | 2x+3y-4 | 0 | 3x+2y=4
MC=AVC :: MC=AC | AVC
SAC=LAC :: SMC=LMC
xy=0 :: x=0
9 m :: 9
np.arctan(2/3) :: \arctan(3/2) | 0.588
6 :: \text{6 or 7} | 6,7 | 66 | -6 | 6i | 6x | 6^2 | \sqrt{6} | 6! | 60% | 5 million |
    6 \text{ million} | 6万 | 6 or 7 | 6\pm1 | six | 6.1
no :: on | not
yes :: no
\frac{3\sqrt3}{4} :: \sqrt[3]{\frac{3}{4}}
2\sqrt{10} :: \sqrt[10]{2}
0 :: 2^{-300} | 10^{-50} | 0.0000000001
0.5 :: 50
27 :: 27.01 | 2.7 | 27.000001
3:4 :: 4:3 | 0.75
(1,2) :: (2,1) | 1,2 | [1,2] | (1,2,3)
[1,2] :: (1,2) | (1,2] | [1,2)
1,2,3 :: 1,2 | 1,2,3,4 | 1,2,2
5 :: 5? | \text{about } 5 | \approx 5.1
\frac12 :: 0.49999 | 2
2\pi :: 6.28 | 6.283185307
10\% :: 100 | 1
"""
HOSTILE = ["9^{9^{9^9}}", "2^{99999}", "100000000!", "((10^{99})^{99})", "(x+y)^{999}", "0^{-1}",
           r"\frac{" * 40 + "1" + "}" * 40, "(" * 60 + "1" + ")" * 60, r"\sqrt{" * 40, "1/0",
           r"\int_0^1 x dx", "1e999999", "\0\1", "\U0001f600" * 50, "1" * 250, "x" * 2000]


def correct(box, answer):
    return antisd.is_correct(r"So $\boxed{" + box + "}$.", answer)


@pytest.mark.parametrize("text, box", [
    (r"\boxed{1} then \boxed{2}", "2"),                  # the last one, never joined
    (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), (r"thus $\boxed 7$", "7"), (r"} \boxed{3}", "3"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{3}, 4}", r"\boxed{3}, 4"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed{8} and \boxed{9", "8"),                    # the last complete one
    (r"\boxed{8", None), ("the answer is 8", None), ("", None),
    (r"<think>\boxed{8}</think> \boxed{9}", "9"), (r"a</think>\boxed{8}</think>\boxed{9}", "9"),
    (r"\boxed{8}</think> I am sure.", None),             # boxes in a thought are drafts
    (r"\boxed{7} <think> wait", None), (r"<think>\boxed{5} hmm", None),     # an open thought
])
def test_extraction(text, box):
    assert antisd.extract_boxed(text) == box


def table(text):
    """Lines of `answer :: box | box | ...`, which go on where the next line begins with blanks."""
    lines = [line.split(" :: ") for line in re.sub(r"\n {4}", " ", text.strip()).splitlines()]
    return [(answer, boxes.split(" | ")) for answer, boxes in lines]


@pytest.mark.parametrize("answer, boxes", table(RIGHT))
def test_right(answer, boxes):
    assert [box for box in [answer, *boxes] if not correct(box, answer)] == []


@pytest.mark.parametrize("answer, boxes", table(WRONG))
def test_wrong(answer, boxes):
    assert [box for box in boxes if correct(box, answer)] == []


@pytest.mark.parametrize("box", HOSTILE, ids=[repr(box[:12]) for box in HOSTILE])
def test_hostile_boxes_are_wrong_within_seconds_and_never_raise(box):
    started = time.monotonic()
    assert not correct(box, "61")
    assert not antisd.is_correct(box, "61")
    assert time.monotonic() - started < 6


def test_integers_never_reach_the_parser(monkeypatch):
    monkeypatch.setattr(antisd, "parse", None)
    assert correct("061", "61") and not correct("62", "61")
    assert correct("61".zfill(300), "61") and not correct("61".zfill(301), "61")
    long = "12345678901" * 20                            # a longer reference, a longer box
    assert correct(long.zfill(440), long) and not correct(long.zfill(441), long)


def test_whatever_the_comparison_stumbles_over_is_wrong(monkeypatch):
    monkeypatch.setattr(antisd, "verify", lambda *args, **options: 1 / 0)
    assert not correct("x + y + 1", "1 + y + x")


def test_other_threads_grade_without_alarms():
    found = []
    thread = threading.Thread(target=lambda: found.append(correct(r"\frac{14}{8}", "7/4")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real benchmark rows in ../shared/data")
@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26", "hmmt_feb_2025", "minerva_math",
                                  "math500", "dapo_math_sample"])
def test_every_reference_is_right_in_a_box_and_its_neighbour_is_not(name):
    answers = [str(row["answer"]) for row in read(DATA / f"{name}.jsonl")]
    assert [a for a in answers if not correct(a, a)] == []
    sample = list(dict.fromkeys(a.strip() for a in answers if len(a) < 12))[:40]
    numbers = [(a, b) for a, b in zip(sample, sample[1:]) if a.isdigit() and b.isdigit()]
    assert [pair for pair in numbers if int(pair[0]) != int(pair[1]) and correct(*pair)] == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the graded responses in ../shared/data")
def test_development_cases():
    rows = read(DATA / "grading_dev.jsonl")
    assert [row["why"] for row in rows
            if antisd.is_correct(row["response"], row["answer"]) != row["expect"]] == []


# --- Bad input: one line and exit code 2, before any weights are read ----------------------------


def main_on(monkeypatch, capsys, *words, name="antisd.py", run=antisd.train, kind=antisd.Config):
    """The command line, in this process -> exit code, lines of stderr."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        antisd.main(run, kind)
    return end.value.code, [line for line in capsys.readouterr().err.splitlines() if line]


def variant(root, name, template=TEMPLATE, **settings):
    """The tiny qwen3 with another template or other settings in its config.json."""
    folder = shutil.copytree(root / "qwen3", root / name, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return ["--model", folder]


def of_kind(root, kind, **settings):
    """A configuration without weights."""
    common = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    AutoConfig.for_model(kind, **common | settings).save_pretrained(root / kind)
    TOKENIZER.save_pretrained(root / kind)
    return ["--model", root / kind]


def file_of(root, name, content):
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return ["--dataset", root / name]


def rows_of(root, *rows):
    return ["--dataset", write(root / "wrong.jsonl", [ROW, *rows])]


ROW = {"problem": "a n1", "answer": "1"}
ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8,
            original_max_position_embeddings=256)
BAD_INPUT = [   # flags, or a function of root that makes them; what the line must say
    ("--model=", "--model is required"), ("--method dpo", "dpo"), ("--lr -1", "--lr"),
    ("--group_size 1", "--group_size"), ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"),
    ("--lam nan", "--lam"), ("--eval_every 0", "--eval_every"), ("--lamb 0.3", "--lamb"),
    ("--max_token 3", "--max_token"), ("--steps many", "many"), ("--steps 0", "--steps"),
    ("stray", "stray"), ("@nowhere.args", "nowhere.args"), ("--warmup_steps 0", "--tau_down 0"),
    ("--chat_template_kwargs [1]", "JSON object"), ("--chat_template_kwargs {", "JSON object"),
    ('--chat_template_kwargs {"thnk":false}', "thnk"),
    ('--chat_template_kwargs {"user":1}', "user"),
    ("--updates_per_batch 3", "--updates_per_batch"), ("--max_tokens 500", "context (512)"),
    ("--max_prompt_tokens 5", "--max_prompt_tokens"), ("--init_from nothing", "no checkpoint"),
    ("--model nobody/nothing", "nobody/nothing"), ("--dataset nobody/nothing", "nobody/nothing"),
    ("--dataset missing.jsonl", "No such file"), ("--dataset missing.parquet", "missing.parquet"),
    (lambda root: ["@" + str(file_of(root, "q.args", "--output don't")[1])], "quotation"),
    (lambda root: variant(root, "raises", "{{ raise_exception('no') }}"), "no"),
    (lambda root: variant(root, "syntax", "{% for m in messages %}"), "endfor"),
    (lambda root: variant(root, "base", None), "chat"),
    (lambda root: variant(root, "fp8", quantization_config={"quant_method": "fp8"}), "quantized"),
    (lambda root: variant(root, "unknown", model_type="foo"), "foo"),
    (lambda root: variant(root, "more", num_hidden_layers=3,     # only the weights' files can tell
                          layer_types=["full_attention"] * 3), "layers.2"),
    (lambda root: of_kind(root, "gemma2", head_dim=16), "softcapping"),
    (lambda root: of_kind(root, "granite", logits_scaling=8.0), "logits_scaling"),
    (lambda root: of_kind(root, "minimax", num_local_experts=2, num_experts_per_tok=1), "cache"),
    (lambda root: [*of_kind(root, "phi3", pad_token_id=0, rope_parameters=ROPE,
                            original_max_position_embeddings=256), "--max_tokens", 300], "context"),
    (lambda root: file_of(root, "empty.jsonl", ""), "empty.jsonl"),
    (lambda root: file_of(root, "half.jsonl", '{"problem": "p"'), "line 1"),
    (lambda root: file_of(root, "half.json", '{"problem": '), "half.json"),
    (lambda root: file_of(root, "number.json", "5"), "number.json"),
    (lambda root: file_of(root, "bad.parquet", "PAR1junk"), "bad.parquet"),
    (lambda root: file_of(root, "latin1.jsonl", b'{"problem": "caf\xe9"}'), "line 1"),
    (lambda root: rows_of(root, [1]), "row 2"),
    (lambda root: rows_of(root, {"text": "p", "label": "1"}), "text, label"),
    (lambda root: rows_of(root, {"problem": "p", "reward_model": "rule"}), "reward_model"),
    (lambda root: rows_of(root, {"problem": "x \ud800", "answer": "1"}), "row 2"),
    (lambda root: rows_of(root, {"problem": "x", "answer": "1", "solution": "\ud800"}), "row 2"),
    (lambda root: rows_of(root, {"problem": "b", "answer": math.nan}), "row 2"),
    (lambda root: rows_of(root, {"question": "b", "answer": "1\n#### "}), "row 2"),
    (lambda root: rows_of(root, {"problem": "b", "answer": {"x": 1}}), "row 2"),
    (lambda root: rows_of(root, {"prompt": [{"role": "system", "content": "b"}], "answer": "1"}),
     "row 2")]


@pytest.mark.parametrize("given, fragment", BAD_INPUT, ids=[text for _, text in BAD_INPUT])
def test_what_the_user_can_mend_costs_one_line(root, tmp_path, monkeypatch, capsys, given,
                                               fragment):
    words = given(root) if callable(given) else given.split(" ")
    if fragment != "layers.2":
        monkeypatch.setattr(antisd, "load_policy", lambda *args: pytest.fail("weights were read"))
    code, lines = main_on(
        monkeypatch, capsys, "--model", root / "qwen3", "--dataset", root / "train.jsonl",
        "--max_tokens", 12, "--problems_per_step", 4, "--group_size", 2, "--output", tmp_path,
        *words)
    assert code == 2 and len(lines) == 1 and len(lines[0]) < 700
    assert lines[0].startswith("antisd.py: error: ") and fragment in lines[0]


def test_the_command_in_a_process_of_its_own_and_programming_errors(root, tmp_path, monkeypatch,
                                                                    capsys):
    for _ in range(2):                                   # a failed start holds nothing
        code, lines = main_on(monkeypatch, capsys, "--model", "nobody/nothing", "--output",
                              tmp_path)
        assert code == 2 and len(lines) == 1 and "nobody/nothing" in lines[0]
    monkeypatch.setattr(sys, "argv", ["antisd.py", "--model", "m", "--output", str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        antisd.main(lambda cfg: 1 / 0)
    ended = subprocess.run(
        [sys.executable, "antisd.py", "--model", root / "qwen3", "--output", tmp_path,
         *file_of(tmp_path, "bad.jsonl", "{}x\n")],
        cwd=HERE, env=ENV, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "line 1" in ended.stderr


def test_flags_take_both_spellings_and_files_with_comments_and_defaults_are_the_papers(tmp_path):
    cfg = antisd.Config(model="m")
    assert (cfg.lam, cfg.warmup_steps, cfg.tau_down, cfg.lr, cfg.steps) == (0.5, 5, 0.93, 1e-6, 200)
    assert (cfg.problems_per_step, cfg.group_size, cfg.temperature, cfg.clip) == (32, 8, 1.0, 0.2)
    assert (cfg.method, cfg.compose, cfg.gate_stat, cfg.gate_source, cfg.loss_agg, cfg.max_tokens,
            cfg.updates_per_batch) == ("antisd", "add", "mean", "teacher", "token", 32768, 1)
    for field in dataclasses.fields(cfg):
        if field.name != "tracker":                      # may not be installed
            given = getattr(field.type, "__args__", [getattr(cfg, field.name)])[-1]
            for name in {field.name, field.name.replace("_", "-")}:
                words = [f"--{name}"] if field.type is bool else [f"--{name}", str(given)]
                found = getattr(antisd.parse_config(["--model", "m", *words]), field.name)
                assert found == (True if field.type is bool else given)
    file = tmp_path / "run.args"
    file.write_text("# a comment\n--model 'two words'  # another\n\n--lam 0.25 --max-tokens 7\n")
    cfg = antisd.parse_config([f"@{file}", "--seed", "4"])
    assert (cfg.model, cfg.lam, cfg.max_tokens, cfg.seed) == ("two words", 0.25, 7, 4)


def test_long_problems_are_dropped_and_counted(root, tmp_path, capsys):
    rows = [{"problem": p, "answer": "1"} for p in ("a", "a " * 90, "b")]
    cfg = config(root, dataset=write(tmp_path / "d.jsonl", rows), max_prompt_tokens=50,
                 output=str(tmp_path / "run"))
    _, _, longest, problems, held_out = antisd.prepare(cfg, 1)
    assert [p["problem"] for p in problems] == ["a", "b"] and held_out == []
    assert "1 of 3" in capsys.readouterr().out and longest == 512 - 12
    refuse(lambda: antisd.prepare(cfg, 3), "--problems_per_step", "3")


def test_a_folder_holds_one_run_with_one_set_of_settings_and_data(root, tmp_path, monkeypatch,
                                                                  capsys):
    rows = [ROW | {"problem": f"a n{i}", "solution": "so"} for i in range(4)]
    data = write(tmp_path / "d.jsonl", rows)
    flags = dict(method="grpo", dataset=data)
    monkeypatch.setenv("PATH", str(tmp_path))            # no git
    refuse(lambda: run(root, tmp_path / "run", **flags | dict(dataset="nobody/nothing")), "nobody")
    [row] = run(root, tmp_path / "run", resume=True, **flags)
    assert "holds no checkpoint" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["git"] is None
    assert not row["lam"] and {row[key] for key in (*TEACHERS, "gate", "h_warm")} == {None}
    refuse(lambda: run(root, tmp_path / "run", **flags), "already holds a run", "--resume")
    flags["resume"] = True
    refuse(lambda: run(root, tmp_path / "run", **flags | dict(method="sd")), "method")
    for change in dict(answer="9"), dict(solution="other"), dict(problem="new"):
        write(tmp_path / "d.jsonl", [rows[0] | change, *rows[1:]])
        refuse(lambda: run(root, tmp_path / "run", **flags), "other settings")
    (tmp_path / "own/model").mkdir(parents=True)         # somebody's, which export would replace
    refuse(lambda: run(root, tmp_path / "own", **flags), "no run made it")


def says(*chain):
    """A real model that answers the last of its prompt's tokens with the next of `chain`, and so
    on: one-hot embeddings, silent layers, and a head that holds the chain."""
    model = tiny("llama", hidden_size=128, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V, 128))
        model.lm_head.weight.zero_()
        for now, following in zip(chain, chain[1:]):
            model.lm_head.weight[following, now] = 100.0
    return model


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("said, reward", [
    (["<think>", "so \\boxed{1}", "n1", "<end>"], 0.0),              # the prompt opened it
    (["<think>", "so \\boxed{1}", "</think>", "n1", "<end>"], 0.0),  # a draft's box
    (["<think>", "n2", "</think>", "so \\boxed{1}", "<end>"], 1.0),
    (["<assistant>", "so \\boxed{1}", "<think>", "n1", "<end>"], 0.0),           # open again
    (["<assistant>", "<think>", "so \\boxed{1}", "</think>", "\\boxed{0}", "<end>"], 0.0),
    (["<assistant>", "so \\boxed{1}", "<end>"], 1.0)])
def test_a_thought_earns_nothing_and_is_never_shown(special, said, reward):
    tokenizer = make_tokenizer(special)
    policy = antisd.Policy(says(*tokenizer.convert_tokens_to_ids(said)), {END})
    prompt = antisd.render(tokenizer, antisd.student_messages("a"), {"think": said[0] == "<think>"})
    problem = {"id": 0, "problem": "a", "answer": "1", "solution": None, "prompt": prompt}
    rollouts = antisd.roll_out(policy, tokenizer, [problem], 2, max_tokens=8)
    assert [r.reward for r in rollouts] == [reward] * 2
    assert tokenizer.convert_ids_to_tokens(rollouts[0].ids) == said[1:]
    (shown, source), _ = antisd.pick_solutions(rollouts, random.Random(0))
    assert source == ("sibling" if reward else "answer") and "think" not in shown


@pytest.mark.parametrize("template", [
    "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    '{% macro head() %}{{ strftime_now( "%Y-%m-%d" ) }}{% endmacro %}{{ head() }} <user>'])
def test_the_clock_of_a_template_stands_still(root, monkeypatch, template):
    tokenizer, *_ = antisd.load_tokenizer(str(variant(root, "clock", template)[1]), {})
    shown = tokenizer.apply_chat_template(antisd.student_messages("a"), tokenize=False)
    assert "2026" in shown and "01" in shown and "strftime" not in tokenizer.chat_template


def test_the_part_of_a_source_that_is_trained_is_named(root, tmp_path, capsys):
    text = json.loads((root / "qwen3_5_text/config.json").read_text())
    folder = shutil.copytree(root / "qwen3_5_text", tmp_path / "vl")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"], text_config=text)))
    antisd.load_tokenizer(str(folder), {})
    assert "Qwen3_5ForCausalLM" in capsys.readouterr().out
    antisd.load_tokenizer(str(root / "qwen3"), {})
    assert "only the part" not in capsys.readouterr().out


# --- eval.py -------------------------------------------------------------------------------------


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
