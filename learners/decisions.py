"""Decisions of many trajectories as tensors in the host's memory, so that a training step only indexes rows.

Letters: D decisions in all, H W image rows and columns, L elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from policies.protocol import DecisionBatch, Policy
from policies.weights import adapters
from trajectories.records import Cell, Trajectory

NOISE_DRAWS = 8
"""Draws of noise in one update; the decisions of a step go round them."""
_CAMERAS = ("agentview_BHWC", "wrist_BHWC")


def stack(policy: Policy, trajectory: Trajectory) -> DecisionBatch:
    """All decisions of a trajectory. What a scripted expert did is first put into the policy's model space.

    Raises ValueError when the trajectory has no decisions.
    """
    if not trajectory.decisions:
        raise ValueError(f"trajectory {trajectory.trajectory_id} ({trajectory.cell.key}) has no decisions")
    scripted = trajectory.policy_version < 0
    chunks = [
        policy.encode(d.sample.actions) if scripted else d.sample.model_chunk for d in trajectory.decisions
    ]
    return policy.batch([d.observation for d in trajectory.decisions], chunks)


def take(batch: DecisionBatch, rows: torch.Tensor) -> DecisionBatch:
    """The rows of a batch named by an int64 index."""
    return DecisionBatch(**{field.name: getattr(batch, field.name)[rows] for field in fields(batch)})


def concatenate(batches: Sequence[DecisionBatch]) -> DecisionBatch:
    """Batches one after another, prompts padded to the longest."""
    longest = max(b.prompt_BT.shape[1] for b in batches)
    padding = [(0, longest - b.prompt_BT.shape[1]) for b in batches]
    return DecisionBatch(
        agentview_BHWC=torch.cat([b.agentview_BHWC for b in batches]),
        wrist_BHWC=torch.cat([b.wrist_BHWC for b in batches]),
        proprio_BP=torch.cat([b.proprio_BP for b in batches]),
        prompt_BT=torch.cat([F.pad(b.prompt_BT, p) for b, p in zip(batches, padding, strict=True)]),
        prompt_mask_BT=torch.cat([F.pad(b.prompt_mask_BT, p) for b, p in zip(batches, padding, strict=True)]),
        chunk_BL=torch.cat([b.chunk_BL for b in batches]),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One trajectory, in the host's memory."""

    batch: DecisionBatch
    """With pixels where the context is not kept."""
    context: torch.Tensor | None
    """None where it takes more bytes than the pixels that it is computed from."""
    features: torch.Tensor
    recorded: torch.Tensor | None
    """float32 [decisions, L]: the reference, where it was recorded."""
    executed: torch.Tensor
    """float32 [decisions, L], 1 at elements of actions that were executed, else 0."""
    group: int
    """Which noise; see `noise_group`."""


