"""fme.py: the mathematics of chapter 7, the buffer against an obvious one, learning, and the command line."""

import csv
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import PROCESS, ROOT, TORCHRUN, killed, rows, run_script

import fme
from common import checkpoints, envs
from common.results import median_difference

RUN = SimpleNamespace(device=torch.device("cpu"), compiles=False, rank=0, world=1)
ARGS = fme.Args(
    populations=2, executions=12, num_parallel=4, roots=2, execution_steps=30, hidden=5, lifetime="lineage", sigma=0.1
)


def population(name="bandit", learner="fme", **changes):
    return fme.Population(replace(ARGS, **changes), name, learner, RUN)


# ---- the network -------------------------------------------------------------------------------------------------------
def slow_layer(w, x, b):
    """Eq. 7.1 to 7.4 for one network, number by number."""
    a = len(x)

    def apply(x):
        return [sum(w[i][j] * math.tanh(x[i]) for i in range(a)) for j in range(b + 2 * a + 4)]

    out = apply(x)
    y, k, q, beta = out[:b], out[b : b + a], out[b + a : b + 2 * a], out[b + 2 * a :]
    rates = [1 / (1 + math.exp(-value)) for value in beta]
    v_bar, v = apply(k), apply(q)
    part = [0] * b + [1] * a + [2] * a + [3] * 4
    new = [
        [w[i][j] + rates[part[j]] * (math.tanh(v[j]) - math.tanh(v_bar[j])) * math.tanh(k[i]) for j in range(len(part))]
        for i in range(a)
    ]
    return y, new


