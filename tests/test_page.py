"""The page in a real browser, in front of the real server; and what it makes of forms."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from browsers import ANOTHER_NAME
from gateways import Gateway
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, BrowserContext, Page, expect
from starlette.testclient import TestClient

from gateway import page_form as form
from gateway import page_html as html
from gateway.app import Settings, create_app
from gateway.files import Files
from gateway.gate import Gate
from gateway.keys import Key, KeyRing, Limits, digest
from gateway.limits import Meter
from gateway.page import QUEUE_SECONDS, Handlers
from gateway.page_layout import lay_out, updates
from gateway.page_tabs import Tab
from gateway.pool import Pool
from twinbrush_client import Client, InvalidRequest, Picture, QueueFull, ServerInfo
from twinbrush_client.story import read_story

PROMPT = "a large red circle left of a small blue square"
SECONDS = 30.0
SDXL = {"original_size": [64, 64]}
# The most previews that one image had, and the most progress bars, noted while a page paints.
NOTE = """() => {
  const seen = {}, options = {subtree: true, childList: true, attributes: true};
  window.noted = {previews: 0, bars: 0};
  new MutationObserver(() => {
    const bars = document.querySelectorAll('#tb-now progress');
    noted.bars = Math.max(noted.bars, bars.length);
    for (const image of document.querySelectorAll('#tb-now .tb-painting img')) {
      const sources = (seen[image.alt] ??= new Set()).add(image.src);
      noted.previews = Math.max(noted.previews, sources.size);
    }
  }).observe(document.getElementById('tb-result'), options);
}"""
SEED = "#tb-seed textarea, #tb-seed input"


@pytest.fixture(scope="module")
def gateway(server, start_gateway) -> Gateway:
    """A gateway with the page."""
    return start_gateway(server.address, page=True)


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    yield context
    context.close()


@pytest.fixture
def tab(context: BrowserContext, gateway) -> Iterator[Callable[[], Page]]:
    """Opens pages, and holds them to their own host, and all to no errors."""
    opened: list[Page] = []
    faults: list[str] = []

    def requested(url: str) -> None:
        if not url.startswith((gateway.url, "data:", "blob:")):
            faults.append(url)

    def open_page() -> Page:
        page = context.new_page()
        opened.append(page)
        page.on("request", lambda request: requested(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(gateway.url)
        expect(page.locator("#tb-server b")).to_be_visible()
        return page

    yield open_page
    for page in opened:
        page.close()
    assert not faults
    assert "Traceback" not in gateway.text()


def fill(page: Page, images: int = 1, steps: int = 4, size: str | None = None) -> None:
    page.fill("#tb-prompt textarea", PROMPT)
    for name, value in (("num_images", images), ("steps", steps)):
        page.fill(f"#tb-{name} input[type=number]", str(value))
        page.press(f"#tb-{name} input[type=number]", "Tab")
    if size is not None:
        page.fill("#tb-size input", size)
        page.press("#tb-size input", "Enter")


def downloads(page: Page):
    return page.locator("#tb-now a[download]")


def says(page: Page, words: str) -> None:
    expect(page.locator("#tb-status")).to_contain_text(words)


def ended(server, code: str) -> float:
    """Streams that ended so."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("twinbrush_requests_ended_total")
             and f'"{code}"' in line and '"text_to_image_stream"' in line]  # fmt: skip
    return sum(float(line.rpartition(" ")[2]) for line in found)


def rises(server, code: str, before: float) -> None:
    until = time.monotonic() + SECONDS
    while ended(server, code) <= before:
        assert time.monotonic() < until, f"no request ended with {code}"
        time.sleep(0.05)


def test_it_paints_and_gives_the_servers_files(tab):
    page = tab()
    fill(page, images=2)
    page.keyboard.press("Control+Enter")
    expect(downloads(page)).to_have_count(2)
    says(page, "Finished 2 pictures.")
    with page.expect_download() as started:
        downloads(page).nth(1).click()
    story = read_story(started.value.path())
    assert story["prompt"] == PROMPT
    assert started.value.suggested_filename == f"twinbrush-{story['seed']}.png"
    assert str(story["seed"] - 1) == page.input_value(SEED)


def test_previews_change_and_cancel_stops_the_work_of_its_tab_alone(tab, server):
    first, second = tab(), tab()
    before = ended(server, "CANCELLED")
    for page, size in ((first, "128 × 128"), (second, "96 × 96")):  # which share the server fairly
        fill(page, images=16, steps=50, size=size)
        page.evaluate(NOTE)
        page.click("#tb-paint")
        page.wait_for_function("noted.bars == 16")
    second.keyboard.press("Escape")
    says(second, "Cancelled")
    rises(server, "CANCELLED", before)
    expect(first.locator("#tb-status")).to_contain_text(re.compile("Painting|Finished 16"))
    first.wait_for_function("noted.previews > 1")
    second.click("#tb-paint")
    says(second, "Painting")
    second.close(run_before_unload=True)
    rises(server, "CANCELLED", before + 1)


