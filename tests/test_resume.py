"""Runs that survive: resuming, being killed, full disks, updates that are not finite, signals."""

import errno
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import call, error_line, lines, needs_peft, refused
from safetensors.torch import load_file

import grpo
from harness import files, reporting, rewards
from harness import run as run_module
from harness.options import parse

pytestmark = pytest.mark.slow


@pytest.fixture()
def trained(small, tmp_path, monkeypatch, capsys):
    """The folder `r` of a run of grpo with one step."""
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    capsys.readouterr()
    return tmp_path / "r"


def change(path, **values):
    """Changes these values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def steps(folder):
    return [row["step"] for row in lines(folder / "metrics.jsonl")]


WITH_SGD = ("--optimizer", "sgd", "--lr", 0.1)
WITH_LORA = ("--lora-rank", 4, "--lr", 1e-2, "--kl-coef", 0.1)
WITH_BOTH = ("--lora-rank", 4, "--lr", 0.5, "--optimizer", "sgd", "--gradient-checkpointing")


@pytest.mark.parametrize("name, options", [
    ("grpo", ()), ("dapo", ()), ("gtpo", WITH_SGD), ("cov", ()),  # cov draws random numbers of its own
    pytest.param("egsw", WITH_LORA, marks=needs_peft), pytest.param("grpo_s", WITH_BOTH, marks=needs_peft),
])  # fmt: skip
def test_two_steps_resume_two_steps_equals_four(name, options, small, tmp_path, monkeypatch):
    options = (*options, "--save-every", 1, "--minibatches", 2, "--eval-every", 1, "--warmup-steps", 6)
    call(monkeypatch, name, *small("--name", "whole", "--steps", 4, *options))
    call(monkeypatch, name, *small("--name", "half", "--steps", 2, *options))
    call(monkeypatch, name, "--resume", str(tmp_path / "half"), "--steps", "4")
    a, b = tmp_path / "whole", tmp_path / "half"
    files_of_weights = {path.relative_to(a) for path in a.glob("*/*.safetensors")}
    assert files_of_weights == {path.relative_to(b) for path in b.glob("*/*.safetensors")}
    folders_of_weights = {file.parent.name for file in files_of_weights} - {"best"}
    assert folders_of_weights == {"model", "checkpoint-4"} | ({"adapter"} if "--lora-rank" in options else set())
    for file in files_of_weights:
        after = load_file(b / file)
        assert all(torch.equal(after[key], value) for key, value in load_file(a / file).items()), file
    for file in ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl", "eval.json", "eval.csv"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert [path.name for path in b.glob("checkpoint-*")] == ["checkpoint-4"]
    rates = [row["lr"] for row in lines(a / "metrics.jsonl")]
    assert rates[0] < rates[1] < rates[2] == rates[3]  # warm-up goes on where it was


def test_a_run_goes_on_at_the_learning_rate_that_is_given(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 2, "--lr", 1e-3, "--warmup-steps", 4))
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "r"), "--steps", "4", "--lr", "1e-4")
    rates = [row["lr"] for row in lines(tmp_path / "r" / "metrics.jsonl")]  # after each step
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-4, 1e-4])


def test_what_cannot_be_resumed_is_refused_in_one_line(trained, tmp_path, monkeypatch, capsys):
    def message(folder=trained, name="grpo"):
        return refused(monkeypatch, capsys, tmp_path, "--resume", str(folder), "--steps", "2", name=name)

    assert "--resume" in message(tmp_path / "nothing")
    assert "egsw.py" in message(name="egsw")
    state = trained / "checkpoint-1" / "state.pt"
    whole = state.read_bytes()
    for damage in (lambda: state.write_bytes(whole[:100]), state.unlink):
        damage()
        assert "checkpoint-1/state.pt" in message()
    state.write_bytes(whole)
    evaluation = (trained / "eval.json").read_bytes()
    for damaged in ("[{", "{}", "[1]", '[{"step": 0}]', "null"):
        (trained / "eval.json").write_text(damaged)
        assert "eval.json" in message()
    (trained / "eval.json").write_bytes(evaluation)
    call(monkeypatch, "grpo", "--resume", str(trained), "--steps", "2")  # nothing of it is left
    capsys.readouterr()
    shutil.rmtree(trained / "checkpoint-2")
    assert "no checkpoint" in message()
    change(trained / "config.json", beta=1)
    assert "beta" in message()


def test_a_run_of_an_older_version_resumes_if_the_options_that_are_gone_were_off(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "gtpo", *small("--name", "r", "--steps", 1))
    stored = tmp_path / "r" / "config.json"
    values = json.loads(stored.read_text())
    del values["optimizer"]  # an older version had AdamW alone
    stored.write_text(json.dumps(values))
    resume = ("--resume", str(tmp_path / "r"), "--steps", "2")
    capsys.readouterr()
    change(stored, kl_coef=0.1)
    assert "kl_coef" in refused(monkeypatch, capsys, tmp_path, *resume, name="gtpo")
    change(stored, kl_coef=0.0)
    assert "--optimizer sgd" in refused(monkeypatch, capsys, tmp_path, *resume, "--optimizer", "sgd", name="gtpo")
    call(monkeypatch, "gtpo", *resume, "--optimizer", "adamw")
    assert steps(tmp_path / "r") == [1, 2]


def test_resuming_changes_only_what_a_run_writes_and_cuts_logs_off_at_the_checkpoint(trained, tmp_path, monkeypatch):
    with open(trained / "metrics.jsonl", "a") as f:  # a step that no checkpoint holds, and half a line
        f.write(json.dumps({"step": 2, "reward": 9.0}) + '\n{"step": 3, "rew')
    (trained / "notes.jsonl").write_text('{"step": 0}\n# mine\n{"step": 9}\n')
    for mine in (".git-abcdefgh", ".vscode-x", "checkpoint-01", "checkpoint-old"):
        (trained / mine).mkdir()
    (trained / "checkpoint-7").write_text("mine")
    (trained / ".checkpoint-3-abcdefgh").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call(monkeypatch, "grpo", "--resume", str(trained), "--steps", "3")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert steps(trained) == [1, 2, 3] and all(row["reward"] <= 1 for row in lines(trained / "metrics.jsonl"))
    assert (trained / "notes.jsonl").read_text().count("\n") == 3 and (trained / ".git-abcdefgh").exists()
    assert (trained / ".vscode-x").exists() and not list(trained.glob(".checkpoint-*"))
    left = sorted(path.name for path in trained.glob("checkpoint-*"))
    assert left == ["checkpoint-01", "checkpoint-3", "checkpoint-7", "checkpoint-old"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_whole_checkpoint_remains(small):
    """A child writes one checkpoint after another and is killed at a random moment, 25 times; what is left loads."""
    run = run_module.Run(parse(grpo.Config, "", small("--name", "k")))
    run.save()
    rng, seen, leftovers = random.Random(0), set(), 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            while True:
                run.step += 1
                run.save()
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftovers += len(list(run.folder.glob(".checkpoint-*")))
        checkpoint = files.last_checkpoint(run.folder)
        run.restore(checkpoint)  # raises if the state is not whole; cleans up
        assert set(load_file(checkpoint / "model.safetensors")) and run.step == int(checkpoint.name.split("-")[1])
        seen.add(run.step)
    assert leftovers and len(seen) > 5  # some were killed in the middle of a write, and some wrote


def test_a_full_disk_ends_the_run_with_a_line_and_keeps_the_last_checkpoint(small, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **keywords)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "grpo", *small("--name", "r", "--steps", 3, "--save-every", 1))
    assert end.value.code == 1 and "full" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "r").glob("*checkpoint*")] == ["checkpoint-1"]
    monkeypatch.setattr(torch, "save", save)
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "r"))
    assert steps(tmp_path / "r") == [1, 2, 3]


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "advantages", lambda rewards, *_: torch.full_like(rewards, torch.nan))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "grpo", *small("--name", "r", "--steps", 9))
    assert end.value.code == 1 and "not finite" in capsys.readouterr().err
    folder = tmp_path / "r"
    assert [row["skipped_updates"] for row in lines(folder / "metrics.jsonl")] == [1, 1, 1]
    assert all(torch.isfinite(v).all() for v in load_file(folder / "checkpoint-3" / "model.safetensors").values())


def test_one_bad_update_of_several_does_not_mark_the_others(small, tmp_path, monkeypatch):
    calls = []
    loss = grpo.loss

    def once_nan(*args, **keywords):
        calls.append(1)
        return loss(*args, **keywords) * (torch.nan if len(calls) == 1 else 1)

    monkeypatch.setattr(grpo, "loss", once_nan)
    monkeypatch.setattr(grpo, "advantages", lambda rewards, *_: torch.ones_like(rewards))
    monkeypatch.setattr(grpo, "clip_fractions", lambda ratio, *_, **__: {"ones": torch.ones_like(ratio)})
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 2, "--minibatches", 3, "--n-prompts", 24))
    rows = lines(tmp_path / "r" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [1, 0]
    assert rows[0]["ones"] == pytest.approx(1.0)  # a mean over the tokens of the updates that were made
    assert all(math.isfinite(value) for row in rows for value in row.values()) and rows[0]["grad_norm"] > 0


def test_a_batch_without_a_usable_group_changes_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "load", lambda reward: lambda text: (0.0, "wrong"))
    call(monkeypatch, "dapo", *small("--name", "r", "--max-rounds", 2))
    rows = lines(tmp_path / "r" / "metrics.jsonl")
    assert [row["dynamic_sampling/groups"] for row in rows] == [0, 0] and rows[0]["grad_norm"] == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_run_at_once_with_the_status_of_the_first(number, status, tmp_path, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    signals = run_module.Signals()
    signals.catch()
    try:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)  # within a second: torchrun sends on what the terminal has sent
        assert signals.status == status
        signals.time -= 2
        with pytest.raises(KeyboardInterrupt) as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(SystemExit) as end:
        run_module.end_with_one_line(interrupt.value, tmp_path, 3, signals.status)
    assert end.value.code == status and "stopped in step 3" in capsys.readouterr().err


@pytest.mark.parametrize("error, told", [
    (OSError(errno.ENOSPC, "No space left on device"), ["full"]),
    (torch.OutOfMemoryError("CUDA out of memory"),
     ["step 3", "--rollout-rows", "--token-budget", "--gradient-checkpointing"]),
])  # fmt: skip
def test_a_full_disk_or_gpu_is_one_line_that_names_resume_only_if_there_is_a_checkpoint(error, told, tmp_path, capsys):
    for way_out in ("--save-every", f"--resume {tmp_path}"):
        with pytest.raises(SystemExit) as end:
            run_module.end_with_one_line(error, tmp_path, 3, 0)
        message = error_line(capsys)
        assert end.value.code == 1 and all(part in message for part in [*told, way_out])
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
    assert run_module.end_with_one_line(RuntimeError("peer review of gloo"), tmp_path, 3, 0) is None  # not swallowed


def test_a_signal_ends_the_run_after_the_step_and_it_can_go_on(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "whole", "--steps", 3))
    log_2 = ("log", 2)
    phases = {signal.SIGINT: ("evaluate", 0), signal.SIGTERM: log_2, signal.SIGHUP: ("log", 1), signal.SIGUSR1: log_2}
    for number, (phase, step) in phases.items():
        handler = signal.getsignal(number)
        method = getattr(run_module.Run, phase)

        def with_signal(self, *args, number=number, step=step, method=method):
            method(self, *args)
            if self.step == step:
                os.kill(os.getpid(), number)

        folder = tmp_path / number.name
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(run_module.Run, phase, with_signal)
            call(patch, "grpo", *small("--name", folder.name, "--steps", 3))
        assert end.value.code == 128 + number and (folder / f"checkpoint-{step}").exists()
        assert signal.getsignal(number) == handler
        call(monkeypatch, "grpo", "--resume", str(folder))
        assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_an_evaluation_alone_has_every_pass_at_k_and_takes_no_step(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "e", "--eval-only", "--eval-k", 32))
    (result,) = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert {"mean@32", *(f"pass@{k}" for k in (1, 2, 4, 8, 16, 32))} <= set(result) and len(result["mean@32_ci"]) == 2
    assert len(lines(tmp_path / "e" / "eval_completions.jsonl")) == 4 * 33
    assert "pass@32" in capsys.readouterr().out and not (tmp_path / "e" / "metrics.jsonl").exists()


def test_a_finished_run_can_be_evaluated_again_and_still_goes_on(trained, monkeypatch, capsys):
    call(monkeypatch, "grpo", "--resume", str(trained), "--eval-only", "--eval-k", "4")
    before, after = json.loads((trained / "eval.json").read_text())
    assert (before["step"], after["step"]) == (0, 1) and "mean@2" in before and "mean@4" in after
    assert "mean@4" in capsys.readouterr().out and "mean@4" in (trained / "eval.csv").read_text()
    call(monkeypatch, "grpo", "--resume", str(trained), "--steps", "2")
    assert steps(trained) == [1, 2]


def test_a_budget_of_sampled_tokens_ends_a_run_resumed_or_not(small, tmp_path, monkeypatch):
    budget = ("--steps", 50, "--stop-tokens", 700, "--save-every", 1)
    call(monkeypatch, "grpo", *small("--name", "whole", *budget))
    call(monkeypatch, "grpo", *small("--name", "half", "--steps", 2, "--save-every", 1))
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "half"), *map(str, budget))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "half/metrics.jsonl").read_bytes()
    tokens = [row["tokens"] for row in lines(tmp_path / "whole/timing.jsonl")]
    assert sum(tokens[:-1]) < 700 <= sum(tokens)


def tracker(monkeypatch, name, **functions):
    """Puts these functions into the place of a tracker's package."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def failing(*arguments, **keywords):
    raise RuntimeError("No API key configured.")