@pytest.mark.parametrize("a, b", [(3, 2), (2, 5)])
def test_a_layer_is_equations_7_1_to_7_4(a, b):
    w, x = torch.randn(4, a, b + 2 * a + 4, dtype=torch.float64), torch.randn(4, a, dtype=torch.float64)
    actual = fme.self_referential_layer(w, x, b)
    for index in range(4):
        for mine, slow in zip(actual, slow_layer(w[index].tolist(), x[index].tolist(), b), strict=True):
            torch.testing.assert_close(mine[index], torch.tensor(slow, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_sizes_and_start():
    """Inputs of CartPole: 1, four observations, and the reward, unless other --inputs are named. Truncated normals of std
    1/sqrt(N_x)."""
    args, env = fme.Args(inputs=("obs", "reward", "action")), envs.make("cartpole", 1)
    assert fme.sizes(fme.Args(), env)[0] == (6, 32) and fme.sizes(fme.for_learner(fme.Args(), "no_reward"), env)[0] == (5, 32)
    assert fme.sizes(args, env) == [(8, 32), (32, 32), (32, 2)]
    phi = fme.initialise(args, env, 200, torch.Generator().manual_seed(0))
    layers = fme.unpack(phi, fme.sizes(args, env))
    assert [tuple(w.shape) for w in layers] == [(200, 8, 52), (200, 32, 100), (200, 32, 70)]
    assert torch.equal(fme.pack(layers), phi)
    for w in layers:
        sigma = w.shape[1] ** -0.5
        assert w.abs().max() <= 2 * sigma and w.std() == pytest.approx(0.88 * sigma, rel=0.01)  # 0.88: cut at 2 sigma


@pytest.mark.parametrize("name", ["bandit", "swapping_bandit", "cartpole"])
def test_every_weight_is_changed_by_the_network_itself_unless_frozen(name):
    them = population(name)
    done, frozen = (them.execute(them.roots, 1, frozen=frozen) for frozen in (False, True))
    assert torch.equal(frozen.phi, them.roots) and (done.phi != them.roots).float().mean() > 0.99
    if name == "cartpole":  # a failure costs 1, and so many make 1 + as many episodes (or as many, if at the very last step)
        both = done.episodes + done.reward
        assert (((both == 1) | (both == 0)) & (done.episodes >= 1)).all()
    else:
        torch.testing.assert_close(them.achieved(done), done.reward / 30)


def test_executions_do_not_touch_each_other():
    """A solution comes to the same in company of others, in chunks, and beside one that is not finite."""
    them, alone = population("cartpole"), population("cartpole", chunk=1)
    phi = torch.cat([them.roots, them.roots.flip(1)], 1)
    together, one_by_one = them.execute(phi, 7), alone.execute(phi, 7)
    for mine, other in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mine, other)
    phi[0, 1] = math.inf
    beside = them.execute(phi, 7)
    assert not beside.phi[0, 1].isfinite().all()
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[0, 1] = False
    assert torch.equal(beside.phi[keep], together.phi[keep]) and torch.equal(beside.reward[keep], together.reward[keep])


@pytest.mark.parametrize("name, sizes", [("cartpole", dict(obs=4, reward=1, action=2)), ("bandit", dict(reward=1, action=2))])
def test_what_is_not_among_the_inputs_changes_nothing(name, sizes):
    """Each input moves the logits of a random network exactly if it is named; the order is that of the flag."""
    env, phi = fme.make_env(name, 1), {}
    for inputs in ((), ("reward",), ("action", "reward"), ("obs", "action")):
        args = replace(ARGS, inputs=inputs)
        phi = fme.initialise(args, env, 1, torch.Generator().manual_seed(1))
        assert fme.sizes(args, env)[0][0] == 1 + sum(sizes.get(name, 0) for name in inputs)

        def weights_after(args=args, phi=phi, obs=0.0, reward=0.0, action=-1):
            given = torch.full((1, env.obs_size), obs), torch.tensor([reward]), torch.tensor([action])
            layers = fme.unpack(phi, fme.sizes(args, env))
            return fme.pack(fme.act(args, env, False, layers, *given, torch.zeros(1, 1))[1])

        for what, other in (("obs", 0.3), ("reward", 1.0), ("action", 0), ("action", 1)):
            changed = not torch.equal(weights_after(), weights_after(**{what: other}))
            assert changed == (what in inputs and what in sizes)


def test_the_first_input_claims_no_action():
    """Before the first action the one-hot is zero: what the action's weights are does not matter."""
    args, env = replace(ARGS, inputs=("action",)), fme.make_env("bandit", 500)
    phi = fme.initialise(args, env, 1, torch.Generator().manual_seed(1))
    other = fme.unpack(phi, fme.sizes(args, env))
    other[0] = torch.cat([other[0][:, :1], 7 * other[0][:, 1:]], 1)
    draws, actions = torch.rand(500, 1 + env.num_draws), []
    for one in (phi, fme.pack(other)):
        carry = fme.start(args, env, one.expand(500, -1), draws[:, 1:])
        for _ in range(2):
            carry = fme.one_step(args, env, True, carry, draws)
            actions.append(carry.action)
    assert torch.equal(actions[0], actions[2]) and not torch.equal(actions[1], actions[3])


def test_a_step_makes_no_tensor_of_python_numbers(monkeypatch):
    """On a GPU each would be a copy from the host, and keep steps out of a CUDA graph."""
    for name in fme.TUNED:
        them = population(name)
        carry = fme.start(ARGS, them.env, them.roots[0], torch.rand(2, them.env.num_draws))
        draws = torch.rand(2, 1 + them.env.num_draws)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", None)
            patch.setattr(torch, "as_tensor", None)
            fme.one_step(ARGS, them.env, False, carry, draws)


def test_reward_by_pulls_since_a_swap():
    reward, since = torch.rand(40, 3), torch.randint(0, 25, (40, 3))
    actual = fme.by_pulls_since_swap(list(reward), list(since))
    for who in range(3):
        for pull in range(10):
            values = [float(r) for r, s in zip(reward[:, who], since[:, who], strict=True) if s == pull]
            assert actual[who, pull] == pytest.approx(sum(values) / max(1, len(values)))


# ---- selection ---------------------------------------------------------------------------------------------------------
class SlowBuffer:
    """Appendix E.1 with lists: 10 buckets over the current range, in each the 3 most recently used solutions, and the best."""

    def __init__(self):
        self.held = []  # (id, fitness), the least recently used first

    def bucket(self, fitness):
        low, high = (f(f for _, f in self.held) for f in (min, max))
        return min(9, int((fitness - low) / max(high - low, 1e-12) * 10))

    def add(self, parents, new):
        for parent, child in zip(parents, new, strict=True):
            self.held.sort(key=lambda one, parent=parent: one[0] == parent)  # to the end
            self.held += [child] if child[0] >= 0 else []
        best = max(self.held, key=lambda one: one[1])
        recent = sorted(self.held, key=lambda one: one == best)
        kept = [one for bucket in range(10) for one in [x for x in recent if self.bucket(x[1]) == bucket][-3:]]
        self.held = [one for one in self.held if one in kept]


def test_the_buffer_is_an_obvious_one():
    args = replace(ARGS, buckets=10, bucket_size=3, executions=400, roots=2, selection=3.0)
    solutions = fme.Solutions(args, torch.zeros(2, 2, 1))
    slow = [SlowBuffer(), SlowBuffer()]
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        fitness = torch.randn(2, 4, generator=generator) * (1 + number / 20)  # the range grows
        id = (number * 4 + torch.arange(4)).repeat(2, 1)
        parent = torch.full((2, 4), -2)  # none in the first round
        if number:
            _, parent = solutions.sample(torch.rand(2, 4, generator=generator, dtype=torch.float64), id)
        new = id.clone()
        new[0, 1] = -1 if number % 3 == 0 else new[0, 1]  # one that is left out
        solutions.add(fitness[..., None], new, fitness)
        for mine, obvious in enumerate(slow):
            obvious.add(parent[mine].tolist(), list(zip(new[mine].tolist(), fitness[mine].tolist(), strict=True)))
            held = solutions.id[mine] >= 0
            assert sorted(solutions.id[mine, held].tolist()) == sorted(one[0] for one in obvious.held)
            assert torch.equal(solutions.phi[mine, held, 0], solutions.fitness[mine, held])
            best = max(obvious.held, key=lambda one: one[1])
            slot = solutions.best_slot()
            assert solutions.id.gather(1, slot)[mine] == best[0] and solutions.at(slot)[mine, 0, 0] == best[1]
    assert max(len(obvious.held) for obvious in slow) <= 30


def test_slots_that_were_never_filled_hold_no_arbitrary_numbers():
    """They are in checkpoints, which are refused if a number is not finite."""
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN then
    try:
        solutions = fme.Solutions(ARGS, torch.zeros(2, 2, 1000))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (solutions.phi == 0).all()


def test_a_full_bucket_drops_neither_what_was_just_selected_nor_the_best():
    """One bucket for two: of three solutions the one goes that was neither selected nor is the best."""
    solutions = fme.Solutions(replace(ARGS, buckets=1, bucket_size=3, executions=40), torch.zeros(1, 2, 1))
    fitness = torch.tensor([[0.9, 0.5, 0.7]])
    solutions.add(fitness[..., None], torch.tensor([[0, 1, 2]]), fitness)
    _, id = solutions.sample(torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([[3]]))
    assert id == 1  # the one in the middle
    solutions.add(torch.ones(1, 1, 1), torch.tensor([[3]]), torch.tensor([[0.8]]))
    assert sorted(solutions.id[0].tolist())[-3:] == [0, 1, 3]


def test_of_equals_the_best_is_the_newest():
    """So that after the first round it is what a root made of itself, not the root, which has the same fitness."""
    them = evolved(1)
    for p in range(2):
        held = dict(zip(them.solutions.id[p].tolist(), them.solutions.fitness[p].tolist(), strict=True))
        best = int(them.solutions.id[p, them.solutions.best_slot()[p]])
        assert best >= 2 and held[best] == max(value for id, value in held.items() if id >= 0)


def test_a_process_without_a_network_to_execute(monkeypatch):
    """Fewer networks than processes: the last process has none, and adds zeros to what the others have."""
    them = population(num_parallel=2, roots=1)
    monkeypatch.setattr(RUN, "rank", 7)
    monkeypatch.setattr(RUN, "world", 8)
    outcome = them.execute(them.roots, 0)
    assert outcome.phi.shape == them.roots.shape and not outcome.phi.any() and not outcome.reward.any()


def test_solutions_are_drawn_exponentially_by_bucket_and_uniformly_within():
    args = replace(ARGS, buckets=4, bucket_size=50, selection=2.0, executions=100)
    solutions = fme.Solutions(args, torch.zeros(1, 2, 1))
    performance = torch.tensor([[0.0, 0.1, 0.2, 0.6, 0.7, 1.0]])  # buckets 0 0 0 2 2 3; bucket 1 is empty
    for first in (0, 3):
        now = performance[:, first : first + 3]
        solutions.add(now[..., None], first + torch.arange(3)[None], now)
    draws = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    child = torch.full((1, 200_000), 9)
    phi, id = solutions.sample(draws, child)
    assert torch.equal(phi[0, :, 0], performance[0, id[0]])
    weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, math.e / 2, math.e / 2, math.exp(1.5)])  # e^(2 i / 4), shared in a bucket
    torch.testing.assert_close(id[0].bincount() / 200_000, weight / weight.sum(), atol=3e-3, rtol=0)
    solutions.args = replace(args, selection=1e6)
    assert (solutions.sample(draws, child)[1] == 5).all()
    equal = fme.Solutions(replace(args, selection=1e6), torch.zeros(1, 1, 1))
    equal.add(torch.zeros(1, 3, 1), torch.arange(3)[None], torch.full((1, 3), -0.5))
    assert equal.sample(draws, child)[1].unique().tolist() == [0, 1, 2]  # all are in the best bucket
    solutions.args = replace(args, selection=20.0, buckets=100)
    assert 0.85 < (solutions.sample(draws, child)[1] == 5).float().mean() <= 1  # no bucket of the best is ever out of reach


