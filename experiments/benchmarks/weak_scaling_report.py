"""What was found by `weak_scaling`: tables and a picture."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.benchmarks.collectives import (
    CHIPS,
    HOP_SECONDS,
    HOP_SOURCE,
    KINDS,
    SHARES,
    arithmetic,
)
from experiments.benchmarks.harness import core_count, markdown, rounded
from implicit_slots.runtime.devices import SHARDINGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def megabytes(count: float) -> str:
    """Of bytes, in a table."""
    return rounded(count / 1e6) if count else "0"


def kinds_cells(row: dict[str, Any]) -> list[str]:
    """Bytes of a program by kind of collective, how many, and what a device sends."""
    found = row["summary"]
    exact = "" if found["total"]["exact"] else "at least "
    return [
        *(megabytes(found.get(kind, {"bytes": 0})["bytes"]) for kind in KINDS),
        exact + str(found["total"]["count"]),
        megabytes(found["total"]["sent"]),
    ]


def batch_cell(row: dict[str, Any]) -> str:
    """Examples of a step, and in how many parts if there are several."""
    parts = f" in {row['accumulate']} parts" if row["accumulate"] > 1 else ""
    return f"{row['batch']:,}{parts}"


def table(results: dict[str, Any]) -> str:
    """The answers in Markdown."""
    kinds = [*(f"{kind}, MB" for kind in KINDS), "collectives", "sent, MB"]
    timed = [
        [
            str(row["devices"]),
            row["sharding"],
            rounded(1e3 * row["seconds"]["median"]),
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["ratio"]),
            *kinds_cells(row),
        ]
        for row in results["timed"]
    ]
    programs = [
        [
            str(row["devices"]),
            batch_cell(row),
            row["sharding"],
            megabytes(row["state_bytes"]),
            *kinds_cells(row),
            f"{law(row):.4f}" if row["sharding"] == "replicated" else "",
        ]
        for row in results["compiled"]
    ]
    small, paper = results["timed"][0], results["compiled"][0]
    parts = [
        "Small model: {resolution}×{resolution}, {parameters:,} parameters, {batch} "
        "examples on each device. Ratio: by devices × the time of one. ".format(**small)
        + f"{core_count()} core(s) did the work of all devices: what exceeds 1 is what "
        "partitioning adds to the work; of links it says nothing. MB of a collective "
        "are those of its whole array; sent is what each device sends in a ring.",
        markdown(["devices", "sharding", "ms a step", "ratio (range)", *kinds], timed),
        f"Paper's model (configs/clevr.py), {paper['parameters']:,} parameters, "
        "compiled and not run. Law: all-reduced bytes by 4 × (parameters + 3 losses).",
        markdown(
            ["devices", "batch", "sharding", "state, MB", *kinds, "law"], programs
        ),
        f"Projected to {CHIPS} chips, nothing overlapped, {1e6 * HOP_SECONDS:.0f} µs a "
        f"hop ({HOP_SOURCE}); computing at {' / '.join(map(str, SHARES))} of the "
        "bfloat16 peak (assumed), gradients sent in float32. Efficiency: computing / "
        "(computing + sending).",
        markdown(
            [
                *("", "examples a chip", "sharding"),
                *("computing, ms", "sending, ms", "efficiency"),
            ],
            projection_rows(results),
        ),
        *(arithmetic(name, found[0]) for name, found in results["projected"].items()),
    ]
    return "\n\n".join(parts)


def law(row: dict[str, Any]) -> float:
    """All-reduced bytes by 4 × parameters + three scalars: the losses."""
    found = row["summary"].get("all-reduce", {"bytes": 0})["bytes"]
    return found / (4 * row["parameters"] + 12)


def projection_rows(results: dict[str, Any]) -> list[list[str]]:
    """A line for each pod and program."""
    return [
        [
            name,
            str(found["per_chip"]),
            found["sharding"],
            " / ".join(rounded(1e3 * t) for t in found["computation"].values()),
            rounded(1e3 * found["communication"]),
            " / ".join(f"{share:.0%}" for share in found["efficiency"].values()),
        ]
        for name, projections in results["projected"].items()
        for found in projections
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """Ratios against devices, bytes by program, efficiency by pod."""
    figure, (times, sent, shares) = plt.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained"
    )
    colours = dict(zip(SHARDINGS, ("tab:blue", "tab:orange"), strict=True))
    for name, colour in colours.items():
        rows = [
            row
            for row in results["timed"]
            if row["sharding"] == name or row["devices"] == 1
        ]
        middle = [row["ratio"]["median"] for row in rows]
        below = [row["ratio"]["median"] - row["ratio"]["low"] for row in rows]
        above = [row["ratio"]["high"] - row["ratio"]["median"] for row in rows]
        counts = [row["devices"] for row in rows]
        times.errorbar(
            counts, middle, (below, above), label=name, color=colour, marker="o"
        )
    times.axhline(1, color="0.6", linestyle="--")
    times.set_xscale("log", base=2)
    counts = sorted({row["devices"] for row in results["timed"]})
    times.set_xticks(counts, [str(count) for count in counts])
    times.set(xlabel="virtual devices", ylabel="time / (devices × time of one)")
    times.set(title="Weak scaling, small model", ylim=(0, None))
    times.legend(loc="lower right")

    labels = dict.fromkeys(
        f"{row['devices']} devices,\nbatch {batch_cell(row)}"
        for row in results["compiled"]
    )
    for offset, (name, colour) in zip((-0.2, 0.2), colours.items(), strict=True):
        rows = [row for row in results["compiled"] if row["sharding"] == name]
        places = np.arange(len(rows)) + offset
        values = [row["summary"]["total"]["sent"] / 1e6 for row in rows]
        bars = sent.bar(places, values, 0.4, color=colour, label=name)
        sent.bar_label(bars, [rounded(value) for value in values], fontsize=8)
    sent.set_xticks(range(len(labels)), list(labels), fontsize=8)
    sent.set(yscale="log", ylabel="MB sent by a device in a step")
    sent.set(title="Collectives of the paper's model")
    sent.margins(y=0.15)
    sent.legend()

    place, ticks = 0.0, []
    for name, projections in results["projected"].items():
        for found in projections:
            low, high = sorted(100 * x for x in found["efficiency"].values())
            colour = colours[found["sharding"]]
            shares.barh(place, high - low, left=low, color=colour)
            shares.annotate(
                f"{low:.0f} to {high:.0f} %",
                (high if high < 60 else low, place),
                xytext=(4 if high < 60 else -4, 0),
                textcoords="offset points",
                ha="left" if high < 60 else "right",
                va="center",
                fontsize=8,
            )
            ticks.append((place, f"{name}, {found['per_chip']} a chip"))
            place += 1
        place += 0.5
    shares.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    shares.invert_yaxis()
    shares.set(xlim=(0, 100), xlabel="computing, % of a step")
    shares.set(title=f"Projected to {CHIPS} chips")
    figure.savefig(path, dpi=120)
    plt.close(figure)
