"""Runs LIBERO's own OffScreenRenderEnv, in a process of its own (robosuite renders into whatever GL context is
current, so it cannot share one). Its cameras draw every fifth step, to save time.

Reads an .npz of cases (`cases`: names; `<case>/task`, `<case>/seeds`, `<case>/init_states`, `<case>/actions`) and
writes the states and observations that each episode saw.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from envs.assets import resolve_assets
from envs.libero_setup import prepare_libero
from envs.tasks import init_states, load_task
from tests.libero_driving import SETTLE, SIDE

EVERY = 5
"""Steps between compared moments."""


def run(case: str, given: Any) -> dict[str, np.ndarray]:
    """Drive one task through its episodes; every episode begins with LIBERO's own hard reset."""
    from libero.libero.envs import OffScreenRenderEnv

    suite, task_id = str(given[f"{case}/task"]).split(":")
    task = load_task(suite, int(task_id))
    env = OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=SIDE, camera_widths=SIDE)
    out: dict[str, list[np.ndarray]] = {"state": [], "agentview": [], "wrist": [], "proprio": []}
    for seed, index in zip(given[f"{case}/seeds"], given[f"{case}/init_states"], strict=True):
        env.seed(int(seed))
        env.reset()
        looking = Looking(env.env)
        env.set_init_state(init_states(task)[index])
        settling = np.tile([0, 0, 0, 0, 0, 0, -1], (SETTLE, 1))
        for chunk in [settling, *given[f"{case}/actions"].reshape(-1, EVERY, 7)]:
            for action in chunk[:-1]:
                looking.on = False
                env.step(action)
            looking.on = True
            obs, *_ = env.step(chunk[-1])
            out["state"].append(env.get_sim_state())
            out["agentview"].append(obs["agentview_image"][::-1])
            out["wrist"].append(obs["robot0_eye_in_hand_image"][::-1])
            robot = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
            out["proprio"].append(np.concatenate([obs[key] for key in robot]))
    env.close()
    return {f"{case}/{key}": np.array(values) for key, values in out.items()}


class Looking:
    """Switches the drawing of a robosuite environment's cameras; when they are sampled stays as it was."""

    def __init__(self, domain: Any) -> None:
        self.on = True
        for name in ("agentview_image", "robot0_eye_in_hand_image"):
            domain.modify_observable(name, "sensor", self._switched(domain._observables[name]._sensor))

    def _switched(self, draw: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
        def sensor(cache: Any) -> np.ndarray:
            return draw(cache) if self.on else np.zeros((SIDE, SIDE, 3), np.uint8)

        sensor.__modality__ = "image"  # type: ignore[attr-defined]  # robosuite looks for it
        return sensor


def main(given_path: str, out_path: str) -> None:
    prepare_libero(resolve_assets(None))
    given = np.load(given_path)
    results: dict[str, np.ndarray] = {}
    for case in given["cases"]:
        results |= run(str(case), given)
    np.savez(out_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
