"""The report is one file that says what the numbers say, whatever state the run is in."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kronscope.studies.reports.report import table, write_report
from kronscope.studies.results import records
from tests.synthetic import HEADER, SIZES, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    sizes = {name: SIZES[name] for name in ("0", "10")}
    return write_run(folder, optimizers=("kbfgs",), steps=(0, 100), sizes=sizes)


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text()


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


class Addresses(HTMLParser):
    """Everything that a page loads or links to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):  # noqa: ARG002
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset")]


def test_is_one_file_without_outside_resources(html):
    page = Addresses()
    page.feed(html)
    assert len(page.found) == 6
    assert all(address.startswith("data:image/png;base64,") for address in page.found)
    assert "<script" not in html
    assert "url(" not in html


def test_says_what_was_measured(html):
    for text in (
        "Error along training",
        "digits-autoencoder",
        "<b>finished</b>",
        "Exact GGN, kbfgs at step 100",
        "Final losses",
        "What the metrics mean",
        "min_{L, R} relative_error(L ⊗ R)",
        "Provenance",
        "0123456789abcdef",
        "2.13.0",
    ):
        assert text in html
    assert "notice" not in re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL)


def test_saves_its_figures(run, html):
    saved = sorted(path.name for path in (run / "figures").iterdir())
    assert saved == [
        "loss.png",
        "matrices-kbfgs.png",
        "relative_error-ggn-kbfgs.png",
        "relative_error-hessian-kbfgs.png",
        "step_cosine-ggn.png",
        "step_cosine-hessian.png",
    ]
    assert html.count("<figure>") == len(saved)
    assert not list(run.glob(".*"))  # no temporary files left


def test_marks_the_nearest_to_the_best(run):
    frame, header = records.read(run), records.read_header(run)
    rows = {row["approximation"]: row["cells"] for row in table(frame, "ggn", header)["rows"]}
    assert all(best for _, best in rows["kfac"])
    assert not any(best for name in rows.keys() - {"kfac"} for _, best in rows[name])
    assert not any(best for row in table(frame, "ggn", {})["rows"] for _, best in row["cells"])


def test_a_run_that_has_just_started(copy):
    for name in ("records", "matrices", "figures"):
        shutil.rmtree(copy / name, ignore_errors=True)
    records.write_header(copy, HEADER | {"status": "running"})
    html = write_report(copy).read_text()
    assert "status: running" in html
    assert "No records yet" in html
    assert "<figure>" not in html


def test_a_damaged_part_and_a_missing_header_are_said(copy):
    shutil.rmtree(copy / "matrices")
    (copy / "header.json").unlink()
    (copy / "records" / "part-00001.parquet").write_bytes(b"torn")
    html = write_report(copy).read_text()
    assert "part-00001.parquet" in html
    assert "header.json is missing" in html
    assert "<figure>" in html


def test_text_from_the_run_is_escaped(copy):
    for name in ("records", "matrices"):
        shutil.rmtree(copy / name)
    header = HEADER | {"status": "failed: <script>alert(1)</script>"}
    records.write_header(copy, header | {"config": {"a": "</pre><script>"}})
    assert "<script>" not in write_report(copy).read_text()


def test_no_such_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")
