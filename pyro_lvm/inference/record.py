"""The record that a fit leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
from pyro_lvm.criticism.predictive import (
    data_sites,
    draw_posterior,
    draw_prior,
    log_likelihood,
    log_predictive,
    mean_responsibilities,
    site_dims,
    site_shape,
)
from pyro_lvm.criticism.weights import point_estimates
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.parameters import BoundProgram, Snapshot
from pyro_lvm.posterior import Posterior
from pyro_lvm.structure import Site, Structure
from pyro_lvm.to_arviz import Groups, loo, to_arviz

__all__ = ["Fit"]

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
)

NO_LOO = (
    "the parameters are point estimates: there is no posterior over parameters, and leave-one-out "
    "cross-validation means nothing for one value of log p(x) per datum"
)


@dataclass(frozen=True, repr=False, eq=False)
class Fit:
    r"""What a fit found and how; frozen, and safe from whatever happens to the program's modules later.

    Every method evaluates with the parameters that this fit ended with.

    Attributes:
        program: what was handed to `fit`; its modules are live and hold the latest training.
        params: parameters by name, in their natural, constrained form; clones.
        history: lists with an entry per epoch: ``loss`` (nats of the whole data set), ``elbo`` and, if there was
            validation, ``validation_elbo`` (nats per datum), and by site ``reconstruction`` and ``kl`` (nats per
            datum; ``elbo`` is the sum of the first minus the sum of the second).
        elbo: the plain evidence lower bound at the end, nats per datum of the whole data set, whatever was optimised;
            its standard error is ``info["elbo_se"]``.
        info: how it was made: seed, versions, estimator and why, optimiser, n, steps, seconds, outcome.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, steps=20, seed=0)
        >>> fit.info["estimator"], fit.info["n"]
        ('TraceMeanField_ELBO()', 100)
        >>> fit.posterior(x, num_draws=5, seed=0)["z"].shape
        torch.Size([5, 100, 1])
    """

    program: Any
    params: Mapping[str, Tensor]
    history: Mapping[str, Any]
    elbo: float
    info: Mapping[str, Any]
    _bound: BoundProgram = field(compare=False)
    _snapshot: Snapshot = field(compare=False)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Fit of {info['program']} to {info['n']} data by {info['estimator']}: "
            f"ELBO {self.elbo:.4f} nats/datum after {info['steps']} steps ({info['stopped']})"
        )

    def posterior(self, x: Any, num_draws: int = 1000, seed: int | None = None) -> Posterior:
        """Draws of every latent site given the data ``x``.

        Args:
            x: data as for `fit`; they need not be those of the fit unless the guide has parameters for each datum.
            num_draws: how many.
            seed: of the draws; None for fresh ones.

        Returns:
            A `Posterior`; draws have shape (num_draws, *plates, *event).

        Raises:
            ValueError: if ``num_draws < 1``.
        """
        evaluation = Evaluation.of(self, x)
        with evaluation.running(seed):
            return draw_posterior(evaluation, _at_least_one(num_draws, "num_draws"))[0]

    def log_prob(self, x: Any, num_samples: int = 1000, seed: int | None = None) -> Tensor:
        r"""Log p(x_i), averaged over the posterior of the parameters where there is one; shape (n,), nats per datum.

        .. math:: \log p(x_i) \approx \log \frac1S \sum_s p(x_i \mid \theta^{(s)}), \quad \theta^{(s)} \sim q(\theta)

        Without a posterior over parameters this is `pyro_lvm.log_evidence`.

        Args:
            x: data as for `fit`.
            num_samples: S, draws.
            seed: of the draws; None for fresh ones.

        Raises:
            ValueError: if ``num_samples < 1``.
        """
        num_samples = _at_least_one(num_samples, "num_samples")
        evaluation = Evaluation.of(self, x)
        with evaluation.running(seed):
            if evaluation.structure.global_latent:
                return log_predictive(evaluation, num_samples)
            return estimate_evidence(evaluation, num_samples, "auto", 512).log_evidence

    def responsibilities(self, x: Any, num_samples: int = 1000, seed: int | None = None) -> Tensor:
        """p(component | x_i), averaged over the posterior of the parameters where there is one; shape (n, K), float64.

        Given the parameters it is Bayes' rule, also where the guide has a label of its own (mean field).

        Args:
            x: data as for `fit`.
            num_samples: draws of the other latents; without any there is nothing to draw.
            seed: of the draws; None for fresh ones.

        Raises:
            ProgramError: unless the program enumerates exactly one site, in its model or, if nothing else is latent
                for each datum, in its guide.
            ValueError: if ``num_samples < 1``.
        """
        num_samples = _at_least_one(num_samples, "num_samples")
        evaluation = Evaluation.of(self, x)
        structure = evaluation.structure
        sites = [site.name for site in structure.enumerated_in_model]
        if not sites and len(structure.local_latent) == 1:
            sites = [site.name for site in structure.enumerated_in_guide]
        if len(sites) != 1:
            raise ProgramError(
                f"responsibilities are of one enumerated site, and this program enumerates {sites or 'none'}: draw "
                "fit.posterior(x) and count"
            )
        others = [site for site in structure.latent if site.name not in sites]
        with evaluation.running(seed):
            return mean_responsibilities(evaluation, num_samples if others else 1)[sites[0]]

    def to_arviz(
        self,
        x: Any,
        num_draws: int = 1000,
        groups: Sequence[str] = GROUPS,
        *,
        num_samples: int = 100,
        seed: int | None = None,
        max_bytes: int = 2**31,
    ) -> Any:
        """The posterior and its predictives as ArviZ data.

        Variables have dims (chain=1, draw, *plates, *event dims) with the names that the program gave them.
        ``sample_stats`` holds ``lp`` = log p(x, draw) and ``lq`` = the log density the draw was made with, nats of
        ``x`` together. ``log_likelihood`` is pointwise, with the latents of each datum summed or averaged out; where
        the parameters are point estimates it has one draw, and the attribute ``loo`` says why LOO is refused.

        Args:
            x: data as for `fit`.
            num_draws: draws in every group.
            groups: which groups to make.
            num_samples: draws of the latents of a datum for each value of ``log_likelihood``, where they are not
                summed out exactly.
            seed: of all draws; None for fresh ones.
            max_bytes: refuse an export that would be larger.

        Returns:
            `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x).

        Raises:
            ValueError: if a group is not known, a number of draws is below 1, or the export would be larger than
                ``max_bytes``.
        """
        unknown = [group for group in groups if group not in GROUPS]
        if unknown:
            raise ValueError(f"groups {unknown} are not known: choose from {list(GROUPS)}")
        _at_least_one(num_draws, "num_draws")
        _at_least_one(num_samples, "num_samples")
        evaluation = Evaluation.of(self, x)
        values: dict[str, Mapping[str, Tensor]] = {}
        with evaluation.running(0):
            _, structure = evaluation.whole()
        _refuse_large(structure, len(evaluation.rows), num_draws, groups, max_bytes)
        with evaluation.running(seed):
            if {"posterior", "posterior_predictive", "sample_stats"} & set(groups):
                posterior, predicted = draw_posterior(evaluation, num_draws, "posterior_predictive" in groups)
                values["posterior"] = posterior.draws
                values["posterior_predictive"] = predicted
                values["sample_stats"] = {"lp": posterior.log_p, "lq": posterior.log_q}
            if {"prior", "prior_predictive"} & set(groups):
                values["prior"], values["prior_predictive"] = draw_prior(evaluation, num_draws)
            if "log_likelihood" in groups and structure.data_plate is not None:
                name = "+".join(site.name for site in data_sites(structure))
                values["log_likelihood"] = {name: log_likelihood(evaluation, num_draws, num_samples)}
        values["observed_data"] = {site.name: site.value for site in data_sites(structure)}
        kept = {group: values[group] for group in groups if values.get(group)}
        dims = {site.name: site_dims(site) for site in structure.model.values()}
        named = {group: {name: dims.get(name, ()) for name in variables} for group, variables in kept.items()}
        if "log_likelihood" in named:
            named["log_likelihood"] = dict.fromkeys(named["log_likelihood"], (str(structure.data_plate),))
        return to_arviz(Groups(kept, named, self._attributes(structure)))

    def loo(self, x: Any, num_draws: int = 1000, *, seed: int | None = None, **options: Any) -> Any:
        """ArviZ's PSIS leave-one-out cross-validation of the posterior over parameters.

        Args:
            x: the data that were fitted.
            num_draws: draws of the parameters.
            seed: of the draws.
            **options: handed to ``arviz.loo``.

        Returns:
            What ``arviz.loo`` returns; its expected log predictive density is in nats of the data set.

        Raises:
            ProgramError: if there is no posterior over parameters: LOO then means nothing.
        """
        if not _has_parameter_posterior(Evaluation.of(self, x).structure):
            raise ProgramError(f"{NO_LOO}. Give the parameters priors, or compare log_evidence on held-out data")
        return loo(self.to_arviz(x, num_draws, ("posterior", "log_likelihood"), seed=seed), **options)

    def _attributes(self, structure: Structure) -> dict[str, str | float]:
        given = _has_parameter_posterior(structure)
        return {
            "inference_library": "pyro_lvm",
            "inference": "variational",
            "program": self.info["program"],
            "estimator": self.info["estimator"],
            "elbo_nats_per_datum": self.elbo,
            "loo": "pointwise log-likelihood over posterior draws" if given else f"refused: {NO_LOO}",
        }


def _has_parameter_posterior(structure: Structure) -> bool:
    """Whether all data share latents over which the guide spreads: a point (MAP) is no posterior."""
    points = point_estimates(structure)
    return any(site.name not in points for site in structure.global_latent)


def _at_least_one(count: int, argument: str) -> int:
    if count < 1:
        raise ValueError(f"{argument} is {count}: ask for at least 1")
    return count


def _refuse_large(structure: Structure, rows: int, num_draws: int, groups: Sequence[str], max_bytes: int) -> None:
    def size(sites: Iterable[Site]) -> int:
        return num_draws * sum(math.prod(site_shape(site)) * site.value.element_size() for site in sites)

    sizes = {
        "posterior": size(structure.latent),
        "prior": size(structure.latent),
        "posterior_predictive": size(data_sites(structure)),
        "prior_predictive": size(data_sites(structure)),
        "log_likelihood": rows * 8 * (num_draws if structure.global_latent else 1),
    }
    wanted = {group: sizes.get(group, 0) for group in groups}
    total = sum(wanted.values())
    if total > max_bytes:
        largest = max(wanted, key=lambda group: wanted[group])
        raise ValueError(
            f"the export would take {total / 1e9:.3g} GB ({num_draws} draws of {rows} rows; {largest} alone "
            f"{wanted[largest] / 1e9:.3g} GB), more than max_bytes={max_bytes / 1e9:.3g} GB: pass fewer rows, "
            f"num_draws={max(1, int(num_draws * max_bytes / total))}, groups=... without {largest!r}, or a larger "
            "max_bytes"
        )
