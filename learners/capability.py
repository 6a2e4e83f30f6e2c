"""Capability vectors: what an auxiliary objective taught beyond plain fine-tuning, as a difference of weights.

CapVector, arXiv 2605.10903. From two fine-tunings of one base on the same few tasks, one plain and one with an
auxiliary objective, gamma = theta_aux - theta_sft (Eq. 3); theta_meta = theta_pre + alpha gamma (Eq. 4) is where
later fine-tunings begin. A vector is a folder of safetensors files beside `capability.json`, which says what it was
made of, and is refused on any other base. Tensors pass through some rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from learners.lineage import recipe_of, states_seen
from policies.weights.files import read_json
from policies.weights.shards import ShardFolder, Stored, write_shard
from trajectories.bfloat16 import is_finite, narrow, widen
from trajectories.hashing import TensorDigest, root_hash

MANIFEST = "capability.json"
FORMAT = 3


class CapabilityError(ValueError):
    """Weights or a vector that do not go together; one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a vector lies to what plain fine-tuning changed, in one weight or in all."""

    gamma_norm: float
    """||gamma||, Frobenius."""
    sft_norm: float
    """||theta_sft - theta_pre||."""
    inner: float
    """<gamma, theta_sft - theta_pre>."""

    @property
    def ratio(self) -> float:
        """||gamma|| / ||delta_sft||; infinite where fine-tuning changed nothing."""
        return self.gamma_norm / self.sft_norm if self.sft_norm else math.inf

    @property
    def cosine(self) -> float:
        """cos(gamma, delta_sft); 0 where either is zero."""
        scale = self.gamma_norm * self.sft_norm
        return self.inner / scale if scale else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a vector was made of."""

    base_hash: str
    """Content hash of theta_pre (`trajectories.hashing`)."""
    sft_hash: str
    aux_hash: str
    gamma_hash: str
    """Of the vector itself."""
    recipes: Mapping[str, str]
    """SHA-256 of the recipe of `base`, `sft` and `aux`, each where the weights lie in a run folder."""
    init_states: Sequence[int]
    """Initial states whose demonstrations went into any of the three (`learners.lineage`): nothing that the vector
    goes into may be judged on them."""
    layers: Mapping[str, Geometry]
    """By weight."""

    def total(self) -> Geometry:
        """All weights as one vector."""
        layers = self.layers.values()
        return Geometry(
            gamma_norm=math.sqrt(sum(layer.gamma_norm**2 for layer in layers)),
            sft_norm=math.sqrt(sum(layer.sft_norm**2 for layer in layers)),
            inner=sum(layer.inner for layer in layers),
        )


_MANIFEST = TypeAdapter(Manifest)


def extract(
    base: str | Path,
    *,
    sft: str | Path,
    aux: str | Path,
    out: str | Path,
) -> Manifest:
    """Write gamma = theta_aux - theta_sft (Eq. 3) to the folder `out`, in the dtype and the files of `base`.

    What an auxiliary objective added (a projector) stays behind. Differences are taken in float32. Raises
    CapabilityError for a weight of the base that another lacks, as where their layouts differ, a shape that differs, a
    weight that is not finite, or an `out` that exists.
    """
    folders = {"base": open_weights(base), "sft": open_weights(sft), "aux": open_weights(aux)}
    names = list(folders["base"].tensors)
    for name in names:
        lacks = next((folder.path for folder in folders.values() if name not in folder.tensors), None)
        if lacks is not None:
            raise CapabilityError(
                f"{lacks} lacks {name}, which {base} has; expected runs of one base, all in the layout of one"
            )
        shapes = {who: folder.tensors[name].shape for who, folder in folders.items()}
        if len(set(shapes.values())) > 1:
            raise CapabilityError(f"{name} has shapes {shapes}; expected runs of one base")
    taking = _Taking(folders)
    with staged(Path(out)) as staging:
        write_like(folders["base"], names, staging, taking.gamma)
        hashes = {
            who: taking.hashes[who] | {n: f.hash(n) for n in f.tensors if n not in taking.hashes[who]}
            for who, f in folders.items()
        }
        manifest = Manifest(
            base_hash=root_hash(hashes["base"]),
            sft_hash=root_hash(hashes["sft"]),
            aux_hash=root_hash(hashes["aux"]),
            gamma_hash=root_hash(taking.gammas),
            recipes={who: found for who, folder in folders.items() if (found := _recipe_hash(folder.path))},
            init_states=sorted({state for folder in folders.values() for state in states_seen(folder.path)}),
            layers=taking.layers,
        )
        (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1))
    return manifest


