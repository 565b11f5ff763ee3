"""What the tests of all scripts use to run them as a user does."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_HOME": "/nonexistent"} | NO_NETWORK
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
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
    return (sys.executable, "-c", KILL.format(ending=ending, nth=nth))


KILLED = killed()


def run_script(name, run_dir, flags, launcher=(sys.executable,)):
    """A script's command line, typed in an empty folder without a network."""
    line = [*launcher, str(ROOT / name), "--run-dir", str(run_dir), *flags.split()]
    return subprocess.run(line, cwd=run_dir, env=ENV, capture_output=True, text=True, timeout=300)


def rows(folder):
    """The rows of a run's results.json."""
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture
def complain(monkeypatch, tmp_path):
    """What a script says on its way out when a line is typed in an empty folder without a network; Python prints such a text
    and exits with code 1. In this process, because importing torch anew takes seconds: one mistake of each script is made
    in a process of its own."""

    def typed(name, flags):
        script = importlib.import_module(name)
        line = [f"{name}.py", "--run-dir", str(tmp_path), *flags.split()]
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.chdir(tmp_path)
        for variable in ("http_proxy", "https_proxy", "TORCH_HOME"):
            monkeypatch.setenv(variable, ENV[variable])
        with pytest.raises(SystemExit) as stopped:
            script.run_as_script(script.main)
        assert isinstance(stopped.value.code, str), stopped.value.code
        (said,) = stopped.value.code.strip().splitlines()
        assert said.startswith(f"{name}.py: ")
        return said

    return typed
