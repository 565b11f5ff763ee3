"""Environments that are simulated outside of PyTorch: gymnasium's own, and MuJoCo in batches.

Axes: p environments in parallel, a observations, b action dimensions.
"""

import math
import os
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.envs.base import Env, EnvError, Simulation, State, Step, never, normals


class Gymnasium(Env):
    """Any environment that gymnasium has under `name`, or has after it imported the module in
    "module:name". Each copy is in a process of its own (`parallel`), or all of them are in this
    one. Continuous actions are rescaled to [-1, 1]; observations are flat.

    Its state is inside gymnasium and not in `state`, so it cannot be saved: to resume, `reset`. The
    episodes that a step starts are seeded by the last reset. Raises EnvError where gymnasium has no
    such environment, a package is missing, or the spaces are neither flat nor plain actions.
    """

    compilable = False
    resumable = False
    reset_draws = 1

    def __init__(
        self,
        name: str,
        *args: Any,
        parallel: bool = False,
        next_step_reset: bool = False,
        **options: Any,
    ):
        super().__init__(*args)
        import gymnasium as gym

        modes = gym.vector.AutoresetMode
        self.next_step_reset = next_step_reset
        self.name = name
        self.finite_actions = True
        id = registered_id(name)
        try:
            self.max_steps = gym.spec(id).max_episode_steps
            self.make_envs = partial(
                gym.make_vec,
                id,
                vectorization_mode="async" if parallel else "sync",
                vector_kwargs={
                    "autoreset_mode": modes.NEXT_STEP if next_step_reset else modes.SAME_STEP
                },
                **options,
            )
            self.envs = self.make_envs(self.num_envs)
        except (Exception, SystemExit) as error:  # an environment of the user's own can raise anything
            message = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, gym.error.UnregisteredEnv):
                message += " An environment of your own is named package.module:Name-v0."
            raise EnvError(f"gymnasium cannot make {name}: {message}") from error

        self.read_obs_space(self.envs.single_observation_space)
        self.read_action_space(self.envs.single_action_space)

    def read_obs_space(self, space: Any) -> None:
        """Set the size of observations. Raises EnvError for images and what is not a Box."""
        import gymnasium as gym

        if not isinstance(space, gym.spaces.Box):
            raise EnvError(
                f"Observations of {self.name} are not numbers of one shape; choose another "
                "environment."
            )
        if space.dtype == np.uint8 and len(space.shape) > 1:
            raise EnvError(
                f"Observations of {self.name} are images, which these networks do not process; "
                "choose another environment."
            )
        self.obs_size = math.prod(space.shape)
        if not self.obs_size:
            raise EnvError(f"{self.name} has no observations; choose another environment.")
        self.obs_scale = (1.0,) * self.obs_size

    def read_action_space(self, space: Any) -> None:
        """Set the number, or the size and bounds, of actions. Raises EnvError for other spaces."""
        import gymnasium as gym

        if isinstance(space, gym.spaces.Discrete):
            self.num_actions = int(space.n)
            self.first_action = int(space.start)
        elif isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and is_bounded(space):
            self.action_size = space.shape[0]
            self.integer = space.dtype.kind in "iu"
            dtype = torch.float64 if self.integer else None
            self.low = torch.tensor(space.low, dtype=dtype)
            self.high = torch.tensor(space.high, dtype=dtype)
        else:
            raise EnvError(
                f"Actions of {self.name} are neither one choice nor a bounded vector; choose "
                "another environment."
            )

    def close(self) -> None:
        with suppress(Exception):  # nothing is lost if an environment cannot be closed
            self.envs.close()

    def gym_action(self, action: Tensor) -> np.ndarray:
        """Actions as gymnasium takes them: choices from their first number on, vectors between
        their bounds, rounded where they are integers."""
        if self.num_actions is not None:
            return (action + self.first_action).numpy()
        action = self.low + (action.clamp(-1, 1) + 1) / 2 * (self.high - self.low)
        if self.integer:
            action = action.round()
        return action.numpy().astype(self.envs.single_action_space.dtype)

    def flat(self, array: Any) -> Tensor:
        """An array (p, ...) of gymnasium's as a CPU tensor (p, a)."""
        return torch.as_tensor(array).reshape(self.num_envs, -1).to(self.dtype)

    def call(self, function: Callable, *args: Any, **options: Any) -> Any:
        """What gymnasium returns. Raises EnvError, which says where the environment raised what."""
        try:
            return function(*args, **options)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f" in {place.filename}, line {place.lineno}"
            if re.search(r"[/\\](gymnasium|multiprocessing)[/\\]", place.filename):
                where = " in a process of its own, whose traceback is above"
            message = " ".join(str(error).split()) or "no message"
            raise EnvError(
                f"{self.name} raised {type(error).__name__}{where}: {message}; correct it, or "
                "choose another environment."
            ) from error

    def check_finite(self, what: str, values: Tensor) -> None:
        """Raise EnvError if values are not finite. After an action that was not finite nothing is
        checked: then the fault is the policy's."""
        if self.finite_actions and not values.isfinite().all():
            raise EnvError(
                f"{self.name} returned {what} that are not finite numbers; correct it, or choose "
                "another environment."
            )

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        """As of every environment, with as many copies as there are draws (p, 1). Raises EnvError
        if the environment raises anything, or observations are not finite."""
        if len(draws) != self.num_envs:
            self.close()
            self.num_envs = len(draws)
            self.envs = self.make_envs(self.num_envs)
        seeds = (draws[:, 0].double() * 2**31).long().tolist()
        obs, _ = self.call(self.envs.reset, seed=seeds)
        obs = self.flat(obs)
        self.finite_actions = True
        self.check_finite("observations", obs)
        steps = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        return {"steps": steps}, obs.to(self.device)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        """As of every environment. Raises EnvError if the environment raises anything, or rewards
        or observations are not finite."""
        action = action.cpu()
        self.finite_actions = self.finite_actions and bool(action.isfinite().all())
        returned = self.call(self.envs.step, self.gym_action(action))
        obs, reward, terminated, truncated, info = returned

        obs = self.flat(obs)
        final_obs = obs
        if "final_obs" in info:
            final_obs = obs.clone()
            for index in info["_final_obs"].nonzero()[0].tolist():
                final_obs[index] = torch.as_tensor(info["final_obs"][index]).reshape(-1)
        reward = self.flat(reward)[:, 0]
        self.check_finite("rewards", reward)
        self.check_finite("observations", torch.cat([obs, final_obs]))

        terminated = torch.as_tensor(terminated)
        truncated = torch.as_tensor(truncated) & ~terminated
        step = Step(obs, reward, terminated, truncated, final_obs)
        step = Step(*(x.to(self.device) for x in step))
        steps = torch.where(step.terminated | step.truncated, 0, state["steps"] + 1)
        return {"steps": steps}, step


