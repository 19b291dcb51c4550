"""Sampling, log-probs, the update and evaluation."""

import itertools
import math

import pytest
import torch

import common
import data
import evaluation
import grpo
import tiny

T = 9


def rollout_of(model, tokenizer, Q=6, G=4, seed=0, questions=None, **options):
    rows = questions or [row["question"] for row in tiny.problems(Q, seed, False, 2, 2)]
    prompts = tokenizer(rows)["input_ids"]
    uniforms = torch.rand(len(rows) * G, T, generator=torch.Generator().manual_seed(seed))
    return common.sample(model, prompts, G, T, [tokenizer.eos_token_id], uniforms, **options)


def score_inputs(r):
    return r.prompt_ids, r.prompt_lengths, r.completion_ids, r.mask


def same(a, b):
    for name in ("completion_ids", "logprobs", "entropy"):
        x, y = getattr(a, name) * a.mask, getattr(b, name) * b.mask
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.finished, b.finished)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_below", [0.0, 0.5, 1.0])
def test_dropping_finished_rows_changes_no_sample(loaded, drop_below):
    r = rollout_of(*loaded)
    assert 0 < r.finished.sum() < len(r)  # the case is worth something: some end early, some do not
    same(rollout_of(*loaded, drop_below=drop_below), r)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_with_fixed_shapes_gives_the_same_samples(loaded, temperature):
    same(rollout_of(*loaded, temperature=temperature, fixed=True), rollout_of(*loaded, temperature=temperature))


def test_fixed_shapes_stop_when_all_have_ended(loaded):
    model, tokenizer = loaded
    prompts, calls = tokenizer(["1+2?", "12+3?"])["input_ids"], []
    model.base_model.register_forward_hook(lambda *a: calls.append(1))
    r = common.sample(model, prompts, 2, 200, [tokenizer.eos_token_id], None, fixed=True)
    assert r.finished.all() and len(calls) < 40


def test_a_sample_does_not_depend_on_the_other_prompts(loaded):
    model, tokenizer = loaded
    questions = ["1+2?", "12+3-4+5-6+7?", "9-8?"]
    uniforms = torch.rand(6, T, generator=torch.Generator().manual_seed(1))
    prompts = tokenizer(questions)["input_ids"]
    together = common.sample(model, prompts, 2, T, [tokenizer.eos_token_id], uniforms)
    for i in range(3):
        alone = common.sample(model, prompts[i : i + 1], 2, T, [tokenizer.eos_token_id], uniforms[2 * i : 2 * i + 2])
        same(alone, together.select(torch.tensor([2 * i, 2 * i + 1])))


