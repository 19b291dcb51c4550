"""Data sets in the layouts that people have, and prompts."""

import gzip
import json

import datasets
import pytest
import torch
from helpers import data_folder, write_lines

import verifier
from harness import data, tiny
from harness.model import load_model
from harness.options import RunConfig

GSM8K = [
    {"question": "A pen costs $2 and a pad $3. What do 4 pens and a pad cost?",
     "answer": "4 * 2 = <<4*2=8>>8\n#### 11"},
    {"question": "A hall has 25 rows of 40 seats. How many seats?",
     "answer": "25 * 40 = <<25*40=1000>>1,000\n#### 1,000"},
    {"question": "Half of a dozen eggs break. How many are left?", "answer": "12 / 2 = 6\n#### 6"},
]  # fmt: skip
MATH = [
    {"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}", "level": 1},
    {"problem": "Which day follows Monday?", "solution": r"\boxed{\text{Tuesday}}", "answer": r"\text{Tuesday}",
     "level": 1},
]  # fmt: skip
DAPO_17K = [
    {"data_source": "math_dapo", "prompt": [{"role": "user", "content": f"Solve it. What is {n} + 1?"}],
     "reward_model": {"ground_truth": str(n + 1), "style": "rule"}}
    for n in range(4)
]  # fmt: skip


def config(**options):
    return RunConfig(**{"max_new_tokens": 8, **options})


def load(dataset, eval_rows=0, **options):
    """(training problems, held-out problems) of a file or folder; all are training problems unless it is said."""
    return data.load_problems(config(dataset=str(dataset), eval_rows=eval_rows, **options))


@pytest.fixture()
def tokenizer():
    return tiny.new_tokenizer()


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, golds", [(GSM8K, ["11", "1,000", "6"]), (MATH, [r"\frac{1}{2}", r"\text{Tuesday}"]),
                                         (DAPO_17K, ["1", "2", "3", "4"])])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "saved", "saved dict"])
def test_known_layouts_load_in_every_format(rows, golds, name, tmp_path):
    path = tmp_path / name
    dataset = datasets.Dataset.from_list(rows)
    if name == "a.jsonl":
        write_lines(path, rows)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.parquet":
        dataset.to_parquet(path)
    else:
        (datasets.DatasetDict(train=dataset) if name == "saved dict" else dataset).save_to_disk(path)
    train, held = load(path)
    assert sorted(verifier.gold_answer(row["answer"]) for row in train) == sorted(golds) and held == []
    assert all(isinstance(row["question"], str) and row["question"] for row in train)


def test_columns_can_be_named(tmp_path, refusal):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1+1?", "gold": "2"}, {"text": "1+2?", "gold": "3"}])
    columns = dict(question_column="text", answer_column="gold")
    train, held = load(path, eval_rows=1, **columns)
    assert {row["answer"] for row in train + held} == {"2", "3"}
    assert "--question-column" in refusal(load, path)
    other = write_lines(tmp_path / "b.jsonl", GSM8K)  # with the usual names, whatever those of the first are called
    _, held = load(path, eval_dataset=other, eval_rows=9, **columns)
    assert len(held) == 3


def test_the_test_split_is_evaluated_on_and_a_missing_split_is_refused(tmp_path, refusal):
    dataset = datasets.DatasetDict(train=datasets.Dataset.from_list(GSM8K), test=datasets.Dataset.from_list(GSM8K[:1]))
    dataset.save_to_disk(tmp_path / "d")
    train, held = load(tmp_path / "d", eval_rows=9)
    assert [problem["question"] for problem in held] == [GSM8K[0]["question"]] and len(train) == 2
    for splits in ("training,test", "train,tset"):
        assert "--splits" in refusal(load, tmp_path / "d", eval_rows=9, splits=splits)


def test_a_hub_data_set_with_configurations(tmp_path):
    """openai/gsm8k's layout: two configurations, of which `main` is meant, with a test split to evaluate on."""
    folder, yaml = tmp_path / "gsm8k", ["---", "configs:"]
    for name in ("socratic", "main"):
        (folder / name).mkdir(parents=True)
        yaml += [f"- config_name: {name}", "  data_files:"]
        for split, rows in (("train", GSM8K[:2]), ("test", GSM8K[2:])):
            rows = [{**row, "question": f"{name}: {row['question']}"} for row in rows]
            datasets.Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            yaml += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*yaml, "---", ""]))
    train, held = load(folder, eval_rows=9)
    assert len(train) == 2 and len(held) == 1 and all("main: " in row["question"] for row in train + held)
    train, _ = load(f"{folder}:socratic")
    assert all("socratic: " in row["question"] for row in train)


