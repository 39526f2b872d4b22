"""What is installed, as wheel and as checkout: one import name, whatever lies in the folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import kronscope
from tests import synthetic
from tests.app import test_browser

ROOT = Path(__file__).parents[1]
FOLDERS = ("diag", "optim", "studies", "app")
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SMALL = "digits-autoencoder-small"
ONE_POINT = "--epochs 1 --workers 1 --lr-factors 1 --damping-factors 1"
TINY = {  # what the README names -> the same in seconds
    "problems": "problems",
    "train": f"train {SMALL} --optimizer kfac --epochs 1 --measure 0.2",
    "measure": f"measure {SMALL} --block 4 --examples 16",
    "tune grid": f"tune grid {SMALL} --optimizer kfac {ONE_POINT}",
    "tune halving": f"tune halving {SMALL} --trials 1 --epochs 1 --workers 1",
    "tune searched": f"tune searched {SMALL} --optimizer adam --epochs 1 --workers 1",
    "demo": "demo --tiny --no-dashboard",
    "study error_along_training": "study error_along_training --tiny --optimizers adam --epochs 1",
    "study optimizers_compared": "study optimizers_compared --tiny --optimizers adam",
    "study equal_seconds": "study equal_seconds --tiny --optimizers adam",
    "study stability": "study stability --tiny --optimizers sgd --seeds 1",
    "study cures": "study cures --tiny --cures undoing --seeds 1",
    "study sharpness_along_training": "study sharpness_along_training --tiny --seeds 1 --steps 2",
    "study block_hessian_free": "study block_hessian_free --tiny",
    "dashboard": "dashboard --help",  # served below
    "report": "report results/train-*",
    **{f"bench {name}": "bench --help" for name in ("exact", "scale", "step", "hf", "loading")},
}
# Of the checkout, which all other tests run, one of each kind: searches, workers, data files.
AGAIN = ("problems", "train", "tune grid", "study optimizers_compared", "report")
DRIVER = """
import glob, json, runpy, sys, time
script, commands = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, script.rpartition("/")[0])  # as for any script
for command in commands:
    sys.argv = [script, *(found for word in command.split() for found in glob.glob(word) or [word])]
    began = time.time()
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    print(f"ended with {code or 0}: {command} in {time.time() - began:.1f} s", file=sys.stderr)
"""

browser, page = test_browser.browser, test_browser.page


def sub_packages():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            yield ".".join(("kronscope", *path.parent.relative_to(ROOT).parts))


def files():
    """All files of the checkout that git tracks or does not ignore, relative to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]


def test_the_packages_are_the_folders():
    assert sorted(BUILD["packages"]) == sorted(["kronscope", *sub_packages()])
    assert BUILD["package-dir"] == {"kronscope": "kronscope"} | {
        f"kronscope.{folder}": folder for folder in FOLDERS
    }


