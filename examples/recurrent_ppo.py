"""Recurrent PPO in one file, after purejaxrl: an LSTM policy solves a task that needs memory.

    pip install -e '.[examples]'
    python examples/recurrent_ppo.py --out runs/recurrent_ppo

In MemoryChain of bsuite (Osband et al. 2020), the first observation of an episode shows one bit, and the action of the
last step must repeat it, for a reward of 1 or -1. Three policies learn it by PPO (Schulman et al. 2017), in turns, with
the same encoder, heads, sizes and hyperparameters: `jaxlstm.LSTM`; the ScannedRNN of Flax linen that most JAX code has,
with the same initial weights; and a policy without memory, whose expected return is 0 whatever it does. The program
checks that the loss recomputes the log-probabilities of a rollout, prints returns and environment steps per second, and
writes ``results.json`` and ``learning_curves.png``.
"""

import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnax  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from jax import Array
from matplotlib.figure import Figure

import jaxlstm
from jaxlstm import interop, rl


@dataclass(frozen=True)
class Config:
    """Sizes and hyperparameters."""

    memory_length: int = 20  # steps from the bit to the answer; an episode has one more step
    num_envs: int = 64
    rollout_steps: int = 128
    hidden_size: int = 64
    num_updates: int = 30
    updates_per_turn: int = 10  # the policies train in turns of this many updates, so that their speeds compare
    num_epochs: int = 4
    num_minibatches: int = 4  # each of num_envs / num_minibatches whole sequences
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    seed: int = 0
    out: Path = Path("runs/recurrent_ppo")


def apply(module: nn.Module, params: Any, *args: Any) -> Any:
    """Applies a module of Flax linen to its parameters."""
    return module.apply(params, *args)


# The core of a policy: inputs and outputs have hidden_size features, and the environments are axis 1 of a state.


class LSTMCore:
    """`jaxlstm.LSTM`: one step in the rollout, `jaxlstm.rl.replay` in the loss."""

    def __init__(self, hidden_size: int):
        self.lstm = jaxlstm.LSTM(hidden_size, hidden_size)

    def init(self, key: Array) -> Any:
        """Returns initial parameters."""
        return self.lstm.init(key)

    def initial_state(self, num_envs: int) -> Any:
        """Returns the state at the start of training."""
        return self.lstm.initial_state(num_envs)

    def step(self, params: Any, state: Any, x: Array, first: Array) -> tuple[Any, Array]:
        """Takes one step, restarting environments with ``first``."""
        return self.lstm.step(params, state, x, reset=first)

    def replay(self, params: Any, state: Any, xs: Array, dones: Array, first: Array) -> Array:
        """Recomputes the outputs of a rollout."""
        ys, _ = rl.replay(self.lstm, params, xs, dones, state, first=first)
        return ys


class ScannedRNN(nn.Module):
    """The usual module of recurrent PPO in JAX: a Flax cell under `nn.scan`, restarted by ``resets``."""

    @functools.partial(nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False})
    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        """Takes one step; `nn.scan` makes it a call on sequences."""
        ins, resets = x
        carry = jax.tree.map(lambda a: jnp.where(resets[:, None], 0.0, a), carry)
        return nn.OptimizedLSTMCell(ins.shape[-1], name="cell")(carry, ins)


class ScannedCore:
    """`ScannedRNN`, with the initial weights of `LSTMCore`."""

    def __init__(self, hidden_size: int):
        self.lstm = jaxlstm.LSTM(hidden_size, hidden_size)

    def init(self, key: Array) -> Any:
        """Returns initial parameters."""
        variables = interop.to_flax_linen(self.lstm, self.lstm.init(key))
        return {"params": {"cell": jax.tree.map(jnp.asarray, variables["params"]["cell"])}}

    def initial_state(self, num_envs: int) -> Any:
        """Returns the state at the start of training."""
        return tuple(jnp.zeros((1, num_envs, self.lstm.hidden_size)) for _ in range(2))

    def step(self, params: Any, state: Any, x: Array, first: Array) -> tuple[Any, Array]:
        """Takes one step, restarting environments with ``first``."""
        carry, ys = apply(ScannedRNN(), params, jax.tree.map(lambda a: a[0], state), (x[None], first[None]))
        return jax.tree.map(lambda a: a[None], carry), ys[0]

    def replay(self, params: Any, state: Any, xs: Array, dones: Array, first: Array) -> Array:
        """Recomputes the outputs of a rollout."""
        resets = rl.resets_from_dones(dones, first)
        _, ys = apply(ScannedRNN(), params, jax.tree.map(lambda a: a[0], state), (xs, resets))
        return ys


