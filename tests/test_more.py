"""The methods of more/ against plain loops, and what is special in each. test_methods.py and test_main.py hold them to
what every method must satisfy."""

import runpy
import sys

import plain
import pytest
import torch
from helpers import MORE, ROOT, batch, call, lines

import grpo
import grpo_s
from more import cispo, cov, entropy_advantage, forking, quantile

ONE_GROUP = torch.zeros(8, dtype=torch.long)


def float64_batch(seed=0):
    """A random batch with one group that is all right: rewards, group, mask, entropy, A [B][T], log-probs, uniforms."""
    rewards, group, mask, entropy = batch(seed, groups=4, width=9)
    rewards[group == 2] = 1.0
    rng = torch.Generator().manual_seed(seed)
    logprobs = -4 * torch.rand(mask.shape, generator=rng, dtype=torch.float64)  # junk in the padding
    uniforms = torch.rand(mask.shape, generator=rng)
    A = plain.spread(plain.grpo_advantages(rewards, group), mask)
    return rewards.double(), group, mask.double(), entropy.double(), A, logprobs, uniforms


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 1.0])
def test_forking_advantages_are_those_of_plain_loops(rho):
    rewards, group, mask, entropy, A, _, _ = float64_batch()
    kept = torch.tensor(plain.forking_tokens(entropy, A, rho))
    got = forking.token_advantages(rewards, entropy, mask, group, rho=rho)
    torch.testing.assert_close(got, torch.tensor(A).double() * kept)


def test_forking_keeps_tokens_of_equal_entropy_together():
    mask = torch.ones(2, 5)
    assert forking.forking_tokens(torch.full((2, 5), 0.3), mask, 0.2).all()
    assert not forking.forking_tokens(mask, torch.zeros(2, 5), 0.2).any()


def test_entropy_advantages_are_those_of_plain_loops():
    rewards, group, mask, entropy, _, _, _ = float64_batch()
    A = plain.grpo_advantages(rewards, group)
    expected = torch.tensor(plain.shaped_by_entropy(A, entropy, mask, 0.9, 1.5)).double()
    got = entropy_advantage.token_advantages(rewards, entropy, mask, group, alpha=0.9, kappa=1.5)
    torch.testing.assert_close(got, expected)
    without = entropy_advantage.token_advantages(rewards, entropy, mask, group, alpha=0.0)
    torch.testing.assert_close(without, grpo.token_advantages(rewards, entropy, mask, group))


def test_quantile_advantages_of_the_example_in_its_docstring():
    four = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1])
    five = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(quantile.advantages(four, ONE_GROUP), 2 * four, atol=1e-4, rtol=0)
    torch.testing.assert_close(quantile.advantages(five, ONE_GROUP), -2.0656 * (1 - five), atol=1e-4, rtol=0)


@pytest.mark.parametrize("K", [0.05, 0.25, 0.4, 0.5, 0.6, 1.0])
def test_quantile_advantages_are_those_of_plain_loops(K):
    rewards, group, mask, entropy, _, _, _ = float64_batch()
    rewards[:3] = torch.tensor([0.3, 0.7, 0.3])  # rewards need not be 0 or 1
    expected = plain.spread(plain.quantile_advantages(rewards, group, K), mask)
    got = quantile.token_advantages(rewards, entropy, mask, group, quantile=K)
    torch.testing.assert_close(got, torch.tensor(expected).double())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant, share, lower, upper", [
    ("kl", 2e-4, 1.0, 5.0), ("kl", 0.3, 1.0, 5.0), ("clip", 2e-4, 1.0, 5.0), ("clip", 0.1, 0.2, 1.0),
    ("clip", 1.0, 0.2, 1.0), ("clip", 1.0, 99.0, 100.0),
])  # fmt: skip
def test_chosen_tokens_are_those_of_plain_loops(variant, share, lower, upper, seed):
    *_, A, logprobs, uniforms = float64_batch(seed)
    expected = torch.tensor(plain.cov_chosen(A, logprobs, uniforms, variant, share, lower, upper))
    got = cov.chosen_tokens(torch.tensor(A).double(), logprobs, uniforms, variant, share, lower, upper)
    assert torch.equal(got, expected) and bool(got.any()) == (lower < 99)


@pytest.mark.parametrize("variant", ["clip", "kl"])
def test_without_an_advantage_no_token_is_chosen(variant):
    """Not even if all are asked for: a group whose rewards are all equal gets exactly no gradient, nor does padding."""
    *_, group, _, _, A, logprobs, uniforms = float64_batch()
    A = torch.tensor(A)
    chosen = cov.chosen_tokens(A, logprobs, uniforms, variant, share=1.0, lower=-99.0, upper=99.0)
    assert torch.equal(chosen, A != 0) and not chosen[group == 2].any()
    assert not cov.chosen_tokens(0 * A, logprobs, uniforms, variant, share=1.0, lower=-99.0).any()


