"""Several processes, data parallel: the same samples and weights as one; and what if one of them dies."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import METHODS, ROOT, call, lines, wait_for_steps
from safetensors.torch import load_file

from harness.options import fail

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Runs every command line it is given, one after the other in the same processes: starting these takes longer.
WORKER = """
import importlib, json, sys
from datetime import timedelta
import torch.distributed as dist
from harness import distributed
distributed.finish = dist.barrier
distributed.timedelta = lambda minutes: timedelta(minutes=1)  # so that a test that hangs fails soon
for name, *options in json.loads(sys.argv[1]):
    sys.argv = [f"{name}.py", *options]
    importlib.import_module(name).main()
dist.destroy_process_group()
"""
# Seven prompts are three for one process and four for the other. AdamW multiplies what rounding leaves by the learning
# rate, so this is small.
SIZE = ("--steps", 2, "--n-prompts", 7, "--lr", 4e-4, "--eval-rows", 5)
RUNS = {
    "grpo": ("grpo", "--kl-coef", 0.1),
    "dapo": ("dapo", "--eval-rows", 1),
    "egsw": ("egsw", "--rollout-rows", 8),
    "gtpo": ("gtpo", "--minibatches", 2),
    "grpo_s": ("grpo_s",),
    "cov": ("cov", "--minibatches", 2, "--share", 0.2, "--lower", 0.1),
    "sgd": ("grpo", "--optimizer", "sgd", "--lr", 0.3),
    "one-prompt": ("grpo", "--n-prompts", 1, "--group-size", 2, "--seed", 3, "--lr", 1e-3),
    "lora": ("grpo", "--lora-rank", 3, "--kl-coef", 0.1, "--minibatches", 2, "--gradient-checkpointing"),
}
if not importlib.util.find_spec("peft"):
    del RUNS["lora"]
THREE = ("grpo", "one-prompt", "gtpo")  # are run in three processes too


def processes(n, folder, *runs):
    """Runs command lines (method, options...) in n processes."""
    (folder / "worker.py").write_text(WORKER)
    commands = json.dumps([[METHODS[name].__name__, *map(str, options)] for name, *options in runs])
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, str(n), str(folder / "worker.py"), commands]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]


@pytest.fixture(scope="module")
def out(toy, toy_data, tmp_path_factory):
    """Folder with the runs <name>-1, <name>-2 and <name>-3, of so many processes; and of egsw's first step a run of one
    process that two have gone on with, and a run of two processes."""
    out = tmp_path_factory.mktemp("processes")
    fixed = ["--group-size", 4, "--max-new-tokens", 12, "--eval-k", 2, "--token-budget", 200]
    options = ["--model", toy, "--dataset", toy_data, "--out", out, *fixed, *SIZE]

    def command(name, n, run_name=None, *more):
        method, *own = RUNS[name]
        return method, *options, *own, "--name", run_name or f"{name}-{n}", *more

    alone = [command(name, 1) for name in RUNS] + [command("egsw", 1, "first-one", "--steps", 1)]
    with pytest.MonkeyPatch.context() as patch:
        for method, *own in alone:
            call(patch, method, *map(str, own))
    resumed = ("egsw", "--resume", out / "first-one", "--steps", 2)
    processes(2, out, *(command(name, 2) for name in RUNS), command("egsw", 2, "first-two", "--steps", 1), resumed)
    processes(3, out, *(command(name, 3) for name in THREE))
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def distance(a, b):
    """The largest difference between two checkpoints."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("n, name", [(2, name) for name in RUNS] + [(3, name) for name in THREE])
def test_several_processes_sample_and_learn_what_one_does(n, name, out, toy):
    """With one prompt, one of them samples all of it. Its two completions leave one of three without rows to score,
    and in the second step, where they earn the same, all of them."""
    one, several = out / f"{name}-1", out / f"{name}-{n}"
    for file in ("completions.jsonl", "eval_completions.jsonl"):
        assert (one / file).read_bytes() == (several / file).read_bytes()
    for a, b in zip(lines(one / "metrics.jsonl"), lines(several / "metrics.jsonl"), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    assert distance(one / "model", several / "model") < 1e-5
    assert distance(one / "model", toy) > 0.0001


def test_a_checkpoint_of_two_processes_resumes_on_one_and_the_other_way_round(out, monkeypatch):
    call(monkeypatch, "egsw", "--resume", str(out / "first-two"), "--steps", "2")
    for name in ("first-one", "first-two"):
        assert distance(out / "egsw-1" / "model", out / name / "model") < 1e-5
        assert [row["step"] for row in lines(out / name / "metrics.jsonl")] == [1, 2]


def started(*options):
    """torchrun grpo.py, for as long as it is left alone."""
    endless = ["--steps", "100000", "--save-every", "1", "--eval-rows", "0"]
    command = [*TORCHRUN, "2", str(ROOT / "grpo.py"), *options, *endless]
    return subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)


def worker(parent, rank):
    """The process of this rank below a torchrun."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_process_that_dies_ends_the_run_and_the_next_start_goes_on(small, tmp_path, monkeypatch):
    process, folder = started(*small("--name", "r")), tmp_path / "r"
    try:
        wait_for_steps(folder / "metrics.jsonl", 3)
        os.kill(worker(process.pid, rank=0), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert "process 1 lost another one in step" in error and f"--resume {folder}" in error
    step = len(lines(folder / "metrics.jsonl"))
    call(monkeypatch, "grpo", "--resume", str(folder), "--steps", str(step + 1), "--save-every", "0")
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == list(range(1, step + 2))


def test_an_interrupt_ends_all_processes_after_the_step(small, tmp_path):
    """A terminal's Ctrl-C, which reaches all of them. torchrun then sends them another signal."""
    process, folder = started(*small("--name", "r")), tmp_path / "r"
    try:
        wait_for_steps(folder / "metrics.jsonl", 2)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert error.count("saved in") == 1 and "lost" not in error
    step = len(lines(folder / "metrics.jsonl"))
    assert (folder / f"checkpoint-{step}" / "state.pt").exists()


def test_of_several_processes_one_says_what_is_wrong(monkeypatch, capsys):
    for local_rank, said in (("0", "error: wrong\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as stop:
            fail("wrong")
        assert stop.value.code == 2 and capsys.readouterr().err == said
