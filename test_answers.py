"""What counts as a right answer, and what loads as a problem: sections 3 and 7 of antisd.py.

Two tables hold the spellings, right and wrong, by reference; the rest are faults that users of
other trainers have reported, each with its least input.
"""
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")             # nothing here may reach the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import pytest
import sympy

import antisd

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real rows in ../shared/data")
logging.getLogger("math_verify").setLevel(logging.ERROR)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    """Rows as .jsonl, .json or .parquet, by the path's suffix."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refuse(call, *fragments):
    with pytest.raises(antisd.InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert [part for part in fragments if part not in str(caught.value)] == []


def correct(box, answer):
    return antisd.is_correct(r"So $\boxed{" + box + "}$.", answer)


def table(text):
    """Lines of `answer :: box | box | ...`, which go on where the next line begins with blanks."""
    lines = [line.split(" :: ") for line in text.strip().replace("\n    ", " ").splitlines()]
    return [(answer, boxes.split(" | ")) for answer, boxes in lines]


# --- The reward ----------------------------------------------------------------------------------

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
17 :: 17 \text{ apples} | 17 \text{ cities} | 17 \text{ square meters} | 17\text{th} | 17 units |
    17 \mathrm{~m} / \mathrm{s}^2 | 17 \text{ W} | 17 \text{ meters squared} | 17 \text{ months} |
    17 cm | 17 米 | 17平方米 | 17 \text{元} | 17 \% | f(3) = 17 | \angle ABC = 17^\circ | 17 分
60 cm :: 60 | 60 cm | 60 \text{ cm}
12元 :: 12 | 12 \text{元}
60 miles :: 60 | 60 miles
x \in [-2,7] :: [-2,7] | x \in [-2,7] | -2 \le x \le 7 | x ∈ [-2,7]
P(x)=x^2 :: x^2 | P(x) = x^2 | x \cdot x
f^{-1}(x)=2x :: 2x
(x,y)=(1,2) :: (1,2)
\theta = \frac{\pi}{3} :: \pi/3
x=1, x=-2 :: x=-2, x=1
\infty :: ∞ | +\infty
[2,\infty) :: [2,∞) | x ≥ 2 | x >= 2
1/2 :: ½ | 0.5 | 50%
5/2 :: 2½ | 2 1/2 | 2.5
3/4 :: ¾
12345 :: 12 345 | 12 345 | 12,345
x \ne 3 :: x != 3 | x ≠ 3 | x \neq 3
x \le 3 :: x <= 3 | x ≤ 3 | x \leqslant 3
37.5 :: 37.5% | 37.5\%
120 :: 5! = 120 | \frac{6!}{3!}
\frac{(2n)!}{n!n!} :: \binom{2n}{n}
2004! :: 2004!
\frac{1}{2^{99}} :: 2^{-99}
2.5e-19 :: 2.5 \times 10^{-19}
e^{16} - 1 :: -1 + exp(16)
2x+4y-3=0 :: y = -1/2*x + 3/4
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
17 :: x != 17 | x >= 17 | x <= 17 | x \not= 17 | x \ne 17 | x \neq 17 | x ≠ 17 | x ! = 17 |
    x =! 17 | > 17 | \ge 17 | != 17 | x => 17 | x \not\in 17
17 :: 17 \text{ thirds} | 17 \text{ squared} | 17 \text{ lakh} | 17 t | 17 \text{ cubed} |
    17 \text{ fourths} | 17 \text{ crore} | 17 \text{ or more} | 17 \text{ k} | 17 \text{ dozens} |
    17 \text{ factorial} | 17 \text{ at least} | 17 \text{ to the fourth} | 17 \text{ halves} |
    17 \text{ hundredths} | 17 \text{ million dollars} | 17 \text{ less than} | 17 \text{ mod p} |
    17 \text{ x} | 17 \text{ pi} | 17 \text{ twentieths} | 17 \text{ sixteenths} | 17 \text{ bn} |
    17 \text{ point five} | 17 thirds | 17 squared | 17 million | 17 xy | 17 m | 17分之一 | 17以上 |
    17亿 | 17 平方 | 17 \text{万}
[2,3] :: x \not\in [2,3] | x \notin [2,3] | x ∉ [2,3] | x \in (2,3)
x \in [-2,7] :: (-2,7) | x \in (-2,7] | x \notin [-2,7] | 7
P(x)=x^2 :: P(x)=x^3 | x^3 | 2 | x
10\% :: 1000\%
\infty :: -\infty | 0
1/2 :: 1½ | ¼
2 xy :: 2
5 abc :: 5
0.5 :: 0.50006 | x | (1,2) | \emptyset
4 :: 4\sqrt(2)
\frac{1}{2004!} :: \frac{1}{2006!}
\frac{1}{2^{99}} :: \frac{1}{2^{98}}
n=2, 3, 4 :: n=1, 2, 3
\pm 2021 :: 2021
1 - \frac{1}{\mathrm{e}} :: 1 + \frac{1}{\mathrm{e}}
3*x-1*y+13=0 :: 3x + 4y + 14=0
f(x)=0 :: \forall x>0, f(x) = 0
"""
HOSTILE = ["9^{9^{9^9}}", "2^{99999}", "100000000!", "((10^{99})^{99})", "(x+y)^{999}", "0^{-1}",
           r"\frac{" * 40 + "1" + "}" * 40, "(" * 60 + "1" + ")" * 60, r"\sqrt{" * 40, "1/0",
           r"\int_0^1 x dx", "1e999999", "\0\1", "\U0001f600" * 50, "1" * 250, "x" * 2000,
           r"\exp(\exp(\exp(99)))", "$$", "x =", r"\text{}", ",", "(,)",
           "{@a 1276915 国 {1,1-3-10});5个}"]
