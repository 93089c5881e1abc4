"""The semi-supervised VAE: labels where they are known, summed out where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_lvm.likelihoods import make_likelihood
from pyro_lvm.models.amortised import DiagonalNormal, evaluating, matching, require_columns
from pyro_lvm.models.classifier_smoothness import classifier_smoothness
from pyro_lvm.networks import MLP, LabelledMLP
from pyro_lvm.side_by_side import SideBySide
from pyro_lvm.storage.classes import storable
from pyro_lvm.walk import by_rows

__all__ = ["SemiSupervisedVAE"]


@storable
class SemiSupervisedVAE(nn.Module):
    r"""Kingma's M2: a VAE whose class label is observed for some data and latent for the others.

    .. math::
        y_i \sim \operatorname{Cat}(1/C), \quad z_i \sim N(0, I_L), \quad x_i \mid y_i, z_i \sim p(x \mid f(z_i, y_i)),
        \qquad q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)

    Where :math:`y_i = -1` the label is unknown and enumeration sums it out; elsewhere the guide's q(y | x) is
    clamped to it. Both kinds stand in one batch. The bound per datum is

    .. math::
        E_{q(z \mid x, y)}[\log p(x, y, z) - \log q(z \mid x, y)] \text{ (labelled)}, \qquad
        \sum_y q(y \mid x)\, (\,\cdot_y - \log q(y \mid x)) \text{ (unlabelled)}

    The labelled bound does not train the classifier q(y | x), so `auxiliary_loss` adds
    :math:`\alpha` times the mean of :math:`-\log q(y \mid x)` over labelled data, and :math:`\gamma` times the
    regulariser of `pyro_lvm.models.classifier_smoothness`, which asks q for sure, even labels that do not change
    nearby. Both are optimised and never part of the ELBO. Minibatches are stratified (`strata`): each holds labelled
    rows, and row weights keep the bound unbiased. Encoder and decoder see a labelled row of such a batch once, and the
    others once for every class, unless one of them normalises its batch; the bound is the same. A subclass with
    ``strata`` of its own names rows of known labels first.

    Sites: ``y`` (plate "data"; enumerated in the guide), ``z`` (plate "data"; event (L,), dimension "latent"), ``x``
    (plate "data"; event (D,), dimension "feature"; observed). Estimator: `TraceEnum_ELBO`.

    When it is wrong: nothing ties class k of the model to label k but the labelled data; with a handful of them a
    cluster may take the wrong name and keep it. The bound alone moves the classifier little within a few epochs,
    because z can explain a digit without y: on MNIST with 100 labels most of the accuracy comes from the regulariser,
    which supposes that all classes are equally frequent. Set ``smoothness_weight=0`` where they are not, and for
    Kingma's own objective.

    Source: Kingma, Rezende, Mohamed & Welling, 2014, https://arxiv.org/abs/1406.5298.

    Args:
        num_features: D, numbers per datum.
        num_classes: C, labels 0, ..., C - 1.
        latent_dim: L.
        hidden: widths of the hidden layers of each network.
        likelihood: a name of `pyro_lvm.likelihoods.make_likelihood` or a likelihood module.
        classifier_weight: :math:`\alpha`, nats per datum; 0 turns the classifier term off.
        smoothness_weight: :math:`\gamma`, nats per datum; 0 turns the regulariser off.
        labelled_share: share of each minibatch that is labelled, as far as there are labels.
        encoder_sees_label: whether the guide is q(y|x) q(z|x,y), or else q(y|x) q(z|x).
        classifier: any module from (..., D) to (..., C) logits. None makes an `MLP` with batch normalisation.
        encoder: any module from (x, y), or x alone, to (..., 2 L). None makes a `LabelledMLP` (or an `MLP`).
        decoder: any module from (z, y) to (..., D * the likelihood's `num_parameters`). None makes a `LabelledMLP`.

    Raises:
        ValueError: if a size is below 1 or ``classifier_weight`` negative; from `model` and `guide`, if x has not D
            columns, a label is not in -1, ..., C - 1, or ``strata`` counts one as known that is -1.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> digits = lvm.datasets.digits()
        >>> y = lvm.datasets.hide_labels(digits.train.y, keep=100, seed=0)
        >>> ssvae = lvm.SemiSupervisedVAE(64, num_classes=10, latent_dim=5, hidden=(32,), likelihood="normal")
        >>> fit = lvm.fit(ssvae, (digits.train.x, y), steps=5, batch_size=100, seed=0)
        >>> ssvae.classify(digits.test.x).shape == (len(digits.test.x), 10)
        True
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        latent_dim: int,
        hidden: Sequence[int] = (500,),
        likelihood: str | nn.Module = "bernoulli",
        *,
        classifier_weight: float = 100.0,
        smoothness_weight: float = 100.0,
        labelled_share: float = 0.25,
        encoder_sees_label: bool = True,
        classifier: nn.Module | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(num_features, num_classes, latent_dim) < 1:
            raise ValueError(
                f"num_features={num_features}, num_classes={num_classes} and latent_dim={latent_dim} must all be at "
                "least 1"
            )
        if min(classifier_weight, smoothness_weight) < 0 or not 0 <= labelled_share < 1:
            raise ValueError(
                f"classifier_weight={classifier_weight} and smoothness_weight={smoothness_weight} must not be "
                f"negative, and labelled_share={labelled_share} must lie in [0, 1)"
            )
        self.num_features, self.num_classes, self.latent_dim = num_features, num_classes, latent_dim
        self.classifier_weight, self.smoothness_weight = classifier_weight, smoothness_weight
        self.labelled_share = labelled_share
        self.encoder_sees_label = encoder_sees_label
        self._given = {"hidden": tuple(hidden), "classifier": classifier, "encoder": encoder, "decoder": decoder}
        self.likelihood: Any = make_likelihood(likelihood, num_features)
        self.classifier = classifier or MLP(num_features, hidden, num_classes, batch_norm=True)
        if encoder is None:
            sizes = (hidden, 2 * latent_dim)
            labelled = encoder_sees_label
            encoder = LabelledMLP(num_features, num_classes, *sizes) if labelled else MLP(num_features, *sizes)
        self.encoder = DiagonalNormal(encoder, latent_dim, "encoder")
        num_outputs = num_features * self.likelihood.num_parameters
        self.decoder = decoder or LabelledMLP(latent_dim, num_classes, tuple(reversed(hidden)), num_outputs)

    def model(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        size: int | None = None,
        weight: Tensor | None = None,
        strata: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The generative story; x: rows (batch, D), or None to draw ``size`` rows. The guide clamps known labels.

        With ``strata`` the first ``strata[0]`` labels are known, and their rows are computed for these alone.
        """
        require_columns(x, self.num_features)
        with pyro.plate("data", size or len(x), subsample=x), _weighted(weight):  # type: ignore[arg-type]
            label = pyro.sample("y", self.label_prior())
            z = pyro.sample("z", self.prior(), infer={"event_dims": ("latent",)})  # type: ignore[arg-type]
            decoded = self._decoded(z, label, y, strata)
            return pyro.sample("x", decoded, obs=x, infer={"event_dims": ("feature",)})  # type: ignore[arg-type]

    def guide(
        self,
        x: Tensor,
        y: Tensor | None = None,
        size: int | None = None,
        weight: Tensor | None = None,
        strata: tuple[int, ...] | None = None,
    ) -> Tensor:
        """q(y | x), clamped where y (batch,) is not -1, then q(z | x, y); strata as in `model`."""
        require_columns(x, self.num_features)
        logits = self.classifier(x)
        if y is not None:
            logits = self._clamped(logits, y)
        with pyro.plate("data", size or len(x), subsample=x), _weighted(weight):
            label = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            return pyro.sample("z", self._encoded(x, label, y, strata))

    def label_prior(self) -> TorchDistribution:
        """p(y): every class alike."""
        reference = next(self.parameters())
        return dist.Categorical(logits=reference.new_zeros(self.num_classes))

    def prior(self) -> TorchDistribution:
        """p(z), event shape (L,)."""
        reference = next(self.parameters())
        prior: TorchDistribution = dist.Normal(reference.new_zeros(()), reference.new_ones(()))
        return prior.expand([self.latent_dim]).to_event(1)  # type: ignore[no-any-return]

    def auxiliary_loss(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`\alpha \operatorname{mean}_{\text{labelled}} -\log q(y \mid x) + \gamma R`, nats per datum."""
        known = y >= 0
        loss = x.new_zeros(())
        if self.classifier_weight > 0:
            surprise = nn.functional.cross_entropy(self.classifier(x), y.long().clamp(min=0), reduction="none")
            loss = loss + self.classifier_weight * torch.where(known, surprise, 0.0).sum() / known.sum().clamp(min=1)
        if self.smoothness_weight > 0:
            loss = loss + self.smoothness_weight * classifier_smoothness(self.classifier, x, ~known)
        return loss

    def strata(self, x: Any, y: Any, *, batch_size: int) -> list[tuple[Tensor, int]]:
        """Labelled and unlabelled rows, and how many of each a minibatch holds."""
        labels = torch.as_tensor(y)
        self._check_labels(labels)
        known = (labels >= 0).cpu()
        wanted = round(self.labelled_share * batch_size)
        count = min(max(1, wanted), int(known.sum()), batch_size - 1)
        return [(known.nonzero().squeeze(-1), count), ((~known).nonzero().squeeze(-1), batch_size - count)]

    @by_rows()
    def classify(self, x: Any) -> Tensor:
        """q(y | x) for rows x (n, D), any data (labels in them are not looked at); shape (n, C)."""
        with evaluating(self):
            probabilities: Tensor = self.classifier(matching(self, x)).softmax(-1)
            return probabilities

    @by_rows()
    def encode(self, x: Any, y: Any = None) -> TorchDistribution:
        """q(z | x, y), batch shape (n,), event shape (L,); labels that are not given are the classifier's best.

        Any data are taken, also such as hold x and y; -1 is a label that is not given.
        """
        with evaluating(self):
            x = matching(self, x)
            label = self._completed(x, y)
            encoded: TorchDistribution = self.encoder(x, label) if self.encoder_sees_label else self.encoder(x)
            return encoded

    def decode(self, z: Tensor, y: Tensor) -> TorchDistribution:
        """p(x | z, y) for latents z (..., L) and labels y (...)."""
        with evaluating(self):
            z = matching(self, z)
            return self._likelihood_of(z, torch.as_tensor(y, device=z.device))

    @by_rows()
    def reconstruct(self, x: Any) -> Tensor:
        """E[x' | z, y] at the encoder's mean and the classifier's best label, shape (n, D); x: any data."""
        label = self.classify(x).argmax(-1)
        return self.decode(self.encode(x, label).mean, label).mean

    def sample(self, n: int, y: Tensor | int | None = None, seed: int | None = None, *, mean: bool = False) -> Tensor:
        """Draw n data of class y (one label, or n of them; None draws labels too), shape (n, D)."""
        with evaluating(self, seed):
            drawn = self.label_prior().sample((n,)) if y is None else torch.as_tensor(y).expand(n)
            self._check_labels(drawn, lowest=0)
            decoded = self.decode(self.prior().sample((n,)), drawn)
            return decoded.mean if mean else decoded.sample()

    def _completed(self, x: Tensor, y: Any) -> Tensor:
        """Labels (n,), the classifier's best where none is given."""
        given = None if y is None else torch.as_tensor(y, device=x.device)
        if given is not None and bool((given >= 0).all()):
            return given
        best = self.classifier(x).argmax(-1)
        return best if given is None else torch.where(given >= 0, given, best)

    def _encoded(self, x: Tensor, label: Tensor, y: Tensor | None, strata: tuple[int, ...] | None) -> TorchDistribution:
        if not self.encoder_sees_label:
            return self.encoder(x)  # type: ignore[no-any-return]
        known = self._known_first(label, y, strata)
        if known is None:
            return self.encoder(x, label)  # type: ignore[no-any-return]
        first = self.encoder.network(*_of_known(x[: len(known)], known))
        rest = self.encoder.network(x[len(known) :], label)
        return self.encoder.normal(torch.cat([first.expand(*rest.shape[:-2], -1, -1), rest], -2))

    def _decoded(self, z: Tensor, label: Tensor, y: Tensor | None, strata: tuple[int, ...] | None) -> TorchDistribution:
        known = self._known_first(label, y, strata)
        if known is None:
            return self._likelihood_of(z, label)
        first, rest = z[..., : len(known), :], z[..., len(known) :, :]
        if z.dim() > label.dim():  # draws that differ from label to label: the known label's
            at = known.clamp(min=0).reshape(-1, 1).expand(*(1 for _ in label.shape[:-1]), -1, -1)
            first = first.take_along_dim(at, 0).squeeze(0)
        return SideBySide(self._likelihood_of(*_of_known(first, known)), self._likelihood_of(rest, label))

    def _known_first(self, label: Tensor, y: Tensor | None, strata: tuple[int, ...] | None) -> Tensor | None:
        """The known labels, shape (m,), of the rows that stand first, if these are computed for them alone.

        They have all the probability: what stands in the table at other labels is multiplied by nought.
        """
        enumerated = label.shape[-1] == 1
        if y is None or strata is None or not enumerated or not 0 < strata[0] < len(y) or not self._row_by_row():
            return None
        known = y[: strata[0]].long()
        unknown = int((known < 0).sum()) if pyro.settings.get("validate_infer") else 0
        if unknown:
            raise ValueError(
                f"strata[0]={strata[0]} says that the first {strata[0]} labels y are known, but {unknown} of them are "
                "-1: let the rows of known labels stand first, or drop strata="
            )
        return known

    def _row_by_row(self) -> bool:
        """Whether no network looks from row to row, as one does that normalises its batch."""
        modules = (*self.encoder.modules(), *self.decoder.modules())
        return not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)

    def _likelihood_of(self, z: Tensor, label: Tensor) -> TorchDistribution:
        decoded: TorchDistribution = self.likelihood(self.decoder(z, label))
        return decoded

    def _clamped(self, logits: Tensor, y: Tensor) -> Tensor:
        if pyro.settings.get("validate_infer"):
            self._check_labels(y)
        known = (y >= 0).unsqueeze(-1)
        chosen = y.unsqueeze(-1) == torch.arange(self.num_classes, device=y.device)
        certain = torch.where(chosen, 0.0, -torch.inf).to(logits.dtype)
        return torch.where(known, certain, logits)

    def _check_labels(self, y: Tensor, lowest: int = -1) -> None:
        if y.is_floating_point():
            raise ValueError(f"labels y have dtype {y.dtype}: pass integers, -1 where a label is unknown (y.long())")
        if y.numel() and not lowest <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"labels y range from {int(y.min())} to {int(y.max())}, but num_classes={self.num_classes} allows "
                f"{lowest} to {self.num_classes - 1}: renumber them, or raise num_classes"
            )


def _of_known(inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of rows that are said to be known: where one is not, NaN, so that no step is taken on it."""
    return torch.where((y < 0).unsqueeze(-1), torch.nan, inputs), y.clamp(min=0)


def _weighted(weight: Tensor | None) -> Any:
    return poutine.scale(scale=1.0 if weight is None else weight)
