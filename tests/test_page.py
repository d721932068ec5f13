"""The page that people open: it sorts, filters, searches and tells, in a real browser, from a file and no network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Browser:
    """Headless Chromium through its driver's plain HTTP: a page opened, scripts run in it, what its console said."""

    def __init__(self, port: int, profile: Path) -> None:
        self.root = f"http://127.0.0.1:{port}"
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._ready()
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})["sessionId"]
        self.root += f"/session/{session}"

    def _ready(self) -> None:
        for _ in range(100):
            try:
                return self._call("GET", "/status")
            except urllib.error.URLError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wide(self, width: int) -> None:
        emulated = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": emulated})

    def press(self, key: str) -> None:
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})  # fmt: skip

    def choose(self, name: str, value: str) -> None:
        self.run("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                 "e.dispatchEvent(new Event(e.type === 'search' ? 'input' : 'change'))", name, value)  # fmt: skip

    def names(self) -> list[str]:
        """The defenses of the rows, as they stand."""
        return list(self.run("return [...document.querySelectorAll('tbody th button')].map(b => b.textContent)"))

    def column(self, name: str) -> list[str]:
        return list(self.run(
            "const heads = [...document.querySelectorAll('thead button')].map(b => b.dataset.column);"
            "return [...document.querySelectorAll('tbody tr')].map(r => r.children[heads.indexOf(arguments[0])]"
            ".firstChild.firstChild?.textContent ?? r.children[heads.indexOf(arguments[0])].textContent)", name,
        ))  # fmt: skip

    def sort(self, column: str) -> None:
        self.run("document.querySelector(`thead [data-column='${arguments[0]}']`).click()", column)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def said(self) -> list[Any]:
        """What the console has said since it was last asked."""
        return list(self._call("POST", "/se/log", {"type": "browser"}))

    def quit(self) -> None:
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip(
            "needs chromium and chromedriver (apt-get install chromium chromium-driver): the page is not tested"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(port, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.quit()
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture
def page(driver: Browser, root: Path) -> Iterator[Browser]:
    """The published board, freshly opened; whatever is done with it, its console stays silent."""
    driver.wide(1400)
    driver.open(root / "leaderboard" / "index.html")
    yield driver
    assert driver.said() == []


def test_it_opens_on_the_first_measured_table_and_says_what_stands_there(page: Browser) -> None:
    assert page.text("caption").startswith("cifar10-reduced, linf, eps 8/255")
    assert any("fat" in name for name in page.names())
    assert page.text("#status").startswith(f"{len(page.names())} of ")
    assert "network narrow-cnn" in page.text("caption")
    assert len(page.run("return [...document.querySelectorAll('#plot .point')]")) == len(page.names())
    assert page.run("return document.querySelectorAll('#plot line.arrow').length") >= 1


def test_a_heading_sorts_both_ways_and_says_so(page: Browser) -> None:
    page.sort("clean")
    shown = [float(cell.split(" ")[0]) for cell in page.column("clean")]
    assert shown == sorted(shown, reverse=True)
    assert page.run("return document.activeElement.dataset.column") == "clean"  # the keyboard stays where it was
    page.sort("clean")
    assert [float(cell.split(" ")[0]) for cell in page.column("clean")] == sorted(shown)
    state = "return document.querySelector(\"thead [data-column='clean']\").parentElement.getAttribute('aria-sort')"
    assert page.run(state) == "ascending"
    page.sort("defense")
    assert page.names() == sorted(page.names())


def test_filters_bring_out_the_wide_networks_with_their_sources(page: Browser) -> None:
    page.choose("dataset", "cifar10")
    page.choose("eps_class", "8/255")
    page.choose("family", "wrn-32/34-10")
    sources = page.column("source")
    assert {source: sources.count(source) for source in set(sources)} == {
        "robustbench": 16,
        "reported": 11,
        "quoted": 5,
    }
    assert "not ranked together" in page.text("#status")
    assert set(page.column("protocol")) >= {"dat-2019 v1", "mart-2020 v1", "trades-2019 v1", "robustbench-linf v1"}
    assert "rank" not in page.run("return [...document.querySelectorAll('thead button')].map(b => b.dataset.column)")
    page.choose("source", "robustbench")
    assert len(page.names()) == 16
    assert "robustbench-linf v1" in page.text("caption")
    page.run("document.getElementById('filters').reset()")
    everything = page.run("return JSON.parse(document.getElementById('data').textContent).rows.length")
    deadline = time.monotonic() + 20
    while len(page.names()) != everything and time.monotonic() < deadline:
        time.sleep(0.05)
    assert page.text("#status").startswith(f"{everything} of {everything} rows")


def test_search_takes_several_words_in_any_order(page: Browser) -> None:
    page.run("document.getElementById('dataset').value = document.getElementById('eps_class').value = ''")
    page.choose("search", "58-10 FAT-mart")
    assert page.names() == ["fat-mart (beta 6)", "fat-mart (beta 6)"]
    page.choose("search", "no such thing")
    assert page.names() == []
    assert page.text("#plot").startswith("No row here")


def test_columns_are_chosen(page: Browser) -> None:
    heads = "return [...document.querySelectorAll('thead button')].map(b => b.textContent)"
    assert "FGSM" in page.run(heads)
    assert "Records" not in page.run(heads)
    for column in ("fgsm", "ids"):
        page.run("document.querySelector(`#choice input[value='${arguments[0]}']`).click()", column)
    assert "FGSM" not in page.run(heads)
    assert "Records" in page.run(heads)


def test_a_row_opens_its_record_protocol_and_warnings(page: Browser) -> None:
    page.choose("dataset", "digits")
    page.choose("eps_class", "0.3")
    page.choose("search", "madry")
    page.run("document.querySelector('tbody th button').click()")
    assert page.run("return document.getElementById('detail').open")
    told = page.text("#detail-body")
    for part in (
        "Accuracy, %",
        "Notes and warnings",
        "Square broke",
        "Record madry-digits",
        "Protocol fatbench-linf v2",
    ):
        assert part in told
    assert '"kappa":50' in told
    page.press("\ue00c")  # Escape
    assert not page.run("return document.getElementById('detail').open")


def test_a_published_row_tells_where_it_stands(page: Browser) -> None:
    page.choose("dataset", "cifar10")
    page.choose("eps_class", "8/255")
    page.choose("source", "quoted")
    page.run("[...document.querySelectorAll('tbody th button')].find(b => b.textContent === 'madry').click()")
    assert "Wang et al., ICML 2019 (DAT), in Zhang et al., ICML 2020 (FAT), Table 1" in page.text("#detail-body")
    page.run("document.querySelector('#detail button').click()")


def test_everything_is_reached_by_keyboard_and_has_a_name(page: Browser) -> None:
    named = "e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')"
    controls = "[...document.querySelectorAll('button, select, input, table, dialog')]"
    assert page.run(f"return {controls}.filter(e => !({named})).map(e => e.outerHTML)") == []
    seen = set()
    for _ in range(14):
        page.press("\ue004")  # Tab
        seen.add(page.run("const e = document.activeElement; return e.id || e.dataset.column || e.tagName"))
    assert {"theme", "dataset", "family", "search"} <= seen
    page.run("document.querySelector(\"thead [data-column='defense']\").focus()")
    page.press("\ue007")  # Enter
    assert page.names() == sorted(page.names())


def test_light_and_dark_change_places(page: Browser) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = page.run(ground)
    page.run("document.getElementById('theme').click()")
    assert page.run(ground) != before
    page.run("document.getElementById('theme').click()")
    assert page.run(ground) == before


def test_a_phone_shows_it_without_scrolling_the_page_sideways(page: Browser) -> None:
    page.wide(390)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    assert page.run("return document.querySelector('#plot svg').clientWidth") <= 390
    page.run("document.querySelector('tbody th button').click()")
    assert page.run("return document.getElementById('detail').clientWidth") <= 390
    page.press("\ue00c")


def test_it_asks_for_nothing_from_any_network(page: Browser) -> None:
    assert page.run("return performance.getEntriesByType('resource').map(r => r.name)") == []
    assert "default-src 'none'" in page.run("return document.querySelector('meta[http-equiv]').content")
