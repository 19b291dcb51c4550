"""The shape of the repository: what stands on top, and that imports run one way."""

import ast
import re

from helpers import METHODS, ROOT, SCRIPTS

# Each may import only what stands before it.
ORDER = [
    "common", "verifier",
    "harness.options", "harness.rewards", "harness.files", "harness.tiny", "harness.evaluation", "harness.health",
    "harness.reporting", "harness.cuda_graphs", "harness.distributed", "harness.lora", "harness.memory",
    "harness.stop", "harness.data", "harness.policy", "harness.trainer", "harness.run",
    "grpo", "dapo", "egsw", "gtpo", "grpo_s",
    "more.forking", "more.cov", "more.entropy_advantage", "more.quantile", "more.cispo",
    "integrations.methods", "integrations.trl_trainer", "integrations.verl_plugin",
]  # fmt: skip


def imports(module):
    """The modules of this repository that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in ORDER}
    return found


def test_seven_python_files_stand_on_top():
    assert {path.stem for path in ROOT.glob("*.py")} == {"common", "verifier", *SCRIPTS}


def test_every_module_is_in_the_order_and_imports_only_what_stands_before_it():
    modules = {path.stem for path in ROOT.glob("*.py")}
    for folder in ("harness", "more", "integrations"):
        modules |= {f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
    assert modules == set(ORDER)
    for module in modules:
        later = [name for name in imports(module) if ORDER.index(name) >= ORDER.index(module)]
        assert not later, f"{module} imports {later}"


def test_a_script_imports_no_other_script():
    methods = {module.__name__ for module in METHODS.values()}
    for name in methods:
        assert not imports(name) & methods


def test_every_relative_link_of_a_page_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
