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
from helpers import SCRIPTS, call, error_line, lines, needs_peft, refused
from safetensors.torch import load_file

from harness import files, reporting, rewards, stop
from harness import run as run_module

pytestmark = pytest.mark.slow


def final(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", [*SCRIPTS, "cov"])  # cov draws random numbers of its own
def test_two_steps_resume_two_steps_equals_four(name, small, tmp_path, monkeypatch):
    options = ("--save-every", 1, "--minibatches", 2, "--eval-every", 1)
    call(monkeypatch, name, *small("--name", "whole", "--steps", 4, *options))
    call(monkeypatch, name, *small("--name", "half", "--steps", 2, *options))
    call(monkeypatch, name, "--resume", str(tmp_path / "half"), "--steps", "4")
    a, b = tmp_path / "whole", tmp_path / "half"
    for key, value in final(a).items():
        assert torch.equal(value, final(b)[key]), key
    for file in ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl", "eval.json", "eval.csv"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert [p.name for p in b.glob("checkpoint-*")] == ["checkpoint-4"]


WITH_SGD = ("--optimizer", "sgd", "--lr", 0.1)
WITH_LORA = ("--lora-rank", 4, "--lr", 1e-2, "--kl-coef", 0.1)
WITH_BOTH = ("--lora-rank", 4, "--lr", 0.5, "--optimizer", "sgd", "--gradient-checkpointing")


@pytest.mark.parametrize("options", [
    WITH_SGD, pytest.param(WITH_LORA, marks=needs_peft), pytest.param(WITH_BOTH, marks=needs_peft),
])  # fmt: skip
def test_with_sgd_and_with_adapters_too(options, small, tmp_path, monkeypatch):
    options = (*options, "--save-every", 1, "--minibatches", 2, "--warmup-steps", 6)
    call(monkeypatch, "grpo", *small("--name", "whole", "--steps", 4, *options))
    call(monkeypatch, "grpo", *small("--name", "half", "--steps", 2, *options))
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "half"), "--steps", "4")
    a, b = tmp_path / "whole", tmp_path / "half"
    files_of_weights = [path.relative_to(a) for path in a.glob("*/*.safetensors")]
    assert len(files_of_weights) == (3 if "--lora-rank" in options else 2)
    for file in files_of_weights:
        after = load_file(a / file)
        assert all(torch.equal(after[key], value) for key, value in load_file(b / file).items()), file
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    rates = [row["lr"] for row in lines(a / "metrics.jsonl")]
    assert rates[0] < rates[1] < rates[2] == rates[3]  # warm-up goes on where it was


def test_a_run_of_adamw_does_not_go_on_with_sgd(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    stored = json.loads((tmp_path / "r" / "config.json").read_text())
    del stored["optimizer"]  # an older version had AdamW alone
    (tmp_path / "r" / "config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    resume = ("--resume", str(tmp_path / "r"), "--steps", "2")
    assert "--optimizer sgd" in refused(monkeypatch, capsys, tmp_path, *resume, "--optimizer", "sgd", name="grpo")
    call(monkeypatch, "grpo", *resume, "--optimizer", "adamw")


def test_a_damaged_checkpoint_is_refused_in_one_line(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    (tmp_path / "r" / "checkpoint-old").mkdir()  # a user's own copy is no checkpoint
    state = tmp_path / "r" / "checkpoint-1" / "state.pt"
    whole = state.read_bytes()
    capsys.readouterr()
    resume = ("--resume", str(tmp_path / "r"), "--steps", "2")
    for damage in (lambda: state.write_bytes(whole[:100]), state.unlink):
        damage()
        assert "checkpoint-1/state.pt" in refused(monkeypatch, capsys, tmp_path, *resume, name="grpo")
    state.write_bytes(whole)
    call(monkeypatch, "grpo", *resume)
    left = sorted(path.name for path in (tmp_path / "r").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-old"]


def test_a_run_goes_on_at_the_learning_rate_that_is_given(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 2, "--lr", 1e-3, "--warmup-steps", 4))
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "r"), "--steps", "4", "--lr", "1e-4")
    rates = [row["lr"] for row in lines(tmp_path / "r" / "metrics.jsonl")]  # after each step
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-4, 1e-4])


def test_logs_are_cut_off_at_the_checkpoint(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 2))
    folder = tmp_path / "r"
    with open(folder / "metrics.jsonl", "a") as f:  # a step that no checkpoint holds, and half a line
        f.write(json.dumps({"step": 3, "reward": 9.0}) + '\n{"step": 4, "rew')
    (folder / ".checkpoint-3-abc").mkdir()
    call(monkeypatch, "grpo", "--resume", str(folder), "--steps", "4")
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(row["reward"] <= 1 for row in lines(folder / "metrics.jsonl")) and not list(folder.glob(".check*"))


