"""What the pages have in common: frame, colours of light and dark, pieces of HTML.

A page stands alone: pictures are data, curves inline SVG, and there is no script.
"""

import base64
import html
import pathlib

PICTURE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def page(title: str, *sections: str) -> str:
    """Returns a whole page; its sections are HTML, empty ones are left out."""
    body = "\n".join(filter(None, sections))
    return PAGE.format(title=escape(title), style=STYLE, body=body)


def escape(value: object) -> str:
    """Returns a value as text that HTML does not read."""
    return html.escape(str(value))


def section(heading: str, body: str | None) -> str:
    """Returns a section, or nothing where there is nothing to show."""
    return f"<section><h2>{escape(heading)}</h2>{body}</section>" if body else ""


def details(summary: str, body: str) -> str:
    """Returns what is shown once the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    """Returns commands or code as they are."""
    return f"<pre>{escape(text)}</pre>"


def figure(path: pathlib.Path, title: str, caption: str = "") -> str:
    """Returns a picture as part of the page, or a sentence where it is not there."""
    kind = PICTURE_TYPES.get(path.suffix.lower())
    head = f"<b>{escape(title)}</b>" if caption else escape(title)
    head += f" {escape(caption)}" if caption else ""
    if kind is None or not path.is_file():
        body = f'<p class="bad">{escape(path.name)} is not there.</p>'
    else:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        body = (
            f'<div class="scroll"><img alt="{escape(title)}" '
            f'src="data:{kind};base64,{data}"></div>'
        )
    return f"<figure><figcaption>{head}</figcaption>{body}</figure>"


def format_number(number: float) -> str:
    """Returns a finite number with four digits, integers in full."""
    if number == int(number) or abs(number) >= 10_000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def format_duration(seconds: float) -> str:
    """Returns a time as hours and minutes, or as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

SERIES = 6  # how many lines of a plot the colours and dashes tell apart

STYLE = """
:root {
  --page: #fcfcfb; --card: #ffffff; --ink: #1d2126; --quiet: #656b74;
  --rule: #e4e6e9; --train: #2b6cb0; --validation: #b44f16; --bad: #b3261e;
  --series-0: #2b6cb0; --series-1: #b44f16; --series-2: #1f7a4d;
  --series-3: #7b4bb3; --series-4: #a82e62; --series-5: #5f6670;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1a1d21; --ink: #e5e7ea; --quiet: #9aa1ab;
    --rule: #2d3238; --train: #6fb3f5; --validation: #f3a35f; --bad: #ff8a80;
    --series-0: #6fb3f5; --series-1: #f3a35f; --series-2: #6fcf97;
    --series-3: #c3a1f0; --series-4: #f38bb0; --series-5: #b0b6bf;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
h3 {
  display: flex; gap: 0.75rem; font-size: 0.95rem; margin: 0; overflow-wrap: anywhere;
}
h3 span { font-weight: 400; font-variant-numeric: tabular-nums; }
h3 :first-child { flex: 1; font-weight: 600; }
header p { max-width: 68ch; margin: 0.75rem 0 0; }
code, pre { font: 0.85em/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre {
  margin: 0; padding: 0.75rem 1rem; overflow-x: auto; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px;
}
summary { cursor: pointer; margin: 2.5rem 0 0.75rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  padding: 0.35rem 1.5rem 0.35rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--rule); font-weight: 400;
}
th { font-weight: 600; }
.value { text-align: right; }
.meaning, .panel p, figcaption { color: var(--quiet); }
th span { margin-left: 0.35rem; font-weight: 400; color: var(--quiet); }
.meaning { white-space: normal; }
.metrics th span { display: block; margin: 0; font-size: 0.8rem; }
.metrics td span span { color: var(--quiet); }
.metrics thead th { white-space: normal; vertical-align: bottom; }
.metrics th, .metrics td { padding-right: 1rem; }
.metrics tbody th { min-width: 9rem; white-space: normal; }
.metrics .count { display: block; font-size: 0.8rem; }
.metrics .meaning { min-width: 11rem; font-size: 0.85rem; }
section > h3 { margin: 1.5rem 0 0.25rem; }
figure + figure, figure + .legend { margin-top: 1.25rem; }
@media (max-width: 680px) {
  .numbers, .numbers tbody { display: block; }
  .numbers tr {
    display: grid; grid-template-columns: 1fr auto; padding: 0.35rem 0;
    border-bottom: 1px solid var(--rule);
  }
  .numbers th, .numbers td { padding: 0; border: 0; white-space: normal; }
  .numbers .meaning { grid-column: 1 / -1; font-size: 0.85rem; }
}
figure { margin: 0; }
figcaption { font-size: 0.85rem; margin-bottom: 0.25rem; }
img {
  display: block; max-width: max(100%, 640px); border-radius: 6px;
  border: 1px solid var(--rule);
}
.earlier {
  display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
}
.earlier img { max-width: 100%; }
.legend { margin: 0 0 0.75rem; font-size: 0.9rem; }
.legend span { margin-right: 1.25rem; }
.legend span::before {
  content: ""; display: inline-block; width: 1.25rem; height: 0.2rem;
  margin-right: 0.5rem; vertical-align: middle; background: currentColor;
}
.legend .train, h3 .train { color: var(--train); }
.legend .validation, h3 .validation { color: var(--validation); }
.legend.lines span::before { content: none; }
.legend.lines svg {
  display: inline-block; width: 1.75rem; margin-right: 0.5rem; vertical-align: middle;
}
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
}
.panel {
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 0.75rem 0.75rem 0.25rem; min-width: 0;
  display: flex; flex-direction: column;
}
.panel p { margin: 0 0 0.25rem; font-size: 0.8rem; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { font-size: 10.5px; fill: var(--quiet); }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.train { stroke: var(--train); }
.line.validation { stroke: var(--validation); }
.line.series-0 { stroke: var(--series-0); stroke-dasharray: none; }
.line.series-1 { stroke: var(--series-1); stroke-dasharray: 7 3; }
.line.series-2 { stroke: var(--series-2); stroke-dasharray: 2 2.5; }
.line.series-3 { stroke: var(--series-3); stroke-dasharray: 9 3 2 3; }
.line.series-4 { stroke: var(--series-4); stroke-dasharray: 4 2; }
.line.series-5 { stroke: var(--series-5); stroke-dasharray: 12 3; }
circle.series-0, .band.series-0 { fill: var(--series-0); }
circle.series-1, .band.series-1 { fill: var(--series-1); }
circle.series-2, .band.series-2 { fill: var(--series-2); }
circle.series-3, .band.series-3 { fill: var(--series-3); }
circle.series-4, .band.series-4 { fill: var(--series-4); }
circle.series-5, .band.series-5 { fill: var(--series-5); }
.band { opacity: 0.22; }
circle.train, .band.train { fill: var(--train); }
circle.validation, .band.validation { fill: var(--validation); }
.notfinite { stroke: var(--bad); stroke-width: 1.4; fill: none; }
.bad { color: var(--bad); }
"""
