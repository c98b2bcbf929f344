"""Tests the lesson in docs/lesson.md: its numbers in node, its widgets in a browser."""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm import diagnostics

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
STATIC = DOCS / "_static" / "lesson"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
WIDTHS = {"wide": 1280, "phone": 390}
OPEN, SHUT = "open", "shut"
SOLUTIONS = {  # by widget: the ends to which sliders are moved
    "forget": {"forget gate f": OPEN},
    "input": {"input gate i, ordinary steps": SHUT, "input gate i, marked steps": OPEN, "forget gate f": OPEN},
    "cell": {
        "forget gate f, ordinary steps": OPEN,
        "forget gate f, marked steps": SHUT,
        "input gate i, ordinary steps": OPEN,
        "input gate i, marked steps": SHUT,
    },
}


def load_script(name):
    """Imports a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recordings = load_script("recordings")
NETWORKS = ["rnn", *(f"lstm {bias:g}" for bias in recordings.FORGET_BIASES), "gru"]


def run_node(expression):
    """The value of an expression with the functions of model.js and the recordings."""
    code = f"""{(STATIC / "model.js").read_text(encoding="utf-8")}
        const recordings = JSON.parse(require("fs").readFileSync(process.argv[1], "utf-8"));
        console.log(JSON.stringify({expression}));"""
    command = ["node", "-e", code, STATIC / "recordings.json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@functools.cache
def expected_norms(name, num_steps):
    """The norms of `gradient_flow` in float64."""
    network = recordings.networks()[name]
    params, xs = recordings.make_call(network)
    flow = diagnostics.gradient_flow(network, params, xs[:num_steps], lambda ys: ys.sum())
    return np.asarray(flow.network_jacobian)


@needs_node
@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_steps"), [*((name, 64) for name in NETWORKS), ("lstm 1", 1), ("lstm 1", 37)])
def test_lesson_jacobian_norms_match_gradient_flow(name, num_steps):
    norms = run_node(f"jacobianNorms('{name.split()[0]}', recordings['{name}'], {num_steps})")
    np.testing.assert_allclose(norms, expected_norms(name, num_steps), rtol=1e-5)


@needs_node
@pytest.mark.slow
def test_lesson_gate_products_match_trace():
    network = recordings.networks()["lstm 2"]
    params, xs = recordings.make_call(network)
    f = np.asarray(diagnostics.trace(network, params, xs).layers[0].forward.gates["f"])
    products = run_node("gateProducts('f', recordings['lstm 2'], 20)")
    np.testing.assert_allclose(products, [f[t + 1 : 20].prod(0) for t in range(20)], rtol=1e-5)


@needs_node
def test_lesson_simulation_follows_the_equations():
    values = {"i0": 0.3, "i1": 0.9, "f0": 0.8, "f1": 0.2, "o0": 0.7, "o1": 0.1}
    stream, steps = run_node(f"[STREAMS.restart, simulate({json.dumps(values)}, STREAMS.restart)]")
    c = 0.0
    for x, mark, step in zip(stream["xs"], stream["marks"], steps, strict=True):
        i, f, o = (values[gate + str(int(mark))] for gate in "ifo")
        c = f * c + i * x
        assert step["c"] == pytest.approx(c, rel=1e-12)
        assert step["h"] == pytest.approx(o * np.tanh(c), rel=1e-12)
    assert sum(stream["marks"]) == 2


@needs_node
@pytest.mark.slow
def test_lesson_gradient_of_the_loss_matches_autodiff():
    """The unit of the lesson is an LSTM without recurrent weights that reads arctanh(x) and the mark."""
    params = [1.5, -2.0, 0.3, -0.7]
    stream, task, result = run_node(
        f"[STREAMS.restart, TASKS.restart, lossAndGradient({params}, STREAMS.restart, TASKS.restart.target)]"
    )
    xs = jnp.stack([jnp.arctanh(jnp.array(stream["xs"])), jnp.array(stream["marks"], jnp.float64)], axis=-1)
    lstm = jaxlstm.LSTM(2, 1, param_dtype=jnp.float64)

    def loss(bf, wf, bi, wi):
        w_x = jnp.array([[0, wi], [0, wf], [1, 0], [0, 0]], jnp.float64)
        weights = lstm.init(jax.random.key(0)).layers[0].forward
        weights = weights._replace(w_x=w_x, w_h=jnp.zeros((4, 1)), b=jnp.array([bi, bf, 0, 0], jnp.float64))
        params = jaxlstm.Params((jaxlstm.Layer(weights),), None)
        c = diagnostics.trace(lstm, params, xs).layers[0].forward.c[:, 0]
        return ((c - jnp.array(task["target"])) ** 2).mean()

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*map(jnp.float64, params))
    assert result["loss"] == pytest.approx(float(value), rel=1e-9)
    np.testing.assert_allclose(result["gradient"], np.array(gradient), rtol=1e-9)


def test_lesson_recordings_are_small():
    assert (STATIC / "recordings.json").stat().st_size < 500_000
    assert sorted(json.loads((STATIC / "recordings.json").read_text())) == sorted(NETWORKS)


@pytest.mark.slow
def test_lesson_drawing_is_the_one_of_the_script():
    drawing = (DOCS / "figures" / "lstm_cell.svg").read_text(encoding="utf-8")
    assert drawing == load_script("drawings").draw_cell()


# In a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the page, built by Sphinx with the configuration of the site and served on this machine."""
    for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(package, reason="the page is built by Sphinx: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("lesson")
    (folder / "docs" / "figures").mkdir(parents=True)
    shutil.copy(DOCS / "lesson.md", folder / "docs")
    shutil.copy(DOCS / "figures" / "lstm_cell.svg", folder / "docs" / "figures")
    options = ["-q", "-b", "html", "-c", DOCS, "-D", "root_doc=lesson", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", *options, folder / "docs", folder / "site"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/lesson.html"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(site, browser):
    """Opens the page in a window or on a phone; fails if a script raises an error or leaves this machine."""
    contexts, errors = [], []

    def check_address(request):
        if not request.url.startswith((site.rpartition("/")[0], "data:")):
            errors.append(request.url)

    def open_page(device, scheme="light"):
        is_phone = device == "phone"
        size = {"width": WIDTHS[device], "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", check_address)
        page.goto(site)
        page.locator("[data-widget=gradient] dl").wait_for()  # drawn last, after its numbers are loaded
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def widget(page, name):
    return page.locator(f"[data-widget={name}]")


def move(page, device, slider, setting):
    """Moves a slider to its end: by the keyboard in a window, by a finger on a phone."""
    if device == "wide":
        slider.press("End" if setting == OPEN else "Home")
        return
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + (box["width"] - 3 if setting == OPEN else 3), box["y"] + box["height"] / 2)


@pytest.mark.slow
@pytest.mark.parametrize("device", WIDTHS)
def test_lesson_tasks_are_solved_by_hand(open_page, device):
    page = open_page(device)
    for name, settings in SOLUTIONS.items():
        verdict = widget(page, name).get_by_role("status")
        for label, setting in settings.items():
            assert verdict.inner_text() == "Not yet."
            move(page, device, widget(page, name).get_by_role("slider", name=label, exact=True), setting)
        assert verdict.inner_text() == "Solved."


@pytest.mark.slow
def test_lesson_tasks_are_solved_with_preactivations(open_page):
    page = open_page("wide")
    for name, settings in SOLUTIONS.items():
        widget(page, name).get_by_label("pre-activations").check()
        for label, setting in settings.items():
            slider = widget(page, name).get_by_role("slider", name=label, exact=True)
            move(page, "wide", slider, setting)
            z, gate = re.fullmatch(r"z = (\S+), \w = (\S+)", slider.get_attribute("aria-valuetext")).groups()
            assert float(gate) == pytest.approx(1 / (1 + np.exp(-float(z.replace("−", "-")))), abs=1e-4)
        assert widget(page, name).get_by_role("status").inner_text() == "Solved."


@pytest.mark.slow
def test_lesson_near_miss_is_not_solved(open_page):
    page = open_page("wide")
    forget = widget(page, "forget")
    forget.get_by_role("slider", name="forget gate f").fill("0.95")
    assert forget.get_by_role("status").inner_text() == "Not yet."
    assert f"step 55: c is {0.95**50:.2f} and should be 1.00" in forget.locator(".reason").inner_text()
    forget.get_by_role("slider", name="forget gate f").fill("0.998")  # 0.998**50 is 0.905
    assert forget.get_by_role("status").inner_text() == "Solved."
    assert "its largest error, 0.10, is at step 55" in forget.locator(".reason").inner_text()
    assert "0.998" in forget.locator(".equation").first.inner_text()
    forget.get_by_role("slider", name="forget gate f").fill("0.997")  # 0.997**50 is 0.861
    assert forget.get_by_role("status").inner_text() == "Not yet."


@pytest.mark.slow
def test_lesson_equations_light_up_where_values_change(open_page):
    page = open_page("wide")
    forget = widget(page, "forget")
    forget.get_by_role("slider", name="step t").fill("10")
    page.locator(".lit").evaluate_all("terms => terms.forEach((term) => term.classList.remove('lit'))")
    forget.get_by_role("slider", name="forget gate f").fill("0.5")
    lit = forget.locator(".lit .symbol").all_inner_texts()
    assert [text.replace("\n", "") for text in lit] == ["ct", "f", "ct−1", "ht", "ct"]  # neither i, g nor o
    values = forget.locator(".term .value").all_inner_texts()
    assert values[:3] == ["0.031", "0.500", "0.063"]  # 0.5**5 and 0.5**4


@pytest.mark.slow
def test_lesson_chart_and_play_set_the_step(open_page):
    page = open_page("phone")
    output = widget(page, "output")
    step = output.get_by_role("slider", name="step t")
    chart = output.locator(".chart svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    for share, low, high in ((0.99, 59, 59), (0.5, 23, 29), (0.05, 0, 0)):
        page.touchscreen.tap(box["x"] + share * box["width"], box["y"] + 50)
        assert low <= int(step.input_value()) <= high
    step.fill("55")
    output.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('[data-widget=output] .player input').value === '59'")
    output.get_by_role("button", name="Play").wait_for()  # and not "Pause"


@pytest.mark.slow
def test_lesson_training_solves_the_task(open_page):
    page = open_page("phone")
    page.emulate_media(reduced_motion="reduce")  # all updates at once
    training = widget(page, "training")
    for bias in ("-3", "3"):
        training.get_by_role("slider", name="initial forget bias").fill(bias)
        assert "after 0 of" in training.inner_text()
        assert training.get_by_role("status").inner_text() == ""
        training.get_by_role("button", name="Train").click()
        assert training.get_by_role("status").inner_text() == "Task 3 is solved."
    page.emulate_media(reduced_motion="no-preference")
    training.get_by_role("button", name="Again").click()
    training.get_by_role("button", name="Pause").click()
    assert training.get_by_role("button", name="Train").is_visible()


@pytest.mark.slow
def test_lesson_gradient_shows_the_numbers_of_gradient_flow(open_page):
    page = open_page("phone")
    gradient = widget(page, "gradient")
    for name, num_steps, step in (("lstm 1", 37, 4), ("gru", 64, 0), ("rnn", 64, 63), ("lstm 1", 64, 0)):
        kind, *bias = name.split()
        gradient.get_by_label("cell").select_option(kind)
        if bias:
            gradient.get_by_label("forget bias").select_option(bias)
        assert gradient.get_by_label("forget bias").is_disabled() == (kind != "lstm")
        gradient.get_by_role("slider", name="T, number of steps").fill(str(num_steps))
        gradient.get_by_role("slider", name="step t").fill(str(step))
        expected = expected_norms(name, num_steps)[step]
        assert parse(gradient.locator(".number").first.inner_text()) == pytest.approx(expected, rel=0.006)
        computed = page.evaluate(
            """async ([kind, name, length]) => {
                const response = await fetch("_static/lesson/recordings.json");
                return jacobianNorms(kind, (await response.json())[name], length);
            }""",
            [kind, name, num_steps],
        )
        np.testing.assert_allclose(computed, expected_norms(name, num_steps), rtol=1e-5)


def parse(text):
    """The number in a text such as 5.17×10⁻⁵."""
    return float(text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace("×10", "e"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_lesson_fits_the_screen(open_page, device, scheme):
    page = open_page(device, scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]
    assert page.locator(".lesson").count() == 8
    cut = page.locator(".lesson :not(option, svg.lstm-cell *)").evaluate_all(
        """elements => elements.filter((element) => {
            const inner = element.getBoundingClientRect();
            const outer = element.parentElement.closest(".chart svg, .lesson").getBoundingClientRect();
            return inner.left < outer.left - 1 || inner.right > outer.right + 1;
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert not cut
    overlapping = page.locator(".lesson").evaluate_all(
        """widgets => widgets.flatMap((widget) => {
            const texts = [...widget.querySelectorAll(".name, .shown, .title, .term, .chart text, .legend li, dt, dd")];
            const boxes = texts.map((text) => text.getBoundingClientRect());
            return texts.flatMap((text, n) => texts.slice(n + 1).filter((_, k) => {
                const [a, b] = [boxes[n], boxes[n + 1 + k]];
                return a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
            }).map((other) => [text.textContent, other.textContent]));
        })"""
    )
    assert not overlapping


@pytest.mark.slow
def test_lesson_controls_have_names(open_page):
    page = open_page("wide")
    controls = page.locator(".lesson :is(input, select, button)")
    assert controls.count() > 30
    unnamed = controls.evaluate_all(
        """all => all.filter((one) => {
            return !one.ariaLabel && !one.textContent.trim() && !one.labels?.[0]?.textContent.trim();
        }).map((one) => one.outerHTML)"""
    )
    assert not unnamed
    charts = page.locator(".lesson .chart svg")
    assert all(chart.get_attribute("aria-label") for chart in charts.all())
