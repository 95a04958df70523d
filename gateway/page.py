"""The web page at `/` of the gateway, in Gradio.

Needs the packages of `requirements/page.txt`. Pictures reach the browser as the files that the
server sent, with the metadata in them.
"""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Match, Mount
from starlette.types import Scope

from gateway import page_form as form
from gateway import page_html as html
from gateway.errors import ApiError
from gateway.keys import Key, KeyRing
from gateway.page_layout import SCRIPT, Layout, lay_out, theme, updates
from gateway.page_tabs import Tab, View, sentence, words
from gateway.painting import Studio
from gateway.pool import work_of
from twinbrush_client import InvalidRequest, TwinbrushError
from twinbrush_client.story import fields_of, read_story

MOST_UPLOADED = "64mb"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Between two looks of Gradio's queue at what waits, and at progress bars of its own, which the page
# does not use. By default it looks 1,000 and 100 times a second, some percent of a core.
QUEUE_SECONDS, PROGRESS_SECONDS = 0.05, 1.0
GONE = "This picture is no longer kept here; a downloaded file of it still has its settings."
LOGIN = "The name of an API key, and the key as the password."


def mount(app: FastAPI, studio: Studio, keys: KeyRing) -> None:
    """Serves the page at `/` of an app, after all its own routes.

    Args:
        app: whose routes come first; it serves the studio's files.
        studio: who paints and keeps pictures.
        keys: who may use the page, and how much; without keys, everybody.
    """

    def may_enter(name: str, secret: str) -> bool:
        key = keys.find(f"Bearer {secret}")
        return key is not None and key.name == name

    gr.mount_gradio_app(
        app, build(studio, keys), "/", footer_links=["settings"], run_history=False,
        auth=may_enter if keys.required else None, auth_message=LOGIN, max_file_size=MOST_UPLOADED,
        ssr_mode=False, mcp_server=False, theme=theme(), head=SCRIPT,
        css_paths=Path(__file__).with_name("page.css"),
    )  # fmt: skip
    mounted = app.router.routes.pop()
    assert isinstance(mounted, Mount)
    app.router.routes.append(_BehindTheDoors("", app=mounted.app))


