"""Looks at HTML: by a strict parser, and by a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Checker(HTMLParser):
    """Every element is closed, in the right order; collects what could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":  # SVG's `<path/>` comes to handle_startendtag
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action")]

    def handle_startendtag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def in_browser(
    page: str, script: str, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """
    Show `page` 390 pixels wide in a headless browser and run `script` with it.

    :param script: JavaScript; sets fields of `result`, has the page as `page`
    :return: result, lines on the console
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("NO BROWSER: report.html was not looked at; apt install chromium")
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<iframe width="390" height="844" srcdoc="{html.escape(page)}"></iframe>'
        "<pre></pre><script>addEventListener('load', () => {"
        "const result = {}, frame = document.querySelector('iframe');"
        f"const page = frame.contentDocument;\n{script}\n"
        "document.querySelector('pre').textContent = JSON.stringify(result); });"
        "</script>"
    )
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'browser'}",
            "--virtual-time-budget=5000", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = re.search(r"<pre>(\{.*\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console
