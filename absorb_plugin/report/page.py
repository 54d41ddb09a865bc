"""The report of a run as one HTML page that needs nothing but itself."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import PurePath
from string import Template
from typing import Any

from absorb_plugin.report.findings import findings
from absorb_plugin.report.svg import Line, chart, legend, number

__all__ = ["render"]

FLOOR_IN_SIGHT = 100


def render(profile: Mapping[str, Any], name: str = "profile") -> str:
    """
    :param profile: from `Report.profile`
    :param name: stem of the JSON file beside the page
    :return: HTML with inline style, script and SVG; it loads nothing
    """
    sections = (
        _tiles(profile),
        _notes(profile),
        f'<div class="charts">{"".join(_figures(profile))}</div>',
        _blocks(profile),
        _repeat(profile),
        _details(profile, name),
    )
    return PAGE.substitute(
        title=escape(_title(profile)),
        heading=escape(_model(profile)),
        subtitle=escape(_subtitle(profile)),
        style=STYLE,
        script=SCRIPT,
        body="\n".join(sections),
    )


def _model(profile: Mapping[str, Any]) -> str:
    model = profile["model"]
    return PurePath(model["name_or_path"]).name or model["class"]


def _subtitle(profile: Mapping[str, Any]) -> str:
    settings = profile["settings"]
    corrected = " + absorption" if settings["strength"] != 0 else ""
    return (
        f"{settings['allocator']}{corrected}, {profile['pruner']} at "
        f"{profile['budget']:.0%}"
    )


def _title(profile: Mapping[str, Any]) -> str:
    return f"{_model(profile)}: {_subtitle(profile)}"


def _tiles(profile: Mapping[str, Any]) -> str:
    calibration, realised = profile["calibration"], profile["realised"]
    tiles = [
        ("sparsity", "–" if realised is None else f"{realised:.4f}", "realised"),
        ("budget", f"{profile['budget']:.4f}", f"{len(profile['blocks'])} blocks"),
    ]
    if profile["search"] is not None:
        tiles += _gains(profile["search"], profile["settings"]["allocator"])
    tiles.append(
        (
            "calibration",
            f"{calibration['tokens']:,}",
            f"tokens in {calibration['samples']} samples",
        )
    )
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value.replace('-', '−'))}"
        f"<small>{escape(unit)}</small></dd></div>"
        for label, value, unit in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _gains(search: Mapping[str, Any], allocator: str) -> Iterator[tuple[str, str, str]]:
    """What was gained on held-out text; by a rehearsal, where there was one."""
    losses = {name: search[f"{name}_loss"] for name in ("base", "uniform")}
    final, how = search["loss"], "masked perplexity"
    if rehearsed := search.get("rehearsed"):
        final, how = rehearsed["losses"][rehearsed["chosen"]], "rehearsed perplexity"
        losses = {name: rehearsed["losses"].get(name) for name in losses}
    for name, loss in losses.items():
        if loss is not None and final is not None:
            label = allocator if name == "base" else name
            yield (
                f"against {label}",
                f"{math.expm1(final - loss):+.1%}",
                f"{how}, held-out calibration text",
            )


def _notes(profile: Mapping[str, Any]) -> str:
    found = findings(profile)
    if not found:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    return f'<section class="notes" aria-label="Warnings"><ul>{items}</ul></section>'


def _figures(profile: Mapping[str, Any]) -> Iterator[str]:
    yield _figure("Sparsity per block", _sparsity_lines(profile), "block", "sparsity")
    search = profile["search"]
    if search is not None and search["rounds"]:
        yield _figure(
            "Search for the strength",
            _search_lines(profile),
            "strength β",
            "held-out loss [nats]",
            "Circled: taken. Each round starts where the one before ended.",
        )
    if profile["noise"] is not None:
        eta = profile["noise"]["magnitude"]
        yield _figure(
            "Absorption ratio",
            _ratio_lines(profile),
            "block behind which noise is put",
            "ratio r",
            f"Below 1 the rest of the network absorbs the noise (η = {eta:g}), above 1 "
            "it amplifies it.",
        )
        yield _figure(
            "Drift over depth",
            _drift_lines(profile),
            "block k",
            "drift R",
            "One line per block of injection, stronger for later blocks. Rounding "
            f"alone makes {number(profile['noise']['floor'][-1])}.",
            log=True,
        )


def _figure(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    caption: str = "",
    log: bool = False,
) -> str:
    drawn = chart(lines, f"{title}: {y_label} over {x_label}", x_label, y_label, log)
    note = f"<p>{escape(caption)}</p>" if caption else ""
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2>{note}</figcaption>"
        f"{legend(lines)}{drawn}</figure>"
    )


def _column(profile: Mapping[str, Any], key: str) -> list[float | None]:
    return [block[key] for block in profile["blocks"]]


def _rule(name: str, x: Sequence[float], y: float, style: str = "rule") -> Line:
    return Line(name, style, [min(x), max(x)], [y, y], dots=False)


def _sparsity_lines(profile: Mapping[str, Any]) -> list[Line]:
    x = range(len(profile["blocks"]))
    base = profile["settings"]["allocator"]
    lines = [_rule("budget", x, profile["budget"])]
    lines.append(Line(base, "base", x, _column(profile, "base_sparsity")))
    lines.append(Line("target", "final", x, _column(profile, "sparsity")))
    if profile["realised"] is not None:
        realised = _column(profile, "realised_sparsity")
        lines.append(Line("realised", "realised", x, realised))
    return lines


def _search_lines(profile: Mapping[str, Any]) -> list[Line]:
    search = profile["search"]
    strengths = [s for entry in search["rounds"] for s in entry["strengths"]]
    lines = [
        _rule(label, strengths, search[f"{name}_loss"], style)
        for name, label, style in (
            ("base", profile["settings"]["allocator"], "base"),
            ("uniform", "uniform", "rule"),
        )
        if search[f"{name}_loss"] is not None
    ]
    for count, entry in enumerate(search["rounds"], start=1):
        lines.append(
            Line(
                f"round {count}",
                "final",
                entry["strengths"],
                entry["losses"],
                ring=entry["strengths"].index(entry["chosen"]),
                opacity=0.3 + 0.7 * count / len(search["rounds"]),
            )
        )
    return lines


def _ratio_lines(profile: Mapping[str, Any]) -> list[Line]:
    x, errors = range(len(profile["blocks"])), _column(profile, "ratio_error")
    ratio = Line("", "final", x, _column(profile, "ratio"), errors)
    return [_rule("", x, 1.0), ratio]


def _drift_lines(profile: Mapping[str, Any]) -> list[Line]:
    blocks = profile["blocks"]
    last = len(blocks) - 1
    names = {0: "behind the first block", last: "behind the last"}
    lines = [
        Line(
            names.get(row, ""),
            "final thin",
            range(len(block["drift"])),
            block["drift"],
            dots=row == last,  # it has one point only
            opacity=0.25 + 0.75 * row / max(1, last),
        )
        for row, block in enumerate(blocks)
    ]
    return [*_floor(profile), *lines]


def _floor(profile: Mapping[str, Any]) -> list[Line]:
    """The rounding floor, unless it lies so low that nothing else could be told."""
    floor = profile["noise"]["floor"]
    drifts = [x for block in profile["blocks"] for x in block["drift"] if x]
    if not drifts or floor[-1] < min(drifts) / FLOOR_IN_SIGHT:
        return []
    return [Line("rounding floor", "base", range(len(floor)), floor, dots=False)]


# key, heading, what it is; the first ones fit on a phone
COLUMNS = (
    ("base_sparsity", "base", "sparsity that the base allocator gave"),
    ("sparsity", "target", "sparsity after the correction"),
    ("realised_sparsity", "realised", "share of zeros after pruning"),
    ("ratio", "r", "absorption ratio"),
    ("direction", "Δ", "first round's correction, over the largest of all blocks"),
    ("metric", "metric", "what the base allocator ranks"),
    ("parameters", "weights", "prunable weights"),
)


def _blocks(profile: Mapping[str, Any]) -> str:
    columns = [
        column
        for column in COLUMNS
        if any(block[column[0]] is not None for block in profile["blocks"])
    ]
    headings = [
        _heading("block", "module", "text"),
        *(_heading(*c[1:]) for c in columns),
    ]
    names = [block["name"] for block in profile["blocks"]]
    common = os.path.commonprefix(names).rpartition(".")[0]
    largest = max(abs(block["direction"]) for block in profile["blocks"])
    rows = "".join(
        _row(n, block | {"direction": block["direction"] / (largest or 1.0)}, columns)
        for n, block in enumerate(profile["blocks"])
    )
    note = f"<p>of {escape(common)}</p>" if common else ""
    return (
        f"<section><h2>Blocks</h2>{note}"
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="Table of blocks"><table class="sortable"><thead><tr>'
        f"{''.join(headings)}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _heading(name: str, title: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return (
        f'<th scope="col"{kind}><button type="button" title="{escape(title)}">'
        f"{escape(name)}</button></th>"
    )


def _row(
    index: int, block: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]
) -> str:
    name = block["name"].rpartition(".")[2]
    cells = [
        f'<th scope="row" data-value="{index}" title="{escape(block["name"])}">'
        f"{escape(name)}</th>"
    ]
    for key, _, _ in columns:
        value = block[key]
        if value is None:
            cells.append('<td data-value="">–</td>')
            continue
        shown = f"{value:,}" if isinstance(value, int) else _short(value, key)
        cells.append(f'<td data-value="{value!r}">{shown.replace("-", "−")}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _short(value: float, key: str) -> str:
    if key.endswith("sparsity") or key == "ratio":
        return f"{value:.4f}"
    if key == "direction":
        return f"{value:+.2f}"
    return f"{value:.3g}"


def _repeat(profile: Mapping[str, Any]) -> str:
    parts = ["<section><h2>Repeat it</h2>"]
    if profile["command"]:
        parts.append(_code(profile["command"]))
        parts.append("<p>or from Python:</p>")
    parts.append(_code(_python(profile)))
    parts.append(
        f"<h2>Recipe</h2>{_code(profile['recipe'])}<p>The recipe.yaml that is saved "
        "with the model holds the sparsity of every target as a list; it gives the "
        "same model on the same data without this package.</p></section>"
    )
    return "".join(parts)


def _python(profile: Mapping[str, Any]) -> str:
    model, calibration = profile["model"], profile["calibration"]
    return (
        "import absorb_plugin  # noqa: F401  registers the modifier\n"
        "from llmcompressor import oneshot\n\n"
        "oneshot(\n"
        f"    model={model['name_or_path'] or model['class']!r},\n"
        f"    precision={model['dtype']!r},\n"
        f"    dataset=...,  # the same {calibration['tokens']:,} tokens\n"
        '    recipe="recipe.yaml",  # the recipe below\n'
        f"    num_calibration_samples={calibration['samples']},\n"
        f"    max_seq_length={calibration['longest']},\n"
        '    output_dir="pruned",\n'
        ")"
    )


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def _details(profile: Mapping[str, Any], name: str) -> str:
    return (
        f"<section>{_pairs('Settings', profile['settings'])}"
        f"{_pairs('Model', profile['model'])}"
        f"{_pairs('Versions', profile['versions'], is_open=True)}</section>"
        f'<footer>All numbers: <a href="{name}.json">{name}.json</a></footer>'
    )


def _pairs(title: str, values: Mapping[str, Any], is_open: bool = False) -> str:
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in values.items()
    )
    state = " open" if is_open else ""
    return (
        f"<details{state}><summary>{escape(title)}</summary>"
        f'<dl class="pairs">{rows}</dl></details>'
    )


# The policy makes sure that nothing is fetched, whatever a model is called.
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$heading</h1><p>$subtitle</p></header>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
"""
)

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --muted: #5a6370;
 --line: #dfe3e8; --card: #f5f6f8; --final: #1f5fbf; --base: #8a6d1d;
 --realised: #0b7a6b; --note: #fff5dc; --note-line: #d9a520; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e6e9ed;
 --muted: #9aa4b0; --line: #2d333b; --card: #1c2026; --final: #74a9ff; --base: #d9b44a;
 --realised: #45c4b0; --note: #2e2812; --note-line: #a8821f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px;
 background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0; }
