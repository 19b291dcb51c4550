"""The pure functions of the five scripts: each equation against plain loops, and the facts they must satisfy."""

import math

import pytest
import torch

import dapo
import egsw
import grpo
import grpo_s
import gtpo
from common import loss_weights

METHODS = [grpo, dapo, egsw, gtpo, grpo_s]


def batch(seed=0, groups=3, size=4, T=6, mixed=True):
    """Rewards, group, mask and entropy of a random batch; every group has right and wrong rows if `mixed`."""
    g = torch.Generator().manual_seed(seed)
    B = groups * size
    rewards = torch.randint(0, 2, (B,), generator=g).float()
    if mixed:
        rewards[::size], rewards[1::size] = 1.0, 0.0
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).float()
    entropy = (torch.rand(B, T, generator=g) * 2 + 0.01) * mask
    return rewards, torch.arange(groups).repeat_interleave(size), mask, entropy


def logprobs(mask, seed=1):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(mask.shape, generator=g) * mask
    new = (old + 0.5 * torch.randn(mask.shape, generator=g)) * mask
    return new.requires_grad_(), old


def method_advantages(method, rewards, group, mask, entropy):
    """[B] or [B, T], with the method's defaults."""
    if method is dapo:
        return dapo.advantages(rewards, group, dapo.overlong_punishment(mask.sum(1), 6, 2))
    if method is gtpo:
        shaped = gtpo.shaped_rewards(rewards, entropy, mask, group)
        return gtpo.advantages(*shaped, rewards, mask, group)
    if method is grpo_s:
        return grpo_s.advantages(grpo_s.shaped_rewards(rewards, entropy, mask, group), rewards, group)
    return method.advantages(rewards, group)


def method_loss(method, new, old, rewards, group, mask, entropy):
    """The method's scalar loss, as its main() puts it together."""
    A = method_advantages(method, rewards, group, mask, entropy)
    per_token = method.loss(new, old, A, mask)
    if method is egsw:
        per_token = egsw.weights(A, entropy, mask, group) * per_token
    reduction = method.Config.__dataclass_fields__["reduction"].default
    return (per_token * loss_weights(mask, reduction)).sum()


# --- GRPO -------------------------------------------------------------------------------------------------------------


def test_grpo_advantages_of_a_worked_example():
    rewards, group = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.long)
    # mean 1/4, population std sqrt(3)/4
    expected = torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3)
    torch.testing.assert_close(grpo.advantages(rewards, group), expected)
    torch.testing.assert_close(grpo.advantages(rewards, group, "dr_grpo"), torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(grpo.advantages(rewards, group, "rloo"), torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))


def test_grpo_loss_is_the_clipped_objective_with_k3():
    rewards, group, mask, _ = batch()
    new, old = logprobs(mask)
    A, ref = grpo.advantages(rewards, group), old - 0.3 * mask
    new = new.detach()
    got = grpo.loss(new, old, A, mask, 0.2, 0.3, grpo.k3(new, ref), 0.1)
    for i in range(len(A)):
        for t in range(mask.shape[1]):
            w, a = math.exp(new[i, t] - old[i, t]), float(A[i])
            r = math.exp(ref[i, t] - new[i, t])
            k3 = r - math.log(r) - 1
            expected = -(min(w * a, min(max(w, 0.8), 1.3) * a) - 0.1 * k3) * float(mask[i, t])
            assert float(got[i, t]) == pytest.approx(expected, abs=1e-5)


