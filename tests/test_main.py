"""The command line, as a user meets it."""

import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from configs import folder
from implicit_slots.data.source import DataError
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.run import run

ROOT = pathlib.Path(__file__).parents[1]
BOXED = "--workdir=implicit_slots/trained/scenes"


def command(*arguments, start=("-m", "implicit_slots.main"), **environment):
    """Runs `python -m implicit_slots.main` from the project's root."""
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["--config=configs/scenes.py", "--config.model.solvr.max_steps=2"],
            1,
            "no key model.solvr.max_steps; did you mean model.solver.max_steps?",
        ),
        ([BOXED, "--config.num_slts=2"], 1, "did you mean model.num_slots?"),
        (["--config=configs/nothing.py"], 1, "configs/nothing.py"),
        (["--config=configs/nothing.py", "--config.seed=1"], 1, "configs/nothing.py"),
        (["--workdir=nowhere", "--mode=evaluate"], 1, "nowhere holds no run"),
        (["--workdir=tests,configs", "--config=configs/scenes.py"], 1, "--mode=eval"),
        (["--workdir=gs://b/run", "--config=configs/scenes.py:smoke"], 1, "gcsfuse"),
        (["--workdir=gs://b/run", "--mode=evaluate"], 1, "gcsfuse"),
        (["--config=~no-one/mine.py"], 1, "there is no home folder for ~no-one"),
        (["--data=x.py", "--config=configs/scenes.py"], 1, "--mode=evaluate"),
        (["--config=configs/scenes.py:vanila"], 1, "there are vanilla, vanilla1, "),
        (["--topology=h100", "--config=configs/scenes.py"], 1, "--mode=plan"),
        ([BOXED, "--jobs=2"], 1, "--jobs is for --seeds and --sweep"),
        ([f"--config={ROOT}/configs/scenes.py:vanila"], 1, "vanila"),
        (["--config=configs/scenes.py", "--config.batch_size=x"], 2, "batch_size=x"),
        (["--config=configs/scenes.py", "--mode=dream"], 2, "mode"),
        ([BOXED, "--images=tests"], 1, "error: --images is for --mode=predict"),
        (["--mode=predict", "--images=tests", "--out=nowhere"], 2, "package: scenes"),
        (["--mode=predict", "--workdir=scenes"], 1, "needs --images=DIR_OR_FILES"),
        (["--mode=predict", "--workdir=scnes"], 1, "scnes holds no run; train one"),
        ([], 2, "--config"),
    ],
)
def test_bad_flags_are_one_sentence(arguments, code, sentence):
    result = command(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert sentence in result.stderr


def test_version_and_help_need_no_configuration_and_import_no_jax():
    result = command("--version", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stderr
    name, jax, python = result.stdout.strip().split(", ")
    assert name == f"implicit_slots {metadata.version('implicit_slots')}"
    assert jax == f"JAX {metadata.version('jax')}"
    assert python == f"Python {platform.python_version()}"
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "implicit_slots.runtime.versions" in imported
    assert not imported & {"jax", "numpy", "flax", "matplotlib"}
    assert "--[no]version" in command("--help").stdout


def test_bad_data_is_one_sentence_with_exit_code_1(tmp_path):
    result = command(
        "--config=configs/folder.py",
        f"--config.data.path={tmp_path / 'nowhere'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["", "empty"])
def test_bad_data_writes_nothing(path, tmp_path):
    (tmp_path / "empty").mkdir()
    config = folder.get_config()
    config.data.path = path and str(tmp_path / path)
    with pytest.raises((UserError, DataError)):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_run_without_a_traceback(tmp_path):
    """As `| head -1` does; the same command goes on."""
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "implicit_slots.main"],
            *["--config=configs/scenes.py:smoke", f"--workdir={tmp_path / 'run'}"],
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    with process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in said and "cannot be written" not in said
    assert "the output is read no more; the same command resumes" in said


def test_devices_must_divide_the_batch(tmp_path):
    program = (
        "import gc, runpy\n"
        "gc.disable = lambda: print('garbage is left out')\n"
        "runpy.run_module('implicit_slots.main', run_name='__main__')"
    )
    arguments = ("--config=configs/scenes.py", "--config.batch_size=7")
    result = command(
        *arguments,
        f"--workdir={tmp_path / 'run'}",
        start=("-c", program),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: a batch of 7 cannot be split evenly over 2")
    assert not (tmp_path / "run").exists()
    # Until the first step, which this run does not come to.
    assert result.stdout == "garbage is left out\n"


def test_a_start_imports_neither_tensorflow_nor_scipy():
    code = (
        "import sys, implicit_slots.training.run; "
        "sys.exit(bool({'tensorflow', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
