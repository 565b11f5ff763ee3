"""common/graphs.py without a GPU: a graph that keeps what was done while it was recorded, and does it again on the same
tensors. Like a GPU's, it refuses to look at values."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_fme
import test_symla
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fme
import gpicl
import symla
from common import graphs
from common.datasets import load

REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "_unique2", "masked_select")  # they wait for the GPU


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in REFUSED or any(x.dtype == torch.bool for x in tensors(args[1:2]) if name == "index"):
            raise RuntimeError(f"{name} cannot be recorded")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            held = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for new, old in zip(tensors(func(*args, **kwargs)), tensors(out), strict=True):
                if old.untyped_storage().data_ptr() not in held:  # no view, and not changed in place
                    old.detach().copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    @contextmanager
    def recording(graph):
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    pretended = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: nullcontext()}
    for name, value in (pretended | {"CUDAGraph": Graph, "graph": recording}).items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_replayed_function_is_the_function(gpu):
    called = []

    def function(x, count, y):
        called.append(count)
        for _ in range(count):
            x = x * y + 1
        return {"x": x, "sums": (x.sum(), y.mean(0))}

    fast, kept = graphs.replayed(function), []
    for size, count in ((3, 2), (3, 2), (4, 2), (3, 2), (3, 5)):
        x, y = torch.randn(2, size), torch.randn(size)
        kept.append((tensors(fast(x, count, y)), tensors(function(x, count, y))))
    assert len(called) == 5 + 2 * 3  # twice for each of three shapes
    for ours, theirs in kept:  # later calls do not change earlier results
        torch.testing.assert_close(ours, theirs)


def test_what_looks_at_values_is_refused(gpu):
    for function in (lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="recorded"):
            graphs.replayed(function)(torch.randn(5))


@pytest.mark.parametrize("name", ["transformer", "outer_lstm", "vsml", "maml", "mlp"])
def test_a_replayed_loss_has_the_gradients_of_the_loss(gpu, monkeypatch, name):
    """Also where they are accumulated, and after a step that changes the parameters."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    args = gpicl.Args(width=8, layers=2, heads=2, key_size=4, sequence_length=6, message_size=2)
    run, results = SimpleNamespace(compiles=True), {}
    for fast in (False, True):
        setting = torch.tensor([0.0, 4.0, 0.1]) if name == "maml" else None
        learner = gpicl.make_learner(name, args, 5, 3, setting)
        gpicl.initialise(learner, 0)
        loss_of, optimizer = gpicl.compiled(replace(args, graphs=fast), run, learner, 3), torch.optim.Adam(learner.parameters(), 0.01)
        generator, results[fast] = torch.Generator().manual_seed(1), []
        for _ in range(3):
            for size in (4, 4, 3):
                x = torch.randn(size, 6, 5, generator=generator)
                loss, accuracy = loss_of(x, torch.randint(3, (size, 6), generator=generator))
                (size * loss).backward()
                results[fast] += [loss.detach(), accuracy]
            results[fast] += [parameter.grad.clone() for parameter in learner.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    assert len(results[True]) > 18
    torch.testing.assert_close(results[True], results[False])


@pytest.mark.parametrize("dataset", ["digits", "random", "sum_sign"])
@pytest.mark.parametrize("classes", [None, (2, 3, 10)])
def test_tasks_can_be_recorded(gpu, dataset, classes):
    args = gpicl.Args(sequence_length=20, bias=0.5, batch=6, graphs=True)
    data = load(dataset, "train", size=8)
    tasks = gpicl.train_tasks(args, data, 64, classes if len(data) else None)
    fast = gpicl.sampling(args, tasks)
    for step in range(3):
        ids = gpicl.batch_ids(args, step, 0.5, torch.device("cpu"))
        torch.testing.assert_close(fast(*ids, 20), tasks.sample(*ids, 20))


ENVS = ["independent_bandit:3", "dependent_bandit", "cartpole", "acrobot", "mountain_car", "grid_world:3"]
ENVS += ["shuffled_upright_cartpole", "projected_dense_grid_world:3", "projected_balance_cartpole"]


@pytest.mark.parametrize("name", ENVS)
def test_lifetimes_can_be_recorded(gpu, name):
    env = symla.make_env(test_symla.ARGS, name, 4)
    for learner in symla.META_TRAINED if "bandit" in name else ("symla",):
        live = test_symla.lifetime_of(symla.LEARNERS[learner](test_symla.ARGS), env)
        fast = graphs.replayed(live)
        for seed in range(2):
            theta = test_symla.random_theta(live.args[0], 2)
            keys = test_symla.keys_of(4, seed).expand(2, -1, -1)
            torch.testing.assert_close(fast(theta, keys, 12), live(theta, keys, 12))


@pytest.mark.parametrize("name", list(fme.TUNED))
def test_executions_can_be_recorded(gpu, name):
    args = fme.with_tuned(test_fme.ARGS, name)
    env = fme.make_env(name, 5, "cpu")
    step = lambda *inputs: fme.one_step(args, env, False, *inputs)  # noqa: E731
    phi = fme.initialise(args, env, 5, torch.Generator().manual_seed(0))
    fast = graphs.replayed(lambda *inputs: fme.execute(args, env, step, *inputs))
    for seed in range(2):
        draws = torch.rand(11, 5, 1 + env.num_draws, generator=torch.Generator().manual_seed(seed))
        expected = fme.execute(args, env, step, phi, draws)
        torch.testing.assert_close(fast(phi, draws), expected)
        phi = expected.phi
