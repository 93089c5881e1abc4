"""The yardstick: draws from the posterior itself, by Pyro's NUTS."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_lvm.capture.potential import Potential, capture_potential
from pyro_lvm.data import as_rows
from pyro_lvm.errors import ProgramWarning
from pyro_lvm.evaluation import fresh_seed
from pyro_lvm.inference.chains import Chains, data_digest
from pyro_lvm.inference.iterations import require_counts, surroundings
from pyro_lvm.inference.nuts import Chain, Settings, run_chain
from pyro_lvm.inference.prepare import placed
from pyro_lvm.inference.sites import site_table
from pyro_lvm.inference.walkable import Walkable, make_walkable, walked
from pyro_lvm.parameters import Untouched, isolated
from pyro_lvm.program import as_program
from pyro_lvm.to_arviz import convergence

__all__ = ["mcmc"]

LARGEST_RHAT = 1.05
SMALLEST_ESS = 100

STEPS_THAT_REPAY_A_GRAPH = 100
"""A capture costs about as much as so many steps of a chain save."""


def mcmc(
    program: Any,
    x: Any,
    *,
    num_draws: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
) -> Chains:
    r"""Draw from the posterior of a program's latents with the no-U-turn sampler; slow, and what `fit` is measured by.

    .. math:: z^{(s)} \sim p_\theta(z \mid x) \propto \sum_k p_\theta(x, z, k)

    Every continuous latent site moves, without its constraints; every discrete one whose values can be listed is
    summed out, marked for it or not. The guide is not looked at. Parameters (`pyro.param`, `nn.Parameter`) are held:
    those of a module at their present values, those of a plain function at the values it declares;
    ``info["parameters_held"]`` names them. Give a parameter a prior, and it has a posterior.

    Chains run one after the other, each with a random stream of its own: another chain more does not change the
    others. They start uniformly within 2 of nought on the unconstrained scale or, where the program has a method
    ``initial_values()``, close to what that returns (its ``initialize`` is called before).

    Args:
        program: as for `fit`.
        x: data as for `fit`; all rows are used in every step.
        num_draws: draws kept of each chain.
        num_warmup: steps before them, which tune step size and mass matrix.
        num_chains: how many chains.
        target_accept_prob: the mean acceptance probability that the step size is tuned to; a larger one makes smaller
            steps.
        max_tree_depth: a trajectory is doubled so many times at most.
        full_mass: whether the mass matrix is dense.
        seed: of everything random; None for a fresh one, recorded.
        progress: a progress bar; None shows one on a terminal.

    Returns:
        `Chains`.

    Raises:
        ProgramError: if the program has no continuous latent site, cannot be sampled by NUTS, or has no place to
            start from (before any step).
        ValueError: if the data do not fit the program, or an argument is out of range (before any step).
        TypeError: if an argument is of another kind than described (before any step). After each of these the modules
            are as they were.

    Warns:
        ProgramWarning: if a trajectory diverged, or a site has an R-hat above 1.05 or fewer than 100 effective draws:
            what the chains say is then not to be trusted.

    When it is wrong: modes far apart (the components of a mixture among them) are not visited in proportion, and
    every chain may be content with its own. Hoffman and Gelman (2014), https://jmlr.org/papers/v15/hoffman14a.html.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_lvm as lvm
        >>> def model(x, size=None):
        ...     loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), 10.0))
        ...     with pyro.plate("data", size or len(x), subsample=x):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
        >>> chains = lvm.mcmc(model, x, num_draws=300, num_warmup=100, num_chains=2, seed=0)
        >>> chains
        Chains of model on 4 data by NUTS: 2 chains of 300 draws after 100 of warm-up, 0 divergences
        >>> abs(chains.posterior().mean("loc").item() - 1.25) < 0.15
        True
    """
    started = time.perf_counter()
    require_counts(num_draws=num_draws, num_warmup=num_warmup, num_chains=num_chains, max_tree_depth=max_tree_depth)
    if not 0 < target_accept_prob < 1:
        raise ValueError(f"target_accept_prob is {target_accept_prob}: it must lie between 0 and 1, such as 0.8")
    if not isinstance(full_mass, bool):
        raise TypeError(f"full_mass is {full_mass!r}: it must be True or False")
    resolved = as_program(program)
    seed = fresh_seed() if seed is None else seed
    preparation, *streams = _streams(seed, 1 + num_chains)
    sampled, given = walked(resolved)
    untouched = Untouched(sampled.modules.values())
    try:
        with isolated(preparation, validate=True):
            rows, _, cast = placed(sampled, as_rows(x, "x"), None, None)
            walkable = make_walkable(sampled, rows, cast, untouched, preparation)
    except BaseException:
        untouched.restore()
        raise
    del untouched
    bound, density, snapshot = walkable.bound, walkable.density, walkable.bound.snapshot()
    settings = Settings(num_draws, num_warmup, target_accept_prob, max_tree_depth, full_mass)
    steps = num_chains * (num_draws + num_warmup)
    with isolated(preparation, validate=False), bound.holding(snapshot):
        potential, how = _potential(walkable, steps, resolved.name)
    chains: list[Chain] = []
    with tqdm(total=steps, unit="step", disable=None if progress is None else not progress) as bar:
        for number, stream in enumerate(streams, 1):
            bar.set_description(f"chain {number} of {num_chains}", refresh=False)
            with isolated(stream, validate=False), bound.holding(snapshot):
                chains.append(run_chain(density, potential, settings, bar.update))
    draws = {site.name: torch.stack([chain.draws[site.name] for chain in chains]) for site in density.sites}
    given.fill(density.sites, {name: value.flatten(0, 1) for name, value in draws.items()})
    diagnosed = convergence(draws)
    statistics = {name: torch.stack([c.statistics[name] for c in chains]) for name in chains[0].statistics}
    info: dict[str, Any] = {
        "program": resolved.name,
        "estimator": "NUTS",
        "seed": seed,
        "n": len(rows),
        "num_chains": num_chains,
        "num_draws": num_draws,
        "num_warmup": num_warmup,
        "target_accept_prob": target_accept_prob,
        "divergences": [int(column.sum()) for column in statistics["diverging"]],
        "max_tree_depth_reached": [int((column >= max_tree_depth).sum()) for column in statistics["tree_depth"]],
        "acceptance_rates": [float(column.mean()) for column in statistics["acceptance_rate"]],
        "step_sizes": [chain.step_size for chain in chains],
        "rhat": {name: found[0] for name, found in diagnosed.items()},
        "ess": {name: found[1] for name, found in diagnosed.items()},
        "parameters_held": walkable.held,
        "summed_out": [site.name for site in walkable.structure.enumerated_in_model],
        "potential": how,
        "data_plate": walkable.structure.data_plate,
        "seconds": time.perf_counter() - started,
    } | surroundings(rows, cast)
    doubt = _doubt(info)
    if doubt is not None:
        warnings.warn(doubt, ProgramWarning, stacklevel=2)
    sites = site_table(walkable.structure)
    return Chains(program, draws, statistics, info, sites, bound, snapshot, rows, data_digest(rows, draws))


def _streams(seed: int, count: int) -> list[int]:
    """Independent seeds; the first of many are those of few."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(2**31, (), generator=generator)) for _ in range(count)]


