"""Programs whose bounds are known part by part, and one evaluation of an estimator on them."""

from __future__ import annotations

from collections import deque

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import scipy.special
import torch
from small_programs import Amortised, rows
from torch import nn

N = 40
X = rows(N)
LATENT = 3


class Program(Amortised):
    """q(z | x) = N(encoder(x), scale) with units of very different KL; remembers its draws."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(3, LATENT)
        self.double()
        with torch.no_grad():
            self.encoder.weight.mul_(torch.tensor([[0.05], [1.0], [3.0]]))
            self.encoder.bias.mul_(torch.tensor([0.1, 1.0, 3.0]))
            self.log_scale.copy_(torch.tensor([-0.05, -0.4, -1.0]))
        self.drawn = []

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))
        self.drawn.append(z.detach().numpy())

    def kl(self, x=X):
        """KL of every datum and unit, (n, L)."""
        loc, scale = self.encoder(x).detach().numpy(), self.log_scale.exp().detach().numpy()
        return oracles.normal_kl(loc, scale, np.zeros(1), np.ones(1))

    def reconstruction(self, z, x=X):
        loc = z @ self.decoder.weight.detach().numpy().T + self.decoder.bias.detach().numpy()
        return oracles.normal_logpdf(x.numpy(), loc, 1.0).sum(-1)

    def ignoring(self):
        """The same with a decoder that does not look at z, so that the reconstruction is no matter of chance."""
        with torch.no_grad():
            self.decoder.weight.zero_()
        return self


class Labels(nn.Module):
    """y of 3 classes, enumerated in the guide and known for some rows; z drawn for each class."""

    def __init__(self, mark="parallel", columns=2):
        super().__init__()
        torch.manual_seed(2)
        self.mark = mark
        self.classifier, self.encoder = nn.Linear(3, 3).double(), nn.Linear(3, columns).double()
        self.by_class = nn.Parameter(torch.tensor([-1.0, 0.1, 2.0], dtype=torch.float64))
        self.decoder = nn.Linear(columns, 3).double()
        self.drawn = deque(maxlen=1)  # the last: a list that grows in every call could not be captured

    def model(self, x, y, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=x.new_tensor([0.5, 0.0, -0.5])))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + label.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide(self, x, y, size=None):
        known = torch.where(torch.arange(3) == y.unsqueeze(-1), 0.0, -torch.inf).to(x)
        logits = torch.where((y >= 0).unsqueeze(-1), known, self.classifier(x))
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": self.mark})
            loc = self.encoder(x) + self.by_class[label].unsqueeze(-1)
            self.drawn.append(pyro.sample("z", dist.Normal(loc, 0.6).to_event(1)).detach())

    def by_hand(self, x, y):
        """Reconstruction, KL of y, sampled KL of z by unit (2,), E[log p(y, z)] and H[z | y]: sums over rows."""
        q = scipy.special.softmax(self.classifier(x).detach().numpy(), -1)
        q = np.where(y.numpy()[:, None] >= 0, np.arange(3) == y.numpy()[:, None], q)  # (n, 3)
        prior = scipy.special.log_softmax([0.5, 0.0, -0.5])
        z = self.drawn[-1].numpy()  # (3, n, 2)
        labels = np.arange(3)[:, None, None]
        decoded = z @ self.decoder.weight.detach().numpy().T + self.decoder.bias.detach().numpy() + labels
        reconstruction = (q.T * oracles.normal_logpdf(x.numpy(), decoded, 0.8).sum(-1)).sum()
        loc = self.encoder(x).detach().numpy() + self.by_class.detach().numpy()[:, None, None]
        log_ratio = oracles.normal_logpdf(z, loc, 0.6) - oracles.normal_logpdf(z, 0.0, 1.0)
        kl_z = (q.T[..., None] * log_ratio).sum((0, 1))
        kl_y = (scipy.special.xlogy(q, q) - q * prior).sum()
        negative_entropy = -len(x) * 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(0.6))
        log_prior_z = (q.T[..., None] * oracles.normal_logpdf(z, 0.0, 1.0)).sum()
        return reconstruction, kl_y, kl_z, negative_entropy - log_prior_z


Y = torch.tensor([-1, 2, -1, 0, 1, -1, -1, -1])


def evaluated(elbo, program, *args, seed=1, **kwargs):
    """Loss, gradient by parameter, and terms of one evaluation."""
    pyro.set_rng_seed(seed)
    found = elbo.estimate(program.model, program.guide, args, kwargs)
    parameters = dict(program.named_parameters())
    gradients = torch.autograd.grad(found.surrogate, list(parameters.values()), allow_unused=True)
    zero = torch.zeros(())
    return found.loss.item(), dict(zip(parameters, (zero if g is None else g for g in gradients), strict=True)), found


def base_loss(base, program, *args, seed=1):
    pyro.set_rng_seed(seed)
    loss = base.differentiable_loss(program.model, program.guide, *args)
    gradients = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return loss.item(), gradients