def test_training_and_evaluation_never_share_a_question(tmp_path, capsys):
    train = write_lines(tmp_path / "train.jsonl", GSM8K)
    same = [{**GSM8K[1], "question": "  A hall has 25 rows  of 40 seats.\nHow many seats?"}]
    kept, held = load(train, eval_rows=9, eval_dataset=write_lines(tmp_path / "eval.jsonl", same))
    assert len(held) == 1 and GSM8K[1]["question"] not in [row["question"] for row in kept] and len(kept) == 2
    assert "1 rows dropped" in capsys.readouterr().out
    for seed in range(3):
        rows, held = load("arithmetic", eval_rows=256, seed=seed)
        assert not {row["question"] for row in rows} & {row["question"] for row in held}
    rows, held = load("arithmetic", eval_rows=9, eval_dataset=train)  # or something else
    assert len(rows) == 8192 and {row["question"] for row in held} == {row["question"] for row in GSM8K}


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, capsys, refusal):
    train, _ = load(write_lines(tmp_path / "a.jsonl", [*GSM8K, GSM8K[0]]))  # one comes twice
    assert len(train) == 3 and "1 of 4 rows dropped" in capsys.readouterr().out
    bad = [{"question": "Why?", "answer": "because it was raining all day long"}, {"question": "Who?", "answer": ""}]
    train, _ = load(write_lines(tmp_path / "a.jsonl", GSM8K + bad))
    assert len(train) == 3 and "2 of 5 rows dropped" in capsys.readouterr().out
    assert "none of its 2 rows" in refusal(load, write_lines(tmp_path / "b.jsonl", bad))


@pytest.mark.parametrize("name, content, told", [
    ("a.jsonl", b"", "empty"), ("a.jsonl", b" \n\n", "empty"), ("a.json", b"[]", "empty"),
    ("a.jsonl", b'{"question": "caf\xe9?", "answer": "1"}\n', "UTF-8"),
    ("a.jsonl", b'{"question": "1+2?", "answer": ["3"]}\n', "the answer is a list"),
    ("a.jsonl", b'{"question": "1+2?", "answer": true}\n', "the answer is a bool"),
    ("a.jsonl", b'{"question": "1?", "answer": 3}\n{"question": "2?", "answer": 1, "answer": 2}\n',
     "line 2: the key 'answer' comes twice"),
    *(("a.jsonl", b'{"question": "1?", "answer": 3}\n' + row, told) for row, told in [
        (b'{"question": "1+1?"}', "row 2"), (b'{"answer": "2"}', "row 2"), (b"[1]", "row 2"), (b"not json", "line 2")
    ]),
    ("nope.jsonl", None, "there is no file"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(name, content, told, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: pytest.fail("asked the hub"))
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert told in refusal(load, path)
    assert told in refusal(load, "arithmetic", eval_rows=9, eval_dataset=str(path))


def test_overlong_prompts_are_dropped_and_counted(tokenizer, capsys, refusal):
    model = tiny.new_model(tokenizer, 0)
    rows = [{"question": "1+2?", "answer": "3"}, {"question": "1+2+3+4+5+6?", "answer": "21"}]
    assert len(data.encode(config(max_prompt_tokens=6), model, tokenizer, rows)) == 1
    assert "1 of 2 rows dropped" in capsys.readouterr().out
    assert "--max-prompt-tokens" in refusal(data.encode, config(max_prompt_tokens=2), model, tokenizer, rows)
    limit = model.config.max_position_embeddings
    assert "--max-new-tokens" in refusal(data.encode, config(max_new_tokens=limit), model, tokenizer, rows)


def test_the_hub_out_of_reach_is_one_line_with_the_way_out(refusal):
    assert "local file or folder" in refusal(load, "openai/no-such-set-here")
    assert "local folder" in refusal(load_model, "Qwen/no-such-model-here", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("gsm8k/train", 7473), ("gsm8k/test", 1319), ("math500/test", 500),
                                         ("aime/aime24", 30), ("aime/aime25", 30)])  # fmt: skip
def test_every_row_of_the_real_data_sets_is_usable(name, count):
    train, _ = load(data_folder() / f"{name}.jsonl")
    assert len(train) == count


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt(tokenizer, question, system="SYS", template="3+{question}="):
    return data.prompt_text(tokenizer, data.read_chat(question), system, template)


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
NO_SYSTEM = "{{ raise_exception('no system') if messages[0].role == 'system' }}<user>{{ messages[0].content }}"
USER_ONLY = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
CHAT = [{"role": "system", "content": "base 7"}, {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "3+5?"}]}]  # fmt: skip


