"""The learner's stages: begin an update, end it, publish what it gave; and take the learner up again after a death.

What an update learned is durable before anyone hears of it: the learner saves its state, the version's adapter is
saved, the version is published, then tried. So a learner that died, or a run that is resumed, goes on from the last of
these that is on disk, and does again only what is not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.crew import Crew
from actors.learner import BlankLearnerError, state_name
from actors.parameter_server import version_name
from actors.pulse import Pulse
from actors.run_folder import RunFolder, progress_bar
from learners.checkpoint import CheckpointError, load_checkpoint, newest_valid, read_metadata, save_checkpoint
from learners.report import UpdateReport
from policies.weights.adapter_files import adapter_from_tensors, adapter_tensors
from policies.weights.merging import MergeError
from trajectories.records import AdapterWeights, Trajectory

log = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""A learner whose process dies more often than this in one piece of work ends the run: it would die again."""


GONE = (RayActorError, BlankLearnerError)
"""What a call of the learner raises when its process has died: at once, or long since."""


class LearnerLostError(RuntimeError):
    """The learner's process keeps dying."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """Published weights that the fleet can be sent to."""

    version: int
    content_hash: str
    adapter: AdapterWeights | None
    """What the learner goes back to when a later candidate fails; None is the supervised start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a blank learner begins from."""

    checkpoint: Path
    demonstrations: tuple[Trajectory, ...]
    content_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """An update under way."""

    round_index: int
    result: ray.ObjectRef | None
    """Of (report, adapter); None when it was learned, and saved, before."""


def take_up(crew: Crew, folder: RunFolder, origin: Origin, good: Version) -> None:
    """Bring a blank learner to where the run is: the start, the state after the last update that is intact, and from
    there back to `good` unless that state is what became of it.

    Raises CheckpointError when the start is damaged.
    """
    demos = list(origin.demonstrations)
    ray.get(crew.learner.load_start.remote(str(origin.checkpoint), demos))
    ray.get(crew.learner.attach.remote(origin.content_hash))
    state = newest_valid(folder.learner_states) if folder.learner_states.is_dir() else None
    if state is None:
        if good.adapter is not None:
            ray.get(crew.learner.restore.remote(good.adapter))
        return
    ray.get(crew.learner.load_state.remote(str(state)))
    fate = folder.fate(int(read_metadata(state)["round"]))
    if fate is None or fate["event"] in ("tripped", "skipped"):
        return
    if fate["event"] in ("rolled_back", "refused") or fate["version"] != good.version:
        ray.get(crew.learner.restore.remote(good.adapter))


def begin(crew: Crew, folder: RunFolder, origin: Origin, good: Version, *, trained: bool) -> None:
    """Make the learner ready for a run's rounds: the one that has just trained the start, or a blank one."""
    try:
        if trained:
            ray.get(crew.learner.attach.remote(origin.content_hash))
        else:
            take_up(crew, folder, origin, good)
    except GONE as error:
        revive(crew, folder, origin, good, error)


def call_learner(
    crew: Crew, folder: RunFolder, origin: Origin, good: Version, method: str, *args: object
) -> Any:
    """Call a method of the learner, which is taken up again at `good` when its process has died."""
    try:
        return ray.get(getattr(crew.learner, method).remote(*args))
    except GONE as error:
        revive(crew, folder, origin, good, error)
        return ray.get(getattr(crew.learner, method).remote(*args))


def revive(crew: Crew, folder: RunFolder, origin: Origin, good: Version, error: Exception) -> None:
    """Note that the learner's process died, and take up the one that Ray has started in its place. `error` told so: one
    of GONE.

    Raises the error itself when it is somebody else's death that the learner tells of, and LearnerLostError when the
    learner dies again MAX_RESTARTS times while it is taken up.
    """
    for _ in range(MAX_RESTARTS):
        if isinstance(error, RayTaskError) and not isinstance(error, BlankLearnerError):
            raise error
        folder.event({"event": "actor_restarted", "kind": "learner", "reason": "its process died"})
        try:
            ray.get(crew.learner.__ray_ready__.options(max_task_retries=-1).remote())
            return take_up(crew, folder, origin, good)
        except GONE as again:
            error = again
    raise _lost()


def _lost() -> LearnerLostError:
    return LearnerLostError(
        f"the learner's process died more than {MAX_RESTARTS} times in one piece of work, out of memory in all "
        "likelihood; lower preference.micro_batch or give it a larger node, and resume the run"
    )


