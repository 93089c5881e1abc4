"""The record that a fit leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
from pyro_lvm.criticism.predictive import draw_imputations, draw_posterior, log_predictive, mean_responsibilities
from pyro_lvm.criticism.weights import point_estimates
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.inference.export import GROUPS, Export, at_least_one, export, refuse_unknown
from pyro_lvm.inference.saving import write_fit
from pyro_lvm.inference.sites import SiteTable
from pyro_lvm.parameters import BoundProgram, Snapshot
from pyro_lvm.posterior import Posterior
from pyro_lvm.structure import Structure
from pyro_lvm.to_arviz import loo
from pyro_lvm.walk import seeds_of_parts, walked

__all__ = ["Fit"]

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
            its standard error is ``info["elbo_se"]``; NaN, with a warning, where it could not be evaluated.
        info: how it was made: seed, versions, estimator and why, optimiser, n, steps, seconds, outcome. With the same
            data ``fit(program, data, **info["arguments"])`` makes the run again, once what ``info["objects"]`` names is
            handed over too.
        sites: under "model" and "guide" a list of their sample sites: ``name``, ``kind`` (observed, latent,
            auxiliary), ``distribution``, ``plates`` with their sizes, ``event_shape``, ``enumerated``; empty where an
            old file does not say.

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
    sites: SiteTable
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
            return draw_posterior(evaluation, at_least_one(num_draws, "num_draws"))[0]

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
        num_samples = at_least_one(num_samples, "num_samples")
        evaluation = Evaluation.of(self, x)
        with evaluation.running(seed):
            if evaluation.structure.global_latent:
                return log_predictive(evaluation, num_samples)
            return estimate_evidence(evaluation, num_samples, "auto", 512).log_evidence

    def impute(self, x: Any, num_draws: int = 100, seed: int | None = None) -> Tensor:
        r"""Draws of what is missing in x given the rest, :math:`x_m^{(s)} \sim \int p(x_m \mid x_o, z)\, q(z)\,dz`.

        Programs with an exact conditional (``impute`` of `GaussianMixture`, `PPCA`, `FactorAnalysis`, where the
        parameters have no posterior) draw from that; others draw latents from the guide, then the missing values.

        Args:
            x: data as for `fit`, NaN where a value is missing.
            num_draws: how many.
            seed: of the draws; None for fresh ones.

        Returns:
            Shape (num_draws, \*shape of x); what is not missing is as in x. The mean over draws is the imputation
            with the least squared error.

        Raises:
            ProgramError: unless the fit was made with ``missing="marginalize"`` and one observed site has NaN.
            NotEnoughMemoryError: if the draws would not fit in memory; nothing has been drawn then.
        """
        at_least_one(num_draws, "num_draws")
        if self._bound.program.missing is None:
            raise ProgramError("this fit knows nothing of missing values: fit again with missing='marginalize'")
        evaluation = Evaluation.of(self, x)
        with evaluation.running(seed):
            exact = self._bound.program.hook("impute")
            if exact is not None and not evaluation.structure.global_latent:
                seeds = seeds_of_parts(seed)

                def drawn(batch: Batch) -> Tensor:
                    found: Tensor = exact(*batch.args, **batch.kwargs, num_draws=num_draws, seed=next(seeds))
                    return found

                imputed: Tensor = walked(evaluation.rows, drawn, "imputations", dim=1, num_draws=num_draws)
                return imputed
            return draw_imputations(evaluation, num_draws)

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
        num_samples = at_least_one(num_samples, "num_samples")
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
        refuse_unknown(groups)
        at_least_one(num_draws, "num_draws")
        at_least_one(num_samples, "num_samples")
        evaluation = Evaluation.of(self, x)
        return export(Export(evaluation, groups, num_draws, num_samples, seed, max_bytes, self._attributes))

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to a folder that `pyro_lvm.load` reads.

        ``config.json`` says what it is and names the file of tensors beside it; there is no pickle. Digests notice
        accidents, not forgery.

        Args:
            path: the folder; new, empty, or with a saved fit, whose place this one takes in one moment: whenever this
                process dies, who reads finds the old one or this one, whole.

        Raises:
            StorageError: if the folder holds something else, the system refuses, or the guide cannot be made again
                from a file: one made from an autoguide class of your own, or a conjugate one of a program without a
                method ``conjugate_guide()``.
        """
        write_fit(self, path)

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
