"""What stands at `/`: the page where gradio is installed, else how to install it."""

from __future__ import annotations

import importlib
import importlib.util

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from gateway.keys import KeyRing
from gateway.painting import Studio

PAGE = "gateway.page"
PLAIN = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Twinbrush</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto;
  padding: 0 1rem }}</style>
<h1>Twinbrush</h1>
<p>This gateway speaks OpenAI's images API under <code>/v1</code> and A1111's under
<code>/sdapi/v1</code>; <a href="docs">/docs</a> lists every route.</p>
<p>{reason}</p>
</html>
"""
NO_GRADIO = (
    "The page needs Gradio: <code>pip install --no-deps -r requirements/page.txt</code> in the "
    "gateway's environment, then start the gateway again."
)
SWITCHED_OFF = "The page is switched off."


def mount(app: FastAPI, studio: Studio, keys: KeyRing, with_page: bool) -> None:
    """Puts the page, or a plain one, at `/`; `app.state.has_page` says which."""
    app.state.has_page = with_page and importlib.util.find_spec("gradio") is not None
    if app.state.has_page:
        importlib.import_module(PAGE).mount(app, studio, keys)
        return

    @app.get("/", include_in_schema=False)
    async def plain() -> Response:
        return HTMLResponse(PLAIN.format(reason=NO_GRADIO if with_page else SWITCHED_OFF))
