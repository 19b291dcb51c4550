"""Data sets in the layouts that people have, and prompts."""

import json
from pathlib import Path

import pytest
import torch
from helpers import data_folder, error_line

import verifier
from harness import data, tiny
from harness.options import RunConfig

GSM8K = [
    {
        "question": "A pen costs $2 and a pad $3. What do 4 pens and a pad cost?",
        "answer": "4 * 2 = <<4*2=8>>8\n#### 11",
    },
    {
        "question": "A hall has 25 rows of 40 seats. How many seats?",
        "answer": "25 * 40 = <<25*40=1000>>1,000\n#### 1,000",
    },
    {"question": "Half of a dozen eggs break. How many are left?", "answer": "12 / 2 = 6\n#### 6"},
]
MATH = [
    {"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}", "level": 1},
    {
        "problem": "Which day follows Monday?",
        "solution": r"\boxed{\text{Tuesday}}",
        "answer": r"\text{Tuesday}",
        "level": 1,
    },
]
DAPO_17K = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve it. What is {n} + 1? Answer on a last line."}],
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
    }
    for n in range(4)
]


def config(**options):
    return RunConfig(**{"max_new_tokens": 8, **options})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, golds", [(GSM8K, ["11", "1,000", "6"]), (MATH, [r"\frac{1}{2}", r"\text{Tuesday}"]),
                                         (DAPO_17K, ["1", "2", "3", "4"])])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "saved dict"])
def test_known_layouts_load_in_every_format(rows, golds, kind, tmp_path):
    import datasets

    path = str(tmp_path / f"rows.{kind}")
    built = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        write(tmp_path / "rows.jsonl", rows)
    elif kind == "json":
        Path(path).write_text(json.dumps(rows))
    elif kind == "parquet":
        built.to_parquet(path)
    else:
        path = str(tmp_path / "folder")
        (datasets.DatasetDict(train=built) if kind == "saved dict" else built).save_to_disk(path)
    train, held = data.load_problems(config(dataset=path, eval_rows=0))
    assert sorted(verifier.gold_answer(row["answer"]) for row in train) == sorted(golds) and held == []
    assert all(isinstance(row["question"], str) and row["question"] for row in train)


def test_columns_can_be_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "1+1?", "gold": "2"}, {"text": "1+2?", "gold": "3"}])
    train, held = data.load_problems(config(dataset=path, question_column="text", answer_column="gold", eval_rows=1))
    assert {row["answer"] for row in train + held} == {"2", "3"}
    with pytest.raises(SystemExit):
        data.load_problems(config(dataset=path))
    assert "--question-column" in error_line(capsys)
    other = write(tmp_path / "b.jsonl", GSM8K)  # with the usual names, whatever those of the first are called
    _, held = data.load_problems(
        config(dataset=path, eval_dataset=other, eval_rows=9, question_column="text", answer_column="gold")
    )
    assert len(held) == 3


def test_the_test_split_is_evaluated_on_and_a_missing_split_is_refused(tmp_path, capsys):
    import datasets

    built = datasets.DatasetDict(train=datasets.Dataset.from_list(GSM8K), test=datasets.Dataset.from_list(GSM8K[:1]))
    built.save_to_disk(tmp_path / "d")
    train, held = data.load_problems(config(dataset=str(tmp_path / "d")))
    assert [problem["question"] for problem in held] == [GSM8K[0]["question"]] and len(train) == 2
    with pytest.raises(SystemExit):
        data.load_problems(config(dataset=str(tmp_path / "d"), train_split="training"))
    assert "--train-split" in error_line(capsys)
    with pytest.raises(SystemExit):
        data.load_problems(config(dataset=str(tmp_path / "d"), eval_split="tset"))
    assert "--eval-split" in error_line(capsys)


def test_a_hub_data_set_with_configurations(tmp_path):
    """openai/gsm8k's layout: two configurations, of which `main` is meant, with a test split to evaluate on."""
    import datasets

    folder, yaml = tmp_path / "gsm8k", ["---", "configs:"]
    for name in ("socratic", "main"):
        (folder / name).mkdir(parents=True)
        yaml += [f"- config_name: {name}", "  data_files:"]
        for split, rows in (("train", GSM8K[:2]), ("test", GSM8K[2:])):
            rows = [{**row, "question": f"{name}: {row['question']}"} for row in rows]
            datasets.Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            yaml += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*yaml, "---", ""]))
    train, held = data.load_problems(config(dataset=str(folder)))
    assert len(train) == 2 and len(held) == 1 and all("main: " in row["question"] for row in train + held)
    train, _ = data.load_problems(config(dataset=str(folder), dataset_config="socratic"))
    assert all("socratic: " in row["question"] for row in train)


