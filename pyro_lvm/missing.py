r"""Missing values: NaN in the data, integrated out of the likelihood.

Where values are missing at random (whether one is missing may depend on those that are seen, not on itself), the
likelihood of what is seen is all there is to say (Rubin, 1976, https://doi.org/10.1093/biomet/63.3.581):

.. math::
    \log p(x_o, z) = \log p(z) + \log \int p(x_o, x_m \mid z)\, \mathrm{d}x_m

For features that are independent given the latents the integral leaves out their terms; for a multivariate normal it
leaves out rows and columns of the covariance. Guides, which are functions of whole rows, see the mean of a feature in
the place of what is missing: a choice of input, which leaves the bound a bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_lvm.data import Batch, Rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.program import Program
from pyro_lvm.side_by_side import SideBySide

__all__ = [
    "Missing",
    "MissingValues",
    "ObservedPart",
    "has_missing",
    "marginalizing",
    "require_missing",
]

Missing = Literal["marginalize"] | None

_SAMPLE = 20_000  # rows to take means from


class ObservedPart(TorchDistribution):
    r"""A distribution whose ``log_prob`` integrates out the entries of its value that are NaN.

    Args:
        base_dist: features independent of each other (``.to_event(1)``), or a multivariate normal.
        name: of the site, for the error.

    Raises:
        ProgramError: if the marginals of the distribution have no closed form here.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> normal = ObservedPart(dist.Normal(torch.zeros(2), 1.0).to_event(1), "x")
        >>> normal.log_prob(torch.tensor([[0.0, torch.nan], [torch.nan, torch.nan]]))
        tensor([-0.9189, 0.0000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base_dist: Any, name: str = "x") -> None:
        self.base_dist, self.name = base_dist, name
        self.entries, self.num_event_dims = base_dist, 0
        while isinstance(self.entries, torch.distributions.Independent):
            self.num_event_dims += self.entries.reinterpreted_batch_ndims
            self.entries = self.entries.base_dist
        self.is_normal = isinstance(self.entries, dist.MultivariateNormal | dist.LowRankMultivariateNormal)
        if self.entries.event_shape and not self.is_normal:
            raise ProgramError(
                f"site {name!r} has missing values and a {type(self.entries).__name__} likelihood, of which a part of "
                "an event has no closed form: write features as independent given the latents, Normal(...).to_event(1),"
                " or as MultivariateNormal, or drop the rows with NaN"
            )
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the whole."""
        return self.base_dist.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """That of the whole."""
        return bool(self.base_dist.has_rsample)

    @property
    def mean(self) -> Tensor:
        """Mean of the whole."""
        mean: Tensor = self.base_dist.mean
        return mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> ObservedPart:
        """Expand the batch shape."""
        return ObservedPart(self.base_dist.expand(torch.Size(batch_shape)), self.name)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Whole draws."""
        return torch.as_tensor(self.base_dist.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Whole draws, reparameterised."""
        return torch.as_tensor(self.base_dist.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the entries of ``value`` that are not NaN."""
        missing = value.isnan()
        if self.is_normal:
            return torch.as_tensor(sum_rightmost(self._of_normal(value, missing)[0], self.num_event_dims))
        # what stands in must lie in the support: a gradient flows through it before it is left out
        filled = torch.where(missing, self._inside(value), value)
        entries = torch.where(missing, 0.0, self.entries.log_prob(filled))
        return torch.as_tensor(sum_rightmost(entries, self.num_event_dims))

    def impute(self, value: Tensor) -> Tensor:
        """``value`` with its missing entries drawn given the others."""
        missing = value.isnan()
        drawn = self.base_dist.sample()
        if self.is_normal:
            # a draw of the whole, moved by what its observed part is off (Matheron's rule)
            regression = self._of_normal(value, missing)[1]
            off = torch.where(missing, 0.0, value.nan_to_num(0.0) - drawn)
            drawn = drawn + (regression @ off.unsqueeze(-1)).squeeze(-1)
        return torch.where(missing, drawn, value)

    def _inside(self, value: Tensor) -> Tensor:
        support = self.entries.support
        if getattr(support, "is_discrete", False):
            return torch.as_tensor(getattr(support, "lower_bound", 0)).to(value)
        inside: Tensor = transform_to(support)(torch.zeros_like(value))
        return inside

    def _of_normal(self, value: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of what is seen, and the regression of everything on it, (..., D, D)."""
        seen = (~missing).to(value.dtype)
        covariance = self.entries.covariance_matrix
        both = seen.unsqueeze(-1) * seen.unsqueeze(-2)
        # the identity in the place of what is missing: it adds nothing to determinant or distance
        factor = torch.linalg.cholesky(both * covariance + (1 - seen).diag_embed())
        deviation = seen * (torch.where(missing, 0.0, value.nan_to_num(0.0)) - self.entries.loc)
        whitened = torch.linalg.solve_triangular(factor, deviation.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * seen.sum(-1)
        regression = covariance @ (both * torch.cholesky_inverse(factor))
        return -0.5 * whitened.square().sum(-1) - log_det - constant, regression


class _Marginalize(Messenger):
    """Gives every observed site that can hold NaN the distribution of its observed part."""

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        takes_part = msg["is_observed"] and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        if takes_part and not isinstance(msg["fn"], dist.Delta | dist.Unit):
            msg["fn"] = _observed_part(msg["fn"], msg["name"])


def _observed_part(fn: Any, name: str) -> TorchDistribution:
    if isinstance(fn, SideBySide):
        return SideBySide(ObservedPart(fn.first, name), ObservedPart(fn.rest, name))
    return ObservedPart(fn, name)


@dataclass
class MissingValues:
    """What a program does about NaN in its data.

    Attributes:
        args: by position, what guides and start see in the place of NaN: means by feature, or None.
        kwargs: the same by name.
        active: whether the data at hand have any; where they have none the program is left as it is.
    """

    args: tuple[Tensor | None, ...]
    kwargs: Mapping[str, Tensor | None]
    active: bool = True

    @staticmethod
    def of(rows: Rows) -> MissingValues:
        """Means by feature of the values that are there.

        Raises:
            ValueError: if a feature has none.
        """
        batch = rows.first(_SAMPLE)
        named = batch.tensors()
        means = {name: _means(name, value) for name, value in named.items()}
        positional = list(means.values())[: len(batch.args)]
        return MissingValues(tuple(positional), {name: means[name] for name in batch.kwargs})

    @contextmanager
    def during(self, rows: Rows) -> Iterator[None]:
        """Be active while these rows are looked at, if they hold NaN."""
        before, self.active = self.active, rows.missing
        try:
            yield
        finally:
            self.active = before

    def filled(self, batch: Batch) -> Batch:
        """The batch with means in the place of NaN."""
        args, kwargs = self._filled(batch.args, batch.kwargs)
        return replace(batch, args=args, kwargs=kwargs)

    def _filled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        means = (*self.args, *(None for _ in args[len(self.args) :]))
        by_position = tuple(_fill(value, mean) for value, mean in zip(args, means, strict=False))
        return by_position, {name: _fill(value, self.kwargs.get(name)) for name, value in kwargs.items()}

    def model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model, its likelihoods of what is seen."""

        @functools.wraps(model)
        def marginalized(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return model(*args, **kwargs)
            with _Marginalize():
                return model(*args, **kwargs)

        return marginalized

    def guide(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        """The guide, shown means in the place of NaN."""

        @functools.wraps(guide)
        def shown(*args: Any, **kwargs: Any) -> Any:
            if self.active:
                args, kwargs = self._filled(args, kwargs)
            return guide(*args, **kwargs)

        return shown


def has_missing(x: Tensor, missing: Missing) -> bool:
    """Whether x holds NaN that is to be integrated out.

    Raises:
        ValueError: if it holds NaN and nobody said that these are missing values.
    """
    holds = bool(x.isnan().any())
    if holds and not require_missing(missing):
        row = int(x.isnan().flatten(1).any(-1).nonzero()[0])
        raise ValueError(
            f"x holds {int(x.isnan().sum())} NaN, the first in row {row}: drop those rows, or pass "
            "missing='marginalize' to integrate out what is missing"
        )
    return holds


def require_missing(missing: str | None) -> bool:
    """Whether NaN marks a missing value.

    Raises:
        ValueError: if ``missing`` is neither None nor "marginalize".
    """
    if missing not in (None, "marginalize"):
        raise ValueError(f"missing={missing!r} is not known: use 'marginalize', or None to make NaN an error")
    return missing is not None


def marginalizing(program: Program, rows: Rows, held_out: Rows | None = None) -> Program:
    """The program with what is missing integrated out, wherever the data hold NaN."""
    missing = MissingValues.of(rows)
    missing.active = rows.missing or (held_out is not None and held_out.missing)
    guide = None if program.guide is None else missing.guide(program.guide)
    return replace(program, model=missing.model(program.model), guide=guide, missing=missing)


def _means(name: str, value: Any) -> Tensor | None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    means = torch.nanmean(value.double(), 0)
    if bool(means.isnan().any()):
        which = means.isnan().nonzero().squeeze(-1).tolist() if means.dim() else "the only one"
        raise ValueError(f"{name} has no observed value in column {which} of {len(value)} rows: drop such columns")
    return means.to(value.dtype)


def _fill(value: Any, mean: Tensor | None) -> Any:
    if mean is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.where(value.isnan(), mean.to(value), value)
