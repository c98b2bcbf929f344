"""Hopper GPU kernels: numbers in the interpreter, programs lowered for CUDA and compiled for an H100, errors.

The interpreter executes copies, barriers and products. It models neither registers nor caches nor semaphores: in it the
blocks of a grid wait at the barrier of a cluster.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # which JAX 0.10 has nowhere else
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding
from parity import assert_within

import jaxlstm
from jaxlstm.cells import Cell
from jaxlstm.experimental.pallas import jaxpr_tiling, mosaic_gpu_cluster, mosaic_gpu_grid, mosaic_gpu_scan
from jaxlstm.experimental.pallas.target import INTERPRET, GpuTarget, kernel_target

pytestmark = pytest.mark.slow
HAS_CLUSTER_BARRIERS = hasattr(gpu_callbacks, "call_allocate_cluster_barriers")
DETECTS_RACES = "detect_races" in InterpretGPUParams.__dataclass_fields__
INTERPRET_OPTIONS: dict[str, Any] = {"detect_races": True} if DETECTS_RACES else {}
INTERPRETED_GPU = GpuTarget(InterpretGPUParams(**INTERPRET_OPTIONS))
HOPPER = GpuTarget()
# Both kernels round to bfloat16 at the same places, from numbers that differ in the last bits of float32. The bound is
# half a unit in the last place, the effect of one number rounded the other way. The largest error seen is 3e-7.
ONE_ROUNDING = {"rtol": 2.0**-8, "atol": 2.0**-8}


def network(*sizes, **options):
    return jaxlstm.LSTM(*sizes, implementation="pallas", **{"dtype": jnp.bfloat16, **options})


def lower_for_cuda(function, *shapes):
    """Returns the program for CUDA."""
    with kernel_target(HOPPER):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def make_program(lstm, sizes, **options):
    """Returns a function that computes results, gradients and tangents of a network, and its arguments in float32."""
    num_steps, batch_size = sizes
    rng = np.random.default_rng(num_steps + batch_size)

    def normal(a):
        return rng.standard_normal(a.shape).astype(np.float32)

    params = cases.random_params(lstm, rng, np.float32)
    xs = rng.standard_normal((num_steps, batch_size, lstm.input_size)).astype(np.float32)
    state = jax.tree.map(normal, lstm.initial_state((batch_size,), params))
    direction = jax.tree.map(normal, (params, xs, state))

    def loss(*args):
        result = lstm(*args, **options)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves(result)), result

    def program(*args):
        gradient, result = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
        return result, gradient, jax.jvp(lambda *a: loss(*a)[1], args, direction)[1]

    return program, (params, xs, state)


def assert_gpu_equals_tpu(program, args):
    """Compares the two kernels, both interpreted."""
    results = []
    for target in (INTERPRETED_GPU, INTERPRET):
        with kernel_target(target):
            results.append(jax.block_until_ready(jax.jit(lambda *a: program(*a))(*args)))
    for actual, expected in zip(*results):
        assert_within(actual, expected, ONE_ROUNDING)


def assert_no_races():
    if DETECTS_RACES:
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        assert not interpret_pallas_call.get_races().races_found


CONFIGURATIONS = {
    "one layer": {},
    "everything": {
        "cell": "peephole", "learned_state": True, "zoneout_h": 0.3, "zoneout_c": 0.2, "recurrent_dropout": 0.4,
    },
    "two layers bidirectional": {"num_layers": 2, "bidirectional": True},
    "cifg expected": {"cell": "cifg", "zoneout_h": 0.3, "zoneout_c": 0.2, "recurrent_dropout": 0.4},
    "rnn": {"cell": "rnn", "bidirectional": True},
    "rnn relu": {"cell": "rnn", "activation": "relu"},
    "rnn sigmoid": {"cell": "rnn", "activation": "sigmoid", "learned_state": True},
    "no bias": {"use_bias": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "inputs"),
    [("one layer", "plain"), *((c, i) for c in CONFIGURATIONS for i in ("everything", "everything reverse"))],
)
def test_gpu_results_gradients_and_tangents_equal_tpu(configuration, inputs):
    """Lengths, a mask, resets and random masks; 5 of the 64 units of a block, 4 of the 16 rows of a cluster."""
    key: dict[str, Any] = {"key": jax.random.key(1)} if configuration == "everything" else {}
    options = {name: value for name, value in cases.make("one layer", inputs).options.items() if name != "key"}
    assert_gpu_equals_tpu(*make_program(network(3, 5, **CONFIGURATIONS[configuration]), (7, 4), **options, **key))


def test_gpu_second_derivatives_equal_tpu():
    lstm = network(3, 5)
    _, args = make_program(lstm, (3, 4))
    direction = jax.tree.map(np.ones_like, args)
    gradient = jax.grad(lambda *a: (lstm(*a)[0].astype(jnp.float32) ** 2).sum(), (0, 1, 2))

    def gradient_sum(*args):
        return sum(a.sum() for a in jax.tree.leaves(gradient(*args)))

    def program(*args):
        return jax.jvp(gradient, args, direction)[1], jax.grad(gradient_sum, (0, 1, 2))(*args)

    assert_gpu_equals_tpu(program, args)


@pytest.mark.parametrize("configuration", ["one layer", "rnn"])
def test_gpu_bfloat16_equals_oracle(configuration):
    with kernel_target(INTERPRETED_GPU):
        parity.check_narrow_dtype(configuration, jnp.bfloat16, "pallas")


def random_step_masks(num_steps, batch_size):
    rng = np.random.default_rng(0)
    shape = (num_steps, batch_size)
    return {"mask": rng.random(shape) < 0.7, "resets": rng.random(shape) < 0.3}


@pytest.mark.skipif(not HAS_CLUSTER_BARRIERS, reason="the interpreter of this JAX has no barriers between blocks")
@pytest.mark.parametrize(("units", "configuration"), [(70, "rnn"), (65, "everything"), (192, "everything")])
def test_cluster_of_several_blocks_equals_tpu(units, configuration):
    """A block whose units are not full, and a second cluster whose rows are not full."""
    lstm = network(3, units, **CONFIGURATIONS[configuration])
    assert_gpu_equals_tpu(*make_program(lstm, (3, 17), **random_step_masks(3, 17)))
    assert_no_races()


def needs_blocks(num_blocks):
    """Skips without threads for all blocks: interpreted blocks that wait for one another occupy one each."""
    num_threads = int(os.environ.get("NPROC", os.cpu_count() or 1))
    return pytest.mark.skipif(
        not HAS_CLUSTER_BARRIERS or num_threads < 2 * num_blocks > 4,
        reason=f"needs a JAX with barriers between interpreted blocks and NPROC={2 * num_blocks}, got {num_threads}",
    )


@pytest.mark.parametrize(
    ("units", "configuration", "rows"),
    [
        (5, "rnn", 16),  # one block
        pytest.param(70, "rnn", 16, marks=needs_blocks(2)),
        pytest.param(64, "everything", 16, marks=needs_blocks(4)),
        pytest.param(64, "cifg expected", 16, marks=needs_blocks(4)),
        (5, "rnn", 32),
    ],
)
def test_grid_equals_tpu(units, configuration, rows, monkeypatch):
    """Two groups, the second not full. All but the wait is what a GPU would execute."""
    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: None)
    monkeypatch.setattr(mosaic_gpu_grid, "rows_that_fit", lambda *sizes: rows)
    lstm, sizes = network(3, units, **CONFIGURATIONS[configuration]), (3, rows + 1)
    assert_gpu_equals_tpu(*make_program(lstm, sizes, **random_step_masks(*sizes)))
    assert_no_races()


@needs_blocks(8)
@pytest.mark.parametrize(("tile_k", "num_buffers"), [(64, 1), (64, 2), (128, 1)])
def test_grid_messages_fetched_in_tiles_equal_tpu(tile_k, num_buffers, monkeypatch):
    """128 units, fetched in two tiles into one buffer or two, or all at once."""

    def matmul_spec(num_products, num_messages, units, rows):
        assert units == 128
        return mosaic_gpu_scan.MatmulSpec(1, units // tile_k, 64, tile_k, num_messages * rows, num_buffers)

    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: None)
    monkeypatch.setattr(mosaic_gpu_grid, "matmul_spec", matmul_spec)
    assert_gpu_equals_tpu(*make_program(network(3, 100), (2, 3)))


@pytest.mark.parametrize(("rows", "num_buffers"), [(16, 1), (16, 4), (32, 4), (16, 3)])
def test_cluster_rows_and_buffers_equal_tpu(rows, num_buffers, monkeypatch):
    """33 rows in clusters of 16 or 32, with resets at the first and the last step.

    Of the four messages sent backward, all are in shared memory at once, or only some of them.
    """
    limit = mosaic_gpu_cluster.SHARED_MEMORY
    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: rows)
    monkeypatch.setattr(mosaic_gpu_cluster, "footprint", lambda *sizes: limit + (sizes[-1] > num_buffers))
    resets = np.zeros((2, 33), bool)
    resets[0, ::2] = resets[-1, ::3] = True
    assert_gpu_equals_tpu(*make_program(network(3, 2), (2, 33), resets=resets))


def test_gpu_vmap_equals_batch():
    lstm = network(3, 5)
    case = cases.make("one layer", "everything")
    _, (params, xs, state) = make_program(lstm, (7, 4))

    def run(x, state, length, mask, resets):
        return lstm(params, x, state, lengths=length, mask=mask, resets=resets)

    options = [case.options[name] for name in ("lengths", "mask", "resets")]
    with kernel_target(INTERPRETED_GPU):
        mapped = jax.jit(jax.vmap(run, (1, 1, 0, 1, 1), out_axes=1))(xs, state, *options)
        assert_within(mapped, jax.jit(run)(xs, state, *options), ONE_ROUNDING)


def test_gpu_empty_batch_and_single_unit():
    lstm = network(3, 1)
    _, (params, xs, state) = make_program(lstm, (2, 1))
    mask = np.array([[True], [False]])
    with kernel_target(INTERPRETED_GPU):
        empty = jax.jit(lstm)(params, xs[:, :0], jax.tree.map(lambda a: a[:, :0], state))
        assert [a.shape for a in jax.tree.leaves(empty)] == [(2, 0, 1), (1, 0, 1), (1, 0, 1)]
        actual = jax.jit(lstm)(params, xs, state, mask=mask)
    with kernel_target(INTERPRET):
        assert_within(actual, jax.jit(lstm)(params, xs, state, mask=mask), ONE_ROUNDING)


TWO_GATES = Cell(
    gates={"f": lambda z: jnp.clip(0.25 * z + 0.5, 0, 1), "g": None},
    update=lambda f, g, c: jnp.where(f > 0.5, f * c + (1 - f) * jax.nn.relu(g), jnp.exp(-(c**2)) * g),
    output=lambda c: jnp.tanh(c) - 0.1,
)


def test_gpu_user_defined_cell_equals_tpu():
    assert_gpu_equals_tpu(*make_program(network(3, 5, cell=TWO_GATES), (4, 3)))


def test_eval_on_tiles_equals_function_of_each_number():
    def function(a, b):
        moved = jnp.concatenate([a[::-1], jnp.pad(b, ((1, 2), (0, 1)), constant_values=3.0)[:, 1:]])
        moved = jnp.stack([moved.T, 2 * jax.lax.pad(moved.T, np.float32(0), [(-1, 1, 0), (2, -2, 0)])])
        first, second = jnp.split(moved, [2], axis=-1)
        return jnp.squeeze(first[:1, 0] * second[0, 0, 1], 0), jax.jit(jnp.tanh)(second), a > b

    shapes = [jax.ShapeDtypeStruct((2, 1), jnp.float32)] * 2
    jaxpr = jax.make_jaxpr(function)(*shapes)
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 2, 1, 3, 4)).astype(np.float32)
    results = jaxpr_tiling.eval_on_tiles(jaxpr, (3, 4), [list(jnp.asarray(a).reshape(-1, 3, 4)) for a in numbers])
    for at in np.ndindex(3, 4):
        for result, expected in zip(results, function(*numbers[..., *at])):
            np.testing.assert_allclose(np.reshape([a[at] for a in result], expected.shape), expected, rtol=1e-6)


CLUSTER_SIZES = [(1024, 16, 64), (1024, 16, 256), (1024, 16, 384), (1000, 700, 370)]  # T, B, H
GRID_SIZES = [(1024, 16, 768), (1000, 60, 1000), (1024, 16, 1600)]
OPTIONS = [  # options, and whether a mask and resets are passed
    ({}, False),
    ({**CONFIGURATIONS["everything"], "bidirectional": True}, True),
    ({"cell": "cifg", "remat": 300}, True),
    ({"cell": "rnn", "activation": "relu"}, False),
]


@pytest.mark.parametrize(("options", "with_masks"), OPTIONS)
@pytest.mark.parametrize("sizes", CLUSTER_SIZES + GRID_SIZES)
def test_kernels_lower_for_cuda(options, with_masks, sizes):
    """One kernel forward; forward and backward for a gradient; two forward for a tangent.

    Lowering also checks that they fit into shared memory.
    """
    num_steps, batch_size, units = sizes
    lstm = network(5, units, **options)
    shapes: list[Any] = [
        jax.eval_shape(lstm.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((num_steps, batch_size, 5), jnp.float32),
    ]
    if with_masks:
        shapes += [jax.ShapeDtypeStruct((num_steps, batch_size), jnp.bool_)] * 2
    key: dict[str, Any] = {"key": jax.random.key(0)} if "zoneout_h" in options else {}

    def loss(params, xs, mask=None, resets=None):
        result = lstm(params, xs, mask=mask, resets=resets, **key)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves(result))

    def tangent(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    forward, backward, jvp = (
        lower_for_cuda(f, *shapes).as_text().count("@mosaic_gpu") for f in (loss, jax.grad(loss, (0, 1)), tangent)
    )
    scans = lstm.num_directions * (2 if "remat" in options else 1)  # a second kernel takes the remaining steps
    assert forward == scans
    assert backward == scans * (3 if "remat" in options else 2)  # a chunk is recomputed
    assert jvp == scans * 2


def test_gpu_kernels_lower_within_shard_map():
    lstm = network(3, 5)

    def loss(params, xs):
        return lax.psum((lstm(params, xs)[0].astype(jnp.float32) ** 2).sum(), "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec(None, "data"))
    total = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    shapes = (jax.eval_shape(lstm.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 6, 3), jnp.float32))
    assert lower_for_cuda(jax.grad(total), *shapes).as_text().count("@mosaic_gpu") == 2


H100 = (Path(__file__).parents[2] / "benchmarks" / "h100.textproto").read_text(encoding="utf-8")


@pytest.mark.skipif(
    not (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")) or shutil.which("ptxas") is None,
    reason="needs the compiler of jax[cuda] and ptxas, but no GPU",
)
@pytest.mark.parametrize(
    ("options", "with_masks", "units"),
    [({}, False, 384), (*OPTIONS[1], 384), ({}, False, 5), ({}, False, 768), (*OPTIONS[1], 768)],
)
def test_kernels_compile_for_h100(options, with_masks, units):
    device = SingleDeviceSharding(get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0])
    lstm = network(5, units, **options)

    def on_device(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)

    shapes = [
        jax.tree.map(on_device, jax.eval_shape(lstm.init, jax.random.key(0))),
        on_device(jax.ShapeDtypeStruct((64, 16, 5), jnp.float32)),
        *[on_device(jax.ShapeDtypeStruct((64, 16), jnp.bool_))] * (2 * with_masks),
    ]

    def loss(params, xs, mask=None, resets=None):
        return (lstm(params, xs, mask=mask, resets=resets)[0].astype(jnp.float32) ** 2).sum()

    def tangent(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    # For the matrix products outside of the kernel: autotuning and Triton need a GPU.
    compiler_options: Any = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    for function in (loss, jax.grad(loss), tangent):
        assert "mosaic_gpu" in str(lower_for_cuda(function, *shapes).compile(compiler_options).as_text())


def trace(lstm):
    """Traces a call without computing it."""
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.eval_shape(lstm, params, jax.ShapeDtypeStruct((4, 2, 3), "float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float32}, r"needs dtype=bfloat16 .* got products in float32 and sums in float32; .* TF32"),
        ({"dtype": jnp.float16}, "got products in float16"),
        ({"param_dtype": jnp.float64}, "got products in bfloat16 and sums in float64"),
        ({"layer_norm": True}, "does not support layer normalization on a Hopper GPU"),
        ({"proj_size": 2}, "does not support a projection on a Hopper GPU"),
    ],
)
def test_gpu_unsupported_options_raise(options, message):
    with kernel_target(HOPPER), pytest.raises(ValueError, match=f"implementation='pallas' .*{message}"):
        trace(network(3, 5, **options))


def test_cluster_is_preferred_to_grid(monkeypatch):
    def raise_error(*sizes):
        raise ValueError("grid")

    monkeypatch.setattr(mosaic_gpu_grid, "rows_that_fit", raise_error)
    with kernel_target(HOPPER):
        for cell, largest in (("lstm", 384), ("cifg", 512), ("rnn", 512)):
            trace(network(3, largest, cell=cell))
            with pytest.raises(ValueError, match="grid"):
                trace(network(3, largest + 1, cell=cell))


@pytest.mark.parametrize(
    ("cell", "block_units", "largest"), [("lstm", 16, 1600), ("cifg", 16, 1600), ("rnn", 64, 1728)]
)
def test_weights_too_large_for_gpu_raise_with_largest_size(cell, block_units, largest):
    message = (
        f"hidden_size={largest + 1} takes {(largest + 64) // block_units} blocks of {block_units} units, each with "
        f"{(largest + 64) // 8} KiB of weights in 227 KiB, .* 132 blocks run at once; hidden_size fits up to {largest}"
    )
    with kernel_target(HOPPER):
        trace(network(3, largest, cell=cell))
        with pytest.raises(ValueError, match=message):
            trace(network(3, largest + 1, cell=cell))


def test_grid_rows_that_fit_raises_if_blocks_do_not_run_at_once():
    sizes = (4, 768)  # 48 blocks for every 16 or 32 rows
    message = r"48 blocks .* batch of 65, and 132 .*, and a batch with 768 units up to 64"
    with kernel_target(HOPPER):
        assert [mosaic_gpu_grid.rows_that_fit(*sizes, batch) for batch in (0, 16, 32, 33, 64)] == [16, 16, 16, 32, 32]
        with pytest.raises(ValueError, match=message):
            mosaic_gpu_grid.rows_that_fit(*sizes, 65)
    with kernel_target(GpuTarget(num_sms=47)), pytest.raises(ValueError, match=r"47 .* fits up to 704$"):
        mosaic_gpu_grid.rows_that_fit(*sizes, 16)


def test_grid_rows_that_fit_raises_for_too_many_gates():
    with kernel_target(HOPPER):
        assert mosaic_gpu_grid.rows_that_fit(8, 512, 16) == 16
        with pytest.raises(ValueError, match=r"hidden_size fits up to 0$"):
            mosaic_gpu_grid.rows_that_fit(9, 512, 16)


def test_pallas_on_another_gpu_raises(monkeypatch):
    class Gpu:
        device_kind = "NVIDIA A100"
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    message = r"9.x; got a NVIDIA A100 of compute capability 8.0"
    with kernel_target(None), pytest.raises(ValueError, match=message):
        trace(network(3, 5))
    monkeypatch.setattr(Gpu, "compute_capability", "9.0")
    with kernel_target(None), pytest.raises(RuntimeError, match="failed in a check at a small size"):  # run on a CPU
        trace(network(3, 5))


def test_gpu_cell_of_another_operation_raises():
    other = Cell(gates={"g": None}, update=lambda g, c: g + c, output=lambda c: jax.lax.lgamma(c))
    message = r"needs an elementwise cell .*, got the operation 'lgamma'"
    with kernel_target(HOPPER), pytest.raises(ValueError, match=message):
        trace(network(3, 5, cell=other))


def test_cluster_rows_that_fit_grow_if_clusters_would_wait():
    assert mosaic_gpu_cluster.rows_that_fit(4, 256, 33 * 16) == 16  # 33 clusters of 4 blocks run at once
    assert mosaic_gpu_cluster.rows_that_fit(4, 256, 33 * 16 + 1) == 32
    assert mosaic_gpu_cluster.rows_that_fit(4, 384, 10_000) == 16  # more rows do not fit
