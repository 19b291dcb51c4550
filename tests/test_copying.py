"""The functions of the scripts can be taken elsewhere: they need torch alone, and the README's examples of it run."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_run import SCRIPTS
from torch import Tensor

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""
THIRD_PARTY = (
    "transformers",
    "datasets",
    "tokenizers",
    "tqdm",
    "math_verify",
    "matplotlib",
    "huggingface_hub",
)
NOT_PURE = ("main", "dynamic_sampling")  # these two take a Run


def pure_functions(name):
    """Source of the pure functions of a script, by name."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    return {f.name: ast.unparse(f) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name not in NOT_PURE}


def section():
    text = (ROOT / "README.md").read_text()
    return text[text.index("## Copy a function") : text.index("## The logged metrics")]


def run_blocked(code):
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=THIRD_PARTY) + code], cwd=ROOT, capture_output=True, text=True
    )


def test_the_readme_s_examples_run_with_torch_alone():
    setup, *examples = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
    assert len(examples) == len(SCRIPTS) and all(len(e.strip().splitlines()) <= 10 for e in examples)
    done = run_blocked("".join(setup + e + "assert logprobs.grad.abs().sum() > 0\n" for e in examples))
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    assert "tqdm is blocked" in run_blocked("import tqdm").stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_shows_every_function_that_is_not_a_helper(name):
    helpers = {"comparison_sets", "share"}  # of gtpo.shaped_rewards and gtpo.advantages
    for function in pure_functions(name).keys() - helpers:
        assert re.search(rf"^from {name} import .*\b{function}\b", section(), re.MULTILINE) or function == "k3"


@pytest.mark.parametrize("name", SCRIPTS)
def test_pasted_functions_give_what_the_script_s_give(name):
    """All of a script's functions, pasted into a module that has torch and Tensor and nothing else."""
    pasted = {"torch": torch, "Tensor": Tensor}
    for source in pure_functions(name).values():
        exec(source, pasted)
    script, rng = importlib.import_module(name), torch.Generator().manual_seed(0)
    given = dict(
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 0]), group=torch.tensor([3, 8, 3, 8, 3, 8]), mask=torch.ones(6, 5),
        lengths=torch.tensor([5.0, 3, 4, 5, 2, 5]), punishment=torch.zeros(6), gamma=0.75, max_length=5, cache=2.0,
        scope="batch", compare="column", mean="arithmetic",
    )  # fmt: skip
    for key in ("entropy", "logprobs", "old_logprobs", "ref_logprobs", "plus", "minus", "shaped", "values"):
        given[key] = torch.rand(6, 5, generator=rng)
    for function in pure_functions(name):
        wanted = getattr(script, function)
        parameters = inspect.signature(wanted).parameters.values()
        options = {p.name: given[p.name] for p in parameters if p.name in given}
        if "advantages" in {p.name for p in parameters}:
            options["advantages"] = given["rewards"] - 0.5
        if function == "advantages" and "shaped" in options:
            options["shaped"] = given["rewards"] * 2 - 1
        torch.testing.assert_close(pasted[function](**options), wanted(**options), rtol=0, atol=0)
