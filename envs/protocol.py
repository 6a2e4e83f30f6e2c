"""The evaluation protocol: an explicit manifest of cells, and paired comparisons on the cells both sides drove."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.world import TaskPart
from envs.fingerprint import differences, read_fingerprint, require_same_world
from envs.significance import (
    McNemarResult,
    mcnemar,
    mcnemar_pooled,
    mcnemar_worse,
    paired_difference,
    wilson,
)
from envs.tasks import INIT_STATES_PER_TASK, SUITE_SIZES
from trajectories.journal import JournalError, read_journal
from trajectories.records import Cell

__all__ = [
    "Comparison",
    "ComparisonError",
    "McNemarResult",
    "Outcomes",
    "Paired",
    "Rate",
    "compare_episodes",
    "compare_outcomes",
    "held_out_cells",
    "mcnemar",
    "mcnemar_pooled",
    "mcnemar_worse",
    "paired_difference",
    "published_cells",
    "read_outcomes",
    "wilson",
]

Trial = tuple[int, Cell]
"""An episode of an evaluation: the training seed of the policy (0 where there is only one), and the cell."""


class ComparisonError(ValueError):
    """Two evaluations that cannot be compared, or records that are not an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """One side of a comparison."""

    success: Mapping[Trial, bool]
    faulty: frozenset[Trial]
    """Episodes that ended in a fault: neither success nor failure, left out of every rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A success rate with its Wilson interval."""

    successes: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.successes / self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Two policies on the same trials."""

    before: Rate
    after: Rate
    test: McNemarResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two evaluations on the trials both finished."""

    overall: Paired
    per_task: Mapping[str, Paired]
    """`suite/task_id` -> the trials of that task, in task order."""
    difference: float
    """Rate after minus rate before."""
    low: float
    high: float
    """Newcombe's 95 % interval of the difference, for paired proportions."""
    left_out: int
    """Trials that only one side drove, or that ended in a fault on either side."""
    warnings: tuple[str, ...]
    """Why the two sides may not be comparable: one line for each difference between their stacks."""

    def rows(self) -> list[tuple[str, ...]]:
        """Table rows (task, episodes, before, after, better, worse), one for each task and one for all."""
        return [_row(task, paired) for task, paired in self.per_task.items()] + [_row("all", self.overall)]

    def summary(self) -> dict[str, Any]:
        """JSON values: rates, intervals, difference, test, warnings."""
        before, after, test = self.overall.before, self.overall.after, self.overall.test
        return {
            "episodes": test.n,
            "success_before": round(before.rate, 4),
            "success_after": round(after.rate, 4),
            "wilson_before": [round(before.low, 4), round(before.high, 4)],
            "wilson_after": [round(after.low, 4), round(after.high, 4)],
            "difference": round(self.difference, 4),
            "difference_interval": [round(self.low, 4), round(self.high, 4)],
            "better": test.better,
            "worse": test.worse,
            "mcnemar_p": float(f"{test.p_value:.3g}"),
            "left_out": self.left_out,
            "warnings": list(self.warnings),
        }


def held_out_cells(tasks: TaskPart, sampling_seeds: Sequence[int]) -> tuple[Cell, ...]:
    """The manifest of an evaluation: every task, held-out initial state and sampling seed, in that order."""
    return tuple(
        Cell(suite=tasks.suite, task_id=task, init_state=state, seed=seed)
        for task in tasks.task_ids
        for state in tasks.held_out_init_states
        for seed in sampling_seeds
    )


def published_cells(suite: str) -> tuple[Cell, ...]:
    """The published LIBERO protocol: every task of the suite from all its 50 initial states, once (sampling seed 0).

    A policy that was trained on some of these states is measured on them too.

    Raises:
        ValueError: not a LIBERO suite.
    """
    if suite not in SUITE_SIZES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SUITE_SIZES)}")
    return tuple(
        Cell(suite=suite, task_id=task, init_state=state, seed=0)
        for task in range(SUITE_SIZES[suite])
        for state in range(INIT_STATES_PER_TASK)
    )


