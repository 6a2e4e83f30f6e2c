"""The store loses nothing and doubles nothing, whatever kills it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from preferences.archive import TrajectoryArchive
from preferences.pairing import is_finite
from preferences.store import MinedPairs, PreferenceStore, StoreError, UnknownPolicyError
from trajectories.codec import load_trajectory, save_trajectory
from trajectories.journal import JournalError, read_journal
from trajectories.records import ActionSample, Cell, Decision, Observation, Outcome, Trajectory

ROOT = Path(__file__).parents[1]


def make_trajectory(
    state: int,
    seed: int,
    outcome: Outcome = "success",
    *,
    version: int = 0,
    decisions: int = 2,
    action: float = 0.5,
) -> Trajectory:
    rng = np.random.default_rng((state, seed))
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=0, init_state=state, seed=seed),
        decisions=tuple(
            Decision(
                observation=Observation(
                    agentview=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                    wrist=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                    proprio=rng.normal(size=8).astype(np.float32),
                    instruction="pick up the milk and place it in the basket",
                ),
                sample=ActionSample(
                    actions=np.full((4, 7), action, np.float32),
                    model_chunk=rng.integers(0, 21, 28),
                    logps=rng.normal(size=28).astype(np.float32),
                ),
                executed=4,
            )
            for _ in range(decisions)
        ),
        outcome=outcome,
        fault="gone" if outcome == "fault" else "",
        env_steps=4 * decisions,
        policy_version=version,
        policy_hash=f"hash-{version}",
    )


def test_one_non_finite_number_or_no_decision_at_all_is_noticed() -> None:
    assert is_finite(make_trajectory(0, 0))
    assert not is_finite(make_trajectory(0, 0, action=float("nan")))
    assert not is_finite(make_trajectory(0, 0, decisions=0))
    broken = make_trajectory(0, 0)
    broken.decisions[1].sample.logps[27] = -np.inf
    assert not is_finite(broken)


def open_store(folder: Path) -> PreferenceStore:
    store = PreferenceStore(folder)
    for version in (0, 1, 2, 3):
        store.register_version(version, f"hash-{version}")
    return store


def stored(folder: Path) -> int:
    return len(list((folder / "trajectories").glob("*.trajectory")))


def mine_from(store: PreferenceStore, version: int = 0) -> MinedPairs:
    return store.mine(current_version=version, max_staleness=2, pairs_per_state=4, seed=0)


def fill(store: PreferenceStore, *, version: int = 0) -> list[Trajectory]:
    added = [
        make_trajectory(state, seed, outcome, version=version)
        for state in (0, 1)
        for seed, outcome in enumerate(("success", "timeout", "timeout"))
    ]
    assert [store.add(trajectory) for trajectory in added] == [True] * 6
    return added


def test_pairs_come_out_as_they_went_in_and_are_put_down_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        added = {trajectory.trajectory_id: trajectory for trajectory in fill(store)}
        mined = mine_from(store)
        assert (len(mined.refs), mined.counts.pairs) == (4, 4)
        for pair, ref in zip(mined.pairs, mined.refs, strict=True):
            assert (pair.chosen.trajectory_id, pair.rejected.trajectory_id) == (ref.chosen, ref.rejected)
            np.testing.assert_array_equal(
                pair.chosen.decisions[1].observation.wrist, added[ref.chosen].decisions[1].observation.wrist
            )
        assert [t.cell.key for t in mined.successes] == ["libero_object/0/0/0", "libero_object/0/1/0"]
        assert mined.pairs[0].chosen is mined.pairs[1].chosen is mined.successes[0]
        assert mine_from(store).refs == mined.refs
    lines = read_journal(tmp_path / "pairs.jsonl")
    assert [line["pair_id"] for line in lines] == [ref.pair_id for ref in mined.refs]
    assert lines[0] == {
        "pair_id": mined.refs[0].pair_id,
        "chosen": mined.refs[0].chosen,
        "rejected": mined.refs[0].rejected,
        "suite": "libero_object",
        "task_id": 0,
        "init_state": 0,
        "policy_version": 0,
        "mined_at": 0,
    }
    with open_store(tmp_path) as store:
        mine_from(store)
    assert read_journal(tmp_path / "pairs.jsonl") == lines


def test_a_trajectory_is_stored_once_however_often_it_is_handed_in(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.add(make_trajectory(0, 0)) is True
        assert store.add(make_trajectory(0, 0)) is False
    with open_store(tmp_path) as store:
        assert store.add(make_trajectory(0, 0)) is False
        counts = mine_from(store).counts
        assert (counts.states, counts.duplicates) == (1, 1)
    assert len(list((tmp_path / "trajectories").iterdir())) == 1


def test_weights_nobody_registered_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(UnknownPolicyError, match="version 9 with hash 'hash-9', expected None"):
            store.add(make_trajectory(0, 0, version=9))
        forged = dataclasses.replace(make_trajectory(0, 0), policy_hash="other")
        with pytest.raises(UnknownPolicyError, match="with hash 'other', expected 'hash-0'"):
            store.add(forged)
        with pytest.raises(ValueError, match="version 1 has hash hash-1, got x"):
            store.register_version(1, "x")
        with pytest.raises(ValueError, match="must be >= 0, got -1"):
            store.register_version(-1, "expert")
        assert mine_from(store).counts.states == 0
    assert list((tmp_path / "trajectories").iterdir()) == []


def test_successes_are_the_clean_ones_of_the_versions_mined_and_in_force(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        fill(store, version=2)
        store.add(make_trajectory(0, 7, "fault", version=2))
        store.add(make_trajectory(0, 8, "success", version=2, action=float("inf")))
        mined = mine_from(store, 2)
        assert [t.policy_version for t in mined.successes] == [0, 0, 2, 2]
        assert (mined.counts.faults, mined.counts.non_finite) == (1, 1)
        assert [t.policy_version for t in mine_from(store, 3).successes] == [2, 2]
        store.retire_version(2)
        assert [t.policy_version for t in mine_from(store, 2).successes] == [0, 0]
    with open_store(tmp_path) as store:
        assert mine_from(store, 2).counts.stale == 8


def test_versions_too_old_to_pair_leave_memory_and_come_back_when_asked_for(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        old = fill(store)
        fill(store, version=3)
        first = mine_from(store, 0)
        later = mine_from(store, 3)
        assert later.counts.stale == len(old)
        assert store.add(old[0]) is False
        again = mine_from(store, 0)
        assert (again.refs, again.counts.stale) == (first.refs, first.counts.stale)
        assert len(read_journal(tmp_path / "pairs.jsonl")) == len(first.refs) + len(later.refs)
    archive = TrajectoryArchive(tmp_path)
    assert {c.policy_version for c in archive.since(3).values()} == {3}
    assert len(archive) == len(archive.since(0)) == 2 * len(old)
    archive.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_set_aside_and_its_episode_may_run_again(tmp_path: Path, damage: str) -> None:
    with open_store(tmp_path) as store:
        added = fill(store)
        victim = added[0]
        path = tmp_path / "trajectories" / f"{victim.trajectory_id}.trajectory"
        data = bytearray(path.read_bytes())
        match damage:
            case "flip":
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            case "truncate":
                path.write_bytes(data[:-1])
            case "delete":
                path.unlink()
        mined = mine_from(store)
        assert [pair.chosen.cell.init_state for pair in mined.pairs] == [1, 1]
        assert mined.counts.states_all_failure == 1
        assert [success.cell.init_state for success in mined.successes] == [1]
        assert (tmp_path / "quarantine" / path.name).exists() == (damage != "delete")
        assert store.add(victim) is True
        assert len(mine_from(store).pairs) == 4
    with open_store(tmp_path) as store:
        assert len(mine_from(store).pairs) == 4


def test_reopening_trusts_the_files_over_the_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        first, second, *_ = fill(store)
    files = tmp_path / "trajectories"
    (files / f"{first.trajectory_id}.trajectory").unlink()
    unfinished = files / f"{second.trajectory_id}.trajectory.0123abcd.tmp"
    unfinished.write_bytes(b"half")
    unindexed = make_trajectory(5, 5, version=7)
    save_trajectory(files / f"{unindexed.trajectory_id}.trajectory", unindexed)
    (files / "broken.trajectory").write_bytes(b"PLTRAJ01 and no more")
    with caplog.at_level(logging.INFO), open_store(tmp_path) as store:
        assert stored(tmp_path) == 6
        assert store.add(unindexed) is False
        assert store.add(first) is True
        with pytest.raises(ValueError, match="version 7 has hash hash-7"):
            store.register_version(7, "other")
    assert f"removed {unfinished.name}, which was never finished" in caplog.text
    assert f"trajectory {first.trajectory_id} is gone" in caplog.text
    assert f"trajectory {unindexed.trajectory_id} was not in the index; recovered" in caplog.text
    assert (tmp_path / "quarantine" / "broken.trajectory").exists()
    assert not unfinished.exists()


def test_a_lost_or_damaged_index_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store)
        refs = mine_from(store).refs
    index = tmp_path / "store.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join([*lines[:3], b"garbage\n", *lines[4:]]))
    with open_store(tmp_path) as store:
        assert mine_from(store).refs == refs
    assert (tmp_path / "store.damaged").exists()
    index.unlink()
    with PreferenceStore(tmp_path) as store:
        assert mine_from(store).refs == refs
        assert store.add(make_trajectory(0, 0)) is False


def test_damaged_pairs_are_an_error_that_lets_the_folder_go(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / "pairs.jsonl").write_bytes(b'garbage\n{"pair_id": "a-b"}\n')
    for _ in range(2):
        with pytest.raises(JournalError, match=r"pairs\.jsonl: a line is damaged"):
            PreferenceStore(tmp_path)


def run_python(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_second_process_is_told_who_has_the_store_and_a_dead_one_is_succeeded(tmp_path: Path) -> None:
    holder = run_python(
        """
        import sys, time
        from preferences.store import PreferenceStore
        store = PreferenceStore(sys.argv[1])
        print("open", flush=True)
        time.sleep(600)
        """,
        str(tmp_path),
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match=rf"is in use by process {holder.pid} on .+; one process owns it"):
        PreferenceStore(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with open_store(tmp_path) as store:
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            PreferenceStore(tmp_path)
        assert fill(store)


WRITER = """
import itertools, sys
sys.path.insert(0, "tests")
from test_preference_store import make_trajectory, mine_from, open_store
with open_store(sys.argv[1]) as store:
    for state in itertools.count(int(sys.argv[2])):
        for seed, outcome in ((0, "success"), (1, "timeout")):
            trajectory = make_trajectory(state, seed, outcome)
            store.add(trajectory)
            print("trajectory", trajectory.trajectory_id, flush=True)
        for ref in mine_from(store).refs[-1:]:
            print("pair", ref.pair_id, flush=True)
