"""CUDA graphs: all that a function does on a GPU, recorded once for each shape of its inputs, then launched as one.

    lifetime = replayed(lifetime)  # of tensors on a GPU, and of constants
    loss = replayed_loss(loss, learner.parameters())  # with its backward pass

A function that is recorded must not look at values on the GPU, and depends on its inputs alone, and on
parameters that change in place.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def replayed(function: Callable) -> Callable:
    """The same function, in as many launches as it has results."""
    replay = _recorder(function)
    return lambda *inputs: tree_map_only(Tensor, torch.clone, replay(*inputs))


def replayed_loss(loss: Callable, parameters: Iterable[Tensor]) -> Callable:
    """The same loss(*inputs) -> (scalar, *other tensors), whose backward pass is a part of the graph: call backward before
    the next loss, which takes the place of its gradients."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def with_gradients(*inputs: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            value, *others = loss(*inputs)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.detach(), others, gradients

    replay = _recorder(with_gradients)

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: tuple[Tensor, ...], *_: Tensor) -> tuple[Tensor, ...]:
            value, others, ctx.gradients = replay(*inputs)
            others = [other.clone() for other in others]
            ctx.mark_non_differentiable(*others)
            return value.clone(), *others

        @staticmethod
        def backward(ctx: Any, of_value: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            return None, *(None if g is None else of_value * g for g in ctx.gradients)

    return lambda *inputs: Replayed.apply(inputs, *parameters)


def _recorder(function: Callable) -> Callable:
    """The same function, whose results stay valid until the next call."""
    recorded = {}

    def call(*inputs: Any) -> Any:
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        if shapes not in recorded:
            recorded[shapes] = _record(function, inputs)
        graph, held, results = recorded[shapes]
        torch._foreach_copy_(held, [x for x in inputs if isinstance(x, Tensor)])
        graph.replay()
        return results

    return call


def _record(function: Callable, inputs: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
    """The graph, its inputs and its results. The first call compiles, which a recording cannot."""
    inputs = tree_map_only(Tensor, torch.clone, inputs)
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function(*inputs)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)
    return graph, [x for x in inputs if isinstance(x, Tensor)], results
