"""What all scripts share: flags with ranges, files that notice damage, folders that are locked, runs that survive."""

import errno
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import torch
from conftest import ENV, FORK, PYTHON, ROOT, Forked, killed, rank_of, rows, run_script

from common import checkpoints, figures, machine
from common.checkpoints import CheckpointError
from common.figures import matrix, plot
from common.flags import Count, FlagError, Positive, Share, check_ranges, from_dict, ranges
from common.results import MetricsLog, read_metrics, result_row, table, to_json

SCRIPTS = ("metagenrl", "vsml", "symla", "gpicl", "gla", "fme")
TINY = "--preset laptop --meta-steps 6 --sequences 2 --sequence-length 6 --test-seeds 2 --test-steps 12 --checkpoint-every 2"
TINY += " --no-compile --baselines sgd --test-datasets digits wine"


# ---- flags -------------------------------------------------------------------------------------------------------------
@dataclass
class Baseline:
    gamma: Share = 0.9


@dataclass
class Flags:
    steps: Count = 1
    sizes: tuple[Count, ...] = ()
    lr: Positive | None = None
    name: str = "x"
    ppo: Baseline = field(default_factory=Baseline)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"steps": 0}, "--steps has to be from 1 to"),
        ({"sizes": (3, 0)}, "--sizes has to be"),
        ({"lr": math.nan}, "--lr has to be .* not nan"),
        ({"lr": math.inf}, "--lr has to be .* not inf"),
        ({"ppo": Baseline(1.5)}, "--ppo.gamma has to be from 0 to 1, not 1.5"),
    ],
)
def test_a_number_out_of_its_range(changed, flag):
    check_ranges(Flags(**{"lr": 1e-3, "sizes": (2,), "ppo": Baseline()}))
    with pytest.raises(FlagError, match=flag):
        check_ranges(Flags(**changed))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_among_the_flags_has_a_range(name):
    script = importlib.import_module(name)
    hints = get_type_hints(script.Args, include_extras=True)
    numbers = [f.name for f in fields(script.Args) if "int" in str(hints[f.name]) or "float" in str(hints[f.name])]
    assert "seed" in numbers and not [number for number in numbers if not ranges(hints[number])]
    for preset in script.PRESETS.values():
        check_ranges(script.Args(**preset))
        assert from_dict(script.Args, asdict(script.Args(**preset))) == script.Args(**preset)


def all_flags(args, prefix=""):
    """The names of a dataclass' flags as they are typed, with those of nested ones, and the values that they choose from."""
    names, values = set(), set()
    for name, hint in get_type_hints(args).items():
        flag = prefix + name.replace("_", "-")
        names |= {flag, f"no-{flag}"}
        values |= set(re.findall(r"'([\w-]+)'", str(hint)))
        if is_dataclass(hint):
            nested = all_flags(hint, flag + ".")
            names, values = names | nested[0], values | nested[1]
    return names, values


@pytest.mark.parametrize("name", SCRIPTS)
def test_texts_name_flags_that_exist(name):
    """--X anywhere in a script, and X: at the beginning of a flag's help, where it is a value of another flag."""
    script = importlib.import_module(name)
    names, values = all_flags(script.Args)
    text = (ROOT / f"{name}.py").read_text()
    mentioned = {flag.rstrip(".-") for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text)}
    assert mentioned - {"nproc-per-node", "help"} <= names
    help_texts = text[text.index("\nclass Args") : text.index("\nPRESETS")]
    assert set(re.findall(r'\n    """([a-z][\w-]*):\s', help_texts)) <= values