# factorials that end or hang a process whose sympy counts with gmpy2
MONSTERS = ["(10^{18})!", "(10^9)!", r"\left(10^{18}\right)!", "10^{18}!", "1e18!", "[9^9]!",
            "(9!)!", r"(9 \cdot 9^9)!", "(9*9*9*9*9*9*9*9*9)!", r"\frac{10^{18}}{1}!", "2^{99!}",
            "(n+10^{9})!", "{10^{18}}!", r"|(10^{18})!|", r"\binom{10^9}{10^8}", "9!^{9!}",
            r"{10^{18} \choose 5}", r"\binom{x}{99999}", r"\frac{(10^9)!}{(10^9-1)!}", "(99999)!",
            "((9)9)!", "999!^{999}"]


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


@pytest.mark.parametrize("answer, boxes", table(RIGHT))
def test_right(answer, boxes):
    assert [box for box in [answer, *boxes] if not correct(box, answer)] == []


@pytest.mark.parametrize("answer, boxes", table(WRONG))
def test_wrong(answer, boxes):
    assert [box for box in boxes if correct(box, answer)] == []


@pytest.mark.parametrize("box", HOSTILE, ids=[repr(box[:12]) for box in HOSTILE])
def test_hostile_boxes_are_wrong_within_seconds_and_never_raise(box):
    for answer in "61", "6.02e23":                       # exact, and within a tolerance
        started = time.monotonic()
        assert not correct(box, answer)
        assert not antisd.is_correct(box, answer)
        assert time.monotonic() - started < 25           # two alarms of five seconds; busy machines


@pytest.mark.parametrize("box", MONSTERS)
def test_sympy_is_never_asked_for_a_monstrous_factorial(box, monkeypatch):
    monkeypatch.setattr(antisd, "parse", lambda *args, **options: pytest.fail("it was parsed"))
    for answer in "61", r"\frac{1}{2}", "0.5", "x=2":
        assert not correct(box, answer)


def test_sympy_counts_with_pythons_integers():
    code = "import antisd, sympy.external.gmpy as g; print(g.GROUND_TYPES)"
    environment = {k: v for k, v in os.environ.items() if k != "SYMPY_GROUND_TYPES"}
    code += "; import os; print(os.environ['SYMPY_GROUND_TYPES'])"       # without gmpy2, too
    found = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, env=environment)
    assert found.split() == [b"python", b"python"]


