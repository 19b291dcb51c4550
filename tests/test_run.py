"""The scripts as a user runs them: what they write, what they refuse, and that the suite notices a broken one."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, script

SCRIPTS = ["grpo", "dapo", "egsw", "gtpo", "grpo_s"]


def call(monkeypatch, name, *options):
    """Runs a script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    importlib.import_module(name).main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(name, small, tmp_path):
    done = script(f"{name}.py", *small("--minibatches", 2, "--kl-coef", 0.01))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"{name}-1"
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for key in (
        "reward", "reward_std", "entropy", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/low",
        "clip_ratio/high", "frac_reward_zero_std", "grad_norm", "lr", "loss",
    ):  # fmt: skip
        assert all(math.isfinite(row[key]) for row in metrics), key
    assert {"question", "answer", "completion", "reward", "truncated"} <= set(lines(folder / "completions.jsonl")[0])
    assert [row["step"] for row in json.loads((folder / "eval.json").read_text())] == [0, 2]
    assert (folder / "eval.csv").read_text().count("\n") == 3
    assert json.loads((folder / "config.json").read_text())["group_size"] == 4
    assert "mean@2" in done.stdout and "Traceback" not in done.stderr

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompt = AutoTokenizer.from_pretrained(folder / "model")("1+2?", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=2).shape[1] > prompt.shape[1]
    assert (folder / "model" / "model.safetensors").exists() and not list(folder.glob(".model*"))


@pytest.mark.parametrize("name", ["grpo", "gtpo"])
def test_same_seed_same_metrics_bit_for_bit(name, small, tmp_path, monkeypatch):
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        call(monkeypatch, name, *small("--name", run, "--seed", seed))
    a, b, c = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in "abc")
    assert a == b != c


def test_metrics_do_not_depend_on_the_token_budget(small, tmp_path, monkeypatch):
    for run, budget in (("a", 60), ("b", 10**6)):
        call(monkeypatch, "gtpo", *small("--name", run, "--token-budget", budget))
    for a, b in zip(*(lines(tmp_path / run / "metrics.jsonl") for run in "ab"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_kl_is_zero_at_first_and_then_grows(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "kl", "--kl-coef", 0.1, "--lr", 1e-2, "--steps", 3))
    kl = [row["kl"] for row in lines(tmp_path / "kl" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0


def test_dapo_replaces_groups_without_information(small, tmp_path, monkeypatch):
    call(monkeypatch, "dapo", *small("--name", "d", "--max-rounds", 3, "--overlong-filter"))
    for row in lines(tmp_path / "d" / "metrics.jsonl"):
        assert 1 <= row["dynamic_sampling/rounds"] <= 3 and row["dynamic_sampling/groups"] <= 6
        assert row["dynamic_sampling/rounds"] == 3 or row["dynamic_sampling/groups"] == 6


# --- what is refused: one line, status 2, nothing written -------------------------------------------------------------


def refused(monkeypatch, capsys, out, *options, name="egsw"):
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, *options)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and "\n" not in message, message
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return message


@pytest.mark.parametrize(
    "option, value",
    [
        ("--group-size", 1), ("--temperature", 0), ("--temperature", "nan"), ("--weight-temperature", 0),
        ("--steps", -1), ("--lr", -1), ("--clip-low", 0), ("--n-prompts", 0), ("--reduction", "median"),
        ("--alpha", "x"), ("--colour", 1),
        ("--dataset", "no-such-data"), ("--model", "no/such/folder/at all"), ("--max-new-tokens", 5000),
        ("--name", "a/b"), ("--name", ".."),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(option, value, small, tmp_path, monkeypatch, capsys):
    options = small(option, value)
    assert option in refused(monkeypatch, capsys, tmp_path, *options)


def test_an_evaluation_of_nothing_is_refused(small, tmp_path, monkeypatch, capsys):
    assert "--eval-rows" in refused(monkeypatch, capsys, tmp_path, *small("--eval-only", "--eval-rows", 0))


def test_an_existing_run_is_not_overwritten(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    assert "--name mine" in refused(monkeypatch, capsys, tmp_path, *small("--name", "mine"))


def test_an_unusable_run_directory_is_refused(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(monkeypatch, capsys, tmp_path, *small("--out", tmp_path / "file"))
    assert "--out" in refused(monkeypatch, capsys, tmp_path, *small("--out", tmp_path / "file" / "below"))


def test_a_damaged_checkpoint_is_refused(small, toy, tmp_path, monkeypatch, capsys):
    bad, out = tmp_path / "bad", tmp_path / "out"
    shutil.copytree(toy, bad)
    (bad / "model.safetensors").write_bytes(b"not weights")
    out.mkdir()
    assert "--model" in refused(monkeypatch, capsys, out, *small("--model", bad, "--out", out))


@pytest.mark.parametrize("row", ['{"question": "1+1?"}', '{"answer": "2"}', "[1]", "not json"])
def test_a_row_without_question_or_answer_is_refused(row, small, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"question": "1+2?", "answer": "3"}\n' + row + "\n")
    out.mkdir()
    message = refused(monkeypatch, capsys, out, *small("--out", out, "--dataset", data))
    assert "--dataset" in message and ("line 2" in message or "in row" in message)


def test_ctrl_c_keeps_metrics_and_model(small, tmp_path):
    command = [sys.executable, ROOT / "grpo.py", *small("--name", "long", "--steps", 10000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "long" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    steps = [row["step"] for row in lines(metrics)]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "long" / f"checkpoint-{steps[-1]}" / "model.safetensors").exists()


def test_help_names_every_option():
    done = script("gtpo.py", "--help")
    assert done.returncode == 0
    for option in ("--alpha2", "--compare", "--group-size", "--lr", "--model"):
        assert re.search(rf"^ +{option}\b", done.stdout, re.MULTILINE)


# --- a test that can fail ---------------------------------------------------------------------------------------------


def test_the_suite_notices_a_flipped_sign(tmp_path):
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    (tmp_path / "tests").mkdir()
    for file in ("conftest.py", "test_methods.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests")
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_methods.py", "-k", "on_policy or worked"]
    assert subprocess.run(pytest_run, cwd=tmp_path, capture_output=True).returncode == 0
    source = (tmp_path / "grpo.py").read_text()
    assert source.count("return -objective * mask") == 1
    (tmp_path / "grpo.py").write_text(source.replace("return -objective * mask", "return objective * mask"))
    assert subprocess.run(pytest_run, cwd=tmp_path, capture_output=True).returncode == 1
