"""Faster forms of an LSTM cell whose weights many small LSTMs share: `lstm_cell` in vsml.py.

All take weight (p, n, 4n), from_a (p, s, a, 4n), from_b (p, s, b, 4n), h and c (p, s, a, b, n), and
return the new h and c. Gates: input, cell, forget, output. On a CPU torch.compile with `options`
turns their sums and products into tight loops over the states. Tests compare them with lstm_cell.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def options(units: int) -> dict[str, Any]:
    """For torch.compile: sums of `units` products are written out, with fused multiply-adds."""
    return {
        "unroll_reductions_threshold": units + 1,
        "cpp.enable_floating_point_contract_flag": "fast",
    }


def exp_tanh(x: Tensor) -> Tensor:
    """tanh exact to 1e-6, twice as fast on a CPU as torch.tanh."""
    return 2 * torch.sigmoid(2 * x) - 1


def rational_tanh(x: Tensor) -> Tensor:
    """tanh by Lambert's continued fraction, exact to 1e-4, in operations that a CPU vectorises."""
    x = 4.97 - (9.94 - (x + 4.97).relu()).relu()  # clamp(x, -4.97, 4.97), which is slower
    q = x * x
    numerator = ((q + 378) * q + 17325) * q + 135135
    return x * numerator / (((28 * q + 3150) * q + 62370) * q + 135135)


def _gates(
    tanh: Callable, weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor
) -> list[Tensor]:
    """i, j, f, o."""
    weight = weight.view(len(weight), *(1,) * (h.ndim - 2), *weight.shape[1:])
    parts = zip(from_a.chunk(4, -1), from_b.chunk(4, -1), weight.chunk(4, -1), strict=True)
    i, j, f, o = (
        a[..., :, None, :] + b[..., None, :, :] + (h[..., None] * w).sum(-2) for a, b, w in parts
    )
    i, f, o = (0.5 + 0.5 * tanh(0.5 * gate) for gate in (i, f, o))  # the sigmoid
    return [i, tanh(j), f, o]


def fused_lstm_cell(
    weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor, tanh: Callable = exp_tanh
) -> tuple[Tensor, Tensor]:
    """For meta-tests, exact; with rational_tanh for evolution strategies."""
    i, j, f, o = _gates(tanh, weight, from_a, from_b, h)
    c = f * c + i * j
    return o * tanh(c), c


class TrainableCell(torch.autograd.Function):
    """For backpropagation, with rational_tanh. Keeps nothing but its inputs: the backward pass
    computes the gates again, and takes 1 - tanh^2 for the derivative of tanh."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return fused_lstm_cell(*inputs, rational_tanh)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor, ...]:
        weight, from_a, from_b, h, c = ctx.saved_tensors
        i, j, f, o = _gates(rational_tanh, weight, from_a, from_b, h)
        tanh_c = rational_tanh(f * c + i * j)

        dc = dc + dh * o * (1 - tanh_c**2)
        di = dc * j * i * (1 - i)
        dj = dc * i * (1 - j**2)
        df = dc * c * f * (1 - f)
        do = dh * tanh_c * o * (1 - o)
        gates = torch.cat([di, dj, df, do], -1)

        flat = gates.flatten(1, -2)
        d_weight = h.flatten(1, -2).mT @ flat
        dh = (flat @ weight.mT).unflatten(1, h.shape[1:-1])
        return d_weight, gates.sum(-2), gates.sum(-3), dh, dc * f


def fastest(device: str, use: str, units: int, shared: bool) -> Callable | None:
    """The form of LSTMs of so many units for a use, "test", "es" or "backprop". None: lstm_cell, whose
    products a GPU computes on tensor cores, and whose gradient sums over the positions of an image
    where they share a state, which TrainableCell's does not."""
    if device == "cuda":
        return None
    if use == "test":
        return torch.compile(fused_lstm_cell, options=options(units))  # for all sizes
    if use == "es":
        return partial(fused_lstm_cell, tanh=rational_tanh)
    return None if shared else TrainableCell.apply
