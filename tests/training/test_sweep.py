"""`--seeds` and `--sweep`: which runs, in which order, once each; the table of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ml_collections import ConfigDict

from implicit_slots.runtime import children
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.signals import RESUME_ME
from implicit_slots.training import sweep

CONFIG = ConfigDict({"seed": 0, "lr": 0.1, "a": {"terms": 1}, "b": {"terms": 1}})


def test_runs_are_every_combination_by_names_that_tell_them_apart():
    values = sweep.values_of("0,1", ["config.lr=0.1, 1e-3"], CONFIG)
    assert values == {"lr": ["0.1", "1e-3"], "seed": ["0", "1"]}
    assert sweep.runs_of(values) == {
        f"lr={lr},seed={seed}": {"lr": lr, "seed": seed}
        for lr in ("0.1", "1e-3")
        for seed in ("0", "1")
    }
    values = sweep.values_of(None, ["a.terms=1", "--config.b.terms=x/y"], CONFIG)
    assert list(sweep.runs_of(values)) == ["a.terms=1,b.terms=x_y"]


@pytest.mark.parametrize(
    ("seeds", "sweeps", "sentence"),
    [
        (None, ["lr"], r"'lr' names no values; write --sweep=config\.KEY=1,2,4"),
        ("0,", [], r"'seed=0,' names no values"),
        ("0,x", [], r"seeds are whole numbers from 0, got '0,x'"),
        (None, ["config.a.trms=1"], r"no key a\.trms; did you mean a\.terms\?"),
        ("1", ["seed=2"], r"'seed=1' has something twice"),
        (None, ["lr=1,1"], r"'lr=1,1' has something twice"),
    ],
)
def test_what_is_no_sweep_is_one_sentence(seeds, sweeps, sentence):
    with pytest.raises(UserError, match=sentence):
        sweep.values_of(seeds, sweeps, CONFIG)


def test_runs_that_are_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    calls = []
    codes = {}

    def launch(_, arguments, *__):
        name = next(a for a in arguments if "workdir" in a).rpartition("/")[2]
        mode = "evaluate" if "--mode=evaluate" in arguments else "train"
        calls.append((mode, name))
        workdir = tmp_path / name
        if code := codes.get((mode, name)):
            return code
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps({"seed": int(name[-1])}))
        (workdir / "summary.json").write_text(json.dumps({"step": 7}))
        if mode == "evaluate":
            (workdir / "evaluation" / "test").mkdir(parents=True)
            record = {"metrics": {"ari": {"mean": 0.5 + int(name[-1])}}, "step": 7}
            file = workdir / "evaluation" / "test" / "metrics.json"
            file.write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(sweep, "launch", launch)
    values = {"seed": ["1", "2", "3"]}
    codes["train", "seed=2"] = RESUME_ME
    assert sweep.run(values, tmp_path, ["--config=x"]) == RESUME_ME
    assert calls == [("train", "seed=1"), ("evaluate", "seed=1"), ("train", "seed=2")]
    assert not (tmp_path / "runs.csv").exists()
    assert "stopped at seed=2; the same command goes on" in capsys.readouterr().err

    calls.clear()
    codes["train", "seed=2"] = 1
    assert sweep.run(values, tmp_path, ["--config=x"]) == 1
    assert calls == [(m, f"seed={s}") for m, s in (("train", 1), ("train", 2))] + [
        ("train", "seed=3"),
        ("evaluate", "seed=3"),
    ]
    assert "error: seed=2 failed" in capsys.readouterr().err
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    done = {"evaluation": "test", "step": "7"}
    assert rows == [
        {"run": "seed=1", "seed": "1", "ari": "1.5", **done},
        {"run": "seed=2", "seed": "", "ari": "", "evaluation": "", "step": ""},
        {"run": "seed=3", "seed": "3", "ari": "3.5", **done},
    ]
    assert (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="holds a run; choose another --workdir for se"):
        sweep.run(values, tmp_path / "seed=1", [])


def test_runs_at_a_time_have_places_and_logs_of_their_own(
    tmp_path, monkeypatch, capsys
):
    """Two at a time: as long as both are on, a third waits for either's place."""
    both, seen = threading.Barrier(2, timeout=20), []

    def launch(children, arguments, workdir, place):
        if "--mode=evaluate" in arguments:
            return 0
        seen.append((workdir.name, place))
        both.wait()
        return 3 if workdir.name == "seed=2" else 0

    monkeypatch.setattr(sweep, "launch", launch)
    for name in ("write_table", "write_comparison"):
        monkeypatch.setattr(sweep, name, lambda *_: None)
    values = {"seed": ["0", "1", "2", "3"]}
    assert sweep.run(values, tmp_path, [], jobs=2) == 1
    assert sorted(place for _, place in seen) == [0, 0, 1, 1]
    assert {name for name, _ in seen} == {f"seed={seed}" for seed in range(4)}
    said = capsys.readouterr()
    assert "run 2 of 4: seed=1 done after 0 s" in said.out
    assert "run 3 of 4: seed=2 failed after 0 s" in said.out
    log = tmp_path / "seed=2.log"
    assert f"error: seed=2 failed; what it said is in {log}" in said.err


