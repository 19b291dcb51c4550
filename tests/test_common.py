"""common.py: sampling, log-probs and entropy, the means of the loss."""

import copy

import pytest
import torch
from helpers import T, assert_same_samples, naive_score, rollout_of, score, score_inputs
from test_sampling import FAMILIES, PROMPTS, family_model

import common
import harness.model
from harness import cuda_graphs, decoder

# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact_below", [0.0, 0.5, 1.0])
def test_dropping_ended_rows_changes_no_sample(compact_below, loaded, monkeypatch):
    r = rollout_of(*loaded)
    assert 0 < r.finished.sum() < len(r)  # some rows end early and some do not
    monkeypatch.setattr(common, "COMPACT_BELOW", compact_below)
    assert_same_samples(rollout_of(*loaded), r)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_with_fixed_shapes_gives_the_same_samples(loaded, temperature):
    fixed = rollout_of(*loaded, temperature=temperature, sample=cuda_graphs.sample)
    plain = rollout_of(*loaded, temperature=temperature)
    assert_same_samples(fixed, plain)
    for r in (fixed, plain):
        assert (r.logprobs * (1 - r.mask) == 0).all() and (r.entropy * (1 - r.mask) == 0).all()


def test_decoding_with_fixed_shapes_stops_when_all_rows_have_ended(loaded):
    model, tokenizer = loaded
    prompts = tokenizer(["1+2?", "12+3?"])["input_ids"]
    calls = []
    model.base_model.register_forward_hook(lambda *a: calls.append(1))
    r = cuda_graphs.sample(model, prompts, 2, 200, [tokenizer.eos_token_id], None)
    assert r.finished.all() and len(calls) < 40


def test_the_mask_ends_with_eos_and_truncation_is_flagged(loaded):
    r = rollout_of(*loaded)
    eos = loaded[1].eos_token_id
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
    model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = harness.model.load_model(str(tmp_path), torch.device("cpu"))
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    r = rollout_of(model, tokenizer)
    assert_same_samples(r, expected)
    last = r.mask.sum(1, keepdim=True).long() - 1  # where the finished completions have their EOS
    logprobs, _ = score(model, r)
    assert (logprobs.gather(1, last)[r.finished] < 0).all() and (r.mask.gather(1, last) == 1).all()
    torch.testing.assert_close(logprobs * r.mask, r.logprobs * r.mask, atol=1e-5, rtol=1e-5)


def test_several_eos_ids_all_end_a_completion(loaded):
    model, tokenizer = loaded
    prompts = tokenizer(["1+2?"])["input_ids"]
    digits = tokenizer("0123456789")["input_ids"]
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution_at_the_temperature(loaded, temperature):
    model, tokenizer = loaded
    model.generation_config.top_k = 1  # both of these must be ignored
    model.generation_config.repetition_penalty = 5.0
    prompt = tokenizer("3+4-1?")["input_ids"]
    n = 4000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    r = common.sample(model, [prompt], n, 1, [tokenizer.eos_token_id], uniforms, temperature)
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    frequencies = torch.bincount(r.completion_ids[:, 0], minlength=len(logits)) / n

    def fits(temperature):
        probs = (logits / temperature).softmax(-1)
        return ((frequencies - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt() + 1 / n).all()  # 4 standard errors

    assert fits(temperature) and not fits(1.3 * temperature)
    log_p = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(r.logprobs[:, 0], log_p[r.completion_ids[:, 0]], atol=1e-5, rtol=1e-5)
    H = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(r.entropy[:, 0], H.expand(n), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probs, uniforms, tokens", [
    ([1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 1 - 2**-24], [0, 0, 0]),  # a token of probability 0 is never drawn
    ([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.25, 0.5, 0.75, 1 - 2**-24], [1, 1, 3, 3, 3]),
    ([0.25, 0.75], [1.0], [1]),  # a number that was rounded up to 1 stays inside the vocabulary
    # Rounding can leave the sum of the probabilities a little off 1. A large difference shows what is done about it.
    ([0.225, 0.225, 0.45, 0.0], [0.24, 0.26, 0.49, 0.51, 1 - 2**-24], [0, 1, 1, 2, 2]),
    ([0.275, 0.275, 0.55, 0.0], [0.24, 0.26, 0.49, 0.51, 1 - 2**-24], [0, 1, 1, 2, 2]),
])  # fmt: skip
def test_a_number_chooses_the_token_by_the_inverse_cdf(probs, uniforms, tokens):
    assert common.inverse_cdf(torch.tensor([probs]), torch.tensor([uniforms])).tolist() == [tokens]