@pytest.mark.parametrize("text", [
    "{" * 130_000, "x = " * 30_000 + r"\boxed{5}", r"\boxed{" * 18_000, r"\text{" * 20_000,
    *(r"\boxed{" + box + "}" for box in ("1," * 149, " " * 290, r"\text{a}" * 41, "1" + r"\ " * 140,
                                         "^{\\circ " * 36 + "}" * 36, "[(" * 140, "3!" + "!" * 290)
      )],
    ids=lambda text: repr(text[:16]))
def test_a_degenerate_response_costs_no_time(text):
    started = time.process_time()
    assert not antisd.is_correct(text, "2 cups, 3 thousand")
    assert time.process_time() - started < 5


def test_integers_never_reach_the_parser(monkeypatch):
    monkeypatch.setattr(antisd, "parse", None)
    assert correct("061", "61") and not correct("62", "61") and correct("000", "0")
    assert correct("61".zfill(300), "61") and not correct("61".zfill(301), "61")
    long = "12345678901" * 500                           # Python converts no more than 4,300 digits
    assert correct(long.zfill(10_000), long) and not correct("1" + long[1:-1] + "2", long)


@pytest.mark.parametrize("name", ["parse", "verify"])
def test_what_the_libraries_raise_is_no_answer_and_what_our_code_raises_is_a_traceback(
        name, monkeypatch):
    def raising(error):
        def fail(*args, **options):
            raise error
        return fail

    for error in (ZeroDivisionError(), OverflowError(), sympy.SympifyError("x"), RecursionError(),
                  antisd.TimeoutException(), ValueError()):
        monkeypatch.setattr(antisd, name, raising(error))
        assert not correct("x + y + 1", "1 + y + x")
    for error in NameError("x"), KeyError("x"), AttributeError("x"), TypeError("x"):
        monkeypatch.setattr(antisd, name, raising(error))
        with pytest.raises(type(error)):
            correct("x + y + 1", "1 + y + x")
    monkeypatch.setattr(antisd, "same_value", raising(ZeroDivisionError()))      # a fork's own
    with pytest.raises(ZeroDivisionError):
        correct("x + y", "y + x")


def test_other_threads_grade_without_alarms():
    found = []
    thread = threading.Thread(target=lambda: found.append(correct(r"\frac{14}{8}", "7/4")))
    thread.start()
    thread.join()
    assert found == [True]


@real_data
@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26", "hmmt_feb_2025", "minerva_math",
                                  "math500", "dapo_math_sample"])
def test_every_reference_is_right_in_a_box_and_its_neighbour_is_not(name):
    answers = [str(row["answer"]) for row in read(DATA / f"{name}.jsonl")]
    assert [a for a in answers if not correct(a, a)] == []
    sample = list(dict.fromkeys(a.strip() for a in answers if len(a) < 12))[:40]
    numbers = [(a, b) for a, b in zip(sample, sample[1:]) if a.isdigit() and b.isdigit()]
    assert [pair for pair in numbers if int(pair[0]) != int(pair[1]) and correct(*pair)] == []


@real_data
def test_development_cases():
    rows = read(DATA / "grading_dev.jsonl")
    assert [row["why"] for row in rows
            if antisd.is_correct(row["response"], row["answer"]) != row["expect"]] == []


# --- Data ----------------------------------------------------------------------------------------

WRAPPED = ("Solve the following math problem step by step. The last line of your response should "
           "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
           "problem.\n\nWhat is\n\n$x$?\n\nRemember to put your answer on its own line after "
           '"Answer:".')
