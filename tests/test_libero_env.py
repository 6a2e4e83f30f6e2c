"""The LIBERO environment: same physics and pictures as LIBERO's own, clean resets, and bad input refused."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium.utils.env_checker
import mujoco
import numpy as np
import pytest

from configs.schema import EnvironmentPart
from envs.assets import resolve_assets
from envs.libero import InvalidActionError, LiberoEnv, SimulatorFaultError, axis_angle, to_observation
from envs.tasks import init_states, load_task
from tests.libero_reference import EVERY, SETTLE, SIDE

pytestmark = pytest.mark.libero

ROOT = Path(__file__).parents[1]
OBJECT_TASK = ("libero_object", 0)
GOAL_TASK = ("libero_goal", 7)


def make(suite: str, task_id: int, **environment: Any) -> LiberoEnv:
    settings = {"image_size": SIDE, "settle_steps": SETTLE} | environment
    return LiberoEnv(
        suite=suite, task_id=task_id, environment=EnvironmentPart(**settings), assets=resolve_assets(None)
    )


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


def full_state(env: LiberoEnv) -> np.ndarray:
    """Everything that decides the simulator's future: positions, velocities, controls, solver warm start."""
    model, data = env.sim.model._model, env.sim.data._data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def random_actions(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 7))


def grasp_actions(env: LiberoEnv, thing: str) -> np.ndarray:
    """Drive the gripper over `thing`, down, closed and up by proportional control; returns what was executed."""
    body = env.domain.obj_body_id[thing]
    site = env.domain.robots[0].eef_site_id
    executed = []
    for height, grip, steps in ((0.12, -1, 25), (0.0, -1, 25), (0.0, 1, 10), (0.25, 1, 20)):
        target = env.sim.data.body_xpos[body] + [0, 0, height]
        for _ in range(steps):
            action = np.zeros(7)
            action[:3] = np.clip((target - env.sim.data.site_xpos[site]) / 0.05, -1, 1)
            action[6] = grip
            env.advance(action[None])
            executed.append(action)
    return np.array(executed)


def test_gymnasium_checker_passes(env: LiberoEnv) -> None:
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)
    assert env.observation_space["agentview"].shape == (SIDE, SIDE, 3)
    assert env.observation_space["proprio"].shape == (8,)
    assert env.action_space.shape == (7,)


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


def test_chunk_equals_single_steps(env: LiberoEnv) -> None:
    actions = random_actions(4, 8)
    env.reset(seed=0, options={"init_state": 1})
    for action in actions:
        single, *_ = env.step(action)
    state = full_state(env)
    env.reset(seed=0, options={"init_state": 1})
    chunked, reward, terminated, truncated, info = env.step_chunk(actions)
    assert (full_state(env) == state).all()
    assert same(single, chunked)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"executed": 8, "success": False})


def test_geometry_changes_the_picture_and_nothing_else(env: LiberoEnv) -> None:
    collision = make(*OBJECT_TASK, geometry="collision")
    for built in (env, collision):
        built.reset(seed=0, options={"init_state": 1})
    actions = random_actions(5, 8)
    (seen, *_), (painted, *_) = env.step_chunk(actions), collision.step_chunk(actions)
    assert (full_state(env) == full_state(collision)).all()
    assert (seen["proprio"] == painted["proprio"]).all()
    assert not (seen["agentview"] == painted["agentview"]).all()
    # The basket (right of the middle in the picture) keeps its brown against the grey floor.
    red, _, blue = painted["agentview"][20:22, 38:40].reshape(-1, 3).mean(axis=0)
    assert red > 1.3 * blue
    red, _, blue = painted["agentview"][40:44, 8:12].reshape(-1, 3).mean(axis=0)
    assert red < 1.2 * blue
    collision.close()


def test_contacts_equal_robosuites_own(env: LiberoEnv) -> None:
    env.reset(seed=3, options={"init_state": 4})
    grasp_actions(env, "alphabet_soup_1")
    domain = env.domain
    things = [domain.robots[0].gripper, *domain.objects_dict.values()]
    found = {(a.name, b.name): domain.check_contact(a, b) for a in things for b in things if a is not b}
    by_name = {
        (a.name, b.name): domain.check_contact(a.contact_geoms, b.contact_geoms)
        for a in things
        for b in things
        if a is not b
    }
    assert found == by_name
    assert [pair for pair, touching in found.items() if touching] == [
        (things[0].name, "alphabet_soup_1"),
        ("alphabet_soup_1", things[0].name),
    ]


def test_goal_ends_the_chunk(env: LiberoEnv) -> None:
    env.reset(seed=0)
    env.sim.data.set_joint_qpos("alphabet_soup_1_joint0", in_basket(env))
    obs, reward, terminated, truncated, info = env.step_chunk(np.zeros((8, 7)))
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"executed": 1, "success": True})
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(7))
    record = to_observation(obs, env.instruction)
    assert record.instruction == "pick up the alphabet soup and place it in the basket"
    assert record.proprio.dtype == np.float32


def in_basket(env: LiberoEnv) -> np.ndarray:
    site = env.sim.model.site_name2id("basket_1_contain_region")
    return np.concatenate([env.sim.data.site_xpos[site], [1, 0, 0, 0]])


