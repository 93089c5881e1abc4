"""The doctor: everything that can be said about a fit's posterior, each with a verdict and one thing to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.criticism.amortization import AmortizationGap, amortization_gap
from pyro_lvm.criticism.calibration import calibrate_amortised, needs_refits
from pyro_lvm.criticism.closeness import closeness_of_rows, joint_closeness
from pyro_lvm.criticism.components import find_components
from pyro_lvm.criticism.findings import Diagnosis, Finding, Verdict, judged
from pyro_lvm.criticism.judged_rows import JudgedRows, judged_rows
from pyro_lvm.criticism.predictive import mean_responsibilities
from pyro_lvm.criticism.runs import diagnose_runs
from pyro_lvm.criticism.units import Units, units_of
from pyro_lvm.criticism.use_of_latents import use_of_latents
from pyro_lvm.criticism.weights import point_estimates, sampled_sites, weighs_rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation, fresh_seed

__all__ = ["diagnose"]

ACTIVE = 0.01
"""Variance over data of a unit's posterior mean, in units of the prior's, above which it is active (Burda et al.)."""

SMALL_INFORMATION = 0.1
"""Nats between a datum and its latents below which these say next to nothing of it."""

NEAR_PRIOR, FAR_FROM_PRIOR = 0.1, 0.5
"""Nats from the aggregate posterior of a unit to its prior."""

SMALL_LOSS, LARGE_LOSS = 0.1, 1.0
"""Nats per datum that amortising may cost."""


def diagnose(
    fit: Any,
    x: Any,
    *,
    others: Sequence[Any] = (),
    num_samples: int = 1000,
    num_rows: int | None = 1000,
    num_simulations: int = 1000,
    amortization: bool = False,
    seed: int | None = None,
) -> Diagnosis:
    r"""Look a fit's posterior over: is it the model's posterior, and does it say anything of the data?

    .. math::
        w_{is} = \frac{p(x_i, z_s)}{q(z_s \mid x_i)}, \qquad
        \mathrm{KL}(q \Vert p(z \mid x_i)) = \log p(x_i) - E_q \log w_i, \qquad
        \text{active}_u : \operatorname{Var}_x E_q[z_u \mid x] > 0.01

    Findings, each where the program has what it takes; the others stand in ``report.skipped`` with the reason:

    - ``"k_hat"``: the Pareto tail index of each datum's importance weights (PSIS, by ArviZ). Numbers ``median``,
      ``max``, ``above_0.7`` (a share), ``least_ess``; array ``by_row``. 0 where all weights are equal. "fine" if at
      most 2 % lie above 0.7 and 10 % above 0.5, "wrong" if more than 10 % lie above 0.7.
    - ``"gap"``: evidence minus ELBO, an estimate of KL(q || posterior), nats per datum, fine to 0.1, wrong from 3 on;
      arrays ``by_row``, ``elbo``, ``log_evidence``. The evidence is the exact one where the program knows it.
    - ``"k_hat_joint"``, ``"gap_joint"``: the same of everything latent taken together, where all data share latents
      or the guide draws all data jointly; ``nats`` are of the data set.
    - ``"active_units"``, ``"information"``, ``"aggregate"``: by unit (entry of a continuous latent site of a datum),
      its activity; KL and mutual information; KL from the aggregate posterior to the prior. Arrays (U,) by site:
      ``z.activity``, ``z.kl``, ``z.mutual_information``, ``z.aggregate_kl``, ``z.aggregate_mean``,
      ``z.aggregate_sd``, and ``z.means``, ``z.draws`` (rows, U).
    - ``"use_of_latents"``: nats per datum that the likelihood loses if data exchange their latents; 0 where the decoder
      ignores them.
    - ``"components"``: of an enumerated site, those without data and those that say the same as another; arrays
      ``counts`` (K,), ``distinctness`` (K, K).
    - ``"calibration"``: ranks of the truth in data simulated from the program (`calibration`), for amortised guides.
    - ``"amortization"``: what amortising costs, nats per datum (`amortization_gap`), if it is asked for.
    - ``"runs"``: R-hat over this fit and ``others`` (`diagnose_runs`).

    Args:
        fit: a `Fit`, or anything that `fit` takes with a guide (at its present parameters).
        x: data as for `fit`.
        others: fits of the same program from other seeds.
        num_samples: S, draws of the guide for weights.
        num_rows: rows, at random, that diagnoses by datum look at; None for all. A program that cannot take a part of
            its rows is asked about all.
        num_simulations: rows simulated for the calibration; 0 leaves it out.
        amortization: whether to train parameters for each datum, which takes longer than all else together.
        seed: of all draws; None for fresh ones.

    Returns:
        A `Diagnosis`: a mapping from name to `Finding`, which prints as a table. ``lvm.plots.diagnosis`` draws it.

    Raises:
        ValueError: if ``num_samples < 25``, ``num_rows < 2``, or ``num_simulations`` is between 1 and 19.
        ProgramError: if the posterior is a sample (`Chains` have R-hat of their own) or a point (``guide="map"``).

    When it is wrong: importance weights see only where the guide goes. A guide that sits in one of two separate modes
    has a small k and a small gap; several runs (``others``) may find the other mode. All is said of the posterior
    under the model, nothing of the model: for that there are predictive checks.

    Sources: Yao, Vehtari, Simpson and Gelman, 2018, https://arxiv.org/abs/1802.02538 (k-hat of a guide); Burda, Grosse
    and Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519 (active units); Hoffman and Johnson, 2016,
    http://approximateinference.org/accepted/HoffmanJohnson2016.pdf (information); Talts et al., 2018,
    https://arxiv.org/abs/1804.06788 (calibration).

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> report = lvm.diagnose(lvm.PPCA.closed_form(x, latent_dim=1), x, num_samples=100, seed=0)
        >>> report["k_hat"]["max"], report["k_hat"].verdict  # the guide is the exact posterior
        (0.0, 'fine')
        >>> report["active_units"]["active"]
        1.0
    """
    for name, value, least in (("num_samples", num_samples, 25), ("num_rows", num_rows, 2)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if 0 < num_simulations < 20:
        raise ValueError(f"num_simulations is {num_simulations}: a test of ranks needs at least 20, or 0 for no test")
    evaluation = Evaluation.of(fit, x)
    _require_a_guide(evaluation)
    examination = _Examination(evaluation, fresh_seed() if seed is None else seed)
    with evaluation.running(examination.seed):
        rows = judged_rows(evaluation, num_rows, examination.seed)
        examination.weigh(rows, num_samples)
        examination.look_at_units(rows)
        examination.look_at_components()
    examination.calibrate(num_simulations)
    if amortization:
        examination.add(_amortization(amortization_gap(fit, evaluation.rows, seed=examination.seed)))
    else:
        examination.skipped["amortization"] = "it takes longer than all else together: ask with amortization=True"
    if others:
        examination.add(diagnose_runs([fit, *others], x, seed=examination.seed))
    else:
        examination.skipped["runs"] = "there is one run: pass others=[fits from other seeds]"
    return Diagnosis(examination.findings, examination.skipped)


def _require_a_guide(evaluation: Evaluation) -> None:
    if evaluation.given is not None:
        raise ProgramError("these are draws of chains, which have no guide to diagnose: read their R-hat instead")
    points = point_estimates(evaluation.structure)
    if points:
        raise ProgramError(
            f"the guide of {', '.join(points)} is a point, without a spread that could be right or wrong: fit with "
            "guide='mean_field' (or another guide with a spread)"
        )


class _Examination:
    """Findings as they come, and what was left out."""

    def __init__(self, evaluation: Evaluation, seed: int) -> None:
        self.evaluation, self.seed = evaluation, seed
        self.structure = evaluation.structure
        self.findings: dict[str, Finding] = {}
        self.skipped: dict[str, str] = {}

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings[finding.name] = finding

    def _drawn(self) -> list[str]:
        """Latent sites of a datum that are drawn in the guide."""
        plate, guide = self.structure.data_plate, self.structure.guide
        return [s.name for s in sampled_sites(self.structure) if s.inside(plate) and s.name in guide]

    def weigh(self, rows: JudgedRows, num_samples: int) -> None:
        """k-hat and gap, by datum and together."""
        structure = self.structure
        if not self._drawn():
            self.skipped["k_hat"] = "no latent of a datum is drawn: what is listed is summed out exactly"
        elif not weighs_rows(structure):
            self.skipped["k_hat"] = "the guide draws the latents of all data jointly: see k_hat_joint"
        else:
            self.add(*closeness_of_rows(self.evaluation, rows, num_samples))
        if any(site.name in structure.guide for site in structure.global_latent) or not weighs_rows(structure):
            self.add(*joint_closeness(self.evaluation, num_samples))
        else:
            self.skipped["k_hat_joint"] = "data share no latent, so that they can be judged one by one"

    def look_at_units(self, rows: JudgedRows) -> None:
        """What the units of each datum's latents know."""
        if not self._drawn():
            self.skipped["active_units"] = "no continuous latent of a datum is drawn"
            return
        found, left_out = units_of(self.evaluation, rows)
        self.skipped |= {f"units of {name}": why for name, why in left_out.items()}
        if found:
            self.add(*_units(found, len(rows), "look" if left_out else "wrong"))
        if self.structure.enumerated_in_model or self.structure.enumerated_in_guide:
            self.skipped["use_of_latents"] = "the likelihood is summed over a listed site"
        elif len(rows) > 1:
            self.add(use_of_latents(self.evaluation, rows))

    def look_at_components(self) -> None:
        """Components of every listed site of a datum."""
        structure, n = self.structure, self.evaluation.rows.size
        listed = [site.name for site in (*structure.enumerated_in_model, *structure.enumerated_in_guide)]
        inside = [name for name in listed if structure.model[name].inside(structure.data_plate)]
        if not inside:
            self.skipped["components"] = "no site of a datum is listed"
            return
        others = [site for site in structure.latent if site.name not in listed]
        for name, table in mean_responsibilities(self.evaluation, 100 if others else 1).items():
            if name in inside and table.dim() == 2 and len(table) == n and table.shape[-1] > 1:
                self.add(find_components("components" if len(inside) == 1 else f"components of {name}", name, table))

    def calibrate(self, num_simulations: int) -> None:
        """Ranks of the truth in simulated data, where the guide can be asked about any data."""
        why = needs_refits(self.evaluation)
        local = [site.name for site in self.structure.local_latent if site.name in self.structure.guide]
        if num_simulations == 0:
            self.skipped["calibration"] = "num_simulations is 0"
        elif not local:
            self.skipped["calibration"] = "the guide draws nothing for a datum"
        elif why is not None:
            self.skipped["calibration"] = f"{why}: lvm.calibration refits for each simulated data set"
        else:
            try:
                self.add(calibrate_amortised(self.evaluation, num_simulations, 99, self.seed))
            except (ProgramError, NotImplementedError) as error:  # a program that cannot be run forwards
                self.skipped["calibration"] = str(error) or "a distribution of the model cannot be drawn from"


