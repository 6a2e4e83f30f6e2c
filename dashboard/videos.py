"""A success and a failure from the same initial state, side by side: as a video, and as a strip of stills.

A frame is what the policy saw at one decision (agentview), so a video steps once per action chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dashboard.run_folder import Episode, Run
from trajectories.codec import load_trajectory
from trajectories.records import Trajectory

FRAMES_PER_SECOND = 5
HOLD_FRAMES = 5
"""Frames for which the end of the longer episode stays."""
PANEL = 320
"""Side of an upscaled camera image, pixels."""
HEADER, CAPTION, GAP = 48, 32, 16
"""Heights of the title and of the label over each image, and the space between images, pixels. Width and height of
a frame come out as multiples of 16, which H.264 wants."""
STRIP_STILLS = 6
STRIP_PANEL = 144
COLOURS = {True: (0, 114, 178), False: (213, 94, 0)}
"""Blue for the success, vermillion for the failure; the words say it too."""
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A success and a clean failure of the same task from the same initial state."""

    success: Trajectory
    failure: Trajectory

    @property
    def name(self) -> str:
        cell = self.success.cell
        return f"{cell.suite}-task{cell.task_id}-state{cell.init_state}"

    @property
    def title(self) -> str:
        cell = self.success.cell
        instruction = self.success.decisions[0].observation.instruction
        return f"{instruction}  (task {cell.task_id}, initial state {cell.init_state})"

    @property
    def sides(self) -> tuple[Trajectory, Trajectory]:
        return self.success, self.failure


def find_contrasts(run: Run, limit: int) -> list[Contrast]:
    """One contrast for each of the first `limit` tasks that have one among the stored trajectories.

    Two episodes under the same weights are preferred: then the sampling alone makes the difference.
    """
    stored = stored_trajectories(run.folder)
    contrasts: list[Contrast] = []
    for task in run.tasks():
        chosen = _closest(
            [e for e in run.episodes if e.task == task and e.success and e.trajectory_id in stored],
            [
                e
                for e in run.episodes
                if e.task == task and e.outcome == "timeout" and e.trajectory_id in stored
            ],
        )
        if chosen is not None and len(contrasts) < limit:
            success, failure = (load_trajectory(stored[episode.trajectory_id]) for episode in chosen)
            contrasts.append(Contrast(success=success, failure=failure))
    return contrasts


def task_instructions(run: Run) -> Mapping[tuple[str, int], str]:
    """(suite, task id) -> the instruction, for every task with a stored trajectory."""
    stored = stored_trajectories(run.folder)
    found: dict[tuple[str, int], str] = {}
    for episode in run.episodes:
        if episode.task not in found and episode.outcome != "fault" and episode.trajectory_id in stored:
            first = load_trajectory(stored[episode.trajectory_id]).decisions[0]
            found[episode.task] = first.observation.instruction
    return found


def stored_trajectories(folder: Path) -> Mapping[str, Path]:
    """Trajectory id -> its file, for every file of the run's store."""
    return {
        path.name.split(".")[0]: path for path in sorted(folder.glob("trajectories/**/*")) if path.is_file()
    }


def _closest(successes: list[Episode], failures: list[Episode]) -> tuple[Episode, Episode] | None:
    """The pair from one initial state whose policy versions are nearest; among those, the earliest state."""
    pairs = [(s, f) for s in successes for f in failures if s.cell.init_state == f.cell.init_state]
    return min(
        pairs,
        key=lambda pair: (abs(pair[0].policy_version - pair[1].policy_version), pair[0].cell.init_state),
        default=None,
    )


