"""Environments: dynamics against gymnasium, what happens when an episode ends, and bandits whose best reward is known."""

import gymnasium
import numpy as np
import pytest
import torch

from common import envs

DRAWS = torch.Generator().manual_seed(0)


def draws(env, count):
    return torch.rand(count, env.num_draws, generator=DRAWS, dtype=torch.float64)


def balance(physics):
    """A controller that keeps CartPole's pole up for a while, so that rollouts get long."""
    return (physics[:, 2] + 0.2 * physics[:, 3] + 0.02 * physics[:, 0] > 0).long()


@pytest.mark.parametrize("controller, failure_costs", [("random", False), ("random", True), ("balance", False)])
def test_cartpole_is_gymnasiums(controller, failure_costs):
    """States to 1e-9, rewards and ends exactly, over ten thousand steps and whatever episodes they make."""
    env = envs.make("cartpole", 4, dtype=torch.float64, sutton_barto_reward=failure_costs)
    theirs = [gymnasium.make("CartPole-v1", sutton_barto_reward=failure_costs).unwrapped for _ in range(4)]
    state, obs = env.reset(draws(env, 4))
    ends = truncations = 0
    for other, first in zip(theirs, obs, strict=True):
        other.reset(seed=0)
        other.state = first.numpy().copy()
    for _ in range(2500):
        action = balance(obs) if controller == "balance" else torch.randint(2, (4,), generator=DRAWS)
        state, step = env.step(state, action, draws(env, 4))
        for index, other in enumerate(theirs):
            _, reward, terminated, _, _ = other.step(int(action[index]))
            np.testing.assert_allclose(step.last_obs[index], np.asarray(other.state), atol=1e-9)
            assert reward == step.reward[index] and terminated == step.terminated[index]
            if terminated or step.truncated[index]:
                ends, truncations = ends + 1, truncations + int(step.truncated[index])
                other.reset(seed=0)
                other.state = step.obs[index].numpy().copy()
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
        action = 2.4 * torch.rand(3, 1, generator=DRAWS, dtype=torch.float64) - 1.2  # too large ones are cut
        state, step = env.step(state, action, draws(env, 3))
        for index, other in enumerate(theirs):
            obs, reward, terminated, _, _ = other.step(2 * action[index].numpy())
            np.testing.assert_allclose(step.obs[index], obs, atol=1e-5)
            assert reward == pytest.approx(float(step.reward[index]), abs=1e-9) and not terminated
        assert not step.truncated.any()
    _, step = env.step(state, action, draws(env, 3))
    assert step.truncated.all() and not step.terminated.any()


def test_an_end_gives_the_last_state_and_the_next_episode():
    env = envs.make("cartpole", 2)
    state, obs = env.reset(draws(env, 2))
    assert obs.dtype == torch.float32 and obs.abs().max() <= 0.05
    ends = 0
    for _ in range(60):
        state, step = env.step(state, torch.ones(2, dtype=torch.int64), draws(env, 2))
        ended = step.terminated
        assert torch.equal(step.obs[~ended], step.last_obs[~ended])
        assert (step.obs[ended].abs() <= 0.05).all() and (state["steps"][ended] == 0).all()
        beyond = (step.last_obs[:, 0].abs() > 2.4) | (step.last_obs[:, 2].abs() > 12 * np.pi / 180)
        assert torch.equal(beyond, ended) and (step.reward == 1).all()
        ends += int(ended.sum())
    assert ends >= 8


def test_cartpole_is_cut_off_after_500_steps_and_that_is_no_failure():
    env = envs.make("cartpole", 64)
    state, obs = env.reset(draws(env, 64))
    truncated = []
    for number in range(500):
        state, step = env.step(state, balance(obs), draws(env, 64))
        obs = step.obs
        assert not (step.truncated & step.terminated).any() and (number == 499 or not step.truncated.any())
        truncated.append(step.truncated)
    assert truncated[-1].any() and (state["steps"][truncated[-1]] == 0).all()


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


def test_bandits_have_the_optimum_that_they_say():
    def stay(state, action, reward):
        return torch.where(reward > 0, action, 1 - action)  # win-stay, lose-shift

    assert play("bandit", lambda state, *_: state["good"], 10) == 1
    assert play("bandit", lambda state, *_: 1 - state["good"], 10) == 0
    assert play("bandit", stay, 1000) > 0.998
    assert play("swapping_bandit", lambda state, *_: state["good"], 100) == 1
    assert play("swapping_bandit", stay) == pytest.approx(0.95, abs=0.005)
    assert play("swapping_bandit", lambda state, action, reward: torch.zeros_like(action)) == pytest.approx(0.5, abs=0.03)


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
    assert lengths[:10].sum() == 0 and lengths[31:].sum() == 0 and lengths[10:31].min() > 0.7 * lengths[10:31].mean()


def test_an_unknown_environment_is_named():
    with pytest.raises(envs.EnvError, match="There is no environment cartpol; there are bandit, swapping_bandit, cartpole"):
        envs.make("cartpol", 1)
