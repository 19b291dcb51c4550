"""Model families: sampling, scoring and one step of training, of all weights or of adapters, with random models."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, call, grpo_update, lines, naive_score, needs_peft, rollout_of, score
from safetensors.torch import load_file, save_file

import common
import grpo
from harness import cuda_graphs, tiny
from harness.model import (
    adapters,
    check_logprobs,
    load_model,
    load_policy,
    max_positions,
    save_merged,
    stop_ids,
    turn_off_noise,
)
from harness.options import RunConfig
from harness.trainer import Trainer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=64)  # fmt: skip
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=["linear_attention", "full_attention"])  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL = dict(SMALL, num_local_experts=4, num_experts_per_tok=2)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8)
MLA = dict(SMALL, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
           v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
           first_k_dense_replace=1)  # fmt: skip
# Sampled, scored, trained with all weights and with adapters, and loaded again.
TRAINED = {
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": dict(SMALL, tie_word_embeddings=False),
    "Llama": dict(SMALL, tie_word_embeddings=False),
    "Mistral": dict(SMALL, sliding_window=8),
    "Gemma2": dict(SMALL, final_logit_softcapping=3.0, sliding_window=8, query_pre_attn_scalar=8),
    "Gemma3Text": dict(SMALL, sliding_window=8, query_pre_attn_scalar=8),
    "Gemma4Text": dict(SMALL, sliding_window=8, vocab_size_per_layer_input=19, hidden_size_per_layer_input=8),
    "Cohere": dict(SMALL, logit_scale=0.25),
    "Granite": dict(SMALL, logits_scaling=4.0),
    "GPT2": GPT,
    "Phi": SMALL,  # a bias in its head
    "Qwen3_5Text": dict(SMALL, **LINEAR),
    "Lfm2": dict(SMALL, full_attn_idxs=[1], block_multiple_of=16),
}
# Layers whose state is not keys and values, and all others that pass the check at the start.
PASS = TRAINED | {
    "Qwen3Next": dict(SMALL, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16),
    "GraniteMoeHybrid": dict(SMALL, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0,
                             shared_intermediate_size=64, position_embedding_type="rope"),
    "FalconH1": dict(SMALL, **MAMBA, mamba_d_ssm=64),
    "Bamba": dict(SMALL, **MAMBA, attn_layer_indices=[1]),
    "Jamba": dict(SMALL, attn_layer_offset=1, attn_layer_period=2, num_experts=2, num_experts_per_tok=1,
                  use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4),
    "Mamba2": dict(hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1, expand=2),
    "NemotronH": dict(SMALL, layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=8,
                      ssm_state_size=8, n_groups=1, chunk_size=8),
    "Lfm2Moe": dict(SMALL, layer_types=["conv", "full_attention"], **EXPERTS, num_dense_layers=1),
    "Gemma3nText": dict(SMALL, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
                        num_kv_shared_layers=2, sliding_window=8, vocab_size_per_layer_input=19,
                        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4),
    "Qwen2Moe": dict(SMALL, **EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3Moe": dict(SMALL, **EXPERTS),
    "GptOss": dict(LOCAL, sliding_window=8),
    "Mixtral": LOCAL, "Phimoe": LOCAL, "GraniteMoe": LOCAL,
    "Olmoe": dict(SMALL, num_experts=4, num_experts_per_tok=2),
    "Glm4Moe": dict(SMALL, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
                    topk_group=1, first_k_dense_replace=1),
    "Ernie4_5_Moe": dict(SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1),
    "DeepseekV2": dict(MLA, topk_method="greedy"), "DeepseekV3": MLA,
    "GPTJ": dict(GPT, rotary_dim=4), "CodeGen": dict(GPT, rotary_dim=4), "GPTBigCode": GPT,
    "GPTNeo": dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                   window_size=8, max_position_embeddings=64),
    "GPTNeoX": SMALL, "Bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "Falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "Mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "OPT": dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4),
    "Gemma": SMALL, "Cohere2": SMALL, "Glm": SMALL, "Glm4": SMALL, "Olmo": SMALL, "Olmo2": SMALL, "Olmo3": SMALL,
    "Phi3": SMALL, "SmolLM3": SMALL, "StableLm": SMALL, "Starcoder2": SMALL, "Exaone4": SMALL, "Ernie4_5": SMALL,
    "SeedOss": SMALL, "Apertus": SMALL, "Nemotron": SMALL, "Helium": SMALL, "Persimmon": SMALL, "Ministral": SMALL,
    "HunYuanDenseV1": SMALL, "BitNet": SMALL,
}  # fmt: skip
RECURRENT = dict(hidden_size=32, num_hidden_layers=2)
REFUSED = {
    "Mamba": RECURRENT, "FalconMamba": RECURRENT, "Rwkv": dict(RECURRENT, attention_hidden_size=32),
    "RecurrentGemma": dict(SMALL, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]),
    "XLNet": dict(d_model=32, n_layer=2, n_head=4, d_inner=64), "MiniMax": LOCAL, "OpenAIGPT": GPT,
    "Bert": dict(SMALL, is_decoder=True),
}  # fmt: skip


def random_model(family):
    """A random model of the family, for the tiny task's tokenizer, without dropout."""
    tokenizer = tiny.new_tokenizer()
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(PASS | REFUSED)[family], **ids)
    turn_off_noise(config)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def checkpoint(family, folder):
    """The folder of such a model."""
    model = random_model(family)
    tokenizer = tiny.new_tokenizer()
    for p in model.parameters():  # far from a uniform distribution, so that a forgotten factor shows
        p.data = p.data * 3 if p.dim() == 2 else p.data + 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", PASS)
