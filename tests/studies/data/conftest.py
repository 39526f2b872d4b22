"""Empty folders of data and cache, and a server of files on this machine."""

import dataclasses
import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kronscope.studies.data import published


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def nowhere(cache, monkeypatch):
    """No folder of data, an empty cache."""
    monkeypatch.delenv("KRONSCOPE_DATA", raising=False)
    return cache


@pytest.fixture
def folder(cache, monkeypatch):
    """An empty folder of data and an empty cache."""
    monkeypatch.setenv("KRONSCOPE_DATA", str(cache.parent))
    return cache.parent


@dataclasses.dataclass
class Site:
    """Files by path, how they are served, and what was asked for: paths and ranges."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    cut: int | None = None  # bytes of an answer
    ranges: str = "served"  # or "ignored", "wrong"
    status: int | None = None
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self):
        site, path, asked = self.site, self.path.lstrip("/"), self.headers.get("Range")
        site.asked.append((path, asked))
        if site.status or path not in site.files:
            self.send_error(site.status or 404)
            return
        content = site.files[path]
        begun = int(asked[6:-1]) if asked and site.ranges != "ignored" else 0
        if begun >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begun else 200)
        if begun:
            begun -= site.ranges == "wrong"
            self.send_header("Content-Range", f"bytes {begun}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begun))
        self.end_headers()
        self.wfile.write(content[begun:][: site.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    """A server on this machine that has no files yet."""
    found = Site()
    handler = type("Of", (Handler,), {"site": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        found.address = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def serve(site, monkeypatch):
    """serve(title, files): a published data set with these files, in an archive if it has one."""

    def serve(title, files):
        source = published.SOURCES[title]
        address, _, member = source.url.partition("#")
        name = address.rpartition("/")[2]
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        monkeypatch.setitem(published.SERVED, title, digests)
        if member:
            site.files[name] = archive(files)
            monkeypatch.setitem(
                published.ARCHIVES, name, hashlib.sha256(site.files[name]).hexdigest()
            )
        else:
            site.files |= {name.format(file): content for file, content in files.items()}
        url = f"{site.address}/{name}" + "#{}" * bool(member)
        monkeypatch.setitem(published.SOURCES, title, dataclasses.replace(source, url=url))

    return serve


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"readme.html": b"about", **files}.items():
            entry = tarfile.TarInfo(f"batches-bin/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
