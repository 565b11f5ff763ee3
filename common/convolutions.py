"""Convolutions with one sub-RNN for each weight of a kernel: which pixels each of its positions has
(thesis, appendix B.2.2).

    first, second = layers(3 * 32 * 32, channels=(8, 16))
    patches = first.patches(msg)  # (p, s, 3 * 32 * 32, m) -> (p, s, 16 * 16, 27, m)

Messages lie as (channels, rows, columns), flattened.

Axes: p members of a population, s sequences in parallel, a inputs of a patch, b channels out, m
message, q position of the kernel.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Conv(NamedTuple):
    """A layer, of kernel 3 and stride 2 (appendix B.2.2)."""

    a: int  # inputs of a patch
    b: int  # channels out
    side: int  # of the image in pixels
    kernel: int = 3
    stride: int = 2

    @property
    def rows(self) -> int:
        """Positions along a side, which is the side of the next layer's image."""
        return (self.side - 1) // self.stride + 1

    @property
    def positions(self) -> int:
        return self.rows**2

    @property
    def num_inputs(self) -> int:
        return self.a // self.kernel**2 * self.side**2

    @property
    def num_outputs(self) -> int:
        return self.b * self.positions

    def patches(self, msg: Tensor) -> Tensor:
        """Messages of pixels (p, s, channels * side * side, m) -> of patches (p, s, q, a, m)."""
        p, s, _, m = msg.shape
        image = msg.movedim(-1, 2).reshape(p * s * m, -1, self.side, self.side)
        patches = F.unfold(image, self.kernel, padding=self.kernel // 2, stride=self.stride)
        return patches.view(p, s, m, self.a, self.positions).permute(0, 1, 4, 3, 2)

    def pixels(self, msg: Tensor) -> Tensor:
        """Messages of patches -> of pixels: the mean over the patches that a pixel lies in."""
        msg = msg.permute(0, 1, 4, 3, 2)  # (p, s, m, a, q)
        options = dict(kernel_size=self.kernel, padding=self.kernel // 2, stride=self.stride)
        add = partial(F.fold, output_size=(self.side, self.side), **options)
        sums, counts = (add(v.flatten(0, 2)) for v in (msg, torch.ones_like(msg[:1, :1, :1])))
        return (sums / counts).view(*msg.shape[:3], -1).transpose(2, 3)


def layers(num_inputs: int, channels: tuple[int, ...]) -> list[Conv]:
    """Convolutional layers with these numbers of output channels, for square images with one or three
    channels. Raises ValueError for other images."""
    known = 1 if math.isqrt(num_inputs) ** 2 == num_inputs else 3
    side = math.isqrt(num_inputs // known)
    if channels and known * side**2 != num_inputs:
        raise ValueError(f"Convolutions need square images, and {num_inputs} inputs are none.")
    convs: list[Conv] = []
    for out in channels:
        convs.append(Conv(9 * known, out, side))
        known, side = out, convs[-1].rows
    return convs
