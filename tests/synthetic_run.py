"""A run folder as a run leaves it, made without a simulator: for the tests and the pictures of the dashboard.

Everything is written with the project's own journal, codec and recipe writer, from a fixed seed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.stats import binomtest

from configs.loader import dump_recipe
from configs.schema import Recipe
from dashboard.rates import wilson
from trajectories.codec import episode_record, save_trajectory
from trajectories.journal import Journal, read_journal
from trajectories.records import ActionSample, Cell, Decision, Observation, Outcome, Trajectory

START = 1_764_230_400.0
SUITES = ("libero_object", "libero_spatial")
INSTRUCTION = "pick up the {} and place it in the basket"
THINGS = ("alphabet soup", "cream cheese", "salad dressing", "bbq sauce", "ketchup", "tomato sauce")


def recipe(name: str, tasks: int = 4) -> Recipe:
    """The recipe of a synthetic run, of `tasks` tasks (at most 10 are libero_object's own)."""
    return Recipe.model_validate(
        {
            "name": name,
            "tasks": {
                "suite": "libero_object",
                "task_ids": tuple(range(min(tasks, 10))),
                "demo_init_states": (0, 1),
                "train_init_states": tuple(range(30)),
                "held_out_init_states": tuple(range(30, 50)),
            },
        }
    )


def trajectory(cell: Cell, *, success: bool, version: int, decisions: int, size: int = 96) -> Trajectory:
    """An episode whose camera sees an arm bring a block towards a basket, and miss where it fails."""
    steps = []
    for index in range(decisions):
        share = index / max(decisions - 1, 1)
        image = np.full((size, size, 3), (226, 214, 190), np.uint8)
        image[size * 6 // 10 :] = (168, 138, 104)
        image[size * 5 // 10 : size * 7 // 10, size * 7 // 10 : size * 9 // 10] = (104, 74, 48)
        rise = 0.25 * math.sin(math.pi * share) * (1 if success else 0.5)
        left = int(size * (0.12 + (0.6 if success else 0.38) * share))
        top = int(size * (0.55 - rise))
        image[top : top + size // 10, left : left + size // 10] = (196, 52, 44)
        image[: top - 2, left + size // 25 : left + size // 14] = (90, 96, 104)
        image[top - size // 20 : top, left - 2 : left + size // 9] = (60, 66, 74)
        steps.append(
            Decision(
                observation=Observation(
                    agentview=image,
                    wrist=np.ascontiguousarray(image[::-1]),
                    proprio=np.zeros(8, np.float32),
                    instruction=INSTRUCTION.format(THINGS[cell.task_id % len(THINGS)]),
                ),
                sample=ActionSample(
                    actions=np.zeros((8, 7), np.float32),
                    model_chunk=np.zeros(56, np.int64),
                    logps=np.zeros(56, np.float32),
                ),
                executed=8,
            )
        )
    return Trajectory(
        cell=cell,
        decisions=tuple(steps),
        outcome="success" if success else "timeout",
        env_steps=8 * decisions,
        policy_version=version,
        policy_hash=weights_hash(version),
    )


def weights_hash(version: int) -> str:
    """A hash-like name of a version's weights."""
    return f"{Random(version).getrandbits(64):016x}"


def episode(
    phase: str, index: int, cell: Cell, outcome: Outcome, *, version: int, time: float
) -> dict[str, Any]:
    """A line of `episodes.jsonl`."""
    made = Trajectory(
        cell=cell,
        decisions=(),
        outcome=outcome,
        fault="the simulator returned a non-finite state" if outcome == "fault" else "",
        env_steps=96,
        policy_version=version,
        policy_hash=weights_hash(version),
    )
    return {"phase": phase, "round": index, **episode_record(made), "time": time}


class Writer:
    """Writes a run's folder in the order in which a run does, on a clock of its own."""

    def __init__(self, folder: Path, *, name: str | None = None, tasks: int = 4, seed: int = 0) -> None:
        folder.mkdir(parents=True)
        (folder / "trajectories").mkdir()
        dump_recipe(recipe(name or folder.name, tasks), folder / "recipe.yaml")
        self.folder, self.random, self.now = folder, Random(seed), START
        self.tasks = [(SUITES[k % 2], k // 2) for k in range(tasks)]
        self._journals = {
            kind: Journal(folder / f"{kind}.jsonl") for kind in ("metrics", "events", "episodes")
        }
        self.version = 0
        self._latest_version = 0

    def metric(self, stage: str, **numbers: Any) -> None:
        self._journals["metrics"].append({"time": self.now, "stage": stage, **numbers})

    def event(self, event: str, **more: Any) -> None:
        self._journals["events"].append({"time": self.now, "event": event, **more})

    def episodes(self, lines: list[dict[str, Any]]) -> None:
        self._journals["episodes"].extend(lines)

    def skill(self, task: int, version: int) -> float:
        """Success probability of a task under a version."""
        return min(0.96, 0.25 + 0.09 * (task % 5) + 0.11 * version)

    def outcome(self, task: int, version: int, faults: float = 0.0) -> Outcome:
        if self.random.random() < faults:
            return "fault"
        return "success" if self.random.random() < self.skill(task, version) else "timeout"

    def drive(self, phase: str, index: int, version: int, *, states: range, samples: int) -> None:
        """Episodes of a phase with the fleet's lines between them, and the phase's own line at the end."""
        lines = []
        for task, (suite, task_id) in enumerate(self.tasks):
            for state in states:
                for sample in range(samples):
                    if phase == "rollout" and (task, state) == self._contrasted(index):
                        continue
                    cell = Cell(
                        suite=suite, task_id=task_id, init_state=state, seed=1000 * index + sample + 1000
                    )
                    self.now = round(self.now + 0.9, 3)
                    faults = 0.01 if phase == "rollout" else 0.0
                    outcome = self.outcome(task, version, faults)
                    lines.append(episode(phase, index, cell, outcome, version=version, time=self.now))
                    if len(lines) % 6 == 0:
                        self.fleet(version)
        self.episodes(lines)
        rate = round(self.random.uniform(90, 120), 1)
        self.metric(
            phase,
            round=index,
            version=version,
            episodes=len(lines),
            env_steps_per_s=rate,
            batch_fill=3.1,
            act_ms=41.0,
        )

    def fleet(self, version: int) -> None:
        """A line of what the fleet looks like now."""
        noise = self.random
        actors = [
            {
                "actor": actor,
                "version": version,
                "hash": weights_hash(version),
                "batch_fill": round(noise.uniform(2.6, 3.8), 2),
                "act_ms": round(noise.gauss(42, 3), 1),
            }
            for actor in range(2)
        ]
        away = int(noise.random() < 0.06)
        self.metric(
            "fleet",
            env_steps_per_s=round(noise.gauss(104, 7) - 24 * away, 1),
            episodes_per_s=round(noise.gauss(1.1, 0.1), 2),
            rollout_actors={"wanted": 4, "ready": 4 - away, "away": away, "draining": 0, "quarantined": 0},
            policy_actors=actors,
            nodes=[
                {"node": "3fa1c2d4", "cpus": 4.0, "gpus": 1.0, "alive": True, "draining": False},
                {"node": "9be07715", "cpus": 2.0, "gpus": 0.0, "alive": True, "draining": False},
            ],
            pending={"rollout actor": away},
            autoscaler={
                "starting": {"rollout": away},
                "failed": [{"kind": "rollout", "reason": "no spot machine is left in this zone"}],
                "infeasible": 0,
            },
            staleness=int(noise.random() < 0.3),
        )

    def publish(self, version: int) -> None:
        """New weights, taken up by the policy actors."""
        self.metric("published", version=version, hash=weights_hash(version), merge_drift=0.0004)
        for actor in range(2):
            self.event("serving", actor=actor, version=version, hash=weights_hash(version))

    def update(self, index: int, steps: int, *, collapse: bool = False) -> None:
        """A round's optimizer steps; with `collapse` the chosen side falls through the tripwire."""
        for step in range(1, steps + 1):
            share, noise = step / steps, self.random
            chosen = (-0.16 if collapse else 0.05) * share + noise.gauss(0, 0.006)
            rejected = -0.12 * share + noise.gauss(0, 0.008)
            reward = 1.9 * share + noise.gauss(0, 0.08)
            self.now = round(self.now + 0.4, 3)
            self.metric(
                "update",
                round=index,
                version=self.version,
                step=step,
                loss=0.69 * math.exp(-0.5 * share) + noise.gauss(0, 0.01),
                grad_norm=abs(noise.gauss(1.2, 0.2)),
                margin=reward,
                margin_std=0.35,
                accuracy=min(1.0, max(0.0, 0.5 + 0.4 * share + noise.gauss(0, 0.05))),
                held=0.2 * share,
                chosen_reward=0.6 * reward,
                rejected_reward=-0.4 * reward,
                chosen_logratio=chosen,
                rejected_logratio=rejected,
                success_logratio=chosen + 0.01,
                kl=-(chosen + rejected) / 2,
            )

    def _contrasted(self, index: int) -> tuple[int, int]:
        """The task and the initial state whose episodes of a round are stored."""
        return index % len(self.tasks), 10 * (index % 3) + 7

    def contrast(self, index: int, *, size: int = 96) -> None:
        """A stored success and failure from the same task and initial state."""
        task, state = self._contrasted(index)
        suite, task_id = self.tasks[task]
        for success, decisions in ((True, 11), (False, 16)):
            cell = Cell(suite=suite, task_id=task_id, init_state=state, seed=9000 + 10 * index + success)
            made = trajectory(cell, success=success, version=self.version, decisions=decisions, size=size)
            save_trajectory(self.folder / "trajectories" / f"{made.trajectory_id}.trajectory", made)
            self.episodes([{"phase": "rollout", "round": index, **episode_record(made), "time": self.now}])

    def mine(self, index: int, states: int) -> None:
        """What a round's mining found."""
        only = max(1, int(states * min(0.2 + 0.06 * index, 0.8)))
        fail = max(1, int(states * max(0.35 - 0.05 * index, 0.0)))
        self.metric(
            "pairs",
            round=index,
            version=self.version,
            states=states,
            states_all_success=only,
            states_all_failure=fail,
            states_unpairable_other=index % 2,
            pairs=3 * (states - only - fail),
            faults=index % 3,
            non_finite=0,
            stale=12 * index,
            duplicates=0,
        )

    def round(self, index: int, *, steps: int, fate: str) -> None:
        """Collect, mine, learn, and what became of it: `promoted`, `rolled_back` or `tripped`."""
        self.drive(
            "rollout", index, self.version, states=range(10 * (index % 3), 10 * (index % 3) + 10), samples=3
        )
        self.contrast(index)
        self.mine(index, 10 * len(self.tasks))
        self.update(index, steps, collapse=fate == "tripped")
        if fate == "tripped":
            why = "chosen log-prob fell 0.112 nats per token below its reference over the last 10 steps, limit 0.1"
            self.event("tripped", round=index, version=self.version, reason=why)
            return
        self._latest_version += 1
        candidate = self._latest_version
        self.publish(candidate)
        self.drive("canary", index, candidate, states=range(0, 5), samples=1)
        verdict = {"cells": 20, "before": 11, "after": 15 if fate == "promoted" else 3}
        p = 0.96 if fate == "promoted" else 0.008
        self.event(fate, round=index, version=candidate, **verdict, p_worse=p)
        if fate == "promoted":
            self.version = candidate

    def result(self) -> dict[str, Any]:
        """The result line, of the held-out episodes of the first version and of the one in force."""
        lines = [e for e in read_journal(self.folder / "episodes.jsonl") if e["phase"] == "evaluation"]
        first, last = ([e["success"] for e in lines if e["policy_version"] == v] for v in (0, self.version))
        pairs = list(zip(first, last, strict=True))
        differ = sum(a != b for a, b in pairs)
        return {
            "suite": "libero_object",
            "task_ids": [task for _, task in self.tasks],
            "assets": "stand-in",
            "held_out_episodes": len(first),
            "success_before": round(sum(first) / len(first), 4),
            "success_after": round(sum(last) / len(last), 4),
            "wilson_before": [round(bound, 4) for bound in wilson(sum(first), len(first))],
            "wilson_after": [round(bound, 4) for bound in wilson(sum(last), len(last))],
            "mcnemar_p": binomtest(sum(b and not a for a, b in pairs), differ).pvalue if differ else 1.0,
            "env_steps_per_s": 104.2,
            "wall_s": round(self.now - START, 1),
        }

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()


def write_run(folder: Path, *, finished: bool = True, tasks: int = 4, seed: int = 0, steps: int = 60) -> Path:
    """A run of six rounds: four promotions, one rolled back, one tripped; restarts, a node lost and a fault here and
    there. Returns the folder."""
    run = Writer(folder, tasks=tasks, seed=seed)
    (folder / "fingerprint.json").write_text(json.dumps({"assets": {"kind": "stand-in"}}))
    for step in range(20, 601, 20):
        run.now = round(run.now + 6, 3)
        run.metric("supervised", step=step, loss=1.6 * math.exp(-step / 150) + 0.05, lr=1e-3, grad_norm=1.5)
    run.publish(0)
    run.drive("evaluation", -1, 0, states=range(30, 50), samples=1)
    fates = ("promoted", "promoted", "tripped", "promoted", "rolled_back", "promoted")
    for index, fate in enumerate(fates):
        run.round(index, steps=steps, fate=fate)
        if index == 1:
            run.event("node_joined", node="9be07715")
            run.event("actor_restarted", kind="rollout", actor=2, reason="an episode took longer than 120 s")
        if index == 3:
            cell = "libero_object/0/3/4001"
            run.event("requeued", cell=cell, actor=1, reason="its process died", attempt=1)
            run.event("actor_restarted", kind="policy", actor=1, reason="its process died")
            run.event("quarantined", cell=cell, reason="the simulator returned a non-finite state")
    if finished:
        run.drive("evaluation", -1, run.version, states=range(30, 50), samples=1)
        (folder / "result.json").write_text(json.dumps(run.result()) + "\n")
    run.close()
    return folder
