"""What the tests of all scripts use to run them as a user does."""

import importlib
import io
import json
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common import figures, machine

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_HOME": "/nonexistent"} | NO_NETWORK
PYTHON = (sys.executable,)
torch.set_num_threads(1)  # threads that wait for a busy core burn the other one
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0")
FORK = multiprocessing.get_context("forkserver")  # not this process, which may have threads of autograd
FORK.set_forkserver_preload(["pytest", "tyro", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot", "gymnasium"])


class Forked(NamedTuple):
    """A launcher: copies of a process that has imported torch, as the ranks of torchrun would be. They call `before` first, and
    die (kill -9) right after a file whose name ends in `ending` was written for the nth time."""

    world: int = 1
    ending: str = "checkpoint.pt"
    nth: int = 0
    drawn: bool = False  # with figures
    before: Callable[[], Any] = int  # which does nothing


PROCESS = Forked(drawn=True)  # nearly a user's, without the seconds of imports
TWO = Forked(world=2)


def killed(ending="checkpoint.pt", nth=1, world=1):
    """A launcher: kill -9 right after a file of this name was written for the nth time."""
    return Forked(world, ending, nth)


KILLED = killed(nth=2)  # the first one is that of step 0


def run_script(name, run_dir, flags, launcher=None):
    """A script's command line, typed in an empty folder without a network.

    With the words of a launcher in a process of its own, as a user does; with Forked in copies of a process that has imported
    torch (and has the environment variables of the first such run); without a launcher main() is called here, on one thread as there, because importing torch again takes seconds, and without figures, because
    drawing them takes a second.
    """
    line = [str(ROOT / name), "--run-dir", str(run_dir), *flags.split()]
    if isinstance(launcher, Forked):
        return run_forked(launcher, line, run_dir)
    if launcher:
        return subprocess.run([*launcher, *line], cwd=run_dir, env=ENV, capture_output=True, text=True, timeout=300)
    stdout, stderr = io.StringIO(), io.StringIO()
    return subprocess.CompletedProcess(line, run_here(line, run_dir, stdout, stderr), stdout.getvalue(), stderr.getvalue())


def undrawn(figure, path):
    """What figures.save is in runs whose figures nobody opens."""
    path.write_bytes(b"")
    figures.pyplot().close(figure)


def run_here(line, run_dir, stdout, stderr, launcher=None):
    """main() of a script, with a launcher the whole file. Returns the exit code."""
    name = Path(line[0]).name
    script = importlib.import_module(name.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", line)
        patch.chdir(run_dir)
        for variable in ("TORCH_HOME", *NO_NETWORK):
            patch.setenv(variable, ENV[variable])
        if not (launcher and launcher.drawn):
            patch.setattr(figures, "save", undrawn)
            patch.setattr(script, "save", undrawn, raising=False)  # gpicl's by name
        patch.setattr(os, "fsync", lambda file: None)  # a killed process loses nothing by it
        try:
            if launcher:
                runpy.run_path(line[0], run_name="__main__")
            else:
                machine.run_as_script(script.main, name, (script.UserError, *script.USER_ERRORS))
        except SystemExit as stopped:
            if stopped.code is None or isinstance(stopped.code, int):
                return stopped.code or 0
            print(stopped.code, file=stderr)  # as Python does with a text, and exits with code 1
            return 1
    return 0


def run_forked(launcher, line, run_dir):
    """All ranks; where one fails the others are ended, as torchrun does."""
    with socket.create_server(("localhost", 0)) as server:
        shared = {"WORLD_SIZE": str(launcher.world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        args = launcher, line, run_dir, stdout, stderr, shared
        ranks = [FORK.Process(target=rank_of, args=(*args, rank)) for rank in range(launcher.world)]
        for process in ranks:
            process.start()
        try:
            end = time.monotonic() + 300
            while any(process.is_alive() for process in ranks) and time.monotonic() < end:
                multiprocessing.connection.wait([process.sentinel for process in ranks if process.is_alive()], 1)
                if any(process.exitcode for process in ranks):
                    break
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        assert any(codes) or None not in codes, "it takes longer than five minutes"
        return subprocess.CompletedProcess(line, next(filter(None, codes), 0), stdout.read_text(), stderr.read_text())


def rank_of(launcher, line, run_dir, stdout, stderr, shared=(), rank=0):
    """A forked process, which writes what it prints to two files."""
    launcher.before()
    stdout, stderr = (open(path, "a") for path in (stdout, stderr))  # noqa: SIM115 (until the end)
    if launcher.world > 1:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    rename, left = os.replace, launcher.nth

    def rename_and_die(source, target):
        nonlocal left
        rename(source, target)
        left -= str(target).endswith(launcher.ending)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if left:
        os.replace = rename_and_die
    try:
        code = run_here(line, run_dir, stdout, stderr, launcher)
    except BaseException:
        traceback.print_exc(file=stderr)
        code = 1
    stdout.flush()
    stderr.flush()
    os._exit(code)


def rows(folder):
    """The rows of a run's results.json."""
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture
def complain(tmp_path):
    """The one line with which a script refuses its flags."""

    def typed(name, flags):
        done = run_script(f"{name}.py", tmp_path, flags)
        line = done.stderr.strip().splitlines()[-1]  # a second one would not begin with the name
        assert done.returncode == 1 and line.startswith(f"{name}.py: "), line
        return line

    return typed
