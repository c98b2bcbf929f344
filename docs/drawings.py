"""Draws an LSTM cell, and how it treats lengths, masks and resets: ``python docs/drawings.py``, a few seconds.

The drawings of lengths, masks and resets are computed from calls: the color of a step is the first input that its
output depends on, found by `jax.jacobian`, and a step is white if its output is zero.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import jaxlstm

FIGURES = Path(__file__).parent / "figures"
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")  # Okabe & Ito 2008
NUM_STEPS, BATCH_SIZE = 12, 3
MASK = ("110111111111", "111000110111", "111111111000")  # 1: True; one row per sequence
RESETS = ("000000000000", "000010000100", "000100010010")
# Colors of the cell: gates, cell state, output, background, text and lines. lesson.css has the same ones.
LIGHT = {"i": "#00755a", "f": "#b84a00", "g": "#0068a8", "o": "#9c3a78", "c": "#7a5c00", "h": "#555b66"} | {
    "paper": "#ffffff", "ink": "#22272e", "line": "#d5d9df"
}  # fmt: skip
DARK = {"i": "#35c79b", "f": "#ff9255", "g": "#6fc0f5", "o": "#e796c6", "c": "#f0bf45", "h": "#b4bcc8"} | {
    "paper": "#161a20", "ink": "#e6e9ee", "line": "#3d444f"
}  # fmt: skip
BELT, BUS = 96, 384  # heights in the drawing of the cell: of c on top, and of h and x at the bottom
GATES = {"f": (130, "forget"), "i": (258, "input"), "g": (380, "candidate"), "o": (510, "output")}  # place and name


def parse(rows: tuple[str, ...]) -> jax.Array:
    """Returns ``(T, B)`` booleans from one string of 0 and 1 per sequence."""
    return jnp.array([[digit == "1" for digit in row] for row in rows]).T


def influence(**masks: Any) -> np.ndarray:
    """Returns ``(B, T, T)`` booleans: whether the output of a step, the first T, depends on the input of another."""
    lstm = jaxlstm.LSTM(1, 2)
    params = lstm.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (NUM_STEPS, BATCH_SIZE, 1))
    jacobian = jax.jacobian(lambda xs: lstm(params, xs, **masks)[0].sum(-1))(xs)  # (T, B, T, B, 1)
    return np.stack([np.asarray(jacobian[:, b, :, b, 0] != 0) for b in range(BATCH_SIZE)])


def draw(name: str, rows: list[str], **masks: Any) -> None:
    """Writes the drawing of a call with these masks to ``docs/figures``; ``rows`` are the labels of the sequences."""
    figure = Figure(figsize=(7.2, 1.7), layout="constrained")
    axes = figure.subplots()
    for b, depends in enumerate(influence(**masks)):
        first = [int(np.argmax(row)) if row.any() else None for row in depends]  # None: the step is skipped
        starts = sorted({start for start in first if start is not None})
        for t, start in enumerate(first):
            color = "white" if start is None else COLORS[starts.index(start)]
            axes.add_patch(Rectangle((t, b), 1, 1, facecolor=color, edgecolor="black", linewidth=0.8))
            label = "0" if start is None else f"y{t}"
            axes.text(t + 0.5, b + 0.5, label, ha="center", va="center", fontsize=9)
        for start in starts:
            axes.plot([start, start], [b, b + 1], color="black", linewidth=3.5)
    axes.set(xlim=(-0.1, NUM_STEPS + 0.1), ylim=(BATCH_SIZE + 0.1, -0.1), xlabel="step")
    axes.set_xticks(np.arange(NUM_STEPS) + 0.5, [str(t) for t in range(NUM_STEPS)])
    axes.set_yticks(np.arange(BATCH_SIZE) + 0.5, rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


def colors(palette: dict[str, str]) -> str:
    """Returns a palette as CSS properties."""
    return "".join(f"--cell-{name}:{color};" for name, color in palette.items())


def wire(kind: str, path: str, *, arrow: bool = True) -> str:
    """Returns a line in the color of a gate or a state, with an arrow at its end."""
    end = f' marker-end="url(#lstm-cell-{kind})"' if arrow else ""
    return f'<path class="wire {kind}" d="{path}"{end}/>'


def node(x: int, y: int, operation: str) -> str:
    """Returns a circle with an elementwise operation: multiply, add or tanh."""
    r = 17
    drawing = {
        "multiply": f'<path class="sign" d="M{x - 7} {y - 7}l14 14m0 -14l-14 14"/>',
        "add": f'<path class="sign" d="M{x - 9} {y}h18m-9 -9v18"/>',
        "tanh": f'<path class="sign" d="M{x - 10} {y + 7}c12 0 8 -14 20 -14"/>',
    }[operation]
    return f'<circle class="node" cx="{x}" cy="{y}" r="{r}"/>{drawing}'


def gate_box(gate: str) -> str:
    """Returns the box of a gate: its letter, its name, and the curve of its activation over an axis."""
    (x, name), y = GATES[gate], 290
    axis = y - 13 if gate == "g" else y + 1  # tanh is symmetric about 0, the sigmoid is above it
    return f"""<g class="gate {gate}"><rect x="{x - 55}" y="{y - 38}" width="110" height="76" rx="12"/>
