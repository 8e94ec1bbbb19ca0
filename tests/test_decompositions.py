"""The functions that replace torch's where ONNX has no operator give what torch gives."""

from __future__ import annotations

import pytest
import torch

from actserve.core.errors import CaptureFailed
from actserve_export.capture import decompositions

X = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
POSITIVE = X @ X.mT + torch.eye(4)


def test_the_logarithm_of_the_gamma_function() -> None:
    x = torch.tensor([0.01, 0.3, 0.5, 1.0, 1.5, 2.0, 3.3, 50.0, 1e4])
    torch.testing.assert_close(decompositions.lgamma(x), torch.lgamma(x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("upper", [True, False])
def test_cholesky(upper: bool) -> None:
    expected = torch.linalg.cholesky(POSITIVE, upper=upper)
    torch.testing.assert_close(decompositions.cholesky(POSITIVE, upper=upper), expected)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_a_triangular_system(upper: bool, left: bool, unit: bool) -> None:
    factor = torch.linalg.cholesky(POSITIVE, upper=upper)
    right = X[..., :3] if left else X[..., :3].mT
    options = {"upper": upper, "left": left, "unitriangular": unit}
    expected = torch.linalg.solve_triangular(factor, right, **options)
    torch.testing.assert_close(decompositions.solve_triangular(factor, right, **options), expected)


def test_a_large_matrix_is_refused() -> None:
    with pytest.raises(CaptureFailed, match="a matrix of 33 rows"):
        decompositions.cholesky(torch.eye(33))


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
