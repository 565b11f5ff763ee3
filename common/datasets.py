"""Datasets as tensors on a device, and distributions of tasks over them.

    digits = load("digits", "train")
    tasks = Tasks(digits, projection="glorot", projected=0.5, permuted_labels=1.0, seed=0)
    x, y = tasks.sample(task_ids, sequence_ids, length=100)       # (s, t, a) floats, (s, t) labels

A dataset lies on the device as a whole: images as uint8, normalised when they are used. A task is a dataset seen through a
random projection of its inputs, a permutation of its inputs or labels, or a subset of its classes (thesis, sections 3.4.3
and 5.3.1). Everything random about a task is a pure function of its integer id, everything random about a sequence one of
its own id: the same ids give the same numbers on any device, in any batch, on any rank, without storing anything.

Axes: s tasks or sequences in parallel, t time, a inputs, c classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

BUNDLED = ("digits", "wine", "breast_cancer")
DOWNLOADED = ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "svhn", "omniglot")
GENERATED = ("random", "sum_sign")
NAMES = BUNDLED + DOWNLOADED + GENERATED

# Mean and standard deviation over all pixels (scaled to 0..1) of the train split.
STATISTICS = {
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.2860, 0.3530),
    "kmnist": (0.1918, 0.3483),
    "emnist": (0.1739, 0.3319),
    "cifar10": (0.4734, 0.2516),
    "svhn": (0.4514, 0.1993),
    "omniglot": (0.9221, 0.2681),
}


class DatasetError(Exception):
    """A dataset that cannot be had or used as asked; the message is one sentence that says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers as pure functions of integers
