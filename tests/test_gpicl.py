"""gpicl.py: the mathematics of chapter 5, learning, and the command line as a user types it."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import PROCESS, ROOT, TWO, killed, rows, run_script
from sklearn.datasets import load_wine
from torch import nn

import gpicl
from common import checkpoints
from common.datasets import FIRST_ID, load
from common.features import Network
from common.incontext import FITTED
from common.optimizers import SignOfAverage

ARGS = gpicl.Args(
    width=12, layers=2, heads=2, key_size=5, grid=3, state_size=4, message_size=3, sequence_length=7, size=4, channels=1
)
SETTINGS = {"sgd": (0, 0, 0.3), "adam": (1, 6, 0.1), "maml": (0, 6, 0.2)}
LEARNERS = ("transformer", "lstm", "outer_lstm", "vsml", "vsml_nosym", "mlp", "maml", "sgd", "adam")


def make(name, args=ARGS, a=6, c=4):
    return gpicl.make_learner(name, args, a, c, torch.tensor(SETTINGS.get(name, ())))


def some_data(s=3, t=7, a=6, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(s, t, a, generator=generator), torch.randint(c, (s, t), generator=generator)


def logits_of(learner, x, y, c=4):
    return learner(x, gpicl.previous_labels(y, c))[0]


# ---- the mathematics ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LEARNERS)
def test_the_future_never_changes_a_prediction(name):
    """Eq. 5.2: y_j is predicted from D_{1:j-1} and x_j; with its label and all that follows it has nothing to do."""
    learner, (x, y) = make(name), some_data()
    before = logits_of(learner, x, y)
    other_x, other_y = x.clone(), y.clone()
    other_x[:, 5:], other_y[:, 4:] = 9.0, 3 - other_y[:, 4:]
    after = logits_of(learner, other_x, other_y)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    other_y = y.clone()
    other_y[:, 1] = (y[:, 1] + 1) % 4
    after = logits_of(learner, x, other_y)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert torch.allclose(before[:, 2:], after[:, 2:]) == (name == "mlp")  # all others listen to labels


@pytest.mark.parametrize("name", LEARNERS)
def test_one_example_at_a_time_equals_all_at_once(name):
    """The key-value cache, and the states of recurrent learners; also in pieces."""
    learner, (x, y) = make(name), some_data()
    label = gpicl.previous_labels(y, 4)
    whole, _ = learner(x, label)
    for pieces in ([1] * 7, [3, 1, 3]):
        state, actual = None, []
        for part, part_label in zip(x.split(pieces, 1), label.split(pieces, 1), strict=True):
            logits, state = learner(part, part_label, state)
            actual.append(logits)
        torch.testing.assert_close(torch.cat(actual, 1), whole, atol=1e-5, rtol=1e-4)


def test_the_transformer_against_loops():
    """Attention, position and norms of one block written slowly, for one sequence."""
    learner, (x, y) = make("transformer", replace(ARGS, layers=1)), some_data(s=1)
    for parameter in learner.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    block = learner.blocks[0]
    label = gpicl.previous_labels(y, 4)
    tokens = [learner.embed(torch.cat([x[0, t], label[0, t]])) + learner.position[t] for t in range(7)]
    normed = [block.attention_norm(token) for token in tokens]
    out = []
    for t in range(7):
        heads = []
        for h in range(2):
            q, k, v = (block.qkv.weight[10 * i + 5 * h : 10 * i + 5 * h + 5] for i in range(3))
            bq, bk, bv = (block.qkv.bias[10 * i + 5 * h : 10 * i + 5 * h + 5] for i in range(3))
            scores = [((q @ normed[t] + bq) @ (k @ normed[u] + bk)) / math.sqrt(5) for u in range(t + 1)]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * (v @ normed[u] + bv) for u, w in enumerate(weights)))
        token = tokens[t] + block.out(torch.cat(heads))
        token = token + block.down(F.gelu(block.up(block.mlp_norm(token))))
        out.append(learner.head(learner.norm(token)))
    torch.testing.assert_close(torch.stack(out), logits_of(learner, x, y)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformer", "lstm", "outer_lstm", "vsml_nosym"])
def test_labels_are_scaled_in_every_learner_that_reads_them(name):
    (x, y), label_scale = some_data(), 2.5
    label = gpicl.previous_labels(y, 4)
    one, scaled = make(name), make(name, replace(ARGS, label_scale=label_scale))
    torch.testing.assert_close(one(x, label_scale * label)[0], scaled(x, label)[0])
    assert not torch.allclose(one(x, label)[0], scaled(x, label)[0])


@pytest.mark.parametrize("name", ["maml", "transformer", "outer_lstm", "vsml_nosym"])
def test_meta_gradient_against_finite_differences(name):
    """For MAML the gradient goes through the online updates."""
    learner, (x, y) = make(name).double(), some_data()
    x = x.double()
    gpicl_labels = gpicl.previous_labels

    def loss():
        logits, _ = learner(x, gpicl_labels(y, 4).double())
        return F.cross_entropy(logits.mT, y)

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in learner.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(learner.parameters(), direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(learner.parameters(), direction, strict=True):
                p += step * d
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, atol=1e-6, rtol=1e-4)


def test_projections_of_algorithm_9():
    """A_ij ~ N(0, 1/N_x), the same for the same id, independent for others; rho fixed for the share that is biased."""
    dataset = load("digits")
    tasks = gpicl.train_tasks(replace(ARGS, num_tasks=2000, bias=0.75), dataset, 64)
    ids = torch.arange(200)
    a = tasks.projections(tasks.keys(ids, 1))
    assert a.shape == (200, 64, 64) and abs(a.mean()) < 1e-3
    torch.testing.assert_close(a.var(), torch.tensor(1 / 64), rtol=0.01, atol=0)
    torch.testing.assert_close(tasks.projections(tasks.keys(ids[7:9], 1)), a[7:9])
    assert abs((a[0] * a[1]).mean() * 64) < 0.06
    same = torch.zeros(2000, dtype=torch.int64)
    y = tasks.sample(torch.arange(2000), same, 40)[1]  # one sequence of examples in 2,000 tasks
    plain = replace(tasks, permuted_from=None).sample(torch.arange(2000), same, 40)[1]
    assert torch.equal(y[:1500], plain[:1500])  # one permutation for the first tasks
    assert not (y[1500:] == plain[1500:]).all(1).any()
    for fixed, permuted in zip(plain[1500:1550], y[1500:], strict=False):
        assert len({(int(k), int(h)) for k, h in zip(fixed, permuted, strict=True)}) == len(fixed.unique())


def test_ids_of_tasks():
    device = torch.device("cpu")
    args = replace(ARGS, batch=8, num_tasks=5, bias=0.0)
    tasks, sequences = gpicl.batch_ids(args, 3, 0.0, device)
    assert tasks.max() < 5 and sequences.tolist() == list(range(24, 32))
    parts = [gpicl.batch_ids(args, 3, 0.0, device, rank, 2) for rank in (0, 1)]
    assert sorted(torch.cat([part[1] for part in parts]).tolist()) == sequences.tolist()
    assert torch.equal(parts[1][0], tasks[1::2])
    many, _ = gpicl.batch_ids(replace(args, num_tasks=2**25, batch=4096), 0, 0.0, device)
    assert len(many.unique()) > 4090 and 2**25 * 0.4 < many.double().mean() < 2**25 * 0.6
    assert gpicl.batch_ids(replace(args, num_tasks=1, bias=0.9), 9, 0.9, device)[0].unique().tolist() == [0]


@pytest.mark.parametrize("num_tasks", [1, 2, 40, 2**25])
@pytest.mark.parametrize("bias", [0.0, 0.25, 0.9, 1.0])
def test_each_batch_has_the_share_of_biased_tasks(bias, num_tasks):
    """Section 5.4.3: exactly, where there are tasks of both kinds; and all of K are drawn."""
    args = replace(ARGS, batch=20, num_tasks=num_tasks, bias=bias)
    tasks = gpicl.train_tasks(args, load("digits"), 64)
    ids = torch.stack([gpicl.batch_ids(args, step, bias, torch.device("cpu"))[0] for step in range(40)])
    assert ids.min() >= 0 and ids.max() < num_tasks
    biased = (ids < tasks.permuted_from).float().mean(1)
    share = math.floor(bias * num_tasks) / num_tasks if num_tasks in (1, 2) else bias
    expected = share if share in (0, 1) else round(bias * 20) / 20
    assert torch.allclose(biased, torch.tensor(expected))
    if num_tasks == 40:
        assert len(ids.unique()) == 40


def test_a_task_keeps_its_labels_while_the_bias_falls():
    """Only the share of a batch moves."""
    args = replace(ARGS, batch=20, num_tasks=100, bias=0.9, bias_end=0.0)
    assert gpicl.biased_tasks(args) == 90 and gpicl.biased_tasks(replace(args, bias=0.1, bias_end=0.9)) == 90
    assert gpicl.biased_tasks(replace(args, bias=1.0)) == 50  # both kinds are there
    for bias, fixed in ((0.9, 18), (0.5, 10), (0.0, 0)):
        ids, _ = gpicl.batch_ids(args, 3, bias, torch.device("cpu"))
        assert (ids < 90).sum() == fixed


def test_seen_tasks_are_those_of_the_last_meta_steps():
    args = replace(ARGS, batch=8, num_tasks=2**25, meta_steps=50, bias=0.9, bias_end=0.0, test_tasks=20)
    cpu = torch.device("cpu")
    for plateau in (-1, 10):
        drawn = [gpicl.batch_ids(args, step, gpicl.schedule(args, step, plateau)[0], cpu)[0] for step in (49, 48, 47)]
        assert torch.equal(gpicl.seen_ids(args, 50, plateau, cpu), torch.cat(drawn)[:20])
    early = gpicl.seen_ids(args, 5, 10, cpu)  # before the plateau was left
    assert torch.equal(early[:8], gpicl.batch_ids(args, 4, 0.9, cpu)[0])
    two = replace(args, dataset=("digits", "wine"))  # which follow each other
    for number, steps in ((0, (48, 46, 44)), (1, (49, 47, 45))):
        drawn = [gpicl.batch_ids(args, step, gpicl.schedule(args, step, 10)[0], cpu)[0] for step in steps]
        assert torch.equal(gpicl.seen_ids(two, 50, 10, cpu, number), torch.cat(drawn)[:20])


def test_meta_tests_have_other_tasks_than_meta_training():
    """Of which there are at most 2^31."""
    ends = [first + 2**30 for first in sorted(FIRST_ID.values())]
    assert FIRST_ID["train"] + 2**31 <= FIRST_ID["test"] and ends[1] <= FIRST_ID["validation"]
    args = replace(ARGS, num_tasks=2**31, batch=128, bias=0.5, bias_end=0.9)
    ids, _ = gpicl.batch_ids(args, 2**20, 0.5, torch.device("cpu"))
    assert 0 <= ids.min() and ids.max() < FIRST_ID["test"]


def test_tasks_of_several_numbers_of_classes():
    """All classes of a task occur, and no others; labels are permuted among them."""
    tasks = gpicl.train_tasks(replace(ARGS, num_tasks=400, bias=0.0), load("digits"), 64, classes=(2, 3, 10))
    assert tasks.num_classes == 10
    ids = torch.arange(400)
    _, y = tasks.sample(ids, ids, 200)
    counts = torch.tensor([len(row.unique()) for row in y])
    assert set(counts.tolist()) == {2, 3, 10} and torch.equal(y.max(1).values + 1, counts)
    assert all(100 < (counts == k).sum() < 170 for k in (2, 3, 10))
    assert gpicl.class_counts(replace(ARGS, classes=(2, 50)), load("wine")) == (2, 3)
    assert gpicl.class_counts(ARGS, load("wine")) is gpicl.class_counts(replace(ARGS, classes=(2,)), load("random")) is None
    first = y[counts == 3][:, 0].bincount().float()
    assert (first / first.sum() - 1 / 3).abs().max() < 0.13


def test_the_same_id_is_the_same_task_in_another_process():
    code = """
