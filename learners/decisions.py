"""Decisions of many trajectories as tensors in memory, so that a training step only indexes rows.

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

SCORE_BATCH = 64
"""Decisions encoded or scored at once where no gradient is needed."""
NOISE_DRAWS = 8
"""Draws of noise under which a surrogate's reference is kept; the decisions of a step go round them."""


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
    batch: DecisionBatch
    """Without pixels: images are kept as their context."""
    context: torch.Tensor
    reference: torch.Tensor
    """float32 [noise draws, decisions, L]; NaN where it is not recorded."""
    executed: torch.Tensor
    """float32 [decisions, L], 1 at elements of actions that were executed, else 0."""
    group: int
    """Which noise; see `noise_group`."""


class DecisionPool:
    """The decisions that an update may draw, with what stays constant over its steps computed once.

    Constant are the context (the adapter leaves it alone) and the reference log-probs, of which a surrogate has
    NOISE_DRAWS, one for each draw of noise. What is not recorded of them is computed when `refer` first asks for it:
    an update looks at less than half. The context is kept by trajectory id from one update to the next.

    Policy and reference see one decision under the same noise: that is what makes their difference an estimate of a
    log-ratio. The two sides of a pair share it too, rank by rank (`draws`), wherever in their trajectories the
    decisions lie: all trajectories from one initial state have the same NOISE_DRAWS keys, and what the noise does to
    both sides alike leaves their margin (of flow policies it takes a third of the margin's standard deviation). Other
    initial states have other keys, so that the likelihood terms see many.
    """

    def __init__(self, policy: Policy, *, start_reference: bool) -> None:
        """`start_reference`: the reference is the policy with its adapter off, else each trajectory's recorded
        log-probs. Raises ValueError for recorded ones of a policy that records none."""
        if not start_reference and not policy.exact:
            raise ValueError(
                "this policy's score is a surrogate and is not recorded: set preference.reference=start"
            )
        self._policy = policy
        self._start_reference = start_reference
        self.noise_draws = 1 if policy.exact else NOISE_DRAWS
        self._entries: dict[str, _Entry] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def hold(self, trajectories: Sequence[Trajectory]) -> None:
        """Hold exactly these; what is already there is kept, the rest dropped. Raises ValueError for a trajectory
        whose recorded chunks or log-probs do not fit the policy."""
        wanted = {t.trajectory_id: t for t in trajectories}
        self._entries = {key: self._entries.get(key) or self._entry(t) for key, t in wanted.items()}
        entries = list(self._entries.values())
        self._batch = concatenate([e.batch for e in entries])
        self._context = torch.cat([e.context for e in entries])
        self._reference = torch.cat([e.reference for e in entries], dim=1)
        self._executed = torch.cat([e.executed for e in entries])
        self._groups = torch.cat([torch.full((len(e.batch),), e.group) for e in entries])
        ends = np.cumsum([len(e.batch) for e in entries]).tolist()
        starts = [0, *ends[:-1]]
        self._rows = {
            key: torch.arange(start, end) for key, start, end in zip(self._entries, starts, ends, strict=True)
        }

    def forget(self) -> None:
        """Hold nothing, and keep nothing of what was held."""
        self._entries, self._rows = {}, {}

    def rows(self, trajectory: Trajectory) -> torch.Tensor:
        """Row numbers, int64, of a held trajectory's decisions in order."""
        return self._rows[trajectory.trajectory_id]

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """What the policy sees, in brief: mean row of the context and proprioception, float32 [rows, D + 8], on the
        CPU."""
        seen = torch.cat([self._context[rows].mean(dim=1), self._batch.proprio_BP[rows]], dim=1)
        return seen.float().cpu()

    def draws(self, count: int, first: int) -> torch.Tensor:
        """Draws of noise, int64 [count], for decisions by rank: `first` and those after it, round and round."""
        return (torch.arange(count) + first) % self.noise_draws

    def score(self, rows: torch.Tensor, noise: torch.Tensor | int = 0) -> torch.Tensor:
        """Log-probabilities under the policy as it is, float32 [rows, L], differentiable; `noise`, of each row or all,
        is one of the draws 0..noise_draws - 1. Actions that were not executed, for the episode ended before them,
        count nothing: 0."""
        keys = noise_keys(self._groups[rows], noise)
        logps = self._policy.score(take(self._batch, rows), self._context[rows], noise_keys=keys)
        return logps * self._executed[rows]

    @torch.no_grad()
    def refer(self, rows: torch.Tensor, noise: torch.Tensor) -> None:
        """Compute what `reference` will be asked for, decisions int64 [rows] under draws of noise [rows], where it is
        neither recorded nor computed yet. Not to be called within `adapters.merged_forward`, which hides the base."""
        asked = torch.unique(torch.stack([noise, rows]), dim=1)
        missing = asked[:, self._reference[asked[0], asked[1], 0].isnan().cpu()]
        if not missing.numel():
            return
        with adapters.disabled(self._policy.module):
            for draws, part in zip(missing[0].split(SCORE_BATCH), missing[1].split(SCORE_BATCH), strict=True):
                keys = noise_keys(self._groups[part], draws)
                logps = self._policy.score(take(self._batch, part), self._context[part], noise_keys=keys)
                self._reference[draws, part] = logps.to(self._reference.dtype)

    def reference(self, rows: torch.Tensor, noise: torch.Tensor | int = 0) -> torch.Tensor:
        """Log-probabilities under the reference, float32 [rows, L], constant; the same noise as `score`. Raises
        RuntimeError for what `refer` was not asked for."""
        found = self._reference[noise, rows]
        if found.isnan().any():
            raise RuntimeError("the reference of these decisions has not been computed; call refer first")
        return found * self._executed[rows]

    @torch.no_grad()
    def _entry(self, trajectory: Trajectory) -> _Entry:
        batch = stack(self._policy, trajectory)
        rows, group = torch.arange(len(batch)).split(SCORE_BATCH), noise_group(trajectory.cell)
        context = torch.cat([self._policy.encode_context(take(batch, part)) for part in rows])
        reference = torch.full((self.noise_draws, len(batch), self._policy.tokens), torch.nan)
        if trajectory.policy_version >= 0 and not self._start_reference:
            reference = _recorded(trajectory, batch)[None]
        images = batch.agentview_BHWC[:, :0]
        return _Entry(
            batch=replace(batch, agentview_BHWC=images, wrist_BHWC=images),
            context=context,
            reference=reference.to(batch.chunk_BL.device),
            executed=_executed(trajectory, self._policy.tokens).to(batch.chunk_BL.device),
            group=group,
        )


def noise_group(cell: Cell) -> int:
    """A number for a task's initial state, whose trajectories make pairs and see the same noise."""
    return 1000 * cell.task_id + cell.init_state


def noise_keys(groups: torch.Tensor, noise: torch.Tensor | int) -> torch.Tensor:
    """Key of a draw of noise in each group, int64."""
    return groups * NOISE_DRAWS + noise


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
