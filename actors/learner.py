"""The learner actor: a thin process around the plain classes of `learners/`."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from configs.policy import PolicyPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.capability import Vector, read_manifest
from learners.checkpoint import keep_newest, load_checkpoint, newest_valid, save_checkpoint
from learners.lineage import STATES, states_seen
from learners.orthogonality import AdapterPenalty, FullPenalty
from learners.preference import PreferenceLearner, UpdateReport
from learners.supervised import SupervisedLearner
from policies.make import make_policy
from policies.published import weight_names
from policies.weights import adapters
from policies.weights.snapshots import state_tensors
from trajectories.records import AdapterWeights, PreferencePair, Trajectory, WeightSnapshot

PROGRESS_EVERY = 20
UNFINISHED = "supervised"
"""Folder, beside the checkpoints, of the state of a supervised start that is still being trained."""
SAVE_EVERY_S = 30.0
"""Seconds of supervised training that a death costs at most, unless saving takes long."""
SAVING_SHARE = 0.05
"""Of the time, at most, that goes into saving."""
KEPT_STATES = 2
"""Learner states on disk: the last round's, and the one before should that be damaged."""

log = logging.getLogger(__name__)


class BlankLearnerError(RuntimeError):
    """The learner's process is another one than that which was brought to where the run is. Ray starts one in the place
    of one that dies while nothing is asked of it, and says nothing."""


def state_name(round_index: int) -> str:
    """The name of the learner's state after a round's update, among the learner states of a run."""
    return f"r{round_index:04d}"


