"""What a policy is, whatever its paradigm: it acts, scores, and loads weights, and turns observations and actions
into what it scores. A new paradigm is one file that meets this Protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from policies.encoding.observations import ObservationBatch
from trajectories.records import ActionSample, Observation, WeightSnapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionBatch(ObservationBatch):
    """B decisions as tensors, ready to score. Model-space chunks only.

    Letters: as `ObservationBatch`, and L elements of a chunk.
    """

    chunk_BL: torch.Tensor
    """int64 token ids as sampled, or for flow matching float32 actions as executed, step by step, to the end of what
    the network makes at once."""

    def __len__(self) -> int:
        return self.agentview_BHWC.shape[0]


def with_chunks(seen: ObservationBatch, chunk_BL: torch.Tensor) -> DecisionBatch:
    """Observations and what was decided on them."""
    parts = {field.name: getattr(seen, field.name) for field in fields(ObservationBatch)}
    return DecisionBatch(**parts, chunk_BL=chunk_BL)


def check_requests(observations: Sequence[Observation], seeds: Sequence[int], temperature: float) -> None:
    """Raises ValueError for what no policy can `act` on: another number of seeds than of observations, or a temperature
    below 0."""
    if len(seeds) != len(observations):
        raise ValueError(f"{len(observations)} observations need as many seeds, got {len(seeds)}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")


class Policy(Protocol):
    """Observation -> action chunk, and the chunk's log-probability."""

    module: torch.nn.Module
    """The network; adapters wrap it, snapshots fill it."""
    exact: bool
    """True: `score` is the log-probability itself, and `act` records it. False: it is a surrogate, estimated from
    noise, and `act` records none."""
    tokens: int
    """L, elements of a score; a flow's chunk may be longer."""
    adapted: tuple[str, ...]
    """Names of the decoders in `module` whose attention and MLP linears an adapter goes on."""

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

    def encode_context(self, batch: DecisionBatch) -> torch.Tensor:
        """What `score` needs of the images, and an adapter on `adapted` leaves alone, [B, N, D]: one row a token. It
        may be computed once per decision and kept."""
        ...

    def score(
        self,
        batch: DecisionBatch,
        context: torch.Tensor | None = None,
        *,
        noise_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probabilities at temperature 1, float32 [B, L], differentiable, by element: a token or, for flow
        matching, one dimension of one action. Their sum is the chunk's log-probability or its surrogate.

        `noise_keys` int64 [B] (>= 0) fix a surrogate's noise row by row, whatever a row is batched with: the same key
        under policy and reference, or on two chunks, is the same noise. Exact scores have none.
        With `context` from `encode_context` the batch's images are not looked at.
        """
        ...

    def sft_loss(
        self, batch: DecisionBatch, context: torch.Tensor | None = None, *, noise_keys: torch.Tensor
    ) -> torch.Tensor:
        """The paradigm's supervised training loss, mean over the batch; `context` and `noise_keys` as in `score`."""
        ...

    def calibrate(self, batches: Iterable[DecisionBatch]) -> dict[str, float]:
        """Choose the scale that puts a surrogate in nats, from decisions that the policy as it is takes well; what was
        measured and chosen, for the log. An exact score has none."""
        ...

    def take_calibration(self, said: Mapping[str, float]) -> None:
        """Choose the scale that `calibrate` chose when it said this."""
        ...

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in. Raises ValueError naming the first missing, extra or mis-shaped tensor."""
        ...
