"""harness/trainer.py: how an update is cut into pieces, that this changes nothing, and that a policy learns."""

import itertools
import math

import pytest
import torch
from helpers import grpo_update, rollout_of, score, trainer_of

import common
import grpo
from harness import decoder, distributed, tiny
from harness.trainer import (
    Completion,
    cost,
    cut,
    in_order_of_length,
    plan_microbatches,
    share_of_process,
    unique_completions,
)  # fmt: skip
from tasks import arithmetic

# --- pieces -----------------------------------------------------------------------------------------------------------


def completions(*shape):
    """Completions of these (prompt, prompt tokens, tokens)."""
    return [Completion(index, *numbers) for index, numbers in enumerate(shape)]


def test_a_piece_costs_what_its_padded_tokens_cost_and_stays_within_the_budget():
    three = completions((0, 9, 3), (0, 9, 2), (1, 9, 2))
    assert cost(three[:2]) == 15 and cost(three) == 2 * 9 + 3 * 3
    assert cut(three, 15) == [three[:2], three[2:]]
    assert cut(three, 14) == [[c] for c in three] and cut(three, 27) == [three]


def test_the_longest_come_first_and_completions_of_a_prompt_stay_together():
    four = completions((0, 9, 2), (1, 9, 4), (0, 9, 6), (2, 3, 9))
    assert [c.index for c in in_order_of_length(four)] == [2, 0, 1, 3]


def test_processes_share_the_tokens_in_stretches():
    four = completions((0, 9, 6), (0, 9, 1), (1, 5, 5), (2, 4, 1))
    assert [share_of_process(four, rank, 2) for rank in range(2)] == [four[:1], four[1:]]
    assert [share_of_process(four[:1], rank, 3) for rank in range(3)] == [[], [], four[:1]]
    for n in range(1, 9):
        assert list(itertools.chain(*(share_of_process(four, rank, n) for rank in range(n)))) == four


def test_the_padding_does_not_make_completions_different_and_the_prompt_does(loaded):
    r = rollout_of(*loaded, questions=["1+2?", "3+4?"], G=2).select(torch.tensor([0, 0, 2]))
    r.completion_ids[2] = r.completion_ids[0]
    r.mask[2] = r.mask[0]
    r.mask[:, -1] = 0.0
    r.completion_ids[1, -1] += 1
    representatives, unique_index = unique_completions(r, torch.arange(3))
    assert len(representatives) == 2 and unique_index[0] == unique_index[1] != unique_index[2]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_every_row_is_scored_by_one_process_within_the_budget(world_size, share_prompts, loaded, monkeypatch):
    rollout = rollout_of(*loaded, questions=["1+2?", "3+4-5?", "5+6?"])
    rows = torch.arange(1, 12)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    scored = []
    sizes = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for plan in plan_microbatches(rollout, rows, 60, share_prompts):
            u = plan.scored_rows
            mask = rollout.mask[plan.rows].long()
            same_completion = rollout.completion_ids[u][plan.unique_index] * mask
            assert torch.equal(same_completion, rollout.completion_ids[plan.rows] * mask)
            assert torch.equal(rollout.group[u][plan.unique_index], rollout.group[plan.rows])
            n_prompts = len(rollout.group[u].unique()) if share_prompts else len(u)
            run = n_prompts * int(rollout.prompt_lengths[u].max()) + len(u) * int(rollout.mask[u].sum(1).max())
            assert run <= 60 or len(u) == 1
            sizes.append(len(u))
            scored += plan.rows.tolist()
    assert sorted(scored) == rows.tolist()
    assert world_size > 3 or max(sizes) > 1
    assert plan_microbatches(rollout, rows[:0], 60, share_prompts) == []


def test_equal_completions_of_a_prompt_are_scored_once_and_count_as_often_as_they_came(loaded):
    r = rollout_of(*loaded, questions=["1+2?", "3+4?"])
    r = r.select(torch.tensor([0, 1, 0, 0, 4, 5, 6, 1]))
    texts = {(int(g), tuple(ids[m > 0].tolist())) for g, ids, m in zip(r.group, r.completion_ids, r.mask, strict=True)}
    (plan,) = plan_microbatches(r, torch.arange(8), 10**6, True)
    assert len(plan.scored_rows) == len(texts) < 6 and plan.rows.tolist() == list(range(8))
    t = trainer_of(*loaded)
    logprobs = t.score(loaded[0], r, plan_microbatches(r, torch.arange(8), 20, True))
    torch.testing.assert_close(logprobs, score(loaded[0], r)[0], atol=1e-6, rtol=1e-6)


