"""Environments: dynamics against gymnasium, what happens when an episode ends, and bandits whose
best reward is known."""

import math
import os
import re
import shutil

import conftest
import gymnasium
import numpy as np
import pytest
import test_gla
import test_metagenrl
import torch
from conftest import PYTHON, Forked, rows, run_script

from common import envs
from common.envs.wrappers import Recorded, Shuffled

DRAWS = torch.Generator().manual_seed(0)


class Recorder(gymnasium.Env):
    """Records its actions; its spaces and its reward are options."""

    def __init__(
        self,
        actions=gymnasium.spaces.Discrete(2),
        obs=gymnasium.spaces.Box(-1, 1, (2,)),
        reward=0.0,
    ):
        self.action_space = actions
        self.observation_space = obs
        self.reward = reward
        self.taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.taken.append(action)
        return self.observation_space.sample(), self.reward, False, False, {}


gymnasium.register("Recorder-v0", Recorder, disable_env_checker=True)


def recorded(sequence, **options):
    """What a Recorder receives for a sequence of actions (t, ...)."""
    env = envs.make("Recorder-v0", 1, **options)
    state, _ = env.reset(torch.zeros(1, 1))
    for action in sequence:
        state, _ = env.step(state, action[None], torch.zeros(1, 1))
    return env.envs.envs[0].unwrapped.taken


def draws(env, count):
    return torch.rand(count, env.num_draws, generator=DRAWS, dtype=torch.float64)


def balance(physics):
    """A controller that keeps CartPole's pole up for a while, so that rollouts get long."""
    return (physics[:, 2] + 0.2 * physics[:, 3] + 0.02 * physics[:, 0] > 0).long()


@pytest.mark.parametrize(
    "controller, failure_costs", [("random", False), ("random", True), ("balance", False)]
)
def test_cartpole_is_gymnasiums(controller, failure_costs):
    """States to 1e-9, rewards and ends exactly, over ten thousand steps and whatever episodes they
    make."""
    env = envs.make("cartpole", 16, dtype=torch.float64, sutton_barto_reward=failure_costs)
    theirs = [
        gymnasium.make("CartPole-v1", sutton_barto_reward=failure_costs).unwrapped for _ in range(16)
    ]
    state, obs = env.reset(draws(env, 16))
    ends = truncations = 0
    for other, first in zip(theirs, obs, strict=True):
        other.reset(seed=0)
        other.state = first.numpy().copy()
    for _ in range(625):
        action = (
            balance(obs) if controller == "balance" else torch.randint(2, (16,), generator=DRAWS)
        )
        state, step = env.step(state, action, draws(env, 16))
        made = [other.step(one) for other, one in zip(theirs, action.tolist(), strict=True)]
        np.testing.assert_allclose(step.final_obs, np.array([one.state for one in theirs]), atol=1e-9)
        assert step.reward.tolist() == [one[1] for one in made]
        assert step.terminated.tolist() == [one[2] for one in made]
        for index in (step.terminated | step.truncated).nonzero()[:, 0].tolist():
            ends, truncations = ends + 1, truncations + int(step.truncated[index])
            theirs[index].reset(seed=0)
            theirs[index].state = step.obs[index].numpy().copy()
        obs = step.obs
    assert ends > 10 and (truncations > 0) == (controller == "balance")


def test_pendulum_is_gymnasiums():
    env = envs.make("pendulum", 3, dtype=torch.float64)
    theirs = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(3)]
    state, _ = env.reset(draws(env, 3))
    for index, other in enumerate(theirs):
        other.reset(seed=0)
        other.state = np.array([state["angle"][index], state["speed"][index]])
    for _ in range(199):
        action = (
            2.4 * torch.rand(3, 1, generator=DRAWS, dtype=torch.float64) - 1.2
        )  # too large ones are cut
        state, step = env.step(state, action, draws(env, 3))
        for index, other in enumerate(theirs):
            obs, reward, terminated, _, _ = other.step(2 * action[index].numpy())
            np.testing.assert_allclose(step.obs[index], obs, atol=1e-5)
            assert reward == pytest.approx(float(step.reward[index]), abs=1e-9) and not terminated
        assert not step.truncated.any()
    _, step = env.step(state, action, draws(env, 3))
    assert step.truncated.all() and not step.terminated.any()


@pytest.mark.parametrize(
    "name, theirs, steps",
    [("mountain_car", "MountainCar-v0", 750), ("acrobot", "Acrobot-v1", 500)],
)
def test_mountain_car_and_acrobot_are_gymnasiums(name, theirs, steps):
    """States, rewards and ends, under a policy that reaches the goals: push the way it moves, with
    the second link."""
    env = envs.make(name, 16, dtype=torch.float64)
    others = [gymnasium.make(theirs).unwrapped for _ in range(16)]
    state, obs = env.reset(draws(env, 16))
    for other, first in zip(others, state["physics"], strict=True):
        other.reset(seed=0)
        other.state = first.numpy().copy()
    ends = 0
    for number in range(steps):
        action = (obs[:, -1] > 0).long() * 2
        action = torch.randint(3, (16,), generator=DRAWS) if number % 5 == 0 else action
        state, step = env.step(state, action, draws(env, 16))
        made = [other.step(one) for other, one in zip(others, action.tolist(), strict=True)]
        np.testing.assert_allclose(step.final_obs, np.array([one[0] for one in made]), atol=1e-5)
        assert step.reward.tolist() == [one[1] for one in made]
        assert step.terminated.tolist() == [one[2] for one in made]
        ends += int(step.terminated.sum())
        for index in (step.terminated | step.truncated).nonzero()[:, 0].tolist():
            others[index].reset(seed=0)
        for other, physics in zip(others, state["physics"], strict=True):
            other.state = physics.numpy().copy()  # theirs rounds in other places; Acrobot is chaotic
        obs = step.obs
    assert ends > 10


def test_mountain_car_with_a_free_goal():
    env = envs.make("mountain_car", 2, free_goal=True)
    state, _ = env.reset(draws(env, 2))
    state["physics"] = torch.tensor([[0.49, 0.05], [-0.5, 0.0]])
    _, step = env.step(state, torch.tensor([2, 2]), draws(env, 2))
    assert step.reward.tolist() == [0, -1] and step.terminated.tolist() == [True, False]


def test_the_reward_of_upright_cartpole():
    env = envs.make("upright_cartpole", 3)
    state, _ = env.reset(draws(env, 3))
    state["physics"] = torch.tensor([[0.0, 0, 0, 0], [1.2, 0, 0, 0], [0, 0, env.max_angle / 2, 0]])
    _, step = env.step(state, torch.tensor([1, 1, 1]), draws(env, 3))
    torch.testing.assert_close(
        step.reward, torch.tensor([1, 0.5, 0.5])
    )  # positions change with the next step only