class DecisionPool:
    """The decisions that an update may draw, with what stays constant over its steps computed once.

    Constant is the context, which the adapter leaves alone. It is kept, by trajectory id from one update to the next,
    where it is no larger than the decision's pixels, as in small policies, whose steps it makes shorter. That of a
    large one would be megabytes a decision, and its vision towers are little beside its decoder: there the pixels are
    kept, and a step encodes again what it draws. So a decision takes no more than its images do.

    Constant are also the reference log-probs, of which a surrogate has NOISE_DRAWS, one for each draw of noise. Those
    that were recorded stay with their trajectory; others are computed when `refer` first asks for them (an update looks
    at less than half), and belong to one update.

    Policy and reference see one decision under the same noise: that is what makes their difference an estimate of a
    log-ratio. The two sides of a pair share it too, rank by rank (`draws`), wherever in their trajectories the
    decisions lie: all trajectories from one initial state have the same NOISE_DRAWS keys, and what the noise does to
    both sides alike leaves their margin (of flow policies it takes a third of the margin's standard deviation). Other
    initial states and other updates have other keys, so that the likelihood terms see many.
    """

    def __init__(self, policy: Policy, *, start_reference: bool, micro_batch: int) -> None:
        """`start_reference`: the reference is the policy with its adapter off, else each trajectory's recorded
        log-probs; `micro_batch`: decisions encoded or scored at once where no gradient is needed. Raises ValueError for
        recorded ones of a policy that records none."""
        if not start_reference and not policy.exact:
            raise ValueError(
                "this policy's score is a surrogate and is not recorded: set preference.reference=start"
            )
        self._policy = policy
        self._start_reference = start_reference
        self._micro_batch = micro_batch
        self._device = next(policy.module.parameters()).device
        self.noise_draws = 1 if policy.exact else NOISE_DRAWS
        self._entries: dict[str, _Entry] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def hold(self, trajectories: Sequence[Trajectory], *, update: int) -> None:
        """Hold exactly these for an update, counted from 0; contexts that are already there are kept, the rest dropped.
        Raises ValueError for a trajectory whose recorded chunks or log-probs do not fit the policy."""
        wanted = {t.trajectory_id: t for t in trajectories}
        self._entries = {key: self._entries.get(key) or self._entry(t) for key, t in wanted.items()}
        entries = list(self._entries.values())
        self._update = update
        self._places = [(entry, i) for entry in entries for i in range(len(entry.batch))]
        self._batch = concatenate([_without_pixels(e.batch) for e in entries])
        self._executed = torch.cat([e.executed for e in entries])
        self._groups = torch.cat([torch.full((len(e.batch),), e.group) for e in entries])
        self._reference = torch.zeros(self.noise_draws, *self._executed.shape)
        self._known = torch.zeros(self.noise_draws, len(self._places), dtype=torch.bool)
        ends = np.cumsum([len(e.batch) for e in entries]).tolist()
        starts = [0, *ends[:-1]]
        self._rows = {
            key: torch.arange(start, end) for key, start, end in zip(self._entries, starts, ends, strict=True)
        }
        for entry, rows in zip(entries, self._rows.values(), strict=True):
            if entry.recorded is not None:
                self._reference[0, rows] = entry.recorded * entry.executed
                self._known[0, rows] = True

    def rows(self, trajectory: Trajectory) -> torch.Tensor:
        """Row numbers, int64, of a held trajectory's decisions in order."""
        return self._rows[trajectory.trajectory_id]

    def features(self, trajectory: Trajectory) -> torch.Tensor:
        """What the policy sees of a held trajectory, in brief: mean row of the context and proprioception, float32
        [decisions, D + 8], on the CPU."""
        return self._entries[trajectory.trajectory_id].features

    def draws(self, count: int, first: int) -> torch.Tensor:
        """Draws of noise, int64 [count], for decisions by rank: `first` and those after it, round and round."""
        return (torch.arange(count) + first) % self.noise_draws

    def score(self, rows: torch.Tensor, noise: torch.Tensor | int = 0) -> torch.Tensor:
        """Log-probabilities under the policy as it is, float32 [rows, L], differentiable; `noise`, of each row or all,
        is one of the draws 0..noise_draws - 1. Actions that were not executed, for the episode ended before them,
        count nothing: 0."""
        batch, context = self._seen(rows)
        keys = noise_keys(self._groups[rows], noise, self._update)
        return self._policy.score(batch, context, noise_keys=keys) * self._executed[rows].to(self._device)

    @torch.no_grad()
    def refer(self, rows: torch.Tensor, noise: torch.Tensor) -> bool:
        """Compute what `reference` will be asked for, decisions int64 [rows] under draws of noise [rows], where it is
        neither recorded nor computed yet; whether all of it is finite. Not to be called within
        `adapters.merged_forward`, which hides the base."""
        asked = torch.unique(torch.stack([noise, rows]), dim=1)
        missing = asked[:, ~self._known[asked[0], asked[1]]]
        if missing.numel():
            size = self._micro_batch
            with adapters.disabled(self._policy.module):
                for draws, part in zip(missing[0].split(size), missing[1].split(size), strict=True):
                    self._reference[draws, part] = self.score(part, draws).float().cpu()
                    self._known[draws, part] = True
        return bool(self._reference[noise, rows].isfinite().all())

    def reference(self, rows: torch.Tensor, noise: torch.Tensor | int = 0) -> torch.Tensor:
        """Log-probabilities under the reference, float32 [rows, L], constant; the same noise as `score`. Raises
        RuntimeError for what `refer` was not asked for."""
        if not self._known[noise, rows].all():
            raise RuntimeError("the reference of these decisions has not been computed; call refer first")
        return self._reference[noise, rows].to(self._device)

    def _seen(self, rows: torch.Tensor) -> tuple[DecisionBatch, torch.Tensor]:
        """Decisions without their pixels, and their contexts, where the policy is."""
        batch = _moved(take(self._batch, rows), self._device)
        places = [self._places[row] for row in rows.tolist()]
        kept = [entry.context[i] for entry, i in places if entry.context is not None]
        if kept:
            return batch, torch.stack(kept).to(self._device)
        images = {
            name: torch.stack([getattr(entry.batch, name)[i] for entry, i in places]) for name in _CAMERAS
        }
        with torch.no_grad():
            return batch, self._policy.encode_context(_moved(replace(batch, **images), self._device))

    @torch.no_grad()
    def _entry(self, trajectory: Trajectory) -> _Entry:
        batch = stack(self._policy, trajectory)
        parts = torch.arange(len(batch)).split(self._micro_batch)
        context = torch.cat([self._policy.encode_context(take(batch, part)).cpu() for part in parts])
        batch = _moved(batch, torch.device("cpu"))
        keeps_context = context.nbytes <= sum(getattr(batch, name).nbytes for name in _CAMERAS)
        recorded = trajectory.policy_version >= 0 and not self._start_reference
        return _Entry(
            batch=_without_pixels(batch) if keeps_context else batch,
            context=context if keeps_context else None,
            features=torch.cat([context.mean(dim=1, dtype=torch.float32), batch.proprio_BP], dim=1),
            recorded=_recorded(trajectory, batch) if recorded else None,
            executed=_executed(trajectory, self._policy.tokens),
            group=noise_group(trajectory.cell),
        )


