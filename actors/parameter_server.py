"""Parameter-server actors: each owns a share of the pristine base and merges its own tensors, version by version.

No shard ever holds the whole model: it reads only its own tensors from the start checkpoint, merges the adapter
into a fresh copy in fp32, and puts the result into the object store once; every policy actor on a node maps the same
bytes. Nothing is pushed: policy actors pull a version when a request first names it.

A shard whose process dies restarts from the start checkpoint, and merges a version again, from the adapter that the
run saved, when it is next asked for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import SchedulingStrategyT

from learners.checkpoint import CheckpointReader, load_checkpoint
from policies.weights.adapter_files import adapter_from_tensors
from policies.weights.merging import MergeError, drift, merge
from trajectories.hashing import root_hash, tensor_hash
from trajectories.records import AdapterWeights, WeightSnapshot

MAX_RESTARTS = 3
"""A shard whose process dies more often than this is gone for good, and the run ends."""


class ParameterServerError(RuntimeError):
    """The weights are gone: a shard died too often, or with the cluster."""


def version_name(version: int) -> str:
    """The name of a version's adapter among the checkpoints of a run."""
    return f"v{version:04d}"


def assign_shards(sizes: Mapping[str, int], num_shards: int) -> list[list[str]]:
    """Split tensor names into shards of nearly equal bytes: largest first, to the lightest shard.

    Args:
        sizes: tensor name -> bytes.
        num_shards: number of parameter-server actors, >= 1.
    """
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    loads = [0] * num_shards
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        lightest = loads.index(min(loads))
        shards[lightest].append(name)
        loads[lightest] += sizes[name]
    return shards


class ShardServer:
    """One share of the weights. Holds the pristine base for its names and the newest merged versions."""

    def __init__(self, *, start_checkpoint: str, saved: str, index: int, num_shards: int) -> None:
        self._saved = Path(saved)
        reader = CheckpointReader(start_checkpoint)
        names = assign_shards(reader.sizes(), num_shards)[index]
        self._base: dict[str, np.ndarray] = {name: reader.tensor(name) for name in names}
        self._versions: dict[int, tuple[ray.ObjectRef, dict[str, str]]] = {}
        self._drifts: dict[int, float] = {}

    def publish(self, version: int, adapter: AdapterWeights | None) -> dict[str, str]:
        """Merge the adapter into this shard's tensors, from the pristine base, as a new version.

        Returns tensor name -> hash of this shard's merged tensors. Raises ValueError when the version does not rise,
        and MergeError when a merged tensor is not finite or computes something else than base and adapter.
        """
        if self._versions and version <= max(self._versions):
            raise ValueError(f"version must rise above {max(self._versions)}, got {version}")
        return self._merge(version, adapter)

    def retire(self, keep: Sequence[int]) -> None:
        """Forget every version but these; the object store frees them when the last reader lets go."""
        self._versions = {v: held for v, held in self._versions.items() if v in keep}
        self._drifts = {v: found for v, found in self._drifts.items() if v in keep}

    def drift(self, version: int) -> float:
        """Of a version that is held; see `policies.weights.merging.drift`."""
        self.pull(version)
        return self._drifts[version]

    def pull(self, version: int) -> tuple[list[ray.ObjectRef], dict[str, str]]:
        """The object holding this shard's tensors of a version (in a list, so that it is not copied through this
        process), and their hashes. Raises KeyError for a version that is neither held nor saved."""
        if version not in self._versions:
            self._merge(version, self._saved_adapter(version))
        ref, hashes = self._versions[version]
        return [ref], hashes

    def _merge(self, version: int, adapter: AdapterWeights | None) -> dict[str, str]:
        merged = merge(self._base, adapter)
        self._drifts[version] = drift(self._base, merged, adapter)
        hashes = {name: tensor_hash(array) for name, array in merged.items()}
        self._versions[version] = (ray.put(merged), hashes)
        return hashes

    def _saved_adapter(self, version: int) -> AdapterWeights | None:
        if version == 0:
            return None
        checkpoint = self._saved / version_name(version)
        if not checkpoint.is_dir():
            raise KeyError(f"version {version} is not held; held: {sorted(self._versions)}, saved: none")
        return adapter_from_tensors(*load_checkpoint(checkpoint))


def find_shards(names: Sequence[str]) -> list[Any]:
    """Handles on the shards of these names. Raises ParameterServerError when one is gone for good."""
    try:
        return [ray.get_actor(name) for name in names]
    except ValueError as error:
        raise _gone() from error


