"""Batched environments on tensors, as pure functions that torch.compile can take.

    env = make("cartpole", num_envs=64)
    state, obs = env.reset(draws)                       # obs (p, a)
    state, step = env.step(state, action, draws)        # action (p,) int64, or (p, b) where actions are continuous

An environment keeps nothing: its state is a dict of tensors (p, ...) that goes in and comes out. It has no random numbers of
its own either: every call takes `draws`, fresh uniform numbers (p, env.num_draws) in [0, 1), so that whoever runs it decides
what is random, what repeats, and what members of a population share.

A name may carry a size and what is done to the environment: "independent_bandit:8" has eight arms, "grid_world:5" five rows and
columns; "shuffled_cartpole" permutes observations and actions, "projected_cartpole" maps observations through a random matrix,
"scaled_cartpole" has observations of about one (so have the other two). A name with a capital, "HalfCheetah-v4", is
gymnasium's; such an environment does keep what it is doing to itself.

Environments reset themselves. A step that ends an episode, because it terminated (the task is over) or was truncated (time is
up), returns that step's reward, the state the action led to as `last_obs`, and as `obs` the first observation of the next
episode, so that a loop over steps needs no branch. Bootstrap from `last_obs`, act on `obs`; between ends the two are equal.

Axes: p environments in parallel, a observations, b action dimensions.
"""

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class EnvError(Exception):
    """An environment that cannot be had or used as asked; the message is one sentence that says what to do."""


class Step(NamedTuple):
    """What a step returns, for p environments."""

    obs: Tensor  # (p, a), what to act on next
    reward: Tensor  # (p,)
    terminated: Tensor  # (p,) bool
    truncated: Tensor  # (p,) bool
    last_obs: Tensor  # (p, a), what the action led to


