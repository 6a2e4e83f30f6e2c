"""The stages of a round. Each is handed its own part of the recipe, drives the actors, and records what happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.canary import judge
from actors.cells import canary_cells
from actors.parameter_server import version_name
from actors.placement import Crew
from actors.run_folder import RunFolder, progress_bar
from configs.schema import GuardPart
from configs.world import EnvironmentPart, TaskPart
from envs.assets import ResolvedAssets
from envs.fingerprint import stack_fingerprint
from learners.checkpoint import save_checkpoint
from policies.weights.adapter_files import adapter_tensors
from trajectories.codec import CodecError, load_trajectory
from trajectories.journal import read_journal
from trajectories.records import AdapterWeights, Cell

log = logging.getLogger(__name__)

RESTART_DEADLINE_S = 60.0
"""How long the end of a sweep waits for policy actors that are restarting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """Published weights that the fleet can be sent to."""

    version: int
    content_hash: str
    adapter: AdapterWeights | None
    """What the learner goes back to when a later candidate fails; None is the supervised start."""


@dataclass(slots=True)
class Outcomes:
    """What a sweep over cells gave."""

    version: int
    success: dict[Cell, bool] = field(default_factory=dict)
    """Of every cell that ended without a fault."""
    faulted: set[Cell] = field(default_factory=set)
    env_steps: int = 0
    wall_s: float = 0.0

    @property
    def rate(self) -> float:
        return sum(self.success.values()) / max(len(self.success), 1)


