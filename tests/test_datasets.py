"""common/datasets.py: tasks as pure functions of their ids, fair random numbers, and torchvision's files."""

import gzip
import pickle
import re
import shutil
import socket
import struct
import sysconfig
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows, run_script
from torch.utils._python_dispatch import TorchDispatchMode

from common import datasets, rng
from common.datasets import BUNDLED, FIRST_ID, GENERATED, DatasetError, Tasks, distinct, load
from common.rng import bits, fold, integers, key, normal, shuffle, uniform

IDS = torch.arange(6)
COMPILES = shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train")


# ---- random numbers ----------------------------------------------------------------------------------------------------
def test_numbers_have_the_moments_of_their_distributions():
    keys = fold(key(7), torch.arange(40))
    u, z = uniform(keys, 25_001), normal(keys, 25_001)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 4e-3 and abs(z.std() - 1) < 4e-3 and abs((z**4).mean() - 3) < 0.05
    assert torch.equal(normal(keys, 25_001, 3.0), z / 3.0)
    assert uniform(fold(key(2), torch.tensor([50])), 65_536)[0, 64_686] == 1 - 2**-24  # the largest of all
    assert (torch.corrcoef(z) - torch.eye(40)).abs().max() < 5 / 25_001**0.5  # neighbouring keys are independent
    flat = z.flatten()
    assert abs((flat[1:] * flat[:-1]).mean()) < 4e-3  # neighbouring counters too


def test_every_bit_is_fair():
    words = bits(key(1), torch.arange(100_000))
    for bit in range(32):
        assert abs((words >> bit & 1).float().mean() - 0.5) < 0.01, bit


def test_draws_are_the_recorded_ones():
    """Tasks have no other description than their ids, so the same id has to stay the same task."""
    keys = fold(key(7), torch.arange(3))
    assert keys.tolist() == [[1201613549, 782173545], [-547614935, 1819196383], [1139001749, -576509129]]
    assert bits(keys, torch.arange(3)).tolist() == [-104580718, 209965110, 810070250]
    assert integers(keys, torch.tensor([4, 5, 6]), 1000).tolist() == [77, 348, 9]
    assert uniform(keys[1], 2).tolist() == [0.21581301093101501, 0.04888632893562317]
    torch.testing.assert_close(normal(keys[0], 3), torch.tensor([0.21684031, -2.09515882, 0.04777161]))
    assert shuffle(torch.arange(10), 10, key(3)).tolist() == [1, 5, 6, 0, 3, 2, 4, 9, 7, 8]
    assert shuffle(torch.tensor([0, 5, 9]), torch.tensor([10, 50, 1000]), keys).tolist() == [4, 24, 904]


@pytest.mark.parametrize("number", [0, 3, -1, -3, 2**31, 2**32 + 5, 2**40, -(2**40), 2**62 + 3, -(2**63)])
def test_folding_a_python_number_is_folding_a_tensor(number):
    keys = fold(key(7), torch.arange(4))
    assert torch.equal(fold(keys, number), fold(keys, torch.tensor(number)))


