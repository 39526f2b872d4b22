"""The documents: tables generated from the registries, code blocks run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kronscope.diag.exact import TRUTHS
from kronscope.diag.registry import Approximation, Metric, approximation, metric

HERE = Path(__file__)
DOCS = HERE.parents[1] / "docs"
METHODS, GUIDE = DOCS / "methods.md", DOCS / "diag.md"
GUIDES = {GUIDE: 20, DOCS / "optim.md": 4}  # at least so many prints in each
REWRITE = "KRONSCOPE_WRITE_DOCS"

BEGIN, END = "<!-- computed: begin -->\n", "<!-- computed: end -->"
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
COMMENT = re.compile(r"  # (.*)$")


def first_line(function):
    return function.__doc__.splitlines()[0]


def cell(text):
    if text.startswith("`"):
        return text.replace("|", r"\|")
    return re.sub(r"([|*<])", r"\\\1", text)  # what Markdown would take for a mark of its own


def table(title, head, rows):
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def approximation_row(entry: Approximation):
    kind = f"{entry.kind}, damping inside" if entry.damping_inside else entry.kind
    exact_on = ", ".join(f"`{case}`" for case in entry.exact_on)
    meaning = first_line(entry.function)
    return f"`{entry.name}`", f"`{entry.of}`", kind, exact_on, entry.reference, meaning


def metric_row(entry: Metric):
    needs = ", ".join(f"`{keyword}`" for keyword in entry.needs)
    return f"`{entry.name}`", f"`{entry.formula}`", entry.range, entry.best, needs, entry.reference


def made():
    truths = [(f"`{name}`", first_line(function)) for name, function in TRUTHS.items()]
    known = [approximation_row(approximation[name]) for name in sorted(approximation)]
    judges = [metric_row(metric[name]) for name in sorted(metric)]
    about = ["name", "approximates", "kind", "exact on", "reference", "what it is"]
    return "\n\n".join(
        [
            table("Truths", ["name", "what it is"], truths),
            table("Approximations", about, known),
            table("Metrics", ["name", "formula", "range", "best", "needs", "reference"], judges),
        ]
    )


def test_the_tables_are_those_of_the_registries():
    before, _, rest = METHODS.read_text(encoding="utf-8").partition(BEGIN)
    computed, end, after = rest.partition(END)
    assert end, f"{METHODS.name} has lost its mark {END}"
    text = made() + "\n"
    if os.environ.get(REWRITE):
        METHODS.write_text(before + BEGIN + text + END + after, encoding="utf-8")
    again = f"{REWRITE}=1 python -m pytest tests/{HERE.name}; git diff docs"
    assert computed == text, (
        f"docs/{METHODS.name} is not what the registries say; see what: {again}"
    )


def test_the_tables_are_whole():
    rows = [line for line in made().splitlines() if line.startswith("| `")]
    assert len(rows) == len(TRUTHS) + len(approximation) + len(metric) >= 54
    assert all(first_line(e.function).endswith((".", "?")) for e in approximation.values())


def test_every_exactness_case_is_explained():
    by_hand = METHODS.read_text(encoding="utf-8").partition(BEGIN)[0]
    explained = set(re.findall(r"^- `(\w+)`:", by_hand, re.MULTILINE))
    assert explained == {case for entry in approximation.values() for case in entry.exact_on}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_the_code_of_the_guides_prints_what_its_comments_say(guide, tmp_path):
    """All blocks in order in one namespace; a print at the margin prints one line."""
    code = "\n".join(FENCED.findall(guide.read_text(encoding="utf-8")))
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    prints = [line for line in code.splitlines() if line.startswith("print(")]
    said = [match and match[1] for match in map(COMMENT.search, prints)]
    lines = found.stdout.splitlines()
    assert len(lines) == len(prints) >= GUIDES[guide]
    pairs = [(text, line) for text, line in zip(said, lines, strict=True) if text is not None]
    assert len(pairs) >= 0.7 * len(prints)
    assert [line for _, line in pairs] == [text for text, _ in pairs]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_names_in_the_guide_exist():
    """What the guide calls a metric or an approximation of a module is one."""
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(approximations|metrics)\.(\w+)", text))
    known = {"approximations": approximation, "metrics": metric}
    assert len(named) >= 7
    assert not [name for folder, name in named if name != "registry" and name not in known[folder]]