<text class="letter" x="{x - 24}" y="{y + 1}">{gate}</text>
<path class="axis" d="M{x} {axis}h36"/><path class="curve" d="M{x} {y}c22 0 14 -26 36 -26"/>
<text class="name" x="{x}" y="{y + 27}">{name}</text></g>"""


def draw_cell() -> str:
    """Returns the drawing of an LSTM cell as SVG, in the color scheme of the page or the system."""
    f, i, g, o = (GATES[gate][0] for gate in "figo")
    add, out = (i + g) // 2, 612
    markers = "".join(
        f'<marker id="lstm-cell-{kind}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="11" markerHeight="11" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="tip {kind}" d="M0 0L10 5L0 10z"/></marker>'
        for kind in "ifgoch"
    )
    chevrons = "".join(f"M{x} {BELT - 5}l6 5l-6 5" for x in range(40, 700, 24))
    wires = [
        wire("h", f"M20 {BUS}H{o}V330"),
        *(wire("h", f"M{x} {BUS}V330") for x in (f, i, g)),
        wire("h", f"M64 444V{BUS}", arrow=False),
        wire("f", f"M{f} 252V{BELT + 19}"),
        wire("i", f"M{i} 252V190H{add - 19}"),
        wire("g", f"M{g} 252V190H{add + 19}"),
        wire("c", f"M{add} 173V{BELT + 19}"),
        wire("c", f"M{out} {BELT}V{137}"),
        wire("c", f"M{out} 171V{211}"),
        wire("o", f"M{o} 252V230H{out - 19}"),
        wire("h", f"M{out} 247V{BUS}H698"),
    ]
    nodes = [
        node(f, BELT, "multiply"),
        node(add, BELT, "add"),
        node(add, 190, "multiply"),
        node(out, 154, "tanh"),
        node(out, 230, "multiply"),
    ]
    dots = "".join(f'<circle class="dot" cx="{x}" cy="{BUS}" r="5"/>' for x in (64, f, i, g))
    sub = '<tspan class="sub" dy="7">{}</tspan>'
    t, before = sub.format("t"), sub.format("t−1")
    down = '<tspan dy="-7"> </tspan>'
    symbols = {kind: f'<tspan class="symbol {kind}">{kind}</tspan>' for kind in "ifgo"}
    update = f"{symbols['f']} · c{before}{down}+ {symbols['i']} · {symbols['g']}"
    rules = "".join(
        f".lstm-cell .{kind}{{--color:var(--cell-{kind});--opacity:calc(.15 + .85*var(--level-{kind},1))}}"
        for kind in "ifgoch"
    )
    style = f""".lstm-cell{{{colors(LIGHT)}font-family:system-ui,sans-serif}}
