"""Puts what the pages of the methods quote from code, help texts and tables into them: grpo.md, dapo.md, ...

    python docs/build.py

A quote stands between `<!-- build: name arguments -->` and `<!-- end -->`. The rest of a page is written by hand.

    example N             the hand-made group of experiments/credit_one.py, its first N completions, with their credit
    loop                  the training loop of the method's script
    diff [NAME ...]       what its functions change in grpo.py, without docstrings; these functions are left out
    options               its options: default, help text, and the tables that vary it
    metrics NAME ...      these lines of metrics.md
    details               the numbered deviations in its docstring
    table HEADING [| RUN, ...]
                          the first table below a heading of experiments/tables.md: its first run, and the runs with
                          these names, or those of the method. `*` stands for any text, also in the heading.

A heading that tables.md does not have gives nothing, because the tables may be measured in parts.
"""

import ast
import dataclasses
import difflib
import fnmatch
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

METHODS = ("grpo", "dapo", "egsw", "gtpo", "grpo_s")
QUOTE = re.compile(r"(<!-- build: (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE_NAMES = {"weight_temperature": "P"}  # options that tables.md calls by another name


def page(text: str, method: str, tables: str) -> str:
    """A method's page with all of its quotes made anew. tables: the text of tables.md."""

    def quote(match: re.Match) -> str:
        begin, name, arguments, end = match.groups()
        function = globals()[f"quote_{name}"]
        content = function(method, arguments.strip(), tables)
        return begin + content.rstrip() + "\n" * bool(content) + end

    return QUOTE.sub(quote, text)


# --- from the scripts -------------------------------------------------------------------------------------------------


def quote_example(method: str, arguments: str, tables: str) -> str:
    from experiments import credit_one

    text = "| completion | tokens, and the entropy H at each | credit of each |\n| --- | --- | --- |\n"
    rows = credit_one.GROUP[: int(arguments)]
    for row, credit in zip(rows, credit_one.credit(method, rows), strict=True):
        tokens = [f"`{token}` {H}" for token, H in row.tokens]
        numbers = [credit_one.signed(x) for x in credit]
        text += f"| {row.outcome()} | {', '.join(tokens)} | {', '.join(numbers)} |\n"
    return text


def functions(method: str) -> dict[str, list[str]]:
    """The code of a script's functions, without docstrings and blank lines, by name."""
    source = (ROOT / f"{method}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            if ast.get_docstring(node):
                docstring = node.body[0]
                del lines[docstring.lineno - node.lineno : docstring.end_lineno - node.lineno + 1]
            found[node.name] = [line for line in lines if line]
    return found


def quote_diff(method: str, arguments: str, tables: str) -> str:
    old, new = functions("grpo"), functions(method)
    lines = []
    for name in dict.fromkeys([*new, *old]):
        changes = list(difflib.unified_diff(old.get(name, []), new.get(name, []), lineterm="", n=0))
        if changes and name not in arguments.split():
            lines.append(f"@@ {name} @@")
            lines += [line for line in changes[2:] if not line.startswith("@@")]
    return "```diff\n" + "\n".join(lines) + "\n```"


def quote_loop(method: str, arguments: str, tables: str) -> str:
    main = inspect.getsource(importlib.import_module(method).main)
    return "```python\n" + textwrap.dedent(main.partition("with Run(cfg) as run:\n")[2]) + "```"


def quote_details(method: str, arguments: str, tables: str) -> str:
    docstring = inspect.getdoc(importlib.import_module(method))
    details = docstring[docstring.index("\n 1. ") + 1 :]
    return details.replace("experiments/RESULTS.md", "[experiments/RESULTS.md](../experiments/RESULTS.md)")


def quote_options(method: str, arguments: str, tables: str) -> str:
    text = "| option | default | what it is | measured in |\n| --- | --- | --- | --- |\n"
    config = importlib.import_module(method).Config
    own = inspect.get_annotations(config)  # without the options that every run has
    for field in dataclasses.fields(config):
        if field.name in own:
            flag = "--" + field.name.replace("_", "-")
            links = ", ".join(tables_with(method, field.name, tables)) or "not measured"
            text += f"| `{flag}` | {field.default} | {field.metadata['help']} | {links} |\n"
    return text


# --- from metrics.md and tables.md ------------------------------------------------------------------------------------


def quote_metrics(method: str, arguments: str, tables: str) -> str:
    lines = (HERE / "metrics.md").read_text().splitlines()
    found = []
    for name in arguments.split():
        found += [line for line in lines if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    return "\n".join(["| metric | meaning |", "| --- | --- |", *found])


def sections(tables: str) -> dict[str, list[str]]:
    """The lines of the first table below each heading of tables.md, by heading."""
    found = {}
    for section in tables.split("\n### ")[1:]:
        heading, _, text = section.partition("\n\n")
        found[heading] = text.partition("\n\n")[0].splitlines()
    return found


def link(label: str, heading: str) -> str:
    """A link to a heading of tables.md, under the name that GitHub gives it."""
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{label}](../experiments/tables.md#{slug})"


def run_of(line: str) -> str:
    """The name of the run that a line of a table is about."""
    return line.split("|")[1].strip()


def tables_with(method: str, option: str, tables: str) -> list[str]:
    """Links to the tables that have runs of the method with this option given. One for each question: the first."""
    links = {}
    name = TABLE_NAMES.get(option, option)
    for heading, lines in sections(tables).items():
        question = re.split("[,:]", heading)[0]
        runs = [run_of(line) for line in lines]
        if any(run.startswith(f"{method} ") and f" {name}=" in run for run in runs):
            links.setdefault(question, link(question, heading))
    return list(links.values())


def quote_table(method: str, arguments: str, tables: str) -> str:
    heading, _, names = arguments.partition(" | ")
    patterns = names.split(", ") if names else [method, f"{method} *"]
    found = [(name, lines) for name, lines in sections(tables).items() if fnmatch.fnmatchcase(name, heading)]
    if not found:
        return ""
    heading, (header, rule, first, *others) = found[0]
    others = [line for line in others if any(fnmatch.fnmatchcase(run_of(line), pattern) for pattern in patterns)]
    return "\n".join([f"{link(heading, heading)}:\n", header, rule, first, *others])


def main() -> None:
    tables = (ROOT / "experiments" / "tables.md").read_text()
    for method in METHODS:
        path = HERE / f"{method}.md"
        path.write_text(page(path.read_text(), method, tables))


if __name__ == "__main__":
    main()
