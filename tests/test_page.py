"""report.html: what it says, and what a real browser makes of it."""

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.profiles import NAMES, make_profile

from absorb_plugin.report.findings import findings
from absorb_plugin.report.page import render
from absorb_plugin.report.svg import Line, chart, number

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


def test_the_page_says_what_the_profile_says() -> None:
    profile = make_profile()
    page = render(profile, "profile_2")
    seen = parse(page)
    assert seen.links == ["profile_2.json"]  # nothing that a browser would fetch
    assert "url(" not in page and "@import" not in page
    for text in (
        "tiny-model",
        "owl + absorption, WandaPruningModifier at 50%",
        "0.4990",
        f"{math.expm1(-0.25):+.1%}".replace("-", "−"),
        "4,096",
        profile["recipe"].strip(),
        profile["command"],
        "num_calibration_samples=6",
        "max_seq_length=512",
        "2.13.0",
    ):
        assert text in seen.text, text
    assert page.count("<figure>") == 4
    assert page.count("<tr>") == 1 + 12
    assert 'class="notes"' not in page


def test_names_cannot_break_out_of_the_page() -> None:
    evil = '</script><script>alert(1)</script>"><img src=x>'
    profile = make_profile(command=evil, recipe=evil, pruner=evil)
    profile["model"]["name_or_path"] = evil
    profile["settings"]["allocator"] = evil
    profile["versions"][evil] = evil
    profile["blocks"][0]["name"] = evil
    page = render(profile)
    assert page.count("<script>") == 1
    assert "<img" not in page
    parse(page)


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({"noise": None}, 2),
        ({"search": None}, 3),
        ({"noise": None, "search": None, "realised": None, "command": None}, 1),
    ],
)
def test_what_was_not_measured_is_left_out(changes: Any, figures: int) -> None:
    profile = make_profile(**changes)
    for block in profile["blocks"]:
        if profile["noise"] is None:
            block |= {"drift": None, "ratio": None, "ratio_error": None}
        if profile["realised"] is None:
            block["realised_sparsity"] = None
    page = render(profile)
    assert page.count("<figure>") == figures
    assert "None" not in parse(page).text.replace("'None'", "")
    assert ("absorption ratio" in page) == (profile["noise"] is not None)
    assert ("or from Python" in page) == (profile["command"] is not None)


def test_one_block() -> None:
    profile = make_profile(blocks=1)
    profile["blocks"][0]["direction"] = 0.0
    assert "nan" not in render(profile)
    parse(render(profile))


def search_with(**changes: Any) -> dict[str, Any]:
    return {**make_profile()["search"], **changes}


def rehearsed(chosen: str, **losses: float) -> dict[str, Any]:
    return {"losses": {**losses, "searched": 4.5}, "chosen": chosen}


ZERO = [{"direction": [], "strengths": [0.0], "losses": [4.5], "chosen": 0.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"allocator": "owl", "strength": 0, "max_sparsity": 0.9}},
            "strength is 0 in the recipe: this is owl alone",
        ),
        ({"search": search_with(rounds=ZERO)}, "Strength 0 was chosen"),
        (
            {"search": search_with(start="uniform", uniform_loss=4.4)},
            r"Uniform beat owl .*\(4\.400 against 4\.500 nats\).* uniform\.$",
        ),
        (
            {"search": search_with(start="uniform", rounds=ZERO)},
            "no strength beat it: this is a uniform allocation",
        ),
        (
            {"search": search_with(rehearsed=rehearsed("base", base=4.4))},
            r"did not hold \(nats: base 4\.400, searched 4\.500\), so the "
            r"allocation is that of owl alone\.$",
        ),
        (
            {"search": search_with(rehearsed=rehearsed("halfway", halfway=4.3))},
            r"halfway to what the search had found\.$",
        ),
        (
            {"noise": {"magnitude": 0.01, "floor": [1e-3, 3e-3]}},
            r"η = 0\.01, is less than 5 times the rounding floor of 3\.0e-03",
        ),
        (
            {"settings": {"allocator": "owl", "strength": 1, "max_sparsity": 0.595}},
            r"At the cap, max_sparsity 0\.595: model\.layers\.",
        ),
        ({"realised": None}, "before pruning was finished"),
        ({"realised": 0.4}, r"0\.4000 of the weights are zero, 0\.5000 were asked for"),
    ],
)
def test_findings(changes: dict[str, Any], message: str) -> None:
    assert findings(make_profile()) == []
    (found,) = findings(make_profile(**changes))
    assert re.search(message, found)
    assert html.escape(found) in render(make_profile(**changes))


def test_the_gain_is_that_of_the_rehearsal() -> None:
    masked = render(make_profile())
    assert "against uniform" in masked and "−22.1%" in masked  # exp(4.25 − 4.5)
    assert "masked perplexity" in masked and "rehearsed" not in masked
    found = rehearsed("searched", base=4.6)
    page = render(make_profile(search=search_with(rehearsed=found)))
    assert "−9.5%" in page and "rehearsed perplexity" in page  # exp(4.5 − 4.6)
    assert "masked perplexity" not in page and "against uniform" not in page
    assert findings(make_profile(search=search_with(rehearsed=found))) == []
    unknown = {"losses": {"base": 4.6, "searched": None}, "chosen": "searched"}
    assert "rehearsed perplexity" not in render(
        make_profile(search=search_with(rehearsed=unknown))
    )


