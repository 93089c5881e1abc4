"""Many draws of an estimator's gradient at once, and how far their mean is from what it should be.

In the programs here each row of the data has parameters of its own, all equal: rows do not know of each other, so that
the gradients in them are as many independent draws of one.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from oracles import categorical_bound
from torch import nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program

LOGITS = [1.2, -0.4, 0.3, 0.0, -1.0, 0.8, -0.2, 0.5, -0.7, 0.1]
LOCS = [-2.0, -1.2, 0.4, 1.5, 0.9, -0.3, 2.2, -1.7, 0.1, 1.0]
X = 0.7
NORMAL = {"m": 0.3, "log_scale": -0.4, "w": 1.3}
NOISE = 0.8
VALUE = categorical_bound(LOGITS, LOCS, X)[0]


def repeated(values, n):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64).expand(n, *torch.tensor(values).shape).clone())


class OfTen(nn.Module):
    """A label of ten, uniform; x is Normal around the label's location; the guide has logits."""

    def __init__(self, n, mark=None, kind=dist.OneHotCategorical):
        super().__init__()
        self.logits, self.locs = repeated(LOGITS, n), repeated(LOCS, n)
        self.infer = {} if mark is None else {"enumerate": mark}
        self.kind = kind

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", self.kind(x.new_ones(10)))
            if self.kind is dist.Categorical:
                y = torch.eye(10, dtype=x.dtype)[y]
            pyro.sample("x", dist.Normal((y * self.locs).sum(-1), 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("y", self.kind(logits=self.logits), infer=self.infer)


class Normal(nn.Module):
    """z ~ N(0, 1), x | z ~ N(w z, NOISE), q = N(m, exp(log_scale))."""

    def __init__(self, n, kind=dist.Normal):
        super().__init__()
        self.kind = kind
        self.m, self.log_scale, self.w = (repeated(value, n) for value in NORMAL.values())

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, NOISE), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", self.kind(self.m, self.log_scale.exp()))


class Linear(nn.Module):
    """A baseline: slope times x plus offset, one number for each row."""

    def __init__(self, slope=0.0, offset=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x):
        return self.slope * x + self.offset


def prepared(elbo, program, *data, size=None):
    """The estimator, the bound program and the batch of a fit."""
    bound = BoundProgram(as_program(program))
    batch = Batch(data, {}, size or len(data[0]), torch.arange(len(data[0])))
    return Estimator(elbo, traced(bound.model, bound.guide, batch), "given"), bound, batch


def draws(elbo, program, *, warm_up=0, seed=0):
    """Draws of the gradient of the loss by parameter, shape (n, *parameter), and the loss per row."""
    n = len(next(program.parameters()))
    x = torch.full((n,), X, dtype=torch.float64)
    with isolated(seed, validate=False):
        estimator, bound, batch = prepared(elbo, program, x)
        for _ in range(warm_up + 1):
            program.zero_grad()
            loss, _ = estimator.step(bound, batch, list(program.parameters()), None, 1)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in program.named_parameters()}
    return gradients, loss.item() / n


def off(found, right):
    """The largest distance of the mean of draws from what is right, in standard errors (of 1e-12 at least)."""
    right = torch.as_tensor(right, dtype=torch.float64)
    error = (found.std(0) / len(found) ** 0.5).clamp(min=1e-12)
    return ((found.mean(0) - right).abs() / error).max().item()


def bias(found, right):
    """The length of mean minus right."""
    return (found.mean(0) - torch.as_tensor(right, dtype=torch.float64)).norm().item()


def spread(found):
    """The standard deviation of one draw, over all entries."""
    return found.reshape(len(found), -1).var(0).sum().sqrt().item()


def repeatedly(elbo, program, *data, times=200, size=None, seed=0):
    """Gradients of one program, evaluated again and again: shape (times, all parameters)."""
    rows = []
    with isolated(seed, validate=False):
        estimator, bound, batch = prepared(elbo, program, *data, size=size)
        parameters = list(program.parameters())
        for _ in range(times):
            program.zero_grad()
            estimator.step(bound, batch, parameters, None, 1)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    program.zero_grad()
    return torch.stack(rows)
