"""What scikit-learn's fetchers lack: a progress bar, and going on where a download was cut off.

They read through `urllib.request.urlopen`. While `downloads` is open, the bytes of each large
response are also kept in a part file, and the next request for the same address asks for the rest
alone. The server's ETag says whether the part still is of the same file; the fetchers' own
checksums judge the whole.
"""

import hashlib
import os
import platform
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

LARGE = 1 << 20  # bytes; what is smaller is fetched anew, without a bar


@contextmanager
def downloads(what: str, parts: Path) -> Iterator[None]:
    """Show how far the downloads of `urlopen` are, and keep what a cut-off one got, in `parts`."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"fetching {what}", total=None)
        before = getattr(urllib.request, "_opener", None)  # no public name; None: the default one
        opener = urllib.request.build_opener(_Resuming(parts, progress))
        urllib.request.install_opener(opener)
        try:
            yield
        finally:
            urllib.request.install_opener(before)


class _Resuming(urllib.request.BaseHandler):
    def __init__(self, parts: Path, progress: Progress) -> None:
        self.parts, self.progress = parts, progress

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        """Ask for the rest of what a part file has the beginning of."""
        _take_over(self.parts, _key(request))
        for part in self.parts.glob(f"{_key(request)}-*.part"):
            tag = bytes.fromhex(part.stem.partition("-")[2]).decode()
            request.add_unredirected_header("Range", f"bytes={part.stat().st_size}-")
            request.add_unredirected_header("If-Range", tag)
        return request

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        """Keep the bytes of a large response, after those that the part file has already."""
        if response.code == 416:  # the part is of no use; without it the next try begins anew
            for part in self.parts.glob(f"{_key(request)}-*.part"):
                part.unlink(missing_ok=True)
        length = int(response.headers.get("Content-Length") or 0)
        if response.code not in (200, 206) or (response.code == 200 and length < LARGE):
            return response
        tag = response.headers.get("ETag", "")
        part = self.parts / f"{_key(request)}-{tag.encode().hex()}.part"
        if response.code == 206:
            return _Kept(response, part, length, self.progress)
        for stale in self.parts.glob(f"{_key(request)}-*.part"):
            stale.unlink(missing_ok=True)
        strong = tag.startswith('"') and len(tag) < 100
        return _Kept(response, part if strong else None, length, self.progress)

    https_request, https_response = http_request, http_response


def _key(request: urllib.request.Request) -> str:
    """Of the address without its query, which may be a signature made for each request."""
    address = urlsplit(request.full_url)
    return hashlib.sha256(f"{address.netloc}{address.path}".encode()).hexdigest()[:16]


def _in_use(part: Path) -> Path:
    """What a part file is called while this process writes to it."""
    return part.with_suffix(f".{os.getpid()}@{_host()}")


def _host() -> str:
    return platform.node().replace(".", "_")


def _take_over(parts: Path, key: str) -> None:
    """Make part files again of those whose process on this machine is dead."""
    for path in parts.glob(f"{key}-*.*@{_host()}"):
        try:
            os.kill(int(path.suffix[1:].partition("@")[0]), 0)
        except ProcessLookupError:
            path.replace(path.with_suffix(".part"))
        except PermissionError:
            pass  # it lives, and is another user's


class _Kept:
    """A response that is written to a part file while it is read.

    The part is renamed while it is in use, so that no other process writes to it.
    """

    def __init__(self, response: Any, part: Path | None, length: int, progress: Progress) -> None:
        self.response, self.part, self.progress = response, part, progress
        self.file, self.begun = None, 0
        if part is not None:
            self.own = _in_use(part)
            part.parent.mkdir(parents=True, exist_ok=True)
            if response.code == 206:
                self.begun = self._claim(part)
            self.file = self.own.open("r+b" if self.begun else "w+b")
        self.done, self.total = 0, self.begun + length
        self.task = progress.add_task("  downloading", total=self.total)

    def _claim(self, part: Path) -> int:
        try:
            part.replace(self.own)
        except FileNotFoundError as error:  # another process was faster
            self.response.close()
            raise URLError("another process goes on with this download") from error
        begun = self.own.stat().st_size
        if not self.response.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
            self.own.unlink()
            self.response.close()
            raise URLError("the server sent another part than asked for")
        return begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self.response, name)

    def read(self, amount: int | None = None) -> bytes:
        """Up to `amount` bytes, the kept ones first; all where None or negative."""
        if amount is None or amount < 0:
            return b"".join(iter(lambda: self.read(LARGE), b""))
        if self.file is not None and self.done < self.begun:
            content = self.file.read(min(amount, self.begun - self.done))
        else:
            content = self._read_on(amount)
        self.done += len(content)
        self.progress.update(self.task, completed=self.done)
        return content

    def _read_on(self, amount: int) -> bytes:
        try:
            content: bytes = self.response.read(amount)
        except (HTTPException, OSError) as error:
            raise URLError(f"cut off after {self.done} of {self.total} bytes: {error}") from error
        if not content and amount and self.done < self.total:
            raise URLError(f"cut off after {self.done} of {self.total} bytes")
        if self.file is not None:
            self.file.write(content)
        return content

    def close(self) -> None:
        """Leave the part file for the next try, or none when all was read."""
        self.response.close()
        self.progress.remove_task(self.task)
        if self.file is None or self.file.closed or self.part is None:
            return
        self.file.close()
        if self.done < self.total and self.own.stat().st_size:
            self.own.replace(self.part)
        else:
            self.own.unlink()

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
