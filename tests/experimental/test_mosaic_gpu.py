"""The kernels for Hopper GPUs: numbers by interpretation, programs by lowering them for CUDA, refusals by name.

An interpreter carries out what is written of copies, barriers and products. It knows nothing of registers and caches,
nor of semaphores: the blocks of a grid wait in it as those of a cluster.
"""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # which JAX 0.10 has nowhere else
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding
from test_parity import assert_within

import jaxlstm
from jaxlstm.cells import Cell
from jaxlstm.experimental.pallas import (
    jaxpr_tiling,
    mosaic_gpu_cluster,
    mosaic_gpu_grid,
    mosaic_gpu_scan,
    mosaic_tpu_scan,
)

BLOCKS_MEET = hasattr(gpu_callbacks, "call_allocate_cluster_barriers")
RACES = "detect_races" in InterpretGPUParams.__dataclass_fields__
CHECKS: dict[str, Any] = {"detect_races": True} if RACES else {}
INTERPRETED = mosaic_tpu_scan.Hopper(InterpretGPUParams(**CHECKS))
HOPPER = mosaic_tpu_scan.Hopper()
# Both kernels round to bfloat16 in the same places, and from the same numbers but for the last bits of float32: half a
# unit in the last place is what one number that falls to the other side would change. Seen is 3e-7.
ONE_ROUNDING = {"rtol": 2.0**-8, "atol": 2.0**-8}


def network(*sizes, **options):
    return jaxlstm.LSTM(*sizes, implementation="pallas", **{"dtype": jnp.bfloat16, **options})


def lowered(function, *shapes):
    """The program for CUDA."""
    with mosaic_tpu_scan.making_for(HOPPER):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def everything(lstm, sizes, **options):
    """A function for outputs and state, gradient and tangent, and its arguments in float32."""
    steps, batch = sizes
    rng = np.random.default_rng(steps + batch)
    params = cases.random_params(lstm, rng, np.float32)
    xs = rng.standard_normal((steps, batch, lstm.input_size)).astype(np.float32)
    state = jax.tree.map(
        lambda a: rng.standard_normal(a.shape).astype(np.float32), lstm.initial_state((batch,), params)
    )
    slopes = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), (params, xs, state))

    def loss(*arguments):
        result = lstm(*arguments, **options)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves(result)), result

    def run(*arguments):
        gradient, result = jax.grad(loss, (0, 1, 2), has_aux=True)(*arguments)
        return result, gradient, jax.jvp(lambda *a: loss(*a)[1], arguments, slopes)[1]

    return run, (params, xs, state)


def on_a_gpu_and_on_a_tpu(run, arguments):
    """What the two kernels compute, interpreted."""
    for made_for in (INTERPRETED, mosaic_tpu_scan.INTERPRET):
        with mosaic_tpu_scan.making_for(made_for):
            yield jax.block_until_ready(jax.jit(lambda *a: run(*a))(*arguments))


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
FAST = [("one layer", "plain")]


@pytest.mark.parametrize(
    ("configuration", "inputs"),
    cases.slow_but(
        FAST,
        [
            (c, i)
            for c in CONFIGURATIONS
            for i in ("plain", "everything", "everything reverse")
            if i != "plain" or c == "one layer"
        ],
    ),
)
def test_outputs_state_gradient_and_tangent_are_those_of_the_tpu_kernel(configuration, inputs):
    """Lengths, a mask, resets and random masks among it; 5 units of a block's 64, 4 rows of a cluster's 16."""
    key: dict[str, Any] = {"key": jax.random.key(1)} if configuration == "everything" else {}
    options = {name: value for name, value in cases.make("one layer", inputs).options.items() if name != "key"}
    run, arguments = everything(network(3, 5, **CONFIGURATIONS[configuration]), (7, 4), **options, **key)
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_tpu_kernel():
    lstm = network(3, 5)
    _, arguments = everything(lstm, (3, 4))
    slopes = jax.tree.map(np.ones_like, arguments)
    gradient = jax.grad(lambda *a: (lstm(*a)[0].astype(jnp.float32) ** 2).sum(), (0, 1, 2))

    def along(*arguments):
        return sum(a.sum() for a in jax.tree.leaves(gradient(*arguments)))

    def run(*arguments):
        return jax.jvp(gradient, arguments, slopes)[1], jax.grad(along, (0, 1, 2))(*arguments)

    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["one layer", "rnn"])