def normals(draws: Tensor) -> Tensor:
    """Standard normal numbers (p, n) of uniform ones (p, 2 n) (Box and Muller 1958)."""
    u, v = draws.chunk(2, -1)
    return (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()


class Env(ABC):
    """The face of all."""

    obs_size = 0
    num_actions: int | None = None  # None: continuous actions
    action_size = 0  # of continuous actions, in [-1, 1]
    max_steps: int | None = None  # of an episode; None: it has no time limit
    episodic = True  # False: it never terminates, and what counts is reward per step
    stationary = True  # False: what is best changes over time
    begin_draws = 0
    move_draws = 0
    obs_scale: tuple[float, ...] = ()  # about how large each observation gets

    def __init__(self, num_envs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.num_envs, self.device, self.dtype = num_envs, torch.device(device), dtype

    @property
    def num_draws(self) -> int:
        """How many uniform numbers a call of reset or step wants for each environment."""
        return self.begin_draws + self.move_draws

    @property
    def lifetime_draws(self) -> int:
        """How many uniform numbers `reset` wants for each environment: more than a step where a lifetime has something of its
        own that outlives its episodes."""
        return self.num_draws

    def payouts(self, state: State) -> Tensor | None:
        """The expected reward of each action (p, b), where it does not depend on what happens afterwards."""
        return None

    def close(self) -> None:  # noqa: B027 (most have none)
        """End the processes that it runs in, if it does."""

    @abstractmethod
    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        """New lifetimes everywhere. draws (p, lifetime_draws)."""

    @abstractmethod
    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        """One step everywhere, and a new episode where one ended. draws (p, num_draws)."""


class Simulated(Env):
    """What is simulated here: auto-reset and time limit around `begin`, `observe` and `move`."""

    @abstractmethod
    def begin(self, draws: Tensor) -> State:
        """The first state of an episode. draws (p, begin_draws)."""

    @abstractmethod
    def observe(self, state: State) -> Tensor:
        """(p, a)."""

    @abstractmethod
    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, the reward (p,), and whether the episode terminated (p,). draws (p, move_draws)."""

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state = self.begin(draws[:, : self.begin_draws]) | {"steps": torch.zeros_like(draws[:, 0], dtype=torch.int64)}
        return state, self.observe(state)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, reward, terminated = self.move(state, action, draws[:, self.begin_draws :])
        moved["steps"] = state["steps"] + 1
        out_of_time = moved["steps"] >= self.max_steps if self.max_steps else torch.zeros_like(terminated)
        truncated = out_of_time & ~terminated
        last_obs = self.observe(moved)
        if self.episodic:
            fresh, _ = self.reset(draws)
            ended = terminated | truncated
            moved = {name: torch.where(ended.view(-1, *[1] * (now.ndim - 1)), fresh[name], now) for name, now in moved.items()}
        return moved, Step(self.observe(moved), reward, terminated, truncated, last_obs)


class Bandit(Simulated):
    """Two arms, one pays 1, the other 0 (thesis, section 7.4). Whoever knows them gets 1 per step. Nothing is observed, and
    there are no episodes. state: good (p,), the arm that pays."""

    num_actions = 2
    episodic = False
    begin_draws = 1  # not used; reset reads the number of environments from its shape

    def begin(self, draws: Tensor) -> State:
        return {"good": torch.zeros_like(draws[:, 0], dtype=torch.int64)}

    def observe(self, state: State) -> Tensor:
        return torch.zeros(len(state["good"]), 0, dtype=self.dtype, device=self.device)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        reward = (action == state["good"]).to(self.dtype)
        return {"good": state["good"]}, reward, torch.zeros_like(action, dtype=torch.bool)


class SwappingBandit(Bandit):
    """The two arms swap again and again, each time after a uniformly drawn number of pulls, from `shortest` to `longest` (the
    thesis has "random intervals", section 7.4). Whoever repeats an arm that paid and leaves one that did not loses one pull in
    twenty, 0.95 per step. state: good (p,); since (p,), pulls since the last swap; left (p,), pulls until the next."""

    stationary = False
    shortest, longest = 10, 30
    move_draws = 1

    def begin(self, draws: Tensor) -> State:
        good = (draws[:, 0] < 0.5).long()
        return {"good": good, "since": torch.zeros_like(good), "left": self.interval(draws[:, 0] * 2 % 1)}

    def interval(self, draw: Tensor) -> Tensor:
        return self.shortest + (draw * (self.longest - self.shortest + 1)).long()

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        _, reward, terminated = super().move(state, action, draws)
        swap = state["left"] == 1
        good = torch.where(swap, 1 - state["good"], state["good"])
        left = torch.where(swap, self.interval(draws[:, 0]), state["left"] - 1)
        return {"good": good, "since": torch.where(swap, 0, state["since"] + 1), "left": left}, reward, terminated


class IndependentBandit(Bandit):
    """Arms that pay 1, else 0, with probabilities drawn once per lifetime from U[0, 1], each on its own (thesis, section 4.5.2
    and appendix C.1). state: chances (p, b)."""

    move_draws = 1

    def __init__(self, *args: Any, size: int = 2):
        super().__init__(*args)
        self.num_actions = self.begin_draws = size

    def begin(self, draws: Tensor) -> State:
        return {"chances": draws.to(self.dtype)}

    def observe(self, state: State) -> Tensor:
        return torch.zeros(len(state["chances"]), 0, dtype=self.dtype, device=self.device)

    def payouts(self, state: State) -> Tensor:
        return state["chances"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        chance = state["chances"].gather(1, action[:, None])
        reward = (draws < chance)[:, 0].to(self.dtype)
        return {"chances": state["chances"]}, reward, torch.zeros_like(action, dtype=torch.bool)


class DependentBandit(IndependentBandit):
    """Two arms that pay with probabilities p and 1 - p, p from U[0, 1] (appendix C.1)."""

    begin_draws = 1

    def __init__(self, *args: Any):
        Env.__init__(self, *args)

    def chance(self, draw: Tensor) -> Tensor:
        return draw

    def begin(self, draws: Tensor) -> State:
        chance = self.chance(draws[:, 0].to(self.dtype))
        return {"chances": torch.stack([chance, 1 - chance], -1)}


class EasyBandit(DependentBandit):
    """As above with p from {0.1, 0.9}."""

    better = 0.9

    def chance(self, draw: Tensor) -> Tensor:
        return torch.where(draw < 0.5, self.better, 1 - self.better)


class MediumBandit(EasyBandit):
    """As above with p from {0.25, 0.75}."""

    better = 0.75


class HardBandit(EasyBandit):
    """As above with p from {0.4, 0.6}."""

    better = 0.6


class ContextualBandit(Simulated):
    """As many contexts as arms. One context, drawn anew before each pull, is shown as a one-hot vector; in each of them one arm
    pays 1, another -1 and the others nothing, which stays so for a lifetime. Whoever knows them gets 1 per step.
    state: good, bad (p, b), of each context; context (p,)."""

    episodic = False
    move_draws = 1

    def __init__(self, *args: Any, size: int = 4):
        super().__init__(*args)
        self.obs_size = self.num_actions = size
        self.obs_scale, self.begin_draws = (1.0,) * size, 2 * size + 1

    def begin(self, draws: Tensor) -> State:
        b = self.num_actions
        good, apart = (b * draws[:, :b]).long(), 1 + ((b - 1) * draws[:, b:-1]).long()
        return {"good": good, "bad": (good + apart) % b, "context": (b * draws[:, -1]).long()}

    def observe(self, state: State) -> Tensor:
        return torch.nn.functional.one_hot(state["context"], self.obs_size).to(self.dtype)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        good, bad = (state[name].gather(1, state["context"][:, None])[:, 0] for name in ("good", "bad"))
        reward = (action == good).to(self.dtype) - (action == bad).to(self.dtype)
        context = (self.num_actions * draws[:, 0]).long()
        return (
            {"good": state["good"], "bad": state["bad"], "context": context},
            reward,
            torch.zeros_like(action, dtype=torch.bool),
        )


class CartPole(Simulated):
    """gymnasium's CartPole-v1 (Barto, Sutton and Anderson 1983). Actions: push left, push right. Observations: position in m,
    velocity in m/s, angle in rad, angular velocity in rad/s. Reward: 1 for every step, also the one that ends an episode; with
    `sutton_barto_reward`, as in gymnasium, -1 for a failure and 0 for all other steps, which tells more per step."""

    obs_size, num_actions, max_steps = 4, 2, 500
    begin_draws = 4
    obs_scale = (2.4, 2.0, 0.21, 2.0)
    gravity, cart_mass, pole_mass, half_length, force, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    largest_position, largest_angle = 2.4, 12 * 2 * math.pi / 360

    def __init__(self, *args: Any, sutton_barto_reward: bool = False):
        super().__init__(*args)
        self.sutton_barto_reward = sutton_barto_reward

    def begin(self, draws: Tensor) -> State:
        return {"physics": (draws.to(self.dtype) - 0.5) / 10}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity, angle, spin = state["physics"].unbind(-1)
        mass, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        push = self.force * (2 * action - 1).to(self.dtype)
        cos, sin = angle.cos(), angle.sin()
        pull = (push + moment * spin**2 * sin) / mass
        turn = (self.gravity * sin - cos * pull) / (self.half_length * (4 / 3 - self.pole_mass * cos**2 / mass))
        thrust = pull - moment * turn * cos / mass
        dt = self.seconds
        x, velocity, angle, spin = x + dt * velocity, velocity + dt * thrust, angle + dt * spin, spin + dt * turn
        terminated = (x.abs() > self.largest_position) | (angle.abs() > self.largest_angle)
        reward = -terminated.to(self.dtype) if self.sutton_barto_reward else torch.ones_like(x)
        return {"physics": torch.stack([x, velocity, angle, spin], -1)}, reward, terminated


class Pendulum(Simulated):
    """gymnasium's Pendulum-v1: swing up and hold. One action, the torque in units of 2 N m. Observations: cos, sin of the
    angle, angular velocity in rad/s."""

    obs_size, action_size, max_steps = 3, 1, 200
    begin_draws = 2
    obs_scale = (1.0, 1.0, 8.0)
    gravity, mass, length, seconds, largest_torque, largest_speed = 10.0, 1.0, 1.0, 0.05, 2.0, 8.0

    def begin(self, draws: Tensor) -> State:
        angle, speed = (2 * draws.to(self.dtype) - 1).unbind(-1)
        return {"angle": math.pi * angle, "speed": speed}

    def observe(self, state: State) -> Tensor:
        return torch.stack([state["angle"].cos(), state["angle"].sin(), state["speed"]], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angle, speed = state["angle"], state["speed"]
        torque = self.largest_torque * action[:, 0].clamp(-1, 1)
        off = (angle + math.pi) % (2 * math.pi) - math.pi  # from upright
        reward = -(off**2 + 0.1 * speed**2 + 0.001 * torque**2)
        pull = 3 * self.gravity / (2 * self.length) * angle.sin() + 3 / (self.mass * self.length**2) * torque
        speed = (speed + self.seconds * pull).clamp(-self.largest_speed, self.largest_speed)
        return {"angle": angle + self.seconds * speed, "speed": speed}, reward, torch.zeros_like(speed, dtype=torch.bool)


class UprightCartPole(CartPole):
    """CartPole that pays for being upright and centred (thesis, section 4.5.5): one minus the angle, times one minus the
    position, each as a share of what ends the episode. 1 in the middle, 0 at the end of an episode."""

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, terminated = super().move(state, action, draws)
        x, _, angle, _ = moved["physics"].unbind(-1)
        off = (x.abs() / self.largest_position).clamp(max=1), (angle.abs() / self.largest_angle).clamp(max=1)
        return moved, (1 - off[0]) * (1 - off[1]), terminated


class ContinuousCartPole(CartPole):
    """CartPole pushed with any force between the two: one continuous action, in units of 10 N. All else as in CartPole."""

    num_actions, action_size = None, 1

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        return super().move(state, (action[:, 0].clamp(-1, 1) + 1) / 2, draws)


class CartSwingUp(CartPole):
    """CartPole from any angle to standing: steps of 0.04 s, walls that stop the cart, 100 steps, no failure. One continuous
    action, in units of 10 N. Observations: position, velocity, cos and sin of the angle, angular velocity. Reward: 1 for a pole
    that stands, 0 for one that hangs, minus a tenth of the distance from the centre as a share of the rail."""

    obs_size, num_actions, action_size, max_steps = 5, None, 1, 100
    obs_scale = (2.4, 3.0, 1.0, 1.0, 6.0)
    seconds, largest_angle = 0.04, math.inf

    def begin(self, draws: Tensor) -> State:
        spread = torch.tensor([0.2, 0.2, 2 * math.pi, 0.2], dtype=self.dtype, device=self.device)
        return {"physics": spread * (draws.to(self.dtype) - 0.5)}

    def observe(self, state: State) -> Tensor:
        x, velocity, angle, spin = state["physics"].unbind(-1)
        return torch.stack([x, velocity, angle.cos(), angle.sin(), spin], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, _ = super().move(state, (action[:, 0].clamp(-1, 1) + 1) / 2, draws)
        x, velocity, angle, spin = moved["physics"].unbind(-1)
        wall = x.abs() >= self.largest_position
        x, velocity = x.clamp(-self.largest_position, self.largest_position), torch.where(wall, 0.0, velocity)
        reward = (1 + angle.cos()) / 2 - 0.1 * x.abs() / self.largest_position
        return {"physics": torch.stack([x, velocity, angle, spin], -1)}, reward, torch.zeros_like(wall)


class PointMass(Simulated):
    """A point between four walls that two forces bring to a target. Observations: position, velocity, the way to the target
    (two numbers each). Reward: minus its length. 100 steps of 0.1 s, some friction. state: physics (p, 6)."""

    obs_size, action_size, max_steps = 6, 2, 100
    begin_draws = 4
    obs_scale = (1.0,) * 6
    seconds, force, friction = 0.1, 2.0, 1.0

    def begin(self, draws: Tensor) -> State:
        place, target = (2 * draws.to(self.dtype) - 1).chunk(2, -1)
        return {"physics": torch.cat([place, torch.zeros_like(place), target], -1)}

    def observe(self, state: State) -> Tensor:
        place, velocity, target = state["physics"].chunk(3, -1)
        return torch.cat([place, velocity, target - place], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        place, velocity, target = state["physics"].chunk(3, -1)
        velocity = velocity + self.seconds * (self.force * action.clamp(-1, 1) - self.friction * velocity)
        place = (place + self.seconds * velocity).clamp(-1, 1)
        reward = -(target - place).norm(dim=-1)
        return {"physics": torch.cat([place, velocity, target], -1)}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Reacher(Simulated):
    """An arm of two links of half a metre each, in the plane, whose tip two torques bring to a target. The joints have friction
    and do not feel each other's motion. Observations: cos and sin of both angles, angular velocities, the way from the tip to
    the target. Reward: minus its length. 100 steps of 0.05 s. state: physics (p, 6), angles, velocities, target."""

    obs_size, action_size, max_steps = 8, 2, 100
    begin_draws = 4
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0)
    seconds, torque, friction, link = 0.05, 8.0, 2.0, 0.5

    def begin(self, draws: Tensor) -> State:
        draws = draws.to(self.dtype)
        angles, turn, far = math.pi * (2 * draws[:, :2] - 1), 2 * math.pi * draws[:, 2], 0.9 * draws[:, 3].sqrt()
        target = torch.stack([far * turn.cos(), far * turn.sin()], -1)
        return {"physics": torch.cat([angles, torch.zeros_like(angles), target], -1)}

    def way(self, angles: Tensor, target: Tensor) -> Tensor:
        """From the tip to the target (p, 2)."""
        one, both = angles[:, 0], angles.sum(-1)
        tip = torch.stack([one.cos() + both.cos(), one.sin() + both.sin()], -1)
        return target - self.link * tip

    def observe(self, state: State) -> Tensor:
        angles, speeds, target = state["physics"].chunk(3, -1)
        return torch.cat([angles.cos(), angles.sin(), speeds, self.way(angles, target)], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angles, speeds, target = state["physics"].chunk(3, -1)
        speeds = speeds + self.seconds * (self.torque * action.clamp(-1, 1) - self.friction * speeds)
        angles = angles + self.seconds * speeds
        reward = -self.way(angles, target).norm(dim=-1)
        return {"physics": torch.cat([angles, speeds, target], -1)}, reward, torch.zeros_like(reward, dtype=torch.bool)


class MountainCar(Simulated):
    """gymnasium's MountainCar-v0 (Moore 1990). Actions: left, none, right. Observations: position, velocity. Reward: -1 for
    every step; with `free_goal` 0 for the one that reaches the goal, or else lifetimes of many episodes would all pay alike."""

    obs_size, num_actions, max_steps = 2, 3, 200
    begin_draws = 1
    obs_scale = (1.2, 0.07)
    force, gravity, goal, fastest = 0.001, 0.0025, 0.5, 0.07

    def __init__(self, *args: Any, free_goal: bool = False):
        super().__init__(*args)
        self.free_goal = free_goal

    def begin(self, draws: Tensor) -> State:
        x = draws[:, 0].to(self.dtype) * 0.2 - 0.6
        return {"physics": torch.stack([x, torch.zeros_like(x)], -1)}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity = state["physics"].unbind(-1)
        velocity = velocity + (action - 1).to(self.dtype) * self.force - self.gravity * (3 * x).cos()
        velocity = velocity.clamp(-self.fastest, self.fastest)
        x = (x + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((x <= -1.2) & (velocity < 0), 0.0, velocity)
        terminated = x >= self.goal
        reward = -torch.ones_like(x) + (terminated.to(self.dtype) if self.free_goal else 0)
        return {"physics": torch.stack([x, velocity], -1)}, reward, terminated


class ContinuousMountainCar(Simulated):
    """gymnasium's MountainCarContinuous-v0: one continuous action, the force. Reward: 100 at the goal, minus a tenth of the
    squared force at every step."""

    obs_size, action_size, max_steps = 2, 1, 999
    begin_draws = 1
    obs_scale = (1.2, 0.07)
    power, gravity, goal, fastest = 0.0015, 0.0025, 0.45, 0.07

    def begin(self, draws: Tensor) -> State:
        x = draws[:, 0].to(self.dtype) * 0.2 - 0.6
        return {"physics": torch.stack([x, torch.zeros_like(x)], -1)}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity = state["physics"].unbind(-1)
        velocity = velocity + self.power * action[:, 0].clamp(-1, 1) - self.gravity * (3 * x).cos()
        velocity = velocity.clamp(-self.fastest, self.fastest)
        x = (x + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((x <= -1.2) & (velocity < 0), 0.0, velocity)
        terminated = (x >= self.goal) & (velocity >= 0)
        reward = 100 * terminated.to(self.dtype) - 0.1 * action[:, 0] ** 2
        return {"physics": torch.stack([x, velocity], -1)}, reward, terminated


class Acrobot(Simulated):
    """gymnasium's Acrobot-v1 (Sutton 1996, with the dynamics of the book). Actions: a torque of -1, 0 or 1 N m between the
    links. Observations: cos and sin of both angles, angular velocities in rad/s. Reward: -1 for every step, 0 for the one that
    reaches the height."""

    obs_size, num_actions, max_steps = 6, 3, 500
    begin_draws = 4
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi)
    seconds, gravity, centre, moment = 0.2, 9.8, 0.5, 1.0  # links of 1 m and 1 kg

    def begin(self, draws: Tensor) -> State:
        return {"physics": draws.to(self.dtype) / 5 - 0.1}

    def observe(self, state: State) -> Tensor:
        one, two, *speeds = state["physics"].unbind(-1)
        return torch.stack([one.cos(), one.sin(), two.cos(), two.sin(), *speeds], -1)

    def change(self, physics: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of both angles and both speeds."""
        one, two, speed1, speed2 = physics.unbind(-1)
        c, i, g = self.centre, self.moment, self.gravity
        d1 = c**2 + (1 + c**2 + 2 * c * two.cos()) + 2 * i
        d2 = c**2 + c * two.cos() + i
        pull2 = c * g * (one + two - math.pi / 2).cos()
        swing = c * two.sin()
        pull1 = -swing * speed2**2 - 2 * swing * speed2 * speed1 + (c + 1) * g * (one - math.pi / 2).cos() + pull2
        turn2 = (torque + d2 / d1 * pull1 - swing * speed1**2 - pull2) / (c**2 + i - d2**2 / d1)
        return torch.stack([speed1, speed2, -(d2 * turn2 + pull1) / d1, turn2], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        y, torque, dt = state["physics"], (action - 1).to(self.dtype), self.seconds
        k1 = self.change(y, torque)  # Runge-Kutta of fourth order
        k2 = self.change(y + dt / 2 * k1, torque)
        k3 = self.change(y + dt / 2 * k2, torque)
        k4 = self.change(y + dt * k3, torque)
        angles, speeds = (y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).split(2, -1)
        angles = (angles + math.pi) % (2 * math.pi) - math.pi
        fastest = math.pi * torch.tensor([4.0, 9.0], dtype=self.dtype, device=self.device)
        speeds = torch.minimum(torch.maximum(speeds, -fastest), fastest)
        one, two = angles.unbind(-1)
        terminated = -one.cos() - (one + two).cos() > 1
        return {"physics": torch.cat([angles, speeds], -1)}, terminated.to(self.dtype) - 1, terminated


class GridWorld(Simulated):
    """A heart that pays +1 and a trap that pays -1 (thesis, section 4.5.4): the agent, the heart and the trap begin in
    different random cells; what is stepped on first ends the episode. Actions: up, down, left, right; walls stop the agent.
    Observations: three images of zeros and ones, where the agent, the heart and the trap are. The thesis names neither the
    size nor a time limit. state: cells (p, 3), each its row times the size plus its column."""

    num_actions = 4
    objects = 3

    def __init__(self, *args: Any, size: int = 5):
        super().__init__(*args)
        self.size, self.begin_draws = size, self.objects
        self.obs_size, self.max_steps = 3 * size**2, 5 * size
        self.obs_scale = (1.0,) * self.obs_size

    def place(self, draws: Tensor) -> Tensor:
        """As many different cells as there are draws (p, n), every arrangement equally likely: the beginning of a shuffle, in
        which the j-th cell changes places with the chosen[j]-th."""
        chosen, cells = [], []
        for j, draw in enumerate(draws.unbind(-1)):
            cell = j + (draw * (self.size**2 - j)).long()
            chosen.append(cell)
            for i in reversed(range(j)):  # what was moved there before
                cell = torch.where(cell == chosen[i], i, cell)
            cells.append(cell)
        return torch.stack(cells, -1)

    def begin(self, draws: Tensor) -> State:
        return {"cells": self.place(draws)}

    def image(self, cells: Tensor) -> Tensor:
        """(p, n) cells -> (p, size * size), one where there is any of them."""
        return (cells[..., None] == torch.arange(self.size**2, device=self.device)).any(1).to(self.dtype)

    def observe(self, state: State) -> Tensor:
        return torch.cat([self.image(cell) for cell in state["cells"].split(1, -1)], -1)

    def go(self, cell: Tensor, action: Tensor) -> Tensor:
        """The cell (p,) next to `cell`, or the same where there is a wall."""
        row, column = cell // self.size, cell % self.size
        row = (row + (action == 1).long() - (action == 0).long()).clamp(0, self.size - 1)
        column = (column + (action == 3).long() - (action == 2).long()).clamp(0, self.size - 1)
        return row * self.size + column

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, heart, trap = state["cells"].unbind(-1)
        agent = self.go(agent, action)
        reward = (agent == heart).to(self.dtype) - (agent == trap).to(self.dtype)
        return {"cells": torch.stack([agent, heart, trap], -1)}, reward, reward != 0


class SwappedGridWorld(GridWorld):
    """The heart pays -1 and the trap +1."""

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, reward, terminated = super().move(state, action, draws)
        return moved, -reward, terminated


class DenseGridWorld(GridWorld):
    """Reach a target (thesis, section 4.5.5): a step pays by how much nearer it comes, in cells along rows and columns, and the
    target ends the episode. Obstacles, two fewer than the grid has rows, stop the agent like walls. Observations: three images,
    the agent, the target, the obstacles. state: cells (p, 2 + obstacles)."""

    def __init__(self, *args: Any, size: int = 5):
        self.objects = size
        super().__init__(*args, size=size)

    def observe(self, state: State) -> Tensor:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        return torch.cat([self.image(cells) for cells in (agent, target, obstacles)], -1)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        return (one // self.size - other // self.size).abs() + (one % self.size - other % self.size).abs()

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        there = self.go(agent[:, 0], action)[:, None]
        there = torch.where((there == obstacles).any(-1, keepdim=True), agent, there)
        reward = (self.distance(agent, target) - self.distance(there, target))[:, 0].to(self.dtype)
        return {"cells": torch.cat([there, target, obstacles], -1)}, reward, (there == target)[:, 0]


class Gymnasium(Env):
    """Any environment that gymnasium has under `name`, MuJoCo's and Box2D's among them, one process for each copy (`parallel`)
    or all in this one. Continuous actions are rescaled to [-1, 1]; observations are flat.

    What a copy is doing lives in gymnasium and not in `state`, which therefore cannot be saved: to go on from a checkpoint,
    `reset`. A step's new episodes are seeded by the last reset. Raises EnvError where gymnasium has no such environment, its
    package is missing, or its spaces are neither flat nor plain actions.
    """

    begin_draws = 1

    def __init__(self, name: str, *args: Any, parallel: bool = False, **options: Any):
        super().__init__(*args)
        import gymnasium as gym

        versions = [spec.version for spec in gym.registry.values() if spec.name == name and spec.version is not None]
        name = f"{name}-v{max(versions)}" if versions else name  # the newest, where none is named
        try:
            mode, same = "async" if parallel else "sync", gym.vector.AutoresetMode.SAME_STEP
            more = {"vectorization_mode": mode, "vector_kwargs": {"autoreset_mode": same}}
            spec = gym.spec(name)
            self.envs = gym.make_vec(name, self.num_envs, **more, **options)
        except gym.error.Error as error:
            raise EnvError(f"gymnasium cannot make {name}: {' '.join(str(error).split())}") from error
        self.max_steps = spec.max_episode_steps
        obs, action = self.envs.single_observation_space, self.envs.single_action_space
        if not isinstance(obs, gym.spaces.Box):
            raise EnvError(f"Observations of {name} are not numbers of one shape; choose another environment.")
        self.obs_size, self.obs_scale = math.prod(obs.shape), (1.0,) * math.prod(obs.shape)
        if isinstance(action, gym.spaces.Discrete):
            self.num_actions = int(action.n)
        elif isinstance(action, gym.spaces.Box) and len(action.shape) == 1 and action.is_bounded():
            self.action_size = action.shape[0]
            self.low, self.high = torch.tensor(action.low), torch.tensor(action.high)
        else:
            raise EnvError(f"Actions of {name} are neither one choice nor a bounded vector; choose another environment.")

    def close(self) -> None:
        self.envs.close()

    def tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array).reshape(self.num_envs, -1).to(self.device, self.dtype)

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        obs, _ = self.envs.reset(seed=(draws[:, 0].double() * 2**31).long().tolist())
        return {"steps": torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)}, self.tensor(obs)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        action = action.cpu()
        if self.num_actions is None:
            action = self.low + (action.clamp(-1, 1) + 1) / 2 * (self.high - self.low)
        obs, reward, terminated, truncated, info = self.envs.step(action.numpy())
        obs = last_obs = self.tensor(obs)
        terminated, truncated = (torch.as_tensor(ends).to(self.device) for ends in (terminated, truncated))
        truncated = truncated & ~terminated
        if "final_obs" in info:
            last_obs = obs.clone()
            for index in info["_final_obs"].nonzero()[0].tolist():
                last_obs[index] = torch.as_tensor(info["final_obs"][index]).reshape(-1).to(self.device, self.dtype)
        steps = torch.where(terminated | truncated, 0, state["steps"] + 1)
        return {"steps": steps}, Step(obs, self.tensor(reward)[:, 0], terminated, truncated, last_obs)


class MuJoCo(Simulated):
    """What MuJoCo simulates: as many copies at once as there are cores. state: physics (p, positions and velocities), float64,
    and nothing else, so that it can be saved."""

    skip = 1  # of MuJoCo's own steps in one of ours

    def __init__(self, model: str, *args: Any):
        super().__init__(*args)
        import mujoco
        from mujoco.rollout import Rollout

        self.model = mujoco.MjModel.from_xml_string(model) if model.startswith("<") else mujoco.MjModel.from_xml_path(model)
        threads = min(os.cpu_count() or 1, self.num_envs)
        self.scratch, self.pool = [mujoco.MjData(self.model) for _ in range(threads)], Rollout(nthread=threads)
        self.start = torch.tensor(self.model.qpos0, device=self.device)

    def close(self) -> None:
        self.pool.close()

    def begin_near_start(self, draws: Tensor, place: float, speed: float) -> State:
        """Positions uniform within `place` of the model's own, velocities normal of deviation `speed`.
        draws (p, positions + 2 velocities)."""
        uniform, normal = draws.double().split([self.model.nq, 2 * self.model.nv], -1)
        return {"physics": torch.cat([self.start + place * (2 * uniform - 1), speed * normals(normal)], -1)}

    @torch.compiler.disable
    def simulate(self, physics: Tensor, action: Tensor) -> Tensor:
        """Positions and velocities after `skip` of MuJoCo's steps, in which the action (p, b) stays."""
        before = torch.nn.functional.pad(physics.cpu(), (1, 0)).numpy()  # the time comes first, and does not matter
        control = action.clamp(-1, 1).double().cpu()[:, None].expand(-1, self.skip, -1).contiguous().numpy()
        after, _ = self.pool.rollout(self.model, self.scratch, before, control)
        return torch.from_numpy(after[:, -1, 1:].copy()).to(self.device)


def gymnasium_model(name: str) -> str:
    """The file of a MuJoCo model that comes with gymnasium."""
    import gymnasium

    return str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / f"{name}.xml")


class HalfCheetah(MuJoCo):
    """gymnasium's HalfCheetah-v4: run. Six torques. Observations: all positions but the one along the way, all velocities.
    Reward: the speed, minus a tenth of the action's squared length. 1,000 steps of 0.05 s, no failure."""

    obs_size, action_size, max_steps, skip = 17, 6, 1000, 5
    begin_draws = 9 + 2 * 9
    obs_scale = (1.0,) * 8 + (5.0,) * 9
    seconds = 0.05

    def __init__(self, *args: Any):
        super().__init__(gymnasium_model("half_cheetah"), *args)

    def begin(self, draws: Tensor) -> State:
        return self.begin_near_start(draws, 0.1, 0.1)

    def observe(self, state: State) -> Tensor:
        return state["physics"][:, 1:].to(self.dtype)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        speed = ((moved[:, 0] - state["physics"][:, 0]) / self.seconds).to(self.dtype)
        reward = speed - 0.1 * (action.clamp(-1, 1) ** 2).sum(-1)
        return {"physics": moved}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Ant(MuJoCo):
    """gymnasium's Ant-v4, paid for its speed in a direction: ant:0, as gymnasium's, forwards, ant:180 backwards (Ant-Dir), or
    any other in degrees. Eight torques. Observations: height, orientation, joints, all velocities. Reward: the speed along the
    direction, plus one, minus half of the action's squared length. An episode ends after 1,000 steps of 0.05 s, or when the
    torso is below 0.2 m or above 1 m."""

    obs_size, action_size, max_steps, skip = 27, 8, 1000, 5
    begin_draws = 15 + 2 * 14
    obs_scale = (1.0,) * 13 + (5.0,) * 14
    seconds, lowest, highest = 0.05, 0.2, 1.0

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(gymnasium_model("ant"), *args)
        turn = math.radians(size)
        self.direction = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64, device=self.device)

    def begin(self, draws: Tensor) -> State:
        return self.begin_near_start(draws, 0.1, 0.1)

    def observe(self, state: State) -> Tensor:
        return state["physics"][:, 2:].to(self.dtype)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        speed = ((moved - state["physics"])[:, :2] @ self.direction / self.seconds).to(self.dtype)
        standing = (moved[:, 2] >= self.lowest) & (moved[:, 2] <= self.highest) & moved.isfinite().all(-1)
        reward = speed + 1 - 0.5 * (action.clamp(-1, 1) ** 2).sum(-1)
        return {"physics": moved}, reward, ~standing


