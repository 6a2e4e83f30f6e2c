"""LIBERO's own environment object: building it, and putting it back as new without rebuilding it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from envs.tasks import Task

_PLACEMENT_ATTEMPTS = 100
_MUTABLE_MODEL_ARRAYS = ("body_pos", "body_quat", "site_rgba", "geom_rgba")
"""What LIBERO and robosuite change in the model itself: fixture poses and visibility (a burning stove)."""


class SimulatorFaultError(RuntimeError):
    """The physics diverged, or the objects find no place; the episode is lost and the environment must be reset."""


class RendererError(RuntimeError):
    """The renderer gave no picture, through no fault of the episode's; the message names it."""


def build_domain(task: Task) -> Any:
    """LIBERO's BDDLBaseDomain for `task`, without cameras. `prepare_libero` must have been called."""
    import libero.libero.envs.bddl_utils as bddl_utils  # only importable once prepared
    import robosuite
    from libero.libero.envs import TASK_MAPPING

    problem = bddl_utils.get_problem_info(str(task.bddl_file))["problem_name"]
    with contextlib.redirect_stdout(io.StringIO()), numpy_seeded(0):
        domain = TASK_MAPPING[problem](
            str(task.bddl_file),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            ignore_done=True,
            hard_reset=False,
        )
    domain.check_contact = _ContactCheck(domain)
    return domain


class _ContactCheck:
    """robosuite's `check_contact` without its look-up of names for every contact: LIBERO asks it at every step
    whether the goal holds."""

    def __init__(self, domain: Any) -> None:
        self._sim = domain.sim
        self._by_name = domain.check_contact
        self._geoms: dict[Any, np.ndarray] = {}

    def __call__(self, first: Any, second: Any = None) -> bool:
        if isinstance(first, (str, list)) or second is None or isinstance(second, (str, list)):
            return bool(self._by_name(first, second))
        touching = self._sim.data._data.contact.geom
        one, other = self._mask(first)[touching], self._mask(second)[touching]
        return bool((one & other[:, ::-1]).any())

    def _mask(self, thing: Any) -> np.ndarray:
        """bool [ngeom]: the collision geoms of a robosuite model."""
        if thing not in self._geoms:
            names = set(thing.contact_geoms)
            model = self._sim.model
            self._geoms[thing] = np.array([model.geom_id2name(geom) in names for geom in range(model.ngeom)])
        return self._geoms[thing]


class SoftReset:
    """Resets a domain in milliseconds to what a newly built one would be after the same seed.

    robosuite's own soft reset (`hard_reset=False`) leaves behind the fixtures' poses, which sites are visible, and
    how far the gripper command had closed.
    """

    def __init__(self, domain: Any) -> None:
        """Take the pristine values: call before the domain is first stepped (after painting it, if it is)."""
        self._domain = domain
        self._model = domain.sim.model._model
        self._pristine = {name: getattr(self._model, name).copy() for name in _MUTABLE_MODEL_ARRAYS}

    def __call__(self, seed: int, init_state: np.ndarray) -> None:
        """Reset, with the fixtures placed by `seed`, to `init_state` (float64 [1 + nq + nv]).

        Raises:
            RuntimeError: LIBERO found no placement without collisions.
        """
        domain, sim = self._domain, self._domain.sim
        for name, array in self._pristine.items():
            np.copyto(getattr(self._model, name), array)
        gripper = domain.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        with numpy_seeded(seed):
            self._place()
        sim.set_state_from_flattened(init_state)
        sim.forward()
        domain._check_success()
        domain._post_process()

    def _place(self) -> None:
        from robosuite.utils.errors import RandomizationError  # only importable once prepared

        for _ in range(_PLACEMENT_ATTEMPTS):
            with contextlib.suppress(RandomizationError):
                self._reset_like_new()
                return
        raise SimulatorFaultError(
            f"no placement without collisions in {_PLACEMENT_ATTEMPTS} attempts; use another seed"
        )

    def _reset_like_new(self) -> None:
        """robosuite's reset, on the same model.

        A rebuilt simulation evaluates the dynamics once at its default pose, and the result is the constraint
        solver's first guess; leaving that out parts the trajectories at the solver's tolerance.
        """
        domain, sim = self._domain, self._domain.sim
        sim.reset()
        sim.forward()
        sim.forward()
        domain._reset_internal()
        sim.forward()
        domain.visualize(vis_settings=dict.fromkeys(domain._visualizations, False))


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO's placement draws from; the caller's stream is put back after."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
