"""The studies of the paper's figures: rules, runs that are never made twice, pages."""

import ast
import csv
import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from experiments.studies import all as all_studies
from experiments.studies import (
    backward_passes,
    drawing,
    fig3_solvers,
    fig7_properties,
    fig9_deletion,
    fig11_neumann_terms,
    probes,
    rates,
    runs,
    scales,
    starts,
    study,
)
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule, judge, paired_effect, sentence
from experiments.studies.table import Measurement, Table, as_csv
from implicit_slots.models.build import build
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.signals import RESUME_ME
from implicit_slots.training import run
from implicit_slots.training.checks import check

LOWER = Rule("a is lower", "loss", "a", "b", "lower", 0.05)
DIFFERENCE = LOWER._replace(by="difference", better="higher", expected="higher")
NAN = math.nan


def by_seed(*values):
    return dict(enumerate(values))


def test_the_effect_is_the_median_of_pairs_and_its_bootstrap_interval():
    rng = np.random.default_rng(1)
    a, b = rng.normal(5, 1, 15), rng.normal(6, 1, 15)
    rule = LOWER._replace(by="difference")
    effect = paired_effect(by_seed(*a), by_seed(*b), rule)
    assert effect is not None and effect.median == np.median(a - b)
    ours = effect.low, effect.high
    theirs = stats.bootstrap(
        (a - b,), np.median, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.2)
    # Pairs, not arms: what a seed adds to both changes nothing.
    shifts = rng.normal(0, 100, 15)
    again = paired_effect(by_seed(*(a + shifts)), by_seed(*(b + shifts)), rule)
    assert again is not None
    np.testing.assert_allclose(again[:3], effect[:3], atol=1e-9)


@pytest.mark.parametrize(
    ("a", "verdict"),
    [
        ((0.8, 0.9, 0.7), "holds"),
        ((1.2, 1.3, 1.1), "opposite"),
        ((0.8, 1.3, 0.7), "undecided"),
        ((0.99, 0.98, 0.99), "undecided"),  # Less than counts.
        ((0.8, 0.9, NAN), "undecided"),
        ((NAN, NAN, NAN), "opposite"),
    ],
)
def test_the_rule_decides_and_a_diverged_run_is_the_worst(a, verdict):
    effect = paired_effect(by_seed(*a), by_seed(1, 1, 1), LOWER)
    assert judge(effect, LOWER) == verdict
    # The other way round: the reciprocal claim.
    back = paired_effect(by_seed(1, 1, 1), by_seed(*a), LOWER)
    swapped = {"holds": "opposite", "opposite": "holds"}.get(verdict, verdict)
    assert judge(back, LOWER) == swapped


def test_diverged_runs_are_counted_and_equal_to_each_other():
    effect = paired_effect(by_seed(NAN, 0.5, NAN), by_seed(NAN, 1, 1), LOWER)
    assert effect is not None and effect.diverged == (2, 1) and effect.pairs == 3
    assert effect.median == 1 and effect.high == math.inf
    assert "diverged: 2 and 1" in sentence(effect, LOWER)
    worst = paired_effect(by_seed(NAN, NAN), by_seed(0.1, 0.2), DIFFERENCE)
    assert worst is not None and worst.median == -math.inf


def test_four_pairs_have_the_mean_of_the_middle_two():
    higher = LOWER._replace(expected="higher")
    effect = paired_effect(by_seed(1.01, 1.02, 1.06, 1.07), by_seed(1, 1, 1, 1), higher)
    assert effect is not None and effect.median == pytest.approx(1.04)
    assert judge(effect, higher) == "undecided"
    spared = LOWER._replace(ranks_diverged=False)
    lost = paired_effect(by_seed(NAN, NAN), by_seed(1, 1), spared)
    assert judge(lost, LOWER) == "opposite" and judge(lost, spared) == "undecided"


def test_similar_needs_the_whole_interval_and_one_pair_decides_nothing():
    similar = LOWER._replace(expected="similar")
    for a, verdict in (((1.01, 0.98), "holds"), ((1.2, 1.3), "opposite")):
        assert judge(paired_effect(by_seed(*a), by_seed(1, 1), similar), similar) == (
            verdict
        )
    wide = paired_effect(by_seed(1.01, 1.3), by_seed(1, 1), similar)
    assert judge(wide, similar) == "undecided"
    one = paired_effect(by_seed(0.1), by_seed(1), LOWER)
    assert judge(one, LOWER) == judge(one, similar) == "undecided"
    assert judge(paired_effect({}, by_seed(1), LOWER), LOWER) == "not measured"


