"""The problems to train and to evaluate on, and their prompts.

A problem is {"question", "answer", "row"}. Its answer is what verifier.gold_answer reads, with numbers as they were
written: GSM8K's text with `####`, a MATH solution with \\boxed{}, or the bare answer. Its row is the whole row of the
data set, which a --reward function gets. A problem that is a chat also has "messages": its turns, {"role", "content"}.
"""

import gzip
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import verifier
from harness.model import max_positions, stop_ids
from harness.options import RunConfig, fail, first_line
from tasks import arithmetic

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "reward_model", "solution")  # DAPO-Math-17k keeps its gold inside `reward_model`
FORMATS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
DEFAULT_SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."
MAX_UNKNOWN = 0.05  # share of a prompt's tokens that the tokenizer does not know
# What data sets write in place of an answer, in lower case and without punctuation.
NO_ANSWER = {
    "proof", "prove", "proved", "proven", "notfound", "not found", "none", "null", "nil", "nan", "na", "n a",
    "unknown", "missing", "unanswerable", "no answer", "not available", "not applicable", "not given", "tbd", "todo",
}  # fmt: skip
UNIT_IN_BRACKETS = re.compile(r"(.*\d.*?)\s*(?:\\text\{)?\s*[(\[]\s*[A-Za-z][A-Za-z .,/]{2,}[)\]]\s*\}?", re.DOTALL)


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
        return [{**problem, "row": problem} for problem in arithmetic.problems(8192, cfg.seed, held_out=False)]
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
        return [{**problem, "row": problem} for problem in arithmetic.problems(cfg.eval_rows, 0, held_out=True)]
    if not cfg.eval_dataset and Path(cfg.dataset).is_file():
        return None  # a file has no splits
    flag = f"--eval-dataset {name}" if cfg.eval_dataset else f"--dataset {name}"
    _, split = split_names(cfg)
    rows = open_dataset(flag, name, split)
    split_was_asked_for = cfg.eval_dataset is not None or split != "test"
    if rows is None and split_was_asked_for:
        fail(f"{flag}: no split {split!r}; name its splits with --splits")
    if rows is None or (not rows and not split_was_asked_for):
        return None
    question_column = cfg.question_column
    answer_column = cfg.answer_column
    if cfg.eval_dataset:  # the named columns are those of --dataset; this one may have others
        columns = rows[0][0] if rows else {}
        question_column = question_column if question_column in columns else None
        answer_column = answer_column if answer_column in columns else None
    problems = read_columns(flag, rows, question_column, answer_column, with_answer=not cfg.reward)
    return shuffled(usable(flag, problems, with_answer=not cfg.reward))


def without_overlap(cfg: RunConfig, train: list[dict], eval_problems: list[dict]) -> list[dict]:
    """The training problems whose question is not evaluated on. White space does not make a question different."""
    evaluated = {squeezed(problem["question"]) for problem in eval_problems}
    kept = [problem for problem in train if squeezed(problem["question"]) not in evaluated]
    if len(kept) < len(train):
        print(f"--dataset: {len(train) - len(kept)} rows dropped, because their questions are also evaluated on")
    if not kept:
        fail(f"--dataset {cfg.dataset}: no rows are left to train on with --eval-rows {cfg.eval_rows}; give fewer")
    return kept


def shuffled(problems: list[dict]) -> list[dict]:
    random.Random(0).shuffle(problems)
    return problems


# --- rows -------------------------------------------------------------------------------------------------------------

Row = tuple[dict, dict]  # a row with its values, and the same with its numbers as they were written


