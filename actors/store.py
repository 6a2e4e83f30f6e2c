"""The preference-store actor: a thin process around `preferences.store`. It imports no torch, and so starts quickly."""

from __future__ import annotations

import ray

from configs.preference import PreferencePart
from preferences.pairing import PairCounts
from preferences.store import PreferenceStore
from trajectories.records import PreferencePair, Trajectory

OWNER_ENDS_S = 60.0
"""How long the store process of a driver, or of a node, that died may take to let go of the folder."""


class Store:
    """The preference store in a process of its own, so that trajectories never pass through the driver.

    Whatever it answered is on disk, and asking twice changes nothing: Ray may restart it and ask again at any time."""

    def __init__(self, *, folder: str, preference: PreferencePart, seed: int) -> None:
        self._store = PreferenceStore(folder, wait_s=OWNER_ENDS_S)
        self._part = preference
        self._seed = seed

    def register_version(self, version: int, content_hash: str) -> None:
        self._store.register_version(version, content_hash)

    def retire_version(self, version: int) -> None:
        """A version was rolled back: its trajectories never pair."""
        self._store.retire_version(version)

    def add(self, trajectory: Trajectory) -> bool:
        """Store durably; False when it was there already."""
        return self._store.add(trajectory)

    def mine(self, version: int) -> tuple[list[PreferencePair], list[Trajectory], PairCounts]:
        """Pairs and successes no staler than the recipe allows, and the counts of what could not pair."""
        mined = self._store.mine(
            current_version=version,
            max_staleness=self._part.max_staleness,
            pairs_per_state=self._part.pairs_per_state,
            seed=self._seed,
        )
        return list(mined.pairs), list(mined.successes), mined.counts


StoreActor = ray.remote(Store)