def is_bounded(space: Any) -> bool:
    """Whether a Box has dimensions, and bounds. The largest numbers of a type are no bounds."""
    width = space.high.astype(np.float64) - space.low.astype(np.float64)
    widest = 2.0**52 if space.dtype.kind in "iu" else np.finfo(np.float32).max
    return bool(width.size and (width < widest).all())


def registered_id(name: str) -> str:
    """The id that gymnasium's registry has for a name, after importing the module of "module:id".
    Without a version it is the newest one. Raises EnvError if there is no such module."""
    import gymnasium

    module, colon, id = name.rpartition(":")
    try:
        if colon:
            import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does
        message = " ".join(str(error).split()) or type(error).__name__
        raise EnvError(
            f"The module of {name} cannot be imported: {message}; install it, or add its folder to "
            "PYTHONPATH."
        ) from error
    specs = gymnasium.registry.values()
    versions = [spec.version for spec in specs if spec.id == f"{id}-v{spec.version}"]
    return f"{id}-v{max(versions)}" if versions else id


class MuJoCo(Simulation):
    """A model that MuJoCo simulates in batches, on as many threads as there are cores.

    state: physics (p, positions and velocities), float64, and nothing else, so it can be saved.
    """

    compilable = False
    skip = 1  # MuJoCo's own steps in one step

    def __init__(self, model: str, *args: Any):
        """model: a file, or XML."""
        super().__init__(*args)
        import mujoco
        from mujoco.rollout import Rollout

        mujoco.set_mju_user_warning(lambda message: None)  # by default a file, MUJOCO_LOG.TXT
        if model.startswith("<"):
            self.model = mujoco.MjModel.from_xml_string(model)
        else:
            self.model = mujoco.MjModel.from_xml_path(model)
        mujoco.set_mju_user_warning(None)

        threads = min(os.cpu_count() or 1, self.num_envs)
        self.scratch = [mujoco.MjData(self.model) for _ in range(threads)]
        self.pool = Rollout(nthread=threads)
        self.start = torch.tensor(self.model.qpos0, device=self.device)
        self.simulate = torch.compiler.disable(self.simulate)  # a decorator would slow every import

    def close(self) -> None:
        self.pool.close()

    def near_start(self, draws: Tensor, position: float, velocity: float) -> State:
        """Positions uniform within `position` of the model's own, velocities normal with standard
        deviation `velocity`. draws (p, positions + 2 velocities)."""
        uniform, normal = draws.double().split([self.model.nq, 2 * self.model.nv], -1)
        positions = self.start + position * (2 * uniform - 1)
        return {"physics": torch.cat([positions, velocity * normals(normal)], -1)}

    def simulate(self, physics: Tensor, action: Tensor) -> Tensor:
        """Positions and velocities (p, ...) after `skip` of MuJoCo's steps. action (p, b)."""
        before = torch.nn.functional.pad(physics.cpu(), (1, 0))  # the time, not used
        control = action.clamp(-1, 1).double().cpu()[:, None].repeat(1, self.skip, 1)
        after, _ = self.pool.rollout(self.model, self.scratch, before.numpy(), control.numpy())
        return torch.from_numpy(after[:, -1, 1:].copy()).to(self.device)


