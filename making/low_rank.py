"""The nearest matrix of low rank: of a given rank, or of the least that keeps a given share of the energy.

Eckart and Young 1936: no matrix of rank r is nearer to D, in Frobenius' norm, than its truncated SVD, which is off by
the root of the sum of the squares of the singular values it leaves out. A matrix's energy is the sum of them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

EXACT_SIZE = 512
"""Of a matrix's smaller side up to which its SVD is computed whole."""

_SEED = 0
_ROWS = 256
_FIRST_RANK = 64
_MOST_ROUNDS = 16
_SETTLED = 1e-3
"""A round that lowers the error by no more than this share of it is the last."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a matrix is cut down to: a rank, or the share of its energy to keep at least. One of the two is given."""

    rank: int | None = None
    energy: float | None = None

    def count(self, squares: torch.Tensor, total: float) -> int | None:
        """How many singular values that takes, of these squares, descending; None where they are too few.

        total: the energy of the matrix, to which there may be more than these.
        """
        if self.rank is not None:
            return self.rank if len(squares) >= self.rank else None
        assert self.energy is not None, "a rank or an energy"
        beyond = max(0.0, total - float(squares.sum()))
        left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + beyond
        enough = (left <= (1 - self.energy) * total).nonzero()
        return int(enough[0]) if len(enough) else None


@dataclass(frozen=True, slots=True)
class Factors:
    """b a, which stands for a matrix [d_out, d_in]: a is [rank, d_in], b is [d_out, rank]."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.a.to(dtype).contiguous(), self.b.to(dtype).contiguous())

    def relative_error(self, matrix: torch.Tensor) -> float:
        """||D - b a|| / ||D||, over a few rows of D at a time."""
        off, whole = 0.0, 0.0
        a = self.a.double()
        for start in range(0, len(matrix), _ROWS):
            exact = matrix[start : start + _ROWS].to(torch.float64, copy=True)
            off += float((exact - self.b[start : start + _ROWS].double() @ a).square_().sum())
            whole += float(exact.square_().sum())
        return (off / whole) ** 0.5 if whole else 0.0


def approximate(matrix: torch.Tensor, wanted: Wanted) -> Factors:
    """The nearest factors to `matrix`, float [m, n]; each takes the roots of the singular values.

    Exact in float64 where the matrix is small or the rank is not; else by subspace iteration from a random start that
    is always the same (Halko, Martinsson, Tropp 2011, algorithm 4.4), in float32, until the error settles.
    """
    smaller = min(matrix.shape)
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if smaller > EXACT_SIZE:
        for width in _widths(smaller, wanted):
            u, s, vt = _leading(matrix.float(), width, wanted, total)
            count = wanted.count(s.square(), total)
            if count is not None:
                return _factors(u, s, vt, count)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s[s <= max(matrix.shape) * torch.finfo(torch.float64).eps * s.max()] = 0.0
    count = wanted.count(s.square(), float(s.square().sum()))
    assert count is not None, "a rank is checked against the matrix before"
    return _factors(u, s, vt, count)


def _factors(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int) -> Factors:
    roots = s[:rank].sqrt()
    return Factors(a=roots[:, None] * vt[:rank], b=u[:, :rank] * roots)


def _widths(smaller: int, wanted: Wanted) -> Iterator[int]:
    """Numbers of directions to look for; beyond a quarter of all, computing the whole is as quick."""
    rank = wanted.rank or _FIRST_RANK
    while (width := rank + max(16, rank // 4)) <= smaller // 4:
        yield width
        if wanted.rank is not None:
            return
        rank *= 2


def _leading(
    matrix: torch.Tensor, width: int, wanted: Wanted, total: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Approximate leading singular triplets: u [m, width], s float64 [width], vt [width, n]."""
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    q = torch.linalg.qr(matrix @ start)[0]
    rank = wanted.rank or width
    kept, num_left = 0.0, _MOST_ROUNDS
    while True:
        p = torch.linalg.qr(matrix.t() @ q)[0]
        q, r = torch.linalg.qr(matrix @ p)  # D p p^T = q r p^T is D on the directions p
        u, s, vt = torch.linalg.svd(r.double())
        before, kept, num_left = kept, float(s[:rank].square().sum()), num_left - 1
        if kept - before <= _SETTLED * max(total - kept, 0.0) + 1e-9 * total or not num_left:
            return q @ u.to(q.dtype), s, vt.to(p.dtype) @ p.t()
