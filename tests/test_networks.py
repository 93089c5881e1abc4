"""Networks keep the two contracts, for any number of leading dimensions, and start as they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_lvm.networks import MLP, BatchNorm, ConvDecoder, ConvEncoder, HiddenLinear, LabelledMLP

NETWORKS = {
    "mlp": (lambda: MLP(6, (5, 4), 3), 6, 3),
    "mlp without hidden layers": (lambda: MLP(6, (), 3), 6, 3),
    "mlp tanh": (lambda: MLP(6, (5,), 3, activation=nn.Tanh), 6, 3),
    "conv encoder": (lambda: ConvEncoder(784, 7), 784, 14),
    "conv encoder, odd side": (lambda: ConvEncoder(49, 2, hidden_channels=(4, 3, 2)), 49, 4),
    "conv encoder, colour": (lambda: ConvEncoder(3 * 64, 2, hidden_channels=(4,), channels=3), 192, 4),
    "conv decoder": (lambda: ConvDecoder(7, 784, parameters_per_feature=2), 7, 2 * 784),
    "conv decoder, odd side": (lambda: ConvDecoder(2, 49, hidden_channels=(4, 3, 2)), 2, 49),
    "conv decoder, colour": (lambda: ConvDecoder(2, 3 * 64, 5, hidden_channels=(4,), channels=3), 2, 5 * 192),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, num_inputs, num_outputs = NETWORKS[request.param]
    return make().double(), num_inputs, num_outputs


@pytest.mark.parametrize("leading", [(), (4,), (3, 1), (2, 3, 4), (0,)])
def test_any_leading_dimensions(network, leading):
    net, num_inputs, num_outputs = network
    x = torch.randn(*leading, num_inputs, dtype=torch.float64)
    y = net(x)
    assert y.shape == (*leading, num_outputs)
    row_by_row = [net(row) for row in x.reshape(-1, num_inputs)]
    torch.testing.assert_close(y.reshape(-1, num_outputs), torch.stack(row_by_row) if row_by_row else y)


def test_expanded_inputs(network):
    net, num_inputs, _ = network
    x = torch.randn(4, 1, num_inputs, dtype=torch.float64)
    torch.testing.assert_close(net(x.expand(4, 3, num_inputs)), net(x).expand(4, 3, -1))


def test_every_parameter_gets_a_gradient(network):
    net, num_inputs, _ = network
    net(torch.randn(50, num_inputs, dtype=torch.float64)).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in net.parameters())


def test_resetting_every_owner_of_parameters_is_a_new_start(network):
    net, _, _ = network

    def reset_from_seed_1():
        torch.manual_seed(1)
        for module in net.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.reset_parameters()
        return [parameter.detach().clone() for parameter in net.parameters()]

    before = [parameter.detach().clone() for parameter in net.parameters()]
    first, second = reset_from_seed_1(), reset_from_seed_1()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, first, strict=True))


def test_the_start_keeps_the_size_of_signals():
    net = MLP(400, (400,) * 6, 1)
    hidden = net.layers[:-1](torch.randn(200, 400))
    ratio = hidden.square().mean().item()  # one for the input; torch's own start would give about 6**-6 = 2e-5
    assert 0.3 < ratio < 3
    first, last = net.layers[0], net.layers[-1]
    bound = math.sqrt(6 / 400)
    assert 0.99 * bound < first.weight.abs().max() <= bound
    assert torch.equal(first.bias, torch.zeros(400))
    assert last.weight.abs().max() <= 1 / math.sqrt(400)


def test_without_bias_a_hidden_layer_resets_too():
    layer = HiddenLinear(3, 2, bias=False)
    layer.reset_parameters()
    assert layer.bias is None


def test_mlp_is_affine_maps_and_activations():
    net = MLP(3, (4, 5), 2, activation=nn.Tanh).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    by_hand = x
    linear = [layer for layer in net.layers if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        by_hand = torch.tanh(by_hand @ layer.weight.T + layer.bias)
    torch.testing.assert_close(net(x), by_hand @ linear[-1].weight.T + linear[-1].bias)
    assert [tuple(layer.weight.shape) for layer in linear] == [(4, 3), (5, 4), (2, 5)]


def test_rows_become_images_in_the_order_channel_row_column():
    net = ConvEncoder(2 * 64, 1, hidden_channels=(3,), channels=2).double()
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    x[0, 1, 6, 1] = 1.0  # channel 1, row 6, column 1
    seen = []
    net.stages[0].register_forward_hook(lambda module, inputs, output: seen.append(output - module.bias[:, None, None]))
    net(x.flatten(1))
    rows, columns = seen[0][0].abs().sum(0).nonzero(as_tuple=True)
    assert {*rows.tolist()} == {2, 3}
    assert {*columns.tolist()} == {0, 1}
    kernel = net.stages[0].weight[:, 1]
    torch.testing.assert_close(
        seen[0][0, :, 3, 1], kernel[:, 6 - 5, 0]
    )  # output 3 starts at row 5, output 1 at column 1


def test_decoder_gives_all_first_parameters_and_then_all_second_ones():
    net = ConvDecoder(2, 64, parameters_per_feature=2, hidden_channels=(3,))
    with torch.no_grad():
        net.stages[-1].weight.zero_()
        net.stages[-1].bias.copy_(torch.tensor([1.0, 2.0]))
    raw = net(torch.randn(5, 2))
    assert torch.equal(raw[:, :64], torch.ones(5, 64))
    assert torch.equal(raw[:, 64:], torch.full((5, 64), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0, (5,), 3), r"at least 1, but got 0, \(5,\) and 3"),
        (lambda: MLP(4, (5, -1), 3), r"at least 1, but got 4, \(5, -1\) and 3"),
        (lambda: ConvEncoder(783, 2), r"num_features=783 is not channels=1 times a square.*MLP"),
        (lambda: ConvEncoder(784, 2, channels=3), r"num_features=784 is not channels=3 times a square"),
        (lambda: ConvEncoder(784, 2, channels=0), r"channels=0"),
        (lambda: ConvDecoder(2, -4), r"num_features=-4 is not"),
        (lambda: ConvEncoder(64, 2, hidden_channels=()), r"hidden_channels=\(\) must hold at least one.*\(32, 64\)"),
        (lambda: ConvDecoder(2, 64, hidden_channels=(3, 0)), r"hidden_channels=\(3, 0\) must hold"),
        (lambda: ConvDecoder(2, 64, hidden_channels=(2,) * 4), r"4 stages, but a side of 8 can be halved only 3 times"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (MLP(4, (), 3), torch.zeros(2, 5), r"MLP expects rows of num_inputs=4 numbers.*\(2, 5\).*num_inputs=5"),
        (MLP(4, (), 3), torch.tensor(1.0), r"shape \(\).*num_inputs=1"),
        (ConvEncoder(64, 2), torch.zeros(8, 8), r"ConvEncoder expects rows of num_features=64 numbers.*\(8, 8\)"),
        (ConvDecoder(2, 64), torch.zeros(8, 3), r"ConvDecoder expects rows of latent_dim=2 numbers.*latent_dim=3"),
    ],
)
def test_wrong_columns_are_refused(net, x, message):
    with pytest.raises(ValueError, match=message):
        net(x)


def test_batch_norm_takes_any_leading_dimensions_and_a_single_row():
    torch.manual_seed(0)
    norm, theirs = BatchNorm(3), torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(norm(x), theirs(x.reshape(20, 3)).reshape(4, 5, 3))
    torch.testing.assert_close(norm.running_var, theirs.running_var)
    before = norm.running_mean.clone()
    assert norm(x[0, :1]).isfinite().all()
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x.reshape(20, 3)).reshape(4, 5, 3))
    assert any(isinstance(layer, BatchNorm) for layer in MLP(4, (3,), 2, batch_norm=True).modules())


def test_labelled_perceptron_is_a_perceptron_of_a_one_hot_label():
    torch.manual_seed(0)
    network = LabelledMLP(4, 3, (6, 5), 2)
    x, y = torch.randn(7, 4), torch.arange(3).unsqueeze(-1)
    one_hot = torch.nn.functional.one_hot(y.expand(3, 7), 3).float()
    first = torch.cat([network.of_inputs.weight, network.of_label.weight.T], -1)
    joined = torch.cat([x.expand(3, 7, 4), one_hot], -1)
    expected = network.rest(torch.relu(joined @ first.T + network.of_inputs.bias))
    torch.testing.assert_close(network(x, y), expected)
    with pytest.raises(ValueError, match=r"at least one hidden layer.*hidden=\(\)"):
        LabelledMLP(4, 3, (), 2)