def test_training_and_evaluation_never_share_a_question(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", GSM8K)
    same = [{**GSM8K[1], "question": "  A hall has 25 rows  of 40 seats.\nHow many seats?"}]
    kept, held = data.load_problems(config(dataset=train, eval_dataset=write(tmp_path / "eval.jsonl", same)))
    assert len(held) == 1 and GSM8K[1]["question"] not in [row["question"] for row in kept] and len(kept) == 2
    assert "1 rows dropped" in capsys.readouterr().out
    for seed in range(3):
        rows, held = data.load_problems(config(dataset="arithmetic", seed=seed))
        assert not {row["question"] for row in rows} & {row["question"] for row in held}


def test_the_built_in_task_can_be_evaluated_on_something_else(tmp_path):
    train, held = data.load_problems(config(eval_dataset=write(tmp_path / "eval.jsonl", GSM8K)))
    assert len(train) == 8192 and {row["question"] for row in held} == {row["question"] for row in GSM8K}


def test_questions_that_come_twice_are_dropped_and_counted(tmp_path, capsys):
    train, _ = data.load_problems(config(dataset=write(tmp_path / "a.jsonl", [*GSM8K, GSM8K[0]]), eval_rows=0))
    assert len(train) == 3 and "1 of 4 rows dropped" in capsys.readouterr().out


def test_answers_that_cannot_be_verified_are_dropped_and_counted(tmp_path, capsys):
    bad = [{"question": "Why?", "answer": "because it was raining all day long"}, {"question": "Who?", "answer": ""}]
    train, _ = data.load_problems(config(dataset=write(tmp_path / "a.jsonl", GSM8K + bad), eval_rows=0))
    assert len(train) == 3 and "2 of 5 rows dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.load_problems(config(dataset=write(tmp_path / "b.jsonl", bad), eval_rows=0))
    assert "none of its 2 rows" in error_line(capsys)


@pytest.mark.parametrize("content, name", [("", "a.jsonl"), (" \n\n", "a.jsonl"), ("[]", "a.json")])
def test_an_empty_file_is_refused_as_empty(content, name, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    for options in (dict(dataset=str(tmp_path / name)), dict(eval_dataset=str(tmp_path / name))):
        with pytest.raises(SystemExit) as stop:
            data.load_problems(config(**options))
        assert stop.value.code == 2 and "empty" in error_line(capsys)


@pytest.mark.parametrize("content, told", [
    (b'{"question": "caf\xe9?", "answer": "1"}\n', "UTF-8"),
    (b'{"question": "1+2?", "answer": ["3"]}\n', "the answer is a list"),
    (b'{"question": "1+2?", "answer": true}\n', "the answer is a bool"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(content, told, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        data.load_problems(RunConfig(dataset=str(path), eval_rows=0))
    assert stop.value.code == 2 and told in error_line(capsys)


def test_a_misspelt_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(SystemExit):
        data.load_problems(RunConfig(dataset=str(tmp_path / "nope.jsonl"), eval_rows=0))
    assert "there is no file" in error_line(capsys)


def test_overlong_prompts_are_dropped_and_counted(capsys):
    tokenizer, model = tiny.new_tokenizer(), tiny.new_model(tiny.new_tokenizer(), 0)
    rows = [{"question": "1+2?", "answer": "3"}, {"question": "1+2+3+4+5+6?", "answer": "21"}]
    assert len(data.encode(config(max_prompt_tokens=6), model, tokenizer, rows)) == 1
    assert "1 of 2 rows dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.encode(config(max_prompt_tokens=2), model, tokenizer, rows)
    assert "--max-prompt-tokens" in error_line(capsys)
    with pytest.raises(SystemExit):
        data.encode(config(max_new_tokens=model.config.max_position_embeddings), model, tokenizer, rows)
    assert "--max-new-tokens" in error_line(capsys)


def test_the_hub_out_of_reach_is_one_line_with_the_way_out(capsys):
    with pytest.raises(SystemExit) as stop:
        data.load_problems(config(dataset="openai/no-such-set-here"))
    assert stop.value.code == 2 and "local file or folder" in error_line(capsys)
    with pytest.raises(SystemExit) as stop:
        data.load_model("Qwen/no-such-model-here", torch.device("cpu"))
    assert stop.value.code == 2 and "local folder" in error_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("gsm8k/train", 7473), ("gsm8k/test", 1319), ("math500/test", 500),
                                         ("aime/aime24", 30), ("aime/aime25", 30)])  # fmt: skip
def test_every_row_of_the_real_data_sets_is_usable(name, count):
    path = data_folder() / f"{name}.jsonl"
    train, _ = data.load_problems(config(dataset=str(path), eval_rows=0))
    assert len(train) == count


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_take_the_chat_template_or_else_the_prompt_template(capsys):
    tokenizer = tiny.new_tokenizer()

    def asked(system="think"):
        return tokenizer.decode(data.prompt_ids(tokenizer, "1+2", system, "3+{question}="))

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{{ '?' if add_generation_prompt }}"
    )
    unknown = tokenizer.unk_token
    assert asked().replace(unknown, "").endswith("1+2?") and asked() != asked(system="")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no System role') }}{% endif %}"
        + ("{{ messages[0].content }}?")
    )
    assert asked("7").endswith("7\n\n1+2?")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        + ("{{ messages[0].content }}?")
    )
    assert asked("7").endswith("7\n\n1+2?")
    tokenizer.chat_template = "{{ raise_exception('no turns at all') }}"
    for system in ("7", ""):
        with pytest.raises(SystemExit):
            asked(system)
        message = error_line(capsys)
        assert "no turns at all" in message and "--prompt-template" in message
    tokenizer.chat_template = None
    assert asked() == "3+1+2="
    with pytest.raises(SystemExit):
        data.encode(config(prompt_template="{q}?"), tiny.new_model(tokenizer, 0), tokenizer, [{"question": "1+2?"}])
    assert "--prompt-template" in error_line(capsys)