def drive(
    crew: Crew,
    folder: RunFolder,
    cells: Sequence[Cell],
    *,
    version: int,
    temperature: float,
    phase: str,
    round_index: int,
    keep: bool,
) -> Outcomes:
    """Drive cells with a version; with `keep`, every trajectory goes to the store before it is counted."""
    out = Outcomes(version=version)
    started = time.monotonic()

    def launch(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
        return actor.rollout.options(num_returns=2).remote(
            cell, policies=crew.policies, version=version, temperature=temperature
        )

    with progress_bar(f"{phase} v{version}", len(cells)) as bar:
        for record, trajectory in crew.fleet.run(cells, launch):
            if (
                keep and record["policy_hash"]
            ):  # an episode that failed before its first decision has nothing to keep
                ray.get(crew.store.add.remote(trajectory))
            folder.episode(phase, round_index, record)
            out.env_steps += record["env_steps"]
            if record["outcome"] == "fault":
                out.faulted.add(cell_of(record))
                folder.event({"event": "quarantined", "cell": cell_of(record).key, "reason": record["fault"]})
            else:
                out.success[cell_of(record)] = record["success"]
            bar.advance(f"success {100 * out.rate:.0f} %")
    out.wall_s = time.monotonic() - started
    folder.metric(
        phase,
        round=round_index,
        version=version,
        episodes=len(out.success),
        successes=sum(out.success.values()),
        faults=len(out.faulted),
        env_steps=out.env_steps,
        env_steps_per_s=round(out.env_steps / out.wall_s, 1),
        **serving_stats(crew, folder),
    )
    return out


def take_recorded(
    crew: Crew,
    folder: RunFolder,
    source: Path,
    cells: Sequence[Cell],
    *,
    version: Version,
    phase: str,
    round_index: int,
    keep: bool,
) -> Outcomes | None:
    """What another run's `phase` gave on these cells under these very weights, entered into this run's episodes and,
    with `keep`, its store. None when one of the cells is not recorded there."""
    found = {
        cell_of(episode): {key: value for key, value in episode.items() if key not in ("phase", "round")}
        for episode in read_journal(source / "episodes.jsonl")
        if episode["phase"] == phase and episode["policy_hash"] == version.content_hash
    }
    if not all(cell in found for cell in cells):
        return None
    stored = source / "trajectories"
    try:
        kept = [
            load_trajectory(stored / f"{found[cell]['trajectory_id']}.trajectory") for cell in cells if keep
        ]
    except (CodecError, OSError) as error:
        log.warning("%s: its %s is driven again: %s", source, phase, error)
        return None
    ray.get([crew.store.add.remote(trajectory) for trajectory in kept])
    out = Outcomes(version=version.version)
    for cell in cells:
        folder.episode(phase, round_index, found[cell])
        if found[cell]["outcome"] == "fault":
            out.faulted.add(cell)
        else:
            out.success[cell] = found[cell]["success"]
    log.info("%s: %d episodes are those that %s drove with these weights", phase, len(cells), source)
    return out


def take_fingerprint(
    crew: Crew, tasks: TaskPart, *, assets: ResolvedAssets, environment: EnvironmentPart
) -> dict[str, Any]:
    """The stack that the rollout actors run on, with the first images of every task as they draw them."""
    cells = [Cell(suite=tasks.suite, task_id=task, init_state=0, seed=0) for task in tasks.task_ids]
    frames = [
        record
        for record, _ in crew.fleet.run(
            cells, lambda actor, cell: actor.first_frame.options(num_returns=2).remote(cell)
        )
    ]
    return stack_fingerprint(
        assets=assets,
        environment=environment,
        first_frames={frame["task"]: frame["hash"] for frame in frames},
        renderer=", ".join(sorted({frame["renderer"] for frame in frames})),
    )


def follow(crew: Crew, folder: RunFolder, ref: ray.ObjectRef, *, label: str, total: int, **tags: Any) -> Any:
    """Wait for long work in another actor, showing and recording what it reports."""
    done: list[ray.ObjectRef] = []
    with progress_bar(label, total) as bar:
        while not done:
            done, _ = ray.wait([ref], timeout=1.0)
            (_, step, _, metrics), lines = ray.get(crew.monitor.pop.remote())
            for line in lines:
                folder.metric(line.pop("stage"), **tags, **line)
            if lines:
                bar.update(step, f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")
    return ray.get(ref)


def begin_update(crew: Crew, folder: RunFolder, version: int, round_index: int) -> ray.ObjectRef:
    """Mine pairs as of `version` and start an update on them; returns the ref of (report, adapter)."""
    pairs, successes, counts = crew.store.mine.options(num_returns=3).remote(version)
    folder.metric("pairs", round=round_index, version=version, **ray.get(counts).summary())
    return crew.learner.update.options(num_returns=1).remote(pairs, successes)


def end_update(
    crew: Crew,
    folder: RunFolder,
    update: ray.ObjectRef,
    *,
    good: Version,
    steps: int,
    round_index: int,
) -> Version | None:
    """Wait for an update and publish what it learned as a candidate; None when it tripped or had nothing to learn."""
    report, adapter = follow(
        crew, folder, update, label="learn", total=steps, round=round_index, version=good.version
    )
    folder.metric("learned", round=round_index, version=good.version, **report.summary())
    if report.stopped:
        folder.event(
            {"event": report.stopped, "round": round_index, "version": good.version, "reason": report.reason}
        )
        return None
    return publish(crew, folder, adapter, keep=[good.version])


def publish(
    crew: Crew, folder: RunFolder, adapter: AdapterWeights | None, *, keep: Sequence[int] = ()
) -> Version:
    """Publish weights under a new version, keep the adapter on disk, and tell the store the hash to expect."""
    version, content_hash = crew.server.publish(adapter, keep=keep)
    if adapter is not None:
        tensors, metadata = adapter_tensors(adapter)
        save_checkpoint(
            folder.checkpoints, version_name(version), tensors, {**metadata, "hash": content_hash}
        )
    ray.get(crew.store.register_version.remote(version, content_hash))
    drift = float(f"{crew.server.drift(version):.3g}")
    folder.metric("published", version=version, hash=content_hash, merge_drift=drift)
    return Version(version=version, content_hash=content_hash, adapter=adapter)


def trial(
    crew: Crew,
    folder: RunFolder,
    part: GuardPart,
    *,
    good: Version,
    candidate: Version,
    driven: Outcomes,
    temperature: float,
    round_index: int,
) -> Version:
    """Let the candidate drive the canary cells, then promote it or roll the learner back to `good`.

    Where `good` was promoted after those cells were driven (the overlapped schedule), it drives them too.
    """
    cells = canary_cells(list(driven.success), part)

    def sweep(version: int) -> Outcomes:
        return drive(
            crew,
            folder,
            cells,
            version=version,
            temperature=temperature,
            phase="canary",
            round_index=round_index,
            keep=True,
        )

    before = driven if driven.version == good.version else sweep(good.version)
    tried = sweep(candidate.version)
    # A candidate that makes episodes fault, or takes its actors down, must not pass for the few that it finishes.
    verdict = judge(before.success, dict.fromkeys(cells, False) | tried.success, part)
    kind = "promoted" if verdict.promoted else "rolled_back"
    folder.event({"event": kind, "round": round_index, "version": candidate.version, **verdict.describe()})
    if verdict.promoted:
        return candidate
    ray.get([crew.learner.restore.remote(good.adapter), crew.store.retire_version.remote(candidate.version)])
    return good


def serving_stats(crew: Crew, folder: RunFolder) -> dict[str, float]:
    """How full and how slow the policy actors' batches were since the last call; none when there were no batches.

    Policy actors that restarted since are put down as events. One that is restarting just now is waited for.
    """
    asked = [policy.pop_stats.options(max_task_retries=-1).remote() for policy in crew.policies]
    ray.wait(asked, num_returns=len(asked), timeout=RESTART_DEADLINE_S)
    stats = []
    for actor, ref in enumerate(asked):
        back = bool(ray.wait([ref], timeout=0)[0])
        stats += [ray.get(ref)] if back else []
        if not back or stats[-1]["restarted"]:
            reason = "its process died" if back else f"it did not answer for {RESTART_DEADLINE_S:.0f} s"
            folder.event({"event": "actor_restarted", "kind": "policy", "actor": actor, "reason": reason})
    batches = sum(s["batches"] for s in stats)
    decisions = sum(s["decisions"] for s in stats)
    busy = sum(s["busy_s"] for s in stats)
    if not batches:
        return {}
    return {"batch_fill": round(decisions / batches, 2), "act_ms": round(1000 * busy / batches, 1)}


def cell_of(record: dict[str, Any]) -> Cell:
    """The cell that an episode record is of."""
    return Cell(**{key: record[key] for key in ("suite", "task_id", "init_state", "seed")})