def open_dataset(flag: str, name: str, split: str) -> list[Row] | None:
    """One split of a hub data set (NAME or NAME:CONFIGURATION), of a JSON, JSON Lines or Parquet file, or of a saved
    folder; None if it has no such split."""
    import datasets
    from pyarrow import parquet

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below, in one line
    path = Path(name)
    try:
        if path.is_file():
            if not name.lower().endswith(FORMATS):
                fail(f"{flag}: a file must end in {', '.join(FORMATS)}")
            if not name.lower().endswith(".parquet"):
                return read_json(path)
            return with_written_numbers(datasets.Dataset(parquet.ParquetFile(path).read()))
        if name.lower().endswith(FORMATS) and not path.exists():
            fail(f"{flag}: there is no file {name}")
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(name)
            dataset = saved.get(split) if isinstance(saved, datasets.DatasetDict) else saved
            return None if dataset is None else with_written_numbers(dataset)
        config = None
        if path.exists():  # links to its files, because `datasets` would take a [ or * in the path for a pattern
            name = tempfile.mkdtemp()
            shutil.copytree(path.resolve(), name, copy_function=os.symlink, dirs_exist_ok=True)
        else:
            name, _, config = name.partition(":")
        if not config:
            names = datasets.get_dataset_config_names(name)
            config = next((usual for usual in ("main", "default") if usual in names), names[0])
        if split not in datasets.get_dataset_split_names(name, config):
            return None
        files = datasets.load_dataset_builder(name, config).config.data_files[split]
        if path.exists() and all(file.endswith(FORMATS[:4]) for file in files):
            return [row for file in files for row in read_json(Path(file))]
        return with_written_numbers(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # of any class: DatasetNotFoundError, ConnectionError, ArrowInvalid, ...
        hint = "" if path.exists() else " Give a local file or folder instead if the hub is out of reach."
        if isinstance(error, UnicodeDecodeError):
            hint = " Save the file as UTF-8."
        fail(f"{flag} cannot be loaded: {first_line(error)}{hint}")


def read_json(path: Path) -> list[Row]:
    """The rows of a JSON list or of JSON Lines. Libraries for tables would change what they read: `2024-05-01` into a
    time, and all numbers of a column into the same type."""
    content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    if text.lstrip().startswith("["):
        return list(zip(json.loads(text, object_pairs_hook=unique_keys), json_as_written(text), strict=True))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((json.loads(line, object_pairs_hook=unique_keys), json_as_written(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def json_as_written(text: str) -> Any:
    """JSON with its numbers, NaN and Infinity as text."""
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=str)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object. ValueError if a key comes twice: it is not clear which of its values is meant."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} comes twice")
    return dict(pairs)


def with_written_numbers(dataset) -> list[Row]:
    """The rows of a `datasets` data set. A float32 is written as its shortest decimal: 0.1, not 0.10000000149011612."""
    rows = list(dataset)
    return [(row, shortest_decimal(row, dataset.features)) for row in rows]


def shortest_decimal(value: Any, feature: Any) -> Any:
    import numpy

    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: shortest_decimal(value[name], feature[name]) for name in value}
    if isinstance(value, float) and getattr(feature, "dtype", "") in ("float16", "float32"):
        return str(numpy.dtype(feature.dtype).type(value))
    return value


# --- from rows to problems --------------------------------------------------------------------------------------------


def read_columns(
    flag: str, rows: list[Row], question_column: str | None, answer_column: str | None, with_answer: bool
) -> list[dict]:
    """The problems in these rows. Without given columns, those with the usual names. A row without question is refused,
    and `with_answer` one without answer. A --reward function may need none: then the answer can be "".
    """
    if len(rows) == 0:
        fail(f"{flag}: it is empty")
    for number, (row, _) in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{flag}, row {number}: it is a {type(row).__name__}; give an object with named values")
    columns = list(dict.fromkeys(name for row, _ in rows for name in row))
    question_column = question_column or next((name for name in QUESTION_COLUMNS if name in columns), None)
    answer_column = answer_column or next((name for name in ANSWER_COLUMNS if name in columns), None)
    if question_column not in columns:
        fail(f"{flag}: name one of its columns ({', '.join(columns)}) with --question-column")
    if answer_column not in columns and (with_answer or answer_column):
        fail(f"{flag}: name one of its columns ({', '.join(columns)}) with --answer-column")
    problems = []
    for number, (row, written) in enumerate(rows, 1):
        try:
            if with_answer and answer_column not in row:
                raise ValueError("no answer in its column")
            messages = read_chat(row.get(question_column))
            answer = read_answer(written.get(answer_column), with_answer)
        except ValueError as error:
            fail(f"{flag}, row {number}: {error}")
        problem = {"question": as_text(messages), "answer": answer, "row": row}
        problems.append(problem if isinstance(row[question_column], str) else {**problem, "messages": messages})
    return problems


def read_chat(question: Any) -> list[dict]:
    """The turns of a chat, or a question as its only turn. ValueError if it is neither."""
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if question is None:
        raise ValueError("no question in its column")
    if not isinstance(turns, list):
        raise ValueError(f"the question is a {type(question).__name__}; give text or a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"a turn of its chat is {turn!r:.80}; give an object with role and content")
        messages.append({"role": turn["role"], "content": read_content(turn.get("content"))})
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise ValueError("no question in its column")
    return messages


def read_content(content: Any) -> str:
    """The text of a turn, which may come in parts: [{"type": "text", "text": ...}, ...]."""
    text = ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise ValueError(f"the content of a turn is a {type(part).__name__} ({part!r:.60}); give text")
        text += part
    text.encode()  # raises UnicodeEncodeError, which is a ValueError, for half of a surrogate pair
    return text


def read_answer(answer: Any, with_answer: bool) -> str:
    """The answer as text, "" if there is none. ValueError if it is neither text nor a number."""
    if isinstance(answer, dict) and "ground_truth" in answer:
        answer = answer["ground_truth"]
    if with_answer and isinstance(answer, bool | list | dict | bytes):
        raise ValueError(f"the answer is a {type(answer).__name__}; give text or a number")
    return "" if answer is None else str(answer)


def as_text(messages: list[dict]) -> str:
    """A chat as one text: its only turn, or all turns with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def usable(flag: str, problems: list[dict], with_answer: bool) -> list[dict]:
    """Each question once and, `with_answer`, only answers that verify against themselves. Prints what was dropped."""
    by_question = {problem["question"]: problem for problem in problems}
    unique = list(by_question.values())
    if len(unique) < len(problems):
        dropped = len(problems) - len(unique)
        print(f"{flag}: {dropped} of {len(problems)} rows dropped: a later row has the same question")
    if not with_answer:
        return unique
    good: list[dict] = []
    bad: list[dict] = []
    for problem in unique:
        gold = verifier.gold_answer(problem["answer"])
        in_brackets = UNIT_IN_BRACKETS.fullmatch(gold)  # "9 (apples)" is 9
        answer = in_brackets[1] if in_brackets else problem["answer"]
        is_usable = not says_that_there_is_none(gold) and verifier.verifiable(answer)
        (good if is_usable else bad).append({**problem, "answer": answer})
    if bad:
        examples = "; ".join(repr(verifier.gold_answer(problem["answer"])[:40]) for problem in bad[:3])
        print(f"{flag}: {len(bad)} of {len(unique)} rows dropped: their answers cannot be verified: {examples}")
    if not good:
        fail(f"{flag}: none of its {len(unique)} rows has an answer that can be verified")
    return good


def says_that_there_is_none(gold: str) -> bool:
    """Whether a gold answer is a word such as "proof" or "N/A" in place of an answer."""
    words = re.sub(r"\\(?:text|mathrm|textbf)\b|[\W_]+", " ", gold)
    return words.strip().lower() in NO_ANSWER


# --- their prompts ----------------------------------------------------------------------------------------------------


def prompt_text(tokenizer, messages: list[dict], system: str, template: str) -> str:
    """The prompt of a chat, or of a question as its only turn. An assistant turn at its end is continued.

    With a chat template: `system` is added unless the chat has a system turn. Some templates take content in parts, and
    some leave the system turn out or refuse it: then it goes into the first user turn. The prompt must contain all that
    it is asked. Without a chat template: `template`, with the turns as one text.
    """
    prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    asked = messages[:-1] if prefill else messages
    if not tokenizer.chat_template:
        return template.replace("\\n", "\n").replace("{question}", as_text(asked)) + prefill
    if system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    layouts = [asked]
    if asked[0]["role"] == "system":
        user = next(i for i, turn in enumerate(asked) if turn["role"] == "user")
        joined = {"role": "user", "content": asked[0]["content"] + "\n\n" + asked[user]["content"]}
        layouts.append([*asked[1:user], joined, *asked[user + 1 :]])
    layouts += [[{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat] for chat in layouts]
    needed = [turn["content"] for turn in asked if turn["role"] != "assistant"]  # it may leave old thinking out
    result = ""
    for chat in layouts:
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # of jinja2. Each template refuses in words of its own
            result = result or f"refuses the prompt: {first_line(error)}"
            continue
        if all(squeezed(content) in squeezed(text) for content in needed):
            return text if text.rstrip().endswith(prefill.strip()) else text + prefill
        result = f"leaves out some of the question or of the system turn; the prompt is {text!r:.300}"
    fail(f"--model: its chat template {result}; "
         "give a local copy without the template, which then uses --prompt-template")  # fmt: skip


def prompt_ids(tokenizer, text: Any) -> Any:
    """The token ids of a prompt, or of each of a list. A chat template has written the special tokens already."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def unknown_share(tokenizer, text: str) -> float:
    """The share of a text's tokens that the tokenizer does not know. White space does not count."""
    if tokenizer.unk_token_id is None or not text.split():
        return 0.0
    words = tokenizer(text.split(), add_special_tokens=False)["input_ids"]
    ids = [token for word in words for token in word]
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))


