"""Rollouts, replays and burn-in of `jaxlstm.rl` against episodes run one by one, and the usual mistakes."""

import re
from functools import partial
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm import rl

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "reinforcement_learning.md").read_text(encoding="utf-8")
CODE_BLOCKS = re.findall(
    r"^```python ?(\w*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE
)  # ("", "nnx" or "linen", code)
STEPS, ENVIRONMENTS, INPUT, HIDDEN = 12, 3, 4, 5
LSTM = jaxlstm.LSTM(INPUT, HIDDEN, num_layers=2, learned_state=True, param_dtype="float64")
LAST_STEPS = [[3, 8], [0, 5, 11], []]  # of the episodes of each environment
DONES = np.zeros((STEPS, ENVIRONMENTS), bool)
for _environment, _steps in enumerate(LAST_STEPS):
    DONES[_steps, _environment] = True
FIRST = np.array([True, False, False])  # environment 0 begins an episode at step 0
RNG = np.random.default_rng(0)
PARAMS = cases.random_params(LSTM, RNG)
XS = RNG.standard_normal((STEPS, ENVIRONMENTS, INPUT))
STATE0 = jax.tree.map(lambda a: RNG.standard_normal(a.shape), LSTM.state_shapes((ENVIRONMENTS,)))
TOLERANCE = tolerance(np.float64, STEPS * (INPUT + HIDDEN))


def fresh_state():
    """The learned state, for one environment."""
    return jax.tree.map(lambda a: a[:, None], PARAMS.state)


def run_episodes_apart():
    """Runs every episode by itself, by the oracle: outputs, and the state after the last step."""
    ys = np.zeros((STEPS, ENVIRONMENTS, HIDDEN))
    last = []
    for environment, last_steps in enumerate(LAST_STEPS):
        state = jax.tree.map(lambda a, n=environment: a[:, n : n + 1], STATE0)
        start = 0
        for end in [*last_steps, STEPS - 1]:
            if start > end:
                break  # the last step of the rollout ended an episode
            if start > 0 or FIRST[environment]:
                state = fresh_state()
            part = XS[start : end + 1, environment : environment + 1]
            outputs, *last_state = oracle.network(PARAMS, part, state.h, state.c)
            ys[start : end + 1, environment] = outputs[:, 0]
            state, start = jaxlstm.State(*last_state), end + 1
        last.append(state)
    return ys, jax.tree.map(lambda *arrays: np.concatenate(arrays, 1), *last)


def rollout(lstm, params, xs, dones, state, first, reset_early=False):
    """Steps through a rollout as an actor does; ``reset_early`` resets at the last step of an episode."""
    ys, reset = [], first
    for x, done in zip(xs, dones):
        state, y = lstm.step(params, state, x, reset=done if reset_early else reset)
        ys.append(y)
        reset = done
    return jnp.stack(ys), state


