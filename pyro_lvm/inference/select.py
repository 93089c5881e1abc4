"""Choose between programs: by the Bayesian criterion, by leave-one-out, or on rows held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_lvm.criticism.evidence import log_evidence
from pyro_lvm.data import as_rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import fresh_seed
from pyro_lvm.inference.coordinate_ascent import coordinate_ascent
from pyro_lvm.inference.em import em
from pyro_lvm.inference.record import Fit
from pyro_lvm.program import Program, as_program

__all__ = ["Candidate", "Selection", "select"]

Criterion = Literal["bic", "loo", "heldout"]

Fitter = Callable[[Any, Any, int], Fit]


@dataclass(frozen=True)
class Candidate:
    """One program and its score.

    Attributes:
        name: what it was called.
        score: nats per datum, the larger the better: -BIC / 2n, the expected log predictive density by leave-one-out,
            or the mean log evidence of the rows held out.
        standard_error: of the score, over data; nought for BIC, which claims none.
        difference: to the best score, not positive.
        difference_standard_error: of that, from the differences datum by datum.
        fit: of the program; with "heldout" to the other rows.
    """

    name: str
    score: float
    standard_error: float
    difference: float
    difference_standard_error: float
    fit: Fit


@dataclass(frozen=True, repr=False)
class Selection:
    """Candidates, the best first.

    Attributes:
        criterion: what they were compared by.
        candidates: with their scores, the best first.
    """

    criterion: Criterion
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the largest score."""
        return self.candidates[0]

    def __getitem__(self, name: str) -> Candidate:
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(f"no candidate {name!r}; there are {', '.join(c.name for c in self.candidates)}")

    def __repr__(self) -> str:
        width = max(len(candidate.name) for candidate in self.candidates)
        lines = [f"{'by ' + self.criterion:{width}}  nats/datum  difference (standard error)"]
        for c in self.candidates:
            lines.append(f"{c.name:{width}}  {c.score:10.4f}  {c.difference:10.4f} ({c.difference_standard_error:.4f})")
        return "\n".join(lines)


def select(
    x: Any,
    candidates: Mapping[str, Any],
    criterion: Criterion = "bic",
    *,
    fitter: Fitter | None = None,
    heldout: float = 0.2,
    num_samples: int = 1000,
    seed: int | None = None,
) -> Selection:
    r"""Fit several programs to the same data and rank them.

    .. math::
        \text{bic: } \frac{1}{n}\Bigl(\log p(x \mid \hat\theta) - \tfrac{p}{2} \log n\Bigr), \quad
        \text{loo: } \frac{1}{n}\sum_i \log p(x_i \mid x_{-i}), \quad
        \text{heldout: } \frac{1}{m}\sum_{i \in \text{held out}} \log p(x_i \mid \hat\theta)

    All three are nats per datum, the larger the better; the usual BIC is the first times -2n (Schwarz, 1978,
    https://doi.org/10.1214/aos/1176344136). Leave-one-out is ArviZ's PSIS estimate and needs a posterior over
    parameters (Vehtari, Gelman and Gabry, 2017, https://doi.org/10.1007/s11222-016-9696-4).

    When it is wrong: BIC counts parameters of regular models, which mixtures with too many components are not: it
    still finds the number of components in the long run (Keribin, 2000), but its differences are no probabilities. A
    difference below two of its standard errors decides nothing.

    Args:
        x: data, as for `em`.
        candidates: programs by name; each is fitted in place.
        criterion: "bic", "loo" or "heldout".
        fitter: ``fitter(program, x, seed)`` returns a `Fit`; None takes `em` where the program offers it and has no
            prior, and `coordinate_ascent` where it has one.
        heldout: the fraction of the rows that "heldout" keeps from the fits; the same rows for all.
        num_samples: draws where evidence or posterior predictive are estimated.
        seed: of fits, draws and rows held out; None for a fresh one.

    Returns:
        A `Selection`; ``lvm.plots.selection`` draws it.

    Raises:
        ValueError: if there are no candidates, or the criterion is not known.
        ProgramError: if a program has no closed-form fit and no ``fitter`` is given, or no number of parameters (BIC).

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.tensor([[-2.1], [-1.9], [-2.0], [-1.8], [1.9], [2.0], [2.1], [2.2]], dtype=torch.float64)
        >>> mixtures = {f"K={k}": lvm.GaussianMixture(k, 1, covariance="tied") for k in (1, 2)}
        >>> lvm.select(x, mixtures, seed=0).best.name
        'K=2'
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion={criterion!r} is not known: use 'bic', 'loo' or 'heldout'")
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError("candidates must be a dict with at least one program by its name, such as {'K=2': mixture}")
    seed = fresh_seed() if seed is None else seed
    rows = as_rows(x, "x")
    training, judged = rows, rows
    if criterion == "heldout":
        training, judged = rows.split(heldout, torch.Generator().manual_seed(seed))
    fits: dict[str, Fit] = {}
    pointwise: dict[str, Tensor] = {}
    for name, program in candidates.items():
        fits[name] = (fitter or _closed_form)(program, training, seed)
        pointwise[name] = _pointwise(criterion, name, fits[name], judged, num_samples, seed).double().cpu()
    best = max(pointwise, key=lambda name: float(pointwise[name].mean()))
    counted = criterion == "bic"
    scored = [
        Candidate(
            name,
            float(values.mean()),
            0.0 if counted else _standard_error(values),
            float((values - pointwise[best]).mean()),
            0.0 if counted else _standard_error(values - pointwise[best]),
            fits[name],
        )
        for name, values in pointwise.items()
    ]
    return Selection(criterion, tuple(sorted(scored, key=lambda candidate: -candidate.score)))


def _closed_form(program: Any, x: Any, seed: int) -> Fit:
    resolved = as_program(program)
    if resolved.guide is None and resolved.hook("coordinate_updates") is not None:
        return coordinate_ascent(program, x, max_iter=2000, seed=seed)
    if resolved.guide is not None and resolved.hook("expectation_maximisation") is not None:
        return em(program, x, max_iter=2000, seed=seed)
    raise ProgramError(
        f"{resolved.name} has no closed-form fit: pass one, for example "
        "fitter=lambda program, x, seed: lvm.fit(program, x, epochs=100, seed=seed)"
    )


def _pointwise(criterion: Criterion, name: str, fit: Fit, x: Any, num_samples: int, seed: int) -> Tensor:
    """What each datum has to say for the candidate, nats; its mean is the score."""
    if criterion == "heldout":
        return fit.log_prob(x, num_samples, seed=seed)
    if criterion == "loo":
        found = fit.loo(x, num_samples, seed=seed, pointwise=True)
        return torch.as_tensor(found["loo_i"].values if "loo_i" in found else found.elpd_i.values).flatten()
    count = getattr(_owner(fit), "num_parameters", None)
    if not isinstance(count, int):
        raise ProgramError(
            f"candidate {name!r} does not say its num_parameters, for which BIC charges: give the program such an "
            "attribute, or use criterion='heldout'"
        )
    evidence = log_evidence(fit, x, num_samples, seed=seed)
    return evidence - 0.5 * count * math.log(len(evidence)) / len(evidence)


def _owner(fit: Fit) -> Any:
    program: Program = as_program(fit.program)
    return program.source[0] if isinstance(program.source, tuple) else program.source


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