def test_against_the_oracle(configuration):
    """Tolerances and cases as for all that is computed with products in bfloat16."""
    with mosaic_tpu_scan.making_for(INTERPRETED):
        test_parity.test_narrow_dtypes(configuration, jnp.bfloat16, "pallas")


@pytest.mark.skipif(not BLOCKS_MEET, reason="the interpreter of this JAX knows no barrier between blocks")
@pytest.mark.parametrize(
    ("units", "configuration"),
    [(70, "rnn"), *(pytest.param(n, "everything", marks=pytest.mark.slow) for n in (65, 192))],
)
def test_blocks_of_a_cluster(units, configuration):
    """A share of the units in each block, the last of them not full; two clusters, the second not full."""
    rng = np.random.default_rng(0)
    options = {"mask": rng.random((3, 17)) < 0.7, "resets": rng.random((3, 17)) < 0.3}
    run, arguments = everything(network(3, units, **CONFIGURATIONS[configuration]), (3, 17), **options)
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)
    if RACES:
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        assert not interpret_pallas_call.get_races().races_found


def needs(blocks):
    """Blocks that wait for one another in the interpreter each want threads of XLA's pool, or all wait for ever."""
    threads = int(os.environ.get("NPROC", os.cpu_count() or 1))
    return pytest.mark.skipif(
        not BLOCKS_MEET or threads < 2 * blocks > 4,
        reason=f"needs a JAX whose interpreter knows barriers between blocks, and NPROC={2 * blocks}, got {threads}",
    )


@pytest.mark.parametrize(
    ("units", "configuration", "rows"),
    [
        pytest.param(5, "rnn", 16, marks=pytest.mark.slow),  # one block
        pytest.param(70, "rnn", 16, marks=[pytest.mark.slow, needs(2)]),
        pytest.param(64, "everything", 16, marks=[pytest.mark.slow, needs(4)]),
        pytest.param(64, "cifg expected", 16, marks=[pytest.mark.slow, needs(4)]),
        pytest.param(5, "rnn", 32, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_grid(units, configuration, rows, monkeypatch):
    """Two sets of blocks, or of one block, the second not full; their wait apart, all is what a GPU would be given."""
    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: None)
    monkeypatch.setattr(mosaic_gpu_grid, "rows_that_fit", lambda *sizes: rows)
    rng = np.random.default_rng(0)
    steps, batch = 3, rows + 1
    options = {"mask": rng.random((steps, batch)) < 0.7, "resets": rng.random((steps, batch)) < 0.3}
    run, arguments = everything(network(3, units, **CONFIGURATIONS[configuration]), (steps, batch), **options)
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)
    if RACES:
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        assert not interpret_pallas_call.get_races().races_found


@pytest.mark.slow
@needs(8)
@pytest.mark.parametrize(("depth", "slots"), [(64, 1), (64, 2), (128, 1)])
def test_pieces_of_what_a_grid_has_sent(depth, slots, monkeypatch):
    """128 units, fetched in two pieces into one place or two, or all at once."""

    def product(parts, pieces, units, rows):
        assert units == 128
        return mosaic_gpu_scan.Product(1, units // depth, 64, depth, pieces * rows, slots)

    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: None)
    monkeypatch.setattr(mosaic_gpu_grid, "product", product)
    run, arguments = everything(network(3, 100), (2, 3))
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)


@pytest.mark.parametrize(
    ("rows", "slots"), [pytest.param(*both, marks=pytest.mark.slow) for both in ((16, 1), (16, 4), (32, 4), (16, 3))]
)
def test_rows_of_a_cluster_and_places_for_what_is_sent(rows, slots, monkeypatch):
    """33 rows in clusters of 16 or 32, some of them with a reset on their very first step, and the last; what is sent
    backward, four pieces, all at once or one after the other.
    """
    monkeypatch.setattr(mosaic_gpu_cluster, "rows_that_fit", lambda *sizes: rows)
    monkeypatch.setattr(
        mosaic_gpu_cluster, "footprint", lambda *form: mosaic_gpu_cluster.SHARED_MEMORY + (form[-1] > slots)
    )
    resets = np.zeros((2, 33), bool)
    resets[0, ::2] = resets[-1, ::3] = True
    run, arguments = everything(network(3, 2), (2, 33), resets=resets)
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)