def test_clipping_takes_the_pessimistic_side():
    """A ratio of 2 is clipped for a good token (no gradient) and not for a bad one, which may still be pushed back."""
    new = torch.tensor([[math.log(2.0)], [math.log(2.0)]], requires_grad=True)
    loss = grpo.loss(new, torch.zeros(2, 1), torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    loss.sum().backward()
    assert loss[:, 0].tolist() == pytest.approx([-1.2, 2.0])
    assert new.grad[:, 0].tolist() == pytest.approx([0.0, 2.0])


def test_k3_gradient_is_one_minus_ref_over_pi():
    new = torch.tensor([[-1.0]], requires_grad=True)
    grpo.k3(new, torch.tensor([[-0.5]])).sum().backward()
    assert float(new.grad) == pytest.approx(1 - math.exp(0.5))


# --- DAPO -------------------------------------------------------------------------------------------------------------


def test_overlong_punishment_is_eq_13():
    lengths = torch.tensor([1, 80, 90, 99, 100, 101, 150]).float()
    expected = [0.0, 0.0, -0.5, -0.95, -1.0, -1.0, -1.0]
    assert dapo.overlong_punishment(lengths, 100, 20).tolist() == pytest.approx(expected)
    assert dapo.overlong_punishment(lengths[:5], 100, 0).tolist() == [0.0] * 5


def test_dapo_punishment_enters_the_advantage_but_not_of_an_uninformative_group():
    group = torch.tensor([0, 0, 1, 1])
    A = dapo.advantages(torch.tensor([1.0, 0, 1, 1]), group, torch.tensor([-0.5, 0, -1, 0]))
    torch.testing.assert_close(A, torch.tensor([1.0, -1.0, 0, 0]), atol=1e-4, rtol=0)
    assert dapo.advantages(torch.tensor([1.0, 0]), group[:2], torch.tensor([-1.0, 0])).tolist() == [0.0, 0.0]
    assert dapo.informative(torch.tensor([1.0, 0, 1, 1]), group).tolist() == [True, True, False, False]


# --- EGSW -------------------------------------------------------------------------------------------------------------


def egsw_loops(A, H, mask, group, alpha, P, step_wise, mean_one):
    B, T = mask.shape
    w = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for t in range(T):
            if not mask[i, t]:
                continue
            mates = [j for j in range(B) if group[j] == group[i] and (mask[j, t] or not step_wise)]

            def raw(j, t=t):
                n = int(mask[j].sum())
                h = float(H[j, t]) if step_wise else sum(map(float, H[j, :n])) / n
                return math.exp((float(A[j]) + alpha * h) / P)

            w[i, t] = raw(i) / sum(raw(j) for j in mates) * (len(mates) if mean_one else 1)
    return w.float()


@pytest.mark.parametrize("step_wise", [True, False])
@pytest.mark.parametrize("mean_one", [True, False])
def test_egsw_weights_are_the_softmax(step_wise, mean_one):
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group)
    got = egsw.weights(A, entropy, mask, group, 0.7, 0.6, step_wise, mean_one)
    torch.testing.assert_close(got, egsw_loops(A, entropy, mask, group, 0.7, 0.6, step_wise, mean_one))


def test_egsw_weights_sum_to_the_active_rows_of_each_column():
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group)
    for g in group.unique():
        rows = group == g
        active = mask[rows].sum(0)
        torch.testing.assert_close(egsw.weights(A, entropy, mask, group)[rows].sum(0), active)
        paper = egsw.weights(A, entropy, mask, group, mean_one=False)[rows].sum(0)
        torch.testing.assert_close(paper, (active > 0).float())


@pytest.mark.parametrize("step_wise", [True, False])
def test_egsw_at_infinite_temperature_is_grpo(step_wise):
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group)
    W = egsw.weights(A, entropy, mask, group, temperature=1e9, step_wise=step_wise)
    grads = []
    for weight in (W, torch.ones_like(mask)):
        new, old = logprobs(mask)
        (weight * egsw.loss(new, old, A, mask) * loss_weights(mask, "sequence")).sum().backward()
        grads.append(new.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_egsw_at_zero_temperature_picks_the_largest_value(temperature):
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group)
    W = egsw.weights(A, entropy, mask, group, alpha=0.5, temperature=temperature, mean_one=False)
    value = torch.where(mask > 0, A[:, None] + 0.5 * entropy, -torch.inf)
    for g in group.unique():
        rows = (group == g).nonzero().squeeze(1)
        for t in range(mask.shape[1]):
            if mask[rows, t].any():
                assert float(W[rows[value[rows, t].argmax()], t]) == pytest.approx(1.0)


def test_egsw_with_equal_entropies_is_a_softmax_over_the_advantage():
    rewards, group, mask, _ = batch()
    A = egsw.advantages(rewards, group)
    W = egsw.weights(A, torch.full_like(mask, 0.3), mask, group, temperature=0.7, step_wise=False, mean_one=False)
    for g in group.unique():
        rows = group == g
        expected = (A[rows] / 0.7).softmax(0)[:, None] * mask[rows]
        torch.testing.assert_close(W[rows], expected)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("step_wise", [True, False])