def evolved(rounds=3, **kinds):
    them = population(**kinds)
    for number in range(rounds):
        fme.fitness_monotonic_execution(them, number)
    return them


@pytest.mark.parametrize("name, fitness", [("swapping_bandit", "failures"), ("cartpole", "failures"), ("cartpole", "steps")])
@pytest.mark.parametrize("lifetime", ["lineage", "execution"])
@pytest.mark.parametrize("learner", ["fme", "hill_climbing"])
def test_history_adds_up(learner, lifetime, name, fitness):
    """Lifetimes are sums along lineages; the set holds R/dt of the lineage or of the last execution; roots come first."""
    them = evolved(name=name, learner=learner, lifetime=lifetime, fitness=fitness)
    history = {what: value.tolist() for what, value in them.history.items()}
    for p in range(2):
        assert history["parent"][p][:6] == [-1, -1, 0, 1, 0, 1]
        held = dict(zip(them.solutions.id[p].tolist(), them.solutions.fitness[p].tolist(), strict=True))
        own = {}  # R/dt of an execution alone
        for id in range(2, 14):
            parent = history["parent"][p][id]
            depth, reward, episodes = (
                history[what][p][id] - history[what][p][parent] for what in ("depth", "reward", "episodes")
            )
            assert depth == 1
            assert history["achieved"][p][id] == pytest.approx(30 / episodes if name == "cartpole" else reward / 30)
            own[id] = 30 / episodes if fitness == "steps" else reward / 30
            whole = {what: history[what][p][id] for what in ("depth", "reward", "episodes")}
            whole = 30 * whole["depth"] / whole["episodes"] if fitness == "steps" else whole["reward"] / 30 / whole["depth"]
            assert held[id] == pytest.approx(whole if lifetime == "lineage" else own[id], abs=1e-6)
        if learner == "fme":  # whose roots were executed twice in the first round; hill climbing has them as first children
            assert held[0] == pytest.approx((own[2] + own[4]) / 2)
        else:
            assert 0 not in held and 1 not in held


