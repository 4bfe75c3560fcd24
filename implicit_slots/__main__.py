"""`implicit-slots` and `python -m implicit_slots`: what `implicit_slots.main` does."""

import runpy


def main() -> None:
    """Runs `implicit_slots.main` as `python -m` does: its flags are the program's."""
    runpy.run_module("implicit_slots.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
