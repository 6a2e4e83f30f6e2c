"""Masked diffusion: masks, the bound against exact enumeration, and decoding against a plain one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from objectives import masked_diffusion as md

LENGTH = 4
MASK = 9


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Log-probabilities [2^L, L] of a chunk's own tokens, by which of its tokens are hidden (bit i: token i)."""
    return -torch.from_numpy(np.random.default_rng(0).exponential(2.0, (2**LENGTH, LENGTH)))


def looked_up(table: torch.Tensor, masks_BSL: torch.Tensor) -> torch.Tensor:
    return table[(masks_BSL * 2 ** torch.arange(LENGTH)).sum(dim=-1)]


def exact_bound(table: torch.Tensor) -> float:
    """Mean over all orders of the sum of log p(token | the tokens before it in that order)."""
    orders = list(itertools.permutations(range(LENGTH)))
    total = 0.0
    for order in orders:
        hidden = 2**LENGTH - 1
        for token in order:
            total += table[hidden, token].item()
            hidden -= 2**token
    return total / len(orders)


# Masks


def test_the_cosine_schedule_hides_all_at_first_and_always_something() -> None:
    levels = torch.tensor([0.0, 0.5, 2 / 3, 0.99, 1.0])
    assert md.cosine_counts(levels, 56).tolist() == [56, 40, 28, 1, 1]


def test_uniform_counts_are_uniform() -> None:
    levels = (torch.arange(700) + 0.5) / 700
    assert md.uniform_counts(levels, 7).bincount().tolist() == [0, *[100] * 7]
    assert md.uniform_counts(torch.tensor([0.0, 1.0]), 7).tolist() == [1, 7]


def test_a_key_fixes_its_masks_whatever_the_batch_and_there_is_one_a_stratum() -> None:
    masks = md.draw_masks([5, 6, 7], draws=8, length=8)
    assert torch.equal(masks[1:2], md.draw_masks([6], draws=8, length=8))
    assert masks.sum(dim=-1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 3
    assert not torch.equal(masks[0], masks[1])


def test_each_token_is_hidden_as_often_as_another() -> None:
    masks = md.draw_masks(range(4000), draws=1, length=LENGTH)
    assert masks.sum(dim=(0, 1)).tolist() == pytest.approx([4000 * 5 / 8] * LENGTH, abs=4 * 31)
    assert bool(masks.any(dim=-1).all())


def test_no_draws_and_a_key_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        md.draw_masks([1], draws=0, length=3)
    with pytest.raises(ValueError, match="got 18446744073709551616"):
        md.draw_masks([2**64], draws=1, length=3)


# The score


def test_the_bound_is_exact_over_all_masks(table: torch.Tensor) -> None:
    total = 0.0
    for hidden in range(1, 2**LENGTH):
        mask = torch.tensor([hidden >> i & 1 for i in range(LENGTH)], dtype=torch.bool)[None, None]
        count = int(mask.sum())
        chance = 1 / LENGTH / math.comb(LENGTH, count)
        total += chance * md.bound_elements(looked_up(table, mask), mask).sum().item()
    assert total == pytest.approx(exact_bound(table), abs=1e-6)


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_the_drawn_bound_is_unbiased(table: torch.Tensor, draws: int) -> None:
    masks = md.draw_masks(range(3000), draws=draws, length=LENGTH)
    scores = md.bound_elements(looked_up(table, masks), masks).sum(dim=-1)
    error = scores.std().item() / math.sqrt(len(scores))
    assert abs(scores.mean().item() - exact_bound(table)) < 4 * error
    assert error < 0.2


def test_where_tokens_are_alike_every_draw_gives_the_log_probability() -> None:
    masks = md.draw_masks([3], draws=5, length=LENGTH)
    scores = md.bound_elements(torch.full((1, 5, LENGTH), -1.5), masks).sum(dim=-1)
    assert scores.tolist() == pytest.approx([-6.0], abs=1e-6)


def test_only_hidden_tokens_learn_and_each_by_its_weight() -> None:
    logps = torch.zeros(1, 2, LENGTH, requires_grad=True)
    masks = torch.tensor([[[True, False, False, False], [False, True, True, False]]])
    md.bound_elements(logps, masks).sum().backward()
    assert logps.grad is not None
    assert logps.grad[0].tolist() == [[2, 0, 0, 0], [0, 1, 1, 0]]


def test_the_training_loss_weighs_mask_sizes_alike() -> None:
    logps = torch.tensor([[[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]]])
    masks = torch.tensor([[[True, False, False], [False, True, True]]])
    assert md.masked_losses(logps, masks).tolist() == [[1.0, 2.5]]


# Decoding


def network(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, 5] that depend on every token of the row and on nothing else."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, 6, 6, 5, generator=generator, dtype=torch.float64)
    length = tokens_BL.shape[1]
    places = torch.arange(length)
    return torch.stack(
        [sum(weights[row[i], i, places[:length]] for i in range(length)) for row in tokens_BL]
    ).float()


def plain_decode(
    given: list[int],
    tokens_KLV: np.ndarray,
    choice_KL: np.ndarray,
    *,
    choice_temperature: float,
    use_remask: bool,
) -> list[list[int]]:
    """One row, in NumPy and loops."""
    tokens, samples = list(given), []
    unknown = given.count(MASK)
    for k in range(len(choice_KL)):
        ratio = (k + 1) / len(choice_KL)
        logits = network(torch.tensor([tokens]))[0].double().numpy()
        probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        hidden = [token == MASK for token in tokens]
        now = [
            int((logits[i] + tokens_KLV[k, i]).argmax()) if hidden[i] else tokens[i]
            for i in range(len(tokens))
        ]
        confidence = []
        for i, token in enumerate(now):
            if given[i] != MASK or (not hidden[i] and not use_remask):
                confidence.append(math.inf)
                continue
            p = probs[i, token] * (1 if hidden[i] else 1 - ratio)
            noise = choice_temperature * (1 - ratio) * choice_KL[k, i]
            confidence.append((math.log(p) if p > 0 else -math.inf) + noise)
        count = min(max(math.floor(unknown * float(np.cos(np.float32(math.pi / 2 * ratio)))), 1), unknown - 1)
        again = sorted(range(len(now)), key=confidence.__getitem__)[:count]
        tokens = [MASK if i in again else token for i, token in enumerate(now)]
        samples.append(now)
    return samples


STARTS = torch.tensor([[MASK] * 6, [MASK, 2, MASK, MASK, 0, MASK], [MASK, 1, 2, 3, 4, 0]])


@pytest.mark.parametrize("use_remask", [False, True])
@pytest.mark.parametrize(("iterations", "choice_temperature"), [(1, 1.0), (4, 1.0), (12, 0.0), (5, 4.5)])
def test_decoding_is_the_plain_algorithm(
    iterations: int, choice_temperature: float, use_remask: bool
) -> None:
    noise = md.decoding_noise([1, 2, 3], iterations=iterations, length=6, vocabulary=5)
    decoding = md.parallel_decode(
        network, STARTS, noise, mask_id=MASK, choice_temperature=choice_temperature, use_remask=use_remask
    )
    for b, start in enumerate(STARTS.tolist()):
        want = plain_decode(
            start,
            noise.tokens_KBLV[:, b].numpy(),
            noise.choice_KBL[:, b].numpy(),
            choice_temperature=choice_temperature,
            use_remask=use_remask,
        )
        assert decoding.samples_KBL[:, b].tolist() == want
    given = STARTS != MASK
    assert torch.equal(decoding.samples_KBL[-1][given], STARTS[given])
    assert int(decoding.samples_KBL.max()) < 5


@pytest.mark.parametrize("use_remask", [False, True])
def test_a_row_does_not_depend_on_its_batch(use_remask: bool) -> None:
    def decoded(keys: list[int], starts: torch.Tensor) -> md.ParallelDecoding:
        noise = md.decoding_noise(keys, iterations=6, length=6, vocabulary=5)
        return md.parallel_decode(network, starts, noise, mask_id=MASK, use_remask=use_remask)

    together = decoded([40, 50, 60], STARTS)
    alone = decoded([50], STARTS[1:2])
    assert torch.equal(together.samples_KBL[:, 1:2], alone.samples_KBL)
    assert torch.equal(together.masks_KBL[:, 1:2], alone.masks_KBL)
    other = decoded([51], STARTS[1:2])
    assert not torch.equal(other.samples_KBL, alone.samples_KBL)


def test_decoded_tokens_stay_without_remasking_and_may_go_with_it() -> None:
    noise = md.decoding_noise([1, 2, 3], iterations=12, length=6, vocabulary=5)
    kept, remasked = (
        md.parallel_decode(network, STARTS, noise, mask_id=MASK, use_remask=use) for use in (False, True)
    )
    # Once shown, always shown: a mask may only shrink.
    assert not bool((kept.masks_KBL[1:] & ~kept.masks_KBL[:-1]).any())
    assert bool((remasked.masks_KBL[1:] & ~remasked.masks_KBL[:-1]).any())


def test_greedy_decoding_in_one_iteration_is_the_argmax() -> None:
    noise = md.decoding_noise([1, 2, 3], iterations=1, length=6, vocabulary=5)
    decoding = md.parallel_decode(network, STARTS, noise, mask_id=MASK, temperature=0.0)
    want = torch.where(STARTS == MASK, network(STARTS).argmax(dim=-1), STARTS)
    assert torch.equal(decoding.samples_KBL[0], want)


def test_samples_follow_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = md.decoding_noise(range(3000), iterations=1, length=1, vocabulary=3)
    decoding = md.parallel_decode(
        lambda tokens: logits.expand(*tokens.shape, 3), torch.full((3000, 1), 7), noise, mask_id=7
    )
    shares = decoding.samples_KBL.flatten().bincount(minlength=3) / 3000
    torch.testing.assert_close(shares, logits.softmax(dim=-1), rtol=0, atol=0.035)


def test_the_mask_token_is_never_sampled() -> None:
    noise = md.decoding_noise([1], iterations=3, length=4, vocabulary=3)
    decoding = md.parallel_decode(
        lambda tokens: torch.tensor([0.0, 0.0, 50.0]).expand(*tokens.shape, 3),
        torch.full((1, 4), 2),
        noise,
        mask_id=2,
    )
    assert int(decoding.samples_KBL.max()) < 2


def test_the_schedule_of_a_chunk_of_56() -> None:
    counts = [md.remask_counts(torch.tensor([56, 1]), k, 12).tolist() for k in range(12)]
    # 56 cos(pi / 3) is 28; the released decoder's float32 cosine lies just below one half.
    assert [of_56 for of_56, _ in counts] == [55, 54, 51, 48, 44, 39, 34, 27, 21, 14, 7, 1]
    assert {of_1 for _, of_1 in counts} == {0}


def test_a_row_with_nothing_to_fill_is_refused() -> None:
    noise = md.decoding_noise([1, 2], iterations=2, length=2, vocabulary=5)
    with pytest.raises(ValueError, match="row 1 has no token 9 to fill"):
        md.parallel_decode(network, torch.tensor([[MASK, 0], [1, 0]]), noise, mask_id=MASK)
