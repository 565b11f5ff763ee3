"""What is simulated outside of PyTorch: gymnasium's environments, and MuJoCo in batches."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Env, EnvError, Simulated, State, Step, normals


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