BANDITS = {
    "dependent_bandit": (0, 1),
    "easy_bandit": (0.1, 0.9),
    "medium_bandit": (0.25, 0.75),
    "hard_bandit": (0.4, 0.6),
}


@pytest.mark.parametrize("name", BANDITS)
def test_bandits_of_appendix_c_1(name):
    env = envs.make(name, 4000)
    state, _ = env.reset(draws(env, 4000).float())
    chances = env.expected_rewards(state)
    torch.testing.assert_close(chances.sum(1), torch.ones(4000))
    low, high = BANDITS[name]
    if name == "dependent_bandit":
        assert chances.min() < 0.01 and abs(chances[:, 0].mean() - 0.5) < 0.03
    else:
        torch.testing.assert_close(
            chances.sort(1).values, torch.tensor([[low, high]]).repeat(4000, 1)
        )
    mean = torch.zeros(4000)
    for _ in range(50):
        state, step = env.step(state, torch.ones(4000, dtype=torch.int64), draws(env, 4000))
        mean += step.reward / 50
    assert torch.equal(env.expected_rewards(state), chances)  # for the whole lifetime
    assert abs((mean - chances[:, 1]).mean()) < 0.01 and (mean - chances[:, 1]).abs().max() < 0.35


def test_independent_arms():
    env = envs.make("independent_bandit:7", 5000)
    state, obs = env.reset(draws(env, 5000))
    assert env.num_actions == 7 and obs.shape == (5000, 0)
    chances = env.expected_rewards(state)
    assert (torch.corrcoef(chances.T) - torch.eye(7)).abs().max() < 0.05
    assert (chances.mean(0) - 0.5).abs().max() < 0.02


def test_arrangements_of_a_grid_world_are_uniform():
    env = envs.make("grid_world:3", 90_000)
    state, obs = env.reset(draws(env, 90_000))
    agent, heart, trap = state["cells"].unbind(1)
    assert not ((agent == heart) | (agent == trap) | (heart == trap)).any()
    arrangements = (agent * 81 + heart * 9 + trap).bincount(minlength=729)
    assert (arrangements > 0).sum() == 9 * 8 * 7
    chi2 = ((arrangements[arrangements > 0] - 90_000 / 504) ** 2 / (90_000 / 504)).sum()
    assert chi2 < 503 + 5 * (2 * 503) ** 0.5  # five standard deviations
    assert torch.equal(obs.view(-1, 3, 9).argmax(2), state["cells"]) and (obs.sum(1) == 3).all()


def test_grid_worlds_by_hand():
    for name, sign in (("grid_world:3", 1), ("swapped_grid_world:3", -1)):
        env = envs.make(name, 4)
        state, _ = env.reset(draws(env, 4))
        state["cells"] = torch.tensor(
            [[4, 1, 0], [4, 0, 3], [4, 0, 1], [6, 0, 1]]
        )  # agent, heart, trap
        moved, step = env.step(
            state, torch.tensor([0, 2, 3, 1]), draws(env, 4)
        )  # up, left, right, down into the wall
        assert step.reward.tolist() == [sign, -sign, 0, 0] and step.terminated.tolist() == [
            True,
            True,
            False,
            False,
        ]
        assert (
            moved["cells"][2:, 0].tolist() == [5, 6]
            and (moved["steps"] == torch.tensor([0, 0, 1, 1])).all()
        )
    env = envs.make("dense_grid_world:3", 4)
    state, obs = env.reset(draws(env, 4))
    assert obs.shape == (4, 27)
    state["cells"] = torch.tensor(
        [[4, 2, 8], [4, 2, 1], [1, 2, 8], [0, 8, 3]]
    )  # agent, target, obstacle
    moved, step = env.step(
        state, torch.tensor([0, 0, 3, 2]), draws(env, 4)
    )  # nearer; an obstacle; the target; a wall
    assert step.reward.tolist() == [1, 0, 1, 0] and step.terminated.tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert moved["cells"][:2, 0].tolist() == [1, 4]
    _, step = env.step(moved, torch.tensor([1, 1, 0, 0]), draws(env, 4))
    assert step.reward[0] == -1  # back again
    env = envs.make("grid_world:2", 1)
    state, _ = env.reset(draws(env, 1))
    state["cells"] = torch.tensor([[0, 3, 2]])
    for number in range(10):
        state, step = env.step(state, torch.tensor([0]), draws(env, 1))
        assert step.truncated.item() == (number == 9)


@pytest.mark.parametrize("name", ["cartpole", "grid_world:3", "independent_bandit:4"])
def test_shuffled_environments(name):
    shuffled = (
        envs.make(f"shuffled_{name}", 6) if "bandit" not in name else Shuffled(envs.make(name, 6))
    )
    plain = envs.make(name, 6) if "bandit" in name else envs.make(f"scaled_{name}", 6)
    of_lifetime = torch.rand(6, shuffled.lifetime_draws, generator=DRAWS, dtype=torch.float64)
    state, obs = shuffled.reset(of_lifetime)
    other, theirs = plain.reset(of_lifetime[:, : plain.num_draws])
    assert shuffled.lifetime_draws == plain.num_draws + plain.obs_size + plain.num_actions
    ends = 0
    for _ in range(60):
        torch.testing.assert_close(obs, theirs.gather(1, state["obs_order"]), rtol=0, atol=0)
        if (rewards := plain.expected_rewards(other)) is not None:
            assert torch.equal(
                shuffled.expected_rewards(state), rewards.gather(1, state["action_order"])
            )
        action, fresh = torch.randint(plain.num_actions, (6,), generator=DRAWS), draws(plain, 6)
        order = state["action_order"]
        state, step = shuffled.step(state, action, fresh)
        other, same = plain.step(other, order.gather(1, action[:, None])[:, 0], fresh)
        assert torch.equal(step.reward, same.reward) and torch.equal(
            step.terminated, same.terminated
        )
        assert torch.equal(order, state["action_order"])  # for the whole lifetime
        obs, theirs, ends = step.obs, same.obs, ends + int(step.terminated.sum())
    assert ends or "bandit" in name
    assert len({tuple(row.tolist()) for row in state["action_order"]}) > 1


def test_scaled_observations_have_magnitude_one():
    env, raw = envs.make("scaled_cartpole", 50), envs.make("cartpole", 50)
    of_lifetime = draws(env, 50)
    (state, obs), (_, theirs) = env.reset(of_lifetime), raw.reset(of_lifetime)
    assert env.lifetime_draws == raw.num_draws
    torch.testing.assert_close(obs * torch.tensor(raw.obs_scale), theirs)
    for _ in range(100):
        state, step = env.step(state, torch.randint(2, (50,), generator=DRAWS), draws(env, 50))
        assert step.final_obs[:, [0, 2]].abs().max() < 1.5  # the last step goes beyond the bounds of 1


