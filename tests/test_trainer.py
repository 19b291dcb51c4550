"""harness/trainer.py: how an update is cut into pieces, that this changes nothing, and that a policy learns."""

import itertools
import math

import pytest
import torch
from helpers import T, rollout_of, score, trainer_of

import common
import grpo
from harness import distributed, tiny
from harness.trainer import deal, microbatches, plan_microbatches, unique_completions

# --- pieces -----------------------------------------------------------------------------------------------------------


def equal(a, b):
    return len(a) == len(b) and all(x.tolist() == y for x, y in zip(a, b, strict=True))


def test_the_examples_of_the_docstrings_hold(loaded):
    r = rollout_of(*loaded, questions=["1+2?"])
    five, four = loaded[1]("54")["input_ids"]
    rollout = r.select(torch.zeros(10, dtype=torch.long))
    rollout.completion_ids[7:, 0] = torch.tensor([five, four, five])
    rollout.mask[7:] = torch.tensor([1.0] + [0.0] * (T - 1))
    representatives, place = unique_completions(rollout, torch.tensor([7, 8, 9]))
    assert (representatives.tolist(), place.tolist()) == ([8, 7], [1, 0, 1])
    assert equal(deal(torch.tensor([5, 9, 7]), 2), [[1, 0], [2]])
    assert equal(microbatches(torch.tensor([4, 9, 5]), 10), [[1], [2, 0]])


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = torch.randint(1, 40, (57,), generator=torch.Generator().manual_seed(0))
    for budget in (1, 40, 100, 10**6):
        batches = microbatches(lengths, budget)
        assert sorted(torch.cat(batches).tolist()) == list(range(57))
        assert all(len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= budget for rows in batches)


def test_the_padding_does_not_make_completions_different_and_the_prompt_does(loaded):
    r = rollout_of(*loaded, questions=["1+2?", "3+4?"], G=2).select(torch.tensor([0, 0, 2]))
    r.completion_ids[2] = r.completion_ids[0]
    r.mask[2] = r.mask[0]
    r.mask[:, -1] = 0.0
    r.completion_ids[1, -1] += 1
    representatives, place = unique_completions(r, torch.arange(3))
    assert len(representatives) == 2 and place[0] == place[1] != place[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_row_is_scored_by_one_process_and_all_have_as_many_micro_batches(world_size, loaded, monkeypatch):
    rollout = rollout_of(*loaded, questions=["1+2?", "3+4?", "5+6?"])
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    scored = []
    counts = set()
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        plan = plan_microbatches(rollout, torch.arange(1, 12), 30)
        counts.add(len(plan))
        for batch in plan:
            mask = rollout.mask[batch.rows].long()
            assert len(batch.scored_rows)
            assert torch.equal(rollout.completion_ids[batch.scored_rows][batch.place] * mask,
                               rollout.completion_ids[batch.rows] * mask)  # fmt: skip
            assert torch.equal(rollout.group[batch.scored_rows][batch.place], rollout.group[batch.rows])
            scored += batch.rows.tolist()
    assert sorted(scored) == list(range(1, 12)) and len(counts) == 1


def test_equal_completions_of_a_prompt_are_scored_once_and_count_as_often_as_they_came(loaded):
    r = rollout_of(*loaded, questions=["1+2?", "3+4?"])
    r = r.select(torch.tensor([0, 1, 0, 0, 4, 5, 6, 1]))
    texts = {(int(g), tuple(ids[m > 0].tolist())) for g, ids, m in zip(r.group, r.completion_ids, r.mask, strict=True)}
    (batch,) = plan_microbatches(r, torch.arange(8), 10**6)
    assert len(batch.scored_rows) == len(texts) < 6 and batch.rows.tolist() == list(range(8))
    t = trainer_of(*loaded)
    logprobs = t.score(t.token_logprobs, r, plan_microbatches(r, torch.arange(8), 20))
    torch.testing.assert_close(logprobs, score(loaded[0], r)[0], atol=1e-6, rtol=1e-6)


# --- the update -------------------------------------------------------------------------------------------------------


def step(loaded, rollout=None, A=None, reduction="sequence", skip=True, **options):
    """What one step changes in the weights, its metrics, and the largest |logprobs - old| of each micro-batch.

    The rollout gets made-up rewards, unless it is given. A: advantages, GRPO's unless given. skip: rows with advantage
    0 are not scored.
    """
    model, tokenizer = loaded
    if rollout is None:
        rollout = rollout_of(model, tokenizer)
        rollout.rewards = (torch.arange(len(rollout)) % 3 == 0).float()
    A = grpo.advantages(rollout.rewards, rollout.group) if A is None else A
    t = trainer_of(model, tokenizer, optimizer="sgd", lr=0.1, warmup_steps=0, **options)
    before = [p.detach().clone() for p in model.parameters()]
    gaps = []
    for minibatch in t.minibatches(rollout, reduction, active=A if skip else None):
        for batch in minibatch:
            assert torch.equal(batch.mask, rollout.mask[batch.rows])
            gaps.append(float((batch.logprobs - batch.old_logprobs).abs().max().detach()))
            ratio = (batch.logprobs - batch.old_logprobs).exp()
            per_token = grpo.loss(ratio, A[batch.rows], batch.mask)
            (per_token * batch.loss_weights).sum().backward()
            t.record(batch, per_token, **common.clip_fractions(ratio, A[batch.rows], 0.2, 0.2))
        t.optimizer_step()
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    return moved, t.update_metrics, gaps


def assert_same_step(a, b):
    moved, metrics, _ = a
    expected, expected_metrics, _ = b
    assert max(float(m.abs().max()) for m in expected) > 1e-4  # something moved at all
    for x, y in zip(moved, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@pytest.mark.parametrize("token_budget", [1, 60, 300])
def test_the_step_does_not_depend_on_how_it_is_cut_into_micro_batches(loaded, reduction, token_budget):
    whole = step(loaded, reduction=reduction)
    assert_same_step(step(loaded, token_budget=token_budget, reduction=reduction), whole)


def test_the_step_does_not_depend_on_the_order_of_the_rows(loaded):
    rollout = rollout_of(*loaded)
    rollout.rewards = (torch.arange(len(rollout)) % 3 == 0).float()
    shuffled = rollout.select(torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1)))
    assert_same_step(step(loaded, shuffled), step(loaded, rollout))


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_rows_without_advantage_are_not_scored_and_still_count_in_the_means(loaded, minibatches, reduction):
    rollout = rollout_of(*loaded)
    rollout.rewards = torch.tensor([1.0, 0, 0, 1] + [1] * 4 + [0] * 4 + [0, 1, 0, 0] + [1] * 4 + [1, 1, 1, 0])
    options = dict(minibatches=minibatches, token_budget=1, reduction=reduction)
    skipping = step(loaded, rollout, **options)
    scoring = step(loaded, rollout, skip=False, **options)
    assert_same_step(skipping, scoring)
    assert 0 < len(skipping[2]) < len(scoring[2]) <= 24