def test_the_mask_ends_with_eos_and_truncation_is_flagged(loaded):
    r, eos = rollout_of(*loaded), loaded[1].eos_token_id
    for ids, mask, finished in zip(r.completion_ids, r.mask, r.finished, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        assert (int(ids[n - 1]) == eos) == bool(finished)
        assert eos not in ids[: n - 1].tolist()
        assert bool(finished) or n == T


def test_eos_stays_in_the_loss_when_it_is_also_the_pad_token(loaded, tmp_path):
    model, tokenizer = loaded
    expected = rollout_of(model, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = data.load_model(str(tmp_path), torch.device("cpu"))
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    r = rollout_of(model, tokenizer)
    same(r, expected)
    last = r.mask.sum(1, keepdim=True).long() - 1  # where the finished completions have their EOS
    logprobs, _ = common.score(model, r, 1.0, 2048)
    assert (logprobs.gather(1, last)[r.finished] < 0).all() and (r.mask.gather(1, last) == 1).all()
    torch.testing.assert_close(logprobs * r.mask, r.logprobs * r.mask, atol=1e-5, rtol=1e-5)


def test_several_eos_ids_all_end_a_completion(loaded):
    model, tokenizer = loaded
    prompts, digits = tokenizer(["1+2?"])["input_ids"], tokenizer("0123456789")["input_ids"]
    uniforms = torch.rand(32, T, generator=torch.Generator().manual_seed(0))
    r = common.sample(model, prompts, 32, T, [tokenizer.eos_token_id, *digits], uniforms)
    for ids, mask in zip(r.completion_ids.tolist(), r.mask, strict=True):
        assert not set(ids[: int(mask.sum()) - 1]) & set(digits)


def test_greedy_takes_the_most_probable_token(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("3+4-1?")["input_ids"]
    r = common.sample(model, [prompt], 1, T, [tokenizer.eos_token_id], None)
    ids = list(prompt)
    for token in r.completion_ids[0, : int(r.mask.sum())].tolist():
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def chi_square(counts, probs, n):
    """Statistic and degrees of freedom, cells with fewer than 5 expected counts pooled."""
    expected = probs * n
    big = expected >= 5
    cells = [(float(c), float(e)) for c, e in zip(counts[big], expected[big], strict=True)]
    if not big.all():
        cells.append((float(counts[~big].sum()), float(expected[~big].sum())))
    cells = [(c, e) for c, e in cells if e > 1]
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution_at_the_temperature(loaded, temperature):
    model, tokenizer = loaded
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0  # must be ignored
    prompt, n = tokenizer("3+4-1?")["input_ids"], 4000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    r = common.sample(model, [prompt], n, 1, [tokenizer.eos_token_id], uniforms, temperature)
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    statistics = []
    for t in (temperature, 1.3 * temperature):
        probs = (logits / t).softmax(-1)
        counts = torch.bincount(r.completion_ids[:, 0], minlength=len(probs))
        value, freedom = chi_square(counts, probs, n)
        statistics.append((value - freedom) / math.sqrt(2 * freedom))
    assert statistics[0] < 4 < statistics[1]  # in standard deviations; another temperature is seen
    H = -(probs := (logits / temperature).softmax(-1)).mul(probs.log()).sum()
    torch.testing.assert_close(r.entropy[:, 0], H.expand(n), atol=1e-5, rtol=1e-5)


def test_pick_never_takes_a_token_of_probability_zero():
    probs = torch.tensor([[1.0, 0, 0, 0, 0], [0.0, 0.5, 0.0, 0.5, 0.0]])
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    assert common.pick(probs, torch.ones(5, dtype=torch.long), uniforms).tolist() == [1, 1, 3, 3, 3]


# --- log-probs and entropy --------------------------------------------------------------------------------------------


def naive(model, r, temperature):
    """From the full logits of each row alone, without padding."""
    logprobs, entropy = torch.zeros(r.mask.shape), torch.zeros(r.mask.shape)
    for i in range(len(r)):
        p, n = int(r.prompt_lengths[i]), int(r.mask[i].sum())
        ids = torch.cat([r.prompt_ids[i, :p], r.completion_ids[i, :n]])
        logp = (model(ids[None]).logits[0, p - 1 : -1] / temperature).log_softmax(-1)
        logprobs[i, :n] = logp.gather(1, ids[p:, None]).squeeze(1)
        entropy[i, :n] = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_log_softmax_of_the_full_logits(loaded, chunk, temperature):
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer, Q=3)
    results = []
    for logprobs, entropy in (
        common.token_logprobs(model, *score_inputs(r), temperature, chunk),
        naive(model, r, temperature),
    ):
        model.zero_grad()
        ((logprobs * torch.arange(T)).sum() + 0.3 * entropy.sum()).backward()
        results.append((logprobs, entropy, [p.grad.clone() for p in model.parameters()]))
    (logprobs, entropy, gradients), (expected, expected_entropy, expected_gradients) = results
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_gives_the_log_probs_of_sampling(loaded, temperature):
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer, temperature=temperature)
    logprobs, entropy = common.score(model, r, temperature, 100)
    torch.testing.assert_close(logprobs, r.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, r.entropy, atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(loaded):
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer)
    expected = common.score(model, r, 1.0, 10**6)
    r.completion_ids = torch.where(r.mask > 0, r.completion_ids, 5)
    past = torch.arange(r.prompt_ids.shape[1]) >= r.prompt_lengths[:, None]
    r.prompt_ids = torch.where(past, 7, r.prompt_ids)
    for a, b in zip(common.score(model, r, 1.0, 10**6), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_microbatches_hold_every_row_once_within_the_budget():
    lengths = torch.randint(1, 40, (57,), generator=torch.Generator().manual_seed(0))
    for budget in (1, 40, 100, 10**6):
        batches = common.microbatches(lengths, budget)
        assert sorted(torch.cat(batches).tolist()) == list(range(57))
        assert all(len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= budget for rows in batches)


def test_check_head_refuses_a_model_that_does_more_behind_its_head(loaded):
    model, _ = loaded
    common.check_head(model)
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 2) or output)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        common.check_head(model)


