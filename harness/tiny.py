"""The tiny base model and its arithmetic task, which the default run uses.

The task is a chain of additions and subtractions, `14-1+8-5?`, in GSM8K's schema:

    {"question": "14-1+8-5?", "answer": "14-1=13\\n13+8=21\\n21-5=16\\n#### 16"}

The base model is warm-started on demonstrations that mix habits: most work step by step, some take two or three terms
in one step, some state the answer at once. Every demonstration is correct, but a model this small can only do the
single steps reliably. So the base *can* solve the task and often *does not*: what RL teaches is to write the steps out.

`base(path)` returns a folder that AutoModelForCausalLM and AutoTokenizer load like any other checkpoint.
"""

import hashlib
import json
import math
import random
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

import files

MARKER = "#### "  # GSM8K's answer marker; one token, so that a guess is as short as it can be
MAX_TOTAL = 29  # running totals stay in 0..29
MODEL = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=192, max_position_embeddings=256,
    # A wide initialisation and untied embeddings: with 0.02 and tied ones the trained base is so sharp that
    # every RL learning rate either does nothing or destroys it.
    initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip
RECIPE = dict(steps=1500, batch_size=32, lr=4e-3, warmup=30, guess=0.3, merge=0.2, min_terms=4, max_terms=6, seed=0)


# --- the task ---------------------------------------------------------------------------------------------------------


def question(rng: random.Random, min_terms: int, max_terms: int, held_out: bool | None) -> str:
    """One chain such as `14-1+8-5?`. `held_out` selects the side of the split; None draws from both.

    The split is a property of the text alone (its CRC), so that the held-out problems are disjoint from everything that
    training or the warm start can draw, for every seed.
    """
    while True:
        total = rng.randint(1, 19)
        text = str(total)
        for _ in range(rng.randint(min_terms, max_terms) - 1):
            term = rng.randint(1, 9)
            sign = rng.choice([s for s in (1, -1) if 0 <= total + s * term <= MAX_TOTAL])
            total += sign * term
            text += f"{'+' if sign > 0 else '-'}{term}"
        if held_out is None or held_out == (zlib.crc32(text.encode()) % 8 == 0):
            return text + "?"


def solve(rng: random.Random, question: str, guess: float = 0.0, merge: float = 0.0) -> str:
    """A correct solution. With probability `guess` it states the answer at once; otherwise every step takes one term,
    or with probability `merge` two or three. Both 0 (the default) gives the fully worked solution."""
    first, *terms = re.findall(r"[+-]?\d+", question)
    total, lines = int(first), []
    if rng.random() < guess:
        return f"{MARKER}{total + sum(map(int, terms))}"
    while terms:
        n = min(len(terms), rng.choice((2, 3)) if rng.random() < merge else 1)
        step, terms = terms[:n], terms[n:]
        after = total + sum(map(int, step))
        lines.append(f"{total}{''.join(step)}={after}")
        total = after
    return "\n".join([*lines, f"{MARKER}{total}"])


def problems(n: int, seed: int, held_out: bool, min_terms: int = 4, max_terms: int = 6) -> list[dict]:
    """`n` distinct rows {"question", "answer"} of one side of the split, the same for the same seed.

    ValueError if there seem to be fewer: there are some hundred chains of two terms, and thousands of three."""
    rng, rows, in_vain = random.Random(f"{held_out}-{seed}"), {}, 0
    while len(rows) < n:
        q, known = question(rng, min_terms, max_terms, held_out), len(rows)
        rows[q] = {"question": q, "answer": solve(rng, q)}
        in_vain = in_vain + 1 if len(rows) == known else 0
        if in_vain > 10_000:
            raise ValueError(f"found {known} of {n} chains of {min_terms} to {max_terms} terms")
    return list(rows.values())


# --- the base model ---------------------------------------------------------------------------------------------------


def new_tokenizer():
    """A character tokenizer, with the answer marker as one token and a chat template that is the bare question."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "<eos>", "<unk>", *"0123456789+-=?\n"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()  # join the characters without spaces
    backend.add_tokens([AddedToken(MARKER, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=MODEL["max_position_embeddings"],
    )  # fmt: skip
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    return tokenizer


def new_model(tokenizer, seed: int):
    """An untrained Qwen3-layout model of about 150k parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                **MODEL,
            )
        )


def warm_start(model, tokenizer, steps, batch_size, lr, warmup, guess, merge, min_terms, max_terms, seed) -> None:
    """Supervised training of `model`, in place, on generated demonstrations; the loss is on the completion alone."""
    from tqdm import tqdm

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # Annealed to zero: a base that stops at a high learning rate carries one huge gradient direction, common to every
    # batch, that swamps the RL signal.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    model.train()
    for _ in tqdm(range(steps), desc="warm start of the tiny base", unit="step"):
        questions = [question(rng, min_terms, max_terms, held_out=False) for _ in range(batch_size)]
        prompts = tokenizer(questions)["input_ids"]
        answers = tokenizer([solve(rng, q, guess, merge) + tokenizer.eos_token for q in questions])["input_ids"]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        learn = torch.zeros(batch_size, width, dtype=torch.bool)  # the places of the completion
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            learn[i, len(p) : len(p) + len(a)] = True
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[learn[:, 1:]]
        loss = F.cross_entropy(logits, ids[:, 1:][learn[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


# --- on disk ----------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the manifest."""
    found = sorted(p for p in folder.iterdir() if p.name != "manifest.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def base(path: Path, recipe: dict | None = None) -> Path:
    """The folder of the tiny base model: `path` itself, built if it is missing, damaged, or of another recipe."""
    recipe = {**RECIPE, **(recipe or {})}
    manifest = {"recipe": recipe, "model": MODEL}
    if path.exists():
        try:
            if json.loads((path / "manifest.json").read_text()) == {**manifest, "files": digest(path)}:
                return path
        except (OSError, ValueError):
            pass
        print(f"{path} is damaged or was built by another recipe; it is built anew")

    def write(folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = new_tokenizer()
        model = new_model(tokenizer, recipe["seed"])
        warm_start(model, tokenizer, **recipe)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": digest(folder)}, indent=2))

    files.write_folder(path, write)
    return path
