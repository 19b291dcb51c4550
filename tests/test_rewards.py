"""--reward FILE.py:FUNCTION, and the warnings about runs that cannot learn."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, call, lines, refused, write_lines

from harness import reporting, rewards

OWN = """
from dataclasses import dataclass

import beside

@dataclass
class Share:
    value: float

def length(completion, row):
    assert row["level"] in (1, 2) and row["question"].endswith("?") and row["tags"] == ["a", "b"]
    row["answer"] = None
    return Share(len(completion) / beside.LONGEST).value

def raises(completion, row):
    return 1 / len(row["nothing"])

constant = 3
"""


@pytest.fixture()
def own(tmp_path):
    """A file of reward functions, and a data file without an answer column."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "beside.py").write_text("LONGEST = 40\n")
    (folder / "mine.py").write_text(OWN)
    rows = [{"question": f"{i}+{j}?", "level": 1 + i % 2, "tags": ["a", "b"]} for i in range(1, 9) for j in range(4)]
    write_lines(folder / "rows.jsonl", rows)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dapo", "gtpo"])
def test_a_script_trains_on_a_reward_of_ones_own(name, small, own, tmp_path, monkeypatch):
    flags = small("--dataset", own / "rows.jsonl", "--reward", f"{own}/mine.py:length", "--name", "r")
    call(monkeypatch, name, *flags)
    rewards_seen = {record["reward"] for record in lines(tmp_path / "r" / "completions.jsonl")}
    assert all(0 < reward <= 1 for reward in rewards_seen) and len(rewards_seen) > 1
    if name != "gtpo":  # which knows right and wrong alone
        assert all(row["grad_norm"] > 0 for row in lines(tmp_path / "r" / "metrics.jsonl"))
    evaluations = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert all(0 < result["reward"] <= 1 for result in evaluations)
    assert all("row" not in record for record in lines(tmp_path / "r" / "completions.jsonl"))


@pytest.mark.parametrize("value, told", [
    ("{own}/mine.py", "FILE.py:FUNCTION"), ("{own}/mine.txt:length", "FILE.py:FUNCTION"),
    ("length", "FILE.py:FUNCTION"),
    ("{own}/none.py:length", "no file"), ("{own}/mine.py:lenght", "no function lenght"),
    ("{own}/mine.py:constant", "no function constant"),
])  # fmt: skip
def test_a_reward_that_does_not_exist_is_refused(value, told, small, own, tmp_path, monkeypatch, capsys):
    message = refused(monkeypatch, capsys, tmp_path, *small("--reward", value.format(own=own)))
    assert "--reward" in message and told in message


def test_a_file_that_cannot_be_imported_is_refused_with_its_traceback(small, own, tmp_path, monkeypatch, capsys):
    (own / "broken.py").write_text("def reward(completion, row):\n    return 1\n\nimport no_such_module\n")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "grpo", *small("--reward", f"{own}/broken.py:reward"))
    first, *below = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and first.startswith("error: --reward") and "no_such_module" in first
    assert below[0].startswith("Traceback") and not list(tmp_path.glob("grpo-*"))


def test_a_function_that_fails_ends_the_run_with_one_line_and_loses_nothing(small, own, tmp_path, monkeypatch, capsys):
    function = f"{own}/mine.py:length"
    call(monkeypatch, "grpo", *small("--dataset", own / "rows.jsonl", "--reward", function, "--name", "r"))
    resume = ("--resume", str(tmp_path / "r"))
    call(monkeypatch, "grpo", *resume, "--steps", "3")  # with the reward that the run has stored
    assert [0 < step["reward"] < 1 for step in lines(tmp_path / "r" / "metrics.jsonl")] == [True] * 3
    call(monkeypatch, "grpo", *resume, "--eval-only")
    assert "reward" in json.loads((tmp_path / "r" / "eval.json").read_text())[-1]
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "grpo", *resume, "--steps", "4", "--reward", f"{own}/mine.py:raises")
    first, *below = capsys.readouterr().err.strip().partition("error: ")[2].splitlines()
    assert stop.value.code == 2
    for part in ("mine.py:raises", "KeyError: 'nothing'", "given the completion '", f"--resume {tmp_path / 'r'}"):
        assert part in first
    assert "in raises" in "".join(below)  # the user's code
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "r" / "checkpoint-3" / "state.pt").exists()


