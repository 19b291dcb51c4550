"""Several processes: the same samples and weights as one, data parallel and with FSDP2; and what if one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import METHODS, ROOT, SCRIPTS, call, lines, needs_peft, refused
from safetensors.torch import load_file

from harness import distributed

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Runs every command line it is given, one after the other in the same two processes: starting these takes longer.
WORKER = """
import importlib, json, sys
import torch.distributed as dist
from harness import distributed
distributed.finish = dist.barrier
for name, *options in json.loads(sys.argv[1]):
    sys.argv = [f"{name}.py", *options]
    importlib.import_module(name).main()
dist.destroy_process_group()
"""
# Seven prompts are three for one process and four for the other; the reference model comes with grpo alone.
SIZE = ("--steps", 3, "--n-prompts", 7, "--lr", 1e-3, "--eval-rows", 5)
OWN = {
    "grpo": ("--kl-coef", 0.1),
    "gtpo": ("--minibatches", 2),
    "dapo": ("--eval-rows", 1),
    "egsw": ("--rollout-rows", 8),
    "cov": ("--minibatches", 2, "--share", 0.2, "--lower", 0.1),
}


def two_processes(tmp_path, *runs):
    """Runs command lines (method, options...) in two processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, str(tmp_path / "worker.py"), json.dumps([list(map(str, run)) for run in runs])]
    done = subprocess.run(
        command, env={**ONE_THREAD, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[:6000]


def final(folder):
    return load_file(folder / "model" / "model.safetensors")


def distance(a, b):
    """The largest difference between two runs' trained weights."""
    a, b = final(a), final(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def both(toy, toy_data, tmp_path_factory):
    """Folder with the runs <method>-parallel and <method>-fsdp, of two processes; and the options of all of them."""
    out = tmp_path_factory.mktemp("two")
    fixed = ["--group-size", "4", "--max-new-tokens", "12", "--eval-k", "2", "--token-budget", "200"]
    options = ["--model", toy, "--dataset", toy_data, "--out", out, *fixed, *SIZE]
    runs = []
    for name in [*SCRIPTS, "cov"]:
        for kind, flag in (("parallel", "--no-fsdp"), ("fsdp", "--fsdp")):
            runs.append((METHODS[name].__name__, *options, *OWN.get(name, ()), "--name", f"{name}-{kind}", flag))
    two_processes(out, *runs)
    return out, options


@pytest.mark.parametrize("name", [*SCRIPTS, "cov"])
def test_two_processes_sample_and_learn_what_one_does(name, both, monkeypatch):
    out, options = both
    call(monkeypatch, name, *map(str, options), *map(str, OWN.get(name, ())), "--name", f"{name}-one")
    one = out / f"{name}-one"
    for kind in ("parallel", "fsdp"):
        two = out / f"{name}-{kind}"
        for file in ("completions.jsonl", "eval_completions.jsonl"):
            assert (one / file).read_bytes() == (two / file).read_bytes()
        for a, b in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
            assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
        assert distance(one, two) < 1e-5
        assert max(float((final(one)[k] - v).abs().max()) for k, v in base_weights(options).items()) > 0.001


TRAINED = {  # what is trained, and how
    "sgd": ("--optimizer", "sgd", "--lr", 0.3),
    "lora": ("--lora-rank", 3, "--lr", 1e-3, "--kl-coef", 0.1, "--minibatches", 2, "--gradient-checkpointing"),
}


@needs_peft
def test_sgd_and_adapters_learn_in_two_processes_what_they_learn_in_one(small, toy, tmp_path, monkeypatch):
    runs = []
    for name, options in TRAINED.items():
        options = small("--steps", 3, "--n-prompts", 7, *options)
        call(monkeypatch, "grpo", *options, "--name", f"{name}-one")
        runs += [
            ("grpo", *options, "--name", f"{name}-parallel"),
            ("grpo", *options, "--name", f"{name}-fsdp", "--fsdp"),
        ]
    resumed = tmp_path / "lora-resumed"
    runs += [
        ("grpo", *small(*TRAINED["lora"], "--n-prompts", 7, "--steps", 2), "--name", resumed.name),
        ("grpo", "--resume", resumed, "--steps", 3, "--fsdp"),
    ]
    two_processes(tmp_path, *runs)
    base = load_file(toy / "model.safetensors")
    for name in TRAINED:
        one = tmp_path / f"{name}-one"
        assert max(float((final(one)[key] - weight).abs().max()) for key, weight in base.items()) > 0.001
        for kind in ("parallel", "fsdp"):
            assert distance(one, tmp_path / f"{name}-{kind}") < 1e-5
            assert (one / "completions.jsonl").read_bytes() == (
                tmp_path / f"{name}-{kind}/completions.jsonl"
            ).read_bytes()
    assert distance(tmp_path / "lora-one", resumed) < 1e-5


def base_weights(options):
    return load_file(Path(options[1]) / "model.safetensors")


def test_a_checkpoint_of_two_processes_resumes_on_one_and_the_other_way_round(small, tmp_path, monkeypatch):
    options = small("--minibatches", 2, "--lr", 3e-4)  # AdamW multiplies what rounding leaves by the learning rate
    call(monkeypatch, "egsw", *options, "--steps", "4", "--name", "whole")
    call(monkeypatch, "egsw", *options, "--steps", "2", "--name", "one")
    two_processes(
        tmp_path,
        ("egsw", *options, "--name", "sharded", "--fsdp"),
        ("egsw", *options, "--name", "parallel"),
        ("egsw", "--resume", tmp_path / "one", "--steps", 4, "--fsdp"),
        ("egsw", "--resume", tmp_path / "parallel", "--steps", 3, "--fsdp"),
        ("egsw", "--resume", tmp_path / "parallel", "--steps", 4, "--no-fsdp"),
    )
    call(monkeypatch, "egsw", "--resume", str(tmp_path / "sharded"), "--steps", "4", "--no-fsdp")
    for name in ("one", "sharded", "parallel"):
        assert distance(tmp_path / "whole", tmp_path / name) < 1e-5
        assert [row["step"] for row in lines(tmp_path / name / "metrics.jsonl")] == [1, 2, 3, 4]


# --- processes that die -----------------------------------------------------------------------------------------------


def started(*options):
    """torchrun grpo.py, for as long as it is left alone."""
    command = [*TORCHRUN, str(ROOT / "grpo.py"), *options, "--steps", "100000", "--save-every", "1"]
    return subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_steps(folder, n):
    for _ in range(600):
        if (folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl")) >= n:
            return
        time.sleep(0.1)
    raise AssertionError("no steps were taken")


def worker(parent, rank):
    """The process of this rank below a torchrun."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_and_the_next_start_goes_on(rank, small, tmp_path, monkeypatch):
    process, folder = started(*small("--name", "r")), tmp_path / "r"
    try:
        wait_for_steps(folder, 3)
        os.kill(worker(process.pid, rank), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"process {1 - rank} lost another one in step" in error and f"--resume {folder}" in error
    step = len(lines(folder / "metrics.jsonl"))
    call(monkeypatch, "grpo", "--resume", str(folder), "--steps", str(step + 1), "--save-every", "0")
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == list(range(1, step + 2))


@pytest.mark.parametrize("to_all", [True, False])
def test_an_interrupt_ends_all_processes_after_the_step(to_all, small, tmp_path):
    process, folder = started(*small("--name", "r")), tmp_path / "r"
    try:
        wait_for_steps(folder, 2)
        if to_all:  # as a terminal's Ctrl-C
            os.killpg(process.pid, signal.SIGINT)
        else:  # as a scheduler's SIGTERM, which reaches torchrun alone
            os.kill(process.pid, signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert error.count("saved in") == 1 and "lost" not in error
    step = len(lines(folder / "metrics.jsonl"))
    assert (folder / f"checkpoint-{step}" / "state.pt").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_of_several_processes_one_says_what_is_wrong(small, tmp_path):
    command = [*TORCHRUN, str(ROOT / "grpo.py"), *small("--lr", "-1")]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and not (tmp_path / "grpo-1").exists()


def test_fsdp_without_torchrun_is_refused(small, tmp_path, monkeypatch, capsys):
    assert "torchrun" in refused(monkeypatch, capsys, tmp_path, *small("--fsdp"))


# --- how the work is split --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_shares_of_the_prompts_follow_each_other_and_leave_none_out(n, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    taken = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        taken += range(n)[distributed.my_slice(n)]
    assert taken == list(range(n))
