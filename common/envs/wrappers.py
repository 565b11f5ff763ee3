"""Environments seen through a scaling, a permutation or a projection."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from common.envs.base import Env, EnvError, State, Step, normals


class Wrapper(Env):
    """An environment seen through something that is drawn once per lifetime and outlives its episodes."""

    own_draws = 0

    def __init__(self, env: Env):
        super().__init__(env.num_envs, env.device, env.dtype)
        self.env = env
        self.obs_size, self.num_actions, self.action_size = env.obs_size, env.num_actions, env.action_size
        self.max_steps, self.episodic, self.stationary = env.max_steps, env.episodic, env.stationary
        self.begin_draws, self.move_draws, self.obs_scale = env.begin_draws, env.move_draws, env.obs_scale

    @property
    def lifetime_draws(self) -> int:
        return self.env.lifetime_draws + self.own_draws

    def close(self) -> None:
        self.env.close()

    @abstractmethod
    def own(self, draws: Tensor) -> State:
        """What is drawn once per lifetime. draws (p, own_draws)."""

    def see(self, state: State, obs: Tensor) -> Tensor:
        """What an observation of the environment looks like (p, a)."""
        return obs

    def act(self, state: State, action: Tensor) -> Tensor:
        """What an action is to the environment (p,)."""
        return action

    def payouts(self, state: State) -> Tensor | None:
        return self.env.payouts(state)

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state, obs = self.env.reset(draws[:, : self.env.lifetime_draws])
        own = self.own(draws[:, self.env.lifetime_draws :])
        return state | own, self.see(own, obs)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, step = self.env.step(state, self.act(state, action), draws)
        own = {name: value for name, value in state.items() if name not in moved}
        return moved | own, step._replace(obs=self.see(own, step.obs), last_obs=self.see(own, step.last_obs))


class Scaled(Wrapper):
    """Observations of about one."""

    def __init__(self, env: Env):
        super().__init__(env)
        self.scale, self.obs_scale = torch.tensor(env.obs_scale, dtype=env.dtype, device=env.device), (1.0,) * env.obs_size

    def own(self, draws: Tensor) -> State:
        return {}

    def see(self, state: State, obs: Tensor) -> Tensor:
        return obs / self.scale


class Shuffled(Scaled):
    """Observations, scaled to about one, and actions in an order of the lifetime's own (thesis, section 4.5.3)."""

    def __init__(self, env: Env):
        super().__init__(env)
        if env.num_actions is None:
            raise EnvError("Only discrete actions can be shuffled.")
        self.own_draws = env.obs_size + env.num_actions

    def own(self, draws: Tensor) -> State:
        of_obs, of_actions = draws.split([self.obs_size, self.num_actions], -1)
        return {"obs_order": of_obs.argsort(-1), "action_order": of_actions.argsort(-1)}

    def see(self, state: State, obs: Tensor) -> Tensor:
        return super().see(state, obs).gather(1, state["obs_order"])

    def act(self, state: State, action: Tensor) -> Tensor:
        return state["action_order"].gather(1, action[:, None])[:, 0]

    def payouts(self, state: State) -> Tensor | None:
        payouts = self.env.payouts(state)
        return None if payouts is None else payouts.gather(1, state["action_order"])


class Projected(Scaled):
    """Observations, scaled to about one, through a Glorot-normal matrix of the lifetime's own to 16 numbers (C.2.3)."""

    def __init__(self, env: Env):
        super().__init__(env)
        self.obs_size, self.obs_scale = 16, (1.0,) * 16
        self.own_draws = 2 * env.obs_size * self.obs_size

    def own(self, draws: Tensor) -> State:
        std = math.sqrt(2 / (self.env.obs_size + self.obs_size))
        return {"projection": std * normals(draws.to(self.dtype)).view(-1, self.env.obs_size, self.obs_size)}

    def see(self, state: State, obs: Tensor) -> Tensor:
        return (super().see(state, obs)[:, None] @ state["projection"])[:, 0]
