"""The arithmetic task and the tiny base."""

import json
import random
import re

import pytest

import verifier
from harness import tiny
from tasks import arithmetic


def value(text):
    """The sum of the signed terms in a text."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", text))


@pytest.mark.parametrize("guess, merge", [(0, 0), (0.5, 0.5), (1, 0), (0, 1)])
def test_every_demonstration_is_correct(guess, merge):
    rng = random.Random(0)
    for _ in range(300):
        q = arithmetic.draw_question(rng, 4, 6, None)
        text = arithmetic.solve(rng, q, guess, merge)
        *steps, last = text.split("\n")
        assert last == f"{tiny.MARKER}{value(q)}"
        for step in steps:
            left, right = step.split("=")
            assert value(left) == int(right) and 0 <= int(right) <= arithmetic.MAX_TOTAL
        assert verifier.math_reward(text, text) == 1.0


def test_a_habit_shows_in_the_number_of_steps():
    rng = random.Random(0)
    q = "9-1+2+3-4+5?"
    assert arithmetic.solve(rng, q).count("\n") == 5  # one step a term
    assert arithmetic.solve(rng, q, guess=1) == "#### 14"
    assert arithmetic.solve(rng, q, merge=1).count("\n") < 5


def test_held_out_problems_are_disjoint_from_all_that_training_draws():
    held = {row["question"] for row in arithmetic.problems(256, 0, held_out=True)}
    assert len(held) == 256
    for seed in range(3):
        assert not held & {row["question"] for row in arithmetic.problems(2000, seed, held_out=False)}
    rng = random.Random(arithmetic.RECIPE["seed"])
    assert not held & {arithmetic.draw_question(rng, 4, 6, held_out=False) for _ in range(5000)}  # the warm start's


def test_problems_are_seeded_and_not_without_end():
    assert arithmetic.problems(20, 1, False) == arithmetic.problems(20, 1, False) != arithmetic.problems(20, 2, False)
    with pytest.raises(ValueError, match="of 4096 chains"):
        arithmetic.problems(4096, 0, held_out=False, min_terms=2, max_terms=2)


def test_tokenizer_is_lossless_and_the_marker_is_one_token():
    tokenizer = tiny.new_tokenizer()
    text = arithmetic.problems(1, 0, False)[0]["answer"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text and tokenizer.unk_token_id not in ids
    assert len(ids) == len(text) - len(tiny.MARKER) + 1


def test_the_base_is_built_once_and_again_when_it_is_damaged(tmp_path, monkeypatch, capsys):
    builds = []
    monkeypatch.setattr(tiny, "warm_start", lambda *a, **k: builds.append(1))
    path = tmp_path / "base"
    weights = path / "model.safetensors"
    for damage in (
        lambda: None,  # there is none yet
        lambda: weights.write_bytes(weights.read_bytes()[:-10]),
        (path / "config.json").unlink,
        lambda: (path / "manifest.json").write_text(json.dumps({"recipe": {}})),
    ):
        damage()
        before = len(builds)
        arithmetic.base(path)
        arithmetic.base(path)
        assert len(builds) == before + 1
    assert "damaged" in capsys.readouterr().out


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "warm_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        arithmetic.base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
