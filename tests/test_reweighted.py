"""What estimators refuse that weigh a KL, what they weigh beside a site that is summed out, and what they look like."""

from __future__ import annotations

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from small_programs import guide_of_mean, mixture, model_of_mean, nothing
from torch.distributions import constraints
from weighted_programs import Labels, N, Program, X, Y

import pyro_lvm as lvm
from pyro_lvm.elbo import Capacity, Entropy, FreeBits, KLWeighted
from pyro_lvm.errors import ProgramError


def test_other_bases_and_arguments_are_refused():
    for base in (RenyiELBO(), TraceGraph_ELBO, "Trace_ELBO", None):
        with pytest.raises(TypeError, match=r"base must be one of Trace_ELBO\(\), TraceMeanField_ELBO\(\), TraceEnum"):
            KLWeighted(base, beta=1.0)
    with pytest.raises(TypeError, match=r"KLWeighted rests on 4\.0: .*a number has a name, KLWeighted\(beta=4\)"):
        KLWeighted(4.0, beta=1.0)
    with pytest.raises(TypeError, match=r"sites is 'z': name the sites in a list, \['z'\]"):
        KLWeighted(beta=1.0, sites="z")
    with pytest.raises(ValueError, match="beta is -1: it must be 0 or more"):
        KLWeighted(beta=-1)
    with pytest.raises(ValueError, match="gamma is 0: it must be positive"):
        Capacity(capacity=1.0, gamma=0)
    with pytest.raises(ValueError, match="capacity is -1"):
        Capacity(capacity=-1)
    with pytest.raises(ValueError, match="per='group' is not known"):
        FreeBits(nats=1.0, per="group")


def test_what_changes_is_an_input_of_the_captured_graph():
    elbo = Capacity(capacity=lvm.schedules.linear(0.0, 1.0), gamma=3.0)
    assert [id(tensor) for tensor in elbo.tensors()] == [id(elbo.capacity.tensor), id(elbo.gamma.tensor)]
    assert KLWeighted(beta=1.0).tensors() != ()
    assert Entropy().tensors() == ()


def test_what_it_looks_like():
    shown = KLWeighted(Trace_ELBO(num_particles=3), beta=2.0, sites=["z"])
    assert repr(shown) == "KLWeighted(Trace_ELBO(num_particles=3), beta=2, sites=['z'])"
    assert repr(Capacity(capacity=25.0)) == "Capacity(TraceMeanField_ELBO(), capacity=25, gamma=1000)"
    assert repr(FreeBits(nats=0.5, per="site")) == "FreeBits(TraceMeanField_ELBO(), nats=0.5, per='site')"


def test_the_check_says_what_is_in_closed_form():
    program = Program()
    for elbo, kl in ((KLWeighted(beta=2.0), "closed form"), (KLWeighted(Trace_ELBO(), beta=2.0), "sampled")):
        assert lvm.check(program, X, elbo=elbo).sites[0].kl == kl


def test_a_given_base_stays_as_it_is():
    base = TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)
    program = Program()
    KLWeighted(base, beta=2.0).loss(program.model, program.guide, X)  # which finds out how plates nest
    lvm.fit(Program(), X, elbo=KLWeighted(base, beta=2.0), steps=2, seed=0)
    assert base.max_plate_nesting == float("inf")


def test_a_site_that_the_model_sums_out_alone_has_nothing_to_weigh():
    x = X[:, 0]
    for elbo in (KLWeighted(TraceEnum_ELBO(), beta=2.0), FreeBits(TraceEnum_ELBO(), nats=1.0)):
        with pytest.raises(ProgramError, match=r"'component' is summed out exactly and has no KL.*use elbo=None"):
            lvm.fit((mixture, nothing), x, elbo=elbo, steps=1)
    with pytest.raises(ProgramError, match=r"cannot sum it out: use base=TraceEnum_ELBO\(\)"):
        lvm.fit((mixture, nothing), x, elbo=KLWeighted(beta=2.0), steps=1)


def mixture_with_a_prior(x, size=None):
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc * k, 1.0), obs=x)


def guide_of_loc(x, size=None):
    pyro.sample("loc", dist.Normal(pyro.param("m", x.new_tensor(0.5)), x.new_tensor(0.7)))


