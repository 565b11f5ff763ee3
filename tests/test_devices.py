"""Every script on a GPU that is not there: its tensors hold those of the CPU, and refuse the company of others.

What a GPU complains about is found without one: operations on tensors of two devices, random generators of another device, and
numpy's reach for memory that is not its own. (What torch.compile makes of the scripts there, and how fast, is not.)
"""

import json
from functools import cache

import pytest
import test_fme
import test_gla
import test_gpicl
import test_metagenrl
import test_symla
import test_vsml
import torch
from conftest import run_script
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
DEVICE = torch.ops.prim.device.default
GENERATORS = {}  # those on the GPU, by the address of what they hold
COPIES = ("copy_", "_to_copy", "lift_fresh")
OVERRIDES = {
    "is_available": True, "set_device": None, "get_device_name": "pretended", "max_memory_allocated": 0, "_lazy_init": None,
    "get_rng_state_all": [], "set_rng_state_all": None, "device_count": 1,
}  # fmt: skip


class There(Tensor):
    """A tensor that says it is on the GPU; to PyTorch's C++ side, which would look for a driver, that it is on meta."""

    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU)
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, **layout, dispatch_device=True)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Pretending():
            return func(*args, **(kwargs or {}))

    device, is_meta = property(lambda self: GPU), property(lambda self: False)

    def tolist(self):
        return self.detach().held.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("a tensor on the GPU is not numpy's")
        return self.detach().held.numpy()

    def __array__(self, *args, **flags):
        return self.numpy()


@cache
def described(func):
    """The name of an operation, whether it writes to an argument, and whether it returns one thing."""
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
    return func.overloadpacket.__name__, writes, len(func._schema.returns) == 1


class Pretending(TorchDispatchMode):
    """Does on the CPU what is asked of the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        (name, writes, alone), (leaves, spec) = described(func), tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if func is DEVICE:
            return META if isinstance(args[0], There) else CPU
        there = any(isinstance(x, There) for x in tensors)
        strangers = [x for x in tensors if not isinstance(x, There) and x.ndim]
        if "index" in name and isinstance(args[0], There):  # by numbers on the CPU, that is allowed
            strangers = [x for x in strangers if x.is_floating_point()]
        if there and strangers and name not in COPIES:
            raise RuntimeError(f"{func} of two devices: {[(type(x).__name__, tuple(x.shape)) for x in tensors]}")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type != "cpu"
        generator = kwargs.get("generator") or next((x for x in args if isinstance(x, torch.Generator)), None)
        if generator is not None and (generator._cdata in GENERATORS) != there:
            raise RuntimeError(f"{func} with a generator of another device")
        with _disable_current_modes():
            held, named = tree_unflatten([x.held if isinstance(x, There) else x for x in leaves], spec)
            named |= {"device": CPU} if named.get("device") is not None else {}
            out = func(*held, **named)
        if writes:
            return args[0] if alone else out
        return tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, out) if there else out


class AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, x, any_generator=torch.Generator):
        return type.__instancecheck__(any_generator, x)


class Generator(torch.Generator, metaclass=AnyGenerator):
    def __new__(cls, device="cpu", new=torch.Generator.__new__):
        generator = new(cls)
        if torch.device(device).type == "cuda":
            GENERATORS[generator._cdata] = generator
        return generator

    device = property(lambda self: GPU if self._cdata in GENERATORS else CPU)


@pytest.fixture
def pretending(monkeypatch):
    """Where there is a GPU, nothing is pretended."""
    if torch.cuda.is_available():
        yield
        return
    torch._C._ensureCUDADeviceGuardSet()
    for name, value in OVERRIDES.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    save = torch.save
    here = lambda x: x.detach().held.clone() if isinstance(x, There) else x  # noqa: E731
    monkeypatch.setattr(torch, "save", lambda what, file: save(tree_map(here, what), file))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.nn.LSTM, "flatten_parameters", lambda self: None)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    with Pretending():
        yield
    torch._C._set_only_lift_cpu_tensors(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_what_a_gpu_would_refuse(pretending):
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x[torch.tensor([0, 2])] * 2).sum().backward()
    assert x.device.type == x.grad.device.type == "cuda" and x.grad.tolist() == [2, 0, 2] and x.cpu().device.type == "cpu"
    assert torch.rand(2, generator=torch.Generator("cuda"), device="cuda").device.type == "cuda"
    for refused in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3)[x.long()],
        lambda: x.detach().numpy(),
        lambda: torch.rand(2, generator=torch.Generator(), device="cuda"),
        lambda: torch.rand(2, generator=torch.Generator("cuda")),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            refused()


MORE = {  # and as few steps as do
    test_fme: "--envs swapping_bandit --executions 8 --execution-steps 10 --test-seeds 2",
    test_gla: "--test-envs heading:30 --meta-steps 2 --test-seeds 2 --chunks 2 "
    "--baselines one-task no-reward ad dpt cloning teacher ppo uniform",
    test_gpicl: "--statistics --meta-steps 2 --sequence-length 4",
    test_metagenrl: "--envs point_mass --test-envs --population 2 --env-steps 32 --test-steps 24 --evaluations 1 --baselines td3",
    test_symla: "--meta-steps 2 --test-envs independent_bandit:3",
    test_vsml: "--baselines rnn sgd --test-datasets digits --meta-steps 2 --sequence-length 3 --test-steps 4",
}


@pytest.mark.parametrize("tests", MORE, ids=lambda tests: tests.__name__[5:])
def test_a_whole_run(tests, pretending, tmp_path, monkeypatch):
    """Meta-training with baselines, and meta-test."""
    monkeypatch.setattr("common.envs.tasks.PointMass.max_steps", 10)
    script = tests.__name__[5:] + ".py"
    done = run_script(script, tmp_path, f"{tests.TINY} {MORE[tests]} --device cuda --no-compile --run-name done")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "done" / "results.json").read_text())["device"] == torch.cuda.get_device_name()