def device(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


def test_resets_from_dones_marks_first_steps_of_episodes():
    expected = np.zeros_like(DONES)
    expected[[0, 4, 9], 0] = True
    expected[[1, 6], 1] = True
    np.testing.assert_array_equal(rl.resets_from_dones(DONES, FIRST), expected)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_resets_from_dones_takes_any_batch_and_a_single_first(batch):
    resets = jax.jit(rl.resets_from_dones)(np.zeros((4, *batch), bool), True)
    np.testing.assert_array_equal(resets, np.broadcast_to(np.arange(4).reshape(4, *[1] * len(batch)) == 0, (4, *batch)))
    assert rl.resets_from_dones(np.zeros((0, *batch), bool), True).shape == (0, *batch)


def test_resets_from_dones_continues_from_one_rollout_to_the_next():
    whole = rl.resets_from_dones(DONES, FIRST)
    halves = rl.resets_from_dones(DONES[:6], FIRST), rl.resets_from_dones(DONES[6:], DONES[5])
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    assert halves[1][0].any()  # an episode ended exactly at the boundary


@pytest.mark.parametrize(
    ("dones", "first", "error", "message"),
    [
        (DONES.astype(np.float32), FIRST, TypeError, r"dones must be boolean, got float32\[12, 3\]"),
        (DONES, FIRST[:2], ValueError, r"first must have shape \[3\].*dones \[12, 3\].*got \[2\]"),
        (DONES, FIRST.astype(np.int32), TypeError, r"first must be boolean, got int32\[3\]"),
        (np.array(True), True, ValueError, r"dones must have shape \(T, \*batch\), got \[\]"),
    ],
)
def test_resets_from_dones_rejects_wrong_arguments(dones, first, error, message):
    with pytest.raises(error, match=message):
        rl.resets_from_dones(dones, first)


def test_replay_equals_episodes_run_apart():
    assert_close(rl.replay(LSTM, device(PARAMS), XS, DONES, STATE0, first=FIRST), run_episodes_apart())


def test_replay_equals_a_rollout_step_by_step():
    params, state = device(PARAMS), device(STATE0)
    expected = rollout(LSTM, params, XS, DONES, state, FIRST)
    assert_close(rl.replay(LSTM, params, XS, DONES, state, first=FIRST), expected)
    rl.check_replay(expected[0], rl.replay(LSTM, params, XS, DONES, state, first=FIRST)[0], DONES)


def test_replay_of_two_rollouts_equals_one():
    replay = partial(rl.replay, LSTM, device(PARAMS))
    ys1, state = replay(XS[:6], DONES[:6], STATE0, first=FIRST)
    ys2, state = replay(XS[6:], DONES[6:], state, first=DONES[5])
    assert_close((np.concatenate([ys1, ys2]), state), run_episodes_apart())


def test_replay_runs_a_convolutional_network():
    conv = jaxlstm.ConvLSTM(1, 2, (3, 3), kernel_size=3, param_dtype="float64")
    params, state = device(cases.random_params(conv, RNG)), conv.initial_state(ENVIRONMENTS)
    xs = RNG.standard_normal((STEPS, ENVIRONMENTS, 3, 3, 1))
    assert_close(rl.replay(conv, params, xs, DONES, state), rollout(conv, params, xs, DONES, state, FIRST & False))


@pytest.mark.parametrize("function", [rl.replay, partial(rl.burn_in, steps=3)])
def test_replay_and_burn_in_reject_wrong_arguments(function):
    params = device(PARAMS)
    with pytest.raises(ValueError, match=r"dones must have shape \[12, 3\], got \[11, 3\] \(xs has shape \[12, 3, 4\]"):
        function(LSTM, params, XS, DONES[1:], STATE0)
    with pytest.raises(TypeError, match=r"lstm must be a jaxlstm.LSTM or jaxlstm.ConvLSTM, got"):
        function(params, LSTM, XS, DONES, STATE0)
    both = jaxlstm.LSTM(INPUT, HIDDEN, bidirectional=True)
    with pytest.raises(ValueError, match="does not support bidirectional=True"):
        function(both, both.init(jax.random.key(0)), XS, DONES, both.initial_state(ENVIRONMENTS))


@pytest.mark.parametrize("steps", [0, 4, 6, 11])  # at 4 and 6 an episode ended one step before
def test_burn_in_returns_the_steps_after_it(steps):
    ys, state = rl.burn_in(LSTM, device(PARAMS), XS, DONES, STATE0, steps, first=FIRST)
    expected, last = run_episodes_apart()
    assert_close((ys, state), (expected[steps:], last))


@pytest.mark.slow
def test_burn_in_gradient_stops_before_the_first_step_with_a_loss():
    """The gradient equals the one of a replay that starts from the state after the burn-in as a constant."""
    steps = 7
    params, state0 = device(PARAMS), device(STATE0)

    def loss(params, xs, state0):
        return (rl.burn_in(LSTM, params, xs, DONES, state0, steps, first=FIRST)[0] ** 2).sum()

    _, state = rollout(LSTM, params, XS[:steps], DONES[:steps], state0, FIRST)

    def expected_loss(params):
        return (rollout(LSTM, params, XS[steps:], DONES[steps:], state, jnp.asarray(DONES[steps - 1]))[0] ** 2).sum()

    gradient, xs_gradient, state_gradient = jax.grad(loss, argnums=(0, 1, 2))(params, jnp.asarray(XS), state0)
    assert_close(gradient, jax.grad(expected_loss)(params))
    assert not xs_gradient[:steps].any()
    assert xs_gradient[steps:].any((1, 2)).all()
    assert not any(a.any() for a in state_gradient)


@pytest.mark.slow
def test_burn_in_differentiates_no_recurrence_of_the_first_steps():
    """Linearizing saves nothing of the burn-in: residuals do not grow with its length."""

    def residuals(num_steps):
        xs, dones = jnp.ones((num_steps, ENVIRONMENTS, INPUT)), jnp.zeros((num_steps, ENVIRONMENTS), bool)
        _, backward = jax.vjp(
            lambda params: rl.burn_in(LSTM, params, xs, dones, device(STATE0), num_steps - 5)[0], device(PARAMS)
        )
        return sum(a.size for a in jax.tree.leaves(backward))

    assert residuals(100) == residuals(50)


@pytest.mark.parametrize("steps", [12, 13])
def test_burn_in_rejects_steps_that_leave_nothing(steps):
    with pytest.raises(ValueError, match=f"steps must be less than the number of steps of xs, 12, got {steps}"):
        rl.burn_in(LSTM, device(PARAMS), XS, DONES, STATE0, steps)


# Episodes that end at step 5 of environment 0, and at steps 3 and 8 of environment 1; environment 2 ends none.
LATER_DONES = np.zeros((STEPS, ENVIRONMENTS), bool)
LATER_DONES[[5, 3, 8], [0, 1, 1]] = True


def test_check_replay_finds_a_loss_that_resets_at_last_steps():
    """The off-by-one that people make in the loss: ``resets=dones``."""
    params, state = device(PARAMS), device(STATE0)
    ys, _ = rollout(LSTM, params, XS, LATER_DONES, state, np.zeros(ENVIRONMENTS, bool))
    rl.check_replay(ys, rl.replay(LSTM, params, XS, LATER_DONES, state)[0], LATER_DONES)
    wrong, _ = LSTM(params, XS, state, resets=LATER_DONES)
    message = r"first at step 3 of environment 1: .* \(16 of 36 steps differ\); this is the last step of an episode"
    with pytest.raises(ValueError, match=message):  # all steps from 5 and from 3 on: 7 and 9
        rl.check_replay(ys, wrong, LATER_DONES)


def test_check_replay_finds_a_rollout_that_resets_at_last_steps():
    params, state = device(PARAMS), device(STATE0)
    ys, _ = rollout(LSTM, params, XS, LATER_DONES, state, np.zeros(ENVIRONMENTS, bool), reset_early=True)
    right, _ = rl.replay(LSTM, params, XS, LATER_DONES, state)
    with pytest.raises(
        ValueError, match=r"first at step 3 of environment 1: .*last step of an episode, .*a step early"
    ):
        rl.check_replay(ys, right, LATER_DONES)


def test_check_replay_finds_a_loss_without_resets():
    params, state = device(PARAMS), device(STATE0)
    ys, _ = rollout(LSTM, params, XS, LATER_DONES, state, np.zeros(ENVIRONMENTS, bool))
    with pytest.raises(ValueError, match=r"first at step 4 of environment 1: .*first step of an episode, .*not reset"):
        rl.check_replay(ys, LSTM(params, XS, state)[0], LATER_DONES)


def test_check_replay_finds_another_initial_state():
    params = device(PARAMS)
    ys, _ = rl.replay(LSTM, params, XS, LATER_DONES, STATE0, first=FIRST)
    wrong, _ = rl.replay(LSTM, params, XS, LATER_DONES, STATE0)
    with pytest.raises(ValueError, match=r"first at step 0 of environment 0: .*compare state0 and first"):
        rl.check_replay(ys, wrong, LATER_DONES)


def test_check_replay_finds_other_inputs():
    params, xs = device(PARAMS), XS.copy()
    xs[2, 2] += 0.1
    ys, _ = rl.replay(LSTM, params, XS, LATER_DONES, STATE0)
    with pytest.raises(ValueError, match=r"first at step 2 of environment 2: .*no episode starts or ends there"):
        rl.check_replay(ys, rl.replay(LSTM, params, xs, LATER_DONES, STATE0)[0], LATER_DONES)


@pytest.mark.parametrize(
    ("batch", "features", "place", "where"),
    [
        ((), (), (1,), "step 1:"),
        ((4,), (), (1, 2), "step 1 of environment 2:"),
        ((4, 3), (5,), (1, 2, 0, 4), r"step 1 of environment \(2, 0\):"),
    ],
)
def test_check_replay_names_step_and_environment(batch, features, place, where):
    rollout_values = np.zeros((3, *batch, *features), np.float32)
    replayed = rollout_values.copy()
    replayed[place] = 0.5
    replayed[-1] = 0.25
    with pytest.raises(ValueError, match=f"first at {where} 0 and 0.5, expected equal within 0.0003 "):
        rl.check_replay(rollout_values, replayed, np.zeros((3, *batch), bool))


def test_check_replay_tolerates_rounding_and_equal_infinities():
    dones = np.zeros((1, 4), bool)
    values = np.array([[1.0, 1e6, np.inf, np.nan]], np.float32)
    rl.check_replay(values, values * np.float32(1 + 1e-5), dones)
    for other in ([[1.01, 1e6, np.inf, np.nan]], [[1, 1e6, -np.inf, np.nan]], [[1, 1e6, np.inf, 0]]):
        with pytest.raises(ValueError, match="differ first at step 0"):
            rl.check_replay(values, np.array(other, np.float32), dones)
    rl.check_replay(values, np.array([[1.01, 1e6, np.inf, np.nan]], np.float32), dones, tolerance=0.02)
    rl.check_replay(values.astype(jnp.bfloat16), values * np.float32(1.01), dones)  # by the narrower dtype
    rl.check_replay(values, values, dones, tolerance=0)
    with pytest.raises(ValueError, match=r"tolerance must be at least 0, got -1"):
        rl.check_replay(values, values, dones, tolerance=-1)
    with pytest.raises(TypeError, match="tolerance must be a number, got 'a'"):
        rl.check_replay(values, values, dones, tolerance="a")


@pytest.mark.parametrize(
    ("rollout_shape", "replayed_shape", "message"),
    [
        ((3, 2, 4), (3, 2), r"replayed must have shape \[3, 2, 4\], got \[3, 2\]"),
        ((2, 3), (2, 3), r"must have the shape of dones, .* got \[2, 3\] and dones \[3, 2\]"),
    ],
)
def test_check_replay_rejects_wrong_shapes(rollout_shape, replayed_shape, message):
    with pytest.raises(ValueError, match=message):
        rl.check_replay(np.zeros(rollout_shape), np.zeros(replayed_shape), np.zeros((3, 2), bool))


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 0, 5), (0, 2)])
def test_check_replay_of_nothing_finds_nothing(shape):
    rl.check_replay(np.zeros(shape), np.zeros(shape), np.zeros(shape[:2], bool))


