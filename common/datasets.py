"""Datasets as tensors on a device, and distributions of tasks over them.

    digits = load("digits", "train")
    tasks = Tasks(digits, projection="glorot", projected=0.5, permuted_labels=1.0, seed=0)
    x, y = tasks.sample(task_ids, sequence_ids, length=100)  # (s, t, a) floats, (s, t) labels

A dataset is on the device as a whole. Images are uint8 and are normalised when they are used.

A task is a dataset under a random projection of its inputs, a permutation of its inputs or labels,
or a subset of its classes (thesis, sections 3.4.3 and 5.3.1). Everything random about a task is a
pure function of its integer id, and everything random about a sequence is one of its own id. The
same ids give the same numbers on any device, in any batch and on any rank, and nothing is stored.

Axes: s tasks or sequences in parallel, t time, a inputs, c classes.
"""

import math
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import rng

BUNDLED = ("digits", "wine", "breast_cancer")
DOWNLOADED = ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "svhn", "omniglot")
GENERATED = ("random", "sum_sign")
NAMES = BUNDLED + DOWNLOADED + GENERATED
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # in a user's file
CLASSES = dict.fromkeys(DOWNLOADED + GENERATED, 10)
CLASSES |= {"emnist": 62, "omniglot": 1623, "sum_sign": 2}

# Meta-tests count the ids of their tasks and sequences from here, so that no two splits share one.
FIRST_ID = {"train": 0, "validation": 2**41, "test": 2**40}