def read_outcomes(
    path: Path, where: Mapping[str, object] | None = None, *, manifest: str | None = None
) -> Outcomes:
    """The outcomes of one evaluation, from JSON lines of episode records.

    Where the lines name a phase, as a run's `episodes.jsonl` does, these are the lines of its own evaluation, or with
    `manifest` of `launch.py evaluate --manifest`, of the version evaluated last. A line may carry `training_seed`; then
    trials of equal seed and cell are paired.

    Args:
        path: a JSON-lines file, or a run folder.
        where: keys and values that a line must have to count, e.g. `{"arm": "dpo-dora"}`.
        manifest: `held-out` or `published`, what `launch.py evaluate` drove; none: what the run itself did.

    Raises:
        FileNotFoundError: there is no such file.
        ComparisonError: a line is not an episode record, nothing matches, or a trial is there twice with
            different outcomes.
    """
    file = path / "episodes.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; expected a run folder or a JSON-lines file of episodes"
        )
    try:
        lines = read_journal(file)
    except JournalError as error:
        raise ComparisonError(str(error)) from error
    lines = [line for line in lines if all(line.get(key) == value for key, value in (where or {}).items())]
    phase = f"evaluation-{manifest}" if manifest else "evaluation"
    if any("phase" in line for line in lines):
        lines = [line for line in lines if line.get("phase") == phase]
        lines = [line for line in lines if line["policy_version"] == lines[-1]["policy_version"]]
    if not lines:
        wanted = f"of phase {phase}" if manifest else "of an evaluation"
        raise ComparisonError(f"{file} holds no episodes {wanted}{f' with {dict(where)}' if where else ''}")
    outcomes: dict[Trial, str] = {}
    for line in lines:
        trial, outcome = _trial(file, line)
        if outcomes.setdefault(trial, outcome) != outcome:
            raise ComparisonError(
                f"{file}: {trial[1].key} (training seed {trial[0]}) is there as {outcomes[trial]} and as {outcome}; "
                "compare one arm and version at a time"
            )
    return Outcomes(
        success={trial: outcome == "success" for trial, outcome in outcomes.items() if outcome != "fault"},
        faulty=frozenset(trial for trial, outcome in outcomes.items() if outcome == "fault"),
    )


def compare_outcomes(before: Outcomes, after: Outcomes, *, warnings: Sequence[str] = ()) -> Comparison:
    """Compare two evaluations on the trials that both finished.

    Raises:
        ComparisonError: they share no trial.
    """
    shared = before.success.keys() & after.success.keys()
    if not shared:
        raise ComparisonError(
            "the two evaluations share no (training seed, suite, task, initial state, seed)"
        )
    by_task: dict[tuple[str, int], list[Trial]] = {}
    for trial in sorted(shared):
        by_task.setdefault((trial[1].suite, trial[1].task_id), []).append(trial)
    overall = _paired(before, after, shared)
    test = overall.test
    both = overall.after.successes - test.better
    difference, low, high = paired_difference(
        both=both,
        only_after=test.better,
        only_before=test.worse,
        neither=test.n - both - test.better - test.worse,
    )
    every = before.success.keys() | before.faulty | after.success.keys() | after.faulty
    return Comparison(
        overall=overall,
        per_task={
            f"{suite}/{task}": _paired(before, after, trials)
            for (suite, task), trials in sorted(by_task.items())
        },
        difference=difference,
        low=low,
        high=high,
        left_out=len(every) - len(shared),
        warnings=tuple(warnings),
    )


def compare_episodes(
    before: Path,
    after: Path,
    *,
    before_arm: str | None = None,
    after_arm: str | None = None,
    manifest: str | None = None,
) -> Comparison:
    """Compare the evaluations in two run folders or JSON-lines files; differing stacks become warnings. An arm picks
    its lines from a file that holds several, as docs/results/learning.jsonl does; a manifest, those of `launch.py
    evaluate`.

    Raises:
        FileNotFoundError: see `read_outcomes`.
        ComparisonError: see `read_outcomes` and `compare_outcomes`.
        FingerprintError: one side ran on stand-in assets and the other did not, or a fingerprint is damaged.
    """
    stacks = [read_fingerprint(path) for path in (before, after)]
    require_same_world(*stacks, what=f"{before} and {after} cannot be compared")
    warnings = differences(*stacks) if all(stacks) else []
    first, last = (
        read_outcomes(path, None if arm is None else {"arm": arm}, manifest=manifest)
        for path, arm in ((before, before_arm), (after, after_arm))
    )
    return compare_outcomes(first, last, warnings=warnings)


OTHER_NAMES = {"task": "task_id", "sampling_seed": "seed"}
"""What files of results call the parts of a cell."""


def _trial(file: Path, line: Mapping[str, Any]) -> tuple[Trial, str]:
    line = {OTHER_NAMES.get(key, key): value for key, value in line.items()}
    missing = [key for key in ("suite", "task_id", "init_state", "seed", "success") if key not in line]
    if missing:
        raise ComparisonError(f"{file}: a line lacks {', '.join(missing)}: {json.dumps(line)[:80]}")
    cell = Cell(
        suite=line["suite"], task_id=line["task_id"], init_state=line["init_state"], seed=line["seed"]
    )
    outcome = line.get("outcome", "success" if line["success"] else "timeout")
    return (line.get("training_seed", 0), cell), outcome


def _paired(before: Outcomes, after: Outcomes, trials: Collection[Trial]) -> Paired:
    old = {trial: before.success[trial] for trial in trials}
    new = {trial: after.success[trial] for trial in trials}
    return Paired(before=_rate(old), after=_rate(new), test=mcnemar(old, new))


def _rate(success: Mapping[Trial, bool]) -> Rate:
    successes = sum(success.values())
    low, high = wilson(successes, len(success))
    return Rate(successes=successes, n=len(success), low=low, high=high)


def _row(name: str, paired: Paired) -> tuple[str, ...]:
    sides = (
        f"{100 * side.rate:.0f} % ({100 * side.low:.0f}-{100 * side.high:.0f})"
        for side in (paired.before, paired.after)
    )
    return (name, str(paired.test.n), *sides, str(paired.test.better), str(paired.test.worse))
