"""What training computes in another way than inference does is the same function, with the same derivative."""

from __future__ import annotations

import pytest
import torch

from fastpose.layers import channel_shuffle, largest_channel, largest_pixel

FORMATS = [torch.contiguous_format, torch.channels_last]


def both(function, memory_format, shape):
    """Outputs and input gradients of a function of (x, training), for inference and for training."""
    source = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for training in (False, True):
        x = source.clone(memory_format=memory_format).requires_grad_()
        y = function(x, training)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad))
    return results


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 1, 1), (3, 12, 1, 6)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, training: channel_shuffle(x, 2, training),
        lambda x, training: channel_shuffle(x, 3, training),
        largest_channel,
        largest_pixel,
        lambda x, training: largest_pixel(x, training, keepdim=True),
    ],
    ids=["shuffle2", "shuffle3", "channel", "pixel", "pixel_keepdim"],
)
def test_training_is_the_same_function(function, memory_format, shape):
    (y, gradient), (y_training, gradient_training) = both(function, memory_format, shape)
    assert y.shape == y_training.shape and torch.equal(y, y_training)
    assert torch.equal(gradient, gradient_training)


@pytest.mark.parametrize("function", [largest_channel, largest_pixel])
def test_of_equal_maxima_one_has_the_gradient(function):
    x = torch.zeros(2, 3, 4, 5, requires_grad=True)
    y = function(x, training=True)
    y.sum().backward()
    assert int((x.grad != 0).sum()) == int(x.grad.sum()) == y.numel()


def test_shuffled_maps_stay_channels_last_in_training():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    assert channel_shuffle(x, 2, training=True).is_contiguous(memory_format=torch.channels_last)