def test_vmap_equals_the_batch():
    lstm = network(3, 5)
    case = cases.make("one layer", "everything")
    _, (params, xs, state) = everything(lstm, (7, 4))

    def one(x, state, length, mask, resets):
        return lstm(params, x, state, lengths=length, mask=mask, resets=resets)

    options = [case.options[name] for name in ("lengths", "mask", "resets")]
    with mosaic_tpu_scan.making_for(INTERPRETED):
        mapped = jax.jit(jax.vmap(one, (1, 1, 0, 1, 1), out_axes=1))(xs, state, *options)
        assert_within(mapped, jax.jit(one)(xs, state, *options), ONE_ROUNDING)


def test_no_rows_and_one_unit():
    lstm = network(3, 1)
    _, (params, xs, state) = everything(lstm, (2, 1))
    mask = np.array([[True], [False]])
    with mosaic_tpu_scan.making_for(INTERPRETED):
        empty = jax.jit(lstm)(params, xs[:, :0], jax.tree.map(lambda a: a[:, :0], state))
        assert [a.shape for a in jax.tree.leaves(empty)] == [(2, 0, 1), (1, 0, 1), (1, 0, 1)]
        actual = jax.jit(lstm)(params, xs, state, mask=mask)
    with mosaic_tpu_scan.making_for(mosaic_tpu_scan.INTERPRET):
        assert_within(actual, jax.jit(lstm)(params, xs, state, mask=mask), ONE_ROUNDING)


def minimal(z, c):
    """A cell of one's own: two gates, one of them piecewise linear."""
    f = jnp.clip(0.25 * z[0] + 0.5, 0, 1)
    c = jnp.where(f > 0.5, f * c + (1 - f) * jax.nn.relu(z[1]), jnp.exp(-(c**2)) * z[1])
    return c, jnp.tanh(c) - 0.1


@pytest.mark.slow
def test_a_cell_of_ones_own():
    run, arguments = everything(network(3, 5, cell=Cell(minimal, num_gates=2)), (4, 3))
    for actual, wanted in zip(*on_a_gpu_and_on_a_tpu(run, arguments)):
        assert_within(actual, wanted, ONE_ROUNDING)


def test_numbers_moved_about_stand_for_tiles():
    def function(a, b):
        moved = jnp.concatenate([a[::-1], jnp.pad(b, ((1, 2), (0, 1)), constant_values=3.0)[:, 1:]])
        moved = jnp.stack([moved.T, 2 * jax.lax.pad(moved.T, np.float32(0), [(-1, 1, 0), (2, -2, 0)])])
        one, two = jnp.split(moved, [2], axis=-1)
        return jnp.squeeze(one[:1, 0] * two[0, 0, 1], 0), jax.jit(jnp.tanh)(two), a > b

    shapes = [jax.ShapeDtypeStruct((2, 1), jnp.float32)] * 2
    program = jax.make_jaxpr(function)(*shapes)
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 2, 1, 3, 4)).astype(np.float32)
    results = jaxpr_tiling.carry_out(program, (3, 4), [list(jnp.asarray(a).reshape(-1, 3, 4)) for a in numbers])
    for at in np.ndindex(3, 4):
        for result, wanted in zip(results, function(*numbers[..., *at])):
            np.testing.assert_allclose(np.reshape([a[at] for a in result], wanted.shape), wanted, rtol=1e-6)


SIZES = [(1024, 16, 64), (1024, 16, 256), (1024, 16, 384), (1000, 700, 370)]
OVER_A_GRID = [(1024, 16, 768), (1000, 60, 1000), (1024, 16, 1600)]
FAST_SIZES = [SIZES[-1], OVER_A_GRID[0]]  # one for a cluster, one for a grid
OPTIONS = [
    ({}, False),
    ({**CONFIGURATIONS["everything"], "bidirectional": True}, True),
    ({"cell": "cifg", "remat": 300}, True),
    ({"cell": "rnn", "activation": "relu"}, False),
]


