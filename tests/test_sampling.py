"""common.sample on real caches: growing in place, sliding windows, linear attention; and choosing the next nodes."""

import pytest
import torch
import transformers
from helpers import T, assert_same_samples, rollout_of, score
from transformers.cache_utils import DynamicLayer

import common
from harness import cuda_graphs, decoder

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=256, vocab_size=24)  # fmt: skip
FAMILIES = {
    "Qwen3": SMALL,
    "Gemma3Text": dict(SMALL, sliding_window=8, query_pre_attn_scalar=8),
    "Qwen3Next": dict(
        SMALL, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        num_experts=0, layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "Lfm2": dict(SMALL, block_multiple_of=8, layer_types=["conv", "full_attention"] * 2),
}  # fmt: skip
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [7, 8, 9]]


def family_model(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data = p.data * 3 if p.dim() == 2 else p.data
    return model


def sample_family(model):
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    return common.sample(model, PROMPTS, 4, 20, [0], uniforms)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room", [1, 3, 16])
def test_the_growing_cache_gives_the_bits_of_dynamic_cache(family, room, monkeypatch):
    model = family_model(family)
    monkeypatch.setattr(decoder, "ROOM", room)
    r = sample_family(model)
    assert r.finished.any() and not r.finished.all()
    monkeypatch.setattr(decoder, "growing_cache", decoder.new_cache)
    other = sample_family(model)
    for name in common.TENSOR_FIELDS:
        assert torch.equal(getattr(other, name), getattr(r, name)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compact_below", [0.0, 1.0])
def test_every_kind_of_cache_follows_its_rows(family, compact_below, monkeypatch):
    """What is sampled is what is scored, which needs no cache; and each row alone gives the same."""
    model = family_model(family)
    monkeypatch.setattr(common, "COMPACT_BELOW", compact_below)
    r = sample_family(model)
    assert len(r.completion_ids[:4].unique(dim=0)) > 2  # the prompts were split
    logprobs, entropy = score(model, r)
    torch.testing.assert_close(logprobs, r.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, r.entropy, atol=1e-4, rtol=1e-4)
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    for i in (0, 5, 11):
        alone = common.sample(model, [PROMPTS[i // 4]], 1, 20, [0], uniforms[i : i + 1])
        n = int(r.mask[i].sum())
        assert int(alone.mask.sum()) == n and torch.equal(alone.completion_ids[0, :n], r.completion_ids[i, :n])
    fixed = cuda_graphs.sample(model, PROMPTS, 4, 20, [0], uniforms)  # common.sample, but for full attention
    torch.testing.assert_close(fixed.logprobs, r.logprobs, atol=1e-4, rtol=1e-4)


def test_only_full_attention_grows_in_place():
    for family, expected in {"Qwen3": 4, "Qwen3Next": 2, "Lfm2": 2, "Gemma3Text": 0}.items():
        plain = [type(layer) for layer in decoder.new_cache(family_model(family)).layers]
        growing = [type(layer) for layer in decoder.growing_cache(family_model(family)).layers]
        assert growing == [decoder.growing_layer() if layer is DynamicLayer else layer for layer in plain]
        assert growing.count(decoder.growing_layer()) == expected, family


def test_a_token_is_written_into_the_room_and_a_selection_of_rows_copies_no_room():
    layer = decoder.growing_layer()()
    layer.reorder_cache(torch.tensor([0]))  # before the first token there is nothing to select

    def memory_after(tokens):
        values = torch.randn(3, 2, tokens, 4)  # some models have values of another size than keys
        layer.update(torch.randn(3, 2, tokens, 8), values)
        assert torch.equal(layer.values[:, :, -tokens:], values)
        return layer.keys.untyped_storage().data_ptr()

    memory_after(10)
    memory = memory_after(1)
    assert [memory_after(1) == memory for _ in range(decoder.ROOM)] == [True] * (decoder.ROOM - 1) + [False]
    layer.reorder_cache(torch.tensor([2, 0, 0, 1]))
    for tensor in (layer.keys, layer.values):
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_a_node_runs_once_while_its_rows_are_the_same(loaded, monkeypatch):
    model, tokenizer = loaded
    batches = []
    model.base_model.register_forward_hook(lambda m, a, output: batches.append(len(output.last_hidden_state)))
    prompts = tokenizer(["1+2?", "3+4-1?"])["input_ids"]
    common.sample(model, prompts, 8, 4, [-1], None)  # greedy: rows of a prompt stay the same
    assert batches == [2, 2, 2, 2]


def test_an_eos_as_first_token_ends_the_row_and_a_rollout_of_them_ends_at_once(loaded):
    model, tokenizer = loaded
    prompts = tokenizer(["1+2?", "3+4-1?"])["input_ids"]
    calls = []
    hook = model.base_model.register_forward_hook(lambda *a: calls.append(1))
    everything = list(range(len(tokenizer)))
    r = common.sample(model, prompts, 3, T, everything, torch.rand(6, T))
    assert r.finished.all() and r.mask.sum(1).tolist() == [1.0] * 6 and len(calls) == 1
    hook.remove()
    one = common.sample(model, prompts[:1], 1, 1, [-1], torch.tensor([[0.5]]))
    assert one.mask.tolist() == [[1.0]] and not one.finished.any()
    for rollout in (r, one):
        torch.testing.assert_close(score(model, rollout)[0], rollout.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [decoder.CHUNK_ELEMENTS, common.CACHED_ELEMENTS])
def test_the_size_of_a_piece_changes_no_sample(sizes, loaded, monkeypatch):
    r = rollout_of(*loaded)
    for size in (1, 50, 100):
        monkeypatch.setitem(sizes, "cpu", size)
        assert_same_samples(rollout_of(*loaded), r)


def test_a_logit_of_minus_infinity_gives_no_nan(loaded):
    """Some models give the unused places of their vocabulary the logit -inf."""
    model, _ = loaded
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[3] = -torch.inf
    hidden = torch.randn(5, head.in_features)
    with torch.no_grad():
        token, logprob, entropy = common.next_token(model, hidden, torch.rand(5, 8), 1.0, greedy=False)
        log_p = decoder.head_logits(model, hidden).log_softmax(-1)
    kept = torch.arange(log_p.shape[1]) != 3
    expected = -(log_p.exp() * log_p)[:, kept].sum(-1)
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)
    assert (token != 3).all() and logprob.isfinite().all()
