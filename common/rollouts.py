"""Rollouts of learners through what all of them have in common (common/learners.py): initial states,
predictions, learning rates, and gradients in little memory.

    state = initial_states(learner, tasks, ids)  # tasks: common.datasets.Tasks
    for logits in predictions(learner, theta, tasks, ids, x, y): ...
    theta = search_rate(OnlineSGD(adam=True), tasks, steps=1000)

Axes: p members of a population, each with its own theta, s sequences in parallel, t time, a inputs,
b outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

RATES = torch.linspace(-4, 0, 17)  # log10, four in each factor of ten


def initial_states(learner: Any, tasks: Any, ids: Tensor, members: int = 1) -> Any:
    """Of sequences with the ids (s,), the same for all members."""
    keys = tasks.keys(ids, 3).expand(members, -1, -1)
    return learner.initial_state(keys, tasks.num_inputs, tasks.num_classes)


def predictions(
    learner: Any, theta: Tensor, tasks: Any, ids: Tensor, x: Tensor, y: Tensor
) -> Iterator[Tensor]:
    """Yields the logits (p, s, b) of members theta (p, d) for each example of x (s, t, a), y (s, t),
    before its label is seen. ids (s,) decide the initial states."""
    state = initial_states(learner, tasks, ids, len(theta))
    params = learner.params(theta)
    for x_t, y_t in zip(x.unbind(1), y.unbind(1), strict=True):
        x_t, y_t = (v.expand(len(theta), *v.shape) for v in (x_t, y_t))
        state, logits = learner.observe(params, state, x_t, y_t)
        yield logits


def correct(learner: Any, theta: Tensor, tasks: Any, ids: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether its predictions are correct (p, s, t), as 0 and 1."""
    logits = predictions(learner, theta, tasks, ids, x, y)
    return (torch.stack([now.argmax(-1) for now in logits], -1) == y).float()


def second_correct(learner: Any, tasks: Any, count: int, theta: Tensor) -> Tensor:
    """Two examples of each class, one after the other: the share (p,) of the second ones that members
    theta (p, d) predict correctly, over at most `count` sequences. tasks: with two stored examples of
    each class."""
    x, y = tasks.twice_each(count)
    seconds = correct(learner, theta, tasks, tasks.test_ids(len(x)), x, y)[:, :, 1::2]
    return seconds.mean((1, 2))


def twice_and_many(learner: Any, tasks: Any, theta: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probabilities of the classes (t, b), as a learner with theta (d,) predicts them, and y (t,): of
    two examples of each class, one after the other, and of a hundred random ones."""
    ids, pairs = tasks.test_ids(1), []
    for x, y in (tasks.twice_each(1), tasks.sample(ids, ids, min(100, len(tasks.dataset)))):
        logits = predictions(learner, theta[None], tasks, ids, x, y)
        p = torch.stack([now[0, 0].softmax(-1) for now in logits])
        pairs.append((p.numpy(force=True), y[0].numpy(force=True)))
    return pairs


def best_rate(score: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """The rate (1,) whose score is best, as theta of an OnlineSGD. score: of members (p, 1) -> (p,)."""
    grid = RATES.to(device)[:, None]
    return grid[score(grid).argmax()]


def best_at_repeats(learner: Any, tasks: Any, count: int) -> Tensor:
    """The rate at which most second examples are predicted correctly (second_correct)."""
    return best_rate(partial(second_correct, learner, tasks, count), tasks.dataset.device)


def search_rate(learner: Any, tasks: Any, steps: int, last: bool = False) -> Tensor:
    """The rate with the best accuracy in rollouts of `steps` examples, at most 1,000 and once through
    the data (appendix B.3.2 searches on MNIST). tasks: on a train split. last: the accuracy at the
    last example alone."""
    length = tasks.episode or min(1000, steps, tasks.one_pass)
    ids = torch.arange(8 if length > 100 else 64, device=tasks.dataset.device)

    def score(grid: Tensor) -> Tensor:
        scores = []
        for part in ids.split(4):
            hits = correct(learner, grid, tasks, part, *tasks.sample(part, part, length))
            scores.append(hits[..., -1] if last else hits.mean(-1))
        return torch.cat(scores, 1).mean(1)

    return best_rate(score, ids.device)


def in_blocks(rollout: Callable, state: Any, x: Tensor, y: Tensor, block: int) -> tuple[Any, ...]:
    """rollout(state, x (p, s, t, a), y (p, s, t)) -> (state, *metrics (p, s, t)), whose gradient takes
    the memory of `block` examples and of the states between blocks."""
    if block >= y.shape[2]:
        return rollout(state, x, y)
    blocks = []
    for part in zip(x.split(block, 2), y.split(block, 2), strict=True):
        options = dict(use_reentrant=False, preserve_rng_state=False)
        state, *metrics = recompute(rollout, state, *part, **options)
        blocks.append(metrics)
    return state, *(torch.cat(kind, 2) for kind in zip(*blocks, strict=True))
