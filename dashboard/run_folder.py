"""Reads what a run wrote: recipe, fingerprint, result and journals. Nothing here is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loader import load_recipe
from configs.schema import Recipe
from trajectories.journal import read_journal
from trajectories.records import Cell, Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One line of `episodes.jsonl`: an episode's cell, its outcome and the weights that drove it."""

    phase: str
    """`demonstration`, `rollout`, `canary` or `evaluation`."""
    round: int
    """Round it belongs to; -1 where there is none."""
    cell: Cell
    outcome: Outcome
    fault: str
    """Why, when outcome is `fault`."""
    policy_version: int
    trajectory_id: str

    @property
    def task(self) -> tuple[str, int]:
        return self.cell.suite, self.cell.task_id

    @property
    def success(self) -> bool:
        return self.outcome == "success"

    @property
    def faulty(self) -> bool:
        return self.outcome == "fault"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder, read."""

    folder: Path
    recipe: Recipe
    """The recipe as it was resolved."""
    fingerprint: Mapping[str, Any]
    """The stack the numbers were measured on; empty when the run stopped before writing it."""
    result: Mapping[str, Any]
    """The result line; empty when the run did not finish."""
    vector: Mapping[str, Any]
    """What the capability vector that the run was kept apart from says of itself; empty where there was none."""
    metrics: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    episodes: tuple[Episode, ...]

    def stage(self, *names: str) -> list[Mapping[str, Any]]:
        """Metric lines of these stages, in order."""
        return [line for line in self.metrics if line.get("stage") in names]

    def rounds(self) -> dict[int, dict[str, Any]]:
        """Round -> its numbers of collecting, pairing and learning, merged; of a name in two stages, the later's."""
        merged: dict[int, dict[str, Any]] = {}
        for line in self.stage("rollout", "pairs", "learned"):
            merged.setdefault(int(line["round"]), {}).update(line)
        return merged

    def occurrences(self, *names: str) -> list[Mapping[str, Any]]:
        """Events with one of these names, in order."""
        return [line for line in self.events if line.get("event") in names]

    def phase(self, name: str) -> list[Episode]:
        """Episodes of one phase, in order."""
        return [episode for episode in self.episodes if episode.phase == name]

    def paired_evaluation(self) -> list[Episode]:
        """The held-out episodes that count, as in `result.json`: those on cells that every evaluated version finished
        without a fault."""
        versions = self.evaluated_versions()
        episodes = self.phase("evaluation")
        finished = Counter(episode.cell for episode in episodes if not episode.faulty)
        return [episode for episode in episodes if finished[episode.cell] == len(versions)]

    def evaluated_versions(self) -> list[int]:
        """Versions that drove held-out episodes, oldest first."""
        return sorted({episode.policy_version for episode in self.phase("evaluation")})

    def tasks(self) -> list[tuple[str, int]]:
        """(suite, task id) of every task the policy drove."""
        return sorted({episode.task for episode in self.episodes if episode.policy_version >= 0})


def read_run(folder: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        FileNotFoundError: there is no `recipe.yaml`, so this is not a run folder.
        RecipeError: the recipe is not one.
        ValueError: another file does not hold what it should; the message names the file.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no recipe.yaml")
    return Run(
        folder=folder,
        recipe=load_recipe(recipe),
        fingerprint=_read_object(folder / "fingerprint.json"),
        result=_read_object(folder / "result.json"),
        vector=_read_object(folder / "capability.json"),
        metrics=tuple(read_journal(folder / "metrics.jsonl")),
        events=tuple(read_journal(folder / "events.jsonl")),
        episodes=tuple(_episodes(folder / "episodes.jsonl")),
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(value).__name__}")
    return value


def _episodes(path: Path) -> Iterable[Episode]:
    """Each episode once: a line written again after a restart has the same phase and trajectory id."""
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(read_journal(path), start=1):
        try:
            episode = _episode(line)
        except KeyError as error:
            raise ValueError(f"{path}, record {number} lacks {error}") from error
        if (episode.phase, episode.trajectory_id) not in seen:
            seen.add((episode.phase, episode.trajectory_id))
            yield episode


def _episode(line: Mapping[str, Any]) -> Episode:
    return Episode(
        phase=line["phase"],
        round=line["round"],
        cell=Cell(**{name: line[name] for name in ("suite", "task_id", "init_state", "seed")}),
        outcome=line["outcome"],
        fault=line["fault"],
        policy_version=line["policy_version"],
        trajectory_id=line["trajectory_id"],
    )
