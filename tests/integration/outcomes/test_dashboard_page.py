"""`/dashboard` in a headless Chromium, over a real server: asked, labelled, refused, narrow and wide, light and dark.

The screenshots stay in the test's folder (`--basetemp` says where), to be looked at.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from scalabl.config import Task
from tests import tiny
from tests.integration.support.process import Served, served, write_models
from tests.integration.support.replicas import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

pytestmark = pytest.mark.integration

KEY = "open-sesame"
SAMPLES = 8
COLOURS = list(tiny.CLASSIFICATION.choices)
SIZES = {"phone": (320, 700), "tablet": (800, 1000), "wide": (1440, 900)}
# Where the focus is, and whether that shows.
REACHED = """() => {
  const at = document.activeElement;
  const ringed = [at, at.closest(".segmented")].some((each) => each && getComputedStyle(each).outlineStyle !== "none");
  return [at.id || at.name || at.tagName, at === document.body || ringed];
}"""
AXE = "axe.run(document, {resultTypes: ['violations']})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is missing; pip install 'scalabl[dev]'")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is missing; apt-get install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`colours` is calibrated, so that it has sets and abstains; `letters` is not."""
    folder = write_models(tmp_path_factory.mktemp("seen"))
    dice = random.Random(0)
    rows = [{"text": text(dice), "choices": COLOURS, "answer": dice.randrange(3)} for _ in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable,
        "-m",
        "scalabl_server.cli",
        "calibrate",
        "--model",
        folder / "base",
        "--adapter",
        folder / "colours",
    ]
    command += ["--data", folder / "rows.jsonl", "--num-samples", str(SAMPLES), "--target-risk", "0.8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def text(dice: random.Random) -> str:
    return "".join(dice.choices("abcdefgh ", k=dice.randint(1, 20))) + "."


def start(models: Path, name: str, **more: object) -> Any:
    settings = {"adapters": f"letters={models / 'letters'}", "num_samples": SAMPLES, "data_dir": models / f"data-{name}"}
    return served(models, **settings | more)


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Served]:
    """With 600 predictions, 480 of them labelled."""
    with start(models, "seen", store_inputs=True) as server:
        dice = random.Random(1)
        for _ in range(6):
            asked = httpx.post(f"{server.url}/predict", json={"inputs": [text(dice) for _ in range(100)]}, timeout=120)
            answers = asked.json()["predictions"]
            labels = [
                {"id": answer["id"], "label": answer["prediction"] if dice.random() < 0.6 else dice.choice(COLOURS)}
                for answer in answers[:80]
            ]
            assert httpx.post(f"{server.url}/feedback", json=labels, timeout=60).status_code == 200
        yield server


class Seen:
    """What the browser said and fetched."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.addresses: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.addresses.append(request.url))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """A context: a page of the dashboard, which in the end has fetched from its server only and complained of nothing.

    `refusals`: statuses of answers that the visit is about, which the browser's console tells as errors.
    """

    @contextmanager
    def opened(server: Served, query: str = "", refusals: tuple[int, ...] = (), **options: Any) -> Iterator[Page]:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
        page = context.new_page()
        page.set_default_timeout(20_000)
        seen = Seen(page)
        page.goto(f"{server.url}/dashboard{query}")
        yield page
        unexpected = [error for error in seen.errors if not any(f"status of {status} " in error for status in refusals)]
        assert unexpected == []
        assert all(address.startswith(f"{server.url}/") for address in seen.addresses)
        context.close()

    return opened


def figures_are_drawn(page: Page) -> None:
    for figure in ("reliability", "information", "risk"):
        page.wait_for_selector(f"#{figure} svg.plot")


def axe_finds_nothing(page: Page) -> None:
    axe = pytest.importorskip("axe_playwright_python", reason="axe is missing; pip install 'scalabl[dev]'")
    source = next(Path(axe.__file__).parent.rglob("axe.min.js"))
    page.evaluate(source.read_text(encoding="utf-8"))
    report = page.evaluate(AXE)
    assert report["violations"] == [], json.dumps(
        [
            (violation["id"], violation["help"], [node["html"] for node in violation["nodes"]])
            for violation in report["violations"]
        ],
        indent=1,
    )
    assert len(report["passes"]) > 10


def labels_in(page: Page) -> tuple[int, int]:
    """(right, labels) of the reliability diagram's bins."""
    bins = page.query_selector_all("#reliability .bin")
    counted = [(int(bar.get_attribute("data-right") or 0), int(bar.get_attribute("data-of") or 0)) for bar in bins]
    return sum(right for right, _ in counted), sum(of for _, of in counted)


