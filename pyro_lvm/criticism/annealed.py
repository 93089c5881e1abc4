r"""The evidence by annealed importance sampling: from a start that can be drawn from, step by step to the posterior.

.. math::
    f_\beta(z) = q_0(z)^{1 - \beta} p(x, z)^\beta, \qquad
    \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \bigl[\log p(x, z_{t-1}) - \log q_0(z_{t-1})\bigr], \qquad
    \mathbb{E}[w] = p(x)

where :math:`z_0 \sim q_0` and :math:`z_t` comes from :math:`z_{t-1}` by a transition that leaves
:math:`f_{\beta_t}` invariant: Hamiltonian Monte Carlo. The mean is exact for any number of steps and however badly the
chains mix; their spread is what more steps and better transitions reduce.

What would bias it is a transition that looks at the chain's own past. So a pilot run of other chains finds, for every
datum, the step sizes, the scale of each coordinate, and where along the path the temperatures must stand close
(everywhere the same variance of :math:`\log w`); then all of it is frozen, and the chains that count are drawn afresh.

Sources: Neal (2001), Annealed importance sampling, https://arxiv.org/abs/physics/9803008; for decoder-based models,
Wu et al. (2017), https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.criticism.annealing_target import Level, Start, Target, guide_densities, refuse, varying_support
from pyro_lvm.criticism.log_mean import Evidence, LogMean, joined
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation

__all__ = ["anneal"]

PILOT_CHAINS = 16
LEAPFROG_STEPS = 2
"""Gradients to a transition; the step size is drawn within a fifth of its value, so that no orbit closes."""

ACCEPTANCE = 0.8
ADAPTATION = 1.0
"""How fast the pilot's log step size follows its acceptance."""

MEMORY = 0.8
"""What a coordinate's variance keeps of the temperatures before, in the pilot."""

WARM_UP = 20
"""Transitions in which the pilot finds its first step size."""


@dataclass
class _Plan:
    """The frozen choices for every datum; n data, D coordinates, T temperatures above nought.

    Attributes:
        betas: shape (T + 1, n), from 0 to 1.
        step_sizes: shape (T, n).
        scales: of the coordinates, shape (T, n, D).
        variance: what log w of perfectly mixing chains would have, as the pilot saw the path, shape (n,).
    """

    betas: Tensor
    step_sizes: Tensor
    scales: Tensor
    variance: Tensor


