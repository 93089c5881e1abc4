"""Expectation maximisation: the bound climbed in two closed forms, for programs that have them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pyro_lvm.blocks import Blocks, require_one_array
from pyro_lvm.data import Rows, as_rows
from pyro_lvm.errors import ProgramError, ProgramWarning
from pyro_lvm.evaluation import fresh_seed
from pyro_lvm.exact import ExpectationMaximisation, Parameters
from pyro_lvm.guides import make_guide
from pyro_lvm.inference.bound import mean_elbo
from pyro_lvm.inference.iterations import check_iterations, surroundings
from pyro_lvm.inference.prepare import placed
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.sites import site_table
from pyro_lvm.missing import marginalizing, require_missing
from pyro_lvm.parameters import BoundProgram, Untouched, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program, as_program
from pyro_lvm.structure import Structure

__all__ = ["em"]

ROUNDING = 1e-9
"""The bound may fall by so much of n and of itself: sums of n terms are no more exact."""


@dataclass
class _Climb:
    """One run: where it is, and the bound in nats of the data set after each M-step and each E-step."""

    parameters: Parameters
    objective: float
    after_m: list[float] = field(default_factory=list)
    after_e: list[float] = field(default_factory=list)
    stopped: str = ""


def em(
    program: Any,
    x: Any,
    *,
    max_iter: int = 200,
    tol: float = 1e-6,
    n_init: int = 1,
    init: Any = None,
    hard: bool = False,
    seed: int | None = None,
    device: torch.device | str | None = None,
    missing: Literal["marginalize"] | None = None,
) -> Fit:
    r"""Fit a program by expectation maximisation, where its steps have closed forms.

    .. math::
        \log p(x \mid \theta) =
        \underbrace{\mathbb{E}_q \log \frac{p(x, z \mid \theta)}{q(z)}}_{\mathrm{ELBO}(q, \theta)}
        + \mathrm{KL}(q \,\|\, p(z \mid x, \theta)), \qquad
        \text{E: } q \leftarrow p(z \mid x, \theta), \quad
        \text{M: } \theta \leftarrow \arg\max_\theta \mathrm{ELBO}(q, \theta)

    It climbs the bound that `fit` climbs by gradients, one coordinate at a time: the E-step closes the KL, the M-step
    raises the bound under the evidence. For `GaussianMixture` (four kinds of covariance, with or without a prior),
    `PPCA` and `FactorAnalysis`, and for any program with a method ``expectation_maximisation(data, *, hard)`` (see
    `pyro_lvm.exact`). With a prior over parameters it finds the mode of their posterior, the penalised bound.

    Data are read in blocks, each iteration once (PPCA and factor analysis: twice in all), in double precision; memory
    does not grow with their number.

    Args:
        program: the program; its parameters are set in place.
        x: data, shape (n, D): a tensor, array or memmap, a `Dataset`, or a `DataLoader`.
        max_iter: iterations, each an M-step and the E-step after it.
        tol: it stops when an iteration gains less, nats per datum.
        n_init: starts; the best end is kept.
        init: None for the program's own start (mixtures: the best of short runs seeded by k-means++); for mixtures
            means (K, D) or responsibilities (n, K); or a dict of parameters, such as ``program.constrained()``.
        hard: assign each row to one component: K-means, the limit of a mixture whose components shrink to points.
        seed: of the starts; None for a fresh one, recorded.
        device: where to compute; None is where the data lie.
        missing: "marginalize" takes NaN for values missing at random: the E-step then also expects what is missing, and
            the bound is that of what is seen. None makes NaN an error.

    Returns:
        A `Fit`. Its history has an entry per iteration: ``elbo``, the bound after the E-step, where it equals log
        p(x); ``elbo_after_m_step``, the bound that the M-step left below it; ``kl_closed``, their difference, which is
        KL(q || p(z | x)) before the E-step (all nats per datum); and ``loss``, minus the bound in nats of the data
        set. With ``hard`` only ``loss``, the inertia in squared units of the data.

    Raises:
        ProgramError: if the program has no closed forms, or its bound falls by more than rounding.
        ValueError: if data or ``init`` do not fit the program, or an argument is out of range.

    Warns:
        ProgramWarning: if a component ends without rows, or the last iteration still gained more than ``tol``.

    Dempster, Laird and Rubin (1977), https://doi.org/10.1111/j.2517-6161.1977.tb01600.x; Neal and Hinton (1998),
    https://doi.org/10.1007/978-94-011-5014-9_12.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.tensor([[-2.1], [-1.9], [-2.0], [1.9], [2.0], [2.1]])
        >>> fit = lvm.em(lvm.GaussianMixture(num_components=2, num_features=1), x, seed=0)
        >>> fit.params["locs"].sort(0).values
        tensor([[-2.],
                [ 2.]])
    """
    started = time.perf_counter()
    check_iterations(max_iter, tol, n_init, init)
    resolved = as_program(program)
    seed = fresh_seed() if seed is None else seed
    untouched = Untouched(resolved.modules.values())
    try:
        with isolated(seed, validate=True):
            rows, _, cast = placed(resolved, as_rows(x, "x", missing=require_missing(missing)), None, device)
            if missing is not None:
                resolved = marginalizing(resolved, rows)
            steps = _steps(resolved, rows, hard)
            climbs: list[_Climb] = []
            for number in range(n_init):
                climbs.append(_climb(steps, init, seed + number, max_iter, tol, len(rows)))
                if climbs[-1].stopped.startswith("interrupted"):
                    break
            best = max(climbs, key=lambda climb: climb.objective)
            steps.apply(best.parameters)
            bound, structure = _bound(resolved, rows)
    except BaseException:
        untouched.restore()
        raise
    elbo = mean_elbo(bound, structure, rows, None, seed).elbo if hard else best.objective / len(rows)
    for doubt in _doubts(best, bound):
        warnings.warn(doubt, ProgramWarning, stacklevel=2)
    info = {
        "program": resolved.name,
        "guide": "map" if resolved.guide is None else "given",
        "estimator": "K-means" if hard else "EM",
        "estimator_reason": "lvm.em",
        "seed": seed,
        "n": len(rows),
        "n_init": n_init,
        "steps": len(best.after_e),
        "seconds": time.perf_counter() - started,
        "stopped": best.stopped,
        "elbo_se": 0.0,
        "missing": missing,
    } | surroundings(rows, cast)
    return Fit(
        program=program,
        params=bound.constrained(),
        history=_history(best, len(rows), hard),
        elbo=elbo,
        info=info,
        sites=site_table(structure),
        _bound=bound,
        _snapshot=bound.snapshot(),
    )


def _steps(program: Program, rows: Rows, hard: bool) -> ExpectationMaximisation:
    offered = program.hook("expectation_maximisation")
    if offered is None:
        raise ProgramError(
            f"{program.name} has no closed-form steps: lvm.em is for GaussianMixture, PPCA, FactorAnalysis and "
            "programs with a method expectation_maximisation(data, *, hard). Use lvm.fit"
        )
    require_one_array(rows, "EM takes one, of shape (n, D)")
    steps: ExpectationMaximisation = offered(Blocks(rows), hard=hard)
    return steps


def _climb(steps: ExpectationMaximisation, init: Any, seed: int, max_iter: int, tol: float, n: int) -> _Climb:
    """Climb from one start until an iteration gains less than ``tol`` nats per datum, or Ctrl-C is pressed."""
    parameters = steps.start(init, seed)
    found = steps.expectation(parameters)
    climb = _Climb(parameters, found.objective)
    try:
        for iteration in range(1, max_iter + 1):
            before = found.objective
            parameters, gain = steps.maximisation(climb.parameters, found.statistics)
            found = steps.expectation(parameters)
            _refuse_fall(before, gain, found.objective, n, iteration)
            climb.parameters, climb.objective = parameters, found.objective
            climb.after_m.append(before + gain)
            climb.after_e.append(found.objective)
            if found.objective - before <= tol * n:
                climb.stopped = f"converged after {iteration} iterations"
                return climb
    except KeyboardInterrupt:
        climb.stopped = f"interrupted after {len(climb.after_e)} iterations"
        return climb
    climb.stopped = f"max_iter={max_iter} reached"
    return climb


def _refuse_fall(before: float, gain: float, after: float, n: int, iteration: int) -> None:
    slack = ROUNDING * (n + abs(before))
    # the negated comparisons also catch NaN
    if not gain >= -slack or not after >= before + gain - slack:
        step = "M-step" if not gain >= -slack else "E-step"
        raise ProgramError(
            f"iteration {iteration}: the {step} lowered the bound, from {before:.10g} by {gain:.3g} to {after:.10g} "
            "nats: the program's expectation_maximisation is not what it says, or x holds values too far apart for "
            "double precision (subtract their mean)"
        )


def _bound(program: Program, rows: Rows) -> tuple[BoundProgram, Structure]:
    """The program with its parameters; with a prior, a guide that puts all its weight on them."""
    first = rows.first(256)
    if program.guide is not None:
        bound = BoundProgram(program, None, rows.dtype, rows.device)
        return bound, traced(bound.model, bound.guide, first)
    alone = BoundProgram(program.with_guide(lambda *args, **kwargs: None), None, rows.dtype, rows.device)
    structure = traced(alone.model, None, first)
    start = program.hook("initial_values")

    def point(model: Callable[..., Any]) -> Callable[..., Any]:
        values = None if start is None else start()
        return make_guide(model, structure, "map", names_index=False, minibatches=False, start=values)

    bound = BoundProgram(program, point, rows.dtype, rows.device)
    return bound, traced(bound.model, bound.guide, first)


def _history(climb: _Climb, n: int, hard: bool) -> dict[str, Any]:
    empty: dict[str, Any] = {"reconstruction": {}, "kl": {}}
    loss = [-objective for objective in climb.after_e]
    if hard:
        return {"loss": loss, **empty}
    after_e = [objective / n for objective in climb.after_e]
    after_m = [objective / n for objective in climb.after_m]
    closed = [one - other for one, other in zip(after_e, after_m, strict=True)]
    return {"loss": loss, "elbo": after_e, "elbo_after_m_step": after_m, "kl_closed": closed, **empty}


def _doubts(climb: _Climb, bound: BoundProgram) -> Iterator[str]:
    if climb.stopped.startswith("max_iter"):
        last = climb.after_e[-1] - (climb.after_e[-2] if len(climb.after_e) > 1 else climb.after_m[-1])
        yield f"EM stopped with {climb.stopped}; its last iteration still gained {last:.3g} nats: raise max_iter"
    weights = bound.constrained().get("weights")
    empty = [] if weights is None else (weights < 1e-12).nonzero().flatten().tolist()
    if empty:
        yield f"component {empty} ended without rows: ask for fewer components, another seed, or n_init=10"