# --- the update -------------------------------------------------------------------------------------------------------


def test_loss_weights():
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    ones = torch.ones(2, 4)
    assert common.loss_weights(mask, "sequence")[:, 0].tolist() == [0.25, 0.125]
    assert common.loss_weights(mask, "token")[:, 0].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert common.loss_weights(mask, "constant")[:, 0].tolist() == [0.125, 0.125]
    for kind in ("sequence", "token", "constant"):
        assert (common.loss_weights(mask, kind) * (1 - mask)).sum() == 0
    assert float((common.loss_weights(mask, "token") * ones).sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="reduction"):
        common.loss_weights(mask, "mean")


def stepped(
    loaded,
    order=None,
    minibatches=1,
    skip=False,
    token_budget=10**6,
    reduction="sequence",
    seen=None,
    rewards=None,
    spoil=None,
):
    """Weights after one update of a rollout with made-up rewards, and its metrics."""
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer)
    r.rewards = (torch.arange(len(r)) % 3 == 0).float() if rewards is None else rewards
    r = r if order is None else r.select(order)
    A = grpo.advantages(r.rewards, r.group) if spoil is None else spoil

    def objective(logprobs, old_logprobs, rows):
        if seen is not None:
            seen.append((logprobs.detach() - old_logprobs).abs().max())
        ratio = (logprobs - old_logprobs).exp()
        return grpo.loss(logprobs, old_logprobs, A[rows], r.mask[rows]), common.clip_fractions(ratio, A[rows], 0.2, 0.2)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = common.update(
        model, optimizer, scheduler, r, objective, reduction, A if skip else None, 1.0, minibatches, token_budget
    )
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    return moved, metrics


def assert_same_step(a, b):
    (moved, metrics), (expected, expected_metrics) = a, b
    assert max(float(m.abs().max()) for m in expected) > 1e-4  # something moved at all
    for x, y in zip(moved, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@pytest.mark.parametrize("token_budget", [1, 60, 300])
def test_the_step_does_not_depend_on_how_it_is_cut_into_micro_batches(loaded, reduction, token_budget):
    whole = stepped(loaded, reduction=reduction)
    assert_same_step(stepped(loaded, token_budget=token_budget, reduction=reduction), whole)


def test_the_step_does_not_depend_on_the_order_of_the_prompts(loaded):
    order = torch.arange(24).view(6, 4).flip(0).reshape(-1)
    assert_same_step(stepped(loaded, order), stepped(loaded))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_rows_without_advantage_need_no_scoring(loaded, minibatches):
    rewards = torch.tensor([1.0, 0, 0, 1] + [1] * 4 + [0] * 4 + [0, 1, 0, 0] + [1] * 4 + [1, 1, 1, 0])
    seen, all_seen = [], []
    skipping = stepped(loaded, None, minibatches, skip=True, seen=seen, token_budget=1, rewards=rewards)
    scoring = stepped(loaded, None, minibatches, seen=all_seen, token_budget=1, rewards=rewards)
    assert_same_step(skipping, scoring)
    assert 0 < len(seen) < len(all_seen) <= 24


def test_equal_completions_of_a_prompt_are_scored_once_and_count_as_often_as_they_came(loaded):
    r = rollout_of(*loaded, questions=["1+2?", "3+4?"])
    r = r.select(torch.tensor([0, 1, 0, 0, 4, 5, 6, 1]))
    plan = common.scoring_plan(r, torch.arange(8), 10**6)
    (distinct, rows, line), *more = plan
    texts = {(int(g), tuple(ids[m > 0].tolist())) for g, ids, m in zip(r.group, r.completion_ids, r.mask, strict=True)}
    assert not more and len(distinct) == len(texts) < 6 and rows.tolist() == list(range(8))
    assert torch.equal(r.completion_ids[distinct][line], r.completion_ids)
    assert torch.equal(r.group[distinct][line], r.group)
    logprobs, entropy = common.score(loaded[0], r, 1.0, 20)
    torch.testing.assert_close(logprobs, r.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, r.entropy, atol=1e-5, rtol=1e-5)


def test_the_first_ratio_is_exactly_one_and_later_ones_are_not(loaded):
    seen = []
    stepped(loaded, seen=seen, token_budget=100)
    assert len(seen) > 1 and max(seen) == 0
    seen.clear()
    stepped(loaded, seen=seen, minibatches=3)
    assert seen[0] == 0 and min(seen[1:]) > 0


def test_a_step_that_is_not_finite_is_skipped(loaded):
    broken = torch.full((24,), torch.inf)
    moved, metrics = stepped(loaded, spoil=broken)
    assert max(float(m.abs().max()) for m in moved) == 0 and metrics["skipped_updates"] == 1


def test_an_empty_rollout_changes_nothing(loaded):
    moved, metrics = stepped(loaded, order=torch.tensor([], dtype=torch.long))
    assert max(float(m.abs().max()) for m in moved) == 0 and metrics["grad_norm"] == 0


def test_clip_fractions_count_what_the_clip_stops():
    ratio, A = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]), torch.tensor([1.0, -1.0])
    got = common.clip_fractions(ratio, A, 0.2, 0.2)
    assert got["clip_ratio/low"].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert got["clip_ratio/high"].tolist() == [[0, 0, 1], [0, 0, 0]]


