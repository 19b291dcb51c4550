"""Properties of the math reward: what it accepts, what it must never reward, and that no input hangs or breaks it."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import verifier
from verifier import extract_answer, gold_answer, grade, math_reward, verifiable

DATA = ROOT.parent / "shared" / "data"
CASES = [json.loads(line) for line in (ROOT / "tests" / "verifier_cases.jsonl").read_text().splitlines()]
HANG_SECONDS = 4.0
needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is missing")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def rows(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fresh_worker():
    """No worker and no remembered verdict before, and none after."""

    def reset():
        verifier._stop()
        verifier._judge.cache_clear()
        verifier._usable = True

    reset()
    yield
    reset()


@pytest.fixture
def fake_library(tmp_path, monkeypatch, fresh_worker):
    """A math-verify that prints, hangs, crashes or takes memory on command, and otherwise calls everything equal."""
    package = tmp_path / "math_verify"
    package.mkdir()
    (package / "parser.py").write_text("def NormalizationConfig(**options): pass\n")
    (package / "__init__.py").write_text(
        "import mmap, os, time\n"
        "def LatexExtractionConfig(*args, **options): pass\n"
        "def verify(gold, target, **options): return True\n"
        "def parse(text, *args, **options):\n"
        "    if 'print' in text: print('wrong', flush=True)\n"
        "    if 'hang' in text: time.sleep(100)\n"
        "    if 'crash' in text: os._exit(3)\n"
        "    if 'memory' in text: mmap.mmap(-1, 2 << 30)\n"
        "    return [text]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


# ---- labelled cases


@needs_math_verify
def test_verdicts_agree_with_the_labels():
    wrong = []
    for case in CASES:
        start = time.monotonic()
        reward = math_reward(case["completion"], case["answer"])
        assert time.monotonic() - start < HANG_SECONDS, case["reason"]
        if reward != case["reward"]:
            wrong.append((case["reason"], case["completion"][:80], case["answer"], reward))
    false_positives = [w for w in wrong if w[3] == 1]
    assert len(CASES) >= 220
    assert len(wrong) <= 0.03 * len(CASES), wrong
    assert len(false_positives) <= 0.01 * sum(case["reward"] == 0 for case in CASES), false_positives


@needs_math_verify
def test_verdicts_do_not_depend_on_the_hash_seed():
    code = (
        "import json, verifier\n"
        "cases = [json.loads(line) for line in open('tests/verifier_cases.jsonl')][::2]\n"
        "print([verifier.grade(c['completion'], c['answer']) for c in cases])\n"
    )
    assert run_python(code, PYTHONHASHSEED="1") == run_python(code, PYTHONHASHSEED="2")


@needs_math_verify
def test_threads_get_the_same_verdicts(fresh_worker):
    some = CASES[::3]
    expected = [grade(case["completion"], case["answer"]) for case in some]
    verifier._judge.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: grade(case["completion"], case["answer"]), some)) == expected


# ---- data sets


@pytest.mark.parametrize(
    ("name", "solved"),
    [
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k/test.jsonl", 1318),
        ("aime/aime24.jsonl", 30),
        ("aime/aime25.jsonl", 30),
        pytest.param("math500/test.jsonl", 499, marks=needs_math_verify),
    ],
)
def test_every_gold_is_verifiable_in_every_form_and_solutions_earn_the_reward(name, solved):
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


def test_gold_comes_out_of_every_field_layout():
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


@needs_math_verify
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


def test_plain_numbers_and_words_never_reach_the_worker(monkeypatch):
    monkeypatch.setattr(verifier, "_judge", None)
    golds = ["7", "-1,000", r"\frac{3}{4}", "2 1/2", "15%", r"5 \text{ cents}", "52_8", "Tuesday", r"\text{(C)}"]
    for gold in golds:
        assert grade(rf"\boxed{{{gold}}}", gold) == (1.0, "correct")
        assert grade(r"\boxed{8}", gold) == (0.0, "wrong")


@needs_math_verify
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


def assert_harmless(gold: str):
    for text in HOSTILE:
        start = time.monotonic()
        assert grade(text, gold)[0] == 0.0, text[:80]
        assert time.monotonic() - start < HANG_SECONDS, text[:80]


@needs_math_verify
def test_hostile_text_earns_nothing_and_takes_no_time():
    assert_harmless("3")


@needs_math_verify
def test_hostile_text_is_harmless_off_the_main_thread(fresh_worker):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(assert_harmless, "x^2+1").result()


@pytest.mark.parametrize("junk", [None, 7, 7.0, b"\\boxed{7}", ["7"], {}, object()])
def test_arguments_that_are_no_text_earn_nothing_and_raise_nothing(junk):
    assert math_reward(junk, "7") == 0.0
    assert math_reward(r"\boxed{7}", junk) == 0.0
    assert math_reward(junk, junk) == 0.0
    assert not verifiable(junk)


# ---- the worker


@needs_math_verify
def test_a_killed_worker_is_replaced(fresh_worker):
    assert math_reward(r"\boxed{x+x}", "2x") == 1.0
    first = verifier._worker
    first.kill()
    first.wait()
    assert math_reward(r"\boxed{y+y}", "2y") == 1.0
    assert verifier._worker.pid != first.pid


def test_what_the_library_prints_is_no_verdict(fake_library):
    assert grade(r"\boxed{x+print}", "x+y+z") == (1.0, "correct")


def test_a_hanging_worker_is_killed_and_the_next_answer_is_not_mixed_up(fake_library, monkeypatch):
    monkeypatch.setattr(verifier, "JOB_SECONDS", 0.5)
    assert grade(r"\boxed{x+hang}", "x+y+z") == (0.0, "timeout")
    assert grade(r"\boxed{x+y}", "x+y+z") == (1.0, "correct")


def test_a_crash_counts_as_timeout_and_the_next_call_works(fake_library):
    assert grade(r"\boxed{x+crash}", "x+y+z") == (0.0, "timeout")
    assert grade(r"\boxed{x+y}", "x+y+z") == (1.0, "correct")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux enforces RLIMIT_AS")
def test_the_worker_cannot_take_more_memory_than_its_limit(fake_library):
    assert grade(r"\boxed{x+memory}", "x+y+z") == (0.0, "timeout")
    assert grade(r"\boxed{x+y}", "x+y+z") == (1.0, "correct")


def test_without_math_verify_equal_text_counts_and_one_line_warns(tmp_path, monkeypatch, fresh_worker, caplog):
    (tmp_path / "math_verify.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert math_reward(r"\boxed{x + 1}", "x+1") == 1.0
    assert math_reward(r"\boxed{1 + x}", "x+1") == 0.0
    assert math_reward(r"\boxed{7}", "7") == 1.0
    assert len(caplog.records) == 1 and "math-verify" in caplog.text


@needs_posix
@needs_math_verify
def test_no_worker_outlives_a_killed_parent():
    code = "import verifier as v; v.math_reward('\\\\boxed{x+x}', '2x'); print(v._worker.pid, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(worker):
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid: int) -> bool:
    """Running, and not a zombie that waits for whoever adopted it."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state not in ("", "Z")


