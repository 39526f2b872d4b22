"""The frame of a study's run: its folder, its header, and what became of it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studies import provenance, records


@contextmanager
def running(
    study: str,
    config: Mapping[str, Any],
    question: str,
    results: Path,
    resume: Path | None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Inside, (folder, header) of the run; the header is written at both ends, however it ends.

    config: of the study, its "problem" among it. resume: the folder of an earlier run on the same
    problem, whose seconds count on.

    Raises: ValueError for a folder of another study or problem.
    """
    begun, problem = time.perf_counter(), str(config["problem"])
    earlier = 0.0 if resume is None else _earlier(resume, study, problem)
    folder = resume or records.new_run(results, study)
    header = provenance.header(study, problem, "cpu", dict(config))
    header |= {"question": question, "seconds": earlier}
    records.write_header(folder, header)
    try:
        yield folder, header
        header["status"] = "finished"
    except BaseException as error:
        header["status"] = f"failed: {error or type(error).__name__}"
        raise
    finally:
        header["seconds"] += time.perf_counter() - begun
        records.write_header(folder, header)


def _earlier(folder: Path, study: str, problem: str) -> float:
    header = records.read_header(folder)
    found = (header.get("study"), header.get("problem"))
    if found != (study, problem):
        raise ValueError(f"{folder} holds study and problem {found}, not {(study, problem)}")
    return float(header["seconds"])
