"""The pure functions of the methods: each equation against plain loops, and the facts they must satisfy."""

import inspect
import math
from dataclasses import asdict
from types import SimpleNamespace

import plain
import pytest
import torch
from helpers import METHODS, batch, random_logprobs, token_advantages

import dapo
import egsw
import grpo
import grpo_s
import gtpo
from common import Rollout, loss_weights
from harness.options import parse


def method_loss(name, new, old, rewards, group, mask, entropy):
    """The method's scalar loss at its defaults, from its token advantages."""
    A = token_advantages(name, rewards, entropy, mask, group)
    return (token_loss(name, new, old, A, mask) * loss_weights(mask, reduction_of(name))).sum()


def token_loss(name, new, old, A, mask):
    """The loss of every token, [B, T]. With Clip-Cov, no token is chosen (test_more.py tests the choice)."""
    ratio = grpo_s.sequence_ratio(new, old, mask) if name == "grpo_s" else (new - old).exp()
    own_arguments = {"cov": {"chosen": torch.zeros_like(mask).bool()}, "cispo": {"logprobs": new}}
    return METHODS[name].loss(ratio, A, mask, **own_arguments.get(name, {}))


def reduction_of(name):
    return METHODS[name].Config().reduction


# --- GRPO -------------------------------------------------------------------------------------------------------------


