"""Each import contract of pyproject.toml is kept, and broken by one import that it forbids."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed")
ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
PUBLIC = "studies and app use only what an __init__ names"
FORBIDDEN = [  # contract, file, an import there that breaks this contract and no other
    (
        "arrows point down, diag and optim are strangers",
        "diag/estimate.py",
        "from kronscope.optim import KFAC",
    ),
    (
        "arrows point down, diag and optim are strangers",
        "studies/cli/printing.py",
        "from kronscope.app import common",
    ),
    (
        "diag, from the registries down to operators and problems",
        "diag/estimate.py",
        "from .problem import Problem",
    ),
    (
        "optim, from the methods down to blocks and linear algebra",
        "optim/linalg/basics.py",
        "from ..capture import hooks",
    ),
    ("no optimizer imports another", "optim/methods/kfac/kfac.py", "from ..ekfac import EKFAC"),
    (
        "studies, from the command down to data and records",
        "studies/results/runs.py",
        "from ..reports import summaries",
    ),
    (
        "the dashboard, from the entry down to what its pages share",
        "app/common.py",
        "from .views import overview",
    ),
    (PUBLIC, "studies/cli/main.py", "from kronscope.diag.operators.structures import Dense"),
    (PUBLIC, "studies/cli/main.py", "from ...diag.operators.structures import Dense"),
    (PUBLIC, "studies/cli/main.py", "import kronscope.diag.operators"),
    (PUBLIC, "studies/cli/main.py", "from kronscope.optim import core"),
    (PUBLIC, "app/common.py", "from kronscope.studies.results.records import read"),
    ("pages compute nothing", "app/common.py", "import torch"),
    ("optimizers stand on torch alone", "optim/linalg/basics.py", "import numpy"),
    ("the instrument draws and stores nothing", "diag/estimate.py", "import pandas"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages under their import name."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "kronscope", folder / "kronscope")
    for name in ("diag", "optim", "studies", "app"):
        shutil.copytree(ROOT / name, folder / "kronscope" / name)
    return folder


def broken(folder):
    """Names of the contracts that `lint-imports` reports as broken for the packages in a folder."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--config"]
    found = subprocess.run(
        [*command, ROOT / "pyproject.toml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", found.stdout, re.MULTILINE))
    assert verdicts.keys() == {contract["name"] for contract in CONTRACTS}, found.stdout
    assert found.returncode == ("BROKEN" in verdicts.values())
    return {name for name, verdict in verdicts.items() if verdict == "BROKEN"}


def test_all_are_kept(copy):
    assert not broken(copy)


def test_each_is_broken_below():
    assert {contract["name"] for contract in CONTRACTS} == {name for name, _, _ in FORBIDDEN}


@pytest.mark.parametrize(("contract", "file", "line"), FORBIDDEN, ids=lambda text: text)
def test_a_forbidden_import_is_reported(contract, file, line, copy):
    path = copy / "kronscope" / file
    before = path.read_text()
    try:
        path.write_text(f"{before}\n{line}\n")
        assert broken(copy) == {contract}
    finally:
        path.write_text(before)
