"""A stochastic step of a flow policy's sampler, and its log-probability.

Liu et al. 2025, arXiv 2505.05470 (Flow-GRPO: the sampler's ODE as an SDE with the same marginals). pi-RL, arXiv
2510.25889 (the same step for pi-0 and pi-0.5). Sigma is the time of the flow: 1 is noise, 0 is data, and a velocity
is noise minus data. No policy samples this way and no recipe trains with it: it is here to be compared with recorded
numbers (`policies.parity`).

Letters: B samples, K denoising steps; the other axes of a sample are free (`...`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_TRAINING_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class SdeStep:
    """The Gaussian that the next sample is drawn from."""

    mean: torch.Tensor
    """float [B, ...]."""
    diffusion: torch.Tensor
    """The SDE's noise level sigma_t per unit of time, float [B, 1, ...]."""
    std: torch.Tensor
    """Of the step, sigma_t sqrt(-dt), float [B, 1, ...]."""

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The next sample for standard normal `noise` [B, ...]."""
        return self.mean + self.std * noise

    def log_prob(self, following: torch.Tensor) -> torch.Tensor:
        """Log-density of every element of the next sample, nats, float [B, ...]; Flow-GRPO takes their mean.

        No gradient flows into `following`: it is the action that was taken.
        """
        errors = (following.detach() - self.mean).square()
        return -errors / (2 * self.std.square()) - self.std.log() - math.log(math.sqrt(2 * math.pi))


def scheduler_sigmas(steps: int, *, shift: float = 1.0) -> torch.Tensor:
    """Sigmas of K = `steps` denoising steps, float32 [K + 1], from 1 to 0, as diffusers spaces them: K levels, equally
    far apart from 1 to the smallest level trained on, each moved by s -> shift s / (1 + (shift - 1) s), then 0.

    The smallest level, 1 / 1000, is itself shifted before the others are spaced. openpi's sampler has
    `torch.linspace(1, 0, K + 1)` instead. Raises ValueError for no steps.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")

    def shifted(levels: torch.Tensor) -> torch.Tensor:
        return shift * levels / (1 + (shift - 1) * levels)

    lowest = shifted(torch.tensor(1 / _TRAINING_STEPS, dtype=torch.float64)).item()
    levels = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat([shifted(levels), torch.zeros(1, dtype=torch.float64)]).float()


def sde_step(
    sample: torch.Tensor,
    velocity: torch.Tensor,
    sigmas: torch.Tensor,
    steps: torch.Tensor,
    *,
    noise_level: float,
) -> SdeStep:
    """From sigma_k to sigma_k+1, where k int64 [B] = `steps` and `sigmas` float [K + 1] fall from 1 to 0.

    sigma_t = noise_level sqrt(s / (1 - s)), with s = sigmas[1] in that denominator where s is 1; with dt < 0,
    mean = x (1 + sigma_t^2 dt / (2 s)) + v (1 + sigma_t^2 (1 - s) / (2 s)) dt. A noise level of 0 is the Euler step of
    the ODE, whose log-probability does not exist.
    """
    axes = (-1, *[1] * (sample.ndim - 1))
    now, following = sigmas[steps].view(axes), sigmas[steps + 1].view(axes)
    dt = following - now
    below_one = torch.where(now == 1, sigmas[1], now)
    diffusion = torch.sqrt(now / (1 - below_one)) * noise_level
    drift = diffusion.square() / (2 * now)
    mean = sample * (1 + drift * dt) + velocity * (1 + diffusion.square() * (1 - now) / (2 * now)) * dt
    return SdeStep(mean=mean, diffusion=diffusion, std=diffusion * torch.sqrt(-dt))
