"""Batched environments on tensors, as pure functions that torch.compile can take.

    env = make("cartpole", num_envs=64)
    state, obs = env.reset(draws)                  # obs (p, a)
    state, step = env.step(state, action, draws)   # action (p,) int64, or (p, b) if continuous

The state is a dict of tensors (p, ...) that is passed in and returned; the environment keeps none.
It has no random numbers of its own either. `reset` takes uniform numbers (p, env.lifetime_draws) in
[0, 1), and `step` takes (p, env.num_draws), so the caller decides what is random, what is repeated,
and what the members of a population share.

A name may have a size and a wrapper. "independent_bandit:8" has eight arms, "grid_world:5" five
rows and columns. "scaled_cartpole" has observations of magnitude one, "shuffled_cartpole" also
permutes observations and actions, "projected_cartpole" multiplies observations by a random matrix.
An environment of gymnasium has the name that gymnasium gives it: "HalfCheetah-v4", "HalfCheetah"
for its newest version, "package.module:Name-v0" if importing that module registers it. The state of
such an environment is inside gymnasium, but for those in SAME: these are ours, equal step by step, but
several times as fast, and with a state that can be saved.

Environments reset themselves. A step that ends an episode, because it terminated (the task is over)
or was truncated (the time is up), returns the reward of that step, in `final_obs` the observation
of the state that the action led to, and in `obs` the first observation of the next episode. A loop
over steps then needs no branch: bootstrap from final_obs, act on obs. Between ends the two are
equal. With `next_step_reset` they always are: the next episode begins with the step after, which
ignores its action and pays 0, so that observation, reward and end belong to one state.

Axes: p environments in parallel, a observations, b actions or action dimensions.
"""

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from common.envs.base import Env, EnvError, State, Step

__all__ = ["ENVS", "Env", "EnvError", "State", "Step", "base_name", "make", "novelty"]

ENVS = {  # name: module and class, imported when the name is asked for
    "bandit": "bandits:Bandit",
    "swapping_bandit": "bandits:SwappingBandit",
    "independent_bandit": "bandits:IndependentBandit",
    "dependent_bandit": "bandits:DependentBandit",
    "easy_bandit": "bandits:DependentBandit",
    "medium_bandit": "bandits:DependentBandit",
    "hard_bandit": "bandits:DependentBandit",
    "contextual_bandit": "bandits:ContextualBandit",
    "cartpole": "cartpole:CartPole",
    "upright_cartpole": "cartpole:UprightCartPole",
    "balance_cartpole": "cartpole:BalanceCartPole",
    "continuous_cartpole": "cartpole:ContinuousCartPole",
    "cart_swing_up": "cartpole:CartSwingUp",
    "mountain_car": "classic:MountainCar",
    "continuous_mountain_car": "classic:ContinuousMountainCar",
    "mountain_car_climb": "classic:MountainCarClimb",
    "acrobot": "classic:Acrobot",
    "acrobot_swing_up": "classic:AcrobotSwingUp",
    "pendulum": "classic:Pendulum",
    "point_mass": "tasks:PointMass",
    "reacher": "tasks:Reacher",
    "grid_world": "grid:GridWorld",
    "swapped_grid_world": "grid:GridWorld",
    "dense_grid_world": "grid:DenseGridWorld",
    "hidden_goal": "grid:HiddenGoal",
    "heading": "tasks:Heading",
    "heading_3d": "tasks:Heading",
    "half_cheetah": "mujoco:HalfCheetah",
    "ant": "mujoco:Ant",
    "dm_cartpole": "mujoco:DMCartPole",
    "dm_cartpole_swing_up": "mujoco:DMCartPole",
}
OF_A_MODULE = re.compile(r":[A-Z]|:.*-v\d+$")  # module:Name-v0
SAME = {"HalfCheetah-v4": "half_cheetah", "HalfCheetah-v5": "half_cheetah"}  # gymnasium's name and ours
VARIANTS: dict[str, dict[str, Any]] = {  # options of the names that share a class
    "easy_bandit": {"better": 0.9},
    "medium_bandit": {"better": 0.75},
    "hard_bandit": {"better": 0.6},
    "swapped_grid_world": {"swapped": True},
    "heading_3d": {"dims": 3},
    "dm_cartpole_swing_up": {"swing_up": True},
}
WRAPPERS = {
    "scaled": "wrappers:Scaled",
    "shuffled": "wrappers:Shuffled",
    "projected": "wrappers:Projected",
}