def _moved(batch: DecisionBatch, device: torch.device) -> DecisionBatch:
    return DecisionBatch(**{field.name: getattr(batch, field.name).to(device) for field in fields(batch)})


def _without_pixels(batch: DecisionBatch) -> DecisionBatch:
    # Not a slice of the images, which would keep all of their memory.
    nothing = torch.empty(len(batch), 0, 0, 3, dtype=torch.uint8)
    return replace(batch, agentview_BHWC=nothing, wrist_BHWC=nothing)


def noise_group(cell: Cell) -> int:
    """A number for a task's initial state, whose trajectories make pairs and see the same noise."""
    return 1000 * cell.task_id + cell.init_state


def noise_keys(groups: torch.Tensor, noise: torch.Tensor | int, update: int) -> torch.Tensor:
    """Key of a draw of noise in each group, int64; no two updates share any."""
    return groups * NOISE_DRAWS + noise + (update << 32)


def _executed(trajectory: Trajectory, length: int) -> torch.Tensor:
    """1 at the elements of executed actions, float32 [decisions, length]; an action's elements lie side by side."""
    shares = [d.executed * length // len(d.sample.actions) for d in trajectory.decisions]
    return (torch.arange(length) < torch.tensor(shares)[:, None]).float()


def _recorded(trajectory: Trajectory, batch: DecisionBatch) -> torch.Tensor:
    logps = np.stack([d.sample.logps for d in trajectory.decisions]).astype(np.float32)
    if logps.shape != tuple(batch.chunk_BL.shape) or not np.isfinite(logps).all():
        raise ValueError(
            f"trajectory {trajectory.trajectory_id}: recorded log-probs {logps.shape} must be finite and as many "
            f"as the chunks' elements, {tuple(batch.chunk_BL.shape)}"
        )
    return torch.from_numpy(logps)