def test_resuming_what_cannot_be_resumed_is_refused(small, tmp_path, monkeypatch, capsys):
    assert "--resume" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "nothing"))
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    capsys.readouterr()
    assert "egsw.py" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "r"), name="egsw")
    shutil.rmtree(tmp_path / "r" / "checkpoint-1")
    stored = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps({**stored, "beta": 1}))
    assert "beta" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "r"), name="grpo")
    (tmp_path / "r" / "config.json").write_text(json.dumps(stored))
    assert "no checkpoint" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "r"), name="grpo")


def test_a_run_of_an_older_version_resumes_if_the_options_that_are_gone_were_off(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "gtpo", *small("--name", "r", "--steps", 1))
    path = tmp_path / "r" / "config.json"
    stored = json.loads(path.read_text())
    capsys.readouterr()  # the progress bar
    path.write_text(json.dumps({**stored, "kl_coef": 0.1}))
    assert "kl_coef" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "r"), name="gtpo")
    path.write_text(json.dumps({**stored, "kl_coef": 0.0}))
    call(monkeypatch, "gtpo", "--resume", str(tmp_path / "r"), "--steps", "2")
    assert [row["step"] for row in lines(tmp_path / "r" / "metrics.jsonl")] == [1, 2]


def started(monkeypatch, *options):
    """A Run that stands before its first step."""
    grpo = importlib.import_module("grpo")
    monkeypatch.setattr(sys, "argv", ["grpo.py", *options])
    return run_module.Run(grpo.parse(grpo.Config, ""))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_whole_checkpoint_remains(small, tmp_path, monkeypatch):
    """A child writes one checkpoint after another and is killed at a random moment, 25 times; what is left loads."""
    run = started(monkeypatch, *small("--name", "k"))
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
    assert [row["step"] for row in lines(tmp_path / "r" / "metrics.jsonl")] == [1, 2, 3]


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(small, tmp_path, monkeypatch, capsys):
    grpo = importlib.import_module("grpo")
    monkeypatch.setattr(grpo, "advantages", lambda rewards, *_: torch.full_like(rewards, torch.nan))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "grpo", *small("--name", "r", "--steps", 9))
    assert end.value.code == 1 and "not finite" in capsys.readouterr().err
    folder = tmp_path / "r"
    assert [row["skipped_updates"] for row in lines(folder / "metrics.jsonl")] == [1, 1, 1]
    assert all(torch.isfinite(v).all() for v in load_file(folder / "checkpoint-3" / "model.safetensors").values())


def test_one_bad_update_of_several_does_not_mark_the_others(small, tmp_path, monkeypatch):
    grpo, calls = importlib.import_module("grpo"), []
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
    signals = stop.Signals()
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
        stop.end_with_one_line(interrupt.value, tmp_path, 3, signals.status)
    assert end.value.code == status and "stopped in step 3" in capsys.readouterr().err


def test_a_full_disk_names_resume_only_if_there_is_a_checkpoint(tmp_path, capsys):
    for expected in ("--save-every", f"--resume {tmp_path}"):
        with pytest.raises(SystemExit) as end:
            stop.end_with_one_line(OSError(errno.ENOSPC, "No space left on device"), tmp_path, 3, 0)
        assert end.value.code == 1 and expected in capsys.readouterr().err
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)


def test_a_gpu_out_of_memory_is_one_line_with_the_options_that_help(tmp_path, capsys):
    for expected in ("--save-every", f"--resume {tmp_path}"):
        with pytest.raises(SystemExit) as end:
            stop.end_with_one_line(torch.OutOfMemoryError("CUDA out of memory"), tmp_path, 3, 0)
        message = error_line(capsys)
        assert end.value.code == 1 and "step 3" in message
        for option in ("--rollout-rows", "--token-budget", "--gradient-checkpointing", expected):
            assert option in message
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)


def test_other_errors_are_not_swallowed(tmp_path):
    assert stop.end_with_one_line(RuntimeError("peer review of gloo"), tmp_path, 3, 0) is None


@pytest.mark.parametrize("phase, step", [("evaluate", 0), ("log", 2)])
@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1),
])  # fmt: skip
def test_a_signal_ends_the_run_after_the_step_and_it_can_go_on(
    number, status, phase, step, small, tmp_path, monkeypatch
):
    method, handler = getattr(run_module.Run, phase), signal.getsignal(number)

    def with_signal(self, *args):
        method(self, *args)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run_module.Run, phase, with_signal)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "grpo", *small("--name", "half", "--steps", 4))
    assert end.value.code == status and (tmp_path / "half" / f"checkpoint-{step}").exists()
    assert signal.getsignal(number) == handler
    monkeypatch.setattr(run_module.Run, phase, method)
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "half"))
    call(monkeypatch, "grpo", *small("--name", "whole", "--steps", 4))
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("half", "whole")]
    assert metrics[0] == metrics[1]


