"""The functions that replace torch's where ONNX has no operator give what torch gives."""

from __future__ import annotations

import pytest
import torch

from actserve_export.capture import decompositions, linalg

X = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
POSITIVE = X @ X.mT + torch.eye(4)


def test_the_logarithm_of_the_gamma_function() -> None:
    x = torch.tensor([0.01, 0.3, 0.5, 1.0, 1.5, 2.0, 3.3, 50.0, 1e4])
    torch.testing.assert_close(decompositions.lgamma(x), torch.lgamma(x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("upper", [True, False])
def test_cholesky(upper: bool) -> None:
    expected = torch.linalg.cholesky(POSITIVE, upper=upper)
    torch.testing.assert_close(linalg.cholesky(POSITIVE, upper=upper), expected)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_a_triangular_system(upper: bool, left: bool, unit: bool) -> None:
    factor = torch.linalg.cholesky(POSITIVE, upper=upper)
    right = X[..., :3] if left else X[..., :3].mT
    options = {"upper": upper, "left": left, "unitriangular": unit}
    expected = torch.linalg.solve_triangular(factor, right, **options)
    torch.testing.assert_close(linalg.solve_triangular(factor, right, **options), expected)


def test_a_linear_system_and_a_determinant() -> None:
    """Matrices with their largest entries anywhere, and determinants of either sign."""
    matrices = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(1))
    right = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(linalg.solve(matrices, right), torch.linalg.solve(matrices, right), atol=1e-4, rtol=1e-4)
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(linalg.solve(swapped, torch.eye(2)), swapped)
    sign, logarithm = torch.linalg.slogdet(matrices)
    assert set(sign.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(linalg.slogdet(matrices), (sign, logarithm), atol=1e-5, rtol=1e-5)


def test_a_large_matrix_goes_to_torchs_own_function() -> None:
    large = X[0, 0, 0] * torch.eye(linalg.LARGEST + 1) ** 2 + 3
    large = large @ large.mT + torch.eye(len(large))
    right = torch.ones(len(large), 2)
    factor = torch.linalg.cholesky(large)
    assert torch.equal(linalg.cholesky(large), factor)
    solved = torch.linalg.solve_triangular(factor, right, upper=False)
    assert torch.equal(linalg.solve_triangular(factor, right, upper=False), solved)
    assert torch.equal(linalg.solve(large, right), torch.linalg.solve(large, right))
    assert torch.equal(linalg.slogdet(large)[1], torch.linalg.slogdet(large)[1])


def test_products_and_losses() -> None:
    torch.testing.assert_close(decompositions.cumprod(X, -1), X.cumprod(-1))
    target = torch.tensor([0, 3, 1, 2, 0])
    for ignore in (-100, 0):
        options = {"reduction": "none", "ignore_index": ignore, "label_smoothing": 0.0, "weight": None}
        expected = torch.nn.functional.cross_entropy(X[:, 0], target, reduction="none", ignore_index=ignore)
        torch.testing.assert_close(decompositions.cross_entropy(X[:, 0], target, **options), expected)
    mean = torch.nn.functional.cross_entropy(X[:, 0], target)
    torch.testing.assert_close(decompositions.cross_entropy(X[:, 0], target, reduction="mean"), mean)


def test_a_choice_of_booleans() -> None:
    condition, one, other = (X[i] > 0 for i in range(3))
    assert torch.equal(decompositions.where(condition, one, other), torch.where(condition, one, other))