def gymnasium_model(name: str) -> str:
    """The file of a MuJoCo model that comes with gymnasium."""
    import gymnasium

    return str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / f"{name}.xml")


class HalfCheetah(MuJoCo):
    """gymnasium's HalfCheetah-v4: run. Six torques, 1,000 steps of 0.05 s, no failure. The size is
    the direction in degrees: half_cheetah:0 runs forwards as gymnasium's, half_cheetah:180 backwards.

    Observations: all positions but the one along the way, all velocities.
    Reward: the speed in the direction, minus a tenth of the action's squared length.
    """

    obs_size = 17
    obs_scale = (1.0,) * 8 + (5.0,) * 9
    action_size = 6
    max_steps = 1000
    min_size = 0
    reset_draws = 9 + 2 * 9
    skip = 5
    seconds = 0.05  # of a step

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(gymnasium_model("half_cheetah"), *args)
        self.direction = math.cos(math.radians(size))

    def reset_env(self, draws: Tensor) -> State:
        return self.near_start(draws, 0.1, 0.1)

    def get_obs(self, state: State) -> Tensor:
        return state["physics"][:, 1:].to(self.dtype)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        speed = ((moved[:, 0] - state["physics"][:, 0]) / self.seconds).to(self.dtype)
        reward = self.direction * speed - self.effort(action)
        return {"physics": moved}, reward, never(reward)

    def effort(self, action: Tensor) -> Tensor:
        """What an action (..., b) costs."""
        return 0.1 * (action.clamp(-1, 1) ** 2).sum(-1)

    def speed(self, reward: Tensor, action: Tensor) -> Tensor:
        return reward + self.effort(action)