def test_egsw_weighs_any_advantage(kind, step_wise):
    """A [B] advantage and the same one spread over [B, T] weigh alike, for each of the three advantages."""
    rewards, group, mask, entropy = batch()
    A = egsw.advantages(rewards, group, kind)
    both = [egsw.weights(a, entropy, mask, group, step_wise=step_wise) for a in (A, A[:, None].expand_as(mask))]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(both[0], egsw_loops(A, entropy, mask, group, 0.5, 2.0, step_wise, True))


def test_egsw_refuses_a_temperature_of_zero():
    rewards, group, mask, entropy = batch()
    with pytest.raises(ValueError, match="temperature"):
        egsw.weights(rewards, entropy, mask, group, temperature=0.0)


# --- GTPO -------------------------------------------------------------------------------------------------------------


def gtpo_loops(rewards, H, mask, group, alpha1, alpha2, compare, mean, scope):
    """Eq. 2 and 3, token by token, in float64."""
    B, T = mask.shape
    plus, minus = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    usable = [0 < rewards[group == group[i]].sum() < (group == group[i]).sum() for i in range(B)]
    for i in range(B):
        for t in range(T):
            if not mask[i, t] or not usable[i]:
                continue
            values = []
            for k in range(B):
                same = usable[k] and rewards[k] == rewards[i] and (scope == "batch" or group[k] == group[i])
                for s in range(T):
                    near = {"column": s == t, "row": k == i, "matrix": True}[compare]
                    if same and near and mask[k, s]:
                        values.append(float(H[k, s]))
            own = float(H[i, t])
            if rewards[i] == 0:
                values, own = [1 / v for v in values], 1 / own
            if mean == "arithmetic":
                centre = sum(values) / len(values)
            else:
                centre = math.exp(sum(map(math.log, values)) / len(values))
            if rewards[i] == 1:
                plus[i, t] = alpha1 + alpha2 * own / centre
            else:
                minus[i, t] = -alpha1 - alpha2 * own / centre
    return plus.float(), minus.float()


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("compare", ["column", "row", "matrix"])
def test_gtpo_shaped_rewards_are_eq_2_and_3(compare, mean, scope):
    rewards, group, mask, entropy = batch()
    rewards[group == 2] = 1.0  # one group without information
    got = gtpo.shaped_rewards(rewards, entropy, mask, group, 0.9, 0.2, compare, mean, scope)
    expected = gtpo_loops(rewards, entropy, mask, group, 0.9, 0.2, compare, mean, scope)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("normalize", ["all", "own"])
def test_gtpo_advantages_are_eq_4(normalize, scope):
    rewards, group, mask, entropy = batch()
    rewards[group == 2] = 0.0
    plus, minus = gtpo.shaped_rewards(rewards, entropy, mask, group, scope=scope)
    got = gtpo.advantages(plus, minus, rewards, mask, group, scope, normalize, eps=0.0)
    for i in range(len(rewards)):
        shaped = plus if rewards[i] == 1 else minus
        over = []
        for k in range(len(rewards)):
            usable = int(group[k]) != 2 and (scope == "batch" or group[k] == group[i])
            if usable and (normalize == "all" or rewards[k] == rewards[i]):
                over += [float(shaped[k, t]) for t in range(mask.shape[1]) if mask[k, t]]
        for t in range(mask.shape[1]):
            expected = 0.0
            if mask[i, t] and int(group[i]) != 2 and max(over) > min(over):
                centre = sum(over) / len(over)
                std = math.sqrt(sum((v - centre) ** 2 for v in over) / len(over))
                expected = (float(shaped[i, t]) - centre) / std
            assert float(got[i, t]) == pytest.approx(expected, abs=1e-4)


