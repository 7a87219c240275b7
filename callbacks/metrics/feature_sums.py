"""Sums of the features of samples, from which the FID is computed; apart from the indices, of a constant size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from datamodules.errors import UserError


class FeatureSums:
    """Mean and scatter matrix of the features of samples, each of which counts once.

    The scatter matrix is the sum of (x - mean)(x - mean)^T. Up to F samples of F features are kept as they are, because they
    are not larger than one triangle of the matrix. More are added to the sums, about F at a time, in float64, by the formula of
    Chan, Golub and LeVeque (1979). It subtracts the mean of the added samples before it squares them. Sums of x x^T would lose
    digits if the mean is large compared with the standard deviation, and a fixed shift would have to be known to all ranks
    before the first sample.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()  # indices or names of all samples
        self.rows: dict[Any, np.ndarray] = {}  # features (F,) of the samples that are not in the sums
        self.n_summed = 0
        self.mu = np.empty(0)  # mean (F,)
        self.triangle = np.empty(0)  # of the symmetric scatter matrix, (F (F + 1) / 2,)

    def store(self, keys: Tensor | Sequence[str], features: Tensor) -> None:
        """Add the features of samples, float32 (N, F) on the CPU, by their indices (N,) or names; each of them counts once."""
        names = keys.tolist() if isinstance(keys, Tensor) else keys
        for key, row in zip(names, features.numpy(), strict=True):
            if key not in self.seen:
                self.seen.add(key)
                self.rows[key] = row
        if len(self.rows) > features.shape[1]:
            self._sum_rows()

    @classmethod
    def merge(cls, parts: Sequence["FeatureSums"]) -> "FeatureSums":
        """Return the sums over the samples of all ranks. A rank may have only samples of other ranks, or none.

        Raises:
            UserError: some samples of a rank, but not all, are in the sums of another one.
        """
        merged = cls()
        for part in parts:
            if part.n_summed:
                part._sum_rows()
                repeated = part.seen & merged.seen
                if not repeated:
                    merged._add(part.n_summed, part.mu, part.triangle)
                    merged.seen |= part.seen
                elif repeated != part.seen:
                    raise UserError(
                        f"FID: two processes evaluated sample {min(repeated)}, and each also others. Give every process "
                        "samples of its own, as datamodules.sampler.RankSampler"
                    )
        for part in parts:
            if not part.n_summed:
                merged.rows |= {key: row for key, row in part.rows.items() if key not in merged.seen}
                merged.seen |= part.seen
        return merged

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the mean "mu" (F,) and the unbiased covariance "sigma" (F, F) in float64.

        Raises:
            UserError: there are fewer than two samples.
        """
        self._sum_rows()
        if self.n_summed < 2:
            raise UserError(f"FID: {self.n_summed} images, but a covariance needs at least two. Use more images")
        sigma = np.zeros((len(self.mu), len(self.mu)))
        sigma[np.tri(len(self.mu), dtype=bool)] = self.triangle / (self.n_summed - 1)
        return {"mu": self.mu, "sigma": sigma + np.tril(sigma, -1).T}

    def _sum_rows(self) -> None:
        """Add the single features to the sums, in the order of the samples."""
        if self.rows:
            features = np.stack([self.rows[key] for key in sorted(self.rows)]).astype(np.float64)
            self.rows = {}
            mu = features.mean(axis=0)
            features -= mu
            self._add(len(features), mu, lower_triangle(features.T @ features))

    def _add(self, n: int, mu: np.ndarray, triangle: np.ndarray) -> None:
        """Add the sums over n other samples."""
        if not self.n_summed:
            self.n_summed, self.mu, self.triangle = n, mu, triangle
            return
        total, difference = self.n_summed + n, mu - self.mu
        between = lower_triangle(np.outer(difference, difference)) * (self.n_summed * n / total)
        self.triangle = self.triangle + triangle + between
        self.mu = self.mu + difference * (n / total)
        self.n_summed = total

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to rank 0: the sums, or the single features of few samples."""
        if self.n_summed:
            self._sum_rows()
        return vars(self)


def lower_triangle(matrix: np.ndarray) -> np.ndarray:
    """Return the entries of a square matrix on and below the diagonal, row by row."""
    return matrix[np.tri(len(matrix), dtype=bool)]


def frechet_distance_of_statistics(samples: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> float:
    """Return the Frechet distance of Gaussians with the given `FeatureSums.statistics`.

    Tr (S1 S2)^(1/2) is the sum of the singular values of A^T B, for S1 = A A^T and S2 = B B^T. torch-fidelity adds the square
    roots of the eigenvalues of S1 S2 instead. With fewer samples than features, most of these are zero, and the root enlarges
    their rounding errors from 1e-16 to 1e-8, which depend on the order of the samples.
    """
    difference = samples["mu"] - real["mu"]
    roots = np.linalg.svd(covariance_factor(samples["sigma"]).T @ covariance_factor(real["sigma"]), compute_uv=False)
    return float(difference @ difference + np.trace(samples["sigma"]) + np.trace(real["sigma"]) - 2 * roots.sum())


def covariance_factor(sigma: np.ndarray) -> np.ndarray:
    """Return A (F, rank) with A A^T = `sigma`, up to rounding, by a Cholesky factorization with pivoting."""
    lower, pivots, rank, _ = dpstrf(sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