def _units(found: Sequence[Units], rows: int, worst: Verdict) -> list[Finding]:
    """Findings of all units; ``worst`` is what sleeping units can mean, where other latents may be awake."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(units, name) for units in found])

    def arrays(*names: str) -> dict[str, Tensor]:
        return {f"{units.site}.{name}": getattr(units, name) for units in found for name in names}

    return [
        _activity(joined("activity"), worst, arrays("activity", "means")),
        _information(found, worst, rows, arrays("kl", "mutual_information")),
        _aggregate(joined("aggregate_kl"), found, arrays("aggregate_kl", "aggregate_mean", "aggregate_sd", "draws")),
    ]


def _activity(activity: Tensor, worst: Verdict, arrays: dict[str, Tensor]) -> Finding:
    active, units = int((activity > ACTIVE).sum()), len(activity)
    verdict: Verdict = worst if active == 0 else "look" if active < units else "fine"
    advice = {
        "fine": "every unit of the latents says something of the data",
        "look": f"{units - active} of {units} units are asleep, their posterior is the same for all data: the model "
        "uses fewer dimensions than it has; free bits or a KL warm-up may wake them, and fewer units lose nothing",
        "wrong": "the posterior is the same for all data (collapse): try free bits or a KL warm-up, a weaker decoder, "
        "or a smaller scale of the noise",
    }[verdict]
    numbers = {"active": float(active), "units": float(units), "least_activity": activity.min().item()}
    return Finding("active_units", verdict, numbers, advice, arrays)


def _information(found: Sequence[Units], worst: Verdict, rows: int, arrays: dict[str, Tensor]) -> Finding:
    total = max(units.total_information for units in found)
    kl, information = (torch.cat([getattr(u, name) for u in found]) for name in ("kl", "mutual_information"))
    verdict: Verdict = worst if total < SMALL_INFORMATION else "fine"
    limit = torch.tensor(float(rows)).log().item()
    advice = "the latents tell data apart"
    if total < SMALL_INFORMATION:
        advice = "the latents hold next to nothing of a datum: their KL, if there is any, buys no information; try "
        advice += "free bits or a KL warm-up"
    elif total > 0.95 * limit:
        advice += f"; their information reaches what {rows} rows can show, log n = {limit:.2f} nats, and may be larger"
    numbers = {"kl": kl.sum().item(), "mutual_information": total, "log_n": limit}
    numbers["largest_unit"] = information.max().item()
    return Finding("information", verdict, numbers, advice, arrays)


def _aggregate(kl: Tensor, found: Sequence[Units], arrays: dict[str, Tensor]) -> Finding:
    worst = kl.max().item()
    verdict = judged(worst, NEAR_PRIOR, FAR_FROM_PRIOR)
    advice = {
        "fine": "the posteriors of all data, taken together, fill the prior: draws from the prior look like codes",
        "look": "the posteriors of all data together leave the prior somewhat: draws from the prior are not quite what "
        "the decoder knows; try a learned prior, or train longer",
        "wrong": "the posteriors of all data together are far from the prior, and draws from the prior land where the "
        "decoder was never trained: try a learned prior (scale, mixture, flow), or a larger weight of the KL",
    }[verdict]
    means, spreads = (torch.cat([getattr(u, name) for u in found]) for name in ("aggregate_mean", "aggregate_sd"))
    numbers = {
        "largest_kl": worst,
        "sum_kl": kl.sum().item(),
        "largest_shift": means.abs().max().item(),
        "least_sd": spreads.min().item(),
        "largest_sd": spreads.max().item(),
    }
    return Finding("aggregate", verdict, numbers, advice, arrays)


def _amortization(gap: AmortizationGap) -> Finding:
    verdict = judged(gap.gap, SMALL_LOSS, LARGE_LOSS)
    advice = {
        "fine": "the encoder finds for every datum about the best guide of its family",
        "look": "the encoder costs some of the bound: try a larger one, or more steps of the guide alone (alternate=)",
        "wrong": "the encoder costs much of the bound: try a larger one, more steps of the guide alone (alternate=), "
        "or amortized=False",
    }[verdict]
    numbers = {
        "nats_per_datum": gap.gap,
        "standard_error": gap.standard_error,
        "elbo_amortized": gap.elbo_amortized,
        "elbo_per_datum": gap.elbo_per_datum,
    }
    return Finding("amortization", verdict, numbers, advice)
