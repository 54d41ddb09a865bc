"""report.html: what it says, and what a real browser makes of it."""

import html
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import in_browser, parse
from helpers.profiles import (
    LLAMA,
    make_confirmed,
    make_descent,
    make_linear_profile,
    make_profile,
    make_quality,
    make_search,
)

from absorb_plugin.report.page import render
from absorb_plugin.report.profile import draw_profile
from absorb_plugin.report.words import run_title


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
    assert page.count("<figure ") == 4
    assert page.count("<tr>") == 1 + 12 + 1 + 2
    assert 'class="notes"' not in page and 'class="outcome"' not in page


def test_names_cannot_break_out_of_the_page() -> None:
    evil = '</script><script>alert(1)</script>"><img src=x>'
    profile = make_linear_profile(
        kinds=(*LLAMA, evil),
        command=evil,
        recipe=evil,
        pruner=evil,
        confirmed=make_confirmed() | {"judge": evil},
        samples=[{"use": evil, "samples": 1, "tokens": 1}],
    )
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
    profile = make_profile(samples=[], **changes)
    for block in profile["blocks"]:
        if profile["noise"] is None:
            block |= {"drift": None, "ratio": None, "ratio_error": None}
        if profile["realised"] is None:
            block["realised_sparsity"] = None
    page = render(profile)
    assert page.count("<figure ") == figures
    assert "None" not in parse(page).text.replace("'None'", "")
    assert ("absorption ratio" in page) == (profile["noise"] is not None)
    assert ("or from Python" in page) == (profile["command"] is not None)
    assert "Which samples" not in page


def test_one_block() -> None:
    profile = make_profile(blocks=1)
    profile["blocks"][0]["direction"] = 0.0
    assert "nan" not in render(profile)
    text = parse(render(profile)).text
    assert "1 block" in text and "1 blocks" not in text


def test_a_delta_that_was_not_measured_has_no_column() -> None:
    profile = make_profile()
    assert "first round's correction" in html.unescape(render(profile))
    for block in profile["blocks"]:
        block["direction"] = None
    page = html.unescape(render(profile))
    assert "first round's correction" not in page and "None" not in parse(page).text


@pytest.mark.parametrize(
    ("confirmed", "title"),
    [
        (make_confirmed(), "owl + absorption"),
        (make_confirmed("halfway", halfway=4.2), "owl + absorption"),
        (make_confirmed("base"), "owl"),
        (make_confirmed("uniform"), "uniform"),
    ],
)
def test_the_title_names_what_was_taken(confirmed: Any, title: str) -> None:
    profile = make_profile(confirmed=confirmed)
    whole = f"{title}, WandaPruningModifier at 50%"
    assert run_title(profile) == whole and whole in parse(render(profile)).text


def test_a_title_where_the_search_kept_its_start() -> None:
    kept = make_profile(search=make_descent(taken=0, start="uniform"))
    assert run_title(kept).startswith("uniform, Wanda")
    base = make_profile(search=None, quality=make_quality())
    assert run_title(base).startswith("owl + absorption, Wanda")
    for block in base["blocks"]:
        for linear in block["linears"].values():
            linear["base_sparsity"] = linear["sparsity"]
    assert run_title(base).startswith("owl, Wanda")


def test_samples_and_what_they_served() -> None:
    text = parse(render(make_profile())).text
    assert "statistics of the inputs, for allocator and pruner31,536" in text
    assert "last comparison, by the pruner's arithmetic168,192" in text


def test_the_confirmed_gain_stands_in_words() -> None:
    profile = make_profile(confirmed=make_confirmed())
    text = parse(render(profile)).text
    assert (
        "0.21 ± 0.03 nats per token better than owl on 16 samples that chose nothing, "
        "judged by SparseGPT: 18.9% lower perplexity." in text
    )


def test_samples_that_chose_too_are_not_said_to_have_chosen_nothing() -> None:
    confirmed = make_confirmed() | {"chose_nothing": False}
    text = parse(render(make_profile(confirmed=confirmed))).text
    assert "than owl on 16 samples that chose it too, judged by" in text
    assert "chose nothing" not in text


def test_the_gain_of_the_tiles_is_that_which_was_confirmed() -> None:
    masked = parse(render(make_profile())).text
    assert "against uniform" in masked and "−22.1%" in masked  # exp(4.25 − 4.5)
    assert "masked perplexity" in masked and "SparseGPT" not in masked
    page = parse(render(make_profile(confirmed=make_confirmed(base=4.35)))).text
    assert "−9.5%" in page and "perplexity by SparseGPT" in page  # exp(4.25 − 4.35)
    assert "masked perplexity" not in page and "samples that chose nothing" in page
    unknown = make_confirmed(searched=None) | {"gain": None}
    assert "against owl" not in render(make_profile(confirmed=unknown))


