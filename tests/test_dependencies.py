"""What a site is computed from, told by values that carry their origin."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from small_programs import Amortised, rows

from pyro_lvm.data import as_rows
from pyro_lvm.dependencies import descendants, parents
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import as_program


def of_model(model, x):
    bound = BoundProgram(as_program((model, lambda *args, **kwargs: None)))
    with isolated(0):
        return parents(bound.model, as_rows(x).first(len(x)), {})


def test_direct_parents_only():
    def chain(x, size=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.deterministic("c", b + 1.0)
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(c + torch.stack([a, b])[k], 1.0), obs=x)

    found = of_model(chain, rows()[:, 0])
    assert found["a"] == found["k"] == frozenset()
    assert found["b"] == {"a"}
    assert "c" not in found
    assert found["x"] == {"a", "b", "k"}
    assert descendants(found, "a") == {"b", "x"}
    assert descendants(found, "x") == set()


def test_through_networks_points_and_given_values():
    module, x = Amortised().double(), rows()
    assert of_model(module.model, x) == {"z": frozenset(), "x": {"z"}}

    def pointed(x, size=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Delta(a * 2.0, event_dim=1))
        pyro.sample("c", dist.Normal(b, 1.0).to_event(1))

    found = of_model(pointed, x)
    assert (found["b"], found["c"]) == ({"a"}, {"b"})
    bound = BoundProgram(as_program((pointed, lambda *args, **kwargs: None)))
    with isolated(0):
        given = parents(bound.model, as_rows(x).first(4), {"a": torch.zeros(2, dtype=torch.float64)})
    assert given == found