import torch
from common.datasets import Tasks, load
from common.rng import compile_draws
tasks = Tasks(load("digits"), projection="gaussian", projected=1.0, permuted_labels=1.0, seed=3)
x, y = tasks.sample(torch.tensor([5, 2**40 + 5]), torch.tensor([1, 2]), 9)
"""
    out = "print(x.sum().item(), y.tolist())"
    line = [sys.executable, "-c", code + out]
    other = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    actual = {}
    exec(code, actual)
    total, labels = other.split(" ", 1)
    assert float(total) == pytest.approx(actual["x"].sum().item(), abs=1e-4)
    assert json.loads(labels) == actual["y"].tolist() and actual["y"][0].tolist() != actual["y"][1].tolist()


def test_sign_of_average():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer, average = SignOfAverage([parameter], 0.1), torch.zeros(3)
    expected = parameter.detach().clone()
    for t in range(5):
        parameter.grad = torch.tensor([1.0, -1e-9, (-1.0) ** t])
        optimizer.step()
        average = 0.9 * average + 0.1 * parameter.grad
        expected -= 0.1 * average.sign()
    torch.testing.assert_close(parameter.detach(), expected)


def test_state_sizes():
    """Section 5.4.2: N_K N_L N_T for a Transformer, here keys and values of all heads; N_H for an LSTM, with its cell."""
    sizes = {
        name: gpicl.state_size(make(name), ARGS, 6, 4) for name in ("transformer", "lstm", "outer_lstm", "vsml_nosym", "mlp")
    }
    assert sizes == {
        "transformer": 2 * 2 * 5 * 2 * 7,
        "lstm": 2 * 12,
        "outer_lstm": 2 * 5 * 5 + 10,
        "vsml_nosym": 2 * 9 * 16,
        "mlp": 0,
    }


def test_plateau_end():
    flat = [2.3, 2.25, 2.2, 2.1]
    assert gpicl.plateau_end([9, 19, 29, 39], flat, math.log(10)) is None
    assert gpicl.plateau_end([9, 19, 29, 39, 49], [*flat, 2.0], math.log(10)) == 49
    data = [load("digits"), load("wine")]
    assert gpicl.chance_loss(data) == pytest.approx((math.log(10) + math.log(3)) / 2)


def test_bias_and_learning_rate_fall_once_the_plateau_is_left():
    args = replace(ARGS, bias=0.9, bias_end=0.1, lr=0.5, lr_decay=True, meta_steps=100)
    assert [gpicl.schedule(args, step, -1) for step in (0, 99)] == [(0.9, 0.5)] * 2
    for step, expected in {20: (0.9, 0.5), 60: (0.5, 0.25), 100: (0.1, 0)}.items():
        assert gpicl.schedule(args, step, 20) == pytest.approx(expected)
    assert gpicl.schedule(replace(args, bias_end=None, lr_decay=False), 99, 20) == (0.9, 0.5)


def test_meta_test_tells_seen_from_unseen():
    """Seen tasks are ids of meta-training; unseen ones are not, and their labels are permuted uniformly; examples are of the
    test split, and sequences ones that were never trained on."""
    args = replace(ARGS, dataset=("digits",), num_tasks=3, test_tasks=4, size=8, bias=1.0)
    tests = gpicl.test_tasks(replace(args, test_datasets=("digits", "wine")), torch.device("cpu"), 64)
    assert list(tests) == [("digits", "none"), ("digits", "task"), ("wine", "domain")]
    assert all(tasks.dataset.split == "test" for tasks in tests.values())
    asked = []

    class Spy:
        dataset, num_inputs = tests["digits", "none"].dataset, 64

        def sample(self, ids, sequences, length):
            asked.append((ids, sequences, length))
            return torch.zeros(len(ids), length, 64), torch.zeros(len(ids), length)

    for ids in (gpicl.seen_ids(replace(args, batch=6), 9, -1, torch.device("cpu")), None):
        list(gpicl.test_data(args, Spy(), 10, 7, ids))
    (seen, first, length), (unseen, second, _) = asked
    assert seen.max() < 3 and unseen.min() >= FIRST_ID["test"] and length == 7
    assert torch.equal(first, second) and first.min() >= FIRST_ID["test"]
    assert len(unseen.unique()) == 4 and len(unseen) == 10
    assert tests["digits", "none"].permuted_from == 3 and tests["digits", "task"].permuted_from == 0


def test_sgd_and_adam_have_the_best_settings_on_the_train_split_of_what_is_tested(monkeypatch):
    """Those of the first dataset of meta-training were chosen before it."""
    asked, search = [], gpicl.search_rates

    def spied(args, tasks, num_classes, rules):
        asked.append((tasks.dataset.name, tasks.dataset.split, tasks.num_inputs, num_classes, rules))
        return search(args, tasks, num_classes, rules, hidden=(0, 4))

    monkeypatch.setattr(gpicl, "search_rates", spied)
    args = replace(ARGS, dataset=("digits",), test_datasets=("digits", "wine", "random"), size=4, sequence_length=6)
    learners = {"transformer": None} | {
        name: gpicl.make_learner(name, args, 16, 10, torch.tensor([0.0, 0.0, 0.1])) for name in ("adam", "sgd")
    }
    for (name, novelty), tasks in gpicl.test_tasks(args, torch.device("cpu"), 16).items():
        own = gpicl.with_own_settings(args, learners, tasks, 10)
        assert list(own) == list(learners) and own["transformer"] is None
        assert (own == learners) == (name == "digits"), novelty
    assert [what[:4] for what in asked[::2]] == [("wine", "train", 16, 10), ("random", "train", 16, 10)]
    assert [what[4] for what in asked[:2]] == [("sgd",), ("adam", "adamw")]


def test_the_rate_of_sgd_is_the_best_of_the_grid():
    args = replace(ARGS, sequence_length=30)
    tasks = gpicl.train_tasks(args, load("wine", "train"), 13)
    setting = gpicl.search_rates(args, tasks, 3, ("sgd",), hidden=(0,))
    x, y = tasks.sample(*gpicl.batch_ids(replace(args, batch=32), 0, gpicl.last_bias(args), torch.device("cpu")), 30)
    grid = torch.logspace(-4, math.log10(0.5), 16)
    learners = [gpicl.make_learner("sgd", args, 13, 3, torch.tensor([0, 0, rate])) for rate in grid]
    accuracies = torch.stack([gpicl.rollout(learner, x, y, 3)[1].float().mean() for learner in learners])
    assert setting[2] == grid[accuracies.argmax()] and accuracies.max() > accuracies.min() + 0.1


def test_the_optimizer_has_the_epsilon_and_the_weight_decay_of_the_flags():
    model = torch.nn.Linear(2, 2)
    for name in ("adam", "adamw"):
        optimizer = gpicl.make_optimizer(replace(ARGS, meta_optimizer=name, eps=1e-5, weight_decay=0.3), model)
        assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["weight_decay"]) == (1e-5, 0.3)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_what_is_tested_is_of_the_split_that_was_asked_for(split):
    args = replace(ARGS, dataset=("digits",), test_datasets=("digits", "wine"), split=split)
    for tasks in gpicl.test_tasks(args, torch.device("cpu"), 16).values():
        assert tasks.dataset.split == split


def test_images_of_one_shape():
    args = replace(ARGS, channels=3, size=6)
    grey = gpicl.prepare(args, "digits", "test", torch.device("cpu"))
    assert grey.shape == (3, 6, 6) and torch.equal(grey.x[:, 0], grey.x[:, 2])
    assert gpicl.prepare(args, "random", "test", torch.device("cpu")).shape == (3, 6, 6)
    x, y = gpicl.train_tasks(args, gpicl.prepare(args, "random", "test", torch.device("cpu")), 108).sample(
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 40
    )
    assert len(x[0].round(decimals=4).unique(dim=0)) == 10  # ten points, repeated (Appendix D.5)
    for point in range(10, 40):
        twin = next(t for t in range(10) if torch.allclose(x[0, t], x[0, point], atol=1e-5))
        assert y[0, twin] == y[0, point]


# ---- it learns to learn ------------------------------------------------------------------------------------------------


class Silent:
    """A run without a folder, a bar or a compiler."""

    device, rank, world, compiles = torch.device("cpu"), 0, 1, False

    def steps(self, total, keep):
        return range(total)

    def log(self, step, values):
        self.last = values


def meta_trained(num_tasks, steps):
    """A small Transformer, meta-trained on wine; its accuracy (t,) on unseen tasks of unseen wine; and those sequences."""
    small = dict(width=32, heads=2, sequence_length=20, batch=32, meta_steps=steps, lr=3e-3, classes=())
    small |= dict(label_scale=3**0.5)
    args = gpicl.Args(**gpicl.LAPTOP | small | dict(num_tasks=num_tasks))
    train, test = (gpicl.prepare(args, "wine", split, Silent.device) for split in ("train", "test"))
    learner, run = make("transformer", args, 13, 3), Silent()
    gpicl.keep_memory()
    gpicl.meta_train(args, {"transformer": learner}, [train], {}, run, {"sizes": torch.tensor([13, 3]), "plateau": torch.tensor(-1)})
    unseen = replace(gpicl.train_tasks(args, test, 13), permuted_from=0)
    x, y = next(gpicl.test_data(args, unseen, 512, 20))
    with torch.no_grad():
        right = gpicl.rollout(learner, x, y, 3)[1].float().mean(0)
    return learner, run.last, right, x, y


def test_chunks_of_a_batch_give_the_same_parameters():
    """--chunk accumulates gradients."""
    after = []
    for chunk in (None, 3):
        args = gpicl.Args(**gpicl.LAPTOP | dict(batch=8, meta_steps=3, width=16, heads=2, chunk=chunk, sequence_length=5))
        learner = make("transformer", args, 13, 3)
        data = gpicl.prepare(args, "wine", "train", Silent.device)
        gpicl.meta_train(args, {"transformer": learner}, [data], {}, Silent(), {"sizes": torch.tensor([13, 3]), "plateau": torch.tensor(-1)})
        after.append(learner.state_dict())
    for name, value in after[0].items():
        if not name.endswith("qkv.bias"):  # that of keys has no gradient but rounding, which Adam blows up
            torch.testing.assert_close(after[1][name], value, atol=1e-5, rtol=1e-3)


def test_many_tasks_teach_to_learn():
    """And what was learned to learn: labels are names. Under other names of the classes the first prediction, made before any
    label, is the same, and the last one says the other name."""
    learner, _, right, x, y = meta_trained(2**25, steps=1500)
    assert right[0] < 0.45 and right[-5:].mean() > 0.6
    order = torch.tensor([1, 2, 0])
    with torch.no_grad():
        one, other = logits_of(learner, x, y, 3).argmax(-1), logits_of(learner, x, order[y], 3).argmax(-1)
    assert torch.equal(one[:, 0], other[:, 0])
    renamed, same = ((answer[:, -1] == other[:, -1]).float().mean() for answer in (order[one], one))
    assert renamed > 0.5 and renamed > 2.5 * same


def test_one_task_does_not():
    """It is memorised, from the first example on, and nothing is learned within a sequence of another one."""
    _, last, right, _, _ = meta_trained(1, steps=300)
    assert last["transformer_loss"] < 0.05
    assert abs(right[-5:].mean() - right[0]) < 0.12 and right[-5:].mean() < 0.45


# ---- the thesis' preset ------------------------------------------------------------------------------------------------
THESIS = dict(  # appendices D.4 and D.5, but where a comment says so
    learner="transformer", dataset=("mnist",), size=32, channels=3, normalise_inputs=True, num_tasks=2**25, bias=0.9,
    bias_end=None, classes=(), sequence_length=100, width=256, layers=4, heads=8, key_size=32,
    state_size=16, message_size=8, micro_ticks=2, batch=128, meta_steps=50_000, meta_optimizer="adam", lr_decay=False,
    clip=None, label_scale=1.0, test_seeds=512,
    lr=2e-4,  # a public replication's
)  # fmt: skip
LONE = dict(learner="lstm", meta_steps=100_000)
FASHION = dict(dataset=("fashion_mnist",), num_tasks=2**16, bias=0.0)
ROWS = {  # row and label of the command at the thesis preset -> what differs from THESIS
    ("G1", "learner transformer, num_tasks 8192, width 32"): dict(bias=0.0, num_tasks=2**13, width=32),
    ("G2", "dataset mnist"): {},
    ("G2", "dataset fashion_mnist"): dict(dataset=("fashion_mnist",)),
    ("G3", ""): {},
    ("G3", "maml"): dict(learner="maml"),
    ("G3", "lstm"): LONE,
    ("G3", "vsml"): dict(learner="vsml", batch=8),
    ("G4", "num_tasks 65536"): dict(bias=0.0, num_tasks=2**16, normalise_inputs=False),
    ("G5", "learner transformer, key_size 16"): dict(bias=0.0, key_size=16, batch=512),
    ("G5", "learner lstm, width 64"): LONE | dict(width=64, bias=0.0),
    ("G5", "learner vsml_nosym, grid 8"): dict(learner="vsml_nosym", grid=8, size=14, channels=1),
    ("G5", "learner outer_lstm, key_size 8"): dict(learner="outer_lstm", key_size=8, bias=0.0),
    ("G6", "batch 2048, num_tasks 65536"): FASHION | dict(batch=2048),
    ("G7", "bias 0.5"): FASHION | dict(bias=0.5),
    ("G8", "sign"): FASHION | dict(meta_optimizer="sign", lr=1e-4, meta_steps=100_000),  # see reproduce.py
    ("G9", "features resnet50"): dict(bias=0.0, features="resnet50"),
    ("G10", "sequence_length 200"): dict(bias=0.0, sequence_length=200),
    ("G11", "plateau"): FASHION | dict(statistics=True),
    ("G12", "num_tasks 16384, weight_decay 1"): dict(bias=0.0, num_tasks=2**14, meta_optimizer="adamw", weight_decay=1.0),
}  # fmt: skip


@pytest.mark.parametrize(("row", "label"), ROWS, ids=str)
def test_rows_at_the_thesis_preset_have_the_thesis_numbers(row, label):
    import reproduce

    _, *flags = reproduce.ROWS[row].commands("thesis")[label].split()
    args = gpicl.with_budget(tyro.cli(gpicl.Args, args=flags, default=gpicl.Args(**gpicl.PRESETS["thesis"])))
    expected = THESIS | ROWS[row, label]
    assert {name: getattr(args, name) for name in expected} == expected


# ---- the command line --------------------------------------------------------------------------------------------------
TINY = "--preset laptop --meta-steps 6 --batch 4 --sequence-length 12 --width 16 --heads 2 --key-size 4 --test-seeds 6"
TINY += " --test-tasks 3 --checkpoint-every 2 --log-every 2 --no-compile --test-datasets digits wine --size 4"


def command(run_dir, flags, launcher=None, tiny=TINY):
    return run_script("gpicl.py", run_dir, f"{tiny} {flags}", launcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which other tests only read."""
    run_dir = tmp_path_factory.mktemp("runs")
    done = command(run_dir, "--run-name done --statistics", launcher=PROCESS)
    assert done.returncode == 0, done.stderr
    return run_dir / "done", done