@pytest.mark.parametrize(
    ("options", "marked", "sizes"),
    [
        pytest.param(
            options,
            marked,
            sizes,
            marks=[] if n == 0 and sizes in FAST_SIZES else [pytest.mark.slow],
            id=f"{n}-{sizes}",
        )
        for n, (options, marked) in enumerate(OPTIONS)
        for sizes in SIZES + OVER_A_GRID
    ],
)
def test_it_is_lowered_for_cuda(options, marked, sizes):
    """One kernel forward; forward and backward for a gradient; two forward for a tangent. Into shared memory they fit:
    lowering checks it.
    """
    steps, batch, units = sizes
    lstm = network(5, units, **options)
    shapes: list[Any] = [
        jax.eval_shape(lstm.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((steps, batch, 5), jnp.float32),
    ]
    if marked:
        shapes += [jax.ShapeDtypeStruct((steps, batch), jnp.bool_)] * 2
    key: dict[str, Any] = {"key": jax.random.key(0)} if "zoneout_h" in options else {}

    def loss(params, xs, mask=None, resets=None):
        result = lstm(params, xs, mask=mask, resets=resets, **key)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves(result))

    def slope(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    kernels = [lowered(f, *shapes).count("@mosaic_gpu") for f in (loss, jax.grad(loss, (0, 1)), slope)]
    directions = lstm.num_directions * (1 if "remat" not in options else 2)  # and one for the steps that are left over
    assert kernels[0] == directions
    assert kernels[1] == directions * (3 if "remat" in options else 2)  # computed again in a chunk
    assert kernels[2] == directions * 2


@pytest.mark.slow
def test_over_devices_it_is_lowered_within_shard_map():
    lstm = network(3, 5)

    def loss(params, xs):
        return lax.psum((lstm(params, xs)[0].astype(jnp.float32) ** 2).sum(), "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec(None, "data"))
    total = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    shapes = (jax.eval_shape(lstm.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 6, 3), jnp.float32))
    assert lowered(jax.grad(total), *shapes).count("@mosaic_gpu") == 2


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 }
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")) or shutil.which("ptxas") is None,
    reason="needs the compiler that comes with jax[cuda] and ptxas; a GPU it does not need",
)
@pytest.mark.parametrize(
    ("options", "marked", "units"),
    [(OPTIONS[0][0], False, 384), (*OPTIONS[1], 384), ({}, False, 5), ({}, False, 768), (*OPTIONS[1], 768)],
)
def test_it_is_compiled_for_an_h100(options, marked, units):
    device = SingleDeviceSharding(get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0])
    lstm = network(5, units, **options)

    def there(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)

    shapes = [
        jax.tree.map(there, jax.eval_shape(lstm.init, jax.random.key(0))),
        there(jax.ShapeDtypeStruct((64, 16, 5), jnp.float32)),
        *[there(jax.ShapeDtypeStruct((64, 16), jnp.bool_))] * (2 * marked),
    ]

    def loss(params, xs, mask=None, resets=None):
        return (lstm(params, xs, mask=mask, resets=resets)[0].astype(jnp.float32) ** 2).sum()

    def slope(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    compiler_options: Any = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}  # of the other products
    for function in (loss, jax.grad(loss), slope):
        with mosaic_tpu_scan.making_for(HOPPER):
            program = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in str(program.compile(compiler_options).as_text())


