"""HTML from the templates: what both pages share, and how values are shown.

A page stands alone: its pictures are data, its curves inline SVG, it has no script.
"""

import base64
import functools
import math
import pathlib
from typing import TYPE_CHECKING, Any

from implicit_slots.evaluation import catalogue
from implicit_slots.report import plots

if TYPE_CHECKING:
    from jinja2 import Environment

PICTURE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
NOT_FINITE = "not finite"


def render(template: str, **values: Any) -> str:
    """Returns a page; `values` are what the template names, escaped where shown."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> "Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "duration": duration,
        "data_uri": data_uri,
    }
    environment.globals |= {
        "describe": catalogue.describe,
        "metric_title": catalogue.title,
        "SERIES": plots.SERIES,
        "NOT_FINITE": NOT_FINITE,
    }
    return environment


def to_number(value: object) -> float | None:
    """A logged value as a number (null and "NaN" as NaN), None if it is none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def number(value: float | None) -> str:
    """Returns a number with four digits, integers in full; None is not finite."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns a time as hours and minutes, or as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def data_uri(path: pathlib.Path) -> str:
    """Returns a picture as part of the page; "" where there is none."""
    kind = PICTURE_TYPES.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return ""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