def test_all_minibatches_together_hold_every_row_once(loaded):
    rollout = rollout_of(*loaded)
    for n in (1, 4, 5, 24, 30):
        t = trainer_of(*loaded, minibatches=n)
        seen = [[batch.rows for batch in minibatch] for minibatch in t.minibatches(rollout, "token")]
        sizes = [sum(len(rows) for rows in minibatch) for minibatch in seen]
        rows = torch.cat(list(itertools.chain(*seen)))
        assert sorted(rows.tolist()) == list(range(24)) and len(seen) == min(n, 24)
        assert max(sizes) <= math.ceil(24 / min(n, 24))


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.fixture()
def rollout(loaded):
    """Six prompts with four completions each, and made-up rewards."""
    rollout = rollout_of(*loaded)
    rollout.rewards = (torch.arange(len(rollout)) % 3 == 0).float()
    return rollout


def step(loaded, rollout, A=None, reduction="sequence", skip_zero=True, **options):
    """What one step changes in the weights, its metrics, and its micro-batches. A: advantages, GRPO's unless given."""
    model, tokenizer = loaded
    A = grpo.advantages(rollout.rewards, rollout.group) if A is None else A
    t = trainer_of(model, tokenizer, optimizer="sgd", lr=0.1, warmup_steps=0, **options)
    before = [p.detach().clone() for p in model.parameters()]
    batches = grpo_update(t, rollout, A, reduction, skip_zero)
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    return moved, t.metrics_of_update(), batches


def largest(tensors):
    return max(float(x.detach().abs().max()) for x in tensors)


def assert_same_step(a, b):
    moved, metrics, _ = a
    expected, expected_metrics, _ = b
    assert largest(expected) > 1e-4  # something moved at all
    for x, y in zip(moved, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_the_step_does_not_depend_on_how_it_is_cut_into_micro_batches(loaded, rollout, reduction):
    whole = step(loaded, rollout, reduction=reduction)
    for token_budget in (1, 60, 300):
        assert_same_step(step(loaded, rollout, reduction=reduction, token_budget=token_budget), whole)


def test_the_step_does_not_depend_on_sharing_prompts(loaded, rollout, monkeypatch):
    run = []  # ids that the decoder ran on
    loaded[0].base_model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = step(loaded, rollout, minibatches=2, token_budget=100)
    n_shared = sum(run)
    monkeypatch.setattr(decoder, "shares_prompts", lambda model: False)
    assert_same_step(step(loaded, rollout, minibatches=2, token_budget=100), shared)
    assert n_shared < 0.8 * (sum(run) - n_shared)


def test_the_step_does_not_depend_on_the_order_of_the_rows(loaded, rollout):
    shuffled = rollout.select(torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1)))
    assert_same_step(step(loaded, shuffled), step(loaded, rollout))


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_rows_without_advantage_are_not_scored_and_still_count_in_the_means(loaded, rollout, minibatches, reduction):
    """In the metrics too. With two minibatches, none of the second has an advantage."""
    rollout.rewards = torch.tensor([1.0, 0, 0, 1] + [1] * 4 + [0, 1, 0, 0] + [0] * 4 + [1] * 8)
    options = dict(minibatches=minibatches, token_budget=1, reduction=reduction)
    skipping = step(loaded, rollout, **options)
    scoring = step(loaded, rollout, skip_zero=False, **options)
    assert_same_step(skipping, scoring)
    assert 0 < len(skipping[2]) < len(scoring[2]) <= 24


def test_a_row_with_an_advantage_on_one_token_alone_is_scored(loaded):
    rollout = rollout_of(*loaded, Q=1, G=2)
    A = torch.zeros_like(rollout.mask)
    A[1, 0] = 1.0
    moved, _, batches = step(loaded, rollout, A)
    assert [batch.rows.tolist() for batch in batches] == [[1]] and largest(moved) > 0


