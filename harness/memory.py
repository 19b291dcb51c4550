"""How much memory a run needs: an estimate, printed at the start, and a refusal of what cannot fit on the GPU."""

import math

import torch

import common
from harness import distributed
from harness.options import RunConfig, fail


def estimate_memory(cfg: RunConfig, model, prompt_length: int) -> dict[str, int]:
    """What the parts of a run need, roughly, in bytes on each device. "rollout" and "update" follow each other: they do
    not add up."""
    config = model.config.get_text_config()
    on_gpu = model.device.type == "cuda"
    layers = config.num_hidden_layers
    hidden = config.hidden_size
    vocabulary = config.vocab_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    activation = 2 if on_gpu else 4  # bytes of a number in bf16 or float32
    processes = distributed.world_size()

    weights = 4 * sum(p.numel() for p in model.parameters())  # float32
    gradients = weights
    adamw = 2 * weights  # two moments of each weight
    reference = weights if getattr(cfg, "kl_coef", 0) > 0 else 0  # a second model
    shards = processes if cfg.fsdp else 1
    autocast_copy = weights // 2 if on_gpu else 0  # of the weights, in bf16

    completions = max(cfg.n_prompts * cfg.group_size, cfg.eval_rows * cfg.eval_k)
    rows = min(cfg.rollout_rows, math.ceil(completions / processes))  # sampled at a time
    tokens = rows * (prompt_length + cfg.max_new_tokens)
    cache = tokens * layers * 2 * kv_heads * head_size * activation  # keys and values
    sampling = 4 * rows * vocabulary * 4  # four float32 buffers of a row's logits
    gathered_weights = weights if cfg.fsdp else 0

    # An activation count of 34 per token, layer and hidden unit, in bytes at 16 bits: Korthikanti et al. (arXiv
    # 2205.05198) without the attention matrix. With checkpointing only a layer's input is kept.
    kept = 2 if cfg.gradient_checkpointing else 34
    activations = cfg.token_budget * layers * kept * hidden * activation // 2
    chunks = 2 * 4 * max(common.CHUNK_ELEMENTS[model.device.type], vocabulary)  # two float32 chunks of logits
    head_gradient = 4 * vocabulary * hidden  # float32
    return {
        "weights, gradients, AdamW": (weights + gradients + adamw + reference) // shards + autocast_copy,
        "rollout": cache + sampling + gathered_weights,
        "update": activations + chunks + head_gradient,
    }


def check_memory(cfg: RunConfig, model, prompt_length: int) -> None:
    """Prints one line with the estimate, and refuses what cannot fit on the GPU."""
    estimate = estimate_memory(cfg, model, prompt_length)
    n_parameters = sum(p.numel() for p in model.parameters())
    listed = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in estimate.items())
    print(f"{n_parameters:,} parameters on {model.device.type}; memory estimated in GiB: {listed}")
    if model.device.type != "cuda":
        return
    fixed, rollout, update = estimate.values()
    already_loaded = 4 * n_parameters // (distributed.world_size() if cfg.fsdp else 1)  # the weights
    free = min(distributed.all_gather(torch.cuda.mem_get_info()[0])) + already_loaded
    needs = [
        (fixed, "a smaller --model"),
        (fixed + rollout, "a smaller --rollout-rows"),
        (fixed + update, "a smaller --token-budget"),
    ]
    for needed, way_out in needs:
        if needed > free:
            fail(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose {way_out}")
