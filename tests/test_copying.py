"""The methods' functions can be taken elsewhere: they need only torch, and the examples of docs/copying.md run."""

import builtins
import dis
import inspect
import re
import subprocess
import sys
import types

import pytest
from helpers import METHODS, ROOT, SCRIPTS

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""
THIRD_PARTY = ("transformers", "datasets", "tokenizers", "tqdm", "math_verify", "matplotlib", "huggingface_hub")


def pure_functions(name):
    """The names of a method's pure functions."""
    script = METHODS[name]
    functions = [f for f in vars(script).values() if inspect.isfunction(f) and f.__module__ == script.__name__]
    return {f.__name__ for f in functions} - {"main", "dynamic_sampling"}  # these two take a Run


PAGE = (ROOT / "docs" / "copying.md").read_text()


@pytest.mark.slow
def test_the_examples_run_with_torch_alone():
    setup, *examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == len(METHODS) + 1 and all(len(e.strip().splitlines()) <= 10 for e in examples)
    code = BLOCK.format(names=THIRD_PARTY) + "".join(
        setup + e + "assert logprobs.grad.abs().sum() > 0\n" for e in examples
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_quotes_the_loop_and_an_example_as_they_are():
    loop, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example in PAGE
    code = [line.partition("  #")[0].strip() for line in loop.splitlines()]
    code = [line.partition("(rollout.rewards")[0] for line in code]  # this call is longer in the scripts
    mains = [inspect.getsource(script.main) for script in SCRIPTS.values()]
    assert len(code) <= 15 and any(all(line in main for line in code) for main in mains)


@pytest.mark.parametrize("name", METHODS)
def test_the_page_shows_every_function_that_is_not_a_helper(name):
    helpers = {"comparison_sets", "relative_to_mean", "standardized", "k3"}  # k3 is shown once, for GRPO
    for function in pure_functions(name) - helpers:
        assert re.search(rf"^from {METHODS[name].__name__} import .*\b{function}\b", PAGE, re.MULTILINE), function


@pytest.mark.parametrize("name", METHODS)
def test_the_functions_use_nothing_but_torch_and_each_other(name):
    functions = pure_functions(name)
    allowed = {"torch", "Tensor", *functions, *dir(builtins)}
    for function in functions:
        codes = [getattr(METHODS[name], function).__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            assert used <= allowed, f"{function}: {used - allowed}"