@dataclass
class Kinds(Flags):
    size: tuple[int, int] | None = None
    count: Count | Literal["inf"] = "inf"
    quick: bool = False


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 1.0},
        {"steps": True},
        {"steps": torch.tensor(1)},
        {"sizes": [1, 2]},
        {"sizes": (1, "2")},
        {"sizes": 3},
        {"lr": "0.1"},
        {"lr": torch.ones(2)},
        {"name": None},
        {"name": b"x"},
        {"ppo": "x"},
        {"ppo": {"gamma": None}},
        {"ppo": {"delta": 0.5}},
        {"size": (1, 2, 3)},
        {"count": "infinite"},
        {"count": torch.ones(2)},
        {"quick": 0},
        {"other": 1},
        {1: 1},
    ],
)
def test_flags_of_another_type(changed):
    """As a checkpoint of another version or program may hold them."""
    fine = {"lr": 1, "sizes": (2, 3), "size": (2, 3), "count": 5, "ppo": {"gamma": 0.5}}
    assert from_dict(Kinds, fine) == Kinds(**fine | {"ppo": Baseline(0.5)})
    with pytest.raises(TypeError):
        from_dict(Kinds, fine | changed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_empty_text_is_refused(name, complain, tmp_path):
    """`--resume "$RUN"` without a RUN is no new run."""
    flags = [field.name for field in fields(importlib.import_module(name).Args) if field.type in (str, str | None)]
    assert {"resume", "checkpoint", "run_dir", "run_name"} <= set(flags)
    for flag in (flag.replace("_", "-") for flag in flags):
        assert f"--{flag} is empty" in complain(name, f"--run-name new --{flag}=")
    assert not list(tmp_path.iterdir())


# ---- files -------------------------------------------------------------------------------------------------------------
def some_state():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.randn(4, 3)).sum().backward()
    adam.step()
    Pair = namedtuple("Pair", "h c")
    return {"model": model, "adam": {"first": adam}, "theta": torch.randn(5), "memory": [Pair(torch.randn(2), torch.ones(1))]}


def test_a_state_goes_to_a_file_and_back(tmp_path):
    keep = some_state()
    checkpoints.write(tmp_path / "x.pt", {"state": checkpoints.state_of(keep), "rng": checkpoints.rng_state()})
    drawn = torch.randn(3)
    saved = checkpoints.read(tmp_path / "x.pt", state=dict, rng=list)
    assert "['memory'][0].h" in saved["state"]  # names that other files rely on: torch's pytree is private
    other = some_state()
    for tensor in (other["theta"], other["memory"][0].h, *other["model"].parameters()):
        tensor.data.zero_()
    checkpoints.restore(other, saved["state"])
    assert torch.equal(other["theta"], keep["theta"]) and torch.equal(other["memory"][0].h, keep["memory"][0].h)
    assert torch.equal(other["model"].weight, keep["model"].weight)
    checkpoints.set_rng_state(saved["rng"])
    assert torch.equal(torch.randn(3), drawn)


@pytest.mark.parametrize(
    ("keep", "part"), [({"theta": torch.zeros(4)}, "theta"), ({"phi": torch.zeros(5)}, "phi"), ({"model": torch.nn.Linear(4, 2)}, "model")]
)
def test_a_part_that_does_not_fit(keep, part):
    """The message has the file, what is in it, and what to do."""
    sentence = f"^x.pt has no '{part}' of the kind and size .* it has model, adam first, theta.*; use the flags of the run"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.restore(keep, checkpoints.state_of(some_state()), "x.pt")


