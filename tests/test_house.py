"""The structure of the repository: who may import whom; and what the suite itself rests on."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT, run

FILES = {path.stem: path for path in ROOT.glob("*.py")}
TOOLS = {f"tools.{path.stem}": path for path in (ROOT / "tools").glob("*.py")}


def imports_of(path):
    """The modules of this repository that a file imports, anywhere in it: at the top, or within a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & {*FILES, *TOOLS}


@pytest.mark.parametrize("name", [*FILES, *TOOLS])
def test_no_file_imports_itself_through_others(name):
    arrows = {module: imports_of(path) for module, path in {**FILES, **TOOLS}.items()}
    reached, todo = set(), [*arrows[name]]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += arrows[module]
    assert name not in reached


@pytest.mark.parametrize("name", FILES)
def test_nothing_at_the_top_imports_a_tool(name):
    assert not [module for module in imports_of(FILES[name]) if module.startswith("tools.")]


@pytest.mark.parametrize("name, ours", [("cli", set()), ("reward", {"equality"}), ("equality", {"notation"}), ("notation", set())])
def test_what_is_made_to_be_copied_or_used_by_all_imports_no_more_of_ours(name, ours):
    assert {*imports_of(FILES[name])} == ours


def test_formulas_come_first():
    lines = (ROOT / "sppo.py").read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("def sequence_advantages")) < 60


@pytest.mark.parametrize("script", ["sppo", "eval"])
def test_help_waits_for_no_library_that_only_a_run_needs(script):
    """Each of these takes a second or more to import."""
    slow = ("vllm", "transformers", "torch.distributed.tensor", "sympy", "datasets")
    code = f"import sys, {script}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_a_run_is_forked_from_is_frozen(tmp_path):
    """What conftest.py cannot load, it passes over: then the suite would be slower, and nobody told."""
    (tmp_path / "frozen.py").write_text("import gc, sys; print(gc.get_freeze_count() > 100_000, 'matplotlib.figure' in sys.modules)")
    assert run(tmp_path / "frozen.py").stdout == "True True\n"
