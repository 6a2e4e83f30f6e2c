"""Fixtures of the released masked decoder: what it does that policies here do not, and settings that are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from objectives import masked_diffusion
from policies.parity.check import check_fixture
from policies.parity.fixture import Fixture, FixtureError

VOCABULARY, ITERATIONS, LENGTH = 8, 6, 14


def released(
    init: list[int],
    logits: torch.Tensor,
    uniform: torch.Tensor,
    *,
    mask_id: int,
    use_remask: bool = False,
    start: int = 0,
    seed: int = 0,
) -> tuple[list[list[int]], list[list[int]], list[int], list[list[bool]]]:
    """Plain loops over one row: draws [K', L], completed chunks [K, L], counts [K'] and masks [K', L]."""
    generator = torch.Generator().manual_seed(seed)
    unknown = init.count(mask_id)
    now, draws, counts, masks = list(init), [], [], []
    chunks = [list(init)] + [[0] * len(init) for _ in range(start - 1)] if start else []
    for k in range(start, ITERATIONS):
        ratio = (k + 1) / ITERATIONS
        chances = logits[k].softmax(dim=-1)
        drawn = torch.multinomial(chances, 1, generator=generator).flatten().tolist()
        hidden = [token == mask_id for token in now]
        chunk = [new if gone else old for new, gone, old in zip(drawn, hidden, now, strict=True)]
        share = torch.cos(math.pi / 2 * torch.tensor(ratio)).item()  # float32: just below one half at 2 / 3
        count = min(max(math.floor(unknown * share), 1), unknown - 1)
        ranked = []
        for i, token in enumerate(chunk):
            chance = chances[i, token].item()
            if not hidden[i]:
                chance = chance * (1 - ratio) if use_remask else math.inf
            gumbel = -math.log(-math.log(uniform[k, i].item()))
            ranked.append(math.log(chance + 1e-20) + (1 - ratio) * gumbel)
        cut = sorted(ranked)[max(count, 1)]
        mask = [value < cut for value in ranked]
        now = [mask_id if gone else token for gone, token in zip(mask, chunk, strict=True)]
        draws.append(drawn)
        chunks.append(chunk)
        counts.append(count)
        masks.append(mask)
    return draws, chunks, counts, masks


def recorded(
    *, mask_id: int, given: int = 0, seed: int = 0, start: int = 0, use_remask: bool = False, **settings: Any
) -> Fixture:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ITERATIONS, LENGTH, VOCABULARY, generator=generator)
    uniform = torch.rand(ITERATIONS, LENGTH, generator=generator).clamp(1e-6, 1 - 1e-6)
    known = torch.randint(0, VOCABULARY - 1, (given,), generator=generator).tolist()
    init = known + [mask_id] * (LENGTH - given)
    draws, chunks, counts, masks = released(
        init, logits, uniform, mask_id=mask_id, use_remask=use_remask, start=start, seed=seed
    )
    return Fixture(
        folder=Path("masked"),
        config={
            "family": "masked_decode",
            "mask_token_id": mask_id,
            "num_iter": ITERATIONS,
            "use_remask": use_remask,
            "start_iter": start,
            **settings,
        },
        weights={},
        inputs={
            "logits": logits[:, None],
            "init_ids": torch.tensor([init]),
            "sampled_ids": torch.tensor(draws)[:, None],
            "choice_uniform": uniform[:, None],
        },
        expected={
            "final_seqs": torch.tensor([chunks]),
            "mask_len": torch.tensor(counts)[:, None],
            "masks": torch.tensor(masks)[:, None],
        },
    )


def failed(fixture: Fixture) -> list[str]:
    return [result.name for result in check_fixture(fixture) if not result.passed]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given", [0, 3, LENGTH - 1])
@pytest.mark.parametrize("use_remask", [False, True])
@pytest.mark.parametrize("mask_id", [VOCABULARY - 1, VOCABULARY], ids=["mask inside", "mask outside"])
def test_the_released_decoder_comes_out(mask_id: int, use_remask: bool, given: int, seed: int) -> None:
    fixture = recorded(mask_id=mask_id, use_remask=use_remask, given=given, seed=seed)
    assert failed(fixture) == []


def test_the_released_decoder_hides_given_tokens_and_draws_the_mask() -> None:
    inside = recorded(mask_id=VOCABULARY - 1)
    assert bool((inside.inputs["sampled_ids"] == VOCABULARY - 1).any())
    remasked = recorded(mask_id=VOCABULARY, use_remask=True, given=3)
    assert bool(remasked.expected["masks"][:-1, 0, :3].any())


@pytest.mark.parametrize("start", [1, 3])
def test_a_start_iteration_is_read(start: int) -> None:
    fixture = recorded(mask_id=VOCABULARY, start=start)
    assert fixture.expected["final_seqs"].shape == (1, ITERATIONS, LENGTH)
    assert failed(fixture) == []
    fixture.expected["final_seqs"] = fixture.expected["final_seqs"][:, start:].clone()
    assert failed(fixture) == []
    fixture.config["start_iter"] = 0
    with pytest.raises(FixtureError, match=rf"sampled_ids has shape \[{ITERATIONS - start}, 1, 14\]"):
        failed(fixture)
    fixture.config["start_iter"] = ITERATIONS
    with pytest.raises(FixtureError, match=r"start_iter is 6, expected 0 \.\. 5"):
        failed(fixture)


def test_another_schedule_is_refused() -> None:
    fixture = recorded(mask_id=VOCABULARY, mask_scheduling_method="pow2")
    with pytest.raises(FixtureError, match="mask_scheduling_method is 'pow2'; 'cosine' alone is read here"):
        failed(fixture)
    assert failed(recorded(mask_id=VOCABULARY, mask_scheduling_method="cosine")) == []


def test_policies_keep_what_was_given_and_never_draw_the_mask() -> None:
    noise = masked_diffusion.decoding_noise([1], iterations=4, length=4, vocabulary=3)
    chunk = torch.tensor([[0, 2, 2, 2]])
    logits = torch.tensor([-9.0, 0.0, 9.0]).expand(1, 4, 3)
    own, upstream = (
        masked_diffusion.parallel_decode(
            lambda _: logits, chunk, noise, mask_id=2, use_remask=True, as_released=released
        )
        for released in (False, True)
    )
    assert own.samples_KBL.eq(2).sum().item() == 0
    assert not bool(own.masks_KBL[:, 0, 0].any())
    assert bool(upstream.samples_KBL.eq(2).any())
    assert bool(upstream.masks_KBL[:, 0, 0].any())