def test_what_a_run_leaves_behind(finished):
    folder, done = finished
    names = {path.name for path in folder.iterdir()}
    figures = {"accuracy.png", "meta_loss.png", "statistics.png"}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "results.json"} | figures <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any("partial" in name for name in names)
    results = json.loads((folder / "results.json").read_text())
    assert results["script"] == "gpicl" and results["preset"] == "laptop" and results["state_size"] == 2 * 2 * 4 * 2 * 12
    assert results["args"]["num_tasks"] == 2**25 and set(results["seconds"]) == {"meta_train", "meta_test"}
    assert results["plateau"] is None and 2 < results["final_loss"] < 3
    keys = {"learner", "task", "novelty", "metric", "step", "mean", "std", "seeds"}
    assert all(set(row) == keys for row in results["results"])
    seen = {(row["learner"], row["task"], row["novelty"]) for row in results["results"]}
    kinds = (("digits", "none"), ("digits", "task"), ("wine", "domain"))
    assert seen == {(x, *y) for x in ("transformer", "sgd", "adam", "untrained") for y in kinds}
    assert {row["step"] for row in results["results"]} == {1, 2, 5, 10, 12}
    with open(folder / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [1, 3, 5]
    columns = {f"transformer_loss{what}" for what in ("", "_unseen", "_domain")} | {"transformer gradient norm head.weight"}
    assert columns <= set(lines[0]) and all(float(line[name]) > 0 for line in lines for name in columns)
    assert "transformer" in done.stdout and "1 -> 12" in done.stdout


def test_statistics_change_nothing_and_the_seed_decides(finished, tmp_path):
    assert command(tmp_path, "--run-name again").returncode == 0
    assert rows(tmp_path / "again") == rows(finished[0])
    assert command(tmp_path, "--run-name other --seed 1 --baselines").returncode == 0
    assert rows(tmp_path / "other") != [row for row in rows(finished[0]) if row["learner"] == "transformer"]


KILLS = {
    "--meta-optimizer adam --baselines sgd --statistics --log-every 1": ("checkpoint.pt", 3),  # of meta-steps 0, 5 and 10
    "--meta-optimizer sign --baselines maml": ("meta_test.pt", 2),
}


@pytest.mark.parametrize("flags", KILLS)
def test_kill_and_resume_end_in_the_same_numbers(flags, tmp_path):
    ending, nth = KILLS[flags]
    flags += " --meta-steps 20 --lr 1e-3 --checkpoint-every 5"
    assert command(tmp_path, f"{flags} --run-name whole").returncode == 0
    cut = command(tmp_path, f"{flags} --run-name cut", launcher=killed(ending, nth))
    assert cut.returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / ending).exists() and not (tmp_path / "cut" / "results.json").exists()
    resumed = command(tmp_path, f"--resume {tmp_path / 'cut'}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    with open(tmp_path / "cut" / "metrics.csv") as mine, open(tmp_path / "whole" / "metrics.csv") as theirs:
        mine, theirs = (
            [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)] for file in (mine, theirs)
        )
    assert mine == theirs
    mine, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("cut", "whole"))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_meta_test_of_a_checkpoint(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'} --run-name"
    tested = command(tmp_path, f"{flags} test")
    assert tested.returncode == 0, tested.stderr
    assert rows(tmp_path / "test") == rows(finished[0])
    assert command(tmp_path, f"{flags} small --size 6").returncode == 0  # projected to the size that it knows


def test_fewer_classes_than_a_test_dataset_has(tmp_path):
    done = command(tmp_path, "--dataset wine --baselines --run-name wine")
    assert done.returncode == 0, done.stderr
    assert "digits is left out: it has 10 classes, the learners were made for 3" in done.stderr + done.stdout
    assert {row["task"] for row in rows(tmp_path / "wine")} == {"wine"}


def test_two_processes_end_in_the_numbers_of_one(tmp_path):
    assert command(tmp_path, "--baselines --run-name one").returncode == 0
    two = command(tmp_path, "--baselines --run-name two", launcher=TWO)
    assert two.returncode == 0, two.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("one", "two"))
    for name, value in one["['models']['transformer']"].items():
        if name.endswith("qkv.bias"):
            continue  # that of keys has no gradient but rounding, which Adam blows up
        torch.testing.assert_close(two["['models']['transformer']"][name], value, atol=1e-4, rtol=1e-4)
    for one, two in zip(*(rows(tmp_path / name) for name in ("one", "two")), strict=True):
        if one["metric"] == "cross_entropy":
            assert one["mean"] == pytest.approx(two["mean"], abs=1e-3)


