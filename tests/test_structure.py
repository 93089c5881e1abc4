"""One trace tells sites, plates and what is discrete, local, enumerated."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from small_programs import Amortised, mixture, nothing, rows

from pyro_lvm.data import as_rows
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import as_program
from pyro_lvm.structure import trace_structure


def structure_of(program, data, count=None):
    bound = BoundProgram(as_program(program))
    with isolated(0):
        return trace_structure(bound.model, bound.guide, as_rows(data).first(count or len(data)))


def many(x, size=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ("pair",)})
    data_plate = pyro.plate("data", size or len(x), subsample=x, dim=-1)
    with pyro.plate("group", 4, dim=-2):
        pyro.sample("scale", dist.Gamma(1.0, 1.0))
        with data_plate:
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.deterministic("twice", 2 * k)
    for i in pyro.plate("loop", 2):
        pyro.sample(f"step_{i}", dist.Poisson(1.0))
    with data_plate:
        pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)


def guide_of_many(x, size=None):
    pyro.sample("loc", dist.Normal(torch.ones(2), 1.0).to_event(1))
    pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("group", 4, dim=-2):
        pyro.sample("scale", dist.Gamma(1.0, 1.0))
    for i in range(2):
        pyro.sample(f"step_{i}", dist.Poisson(1.0), infer={"enumerate": "sequential"})


def test_everything_about_every_site():
    found = structure_of((many, guide_of_many), rows()[:, 0], 10)
    assert list(found.model) == ["loc", "scale", "k", "step_0", "step_1", "x"]
    assert list(found.guide) == ["loc", "helper", "scale", "step_0", "step_1"]
    assert (found.data_plate, found.max_plate_nesting) == ("data", 2)
    sites = found.model
    assert sites["loc"].event_dims == ("pair",)
    assert sites["loc"].plates == ()
    # from left to right, as the dims of a draw
    assert [(p.name, p.dim, p.rows, p.size) for p in sites["k"].plates] == [
        ("group", -2, 4, 4),
        ("data", -1, 10, 40),
    ]
    assert sites["k"].value.shape == (4, 10)
    assert sites["step_0"].plates == ()
    assert [name for name, site in sites.items() if site.discrete] == ["k", "step_0", "step_1"]
    assert sites["k"].enumerable
    assert not sites["step_0"].enumerable
    assert not sites["loc"].enumerable
    assert [site.name for site in found.observed] == ["x"]
    assert [site.name for site in found.enumerated_in_model] == ["k"]
    assert [site.name for site in found.enumerated_in_guide] == ["step_0", "step_1"]
    assert [site.name for site in found.local_latent] == ["k"]
    assert [site.name for site in found.global_latent] == ["loc", "scale", "step_0", "step_1"]
    assert found.guide["helper"].auxiliary
    assert not found.guide["loc"].auxiliary
    assert torch.equal(found.model["loc"].value, found.guide["loc"].value)


def test_the_data_plate_by_another_name():
    def model(x, size=None):
        with pyro.plate("columns", 3, dim=-2), pyro.plate("people", size or len(x), subsample=x, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.T)

    assert structure_of((model, nothing), rows(), 7).data_plate == "people"


def test_no_data_plate():
    def model(x):
        with pyro.plate("columns", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]), obs=x[0])

    def bare(x):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(2), obs=x)

    assert structure_of((model, nothing), rows()).data_plate is None
    found = structure_of((bare, nothing), rows())
    assert (found.data_plate, found.max_plate_nesting) == (None, 0)


def test_without_a_guide_and_without_gradients():
    module = Amortised().double()
    batch = as_rows(rows()).whole()
    found = trace_structure(lambda x, size, index, weight, strata: module.model(x, size), None, batch)
    assert found.guide == {}
    assert not found.model["x"].fn.mean.requires_grad
    assert list(structure_of((mixture, nothing), rows()[:, 0]).model) == ["component", "x"]
