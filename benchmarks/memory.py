"""Prints the tables of docs/scaling.md about the memory of one GPU. All numbers are computed from the shapes of the
models by harness/memory.py; none is measured, and no weights are loaded. Needs transformers and peft.

    python benchmarks/memory.py
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import lora, memory
from harness.options import RunConfig

# Qwen2.5's shapes.
SMALL = dict(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True)
MODELS = {
    "0.5B": dict(SMALL, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "1.5B": dict(SMALL, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "3B": dict(SMALL, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "7B": dict(vocab_size=152064, num_key_value_heads=4, tie_word_embeddings=False, hidden_size=3584,
               intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}  # fmt: skip
WAYS = {
    "AdamW": {},
    "SGD": dict(optimizer="sgd"),
    "LoRA": dict(lora_rank=32),
}
CARDS = (24, 48, 80)  # GiB
RESERVED = 1.5  # GiB of a card that CUDA itself and gaps between tensors take: an assumption
PROMPT_LENGTH = 256  # tokens
DEFAULTS = dict(max_new_tokens=512, token_budget=8192)  # of a real model on a GPU

# What makes a rollout and an update smaller, in the order in which it is tried: what costs least time comes first.
ROLLOUTS = [{}, *(dict(rollout_rows=n) for n in (512, 256, 128, 64, 32))]
UPDATES = [
    {},
    dict(token_budget=4096),
    dict(gradient_checkpointing=True),
    dict(gradient_checkpointing=True, token_budget=4096),
]


@functools.cache
def empty_model(name: str, lora_rank: int):
    """The model of this name as a run on a GPU would hold it, without memory for its weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**MODELS[name]))
        if lora_rank:
            model.to(torch.bfloat16)
            lora.add_adapters(model, RunConfig(lora_rank=lora_rank), source=name)
    return model


def estimate(name: str, **options) -> dict[str, float]:
    """harness.memory.estimate_memory of a run of this model with these options, in GiB."""
    cfg = RunConfig(**(DEFAULTS | options))
    needed = memory.estimate_memory(cfg, empty_model(name, cfg.lora_rank), PROMPT_LENGTH, on_gpu=True)
    return {part: size / 2**30 for part, size in needed.items()}


def options_that_fit(name: str, way: dict, card: float) -> dict | None:
    """The first options with which a run fits on a card of this many GiB; None if there are none."""

    def fits(part: str, options: dict) -> bool:
        needed = estimate(name, **way, **options)
        return needed["weights, gradients, optimizer"] + needed[part] <= card - RESERVED

    rollout = next((options for options in ROLLOUTS if fits("rollout", options)), None)
    update = next((options for options in UPDATES if fits("update", options)), None)
    return None if rollout is None or update is None else rollout | update


def spelled(options: dict | None) -> str:
    """Options as they are typed; "no" if nothing fits."""
    if options is None:
        return "no"
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words.append(f"`{flag}`" if value is True else f"`{flag} {value}`")
    return " ".join(words) or "yes"


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def parts_table() -> list[str]:
    """What the parts of a run need, for each model and way to train it."""
    lines = [
        row(["model", "", "weights, gradients, optimizer", "rollout", "update", "with `--gradient-checkpointing`"])
    ]
    lines.append("|---" * 6 + "|")
    for name in MODELS:
        for way, options in WAYS.items():
            needed = estimate(name, **options, rollout_rows=256)
            checkpointed = estimate(name, **options, gradient_checkpointing=True)["update"]
            sizes = [f"{size:.1f} GiB" for size in (*needed.values(), checkpointed)]
            lines.append(row([name, way, *sizes]))
    return lines


def cards_table() -> list[str]:
    """With which options each model fits on each card, for each way to train it."""
    lines = [row(["model", "", *(f"{card} GiB" for card in CARDS)]), "|---" * (2 + len(CARDS)) + "|"]
    for name in MODELS:
        for way, options in WAYS.items():
            cells = [spelled(options_that_fit(name, options, card)) for card in CARDS]
            lines.append(row([name, way, *cells]))
    return lines


if __name__ == "__main__":
    print("\n".join([*parts_table(), "", *cards_table()]))
