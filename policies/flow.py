"""The flow-matching policy: pi-0 and pi-0.5 turn noise into a chunk by Euler steps; its score is a surrogate.

The surrogate is the flow-matching loss under common noise (CrossVLA, arXiv 2605.21854; FPO, arXiv 2507.21053), put as
the log-density of a Gaussian whose variance is the loss that the supervised start makes on chunks that succeeded: one
element is then worth half a nat at first, and whatever counts in nats per element elsewhere (the floor of a rejected
chunk, the tripwire, beta) means the same for every paradigm.

What is scored and learned is the chunk as it is executed, clipped and with a closed or open gripper, not as the flow
left it: likelihood of raw samples, which reach beyond [-1, 1] and carry a half-closed gripper, widens what they widen.

A network may make more actions at once than are executed before it looks again. A chunk then keeps them all, for the
executed ones were made beside the others, and the score counts those that were executed.

Letters: B decisions, S draws of one decision, R = B S rows of a pass, H actions that the network makes at once, of
which K <= H are executed, A dimensions of a padded action, L = 7 K elements that count, C cameras.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from configs.policy import FlowPart
from objectives import flow_matching
from policies.decoding.prefix import PrefixCache
from policies.encoding.observations import ObservationBatch
from policies.pi0.inputs import FlowInputs
from policies.pi0.network import Pi0Network
from policies.protocol import DecisionBatch, check_requests, with_chunks
from policies.weights.snapshots import load_snapshot
from trajectories.records import ACTION_DIM, ActionSample, Observation, WeightSnapshot

GRIPPER = 6
"""Dimension of an action that the simulator reads the sign of."""


class FlowPolicy:
    """Meets `policies.protocol.Policy`. The adapter goes on the language decoder and the action expert, as in
    openpi's LoRA recipes."""

    module: nn.Module
    exact = False
    adapted: tuple[str, ...] = ("vlm.language_model", "expert")

    def __init__(self, network: Pi0Network, *, inputs: FlowInputs, part: FlowPart, chunk: int) -> None:
        """`chunk` is K. Raises ValueError when the network makes fewer actions at once."""
        horizon = network.config.horizon
        if chunk > horizon:
            raise ValueError(
                f"policy.chunk is {chunk}, the network makes {horizon} actions at once; lower it"
            )
        self.module = network
        self.network = network
        self.variance = 1.0
        """Squared velocity error worth half a nat; see `calibrate`."""
        self.tokens = chunk * ACTION_DIM
        """L, elements of a score."""
        self._inputs = inputs
        self._part = part
        self._chunk = chunk
        self._horizon = horizon

    @property
    def device(self) -> torch.device:
        return self.network.action_out_proj.weight.device

    @torch.inference_mode()
    def act(
        self, observations: Sequence[Observation], *, seeds: Sequence[int], temperature: float
    ) -> list[ActionSample]:
        """One chunk per observation, from normal noise times `temperature` (0: from the middle of the noise)."""
        check_requests(observations, seeds, temperature)
        seen = self._inputs.stack(observations, self.device)
        cache = self._prefix(seen, self._image_tokens(seen))
        shape = (self._horizon, self.network.config.action_dim)
        noise = np.stack(
            [np.random.Generator(np.random.Philox(key=s)).standard_normal(shape, np.float32) for s in seeds]
        )
        noise_BHA = temperature * torch.from_numpy(noise).to(self.device)
        chunks_BHA = self.network.sample(cache, noise_BHA, self._part.steps, self._inputs.state(seen))
        actions_BHA = self._inputs.from_model(chunks_BHA[..., :ACTION_DIM], seen)
        return [
            ActionSample(
                actions=actions[: self._chunk].copy(),
                model_chunk=actions.reshape(-1),
                logps=np.zeros(0, np.float32),
            )
            for actions in map(executable, actions_BHA.cpu().numpy())
        ]

    def batch(self, observations: Sequence[Observation], chunks: Sequence[np.ndarray]) -> DecisionBatch:
        """Stack observations and chunks float32 [7 H]; ValueError for one of another length or not finite."""
        length = self._horizon * ACTION_DIM
        if len(chunks) != len(observations):
            raise ValueError(f"{len(observations)} observations need as many chunks, got {len(chunks)}")
        for i, chunk in enumerate(chunks):
            if chunk.shape != (length,) or chunk.dtype != np.float32 or not np.isfinite(chunk).all():
                raise ValueError(
                    f"chunk {i} is {chunk.dtype} {list(chunk.shape)}, expected {length} finite float32 numbers"
                )
        seen = self._inputs.stack(observations, self.device)
        return with_chunks(seen, torch.from_numpy(np.stack(chunks)).to(self.device))

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7] in [-1, 1] -> the same, float32 [7 H], the last one repeated to the network's horizon
        (as openpi's training data go on after an episode's end)."""
        if actions.shape != (self._chunk, ACTION_DIM):
            raise ValueError(f"a chunk is [{self._chunk}, {ACTION_DIM}] actions, got {list(actions.shape)}")
        rest = np.repeat(actions[-1:], self._horizon - self._chunk, axis=0)
        return np.concatenate([actions, rest]).astype(np.float32).reshape(-1)

    def encode_context(self, batch: DecisionBatch) -> torch.Tensor:
        """Image tokens of both cameras [B, N, D]."""
        return self._image_tokens(batch)

    def score(
        self,
        batch: DecisionBatch,
        context: torch.Tensor | None = None,
        *,
        noise_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Minus the squared velocity errors over twice `variance`, the mean of `score_draws` draws at stratified times,
        float32 [B, L]; a key fixes them. Raises ValueError without keys."""
        if noise_keys is None:
            raise ValueError(
                "a flow-matching score needs noise_keys: its noise and times are drawn from them"
            )
        errors_BSKA = self._errors(batch, context, noise_keys, draws=self._part.score_draws)
        return -errors_BSKA[..., :ACTION_DIM].mean(dim=1).flatten(1) / (2 * self.variance)

    def sft_loss(
        self, batch: DecisionBatch, context: torch.Tensor | None = None, *, noise_keys: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared velocity error, `score_draws` draws a decision, times from openpi's training density.

        openpi takes one. More cost little, for they share the prefix, and where the prefix is most of a step they
        learn more from it.
        """
        return self._errors(batch, context, noise_keys, draws=self._part.score_draws, density="beta").mean()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[DecisionBatch]) -> dict[str, float]:
        """Take the mean squared velocity error on these decisions as `variance`."""
        total, count, decisions = 0.0, 0, 0
        for batch in batches:
            keys = torch.arange(len(batch)) + decisions  # the same noise however they are batched
            decisions += len(batch)
            errors = self._errors(batch, None, keys, draws=self._part.score_draws)[..., :ACTION_DIM]
            total, count = total + errors.double().sum().item(), count + errors.numel()
        if count:
            self.variance = max(total / count, 1e-6)
        return {"velocity_error": self.variance}

    def take_calibration(self, said: Mapping[str, float]) -> None:
        """Take up the `variance` that `calibrate` said."""
        self.variance = said["velocity_error"]

    def load(self, snapshot: WeightSnapshot) -> None:
        """Copy merged weights in; see `policies.weights.snapshots.load_snapshot`."""
        load_snapshot(self.network, snapshot)

    def _image_tokens(self, seen: ObservationBatch) -> torch.Tensor:
        images_BCHWX = torch.stack([seen.agentview_BHWC, seen.wrist_BHWC], dim=1)
        pixels = images_BCHWX.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        return self.network.encode_images(pixels).flatten(1, 2)

    def _prefix(self, seen: ObservationBatch, image_tokens_BND: torch.Tensor) -> PrefixCache:
        tokens_BCID = image_tokens_BND.unflatten(1, (2, -1))
        cameras_BC = torch.ones(tokens_BCID.shape[:2], dtype=torch.bool, device=self.device)
        prompt_BT, mask_BT = self._inputs.prompt(seen)
        return self.network.encode_prefix(
            self.network.join_prefix(tokens_BCID, cameras_BC, prompt_BT, mask_BT)
        )

    def _errors(
        self,
        batch: DecisionBatch,
        context: torch.Tensor | None,
        noise_keys: torch.Tensor,
        *,
        draws: int,
        density: flow_matching.TimeDensity = "uniform",
    ) -> torch.Tensor:
        """Squared velocity errors of what is executed, [B, S, K, A], padding included."""
        if context is None:
            context = self._image_tokens(batch)
        actions_BHA = batch.chunk_BL.unflatten(1, (self._horizon, ACTION_DIM))
        clean_BHA = nn.functional.pad(
            self._inputs.to_model(actions_BHA, batch), (0, self.network.config.action_dim - ACTION_DIM)
        )
        drawn = flow_matching.draw(
            noise_keys.tolist(),
            draws=draws,
            shape=(self._horizon, self.network.config.action_dim),
            density=density,
        )
        drawn = flow_matching.FlowDraws(
            times_BS=drawn.times_BS.to(self.device), noise_BSKA=drawn.noise_BSKA.to(self.device)
        )
        noisy_BSHA = flow_matching.noisy_chunk(clean_BHA[:, None], drawn.noise_BSKA, drawn.times_BS)
        velocity_RHA = self.network.velocity(
            self._prefix(batch, context).repeat(draws),
            noisy_BSHA.flatten(0, 1),
            drawn.times_BS.flatten(),
            self._inputs.state(batch),
        )
        velocity_BSHA = velocity_RHA.unflatten(0, (len(batch), draws))
        errors_BSHA = flow_matching.velocity_errors(velocity_BSHA, clean_BHA[:, None], drawn.noise_BSKA)
        return errors_BSHA[:, :, : self._chunk]


def executable(chunk: np.ndarray) -> np.ndarray:
    """A sampled chunk float [K, 7] as it is executed: clipped to [-1, 1], the gripper open (-1) or closed (1).

    What is not finite becomes NaN, which the environment refuses: clipped, an overflow would pass for an action.
    """
    actions = np.clip(chunk, -1, 1).astype(np.float32)
    actions[:, GRIPPER] = np.where(chunk[:, GRIPPER] > 0, 1, -1)
    actions[~np.isfinite(chunk)] = np.nan
    return actions