def test_gtpo_shares_conserve_the_reward():
    """With alpha1 + alpha2 = 1, the shaped rewards of O+ sum to d_t in each column."""
    rewards, group, mask, entropy = batch()
    plus, minus = gtpo.shaped_rewards(rewards, entropy, mask, group, 0.9, 0.1)
    torch.testing.assert_close(plus.sum(0), mask[rewards == 1].sum(0))
    torch.testing.assert_close(-minus.sum(0), mask[rewards == 0].sum(0))


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_gtpo_without_shaping_is_grpo_on_the_token_level(scope):
    rewards, group, mask, entropy = batch()
    for alpha2, H in ((0.0, entropy), (0.1, torch.full_like(entropy, 0.4))):  # no shaping, or nothing to shape by
        shaped = gtpo.shaped_rewards(rewards, H, mask, group, alpha2=alpha2, scope=scope)
        A = gtpo.advantages(*shaped, rewards, mask, group, scope)
        for rows in gtpo.comparison_sets(rewards, group, scope):
            p = float(mask[rows & (rewards == 1)].sum() / mask[rows].sum())
            expected = torch.where(rewards == 1, math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p)))[:, None] * mask
            torch.testing.assert_close(A[rows], expected[rows], atol=1e-4, rtol=1e-4)


def test_gtpo_in_a_group_of_equal_lengths_is_grpo():
    rewards, group, mask, _ = batch()
    mask = torch.ones_like(mask)
    shaped = gtpo.shaped_rewards(rewards, torch.full_like(mask, 0.4), mask, group, scope="group")
    A = gtpo.advantages(*shaped, rewards, mask, group, "group")
    torch.testing.assert_close(A, grpo.advantages(rewards, group)[:, None].expand_as(A), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_gtpo_normalised_inside_each_outcome_loses_right_and_wrong(scope):
    """The fact that decides the default of `normalize`: with "own" the mean advantage of right tokens is zero, many of
    them are pushed down, and without the entropy term no signal is left at all; with "all" none is pushed down."""
    rewards, group, mask, entropy = batch(groups=6)
    right = mask * rewards[:, None] > 0
    shaped = gtpo.shaped_rewards(rewards, entropy, mask, group, scope=scope)
    own = gtpo.advantages(*shaped, rewards, mask, group, scope, normalize="own")[right]
    assert float(own.mean()) == pytest.approx(0.0, abs=1e-5) and float((own < 0).float().mean()) > 0.25
    assert (gtpo.advantages(*shaped, rewards, mask, group, scope, normalize="all")[right] > 0).all()
    plain = gtpo.shaped_rewards(rewards, entropy, mask, group, alpha2=0.0, scope=scope)
    assert gtpo.advantages(*plain, rewards, mask, group, scope, normalize="own").abs().max() == 0


def test_gtpo_rewards_uncertain_right_tokens_and_punishes_confident_wrong_ones():
    rewards, group = torch.tensor([1.0, 1, 0, 0]), torch.zeros(4, dtype=torch.long)
    entropy, mask = torch.tensor([[0.1], [1.0], [0.1], [1.0]]), torch.ones(4, 1)
    plus, minus = gtpo.shaped_rewards(rewards, entropy, mask, group)
    assert plus[1] > plus[0] > 1 and minus[2] < minus[3] < -1
    A = gtpo.advantages(plus, minus, rewards, mask, group).squeeze(1)
    assert A[1] > A[0] > 0 > A[3] > A[2]


def test_gtpo_entropy_limits_bound_the_shares():
    rewards, group, mask, entropy = batch()
    entropy[0, 0], entropy[1, 0] = 0.0, 0.0
    shaped = gtpo.shaped_rewards(rewards, entropy, mask, group)
    assert all(torch.isfinite(x).all() for x in shaped)
    flat = gtpo.shaped_rewards(rewards, entropy, mask, group, entropy_min=0.5, entropy_max=0.5)
    torch.testing.assert_close(flat[0][mask * rewards[:, None] > 0].unique(), torch.tensor([1.1]))


def test_gtpo_overlong_punishment():
    lengths = torch.tensor([10.0, 20, 30, 60])
    one = torch.zeros(4, dtype=torch.long)
    # easy (4/4 right): L = max((10 + 60) / 2, 30) = 35; 60 is 25/35 beyond it
    easy = gtpo.overlong_punishment(torch.ones(4), lengths, one, 0.75)
    torch.testing.assert_close(easy, torch.tensor([0.0, 0, 0, -0.5 * 25 / 35]))
    # hard (1/4): none
    assert gtpo.overlong_punishment(torch.tensor([1.0, 0, 0, 0]), lengths, one, 0.75).abs().sum() == 0
    # between, n = m: the wrong ones, L from all rows; capped at one half from 2 L on
    rewards, lengths = torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([10.0, 10, 10, 10, 10, 100])
    L = max((10 + 100) / 2, 25)
    got = gtpo.overlong_punishment(rewards, lengths, torch.zeros(6, dtype=torch.long), 0.75)
    torch.testing.assert_close(got, torch.tensor([0, 0, 0, 0, 0, -0.5 * (100 - L) / L]))
    # between, n > m: the right ones
    got = gtpo.overlong_punishment(torch.tensor([1.0, 1, 0]), torch.tensor([30.0, 10, 30]), one[:3], 0.75)
    torch.testing.assert_close(got, torch.tensor([-0.5 * (30 - 70 / 3) / (70 / 3), 0, 0]))
    far = gtpo.overlong_punishment(torch.ones(5), torch.tensor([1.0, 1, 1, 1, 100]), torch.zeros(5).long(), 0.75)
    assert far.tolist() == pytest.approx([0, 0, 0, 0, -0.5 * min(1, (100 - 50.5) / 50.5)])
    shaped = gtpo.shaped_rewards(torch.tensor([1.0, 0]), torch.ones(2, 1), torch.ones(2, 1), one[:2],
                                 punishment=torch.tensor([-0.5, -0.25]))  # fmt: skip
    assert float(shaped[0][0]) == pytest.approx(0.6) and float(shaped[1][1]) == pytest.approx(-1.35)


# --- GRPO-S -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_grpo_s_shaped_rewards_are_eq_6(mean):
    rewards, group, mask, entropy = batch()
    got = grpo_s.shaped_rewards(rewards, entropy, mask, group, 0.9, 0.2, mean)
    A = grpo_s.advantages(got, rewards, group)

    def H(i):
        values = [float(entropy[i, t]) for t in range(mask.shape[1]) if mask[i, t]]
        if mean == "geometric":
            return math.exp(sum(map(math.log, values)) / len(values))
        return sum(values) / len(values)

    for i in range(len(rewards)):
        mates = [k for k in range(len(rewards)) if group[k] == group[i]]
        same = [k for k in mates if rewards[k] == rewards[i]]
        if rewards[i] == 1:
            expected = 0.9 + 0.2 * H(i) / sum(H(k) for k in same) * len(same)
        else:
            expected = -0.9 - 0.2 * (1 / H(i)) / sum(1 / H(k) for k in same) * len(same)
        assert float(got[i]) == pytest.approx(expected, rel=1e-5)
        centre = sum(float(got[k]) for k in mates) / len(mates)
        std = math.sqrt(sum((float(got[k]) - centre) ** 2 for k in mates) / len(mates))
        assert float(A[i]) == pytest.approx((float(got[i]) - centre) / std, rel=1e-4)


def test_grpo_s_floors_the_mean_entropy_and_not_each_tokens():
    rewards, group, mask = torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.long), torch.ones(3, 10)
    entropy = torch.zeros(3, 10)
    entropy[0, 0], entropy[1, 0] = 0.02, 0.06  # means of 0.002 and 0.006; the wrong row's, 0, goes to the floor
    got = grpo_s.shaped_rewards(rewards, entropy, mask, group, 1.0, 0.1)
    torch.testing.assert_close(got, torch.tensor([1.05, 1.15, -1.1]))
    got = grpo_s.shaped_rewards(rewards, entropy, mask, group, 1.0, 0.1, "geometric", 0.01)
    H = torch.tensor([0.02, 0.06]) ** 0.1 * 0.01**0.9
    torch.testing.assert_close(got[:2], 1 + 0.1 * H / H.mean())


