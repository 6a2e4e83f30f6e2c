"""The autoregressive policy: an action chunk is decoded token by token, and its log-probability is exact.

The distribution is the decoder's softmax over the action tokens alone, in sampling and in scoring alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from policies.action_tokens import ActionTokenizer
from policies.decoding import PackedDecoder
from policies.module_decoding import ModuleDecoder
from policies.openvla import OpenVLA, token_logps
from policies.openvla_actions import OpenVLAActions
from policies.openvla_prompts import LlamaPrompts
from policies.protocol import DecisionBatch
from policies.text import PromptTokenizer
from trajectories.records import ACTION_DIM, PROPRIO_DIM, ActionSample, Observation, WeightSnapshot


class AutoregressivePolicy:
    """Meets `policies.protocol.Policy`. A chunk of K actions is L = 7 K tokens, the 7 dimensions of step 0 first.

    Letters: B decisions, L tokens of a chunk, V action bins, S prefix tokens, D decoder width.
    """

    module: nn.Module
    """The `OpenVLA` network, or what wraps it while an adapter is on."""

    def __init__(
        self,
        network: OpenVLA,
        *,
        prompts: PromptTokenizer | LlamaPrompts,
        actions: ActionTokenizer | OpenVLAActions,
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
        self._decoder = decoder

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
        first_id, stop_id = self._actions.first_id, self._actions.stop_id
        decoder = self._decoder(self.network.language_model, first_id=first_id, stop_id=stop_id)
        agentview, wrist, proprio, prompt, mask = self._stack(observations)
        image_tokens = self.network.encode_images(agentview, wrist)
        prefix = self.network.embed(prompt, image_tokens, proprio)
        lengths = (mask.sum(dim=1) + (prefix.shape[1] - prompt.shape[1])).tolist()
        noise = torch.zeros(self.tokens, len(seeds), self._actions.bins)
        if temperature > 0:
            noise = temperature * gumbel_noise(seeds, self.tokens, self._actions.bins)
        chosen, logits = decode(decoder, prefix, lengths, noise.to(self.device))
        logps = token_logps(logits, chosen)
        chunks = (chosen + first_id).T.cpu().numpy()
        rows = zip(self._actions.decode(chunks), chunks, logps.T.cpu().numpy(), strict=True)
        return [
            ActionSample(actions=actions.copy(), model_chunk=chunk.copy(), logps=logp.copy())
            for actions, chunk, logp in rows
        ]

    def batch(self, observations: Sequence[Observation], chunks: Sequence[np.ndarray]) -> DecisionBatch:
        """Stack observations and chunks int64 [L]; ValueError for one of another length or vocabulary."""
        if len(chunks) != len(observations):
            raise ValueError(f"{len(observations)} observations need as many chunks, got {len(chunks)}")
        for i, chunk in enumerate(chunks):
            if chunk.shape != (self.tokens,):
                raise ValueError(
                    f"chunk {i} has shape {list(chunk.shape)}, expected [{self.tokens}] token ids"
                )
            self._actions.check(chunk)
        agentview, wrist, proprio, prompt, mask = self._stack(observations)
        return DecisionBatch(
            agentview_BHWC=agentview,
            wrist_BHWC=wrist,
            proprio_BP=proprio,
            prompt_BT=prompt,
            prompt_mask_BT=mask,
            chunk_BL=torch.from_numpy(np.stack(chunks)).to(self.device, torch.int64),
        )

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7] in [-1, 1] -> token ids int64 [L], each the nearest bin."""
        ids = self._actions.encode(actions)
        if ids.shape != (self.tokens,):
            raise ValueError(f"a chunk is {self.tokens // ACTION_DIM} actions, got {len(actions)}")
        return ids

    def encode_images(self, batch: DecisionBatch) -> torch.Tensor:
        """Projected image tokens [B, N, D] for `score`; constant while only the decoder is adapted."""
        return self.network.encode_images(batch.agentview_BHWC, batch.wrist_BHWC)

    def score(self, batch: DecisionBatch, image_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of the chunks' tokens at temperature 1, float32 [B, L], exact, differentiable."""
        logits = self.network(batch, image_tokens).float()
        return token_logps(logits, batch.chunk_BL - self._actions.first_id)

    @torch.no_grad()
    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in; nothing is copied unless everything fits.

        Raises ValueError naming the first tensor that is missing, extra, mis-shaped, of another dtype or not
        finite.
        """
        own = self.network.state_dict()
        for name in own:
            if name not in snapshot.tensors:
                raise ValueError(f"snapshot {snapshot.version} lacks the tensor {name}")
        for name, array in snapshot.tensors.items():
            if name not in own:
                raise ValueError(
                    f"snapshot {snapshot.version} has the tensor {name}, which this policy lacks"
                )
            _check_tensor(f"snapshot {snapshot.version}: {name}", array, own[name])
        for name, array in snapshot.tensors.items():
            # A copy, for a snapshot may be a read-only view of shared memory.
            own[name].copy_(torch.from_numpy(array.copy()))

    def _stack(self, observations: Sequence[Observation]) -> tuple[torch.Tensor, ...]:
        """Agentview, wrist uint8 [B, H, W, 3], proprio float32 [B, 8], prompts int64, mask bool [B, T]."""
        if not observations:
            raise ValueError("a batch needs at least one observation")
        views = [self._views(seen, f"observation {i}") for i, seen in enumerate(observations)]
        for i, seen in enumerate(observations):
            if seen.proprio.shape != (PROPRIO_DIM,) or not np.isfinite(seen.proprio).all():
                raise ValueError(
                    f"observation {i}: proprio must be {PROPRIO_DIM} finite numbers, got {seen.proprio}"
                )
        prompt, mask = self._prompts.stack([seen.instruction for seen in observations])
        arrays = (
            np.stack([agentview for agentview, _ in views]),
            np.stack([wrist for _, wrist in views]),
            np.stack([seen.proprio for seen in observations]).astype(np.float32),
            prompt,
            mask,
        )
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def _views(self, seen: Observation, what: str) -> list[np.ndarray]:
        """Agentview and wrist as the network sees them, uint8 [H, W, 3]; of a camera that it has not, one pixel."""
        side, views = self._image_size, []
        for camera, (name, image) in enumerate((("agentview", seen.agentview), ("wrist", seen.wrist))):
            if camera >= self.network.cameras:
                views.append(np.zeros((1, 1, 3), np.uint8))
                continue
            image = image if self._view is None else self._view(image)
            if image.shape != (side, side, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"{what}: {name} is {image.dtype} {list(image.shape)}, expected uint8 [{side}, {side}, 3]"
                )
            views.append(image)
        return views


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


def state_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """Copies of a network's learned tensors by canonical name: the names and dtypes of a `WeightSnapshot`.

    Raises ValueError while an adapter is attached: the base alone is not what such a network computes.
    """
    state = module.state_dict()
    for name in state:
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{name} belongs to an adapter; merge it before taking the weights")
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def _check_tensor(name: str, array: np.ndarray, expected: torch.Tensor) -> None:
    dtype = str(expected.dtype).removeprefix("torch.")
    if array.shape != tuple(expected.shape):
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(expected.shape)}")
    if array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype}, expected {dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} non-finite values")