@media (prefers-color-scheme:dark){{.lstm-cell{{{colors(DARK)}}}}}
{rules}
.lstm-cell text{{fill:var(--cell-ink);font-size:24px;text-anchor:middle}}
.lstm-cell .card{{fill:var(--cell-paper);stroke:var(--cell-line)}}
.lstm-cell .belt{{stroke:var(--cell-c);stroke-width:22;opacity:.22;fill:none}}
.lstm-cell .chevrons{{stroke:var(--cell-c);stroke-width:2;fill:none;stroke-linecap:round;stroke-linejoin:round}}
.lstm-cell .wire{{stroke:var(--color);stroke-width:3.5;fill:none;stroke-linejoin:round;opacity:var(--opacity)}}
.lstm-cell .tip{{fill:var(--color)}}
.lstm-cell .dot{{fill:var(--cell-h)}}
.lstm-cell .node{{fill:var(--cell-paper);stroke:var(--cell-ink);stroke-width:2.5}}
.lstm-cell .sign{{fill:none;stroke:var(--cell-ink);stroke-width:3;stroke-linecap:round}}
.lstm-cell .gate rect{{fill:var(--cell-paper);stroke:var(--color);stroke-width:3}}
.lstm-cell .gate .letter{{fill:var(--color);font-size:34px;font-weight:700;font-style:italic}}
.lstm-cell .gate .name{{font-size:19px}}
.lstm-cell .gate .axis{{stroke:var(--cell-line);stroke-width:2}}
.lstm-cell .gate .curve{{fill:none;stroke:var(--color);stroke-width:3;stroke-linecap:round}}
.lstm-cell .state{{font-style:italic;font-weight:600}}
.lstm-cell .sub{{font-size:17px}}
.lstm-cell .symbol{{fill:var(--color);font-weight:700;font-style:italic}}"""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" class="lstm-cell" width="720" height="500" \
viewBox="0 0 720 500" role="img" \
aria-label="An LSTM cell. The cell state c runs along the top like a conveyor belt: it is multiplied by the forget \
gate f, and the input gate i times the candidate g is added. The output gate o times tanh of c is the output h. All \
four gates read the input x and the previous h.">
<style>{style}</style><defs>{markers}</defs>
<rect class="card" x="1" y="1" width="718" height="498" rx="16"/>
<path class="belt" d="M20 {BELT}H700"/><path class="chevrons" d="{chevrons}"/>
{"".join(wires)}{dots}
{"".join(nodes)}
{"".join(gate_box(gate) for gate in GATES)}
<text class="state" x="52" y="66">c{before}</text><text class="state" x="674" y="66">c{t}</text>
<text class="state" x="52" y="{BUS - 18}">h{before}</text><text class="state" x="674" y="{BUS - 18}">h{t}</text>
<text class="state" x="64" y="472">x{t}</text>
<text x="{add}" y="48">c{t}{down}= {update}</text>
<text x="{add}" y="462">h{t}{down}= {symbols["o"]} · tanh(c{t}<tspan dy="-7">)</tspan></text>
</svg>
"""


def main() -> None:
    """Writes the drawings."""
    (FIGURES / "lstm_cell.svg").write_text(draw_cell(), encoding="utf-8")
    mpl.rcParams["svg.hashsalt"] = "jaxlstm"  # the same names in the file each time
    draw("lengths", ["length 12", "length 7", "length 0"], lengths=jnp.array([12, 7, 0]))
    draw("mask", [f"sequence {b}" for b in range(BATCH_SIZE)], mask=parse(MASK))
    draw("resets", [f"sequence {b}" for b in range(BATCH_SIZE)], resets=parse(RESETS))


if __name__ == "__main__":
    main()
