"""The examples of every docstring, run under the one import name.

`pytest --doctest-modules diag` would import a second copy of each module, with registries of its
own.
"""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("diag", "optim", "studies")


def found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for package in (f"kronscope.{name}" for name in FOLDERS):
        face = importlib.import_module(package)
        names = [m.name for m in pkgutil.walk_packages(face.__path__, f"{package}.")]
        for name in [package, *names]:
            module = importlib.import_module(name)
            yield from (test for test in finder.find(module, name) if test.examples)


TESTS = list(found())


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name.removeprefix("kronscope."))
def test_example(test):
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)


def test_none_is_missing():
    """As many as there are docstrings with an example in the files."""
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    assert len(TESTS) == sum(">>> " in text for text in texts)
    assert len(TESTS) >= 60
