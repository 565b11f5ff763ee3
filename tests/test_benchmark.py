"""`benchmark.py gpu` as a whole, at toy sizes: everything that it runs, in processes of their own."""

import json
import os
import subprocess
import sys

import numpy as np
from conftest import ENV, ROOT

COMMAND = [sys.executable, ROOT / "tests" / "benchmark.py", "gpu"]
NO_GPU = ENV | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def test_gpu(tmp_path):
    """Ceilings, a script whole, the speed of its steps, and GPICL on images, which are read from .npz files."""
    images = {f"x_{split}": np.random.randint(256, size=(60, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    labels = {f"y_{split}": (np.arange(60) % 10).astype(np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **images, **labels)
    out = tmp_path / "out"
    flags = ["--minutes", "4", "--out", out, "--data", tmp_path, "--only", "gpicl"]
    done = subprocess.run([*COMMAND, *flags], env=NO_GPU, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    assert {line["step"] for line in lines} == {1, 2, 3, 4} and {line["card"] for line in lines} == {"CPU"}
    found = {line["what"]: line for line in lines}
    assert found["copy"]["TB_per_s"] > 0
    assert found["gpicl cpu eager"]["rows"] > 0 and found["gpicl cpu eager"]["differ"] == 0
    assert found["gpicl: 4 x 12, 8 x 8 x 1: a meta-step"]["ms"] > 0
    assert found["checkpoint kept"]["meta_steps"] >= 5 and found["gpicl on mnist (task), transformer"]["after_10"] >= 0
    assert json.loads((out / "gpicl_results.json").read_text())["args"]["dataset"] == ["mnist"]
    assert "gpicl on mnist (task), transformer" in done.stdout

    again = tmp_path / "again"
    flags = ["--minutes", "4", "--out", again, "--data", tmp_path, "--steps", "4", "--resume", out]
    done = subprocess.run([*COMMAND, *flags], env=NO_GPU, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (again / "gpu.jsonl").read_text().splitlines()]
    steps = [line["meta_steps"] for line in lines if line["what"] in ("goes on", "checkpoint kept")]
    assert not [line for line in lines if "error" in line] and steps[0] == found["checkpoint kept"]["meta_steps"] <= steps[1]


def test_a_deadline(tmp_path):
    """What does not end in time is ended, and said."""
    flags = ["--minutes", "0.08", "--out", tmp_path, "--steps", "2", "--only", "vsml"]
    done = subprocess.run([*COMMAND, *flags], env=NO_GPU, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["late"] and "error" in line for line in lines)