@pytest.mark.parametrize("template, question, expected", [
    (ROLES, "1+2?", "<system>SYS<user>1+2?<assistant>"),
    (NO_SYSTEM, "1+2?", "<user>SYS\n\n1+2?"),
    (USER_ONLY, "1+2?", "<user>SYS\n\n1+2?"),  # it leaves the system turn out without a word
    (PARTS, "1+2?", "<system>SYS<user>1+2?"),
    (ROLES, CHAT, "<system>base 7<user>2+2?<assistant>4<user>3+5?<assistant>"),
    (USER_ONLY, CHAT, "<user>base 7\n\n2+2?<user>3+5?"),
    (ROLES, [CHAT[1], {"role": "assistant", "content": "<think>"}], "<system>SYS<user>2+2?<assistant><think>"),
    (ROLES + "{{ '<think>\\n' }}", [CHAT[1], {"role": "assistant", "content": "<think>"}],
     "<system>SYS<user>2+2?<assistant><think>\n"),
    (None, "1+2?", "3+1+2?="),
    (None, [CHAT[1], {"role": "assistant", "content": "It is"}], "3+2+2?=It is"),
    (None, CHAT, "3+system: base 7\n\nuser: 2+2?\n\nassistant: 4\n\nuser: 3+5?="),
])  # fmt: skip
def test_a_prompt_contains_all_turns_and_the_system_text(template, question, expected, tokenizer):
    tokenizer.chat_template = template
    assert prompt(tokenizer, question) == expected


@pytest.mark.parametrize("template, told", [
    ("{{ raise_exception('no turns at all') }}", "no turns at all"), ("{{ '' }}", "the prompt is ''"),
    ("{{ messages[-1].content | replace('1+', '') }}", "leaves out"),
])  # fmt: skip
def test_a_template_that_loses_the_question_is_refused_with_the_prompt(template, told, tokenizer, refusal):
    tokenizer.chat_template = template
    message = refusal(prompt, tokenizer, "1+2?")
    assert told in message and "--prompt-template" in message


def encoded(tokenizer, *questions, **options):
    model = tiny.new_model(tokenizer, 0)
    return data.encode(config(**options), model, tokenizer, [{"question": q, "answer": "3"} for q in questions])


def test_the_default_system_turn_is_left_out_where_the_tokenizer_cannot_write_it(tokenizer, refusal):
    assert tokenizer.decode(encoded(tokenizer, "1+2?")[0]["prompt_ids"]) == "1+2?"
    assert "Be brief." in refusal(encoded, tokenizer, "1+2?", system="Be brief.")  # one that is given never is


def test_prompts_that_a_model_cannot_read_are_dropped_and_refused_if_there_is_no_other(tokenizer, capsys, refusal):
    assert len(encoded(tokenizer, "1 + 2?", "What is 1+2?")) == 1 and "1 of 2 rows dropped" in capsys.readouterr().out
    assert "'What is 1+2?'" in refusal(encoded, tokenizer, "What is 1+2?")  # unknown words
    tokenizer.chat_template = "{{ messages[-1].content }}<eos>"
    assert "1+2?<eos>" in refusal(encoded, tokenizer, "1+2?")  # it has already ended


def test_a_prompt_template_needs_a_place_for_the_question_and_reads_backslash_n_as_a_new_line(tokenizer, refusal):
    tokenizer.chat_template = None
    assert "--prompt-template" in refusal(encoded, tokenizer, "1+2?", prompt_template="{q}?")
    assert prompt(tokenizer, "1+2?", template=r"Q: {question}\nA:") == "Q: 1+2?\nA:"


