"""A tiny base model for any task that has demonstrations: a character tokenizer, an untrained model, its warm start.

tasks/arithmetic.py and tasks/countdown.py build their bases with it. `build` leaves a folder that AutoModelForCausalLM
and AutoTokenizer load like any other checkpoint.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import files

MARKER = "#### "  # GSM8K's answer marker; it is one token, so a guess is as short as possible
MODEL: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=192, max_position_embeddings=256,
    # A wide initialisation and untied embeddings: with 0.02 and tied embeddings the trained base is so sharp that every
    # RL learning rate either does nothing or destroys it.
    initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip


def new_tokenizer(characters: str = "0123456789+-=?\n", marker: str | None = MARKER):
    """A character tokenizer. The marker, if there is one, is one token; the chat template is the bare question."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "<eos>", "<unk>", *characters]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()  # join the characters without spaces
    if marker is not None:
        backend.add_tokens([AddedToken(marker, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=MODEL["max_position_embeddings"],
    )  # fmt: skip
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    return tokenizer


def new_model(tokenizer, seed: int, shape: dict | None = None):
    """An untrained Qwen3-layout model of about 150k parameters. shape: what is different from MODEL."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                **{**MODEL, **(shape or {})},
            )
        )


def supervise(model, next_loss: Callable[[], Tensor], steps: int, lr: float, warmup: int) -> None:
    """Supervised training of `model`, in place. next_loss() gives the loss of the next batch. The learning rate rises
    over `warmup` steps and then falls to zero: a base that stops at a high one has a huge gradient in one direction,
    the same in every batch, which drowns the RL signal."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    model.train()
    progress = tqdm(range(steps), desc="warm start of the base model", unit="step")
    for _ in progress:
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def warm_start(
    model, tokenizer, demonstrations: Callable[[random.Random, int], tuple[list[str], list[str]]],
    steps: int, batch_size: int, lr: float, warmup: int, seed: int,
) -> None:  # fmt: skip
    """Supervised training of `model`, in place, on demonstrations: demonstrations(rng, n) gives n questions and n
    completions. The loss is on the completion alone. For the rest see `supervise`."""
    rng = random.Random(seed)

    def next_loss() -> Tensor:
        questions, completions = demonstrations(rng, batch_size)
        prompts = tokenizer(questions)["input_ids"]
        answers = tokenizer([text + tokenizer.eos_token for text in completions])["input_ids"]
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        is_answer = torch.zeros(batch_size, width, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            is_answer[i, len(prompt) : len(prompt) + len(answer)] = True
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[is_answer[:, 1:]]
        return F.cross_entropy(logits, ids[:, 1:][is_answer[:, 1:]])

    supervise(model, next_loss, steps, lr, warmup)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, except the manifest."""
    files_of_folder = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files_of_folder}


def build(path: Path, manifest: dict, train: Callable[[], tuple]) -> Path:
    """Returns `path`, the folder of a base model. If it is missing or damaged, or if its manifest is another one, it is
    built first: train() gives model and tokenizer."""
    manifest = json.loads(json.dumps(manifest))
    if path.exists():
        try:
            if json.loads((path / "manifest.json").read_text()) == {**manifest, "files": digest(path)}:
                return path
        except (OSError, ValueError):
            pass
        print(f"{path} is damaged or was built by another recipe; it is built again")

    def write(folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        model, tokenizer = train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": digest(folder)}, indent=2))

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_folder(path, write)
    return path
