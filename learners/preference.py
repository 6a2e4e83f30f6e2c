"""Preference learning: rounds of DPO on success/failure pairs, with likelihood anchors and a tripwire."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart
from learners.decisions import DecisionPool, stack, take
from learners.draws import Draws
from learners.orthogonality import AdapterPenalty
from learners.report import WINDOW, Trip, Tripwire, UpdateReport, mean_of_last, skipped
from learners.spread import AFTER_STEPS, Spread, spread
from learners.terms import accumulate_gradients, logratios, lowest_logratio, refer
from policies.protocol import Policy
from policies.weights import adapters
from trajectories.records import AdapterWeights, PreferencePair, Trajectory

OnStep = Callable[[int, dict[str, float]], None]
_GENERATOR, _UPDATES, _CALIBRATION, _SPREAD = "generator", "updates", "calibration.", "spread"


@dataclass(frozen=True, slots=True)
class _Before:
    """What a tripped update puts back."""

    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    spread: Spread | None


class PreferenceLearner:
    """Trains an adapter on a policy's decoder. With the adapter off, the policy is the supervised start.

    Example:
        learner = PreferenceLearner(
            policy, adapter=part.adapter, preference=part.preference, guard=part.guard, base_hash=start, seed=0
        )
        report = learner.update(pairs, successes, demos)
        if not report.stopped:
            publish(learner.adapter())
    """

    def __init__(
        self,
        policy: Policy,
        *,
        adapter: AdapterPart,
        preference: PreferencePart,
        guard: GuardPart,
        base_hash: str,
        seed: int,
        capability: CapabilityPart | None = None,
        vector: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Attach the adapter to `policy.module`, whose weights are frozen from now on and hash to `base_hash`; with a
        capability `vector`, its change is held apart from that as `capability` says."""
        adapters.attach(policy.module, adapter, seed=seed, decoders=policy.adapted)
        self._policy = policy
        self._dropout = adapter.dropout
        self._recipe = self._part = preference
        """As it was given, and as it is in force: with the beta that was found."""
        self._spread: Spread | None = None
        self._beta = self._part.first_beta
        """Of the last step."""
        self._seed = seed
        self._guard = guard
        self._base_hash = base_hash
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = adapters.parameters(policy.module)
        self.penalty = (  # public: benchmarks time it alone
            AdapterPenalty(policy.module, capability, vector)
            if capability is not None and capability.weight and vector is not None
            else None
        )
        self._initial = self.adapter()
        start = preference.reference == "start"
        self._pool = DecisionPool(policy, start_reference=start, micro_batch=preference.micro_batch)
        self._updates = 0  # each has noise of its own
        self._calibration: dict[str, float] | None = None
        self.reset_optimizer()

    def update(
        self,
        pairs: Sequence[PreferencePair],
        successes: Sequence[Trajectory],
        demos: Sequence[Trajectory],
        *,
        on_step: OnStep | None = None,
    ) -> UpdateReport:
        """One round of optimizer steps on these data; see `learners.terms` for the loss and the metrics.

        `on_step` gets the step number from 1 and its metrics, with `grad_norm` before clipping. Without anything new to
        learn from, nothing happens and the report says `skipped`; demonstrations alone are learned from only where
        every other weight is zero. When the tripwire trips, adapter and optimizer are put back exactly as they were
        and the report says `tripped`.
        """
        part = self._part
        demos_alone = part.demo_weight and not (
            part.preference_weight or part.proximal_weight or part.anchor_weight or part.success_weight
        )
        pairs = pairs if part.preference_weight or part.proximal_weight or part.anchor_weight else ()
        successes = successes if part.success_weight else ()
        demos = demos if part.demo_weight else ()
        if not (pairs or successes or (demos_alone and demos)):
            return skipped("no pairs and no successes to learn from (or their weights are zero)")
        self._calibrate(demos or successes or [pair.chosen for pair in pairs])
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        self._pool.hold([*sides, *successes, *demos], update=self._updates)
        self._updates += 1
        draws = Draws(self._pool, part, self._generator, pairs=pairs, successes=successes, demos=demos)
        before = self._remember()
        history: list[dict[str, float]] = []
        with self._training():
            trip = self._run(draws, history, on_step)
        if trip is not None:
            self._put_back(before)
        return UpdateReport(
            stopped="tripped" if trip else "",
            reason=trip.reason if trip else "",
            steps=len(history),
            value=trip.value if trip else 0.0,
            metrics=mean_of_last(history)
            | {"beta": self._beta}
            | self._said(measured=before.spread is not self._spread),
            history=tuple(history),
        )

    def adapter(self) -> AdapterWeights:
        """A copy of the adapter as it is. Raises ValueError when a factor is not finite."""
        return adapters.extract(self._policy.module, base_hash=self._base_hash)

    def restore(self, weights: AdapterWeights | None) -> None:
        """Take up an adapter (None: the one it began with, which changes nothing) with a fresh optimizer.

        Raises ValueError for an adapter of another base, method or shape.
        """
        if weights is not None and weights.base_hash != self._base_hash:
            raise ValueError(
                f"the adapter is for base {weights.base_hash[:12]}, this learner's base is {self._base_hash[:12]}"
            )
        adapters.load(self._policy.module, weights if weights is not None else self._initial)
        if weights is None:
            self._take(None)  # what its pairs were spread by went with the update
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=self._part.lr, weight_decay=0.0)

    def state(self) -> dict[str, np.ndarray]:
        """Adapter, optimizer moments, random generator, number of updates, and what a surrogate and beta were
        calibrated to, as named arrays, for a checkpoint."""
        arrays = {f"adapter.{name}": _array(parameter) for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                arrays[f"optimizer.{name}.{key}"] = _array(value)
        arrays[_GENERATOR] = self._generator.get_state().numpy().copy()
        arrays[_UPDATES] = np.array(self._updates)
        for key, number in (self._calibration or {}).items():
            arrays[_CALIBRATION + key] = np.array(number)
        if self._spread is not None:
            arrays[_SPREAD] = np.array([self._spread.nats, self._spread.pairs])
        return arrays

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where `state` was taken. Raises KeyError naming a missing array, ValueError for one of
        another shape."""
        values = {name: torch.from_numpy(arrays[f"adapter.{name}"].copy()) for name in self._parameters}
        for name, parameter in self._parameters.items():
            if values[name].shape != parameter.shape:
                raise ValueError(
                    f"adapter.{name} has shape {tuple(values[name].shape)}, expected {tuple(parameter.shape)}"
                )
        self.reset_optimizer()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])
                prefix = f"optimizer.{name}."
                moments = {
                    key.removeprefix(prefix): torch.from_numpy(array.copy())
                    for key, array in arrays.items()
                    if key.startswith(prefix)
                }
                if moments:
                    self._optimizer.state[parameter] = {
                        key: value if key == "step" else value.to(parameter.device)
                        for key, value in moments.items()
                    }
        self._generator.set_state(torch.from_numpy(arrays[_GENERATOR].copy()))
        self._updates = int(arrays[_UPDATES])
        said = {
            k.removeprefix(_CALIBRATION): v.item() for k, v in arrays.items() if k.startswith(_CALIBRATION)
        }
        if said:
            self._policy.take_calibration(said)
        self._calibration = said or None
        found = arrays.get(_SPREAD)
        self._take(None if found is None else Spread(nats=float(found[0]), pairs=int(found[1])))

    def _run(self, draws: Draws, history: list[dict[str, float]], on_step: OnStep | None) -> Trip | None:
        part, drawn = self._part, iter(draws)
        tripwire = Tripwire(self._guard.chosen_drop, window=min(WINDOW, part.steps))
        parameters = list(self._parameters.values())
        for step in range(1, part.steps + 1):
            draw = next(drawn)
            self._optimizer.zero_grad(set_to_none=True)
            if not refer(draw, self._pool, part):
                return Trip(reason="reference log-prob is not finite", value=float("nan"))
            with self._forward():
                metrics = accumulate_gradients(draw, self._pool, part)
            self._beta = part.first_beta
            if self.penalty is not None:
                metrics |= self.penalty.add_gradients()
            norm = torch.nn.utils.clip_grad_norm_(parameters, part.grad_clip).item()
            metrics["grad_norm"] = norm
            history.append(metrics)
            if on_step is not None:
                on_step(step, metrics)
            trip = tripwire.check(lowest_logratio(metrics), loss=metrics["loss"], grad_norm=norm)
            if trip is not None:
                return trip
            self._optimizer.step()
            if step == min(AFTER_STEPS, part.steps) and self._spread is None and draw.pairs:
                self._take(self._measure(draws))
                part = self._part
        # The checks above precede each step; this one judges what the last step left behind.
        left = Tripwire(self._guard.chosen_drop, window=1)
        return left.check(lowest_logratio(logratios(draw, self._pool, part)))

    def _calibrate(self, trajectories: Sequence[Trajectory]) -> None:
        """Once, before the first step: put a surrogate's scores in nats by what the start makes of these."""
        if self._calibration is None:
            stacked = (stack(self._policy, trajectory) for trajectory in trajectories)
            size = self._part.micro_batch
            batches = (take(b, rows) for b in stacked for rows in torch.arange(len(b)).split(size))
            with adapters.disabled(self._policy.module):
                self._calibration = self._policy.calibrate(batches)

    def _measure(self, draws: Draws) -> Spread | None:
        if not self._part.preference_weight:
            return None
        once = draws.pairs_once(torch.Generator().manual_seed(self._seed))
        self._policy.module.eval()  # no dropout is drawn: training goes on as if nobody had looked
        try:
            return spread(once, self._pool, self._part)
        finally:
            self._policy.module.train()

    def _take(self, found: Spread | None) -> None:
        self._spread = found
        self._part = self._recipe if found is None else found.in_force(self._recipe)

    def _said(self, *, measured: bool) -> dict[str, float]:
        """What was calibrated, and how the adapter lies to a capability vector, for a report."""
        spread = self._spread.metrics(self._recipe) if self._spread is not None and measured else {}
        lies = {} if self.penalty is None else self.penalty.lie()
        return (self._calibration or {}) | spread | lies

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode, with dropout drawn from this learner's generator and torch's own left as it was."""
        seed = int(torch.randint(2**31, (), generator=self._generator))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._policy.module.train()
            try:
                yield
            finally:
                self._policy.module.eval()

    def _forward(self) -> AbstractContextManager[None]:
        """Merged weights, once a step, unless dropout needs the adapter's own path."""
        return nullcontext() if self._dropout else adapters.merged_forward(self._policy.module)

    def _remember(self) -> _Before:
        return _Before(
            parameters={name: p.detach().clone() for name, p in self._parameters.items()},
            optimizer=copy.deepcopy(self._optimizer.state_dict()),
            spread=self._spread,
        )

    def _put_back(self, before: _Before) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(before.parameters[name])
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.load_state_dict(before.optimizer)
        self._take(before.spread)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()