def anneal(evaluation: Evaluation, num_chains: int, num_steps: int, start: Start, batch_size: int) -> Evidence:
    """`pyro_lvm.log_evidence` by annealing, for a caller that has set up random state and parameters.

    Args:
        evaluation: the program and data.
        num_chains: C, annealed importance weights for each datum.
        num_steps: T, temperatures.
        start: where from; None for whichever of the two the pilot finds the shorter way from.
        batch_size: rows times chains in one pass.

    Raises:
        ProgramError: if the program cannot be annealed per datum, or not from this start.
    """
    refuse(evaluation)
    width = max(1, batch_size // max(num_chains, PILOT_CHAINS))
    parts = []
    for batch in evaluation.rows.batches(width if evaluation.bound.program.names("size") else None):
        parts.append(_anneal(evaluation, batch, num_chains, num_steps, start, batch_size))
    values = [value for value in evaluation.rows.first(1).tensors().values() if value.is_floating_point()]
    like = values[0] if values else torch.zeros(())
    return joined(parts, like)


def _anneal(
    evaluation: Evaluation, batch: Batch, num_chains: int, num_steps: int, start: Start, batch_size: int
) -> Evidence:
    starts: list[Mapping[str, tuple[str, Any]] | None] = []
    if start != "prior":
        found = guide_densities(evaluation, batch)
        if not isinstance(found, str):
            starts.append(found)
        elif start == "guide":
            raise ProgramError(f"{found}, so chains cannot start there: use start='prior'")
    if start != "guide":
        starts.append(None)
    plans = [_pilot(_target(evaluation, batch, densities), num_steps) for densities in starts]
    shortest = min(range(len(plans)), key=lambda i: plans[i].variance.mean().item())
    plan, densities = plans[shortest], starts[shortest]
    mean, left = LogMean(len(batch)), num_chains
    while left:
        chains = min(left, max(1, batch_size // len(batch)))
        mean.add(_run(Target(evaluation, batch, chains, densities), plan))
        left -= chains
    return mean.result()


def _target(evaluation: Evaluation, batch: Batch, densities: Mapping[str, tuple[str, Any]] | None) -> Target:
    """The path of the pilot's chains, once it is clear that its coordinates stay what they are."""
    pilot, again = (Target(evaluation, batch, PILOT_CHAINS, densities) for _ in range(2))
    moving = varying_support(pilot, again)
    if moving:
        raise ProgramError(
            f"the bounds of site {moving!r} depend on other draws, and annealing needs coordinates without bounds that "
            "stay the same: write it as a fixed site, scaled. Or use method='importance'"
        )
    return pilot


def _run(target: Target, plan: _Plan) -> Tensor:
    """Log weights of fresh chains under a frozen plan, shape (chains, n)."""
    chains = target.chains
    u = target.start()
    log_weight = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for step in range(len(plan.betas) - 1):
        beta = plan.betas[step + 1].repeat(chains)
        level = target.at(u, beta)
        log_weight += (plan.betas[step + 1] - plan.betas[step]).repeat(chains).double() * level.work.double()
        if step + 2 < len(plan.betas):
            strides = plan.step_sizes[step].repeat(chains), plan.scales[step].repeat(chains, 1)
            u, _ = _transition(target, u, beta, level, *strides)
    return log_weight.reshape(chains, -1)


def _transition(
    target: Target, u: Tensor, beta: Tensor, before: Level, step_size: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One Hamiltonian trajectory, accepted or not; and the probability with which it was, shape (chains · n,)."""
    jitter = 0.8 + 0.4 * torch.rand_like(step_size)
    stride = (step_size * jitter).unsqueeze(-1) * scale
    momentum = torch.randn_like(u)
    position, level = u, before
    speed = momentum + 0.5 * stride * level.gradient
    for leap in range(LEAPFROG_STEPS):
        position = position + stride * speed
        level = target.at(position, beta)
        speed = speed + (0.5 if leap + 1 == LEAPFROG_STEPS else 1.0) * stride * level.gradient
    gained = level.log_density - before.log_density
    gained = gained - 0.5 * (speed.square().sum(-1) - momentum.square().sum(-1))
    probability = gained.nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()
    accepted = torch.rand_like(probability) < probability
    return torch.where(accepted.unsqueeze(-1), position, u), probability


def _pilot(target: Target, num_temperatures: int) -> _Plan:
    """Run other chains with everything adapting, and place temperatures, step sizes and scales by what they saw."""
    chains, n = target.chains, target.rows
    u = target.start()
    num_steps = max(num_temperatures // 2, 10)
    betas = _sigmoid(num_steps).to(u)
    scale = _spread(u, chains)
    log_step = torch.full((n,), -0.7, dtype=u.dtype, device=u.device) - 0.25 * torch.tensor(float(u.shape[-1])).log()
    step_sizes, scales, rates = [], [], []
    for step in range(num_steps):
        beta = betas[step + 1].expand(len(u))
        level = target.at(u, beta)
        rates.append(_deviation(level.work.reshape(chains, n)))
        for repeat in range(WARM_UP if step == 0 else 1):
            level = target.at(u, beta) if repeat else level
            strides = log_step.exp().repeat(chains), scale.repeat(chains, 1)
            u, probability = _transition(target, u, beta, level, *strides)
            log_step = log_step + ADAPTATION * (probability.reshape(chains, n).mean(0) - ACCEPTANCE)
        scale = (MEMORY * scale.square() + (1 - MEMORY) * _spread(u, chains).square()).sqrt()
        step_sizes.append(log_step)
        scales.append(scale)
    rates.append(_deviation(target.at(u, betas[-1].expand(len(u))).work.reshape(chains, n)))
    return _placed(betas, torch.stack(step_sizes), torch.stack(scales), torch.stack(rates), num_temperatures)


def _placed(betas: Tensor, log_steps: Tensor, scales: Tensor, rates: Tensor, num_temperatures: int) -> _Plan:
    """Temperatures at equal distances, where the distance is the deviation of the work times the step of beta.

    A fifth of them follow the pilot's own, which keeps the ends safe where sixteen chains saw too little.
    """
    lengths = 0.5 * (rates[1:] + rates[:-1]) * betas.diff().unsqueeze(-1)  # (steps, n)
    total = lengths.sum(0).clamp(min=1e-12)
    reached = torch.cat([torch.zeros_like(lengths[:1]), (0.8 * lengths / total + 0.2 / len(lengths)).cumsum(0)])
    reached = reached / reached[-1]
    wanted = torch.linspace(0, 1, num_temperatures + 1, dtype=betas.dtype, device=betas.device)
    above = torch.searchsorted(reached.T.contiguous(), wanted.expand(reached.shape[1], -1).contiguous()).T
    above = above.clamp(1, len(betas) - 1)  # (temperatures + 1, n)
    low, high = reached.gather(0, above - 1), reached.gather(0, above)
    part = ((wanted.unsqueeze(-1) - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    placed = betas[above - 1] + part * (betas[above] - betas[above - 1])
    placed[0], placed[-1] = 0.0, 1.0
    nearest = (above - 1)[1:]
    steps = log_steps.gather(0, nearest).exp()
    scales = scales.gather(0, nearest.unsqueeze(-1).expand(-1, -1, scales.shape[-1]))
    return _Plan(placed, steps, scales, total.square() / num_temperatures)


def _sigmoid(num_steps: int) -> Tensor:
    """From 0 to 1, closer at both ends (Wu et al., 2017)."""
    values = torch.sigmoid(torch.linspace(-4.0, 4.0, num_steps + 1, dtype=torch.float64))
    return (values - values[0]) / (values[-1] - values[0])


def _spread(u: Tensor, chains: int) -> Tensor:
    """Each coordinate's standard deviation over the chains of a datum, shape (n, D)."""
    spread = u.reshape(chains, -1, u.shape[-1]).std(0)
    return spread.clamp(min=1e-8 + 1e-3 * spread.mean().item())


def _deviation(work: Tensor) -> Tensor:
    """Standard deviation over chains, shape (n,), of what is finite."""
    finite = work.isfinite()
    filled = torch.where(finite, work, 0.0)
    count = finite.sum(0).clamp(min=1)
    mean = filled.sum(0) / count
    return (torch.where(finite, work - mean, 0.0).square().sum(0) / count).sqrt()
