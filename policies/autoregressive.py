"""The autoregressive policy: an action chunk is decoded token by token, and its log-probability is exact.

The distribution is the decoder's softmax over the action tokens alone, in sampling and in scoring alike. An `Engine`
does the decoding: torch, or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from policies.decoding.engine import Engine, TorchEngine, token_logps
from policies.decoding.modules import ModuleDecoder
from policies.decoding.packed import PackedDecoder
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.network import OpenVLA
from policies.protocol import DecisionBatch, check_requests
from policies.weights.snapshots import load_snapshot
from trajectories.records import ActionSample, Observation, WeightSnapshot


class AutoregressivePolicy:
    """Meets `policies.protocol.Policy`. A chunk of K actions is L = 7 K tokens, the 7 dimensions of step 0 first.

    Letters: B decisions, L tokens of a chunk, V action bins, S prefix tokens, D decoder width.
    """

    module: nn.Module
    """The `OpenVLA` network, or what wraps it while an adapter is on."""
    exact = True
    adapted: tuple[str, ...] = ("language_model.model",)

    def __init__(
        self,
        network: OpenVLA,
        *,
        inputs: OpenVLAInputs,
        decoder: type[PackedDecoder] | type[ModuleDecoder] = PackedDecoder,
    ) -> None:
        self.module = network
        self.network = network
        """The same network under its own type."""
        self.tokens = inputs.tokens
        """L, tokens of a chunk."""
        self._inputs = inputs
        self._actions = inputs.actions
        self.engine: Engine = TorchEngine(
            first_id=inputs.actions.first_id,
            stop_id=inputs.actions.stop_id,
            tokens=self.tokens,
            decoder=decoder,
        )
        """What decodes; another may take its place."""

    @property
    def device(self) -> torch.device:
        return self.network.language_model.device

    @torch.inference_mode()
    def act(
        self, observations: Sequence[Observation], *, seeds: Sequence[int], temperature: float
    ) -> list[ActionSample]:
        """Sample one chunk per observation: each token the argmax of logits + temperature * Gumbel noise, the
        noise of request i drawn from `seeds[i]` (>= 0) alone, whatever it is batched with.

        Temperature 0 is greedy. Log-probabilities are at temperature 1. Raises ValueError for observations that
        do not fit the network, and TypeError while an adapter sits on the decoder (merge it first).
        """
        check_requests(observations, seeds, temperature)
        seen = self._inputs.stack(observations, self.network)
        image_tokens = self.network.encode_images(seen.agentview_BHWC, seen.wrist_BHWC)
        prefix = self.network.embed(seen.prompt_BT, image_tokens, seen.proprio_BP)
        lengths = (seen.prompt_mask_BT.sum(dim=1) + (prefix.shape[1] - seen.prompt_BT.shape[1])).tolist()
        chosen, logps = self.engine.decode(
            self.network.language_model, prefix, lengths, seeds=seeds, temperature=temperature
        )
        chunks = (chosen + self._actions.first_id).T.cpu().numpy()
        rows = zip(self._actions.decode(chunks), chunks, logps.T.cpu().numpy(), strict=True)
        return [
            ActionSample(actions=actions.copy(), model_chunk=chunk.copy(), logps=logp.copy())
            for actions, chunk, logp in rows
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
        logits = self.network(batch, context).float()
        return token_logps(logits, batch.chunk_BL - self._actions.first_id)

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
