"""Trajectories on disk: nothing lost, nothing altered unnoticed, nothing half written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trajectories.codec import (
    CodecError,
    decode_trajectory,
    encode_trajectory,
    episode_record,
    load_trajectory,
    save_trajectory,
)
from trajectories.journal import Journal, JournalError, read_journal
from trajectories.records import ActionSample, Cell, Decision, Observation, Trajectory

ROOT = Path(__file__).parents[1]


def make_trajectory(
    *, decisions: int = 3, flow: bool = False, outcome: str = "success", **change: object
) -> Trajectory:
    rng = np.random.default_rng(decisions)
    chunk = (
        rng.normal(size=(decisions, 4, 7)).astype(np.float32)
        if flow
        else rng.integers(0, 256, (decisions, 28))
    )
    fields: dict = {
        "cell": Cell(suite="libero_object", task_id=3, init_state=17, seed=5),
        "decisions": tuple(
            Decision(
                observation=Observation(
                    agentview=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                    wrist=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                    proprio=rng.normal(size=8).astype(np.float32),
                    instruction="pick up the bbq sauce and place it in the basket",
                ),
                sample=ActionSample(
                    actions=rng.uniform(-1, 1, (4, 7)).astype(np.float32),
                    model_chunk=chunk[i],
                    logps=rng.normal(size=28).astype(np.float32),
                ),
                executed=4 if i < decisions - 1 else 2,
            )
            for i in range(decisions)
        ),
        "outcome": outcome,
        "env_steps": 10,
        "policy_version": 2,
        "policy_hash": "c0ffee",
    }
    return Trajectory(**(fields | change))


def assert_same(a: Trajectory, b: Trajectory) -> None:
    for name in ("cell", "outcome", "fault", "env_steps", "policy_version", "policy_hash", "trajectory_id"):
        assert getattr(a, name) == getattr(b, name)
    assert len(a.decisions) == len(b.decisions)
    for x, y in zip(a.decisions, b.decisions, strict=True):
        assert x.executed == y.executed
        assert x.observation.instruction == y.observation.instruction
        for record, other, names in (
            (x.observation, y.observation, ("agentview", "wrist", "proprio")),
            (x.sample, y.sample, ("actions", "model_chunk", "logps")),
        ):
            for name in names:
                left, right = getattr(record, name), getattr(other, name)
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "trajectory",
    [
        make_trajectory(),
        make_trajectory(decisions=1),
        make_trajectory(flow=True, outcome="timeout"),
        make_trajectory(decisions=0, outcome="fault", fault="simulator did not answer"),
    ],
    ids=["tokens", "one decision", "flow", "fault before the first decision"],
)
def test_a_saved_trajectory_comes_back_exactly(tmp_path: Path, trajectory: Trajectory) -> None:
    save_trajectory(tmp_path / "t", trajectory)
    assert_same(load_trajectory(tmp_path / "t"), trajectory)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_depth_is_kept_where_every_decision_has_it(tmp_path: Path) -> None:
    plain = make_trajectory()
    depths = [np.full((4, 4), 0.5 + i, np.float32) for i in range(len(plain.decisions))]
    seen = [
        dataclasses.replace(d, observation=dataclasses.replace(d.observation, depth=depth))
        for d, depth in zip(plain.decisions, depths, strict=True)
    ]
    save_trajectory(tmp_path / "t", dataclasses.replace(plain, decisions=tuple(seen)))
    loaded = load_trajectory(tmp_path / "t")
    for decision, depth in zip(loaded.decisions, depths, strict=True):
        assert decision.observation.depth is not None
        assert np.array_equal(decision.observation.depth, depth)
    with pytest.raises(CodecError, match="must have one shape"):
        encode_trajectory(dataclasses.replace(plain, decisions=(seen[0], *plain.decisions[1:])))


def test_non_finite_values_are_kept_for_inspection() -> None:
    broken = make_trajectory(decisions=1)
    broken.decisions[0].sample.actions[0] = [np.nan, np.inf, -np.inf, 0, 0, 0, 0]
    back = decode_trajectory(encode_trajectory(broken))
    np.testing.assert_array_equal(back.decisions[0].sample.actions, broken.decisions[0].sample.actions)


def test_still_frames_take_almost_no_room() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one = make_trajectory(decisions=1).decisions[0]
    seen = Observation(
        agentview=frame, wrist=frame[:16, :16], proprio=np.zeros(8, np.float32), instruction="x"
    )
    decision = Decision(observation=seen, sample=one.sample, executed=4)
    one_frame, eleven = (
        len(encode_trajectory(dataclasses.replace(make_trajectory(), decisions=(decision,) * n)))
        for n in (1, 11)
    )
    assert eleven - one_frame < 64 * 64 * 3


def test_any_single_flipped_byte_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "episode.trajectory"
    data = encode_trajectory(make_trajectory(decisions=1))
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(CodecError, match=r"episode\.trajectory"):
            load_trajectory(path)


def test_any_truncation_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "episode.trajectory"
    data = encode_trajectory(make_trajectory(decisions=1))
    for length in (0, 7, 8, 16, 40, 100, len(data) // 2, len(data) - 33, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CodecError, match=r"episode\.trajectory"):
            load_trajectory(path)


def test_a_rehashed_file_that_inflates_beyond_its_shape_is_refused() -> None:
    data = encode_trajectory(make_trajectory(decisions=1))
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    bomb = zlib.compress(bytes(1 << 24), 1)
    first = header["arrays"][0]
    rest = data[16 + length + first["bytes"] : -32]
    first["bytes"] = len(bomb)
    text = json.dumps(header).encode()
    body = data[:8] + len(text).to_bytes(8, "little") + text + bomb + rest
    with pytest.raises(CodecError, match="agentview does not hold"):
        decode_trajectory(body + hashlib.sha256(body).digest())


def test_mixed_shapes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    mixed = make_trajectory(decisions=1).decisions + make_trajectory(decisions=1, flow=True).decisions
    broken = dataclasses.replace(make_trajectory(), decisions=mixed)
    with pytest.raises(CodecError, match=r"model_chunk of libero_object/3/17/5 must have one shape"):
        save_trajectory(tmp_path / "t", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_trajectory(path, make_trajectory(decisions=1))
    before = path.read_bytes()
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from trajectories.codec import load_trajectory, save_trajectory
        path = Path(sys.argv[1])
        t = load_trajectory(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            save_trajectory(path, t)
        except OSError as error:
            sys.exit(f"refused: {error.strerror}")
        """
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.strip() == "refused: File too large"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_an_episode_record_is_one_flat_json_line() -> None:
    record = episode_record(make_trajectory(), arm="dpo-dora", training_seed=1)
    assert json.loads(json.dumps(record)) == {
        "suite": "libero_object",
        "task_id": 3,
        "init_state": 17,
        "seed": 5,
        "success": True,
        "outcome": "success",
        "fault": "",
        "env_steps": 10,
        "policy_version": 2,
        "policy_hash": "c0ffee",
        "trajectory_id": "55da8c962c45229ae6cbf754",
        "arm": "dpo-dora",
        "training_seed": 1,
    }
    with pytest.raises(ValueError, match="its own \\['seed'\\]"):
        episode_record(make_trajectory(), seed=3)