def encode(cfg: RunConfig, model, tokenizer, problems: list[dict]) -> list[dict]:
    """Adds "prompt_ids" to the problems. Drops those too long for --max-prompt-tokens or for the model's positions, and
    those that the tokenizer cannot write. Fails if a prompt is empty or already ended."""
    positions = max_positions(model)
    longest = min(cfg.max_prompt_tokens, positions - cfg.max_new_tokens)
    if longest < 1:
        fail(f"--max-new-tokens {cfg.max_new_tokens}: no room for a prompt in the model's {positions} positions")
    if not tokenizer.chat_template and "{question}" not in cfg.prompt_template:
        fail(f"--prompt-template {cfg.prompt_template!r}: it must contain {{question}}, where the question goes")
    system = cfg.system
    if system is None:
        system = DEFAULT_SYSTEM if unknown_share(tokenizer, DEFAULT_SYSTEM) <= MAX_UNKNOWN else ""
    stops = stop_ids(model, tokenizer)
    n_embeddings = len(model.get_input_embeddings().weight)
    texts = []
    for problem in problems:
        messages = problem.get("messages") or [{"role": "user", "content": problem["question"]}]
        texts.append(prompt_text(tokenizer, messages, system, cfg.prompt_template))
    encoded = []
    known = []
    for problem, text, ids in zip(problems, texts, prompt_ids(tokenizer, texts) if texts else [], strict=True):
        if not ids or ids[-1] in stops:
            what = "ends in a token that ends a completion" if ids else "is empty"
            fail(f"--model: a prompt {what}: {tokenizer.decode(ids)!r:.300}; "
                 "change its tokenizer or its chat template in a local copy")  # fmt: skip
        if max(ids) >= n_embeddings:
            fail(f"--model: its tokenizer gives the token {max(ids)}, but the model has {n_embeddings}")
        encoded.append({**problem, "prompt_ids": ids})
        if tokenizer.unk_token_id not in ids or unknown_share(tokenizer, text) <= MAX_UNKNOWN:
            known.append(encoded[-1])
    if len(known) < len(encoded):
        print(f"{len(encoded) - len(known)} of {len(encoded)} rows dropped: the tokenizer does not know their words")
    if encoded and not known:
        fail(f"--model: its tokenizer does not know the words of any prompt, such as {text!r:.300}; give another model "
             "(without --model, the tiny base knows arithmetic alone)")  # fmt: skip
    kept = [problem for problem in known if len(problem["prompt_ids"]) <= longest]
    if len(kept) < len(known):
        dropped = len(known) - len(kept)
        print(f"{dropped} of {len(known)} rows dropped: their prompts are longer than {longest:.0f} tokens")
    if known and not kept:
        shortest = min(len(problem["prompt_ids"]) for problem in known)
        fail(f"every prompt is longer than {longest:.0f} tokens (the shortest has {shortest}): "
             "give a larger --max-prompt-tokens or a smaller --max-new-tokens")  # fmt: skip
    return kept
