"""The formulas of docs/scaling.md against the collectives of optimized programs on eight simulated devices."""

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests" / "scaling_program.py"
SIZES = (7, 16, 24, 32)  # T, B, I, H of the program


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


def start(*arguments):
    return subprocess.Popen([sys.executable, str(PROGRAM), *arguments], stdout=subprocess.PIPE, text=True)


def found_by(*processes):
    """Returns the collectives that the first of several processes prints."""
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return {name: [tuple(each) for each in found] for name, found in json.loads(printed[0]).items()}


def test_table_is_in_the_page(scaling):
    assert scaling.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_received_bytes_of_two_devices(scaling):
    """Two devices sum 8 bytes: each sends one half and receives the other, sums it, and sends and receives the sums."""
    assert scaling.received_by_all_reduce(8, 2) == 8
    assert scaling.received_by_all_gather(8, 2) == 4


def test_step_is_bound_by_weights_or_by_products(scaling):
    machine = scaling.Machine("", 8, flops=1e12, memory=1e12, link=1e12, latency=0.0, overhead=0.5)
    few, many = scaling.Layer(1, 1, 8, 1000), scaling.Layer(1, 1000, 8, 1000)
    assert scaling.step_seconds(machine, few) == pytest.approx(0.5 + (8 * 1000**2 + 28 * 1000) / 1e12)
    assert scaling.step_seconds(machine, many) == pytest.approx(0.5 + 8 * 1000 * 1000**2 / 1e12)
    assert scaling.first(lambda n: n * n > 50) == 8
    assert scaling.first(lambda n: False) is None


@pytest.mark.slow
def test_formulas_equal_the_programs_of_one_and_two_processes(scaling):
    steps, batch_size, inputs, units = SIZES
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    one = found_by(start())
    assert found_by(*(start(address, str(number)) for number in range(2))) == one
    for name, data, model in (("data=8", 8, 1), ("model=8", 1, 8), ("data=4,model=2", 4, 2)):
        layer = scaling.Layer(steps, batch_size // data, inputs, units)
        expected = scaling.expected_collectives(layer, data, model)
        in_loops = [each for each in one[name] if each[2] > 1]
        assert in_loops == sorted(each for each in expected if each[2] > 1), name
        sums = [each for each in one[name] if each[0] == "all-reduce"]
        # With one device along "data" the sum is over one device, and nothing is exchanged.
        assert sums == [("all-reduce", scaling.gradient_bytes(layer, model), 1)], name
        if model == 1:
            assert one[name] == expected
            continue
        # Once per training step the weights are gathered, and the shares of their gradients are exchanged.
        gathered = sum(size for kind, size, _ in one[name] if kind == "all-gather") - expected[-2][1]
        assert gathered == scaling.gradient_bytes(layer)
        exchanged = sum(size for kind, size, _ in one[name] if kind == "all-to-all")
        assert exchanged == scaling.gradient_bytes(layer, model)
    *convergence, gradients = one["newton, data=8"]
    assert [gradients] == one["data=8"]
    assert {kind for kind, *_ in convergence} == {"all-reduce"}
    assert max(size for _, size, _ in convergence) <= 8 * steps
