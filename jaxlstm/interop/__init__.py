"""Weights come and go: one pair of functions for each format."""

from jaxlstm.interop.onnx import from_onnx as from_onnx
from jaxlstm.interop.onnx import to_onnx as to_onnx