"""


def test_killed_at_any_moment_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path) -> None:
    acknowledged: dict[str, set[str]] = {"trajectory": set(), "pair": set()}
    for attempt in range(5):
        writer = run_python(WRITER, str(tmp_path), str(attempt * 10_000))
        assert writer.stdout is not None
        for line in itertools.islice(writer.stdout, 9 + 7 * attempt):
            kind, name = line.split()
            acknowledged[kind].add(name)
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        rest, errors = writer.communicate()
        assert "Traceback" not in errors
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                kind, name = line.split()
                acknowledged[kind].add(name)
    assert min(len(names) for names in acknowledged.values()) >= 5
    with open_store(tmp_path) as store:
        mined = mine_from(store)
        paired = {ref.chosen for ref in mined.refs} | {ref.rejected for ref in mined.refs}
        # Of each writer, the very last success may not have met its failure yet.
        assert len(acknowledged["trajectory"] - paired) <= 5
        assert not (tmp_path / "quarantine").exists()
        for name in acknowledged["trajectory"]:
            path = tmp_path / "trajectories" / f"{name}.trajectory"
            assert load_trajectory(path).trajectory_id == name
        pairs = [line["pair_id"] for line in read_journal(tmp_path / "pairs.jsonl")]
        assert len(pairs) == len(set(pairs))
        assert acknowledged["pair"] <= set(pairs)
        assert not list((tmp_path / "trajectories").glob("*.tmp"))
        # Of each writer, the very last one may be stored and not acknowledged.
        assert stored(tmp_path) - len(acknowledged["trajectory"]) <= 5


def test_a_full_disk_is_one_clear_error_and_adding_goes_on_when_there_is_room(tmp_path: Path) -> None:
    program = """
    import resource, sys
    sys.path.insert(0, "tests")
    from test_preference_store import fill, make_trajectory, open_store
    from preferences.store import StoreError
    with open_store(sys.argv[1]) as store:
        fill(store)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            store.add(make_trajectory(8, 8))
        except StoreError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        print(store.add(make_trajectory(8, 8)))
    """
    out, errors = run_python(program, str(tmp_path)).communicate()
    assert errors == ""
    error, then = out.splitlines()
    assert error.startswith(
        f"cannot write trajectory libero_object/0/8/8 in {tmp_path}: File too large; what was stored"
    )
    assert then == "True"
    with open_store(tmp_path) as store:
        assert stored(tmp_path) == 7
        assert store.add(make_trajectory(8, 8)) is False


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"the store cannot use .*file/run: Not a directory"):
        PreferenceStore(tmp_path / "file" / "run")
