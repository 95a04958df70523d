"""What a tab of the page shows and does: its request, its events, its pictures. No Gradio, no HTTP.

A tab has one request at a time; tabs know nothing of each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gateway.guard import FILES
from gateway.page_form import preview_every
from gateway.page_html import Card, Shown, data_url
from gateway.painting import Studio
from gateway.pool import Job
from twinbrush_client import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Picture,
    Preview,
    QueueFull,
    ServerUnavailable,
    TwinbrushError,
)
from twinbrush_client.errors import REQUEST_ID
from twinbrush_client.wire import Event

log = logging.getLogger(__name__)
REFRESH_SECONDS = 0.1  # at the least, between two states of a page
EARLIER = 48  # pictures that a tab shows besides those of its request
# What to do about an error, after the server's own words.
ADVICE: dict[type[TwinbrushError], str] = {
    InvalidRequest: "",
    QueueFull: "The server has as many requests as it takes. Try again soon.",
    ServerUnavailable: "Start the server or wait until it is ready, then paint again.",
    DeadlineExceeded: "The server was too busy to finish in time. Try again.",
}


@dataclass(frozen=True)
class View:
    """What a tab says. `kind` is `info`, `warning` or `error`; `live` while it paints."""

    text: str
    kind: str
    live: bool


class Tab:
    """One open page.

    Args:
        studio: who paints and keeps pictures.

    Attributes:
        cards: of the current request's images.
        earlier: pictures of earlier requests, the latest first.
    """

    def __init__(self, studio: Studio):
        self._studio = studio
        self._running: Job | None = None
        self._cancelled = False
        self._warnings: set[str] = set()
        self.cards: list[Card] = []
        self.earlier: deque[Shown] = deque(maxlen=EARLIER)

    def cancel(self) -> None:
        """Ends the request, on the server too; `paint` then says so."""
        self._cancelled = True
        if self._running is not None:
            self._running.cancel()

    async def paint(
        self,
        prompt: str,
        fields: Mapping[str, Any],
        defaults: Mapping[str, Any],
        client: str | None = None,
    ) -> AsyncGenerator[View, None]:
        """The states of a request, the last one at its end. Leaving it ends the request.

        Args:
            prompt: what to paint.
            fields: the request's other fields.
            defaults: the server's values of those that are left out.
            client: by which the server gives callers shares of its queue.
        """
        known = {**defaults, **fields}
        self._begin(known)
        yield self._view()
        try:
            every = preview_every(known["steps"])
            self._running = self._studio.pool.stream(
                prompt, **fields, preview_every=every, client=client
            )
            if self._cancelled:
                self._running.cancel()
            async with aclosing(_batches(self._running)) as batches:
                async for events in batches:
                    for event in events:
                        self._show(prompt, event)
                    yield self._view()
        except TwinbrushError as error:
            yield self._ended(error)
        except Exception:
            log.exception("the page failed to paint")
            yield View("The gateway failed; its log has the reason.", "error", live=False)
        else:
            yield self._ended(None)
        finally:
            self._running = None

    def _begin(self, fields: Mapping[str, Any]) -> None:
        done = [card.picture for card in self.cards if card.picture]
        self.earlier.extendleft(reversed(done))
        size = fields["width"], fields["height"]
        self.cards = [Card(*size) for _ in range(fields["num_images"])]
        self._cancelled, self._warnings = False, set()

    def _show(self, prompt: str, event: Event) -> None:
        card = self.cards[event.index]
        if isinstance(event, Picture):
            card.picture = self._keep(prompt, event)
            self._studio.metrics.pictures.inc()
            if event.warning:
                self._warnings.add(event.warning)
            return
        card.step, card.total_steps = event.step, event.total_steps
        if isinstance(event, Preview):
            card.preview = data_url(event.image)

    def _keep(self, prompt: str, picture: Picture) -> Shown:
        image_format = (picture.image.format or "PNG").lower()
        try:
            url = FILES.lstrip("/") + self._studio.files.add(picture.data, image_format)
        except ValueError as error:
            text = f"{error}: the gateway's --files-mb is too small for the page"
            raise InvalidRequest("RESOURCE_EXHAUSTED", text) from None
        name = f"twinbrush-{picture.seed}.{image_format}"
        return Shown(url, name, prompt, picture.seed, *picture.image.size)

    def _view(self) -> View:
        steps = [card.step / card.total_steps for card in self.cards if card.total_steps]
        finished = sum(card.picture is not None for card in self.cards)
        share = (sum(steps) / len(self.cards)) if self.cards else 0.0
        text = f"Painting: {share:.0%}, {finished} of {len(self.cards)} finished."
        return View(text if steps else "Waiting for the server.", "info", live=True)

    def _ended(self, error: TwinbrushError | None) -> View:
        """The last state; images that have nothing to show leave the page."""
        self.cards = [card for card in self.cards if card.picture or card.preview]
        count = sum(card.picture is not None for card in self.cards)
        pictures = f"{count} picture" + ("" if count == 1 else "s")
        if isinstance(error, Cancelled) and self._cancelled:
            return View(f"Cancelled; {pictures} finished.", "info", live=False)
        if error is not None:
            advice = ADVICE.get(type(error), "The server's log has the reason.")
            return View(f"{sentence(words(error))} {advice}".strip(), "error", live=False)
        if self._warnings:
            return View(sentence("; ".join(sorted(self._warnings))), "warning", live=False)
        return View(f"Finished {pictures}.", "info", live=False)


async def _batches(running: Job) -> AsyncGenerator[list[Event], None]:
    """The events that came since the last ones were taken: a busy page skips no image's end."""
    arrived: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in running:
                arrived.put_nowait(event)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        end: object = ...
        while end is ...:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            events = [item for item in items if not isinstance(item, Exception | None)]
            if len(events) < len(items):
                end = items[-1]
            if events:
                yield events
                await asyncio.sleep(REFRESH_SECONDS)
        if isinstance(end, Exception):
            raise end
    finally:
        running.cancel()
        task.cancel()


def words(error: Exception) -> str:
    """Of an error; the id of a request is for those that a server's log explains."""
    text = str(error)
    return REQUEST_ID.sub("", text).strip() if isinstance(error, InvalidRequest) else text


def sentence(text: str) -> str:
    """With a capital letter, unless it begins with a field, and a full stop."""
    first = text[:1] if "=" in text.partition(" ")[0] else text[:1].upper()
    return first + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
