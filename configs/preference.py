"""Settings of an update: the adapter that learns, what it learns from, and what stops it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.part import Part

FIRST_BETA = 0.1
"""Where the search for a beta begins."""


class AdapterPart(Part):
    """The low-rank adapter (peft) that preference learning trains, and of its own the supervised start if it says so;
    with it off, the policy is that start."""

    method: Literal["lora", "dora"] = Field(
        "dora", description="LoRA, or DoRA (LoRA with learned magnitudes)"
    )
    rank: int = Field(32, ge=1, description="rank r")
    alpha: float = Field(64, gt=0, description="scaling is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="adapter dropout")


class PreferencePart(Part):
    """One learning round: DPO with its anchors. Weights of zero switch a term off."""

    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO form")
    credit: Literal["value", "uniform"] = Field(
        "value",
        description="what a trajectory's log-ratio sums: `value`, its decisive chunks, weighted by how much each "
        "changed the estimated chance of success; `uniform`, all its chunks alike",
    )
    beta: float | None = Field(
        0.1,
        gt=0,
        description="DPO inverse temperature, on summed token log-ratios (see credit: of a chunk, or of all); none: of "
        "the sigmoid form, chosen in the first update so that the logits of its pairs spread by 1 after 50 steps",
    )
    reference: Literal["behaviour", "start"] = Field(
        "behaviour",
        description="reference policy: the one that produced each trajectory (its recorded log-probs), or the "
        "supervised start or published weights (adapter off)",
    )
    preference_weight: float = Field(
        0.05,
        ge=0,
        description="weight of the DPO term, whose gradient is large beside the per-token likelihood terms",
    )
    anchor_weight: float = Field(0.2, ge=0, description="weight of -log pi on the chosen side of each pair")
    proximal_weight: float = Field(
        0.0,
        ge=0,
        description="weight of RPRO's proximal term on both sides of each pair, which holds their log-ratios near 0",
    )
    success_weight: float = Field(1.0, ge=0, description="weight of -log pi on successful trajectories")
    demo_weight: float = Field(0.5, ge=0, description="weight of -log pi on the demonstrations")
    rejected_floor: float = Field(
        0.05,
        gt=0,
        description="nats per token that a rejected chunk may fall below reference and still give gradient",
    )
    lr: float = Field(2e-4, gt=0, description="AdamW learning rate of the adapter")
    steps: int = Field(150, ge=1, description="optimizer steps per round")
    pairs_per_step: int = Field(4, ge=1, description="pairs per optimizer step")
    decisions_per_trajectory: int = Field(
        4,
        ge=1,
        description="decisions of each side of a pair in a step: with value credit the most decisive, else drawn at "
        "random and rescaled to the whole trajectory's sum",
    )
    batch_size: int = Field(32, ge=1, description="decisions per step for the success and demo terms")
    pairs_per_state: int = Field(
        4, ge=1, description="at most this many pairs from one initial state and version"
    )
    max_staleness: int = Field(
        2, ge=0, description="versions a trajectory may lag behind and still be learned from"
    )
    micro_batch: int = Field(64, ge=1, description="decisions in one pass, unless a single pair needs more")
    grad_clip: float = Field(1.0, gt=0, description="gradient norm limit")

    @property
    def first_beta(self) -> float:
        """What the first update begins with."""
        return FIRST_BETA if self.beta is None else self.beta


class GuardPart(Part):
    """What stops a destructive update: a tripwire in the learner, and a canary before the fleet."""

    chosen_drop: float = Field(
        0.1,
        gt=0,
        description="tripwire: nats per token that chosen or successful decisions may fall below reference, in the "
        "mean of ten steps",
    )
    canary_episodes: int = Field(
        40,
        ge=0,
        description="episodes a new version drives before promotion, on cells the old one has driven",
    )
    canary_significance: float = Field(
        0.05, gt=0, lt=0.5, description="roll back when one-sided exact McNemar says worse at this level"
    )
