"""The page of `jaxlstm.diagnostics.explore` in a browser: pointer, keyboard, search, controls, width, color scheme."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm import diagnostics

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, of the extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the browser Chromium on the PATH"),
]
TEXT = "a cat, a dog (and a cow)\nsat down.\n" * 8
CLASSES = sorted(set(TEXT))
IDS = np.array([CLASSES.index(character) for character in TEXT])
NUM_STEPS, NUM_UNITS = len(TEXT) - 1, 24
LEFT, MARGINS = 60, 64  # pixels left of the charts, and left and right of them


def training_row(step):
    """Returns a row of ``diagnosis.jsonl``, with numbers that tell the step."""
    part = step / 1000
    gate = {"quantiles": [part, 2 * part, 3 * part, 4 * part, 5 * part], "shut": part, "open": None}
    values = {
        "gates": {"i": gate, "f": gate, "o": gate},
        "time_constants": [1.0, 2.0, float(step), 4e3, None],
        "dead": 0.5,
    }
    norms = {"gradient": [part, 1e-30, 1.0], "elementwise": [None, 0.0, part]}
    return {
        "step": step,
        "quantiles": [0.1, 0.25, 0.5, 0.75, 0.9],
        "steps": [0, 5, 9],
        "layers": [{"forward": values | norms}],
    }


ROWS = [training_row(step) for step in (10, 20, 100)]


@pytest.fixture(scope="module")
def trace_and_page(tmp_path_factory):
    """Returns the trace of an untrained network over `TEXT`, and the path of its page."""
    lstm = jaxlstm.LSTM(len(CLASSES), NUM_UNITS)
    params = lstm.init(jax.random.key(0))
    params = jax.tree.map(lambda a: 3 * a, params)  # larger differences between the units
    xs = jax.nn.one_hot(IDS[:-1], len(CLASSES), dtype=jnp.float32)
    page = diagnostics.explore(
        lstm,
        params,
        xs,
        labels=TEXT[:-1],
        logits=lambda ys: 2 * ys[:, : len(CLASSES)],
        targets=IDS[1:],
        classes=CLASSES,
        properties={"inside brackets": np.cumsum([{"(": 1, ")": -1}.get(c, 0) for c in TEXT[:-1]])},
        title="Explorer",
        training=ROWS,
    )
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page, encoding="utf-8")
    return diagnostics.trace(lstm, params, xs), path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, trace_and_page):
    """The page at 1280 pixels; errors of its script fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.goto(trace_and_page[1].as_uri())
    opened.wait_for_selector("html[data-ready]")
    yield opened
    context.close()
    assert errors == []