@pytest.mark.parametrize("function, told", [
    (lambda *_: float("nan"), "returned nan"), (lambda *_: "1.0", "returned '1.0'"), (lambda *_: None, "returned None"),
    (lambda *_: 1e39, "returned 1e+39"), (lambda *_: 10**400, "returned 1000"), (lambda *_: sys.exit(), "SystemExit"),
])  # fmt: skip
def test_a_reward_must_be_a_finite_number_and_a_long_completion_is_shown_in_part(function, told):
    with pytest.raises(rewards.RewardError) as failed:
        rewards.call("mine.py:function", function, "x" * 10_000, {})
    message = failed.value.args[0]
    assert told in message and "given the completion 'xxx" in message and len(message) < 1000


@pytest.mark.slow
def test_a_function_that_fails_in_one_process_ends_all_of_them(small, own, tmp_path):
    (own / "mine.py").write_text(OWN + "\n\ndef first(completion, row):\n    return 1 / (row['question'] != '1+0?')\n")
    flags = small("--dataset", own / "rows.jsonl", "--reward", f"{own}/mine.py:first", "--n-prompts", 32, "--name", "r")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29431",
               str(ROOT / "grpo.py"), *flags]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: --reward") == 1 and "ZeroDivisionError" in done.stderr


WELL = {"completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.5, "reward/parse_failed": 0.0, "entropy": 0.4}


@pytest.mark.parametrize("name, option, history", [
    ("cut_off", "--max-new-tokens", [{"completions/clipped_ratio": 0.31}]),
    ("no_signal", "--group-size", [{"frac_reward_zero_std": 0.9}] * 3),
    ("unreadable", "--prompt-template", [{"reward/parse_failed": 0.51}]),
    ("no_entropy", "--lr", [{}, {"entropy": 0.0039}]),
])  # fmt: skip
def test_each_trouble_has_a_warning_that_names_the_option(name, option, history):
    found = reporting.warnings([{**WELL, **metrics} for metrics in history])
    assert list(found) == [name] and option in found[name] and "\n" not in found[name]


@pytest.mark.parametrize("history", [
    [{}], [{"completions/clipped_ratio": 0.3, "reward/parse_failed": 0.5}], [{"frac_reward_zero_std": 1.0}] * 2,
    [{"frac_reward_zero_std": 1.0}, {}, {"frac_reward_zero_std": 1.0}, {"frac_reward_zero_std": 1.0}],
    [{}, {"entropy": 0.0041}],
])  # fmt: skip
def test_a_run_within_bounds_has_no_warning(history):
    assert reporting.warnings([{**WELL, **metrics} for metrics in history]) == {}


def test_a_warning_is_given_once_also_after_resuming(small, tmp_path, monkeypatch, capsys):
    flags = small("--name", "w", "--max-new-tokens", 2, "--eval-rows", 0)
    call(monkeypatch, "grpo", *flags)
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "w"), "--steps", "4")
    errors = capsys.readouterr().err
    assert errors.count("warning: ") == sum(map(errors.count, ("were cut off", "readable", "no group")))
    assert errors.count("were cut off") == 1
    given = [[key for key in step if key == "warning/cut_off"] for step in lines(tmp_path / "w" / "metrics.jsonl")]
    assert given == [["warning/cut_off"], [], [], []]


def test_a_box_inside_thinking_that_the_prompt_has_opened_earns_nothing():
    grade = rewards.load(None)
    record = {"completion": "perhaps \\boxed{5}", "answer": "5", "row": {}}
    assert grade(record)[0] == 1 and grade({**record, "thinking": "<think>"})[0] == 0
    assert grade({**record, "completion": "perhaps 4</think> \\boxed{5}", "thinking": "<think>"})[0] == 1
