"""Every task of four suites on the stand-in pack: it loads, settles, lies where the published models lie, renders, and
its goal can be reached.

`tests/data/rest_positions.json` holds where objects lie on the reduced copy of the published models. Record it
again with `PYTHONPATH=. python tests/test_standins.py ../shared/libero_assets`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.world import EnvironmentPart
from envs.assets import ResolvedAssets, check_pack, pack_digest, resolve_assets
from envs.libero import HOLD, LiberoEnv
from envs.standins import build_pack
from tests.standin_goals import fulfil

ROOT = Path(__file__).parents[1]
SHARED_ASSETS = ROOT.parent / "shared" / "libero_assets"
REST_POSITIONS = Path(__file__).parent / "data" / "rest_positions.json"

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
TASKS = [(suite, task_id) for suite in SUITES for task_id in range(10)]
STATES = (0, 1, 2)
# Here objects overlap in the official state itself, and are flung apart in a way that no approximation repeats.
OVERLAPPING = {("libero_spatial", 0, 2), ("libero_spatial", 8, 2), ("libero_10", 0, 2)}
STATE_LENGTHS = {"libero_spatial": {92}, "libero_object": {110}, "libero_goal": {79}}
ENVIRONMENT = EnvironmentPart(image_size=64, settle_steps=10)
REST_METRES = 0.010
DRIFT_METRES = 0.002

Positions = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> ResolvedAssets:
    """A freshly built stand-in pack."""
    folder = tmp_path_factory.mktemp("stand-ins")
    build_pack(folder)
    return ResolvedAssets(path=folder, kind="stand-in", digest=pack_digest(folder))


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def env(pack: ResolvedAssets, request: pytest.FixtureRequest) -> Iterator[LiberoEnv]:
    """Each task's simulator in turn; building one takes seconds, so the tests of a task share it."""
    suite, task_id = request.param
    env = LiberoEnv(suite=suite, task_id=task_id, environment=ENVIRONMENT, assets=pack)
    yield env
    env.close()


def positions(env: LiberoEnv) -> Positions:
    """World positions of all movable objects, metres [3]."""
    domain = env.domain
    return {name: env.sim.data.body_xpos[domain.obj_body_id[name]].copy() for name in domain.objects_dict}


def settled(env: LiberoEnv, state: int) -> tuple[Positions, Positions, np.ndarray]:
    """Positions after 10 no-op steps and after 10 more, and the picture then."""
    env.reset(seed=0, options={"init_state": state})
    early = positions(env)
    env.advance(np.tile(HOLD, (10, 1)))
    return early, positions(env), env.observe()["agentview"]


def farthest(a: Positions, b: Positions) -> tuple[float, str]:
    """The largest distance between two sets of positions, metres, and whose it is."""
    return max((float(np.linalg.norm(a[name] - b[name])), name) for name in a)


def recorded(suite: str, task_id: int, state: int) -> Positions:
    """Where the published models lie, from the table."""
    table = json.loads(REST_POSITIONS.read_text())
    return {name: np.asarray(place) for name, place in table[f"{suite}/{task_id}/{state}"].items()}


@pytest.mark.libero
def test_task_settles_where_the_published_models_do(env: LiberoEnv) -> None:
    suite, task_id = env.task.suite, env.task.task_id
    length = 1 + env.sim.model.nq + env.sim.model.nv
    assert length in STATE_LENGTHS.get(suite, set(range(45, 124)))
    for state in STATES:
        assert len(env.sim.get_state().flatten()) == len(env._init_states[state]) == length
        early, late, picture = settled(env, state)
        drift, mover = farthest(early, late)
        assert drift < DRIFT_METRES, f"state {state}: {mover} still moves"
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 15, f"state {state}: the picture is blank"
        if (suite, task_id, state) not in OVERLAPPING:
            off, stray = farthest(late, recorded(suite, task_id, state))
            assert off < REST_METRES, f"state {state}: {stray} lies elsewhere"


@pytest.mark.libero
def test_the_goal_can_be_reached(env: LiberoEnv) -> None:
    env.reset(seed=0, options={"init_state": 0})
    goals: list[Any] = env.domain.parsed_problem["goal_state"]
    assert not env.domain._check_success()
    fulfil(env, goals)
    success, _, executed = env.advance(np.tile(HOLD, (40, 1)))
    reached = {tuple(goal): bool(env.domain._eval_predicate(goal)) for goal in goals}
    assert success, f"after {executed} steps: {reached}"


@pytest.mark.libero
@pytest.mark.parametrize("suite", SUITES)
def test_the_table_is_what_the_published_models_do(suite: str) -> None:
    if not SHARED_ASSETS.is_dir():
        pytest.skip("needs the reduced copy of the published assets")
    for state, places in rest_positions(suite, 3, resolve_assets(str(SHARED_ASSETS))):
        off, stray = farthest(places, recorded(suite, 3, state))
        assert off < 0.0005, f"state {state}: {stray} lies elsewhere than recorded"


@pytest.mark.libero
def test_objects_weigh_what_the_published_ones_weigh(pack: ResolvedAssets) -> None:
    env = LiberoEnv(suite="libero_object", task_id=0, environment=ENVIRONMENT, assets=pack)
    model, domain = env.sim.model, env.domain
    grams = {
        name.removesuffix("_1"): 1e3 * float(model.body_subtreemass[domain.obj_body_id[name]])
        for name in domain.objects_dict
    }
    env.close()
    assert grams["milk"] == pytest.approx(31.7, abs=0.1)
    assert grams["alphabet_soup"] == pytest.approx(25.9, abs=0.1)
    assert grams["basket"] == pytest.approx(136.1, abs=0.1)


@pytest.mark.libero
def test_the_stove_is_not_a_mirror(pack: ResolvedAssets) -> None:
    """A reflecting plane makes MuJoCo draw the scene twice."""
    env = LiberoEnv(suite="libero_10", task_id=2, environment=ENVIRONMENT, assets=pack)
    model = env.sim.model._model
    own = [i for i in range(model.nmat) if not model.material(i).name.startswith(("robot0", "gripper0"))]
    reflectance = {model.material(i).name: float(model.mat_reflectance[i]) for i in own}
    env.close()
    assert set(reflectance.values()) == {0.0}


def test_a_pack_is_the_same_every_time_and_complete(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_pack(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) > 40
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert check_pack(tmp_path / "one") == []


def rest_positions(suite: str, task_id: int, assets: ResolvedAssets) -> Iterator[tuple[int, Positions]]:
    """Positions 20 no-op steps after the first three official states."""
    env = LiberoEnv(suite=suite, task_id=task_id, environment=ENVIRONMENT, assets=assets)
    for state in STATES:
        yield state, settled(env, state)[1]
    env.close()


def record(assets: ResolvedAssets) -> None:
    """Write the table, to a hundredth of a millimetre, one state a line."""
    lines = []
    for suite, task_id in TASKS:
        for state, places in rest_positions(suite, task_id, assets):
            rounded = {name: [round(float(v), 5) for v in place] for name, place in places.items()}
            lines.append(f'"{suite}/{task_id}/{state}": {json.dumps(rounded)}')
    REST_POSITIONS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(resolve_assets(sys.argv[1]))