def test_old_log_probs_are_those_of_the_policy_before_the_first_optimizer_step(loaded, rollout):
    """In the first minibatch the ratio is exactly 1."""
    expected = score(loaded[0], rollout, temperature=0.7)[0]
    batches = step(loaded, rollout, minibatches=3, token_budget=100, skip_zero=False, temperature=0.7)[2]
    for batch in batches:
        torch.testing.assert_close(batch.old_logprobs, expected[batch.rows], atol=1e-5, rtol=1e-5)
        assert torch.equal(batch.mask, rollout.mask[batch.rows]) and not batch.old_logprobs.requires_grad
        is_first = bool((batch.rows < 8).all())
        assert torch.equal(batch.logprobs, batch.old_logprobs) == is_first
        if not is_first:
            assert largest([batch.logprobs - batch.old_logprobs]) > 1e-4
    assert {bool((batch.rows < 8).all()) for batch in batches} == {True, False}


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_gap_to_the_samplers_log_probs_is_rounding_and_a_mean_over_the_scored_tokens(loaded, rollout, minibatches):
    rollout.rewards = (torch.arange(len(rollout)) < 2).float()  # one group of six has an advantage
    metrics = step(loaded, rollout, minibatches=minibatches)[1]
    assert metrics["sampling_logp_difference"] < 1e-6
    rollout.logprobs = rollout.logprobs - 0.25
    metrics = step(loaded, rollout, minibatches=minibatches)[1]
    assert metrics["sampling_logp_difference"] == pytest.approx(0.25, abs=1e-5)


def test_the_gradient_is_clipped_to_the_norm(loaded, rollout):
    free, metrics, _ = step(loaded, rollout, max_grad_norm=1e9)
    clipped, same_metrics, _ = step(loaded, rollout, max_grad_norm=metrics["grad_norm"] / 2)
    assert metrics["grad_norm"] == pytest.approx(same_metrics["grad_norm"])  # the logged norm is that before clipping
    for a, b in zip(clipped, free, strict=True):
        torch.testing.assert_close(a, b / 2, atol=1e-7, rtol=1e-4)


def test_loss_and_gradient_norm_are_means_over_the_optimizer_steps(loaded):
    rollout = rollout_of(*loaded, Q=1)
    once = step(loaded, rollout, A=torch.ones(4))[1]
    twice = step(loaded, common.concatenate([rollout, rollout]), A=torch.ones(8), minibatches=2)[1]
    assert once["loss"] == pytest.approx(-1.0)
    assert twice["loss"] == pytest.approx(-1.0, abs=0.2) and twice["loss"] != once["loss"]  # the policy has moved
    assert 0.3 * once["grad_norm"] < twice["grad_norm"] < 1.5 * once["grad_norm"]


def test_sgd_moves_the_weights_by_the_gradient_alone_and_keeps_no_state(loaded):
    t = trainer_of(*loaded, optimizer="sgd", lr=0.1, warmup_steps=0, max_grad_norm=1e9)
    for factor in (1.0, 2.0):  # with momentum, the second step would be longer than its gradient
        before = [p.detach().clone() for p in loaded[0].parameters()]
        for p in loaded[0].parameters():
            p.grad = torch.full_like(p, factor)
        t.optimizer_step()
        for p, b in zip(loaded[0].parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.1 * factor)
    assert not t.optimizer.state_dict()["state"]


def test_the_learning_rate_rises_over_the_warmup_and_stays(loaded):
    t = trainer_of(*loaded, optimizer="sgd", lr=1.0, warmup_steps=3)
    rates = []
    for _ in range(5):
        rates.append(t.optimizer.param_groups[0]["lr"])
        t.optimizer_step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_the_model_trains_in_training_mode_and_samples_in_evaluation_mode(loaded, rollout):
    """Gradient checkpointing works only in training mode, and it turns the cache of sampling off."""
    modes = [loaded[0].training for minibatch in trainer_of(*loaded).minibatches(rollout, "token") for _ in minibatch]
    rollout_of(*loaded)
    assert all(modes) and not loaded[0].training


