"""Puts what the pages of the methods quote from the code into them: grpo.md, dapo.md, egsw.md, gtpo.md, grpo_s.md.

    python docs/build.py

A quote is what lies between `<!-- build: name arguments -->` and `<!-- end -->`. The rest of a page is written by hand.

    example N             a group that is made by hand: its first N completions, with their credit
    loop                  the training loop of the method's script
    diff [NAME ...]       what its functions change in grpo.py, without docstrings; these functions are left out
    options               its options, with default and help text
    metrics NAME ...      these lines of metrics.md
    details               the numbered deviations in its docstring

explorer.html gets the options of the scripts, with default and help text. Its completions stay.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

METHODS = ("grpo", "dapo", "egsw", "gtpo", "grpo_s")
QUOTE = re.compile(r"(<!-- build: (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str, method: str) -> str:
    """A method's page with all of its quotes renewed."""

    def quote(match: re.Match) -> str:
        begin, name, arguments, end = match.groups()
        content = QUOTES[name](method, *arguments.split())
        return begin + content.rstrip() + "\n" + end

    return QUOTE.sub(quote, text)


# --- the example ------------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    outcome: str  # right or wrong
    tokens: list[tuple[str, float]]  # text, and the entropy there in nats


GROUP = [  # completions of 7-2+4?
    Completion("right", [("7-2=5", 0.6), ("5+4=9", 0.2), ("∎", 0.1)]),
    Completion("wrong", [("8", 0.8), ("∎", 0.1)]),
    Completion("right", [("9", 0.4), ("∎", 0.1)]),
]
# DAPO needs a limit for the completions. With this one, the completion of three tokens loses half a point of reward.
EXAMPLE_OPTIONS = {"dapo": {"max_new_tokens": 4, "overlong_cache": 0.5}}


def example(method: str, size: str) -> str:
    """The credit of each token: token_advantages of the method's script, at its default options."""
    group = GROUP[: int(size)]
    T = max(len(completion.tokens) for completion in group)
    entropy = torch.zeros(len(group), T)
    mask = torch.zeros(len(group), T)
    for i, completion in enumerate(group):
        n = len(completion.tokens)
        entropy[i, :n] = torch.tensor([H for _, H in completion.tokens])
        mask[i, :n] = 1.0
    rewards = torch.tensor([float(completion.outcome == "right") for completion in group])
    script = importlib.import_module(method)
    A = script.token_advantages(rewards, entropy, mask, torch.zeros(len(group)), **EXAMPLE_OPTIONS.get(method, {}))
    text = "| completion | tokens, and the entropy H at each | credit of each |\n| --- | --- | --- |\n"
    for completion, credit in zip(group, A.tolist(), strict=True):  # credit: [T]
        tokens = [f"`{token}` {H}" for token, H in completion.tokens]
        numbers = [signed(x) for x in credit[: len(tokens)]]
        text += f"| {completion.outcome} | {', '.join(tokens)} | {', '.join(numbers)} |\n"
    return text


def signed(x: float) -> str:
    """A number with its sign and two digits. Zero has no sign."""
    return f"{x:+.2f}" if abs(x) >= 0.005 else "0"


# --- from the scripts and metrics.md ----------------------------------------------------------------------------------


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


def diff(method: str, *left_out: str) -> str:
    old = functions("grpo")
    new = functions(method)
    text = "```diff\n"
    for name in dict.fromkeys([*new, *old]):
        changes = list(difflib.unified_diff(old.get(name, []), new.get(name, []), lineterm="", n=0))
        if changes and name not in left_out:
            text += f"@@ {name} @@\n"
            text += "".join(f"{line}\n" for line in changes[2:] if not line.startswith("@@"))
    return text + "```"


def loop(method: str) -> str:
    main = inspect.getsource(importlib.import_module(method).main)
    return "```python\n" + textwrap.dedent(main.partition("with Run(cfg) as run:\n")[2]) + "```"


def details(method: str) -> str:
    docstring = inspect.getdoc(importlib.import_module(method))
    numbered = docstring[docstring.index("\n 1. ") + 1 :]
    return numbered.replace("experiments/RESULTS.md", "[experiments/RESULTS.md](../experiments/RESULTS.md)")


def options(method: str) -> str:
    text = "| option | default | what it is |\n| --- | --- | --- |\n"
    config = importlib.import_module(method).Config
    own = inspect.get_annotations(config)  # without the options that every run has
    for field in dataclasses.fields(config):
        if field.name in own:
            text += f"| `--{field.name.replace('_', '-')}` | {field.default} | {field.metadata['help']} |\n"
    return text


def metrics(method: str, *names: str) -> str:
    lines = (HERE / "metrics.md").read_text().splitlines()
    found = []
    for name in names:
        found += [line for line in lines if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    return "\n".join(["| metric | meaning |", "| --- | --- |", *found])


QUOTES = {
    "example": example, "diff": diff, "loop": loop, "details": details, "options": options, "metrics": metrics,
}  # fmt: skip


def main() -> None:
    for method in METHODS:
        path = HERE / f"{method}.md"
        path.write_text(page(path.read_text(), method))
    from experiments import credit

    explorer = credit.EXPLORER.read_text(encoding="utf-8")
    content = re.search(re.escape(credit.BEGIN) + "(.*?)</script>", explorer).group(1)
    credit.EXPLORER.write_text(credit.page(json.loads(content)["tasks"]), encoding="utf-8")


if __name__ == "__main__":
    main()