def test_every_file_that_is_no_module_is_package_data():
    data = [Path(name) for name in files() if name.startswith(FOLDERS) and name[-3:] != ".py"]
    packaged = {
        (package, name) for package, names in BUILD["package-data"].items() for name in names
    }
    assert packaged == {(".".join(("kronscope", *path.parent.parts)), path.name) for path in data}
    assert len(data) >= 2


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kronscope.__version__ == project["version"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_second_copy_is_refused(name):
    with pytest.raises(ImportError, match=f"import kronscope.{name}, not the folder {name}"):
        __import__(name)


def test_every_command_of_the_readme_has_a_tiny_form():
    (section,) = re.findall(
        r"^## The command line\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S
    )
    named = re.findall(r"^kronscope ((?:tune |study |bench )?\w+)", section, re.M)
    assert set(named) == set(TINY)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, built with this environment's setuptools."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the programs of a fresh environment with the wheel.

    Third-party packages come from this environment, after those of the fresh one; the checkout
    does not: a folder that a .pth file adds has no .pth files of its own.
    """
    fresh = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    python = fresh / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*command, wheel], check=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    ours = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (site / "others.pth").write_text("".join(f"{path}\n" for path in ours))
    return fresh / "bin"


@pytest.fixture(params=["wheel", "editable"])
def programs(request):
    """Folder of the programs of each installation: the wheel's, that of these tests."""
    if request.param == "wheel":
        return request.getfixturevalue("installed")
    return Path(sys.executable).parent


@pytest.fixture
def hostile(tmp_path):
    """A folder of somebody who uses our folders' names, and writes modules of no use to us."""
    for name in ("app.py", "diag.py", "optim.py", "studies/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} is none of Kronscope's')\n")
    return tmp_path


def said(*command, folder):
    """What a command prints in a folder; the test fails where the command does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


@pytest.mark.slow
def test_the_wheel_holds_one_name_and_every_file(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in held if ".dist-info/" not in name}
    sources = [name for name in files() if name.startswith(tuple(f"{f}/" for f in FOLDERS))]
    assert ours == {"kronscope/__init__.py"} | {f"kronscope/{name}" for name in sources}
    (scripts,) = (name for name in held if name.endswith("entry_points.txt"))
    assert "kronscope = kronscope." in zipfile.ZipFile(wheel).read(scripts).decode()


def is_of(file, programs):
    """Whether a module's file belongs to the installation of these programs."""
    mine = ROOT / "diag" if programs == Path(sys.executable).parent else programs.parent
    return Path(file).is_relative_to(mine)


@pytest.mark.slow
def test_it_is_imported_from_inside_the_checkout(programs):
    code = "import kronscope, kronscope.diag as d; print(kronscope.__version__, d.__file__)"
    version, file = said(programs / "python", "-c", code, folder=ROOT).split()
    assert version == kronscope.__version__
    assert is_of(file, programs)


@pytest.mark.slow
def test_the_example_of_the_readme_beside_files_of_the_same_names(programs, hostile):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = code.replace("epochs=4", "epochs=1").replace(":200]", ":20]")
    (hostile / "first.py").write_text(f"{code}\nprint(Problem.__module__, metrics.__file__)\n")
    *numbers, last = said(programs / "python", "first.py", folder=hostile).splitlines()
    assert len(numbers) >= 6
    assert all("(n = 20)" in line for line in numbers)
    name, file = last.split()
    assert name.startswith("kronscope.diag.")
    assert is_of(file, programs)


def in_one_process(programs, commands, folder):
    """Run `kronscope` with each of the commands: the program itself, with one import of torch."""
    (folder / "kronscope.py").write_text("raise RuntimeError('a script of somebody else')\n")
    commands = list(dict.fromkeys(commands))
    driver = [programs / "python", "-P", "-c", DRIVER, programs / "kronscope"]
    printed = said(*driver, json.dumps(commands), folder=folder)
    assert re.findall(r"^ended with (\d+): (.*) in", printed, re.M) == [("0", c) for c in commands]
    print(printed)
    return [path.parent.name for path in folder.glob("results/*/report.html")]


@pytest.mark.slow
def test_every_command_of_the_wheel_beside_files_of_the_same_names(installed, hostile):
    assert SMALL in said(installed / "kronscope", "problems", folder=hostile)
    assert len(in_one_process(installed, TINY.values(), hostile)) == 12


@pytest.mark.slow
def test_commands_of_the_checkout_beside_files_of_the_same_names(hostile):
    programs = Path(sys.executable).parent
    assert len(in_one_process(programs, [TINY[name] for name in AGAIN], hostile)) == 3


@pytest.mark.slow
@pytest.mark.browser
def test_the_dashboard_beside_files_of_the_same_names(programs, hostile, page):
    (hostile / "kronscope.py").write_text("raise RuntimeError('a script of somebody else')\n")
    synthetic.write_run(hostile / "results", steps=(0,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = hostile / "log.txt"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("KRONSCOPE_RESULTS", "PYTHONPATH")
    }
    command = [programs / "kronscope", "dashboard", "--port", port]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=hostile, env=environment, stdout=out, stderr=out, start_new_session=True
        ) as child,
    ):
        try:
            test_browser.wait_until_healthy(f"http://localhost:{port}", child, log)
            page.goto(f"http://localhost:{port}")
            test_browser.wait_for_figure(page)
            assert page.get_by_role("heading", name="Overview", exact=True).is_visible()
            assert page.locator("[data-testid=stException]").count() == 0
            assert "Traceback" not in page.inner_text("body")
        finally:
            os.killpg(child.pid, signal.SIGTERM)  # streamlit too, which the command started