def ask(page: Page, question: str) -> None:
    page.fill("#text", question)
    page.press("#text", "Control+Enter")
    page.wait_for_selector("#answer .verdict")


def test_a_question_is_answered_with_its_uncertainty(visit: Visit, server: Served) -> None:
    body = {"inputs": "a rose", "num_samples": SAMPLES}
    (answer,) = httpx.post(f"{server.url}/predict", json=body, timeout=60).json()["predictions"]
    with visit(server) as page:
        page.wait_for_selector("#ask:enabled")
        ask(page, "a rose")
        assert page.inner_text(".verdict .choice") == answer["prediction"]
        assert page.inner_text(".verdict .sure").startswith(f"{100 * answer['confidence']:.1f}%")
        ranked = sorted(answer["probabilities"], key=answer["probabilities"].__getitem__, reverse=True)
        rows = page.query_selector_all(".distribution li")
        assert [row.query_selector(".name").inner_text() for row in rows] == ranked  # type: ignore[union-attr]  # each row has one
        for row, name in zip(rows, ranked, strict=True):
            value = row.query_selector(".value")
            assert value is not None
            error = 100 * answer["standard_error"]["probabilities"][name]
            assert value.inner_text() == f"{100 * answer['probabilities'][name]:.1f}% ± {error:.1f}"
            assert len(row.query_selector_all("circle.dot")) == SAMPLES
        assert page.locator(".set .chip").all_inner_texts() == answer["prediction_set"]["labels"]
        assert page.locator(".badge").count() == int(answer["abstain"])
        parts = [float(part) for part in page.locator(".parts strong").all_inner_texts()]
        wanted = [answer[name] for name in ("expected_entropy", "mutual_information", "entropy")]
        assert parts == pytest.approx(wanted, rel=0.01)
        assert "calibration set" in page.inner_text(".doubt")
        assert page.inner_text("#announce").startswith(("The adapter abstains", answer["prediction"]))


def test_feedback_from_the_page_moves_the_diagram(visit: Visit, server: Served) -> None:
    with visit(server) as page:
        figures_are_drawn(page)
        ask(page, "a tulip")
        right, of = labels_in(page)
        prediction = page.inner_text(".verdict .choice")
        page.select_option("#answer select", label=prediction)
        page.click("#answer .label button")
        wait_until(lambda: labels_in(page) == (right + 1, of + 1))
        assert page.inner_text("#answer .told") == "The label was stored."
        page.select_option("#answer select", label=next(name for name in COLOURS if name != prediction))
        page.click("#answer .label button")
        wait_until(lambda: labels_in(page) == (right, of + 1))
        assert page.inner_text("#answer .told").startswith("Corrected")
        page.select_option("#answer select", label="None of these")
        page.click("#answer .label button")
        numbers = page.locator("#numbers div", has_text="None of the choices")
        numbers.wait_for()
        assert "answered" in numbers.inner_text()
        assert labels_in(page) == (right, of + 1)


