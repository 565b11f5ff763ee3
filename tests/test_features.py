"""common/features.py: networks that make features of images."""

import sys

import pytest
import torch
from torch import nn

from common import features
from common.datasets import load


def test_an_untrained_network():
    one, two = (features.pretrained("untrained") for _ in range(2))
    with torch.no_grad():
        images = torch.rand(2, 3, 224, 224)
        assert one.net(images).shape == (2, 512) and torch.equal(one.net(images), two.net(images))
    assert one.side == 224 and len(one.mean) == len(one.std) == 3


def test_a_network_of_ones_own():
    """It classifies unseen digits."""
    train, test = (load("digits", split, size=28, channels=3) for split in ("train", "test"))
    labels = [torch.arange(10).repeat_interleave(data.counts) for data in (train, test)]
    net = features.classifier(train.x, labels[0], train.mean, train.std, epochs=8).eval()
    x = test.inputs(torch.arange(len(test))).view(-1, 3, 28, 28)
    with torch.no_grad():
        assert (net(x).argmax(1) == labels[1]).float().mean() > 0.8
        assert net[:-1](x[:2]).shape == (2, 64)


def test_images_are_resized_and_normalised_as_the_network_expects():
    """Here to eight pixels a side, for a network that hands on what it is given; grey images become coloured ones."""
    network = features.Network(nn.Flatten(), 8, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    images = torch.full((70, 1, 16, 16), 204, dtype=torch.uint8)
    x = network.features(images).view(70, 3, 8, 8)
    expected = (0.8 - torch.tensor(network.mean)) / torch.tensor(network.std)
    torch.testing.assert_close(x, expected[:, None, None].expand_as(x))
    own = features.trained(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), 0.1, 0.2)
    assert own.features(images).shape == (70, 64) and own.side == 28 and own.mean == (0.1,) * 3 and own.std == (0.2,) * 3


def test_a_network_that_is_not_at_hand(monkeypatch):
    """One error for weights, another for a package; the state of random numbers stays as it was."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    torch.manual_seed(3)
    with pytest.raises(features.FeatureError, match="needs open_clip"):
        features.pretrained("clip")
    monkeypatch.setattr(features, "resnet", lambda name: (_ for _ in ()).throw(RuntimeError("no weights")))
    with pytest.raises(features.FeatureError, match="The weights of resnet18 are not at hand and could not be downloaded"):
        features.pretrained("resnet18")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