def test_a_run_among_others_writes_to_its_log_on_one_core(tmp_path, monkeypatch):
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    (tmp_path / "say.py").write_text(f"import time; time.sleep(0.2); {code}")
    monkeypatch.setattr(sweep, "MODULE", [str(tmp_path / "say.py")])
    for place in (0, 1):
        assert sweep.launch(children.Children(), [], tmp_path / "out" / "a", place) == 0
    cores = sorted(os.sched_getaffinity(0))
    first, second = cores[0], cores[1 % len(cores)]
    log = (tmp_path / "out" / "a.log").read_text()
    assert log == f"[{first}]\n[{second}]\n"


def test_gpus_are_given_one_to_each(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert children.visible_gpus() == []
    children.check_jobs(3)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert children.visible_gpus() == ["2", "GPU-ab"]
    (tmp_path / "say.py").write_text(
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    monkeypatch.setattr(sweep, "MODULE", [str(tmp_path / "say.py")])
    assert sweep.launch(children.Children(), [], tmp_path / "a", 1) == 0
    assert (tmp_path / "a.log").read_text() == "GPU-ab\n"
    for jobs in (0, 3):
        with pytest.raises(UserError, match="must be 1 to 2, one on each GPU, got"):
            sweep.run({"seed": ["0"]}, tmp_path / "b", [], jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_is_told_to_stop_once_and_waited_for(jobs, tmp_path, monkeypatch):
    code = (
        "import os, signal, sys, time\n"
        f"told = open({str(tmp_path)!r} + f'/told-{{os.getpid()}}', 'w')\n"
        "def stop(*_):\n"
        "    told.write('told,')\n"
        "    time.sleep(0.2)\n"
        "    told.write('saved')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path)!r} + f'/ready-{{os.getpid()}}', 'w')\n"
        "time.sleep(20)\n"
    )
    (tmp_path / "stopping.py").write_text(code)
    monkeypatch.setattr(sweep, "MODULE", [str(tmp_path / "stopping.py")])
    # The test's own process is told, as a batch system does.
    teller = (
        "import glob, os, time\n"
        f"while len(glob.glob({str(tmp_path)!r} + '/ready-*')) < {jobs}:\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getppid(), 15)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", teller]):
        values = {"seed": ["0", "1", "2"]}
        assert sweep.run(values, tmp_path / "runs", [], jobs) == RESUME_ME
    assert time.monotonic() - began < 10
    told = [file.read_text() for file in tmp_path.glob("told-*")]
    assert told == ["told,saved"] * jobs
    assert signal.getsignal(signal.SIGTERM) == before
