"""The stages of a round. Each is handed its own part of the recipe, drives the actors, and records what happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.canary import judge
from actors.cells import canary_cells
from actors.crew import Crew
from actors.learning import Origin, Version, call_learner
from actors.pulse import Pulse
from actors.run_folder import RunFolder, progress_bar
from configs.preference import GuardPart
from configs.world import EnvironmentPart, TaskPart
from envs.assets import ResolvedAssets
from envs.fingerprint import differences, read_fingerprint, require_same_world, stack_fingerprint
from trajectories.codec import CodecError, load_trajectory
from trajectories.journal import read_journal
from trajectories.records import Cell

log = logging.getLogger(__name__)

RESTART_DEADLINE_S = 60.0
"""How long the end of a sweep waits for policy actors that are restarting."""


@dataclass(slots=True)
class Outcomes:
    """What a sweep over cells gave."""

    version: int
    success: dict[Cell, bool] = field(default_factory=dict)
    """Of every cell that ended without a fault."""
    faulted: set[Cell] = field(default_factory=set)
    env_steps: int = 0
    wall_s: float = 0.0

    def enter(self, record: Mapping[str, Any]) -> None:
        """Count one episode, given as its record."""
        if record["outcome"] == "fault":
            self.faulted.add(cell_of(record))
        else:
            self.success[cell_of(record)] = record["success"]

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
    """Drive cells with a version; with `keep`, every trajectory goes to the store before it is counted.

    In a run that is resumed, the cells that are on record for this phase, round and version are not driven again.
    """
    out = Outcomes(version=version)
    for record in folder.driven(phase, round_index):
        if record["policy_version"] == version:
            out.enter(record)
    missing = [cell for cell in cells if cell not in out.success and cell not in out.faulted]
    if len(missing) < len(cells):
        log.info(
            "%s v%d: %d of %d episodes are on record", phase, version, len(cells) - len(missing), len(cells)
        )
    started = time.monotonic()

    def launch(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
        return actor.rollout.options(num_returns=2).remote(
            cell, policies=crew.policies, version=version, temperature=temperature
        )

    def store(record: Mapping[str, Any], trajectory: ray.ObjectRef) -> None:
        if record["policy_hash"]:  # an episode that failed before its first decision has nothing to keep
            ray.get(crew.store.add.remote(trajectory))

    with progress_bar(f"{phase} v{version}", len(cells)) as bar:
        bar.update(len(cells) - len(missing))
        pulse = Pulse(crew, folder, version)
        for record, _ in crew.fleet.run(missing, launch, keep=store if keep else None, meanwhile=pulse.due):
            folder.episode(phase, round_index, record)
            out.env_steps += record["env_steps"]
            out.enter(record)
            if record["outcome"] == "fault":
                folder.event({"event": "quarantined", "cell": cell_of(record).key, "reason": record["fault"]})
            bar.advance(f"success {100 * out.rate:.0f} %")
            pulse.count(record["env_steps"])
        pulse.tell()
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
        cell_of(episode): {
            key: value for key, value in episode.items() if key not in ("phase", "round", "time")
        }
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
        out.enter(found[cell])
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


def record_stack(folder: RunFolder, stack: dict[str, Any], *, start: str | None) -> None:
    """Write down the stack that a run is on, or say in what it differs from that of the run that it goes on with, or
    whose start it takes up.

    Raises FingerprintError when a run is resumed in another world.
    """
    began: Mapping[str, Any] = stack
    if folder.resumed and (folder.path / "fingerprint.json").is_file():
        began = read_fingerprint(folder.path)
        require_same_world(began, stack, what=f"{folder.path} cannot be resumed here")
    else:
        folder.write_json("fingerprint.json", stack)
        if start is not None:
            began = read_fingerprint(Path(start))
    if unlike := differences(began, stack):
        folder.event({"event": "stack_differs", "start": start, "reason": "; ".join(unlike)})


def trial(
    crew: Crew,
    folder: RunFolder,
    origin: Origin,
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
    if not verdict.promoted:
        ray.get(
            crew.store.retire_version.remote(candidate.version)
        )  # before the event: nobody would do it after
    folder.event({"event": kind, "round": round_index, "version": candidate.version, **verdict.describe()})
    if verdict.promoted:
        return candidate
    call_learner(crew, folder, origin, good, "restore", good.adapter)
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


def cell_of(record: Mapping[str, Any]) -> Cell:
    """The cell that an episode record is of."""
    return Cell(**{key: record[key] for key in ("suite", "task_id", "init_state", "seed")})
