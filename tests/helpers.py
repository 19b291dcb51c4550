"""What several test files use: running scripts, random batches, sampled rollouts, and the plain way to score them."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import dapo
import egsw
import grpo
import grpo_s
import gtpo
from harness.options import RunConfig
from harness.trainer import Trainer
from more import cispo, cov, entropy_advantage, forking, quantile
from tasks import arithmetic

ROOT = Path(__file__).parent.parent
SCRIPTS = {"grpo": grpo, "dapo": dapo, "egsw": egsw, "gtpo": gtpo, "grpo_s": grpo_s}
MORE = {
    "forking": forking, "cov": cov, "entropy_advantage": entropy_advantage, "quantile": quantile, "cispo": cispo,
}  # fmt: skip
METHODS = SCRIPTS | MORE
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs the package peft")
T = 9  # tokens of a completion of the toy base, at most


# --- running scripts --------------------------------------------------------------------------------------------------


def call(monkeypatch, name, *options):
    """Runs a method's main() in this process."""
    monkeypatch.setattr(sys, "argv", [METHODS[name].__file__, *options])
    METHODS[name].main()


def lines(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    """Writes a JSONL file, and returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def wait_for_steps(metrics, n, look=lambda: None):
    """Waits until a run has written n steps. look() is called again and again meanwhile."""
    for _ in range(3000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= n:
            return
        time.sleep(0.1)
        look()
    raise AssertionError("no steps were taken")


def error_line(capsys):
    """The one line that the program has written to stderr before it ended."""
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message, message
    return message


def refused(monkeypatch, capsys, out, *options, name="egsw"):
    """The message of a script that refuses its options: one line, status 2, and nothing written to `out`."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, *options)
    assert stop.value.code == 2
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return error_line(capsys)


def data_folder():
    """The folder of GSM8K, MATH-500 and AIME, which CONTRIBUTING.md describes. Skips the test where there is none."""
    folder = os.environ.get("ENTROPY_RL_DATA")
    if not folder:
        pytest.skip("ENTROPY_RL_DATA names no folder of data sets")
    return Path(folder)


# --- random batches, for the pure functions ---------------------------------------------------------------------------


def batch(seed=0, groups=3, size=4, width=6, mixed=True):
    """Rewards, group, mask and entropy of a random batch. Every group has right and wrong rows if `mixed`."""
    rng = torch.Generator().manual_seed(seed)
    B = groups * size
    rewards = torch.randint(0, 2, (B,), generator=rng).float()
    if mixed:
        rewards[::size] = 1.0
        rewards[1::size] = 0.0
    lengths = torch.randint(1, width + 1, (B,), generator=rng)
    mask = (torch.arange(width) < lengths[:, None]).float()
    entropy = (torch.rand(B, width, generator=rng) * 2 + 0.01) * mask
    return rewards, torch.arange(groups).repeat_interleave(size), mask, entropy


def random_logprobs(mask, seed=1):
    """New log-probs, with gradient, and old ones that differ from them."""
    rng = torch.Generator().manual_seed(seed)
    old = -torch.rand(mask.shape, generator=rng) * mask
    new = (old + 0.5 * torch.randn(mask.shape, generator=rng)) * mask
    return new.requires_grad_(), old


def token_advantages(name, rewards, entropy, mask, group, **options):
    """A method's token_advantages. DAPO's needs the limit of the completions, and a soft zone that reaches the rows."""
    if name == "dapo":
        options = {"max_new_tokens": mask.shape[1], "overlong_cache": 1 / 3} | options
    return METHODS[name].token_advantages(rewards, entropy, mask, group, **options)


# --- rollouts of the toy base -----------------------------------------------------------------------------------------


def rollout_of(model, tokenizer, Q=6, G=4, seed=0, questions=None, sample=common.sample, **options):
    """A rollout of two-term problems, or of these questions."""
    questions = questions or [problem["question"] for problem in arithmetic.problems(Q, seed, False, 2, 2)]
    prompts = tokenizer(questions)["input_ids"]
    uniforms = torch.rand(len(prompts) * G, T, generator=torch.Generator().manual_seed(seed))
    return sample(model, prompts, G, T, [tokenizer.eos_token_id], uniforms, **options)


def score(model, rollout, temperature=1.0, **options):
    """Log-probs and entropy of a rollout by common.token_logprobs, without gradient: two [B, T]."""
    with torch.no_grad():
        return common.token_logprobs(model, *score_inputs(rollout), temperature, with_entropy=True, **options)


def score_inputs(rollout):
    return rollout.prompt_ids, rollout.prompt_lengths, rollout.completion_ids, rollout.mask


def naive_score(model, rollout, temperature=1.0):
    """The same from the full logits of each row alone, without padding; with gradient."""
    logprobs = torch.zeros(rollout.mask.shape)
    entropy = torch.zeros(rollout.mask.shape)
    for i in range(len(rollout)):
        P = int(rollout.prompt_lengths[i])
        n = int(rollout.mask[i].sum())
        ids = torch.cat([rollout.prompt_ids[i, :P], rollout.completion_ids[i, :n]])
        log_p = (model(ids[None]).logits[0, P - 1 : -1] / temperature).log_softmax(-1)
        logprobs[i, :n] = log_p.gather(1, ids[P:, None]).squeeze(1)
        entropy[i, :n] = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def assert_same_samples(a, b):
    for name in ("completion_ids", "logprobs", "entropy"):
        x = getattr(a, name) * a.mask
        y = getattr(b, name) * b.mask
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.finished, b.finished)


def trainer_of(model, tokenizer, problems=(), **options):
    """A Trainer that has no run around it."""
    settings = {"lr": 1e-3, "max_new_tokens": T, "token_budget": 10**6} | options
    return Trainer(RunConfig(**settings), model, tokenizer, list(problems), base_name="")


def grpo_update(trainer, rollout, A, reduction="sequence", skip_zero=True):
    """One step of GRPO with these advantages, [B] or [B, T], and its metrics. Returns the micro-batches.

    skip_zero: rows whose advantage is 0 are not scored.
    """
    batches = []
    for minibatch in trainer.minibatches(rollout, reduction, A if skip_zero else None):
        for batch in minibatch:
            batches.append(batch)
            ratio = (batch.logprobs - batch.old_logprobs).exp()
            per_token = grpo.loss(ratio, A[batch.rows], batch.mask)
            (per_token * batch.loss_weights).sum().backward()
            trainer.record(batch, per_token, **common.clip_fractions(ratio, A[batch.rows], 0.2, 0.2))
        trainer.optimizer_step()
    return batches