def test_concatenate_keeps_rows_and_keeps_groups_apart(loaded):
    a = rollout_of(*loaded, questions=["1+2?", "3+4?"])
    b = rollout_of(*loaded, questions=["1+2+3+4+5?"])
    both = common.concatenate([a, b])
    assert both.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert_same_samples(both.select(both.group < 2), a)
    torch.testing.assert_close(score(loaded[0], both)[0], both.logprobs, atol=1e-5, rtol=1e-5)


# --- log-probs and entropy --------------------------------------------------------------------------------------------


def with_gradients(model, logprobs, entropy=None):
    """Log-probs, entropy if given, and the gradients of all weights for a sum of them with unequal factors."""
    model.zero_grad()
    total = (logprobs * torch.arange(1, T + 1)).sum()
    if entropy is not None:
        total = total + 0.3 * entropy.sum()
    total.backward()
    outputs = [x.detach() for x in (logprobs, entropy) if x is not None]
    return outputs + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_near(tensors, expected):
    """The distance of each is at most 1e-5 of its size."""
    for a, b in zip(tensors, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_their_gradients_equal_log_softmax_of_the_full_logits(
    loaded, chunk, temperature, monkeypatch
):
    """With prompts scored once for their group or in every row, with and without entropy, junk in all padding, and
    groups whose rows lie apart."""
    model, tokenizer = loaded
    monkeypatch.setitem(decoder.CHUNK_ELEMENTS, "cpu", chunk * len(tokenizer))
    r = rollout_of(model, tokenizer, questions=["1+2?", "12+3-14+5?", "9-8?"])
    r = r.select(torch.randperm(len(r), generator=torch.Generator().manual_seed(1)))
    expected = with_gradients(model, *naive_score(model, r, temperature))
    without_entropy = with_gradients(model, naive_score(model, r, temperature)[0])
    r.completion_ids = torch.where(r.mask > 0, r.completion_ids, -100)
    past = torch.arange(r.prompt_ids.shape[1]) >= r.prompt_lengths[:, None]
    r.prompt_ids = torch.where(past, torch.arange(len(r))[:, None] % 5, r.prompt_ids)
    for group in (None, 7 - 3 * r.group, torch.arange(len(r))):
        scored = common.token_logprobs(model, *score_inputs(r), temperature, with_entropy=True, group=group)
        assert_near(with_gradients(model, *scored), expected)
        logprobs, entropy = common.token_logprobs(model, *score_inputs(r), temperature, group=group)
        assert entropy is None
        assert_near(with_gradients(model, logprobs), without_entropy)


def runs_of_the_decoder(model, r, group):
    """The shapes of the ids that the decoder runs on."""
    shapes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score(model, r, group=group)
    hook.remove()
    return shapes


def test_a_prompt_runs_once_for_its_group(loaded):
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer, questions=["1+2?", "12+3-14+5?"])
    T_max = int(r.mask.sum(1).max())
    assert runs_of_the_decoder(model, r, r.group) == [(2, 10), (8, T_max - 1)]
    assert runs_of_the_decoder(model, r, None) == [(8, int((r.prompt_lengths + r.mask.sum(1)).max()))]
    first_tokens = common.replace(r, mask=r.mask * (torch.arange(T) == 0))
    assert runs_of_the_decoder(model, first_tokens, r.group) == [(2, 10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_share_prompts_where_they_keep_keys_and_values_alone(family):
    """Sliding windows may be shorter than the prompts. Linear attention overwrites its state."""
    model = family_model(family).eval()
    r = common.empty_rollout(PROMPTS, 4, T, model.device)
    r.completion_ids = torch.randint(24, r.completion_ids.shape)
    r.mask = (torch.arange(T) < torch.randint(1, T + 1, (12, 1))).float()
    inputs = (model, *score_inputs(r), 0.8, True)
    results = [with_gradients(model, *common.token_logprobs(*inputs, group)) for group in (r.group, None)]
    assert_near(*results)
    shares = family in ("Qwen3", "Gemma3Text")
    assert decoder.shares_prompts(model) == shares == (len(runs_of_the_decoder(model, r, r.group)) == 2)


def test_with_gradient_checkpointing_no_prompt_is_shared(loaded):
    model, tokenizer = loaded
    r = rollout_of(model, tokenizer)
    expected = with_gradients(model, common.token_logprobs(model, *score_inputs(r), group=r.group)[0])
    model.gradient_checkpointing_enable()
    model.train()
    assert not decoder.shares_prompts(model) and len(runs_of_the_decoder(model, r, r.group)) == 1
    assert_near(with_gradients(model, common.token_logprobs(model, *score_inputs(r), group=r.group)[0]), expected)
    model.gradient_checkpointing_disable()
    assert decoder.shares_prompts(model)


@pytest.mark.skipif(not decoder.has_onednn(), reason="oneDNN would not be faster on this processor")
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_by_onednn_and_their_gradients_are_those_of_torch(with_bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(600, 500, bias=with_bias)
    x = torch.randn(3, 5, 600, requires_grad=True)
    g = torch.randn(3, 5, 500)
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    expected_gradients = torch.autograd.grad((expected * g).sum(), inputs)
    decoder.use_onednn(layer)
    got = layer(x)
    assert "OneDNN" in got.grad_fn.name()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad((got * g).sum(), inputs), expected_gradients, atol=1e-4, rtol=1e-5)
    layer.requires_grad_(False)  # as LoRA's base
    (gradient,) = torch.autograd.grad((layer(x) * g).sum(), [x])
    torch.testing.assert_close(gradient, expected_gradients[0], atol=1e-4, rtol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), got) and layer(x[:, :0]).shape == (3, 0, 500)


@pytest.mark.parametrize("outputs", ["log-prob", "entropy", "both"])
def test_head_gradients_with_scale_cap_and_bias_are_those_of_autograd(outputs, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 3, 6, 1, 1])
    monkeypatch.setitem(decoder.CHUNK_ELEMENTS, "cpu", 2 * 7)  # chunks of two tokens

    def plain(hidden, weight, bias):
        z = (hidden @ weight.T + bias) * 0.5
        log_p = (torch.tanh(z / 2) * 2 / 0.7).log_softmax(-1)
        return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def chunked(hidden, weight, bias):
        return decoder.HeadLogprobs.apply(hidden, weight, bias, targets, 0.5, 2.0, 0.7, True)

    results = []
    for function in (plain, chunked):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logprob, entropy = function(*inputs)
        loss = 0.0
        if outputs != "entropy":
            loss = loss + (logprob * torch.arange(1, 6)).sum()
        if outputs != "log-prob":
            loss = loss + (entropy * torch.arange(2, 7)).sum() * 0.3
        loss.backward()
        results.append([logprob, entropy, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_a_token_of_probability_zero_gives_no_nan():
    """Some models give the unused places of their vocabulary the logit -inf."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.0, 4.0]], requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 0.0], requires_grad=True)
    logprob, entropy = decoder.HeadLogprobs.apply(hidden, weight, bias, torch.tensor([0, 2]), 1.0, None, 1.0, True)
    (logprob.sum() + entropy.sum()).backward()
    assert all(x.isfinite().all() for x in (logprob, entropy, hidden.grad, weight.grad, bias.grad))
    log_p = torch.tensor([[1.0, 0.0], [2.0, 4.0]]).log_softmax(1)  # of the two tokens that are left
    torch.testing.assert_close(entropy.detach(), -(log_p.exp() * log_p).sum(1))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_weights_turn_a_sum_into_each_of_the_three_means():
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    assert common.loss_weights(mask, "sequence")[:, 0].tolist() == [0.25, 0.125]
    assert common.loss_weights(mask, "token")[:, 0].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert common.loss_weights(mask, "constant")[:, 0].tolist() == [0.125, 0.125]
    for reduction in ("sequence", "token", "constant"):
        assert (common.loss_weights(mask, reduction) * (1 - mask)).sum() == 0
    with pytest.raises(ValueError, match="reduction"):
        common.loss_weights(mask, "mean")


def test_clip_fractions_count_what_the_clip_stops():
    ratio = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]])
    A = torch.tensor([1.0, -1.0])
    fractions = common.clip_fractions(ratio, A, 0.2, 0.2)
    assert fractions["clip_ratio/low"].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert fractions["clip_ratio/high"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert {x.dtype for x in fractions.values()} == {torch.float32}
