"""The model in training: loaded, checked, with LoRA or without, and its optimizer. transformers does the loading."""

from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from harness import decoder, lora
from harness.options import RunConfig, fail, first_line


def load_policy(cfg: RunConfig, source: str, device: torch.device, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """The model of the run's checkpoint, or without one that of `source`, and its tokenizer."""
    name = source if cfg.lora_rank or not checkpoint else str(checkpoint)  # LoRA's checkpoints hold the adapters alone
    dtype = lora.base_dtype(device) if cfg.lora_rank else torch.float32
    model, tokenizer = load_model(name, device, cfg.trust_remote_code, cfg.gradient_checkpointing, dtype)
    if cfg.lora_rank:
        lora.prepare(model, cfg, source, checkpoint)
    return model, tokenizer


def load_model(
    name: str,
    device: torch.device,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
):
    """A causal LM with weights of this dtype, and its tokenizer, from the hub or a folder. Weights are read from
    safetensors only, and code that comes with a checkpoint runs only with `trust_remote_code`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # with dropout, the policy that is scored is not the policy that sampled
        options: dict[str, Any] = dict(dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_head(model)
    except torch.OutOfMemoryError:
        with_lora = ", or --lora-rank 32, which holds them in bf16" if dtype == torch.float32 else ""
        fail(f"--model {name}: its weights do not fit on the GPU: choose a smaller one{with_lora}")
    except Exception as error:  # of any class: OSError, SafetensorError, JSONDecodeError, ...
        if Path(name).exists():
            fail(f"--model {name} cannot be used: {first_line(error)}")
        fail(f"--model {name} is not a folder here, and the hub gave: {first_line(error)} "
             "Give a local folder instead if the hub is out of reach.")  # fmt: skip
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


@torch.no_grad()
def check_head(model) -> None:
    """Raises ValueError unless decoder.head_logits(hidden states) equals the model's own logits. common.py runs decoder
    and head separately, and a model family may do something in between that is not known there. A model in bf16 rounds
    its logits, so they may differ by more."""
    model.eval()
    ids = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    tolerance = 1e-3 if expected.dtype == torch.float32 else 2e-2
    logits = decoder.head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if logits.shape != expected.shape or not torch.allclose(logits, expected.float(), tolerance, tolerance):
        raise ValueError(f"the logits of {type(model).__name__} are not head(hidden states): it is not supported")


def stop_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and those in the model's generation_config."""
    from_config = model.generation_config.eos_token_id
    from_config = from_config if isinstance(from_config, list) else [from_config]
    ids = {tokenizer.eos_token_id, *from_config} - {None}
    if not ids:
        fail("--model: neither its tokenizer nor its generation_config names an end-of-sequence token")
    return sorted(ids)


def new_optimizer(cfg: RunConfig, model) -> Optimizer:
    """AdamW, or SGD without momentum, on the weights that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]  # with LoRA the adapters alone
    if cfg.optimizer == "sgd":
        return SGD(trained, lr=cfg.lr)
    return AdamW(trained, lr=cfg.lr, weight_decay=0.0, fused=True)


def describe_size(model, optimizer: Optimizer) -> str:
    """One line about what the model needs in memory at least: exact counts, without activations and caches."""
    n_parameters = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]  # with LoRA the adapters alone
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    state = 2 * gradients if isinstance(optimizer, AdamW) else 0  # AdamW's two moments; SGD keeps nothing
    sizes = {"weights": weights, "gradients": gradients, "optimizer": state}
    listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())
    counted = f"{n_parameters:,} parameters"
    if len(trained) < len(list(model.parameters())):
        counted += f", of which {sum(p.numel() for p in trained):,} are trained,"
    return f"{counted} on {model.device.type}; MiB: {listed}"
