"""Decisions of many trajectories as tensors in memory, so that a training step only indexes rows.

Letters: D decisions in all, H W image rows and columns, L elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from policies import adapters
from policies.protocol import DecisionBatch, Policy
from trajectories.records import Trajectory

SCORE_BATCH = 64
"""Decisions encoded or scored at once where no gradient is needed."""


def stack(policy: Policy, trajectory: Trajectory) -> DecisionBatch:
    """All decisions of a trajectory. What a scripted expert did is first put into the policy's model space.

    Raises ValueError when the trajectory has no decisions.
    """
    if not trajectory.decisions:
        raise ValueError(f"trajectory {trajectory.trajectory_id} ({trajectory.cell.key}) has no decisions")
    scripted = trajectory.policy_version < 0
    chunks = [
        policy.encode(d.sample.actions) if scripted else d.sample.model_chunk for d in trajectory.decisions
    ]
    return policy.batch([d.observation for d in trajectory.decisions], chunks)


def take(batch: DecisionBatch, rows: torch.Tensor) -> DecisionBatch:
    """The rows of a batch named by an int64 index."""
    return DecisionBatch(
        agentview_BHWC=batch.agentview_BHWC[rows],
        wrist_BHWC=batch.wrist_BHWC[rows],
        proprio_BP=batch.proprio_BP[rows],
        prompt_BT=batch.prompt_BT[rows],
        prompt_mask_BT=batch.prompt_mask_BT[rows],
        chunk_BL=batch.chunk_BL[rows],
    )


def concatenate(batches: Sequence[DecisionBatch]) -> DecisionBatch:
    """Batches one after another, prompts padded to the longest."""
    longest = max(b.prompt_BT.shape[1] for b in batches)
    padding = [(0, longest - b.prompt_BT.shape[1]) for b in batches]
    return DecisionBatch(
        agentview_BHWC=torch.cat([b.agentview_BHWC for b in batches]),
        wrist_BHWC=torch.cat([b.wrist_BHWC for b in batches]),
        proprio_BP=torch.cat([b.proprio_BP for b in batches]),
        prompt_BT=torch.cat([F.pad(b.prompt_BT, p) for b, p in zip(batches, padding, strict=True)]),
        prompt_mask_BT=torch.cat([F.pad(b.prompt_mask_BT, p) for b, p in zip(batches, padding, strict=True)]),
        chunk_BL=torch.cat([b.chunk_BL for b in batches]),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    batch: DecisionBatch
    """Without pixels: images are kept as their tokens."""
    image_tokens: torch.Tensor
    reference: torch.Tensor
    """float32 [decisions, L]; zeros for demonstrations, which have no reference."""


class DecisionPool:
    """The decisions that an update may draw, with what stays constant over its steps computed once.

    Constant are the image tokens (the adapter sits on the decoder only) and the reference log-probs. Both are
    kept by trajectory id from one update to the next.
    """

    def __init__(self, policy: Policy, *, start_reference: bool) -> None:
        """`start_reference`: the reference is the policy with its adapter off, else each trajectory's recorded
        log-probs."""
        self._policy = policy
        self._start_reference = start_reference
        self._entries: dict[str, _Entry] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def hold(self, trajectories: Sequence[Trajectory]) -> None:
        """Hold exactly these; what is already there is kept, the rest dropped. Raises ValueError for a trajectory
        whose recorded chunks or log-probs do not fit the policy."""
        wanted = {t.trajectory_id: t for t in trajectories}
        self._entries = {key: self._entries.get(key) or self._entry(t) for key, t in wanted.items()}
        entries = list(self._entries.values())
        self._batch = concatenate([e.batch for e in entries])
        self._image_tokens = torch.cat([e.image_tokens for e in entries])
        self._reference = torch.cat([e.reference for e in entries])
        ends = np.cumsum([len(e.batch) for e in entries]).tolist()
        starts = [0, *ends[:-1]]
        self._rows = {
            key: torch.arange(start, end) for key, start, end in zip(self._entries, starts, ends, strict=True)
        }

    def rows(self, trajectory: Trajectory) -> torch.Tensor:
        """Row numbers, int64, of a held trajectory's decisions in order."""
        return self._rows[trajectory.trajectory_id]

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """What the policy sees, in brief: mean image token and proprioception, float32 [rows, D + 8], on the CPU."""
        seen = torch.cat([self._image_tokens[rows].mean(dim=1), self._batch.proprio_BP[rows]], dim=1)
        return seen.float().cpu()

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities under the policy as it is, float32 [rows, L], differentiable."""
        return self._policy.score(take(self._batch, rows), self._image_tokens[rows])

    def reference(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities under the reference, float32 [rows, L], constant."""
        return self._reference[rows]

    @torch.no_grad()
    def _entry(self, trajectory: Trajectory) -> _Entry:
        batch = stack(self._policy, trajectory)
        parts = [take(batch, rows) for rows in torch.arange(len(batch)).split(SCORE_BATCH)]
        tokens = [self._policy.encode_images(part) for part in parts]
        if trajectory.policy_version < 0:
            reference = torch.zeros(batch.chunk_BL.shape)
        elif self._start_reference:
            with adapters.disabled(self._policy.module):
                reference = torch.cat(
                    [self._policy.score(part, image) for part, image in zip(parts, tokens, strict=True)]
                )
        else:
            reference = _recorded(trajectory, batch)
        images = batch.agentview_BHWC[:, :0]
        return _Entry(
            batch=replace(batch, agentview_BHWC=images, wrist_BHWC=images),
            image_tokens=torch.cat(tokens),
            reference=reference.to(batch.chunk_BL.device),
        )


def _recorded(trajectory: Trajectory, batch: DecisionBatch) -> torch.Tensor:
    logps = np.stack([d.sample.logps for d in trajectory.decisions]).astype(np.float32)
    if logps.shape != tuple(batch.chunk_BL.shape) or not np.isfinite(logps).all():
        raise ValueError(
            f"trajectory {trajectory.trajectory_id}: recorded log-probs {logps.shape} must be finite and as many "
            f"as the chunks' elements, {tuple(batch.chunk_BL.shape)}"
        )
    return torch.from_numpy(logps)
