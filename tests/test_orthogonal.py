"""What holds a fine-tuning update apart from a capability vector, against dense arithmetic and finite differences."""

from __future__ import annotations

import pytest
import torch

from objectives.orthogonal import (
    LowRank,
    Matrix,
    Rescaled,
    cosine_penalty,
    elementwise_penalty,
    inner,
    low_rank_gradients,
    rescaled_gradients,
    squared_cosine,
    squared_norm,
)


def low_rank(rows: int, rank: int, columns: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        left=torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        right=torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


def dense(matrix: Matrix) -> torch.Tensor:
    return matrix.left @ matrix.right if isinstance(matrix, LowRank) else matrix


@pytest.mark.parametrize("left_dense", [False, True])
@pytest.mark.parametrize("right_dense", [False, True])
def test_factors_give_the_dense_inner_product(left_dense: bool, right_dense: bool) -> None:
    a, b = low_rank(12, 3, 7, seed=0), low_rank(12, 5, 7, seed=1)
    expected = (dense(a) * dense(b)).sum()
    found = inner(dense(a) if left_dense else a, dense(b) if right_dense else b)
    torch.testing.assert_close(found, expected)


def test_matrices_of_other_shapes_have_no_inner_product() -> None:
    with pytest.raises(ValueError, match=r"\[12, 7\] and \[7, 12\]"):
        inner(low_rank(12, 3, 7, seed=0), low_rank(7, 3, 12, seed=0))


def test_a_matrix_is_parallel_to_itself_and_orthogonal_to_another_half() -> None:
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    one[:2], two[2:] = 1.0, 3.0
    assert squared_cosine(one, -5 * one).item() == pytest.approx(1)
    assert squared_cosine(one, two).item() == 0
    assert squared_cosine(one, torch.zeros(4, 4)).item() == 0


def test_the_cosine_has_no_scale_and_the_elementwise_penalty_has() -> None:
    gamma, delta = {"w": torch.tensor([[1.0, -2.0]])}, {"w": torch.tensor([[3.0, 1.0]])}
    thousandth = {"w": delta["w"] / 1000}
    # <gamma, delta> = 1, |gamma|^2 = 5, |delta|^2 = 10.
    assert cosine_penalty(gamma, delta).item() == pytest.approx(1 / 50)
    assert cosine_penalty(gamma, thousandth).item() == pytest.approx(1 / 50)
    assert elementwise_penalty(gamma, delta).item() == pytest.approx(5)
    assert elementwise_penalty(gamma, thousandth).item() == pytest.approx(0.005)


def test_the_elementwise_penalty_bounds_the_inner_product() -> None:
    gamma, delta = (dense(low_rank(8, 8, 8, seed=seed)) for seed in (4, 5))
    assert elementwise_penalty({"w": gamma}, {"w": delta}) >= inner(gamma, delta).abs()


def test_no_vector_costs_nothing() -> None:
    delta = {"w": dense(low_rank(3, 2, 4, seed=6))}
    nothing = {"w": torch.zeros(3, 4, dtype=torch.float64)}
    assert cosine_penalty(nothing, delta).item() == elementwise_penalty(nothing, delta).item() == 0


@pytest.mark.parametrize("gamma_dense", [False, True])
def test_the_gradient_in_the_factors_is_the_numerical_one(gamma_dense: bool) -> None:
    vector = low_rank(6, 2, 5, seed=2)
    gamma = dense(vector) if gamma_dense else vector
    left, right = (
        f.clone().requires_grad_() for f in (low_rank(6, 3, 5, seed=3).left, low_rank(6, 3, 5, seed=3).right)
    )

    def penalty(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return cosine_penalty({"w": gamma}, {"w": LowRank(left=left, right=right)})

    assert torch.autograd.gradcheck(penalty, (left, right))


def test_the_elementwise_gradient_is_the_numerical_one() -> None:
    gamma = {"w": torch.tensor([[0.5, -2.0], [0.0, 1.0]], dtype=torch.float64)}
    delta = torch.tensor([[1.0, 1.0], [-3.0, -0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: elementwise_penalty(gamma, {"w": d}), (delta,))


def test_only_weights_that_both_name_count() -> None:
    gamma = {"w": torch.ones(2, 2), "head": torch.ones(9)}
    assert elementwise_penalty(gamma, {"w": torch.ones(2, 2), "other": torch.ones(3)}).item() == 4
    with pytest.raises(ValueError, match="share no weight"):
        cosine_penalty(gamma, {"other": torch.ones(3)})
    with pytest.raises(ValueError, match=r"w is \[2, 2\] in the vector and \[4\]"):
        elementwise_penalty(gamma, {"w": torch.ones(4)})


def test_dora_s_change_is_never_multiplied_out_and_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    low = low_rank(12, 3, 7, seed=1)
    magnitude = base.norm(dim=1) * (1 + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64))
    gamma = dense(low_rank(12, 7, 7, seed=2))
    change = Rescaled(
        low=low,
        magnitude=magnitude,
        projected=base @ low.right.T,
        squares=base.square().sum(dim=1),
        along=(gamma * base).sum(dim=1),
    )
    direction = base + dense(low)
    expected = (magnitude / direction.norm(dim=1))[:, None] * direction - base
    torch.testing.assert_close(inner(gamma, change), (gamma * expected).sum())
    torch.testing.assert_close(inner(change, gamma), (gamma * expected).sum())
    torch.testing.assert_close(squared_norm(change), expected.square().sum())
    with pytest.raises(TypeError, match="with a dense matrix only"):
        inner(change, low)


def stacked_change(kind: str, weights: torch.Tensor, gamma: torch.Tensor) -> LowRank | Rescaled:
    """Of two weights [2, 5, 6], with a gradient in each of its parts."""
    generator = torch.Generator().manual_seed(4)
    left, right, spread = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 3), (2, 3, 6), (2, 5))
    )
    low = LowRank(left=left, right=right)
    if kind == "lora":
        return low
    return Rescaled(
        low=low,
        magnitude=(weights.norm(dim=-1) + 0.1 * spread).detach().requires_grad_(),
        projected=weights @ right.mT,
        squares=weights.square().sum(dim=-1),
        along=(gamma * weights).sum(dim=-1),
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_gradients_of_an_adapter_s_change_without_a_graph_are_those_with_one(kind: str, floor: float) -> None:
    generator = torch.Generator().manual_seed(5)
    gamma, weights = (torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    change, squares = stacked_change(kind, weights, gamma), gamma.square().sum(dim=(-2, -1))
    expected = squared_cosine(gamma, change, floor=floor, squares=squares)
    if isinstance(change, LowRank):
        parts = [change.left, change.right]
        value, *found = low_rank_gradients(gamma, change, squares=squares, floor=floor)
    else:
        parts = [change.low.left, change.low.right, change.magnitude]
        value, *found = rescaled_gradients(
            gamma, change, squares=squares, floor=floor, times_base=lambda rows: rows @ weights
        )
    torch.testing.assert_close(value, expected)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_the_penalties_gradients_are_those_of_finite_differences(kind: str) -> None:
    gamma = dense(low_rank(5, 4, 6, seed=0))
    parts = low_rank(5, 2, 6, seed=1)
    if kind == "lora":
        inputs = (parts.left.requires_grad_(), parts.right.requires_grad_())
        torch.autograd.gradcheck(
            lambda b, a: squared_cosine(gamma, LowRank(left=b, right=a), floor=0.1), inputs
        )
    else:
        delta = dense(parts).requires_grad_()
        torch.autograd.gradcheck(lambda d: squared_cosine(gamma, d, floor=0.1), (delta,))
        torch.autograd.gradcheck(lambda d: elementwise_penalty({"w": gamma}, {"w": d}), (delta,))


def test_next_to_nothing_has_no_direction() -> None:
    gamma = torch.ones(3, 3)
    assert squared_cosine(gamma, 1e-4 * gamma, floor=0.1) < 1e-5
    assert squared_cosine(gamma, 0.1 * gamma, floor=0.1) == pytest.approx(0.5)
    assert squared_cosine(gamma, 100 * gamma, floor=0.1) == pytest.approx(1, abs=1e-5)


def test_a_stack_is_its_matrices_one_by_one() -> None:
    lows, gammas = ([low_rank(6, 2, 5, seed=s) for s in seeds] for seeds in ((0, 1, 2), (3, 4, 5)))
    stack = LowRank(left=torch.stack([x.left for x in lows]), right=torch.stack([x.right for x in lows]))
    gamma = torch.stack([dense(x) for x in gammas])
    one_by_one = torch.stack([squared_cosine(g, x, floor=0.1) for g, x in zip(gamma, lows, strict=True)])
    squares = gamma.square().sum(dim=(1, 2))
    torch.testing.assert_close(squared_cosine(gamma, stack, floor=0.1, squares=squares), one_by_one)
    found = cosine_penalty({"w": gamma}, {"w": stack}, floor=0.1, squares={"w": squares})
    torch.testing.assert_close(found, one_by_one.mean())
