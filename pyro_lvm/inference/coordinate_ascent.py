"""Coordinate ascent: each factor of q set to its best given the others, in turn, without a gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from pyro_lvm.data import Rows, as_rows
from pyro_lvm.errors import NonFiniteError, ProgramError
from pyro_lvm.evaluation import batch_to_trace, fresh_seed
from pyro_lvm.inference.iterations import check_iterations, surroundings
from pyro_lvm.inference.prepare import placed, resolve
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.sites import site_table
from pyro_lvm.parameters import BoundProgram, Untouched, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program
from pyro_lvm.structure import Structure

__all__ = ["CoordinateUpdates", "Parts", "coordinate_ascent"]

Parts = tuple[Mapping[str, float], Mapping[str, float]]
"""Of a bound, in nats of the data set: E_q[log p(x)] by observed site, and E_q[log q - log p] by latent site."""

ROUNDING = 1e-9
"""A bound may fall by this much, in parts of itself or of the number of rows, whichever is more."""


class CoordinateUpdates(Protocol):
    """What a program's ``coordinate_updates()`` returns; any object with these four methods will do.

    The data come as `Rows` in double precision: ``x.batches(2048)`` gives them in blocks, ``x.whole()`` at once. A
    state is whatever the program likes, as long as nobody changes it.
    """

    def start(self, x: Rows, seed: int, init: Any, fresh: bool) -> Any:
        """The first state: from ``init``, else from ``seed``, else (unless ``fresh``) from what the program has."""
        ...

    def update(self, state: Any, x: Rows) -> Any:
        """The state after every factor was set to its best in turn."""
        ...

    def bound(self, state: Any, x: Rows) -> Parts:
        """The full bound at a state, every constant kept, in its parts."""
        ...

    def guide(self, state: Any) -> Any:
        """A guide for the program's model that holds the state: a callable such as ``fit(guide=...)`` takes."""
        ...


@dataclass
class _Run:
    """One start and what came of it."""

    state: Any
    bound: float
    stopped: str = ""
    iterations: int = 0
    history: dict[str, Any] = field(default_factory=lambda: {"loss": [], "elbo": [], "reconstruction": {}, "kl": {}})


def coordinate_ascent(
    program: Any,
    x: Any,
    *,
    max_iter: int = 200,
    tol: float = 1e-6,
    n_init: int = 1,
    init: Any = None,
    seed: int | None = None,
) -> Fit:
    r"""Fit a conjugate program by mean-field coordinate ascent.

    .. math:: \log q_i^*(z_i) = E_{q_{-i}}[\log p(x, z)] + \text{const}, \qquad i = 1, 2, \ldots, 1, 2, \ldots

    Each factor of :math:`q(z) = \prod_i q_i(z_i)` is set to its best given the others, in closed form: there is no step
    size and no noise, and the bound never falls. Bishop (2006), Pattern Recognition and Machine Learning, section 10.1;
    Blei, Kucukelbir and McAuliffe (2017), https://doi.org/10.1080/01621459.2017.1285773.

    All is computed in double precision and in blocks of rows. A program takes part by a method ``coordinate_updates()``
    that returns an object with ``start``, ``update``, ``bound`` and ``guide``
    (:class:`~pyro_lvm.inference.coordinate_ascent.CoordinateUpdates`), as `GaussianMixture` with a prior and
    `BayesianPPCA` do.

    When it is wrong: it ends in the maximum at whose foot it started, as any ascent does (``n_init`` starts help), and
    mean field is too narrow where factors depend on each other. Slow where they depend strongly: a small gain may mean
    a long way yet to go.

    Args:
        program: a program with ``coordinate_updates``.
        x: a tensor, array or memmap with a datum in each row, or a `Dataset`.
        max_iter: rounds at most.
        tol: stop where a round gains less, nats per datum.
        n_init: starts; the one with the best bound is kept. With more than one, each is afresh, from a seed of its own.
        init: where to start, as the program understands it; None is the program's own start. For a mixture
            responsibilities (n, K) or means (K, D).
        seed: of the program's own start; None for a fresh one, recorded.

    Returns:
        A `Fit`, with the guide that the program gives: ``fit.elbo`` is the full bound, exact (nats per datum);
        ``fit.history`` has an entry for each round, in the same units as `fit`'s.

    Raises:
        ProgramError: if the program has no such updates, or its bound falls.
        ValueError: if the data do not fit the program or hold NaN, or an argument is out of range.
        TypeError: if the data are a `DataLoader`, whose rows come in an order of their own.
        NonFiniteError: if the bound became NaN or infinite.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.tensor([[-2.0], [-1.0], [-1.5], [1.0], [2.0], [1.5]], dtype=torch.float64)
        >>> prior = lvm.priors.weakly_informative(x, num_components=2)
        >>> fit = lvm.coordinate_ascent(lvm.GaussianMixture(2, 1, prior=prior), x, init=[[-1.0], [1.0]])
        >>> fit.params["guide.mean"].round(decimals=1)
        tensor([[-1.5000],
                [ 1.5000]], dtype=torch.float64)
    """
    started = time.perf_counter()
    check_iterations(max_iter, tol, n_init, init)
    resolved, _ = resolve(program, None)
    hook = resolved.hook("coordinate_updates")
    if hook is None:
        raise ProgramError(
            f"{resolved.name} has no updates in closed form: give it a method coordinate_updates() that returns an "
            "object with start, update, bound and guide, or fit it by gradients with lvm.fit"
        )
    rows = as_rows(x, "x")
    if rows.loader is not None:
        raise TypeError("x is a DataLoader, whose rows come in an order of their own: pass its dataset, or the arrays")
    rows.refuse_non_finite("x")
    seed = fresh_seed() if seed is None else seed
    untouched = Untouched(resolved.modules.values())
    try:
        with isolated(seed, validate=False):
            rows, _, cast = placed(resolved, rows, None, None)
            _see_that_data_fit(resolved, rows)
            best, bounds = _best_run(hook(), rows, max_iter, tol, n_init, init, seed)
            bound, structure = _bind(resolved, hook().guide(best.state), rows)
    except BaseException:
        untouched.restore()
        raise
    info = {
        "program": resolved.name,
        "guide": "conjugate",
        "estimator": "coordinate ascent",
        "estimator_reason": "asked for: every factor is known in closed form",
        "optimizer": None,
        "seed": seed,
        "n": len(rows),
        "batch_size": None,
        "n_init": n_init,
        "elbos": [value / len(rows) for value in bounds],
        "iterations": best.iterations,
        "epochs": best.iterations,
        "steps": best.iterations,
        "seconds": time.perf_counter() - started,
        "stopped": best.stopped,
        "elbo_se": 0.0,
    } | surroundings(rows, cast)
    return Fit(
        program=program,
        params=bound.constrained(),
        history=best.history,
        elbo=best.bound / len(rows),
        info=info,
        sites=site_table(structure),
        _bound=bound,
        _snapshot=bound.snapshot(),
    )


