"""The report of a run as one HTML page that needs nothing but itself."""

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from absorb_plugin.overflow import expm1
from absorb_plugin.report import svg
from absorb_plugin.report.charts import Chart, HeatMap, LineChart
from absorb_plugin.report.profile_charts import profile_charts
from absorb_plugin.report.template import PAGE, SCRIPT, STYLE
from absorb_plugin.report.warnings import find_warnings
from absorb_plugin.report.words import (
    confirming,
    counted,
    gain_sentence,
    judge_name,
    model_name,
    quality_sentence,
    run_title,
)

__all__ = ["render"]

Profile = Mapping[str, Any]


def render(profile: Profile, name: str = "profile") -> str:
    """
    :param profile: content of profile.json
    :param name: stem of the JSON file beside the page
    :return: HTML with inline style, script and SVG; it loads nothing
    """
    sections = (
        _tiles(profile),
        _outcome(profile),
        _warnings(profile),
        f'<div class="charts">{"".join(map(_figure, profile_charts(profile)))}</div>',
        _samples(profile),
        _blocks(profile),
        _repeat(profile),
        _details(profile, name),
    )
    return PAGE.substitute(
        title=escape(f"{model_name(profile)}: {run_title(profile)}"),
        heading=escape(model_name(profile)),
        subtitle=escape(run_title(profile)),
        style=STYLE,
        script=SCRIPT,
        body="\n".join(sections),
    )


def _tiles(profile: Profile) -> str:
    calibration, realised = profile["calibration"], profile["realised"]
    tiles = [
        ("sparsity", "–" if realised is None else f"{realised:.4f}", "realised"),
        (
            "budget",
            f"{profile['budget']:.4f}",
            counted(len(profile["blocks"]), "block"),
        ),
        *_gains(profile),
        (
            "calibration",
            f"{calibration['tokens']:,}",
            f"tokens in {counted(calibration['samples'], 'sample')}",
        ),
    ]
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value.replace('-', '−'))}"
        f"<small>{escape(unit)}</small></dd></div>"
        for label, value, unit in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _gains(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """What was gained: as it was confirmed, else as the search saw it."""
    final, losses, how = _judged(profile)
    labels = {profile["settings"]["allocator"]: "base"}
    labels.setdefault("uniform", "uniform")
    for label, name in labels.items():
        loss = losses.get(name)
        if loss is not None and final is not None:
            yield f"against {label}", f"{expm1(final - loss):+.1%}", how


def _judged(
    profile: Profile,
) -> tuple[float | None, Mapping[str, float | None], str]:
    """Loss of the outcome, losses of others by the same judge, and who that is."""
    if confirmed := profile["confirmed"]:
        losses = confirmed["losses"]
        how = f"perplexity by {judge_name(confirmed['judge'])}, {confirming(profile)}"
        return losses[confirmed["chosen"]], losses, how
    search = profile["search"]
    if search is None:
        return None, {}, ""
    losses = {name: search[f"{name}_loss"] for name in ("base", "uniform")}
    how = "masked perplexity, on the held-out text that chose it"
    return search["loss"], losses, how


def _outcome(profile: Profile) -> str:
    """What was gained, and what it costs, in words."""
    sentences = [gain_sentence(profile), quality_sentence(profile)]
    return "".join(f'<p class="outcome">{escape(s)}</p>' for s in sentences if s)


def _warnings(profile: Profile) -> str:
    found = find_warnings(profile)
    if not found:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    return f'<section class="notes" aria-label="Warnings"><ul>{items}</ul></section>'


def _figure(chart: Chart) -> str:
    note = f"<p>{escape(chart.caption)}</p>" if chart.caption else ""
    names = svg.legend(chart) if isinstance(chart, LineChart) else ""
    numbers = READOUT if isinstance(chart, HeatMap) else ""
    return (
        f'<figure class="{type(chart).__name__}"><figcaption>'
        f"<h2>{escape(chart.title)}</h2>{note}</figcaption>"
        f"{names}{svg.draw(chart)}{numbers}</figure>"
    )


# A finger on a phone brings up no tooltip.
READOUT = '<p class="readout">Point at a cell, or tap it, for its numbers.</p>'
# what `samples` of the profile says -> what that means
USES = {
    "statistics": "statistics of the inputs, for allocator and pruner",
    "signal": "direction of the correction",
    "search": "where to start, and how far to go",
    "pruning": "what the pruner's arithmetic prunes by",
    "confirm": "last comparison, by the pruner's arithmetic",
}


def _samples(profile: Profile) -> str:
    if not profile["samples"]:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(USES.get(entry["use"], entry["use"]))}</th>'
        f"<td>{entry['samples']:,}</td><td>{entry['tokens']:,}</td></tr>"
        for entry in profile["samples"]
    )
    return (
        '<section><h2>Which samples served what</h2><table class="samples"><thead><tr>'
        '<th scope="col" class="text">use</th><th scope="col">samples</th>'
        f'<th scope="col">tokens</th></tr></thead><tbody>{rows}</tbody></table>'
        "</section>"
    )


# key, heading, what it is; the first ones fit on a phone
COLUMNS = (
    ("base_sparsity", "base", "sparsity that the base allocator gave"),
    ("sparsity", "target", "sparsity after the correction"),
    ("realised_sparsity", "realised", "share of zeros after pruning"),
    ("ratio", "r", "absorption ratio"),
    ("direction", "Δ", "first round's correction, over the largest of all blocks"),
    ("base_metric", "metric", "what the base allocator ranks"),
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
    rows = "".join(
        _row(number, block, columns)
        for number, block in enumerate(_over_largest(profile["blocks"], "direction"))
    )
    note = f"<p>of {escape(common)}</p>" if common else ""
    return (
        f"<section><h2>Blocks</h2>{note}"
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="Table of blocks"><table class="sortable"><thead><tr>'
        f"{''.join(headings)}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _over_largest(
    blocks: Sequence[Mapping[str, Any]], key: str
) -> list[Mapping[str, Any]]:
    """The blocks with this number as a share of the largest, where it is known."""
    known = [abs(block[key]) for block in blocks if block[key] is not None]
    largest = max(known, default=0.0) or 1.0
    return [
        block if block[key] is None else {**block, key: block[key] / largest}
        for block in blocks
    ]


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