class _Taking:
    """Differences under way, and what is found out about each weight while its rows pass."""

    def __init__(self, folders: Mapping[str, ShardFolder]) -> None:
        """`folders`: base, sft and aux, in this order."""
        self._folders = folders
        self.hashes: dict[str, dict[str, str]] = {who: {} for who in folders}
        self.gammas: dict[str, str] = {}
        self.layers: dict[str, Geometry] = {}

    def gamma(self, name: str) -> Iterator[np.ndarray]:
        """One weight's, block by block."""
        like, folders = self._folders["base"].tensors[name], self._folders
        digests = {who: TensorDigest(f.tensors[name].array_dtype, like.shape) for who, f in folders.items()}
        kept, sums = TensorDigest(like.array_dtype, like.shape), np.zeros(3)
        for parts in zip(*(folder.blocks(name) for folder in folders.values()), strict=True):
            for (who, digest), part in zip(digests.items(), parts, strict=True):
                require_finite(part, name, where=str(folders[who].path))
                digest.update(part)
            gamma, more = _difference(*parts)
            require_finite(gamma, name, where=f"{folders['aux'].path} - {folders['sft'].path}")
            kept.update(gamma)
            sums += more
            yield gamma
        for who, digest in digests.items():
            self.hashes[who][name] = digest.hexdigest()
        self.gammas[name] = kept.hexdigest()
        norms = np.sqrt(sums[:2])
        self.layers[name] = Geometry(
            gamma_norm=float(norms[0]), sft_norm=float(norms[1]), inner=float(sums[2])
        )


def _difference(base: np.ndarray, sft: np.ndarray, aux: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """aux - sft in the dtype of base, taken in float32; and its square, that of sft - base, and their product,
    summed."""
    theirs, plain, helped = (widen(array) for array in (base, sft, aux))
    taught, moved = helped - plain, plain - theirs
    pairs = ((taught, taught), (moved, moved), (taught, moved))
    return narrow(taught, base.dtype), np.array([float(np.vdot(a, b)) for a, b in pairs])


class Vector(Mapping[str, np.ndarray]):
    """A vector's tensors by weight, in the dtype that they are stored in, each read when it is asked for."""

    def __init__(self, path: str | Path, *, names: Mapping[str, str] | None = None) -> None:
        """`names`: what a network calls the weights, by what they are called on the disk; those not named keep theirs.
        Raises CapabilityError for a folder that is no vector, or an altered one."""
        self._folder = open_weights(path)
        require_intact(self._folder)
        self._stored = {(names or {}).get(name, name): name for name in self._folder.tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._folder.read(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By weight, of what is stored."""
        return {name: self._folder.tensors[stored].shape for name, stored in self._stored.items()}


def require_intact(gammas: ShardFolder) -> None:
    """Raise CapabilityError unless a vector hashes to what it says, and says how every weight of it lies."""
    manifest = read_manifest(gammas.path)
    if set(manifest.layers) != set(gammas.tensors):
        odd = sorted(set(manifest.layers) ^ set(gammas.tensors))
        raise CapabilityError(
            f"{gammas.path} is incomplete or altered: {MANIFEST} and its tensors disagree about {odd[0]}; extract it "
            "again"
        )
    held = gammas.content_hash()
    if held != manifest.gamma_hash:
        raise CapabilityError(
            f"{gammas.path} is incomplete or altered: it hashes to {held[:12]}, {MANIFEST} says "
            f"{manifest.gamma_hash[:12]}; extract it again"
        )


def read_manifest(vector: str | Path) -> Manifest:
    """What a vector says of itself. Raises CapabilityError for a folder that is none."""
    file = Path(vector) / MANIFEST
    if not file.is_file():
        raise CapabilityError(f"{vector} is no capability vector: it has no {MANIFEST}")
    try:
        content = read_json(file)
    except ValueError as error:
        raise CapabilityError(f"{file} is not a capability vector's: {error}; extract it again") from error
    if content.pop("format", None) != FORMAT:
        raise CapabilityError(f"{file} has another format, expected {FORMAT}; extract the vector again")
    try:
        # Of JSON, for strictly a list is no Sequence and an object no dataclass.
        return _MANIFEST.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CapabilityError(
            f"{file} is not a capability vector's: {where}: {first['msg']}; extract it again"
        ) from error


def _recipe_hash(weights: Path) -> str:
    recipe = recipe_of(weights)
    return hashlib.sha256(recipe.read_bytes()).hexdigest() if recipe is not None else ""


def open_weights(path: str | Path) -> ShardFolder:
    """A folder of weights. Raises CapabilityError for one that is none."""
    try:
        return ShardFolder(path)
    except ValueError as error:
        raise CapabilityError(str(error)) from error


def write_like(
    like: ShardFolder, names: list[str], folder: Path, blocks_of: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """Write these of `like`'s tensors, file by file as they lie there, as `blocks_of` gives their rows."""
    for file in like.files:
        here: dict[str, Stored] = {n: like.tensors[n] for n in names if like.tensors[n].file == file}
        if here:
            write_shard(folder / file, here, ((name, blocks_of(name)) for name in here), like.metadata[file])


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it in one rename, or nothing."""
    if out.exists():
        raise CapabilityError(f"{out} exists; name another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".staging-{out.name}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_finite(array: np.ndarray, name: str, *, where: str) -> None:
    """Raise CapabilityError counting what is not finite."""
    bad = array.size - int(is_finite(array).sum())
    if bad:
        raise CapabilityError(f"{where}: {name} has {bad} non-finite of {array.size} values")