def test_a_row_with_an_advantage_on_one_token_alone_is_scored(loaded):
    rollout = rollout_of(*loaded, Q=1, G=2)
    A = torch.zeros_like(rollout.mask)
    A[1, 0] = 1.0
    moved, _, gaps = step(loaded, rollout, A)
    assert len(gaps) == 1 and max(float(m.abs().max()) for m in moved) > 0


def test_the_first_ratio_is_exactly_one_and_later_ones_are_not(loaded):
    _, _, gaps = step(loaded, token_budget=100)
    assert len(gaps) > 1 and max(gaps) == 0
    _, _, gaps = step(loaded, minibatches=3)
    assert gaps[0] == 0 and min(gaps[1:]) > 0


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_gap_to_the_samplers_log_probs_is_rounding_and_a_mean_over_the_scored_tokens(loaded, minibatches):
    rollout = rollout_of(*loaded)
    rollout.rewards = (torch.arange(len(rollout)) < 2).float()  # one group of six has an advantage
    metrics = step(loaded, rollout, minibatches=minibatches)[1]
    assert metrics["sampling_logp_difference"] < 1e-6
    rollout.logprobs = rollout.logprobs - 0.25
    metrics = step(loaded, rollout, minibatches=minibatches)[1]
    assert metrics["sampling_logp_difference"] == pytest.approx(0.25, abs=1e-5)


def test_the_gradient_is_clipped_to_the_norm(loaded):
    free, metrics, _ = step(loaded, max_grad_norm=1e9)
    clipped, same_metrics, _ = step(loaded, max_grad_norm=metrics["grad_norm"] / 2)
    assert metrics["grad_norm"] == pytest.approx(same_metrics["grad_norm"])  # the logged norm is that before clipping
    for a, b in zip(clipped, free, strict=True):
        torch.testing.assert_close(a, b / 2, atol=1e-7, rtol=1e-4)