OTHER_PARTS = {  # of some_state(), by what is wrong with them
    "theta of another type": {"['theta']": torch.zeros(5, dtype=torch.float64)},
    "complex theta": {"['theta']": torch.zeros(5, dtype=torch.complex64)},
    "sparse theta": {"['theta']": torch.zeros(5).to_sparse()},
    "theta is a list": {"['theta']": [0.0] * 5},
    "a weight of another type": {"['model']": {"weight": torch.zeros(2, 3, dtype=torch.int64), "bias": torch.zeros(2)}},
    "no bias": {"['model']": {"weight": torch.zeros(2, 3)}},
    "a module is a tensor": {"['model']": torch.zeros(8)},
    "an optimiser without parts": {"['adam']['first']": {}},
    "an optimiser of numbers": {"['adam']['first']": {"state": 1, "param_groups": 2}},
}
ONE = torch.tensor(1.0)
OTHER_AVERAGES = {  # of Adam's first parameter, (2, 3)
    "no averages": {"step": ONE},
    "averages of another size": {"step": ONE, "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.zeros(3, 2)},
    "empty averages": {"step": ONE, "exp_avg": torch.zeros(0), "exp_avg_sq": torch.zeros(2, 3)},
    "averages that are text": {"step": ONE, "exp_avg": "x", "exp_avg_sq": "y"},
    "averages that are a list": [1.0, 2.0],
    "averages of another type": {"step": ONE, "exp_avg": torch.zeros(2, 3).int(), "exp_avg_sq": torch.zeros(2, 3)},
}


@pytest.mark.parametrize("wrong", [*OTHER_PARTS, *OTHER_AVERAGES, "settings that are text"])
def test_a_part_of_another_type(wrong):
    """Nothing is converted. Of an optimiser, a step of a copy shows whether all is there, so that training need not."""
    state = checkpoints.state_of(some_state())
    checkpoints.restore(some_state(), state)
    adam = state["['adam']['first']"]
    if wrong in OTHER_AVERAGES:
        adam["state"][0] = OTHER_AVERAGES[wrong]
    elif wrong in OTHER_PARTS:
        state |= OTHER_PARTS[wrong]
    else:
        adam["param_groups"][0] |= {"betas": "xy", "lr": None}
    with pytest.raises(CheckpointError, match="of the kind and size"):
        checkpoints.restore(some_state(), state)


def test_every_flipped_bit_that_changes_a_number_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    value = {"state": checkpoints.state_of(some_state()), "step": 3}
    checkpoints.write(path, value)
    whole = path.read_bytes()
    intact = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for bit in torch.randint(8 * len(whole), (300,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert str(checkpoints.read(path, state=dict, step=int)) == str(intact)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("text"),
        lambda path: torch.save({"step": 1, "state": {}}, path),  # has no checksum
        lambda path: checkpoints.write(path, [1, 2]),
        lambda path: checkpoints.write(path, {"step": 1}),
        lambda path: checkpoints.write(path, {"step": 1, "state": {"x": torch.tensor(math.nan)}}),
        lambda path: checkpoints.write(path, {"step": "1", "state": {}}),
        lambda path: checkpoints.write(path, {"step": 1, "state": os.system}),  # would be executed by pickle
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(damage, tmp_path):
    path = tmp_path / "x.pt"
    checkpoints.write(path, {"step": 1, "state": {"x": torch.zeros(1)}})
    damage(path)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        checkpoints.read(path, step=int, state=dict)


def test_a_cache_that_is_damaged_is_computed_again(tmp_path):
    path = tmp_path / "x.pt"
    assert checkpoints.read_cache(path, of=str) == {}
    checkpoints.write(path, {"of": "flags"})
    assert checkpoints.read_cache(path, of=str) == {"of": "flags"}
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.read_cache(path, of=str) == {}
    checkpoints.write(path, {"of": "flags", "part": torch.tensor(math.nan)})
    assert checkpoints.read_cache(path, of=str) == {}


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.write(path, {"step": 1})
    monkeypatch.setattr(type(path), "read_bytes", lambda path: open(path / "x"))  # root may read all files
    with pytest.raises(OSError, match="Not a directory"):
        checkpoints.read(path)


def test_a_checkpoint_is_named_by_its_file_its_run_or_as_the_shipped_one(tmp_path):
    assert checkpoints.named(tmp_path, "vsml") == tmp_path / "checkpoint.pt"
    assert checkpoints.named(tmp_path / "other.pt", "vsml") == tmp_path / "other.pt"
    assert checkpoints.named("pretrained", "vsml").is_file()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.write(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(path, {"step": 2})
    assert checkpoints.read(path)["step"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_metrics_of_a_resumed_run(tmp_path):
    """Lines after its checkpoint, and bytes that are no line, are dropped; a line with other names keeps its columns."""
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.write(step, {"loss": step / 10, "accuracy": 0.5})
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(b"\n\0\0\0\n\xff\xfe,1\n4,0.1")
    before = (tmp_path / "metrics.csv").read_bytes()
    log = MetricsLog(tmp_path, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == before  # until the run goes on
    log.write(3, {"accuracy": 0.25})
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["step", "0", "1", "2", "3"]
    assert lines[-1][2:] == ["", "0.25"]

    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text.replace("step,", "sXep,", 1))  # without its header it starts again
    MetricsLog(tmp_path, 4).write(4, {"loss": 0.5})
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["step", "4"]


def test_a_line_of_metrics_that_was_cut_off_is_dropped_and_seconds_continue(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,loss\n0,50.0,0.25\n1,100.0,0.25\n2,150.0,0.12")
    log = MetricsLog(tmp_path, 3)
    log.write(3, {"loss": 0.5})
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["step", "0", "1", "3"] and 100 <= float(lines[-1][1]) < 150


def test_what_is_no_number_in_metrics_is_skipped(tmp_path):
    lines = ["step,seconds,transformer_loss,other", "1,0.1,2.5,1.0", "3,0.2,2.x5,2.0", "5,0.3,nan,", "7,0.4,2.25,4.0,9"]
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, "x,1,1,1", "9"]))
    assert read_metrics(tmp_path) == {"transformer_loss": [(1, 2.5), (7, 2.25)], "other": [(1, 1.0), (3, 2.0), (7, 4.0)]}
    (tmp_path / "metrics.csv").write_text("")
    assert read_metrics(tmp_path) == {}


def test_results_are_valid_json_and_a_table(tmp_path):
    values = torch.tensor([1.0, 3.0])
    all_rows = [result_row("a", "task", "none", "return", step, values * step) for step in (1, 5)]
    all_rows.append(result_row("b", "task", "none", "return", 1, values * math.nan))
    text = to_json({"results": all_rows, "path": tmp_path})
    assert "NaN" not in text and json.loads(text)["results"][2]["mean"] is None
    assert json.loads(text)["results"][1] == {**all_rows[0], "step": 5, "mean": 10.0, "std": 5.0}
    assert "1 -> 5" in list(table(all_rows))[1] and "2.000 ± 1.000 -> 10.000 ± 5.000" in list(table(all_rows))[1]
    plot(all_rows, tmp_path / "lines.png", labels={"a": "A"}, xscale="log")
    matrix({"map": {("row", "column"): 1.0, ("other", "column"): 2.0}}, tmp_path / "map.png", "title")
    assert min((tmp_path / name).stat().st_size for name in ("lines.png", "map.png")) > 5000


def test_lines_are_drawn_where_the_rows_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    values = torch.tensor([1.0, 3.0])
    points = [(name, step, factor) for factor, name in ((1, "a"), (2, "b")) for step in (1, 5)]
    plot([result_row(name, "task", "none", "return", step, values * step * factor) for name, step, factor in points], tmp_path / "x.png")
    (axis,) = [axis for axis in drawn[0].axes if axis.lines]
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 2], [5, 10]], [[1, 4], [5, 20]]]