def test_algorithm_12_to_the_letter():
    """One root, one execution at a time: each of three populations at once equals a loop over a list of solutions."""
    them = evolved(8, populations=3, num_parallel=1, roots=1, executions=8, buckets=5, selection=3.0)
    for p in range(3):
        held = []  # phi, fitness; R and number of executions of the lineage
        for number in range(8):
            phi, total, executions = them.roots[p, 0], 0.0, 0
            if number:
                fitness = torch.stack([one[1] for one in held])
                share = (fitness - fitness.min()) / (fitness.max() - fitness.min()).clamp(min=1e-12)
                buckets = [min(4, int(one * 5)) for one in share]
                weights = [math.exp(3 * (bucket - 4) / 5) / buckets.count(bucket) for bucket in buckets]
                draw = torch.rand(1, generator=them.generator(p, number, 0), dtype=torch.float64).item() * sum(weights)
                phi, _, total, executions = next(
                    one for nth, one in enumerate(held) if sum(weights[: nth + 1]) > draw
                )  # fmt: skip
            draws = torch.rand(31, 1, 1 + them.env.num_draws, generator=them.generator(p, number, 2))
            outcome = fme.execute(them.args, them.env, them.step_fns[False], phi[None], draws)
            total, executions = total + outcome.reward[0], executions + 1
            fitness = total / (30 * executions)
            held += [(phi, fitness, 0.0, 0)] if number == 0 else []
            held.append((outcome.phi[0], fitness, total, executions))
        torch.testing.assert_close(them.solutions.fitness[p, :9], torch.stack([one[1] for one in held]))
        torch.testing.assert_close(them.solutions.phi[p, :9], torch.stack([one[0] for one in held]))


@pytest.mark.parametrize("name, executions", [("bandit", 200), ("cartpole", 3200), ("swapping_bandit", 4000)])
def test_the_thesis_preset_is_the_thesis(name, executions):
    args = fme.with_tuned(fme.Args(preset="thesis"), name)
    assert (args.num_parallel, args.roots, args.execution_steps, args.lifetime) == (1, 1, 1000, "lineage")  # Algorithm 12, 7.3
    assert (args.buckets, args.bucket_size, args.selection, args.hidden, args.layers) == (100, 100, 20, 32, 3)  # Appendix E.1
    assert (args.populations, args.executions, args.inputs) == (64, executions, ("obs", "reward"))
    laptop = fme.with_tuned(fme.Args(**fme.LAPTOP, preset="laptop"), name)
    assert laptop.executions < executions and laptop.roots == laptop.num_parallel > 1


def test_hill_climbing_adds_gaussian_noise_and_changes_nothing_else():
    """Its roots are executed as they are, so that their fitness is their own."""
    them = evolved(2, learner="hill_climbing", sigma=0.3)
    phi = dict(zip(them.solutions.id[0].tolist(), them.solutions.phi[0], strict=True))
    assert all(torch.equal(phi[id], them.roots[0, id % 2]) for id in range(2, 6))
    change = torch.stack([phi[id] - phi[int(them.history["parent"][0, id])] for id in range(6, 10)])
    assert change.std() == pytest.approx(0.3, rel=0.05) and change.mean().abs() < 0.02


def test_random_search_has_new_networks_only():
    them = evolved(3, learner="random_search")
    assert (them.history["depth"][:, 2:] == 1).all() and (them.history["depth"][:, :2] == 0).all()
    held = them.solutions.phi[them.solutions.id >= 2]
    assert len(held) == 2 * 12 == len({tuple(phi[:3]) for phi in held.tolist()})
    first, second = (them.new_networks(number)[0] for number in (1, 2))
    for number in range(3):  # what is held is what was executed, and not what became of it
        ids = (2 + 4 * number + torch.arange(4))[:, None]
        slots = (them.solutions.id[0] == ids).int().argmax(1)
        assert torch.equal(them.solutions.phi[0, slots], them.new_networks(number)[0][0])
    w = fme.unpack(first[0], fme.sizes(ARGS, them.env))[1]
    assert w.std() == pytest.approx(0.88 * 5**-0.5, rel=0.05) and not (first == second).any()