def _potential(walkable: Walkable, steps: int, name: str) -> tuple[Potential, str]:
    if steps < STEPS_THAT_REPAY_A_GRAPH:
        return walkable.density.potential, f"not captured: {steps} steps do not repay it"
    return capture_potential(walkable.density.potential, walkable.positions, name)


def _doubt(info: Mapping[str, Any]) -> str | None:
    """What speaks against the chains, and the edit to try first."""
    rhat: dict[str, float] = info["rhat"]
    ess: dict[str, float] = info["ess"]
    diverged = sum(info["divergences"])
    mixed_badly = {name: value for name, value in rhat.items() if value > LARGEST_RHAT}
    few = {name: value for name, value in ess.items() if value < SMALLEST_ESS}
    worst = min(ess, key=lambda name: math.inf if math.isnan(ess[name]) else ess[name])
    said = []
    if diverged:
        total = info["num_chains"] * info["num_draws"]
        said.append(f"{diverged} of {total} trajectories diverged (site {worst!r} has the fewest effective draws)")
    if mixed_badly:
        name = max(mixed_badly, key=lambda name: mixed_badly[name])
        said.append(f"site {name!r} has R-hat {mixed_badly[name]:.3g}, above {LARGEST_RHAT}")
    if few:
        said.append(f"site {worst!r} has {ess[worst]:.0f} effective draws, fewer than {SMALLEST_ESS}")
    if not said:
        return None
    return f"the chains are not to be trusted yet: {'; '.join(said)}. {_edit(info, diverged, bool(mixed_badly), worst)}"


def _edit(info: Mapping[str, Any], diverged: int, mixed_badly: bool, worst: str) -> str:
    if diverged and info["target_accept_prob"] < 0.95:
        return "Pass target_accept_prob=0.95; if that does not help, write the site or what depends on it non-centred"
    if diverged:
        return f"Write {worst!r} or what depends on it non-centred, such as loc + scale * z with z ~ Normal(0, 1)"
    if mixed_badly:
        switched = (
            f" (or the values of {info['summed_out'][0]!r} have changed places between chains: give the program "
            "initial_values())"
            if info["summed_out"]
            else ""
        )
        return f"Pass num_warmup={2 * info['num_warmup']}{switched}"
    return f"Pass num_draws={4 * info['num_draws']}"
