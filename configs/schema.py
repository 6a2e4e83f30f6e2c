"""The recipe: every setting of a run, typed, with its unit and default. Importing this pulls no torch, ray or mujoco.

A recipe is read once at the edge (`configs.loader`), and each component is handed only its own part.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from configs.operation import DeadlinePart, PagePart, TrackingPart
from configs.part import Part
from configs.policy import PolicyPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from configs.world import DemonstrationPart, EnvironmentPart, TaskPart


class RolloutPart(Part):
    """The rollout fleet."""

    rounds: int = Field(3, ge=0, description="rounds of collect, learn, trial")
    init_states_per_round: int = Field(10, ge=1, description="initial states per task and round")
    samples_per_state: int = Field(
        4, ge=2, description="episodes from each initial state (a group that can pair)"
    )
    actors: int = Field(2, ge=1, description="rollout actors (one process each), at most")
    least_actors: int | None = Field(
        None,
        ge=1,
        description="rollout actors that a run begins with and keeps; more are asked for, of Ray's autoscaler, while "
        "there are episodes for them; none: all of `actors`, always",
    )
    release_after_s: float = Field(
        60.0,
        ge=0,
        description="seconds without work after which an actor beyond `least_actors` is let go, and its node with it",
    )

    @property
    def kept(self) -> int:
        """Rollout actors that a run begins with."""
        return self.actors if self.least_actors is None else self.least_actors

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> RolloutPart:
        if self.kept > self.actors:
            raise ValueError(f"least_actors={self.least_actors} is more than actors={self.actors}; lower it")
        return self

    envs_per_actor: int = Field(
        4, ge=1, description="simulators per rollout actor, stepped while others wait"
    )
    cpus_per_actor: float = Field(0.5, gt=0, description="CPUs Ray reserves for each rollout actor")
    episode_timeout_s: float = Field(
        600, gt=0, description="an episode that takes longer is abandoned and its actor replaced"
    )


class ServingPart(Part):
    """The policy actors."""

    engine: Literal["torch", "vllm"] = Field(
        "torch",
        description="what decodes the action tokens of an autoregressive policy: torch, or vLLM (an extra: "
        "`make setup-vllm`), which chooses the same ones",
    )
    actors: int = Field(1, ge=1, description="policy actors")
    max_batch: int = Field(16, ge=1, description="most requests answered in one forward pass")
    max_wait_ms: float = Field(30.0, ge=0, description="longest a request waits for others")
    threads: int = Field(1, ge=1, description="torch threads of each policy actor")
    cpus_per_actor: float = Field(0.5, gt=0, description="CPUs Ray reserves for each policy actor")
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs Ray reserves for each policy actor")


class LearnerPart(Part):
    """The learner and parameter-server actors."""

    threads: int = Field(2, ge=1, description="torch threads of the learner")
    cpus: float = Field(0.5, gt=0, description="CPUs Ray reserves for the learner")
    gpus: float = Field(0.0, ge=0, description="GPUs Ray reserves for the learner")
    parameter_shards: int = Field(
        2, ge=1, description="parameter-server actors; each merges and serves its share"
    )


class EvaluationPart(Part):
    """The held-out evaluation: every (task, held-out state, sampling seed) cell, once before and once after."""

    sampling_seeds: tuple[int, ...] = Field(
        (0,), description="sampling seeds per held-out state", min_length=1
    )
    temperature: float | None = Field(None, ge=0, description="sampling temperature; none: the rollouts' own")

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> EvaluationPart:
        if len(set(self.sampling_seeds)) < len(self.sampling_seeds):
            raise ValueError(f"sampling_seeds must name each seed once, got {list(self.sampling_seeds)}")
        return self


class Recipe(Part):
    """A whole run."""

    name: str = Field(
        description="run name; outputs go to <root>/<name>/", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    root: str = Field(
        "runs",
        description="folder that holds the run folders; for a submitted job an absolute path that every node sees, "
        "since a job's own working directory is temporary",
    )
    seed: int = Field(0, ge=0, description="training seed")
    schedule: Literal["synchronous", "overlapped"] = Field(
        "synchronous",
        description="synchronous: collect, learn and try in turn; overlapped: collect the next round while learning",
    )
    start: str | None = Field(
        None, description="run folder whose supervised start and demonstrations are taken up instead of made"
    )
    tasks: TaskPart
    environment: EnvironmentPart = EnvironmentPart()
    demonstrations: DemonstrationPart = DemonstrationPart()
    policy: PolicyPart = PolicyPart()
    supervised: SupervisedPart = SupervisedPart()
    capability: CapabilityPart = CapabilityPart()
    adapter: AdapterPart = AdapterPart()
    preference: PreferencePart = PreferencePart()
    guard: GuardPart = GuardPart()
    rollouts: RolloutPart = RolloutPart()
    deadlines: DeadlinePart = DeadlinePart()
    serving: ServingPart = ServingPart()
    learner: LearnerPart = LearnerPart()
    evaluation: EvaluationPart = EvaluationPart()
    dashboard: PagePart = PagePart()
    tracking: TrackingPart = TrackingPart()

    @model_validator(mode="after")
    def _beta_can_be_found(self) -> Recipe:
        part = self.preference
        if part.beta is None and (part.loss == "ipo" or part.proximal_weight):
            what = "loss=ipo" if part.loss == "ipo" else f"proximal_weight={part.proximal_weight}"
            raise ValueError(
                f"preference.beta=null with preference.{what}: a spread is sought of the sigmoid form's logits alone; "
                "set preference.beta to a number"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_known(self) -> Recipe:
        if self.policy.paradigm != "autoregressive" and self.preference.reference == "behaviour":
            raise ValueError(
                f"preference.reference=behaviour needs recorded log-probs, and policy.paradigm={self.policy.paradigm} "
                "has surrogate scores only; set preference.reference=start"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Recipe:
        part = self.policy
        sequential = part.paradigm == "autoregressive" and part.decoding == "sequential"
        if self.serving.engine == "vllm" and not sequential:
            other = "decoding=parallel" if part.paradigm == "autoregressive" else f"paradigm={part.paradigm}"
            raise ValueError(
                f"serving.engine=vllm decodes token after token, and policy.{other} does not; set serving.engine=torch"
            )
        return self

    @model_validator(mode="after")
    def _start_is_known(self) -> Recipe:
        steps, policy = self.supervised.steps, self.policy
        if not steps and policy.checkpoint is None:
            raise ValueError(
                "supervised.steps=0 starts from random weights; name published ones as policy.checkpoint, or train"
            )
        if self.supervised.trains == "adapter":
            if self.start is None and policy.checkpoint is None and self.supervised.init is None:
                raise ValueError(
                    "supervised.trains=adapter on random weights; name trained ones as supervised.init or "
                    "policy.checkpoint, or set supervised.trains=weights"
                )
        elif steps and policy.dtype == "bfloat16":
            raise ValueError(
                f"supervised.steps={steps} on policy.dtype=bfloat16: its resolution swallows AdamW's small steps; set "
                "supervised.trains=adapter, supervised.steps=0, or policy.dtype=float32"
            )
        return self

    @model_validator(mode="after")
    def _adapter_begins_at_the_base(self) -> Recipe:
        adapter = self.adapter
        if adapter.dropout and self.supervised.trains == "adapter" and self.start is None:
            raise ValueError(
                f"adapter.dropout={adapter.dropout} with supervised.trains=adapter: the supervised start trains merged "
                "weights, which dropout is no part of; set adapter.dropout=0"
            )
        if adapter.method == "dora" and adapter.dropout and self.policy.dtype == "bfloat16":
            raise ValueError(
                f"adapter.dropout={adapter.dropout} with adapter.method=dora on policy.dtype=bfloat16: peft's forward "
                "pass, which dropout needs, rounds DoRA's row norms to bfloat16, and the policy would differ from its "
                "base before the first step; set adapter.dropout=0, or adapter.method=lora"
            )
        return self

    @model_validator(mode="after")
    def _capability_fits(self) -> Recipe:
        supervised = self.supervised
        elementwise = self.capability.weight > 0 and self.capability.penalty == "elementwise"
        if elementwise and self.rollouts.rounds:
            raise ValueError(
                f"capability.penalty=elementwise with rollouts.rounds={self.rollouts.rounds}: a round trains an "
                "adapter, whose change is never multiplied out; set capability.penalty=cosine, or rollouts.rounds=0"
            )
        if elementwise and supervised.trains == "adapter":
            raise ValueError(
                "capability.penalty=elementwise with supervised.trains=adapter, whose change is never multiplied out; "
                "set capability.penalty=cosine, or supervised.trains=weights"
            )
        for name, value in (("init", supervised.init), ("auxiliary", supervised.auxiliary)):
            if self.policy.checkpoint is not None and value not in (None, "none"):
                raise ValueError(
                    f"supervised.{name}={value} is for policies made here; unset policy.checkpoint"
                )
        return self

    @property
    def demonstrated(self) -> bool:
        """Whether anything learns from demonstrations: the supervised start, or a term of the preference loss."""
        return self.supervised.steps > 0 or self.preference.demo_weight > 0
