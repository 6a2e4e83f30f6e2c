"""Where LIBERO's asset folder (models, meshes, textures) comes from."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

AssetKind = Literal["explicit", "cache", "hub", "stand-in"]

ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


@dataclass(frozen=True, kw_only=True)
class ResolvedAssets:
    """An asset folder that is ready to use.

    Attributes:
        path: absolute folder holding `scenes/`, `articulated_objects/` and the other families.
        kind: where it was found; results on "stand-in" are never comparable with published tables.
        digest: 16 hex digits naming the content (see `pack_digest`).
    """

    path: Path
    kind: AssetKind
    digest: str


def pack_digest(folder: Path) -> str:
    """16 hex digits over every model file's text and every other file's relative path and size.

    Meshes and textures are named by size only: a full pack is large, and this runs in every process.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts):
        digest.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}\n".encode())
        if path.suffix == ".xml":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def resolve_assets(explicit: str | None) -> ResolvedAssets:
    """Find LIBERO's assets.

    Raises:
        FileNotFoundError: `explicit` does not exist or is not an asset folder.
    """
    if explicit is not None:
        return _resolved(_explicit_folder(explicit), "explicit")
    raise FileNotFoundError("no LIBERO assets: name a folder in environment.assets")


def _explicit_folder(explicit: str) -> Path:
    folder = Path(explicit).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"environment.assets={explicit!r} is not a folder; expected LIBERO's asset folder, "
            "or leave it out to use the cache, the Hub or the stand-ins"
        )
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"environment.assets={explicit!r} is not a LIBERO asset folder: it has no {', '.join(missing)}; "
            "expected the folder that holds scenes/, textures/ and the object families"
        )
    return folder


def _resolved(path: Path, kind: AssetKind) -> ResolvedAssets:
    assets = ResolvedAssets(path=path, kind=kind, digest=pack_digest(path))
    logger.info("LIBERO assets: %s, %s (digest %s)", assets.kind, assets.path, assets.digest)
    return assets
