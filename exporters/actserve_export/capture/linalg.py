"""torch.linalg's functions of small matrices, from operators that ONNX has. The loops are unrolled in the program.

Matrices of more than `LARGEST` rows go to torch's own functions, which `.pt2` programs alone can run.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 32


def cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """(..., n, n), positive definite -> its lower (or upper) triangular factor."""
    if matrix.shape[-1] > LARGEST:
        return torch.linalg.cholesky(matrix, upper=upper)
    columns: list[Tensor] = []
    for j in range(matrix.shape[-1]):
        column = matrix[..., j]
        for previous in columns:
            column = column - previous * previous[..., j : j + 1]
        column = column / column[..., j : j + 1].sqrt()
        columns.append(torch.cat([torch.zeros_like(column[..., :j]), column[..., j:]], -1))
    return torch.stack(columns, -2 if upper else -1)


def solve_triangular(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """The X of matrix X = right, (..., n, n) and (..., n, k) -> (..., n, k), or with `left` False of X matrix = right.

    `matrix` is triangular.
    """
    if matrix.shape[-1] > LARGEST:
        return torch.linalg.solve_triangular(matrix, right, upper=upper, left=left, unitriangular=unitriangular)
    if not left:
        return solve_triangular(matrix.mT, right.mT, upper=not upper, unitriangular=unitriangular).mT
    count = matrix.shape[-1]
    found: dict[int, Tensor] = {}
    for i in reversed(range(count)) if upper else range(count):
        row = right[..., i, :]
        for k, solved in found.items():
            row = row - matrix[..., i, k].unsqueeze(-1) * solved
        found[i] = row if unitriangular else row / matrix[..., i, i].unsqueeze(-1)
    return torch.stack([found[i] for i in range(count)], -2)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The X of matrix X = right, (..., n, n) and (..., n, k) -> (..., n, k)."""
    count = matrix.shape[-1]
    if count > LARGEST or right.ndim != matrix.ndim:  # a vector
        return torch.linalg.solve(matrix, right)
    triangular, _ = _eliminated(torch.cat([matrix, right.expand(*matrix.shape[:-1], right.shape[-1])], -1))
    return solve_triangular(triangular[..., :count], triangular[..., count:], upper=True)


def slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, n) -> the determinant's sign (...), and the logarithm of its absolute value (...)."""
    if matrix.shape[-1] > LARGEST:
        sign, logarithm = torch.linalg.slogdet(matrix)
        return sign, logarithm
    triangular, sign = _eliminated(matrix)
    pivots = torch.diagonal(triangular, dim1=-2, dim2=-1)
    return sign * pivots.sign().prod(-1), pivots.abs().log().sum(-1)


def _eliminated(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, m) with zeros below the diagonal, by Gaussian elimination with partial pivoting; the exchanges' sign."""
    size = matrix.shape[-2]
    rows = list(matrix.unbind(-2))
    sign = torch.ones_like(matrix[..., 0, 0])
    for column in range(size - 1):
        for row in range(column + 1, size):  # the row with the largest entry comes first
            first, other = rows[column], rows[row]
            exchange = other[..., column, None].abs() > first[..., column, None].abs()
            rows[column], rows[row] = torch.where(exchange, other, first), torch.where(exchange, first, other)
            sign = torch.where(exchange[..., 0], -sign, sign)
        for row in range(column + 1, size):
            rows[row] = rows[row] - rows[column] * (rows[row][..., column, None] / rows[column][..., column, None])
    return torch.stack(rows, -2), sign
