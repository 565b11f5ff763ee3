"""Random numbers as pure functions of keys and integers: the same on any device, in any batch, on
any rank. Nothing is stored.

    keys = fold(key(seed), torch.arange(5))  # (5, 2) int32, one for each id
    x = normal(keys, 100)  # (5, 100)
"""

import math
from functools import cache

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that looks random (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)


def _int32(value: Tensor | int) -> Tensor | int:
    """The lowest 32 bits as a signed integer."""
    if isinstance(value, Tensor):
        return value.to(torch.int32)
    return (value + 2**31) % 2**32 - 2**31


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and a 64-bit integer. key: (..., 2) int32; value broadcasts to (...).

    A Python number stays one: as a tensor it would be copied to a GPU, which waits for that.
    """
    low, high = _int32(value), _int32(value >> 32)
    first = _mix(_mix(key[..., 0] + low) ^ high)
    second = _mix(key[..., 1] ^ first) + low
    return torch.stack([first, second], -1)


@cache
def key(seed: int, device: torch.device | str = "cpu", salt: int | None = None) -> Tensor:
    """The key (2,) of a seed, or of one of its salts. All further keys are folded from it."""
    if salt is not None:
        return fold(key(seed, device), salt)
    root = torch.tensor([-1640531527, 668265263], dtype=torch.int32, device=device)
    return fold(root, seed)


def bits(key: Tensor, counter: Tensor) -> Tensor:
    """32 random bits, int32, for each counter. key: (..., 2) broadcasts against counter (...)."""
    return _mix(_mix(counter.to(torch.int32) + key[..., 0]) ^ key[..., 1])


def integers(key: Tensor, counter: Tensor, high: Tensor | int) -> Tensor:
    """Integers in [0, high), int64."""
    return (bits(key, counter).long() & 0x7FFFFFFF) % high


def uniform(key: Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), shape (..., size) for keys (..., 2)."""
    counter = torch.arange(size, dtype=torch.int32, device=key.device)
    numbers = ((bits(key[..., None, :], counter) >> 8 & 0xFFFFFF).float() + 0.5) * 2**-24
    return numbers.clamp(max=1 - 2**-24)  # the largest one rounds to 1


def normal(key: Tensor, size: int, divisor: float = 1.0) -> Tensor:
    """Standard normals (Box and Muller 1958) over `divisor`, (..., size) for keys (..., 2)."""
    half = -(-size // 2)
    u, v = uniform(key, 2 * half).chunk(2, -1)
    radius = (-2 * u.log()).sqrt()
    angle = 2 * math.pi * v
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    return both[..., :size].div_(divisor)  # in place, as it may have gigabytes


def shuffle(position: Tensor, n: Tensor | int, key: Tensor, rounds: int = 24) -> Tensor:
    """The image of each position under a random permutation of 0..n-1, which is never stored.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012). Each round pairs x with (k - x) mod n,
    and one random bit, the same for both, decides whether they swap.

    position: (...) int64 in [0, n); n and key (..., 2) broadcast against it. Returns (...) int64.
    """
    shifts, keys = _round_keys(key, n, rounds)
    shape = position.shape

    def flat(x: Tensor, *last: int) -> Tensor:
        """One form whatever the shapes, and no view: torch.compile compiles each form once."""
        return x.expand(*shape, *last).reshape(-1, *last).clone()

    position = flat(position)
    n = flat(n) if isinstance(n, Tensor) else torch.full_like(position, n)
    for shift, key in zip(shifts.split(4, -1), keys.split(4, -2), strict=True):
        position = _swap_rounds(position, n, flat(shift, 4), flat(key, 4, 2))
    return position.view(shape)


def _round_keys(key: Tensor, n: Tensor | int, rounds: int) -> tuple[Tensor, Tensor]:
    """For each round of `shuffle` the k of its pairs, (..., rounds), and the key of its bits."""
    index = torch.arange(rounds, device=key.device)
    shifts = integers(key[..., None, :], index, n[..., None] if isinstance(n, Tensor) else n)
    return shifts, fold(key[..., None, :], index + 1)


def _swap_rounds(position: Tensor, n: Tensor, shifts: Tensor, keys: Tensor) -> Tensor:
    """Some rounds of `shuffle`: position, n (N,), shifts (N, rounds), keys (N, rounds, 2)."""
    for shift, key in zip(shifts.unbind(-1), keys.unbind(-2), strict=True):
        partner = (shift - position) % n
        swap = bits(key, torch.maximum(position, partner)) & 1
        position = torch.where(swap == 0, position, partner)
    return position


def compile_draws() -> None:
    """From now on torch.compile makes normals and rounds of `shuffle`, the largest costs of Tasks.

    The numbers are the same to rounding. On a CPU a batch of tasks takes half of the time, and each
    of the two functions is compiled once, in seconds. (`_round_keys` as well would take ten seconds
    more and gain little; Tasks.sample as a whole takes minutes.)
    """
    global normal, _swap_rounds
    if not hasattr(normal, "_torchdynamo_orig_callable"):
        normal = torch.compile(normal, dynamic=True)  # one compilation for all shapes
        _swap_rounds = torch.compile(_swap_rounds, dynamic=True)