def settle(page):
    """Waits until the page has drawn the last change."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def readout(page):
    settle(page)
    return page.locator("#readout").inner_text()


def step_and_unit(page):
    return tuple(map(int, re.match(r"Step (\d+) of .*?Unit (\d+):", readout(page), re.DOTALL).groups()))


def character(page, step):
    """Returns the center of a character of the text, scrolled into view."""
    span = page.locator(f"#text span[data-step='{step}']")
    span.scroll_into_view_if_needed()
    box = span.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag_over(page, first, last):
    """Selects steps by dragging over the text."""
    page.mouse.move(*character(page, first))
    page.mouse.down()
    page.mouse.move(*character(page, last), steps=5)
    page.mouse.up()
    settle(page)


def pixels(page, selector="#map, #strips canvas"):
    """Returns the pictures of the canvases, by default of the heat map and its strips, as one text."""
    settle(page)
    return page.eval_on_selector_all(selector, "canvases => canvases.map((canvas) => canvas.toDataURL()).join()")


def test_page_loads_nothing_else(browser, trace_and_page):
    requests = []
    opened = browser.new_page()
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(trace_and_page[1].as_uri())
    opened.wait_for_selector("html[data-ready]")
    opened.close()
    assert [url for url in requests if not url.startswith("data:")] == [trace_and_page[1].as_uri()]


def test_page_hover_shows_the_step_and_leaves_the_pinned_one(page, trace_and_page):
    first = step_and_unit(page)
    assert first == (NUM_STEPS // 2 if NUM_STEPS <= 200 else 50, 0)  # in the middle of the view
    page.mouse.move(*character(page, 7))
    text = readout(page)
    assert text.startswith("Step 7 of")
    assert "actual: “\u2068␣\u2069”" in text
    expected = float(trace_and_page[0].layers[0].forward.c[7, 0])
    shown = page.locator("#values tr", has_text="cell state c").locator("td").inner_text().replace("−", "-")
    assert float(shown) == pytest.approx(expected, abs=0.02)
    page.mouse.move(2, 2)
    assert step_and_unit(page) == first
    page.mouse.click(*character(page, 9))
    page.mouse.move(2, 2)
    assert step_and_unit(page) == (9, 0)


def test_page_hover_over_the_map_shows_step_and_unit(page):
    page.select_option("#span", "50")
    box = page.locator("#map").bounding_box()
    cell = (box["width"] - MARGINS) / 50
    page.mouse.move(box["x"] + LEFT + 20.5 * cell, box["y"] + 12 + 10.5 * 14)
    assert step_and_unit(page) == (25 + 20, 10)  # 50 steps around step 50


def bar(page, strip, column):
    """Returns height (pixels) and vertical center of the dark part of a strip in the column of one of 50 steps."""
    return page.evaluate(
        """([strip, column, left, margins]) => {
          const canvas = document.querySelectorAll("#strips canvas")[strip];
          const x = Math.round(left + (column + 0.25) * (canvas.width - margins) / 50);
          const pixels = canvas.getContext("2d").getImageData(x, 0, 1, canvas.height).data;
          const rows = [...Array(canvas.height).keys()].filter((y) => pixels[4 * y] < 60 && pixels[4 * y + 3] > 200);
          return [rows.length, rows.reduce((a, b) => a + b, 0) / rows.length];
        }""",
        [strip, column, LEFT, MARGINS],
    )


def test_page_strips_show_the_values_of_the_steps(page, trace_and_page):
    page.select_option("#span", "50")  # steps 25 to 74
    page.locator("#unit").fill("3")
    settle(page)
    c = np.asarray(trace_and_page[0].layers[0].forward.c[:, 3], np.float64)[25:75]
    for column in (3, 12, 33, 46):
        height, center = bar(page, 0, column)
        assert height / 48 == pytest.approx(abs(c[column]) / np.abs(c).max() / 2, abs=0.05)  # of 64 - 2 * 8 pixels
        assert (center < 31) == (c[column] > 0) or height < 3
    assert bar(page, 2, 10)[0] > 0
    assert bar(page, 2, 40)[0] == 0  # the loss at step 50 does not depend on later states
    label = page.locator("#strips").get_attribute("aria-label")
    assert label == (
        "Charts by step: unit 3: cell state c; surprise of each prediction, nats; "
        "gradient of step 50’s loss, 64 steps back"
    )
    box = page.locator("#strips canvas").nth(1).bounding_box()
    page.mouse.move(box["x"] + LEFT + 7.5 * (box["width"] - MARGINS) / 50, box["y"] + 20)
    assert step_and_unit(page) == (25 + 7, 3)


def test_page_strips_of_narrow_columns_are_one_area(page):
    page.select_option("#span", str(NUM_STEPS))
    page.set_viewport_size({"width": 390, "height": 800})
    settle(page)
    opacity = page.evaluate(
        """([left, right]) => {
          const canvas = document.querySelectorAll("#strips canvas")[1];
          const bottom = canvas.getContext("2d").getImageData(left, 55, canvas.width - left - right, 1).data;
          return bottom.filter((_, n) => n % 4 === 3);
        }""",
        [LEFT + 1, MARGINS - LEFT + 1],
    )
    assert min(opacity) == 255


def test_page_brush_finds_the_windows_of_most_active_units(page, trace_and_page):
    """The best window and its share are computed here from the recorded cell states."""
    first, last = 40, 42
    drag_over(page, first, last)
    assert "Steps 40 to 42," in page.locator("#found").inner_text()
    c = np.asarray(trace_and_page[0].layers[0].forward.c, np.float64)
    part = c / np.abs(c).max(0)
    assert np.abs(np.abs(part) - 0.3).min() > 1e-6
    on = np.where(np.abs(np.rint((part + 1) * 127) / 127 - 1) >= 0.3, np.sign(part), 0)  # rounded as in the page
    window = on[first : last + 1]
    active = np.flatnonzero((window[0] != 0) & (window == window[0]).all(0))
    assert len(active) > 2
    buttons = page.locator("#active button").all_inner_texts()
    assert [int(name.replace("−", "")) for name in buttons] == active.tolist()
    assert ["−" in name for name in buttons] == (window[0, active] < 0).tolist()
    share = (on[:, active] == window[0, active]).mean(1)
    shares = np.convolve(share, np.ones(3) / 3, "valid")
    outside = [t for t in range(len(shares)) if t + 2 < first or t > last]
    best = max(outside, key=lambda t: (round(shares[t], 9), -t))
    match = page.locator("#matches button").first
    number = re.search(r"step (\d+), ([\d.]+)%", match.inner_text())
    assert int(number[1]) == best
    assert float(number[2]) == pytest.approx(100 * shares[best], abs=0.6)
    match.click()
    page.mouse.move(2, 2)
    assert step_and_unit(page)[0] == best
    assert page.locator(f"#text span[data-step='{best}']").get_attribute("class") == "now match"
    page.click("#clear")
    assert page.locator("#matches button").count() == 0


def test_page_brush_excludes_units_that_are_active_before(page):
    drag_over(page, 40, 42)
    everywhere = page.locator("#active button").count()
    page.check("#before")
    assert page.locator("#active button").count() < everywhere
    page.uncheck("#before")
    page.locator("#threshold").fill("95")
    assert "95 %" in page.locator("#threshold-value").inner_text()
    assert page.locator("#active button").count() < everywhere


def test_page_touch_selects_steps(browser, trace_and_page):
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(trace_and_page[1].as_uri())
    page.wait_for_selector("html[data-ready]")
    page.touchscreen.tap(*character(page, 12))
    assert step_and_unit(page)[0] == 12
    (x, y), (to_x, to_y) = character(page, 12), character(page, 16)
    client = context.new_cdp_session(page)
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        *(("touchMove", [{"x": x + (to_x - x) * n / 6, "y": y + (to_y - y) * n / 6}]) for n in range(1, 7)),
        ("touchEnd", []),
    ):
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(page)
    assert "Steps 12 to 16," in page.locator("#found").inner_text()
    context.close()


def test_page_keyboard_moves_selects_and_clears(page):
    page.focus("#map")
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert step_and_unit(page) == (2, 1)
    assert page.locator("#live").inner_text() == page.locator("#readout").inner_text()
    for key in ("Shift+ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert "Steps 2 to 4," in page.locator("#found").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#found").inner_text().startswith("Select steps")
    page.keyboard.press("End")
    assert step_and_unit(page) == (NUM_STEPS - 1, 1)
    page.focus("#text")
    page.keyboard.press("Home")
    assert step_and_unit(page) == (0, 1)


def test_page_switches_values_order_and_shading(page, trace_and_page):
    pictures = [pixels(page)]
    page.get_by_role("radio", name="forget gate f").focus()
    page.keyboard.press("Space")
    pictures.append(pixels(page))
    assert "forget gate f" in readout(page)
    page.select_option("#order", "time constant")
    pictures.append(pixels(page))
    f = np.asarray(trace_and_page[0].layers[0].forward.gates["f"], np.float64)
    page.focus("#map")
    page.keyboard.press("ArrowUp")  # the pinned unit, 0, may be anywhere
    for _ in range(NUM_UNITS):
        page.keyboard.press("ArrowUp")
    assert step_and_unit(page)[1] == int(np.argmax(np.log(f).mean(0)))
    page.select_option("#order", "property inside brackets")
    pictures.append(pixels(page))
    brackets = np.cumsum([{"(": 1, ")": -1}.get(c, 0) for c in TEXT[:-1]])
    best, found = diagnostics.correlated_units(np.rint(f * 254) / 254, brackets)  # rounded as in the page
    assert page.locator("#order-note").inner_text() == f"unit {best[0]} on top: correlation {found[0]:.2f}".replace(
        "-", "−"
    )
    page.select_option("#order", "clusters")
    pictures.append(pixels(page))
    assert len(set(pictures)) == len(pictures)


def test_page_shades_text_by_the_gradient_of_the_selected_step(page):
    page.mouse.click(*character(page, 30))
    page.select_option("#shade", "gradients")
    settle(page)
    colors = page.eval_on_selector_all("#text span", "spans => spans.map((span) => span.style.background)")
    assert len(set(colors[30:])) == 1  # the loss at step 30 does not depend on later states
    assert len(set(colors[20:31])) > 5
    assert colors[29] != colors[30]
    assert page.locator("#text-high").inner_text() == (
        "largest gradient of the loss at step 30; not computed further than 64 steps back"
    )
    page.mouse.click(*character(page, 70))
    settle(page)
    unknown = page.eval_on_selector_all(
        "#text span", "spans => spans.map((span) => span.className.includes('unknown'))"
    )
    assert unknown[:8] == [True] * 6 + [False] * 2  # steps 70 - 64 and later are known


def moment(page):
    """Returns the table of the chosen moment of the training, as lines of cells."""
    assert (
        page.locator("#moment-values caption").inner_text()
        == f"after {page.locator('#moment-step').inner_text()} training steps"
    )
    lines = page.locator("#moment-values tr").all()
    return [line.locator("td, th").all_inner_texts() for line in lines]


def test_page_plays_back_the_training(page):
    def picture():
        return pixels(page, "#history canvas")

    assert page.locator("#moment-step").inner_text() == "100"
    pictures = [picture()]
    page.locator("#moment").fill("0")
    pictures.append(picture())
    assert moment(page) == [
        ["", "10 %", "50 %", "90 %", "shut", "open"],
        *([name, "0.01", "0.03", "0.05", "1.0%", "–"] for name in "ifo"),
        ["time constant", "1.00", "10.00", "∞"],
        ["dead units", "50%"],
    ]
    page.click("#play")
    page.wait_for_function("() => document.getElementById('play').textContent === 'Play'")
    assert page.locator("#moment").input_value() == "2"
    assert moment(page)[1] == ["i", "0.10", "0.30", "0.50", "10%", "–"]
    assert picture() == pictures[0]
    plot = page.locator("#history .u-over").first
    plot.click(position={"x": plot.bounding_box()["width"] * 0.2, "y": 60})  # step 28, nearest to step 20
    assert page.locator("#moment").input_value() == "1"
    pictures.append(picture())
    page.emulate_media(color_scheme="dark")
    pictures.append(picture())
    assert len(set(pictures)) == len(pictures)


def test_page_shows_moments_without_numbers_as_gaps(browser, tmp_path):
    """Null entries are numbers that were not finite; of time constants they are infinite only if gates have numbers."""
    lost = training_row(20)
    side = lost["layers"][0]["forward"]
    for gate in side["gates"].values():
        gate["quantiles"] = [None] * 5
    side |= {"time_constants": [None] * 5, "gradient": [None] * 3, "elementwise": [None] * 3}
    rows = [lost | {"step": 0}, training_row(10), lost | {"step": 200_000_000}]
    lstm = jaxlstm.LSTM(2, 3)
    path = tmp_path / "page.html"
    page = diagnostics.explore(lstm, lstm.init(jax.random.key(0)), jnp.ones((4, 2)), training=rows)
    path.write_text(page, encoding="utf-8")
    opened = browser.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready]")

    def ink():
        """Returns for each panel the number of pixels in the accent color."""
        settle(opened)
        return opened.evaluate(
            """() => [...document.querySelectorAll("#history canvas")].map((canvas) => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              const isBlue = (n) => data[4 * n + 3] > 100 && data[4 * n + 2] > data[4 * n] + 60;
              return [...Array(data.length / 4).keys()].filter(isBlue).length;
            })"""
        )

    assert moment(opened)[1:5] == [
        *([name, "–", "–", "–", "2.0%", "–"] for name in "ifo"),
        ["time constant", "–", "–", "–"],
    ]
    edges = opened.eval_on_selector_all(
        "#history canvas",
        """canvases => canvases.flatMap((c) => [0, c.width - 1].flatMap((x) =>
          [...c.getContext("2d").getImageData(x, 0, 1, c.height).data]))""",
    )
    assert not any(edges)  # no label is cut
    *gates, constants, _ = ink()
    assert all(5 * 4 < count < 5 * 40 for count in gates)  # five points
    assert 4 * 4 < constants < 4 * 40  # the fifth is infinite, above the panel
    opened.locator("#moment").fill("1")
    assert moment(opened)[4] == ["time constant", "1.00", "10.00", "∞"]
    opened.close()


def test_page_without_rows_of_the_training_has_no_playback(browser, tmp_path):
    lstm = jaxlstm.LSTM(2, 3)
    path = tmp_path / "page.html"
    path.write_text(diagnostics.explore(lstm, lstm.init(jax.random.key(0)), jnp.ones((4, 2))), encoding="utf-8")
    opened = browser.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready]")
    assert not opened.locator("#training").is_visible()
    opened.close()


@pytest.mark.parametrize("width", [1280, 800, 390, 320])
def test_page_fits_the_width_after_a_resize(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    settle(page)
    for canvas in (page.locator("#map"), *page.locator("figure canvas").all()):
        drawn = canvas.evaluate("c => c.width / devicePixelRatio")
        assert drawn == pytest.approx(canvas.bounding_box()["width"], abs=1)
    drag_over(page, 3, 6)
    overflow = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((element) => {
          const box = element.getBoundingClientRect();
          return box.width > 1 && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map((element) => element.id || element.tagName)"""
    )
    assert overflow == []