def traced(lstm):
    """Shapes of what it returns, which are to be had without a computation."""
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.eval_shape(lstm, params, jax.ShapeDtypeStruct((4, 2, 3), "float32"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": jnp.float32}, r"takes dtype=bfloat16 .* got products in float32 and sums in float32; .* TF32"),
        ({"dtype": jnp.float16}, "got products in float16"),
        ({"param_dtype": jnp.float64}, "got products in bfloat16 and sums in float64"),
        ({"layer_norm": True}, "does not take layer normalisation on a Hopper GPU"),
        ({"proj_size": 2}, "does not take a projection on a Hopper GPU"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(options, said):
    with mosaic_tpu_scan.making_for(HOPPER), pytest.raises(ValueError, match=f"implementation='pallas' .*{said}"):
        traced(network(3, 5, **options))


def test_a_cluster_comes_before_the_grid(monkeypatch):
    def told(*sizes):
        raise ValueError("to the grid")

    monkeypatch.setattr(mosaic_gpu_grid, "rows_that_fit", told)
    with mosaic_tpu_scan.making_for(HOPPER):
        for cell, largest in (("lstm", 384), ("cifg", 512), ("rnn", 512)):
            traced(network(3, largest, cell=cell))
            with pytest.raises(ValueError, match="to the grid"):
                traced(network(3, largest + 1, cell=cell))


@pytest.mark.parametrize(("cell", "mine", "largest"), [("lstm", 16, 1600), ("cifg", 16, 1600), ("rnn", 64, 1728)])
def test_weights_that_do_not_fit_are_refused_with_the_size_that_does(cell, mine, largest):
    count = (largest + 64) // mine
    said = (
        f"{largest + 1} units are {count} blocks of {mine}, each with {(largest + 64) // 8} KiB of weights in 227 KiB, "
        f".* 132 blocks run at once; hidden_size fits up to {largest}"
    )
    with mosaic_tpu_scan.making_for(HOPPER):
        traced(network(3, largest, cell=cell))
        with pytest.raises(ValueError, match=said):
            traced(network(3, largest + 1, cell=cell))


def test_blocks_that_would_not_run_at_once_are_refused_with_the_batch_that_does():
    sizes = (4, 768)  # 48 blocks for every 16 or 32 rows
    with mosaic_tpu_scan.making_for(HOPPER):
        assert [mosaic_gpu_grid.rows_that_fit(*sizes, batch) for batch in (0, 16, 32, 33, 64)] == [16, 16, 16, 32, 32]
        with pytest.raises(
            ValueError, match=r"48 blocks .* batch of 65, and 132 .*, and a batch with 768 units up to 64"
        ):
            mosaic_gpu_grid.rows_that_fit(*sizes, 65)
    with (
        mosaic_tpu_scan.making_for(mosaic_tpu_scan.Hopper(processors=47)),
        pytest.raises(ValueError, match=r"47 .* fits up to 704$"),
    ):
        mosaic_gpu_grid.rows_that_fit(*sizes, 16)


def test_many_gates_are_refused_with_none_that_fits():
    with mosaic_tpu_scan.making_for(HOPPER):
        assert mosaic_gpu_grid.rows_that_fit(8, 512, 16) == 16
        with pytest.raises(ValueError, match=r"hidden_size fits up to 0$"):
            mosaic_gpu_grid.rows_that_fit(9, 512, 16)


def test_another_gpu_is_refused(monkeypatch):
    class Gpu:
        device_kind = "NVIDIA A100"
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    with (
        mosaic_tpu_scan.making_for(None),
        pytest.raises(ValueError, match=r"9.x; got a NVIDIA A100 of compute capability 8.0"),
    ):
        traced(network(3, 5))
    monkeypatch.setattr(Gpu, "compute_capability", "9.0")
    with mosaic_tpu_scan.making_for(None):
        traced(network(3, 5))


def test_gates_that_are_not_elementwise_are_refused():
    def over_gates(z, c):
        return c, jnp.cumsum(z, axis=0)[0] + c

    def over_units(z, c):
        return c + jnp.arange(5, dtype=z.dtype)[None], z[0]

    with mosaic_tpu_scan.making_for(HOPPER):
        with pytest.raises(ValueError, match="are elementwise, got the operation 'cumsum'"):
            traced(network(3, 5, cell=Cell(over_gates, num_gates=2)))
        with pytest.raises(ValueError, match="are elementwise: for one unit of one sequence"):
            traced(network(3, 5, cell=Cell(over_units, num_gates=1)))


def test_more_rows_only_where_clusters_would_have_to_wait():
    assert mosaic_gpu_cluster.rows_that_fit(4, 256, 33 * 16) == 16  # 33 clusters of 4 blocks are all that run at once
    assert mosaic_gpu_cluster.rows_that_fit(4, 256, 33 * 16 + 1) == 32
    assert mosaic_gpu_cluster.rows_that_fit(4, 384, 10_000) == 16  # more does not fit
