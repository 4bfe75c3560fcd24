"""Every study of the paper's figures and tables, one after the other.

    python -m experiments.studies.all --scale=smoke --out=DIR

takes the flags of one study and makes each; runs that several ask for are made once.
Writes DIR/README.md with all verdicts. Cost: smoke minutes; cpu about three and a half
hours on two cores with every run new; each study alone stays within two.
"""

import argparse
import importlib
from collections.abc import Sequence

from experiments.studies import study
from implicit_slots.runtime.files import write_atomically

NAMES = (
    *("fig3_solvers", "table3_reconstruction", "fig5_tricks", "fig6_iterations"),
    *("fig7_properties", "fig8_discovery", "fig9_deletion", "fig10_locality"),
    *("fig11_neumann_terms", "fig12_long", "basins", "starts", "backward_passes"),
)
STUDIES: tuple[study.Study, ...] = tuple(
    importlib.import_module(f"experiments.studies.{name}").STUDY for name in NAMES
)


def main(argv: Sequence[str] | None = None, **how) -> None:
    """Makes every study; see `study.execute` for the rest."""
    study.command(str(__doc__), lambda options: execute(options, **how), argv)


def execute(options: argparse.Namespace, **how) -> None:
    """Makes every study and the page of all verdicts."""
    for one in STUDIES:
        one.arms(options.scale)  # Refuses before the hours, not amid them.
    lines = [f"# All studies, scale {options.scale}", ""]
    for one in STUDIES:
        table = study.execute(one, options, **how)
        lines += [f"- [{one.title}]({one.name}.md): {study.verdict(one, table)}"]
        write_atomically(options.out / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