def make(
    name: str,
    num_envs: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    scaled: bool = False,
    parallel: bool = False,
    compile: bool = False,
    next_step_reset: bool = False,
    repeat: int = 1,
    **options: Any,
) -> Env:
    """An environment by its name; `options` are those of its class.

    scaled: observations of magnitude one, also where the name does not say so (of gymnasium's
    environments the magnitude is not known; they stay as they are).
    parallel: each copy of a gymnasium environment in a process of its own.
    compile: a step made by torch.compile, 2 to 10 times as fast on a CPU. It needs a C++ compiler
    and seconds for each environment and number of copies; PyTorch keeps 8 of them in a process.
    Environments that are not made of tensor operations stay as they are.
    next_step_reset: see above.
    repeat: each action is taken for so many steps, as one step whose reward is their sum divided by this number.
    Raises EnvError for a name or a size that does not exist, and where nothing can be repeated.
    """
    wrapper, _, inner = name.partition("_")
    base, colon, _ = name.partition(":")
    if name in SAME and not options:
        base = SAME[name]

    if wrapper in WRAPPERS:
        options |= {"parallel": parallel, "next_step_reset": next_step_reset, "repeat": repeat}
        env = make(inner, num_envs, device, dtype, **options)
        if not env.obs_size:
            raise EnvError(f"There is nothing to be {wrapper} in {inner}: it has no observations.")
        env = load(WRAPPERS[wrapper])(env)
    elif base in ENVS and not OF_A_MODULE.search(name):
        env_class = load(ENVS[base])
        if colon:
            options["size"] = checked_size(name, env_class.min_size)
        env = env_class(num_envs, device, dtype, **VARIANTS.get(base, {}), **options)
        if name in SAME:
            env.obs_scale = (1.0,) * env.obs_size  # as of all gymnasium's
        env.next_step_reset = next_step_reset and env.episodic
        if repeat > 1:
            env = load("wrappers:Repeated")(env, repeat)
    elif re.search(r"[A-Z/]|:\D|-v\d+$", name):
        gymnasium = load("mujoco:Gymnasium")
        if repeat > 1:
            raise EnvError(f"Actions of {name} cannot be repeated; wrap it in your own code.")
        options |= {"parallel": parallel, "next_step_reset": next_step_reset}
        env = gymnasium(name, num_envs, device, dtype, **options)
    else:
        raise EnvError(
            f"There is no environment {name}; there are {', '.join(ENVS)}, and those of gymnasium, "
            "such as HalfCheetah-v4 or package.module:Name-v0."
        )

    if scaled and any(scale != 1 for scale in env.obs_scale):
        env = load(WRAPPERS["scaled"])(env)
    if compile and env.compilable:
        env.step = torch.compile(env.step, dynamic=False)
    return env


def base_name(name: str) -> str:
    """A name without wrappers and size. Names that share it are variants of one task."""
    wrapper, _, inner = name.partition("_")
    if wrapper in WRAPPERS:
        return base_name(inner)
    base = name.partition(":")[0]
    return base if base in ENVS and not OF_A_MODULE.search(name) else name


def novelty(name: str, seen: Iterable[str]) -> str:
    """What an environment is after meta-training in `seen`: none, the same, by whatever name; task, one
    of another size or wrapper; domain, another one."""
    name, *seen = (SAME.get(one, one).removeprefix("scaled_") for one in (name, *seen))
    related = base_name(name) in map(base_name, seen)
    return "none" if name in seen else "task" if related else "domain"


def checked_size(name: str, least: int | None) -> int:
    """The size in "name:size". Raises EnvError if it is not a number from `least` to 1000."""
    base, _, size = name.partition(":")
    if least is None:
        raise EnvError(f"{base} has no size; leave out :{size}.")
    if not size.isdecimal() or not least <= int(size) <= 1000:
        raise EnvError(f"The size in {name} has to be a number from {least} to 1000.")
    return int(size)


def load(path: str) -> Any:
    """The class that "module:Class" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