def test_loss_and_gradient_norm_are_means_over_the_optimizer_steps(loaded):
    rollout = rollout_of(*loaded, Q=1)
    rollout.rewards = torch.tensor([1.0, 0, 0, 0])
    once = step(loaded, rollout, A=torch.ones(4), skip=False)[1]
    twice = step(loaded, common.concatenate([rollout, rollout]), A=torch.ones(8), skip=False, minibatches=2)[1]
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


def test_the_model_trains_in_training_mode_and_samples_in_evaluation_mode(loaded):
    """Gradient checkpointing works only in training mode, and it turns the cache of sampling off."""
    t = trainer_of(*loaded)
    rollout = rollout_of(*loaded)
    modes = []
    for minibatch in t.minibatches(rollout, "token"):
        modes += [loaded[0].training for _ in minibatch]
    rollout_of(*loaded)
    assert all(modes) and not loaded[0].training


def test_an_update_that_is_not_finite_is_skipped(loaded):
    moved, metrics, _ = step(loaded, A=torch.full((24,), torch.inf))
    assert max(float(m.abs().max()) for m in moved) == 0 and metrics["skipped_updates"] == 1


def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is(loaded):
    t = trainer_of(*loaded)
    before = [p.detach().clone() for p in loaded[0].parameters()]
    for minibatch in t.minibatches(rollout_of(*loaded), "token"):
        for batch in minibatch:
            per_token = (batch.logprobs - batch.old_logprobs).abs().sqrt()  # 0, and its gradient is 0 / 0
            (per_token * batch.loss_weights).sum().backward()
            t.record(batch, per_token)
        t.optimizer_step()
    assert t.update_metrics["skipped_updates"] == 1 and t.update_metrics["loss"] == 0 and t.bad_steps == 1
    assert all(torch.equal(p, b) for p, b in zip(loaded[0].parameters(), before, strict=True))


def test_an_empty_rollout_changes_nothing(loaded):
    rollout = rollout_of(*loaded).select(torch.tensor([], dtype=torch.long))
    moved, metrics, _ = step(loaded, rollout)
    assert max(float(m.abs().max()) for m in moved) == 0 and metrics["grad_norm"] == 0


# --- sampling and learning --------------------------------------------------------------------------------------------


def encoded(tokenizer, n, seed=0):
    problems = tiny.problems(n, seed, False, 2, 2)
    ids = tokenizer([problem["question"] for problem in problems])["input_ids"]
    return [{**problem, "row": problem, "prompt_ids": ids[i]} for i, problem in enumerate(problems)]


def test_each_pass_through_the_problems_has_an_order_of_its_own_and_draws_each_once(loaded):
    problems = encoded(loaded[1], 5)
    t = trainer_of(*loaded, problems, n_prompts=2, group_size=2)
    asked = []
    for _ in range(10):
        rollout = t.sample()
        asked += [text["question"] for text in rollout.texts[::2]]
    passes = [asked[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == sorted(problem["question"] for problem in problems) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_rewards_and_texts_belong_to_their_rows(loaded):
    model, tokenizer = loaded
    t = trainer_of(model, tokenizer, encoded(tokenizer, 6), n_prompts=6, group_size=4, rollout_rows=8)
    rollout = t.verify(t.sample())
    assert rollout.group.tolist() == [i // 4 for i in range(24)] and 0 < rollout.rewards.sum() < 24
    for i, text in enumerate(rollout.texts):
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
        A = grpo.advantages(rollout.rewards, rollout.group)
        for minibatch in t.minibatches(rollout, "sequence", A):
            for batch in minibatch:
                ratio = (batch.logprobs - batch.old_logprobs).exp()
                per_token = grpo.loss(ratio, A[batch.rows], batch.mask)
                (per_token * batch.loss_weights).sum().backward()
                t.record(batch, per_token)
            t.optimizer_step()
    assert means[0] < 0.3 and means[-1] > 0.8, means


def test_all_minibatches_together_hold_every_row_once(loaded):
    rollout = rollout_of(*loaded)
    for n in (1, 4, 5, 24, 30):
        t = trainer_of(*loaded, minibatches=n)
        seen = [[batch.rows for batch in minibatch] for minibatch in t.minibatches(rollout, "token")]
        sizes = [sum(len(rows) for rows in minibatch) for minibatch in seen]
        rows = torch.cat(list(itertools.chain(*seen)))
        assert sorted(rows.tolist()) == list(range(24)) and len(seen) == min(n, 24)
        assert max(sizes) <= math.ceil(24 / min(n, 24))