def test_linears_that_stayed_dense_are_named() -> None:
    profile = make_profile()
    for block in profile["blocks"][:5]:
        block["linears"][NAMES[1]]["realised_sparsity"] = 0.0
    (found,) = findings(profile)
    assert "model.layers.0.mlp.up_proj, " in found and "and 1 more" in found


def test_linears_without_tokens_are_named_once() -> None:
    profile = make_profile()
    name = f"{profile['blocks'][0]['name']}.{NAMES[1]}"
    profile["blocks"][0]["linears"][NAMES[1]]["realised_sparsity"] = 0.0
    profile["unseen_linears"] = [name]
    (found,) = findings(profile)
    assert found.startswith("Saw no token") and name in found


def test_charts_leave_gaps_and_stay_inside() -> None:
    lines = [
        Line("a <b>", "final", [0, 1, 2, 3], [0.1, None, 10.0, 0.0], ring=2),
        Line("b", "base", [0, 3], [1.0, 1.0], dots=False, errors=[0.5, None]),
    ]
    for log in (False, True):
        drawn = chart(lines, "label", "x", "y", log)
        parse(drawn)
        assert "<b>" not in drawn and "nan" not in drawn
        points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3"', drawn)
        assert len(points) == (2 if log else 3)  # 0 has no logarithm
        assert all(0 < float(x) < 480 and 0 < float(y) < 270 for x, y in points)
        assert drawn.count('class="ring"') == 1
    assert chart(lines[:1], "", "", "").count("M") >= 2  # the pen is lifted at the gap


def ticks(low: float, high: float, log: bool) -> list[float]:
    drawn = chart([Line("", "final", [0, 1], [low, high])], "", "x", "y", log)
    found = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    return [float(text.replace("−", "-")) for text in found]


@pytest.mark.parametrize("low", [1e-8, 1e-3, 0.3, 20.0])
@pytest.mark.parametrize("factor", [1.5, 4, 11, 1e3, 1e9])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_has_some_round_ticks_within(
    low: float, factor: float, log: bool
) -> None:
    found = ticks(low, low * factor, log)
    assert 2 <= len(found) <= 10
    assert found == sorted(set(found))
    margin = 0.0 if log else 0.05 * low * factor
    assert found[0] >= low * 0.4 - margin and found[-1] <= low * factor * 2.5 + margin


def test_numbers() -> None:
    assert [number(x) for x in (0, 1e-17, -0.05, 1e-7, 2e-5, 0.0123456, 30)] == [
        "0", "0", "−0.05", "1e−7", "2e−5", "0.0123", "30",
    ]  # fmt: skip


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


CLICK = """
const heads = [...page.querySelectorAll(".sortable thead th")];
const shown = (n) => [...page.querySelectorAll(".sortable tbody tr")]
  .map((row) => row.cells[n].dataset.value);
const at = heads.findIndex((th) => th.textContent.startsWith("target"));
result.before = shown(at);
heads[at].querySelector("button").click();
result.up = shown(at);
result.state = heads[at].getAttribute("aria-sort");
heads[at].querySelector("button").click();
result.down = shown(at);
const ratio = heads.findIndex((th) => th.textContent.trim() === "r");
heads[ratio].querySelector("button").click();
result.ratio = shown(ratio);
result.states = heads.map((th) => th.getAttribute("aria-sort"));
heads[0].querySelector("button").click();
result.again = shown(at);
const root = page.documentElement;
result.width = [root.clientWidth, root.scrollWidth];
result.outside = [...page.querySelectorAll("main *")].filter((one) =>
  !one.closest(".scroll, pre, svg") && one.getBoundingClientRect().right > 390.5
).map((one) => one.outerHTML.slice(0, 80));
const text = page.querySelector("figure svg text").getBoundingClientRect();
result.text = text.height;
"""


def test_in_a_browser(tmp_path: Path) -> None:
    profile = make_profile()
    profile["blocks"][3]["ratio"] = None
    profile["model"]["name_or_path"] = "a-very-long-name-" * 8
    result, console = in_browser(render(profile), CLICK, tmp_path)
    assert console == []
    values = [str(block["sparsity"]) for block in profile["blocks"]]
    assert result["before"] == result["again"] == values
    assert result["up"] == sorted(values, key=float) != values
    assert result["state"] == "ascending"
    assert result["down"] == sorted(values, key=float, reverse=True)
    # what is missing comes last, whichever way
    ratios = [block["ratio"] for block in profile["blocks"] if block["ratio"]]
    assert result["ratio"] == [*map(str, sorted(ratios)), ""]
    assert [state for state in result["states"] if state] == ["ascending"]
    inner, scrolled = result["width"]
    assert 370 <= inner <= 390 and scrolled == inner  # no horizontal overflow
    assert result["outside"] == []
    assert result["text"] >= 9  # pixels: legible on a phone


def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = render(make_profile()).replace(
        "</main>",
        '<p style="width:600px">wide</p></main><script>no.such.thing()</script>'
        '<img src="http://localhost:9/x.png">',
    )
    result, console = in_browser(page, CLICK, tmp_path)
    inner, scrolled = result["width"]
    assert scrolled > inner and len(result["outside"]) == 1
    assert any("no is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