class Learner:
    """Owns the trainable policy: the supervised start, then one adapter update a round."""

    def __init__(
        self,
        *,
        policy: PolicyPart,
        supervised: SupervisedPart,
        capability: CapabilityPart,
        adapter: AdapterPart,
        preference: PreferencePart,
        guard: GuardPart,
        image_size: int,
        seed: int,
        threads: int,
        monitor: str,
    ) -> None:
        torch.set_num_threads(threads)
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._supervised, self._adapter, self._preference, self._guard = (
            supervised,
            adapter,
            preference,
            guard,
        )
        self._capability = capability
        self._part = policy
        self._seed = seed
        # By name: a handle among its arguments would keep Ray from restarting this actor once those are gone.
        self._monitor = ray.get_actor(monitor)
        self._policy = make_policy(policy, image_size=image_size, seed=seed, device=device)
        self._learner: PreferenceLearner | None = None
        self._started = False
        """Whether the policy is the start."""
        self._demos: list[Trajectory] = []

    def node(self) -> str:
        """The id of the node that this process runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def supervise(self, demos: Sequence[Trajectory], *, folder: str) -> dict[str, float]:
        """Train the supervised start on demonstrations, every weight or an adapter that is then merged in, and save it
        as the checkpoint `start` under `folder`, going on from where an earlier process of the run had come; with no
        steps, the policy as it is: published weights, of which the run then has a copy of its own."""
        self._demos = list(demos)
        part = self._supervised
        metrics: dict[str, float] = {}
        metadata: dict[str, Any] = {"steps": part.steps, "seed": self._seed}
        if part.init is not None:
            self._fill(part.init)
        if part.steps:
            module, penalty = self._policy.module, None
            if part.trains == "adapter":
                adapters.attach(module, self._adapter, seed=self._seed, decoders=self._policy.adapted)
            if (vector := self._vector()) is not None:
                kind = AdapterPenalty if part.trains == "adapter" else FullPenalty
                penalty = kind(module, self._capability, vector)
            learner = SupervisedLearner(
                self._policy, part, seed=self._seed, demos=self._demos, penalty=penalty
            )
            metrics = self._fit(learner, Path(folder).parent / UNFINISHED)
            if part.trains == "adapter":
                metadata["merge_drift"] = _merge_in(module)
        seen = {demo.cell.init_state for demo in self._demos} if part.steps else set()
        if part.steps and self._capability.vector and self._capability.weight:
            seen |= set(read_manifest(self._capability.vector).init_states)
        for began in (part.init, self._part.checkpoint):
            seen |= set() if began is None else set(states_seen(began))
        metadata[STATES] = sorted(seen)
        save_checkpoint(folder, "start", state_tensors(self._policy.module), metadata)
        shutil.rmtree(Path(folder).parent / UNFINISHED, ignore_errors=True)
        self._started = True
        return metrics

    def _fit(self, learner: SupervisedLearner, states: Path) -> dict[str, float]:
        """Train to the end, from the newest state in the folder `states` that is intact, and leave one there now and
        then."""
        total, saved, cost, told = self._supervised.steps, time.monotonic(), 0.0, False

        def on_step(step: int, metrics: dict[str, float]) -> None:
            nonlocal saved, cost, told
            if step % PROGRESS_EVERY == 0 or step == total:
                ray.get(self._monitor.report.remote("supervised", step, total, metrics))
            if step < total and time.monotonic() - saved > max(SAVE_EVERY_S, cost / SAVING_SHARE):
                began = time.monotonic()
                reason = _save(learner, states)
                if reason and not told:  # once: it will be the same half a minute later
                    ray.get(self._monitor.tell.remote({"event": "state_not_saved", "reason": reason}))
                    told = True
                saved = time.monotonic()
                cost = saved - began

        if states.is_dir() and (newest := newest_valid(states)) is not None:
            learner.load_state(load_checkpoint(newest)[0])
            log.info("supervised training goes on after step %d", learner.steps_done)
        return learner.fit(on_step=on_step)

    def load_start(self, checkpoint: str, demos: Sequence[Trajectory]) -> None:
        """Take up a saved start instead of training one."""
        self._fill(checkpoint)
        self._demos = list(demos)
        self._started = True

    def _vector(self) -> Vector | None:
        """What training is kept apart from, under the names of this policy's weights; None where nothing is."""
        part = self._capability
        return Vector(part.vector, names=weight_names(self._part)) if part.vector and part.weight else None

    def _fill(self, checkpoint: str) -> None:
        tensors, _ = load_checkpoint(checkpoint)
        self._policy.load(WeightSnapshot(version=0, content_hash="", tensors=tensors))

    def attach(self, base_hash: str) -> None:
        """Freeze the start and attach the adapter that learns. Raises BlankLearnerError where there is no start."""
        if not self._started:
            raise BlankLearnerError("attach() comes after supervise() or load_start()")
        self._learner = PreferenceLearner(
            self._policy,
            adapter=self._adapter,
            preference=self._preference,
            guard=self._guard,
            base_hash=base_hash,
            seed=self._seed,
            capability=self._capability,
            # The element-wise penalty is of whole weights: it is the supervised start's, and no round follows it.
            vector=self._vector() if self._capability.penalty == "cosine" else None,
        )

    def update(
        self,
        pairs: Sequence[PreferencePair],
        successes: Sequence[Trajectory],
        *,
        states: str | None = None,
        round_index: int = 0,
    ) -> tuple[UpdateReport, AdapterWeights]:
        """One learning round. A tripped update leaves the adapter as it was. What was learned is on disk, in the folder
        `states` if one is given, before this returns: see `load_state`."""
        learner = self._attached()
        total = self._preference.steps

        def on_step(step: int, metrics: dict[str, float]) -> None:
            if step % PROGRESS_EVERY == 0 or step == total:
                ray.get(self._monitor.report.remote("update", step, total, metrics))

        report = learner.update(pairs, successes, self._demos, on_step=on_step)
        if states is not None:
            said = {"stopped": report.stopped, "reason": report.reason, "steps": report.steps}
            said |= {"value": report.value, "metrics": dict(report.metrics)}
            metadata = {"round": round_index, "report": said}
            save_checkpoint(Path(states), state_name(round_index), learner.state(), metadata)
            keep_newest(states, KEPT_STATES)
        return report, learner.adapter()

    def load_state(self, path: str) -> None:
        """Continue exactly where an update ended: adapter, optimizer, random generator, number of updates."""
        self._attached().load_state(load_checkpoint(path)[0])

    def adapter(self) -> AdapterWeights:
        """A copy of the adapter as it is."""
        return self._attached().adapter()

    def restore(self, adapter: AdapterWeights | None) -> None:
        """Go back to the adapter of the last good version (None: the start), with a fresh optimizer."""
        self._attached().restore(adapter)

    def _attached(self) -> PreferenceLearner:
        if self._learner is None:
            raise BlankLearnerError("attach() comes before update() and restore()")
        return self._learner


def _merge_in(module: torch.nn.Module) -> float:
    """`adapters.merge_in`; FloatingPointError, of which a person is told, where the adapter does not merge."""
    try:
        return adapters.merge_in(module)
    except ValueError as error:
        raise FloatingPointError(
            f"the adapter of the supervised start does not merge ({error}); lower supervised.lr"
        ) from error


def _save(learner: SupervisedLearner, states: Path) -> str:
    """Leave a state to go on from, where there is room for one: training itself does not need it. Why there is none,
    and what follows; empty when there is."""
    follows = "should the learner die, the supervised start begins again from what was saved before"
    need, memory = learner.state_bytes, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory / 2:
        return (
            f"the state takes {need / 2**30:.1f} GiB, {memory / 2**30:.1f} are free, and twice as much is wanted; "
            f"{follows}"
        )
    try:
        save_checkpoint(states, f"s{learner.steps_done:08d}", learner.state(), {"step": learner.steps_done})
        keep_newest(states, 1)
    except OSError as error:
        return f"{error}; {follows}"
    return ""


LearnerActor = ray.remote(Learner)
"""A restarted one is blank: see `actors.learning.take_up`."""
