"""What a policy is, whatever its paradigm: it acts, scores, and loads weights, and turns observations and actions
into what it scores. A new paradigm is one file that meets this Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trajectories.records import ActionSample, Observation, WeightSnapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionBatch:
    """B decisions as tensors, ready to score. Model-space chunks only; executed actions never come here.

    Letters: B decisions, H W image rows and columns, T prompt tokens (right-padded), L elements of a chunk.
    """

    agentview_BHWC: torch.Tensor
    """uint8."""
    wrist_BHWC: torch.Tensor
    """uint8."""
    proprio_BP: torch.Tensor
    """float32 [B, 8]."""
    prompt_BT: torch.Tensor
    """int64 token ids."""
    prompt_mask_BT: torch.Tensor
    """bool, true at real tokens."""
    chunk_BL: torch.Tensor
    """int64 token ids as sampled (for flow: float32 [B, K, A])."""

    def __len__(self) -> int:
        return self.agentview_BHWC.shape[0]


class Policy(Protocol):
    """Observation -> action chunk, and the chunk's log-probability."""

    module: torch.nn.Module
    """The network; adapters wrap it, snapshots fill it."""

    def act(
        self, observations: Sequence[Observation], *, seeds: Sequence[int], temperature: float
    ) -> list[ActionSample]:
        """Sample one chunk per observation. `seeds[i]` alone fixes the random draws of request i, whatever it is
        batched with. Temperature 0 is greedy."""
        ...

    def batch(self, observations: Sequence[Observation], chunks: Sequence[np.ndarray]) -> DecisionBatch:
        """Stack observations and model-space chunks on the policy's device."""
        ...

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Environment-space actions float [K, 7] -> model-space chunk (for demonstrations)."""
        ...

    def encode_images(self, batch: DecisionBatch) -> torch.Tensor:
        """Image tokens [B, N, D] for `score`, of the batch's two images alone: constant while only the decoder
        is adapted, so they may be computed once per decision and kept."""
        ...

    def score(self, batch: DecisionBatch, image_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Per-element log-probabilities at temperature 1, float32 [B, L], differentiable. Exact for tokens.

        With `image_tokens` from `encode_images` the batch's images are not looked at.
        """
        ...

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in. Raises ValueError naming the first missing, extra or mis-shaped tensor."""
        ...
