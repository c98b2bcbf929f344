"""`benchmarks/optimized_program.py`: kernels, products and bytes of a program that was written by hand."""

import importlib
from pathlib import Path

import pytest

PROGRAM = """
%fused_slice (p0: f32[6,8], p1: s32[]) -> f32[8] {
  %p0 = f32[6,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%slice)
}

%fused_write (p0.1: f32[6,8], p1.1: f32[8], p2.1: s32[]) -> f32[6,8] {
  %p0.1 = f32[6,8]{1,0} parameter(0)
  %p1.1 = f32[8]{0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p1.1)
  ROOT %write = f32[6,8]{1,0} dynamic-update-slice(%p0.1, %row, %p2.1)
}

%body (arg: (s32[], f32[6,8], f32[6,8], f32[8,8])) -> (s32[], f32[6,8], f32[6,8], f32[8,8]) {
  %arg = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %xs = f32[6,8]{1,0} get-tuple-element(%arg), index=1
  %ys = f32[6,8]{1,0} get-tuple-element(%arg), index=2
  %w = f32[8,8]{1,0} get-tuple-element(%arg), index=3
  %x = f32[8]{0} fusion(%xs, %n), kind=kLoop, calls=%fused_slice, control-predecessors={%cublas-1}
  %cublas-1 = (f32[8]{0}, s8[99]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %y = f32[8]{0} get-tuple-element(%cublas-1), index=0
  %new = f32[6,8]{1,0} fusion(%ys, %y, %n), kind=kLoop, calls=%fused_write
  ROOT %out = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}, f32[8,8]{1,0}) tuple(%n, %xs, %new, %w)
}

%condition (arg.1: (s32[], f32[6,8], f32[6,8], f32[8,8])) -> pred[] {
  %arg.1 = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%m, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[6,8], f32[6,8], f32[8,8])) -> (s32[], f32[6,8], f32[6,8], f32[8,8]) {
  %a = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %outside = f32[6,8]{1,0} get-tuple-element(%a), index=1
  %copy = f32[6,8]{1,0} copy(%outside)
  ROOT %loop = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}, f32[8,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.fixture
def optimized_program(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    return importlib.import_module("optimized_program")


@pytest.mark.parametrize("num_steps", [6, 3])
def test_work_of_a_loop_per_step(optimized_program, num_steps):
    """A slice of 32 bytes, a product with a matrix of 256 bytes, and a slice that is written; two read the index."""
    work = optimized_program.per_step(PROGRAM, num_steps)
    repeats = 6 / num_steps
    assert (work.kernels, work.products, work.copies) == (3 * repeats, repeats, 0)
    assert work.bytes == repeats * ((32 + 32 + 4) + (32 + 256 + 32) + (32 + 32 + 4))
    assert work.names == {"x": repeats, "cublas-": repeats, "new": repeats}


def test_known_trip_count_comes_first(optimized_program):
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert optimized_program.per_step(known, 5).kernels == 3
    with pytest.raises(ValueError, match="iterations of loop is not known"):
        optimized_program.per_step(PROGRAM.replace("constant(6)", "constant(x)"), 6)