def test_matched_noise_is_as_long_as_the_changes_of_fme(tmp_path):
    """In the middle, for each population; a network of FME changes by what its history says."""
    args = replace(ARGS, baselines=("hill_climbing_matched",), envs=("bandit",))
    evolution = fme.Evolution(args, RUN)
    ours = evolution.start("bandit fme")
    for number in range(2):
        fme.fitness_monotonic_execution(ours, number)
    phi = dict(zip(ours.solutions.id[1].tolist(), ours.solutions.phi[1], strict=True))
    for id in range(6, 10):
        change = phi[id] - phi[int(ours.history["parent"][1, id])]
        assert ours.history["change"][1, id] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-4)
    evolution.results["bandit fme"] = {"history": ours.history}
    theirs = evolution.start("bandit hill_climbing_matched")
    assert theirs.sigma.flatten().tolist() == ours.history["change"][:, 2:].median(1).values.tolist()
    for number in range(2):
        fme.fitness_monotonic_execution(theirs, number)
    for p in range(2):
        phi = dict(zip(theirs.solutions.id[p].tolist(), theirs.solutions.phi[p], strict=True))
        change = torch.stack([phi[id] - phi[int(theirs.history["parent"][p, id])] for id in range(6, 10)])
        assert change.std() == pytest.approx(theirs.sigma[p].item(), rel=0.05)


def test_a_solution_that_is_not_finite_is_dropped():
    them = population()
    them.roots[0, 1, 3] = math.nan
    for number in range(2):
        fme.fitness_monotonic_execution(them, number)
    held = them.solutions.id >= 0
    children = held & (them.solutions.id >= 2)
    assert them.solutions.phi[children].isfinite().all() and held[1].sum() == 10 and held[0].sum() <= 8


def test_pairs_are_children_and_their_parents(monkeypatch):
    """And what they achieve in fresh executions, here their first weight."""
    them = evolved(3, learner="hill_climbing", sigma=0.0001, test_seeds=20)
    assert torch.equal(them.pairs(), them.pairs())
    steps = them.args.execution_steps
    monkeypatch.setattr(them, "execute", lambda phi, *_: fme.Outcome(phi, phi[..., 0] * steps, phi[..., 0], phi))
    pairs = them.pairs()
    depth, child, parent = pairs.unbind(-1)
    ids = them.solutions.id
    for p in range(2):
        expected = [int(them.history["depth"][p, id]) - 1 for id in ids[p].tolist() if id >= 6]  # others have no parent held
        assert sorted(depth[p].tolist())[-len(expected) :] == sorted(expected)
        assert (depth[p] > 0).sum() == len(expected)
        first = dict(zip(ids[p].tolist(), them.solutions.phi[p, :, 0].tolist(), strict=True))
        theirs = {first[id]: first[int(them.history["parent"][p, id])] for id in first if id >= 6}
        known = depth[p] > 0
        assert dict(zip(child[p, known].tolist(), parent[p, known].tolist(), strict=True)) == pytest.approx(theirs)
    assert (evolved(3, learner="random_search").pairs()[..., 0] == 0).all()
    assert (evolved(3).pairs()[..., 0] > 0).sum() == 2 * 12  # of FME the roots are held


def test_rows_by_depth():
    pairs = torch.zeros(2, 5, 3)
    pairs[0, :4] = torch.tensor([[1.0, 0.5, 0.25], [2, 0.5, 0.5], [3, 0.75, 0.25], [4, 0.0, 1.0]])
    pairs[1, :1] = torch.tensor([[3.0, 0.25, 0.5]])
    rows = {(row["step"], row["metric"]): row for row in fme.by_depth("fme", "bandit", pairs)}
    means = {key: (row["mean"], row["seeds"]) for key, row in rows.items()}
    assert means == {
        (1, "child_minus_parent"): (0.25, 1), (1, "child_better"): (1.0, 1),
        (2, "child_minus_parent"): (0.0, 2), (2, "child_better"): (0.375, 2),
        (4, "child_minus_parent"): (-1.0, 1), (4, "child_better"): (0.0, 1),
    }  # fmt: skip


# ---- statistics --------------------------------------------------------------------------------------------------------
def test_the_interval_of_a_difference_of_medians():
    """It has the truth inside in about 95 of 100 draws; pairs that vary together are distinguished where others are not."""
    generator = torch.Generator().manual_seed(0)
    inside = []
    for _ in range(100):
        values, others = torch.randn(2, 64, generator=generator)
        facts = median_difference((values + 1).tolist(), others.tolist())
        inside.append(facts["low"] <= 1 <= facts["high"])
        assert facts["difference"] == pytest.approx(facts["median"] - facts["other"], abs=1e-6)
        assert facts["low"] <= facts["difference"] <= facts["high"]
    assert 88 <= sum(inside) <= 99
    assert median_difference([1, 2, 9], [1, 4, 5]) | {"low": 0, "high": 0} == {
        "median": 2.0, "other": 4.0, "difference": -2.0, "low": 0, "high": 0
    }  # fmt: skip
    common = 10 * torch.randn(64, generator=generator)
    paired = median_difference((common + 1).tolist(), common.tolist())
    assert paired["low"] == pytest.approx(1, abs=1e-4) == paired["high"]


