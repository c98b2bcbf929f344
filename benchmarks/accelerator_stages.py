"""One stage of `accelerator.py`: python accelerator_stages.py STAGE [NAME] --work DIR --limit SECONDS [--dry] RESULTS

Every stage replaces its results file after each number that it measures, so that a killed stage leaves the others.
"""

import argparse
import faulthandler
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import accelerator_parity
import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_machine
from peers import (
    BUILDERS,
    FLAX,
    JAXLSTM,
    JAXLSTM_BF16,
    JAXLSTM_REMAT,
    JAXLSTM_SCAN,
    TORCH,
    TORCH_BF16,
    Benchmark,
    Builder,
    Shape,
    build_jaxlstm,
    jax_benchmark,
)
from timing import time_interleaved

import jaxlstm
from jaxlstm.atomic_write import atomic_write
from jaxlstm.checksum import read_checked_json
from jaxlstm.errors import first_line

TIMING_SHAPES = (
    Shape(1024, 16, 768, 768),
    Shape(512, 64, 512, 512),
    Shape(128, 32, 128, 256),
    Shape(1024, 16, 64, 256),
    Shape(256, 256, 256, 1024),
)
DRY_TIMING_SHAPES = (Shape(5, 2, 3, 8),)
ROUNDS, SLOW_ROUNDS = 11, 3
SLOW = 0.5  # seconds of a call from which on SLOW_ROUNDS are enough
BF16 = {"dtype": jnp.bfloat16}


def jaxlstm_builder(**options: Any) -> Builder:
    """Returns the builder of a benchmark of `jaxlstm.LSTM`."""
    return partial(jax_benchmark, partial(build_jaxlstm, **options))


# Timed together, and safe: an error in a kernel of ours would make the device unusable for the rest of the process.
SAFE: dict[str, Builder] = {
    name: BUILDERS[name] for name in (JAXLSTM_BF16, JAXLSTM, TORCH_BF16, TORCH, JAXLSTM_SCAN, *FLAX)
} | {"jaxlstm scan bf16": jaxlstm_builder(implementation="scan", **BF16)}
DRY_SAFE = {name: SAFE[name] for name in (JAXLSTM_BF16, TORCH, *list(FLAX)[-1:])}
# Timed one after the other, each beside the control. Of the remaining backends "tensor_parallel" is "scan" on one
# device, and "associative" refuses LSTMs.
EXPERIMENTAL: dict[str, Builder] = {
    "jaxlstm cudnn": jaxlstm_builder(implementation="cudnn"),
    "jaxlstm pallas bf16": jaxlstm_builder(implementation="pallas", **BF16),
    "jaxlstm newton": jaxlstm_builder(implementation="newton"),
}
CONTROL = JAXLSTM_BF16


