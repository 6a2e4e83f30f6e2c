"""How a run is kept going and watched; nothing here changes what it does."""

from __future__ import annotations

from pydantic import Field

from configs.part import Part


class DeadlinePart(Part):
    """Longest that a call into a simulator, or of a policy actor, may take before its process is ended and what it was
    doing is done again."""

    reset_s: float = Field(300.0, gt=0, description="seconds for building or resetting a simulator")
    step_s: float = Field(60.0, gt=0, description="seconds for the control steps of one chunk")
    render_s: float = Field(60.0, gt=0, description="seconds for drawing one observation")
    answer_s: float = Field(
        300.0, gt=0, description="seconds for a decision, with what a policy actor loads before it"
    )


class PagePart(Part):
    """The live page of the run."""

    serve: bool = Field(True, description="serve the page while the run goes on")
    host: str = Field(
        "127.0.0.1",
        description="where it listens; another than loopback needs a token of your own in PAIRLOOM_DASHBOARD_TOKEN",
    )
    port: int | None = Field(None, ge=1, le=65535, description="none: the first free one from 8266 up")


class TrackingPart(Part):
    """Where the run's metrics go beside its folder. What is set here changes no outcome."""

    tensorboard: bool = Field(True, description="write TensorBoard event files to <run>/tensorboard/")
    prometheus: bool = Field(
        True,
        description="export gauges and counters through Ray, as ray_pairloom_... (dashboard/grafana.json)",
    )
    wandb: str | None = Field(
        None,
        description="project of Weights & Biases, which is the extra `wandb`; none: not logged there",
    )
