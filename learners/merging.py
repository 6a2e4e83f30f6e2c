"""Weights that a fine-tuning begins with: a base, plus some of a capability vector of its own (CapVector, Eq. 4)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from learners import checkpoint
from learners.capability import (
    CapabilityError,
    Manifest,
    open_weights,
    read_manifest,
    require_finite,
    require_intact,
    staged,
    write_like,
)
from learners.lineage import MERGED, STATES, read_origin, recipe_of, states_seen
from policies.weights.shards import ShardFolder
from trajectories.bfloat16 import narrow, widen
from trajectories.hashing import TensorDigest, root_hash

ALPHA = 1.1
"""How much of a vector the paper adds."""


def merge(base: str | Path, vector: str | Path, *, alpha: float, out: str | Path) -> str:
    """Write theta_meta = theta_pre + alpha gamma (Eq. 4) to the folder `out`, with `base`'s dtypes, files and
    whatever else lies in its folder; returns its content hash.

    Sums are taken in float32 and cast once. With alpha 0 the weights are those of `base` to the bit. Raises
    CapabilityError for a vector of another base, an alpha or a result that is not finite, or an `out` that exists or
    lies in `base`.
    """
    _require_finite(alpha)
    theirs, gammas, out = open_weights(base), open_weights(vector), Path(out)
    if out.resolve().is_relative_to(theirs.path.resolve()):
        raise CapabilityError(f"{out} lies in {base}, which is copied there; name a folder elsewhere")
    manifest = _require_base(theirs, gammas.path)
    require_intact(gammas)
    hashes: dict[str, str] = {}

    def merged(name: str) -> Iterator[np.ndarray]:
        stored = theirs.tensors[name]
        digest = TensorDigest(stored.array_dtype, stored.shape)
        added = gammas.blocks(name) if alpha and name in gammas.tensors else None
        for block in theirs.blocks(name):
            if added is not None:
                block = _added(block, next(added), alpha)
                require_finite(block, name, where=f"{base} + {alpha:g} {vector}")
            digest.update(block)
            yield block
        hashes[name] = digest.hexdigest()

    with staged(out) as staging:
        own = (theirs.path / checkpoint.METADATA).is_file()
        replaced = (*theirs.files, *((checkpoint.MANIFEST,) if own else ()))
        shutil.copytree(
            theirs.path,
            staging,
            dirs_exist_ok=True,
            ignore=lambda folder, _: replaced if Path(folder) == theirs.path else (),
        )
        write_like(theirs, list(theirs.tensors), staging, merged)
        said = {
            "merged_hash": root_hash(hashes),
            "base_hash": manifest.base_hash,
            "gamma_hash": manifest.gamma_hash,
            "alpha": alpha,
            STATES: sorted({*states_seen(base), *manifest.init_states}),
        }
        (staging / MERGED).write_text(json.dumps(said, indent=1))
        if own:  # a run's own checkpoint: so is what comes of it
            checkpoint.seal(staging, sequence=1)
    return root_hash(hashes)


def merged_once(base: str | Path, vector: str | Path, *, alpha: float, root: str | Path) -> Path:
    """The folder below `root` that holds theta_pre + alpha gamma, made unless it is there; see `merge`, whose refusals
    hold either way. It lies as a run's start does, beside the recipe of `base`'s run where that is one's."""
    _require_finite(alpha)
    manifest = read_manifest(vector)
    _require_base(open_weights(base), Path(vector))
    run = Path(root) / f"meta-{manifest.base_hash[:8]}-{manifest.gamma_hash[:8]}-{alpha!r}"
    out = run / "checkpoints" / "start"
    if (recipe := recipe_of(base)) is not None:  # first: weights without it would pass for nobody's
        run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe, run / recipe.name)
    if out.exists():
        require_intact(open_weights(vector))
        if not descends(out, vector):
            raise CapabilityError(f"{out} is not {base} + {alpha:g} {vector}; remove it, to have it merged")
    else:
        merge(base, vector, alpha=alpha, out=out)
    return out


def descends(weights: str | Path, vector: str | Path) -> bool:
    """Whether a vector is of these weights: they are its base, or were merged from that and from the vector itself.

    Raises CapabilityError for merged weights that are not, or do not say, what they were when they were merged.
    """
    manifest, held = read_manifest(vector), open_weights(weights)
    file = held.path / MERGED
    content = held.content_hash()
    if content == manifest.base_hash:
        return True
    if not file.is_file():
        return False
    try:
        said = read_origin(file)
        merged, of = said["merged_hash"], (said["base_hash"], said["gamma_hash"])
    except (KeyError, ValueError) as error:
        raise CapabilityError(f"{file} does not say what was merged ({error}); merge again") from error
    if content != merged:
        raise CapabilityError(f"{weights} is not what {MERGED} says was merged there; merge again")
    return of == (manifest.base_hash, manifest.gamma_hash)


def _added(base: np.ndarray, gamma: np.ndarray, alpha: float) -> np.ndarray:
    """base + alpha gamma, in float32, cast once."""
    with np.errstate(over="ignore", invalid="ignore"):
        return narrow(widen(base) + np.float32(alpha) * widen(gamma), base.dtype)


def _require_finite(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise CapabilityError(f"alpha is {alpha}, expected a finite number; the paper's is {ALPHA}")


def _require_base(base: ShardFolder, vector: Path) -> Manifest:
    manifest = read_manifest(vector)
    found = base.content_hash()
    if found != manifest.base_hash:
        raise CapabilityError(
            f"{vector} was extracted from the base {manifest.base_hash[:12]}, {base.path} is {found[:12]}; merge it "
            "into the one it came from"
        )
    return manifest