# What torchvision raises for damaged files.
UNREADABLE = (AssertionError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class DatasetError(Exception):
    """A dataset that cannot be loaded or used; the message is one sentence that says what to do."""


# --------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------
Examples = tuple[Tensor, Tensor]  # x (n, *shape) and y (n,) int64 in 0..c-1


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on a device.

    x: (examples, *shape), uint8 images (channels, height, width) or normalised float32 features,
        sorted by class; None if `make` makes examples on the fly.
    counts: (c,) number of examples of each class.
    mean, std: those of the images, scaled to 0..1.
    make: (task keys (s, 2), positions (s, t), sequence keys (s, 2)) -> x (s, t, a), y (s, t).
    source: the arguments that `load` was called with.
    """

    name: str
    split: str
    shape: tuple[int, ...]
    num_classes: int
    x: Tensor | None = None
    counts: Tensor | None = None
    mean: float = 0.0
    std: float = 1.0
    make: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    device: torch.device = torch.device("cpu")
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_inputs(self) -> int:
        return math.prod(self.shape)

    @property
    def square(self) -> bool:
        """Whether its inputs are square images."""
        return len(self.shape) == 3 and self.shape[1] == self.shape[2]

    def __len__(self) -> int:
        """Number of stored examples; 0 if they are made on the fly."""
        return 0 if self.x is None else len(self.x)

    def inputs(self, index: Tensor) -> Tensor:
        """Normalised, flattened inputs (..., a) float32 of the examples `index` (...) int64."""
        x = self.x[index].flatten(index.ndim)
        if x.dtype == torch.uint8:
            x = (x.float() / 255 - self.mean) / self.std
        return x

    def reload(self, **changes: Any) -> "Dataset":
        """The same dataset with other arguments of `load`, such as `split` or `size`."""
        return load(**self.source | changes)

    def resize(self, size: int) -> "Dataset":
        """The same images at size x size pixels. Raises DatasetError if there are no images."""
        if len(self.shape) != 3:
            raise DatasetError(
                f"The dataset '{self.name}' has no images and cannot be resized to {size} pixels."
            )
        return self.reload(size=size)

    def pad(self, size: int) -> "Dataset":
        """The same stored images in the middle of size x size pixels, zero around them."""
        height, width = self.shape[1:]
        left, top = (size - width) // 2, (size - height) // 2
        border = (left, size - width - left, top, size - height - top)
        shape = (self.shape[0], size, size)
        return replace(self, x=F.pad(self.x, border), shape=shape)


def load(
    name: str,
    split: Literal["train", "validation", "test"] = "train",
    data_dir: Path | str = "data",
    device: torch.device | str = "cpu",
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
) -> Dataset:
    """Load a dataset, one of NAMES or the path of a user's own `.npz` file.

    torchvision's datasets are read from `data_dir`, and downloaded to it once if missing.

    split: validation is a fixed tenth of the examples of each class of the dataset's train split,
        and train the rest of them. For omniglot, whose test split has other classes, it is a tenth
        of the classes.

    A file is made by numpy.savez(path, x_train=, y_train=, x_test=, y_test=) and named after its
    stem. x are images, of shape (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 or 3 channels, or
    vectors (n, a). Images of another type than uint8 are normalised by the mean and std of x_train,
    vectors by those of each feature. y are integers (n,). The sorted labels of y_train become 0, 1,
    2 and so on.

    size: side of the images in pixels, bilinear and antialiased (default: as they are; for
        `random` and `sum_sign`, 8). channels: grey images are repeated, coloured ones averaged
        (default: as they are). Data without images ignore both.

    Raises DatasetError if the name is unknown, the files are missing and cannot be downloaded, or
    their contents cannot be used.
    """
    if split not in FIRST_ID:
        raise DatasetError(f"There is no split '{split}'; choose train, validation or test.")
    device = torch.device(device)
    source = dict(
        name=name, split=split, data_dir=data_dir, device=device, size=size, channels=channels
    )

    if name in GENERATED:
        shape = (channels or 1, size or 8, size or 8)
        make = MAKERS[name](shape)
        return Dataset(name, split, shape, CLASSES[name], make=make, device=device, source=source)

    if name in BUNDLED:
        train, test = _read_bundled(name)
    elif name in DOWNLOADED:
        train, test = _read_torchvision(name, Path(data_dir))
    elif name.endswith(".npz"):
        train, test = _read_file(Path(name))
        name = Path(name).stem
    else:
        raise DatasetError(
            f"There is no dataset '{name}'; choose from {', '.join(NAMES)}, "
            "or name a file that ends with .npz."
        )

    splits = _splits(name, train, test)
    x, y = splits[split]
    if not len(y):
        raise DatasetError(f"'{name}' has too few examples for a validation split.")
    labels = splits[split if name == "omniglot" else "train"][1]
    counts = y.bincount(minlength=int(labels.max()) + 1)

    # Statistics are those of the train split in the form that is used.
    x = _convert(x, size, channels)
    reference = x if split == "train" else _convert(splits["train"][0], size, channels)
    mean, std = _statistics(reference)
    if x.dtype != torch.uint8:
        x = (x - mean) / std
        mean, std = 0.0, 1.0

    x = x[y.argsort(stable=True)].to(device)
    counts = counts.to(device)
    shape = tuple(x.shape[1:])
    return Dataset(
        name, split, shape, len(counts), x, counts, mean, std, device=device, source=source
    )


def distinct(names: Iterable[str]) -> list[str]:
    """The names of datasets, each once. Raises DatasetError if two have the same name in results."""
    names = list(dict.fromkeys(names))
    called = [Path(name).stem for name in names]
    for name in called:
        if called.count(name) > 1:
            raise DatasetError(f"Two datasets are called '{name}'; rename the file of one.")
    return names


def _splits(name: str, train: Examples, test: Examples) -> dict[str, Examples]:
    """A tenth of the train split becomes the validation split."""
    x, y = train
    held_out = _tenth(y)
    if name == "omniglot":  # whole classes, as its test split has other ones too
        held_out = _tenth(torch.zeros(len(y.bincount()), dtype=torch.int64))[y]
    splits = {
        "train": (x[~held_out], y[~held_out]),
        "validation": (x[held_out], y[held_out]),
        "test": test,
    }
    if name == "omniglot":
        splits = {k: (x, y.unique(return_inverse=True)[1]) for k, (x, y) in splits.items()}
    return splits


@torch.no_grad()  # as Tasks.sample, which shares the compiled rounds of `shuffle`
def _tenth(y: Tensor) -> Tensor:
    """Mask of a random tenth of the examples of each class, and of one example if there are a few.

    The same on every machine: `shuffle` draws it.
    """
    order = y.argsort(stable=True)
    y = y[order]
    count = y.bincount()
    within = torch.arange(len(y)) - (count.cumsum(0) - count)[y]  # its number in its class
    rank = rng.shuffle(within, count[y], rng.fold(rng.key(0, salt=1), y))
    tenth = ((count + 5) // 10).clamp(min=1).minimum(count - 1)
    mask = torch.empty(len(y), dtype=torch.bool)
    mask[order] = rank < tenth[y]
    return mask


def _convert(x: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Images (n, c, h, w) at another size and with other channels; vectors as they are."""
    if x.ndim == 2:
        return x

    parts = []
    for part in x.split(4096):  # floats need four times the memory
        part = part.float()
        if size and x.shape[2:] != (size, size):
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        if channels == 1:
            part = part.mean(1, keepdim=True)
        parts.append(part.round().byte() if x.dtype == torch.uint8 else part)
    x = torch.cat(parts)
    return x.repeat(1, 3, 1, 1) if channels == 3 and x.shape[1] == 1 else x


def _statistics(x: Tensor) -> tuple[Any, Any]:
    """Mean and std of all pixels, scaled to 0..1 if uint8, or of each feature of vectors (n, a)."""
    if x.dtype == torch.uint8:
        level = torch.arange(256, dtype=torch.float64) / 255
        share = x.flatten().bincount(minlength=256) / x.numel()
        mean = (share * level).sum()
        std = (share * (level - mean) ** 2).sum().sqrt()
    else:
        std, mean = torch.std_mean(x.double(), 0 if x.ndim == 2 else None, correction=0)
    std = torch.where(std > 0, std, 1.0)
    if x.ndim == 2:
        return mean.float(), std.float()
    return mean.item(), std.item()


def _read_bundled(name: str) -> tuple[Examples, Examples]:
    """scikit-learn's datasets with a fixed, stratified split: three quarters train, one test."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    data = getattr(sklearn.datasets, f"load_{name}")()
    x = torch.tensor(data.data).float()
    y = torch.tensor(data.target)
    if name == "digits":
        x = (x * (255 / 16)).round().byte().view(-1, 1, 8, 8)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=y)
    return (x[train], y[train]), (x[test], y[test])


def _read_torchvision(name: str, data_dir: Path) -> tuple[Examples, Examples]:
    """torchvision's datasets, from `data_dir` or, once, from the internet."""
    import torchvision.datasets as tv  # takes a second, and the bundled datasets do without

    make = {
        "mnist": tv.MNIST,
        "fashion_mnist": tv.FashionMNIST,
        "kmnist": tv.KMNIST,
        "emnist": partial(tv.EMNIST, split="byclass"),
        "cifar10": tv.CIFAR10,
        "svhn": tv.SVHN,
        "omniglot": tv.Omniglot,
    }[name]
    flag = {"svhn": "split", "omniglot": "background"}.get(name, "train")
    train, test = ("train", "test") if name == "svhn" else (True, False)
    train = _read_split(name, partial(make, **{flag: train}), data_dir)
    return train, _read_split(name, partial(make, **{flag: test}), data_dir)


def _read_split(name: str, make: Callable, data_dir: Path) -> Examples:
    hint = f"use a bundled dataset ({', '.join(BUNDLED)}) or name its folder with --data-dir"
    damaged = f"The files of '{name}' in '{data_dir}' are damaged; delete them, or {hint}."
    missing = f"The dataset '{name}' is not in '{data_dir}' and could not be downloaded; {hint}."

    try:
        try:
            data = make(data_dir, download=False)
        except RuntimeError as error:
            if "download=True" not in str(error):  # torchvision's advice if there are no files
                raise
            try:
                _download(make, data_dir)
            except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
                raise DatasetError(missing) from error
            data = make(data_dir, download=False)
        x, y = _arrays(name, data)
    except UNREADABLE as error:
        raise DatasetError(damaged) from error
    if not len(x) == len(y) > 0 or y.min() < 0 or y.max() >= CLASSES[name]:
        raise DatasetError(damaged)
    return x, y


def _download(make: Callable, data_dir: Path) -> None:
    """Download a dataset so that `data_dir` never has half of it, whatever other processes do. Folders
    that it makes and then leaves empty are removed."""
    made = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    patience = socket.getdefaulttimeout()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds without a byte; torchvision would wait for ever
        with TemporaryDirectory(dir=data_dir) as folder:
            make(folder, download=True)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: -len(path.parts)):
                target = data_dir / path.relative_to(folder)  # archives, which are checked, last
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    finally:
        socket.setdefaulttimeout(patience)
        for path in made:
            with suppress(OSError):  # it has files, was not made, or another process uses it
                path.rmdir()


def _arrays(name: str, data: Any) -> Examples:
    """x and y of one of torchvision's datasets."""
    if name == "omniglot":  # 32,460 small files; the label of each is its folder
        from torchvision.transforms.functional import pil_to_tensor

        x = torch.stack([pil_to_tensor(image) for image, _ in data]).bool().byte() * 255
        return x, torch.tensor([label for _, label in data])

    x = torch.as_tensor(data.data)
    y = torch.as_tensor(data.labels if name == "svhn" else data.targets).long()
    if name == "cifar10":
        x = x.permute(0, 3, 1, 2).contiguous()
    elif name == "emnist":
        x = x.mT.contiguous()[:, None]  # stored lying on their side
    elif name != "svhn":
        x = x[:, None]
    return x, y


def _read_file(path: Path) -> tuple[Examples, Examples]:
    """A user's own arrays, as `load` describes them."""
    if path.stem in NAMES:
        raise DatasetError(f"'{path.stem}' is another dataset; rename the file '{path}'.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files if name in ARRAYS}
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(f"The file '{path}' cannot be read: {reason}.") from error
    except Exception as error:  # whatever damaged bytes make zipfile and numpy raise
        raise DatasetError(
            f"The file '{path}' is damaged or holds Python objects; "
            "write it with numpy.savez and arrays of numbers."
        ) from error

    def check(fine: bool, complaint: str) -> None:
        if not fine:
            raise DatasetError(f"The file '{path}' cannot be used: {complaint}.")

    missing = [name for name in ARRAYS if name not in arrays]
    check(not missing, f"it has no array {' '.join(missing)}")
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        check(x.dtype.kind in "biuf", f"x_{split} holds {x.dtype} instead of numbers")
        check(y.dtype.kind in "biu", f"y_{split} holds {y.dtype} instead of integers")
        check(x.ndim in (2, 3, 4), f"the shape of x_{split}, {x.shape}, has to have 2 to 4 axes")
        check(y.shape == x.shape[:1], f"y_{split} has the shape {y.shape} instead of ({len(x)},)")
        check(x.size > 0, f"x_{split} is empty")

    x_train, y_train, x_test, y_test = (arrays[name] for name in ARRAYS)
    shape = x_train.shape[1:]
    uint8 = x_train.dtype == np.uint8
    check(x_test.shape[1:] == shape, f"x_train has examples {shape}, x_test {x_test.shape[1:]}")
    check((x_test.dtype == np.uint8) == uint8, "only one of x_train and x_test is uint8")

    labels = np.unique(y_train)
    unknown = np.setdiff1d(y_test, labels)
    check(len(labels) > 1, "y_train has only one label")
    check(not len(unknown), f"y_test has labels that are not in y_train, among them {unknown[:1]}")

    first = len(shape) == 3 and shape[0] in (1, 3)
    last = len(shape) == 3 and shape[2] in (1, 3)
    check(len(shape) < 3 or first or last, f"images {shape} have no axis of 1 or 3 channels")
    check(not (first and last), f"the channels of images {shape} may be first or last")

    examples = []
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if len(shape) == 2:
            x = x[:, None]
        elif last:
            x = np.moveaxis(x, 3, 1)
        if not uint8 or x.ndim == 2:
            with np.errstate(over="ignore"):
                x = x.astype(np.float32)
        check(bool(np.isfinite(x).all()), "x_train or x_test has values that are not finite")
        examples.append((torch.tensor(x), torch.tensor(np.searchsorted(labels, y))))
    train, test = examples
    return train, test


def _make_random(shape: tuple[int, ...], points: int = 20) -> Callable:
    """Random (section 3.4.4; the numbers are the release's): a task is `points` Gaussian images with random labels, one of 10.

    A sequence repeats them, each time in another order.
    """
    size = math.prod(shape)

    def make(task: Tensor, position: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        images = rng.normal(rng.fold(task, 1), points * size).view(-1, points, size)
        index = torch.arange(points, device=task.device)
        labels = rng.integers(rng.fold(task, 2)[:, None], index, 10)

        order = rng.fold(sequence[:, None], position // points)
        point = rng.shuffle(position % points, points, order)
        x = images.gather(1, point[..., None].expand(-1, -1, size))
        return x, labels.gather(1, point)

    return make


def _make_sum_sign(shape: tuple[int, ...]) -> Callable:
    """Sum Sign (section 3.4.4; the numbers are the release's): whether the sum of an image is positive.

    The pixels are normal around a mean from U(-1, 1), truncated at two standard deviations.
    """
    size = math.prod(shape)
    low, high = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (-2, 2))

    def make(task: Tensor, position: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        example = rng.fold(sequence[:, None], position)
        noise = torch.special.ndtri(low + (high - low) * rng.uniform(rng.fold(example, 1), size))
        x = noise + 2 * rng.uniform(rng.fold(example, 2), 1) - 1
        return x, (x.sum(-1) >= 0).long()

    return make


MAKERS = {"random": _make_random, "sum_sign": _make_sum_sign}


# --------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tasks:
    """A distribution over tasks, made from one dataset.

    Each kind of augmentation applies to a share of the tasks (0 none, 1 all). The id of a task
    decides which apply to it.

    projected: projected inputs. projection: "gaussian" draws the matrix from N(0, 1/a) (section
        5.3.1, Algorithm 9), "glorot" from the uniform distribution of Glorot and Bengio (2010)
        (VSML's release). projection_size: number of projected inputs (default: all).
    permuted_inputs, permuted_labels: one random permutation per task. permuted_from: labels are
        permuted in the tasks with ids from here on, instead of in a share of all.
    project: a faster form of x @ self.projections(task) for "gaussian", on x (s, t, a), keys (s, 2)
        and projection_size.
    blanked: each task replaces a share of its inputs, at most this one, by a constant, like the
        empty border of an image.
    classes: each task has this many classes of the dataset, relabelled 0, 1, ...; of several
        numbers each task has one.
    shots: sequences are few-shot episodes: `shots` examples of each class in random order, then
        one other example of any class. Each episode assigns its labels to classes at random.

    Raises DatasetError for an impossible combination.
    """

    dataset: Dataset
    projection: Literal["gaussian", "glorot"] = "glorot"
    projected: float = 0.0
    projection_size: int | None = None
    permuted_inputs: float = 0.0
    permuted_labels: float = 0.0
    blanked: float = 0.0
    classes: int | tuple[int, ...] | None = None
    shots: int = 0
    seed: int = 0
    permuted_from: int | None = None
    project: Callable[[Tensor, Tensor, int], Tensor] | None = None

    def __post_init__(self):
        data, shots = self.dataset, self.shots
        name, available = data.name, data.num_classes

        for classes in self._class_counts:
            if not 2 <= classes <= available:
                raise DatasetError(
                    f"Asked for {classes} classes, but '{name}' has {available}; "
                    f"choose from 2 to {available}."
                )
        if shots and len(self._class_counts) > 1:
            raise DatasetError("Few-shot episodes have one number of classes.")
        if self._class_counts and len(data) and data.counts.min() == 0:
            raise DatasetError(
                f"The {data.split} split of '{name}' has no examples of some classes, so that tasks "
                "cannot choose among them; leave out the number of classes."
            )
        if self._class_counts and not len(data):
            raise DatasetError(
                f"The classes of '{name}' are made on the fly and cannot be chosen from."
            )
        if shots and (not len(data) or shots >= data.counts.min()):
            raise DatasetError(
                f"The {data.split} split of '{name}' has too few stored examples of a class for "
                f"episodes of {shots} shots."
            )
        if self.project and self.projection != "gaussian":
            raise DatasetError("There is a faster form of Gaussian projections only.")
        if self.projection_size not in (None, data.num_inputs) and self.projected != 1:
            raise DatasetError(
                "A projection to another size has to be applied to all tasks (projected = 1)."
            )

    @property
    def num_inputs(self) -> int:
        return self.projection_size or self.dataset.num_inputs

    @property
    def _class_counts(self) -> tuple[int, ...]:
        return (self.classes,) if isinstance(self.classes, int) else self.classes or ()

    @property
    def num_classes(self) -> int:
        """The most classes that a task has."""
        return max(self._class_counts, default=self.dataset.num_classes)

    @property
    def episode(self) -> int:
        """Examples in a few-shot episode; 0 if sequences are no episodes."""
        return self.shots * self.num_classes + 1 if self.shots else 0

    @property
    def one_pass(self) -> int | float:
        """How many examples of any task a sequence has before the first one comes again. `random` is
        there to be repeated."""
        counts = self.dataset.counts
        return math.inf if counts is None else int(counts.sort().values[: self.num_classes].sum())

    def reload(self, **changes: Any) -> "Tasks":
        """The same tasks on the dataset with other arguments of `load`, such as `split`."""
        return replace(self, dataset=self.dataset.reload(**changes))

    def fit(self, num_inputs: int, num_classes: int) -> "Tasks":
        """The same tasks in a form for a learner that was made for these sizes: larger images become
        smaller, smaller ones get a border. Raises DatasetError if there is none."""
        data = self.dataset
        if self.num_classes > num_classes:
            has = f"'{data.name}' has {self.num_classes}"
            raise DatasetError(f"it was made for {num_classes} classes, and {has}.")
        channels = 1 if math.isqrt(num_inputs) ** 2 == num_inputs else 3
        side = math.isqrt(num_inputs // channels)
        is_image = channels * side**2 == num_inputs
        if data.num_inputs > num_inputs and not is_image:
            has = f"'{data.name}' has {data.num_inputs}"
            raise DatasetError(f"it was made for {num_inputs} inputs, which are no square image, and {has}.")
        if data.num_inputs == num_inputs or not is_image:
            return self
        if len(data.shape) == 3 and data.shape[0] != channels:
            data = data.reload(channels=channels)
        if data.num_inputs > num_inputs:
            data = data.resize(side)
        elif data.square and len(data):
            data = data.pad(side)
        return replace(self, dataset=data)

    def test_ids(self, count: int) -> Tensor:
        """Ids (s,) of the split's tasks and sequences, which no other split has."""
        return FIRST_ID[self.dataset.split] + torch.arange(count, device=self.dataset.device)

    def twice_each(self, count: int) -> tuple[Tensor, Tensor]:
        """x (s, t, a) and y (s, t) of at most `count` sequences of two examples of each class, one
        after the other, which no other of them has. The first classes, as they are stored."""
        data, classes = self.dataset, self.num_classes
        number = torch.arange(min(count, int(data.counts.min()) // 2), device=data.device)
        first = (data.counts.cumsum(0) - data.counts)[:classes, None]
        index = first + 2 * number[:, None, None] + torch.arange(2, device=data.device)
        labels = torch.arange(classes, device=data.device).repeat_interleave(2)
        return data.inputs(index.flatten(1)), labels.expand(len(index), -1)

    def keys(self, ids: Tensor, salt: int) -> Tensor:
        """(s, 2) keys of the ids (s,), different for each salt."""
        return rng.fold(rng.key(self.seed, ids.device, salt), ids)

    @torch.no_grad()
    def sample(
        self, tasks: Tensor, sequences: Tensor, length: int, start: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """Examples start, start + 1, ..., start + length - 1 of one sequence of each task.

        tasks, sequences: (s,) int64 ids. start: a number, or one for each sequence (s, 1). Returns
        x (s, t, a) float32 and y (s, t) int64 on the dataset's device. A sequence has all examples
        of its task in random order, then all of them in another order, and so on.
        """
        data = self.dataset
        tasks = tasks.to(data.device)
        task = self.keys(tasks, 1)
        sequence = self.keys(sequences.to(data.device), 2)
        position = (torch.arange(length, device=data.device) + start).expand(len(task), -1)

        examples = data.make or self._stored_examples
        x, y = examples(task, position, sequence)

        if self.permuted_labels or self.permuted_from is not None:
            order = _permutations(rng.fold(task, 4), self.num_classes, self._counts_of(task))
            permuted = _selected(task, 3, self.permuted_labels)
            if self.permuted_from is not None:
                permuted = (tasks >= self.permuted_from)[:, None]
            y = torch.where(permuted, order.gather(1, y), y)

        if self.permuted_inputs:
            order = _permutations(rng.fold(task, 5), x.shape[-1])
            permuted = _selected(task, 6, self.permuted_inputs)[..., None]
            x = torch.where(permuted, x.gather(2, order[:, None].expand_as(x)), x)

        if self.blanked:
            share = self.blanked * rng.uniform(rng.fold(task, 11), 1)
            blank = rng.uniform(rng.fold(task, 10), x.shape[-1]) < share
            constant = 0.5 * rng.normal(rng.fold(task, 12), 1)
            x = torch.where(blank[:, None], constant[:, None], x)

        if self.projected == 1 and self.project:
            x = self.project(x, rng.fold(task, 8), self.num_inputs)
        elif self.projected == 1:
            x = x @ self.projections(task)
        elif self.projected:
            projected = _selected(task, 7, self.projected)[..., None]
            x = torch.where(projected, x @ self.projections(task), x)

        return x, y

    def projections(self, task: Tensor) -> Tensor:
        """The projection matrices (s, inputs, projected inputs) of the tasks with keys (s, 2)."""
        a, b = self.dataset.num_inputs, self.num_inputs
        if self.projection == "gaussian":
            return rng.normal(rng.fold(task, 8), a * b, math.sqrt(a)).view(-1, a, b)
        return (2 * rng.uniform(rng.fold(task, 8), a * b).view(-1, a, b) - 1) * math.sqrt(6 / (a + b))

    def _stored_examples(
        self, task: Tensor, position: Tensor, sequence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Examples of a stored dataset at the positions (s, t) of the sequences."""
        data, count = self.dataset, self.dataset.counts
        first = count.cumsum(0) - count  # index of the first example of each class

        chosen = torch.arange(data.num_classes, device=data.device).expand(len(task), -1)
        if self.classes or self.shots:
            chosen = _permutations(rng.fold(task, 9), data.num_classes)[:, : self.num_classes]
        if self.shots:
            return self._episodes(chosen, position, sequence)

        # A task numbers its examples class by class: those of label k end before end[k].
        if len(self._class_counts) > 1:  # classes that a task does not have come last, and are empty
            absent = torch.arange(self.num_classes, device=data.device) >= self._counts_of(task)
            chosen = chosen.masked_fill(absent, data.num_classes)
            first, count = F.pad(first, (0, 1)), F.pad(count, (0, 1))
        chosen = chosen.sort(-1).values
        end = count[chosen].cumsum(-1)
        total = end[:, -1:]
        number = rng.shuffle(position % total, total, rng.fold(sequence[:, None], position // total))
        label = torch.searchsorted(end, number, right=True)
        within = number - (end - count[chosen]).gather(1, label)
        return data.inputs(first[chosen.gather(1, label)] + within), label

    def _counts_of(self, task: Tensor) -> Tensor | None:
        """How many classes (s, 1) the tasks with keys (s, 2) have, where they differ."""
        if len(self._class_counts) < 2:
            return None
        counts = _on_device(self._class_counts, task.device)
        zeros = torch.zeros(len(task), 1, dtype=torch.int64, device=task.device)
        return counts[rng.integers(rng.fold(task, 13)[:, None], zeros, len(counts))]

    def _episodes(
        self, chosen: Tensor, position: Tensor, sequence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Few-shot episodes of the chosen classes (s, c), one after the other, at the positions."""
        data, c = self.dataset, self.num_classes
        count = data.counts
        first = count.cumsum(0) - count

        last = self.episode - 1  # index of the query
        episode = rng.fold(sequence[:, None], position // self.episode)
        position = position % self.episode
        query = position == last

        order = rng.shuffle(position.clamp(max=last - 1), last, episode)
        label = rng.integers(rng.fold(episode, 2), torch.zeros_like(position), c)
        label = torch.where(query, label, order % c)
        shot = (order // c).masked_fill(query, self.shots)

        index = chosen.gather(1, label)
        within = rng.shuffle(shot, count[index], rng.fold(rng.fold(episode, 1), label))
        return data.inputs(first[index] + within), label


@cache
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a copy to a GPU waits for it."""
    return torch.tensor(values, device=device)


def _selected(task: Tensor, salt: int, share: float) -> Tensor:
    """Mask (s, 1) of the tasks with keys (s, 2) that an augmentation applies to."""
    return rng.uniform(rng.fold(task, salt), 1) < share


def _permutations(key: Tensor, n: int, first: Tensor | None = None) -> Tensor:
    """A random permutation of 0..n-1 for each key (s, 2): (s, n) int64. first (s, 1): only that many
    numbers are permuted, and the entries after them mean nothing."""
    positions = torch.arange(n, device=key.device).expand(len(key), -1)
    if first is None:
        return rng.shuffle(positions, n, key[:, None])
    return rng.shuffle(positions.minimum(first - 1), first, key[:, None])
