"""MetaGenRL: a learned objective function that trains agents in environments it never saw.

A small network is the loss: it reads what an agent did, backwards in time, and what the agent would do now, and its gradient is
what updates the agent. Critics estimate how good the agent's actions are after such a step; differentiating that through the
step improves the objective. At meta-test time the objective is fixed, and trains agents of any size from scratch.

Kirsch, "Automating AI Research" (2025), chapter 2 and appendix A; Kirsch, van Steenkiste and Schmidhuber, "Improving
Generalization in Meta Reinforcement Learning using Learned Objectives" (2020). Results: .github/results/metagenrl.md.

    Eq. 2.3                -> grad_reinforce, train_on_policy (baselines)
    Eq. 2.5                -> critic_gradient
    Eq. 2.6, A.2           -> meta_loss, meta_gradient
    Eq. A.1, section A.2.1 -> objective
    Algorithm 6            -> meta_train
    Algorithm 7            -> train_agents
    Section A.2.3          -> grad_critic (DDPG, TD3), train_on_policy (PPO), meta_train_rl2, evolve (EPG)
    Figures 2.3 to 2.6     -> meta_test (2.5a: metrics.csv of meta_train)

    python metagenrl.py                                           # small agents, small tasks: 8 minutes
    python metagenrl.py --envs LunarLanderContinuous HalfCheetah-v4 --test-envs Hopper-v4
    python metagenrl.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-envs continuous_cartpole

    objective = metagenrl.LearnedObjective.load("pretrained")                           # or "runs/NAME/checkpoint.pt"
    objective(actions, policy(obs), rewards, values, next_values, times).backward()    # trains your policy

The laptop preset was chosen in its environments of meta-training and in pendulum, reacher and continuous_cartpole, which are
therefore validation environments, although agents are not meta-trained there. Nothing was chosen in acrobot_swing_up and
mountain_car_climb, the test environments of tests/reproduce.py M1.

Axes, everywhere: p agents, s sub-trajectories in a batch, t time, e copies of an environment that an agent acts in, a
observations, b action dimensions, n hidden units, d all parameters of a network, m objectives. phi are policies, theta critics
(two for each agent), psi value functions of on-policy rules, alpha objectives. Agents of one environment form a group; in it,
every network of every agent is one row of a matrix, and all agents take a step at once. Replay buffers and batches are in
common/agents.py, networks in common/networks.py, PPO and RL^2 in common/policy_gradients.py.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from tqdm import tqdm

from common import checkpoints, envs, es, machine, policy_gradients
from common.agents import Agents, Batch, State, masked_mean, masked_std, mean_returns, standardized, sub_trajectories
from common.checkpoints import CheckpointError
from common.envs import Env, EnvError
from common.figures import plot
from common.flags import Count, CountOrZero, FlagError, Positive, PositiveOrZero, Seed, Share, check_ranges, from_dict
from common.machine import can_compile, keep_memory, lock
from common.networks import Network, adam, gradient, half_squares, init_adam
from common.policy_gradients import RL2, discounted, update_agents
from common.results import MetricsLog, result_row, table, to_json

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["metagenrl", "epg", "rl2", "untrained", "td3", "reinforce-off", "reinforce-on", "ppo"]
Input = Literal["reward", "value", "next_value", "time", "gain"]
Size = Annotated[int, (1, 2**14)]  # of an axis


@dataclass
class PPOArgs:
    """PPO, and REINFORCE on fresh data; defaults are Spinning Up's (A.2.3)."""

    num_steps: Count = 4_000
    """Steps of an agent between updates."""
    update_epochs: Count = 80
    """Steps of Adam on each rollout, for the value function and PPO's policy."""
    lr: Positive = 3e-4
    """Adam's learning rate for the policy; the value function has --critic-lr."""
    clip_coef: Share = 0.2
    """How far probabilities may move."""
    target_kl: Positive = 0.015
    """An agent's policy stays as it is once it has moved this far on a rollout (Spinning Up: 1.5 times 0.01)."""


@dataclass
class EPGArgs:
    """EPG, which meta-learns the same objective by evolution."""

    generations: Count = 1_907
    """Outer steps; with all agents of a generation 1 G environment steps (section 2.5.1, footnote 6)."""
    pairs: Size = 32
    """Pairs of objectives in a generation (A.2.3: V = 64)."""
    sigma: Positive = 0.05
    """Standard deviation of the noise on their parameters (not in the thesis)."""
    life_steps: Count = 8_192
    """Steps that an agent is trained for (A.2.3: 128 updates of 64 steps)."""


@dataclass
class RL2Args:
    """RL^2, an LSTM that is the agent and the learning, meta-trained by PPO with --ppo.clip-coef."""

    trial_steps: Count = 100_000_000
    """Steps of meta-training in all environments, without those after a trial's end (section 2.5.1, footnote 6)."""
    trials: Size = 16
    """Trials of two episodes in each environment, in an update; more where episodes are short (not in the thesis)."""
    units: Size = 64
    """Units of the LSTM (A.2.3)."""
    lr: Positive = 3e-3
    """Adam's learning rate at first; it falls linearly to zero (A.2.3: rllib's, which had 5e-5)."""
    epochs: Count = 10
    """Passes over the trials of an update (rllib: 30)."""
    num_minibatches: Size = 4
    """Parts that these trials are in; each is a step of PPO (rllib: of 128 steps)."""
    sizes: tuple[Size, Size] | None = None
    """Observations and action dimensions (default: as the environments need); fewer are padded with zeros (A.2.3)."""


@dataclass
class Args:
    """MetaGenRL (chapter 2): meta-learn the loss that agents are trained with, then train agents elsewhere with it."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse updates with torch.compile (needs a C++ compiler on a CPU), also in a meta-test of more than 10,000 updates."""
    mode: Literal["train", "test"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint."""
    checkpoint: str | None = None
    """The checkpoint.pt to meta-test, or "pretrained"."""
    resume: str | None = None
    """A run folder to continue in, exactly where the run stopped."""
    run_dir: str = "runs"
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-environments-learner-seed-time)."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: Count = 20_000
    """Meta-steps between checkpoints. They hold the replay buffers; environments of gymnasium are reset at each."""

    learner: Name = "metagenrl"
    """What trains agents at meta-test time. Meta-learned: metagenrl, epg, rl2. untrained: the objective before meta-training;
    td3: the critic's gradient; reinforce-off: REINFORCE with GAE on replayed data; reinforce-on: on fresh data; ppo."""
    baselines: tuple[Name, ...] = ("untrained", "td3", "reinforce-off")
    """What else trains agents, for as many steps; nothing that would have to be meta-learned."""

    envs: tuple[str, ...] = ("LunarLanderContinuous-v3", "HalfCheetah-v4")
    """Environments to meta-train in (section 2.5). Gymnasium's have their own names, or package.module:Name-v0."""
    test_envs: tuple[str, ...] = ("Hopper-v4",)
    """Environments to meta-test in, beside --envs (section 2.5). The laptop preset's are validation environments."""
    test_seen: bool = True
    """Meta-test in --envs too."""
    env_steps: Count = 600_000
    """Steps of each agent in its environment, meta-training (section 2.5; Table A.3's 1 M are a meta-test's)."""
    test_steps: Count = 1_000_000
    """Steps of each agent, meta-test (section 2.5)."""
    num_envs: Size = 1
    """e, copies of its environment that an agent acts in; there is one update for a step of all of them (not in the thesis)."""

    population: Size = 20
    """Agents, distributed equally over --envs (section 2.5)."""
    objectives: Size = 1
    """m, objectives meta-trained side by side, each by a population of its own: seeds as a batch axis (Table 2.1: 6)."""
    layers: Annotated[int, (1, 32)] = 2
    """Hidden layers of critic and policy (Table A.2 counts the output too: section 2.3.3's 384 K parameters)."""
    hidden: Size = 350
    """Units of each (Table A.2)."""
    objective_units: Size = 32
    """Units of the objective's LSTM (Table A.2)."""
    objective_filters: Annotated[int, (2, 2**14)] = 32
    """Units of its other networks, 3 deep: of actions (Table A.2), of the other inputs, of outputs (both the authors')."""
    inputs: tuple[Input, ...] = ("reward", "value", "next_value", "time")
    """The objective's inputs beside both actions (section 2.3.2; fewer: Figure 2.5). gain: next_value minus value."""
    bound: Positive = 1000.0
    """eta, bound of the objective's value at each step (Table A.2)."""

    length: Size = 20
    """Steps of a sub-trajectory (Table A.3)."""
    batch_size: Size = 100
    """Sub-trajectories in an update of an agent, and in each inner step (Table A.3)."""
    buffer_size: Count = 1_000_000
    """Transitions that a replay buffer holds (not in the thesis)."""
    critic_lr: Positive = 1e-3
    """lambda_1, Adam (Table A.3)."""
    policy_lr: Positive = 1e-3
    """lambda_2, Adam, of agents in meta-training (Table A.3)."""
    test_policy_lr: Positive = 1e-3
    """Adam, of agents that an objective trains in a meta-test, or in EPG (Table A.3: lambda_2, for both)."""
    inner_lr: Positive = 1e-3
    """lambda_3, the step of Eq. 2.6, on the sum over a batch (Table A.3)."""
    inner_steps: Size = 1
    """Steps of Eq. 2.6 before the critic's estimate, each on a batch of its own; 2 is Eq. A.2 (Figure 2.6: 1, 3, 5)."""
    inner_normalized: bool = False
    """Scale the gradient in Eq. 2.6 to length one (not in the thesis)."""
    value_scaled: bool = False
    """Divide the critic's value in Eq. 2.6 by its deviation over the batch: environments weigh alike (not in the thesis)."""
    objective_lr: Positive = 1e-3
    """lambda_4, Adam (Table A.3)."""
    objective_lr_decay: bool = False
    """Let it fall to zero linearly (not in the thesis)."""
    max_grad_norm: Positive = 1.0
    """Largest norm of gradients (Table A.3), but of the inner step, of epg, and of ppo and reinforce-on (Spinning Up)."""
    gamma: Share = 0.99
    """gamma (Table A.3)."""
    tau: Share = 0.005
    """Step of target networks towards the others (Table A.3)."""
    policy_noise: PositiveOrZero = 0.2
    """Standard deviation of noise on the action in a critic's target (Table A.3: critic noise)."""
    noise_clip: PositiveOrZero = 0.5
    """Its bound (Table A.3)."""
    policy_frequency: Count = 2
    """Updates of the critic for each one of policy and objective (A.2.2)."""
    exploration_noise: tuple[PositiveOrZero, ...] = (0.1,)
    """Standard deviation of noise on actions taken (Table A.3). Several: one for each copy, in turn (not in the thesis)."""
    random_steps: CountOrZero = 10_000
    """Steps of an agent that are random, at first (Table A.3)."""
    frozen_steps: CountOrZero = 0
    """Steps of an agent during which its policy is not trained, and trains no objective (not in the thesis)."""
    anneal_steps: CountOrZero = 10_000
    """Steps, after --frozen-steps, in which the objective's gradient takes over from the critic's in meta-training (A.2.2)."""
    reset_every: CountOrZero = 0
    """Steps after which another quarter of the agents is reset, so that some are fresh; 0: never (not in the thesis)."""
    gae_lambda: Share = 0.97
    """reinforce-off, reinforce-on, ppo, rl2: lambda of generalised advantages (Spinning Up's; not in the thesis)."""
    reinforce_lr: Positive = 1e-3
    """reinforce-off: Adam's learning rate for the policy (Table A.3)."""
    td3_lr: Positive = 1e-3
    """td3: Adam's learning rate for the policy (Table A.3)."""
    ppo: PPOArgs = field(default_factory=PPOArgs)
    epg: EPGArgs = field(default_factory=EPGArgs)
    rl2: RL2Args = field(default_factory=RL2Args)

    test_seeds: Size = 6
    """Agents that each learner trains in each environment, for each objective (Figure 2.3: 2 for each of 6; others: 6)."""
    evaluations: Count = 20
    """Times that agents are evaluated along the way, without noise."""
    episodes: Size = 4
    """Episodes in an evaluation of an agent."""
    progress: bool = False
    """Meta-test objectives from earlier in meta-training too: 5, 14 (Figure 2.4: 28 K and 86 K steps), 20, 40, 60 and 80 %,
    without those from before policies are trained (--frozen-steps), as nothing changed the objective until then."""
    each: bool = False
    """Draw a thin line for each agent beside their mean, and keep its returns in results.json (Figure A.5)."""
    log_every: Count = 100
    """Meta-steps, each one step of every copy, that a line of metrics.csv is the mean of."""


LAPTOP = dict(
    envs=("point_mass", "cart_swing_up"),  # they need no processes of their own
    test_envs=("pendulum", "reacher"),
    env_steps=60_000,  # what minutes allow
    test_steps=10_000,
    num_envs=4,  # environments cost less than updates
    population=16,
    hidden=32,
    objective_units=24,
    objective_filters=16,
    inputs=("reward", "value", "next_value", "time", "gain"),
    length=10,
    batch_size=10,
    buffer_size=20_000,
    compile=False,  # it takes longer than it saves, the first time
    critic_lr=3e-3,  # few steps
    tau=0.02,  # likewise
    policy_lr=3e-4,  # policies saturate if they are fast before the objective is meta-trained
    test_policy_lr=3e-3,  # searched in `envs` (results page)
    reinforce_lr=3e-3,  # likewise
    td3_lr=1e-2,  # likewise
    ppo=PPOArgs(num_steps=400, lr=3e-3),  # likewise, also for on-policy REINFORCE
    epg=EPGArgs(generations=10, pairs=8, life_steps=6_000),  # three minutes
    rl2=RL2Args(trial_steps=1_000_000),  # as many as MetaGenRL's agents have together
    inner_lr=0.02,  # of a gradient of length one
    inner_normalized=True,  # the objective's scale is free
    value_scaled=True,  # returns differ tenfold between environments
    objective_lr=3e-3,  # few steps
    objective_lr_decay=True,  # no worse than without it (results page)
    exploration_noise=(0.05, 0.1, 0.2, 0.4),
    random_steps=2_000,
    frozen_steps=2_000,  # until the critics have learned something
    anneal_steps=3_200,
    reset_every=2_500,  # an agent lives as long as in the meta-test
    checkpoint_every=500,
    log_every=20,
    test_seeds=5,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP}


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Nets(NamedTuple):
    """The networks of agents in one environment, and of the objective."""

    policy: Network
    critic: Network
    value: Network
    of_inputs: Network
    of_actions: Network
    of_hidden: Network
    units: int  # of the objective's LSTM
    on_policy: bool  # Spinning Up's networks, whose actions the environment has to clip

    def act(self, phi: Tensor, obs: Tensor) -> Tensor:
        """pi_phi(s), deterministic. phi (p, d), obs (p, ..., a) -> (p, ..., b) in [-1, 1], or unbounded."""
        action = self.policy(phi, obs)
        return action if self.on_policy else action.tanh()

    def q(self, theta: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """Q_theta(s, a) (p, s, t) of one critic, theta (p, d); of both, theta (2, p, d), (2, p, s, t) in one product."""
        critics = theta.flatten(0, -2)
        x = torch.cat([obs, action], -1).repeat(len(critics) // len(obs), 1, 1, 1)
        return self.critic(critics, x)[..., 0].unflatten(0, theta.shape[:-1])

    @property
    def lstm_shapes(self) -> list[tuple[int, int]]:
        """Of inputs, hidden state, bias."""
        n = self.units
        return [(self.of_inputs.sizes[-1] + self.of_actions.sizes[-1], 4 * n), (n, 4 * n), (1, 4 * n)]

    @property
    def objective_sizes(self) -> list[int]:
        """Parameters of the objective's parts: networks of inputs, of actions and of hidden states, and the LSTM."""
        parts = [self.of_inputs.d, self.of_actions.d, self.of_hidden.d]
        return parts + [math.prod(shape) for shape in self.lstm_shapes]

    def init_objective(self, m: int, generator: torch.Generator) -> Tensor:
        """alpha (m, d)."""
        parts = [net.init(m, generator) for net in (self.of_inputs, self.of_actions, self.of_hidden)]
        bound = 1 / math.sqrt(self.units)
        parts += [bound * (2 * torch.rand(m, size, generator=generator) - 1) for size in self.objective_sizes[3:]]
        parts[-1][:, self.units : 2 * self.units] += 1  # of the forget gate
        return torch.cat(parts, -1)


def make_nets(args: Args, obs_size: int, action_size: int, on_policy: bool = False) -> Nets:
    hidden, filters = (args.hidden,) * args.layers, (args.objective_filters,) * 2
    squares = partial(Network, activation=half_squares)
    spinning_up = partial(Network, activation=torch.tanh, normalized=False)  # its benchmarks have 64 and 32 units
    return Nets(
        policy=spinning_up((obs_size, 64, 32, action_size)) if on_policy else Network((obs_size, *hidden, action_size)),
        critic=Network((obs_size + action_size, *hidden, 1)),
        value=spinning_up((obs_size, 64, 32, 1)),
        of_inputs=squares((len(args.inputs), *filters, 8), normalized=False),
        of_actions=squares((2, *filters, args.objective_filters), linear_output=False),
        of_hidden=squares((args.objective_units, *filters, 1)),
        units=args.objective_units,
        on_policy=on_policy,
    )


def objective(args: Args, nets: Nets, alpha: Tensor, batch: Batch, action: Tensor, value: Tensor, next_value: Tensor) -> Tensor:
    """L_alpha at every step (section 2.3.2, A.2.1, Figure 2.2). alpha (p, d): an objective for each agent; action (p, s, t, b)
    is pi_phi(s), the one input that a gradient flows through; values (p, s, t), standardised by one mean and deviation, so that
    V_t of one step is V_{t+1} of the step before, and a terminal state's is zero. Returns l_t (p, s, t), zero where mask is."""
    of_inputs, of_actions, of_hidden, *lstm = alpha.split(nets.objective_sizes, -1)
    w_x, w_h, bias = (part.unflatten(-1, shape) for part, shape in zip(lstm, nets.lstm_shapes, strict=True))
    has_next = batch.mask * (1 - batch.terminated)
    both = standardized(torch.cat([value, next_value], 2), torch.cat([batch.mask, has_next], 2))
    inputs = {"reward": standardized(batch.reward, batch.mask), "time": batch.time}
    inputs |= {"value": both[:, :, : value.shape[2]], "next_value": has_next * both[:, :, value.shape[2] :]}
    inputs["gain"] = has_next * standardized(next_value - value, has_next)
    x = nets.of_inputs(of_inputs, torch.stack([inputs[name] for name in args.inputs], -1))
    pair = torch.stack([batch.action, action], -1)  # (p, s, t, b, 2)
    embedding = nets.of_actions(of_actions, pair).mean(-2)  # Eq. A.1: whatever the number of action dimensions
    x = torch.baddbmm(bias, torch.cat([x, embedding], -1).flatten(1, 2), w_x).unflatten(1, batch.mask.shape[1:])
    h = c = torch.zeros_like(x[:, :, 0, : nets.units])
    hidden = []
    for t in reversed(range(x.shape[2])):  # backwards: an action is judged by what came of it
        i, f, o, g = torch.baddbmm(x[:, :, t], h, w_h).chunk(4, -1)
        c = batch.mask[:, :, t, None] * (f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
    l_t = nets.of_hidden(of_hidden, torch.stack(hidden[::-1], 2))[..., 0]
    return batch.mask * args.bound * (l_t / args.bound).tanh()


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def values(nets: Nets, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
    """V_t and V_{t+1} = Q_theta(s, pi_phi(s)) (p, s, t), constants; a terminal state's is zero."""
    obs = torch.cat([batch.obs, batch.next_obs], 2)
    value, next_value = nets.q(state["theta"][0], obs, nets.act(state["phi"], obs)).chunk(2, -1)
    return value, next_value * (1 - batch.terminated)


def critic_gradient(args: Args, nets: Nets, state: State, batch: Batch, noise: Tensor) -> Tensor:
    """Eq. 2.5 for both critics of every agent, with TD3's smoothed actions and the smaller of two targets. Time limits are not
    the end. noise (p, s, t, b) standard normal. Returns (2, p, d)."""
    smooth = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
    next_action = (nets.act(state["target_phi"], batch.next_obs) + smooth).clamp(-1, 1)
    next_q = nets.q(state["target_theta"], batch.next_obs, next_action).amin(0)
    y = batch.reward + args.gamma * (1 - batch.terminated) * next_q

    def loss(theta: Tensor) -> Tensor:
        return masked_mean(((nets.q(theta, batch.obs, batch.action) - y) ** 2).sum(0), batch.mask).sum()

    return gradient(loss)(state["theta"])[0]


def policy_loss(args: Args, nets: Nets, alpha: Tensor, state: State, batch: Batch, phi: Tensor) -> Tensor:
    """L_alpha of policies phi (p, d) at every step (p, s, t)."""
    return objective(args, nets, alpha, batch, nets.act(phi, batch.obs), *values(nets, state, batch))


def grad_objective(args: Args, nets: Nets, alpha: Tensor, state: State, batch: Batch) -> Tensor:
    """The gradient of the mean of L_alpha over all steps with respect to the policies (p, d). That of the sum would be clipped
    to length one always, however small the objective's gradient is."""

    def loss(phi: Tensor) -> Tensor:
        return masked_mean(policy_loss(args, nets, alpha, state, batch, phi), batch.mask).sum()

    return gradient(loss)(state["phi"])[0]


def grad_critic(args: Args, nets: Nets, _: Tensor, state: State, batch: Batch) -> Tensor:
    """The gradient of minus Q_theta(s, pi_phi(s)) with respect to the policies: DDPG, and with the rest of this file TD3."""

    def loss(phi: Tensor) -> Tensor:
        return -masked_mean(nets.q(state["theta"][0], batch.obs, nets.act(phi, batch.obs)), batch.mask).sum()

    return gradient(loss)(state["phi"])[0]


def clipped(args: Args, g: Tensor) -> Tensor:
    """Gradients (..., d) with norms of at most --max-grad-norm."""
    return g * (args.max_grad_norm / (g.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1)


def update_critics(args: Args, nets: Nets, state: State, batch: Batch, noise: Tensor) -> State:
    g = clipped(args, critic_gradient(args, nets, state, batch, noise))
    return adam(state, "theta", g, args.critic_lr, torch.ones_like(state["age"], dtype=torch.bool))


def update_policies(
    args: Args, nets: Nets, policy_gradient: Callable, alpha: Tensor, state: State, batch: Batch, share: Tensor | None
) -> State:
    """A step of policies along `policy_gradient`, or a share of it and for the rest the critic's (A.2.2); then targets move
    towards the others (TD3)."""
    g = clipped(args, policy_gradient(args, nets, alpha, state, batch))
    if share is not None:
        g = share * g + (1 - share) * clipped(args, grad_critic(args, nets, alpha, state, batch))
    new = adam(state, "phi", g, args.policy_lr, state["age"] >= args.frozen_steps)
    new["target_phi"] = state["target_phi"].lerp(new["phi"], args.tau)
    new["target_theta"] = state["target_theta"].lerp(state["theta"], args.tau)
    return new


def act(args: Args, nets: Nets, state: State, noise: Tensor, uniform: Tensor) -> Tensor:
    """Actions (p, e, b): the policy's, explored around with noise (p, e, b); at first random, uniform (p, e, b) in [0, 1). An
    agent that is not finite does nothing until it is reset."""
    action = (nets.act(state["phi"], state["obs"]) + noise).clamp(-1, 1).nan_to_num()
    return torch.where((state["age"] < args.random_steps)[:, None, None], 2 * uniform - 1, action)


def train_agents(args: Args, group: "Group", policy_gradient: Callable, alpha: Tensor) -> Iterator[int]:
    """Algorithm 7: agents learn from scratch, with policies that descend `policy_gradient`. alpha (p, d). Yields how many
    steps each of their copies has made, after each."""
    for now in range(1, group.steps + 1):
        group.step_async()
        group.step_wait(now - 1)
        learn(args, group, policy_gradient, alpha, now)
        yield now


def learn(args: Args, group: "Group", policy_gradient: Callable, alpha: Tensor, now: int, share: Tensor | None = None) -> None:
    """One update of critics, and with delay of policies, of all agents in a group, each on a batch of its own."""
    noise = group.draws(torch.randn, args.batch_size, args.length, group.env.action_size)
    group.state |= group.update_critics(group.state, group.sample(now), noise)
    if now % args.policy_frequency == 0:
        group.state |= group.update_policies(policy_gradient, alpha, group.state, group.sample(now), share)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
def meta_loss(args: Args, nets: Nets, alpha: Tensor, state: State, batch: Batch) -> Tensor:
    """Eq. 2.6 and A.2: minus the critic's estimate of the actions after one or more steps along the objective's gradient.
    alpha (p, d); batch: --batch-size sub-trajectories for each step, and as many for the estimate alone, which is on all of
    them as in the authors' release. Returns (p,)."""
    phi = state["phi"]
    for k in range(args.inner_steps):
        tau = Batch(*(x[:, k * args.batch_size : (k + 1) * args.batch_size] for x in batch))
        loss = partial(policy_loss, args, nets, alpha, state, tau)
        g, _ = gradient(lambda phi: loss(phi).sum())(phi)  # noqa: B023 (called at once)
        if args.inner_normalized:
            g = g / (g.norm(dim=-1, keepdim=True) + 1e-8)
        phi = phi - args.inner_lr * g
    q, before = (nets.q(state["theta"][0], batch.obs, nets.act(x, batch.obs)) for x in (phi, state["phi"]))
    improvement = masked_mean(q - before, batch.mask)  # `before` is a constant that makes the number readable
    if args.value_scaled:
        improvement = improvement / (masked_std(before, batch.mask) + 1e-5)
    return -improvement


def meta_gradient(args: Args, nets: Nets, alpha: Tensor, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each agent, the clipped gradient of meta_loss with respect to its objective (p, d), zero where it is not finite or the
    policy is not trained yet; and the mean loss, 0 if one is not finite."""
    g, loss = gradient(lambda alpha: meta_loss(args, nets, alpha, state, batch).sum())(alpha)
    g = clipped(args, g)
    valid = (state["age"] >= args.frozen_steps) & g.isfinite().all(-1)
    return torch.where(valid[:, None], g, 0), loss.nan_to_num(0, 0, 0) / len(g)


def meta_train(args: Args, groups: "list[Group]", alpha: Tensor, history: Tensor, run: "Run") -> None:
    """Algorithm 6. Changes alpha (m, d) in place, and history (k, m, d) to what it was after each part in PROGRESS."""
    optimizer = torch.optim.Adam([alpha], args.objective_lr)
    iterations = args.env_steps // args.num_envs
    keep = {"alpha": alpha, "history": history, "adam": optimizer, "groups": groups}
    for step in run.steps(iterations, keep):
        reset_some(args, groups, step)
        now = step + 1
        share = share_of_objective(args, now, run.device)
        policies = now % args.policy_frequency == 0  # are updated, and the objective
        grads = torch.zeros_like(alpha)

        for group in groups:
            group.step_async()
        for group in groups:  # for e, phi, theta, B in P: all agents of an environment as one batch
            group.step_wait(step)
            alphas = alpha[group.which]
            learn(args, group, grad_objective, alphas, now, share)
            if policies:
                batch = group.sample(now, args.inner_steps + 1)
                g, loss = group.meta_gradient(alphas, group.state, batch)
                grads.index_add_(0, group.which, g)  # the sum over agents
                group.note("meta_loss", loss)
            group.note("reward", group.rewards)
        if policies:
            alpha.grad = es.all_reduce_mean(grads) * run.world
            optimizer.param_groups[0]["lr"] = args.objective_lr * (1 - args.objective_lr_decay * step / iterations)
            optimizer.step()
        keep_history(history, alpha, step, iterations)
        if now % args.log_every == 0:
            run.log(step, {f"{group.name}_{name}": mean for group in groups for name, mean in group.means().items()})
        if now % args.log_every == 0 or now % args.checkpoint_every == 0 or now == iterations:
            for group in groups:
                group.reset_diverged(now, "phi", "theta")


# ======================================================================================================================
# Agents of an environment
# ======================================================================================================================
def init_agents(nets: Nets, p: int) -> State:
    """Initial networks of p agents, and the state of Adam for them; with `on_policy` also values and log deviations."""
    phi, *theta = (net.init(p, torch.default_generator) for net in (nets.policy, nets.critic, nets.critic))
    trained = {"phi": phi, "theta": torch.stack(theta)}
    state = {f"target_{name}": x.clone() for name, x in trained.items()}
    if nets.on_policy:
        trained["psi"] = nets.value.init(p, torch.default_generator)
        trained["log_std"] = torch.full((p, nets.policy.sizes[-1]), -0.5)
    return state | trained | init_adam(trained)


class Group(Agents):
    """Agents of one environment, trained as one batch; under torchrun those of this process. state, beside that of Agents: phi
    (p, d) and theta (2, p, d), their targets, and Adam's moments and steps."""

    def __init__(
        self, args: Args, name: str, which: Tensor, steps: int, device: torch.device, fuse: Callable,
        own: Tensor | None = None, on_policy: bool = False,
    ):  # fmt: skip
        """which (n,): the objective of each agent. steps: of an agent in its environment. fuse: compiles a function, or not.
        own (p,): the agents among the n of this process (default: all). on_policy: with the networks of `train_on_policy`."""
        own = torch.arange(len(which)) if own is None else own
        self.args, self.name, self.steps = args, name, steps // args.num_envs
        env = make_env(name, len(own) * args.num_envs, device)
        self.nets = make_nets(args, env.obs_size, env.action_size, on_policy)
        capacity = max(1, min(args.buffer_size // args.num_envs, self.steps))
        metrics = {"metrics": ("meta_loss", "reward"), "deviations": ("reward",)}
        super().__init__(env, partial(init_agents, self.nets), len(which), own, capacity, **metrics)
        self.which = which.to(device)[self.own]
        noise = [args.exploration_noise[i % len(args.exploration_noise)] for i in range(args.num_envs)]
        self.noise = torch.tensor(noise, device=device)[:, None]
        self.act, self.update_critics, self.update_policies, self.meta_gradient = (
            fuse(partial(f, args, self.nets)) for f in (act, update_critics, update_policies, meta_gradient)
        )
        self.sample_from = fuse(partial(sub_trajectories, env, length=args.length))

    def step_async(self, std: Tensor | None = None) -> None:
        """Act in every copy. std (p, 1, b): explore with these deviations, from the first step on, and leave the bounds of
        actions to the environment."""
        noise, uniform = (self.draws(draw, self.copies, self.env.action_size) for draw in (torch.randn, torch.rand))
        if std is None:
            action = self.act(self.state, self.noise * noise, uniform)
        else:
            action = (self.nets.act(self.state["phi"], self.state["obs"]) + std * noise).nan_to_num()
        super().step_async(action)

    def sample(self, now: int, batches: int = 1) -> Batch:
        """One or more batches from every agent's buffer; now: steps of each copy so far."""
        draws = self.draws(torch.rand, batches * self.args.batch_size, 2)
        return self.sample_from(self.state, torch.full((), now, device=draws.device), draws)


def share_of_objective(args: Args, now: int, device: torch.device) -> Tensor | None:
    """The share that the objective has in policies' steps, from 0 to 1 over --anneal-steps (A.2.2); None after them."""
    annealed = (now * args.num_envs - args.frozen_steps) / max(1, args.anneal_steps)
    return None if annealed >= 1 else torch.full((), max(annealed, 0.0), device=device)


def keep_history(history: Tensor, alpha: Tensor, step: int, steps: int) -> None:
    """history[k] (m, d) follows the objectives until the k-th part in PROGRESS of meta-training is over."""
    for k, part in enumerate(PROGRESS):
        if 100 * step < part * steps:
            history[k] = alpha


def reset_some(args: Args, groups: list[Group], step: int) -> None:
    """Reset a quarter of the agents, one after the other (--reset-every); and after a checkpoint, the environments that it
    cannot hold."""
    every = args.reset_every // args.num_envs
    for group in groups:
        if every and step and step % every == 0:
            group.reset_agents(step, group.own % 4 == step // every % 4)
        if step % args.checkpoint_every == 0 and group.external:
            group.reset_envs(step)


# ======================================================================================================================
# Baselines
# ======================================================================================================================
def grad_reinforce(args: Args, nets: Nets, _: Tensor, state: State, batch: Batch) -> Tensor:
    """The gradient of minus Eq. 2.3 on replayed data, which biases it: REINFORCE with generalised advantages (Schulman et al.
    2015) within sub-trajectories, standardised as in Spinning Up, as if the policy were Gaussian with the deviation of
    exploration."""
    value, next_value = values(nets, state, batch)
    delta = batch.mask * (batch.reward + args.gamma * next_value - value)
    advantage = standardized(discounted(delta, torch.full_like(delta, args.gamma * args.gae_lambda)), batch.mask)
    std = sum(args.exploration_noise) / len(args.exploration_noise)

    def loss(phi: Tensor) -> Tensor:
        log_policy = -((batch.action - nets.act(phi, batch.obs)) ** 2).sum(-1) / (2 * std**2)
        return -masked_mean(log_policy * advantage, batch.mask).sum()

    return gradient(loss)(state["phi"])[0]


def train_on_policy(args: Args, group: Group, ppo: bool) -> Iterator[int]:
    """REINFORCE with GAE on the agents' own last steps (Eq. 2.3), or PPO, both as in Spinning Up; policies are Gaussian with
    deviations of their own. Yields as train_agents."""
    flags, nets = args.ppo, group.nets
    rollout = max(2, flags.num_steps // args.num_envs)
    clip_coef, epochs = (flags.clip_coef, flags.update_epochs) if ppo else (math.inf, 1)
    settings = dict(clip_coef=clip_coef, policy_epochs=epochs, policy_lr=flags.lr, target_kl=flags.target_kl)
    settings |= dict(value_epochs=flags.update_epochs, value_lr=args.critic_lr, gamma=args.gamma, gae_lambda=args.gae_lambda)
    for now in range(1, group.steps + 1):
        group.step_async(group.state["log_std"].exp()[:, None])
        group.step_wait(now - 1)
        if now % rollout == 0:
            update_agents(group.state, nets.policy, nets.value, *group.latest(now, rollout), **settings)
        yield now


def losses_of_lives(args: Args, group: Group, seed: int, alpha: Tensor, _: Any) -> Tensor:
    """Minus the mean reward (p,) of the last fifth of agents' training by objectives alpha (p, d)."""
    torch.manual_seed(seed)
    group.begin()
    rewards = [group.rewards for _ in train_agents(args, group, grad_objective, alpha)]
    mean = torch.stack(rewards[-len(rewards) // 5 :]).mean(0)
    broken = ~(group.state["phi"].isfinite().all(-1) & mean.isfinite())
    return -torch.where(broken, -1e9, mean)


def evolve(args: Args, alpha: Tensor, history: Tensor, run: "Run") -> None:
    """EPG (Houthooft et al. 2018) with the objective of this file: evolution strategies on the rewards at the end of an agent's
    training by it, in one environment after the other, without random steps: the fitness of a short training would depend on
    them alone. All of a generation have the same networks and random numbers. Changes alpha and history as meta_train does."""
    args = replace(args, random_steps=0, policy_lr=args.test_policy_lr)
    optimizer = torch.optim.Adam([alpha], args.objective_lr)
    settings = dict(pairs=args.epg.pairs, sigma=args.epg.sigma, seed=args.seed, rank_shaping=True)
    own = torch.zeros(2 * args.epg.pairs // run.world, dtype=torch.int64)  # all are agent 0
    groups = [Group(args, name, own[:1], args.epg.life_steps, run.device, fuser(run), own) for name in args.envs]
    for generation in run.steps(args.epg.generations, {"alpha": alpha, "history": history, "adam": optimizer}):
        group = groups[generation % len(groups)]
        evaluate = partial(losses_of_lives, args, group, 1_000_003 * args.seed + generation)
        grads, losses = es.gradient(alpha[0], evaluate, generation=generation, **settings)
        alpha.grad = grads[None]
        optimizer.step()
        keep_history(history, alpha, generation, args.epg.generations)
        run.log(generation, {"reward": -losses.mean()})
    for group in groups:
        group.env.close()


def meta_train_rl2(args: Args, net: RL2, run: "Run") -> None:
    """RL^2: an LSTM is trained by PPO on trials in all environments. Changes net in place."""
    all_envs = [(name, make_env(name, args.rl2.trials // run.world, run.device)) for name in args.envs]
    settings = {name: getattr(args, name) for name in ("gamma", "gae_lambda", "max_grad_norm", "seed")}
    settings |= {name: getattr(args.rl2, name) for name in ("trial_steps", "epochs", "num_minibatches", "lr")}
    settings |= {"clip_coef": args.ppo.clip_coef, "rank": run.rank, "world": run.world}
    policy_gradients.meta_train(net, all_envs, run.steps, run.log, **settings)
    for _, env in all_envs:
        env.close()


def returns_of_rl2(args: Args, net: RL2, name: str, key: int) -> list[tuple[int, Tensor]]:
    """Returns per episode (p,) of its trials, which are reset after two episodes."""
    device = net.log_std.device
    env = make_env(name, args.test_seeds * args.episodes, device)
    generator = torch.Generator(device).manual_seed(key)
    curve = []
    for part in range(args.evaluations + 1):
        reward = net.trial(env, generator, noise=0.0)[2].sum(0) / 2
        curve.append((args.test_steps * part // args.evaluations, reward.unflatten(0, (args.test_seeds, -1)).mean(-1)))
    env.close()
    return curve


POLICY_GRADIENTS = {"td3": grad_critic, "reinforce-off": grad_reinforce}
ON_POLICY = ("reinforce-on", "ppo")
META_LEARNED = ("metagenrl", "epg", "rl2")


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(args: Args, objectives: dict[str, Tensor], rl2: RL2 | None, run: "Run") -> list[dict[str, Any]]:
    """Fresh agents learn in every environment (Algorithm 7), trained by each learner; those of objectives (m, d) are one
    batch, which processes share. Returns rows of returns along the way, without noise."""
    rows = []
    names = dict.fromkeys([args.learner, *args.baselines])
    learned = [name for name in objectives if name.split(",")[0] in names]
    jobs = ([learned] if learned else []) + [[name] for name in names if name not in ("metagenrl", "epg", "untrained")]
    parts = list(product(test_envs(args), jobs))

    bar_format = "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]"
    bar = tqdm(total=len(parts), desc="meta-test", bar_format=bar_format, disable=run.rank > 0)
    for name, learners in parts:
        measure = partial(test_in_env, args, name, learners, objectives, rl2, run, bar)
        rows += run.once(f"{name}, {learners[0]}", measure)
        bar.update(1 - bar.n % 1)
    bar.close()
    if run.rank > 0:
        return rows
    words = {"none": "meta-trained in", "task": "a variant of one seen", "domain": "never seen"}
    known = {row["task"]: words[row["novelty"]] for row in rows}
    names = {"labels": LABELS, "titles": {task: f"{task} ({text})" for task, text in known.items()}}
    plot(rows, run.folder / "returns.png", xlabel="environment steps of an agent", ylabel="return", styles=STYLES, **names)
    return rows


def test_envs(args: Args) -> list[str]:
    """Names of the environments to meta-test in."""
    return list(dict.fromkeys([*(args.envs if args.test_seen else ()), *args.test_envs]))


def test_in_env(
    args: Args, name: str, learners: list[str], objectives: dict[str, Tensor], rl2: RL2 | None, run: "Run", bar: tqdm
) -> list[dict[str, Any]]:
    """Rows of learners whose agents are one batch, in an environment."""
    number = test_envs(args).index(name)
    key = 1009 * args.seed + number
    rate = {"td3": args.td3_lr, "reinforce-off": args.reinforce_lr}.get(learners[0], args.test_policy_lr)
    random_steps = 0 if learners[0] == "epg" else args.random_steps  # as in its evolution
    args = replace(args, policy_lr=rate, random_steps=random_steps)
    if learners == ["rl2"]:
        curve, resets = returns_of_rl2(args, rl2, name, key), [0]
    else:
        agents = args.objectives * args.test_seeds
        alphas = [objectives[learner].repeat_interleave(args.test_seeds, 0) for learner in learners if learner in objectives]
        alpha = torch.cat(alphas or [torch.zeros(agents, 0, device=run.device)])
        torch.manual_seed(args.seed + 1_000_003 * (number + 1))
        torch.compiler.reset()  # the functions of the group before
        fuse = fuser(run, args.test_steps // args.num_envs)
        which = torch.arange(agents * len(learners))
        own = which[run.rank % len(which) :: run.world]  # of more processes than agents some have the same one
        group = Group(args, name, which, args.test_steps, run.device, fuse, own, on_policy=learners[0] in ON_POLICY)
        curve = returns(args, group, learners[0], alpha[group.own], bar, key)
        group.env.close()
        resets = group.of_all(group.state["diverged"]).int().view(len(learners), -1).sum(1).tolist()

    rows = []
    for index, learner in enumerate(learners):
        for step, values in curve:
            of_learner = values.chunk(len(learners))[index]
            row = result_row(learner, name, envs.novelty(name, args.envs), "return", step, of_learner)
            row |= {"agents_reset": resets[index]} if resets[index] else {}  # agents that were not finite
            rows.append(row | {"values": of_learner.tolist()} if args.each else row)
    return rows


def returns(args: Args, group: Group, learner: str, alpha: Tensor, bar: tqdm, key: int) -> list[tuple[int, Tensor]]:
    """The curve of agents that learn in a group, alpha (p, d): environment steps, and the returns of all processes' agents."""
    env = make_env(group.name, len(group.own) * args.episodes, group.device)
    points = {round(group.steps * part / args.evaluations) for part in range(1, args.evaluations + 1)}

    def evaluate() -> Tensor:
        own = mean_returns(env, lambda obs: group.nets.act(group.state["phi"], obs), group.total, key, group.own)
        return group.of_all(own)

    curve = [(0, evaluate())]
    if learner in ON_POLICY:
        training = train_on_policy(args, group, learner == "ppo")
    else:
        training = train_agents(args, group, POLICY_GRADIENTS.get(learner, grad_objective), alpha)
    for now in training:
        if now % 50 == 0:
            bar.update(50 / group.steps * 0.999)
        if now in points:
            group.reset_diverged(now, "phi", "theta")
            curve.append((now * args.num_envs, evaluate()))
    env.close()
    return curve


LABELS = {"metagenrl": "MetaGenRL", "epg": "EPG", "untrained": "untrained objective", "td3": "TD3", "ppo": "PPO"}
LABELS |= {"rl2": "RL²", "reinforce-off": "off-policy REINFORCE", "reinforce-on": "on-policy REINFORCE"}
STYLES = {"metagenrl": "C0", "epg": "C2", "untrained": "0.6", "td3": "k"}
STYLES |= {"rl2": "C5", "ppo": "C4", "reinforce-off": "C1", "reinforce-on": "C3"}
PROGRESS = {5: "#e8f6e4", 14: "#d2edcc", 20: "#b2e0ac", 40: "#8ace88", 60: "#5bb86a", 80: "#339c52"}  # per cent: colour
LABELS |= {f"{name}, {part} %": f"{LABELS[name]} after {part} %" for name in ("metagenrl", "epg") for part in PROGRESS}
STYLES |= {f"{name}, {part} %": PROGRESS[part] for name in ("metagenrl", "epg") for part in PROGRESS}


# ======================================================================================================================
# Use it
# ======================================================================================================================
class LearnedObjective:
    """A meta-trained objective for the policies of your own agents, a differentiable loss.

        objective = metagenrl.LearnedObjective.load("pretrained")
        loss = objective(actions, policy(obs), rewards, values, next_values, times, mask, terminated)
        loss.backward()

    actions and policy_actions are (s, t, b), in [-1, 1]: s sub-trajectories of t steps, of any action size, the actions taken
    and those of the policy now, through which the gradient flows. The others are (s, t): rewards; the critic's values of
    policy actions in this state and in the next one; times, the step in the episode over its time limit; mask, 1 up to and with
    the step that ends an episode and 0 behind it (default: all 1); terminated, 1 where the next state is terminal, so that its
    value is not used (default: nowhere). Raises ValueError for other shapes. Inputs are standardised over the batch, so it
    should hold a hundred steps or more. A whole agent is under "Use it" in .github/results/metagenrl.md.
    """

    def __init__(self, args: Args, alpha: Tensor):
        self.args = args
        self.alpha = alpha  # (d,)
        self.nets = make_nets(args, 1, 1)

    @staticmethod
    def load(checkpoint: str | Path = "pretrained", index: int = 0, device: torch.device | str = "cpu") -> "LearnedObjective":
        """checkpoint: "pretrained", or a checkpoint.pt of this script with a meta-learned objective; index: which of
        --objectives. Raises CheckpointError or UserError for another file, and IndexError."""
        saved = checkpoints.read(checkpoints.named(checkpoint, METHOD), method=str, args=dict, state=dict)
        try:
            args = from_dict(Args, saved["args"]) if saved["method"] == METHOD and saved["step"] else None
            alpha = saved["state"]["['alpha']"]
        except (TypeError, KeyError):
            args = alpha = None
        learned = args and args.learner in ("metagenrl", "epg")
        size = (args.objectives, sum(make_nets(args, 1, 1).objective_sizes)) if learned else None
        if not isinstance(alpha, Tensor) or (alpha.shape, alpha.dtype) != (size, torch.float32):
            raise UserError(f"{checkpoint} is not a checkpoint of this {METHOD}.py with a meta-learned objective.")
        return LearnedObjective(args, alpha[index].to(device))

    def __call__(
        self, actions: Tensor, policy_actions: Tensor, rewards: Tensor, values: Tensor, next_values: Tensor, times: Tensor,
        mask: Tensor | None = None, terminated: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The mean of the objective over steps, ()."""
        mask = torch.ones_like(rewards) if mask is None else mask
        terminated = torch.zeros_like(rewards) if terminated is None else terminated
        scalars = rewards, values, next_values, times, mask, terminated
        same = policy_actions.shape == actions.shape and all(x.shape == actions.shape[:2] for x in scalars)
        if actions.ndim != 3 or not actions.numel() or not same:
            raise ValueError("Actions have to be (s, t, b), and all other inputs (s, t).")
        actions, policy_actions = actions[None].detach().float(), policy_actions[None].float()
        rewards, values, next_values, times, mask, terminated = (x[None].detach().float() for x in scalars)
        zeros = torch.zeros_like(actions[..., :1])
        batch = Batch(zeros, actions, rewards, terminated, times, zeros, mask)
        losses = objective(self.args, self.nets, self.alpha[None], batch, policy_actions, values, next_values)
        return masked_mean(losses, mask).squeeze(0)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "metagenrl"
USER_ERRORS = (CheckpointError, EnvError, FlagError)
NAMED_AFTER = ("envs", "learner")  # the flags that name a run's folder
KEPT = ("preset",)  # the flags that a meta-test cannot change


# ---- the same text in all six scripts: begin -----------------------------------------------------------------------
class UserError(Exception):
    """A user's mistake; the message is one sentence with what to do."""


def parse_args() -> tuple[Args, dict[str, Any]]:
    """The flags over a preset's values, or over those of the checkpoint that they name; and that checkpoint."""
    typed = tyro.cli(Args)
    if bool(typed.checkpoint) != (typed.mode == "test") or (typed.checkpoint and typed.resume):
        raise UserError("--mode test and --checkpoint FILE need each other, and exclude --resume FOLDER.")
    cuda = torch.cuda.is_available()
    if typed.device == "cuda" and not cuda:
        raise UserError("There is no CUDA device; leave out --device cuda.")
    device = ("cuda" if cuda else "cpu") if typed.device == "auto" else typed.device
    preset = ("thesis" if device == "cuda" else "laptop") if typed.preset == "auto" else typed.preset

    checkpoint = {}
    base = PRESETS[preset] | {"preset": preset}
    if path := typed.checkpoint or typed.resume:
        path = Path(path, "checkpoint.pt") if typed.resume else checkpoints.named(path, METHOD)
        checkpoint = checkpoints.read(path, method=str, args=dict, step=int, state=dict, rng=list)
        base = checkpoint["args"] | {"mode": typed.mode, "resume": typed.resume}
        base |= {} if typed.resume else {"run_name": None, "run_dir": typed.run_dir}
        if checkpoint["method"] != METHOD:
            raise UserError(f"{path} is a checkpoint of {checkpoint['method']}.py, not of {METHOD}.py.")
    try:
        base = from_dict(Args, base | {"device": device})
    except TypeError as error:
        raise UserError(f"{path} was written by another version of {METHOD}.py.") from error
    args = replace(tyro.cli(Args, default=base), device=device, preset=(base if typed.preset == "auto" else typed).preset)

    free = {"data_dir", "compile", "track", "run_dir", "triton", "graphs", "chunk"} - {*KEPT}
    changed = [flag for flag in vars(args) if flag not in free and getattr(args, flag) != getattr(base, flag)]
    if kept := [flag for flag in changed if args.resume or (args.mode == "test" and flag in KEPT)]:
        raise UserError(f"A resumed or tested run keeps its flags; leave out --{kept[0].replace('_', '-')}.")
    check_ranges(args)
    if args.track and not find_spec("wandb"):
        raise UserError('--track needs Weights & Biases: pip install "cleanmeta[track]".')
    return args, checkpoint


class Run:
    """Device, processes, folder, log and checkpoints of a run. Under torchrun, rank 0 alone writes."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]):
        self.args = args
        self.checkpoint = checkpoint  # of the run that is resumed or meta-tested
        self.first = checkpoint["step"] if args.resume else 0
        self.lines: list[tuple[int, dict[str, Tensor]]] = []  # of metrics.csv, not yet written
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(args.device)
        if args.device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True

        if self.world > 1:
            dist.init_process_group()
        keep_memory()
        torch.manual_seed(args.seed)

        self.compiles = args.compile and (args.device == "cuda" or can_compile())
        if self.compiles:
            torch._dynamo.config.recompile_limit = 64  # of one function: for each dataset, environment or size once
        if args.compile and not self.compiles:
            self.info("No working C++ compiler: running without torch.compile, which is slower.")

    def info(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    def open_folder(self) -> None:
        """Make the run's folder, or continue in that of a resumed run. Before this nothing is written."""
        args = self.args
        flags = [getattr(args, name) for name in NAMED_AFTER] + ["test"] * (args.mode == "test")
        words = [METHOD, *(flag if isinstance(flag, str) else "-".join(flag) for flag in flags), f"s{args.seed}"]
        name = args.run_name or "-".join([*words, time.strftime("%Y%m%d-%H%M%S")]).replace("/", "-")
        if name != Path(name).name or name == "..":
            raise UserError(f"--run-name {name} is not a name; the folder that runs are in is --run-dir.")
        folder = [Path(args.resume or Path(args.run_dir, name))]
        if self.rank == 0:
            lock(folder[0])
            self.write_first(folder[0])
        if self.world > 1:  # the others wait for the folder, and for its name, which may hold the time
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        path = self.folder / "meta_test.pt"
        tested = args.checkpoint and os.path.getmtime(checkpoints.named(args.checkpoint, METHOD))
        key = f"{asdict(replace(args, resume=None))} {tested}"
        cache = checkpoints.read_cache(path, of=str)
        self.cache = cache if cache.get("of") == key else {"of": key}

    def write_first(self, folder: Path) -> None:
        """args.json and empty logs of a new run, or the logs of a resumed one up to its checkpoint."""
        files = {path.name for path in folder.iterdir() if path.suffix != ".partial"}
        if "results.json" in files:
            raise UserError(f"{folder} holds a finished run, which cannot be made longer; test it, or choose another --run-name.")
        if not self.args.resume and ("checkpoint.pt" in files or (files and "args.json" not in files)):
            raise UserError(f"{folder} holds a run that was stopped; --resume it, or choose another --run-name.")
        if not self.args.resume:
            checkpoints.write(folder / "args.json", to_json(asdict(self.args)))
        self.metrics = MetricsLog(folder, self.first, asdict(self.args) if self.args.track else None)
        self.info(f"{METHOD}: preset {self.args.preset}, device {self.args.device}, run folder {folder}")

    def steps(self, total: int, keep: dict[str, Any]) -> Iterator[int]:
        """The meta-steps to do. Restores `keep`, tensors and what has a state_dict, and saves it at intervals."""
        if self.first > total:
            raise UserError(f"The checkpoint has {self.first} meta-steps, more than the {total} of this run.")
        if self.args.resume:
            checkpoints.restore(keep, self.checkpoint["state"], self.folder / "checkpoint.pt")
            checkpoints.set_rng_state(self.checkpoint["rng"], self.folder / "checkpoint.pt")
        else:
            self.save(0, keep)
        self.bar = tqdm(range(self.first, total), "meta-train", initial=self.first, total=total, disable=self.rank > 0)
        for step in self.bar:
            yield step
            if (step + 1) % self.args.checkpoint_every == 0 or step + 1 == total:
                self.save(step + 1, keep)

    def save(self, step: int, keep: dict[str, Any]) -> None:
        """Write checkpoint.pt: everything that the run needs to continue after `step` meta-steps."""
        self.write_lines()
        state = checkpoints.state_of(keep)
        self.refuse(checkpoints.first_not_finite(state), step)
        if self.rank == 0:
            parts = {"method": METHOD, "args": asdict(self.args), "step": step, "state": state}
            checkpoints.write(self.folder / "checkpoint.pt", parts | {"rng": checkpoints.rng_state()})

    def refuse(self, name: str | None, step: int) -> None:
        """Stop at a number that is not finite, before it is saved."""
        if name:
            last = self.folder / "checkpoint.pt"
            raise UserError(f"{name} is not finite at meta-step {step}; {last} was saved before. Try a smaller learning rate.")

    def log(self, step: int, values: dict[str, Tensor]) -> None:
        """A line of metrics.csv and TensorBoard, on a GPU not before there are 20, so that it need not wait."""
        self.lines.append((step, values))
        if self.args.device == "cpu" or len(self.lines) == 20:
            self.write_lines()

    def write_lines(self) -> None:
        """Raises UserError at a number that is not finite."""
        lines, self.lines = self.lines, []
        for step, values in lines:
            values = {name: float(value) for name, value in values.items()}
            self.refuse(next((name for name, value in values.items() if not math.isfinite(value)), None), step)
            if self.rank == 0:
                self.metrics.write(step, values)
                self.bar.set_postfix({name: f"{values[name]:.3f}" for name in list(values)[:2]}, refresh=False)

    def once(self, part: str, measure: Callable[[], Any]) -> Any:
        """measure(), or what it returned before this meta-test was cut off. Both leave the same random state."""
        kept = self.cache.get(part)
        if not (isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[1], list)):
            self.cache[part] = measure(), checkpoints.rng_state()
            if self.rank == 0:
                checkpoints.write(self.folder / "meta_test.pt", self.cache)
        value, rng = self.cache[part]
        checkpoints.set_rng_state(rng, self.folder / "meta_test.pt")
        return value

    def finish(self, rows: list[dict[str, Any]], tested: float, parameters: int, **more: Any) -> None:
        """Write results.json, and print its first and last rows. For rank 0. tested: when the meta-test began."""
        seconds = {"meta_train": tested - self.metrics.started, "meta_test": time.time() - tested}
        facts = {"script": METHOD, "preset": self.args.preset, "args": asdict(self.args), "seconds": seconds}
        facts |= machine.facts(self.device) | {"parameters": parameters} | more
        checkpoints.write(self.folder / "results.json", to_json(facts | {"results": rows}))
        (self.folder / "meta_test.pt").unlink(missing_ok=True)
        self.metrics.board.close()
        self.info("\n".join(["", *table(rows), ""]))
        self.info(f"Written to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


# ---- the same text in all six scripts: end -------------------------------------------------------------------------


def make_env(name: str, count: int, device: torch.device | str = "cpu") -> Env:
    """An environment with continuous actions; the observations of those that are ours are scaled to about one."""
    env = envs.make(name, count, device, scaled=True, parallel=count > 1)
    if env.num_actions is not None:
        raise UserError(f"MetaGenRL's agents act continuously, and {name} has discrete actions; choose another environment.")
    return env


def fuser(run: "Run", iterations: float = math.inf) -> Callable:
    """What compiles a function, if anything does; not for a short training, which ends sooner than compiling."""
    return partial(torch.compile, dynamic=False) if run.compiles and iterations > 10_000 else lambda f: f


def checked(args: Args, checkpoint: dict[str, Any], world: int) -> Args:
    """Args with the sizes of RL^2 that its environments need. Refuses what cannot work, before anything is written."""
    learners = {args.learner, *args.baselines}
    for flag in ("learner", "inputs", "envs", "objectives") if args.mode == "test" else ():
        if getattr(args, flag) != checkpoint["args"].get(flag):
            raise UserError(f"A checkpoint keeps its --{flag}; leave it out.")
    for flag in ("envs", "inputs", "exploration_noise"):
        if not getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} needs at least one value.")
    if len(set(args.envs)) < len(args.envs):
        raise UserError("--envs names an environment twice; leave one out.")
    agents = args.population // len(args.envs)
    if args.population % len(args.envs):
        raise UserError(f"--population {args.population} cannot be distributed equally over {len(args.envs)} environments.")
    if agents * args.objectives % world:
        raise UserError(f"{agents * args.objectives} agents in an environment cannot be shared by {world} processes.")
    if args.learner == "epg" and args.epg.pairs % world:
        raise UserError(f"--epg.pairs {args.epg.pairs} cannot be shared by {world} processes.")
    if args.learner == "rl2" and args.rl2.trials % (parts := args.rl2.num_minibatches * world):
        raise UserError(f"--rl2.trials has to be a multiple of {parts}, --rl2.num-minibatches times processes.")
    if min(args.env_steps, args.test_steps, args.epg.life_steps, args.reset_every or args.num_envs) < args.num_envs:
        raise UserError("--env-steps, --test-steps, --epg.life-steps and --reset-every have to be at least --num-envs.")
    lives = {"--test-steps": args.test_steps} if learners - {"rl2", *ON_POLICY} else {}
    if args.mode == "train" and args.learner == "metagenrl":
        lives |= {"--env-steps": args.env_steps, "four times --reset-every": 4 * args.reset_every or math.inf}
    lives |= {"--epg.life-steps": args.epg.life_steps} if args.mode == "train" and args.learner == "epg" else {}
    if short := [name for name, steps in lives.items() if steps <= args.frozen_steps]:
        raise UserError(f"--frozen-steps, in which policies are not trained, has to be less than {short[0]}.")
    if args.num_envs % len(args.exploration_noise):
        raise UserError("--num-envs has to be a multiple of how many values --exploration-noise has.")
    if args.evaluations > args.test_steps // args.num_envs:
        raise UserError("--evaluations has to be at most --test-steps divided by --num-envs.")
    longest = min(args.buffer_size, args.test_steps) // args.num_envs
    if learners & set(ON_POLICY) and max(2, args.ppo.num_steps // args.num_envs) > longest:
        raise UserError("--ppo.num-steps has to be at most --buffer-size and --test-steps.")
    if args.objective_filters % 2:
        raise UserError("--objective-filters has to be even: half of the units are squares.")
    if "reinforce-off" in learners and not sum(args.exploration_noise):
        raise UserError("reinforce-off needs a --exploration-noise above 0.")
    if not test_envs(args):
        raise UserError("--no-test-seen needs --test-envs, environments to meta-test in.")
    if foreign := set(META_LEARNED) & set(args.baselines) - {args.learner}:
        raise UserError(f"{min(foreign)} is meta-learned in a run of its own, with --learner; leave it out of --baselines.")
    if args.learner in ("epg", "rl2") and args.objectives > 1:
        raise UserError(f"A run of {args.learner} meta-learns one objective or agent; leave out --objectives.")
    if args.progress and args.learner not in ("metagenrl", "epg"):
        raise UserError(f"--progress meta-tests earlier objectives, and {args.learner} has none; leave it out.")

    made = [make_env(name, 1) for name in dict.fromkeys([*args.envs, *args.test_envs])]
    inputs = max(env.obs_size for env in made)
    outputs = max(env.action_size for env in made)
    for env in made:
        env.close()
    if args.learner != "rl2":
        return args
    sizes = args.rl2.sizes or (inputs, outputs)
    if sizes[0] < inputs or sizes[1] < outputs:
        raise UserError(f"RL^2 needs at least --rl2.sizes {inputs} {outputs} for these environments, from meta-training on.")
    return replace(args, rl2=replace(args.rl2, sizes=sizes))


@torch.no_grad()
def main() -> None:
    args, checkpoint = parse_args()
    args = checked(args, checkpoint, int(os.environ.get("WORLD_SIZE", 1)))
    torch.manual_seed(args.seed)  # for RL2 alone: Run sets the seed again
    rl2 = RL2(*args.rl2.sizes, args.rl2.units) if args.learner == "rl2" else None
    run = Run(args, checkpoint)
    generator = torch.Generator().manual_seed(2**31 + args.seed)  # not the numbers of agents
    untrained = make_nets(args, 1, 1).init_objective(args.objectives, generator).to(run.device)
    alpha = untrained.clone()
    history = alpha.repeat(len(PROGRESS), 1, 1)
    learned = {"net": rl2.to(run.device)} if rl2 else {"alpha": alpha, "history": history}
    groups = []
    if args.mode == "test":
        needed = learned if rl2 or args.progress else {"alpha": alpha}
        checkpoints.restore(needed, checkpoint["state"], args.checkpoint)
    elif args.learner == "metagenrl":
        which = torch.arange(args.objectives).repeat_interleave(args.population // len(args.envs))
        own = torch.arange(len(which))[run.rank :: run.world]
        groups = [Group(args, name, which, args.env_steps, run.device, fuser(run), own) for name in args.envs]
    run.open_folder()

    if groups:
        meta_train(args, groups, alpha, history, run)
        for group in groups:
            group.env.close()
    elif args.mode == "train" and args.learner == "epg":
        evolve(args, alpha, history, run)
    elif args.mode == "train" and rl2:
        meta_train_rl2(args, rl2, run)
    elif args.mode == "train" and not args.resume:
        run.save(0, learned)  # nothing is meta-learned, but --resume continues the meta-test
    resets = sum(es.all_reduce_mean(group.state["diverged"].sum().double()) for group in groups) * run.world
    tested = time.time()
    objectives = {args.learner: alpha} if args.learner in ("metagenrl", "epg") else {}
    objectives["untrained"] = untrained
    if args.progress:
        first = 100 * args.frozen_steps / args.env_steps if args.learner == "metagenrl" else 0
        total = args.env_steps // args.num_envs if args.learner == "metagenrl" else args.epg.generations
        last = 100 * checkpoint["step"] / total if args.mode == "test" else 100  # of a run that was stopped
        parts = [(f"{args.learner}, {part} %", i) for i, part in enumerate(PROGRESS) if first < part <= last]
        objectives |= {name: history[i] for name, i in parts}
    rows = meta_test(args, objectives, rl2, run)
    if run.rank > 0:
        return
    parameters = sum(p.numel() for p in rl2.parameters()) if rl2 else alpha.shape[-1]
    agents_reset = {"meta-training": int(resets)}
    agents_reset |= {f"{row['learner']} in {row['task']}": row["agents_reset"] for row in rows if "agents_reset" in row}
    for where, count in agents_reset.items():
        if count:
            run.info(f"{where}: {count} agents were reset because they were not finite.")
    run.finish(rows, tested, parameters=parameters, agents_reset=sum(agents_reset.values()))


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
