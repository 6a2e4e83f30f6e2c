"""Trajectories on disk, each exactly once, from known policies only.

<folder>/trajectories/<id>.trajectory    one file each, written atomically: the truth
<folder>/store.jsonl                     index of them and of the policy versions; rebuilt from the files if need be
<folder>/quarantine/                     files that were found damaged
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preferences.pairing import Candidate, candidate_of
from trajectories.codec import CodecError, episode_record, load_trajectory, save_trajectory
from trajectories.journal import Journal, JournalError, read_journal
from trajectories.records import Cell, Trajectory

logger = logging.getLogger(__name__)

SUFFIX = ".trajectory"


class StoreError(OSError):
    """The store's folder cannot be used or written to. What was stored before is safe."""


class UnknownPolicyError(ValueError):
    """A trajectory was driven by weights that nobody registered."""


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turn a failing disk into a StoreError that says what could not be written, and where."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {what} in {folder}: {error.strerror or error}; what was stored before is safe: make "
            "room or give write permission, and run again"
        ) from error


class TrajectoryArchive:
    """The files and their index. Whoever makes one must own the folder."""

    def __init__(self, folder: Path) -> None:
        """Open the folder and reconcile index and files.

        Raises:
            StoreError: the folder cannot be written.
        """
        self.folder = folder
        self.num_duplicates = 0
        """Trajectories refused since opening because they were there already."""
        self._files = folder / "trajectories"
        self._index: dict[str, Candidate] = {}
        self._oldest = 0
        """The version from which on trajectories are in the index; of older ones there are only the files."""
        self._num_stored = 0
        self._hashes: dict[int, str] = {}
        self._retired: set[int] = set()
        with writing(folder, "the index"):
            self._files.mkdir(parents=True, exist_ok=True)
            self._journal = self._open_index(folder / "store.jsonl")
            self._reconcile()

    def __len__(self) -> int:
        """How many trajectories are stored."""
        return self._num_stored

    def since(self, version: int) -> Mapping[str, Candidate]:
        """What pairing needs to know of each stored trajectory of that version or a later one, by id; none of a retired
        one.

        The others are forgotten until they are asked for, so that memory does not grow with the length of a run.
        """
        if version < self._oldest:
            self._index.clear()
            self._num_stored, self._oldest = 0, version
            for line in read_journal(self._journal.path):
                self._replay(line)
        self._oldest = version
        self._index = {
            name: candidate
            for name, candidate in self._index.items()
            if candidate.policy_version >= version and candidate.policy_version not in self._retired
        }
        return self._index

    @property
    def retired(self) -> frozenset[int]:
        """Versions that were rolled back."""
        return frozenset(self._retired)

    def register_version(self, version: int, policy_hash: str) -> None:
        """Make a version's trajectories welcome; registering it again changes nothing.

        Raises:
            ValueError: the version is below 0 (demonstrations are no rollouts), or known under another hash.
            StoreError: the disk is full.
        """
        if version < 0:
            raise ValueError(f"a policy version must be >= 0, got {version}; demonstrations do not pair")
        known = self._hashes.get(version)
        if known == policy_hash:
            return
        if known is not None:
            raise ValueError(
                f"version {version} has hash {known}, got {policy_hash}; versions are never reused"
            )
        self._put_down({"kind": "version", "version": version, "policy_hash": policy_hash})

    def retire_version(self, version: int) -> None:
        """Keep a rolled-back version's trajectories from pairing. They stay stored.

        Raises:
            StoreError: the disk is full.
        """
        if version not in self._retired:
            self._put_down({"kind": "retired", "version": version})

    def add(self, trajectory: Trajectory) -> bool:
        """Store one trajectory durably; see `PreferenceStore.add`."""
        expected = self._hashes.get(trajectory.policy_version)
        if expected is None or trajectory.policy_hash != expected:
            raise UnknownPolicyError(
                f"{trajectory.cell.key} was driven by version {trajectory.policy_version} with hash "
                f"{trajectory.policy_hash!r}, expected {expected!r}; register_version() comes first"
            )
        if self._path(trajectory.trajectory_id).exists():
            self.num_duplicates += 1
            return False
        path = self._path(trajectory.trajectory_id)
        with writing(self.folder, f"trajectory {trajectory.cell.key}"):
            save_trajectory(path, trajectory)
        try:
            self._enter(trajectory)
        except StoreError:
            path.unlink(missing_ok=True)  # it was not stored: it may be added again
            raise
        return True

    def load_intact(self, trajectory_ids: Iterable[str]) -> dict[str, Trajectory]:
        """Read trajectories, by id, each once. A damaged or missing file is quarantined, and its id left out."""
        intact: dict[str, Trajectory] = {}
        for trajectory_id in dict.fromkeys(trajectory_ids):
            try:
                intact[trajectory_id] = load_trajectory(self._path(trajectory_id))
            except (CodecError, FileNotFoundError) as error:
                self._quarantine(trajectory_id, error)
        return intact

    def close(self) -> None:
        """Close the index; harmless when already closed."""
        self._journal.close()

    def _path(self, trajectory_id: str) -> Path:
        return self._files / f"{trajectory_id}{SUFFIX}"

    def _put_down(self, line: dict[str, object]) -> None:
        """Journal one line, then act on it."""
        with writing(self.folder, "the index"):
            self._journal.append(line)
        self._replay(line)

    def _enter(self, trajectory: Trajectory) -> None:
        finite = candidate_of(trajectory).finite
        self._put_down({"kind": "trajectory", **episode_record(trajectory, finite=finite)})

    def _replay(self, line: Mapping[str, Any]) -> None:
        match line["kind"]:
            case "version":
                self._hashes[line["version"]] = line["policy_hash"]
            case "retired":
                self._retired.add(line["version"])
            case "trajectory":
                cell = {key: line[key] for key in ("suite", "task_id", "init_state", "seed")}
                self._num_stored += line["trajectory_id"] not in self._index
                self._index[line["trajectory_id"]] = Candidate(
                    trajectory_id=line["trajectory_id"],
                    cell=Cell(**cell),
                    outcome=line["outcome"],
                    policy_version=line["policy_version"],
                    finite=line["finite"],
                )
            case "removed":
                self._num_stored -= self._index.pop(line["trajectory_id"], None) is not None

    def _open_index(self, path: Path) -> Journal:
        """Replay the index; a damaged one is set aside, since the files can rebuild all but the retirements."""
        try:
            lines = read_journal(path)
        except JournalError as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            logger.warning("%s; set aside as %s and rebuilt from the files", error, aside.name)
            lines = []
        for line in lines:
            self._replay(line)
        return Journal(path)

    def _reconcile(self) -> None:
        """Make the index agree with the files: the last kill may have fallen between the two."""
        for leftover in sorted(self._files.glob("*.tmp")):
            leftover.unlink()
            logger.warning("removed %s, which was never finished", leftover.name)
        present = {path.name.removesuffix(SUFFIX) for path in self._files.glob(f"*{SUFFIX}")}
        for trajectory_id in sorted(self._index.keys() - present):
            logger.warning("%s: the file of trajectory %s is gone; forgotten", self.folder, trajectory_id)
            self._put_down({"kind": "removed", "trajectory_id": trajectory_id})
        for trajectory_id in sorted(present - self._index.keys()):
            self._recover(trajectory_id)

    def _recover(self, trajectory_id: str) -> None:
        try:
            trajectory = load_trajectory(self._path(trajectory_id))
            self.register_version(trajectory.policy_version, trajectory.policy_hash)
        except ValueError as error:
            self._quarantine(trajectory_id, error)
            return
        self._enter(trajectory)
        logger.info("%s: trajectory %s was not in the index; recovered", self.folder, trajectory_id)

    def _quarantine(self, trajectory_id: str, reason: Exception) -> None:
        """Set a damaged file aside and forget its trajectory, so that its episode can be run again."""
        logger.warning("trajectory %s is forgotten, its file set aside: %s", trajectory_id, reason)
        path = self._path(trajectory_id)
        with writing(self.folder, "quarantine"):
            if path.exists():
                (self.folder / "quarantine").mkdir(exist_ok=True)
                path.rename(self.folder / "quarantine" / path.name)
        self._put_down({"kind": "removed", "trajectory_id": trajectory_id})
