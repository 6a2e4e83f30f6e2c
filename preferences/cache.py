"""Trajectories lately read from files, within a bound on memory; and sequences whose items are read when asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

from trajectories.records import Trajectory

Key = TypeVar("Key")
Item = TypeVar("Item")


class TrajectoryCache:
    """Least recently used trajectories leave first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of all arrays held; never above `max_bytes`."""
        self._held: OrderedDict[str, tuple[Trajectory, int]] = OrderedDict()

    def __contains__(self, trajectory_id: str) -> bool:
        return trajectory_id in self._held

    def get(self, trajectory_id: str) -> Trajectory | None:
        """The trajectory, now the most recently used, or None."""
        found = self._held.get(trajectory_id)
        if found is None:
            return None
        self._held.move_to_end(trajectory_id)
        return found[0]

    def put(self, trajectory: Trajectory) -> None:
        """Hold a trajectory, unless it alone is larger than the bound."""
        self.discard([trajectory.trajectory_id])
        size = array_bytes(trajectory)
        if size > self.max_bytes:
            return
        self._held[trajectory.trajectory_id] = (trajectory, size)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, (_, freed) = self._held.popitem(last=False)
            self.num_bytes -= freed

    def discard(self, trajectory_ids: Iterable[str]) -> None:
        """Let go of some trajectories; those not held are passed over."""
        for trajectory_id in trajectory_ids:
            _, freed = self._held.pop(trajectory_id, (None, 0))
            self.num_bytes -= freed


class ReadOnDemand(Sequence[Item], Generic[Key, Item]):
    """A sequence that knows its keys and reads an item each time it is asked for."""

    def __init__(self, keys: Sequence[Key], read: Callable[[Key], Item]) -> None:
        self._keys = keys
        self._read = read

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> ReadOnDemand[Key, Item]: ...
    def __getitem__(self, index: int | slice) -> Item | ReadOnDemand[Key, Item]:
        if isinstance(index, slice):
            return ReadOnDemand(self._keys[index], self._read)
        return self._read(self._keys[index])


def array_bytes(trajectory: Trajectory) -> int:
    """Bytes of a trajectory's arrays."""
    return sum(
        array.nbytes
        for decision in trajectory.decisions
        for array in (
            decision.observation.agentview,
            decision.observation.wrist,
            decision.observation.proprio,
            decision.sample.actions,
            decision.sample.model_chunk,
            decision.sample.logps,
        )
    )