def test_a_tracker_that_is_missing_or_cannot_start_is_refused_before_the_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--track wandb" in refused(monkeypatch, capsys, tmp_path, *small("--track", "wandb"))
    tracker(monkeypatch, "wandb", init=failing)
    assert "--track wandb: No API key" in refused(monkeypatch, capsys, tmp_path, *small("--track", "wandb"))


def test_a_tracker_gets_every_step_and_is_one_warning_when_it_fails(small, tmp_path, monkeypatch, capsys):
    configs, rows = [], []
    tracker(
        monkeypatch, "trackio", init=lambda **keywords: configs.append(keywords["config"]),
        log=lambda metrics, step: rows.append((step, metrics["reward"])),
    )  # fmt: skip
    call(monkeypatch, "grpo", *small("--track", "trackio", "--name", "good"))
    assert [step for step, _ in rows] == [1, 2] and configs[0]["group_size"] == 4
    tracker(monkeypatch, "wandb", init=lambda **_: None, log=failing)
    call(monkeypatch, "grpo", *small("--track", "wandb", "--name", "bad"))
    assert capsys.readouterr().err.count("warning: --track wandb: No API key") == 1
    assert steps(tmp_path / "bad") == [1, 2]


def test_the_best_model_is_kept_and_a_worse_end_is_a_warning(small, tmp_path, monkeypatch, capsys):
    means = iter([0.5, 0.9, 0.1])
    evaluate = reporting.evaluate

    def made_up(greedy, sampled, k):
        mean = next(means)
        return {**evaluate(greedy, sampled, k), "mean@2": mean, "mean@2_ci": (mean - 0.1, mean + 0.1)}

    monkeypatch.setattr(reporting, "evaluate", made_up)
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 2, "--eval-every", 1, "--lr", 0.1, "--save-every", 1))
    printed = capsys.readouterr()
    marked = [line.split()[0] for line in printed.out.splitlines() if line.endswith("<- best/")]
    assert marked == ["1"] and "worse than after step 1" in printed.err and "best/" in printed.err
    best, last = (load_file(tmp_path / "r" / name / "model.safetensors") for name in ("best", "model"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