def test_projected_environments():
    env = envs.make("projected_cartpole", 500)
    state, obs = env.reset(torch.rand(500, env.lifetime_draws, generator=DRAWS))
    assert obs.shape == (500, 16) and env.num_draws == 4
    weight = state["projection"]
    assert (
        weight.std().item() == pytest.approx((2 / 20) ** 0.5, rel=0.02)
        and abs(weight.mean()) < 0.005
    )
    moved, step = env.step(state, torch.zeros(500, dtype=torch.int64), draws(env, 500))
    projected = torch.einsum(
        "pa,pab->pb", moved["physics"] / torch.tensor(env.env.obs_scale), weight
    )
    torch.testing.assert_close(step.obs, projected)
    assert torch.equal(moved["projection"], weight)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("cartpol", "There is no environment cartpol; there are bandit"),
        ("cartpole:3", "cartpole has no size; leave out :3"),
        ("grid_world:x", "The size in grid_world:x has to be a number from 2 to"),
        ("independent_bandit:1", "has to be a number from 2 to"),
        ("independent_bandit:1000000000", "has to be a number from 2 to 1000"),
        ("shuffled_bandit", "There is nothing to be shuffled in bandit"),
        ("shuffled_pendulum", "Only discrete actions can be shuffled"),
        ("projected_cartpol", "There is no environment cartpol"),
        ("cartpol:3", "There is no environment cartpol:3; .* and those of gymnasium, such as"),
        ("highway-v0", "gymnasium cannot make highway-v0: .* is named package.module:Name-v0"),
        ("myspace/MyEnv-v0", "gymnasium cannot make myspace/MyEnv-v0: Namespace myspace not found"),
        (
            "nowhere:MyEnv-v0",
            "The module of nowhere:MyEnv-v0 cannot be imported: No module named 'nowhere'",
        ),
        ("HalfCheetah-v2", "gymnasium cannot make HalfCheetah-v2: "),
        (":MyEnv-v0", "The module of :MyEnv-v0 cannot be imported"),
    ],
)
def test_a_name_that_does_not_exist_raises_one_sentence(name, sentence):
    with pytest.raises(envs.EnvError, match=sentence):
        envs.make(name, 1)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no compiler")
@pytest.mark.parametrize("name", ["cartpole", "acrobot", "pendulum"])
def test_a_compiled_step_is_the_eager_one(name):
    eager = envs.make(name, 16, scaled=True)
    compiled = envs.make(name, 16, scaled=True, compile=True)
    state, _ = eager.reset(torch.rand(16, eager.lifetime_draws, generator=DRAWS))
    for _ in range(50):
        action = torch.randint(eager.num_actions or 1, (16,), generator=DRAWS)
        if eager.num_actions is None:
            action = 2 * torch.rand(16, eager.action_size, generator=DRAWS) - 1
        noise = torch.rand(16, eager.num_draws, generator=DRAWS)
        other = compiled.step(state, action, noise)
        state, step = eager.step(state, action, noise)
        torch.testing.assert_close(other, (state, step), rtol=1e-6, atol=1e-6)


def test_compile_leaves_environments_alone_that_are_not_made_of_tensor_operations():
    for name in ("Pendulum-v1", "scaled_dm_cartpole"):
        assert "step" not in vars(envs.make(name, 1, compile=True))


def test_auto_reset():
    env = envs.make("cartpole", 2)
    state, obs = env.reset(draws(env, 2))
    assert obs.dtype == torch.float32 and obs.abs().max() <= 0.05
    ends = 0
    for _ in range(60):
        state, step = env.step(state, torch.ones(2, dtype=torch.int64), draws(env, 2))
        ended = step.terminated
        assert torch.equal(step.obs[~ended], step.final_obs[~ended])
        assert (step.obs[ended].abs() <= 0.05).all() and (state["steps"][ended] == 0).all()
        beyond = (step.final_obs[:, 0].abs() > 2.4) | (
            step.final_obs[:, 2].abs() > 12 * np.pi / 180
        )
        assert torch.equal(beyond, ended) and (step.reward == 1).all()
        ends += int(ended.sum())
    assert ends >= 8


@pytest.mark.parametrize("name", ["cartpole", "shuffled_cartpole", "CartPole-v1"])
def test_with_next_step_reset_an_episode_begins_with_the_step_after(name):
    """A step that ends an episode returns its last observation; the step after ignores its action,
    pays 0 and returns the first observation of the next."""
    env = envs.make(name, 4, next_step_reset=True)
    state, _ = env.reset(torch.rand(4, env.lifetime_draws, generator=DRAWS))
    before = torch.zeros(4, dtype=torch.bool)
    ends = 0
    for _ in range(60):
        state, step = env.step(state, torch.ones(4, dtype=torch.int64), draws(env, 4))
        ended = step.terminated
        largest = step.obs.abs().amax(-1)
        assert torch.equal(step.obs, step.final_obs)
        assert (largest[ended] > 0.3).all() and (largest[before] < 0.3).all()
        assert torch.equal(step.reward, 1 - before.float())
        assert not (ended & before).any()
        before = ended
        ends += int(ended.sum())
    assert ends >= 8


@pytest.mark.parametrize("next_step_reset", [False, True])
def test_a_repeated_action_is_as_many_steps_of_one_episode(next_step_reset):
    """Rewards add up to four times that of the four, the end of an episode and its first observation are not skipped."""
    env = envs.make("cartpole", 6, next_step_reset=next_step_reset, repeat=4)
    once = envs.make("cartpole", 6, next_step_reset=next_step_reset)
    state, _ = env.reset(draws(env, 6))
    lengths = set()
    for _ in range(40):
        action, fresh = torch.randint(2, (6,), generator=DRAWS), draws(env, 6)
        begins = state.get("ended", torch.zeros(6, dtype=torch.bool)).clone()
        after, step = env.step(state, action, fresh)
        for p in range(6):
            one, total = {name: value[p : p + 1] for name, value in state.items()}, 0
            for count in range(1, 5):
                one, single = once.step(one, action[p : p + 1], fresh[p : p + 1])
                total += single.reward.item()
                if single.terminated or begins[p]:
                    break
            lengths.add(count)
            assert step.reward[p] == total / 4 and step.terminated[p] == single.terminated
            assert torch.equal(step.obs[p], single.obs[0])
            assert torch.equal(step.final_obs[p], single.final_obs[0])
            assert all(torch.equal(after[name][p], one[name][0]) for name in after)
        state = after
    assert lengths == {1, 2, 3, 4}


