"""The methods' functions can be taken elsewhere: they need only torch, and the examples of docs/copying.md run."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from helpers import METHODS, ROOT
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
    """Source of the pure functions of a method, by name."""
    tree = ast.parse(inspect.getsource(METHODS[name]))
    return {f.name: ast.unparse(f) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name not in NOT_PURE}


PAGE = (ROOT / "docs" / "copying.md").read_text()


def run_blocked(code):
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=THIRD_PARTY) + code], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_examples_run_with_torch_alone():
    setup, *examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == len(METHODS) + 1 and all(len(e.strip().splitlines()) <= 10 for e in examples)
    done = run_blocked("".join(setup + e + "assert logprobs.grad.abs().sum() > 0\n" for e in examples))
    assert done.returncode == 0, done.stderr


def test_the_readme_quotes_the_loop_and_an_example_as_they_are():
    loop, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example in PAGE
    main = inspect.getsource(importlib.import_module("gtpo").main)
    code = [line.partition("  #")[0].strip() for line in loop.splitlines()]
    assert len(code) <= 13
    for line in code:
        start = line.partition("(rollout.rewards")[0]  # the call of token_advantages is longer in the script
        assert start in main, line


@pytest.mark.parametrize("name", METHODS)
def test_the_page_shows_every_function_that_is_not_a_helper(name):
    helpers = {"comparison_sets", "over_mean"}  # of gtpo.shaped_rewards and gtpo.advantages
    for function in pure_functions(name).keys() - helpers:
        assert (
            re.search(rf"^from {METHODS[name].__name__} import .*\b{function}\b", PAGE, re.MULTILINE)
            or function == "k3"
        ), function


@pytest.mark.parametrize("name", METHODS)
def test_pasted_functions_need_nothing_but_torch(name):
    """All of a method's functions run in a module that holds torch and Tensor and nothing else."""
    pasted = {"torch": torch, "Tensor": Tensor}
    for source in pure_functions(name).values():
        exec(source, pasted)
    script, rng = METHODS[name], torch.Generator().manual_seed(0)
    given = dict(
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 0]), group=torch.tensor([3, 8, 3, 8, 3, 8]), mask=torch.ones(6, 5),
        lengths=torch.tensor([5.0, 3, 4, 5, 2, 5]), punishment=torch.zeros(6), gamma=0.75, max_length=5, cache=2.0,
        max_new_tokens=5, ratio=torch.ones(6, 5),
        scope="batch", compare="column", mean="arithmetic", chosen=torch.eye(6, 5) > 0,
    )  # fmt: skip
    for key in (
        "entropy",
        "logprobs",
        "old_logprobs",
        "ref_logprobs",
        "reward_plus",
        "reward_minus",
        "shaped",
        "values",
        "uniforms",
    ):
        given[key] = torch.rand(6, 5, generator=rng)
    for function in pure_functions(name):
        wanted = getattr(script, function)
        parameters = inspect.signature(wanted).parameters.values()
        options = {p.name: given[p.name] for p in parameters if p.name in given}
        if "advantages" in {p.name for p in parameters}:
            options["advantages"] = (given["rewards"] - 0.5)[:, None].expand(6, 5)
        if function == "advantages" and "shaped" in options:
            options["shaped"] = given["rewards"] * 2 - 1
        torch.testing.assert_close(pasted[function](**options), wanted(**options), rtol=0, atol=0)
