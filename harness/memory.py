"""How much memory a run needs: an estimate, printed at the start, and a refusal of what cannot fit on the GPU."""

import math

import torch

import common
from harness import distributed
from harness.options import RunConfig, fail


def bytes_of_weights(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def estimate_memory(cfg: RunConfig, model, prompt_length: int, on_gpu: bool) -> dict[str, int]:
    """What the parts of a run need, roughly, in bytes on each device. "rollout" and "update" follow each other: they do
    not add up. Of the model, only the shapes count: it may be on the device "meta"."""
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    vocabulary = config.vocab_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    activation = 2 if on_gpu else 4  # bytes of a number in bf16 or float32
    processes = distributed.world_size()

    weights = bytes_of_weights(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # with LoRA the adapters alone
    gradients = 4 * trained  # float32
    optimizer = 8 * trained if cfg.optimizer == "adamw" else 0  # AdamW's two moments; SGD keeps nothing
    with_reference = getattr(cfg, "kl_coef", 0) > 0 and not cfg.lora_rank
    reference = weights if with_reference else 0  # a second model; with LoRA the same one without its adapters
    shards = processes if cfg.fsdp else 1
    autocast_copy = 2 * trained if on_gpu else 0  # of the float32 weights, in bf16

    completions = max(cfg.n_prompts * cfg.group_size, cfg.eval_rows * cfg.eval_k)
    rows = min(cfg.rollout_rows, math.ceil(completions / processes))  # sampled at a time
    greedy_rows = min(cfg.rollout_rows, math.ceil(cfg.eval_rows / processes))  # each has a prompt of its own
    prompts = max(rows // cfg.group_size, greedy_rows)  # read at a time
    # In bytes per token: the residual stream in float32, and three tensors inside the MLP.
    prefill = prompts * prompt_length * (12 * hidden + 3 * activation * intermediate)
    tokens = rows * (prompt_length + cfg.max_new_tokens)
    cache = tokens * layers * 2 * kv_heads * head_size * activation  # keys and values
    chunk = max(common.CHUNK_ELEMENTS["cuda" if on_gpu else "cpu"], vocabulary)  # logits at a time
    sampling = 2 * 4 * min(rows * vocabulary, chunk)  # two float32 chunks
    gathered_weights = weights if cfg.fsdp else 0

    # What a layer keeps for its backward pass, in bytes per token. Counted in Qwen2 and Llama: residual stream and
    # norms are float32, also under autocast, and four tensors of the MLP have the type of the activations.
    layer = 31 * hidden + 4 * activation * intermediate
    stream = 4 * hidden  # a layer's input: all that it keeps with checkpointing, until it is computed again
    kept = layers * stream + layer if cfg.gradient_checkpointing else layers * layer
    passing = layer // 2  # gradients on their way through a layer
    activations = max(cfg.token_budget, prompt_length + cfg.max_new_tokens) * (kept + passing)
    scoring = 2 * 4 * chunk  # two float32 chunks
    head_gradient = 0 if cfg.lora_rank else 4 * vocabulary * hidden  # float32; LoRA does not train the head
    return {
        "weights, gradients, optimizer": (weights + gradients + optimizer + reference) // shards + autocast_copy,
        "rollout": cache + max(prefill, sampling) + gathered_weights,
        "update": activations + scoring + head_gradient,
    }


def check_memory(cfg: RunConfig, model, prompt_length: int) -> None:
    """Prints one line with the estimate, and refuses what cannot fit on the GPU."""
    on_gpu = model.device.type == "cuda"
    estimate = estimate_memory(cfg, model, prompt_length, on_gpu)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = f"{n_parameters:,} parameters"
    if n_trained < n_parameters:
        counted += f", of which {n_trained:,} are trained,"
    listed = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in estimate.items())
    print(f"{counted} on {model.device.type}; memory estimated in GiB: {listed}")
    if on_gpu:
        already_loaded = bytes_of_weights(model) // (distributed.world_size() if cfg.fsdp else 1)
        free = min(distributed.all_gather(torch.cuda.mem_get_info()[0])) + already_loaded
        refuse_too_large(cfg, estimate, free)


def refuse_too_large(cfg: RunConfig, estimate: dict[str, int], free: int) -> None:
    """Ends the program if a run of this estimate needs more than `free` bytes, and says what needs less."""
    fixed, rollout, update = estimate.values()
    with_lora = "" if cfg.lora_rank else ", or --lora-rank 32"
    with_sgd = "" if cfg.lora_rank or cfg.optimizer == "sgd" else ", --optimizer sgd"
    checkpointing = "" if cfg.gradient_checkpointing else ", --gradient-checkpointing"
    needs = [
        (fixed, "a smaller --model" + with_sgd + with_lora),
        (fixed + rollout, "a smaller --rollout-rows" + with_lora),
        (fixed + update, "a smaller --token-budget" + checkpointing + with_lora),
    ]
    for needed, way_out in needs:
        if needed > free:
            fail(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose {way_out}")