def test_balance_cartpole_is_cartpole_that_nothing_ends():
    """Until the pole is beyond 12 degrees its physics are CartPole's; then it falls, and hangs."""
    env, plain = envs.make("balance_cartpole", 32), envs.make("cartpole", 32)
    of_lifetime = draws(env, 32)
    state, obs = env.reset(of_lifetime)
    other, _ = plain.reset(of_lifetime)
    inside = torch.ones(32, dtype=torch.bool)
    for number in range(300):
        action = torch.randint(2, (32,), generator=DRAWS)
        state, step = env.step(state, action, of_lifetime)
        other, theirs = plain.step(other, action, of_lifetime)
        inside &= ~theirs.terminated
        torch.testing.assert_close(step.obs[inside, :2], theirs.obs[inside, :2])
        torch.testing.assert_close(step.obs[inside, 3], theirs.obs[inside, 2].sin())
        assert not (step.terminated | step.truncated).any()
        assert inside.any() or number > 5
    assert (step.obs[:, 2] < -0.5).any() and (step.obs[:, 0].abs() <= 2.4).all()
    expected = (1 + step.obs[:, 2]) / 2 * (1 - step.obs[:, 0].abs() / 4.8)
    torch.testing.assert_close(step.reward, expected)


def test_the_time_limit_of_cartpole_truncates():
    env = envs.make("cartpole", 64)
    state, obs = env.reset(draws(env, 64))
    truncated = []
    for number in range(500):
        state, step = env.step(state, balance(obs), draws(env, 64))
        obs = step.obs
        assert not (step.truncated & step.terminated).any() and (
            number == 499 or not step.truncated.any()
        )
        truncated.append(step.truncated)
    assert truncated[-1].any() and (state["steps"][truncated[-1]] == 0).all()


def test_continuous_mountain_car_is_gymnasiums():
    env = envs.make("continuous_mountain_car", 16, dtype=torch.float64)
    theirs = [gymnasium.make("MountainCarContinuous-v0").unwrapped for _ in range(16)]
    state, obs = env.reset(draws(env, 16))
    for other, first in zip(theirs, obs, strict=True):
        other.reset(seed=0)
        other.state = first.numpy().copy()
    ends = 0
    for _ in range(375):
        push = 1.3 * torch.sign(obs[:, 1:]) + 0.4 * torch.randn(
            16, 1, generator=DRAWS, dtype=torch.float64
        )
        state, step = env.step(state, push, draws(env, 16))
        made = [other.step(one) for other, one in zip(theirs, push.numpy(), strict=True)]
        single = np.array([one.state for one in theirs])  # theirs are of single precision
        np.testing.assert_allclose(step.final_obs, single, atol=1e-5)
        assert step.reward.tolist() == pytest.approx([one[1] for one in made], abs=1e-9)
        assert step.terminated.tolist() == [one[2] for one in made]
        for other, obs in zip(theirs, step.obs, strict=True):
            other.state = obs.numpy().copy()
        ends += int(step.terminated.sum())
        obs = step.obs
    assert ends > 10


def test_acrobot_swing_up_is_acrobot_that_nothing_ends():
    """Half of the largest torque is Acrobot's; the reward is the height of the tip."""
    env, theirs = envs.make("acrobot_swing_up", 16), envs.make("acrobot", 16)
    numbers = draws(env, 16)
    state, _ = env.reset(numbers)
    for number in range(100):
        action = torch.randint(3, (16,), generator=DRAWS)
        expected, _, _ = theirs.step_env(state, action, numbers)
        state, step = env.step(state, (action[:, None] - 1) / 2, numbers)
        cos1, sin1, cos2, sin2 = step.final_obs[:, :4].unbind(1)
        torch.testing.assert_close(step.reward, (2 - cos1 - (cos1 * cos2 - sin1 * sin2)) / 4)
        assert step.truncated.all() == (number == 99) and not step.terminated.any()
        if number < 99:
            torch.testing.assert_close(state["physics"], expected["physics"])
    hanging, upright = ({"physics": torch.tensor([[angle, 0, 0, 0]])} for angle in (0.0, math.pi))
    rewards = [env.step_env(physics, torch.zeros(1, 1), numbers)[1].item() for physics in (hanging, upright)]
    assert rewards == pytest.approx([0, 1], abs=1e-5)


def test_mountain_car_climb_pays_for_height():
    """The car moves as in continuous_mountain_car, and its goal ends nothing."""
    env, theirs = envs.make("mountain_car_climb", 16), envs.make("continuous_mountain_car", 16)
    numbers, highest = draws(env, 16), 0.0
    state, obs = env.reset(numbers)
    for number in range(200):
        action = obs[:, 1:].sign()  # the way it moves
        expected, _, _ = theirs.step_env(state, action, numbers)
        state, step = env.step(state, action, numbers)
        torch.testing.assert_close(step.reward, (1 + (3 * step.final_obs[:, 0]).sin()) / 2)
        assert step.truncated.all() == (number == 199) and not step.terminated.any()
        if number < 199:
            assert torch.equal(state["physics"], expected["physics"])
        highest, obs = max(highest, float(step.reward.min())), step.obs
    assert highest > 0.9  # from the valley all get on top


def test_continuous_cartpole_is_cartpole_at_full_force():
    ours, plain = (
        envs.make(name, 8, dtype=torch.float64) for name in ("continuous_cartpole", "cartpole")
    )
    first = draws(plain, 8)
    (one, _), (other, _) = ours.reset(first), plain.reset(first)
    for _ in range(300):
        action, noise = torch.randint(2, (8,), generator=DRAWS), draws(plain, 8)
        one, mine = ours.step(one, 5.0 * (2 * action[:, None] - 1), noise)
        other, theirs = plain.step(other, action, noise)
        torch.testing.assert_close(mine, theirs)
    still, _, _ = ours.step_env(
        {"physics": torch.zeros(1, 4, dtype=torch.float64)},
        torch.zeros(1, 1, dtype=torch.float64),
        None,
    )
    assert (still["physics"] == 0).all()


def test_cart_swing_up_is_cartpole_between_walls():
    env = envs.make("cart_swing_up", 6, dtype=torch.float64)
    plain = envs.make("cartpole", 6, dtype=torch.float64)
    plain.seconds = env.seconds
    state, _ = env.reset(draws(env, 6))
    walls = 0
    for number in range(100):
        action = torch.full((6, 1), 1.0 if number % 50 < 30 else -1.0, dtype=torch.float64)
        free, _, _ = plain.step_env(state, (action[:, 0] > 0).long(), None)
        x, velocity, angle, spin = free["physics"].unbind(-1)
        state, step = env.step(state, action, draws(env, 6))
        inside = x.abs() < 2.4
        walls += int((~inside).sum())
        torch.testing.assert_close(step.final_obs[inside, 1], velocity[inside])
        assert (step.final_obs[~inside, 1] == 0).all() and (step.final_obs[:, 0].abs() <= 2.4).all()
        torch.testing.assert_close(
            step.final_obs[:, 2:], torch.stack([angle.cos(), angle.sin(), spin], -1)
        )
        torch.testing.assert_close(
            step.reward, (1 + angle.cos()) / 2 - 0.1 * (x.abs() / 2.4).clamp(max=1)
        )
        assert step.truncated.all() == (number == 99) and not step.terminated.any()
    assert walls > 0


