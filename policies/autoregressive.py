"""The autoregressive policy: an action chunk is decoded token by token, and its log-probability is exact.

The distribution is the decoder's softmax over the action tokens alone, in sampling and in scoring alike. An `Engine`
does the decoding: torch (`TorchEngine`), or vLLM (`policies.decoding.vllm_engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

from policies.decoding.modules import ModuleDecoder
from policies.decoding.packed import PackedDecoder
from policies.encoding.action_tokens import ActionTokens, check_chunks, encode_chunk
from policies.encoding.observations import ObservationBatch, Prompts, stack_observations
from policies.openvla.network import OpenVLA, token_logps
from policies.protocol import DecisionBatch, with_chunks
from policies.weights.snapshots import load_snapshot
from trajectories.records import ACTION_DIM, ActionSample, Observation, WeightSnapshot


class Engine(Protocol):
    """What decodes chunks of L tokens after prefixes that the network embedded, V bins told apart."""

    def decode(
        self,
        language_model: LlamaForCausalLM,
        prefix_BSD: torch.Tensor,
        lengths: Sequence[int],
        *,
        seeds: Sequence[int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bins (ids less the first action id) int64 [L, B] and their log-probabilities float32 [L, B], at temperature
        1 over the action tokens alone, under the weights that `language_model` has now.

        Each token is the argmax of logits + temperature * `gumbel_noise` of its row's seed. The first `lengths[b]`
        entries of row b of the prefixes are real. Raises TypeError while an adapter sits on the decoder.
        """
        ...


class TorchEngine:
    """Decodes in torch, with a decoder made anew only after a weight has changed: packing one copies all of them."""

    def __init__(
        self,
        *,
        first_id: int,
        stop_id: int,
        tokens: int,
        decoder: type[PackedDecoder] | type[ModuleDecoder] = PackedDecoder,
    ) -> None:
        """Action ids `first_id`..`stop_id` - 1; a chunk is `tokens` of them."""
        self._first_id = first_id
        self._stop_id = stop_id
        self._tokens = tokens
        self._decoder = decoder
        self._made: tuple[Any, PackedDecoder | ModuleDecoder] | None = None

    def decode(
        self,
        language_model: LlamaForCausalLM,
        prefix_BSD: torch.Tensor,
        lengths: Sequence[int],
        *,
        seeds: Sequence[int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Engine`."""
        stamp = tuple((tensor.data_ptr(), tensor._version) for tensor in language_model.parameters())
        if self._made is None or self._made[0] != stamp:
            decoder = self._decoder(language_model, first_id=self._first_id, stop_id=self._stop_id)
            self._made = (stamp, decoder)
        decoder = self._made[1]
        bins = self._stop_id - self._first_id
        noise = torch.zeros(self._tokens, len(seeds), bins)
        if temperature > 0:
            noise = temperature * gumbel_noise(seeds, self._tokens, bins)
        chosen, logits = decode(decoder, prefix_BSD, lengths, noise.to(prefix_BSD.device))
        return chosen, token_logps(logits, chosen)


class AutoregressivePolicy:
    """Meets `policies.protocol.Policy`. A chunk of K actions is L = 7 K tokens, the 7 dimensions of step 0 first.

    Letters: B decisions, L tokens of a chunk, V action bins, S prefix tokens, D decoder width.
    """

    module: nn.Module
    """The `OpenVLA` network, or what wraps it while an adapter is on."""
    exact = True
    adapted = "language_model.model"

    def __init__(
        self,
        network: OpenVLA,
        *,
        prompts: Prompts,
        actions: ActionTokens,
        chunk: int,
        image_size: int,
        view: Callable[[np.ndarray], np.ndarray] | None = None,
        decoder: type[PackedDecoder] | type[ModuleDecoder] = PackedDecoder,
    ) -> None:
        """`chunk` is K; `image_size` the rows and columns that the vision towers were built for, after `view`, which
        a camera's image goes through first."""
        self.module = network
        self.network = network
        """The same network under its own type."""
        self.tokens = chunk * ACTION_DIM
        """L, tokens of a chunk."""
        self._prompts = prompts
        self._actions = actions
        self._image_size = image_size
        self._view = view
        self.engine: Engine = TorchEngine(
            first_id=actions.first_id, stop_id=actions.stop_id, tokens=self.tokens, decoder=decoder
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
        if len(seeds) != len(observations):
            raise ValueError(f"{len(observations)} observations need as many seeds, got {len(seeds)}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        seen = self._stack(observations)
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
        check_chunks(self._actions, chunks, count=len(observations), length=self.tokens)
        chunk_BL = torch.from_numpy(np.stack(chunks)).to(self.device, torch.int64)
        return with_chunks(self._stack(observations), chunk_BL)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7] in [-1, 1] -> token ids int64 [L], each the nearest bin."""
        return encode_chunk(self._actions, actions, length=self.tokens)

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

    def sft_loss(self, batch: DecisionBatch, *, noise_keys: torch.Tensor) -> torch.Tensor:
        """Mean -log-probability per token, nats."""
        return -self.score(batch).mean()

    def calibrate(self, batches: Iterable[DecisionBatch]) -> dict[str, float]:
        """Log-probabilities are in nats as they are."""
        return {}

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in; see `policies.weights.snapshots.load_snapshot`."""
        load_snapshot(self.network, snapshot)

    def _stack(self, observations: Sequence[Observation]) -> ObservationBatch:
        return stack_observations(
            observations,
            self._prompts,
            image_size=self._image_size,
            cameras=self.network.cameras,
            view=self._view,
            device=self.device,
        )


def decode(
    decoder: PackedDecoder | ModuleDecoder,
    prefix_BSD: torch.Tensor,
    lengths: Sequence[int],
    noise_LBV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token per leading entry of `noise_LBV`, each the argmax of logits + noise over the decoder's ids.

    Returns them less the decoder's first id, int64 [L, B], and the logits without noise, float32 [L, B, V].
    """
    length = len(noise_LBV)
    decoding = decoder.start(prefix_BSD, lengths, length - 1)
    chosen, logits = [], []
    for step, noise_BV in enumerate(noise_LBV.unbind(0)):
        logits_BV = decoder.logits(decoding.hidden_BD)
        bins_B = (logits_BV + noise_BV).argmax(dim=-1)
        chosen.append(bins_B)
        logits.append(logits_BV)
        if step < length - 1:
            decoding.step(step, decoder.embeddings[bins_B])
    return torch.stack(chosen), torch.stack(logits)


def gumbel_noise(seeds: Sequence[int], length: int, bins: int) -> torch.Tensor:
    """Standard Gumbel noise float32 [L, B, V]; column b comes from a counter-based generator (Philox) keyed by
    `seeds[b]`, and from nothing else. argmax(logits + noise) is then a draw from softmax(logits)."""
    columns = [
        np.random.Generator(np.random.Philox(key=seed)).standard_exponential((length, bins), dtype=np.float32)
        for seed in seeds
    ]
    # The ziggurat can return 0, whose Gumbel value would be infinite.
    exponential = np.maximum(np.stack(columns, axis=1), np.finfo(np.float32).tiny)
    return torch.from_numpy(-np.log(exponential))
