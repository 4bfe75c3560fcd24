"""What became of the runs of `fault_injection`: lines, tables, numbers."""

import argparse
import collections
import json
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import harness

Rows = list[dict[str, Any]]


def line(row: Mapping[str, Any]) -> str:
    """A kill, while it happens."""
    aimed = "aimed at a write" if row["aimed"] else f"planned {row['planned']:.1f} s"
    return (
        f"{row['signal']} {row['at']:.1f} s after the start ({aimed}), {row['phase']}: "
        f"exit code {row['code']}, latest checkpoint {row['latest']}"
    )


def fault_line(row: Mapping[str, Any]) -> str:
    """Another fault, when its case is done."""
    wrong = "; ".join(row["wrong"]) or "as it should be"
    return f"{row['fault']}: exit code {row['code']}, {row['outcome']}: {wrong}"


def write(
    flags: argparse.Namespace,
    versions: dict[str, str],
    rows: dict[str, Rows],
    minutes: float,
) -> bool:
    """Prints the tables; writes OUT.md and OUT.json.

    Args:
      flags: of the script.
      versions: of a run.
      rows: by kind of fault.
      minutes: how long all of it took.

    Returns:
      Whether all went as it should.
    """
    facts = [{"device": versions["device"], "versions": versions}]
    about = harness.about(flags, facts)
    about["flags"].pop("keep", None)
    hardware = about["hardware"]
    kills = rows.get("kills", [])
    others = [row for part, found in rows.items() if part != "kills" for row in found]
    last = conclusion(kills, others)
    text = "\n\n".join(
        [
            f"{hardware['cores']} core(s) of {hardware['cpu']}; JAX {versions['jax']}, "
            f"Orbax {versions['orbax-checkpoint']}; {about['date']}; {minutes:.0f} "
            "minutes.",
            *([count_table(kills), kill_table(kills)] if kills else []),
            *([fault_table(others)] if others else []),
            last,
        ]
    )
    numbers = about | {"minutes": round(minutes, 1), "results": rows}
    harness.beside(flags.out, "md").write_text(text + "\n")
    path = harness.beside(flags.out, "json")
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{text}", flush=True)
    return not any(row["wrong"] for row in kills + others)


def conclusion(kills: Rows, others: Rows) -> str:
    """The last line: how many ended as the uninterrupted run."""
    sentences = []
    if kills:
        good = sum(not row["wrong"] for row in kills)
        inside = sum(row["phase"] == "inside a checkpoint" for row in kills)
        sentences.append(
            f"{good} of {len(kills)} killed runs, {inside} of them killed inside a "
            "checkpoint, equal the reference."
        )
    if others:
        good = sum(not row["wrong"] for row in others)
        sentences.append(f"{good} of {len(others)} other faults end as they should.")
    return " ".join(sentences)


def count_table(kills: Rows) -> str:
    """How many kills fell where."""
    counts = collections.Counter((row["phase"], row["signal"]) for row in kills)
    phases = ("start-up", "stepping", "inside a checkpoint", "finishing")
    signals = ("SIGTERM", "SIGKILL")
    return harness.markdown(
        ["killed while", *signals],
        [[phase, *(str(counts[phase, name]) for name in signals)] for phase in phases],
    )


def kill_table(kills: Rows) -> str:
    """A row for each kill."""
    header = [
        *("signal", "planned, s", "sent, s", "phase", "exit code"),
        *("latest checkpoint", "resumed at", "the end"),
    ]
    return harness.markdown(
        header,
        [
            [
                row["signal"],
                "a write" if row["aimed"] else f"{row['planned']:.1f}",
                f"{row['at']:.1f}",
                row["phase"],
                str(row["code"]),
                str(row["latest"]),
                "" if row["resumed"] is None else str(row["resumed"]),
                "; ".join(row["wrong"]) or "equal",
            ]
            for row in kills
        ],
    )


def fault_table(others: Rows) -> str:
    """A row for each other fault."""
    return harness.markdown(
        ["fault", "exit code", "what happens", "the end"],
        [
            [
                row["fault"],
                str(row["code"]),
                row["outcome"],
                "; ".join(row["wrong"]) or "as it should be",
            ]
            for row in others
        ],
    )
