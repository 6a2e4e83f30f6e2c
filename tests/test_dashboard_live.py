"""The live state of a run folder: what is read of growing journals, what is kept of it, and what a plot is sent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dashboard.frames import COLUMNS, sheet_of
from dashboard.live import Board, LiveRun
from dashboard.panels.heldout import compared
from dashboard.panels.success import VERSIONS, Tally
from dashboard.rates import wilson
from dashboard.series import DRAWN, KEPT, Series, thinned
from dashboard.tail import StartOver, Tail
from tests.synthetic_run import Writer, episode, trajectory, weights_hash, write_run
from trajectories.records import Cell


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished synthetic run; to be read, not changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic")


def replay(folder: Path) -> dict[str, Any]:
    """Every section of a run folder."""
    board = Board(folder)
    board.poll()
    return json.loads(board.since(-1)[1])


def test_a_tail_gives_each_finished_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(tail.read()) == [{"a": 1}, {"a": 2}]
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    assert list(tail.read()) == [{"a": 3}]


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": "to')
    tail = Tail(path)
    assert list(tail.read()) == [{"a": 1}]
    with path.open("a") as file:
        file.write('rn"}\n')
    assert list(tail.read()) == [{"a": "torn"}]
    assert tail.damaged == 0


def test_a_torn_line_that_the_next_writer_cut_off_is_never_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": "to')
    tail = Tail(path)
    assert list(tail.read()) == [{"a": 1}]
    path.write_bytes(path.read_bytes()[:9] + b'{"a": 2}\n')
    assert list(tail.read()) == [{"a": 2}]


def test_a_damaged_line_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[1]\n{"a": 2}\n')
    tail = Tail(path)
    assert list(tail.read()) == [{"a": 1}, {"a": 2}]
    assert tail.damaged == 2


def test_a_replaced_or_shortened_journal_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    tail = Tail(path)
    list(tail.read())
    path.write_text('{"a": 1}\n')
    with pytest.raises(StartOver):
        list(tail.read())


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (7, 20), (40, 40), (499, 1000)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_thinning_keeps_extremes_and_both_ends() -> None:
    values_SN = np.stack([np.sin(np.arange(10_000) / 50), np.arange(10_000) * 1e-4])
    values_SN[0, 4_321], values_SN[0, 7_777], values_SN[1, 5_000] = 9.0, -9.0, np.nan
    kept = thinned(values_SN, DRAWN)
    assert len(kept) <= DRAWN
    assert {0, 4_321, 7_777, 9_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_few_rows_are_sent_as_they_are() -> None:
    series = Series("a", "b")
    for x in range(3):
        series.append(x, {"a": x / 3, "b": None})
    assert series.drawn() == {"x": [0.0, 1.0, 2.0], "a": [0.0, 0.33333, 0.66667]}


def test_a_series_is_bounded_and_never_loses_its_peak() -> None:
    series = Series("a")
    for x in range(3 * KEPT):
        series.append(x, {"a": 100.0 if x == 17 else x % 7})
    assert len(series) <= KEPT
    drawn = series.drawn("a")
    assert max(v for v in drawn["a"] if v is not None) == 100.0
    assert drawn["x"][-1] == 3 * KEPT - 1


def test_a_tally_keeps_the_first_and_the_latest_versions() -> None:
    tally = Tally(VERSIONS)
    for version in range(100):
        tally.add(version, success=version % 2 == 0)
    versions = [row["version"] for row in tally.rows()]
    assert versions == [0, *range(100 - VERSIONS + 1, 100)]


def test_a_finished_run_is_replayed(finished: Path) -> None:
    state = replay(finished)
    run = state["run"]
    assert (run["status"], run["assets"], run["version"]) == ("finished", "stand-in", 5)
    assert "not comparable with published tables" in run["warning"]
    assert run["hash"] == weights_hash(5)
    assert run["result"]["held_out_episodes"] == 80
    assert [row["version"] for row in run["ends"]] == [0, 5]
    assert (run["counts"]["promoted"], run["counts"]["tripped"], run["counts"]["rolled_back"]) == (4, 1, 1)
    assert [row["round"] for row in state["pairs"]["rounds"]] == [0, 1, 2, 3, 4, 5]
    assert state["pairs"]["rounds"][1]["states_unpairable_other"] == 1


def test_counts_are_those_of_the_journal(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "episodes.jsonl").read_text().splitlines()]
    held_out = [e for e in lines if e["phase"] == "evaluation" and e["policy_version"] == 5]
    state = replay(finished)
    row = state["success"]["all"]["held_out"][-1]
    successes = sum(e["success"] for e in held_out)
    assert (row["version"], row["successes"], row["episodes"]) == (5, successes, 80)
    assert (row["low"], row["high"]) == pytest.approx(wilson(successes, 80), abs=1e-4)
    assert len(state["success"]["tasks"]) == 4
    here = [e for e in held_out if (e["suite"], e["task_id"], e["init_state"]) == ("libero_object", 1, 30)]
    (task,) = [t for t in state["heat"]["tasks"] if (t["suite"], t["task"]) == ("libero_object", 1)]
    (cell,) = [c for c in task["cells"] if c[0] == 30]
    start = [e for e in lines if e["phase"] == "evaluation" and e["policy_version"] == 0]
    before = [e for e in start if (e["suite"], e["task_id"], e["init_state"]) == ("libero_object", 1, 30)]
    assert cell == [30, sum(e["success"] for e in here + before), 2, 0, 0, 5]


def test_refused_rounds_and_the_tripwire_are_there(finished: Path) -> None:
    learning = replay(finished)["learning"]
    assert learning["limits"]["chosen_drop"] == -0.1
    fates = {row["round"]: row["fate"] for row in learning["rounds"]}
    assert (fates[2], fates[4], fates[5]) == ("tripped", "rolled_back", "promoted")
    assert learning["rounds"][1] == {"round": 1, "from": 60, "to": 120, "fate": "promoted"}
    assert learning["plots"]["logratios"]["x"] == [float(x) for x in range(1, 361)]
    assert min(learning["plots"]["logratios"]["chosen_logratio"]) < -0.1


def test_the_fleet_says_what_each_actor_serves(finished: Path) -> None:
    state = replay(finished)
    assert [(a["actor"], a["version"], a["hash"]) for a in state["actors"]["policy"]] == [
        ("0", 5, weights_hash(5)),
        ("1", 5, weights_hash(5)),
    ]
    assert [a["restarts"] for a in state["actors"]["policy"]] == [0, 1]
    assert state["actors"]["restarts"] == {"rollout": 1, "policy": 1}
    assert [node["node"] for node in state["cluster"]["nodes"]] == ["3fa1c2d4", "9be07715"]
    assert state["cluster"]["autoscaler"]["failed"][0]["reason"] == "no spot machine is left in this zone"
    assert state["speed"]["act_ms"]["x"] == sorted(state["speed"]["act_ms"]["x"])
    assert state["incidents"]["latest"][0]["event"] == "promoted"


def test_the_latest_contrast_is_one_that_is_stored(finished: Path) -> None:
    latest = replay(finished)["contrast"]["latest"]
    assert len(latest) == 6
    for side in ("success", "failure"):
        assert (finished / "trajectories" / f"{latest[0][side]}.trajectory").is_file()


def test_an_appended_line_changes_its_sections_alone(tmp_path: Path) -> None:
    run = Writer(tmp_path / "live")
    board = Board(tmp_path / "live")
    before = board.poll()
    cell = Cell(suite="libero_object", task_id=0, init_state=3, seed=1)
    run.episodes([episode("rollout", 0, cell, "success", version=0, time=run.now)])
    board.poll()
    assert set(json.loads(board.since(before)[1])) == {"run", "success", "heat"}
    after = board.revision
    assert board.poll() == after


def test_an_episode_written_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    run = Writer(tmp_path / "live")
    cell = Cell(suite="libero_object", task_id=0, init_state=3, seed=1)
    line = episode("rollout", 0, cell, "success", version=0, time=run.now)
    run.episodes([line, line])
    assert replay(tmp_path / "live")["success"]["all"]["training"][0]["episodes"] == 1


def test_lines_of_older_runs_and_unreadable_ones_do_no_harm(tmp_path: Path) -> None:
    run = Writer(tmp_path / "old")
    cell = Cell(suite="libero_object", task_id=0, init_state=3, seed=1)
    line = episode("evaluation", -1, cell, "timeout", version=0, time=0.0)
    del line["time"]
    run.episodes([line, {"phase": "rollout"}])
    run.metric("fleet")
    run.metric("fleet", policy_actors=[None, {"actor": 0, "version": 0, "hash": "ab"}], staleness="?")
    run.metric("rollout", round=0, version=0, episodes=1, env_steps_per_s=88.0)
    state = replay(tmp_path / "old")
    assert state["run"]["unreadable"] == 2
    assert state["success"]["all"]["held_out"][0]["episodes"] == 1
    assert state["run"]["ends"][0]["rate"] == 0.0


def test_a_new_run_in_the_folders_place_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "again"
    first = Writer(folder)
    first.publish(0)
    live = LiveRun(folder)
    live.poll()
    assert live.section("run")["version"] == 0
    first.close()
    folder.rename(tmp_path / "again~1")
    Writer(folder)
    assert "run" in live.poll()
    assert live.section("run")["version"] is None


def test_a_quiet_run_without_result_and_owner_ended_early(tmp_path: Path) -> None:
    Writer(tmp_path / "dead").publish(0)
    assert replay(tmp_path / "dead")["run"]["status"] == "running"
    for path in (tmp_path / "dead").glob("*.jsonl"):
        os.utime(path, (1e9, 1e9))
    assert replay(tmp_path / "dead")["run"]["status"] == "ended early"


def test_mcnemar_is_on_the_cells_that_both_runs_drove() -> None:
    here = {("s", 0, state, 0): state < 4 for state in range(12)}
    there = {("s", 0, state, 0): state > 1 for state in range(10)}
    assert compared(here, there) == {"cells": 10, "gained": 6, "lost": 2, "p": 0.289}
    assert compared({}, there)["p"] is None


def test_two_runs_are_compared(finished: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", seed=5)
    board = Board(finished, [other])
    board.poll()
    rows = json.loads(board.since(-1)[1])["compare"]["runs"]
    assert [row["name"] for row in rows] == ["synthetic", "other"]
    assert (rows[1]["cells"], rows[1]["version"]) == (80, 5)


def test_a_sheet_holds_every_decision_of_both_cameras() -> None:
    cell = Cell(suite="libero_object", task_id=0, init_state=0, seed=0)
    made = trajectory(cell, success=True, version=0, decisions=COLUMNS + 1, size=32)
    sheet = sheet_of(made)
    assert sheet.jpeg.startswith(b"\xff\xd8")
    assert sheet.steps == tuple(range(0, 8 * (COLUMNS + 1), 8))
    assert (sheet.size, sheet.env_steps) == (32, 8 * (COLUMNS + 1))


def test_a_folder_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no recipe\.yaml"):
        LiveRun(tmp_path)
