"""The LIBERO environment: chunks, endings, bad input refused, and several in one process."""

from __future__ import annotations

import asyncio
import ctypes.util
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gymnasium.utils.env_checker
import numpy as np
import pytest

from actors.rollout import SimulatorPool
from configs.world import EnvironmentPart
from envs.assets import resolve_assets
from envs.libero import InvalidActionError, LiberoEnv, to_observation
from envs.tasks import init_states, load_task
from tests.libero_driving import OBJECT_TASK, SIDE, full_state, grasp_actions, make, random_actions, same

pytestmark = pytest.mark.libero

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """One libero_object simulator, shared: every test resets it."""
    built = make(*OBJECT_TASK)
    yield built
    built.close()


def test_gymnasium_checker_passes(env: LiberoEnv) -> None:
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)
    assert env.observation_space["agentview"].shape == (SIDE, SIDE, 3)
    assert env.observation_space["proprio"].shape == (8,)
    assert env.action_space.shape == (7,)


def test_what_the_simulator_does_is_done_within_its_deadlines() -> None:
    now, ticks = [""], []

    @contextmanager
    def within(call: str) -> Iterator[None]:
        now[0] = call
        yield
        ticks.append(call)
        now[0] = ""

    environment = EnvironmentPart(image_size=32, geometry="collision")
    built = LiberoEnv(suite="libero_object", task_id=0, environment=environment, within=within)
    assert ticks == ["reset"]
    built._control.step, stepped = _noted(built._control.step, now)
    built._renderer.render, drawn = _noted(built._renderer.render, now)
    built.reset(seed=0)
    assert (set(stepped), drawn) == ({"reset"}, ["render"])
    stepped.clear()
    built.step(np.zeros(7))
    assert (set(stepped), drawn) == ({"step"}, ["render", "render"])
    built.close()


def _noted(call: Callable[..., Any], now: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The same call, and a list of what it was made within each time."""
    seen: list[str] = []

    def noting(*arguments: Any, **named: Any) -> Any:
        seen.append(now[0])
        return call(*arguments, **named)

    return noting, seen


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


def test_depth_is_how_far_a_thing_lies_from_the_camera(env: LiberoEnv) -> None:
    plain, _ = env.reset(seed=0)
    seen = env.observe(depth=True)
    assert np.array_equal(seen["agentview"], plain["agentview"])
    assert "depth" not in env.observe()
    depth, side = seen["depth"], len(seen["agentview"])
    assert (depth.dtype, depth.shape) == (np.float32, (side, side))
    data, model = env.sim.data._data, env.sim.model._model
    camera = model.camera("agentview").id
    focal = side / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    for body in ("alphabet_soup_1_main", "basket_1_main"):
        away = data.body(body).xpos - data.cam_xpos[camera]
        right, up, back = data.cam_xmat[camera].reshape(3, 3).T @ away
        row, column = (int(side / 2 + focal * offset / -back) for offset in (-up, right))
        # What is seen of a body is the near side of it.
        assert -0.02 < -back - depth[row, column] < 0.15, body
    record = to_observation(seen, env.instruction)
    assert record.depth is depth


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


def test_a_simulator_that_is_replaced_is_gone_before_the_next_is_built() -> None:
    """Its model is large; waiting for Python's collector would add up to gigabytes in a long run."""
    assets = resolve_assets(None)
    environment = EnvironmentPart(image_size=SIDE, geometry="collision")

    async def replace() -> None:
        pool = SimulatorPool(capacity=1, environment=environment, assets=assets, within=nullcontext)
        first = await pool.take(*OBJECT_TASK)
        first.reset(seed=0, options={"init_state": 0})
        domain = weakref.ref(first.domain)
        pool.give_back(first)
        del first
        second = await pool.take(OBJECT_TASK[0], OBJECT_TASK[1] + 1)
        assert domain() is None
        second.close()

    gc.disable()  # else it might have come by of itself
    try:
        asyncio.run(replace())
    finally:
        gc.enable()
