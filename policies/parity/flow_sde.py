"""Family `flow_sde`: one stochastic step of a flow sampler and its log-probability, a mean over elements."""

from __future__ import annotations

import torch

from objectives import flow_sde
from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs

_RELATIVE = 1e-4
"""Given a next sample far from the mean, a last step of tiny noise has log-probabilities of -1e8."""


def compute(fixture: Fixture) -> Outputs:
    """Every output of every case in config.json. Raises FixtureError for a case without its settings."""
    found: dict[str, Output] = {}
    for i, case in enumerate(fixture.setting("cases")):
        missing = [key for key in ("num_steps", "noise_level") if key not in case]
        if missing:
            raise FixtureError(
                f"{fixture.folder / 'config.json'}: case {i} lacks {missing[0]!r}, it has {case}"
            )
        sigmas = flow_sde.scheduler_sigmas(case["num_steps"], shift=case.get("shift", 1.0))
        outputs = _case(fixture, sigmas, fixture.input(f"case{i}/step_index"), case["noise_level"])
        found |= {f"case{i}/{name}": output for name, output in outputs.items()}
    return found


def _case(
    fixture: Fixture, sigmas: torch.Tensor, steps: torch.Tensor, noise_level: float
) -> dict[str, Output]:
    if int(steps.min()) < 0 or int(steps.max()) >= len(sigmas) - 1:
        raise FixtureError(
            f"{fixture.folder / 'inputs.safetensors'}: step_index must lie in 0 .. {len(sigmas) - 2}, "
            f"got {steps.tolist()}"
        )
    velocity = fixture.input("velocity").clone().requires_grad_()
    step = flow_sde.sde_step(fixture.input("sample"), velocity, sigmas, steps, noise_level=noise_level)
    drawn = step.sample(fixture.input("variance_noise"))
    given_logps = _mean(step.log_prob(fixture.input("prev_sample")))
    (gradient,) = torch.autograd.grad(given_logps.sum(), velocity, retain_graph=True)
    return {
        "sigmas": Output(sigmas),
        "mean": Output(step.mean),
        "std_dev_t": Output(step.diffusion),
        "sampled_prev": Output(drawn),
        "sampled_logprob": Output(_mean(step.log_prob(drawn)), relative=_RELATIVE),
        "given_prev_logprob": Output(given_logps, relative=_RELATIVE),
        "grad_velocity_of_sum_logprob": Output(gradient, relative=_RELATIVE),
    }


def _mean(logps: torch.Tensor) -> torch.Tensor:
    return logps.mean(dim=tuple(range(1, logps.ndim)))


FAMILY = Family(compute=compute, required=("*/given_prev_logprob",))
