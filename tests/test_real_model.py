"""The scripts on a real checkpoint. ENTROPY_RL_MODEL names its folder, such as runs/word_problems/base, which
tasks/word_problems.py makes from SmolLM2-135M. Needs 12 GB of memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SCRIPTS, call, lines, needs_peft
from test_main import defaults, fixed_rollouts, gradients_of_main, plain_gradients

from harness.model import load_model

MODEL = os.environ.get("ENTROPY_RL_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="ENTROPY_RL_MODEL names no folder of a real model"),
]


@pytest.fixture()
def options(toy_data, tmp_path):
    """Options of a run of two steps, with a reward that differs inside nearly every group."""
    reward = tmp_path / "parity.py"
    reward.write_text("def reward(completion, row):\n    return sum(completion.encode()) % 2\n")
    paths = ["--model", MODEL, "--dataset", str(toy_data), "--out", str(tmp_path), "--reward", f"{reward}:reward"]
    size = "--n-prompts 2 --group-size 8 --max-new-tokens 24 --eval-rows 0 --lr 1e-5 --steps 2"
    return [*paths, *size.split(), "--system", "Calculate."]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_takes_the_gradient_of_plain_loops_over_the_full_logits(name, toy_data, tmp_path, monkeypatch):
    model, tokenizer = load_model(MODEL, torch.device("cpu"))
    rollouts = fixed_rollouts(model, tokenizer)
    steps = gradients_of_main(name, {}, rollouts, MODEL, toy_data, tmp_path, monkeypatch, off_policy=False)
    expected = plain_gradients(name, {}, rollouts, model.double(), off_policy=False)
    assert len(steps) == len(expected) == defaults(name)["minibatches"] and expected[0].norm() > 0
    for gradient, of_loops in zip(steps, expected, strict=True):
        assert (gradient.double() - of_loops).norm() < 2e-4 * of_loops.norm() + 1e-6


@pytest.mark.parametrize("changed", [["--optimizer", "sgd"], pytest.param(["--lora-rank", "4"], marks=needs_peft)])
def test_sgd_and_lora_train_it(changed, options, tmp_path, monkeypatch):
    call(monkeypatch, "egsw", *options, "--name", "run", *changed)
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(step["skipped_updates"] == 0 and step["sampling_logp_difference"] < 1e-3 for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)
    assert weights(tmp_path / "run") != (Path(MODEL) / "model.safetensors").read_bytes()


def test_a_resumed_run_ends_with_the_same_weights(options, tmp_path, monkeypatch):
    call(monkeypatch, "gtpo", *options, "--name", "whole")
    call(monkeypatch, "gtpo", *options, "--name", "parts", "--steps", "1")
    call(monkeypatch, "gtpo", "--resume", str(tmp_path / "parts"), "--steps", "2")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_step_takes_the_memory_that_the_start_names_and_its_activations(options):
    """Peak of the process, in MiB, above that of a process that only imports the packages."""
    code = (
        "import re, torch, transformers.models.llama.modeling_llama, datasets, grpo\n"
        "def peak():\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()\n"
        "grpo.main()\n"
        "print('peak', peak() - before)\n"
    )
    command = [sys.executable, "-c", code, *options]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    named = sum(float(mib.replace(",", "")) for mib in re.findall(r"(?:weights|gradients|optimizer) ([\d,.]+)", output))
    peak = float(re.search(r"peak ([\d.]+)", output)[1])
    print(f"named {named:.0f} MiB, peak {peak:.0f} MiB")
    # Some 300 tokens keep 12,000 floats in each of 30 layers, 410 MiB; then the parts of the logits, 64 MiB each, and
    # what the allocator has not given back.
    assert named < peak < named + 900