@pytest.mark.parametrize("name", ["point_mass", "reacher"])
def test_a_controller_reaches_the_target(name):
    """Reward is minus the distance that the next observation shows; a hand-made controller brings
    it close to zero."""
    env = envs.make(name, 32, dtype=torch.float64)
    state, obs = env.reset(draws(env, 32))
    first = None
    for _ in range(99):
        if name == "point_mass":
            action = 5 * obs[:, 4:] - 3 * obs[:, 2:4]
        else:  # the transposed Jacobian of the tip
            cos1, sin1, cos12, sin12 = (
                obs[:, 0],
                obs[:, 1],
                state["physics"][:, :2].sum(-1).cos(),
                state["physics"][:, :2].sum(-1).sin(),
            )
            dx, dy = obs[:, 6], obs[:, 7]
            both = -sin12 * dx + cos12 * dy
            action = 10 * torch.stack([-sin1 * dx + cos1 * dy + both, both], -1) - 0.3 * obs[:, 4:6]
        state, step = env.step(state, action, draws(env, 32))
        distance = step.final_obs[:, 4:6] if name == "point_mass" else step.final_obs[:, 6:8]
        torch.testing.assert_close(step.reward, -distance.norm(dim=-1))
        first, obs = step.reward if first is None else first, step.obs
    assert first.mean() < -0.5 and step.reward.mean() > -0.1


def test_a_time_limit_of_gymnasiums_truncates():
    gymnasium.register("Short-v0", Recorder, disable_env_checker=True, max_episode_steps=3)
    env = envs.make("Short-v0", 2)
    state, _ = env.reset(torch.zeros(2, 1))
    for number in range(6):
        state, step = env.step(state, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1))
        assert step.truncated.tolist() == [number in (2, 5)] * 2 and not step.terminated.any()
    gymnasium.registry.pop("Short-v0")


def test_gymnasiums_environments():
    """Observations, rescaled actions, rewards and ends as gymnasium gives them, and what the last
    step of an episode led to."""
    env = envs.make("LunarLanderContinuous", 2)
    assert (env.obs_size, env.action_size, env.num_actions, env.max_steps) == (8, 2, None, 1000)
    seeds = torch.tensor([[0.25], [0.5]])
    theirs = [gymnasium.make("LunarLanderContinuous-v3").unwrapped for _ in range(2)]
    first = [
        other.reset(seed=int(seed * 2**31))[0] for other, seed in zip(theirs, seeds, strict=True)
    ]
    state, obs = env.reset(seeds)
    np.testing.assert_array_equal(obs, np.stack(first))
    ended = [False, False]
    for _ in range(200):
        action = 2 * torch.rand(2, 2, generator=DRAWS) - 1
        state, step = env.step(state, action, seeds)
        for index, other in enumerate(theirs):
            if not ended[index]:
                last, reward, terminated, _, _ = other.step(action[index].numpy())
                np.testing.assert_array_equal(step.final_obs[index], last)
                assert (
                    step.reward[index] == pytest.approx(reward, rel=1e-5)
                    and step.terminated[index] == terminated
                )
                assert torch.equal(step.obs[index], step.final_obs[index]) != terminated
                ended[index] = terminated
    assert all(ended)
    discrete = envs.make("CartPole-v1", 1)
    assert (discrete.num_actions, discrete.action_size) == (2, 0)
    with pytest.raises(envs.EnvError, match="gymnasium cannot make Hoper-v4"):
        envs.make("Hoper-v4", 1)


def test_discrete_actions_of_gymnasium_start_where_their_space_does():
    space = gymnasium.spaces.Discrete(3, start=5)
    taken = recorded(torch.tensor([0, 2, 1]), actions=space)
    assert taken == [5, 7, 6] and all(map(space.contains, taken))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "float32", "float64"])
def test_actions_of_gymnasium_are_rescaled_to_their_box(dtype):
    space = gymnasium.spaces.Box(np.array([0, 2], dtype), np.array([10, 6], dtype), dtype=dtype)
    taken = recorded(torch.tensor([[-1, 1], [1.0, -1], [0.03, 0.5], [9, -9]]), actions=space)
    assert all(map(space.contains, taken))
    middle = [5, 5] if "int" in dtype else [5.15, 5]
    np.testing.assert_allclose(taken, [[0, 6], [10, 2], middle, [10, 2]], rtol=1e-6)


WHOLE = np.iinfo(np.int64)
UNBOUNDED = [gymnasium.spaces.Box(-bound, bound, (1,)) for bound in (np.inf, 3.4e38, np.finfo(np.float32).max)]
UNBOUNDED += [gymnasium.spaces.Box(WHOLE.min, WHOLE.max, (1,), np.int64), gymnasium.spaces.Box(-1, 1, (0,))]


@pytest.mark.parametrize("space", UNBOUNDED)
def test_actions_without_bounds_or_dimensions_are_refused(space):
    with pytest.raises(envs.EnvError, match="neither one choice nor a bounded vector"):
        envs.make("Recorder-v0", 1, actions=space)


def test_no_observations_are_refused():
    with pytest.raises(envs.EnvError, match="Recorder-v0 has no observations"):
        envs.make("Recorder-v0", 1, obs=gymnasium.spaces.Box(-1, 1, (0,)))


def test_images_are_refused():
    image = gymnasium.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    with pytest.raises(envs.EnvError, match="Observations of Recorder-v0 are images"):
        envs.make("Recorder-v0", 1, obs=image)


def test_a_reward_or_an_observation_that_is_not_finite_is_the_environments_fault():
    push, draw = torch.tensor([[0.5]]), torch.zeros(1, 1)
    bounded = gymnasium.spaces.Box(-1, 1, (1,))
    env = envs.make("Recorder-v0", 1, actions=bounded, reward=math.nan)
    state, _ = env.reset(draw)
    with pytest.raises(envs.EnvError, match="Recorder-v0 returned rewards that are not finite"):
        env.step(state, push, draw)
    env.step(state, push * math.nan, draw)  # the fault of a policy

    env = envs.make("Recorder-v0", 1, actions=bounded)
    state, _ = env.reset(draw)
    env.envs.envs[0].unwrapped.observation_space.sample = lambda: np.full(2, math.inf, np.float32)
    with pytest.raises(
        envs.EnvError, match="Recorder-v0 returned observations that are not finite"
    ):
        env.step(state, push, draw)
    with pytest.raises(
        envs.EnvError, match="Recorder-v0 returned observations that are not finite"
    ):
        env.reset(draw)


class Broken(gymnasium.Env):
    """Raises where `fault` says."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fault, error=KeyError):
        self.fault, self.error = fault, error
        self.fail("init")

    def fail(self, where):
        if where == self.fault:
            raise self.error("no\nlicence")

    def reset(self, *, seed=None, options=None):
        self.fail("reset")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.fail("step")
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def close(self):
        self.fail("close")


gymnasium.register("Broken-v0", Broken, disable_env_checker=True)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("error", [KeyError, SystemExit])
@pytest.mark.parametrize("fault", ["init", "reset", "step"])
def test_a_gymnasium_environment_that_raises_is_a_sentence(fault, error, parallel):
    """In a process of its own too, where the place is not known, and an exit ends the process."""
    with pytest.raises(envs.EnvError, match=r"^[^\n]*Broken-v0[^\n]*$") as raised:
        env = envs.make("Broken-v0", 1, parallel=parallel, fault=fault, error=error)
        state, _ = env.reset(torch.zeros(1, 1))
        env.step(state, torch.zeros(1, dtype=torch.int64), torch.zeros(1, env.num_draws))
    if fault != "init" and not parallel:
        assert re.search(r"in \S*test_envs.py, line \d+: \W*no.*licence", str(raised.value))
    if fault != "init" and parallel:
        assert "in a process of its own, whose traceback is above" in str(raised.value)


def test_an_environment_that_cannot_be_closed_does_no_harm():
    env = envs.make("Broken-v0", 1, fault="close")
    env.reset(torch.zeros(1, 1))
    env.close()


@pytest.mark.parametrize(
    "name, seen, kind",
    [
        ("pendulum", ["reacher", "pendulum"], "none"),
        ("scaled_pendulum", ["pendulum"], "none"),
        ("HalfCheetah-v4", ["half_cheetah"], "none"),
        ("half_cheetah:180", ["half_cheetah:0"], "task"),
        ("shuffled_CartPole-v1", ["CartPole-v1"], "task"),
        ("pendulum:Mine-v0", ["pendulum"], "domain"),
        ("reacher", ["pendulum", "point_mass"], "domain"),
    ],
)
def test_how_new_an_environment_is(name, seen, kind):
    assert envs.novelty(name, seen) == kind


def test_a_module_of_the_user_may_have_the_name_of_an_environment():
    with pytest.raises(envs.EnvError, match=r"The module of pendulum:Mine-v0 cannot be imported"):
        envs.make("pendulum:Mine-v0", 1)


def test_a_module_that_raises_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number, code in enumerate(["def (", "raise RuntimeError('no licence')", "exit()"]):
        (tmp_path / f"broken{number}.py").write_text(code)
        with pytest.raises(envs.EnvError, match=f"The module of broken{number}:X-v0 cannot be"):
            envs.make(f"broken{number}:X-v0", 1)


def test_gymnasium_has_as_many_copies_as_the_reset_has_draws():
    """Copies with the same draws are the same environment: what a population shares."""
    env = envs.make("shuffled_CartPole-v1", 2)
    two = torch.rand(2, env.lifetime_draws, generator=DRAWS)
    state, obs = env.reset(two.repeat(3, 1))
    for _ in range(60):
        assert obs.shape == (6, 4) and torch.equal(obs, obs[:2].repeat(3, 1))
        state, step = env.step(state, torch.arange(2).repeat(3), torch.zeros(6, env.num_draws))
        obs = step.obs


PACKAGE = """
import gymnasium, numpy

class MyEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(numpy.float32), {}

    def step(self, action):
        return self.reset()[0], float(action[0]), False, False, {}

for name in ("MyEnv-v0", "MyEnv-v1", "myspace/my-env-v0"):
    gymnasium.register(name, "mypackage.tasks:MyEnv", max_episode_steps=5)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user on PYTHONPATH, whose module `tasks` registers environments."""
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").touch()
    (tmp_path / "mypackage" / "tasks.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(conftest.ENV, "PYTHONPATH", os.pathsep.join([str(conftest.ROOT), str(tmp_path)]))


FEW = {  # environments, each of which is a process
    test_metagenrl: "--num-envs 1 --exploration-noise 0.1 --env-steps 24 --test-steps 24 --baselines",
    test_gla: "--test-seeds 2 --baselines uniform",
}


@pytest.mark.parametrize("tests", FEW, ids=lambda tests: tests.__name__[5:])
def test_a_users_environment_on_the_command_line(package, tests, tmp_path):
    """By its name, without a version, and in a namespace and lower case."""
    names = [f"mypackage.tasks:{name}" for name in ("MyEnv-v0", "MyEnv", "myspace/my-env-v0")]
    flags = f"{tests.TINY} {FEW[tests]} --run-name mine --envs {names[0]} {names[1]} --test-envs {names[2]}"
    done = run_script(f"{tests.__name__[5:]}.py", tmp_path, flags, Forked() if tests is test_metagenrl else PYTHON)
    assert done.returncode == 0, done.stderr
    assert {row["task"] for row in rows(tmp_path / "mine")} >= {*names}


def test_hidden_goal():
    env = envs.make("hidden_goal:5", 2000)
    state, obs = env.reset(draws(env, 2000))
    assert (obs.sum(-1) == 1).all() and (obs.sum(0) > 180).tolist() == [True] * 5 + [False] + [
        True
    ] * 3
    towards = torch.tensor([1, 1, 1, 3, 3, 0, 0, 0, 0])  # down, to the right, up
    towards[[2, 8]] = torch.tensor([1, 0])
    rewards = []
    for _ in range(60):
        before = obs.argmax(-1)
        state, step = env.step(state, towards[before], draws(env, 2000))
        assert torch.equal(step.final_obs.argmax(-1) == 5, step.terminated) and torch.equal(
            step.reward, step.terminated.float()
        )
        assert not (step.obs.argmax(-1) == 5).any()
        rewards.append(step.reward.mean())
        obs = step.obs
    distances = [abs(cell // 3 - 1) + abs(cell % 3 - 2) for cell in range(9) if cell != 5]
    assert torch.stack(rewards[20:]).mean().item() == pytest.approx(8 / sum(distances), abs=0.01)
    with pytest.raises(envs.EnvError, match="not one of nine cells"):
        envs.make("hidden_goal:9", 1)


def test_half_cheetah_in_two_directions():
    """The speed counts with its direction, the cost of the action does not."""
    there, back, plain = (envs.make(name, 2) for name in ("half_cheetah:0", "half_cheetah:180", "half_cheetah"))
    state, _ = there.reset(draws(there, 2))
    action = torch.rand(2, 6, generator=DRAWS)
    rewards = [env.step(state, action, draws(env, 2))[1].reward for env in (there, back, plain)]
    torch.testing.assert_close(rewards[0] + rewards[1], -0.2 * (action**2).sum(-1))
    assert torch.equal(rewards[0], rewards[2]) and not torch.equal(rewards[0], rewards[1])


CHEETAHS = [("half_cheetah", "HalfCheetah-v4"), *((name, name) for name in ("HalfCheetah-v4", "HalfCheetah-v5"))]


@pytest.mark.parametrize("name, theirs", [*CHEETAHS, ("ant:0", "Ant-v4")])
def test_half_cheetah_and_ant_are_gymnasiums(name, theirs):
    """From the same state, as long as an episode lasts. gymnasium reads the ant's place from before
    MuJoCo's last step, so its rewards are late; their sums agree."""
    env, other = envs.make(name, 3, dtype=torch.float64), gymnasium.make(theirs).unwrapped
    state, obs = env.reset(draws(env, 3))
    other.reset(seed=0)
    other.set_state(*np.split(state["physics"][1].numpy(), [other.model.nq]))
    np.testing.assert_allclose(obs[1], other._get_obs(), atol=1e-12)
    late, steps = 0, 0
    for _ in range(30):  # contacts make small differences grow
        action = (
            2.4 * torch.rand(3, env.action_size, generator=DRAWS, dtype=torch.float64) - 1.2
        )  # some beyond what is allowed
        state, step = env.step(state, action, draws(env, 3))
        expected, reward, terminated, _, _ = other.step(action[1].clamp(-1, 1).numpy())
        np.testing.assert_allclose(step.final_obs[1], expected, atol=1e-5)
        assert step.terminated[1].item() == terminated
        late, steps = late + step.reward[1].item() - reward, steps + 1
        assert abs(late) < (0.1 if name == "ant:0" else 1e-4)
        if terminated:
            break
    assert steps > 5