def test_kl_covs_penalty_has_no_gradient_before_the_policy_moves():
    """Afterwards it pulls a chosen token back with the full weight, however little it has moved. There is no clip."""
    chosen = torch.tensor([[True, True, True, False]])
    old, moved_by = torch.full((1, 4), -1.0), torch.tensor([[0.0, 0.01, -0.01, 2.0]])
    new = (old + moved_by).requires_grad_()
    cov.loss((new - old).exp(), torch.tensor([0.5]), torch.ones(1, 4), chosen, "kl", penalty=3.0).sum().backward()
    expected = -0.5 * moved_by.exp() + 3.0 * moved_by.sign() * chosen
    torch.testing.assert_close(new.grad, expected)


def test_kl_cov_is_finite_where_the_ratio_is_zero_at_padding():
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    ratio = mask.clone().requires_grad_()
    per_token = cov.loss(ratio, torch.tensor([1.0]), mask, mask > 2, "kl")
    per_token.sum().backward()
    assert per_token.isfinite().all() and ratio.grad.isfinite().all()


def test_the_choice_is_decided_by_the_seed_alone(small, tmp_path, monkeypatch):
    """Not by how it is cut into micro-batches. test_resume.py has a stop, and test_distributed.py two processes."""
    options = ("--share", 0.02, "--lower", 0.0, "--minibatches", 2, "--eval-rows", 0)
    call(monkeypatch, "cov", *small("--name", "whole", *options))
    # Torch's own generator is not used: a checkpoint does not keep its state.
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())
    call(monkeypatch, "cov", *small("--name", "one", *options, "--token-budget", 10**6))
    call(monkeypatch, "cov", *small("--name", "other", *options, "--seed", 1))
    whole, one, other = (lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "one", "other"))
    assert whole != other
    for row, expected in zip(one, whole, strict=True):
        assert row == pytest.approx(expected, abs=1e-5) and row["chosen"] > 0


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    """The clip of PPO stops the gradient of a good token with ratio 9, and lets that of a bad one grow to 9."""
    old, w = torch.full((1, 3), -3.0), torch.tensor([[9.0, 1.1, 0.01]])
    new = (old + w.log()).requires_grad_()
    for A in (1.0, -1.0):
        new.grad = None
        cispo.loss((new - old).exp(), torch.tensor([A]), torch.ones(1, 3), new, clip_high=4.0).sum().backward()
        torch.testing.assert_close(new.grad, -A * torch.tensor([[5.0, 1.1, 0.01]]))


def test_grpo_s_without_its_entropy_term_is_gspo(small, tmp_path, monkeypatch):
    """The command of docs/more.md runs, and its advantages are GRPO's; tests/test_methods.py has the ratio and loss."""
    rewards, group, mask, entropy = batch()
    A = grpo_s.token_advantages(rewards, entropy, mask, group, beta2=0.0)
    torch.testing.assert_close(A, grpo.token_advantages(rewards, entropy, mask, group), atol=1e-5, rtol=0)
    command = "grpo_s.py --beta2 0 --clip-low 3e-4 --clip-high 4e-4 --minibatches 4"
    assert command in (ROOT / "docs" / "more.md").read_text()
    call(monkeypatch, "grpo_s", *small("--name", "gspo", *command.split()[1:]))
    assert lines(tmp_path / "gspo" / "metrics.jsonl")[-1]["clip_ratio/high"] > 0


@pytest.mark.slow
def test_python_m_names_the_run_after_the_method_so_that_it_can_be_resumed(small, tmp_path, monkeypatch):
    options = small("--variant", "kl", "--steps", 1, "--eval-rows", 0)
    monkeypatch.setattr(sys, "argv", ["-m", *options])
    monkeypatch.delitem(sys.modules, "more.cov")
    runpy.run_module("more.cov", run_name="__main__", alter_sys=True)
    call(monkeypatch, "cov", "--resume", str(tmp_path / "cov-1"), "--steps", "2")
    assert [row["step"] for row in lines(tmp_path / "cov-1" / "metrics.jsonl")] == [1, 2]


def test_the_page_of_docs_has_every_method():
    page = (ROOT / "docs" / "more.md").read_text()
    for name in MORE:
        assert f"python -m more.{name}" in page
