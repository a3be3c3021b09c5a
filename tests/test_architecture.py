"""The house keeps its own rules: start-up, public names, the error tree, the documents."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvprism
from kvprism import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kvprism"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

HELP_AND_MODULES = """
import runpy, sys
sys.argv = ["kvprism", *sys.argv[1:], "--help"]
try:
    runpy.run_module("kvprism", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "matplotlib", "pydantic", "rich"}
print("loaded:", *sorted(heavy & set(sys.modules)))
"""

needs_cli = pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="no cli.py")


@needs_cli
@pytest.mark.parametrize("command", ["", "eval", "eval ruler"])
def test_help_imports_no_heavy_library(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_AND_MODULES, *command.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: ") and f"kvprism {command}".strip() in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_public_names_are_sorted_and_exist() -> None:
    assert list(kvprism.__all__) == sorted(set(kvprism.__all__))
    assert [name for name in kvprism.__all__ if not hasattr(kvprism, name)] == []


def test_the_drawn_error_tree_is_the_real_one() -> None:
    assert dict(drawn_tree(errors.__doc__ or "")) == dict(class_tree(errors))


def drawn_tree(docstring: str) -> Iterator[tuple[str, str | None]]:
    """(class, parent) for each line of the tree, by its indentation."""
    ancestors: list[str] = []
    for indent, name in re.findall(r"^( *)(\w+)", docstring.split("\n\n", 1)[1], re.MULTILINE):
        del ancestors[len(indent) // 4 :]
        yield name, ancestors[-1] if ancestors else None
        ancestors.append(name)


def class_tree(module: ModuleType) -> Iterator[tuple[str, str | None]]:
    """(class, parent) for each error; parents from elsewhere, as ValueError, are left out."""
    for name, member in vars(module).items():
        if isinstance(member, type) and issubclass(member, errors.KVPrismError):
            own = [b.__name__ for b in member.__bases__ if issubclass(b, errors.KVPrismError)]
            yield name, own[0] if own else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_runs_no_code_that_arrives_as_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {name.split(".")[0] for name in imports_of(tree)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert imported.isdisjoint({"pickle", "marshal", "shelve", "dill", "cloudpickle"})
    assert called.isdisjoint({"eval", "exec", "torch.load", "torch.save", "numpy.load", "np.load"})


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings_are_true(path: Path) -> None:
    if path.name == "__main__.py":
        pytest.skip("importing it runs the command line")
    imported = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
    for extra in ("triton", "vllm"):
        if extra in imported and find_spec(extra) is None:
            pytest.skip(f"it imports {extra}, which is not installed here")
    module = importlib.import_module(module_name(path))
    assert doctest.testmod(module).failed == 0


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runnable_blocks(path: Path) -> list[str]:
    """The document's code blocks that are marked `python run`, each at its own line number."""
    text = path.read_text()
    blocks = re.finditer(r"^```python run\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def test_the_readme_has_an_example_that_runs() -> None:
    assert runnable_blocks(README)


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if runnable_blocks(path)], ids=lambda path: path.name
)
def test_code_in_the_documents_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in runnable_blocks(path):
        exec(compile(block, str(path), "exec"), namespace)


def test_the_evidence_pages_show_what_was_measured() -> None:
    command = [sys.executable, "-m", "bench.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_house_picture_shows_every_module() -> None:
    real = {str(path.relative_to(PACKAGE)) for path in SOURCES if path.parent == PACKAGE}
    real |= {str(p.relative_to(PACKAGE)) for p in SOURCES if p.name != "__init__.py"}
    drawn = set(house_picture(ROOT / "docs" / "data-path.md"))
    assert sorted(real - drawn) == [], "modules that the picture lacks"
    assert sorted(drawn - real) == [], "modules that the picture invents"


def house_picture(path: Path) -> Iterator[str]:
    """Paths below `src/kvprism/` in the document's first code block; indentation is the folder."""
    folders: list[str] = []
    picture = path.read_text().split("```")[1]
    for indent, name in re.findall(r"^( +)([\w.]+(?:\.py|/))", picture, re.MULTILINE):
        del folders[len(indent) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            yield "".join(folders) + name