@pytest.mark.parametrize("name", ["digits", "random", "sum_sign"])
def test_samples_need_no_copy_between_host_and_device(name):
    """None of the operations that make a tensor of a Python number or a Python number of a tensor."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert operation.overloadpacket.__name__ not in ("lift_fresh", "_local_scalar_dense", "scalar_tensor")
            return operation(*args, **(kwargs or {}))

    options = dict(projection="gaussian", projected=0.5, permuted_inputs=0.5, permuted_labels=0.5, blanked=0.5)
    few_shot = dict(classes=3, shots=2) if name == "digits" else {}
    for tasks in (Tasks(load(name), **options), Tasks(load(name), **few_shot)):
        tasks.sample(IDS, IDS, 3)  # keys of salts are made once
        with Refuse():
            tasks.sample(IDS, IDS, 3)


@pytest.mark.parametrize("n", [2, 3, 4, 10, 97])
def test_shuffle_is_a_permutation(n):
    keys = fold(key(0), torch.arange(50))
    order = shuffle(torch.arange(n).expand(50, -1), n, keys[:, None])
    assert torch.equal(order.sort(-1).values, torch.arange(n).expand(50, -1))


def test_tasks_cannot_choose_among_classes_without_examples(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 4
    np.savez(tmp_path / "lack.npz", x_train=x, y_train=y, x_test=x, y_test=y % 2)
    Tasks(load(str(tmp_path / "lack.npz"), "train"), classes=2)
    Tasks(load(str(tmp_path / "lack.npz"), "test"))
    with pytest.raises(DatasetError, match="The test split of 'lack' has no examples of some classes"):
        Tasks(load(str(tmp_path / "lack.npz"), "test"), classes=2)


def test_shuffle_reaches_all_permutations_equally_often():
    keys = fold(key(0), torch.arange(24_000))
    order = shuffle(torch.arange(4).expand(24_000, -1), 4, keys[:, None])
    _, count = (order * torch.tensor([64, 16, 4, 1])).sum(-1).unique(return_counts=True)
    assert len(count) == 24
    assert ((count - 1000.0) ** 2 / 1000).sum() < 49.7  # chi-squared with 23 degrees of freedom, p = 0.001


@pytest.fixture
def compilable(monkeypatch):
    for name in ("normal", "_swap_rounds"):
        monkeypatch.setattr(rng, name, getattr(rng, name))  # put back afterwards
    torch._dynamo.reset()


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler or no Python headers")
def test_compiled_draws_are_the_same_numbers(digits, compilable):
    tasks = Tasks(digits, projection="gaussian", projected=1.0, permuted_labels=0.5)
    plain = tasks.sample(IDS, IDS, 30)
    rng.compile_draws()
    compiled = rng.normal
    rng.compile_draws()  # a second time does nothing
    assert rng.normal is compiled
    x, y = tasks.sample(IDS, IDS, 30)
    torch.testing.assert_close(x, plain[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(y, plain[1])


def test_draws_are_compiled_once_for_all_shapes(digits, compilable, monkeypatch):
    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rng.compile_draws()
    for data in (digits, load("wine"), load("random"), digits.resize(14)):
        for batch, length in ((32, 40), (64, 40), (7, 12)):
            tasks = Tasks(data, "gaussian", 1.0, projection_size=20, permuted_inputs=0.5, permuted_labels=0.5)
            tasks.sample(torch.arange(batch), torch.arange(batch), length)
    assert len(compiled) == 2  # normal and _swap_rounds


# ---- tasks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*BUNDLED, "random", "sum_sign"])
def test_equal_ids_give_equal_tasks_in_any_batch_and_from_any_start(name):
    tasks = Tasks(load(name), projected=0.5, permuted_inputs=0.5, permuted_labels=0.5, seed=1)
    x, y = tasks.sample(IDS, IDS + 100, 40)
    for i in (4, 1):
        x_i, y_i = tasks.sample(IDS[i : i + 1], IDS[i : i + 1] + 100, 15, start=25)
        torch.testing.assert_close(x_i[0], x[i, 25:])
        assert torch.equal(y_i[0], y[i, 25:])
    assert not torch.equal(x, Tasks(load(name), seed=2).sample(IDS, IDS + 100, 40)[0])


def test_task_ids_beyond_32_bits_differ(digits):
    tasks = Tasks(digits, projected=1.0)
    a, b = (tasks.sample(torch.tensor([i]), IDS[:1], 2)[0] for i in (5, 5 + 2**32))
    assert not torch.allclose(a, b)


def test_a_sequence_sees_every_example_once_before_any_twice(digits):
    x, y = Tasks(digits).sample(IDS[:1], IDS[:1], len(digits) * 2)
    assert torch.equal(y[0, : len(digits)].bincount(), digits.counts)
    first, second = (half.flatten(1).double() @ torch.linspace(1, 2, 64).double() for half in x[0].split(len(digits)))
    torch.testing.assert_close(first.sort().values, second.sort().values)
    assert not torch.allclose(first, second)


def test_projection_is_one_linear_map_per_task(digits):
    plain, _ = Tasks(digits).sample(IDS, IDS, 200)
    for kind in ("glorot", "gaussian"):
        tasks = Tasks(digits, projection=kind, projected=1.0)
        x, _ = tasks.sample(IDS, IDS, 200)
        matrix = tasks.projections(tasks.keys(IDS, 1))
        torch.testing.assert_close(x, plain @ matrix)
        assert abs(matrix.var() * 64 - 1) < 0.05  # both keep the inputs' variance
        assert not torch.equal(matrix[0], matrix[1])
    x, _ = Tasks(digits, projected=1.0, projection_size=10).sample(IDS, IDS, 5)
    assert x.shape == (6, 5, 10)


def test_shares_of_augmented_tasks(digits):
    ids = torch.arange(2000)
    plain, labels = Tasks(digits).sample(ids, ids, 3)
    x, y = Tasks(digits, projected=0.25, permuted_labels=0.5).sample(ids, ids, 3)
    assert abs((x != plain).flatten(1).any(1).float().mean() - 0.25) < 0.04
    assert abs((y != labels).any(1).float().mean() - 0.5) < 0.05


def test_permutations_keep_the_content(digits):
    plain, labels = Tasks(digits).sample(IDS, IDS, 300)
    x, y = Tasks(digits, permuted_inputs=1.0, permuted_labels=1.0).sample(IDS, IDS, 300)
    torch.testing.assert_close(x.sort(-1).values, plain.sort(-1).values)
    for before, after in zip(labels, y, strict=True):
        assert len(torch.stack([before, after]).unique(dim=1).T) == 10  # one to one


def test_permuted_inputs_have_one_order_in_a_task(digits):
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(len(digits), -1, -1, -1)
    numbered = replace(digits, x=pixels, mean=0.0, std=1 / 255)
    x, _ = Tasks(numbered, permuted_inputs=1.0).sample(IDS, IDS, 5)
    x = x.round().long()
    assert (x == x[:, :1]).all() and (x[:, 0].sort(-1).values == torch.arange(64)).all()
    assert len(x[:, 0].unique(dim=0)) == 6 and (x[:, 0] != torch.arange(64)).any(1).all()
    ids = torch.arange(2000)
    x, _ = Tasks(numbered, permuted_inputs=0.25).sample(ids, ids, 1)
    assert abs((x[:, 0].round() != torch.arange(64)).any(1).float().mean() - 0.25) < 0.04


def test_a_task_has_up_to_a_share_of_its_inputs_blanked(digits):
    """Always the same ones, to one value; the others stay."""
    ids = torch.arange(500)
    noise = replace(digits, x=torch.randint(256, digits.x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    plain, _ = Tasks(noise).sample(ids, ids, 6)
    x, _ = Tasks(noise, blanked=0.8).sample(ids, ids, 6)
    blank = (x != plain).any(1)
    assert abs(blank.float().mean() - 0.4) < 0.03 and blank.float().mean(1).max() < 0.95
    for one, where in zip(x, blank, strict=True):
        assert len(one[:, where].unique()) <= 1


def test_class_subsets(digits):
    tasks = Tasks(digits, classes=3)
    x, y = tasks.sample(torch.arange(40), torch.arange(40), 300)
    assert tasks.num_classes == 3 and set(y.unique().tolist()) == {0, 1, 2}
    full, _ = Tasks(digits).sample(IDS[:1], IDS[:1], len(digits))
    assert (x[:, :5].flatten(0, 1)[:, None] == full).all(-1).any(-1).all()  # nothing but examples of the dataset


def test_few_shot_episodes_give_no_class_away(digits):
    """Two shots of each class and a query of one of them; within an episode a label is a class, over episodes any class."""
    numbered = torch.repeat_interleave(torch.arange(10), digits.counts).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    tasks = Tasks(replace(digits, x=numbered, mean=0.0, std=1 / 255), classes=5, shots=2)
    ids = torch.arange(400)
    x, y = tasks.sample(ids, ids, tasks.episode)
    classes = x[..., 0].round().long()
    assert tasks.episode == 11 and all((y[:, :10] == label).sum(1).eq(2).all() for label in range(5))
    for label in range(5):
        seen = classes.where(y == label, -1)
        assert (seen.amax(1, keepdim=True) == seen).eq(y == label).all()
        assert seen.amax(1).bincount().min() > 20
    assert (y[:, 10].bincount(minlength=5) > 50).all()
    with pytest.raises(DatasetError, match="too few stored examples"):
        Tasks(digits, shots=10_000)


def test_random_and_sum_sign_are_what_appendix_b_says():
    x, y = Tasks(load("random")).sample(IDS, IDS, 400)
    for i in range(6):
        points = torch.cat([x[i], y[i, :, None]], -1).unique(dim=0)
        assert len(points) == 20  # images, each with a label of its own
    x, y = Tasks(load("sum_sign", size=5)).sample(IDS, IDS, 400)
    assert x.shape == (6, 400, 25) and torch.equal(y, (x.sum(-1) >= 0).long())
    assert 0.4 < y.float().mean() < 0.6


def test_bundled_splits_are_fixed_disjoint_and_stratified():
    for name, examples in (("digits", 1797), ("wine", 178), ("breast_cancer", 569)):
        train, validation, test = (load(name, split) for split in FIRST_ID)
        assert len(train) + len(validation) + len(test) == examples
        assert torch.equal(validation.x, load(name, "validation").x)
        assert train.num_classes == validation.num_classes == test.num_classes
        share = validation.counts / (train.counts + validation.counts)
        assert (share - 0.1).abs().max() < 0.03  # of each class
    train, validation, test = (load("wine", split).x for split in FIRST_ID)
    for one, other in ((train, validation), (train, test), (validation, test)):
        assert not (one[:, None] == other).all(-1).any()


def test_the_tenth_is_random_and_the_same_everywhere():
    y = torch.arange(4000) % 4
    mask = datasets._tenth(y)
    assert y[mask].bincount().tolist() == [100] * 4
    assert mask.nonzero()[:5, 0].tolist() == [0, 5, 39, 47, 54]
    quarters = mask.view(4, 1000).sum(1)
    assert (quarters - 100).abs().max() < 40 and len(quarters.unique()) > 1
    assert datasets._tenth(torch.tensor([0, 1, 1, 2, 2, 2])).tolist().count(True) == 2  # none of a single one


def test_resizing(digits):
    larger = digits.resize(20)
    assert larger.x.dtype == torch.uint8 and larger.num_inputs == 400
    assert abs(larger.x.float().mean() - digits.x.float().mean()) < 3
    assert torch.equal(larger.resize(8).x, digits.x)  # made of the original images
    assert load("random", size=12).resize(6).num_inputs == 36
    assert torch.equal(digits.reload(split="test").x, load("digits", "test").x)
    with pytest.raises(DatasetError, match="no images"):
        load("wine").resize(8)


@pytest.mark.parametrize("form", [{}, {"size": 14}, {"size": 40}, {"size": 5, "channels": 3}])
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "wine"])
def test_statistics_are_those_of_the_train_split_as_it_is_used(name, form, data_dir):
    train, *others = (load(name, split, data_dir, **form) for split in FIRST_ID)
    x = train.inputs(torch.arange(len(train)))
    axes = 0 if name == "wine" else None
    torch.testing.assert_close(x.mean(axes), torch.zeros_like(x.mean(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(axes, correction=0), torch.ones_like(x.std(axes)), atol=1e-5, rtol=0)
    for other in others:
        assert (other.mean, other.std) == (train.mean, train.std)
        x = other.inputs(torch.arange(len(other)))
        assert abs(x.mean()) + abs(x.std(correction=0) - 1) > 1e-4  # not by their own


def test_channels(digits):
    coloured = load("digits", channels=3)
    assert coloured.shape == (3, 8, 8) and all(torch.equal(coloured.x[:, c], digits.x[:, 0]) for c in range(3))
    assert torch.equal(datasets._convert(coloured.x, None, 1), digits.x)
    assert all(load(name, size=6, channels=3).shape == (3, 6, 6) for name in GENERATED)


# ---- a user's own file -------------------------------------------------------------------------------------------------
def own_arrays(x_train, x_test, labels=(3, 7, 20)):
    names = ("x_train", "y_train", "x_test", "y_test")
    ys = (np.array(labels)[np.arange(len(x)) % len(labels)] for x in (x_train, x_test))
    return dict(zip(names, (x_train, next(ys), x_test, next(ys)), strict=True))


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape, loaded", [((5, 4), (1, 5, 4)), ((5, 4, 3), (3, 5, 4)), ((1, 5, 4), (1, 5, 4))])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32])
def test_own_images(shape, loaded, dtype, tmp_path):
    x_train, x_test = pixels(30, *shape), pixels(6, *shape)
    np.savez(tmp_path / "my.npz", **own_arrays(x_train.astype(dtype), x_test.astype(dtype)))
    train, test = (load(str(tmp_path / "my.npz"), split) for split in ("train", "test"))
    assert train.name == "my" and train.shape == test.shape == loaded and train.num_classes == 3
    assert (train.x.dtype == torch.uint8) == (dtype == np.uint8)

    x = torch.tensor(x_test[::3].astype(np.float32))  # the first class
    x = x[:, None] if len(shape) == 2 else x.movedim(-1, 1) if shape[-1] == 3 else x
    pixel = torch.tensor(without_validation(x_train, np.arange(30) % 3)[0].astype(np.float32))
    expected = (x - pixel.mean()) / pixel.std(correction=0)
    torch.testing.assert_close(test.inputs(torch.arange(2)), expected.flatten(1), atol=1e-4, rtol=1e-4)
    assert test.resize(3).x.shape == (6, loaded[0], 3, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_own_vectors_and_labels(dtype, tmp_path):
    x_train, x_test = pixels(30, 4) % 2, pixels(5, 4) % 2
    x_train[:, 1] = 1  # constant
    np.savez(tmp_path / "my.npz", **own_arrays(x_train.astype(dtype), x_test.astype(dtype), labels=(9, -2)))
    train, test = (load(str(tmp_path / "my.npz"), split) for split in ("train", "test"))
    validation = load(str(tmp_path / "my.npz"), "validation")
    assert train.counts.tolist() == [13, 13] and validation.counts.tolist() == [2, 2]
    assert test.counts.tolist() == [2, 3]  # -2 has become 0
    varying = [0, 2, 3]
    torch.testing.assert_close(train.x.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.x.std(0, correction=0)[varying], torch.ones(3))
    x = torch.tensor(without_validation(x_train, (np.arange(30) + 1) % 2)[0].astype(np.float32))
    expected = (torch.tensor(x_test[1::2].astype(np.float32)) - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(test.x[:2, varying], expected[:, varying])


GOOD = own_arrays(pixels(9, 5, 4), pixels(6, 5, 4))
WRONG = {
    "it has no array x_test y_test": {"x_test": None, "y_test": None},
    "x_train holds complex128 instead of numbers": {"x_train": np.ones((9, 5), complex)},
    "y_test holds float64 instead of integers": {"y_test": np.arange(6) / 2},
    "y_train holds <U1 instead of integers": {"y_train": np.array(["a"] * 9)},
    "the shape of x_train, (9,), has to have 2 to 4 axes": {"x_train": np.ones(9)},
    "y_train has the shape (8,) instead of (9,)": {"y_train": np.arange(8)},
    "y_train has the shape (9, 1) instead of (9,)": {"y_train": np.ones((9, 1), int)},
    "x_test is empty": {"x_test": np.ones((0, 5, 4)), "y_test": np.ones(0, int)},
    "x_train has examples (5, 4), x_test (5, 3)": {"x_test": pixels(6, 5, 3)},
    "only one of x_train and x_test is uint8": {"x_test": np.ones((6, 5, 4))},
    "y_train has only one label": {"y_train": np.ones(9, int)},
    "y_test has labels that are not in y_train, among them [4]": {"y_test": np.full(6, 4)},
    "images (5, 4, 2) have no axis of 1 or 3 channels": own_arrays(pixels(9, 5, 4, 2), pixels(6, 5, 4, 2)),
    "the channels of images (3, 4, 1) may be first or last": own_arrays(pixels(9, 3, 4, 1), pixels(6, 3, 4, 1)),
    "x_train or x_test has values that are not finite": own_arrays(np.full((9, 2), np.nan), np.ones((6, 2))),
    "damaged or holds Python objects": {"x_train": np.array([{}] * 9)},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_own_arrays_that_cannot_be_used(sentence, tmp_path):
    arrays = {name: array for name, array in (GOOD | WRONG[sentence]).items() if array is not None}
    np.savez(tmp_path / "my.npz", **arrays)
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        load(str(tmp_path / "my.npz"))


def test_own_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "my.npz"
    with pytest.raises(DatasetError, match="cannot be read: No such file or directory"):
        load(str(path))
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], pickle.dumps(GOOD), whole.replace(b"descr", b"dascr")):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="is damaged or holds Python objects"):
            load(str(path))
    path.write_bytes(whole)
    x, refused = load(str(path)).x, 0
    for at in range(0, len(whole), 41):  # a flipped bit is noticed, or changes no number
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert torch.equal(load(str(path)).x, x)
        except DatasetError:
            refused += 1
    assert refused > 10
    np.savez(path, **own_arrays(pixels(3, 4), pixels(3, 4)))
    with pytest.raises(DatasetError, match="'my' has too few examples for a validation split"):
        load(str(path), "validation")
    with pytest.raises(DatasetError, match="'mnist' is another dataset; rename the file"):
        load(str(tmp_path / "mnist.npz"))
    with pytest.raises(DatasetError, match="Two datasets are called 'my'"):
        distinct(["my.npz", "wine", "wine", "other/my.npz"])


TINY = {
    "vsml.py": "--meta-steps 2 --sequences 2 --sequence-length 4 --test-seeds 2 --test-steps 3 --baselines rnn sgd",
    "gpicl.py": "--meta-steps 2 --batch 4 --sequence-length 6 --width 8 --heads 2 --key-size 4 --test-seeds 4 --test-tasks 2 "
    "--size 4 --baselines sgd",
}


@pytest.mark.parametrize("script", TINY)
def test_own_data_from_the_command_line(script, tmp_path):
    np.savez(tmp_path / "images.npz", **own_arrays(pixels(60, 5, 4, 3), pixels(12, 5, 4, 3)))
    np.savez(tmp_path / "vectors.npz", **own_arrays(pixels(60, 6) / 9, pixels(12, 6) / 9))
    flags = f"--preset laptop --no-compile {TINY[script]} --run-name own"
    done = run_script(script, tmp_path, f"{flags} --dataset images.npz --test-datasets images.npz vectors.npz wine sum_sign")
    assert done.returncode == 0, done.stderr
    novelty = {(row["task"], row["novelty"]) for row in rows(tmp_path / "own")}
    known = {("images", "task")} if script == "vsml.py" else {("images", "none"), ("images", "task")}
    assert novelty == known | {("vectors", "domain"), ("wine", "domain"), ("sum_sign", "domain")}

    flags = f"--mode test --checkpoint {tmp_path / 'own' / 'checkpoint.pt'} --split"
    for split in ("validation", "test"):
        done = run_script(script, tmp_path, f"{flags} {split} --run-name {split}")
        assert done.returncode == 0, done.stderr
    results = {name: rows(tmp_path / name) for name in ("own", "validation", "test")}
    assert results["test"] == results["own"] and len(results["validation"]) == len(results["own"])
    for task in ("images", "vectors", "wine", "sum_sign"):
        validation, test = ([row for row in results[name] if row["task"] == task] for name in ("validation", "test"))
        assert validation != test


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda d: load("mnits"), "There is no dataset 'mnits'; choose from digits, wine"),
        (lambda d: load("digits", "valid"), "no split"),
        (lambda d: Tasks(d, classes=11), "Asked for 11 classes, but 'digits' has 10"),
        (lambda d: Tasks(load("random"), classes=3), "made on the fly"),
        (lambda d: Tasks(d, projected=0.5, projection_size=9), "has to be applied to all tasks"),
    ],
)
def test_wrong_use_is_an_error_of_one_sentence(digits, wrong, sentence):
    with pytest.raises(DatasetError, match=sentence):
        wrong(digits)


# ---- torchvision -------------------------------------------------------------------------------------------------------
def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def images_and_labels(seed, *shape, classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (30, *shape), dtype=np.uint8), (np.arange(30) % classes).astype(np.uint8)


def without_validation(images, labels):
    kept = ~datasets._tenth(torch.tensor(labels).long()).numpy()
    return images[kept], labels[kept]


def write_mnist_like(root, folder, prefix="", suffix=""):
    for seed, split in enumerate(("train", "t10k" if not prefix else "test")):
        images, labels = images_and_labels(seed, 28, 28)
        write_idx(root / folder / "raw" / f"{prefix}{split}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{prefix}{split}-labels-idx1-ubyte", labels)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Tiny datasets in torchvision's layouts."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("MNIST", "FashionMNIST", "KMNIST"):
        write_mnist_like(root, folder)
    write_mnist_like(root, "EMNIST", prefix="emnist-byclass-")
    return root


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "emnist"])
def test_idx_files(name, data_dir):
    for seed, (split, count) in enumerate({"train": 2, "test": 3}.items()):
        dataset = load(name, split, data_dir)
        images, labels = images_and_labels(seed, 28, 28)
        if name == "emnist":
            images = images.transpose(0, 2, 1)
        if split == "train":
            images, labels = without_validation(images, labels)
        order = np.argsort(labels, kind="stable")
        assert np.array_equal(dataset.x[:, 0].numpy(), images[order])
        assert dataset.x.dtype == torch.uint8 and dataset.counts.tolist() == [count] * 10
    assert load(name, "train", data_dir, size=14).num_inputs == 196


def test_cifar10_and_svhn(tmp_path, monkeypatch):
    import scipy.io
    import torchvision.datasets as tv

    monkeypatch.setattr(tv.CIFAR10, "_check_integrity", lambda self: True)  # checks sums of the real files
    monkeypatch.setattr(tv.CIFAR10, "_load_meta", lambda self: None)
    monkeypatch.setattr(tv.SVHN, "_check_integrity", lambda self: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = {split: images_and_labels(seed, 32, 32, 3) for seed, split in enumerate(("train", "test"))}
    for split, (images, labels) in data.items():
        flat = images.transpose(0, 3, 1, 2).reshape(30, -1)
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        for name, part in zip(names, np.split(np.arange(30), len(names)), strict=True):
            (folder / name).write_bytes(pickle.dumps({"data": flat[part], "labels": labels[part].tolist()}))
        x = images.transpose(1, 2, 3, 0)
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": np.where(labels == 0, 10, labels)})  # SVHN's 0 is 10

    data["train"] = without_validation(*data["train"])
    for split, (images, labels) in data.items():
        order = np.argsort(labels, kind="stable")
        for name in ("cifar10", "svhn"):
            assert np.array_equal(load(name, split, tmp_path).x.numpy(), images.transpose(0, 3, 1, 2)[order])


def test_omniglot(tmp_path, monkeypatch):
    import torchvision.datasets as tv
    from PIL import Image

    for part, alphabets in (("background", {"Greek": 2, "Latin": 1}), ("evaluation", {"Tagalog": 2})):
        for alphabet, characters in alphabets.items():
            for c in range(characters):
                folder = tmp_path / "omniglot-py" / f"images_{part}" / alphabet / f"character{c:02}"
                folder.mkdir(parents=True)
                for i in range(3):
                    Image.fromarray(np.eye(105, dtype=bool) ^ (i == 2)).convert("1").save(folder / f"{c:04}_{i:02}.png")
    monkeypatch.setattr(tv.Omniglot, "_check_integrity", lambda self: True)
    for split, classes in (("train", 2), ("validation", 1), ("test", 2)):  # characters, and not drawings, are held out
        dataset = load("omniglot", split, tmp_path)
        assert dataset.counts.tolist() == [3] * classes and dataset.shape == (1, 105, 105)
        assert dataset.x.unique().tolist() == [0, 255]


def test_missing_files_without_a_network(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("mnist", "cifar10", "svhn", "omniglot"):
        with pytest.raises(DatasetError, match=f"'{name}' is not in '.*' and could not be downloaded; use a bundled dataset"):
            load(name, "train", tmp_path / "none")


def test_a_download_that_is_cut_off_or_not_the_only_one(tmp_path, monkeypatch):
    """Nothing but whole files comes to the folder, and another process may bring them meanwhile."""
    import torchvision.datasets

    def download(self):
        write_mnist_like(Path(self.root), "MNIST")
        began.append(self.root)
        if len(began) == 1:
            raise ConnectionResetError
        if len(began) == 2:
            load("mnist", "train", tmp_path)

    began = []
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load("mnist", "train", tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(load("mnist", "train", tmp_path)) == len(load("mnist", "train", tmp_path)) and len(began) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    """But what was there before, or came meanwhile, is not removed."""
    import torchvision.datasets

    def download(self):
        (Path(self.root) / "half").mkdir()
        if meanwhile:
            (data_dir / "other").mkdir()
        raise ConnectionResetError

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    (tmp_path / "own").mkdir()
    for data_dir, meanwhile in ((tmp_path / "own" / "new" / "data", False), (tmp_path / "own", False), (tmp_path / "x" / "y", True)):
        with pytest.raises(DatasetError, match="could not be downloaded"):
            load("mnist", "train", data_dir)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["own", "x", "x/y", "x/y/other"]


IMAGES, LABELS = (f"MNIST/raw/train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
DAMAGE = {
    "cut off": lambda root: (root / IMAGES).write_bytes((root / IMAGES).read_bytes()[:1000]),
    "of another kind": lambda root: (root / IMAGES).write_bytes(gzip.compress(b"not an idx file")),
    "more labels than images": lambda root: write_idx(root / LABELS, np.zeros(31, np.uint8)),
    "fewer labels than images": lambda root: write_idx(root / LABELS, np.zeros(29, np.uint8)),
    "an eleventh class": lambda root: write_idx(root / LABELS, np.full(30, 10, np.uint8)),
    "empty": lambda root: [
        write_idx(root / IMAGES, np.zeros((0, 28, 28), np.uint8)),
        write_idx(root / LABELS, np.zeros(0, np.uint8)),
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage, tmp_path):
    write_mnist_like(tmp_path, "MNIST")
    DAMAGE[damage](tmp_path)
    for split in FIRST_ID:
        with pytest.raises(DatasetError, match="are damaged; delete them, or use a bundled dataset"):
            load("mnist", split, tmp_path)


def test_a_server_that_is_silent(tmp_path, monkeypatch):
    """A download gives up after its patience, and nobody else's patience changes."""
    import torchvision.datasets

    def download(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            limits.append(socket.getdefaulttimeout())
            socket.setdefaulttimeout(0.01)
            urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}/")

    limits, before = [], socket.getdefaulttimeout()
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load("mnist", "train", tmp_path)
    assert limits == [30] and socket.getdefaulttimeout() == before