@dataclass
class Results:
    """The results of a stage, and the file that has them.

    Args:
      path: the file.
      work: folder that all stages of a run share.
      limit: seconds after which the stage is killed.
      dry: whether sizes are tiny.
    """

    path: Path
    work: Path
    limit: float
    dry: bool
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, *keys: str, **values: Any) -> None:
        """Adds values under nested keys, and replaces the file."""
        entry = self.values
        for key in keys:
            entry = entry.setdefault(key, {})
        entry.update(values)
        with atomic_write(self.path) as file:
            file.write(json.dumps(self.values).encode())

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the timings."""
        return DRY_TIMING_SHAPES if self.dry else TIMING_SHAPES


# Device and parity


def run_device(results: Results) -> None:
    """Records device, versions and that a product gives the right number."""
    results.add(**describe_machine(), devices=[str(device) for device in jax.devices()])
    product = float((jnp.ones((256, 256)) @ jnp.ones((256, 256)))[0, 0])
    if product != 256.0:
        raise ValueError(f"a product of ones is {product}, expected 256")
    results.add(memory=jax.devices()[0].memory_stats())


def run_reference(results: Results) -> None:
    """Computes the reference results of the parity stages."""
    for name in accelerator_parity.write_references(results.work, dry=results.dry):
        results.add("written", **{name: True})


def run_parity(results: Results, implementation: str) -> None:
    """Compares one backend with the reference.

    Raises:
      ValueError: if a case is wrong or fails; all are recorded first.
    """
    bad = []
    checks = accelerator_parity.check_backend(implementation, results.work, dry=results.dry)
    for name, precision, verdict in checks:
        results.add("cases", name, **{precision: verdict})
        if verdict["verdict"] in ("wrong", "failed"):
            bad.append(f"{name} in {precision} is {verdict['verdict']}")
    if bad:
        raise ValueError("; ".join(bad))


# Times


def check(benchmark: Benchmark) -> float:
    """Compiles and checks a benchmark, and returns the seconds of one training step after that."""
    benchmark.check()
    start = time.perf_counter()
    benchmark.train()
    return time.perf_counter() - start


def record_times(results: Results, benchmarks: Sequence[Benchmark], rounds: int, *keys: str) -> None:
    """Times benchmarks in interleaved rounds, forward and training."""
    for kind in ("infer", "train"):
        times = time_interleaved({b.name: getattr(b, kind) for b in benchmarks}, 1 if results.dry else rounds)
        for name, each in times.items():
            results.add(*keys, name, **{kind: each})


def build(results: Results, builders: Mapping[str, Builder], shape: Shape, *keys: str) -> dict[Benchmark, float]:
    """Builds, compiles and checks benchmarks in parallel; records why others are missing.

    Returns:
      the benchmarks, with the seconds of a training step.
    """

    def build_and_check(name: str) -> tuple[Benchmark, float]:
        benchmark = builders[name](name, shape)
        return benchmark, check(benchmark)

    built: dict[Benchmark, float] = {}
    with ThreadPoolExecutor(4) as pool:
        futures = {name: pool.submit(build_and_check, name) for name in builders}
        for name, future in futures.items():
            try:
                benchmark, seconds = future.result()
            except ImportError as error:
                results.add(*keys, name, missing=f"not installed: {first_line(error)}")
            except Exception as error:  # of another library, a compiler or the device
                results.add(*keys, name, missing=f"{type(error).__name__}: {first_line(error)}")
            else:
                built[benchmark] = seconds
    return built


def run_timing(results: Results, shape_text: str) -> None:
    """Times every backend and the peers at one shape."""
    shape = Shape.parse(shape_text)
    safe = build(results, DRY_SAFE if results.dry else SAFE, shape, "benchmarks")
    rounds = SLOW_ROUNDS if max(safe.values(), default=0.0) > SLOW else ROUNDS
    record_times(results, list(safe), rounds, "benchmarks")
    control = next((b for b in safe if b.name == CONTROL), None)
    experimental = {"jaxlstm cudnn": EXPERIMENTAL["jaxlstm cudnn"]} if results.dry else EXPERIMENTAL
    for name, builder in experimental.items():
        for benchmark, seconds in build(results, {name: builder}, shape, "benchmarks").items():
            record_times(results, [benchmark], SLOW_ROUNDS if seconds > SLOW else ROUNDS, "benchmarks")
    if control is not None:  # again, at the end: how far the times of this process drift
        record_times(results, [control], rounds, "control at the end")


def run_variants(results: Results, builders: Mapping[str, Builder], shapes: Sequence[Shape]) -> None:
    """Times variants of one benchmark at some shapes."""
    for shape in shapes:
        record_times(results, list(build(results, builders, shape, str(shape))), ROUNDS, str(shape))


def run_unroll(results: Results) -> None:
    """Times `fused` with 1, 4 and 16 steps per iteration."""
    steps = (1, 2) if results.dry else (1, 4, 16)
    builders = {f"unroll={n}": jaxlstm_builder(implementation="fused", unroll=n, **BF16) for n in steps}
    run_variants(results, builders, few_shapes(results))


def run_command_buffer(results: Results) -> None:
    """Times `fused` under the XLA flag of the stage, which records loops as CUDA graphs; compare with unroll=1."""
    builders = {"unroll=1": jaxlstm_builder(implementation="fused", **BF16)}
    run_variants(results, builders, few_shapes(results))


def few_shapes(results: Results) -> tuple[Shape, ...]:
    """Returns the shapes for variants of a benchmark: large and small weights, over many steps."""
    return results.shapes if results.dry else (TIMING_SHAPES[0], TIMING_SHAPES[3])


def run_vmap(results: Results) -> None:
    """Times the call for one sequence under `jax.vmap` beside the batched call."""
    builders = {
        name: jaxlstm_builder(implementation="fused", vmap=vmap, **BF16)
        for name, vmap in (("batched", False), ("vmap", True))
    }
    run_variants(results, builders, results.shapes if results.dry else TIMING_SHAPES[1:3])


def run_memory(results: Results) -> None:
    """Records the temporary memory of compiled training steps, in bytes."""
    shape = results.shapes[0]
    results.add(shape=str(shape), bytes_of_outputs=4 * shape.num_steps * shape.batch_size * shape.hidden_size)
    for name in (JAXLSTM,) if results.dry else (JAXLSTM, JAXLSTM_BF16, JAXLSTM_REMAT, JAXLSTM_SCAN, *FLAX):
        try:
            lower = BUILDERS[name](name, shape).lower
            assert lower is not None
            results.add("temporary", **{name: lower().compile().memory_analysis().temp_size_in_bytes})
        except ImportError as error:
            results.add("missing", **{name: first_line(error)})


# Choice of a backend, and training


def run_autotune(results: Results) -> None:
    """Records the table of `jaxlstm.autotune` in bfloat16."""
    shape = results.shapes[0]
    lstm = jaxlstm.LSTM(shape.input_size, shape.hidden_size, dtype=jnp.bfloat16)
    seconds = 1.0 if results.dry else 0.6 * results.limit  # the rest is for the start and the last candidate
    tuning = jaxlstm.autotune(lstm, (*shape[:2], shape.input_size), seconds=seconds)
    path = results.work / "tuning.json"
    tuning.save(path)
    content = read_checked_json(path)
    results.add(shape=str(shape), chosen=tuning.table[0].candidate, table=content["table"], printed=str(tuning))


def run_train(results: Results) -> None:
    """Trains the character model of `train.py` on the embedded text with the backend that autotune picks.

    Model, windows, step and optimizer are the same as in `train.py`, which itself needs tyro, rich and orbax.
    """
    if importlib.util.find_spec("optax") is None:
        results.add(skipped="optax is not installed")
        return
    from jaxlstm.training.data.text import CharVocabulary, embedded_text, split, training_windows
    from jaxlstm.training.models.language_model import LanguageModel, evaluate, training_loss
    from jaxlstm.training.optimizer import DEFAULT_PEAK, learning_rate_schedule, make_optimizer
    from jaxlstm.training.train_step import init_train_state, make_step, prefetch

    start = time.perf_counter()
    budget = 1.0 if results.dry else results.limit - 25.0  # seconds for tuning and training
    batch_size, window, hidden_size = (4, 8, 16) if results.dry else (32, 128, 512)
    text = embedded_text()[: 4000 if results.dry else None]
    vocabulary = CharVocabulary.from_text(text)
    train_ids, valid_ids = split(vocabulary.encode(text))
    lstm = jaxlstm.LSTM(8 if results.dry else 64, hidden_size, dtype=jnp.bfloat16)
    tuning = jaxlstm.autotune(lstm, (window, batch_size, lstm.input_size), seconds=budget / 6)
    results.add(chosen=tuning.table[0].candidate, characters=len(text), vocabulary=len(vocabulary))
    model = LanguageModel(len(vocabulary), tuning.lstm, dropout=0.4)
    optimizer = make_optimizer(learning_rate_schedule("adamw", DEFAULT_PEAK["adamw"], 0.1), weight_decay=0.01, clip=1.0)
    step = make_step(training_loss(model), optimizer)
    params = model.init(jax.random.key(0))
    state = init_train_state(params, optimizer, lstm.initial_state((batch_size,)), jax.random.key(1))
    batches = prefetch(training_windows(train_ids, batch_size, window, seed=0))
    state, _ = step(state, next(batches), 0.0)
    jax.block_until_ready(state.params)
    trained_from = time.perf_counter()
    num_steps, losses, block = 0, [], 2 if results.dry else 50
    while (elapsed := time.perf_counter() - start) < budget or not losses:
        nats = []
        for _ in range(block):
            state, metrics = step(state, next(batches), min(elapsed / budget, 1.0))
            nats.append(metrics.loss)
        num_steps += block
        losses.append([num_steps, float(np.mean(jax.device_get(nats)) / np.log(2))])
        rate = num_steps * batch_size * window / (time.perf_counter() - trained_from)
        results.add(steps=num_steps, characters_per_second=round(rate), bits_per_character=losses)
    if not np.isfinite(losses[-1][1]):
        raise ValueError(f"the loss is {losses[-1][1]}")
    validation = evaluate(model, state.params, valid_ids, batch_size=batch_size, window=window) / np.log(2)
    results.add(validation_bits_per_character=float(validation))


STAGES: dict[str, Callable[..., None]] = {
    "device": run_device,
    "reference": run_reference,
    "parity": run_parity,
    "timing": run_timing,
    "unroll": run_unroll,
    "command_buffer": run_command_buffer,
    "vmap": run_vmap,
    "memory": run_memory,
    "autotune": run_autotune,
    "train": run_train,
}


def main() -> None:
    """Runs the stage that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("names", nargs="*", help="the backend or the shape, then the file of the results")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_intermixed_args()
    *names, path = args.names
    if args.limit > 5:
        faulthandler.dump_traceback_later(args.limit - 2, exit=False)  # the stacks of a stage that hangs
    STAGES[args.stage](Results(Path(path), args.work, args.limit, args.dry), *names)


if __name__ == "__main__":
    main()
