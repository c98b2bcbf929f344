"""Looking inside a cell from outside: its named values are picked out of its jaxpr, its equations are left alone."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from jaxlstm.cells import Gates

INLINED = ("jit", "pjit")  # a function compiled apart, in the old and the new name


def look(
    gates: Gates, z: Array, c: Array | None, options: Mapping[str, Any], nudge: Array | None = None
) -> tuple[tuple[Array | None, Array], dict[str, Array]]:
    """What ``gates(z, c, **options)`` returns, and the values that it names by `jax.ad_checkpoint.checkpoint_name`.

    Args:
      gates: of a `jaxlstm.Cell`.
      z: pre-activations, the gate axis first.
      c: the cell state, None for a cell without.
      options: further arguments of ``gates``.
      nudge: added to the new cell state as soon as it is computed, so before h sees it: zeros, to differentiate by it.
    """
    closed, shape = jax.make_jaxpr(lambda z, c: gates(z, c, **options), return_shape=True)(z, c)
    named: dict[str, Array] = {}
    nudges = {} if nudge is None else {0: nudge}  # c is the first of the outputs
    outputs = _evaluate(closed.jaxpr, closed.consts, [z] if c is None else [z, c], nudges, named)
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), named


def _evaluate(
    jaxpr: Jaxpr, consts: Any, arguments: list[Array], nudges: Mapping[int, Array], named: dict[str, Array]
) -> list[Array]:
    """The outputs of a jaxpr; ``nudges`` are added to outputs where they arise, ``named`` gets what has a name."""
    nudge_of = {jaxpr.outvars[n]: nudge for n, nudge in nudges.items() if not isinstance(jaxpr.outvars[n], Literal)}
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments)))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        if equation.primitive.name in INLINED:
            inner = equation.params["jaxpr"]
            inside = {n: nudge_of[v] for n, v in enumerate(equation.outvars) if v in nudge_of}
            outputs = _evaluate(inner.jaxpr, inner.consts, [*map(read, equation.invars)], inside, named)
        else:
            inputs = [v for v in equation.invars if not isinstance(v, Literal)]
            alone = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation])
            outputs = jaxpr_as_fun(ClosedJaxpr(alone, []))(*map(read, inputs))
            outputs = [a + nudge_of[v] if v in nudge_of else a for a, v in zip(outputs, equation.outvars)]
        if equation.primitive.name == "name":
            named[equation.params["name"]] = outputs[0]
        values.update(zip(equation.outvars, outputs))
    return [read(variable) for variable in jaxpr.outvars]