@pytest.mark.parametrize("learner", ["lstm", "outer_lstm", "vsml", "vsml_nosym", "mlp", "maml"])
def test_other_learners(learner, tmp_path):
    done = command(tmp_path, f"--learner {learner} --baselines --run-name {learner}")
    assert done.returncode == 0, done.stderr
    assert {row["learner"] for row in rows(tmp_path / learner)} == {learner}
    tested = command(tmp_path, f"--mode test --checkpoint {tmp_path / learner / 'checkpoint.pt'} --run-name test")
    assert tested.returncode == 0, tested.stderr
    assert rows(tmp_path / "test") == rows(tmp_path / learner)


def test_baselines_fitted_by_scikit_learn(finished, tmp_path):
    """As a user asks for them."""
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'} --baselines logistic neighbors forest --run-name fit"
    assert command(tmp_path, f"{flags} --test-datasets wine").returncode == 0
    names = {(row["learner"], row["step"]) for row in rows(tmp_path / "fit") if row["metric"] == "accuracy"}
    assert names == {(name, step) for name in ("transformer", *FITTED) for step in (1, 2, 5, 10, 12)}


def test_scikit_learn_sees_the_same_examples_without_a_projection(monkeypatch):
    """Of a test set each way of choosing tasks."""
    args = replace(ARGS, dataset=("wine",), test_datasets=("wine",), test_seeds=4, test_tasks=2, baselines=("forest",))
    (seen, unseen) = gpicl.test_tasks(args, torch.device("cpu"), 20).values()
    asked = []
    fitted = lambda name, x, y, steps: asked.append((x, y)) or torch.ones(4, len(steps))  # noqa: E731
    monkeypatch.setattr(gpicl.incontext, "fitted_correct", fitted)
    for tasks, ids in ((unseen, None), (seen, torch.tensor([3, 8]))):
        rows, _ = gpicl.measured(args, {}, "wine", "task", tasks, 3, ids)
        projected, labels = next(gpicl.test_data(args, tasks, 4, 7, ids))
        (x, y), data = asked.pop(), tasks.dataset
        assert x.shape == (4, 7, 13) and projected.shape == (4, 7, 20) and torch.equal(y, labels)
        assert all((data.x == example).all(1).any() for example in x.flatten(0, 1))
        assert {row["learner"] for row in rows} == {"forest"}


