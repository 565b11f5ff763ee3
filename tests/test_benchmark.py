"""`benchmark.py gpu` as a whole, at toy sizes: all that it runs, in processes of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ENV, ROOT

COMMAND = [sys.executable, ROOT / "tests" / "benchmark.py"]
NO_GPU = ENV | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def gpu(out, *flags):
    """Lines of gpu.jsonl by what was measured, and what is printed."""
    command = [*COMMAND, "gpu", "--out", out, *flags]
    options = dict(env=NO_GPU, cwd=out.parent, capture_output=True, text=True, timeout=300)
    done = subprocess.run([str(word) for word in command], **options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert {line["card"] for line in lines} == {"CPU"}
    return {line["what"]: line for line in lines}, done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """28 x 28 images as a user's own file."""
    path = tmp_path_factory.mktemp("images") / "mnist_28.npz"
    shape = (60, 28, 28)
    arrays = {
        f"x_{x}": np.random.randint(256, size=shape, dtype=np.uint8) for x in ("train", "test")
    }
    arrays |= {f"y_{split}": np.arange(60) % 10 for split in ("train", "test")}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory, images):
    """A call for gpicl alone: its folder, its lines, and what it printed."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    return out, *gpu(out, "--minutes", 4, "--data", images, "--only", "gpicl")


@pytest.mark.slow
def test_gpu(measured):
    """The card, a script whole, the speed of its steps, its training on images and its meta-test."""
    out, lines, printed = measured
    assert not [line for line in lines.values() if "error" in line]
    assert {line["step"] for line in lines.values()} == {1, 2, 3, 4}
    assert lines["copy"]["TB_per_s"] > 0
    assert lines["gpicl cpu eager"]["rows"] > 0 and lines["gpicl cpu eager"]["differ"] == 0
    assert lines["gpicl: 4 x 12, 8 x 8 x 1: a meta-step"]["ms"] > 0
    assert lines["gpicl: checkpoint kept"]["meta_steps"] >= 5
    assert "gpicl: checkpoint kept" in printed.split("After")[-1]
    results = json.loads((out / "gpicl_results.json").read_text())
    assert results["args"]["dataset"] == ["mnist_28.npz"]
    assert ("transformer", "mnist_28", "task") in {
        (row["learner"], row["task"], row["novelty"]) for row in results["results"]
    }


@pytest.mark.slow
def test_gpu_again(tmp_path, images, measured):
    """A call that continues this training and measures the other scripts."""
    out, lines, _ = measured
    again = tmp_path / "again"
    flags = ["--minutes", 4, "--data", images, "--steps", 3, 4, "--resume", out]
    scripts = ["metagenrl", "vsml", "symla", "gla", "fme"]
    lines_after, _ = gpu(again, *flags, "--only", *scripts)
    assert not [line for line in lines_after.values() if "error" in line]
    kept = lines["gpicl: checkpoint kept"]["meta_steps"]
    assert lines_after["gpicl: resumed"]["meta_steps"] == kept
    assert lines_after["gpicl: checkpoint kept"]["meta_steps"] > kept
    assert (again / "gpicl_results.json").exists()
    for script in scripts:
        assert "measuring" in lines_after[f"{script}-0"]


def test_a_deadline(tmp_path):
    """A process that does not end in time is ended, and its line says so."""
    lines, _ = gpu(tmp_path / "out", "--minutes", 0.08, "--steps", 2, "--only", "vsml")
    assert len(lines) == 2 and all(x["late"] and "error" in x for x in lines.values())