def test_half_cheetah_by_gymnasiums_name_is_ours_with_observations_as_they_are():
    """With options of gymnasium's it is gymnasium's."""
    env, ours = (envs.make(name, 3, scaled=True, parallel=True) for name in ("HalfCheetah-v4", "scaled_half_cheetah"))
    numbers = draws(env, 3)
    scaled = envs.make("scaled_HalfCheetah-v4", 3).reset(numbers)[1]
    obs = env.reset(numbers)[1]
    assert env.resumable and torch.equal(obs, scaled)
    torch.testing.assert_close(obs[:, 8:], 5 * ours.reset(numbers)[1][:, 8:])
    assert not envs.make("HalfCheetah-v4", 1, forward_reward_weight=2.0).resumable


@pytest.mark.parametrize("name", ["half_cheetah:180", "ant:0", "scaled_ant:90"])
def test_the_speed_of_a_body_is_its_way_in_the_rewarded_direction(name):
    env = envs.make(name, 3)
    state, _ = env.reset(draws(env, 3))
    action = 2.4 * torch.rand(3, env.action_size, generator=DRAWS) - 1.2
    moved, step = env.step(state, action, draws(env, 3))
    x, y = ((moved["physics"] - state["physics"]) / 0.05)[:, :2].float().unbind(1)
    expected = {"half_cheetah:180": -x, "ant:0": x, "scaled_ant:90": y}[name]
    torch.testing.assert_close(env.speed(step.reward, action), expected, rtol=1e-4, atol=1e-5)
    assert envs.make("reacher", 3).speed(step.reward, action) is None


def test_recorded_steps_give_returns_and_speeds():
    """Of episodes that ended alone; an environment in which none did has no return."""
    env = Recorded(envs.make("half_cheetah", 3))
    state, _ = env.reset(draws(env, 3))
    for _ in range(4):
        state, _ = env.step(state, torch.rand(3, 6, generator=DRAWS), draws(env, 3))
    assert env.speeds().shape == (3, 4) and env.returns().shape == (0,)
    rewards = torch.tensor([[1.0, 2, 4, 8], [1, 1, 1, 1], [0, 5, 0, 7]])
    ended = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    env.steps = [(reward, end, None) for reward, end in zip(rewards.T, ended.T, strict=True)]
    assert env.returns().tolist() == [3.5, 12] and env.speeds() is None