def test_page_scrolls_by_slider_and_wheel(page):
    def shown():
        settle(page)
        return int(re.search(r"steps (\d+) to", page.locator("#map").get_attribute("aria-label"))[1])

    page.select_option("#span", "50")
    page.locator("#first").fill("100")
    assert shown() == 100
    page.locator("#map").hover()
    page.mouse.wheel(200, 0)
    assert shown() > 100
    page.mouse.wheel(-1e4, 0)
    assert shown() == 0
    page.select_option("#span", str(NUM_STEPS))
    settle(page)
    assert not page.locator("#scroll").is_visible()


def test_page_shows_labels_without_width_and_isolates_their_direction(browser, tmp_path):
    lstm = jaxlstm.LSTM(2, 3)
    labels = ["a", "", "\u200b", "\u0301", "א", "ב", "toString", "\r"]
    logits = lambda ys: 4 * jnp.tile(ys, 4)  # noqa: E731
    page = diagnostics.explore(
        lstm,
        lstm.init(jax.random.key(0)),
        np.ones((8, 2), np.float32),
        labels=labels,
        logits=logits,
        targets=np.arange(4, 12),
        properties={"surprise": np.arange(8)},
    )
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    opened = browser.new_page(viewport={"width": 800, "height": 600})
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready]")
    expected = ["a", "∅", "U+200B", "◌\u0301", "א", "ב", "toString", "U+000D"]
    assert opened.locator("#text span").all_text_contents() == expected
    shown = []
    for step in range(8):
        opened.mouse.move(*character(opened, step))
        shown.append(re.search("“\u2068(.*?)\u2069”", readout(opened))[1])
        rows = opened.locator("#predictions tr")
        assert opened.locator("#predictions tr.target").count() == 1
        assert rows.count() == 8  # the last one is of the actual class if that is not among the first
    assert shown == expected
    orders = opened.locator("#order option").all_inner_texts()
    assert orders[-2:] == ["correlation with the prediction’s surprise", "correlation with surprise"]
    opened.close()


def test_page_has_a_dark_scheme(page):
    def background():
        return page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light, picture = background(), pixels(page)
    page.emulate_media(color_scheme="dark")
    assert background() != light
    assert pixels(page) != picture


def test_page_controls_have_names(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, [tabindex]")].filter((element) =>
          !element.labels?.length && !element.getAttribute("aria-label") && !element.textContent.trim()
        ).map((element) => element.outerHTML)"""
    )
    assert nameless == []
    assert re.search("Heat map of cell state c, 24 units", page.locator("#map").get_attribute("aria-label"))
