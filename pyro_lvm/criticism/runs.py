r"""Independent fits of one program, side by side: do they say the same?

.. math:: \hat R^2 = \frac{\text{variance of all runs' draws together}}{\text{variance within a run}}, \qquad
          R_r = \arg\min_{R^\top R = I} \lVert W_r R - W_1 \rVert_F

Components are renumbered, and rotations of linear factors undone (orthogonal Procrustes, Schönemann, 1966,
https://doi.org/10.1007/BF02289451), before runs are compared: neither changes the density of the data.

Source for R-hat: Vehtari, Gelman, Simpson, Carpenter and Bürkner, 2021, https://arxiv.org/abs/1903.08008; draws of a
run are independent here, and a run takes the place of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.criticism.findings import Finding, judged
from pyro_lvm.criticism.predictive import draw_posterior
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation, fresh_seed
from pyro_lvm.label_switching import align_components
from pyro_lvm.to_arviz import convergence

__all__ = ["aligned_runs", "diagnose_runs", "rotation_to"]

CLOSE, APART = 1.01, 1.1
"""R-hat: means of two runs that differ by a seventh, or by half, of the posterior's standard deviation."""


def rotation_to(loadings: Tensor, reference: Tensor) -> Tensor:
    """The orthogonal matrix R, shape (L, L), that brings ``loadings @ R`` closest to ``reference``, both (D, L).

    Example:
        >>> import torch
        >>> turned = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> rotation_to(turned, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    from scipy.linalg import orthogonal_procrustes

    turned, target = (matrix.detach().double().cpu().numpy() for matrix in (loadings, reference))
    found, _ = orthogonal_procrustes(turned, target)
    return torch.from_numpy(found).to(loadings)


def diagnose_runs(
    fits: Sequence[Any], x: Any, *, num_draws: int = 1000, max_rows: int = 200, seed: int | None = None
) -> Finding:
    r"""R-hat of every latent site over independent fits, after their components and rotations are aligned.

    .. math:: \hat R \approx \sqrt{1 + \delta^2}

    where the runs' means lie :math:`\delta` posterior standard deviations around their common mean.

    Knows ``locs`` (a mixture's sites or parameters) to number components by, and ``loadings`` (sites or parameters,
    (D, L)) to turn the latent ``z`` by. Other symmetries of a program it does not know of, and they count as
    disagreement: a decoder that is a network knows no rotation that could be undone. ``relevance``, of axes that a turn
    does not keep, is left out.

    Args:
        fits: at least two of the same program from different seeds.
        x: data as for `fit`.
        num_draws: of each run.
        max_rows: latents of so many data are compared, the first ones.
        seed: of the draws; None for fresh ones.

    Returns:
        A `Finding` named "runs" with the numbers ``r_hat`` (the largest of all sites and entries), ``r_hat_unaligned``
        (without alignment), ``elbo_spread`` (nats per datum between the best run and the worst), and the array
        ``elbo`` (runs,). A number ``r_hat of <site>`` stands for each site.

    Raises:
        ValueError: if there are fewer than two fits.
        ProgramError: if they have no latent site in common.

    When it is wrong: runs that agree may all be wrong in the same way; mean field leaves out the same correlations
    every time. Point estimates have no spread of their own: only latents that are drawn are compared.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> fits = [lvm.em(lvm.PPCA(3, 1), x, seed=seed) for seed in (0, 1)]
        >>> round(lvm.diagnose_runs(fits, x, seed=0)["r_hat"], 1)
        1.0
    """
    if len(fits) < 2:
        raise ValueError(f"{len(fits)} fit has nothing to be compared with: pass at least two, from different seeds")
    seed = fresh_seed() if seed is None else seed
    draws, parameters = [], []
    for number, fit in enumerate(fits):
        evaluation = Evaluation.of(fit, x)
        with evaluation.running(seed + number):
            batch = evaluation.rows.size
            posterior, _ = draw_posterior(evaluation, num_draws)
        local = {site.name for site in evaluation.structure.local_latent}
        draws.append({name: _few_rows(value, batch, max_rows, name in local) for name, value in posterior.items()})
        parameters.append(getattr(fit, "params", {}))
    names = [name for name in draws[0] if all(name in run and run[name].shape == draws[0][name].shape for run in draws)]
    if not names:
        raise ProgramError("the fits have no latent site in common: pass fits of one program")
    before = {name: torch.stack([run[name] for run in draws]) for name in names}
    after = aligned_runs(before, parameters)
    known = {name: _r_hat(after[name]) for name in names if name in after}
    unaligned = [_r_hat(before[name]) for name in known]
    r_hat = max(known.values(), default=1.0)
    elbos = torch.tensor([float(getattr(fit, "elbo", torch.nan)) for fit in fits], dtype=torch.float64)
    verdict = judged(r_hat, CLOSE, APART)
    worst = max(known, key=lambda name: known[name], default="nothing")
    advice = {
        "fine": "independent runs say the same",
        "look": f"runs differ a little, most in {worst!r}: train longer, or with a rate that falls to nought",
        "wrong": f"runs found different posteriors, most in {worst!r}: take the run with the best bound, try more "
        "steps or a better start, and report none of them as the answer",
    }[verdict]
    numbers = {"r_hat": r_hat, "r_hat_unaligned": max(unaligned, default=1.0)}
    if bool(elbos.isfinite().all()):  # programs that were not fitted here have none
        numbers["elbo_spread"] = (elbos.max() - elbos.min()).item()
    numbers |= {"runs": float(len(fits)), **{f"r_hat of {name}": value for name, value in known.items()}}
    return Finding("runs", verdict, numbers, advice, {"elbo": elbos, **{f"draws of {n}": after[n] for n in after}})


def _r_hat(draws: Tensor) -> float:
    """The largest R-hat of the entries of (runs, draws, ...); infinite where runs stand still in different places."""
    entries = draws.double().flatten(2) if draws.dim() > 2 else draws.double()[..., None]
    still = (entries == entries[:, :1]).all(1).all(0)
    if bool((still & (entries[:, 0] != entries[:1, 0]).any(0)).any()):
        return math.inf
    if bool(still.all()):
        return 1.0
    return convergence({"entries": entries})["entries"][0]


def _few_rows(value: Tensor, rows: int, max_rows: int, local: bool) -> Tensor:
    """Draws of the first rows of a site of each datum; shape (draws, ..., rows, ...)."""
    if not local or rows <= max_rows:
        return value
    dim = next(dim for dim in range(1, value.dim()) if value.shape[dim] == rows)
    return value.narrow(dim, 0, max_rows)


def aligned_runs(draws: Mapping[str, Tensor], parameters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Draws (runs, draws, ...) by site, with components numbered and factors turned as in the first run."""
    found = dict(draws)
    locs = found.get("locs")
    if locs is None and all("locs" in run for run in parameters):
        common = torch.stack([run["locs"].cpu() for run in parameters])
        locs = common[:, None].expand(-1, next(iter(found.values())).shape[1], -1, -1)
    if locs is not None and locs.dim() == 4:
        reference = locs[0].mean(0) if "locs" not in found else _first_run(locs)
        found = align_components({**found, "locs": locs}, reference)[0]
        found = {name: value for name, value in found.items() if name in draws}
    if "loadings" in found and found["loadings"].dim() == 4 and "z" in found:
        means = found["loadings"].mean(1)
        turn = torch.stack([rotation_to(run, means[0]) for run in means])[:, None]
        found["loadings"], found["z"] = found["loadings"] @ turn, found["z"] @ turn
        found.pop("relevance", None)  # of axes that are no longer its own
    elif "z" in found and all("loadings" in run for run in parameters):
        reference = parameters[0]["loadings"].cpu()
        turn = torch.stack([rotation_to(run["loadings"].cpu(), reference) for run in parameters])
        found["z"] = found["z"] @ turn[:, None].to(found["z"])
    return found


def _first_run(locs: Tensor) -> Tensor:
    """The mean of the first run's locations, once its own draws are numbered alike; shape (K, D)."""
    return align_components({"locs": locs[0]})[0]["locs"].mean(0)