def test_concatenate_keeps_rows_and_tells_groups_apart(loaded):
    a = rollout_of(*loaded, questions=["1+2?", "3+4?"])
    b = rollout_of(*loaded, questions=["1+2+3+4+5?"])
    both = common.concatenate([a, b])
    assert both.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    same(both.select(both.group < 2), a)
    torch.testing.assert_close(common.score(loaded[0], both, 1.0, 100)[0], both.logprobs, atol=1e-5, rtol=1e-5)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_pass_at_k_counts_the_draws_with_a_right_one():
    for n, c, k in itertools.product([5], range(6), range(1, 6)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_evaluate(loaded):
    greedy, sampled = rollout_of(*loaded, Q=3, G=1), rollout_of(*loaded, Q=3, G=4)
    greedy.rewards = torch.tensor([1.0, 0, 1])
    sampled.rewards = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    result = evaluation.evaluate(greedy, sampled, 4)
    assert result["greedy"] == pytest.approx(2 / 3) and result["mean@4"] == pytest.approx(0.5)
    assert [result[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([0.5, (5 / 6 + 0 + 1) / 3, 2 / 3])
    assert "pass@8" not in result and 0 < result["truncated"] < 1 and 1 < result["length"] <= T
    low, high = result["mean@4_ci"]
    assert 0 <= low < 0.5 < high <= 1


def test_bootstrap_intervals_have_the_width_of_the_normal_ones():
    values = (torch.arange(400) % 4 == 0).float()
    low, high = evaluation.bootstrap(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01) and high == pytest.approx(0.25 + half, abs=0.01)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_few_grpo_steps_raise_the_reward():
    """An untrained model is rewarded for answering with a 7: GRPO finds and keeps it."""
    tokenizer = tiny.new_tokenizer()
    model = tiny.new_model(tokenizer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    generator, seven, means = torch.Generator().manual_seed(0), tokenizer("7")["input_ids"][0], []
    prompts = tokenizer(["1+2?", "3+4-5?", "6?", "12-7?"])["input_ids"]
    for _ in range(12):
        r = common.sample(model, prompts, 16, 2, [tokenizer.eos_token_id], torch.rand(64, 2, generator=generator))
        r.rewards = (r.completion_ids[:, 0] == seven).float()
        means.append(float(r.rewards.mean()))
        A = grpo.advantages(r.rewards, r.group)

        def objective(new, old, rows, r=r, A=A):
            return grpo.loss(new, old, A[rows], r.mask[rows]), {}

        common.update(model, optimizer, scheduler, r, objective, "sequence", A, 1.0)
    assert means[0] < 0.3 and means[-1] > 0.8, means
