"""The parallel token policy: every token of a chunk is predicted in one pass, and its log-probability is exact.

OpenVLA-OFT (arXiv 2502.19645) with the token head instead of regression, as reinforcement learning uses it
(SimpleVLA-RL, arXiv 2509.09674). Behind the prompt stand L places whose embedding is zero, and the stop token; every
token sees every other. Element l is read, as in OpenVLA, at the token before it. No element sees what another came to
be, so a chunk's log-probability is the sum of theirs. As in the token policy the distribution is over the action tokens
alone.

Letters: B decisions, T prompt tokens, S tokens of images, proprioception and prompt, N with the places and the stop
token, L tokens of a chunk, V action bins, D decoder width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from policies.decoding.engine import gumbel_noise, token_logps
from policies.decoding.prefix import attention_mask, positions
from policies.encoding.observations import ObservationBatch, real_first
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.network import OpenVLA
from policies.protocol import DecisionBatch, check_requests
from policies.weights.snapshots import load_snapshot
from trajectories.records import ActionSample, Observation, WeightSnapshot


class ParallelPolicy:
    """Meets `policies.protocol.Policy`. A chunk of K actions is L = 7 K tokens."""

    module: nn.Module
    exact = True
    adapted: tuple[str, ...] = ("language_model.model",)

    def __init__(self, network: OpenVLA, *, inputs: OpenVLAInputs, stop_token_id: int) -> None:
        """`stop_token_id` ends the sequence; in Llama's vocabulary it is 2, `</s>`."""
        self.module = network
        self.network = network
        self.tokens = inputs.tokens
        self._inputs = inputs
        self._actions = inputs.actions
        self._stop_token_id = stop_token_id

    @property
    def device(self) -> torch.device:
        return self.network.language_model.device

    @torch.inference_mode()
    def act(
        self, observations: Sequence[Observation], *, seeds: Sequence[int], temperature: float
    ) -> list[ActionSample]:
        """Sample one chunk per observation: each token the argmax of logits + temperature * Gumbel noise, the noise of
        request i drawn from `seeds[i]` (>= 0) alone, whatever it is batched with. Temperature 0 is greedy.
        Log-probabilities are at temperature 1. Raises ValueError for observations that do not fit the network."""
        check_requests(observations, seeds, temperature)
        seen = self._inputs.stack(observations, self.network)
        logits_BLV = self._logits(seen, self.network.encode_images(seen.agentview_BHWC, seen.wrist_BHWC))
        noise_BLV = gumbel_noise(seeds, self.tokens, logits_BLV.shape[-1]).transpose(0, 1)
        chosen_BL = (logits_BLV + temperature * noise_BLV.to(self.device)).argmax(dim=-1)
        chunks = (chosen_BL + self._actions.first_id).cpu().numpy()
        logps = token_logps(logits_BLV, chosen_BL).cpu().numpy()
        return [
            ActionSample(actions=actions.copy(), model_chunk=chunk.copy(), logps=logp.copy())
            for actions, chunk, logp in zip(self._actions.decode(chunks), chunks, logps, strict=True)
        ]

    def batch(self, observations: Sequence[Observation], chunks: Sequence[np.ndarray]) -> DecisionBatch:
        """Stack observations and chunks int64 [L]; ValueError for one of another length or vocabulary."""
        return self._inputs.batch(observations, chunks, self.network)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7] in [-1, 1] -> token ids int64 [L], each the nearest bin."""
        return self._inputs.encode(actions)

    def encode_context(self, batch: DecisionBatch) -> torch.Tensor:
        """Projected image tokens [B, N, D]."""
        return self.network.encode_images(batch.agentview_BHWC, batch.wrist_BHWC)

    def score(
        self,
        batch: DecisionBatch,
        context: torch.Tensor | None = None,
        *,
        noise_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of the chunks' tokens at temperature 1, float32 [B, L], exact, differentiable; there is
        no noise."""
        logits_BLV = self._logits(batch, self.encode_context(batch) if context is None else context)
        return token_logps(logits_BLV, batch.chunk_BL - self._actions.first_id)

    def sft_loss(
        self, batch: DecisionBatch, context: torch.Tensor | None = None, *, noise_keys: torch.Tensor
    ) -> torch.Tensor:
        """Mean -log-probability per token, nats."""
        return -self.score(batch, context).mean()

    def calibrate(self, batches: Iterable[DecisionBatch]) -> dict[str, float]:
        """Log-probabilities are in nats as they are."""
        return {}

    def take_calibration(self, said: Mapping[str, float]) -> None:
        """There is none."""

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in; see `policies.weights.snapshots.load_snapshot`."""
        load_snapshot(self.network, snapshot)

    def _logits(self, seen: ObservationBatch, image_tokens_BND: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, L, V] over the action tokens; entry l is of chunk element l."""
        model = self.network.language_model.model
        prompt_BT, mask_BT = real_first(seen)
        prefix_BSD = self.network.embed(prompt_BT, image_tokens_BND, seen.proprio_BP)
        batch, length, width = prefix_BSD.shape
        stop_B1D = model.embed_tokens(prompt_BT.new_full((batch, 1), self._stop_token_id))
        places_BLD = prefix_BSD.new_zeros(batch, self.tokens, width)
        valid_BN = torch.cat(
            [
                mask_BT[:, :1],
                mask_BT.new_ones(batch, length - mask_BT.shape[1]),  # images and proprioception
                mask_BT[:, 1:],
                mask_BT.new_ones(batch, self.tokens + 1),
            ],
            dim=1,
        )
        hidden_BND = model(
            inputs_embeds=torch.cat([prefix_BSD, places_BLD, stop_B1D], dim=1),
            attention_mask=attention_mask(valid_BN, torch.zeros_like(valid_BN[0])).unsqueeze(1),
            position_ids=positions(valid_BN),
            use_cache=False,
        ).last_hidden_state
        last_B = length - mask_BT.shape[1] + mask_BT.sum(dim=1) - 1
        first_B1D = hidden_BND[torch.arange(batch, device=last_B.device), last_B].unsqueeze(1)
        read_BLD = torch.cat([first_B1D, hidden_BND[:, length : length + self.tokens - 1]], dim=1)
        head = self.network.language_model.lm_head.weight[self._actions.first_id : self._actions.stop_id]
        return F.linear(read_BLD, head).float()