def test_step_limit_truncates_inside_the_chunk() -> None:
    short = make(*OBJECT_TASK, max_steps=3)
    short.reset(seed=0)
    *_, terminated, truncated, info = short.step_chunk(np.zeros((8, 7)))
    assert (terminated, truncated, info) == (False, True, {"executed": 3, "success": False})
    short.close()
    short.close()


BAD_ACTIONS = {
    "six numbers": (np.zeros(6), r"shape \(1, 6\)"),
    "nan in the gripper": (np.array([0, 0, 0, 0, 0, 0, np.nan]), "has nan in dimension 6"),
    "infinity": (np.array([0, np.inf, 0, 0, 0, 0, 1]), "has inf in dimension 1"),
    "out of range": (np.array([0, 0, 1.01, 0, 0, 0, 1]), "has 1.01 in dimension 2"),
    "not numbers": (np.array(["a"] * 7), "not numbers"),
}


@pytest.mark.parametrize("name", BAD_ACTIONS)
def test_bad_action_never_reaches_the_simulator(env: LiberoEnv, name: str) -> None:
    bad, message = BAD_ACTIONS[name]
    env.reset(seed=0)
    before = full_state(env)
    with pytest.raises(InvalidActionError, match=message):
        env.step(bad)
    with pytest.raises(InvalidActionError):
        env.step_chunk(np.zeros((0, 7)))
    assert (full_state(env) == before).all()
    # Rounding of a normalised action is not an error.
    env.step(np.full(7, 1 + 1e-7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_state": 50}, "init_state=50 is out of range; expected an integer in 0..49"),
        ({"init_state": -1}, "init_state=-1"),
        ({"init_state": 1.5}, "init_state=1.5"),
        ({"initial_state": 3}, "unknown reset option 'initial_state'"),
    ],
)
def test_bad_reset_option(env: LiberoEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_tasks() -> None:
    task = load_task("libero_10", 2)
    assert task.instruction == "turn on the stove and put the moka pot on it"
    assert task.max_steps == 520
    assert init_states(task).shape == (50, 47)
    with pytest.raises(ValueError, match="unknown suite 'libero_100'"):
        load_task("libero_100", 0)
    with pytest.raises(ValueError, match=r"task_id=10 is out of range for libero_goal; expected 0\.\.9"):
        load_task("libero_goal", 10)


def test_altered_init_states_are_not_opened(tmp_path: Path) -> None:
    task = load_task("libero_object", 0)
    altered = tmp_path / task.suite / f"{task.name}.pruned_init"
    altered.parent.mkdir()
    altered.write_bytes(b"cos\nsystem\n(S'echo opened'\ntR.")
    with pytest.raises(ValueError, match=rf"{task.name}\.pruned_init has SHA-256 .* was not opened"):
        init_states(task, folder=tmp_path)


def test_several_simulators_share_a_process(env: LiberoEnv) -> None:
    """GL contexts do not disturb each other, whatever the order of drawing and closing."""
    env.reset(seed=0)
    expected = env.observe()
    others = [make("libero_object", 1), make("libero_object", 2, image_size=24, geometry="collision")]
    for other in others:
        other.reset(seed=0)
    assert same(env.observe(), expected)
    others.pop(0).close()
    assert same(env.observe(), expected)
    others[0].step(np.zeros(7))
    others[0].close()
    assert same(env.observe(), expected)


def test_renderer_cannot_change_under_way(env: LiberoEnv) -> None:
    other = {"osmesa": "egl", "egl": "osmesa"}[os.environ["MUJOCO_GL"]]
    with pytest.raises(RuntimeError, match=f"needs PyOpenGL on {other}.*set MUJOCO_GL={other}"):
        make(*OBJECT_TASK, renderer=other)


@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="no EGL library on this machine")
def test_egl_draws() -> None:
    program = (
        "import mujoco\n"  # imported first, as a user's own script may
        "from configs.schema import EnvironmentPart\n"
        "from envs.libero import LiberoEnv\n"
        "part = EnvironmentPart(settle_steps=0, renderer='egl')\n"
        "env = LiberoEnv(suite='libero_object', task_id=0, environment=part)\n"
        "picture = env.reset(seed=0)[0]['agentview']\n"
        "assert picture.std() > 20, picture.std()\n"
        "env.close()\n"
    )
    environ = {
        name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, check=True, timeout=200)


def test_memory_does_not_grow_over_resets() -> None:
    built = make(*OBJECT_TASK, settle_steps=0)
    for index in range(5):
        built.reset(seed=index)
    before = resident_mib()
    for index in range(25):
        built.reset(seed=index, options={"init_state": index})
    assert resident_mib() - before < 5
    built.close()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_nothing_is_asked_printed_or_written_at_home(tmp_path: Path) -> None:
    """A first run on a new machine, with no terminal to answer LIBERO's questions."""
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "from configs.schema import EnvironmentPart\n"
        "from envs.libero import LiberoEnv\n"
        "env = LiberoEnv(suite='libero_object', task_id=0, environment=EnvironmentPart(settle_steps=0))\n"
        "env.reset(seed=0)\n"
        "env.close()\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LIBERO", "XDG"))}
    environ |= {
        "HOME": str(home),
        "PAIRLOOM_CACHE": str(tmp_path / "cache"),
        "MPLCONFIGDIR": str(tmp_path / "mpl"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert done.stdout == ""
    assert "robosuite" not in done.stderr
    assert list(home.iterdir()) == []
    assert (tmp_path / "cache" / "libero" / "config.yaml").exists()
