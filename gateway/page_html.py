"""HTML of the page: cards of pictures, notices, the line that says who serves. Knows no Gradio.

Everything that came from a user or a server is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from twinbrush_client import ServerInfo


@dataclass(frozen=True)
class Shown:
    """A finished picture on the page.

    Attributes:
        url: of its file, below the page.
        name: of the file when it is saved.
        width, height: in pixels.
    """

    url: str
    name: str
    prompt: str
    seed: int
    width: int
    height: int


@dataclass
class Card:
    """An image that is being painted, and its picture in the end.

    Attributes:
        preview: data URL of the last preview, or empty.
        picture: the finished picture.
    """

    width: int
    height: int
    step: int = 0
    total_steps: int = 0
    preview: str = ""
    picture: Shown | None = None


def data_url(image: Image.Image) -> str:
    """A small image as a URL that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def gallery(cards: Sequence[Card], earlier: Iterable[Shown], live: bool) -> str:
    """The cards of the current request, and the pictures of earlier ones."""
    now = "".join(_card(index, card, live) for index, card in enumerate(cards))
    past = "".join(f"<li>{_finished(picture)}</li>" for picture in earlier)
    parts = []
    if now:
        parts.append(f'<ul class="tb-cards" id="tb-now" aria-label="Pictures">{now}</ul>')
    if past:
        label = '<h2 class="tb-heading">Earlier pictures</h2>'
        parts.append(f'{label}<ul class="tb-cards tb-past" id="tb-past">{past}</ul>')
    if not parts:
        return '<p class="tb-empty">Pictures appear here.</p>'
    return "".join(parts)


def status(text: str, kind: str = "info") -> str:
    """A line that screen readers announce; an `error` or `warning` stands out."""
    role = "alert" if kind == "error" else "status"
    words = f'<p class="tb-{kind}">{escape(text)}</p>' if text else ""
    return f'<div role="{role}" aria-live="polite" id="tb-status">{words}</div>'


def head(text: str, kind: str = "plain") -> str:
    """The page's name, and who serves; `text` is HTML."""
    return f'<h1>Twinbrush</h1><p id="tb-server" class="tb-{kind}">{text}</p>'


def served(info: ServerInfo) -> str:
    """Which checkpoint and device serve."""
    place = f"on {info.device}" if info.device else ""
    size = f"{info.defaults['width']} × {info.defaults['height']} pixels"
    words = " ".join(filter(None, [f"<b>{escape(info.checkpoint)}</b>", escape(place)]))
    return head(f"{words} · {size} · version {escape(info.version)}")


def unreachable(text: str) -> str:
    """In place of `served` where no server answers."""
    return head(f"{escape(text)} Start one, then load this page again.", "error")


def others(fields: dict[str, object]) -> str:
    """Settings of a picture that the form has no control for, and a button to drop them."""
    if not fields:
        return ""
    words = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in fields.items())
    return (
        f'<p class="tb-info tb-line"><span>Also from the picture: {words}.</span>'
        '<button type="button" data-forget>Leave out</button></p>'
    )


def _card(index: int, card: Card, live: bool) -> str:
    if card.picture is not None:
        return f"<li>{_finished(card.picture)}</li>"
    number = index + 1
    source = f'<img src="{card.preview}" alt="Preview of image {number}">' if card.preview else ""
    shape = f'style="aspect-ratio: {card.width} / {card.height}"'
    if live:
        total = card.total_steps or 1
        told = f"step {card.step} of {card.total_steps}" if card.total_steps else "waiting"
        below = (
            f'<progress max="{total}" value="{card.step}" aria-label="Image {number}"></progress>'
            f"<span>{told}</span>"
        )
    else:
        below = "<span>not finished</span>"
    return (
        f'<li><figure class="tb-card tb-painting"><div class="tb-frame" {shape}>{source}</div>'
        f'<figcaption class="tb-line">{below}</figcaption></figure></li>'
    )


def _finished(shown: Shown) -> str:
    url, name = escape(shown.url), escape(shown.name)
    words = escape(shown.prompt)
    return (
        f'<figure class="tb-card"><a class="tb-frame" href="{url}" target="_blank" '
        f'style="aspect-ratio: {shown.width} / {shown.height}" title="Open at full size">'
        f'<img src="{url}" alt="{words}" width="{shown.width}" height="{shown.height}"></a>'
        f'<figcaption><p class="tb-prompt" title="{words}">{words}</p><div class="tb-line">'
        f'<span class="tb-seed">seed {shown.seed}</span>'
        f'<a href="{url}" download="{name}">Download</a>'
        f'<button type="button" data-use="{url}">Use settings</button>'
        "</div></figcaption></figure>"
    )
