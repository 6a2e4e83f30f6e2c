"""The run folder: everything a run leaves behind, and what a person sees while it works."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from actors.trackers import Trackers, check_tracking, start_trackers
from configs.loader import RecipeError, dump_recipe
from configs.operation import PagePart
from configs.schema import Recipe
from dashboard.report import write_report
from dashboard.server import Dashboard
from preferences.lock import FolderLock
from trajectories.journal import Journal, read_journal

log = logging.getLogger(__name__)

FATES = ("promoted", "rolled_back", "tripped", "refused", "skipped")
"""Events that settle a round."""
CAPABILITY = "capability.json"
"""What the capability vector of a run says of itself (`learners.capability`)."""
LOCK = "run.lock"
"""Held by the process that a run, or an evaluation of it, goes on in."""
OWNER_ENDS_S = 10.0
"""How long the process that a run is resumed after may take to end."""
OWN_RUN = "make it writable for this user, or work on a copy"
"""What to do about a run's folder that cannot be written; see `check_writable`."""
PLAIN_EVERY_S = 10.0
"""Seconds between progress lines when the output is not a terminal (`ray job submit`, CI)."""


class RunFolder:
    """`<root>/<name>/`: recipe.yaml, fingerprint.json, metrics.jsonl, episodes.jsonl, events.jsonl, checkpoints/ (the
    start and every version's adapter), supervised/ (the start's training, until it has ended), learner/ (its state
    after the last updates), demonstrations/, tensorboard/, result.json, run.lock; the preference store's trajectories/,
    store.jsonl, pairs.jsonl, store.lock and, where a file was found damaged, quarantine/; the report's report.md,
    plots/ and videos/; where there was a capability vector, its capability.json."""

    def __init__(self, path: Path, lock: FolderLock | None = None, *, resumed: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        """Whether an earlier process began this run: what it left durable is taken up, not done again."""
        self._lock = lock
        self._metrics = Journal(path / "metrics.jsonl")
        self._episodes = Journal(path / "episodes.jsonl")
        self._events = Journal(path / "events.jsonl")
        self._trackers: Trackers | None = None

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """Make the folder for a new run. An earlier run of the same name is moved aside, never overwritten.

        Raises FolderLockedError when that run still goes on, OSError when the folder cannot be written, and RecipeError
        for a tracker that cannot be logged to.
        """
        check_tracking(recipe.tracking)
        root = Path(recipe.root).resolve()
        path = root / recipe.name
        if path.exists():
            FolderLock(path / LOCK).release()
            suffixes = [p.name.rsplit("~", 1)[1] for p in root.glob(f"{recipe.name}~*")]
            taken = [int(suffix) for suffix in suffixes if suffix.isdecimal()]
            aside = root / f"{recipe.name}~{max(taken, default=0) + 1}"
            path.rename(aside)
            log.warning("%s exists; the earlier run is now %s", path, aside)
        (path / "demonstrations").mkdir(parents=True)
        lock = FolderLock(path / LOCK)
        dump_recipe(recipe, path / "recipe.yaml")
        folder = cls(path, lock)
        folder.track(recipe)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run's folder, to add to. Raises FolderLockedError when the run still goes on."""
        return cls(path, FolderLock(path / LOCK))

    @classmethod
    def resume(cls, path: Path, recipe: Recipe) -> RunFolder:
        """The folder of a run that did not end, to go on in. Raises FolderLockedError when it still goes on."""
        folder = cls(path, FolderLock(path / LOCK, wait_s=OWNER_ENDS_S), resumed=True)
        folder.track(recipe)
        return folder

    def track(self, recipe: Recipe) -> None:
        """Send what is recorded from now on to the recipe's trackers too; what is recorded already counts."""
        episodes, events = (read_journal(self.path / f"{name}.jsonl") for name in ("episodes", "events"))
        self._trackers = start_trackers(recipe, self.path, episodes=episodes, events=events)

    def keep_manifest(self, vector: str) -> None:
        """A copy of what a capability vector says of itself, for the report."""
        shutil.copyfile(Path(vector) / CAPABILITY, self.path / CAPABILITY)

    def release(self) -> None:
        """Let others have the folder, and end its tracking."""
        if self._trackers is not None:
            self._trackers.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def demonstrations(self) -> Path:
        return self.path / "demonstrations"

    @property
    def learner_states(self) -> Path:
        return self.path / "learner"

    def driven(self, phase: str, round_index: int) -> list[dict[str, Any]]:
        """The episodes of a phase and round that are on record from before this process; none in a new run."""
        if not self.resumed:
            return []
        lines = read_journal(self.path / "episodes.jsonl")
        return [line for line in lines if (line["phase"], line["round"]) == (phase, round_index)]

    def fate(self, round_index: int) -> dict[str, Any] | None:
        """The event that settled a round; None when it is not settled."""
        settled = [e for e in read_journal(self.path / "events.jsonl") if e["event"] in FATES]
        return next((e for e in settled if e["round"] == round_index), None)

    def published(self) -> dict[int, str]:
        """Version -> hash, of every version on record."""
        lines = read_journal(self.path / "metrics.jsonl")
        return {line["version"]: line["hash"] for line in lines if line["stage"] == "published"}

    def rollout_throughput(self) -> float:
        """Environment steps per second over all rollouts, canaries and evaluations so far."""
        lines = [m for m in read_journal(self.path / "metrics.jsonl") if "env_steps" in m]
        seconds = sum(m["env_steps"] / m["env_steps_per_s"] for m in lines if m["env_steps_per_s"])
        return round(sum(m["env_steps"] for m in lines) / seconds, 1) if seconds else 0.0

    def metric(self, stage: str, **numbers: Any) -> None:
        line = {"time": round(time.time(), 3), "stage": stage, **numbers}
        self._metrics.append(line)
        if self._trackers is not None:
            self._trackers.metric(line)

    def episode(self, phase: str, round_index: int, record: dict[str, Any]) -> None:
        line = {"phase": phase, "round": round_index, "time": round(time.time(), 3), **record}
        self._episodes.append(line)
        if self._trackers is not None:
            self._trackers.episode(line)

    def event(self, event: dict[str, Any]) -> None:
        """Record something a person should know, and say it."""
        line = {"time": round(time.time(), 3), **event}
        self._events.append(line)
        if self._trackers is not None:
            self._trackers.event(line)
        log.warning("%s", " ".join(f"{key}={value}" for key, value in event.items()))

    def write_json(self, name: str, value: Any) -> str:
        """Write one JSON value on one line; returns the line."""
        line = json.dumps(value)
        (self.path / name).write_text(line + "\n")
        return line


class Bar:
    """One progress bar; on a terminal it moves, elsewhere it prints a line every few seconds."""

    def __init__(self, label: str, total: int, progress: Progress | None, task: TaskID | None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._progress, self._task = progress, task
        self._said = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        self._done = done
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said >= PLAIN_EVERY_S or done >= self._total:
            self._said = time.monotonic()
            log.info("%s %d/%d %s", self._label, done, self._total, note)

    def advance(self, note: str = "") -> None:
        self.update(self._done + 1, note)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Bar]:
    """A progress bar for `total` units of work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(label, total, None, None)
        return
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(label, total, progress, progress.add_task(label, total=total, note=""))


def check_writable(folder: Path, *, remedy: str = "set root to a folder that can be written") -> None:
    """Make a folder, unless it is there. Raises RecipeError when that fails, or nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written ({error.strerror or error}); {remedy}") from error


def report_early_end(run: Path) -> None:
    """Write a report of what there is. Where even that fails (a full disk), say so: the first error is told."""
    try:
        log.warning("the run ended early; what it did until then is in %s", write_report(run))
    except (OSError, ValueError) as error:
        log.warning("the run ended early, and its report could not be written: %s", error)


def serve_page(part: PagePart, folder: RunFolder) -> Dashboard | None:
    """The run's live page, from a thread of this process; says where it is. Raises DashboardError when it cannot be
    served as the recipe asks."""
    if not part.serve:
        return None
    page = Dashboard(folder.path, host=part.host, port=part.port)
    page.start()
    log.info("watch the run at %s", page.url)
    return page
