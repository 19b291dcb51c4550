"""The model in training: loaded, checked, with LoRA or without, and its optimizer. transformers does the loading."""

import hashlib
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import common
from harness import decoder
from harness.options import RunConfig, fail, first_line

ADAPTER_FILE = "adapter_model.safetensors"  # peft's name for the file of the adapters
LORA_ALPHA = 32
ADAPTER = "default"  # the name that peft gives the only adapter of a layer


def load_policy(cfg: RunConfig, source: str, device: torch.device, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """The model of the run's checkpoint, or without one that of `source`, and its tokenizer."""
    name = source if cfg.lora_rank or not checkpoint else str(checkpoint)  # LoRA's checkpoints hold the adapters alone
    dtype = base_dtype(device) if cfg.lora_rank else torch.float32
    model, tokenizer = load_model(name, device, cfg.trust_remote_code, cfg.gradient_checkpointing, dtype)
    if cfg.lora_rank:
        add_adapters(model, cfg, source, checkpoint)
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
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong with the weights is said below, in one line
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        turn_off_noise(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
        model, loading_info = loaded
        check_weights(model, loading_info)
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it has no tokenizer")
        decoder.use_onednn(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        check_logprobs(model)
    except torch.OutOfMemoryError:
        with_lora = ", or --lora-rank 32, which holds them in bf16" if dtype == torch.float32 else ""
        fail(f"--model {name}: its weights do not fit on the GPU: choose a smaller one{with_lora}")
    except Exception as error:  # of any class: OSError, SafetensorError, JSONDecodeError, ...
        if Path(name).exists():
            fail(f"--model {name} cannot be used: {first_line(error)}")
        fail(f"--model {name} is not a folder here, and the hub gave: {first_line(error)} "
             "Give a local folder instead if the hub is out of reach.")  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    return model, tokenizer


def turn_off_noise(config) -> None:
    """Sets dropout and jitter to 0: with them, the policy that is scored is not the policy that sampled."""
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)


def check_weights(model, loading_info: dict) -> None:
    """Raises ValueError if weights are missing, which transformers draws at random, or if one is not finite. Names the
    first of those that the model does not use. loading_info: what from_pretrained returns with output_loading_info."""
    missing = sorted(loading_info["missing_keys"])
    unused = sorted(loading_info["unexpected_keys"])
    if missing:
        has = f" (it has {shown(unused)} instead)" if unused else ""
        raise ValueError(f"{len(missing)} weights are missing: {shown(missing)}{has}")
    if unused:
        print(f"--model: {len(unused)} weights of the checkpoint are not used: {shown(unused)}")
    # The sum is finite only if every number is, and it needs no memory.
    bad = [name for name, p in model.named_parameters() if not p.detach().sum(dtype=torch.float32).isfinite()]
    if bad:
        raise ValueError(f"{len(bad)} weights hold numbers that are not finite (NaN or infinite): {shown(bad)}")


def shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@torch.no_grad()
def check_logprobs(model) -> None:
    """Raises ValueError unless a token has the same log-prob when it is sampled, when it is scored as in the update,
    and when its row alone runs through the whole model. So no family of models has to be known: padding on the left may
    enter the state of a layer, a row may depend on the longest one of its batch, something may follow the head. Two
    tokens and short prompts are enough to see all of these."""
    n_tokens = len(model.get_input_embeddings().weight)
    prompts = [[5 % n_tokens], [6 % n_tokens, 7 % n_tokens, 8 % n_tokens]]
    uniforms = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    rollout = common.sample(model, prompts, 3, 2, [-1], uniforms)
    model.train()  # as in the update, where some families add noise
    scored, _ = common.token_logprobs(
        model, rollout.prompt_ids, rollout.prompt_lengths, rollout.completion_ids, rollout.mask, group=rollout.group
    )
    model.eval()
    ids = torch.cat([rollout.prompt_ids[0, :1], rollout.completion_ids[0]])
    logprobs = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    alone = logprobs.gather(1, ids[1:, None]).squeeze(1)  # [2] of the first row

    is_exact = model.dtype == torch.float32 and model.device.type == "cpu"
    tolerance = 1e-3 if is_exact else 0.5  # nats; bf16 rounds logits to a hundredth of their size
    for how, gap in {"when it is sampled": rollout.logprobs - scored, "alone": alone - scored[0]}.items():
        worst = float(gap.abs().max())
        if not worst <= tolerance:  # also if it is NaN
            raise ValueError(f"{type(model).__name__} is not supported: the log-prob of a token is another one {how} "
                             f"than in a batch, by {worst:.2g} nats")  # fmt: skip


def max_positions(model) -> float:
    """The longest row that the model can run, in tokens. With RoPE that changes all positions when a row of the batch
    is long ("longrope" of Phi-3.5, "dynamic"), only up to where that begins."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # some families have a RoPE for each type of layer
        rope_type = parameters.get("rope_type", "") if isinstance(parameters, dict) else ""
        if rope_type == "longrope" or "dynamic" in rope_type:
            limit = min(limit, parameters.get("original_max_position_embeddings") or math.inf)
    return limit


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


# --- LoRA -------------------------------------------------------------------------------------------------------------
#
# LoRA (Hu et al., arXiv 2106.09685), for --lora-rank: the weights W of the base stay as they are, and each linear layer
# learns a difference of low rank, W + (alpha / rank) B A. The small matrices A and B are its adapter. B starts at zero,
# so at first the model is the base.
#
# The package peft puts the adapters into the model that transformers has loaded, in place. So sampling and scoring run
# the model as before. The head gets no adapter, because common.token_logprobs reads its weight directly. A checkpoint
# holds the adapters alone, and a resumed run loads its base from --model again.


def base_dtype(device: torch.device) -> torch.dtype:
    """The type of the base's weights. They do not move, so on a GPU they need no more than bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def add_adapters(model, cfg: RunConfig, source: str, checkpoint: Path | None = None) -> None:
    """Adds float32 adapters to all linear layers of the base, except the head, and freezes everything else. They are
    new, or those of the checkpoint. source: where the base is from."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    model.base_fingerprint = fingerprint(model)
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
    if checkpoint:
        load_adapters(model, source, checkpoint)


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

    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # a tied weight has one name here
    merged: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name in names and ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = weight.float().cpu()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            difference = layer.get_delta_weight(ADAPTER).cpu()  # (alpha / rank) B A, in the layout of the weight
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + difference  # not in place: it may be the model's own
    model.save_pretrained(folder, state_dict=merged)
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)  # again, because save_pretrained has written the dtype of the base
