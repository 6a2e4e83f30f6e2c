"""Which success pairs with which failure: pure functions over what is known of each trajectory.

A pair shares suite, task, initial state and policy version: with two versions, its sides would come from two different
behaviour policies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random

import numpy as np

from trajectories.records import Cell, Outcome, Trajectory

State = tuple[str, int, int, int]
"""Suite, task, initial state and policy version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What pairing needs to know of one trajectory."""

    trajectory_id: str
    cell: Cell
    outcome: Outcome
    policy_version: int
    finite: bool
    """Whether it has decisions, all with finite actions, chunks and log-probabilities."""

    @property
    def clean(self) -> bool:
        return self.finite and self.outcome != "fault"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRef:
    """A pair by the ids of its sides."""

    chosen: str
    rejected: str
    policy_version: int
    cell: Cell
    """The chosen side's; the rejected side differs in its seed."""

    @property
    def pair_id(self) -> str:
        """Stable name, the same whenever the pair is mined."""
        return f"{self.chosen}-{self.rejected}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """What one mining found. Every state is paired, all success, all failure, or other.

    An initial state counts once for each version that drove it.
    """

    states: int
    """Initial states with at least one trajectory recent enough."""
    states_all_success: int
    """States whose clean trajectories all succeeded."""
    states_all_failure: int
    """States whose clean trajectories all failed."""
    states_unpairable_other: int
    """States without any clean trajectory."""
    pairs: int
    faults: int
    """Recent trajectories that ended in a fault."""
    non_finite: int
    """Recent trajectories without a fault that hold a non-finite number, or no decision at all."""
    stale: int
    """Trajectories of retired versions, and of versions before `oldest_version` or after the current one."""
    duplicates: int
    """Trajectories handed in more than once, beyond the first."""

    def summary(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


def candidate_of(trajectory: Trajectory) -> Candidate:
    """What pairing needs to know of a trajectory."""
    return Candidate(
        trajectory_id=trajectory.trajectory_id,
        cell=trajectory.cell,
        outcome=trajectory.outcome,
        policy_version=trajectory.policy_version,
        finite=is_finite(trajectory),
    )


def is_finite(trajectory: Trajectory) -> bool:
    """Whether there are decisions, all with finite actions, chunks and log-probabilities."""
    arrays = [
        array
        for decision in trajectory.decisions
        for array in (decision.sample.actions, decision.sample.model_chunk, decision.sample.logps)
    ]
    return bool(arrays) and all(bool(np.isfinite(array).all()) for array in arrays)


def mine_pairs(
    candidates: Iterable[Candidate],
    *,
    current_version: int,
    max_staleness: int,
    pairs_per_state: int,
    seed: int,
    retired: Collection[int] = (),
) -> tuple[tuple[PairRef, ...], PairCounts]:
    """Pair successes with clean failures of the same initial state.

    The result depends on the seed and on which trajectories there are, not on their order; and the pairs of one
    state do not change when trajectories of another arrive.

    Args:
        candidates: everything known; an id that comes twice counts once.
        current_version: version in force.
        max_staleness: versions a trajectory may lag behind, >= 0; retired ones do not count.
        pairs_per_state: at most this many pairs from one state, >= 1; they use its successes, and its failures,
            equally often, give or take one.
        seed: fixes which are chosen.
        retired: versions that were rolled back; their trajectories never pair.

    Raises ValueError when max_staleness is below 0 or pairs_per_state below 1.
    """
    if max_staleness < 0 or pairs_per_state < 1:
        raise ValueError(
            "max_staleness must be >= 0 and pairs_per_state >= 1, "
            f"got max_staleness={max_staleness}, pairs_per_state={pairs_per_state}"
        )
    given = list(candidates)
    unique = {candidate.trajectory_id: candidate for candidate in given}
    oldest = oldest_version(current_version, max_staleness, retired)
    in_force = [c for c in unique.values() if c.policy_version not in retired]
    recent = [c for c in in_force if oldest <= c.policy_version <= current_version]
    pairs: list[PairRef] = []
    kinds: Counter[tuple[bool, bool]] = Counter()
    for state, members in sorted(_by_state(recent).items()):
        successes, failures = _sides(members, Random(f"{seed}:{state}"))
        kinds[bool(successes), bool(failures)] += 1
        pairs += _spread(successes, failures, pairs_per_state)
    counts = PairCounts(
        states=kinds.total(),
        states_all_success=kinds[True, False],
        states_all_failure=kinds[False, True],
        states_unpairable_other=kinds[False, False],
        pairs=len(pairs),
        faults=sum(candidate.outcome == "fault" for candidate in recent),
        non_finite=sum(candidate.outcome != "fault" and not candidate.finite for candidate in recent),
        stale=len(unique) - len(recent),
        duplicates=len(given) - len(unique),
    )
    return tuple(pairs), counts


def oldest_version(current_version: int, max_staleness: int, retired: Collection[int]) -> int:
    """The oldest version that may still pair: the one in force `max_staleness` promotions before the current one, or
    the first. A version that was rolled back was never in force, so it makes no other stale."""
    earlier = (version for version in range(current_version - 1, -1, -1) if version not in retired)
    return [current_version, *islice(earlier, max_staleness)][-1]


def _by_state(candidates: Iterable[Candidate]) -> dict[State, list[Candidate]]:
    states: dict[State, list[Candidate]] = {}
    for candidate in candidates:
        cell = candidate.cell
        state = (cell.suite, cell.task_id, cell.init_state, candidate.policy_version)
        states.setdefault(state, []).append(candidate)
    return states


def _sides(members: Iterable[Candidate], random: Random) -> tuple[list[Candidate], list[Candidate]]:
    """Clean successes and clean failures, each shuffled from an order that does not depend on arrival."""
    ordered = sorted((member for member in members if member.clean), key=lambda member: member.trajectory_id)
    successes = [member for member in ordered if member.outcome == "success"]
    failures = [member for member in ordered if member.outcome == "timeout"]
    random.shuffle(successes)
    random.shuffle(failures)
    return successes, failures


def _spread(successes: list[Candidate], failures: list[Candidate], limit: int) -> list[PairRef]:
    """Up to `limit` distinct pairs that use each side evenly.

    Walking both lists round and round in step visits lcm(S, F) distinct pairs; shifting one list by one after each
    such lap visits the rest. Every prefix of the walk is even on both sides.
    """
    if not successes or not failures:
        return []
    lap = math.lcm(len(successes), len(failures))
    count = min(limit, len(successes) * len(failures))
    chosen = [successes[k % len(successes)] for k in range(count)]
    rejected = [failures[(k + k // lap) % len(failures)] for k in range(count)]
    return [
        PairRef(
            chosen=a.trajectory_id,
            rejected=b.trajectory_id,
            policy_version=a.policy_version,
            cell=a.cell,
        )
        for a, b in zip(chosen, rejected, strict=True)
    ]
