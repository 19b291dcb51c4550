"""The model in training and its optimizer, as the options ask for them: whole or with LoRA, sharded or not."""

from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from harness import data, distributed, lora
from harness.options import RunConfig


def load_policy(cfg: RunConfig, source: str, device: torch.device, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """The model of the run's checkpoint, or without one that of `source`, and its tokenizer. With --fsdp the model is
    sharded over the processes."""
    load_on = torch.device("cpu") if cfg.fsdp else device  # the whole model need not fit on one GPU
    name = source if cfg.lora_rank or not checkpoint else str(checkpoint)  # LoRA's checkpoints hold the adapters alone
    dtype = lora.base_dtype(device) if cfg.lora_rank else torch.float32
    model, tokenizer = data.load_model(name, load_on, cfg.trust_remote_code, cfg.gradient_checkpointing, dtype)
    if cfg.lora_rank:
        lora.prepare(model, cfg, source, checkpoint)
    if cfg.fsdp:
        distributed.shard(model, device)
    return model, tokenizer


def new_optimizer(cfg: RunConfig, model) -> Optimizer:
    """AdamW, or SGD without momentum, on the weights that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]  # with LoRA the adapters alone
    if cfg.optimizer == "sgd":
        return SGD(trained, lr=cfg.lr)
    return AdamW(trained, lr=cfg.lr, weight_decay=0.0, fused=True)