def test_check_replay_rejects_traced_arrays():
    with pytest.raises(TypeError, match=r"rollout must be a concrete array, .* outside of jax.jit"):
        jax.jit(rl.check_replay)(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((3, 2), bool))


def code_of(library):
    return [code for name, code in CODE_BLOCKS if name == library]


@pytest.mark.slow
@pytest.mark.parametrize("code", code_of(""))
def test_guide_python_block_runs(code):
    with jax.enable_x64(False):
        exec(code, {})


@pytest.mark.slow
def test_guide_quotes_the_error_of_the_usual_mistake():
    names: dict = {}
    code = next(code for code in code_of("") if "rl.check_replay" in code)
    with jax.enable_x64(False):
        exec(code, names)
        wrong, _ = names["lstm"](names["params"], names["xs"], names["state0"], resets=names["dones"])
        with pytest.raises(ValueError, match="rollout and replay differ") as raised:
            rl.check_replay(names["rollout_ys"], wrong, names["dones"])
    quoted = " ".join(re.findall(r"^```text\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)[0].split())
    numbers = re.compile(r"-?[\d.]+ and -?[\d.]+,")  # the last digits vary between machines
    assert numbers.sub("", str(raised.value)) == numbers.sub("", quoted)


def check_core(act, replay):
    """Compares `act`, step by step, with the call over the whole rollout, and with a call that has wrong resets."""
    obs = jax.random.normal(jax.random.key(1), (STEPS, ENVIRONMENTS, INPUT), jnp.float32)
    state = state0 = jaxlstm.LSTM(HIDDEN, HIDDEN).initial_state(ENVIRONMENTS)
    first, logits, values = jnp.ones(ENVIRONMENTS, bool), [], []
    for t in range(STEPS):
        state, step_logits, step_values = act(obs[t], state, first)
        first = jnp.asarray(DONES[t])
        logits.append(step_logits)
        values.append(step_values)
    last, *replayed = replay(obs, jnp.asarray(DONES), state0, jnp.ones(ENVIRONMENTS, bool))
    rl.check_replay(jnp.stack(logits), replayed[0], DONES)
    rl.check_replay(jnp.stack(values), replayed[1], DONES)
    for a, b in zip(last, state, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    early = jnp.concatenate([jnp.asarray(DONES[1:]), jnp.zeros((1, ENVIRONMENTS), bool)])
    with pytest.raises(ValueError, match="rollout and replay differ"):
        rl.check_replay(jnp.stack(logits), replay(obs, early, state0, jnp.asarray(DONES[0]))[1], DONES)


@pytest.mark.slow
def test_guide_nnx_core_replays_its_rollout():
    names: dict = {}
    exec(code_of("nnx")[0], names)
    with jax.enable_x64(False):
        core = names["Core"](INPUT, HIDDEN, 2, rngs=names["nnx"].Rngs(0))
        check_core(core.act, core)


@pytest.mark.slow
def test_guide_linen_core_replays_its_rollout():
    names: dict = {}
    exec(code_of("linen")[0], names)
    with jax.enable_x64(False):
        core = names["Core"](HIDDEN, 2)
        state, first = jaxlstm.LSTM(HIDDEN, HIDDEN).initial_state(ENVIRONMENTS), jnp.ones(ENVIRONMENTS, bool)
        dones = jnp.zeros((1, ENVIRONMENTS), bool)
        variables = core.init(jax.random.key(0), jnp.zeros((1, ENVIRONMENTS, INPUT)), dones, state, first)
        check_core(partial(core.apply, variables, method="act"), partial(core.apply, variables))


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_guide_cores_have_twenty_lines(library):
    (code,) = code_of(library)
    assert len(code.partition("class Core")[2].split("\n")) <= 20