def test_a_journal_keeps_records_in_order_across_writers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Journal(path, fsync=True) as journal:
        journal.append({"step": 0, "loss": np.float32(0.5), "bad": float("nan"), "each": (np.int64(1), None)})
    with Journal(path) as journal:
        journal.extend([{"step": 1}, {"step": 2}])
    assert read_journal(path) == [
        {"step": 0, "loss": 0.5, "bad": None, "each": [1, None]},
        {"step": 1},
        {"step": 2},
    ]


def test_a_torn_last_line_is_ignored_with_a_warning_and_cut_off_by_the_next_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    with caplog.at_level(logging.WARNING):
        assert read_journal(path) == [{"a": 1}]
    assert "episodes.jsonl: the last line is torn (6 bytes)" in caplog.text
    with Journal(path) as journal:
        journal.append({"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b'{"a": 1}')
    assert read_journal(path) == [{"a": 1}]
    with Journal(path) as journal:
        journal.append({"b": 2})
    assert read_journal(path) == [{"a": 1}, {"b": 2}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b":\n{"c": 3}\n')
    for use in (read_journal, Journal):
        with pytest.raises(
            JournalError, match=r"episodes\.jsonl: a line is damaged and later ones follow: b'{\"b\":'"
        ):
            use(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200))
def test_cut_anywhere_a_journal_keeps_every_whole_record(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    whole = [{"i": i, "text": "x" * i} for i in range(6)]
    with Journal(path) as journal:
        journal.extend(whole)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    survivors = sum(
        len(json.dumps(r)) + sum(len(json.dumps(q)) + 1 for q in whole[:i]) <= cut
        for i, r in enumerate(whole)
    )
    assert read_journal(path) == whole[:survivors]
    with Journal(path) as journal:
        journal.append({"next": True})
    assert read_journal(path) == [*whole[:survivors], {"next": True}]


def test_a_record_that_is_not_json_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    with pytest.raises(JournalError, match="must be made of JSON values"):
        journal.extend([{"fine": 1}, {"path": tmp_path}])
    journal.close()
    assert path.read_bytes() == b""
    with pytest.raises(JournalError, match="is closed"):
        journal.append({"late": 1})
