"""Family `flow_sde`: one stochastic step of a flow sampler and its log-probability, a mean over elements.

An input is `case<i>/<name>` where a case has its own, otherwise `<name>`.
"""

from __future__ import annotations

from typing import Any

import torch

from objectives import flow_sde
from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs

_RELATIVE = 1e-5
"""Given a next sample far from the mean, a last step of tiny noise has log-probabilities of -1e8."""
_GRADIENT_RELATIVE = 1e-4
"""Their gradient is the distance from the mean, what is left of two samples taken from each other, over a tiny square:
float32 is up to 6e-4 of it away from float64, and no closer than this to another order of operations."""


def compute(fixture: Fixture) -> Outputs:
    """Every output of every case in config.json. Raises FixtureError for a case without its settings."""
    found: dict[str, Output] = {}
    for i, case in enumerate(_cases(fixture)):
        missing = [key for key in ("num_steps", "noise_level") if key not in case]
        if missing:
            raise FixtureError(
                f"{fixture.folder / 'config.json'}: case {i} lacks {missing[0]!r}, it has {case}"
            )
        sigmas = flow_sde.scheduler_sigmas(case["num_steps"], shift=case.get("shift", 1.0))
        outputs = _case(fixture, f"case{i}/", sigmas, case["noise_level"])
        found |= {f"case{i}/{name}": output for name, output in outputs.items()}
    return found


def _cases(fixture: Fixture) -> list[dict[str, Any]]:
    cases = fixture.setting("cases")
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise FixtureError(
            f"{fixture.folder / 'config.json'}: cases are {cases!r}, expected a list of objects"
        )
    return cases


def _case(fixture: Fixture, prefix: str, sigmas: torch.Tensor, noise_level: float) -> dict[str, Output]:
    steps, sample, given_velocity, noise, given = (
        fixture.input(prefix + name if prefix + name in fixture.inputs else name)
        for name in ("step_index", "sample", "velocity", "variance_noise", "prev_sample")
    )
    where = fixture.folder / "inputs.safetensors"
    shapes = [list(tensor.shape) for tensor in (sample, given_velocity, noise, given)]
    if any(shape != shapes[0] for shape in shapes) or list(steps.shape) != shapes[0][:1]:
        raise FixtureError(
            f"{where}: {prefix}sample, velocity, variance_noise and prev_sample must share one shape whose first axis "
            f"is step_index's, got {', '.join(map(str, shapes))} and {list(steps.shape)}"
        )
    if int(steps.min()) < 0 or int(steps.max()) >= len(sigmas) - 1:
        raise FixtureError(f"{where}: step_index must lie in 0 .. {len(sigmas) - 2}, got {steps.tolist()}")
    velocity = given_velocity.clone().requires_grad_()
    step = flow_sde.sde_step(sample, velocity, sigmas, steps, noise_level=noise_level)
    drawn = step.sample(noise)
    given_logps = _mean(step.log_prob(given))
    (gradient,) = torch.autograd.grad(given_logps.sum(), velocity, retain_graph=True)
    return {
        "sigmas": Output(sigmas),
        "mean": Output(step.mean),
        "std_dev_t": Output(step.diffusion),
        "sampled_prev": Output(drawn),
        "sampled_logprob": Output(_mean(step.log_prob(drawn)), relative=_RELATIVE),
        "given_prev_logprob": Output(given_logps, relative=_RELATIVE),
        "grad_velocity_of_sum_logprob": Output(gradient, relative=_GRADIENT_RELATIVE),
    }


def _mean(logps: torch.Tensor) -> torch.Tensor:
    return logps.mean(dim=tuple(range(1, logps.ndim)))


FAMILY = Family(compute=compute, required=("*/given_prev_logprob",))