class Ant(MuJoCo):
    """gymnasium's Ant-v4, rewarded for its speed in a direction. The size is the direction in
    degrees: ant:0 runs forwards as gymnasium's, ant:180 backwards (Ant-Dir). Eight torques.

    Observations: height, orientation, joints, all velocities. Reward: the speed along the
    direction, plus one, minus half of the action's squared length. An episode ends after 1,000
    steps of 0.05 s, or when the torso is below 0.2 m or above 1 m.
    """

    obs_size = 27
    obs_scale = (1.0,) * 13 + (5.0,) * 14
    action_size = 8
    max_steps = 1000
    min_size = 0
    reset_draws = 15 + 2 * 14
    skip = 5
    seconds = 0.05  # of a step
    min_height = 0.2  # m
    max_height = 1.0  # m

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(gymnasium_model("ant"), *args)
        angle = math.radians(size)
        direction = [math.cos(angle), math.sin(angle)]
        self.direction = torch.tensor(direction, dtype=torch.float64, device=self.device)

    def reset_env(self, draws: Tensor) -> State:
        return self.near_start(draws, 0.1, 0.1)

    def get_obs(self, state: State) -> Tensor:
        return state["physics"][:, 2:].to(self.dtype)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        velocity = (moved - state["physics"])[:, :2] @ self.direction / self.seconds
        reward = velocity.to(self.dtype) + 1 - self.effort(action)
        height = moved[:, 2]
        healthy = (height >= self.min_height) & (height <= self.max_height)
        healthy = healthy & moved.isfinite().all(-1)
        return {"physics": moved}, reward, ~healthy

    def effort(self, action: Tensor) -> Tensor:
        """What an action (..., b) costs."""
        return 0.5 * (action.clamp(-1, 1) ** 2).sum(-1)

    def speed(self, reward: Tensor, action: Tensor) -> Tensor:
        return reward - 1 + self.effort(action)


class DMCartPole(MuJoCo):
    """DeepMind Control's cartpole: a cart of 1 kg on a rail of 3.6 m, a pole of 1 m and 0.1 kg. The
    pole starts near upright, or with `swing_up` near the opposite. 1,000 steps of 0.01 s.

    One action, the force in units of 10 N. Observations: position, cos and sin of the angle,
    velocity, angular velocity. Reward, at most 1: how upright, times how near to the centre, times
    how small the action, times how slow the pole.
    """

    obs_size = 5
    obs_scale = (1.0, 1.0, 1.0, 1.0, 3.0)
    action_size = 1
    max_steps = 1000
    reset_draws = 2 + 2 * 4
    xml = """<mujoco><option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
        <worldbody><body pos="0 0 1">
        <geom type="box" size="0.2 0.15 0.1" mass="1"/>
        <joint name="rail" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8"
        solreflimit="0.08 1" damping="5e-4"/>
        <body><joint type="hinge" axis="0 1 0" damping="2e-6"/>
        <geom type="capsule" fromto="0 0 0 0 0 1" size="0.045" mass="0.1"/>
        </body></body></worldbody>
        <actuator><motor joint="rail" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
        </mujoco>"""

    def __init__(self, *args: Any, swing_up: bool = False):
        super().__init__(self.xml, *args)
        self.swing_up = swing_up
        double = {"dtype": torch.float64, "device": self.device}
        self.spread = torch.tensor([0.1, 0.034], **double)
        self.hanging = torch.tensor([0.0, math.pi], **double)

    def reset_env(self, draws: Tensor) -> State:
        uniform, normal = draws.double().split([2, 8], -1)
        noise = 0.01 * normals(normal)
        positions = self.spread * (2 * uniform - 1)
        if self.swing_up:
            positions = self.hanging + noise[:, :2]
        return {"physics": torch.cat([positions, noise[:, 2:]], -1)}

    def get_obs(self, state: State) -> Tensor:
        x, angle, velocity, spin = state["physics"].unbind(-1)
        return torch.stack([x, angle.cos(), angle.sin(), velocity, spin], -1).to(self.dtype)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved = self.simulate(state["physics"], action)
        x, angle, _, spin = moved.unbind(-1)
        upright = (1 + angle.cos()) / 2
        centred = (1 + 0.1 ** ((x / 2) ** 2)) / 2
        small = (5 - action[:, 0].double().clamp(-1, 1) ** 2) / 5
        slow = (1 + 0.1 ** ((spin / 5) ** 2)) / 2
        reward = (upright * centred * small * slow).to(self.dtype)
        return {"physics": moved}, reward, never(reward)
