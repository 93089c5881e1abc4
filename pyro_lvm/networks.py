r"""Networks for amortised models: a perceptron and small convolutional nets. Torch alone, no Pyro.

Two contracts tie a network to a model; any `torch.nn.Module` that keeps them can stand in for these:

- an **encoder** maps data :math:`(\dots, D)` to :math:`(\dots, 2L)`: the location of each of the :math:`L` latent
  coordinates, then the raw (unconstrained) scale of each;
- a **decoder** maps latents :math:`(\dots, L)` to :math:`(\dots, D P)`: the raw parameters of the likelihood, number
  :math:`p` of feature :math:`d` at position :math:`p D + d`, with :math:`P` numbers per feature
  (`num_parameters` of the likelihood).

The dots stand for any number of dimensions, none included: particles and enumerated sites add dimensions on the
left, so a network may not assume that its input is a matrix. Networks end in a linear layer; the constraint on the
output belongs to whoever reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from pyro_lvm.storage.classes import storable

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "LabelledMLP"]

Activation = Callable[[], nn.Module]


class HiddenLinear(nn.Linear):
    r"""An affine map that an activation follows: it starts as He et al. (2015) propose, with a bias of zero.

    .. math:: y = W x + b, \quad W_{ij} \sim U(-a, a), \quad a = \sqrt{6 / \text{fan in}}, \quad b = 0

    Half-wave rectified signals then keep their size from layer to layer, where torch's own start shrinks them by a
    factor of about 2.4 in each, which costs a deep network many epochs. The last layer of a network is better left
    with torch's small start. The rule sits on the layer that owns the numbers: applied further up, it would be undone
    by whoever resets a model by calling `reset_parameters` on every module that owns parameters.

    Source: He, Zhang, Ren and Sun (2015), https://arxiv.org/abs/1502.01852.
    """

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator and set the bias to zero."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BatchNorm(nn.BatchNorm1d):
    r"""Batch normalisation of rows with any number of leading dimensions, one row included.

    .. math:: y = \gamma \frac{h - \bar h}{\sqrt{\operatorname{Var} h + \epsilon}} + \beta

    Mean and variance are the batch's while training and running averages otherwise; a batch of a single row, which has
    no variance, is normalised by the running averages too.

    Source: Ioffe and Szegedy (2015), https://arxiv.org/abs/1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (..., width)."""
        rows = x.reshape(-1, x.shape[-1])
        average = not self.training or len(rows) < 2
        normalised = functional.batch_norm(
            rows,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=not average,
            momentum=0.1,
            eps=self.eps,
        )
        return normalised.reshape(x.shape)


