"""`--seeds` and `--sweep`: which runs, in which order, once each; the table of them."""

import csv
import json
import signal
import sys
import time

import pytest
from ml_collections import ConfigDict

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

    def launch(arguments):
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


def test_a_run_is_told_to_stop_once_and_waited_for(tmp_path, monkeypatch):
    code = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        f"    open({str(tmp_path / 'told')!r}, 'a').write('told,')\n"
        "    time.sleep(0.2)\n"
        f"    open({str(tmp_path / 'told')!r}, 'a').write('saved')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w')\n"
        "time.sleep(20)\n"
    )
    (tmp_path / "stopping.py").write_text(code)
    monkeypatch.setattr(sweep, "MODULE", [str(tmp_path / "stopping.py")])
    # The test's own process is told, as a batch system does.
    teller = (
        f"import os, time; ready = {str(tmp_path / 'ready')!r}\n"
        "while not os.path.exists(ready): time.sleep(0.01)\n"
        "os.kill(os.getppid(), 15)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with sweep.subprocess.Popen([sys.executable, "-c", teller]):
        assert sweep.launch([]) == RESUME_ME
    assert time.monotonic() - began < 10
    assert (tmp_path / "told").read_text() == "told,saved"
    assert signal.getsignal(signal.SIGTERM) == before
