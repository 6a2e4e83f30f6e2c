"""What stands between LIBERO and a flow network: what it is shown of an observation, and its own scale of actions.

Letters: B decisions, T prompt tokens, S state dimensions, H actions that the network makes at once, A = 7 dimensions of
an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from configs.policy import FlowPart
from policies.encoding.observations import PROPRIO_MEAN, PROPRIO_STD, ObservationBatch, stack_observations
from policies.encoding.prompts import PromptTokenizer
from policies.pi0.folder import Pi0Folder
from policies.pi0.norm_stats import normalise, pad_dims
from policies.pi0.preprocessing import STATE_BINS, pi0_view
from trajectories.records import ACTION_DIM, Observation

STATE_REACH = 3.0
"""Standard deviations of proprioception that the words cover."""


class FlowInputs(Protocol):
    """Observations to a network's inputs, and chunks between LIBERO's units and the network's."""

    def stack(self, observations: Sequence[Observation], device: torch.device) -> ObservationBatch:
        """Both cameras as the network takes them, uint8, and prompts. Raises ValueError naming the first observation
        that does not fit."""
        ...

    def prompt(self, seen: ObservationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 [B, T] and which are real, bool [B, T], with the state where the prompt tells it."""
        ...

    def state(self, seen: ObservationBatch) -> torch.Tensor | None:
        """The expert's state token, float32 [B, S]; None for pi-0.5, which has none."""
        ...

    def to_model(self, actions_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        """LIBERO's actions on the network's scale, float32 [B, H, 7]."""
        ...

    def from_model(self, chunks_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        """The inverse of `to_model`, neither clipped nor with a gripper that is open or closed."""
        ...


class PlainInputs:
    """Inputs of the small networks made here: images of their own size, a vocabulary of words, and LIBERO's actions,
    which lie in [-1, 1], as they are."""

    def __init__(
        self, prompts: PromptTokenizer, *, image_size: int, adaptive: bool, state_in_prompt: bool
    ) -> None:
        """`adaptive` is pi-0.5, whose state is STATE_BINS words before the prompt's, or nowhere."""
        self._prompts = prompts
        self._image_size = image_size
        self._adaptive = adaptive
        self._state_in_prompt = state_in_prompt

    def stack(self, observations: Sequence[Observation], device: torch.device) -> ObservationBatch:
        return stack_observations(observations, self._prompts, image_size=self._image_size, device=device)

    def prompt(self, seen: ObservationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        prompt_BT, mask_BT = seen.prompt_BT, seen.prompt_mask_BT
        if self._adaptive and self._state_in_prompt:
            words_BS = self._prompts.size + self._bins(seen)
            prompt_BT = torch.cat([words_BS, prompt_BT], dim=1)
            mask_BT = torch.cat([torch.ones_like(words_BS).bool(), mask_BT], dim=1)
        return prompt_BT, mask_BT

    def state(self, seen: ObservationBatch) -> torch.Tensor | None:
        """Standardised proprioception [B, 8], for pi-0."""
        if self._adaptive:
            return None
        mean_S, std_S = _proprio_scale(seen)
        return (seen.proprio_BP - mean_S) / std_S

    def to_model(self, actions_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        return actions_BHA

    def from_model(self, chunks_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        return chunks_BHA

    def _bins(self, seen: ObservationBatch) -> torch.Tensor:
        """Proprioception as pi-0.5 reads it: each number one of STATE_BINS words, int64 [B, 8]."""
        mean_S, std_S = _proprio_scale(seen)
        unit = ((seen.proprio_BP - mean_S) / (STATE_REACH * std_S)).clamp(-1, 1)
        return ((unit + 1) / 2 * STATE_BINS).long().clamp(max=STATE_BINS - 1)


def _proprio_scale(seen: ObservationBatch) -> tuple[torch.Tensor, torch.Tensor]:
    device = seen.proprio_BP.device
    return torch.tensor(PROPRIO_MEAN, device=device), torch.tensor(PROPRIO_STD, device=device)


class PublishedInputs:
    """Inputs of published pi-0 and pi-0.5: images turned and padded as in their training, PaliGemma's words, and both
    states and actions scaled by a data set's statistics."""

    def __init__(self, found: Pi0Folder, part: FlowPart) -> None:
        """Of `part`: `state_in_prompt`, pi-0.5 is told its state (openpi's `discrete_state_input`), as `state_words`
        numbers; `delta_actions`, the six dimensions of motion are less the state's first six (openpi's
        `extra_delta_transform`)."""
        self._found = found
        self._adaptive = found.config.adaptive
        self._state_in_prompt = part.state_in_prompt and found.config.adaptive
        self._state_words = part.state_words
        self._delta_actions = part.delta_actions
        self._centre_A, self._half_A = (
            torch.tensor(values, dtype=torch.float32)
            for values in found.stats["actions"].affine(quantile=self._adaptive, dims=ACTION_DIM)
        )

    def stack(self, observations: Sequence[Observation], device: torch.device) -> ObservationBatch:
        side = self._found.config.vision.image
        return stack_observations(
            observations,
            _Told(self, observations),
            image_size=side,
            view=partial(pi0_view, side=side),
            device=device,
        )

    def prompt(self, seen: ObservationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return seen.prompt_BT, seen.prompt_mask_BT

    def state(self, seen: ObservationBatch) -> torch.Tensor | None:
        if self._adaptive:
            return None
        state = pad_dims(self.scaled_state(seen.proprio_BP.cpu().numpy()), self._found.config.state_dim)
        return torch.from_numpy(state.astype(np.float32)).to(seen.proprio_BP.device)

    def to_model(self, actions_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        centre_A, half_A = self._centre_A.to(actions_BHA.device), self._half_A.to(actions_BHA.device)
        return (actions_BHA - self._origin(seen) - centre_A) / half_A

    def from_model(self, chunks_BHA: torch.Tensor, seen: ObservationBatch) -> torch.Tensor:
        centre_A, half_A = self._centre_A.to(chunks_BHA.device), self._half_A.to(chunks_BHA.device)
        return chunks_BHA * half_A + centre_A + self._origin(seen)

    def scaled_state(self, proprio: np.ndarray) -> np.ndarray:
        """Proprioception [..., 8] by the data set's statistics."""
        return normalise(proprio, self._found.stats["state"], quantile=self._adaptive)

    def told(self, observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Their prompts' ids int64 [B, T] and mask bool [B, T]."""
        words = [seen.instruction for seen in observations]
        states = None
        if self._state_in_prompt:
            states = [pad_dims(self.scaled_state(seen.proprio), self._state_words) for seen in observations]
        return self._found.prompts.stack(words, states, adaptive=self._adaptive)

    def _origin(self, seen: ObservationBatch) -> torch.Tensor:
        """What actions are counted from, [B, 1, 7]: zero, or the state's pose with a gripper of zero."""
        if not self._delta_actions:
            return seen.proprio_BP.new_zeros(len(seen.proprio_BP), 1, ACTION_DIM)
        return F.pad(seen.proprio_BP[:, : ACTION_DIM - 1], (0, 1)).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class _Told:
    """Meets `Prompts` for these very observations: pi-0.5's prompts depend on their states."""

    inputs: PublishedInputs
    observations: Sequence[Observation]

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs.told(self.observations)
