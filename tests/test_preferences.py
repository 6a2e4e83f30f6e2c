"""Pairing is even, deterministic and honest about what it left out."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.pairing import Candidate, PairCounts, mine_pairs
from trajectories.records import Cell, Outcome


def candidates(
    state: int, successes: int, failures: int, *, version: int = 0, **change: object
) -> list[Candidate]:
    outcomes: list[Outcome] = ["success"] * successes + ["timeout"] * failures
    return [
        dataclasses.replace(
            Candidate(
                trajectory_id=f"v{version}s{state}-{number}-{outcome}",
                cell=Cell(suite="libero_object", task_id=0, init_state=state, seed=number),
                outcome=outcome,
                policy_version=version,
                finite=True,
            ),
            **change,
        )
        for number, outcome in enumerate(outcomes)
    ]


def mine(items: list[Candidate], **change: int | list[int]) -> tuple[list[tuple[str, str]], PairCounts]:
    settings: dict = {"current_version": 0, "max_staleness": 2, "pairs_per_state": 4, "seed": 0}
    refs, counts = mine_pairs(items, **(settings | change))
    return [(ref.chosen, ref.rejected) for ref in refs], counts


@given(
    successes=st.integers(1, 7), failures=st.integers(1, 7), limit=st.integers(1, 60), seed=st.integers(0, 9)
)
def test_usage_is_even_on_both_sides_and_no_pair_comes_twice(
    successes: int, failures: int, limit: int, seed: int
) -> None:
    pairs, counts = mine(candidates(3, successes, failures), pairs_per_state=limit, seed=seed)
    assert len(pairs) == len(set(pairs)) == counts.pairs == min(limit, successes * failures)
    for side, size in ((0, successes), (1, failures)):
        used = Counter(pair[side] for pair in pairs)
        assert max(used.values()) - (min(used.values()) if len(used) == size else 0) <= 1


def test_pairs_join_only_the_same_initial_state() -> None:
    items = candidates(1, 2, 1) + candidates(2, 1, 2)
    pairs, counts = mine(items, pairs_per_state=100)
    assert len(pairs) == 4
    assert all(chosen.split("-")[0] == rejected.split("-")[0] for chosen, rejected in pairs)
    assert (counts.states, counts.pairs) == (2, 4)


def test_the_choice_follows_the_seed_and_nothing_else() -> None:
    items = candidates(1, 4, 4)
    pairs, _ = mine(items)
    assert mine(items[::-1])[0] == pairs
    assert mine(items + candidates(2, 3, 3))[0][:4] == pairs
    assert mine(items, seed=1)[0] != pairs


def test_counts_say_what_became_of_every_state_and_trajectory() -> None:
    items = [
        *candidates(1, 2, 2),
        *candidates(2, 3, 0),
        *candidates(3, 0, 3),
        *candidates(4, 1, 0, outcome="fault"),
        *candidates(5, 1, 1, finite=False),
        *candidates(6, 1, 1, version=-3),
        *candidates(7, 1, 1, version=1),
        *candidates(1, 1, 0),
    ]
    pairs, counts = mine(items)
    assert counts.summary() == {
        "states": 5,
        "states_all_success": 1,
        "states_all_failure": 1,
        "states_unpairable_other": 2,
        "pairs": 4,
        "faults": 1,
        "non_finite": 2,
        "stale": 4,
        "duplicates": 1,
    }
    assert {chosen[:4] for chosen, _ in pairs} == {"v0s1"}


def test_staleness_counts_versions_back_from_the_current_one() -> None:
    items = [item for version in range(5) for item in candidates(1, 1, 1, version=version)]
    pairs, counts = mine(items, current_version=3, max_staleness=1)
    assert sorted(chosen[:2] for chosen, _ in pairs) == ["v2", "v3"]
    assert counts.stale == 6


def test_a_version_that_was_rolled_back_makes_no_other_stale() -> None:
    items = [item for version in range(6) for item in candidates(1, 1, 1, version=version)]
    pairs, _ = mine(items, current_version=5, max_staleness=1, retired=[2, 3, 4])
    assert sorted(chosen[:2] for chosen, _ in pairs) == ["v1", "v5"]
    pairs, _ = mine(items, current_version=5, max_staleness=9, retired=[4])
    assert sorted(chosen[:2] for chosen, _ in pairs) == ["v0", "v1", "v2", "v3", "v5"]


def test_versions_do_not_mix() -> None:
    items = candidates(1, 2, 0, version=0) + candidates(1, 0, 2, version=1)
    pairs, counts = mine(items, current_version=1)
    assert (pairs, counts.states) == ([], 2)
    pairs, _ = mine(items + candidates(1, 1, 0, version=1), current_version=1)
    assert {chosen[:2] + rejected[:2] for chosen, rejected in pairs} == {"v1v1"}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="got max_staleness=-1, pairs_per_state=4"):
        mine([], max_staleness=-1)
    with pytest.raises(ValueError, match="got max_staleness=2, pairs_per_state=0"):
        mine([], pairs_per_state=0)