@pytest.mark.parametrize("question, told", [
    ({"role": "user", "content": "3+4?"}, "row 1: the question is a dict"), (5, "a int"), (None, "no question"),
    ([{"role": "user", "content": {"text": "3+4?"}}], "a dict"), ([{"role": "user", "content": 7}], "a int"),
    ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "a dict"), (["3+4?"], "role and content"),
    ([{"role": "system", "content": "3+4?"}], "no question"), ("\ud800", "surrogates"),
])  # fmt: skip
def test_a_question_that_is_no_text_and_no_chat_is_refused_with_row_and_type(question, told, tmp_path, refusal):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": question, "answer": "7"}])
    assert told in refusal(load, path)


# --- values stay as they are written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("written, gold, value", [
    ("1267650600228229401496703205376", "1267650600228229401496703205376", 2**100), ("2.50", "2.50", 2.5),
    ("9007199254740993", "9007199254740993", 9007199254740993), ("-0", "-0", 0), ('"2024-05-01"', "2024-05-01", None),
    ("0.1", "0.1", 0.1), ("1e400", "1e400", None), ('"9 (apples)"', "9", "9 (apples)"), ('"x=9"', "x=9", "x=9"),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz"])
def test_json_keeps_a_gold_as_written_and_gives_a_reward_the_plain_value(written, gold, value, ending, tmp_path):
    row = f'{{"question": "2024-05-01", "answer": {written}}}'
    other = '{"question": "b?", "answer": 2.5}'
    text = f"[{row},\n{other}]" if ending == "json" else f"\ufeff{row}\r\n\r\n{other}\r\n"
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    problems = data.training_problems(config(dataset=str(path), reward="x.py:f"))
    golds = {problem["question"]: problem for problem in data.usable("", problems, with_answer=False)}
    assert golds["b?"]["answer"] == "2.5"
    if value is not None:
        assert golds["2024-05-01"]["row"]["answer"] == value
        problems = data.training_problems(config(dataset=str(path)))
        assert {p["question"]: p["answer"] for p in problems}["2024-05-01"] == gold


@pytest.mark.parametrize("answer", [
    '"proof"', '"notfound"', '"None"', "null", "NaN", '"N/A"', '"\\\\boxed{\\\\text{Proof.}}"',
    '"not found"', '"#### null"', '"-"',
])  # fmt: skip
def test_golds_that_say_that_there_is_none_are_dropped_and_counted(answer, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "a?", "answer": {answer}}}\n{{"question": "b?", "answer": 3}}\n')
    train, _ = load(path)
    assert [problem["answer"] for problem in train] == ["3"] and "1 of 2 rows dropped" in capsys.readouterr().out


def test_float32_of_parquet_is_its_shortest_decimal_and_bytes_are_refused(tmp_path, refusal):
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("float32")})
    datasets.Dataset.from_dict({"question": ["a?"], "answer": [0.1]}, features).to_parquet(tmp_path / "a.parquet")
    (problem,) = data.training_problems(config(dataset=str(tmp_path / "a.parquet")))
    assert problem["answer"] == "0.1" and isinstance(problem["row"]["answer"], float)
    datasets.Dataset.from_dict({"question": [b"a?"], "answer": [b"7"]}).to_parquet(tmp_path / "b.parquet")
    assert "row 1: the question is a bytes" in refusal(load, tmp_path / "b.parquet")


@pytest.mark.parametrize("name", ["rows[1].jsonl", "rows[1].parquet", "rows*?.json", "saved[1]", "folder[1]"])
def test_a_path_is_a_path_and_no_pattern(name, tmp_path):
    (tmp_path / "rows1.jsonl").write_text('{"question": "FROM ANOTHER FILE", "answer": "99"}\n')
    rows = datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])
    path = tmp_path / name
    if name.endswith("parquet"):
        rows.to_parquet(path)
    elif name.startswith("rows"):
        write_lines(path, list(rows))
    elif name.startswith("saved"):
        rows.save_to_disk(path)
    else:
        path.mkdir()
        write_lines(path / "train.jsonl", list(rows))
    train, _ = load(path)
    _, held = load("arithmetic", eval_rows=9, eval_dataset=str(path), splits="train,train")
    assert [problem["question"] for problem in train + held] == ["1+1?", "1+1?"]
