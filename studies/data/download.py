"""Downloader for pooch with a progress bar, which continues interrupted downloads."""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn
from urllib3.exceptions import HTTPError

PIECE = 1 << 18  # bytes
WAIT = 60  # seconds for a connection, and for each piece
COLUMNS = "{task.description}", BarColumn(), DownloadColumn(), TimeElapsedColumn()


def download(url: str, output: str, pup: pooch.Pooch) -> None:
    """Write the file at `url` to `output`; after # it is one of the archive there.

    Raises: OSError where it cannot be fetched or written, or the connection breaks.
    """
    address, _, member = url.partition("#")
    folder, name = Path(output).parent, Path(address).name
    if not member:
        part = folder / f"{name}.part"
        _resume(url, part)
        part.replace(output)
        return
    archive = pup.fetch(f"{folder.name}/{name}", downloader=download)
    with tarfile.open(archive) as tar, open(output, "wb") as file:
        found = next(each for each in tar if Path(each.name).name == member)
        shutil.copyfileobj(tar.extractfile(found), file)  # type: ignore[arg-type]  # it is a file


def _resume(url: str, part: Path) -> None:
    """Download what `part` lacks of the file at `url`; all of it where the server must.

    A file that changed on the server meanwhile is noticed by its checksum.
    """
    begun = part.stat().st_size if part.exists() else 0
    asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {})
    with requests.get(url, headers=asked, stream=True, timeout=WAIT) as response:
        said = response.headers.get("Content-Range", "")
        if begun and response.status_code in (206, 416) and not said.startswith(f"bytes {begun}-"):
            part.unlink()
            _resume(url, part)
            return
        response.raise_for_status()
        begun = begun if response.status_code == 206 else 0
        total = begun + int(response.headers.get("Content-Length", 0))
        with part.open("ab" if begun else "wb") as file:
            broken = _write(response.raw.stream(PIECE, decode_content=False), file, begun, total)
    found = part.stat().st_size
    if broken or found < total:
        raise OSError(f"{url} was cut off after {found} of {total} bytes") from broken


def _write(pieces: Iterator[bytes], file: BinaryIO, begun: int, total: int) -> HTTPError | None:
    """Write the pieces, with a progress bar; give the error of a connection that breaks."""
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as bar:
        what = f"fetching {Path(file.name).parent.name}: {Path(file.name).stem}"
        task = bar.add_task(what, total=total or None, completed=begun)
        try:
            for piece in pieces:
                file.write(piece)
                bar.advance(task, len(piece))
        except HTTPError as error:
            return error
    return None
