"""The evaluation protocol, against published worked examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.world import EnvironmentPart, TaskPart
from envs.assets import ResolvedAssets
from envs.fingerprint import FingerprintError, differences, first_frame_hash, stack_fingerprint
from envs.protocol import (
    ComparisonError,
    compare_episodes,
    compare_outcomes,
    held_out_cells,
    mcnemar,
    mcnemar_pooled,
    mcnemar_worse,
    paired_difference,
    published_cells,
    read_outcomes,
    wilson,
)
from trajectories.journal import Journal
from trajectories.records import Cell


def cells(count: int) -> list[Cell]:
    return [Cell(suite="libero_object", task_id=0, init_state=i, seed=0) for i in range(count)]


def sides(*, both: int, better: int, worse: int, neither: int) -> tuple[dict[Cell, bool], dict[Cell, bool]]:
    outcomes = (
        [(True, True)] * both
        + [(False, True)] * better
        + [(True, False)] * worse
        + [(False, False)] * neither
    )
    keys = cells(len(outcomes))
    return (
        {key: before for key, (before, _) in zip(keys, outcomes, strict=True)},
        {key: after for key, (_, after) in zip(keys, outcomes, strict=True)},
    )


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Stat. Med. 17 (1998) 857-872, Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_as_published(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_knows_nothing_without_episodes_and_refuses_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"successes must lie in 0\.\.n, got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        wilson(1, 2, 95)


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [
        # 9 against 2 discordant pairs: 2 * (1 + 11 + 55) / 2**11.
        (9, 2, 0.0654297),
        # Bentur et al. (2009) in Fagerland, Lydersen and Laake, Stat. Med. 33 (2014) 2850-2875: 7 against 1.
        (7, 1, 0.0703125),
        (0, 5, 0.0625),
        (0, 0, 1.0),
        (3, 3, 1.0),
        # Agresti, Categorical Data Analysis, Table 10.1: 86 against 150 of 1600.
        (86, 150, 3.716e-05),
    ],
)
def test_mcnemar_is_exact(better: int, worse: int, p_value: float) -> None:
    before, after = sides(both=4, better=better, worse=worse, neither=3)
    result = mcnemar(before, after)
    assert (result.better, result.worse, result.n) == (better, worse, better + worse + 7)
    assert result.p_value == pytest.approx(p_value, rel=1e-3)


def test_the_canary_looks_at_losses_only() -> None:
    # 5 lost, none won: 1 / 2**5. 5 won, none lost: certain not to be worse.
    assert mcnemar_worse(*sides(both=1, better=0, worse=5, neither=0)) == pytest.approx(0.03125)
    assert mcnemar_worse(*sides(both=1, better=5, worse=0, neither=0)) == pytest.approx(1.0)
    # 2 won, 9 lost: (1 + 11 + 55) / 2**11.
    assert mcnemar_worse(*sides(both=0, better=2, worse=9, neither=0)) == pytest.approx(67 / 2048)
    assert mcnemar_worse(*sides(both=3, better=0, worse=0, neither=3)) == 1.0


def test_different_cells_are_refused_by_name() -> None:
    before, after = sides(both=6, better=0, worse=0, neither=0)
    del after[cells(6)[2]]
    after[Cell(suite="libero_goal", task_id=1, init_state=2, seed=3)] = True
    with pytest.raises(
        ValueError, match=r"1 only before \(libero_object/0/2/0\) and 1 only after \(libero_goal/1/2/3\)"
    ):
        mcnemar(before, after)
    with pytest.raises(
        ValueError, match=r"5 only before \(libero_object/0/0/0, libero_object/0/1/0, libero_o\S+, \.\.\.\)"
    ):
        mcnemar(dict.fromkeys(cells(5), True), {})


def test_pooling_adds_the_discordant_pairs_of_every_arm() -> None:
    result = mcnemar_pooled(
        [sides(both=1, better=4, worse=1, neither=2), sides(both=2, better=5, worse=1, neither=0)]
    )
    assert (result.better, result.worse, result.n) == (9, 2, 16)
    assert result.p_value == pytest.approx(0.0654297, abs=1e-7)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Newcombe, Stat. Med. 17 (1998) 2635-2650, method 10: 36, 12, 2, 0.
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),
        # Bentur et al. (2009) in Fagerland, Lydersen and Laake (2014): 1, 1, 7, 12.
        ((1, 1, 7, 12), (-0.2857, -0.5069, -0.0256)),
        # Altman et al., Statistics with Confidence (2000), Table 6.2: 14, 5, 0, 22.
        ((14, 5, 0, 22), (0.1220, 0.0115, 0.2265)),
        # No failures anywhere: the Wilson interval of 5 of 5 on both sides.
        ((5, 0, 0, 0), (0.0, -0.4345, 0.4345)),
    ],
)
def test_paired_differences_as_published(table: tuple[int, ...], expected: tuple[float, ...]) -> None:
    both, only_after, only_before, neither = table
    found = paired_difference(both=both, only_after=only_after, only_before=only_before, neither=neither)
    assert found == pytest.approx(expected, abs=5e-5)


def test_the_manifest_is_explicit_and_ordered() -> None:
    tasks = TaskPart(
        suite="libero_object",
        task_ids=(8, 0),
        demo_init_states=(0,),
        train_init_states=(1, 2),
        held_out_init_states=(30, 31),
    )
    assert [cell.key for cell in held_out_cells(tasks, (0, 7))] == [
        "libero_object/8/30/0",
        "libero_object/8/30/7",
        "libero_object/8/31/0",
        "libero_object/8/31/7",
        "libero_object/0/30/0",
        "libero_object/0/30/7",
        "libero_object/0/31/0",
        "libero_object/0/31/7",
    ]


def test_the_published_manifest_is_every_task_from_every_state() -> None:
    manifest = published_cells("libero_goal")
    assert len(manifest) == len(set(manifest)) == 500
    assert (manifest[0].key, manifest[-1].key) == ("libero_goal/0/0/0", "libero_goal/9/49/0")
    assert len(published_cells("libero_90")) == 4500
    with pytest.raises(ValueError, match="unknown suite 'libero_11'; expected one of libero_spatial"):
        published_cells("libero_11")


def line(task: int, state: int, outcome: str, **extra: object) -> dict[str, object]:
    return {
        "suite": "libero_object",
        "task_id": task,
        "init_state": state,
        "seed": 0,
        "success": outcome == "success",
        "outcome": outcome,
        "policy_version": 0,
        **extra,
    }


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    with Journal(path) as journal:
        journal.extend(lines)
    return path


def test_comparing_two_files_pairs_by_cell_and_leaves_faults_out(tmp_path: Path) -> None:
    before = write(
        tmp_path / "before.jsonl",
        [
            line(0, s, o)
            for s, o in enumerate(["success", "timeout", "timeout", "timeout", "fault", "success"])
        ]
        + [line(10, 0, "success"), line(2, 0, "timeout")],
    )
    after = write(
        tmp_path / "after.jsonl",
        [line(2, 0, "timeout"), line(10, 0, "timeout")]
        + [line(0, s, o) for s, o in enumerate(["success", "success", "success", "timeout", "success"])],
    )
    comparison = compare_episodes(before, after)
    assert comparison.rows() == [
        ("libero_object/0", "4", "25 % (5-70)", "75 % (30-95)", "2", "0"),
        ("libero_object/2", "1", "0 % (0-79)", "0 % (0-79)", "0", "0"),
        ("libero_object/10", "1", "100 % (21-100)", "0 % (0-79)", "0", "1"),
        ("all", "6", "33 % (10-70)", "50 % (19-81)", "2", "1"),
    ]
    summary = comparison.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["episodes"], summary["better"], summary["worse"], summary["mcnemar_p"]) == (6, 2, 1, 1.0)
    assert (summary["success_before"], summary["success_after"]) == (0.3333, 0.5)
    assert summary["difference"] == 0.1667
    assert summary["difference_interval"][0] < 0 < summary["difference_interval"][1]
    # State 4 was a fault before; state 5 was driven before only.
    assert summary["left_out"] == 2


def test_a_run_folder_is_read_as_its_last_evaluated_version(tmp_path: Path) -> None:
    for name, after in (("a", "timeout"), ("b", "success")):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name / "episodes.jsonl",
            [
                line(0, 30, "timeout", phase="evaluation"),
                line(0, 1, "success", phase="rollout"),
                line(0, 30, after, phase="evaluation", policy_version=3),
                line(0, 2, "success", phase="canary", policy_version=4),
                line(0, 31, after, phase="evaluation-published", policy_version=3),
                line(0, 32, "success", phase="evaluation-published", policy_version=3),
            ],
        )
        (tmp_path / name / "fingerprint.json").write_text(
            json.dumps({"renderer": f"gl-{name}", "python": "3.11"})
        )
    comparison = compare_episodes(tmp_path / "a", tmp_path / "b")
    assert (comparison.overall.test.better, comparison.overall.test.n) == (1, 1)
    assert comparison.warnings == ("renderer: gl-a before, gl-b after",)
    driven = compare_episodes(tmp_path / "a", tmp_path / "b", manifest="published")
    assert (driven.overall.test.better, driven.overall.test.n) == (1, 2)
    with pytest.raises(ComparisonError, match="holds no episodes of phase evaluation-held-out"):
        compare_episodes(tmp_path / "a", tmp_path / "b", manifest="held-out")
    (tmp_path / "a" / "fingerprint.json").write_text("{")
    with pytest.raises(FingerprintError, match=r"fingerprint\.json is not JSON"):
        compare_episodes(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("kinds", "digests", "refused"),
    [
        (("stand-in", "hub"), ("aa", "bb"), True),
        (("explicit", "stand-in"), ("aa", "bb"), True),
        (("explicit", "stand-in"), ("aa", "aa"), False),  # the stand-ins, by their path
        (("cache", "hub"), ("aa", "bb"), False),  # a difference, but both are LIBERO's own
    ],
)
def test_evaluations_in_different_worlds_are_not_compared(
    tmp_path: Path, kinds: tuple[str, str], digests: tuple[str, str], refused: bool
) -> None:
    for name, kind, digest in zip("ab", kinds, digests, strict=True):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "episodes.jsonl", [line(0, 30, "success")])
        (tmp_path / name / "fingerprint.json").write_text(
            json.dumps({"assets": {"kind": kind, "digest": digest}})
        )
    if refused:
        with pytest.raises(
            FingerprintError, match=r"cannot be compared: the assets are .* not the same worlds"
        ):
            compare_episodes(tmp_path / "a", tmp_path / "b")
    else:
        assert compare_episodes(tmp_path / "a", tmp_path / "b").warnings


def test_arms_are_compared_in_one_file_of_results(tmp_path: Path) -> None:
    rows = [
        {"arm": arm, "training_seed": 0, "suite": "libero_object", "task": 3, "init_state": state}
        | {"sampling_seed": 1, "success": arm == "dpo" or state < 2}
        for arm in ("start", "dpo")
        for state in range(6)
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = compare_episodes(file, file, before_arm="start", after_arm="dpo").summary()
    assert (summary["episodes"], summary["better"], summary["worse"]) == (6, 4, 0)
    assert summary["mcnemar_p"] == 0.125


def test_training_seeds_are_paired_apart_and_arms_are_selected(tmp_path: Path) -> None:
    path = write(
        tmp_path / "results.jsonl",
        [
            line(0, 30, outcome, arm=arm, training_seed=seed)
            for arm, outcomes in (("start", ["timeout", "timeout"]), ("dpo", ["success", "timeout"]))
            for seed, outcome in enumerate(outcomes)
        ],
    )
    arms = [read_outcomes(path, {"arm": arm}) for arm in ("start", "dpo")]
    comparison = compare_outcomes(*arms)
    assert (comparison.overall.test.n, comparison.overall.test.better) == (2, 1)
    with pytest.raises(
        ComparisonError, match=r"libero_object/0/30/0 \(training seed 0\) is there as timeout and as succ"
    ):
        read_outcomes(path)
    with pytest.raises(ComparisonError, match=r"holds no episodes of an evaluation with {'arm': 'grpo'}"):
        read_outcomes(path, {"arm": "grpo"})


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [line(0, 30, "success")])
    other = write(tmp_path / "other.jsonl", [line(0, 31, "success")])
    with pytest.raises(ComparisonError, match="share no"):
        compare_episodes(one, other)
    with pytest.raises(
        FileNotFoundError, match=r"none\.jsonl does not exist; expected a run folder or a JSON-lines"
    ):
        compare_episodes(one, tmp_path / "none.jsonl")
    wrong = write(tmp_path / "wrong.jsonl", [{"suite": "libero_object", "task_id": 0}])
    with pytest.raises(ComparisonError, match=r"wrong\.jsonl: a line lacks init_state, seed, success"):
        compare_episodes(one, wrong)
    (tmp_path / "text.jsonl").write_text("one\ntwo\n")
    with pytest.raises(ComparisonError, match=r"text\.jsonl: a line is damaged"):
        compare_episodes(one, tmp_path / "text.jsonl")


def stand_in(tmp_path: Path, kind: str = "stand-in") -> ResolvedAssets:
    return ResolvedAssets(path=tmp_path, kind=kind, digest="00ff")


def test_stand_ins_collision_geometry_and_other_versions_are_not_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    visual, collision = EnvironmentPart(geometry="visual"), EnvironmentPart(geometry="collision")
    real = stack_fingerprint(assets=stand_in(tmp_path, "hub"), environment=visual)
    assert real["comparable_with_published"] is True
    assert real["versions"]["mujoco"] == "3.3.2"
    assert real["renderer"] == "osmesa"
    assert json.loads(json.dumps(real)) == real
    ours = stack_fingerprint(assets=stand_in(tmp_path), environment=collision)
    assert ours["comparable_with_published"] is False
    assert ours["differs_from_published"] == [
        "the assets are procedural stand-ins",
        "collision geometry is drawn",
    ]
    assert differences(real, ours) == [
        "assets.kind: hub before, stand-in after",
        "environment.geometry: visual before, collision after",
    ]
    assert differences(ours, ours) == []
    short = EnvironmentPart(geometry="visual", max_steps=160, settle_steps=0)
    assert stack_fingerprint(assets=stand_in(tmp_path, "hub"), environment=short)[
        "differs_from_published"
    ] == [
        "episodes end after 160 steps, not at the suite's limit",
        "0 settling steps, not 10",
    ]


def test_other_versions_and_first_frames_are_named(tmp_path: Path) -> None:
    ours = stack_fingerprint(
        assets=stand_in(tmp_path), first_frames={"libero_object/0": "aa", "libero_object/1": "bb"}
    )
    theirs = {
        **ours,
        "versions": {**ours["versions"], "mujoco": "3.4.0"},
        "first_frames": {"libero_object/0": "cc", "libero_object/2": "dd"},
    }
    assert differences(ours, theirs) == [
        "first_frames.libero_object/0: aa before, cc after",
        "versions.mujoco: 3.3.2 before, 3.4.0 after",
    ]
    assert differences({**ours, "first_frames": {}}, theirs) == ["versions.mujoco: 3.3.2 before, 3.4.0 after"]


def test_the_first_frame_hash_sees_one_pixel_and_not_the_joints() -> None:
    frame = {
        "agentview": np.zeros((16, 16, 3), np.uint8),
        "wrist": np.ones((16, 16, 3), np.uint8),
        "proprio": np.zeros(8, np.float32),
    }
    changed = frame | {"wrist": frame["wrist"].copy()}
    changed["wrist"][3, 5, 1] = 2
    moved = frame | {"proprio": np.ones(8, np.float32)}
    assert first_frame_hash(frame) == first_frame_hash(moved)
    assert first_frame_hash(frame) != first_frame_hash(changed)
    assert len(first_frame_hash(frame)) == 16
