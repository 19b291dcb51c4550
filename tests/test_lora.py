"""LoRA (harness/model.py): what is trained, what the reference is, what is saved, and what is refused."""

import importlib
import json
import math

import pytest
import torch
from helpers import call, grpo_update, lines, naive_score, refused, rollout_of, score, score_inputs, trainer_of
from safetensors.torch import load_file

import common
import grpo
from harness import decoder, tiny
from harness.model import adapters, add_adapters, base_dtype, load_model, load_policy, save_merged
from harness.options import RunConfig, resolve_defaults

pytest.importorskip("peft")
CPU = torch.device("cpu")


def with_adapters(folder, **options):
    """The model of the folder with adapters of rank 4, and its tokenizer."""
    return load_policy(RunConfig(**({"lora_rank": 4} | options)), str(folder), CPU)


def disturb(model, size=0.05):
    """Moves the adapters away from zero, as training does."""
    rng = torch.Generator().manual_seed(0)
    for name, p in adapters(model).items():
        if ".lora_B." in name:
            p.data = size * torch.randn(p.shape, generator=rng)


def train_once(t, rollout):
    """One GRPO step on made-up rewards. Returns its metrics."""
    grpo_update(t, rollout, grpo.advantages((torch.arange(len(rollout)) % 3 == 0).float(), rollout.group))
    return t.metrics_of_update()


def test_new_adapters_change_nothing_and_are_the_same_for_the_same_seed(toy, loaded):
    model, tokenizer = with_adapters(toy)
    base = rollout_of(*loaded)
    rollout = rollout_of(model, tokenizer)
    assert torch.equal(base.completion_ids, rollout.completion_ids) and torch.equal(base.logprobs, rollout.logprobs)
    first = adapters(model)
    torch.rand(1)
    again = adapters(with_adapters(toy)[0])
    other = adapters(with_adapters(toy, seed=1)[0])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_linear_layer_but_the_head_has_an_adapter_and_nothing_else_is_trained(toy):
    model, _ = with_adapters(toy)
    adapted = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    plain, _ = load_model(str(toy), CPU)
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert adapted == linear - {"lm_head"} and len(adapted) == 3 * 7
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters(model))
    assert len(adapters(model)) == 2 * len(adapted)


@pytest.mark.parametrize("gradient_checkpointing, optimizer", [(False, "adamw"), (True, "sgd")])
def test_a_step_moves_the_adapters_and_leaves_the_base_alone(gradient_checkpointing, optimizer, toy):
    model, tokenizer = with_adapters(toy, gradient_checkpointing=gradient_checkpointing)
    disturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    t = trainer_of(model, tokenizer, lora_rank=4, optimizer=optimizer, lr=1e-2)
    assert train_once(t, rollout_of(model, tokenizer))["skipped_updates"] == 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (".lora_" in name), name


def test_the_gradient_of_the_adapters_is_that_of_the_plain_logits(toy):
    model, tokenizer = with_adapters(toy)
    disturb(model)
    rollout = rollout_of(model, tokenizer, Q=2, G=2)
    factors = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    trained = list(adapters(model).values())
    gradients = [
        torch.autograd.grad((logprobs * factors).sum(), trained)
        for logprobs, _ in (common.token_logprobs(model, *score_inputs(rollout)), naive_score(model, rollout))
    ]
    for gradient, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_the_reference_is_the_base_and_the_same_numbers_as_a_separate_copy(toy):
    model, tokenizer = with_adapters(toy)
    disturb(model)
    rollout = rollout_of(model, tokenizer)
    without_copy = trainer_of(model, tokenizer, lora_rank=4).reference_logprobs(rollout)
    full = trainer_of(*load_model(str(toy), CPU))
    full.base_name = str(toy)
    assert torch.equal(without_copy, full.reference_logprobs(rollout))
    assert (score(model, rollout)[0] - without_copy).abs().max() > 0.01  # the adapters are on again


def bf16_base(toy):
    """The toy base as a GPU would hold it: bf16, with disturbed adapters in float32."""
    model, tokenizer = load_model(str(toy), CPU, dtype=base_dtype(torch.device("cuda")))
    add_adapters(model, RunConfig(lora_rank=4), str(toy))
    disturb(model)
    return model, tokenizer


