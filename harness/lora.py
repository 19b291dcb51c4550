"""LoRA (Hu et al., arXiv 2106.09685), for --lora-rank: the weights W of the base stay as they are, and each linear
layer learns a difference of low rank, W + (alpha / rank) B A. The small matrices A and B are its adapter.

The package peft puts the adapters into the model that transformers has loaded, in place. So sampling and scoring run
the model as before. The head and the embeddings get no adapters, because common.token_logprobs reads the head's weight
directly. B starts at zero, so at first the model is the base.

A checkpoint holds the adapters alone, and a resumed run loads its base from --model again. The file of the adapters
says which base they belong to.
"""

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from harness.options import RunConfig, fail

ADAPTER_FILE = "adapter_model.safetensors"  # peft's name for the file of the adapters
LORA_ALPHA = 32
ADAPTER = "default"  # the name that peft gives the only adapter of a layer


def base_dtype(device: torch.device) -> torch.dtype:
    """The type of the base's weights. They do not move, so on a GPU they need no more than bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def prepare(model, cfg: RunConfig, source: str, checkpoint: Path | None = None) -> None:
    """Makes the base that `source` names a model with adapters: with those of the checkpoint, if there is one."""
    model.base_fingerprint = fingerprint(model)
    add_adapters(model, cfg, source)
    if checkpoint:
        load_adapters(model, source, checkpoint)


def add_adapters(model, cfg: RunConfig, source: str) -> None:
    """Adds new float32 adapters to all linear layers except the head, and freezes everything else."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    config = LoraConfig(
        r=cfg.lora_rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM",
        base_model_name_or_path=source,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # every process draws the same A
        inject_adapter_in_model(config, model)
    if any(isinstance(layer, LoraLayer) and not isinstance(layer, Linear) for layer in model.modules()):
        fail(f"--lora-rank: {type(model).__name__} keeps its experts in one tensor: LoRA is not supported for it")
    for name, p in adapters(model).items():  # peft gives them the type of the base
        model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(p.detach().float())


def adapters(model) -> dict[str, torch.nn.Parameter]:
    """The weights of the adapters, which are all that is trained, by their names in the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapters_off(model) -> AbstractContextManager:
    """Inside this block the model is its base: what the adapters add is multiplied by 0."""
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, 0.0)


@torch.no_grad()
def fingerprint(model) -> str:
    """A digest of the names, the shapes and some numbers of all weights: the same on every device, and in bf16."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.flatten()[:: max(1, p.numel() // 64)].bfloat16()
        digest.update(f"{name} {tuple(p.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


# --- on disk ----------------------------------------------------------------------------------------------------------


def name_in_file(name: str) -> str:
    """The name that peft gives a weight in the file of an adapter."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def save_adapters(model, folder: Path) -> None:
    """Writes the adapters as peft does, and the fingerprint of the base."""
    from safetensors.torch import save_file

    model.peft_config[ADAPTER].save_pretrained(folder)
    tensors = {name_in_file(name): p.detach().cpu().contiguous() for name, p in adapters(model).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt", "base": model.base_fingerprint})


@torch.no_grad()
def load_adapters(model, source: str, folder: Path) -> None:
    """Sets the adapters to those in the folder. Fails if they belong to another base."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        if file.metadata()["base"] != model.base_fingerprint:
            fail(f"--model {source}: it is not the base that the adapters in {folder} belong to")
        for name, p in adapters(model).items():
            p.copy_(file.get_tensor(name_in_file(name)))


@torch.no_grad()
def save_merged(model, folder: Path) -> None:
    """Writes a plain checkpoint: each adapter is added to its weight. In float32, because most differences are smaller
    than the distance between two bf16 numbers."""
    from peft.tuners.lora import Linear

    weights = model.state_dict()
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # a tied weight has one name here
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in names and ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = weight.float().cpu()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            A = weights[f"{name}.lora_A.{ADAPTER}.weight"].cpu()  # [rank, in]
            B = weights[f"{name}.lora_B.{ADAPTER}.weight"].cpu()  # [out, rank]
            difference = layer.scaling[ADAPTER] * (B @ A)  # [out, in]
            if layer.fan_in_fan_out:  # GPT-2 holds its weights transposed
                difference = difference.T
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + difference  # not in place: it may be the model's own
    model.save_pretrained(folder, state_dict=merged)
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)  # again, because save_pretrained has written the dtype of the base
