"""vsml.py: the mathematics of chapter 3, learning, and the command line as a user types it."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vsml
from common.datasets import Tasks, fold, key, load

ROOT = Path(vsml.__file__).parent
ARGS = vsml.Args(state_init="normal", input_bias=0.0, forget_bias=1.0, feed_label=True, logit_scale=3.0)
DEEP = replace(ARGS, hidden=(5, 4), backward_pass=True)


def some_theta(args, members=1, scale=1.0):
    learner = vsml.vsml(args)
    theta = learner.init(torch.Generator().manual_seed(0))
    return scale * theta + 0.3 * torch.randn(members, len(theta), generator=torch.Generator().manual_seed(1))


def some_data(p, s, t, a, b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = fold(key(seed), torch.arange(p * s).view(p, s))
    return keys, torch.randn(p, s, t, a, generator=generator), torch.randint(b, (p, s, t), generator=generator)


# ---- the mathematics ---------------------------------------------------------------------------------------------------
def test_theorem_b_1_1():
    """A grid of sub-RNNs (Eq. 3.4) is one RNN with the sparse shared weight matrix of Eq. 3.6 (Eq. 3.5)."""
    size, n = 4, 3
    generator = torch.Generator().manual_seed(0)
    s, w, c = (torch.randn(*shape, generator=generator).double() for shape in ((size, size, n), (n, n), (n, n)))
    big = torch.zeros(size, size, n, size, size, n, dtype=torch.double)  # indices c, d, i, a, b, j
    for c_, d, a, b in np.ndindex(size, size, size, size):
        if d == a and (d != b or c_ != a):
            big[c_, d, :, a, b] = c
        elif d != a and d == b and c_ == a:
            big[c_, d, :, a, b] = w
        elif d == a and d == b and c_ == a:
            big[c_, d, :, a, b] = c + w
    grid = one = s
    for _ in range(3):
        message = (grid @ c).sum(0)  # m_a = sum over a' of f_m(s_a'a), Eq. 3.3
        grid = torch.tanh(grid @ w + message[:, None])
        one = torch.tanh(torch.einsum("cdi,cdiabj->abj", one, big))
        torch.testing.assert_close(grid, one)
    assert (big == 0).double().mean() > 0.4  # sparse


def test_parameter_count():
    """FACTS of the release: N = 16 with messages of 8 has 2,384 meta-parameters (about 2,400 in section 3.4)."""
    assert vsml.vsml(vsml.Args()).init(torch.Generator()).shape == (2384,)


def slow_tick(theta, args, h, c, fwd_msg, bwd_msg):
    """One layer of one member and one sequence, sub-RNN by sub-RNN: h, c (a, b, n), messages (a, m) and (b, m)."""
    n, h, c = args.state_size, h.clone(), c.clone()
    for a in range(h.shape[0]):
        for b in range(h.shape[1]):
            for _ in range(args.micro_ticks):
                heard = torch.cat([fwd_msg[a], bwd_msg[b], h[a, b]])
                gates = heard @ theta["lstm.weight"][0] + theta["lstm.bias"][0]
                i, j, f, o = gates.split(n)
                c[a, b] = torch.sigmoid(f) * c[a, b] + torch.sigmoid(i) * torch.tanh(j)
                h[a, b] = torch.sigmoid(o) * torch.tanh(c[a, b])
    forward = sum(h[a] @ theta["fwd_msg.weight"][0] + theta["fwd_msg.bias"][0] for a in range(h.shape[0])) / h.shape[0]
    backward = sum(h[:, b] @ theta["bwd_msg.weight"][0] + theta["bwd_msg.bias"][0] for b in range(h.shape[1])) / h.shape[1]
    return h, c, forward, backward


def slow_lifetime(args, theta, keys, x, y, b):
    """Algorithm 13 for one member and one sequence, written with loops: x (t, a), y (t). Returns the logits (t, b)."""
    learner = vsml.vsml(args)
    params = learner.params(theta)
    layers = [[tensor[0, 0] for tensor in layer] for layer in learner.initial_state(keys[None, None], x.shape[1], b)]
    answers = []
    for x_t, y_t in zip(x, y, strict=True):
        layers[0][2] = F.pad(x_t[:, None], (0, args.message_size - 1))
        for k in range(len(layers)):
            *layers[k][:2], forward, backward = slow_tick(params, args, *layers[k])
            if k + 1 < len(layers):
                layers[k + 1][2] = forward
            if k > 0:
                layers[k - 1][3] = backward
        logits = args.logit_bound * torch.tanh(args.logit_scale * forward[:, 0] / args.logit_bound)
        answers.append(logits)
        error = F.pad(torch.stack([logits.softmax(-1) - F.one_hot(y_t, b), F.one_hot(y_t, b)], -1), (0, args.message_size - 2))
        layers[-1][3] = error
        if args.backward_pass:
            for k in reversed(range(len(layers))):
                *layers[k][:2], _, backward = slow_tick(params, args, *layers[k])
                if k > 0:
                    layers[k - 1][3] = backward
            layers[-1][3] = torch.zeros_like(error)
    return torch.stack(answers)


@pytest.mark.parametrize("args", [ARGS, DEEP, replace(DEEP, backward_pass=False), replace(ARGS, state_init="half")])
@pytest.mark.parametrize("cell", [vsml.lstm_cell, vsml.fused_lstm_cell])
def test_fast_lifetime_equals_loops_over_sub_rnns(args, cell):
    p, s, t, a, b = 2, 2, 4, 6, 3
    theta, (keys, x, y) = some_theta(args, p), some_data(p, s, t, a, b)
    learner = vsml.vsml(args, cell)
    _, losses, correct = vsml.lifetime(learner, theta, learner.initial_state(keys, a, b), x, y)
    assert losses.shape == correct.shape == (p, s, t)
    for i in range(p):
        for j in range(s):
            logits = slow_lifetime(args, theta[i : i + 1], keys[i, j], x[i, j], y[i, j], b)
            slow = F.cross_entropy(logits, y[i, j], reduction="none")
            torch.testing.assert_close(losses[i, j], slow, atol=1e-3 if cell is vsml.fused_lstm_cell else 1e-5, rtol=1e-4)


def test_compiled_cell_equals_the_readable_one():
    if not vsml.Run.can_compile(SimpleNamespace(args=replace(ARGS, device="cpu"), say=print)):
        pytest.skip("no C++ compiler")
    compiled = torch.compile(vsml.fused_lstm_cell, options=vsml.fuse(ARGS))
    generator = torch.Generator().manual_seed(0)
    for p, s, a, b, n in ((2, 1, 7, 3, 16), (1, 4, 9, 10, 16)):
        shapes = ((p, n, 4 * n), (p, s, a, 4 * n), (p, s, b, 4 * n), (p, s, a, b, n), (p, s, a, b, n))
        inputs = [2 * torch.randn(shape, generator=generator) for shape in shapes]
        for fast, exact in zip(compiled(*inputs), vsml.lstm_cell(*inputs), strict=True):
            torch.testing.assert_close(fast, exact, atol=1e-3, rtol=0)  # gates 1e-4, cells up to 8


@pytest.mark.parametrize("args", [ARGS, DEEP])
def test_permuting_inputs_and_outputs_permutes_the_answers(args):
    """Section 3.4.3: no input and no output is special, however the parameters are."""
    a, b, t = 6, 4, 5
    theta, (keys, x, y) = some_theta(args), some_data(1, 1, t, a, b)
    learner = vsml.vsml(args)
    state = learner.initial_state(keys, a, b)
    order_a, order_b = torch.randperm(a), torch.randperm(b)
    moved = list(state)
    moved[0] = moved[0]._replace(h=moved[0].h[:, :, order_a], c=moved[0].c[:, :, order_a])
    moved[-1] = moved[-1]._replace(h=moved[-1].h[:, :, :, order_b], c=moved[-1].c[:, :, :, order_b])
    _, losses, correct = vsml.lifetime(learner, theta, state, x, y)
    _, same, hits = vsml.lifetime(learner, theta, moved, x[..., order_a], order_b.argsort()[y])
    torch.testing.assert_close(losses, same)
    assert torch.equal(correct, hits)


@pytest.mark.parametrize("args", [ARGS, DEEP])
def test_meta_gradient_against_finite_differences(args):
    theta, (keys, x, y) = some_theta(args).double(), some_data(1, 3, 4, 5, 3)
    learner = vsml.vsml(args)
    state = [vsml.Layer(*(tensor.double() for tensor in layer)) for layer in learner.initial_state(keys, 5, 3)]

    def loss(theta):
        return vsml.lifetime(learner, theta, state, x.double(), y)[1].mean()

    theta.requires_grad_()
    (grad,) = torch.autograd.grad(loss(theta), theta)
    for seed in range(3):
        direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed)).double()
        numeric = (loss(theta + 1e-5 * direction) - loss(theta - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-9)


def test_es_and_backprop_agree_on_the_gradient():
    """With the same task over and over, small noise and many pairs, ES estimates what backpropagation computes."""
    args = replace(ARGS, population=3000, noise_std=1e-3, sequence_length=3, sequences=1, clip=1e9, device="cpu", chunk=300)
    learner = vsml.in_context_rnn(replace(args, rnn_size=2), 4, 2)  # 54 parameters
    theta = learner.init(torch.Generator().manual_seed(0)) + 0.5

    class OneTask(Tasks):
        def sample(self, tasks, sequences, length, start=0):
            return super().sample(torch.zeros_like(tasks), torch.zeros_like(sequences), length, start)

    tasks = OneTask(load("sum_sign", size=2))
    exact, loss, _ = vsml.backprop_gradient(args, learner, theta, tasks, 0)
    estimate, es_loss, _ = vsml.es_gradient(args, learner, theta, tasks, 0)
    assert abs(loss - es_loss) < 1e-3
    assert F.cosine_similarity(exact, estimate, dim=0) > 0.97
    assert (exact - estimate).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("adam", [False, True])
def test_online_sgd_equals_torch_optim(adam):
    learner, rate = vsml.online_sgd(ARGS, adam), -1.5
    keys, x, y = some_data(1, 1, 20, 6, 3)
    state = learner.initial_state(keys, 6, 3)
    layer = torch.nn.Linear(6, 3)
    layer.weight.data, layer.bias.data = state[0][0, 0, :-1].T.clone(), state[0][0, 0, -1].clone()
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(layer.parameters(), 10**rate)
    _, losses, _ = vsml.lifetime(learner, torch.tensor([[rate]]), state, x, y)
    for t in range(20):
        loss = F.cross_entropy(layer(x[0, 0, t : t + 1]), y[0, 0, t : t + 1])
        torch.testing.assert_close(losses[0, 0, t], loss.detach(), atol=1e-5, rtol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_in_context_rnn_is_torchs_lstm():
    args = replace(ARGS, rnn_size=5, micro_ticks=1)
    learner = vsml.in_context_rnn(args, 4, 3)
    theta = torch.randn(1, sum(map(math.prod, learner.shapes.values())), generator=torch.Generator().manual_seed(0))
    params = learner.params(theta)
    cell = torch.nn.LSTMCell(4 + 3 + 3, 5)
    i, j, f, o = params["lstm.weight"][0].chunk(4, -1)
    weight = torch.cat([i, f, j, o], -1)  # torch's order of gates
    i, j, f, o = params["lstm.bias"][0].chunk(4, -1)
    cell.weight_ih.data, cell.weight_hh.data = weight[:-5].T, weight[-5:].T
    cell.bias_ih.data, cell.bias_hh.data = torch.cat([i, f, j, o]), torch.zeros(20)
    keys, x, y = some_data(1, 1, 6, 4, 3)
    _, losses, _ = vsml.lifetime(learner, theta, learner.initial_state(keys, 4, 3), x, y)
    h, c, error, label = (torch.zeros(1, size) for size in (5, 5, 3, 3))
    for t in range(6):
        h, c = cell(torch.cat([x[0, :, t], error, label], -1), (h, c))
        logits = 100 * torch.tanh((h @ params["out.weight"][0] + params["out.bias"][0]) / 100)
        torch.testing.assert_close(losses[0, :, t], F.cross_entropy(logits, y[0, :, t], reduction="none").detach())
        label = F.one_hot(y[0, :, t], 3).float()
        error = (logits.softmax(-1) - label).detach()


# ---- behaviour ---------------------------------------------------------------------------------------------------------
class Silent:
    """A Run that keeps nothing."""

    rank, device = 0, torch.device("cpu")

    def steps(self, total, keep):
        return range(total)

    def log(self, step, values):
        pass


def test_it_learns_to_learn_and_the_error_is_what_it_learns_from():
    """A short meta-training on digits; then accuracy on unseen digits after 50 to 100 examples (chance: 10 %). With the
    error input and the label cut, the same parameters must get nowhere."""
    vsml.keep_memory()
    short = dict(meta_steps=130, sequence_length=40, logit_scale=10.0, blanked=0.0, test_seeds=24, test_steps=100)
    args = vsml.Args(**vsml.LAPTOP | short | dict(device="cpu"))
    learner = vsml.vsml(args)
    thetas = {"vsml": learner.init(torch.Generator().manual_seed(0))}
    tasks = {"vsml": [Tasks(load("digits", "train"), projected=0.5)]}
    vsml.meta_train(args, {"vsml": learner}, thetas, tasks, Silent(), {})
    deaf = learner._replace(learn=lambda p, s, error, label: learner.learn(p, s, 0 * error, 0 * label))
    unseen = Tasks(load("digits", "test"))
    with torch.no_grad():
        late = [vsml.curve(args, x, thetas["vsml"], unseen, 24)[0][:, 50:].mean() for x in (learner, deaf)]
    assert late[0] > 0.4
    assert late[1] < 0.15


# ---- the command line --------------------------------------------------------------------------------------------------
TINY = "--meta-steps 6 --sequences 2 --sequence-length 6 --test-seeds 2 --test-steps 12 --checkpoint-every 2 --no-compile"
TINY += " --preset laptop --population 2 --test-datasets digits wine"
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | NO_NETWORK
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0")


def command(run_dir, flags, launcher=(sys.executable,)):
    line = [*launcher, str(ROOT / "vsml.py"), "--run-dir", str(run_dir), *TINY.split(), *flags.split()]
    return subprocess.run(line, cwd=run_dir, env=ENV, capture_output=True, text=True, timeout=300)


def rows(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which other tests only read."""
    run_dir = tmp_path_factory.mktemp("runs")
    done = command(run_dir, "--run-name done")
    assert done.returncode == 0, done.stderr
    return run_dir / "done", done


