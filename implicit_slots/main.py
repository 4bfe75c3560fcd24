"""Command line: `python -m implicit_slots.main --config=configs/scenes.py`."""

import logging as standard_logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from implicit_slots.runtime import garbage, versions, xla_warnings
from implicit_slots.runtime.allocator import keep_freed_memory
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.flags import (
    drop_output,
    flag_value,
    is_flag,
    parse,
    refuse_rest,
    without,
)
from implicit_slots.runtime.signals import RESUME_ME, stopping
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    config_flag,
    find_trained,
    packaged,
    read_config,
    workdirs,
    writing,
)

_BEGAN = time.perf_counter()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with an optional :variant.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is written; runs/<name> unless told otherwise. Of a run that is "
    "there, which then needs no --config; to compare evaluations, several: A,B,C.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "predict", "prepare", "replay", "plan"],
    "Train, evaluate a trained model, predict: write masks of --images of your own, "
    "prepare: write the cache of frozen features, replay the step at which a run "
    "stopped, or plan: say what the train step needs of --topology, and run nothing.",
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    "latest",
    ["latest", "best"],
    "What to evaluate: the latest checkpoint, or the one of the best validation loss.",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether this is one of several processes; auto: where a cluster says so.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where no cluster tells."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes, where no cluster tells."
)
_PROCESS_INDEX = flags.DEFINE_integer(
    "process_index", None, "Which of them this is, from 0, where no cluster tells."
)
_DATA = flags.DEFINE_string(
    "data", None, "To evaluate on other data: the configuration FILE they are from."
)
_IMAGES = flags.DEFINE_multi_string(
    "images",
    [],
    "To predict: a picture, a folder of them or a pattern; as often as needed.",
)
_OUT = flags.DEFINE_string(
    "out", None, "To predict: the folder to write to, which holds nothing yet."
)
_SLOTS = flags.DEFINE_integer(
    "slots", None, "To predict: how many, in place of the model's number."
)
_ITERATIONS = flags.DEFINE_integer(
    "iterations", None, "To predict: at most so many, in place of the model's number."
)
_STARTS = flags.DEFINE_integer(
    "starts", None, "To predict: how many initial slots are tried for each image."
)
_SEEDS = flags.DEFINE_string(
    "seeds", None, "To train several runs, one after the other: their seeds, 0,1,2."
)
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Of those runs, how many at a time, each on a core or GPU of its own."
)
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "The same with config.KEY=VALUE,VALUE,…; as often as needed."
)
_SHIFT = flags.DEFINE_string(
    "shift",
    "",
    "To evaluate what shifts of the embedded scenes cost: all, or some by name "
    "(objects,colours,light,ground,cropped,noise,camera,shapes,textures,occlusion).",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "To plan: the devices, such as v5e:16x16, h100, h100:8, or here.",
)
_SLICES = flags.DEFINE_integer(
    "slices", 1, "To plan: how many TPU slices, or hosts with GPUs."
)
flags.DEFINE_boolean("version", False, "Says the versions, and runs nothing.")
_SPLITS = flags.DEFINE_list(
    "splits", ["train", "validation", "test"], "To prepare: which splits, with commas."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Runs what the flags say.

    Exits with 1 on what the user can put right, and with 75 ("try again") where the run
    was told to stop and the same command goes on.
    """
    # Orbax and clu report every file they touch at INFO, Matplotlib a home folder that
    # is not there.
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("matplotlib").setLevel(standard_logging.ERROR)
    keep_freed_memory()
    if _MODE.value == "predict":
        xla_warnings.leave_out()
        sys.exit(_predict(argv[1:]))
    refuse_rest(argv)
    config = _CONFIG.value
    if _SEEDS.value is not None or _SWEEP.value:
        sys.exit(_sweep())
    evaluates = _MODE.value == "evaluate"
    if _JOBS.value != 1:
        sys.exit("error: --jobs is for --seeds and --sweep")
    several = workdirs(_WORKDIR.value or "", to_compare=evaluates)
    if len(several) > 1:
        sys.exit(_compare(several))
    try:
        workdir = expand(_WORKDIR.value or os.path.join("runs", str(config.name)))
    except UserError as error:
        sys.exit(f"error: {error}")
    if _DATA.value and _MODE.value != "evaluate":
        sys.exit("error: --data is for --mode=evaluate; --config says what to train on")
    if _IMAGES.value:
        sys.exit("error: --images is for --mode=predict")
    if _MODE.value != "plan" and (_TOPOLOGY.value or _SLICES.value != 1):
        sys.exit(
            "error: --topology and --slices are for --mode=plan, which runs nothing"
        )
    xla_warnings.leave_out()
    if _MODE.value == "plan":
        sys.exit(_plan())
    if _MODE.value == "prepare":
        sys.exit(_prepare())
    if _MODE.value == "train":
        garbage.leave_out()
    # After the flags are looked at, and --help: they need no JAX.
    from implicit_slots.runtime import devices, processes
    from implicit_slots.runtime.preemption import Preempted
    from implicit_slots.training.run import run

    try:
        if where := processes.initialize(
            _DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            count=_NUM_PROCESSES.value,
            index=_PROCESS_INDEX.value,
        ):
            print(where, flush=True)
        run(
            config,
            workdir,
            mode=_MODE.value,
            checkpoint=_CHECKPOINT.value,
            shift=_SHIFT.value,
            command=_command(),
            began=_BEGAN,
        )
    except Preempted as stop:
        # All processes end here together.
        if processes.is_main():
            print(
                f"told to stop: saved at step {stop.step}; the same command resumes "
                f"{workdir}",
                file=sys.stderr,
            )
        sys.exit(RESUME_ME)
    except UserError as error:
        processes.leave(f"error: {error}")
    except BrokenPipeError:
        drop_output()
        processes.leave(
            f"the output is read no more; the same command resumes {workdir}"
        )
    except KeyboardInterrupt:
        processes.leave(f"stopped; the same command resumes {workdir}")
    except Exception as error:
        if processes.lost_another(error):
            processes.leave("error: another process of this run ended; it says why")
        if devices.is_out_of_memory(error):
            from implicit_slots.training.plan import out_of_memory

            processes.leave(f"error: {out_of_memory(error, config, workdir)}")
        processes.leave(traceback.format_exc().rstrip())


def _command() -> str:
    return shlex.join(["python", "-m", "implicit_slots.main", *sys.argv[1:]])


def _plan() -> str | int:
    """Says what the train step needs of devices that may not be here."""
    from implicit_slots.runtime import topologies

    topologies.prepare(_TOPOLOGY.value or topologies.HERE)
    from implicit_slots.training import plan

    try:
        topology = topologies.devices_of(
            _TOPOLOGY.value or topologies.HERE, _SLICES.value
        )
        plan.run(_CONFIG.value, topology)
    except UserError as error:
        return f"error: {error}"
    return 0


def _prepare() -> str | int:
    """Writes the cache of features."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from implicit_slots.training import prepare

    try:
        prepare.run(_CONFIG.value, _SPLITS.value)
    except UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return "stopped; the same command goes on where it was"
    return 0


def _predict(more: list[str]) -> str | int:
    """Writes masks of images; `more` of them are what a shell made of a pattern."""
    workdir, paths = _WORKDIR.value or "", [*_IMAGES.value, *more]
    if not paths or not _OUT.value:
        return "error: --mode=predict needs --images=DIR_OR_FILES and --out=DIR"
    asked = {
        "model.num_slots": _SLOTS.value,
        "model.solver.max_steps": _ITERATIONS.value,
        "evaluation.masks.starts": _STARTS.value,
    }
    before = flat(read_config(find_trained(workdir) / CONFIG_FILE).to_dict())
    now = flat(_CONFIG.value.to_dict())
    now |= {key: value for key, value in asked.items() if value is not None}
    changes = {key: value for key, value in now.items() if before.get(key) != value}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from implicit_slots.training import predict

    try:
        page = predict.run(
            workdir, paths, _OUT.value, changes=changes, command=_command()
        )
    except UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return f"stopped; {_OUT.value} has what was made until now"
    print(f"page: {page}", flush=True)
    return 0


def _sweep() -> str | int:
    """Trains and evaluates several runs."""
    from implicit_slots.training import sweep

    if _MODE.value != "train":
        return "error: --seeds and --sweep are for --mode=train, which evaluates too"
    config, rest = _CONFIG.value, sys.argv[1:]
    for name in ("seeds", "sweep", "jobs", "workdir"):
        rest = without(name, rest)
    try:
        values = sweep.values_of(_SEEDS.value, _SWEEP.value, config)
        workdir = _WORKDIR.value or os.path.join("runs", f"{config.name}-sweep")
        return sweep.run(values, expand(workdir), rest, _JOBS.value)
    except UserError as error:
        return f"error: {error}"


def _compare(several: list[str]) -> str | int:
    """Evaluates each run in a process of its own, then writes a page on all of them."""
    if _MODE.value != "evaluate":
        return "error: several workdirs are for --mode=evaluate"
    for workdir in several:
        rest = without("workdir", sys.argv[1:])
        command = [sys.executable, "-m", "implicit_slots.main", *rest]
        # A run that cannot be evaluated is listed in the page.
        subprocess.run([*command, f"--workdir={workdir}"], check=False)
    from implicit_slots.report.comparison import write_comparison

    try:
        paths = [expand(workdir) for workdir in several]
        common = pathlib.Path(os.path.commonpath([path.resolve() for path in paths]))
        with writing(common):
            report = write_comparison(paths, common / "report.html")
        print(f"report: {report}")
    except UserError as error:
        return f"error: {error}"
    return 0


def _parse(argv: list[str]) -> list[str]:
    """As `parse`; a run that is there brings its configuration."""
    if "--version" in argv[1:] or "-version" in argv[1:]:
        print(versions.sentence())
        sys.exit()
    workdir = flag_value("workdir", argv)
    if flag_value("mode", argv) == "predict":
        argv = [argv[0], *_of_trained(workdir), *argv[1:]]
    elif workdir and not any(is_flag("config", flag) for flag in argv):
        evaluates = flag_value("mode", argv) == "evaluate"
        first = workdirs(workdir, to_compare=evaluates)[0]
        argv = [argv[0], config_flag(first, flag_value("data", argv)), *argv[1:]]
    return parse(argv)


def _of_trained(workdir: str | None) -> list[str]:
    """The --config of a trained model; one that follows counts in its place."""
    known = ", ".join(packaged())
    if not workdir:
        sentence = f"of a trained run, or the name of a model of the package: {known}"
        print(f"error: --mode=predict needs a --workdir: {sentence}", file=sys.stderr)
        sys.exit(2)
    try:
        folder = find_trained(workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    if not (folder / CONFIG_FILE).exists():
        sys.exit(
            f"error: {workdir} holds no run; train one there first, or take a model of "
            f"the package: {known}"
        )
    return [config_flag(str(folder), None)]


def _stop(number: int, _: FrameType | None) -> None:
    """Ends this process, or, of several, tells all of them to end."""
    processes = sys.modules.get("implicit_slots.runtime.processes")
    if number == signal.SIGINT or processes is None or not processes.is_connected():
        os._exit(RESUME_ME)
    os.kill(os.getpid(), signal.SIGTERM)  # JAX takes this one.


def _end(stop: SystemExit) -> NoReturn:
    """Ends this process; at once if it is alone: a thread may compile for minutes."""
    processes = sys.modules.get("implicit_slots.runtime.processes")
    if not stop.code or processes is None or processes.is_connected():
        raise stop
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stop.code if isinstance(stop.code, int) else 1)


if __name__ == "__main__":
    # Before the loop, which saves first, and after it, nothing can be lost. (C++ that
    # calls Python may swallow an exception.)
    for number in stopping():
        signal.signal(number, _stop)
    try:
        app.run(main, flags_parser=_parse)
    except SystemExit as stop:
        _end(stop)
