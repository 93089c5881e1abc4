r"""Every form of the bound, side by side.

.. math::
    \mathrm{ELBO} &= E_q[\log p(x \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z)) \\
                  &= E_q[\log p(x, z) - \log q(z)] \\
                  &= E_q[\log p(x, z)] + H(q) \\
                  &= \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, kl_divergence

from pyro_lvm.criticism.evidence import estimate_evidence, rows_at_a_time
from pyro_lvm.criticism.expectations import Parts, parts_of
from pyro_lvm.criticism.particles import Passes
from pyro_lvm.criticism.quadratic import expected_by_quadratic
from pyro_lvm.criticism.weights import (
    Source,
    draw_latent,
    enumerated_probabilities,
    from_guide,
    local_log_weight,
    log_weight,
    point_estimates,
    sampled_sites,
    weighs_rows,
)
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation

__all__ = ["Decomposition", "Figure", "decompose"]

FORMS = ("reconstruction - kl", "joint - log q", "joint + entropy")

ROWS_PER_PASS = 512


@dataclass(frozen=True)
class Figure:
    """One number, nats per datum.

    Attributes:
        value: the number.
        standard_error: of ``value`` as an estimate for these data; 0 where it is exact.
    """

    value: float
    standard_error: float

    @property
    def exact(self) -> bool:
        """Whether it is a closed form or a sum, and no draw had a part in it."""
        return self.standard_error == 0.0


@dataclass(frozen=True, repr=False)
class Decomposition(Mapping[str, float]):
    """The bound of one fit in all its forms, nats per datum; a mapping from names to numbers that prints as a table.

    ``d["elbo"]`` is the form with the least standard error. The others are, each computed by itself:
    ``"reconstruction - kl"``, ``"joint - log q"`` and ``"joint + entropy"``; their terms ``"reconstruction"``,
    ``"kl"``, ``"joint"``, ``"log q"``, ``"entropy"``; by site ``"reconstruction[x]"``, ``"kl[z]"``; ``"log_evidence"``
    and ``"gap"``, by which the bound falls short of it. Where the posterior is known there are
    ``"kl_to_posterior"``, KL(q || p(z | x)) computed from the two distributions, and ``"residual"``,
    log_evidence - elbo - kl_to_posterior, which is nought but for rounding and the standard errors.

    Attributes:
        figures: every number with its standard error.
    """

    figures: Mapping[str, Figure]

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def __repr__(self) -> str:
        width = max(map(len, self.figures))
        lines = [f"{'':<{width}}  {'nats per datum':>14}"]
        for name, figure in self.figures.items():
            error = "  exact" if figure.exact else f"  ± {figure.standard_error:.2g}"
            lines.append(f"{name:<{width}}  {figure.value:>14.6f}{error}")
        return "\n".join(lines)


def decompose(fit: Any, x: Any, num_samples: int = 1000, seed: int | None = None) -> Decomposition:
    r"""Every form of the bound side by side, with the evidence and what is between the two.

    .. math::
        \underbrace{E_q \log p(x \mid z)}_{\text{reconstruction}} - \mathrm{KL}(q \,\|\, p)
        = \underbrace{E_q \log p(x, z)}_{\text{joint}} + H(q)
        = \log p(x) - \mathrm{KL}(q \,\|\, p(z \mid x))

    Every term has its closed form where it has one: KL and entropy where torch knows them; the expectation of
    log-probabilities that are quadratic in z under a normal guide (linear-Gaussian programs); sums over enumerated
    sites. The others are means over draws, and their standard errors say so. "joint - log q" is always a mean over
    draws, whose noise is nought where the guide is the posterior.

    Latent sites that all data share, and guides that draw the latents of all data jointly, have one bound for all:
    every figure is then that of the whole data set divided by n.

    Args:
        fit: a `Fit`, or anything that `fit` takes with a guide (at its present parameters).
        x: data as for `fit`: n rows.
        num_samples: draws from the guide for each datum.
        seed: of the draws; None for fresh ones.

    Returns:
        A `Decomposition`: a mapping with at least "elbo", "reconstruction", "kl", "entropy" and "log_evidence".

    Raises:
        ValueError: if ``num_samples < 2``.
        ProgramError: if the guide is a point, which has no entropy; if both model and guide enumerate.

    When it is wrong: standard errors are those of the draws, given these data. Where ``"log_evidence"`` has one, it is
    importance-weighted, and too low where the guide misses a part of the posterior; then so is the gap.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> d = lvm.decompose(lvm.PPCA.closed_form(x, latent_dim=1), x, num_samples=10, seed=0)
        >>> abs(d["reconstruction"] - d["kl"] - d["log_evidence"]) < 1e-8  # the guide is the exact posterior
        True
    """
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}: a standard error needs at least 2")
    evaluation = Evaluation.of(fit, x)
    structure = evaluation.structure
    points = point_estimates(structure)
    if points:
        raise ProgramError(
            f"the guide of {', '.join(points)} is a point, without entropy or KL: fit with guide='mean_field' (or "
            "another guide with a spread)"
        )
    with evaluation.running(seed), torch.no_grad():
        means = _Means(evaluation.rows.size)
        by_row = not structure.global_latent and weighs_rows(structure)
        closed: list[Tensor | None] = []
        if by_row:
            rows = rows_at_a_time(evaluation, ROWS_PER_PASS)
            for batch in evaluation.rows.batches(rows):
                closed.append(_add(evaluation, batch, structure.data_plate, num_samples, means))
        else:
            _add(evaluation, evaluation.rows.whole(), None, num_samples, means)
        figures = means.figures()
        figures["elbo"] = min((figures[form] for form in FORMS), key=lambda figure: figure.standard_error)
        evidence = estimate_evidence(evaluation, num_samples, "auto", ROWS_PER_PASS)
    figures["log_evidence"] = _mean_evidence(evidence, together=not by_row)
    figures["gap"] = _difference(figures["log_evidence"], figures["elbo"])
    kls = [kl for kl in closed if kl is not None]
    if kls and len(kls) == len(closed):
        figures["kl_to_posterior"] = Figure(torch.cat(kls).double().mean().item(), 0.0)
        figures["residual"] = _difference(figures["gap"], figures["kl_to_posterior"])
    first = ("elbo", *FORMS, "reconstruction", "kl", "joint", "log q", "entropy")
    return Decomposition({name: figures[name] for name in (*first, *(name for name in figures if name not in first))})


def _difference(a: Figure, b: Figure) -> Figure:
    return Figure(a.value - b.value, math.hypot(a.standard_error, b.standard_error))


def _mean_evidence(evidence: Any, *, together: bool) -> Figure:
    """The mean over rows, each with its own error, or the one number that all rows have."""
    errors = evidence.standard_error.double()
    error = errors[0].item() if together else errors.square().sum().sqrt().item() / len(errors)
    return Figure(evidence.log_evidence.double().mean().item(), error)


def _add(evaluation: Evaluation, batch: Batch, plate: str | None, num_samples: int, means: _Means) -> Tensor | None:
    """Add the rows of a batch to the means; the KL to their posterior, shape (rows,), where it is known."""
    bound, structure = evaluation.bound, evaluation.structure
    source = from_guide(bound, structure)
    passes = Passes(
        source,
        log_weight if plate is None else lambda draw: local_log_weight(draw, plate),
        ROWS_PER_PASS,
        one_at_a_time=evaluation.given is not None,
    )
    sampled = sampled_sites(structure)
    exact = expected_by_quadratic(source, batch, plate) if plate is not None else None
    for draw, _ in passes.draws(batch, num_samples if sampled else 1):
        means.add(_terms(parts_of(draw, structure, plate), exact))
    means.end(len(batch))
    return None if plate is None else _kl_to_posterior(evaluation, source, batch)


def _terms(parts: Parts, exact: Parts | None) -> dict[str, Tensor]:
    """All figures of each draw and row; ``exact`` has the expectations of the model's terms, where they are known."""
    model = parts if exact is None else exact
    kl = parts.kl_by_site
    like = parts.reconstruction

    def full(value: Tensor) -> Tensor:
        return value.expand_as(like)

    total = sum(kl.values(), torch.zeros_like(like))
    terms = {
        "reconstruction": full(model.reconstruction),
        "kl": total,
        "joint": full(model.joint),
        "log q": parts.log_q,
        "entropy": parts.entropies,
    }
    terms |= {
        "reconstruction - kl": terms["reconstruction"] - total,
        "joint - log q": parts.joint - parts.log_q,
        "joint + entropy": terms["joint"] + terms["entropy"],
    }
    terms |= {f"reconstruction[{name}]": full(value) for name, value in model.observed.items()}
    return terms | {f"kl[{name}]": value for name, value in kl.items()}