@pytest.mark.parametrize("loss_of", [
    lambda difference: (1 + difference) * torch.inf,
    lambda difference: difference.abs().sqrt(),  # 0, and its gradient is 0 / 0
    lambda difference: difference + torch.inf,  # the gradient is finite
])  # fmt: skip
def test_an_update_whose_loss_or_gradient_is_not_finite_is_skipped(loss_of, loaded, rollout):
    t = trainer_of(*loaded)
    before = [p.detach().clone() for p in loaded[0].parameters()]
    for minibatch in t.minibatches(rollout, "token"):
        for batch in minibatch:
            per_token = loss_of(batch.logprobs - batch.old_logprobs)
            (per_token * batch.loss_weights).sum().backward()
            t.record(batch, per_token)
        t.optimizer_step()
    metrics = t.metrics_of_update()
    assert metrics["skipped_updates"] == 1 and metrics["loss"] == metrics["grad_norm"] == 0
    assert all(torch.equal(p, b) for p, b in zip(loaded[0].parameters(), before, strict=True))


@pytest.mark.parametrize("rows", [[], [4, 5, 6, 7]])  # an empty rollout; one without a difference
def test_a_step_without_a_gradient_changes_nothing(loaded, rollout, rows):
    rollout.rewards[4:8] = 1.0
    moved, metrics, batches = step(loaded, rollout.select(torch.tensor(rows, dtype=torch.long)))
    assert largest(moved) == 0 and metrics["grad_norm"] == metrics["loss"] == 0 and not batches


# --- sampling and learning --------------------------------------------------------------------------------------------


def encoded(tokenizer, n, seed=0):
    problems = arithmetic.problems(n, seed, False, 2, 2)
    ids = tokenizer([problem["question"] for problem in problems])["input_ids"]
    return [{**problem, "row": problem, "prompt_ids": ids[i]} for i, problem in enumerate(problems)]


def test_each_pass_through_the_problems_has_an_order_of_its_own_and_draws_each_once(loaded):
    problems = encoded(loaded[1], 5)
    t = trainer_of(*loaded, problems, n_prompts=2, group_size=2)
    asked = []
    for _ in range(10):
        rollout = t.sample()
        asked += [text["question"] for text in rollout.records[::2]]
    passes = [asked[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == sorted(problem["question"] for problem in problems) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_rewards_and_texts_belong_to_their_rows(loaded):
    model, tokenizer = loaded
    t = trainer_of(model, tokenizer, encoded(tokenizer, 6), n_prompts=6, group_size=4, rollout_rows=8)
    rollout = t.verify(t.sample())
    assert rollout.group.tolist() == [i // 4 for i in range(24)] and 0 < rollout.rewards.sum() < 24
    for i, text in enumerate(rollout.records):
        n = int(rollout.mask[i].sum())
        assert tokenizer.decode(rollout.completion_ids[i, :n], skip_special_tokens=True) == text["completion"]
        prompt = tokenizer.decode(rollout.prompt_ids[i, : rollout.prompt_lengths[i]])
        assert prompt == text["question"]
        stated = text["completion"].rpartition("####")[2].strip()
        assert float(rollout.rewards[i]) == (stated == text["answer"].rpartition("####")[2].strip())
        assert text["verdict"] == "correct" if rollout.rewards[i] else text["verdict"] != "correct"


def test_a_few_grpo_steps_raise_the_reward():
    """An untrained model is rewarded for answering with a 7: GRPO finds that and keeps to it."""
    tokenizer = tiny.new_tokenizer()
    model = tiny.new_model(tokenizer, 0)
    t = trainer_of(model, tokenizer, lr=3e-3, warmup_steps=0)
    seven = tokenizer("7")["input_ids"][0]
    prompts = tokenizer(["1+2?", "3+4-5?", "6?", "12-7?"])["input_ids"]
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(12):
        uniforms = torch.rand(64, 2, generator=generator)
        rollout = common.sample(model, prompts, 16, 2, [tokenizer.eos_token_id], uniforms)
        rollout.rewards = (rollout.completion_ids[:, 0] == seven).float()
        means.append(float(rollout.rewards.mean()))
        grpo_update(t, rollout, grpo.advantages(rollout.rewards, rollout.group))
    assert means[0] < 0.3 and means[-1] > 0.8, means
