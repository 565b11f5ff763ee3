"""The agreement between the files: who imports whom, and the plumbing that all scripts share to the
letter."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NAMES = ("metagenrl", "vsml", "symla", "gpicl", "gla", "fme")
SCRIPTS = [path for name in NAMES if (path := ROOT / f"{name}.py").exists()]
COMMON = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "common").rglob("*.py"))
}  # by the names that are imported
BEGIN, END = ("# ---- the same text in all six scripts: " + word for word in ("begin", "end"))


def imported(path):
    """Names of the project's own files that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & ({script.stem for script in SCRIPTS} | COMMON.keys())


def plumbing(path):
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, path
    return text[text.index(BEGIN) : text.index(END)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_of_a_readable_length(path):
    assert path.read_text().count("\n") <= 1200
    assert plumbing(path).count("\n") <= 175


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_without_flags_a_script_takes_the_laptop_preset_or_with_cuda_the_thesis(path, monkeypatch):
    script = importlib.import_module(path.stem)
    monkeypatch.setattr(sys, "argv", [path.name])
    for cuda, device, preset in ((False, "cpu", "laptop"), (True, "cuda", "thesis")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)  # noqa: B023 (called at once)
        args, _ = script.parse_args()
        assert args == script.Args(**script.PRESETS[preset] | dict(preset=preset, device=device))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_script_and_shares_its_plumbing(path):
    assert not {name for name in imported(path) if not name.startswith("common")}
    assert plumbing(path) == plumbing(ROOT / "vsml.py")


FURTHER = {  # imports with a reason
    "common.cloning": {"common.cells", "common.learners"},
    "common.incontext": {"common.learners"},  # one rule of gradient descent
    "common.ppo": {"common.flags"},  # a user types its settings
    "common.policy_gradients": {"common.networks", "common.es"},  # many agents, and means over processes
}


@pytest.mark.parametrize("name", COMMON)
def test_a_common_module_stands_alone_but_for_random_numbers_and_the_base_of_its_kind(name):
    allowed = FURTHER.get(name, set()) | {"common.rng"}
    if name.startswith("common.envs"):
        allowed = {"common.envs.base"}
    assert imported(COMMON[name]) - {"common"} <= allowed


LAZY = {
    "torch._dynamo",
    "torchvision",
    "gymnasium",
    "mujoco",
    "matplotlib",
    "sklearn",
    "tensorboard",
}


def test_scripts_import_what_is_slow_only_when_it_is_used():
    """Which decides how long --help takes. The modules of environments but MuJoCo's are light, too."""
    families = [name for name in COMMON if name.startswith("common.envs.")]
    names = ", ".join([*NAMES, *families])
    code = f"import sys, {names}; print(*{LAZY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == []
