"""The frozen records that travel between rooms.

Letters: H, W image rows and columns; K actions per chunk; A = 7 action dimensions; L model-space elements of
a chunk (K * A tokens for the autoregressive policy).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

ACTION_DIM = 7
"""6 OSC_POSE deltas (x, y, z, roll, pitch, yaw) and the gripper (+1 closes), all in [-1, 1]."""
PROPRIO_DIM = 8
"""End-effector position (3, metres), orientation as axis-angle (3, radians), finger positions (2, metres)."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """One episode to run: which task, from which initial state, with which sampling seed.

    The seed fixes every random draw of the episode (fixture placement, policy sampling), so two policies run
    on the same cell are a matched pair for McNemar's test.
    """

    suite: str
    """LIBERO suite, e.g. `libero_object`."""
    task_id: int
    """Index in the suite's official order."""
    init_state: int
    """Index into the task's 50 official initial states."""
    seed: int
    """Sampling seed, >= 0."""

    @property
    def key(self) -> str:
        """Stable text form, e.g. `libero_object/3/17/0`."""
        return f"{self.suite}/{self.task_id}/{self.init_state}/{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the policy sees at one decision."""

    agentview: np.ndarray
    """uint8 [H, W, 3], RGB, upright (row 0 is the top)."""
    wrist: np.ndarray
    """uint8 [H, W, 3], RGB, upright."""
    proprio: np.ndarray
    """float32 [8]; see PROPRIO_DIM."""
    instruction: str
    """The task in words, as LIBERO names it."""
    depth: np.ndarray | None = None
    """float32 [H, W], metres along the agentview camera's axis: a training target that no policy sees, drawn with
    demonstrations where an objective asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionSample:
    """A policy's answer to one observation."""

    actions: np.ndarray
    """float32 [K, 7], environment units, each in [-1, 1]."""
    model_chunk: np.ndarray
    """What a score is taken on: int64 [L] token ids exactly as sampled; for flow float32 [A H], the H >= K actions that
    were made at once, as executed or as they would have been."""
    logps: np.ndarray
    """float32 [L], log-probability of each element under the served weights at temperature 1. Sums to
    log pi(chunk | observation)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One observation and the chunk that was run open-loop from it."""

    observation: Observation
    sample: ActionSample
    executed: int
    """How many of the K actions were executed, 1..K (fewer when the episode ended inside the chunk)."""


Outcome = Literal["success", "timeout", "fault"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One finished episode. Identified by its cell and the weights that drove it."""

    cell: Cell
    decisions: tuple[Decision, ...]
    outcome: Outcome
    """`success`: goal predicate held; `timeout`: step limit reached; `fault`: simulator or policy misbehaved.
    A fault is counted and kept for inspection, and never pairs."""
    fault: str = ""
    """Why, when outcome is `fault`."""
    env_steps: int
    """Simulator steps driven by the policy (settling steps not counted)."""
    policy_version: int
    """Version of the weights that made every decision; -1 for a scripted expert."""
    policy_hash: str
    """Content hash of those weights."""

    @property
    def success(self) -> bool:
        return self.outcome == "success"

    @property
    def trajectory_id(self) -> str:
        """Deterministic name: running a cell again under the same weights gives the same id, so a retry after a
        crash is stored once."""
        text = f"{self.cell.key}@{self.policy_version}:{self.policy_hash}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """A success and a failure from the same suite, task and initial state."""

    chosen: Trajectory
    rejected: Trajectory

    def __post_init__(self) -> None:
        a, b = self.chosen.cell, self.rejected.cell
        if (a.suite, a.task_id, a.init_state) != (b.suite, b.task_id, b.init_state):
            raise ValueError(f"a pair must share suite, task and initial state, got {a.key} and {b.key}")
        if self.chosen.outcome != "success" or self.rejected.outcome != "timeout":
            raise ValueError(
                "a pair is a success and a clean failure, got "
                f"chosen={self.chosen.outcome}, rejected={self.rejected.outcome}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """A trained low-rank adapter, relative to a base named by its hash.

    Example: `factors["decoder.layers.0.self_attn.q_proj"]` holds `A` float32 [r, in], `B` float32 [out, r] and,
    for DoRA, `m` float32 [out].
    """

    method: Literal["lora", "dora"]
    scaling: float
    """alpha / rank."""
    base_hash: str
    factors: Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSnapshot:
    """Merged weights, ready to serve."""

    version: int
    """Only rises; 0 is the supervised start."""
    content_hash: str
    """Hash of the merged tensors (`trajectories.hashing`), the same whoever computes it."""
    tensors: Mapping[str, np.ndarray]
    """Parameter name -> merged array, in the dtype that is served."""