class DMCartPole(MuJoCo):
    """DeepMind Control's cartpole: a cart of 1 kg on a rail of 3.6 m, a pole of 1 m and 0.1 kg. One action, the force in units
    of 10 N. Observations: position, cos and sin of the angle, both velocities. Reward: how upright, times how near the middle,
    how little pushed and how slow, 1 at most. 1,000 steps of 0.01 s, no failure. The pole begins near upright, or, `hanging`,
    near the opposite."""

    obs_size, action_size, max_steps = 5, 1, 1000
    begin_draws = 2 + 2 * 4
    obs_scale = (1.0, 1.0, 1.0, 1.0, 3.0)
    xml = """<mujoco><option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
        <worldbody><body pos="0 0 1"><geom type="box" size="0.2 0.15 0.1" mass="1"/><joint name="rail" type="slide"
        axis="1 0 0" limited="true" range="-1.8 1.8" solreflimit="0.08 1" damping="5e-4"/>
        <body><joint type="hinge" axis="0 1 0" damping="2e-6"/>
        <geom type="capsule" fromto="0 0 0 0 0 1" size="0.045" mass="0.1"/>
        </body></body></worldbody>
        <actuator><motor joint="rail" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator></mujoco>"""

    def __init__(self, *args: Any, hanging: bool = False):
        super().__init__(self.xml, *args)
        self.hanging = hanging

    def begin(self, draws: Tensor) -> State:
        uniform, normal = draws.double().split([2, 8], -1)
        normal = 0.01 * normals(normal)
        near = torch.tensor([0.1, 0.034], dtype=torch.float64, device=self.device) * (2 * uniform - 1)
        hanging = torch.tensor([0.0, math.pi], dtype=torch.float64, device=self.device) + normal[:, :2]
        return {"physics": torch.cat([hanging if self.hanging else near, normal[:, 2:]], -1)}

    def observe(self, state: State) -> Tensor:
        x, angle, velocity, spin = state["physics"].unbind(-1)
        return torch.stack([x, angle.cos(), angle.sin(), velocity, spin], -1).to(self.dtype)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        x, angle, _, spin = moved.unbind(-1)
        upright, centred = (1 + angle.cos()) / 2, (1 + 0.1 ** ((x / 2) ** 2)) / 2
        unpushed, slow = (5 - action[:, 0].double().clamp(-1, 1) ** 2) / 5, (1 + 0.1 ** ((spin / 5) ** 2)) / 2
        reward = (upright * centred * unpushed * slow).to(self.dtype)
        return {"physics": moved}, reward, torch.zeros_like(reward, dtype=torch.bool)


