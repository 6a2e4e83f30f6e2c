"""The discrete-diffusion policy: the tokens of a chunk are unmasked in parallel, and its score is a bound.

Discrete Diffusion VLA (arXiv 2508.20072) on OpenVLA's network: action tokens see the whole observation and each
other, in both directions. Observation tokens do not see actions, so their keys and values are computed once a decision
and read by every pass. As in the token policy the distribution is over the action tokens alone.

Letters: B decisions, S masks of one decision, R = B S rows of a pass, P observation tokens, L tokens of a chunk, V
action bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configs.policy import DiffusionPart
from objectives import masked_diffusion
from policies.decoding.prefix import Prefix, PrefixCache, encode_prefix, suffix_places
from policies.encoding.observations import ObservationBatch, real_first
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.network import OpenVLA
from policies.protocol import DecisionBatch, check_requests
from policies.weights.snapshots import load_snapshot
from trajectories.records import ActionSample, Observation, WeightSnapshot


class DiffusionPolicy:
    """Meets `policies.protocol.Policy`. A chunk of K actions is L = 7 K tokens."""

    module: nn.Module
    exact = False
    adapted: tuple[str, ...] = ("language_model.model",)

    def __init__(
        self,
        network: OpenVLA,
        *,
        inputs: OpenVLAInputs,
        part: DiffusionPart,
        mask_id: int | None = None,
    ) -> None:
        """`mask_id` is the id of [MASK]; none: the one after the last action's. Raises ValueError when the network's
        vocabulary has no id for [MASK]."""
        actions, vocabulary = inputs.actions, network.language_model.config.vocab_size
        mask_id = actions.stop_id if mask_id is None else mask_id
        if not actions.stop_id <= mask_id < vocabulary:
            raise ValueError(
                f"the vocabulary has {vocabulary} ids, expected one for [MASK] behind the actions, from "
                f"{actions.stop_id} on; got {mask_id}"
            )
        self.module = network
        self.network = network
        self.tokens = inputs.tokens
        self._inputs = inputs
        self._actions = actions
        self._part = part
        self._mask_id = mask_id

    @property
    def device(self) -> torch.device:
        return self.network.language_model.device

    @torch.inference_mode()
    def act(
        self, observations: Sequence[Observation], *, seeds: Sequence[int], temperature: float
    ) -> list[ActionSample]:
        """Unmask one chunk per observation, see `objectives.masked_diffusion.parallel_decode`; `temperature` scales the
        noise on tokens and, unless `choice_temperature` sets that, on the order they are kept in. At 0 there is no
        noise on either, whatever `choice_temperature` is: every seed gives the same chunk."""
        check_requests(observations, seeds, temperature)
        choice = self._part.choice_temperature if temperature else None
        seen = self._inputs.stack(observations, self.network)
        cache = self._prefix(seen, self.network.encode_images(seen.agentview_BHWC, seen.wrist_BHWC))
        bins = self._actions.bins
        noise = masked_diffusion.decoding_noise(
            seeds, iterations=self._part.iterations, length=self.tokens, vocabulary=bins
        )
        decoded = masked_diffusion.parallel_decode(
            lambda tokens_BL: self._logits(cache, tokens_BL),
            torch.full((len(seeds), self.tokens), bins, device=self.device),
            noise,
            mask_id=bins,
            temperature=temperature,
            choice_temperature=temperature if choice is None else choice,
            use_remask=self._part.remask,
        )
        chunks = (decoded.samples_KBL[-1] + self._actions.first_id).cpu().numpy()
        return [
            ActionSample(actions=actions.copy(), model_chunk=chunk.copy(), logps=np.zeros(0, np.float32))
            for actions, chunk in zip(self._actions.decode(chunks), chunks, strict=True)
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
        """An unbiased estimate, by token, of the order-agnostic bound on the chunk's log-probability (ARDM, arXiv
        2110.02037), float32 [B, L]; a key fixes its masks. Raises ValueError without keys."""
        if noise_keys is None:
            raise ValueError("a masked-diffusion score needs noise_keys: its masks are drawn from them")
        masks_BSL = masked_diffusion.draw_masks(
            noise_keys.tolist(), draws=self._part.score_draws, length=self.tokens
        ).to(self.device)
        return masked_diffusion.bound_elements(self._logps(batch, context, masks_BSL), masks_BSL)

    def sft_loss(
        self, batch: DecisionBatch, context: torch.Tensor | None = None, *, noise_keys: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of the hidden tokens, the share of them on MaskGIT's cosine schedule, nats."""
        masks_BSL = masked_diffusion.draw_masks(
            noise_keys.tolist(), draws=1, length=self.tokens, counts=masked_diffusion.cosine_counts
        ).to(self.device)
        return masked_diffusion.masked_losses(self._logps(batch, context, masks_BSL), masks_BSL).mean()

    def calibrate(self, batches: Iterable[DecisionBatch]) -> dict[str, float]:
        """The bound is in nats as it is."""
        return {}

    def take_calibration(self, said: Mapping[str, float]) -> None:
        """There is none."""

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in; see `policies.weights.snapshots.load_snapshot`."""
        load_snapshot(self.network, snapshot)

    def _prefix(self, seen: ObservationBatch, image_tokens_BND: torch.Tensor) -> PrefixCache:
        """Keys and values of images, proprioception and prompt, each token seeing all that exist."""
        prompt_BT, mask_BT = real_first(seen)
        embeddings = self.network.embed(prompt_BT, image_tokens_BND, seen.proprio_BP)
        between = embeddings.shape[1] - prompt_BT.shape[1]
        mask_BP = torch.cat([mask_BT[:, :1], mask_BT.new_ones(len(mask_BT), between), mask_BT[:, 1:]], dim=1)
        prefix = Prefix(tokens_BPD=embeddings, mask_BP=mask_BP)
        return encode_prefix(self.network.language_model.model, prefix)

    def _logits(self, cache: PrefixCache, tokens_RL: torch.Tensor) -> torch.Tensor:
        """Logits [R, L, V] of every token of chunks given as bins, V standing for [MASK]."""
        model = self.network.language_model.model
        ids_RL = tokens_RL + self._actions.first_id
        embeddings = model.embed_tokens(ids_RL.masked_fill(tokens_RL == self._actions.bins, self._mask_id))
        starts_L = torch.arange(tokens_RL.shape[1], device=tokens_RL.device) == 0
        mask, positions_RL = suffix_places(cache, starts_L)
        hidden_RLD = model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions_RL,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        head = self.network.language_model.lm_head.weight[self._actions.first_id : self._actions.stop_id]
        return F.linear(hidden_RLD, head)

    def _logps(
        self, batch: DecisionBatch, context: torch.Tensor | None, masks_BSL: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities of the chunks' own tokens, given those that each mask leaves visible, [B, S, L]."""
        if context is None:
            context = self.encode_context(batch)
        cache = self._prefix(batch, context).repeat(masks_BSL.shape[1])
        bins_BSL = (batch.chunk_BL - self._actions.first_id)[:, None].expand_as(masks_BSL)
        hidden_RL = torch.where(masks_BSL, self._actions.bins, bins_BSL).flatten(0, 1)
        logits_RLV = self._logits(cache, hidden_RL).float()
        logps_RLV = torch.log_softmax(logits_RLV, dim=-1).unflatten(0, masks_BSL.shape[:2])
        return logps_RLV.gather(-1, bins_BSL.unsqueeze(-1)).squeeze(-1)