def test_padded_images_lie_in_the_middle():
    digits = load("digits", "train")
    large = digits.pad(11)
    assert large.shape == (1, 11, 11) and large.num_inputs == 121
    assert torch.equal(large.x[:, :, 1:9, 1:9], digits.x)
    assert large.x.sum() == digits.x.sum()
    x, y = Tasks(large).sample(torch.arange(2), torch.arange(2), 5)
    assert x.shape == (2, 5, 121) and x.min() == pytest.approx(-digits.mean / digits.std)


@pytest.mark.parametrize(
    "shape, num_inputs, fitted",
    [
        ((1, 28, 20), 560, (1, 28, 20)),  # the very images that the learner was made for
        ((1, 4, 4), 30, (1, 4, 4)),  # fewer than a learner of vectors has
        ((1, 8, 8), 16, (1, 4, 4)),
        ((1, 4, 4), 64, (1, 8, 8)),
        ((1, 8, 8), 2, None),
    ],
)
def test_data_in_a_form_for_a_learner_of_other_sizes(tmp_path, shape, num_inputs, fitted):
    x = np.random.default_rng(0).random((20, *shape))
    y = np.arange(20) % 2
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    tasks = Tasks(load(str(tmp_path / "own.npz"), "test"))
    if fitted is None:
        with pytest.raises(DatasetError, match="made for 2 inputs"):
            tasks.fit(num_inputs, 2)
    else:
        assert tasks.fit(num_inputs, 2).dataset.shape == fitted
