"""The dashboard in a real browser: each page shows a figure."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = {"": "Overview", "along_training": "Along training", "blocks": "Block inspector"}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def address(demo_results, tmp_path_factory):
    """Address of a dashboard over the results of a real, tiny demo, served by a child process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app/main.py"]
    command += ["--server.headless", "true", "--server.port", str(port)]
    command += ["--server.address", "127.0.0.1", "--browser.gatherUsageStats", "false"]
    command += ["--server.fileWatcherType", "none", "--", "--results", str(demo_results)]
    log = tmp_path_factory.mktemp("dashboard") / "log.txt"
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "KRONSCOPE_RESULTS"}
    with log.open("w") as output:
        child = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", child, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(timeout=30)


def wait_until_healthy(address, child, log, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"the dashboard did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        own = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield own
        own.close()


@pytest.fixture
def page(browser):
    own = browser.new_page(viewport={"width": 1400, "height": 900})
    yield own
    own.close()


def wait_for_figure(page):
    """Wait for a picture that has arrived and been decoded."""
    page.wait_for_function(
        "[...document.querySelectorAll('[data-testid=stImage] img, [data-testid=stImageContainer] "
        "img')].some(image => image.complete && image.naturalWidth > 0)",
        timeout=60_000,
    )


@pytest.mark.parametrize("path", PAGES)
def test_each_page_shows_a_figure(page, address, path):
    page.goto(f"{address}/{path}")
    wait_for_figure(page)
    assert page.get_by_role("heading", name=PAGES[path], exact=True).is_visible()
    assert "Traceback" not in page.inner_text("body")
    assert page.locator("[data-testid=stException]").count() == 0


def test_a_reader_walks_through_the_pages_and_the_address_follows(page, address):
    page.goto(address)
    wait_for_figure(page)
    page.get_by_role("link", name="Along training").click()
    page.wait_for_url("**/along_training?*metric=*")
    wait_for_figure(page)
    page.get_by_role("combobox", name="Trained with").click()
    page.get_by_role("option", name="kfac").click()
    page.wait_for_url("**optimizer=kfac*")
    page.get_by_role("link", name="Block inspector").click()
    page.wait_for_url("**/blocks?*optimizer=kfac*")  # the choice goes along to the next page
    wait_for_figure(page)
    assert "Traceback" not in page.inner_text("body")