def test_beside_a_site_that_the_model_sums_out_the_others_are_weighed():
    x = X[:, 0]
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(1)
        loc = poutine.trace(guide_of_loc).get_trace(x).nodes["loc"]["value"].item()
        pyro.set_rng_seed(1)
        found = KLWeighted(TraceEnum_ELBO(max_plate_nesting=1), beta=2.5).estimate(
            mixture_with_a_prior, guide_of_loc, (x,), {}
        )
        pyro.set_rng_seed(1)
        entropy = Entropy(TraceEnum_ELBO(max_plate_nesting=1)).estimate(mixture_with_a_prior, guide_of_loc, (x,), {})
    joint = np.log([0.7, 0.3])[:, None] + oracles.normal_logpdf(x.numpy(), np.array([[0.0], [loc]]), 1.0)
    evidence = scipy.special.logsumexp(joint, axis=0).sum()
    log_prior = oracles.normal_logpdf(loc, 0.0, 3.0)
    kl = oracles.normal_logpdf(loc, 0.5, 0.7) - log_prior
    assert -found.loss.item() == pytest.approx(evidence - 2.5 * kl, rel=1e-10)
    assert found.terms.elbo.item() == pytest.approx(evidence - kl, rel=1e-10)
    bound = evidence + log_prior + 0.5 * np.log(2 * np.pi * np.e * 0.49)
    assert -entropy.loss.item() == pytest.approx(bound, rel=1e-10)
    assert entropy.terms.elbo.item() == pytest.approx(bound, rel=1e-10)


def test_a_prior_that_hangs_on_what_is_summed_out_has_no_kl_of_its_own():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(3 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("a", x.new_tensor(0.5)) * x, 0.7))

    with pytest.raises(ProgramError, match=r"prior of site 'z' hangs on 'k'.*give 'k' a guide site"):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(TraceEnum_ELBO(), beta=2.0), steps=1)


def test_a_draw_without_a_path_is_refused_in_a_fit_and_in_plain_pyro():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            rate = pyro.sample("rate", dist.Poisson(x.new_ones(())))
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    def guide(x, size=None):
        rate = pyro.param("r", x.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("rate", dist.Poisson(rate))

    words = r"site 'rate'.*Poisson.*cannot be reparameterised.*make it a distribution with rsample"
    with pytest.raises(ProgramError, match=words):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(Trace_ELBO(), beta=2.0), steps=1)
    with pyro.get_param_store().scope(), pytest.raises(ProgramError, match=words):
        KLWeighted(Trace_ELBO(), beta=2.0).loss(model, guide, X[:, 0])
    program, x = Labels(mark=None), X[: len(Y)]
    with pytest.raises(ProgramError, match=r"mark it infer=.*in the guide and use base=TraceEnum_ELBO\(\)"):
        KLWeighted(Trace_ELBO(), beta=2.0).loss(program.model, program.guide, x, Y)
    for elbo in (KLWeighted(beta=2.0), KLWeighted(TraceEnum_ELBO(), beta=2.0)):
        with pytest.raises(ProgramError, match="nobody sums it out"):
            lvm.fit(program, (x, Y), elbo=elbo, steps=1)


def test_one_label_after_another_is_refused():
    program, x = Labels(mark="sequential"), X[: len(Y)]
    with pytest.raises(ProgramError, match=r'enumerated "sequential".*mark it "parallel"'):
        lvm.fit(program, (x, Y), elbo=KLWeighted(TraceEnum_ELBO(), beta=2.0), steps=1)
    with pytest.raises(ProgramError, match="one value after another"):
        KLWeighted(TraceEnum_ELBO(max_plate_nesting=1), beta=2.0).loss(program.model, program.guide, x, Y)


def test_nats_per_datum_need_data_and_latents_of_their_own():
    x = X[:, 0]
    with pytest.raises(ProgramError, match="weighs nats per datum, and loc is shared by all data"):
        lvm.fit((model_of_mean, guide_of_mean), x, elbo=FreeBits(nats=1.0), steps=1)

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(N), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ProgramError, match="no plate holds the data"):
        Capacity(capacity=1.0).loss(model, guide, x)


def test_a_mean_field_base_must_meet_the_order_of_sites():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x, size=None):
        scale = pyro.param("s", x.new_tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            b = pyro.sample("b", dist.Normal(x, scale))
            pyro.sample("a", dist.Normal(b, 1.0))

    with pytest.raises(ProgramError, match=r"reorder the guide, or use base=Trace_ELBO\(\)"):
        lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(beta=2.0), steps=1)
    lvm.fit((model, guide), X[:, 0], elbo=KLWeighted(Trace_ELBO(), beta=2.0), steps=1)