def test_a_bf16_base_trains_float32_adapters(toy, monkeypatch):
    model, tokenizer = bf16_base(toy)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    monkeypatch.setattr(decoder, "autocast", lambda device: torch.autocast("cpu", dtype=torch.bfloat16))
    before = {name: weight.clone() for name, weight in adapters(model).items()}
    t = trainer_of(model, tokenizer, lora_rank=4, lr=1e-3)
    metrics = train_once(t, rollout_of(model, tokenizer))
    assert metrics["sampling_logp_difference"] < 0.05 and metrics["skipped_updates"] == 0
    assert all(not torch.equal(weight, before[name]) for name, weight in adapters(model).items())


def test_merging_into_a_bf16_base_loses_nothing(toy, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = bf16_base(toy)
    base = {name: weight.float() for name, weight in model.state_dict().items()}
    save_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    A = base[f"{name}.lora_A.default.weight"]
    B = base[f"{name}.lora_B.default.weight"]
    expected = base[f"{name}.base_layer.weight"] + 32 / 4 * (B @ A)
    weight = merged.get_submodule(name).weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.slow
def test_a_run_leaves_a_plain_model_its_adapters_and_a_small_checkpoint(small, toy, tmp_path, monkeypatch, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    call(monkeypatch, "grpo", *small("--name", "r", "--lora-rank", 4, "--lr", 1e-2, "--kl-coef", 0.1, "--steps", 3))
    folder = tmp_path / "r"
    metrics = lines(folder / "metrics.jsonl")
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert all(row["sampling_logp_difference"] < 1e-5 for row in metrics)
    assert metrics[0]["kl"] == 0 and metrics[-1]["kl"] > 0
    assert "are trained" in capsys.readouterr().out

    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = AutoTokenizer.from_pretrained(folder / "model")("1+2?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(toy)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert (merged(ids).logits - base(ids).logits).abs().max() > 0.01
    by_peft = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(by_peft(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)

    checkpoint = folder / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "state.pt"}
    weights = load_file(checkpoint / "adapter_model.safetensors")
    moments = torch.load(checkpoint / "state.pt")["optimizer"]["state"]
    assert len(moments) == len(weights) == 2 * 3 * 7
    assert sum(m["exp_avg"].numel() for m in moments.values()) == sum(weight.numel() for weight in weights.values())

    # The merged model is evaluated like the one with adapters.
    call(monkeypatch, "grpo", *small("--name", "merged", "--model", folder / "model", "--eval-only"))
    trained, alone = (json.loads((tmp_path / run / "eval.json").read_text())[-1] for run in ("r", "merged"))
    assert {**trained, "step": 0} == alone


@pytest.mark.parametrize("optimizer, n_parameters, lr", [
    ("adamw", 150_000, 2e-3), ("adamw", 10**9, 1e-5), ("sgd", 150_000, 1.0), ("sgd", 10**9, 1.0),
])  # fmt: skip
def test_the_learning_rate_is_ten_times_that_of_the_full_model(optimizer, n_parameters, lr):
    rates = []
    for rank in (0, 8):
        cfg = RunConfig(lora_rank=rank, optimizer=optimizer)
        resolve_defaults(cfg, n_parameters, on_gpu=False)
        rates.append(cfg.lr)
    assert rates == pytest.approx([lr / 10, lr])


def test_experts_in_one_tensor_are_refused(refusal):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=16, num_experts=4))
    assert "--lora-rank" in refusal(add_adapters, model, RunConfig(lora_rank=4), source="")


def test_without_peft_it_is_refused_in_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused(monkeypatch, capsys, tmp_path, *small("--lora-rank", 4))
    assert "--lora-rank" in message and "pip install peft" in message


@pytest.mark.slow
def test_a_resumed_run_keeps_its_optimizer_its_adapters_and_their_base(small, toy, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "grpo", *small("--name", "r", "--lora-rank", 4, "--steps", 1))
    moved = tmp_path / "moved"
    (tmp_path / "other").mkdir()
    model, tokenizer = load_model(str(toy), CPU)
    model.save_pretrained(moved)
    tokenizer.save_pretrained(moved)
    other = tiny.new_model(tokenizer, seed=1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    resume = ("--resume", str(tmp_path / "r"), "--steps", "2")

    def refusal(*options):
        return refused(monkeypatch, capsys, tmp_path, *resume, *options, name="grpo")

    for option, value in (("--lora-rank", "8"), ("--lora-rank", "0"), ("--optimizer", "sgd")):
        assert f"{option} {value}" in refusal(option, value)
    message = refusal("--model", str(tmp_path / "other"))
    assert "--model" in message and "base" in message
    call(monkeypatch, "grpo", *resume, "--model", str(moved))  # the same weights in another place
    assert [row["step"] for row in lines(tmp_path / "r" / "metrics.jsonl")] == [1, 2]