def pull_snapshot(shards: Sequence[Any], version: int) -> WeightSnapshot:
    """Assemble a version from all shards. Tensors are read-only views into the object store.

    A shard that dies meanwhile is asked again when it has restarted. Raises ParameterServerError when one is gone for
    good.
    """
    for _ in range(MAX_RESTARTS + 1):
        try:
            parts = ray.get([shard.pull.remote(version) for shard in shards])
            held = [ray.get(refs[0]) for refs, _ in parts]
        except RayActorError as error:
            raise _gone() from error
        except ObjectLostError:  # the shard died after it had named its tensors, and they went with it
            continue
        tensors = {name: array for share in held for name, array in share.items()}
        hashes = {name: value for _, share in parts for name, value in share.items()}
        return WeightSnapshot(version=version, content_hash=root_hash(hashes), tensors=tensors)
    raise _gone()


def _gone() -> ParameterServerError:
    return ParameterServerError(
        f"a parameter-server shard died more than {MAX_RESTARTS} times, or its node did, and the weights with it; "
        "where memory ran out, raise learner.parameter_shards or use larger nodes, and start again from this run"
    )


ParameterShard = ray.remote(ShardServer)


class ParameterServer:
    """The driver's handle on all shards: publishes versions that only rise, and keeps those still in use.

    `names` are what a policy actor finds the shards by: a handle among the arguments it was created with would keep
    Ray from restarting it once those arguments are gone.
    """

    def __init__(
        self, *, start_checkpoint: str, saved: str, num_shards: int, place: SchedulingStrategyT = None
    ) -> None:
        """Start the shards on a start checkpoint. `saved` is the folder where the run saves the adapter of every
        version that it publishes (see `version_name`); `place` is where Ray puts the shards."""
        run = uuid.uuid4().hex[:8]
        self.names = [f"parameter-shard-{run}-{i}" for i in range(num_shards)]
        self.shards: list[Any] = [
            ParameterShard.options(
                num_cpus=0,
                name=self.names[i],
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
                scheduling_strategy=place,
            ).remote(start_checkpoint=start_checkpoint, saved=saved, index=i, num_shards=num_shards)
            for i in range(num_shards)
        ]
        self._next = 0

    def publish(
        self, adapter: AdapterWeights | None, *, keep: Sequence[int] = (), version: int | None = None
    ) -> tuple[int, str]:
        """Publish the base (adapter None) or a merged adapter; returns its version and content hash.

        Versions in `keep` stay available beside the new one; all others are retired. `version` is the next free one
        unless a saved version is published again. Raises ParameterServerError when a shard is gone for good, and
        MergeError, with the version forgotten, for an adapter that does not merge.
        """
        version = self._next if version is None else version
        self._next = version + 1
        ref = ray.put(adapter)
        try:
            parts = self._merged(version, ref, keep)
            ray.get([shard.retire.remote([*keep, version]) for shard in self.shards])
        except RayActorError as error:
            raise _gone() from error
        hashes = {name: value for part in parts for name, value in part.items()}
        return version, root_hash(hashes)

    def _merged(self, version: int, adapter: ray.ObjectRef, keep: Sequence[int]) -> list[dict[str, str]]:
        """Each shard's hashes of a version, once all have merged it; where one refuses, none keeps it."""
        asked = [shard.publish.remote(version, adapter) for shard in self.shards]
        try:
            return ray.get(asked)
        except RayTaskError as error:
            if not isinstance(error.cause, MergeError):
                raise
            ray.wait(asked, num_returns=len(asked))
            ray.get([shard.retire.remote(list(keep)) for shard in self.shards])
            self._next = (
                version  # it was never in force: the next one is as near to the last as it would have been
            )
            raise MergeError(str(error.cause)) from error

    def rise_above(self, version: int) -> None:
        """Number what is published next above `version`, which an earlier process of this run gave out."""
        self._next = max(self._next, version + 1)

    def drift(self, version: int) -> float:
        """The largest relative change of a layer's output that merging and rounding made in this version, over all
        shards; see `policies.weights.merging.drift`. Raises ParameterServerError when a shard is gone for good."""
        try:
            return max(ray.get([shard.drift.remote(version) for shard in self.shards]))
        except RayActorError as error:
            raise _gone() from error