def test_what_a_run_leaves_behind(finished):
    folder, done = finished
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "results.json", "cumulative_accuracy.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any("partial" in name for name in names)
    results = json.loads((folder / "results.json").read_text())
    assert results["script"] == "vsml" and results["preset"] == "laptop" and results["parameters"] == 2384
    assert results["args"]["sequences"] == 2 and set(results["seconds"]) == {"meta_train", "meta_test"}
    keys = {"learner", "task", "novelty", "metric", "step", "mean", "std", "seeds"}
    assert all(set(row) == keys for row in results["results"])
    seen = {(row["learner"], row["task"], row["novelty"]) for row in results["results"]}
    assert seen == {(x, *y) for x in ("vsml", "rnn", "sgd", "adam") for y in (("digits", "task"), ("wine", "domain"))}
    assert {row["step"] for row in results["results"]} == {1, 2, 5, 10, 12}
    with open(folder / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(6))
    assert all(float(line["vsml_loss"]) > 0 for line in lines)
    assert "cumulative_accuracy" in done.stdout and "after 10" in done.stdout


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    assert command(tmp_path, "--run-name again").returncode == 0
    assert rows(tmp_path / "again") == rows(finished[0])
    assert command(tmp_path, "--run-name other --seed 1").returncode == 0
    assert rows(tmp_path / "other") != rows(finished[0])


