"""tasks/countdown.py: its questions, its reward, and what is known of its completions."""

import random
import runpy
import sys

import pytest
from helpers import ROOT, call, lines

from harness import tiny
from tasks import countdown

ROW = {"question": "3 12 7=29?", "numbers": [3, 12, 7], "target": 29}


@pytest.mark.parametrize("completion, numbers, target", [
    ("12*3=36\n36-7=29", [3, 12, 7], 29), ("3*12=36\n36-7=29", [3, 12, 7], 29),
    ("30*29=870\n870-28=842", [28, 29, 30], 842),  # totals may grow as large as they need
    ("4*4=16\n16+5=21", [4, 4, 5], 21),  # a number that is given twice may be used twice
])  # fmt: skip
def test_a_correct_chain_is_rewarded(completion, numbers, target):
    assert countdown.reward(completion, {"numbers": numbers, "target": target}) == 1.0


@pytest.mark.parametrize("completion", [
    "", "29", "=29", "29=29", "3 12 7=29?",  # nothing, the target, the question
    "12*3=29\n29-7=29", "12*3=36\n36-7=28", "12*3=36\n36-7=029", "12*3=36\n36+7=29",  # wrong arithmetic
    "12-7=5\n5*3=29", "12/3=4\n4*7=28",
    "12*3=36", "12+7=19", "22+7=29",  # not all numbers
    "12+12=24\n24+5=29", "12*3=36\n36-7=29\n29*1=29", "29+0=29\n29+0=29",  # a number twice, or one that is not given
    "12*3=36\n35-6=29", "36-7=29\n12*3=36",  # a total that does not go on from the last one; the wrong order
    "12*3=36\n36-7=29\n", "12*3=36\n\n36-7=29", " 12*3=36\n36-7=29", "12*3=36\n36-7=29 ",  # text around it
    "12*3=36\n36-7=29#29", "so: 12*3=36\n36-7=29", "12*3=36\n36-7=29<eos>",
    "12*3=36;36-7=29", "12 * 3 = 36\n36 - 7 = 29", "12*3=36\r\n36-7=29", "12x3=36\n36-7=29",  # another notation
    "12*3-7=29", "12*3=36-7=29",  # not one step a line
    "-12*-3=36\n36-7=29", "+12*3=36\n36-7=29", "１２*3=36\n36-7=29",  # signs, digits of another script
    f"12*3={'9' * 5000}\n36-7=29",  # too long to be an int
])  # fmt: skip
def test_a_hacked_completion_earns_nothing(completion):
    assert countdown.reward(completion, ROW) == 0.0


def test_every_chain_of_the_list_earns_the_reward_for_its_total_and_for_no_other():
    rng = random.Random(0)
    for _ in range(20):
        numbers = [rng.randint(1, countdown.MAX_NUMBER) for _ in range(countdown.N_NUMBERS)]
        for chain, total in countdown.chains(numbers):
            assert countdown.reward(chain, {"numbers": numbers, "target": total}) == 1.0
            assert countdown.reward(chain, {"numbers": numbers, "target": total + 1}) == 0.0


def test_questions_are_many_distinct_seeded_and_solvable():
    rows = countdown.questions(countdown.N_TRAIN, 0, held_out=False)
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == len(rows) >= 20_000
    assert rows == countdown.questions(countdown.N_TRAIN, 0, held_out=False)
    assert rows[:50] != countdown.questions(countdown.N_TRAIN, 1, held_out=False)[:50]
    for row in rows[::400]:
        assert row["target"] in {total for _, total in countdown.chains(row["numbers"])}
        assert countdown.parse(row["question"]) == (row["numbers"], row["target"])


def test_held_out_questions_share_no_set_of_numbers_with_training_and_warm_start():
    def sets(rows):
        return {tuple(sorted(row["numbers"])) for row in rows}

    held_out = sets(countdown.questions(countdown.N_TEST, 0, held_out=True))
    assert not held_out & sets(countdown.questions(countdown.N_TRAIN, 0, held_out=False))
    asked, _ = countdown.demonstrations(random.Random(0), 3000, solved=0.5)
    assert not held_out & {tuple(sorted(countdown.parse(text)[0])) for text in asked}


@pytest.mark.parametrize("solved, low, high", [(1.0, 1.0, 1.0), (0.7, 0.7, 0.85), (0.0, 0.05, 0.4)])
def test_demonstrations_are_correct_chains_of_which_the_given_share_is_solved(solved, low, high):
    asked, completions = countdown.demonstrations(random.Random(0), 1000, solved)
    rewards = []
    for text, completion in zip(asked, completions, strict=True):
        numbers, target = countdown.parse(text)
        rewards.append(countdown.reward(completion, {"numbers": numbers, "target": target}))
        assert completion in {chain for chain, _ in countdown.chains(numbers)}
    assert low <= sum(rewards) / 1000 <= high


def test_choices_are_the_operators_and_the_numbers_of_the_question():
    text = "12*3=36\n36-7=29"
    assert "".join(text[i] for i in countdown.choice_positions(text)) == "12*3-7"
    assert countdown.choice_positions("12*=36\n36-7=29") == [9, 10]  # a step that cannot be read has none


@pytest.mark.slow
def test_the_script_makes_base_and_data_and_prints_a_command_that_runs(tmp_path, monkeypatch, capsys):
    """With a warm start of one step: the real one takes a minute."""
    warm_start = tiny.warm_start
    monkeypatch.setattr(tiny, "warm_start", lambda *given, **options: warm_start(*given, **options | {"steps": 1}))
    monkeypatch.setattr(sys, "argv", ["countdown.py", "--out", str(tmp_path / "countdown")])
    monkeypatch.chdir(ROOT)
    runpy.run_path("tasks/countdown.py", run_name="__main__")
    python, script, *options = capsys.readouterr().out.split("\n\n")[1].split()
    assert (python, script) == ("python", "egsw.py")
    size = "--steps 1 --n-prompts 2 --group-size 2 --eval-rows 2 --eval-k 1"
    call(monkeypatch, "egsw", *options, *size.split(), "--out", str(tmp_path), "--name", "run")
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
