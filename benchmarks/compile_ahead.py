"""Compiles LSTM programs for an H100 or a TPU v5e without the device, and counts the work of a time step.

python benchmarks/compile_ahead.py h100 --out benchmarks/results     needs jax[cuda13] and ptxas on PATH, no GPU
python benchmarks/compile_ahead.py v5e --out benchmarks/results      needs libtpu, no TPU

Nothing runs. Without a GPU, XLA tunes no kernels: products are calls of cuBLAS.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding
from optimized_program import per_step
from peers import ForwardPass, Shape, build_flax_linen, build_flax_nnx, build_haiku, build_jaxlstm

from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import first_line

H100 = Path(__file__).with_name("h100.textproto").read_text(encoding="utf-8")
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}  # both need a GPU
TARGETS: dict[str, tuple[str, str, Any, Callable[[], Any]]] = {  # jax.default_backend, platform, options, topology
    "h100": ("gpu", "cuda", GPU_OPTIONS, lambda: get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")),
    "v5e": ("tpu", "tpu", {}, lambda: get_topology_desc("v5e:2x2", "tpu")),
}
SHAPES = (Shape(256, 16, 768, 768),)
BF16 = {"dtype": jnp.bfloat16}
BUILDERS: dict[str, Callable[[Shape], ForwardPass]] = {
    "jaxlstm fused bf16": partial(build_jaxlstm, implementation="fused", **BF16),
    "jaxlstm fused bf16, unroll=4": partial(build_jaxlstm, implementation="fused", unroll=4, **BF16),
    "jaxlstm fused bf16, both directions": partial(build_jaxlstm, implementation="fused", bidirectional=True, **BF16),
    "jaxlstm fused": partial(build_jaxlstm, implementation="fused"),
    "jaxlstm scan": partial(build_jaxlstm, implementation="scan"),
    "linen OptimizedLSTMCell": partial(build_flax_linen, cell="OptimizedLSTMCell"),
    "nnx OptimizedLSTMCell": partial(build_flax_nnx, cell="OptimizedLSTMCell"),
    "haiku": partial(build_haiku, cell="LSTM"),
}


def compile_for(target: str, function: Callable[..., Any], args: Any) -> Any:
    """Compiles a function of arrays for a device that is not there."""
    backend, platform, options, topology = TARGETS[target]
    device = SingleDeviceSharding(topology().devices[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), args)
    with mock.patch("jax.default_backend", return_value=backend):  # layouts are chosen by it
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
    return lowered.compile(options)


def programs(build: Callable[[Shape], ForwardPass], shape: Shape) -> Mapping[str, tuple[Callable[..., Any], Any]]:
    """Returns forward pass and training step, as `peers.jax_benchmark` defines them, with their arguments."""
    apply, params, xs, _ = build(shape)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(apply(params, xs).astype(jnp.float32)))

    args = (params, xs)
    return {"infer": (apply, args), "train": (jax.value_and_grad(loss, argnums=(0, 1)), args)}


def count(target: str, shape: Shape, names: list[str], dump: Path | None) -> dict[str, Any]:
    """Returns the work per time step of each benchmark, forward and in training."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            for kind, (function, args) in programs(BUILDERS[name], shape).items():
                compiled = compile_for(target, function, args)
                text = compiled.as_text()
                work = per_step(text, shape.num_steps)
                entry = {key: round(getattr(work, key), 2) for key in ("kernels", "products", "copies")}
                entry |= {"bytes": round(work.bytes), "names": {n: round(c, 2) for n, c in sorted(work.names.items())}}
                if target == "v5e":
                    entry["cycles"] = round(work.cycles)
                entry["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
                results.setdefault(name, {})[kind] = entry
                print(f"{shape} {name}, {kind}: { {k: v for k, v in entry.items() if k != 'names'} }", flush=True)
                if dump is not None:
                    dump.mkdir(parents=True, exist_ok=True)
                    (dump / f"{target}-{shape}-{name}-{kind}.txt".replace(" ", "-")).write_text(text)
        except ImportError as error:
            results[name] = {"missing": first_line(error)}
    return results


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--out", type=Path, help="folder for compiled/programs-TARGET.json")
    parser.add_argument("--only", nargs="*", default=list(BUILDERS), choices=BUILDERS, help="benchmarks")
    parser.add_argument("--dump", type=Path, help="folder for the texts of the programs")
    args = parser.parse_args()
    counts = {str(shape): count(args.target, shape, args.only, args.dump) for shape in SHAPES}
    if args.out is not None:
        names = ("jax", "jaxlib", "flax", "dm-haiku", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
        installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
        versions = {name: installed[name] for name in names if name in installed}
        path = args.out / "compiled" / f"programs-{args.target}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            content = {"target": args.target, "python": sys.version.split()[0], "versions": versions, "shapes": counts}
            file.write((json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
