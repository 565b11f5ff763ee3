"""What the tests of all scripts use to run them as a user does."""

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from common import machine

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_HOME": "/nonexistent"} | NO_NETWORK
PYTHON = (sys.executable,)
torch.set_num_threads(1)  # threads that wait for a busy core burn the other one
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0")

KILL = """
import os, runpy, signal, sys
rename, left = os.replace, {nth}
def rename_and_die(source, target):
    global left
    rename(source, target)
    left -= str(target).endswith("{ending}")
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = rename_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(ending="checkpoint.pt", nth=1):
    """A launcher: kill -9 right after a file of this name was written for the nth time."""
    return (*PYTHON, "-c", KILL.format(ending=ending, nth=nth))


KILLED = killed(nth=2)  # the first one is that of step 0


def run_script(name, run_dir, flags, launcher=None):
    """A script's command line, typed in an empty folder without a network.

    With a launcher in a process of its own, as a user does; without one main() is called here, on
    one thread as there, because importing torch again takes seconds.
    """
    line = [str(ROOT / name), "--run-dir", str(run_dir), *flags.split()]
    if launcher:
        return subprocess.run([*launcher, *line], cwd=run_dir, env=ENV, capture_output=True, text=True, timeout=300)

    script = importlib.import_module(name.removesuffix(".py"))
    code = 0
    stdout = io.StringIO()
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", line)
        patch.chdir(run_dir)
        for variable in ("TORCH_HOME", *NO_NETWORK):
            patch.setenv(variable, ENV[variable])
        try:
            machine.run_as_script(script.main, name, (script.UserError, *script.USER_ERRORS))
        except SystemExit as stopped:  # Python prints a text and exits with code 1
            code = 1
            print(stopped.code, file=stderr)
    return subprocess.CompletedProcess(line, code, stdout.getvalue(), stderr.getvalue())


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