# ----------------------------------------------------------------------------------------------------------------------
def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that looks random (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and an integer. key: (..., 2) int32, value broadcasts against key[..., 0]."""
    value = torch.as_tensor(value, device=key.device)
    low, high = value.to(torch.int32), (value >> 32).to(torch.int32)
    first = _mix(_mix(key[..., 0] + low) ^ high)
    return torch.stack([first, _mix(key[..., 1] ^ first) + low], -1)


@cache
def key(seed: int, device: torch.device | str = "cpu", salt: int | None = None) -> Tensor:
    """The key (2,) of a seed, or of one of its salts. All further keys are folded from it."""
    if salt is not None:
        return fold(key(seed, device), salt)
    return fold(torch.tensor([-1640531527, 668265263], dtype=torch.int32, device=device), seed)


def bits(key: Tensor, counter: Tensor) -> Tensor:
    """32 random bits, int32, for each counter. key: (..., 2) broadcasts against counter (...)."""
    return _mix(_mix(counter.to(torch.int32) + key[..., 0]) ^ key[..., 1])


def integers(key: Tensor, counter: Tensor, high: Tensor | int) -> Tensor:
    """Integers in [0, high), int64."""
    return (bits(key, counter).long() & 0x7FFFFFFF) % high


def uniform(key: Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), shape (..., size) for keys (..., 2)."""
    counter = torch.arange(size, dtype=torch.int32, device=key.device)
    return ((bits(key[..., None, :], counter) >> 8 & 0xFFFFFF).float() + 0.5) * 2**-24


def normal(key: Tensor, size: int) -> Tensor:
    """Standard normal numbers (Box and Muller 1958), shape (..., size) for keys (..., 2)."""
    radius, angle = uniform(key, 2 * (-(-size // 2))).chunk(2, -1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :size]


def shuffle(position: Tensor, n: Tensor | int, key: Tensor, rounds: int = 24) -> Tensor:
    """Where a random permutation of 0..n-1 sends each position, without writing the permutation down.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs x with (k - x) mod n and a coin that both share
    decides whether they swap. position: (...) int64 in [0, n); n and key (..., 2) broadcast against it. Returns (...) int64.
    """
    shifts, coins = _schedule(key, n, rounds)
    for four in zip(shifts.split(4, -1), coins.split(4, -2), strict=True):
        position = _swap(position, n, *map(Tensor.clone, four))  # not views, each of which would be compiled anew
    return position


def _schedule(key: Tensor, n: Tensor | int, rounds: int) -> tuple[Tensor, Tensor]:
    """What the rounds of `shuffle` pair by, (..., rounds), and the keys of their coins (..., rounds, 2)."""
    each = torch.arange(rounds, device=key.device)
    shifts = integers(key[..., None, :], each, n[..., None] if isinstance(n, Tensor) else n)
    return shifts, fold(key[..., None, :], each + 1)


def _swap(position: Tensor, n: Tensor | int, shifts: Tensor, coins: Tensor) -> Tensor:
    """Some rounds of `shuffle`, with shifts (..., rounds) and coins (..., rounds, 2)."""
    for shift, coin in zip(shifts.unbind(-1), coins.unbind(-2), strict=True):
        partner = (shift - position) % n
        swap = bits(coin, torch.maximum(position, partner)) & 1
        position = torch.where(swap == 0, position, partner)
    return position


def compile_draws() -> None:
    """From now on torch.compile does what Tasks spend their time with: normals, and rounds of `shuffle`. To rounding the same
    numbers, five times faster on a CPU. (To compile Tasks.sample as a whole takes minutes: 24 rounds make long kernels.)"""
    global normal, _schedule, _swap
    if not hasattr(normal, "_torchdynamo_orig_callable"):
        normal = torch.compile(normal)
        _schedule, _swap = torch.compile(_schedule, dynamic=True), torch.compile(_swap, dynamic=True)  # n and shapes vary


# ----------------------------------------------------------------------------------------------------------------------
# Datasets
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on a device.

    x: (examples, *shape), uint8 images (channels, height, width) or float32 features (already normalised), class after
    class; None where examples are made on the fly by `make`. counts: (c,) number of examples of each class. mean and std
    are those of images scaled to 0..1.
    """

    name: str
    split: str
    shape: tuple[int, ...]
    num_classes: int
    x: Tensor | None = None
    counts: Tensor | None = None
    mean: float = 0.0
    std: float = 1.0
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_inputs(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        """Number of distinct examples; 0 where there is no end of them."""
        return 0 if self.x is None else len(self.x)

    def inputs(self, index: Tensor) -> Tensor:
        """Normalised, flattened inputs (..., a) float32 of the examples `index` (...) int64."""
        x = self.x[index].flatten(index.ndim)
        return (x.float() / 255 - self.mean) / self.std if x.dtype == torch.uint8 else x

    def resize(self, size: int) -> "Dataset":
        """The same images at size x size pixels (bilinear, antialiased). Raises DatasetError where there is no image."""
        if len(self.shape) != 3:
            raise DatasetError(f"The dataset '{self.name}' has no images and cannot be resized to {size} pixels.")
        if self.shape[1:] == (size, size):
            return self
        shape = (self.shape[0], size, size)
        if self.x is None:
            return replace(self, shape=shape, make=MAKERS[self.name](shape))
        resized = [
            torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().byte()
            for part in self.x.split(4096)
        ]
        return replace(self, shape=shape, x=torch.cat(resized))


def load(
    name: str,
    split: Literal["train", "test"] = "train",
    data_dir: Path | str = "data",
    device: torch.device | str = "cpu",
    size: int | None = None,
) -> Dataset:
    """Load a dataset, one of NAMES. What torchvision knows is read from `data_dir`, and downloaded to it once if missing.

    size: side of the images in pixels (default: as they are; for `random` and `sum_sign`, 8). Data without images ignore it.
    Raises DatasetError if the name is unknown, or the files are missing or damaged and cannot be downloaded.
    """
    if name not in NAMES:
        raise DatasetError(f"There is no dataset '{name}'; choose from {', '.join(NAMES)}.")
    if split not in ("train", "test"):
        raise DatasetError(f"There is no split '{split}'; choose train or test.")
    if name in GENERATED:
        shape = (1, size or 8, size or 8)
        classes = 10 if name == "random" else 2
        return Dataset(name, split, shape, classes, make=MAKERS[name](shape), device=torch.device(device))
    x, y, mean, std = (_load_bundled if name in BUNDLED else _load_torchvision)(name, split, Path(data_dir))
    counts = y.bincount()
    dataset = Dataset(name, split, tuple(x.shape[1:]), len(counts), x[y.argsort(stable=True)], counts, mean, std)
    if size and x.ndim == 4:
        dataset = dataset.resize(size)
    return replace(dataset, x=dataset.x.to(device), counts=counts.to(device), device=torch.device(device))


def _load_bundled(name: str, split: str, data_dir: Path) -> tuple[Tensor, Tensor, float, float]:
    """scikit-learn's datasets with a fixed, stratified split: three quarters to train on, one quarter to test on."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    data = getattr(sklearn.datasets, f"load_{name}")()
    train, test = train_test_split(range(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    index = train if split == "train" else test
    x, y = torch.tensor(data.data).float(), torch.tensor(data.target)
    if name == "digits":
        x = (x * (255 / 16)).round().byte().view(-1, 1, 8, 8)
        pixels = x[train].float() / 255
        return x[index], y[index], pixels.mean().item(), pixels.std().item()
    x = (x - x[train].mean(0)) / x[train].std(0)  # features have units of their own
    return x[index], y[index], 0.0, 1.0


def _load_torchvision(name: str, split: str, data_dir: Path) -> tuple[Tensor, Tensor, float, float]:
    import torchvision.datasets as tv  # takes a second, and the bundled datasets do without

    train = split == "train"
    classes = {"mnist": tv.MNIST, "fashion_mnist": tv.FashionMNIST, "kmnist": tv.KMNIST, "emnist": tv.EMNIST}
    classes |= {"cifar10": tv.CIFAR10, "svhn": tv.SVHN, "omniglot": tv.Omniglot}
    which = {"svhn": {"split": split}, "omniglot": {"background": train}}.get(name, {"train": train})
    if name == "emnist":
        which["split"] = "byclass"
    hint = f"use a bundled dataset ({', '.join(BUNDLED)}) or name the folder that holds it with --data-dir"
    try:
        try:
            data = classes[name](data_dir, download=False, **which)
        except RuntimeError as error:
            if "download=True" not in str(error):  # torchvision's word for: not there
                raise
            data = None
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"The files of '{name}' in '{data_dir}' are damaged; delete them, or {hint}.") from error
    if data is None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=data_dir) as folder:  # data_dir gets whole files, whoever else is downloading them
                classes[name](folder, download=True, **which)
                files = [path for path in Path(folder).rglob("*") if path.is_file()]
                for path in sorted(files, key=lambda path: -len(path.parts)):  # archives, which vouch for the rest, are last
                    to = data_dir / path.relative_to(folder)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(to)
            data = classes[name](data_dir, download=False, **which)
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise DatasetError(f"The dataset '{name}' is not in '{data_dir}' and could not be downloaded; {hint}.") from error
    if name == "omniglot":  # 32,460 small files, the label of each is its folder
        from torchvision.transforms.functional import pil_to_tensor

        x = torch.stack([pil_to_tensor(image) for image, _ in data]).bool().byte() * 255
        y = torch.tensor([label for _, label in data])
    else:
        x = torch.as_tensor(data.data)
        y = torch.as_tensor(data.labels if name == "svhn" else data.targets).long()
        if name == "cifar10":
            x = x.permute(0, 3, 1, 2).contiguous()
        elif name == "emnist":
            x = x.mT.contiguous()[:, None]  # stored lying on their side
        elif name != "svhn":
            x = x[:, None]
    return x, y, *STATISTICS[name]


def _make_random(shape: tuple[int, ...], points: int = 20) -> Callable:
    """Random (Appendix B): a task is 20 Gaussian images with random labels, one of 10; a sequence repeats them."""
    size = math.prod(shape)

    def make(task: Tensor, position: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        point = shuffle(position % points, points, fold(sequence[:, None], position // points))
        images = normal(fold(task, 1), points * size).view(-1, points, size)
        labels = integers(fold(task, 2)[:, None], torch.arange(points, device=task.device), 10)
        return images.gather(1, point[..., None].expand(-1, -1, size)), labels.gather(1, point)

    return make


def _make_sum_sign(shape: tuple[int, ...]) -> Callable:
    """Sum Sign (Appendix B): images of truncated normals around a mean drawn from U(-1, 1); is their sum positive?"""
    size = math.prod(shape)

    def make(task: Tensor, position: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        example = fold(sequence[:, None], position)
        low, high = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (-2, 2))
        noise = torch.special.ndtri(low + (high - low) * uniform(fold(example, 1), size))
        x = noise + 2 * uniform(fold(example, 2), 1) - 1
        return x, (x.sum(-1) >= 0).long()

    return make


MAKERS = {"random": _make_random, "sum_sign": _make_sum_sign}


# ----------------------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tasks:
    """A distribution over tasks, made from one dataset.

    Each kind of augmentation falls on a share of the tasks (0 none, 1 all), decided by the task's id like all the rest.
    projection: "gaussian" draws the matrix from N(0, 1/a) (section 5.3.1, Algorithm 9), "glorot" from the uniform
    distribution of Glorot and Bengio (2010) (VSML, section 3.4.3). projection_size: number of projected inputs (default:
    as many as the dataset has). blanked: each task replaces a share of its inputs, up to this one, by a constant, like the
    empty border of an image. classes: each task sees this many classes of the dataset, relabelled 0, 1, ... shots: sequences
    are few-shot episodes: so many examples of each class in random order, then one other example of any class; which class
    has which label is random there.

    Raises DatasetError for a combination that cannot be.
    """

    dataset: Dataset
    projection: Literal["gaussian", "glorot"] = "glorot"
    projected: float = 0.0
    projection_size: int | None = None
    permuted_inputs: float = 0.0
    permuted_labels: float = 0.0
    blanked: float = 0.0
    classes: int | None = None
    shots: int = 0
    seed: int = 0

    def __post_init__(self):
        name, available = self.dataset.name, self.dataset.num_classes
        if self.classes and not 2 <= self.classes <= available:
            raise DatasetError(f"Asked for {self.classes} classes, but '{name}' has {available}; choose from 2 to {available}.")
        if self.classes and not len(self.dataset):
            raise DatasetError(f"The classes of '{name}' are made on the fly and cannot be chosen from.")
        if self.shots and (not len(self.dataset) or self.shots >= self.dataset.counts.min()):
            raise DatasetError(f"'{name}' has too few stored examples of a class for episodes of {self.shots} shots.")
        if self.projection_size not in (None, self.dataset.num_inputs) and self.projected != 1:
            raise DatasetError("A projection to another size has to be applied to all tasks (projected = 1).")

    @property
    def num_inputs(self) -> int:
        return self.projection_size or self.dataset.num_inputs

    @property
    def num_classes(self) -> int:
        return self.classes or self.dataset.num_classes

    @property
    def episode(self) -> int:
        """Examples in a few-shot episode; 0 if sequences are no episodes."""
        return self.shots * self.num_classes + 1 if self.shots else 0

    def keys(self, ids: Tensor, salt: int) -> Tensor:
        """(s, 2) keys of the ids (s,), different for each salt."""
        return fold(key(self.seed, ids.device, salt), ids)

    def _share(self, task: Tensor, salt: int, share: float) -> Tensor:
        """Which of the tasks (s, 2) an augmentation falls on: (s, 1) bool."""
        return uniform(fold(task, salt), 1) < share

    @torch.no_grad()
    def sample(self, tasks: Tensor, sequences: Tensor, length: int, start: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Examples start, start + 1, ..., start + length - 1 of one sequence of each task. start may be a tensor (s, 1).

        tasks, sequences: (s,) int64 ids. Returns x (s, t, a) float32 and y (s, t) int64 on the dataset's device. A sequence
        runs through its task's examples in random order and starts over, in another order, when it has seen them all.
        """
        data, task = self.dataset, self.keys(tasks.to(self.dataset.device), 1)
        sequence = self.keys(sequences.to(data.device), 2)
        position = (torch.arange(length, device=data.device) + start).expand(len(task), -1)
        x, y = data.make(task, position, sequence) if data.make else self._draw(task, position, sequence)
        if self.permuted_labels:
            order = shuffle(
                torch.arange(self.num_classes, device=y.device).expand(len(y), -1), self.num_classes, fold(task, 4)[:, None]
            )
            y = torch.where(self._share(task, 3, self.permuted_labels), order.gather(1, y), y)
        if self.permuted_inputs:
            order = shuffle(torch.arange(x.shape[-1], device=x.device).expand(len(x), -1), x.shape[-1], fold(task, 5)[:, None])
            permuted = x.gather(2, order[:, None].expand_as(x))
            x = torch.where(self._share(task, 6, self.permuted_inputs)[..., None], permuted, x)
        if self.blanked:
            blank = uniform(fold(task, 10), x.shape[-1]) < self.blanked * uniform(fold(task, 11), 1)
            x = torch.where(blank[:, None], 0.5 * normal(fold(task, 12), 1)[:, None], x)
        if self.projected:
            projected = x @ self.projections(task)
            x = projected if self.projected == 1 else torch.where(self._share(task, 7, self.projected)[..., None], projected, x)
        return x, y

    def projections(self, task: Tensor) -> Tensor:
        """The projection matrices (s, inputs, projected inputs) of the tasks with keys (s, 2)."""
        a, b = self.dataset.num_inputs, self.num_inputs
        if self.projection == "gaussian":
            return normal(fold(task, 8), a * b).view(-1, a, b).div_(math.sqrt(a))  # in place: it may be gigabytes
        return (2 * uniform(fold(task, 8), a * b).view(-1, a, b) - 1) * math.sqrt(6 / (a + b))

    def _draw(self, task: Tensor, position: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Examples of a stored dataset at the positions (s, t) of the sequences."""
        data, count = self.dataset, self.dataset.counts
        first = count.cumsum(0) - count  # where each class begins
        chosen = torch.arange(data.num_classes, device=data.device).expand(len(task), -1)
        if self.classes or self.shots:
            chosen = shuffle(chosen, data.num_classes, fold(task, 9)[:, None])[:, : self.num_classes]
        if self.shots:
            return self._episode(chosen, sequence, position)
        chosen = chosen.sort(-1).values
        end = count[chosen].cumsum(-1)  # (s, c) of the task's own numbering of its examples, class by class
        total = end[:, -1:]
        example = shuffle(position % total, total, fold(sequence[:, None], position // total))
        label = torch.searchsorted(end, example, right=True)
        within = example - (end - count[chosen]).gather(1, label)
        return data.inputs(first[chosen.gather(1, label)] + within), label

    def _episode(self, chosen: Tensor, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Few-shot episodes with the classes chosen (s, c): one after the other if they are longer than one."""
        data, c, last = self.dataset, self.num_classes, self.shots * self.num_classes
        episode, position = fold(sequence[:, None], position // (last + 1)), position % (last + 1)
        order = shuffle(position.clamp(max=last - 1), last, episode)
        query = position == last
        label = torch.where(query, integers(fold(episode, 2), torch.zeros_like(position), c), order % c)
        shot = torch.where(query, self.shots, order // c)
        index = chosen.gather(1, label)
        count = data.counts[index]
        within = shuffle(shot, count, fold(fold(episode, 1), label))
        return data.inputs((data.counts.cumsum(0) - data.counts)[index] + within), label