def follow(crew: Crew, folder: RunFolder, ref: ray.ObjectRef, *, label: str, total: int, **tags: Any) -> Any:
    """Wait for long work in another actor, showing and recording what it reports."""
    done: list[ray.ObjectRef] = []
    pulse = Pulse(crew, folder, tags.get("version", 0))
    with progress_bar(label, total) as bar:
        while not done:
            done, _ = ray.wait([ref], timeout=1.0)
            crew.tend()
            pulse.due()
            (_, step, _, metrics), lines = ray.get(crew.monitor.pop.remote())
            for line in lines:
                folder.metric(line.pop("stage"), **tags, **line)
            if lines:
                bar.update(step, f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")
    return ray.get(ref)


def supervise(crew: Crew, folder: RunFolder, demos: list[Trajectory], *, steps: int) -> None:
    """Train the supervised start, and go on from the state that was saved last when the learner's process dies.

    Raises LearnerLostError when it dies more than MAX_RESTARTS times.
    """
    for _ in range(MAX_RESTARTS + 1):
        training = crew.learner.supervise.remote(demos, folder=str(folder.checkpoints))
        try:
            return follow(crew, folder, training, label="supervised", total=steps)
        except RayActorError as error:
            if isinstance(error, RayTaskError):
                raise
            folder.event({"event": "actor_restarted", "kind": "learner", "reason": "its process died"})
            ray.get(crew.learner.__ray_ready__.options(max_task_retries=-1).remote())
    raise _lost()


def begin_update(crew: Crew, folder: RunFolder, version: int, round_index: int) -> Update:
    """Mine pairs as of `version` and start an update on them, unless what it learned is on disk already."""
    if saved_report(folder, round_index) is not None:
        return Update(round_index=round_index, result=None)
    pairs, successes, counts = crew.store.mine.options(num_returns=3).remote(version)
    folder.metric("pairs", round=round_index, version=version, **ray.get(counts).summary())
    result = crew.learner.update.options(num_returns=1).remote(
        pairs, successes, states=str(folder.learner_states), round_index=round_index
    )
    return Update(round_index=round_index, result=result)


def end_update(
    crew: Crew, folder: RunFolder, origin: Origin, update: Update, *, good: Version, steps: int
) -> Version | None:
    """Wait for an update and publish what it learned as a candidate; None when it tripped, had nothing to learn, or
    learned an adapter that does not merge, from which the learner goes back to `good`.

    When the learner's process dies, the round is learned again from the state after the last one.
    """
    round_index = update.round_index
    tags = {"round": round_index, "version": good.version}
    for _ in range(MAX_RESTARTS + 1):
        try:
            if update.result is None:
                report = saved_report(folder, round_index)
                adapter = call_learner(crew, folder, origin, good, "adapter")
            else:
                report, adapter = follow(crew, folder, update.result, label="learn", total=steps, **tags)
            break
        except GONE as error:
            revive(crew, folder, origin, good, error)
            update = begin_update(crew, folder, good.version, round_index)
    else:
        raise _lost()
    assert report is not None  # it is on disk, or was just returned
    folder.metric("learned", **tags, **report.summary())
    if report.stopped:
        folder.event({"event": report.stopped, **tags, "reason": report.reason})
        return None
    before = published_before(crew, folder, round_index) if update.result is None else None
    try:
        return before or publish(crew, folder, adapter, keep=[good.version], round_index=round_index)
    except MergeError as error:
        folder.event({"event": "refused", **tags, "reason": str(error)})
    call_learner(crew, folder, origin, good, "restore", good.adapter)
    return None


def saved_report(folder: RunFolder, round_index: int) -> UpdateReport | None:
    """What the update of a round said, where the learner's state after it is on disk and intact."""
    try:
        metadata = read_metadata(folder.learner_states / state_name(round_index))
    except CheckpointError:
        return None
    return UpdateReport(**metadata["report"], history=())


def publish(
    crew: Crew,
    folder: RunFolder,
    adapter: AdapterWeights | None,
    *,
    keep: tuple[int, ...] | list[int] = (),
    round_index: int = -1,
) -> Version:
    """Publish weights under a new version, keep the adapter on disk, and tell the store the hash to expect."""
    version, content_hash = crew.server.publish(adapter, keep=keep)
    if adapter is not None:
        tensors, metadata = adapter_tensors(adapter)
        metadata |= {"hash": content_hash, "round": round_index}
        save_checkpoint(folder.checkpoints, version_name(version), tensors, metadata)
    return announce(crew, folder, Version(version=version, content_hash=content_hash, adapter=adapter))


def announce(crew: Crew, folder: RunFolder, version: Version) -> Version:
    """Tell the store which hash a version has, and put it on record."""
    ray.get(crew.store.register_version.remote(version.version, version.content_hash))
    drift = float(f"{crew.server.drift(version.version):.3g}")
    folder.metric("published", version=version.version, hash=version.content_hash, merge_drift=drift)
    return version


def published_before(crew: Crew, folder: RunFolder, round_index: int) -> Version | None:
    """The candidate of a round whose adapter an earlier process of this run saved; None when there is none intact."""
    if not folder.resumed:
        return None
    for path in sorted(folder.checkpoints.glob("v*"), reverse=True):
        try:
            if read_metadata(path).get("round") == round_index:
                crew.server.rise_above(int(path.name[1:]))
                return announce(crew, folder, saved_version(folder, int(path.name[1:])))
        except CheckpointError as error:
            log.warning("skipped %s: %s", path.name, error)
    return None


def saved_version(folder: RunFolder, version: int) -> Version:
    """A version as it was published. Raises CheckpointError when its adapter is damaged."""
    tensors, metadata = load_checkpoint(folder.checkpoints / version_name(version))
    adapter = adapter_from_tensors(tensors, metadata)
    return Version(version=version, content_hash=metadata["hash"], adapter=adapter)


def last_good(folder: RunFolder, start: Version) -> tuple[Version, int]:
    """The last promoted version that is intact, else the start; and the first round that is not settled.

    A damaged one is put on record as passed over.
    """
    fates: list[dict[str, Any]] = []
    while (fate := folder.fate(len(fates))) is not None:
        fates.append(fate)
    for version in (fate["version"] for fate in reversed(fates) if fate["event"] == "promoted"):
        try:
            return saved_version(folder, version), len(fates)
        except CheckpointError as error:
            folder.event({"event": "checkpoint_skipped", "version": version, "reason": str(error)})
    return start, len(fates)