def test_a_seed_that_is_pasted_is_kept(tab):
    page = tab()
    page.click(SEED)
    page.keyboard.insert_text("42")
    expect(page.locator("#tb-keep input")).to_be_checked()
    fill(page)
    page.click("#tb-paint")
    says(page, "Finished 1 picture.")
    assert page.input_value(SEED) == "42"


def test_an_error_is_shown_in_the_servers_words(tab):
    page = tab()
    fill(page, size="50 × 50")
    page.click("#tb-paint")
    expect(page.get_by_role("alert")).to_contain_text("width=50 is invalid: must be a multiple of")
    fill(page, size="wide")
    page.click("#tb-paint")
    expect(page.get_by_role("alert")).to_contain_text("size='wide' is invalid")


def test_a_file_that_is_no_picture_is_named_without_a_path(tab, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"no picture")
    page = tab()
    page.click("#tb-from button")
    page.set_input_files("#tb-file input[type=file]", file)
    expect(page.get_by_role("alert")).to_contain_text("The file is no picture")
    expect(page.locator("#tb-file input[type=file]")).to_be_attached()  # for another file


def test_the_settings_of_a_picture_come_back(tab, server, tmp_path):
    with Client(server.address) as client:
        stream = client.stream(
            PROMPT, seed=2**62 + 1, steps=7, guidance_scale=4.5, sampler="dpmpp_2m", width=64,
            height=32, negative_prompt="a star", sigma_schedule="karras", image_format="png",
        )  # fmt: skip
        *_, picture = stream
    file = tmp_path / "kept.png"
    told = PngInfo()  # a setting of another checkpoint, for which the page has no control
    told.add_text("twinbrush", json.dumps(read_story(io.BytesIO(picture.data)) | SDXL))
    picture.image.save(file, pnginfo=told)
    page = tab()
    page.click("#tb-from button")
    page.set_input_files("#tb-file input[type=file]", file)
    says(page, "settings of the picture are in the form")
    assert page.input_value("#tb-prompt textarea") == PROMPT
    assert page.input_value("#tb-size input") == "64 × 32"
    assert page.input_value(SEED) == str(2**62 + 1)
    expect(page.locator("#tb-restored")).to_contain_text("original_size (64, 64)")
    page.click("#tb-paint")
    expect(page.get_by_role("alert")).to_contain_text("original_size=")
    page.click("#tb-restored button")
    expect(page.locator("#tb-restored p")).to_have_count(0)
    page.click("#tb-paint")
    expect(downloads(page)).to_have_count(1)
    with page.expect_download() as started:
        downloads(page).click()
    assert read_story(started.value.path()) == read_story(io.BytesIO(picture.data))
    page.fill("#tb-prompt textarea", "something else")
    page.click("#tb-now [data-use]")
    expect(page.locator("#tb-prompt textarea")).to_have_value(PROMPT)


@pytest.mark.parametrize("path", ["/v1/none", "/sdapi/v1/none", "/internal/none", "/models"])
def test_the_page_leaves_the_doors_their_paths(gateway, path):
    answer = gateway.call(path)
    assert answer.status == 404
    assert f"GET {path} is not served" in answer.data.decode()


def test_the_list_of_routes_asks_no_other_host(context, gateway):
    asked = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://{ANOTHER_NAME}:{gateway.port}/docs")
    expect(page.locator(".opblock-summary-path", has_text="generations")).to_be_visible()
    page.close()
    assert len(asked) > 2
    assert all(url.startswith((f"http://{ANOTHER_NAME}:", "data:")) for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(browser, gateway, scheme):
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True
    )
    page = context.new_page()
    page.goto(gateway.url)
    expect(page.locator("#tb-server b")).to_be_visible()
    page.locator("#tb-examples button").first.click()
    expect(page.locator("#tb-prompt textarea")).not_to_have_value("")
    page.click("#tb-paint")
    expect(downloads(page)).to_have_count(1)
    for opened in ("#tb-more button", "#tb-from button"):
        page.locator(opened).first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for control in ("#tb-prompt textarea", "#tb-steps input[type=range]"):
        page.press(control, "End")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid"  # where the keyboard is, one sees
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    context.close()


def test_with_keys_the_page_asks_for_one():
    key = Key("artist", digest("tb-a-long-secret"), Limits())
    settings = Settings(keys=KeyRing([key], Limits()))
    client = TestClient(create_app(Pool([], 5), settings, Gate()))
    assert client.get("/config").status_code == 401
    wrong = {"username": "artist", "password": "tb-another-secret"}
    assert client.post("/login", data=wrong).status_code == 400
    other = {"username": "somebody", "password": "tb-a-long-secret"}
    assert client.post("/login", data=other).status_code == 400
    right = {"username": "artist", "password": "tb-a-long-secret"}
    assert client.post("/login", data=right).status_code == 200
    assert client.get("/config").status_code == 200


def test_a_page_that_nobody_uses_does_not_look_at_its_queue_all_the_time(monkeypatch):
    looks, sleep = [], asyncio.sleep

    async def counted(seconds, *result):
        looks.append(seconds)
        return await sleep(seconds, *result)

    monkeypatch.setattr(asyncio, "sleep", counted)
    with TestClient(create_app(Pool([], 5), Settings(), Gate())) as client:
        client.get("/config")  # which starts the queue
        looks.clear()
        time.sleep(0.5)
        assert 5 < len(looks) < 60
        assert QUEUE_SECONDS in looks