header p { color: var(--muted); margin: 4px 0 0; }
section { margin-top: 32px; }
section > h2 { margin: 24px 0 8px; }
section > h2 + p { color: var(--muted); font-size: .85rem; margin: -6px 0 4px; }
a { color: var(--final); }
.tiles { display: grid; gap: 10px; margin: 20px 0 0;
 grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tiles dt { color: var(--muted); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.4rem; font-weight: 600;
 font-variant-numeric: tabular-nums; }
.tiles small { color: var(--muted); display: block; font-size: .8rem;
 font-weight: 400; }
.notes { background: var(--note); border-left: 4px solid var(--note-line);
 border-radius: 4px; margin-top: 16px; padding: 10px 14px; }
.notes ul { margin: 0; padding-left: 18px; }
.charts { display: grid; gap: 28px 24px; margin-top: 28px;
 grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { display: flex; flex-direction: column; margin: 0; min-width: 0; }
figcaption p { color: var(--muted); font-size: .85rem; margin: 2px 0 0; }
figure > svg { height: auto; margin-top: auto; width: 100%; }
svg text { fill: var(--muted); font-size: 13px; }
svg path { fill: none; }
.axis path { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; font-size: .85rem; gap: 2px 14px;
 list-style: none; margin: 6px 0 4px; padding: 0; }
.legend svg { height: 10px; margin-right: 6px; overflow: visible; width: 26px; }
.final, .base, .realised, .rule { stroke-width: 1.8; }
.final { fill: var(--final); stroke: var(--final); }
.base { fill: var(--base); stroke: var(--base); stroke-dasharray: 5 3; }
.base circle { stroke-dasharray: none; }
.realised { fill: none; stroke: var(--realised); }
.realised path { stroke: none; }
.realised circle { r: 5px; stroke-width: 1.3; }
.thin { stroke-width: 1; }
.rule { stroke: var(--muted); stroke-dasharray: 2 3; }
.ring { fill: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem;
 font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: 5px 10px; text-align: right;
 white-space: nowrap; }
th[scope=row], th.text { background: var(--bg); font-weight: 400; left: 0;
 padding-left: 0; position: sticky; text-align: left; }
th button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit;
 font-weight: 600; padding: 4px 0; }
th button::after { color: var(--muted); content: " ↕"; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
pre { background: var(--card); border-radius: 8px; font-size: .85rem; margin: 8px 0;
 overflow-wrap: anywhere; padding: 12px 14px; white-space: pre-wrap; }
details { border-top: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
.pairs { display: grid; font-size: .9rem; gap: 2px 16px; margin: 8px 0;
 grid-template-columns: minmax(0, max-content) minmax(0, 1fr); }
.pairs dt { color: var(--muted); }
.pairs dt, .pairs dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .85rem; margin-top: 24px; }
@media (max-width: 480px) { body { padding: 16px 16px 32px; }
 .tiles { grid-template-columns: 1fr 1fr; } svg text { font-size: 15px; }
 th, td { padding: 5px 6px; } th:not([aria-sort]) button::after { content: none; } }
"""

SCRIPT = """
for (const button of document.querySelectorAll(".sortable th button")) {
  button.addEventListener("click", () => {
    const th = button.closest("th"), body = th.closest("table").tBodies[0];
    const up = th.getAttribute("aria-sort") !== "ascending";
    const value = (row) => row.cells[th.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) =>
      (value(a) === "") - (value(b) === "") || (up ? 1 : -1) * (value(a) - value(b)));
    for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
}
"""