def test_an_abstention_is_labelled_in_the_list(visit: Visit, server: Served) -> None:
    with visit(server) as page:
        figures_are_drawn(page)
        assert page.inner_text("#doubts-title") == "Recent abstentions"
        first = page.locator("#doubtful li").first
        name = first.get_attribute("data-id")
        first.get_by_role("button").click()
        row = page.locator(f'#doubtful li[data-id="{name}"]')
        row.locator("select").select_option(label="blue")
        row.locator("button[type=submit]").click()
        row.locator(".act p", has_text="blue").wait_for()
        assert httpx.get(f"{server.url}/predictions/{name}").json()["label"] == "blue"
        row.get_by_role("button").click()
        row.locator("select").select_option(label="None of these")
        row.locator("button[type=submit]").click()
        row.locator(".act p", has_text="None of these").wait_for()
        found = httpx.get(f"{server.url}/predictions/{name}").json()
        assert (found["labelled"], found["label"]) == (True, None)
        at = "document.activeElement.tagName + document.activeElement.closest('li')?.dataset.id"
        wait_until(lambda: page.evaluate(at) == f"BUTTON{name}")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit: Visit, models: Path, tmp_path: Path) -> None:
    with start(models, "keys", api_keys=f"ann:{KEY}") as server, visit(server, refusals=(401,)) as page:
        page.wait_for_selector("#key[open]")
        axe_finds_nothing(page)
        page.screenshot(path=tmp_path / "key.png")
        page.keyboard.press("Escape")
        page.locator("#notice", has_text="needs an API key").wait_for()
        page.click("#notice button")
        page.fill("#key-text", "wrong")
        page.keyboard.press("Enter")
        page.locator("#key-error", has_text="rejected this API key").wait_for()
        page.fill("#key-text", "schlüssel")
        page.keyboard.press("Enter")
        assert "printable ASCII" in page.inner_text("#key-error")
        page.fill("#key-text", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#stored:not([hidden])")
        assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [
            [KEY],
            [],
            "",
        ]
        ask(page, "a rose")
        page.reload()
        page.wait_for_selector("#stored:not([hidden])")
        assert not page.is_visible("#key")
        page.click("#forget")
        page.wait_for_selector("#key[open]")
        assert page.evaluate("sessionStorage.length") == 0


def test_texts_are_never_markup(visit: Visit, server: Served) -> None:
    evil = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "javascript:alert(3)"]
    with visit(server, "?adapter=letters") as page:
        page.wait_for_selector("#choices-field:not([hidden])")
        page.fill("#choices", "\n".join(evil))
        ask(page, "<b>which</b> <svg onload=alert(4)>")
        assert set(page.locator(".distribution .name").all_inner_texts()) == set(evil)
        page.wait_for_selector("#doubtful .input")
        assert "<b>which</b>" in page.inner_text("#doubtful")
        assert page.locator("#answer img, #answer script, #doubtful img, #doubtful b").count() == 0
        assert page.inner_text("#doubts-title") == "Most uncertain recent predictions"


def test_an_answer_that_is_refused_says_what_to_change(visit: Visit, server: Served) -> None:
    with visit(server, refusals=(422, 413)) as page:
        page.wait_for_selector("#ask:enabled")
        page.fill("#text", "x" * 100_000)
        page.press("#text", "Control+Enter")
        page.wait_for_selector("#answer .bad")
        assert "exceed the limit" in page.inner_text("#answer")
        page.click("summary >> text=Options")
        page.fill("#samples", "4")
        page.select_option("#coverage", "0.9")
        page.fill("#text", "a rose")
        page.click("#ask")
        page.locator("#answer", has_text="calibrated with").wait_for()
        page.select_option("#coverage", "")
        page.click("#ask")
        page.wait_for_selector("#answer .warning")
        page.select_option("#method", "linearized")
        page.click("#ask")
        page.locator("#answer", has_text="linearised").wait_for()
        page.select_option("#method", "control_variate")
        page.click("#ask")
        page.locator("#answer", has_text="corrected by the linearisation").wait_for()


def test_a_server_that_stores_nothing_answers_all_the_same(visit: Visit, models: Path, tmp_path: Path) -> None:
    with start(models, "off", outcomes_url="none") as server, visit(server) as page:
        page.locator("#state", has_text="stores no predictions").wait_for()
        ask(page, "a rose")
        assert "cannot be labelled" in page.inner_text("#answer")
        assert not page.is_visible("#stored")
        axe_finds_nothing(page)
        page.screenshot(path=tmp_path / "off.png", full_page=True)