class _BehindTheDoors(Mount):
    """The page's own paths; what it does not know either is an error in the doors' form."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if all(route.matches(scope)[0] is Match.NONE for route in self.routes):
            return Match.NONE, {}
        return super().matches(scope)


def build(studio: Studio, keys: KeyRing) -> gr.Blocks:
    """The page; see `mount`."""
    with gr.Blocks(title="Twinbrush", analytics_enabled=False, delete_cache=(600, 600)) as page:
        layout = lay_out()
        _connect(page, layout, Handlers(studio, keys, layout))
    page._queue.sleep_when_free = QUEUE_SECONDS
    page._queue.progress_update_sleep_when_free = PROGRESS_SECONDS
    return page


class Handlers:
    """What the page does at each event; a tab is known by Gradio's hash of its session."""

    def __init__(self, studio: Studio, keys: KeyRing, layout: Layout):
        self._studio, self._keys, self._layout = studio, keys, layout
        self._names = list(layout.controls)
        self._tabs: dict[str, Tab] = {}

    async def load(self) -> dict[Any, Any]:
        """Sets the controls to the server's defaults and choices."""
        layout = self._layout
        try:
            info = await self._studio.pool.info()
        except TwinbrushError as error:
            return {layout.server: html.unreachable(sentence(str(error)))}
        found: dict[Any, Any] = {
            layout.controls[name]: gr.update(**properties)
            for name, properties in updates(info).items()
        }
        samples = [[text] for text in form.examples(info)]
        return found | {
            layout.server: html.served(info),
            layout.examples: gr.Dataset(samples=samples),
        }

    async def paint(
        self, request: gr.Request, keep: bool, others: dict[str, Any], *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        """The states of the page while it paints."""
        layout, tab = self._layout, self._tab(request)
        given = dict(zip(self._names, values, strict=True))
        if not keep or not given["seed"]:
            given["seed"] = form.new_seed()
        try:
            info = await self._studio.pool.info()
            fields = form.request_fields(given, others, info)
            yield {layout.controls["seed"]: given["seed"]}
            key = self._key(request)
            with self._studio.meter.admit(key, work_of(fields, info)):
                painting = tab.paint(given["prompt"], fields, info.defaults, key.client)
                async with aclosing(painting) as views:
                    async for view in views:
                        yield self._state(tab, view)
        except (TwinbrushError, ApiError) as error:
            yield {layout.status: html.status(sentence(words(error)), "error")}

    async def cancel(self, request: gr.Request) -> None:
        """Ends the request of a tab, also when the tab is closed."""
        self._tab(request).cancel()

    async def leave(self, request: gr.Request) -> None:
        """Forgets a tab that was closed."""
        if tab := self._tabs.pop(str(request.session_hash), None):
            tab.cancel()

    def forget_others(self) -> tuple[dict[str, Any], str]:
        """Drops the settings of a picture that have no control."""
        return {}, html.others({})

    def roll(self) -> tuple[str, bool]:
        """A new seed, to keep."""
        return form.new_seed(), True

    async def restore_card(self, event: gr.EventData) -> dict[Any, Any]:
        """The settings of a picture on the page."""
        url = urlsplit(str(event.picture))
        query = dict(parse_qsl(url.query))
        name, expires = url.path.rpartition("/")[2], query.get("expires", "")
        signature = query.get("signature", "")
        sound = expires.isdecimal() and len(expires) < len(str(2**63))
        file = self._studio.files.find(name, int(expires), signature) if sound else None
        if file is None:
            return {self._layout.status: html.status(GONE, "error")}
        return await self._restored(io.BytesIO(file.data))

    async def restore_file(self, path: str | None) -> dict[Any, Any]:
        """The settings of a picture that was dropped on the page; its copy is deleted."""
        if path is None:
            return {self._layout.status: gr.skip()}
        try:
            return await self._restored(Path(path))
        finally:
            Path(path).unlink(missing_ok=True)

    async def _restored(self, file: Path | IO[bytes]) -> dict[Any, Any]:
        layout = self._layout
        try:
            fields = fields_of(read_story(file))
            info = await self._studio.pool.info()
        except (TwinbrushError, OSError) as error:
            return {
                layout.status: html.status(_without_path(error), "error"),
                layout.file: None,
            }
        others = form.without_control(fields)
        values = form.control_values(fields, info)
        told = html.status("The settings of the picture are in the form; Paint repeats it.")
        found = {layout.controls[name]: values[name] for name in self._names}
        if values["lora"]:
            found[layout.controls["lora"]] = gr.update(value=values["lora"], visible=True)
        return found | {
            layout.keep: True,
            layout.others: others,
            layout.restored: html.others(others),
            layout.status: told,
            layout.file: None,
        }

    def _key(self, request: gr.Request) -> Key:
        """Of whoever has logged in; Gradio lets nobody else in."""
        return self._keys.named(request.username)

    def _tab(self, request: gr.Request) -> Tab:
        name = str(request.session_hash)
        if name not in self._tabs:
            self._tabs[name] = Tab(self._studio)
        return self._tabs[name]

    def _state(self, tab: Tab, view: View) -> dict[Any, Any]:
        layout = self._layout
        return {
            layout.status: html.status(view.text, view.kind),
            layout.gallery: html.gallery(tab.cards, tab.earlier, view.live),
            layout.cancel: gr.update(interactive=view.live),
            layout.paint: gr.update(interactive=not view.live),
        }


def _connect(page: gr.Blocks, layout: Layout, do: Handlers) -> None:
    controls = list(layout.controls.values())
    seed = layout.controls["seed"]
    starts = [layout.paint.click, layout.controls["prompt"].submit]
    shown = [layout.status, layout.gallery, layout.paint, layout.cancel, seed]
    restored = [*controls, layout.keep, layout.others, layout.restored, layout.status, layout.file]
    gr.on(
        starts, do.paint, [layout.keep, layout.others, *controls], shown, trigger_mode="once",
        concurrency_limit=None, **QUIET,
    )  # fmt: skip
    layout.cancel.click(do.cancel, queue=False, **QUIET)
    layout.dice.click(do.roll, None, [seed, layout.keep], queue=False, **QUIET)
    layout.examples.click(
        lambda sample: sample[0], layout.examples, layout.controls["prompt"], queue=False, **QUIET
    )
    layout.gallery.click(do.restore_card, None, restored, concurrency_limit=None, **QUIET)
    layout.restored.click(
        do.forget_others, None, [layout.others, layout.restored], queue=False, **QUIET
    )
    layout.file.upload(do.restore_file, layout.file, restored, concurrency_limit=None, **QUIET)
    offered = [layout.server, layout.examples, *controls]
    page.load(do.load, None, offered, concurrency_limit=None, **QUIET)
    page.unload(do.leave)


def _without_path(error: Exception) -> str:
    """An error of a file that the user knows by another name than the server does."""
    if isinstance(error, InvalidRequest):
        return sentence(re.sub(r"^file=.* is invalid: ", "The file ", str(error)))
    return "The file cannot be read."
