"""Folder, header and final status of a study's run."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import options, provenance, records


@contextmanager
def running(
    study: str,
    config: Mapping[str, Any],
    question: str | None,
    results: Path,
    resume: Path | None,
    fixed: Sequence[str] = (),
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Context of a run: (folder, header); the header is written at its start and at any end.

    config: of the study, its "problem" among it. question: its first line is kept.
    resume: the folder of an earlier run on the same problem, whose seconds count on and whose
    tables stay until there are new ones.
    fixed: settings that must be as they were, for what is kept was made with them.

    Raises: ValueError for a folder of another study or problem, or with other fixed settings, and
    as `options.options`.
    """
    options.options(config)
    begun, problem = time.perf_counter(), str(config["problem"])
    header = provenance.header(study, problem, str(config.get("device", "cpu")), config)
    header["question"] = (question or "").partition("\n")[0]
    if resume is not None:
        earlier = _earlier(resume, study, config, fixed)
        header = provenance.again(earlier, header) | {"seconds": float(earlier["seconds"])}
    folder = resume or records.new_run(results, study)
    records.write_header(folder, header)
    try:
        yield folder, header
        header["status"] = header["status"].replace("running", "finished")
    except BaseException as error:
        header["status"] = f"failed: {error or type(error).__name__}"
        raise
    finally:
        header["seconds"] += time.perf_counter() - begun
        records.write_header(folder, header)


def _earlier(
    folder: Path, study: str, config: Mapping[str, Any], fixed: Sequence[str]
) -> dict[str, Any]:
    header, wanted = records.read_header(folder), (study, str(config["problem"]))
    found = (header.get("study"), header.get("problem"))
    if found != wanted:
        raise ValueError(f"{folder} holds study and problem {found}, not {wanted}")
    for name in fixed:
        old, new = header.get("config", {}).get(name), config[name]
        if (list(new) if isinstance(new, tuple) else new) != old:
            raise ValueError(f"the run to go on with has {name} {old}, not {new}")
    return header
