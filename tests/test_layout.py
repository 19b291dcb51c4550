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


def prose(page):
    """A page without its fenced blocks of code, in which nothing is a heading or a link."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link counts as its text
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{name}-{n}" if (n := sum(other == name for other in found)) else name)
    return found


def test_anchors_are_named_as_github_names_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One, two: `three@4`\n## EGSW's *α* and [a link](x.md)\n```\n# code\n```\n## a_b -- c\n## Same\n## Same\n"
    )
    assert anchors(page) == ["one-two-three4", "egsws-α-and-a-link", "a_b----c", "same", "same-1"]


def test_every_relative_link_and_anchor_of_a_page_leads_somewhere():
    wrong = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page))
        for target in ("".join(link) for link in links):
            if ":" in target:
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong
