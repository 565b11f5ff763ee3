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

from importlib import import_module
from typing import Any

import torch

from common.envs.base import Env, EnvError, State, Step

__all__ = ["ENVS", "Env", "EnvError", "State", "Step", "make"]

ENVS = {  # name: module of this package and class, imported when a name is asked for
    "bandit": "bandits:Bandit",
    "swapping_bandit": "bandits:SwappingBandit",
    "independent_bandit": "bandits:IndependentBandit",
    "dependent_bandit": "bandits:DependentBandit",
    "easy_bandit": "bandits:EasyBandit",
    "medium_bandit": "bandits:MediumBandit",
    "hard_bandit": "bandits:HardBandit",
    "contextual_bandit": "bandits:ContextualBandit",
    "cartpole": "cartpole:CartPole",
    "upright_cartpole": "cartpole:UprightCartPole",
    "continuous_cartpole": "cartpole:ContinuousCartPole",
    "cart_swing_up": "cartpole:CartSwingUp",
    "mountain_car": "classic:MountainCar",
    "continuous_mountain_car": "classic:ContinuousMountainCar",
    "acrobot": "classic:Acrobot",
    "pendulum": "classic:Pendulum",
    "point_mass": "tasks:PointMass",
    "reacher": "tasks:Reacher",
    "grid_world": "grid:GridWorld",
    "swapped_grid_world": "grid:SwappedGridWorld",
    "dense_grid_world": "grid:DenseGridWorld",
    "hidden_goal": "grid:HiddenGoal",
    "heading": "tasks:Heading",
    "flight": "tasks:Flight",
    "half_cheetah": "mujoco:HalfCheetah",
    "ant": "mujoco:Ant",
    "dm_cartpole": "mujoco:DMCartPole",
}
WRAPPERS = {"scaled": "wrappers:Scaled", "shuffled": "wrappers:Shuffled", "projected": "wrappers:Projected"}
SMALLEST = {  # of the environments with a size
    "independent_bandit": 2,
    "contextual_bandit": 2,
    "grid_world": 2,
    "swapped_grid_world": 2,
    "dense_grid_world": 3,
    "hidden_goal": 0,
    "heading": 0,
    "flight": 0,
    "ant": 0,
}


def find(path: str) -> Any:
    """The class of "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


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
        return find(WRAPPERS[wrapper])(env)
    base, colon, size = name.partition(":")
    if base[:1].isupper() and not colon:
        return find("mujoco:Gymnasium")(name, num_envs, device, dtype, **options)
    if base not in ENVS:
        raise EnvError(f"There is no environment {base}; there are {', '.join(ENVS)}.")
    if colon:
        smallest = SMALLEST.get(base)
        if smallest is None:
            raise EnvError(f"{base} has no size; leave out :{size}.")
        if not size.isdecimal() or int(size) < smallest:
            raise EnvError(f"The size in {name} has to be a number, at least {smallest}.")
        options["size"] = int(size)
    return find(ENVS[base])(num_envs, device, dtype, **options)