def test_a_trained_learner_from_python(finished):
    """It answers what the meta-test's forward pass answers; predict changes nothing; streams are independent."""
    load = partial(gpicl.InContextLearner.load, finished[0] / "checkpoint.pt", num_classes=10)
    x, y = some_data(s=2, t=12, a=13, c=10)
    both, one = load(), load()
    for t in range(11):
        both.predict(x[:, t : t + 1])
        both.learn(x[:, t : t + 1], y[:, t : t + 1])
        one.learn(x[0, t].numpy(), int(y[0, t]))
        if t == 5:
            state = both.state
            torch.testing.assert_close(both.predict(x[:, 6:9])[0], one.predict(x[0, 6:9]))
    model, projection = both.learner.model, both.state.projection
    label = gpicl.previous_labels(y, 10)
    with torch.no_grad():
        whole = model(x @ projection, label)[0].softmax(-1)
        again = model(x[:, 6:7] @ projection, label[:, 6:7], state.before)[0].softmax(-1)
    assert (projection[0] - projection[1]).abs().max() > 0.1
    torch.testing.assert_close(again, whole[:, 6:7])
    fresh = load()
    fresh.learn(x[:, :6], y[:, :6])
    torch.testing.assert_close(fresh.predict(x[:, 6:7]), whole[:, 6:7])
    torch.testing.assert_close(both.predict(x[:, 11:]), whole[:, 11:])
    with pytest.raises(ValueError, match="from at most 11 examples"):
        both.learn(x[:, :1], y[:, :1])
    both.reset()
    torch.testing.assert_close(both.predict(x[:, :1]), whole[:, :1])