class MemorylessCore:
    """One more dense layer in place of the recurrence."""

    def __init__(self, hidden_size: int):
        self.dense = nn.Dense(hidden_size)

    def init(self, key: Array) -> Any:
        """Returns initial parameters."""
        return self.dense.init(key, jnp.zeros((1, self.dense.features)))

    def initial_state(self, num_envs: int) -> Any:
        """Returns the state at the start of training."""
        del num_envs
        return ()

    def step(self, params: Any, state: Any, x: Array, first: Array) -> tuple[Any, Array]:
        """Takes one step, restarting environments with ``first``."""
        del first
        return state, jnp.tanh(apply(self.dense, params, x))

    def replay(self, params: Any, state: Any, xs: Array, dones: Array, first: Array) -> Array:
        """Recomputes the outputs of a rollout."""
        del state, dones, first
        return jnp.tanh(apply(self.dense, params, xs))


CORES = {"jaxlstm.LSTM": LSTMCore, "Flax ScannedRNN": ScannedCore, "no memory": MemorylessCore}


class Rollout(NamedTuple):
    """A rollout, time first: every array is ``(T, B, ...)``."""

    obs: Array
    dones: Array  # whether the transition of this step ended the episode
    actions: Array
    rewards: Array
    values: Array
    log_probs: Array
    returns: Array  # return of the episode at its last step, else 0


class Runner(NamedTuple):
    """Everything that training carries from one update to the next."""

    params: Any
    opt_state: Any
    env_state: Any
    obs: Array  # (B, ...)
    first: Array  # (B,): whether obs is the first observation of an episode
    state: Any  # of the core, before obs
    episode_return: Array  # (B,) so far
    key: Array