def test_grpo_s_sequence_ratio():
    mask = torch.tensor([[1.0, 1, 0]])
    new, old = torch.tensor([[0.2, 0.4, 9.0]]), torch.zeros(1, 3)
    assert float(grpo_s.sequence_ratio(new, old, mask)) == pytest.approx(math.exp(0.3))
    arithmetic = (math.exp(0.2) + math.exp(0.4)) / 2
    assert float(grpo_s.sequence_ratio(new, old, mask, "arithmetic")) == pytest.approx(arithmetic)


@pytest.mark.parametrize("ratio", ["geometric", "arithmetic"])
def test_grpo_s_loss_is_eq_7(ratio):
    rewards, group, mask, entropy = batch()
    new, old = logprobs(mask)
    A = method_advantages(grpo_s, rewards, group, mask, entropy)
    loss = grpo_s.loss(new, old, A, mask, 0.2, 0.28, ratio)
    total = (loss * loss_weights(mask, "sequence")).sum()
    w = grpo_s.sequence_ratio(new, old, mask, ratio)
    expected = -torch.min(w * A, w.clamp(0.8, 1.28) * A).mean()
    torch.testing.assert_close(total, expected)


def test_grpo_s_with_equal_entropies_has_grpos_advantages():
    rewards, group, mask, _ = batch()
    A = method_advantages(grpo_s, rewards, group, mask, torch.full_like(mask, 0.4))
    torch.testing.assert_close(A, grpo.advantages(rewards, group), atol=1e-4, rtol=1e-4)


