"""The LIBERO environment against LIBERO's own, and its soft reset against a newly built simulator, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.libero import InvalidActionError, LiberoEnv, SimulatorFaultError, axis_angle
from tests.libero_driving import GOAL_TASK, OBJECT_TASK, full_state, grasp_actions, make, random_actions, same
from tests.libero_reference import EVERY

pytestmark = pytest.mark.libero

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """One libero_object simulator, shared: every test resets it."""
    built = make(*OBJECT_TASK)
    yield built
    built.close()


@pytest.fixture(scope="module")
def goal_env() -> Iterator[LiberoEnv]:
    """One libero_goal simulator (drawers and a stove), shared: every test resets it."""
    built = make(*GOAL_TASK)
    yield built
    built.close()


def test_episode_equals_libero_bit_for_bit(tmp_path: Path, env: LiberoEnv, goal_env: LiberoEnv) -> None:
    """Physics, proprioception and pictures, against OffScreenRenderEnv with hard resets: 100 random
    actions on three tasks, and a grasp that lifts the object."""
    env.reset(seed=3, options={"init_state": 4})
    height = env.sim.data.body_xpos[env.domain.obj_body_id["alphabet_soup_1"]][2]
    grasp = grasp_actions(env, "alphabet_soup_1")
    assert env.sim.data.body_xpos[env.domain.obj_body_id["alphabet_soup_1"]][2] > height + 0.1
    stove_env = make("libero_10", 2)
    cases = {
        "object": (env, [3, 3], [4, 9], random_actions(0, 100)),
        "grasp": (env, [3], [4], grasp),
        "goal": (goal_env, [5], [20], random_actions(1, 100)),
        "stove": (stove_env, [1], [7], random_actions(2, 100)),
    }
    given: dict[str, Any] = {"cases": np.array(list(cases))}
    for name, (ours, seeds, indices, actions) in cases.items():
        given[f"{name}/task"] = f"{ours.task.suite}:{ours.task.task_id}"
        given |= {f"{name}/seeds": seeds, f"{name}/init_states": indices, f"{name}/actions": actions}
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-m", "tests.libero_reference", tmp_path / "given.npz", tmp_path / "out.npz"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    out = np.load(tmp_path / "out.npz")
    for name, (ours, seeds, indices, actions) in cases.items():
        moment = 0
        for seed, index in zip(seeds, indices, strict=True):
            obs, _ = ours.reset(seed=seed, options={"init_state": index})
            for chunk in [None, *actions.reshape(-1, EVERY, 7)]:
                if chunk is not None:
                    obs, *_ = ours.step_chunk(chunk)
                where = f"{name}, episode from state {index}, moment {moment}"
                assert (ours.sim.get_state().flatten() == out[f"{name}/state"][moment]).all(), where
                assert (obs["agentview"] == out[f"{name}/agentview"][moment]).all(), where
                assert (obs["wrist"] == out[f"{name}/wrist"][moment]).all(), where
                x, y, z, w = out[f"{name}/proprio"][moment][3:7]
                expected = out[f"{name}/proprio"][moment]
                expected = np.concatenate([expected[:3], axis_angle(np.array([w, x, y, z])), expected[7:]])
                assert (obs["proprio"] == expected.astype(np.float32)).all(), where
                moment += 1
    stove_env.close()


def disturb(env: LiberoEnv) -> None:
    """An episode that opens a drawer, lights the stove, throws an object aside and closes the gripper."""
    env.reset(seed=99, options={"init_state": 11})
    env.sim.data.set_joint_qpos("wooden_cabinet_1_top_level", -0.15)
    env.sim.data.set_joint_qpos("flat_stove_1_button", 1.0)
    env.sim.data.qvel[9:12] = 1.0
    env.domain.sim.model._model.geom_rgba[3] = 0.25
    env.step_chunk(np.tile([0.5, -0.5, -1, 0.3, 0, 0.2, 1], (20, 1)))
    burner = env.sim.model.site_name2id("flat_stove_1_burner")
    assert env.sim.model.site_rgba[burner][3] > 0, "the stove should be seen burning"


def invalid_action(env: LiberoEnv) -> None:
    env.reset(seed=99, options={"init_state": 11})
    with pytest.raises(InvalidActionError):
        env.step(np.full(7, np.nan))


def failed_step(env: LiberoEnv) -> None:
    """The simulator itself is left broken."""
    env.reset(seed=99, options={"init_state": 11})
    env.sim.data.qpos[0] = np.nan
    with pytest.raises(SimulatorFaultError, match=r"put_the_bowl|turn_on_the_stove|diverged"):
        env.step(np.zeros(7))


@pytest.mark.parametrize("before", [disturb, invalid_action, failed_step])
def test_soft_reset_equals_new_simulator(
    before: Callable[[LiberoEnv], None], goal_env: LiberoEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings into the working folder
    before(goal_env)
    new = make(*GOAL_TASK)
    try:
        for used_obs, new_obs in zip(episode(goal_env), episode(new), strict=True):
            assert same(used_obs, new_obs)
            assert (full_state(goal_env) == full_state(new)).all()
        for name in ("body_pos", "body_quat", "site_rgba", "geom_rgba"):
            used, fresh = (getattr(e.sim.model._model, name) for e in (goal_env, new))
            assert (used == fresh).all(), name
    finally:
        new.close()


def episode(env: LiberoEnv) -> Iterator[dict[str, np.ndarray]]:
    yield env.reset(seed=17, options={"init_state": 2})[0]
    for chunk in random_actions(8, 12).reshape(3, 4, 7):
        yield env.step_chunk(chunk)[0]


def test_seed_places_fixtures_and_leaves_the_callers_generator_alone(goal_env: LiberoEnv) -> None:
    cabinet = goal_env.sim.model.body_name2id("wooden_cabinet_1_main")
    np.random.seed(5)
    expected = np.random.RandomState(5).rand()
    goal_env.reset(seed=1)
    first = goal_env.sim.model.body_pos[cabinet].copy()
    goal_env.reset(seed=2)
    assert not (goal_env.sim.model.body_pos[cabinet] == first).all()
    goal_env.reset(seed=1)
    assert (goal_env.sim.model.body_pos[cabinet] == first).all()
    assert np.random.rand() == expected