class HiddenGoal(GridWorld):
    """Find a cell that is not shown, in three rows and columns (thesis, section 6.3): it pays 1 and ends the episode, and the
    agent begins anew in any other cell. Actions as in GridWorld. Observations: the agent's cell, one of nine. The goal is the
    task: hidden_goal:0 to hidden_goal:8. state: cells (p, 1)."""

    objects = 1

    def __init__(self, *args: Any, size: int = 8):
        super().__init__(*args, size=3)
        if size > 8:
            raise EnvError(f"hidden_goal:{size} is not one of nine cells; choose 0 to 8.")
        self.goal, self.obs_size, self.max_steps = size, 9, None
        self.obs_scale = (1.0,) * 9

    def begin(self, draws: Tensor) -> State:
        cell = (draws * 8).long()
        return {"cells": cell + (cell >= self.goal).long()}

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        cell = self.go(state["cells"][:, 0], action)
        found = cell == self.goal
        return {"cells": cell[:, None]}, found.to(self.dtype), found


class Heading(Simulated):
    """Run in a direction that is not shown: a force changes a velocity in the plane, of which there is friction; what pays is
    the velocity along the direction, 1 at most in the long run. No episodes. The direction is the task, in degrees: heading:0
    to heading:359. state: velocity (p, 2)."""

    obs_size, action_size, episodic = 2, 2, False
    begin_draws = 2
    obs_scale = (1.0, 1.0)
    friction = 0.2

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(*args)
        turn = math.radians(size)
        self.direction = torch.tensor([math.cos(turn), math.sin(turn)], dtype=self.dtype, device=self.device)

    def begin(self, draws: Tensor) -> State:
        return {"velocity": (2 * draws.to(self.dtype) - 1) / 10}

    def observe(self, state: State) -> Tensor:
        return state["velocity"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        action = action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        velocity = state["velocity"] + self.friction * (action - state["velocity"])
        reward = velocity @ self.direction
        return {"velocity": velocity}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Flight(Heading):
    """Fly in a direction that is not shown: as Heading, with three forces in space and a drag that grows with the square of the
    speed. The direction, in degrees around the vertical and 30 above the horizon, is the task: flight:0 to flight:359.
    state: velocity (p, 3)."""

    obs_size, action_size = 3, 3
    begin_draws = 3
    obs_scale = (1.0, 1.0, 1.0)
    drag, climb = 0.2, math.radians(30)

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(*args, size=size)
        upwards = torch.full((1,), math.sin(self.climb), dtype=self.dtype, device=self.device)
        self.direction = torch.cat([math.cos(self.climb) * self.direction, upwards])

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        velocity, force = state["velocity"], action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        velocity = velocity + self.drag * (force - velocity * velocity.norm(dim=-1, keepdim=True))
        reward = velocity @ self.direction
        return {"velocity": velocity}, reward, torch.zeros_like(reward, dtype=torch.bool)


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


ENVS: dict[str, type[Env]] = {
    "bandit": Bandit,
    "swapping_bandit": SwappingBandit,
    "independent_bandit": IndependentBandit,
    "dependent_bandit": DependentBandit,
    "easy_bandit": EasyBandit,
    "medium_bandit": MediumBandit,
    "hard_bandit": HardBandit,
    "contextual_bandit": ContextualBandit,
    "cartpole": CartPole,
    "upright_cartpole": UprightCartPole,
    "continuous_cartpole": ContinuousCartPole,
    "cart_swing_up": CartSwingUp,
    "mountain_car": MountainCar,
    "continuous_mountain_car": ContinuousMountainCar,
    "acrobot": Acrobot,
    "pendulum": Pendulum,
    "point_mass": PointMass,
    "reacher": Reacher,
    "grid_world": GridWorld,
    "swapped_grid_world": SwappedGridWorld,
    "dense_grid_world": DenseGridWorld,
    "hidden_goal": HiddenGoal,
    "heading": Heading,
    "flight": Flight,
    "half_cheetah": HalfCheetah,
    "ant": Ant,
    "dm_cartpole": DMCartPole,
}
WRAPPERS: dict[str, type[Wrapper]] = {"scaled": Scaled, "shuffled": Shuffled, "projected": Projected}
SMALLEST = {
    IndependentBandit: 2,
    ContextualBandit: 2,
    GridWorld: 2,
    SwappedGridWorld: 2,
    DenseGridWorld: 3,
    HiddenGoal: 0,
    Heading: 0,
    Flight: 0,
    Ant: 0,
}  # environments with a size


def make(
    name: str, num_envs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> Env:
    """An environment by its name; options are its own. A name with a capital, such as HalfCheetah-v4, is gymnasium's. Raises
    EnvError for a name or a size that there is not."""
    wrapper, _, inner = name.partition("_")
    if wrapper in WRAPPERS:
        env = make(inner, num_envs, device, dtype, **options)
        if not env.obs_size:
            raise EnvError(f"There is nothing to be {wrapper} in {inner}, which is not observed.")
        return WRAPPERS[wrapper](env)
    base, colon, size = name.partition(":")
    if base[:1].isupper() and not colon:
        return Gymnasium(name, num_envs, device, dtype, **options)
    if base not in ENVS:
        raise EnvError(f"There is no environment {base}; there are {', '.join(ENVS)}.")
    if colon:
        smallest = SMALLEST.get(ENVS[base])
        if smallest is None:
            raise EnvError(f"{base} has no size; leave out :{size}.")
        if not size.isdecimal() or int(size) < smallest:
            raise EnvError(f"The size in {name} has to be a number, at least {smallest}.")
        options["size"] = int(size)
    return ENVS[base](num_envs, device, dtype, **options)