def test_grpo_advantages_of_a_worked_example():
    rewards, group = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.long)
    # mean 1/4, population std sqrt(3)/4
    expected = torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3)
    torch.testing.assert_close(grpo.advantages(rewards, group), expected)
    torch.testing.assert_close(grpo.advantages(rewards, group, "dr_grpo"), torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(grpo.advantages(rewards, group, "rloo"), torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    with pytest.raises(ValueError, match="advantage"):
        grpo.advantages(rewards, group, "gae")


@pytest.mark.parametrize("name", ["grpo", "dapo", "egsw", "gtpo", "forking", "entropy_advantage", "quantile"])
def test_the_loss_is_the_clipped_objective(name):
    rewards, group, mask, _ = batch()
    new, old = random_logprobs(mask)
    A = grpo.advantages(rewards, group)
    ratio = (new - old).exp().detach()
    per_token = METHODS[name].loss(ratio, A, mask, 0.2, 0.3)
    expected = [[-plain.clipped(w, float(A[i]), 0.2, 0.3) for w in row] for i, row in enumerate(ratio)]
    torch.testing.assert_close(per_token, torch.tensor(expected) * mask)


# --- DAPO -------------------------------------------------------------------------------------------------------------


def test_overlong_punishment_is_eq_13():
    lengths = torch.tensor([1, 80, 90, 99, 100, 101, 150]).float()
    expected = [0.0, 0.0, -0.5, -0.95, -1.0, -1.0, -1.0]
    assert dapo.overlong_punishment(lengths, 100, 0.2).tolist() == pytest.approx(expected, abs=1e-6)
    assert dapo.overlong_punishment(lengths[:5], 100, 0).tolist() == [0.0] * 5


def test_dapo_samples_until_it_has_enough_groups_and_no_further():
    def rollout(*outcomes):  # of two completions each
        rewards = torch.tensor(outcomes).flatten().float()
        zeros = torch.zeros(len(rewards), 1)
        group = torch.arange(len(outcomes)).repeat_interleave(2)
        return Rollout(zeros.long(), zeros[:, 0].long(), zeros.long(), zeros, zeros, zeros, zeros[:, 0] > 0, group,
                       rewards, [])  # fmt: skip

    rounds = [rollout((1, 0), (1, 1)), rollout((0, 0), (0, 1)), rollout((1, 0), (1, 0))]
    for wanted, limit, n_groups, n_rounds in ((1, 9, 1, 1), (2, 9, 2, 2), (3, 9, 3, 3), (4, 2, 2, 2), (4, 3, 4, 3)):
        left = list(rounds)
        run = SimpleNamespace(sample=lambda left=left: left.pop(0), verify=lambda rollout: rollout)
        kept, all_sampled, n = dapo.dynamic_sampling(run, wanted, limit)
        assert (len(kept.group.unique()), n) == (n_groups, n_rounds) and len(all_sampled) == 4 * n_rounds
        assert kept.rewards.view(-1, 2).sum(1).eq(1).all()


# --- EGSW -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_wise", [True, False])
@pytest.mark.parametrize("mean_one", [True, False])
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_egsw_weights_are_the_softmax(advantage, step_wise, mean_one):
    """A [B] advantage and the same one spread over [B, T] weigh alike."""
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group, advantage)
    options = (0.7, 0.6, step_wise, mean_one)
    expected = torch.tensor(plain.egsw_weights(A, entropy, mask, group, *options))
    for a in (A, A[:, None].expand_as(mask)):
        torch.testing.assert_close(egsw.weights(a, entropy, mask, group, *options), expected)


@pytest.mark.parametrize("step_wise", [True, False])
def test_egsw_at_infinite_temperature_is_grpo(step_wise):
    rewards, group, mask, entropy = batch()
    A = egsw.token_advantages(rewards, entropy, mask, group, weight_temperature=1e9, step_wise=step_wise)
    torch.testing.assert_close(A, grpo.token_advantages(rewards, entropy, mask, group), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_egsw_at_zero_temperature_picks_the_largest_value(temperature):
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group)
    W = egsw.weights(A, entropy, mask, group, alpha=0.5, weight_temperature=temperature, mean_one=False)
    value = torch.where(mask > 0, A[:, None] + 0.5 * entropy, -torch.inf)
    for g in group.unique():
        rows = (group == g).nonzero().squeeze(1)
        for t in range(mask.shape[1]):
            if mask[rows, t].any():
                assert float(W[rows[value[rows, t].argmax()], t]) == pytest.approx(1.0)


# --- GTPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare_over", ["batch", "group"])
@pytest.mark.parametrize("entropy_mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("entropy_baseline", ["column", "row", "matrix"])
def test_gtpo_shaped_rewards_are_eq_2_and_3_and_advantages_eq_4(entropy_baseline, entropy_mean, compare_over):
    rewards, group, mask, entropy = batch()
    rewards[group == 2] = 1.0  # one group without a difference
    punishment = -0.5 * torch.rand(len(rewards), generator=torch.Generator().manual_seed(0))
    options = (0.9, 0.2, entropy_baseline, entropy_mean, compare_over, 0.2, 1.5)
    plus, minus = gtpo.shaped_rewards(rewards, entropy, mask, group, punishment, *options)
    expected_plus, expected_minus = plain.gtpo_shaped(rewards, entropy, mask, group, *options, punishment.tolist())
    torch.testing.assert_close(plus, torch.tensor(expected_plus))
    torch.testing.assert_close(minus, torch.tensor(expected_minus))
    for normalize_over in ("all", "outcome"):
        words = (compare_over, normalize_over)
        A = gtpo.advantages(plus, minus, rewards, mask, group, *words)
        expected = plain.gtpo_advantages(plus.tolist(), minus.tolist(), rewards, mask, group, *words)
        torch.testing.assert_close(A, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.6, 0.75, 1.0])
def test_gtpo_overlong_punishment_is_that_of_plain_loops(gamma):
    for seed in range(6):  # fractions of right completions from 1/4 to 1
        rewards, group, mask, _ = batch(seed, groups=5, width=30, mixed=False)
        lengths = mask.sum(1)
        expected = torch.tensor(plain.gtpo_punishment(rewards, lengths.tolist(), group, gamma))
        torch.testing.assert_close(gtpo.overlong_punishment(rewards, lengths, group, gamma), expected)


# --- GRPO-S -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy_mean", ["arithmetic", "geometric"])
def test_grpo_s_shaped_rewards_are_eq_6(entropy_mean):
    rewards, group, mask, entropy = batch()
    floor = 1.0  # so high that some tokens and some completions lie below it
    got = grpo_s.shaped_rewards(rewards, entropy, mask, group, 0.9, 0.2, entropy_mean, floor)
    expected = plain.grpo_s_shaped(rewards, entropy, mask, group, 0.9, 0.2, entropy_mean, floor)
    torch.testing.assert_close(got, torch.tensor(expected))
    A = grpo_s.advantages(got, rewards, group)
    torch.testing.assert_close(A, torch.tensor(plain.grpo_s_advantages(expected, rewards, group)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy_mean", ["arithmetic", "geometric"])
def test_grpo_s_completions_without_a_token_leave_the_others_as_they_are(entropy_mean):
    """Other trainers hold such rows, masked out or as padding of the batch."""
    rewards, group, mask, entropy = batch()
    expected = grpo_s.shaped_rewards(rewards, entropy, mask, group, entropy_mean=entropy_mean)
    empty = torch.zeros(2, mask.shape[1])
    got = grpo_s.shaped_rewards(
        torch.cat([rewards, torch.tensor([1.0, 0.0])]), torch.cat([entropy, empty]), torch.cat([mask, empty]),
        torch.cat([group, torch.tensor([0, 0])]), entropy_mean=entropy_mean,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.cat([expected, torch.tensor([1.0, -1.0])]))


@pytest.mark.parametrize("name", METHODS)
def test_a_completion_without_a_token_gives_no_nan(name):
    rewards, group, mask, entropy = batch()
    mask[0] = 0.0
    A = token_advantages(name, rewards, entropy * mask, mask, group)
    assert A.isfinite().all() and (A[0] == 0).all() and A[group == 0].abs().sum() > 0


# --- facts of every method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_equal_rewards_give_exactly_no_gradient(name, value):
    rewards, group, mask, entropy = batch()
    rewards = torch.full_like(rewards, value)
    new, old = random_logprobs(mask)
    loss = method_loss(name, new, old, rewards, group, mask, entropy)
    loss.backward()
    assert float(loss.detach()) == 0 and new.grad.abs().max() == 0

    rewards[group == 0] = torch.tensor([1.0, 1, 0, 0])  # one group with a difference
    new, old = random_logprobs(mask)
    method_loss(name, new, old, rewards, group, mask, entropy).backward()
    assert new.grad[group > 0].abs().max() == 0 and new.grad[group == 0].abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_on_policy_gradient_is_the_plain_policy_gradient(name):
    """At ratio 1 the loss is -mean(A), and its gradient that of -mean(A * log pi), with A the token advantages. The
    loss of CISPO is -mean(A * log pi) itself."""
    rewards, group, mask, entropy = batch()
    _, old = random_logprobs(mask)
    new = old.clone().requires_grad_()
    loss = method_loss(name, new, old, rewards, group, mask, entropy)
    loss.backward()
    expected = -token_advantages(name, rewards, entropy, mask, group) * loss_weights(mask, reduction_of(name))
    torch.testing.assert_close(new.grad, expected)
    value = expected * old if name == "cispo" else expected
    torch.testing.assert_close(loss.detach(), value.sum())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entropy_at_padding_never_matters(name, value):
    rewards, group, mask, entropy = batch()
    optional = {"egsw": [{}, dict(step_wise=False)], "grpo_s": [{}, dict(entropy_mean="geometric")],
                "gtpo": [dict(entropy_baseline=word) for word in ("column", "row", "matrix")]}  # fmt: skip
    for options in optional.get(name, [{}]):
        expected = token_advantages(name, rewards, entropy, mask, group, **options)
        A = token_advantages(name, rewards, torch.where(mask > 0, entropy, value), mask, group, **options)
        assert torch.equal(A, expected) and A.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_flows_through_the_entropy(name):
    rewards, group, mask, entropy = batch()
    assert not token_advantages(name, rewards, entropy.requires_grad_(), mask, group).requires_grad


@pytest.mark.parametrize("compare_over", ["group", "batch"])
@pytest.mark.parametrize("normalize_over", ["all", "outcome"])
def test_gtpo_compares_only_rows_with_tokens(compare_over, normalize_over):
    """A group whose only right row, or all of whose wrong rows, have no token gives nothing; nor does an empty mask."""
    rewards = torch.tensor([1.0, 0, 0, 0])
    _, _, _, entropy = batch(groups=1)
    for emptied in ([0], [1, 2, 3], [0, 1, 2, 3]):
        mask = torch.ones_like(entropy)
        mask[emptied] = 0.0
        words = dict(compare_over=compare_over, normalize_over=normalize_over)
        A = gtpo.token_advantages(rewards, entropy, mask, torch.zeros(4), **words)
        assert (A == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_egsw_refuses_a_temperature_that_gives_no_weights(temperature):
    rewards, group, mask, entropy = batch()
    with pytest.raises(ValueError, match="temperature"):
        egsw.weights(rewards, entropy, mask, group, weight_temperature=temperature)


@pytest.mark.parametrize("name", METHODS)
def test_padding_never_matters(name):
    """Neither what stands in the padding nor how much of it there is changes loss or gradient."""
    rewards, group, mask, entropy = batch()
    new, old = random_logprobs(mask)
    options = {"max_new_tokens": 6} if name == "dapo" else {}
    A = token_advantages(name, rewards, entropy, mask, group, **options)

    def widened(x):
        return torch.nn.functional.pad(x, (0, 3))

    wide_mask = widened(mask)
    junk = torch.rand_like(wide_mask) * (1 - wide_mask)
    wide_A = token_advantages(name, rewards, widened(entropy) + junk, wide_mask, group, **options)
    torch.testing.assert_close(wide_A, widened(A))

    loss = (token_loss(name, new, old, A, mask) * loss_weights(mask, reduction_of(name))).sum()
    loss.backward()
    wide_new = (widened(new.detach()) + 2 * junk).requires_grad_()
    per_token = token_loss(name, wide_new, widened(old) + junk, wide_A, wide_mask)
    wide_loss = (per_token * loss_weights(wide_mask, reduction_of(name))).sum()
    wide_loss.backward()
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_new.grad, widened(new.grad))


@pytest.mark.parametrize("name", METHODS)
def test_order_of_rows_never_matters(name):
    """Rows of one prompt need not be adjacent: groups are known by their ids alone."""
    rewards, group, mask, entropy = batch()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(3))
    A = token_advantages(name, rewards, entropy, mask, group)
    shuffled = token_advantages(name, rewards[order], entropy[order], mask[order], 7 - 2 * group[order])
    torch.testing.assert_close(shuffled, A[order])


@pytest.mark.parametrize("types", [  # of rewards, entropy and mask
    "float64 float64 float64", "bfloat16 bfloat16 bfloat16", "float32 float32 bool", "float64 float32 int64",
])  # fmt: skip
@pytest.mark.parametrize("name", METHODS)
def test_rewards_entropies_and_masks_may_have_types_of_their_own(name, types):
    """Trainers hold their masks as bool, integers or floats, and NumPy's rewards are float64."""
    reward_type, entropy_type, mask_type = (getattr(torch, word) for word in types.split())
    tolerance = 0.05 if "bfloat16" in types else 1e-5
    rewards, group, mask, entropy = batch()
    options = {"gtpo": {"overlong_gamma": 0.75}}.get(name, {})
    expected = token_advantages(name, rewards, entropy, mask, group, **options)
    typed = rewards.to(reward_type), entropy.to(entropy_type), mask.to(mask_type)
    A = token_advantages(name, *typed, group, **options)
    torch.testing.assert_close(A.float(), expected, atol=tolerance, rtol=tolerance)
    new, old = random_logprobs(mask)
    per_token = token_loss(name, new, old, expected, mask)
    got = token_loss(name, new, old, A, mask.to(mask_type)).float()
    torch.testing.assert_close(got, per_token, atol=10 * tolerance, rtol=tolerance)


# --- options ----------------------------------------------------------------------------------------------------------

FIXED = {  # the defaults that a paper or a measurement fixes
    "grpo": dict(reduction="sequence"),
    "dapo": dict(clip_low=0.2, clip_high=0.28, reduction="token", minibatches=4),
    "egsw": dict(reduction="token", mean_one=True),
    "gtpo": dict(clip_low=0.2, clip_high=0.28, reduction="token", entropy_baseline="column"),
    "grpo_s": dict(clip_low=0.2, clip_high=0.28, reduction="sequence"),
    "forking": dict(rho=0.2, clip_low=0.2, clip_high=0.28, reduction="token"),
    "cov": dict(share=2e-4, lower=1.0, upper=5.0, penalty=1.0, clip_low=1.0, clip_high=1.0, reduction="token"),
    "entropy_advantage": dict(alpha=0.4, kappa=2.0),
    "quantile": dict(quantile=0.4, clip_low=0.2, clip_high=0.28, reduction="token"),
    "cispo": dict(reduction="token"),
}
CLIP = dict(clip_low=0, clip_high=0)
REFUSED = {  # values just outside the bounds
    "grpo": [CLIP, dict(kl_coef=-0.1)],
    "dapo": [CLIP, dict(minibatches=0, max_rounds=0, overlong_cache=1.1), dict(overlong_cache=-0.1)],
    "egsw": [CLIP, dict(alpha=-0.1, weight_temperature=0, kl_coef=-0.1)],
    "gtpo": [CLIP, dict(alpha1=-0.1, alpha2=-0.1, entropy_min=0, entropy_max=0, overlong_gamma=0.5),
             dict(overlong_gamma=1.1)],
    "grpo_s": [CLIP, dict(beta1=-0.1, beta2=-0.1, entropy_min=0)],
    "forking": [CLIP, dict(minibatches=0, rho=0), dict(rho=1.1)],
    "cov": [CLIP, dict(minibatches=0, share=0, penalty=-0.1), dict(share=1.1)],
    "entropy_advantage": [CLIP, dict(alpha=-0.1, kappa=0)],
    "quantile": [CLIP, dict(minibatches=0, quantile=0), dict(quantile=1.1)],
    "cispo": [dict(minibatches=0, clip_high=0)],
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_that_have_a_reason_stay(name):
    assert asdict(METHODS[name].Config()).items() >= FIXED[name].items()


@pytest.mark.parametrize("name", METHODS)
def test_values_out_of_bounds_are_refused_on_the_command_line(name, refusal):
    for values in REFUSED[name]:
        for option, value in values.items():
            flag = "--" + option.replace("_", "-")
            assert flag in refusal(parse, METHODS[name].Config, "", [f"{flag}={value}"])


@pytest.mark.parametrize("name", METHODS)
def test_the_functions_have_the_defaults_of_the_script(name):
    """Who copies a function gets the same as who runs the script."""
    config = asdict(METHODS[name].Config())
    compared = 0
    for _, function in inspect.getmembers(METHODS[name], inspect.isfunction):
        if function.__module__ != METHODS[name].__name__:
            continue
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in config and parameter.default is not inspect.Parameter.empty:
                assert parameter.default == config[parameter.name], (function, parameter)
                compared += 1
    assert compared
