"""Settings of the supervised start, and of what training keeps apart from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from configs.part import Part


class SupervisedPart(Part):
    """Supervised start: maximum likelihood on the demonstrations."""

    steps: int = Field(
        2000,
        ge=0,
        description="optimizer steps; 0 with policy.checkpoint: the published weights are the start",
    )
    batch_size: int = Field(32, ge=1, description="decisions per step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (AdamW, linear warm-up, cosine decay)")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up steps")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay; of an adapter none")
    image_shift: int = Field(
        3, ge=0, description="random image shift, pixels (augmentation in supervised training only)"
    )
    grad_clip: float = Field(1.0, gt=0, description="gradient norm limit")
    init: str | None = Field(
        None,
        description="folder of the weights that training begins with, of the same policy: a run's checkpoints/start, "
        "or what `capability merge` made; none: weights drawn by the seed, or policy.checkpoint",
    )
    trains: Literal["weights", "adapter"] = Field(
        "weights",
        description="`weights`, all of them; `adapter`, a low-rank one as under adapter, on the weights of init or "
        "policy.checkpoint, merged into them at the end",
    )
    auxiliary: Literal["none", "spatial", "future"] = Field(
        "none",
        description="what visual tokens are trained on beside the actions: `spatial`, how far what they show lies; "
        "`future`, how it is about to change",
    )
    auxiliary_weight: float = Field(0.5, gt=0, description="weight of the auxiliary loss")

    @model_validator(mode="after")
    def _init_is_trained(self) -> SupervisedPart:
        if self.init is not None and not self.steps:
            raise ValueError(
                f"supervised.init={self.init} with supervised.steps=0 trains nothing; set supervised.steps"
            )
        return self

    @model_validator(mode="after")
    def _adapter_learns(self) -> SupervisedPart:
        if self.trains == "adapter" and not self.steps:
            raise ValueError(
                "supervised.trains=adapter with supervised.steps=0 trains nothing; set supervised.steps"
            )
        if self.trains == "adapter" and self.auxiliary != "none":
            raise ValueError(
                f"supervised.auxiliary={self.auxiliary} trains visual tokens, which an adapter leaves as they are; set "
                "supervised.trains=weights, or supervised.auxiliary=none"
            )
        return self


class CapabilityPart(Part):
    """What training keeps apart from: a capability vector (CapVector, arXiv 2605.10903)."""

    vector: str | None = Field(
        None, description="folder that `capability extract` made; none: nothing is kept apart"
    )
    penalty: Literal["none", "elementwise", "cosine"] = Field(
        "elementwise",
        description="`elementwise`: the paper's sum of |gamma_ij delta_ij|, of a supervised start of whole weights "
        "only; `cosine`: mean squared cosine of gamma and delta by weight, of an adapter's change too",
    )
    penalty_weight: float | None = Field(
        None, gt=0, description="weight of the penalty; none: 1e-4 elementwise (the paper's), 0.1 cosine"
    )

    @property
    def weight(self) -> float:
        """The penalty's weight; 0: there is none."""
        if self.vector is None or self.penalty == "none":
            return 0.0
        return self.penalty_weight or {"elementwise": 1e-4, "cosine": 0.1}[self.penalty]
