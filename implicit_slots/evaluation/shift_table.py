"""What shifts of the data cost, as tables of an evaluation's record; without JAX."""

import csv
import io
from collections.abc import Mapping
from typing import Any

# What is shown of each shift, as far as the model has it.
SHOWN = (
    *(f"attention/{name}" for name in ("fg_ari", "ari", "miou")),
    *(f"decoder/{name}" for name in ("fg_ari", "ari", "miou")),
    "slots/mse",
)
UNSHIFTED = "none"


def costs(shifts: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns by shift and metric its mean, and that less the mean without a shift."""
    means = {
        name: {n: m["mean"] for n, m in shift["metrics"].items()}
        for name, shift in shifts.items()
    }
    plain = means[UNSHIFTED]
    return {
        name: {
            metric: (value, value - plain[metric])
            for metric, value in found.items()
            if value is not None and plain.get(metric) is not None
        }
        for name, found in means.items()
    }


def table(shifts: Mapping[str, Any]) -> str:
    """The table for a terminal: a row a shift, each number with its difference."""
    found = costs(shifts)
    names = [name for name in SHOWN if name in found[UNSHIFTED]]
    rows = [["shift", *names]]
    for shift, values in found.items():
        cells = []
        for name in names:
            mean, difference = values.get(name, (float("nan"), float("nan")))
            told = "" if shift == UNSHIFTED else f" ({difference:+.3g})"
            cells.append(f"{mean:.3g}{told}")
        rows.append([shift, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_csv(shifts: Mapping[str, Any]) -> str:
    """The table as CSV: a row for each shift and metric."""
    found = costs(shifts)
    with io.StringIO() as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["shift", "metric", "mean", "difference", "images"])
        for shift, values in found.items():
            for name, (mean, difference) in values.items():
                count = shifts[shift]["metrics"][name]["count"]
                row = [shift, name, f"{mean:.6g}", f"{difference:.6g}", count]
                writer.writerow(row)
        return text.getvalue()