def test_executions_until_solved():
    args = replace(ARGS, populations=3)
    achieved = torch.zeros(3, 2 + 12)
    achieved[0, [4, 9]] = 0.96
    achieved[1, 1] = 1.0  # a root's place, which is no execution
    achieved[2, 13] = 0.95
    assert fme.executions_until_solved(args, "bandit fme", {"achieved": achieved}) == [3, 13, 12]


# ---- learning ----------------------------------------------------------------------------------------------------------
def test_it_solves_the_bandit_by_modifying_itself(monkeypatch):
    """200 executions of three populations: from choosing at random to the better arm, in fresh executions."""
    monkeypatch.setattr(RUN, "compiles", True)
    them = evolved(10, populations=3, executions=200, num_parallel=20, roots=20, execution_steps=500, hidden=32)
    achieved = them.history["achieved"][:, 20:]
    assert (achieved[:, :20].mean(1) - 0.5).abs().max() < 0.2
    fresh = them.achieved(them.execute(them.best().expand(-1, 25, -1), fme.TEST))
    assert (fresh.mean(1) > 0.95).all()
    assert (achieved[:, -40:].mean(1) > 0.8).all()


# ---- the command line --------------------------------------------------------------------------------------------------
TINY = "--preset laptop --populations 2 --executions 12 --num-parallel 4 --roots 2 --execution-steps 20 --hidden 6"
TINY += (
    " --checkpoint-every 2 --test-seeds 3 --no-compile --envs bandit swapping_bandit --baselines hill_climbing no_reward"
)