class Agent:
    """A policy with one of the cores, and its training."""

    def __init__(self, config: Config, make_core: Any):
        self.config = config
        env_params: Any
        self.env, env_params = gymnax.make("MemoryChain-bsuite")
        self.env_params = env_params.replace(memory_length=config.memory_length)
        self.core = make_core(config.hidden_size)
        self.encoder = nn.Dense(config.hidden_size)
        self.actor = nn.Dense(self.env.num_actions, kernel_init=nn.initializers.orthogonal(0.01))
        self.critic = nn.Dense(1)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.learning_rate, eps=1e-5)
        )
        self.update = jax.jit(self.run_updates, donate_argnums=0)
        self.rollout = jax.jit(self.run_rollout)
        self.replay = jax.jit(self.replay_policy)

    def init(self) -> Runner:
        """Returns the start of training."""
        config = self.config
        key, *keys = jax.random.split(jax.random.key(config.seed), 6)
        obs, env_state = jax.vmap(self.env.reset, (0, None))(
            jax.random.split(keys[0], config.num_envs), self.env_params
        )
        hidden = jnp.zeros((1, config.hidden_size))
        params = {
            "encoder": self.encoder.init(keys[1], obs),
            "core": self.core.init(keys[2]),
            "actor": self.actor.init(keys[3], hidden),
            "critic": self.critic.init(keys[4], hidden),
        }
        first = jnp.ones(config.num_envs, bool)
        state = self.core.initial_state(config.num_envs)
        opt_state = self.optimizer.init(params)
        return Runner(params, opt_state, env_state, obs, first, state, jnp.zeros(config.num_envs), key)

    # The policy: the same function of observations step by step and over a rollout.

    def heads(self, params: Any, y: Array) -> tuple[Array, Array]:
        """Returns logits and values from outputs of the core."""
        return apply(self.actor, params["actor"], y), apply(self.critic, params["critic"], y)[..., 0]

    def encode(self, params: Any, obs: Array) -> Array:
        """Returns inputs of the core from observations."""
        return jnp.tanh(apply(self.encoder, params["encoder"], obs))

    def step_policy(self, params: Any, state: Any, obs: Array, first: Array) -> tuple[Any, Array, Array]:
        """Returns the new state, logits ``(B, A)`` and values ``(B,)``."""
        state, y = self.core.step(params["core"], state, self.encode(params, obs), first)
        return state, *self.heads(params, y)

    def replay_policy(self, params: Any, state: Any, obs: Array, dones: Array, first: Array) -> tuple[Array, Array]:
        """Returns logits ``(T, B, A)`` and values ``(T, B)`` of a rollout."""
        ys = self.core.replay(params["core"], state, self.encode(params, obs), dones, first)
        return self.heads(params, ys)

    # PPO

    def run_rollout(self, runner: Runner) -> tuple[Runner, Rollout]:
        """Acts for ``rollout_steps`` steps in all environments."""

        def step(runner: Runner, _: None) -> tuple[Runner, Rollout]:
            key, action_key, env_key = jax.random.split(runner.key, 3)
            state, logits, value = self.step_policy(runner.params, runner.state, runner.obs, runner.first)
            action = jax.random.categorical(action_key, logits)
            env_keys = jax.random.split(env_key, self.config.num_envs)
            obs, env_state, reward, *ended, _info = jax.vmap(self.env.step, (0, 0, 0, None))(
                env_keys, runner.env_state, action, self.env_params
            )
            done = functools.reduce(jnp.logical_or, ended[:2])  # gymnax 0.0.9: done; 1.0: terminated, truncated
            total = runner.episode_return + reward
            taken = Rollout(
                runner.obs, done, action, reward, value, log_prob(logits, action), jnp.where(done, total, 0)
            )
            runner = runner._replace(
                env_state=env_state,
                obs=obs,
                first=done,  # obs is already the first observation of the next episode
                state=state,
                episode_return=jnp.where(done, 0, total),
                key=key,
            )
            return runner, taken

        return jax.lax.scan(step, runner, None, self.config.rollout_steps)

    def advantages(self, rollout: Rollout, last_value: Array) -> Array:
        """Computes generalized advantage estimates (Schulman et al. 2016), ``(T, B)``."""

        def step(carry: tuple[Array, Array], taken: Rollout) -> tuple[tuple[Array, Array], Array]:
            advantage, next_value = carry
            go_on = self.config.discount * (1 - taken.dones.astype(jnp.float32))
            delta = taken.rewards + go_on * next_value - taken.values
            advantage = delta + go_on * self.config.gae_lambda * advantage
            return (advantage, taken.values), advantage

        return jax.lax.scan(step, (jnp.zeros_like(last_value), last_value), rollout, reverse=True)[1]

    def loss(self, params: Any, state: Any, first: Array, rollout: Rollout, advantages: Array) -> Array:
        """Computes the clipped loss of PPO of some environments, from a replay of their rollouts."""
        config = self.config
        logits, values = self.replay_policy(params, state, rollout.obs, rollout.dones, first)
        ratio = jnp.exp(log_prob(logits, rollout.actions) - rollout.log_probs)
        targets = advantages + rollout.values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
        near = rollout.values + jnp.clip(values - rollout.values, -config.clip, config.clip)
        value_loss = 0.5 * jnp.maximum((values - targets) ** 2, (near - targets) ** 2).mean()
        log_probs = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        return policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy

    def run_updates(self, runner: Runner) -> tuple[Runner, tuple[Array, Array]]:
        """Runs ``updates_per_turn`` updates; returns the sum and the number of the returns of episodes in each."""
        config = self.config

        def update(runner: Runner, _: None) -> tuple[Runner, tuple[Array, Array]]:
            state0, first = runner.state, runner.first
            runner, rollout = self.run_rollout(runner)
            _state, _logits, last_value = self.step_policy(runner.params, runner.state, runner.obs, runner.first)
            advantages = self.advantages(rollout, last_value)

            def train_on(carry: tuple[Any, Any], envs: Any) -> tuple[tuple[Any, Any], None]:
                params, opt_state = carry
                part, part_advantages, part_state = jax.tree.map(
                    lambda a: a[:, envs], (rollout, advantages, state0)
                )  # whole sequences of some environments, each with the state that it started from
                gradient = jax.grad(self.loss)(params, part_state, first[envs], part, part_advantages)
                updates, opt_state = self.optimizer.update(gradient, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            key, order_key = jax.random.split(runner.key)
            orders = jax.vmap(jax.random.permutation, (0, None))(
                jax.random.split(order_key, config.num_epochs), config.num_envs
            )
            minibatches = orders.reshape(config.num_epochs * config.num_minibatches, -1)
            (params, opt_state), _none = jax.lax.scan(train_on, (runner.params, runner.opt_state), minibatches)
            runner = runner._replace(params=params, opt_state=opt_state, key=key)
            return runner, (rollout.returns.sum(), rollout.dones.sum())

        return jax.lax.scan(update, runner, None, config.updates_per_turn)

    def check(self, runner: Runner) -> None:
        """Checks that the loss recomputes the log-probabilities and values of two rollouts."""
        for _ in range(2):  # the second one starts in the middle of episodes
            new, rollout = self.rollout(runner)
            logits, values = self.replay(runner.params, runner.state, rollout.obs, rollout.dones, runner.first)
            rl.check_replay(rollout.log_probs, log_prob(logits, rollout.actions), rollout.dones)
            rl.check_replay(rollout.values, values, rollout.dones)
            runner = new


def log_prob(logits: Array, actions: Array) -> Array:
    """Returns the log-probabilities of actions."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], -1)[..., 0]


def train(config: Config) -> dict[str, Any]:
    """Trains the three policies in turns; returns the mean return of each update, and the speeds."""
    agents = {name: Agent(config, make_core) for name, make_core in CORES.items()}
    runners = {name: agent.init() for name, agent in agents.items()}
    updates = {}
    for name, agent in agents.items():
        agent.check(runners[name])
        started = time.perf_counter()
        updates[name] = agent.update.lower(runners[name]).compile()
        print(f"{name}: rollout and replay agree; compiled in {time.perf_counter() - started:.1f} s", flush=True)
    returns: dict[str, list[float]] = {name: [] for name in agents}
    seconds: dict[str, list[float]] = {name: [] for name in agents}
    steps_per_turn = config.updates_per_turn * config.rollout_steps * config.num_envs
    for turn in range(config.num_updates // config.updates_per_turn):
        for name in list(agents)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            runners[name], (total, count) = jax.block_until_ready(updates[name](runners[name]))
            seconds[name].append(time.perf_counter() - started)
            returns[name] += (np.asarray(total) / np.asarray(count)).tolist()
        latest = ", ".join(f"{name} {np.mean(a[-config.updates_per_turn :]):+.2f}" for name, a in returns.items())
        print(f"{(turn + 1) * steps_per_turn:>9,} steps: mean return {latest}", flush=True)
    policies = {}
    for name in agents:
        policies[name] = {
            "final_return": float(np.mean(returns[name][-config.updates_per_turn :])),
            "steps_per_second": steps_per_turn / float(np.median(seconds[name])),
            "train_seconds": sum(seconds[name]),
            "returns": [round(value, 4) for value in returns[name]],
        }
    return policies


def draw(config: Config, policies: dict[str, Any], path: Path) -> None:
    """Draws the learning curves."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, config.num_updates + 1) * config.rollout_steps * config.num_envs
    axes.axhline(1, color="0.7", linewidth=1, linestyle=":")
    axes.axhline(0, color="0.7", linewidth=1, linestyle=":")
    axes.text(steps[-1], 1.01, "always right ", ha="right", va="bottom", color="0.4", fontsize="small")
    axes.text(steps[-1], -0.1, "chance ", ha="right", va="top", color="0.4", fontsize="small")
    styles = {"jaxlstm.LSTM": ("C0", "-", 2), "Flax ScannedRNN": ("C1", (0, (2, 2)), 2), "no memory": ("0.3", "-", 1.5)}
    for name, policy in policies.items():
        color, line, width = styles[name]
        label = f"{name}: {policy['steps_per_second']:,.0f} steps/s"
        axes.plot(steps, policy["returns"], linestyle=line, color=color, linewidth=width, label=label)
    axes.set(
        xlabel="environment steps",
        ylabel="mean return of an episode",
        ylim=(-0.35, 1.1),
        xlim=(0, steps[-1]),
        title=f"MemoryChain: repeat the first bit after {config.memory_length} steps",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="center right", title="policy, and speed of training")
    figure.savefig(path, dpi=150)


def main(config: Config) -> None:
    """Trains, prints the results and writes them."""
    started = time.perf_counter()
    policies = train(config)
    for name, policy in policies.items():
        print(f"{name:16} final return {policy['final_return']:+.3f}, {policy['steps_per_second']:>9,.0f} steps/s")
    ratio = policies["jaxlstm.LSTM"]["steps_per_second"] / policies["Flax ScannedRNN"]["steps_per_second"]
    print(f"jaxlstm.LSTM trains at {ratio:.2f} times the steps per second of the Flax ScannedRNN")
    config.out.mkdir(parents=True, exist_ok=True)
    draw(config, policies, config.out / "learning_curves.png")
    results = {
        "config": {name: value for name, value in asdict(config).items() if name != "out"},
        "wall_seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "policies": policies,
    }
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{results['wall_seconds']:.0f} s, {results['processor_seconds']:.0f} s of processor time")
    print(f"results.json and learning_curves.png are in {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