def test_the_server_knows_whose_requests_the_page_sends(info):
    asked = {}

    def stream(prompt, **fields):
        asked.update(fields)
        raise QueueFull("RESOURCE_EXHAUSTED", "the queue is full")

    async def served():
        return info

    with gr.Blocks():
        layout = lay_out()
    pool: Any = SimpleNamespace(stream=stream, info=served)
    studio: Any = SimpleNamespace(pool=pool, meter=Meter())
    page = Handlers(studio, KeyRing([Key("artist", digest("x" * 16), Limits())], Limits()), layout)
    request: Any = SimpleNamespace(username="artist", session_hash="tab")
    values = form.defaults(info) | {"prompt": "a ring", "seed": "7"}

    async def paint():
        given = [values[name] for name in layout.controls]
        return [state async for state in page.paint(request, True, {}, *given)]

    with ThreadPoolExecutor() as thread:  # Playwright has a loop in this one
        *_, last = thread.submit(asyncio.run, paint()).result()
    assert asked["client"] == "artist"
    assert asked["preview_every"] == 1
    assert "Try again soon" in last[layout.status]


def test_a_picture_that_the_gateway_cannot_keep_is_an_error_in_words(info):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")

    class Job:
        def cancel(self):
            """It has ended."""

        async def __aiter__(self):
            yield Picture(0, 7, "", file.getvalue())

    pool: Any = SimpleNamespace(stream=lambda *_, **__: Job())
    studio: Any = SimpleNamespace(pool=pool, files=Files(0, 60))

    async def paint():
        fields = form.request_fields(form.defaults(info) | {"seed": "7"}, {}, info)
        return [view async for view in Tab(studio).paint("a ring", fields, info.defaults)]

    with ThreadPoolExecutor() as thread:  # Playwright has a loop in this one
        *_, last = thread.submit(asyncio.run, paint()).result()
    assert (last.kind, last.live) == ("error", False)
    assert "--files-mb is too small" in last.text


def test_loras_are_offered_where_there_are_any(info):
    assert not updates(info)["lora"]["visible"]
    control = updates(replace(info, loras=["ink", "film"]))["lora"]
    assert control["visible"]
    assert control["info"].startswith("ink, film; with a scale, ink:0.8")


@pytest.fixture(scope="module")
def info() -> ServerInfo:
    fields = [
        {"name": "steps", "minimum": 1, "maximum": 50},
        {"name": "prompt_syntax", "choices": ["plain", "a1111"]},
    ]
    defaults = dict.fromkeys(form.PLAIN) | {
        "width": 64, "height": 64, "steps": 4, "sampler": "lcm", "num_images": 1,
        "image_format": "png_base64",
    }  # fmt: skip
    sizes = {"native": 64, "multiple_of": 16, "largest": 96}
    return ServerInfo("1", "tiny", ["lcm", "ddim"], ["png", "raw"], defaults, sizes, fields)


def sides_of(size: str) -> tuple[int, int]:
    width, height = size.split(" × ")
    return int(width), int(height)


def test_offered_sizes_are_ones_that_the_server_takes(info):
    offered = form.sizes(info)
    assert offered[0] == "64 × 64"
    assert all(side % 16 == 0 and side <= 96 for size in offered for side in sides_of(size))
    assert len(set(offered)) == len(offered) > 3
    few = form.sizes(replace(info, sizes=info.sizes | {"max_pixels": 64 * 64}))
    assert all(width * height <= 64 * 64 for width, height in map(sides_of, few))


def test_a_forms_values_survive_the_way_through_a_picture(info):
    given = form.defaults(info) | {"prompt": "x", "size": "48x80", "seed": "7", "steps": 9}
    fields = form.request_fields(given, {"crop_top_left": (0, 8)}, info)
    assert fields["steps"] == 9
    assert not {"sampler", "prompt_syntax", "lora", "image_format"} & set(fields)  # as by default
    back = form.control_values(fields | {"prompt": "x"}, info)
    assert {name: back[name] for name in given} == given | {"size": "48 × 80"}
    assert form.without_control(fields | {"client": "x"}) == {"crop_top_left": (0, 8)}


@pytest.mark.parametrize(
    ("name", "value"), [("size", "64"), ("size", None), ("seed", "-1"), ("seed", "1.5")]
)
def test_what_a_form_cannot_send_is_named(info, name, value):
    given = form.defaults(info) | {"prompt": "x", "seed": "7", name: value}
    with pytest.raises(InvalidRequest, match=f"{name}="):
        form.request_fields(given, {}, info)


def test_words_of_users_are_no_markup():
    shown = html.Shown("u", "n", "<script>alert(1)</script>\"'", 1, 64, 64)
    made = html.gallery([html.Card(64, 64, picture=shown)], [shown], live=False)
    made += html.status("<b>", "error") + html.others({"<b>": "<b>"}) + html.unreachable("<b>")
    assert "<script" not in made
    assert "<b>" not in made
    assert "\"'" not in made