GSM8K_OF_VERL = "What?" + ' Let\'s think step by step and output the final answer after "####".'
QWEN = "What?\nPlease reason step by step, and put your final answer within \\boxed{}."
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
    "verl's gsm8k": ([{"prompt": [{"role": "user", "content": GSM8K_OF_VERL}],
                       "reward_model": {"ground_truth": "72"}}], [("What?", "72", None)]),
    "another box": ([{"problem": QWEN, "answer": "3"}], [("What?", "3", None)]),
    "not a wrapper": ([{"problem": "Let's think step by step of 3.", "answer": "3"}],
                      [("Let's think step by step of 3.", "3", None)]),
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
    "no answer for a box": ([{"problem": a, "answer": a} for a in (
        "proof", "notfound", "Not found", '{"inputs": ["3\\n"], "outputs": ["6\\n"]}',
        '[{"in": 1}]', '["assert f(1) == 2"]', "7")], [("7", "7", None)]),
    "lost backslashes": ([{"problem": "3\times 4 \neq 5 for $\beta$\nand\theta",
                           "answer": "\frac13",
                           "solution": "a\ntext\tof\nlines, eq 1, \b \f and \right)"}],
                         [("3\\times 4 \\neq 5 for $\\beta$\nand\\theta", "\\frac13",
                           "a\ntext\tof\nlines, eq 1, \b \f and \\right)")]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_loads_from_every_format(schema, suffix, tmp_path):
    rows, expected = SCHEMAS[schema]
    problems = antisd.load_problems(write(tmp_path / f"data{suffix}", rows))
    assert [(p["problem"], p["answer"], p["solution"]) for p in problems] == expected
    assert len({p["id"] for p in problems}) == len(problems)


def test_json_with_one_backslash_too_few_is_read_as_it_was_meant(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('\ufeff{"problem": "p", "answer": "\\frac{1}{3}"}\n', encoding="utf-8")
    [problem] = antisd.load_problems(str(file))          # nor does a byte order mark do harm
    assert problem["answer"] == r"\frac{1}{3}" and correct("1/3", problem["answer"])


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
    refuse(lambda: antisd.load_problems(str(tmp_path), "train"), "config", str(tmp_path))
    path = write(tmp_path / "d.jsonl", [{"problem": p, "answer": "1"} for p in "aabbcc"])
    assert [p["problem"] for p in antisd.load_problems(path, limit=2)] == ["a", "b"]


def test_what_is_left_out_is_said_once_and_by_one_rank(tmp_path, monkeypatch, capsys):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    path = write(tmp_path / "d.jsonl", [{"prompt": chat, "answer": "3"},
                                        {"prompt": [chat[1] | {"content": "q"}], "answer": "proof"},
                                        {"prompt": chat[1:], "answer": "4"}])
    [problem] = antisd.load_problems(path)
    [line] = capsys.readouterr().out.splitlines()
    assert "1 rows without" in line and "1 chats" in line and problem["answer"] == "3"
    monkeypatch.setenv("RANK", "1")
    antisd.load_problems(path)
    assert capsys.readouterr().out == ""
    antisd.load_problems(write(tmp_path / "e.jsonl", [{"problem": "p", "answer": "3"}]))
    assert capsys.readouterr().out == ""


def test_long_reading_shows_a_sign_of_life(tmp_path, monkeypatch, capsys):
    def slowly(*args):
        for i in range(3):
            time.sleep(0.2)
            yield {"problem": f"p{i}", "answer": "1"}

    monkeypatch.setattr(antisd, "read_rows", slowly)
    antisd.load_problems("some/set")
    assert "some/set" not in capsys.readouterr().err     # short work is silent
    bar = antisd.tqdm
    monkeypatch.setattr(antisd, "tqdm", lambda *args, delay, **options: bar(
        *args, delay=delay / 50, mininterval=0, miniters=1, **options))
    antisd.load_problems("some/set")
    assert "some/set: 2it" in capsys.readouterr().err


def bad(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path / name)


@pytest.mark.parametrize("name, content, fragment", [
    ("empty.jsonl", "", "empty.jsonl"), ("half.jsonl", '{"problem": "p"', "line 1"),
    ("half.json", '{"problem": ', "half.json"), ("number.json", "5", "number.json"),
    ("bad.parquet", "PAR1junk", "bad.parquet"), ("empty.parquet", "", "empty.parquet"),
    ("latin1.jsonl", b'{"problem": "caf\xe9"}', "line 1"), ("deep.json", "[" * 10**6, "deep.json"),
    ("list.jsonl", '{"problem": "a", "answer": "1"}\n[1]', "row 2"),
    ("columns.jsonl", '{"text": "p", "label": "1"}', "text, label"),
    ("no_truth.jsonl", '{"problem": "p", "reward_model": "rule"}', "reward_model"),
    ("nan.jsonl", '{"problem": "b", "answer": NaN}', "row 1"),
    ("gsm8k.jsonl", '{"question": "b", "answer": "1\\n#### "}', "row 1"),
    ("dict.jsonl", '{"problem": "b", "answer": {"x": 1}}', "row 1"),
    ("system.jsonl", '{"prompt": [{"role": "system", "content": "b"}], "answer": "1"}', "row 1"),
    ("proofs.jsonl", '{"problem": "b", "answer": "proof"}', "no problem with an answer"),
])
def test_a_file_that_cannot_be_read_costs_one_line(name, content, fragment, tmp_path):
    path = bad(tmp_path, name, content)
    refuse(lambda: antisd.load_problems(path), path, fragment)


def test_a_data_set_that_cannot_be_loaded_costs_one_line_that_says_why(tmp_path):
    refuse(lambda: antisd.load_problems("nobody/nothing"), "nobody/nothing")
    refuse(lambda: antisd.load_problems("missing.jsonl"), "missing.jsonl", "No such file")
    refuse(lambda: antisd.load_problems("missing.parquet"), "missing.parquet")
    for name, content, fragment in (("script.py", "x = 1", "script"), ("a.jsonl", '{"x":', "JSON"),
                                    ("b.jsonl.gz", b"\x1f\x8bjunk", "ended")):
        folder = tmp_path / name[0]
        folder.mkdir()
        bad(folder, name.replace("script", folder.name), content)
        refuse(lambda: antisd.load_problems(str(folder)), str(folder))


@pytest.mark.parametrize("error", [KeyError("frage"), NameError("n"), ValueError("v"), OSError("o"),
                                   RuntimeError("r"), TypeError("t")], ids=repr)
@pytest.mark.parametrize("hub", [False, True])
def test_a_fork_s_mistake_in_read_problem_keeps_its_traceback(error, hub, tmp_path, monkeypatch):
    def read_problem(row):
        raise error

    path = write(tmp_path / "d.jsonl", [{"frage": "p", "antwort": "1"}])
    monkeypatch.setattr(antisd, "read_problem", read_problem)
    with pytest.raises(type(error)) as caught:
        antisd.load_problems(str(tmp_path) if hub else path)
    assert caught.value is error


@real_data
def test_real_files_load_whole():
    for name, count in (("aime24", 30), ("aime24_verl_raw_dup", 30), ("hmmt_feb_2025", 30),
                        ("math500", 500), ("minerva_math", 272), ("gsm8k_train_small", 500),
                        ("dapo_math_sample", 500)):
        problems = antisd.load_problems(str(DATA / f"{name}.jsonl"))
        assert len(problems) == count and all(p["answer"] for p in problems)
        assert not any("Answer:" in p["problem"] for p in problems)


def test_next_problems_cover_every_problem_once_an_epoch_in_a_reproducible_order(monkeypatch):
    problems = list(range(10))
    stream = [p for position in range(0, 40, 4)
              for p in antisd.next_problems(problems, position, 4, seed=3)]
    epochs = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == problems for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4             # shuffled anew each time
    assert antisd.next_problems(problems, 8, 25, seed=3) == stream[8:33]    # whatever the count
    assert antisd.next_problems(problems, 0, 10, seed=4) != epochs[0]
    drawn, draw = [], antisd.torch.randperm
    monkeypatch.setattr(antisd.torch, "randperm", lambda *args, **options: (
        drawn.append(args), draw(*args, **options))[1])
    antisd.next_problems(problems, 8, 25, seed=3)
    assert len(drawn) == 4                               # one shuffle an epoch, not one a problem
