"""The pages of the methods and the notebook: what they quote is up to date, and what they work out is right."""

import importlib
import itertools
import math
import re
import sys

import pytest
from helpers import ROOT

from harness.options import parse

sys.path.insert(0, str(ROOT / "docs"))
import build


def text_of(method):
    return (ROOT / "docs" / f"{method}.md").read_text()


@pytest.mark.parametrize("method", build.METHODS)
def test_a_page_quotes_the_code_as_it_is(method):
    text = text_of(method)
    assert text == build.page(text, method), "stale: run python docs/build.py"


@pytest.mark.parametrize("method", build.METHODS)
def test_the_sums_of_the_example_are_right(method):
    idea = text_of(method).partition("## The idea")[2].partition("\n## ")[0]
    sums = re.findall(r"`([^`=]*\d) = (-?[\d.]+)`", idea) + re.findall(r"`([^`=]*\)) = (-?[\d.]+)`", idea)
    assert len(sums) >= 4
    for left, right in sums:
        digits = len(right.partition(".")[2])
        value = eval(left, {"exp": math.exp})
        assert abs(value - float(right)) <= 0.501 * 10**-digits, f"{left} is {value}"


@pytest.mark.parametrize("method", build.METHODS)
def test_the_scripts_accept_the_commands_of_the_sweeps(method):
    commands = re.findall(r"^    for (\w+) in (.*?); do python (\w+)\.py (.*?); done$", text_of(method), re.MULTILINE)
    assert len(commands) == 3
    for name, values, script, options in commands:
        config = importlib.import_module(script).Config
        runs = [parse(config, "", options.replace(f"${name}", value).split()) for value in values.split()]
        assert len({run.name for run in runs}) == len(runs)
        for one, other in itertools.combinations(runs, 2):
            differences = [key for key in vars(one) if vars(one)[key] != vars(other)[key]]
            assert len(differences) == 2, differences  # the option and the name


def notebook():
    return pytest.importorskip("nbformat").read(ROOT / "docs" / "first_run.ipynb", as_version=4)


def test_the_notebook_was_run_from_top_to_bottom():
    code = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not re.search(r"/(home|root|tmp|Users)/", "".join(output.get("text", "") for output in outputs))


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_kernel(toy, toy_data, tmp_path):
    """On the toy base, with two short steps."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    book = notebook()
    book.cells[next(i for i, cell in enumerate(book.cells) if "%pip" in cell.source)].source = "%cd -q .."
    parameters = next(cell for cell in book.cells if "OPTIONS = " in cell.source)
    size = "--steps 2 --n-prompts 6 --group-size 4 --max-new-tokens 12 --eval-rows 4 --eval-k 2"
    options = f'OPTIONS = "--model {toy} --dataset {toy_data} {size}"'
    parameters.source = re.sub(r'OPTIONS = ".*"', options, parameters.source)
    parameters.source = re.sub(r'OUT = Path\(".*"\)', f'OUT = Path("{tmp_path}")', parameters.source)
    where = {"metadata": {"path": str(ROOT / "docs")}}
    client.NotebookClient(book, timeout=200, kernel_name="python3", resources=where).execute()
    assert {"first", "first-alpha-0"} <= {path.name for path in tmp_path.iterdir()}
    shown = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
    assert "after step 2" in shown and "mean@2" in shown