class _Means:
    """Means over draws and rows, and their standard errors.

    Args:
        size: n, rows of the data.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._totals: dict[str, float] = {}
        self._variances: dict[str, float] = {}
        self._first: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._count = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Some draws of the present rows, by figure, shape (draws, rows)."""
        for name, values in terms.items():
            values = values.double()
            first = self._first.setdefault(name, values[0])
            shifted = values - first  # so that a spread of nought comes out as nought
            before = self._sums.get(name, (torch.zeros_like(first), torch.zeros_like(first)))
            self._sums[name] = before[0] + shifted.sum(0), before[1] + shifted.square().sum(0)
        self._count += len(next(iter(terms.values())))

    def end(self, rows: int) -> None:
        """The present rows are done."""
        for name, (total, squares) in self._sums.items():
            mean = total / self._count
            self._totals[name] = self._totals.get(name, 0.0) + (self._first[name] + mean).sum().item()
            variance = torch.zeros_like(mean)
            if self._count > 1:
                variance = (squares / self._count - mean.square()).clamp(min=0.0) / (self._count - 1)
                rounding = 1e-12 if variance.dtype == torch.float64 else 1e-6
                variance = torch.where(squares.sqrt() <= rounding * self._first[name].abs(), 0.0, variance)
            self._variances[name] = self._variances.get(name, 0.0) + variance.sum().item()
        self._first, self._sums, self._count = {}, {}, 0

    def figures(self) -> dict[str, Figure]:
        """All figures, nats per datum."""
        return {
            name: Figure(total / self.size, math.sqrt(self._variances[name]) / self.size)
            for name, total in self._totals.items()
        }


