"""The scripts as a user runs them: what they write, what they refuse, and that the suite notices a broken one."""

import contextlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import METHODS, ROOT, SCRIPTS, call, lines, refused, wait_for_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_all_of_its_files(name, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *small("--minibatches", 2)])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
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
    assert "mean@2" in capsys.readouterr().out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompt = AutoTokenizer.from_pretrained(folder / "model")("1+2?", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=2).shape[1] > prompt.shape[1]
    assert (folder / "model" / "model.safetensors").exists() and not list(folder.glob(".model*"))


def test_kl_is_zero_at_first_and_then_grows(small, tmp_path, monkeypatch):
    call(monkeypatch, "egsw", *small("--name", "kl", "--kl-coef", 0.1, "--lr", 1e-2, "--steps", 3))
    kl = [row["kl"] for row in lines(tmp_path / "kl" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0


@pytest.mark.parametrize("name, option, value", [
    *(("egsw", option, value) for option, value in [
        ("--group-size", 1), ("--temperature", 0), ("--temperature", "nan"),
        ("--steps", -1), ("--lr", -1), ("--n-prompts", 0), ("--reduction", "median"),
        ("--alpha", "x"), ("--colour", 1), ("--seed", -1), ("--seed", 2**63), ("--max-new-tokens", 5000),
        ("--dataset", "no-such-data"), ("--model", "no/such/folder/at all"),
        ("--name", "a/b"), ("--name", ".."), ("--name", "x" * 300), ("--name", "mine"),
        ("--out", __file__), ("--out", __file__ + "/below"),
    ]),
    ("dapo", "--kl-coef", 0.1), ("gtpo", "--kl-coef", 0.1), ("grpo_s", "--kl-coef", 0.1),
])  # fmt: skip
def test_wrong_options_are_refused(name, option, value, small, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()  # a run that is not overwritten
    assert option in refused(monkeypatch, capsys, tmp_path, *small(option, value), name=name)


def test_an_evaluation_of_nothing_is_refused(small, tmp_path, monkeypatch, capsys):
    assert "--eval-rows" in refused(monkeypatch, capsys, tmp_path, *small("--eval-only", "--eval-rows", 0))


@pytest.mark.slow
def test_ctrl_c_keeps_metrics_and_model(small, tmp_path):
    command = [sys.executable, ROOT / "grpo.py", *small("--name", "long", "--steps", 10000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "long" / "metrics.jsonl"
    wait_for_steps(metrics, 3)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    steps = [row["step"] for row in lines(metrics)]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "long" / f"checkpoint-{steps[-1]}" / "model.safetensors").exists()


@pytest.mark.slow
def test_prints_survive_a_closed_pipe_and_a_terminal_without_unicode(small, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "答案是四"}\n' * 2)
    command = [sys.executable, "-u", ROOT / "grpo.py", *small("--dataset", data, "--eval-rows", 0, "--name", "r")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert b"dropped" in process.stdout.readline()
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait(60) == 0
    assert (tmp_path / "r" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_closed_terminal_saves_and_ends_the_run(small, tmp_path):
    import pty

    command = [sys.executable, str(ROOT / "grpo.py"), *small("--name", "r", "--steps", 10000)]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command)
    metrics = tmp_path / "r" / "metrics.jsonl"
    os.set_blocking(terminal, False)

    def read_what_it_prints():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 100_000)

    wait_for_steps(metrics, 1, read_what_it_prints)
    os.close(terminal)  # the kernel sends SIGHUP, and writing to the terminal is an error from now on
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    last = lines(metrics)[-1]["step"]
    assert (tmp_path / "r" / f"checkpoint-{last}" / "state.pt").exists()


@pytest.mark.parametrize("name", METHODS)
def test_help_names_every_option_once(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(METHODS[name].Config):
        assert len(re.findall(rf"^  --{field.name.replace('_', '-')}\b(?!-)", text, re.MULTILINE)) == 1, field.name