def test_kill_and_resume_end_in_the_same_numbers(finished, tmp_path):
    line = [sys.executable, str(ROOT / "vsml.py"), "--run-dir", str(tmp_path), "--run-name", "killed", *TINY.split()]
    process = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.time() + 120
    while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed" / "results.json").exists(), "killed too late to be a test"
    resumed = command(tmp_path, f"--resume {tmp_path / 'killed'}")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "killed") == rows(finished[0])
    with open(tmp_path / "killed" / "metrics.csv") as mine, open(finished[0] / "metrics.csv") as theirs:
        mine, theirs = (
            [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)] for file in (mine, theirs)
        )
    assert mine == theirs


def test_meta_test_of_a_checkpoint(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'} --run-name test"
    tested = command(tmp_path, flags)
    assert tested.returncode == 0, tested.stderr
    assert rows(tmp_path / "test") == rows(finished[0])
    flags = flags.replace("name test", "name sized") + " --test-datasets digits random --test-sizes 4 10 --test-classes 3"
    sized = command(tmp_path, flags.replace("digits random", "digits"))
    assert sized.returncode == 0, sized.stderr
    assert {row["task"] for row in rows(tmp_path / "sized")} == {"digits@4", "digits@10"}


@pytest.mark.parametrize("optimizer", ["es", "backprop"])
def test_two_processes_end_in_the_numbers_of_one(optimizer, tmp_path):
    flags = f"--meta-optimizer {optimizer} --run-name"
    assert command(tmp_path, f"{flags} one").returncode == 0
    two = command(tmp_path, f"{flags} two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("one", "two"))
    for name in ("vsml", "rnn"):  # Adam blows rounding up where the gradient is zero, as for a bias that all logits share
        torch.testing.assert_close(one["thetas"][name], two["thetas"][name], atol=2e-3, rtol=1e-3)
    one, two = (np.loadtxt(tmp_path / name / "metrics.csv", delimiter=",", skiprows=1) for name in ("one", "two"))
    np.testing.assert_allclose(np.delete(one, 1, 1), np.delete(two, 1, 1), rtol=1e-4)  # but for the seconds


def test_a_population_that_two_processes_cannot_share(tmp_path):
    wrong = command(tmp_path, "--meta-optimizer es --population 3", launcher=TORCHRUN)
    assert wrong.returncode != 0
    assert "--population 3 cannot be shared evenly by 2 processes; choose a multiple of 2" in wrong.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("learner", ["rnn", "sgd", "adam"])
def test_a_baseline_as_the_learner(learner, tmp_path):
    done = command(tmp_path, f"--learner {learner} --baselines --run-name {learner}")
    assert done.returncode == 0, done.stderr
    assert {row["learner"] for row in rows(tmp_path / learner)} == {learner}


def test_deep_network_and_es(tmp_path):
    done = command(tmp_path, "--meta-optimizer es --hidden 5 --backward-pass --baselines --chunk 1 --run-name deep")
    assert done.returncode == 0, done.stderr


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    """The run stops at the meta-step whose loss is not finite; what it had saved before is whole and finite."""
    wild = command(tmp_path, "--backprop-lr inf --checkpoint-every 1 --run-name wild --baselines")
    assert wild.returncode == 1 and "Traceback" not in wild.stderr
    assert re.search(r"not finite at meta-step \d+; .*(checkpoint.pt is the last good|no checkpoint was written)", wild.stderr)
    checkpoint = tmp_path / "wild" / "checkpoint.pt"
    if checkpoint.exists():
        assert torch.load(checkpoint, weights_only=True)["state"]["thetas"]["vsml"].isfinite().all()


def broken_checkpoints(finished, folder):
    whole = (finished / "checkpoint.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("not a checkpoint")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"script": "fme"}, folder / "foreign.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "unknown.pt")
    (folder / "foreign_run").mkdir()
    torch.save(checkpoint | {"script": "fme"}, folder / "foreign_run" / "checkpoint.pt")


MISTAKES = {
    "--dataset mnits": "There is no dataset 'mnits'; choose from digits, wine",
    "--test-datasets digits mnits": "There is no dataset 'mnits'",
    "--dataset mnist --data-dir {tmp}/none": "'mnist' is not in '.*none' and could not be downloaded; use a bundled dataset",
    "--test-datasets wine --test-classes 9": "Asked for 9 classes, but 'wine' has 3",
    "--mode test": "--mode test needs --checkpoint",
    "--mode test --checkpoint {tmp}/none.pt": "There is no checkpoint",
    "--mode test --checkpoint {tmp}/cut.pt": "cut.pt is damaged or not a checkpoint",
    "--mode test --checkpoint {tmp}/text.pt": "text.pt is damaged or not a checkpoint",
    "--mode test --checkpoint {tmp}/foreign.pt": "foreign.pt is not a checkpoint of vsml.py",
    "--mode test --checkpoint {tmp}/unknown.pt": "unknown.pt is not a checkpoint of vsml.py",
    "--mode test --checkpoint {done}/checkpoint.pt --state-size 8": "has 2384 parameters, these flags ask for 944",
    "--checkpoint {done}/checkpoint.pt": "--checkpoint is for --mode test",
    "--resume {done}": "is finished",
    "--resume {tmp}": "There is no checkpoint",
    "--resume {tmp}/foreign_run": "is not a checkpoint of vsml.py",
    "--run-name {done}": "exists; choose another --run-name",
    "--meta-steps 0": "--meta-steps has to be at least 1",
    "--backprop-lr inf": r"is not finite at meta-step \d+; .* Try a smaller learning rate",
    "--device cuda": "There is no CUDA device",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_sentence_and_a_non_zero_exit_code(flags, finished, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    broken_checkpoints(finished[0], tmp_path)
    before = (finished[0] / "checkpoint.pt").read_bytes(), (finished[0] / "results.json").read_bytes()
    wrong = command(tmp_path, flags.format(tmp=tmp_path, done=finished[0]))
    assert wrong.returncode == 1, wrong.stderr
    assert "Traceback" not in wrong.stderr
    last = wrong.stderr.strip().splitlines()[-1]
    assert last.startswith("vsml.py: ")
    assert re.search(MISTAKES[flags], last), last
    assert before == ((finished[0] / "checkpoint.pt").read_bytes(), (finished[0] / "results.json").read_bytes())


# ---- what a release has to reach: python -m pytest -m slow -------------------------------------------------------------
@pytest.mark.slow
def test_the_laptop_preset_reaches_its_floors(tmp_path):
    """`python vsml.py`, and its checkpoint on full-size data that it never saw if MNIST and Fashion-MNIST are at hand."""
    data_dir = os.environ.get("CLEANMETA_DATA", ROOT / "data")

    def run(name, *flags):
        line = [sys.executable, ROOT / "vsml.py", "--preset", "laptop", "--run-dir", tmp_path, "--run-name", name, *flags]
        start = time.time()
        subprocess.run([*map(str, line), "--data-dir", str(data_dir)], check=True, cwd=tmp_path)
        found = [row for row in rows(tmp_path / name) if row["metric"] == "cumulative_accuracy"]
        return {(row["learner"], row["task"], row["step"]): row["mean"] for row in found}, time.time() - start

    found, seconds = run("laptop")
    assert seconds < 300
    assert found["vsml", "digits", 100] >= 0.72 and found["vsml", "digits", 400] >= 0.80
    assert found["vsml", "digits", 100] > max(found["sgd", "digits", 100], found["adam", "digits", 100])
    assert found["rnn", "digits", 100] > 0.9  # it knows what it was trained on, and nothing else
    for task, steps, majority in (
        ("wine", 45, 0.4),
        ("breast_cancer", 100, 0.64),
        ("random", 1000, 0.2),
        ("sum_sign", 1000, 0.6),
    ):
        assert found["vsml", task, steps] > majority + 0.2 > majority > found["rnn", task, steps], task
    if not (Path(data_dir) / "FashionMNIST").exists():
        pytest.skip("no MNIST and Fashion-MNIST in CLEANMETA_DATA")
    checkpoint = str(tmp_path / "laptop" / "checkpoint.pt")
    found, _ = run("full-size", "--mode", "test", "--checkpoint", checkpoint, "--test-datasets", "mnist", "fashion_mnist")
    for task in ("mnist", "fashion_mnist"):
        assert found["vsml", task, 1000] >= 0.6 and found["vsml", task, 1000] > found["vsml", task, 500]
        assert found["vsml", task, 100] > max(found["sgd", task, 100], found["adam", task, 100])
        assert found["rnn", task, 1000] < 0.3