def write_video(contrast: Contrast, path: Path) -> int:
    """Writes the side-by-side video (H.264, yuv420p). Returns its number of frames: the decisions of the longer
    episode and HOLD_FRAMES more. The shorter one holds its last frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (2 * PANEL + 3 * GAP, HEADER + CAPTION + PANEL + GAP)
    writer = imageio_ffmpeg.write_frames(
        str(path), size, fps=FRAMES_PER_SECOND, codec="libx264", pix_fmt_out="yuv420p"
    )
    writer.send(None)
    count = 0
    for frame in _frames(contrast, size):
        writer.send(frame.tobytes())
        count += 1
    writer.close()
    return count


def _frames(contrast: Contrast, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] frames of the video; size is (W, H)."""
    for index in range(max(len(side.decisions) for side in contrast.sides) + HOLD_FRAMES):
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        _fitted_text(draw, contrast.title, box=(GAP, 0, size[0] - GAP, HEADER), size=18, fill=INK)
        for place, side in enumerate(contrast.sides):
            left = GAP + place * (PANEL + GAP)
            bar = (left, HEADER, left + PANEL - 1, HEADER + CAPTION - 1)
            draw.rectangle(bar, fill=COLOURS[side.success])
            inside = (left + 8, bar[1], left + PANEL - 8, bar[3])
            _fitted_text(draw, _caption(side, index), box=inside, size=16, fill=PAPER)
            image.paste(_still(side, index, PANEL), (left, HEADER + CAPTION))
        yield np.asarray(image)


def _caption(side: Trajectory, index: int) -> str:
    """What the label says while decision `index` is shown; past the last one, how the episode ended."""
    if index >= len(side.decisions):
        ended = "success" if side.success else "no success"
        return f"{ended} after {side.env_steps} steps, version {side.policy_version}"
    step = sum(decision.executed for decision in side.decisions[:index])
    kind = "success" if side.success else "failure"
    return f"{kind}: step {step} of {side.env_steps}, version {side.policy_version}"


def _still(side: Trajectory, index: int, size: int) -> Image.Image:
    """The camera image at decision `index`, or the last one, upscaled to size x size."""
    decision = side.decisions[min(index, len(side.decisions) - 1)]
    return Image.fromarray(decision.observation.agentview).resize((size, size), Image.Resampling.BICUBIC)


def _fitted_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    *,
    box: tuple[int, int, int, int],
    size: int,
    fill: tuple[int, int, int],
) -> None:
    """Draws text left-aligned and vertically centred in the box, smaller where it would not fit."""
    left, top, right, bottom = box
    font = ImageFont.load_default(size)
    while size > 9 and draw.textlength(text, font=font) > right - left:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text((left, (top + bottom) / 2), text, font=font, fill=fill, anchor="lm")


def write_strip(contrast: Contrast, path: Path) -> None:
    """Writes a PNG with stills of both episodes at the same decisions: evenly spaced over the longer one, and the
    last of the shorter one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shorter, longer = sorted(len(side.decisions) for side in contrast.sides)
    even = np.linspace(0, longer - 1, min(STRIP_STILLS, longer)).round().astype(int)
    columns = np.unique([*even, shorter - 1])
    row, label = STRIP_PANEL + 24, 92
    width = label + len(columns) * (STRIP_PANEL + 6) + 6
    image = Image.new("RGB", (width, HEADER + 2 * row), PAPER)
    draw = ImageDraw.Draw(image)
    _fitted_text(draw, contrast.title, box=(8, 0, width - 8, HEADER), size=18, fill=INK)
    for place, side in enumerate(contrast.sides):
        top, colour = HEADER + place * row, COLOURS[side.success]
        draw.rectangle((0, top, label - 6, top + STRIP_PANEL), fill=colour)
        kind = "success" if side.success else "failure"
        for line, text in enumerate((kind, f"version {side.policy_version}", f"{side.env_steps} steps")):
            box = (8, top + 12 + 22 * line, label - 10, top + 34 + 22 * line)
            _fitted_text(draw, text, box=box, size=16 if line == 0 else 13, fill=PAPER)
        for number, index in enumerate(columns):
            left = label + number * (STRIP_PANEL + 6)
            still = _still(side, int(index), STRIP_PANEL)
            over = index >= len(side.decisions)
            image.paste(
                Image.blend(still, Image.new("RGB", still.size, PAPER), 0.6) if over else still, (left, top)
            )
            step = sum(decision.executed for decision in side.decisions[:index])
            under = (left, top + STRIP_PANEL, left + STRIP_PANEL, top + row)
            _fitted_text(draw, "ended" if over else f"step {step}", box=under, size=12, fill=INK)
    image.save(path)