def test_the_shipped_learner_learns_wine():
    """From 39 examples, which leave it one position to predict at."""
    data = load_wine()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    accuracy = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(x))
        learner = gpicl.InContextLearner.load("pretrained", seed=seed)
        learner.learn(x[order[:39]], data.target[order[:39]])
        correct = learner.predict(x[order[39:]]).argmax(1).numpy() == data.target[order[39:]]
        accuracy.append(correct.mean())
    assert np.mean(accuracy) > 0.85


def test_fewer_classes_than_were_meta_trained(finished):
    learner = gpicl.InContextLearner.load(finished[0] / "checkpoint.pt")
    learner.learn(torch.eye(5), [0, 1, 2, 2, 1])
    p = learner.predict(torch.eye(5))
    assert p.shape == (5, 3)
    torch.testing.assert_close(p.sum(1), torch.ones(5))


def test_a_trained_learner_refuses_what_it_cannot_learn(finished, tmp_path):
    """With one error, and it learns nothing from it."""
    learner = gpicl.InContextLearner.load(finished[0] / "checkpoint.pt", num_classes=10)
    x = torch.arange(5.0)
    learner.learn(x, 3)
    before = learner.predict(x)
    for label in (10, -1, 2.5):
        with pytest.raises(ValueError, match="(?i)label"):
            learner.learn(x, label)
    for classes in (0, 1, True, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="whole number from 2 on"):
            gpicl.InContextLearner.load(finished[0] / "checkpoint.pt", num_classes=classes)
    for wrong in (torch.ones(7), [1.0] * 4, x * math.nan, x / 0):
        for use in (learner.predict, lambda x: learner.learn(x, 1)):
            with pytest.raises(ValueError, match="Inputs have to be"):
                use(wrong)
    with pytest.raises(ValueError, match="from at most 11 examples"):
        learner.learn(x.repeat(11, 1), [0] * 11)  # the last position is for a prediction
    torch.testing.assert_close(learner.predict(x), before)
    learner.learner.model.head.bias.data.fill_(math.inf)  # as after an overflow
    for use in (learner.predict, lambda x: learner.learn(x, 1)):
        with pytest.raises(ValueError, match="too large"):
            use(x)
    fresh = gpicl.InContextLearner.load(finished[0] / "checkpoint.pt")
    for wrong in ([0, 11], [0] * 12):
        with pytest.raises(ValueError, match="has 10 classes|at most 11 examples"):
            fresh.learn(torch.randn(len(wrong), 4), wrong)
    fresh.learn(torch.randn(2, 5), [0, 2])  # other sizes than those refused
    assert fresh.predict(torch.randn(5)).shape == (3,)
    with pytest.raises(ValueError, match="has 10 classes, not 11"):
        gpicl.InContextLearner.load(finished[0] / "checkpoint.pt", num_classes=11).predict(x)

    saved = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    for name, part in (("foreign", {"args": {"population": 3}}), ("other", {"method": "fme"})):
        checkpoints.write(tmp_path / f"{name}.pt", saved | part)
        with pytest.raises(gpicl.UserError, match="is not a checkpoint of this gpicl"):
            gpicl.InContextLearner.load(tmp_path / f"{name}.pt")
    with pytest.raises(gpicl.CheckpointError, match="There is no checkpoint"):
        gpicl.InContextLearner.load(tmp_path / "none.pt")