def test_tensorboard_has_the_lines_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    for step in range(3):
        log.write(step, {"loss": step / 2})
    log.board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


# ---- the machine -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiler", ["exit 1", None])
def test_a_compiler_that_is_broken_or_missing(compiler, tmp_path, monkeypatch):
    """As on a Mac without OpenMP, where one is found and fails."""
    if compiler:
        for name in ("g++", "clang++", "c++"):
            (tmp_path / name).write_text(f"#!/bin/sh\n{compiler}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not machine.can_compile()


def test_a_compiler_that_works():
    if shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists():
        assert machine.can_compile()


def test_a_machine_without_the_module_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.facts(torch.device("cpu"))["peak_memory_mb"] is None


def test_a_folder_that_another_process_holds(tmp_path):
    held = f"import sys; from common import machine; from pathlib import Path; machine.lock(Path({str(tmp_path)!r}))"
    child = subprocess.Popen([*PYTHON, "-c", held + "; print('held', flush=True); sys.stdin.read()"], env=ENV, **PIPES)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="another process"):
        machine.lock(tmp_path)
    child.kill()
    child.wait()
    machine.lock(tmp_path)
    machine.release()


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


# ---- runs --------------------------------------------------------------------------------------------------------------
def command(run_dir, flags, launcher=None):
    return run_script("vsml.py", run_dir, f"{TINY} {flags}", launcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which other tests only read."""
    run_dir = tmp_path_factory.mktemp("runs")
    done = command(run_dir, "--run-name done")
    assert done.returncode == 0, done.stderr
    return run_dir / "done"


@pytest.mark.parametrize(("ending", "nth"), [("args.json", 1), ("checkpoint.pt", 1), ("meta_test.pt", 2), ("results.json", 1)])
def test_kill_9_at_any_file(ending, nth, finished, tmp_path):
    """Before the first checkpoint the same command begins again; later --resume continues; both end in the same rows."""
    cut = command(tmp_path, "--run-name cut", launcher=killed(ending, nth))
    assert cut.returncode == -signal.SIGKILL
    if ending == "results.json":
        assert rows(tmp_path / "cut") == rows(finished)
        return
    again = f"--resume {tmp_path / 'cut'}" if ending != "args.json" else f"{TINY} --run-name cut"
    done = run_script("vsml.py", tmp_path, again)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "cut") == rows(finished)
    assert not [path.name for path in (tmp_path / "cut").iterdir() if "partial" in path.name or "meta_test" in path.name]


def test_a_meta_test_that_was_cut_off_continues_under_the_same_name(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished / 'checkpoint.pt'} --run-name cut"
    assert command(tmp_path, flags, launcher=killed("meta_test.pt", 3)).returncode == -signal.SIGKILL
    parts = checkpoints.read(tmp_path / "cut" / "meta_test.pt")
    assert len(parts) == 4  # three of them, and what they are of
    last = list(parts)[-1]
    checkpoints.write(tmp_path / "cut" / "meta_test.pt", parts | {last: 3})  # is measured again
    assert command(tmp_path, flags).returncode == 0
    assert rows(tmp_path / "cut") == rows(finished)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_disk_that_fills_up(finished, tmp_path):
    """A limit on the size of files stands for it: a sentence with the path, and with room the run continues."""
    full = command(tmp_path, "--run-name full", launcher=Forked(before=small_files))
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert re.fullmatch(rf"vsml.py: ({tmp_path / 'full'}.*|A file): File too large.", full.stderr.strip().splitlines()[-1])
    assert not list((tmp_path / "full").glob("*.partial"))
    again = f"--resume {tmp_path / 'full'}" if (tmp_path / "full" / "checkpoint.pt").exists() else f"{TINY} --run-name full"
    done = run_script("vsml.py", tmp_path, again)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "full") == rows(finished)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_that_is_told_to_stop(name, tmp_path):
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    line = [str(ROOT / "vsml.py"), "--run-dir", str(tmp_path), *TINY.split(), "--run-name", "stopped", "--meta-steps", "100000"]
    run = FORK.Process(target=rank_of, args=(Forked(before=heed), line, tmp_path, tmp_path / "output", tmp_path / "errors"))
    run.start()
    try:
        until = time.time() + 60
        while not (tmp_path / "stopped" / "checkpoint.pt").exists() and run.is_alive() and time.time() < until:
            run.join(0.05)
        os.kill(run.pid, getattr(signal, name))
        run.join(60)
        code = run.exitcode
    finally:
        run.kill()
        run.join()
    errors = (tmp_path / "errors").read_text()
    assert code == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("vsml.py: stopped; continue with --resume")


def test_a_renamed_copy_reads_old_checkpoints(finished, tmp_path):
    shutil.copy(ROOT / "vsml.py", tmp_path / "mine.py")
    line = [*PYTHON, "mine.py", "--mode", "test", "--checkpoint", str(finished / "checkpoint.pt"), "--run-name", "copy"]
    done = subprocess.run(line, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "runs" / "copy") == rows(finished)


OTHER_VERSION = "was written by another version of"
CRAFTED = {  # what is changed in a checkpoint, and a part of the sentence that refuses it
    "step -1": ({"step": -1}, "is damaged"),
    "step 2^80": ({"step": 2**80}, "is damaged"),
    "step 1.5": ({"step": 1.5}, "is damaged"),
    "step of a tensor": ({"step": torch.tensor(1)}, "is damaged"),
    "a list of args": ({"args": [1]}, "is damaged"),
    "a name that is no text": ({"args": {1: 2}}, OTHER_VERSION),
    "an unknown flag": ({"args": {"unknown": 2}}, OTHER_VERSION),
    "a number as text": ({"args": {"seed": "1"}}, OTHER_VERSION),
    "a tensor as a number": ({"args": {"checkpoint_every": torch.ones(3)}}, OTHER_VERSION),
    "text as a switch": ({"args": {"compile": "no"}}, OTHER_VERSION),
    "nested text": ({"args": {"baselines": ((),)}}, OTHER_VERSION),
    "an unknown learner": ({"args": {"learner": "x"}}, OTHER_VERSION),
    "a number out of its range": ({"args": {"seed": -5}}, "--seed has to be from 0"),
    "a list as the state": ({"state": [torch.ones(2)]}, "is damaged"),
    "an empty state": ({"state": {}}, "has no '"),
    "names that are no text": ({"state": {1: torch.ones(2), None: 3}}, "has no '"),
    "a random state that is no list": ({"rng": torch.ones(2)}, "is damaged"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_crafted_checkpoint_is_refused_in_one_sentence(name, complain, tmp_path):
    """With the checksum that it should have. The damage of each kind is in a dictionary as a run writes it."""
    script = importlib.import_module(name)
    args = asdict(script.Args(**script.LAPTOP, preset="laptop"))
    whole = {"method": name, "args": args, "step": 0, "state": {}, "rng": checkpoints.rng_state()}
    (tmp_path / "run").mkdir()
    for parts, sentence in CRAFTED.values():
        crafted = whole | parts
        if isinstance(parts.get("args"), dict):
            crafted["args"] = args | parts["args"]
        checkpoints.write(tmp_path / "run" / "checkpoint.pt", crafted)
        ways = [f"--mode test --checkpoint {tmp_path / 'run' / 'checkpoint.pt'}", f"--resume {tmp_path / 'run'}"]
        for flags in ways[: 1 if "state" in parts else 2]:  # a resumed run reads the state last
            assert sentence in complain(name, flags)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_mistakes_leave_nothing_on_the_disk(finished, complain, tmp_path):
    """Nor do they change what is there."""
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    for flags, sentence in {
        "--dataset digitz --run-name typo": "There is no dataset 'digitz'",
        "--run-name ../typo": "is not a name",
        "--run-name ..": "is not a name",
        "--run-name typo\udcff": r"typo\udcff': it has characters that cannot be printed",
        f"--run-dir new/folder --run-name {'n' * 300}": "File name too long",
        f"--run-name {finished}": "is not a name",
        f"--run-dir {finished / 'args.json'}": "Not a directory",
        "--run-dir /proc/none": "/proc/none: No such file or directory",
        f"--run-name {'n' * 300}": "File name too long",
        f"--resume {finished}": "holds a finished run",
        f"--resume {finished} --run-name other": "A resumed or tested run keeps its flags",
        "--seed -1": "--seed has to be from 0",
        "--clip -1": "--clip has to be from",
    }.items():
        line = complain("vsml", flags if "--resume" in flags else f"{TINY} {flags}")
        assert sentence in line, line
    assert not list(tmp_path.iterdir())
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
