"""A toy base model, built once per session: a short warm start on chains of two terms, some of which it then solves."""

import os
import signal
from pathlib import Path

import pytest
from helpers import error_line, write_lines

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network

from tasks import arithmetic

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and then no run ends with its terminal


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of the toy base. TOY_BASE can name one, so that several sessions build it once."""
    folder = Path(os.environ.get("TOY_BASE") or tmp_path_factory.mktemp("toy") / "base")
    return arithmetic.base(folder, dict(steps=150, guess=0.5, min_terms=2, max_terms=2))


@pytest.fixture()
def loaded(toy):
    """The toy base as (model, tokenizer); a fresh model for each test."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A data file of chains of two terms."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_lines(path, arithmetic.problems(60, 0, False, 2, 2))
    return path


@pytest.fixture()
def small(toy, toy_data, tmp_path):
    """Options of a run at toy size, in tmp_path. Options that are given come last and win."""
    size = "--steps 2 --n-prompts 6 --group-size 4 --max-new-tokens 12 --eval-rows 4 --eval-k 2 --token-budget 200"

    def options(*more):
        return [*map(str, ["--model", toy, "--dataset", toy_data, "--out", tmp_path, *size.split(), *more])]

    return options


@pytest.fixture()
def refusal(capsys):
    """Calls a function that ends the program with status 2, and returns its one line."""

    def message(function, *arguments, **keywords):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments, **keywords)
        assert stop.value.code == 2
        return error_line(capsys)

    return message
