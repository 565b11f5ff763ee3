"""Triton kernels. Tests compare them with the readable forms in Triton's interpreter on a CPU.

triton_rollout: VSML's rollout for evolution strategies, one dense layer (`rollout` of vsml.py). Axes:
p members (first all "+", then all "-"), t time, a inputs, b outputs, n units, m message.

project: random projections that are never stored (Tasks.projections of common/datasets.py). Axes:
s sequences, t time, a inputs, b projected inputs.

lstm_cell: many small LSTMs that share weights (`lstm_cell` of symla.py). Axes: p members, e environments,
a inputs, b outputs, n units.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor


@cache
def kernels():
    """tick_kernel and output_kernel. Imports Triton, which is slow to import and may be missing."""
    global tl, gate, inverse  # Triton looks for these names among the globals
    import triton
    import triton.language as tl

    @triton.jit
    def gate(k: tl.constexpr, weight, error, label, N: tl.constexpr):
        """Of gate k: recurrent weights (n, n), x's row (1, n), what the rest feeds (rows, n)."""
        row = weight + k * N + tl.arange(0, N)[None, :]
        rest = error * tl.load(row + 4 * N) + label * tl.load(row + 8 * N) + tl.load(row + 12 * N)
        recurrent = tl.load(row + (4 + tl.arange(0, N)[:, None]) * 4 * N)
        scale = -2.8853900817779268 if k == 1 else -1.4426950408889634  # tanh or sigmoid by 2^z
        return recurrent * scale, tl.load(row) * scale, rest * scale

    @triton.jit
    def inverse(h, x, gate, PRECISION: tl.constexpr):
        """1 / sigmoid(z) = 1 + e^-z, bounded so that a product of three is finite."""
        z = tl.dot(h, gate[0], gate[2] + x * gate[1], input_precision=PRECISION)
        return 1 + tl.exp2(tl.minimum(z, 40.0))

    @triton.jit(do_not_specialize=["t", "T", "A", "pairs"])
    def tick_kernel(h, c, x, weight, fwd, bwd_msg, message, t, T, A, pairs, B: tl.constexpr,
                    N: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, TICKS: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
        """16 tiles, of TILE inputs by all outputs: a row is one LSTM. Writes h, c and messages."""
        member, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE * 16
        row, unit = tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
        above = bwd_msg + (member * B + row % B) * 2
        error, label, used = tl.load(above), tl.load(above + 1), row < TILE * B
        fwd, weight = tl.load(fwd + member * N + unit), weight + member * (4 + N) * 4 * N
        gate_i, gate_j = gate(0, weight, error, label, N), gate(1, weight, error, label, N)
        gate_f, gate_o = gate(2, weight, error, label, N), gate(3, weight, error, label, N)
        x, h, c = x + (member % pairs * T + t) * A, h + member * A * B * N, c + member * A * B * N
        for a in range(first, min(first + TILE * 16, A), TILE):
            at, mask = (a * B + row) * N + unit, used & (a + row // B < A)
            hid, cell = tl.load(h + at, mask, 0.0), tl.load(c + at, mask, 0.0)
            x_a = tl.load(x + a + row // B, mask, 0.0)
            for _ in tl.static_range(TICKS):
                i, j = inverse(hid, x_a, gate_i, PRECISION), inverse(hid, x_a, gate_j, PRECISION)
                f, o = inverse(hid, x_a, gate_f, PRECISION), inverse(hid, x_a, gate_o, PRECISION)
                root = tl.rsqrt(i * j * f)  # one instruction, where a division takes nine
                cell = (cell * (i * j) + (2 - j) * f) * root * root  # cell / f + (2 / j - 1) / i
                k = 1 + tl.exp2(tl.minimum(cell * -2.8853900817779268, 40.0))
                root = tl.rsqrt(o * k)
                hid = (2 - k) * root * root  # (2 / k - 1) / o
            tl.store(h + at, hid, mask)
            tl.store(c + at, cell, mask)
            tl.store(message + (member * A + a) * B + row, tl.sum(hid * fwd, 1, True), mask)

    @triton.jit(do_not_specialize=["t", "T", "A", "pairs"])
    def output_kernel(message, y, bias, bwd_msg, losses, correct, t, T, A, pairs, bound, scale,
                      feed_label: tl.constexpr, B: tl.constexpr, B_PAD: tl.constexpr):  # fmt: skip
        """From a member's messages (p, a, b) to losses, correct (p, t) and bwd_msg (p, b, 2)."""
        member, a, b = tl.program_id(0).to(tl.int64), tl.arange(0, 64)[:, None], tl.arange(0, B_PAD)
        total = tl.zeros((64, B_PAD), tl.float32)
        for k in range(0, A, 64):
            total += tl.load(message + (member * A + k + a) * B + b, (k + a < A) & (b < B), 0.0)
        mean = (tl.sum(total, 0) / A + tl.load(bias + member)).to(tl.float64)  # all digits for tanh
        logits = bound * (2 / (1 + tl.exp(-2 * scale * mean / bound)) - 1)
        logits = tl.where(b < B, logits, -1e30).to(tl.float32)
        y = tl.load(y + member % pairs * T + t)
        label, shifted = tl.where(b == y, 1.0, 0.0), logits - tl.max(logits, 0)
        sum_exp = tl.sum(tl.exp(shifted), 0)
        tl.store(losses + member * T + t, tl.log(sum_exp) - tl.sum(label * shifted, 0))
        tl.store(correct + member * T + t, tl.argmax(logits, 0) == y)
        tl.store(bwd_msg + (member * B + b) * 2, tl.exp(shifted) / sum_exp - label, b < B)
        tl.store(bwd_msg + (member * B + b) * 2 + 1, label, (b < B) & feed_label)

    return tick_kernel, output_kernel


@lru_cache(maxsize=4)
def _rollout(shapes, device, micro_ticks, logit_bound, logit_scale, feed_label, precision="tf32"):
    """Static inputs and results of the shapes, and a function that runs a rollout on them."""
    tick_kernel, output_kernel = kernels()
    inputs = h, c, x, y, weight, fwd, bias = [torch.empty(s, device=device) for s in shapes]
    (p, a, b, n), (pairs, t) = h.shape, y.shape
    message, bwd_msg = h.new_empty(p, a, b), h.new_zeros(p, b, 2)
    losses, correct = h.new_empty(p, t), h.new_empty(p, t, dtype=torch.bool)
    b_pad = 1 << (b - 1).bit_length()
    rows = max(64, b_pad)  # of a tile: as many LSTMs as fit the registers of four warps

    def run(examples=t):
        bwd_msg.zero_()
        for k in range(examples):
            tick_kernel[p, -(-a // (rows // b * 16))](h, c, x, weight, fwd, bwd_msg, message, k, t,
                a, pairs, b, n, rows // b, rows, micro_ticks, precision, maxnreg=168)  # fmt: skip
            output_kernel[p,](message, y, bias, bwd_msg, losses, correct, k, t, a, pairs,
                              logit_bound, logit_scale, feed_label, b, b_pad)  # fmt: skip

    if device.type == "cuda":
        run(1)  # compiles, which a capture cannot
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            run()
        run = graph.replay
    return inputs, (h, c, losses, correct), run


def triton_rollout(params, h, c, x, y, *, logit_slot, **options):
    """The last h, c (p, a, b, n), losses and correct (p, t). options: of _rollout.
    Members q and q + pairs share x (pairs, t, a) and y (pairs, t). On a GPU: a CUDA graph."""
    m, n = params["fwd_msg.bias"].shape[1], h.shape[3]
    below, above, recurrent = params["lstm.weight"].split([m, m, n], 1)
    rows = below[:, :1], above[:, :2], params["lstm.bias"][:, None], recurrent  # all else gets 0
    fwd, bias = (params["fwd_msg." + name][..., logit_slot] for name in ("weight", "bias"))
    values = [v.detach() for v in (h, c, x, y, torch.cat(rows, 1), fwd, bias)]
    inputs, results, run = _rollout(tuple(v.shape for v in values), h.device, **options)
    torch._foreach_copy_(inputs, values)
    run()
    return tuple(result.clone() for result in results)


@cache
def project_kernel():
    global tl, mix, uniform
    import triton
    import triton.language as tl

    @triton.jit
    def mix(x):
        x = (x ^ (x >> 16)) * 2246822507
        x = (x ^ (x >> 13)) * 3266489909
        return x ^ (x >> 16)

    @triton.jit
    def uniform(key, counter):
        """In (0, 1), as in common/rng.py. All numbers are uint32."""
        bits = mix(mix(counter + tl.load(key)) ^ tl.load(key + 1))
        return tl.minimum(((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08, 0.99999994)

    @triton.jit(do_not_specialize=["T"])
    def kernel(x, keys, y, T, A, B, root, TIME: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
        """A tile of y, of TIME by COLUMNS. Both numbers of a Box-Muller pair are used: they are A/2
        rows apart."""
        s, half = tl.program_id(0).to(tl.int64), A // 2
        t = tl.program_id(1) * TIME + tl.arange(0, TIME)[:, None]
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros((TIME, COLUMNS), tl.float32)
        for first in range(0, half, ROWS):
            counter = ((first + tl.arange(0, ROWS)[:, None]) * B + column).to(tl.uint32)
            radius = tl.sqrt(-2 * tl.log(uniform(keys + 2 * s, counter))) * root
            angle = 6.283185307179586 * uniform(keys + 2 * s, counter + (half * B).to(tl.uint32))
            row = first + tl.arange(0, ROWS)[None, :]
            at, mask = x + (s * T + t) * A + row, (t < T) & (row < half)
            total = tl.dot(tl.load(at, mask, 0.0), radius * tl.cos(angle), total, input_precision=PRECISION)
            lower = tl.load(at + half, mask, 0.0)
            total = tl.dot(lower, radius * tl.sin(angle), total, input_precision=PRECISION)
        tl.store(y + (s * T + t) * B + column, total, (t < T) & (column < B))

    return kernel


def project(x, keys, size, precision="tf32"):
    """x (s, t, a), a even, times a matrix (a, size) of N(0, 1/a) for each of the keys (s, 2)."""
    s, t, a = x.shape
    y = x.new_empty(s, t, size)
    time = min(128, max(16, 1 << (t - 1).bit_length()))
    grid = s, -(-t // time), -(-size // 64)
    keys = keys.contiguous().view(torch.uint32)
    project_kernel()[grid](x.contiguous(), keys, y, t, a, size, a**-0.5, time, 32, 64, precision)
    return y


@cache
def cell_kernel():
    global tl
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["R", "A"])
    def kernel(weight, from_a, from_b, h, c, new_h, new_c, R, A, B: tl.constexpr, N: tl.constexpr,
               ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
        """ROWS of the R = e * a * b LSTMs of a member."""
        member, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        unit, mask = tl.arange(0, N)[None, :], row < R
        at = (member * R + row) * N + unit
        hid, cell = tl.load(h + at, mask, 0.0), tl.load(c + at, mask, 0.0)
        weight += member * N * 4 * N + tl.arange(0, N)[:, None] * 4 * N + unit
        from_a += (member * (R // B) + row // B) * 4 * N + unit
        from_b += (member * (R // A) + row // (A * B) * B + row % B) * 4 * N + unit
        z = tl.load(from_a, mask, 0.0) + tl.load(from_b, mask, 0.0)
        i = tl.sigmoid(tl.dot(hid, tl.load(weight), z, input_precision=PRECISION))
        z = tl.load(from_a + N, mask, 0.0) + tl.load(from_b + N, mask, 0.0)
        j = 2 * tl.sigmoid(2 * tl.dot(hid, tl.load(weight + N), z, input_precision=PRECISION)) - 1
        z = tl.load(from_a + 2 * N, mask, 0.0) + tl.load(from_b + 2 * N, mask, 0.0)
        f = tl.sigmoid(tl.dot(hid, tl.load(weight + 2 * N), z, input_precision=PRECISION))
        z = tl.load(from_a + 3 * N, mask, 0.0) + tl.load(from_b + 3 * N, mask, 0.0)
        o = tl.sigmoid(tl.dot(hid, tl.load(weight + 3 * N), z, input_precision=PRECISION))
        cell = f * cell + i * j
        tl.store(new_c + at, cell, mask)
        tl.store(new_h + at, o * (2 * tl.sigmoid(2 * cell) - 1), mask)

    return kernel


@torch.library.custom_op("cleanmeta::lstm_cell", mutates_args=())
def lstm_cell(
    weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor, precision: str = "tf32"
) -> tuple[Tensor, Tensor]:
    """The new h and c (p, e, a, b, n), n a power of two from 16 on. weight (p, n, 4n), from_a (p, e, a, 4n), from_b
    (p, e, b, 4n)."""
    (p, e, a, b, n), rows = h.shape, 64
    weight, from_a, from_b, h, c = (x.contiguous() for x in (weight, from_a, from_b, h, c))
    new = torch.empty_like(h), torch.empty_like(c)
    grid = p, -(-e * a * b // rows)
    cell_kernel()[grid](weight, from_a, from_b, h, c, *new, e * a * b, a, b, n, rows, precision)
    return new


@lstm_cell.register_fake
def _(weight, from_a, from_b, h, c, precision="tf32"):
    return h.new_empty(h.shape), c.new_empty(c.shape)
