"""The problems to train and to evaluate on, and their prompts.

A problem is {"question", "answer", "row"}. Its answer is what verifier.gold_answer reads: GSM8K's text with `####`, a
MATH solution with \\boxed{}, or the bare answer. Its row is the whole row of the data set, which a --reward function
gets. `datasets` does the loading; it is imported where it is used.
"""

import math
import random
from pathlib import Path

import verifier
from harness import tiny
from harness.options import RunConfig, fail, first_line

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "reward_model", "solution")  # DAPO-Math-17k keeps its gold inside `reward_model`


def load_problems(cfg: RunConfig) -> tuple[list[dict], list[dict]]:
    """Problems to train on, and at most eval_rows problems to evaluate on, without a question in common."""
    train = training_problems(cfg)
    if cfg.eval_rows == 0:
        return train, []
    eval_problems = evaluation_problems(cfg)
    if not eval_problems:
        eval_problems = train[: cfg.eval_rows]
        train = train[cfg.eval_rows :]
        print(f"--dataset {cfg.dataset}: no split to evaluate on, so {len(eval_problems)} of its rows are held out")
    eval_problems = eval_problems[: cfg.eval_rows]
    return without_overlap(cfg, train, eval_problems), eval_problems


def training_problems(cfg: RunConfig) -> list[dict]:
    if cfg.dataset == "arithmetic":
        return [{**problem, "row": problem} for problem in tiny.problems(8192, cfg.seed, held_out=False)]
    flag = f"--dataset {cfg.dataset}"
    split, _ = split_names(cfg)
    rows = open_dataset(flag, cfg.dataset, split)
    if rows is None:
        fail(f"{flag}: no split {split!r}; name its splits with --splits")
    problems = read_columns(flag, rows, cfg.question_column, cfg.answer_column, with_answer=not cfg.reward)
    return shuffled(usable(flag, problems, with_answer=not cfg.reward))


def split_names(cfg: RunConfig) -> tuple[str, str]:
    """The splits to train and to evaluate on, from --splits TRAIN,EVAL."""
    train, comma, evaluation = (part.strip() for part in cfg.splits.partition(","))
    if not (train and comma and evaluation):
        fail(f"--splits {cfg.splits}: name two splits, to train and to evaluate on, such as train,test")
    return train, evaluation


def evaluation_problems(cfg: RunConfig) -> list[dict] | None:
    """The problems of --eval-dataset, or else of the second split of --dataset; None if there is no such split."""
    name = cfg.eval_dataset or cfg.dataset
    if name == "arithmetic":
        return [{**problem, "row": problem} for problem in tiny.problems(cfg.eval_rows, 0, held_out=True)]
    if not cfg.eval_dataset and Path(cfg.dataset).is_file():
        return None  # a file has no splits
    flag = f"--eval-dataset {name}" if cfg.eval_dataset else f"--dataset {name}"
    _, split = split_names(cfg)
    rows = open_dataset(flag, name, split)
    split_was_asked_for = cfg.eval_dataset is not None or split != "test"
    if rows is None and split_was_asked_for:
        fail(f"{flag}: no split {split!r}; name its splits with --splits")
    if not rows and not split_was_asked_for:
        return None
    question_column = cfg.question_column
    answer_column = cfg.answer_column
    if cfg.eval_dataset:  # the named columns are those of --dataset; this one may have others
        question_column = question_column if question_column in rows.column_names else None
        answer_column = answer_column if answer_column in rows.column_names else None
    problems = read_columns(flag, rows, question_column, answer_column, with_answer=not cfg.reward)
    return shuffled(usable(flag, problems, with_answer=not cfg.reward))


def without_overlap(cfg: RunConfig, train: list[dict], eval_problems: list[dict]) -> list[dict]:
    """The training problems whose question is not evaluated on. White space does not make a question different."""
    evaluated = {" ".join(problem["question"].split()) for problem in eval_problems}
    kept = [problem for problem in train if " ".join(problem["question"].split()) not in evaluated]
    if len(kept) < len(train):
        print(f"--dataset: {len(train) - len(kept)} rows dropped, because their questions are also evaluated on")
    if not kept:
        fail(f"--dataset {cfg.dataset}: no rows are left to train on beside --eval-rows {cfg.eval_rows}; give fewer")
    return kept


def shuffled(problems: list[dict]) -> list[dict]:
    random.Random(0).shuffle(problems)
    return problems


