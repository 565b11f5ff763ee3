"""Environments whose observations or actions are scaled, permuted or projected.

What a wrapper draws is drawn once per lifetime and outlasts its episodes.

Axes: p environments in parallel, a observations, b actions.
"""

import math

import torch
from torch import Tensor

from common.envs.base import Env, EnvError, State, Step, normals


class Wrapper(Env):
    """An environment of which a subclass maps the observations (`map_obs`), the actions
    (`map_action`), or both."""

    own_draws = 0  # uniform numbers that init_state takes for each environment

    def __init__(self, env: Env):
        super().__init__(env.num_envs, env.device, env.dtype)
        self.env = env
        self.obs_size = env.obs_size
        self.obs_scale = env.obs_scale
        self.num_actions = env.num_actions
        self.action_size = env.action_size
        self.max_steps = env.max_steps
        self.episodic = env.episodic
        self.compilable = env.compilable
        self.next_step_reset = env.next_step_reset
        self.resumable = env.resumable
        self.reset_draws = env.reset_draws
        self.step_draws = env.step_draws

    @property
    def lifetime_draws(self) -> int:
        return self.env.lifetime_draws + self.own_draws

    def init_state(self, draws: Tensor) -> State:
        """The wrapper's own state of a lifetime. draws (p, own_draws)."""
        return {}

    def map_obs(self, state: State, obs: Tensor) -> Tensor:
        """The observations (p, a) of the wrapper, from those of the environment."""
        return obs

    def map_action(self, state: State, action: Tensor) -> Tensor:
        """The actions of the environment, from those of the wrapper."""
        return action

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state, obs = self.env.reset(draws[:, : self.env.lifetime_draws])
        own = self.init_state(draws[:, self.env.lifetime_draws :])
        return state | own, self.map_obs(own, obs)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, step = self.env.step(state, self.map_action(state, action), draws)
        obs = self.map_obs(state, step.obs)
        final_obs = self.map_obs(state, step.final_obs)
        own = {name: value for name, value in state.items() if name not in moved}
        return moved | own, Step(obs, step.reward, step.terminated, step.truncated, final_obs)

    def expected_rewards(self, state: State) -> Tensor | None:
        return self.env.expected_rewards(state)

    def speed(self, reward: Tensor, action: Tensor) -> Tensor | None:
        return self.env.speed(reward, action)

    def close(self) -> None:
        self.env.close()


class Recorded(Wrapper):
    """Keeps of every step the observations before and after it, the reward, whether an episode ended,
    and the speed of a body."""

    def __init__(self, env: Env):
        super().__init__(env)
        self.steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.moves: list[tuple[Tensor, Tensor]] = []  # observations (p, a) before and after

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state, self.obs = super().reset(draws)
        return state, self.obs

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, step = self.env.step(state, action, draws)
        ended = step.terminated | step.truncated
        self.steps.append((step.reward, ended, self.env.speed(step.reward, action)))
        self.moves.append((self.obs, step.final_obs))
        self.obs = step.obs
        return moved, step

    def speeds(self) -> Tensor | None:
        """Of every step (p, t); None without a body."""
        speeds = [speed for *_, speed in self.steps if speed is not None]
        return torch.stack(speeds, 1) if speeds else None

    def returns(self) -> Tensor:
        """The mean return of the episodes that ended, in those of the environments in which one did."""
        reward, ended, _ = zip(*self.steps, strict=True)
        ended = torch.stack(ended, 1).long()
        counts = ended.sum(1)
        inside = ended.flip(1).cumsum(1).flip(1) > 0  # of an episode that ended
        total = (torch.stack(reward, 1) * inside).sum(1)
        return total[counts > 0] / counts[counts > 0]


class Repeated(Wrapper):
    """Each action is taken for a number of steps, or until the episode ends. The reward is the sum of
    theirs divided by this number, so that it is as large as that of a step."""

    def __init__(self, env: Env, times: int):
        super().__init__(env)
        self.times = times

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, step = self.env.step(state, action, draws)
        stopped = step.terminated | step.truncated
        if self.next_step_reset:  # a first observation is not skipped
            stopped = stopped | state["ended"]

        for _ in range(self.times - 1):
            after, more = self.env.step(moved, action, draws)
            more = more._replace(reward=step.reward + more.reward)
            moved = {name: select(stopped, moved[name], after[name]) for name in moved}
            step = Step(*(select(stopped, *both) for both in zip(step, more, strict=True)))
            stopped = stopped | step.terminated | step.truncated
        return moved, step._replace(reward=step.reward / self.times)


def select(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """one (p, ...) where mask (p,), else other."""
    return torch.where(mask.view(-1, *[1] * (one.ndim - 1)), one, other)


class Scaled(Wrapper):
    """Observations divided by their typical magnitude."""

    def __init__(self, env: Env):
        super().__init__(env)
        self.scale = torch.tensor(env.obs_scale, dtype=env.dtype, device=env.device)
        self.obs_scale = (1.0,) * env.obs_size

    def map_obs(self, state: State, obs: Tensor) -> Tensor:
        return obs / self.scale


class Shuffled(Scaled):
    """Scaled, with observations and actions in an order that is drawn for each lifetime (thesis,
    section 4.5.3). Raises EnvError for continuous actions.

    state: obs_order (p, a), action_order (p, b).
    """

    def __init__(self, env: Env):
        super().__init__(env)
        if env.num_actions is None:
            raise EnvError("Only discrete actions can be shuffled.")
        self.own_draws = env.obs_size + env.num_actions

    def init_state(self, draws: Tensor) -> State:
        obs_draws, action_draws = draws.split([self.obs_size, self.num_actions], -1)
        return {"obs_order": obs_draws.argsort(-1), "action_order": action_draws.argsort(-1)}

    def map_obs(self, state: State, obs: Tensor) -> Tensor:
        return super().map_obs(state, obs).gather(1, state["obs_order"])

    def map_action(self, state: State, action: Tensor) -> Tensor:
        return state["action_order"].gather(1, action[:, None])[:, 0]

    def expected_rewards(self, state: State) -> Tensor | None:
        rewards = self.env.expected_rewards(state)
        return None if rewards is None else rewards.gather(1, state["action_order"])


class Projected(Scaled):
    """Scaled, with observations multiplied by a Glorot-normal matrix to 16 numbers that is drawn
    for each lifetime (thesis, appendix C.2.3). state: projection (p, a, 16)."""

    def __init__(self, env: Env):
        super().__init__(env)
        self.obs_size = 16
        self.obs_scale = (1.0,) * 16
        self.own_draws = 2 * env.obs_size * self.obs_size

    def init_state(self, draws: Tensor) -> State:
        std = math.sqrt(2 / (self.env.obs_size + self.obs_size))
        noise = normals(draws.to(self.dtype))
        return {"projection": std * noise.view(-1, self.env.obs_size, self.obs_size)}

    def map_obs(self, state: State, obs: Tensor) -> Tensor:
        return (super().map_obs(state, obs)[:, None] @ state["projection"])[:, 0]
