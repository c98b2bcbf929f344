"""Reads the named values of a cell by evaluating the jaxpr of its unchanged equations."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxlstm.cells import Gates

CALL_PRIMITIVES = ("jit", "pjit")  # a call of a jitted function, by its current and its former name


def probe_gates(
    gates: Gates, z: Array, c: Array | None, options: Mapping[str, Any], c_perturbation: Array | None = None
) -> tuple[tuple[Array | None, Array], dict[str, Array]]:
    """Evaluates ``gates(z, c, **options)`` and collects the values named by `jax.ad_checkpoint.checkpoint_name`.

    Args:
      gates: equations of a `jaxlstm.Cell`.
      z: pre-activations ``(G, *units)``.
      c: cell state ``(*units)``; None for a cell without one.
      options: further arguments of ``gates``.
      c_perturbation: added to the new cell state where it is computed, before the output reads it. The derivative with
        respect to a perturbation of zeros is the derivative with respect to the new cell state.

    Returns:
      the new cell state and the output, and the named values by name.
    """
    closed, shapes = jax.make_jaxpr(lambda z, c: gates(z, c, **options), return_shape=True)(z, c)
    args = [z] if c is None else [z, c]
    perturbations = {} if c_perturbation is None else {0: c_perturbation}  # the cell state is the first output
    named_values: dict[str, Array] = {}
    outputs = _eval_jaxpr(closed, args, perturbations, named_values)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs), named_values


def _eval_jaxpr(
    closed: ClosedJaxpr, args: Sequence[Array], perturbations: Mapping[int, Array], named_values: dict[str, Array]
) -> list[Array]:
    """Evaluates a jaxpr equation by equation.

    Args:
      closed: the jaxpr.
      args: its inputs.
      perturbations: arrays added to outputs where they are computed, by index of the output.
      named_values: receives the named values.
    """
    jaxpr = closed.jaxpr
    perturbation_of = {jaxpr.outvars[n]: a for n, a in perturbations.items() if isinstance(jaxpr.outvars[n], Var)}
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args)))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name in CALL_PRIMITIVES:
            inner = {n: perturbation_of[v] for n, v in enumerate(equation.outvars) if v in perturbation_of}
            outputs = _eval_jaxpr(equation.params["jaxpr"], inputs, inner, named_values)
        else:
            outputs = _eval_equation(jaxpr, equation, inputs)
            outputs = [a + perturbation_of[v] if v in perturbation_of else a for a, v in zip(outputs, equation.outvars)]
        if equation.primitive.name == "name":
            named_values[equation.params["name"]] = outputs[0]
        values.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _eval_equation(jaxpr: Jaxpr, equation: JaxprEqn, inputs: Sequence[Array]) -> list[Array]:
    """Evaluates one equation as a jaxpr with this equation alone, so that custom derivative rules are kept."""
    variables = [(atom, a) for atom, a in zip(equation.invars, inputs) if isinstance(atom, Var)]
    alone = jaxpr.replace(constvars=[], invars=[v for v, _ in variables], outvars=equation.outvars, eqns=[equation])
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*(a for _, a in variables))