def open_dataset(flag: str, name: str, split: str):
    """One split of a hub data set (NAME or NAME:CONFIGURATION), of a JSON, JSON Lines or Parquet file, or of a saved
    folder; None if it has no such split."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below, in one line
    path = Path(name)
    formats = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_file():
            if path.suffix not in formats:
                fail(f"{flag}: a file must end in {', '.join(formats)}")
            if is_blank(path):
                fail(f"{flag}: the file is empty")
            return datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train")
        if path.suffix in formats and not path.exists():
            fail(f"{flag}: there is no file {name}")
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(name)
            return saved.get(split) if isinstance(saved, datasets.DatasetDict) else saved
        config = None
        if not path.exists():
            name, _, config = name.partition(":")
        if not config:
            names = datasets.get_dataset_config_names(name)
            config = next((usual for usual in ("main", "default") if usual in names), names[0])
        if split not in datasets.get_dataset_split_names(name, config):
            return None
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of any class: DatasetNotFoundError, ConnectionError, ArrowInvalid, ...
        hint = "" if path.exists() else " Give a local file or folder instead if the hub is out of reach."
        fail(f"{flag} cannot be loaded: {first_line(error)}{hint}")


def is_blank(path: Path) -> bool:
    """Whether a file holds nothing but white space."""
    with open(path, "rb") as file:
        return all(not line.strip() for line in file)


def read_columns(
    flag: str, rows, question_column: str | None, answer_column: str | None, with_answer: bool
) -> list[dict]:
    """The problems in the rows of a data set. Without given columns, those with the usual names. A row without question
    is refused, and `with_answer` one without answer. A --reward function may need none: then the answer can be "".
    """
    if len(rows) == 0:
        fail(f"{flag}: it is empty")
    columns = rows.column_names
    question_column = question_column or next((name for name in QUESTION_COLUMNS if name in columns), None)
    answer_column = answer_column or next((name for name in ANSWER_COLUMNS if name in columns), None)
    if question_column not in columns:
        fail(f"{flag}: name one of its columns ({', '.join(columns)}) with --question-column")
    if answer_column not in columns and (with_answer or answer_column):
        fail(f"{flag}: name one of its columns ({', '.join(columns)}) with --answer-column")
    try:
        rows = list(rows)
    except Exception as error:  # of any class, for example a UnicodeDecodeError
        fail(f"{flag}: a row cannot be read: {first_line(error)}; save the file as UTF-8")
    problems = []
    for number, row in enumerate(rows, 1):
        question = row[question_column]
        if isinstance(question, list):  # a chat: its last user turn
            turns = [turn for turn in question if isinstance(turn, dict) and turn.get("role") == "user"]
            question = turns[-1].get("content") if turns else None
        answer = row[answer_column] if answer_column else None
        if isinstance(answer, dict):
            answer = answer.get("ground_truth")
        if answer is None and with_answer:
            fail(f"{flag}, line {number}: no answer in its column")
        if with_answer and isinstance(answer, list | bool):
            fail(f"{flag}, line {number}: the answer is a {type(answer).__name__}; give text or a number")
        if question is None or not str(question).strip():
            fail(f"{flag}, line {number}: no question in its column")
        problems.append({"question": str(question), "answer": "" if answer is None else str(answer), "row": row})
    return problems


def usable(flag: str, problems: list[dict], with_answer: bool) -> list[dict]:
    """Each question once and, `with_answer`, only answers that verify against themselves. Prints what was dropped."""
    by_question = {problem["question"]: problem for problem in problems}
    unique = list(by_question.values())
    if len(unique) < len(problems):
        dropped = len(problems) - len(unique)
        print(f"{flag}: {dropped} of {len(problems)} rows dropped: a later row has the same question")
    if not with_answer:
        return unique
    verdicts = [verifier.verifiable(problem["answer"]) for problem in unique]
    good = [problem for problem, is_good in zip(unique, verdicts, strict=True) if is_good]
    bad = [problem for problem, is_good in zip(unique, verdicts, strict=True) if not is_good]
    if bad:
        examples = "; ".join(repr(verifier.gold_answer(problem["answer"])[:40]) for problem in bad[:3])
        print(f"{flag}: {len(bad)} of {len(unique)} rows dropped: their answers cannot be verified: {examples}")
    if not good:
        fail(f"{flag}: none of its {len(unique)} rows has an answer that can be verified")
    return good


# --- their prompts ----------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer, question: str, system: str, template: str) -> list[int]:
    """The token ids of a question. With a chat template: a system turn, if there is one, and a user turn, or both in
    one user turn if the template has no system turn. Without: `template`."""
    if not tokenizer.chat_template:
        return tokenizer(template.replace("{question}", question))["input_ids"]
    options = dict(add_generation_prompt=True, return_dict=False)
    user = {"role": "user", "content": question}
    if system:
        try:
            return tokenizer.apply_chat_template([{"role": "system", "content": system}, user], **options)
        except Exception:  # of jinja2. Some templates have no system turn, and each says so in words of its own
            user["content"] = f"{system}\n\n{question}"
    try:
        return tokenizer.apply_chat_template([user], **options)
    except Exception as error:
        fail(f"--model: its chat template refuses the prompt: {first_line(error)}; "
             "give a local copy without the template, which then uses --prompt-template")  # fmt: skip


def encode(cfg: RunConfig, model, tokenizer, problems: list[dict]) -> list[dict]:
    """Adds "prompt_ids" to the problems. Drops those too long for --max-prompt-tokens or for the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = min(cfg.max_prompt_tokens, positions - cfg.max_new_tokens)
    if longest < 1:
        fail(f"--max-new-tokens {cfg.max_new_tokens}: no room for a prompt in the model's {positions} positions")
    if not tokenizer.chat_template and "{question}" not in cfg.prompt_template:
        fail(f"--prompt-template {cfg.prompt_template!r}: it must contain {{question}}, where the question goes")
    encoded = []
    for problem in problems:
        ids = prompt_ids(tokenizer, problem["question"], cfg.system, cfg.prompt_template)
        encoded.append({**problem, "prompt_ids": ids})
    kept = [problem for problem in encoded if len(problem["prompt_ids"]) <= longest]
    if len(kept) < len(encoded):
        dropped = len(encoded) - len(kept)
        print(f"{dropped} of {len(encoded)} rows dropped: their prompts are longer than {longest:.0f} tokens")
    if encoded and not kept:
        shortest = min(len(problem["prompt_ids"]) for problem in encoded)
        fail(f"every prompt is longer than {longest:.0f} tokens (the shortest has {shortest}): "
             "give a larger --max-prompt-tokens or a smaller --max-new-tokens")  # fmt: skip
    return kept
