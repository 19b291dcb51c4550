"""Several processes: the same samples and weights as one, data parallel and with FSDP2; and what if one dies."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import METHODS, ROOT, SCRIPTS, call, error_line, lines, needs_peft, refused
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

from harness import distributed
from harness.options import RunConfig, check_options

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Runs every command line it is given, one after the other in the same two processes: starting these takes longer.
WORKER = """
import importlib, json, sys
from datetime import timedelta
import torch.distributed as dist
from harness import distributed
distributed.finish = dist.barrier
distributed.timedelta = lambda minutes: timedelta(minutes=1)  # so that a test that hangs fails soon
exec(sys.argv[2])
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


def two_processes(tmp_path, *runs, before=""):
    """Runs command lines (method, options...) in two processes. before: Python code that both of them run first."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, str(tmp_path / "worker.py"), json.dumps([list(map(str, run)) for run in runs]), before]
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
        assert distance_from_base(one, options) > 0.001


def distance_from_base(folder, options, dtype=torch.float32):
    """The largest difference between a run's trained weights and its base, which the run held in dtype."""
    base = load_file(Path(options[1]) / "model.safetensors")
    trained = final(folder)
    return max(float((trained[name] - weight.to(dtype)).abs().max()) for name, weight in base.items())


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


# What --lora-rank does on a GPU.
BF16_BASE = """
import common, torch
from harness import lora
common.autocast = lambda device: torch.autocast("cpu", torch.bfloat16)
lora.base_dtype = lambda device: torch.bfloat16
"""


@needs_peft
@pytest.mark.skipif(torch.__version__ < "2.8", reason="FSDP2 of this torch wants one type in each layer")
def test_adapters_of_a_bf16_base_learn_the_same_when_they_are_sharded(small, tmp_path):
    options = small(*TRAINED["lora"], "--steps", 3, "--n-prompts", 7)
    runs = [("grpo", *options, "--name", "parallel"), ("grpo", *options, "--name", "fsdp", "--fsdp")]
    two_processes(tmp_path, *runs, before=BF16_BASE)
    samples = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("parallel", "fsdp")]
    assert samples[0] == samples[1]
    assert distance(tmp_path / "parallel", tmp_path / "fsdp") < 1e-5
    assert distance_from_base(tmp_path / "fsdp", options, torch.bfloat16) > 0.001


def test_a_process_without_a_prompt_learns_what_the_other_one_sampled(small, tmp_path, monkeypatch):
    options = small("--steps", 3, "--n-prompts", 1, "--group-size", 8, "--lr", 1e-3)
    call(monkeypatch, "grpo", *options, "--name", "one")
    two_processes(tmp_path, ("grpo", *options, "--name", "two", "--fsdp"))
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    assert distance_from_base(tmp_path / "two", options) > 0.001


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


def test_fsdp_with_cuda_graphs_is_refused(small, tmp_path, monkeypatch, capsys):
    message = refused(monkeypatch, capsys, tmp_path, *small("--fsdp", "--cuda-graphs"))
    assert "--fsdp" in message and "--cuda-graphs" in message


def test_fsdp_with_adapters_on_a_gpu_needs_a_torch_that_can_do_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # peft
    sharded = RunConfig(fsdp=True, lora_rank=4, out=str(tmp_path))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu126"))
    check_options(sharded)  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_options(replace(sharded, fsdp=False))
    with pytest.raises(SystemExit) as stop:
        check_options(sharded)
    message = error_line(capsys)
    assert stop.value.code == 2 and "--fsdp with --lora-rank 4" in message and "2.7.1" in message
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cu128"))
    check_options(sharded)


# --- how the work is split --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_shares_of_the_prompts_follow_each_other_and_leave_none_out(n, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    taken = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        taken += range(n)[distributed.my_slice(n)]
    assert taken == list(range(n))


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def test_a_restored_optimizer_keeps_no_tensor_of_the_checkpoint(tmp_path):
    """A checkpoint is deleted when there is a newer one: nothing may still be mapped to its file."""
    weight = torch.nn.Parameter(torch.ones(3))
    trained = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(3)
    trained.step()
    torch.save(distributed.full_optimizer_state(trained), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    stored = dict(state["state"][0])
    resumed = torch.optim.AdamW([weight], fused=True)
    distributed.load_optimizer_state(resumed, state)
    for name, value in resumed.state[weight].items():
        assert torch.equal(value, stored[name]) and value.data_ptr() != stored[name].data_ptr()
