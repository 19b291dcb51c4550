"""Countdown: reach a target with given numbers. A small task in which a completion forks at every number and operator.

    python tasks/countdown.py           builds a base model and data in runs/countdown, prints how to train on them

A question names numbers and a target; a completion is a chain of running totals that uses each number once:

    3 12 7=29?      12*3=36
                    36-7=29

Most questions have several solutions, and the reward is 1 for any of them. It checks the chain itself: each
step's arithmetic, each number once, the target at the end, and nothing else in the text.

The base model is warm-started on demonstrations. All of them are correct arithmetic, but three in ten are random chains
that need not reach the target. So the base calculates well and chooses badly: it is uncertain at each fork, and RL can
teach it to choose.
"""

import argparse
import json
import os
import random
import re
import shlex
import sys
import zlib
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness import files, tiny

N_NUMBERS = 3
MAX_NUMBER = 30
MAX_TOTAL = 99  # of a running total in the demonstrations and questions; the reward does not ask for it
N_TRAIN = 20_480  # questions; different in their numbers or in their target
N_TEST = 512
MAX_NEW_TOKENS = 24
RECIPE: dict[str, Any] = dict(steps=1500, batch_size=48, lr=4e-3, warmup=30, solved=0.7, seed=0)


# --- the reward -------------------------------------------------------------------------------------------------------

NUMBER = "0|[1-9][0-9]{0,8}"
STEP = re.compile(f"(?P<left>{NUMBER})(?P<operator>[-+*])(?P<right>{NUMBER})=(?P<result>{NUMBER})")  # such as 12*3=36


def apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right


def reward(completion: str, row: dict) -> float:
    """1.0 if the completion is a correct chain from row["numbers"] to row["target"], else 0.0."""
    unused = list(row["numbers"])
    total = None  # of the chain so far
    for text in completion.split("\n"):
        step = STEP.fullmatch(text)
        if step is None:
            return 0.0
        left, right, result = int(step["left"]), int(step["right"]), int(step["result"])
        if total is None:  # the first step takes both of its numbers from the question
            if left not in unused:
                return 0.0
            unused.remove(left)
        elif left != total:
            return 0.0
        if right not in unused:
            return 0.0
        unused.remove(right)
        if apply(left, step["operator"], right) != result:
            return 0.0
        total = result
    return float(not unused and total == row["target"])


# --- the questions ----------------------------------------------------------------------------------------------------


def chains(numbers: list[int]) -> Iterator[tuple[str, int]]:
    """Every chain that uses each number once, with its last total. Running totals stay in 0..MAX_TOTAL."""
    for order in sorted(set(permutations(numbers))):
        for operators in product("+-*", repeat=len(numbers) - 1):
            total = order[0]
            steps = []
            for operator, number in zip(operators, order[1:], strict=True):
                result = apply(total, operator, number)
                steps.append(f"{total}{operator}{number}={result}")
                total = result
                if not 0 <= total <= MAX_TOTAL:
                    break
            else:
                yield "\n".join(steps), total


def random_chain(rng: random.Random, numbers: list[int]) -> tuple[str, int]:
    """One of the chains of these numbers, and its last total. Adding them up is always possible."""
    while True:
        order = rng.sample(numbers, len(numbers))
        total = order[0]
        steps = []
        for number in order[1:]:
            operator = rng.choice("+-*")
            result = apply(total, operator, number)
            steps.append(f"{total}{operator}{number}={result}")
            total = result
            if not 0 <= total <= MAX_TOTAL:
                break
        else:
            return "\n".join(steps), total


def is_held_out(numbers: list[int]) -> bool:
    """The side of the split. It depends on the sorted numbers alone (on their CRC). So held-out questions share no set
    of numbers with those that training and the warm start use."""
    return zlib.crc32(str(sorted(numbers)).encode()) % 8 == 0


def question(numbers: list[int], target: int) -> str:
    return " ".join(map(str, numbers)) + f"={target}?"


def parse(text: str) -> tuple[list[int], int]:
    """Numbers and target of a question."""
    numbers, _, target = text.rstrip("?").partition("=")
    return [int(number) for number in numbers.split()], int(target)