@pytest.mark.parametrize("one", all_studies.STUDIES, ids=lambda one: one.name)
def test_a_figure_with_foreground_ari_has_ari_and_miou_beside_it(one):
    """A panel for each of them, of the same masks and over the same axis."""
    drawn = []
    for panel in one.panels:
        axis = Figure().subplots()
        panel(axis, Table((), (runs.Done("a@1", 0, pathlib.Path(), ""),)))
        drawn.append((axis.get_xlabel(), axis.get_ylabel()))
    for x, y in drawn:
        if "foreground ARI" in y:
            for name in ("ARI", "mIoU"):
                other = [text.replace("foreground ARI", name) for text in (x, y)]
                assert tuple(other) in drawn


def test_every_table_ends_in_all_three_scores_of_both_masks():
    done = (runs.Done("a", 0, pathlib.Path(), ""),)
    measured = {"loss": 2.0, "fg_ari": 0.85, "ari": 0.08, "miou": 0.21}
    decoders = {"fg_ari": 0.68, "ari": 0.67, "miou": 0.5}
    for kind in ("decoder/", "decoder_"):  # as a probe measures them, as training logs
        values = measured | {f"{kind}{name}": v for name, v in decoders.items()}
        rows = [Measurement("a", 0, 1, "validation", n, v) for n, v in values.items()]
        one = dataclasses.replace(all_studies.STUDIES[0], summary=("loss",))
        heading, _, line = study.summary(one, Table(tuple(rows), done)).splitlines()
        assert heading == (
            f"| | loss | fg_ari | ari | miou | {kind}fg_ari | {kind}ari | {kind}miou "
            "| diverged |"
        )
        assert line == "| a | 2 | 0.85 | 0.08 | 0.21 | 0.68 | 0.67 | 0.5 | 0 |"
    # Of data without masks there is none.
    rows = [Measurement("a", 0, 1, "validation", "loss", 2.0)]
    assert study.scores_of(Table(tuple(rows), done)) == []


def in_process(command, log, place):
    """What `runs.launch` starts, in this process, compiled quickly."""
    del log, place
    flags = dict(flag[2:].split("=", 1) for flag in command[3:])
    workdir = pathlib.Path(flags.pop("workdir"))
    if command[2] == "experiments.studies.probes":
        probes.main([f"--workdir={workdir}", f"--probe={flags['probe']}"])
        return 0
    arm = Arm("", flags.pop("config"), {k[7:]: typed(v) for k, v in flags.items()})
    run.run(runs.resolve(arm, arm.changes["seed"]), workdir)
    return 0


