"""Where episodes happen: tasks and initial states, the simulator, and the demonstrations collected there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from configs.part import Part

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]


class TaskPart(Part):
    """Which tasks, and which of each task's 50 official initial states serve which purpose."""

    suite: Suite = Field(description="LIBERO suite")
    task_ids: tuple[int, ...] = Field(description="task indices in the suite's official order", min_length=1)
    demo_init_states: tuple[int, ...] = Field(
        description="initial states the scripted expert demonstrates", min_length=1
    )
    train_init_states: tuple[int, ...] = Field(description="initial states of online rollouts", min_length=1)
    held_out_init_states: tuple[int, ...] = Field(
        description="initial states of evaluation only", min_length=1
    )

    @model_validator(mode="after")
    def _indices_make_sense(self) -> TaskPart:
        seen = set(self.demo_init_states) | set(self.train_init_states)
        shared = sorted(seen & set(self.held_out_init_states))
        if shared:
            raise ValueError(f"held_out_init_states must not be trained on, but {shared} are in both")
        states = {
            "demo_init_states": self.demo_init_states,
            "train_init_states": self.train_init_states,
            "held_out_init_states": self.held_out_init_states,
        }
        for name, indices in states.items():
            bad = [i for i in indices if not 0 <= i < 50]
            if bad:
                raise ValueError(f"{name} must lie in 0..49, got {bad}")
        last = 89 if self.suite == "libero_90" else 9
        bad = [i for i in self.task_ids if not 0 <= i <= last]
        if bad:
            raise ValueError(f"task_ids of {self.suite} must lie in 0..{last}, got {bad}")
        for name, indices in {**states, "task_ids": self.task_ids}.items():
            if len(set(indices)) < len(indices):
                raise ValueError(f"{name} must name each index once, got {list(indices)}")
        return self


class EnvironmentPart(Part):
    """The simulator and what it draws."""

    image_size: int = Field(64, description="rows and columns of both camera images, pixels", ge=16, le=1024)
    geometry: Literal["visual", "collision"] = Field(
        "visual",
        description="which geometry is drawn: the visual meshes, or the (painted) collision shapes, which cost "
        "about a quarter of the time in software rendering",
    )
    settle_steps: int = Field(10, description="no-op steps after a reset, before the policy acts", ge=0)
    max_steps: int | None = Field(
        None, description="step limit of an episode; none: the suite's published limit", ge=1
    )
    assets: str | None = Field(
        None, description="folder with LIBERO's assets; none: cache, then Hub, then procedural stand-ins"
    )
    renderer: Literal["auto", "osmesa", "egl"] = Field("auto", description="MuJoCo's GL backend")


class DemonstrationPart(Part):
    """Scripted, perturbed demonstrations for the supervised start."""

    per_task: int = Field(4, description="successful demonstrations per task", ge=1)
    noise: float = Field(
        0.3, description="standard deviation of the action perturbation that makes the expert recover", ge=0
    )
    seed: int = Field(0, ge=0, description="seed of the perturbations")