def choice_positions(completion: str) -> list[int]:
    """The places of the characters at which a completion chooses: the operators, and the numbers that come from the
    question. The other characters follow from these. Steps that cannot be read have none."""
    positions: list[int] = []
    start = 0
    for i, text in enumerate(completion.split("\n")):
        step = STEP.fullmatch(text)
        if step is not None:
            first = step.start("left") if i == 0 else step.start("operator")
            positions += range(start + first, start + step.end("right"))
        start += len(text) + 1
    return positions


def questions(n: int, seed: int, held_out: bool) -> list[dict]:
    """n rows {"question", "numbers", "target"} of one side of the split, the same ones for the same seed. No two have
    the same target and, in any order, the same numbers. ValueError if there are fewer than n."""
    possible = []
    for numbers in combinations_with_replacement(range(1, MAX_NUMBER + 1), N_NUMBERS):
        if is_held_out(list(numbers)) == held_out:
            targets = {target for _, target in chains(list(numbers))}
            possible += [(numbers, target) for target in sorted(targets)]
    if n > len(possible):
        raise ValueError(f"there are {len(possible)} questions, not {n}")
    rng = random.Random(seed)
    rows = []
    for numbers, target in rng.sample(possible, n):
        shown = rng.sample(numbers, N_NUMBERS)  # in any order
        rows.append({"question": question(shown, target), "numbers": shown, "target": target})
    return rows


# --- the base model ---------------------------------------------------------------------------------------------------


def draw_numbers(rng: random.Random) -> list[int]:
    """Numbers of the training side."""
    while True:
        numbers = [rng.randint(1, MAX_NUMBER) for _ in range(N_NUMBERS)]
        if not is_held_out(numbers):
            return numbers


def demonstrations(rng: random.Random, n: int, solved: float) -> tuple[list[str], list[str]]:
    """n questions of the training side and a chain for each. With probability `solved` it is the chain that the target
    comes from, otherwise another random one."""
    asked = []
    completions = []
    for _ in range(n):
        numbers = draw_numbers(rng)
        chain, target = random_chain(rng, numbers)
        if rng.random() >= solved:
            chain, _ = random_chain(rng, numbers)
        asked.append(question(numbers, target))
        completions.append(chain)
    return asked, completions


def base(path: Path, recipe: dict | None = None, shape: dict | None = None) -> Path:
    """Returns `path`, the folder of the base model; builds it first if that is needed. recipe: what is different from
    RECIPE; shape: what is different from tiny.MODEL."""
    recipe = {**RECIPE, **(recipe or {})}
    training = {name: value for name, value in recipe.items() if name != "solved"}

    def train():
        tokenizer = tiny.new_tokenizer("0123456789+-*=? \n", marker=None)
        model = tiny.new_model(tokenizer, recipe["seed"], shape)
        tiny.warm_start(model, tokenizer, lambda rng, k: demonstrations(rng, k, recipe["solved"]), **training)
        return model, tokenizer

    task = {"n_numbers": N_NUMBERS, "max_number": MAX_NUMBER, "max_total": MAX_TOTAL}
    return tiny.build(path, {"recipe": recipe, "model": {**tiny.MODEL, **(shape or {})}, "task": task}, train)


def prepare(out: Path, recipe: dict | None = None, shape: dict | None = None) -> list[str]:
    """Makes base and data in the folder `out`, if they are missing. Returns the options of a script that name them.
    recipe and shape: see `base`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, n, held_out in (("train", N_TRAIN, False), ("test", N_TEST, True)):
        rows = questions(n, 0, held_out)
        files.write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model", str(base(out / "base", recipe, shape)),
        "--dataset", str(out / "train.jsonl"),
        "--eval-dataset", str(out / "test.jsonl"),
        "--reward", f"{os.path.relpath(__file__)}:reward",
        "--max-new-tokens", str(MAX_NEW_TOKENS),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/countdown"), help="folder of base and data")
    options = prepare(parser.parse_args().out)
    print("train on it with\n\n    python egsw.py", shlex.join(options), "--lr 6e-4 --steps 120")


if __name__ == "__main__":
    main()