def _see_that_data_fit(program: Program, rows: Rows) -> None:
    """Run the model once on a few rows: it knows best what it refuses."""
    alone = program.with_guide(lambda *args, **kwargs: None)
    first = rows.first(batch_to_trace(alone, rows))
    alone.require_arguments(*first.data())
    traced(BoundProgram(alone, None, rows.dtype, rows.device).model, None, first)


def _best_run(
    updates: CoordinateUpdates, rows: Rows, max_iter: int, tol: float, n_init: int, init: Any, seed: int
) -> tuple[_Run, list[float]]:
    doubled = replace(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    seeds = [seed, *(int(s) for s in torch.randint(2**31, (n_init - 1,), generator=generator))]
    runs: list[_Run] = []
    for each in seeds:
        runs.append(_run(updates, doubled, updates.start(doubled, each, init, n_init > 1), max_iter, tol))
        if runs[-1].stopped.startswith("interrupted"):
            break
    bounds = [run.bound for run in runs]
    return runs[bounds.index(max(bounds))], bounds


def _run(updates: CoordinateUpdates, rows: Rows, state: Any, max_iter: int, tol: float) -> _Run:
    n = len(rows)
    run = _Run(state, _total(updates.bound(state, rows), 0))
    try:
        for iteration in range(1, max_iter + 1):
            state = updates.update(run.state, rows)
            parts = updates.bound(state, rows)
            bound = _total(parts, iteration)
            gain = bound - run.bound
            if gain < -ROUNDING * max(n, abs(run.bound)):
                raise ProgramError(
                    f"round {iteration}: the bound fell from {run.bound:.12g} to {bound:.12g} nats of the data set. "
                    "Updates that are each the best given the others cannot do that: compare update() and bound() with "
                    "the model, term by term"
                )
            run.state, run.bound, run.iterations = state, bound, iteration
            _note(run.history, parts, bound, n)
            if gain / n < tol:
                run.stopped = f"converged after {iteration} rounds"
                return run
    except KeyboardInterrupt:
        run.stopped = f"interrupted after {run.iterations} rounds"
        return run
    run.stopped = f"max_iter={max_iter} reached, gaining {gain / n:.3g} nats/datum in the last round"
    return run


def _total(parts: Parts, iteration: int) -> float:
    reconstruction, kl = parts
    wrong = [
        f"{group} of {site!r}"
        for group, values in (("reconstruction", reconstruction), ("kl", kl))
        for site, value in values.items()
        if not math.isfinite(value)
    ]
    if wrong:
        raise NonFiniteError(
            f"round {iteration}: {', '.join(wrong)} became NaN or infinite: scale the data, or widen the prior"
        )
    return math.fsum(reconstruction.values()) - math.fsum(kl.values())


def _note(history: dict[str, Any], parts: Parts, bound: float, n: int) -> None:
    history["loss"].append(-bound)
    history["elbo"].append(bound / n)
    for group, values in zip(("reconstruction", "kl"), parts, strict=True):
        for site, value in values.items():
            history[group].setdefault(site, []).append(value / n)


def _bind(program: Program, guide: Any, rows: Rows) -> tuple[BoundProgram, Structure]:
    """The program with its guide, both in the data's dtype, traced once."""
    paired = program.with_guide(guide)
    for module in paired.modules.values():
        module.to(device=rows.device, dtype=rows.dtype)
    bound = BoundProgram(paired, None, rows.dtype, rows.device)
    first = rows.first(batch_to_trace(paired, rows))
    return bound, traced(bound.model, bound.guide, first)