def test_settings_and_sizes_that_are_none(finished, complain, tmp_path):
    saved = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    parts = {"['sizes']": torch.tensor([-3, 10]), "['settings']['sgd']": torch.tensor([7.0, 0.0, 0.1])}
    for name, part in parts.items():
        checkpoints.write(tmp_path / "x.pt", saved | {"state": saved["state"] | {name: part}})
        message = complain("gpicl", f"--mode test --checkpoint {tmp_path / 'x.pt'}")
        assert re.search("x.pt are damaged", message)


@pytest.fixture
def brightness(monkeypatch):
    """A pre-trained network whose features are the mean brightness of four bands of an image."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(12, 4, bias=False)).requires_grad_(False)
    net[2].weight.copy_(torch.eye(4).repeat(1, 3) / 3)
    network = Network(net, 224, (0.0,) * 3, (1.0,) * 3)
    monkeypatch.setattr(gpicl, "feature_network", lambda name, data_dir: network)


def test_features_are_normalised_by_the_train_split(brightness, tmp_path):
    """Test images that are brighter than train images keep being so."""
    rng = np.random.default_rng(0)
    dark, bright = rng.integers(0, 100, (40, 8, 8), np.uint8), rng.integers(100, 200, (20, 8, 8), np.uint8)
    y = np.arange(40) % 2
    np.savez(tmp_path / "my.npz", x_train=dark, y_train=y, x_test=bright, y_test=y[:20])
    train, test = (load(str(tmp_path / "my.npz"), split) for split in ("train", "test"))
    inside, outside = (gpicl.embed(data, "resnet18", tmp_path) for data in (train, test))
    assert inside.shape == (4,) and abs(inside.x.mean()) < 1e-5 and abs(inside.x.std() - 1) < 1e-5
    features = gpicl.features(train, "resnet18", tmp_path)
    expected = (gpicl.features(test, "resnet18", tmp_path) - features.mean()) / features.std()
    assert torch.equal(outside.x, expected) and outside.x.mean() > 3
    black = gpicl.features(replace(train, x=train.x * 0), "resnet18", tmp_path)
    assert not black.any() and features.any()  # other images of the same name are not taken for these


def test_features_are_kept(brightness, tmp_path):
    """Computed once; damaged ones are computed again."""
    flags = f"{TINY.replace('digits wine', 'digits')} --features untrained --baselines --data-dir data --run-name"
    done = command(tmp_path, f"{flags} one", tiny="")
    assert done.returncode == 0, done.stderr
    assert "untrained on digits test" in done.stderr and "untrained on digits train" in done.stderr
    kept = sorted((tmp_path / "data" / "features").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in kept] == [f"untrained-digits-{split}" for split in ("test", "train", "validation")]
    again = command(tmp_path, f"{flags} two", tiny="")
    assert again.returncode == 0 and "untrained on digits" not in again.stderr
    intact = kept[0].read_bytes()
    kept[0].write_bytes(intact[:-100])
    third = command(tmp_path, f"{flags} three", tiny="")
    assert third.returncode == 0 and "untrained on digits test" in third.stderr
    assert "untrained on digits train" not in third.stderr and kept[0].read_bytes() == intact
    assert rows(tmp_path / "one") == rows(tmp_path / "two") == rows(tmp_path / "three")


REFUSED = {
    "--dataset mnits": "There is no dataset 'mnits'; choose from digits, wine",
    "--dataset mnist --data-dir {tmp}/none": "'mnist' is not in '.*none' and could not be downloaded; use a bundled dataset",
    "--dataset": "--dataset needs at least one dataset",
    "--num-tasks 0": "--num-tasks has to be from 1",
    "--num-tasks 9999999999": "--num-tasks has to be from 1",
    "--bias 1.5": "--bias has to be from 0 to 1",
    "--bias-end nan": "--bias-end has to be from 0 to 1",
    "--size 20000": "--size has to be from 1 to 1024",
    "--clip -1": "--clip has to be",
    "--clip 0": "--clip has to be",
    "--lr 0": "--lr has to be",
    "--eps -1": "--eps has to be",
    "--weight-decay nan": "--weight-decay has to be",
    "--test-steps 13": "has --sequence-length 12 positions, not 13",
    "--features resnet18": "The weights of resnet18 are not at hand and could not be downloaded",
    "--features clip": "needs open_clip",
    "--features untrained --dataset wine --test-datasets wine": "'wine' has no stored uint8 images to compute features of",
    "--mode test --checkpoint {done}/checkpoint.pt --learner lstm": "checkpoint.pt has no 'models lstm'",
    "--mode test --checkpoint {done}/checkpoint.pt --learner maml": "checkpoint.pt has no 'settings maml'",
    "--mode test --checkpoint {done}/checkpoint.pt --width 32": "checkpoint.pt has no 'models transformer' of the kind and size",
    "--mode test --checkpoint {done}/checkpoint.pt --heads 4 --key-size 2": "keeps its flags; leave out --heads",
    "--mode test --checkpoint {done}/checkpoint.pt --meta-steps 9": "keeps its flags; leave out --meta-steps",
    "--dataset wine --test-datasets digits": "No learner fits any of the test datasets",
    "--classes 1 2": "--classes has to be from 2 on",
    "--maml-lr 1": "are for maml",
    "--mode test --checkpoint {done}/checkpoint.pt --dataset wine": "A resumed or tested run keeps its flags; leave out --dataset",
    "--mode test --checkpoint {done}/checkpoint.pt --preset thesis": "leave out --preset",
    "--weight-decay 0.1 --meta-optimizer sign": "--weight-decay is for --meta-optimizer adamw",
    "--dataset digits wine --log-every 3": "--log-every has to be a multiple of the 2 datasets",
    "--learner forest": "--learner forest is a baseline",
    "--triton --device cpu": "--triton needs a GPU",
    "--graphs --device cpu": "--graphs needs a GPU",
    "--lr 1e29 --baselines": r"is not finite at meta-step \d+; .* Try a smaller learning rate",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_mistake_gets_one_sentence_and_a_non_zero_exit_code(flags, finished, complain, tmp_path):
    message = complain("gpicl", f"{TINY} {flags}".format(tmp=tmp_path, done=finished[0]))
    assert re.search(REFUSED[flags], message), message
    if "1e29" not in flags:  # nothing is written before everything is checked
        assert not {path.name for path in tmp_path.iterdir()} - {"none"}


# ---- what a release has to reach: python -m pytest -m slow -------------------------------------------------------------
DATA = Path(os.environ.get("CLEANMETA_DATA", ROOT / "data")).absolute()


@pytest.mark.slow
def test_the_laptop_preset_reaches_its_floors(tmp_path):
    """`python gpicl.py`, and its checkpoint on MNIST and Fashion-MNIST if they are at hand."""

    def run(name, flags):
        line = [sys.executable, str(ROOT / "gpicl.py"), "--run-dir", str(tmp_path), "--run-name", name, "--data-dir", str(DATA)]
        subprocess.run([*line, *flags.split()], check=True, cwd=tmp_path)
        actual = [row for row in rows(tmp_path / name) if row["metric"] == "accuracy"]
        return {(row["learner"], row["task"], row["novelty"], row["step"]): row["mean"] for row in actual}

    start = time.time()
    actual = run("laptop", "--preset laptop")
    assert time.time() - start < 300
    last = actual["transformer", "digits", "task", 40]
    assert last >= 0.6 and last >= actual["transformer", "digits", "task", 1] + 0.4
    assert last > max(actual["sgd", "digits", "task", 40], actual["adam", "digits", "task", 40])
    assert actual["transformer", "random", "domain", 40] >= 0.9
    if not (DATA / "FashionMNIST").exists():
        pytest.skip("no MNIST and Fashion-MNIST in CLEANMETA_DATA")
    checkpoint = tmp_path / "laptop" / "checkpoint.pt"
    actual = run("other", f"--mode test --checkpoint {checkpoint} --test-datasets mnist fashion_mnist")
    for task in ("mnist", "fashion_mnist"):
        assert actual["transformer", task, "domain", 40] >= 0.35
        assert actual["untrained", task, "domain", 40] < 0.15
