"""HTML, style and script of the page."""

from string import Template

__all__ = ["PAGE", "SCRIPT", "STYLE"]

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
 --realised: #0b7a6b; --below: #1f5fbf; --above: #c2570c; --note: #fff5dc;
 --note-line: #d9a520; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e6e9ed;
 --muted: #9aa4b0; --line: #2d333b; --card: #1c2026; --final: #74a9ff; --base: #d9b44a;
 --realised: #45c4b0; --below: #74a9ff; --above: #ff9d57; --note: #2e2812;
 --note-line: #a8821f; } }
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
.BarChart > svg, .HeatMap > svg { margin-top: 8px; }
svg text { fill: var(--muted); font-size: 13px; }
svg path { fill: none; }
.axis path { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; font-size: .85rem; gap: 2px 14px;
 list-style: none; margin: 6px 0 4px; padding: 0; }
.legend svg { height: 10px; margin-right: 6px; overflow: visible; width: 26px; }
.final, .base, .realised, .rule { stroke-width: 1.8; }
.final, .depth { fill: var(--final); stroke: var(--final); }
.base { fill: var(--base); stroke: var(--base); stroke-dasharray: 5 3; }
.base circle { stroke-dasharray: none; }
.realised { fill: none; stroke: var(--realised); }
.realised path { stroke: none; }
.realised circle { r: 5px; stroke-width: 1.3; }
.rule { stroke: var(--muted); stroke-dasharray: 2 3; }
.ring { fill: none; }
.band { fill: var(--muted); opacity: .2; }
.cell { stroke: var(--line); stroke-width: .6; }
.cell:hover { stroke: var(--fg); stroke-width: 1.5; }
.below { fill: var(--below); }
.above { fill: var(--above); }
.readout { color: var(--muted); font-size: .85rem; margin: 4px 0 0; min-height: 3em;
 overflow-wrap: anywhere; }
.outcome { border-left: 4px solid var(--final); margin: 16px 0 0; padding: 2px 12px; }
.outcome + .outcome { margin-top: 8px; }
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
.samples { min-width: 0; }
.samples th[scope=row] { white-space: normal; }
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
for (const readout of document.querySelectorAll(".readout")) {
  const show = (event) => {
    const title = event.target.closest(".cell")?.querySelector("title");
    if (title) readout.textContent = title.textContent;
  };
  for (const kind of ["pointerover", "click"])
    readout.previousElementSibling.addEventListener(kind, show);
}
"""
