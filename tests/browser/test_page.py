"""The page at ``/`` in a real browser, over the API with a real run behind it."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Response, expect, sync_playwright
from run_folders import make_run
from served import LONG, api, until
from test_videos import make_video_run

MS = 60_000  # within which anything the page is waited for must happen
TEACHER_STEPS = 12
EXPERTS = ["expert-1", "expert-1", "expert-2", "expert-2"]
KEY = "let-me-in"
CANVAS = """img => {
    const canvas = document.createElement("canvas");
    canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(img, 0, 0);
    return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@dataclass(frozen=True)
class Served:
    """A server in this process."""

    url: str

    def pictures(self, **body: object) -> list[np.ndarray]:
        """Return what the API answers without a stream: RGBA pixels [height, width, 4] of each picture."""
        answer = httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=30)
        return [
            np.asarray(Image.open(io.BytesIO(b64decode(one["b64_json"]))).convert("RGBA"))
            for one in answer.raise_for_status().json()["data"]
        ]


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run of two experts with two steps each."""
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "digits", prompts("digits")).folder


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    with api(run, teacher=True, teacher_steps=TEACHER_STEPS) as (url, _):
        yield Served(url)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser to show the page in: none of {', '.join(names)} is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, headless=True, args=flags)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page that is open, and all that it asked for and complained of."""

    page: Page
    asked: list[str]
    complaints: list[str]
    answers: list[Response]

    def make(self) -> None:
        """Press Make and wait for the end."""
        self.page.get_by_role("button", name="Make", exact=True).click()
        self.made()

    def made(self) -> None:
        """Wait until something is made."""
        expect(self.page.locator("#live")).to_contain_text("Made ")

    def pixels(self, maker: str = "student") -> list[np.ndarray]:
        """Return the large pictures' RGBA pixels [height, width, 4], as the browser has decoded them."""
        images = self.page.locator(f"[data-maker={maker}] .pictures img").all()
        flat = [image.evaluate(CANVAS) for image in images]
        return [np.array(values[2:], dtype=np.uint8).reshape(values[0], values[1], 4) for values in flat]

    def foreign(self, served: Served) -> list[str]:
        """Return what was asked for elsewhere."""
        asked = [urlsplit(url) for url in self.asked]
        own = urlsplit(served.url).netloc
        return [url.geturl() for url in asked if url.scheme not in ("data", "blob") and url.netloc != own]

    def too_wide(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Return a function that opens a page in a context of its own: of a width, with or without motion."""
    contexts = []

    def go(url: str, width: int = 1280, motion: bool = False) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, reduced_motion="no-preference" if motion else "reduce"
        )
        contexts.append(context)
        context.set_default_timeout(MS)
        page = context.new_page()
        one = Visit(page, [], [], [])
        page.on("request", lambda request: one.asked.append(request.url))
        page.on("response", lambda answer: one.answers.append(answer))
        page.on("pageerror", lambda error: one.complaints.append(str(error)))
        page.on("console", lambda said: one.complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(url)
        return one

    expect.set_options(timeout=MS)
    yield go
    for context in contexts:
        context.close()


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_shows_each_step_its_expert_and_the_pictures_that_the_api_answers(visit, served: Served) -> None:
    one = visit(served.url)
    page = one.page
    page.get_by_role("radio", name="7").check(force=True)
    page.get_by_label("Pictures", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).fill("41")
    one.make()
    steps = page.locator("[data-maker=student] .steps li")
    assert [step.get_attribute("data-made-by") for step in steps.all()] == EXPERTS
    assert steps.get_by_role("button").nth(2).get_attribute("aria-label").startswith("Step 3 of 4 by expert 2, noise")
    assert [span.inner_text().split("\n")[0] for span in page.locator(".makers span").all()] == ["expert 1", "expert 2"]
    assert page.locator(".axis i.done").count() == len(EXPERTS)
    stages = [part.get_attribute("data-stage") for part in page.locator(".bar i").all()]
    assert stages[:5] == ["queue", "encode", "expert-1", "expert-2", "decode"]
    truth = served.pictures(prompt="7", seed=41, n=3)
    assert same(one.pixels(), truth)
    assert not same(one.pixels(), served.pictures(prompt="7", seed=42, n=3))
    with page.expect_download() as download:
        page.get_by_role("link", name="Save").nth(1).click()
    assert shown_size(page.locator(".pictures img").nth(1)) == saved_as(download.value.path().read_bytes(), truth[1])
    about = Image.open(download.value.path()).text  # type: ignore[attr-defined]
    assert about == {"prompt": "7", "seed": "41", "sample": "1", "model": "tiny"}

    steps.get_by_role("button").first.click()  # shows what the first step promised, and the last the end again
    assert not same(one.pixels(), truth)
    steps.get_by_role("button").last.click()
    assert same(one.pixels(), truth)

    page.get_by_role("radio", name="2").check(force=True)
    page.get_by_role("button", name="Random").click()
    one.make()
    assert page.get_by_label("Seed", exact=True).input_value() == ""
    page.get_by_role("button", name="Show again: 7, seed 41").click()
    assert same(one.pixels(), truth)
    assert page.get_by_role("radio", name="7").is_checked()
    assert page.get_by_label("Seed", exact=True).input_value() == "41"

    assert one.complaints == []
    assert one.foreign(served) == []
    assert {urlsplit(url).path for url in one.asked} >= {"/", "/v1/models", "/v1/images/generations"}
    with page.expect_console_message(lambda said: "Content Security Policy" in said.text):
        page.evaluate("fetch('http://127.0.0.1:1/').catch(() => {})")  # forbidden, and it would have been seen
    assert one.complaints != []


def test_the_keyboard_alone(visit, served: Served) -> None:
    one = visit(f"{served.url}")
    page = one.page
    expect(page.locator("#form")).to_be_visible()
    page.keyboard.press("8")
    assert page.get_by_role("radio", name="8").is_checked()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.locator("#picker :checked").input_value() == "4"
    focused = page.locator("#picker label:has(:focus-visible)")
    assert focused.evaluate("label => getComputedStyle(label).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("2")  # in a text field, a digit is text
    assert page.locator("#picker :checked").input_value() == "4"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    one.made()
    assert same(one.pixels(), served.pictures(prompt="4", seed=5, n=2))
    assert one.complaints == []


def test_a_link_makes_the_same_again_and_the_teacher_beside_it(visit, served: Served) -> None:
    one = visit(f"{served.url}/#prompt=3&seed=9&n=2&teacher=1", motion=True)
    one.made()
    page = one.page
    assert same(one.pixels(), served.pictures(prompt="3", seed=9, n=2))
    teacher = served.pictures(prompt="3", seed=9, n=2, model="tiny-teacher")
    assert same(one.pixels("teacher"), teacher)
    assert not same(one.pixels(), teacher)
    steps = page.locator("[data-maker=teacher] .steps li[data-made-by=teacher] button:enabled")
    assert steps.count() == TEACHER_STEPS
    expect(page.locator("#verdict")).to_contain_text(f"{TEACHER_STEPS} steps in")
    expect(page.locator("#verdict")).to_contain_text("medians of")
    assert page.evaluate("shown.map((view) => view.runs.length)")[0] > 1
    ratio, networks = float(page.locator("#ratio").inner_text().rstrip("×")), "shown.map((view) => view.networks())"
    student, long = page.evaluate(networks)
    assert ratio == pytest.approx(long / student, rel=0.05, abs=0.051)  # it is shown with one digit after the point
    page.evaluate("shown[0].runs = [2, 900, 1]; shown[1].runs = [30, 20, 7000, 10]; compareTimes(shown)")
    assert page.locator("#ratio").inner_text() == "13×"  # 25 / 2: neither the first nor the mean
    page.evaluate("location.hash = '#prompt=6&seed=9'")  # as if another link was followed, and back
    expect(page.locator("#live")).to_contain_text("picture of 6, seed 9")
    assert same(one.pixels(), served.pictures(prompt="6", seed=9))
    page.go_back()
    expect(page.locator("#live")).to_contain_text("pictures of 3, seed 9")
    assert one.complaints == []


def test_what_the_server_refuses_is_said_at_its_field(visit, served: Served) -> None:
    one = visit(f"{served.url}/#prompt=3&seed=9&n=99")
    wrong = one.page.locator("#n-wrong")
    expect(wrong).to_contain_text("at most 16")  # the page knows the limit from the server
    assert not [answer for answer in one.answers if answer.status == 400]
    one.page.evaluate("model.raydmd.limits.n = 100")  # as if it had been lowered since
    one.page.get_by_role("button", name="Make", exact=True).click()
    expect(wrong).to_contain_text("pictures at once, not 99")
    assert [answer.status for answer in one.answers][-1] == 400
    field = one.page.get_by_label("Pictures", exact=True)
    expect(field).to_be_focused()
    assert field.get_attribute("aria-invalid") == "true"
    field.fill("1")
    one.make()
    expect(wrong).to_be_hidden()
    assert field.get_attribute("aria-invalid") is None
    assert one.page.get_by_label("Seed", exact=True).input_value() == "9"  # nothing was made of it before

    one.page.get_by_label("Seed", exact=True).fill("-1")
    one.page.keyboard.press("Enter")
    expect(one.page.locator("#seed-wrong")).to_be_visible()
    one.page.goto(f"{served.url}/#prompt=x")
    expect(one.page.locator("#prompt-wrong")).to_contain_text("'x'")

    one.page.get_by_role("radio", name="1").check(force=True)
    one.page.get_by_label("Seed", exact=True).fill("2")
    one.page.context.set_offline(True)
    one.page.get_by_role("button", name="Make", exact=True).click()
    expect(one.page.locator("#notice")).to_contain_text("cannot be reached")
    one.page.context.set_offline(False)
    one.page.get_by_role("button", name="Try again").click()
    one.made()
    assert same(one.pixels(), served.pictures(prompt="1", seed=2))


def test_an_empty_seed_is_random_and_said(visit, served: Served) -> None:
    one = visit(served.url)
    page, field = one.page, one.page.get_by_label("Seed", exact=True)
    seeds = []
    for _ in range(2):
        expect(field).to_have_value("")
        one.make()
        said = page.locator("[data-maker=student] .asked").inner_text()
        seeds.append(int(said.split("seed ")[1].split(" ")[0]))
    assert seeds[0] != seeds[1]
    first = page.locator("#picker :checked").input_value()
    assert same(one.pixels(), served.pictures(prompt=first, seed=seeds[1], n=4))
    page.get_by_role("button", name="use again").click()
    expect(field).to_have_value(str(seeds[1]))
    one.make()
    assert same(one.pixels(), served.pictures(prompt=first, seed=seeds[1], n=4))
    assert page.get_by_label("Pictures", exact=True).get_attribute("max") == "16"
    assert one.complaints == []


def shown_size(image: Locator) -> tuple[int, int]:
    box = image.bounding_box()
    assert box is not None and box["width"] > 8
    return round(box["width"]), round(box["height"])


def saved_as(file: bytes, truth: np.ndarray) -> tuple[int, int]:
    """Return the size of a saved file, which shows these pixels."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    small = image.resize((truth.shape[1], truth.shape[0]), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(small), truth)
    return image.size


def test_full_size_by_a_click_and_all_saved_at_once(visit, served: Served) -> None:
    one = visit(f"{served.url}/#prompt=7&seed=41&n=3")
    one.made()
    page, truth = one.page, served.pictures(prompt="7", seed=41, n=3)
    expect(page.locator("[data-maker=student] .asked")).to_contain_text("7 · seed 41 · 8 × 8")
    page.locator(".pictures button.frame").nth(1).click()
    viewer, large = page.get_by_role("dialog"), page.locator("#viewer-img")
    expect(page.locator("#viewer-text")).to_contain_text("picture 2 of 3 · 8 × 8")
    width, height = shown_size(large)
    assert width == height and width % 8 == 0 and width > shown_size(page.locator(".pictures img").first)[0]

    def pixels() -> np.ndarray:
        flat = large.evaluate(CANVAS)
        return np.array(flat[2:], dtype=np.uint8).reshape(flat[0], flat[1], 4)

    assert np.array_equal(pixels(), truth[1])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-text")).to_contain_text("picture 3 of 3")
    page.get_by_role("button", name="Next picture").click()
    expect(page.locator("#viewer-text")).to_contain_text("picture 1 of 3")
    assert np.array_equal(pixels(), truth[0])
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Save").click()
    assert saved_as(download.value.path().read_bytes(), truth[0]) == (width, height)
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save all").click()
    assert download.value.suggested_filename == "tiny-7-41.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"tiny-7-41-{number}.png" for number in (1, 2, 3)]
        for i, name in enumerate(archive.namelist()):
            assert saved_as(archive.read(name), truth[i]) == shown_size(page.locator(".pictures img").nth(i))
    assert one.complaints == [] and one.foreign(served) == []


def test_what_is_copied_makes_the_same_pictures(visit, served: Served, tmp_path: Path) -> None:
    one = visit(f"{served.url}/#prompt=7&seed=41&n=2")
    one.made()
    one.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = {}
    for name in ("curl", "Python"):
        one.page.get_by_role("button", name=f"Copy as {name}").click()
        expect(one.page.locator("#live")).to_have_text(f"Copied as {name}.")
        copied[name] = one.page.evaluate("navigator.clipboard.readText()")
    truth = served.pictures(prompt="7", seed=41, n=2)
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    subprocess.run([sys.executable, "-c", copied["Python"]], cwd=tmp_path, env=environment, check=True, timeout=MS)
    files = [(tmp_path / f"picture-{number}.png").read_bytes() for number in range(2)]
    assert [saved_as(file, pixels) for file, pixels in zip(files, truth, strict=True)] == [(8, 8)] * 2
    words = shlex.split(copied["curl"])
    assert words[:2] == ["curl", f"{served.url}/v1/images/generations"]
    assert same(served.pictures(**json.loads(words[words.index("-d") + 1])), truth)
    quoted = 'curlOf({...shown[0], id: shown[0].id, request: {prompt: `it\'s "7"`, n: 1, seed: 1, size: null}})'
    words = shlex.split(one.page.evaluate(quoted))
    assert json.loads(words[words.index("-d") + 1])["prompt"] == 'it\'s "7"'
    one.page.evaluate("sessionStorage.setItem(KEY, 'a-secret')")
    for maker in ("curlOf", "pythonOf"):
        text = one.page.evaluate(f"{maker}(shown[0])")
        assert "RAYDMD_API_KEY" in text and "a-secret" not in text


def test_the_description_is_shown_by_files_from_here(visit, run: Path) -> None:
    with api(run, KEY) as (url, _):
        one = visit(f"{url}/docs")
        one.page.get_by_label("This server asks for an API key.").fill(KEY)
        one.page.keyboard.press("Enter")
        health = one.page.locator("#operations-server-health")
        expect(one.page.locator("#operations-images-createImage")).to_be_visible()
        health.get_by_role("button").first.click()
        health.get_by_role("button", name="Try it out").click()
        health.get_by_role("button", name="Execute").click()
        expect(health.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
        assert one.foreign(Served(url)) == []
        unauthorized = "the server responded with a status of 401"  # the first look, without a key
        assert [words for words in one.complaints if unauthorized not in words] == []


def test_a_busy_server_is_asked_again_until_stopped(visit, run: Path) -> None:
    with api(run, teacher=True, teacher_steps=10_000, queue_samples=16) as (url, backend):
        page = visit(url).page
        page.get_by_label("Compare with the teacher").check()  # whose queue alone is full
        page.get_by_label("Seed", exact=True).fill("7")
        body = {"prompt": "1", "n": 16, "model": "tiny-teacher", "stream": True, "step_previews": True}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=30) as answer:
            events = answer.iter_bytes()  # it is kept: the answer ends with it
            assert b"image_generation.step" in next(events)
            assert backend.queued() == 16
            page.get_by_role("button", name="Make", exact=True).click()
            expect(page.locator("#notice")).to_contain_text("busy, trying again in")
            page.get_by_role("button", name="Cancel").click()
            expect(page.locator("#live")).to_have_text("Stopped.")
            expect(page.locator("#notice")).to_be_hidden()
            page.keyboard.press("Enter")
            expect(page.locator("#notice")).to_be_visible()
        # there is room now, and nobody pressed anything
        expect(page.locator("[data-maker=teacher] .steps button:enabled").first).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#live")).to_have_text("Stopped.")
        page.wait_for_function("() => running === null")
        page.get_by_label("Compare with the teacher").uncheck()
        page.get_by_role("button", name="Make", exact=True).click()
        expect(page.locator("#live")).to_contain_text("Made ")


def test_a_key_is_asked_for_where_the_server_wants_one(visit, run: Path) -> None:
    with api(run, KEY) as (url, _):
        one = visit(f"{url}/#prompt=5&seed=1")
        field = one.page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(one.page.get_by_label("Seed", exact=True)).to_be_hidden()
        field.fill("wrong")
        field.press("Enter")
        expect(one.page.locator("#key-wrong")).to_contain_text("does not know")
        field.fill(KEY)
        field.press("Enter")
        one.made()
        expect(field).to_be_hidden()
        assert KEY not in one.page.url
        assert one.page.evaluate("Object.keys(localStorage).length") == 0
        one.page.reload()
        one.made()  # with the key that the tab keeps


@pytest.mark.parametrize("teacher", ["", "&teacher=1"])
def test_a_narrow_phone_needs_no_scrolling_aside(visit, served: Served, teacher: str) -> None:
    one = visit(f"{served.url}/#prompt=0&seed=1&n=16{teacher}", width=360)
    one.made()
    assert one.too_wide() <= 0
    images = one.page.locator("[data-maker=student] .pictures img")
    assert images.count() == 16
    assert images.first.evaluate("img => getComputedStyle(img).imageRendering") == "pixelated"
    one.page.evaluate("document.querySelector('footer').style.width = '400px'")
    assert one.too_wide() > 0


def video_of(url: str, **asked: object) -> bytes:
    """Ask for a video as other clients do, and leave nothing behind."""
    job = f"{url}/v1/videos/{httpx.post(f'{url}/v1/videos', json=asked).json()['id']}"
    until(lambda: httpx.get(job).json()["status"] == "completed", "the video is made")
    content = httpx.get(f"{job}/content").content
    assert httpx.delete(job).is_success
    return content


def test_a_video_and_one_that_is_stopped(visit, tmp_path: Path) -> None:
    with api(make_video_run(tmp_path), teacher=True, teacher_steps=LONG) as (url, _):
        one = visit(url)
        page = one.page
        page.get_by_label("Prompt").fill("0")
        page.get_by_label("Seed", exact=True).fill("4")
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#live")).to_contain_text("Made 1 video of 0, seed 4")
        page.wait_for_function("() => document.querySelector('.pictures video').readyState >= 2")
        with page.expect_download() as download:
            page.get_by_role("link", name="Save").click()
        assert download.value.path().read_bytes() == video_of(url, prompt="0", seed=4)
        nobodys_jobs = lambda: httpx.get(f"{url}/v1/videos").json()["data"] == []  # noqa: E731
        until(nobodys_jobs, "the page has let the server forget the video")
        page.get_by_label("Compare with the teacher").check()
        page.get_by_role("button", name="Make", exact=True).click()
        expect(page.locator("[data-maker=teacher] progress")).to_be_visible()
        page.keyboard.press("Escape")
        until(nobodys_jobs, "nothing is made for nobody")
        assert one.complaints == []


def test_events_are_whole_however_they_are_cut(visit, tmp_path: Path) -> None:
    cut = """async ([text, size]) => {
      const bytes = new TextEncoder().encode(text), found = [];
      const stream = new ReadableStream({ start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      } });
      for await (const event of events(new Response(stream))) found.push(event);
      return found;
    }"""
    lines = ["event: a", 'data: {"n": 1}', "", "event: a", 'data: {"n":', 'data: "é"}', "", 'data: {"n": 3}', "", ""]
    with api(make_video_run(tmp_path)) as (url, _):
        page = visit(url).page
        for end in ("\n", "\r\n"):
            text = end.join([*lines, "data: [DONE]", "", 'data: {"n": "not whole"}'])
            for size in (1, 2, 3, 7, 1000):
                assert page.evaluate(cut, [text, size]) == [{"n": 1}, {"n": "é"}, {"n": 3}], (end, size)
