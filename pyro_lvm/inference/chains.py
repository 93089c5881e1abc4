"""The record that chains leave."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.criticism.predictive import draw_posterior
from pyro_lvm.data import Rows, as_rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.guides import GivenDraws
from pyro_lvm.inference.export import GROUPS, Export, at_least_one, export, refuse_unknown
from pyro_lvm.inference.saving import write_chains
from pyro_lvm.inference.sites import SiteTable
from pyro_lvm.parameters import BoundProgram, Snapshot
from pyro_lvm.posterior import Posterior
from pyro_lvm.storage.files import digest
from pyro_lvm.structure import Structure
from pyro_lvm.to_arviz import loo

__all__ = ["Chains", "data_digest"]


@dataclass(frozen=True, repr=False, eq=False)
class Chains:
    r"""Draws from the posterior itself, in several chains; frozen.

    .. math:: z^{(s)} \sim p(z \mid x), \qquad k^{(s)} \sim p(k \mid x, z^{(s)})

    Sites that were summed out are drawn from their exact conditional given the others, never from their prior. Draws
    of a chain depend on each other: trust them as far as R-hat and effective sample size (``az.summary``) allow.

    Attributes:
        program: what was handed to `mcmc`.
        draws: by site that the chains moved, shape (num_chains, num_draws, *plates, *event), warm-up not included.
        statistics: of every draw, shape (num_chains, num_draws), by ArviZ's names: ``diverging``; ``energy`` of its
            trajectory, nats; ``acceptance_rate``, the mean over the trajectory; ``tree_depth``, how often it was
            doubled; ``n_steps``, its leapfrog steps; ``step_size``.
        info: how they were made: seed, versions, n, numbers of chains, draws and warm-up steps, ``divergences``,
            ``step_sizes``, ``acceptance_rates`` and ``max_tree_depth_reached`` by chain, ``rhat`` (largest entry) and
            ``ess`` (bulk, smallest entry) by site, ``parameters_held``, ``summed_out``, ``potential``, seconds.
        sites: under "model" the sample sites, as in `Fit.sites`; "guide" has none.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_lvm as lvm
        >>> def model(x, size=None):
        ...     loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), 10.0))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> chains = lvm.mcmc(model, x, num_draws=300, num_warmup=100, num_chains=2, seed=0)
        >>> chains.draws["loc"].shape, chains.posterior().num_draws, chains.info["divergences"]
        (torch.Size([2, 300]), 600, [0, 0])
    """

    program: Any
    draws: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    info: Mapping[str, Any]
    sites: SiteTable
    _bound: BoundProgram = field(compare=False)
    _snapshot: Snapshot = field(compare=False)
    _rows: Rows | None = field(compare=False)
    _data: str = field(compare=False)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Chains of {info['program']} on {info['n']} data by NUTS: {info['num_chains']} chains of "
            f"{info['num_draws']} draws after {info['num_warmup']} of warm-up, {sum(info['divergences'])} divergences"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chains to a folder that `pyro_lvm.load` reads; the data are not written.

        Args:
            path: the folder; new, empty, or with what was saved there, whose place this takes when it is whole.

        Raises:
            StorageError: if the folder holds something else, or the system refuses.
        """
        write_chains(self, path)

    def posterior(self, x: Any = None, num_draws: int | None = None, seed: int | None = None) -> Posterior:
        """Draws of every latent site, the chains one after the other.

        Args:
            x: the data that were sampled (None is these), or others of as many rows as the program likes where no
                site that the chains moved has a value for each datum.
            num_draws: how many, taken evenly from all; None for all.
            seed: of the draws of sites that were summed out; None for fresh ones.

        Returns:
            A `Posterior`; draws have shape ``(num_draws, *plates, *event)``, and its ``log_q`` is None.

        Raises:
            ProgramError: if ``x`` are other data and a site has a value for each datum.
            ValueError: if ``num_draws`` is below 1 or above what there is.
        """
        total = self.info["num_chains"] * self.info["num_draws"]
        order = _evenly(total, num_draws, "num_draws")
        with self._evaluating(x, order) as evaluation, evaluation.running(seed):
            return draw_posterior(evaluation, len(order))[0]

    def to_arviz(
        self,
        x: Any = None,
        groups: Sequence[str] = GROUPS,
        *,
        num_draws: int | None = None,
        num_samples: int = 100,
        seed: int | None = None,
        max_bytes: int = 2**31,
    ) -> Any:
        """The posterior and its predictives as ArviZ data.

        Variables have dims (chain, draw, *plates, *event dims) with the names that the program gave them. Draws of
        the prior and its predictive are one chain. ``sample_stats`` holds `statistics` and ``lp`` = log p(x, draw),
        nats of ``x`` together. ``log_likelihood`` is pointwise, with the latents of each datum summed out where they
        are discrete, else averaged over their prior given what all data share; where data share no latents it has
        one draw, and the attribute ``loo`` says why LOO is refused.

        Args:
            x: as for `posterior`.
            groups: which groups to make.
            num_draws: draws of each chain, taken evenly; None for all.
            num_samples: draws of the latents of a datum for each value of ``log_likelihood``, where they are not
                summed out exactly.
            seed: of all draws; None for fresh ones.
            max_bytes: refuse an export that would be larger.

        Returns:
            `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x).

        Raises:
            ProgramError: as `posterior`.
            ValueError: if a group is not known, a number of draws is out of range, or the export would be larger than
                ``max_bytes``.
        """
        refuse_unknown(groups)
        at_least_one(num_samples, "num_samples")
        chains, length = self.info["num_chains"], self.info["num_draws"]
        within = _evenly(length, num_draws, "num_draws")
        order = [chain * length + number for chain in range(chains) for number in within]
        statistics = {name: column.flatten()[torch.tensor(order)] for name, column in self.statistics.items()}
        with self._evaluating(x, order) as evaluation:
            nothing: Any = _nothing
            by_datum = Evaluation(
                self._bound.with_guide(nothing), self._snapshot, evaluation.rows, _without_guide(evaluation.structure)
            )
            return export(
                Export(
                    evaluation,
                    groups,
                    len(within),
                    num_samples,
                    seed,
                    max_bytes,
                    self._attributes,
                    chains,
                    statistics,
                    by_datum,
                )
            )

    def loo(
        self,
        x: Any = None,
        *,
        num_draws: int | None = None,
        num_samples: int = 100,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """ArviZ's PSIS leave-one-out cross-validation.

        Args:
            x: the data that were sampled; None is these.
            num_draws: draws of each chain; None for all.
            num_samples: as for `to_arviz`.
            seed: of the draws.
            **options: handed to ``arviz.loo``.

        Returns:
            What ``arviz.loo`` returns; its expected log predictive density is in nats of the data set.

        Raises:
            ProgramError: if data share no latents: LOO then means nothing.
        """
        with self._evaluating(x, [0]) as evaluation:
            if not evaluation.structure.global_latent:
                raise ProgramError(f"{NO_LOO}. Give the parameters priors, or compare log_evidence on held-out data")
        groups = ("posterior", "log_likelihood")
        return loo(self.to_arviz(x, groups, num_draws=num_draws, num_samples=num_samples, seed=seed), **options)

    @contextmanager
    def _evaluating(self, x: Any, order: Sequence[int]) -> Iterator[Evaluation]:
        """An evaluation whose guide says the draws again, in this order."""
        guide = self._bound.program.guide
        assert isinstance(guide, GivenDraws)
        if x is None and self._rows is None:
            raise ProgramError("chains from a file bring no data along: pass x, the rows that they were run on")
        rows = self._rows if x is None else self._of_these_data(as_rows(x, "x"))
        before = guide.order
        guide.order, guide.number = order, 0
        try:
            yield Evaluation.of(self, rows)
        finally:
            guide.order, guide.number = before, 0

    def _of_these_data(self, rows: Rows) -> Rows:
        plate = self.info["data_plate"]
        of_each = [
            site["name"] for site in self.sites["model"] if site["name"] in self.draws and plate in site["plates"]
        ]
        if of_each and data_digest(rows, self.draws) != self._data:
            instead = "pass those" if self._rows is None else "leave x out"
            raise ProgramError(
                f"site {of_each[0]!r} has a value for each of the {self.info['n']} rows that the chains were run on, "
                f"and x has other rows ({len(rows)}): {instead}, or run mcmc on them"
            )
        return rows

    def _attributes(self, structure: Structure) -> dict[str, str | float]:
        return {
            "inference_library": "pyro_lvm",
            "inference": "NUTS",
            "program": self.info["program"],
            "tuning_steps": self.info["num_warmup"],
            "sampling_time": self.info["seconds"],
            "loo": "pointwise log-likelihood over posterior draws" if structure.global_latent else f"refused: {NO_LOO}",
        }


NO_LOO = (
    "data share no latents, so there is no posterior over parameters, and leave-one-out cross-validation means nothing "
    "for one value of log p(x) per datum"
)


def data_digest(rows: Rows, draws: Mapping[str, Tensor]) -> str:
    """What tells one data set from another, in the floating dtype of the draws."""
    whole = rows.like(next(iter(draws.values()))).whole().tensors().values()
    return digest(f"{len(rows)}", {f"{number}": value.detach().cpu() for number, value in enumerate(whole)})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide that leaves every latent to the model."""


def _without_guide(structure: Structure) -> Structure:
    return Structure(structure.model, {}, structure.data_plate, structure.max_plate_nesting, structure.model_rows, {})


def _evenly(total: int, count: int | None, argument: str) -> Sequence[int]:
    """``count`` of ``total`` numbers, as far apart as may be."""
    if count is None:
        return range(total)
    if not 1 <= count <= total:
        raise ValueError(f"{argument} is {count}: there are {total}, ask for 1 to {total}")
    return [i * total // count for i in range(count)]
