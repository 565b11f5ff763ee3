"""Antithetic evolution strategies on a flat parameter vector.

Salimans et al. (2017), as used by VSML (thesis, appendix B.3.2) and SymLA (Eq. 4.10). One generation
draws `pairs` Gaussian directions, evaluates the parameters a step of `sigma` forwards and backwards
along each, and estimates the gradient of the smoothed loss from the differences. The optimiser
(Adam in the thesis) stays outside:

    settings = dict(pairs=1024, sigma=0.05, seed=seed)
    theta.grad, losses = es.gradient(theta, evaluate, generation=step, **settings)
    adam.step()

Under torch.distributed every rank evaluates its share of the pairs and only their losses travel.
The directions are redrawn everywhere from (seed, generation), so N ranks return what one rank
returns, to float rounding.

Axes: p members of a batch (all + directions, then all - directions), d parameters.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def directions(
    pairs: int, size: int, seed: int, generation: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal search directions (pairs, size), a pure function of (seed, generation).

    They are drawn on `device`, so that a GPU does not wait for the CPU. Ranks on devices of one
    kind draw the same numbers. A CPU and a GPU draw different ones: their runs differ.
    """
    number = seed * 1_000_003 + generation + 2**31  # other numbers than those of manual_seed(seed)
    generator = torch.Generator(device).manual_seed(number % 2**63)
    return torch.randn(pairs, size, generator=generator, device=device)


def centred_ranks(losses: Tensor) -> Tensor:
    """Replace each loss by its rank, scaled to [-0.5, 0.5] (rank shaping of Salimans et al.,
    section 2.1). Equal losses share their mean rank, so that a constant loss has gradient 0. Single
    precision makes some near ties exact."""
    ordered = losses.flatten().sort().values
    first = torch.searchsorted(ordered, losses)
    last = torch.searchsorted(ordered, losses, right=True) - 1
    ranks = (first + last).to(losses.dtype) / 2
    return ranks / max(losses.numel() - 1, 1) - 0.5


def estimate(noise: Tensor, losses: Tensor, sigma: float, rank_shaping: bool = False) -> Tensor:
    """The gradient of E[loss(theta + sigma * noise)] with respect to theta from antithetic pairs.

    noise: (pairs, d) standard normals; losses: (2, pairs), row 0 at theta + sigma * noise, row 1 at
    theta - sigma * noise. Returns (d,). With rank shaping the losses' scale is lost, and with it
    the gradient's length.
    """
    if rank_shaping:
        losses = centred_ranks(losses)
    return (losses[0] - losses[1]) @ noise / (2 * sigma * len(noise))


def share(pairs: int) -> range:
    """The pairs that this rank evaluates. Raises ValueError if ranks cannot share them evenly."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    if pairs % world:
        raise ValueError(
            f"A population of {pairs} pairs cannot be shared evenly by {world} processes."
        )
    return range(rank * pairs // world, (rank + 1) * pairs // world)


def num_blocks(pairs: int, kinds: int) -> int:
    """The smallest number of equal blocks of pairs that gives each kind of task one."""
    divisors = (n for n in range(1, pairs + 1) if pairs % n == 0)
    return next((n for n in divisors if n >= kinds), pairs)


def even_chunk(pairs: int, kinds: int, limit: int) -> int:
    """The most pairs to evaluate at once, at most `limit`. Always the same number, so that one
    compilation does: a divisor of the pairs of a block and of those of a process."""
    most = math.gcd(pairs // num_blocks(pairs, kinds), len(share(pairs)))
    return max(c for c in range(1, most + 1) if most % c == 0 and (c == 1 or c <= limit))


def kinds_of_chunks(pairs: int, kinds: int, generation: int, chunk: int) -> list[int]:
    """Which kind of task, 0 to kinds - 1, each chunk of this process has. All pairs of a block have
    one; which one changes with the generation if there are more blocks than kinds."""
    blocks = num_blocks(pairs, kinds)
    numbers = (generation * blocks + pair * blocks // pairs for pair in share(pairs)[::chunk])
    return [number % kinds for number in numbers]


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over all processes of tensors of one shape; without torch.distributed `value`."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of parameters by their means over all processes."""
    if not dist.is_initialized():
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = all_reduce_mean(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def all_gather(value: Tensor, axis: int) -> Tensor:
    """The values of all processes, of one shape, side by side along an axis."""
    if not dist.is_initialized():
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, axis)


@torch.no_grad()
def gradient(
    theta: Tensor,
    evaluate: Callable[[Tensor, Tensor], Tensor],
    *,
    pairs: int,
    sigma: float,
    seed: int,
    generation: int,
    chunk: int | None = None,
    rank_shaping: bool = False,
) -> tuple[Tensor, Tensor]:
    """One generation: the estimated gradient (d,) and all losses (2, pairs).

    theta: (d,).
    evaluate(population, ids): losses (p,) of a population (p, d). ids (p,) are the numbers of the
        pairs. Both members of a pair have the same id and should see the same data (common random
        numbers).
    chunk: the most pairs in one call of `evaluate`, which bounds its memory (default: all pairs of
        this rank).
    Raises ValueError if the ranks cannot share the pairs evenly.
    """
    noise = directions(pairs, theta.numel(), seed, generation, theta.device)
    losses = torch.zeros(2, pairs, device=theta.device)
    mine = share(pairs)
    for ids in torch.arange(mine.start, mine.stop, device=theta.device).split(chunk or len(mine)):
        step = sigma * noise[ids]
        population = torch.cat([theta + step, theta - step])
        losses[:, ids] = evaluate(population, ids.repeat(2)).view(2, -1).float()
    if dist.is_initialized():
        dist.all_reduce(losses)  # every entry was written by one rank and is zero on the others
    return estimate(noise, losses, sigma, rank_shaping), losses
