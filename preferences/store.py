"""The preference store: trajectories go in once, pairs come out, and a kill at any instant loses neither.

<folder>/trajectories/, store.jsonl, quarantine/    see `preferences.archive`
<folder>/pairs.jsonl                                every pair ever mined, once
<folder>/store.lock                                 held by the one process that owns the store
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from preferences.archive import StoreError, TrajectoryArchive, UnknownPolicyError, writing
from preferences.lock import FolderLock, FolderLockedError
from preferences.pairing import Candidate, PairCounts, PairRef, mine_pairs, oldest_version
from trajectories.journal import Journal, JournalError, read_journal
from trajectories.records import PreferencePair, Trajectory

__all__ = ["MinedPairs", "PreferenceStore", "StoreError", "UnknownPolicyError"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MinedPairs:
    """Pairs and successes recent enough to learn from. A trajectory that is in several places is one object."""

    refs: tuple[PairRef, ...]
    pairs: tuple[PreferencePair, ...]
    """In the order of `refs`."""
    successes: tuple[Trajectory, ...]
    """Every clean success of the versions mined, ordered by version and cell."""
    counts: PairCounts


class PreferenceStore:
    """Owns one folder. Not for threads; an actor gives it a process of its own.

    Example:
        with PreferenceStore(run_folder) as store:
            store.register_version(0, snapshot.content_hash)
            store.add(trajectory)
            mined = store.mine(current_version=0, max_staleness=2, pairs_per_state=4, seed=0)
            for pair in mined.pairs: ...
    """

    def __init__(self, folder: Path | str, *, wait_s: float = 0.0) -> None:
        """Open a folder, creating it or recovering what is in it.

        Args:
            folder: where the store lives; other files in it are left alone.
            wait_s: seconds that another process which has it open is given to end.

        Raises:
            StoreError: another process has it open, or the folder cannot be written.
            JournalError: `pairs.jsonl` is damaged elsewhere than at its end.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder / "store.lock", wait_s=wait_s)
        except FolderLockedError as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            raise StoreError(f"the store cannot use {self.folder}: {error.strerror or error}") from error
        try:
            self._archive = TrajectoryArchive(self.folder)
            with writing(self.folder, "pairs.jsonl"):
                self._journal = Journal(self.folder / "pairs.jsonl", fsync=True)
        except (StoreError, JournalError):
            self._lock.release()
            raise

    def register_version(self, version: int, policy_hash: str) -> None:
        """Make a version's trajectories welcome; registering it again changes nothing.

        Raises:
            ValueError: the version is below 0 (demonstrations are no rollouts), or known under another hash.
            StoreError: the disk is full.
        """
        self._archive.register_version(version, policy_hash)

    def retire_version(self, version: int) -> None:
        """Keep a rolled-back version's trajectories from pairing from now on. They stay stored.

        Raises:
            StoreError: the disk is full.
        """
        self._archive.retire_version(version)

    def add(self, trajectory: Trajectory) -> bool:
        """Store one trajectory durably: when this returns, it survives a crash.

        Returns:
            False when a trajectory of this id was stored already; nothing is changed then.

        Raises:
            UnknownPolicyError: its version was not registered with its hash.
            CodecError: it has no stored form (see `encode_trajectory`).
            StoreError: the disk is full; what was stored before is safe, and this one may be added again.
        """
        return self._archive.add(trajectory)

    def mine(
        self, *, current_version: int, max_staleness: int, pairs_per_state: int, seed: int
    ) -> MinedPairs:
        """Pair what is stored (see `mine_pairs`) and put down in `pairs.jsonl` the pairs that are new.

        A file that is found damaged is quarantined and its trajectory forgotten, so that its episode can be run
        again; the rest pairs without it. Memory is taken by what is recent enough to pair, not by what is stored.

        Raises:
            ValueError: see `mine_pairs`.
            JournalError: `pairs.jsonl` or `store.jsonl` was damaged since the store was opened.
            StoreError: the disk is full.
        """
        oldest = oldest_version(current_version, max_staleness, self._archive.retired)
        while True:
            candidates = self._archive.since(oldest)
            refs, counts = mine_pairs(
                candidates.values(),
                current_version=current_version,
                max_staleness=max_staleness,
                pairs_per_state=pairs_per_state,
                seed=seed,
                retired=self._archive.retired,
            )
            successes = self._success_ids(candidates.values(), current_version)
            wanted = {side for ref in refs for side in (ref.chosen, ref.rejected)} | set(successes)
            found = self._archive.load_intact(sorted(wanted))
            if found.keys() == wanted:
                break
        mined = {line["pair_id"] for line in read_journal(self._journal.path)}
        with writing(self.folder, "new pairs"):
            self._journal.extend(
                _pair_record(ref, current_version) for ref in refs if ref.pair_id not in mined
            )
        forgotten = len(self._archive) - len(candidates)
        return MinedPairs(
            refs=refs,
            pairs=tuple(PreferencePair(chosen=found[r.chosen], rejected=found[r.rejected]) for r in refs),
            successes=tuple(found[name] for name in successes),
            counts=replace(counts, stale=counts.stale + forgotten, duplicates=self._archive.num_duplicates),
        )

    def close(self) -> None:
        """Close the journals and let the folder go; harmless when already closed."""
        self._journal.close()
        self._archive.close()
        self._lock.release()

    def __enter__(self) -> PreferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _success_ids(self, candidates: Iterable[Candidate], max_version: int) -> list[str]:
        wanted = [
            candidate
            for candidate in candidates
            if candidate.outcome == "success" and candidate.finite and candidate.policy_version <= max_version
        ]
        wanted.sort(key=lambda candidate: (candidate.policy_version, candidate.cell))
        return [candidate.trajectory_id for candidate in wanted]


def _pair_record(ref: PairRef, current_version: int) -> dict[str, object]:
    return {
        "pair_id": ref.pair_id,
        "chosen": ref.chosen,
        "rejected": ref.rejected,
        "suite": ref.cell.suite,
        "task_id": ref.cell.task_id,
        "init_state": ref.cell.init_state,
        "policy_version": ref.policy_version,
        "mined_at": current_version,
    }
