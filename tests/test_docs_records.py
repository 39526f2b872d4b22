"""The records behind the documents' tables and figures can be read and drawn again."""

import shutil
from pathlib import Path

import pytest

from kronscope.studies.reports import report
from kronscope.studies.results import records

RUNS = sorted((Path(__file__).parents[1] / "docs" / "records").iterdir())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_records_of_the_docs_can_be_drawn(run, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    frame = records.read(copy)
    header = records.read_header(copy)
    assert header["status"] == "finished"
    assert set(header["config"]["optimizers"]) <= set(frame.optimizer)
    written = report.write_report(copy).read_text()
    assert "missing" not in written
    assert (copy / "figures" / "loss-epoch.png").stat().st_size > 10_000


def test_records_are_named_where_they_are_used():
    text = (Path(__file__).parents[1] / "docs" / "reproductions.md").read_text()
    for run in RUNS:
        assert f"`{run.name}`" in text
