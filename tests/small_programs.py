"""Programs small enough to know everything about, and a check that a call left the process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

import pyro_lvm as lvm


def data(n=40, seed=0, dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 1.0


def rows(n=40, columns=3, seed=0, dtype=torch.float64):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(x, size=None):
    """Two unit Normals whose label is summed out: the loss is exact."""
    logit = pyro.param("logit", torch.tensor(0.3))
    locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Bernoulli(logits=logit), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[component.long()], 1.0), obs=x)


def nothing(x, size=None):
    """The guide of `mixture`."""


class Labels(nn.Module):
    """Three labels, one-hot or whole numbers; x is Normal around the label's location; the guide is linear in x."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.logits = nn.Linear(1, 3)
        self.locs = nn.Parameter(torch.tensor([-2.0, 0.0, 2.0]))
        with torch.no_grad():
            self.logits.weight.fill_(0.1)
            self.logits.bias.zero_()

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", self.kind(x.new_ones(3)))
            loc = self.locs[y] if self.kind is dist.Categorical else y @ self.locs
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("y", self.kind(logits=self.logits(x[:, None])))


def ppca_with_an_inexact_guide():
    """PPCA at its maximum on twelve rows, and the rows; its guide's means are drawn back, so that weights vary."""
    x = rows(12, 4, seed=3)
    model = lvm.PPCA.closed_form(x, 2)
    with torch.no_grad():
        model._standard_guide_weight *= 0.7
    return model, x


def model_of_mean(x, size=None):
    scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide_of_mean(x, size=None):
    m = pyro.param("m", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(m, s))


class Amortised(nn.Module):
    """p(z) = N(0, I), p(x | z) = N(decoder(z), 1), q(z | x) = N(encoder(x), scale)."""

    def __init__(self, columns=3, latent=2):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(columns, latent), nn.Linear(latent, columns)
        self.log_scale = nn.Parameter(torch.zeros(latent))
        self.latent = latent

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).expand([len(x), self.latent]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))


class Hooked(Amortised):
    """The same with an `initialize` hook that moves a parameter."""

    def initialize(self, x, *, seed):
        with torch.no_grad():
            self.decoder.bias.copy_(x.mean(0))


class Normed(nn.Module):
    """A guide with batch norm, and dropout if it is asked for: buffers and noise of torch's own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.network = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 1))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.network(x)[:, 0], 0.5))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def same_state(module, state):
    now = module.state_dict()
    return now.keys() == state.keys() and all(
        now[name].dtype == value.dtype and torch.equal(now[name], value) for name, value in state.items()
    )


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Whatever happens inside, the process's state is the same to the bit afterwards."""
    flags = (False, True, True)
    with pyro.get_param_store().scope():
        pyro.param("logit", torch.tensor([7.0, 8.0]))
        mine = pyro.get_param_store()._params["logit"]
        pyro.distributions.enable_validation(flags[0])  # an unusual mixture, so that a reset to all-on shows
        before = torch.get_rng_state(), torch.get_default_dtype()
        try:
            yield
        finally:
            store = pyro.get_param_store()
            now = (
                pyro.distributions.is_validation_enabled(),
                pyro.infer.util.is_validation_enabled(),
                pyro.poutine.util.is_validation_enabled(),
            )
            pyro.enable_validation(True)
            assert now == flags
            assert torch.equal(torch.get_rng_state(), before[0])
            assert torch.get_default_dtype() is before[1]
            assert list(store.keys()) == ["logit"]
            assert store._params["logit"] is mine
            assert mine.tolist() == [7.0, 8.0]