def command(run_dir, flags, launcher=None, tiny=TINY):
    return run_script("fme.py", run_dir, f"{tiny} {flags}", launcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which other tests only read."""
    run_dir = tmp_path_factory.mktemp("runs")
    done = command(run_dir, "--run-name done", launcher=PROCESS)
    assert done.returncode == 0, done.stderr
    return run_dir / "done", done


def test_what_a_run_leaves_behind(finished):
    folder, done = finished
    names = {path.name for path in folder.iterdir()}
    figures = {"self_modifications.png", "adaptation.png", "improvement.png"}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "results.json"} | figures <= names
    assert any(name.startswith("events.out.tfevents") for name in names) and not any("partial" in name for name in names)
    results = json.loads((folder / "results.json").read_text())
    assert results["script"] == "fme" and results["preset"] == "laptop"
    keys = {"learner", "task", "novelty", "metric", "step", "mean", "std", "seeds"}
    assert all(set(row) == keys and row["seeds"] in (1, 2) for row in results["results"])
    last = {(row["task"], row["learner"]) for row in results["results"] if row["step"] == 12}
    learners = {"fme", "fme_frozen", "hill_climbing"}
    learners |= {"no_reward", "no_reward_frozen"}
    assert last == {(task, one) for task in ("bandit", "swapping_bandit") for one in learners}
    metrics = {"reward_per_step": {4, 8, 12}, "child_minus_parent": {1, 2}, "child_better": {1, 2}}
    for metric, steps in metrics.items():
        assert {row["step"] for row in results["results"] if row["metric"] == metric} == steps
    others = {f"{task} {one}" for task in ("bandit", "swapping_bandit") for one in learners if one != "fme"}
    assert set(results["differences"]["achieved"]) == others
    assert all(facts["low"] <= facts["high"] for facts in results["differences"]["until_solved"].values())
    assert set(results["after_swap"]) == learners
    with open(folder / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 * 3 and [float(line["job"]) for line in lines] == [job for job in range(6) for _ in range(3)]
    assert "swapping_bandit" in done.stdout and "medians over populations" in done.stdout


def test_an_agent_from_python(finished, tmp_path):
    """It does what an execution does, and its weights change; those of hill climbing do not."""
    path = finished[0] / "checkpoint.pt"
    agent = fme.FME.load(path, env="swapping_bandit", seed=3)
    draws = torch.rand(20, 1, 1, generator=torch.Generator().manual_seed(3))
    first = fme.unpack(agent.phi[None], fme.sizes(agent.args, agent.env))
    layers, reward, action = first, torch.zeros(1), torch.full((1,), -1)
    for t in range(20):
        action, layers = fme.act(agent.args, agent.env, False, layers, torch.zeros(1, 0), reward, action, draws[t])
        assert agent.act(torch.zeros(0), reward[0]) == int(action)
        reward = torch.tensor([float(t % 2)])
    for ours, theirs, start in zip(agent.layers, layers, first, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, start)
    agent.reset()
    assert agent.layers is None and agent.act(torch.zeros(3, 0), torch.ones(3)).shape == (3,)

    fixed = fme.FME.load(path, env="bandit", learner="hill_climbing")
    for _ in range(5):
        fixed.act([], 1.0)
    first = fme.unpack(fixed.phi[None], fme.sizes(fixed.args, fixed.env))
    assert all(torch.equal(one, other) for one, other in zip(fixed.layers, first, strict=True))

    for wrong in ((torch.zeros(2), 0.0), (torch.zeros(0), [1.0, 2.0]), (torch.zeros(0), math.nan), (torch.zeros(2, 0), 0.0)):
        with pytest.raises(ValueError, match="have to be"):
            fixed.act(*wrong)
    saved = checkpoints.read(path)
    saved["args"]["inputs"] = ("obs",)
    checkpoints.write(tmp_path / "other.pt", saved)
    with pytest.raises(fme.UserError, match="has no solution of"):
        fme.FME.load(tmp_path / "other.pt", env="bandit")
    for flags in (dict(env="cartpole"), dict(env="bandit", learner="random")):
        with pytest.raises(fme.UserError, match="has no solution of"):
            fme.FME.load(path, **flags)


def test_the_shipped_network_plays_gymnasiums_cartpole():
    """For as many steps as it was selected for: ten copies at once, then one in an episode. Random actions take 22 steps an
    episode; on the executions that it was chosen by, it took 500. What is given as the reward changes nothing."""
    import gymnasium

    env, agent = gymnasium.make_vec("CartPole-v1", 10), fme.FME.load("pretrained", seed=7)
    assert agent.args.execution_steps == 1000
    obs, _ = env.reset(seed=7)
    reward, ended = torch.zeros(10), 0
    for _ in range(1000):
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs, reward).numpy())
        ended += int((terminated | truncated).sum())
    assert 10 * 1000 / (ended + 10) > 300

    agent.reset()
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=8)
    action, steps, done = agent.act(obs), 0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(action)
        steps, done = steps + 1, terminated or truncated
        action = agent.act(obs, reward, done)
        assert action in (0, 1)
    assert steps > 100

    first, other = (fme.FME.load("pretrained", seed=9) for _ in range(2))
    assert [first.act(obs) for _ in range(50)] == [other.act(obs, 1.0) for _ in range(50)]


def test_the_shipped_file_can_be_tested_and_is_what_export_leaves(finished, tmp_path):
    """An exported checkpoint is tested like the one that it was made of."""
    path = checkpoints.named("pretrained", "fme")
    assert path.stat().st_size < 100_000
    flags = "--mode test --checkpoint pretrained --no-compile --test-seeds 2 --run-name shipped"
    tested = command(tmp_path, flags, tiny="")
    assert tested.returncode == 0, tested.stderr
    last = {row["learner"]: row["mean"] for row in rows(tmp_path / "shipped") if row["metric"] == "return"}
    assert last["fme"] > 300 and set(last) == {"fme", "fme_frozen"}

    small = tmp_path / "small.pt"
    checkpoints.export(finished[0] / "checkpoint.pt", small, run_dir="runs", run_name=None)
    assert checkpoints.read(small)["args"]["run_dir"] == "runs"
    tested = command(tmp_path, f"--mode test --checkpoint {small} --run-name small", tiny="")
    assert tested.returncode == 0, tested.stderr
    assert rows(tmp_path / "small") == rows(finished[0])


def test_the_seed_decides(finished, tmp_path):
    assert command(tmp_path, "--run-name again").returncode == 0
    assert rows(tmp_path / "again") == rows(finished[0])
    assert command(tmp_path, "--run-name other --seed 1").returncode == 0
    assert rows(tmp_path / "other") != rows(finished[0])


@pytest.mark.parametrize(
    "every, file, nth", [(2, "checkpoint.pt", 2), (7, "checkpoint.pt", 2), (7, "meta_test.pt", 5)]
)
def test_kill_and_resume_end_in_the_same_numbers(every, file, nth, finished, tmp_path):
    """In the first job, in the third, and in the meta-test; the whole buffer is restored."""
    cut = command(tmp_path, f"--checkpoint-every {every} --run-name killed", launcher=killed(file, nth))
    assert cut.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / file).exists() and not (tmp_path / "killed" / "results.json").exists()
    resumed = command(tmp_path, f"--resume {tmp_path / 'killed'}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "killed") == rows(finished[0])
    with open(tmp_path / "killed" / "metrics.csv") as mine, open(finished[0] / "metrics.csv") as theirs:
        mine, theirs = (
            [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)] for file in (mine, theirs)
        )
    assert mine == theirs


def test_a_checkpoint_tested_again_gives_the_same_numbers(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'} --run-name test"
    tested = command(tmp_path, flags, tiny="")
    assert tested.returncode == 0, tested.stderr
    assert rows(tmp_path / "test") == rows(finished[0])


def test_two_processes_equal_one(finished, tmp_path):
    two = command(tmp_path, "--run-name two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr
    for one, other in zip(rows(finished[0]), rows(tmp_path / "two"), strict=True):
        assert one | {"mean": 0, "std": 0} == other | {"mean": 0, "std": 0}
        assert one["mean"] == pytest.approx(other["mean"], abs=1e-5)


def test_the_thesis_way_and_every_switch(tmp_path):
    """One after the other from one root; networks without the reward alone; then all that can be switched, at once."""
    done = command(tmp_path, "--num-parallel 1 --roots 1 --executions 4 --envs bandit --baselines --run-name sequential")
    assert done.returncode == 0, done.stderr
    assert {row["step"] for row in rows(tmp_path / "sequential")} == {1, 2, 3, 4}
    done = command(tmp_path, "--learner no_reward --baselines --executions 4 --envs bandit --run-name no_reward")
    assert done.returncode == 0, done.stderr
    flags = "--selection 1e6 --inputs action obs --lifetime execution --fitness steps --layers 2 --buckets 5 --bucket-size 2"
    flags += " --baselines fme hill_climbing_matched random_search"
    done = command(tmp_path, f"{flags} --learner hill_climbing --envs cartpole --run-name all")
    assert done.returncode == 0, done.stderr
    assert {row["metric"] for row in rows(tmp_path / "all")} == {"return", "child_minus_parent", "child_better"}


REFUSED = {
    "--graphs --device cpu": "--graphs needs a GPU",
    "--envs pendulum": "cannot have the continuous actions of pendulum; choose from bandit, cartpole, swapping_bandit",
    "--envs acrobot": "has no setting for acrobot; choose from bandit",
    "--envs cartpol": "There is no environment cartpol; there are bandit",
    "--envs": "--envs needs at least one environment",
    "--inputs obs": "no_reward is FME without the reward among its --inputs, where it is missing",
    "--baselines hill_climbing_matched fme --learner no_reward": "name fme before it",
    "--inputs reward reward": "--inputs names something twice",
    "--num-parallel 5": "--num-parallel 5 has to be a multiple of --roots 2",
    "--executions 0": "--executions has to be from 1 to",
    "--sigma nan": "--sigma has to be from",
    "--selection -20": "--selection has to be from 0 to",
    "--mode test --checkpoint {done}/checkpoint.pt --hidden 7": "leave out --hidden",
    "--mode test --checkpoint {done}/checkpoint.pt --populations 3": "leave out --populations",
    "--mode test --checkpoint {done}/checkpoint.pt --executions 24": "leave out --executions",
    "--mode test --checkpoint {done}/checkpoint.pt --envs cartpole": "has no solutions for cartpole fme",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_mistake_gets_one_sentence_and_nothing_is_written(flags, finished, complain, tmp_path):
    tiny = "" if "--mode test" in flags else TINY
    message = complain("fme", f"{tiny} {flags}".format(done=finished[0]))
    assert re.search(REFUSED[flags], message), message
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_the_results_that_its_flags_ask_for(finished, complain, tmp_path):
    """Of another type or size, or of a step before which they are missing."""
    saved = checkpoints.read(finished[0] / "checkpoint.pt")
    results = saved["state"]["['evolution']"]["results"]
    result = results["bandit fme"]
    history = result["history"] | {"depth": result["history"]["depth"].float()}
    others = ({}, {"phi": result["phi"].double()}, {"curve": result["curve"][:, :1]}, {"pairs": 1.0}, {"history": history})
    for other in others:
        evolution = {"results": results | {"bandit fme": result | other if other else other}}
        checkpoints.write(tmp_path / "x.pt", saved | {"state": {"['evolution']": evolution}})
        assert "x.pt has no 'evolution'" in complain("fme", f"--mode test --checkpoint {tmp_path / 'x.pt'}")
    (tmp_path / "run").mkdir()
    for step, kept in ((1, results), (saved["step"], {"bandit fme": result})):
        state = {"['evolution']": {"results": kept}}
        checkpoints.write(tmp_path / "run" / "checkpoint.pt", saved | {"state": state, "step": step})
        assert "checkpoint.pt has no 'evolution'" in complain("fme", f"--resume {tmp_path / 'run'}")


# ---- what a release has to reach: python -m pytest -m slow -------------------------------------------------------------
@pytest.mark.slow
def test_the_laptop_preset_reaches_its_floors(tmp_path):
    """`python fme.py`: most of 16 populations solve the bandit, and most of 5 have a network that balances CartPole for twice
    as long as random actions, or with frozen weights for 100 steps. With its last action as an input a network follows the
    swaps; without the reward none does."""
    start = time.time()
    line = [sys.executable, str(ROOT / "fme.py"), "--run-dir", str(tmp_path), "--preset", "laptop", "--run-name"]
    subprocess.run([*line, "laptop"], check=True, cwd=tmp_path)
    assert time.time() - start < 300
    results = json.loads((tmp_path / "laptop" / "results.json").read_text())
    for job, floor, most in (("bandit fme", 0.95, 10), ("cartpole fme", 45, 3), ("cartpole fme_frozen", 100, 3)):
        assert sum(achieved >= floor for achieved in results["achieved"][job]) >= most, job
    assert all(abs(achieved - 0.5) < 0.02 for achieved in results["achieved"]["swapping_bandit no_reward"])
    assert results["differences"]["until_solved"]["bandit random_search"]["median"] <= 36

    flags = "--envs swapping_bandit --baselines --inputs obs reward action --executions 4000 --num-parallel 400 --roots 400"
    subprocess.run([*line, "action", *flags.split()], check=True, cwd=tmp_path)
    results = json.loads((tmp_path / "action" / "results.json").read_text())
    assert sum(achieved >= 0.85 for achieved in results["achieved"]["swapping_bandit fme"]) >= 3
    assert results["after_swap"]["fme"][4] > 0.8 > 0.2 > results["after_swap"]["fme"][0]  # the fifth pull, the first
