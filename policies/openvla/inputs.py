"""What stands between LIBERO and OpenVLA's network: what it is shown of an observation, and chunks as its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policies.encoding.action_tokens import ActionTokens
from policies.encoding.observations import ObservationBatch, Prompts, stack_observations
from policies.openvla.network import OpenVLA
from policies.protocol import DecisionBatch, with_chunks
from trajectories.records import ACTION_DIM, Observation


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVLAInputs:
    """Observations to the network's inputs, and chunks of K actions to L = 7 K tokens and back."""

    prompts: Prompts
    actions: ActionTokens
    chunk: int
    """K."""
    image_size: int
    """Rows and columns that the vision towers were built for, after `view`."""
    view: Callable[[np.ndarray], np.ndarray] | None = None
    """What a camera's image goes through first."""

    @property
    def tokens(self) -> int:
        """L."""
        return self.chunk * ACTION_DIM

    def stack(self, observations: Sequence[Observation], network: OpenVLA) -> ObservationBatch:
        """As the network sees them, on its device. Raises ValueError naming the first that does not fit."""
        return stack_observations(
            observations,
            self.prompts,
            image_size=self.image_size,
            cameras=network.cameras,
            view=self.view,
            device=network.language_model.device,
        )

    def batch(
        self, observations: Sequence[Observation], chunks: Sequence[np.ndarray], network: OpenVLA
    ) -> DecisionBatch:
        """Stack observations and chunks int64 [L]; ValueError for one of another length or vocabulary."""
        if len(chunks) != len(observations):
            raise ValueError(f"{len(observations)} observations need as many chunks, got {len(chunks)}")
        for i, chunk in enumerate(chunks):
            if chunk.shape != (self.tokens,):
                raise ValueError(
                    f"chunk {i} has shape {list(chunk.shape)}, expected [{self.tokens}] token ids"
                )
            self.actions.check(chunk)
        seen = self.stack(observations, network)
        return with_chunks(seen, torch.from_numpy(np.stack(chunks)).to(seen.prompt_BT.device, torch.int64))

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7] in [-1, 1] -> token ids int64 [L], each the nearest bin. ValueError for a chunk of
        another length."""
        ids = self.actions.encode(actions)
        if ids.shape != (self.tokens,):
            raise ValueError(f"a chunk is {self.chunk} actions, got {len(actions)}")
        return ids