# --- facts of every method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_equal_rewards_give_exactly_no_gradient(method, value):
    rewards, group, mask, entropy = batch()
    rewards = torch.full_like(rewards, value)
    new, old = logprobs(mask)
    loss = method_loss(method, new, old, rewards, group, mask, entropy)
    loss.backward()
    assert float(loss) == 0 and new.grad.abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_one_equal_group_beside_others_gets_no_gradient(method):
    rewards, group, mask, entropy = batch()
    rewards[group == 1] = 1.0
    new, old = logprobs(mask)
    method_loss(method, new, old, rewards, group, mask, entropy).backward()
    assert new.grad[group == 1].abs().max() == 0 and new.grad[group == 0].abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_gradient_is_the_plain_policy_gradient(method):
    """At ratio 1 the loss is -mean(weight * A), and its gradient that of -mean(weight * A * log pi)."""
    rewards, group, mask, entropy = batch()
    old = logprobs(mask)[1]
    new = old.clone().requires_grad_()
    loss = method_loss(method, new, old, rewards, group, mask, entropy)
    loss.backward()
    A = method_advantages(method, rewards, group, mask, entropy)
    A = A if A.dim() == 2 else A[:, None].expand_as(mask)
    W = egsw.weights(A, entropy, mask, group) if method is egsw else 1.0
    reduction = method.Config.__dataclass_fields__["reduction"].default
    expected = -W * A * loss_weights(mask, reduction)
    torch.testing.assert_close(new.grad, expected * mask)
    torch.testing.assert_close(loss.detach(), expected.sum())


@pytest.mark.parametrize("method", METHODS)
def test_padding_never_matters(method):
    """Neither what stands in the padding nor how much of it there is changes loss or gradient."""
    rewards, group, mask, entropy = batch()
    new, old = logprobs(mask)
    loss = method_loss(method, new, old, rewards, group, mask, entropy)
    loss.backward()
    junk = torch.rand_like(mask) * (1 - mask)
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (mask, entropy + junk, old + junk)]
    padded = torch.nn.functional.pad(new.detach() + 2 * junk, (0, 3)).requires_grad_()
    again = method_loss(method, padded, wide[2], rewards, group, wide[0], wide[1])
    again.backward()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(padded.grad[:, : mask.shape[1]], new.grad)
    assert (padded.grad * (1 - wide[0])).abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_order_of_rows_never_matters(method):
    """Rows of one prompt need not be adjacent: groups are known by their ids alone."""
    rewards, group, mask, entropy = batch()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(3))
    A = method_advantages(method, rewards, group, mask, entropy)
    shuffled = method_advantages(method, rewards[order], 7 - 2 * group[order], mask[order], entropy[order])
    torch.testing.assert_close(shuffled, A[order])
    if method is egsw:
        W = egsw.weights(A, entropy, mask, group)
        torch.testing.assert_close(egsw.weights(A[order], entropy[order], mask[order], group[order]), W[order])
