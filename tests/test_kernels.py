"""common/kernels.py equals the readable forms, in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import ENV

import symla
import vsml
from common.datasets import Tasks, load
from common.kernels import lstm_cell, project, triton_rollout

INTERPRETED = "TRITON_INTERPRET" in os.environ

if torch.cuda.is_available() or not find_spec("triton"):
    pytest.skip("for Triton's interpreter", allow_module_level=True)


@pytest.mark.skipif(INTERPRETED, reason="starts the tests below")
def test_kernels_in_the_interpreter():
    """In a process of its own, as Triton must be imported for the interpreter from the start."""
    line = [sys.executable, "-m", "pytest", "-q", __file__]
    done = subprocess.run(line, env=ENV | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
@pytest.mark.parametrize(
    ("pairs", "t", "a", "b", "ticks", "feed_label", "slot"),
    [
        (2, 3, 5, 3, 2, False, 0),
        (2, 3, 5, 3, 2, True, 1),
        (1, 2, 20, 10, 2, True, 0),  # four tiles, the last one not full
        (1, 2, 20, 10, 3, False, 1),
        (1, 2, 100, 10, 1, True, 0),  # two parts
        (1, 3, 7, 1, 2, True, 0),
        (1, 2, 3, 70, 2, True, 0),  # more outputs than the usual tile has rows
    ],
)
def test_equals_the_readable_rollout(pairs, t, a, b, ticks, feed_label, slot):
    options = dict(micro_ticks=ticks, logit_scale=30.0, logit_slot=slot, feed_label=feed_label)
    learner, generator = vsml.VSML(vsml.Args(**options)), torch.Generator().manual_seed(0)
    theta = learner.init(generator) + 0.1 * torch.randn(2 * pairs, 2384, generator=generator)
    state = learner.initial_state(torch.arange(4 * pairs).view(-1, 1, 2), a, b)
    x = torch.randn(pairs, t, a, generator=generator)
    y = torch.randint(b, (pairs, t), generator=generator)
    params, h, c = learner.params(theta), state[0].h[:, 0], state[0].c[:, 0]
    for _ in range(2):  # the second time on the same buffers
        fast = triton_rollout(
            params, h, c, x, y, precision="ieee", logit_bound=100.0, **options
        )
    x, y = x.repeat(2, 1, 1)[:, None], y.repeat(2, 1)[:, None]
    last, losses, correct = vsml.rollout(learner, theta, state, x, y)
    expected = last[0].h[:, 0], last[0].c[:, 0], losses[:, 0]
    torch.testing.assert_close(fast[:3], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fast[3], correct[:, 0])


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
@pytest.mark.parametrize(("side", "t", "size"), [(8, 5, 64), (2, 17, 3), (14, 130, 70)])
def test_projections_equal_those_of_tasks(side, t, size):
    data = load("digits", "train", size=side)
    options = dict(projection="gaussian", projected=1.0, projection_size=size)
    tasks, ids = Tasks(data, **options, seed=3), torch.tensor([0, 5, 2**40 + 7])
    fast = Tasks(data, **options, seed=3, project=partial(project, precision="ieee"))
    x, y = tasks.sample(ids, ids, t)
    again, same = fast.sample(ids, ids, t)
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(y, same)


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
@pytest.mark.parametrize("shape", [(2, 3, 1, 2, 16), (1, 5, 4, 3, 32), (2, 70, 2, 1, 16)])
def test_a_cell_equals_the_readable_one(shape):
    (p, e, a, b, n), generator = shape, torch.Generator().manual_seed(0)
    shapes = (p, n, 4 * n), (p, e, a, 4 * n), (p, e, b, 4 * n), shape, shape
    inputs = [torch.randn(one, generator=generator) for one in shapes]
    expected = symla.lstm_cell(*inputs)
    torch.testing.assert_close(lstm_cell(*inputs, precision="ieee"), expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda *x: lstm_cell(*x, precision="ieee"), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)
