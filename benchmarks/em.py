"""Iterations of EM, from the same responsibilities, and closed forms, against scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import pyro_lvm as lvm
from benchmarks.timing import Burst, Comparison, Contender
from pyro_lvm.blocks import Blocks
from pyro_lvm.data import as_rows

REFERENCE = "pyro_lvm"
ITERATIONS = 10


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """Mixtures of two sizes; PPCA's closed form."""
    sizes = [(60, 2, 2)] if tiny else [(20_000, 8, 8), (100_000, 16, 16)]
    kinds = ("full", "tied", "diag", "spherical") if everything else ("full",)
    for n, features, k in sizes:
        x, responsibilities = _data(n, features, k)
        for kind in kinds:
            contenders = [
                Contender(REFERENCE, lambda kind=kind, x=x, r=responsibilities: _ours(x, r, kind), ITERATIONS),
                Contender("scikit-learn", lambda kind=kind, x=x, r=responsibilities: _theirs(x, r, kind), ITERATIONS),
            ]
            yield Comparison(f"EM, {kind}, n={n}, D={features}, K={k}", REFERENCE, contenders, unit="iteration")
    for n, features in [(50, 5)] if tiny else [(20_000, 50), (60_000, 784)]:
        x, _ = _data(n, features, 3)
        contenders = [
            Contender(REFERENCE, lambda x=x: _closed_form(x), 1),
            Contender("scikit-learn PCA(svd_solver='full')", lambda x=x: _pca(x), 1),
        ]
        yield Comparison(f"closed-form PPCA, n={n}, D={features}, L=3", REFERENCE, contenders, unit="fit")


def _data(n: int, features: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, and responsibilities to start from."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(k, features))
    x = centers[generator.integers(k, size=n)] + generator.normal(size=(n, features))
    return x, generator.dirichlet(np.ones(k), size=n)


def _ours(x: np.ndarray, responsibilities: np.ndarray, kind: Any) -> Burst:
    mixture = lvm.GaussianMixture(responsibilities.shape[1], x.shape[1], covariance=kind, reg_covar=0.0).double()
    steps = mixture.expectation_maximisation(Blocks(as_rows(torch.from_numpy(x))))
    state = {"parameters": steps.start(responsibilities, 0)}
    state["statistics"] = steps.expectation(state["parameters"]).statistics

    def burst() -> None:
        for _ in range(ITERATIONS):
            state["parameters"], _ = steps.maximisation(state["parameters"], state["statistics"])
            state["statistics"] = steps.expectation(state["parameters"]).statistics

    return burst


def _theirs(x: np.ndarray, responsibilities: np.ndarray, kind: Any) -> Burst:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(responsibilities.shape[1], covariance_type=kind, reg_covar=0.0)
    mixture._initialize(x, responsibilities)

    def burst() -> None:
        for _ in range(ITERATIONS):  # what its `fit` repeats
            _, log_responsibilities = mixture._e_step(x)
            mixture._m_step(x, log_responsibilities)

    return burst


def _closed_form(x: np.ndarray) -> Burst:
    rows = torch.from_numpy(x)
    return lambda: lvm.PPCA.closed_form(rows, 3)


def _pca(x: np.ndarray) -> Burst:
    from sklearn.decomposition import PCA

    return lambda: PCA(3, svd_solver="full").fit(x)