def test_a_family_passes_the_check_at_the_start(family):
    model = random_model(family)
    check_logprobs(model)
    r = rollout_of(model, tiny.new_tokenizer(), Q=3, G=3, questions=["1+2?", "12+3-4+5-6+7?", "9-8?"])  # a longer look
    torch.testing.assert_close(score(model, r)[0], r.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_trained_wrongly_is_refused(family):
    with pytest.raises(Exception, match=r"is not supported|cache|Expected size"):
        check_logprobs(random_model(family))


def test_the_page_names_the_families_that_were_tried():
    page = (ROOT / "docs" / "running.md").read_text()
    for verdict, families in (("pass", PASS), ("refused", REFUSED)):
        (row,) = re.findall(rf"^\| {verdict} \| (.*) \|$", page, re.MULTILINE)
        assert sorted(row.split(", ")) == sorted(families)
    assert len(PASS) >= 44


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("gradient_checkpointing, lora_rank", [(False, 0), pytest.param(True, 4, marks=needs_peft)])
def test_a_family_samples_scores_trains_and_loads_again(family, gradient_checkpointing, lora_rank, tmp_path):
    folder = checkpoint(family, tmp_path / "a")
    cfg = RunConfig(lr=1e-3, max_new_tokens=20, token_budget=100, temperature=0.8, lora_rank=lora_rank)
    cfg.gradient_checkpointing = gradient_checkpointing
    model, tokenizer = load_policy(cfg, folder, torch.device("cpu"))
    if lora_rank:
        for p in adapters(model).values():
            p.data = 0.2 * torch.randn_like(p)  # large enough that a layer without its adapter shows
    prompts = tokenizer(["1+2?", "12+3-4+5-6+7?", "9-8?"])["input_ids"]
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    options = (model, prompts, 4, 20, stop_ids(model, tokenizer), uniforms, 0.8)
    r = common.sample(*options)
    fixed = cuda_graphs.sample(*options)  # or the plain loop, where its attention does not allow fixed shapes
    assert torch.equal(fixed.mask, r.mask)
    torch.testing.assert_close(fixed.logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    logprobs, entropy = score(model, r, 0.8)
    torch.testing.assert_close(logprobs, r.logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, r.entropy, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        expected, _ = naive_score(model, r, 0.8)
    torch.testing.assert_close(r.logprobs, expected, atol=2e-4, rtol=1e-4)

    r.rewards = (torch.arange(12) % 2).float()
    trainer = Trainer(cfg, model, tokenizer, [], base_name=folder)
    before = [p.detach().clone() for p in model.parameters()]
    grpo_update(trainer, r, grpo.advantages(r.rewards, r.group), "token")
    metrics = trainer.metrics_of_update()
    assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    moved = [p for p, b in zip(model.parameters(), before, strict=True) if not torch.equal(p, b)]
    assert moved and all(p.requires_grad for p in moved)
    tokenizer.save_pretrained(tmp_path / "b")
    if lora_rank:
        save_merged(model, tmp_path / "b")
    else:
        model.save_pretrained(tmp_path / "b")
    again, _ = load_model(str(tmp_path / "b"), torch.device("cpu"))
    model.eval()
    rounding = 1e-3 if lora_rank else 0.0  # of the adapters that were merged
    torch.testing.assert_close(again(r.completion_ids).logits, model(r.completion_ids).logits, atol=rounding, rtol=0)


def test_a_soft_cap_in_bf16_is_not_refused_for_its_rounding(tmp_path):
    model, _ = load_model(checkpoint("Gemma2", tmp_path / "a"), torch.device("cpu"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_rope_that_depends_on_the_longest_row_is_used_up_to_where_it_begins():
    ids = dict(vocab_size=17, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    longrope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=16, short_factor=[1.0] * 4,
                    long_factor=[1.5, 4.0, 16.0, 64.0])  # fmt: skip
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
    phi = transformers.Phi3Config(**SMALL, **ids, original_max_position_embeddings=16, rope_parameters=longrope)
    qwen = transformers.Qwen3Config(**SMALL, **ids, rope_parameters=yarn)
    assert [max_positions(transformers.AutoModelForCausalLM.from_config(config)) for config in (phi, qwen)] == [16, 64]


def damaged(folder, change):
    """A checkpoint whose weights change(name, tensor) gives new names to, or leaves out (None)."""
    path = Path(checkpoint("Qwen3", folder)) / "model.safetensors"
    changed = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(pair for pair in changed if pair), path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("change, told", [
    (lambda name, w: (f"_orig_mod.{name}", w), "_orig_mod.lm_head.weight"),
    (lambda name, w: (f"module.{name}", w), "module.lm_head.weight"),
    (lambda name, w: None if ".layers.1." in name else (name, w), "model.layers.1.input_layernorm.weight"),
    (lambda name, w: None if name == "model.norm.weight" else (name, w), "1 weights are missing: model.norm.weight"),
    (lambda name, w: None if name == "lm_head.weight" else (name, w), "1 weights are missing: lm_head.weight"),
    (lambda name, w: (name, w.where(w != w.max(), torch.nan) if name == "lm_head.weight" else w), "not finite"),
])  # fmt: skip
def test_weights_that_are_missing_or_not_finite_are_refused_by_name(change, told, tmp_path, refusal):
    assert told in refusal(load_model, damaged(tmp_path / "a", change), torch.device("cpu"))


def test_files_that_cannot_be_used_are_refused(tmp_path, refusal):
    """Weights that are none, pickled weights, no tokenizer."""
    folder = Path(checkpoint("Qwen3", tmp_path / "a"))
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    whole = weights.read_bytes()
    weights.write_bytes(b"not weights")
    assert "--model" in refusal(load_model, str(folder), torch.device("cpu"))
    weights.unlink()
    assert "safetensors" in refusal(load_model, str(folder), torch.device("cpu"))
    weights.write_bytes(whole)
    for path in folder.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refusal(load_model, str(folder), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_more_behind_its_head_is_refused(dtype, loaded):
    model = loaded[0].to(dtype)
    check_logprobs(model)
    factor = 1.1 if dtype == torch.float32 else 2.0  # bf16 rounds, so the check allows more
    model.register_forward_hook(lambda _, args, output: output.__setitem__("logits", output.logits * factor) or output)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        check_logprobs(model)


def test_no_end_token_is_refused(loaded, refusal):
    model, tokenizer = loaded
    model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model, tokenizer) == sorted({5, 6, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert "end-of-sequence" in refusal(stop_ids, model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name, family", [("grpo", "Qwen3_5Text"), ("dapo", "Lfm2"), ("egsw", "Gemma4Text")])
def test_a_script_trains_models_that_are_not_laid_out_like_llama(name, family, tmp_path, toy_data, monkeypatch):
    (tmp_path / "reward.py").write_text("def reward(completion, row):\n    return len(completion) % 2\n")
    options = f"--steps 3 --n-prompts 4 --group-size 4 --max-new-tokens 8 --eval-rows 0 --out {tmp_path} --name r"
    model = checkpoint(family, tmp_path / "model")
    call(monkeypatch, name, "--model", model, "--dataset", str(toy_data), "--reward", f"{tmp_path}/reward.py:reward",
         *options.split())  # fmt: skip
    metrics = lines(tmp_path / "r" / "metrics.jsonl")
    assert len(metrics) == 3 and all(row["grad_norm"] > 0 for row in metrics)
    assert all(row["sampling_logp_difference"] < 1e-4 for row in metrics)
