"""The shape of the repository: what stands on top, that imports run one way, and that links lead somewhere."""

import ast
import re
from graphlib import TopologicalSorter

from helpers import METHODS, ROOT, SCRIPTS

FOLDERS = ("harness", "tasks", "more", "integrations")
MODULES = {path.stem for path in ROOT.glob("*.py")}
MODULES |= {f"{folder}.{path.stem}" for folder in FOLDERS for path in (ROOT / folder).glob("[!_]*.py")}


def imports(module):
    """The modules of this repository that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES


def test_seven_python_files_stand_on_top():
    assert {path.stem for path in ROOT.glob("*.py")} == {"common", "verifier", *SCRIPTS}


def test_imports_run_one_way():
    """Methods import harness/ and the shared files; these import no method, and verifier.py imports nothing. No two
    modules need each other."""
    methods = {module.__name__ for module in METHODS.values()}
    graph = {module: imports(module) for module in MODULES}
    assert not graph["verifier"] and graph["common"] == {"harness.decoder"}
    for module, imported in graph.items():
        if not module.startswith("integrations."):
            assert not imported & methods and not any(name.startswith("integrations.") for name in imported), module
    TopologicalSorter(graph).prepare()  # CycleError if imports run in a circle


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
