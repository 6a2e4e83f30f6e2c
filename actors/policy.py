"""Policy actors: answer rollout actors' requests in batches, with weights pulled by version.

A request names the version it wants. An actor holds at most two versions (the fleet's and a candidate on trial), so
an episode always ends under the weights it began with, and a canary needs no second fleet.

With `serving.engine: vllm` each held version keeps its torch network, which embeds the prefixes, and they share one
vLLM: it takes a version's decoder over, in place, when a batch asks for another version than the last
(`benchmarks.vllm_serving` says what that costs). Two vLLMs in a process would hold twice the cache, and take each other
down when one goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.parameter_server import find_shards, pull_snapshot
from configs.policy import PolicyPart
from configs.schema import ServingPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import Engine
from policies.make import make_policy
from policies.protocol import Policy
from policies.weights.snapshots import state_tensors
from trajectories.hashing import weights_hash
from trajectories.records import ActionSample, Observation

log = logging.getLogger(__name__)

HELD_VERSIONS = 2


@dataclass(slots=True, eq=False)
class _Request:
    observation: Observation
    seed: int
    version: int
    temperature: float
    answer: asyncio.Future[tuple[ActionSample, str]]


class PolicyServer:
    """Coalesces requests into batches of at most `max_batch`. Once the model is free, the oldest request waits at most
    `max_wait_ms` for others to join it; while a batch is being answered, the next ones wait for that."""

    def __init__(
        self,
        *,
        policy: PolicyPart,
        serving: ServingPart,
        image_size: int,
        shards: Sequence[str],
        index: int = 0,
        monitor: str | None = None,
    ) -> None:
        """`shards` are the names of the parameter shards to pull from; `monitor` that of the actor to tell of it."""
        torch.set_num_threads(serving.threads)
        self._part = policy
        self._serving = serving
        self._image_size = image_size
        self._shards = list(shards)
        self._index = index
        self._monitor = ray.get_actor(monitor) if monitor is not None else None
        self._engine: Engine | None = None
        """What the held versions share, where that is not torch."""
        self._latest: tuple[int, str] | None = None
        self._held: OrderedDict[int, tuple[Policy, str]] = OrderedDict()
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._batcher: asyncio.Task[None] | None = None
        self._batches = 0
        self._decisions = 0
        self._busy_s = 0.0
        self._restarted = ray.get_runtime_context().was_current_actor_reconstructed

    async def act(
        self, observation: Observation, *, seed: int, version: int, temperature: float
    ) -> tuple[ActionSample, str]:
        """Answer one observation; returns the sample and the content hash of the weights that made it."""
        if self._batcher is None:
            self._batcher = asyncio.get_running_loop().create_task(self._serve())
            self._batcher.add_done_callback(_end_process)
        answer: asyncio.Future[tuple[ActionSample, str]] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Request(observation, seed, version, temperature, answer))
        return await answer

    async def pop_stats(self) -> dict[str, float]:
        """Batches, decisions and busy seconds since the last call, and whether the process is another one since."""
        stats = {
            "batches": float(self._batches),
            "decisions": float(self._decisions),
            "busy_s": self._busy_s,
            "restarted": float(self._restarted),
        }
        self._batches, self._decisions, self._busy_s, self._restarted = 0, 0, 0.0, False
        return stats

    async def serving(self) -> dict[str, Any]:
        """The version and hash of the weights that the last batch was answered with, how full batches are and how long
        one takes, ms; empty before the first."""
        if self._latest is None:
            return {}
        version, content_hash = self._latest
        fill = self._decisions / max(self._batches, 1)
        ms = 1000 * self._busy_s / max(self._batches, 1)
        return {
            "version": version,
            "hash": content_hash,
            "batch_fill": round(fill, 2),
            "act_ms": round(ms, 1),
        }

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        waiting: list[_Request] = []
        while True:
            if not waiting:
                waiting.append(await self._queue.get())
            await self._fill(waiting)
            key = (waiting[0].version, waiting[0].temperature)
            batch = [r for r in waiting if (r.version, r.temperature) == key][: self._serving.max_batch]
            waiting = [r for r in waiting if r not in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, batch)
            except Exception as error:  # handed to the callers, who own the decision to retry
                for request in batch:
                    if not request.answer.done():  # whoever asked may have gone
                        request.answer.set_exception(error)
                continue
            for request, answer in zip(batch, answers, strict=True):
                if not request.answer.done():
                    request.answer.set_result(answer)

    async def _fill(self, waiting: list[_Request]) -> None:
        """Wait until the batch is full or the oldest request has waited long enough."""
        deadline = time.monotonic() + self._serving.max_wait_ms / 1000
        while len(waiting) < self._serving.max_batch:
            if not self._queue.empty():
                waiting.append(self._queue.get_nowait())
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                waiting.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                return

    def _answer(self, batch: list[_Request]) -> list[tuple[ActionSample, str]]:
        policy, content_hash = self._hold(batch[0].version)
        started = time.monotonic()
        samples = policy.act(
            [r.observation for r in batch],
            seeds=[r.seed for r in batch],
            temperature=batch[0].temperature,
        )
        self._busy_s += time.monotonic() - started
        self._batches += 1
        self._decisions += len(batch)
        self._latest = batch[0].version, content_hash
        return [(sample, content_hash) for sample in samples]

    def _hold(self, version: int) -> tuple[Policy, str]:
        """The policy of a version, pulled from the parameter server on first use."""
        if version in self._held:
            self._held.move_to_end(version)
            return self._held[version]
        if len(self._held) < HELD_VERSIONS:
            policy = self._make()
        else:
            dropped, (policy, _) = self._held.popitem(last=False)
            log.info("version %d makes room for version %d", dropped, version)
        snapshot = pull_snapshot(find_shards(self._shards), version)
        policy.load(snapshot)
        # Hash what is served, or what vLLM is handed, not what was sent: a copy that went wrong shows here.
        content_hash = weights_hash(state_tensors(policy.module))
        if content_hash != snapshot.content_hash:
            raise RuntimeError(
                f"version {version} loads as {content_hash[:12]}, published as {snapshot.content_hash[:12]}"
            )
        self._held[version] = (policy, content_hash)
        if self._monitor is not None:
            # Before the first answer with it: a restarted actor says what it serves before it acts.
            said = {"event": "serving", "actor": self._index, "version": version, "hash": content_hash}
            ray.get(self._monitor.tell.remote(said))
        return policy, content_hash

    def _make(self) -> Policy:
        """A policy to load a version into, with the recipe's engine."""
        policy = make_policy(self._part, image_size=self._image_size, seed=0, device=_device(), filled=False)
        if self._serving.engine == "vllm":
            # vLLM is an extra, and importing it takes seconds.
            from policies.decoding.vllm_engine import VllmEngine

            assert isinstance(policy, AutoregressivePolicy)  # the recipe was checked
            if self._engine is None:
                network = policy.network
                self._engine = VllmEngine(
                    network.language_model,
                    first_id=network.action_first_id,
                    stop_id=network.action_stop_id,
                    tokens=policy.tokens,
                    max_batch=self._serving.max_batch,
                )
            policy.engine = self._engine
        return policy


def _end_process(batcher: asyncio.Task[None]) -> None:
    """Without its batcher an actor would leave every request waiting: end it, so that Ray starts another."""
    log.critical("the batcher ended: %r", batcher.exception() if not batcher.cancelled() else "cancelled")
    os._exit(1)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")


PolicyActor = ray.remote(PolicyServer)
"""Restarts without limit; a restarted actor pulls the version of its first request before answering it."""
