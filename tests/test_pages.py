"""The pages of the methods and the notebook: what they quote is up to date, and what they work out is right."""

import ast
import importlib
import itertools
import math
import re
import sys

import pytest
import torch
from helpers import ROOT, SCRIPTS

from experiments import credit_one
from harness.options import parse

sys.path.insert(0, str(ROOT / "docs"))
import build

SECTIONS = [
    "The idea", "The equations", "The diff against grpo.py", "Options", "Metrics", "Details that the paper leaves out",
    "Results", "Where the credit goes", "What to look at", "First three sweeps", "How to cite",
]  # fmt: skip
TABLES = """
### methods: mean@k

| run | easy |
| --- | --- |
| grpo | 0.5 |
| gtpo | 0.7 |

### gtpo, easy

| run | n |
| --- | --- |
| gtpo scope=batch | 1 |
| gtpo scope=batch alpha2=0.0 | 2 |
| gtpo scope=group | 3 |
| grpo_s beta2=0.0 | 4 |

| run | pass@1 |
| --- | --- |
| gtpo scope=group | 5 |
"""


def text_of(method):
    return (ROOT / "docs" / f"{method}.md").read_text()


# --- the committed pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", build.METHODS)
def test_a_page_quotes_code_options_and_tables_as_they_are(method):
    tables = (ROOT / "experiments" / "tables.md").read_text()
    text = text_of(method)
    assert text == build.page(text, method, tables), "stale: run python docs/build.py"


@pytest.mark.parametrize("method", build.METHODS)
def test_a_page_is_short_and_has_all_sections_in_order(method):
    text = text_of(method)
    assert len(text.splitlines()) <= 250
    expected = ["The loop" if method == "grpo" and "diff" in name else name for name in SECTIONS]
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == expected


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


@pytest.mark.parametrize("method", build.METHODS)
def test_the_picture_shows_the_credit_that_the_script_gives(method):
    image = pytest.importorskip("PIL.Image")
    path = ROOT / "docs" / f"credit_{method}.png"
    assert path.stat().st_size < 60_000
    with image.open(path) as picture:
        assert picture.info["Comment"] == credit_one.numbers_of(method), "stale: run python experiments/credit_one.py"


# --- build.py and credit_one.py ---------------------------------------------------------------------------------------


def test_only_what_stands_between_the_marks_is_replaced():
    text = "by hand\n<!-- build: table gtpo, easy -->\nold\n<!-- end -->\nby hand, too\n"
    once = build.page(text, "gtpo", TABLES)
    assert once.startswith("by hand\n<!-- build: table gtpo, easy -->\n[gtpo, easy](../experiments/tables.md#gtpo")
    assert once.endswith("| gtpo scope=group | 3 |\n<!-- end -->\nby hand, too\n")
    assert "old" not in once
    assert build.page(once, "gtpo", TABLES) == once


def test_a_table_shows_its_first_run_and_the_runs_that_are_named():
    def runs(method, arguments):
        lines = build.quote_table(method, arguments, TABLES).splitlines()
        return [line.split("|")[2].strip() for line in lines[4:]]

    assert runs("gtpo", "gtpo, easy") == ["1", "2", "3"]
    assert runs("grpo_s", "gtpo, easy") == ["1", "4"]
    assert runs("gtpo", "gtpo, easy | gtpo scope=group, grpo_s *") == ["1", "3", "4"]
    assert runs("gtpo", "methods: mean@*") == ["0.5", "0.7"]
    assert build.quote_table("gtpo", "no such table", TABLES) == ""


def test_an_option_names_the_tables_that_vary_it():
    lines = build.quote_options("gtpo", "", TABLES).splitlines()
    measured = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in lines[2:]}
    assert measured["`--alpha2`"] == "[gtpo](../experiments/tables.md#gtpo-easy)"
    assert measured["`--alpha1`"] == "not measured"
    assert {"`--clip-low`", "`--reduction`"} < set(measured) and "`--steps`" not in measured
    assert build.tables_with("egsw", "weight_temperature", TABLES.replace("gtpo scope=batch a", "egsw P=2.0 a"))


def test_the_diff_has_every_line_of_code_that_a_function_adds_or_removes():
    diff = build.quote_diff("egsw", "", TABLES).splitlines()
    assert "+                    per_token = W[batch.rows] * per_token  # W multiplies the KL term too" in diff
    assert "-    return advantages(rewards, group, advantage)[:, None] * mask" in diff
    assert "-def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:" in build.quote_diff("dapo", "", TABLES)
    assert "@@ k3 @@" not in build.quote_diff("dapo", "k3 loss", TABLES)
    for method in SCRIPTS:
        for name, lines in build.functions(method).items():
            assert ast.get_docstring(ast.parse("\n".join(lines)).body[0]) is None, name


def test_the_details_are_the_whole_list_of_the_docstring():
    for method in SCRIPTS:
        numbers = re.findall(r"^ (\d+)\. ", build.quote_details(method, "", TABLES), re.MULTILINE)
        assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers


@pytest.mark.parametrize("method", build.METHODS)
def test_the_credit_of_the_hand_made_group_is_token_advantages(method):
    rows = credit_one.GROUP[:2]
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    entropy = torch.tensor([[0.6, 0.2, 0.1], [0.8, 0.1, 0.0]])
    options = credit_one.OPTIONS.get(method, {})
    A = SCRIPTS[method].token_advantages(torch.tensor([1.0, 0.0]), entropy, mask, torch.zeros(2), **options)
    assert credit_one.credit(method, rows) == [A[0].tolist(), A[1, :2].tolist()]


@pytest.mark.slow
def test_a_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    credit_one.draw("gtpo", tmp_path / "gtpo.png")
    assert (tmp_path / "gtpo.png").read_bytes().startswith(b"\x89PNG")


# --- the notebook -----------------------------------------------------------------------------------------------------


def notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(ROOT / "docs" / "first_run.ipynb", as_version=4)


def test_the_notebook_is_short_and_was_run_from_top_to_bottom():
    cells = notebook().cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 15
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    assert not re.search(r"/(home|root|tmp|Users)/", "".join(output.get("text", "") for output in outputs))


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_kernel(toy, toy_data, tmp_path):
    """On the toy base, with two short steps."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    book = notebook()
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