def test_an_evaluation_alone_has_every_pass_at_k_and_takes_no_step(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "e", "--eval-only", "--eval-k", 32))
    (result,) = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert {"mean@32", *(f"pass@{k}" for k in (1, 2, 4, 8, 16, 32))} <= set(result) and len(result["mean@32_ci"]) == 2
    assert len(lines(tmp_path / "e" / "eval_completions.jsonl")) == 4 * 33
    assert "pass@32" in capsys.readouterr().out and not (tmp_path / "e" / "metrics.jsonl").exists()


def test_a_finished_run_can_be_evaluated_again_and_still_goes_on(small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    folder = tmp_path / "r"
    call(monkeypatch, "grpo", "--resume", str(folder), "--eval-only", "--eval-k", "4")
    before, after = json.loads((folder / "eval.json").read_text())
    assert (before["step"], after["step"]) == (0, 1) and "mean@2" in before and "mean@4" in after
    assert "mean@4" in capsys.readouterr().out and "mean@4" in (folder / "eval.csv").read_text()
    call(monkeypatch, "grpo", "--resume", str(folder), "--steps", "2")
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]


def test_a_budget_of_sampled_tokens_ends_a_run_resumed_or_not(small, tmp_path, monkeypatch):
    budget = ("--steps", 50, "--stop-tokens", 700, "--save-every", 1)
    call(monkeypatch, "grpo", *small("--name", "whole", *budget))
    call(monkeypatch, "grpo", *small("--name", "half", "--steps", 2, "--save-every", 1))
    call(monkeypatch, "grpo", "--resume", str(tmp_path / "half"), *map(str, budget))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "half/metrics.jsonl").read_bytes()
    tokens = [row["tokens"] for row in lines(tmp_path / "whole/timing.jsonl")]
    assert sum(tokens[:-1]) < 700 <= sum(tokens)


def test_a_tracker_that_is_not_installed_is_refused(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--track wandb" in refused(monkeypatch, capsys, tmp_path, *small("--track", "wandb"))


def tracker(monkeypatch, **functions):
    """Puts these functions into the place of wandb."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**functions))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def failing(**keywords):
    raise RuntimeError("No API key configured.")


def test_a_tracker_that_cannot_start_is_refused_before_the_run(small, tmp_path, monkeypatch, capsys):
    tracker(monkeypatch, init=failing)
    assert "--track wandb: No API key" in refused(monkeypatch, capsys, tmp_path, *small("--track", "wandb"))


def test_a_tracker_that_fails_later_is_one_warning(small, tmp_path, monkeypatch, capsys):
    tracker(monkeypatch, init=lambda **_: None, log=lambda metrics, step: failing())
    call(monkeypatch, "grpo", *small("--track", "wandb", "--name", "r"))
    assert capsys.readouterr().err.count("warning: --track wandb: No API key") == 1
    assert len(lines(tmp_path / "r" / "metrics.jsonl")) == 2


def test_resuming_touches_only_what_a_run_writes(small, tmp_path, monkeypatch):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    folder = tmp_path / "r"
    (folder / "notes.jsonl").write_text('{"step": 0}\n# mine\n{"step": 9}\n')
    for mine in (".git-abcdefgh", ".vscode-x", "checkpoint-01", "checkpoint-old"):
        (folder / mine).mkdir()
    (folder / "checkpoint-7").write_text("mine")
    (folder / ".checkpoint-3-abcdefgh").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call(monkeypatch, "grpo", "--resume", str(folder), "--steps", "2")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (folder / "notes.jsonl").read_text().count("\n") == 3 and not (folder / ".checkpoint-3-abcdefgh").exists()
    kept = (".git-abcdefgh", ".vscode-x", "checkpoint-01", "checkpoint-old", "checkpoint-7", "checkpoint-2")
    assert all((folder / name).exists() for name in kept)


@pytest.mark.parametrize("content", ["[{", "{}", "[1]", '[{"step": 0}]', "null"])
def test_a_damaged_evaluation_is_refused_in_one_line(content, small, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "r", "--steps", 1))
    (tmp_path / "r" / "eval.json").write_text(content)
    capsys.readouterr()
    assert "eval.json" in refused(monkeypatch, capsys, tmp_path, "--resume", str(tmp_path / "r"), name="grpo")


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


def test_a_tracker_gets_every_step(small, tmp_path, monkeypatch):
    got, configs = [], []
    fake = SimpleNamespace(
        init=lambda **keywords: configs.append(keywords["config"]),
        log=lambda metrics, step: got.append((step, metrics["reward"])),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    call(monkeypatch, "grpo", *small("--track", "trackio"))
    assert [step for step, _ in got] == [1, 2] and configs[0]["group_size"] == 4
