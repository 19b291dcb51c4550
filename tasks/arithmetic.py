"""The tiny base model and its arithmetic task, which the default run uses.

The task is a chain of additions and subtractions, `14-1+8-5?`, in GSM8K's schema:

    {"question": "14-1+8-5?", "answer": "14-1=13\\n13+8=21\\n21-5=16\\n#### 16"}

The base model is warm-started on demonstrations that mix three habits: most work step by step, some take two or three
terms in one step, some state the answer at once. Every demonstration is correct, but a model this small is only
reliable at the single steps. So the base *can* solve the task and often *does not*: RL teaches it to write the steps
out.

`base(path)` returns a folder that AutoModelForCausalLM and AutoTokenizer load like any other checkpoint. The lower half
of this file builds such a base for any task that has demonstrations (tasks/countdown.py uses it too).
"""

import hashlib
import json
import math
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from harness import files

MARKER = "#### "  # GSM8K's answer marker; it is one token, so a guess is as short as possible
MAX_TOTAL = 29  # running totals stay in 0..29
MODEL: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=192, max_position_embeddings=256,
    # A wide initialisation and untied embeddings: with 0.02 and tied embeddings the trained base is so sharp that every
    # RL learning rate either does nothing or destroys it.
    initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip
RECIPE: dict[str, Any] = dict(
    steps=1500, batch_size=32, lr=4e-3, warmup=30, guess=0.3, merge=0.2, min_terms=4, max_terms=6, seed=0
)


# --- the task ---------------------------------------------------------------------------------------------------------


def draw_question(rng: random.Random, min_terms: int, max_terms: int, held_out: bool | None) -> str:
    """One chain such as `14-1+8-5?`. `held_out` chooses the side of the split; None draws from both.

    The side depends on the text alone (on its CRC). So for every seed, the held-out problems are different from
    everything that training or the warm start can draw.
    """
    while True:
        total = rng.randint(1, 19)
        text = str(total)
        for _ in range(rng.randint(min_terms, max_terms) - 1):
            term = rng.randint(1, 9)
            possible = [step for step in (term, -term) if 0 <= total + step <= MAX_TOTAL]
            step = rng.choice(possible)
            total += step
            text += f"{step:+d}"
        if held_out is None or held_out == (zlib.crc32(text.encode()) % 8 == 0):
            return text + "?"


def solve(rng: random.Random, question: str, guess: float = 0.0, merge: float = 0.0) -> str:
    """A correct solution. With probability `guess` it states the answer at once. Otherwise every step takes one term,
    or with probability `merge` two or three. With both at 0 (the default) it is the fully worked solution."""
    first, *terms = re.findall(r"[+-]?\d+", question)
    total = int(first)
    if rng.random() < guess:
        return f"{MARKER}{total + sum(int(term) for term in terms)}"
    lines = []
    while terms:
        n_terms = rng.choice((2, 3)) if rng.random() < merge else 1
        step = terms[:n_terms]
        terms = terms[n_terms:]
        before = total
        total += sum(int(term) for term in step)
        lines.append(f"{before}{''.join(step)}={total}")
    return "\n".join([*lines, f"{MARKER}{total}"])


def problems(n: int, seed: int, held_out: bool, min_terms: int = 4, max_terms: int = 6) -> list[dict]:
    """`n` different problems {"question", "answer"} of one side of the split, the same ones for the same seed.

    ValueError if there seem to be fewer: there are some hundred chains of two terms, and thousands of three."""
    rng = random.Random(f"{held_out}-{seed}")
    found: dict[str, dict] = {}
    repeats = 0  # draws since the last new question
    while len(found) < n:
        text = draw_question(rng, min_terms, max_terms, held_out)
        repeats = repeats + 1 if text in found else 0
        found[text] = {"question": text, "answer": solve(rng, text)}
        if repeats > 10_000:
            raise ValueError(f"found {len(found)} of {n} chains of {min_terms} to {max_terms} terms")
    return list(found.values())


def demonstrations(
    rng: random.Random, n: int, guess: float, merge: float, min_terms: int, max_terms: int
) -> tuple[list[str], list[str]]:
    """n questions of the training side, and a solution of each in one of the three habits."""
    questions = [draw_question(rng, min_terms, max_terms, held_out=False) for _ in range(n)]
    return questions, [solve(rng, question, guess, merge) for question in questions]


def base(path: Path, recipe: dict | None = None) -> Path:
    """Returns `path`, the folder of the tiny base model. Builds it first if it is missing or damaged, or if another
    recipe built it. recipe: what is different from RECIPE."""
    recipe = {**RECIPE, **(recipe or {})}
    habits = {name: recipe[name] for name in ("guess", "merge", "min_terms", "max_terms")}
    training = {name: value for name, value in recipe.items() if name not in habits}

    def train():
        tokenizer = new_tokenizer()
        model = new_model(tokenizer, recipe["seed"])
        warm_start(model, tokenizer, lambda rng, n: demonstrations(rng, n, **habits), **training)
        return model, tokenizer

    return build(path, {"recipe": recipe, "model": MODEL}, train)


# --- a base model for any task ----------------------------------------------------------------------------------------


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


def warm_start(
    model, tokenizer, demonstrations: Callable[[random.Random, int], tuple[list[str], list[str]]],
    steps: int, batch_size: int, lr: float, warmup: int, seed: int,
) -> None:  # fmt: skip
    """Supervised training of `model`, in place, on demonstrations; the loss is on the completion alone.

    demonstrations(rng, n) gives n questions and n completions. warmup: steps over which the learning rate rises.
    """
    from tqdm import tqdm

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # The learning rate ends at zero: a base that stops at a high one has a huge gradient in one direction, the same in
    # every batch, which drowns the RL signal.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    model.train()
    for _ in tqdm(range(steps), desc="warm start of the base model", unit="step"):
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
        loss = F.cross_entropy(logits, ids[:, 1:][is_answer[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


# --- on disk ----------------------------------------------------------------------------------------------------------


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