def _kl_to_posterior(evaluation: Evaluation, source: Source, batch: Batch) -> Tensor | None:
    """KL(q || p(z | x)) of each row from the two distributions, where the program knows its posterior."""
    program, structure = evaluation.bound.program, evaluation.structure
    sampled = sampled_sites(structure)
    listed = [site.name for site in structure.latent if site not in sampled]
    draw = draw_latent(evaluation.bound, structure, batch)
    if not sampled and len(listed) == 1:
        return _kl_of_listed(program.hook("responsibilities"), draw, listed[0], batch)
    posterior = program.hook("posterior")
    if posterior is None or listed or len(sampled) != 1 or evaluation.rows.missing:
        return None
    site = structure.guide.get(sampled[0].name)
    if site is None or len(structure.guide) != 1 or len(site.plates) != 1:
        return None
    try:
        truth = posterior(*batch.args, **batch.kwargs)
    except (TypeError, ProgramError):
        return None  # a method of that name that is something else
    guide = draw.guide_trace.nodes[site.name]["fn"]
    if not isinstance(truth, Distribution) or truth.event_shape != guide.event_shape:
        return None
    try:
        return kl_divergence(_with_matrix(guide), _with_matrix(truth))
    except NotImplementedError:
        return None


def _with_matrix(fn: Any) -> Any:
    """A vector of independent normals as one normal with a matrix: torch compares only like with like."""
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and isinstance(fn.base_dist, Normal):
        return MultivariateNormal(fn.mean, scale_tril=torch.diag_embed(fn.stddev))
    return fn


def _kl_of_listed(responsibilities: Any, draw: Any, name: str, batch: Batch) -> Tensor | None:
    """KL of what the bound sums a label with to its posterior: of the guide's list, or of the model's conditional."""
    exact = enumerated_probabilities(draw)[name]
    if name in draw.guide_trace:
        node = draw.guide_trace.nodes[name]
        if node["packed"]["mask"] is not None or exact.dim() != 2:
            return None
        q = node["fn"].enumerate_support(expand=False)
        log_q = node["fn"].log_prob(q).movedim(0, -1)
        q = log_q.exp().expand_as(exact)
        return torch.where(q > 0, q * (log_q - exact.log()), 0.0).sum(-1)
    if responsibilities is None or exact.dim() != 2:
        return None
    truth = responsibilities(*batch.args, **batch.kwargs)
    return torch.where(exact > 0, exact * (exact.log() - truth.log()), 0.0).sum(-1)