def test_models_of_gymnasium_leave_no_file_behind(tmp_path, monkeypatch):
    """MuJoCo writes warnings about them, which are out of date, to a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    envs.make("half_cheetah", 1)
    assert not list(tmp_path.iterdir())


def test_an_ant_ends_too_low_or_too_high():
    env = envs.make("ant:0", 3, dtype=torch.float64)
    middle = torch.full((3, env.num_draws), 0.5, dtype=torch.float64)
    state, _ = env.reset(middle)
    state["physics"][:, 2] = torch.tensor([0.1, 1.2, 0.7])
    _, step = env.step(state, torch.zeros(3, 8, dtype=torch.float64), middle)
    height = step.final_obs[:, 0]
    assert height.max() > 1 and step.terminated.any()
    assert torch.equal(step.terminated, (height < 0.2) | (height > 1))


def test_the_direction_of_an_ant():
    rewards = {}
    for degrees in (0, 90, 180):
        env = envs.make(f"ant:{degrees}", 2)
        state, _ = env.reset(torch.full((2, env.lifetime_draws), 0.4))
        rewards[degrees] = env.step(state, torch.full((2, 8), 0.7), draws(env, 2))[1].reward
    healthy = 1 - 0.5 * 8 * 0.7**2
    torch.testing.assert_close(rewards[0] - healthy, healthy - rewards[180])
    assert (rewards[0] != rewards[90]).all()


@pytest.mark.parametrize("name", ["dm_cartpole", "dm_cartpole_swing_up"])
def test_deepmind_controls_cartpole(name):
    """The first states; energy, conserved without a push but for a little friction; the largest
    reward."""
    env = envs.make(name, 64, dtype=torch.float64)
    state, obs = env.reset(draws(env, 64))
    x, angle, *speeds = state["physics"].unbind(-1)
    off = (angle - math.pi) if name == "dm_cartpole_swing_up" else angle
    assert (
        x.abs().max() < 0.1
        and off.abs().max() < 0.05
        and max(speed.abs().max() for speed in speeds) < 0.05
    )
    torch.testing.assert_close(obs, torch.stack([x, angle.cos(), angle.sin(), *speeds], -1))

    m, r = 0.1, 0.045  # a rod of 1 m with round ends, which turns about the middle of one of them
    rod = m / (1 + 4 * r / 3)
    inertia = rod * (1 / 12 + r**2 / 4) + (m - rod) * (2 / 5 * r**2 + 1 / 4 + 3 / 8 * r) + m / 4

    def energy(state):
        _, angle, velocity, spin = state["physics"].unbind(-1)
        moving = (
            1.1 / 2 * velocity**2 + m / 2 * velocity * spin * angle.cos() + inertia / 2 * spin**2
        )
        return moving + m * 9.81 / 2 * angle.cos()

    before = energy(state)
    for _ in range(400):
        state, _ = env.step(state, torch.zeros(64, 1, dtype=torch.float64), draws(env, 64))
    torch.testing.assert_close(energy(state), before, rtol=0, atol=2e-3)
    pushed, _ = env.step(state, torch.full((64, 1), 9.0, dtype=torch.float64), draws(env, 64))
    torch.testing.assert_close(
        pushed["physics"][:, 2] > state["physics"][:, 2], torch.ones(64, dtype=torch.bool)
    )
    still = {"physics": torch.zeros(64, 4, dtype=torch.float64), "steps": torch.full((64,), 998)}
    still, best = env.step(still, torch.zeros(64, 1, dtype=torch.float64), draws(env, 64))
    torch.testing.assert_close(best.reward, torch.ones(64, dtype=torch.float64))
    assert env.step(still, torch.zeros(64, 1, dtype=torch.float64), draws(env, 64))[
        1
    ].truncated.all()


def test_the_reward_and_the_rail_of_deepmind_controls_cartpole():
    """Upright, in the middle, without force, slow: the product of four numbers up to 1."""
    env = envs.make("dm_cartpole", 4, dtype=torch.float64)
    state, _ = env.reset(draws(env, 4))
    physics = [[0, 0, 0, 0], [1, 0.5, 0, 3], [-1.5, 2, 1, -4], [0, 3, 0, 0]]
    state["physics"] = torch.tensor(physics, dtype=torch.float64)
    action = torch.tensor([[0], [1], [-0.5], [0.3]], dtype=torch.float64)
    moved, step = env.step(state, action, draws(env, 4))
    x, angle, _, spin = moved["physics"].unbind(-1)
    upright, small = (1 + angle.cos()) / 2, (4 + 1 - action[:, 0] ** 2) / 5
    centred, slow = ((1 + 0.1 ** ((value / margin) ** 2)) / 2 for value, margin in ((x, 2), (spin, 5)))
    torch.testing.assert_close(step.reward, upright * small * centred * slow)
    for _ in range(300):
        state, step = env.step(state, torch.ones(4, 1, dtype=torch.float64), draws(env, 4))
    assert (step.obs[:, 0] > 1.7).all() and (step.obs[:, 0] < 1.9).all()


@pytest.mark.parametrize(
    "task, name", [("balance", "dm_cartpole"), ("swingup", "dm_cartpole_swing_up")]
)
def test_deepmind_controls_cartpole_against_dm_control(task, name):
    suite = pytest.importorskip("dm_control.suite")
    other = suite.load("cartpole", task, task_kwargs={"random": 0})
    env = envs.make(name, 2, dtype=torch.float64)
    state, _ = env.reset(draws(env, 2))
    other.reset()
    with other.physics.reset_context():
        other.physics.data.qpos[:], other.physics.data.qvel[:] = (
            state["physics"][0].view(2, 2).numpy()
        )
    for step in range(400):  # at first pushed at random, then against the rail's end
        action = (
            2 * torch.rand(2, 1, generator=DRAWS, dtype=torch.float64) - 1
            if step < 200
            else torch.ones(2, 1)
        )
        state, ours = env.step(state, action, draws(env, 2))
        theirs = other.step(action[0].numpy())
        np.testing.assert_allclose(
            ours.obs[0], np.concatenate(list(theirs.observation.values())), atol=1e-4
        )
        assert ours.reward[0].item() == pytest.approx(theirs.reward, abs=1e-5)


def test_a_heading_pays_one_along_its_direction():
    env = envs.make("heading:90", 3, dtype=torch.float64)
    state, _ = env.reset(draws(env, 3))
    for _ in range(100):
        action = torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.0, -0.5]], dtype=torch.float64)
        state, step = env.step(state, action, draws(env, 3))
    torch.testing.assert_close(step.reward, torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64))
    assert not (step.terminated | step.truncated).any()


def test_a_heading_in_space_pays_one_along_its_direction():
    env = envs.make("heading_3d:90", 3, dtype=torch.float64)
    state, _ = env.reset(draws(env, 3))
    up = math.sqrt(3) / 2
    for _ in range(100):
        action = torch.tensor(
            [[0.0, 5 * up, 2.5], [0.0, 0.5, -up], [0.0, -up / 4, -0.125]], dtype=torch.float64
        )
        state, step = env.step(state, action, draws(env, 3))
    torch.testing.assert_close(
        step.reward, torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert step.obs.shape == (3, 3) and not (step.terminated | step.truncated).any()


def play(name, policy, steps=4000, count=8):
    """Mean reward of a policy(state, last action, last reward) per step."""
    env = envs.make(name, count)
    state, _ = env.reset(draws(env, count))
    action, reward, total = torch.zeros(count, dtype=torch.int64), torch.zeros(count), 0
    for _ in range(steps):
        action = policy(state, action, reward)
        state, step = env.step(state, action, draws(env, count))
        assert not (step.terminated | step.truncated).any() and step.obs.shape == (count, 0)
        reward = step.reward
        total += reward.mean().item()
    return total / steps


def test_the_optimum_of_bandits():
    def stay(state, action, reward):
        return torch.where(reward > 0, action, 1 - action)  # win-stay, lose-shift

    assert play("bandit", lambda state, *_: state["good"], 10) == 1
    assert play("bandit", lambda state, *_: 1 - state["good"], 10) == 0
    assert play("bandit", stay, 1000) > 0.998
    assert play("swapping_bandit", lambda state, *_: state["good"], 100) == 1
    assert play("swapping_bandit", stay) == pytest.approx(0.95, abs=0.005)
    assert play(
        "swapping_bandit", lambda state, action, reward: torch.zeros_like(action)
    ) == pytest.approx(0.5, abs=0.03)


def test_contextual_bandits():
    env = envs.make("contextual_bandit:5", 2000)
    state, obs = env.reset(draws(env, 2000))
    assert (state["good"] != state["bad"]).all() and obs.shape == (2000, 5)
    first, shown = state, torch.zeros(5)
    for step in range(6):
        assert torch.equal(obs.argmax(-1), state["context"]) and (obs.sum(-1) == 1).all()
        shown += obs.mean(0) / 6
        good, bad = (
            state[name].gather(1, state["context"][:, None])[:, 0] for name in ("good", "bad")
        )
        neither = torch.where((good + 1) % 5 == bad, good + 2, good + 1) % 5
        action, pay = ((good, 1), (bad, -1), (neither, 0))[step % 3]
        state, now = env.step(state, action, draws(env, 2000))
        assert (now.reward == pay).all()
        obs = now.obs
    assert torch.equal(state["good"], first["good"]) and not torch.equal(
        state["context"], first["context"]
    )
    torch.testing.assert_close(shown, torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_arms_swap_after_10_to_30_pulls():
    env = envs.make("swapping_bandit", 32)
    state, _ = env.reset(draws(env, 32))
    lengths = []
    for _ in range(2000):
        before = state
        state, _ = env.step(state, torch.zeros(32, dtype=torch.int64), draws(env, 32))
        swapped = state["good"] != before["good"]
        assert torch.equal(swapped, state["since"] == 0)
        lengths += (before["since"][swapped] + 1).tolist()
    lengths = np.bincount(lengths, minlength=32)
    assert (
        lengths[:10].sum() == 0
        and lengths[31:].sum() == 0
        and lengths[10:31].min() > 0.7 * lengths[10:31].mean()
    )
