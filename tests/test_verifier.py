"""Tests of the math reward: what it accepts, what it must never reward, and that no input hangs or breaks it.

The tests on data sets need the environment variable ENTROPY_RL_DATA. It names a folder with gsm8k/train.jsonl,
gsm8k/test.jsonl, math500/test.jsonl, aime/aime24.jsonl and aime/aime25.jsonl.
"""

import doctest
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

import verifier
from verifier import extract_answer, gold_answer, grade, math_reward, verifiable

DATA = os.environ.get("ENTROPY_RL_DATA")
CASES = [json.loads(line) for line in (ROOT / "tests" / "verifier_cases.jsonl").read_text().splitlines()]
GUARD_SECONDS = 60  # a guard against a hang, not a measurement: everything here takes a few seconds


def rows(name: str) -> list[dict]:
    """The rows of one file of the data folder. Without the folder, the test is skipped."""
    if not DATA:
        pytest.skip("ENTROPY_RL_DATA is not set: it names a folder with gsm8k/, math500/ and aime/")
    return [json.loads(line) for line in (Path(DATA) / name).read_text().splitlines()]


def run_python(code: str, stdin: str = "", **env: str) -> str:
    """What the code prints in a new Python process. The process must succeed within GUARD_SECONDS."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=GUARD_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- labelled cases


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(verifier).failed == 0


@pytest.mark.slow
def test_verdicts_agree_with_the_labels():
    wrong = []
    for case in CASES:
        reward = math_reward(case["completion"], case["answer"])
        if reward != case["reward"]:
            wrong.append((case["reason"], case["completion"][:80], case["answer"], reward))
    false_positives = [w for w in wrong if w[3] == 1]
    assert not false_positives
    assert len(wrong) <= 0.015 * len(CASES), wrong


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_hash_seed():
    code = (
        "import json, verifier\n"
        "cases = [json.loads(line) for line in open('tests/verifier_cases.jsonl')][::2]\n"
        "print([verifier.grade(c['completion'], c['answer']) for c in cases])\n"
    )
    assert run_python(code, PYTHONHASHSEED="1") == run_python(code, PYTHONHASHSEED="2")


@pytest.mark.slow
def test_threads_get_the_same_verdicts_as_one_thread():
    completions = [case["completion"] for case in CASES[::3]]
    answers = [case["answer"] for case in CASES[::3]]
    expected = list(map(grade, completions, answers))
    for remembers in (verifier._tidy, verifier._tokens, verifier._read, verifier._compute, verifier._random_numbers):
        remembers.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(grade, completions, answers)) == expected


# ---- data sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solved"),
    [
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k/test.jsonl", 1318),
        ("aime/aime24.jsonl", 30),
        ("aime/aime25.jsonl", 30),
        ("math500/test.jsonl", 499),
    ],
)
def test_every_gold_is_verifiable_in_every_form_and_nearly_all_solutions_earn_the_reward(name, solved):
    data = rows(name)
    for row in data:
        gold = gold_answer(row["answer"])
        assert verifiable(row["answer"]), gold
        for form in ("\\boxed{%s}", "#### %s", "The answer is %s."):
            assert math_reward(form % gold, row["answer"]) == 1.0, form % gold
    assert sum(math_reward(row.get("solution", f"#### {row['answer']}"), row["answer"]) for row in data) >= solved


def test_the_solution_of_one_problem_does_not_solve_another():
    data = rows("gsm8k/test.jsonl")
    for row, other in itertools.pairwise(data):
        equal = gold_answer(row["answer"]).replace(",", "") == gold_answer(other["answer"]).replace(",", "")
        assert math_reward(other["answer"], row["answer"]) == equal


def test_the_gold_is_found_in_every_layout_of_the_field():
    assert gold_answer("3+4=<<3+4=7>>7\n#### 7") == "7"
    assert gold_answer(r"First \boxed{1}. Hence $\boxed{\frac{1}{2}}$, not \boxed{") == r"\frac{1}{2}"
    assert gold_answer(" 025 ") == "025"


# ---- extraction


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (r"\boxed{1} #### 2 The answer is 3. 4", "1"),
        ("#### 2 \nThe answer is 3. 4", "2"),
        ("The answer is 3. 4", "3"),
        ("3 and then 4", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        ("21-5=16#### 16", "16"),
        ("21-5=16####", None),
        ("21-5=16. The answer is", None),
        ("#### Step 1: 3+4\n#### Step 2: 7+1\nThe answer is 8.", "8"),
        ("The answer is 8.\nQuestion: what is 2+2?\nThe answer is 4.", "8"),
        ("Question: what is 2+2?\nThe answer is 4.", "4"),
        (r"it is 7, \boxed{7", None),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_first_kind_of_statement_that_applies_is_taken(text, stated):
    assert extract_answer(text, number=True) == stated


def test_a_bare_number_counts_only_for_a_number():
    assert extract_answer("so we get 12", number=True) == "12"
    assert extract_answer("so we get 12") is None


@pytest.mark.parametrize("form", ["\\boxed{%d} then ", "#### %d\n", "The answer is %d. ", "%d, "])
def test_listing_guesses_earns_nothing_wherever_the_right_one_stands(form):
    guesses = "".join(form % i for i in range(10))
    assert [math_reward(guesses, str(i)) for i in range(10)] == [0.0] * 10
    assert math_reward(form % 5, "5") == 1.0


# ---- comparison


@pytest.mark.parametrize("number", ["7", "1,234", "0.5", "3/4", "2 1/2", r"\frac{3}{4}", "1e3", "12.50", "1,000,000.5"])
def test_a_minus_is_never_lost_or_invented(number):
    for minus in ("-", "−"):
        for form in ("\\boxed{%s}", "#### %s", "The answer is %s.", "We get x = %s"):
            assert math_reward(form % (minus + number), "-" + number) == 1.0
            assert math_reward(form % (minus + number), number) == 0.0
            assert math_reward(form % number, "-" + number) == 0.0


def test_a_comma_between_digits_is_never_lost():
    assert math_reward(r"\boxed{1,234}", "1234") == 1.0
    assert math_reward(r"\boxed{5, 5}", "5") == 0.0
    for text in ("1,2", "1,23", "12,34", "1, 234", "1,2345", "1,,234"):
        assert math_reward(rf"\boxed{{{text}}}", text.replace(",", "").replace(" ", "")) == 0.0, text
        assert math_reward(rf"\boxed{{{text.replace(',', '').replace(' ', '')}}}", text) == 0.0, text


def test_numbers_are_compared_without_tolerance():
    assert math_reward(r"\boxed{0.1000000000000000000001}", "0.1") == 0.0
    assert math_reward(r"\boxed{100000000000000000000000000001}", "100000000000000000000000000000") == 0.0
    assert math_reward(r"\boxed{0.100}", r"\frac{1}{10}") == 1.0


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        # A value: a number, a fraction, a root, a power, a logarithm, a constant ...
        ("87", "87", 1), ("174/2", "87", 1), (r"\sqrt{7569}", "87", 1), ("2^{10}", "1024", 1), (r"\log_2 8", "3", 1),
        # ... scientific notation, powers of primes, and a sum or product of different kinds of values.
        (r"1.5 \times 10^{4}", "15000", 1), (r"2^3 \cdot 3^2", "72", 1), (r"1 + 2\sqrt{3}", r"2\sqrt{3} + 1", 1),
        # A calculation joins two rational numbers, or any two if the gold is rational.
        ("12*7+3", "87", 0), ("80+7", "87", 0), (r"29 \cdot 3", "87", 0), ("3(29)", "87", 0), ("348/2/2", "87", 0),
        (r"\frac{80+7}{1}", "87", 0), ("2^{5+5}", "1024", 0), (r"\sqrt{2}\sqrt{8}", "4", 0), ("4!", "24", 0),
        (r"2 \cdot 3\sqrt{2}", r"6\sqrt{2}", 0), (r"\binom{6}{2}", "15", 0), (r"4^2 \cdot 3^2", "144", 0),
        # If the gold is a calculation, the answer can be one. Variables make an expression of it.
        (r"2 \cdot 2^{63} - 1", "2^{64} - 1", 1), ("2x + 3x + 1 + 1", "5x + 2", 1),
        # The sides before the last one can be calculations.
        ("12*7+3 = 87", "87", 1), ("12*7+3 = 86 = 87", "87", 0),
    ],
)  # fmt: skip
def test_an_answer_is_a_value_and_not_a_calculation_left_to_the_grader(answer, gold, reward):
    assert math_reward(rf"\boxed{{{answer}}}", gold) == reward


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x + 10^{-39}", "x"), (r"\sqrt{2} + 10^{-900}", r"\sqrt{2}"), ("(1+10^{-39})^{10^{-39}}", "1"),
        (r"\cos(10^{-39})", "1"), (r"\frac{2^{2000}}{2^{2000}-1}", "1"), ("2^{2000}+1", "2^{2000}+2"),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), (r"x\tanh(9x)", "|x|"), ("|x-10^{11}|", "10^{11}-x"),
        (r"x+\sin(\pi x)", "x"), (r"\sqrt{x^2+10^{-30}}", "|x|"), ("x+0y", "x"), ("|xy|", "xy"),
    ],
)  # fmt: skip
def test_expressions_that_are_nearly_equal_are_different(answer, gold):
    assert math_reward(rf"\boxed{{{gold}}}", gold) == 1.0
    assert math_reward(rf"\boxed{{{answer}}}", gold) == 0.0


@pytest.mark.parametrize(
    "statement", [r"\boxed{5}", "#### 5", "The answer is 5.", "so 2 + 3 = 5", "<answer>5</answer>"]
)
def test_an_answer_counts_only_after_the_thinking_has_ended(statement):
    assert math_reward(statement, "5") == 1.0
    assert math_reward(f"<think>2 + 3</think>{statement}", "5") == 1.0
    assert math_reward(f"2 + 3</think>{statement}", "5") == 1.0  # the prompt ends with <think>
    assert math_reward(f"{statement}</think>", "5") == 0.0
    assert math_reward(f"<think>{statement}", "5") == 0.0  # cut off
    assert math_reward(f"{statement}<think>but", "5") == 0.0
    assert math_reward(f"<think>2 + 3</think>so<think>{statement}", "5") == 0.0


@pytest.mark.slow
def test_no_size_of_an_answer_takes_long():
    x, root = r"\sin(" * 24 + "x" + ")" * 24, r"\sqrt{1+" * 24 + "2" + "}" * 24
    huge = ["2^{9999}+\\pi", "(9^{99})^{99}", "2499!", "x^{99}" * 80, r"\sin " * 100 + "x", "e^{" * 12 + "x" + "}" * 12]
    huge += [r"\cosh(" * 20 + "x" + ")" * 20, "x" + "!" * 100, "(x+1)^{400}", "9" * 599, r"\binom{2400}{1200}", x, root]
    huge += ["+".join(rf"\sqrt{{{n}}}" for n in range(50)), ",".join(rf"\sqrt{{x+{n}}}" for n in range(16))]
    huge += ["is " * 190 + "5", r"\text{" + "the " * 140 + "}", "5" + " apples" * 80, "|x" * 50 + "|" * 50, "is " * 190]
    code = "import json, sys, verifier; print([verifier.grade(text, gold)[0] for text, gold in json.load(sys.stdin)])"
    pairs = [(rf"\boxed{{{answer}}}", answer + end) for end in ("", "+1") for answer in huge]
    rewards = json.loads(run_python(code, stdin=json.dumps(pairs)))
    assert not any(rewards[len(huge) :])


@pytest.mark.parametrize(
    "gold",
    ["", " ", "###", "$$", "((((", "}", "\\", "?", r"\boxed{", "####", "9^{9^{9}}", "9" * 5000, "x" * 5000]  # noqa: RUF005
    + ["Each of the three friends gets two apples and keeps one", "\ud800", "1/0"],
)
def test_a_gold_that_means_nothing_is_never_rewarded(gold):
    assert not verifiable(gold)
    for text in (gold, rf"\boxed{{{gold}}}", f"#### {gold}", f"The answer is {gold}.", r"\boxed{0}", ""):
        assert math_reward(text, gold) == 0.0


def test_statuses_say_why():
    assert grade(r"\boxed{7}", "7") == (1.0, "correct")
    assert grade(r"\boxed{8}", "7") == (0.0, "wrong")
    assert grade("I do not know", "7") == (0.0, "parse_failed")


# ---- hostile input

HOSTILE = [
    r"\boxed{9^{9^{9}}}",
    r"\boxed{9^{9^9 \cdot 9}}",
    r"\boxed{10^{10*10^{9}}}",
    r"\boxed{(10^{10})!}",
    r"\boxed{\binom{10^9}{10^8}}",
    r"\boxed{\sum_{k=1}^{10^9} k^k}",
    r"\boxed{1e999999999}",
    r"\boxed{1 \times 10^{999999999}}",
    r"\boxed{" + "{" * 50_000,
    r"\boxed{" * 20_000 + "1" + "}" * 20_000,
    r"\boxed{" + "(" * 300 + "1" + ")" * 300 + "}",
    r"\boxed{" + r"\sqrt{" * 90 + "2" + "}" * 91,
    "9" * 5_000,
    "#### " + "9" * 5_000,
    r"\boxed{" + "9" * 5_000 + "}",
    r"\boxed{" + "1," * 50_000 + "}",
    "1," * 50_000,
    "-" * 50_000,
    "answer to " * 10_000,
    "answer is " * 10_000,
    "\n" * 50_000 + " " * 50_000,
    "####" * 25_000,
    "#### " * 25_000,
    "Question:\n" * 10_000,
    "\\" * 50_000,
    "$" * 50_000,
    "\\boxed{" + "\\frac" * 10_000 + "}",
    "\ud800 \\boxed{\ud800^2}",
    "\x00" * 1_000,
    "#### ²",
    "#### ٣",
    "",
]


@pytest.mark.slow
def test_hostile_text_earns_nothing_and_does_not_hang():
    # This needs another process, because a thread cannot stop a regular expression that hangs.
    code = "import json, sys, verifier; print([verifier.grade(text, '3')[0] for text in json.load(sys.stdin)])"
    rewards = json.loads(run_python(code, stdin=json.dumps(HOSTILE)))
    assert len(rewards) == len(HOSTILE)
    assert [text[:80] for text, reward in zip(HOSTILE, rewards, strict=True) if reward] == []


@pytest.mark.slow
def test_hostile_text_earns_nothing_in_another_thread():
    with ThreadPoolExecutor(1) as pool:
        rewards = list(pool.map(lambda text: math_reward(text, "x^2+1"), HOSTILE))
    assert [text[:80] for text, reward in zip(HOSTILE, rewards, strict=True) if reward] == []


@pytest.mark.parametrize("junk", [None, 7, 7.0, b"\\boxed{7}", ["7"], {}, object()])
def test_arguments_that_are_no_text_earn_nothing_and_raise_nothing(junk):
    assert math_reward(junk, "7") == 0.0
    assert math_reward(r"\boxed{7}", junk) == 0.0
    assert math_reward(junk, junk) == 0.0
    assert not verifiable(junk)
