"""Scripted experts reach the goals they are for, and their demonstrations are clean labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from configs.world import EnvironmentPart
from envs.assets import ResolvedAssets, resolve_assets
from envs.demonstrations import demonstrate
from envs.experts import EXPERT_TASKS, NoExpertError, expert_for
from envs.libero import LiberoEnv
from trajectories.records import Trajectory

pytestmark = pytest.mark.libero

ENVIRONMENT = EnvironmentPart(image_size=32, geometry="collision")
Make = Callable[..., LiberoEnv]


@pytest.fixture(scope="module")
def assets() -> ResolvedAssets:
    return resolve_assets(None)


@pytest.fixture
def make(assets: ResolvedAssets) -> Iterator[Make]:
    """Builds simulators and closes them after the test."""
    built: list[LiberoEnv] = []

    def build(suite: str, task_id: int, environment: EnvironmentPart = ENVIRONMENT) -> LiberoEnv:
        built.append(LiberoEnv(suite=suite, task_id=task_id, environment=environment, assets=assets))
        return built[-1]

    yield build
    for env in built:
        env.close()


@pytest.mark.parametrize(
    ("suite", "task_id", "init_states", "most_steps"),
    [
        ("libero_object", 1, (7, 23), 110),
        ("libero_object", 7, (0, 41), 120),
        ("libero_spatial", 0, (3,), 90),
        ("libero_spatial", 4, (11,), 220),
        ("libero_spatial", 9, (30,), 150),
        ("libero_goal", 0, (5,), 100),
        ("libero_goal", 7, (5, 19), 130),
        ("libero_goal", 9, (8,), 130),
    ],
)
def test_expert_reaches_the_goal(
    make: Make, suite: str, task_id: int, init_states: tuple[int, ...], most_steps: int
) -> None:
    env = make(suite, task_id)
    for init_state in init_states:
        done = demonstrate(
            env, init_state=init_state, seed=init_state, noise=0.0, chunk=8, stride=env.max_steps
        )
        assert done.outcome == "success", f"{suite} {task_id} from state {init_state}"
        assert done.env_steps <= most_steps


def test_expert_picks_a_knocked_over_bottle_up_again(make: Make) -> None:
    env = make("libero_object", 4)
    expert = expert_for(env)
    env.reset(seed=0, options={"init_state": 0})
    joint = env.domain.get_object("ketchup_1").joints[-1]
    x, y = env.sim.data.get_joint_qpos(joint)[:2]
    env.sim.data.set_joint_qpos(joint, np.array([x, y, 0.03, 1.0, 0.0, 0.0, 0.0]))
    env.sim.forward()
    expert.reset(env)
    success = False
    for _ in range(200):
        success, _, _ = env.advance(expert.act(env)[None])
        if success:
            break
    assert success


def test_demonstration_records_the_expert_s_own_chunks(make: Make) -> None:
    env = make("libero_object", 0)
    demo = demonstrate(env, init_state=2, seed=5, noise=0.3, chunk=8)
    assert demo.outcome == "success"
    assert demo.cell.key == "libero_object/0/2/5"
    assert (demo.policy_version, demo.policy_hash) == (-1, "scripted-expert")
    assert 15 <= len(demo.decisions) <= demo.env_steps // 2 + 1
    for decision in demo.decisions:
        assert decision.sample.actions.shape == (8, 7)
        assert decision.sample.actions.dtype == np.float32
        assert np.abs(decision.sample.actions).max() <= 1
        np.testing.assert_array_equal(decision.sample.model_chunk, decision.sample.actions)
        assert decision.sample.logps.shape == (0,)
        assert decision.observation.agentview.shape == (32, 32, 3)
        assert decision.observation.wrist.std() > 0
        assert decision.observation.instruction == "pick up the alphabet soup and place it in the basket"


def test_the_last_chunk_is_filled_with_standing_still(make: Make) -> None:
    env = make("libero_object", 7)
    demo = demonstrate(env, init_state=0, seed=0, noise=0.0, chunk=4, stride=1)
    assert [decision.executed for decision in demo.decisions[-5:]] == [4, 4, 3, 2, 1]
    last = demo.decisions[-1].sample.actions
    np.testing.assert_array_equal(last[1:, :6], np.zeros((3, 6)))
    np.testing.assert_array_equal(last[:, 6], np.full(4, last[0, 6]))


def test_labels_are_what_the_expert_does_undisturbed(make: Make) -> None:
    """Replaying from the start, the expert's answer in each recorded state is the first action of its chunk."""
    env = make("libero_object", 3)
    calm = demonstrate(env, init_state=0, seed=1, noise=0.0, chunk=4, stride=1)
    pushed = demonstrate(env, init_state=0, seed=1, noise=0.5, chunk=4, stride=1)
    assert len(calm.decisions) == calm.env_steps
    assert len(pushed.decisions) < pushed.env_steps
    expert = expert_for(env)
    env.reset(seed=1, options={"init_state": 0})
    expert.reset(env)
    for decision in calm.decisions:
        np.testing.assert_allclose(expert.act(env), decision.sample.actions[0], atol=1e-6)
        env.advance(decision.sample.actions[:1])


def test_a_seed_fixes_the_demonstration(make: Make) -> None:
    env = make("libero_object", 0)

    def content(demo: Trajectory) -> list[bytes]:
        return [
            array.tobytes()
            for decision in demo.decisions
            for array in (
                decision.observation.agentview,
                decision.observation.proprio,
                decision.sample.actions,
            )
        ]

    first, other, again = (
        demonstrate(env, init_state=1, seed=seed, noise=0.3, chunk=8, stride=8) for seed in (3, 4, 3)
    )
    assert content(first) == content(again)
    assert content(first) != content(other)


def test_a_task_without_an_expert_is_refused(make: Make) -> None:
    env = make("libero_10", 5)
    with pytest.raises(
        NoExpertError, match=r"no scripted expert for libero_10 task 5; .*libero_object 0, 1, 2"
    ):
        expert_for(env)
    assert set(EXPERT_TASKS) == {"libero_object", "libero_spatial", "libero_goal"}


def test_an_expert_that_runs_out_of_steps_is_no_success(make: Make) -> None:
    env = make("libero_goal", 6, EnvironmentPart(image_size=16, geometry="collision", max_steps=5))
    demo = demonstrate(env, init_state=0, seed=0, noise=0.3, chunk=8)
    assert (demo.outcome, demo.env_steps) == ("timeout", 5)


def test_a_simulator_fault_while_settling_is_an_outcome(make: Make) -> None:
    env = make("libero_goal", 6)
    env._init_states = np.full_like(env._init_states, 1e12)
    demo = demonstrate(env, init_state=0, seed=0, noise=0.3, chunk=8)
    assert (demo.outcome, demo.env_steps, demo.decisions) == ("fault", 0, ())
    assert "the simulator diverged" in demo.fault
