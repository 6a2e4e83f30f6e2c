"""What the cameras saw in a stored episode, as one picture of many small ones.

A sheet of JPEG stills needs no codec of the browser's: a canvas draws one still after another, so that two episodes run
in step, stop, and are searched alike in every browser.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from trajectories.codec import load_trajectory
from trajectories.records import Trajectory

COLUMNS = 12
"""Stills in a row of the sheet."""
MOST_STILLS = 144
"""Longer episodes are shown at as many decisions, evenly spaced."""
MOST_PIXELS = 256
"""Side of a still at most."""
SHEETS = 16
"""Sheets held in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One episode's stills, row by row, agentview above wrist camera: two blocks of the same layout."""

    jpeg: bytes
    size: int
    """Side of a still, pixels."""
    steps: tuple[int, ...]
    """Simulator step at which each still was seen."""
    env_steps: int
    instruction: str

    def describe(self) -> dict[str, object]:
        """What the page needs to draw it."""
        return {
            "size": self.size,
            "columns": COLUMNS,
            "steps": list(self.steps),
            "env_steps": self.env_steps,
            "instruction": self.instruction,
        }


def sheet_of(trajectory: Trajectory) -> Sheet:
    """The sheet of an episode with at least one decision."""
    decisions = trajectory.decisions
    shown = np.unique(
        np.linspace(0, len(decisions) - 1, min(len(decisions), MOST_STILLS)).round().astype(int)
    )
    starts = np.cumsum([0, *(decision.executed for decision in decisions)])
    size = min(decisions[0].observation.agentview.shape[0], MOST_PIXELS)
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * size, 2 * rows * size))
    for place, index in enumerate(shown):
        seen = decisions[index].observation
        left, top = place % COLUMNS * size, place // COLUMNS * size
        for camera, offset in ((seen.agentview, 0), (seen.wrist, rows * size)):
            sheet.paste(Image.fromarray(camera).resize((size, size)), (left, top + offset))
    data = io.BytesIO()
    # Without chroma subsampling: it smears the small images of tiny policies.
    sheet.save(data, "JPEG", quality=90, subsampling=0)
    return Sheet(
        jpeg=data.getvalue(),
        size=size,
        steps=tuple(int(starts[index]) for index in shown),
        env_steps=trajectory.env_steps,
        instruction=decisions[0].observation.instruction,
    )


class Sheets:
    """The sheets of a run's stored episodes, made when first asked for; the last few are held. For several threads."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the run folder."""
        self._folder = folder / "trajectories"
        self._held: OrderedDict[str, Sheet] = OrderedDict()
        self._lock = Lock()

    def stored(self, trajectory_id: str) -> bool:
        """Whether the episode's file is there."""
        return self._path(trajectory_id).is_file()

    def sheet(self, trajectory_id: str) -> Sheet:
        """One episode's sheet.

        Raises:
            OSError: there is no such episode.
            CodecError: its file is damaged.
            ValueError: it holds no decision.
        """
        with self._lock:
            if trajectory_id not in self._held:
                trajectory = load_trajectory(self._path(trajectory_id))
                if not trajectory.decisions:
                    raise ValueError(f"{trajectory_id} holds no decision")
                self._held[trajectory_id] = sheet_of(trajectory)
                if len(self._held) > SHEETS:
                    self._held.popitem(last=False)
            self._held.move_to_end(trajectory_id)
            return self._held[trajectory_id]

    def _path(self, trajectory_id: str) -> Path:
        return self._folder / f"{trajectory_id}.trajectory"
