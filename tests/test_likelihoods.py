"""Likelihoods against scipy's densities, at the borders of their support, and far out where decoders start."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from pyro_lvm.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Likelihood,
    Normal,
    NormalFixed,
    NormalPerDatum,
    NormalPerFeature,
    Poisson,
    make_likelihood,
)
from pyro_lvm.likelihoods.grey import TiltedUniform

D = 3


def bits(*shape):
    return torch.randint(2, shape).double()


def levels(*shape):
    return torch.rand(shape, dtype=torch.float64)


def reals(*shape):
    return torch.randn(shape, dtype=torch.float64)


def counts(*shape):
    return torch.randint(9, shape).double()


def categories(*shape):
    return torch.randint(5, shape).double()


# the likelihood, draws from its support, the oracle of log p(x | raw) per feature
CASES = {
    "bernoulli": (lambda: Bernoulli(D), bits, oracles.bernoulli_logpmf),
    "continuous_bernoulli": (lambda: ContinuousBernoulli(D), levels, oracles.continuous_bernoulli_logpdf),
    "normal_fixed": (lambda: NormalFixed(D, scale=0.7), reals, lambda x, r: scipy.stats.norm.logpdf(x, r, 0.7)),
    "normal": (lambda: Normal(D, initial_scale=0.4), reals, lambda x, r: scipy.stats.norm.logpdf(x, r, 0.4)),
    "normal_per_feature": (
        lambda: NormalPerFeature(D, initial_scale=0.4),
        reals,
        lambda x, r: scipy.stats.norm.logpdf(x, r, 0.4),
    ),
    "normal_per_datum": (
        lambda: NormalPerDatum(D, floor=0.1),
        reals,
        lambda x, r: scipy.stats.norm.logpdf(x, r[..., :D], 0.1 + oracles.softplus(r[..., D:])),
    ),
    "categorical": (
        lambda: Categorical(D, num_categories=5),
        categories,
        lambda x, r: oracles.categorical_logpmf(x, np.moveaxis(r.reshape(*r.shape[:-1], 5, D), -2, -1)),
    ),
    "poisson": (
        lambda: Poisson(D, floor=0.01),
        counts,
        lambda x, r: scipy.stats.poisson.logpmf(x, 0.01 + oracles.softplus(r)),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    make, draw, oracle = CASES[request.param]
    likelihood = make().double()
    if isinstance(likelihood, Normal):
        likelihood.reset_parameters()  # the start again, in float64
    return likelihood, draw, oracle


def test_log_prob_is_scipys(case):
    likelihood, draw, oracle = case
    raw = 3 * reals(50, D * likelihood.num_parameters)
    x = draw(50, D)
    expected = oracle(x.numpy(), raw.numpy()).sum(-1)
    np.testing.assert_allclose(likelihood(raw).log_prob(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_leading_dimensions_and_events(case):
    likelihood, draw, oracle = case
    raw = reals(2, 4, 5, D * likelihood.num_parameters)
    x = draw(5, D)
    distribution = likelihood(raw)
    assert (distribution.batch_shape, distribution.event_shape) == ((2, 4, 5), (D,))
    expected = oracle(x.numpy(), raw.numpy()).sum(-1)
    np.testing.assert_allclose(distribution.log_prob(x).detach(), expected, rtol=1e-9, atol=1e-9)
    assert likelihood.mean(raw).shape == (2, 4, 5, D)
    assert likelihood(raw[0, 0, 0]).batch_shape == ()


def test_draws_have_the_mean_and_lie_in_the_support(case):
    likelihood, _, _ = case
    raw = reals(D * likelihood.num_parameters)
    draws = likelihood(raw).sample((20_000,))
    assert likelihood(raw).support.check(draws).all()
    draws = draws.double()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - likelihood.mean(raw)).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_far_out(case, dtype):
    likelihood, draw, _ = case
    likelihood.to(dtype)
    border = {bits: [0.0, 1.0], levels: [0.0, 0.5, 1.0], reals: [-1e3, 0.0, 1e3], counts: [0.0, 1e4]}
    far = torch.tensor([-1e3, -89.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 89.0, 1e3], dtype=dtype)
    rows = torch.cartesian_prod(*[far] * min(likelihood.num_parameters, 2))
    rows = rows.reshape(len(rows), -1).repeat(1, 5)[:, : likelihood.num_parameters]
    raw = rows.repeat_interleave(D, dim=1).requires_grad_()  # all first numbers, then all second ones
    for value in border.get(draw, [0.0, 4.0]):
        log_prob = likelihood(raw).log_prob(torch.full((D,), value, dtype=dtype))
        assert log_prob.isfinite().all()
        inputs = [raw, *likelihood.parameters()]
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(log_prob.sum(), inputs))
        assert likelihood.mean(raw).isfinite().all()


def test_gradients_are_finite_differences(case):
    likelihood, draw, _ = case
    x = draw(4, D)
    for size in (1e-3, 1.0, 20.0):
        raw = (size * reals(4, D * likelihood.num_parameters)).requires_grad_()
        assert torch.autograd.gradcheck(lambda raw: likelihood(raw).log_prob(x), (raw,))
    at_zero = torch.zeros(4, D * likelihood.num_parameters, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda raw: likelihood(raw).log_prob(x), (at_zero,))


def test_float32_agrees_with_float64(case):
    likelihood, draw, _ = case
    raw, x = 10 * reals(200, D * likelihood.num_parameters), draw(200, D).float()
    exact = likelihood(raw.float().double()).log_prob(x.double())
    single = likelihood.float()(raw.float()).log_prob(x)
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_it_stands_in_a_model_with_particles_on_the_left(case):
    likelihood, draw, _ = case
    x = draw(5, D)

    def model():
        with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
            pyro.sample("x", likelihood(reals(7, 5, D * likelihood.num_parameters)), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["fn"].log_prob(x).shape == (7, 5)


def test_unit_scale_is_the_squared_error_with_its_constants():
    x, raw = reals(6, D), reals(6, D)
    squared_error = ((x - raw) ** 2).sum(-1) / 2
    log_prob = NormalFixed(D, scale=1.0)(raw).log_prob(x)
    torch.testing.assert_close(-log_prob, squared_error + D / 2 * math.log(2 * math.pi), rtol=1e-12, atol=1e-12)


NATURAL = [-1e3, -300.0, -16.5, -0.51, -0.49, -1e-3, 0.0, 1e-8, 0.3, 0.5, 4.0, 40.0, 1e3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_integrates_to_one(dtype):
    nodes, weights = np.polynomial.legendre.leggauss(600)
    nodes, weights = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    natural = torch.tensor(NATURAL, dtype=dtype)
    density = TiltedUniform(natural).log_prob(nodes[:, None].to(dtype)).double().exp()
    moments = [(weights[:, None] * nodes[:, None] ** power * density).sum(0) for power in (0, 1, 2)]
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype is torch.float64 else 2e-4}
    torch.testing.assert_close(moments[0], torch.ones(len(NATURAL), dtype=torch.float64), **tolerance)
    torch.testing.assert_close(TiltedUniform(natural).mean.double(), moments[1], **tolerance)
    variance = moments[2] - moments[1] ** 2
    torch.testing.assert_close(TiltedUniform(natural).variance.double(), variance, **tolerance)


def test_continuous_bernoulli_is_torchs_where_torch_is_exact():
    natural, x = torch.linspace(-20, 20, 41, dtype=torch.float64), levels(10, 1)
    torchs = dist.ContinuousBernoulli(logits=natural, lims=(0.499, 0.501))
    torch.testing.assert_close(TiltedUniform(natural).log_prob(x), torchs.log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("natural", [-1e3, -0.3, 0.0, 5.0, 1e3])
def test_draws_of_the_continuous_bernoulli(natural):
    distribution = TiltedUniform(torch.tensor(natural, dtype=torch.float64)).expand((3,))
    draws = distribution.rsample((5000,))
    assert draws.shape == (5000, 3)
    assert ((draws >= 0) & (draws <= 1)).all()
    rate = abs(natural) or 1e-12
    from_end = (1 - draws if natural > 0 else draws).flatten().numpy()
    assert scipy.stats.kstest(from_end, scipy.stats.truncexpon(b=rate, scale=1 / rate).cdf).pvalue > 1e-4


def test_continuous_bernoulli_validates():
    with pytest.raises(ValueError, match="support"):
        TiltedUniform(torch.zeros(2)).log_prob(torch.tensor([0.5, 1.5]))
    assert TiltedUniform(torch.zeros(2), validate_args=False).log_prob(torch.tensor([0.5, 1.5])).shape == (2,)


@pytest.mark.parametrize("make", [Normal, NormalPerFeature])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_never_crossed_by_a_learned_scale(make, dtype):
    likelihood = make(D, floor=0.25).to(dtype)
    for raw_scale in (-1e3, -50.0, 0.0, 1e3):
        nn.init.constant_(likelihood.raw_scale, raw_scale)
        assert (likelihood.scale >= 0.25).all()
        log_prob = likelihood(torch.zeros(D, dtype=dtype)).log_prob(torch.zeros(D, dtype=dtype))
        assert log_prob <= -D * math.log(0.25 * math.sqrt(2 * math.pi)) + 1e-6
        (gradient,) = torch.autograd.grad(log_prob, likelihood.raw_scale)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("raw", [-1e3, -50.0, 0.0, 1e3])
def test_the_floor_is_never_crossed_by_the_decoder(raw):
    raws = torch.full((2 * D,), raw, dtype=torch.float64)
    assert (NormalPerDatum(D, floor=0.25)(raws).stddev >= 0.25).all()
    assert (Poisson(2 * D, floor=0.25).mean(raws) >= 0.25).all()


def test_learned_scales():
    assert dict(NormalFixed(D).named_parameters()) == {}
    assert NormalFixed(D).constrained() == {}
    for make, shape in ((Normal, ()), (NormalPerFeature, (D,))):
        likelihood = make(D, initial_scale=0.3).double()
        assert [(name, tuple(p.shape)) for name, p in likelihood.named_parameters()] == [("raw_scale", shape)]
        nn.init.constant_(likelihood.raw_scale, 2.0)
        likelihood.reset_parameters()
        torch.testing.assert_close(likelihood.scale, torch.full(shape, 0.3, dtype=torch.float64))
        assert set(likelihood.constrained()) == {"scale"}
        assert torch.equal(likelihood.constrained()["scale"], likelihood.scale)


@pytest.mark.parametrize("initial_scale", [2e-3, 1.0, 800.0])
def test_any_initial_scale_is_hit(initial_scale):
    likelihood = Normal(1, initial_scale=initial_scale).double()
    likelihood.reset_parameters()
    assert likelihood.scale.item() == pytest.approx(initial_scale, rel=1e-9)


def test_scales_of_features_differ():
    likelihood = NormalPerFeature(2).double()
    likelihood.raw_scale.data = torch.tensor([0.0, 3.0], dtype=torch.float64)
    x, raw = reals(5, 2), reals(5, 2)
    expected = scipy.stats.norm.logpdf(x, raw, 1e-3 + oracles.softplus(np.array([0.0, 3.0]))).sum(-1)
    np.testing.assert_allclose(likelihood(raw).log_prob(x).detach(), expected, rtol=1e-12)


def test_categorical_takes_integers_too():
    likelihood, raw = Categorical(2, num_categories=3), reals(4, 6)
    x = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0]])
    assert torch.equal(likelihood(raw).log_prob(x), likelihood(raw).log_prob(x.double()))
    assert Categorical(2).num_parameters == 256


def test_a_decoder_of_the_wrong_size_is_refused(case):
    likelihood, _, _ = case
    expected = D * likelihood.num_parameters
    message = (
        rf"{type(likelihood).__name__} likelihood expects .* = {expected} raw numbers.*\(2, 1\).*{expected} outputs"
    )
    for function in (likelihood, likelihood.mean):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bernoulli(0), r"num_features must be at least 1, but got 0"),
        (lambda: NormalFixed(2, scale=0.0), r"scale must be positive and finite, but got 0.0"),
        (lambda: NormalFixed(2, scale=math.nan), r"but got nan"),
        (lambda: Normal(2, floor=0.0), r"floor must be positive and finite, but got 0.0.*unbounded"),
        (lambda: NormalPerDatum(2, floor=math.inf), r"floor must be positive and finite, but got inf"),
        (
            lambda: Normal(2, initial_scale=0.1, floor=0.1),
            r"initial_scale must be finite and above floor=0.1, .*got 0.1",
        ),
        (lambda: Poisson(2, floor=-1.0), r"floor must be positive and finite, but got -1.0"),
        (lambda: Categorical(2, num_categories=1), r"num_categories must be at least 2, but got 1"),
    ],
)
def test_impossible_likelihoods_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_name_makes_its_likelihood():
    kinds = {
        "bernoulli": Bernoulli,
        "continuous_bernoulli": ContinuousBernoulli,
        "normal": Normal,
        "normal_fixed": NormalFixed,
        "normal_per_feature": NormalPerFeature,
        "normal_per_datum": NormalPerDatum,
        "categorical": Categorical,
        "poisson": Poisson,
    }
    for name, kind in kinds.items():
        likelihood = make_likelihood(name, 4)
        assert type(likelihood) is kind
        assert likelihood.num_features == 4
    assert make_likelihood("normal_fixed", 4).scale == 1.0
    with pytest.raises(ValueError, match="'gaussian' is neither") as error:
        make_likelihood("gaussian", 4)
    assert all(repr(name) in str(error.value) for name in kinds)


class Laplace(nn.Module):
    """A likelihood of a user's own, without the base class."""

    num_parameters = 1

    def forward(self, raw):
        return dist.Laplace(raw, 1.0).to_event(1)


class Unsized(nn.Module):
    pass


def test_modules_are_taken_as_they_are():
    for mine in (Laplace(), Categorical(4, num_categories=3)):
        assert make_likelihood(mine, 4) is mine


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Unsized(), r"Unsized has no integer num_parameters"),
        (Bernoulli(3), r"Bernoulli was built for num_features=3, but the data have 4"),
        (Bernoulli, r"Bernoulli.*neither.*an instance"),
        (None, r"None is neither"),
    ],
)
def test_what_is_no_likelihood_is_refused(what, message):
    with pytest.raises(ValueError, match=message):
        make_likelihood(what, 4)


def test_the_base_class_asks_for_forward():
    with pytest.raises(NotImplementedError):
        Likelihood(2)(torch.zeros(2))