def test_a_thousand_choices_are_shown_as_a_few_and_any_can_be_the_label(visit: Visit, models: Path) -> None:
    names = tuple(f"intent {n}" for n in range(1000))
    task = Task(kind="classification", template="{input}", choices=names, choice_prefix="", head="own")
    tiny.write_adapter(models / "many", task=task)
    with start(models, "many", adapter=models / "many") as server, visit(server) as page:
        page.wait_for_selector("#ask:enabled")
        ask(page, "a rose")
        assert page.locator(".distribution li").count() == 8
        assert page.inner_text(".distribution .others .name") == "993 others"
        shown = [float(value.split("%")[0]) for value in page.locator(".distribution .value").all_inner_texts()]
        assert sum(shown) == pytest.approx(100, abs=0.5)
        assert page.locator("#answer select option").count() == 1001
        page.select_option("#answer select", label="intent 999")
        page.click("#answer .label button")
        page.locator("#answer .told", has_text="The label was stored.").wait_for()
        axe_finds_nothing(page)


def test_a_fresh_server_has_empty_figures_and_a_lost_database_is_told(visit: Visit, models: Path, tmp_path: Path) -> None:
    with start(models, "fresh") as server, visit(server, refusals=(503,)) as page:
        wait_until(lambda: page.locator("figure .empty").count() == 3)
        axe_finds_nothing(page)
        page.screenshot(path=tmp_path / "empty.png", full_page=True)
        data = models / "data-fresh"
        data.rename(tmp_path / "away")
        page.click("#refresh")
        page.wait_for_selector("#state .bad")
        assert "outcomes database" in page.inner_text("#state")
        axe_finds_nothing(page)
        (tmp_path / "away").rename(data)
        page.click("#state button")
        page.wait_for_selector("#stored:not([hidden])")


def test_a_server_that_starts_is_waited_for(visit: Visit, server: Served) -> None:
    starting = {"type": "urn:scalabl:problem:starting", "title": "", "status": 503, "detail": "wait"}
    with visit(server, refusals=(503,)) as page:
        page.wait_for_selector("#stored:not([hidden])")
        requests = []

        def refuse(route: Any) -> None:
            requests.append(route.request.url)
            if len(requests) > 1:
                route.continue_()
            else:
                route.fulfill(status=503, content_type="application/problem+json", body=json.dumps(starting))

        page.route(re.compile("/info$"), refuse)
        page.reload()
        page.locator("#notice", has_text="loading its model").wait_for()
        page.wait_for_selector("#stored:not([hidden])")
        assert not page.is_visible("#notice")


def test_everything_can_be_reached_and_done_with_the_keyboard(visit: Visit, server: Served) -> None:
    with visit(server) as page:
        figures_are_drawn(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.type("a rose")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#answer .verdict")
        reached = set()
        for _ in range(80):
            page.keyboard.press("Tab")
            name, ring = page.evaluate(REACHED)
            reached.add(name)
            assert ring, name
        assert {"ask", "refresh", "span", "score", "SUMMARY", "BUTTON", "A"} <= reached
        assert any(name.startswith("label-") for name in reached)
        page.focus("#reliability input:checked")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.value") == "all"
        figures_are_drawn(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_reads_in_every_size_and_both_schemes(
    visit: Visit, server: Served, size: str, scheme: str, tmp_path: Path
) -> None:
    width, height = SIZES[size]
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with visit(server, **options) as page:
        figures_are_drawn(page)
        ask(page, "a rose")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
        assert (brightness > 600) is (scheme == "light")
        page.screenshot(path=tmp_path / f"{size}-{scheme}.png", full_page=True)
        summaries = page.locator("summary")
        for number in range(summaries.count()):
            summaries.nth(number).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        axe_finds_nothing(page)
