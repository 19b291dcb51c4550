"""Model families: sampling, scoring and one step of training, of all weights or of adapters, with random models."""

from pathlib import Path

import pytest
import torch
from harness.policy import load_policy
from helpers import error_line, needs_peft, rollout_of, score

import common
import grpo
from harness import cuda_graphs, data, distributed, lora, tiny
from harness.options import RunConfig
from harness.trainer import Trainer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": dict(SMALL, tie_word_embeddings=False),
    "Llama": dict(SMALL, tie_word_embeddings=False),
    "Mistral": dict(SMALL, sliding_window=8),
    "Gemma2": dict(SMALL, final_logit_softcapping=3.0, sliding_window=8, query_pre_attn_scalar=8),
    "Gemma3Text": dict(SMALL, sliding_window=8, query_pre_attn_scalar=8),
    "Cohere": dict(SMALL, logit_scale=0.25),
    "Granite": dict(SMALL, logits_scaling=4.0),
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Phi": dict(SMALL),  # a bias in its head
}


def checkpoint(family, folder):
    """A random model of the family, written with the tiny task's tokenizer."""
    import transformers

    tokenizer = tiny.new_tokenizer()
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**FAMILIES[family], **ids)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    for p in model.parameters():  # far from a uniform distribution, so that a forgotten factor shows
        p.data = p.data * 3 if p.dim() == 2 else p.data + 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient_checkpointing, lora_rank", [
    (False, 0), (True, 0), pytest.param(False, 4, marks=needs_peft), pytest.param(True, 4, marks=needs_peft),
])  # fmt: skip
def test_a_family_samples_scores_trains_and_loads_again(family, gradient_checkpointing, lora_rank, tmp_path):
    folder = checkpoint(family, tmp_path / "a")
    cfg = RunConfig(lr=1e-3, max_new_tokens=20, token_budget=100, temperature=0.8, lora_rank=lora_rank)
    cfg.gradient_checkpointing = gradient_checkpointing
    model, tokenizer = load_policy(cfg, folder, torch.device("cpu"))
    if lora_rank:
        for p in lora.adapters(model).values():
            p.data = 0.2 * torch.randn_like(p)  # large enough that a layer without its adapter shows
    prompts = tokenizer(["1+2?", "12+3-4+5-6+7?", "9-8?"])["input_ids"]
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    options = (model, prompts, 4, 20, data.stop_ids(model, tokenizer), uniforms, 0.8)
    r = common.sample(*options)
    fixed = cuda_graphs.sample(*options)  # or the plain loop, where its attention does not allow fixed shapes
    assert torch.equal(fixed.mask, r.mask)
    torch.testing.assert_close(fixed.logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    logprobs, entropy = score(model, r, 0.8)
    torch.testing.assert_close(logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, r.entropy, atol=2e-4, rtol=1e-4)

    full = model(torch.cat([r.prompt_ids[4], r.completion_ids[4]])[None]).logits[0].detach()  # the model's own logits
    P = len(prompts[1])
    n = int(r.mask[4].sum())
    log_p = (full[P - 1 : P - 1 + n] / 0.8).log_softmax(-1)
    expected = log_p.gather(1, r.completion_ids[4, :n, None]).squeeze(1)
    torch.testing.assert_close(r.logprobs[4, :n], expected, atol=2e-4, rtol=1e-4)

    r.rewards = (torch.arange(12) % 2).float()
    A = grpo.advantages(r.rewards, r.group)
    trainer = Trainer(cfg, model, tokenizer, [], folder)
    before = [p.detach().clone() for p in model.parameters()]
    for minibatch in trainer.minibatches(r, "token", A):
        for batch in minibatch:
            ratio = (batch.logprobs - batch.old_logprobs).exp()
            per_token = grpo.loss(ratio, A[batch.rows], batch.mask)
            (per_token * batch.loss_weights).sum().backward()
            trainer.record(batch, per_token)
        trainer.optimizer_step()
    assert trainer.update_metrics["grad_norm"] > 0 and trainer.update_metrics["skipped_updates"] == 0
    moved = [p for p, b in zip(model.parameters(), before, strict=True) if not torch.equal(p, b)]
    assert moved and all(p.requires_grad for p in moved)
    tokenizer.save_pretrained(tmp_path / "b")
    if lora_rank:
        lora.save_merged(model, distributed.full_weights(model), tmp_path / "b")
    else:
        model.save_pretrained(tmp_path / "b")
    again, _ = data.load_model(str(tmp_path / "b"), torch.device("cpu"))
    model.eval()
    rounding = 1e-3 if lora_rank else 0.0  # of the adapters that were merged
    torch.testing.assert_close(again(r.completion_ids).logits, model(r.completion_ids).logits, atol=rounding, rtol=0)


@pytest.mark.parametrize("family, name", [("Cohere", "logit_scale"), ("Granite", "logits_scaling"),
                                          ("Gemma2", "final_logit_softcapping")])  # fmt: skip
def test_what_a_family_does_behind_its_head_is_part_of_the_log_probs(family, name, tmp_path):
    """With the factor the log-probs are those of the model's own logits; another factor gives others."""
    model, tokenizer = data.load_model(checkpoint(family, tmp_path / "a"), torch.device("cpu"))
    r = rollout_of(model, tokenizer, Q=1)
    setattr(model.config, name, 1.5)
    assert (score(model, r)[0] - r.logprobs).abs().max() > 1e-3


def test_a_soft_cap_in_bf16_is_not_refused_for_its_rounding(tmp_path):
    model, _ = data.load_model(checkpoint("Gemma2", tmp_path / "a"), torch.device("cpu"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_more_behind_its_head_is_refused(dtype, loaded):
    model = loaded[0].to(dtype)
    data.check_head(model)
    model.register_forward_hook(lambda _, args, output: output.__setitem__("logits", output.logits * 1.1) or output)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        data.check_head(model)


def test_no_end_token_is_refused(tmp_path, capsys):
    model, tokenizer = data.load_model(checkpoint("Qwen3", tmp_path / "a"), torch.device("cpu"))
    assert data.stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [5, 6]
    assert data.stop_ids(model, tokenizer) == sorted({5, 6, tokenizer.eos_token_id})
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    with pytest.raises(SystemExit):
        data.stop_ids(model, tokenizer)
    assert "end-of-sequence" in error_line(capsys)


def test_pickled_weights_are_refused(tmp_path, capsys):
    folder = Path(checkpoint("Qwen3", tmp_path / "a"))
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        data.load_model(str(folder), torch.device("cpu"))
    assert "safetensors" in error_line(capsys)
