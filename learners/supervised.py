"""The supervised start: maximum likelihood on demonstrations, of every weight of the policy or of an adapter on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from configs.supervised import SupervisedPart
from learners.auxiliary import AuxiliaryTask
from learners.decisions import concatenate, stack, take
from learners.orthogonality import OrthogonalPenalty
from policies.encoding.observations import shift_images
from policies.protocol import DecisionBatch, Policy
from policies.weights import adapters
from policies.weights.snapshots import to_array, to_tensor
from trajectories.records import Trajectory


class SupervisedLearner:
    """Trains in place what of a policy requires a gradient: every weight, or the adapter that is attached to it. The
    same seed, demonstrations and thread count give the same weights.

    Example:
        learner = SupervisedLearner(policy, part, seed=0, demos=demos)
        learner.fit(on_step=lambda step, metrics: ...)
    """

    def __init__(
        self,
        policy: Policy,
        part: SupervisedPart,
        *,
        seed: int,
        demos: Sequence[Trajectory],
        penalty: OrthogonalPenalty | None = None,
    ) -> None:
        """Stack the demonstrations in memory. Raises ValueError when there are none, or they lack what the auxiliary
        objective needs."""
        if not demos:
            raise ValueError("supervised training needs at least one demonstration, got none")
        self._policy = policy
        self._part = part
        self._data = concatenate([stack(policy, demo) for demo in demos])
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator().manual_seed(seed)
        self._queue = torch.empty(0, dtype=torch.int64)
        self._penalty = penalty
        self._parameters = [p for p in policy.module.parameters() if p.requires_grad]
        self._auxiliary: AuxiliaryTask | None = None
        if part.auxiliary != "none":
            probe = take(self._data, torch.zeros(1, dtype=torch.int64))
            self._auxiliary = AuxiliaryTask(part.auxiliary, policy, demos=demos, probe=probe, seed=seed)
            self._parameters += self._auxiliary.head.parameters()
        # Decay would pull DoRA's magnitudes to zero, away from those of the weights that they begin with.
        decay = part.weight_decay if part.trains == "weights" else 0.0
        self._optimizer = torch.optim.AdamW(self._parameters, lr=part.lr, weight_decay=decay)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One optimizer step. Returns `loss` (the paradigm's own), `lr` and `grad_norm` (before clipping); where there
        are such, the `auxiliary_loss` and the `orthogonal_penalty`, before their weights, and of the last step how
        all that has changed lies to the vector.

        Raises RuntimeError after the last step, and FloatingPointError when loss or gradient is not finite.
        """
        part = self._part
        if self.steps_done >= part.steps:
            raise RuntimeError(f"all {part.steps} steps are done")
        lr = part.lr * schedule(self.steps_done, warmup=part.warmup_steps, total=part.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        rows = self._draw(part.batch_size)
        images = self._generator.get_state()
        batch = take(self._data, rows)
        batch = replace(
            batch,
            agentview_BHWC=shift_images(batch.agentview_BHWC, part.image_shift, self._generator),
            wrist_BHWC=shift_images(batch.wrist_BHWC, part.image_shift, self._generator),
        )
        self._policy.module.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss, extra = self._gradients(batch, rows, torch.Generator().set_state(images))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, part.grad_clip)
        self._policy.module.eval()
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"supervised step {self.steps_done + 1}: loss {loss.item()}, gradient norm {norm.item()}; "
                "lower supervised.lr"
            )
        self._optimizer.step()
        self.steps_done += 1
        if self._penalty is not None and self.steps_done == part.steps:
            extra |= self._penalty.lie()
        return {"loss": loss.item(), "lr": lr, "grad_norm": norm.item(), **extra}

    def fit(self, *, on_step: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, float]:
        """All remaining steps; `on_step` gets the step number from 1 and its metrics. Returns the last metrics."""
        metrics: dict[str, float] = {}
        while self.steps_done < self._part.steps:
            metrics = self.step()
            if on_step is not None:
                on_step(self.steps_done, metrics)
        # Gradients of every weight would outlive this learner, and an adapter has no use for them.
        self._optimizer.zero_grad(set_to_none=True)
        return metrics

    def state(self) -> dict[str, np.ndarray]:
        """Weights, the auxiliary head's among them, optimizer moments and random generators as named arrays, for a
        checkpoint."""
        arrays = {f"weight.{i}": to_array(p) for i, p in enumerate(self._parameters)}
        for i, parameter in enumerate(self._parameters):
            moments = self._optimizer.state[parameter]
            arrays |= {f"optimizer.{i}.{key}": to_array(value) for key, value in moments.items()}
        arrays["generator"] = self._generator.get_state().numpy().copy()
        arrays["noise"] = self._noise.get_state().numpy().copy()
        arrays["queue"] = self._queue.numpy().copy()
        arrays["steps_done"] = np.array(self.steps_done)
        return arrays

    @property
    def state_bytes(self) -> int:
        """What `state` takes in the host's memory, and on the disk: weights and two moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self._parameters)

    @torch.no_grad()
    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where `state` was taken, of the same policy, part and demonstrations. Raises KeyError naming
        a missing array."""
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(to_tensor(arrays[f"weight.{i}"]))
            prefix = f"optimizer.{i}."
            moments = {
                k.removeprefix(prefix): to_tensor(a) for k, a in arrays.items() if k.startswith(prefix)
            }
            self._optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }
        self._generator.set_state(torch.from_numpy(arrays["generator"].copy()))
        self._noise.set_state(torch.from_numpy(arrays["noise"].copy()))
        self._queue = torch.from_numpy(arrays["queue"].copy())
        self.steps_done = int(arrays["steps_done"])

    @property
    def auxiliary_parameters(self) -> int:
        """Numbers of the auxiliary objective's head; 0 without one."""
        return 0 if self._auxiliary is None else sum(p.numel() for p in self._auxiliary.head.parameters())

    def _gradients(
        self, batch: DecisionBatch, rows: torch.Tensor, images: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Leave the gradients of every term; returns the paradigm's loss, and the others by name. `images` is the
        generator as it was before it moved the agentview."""
        part, policy = self._part, self._policy
        noise_keys = torch.randint(2**62, (part.batch_size,), generator=self._noise)
        extra: dict[str, float] = {}
        with adapters.merged_forward(policy.module):
            if self._auxiliary is None:
                loss = total = policy.sft_loss(batch, noise_keys=noise_keys)
            else:
                tokens = policy.encode_context(batch)
                loss = policy.sft_loss(batch, tokens, noise_keys=noise_keys)
                auxiliary = self._auxiliary.loss(tokens, rows, shift=part.image_shift, generator=images)
                total = loss + part.auxiliary_weight * auxiliary
                extra["auxiliary_loss"] = auxiliary.item()
            total.backward()
        if self._penalty is not None:
            extra |= self._penalty.add_gradients()
        return loss, extra

    def _draw(self, count: int) -> torch.Tensor:
        """The next rows of an endless sequence of shuffles, so that every decision is seen equally often."""
        while len(self._queue) < count:
            shuffle = torch.randperm(len(self._data), generator=self._generator)
            self._queue = torch.cat([self._queue, shuffle])
        rows, self._queue = self._queue[:count], self._queue[count:]
        return rows


def schedule(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step from 0: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))