def test_a_gain_whose_exponential_overflows() -> None:
    lost = make_confirmed(base=-1000.0) | {"gain": -1000.0}
    text = parse(render(make_profile(confirmed=lost))).text
    assert "inf% higher perplexity" in text and "+inf%" in text


def test_a_quality_that_was_asked_for() -> None:
    text = parse(render(make_profile(quality=make_quality()))).text
    assert (
        "Sparsity 50.0% was found. Pruning to it costs 0.080 ± 0.008 nats per token "
        "over the dense model; max_loss_increase is 0.1." in text
    )
    confirmed = make_confirmed("base", base=4.21)  # searched: 4.25
    other = make_profile(quality=make_quality(), confirmed=confirmed)
    assert (
        "Sparsity 50.0% was found. Pruning to it costs 0.040 nats per token over the "
        "dense model, by the allocation that the last comparison took; max_loss"
    ) in render(other)
    found = make_quality()
    for point in found["curve"]:
        point["allocation"] = "base"
    known = make_profile(quality=found, confirmed=confirmed)
    assert "Pruning to it costs 0.080 ± 0.008 nats" in render(known)
    same = make_profile(quality=make_quality(), confirmed=make_confirmed())
    assert "Pruning to it costs 0.080 ± 0.008 nats" in render(same)
    between = make_profile(quality=make_quality(found=0.52))
    assert "Sparsity 52.0% was found: max_loss_increase is 0.1." in render(between)


def test_warnings_stand_on_the_page() -> None:
    page = render(make_profile(realised=0.4, zeros_lost=0.25))
    seen = parse(page)
    assert 'class="notes"' in page
    assert "0.4000 of the weights are zero" in seen.text
    assert "25.00% of the zeros" in seen.text


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
result.text = Math.min(...[...page.querySelectorAll("figure > svg text")]
  .map((text) => text.getBoundingClientRect())
  .map((box) => Math.min(box.height, box.width < box.height ? 99 : box.height)));
const svgs = [...page.querySelectorAll("figure > svg")];
result.cut = svgs.flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1;
  }).map((text) => text.textContent);
});
const cells = [...page.querySelectorAll("rect.cell")].filter((one) =>
  one.querySelector("title"));
const readout = page.querySelector(".readout");
if (readout) {
  cells[5].dispatchEvent(new MouseEvent("click", { bubbles: true }));
  result.read = [readout.textContent, cells[5].textContent];
  page.querySelector(".readout").previousElementSibling
    .dispatchEvent(new MouseEvent("click", { bubbles: true }));
  result.still = readout.textContent;
}
"""


def full_profile(**changes: Any) -> dict[str, Any]:
    """With everything that a page can show."""
    return make_linear_profile(
        blocks=30,
        confirmed=make_confirmed(),
        quality=make_quality(),
        zeros_lost=0.02,
        **changes,
    )


def test_in_a_browser(tmp_path: Path) -> None:
    profile = full_profile()
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
    ratios = [b["ratio"] for b in profile["blocks"] if b["ratio"] is not None]
    assert result["ratio"] == [*map(str, sorted(ratios)), ""]
    assert [state for state in result["states"] if state] == ["ascending"]
    inner, scrolled = result["width"]
    assert 370 <= inner <= 390 and scrolled == inner  # no horizontal overflow
    assert result["outside"] == [] and result["cut"] == []
    assert result["text"] >= 9  # pixels: legible on a phone
    # a tap on a cell tells its numbers; one beside the cells changes nothing
    read, cell = result["read"]
    assert read == cell == result["still"] != ""
    assert read.startswith("model.layers.5.self_attn.q_proj: target 0.4041, base 0.5")


def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = render(make_profile(search=make_search())).replace(
        "</main>",
        '<p style="width:600px">wide</p></main><script>no.such.thing()</script>'
        '<img src="http://localhost:9/x.png">',
    )
    result, console = in_browser(page, CLICK, tmp_path)
    inner, scrolled = result["width"]
    assert scrolled > inner and len(result["outside"]) == 1
    assert any("no is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_losses_that_overflowed_are_left_out() -> None:
    none = dict.fromkeys(("base_loss", "uniform_loss", "loss"))
    lost = dict.fromkeys(("base", "uniform", "searched"))
    confirmed = make_confirmed() | {"losses": lost, "gain": None}
    profile = make_profile(
        search=make_descent(start="uniform", **none),
        confirmed=confirmed | {"standard_error": None},
    )
    text = parse(render(profile)).text
    assert "None" not in text and "nan" not in text
    assert "against owl" not in text and "overflow against overflow" in text
    assert len(draw_profile(profile)) > 1000


def test_text_is_escaped_once() -> None:
    page = render(make_profile(command="absorb prune 'a & b'"))
    assert html.escape("absorb prune 'a & b'") in page and "&amp;amp;" not in page
