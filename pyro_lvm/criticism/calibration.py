r"""Simulation-based calibration: does the guide say what is true of data whose latents are known?

.. math:: z^*, x^* \sim p(z)\, p(x \mid z), \qquad z_1, \ldots, z_S \sim q(z \mid x^*), \qquad
          r = \#\{s : z_s < z^*\} \sim \text{uniform on } 0, \ldots, S \quad \text{if } q(z \mid x) = p(z \mid x)

Source: Talts, Betancourt, Simpson, Vehtari and Gelman, 2018, https://arxiv.org/abs/1804.06788.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lvm.criticism.findings import Finding, Verdict
from pyro_lvm.criticism.judged_rows import judged_rows
from pyro_lvm.criticism.predictive import data_sites, draw_posterior
from pyro_lvm.data import Batch, Rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation, fresh_seed
from pyro_lvm.structure import Site

__all__ = ["calibrate_amortised", "calibration", "needs_refits", "rank_finding", "ranks_of"]

SURE = 0.01
"""A p-value below it, times the number of entries that were looked at, is no accident."""

HARMLESS = 0.05
"""Coverage that is off by less is worth a look and no alarm."""

Refit = Callable[[Any], Any]


def calibration(
    program: Any,
    x: Any,
    *,
    refit: Refit | None = None,
    num_simulations: int | None = None,
    num_draws: int = 99,
    seed: int | None = None,
) -> Finding:
    r"""Rank what is true among draws of the guide, for data simulated from the program itself.

    .. math:: r = \#\{s : z_s < z^*\}, \qquad z_s \sim q(z \mid x^*), \quad (z^*, x^*) \sim p(z, x)

    An amortised guide is asked about simulated data as it is. A guide whose parameters belong to the data (an
    autoguide, latents that all data share) has to be fitted to each simulated data set by ``refit``; then the latents
    that all data share are ranked, or those of each datum where there are none.

    Args:
        program: a `Fit`, or anything that `fit` takes with a guide; its present parameters are the truth.
        x: data as for `fit`: only their number and shape count, and what no site observes (covariates).
        refit: ``refit(simulated)`` returns a `Fit` to data like ``x``; None for an amortised guide.
        num_simulations: simulated rows (at least; default 1000), or with ``refit`` data sets (default 20).
        num_draws: S, draws that the truth is ranked among; 99 give percentages.
        seed: of everything that is drawn; None for fresh ones.

    Returns:
        A `Finding` with the numbers ``p_value`` (of a chi-square test of uniform ranks, the smallest of all entries
        times their number), ``coverage_50`` and ``coverage_90`` (of central intervals, over all entries), and the
        arrays ``ranks`` (simulations, entries) and ``p_values`` (entries,).

    Raises:
        ProgramError: if the guide's parameters belong to the data and ``refit`` is None, if an observed site's values
            are not an argument of the program, or if the program's model cannot be simulated.
        ValueError: if ``num_draws < 19`` or ``num_simulations < 20``.

    When it is wrong: uniform ranks do not prove that the posterior is right: a guide that returns the prior passes for
    programs with a fixed prior. It judges the guide under data of the program's own making; real data it may never see.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> lvm.calibration(lvm.PPCA.closed_form(x, latent_dim=1), x, seed=0).verdict
        'fine'
    """
    fewest = 20
    if num_draws < 19:
        raise ValueError(f"num_draws is {num_draws}: ranks among fewer than 19 draws tell too little")
    if num_simulations is not None and num_simulations < fewest:
        raise ValueError(f"num_simulations is {num_simulations}: a test of uniform ranks needs at least {fewest}")
    evaluation = Evaluation.of(program, x)
    seed = fresh_seed() if seed is None else seed
    why = needs_refits(evaluation)
    if refit is None and why:
        raise ProgramError(
            f"{why}: pass refit=lambda simulated: lvm.fit(<a new program>, simulated, ...) to fit each of them"
        )
    if refit is None:
        return calibrate_amortised(evaluation, num_simulations or 1000, num_draws, seed)
    return _calibrate_by_refits(evaluation, refit, num_simulations or fewest, num_draws, seed)


def needs_refits(evaluation: Evaluation) -> str | None:
    """Why the guide cannot be asked about other data than those of its fit, or None."""
    structure, program = evaluation.structure, evaluation.bound.program
    if structure.global_latent:
        names = ", ".join(site.name for site in structure.global_latent)
        return f"all data share {names}, and the guide of what they share belongs to one data set"
    if isinstance(program.guide, AutoGuide) and any(s.name in structure.guide for s in structure.local_latent):
        return "the autoguide has parameters of its own for each datum"
    clamped = [site.name for site in structure.guide.values() if _is_clamped(site)]
    if clamped:
        return f"the guide clamps {', '.join(clamped)} where the data say what it is, which simulated data would not do"
    if "index" in program.keywords["guide"]:
        return "the guide asks for row numbers, and so has parameters of its own for each datum"
    return None


def _is_clamped(site: Site) -> bool:
    """Whether the guide leaves a discrete site no choice in some rows."""
    logits = getattr(site.base, "logits", None) if site.discrete else None
    return logits is not None and bool(logits.isneginf().any())


def calibrate_amortised(evaluation: Evaluation, num_simulations: int, num_draws: int, seed: int) -> Finding:
    """Simulate rows, at least ``num_simulations``, and ask the guide about them."""
    found = []
    with evaluation.running(seed):
        whole = judged_rows(evaluation, num_simulations, seed).whole
        names = [site.name for site in evaluation.structure.local_latent]
        for _ in range(math.ceil(num_simulations / len(whole))):
            truth, data = _simulate(evaluation, whole)
            simulated = replace(evaluation, rows=data)
            posterior, _ = draw_posterior(simulated, num_draws)
            found.append(torch.cat([ranks_of(truth[name], posterior[name], len(whole), seed) for name in names], dim=1))
    return rank_finding(torch.cat(found), num_draws)


def _calibrate_by_refits(
    evaluation: Evaluation, refit: Refit, num_simulations: int, num_draws: int, seed: int
) -> Finding:
    structure = evaluation.structure
    ranked = structure.global_latent or structure.local_latent
    found = []
    for number in range(num_simulations):
        with evaluation.running(seed + number):
            truth, data = _simulate(evaluation, evaluation.rows.whole())
        fitted = Evaluation.of(refit(_as_passed(data)), _as_passed(data))
        with fitted.running(seed + number):
            posterior, _ = draw_posterior(fitted, num_draws)
        rows = 1 if structure.global_latent else data.size
        found.append(
            torch.cat([ranks_of(truth[s.name], posterior[s.name], rows, seed + number) for s in ranked], dim=1)
        )
    return rank_finding(torch.cat(found), num_draws)


@torch.no_grad()
def _simulate(evaluation: Evaluation, batch: Batch) -> tuple[dict[str, Tensor], Rows]:
    """Latents from the prior by name, and data drawn given them."""
    model = evaluation.bound.model
    if evaluation.bound.program.missing is not None:
        raise ProgramError("data with missing values cannot be simulated: what is missing has no model")
    with poutine.block():
        seen: Any = poutine.trace(model).get_trace(*batch.args, **batch.named())
        drawn: Any = poutine.trace(poutine.uncondition(model)).get_trace(*batch.args, **batch.named())
    args, kwargs = list(batch.args), dict(batch.kwargs)
    for site in data_sites(evaluation.structure):
        value = seen.nodes[site.name]["value"]
        fresh = drawn.nodes[site.name]["value"]
        places = [i for i, arg in enumerate(args) if _same(batch.args[i], value)]
        named = [name for name, arg in kwargs.items() if _same(batch.kwargs[name], value)]
        if not places and not named:
            raise ProgramError(
                f"{site} observes something that is none of the program's arguments, so that simulated data cannot be "
                "handed to the guide: observe an argument as it is (obs=x)"
            )
        for i in places:
            args[i] = fresh.to(args[i].dtype)
        for name in named:
            kwargs[name] = fresh.to(kwargs[name].dtype)
    latent = [site.name for site in evaluation.structure.latent]
    truth = {name: drawn.nodes[name]["value"].detach().cpu() for name in latent}
    rows = evaluation.rows
    return truth, Rows(tuple(args), kwargs, size=len(batch), dtype=rows.dtype, device=rows.device)


def _same(argument: Any, value: Tensor) -> bool:
    return argument is value or (
        isinstance(argument, Tensor) and argument.shape == value.shape and bool((argument == value).all())
    )


def _as_passed(data: Rows) -> Any:
    """Data as a user passes them."""
    if data.kwargs:
        return dict(data.kwargs)
    return data.args[0] if len(data.args) == 1 else data.args


def ranks_of(truth: Tensor, draws: Tensor, rows: int, seed: int) -> Tensor:
    """Ranks of the truth among draws (num_draws, ...), shape (rows, entries), int64; ties are broken by lot."""
    true = truth.reshape(1, rows, -1).double()
    among = draws.reshape(len(draws), rows, -1).double()
    below, equal = (among < true).sum(0), (among == true).sum(0)
    lot = torch.rand(below.shape, generator=torch.Generator().manual_seed(seed))
    return below + (lot * (equal + 1)).long()


def rank_finding(ranks: Tensor, num_draws: int) -> Finding:
    """Finding "calibration" from ranks (simulations, entries) between 0 and ``num_draws``."""
    from scipy.stats import chi2

    simulations, entries = ranks.shape
    position = (ranks.double() + 0.5) / (num_draws + 1)
    bins = next(b for b in (20, 10, 5, 4) if simulations >= 5 * b or b == 4)
    expected = _ranks_by_bin(num_draws, bins) * simulations
    counts = torch.stack([((position * bins).long() == b).sum(0) for b in range(bins)]).double()
    statistic = ((counts - expected[:, None]).square() / expected[:, None]).sum(0)
    p_values = torch.from_numpy(chi2.sf(statistic.numpy(), bins - 1)).reshape(entries)
    p = min(1.0, p_values.min().item() * entries)
    off, numbers = 0.0, {"p_value": p}
    direction = 0.0
    for level in (0.5, 0.9):
        inside = ((position - 0.5).abs() <= level / 2).double().mean(0)
        nominal = _nominal(num_draws, level)
        numbers[f"coverage_{100 * level:.0f}"] = inside.mean().item()
        worst = (inside - nominal)[int((inside - nominal).abs().argmax())].item()
        off, direction = max((off, direction), (abs(worst), worst))
    numbers |= {"simulations": float(simulations), "draws": float(num_draws)}
    verdict: Verdict = "fine" if p >= SURE else "look" if off < HARMLESS else "wrong"
    if verdict == "fine":
        advice = "on data of the program's own making the guide covers the truth as often as it claims"
    elif off < HARMLESS:
        advice = "the ranks are not uniform, though intervals cover almost as they should: look at the histogram of "
        advice += 'finding["ranks"] for a slope (bias) or a hump (spread)'
    else:
        kind = "narrow: it claims more than it knows" if direction < 0 else "wide: it knows more than it claims"
        advice = f"the guide is too {kind}; try a richer guide or train it longer, also on simulated data"
    return Finding("calibration", verdict, numbers, advice, {"ranks": ranks, "p_values": p_values})


def _ranks_by_bin(num_draws: int, bins: int) -> Tensor:
    """The share of the ranks 0..num_draws that falls into each bin."""
    position = (torch.arange(num_draws + 1).double() + 0.5) / (num_draws + 1)
    return torch.bincount((position * bins).long(), minlength=bins).double() / (num_draws + 1)


def _nominal(num_draws: int, level: float) -> float:
    """The share of the ranks inside a central interval."""
    position = (torch.arange(num_draws + 1).double() + 0.5) / (num_draws + 1)
    return ((position - 0.5).abs() <= level / 2).double().mean().item()