@storable
class MLP(nn.Module):
    r"""A multi-layer perceptron: affine maps with an activation between them, and none after the last.

    .. math:: h_0 = x, \quad h_k = a(W_k h_{k-1} + b_k) \; (k = 1 \dots K), \quad f(x) = W_{K+1} h_K + b_{K+1}

    Maps (..., num_inputs) to (..., num_outputs). With `hidden=()` it is one affine map.

    Args:
        num_inputs: numbers per row that come in.
        hidden: widths of the hidden layers, first to last.
        num_outputs: numbers per row that go out; 2 * latent_dim for an encoder.
        activation: makes one activation module per hidden layer.
        batch_norm: whether every hidden layer is normalised over the batch before the activation (`BatchNorm`); a
            row's output then depends a little on its batch while training, and not in eval mode.

    Raises:
        ValueError: a width is below 1; or, when called, x does not have `num_inputs` columns.

    Example:
        >>> import torch
        >>> encoder = MLP(784, (400,), 2 * 20)
        >>> encoder(torch.zeros(3, 5, 784)).shape
        torch.Size([3, 5, 40])
    """

    def __init__(
        self,
        num_inputs: int,
        hidden: Sequence[int],
        num_outputs: int,
        activation: Activation = nn.ReLU,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = (num_inputs, *hidden, num_outputs)
        if min(widths) < 1:
            raise ValueError(
                f"num_inputs, hidden and num_outputs must all be at least 1, but got {num_inputs}, {tuple(hidden)} "
                f"and {num_outputs}. Give every layer a positive width, or leave the layer out of hidden."
            )
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self._given = {"hidden": tuple(hidden), "activation": activation, "batch_norm": batch_norm}
        self.layers = nn.Sequential()
        for width_in, width_out in itertools.pairwise(widths[:-1]):
            if batch_norm:
                # normalised rows keep their size whatever the weights are; torch's smaller ones then learn faster
                self.layers.extend((nn.Linear(width_in, width_out), BatchNorm(width_out)))
            else:
                self.layers.append(HiddenLinear(width_in, width_out))
            self.layers.append(activation())
        self.layers.append(nn.Linear(widths[-2], widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, shape (..., num_inputs), to (..., num_outputs)."""
        _check_columns(x, self.num_inputs, "MLP", "num_inputs")
        y: Tensor = self.layers(x)
        return y


@storable
class LabelledMLP(nn.Module):
    r"""A perceptron of numbers and a class label that multiplies the numbers once, whatever the labels are.

    .. math:: h_1 = a(W x + b + V_y), \quad f(x, y) = \mathrm{MLP}(h_1)

    where :math:`V_y` is column y of a matrix: the same map as an `MLP` of x with a one-hot label appended. With
    labels enumerated on the left, y of shape (C, 1) and x of shape (batch, num_inputs), :math:`W x` is computed for
    the batch alone and broadcast against the C labels.

    Args:
        num_inputs: numbers per row that come in.
        num_classes: labels are 0, ..., num_classes - 1.
        hidden: widths of the hidden layers, at least one.
        num_outputs: numbers per row that go out.
        activation: makes one activation module per hidden layer.

    Raises:
        ValueError: hidden is empty or a width is below 1; or, when called, x does not have `num_inputs` columns.

    Example:
        >>> import torch
        >>> network = LabelledMLP(784, 10, (500,), 2 * 50)
        >>> network(torch.zeros(200, 784), torch.arange(10).unsqueeze(-1)).shape
        torch.Size([10, 200, 100])
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        hidden: Sequence[int],
        num_outputs: int,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        if not hidden or num_classes < 1:
            raise ValueError(
                f"a labelled perceptron needs at least one hidden layer and one class, but got hidden={tuple(hidden)} "
                f"and num_classes={num_classes}."
            )
        self.num_inputs = num_inputs
        self._given = {
            "num_classes": num_classes,
            "hidden": tuple(hidden),
            "num_outputs": num_outputs,
            "activation": activation,
        }
        self.of_inputs = HiddenLinear(num_inputs, hidden[0])
        self.of_label = nn.Embedding(num_classes, hidden[0])
        self.activation = activation()
        self.rest = MLP(hidden[0], hidden[1:], num_outputs, activation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map x, shape (..., num_inputs), and labels y, shape (...), broadcast, to (..., num_outputs)."""
        _check_columns(x, self.num_inputs, "LabelledMLP", "num_inputs")
        hidden = self.activation(self.of_inputs(x) + self.of_label(y))
        output: Tensor = self.rest(hidden)
        return output


@storable
class ConvEncoder(nn.Module):
    r"""A convolutional encoder for square images that travel as flat rows.

    .. math:: h_0 = x, \quad h_k = a(\text{conv}_k(h_{k-1})), \quad f(x) = W \, \text{vec}(h_K) + b

    Maps (..., num_features) to (..., 2 * latent_dim): location, raw scale. Inside, a row becomes an image
    (channels, side, side) in the order (channel, row, column), every stage halves the side (rounded up: 28, 14, 7, 4),
    and a linear layer reads the last feature maps.

    Args:
        num_features: numbers per image, channels * side * side.
        latent_dim: latent coordinates; the output has twice as many numbers.
        hidden_channels: feature maps of each stage, first to last.
        channels: colours of the image; 1 is grey.
        activation: makes one activation module per stage.

    Raises:
        ValueError: num_features is not channels times a square, or there are more stages than halvings of the side;
            or, when called, x does not have `num_features` columns.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder(784, latent_dim=20)
        >>> encoder(torch.zeros(3, 5, 784)).shape
        torch.Size([3, 5, 40])
    """

    def __init__(
        self,
        num_features: int,
        latent_dim: int,
        hidden_channels: Sequence[int] = (32, 64),
        channels: int = 1,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        sides = _sides(num_features, channels, hidden_channels)
        self.num_features = num_features
        self._given = {
            "latent_dim": latent_dim,
            "hidden_channels": tuple(hidden_channels),
            "channels": channels,
            "activation": activation,
        }
        self.image_shape = (channels, sides[0], sides[0])
        maps = (channels, *hidden_channels)
        self.stages = nn.Sequential()
        for maps_in, maps_out, side in zip(maps, hidden_channels, sides, strict=False):
            self.stages.extend((nn.Conv2d(maps_in, maps_out, _kernel(side), stride=2, padding=1), activation()))
        self.head = nn.Linear(maps[-1] * sides[-1] ** 2, 2 * latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x, shape (..., num_features), to (..., 2 * latent_dim)."""
        _check_columns(x, self.num_features, "ConvEncoder", "num_features")
        # torch's convolutions take one batch dimension, so all leading ones are folded into it and unfolded again
        feature_maps = self.stages(x.reshape(-1, *self.image_shape))
        y: Tensor = self.head(feature_maps.flatten(1))
        return y.reshape(*x.shape[:-1], y.shape[-1])


@storable
class ConvDecoder(nn.Module):
    r"""A convolutional decoder to square images that travel as flat rows: `ConvEncoder` run backwards.

    .. math:: h_K = a(W z + b), \quad h_{k-1} = a(\text{convT}_k(h_k)), \quad f(z) = \text{vec}(\text{convT}_1(h_1))

    Maps (..., latent_dim) to raw likelihood parameters (..., num_features * parameters_per_feature): first one
    number for every feature, then the second for every feature, and so on; within each, the order is (channel, row,
    column). The kernel is four wide where the side doubles exactly, so that all pixels are covered equally often.

    Args:
        latent_dim: latent coordinates that come in.
        num_features: numbers per image, channels * side * side.
        parameters_per_feature: raw numbers the likelihood takes per feature, its `num_parameters`.
        hidden_channels: feature maps of each stage in the order of the *encoder*, so that one tuple serves both.
        channels: colours of the image; 1 is grey.
        activation: makes one activation module per stage.

    Raises:
        ValueError: num_features is not channels times a square, or there are more stages than halvings of the side;
            or, when called, z does not have `latent_dim` columns.

    Example:
        >>> import torch
        >>> decoder = ConvDecoder(20, 784, parameters_per_feature=2)
        >>> decoder(torch.zeros(3, 5, 20)).shape
        torch.Size([3, 5, 1568])
    """

    def __init__(
        self,
        latent_dim: int,
        num_features: int,
        parameters_per_feature: int = 1,
        hidden_channels: Sequence[int] = (32, 64),
        channels: int = 1,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        sides = _sides(num_features, channels, hidden_channels)
        self.latent_dim = latent_dim
        self._given = {
            "num_features": num_features,
            "parameters_per_feature": parameters_per_feature,
            "hidden_channels": tuple(hidden_channels),
            "channels": channels,
            "activation": activation,
        }
        self.first_shape = (hidden_channels[-1], sides[-1], sides[-1])
        self.stem = HiddenLinear(latent_dim, math.prod(self.first_shape))
        maps = (channels * parameters_per_feature, *hidden_channels)
        self.stages = nn.Sequential()
        for stage in reversed(range(len(hidden_channels))):
            up = nn.ConvTranspose2d(maps[stage + 1], maps[stage], _kernel(sides[stage]), stride=2, padding=1)
            self.stages.extend((activation(), up))

    def forward(self, z: Tensor) -> Tensor:
        """Map latents z, shape (..., latent_dim), to (..., num_features * parameters_per_feature)."""
        _check_columns(z, self.latent_dim, "ConvDecoder", "latent_dim")
        feature_maps: Tensor = self.stages(self.stem(z).reshape(-1, *self.first_shape))
        return feature_maps.reshape(*z.shape[:-1], math.prod(feature_maps.shape[1:]))


def _sides(num_features: int, channels: int, hidden_channels: Sequence[int]) -> list[int]:
    """Side of the image before each stage and after the last, every stage halving it, rounded up."""
    side = math.isqrt(max(num_features, 0) // channels) if channels > 0 else 0
    if side < 1 or channels * side * side != num_features:
        raise ValueError(
            f"num_features={num_features} is not channels={channels} times a square, so it is no square image with "
            f"that many channels. Give num_features = channels * side * side, or use an MLP."
        )
    if not hidden_channels or min(hidden_channels) < 1:
        raise ValueError(
            f"hidden_channels={tuple(hidden_channels)} must hold at least one positive number of feature maps, "
            f"for example (32, 64)."
        )
    sides = [side]
    for _ in hidden_channels:
        if sides[-1] == 1:
            raise ValueError(
                f"hidden_channels={tuple(hidden_channels)} has {len(hidden_channels)} stages, but a side of {side} can "
                f"be halved only {len(sides) - 1} times. Drop stages from hidden_channels."
            )
        sides.append(-(-sides[-1] // 2))
    return sides


def _kernel(side: int) -> int:
    """Width of a stride-two kernel, padding one, between `side` and half of it, rounded up, in both directions."""
    return 4 if side % 2 == 0 else 3


def _check_columns(x: Tensor, expected: int, network: str, argument: str) -> None:
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"{network} expects rows of {argument}={expected} numbers, but got an input of shape {tuple(x.shape)}. "
            f"Build the network with {argument}={x.shape[-1] if x.ndim else 1}, or pass data of {expected} columns."
        )
