"""The arithmetic task of the default run, and the tiny base model for it.

The task is a chain of additions and subtractions, `14-1+8-5?`, in GSM8K's schema:

    {"question": "14-1+8-5?", "answer": "14-1=13\\n13+8=21\\n21-5=16\\n#### 16"}

The base model is warm-started on demonstrations that mix three habits: most work step by step, some take two or three
terms in one step, some state the answer at once. Every demonstration is correct, but a model this small is only
reliable at the single steps. So the base *can* solve the task and often *does not*: RL teaches it to write the steps
out.

`base(path)` returns a folder that AutoModelForCausalLM and AutoTokenizer load like any other checkpoint.
"""

import random
import re
import zlib
from pathlib import Path
from typing import Any

from harness import tiny
from harness.tiny import MARKER

MAX_TOTAL = 29  # running totals stay in 0..29
RECIPE: dict[str, Any] = dict(
    steps=1500, batch_size=32, lr=4e-3, warmup=30, guess=0.3, merge=0.2, min_terms=4, max_terms=6, seed=0
)


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
        tokenizer = tiny.new_tokenizer()
        model = tiny.new_model(tokenizer, recipe["seed"])
        tiny.warm_start(model, tokenizer, lambda rng, n: demonstrations(rng, n, **habits), **training)
        return model, tokenizer

    return tiny.build(path, {"recipe": recipe, "model": tiny.MODEL}, train)