@needs_posix
@needs_math_verify
def test_no_worker_is_left_after_a_normal_exit():
    worker = int(run_python("import verifier as v; v.math_reward('\\\\boxed{x+x}', '2x'); print(v._worker.pid)"))
    assert not alive(worker)


@needs_posix
@needs_math_verify
def test_a_forked_child_starts_its_own_worker_and_leaves_the_parents_alone():
    code = """
import os, signal, threading, verifier
assert verifier.math_reward("\\\\boxed{x+x}", "2x") == 1.0
parents = verifier._worker.pid
held, done = threading.Event(), threading.Event()
def hold():  # as a thread does that waits for a verdict
    with verifier._lock:
        held.set()
        done.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    fine = verifier.math_reward("\\\\boxed{y+y}", "2y") == 1.0 and verifier._worker.pid != parents
    os._exit(0 if fine else 1)
done.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert verifier.math_reward("\\\\boxed{z+z}", "2z") == 1.0 and verifier._worker.pid == parents
"""
    run_python(code)


@needs_posix
@needs_math_verify
def test_an_interrupted_job_does_not_answer_the_next_one(fresh_worker):
    assert math_reward(r"\boxed{x+x}", "2x") == 1.0
    os.kill(verifier._worker.pid, signal.SIGSTOP)  # so that the interrupt arrives while the reply is awaited
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        grade(r"\boxed{y+y}", "2y")
    assert grade(r"\boxed{z+z+z}", "2z") == (0.0, "wrong")
    assert grade(r"\boxed{y+y}", "2y") == (1.0, "correct")
