"""What the documents say is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_first_study_of_the_readme(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert len(code.splitlines()) <= 15
    lines = found.stdout.splitlines()
    layers = ["0", "2", "4", "5", "7", "9"]
    expected = [[str(step), layer] for step in (0, 20, 40) for layer in layers]
    assert [line.split()[:2] for line in lines] == expected
    assert all(line.count("(n = 200)") == 2 for line in lines)


def test_the_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^kronscope (\w+)", text, re.MULTILINE))
    assert len(commands) >= 6
    for command in commands:
        found = subprocess.run(
            [sys.executable, "-m", "kronscope.studies.cli.main", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr


def test_links_and_pictures_are_there():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} points to {target}"