def typed(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every study at its smallest."""
    out = tmp_path_factory.mktemp("studies")
    flags = ["--scale=smoke", f"--out={out}", "--jobs=1"]
    all_studies.main(flags, start=in_process)
    return out, flags


@pytest.mark.slow
def test_every_study_ends_in_a_figure_a_table_and_a_verdict(smoke):
    out, _ = smoke
    # What needs weights, or a run that has passed more than one checkpoint.
    absent = {"slots/fid"} | {
        f"{name}{fig9_deletion.MATCHED}" for name in fig9_deletion.AT_CROSS_ENTROPY
    }
    index = (out / "README.md").read_text()
    for one in all_studies.STUDIES:
        page = (out / f"{one.name}.md").read_text()
        assert one.doc.strip() in page and "Claim:" in one.doc and "Rule:" in one.doc
        for rule in one.rules:
            assert f"{rule.claim}: **" in page
        assert f"]({one.name}.md)" in index
        for name in (one.name, *one.more):
            assert (out / f"{name}.png").stat().st_size > 5_000
            assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with (out / f"{one.name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        arms = {arm.name for arm in one.arms("smoke")}
        measured_of = {row["arm"] for row in rows if row["split"] != "derived"}
        assert measured_of == arms
        assert all(math.isfinite(float(row["value"] or 0)) for row in rows)
        measured = {row["metric"] for row in rows}
        # Those that decide too, of arms that are there; FID needs weights.
        decides = {rule.metric for rule in one.rules if {rule.a, rule.b} <= arms}
        if one is backward_passes.STUDY:  # No set predictor at this scale.
            measured.add(backward_passes.AP)
        missing = (set(one.summary) | decides) - measured - absent
        assert not missing, one.name


@pytest.mark.slow
def test_nothing_is_made_twice_and_studies_share_runs(smoke, capsys):
    out, flags = smoke
    made = sorted(path.name for path in (out / "runs").iterdir() if path.is_dir())
    asked = sum(len(one.arms("smoke")) for one in all_studies.STUDIES)
    assert len(made) < asked

    def refuse(*_):
        raise AssertionError("a finished run was started again")

    before = (out / "fig3_solvers.csv").read_text()
    study.main(all_studies.STUDIES[0], flags, start=refuse)
    assert "3 there already" in capsys.readouterr().out
    assert (out / "fig3_solvers.csv").read_text() == before


def test_a_folder_is_one_configuration_and_a_command_makes_it(tmp_path):
    base = scales.slate("smoke")
    a, b = (
        runs.place_of(runs.resolve(scales.arm(base, "a", changes), 0), tmp_path)
        for changes in ({}, {"model.adjoint.terms": 2})
    )
    assert a != b
    renamed = runs.resolve(scales.arm(base, "another name"), 0)
    assert runs.place_of(renamed, tmp_path) == a
    assert runs.place_of(runs.resolve(scales.arm(base, "a"), 1), tmp_path) != a
    # Hashed before the key was there: such a run is found, one with more starts is not.
    older = runs.resolve(scales.arm(base, "a"), 0)
    with older.unlocked():
        del older.evaluation.masks.starts
    assert runs.place_of(older, tmp_path) == a
    starts = {"evaluation.masks.starts": 3}
    many = runs.resolve(scales.arm(base, "a", starts), 0)
    assert runs.place_of(many, tmp_path) != a
    arm = scales.arm(base, "a", {"optimizer.clip": "none"}, ["masks"])
    train, probe = runs.commands(arm, 3, a).values()
    assert "--config.optimizer.clip=none" in train and "--config.seed=3" in train
    assert probe[-1] == "--probe=masks"
    with pytest.raises(UserError, match="no such key"):
        runs.resolve(scales.arm(base, "a", {"model.adjoint.termz": 2}), 0)


def derived(one):
    """What a study compares that is no run: choices among the slots of one."""
    if one is not starts.STUDY:
        return set()
    return {rule.a for rule in one.rules} | {rule.b for rule in one.rules}


@pytest.mark.parametrize("scale", scales.SCALES)
def test_every_arm_is_a_configuration_at_every_scale(scale):
    for one in all_studies.STUDIES:
        if scale == "folder" and one is fig7_properties.STUDY:
            with pytest.raises(UserError, match="choose another --scale"):
                one.arms(scale)
            continue
        arms = one.arms(scale)
        assert len({arm.name for arm in arms}) == len(arms)
        named = {rule.a for rule in one.rules} | {rule.b for rule in one.rules}
        # Where rates were searched for.
        lower = {*fig3_solvers.SLOWER.values(), fig11_neumann_terms.SLOWER}
        # Small scales leave some out, and say of their rules "not measured".
        few = scale not in ("gpu", "paper")
        assert few or named <= {arm.name for arm in arms} | derived(one) | lower
        for arm in arms:
            assert set(arm.probes) <= probes.PROBES.keys()
            config = runs.resolve(arm, 1)
            assert config.seed == 1
            check(config, "train")


def test_a_trained_start_gets_a_gradient_from_every_backward_pass():
    for arm in backward_passes.STUDY.arms("cpu"):
        if not arm.name.startswith(backward_passes.SET_PREDICTOR):
            continue
        config = runs.resolve(arm, 0)
        unrolled = config.model.adjoint.name == "unrolled"
        assert unrolled == arm.name.endswith("unrolled")
        build(config)  # It says so where the start would get none.
        changed = probes.with_one_term(config)
        adjoint = changed.model.adjoint
        assert (adjoint.name, adjoint.terms) == ("neumann", 1)
        build(changed)


def test_all_arms_of_a_seed_come_before_the_next_seed(tmp_path):
    base, made = scales.slate("smoke"), []

    def start(command, log, place):
        del log, place
        flags = dict(part[2:].split("=", 1) for part in command[3:])
        made.append((flags["config.seed"], flags.get("config.model.adjoint.terms")))
        workdir = pathlib.Path(flags["workdir"])
        workdir.mkdir()
        (workdir / "summary.json").write_text("{}")
        return 0

    arms = [
        scales.arm(base, f"{terms} terms", {"model.adjoint.terms": terms})
        for terms in (2, 3)
    ]
    done = runs.train_all(arms, [5, 4], tmp_path, jobs=1, start=start)
    assert made == [("5", "2"), ("5", "3"), ("4", "2"), ("4", "3")]
    # What is returned is in the arms' order.
    assert [(one.arm, one.seed) for one in done][:2] == [("2 terms", 5), ("2 terms", 4)]


def test_some_arms_alone_and_a_search_with_seeds_of_its_own(tmp_path):
    flags, commands = ["--scale=smoke", "--jobs=1", f"--out={tmp_path}"], []

    def stopped(command, log, place):
        del place
        commands.append(command)
        log.write_text("stopped\n")
        return RESUME_ME

    with pytest.raises(SystemExit, match="goes on where it was"):
        study.main(fig3_solvers.STUDY, [*flags, "--arms=B?"], start=stopped)
    assert "--config.model.solver.name=broyden" in commands[0]
    with pytest.raises(SystemExit, match="names none of fig3_solvers's arms"):
        study.main(fig3_solvers.STUDY, [*flags, "--arms=bb"], start=stopped)
    with pytest.raises(SystemExit, match="goes on"):
        study.main(rates.STUDY, flags, start=stopped)
    assert "--config.seed=100" in commands[-1]


def test_rates_are_multiplied_and_the_dvaes_stays():
    config = runs.resolve(scales.arm(scales.slate("cpu"), "a"), 0)
    found = scales.rates(scales.slate("cpu"), 2.0)
    assert found == {
        "optimizer.learning_rate": 2 * config.optimizer.learning_rate,
        "optimizer.slots_learning_rate": 2 * config.optimizer.slots_learning_rate,
    }
    vanilla, implicit = scales.gradients("cpu").values()
    assert vanilla["model.adjoint.name"] == "unrolled" and (
        "model.adjoint.name" not in implicit
    )
    ratio = implicit["optimizer.learning_rate"] / vanilla["optimizer.learning_rate"]
    assert ratio == pytest.approx(scales.BEST["cpu"][1] / scales.BEST["cpu"][0])


def test_at_equal_time_a_slower_pass_is_read_earlier():
    arms = ("SLATE: 1 term", "SLATE: 8 terms", "autoencoder: 1 term")
    rows = [
        Measurement(arm, 0, step, "validation", "fg_ari", step / 10)
        for arm in arms
        for step in (0, 5, 10)
    ]
    rows += [
        Measurement(arm, 0, 10, "probe", "time_ratio", ratio)
        for arm, ratio in zip(arms, (1.0, 2.0, 3.0), strict=True)
    ]
    done = tuple(runs.Done(arm, 0, pathlib.Path(), "") for arm in arms)
    found = backward_passes.in_time(Table(tuple(rows), done))
    # By the fastest of the same model.
    assert {row.arm: (row.step, row.value) for row in found} == {
        "SLATE: 1 term": (10, 1.0),
        "SLATE: 8 terms": (5, 0.5),
        "autoencoder: 1 term": (10, 1.0),
    }


def test_choices_among_starts_are_compared_as_arms():
    metrics = {"fg_ari by residual of 10@7": 0.9, "fg_ari by truth of 1@7": 0.7}
    # Of a single start every rule is the same: it is taken once.
    rows = [
        Measurement("vanilla", 0, 5, "probe", name, value)
        for name, value in ({**metrics, "fg_ari by loss of 1@7": 0.7}).items()
    ]
    found = tuple(starts.choices(Table(tuple(rows), ())))
    assert {(row.arm, row.metric, row.value) for row in found} == {
        ("vanilla, best of 10 by the residual, 7 iterations", "chosen fg_ari", 0.9),
        ("vanilla, first start, 7 iterations", "chosen fg_ari", 0.7),
    }
    rule = next(r for r in starts.STUDY.rules if r.claim.startswith("vanilla: the res"))
    table = Table(found, ())
    a, b = (table.last(arm, rule.metric) for arm in (rule.a, rule.b))
    effect = paired_effect(a, b, rule)
    assert effect is not None and effect.median == pytest.approx(0.2)


def failing(code, *, replay=False, text="error: no room\n"):
    """A launch that ends badly."""

    def start(command, log, place):
        del place
        workdir = pathlib.Path(
            next(f for f in command if f.startswith("--workdir=")).partition("=")[2]
        )
        if replay:
            (workdir / "replay").mkdir(parents=True)
        with log.open("a") as file:
            file.write(text)
        return code

    return start


def test_runs_that_fail_are_told_from_runs_that_diverge(tmp_path):
    arm = scales.arm(scales.slate("smoke"), "a", probes=["masks"])
    with pytest.raises(UserError, match=r"exit code 1: error: no room; all of it"):
        runs.train_all([arm], [0], tmp_path, jobs=1, start=failing(1))
    with pytest.raises(UserError, match="goes on where it was"):
        runs.train_all([arm], [0], tmp_path, jobs=1, start=failing(75))
    (done,) = runs.train_all(
        [arm], [0], tmp_path, jobs=1, start=failing(1, replay=True)
    )
    assert "not finite" in done.diverged
    # And is not tried again.
    (again,) = runs.train_all([arm], [0], tmp_path, jobs=1, start=failing(1))
    assert again == done


def test_being_told_to_stop_is_passed_on_to_what_was_started(tmp_path):
    log = tmp_path / "log"
    wait = ["python", "-c", "print('here', flush=True); import time; time.sleep(60)"]
    with runs.passing_on_signals(), ThreadPoolExecutor(1) as pool:
        code = pool.submit(runs.launch, wait, log, 0)
        for _ in range(600):
            if log.exists() and log.read_text():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert code.result(timeout=30) == RESUME_ME
        # And nothing else begins.
        assert runs.launch(["python", "-c", "print('again')"], log, 0) == RESUME_ME
    assert log.read_text() == "here\n"
    # Where nothing runs, it ends.
    with pytest.raises(KeyboardInterrupt), runs.passing_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert runs.launch(["python", "-c", "print('again')"], log, -1) == 0
    assert log.read_text() == "here\nagain\n"


@pytest.mark.slow
def test_a_run_that_is_worse_than_guessing_has_diverged(smoke, tmp_path):
    out, _ = smoke
    table = read(out)
    (one,) = table.runs("implicit")
    assert one.diverged == ""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text((one.workdir / "config.json").read_text())
    summary = json.loads((one.workdir / "summary.json").read_text())
    tokens, vocabulary = 16, 16
    for factor, bad in ((0.99, False), (1.01, True)):
        value = runs.LOST * factor * tokens * math.log(vocabulary)
        summary["validation/cross_entropy"] = value
        (workdir / "summary.json").write_text(json.dumps(summary))
        assert bool(runs.outcome(workdir)) == bad
    summary["validation/loss"] = None
    (workdir / "summary.json").write_text(json.dumps(summary))
    assert "not finite" in runs.outcome(workdir)


def read(out):
    """A study's table, from what lies there."""
    arms = fig9_deletion.STUDY.arms("smoke")
    done = runs.train_all(arms, [0], out / "runs", jobs=1, start=failing(1))
    return study.measure(fig9_deletion.STUDY, done)


@pytest.mark.slow
def test_slots_go_one_by_one_from_the_render_of_all(smoke):
    for one in read(smoke[0]).done:
        left, all_of_them = (
            drawing.arrays_of(one, probe) for probe in ("slots_left", "pictures")
        )
        last = max(drawing.steps_of(all_of_them, "slots"))
        counts = drawing.steps_of(left, "left")
        assert counts == list(range(1, counts[-1] + 1))
        np.testing.assert_array_equal(
            left[f"left/{counts[-1]}"], all_of_them[f"slots/{last}"]
        )
        assert np.any(left["left/1"] != left[f"left/{counts[-1]}"])


@pytest.mark.slow
def test_matching_compares_where_both_have_the_same_cross_entropy(smoke):
    rows, done = [], read(smoke[0]).done
    steps = np.array([0, 100, 200, 300])
    for arm, entropies in (
        ("vanilla", (90, 60, 40, 30)),
        ("implicit", (80, 40, 20, 10)),
    ):
        for step, value in zip(steps, entropies, strict=True):
            rows.append(Measurement(arm, 0, int(step), "probe", "cross_entropy", value))
            rows.append(
                Measurement(arm, 0, int(step), "probe", "spill_share", step / 300)
            )
    table = Table(tuple(rows), done)
    found = {row.arm: row.value for row in fig9_deletion.matched(table)}
    assert found == pytest.approx({"vanilla": 1.0, "implicit": 0.5})


def test_what_is_not_finite_is_an_empty_cell(tmp_path):
    row = Measurement("a", 0, 1, "train", "loss", NAN)
    text = as_csv([row, row._replace(value=1.5)])
    assert text.splitlines()[1:] == ["a,0,1,train,loss,", "a,0,1,train,loss,1.5"]
    done = runs.Done("a", 0, tmp_path, "diverged")
    table = Table((row._replace(value=3.0),), (done,))
    assert math.isnan(table.last("a", "loss")[0])
    assert dataclasses.replace(table, done=()).last("a", "loss") == {0: 3.0}
