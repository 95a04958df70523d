"""Where the controls of the page stand, and how they look. Knows no server and no events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from gateway.page_form import PLAIN, choices, defaults, limits, lora_help, sizes
from gateway.page_html import gallery, head, status
from twinbrush_client import ServerInfo
from twinbrush_client.fields import HELP

# From a list.
CHOSEN = ("size", "sampler", "priority", "image_format", "sigma_schedule", "prompt_syntax")
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".avif"]
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]


def theme() -> gr.themes.Base:
    """Fonts that every machine has: the page asks no other host for anything."""
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE
    )


@dataclass
class Layout:
    """The components of a page.

    Attributes:
        controls: of the request, by field; `size` is width and height.
        others: fields of a restored picture that have no control; `restored` shows them.
    """

    controls: dict[str, Any]
    server: gr.HTML
    examples: gr.Dataset
    paint: gr.Button
    cancel: gr.Button
    dice: gr.Button
    keep: gr.Checkbox
    file: gr.File
    others: gr.State
    restored: gr.HTML
    status: gr.HTML
    gallery: gr.HTML


def lay_out() -> Layout:
    """Makes the components in the current `gr.Blocks`."""
    found: dict[str, Any] = {}
    server = gr.HTML(head("Asking the server…"), elem_id="tb-head")
    with gr.Row(elem_id="tb-columns", equal_height=False):
        with gr.Column(scale=2, min_width=300, elem_id="tb-form"):
            found |= _request()
            found |= _settings(found["controls"])
        with gr.Column(scale=3, min_width=300, elem_id="tb-result"):
            found["status"] = gr.HTML(status(""))
            found["gallery"] = gr.HTML(gallery([], [], False), js_on_load=CARD_BUTTONS)
    return Layout(server=server, **found)


def updates(info: ServerInfo) -> dict[str, dict[str, Any]]:
    """The properties of each control but the prompt's, for a server."""
    values = defaults(info)
    found: dict[str, dict[str, Any]] = {}
    for name in ("size", *PLAIN):
        if name in CHOSEN:
            offered = sizes(info) if name == "size" else choices(info, name)
            found[name] = {"choices": offered, "value": values[name]}
        else:
            found[name] = limits(info, name) | {"value": values[name]}
    found["lora"] = {"value": "", "info": lora_help(info), "visible": bool(info.loras)}
    return found


# A click on the button below a picture's other settings reaches Python.
FORGET_BUTTON = """
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-forget]')) trigger('click', {});
});
"""
# A click on a card's button reaches Python with the picture's URL.
CARD_BUTTONS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-use]');
  if (button) trigger('click', {picture: button.dataset.use});
});
"""
# Ctrl or Cmd with Enter paints, Escape cancels, wherever the focus is.
SCRIPT = """<script>
document.addEventListener('keydown', (event) => {
  const id = event.key === 'Escape' ? 'tb-cancel'
    : event.key === 'Enter' && (event.ctrlKey || event.metaKey) ? 'tb-paint' : null;
  const button = id && document.getElementById(id);
  if (button && !button.disabled) { event.preventDefault(); button.click(); }
});
document.addEventListener('input', (event) => {  // whoever writes or pastes a seed wants it
  const keep = document.querySelector('#tb-keep input');
  if (event.target.closest('#tb-seed') && !keep.checked) keep.click();
});
document.addEventListener('click', (event) => {  // on a phone, pictures stand below the form
  if (event.target.closest('#tb-paint') && window.innerWidth < 700)
    document.getElementById('tb-result').scrollIntoView({behavior: 'smooth'});
});
</script>"""


def _request() -> dict[str, Any]:
    prompt = gr.Textbox(
        label="Prompt", lines=2, max_lines=6, autofocus=True, elem_id="tb-prompt",
        placeholder="What to paint",
    )  # fmt: skip
    examples = gr.Dataset(components=[prompt], samples=[], label="Examples", elem_id="tb-examples")
    negative = gr.Textbox(
        label="Negative prompt", lines=1, max_lines=4, elem_id="tb-negative",
        placeholder="What to keep away from",
    )  # fmt: skip
    with gr.Row(elem_id="tb-buttons"):
        paint = gr.Button("Paint", variant="primary", elem_id="tb-paint")
        cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="tb-cancel")
    restored = gr.HTML("", elem_id="tb-restored", js_on_load=FORGET_BUTTON)
    controls = {"prompt": prompt, "negative_prompt": negative}
    return {
        "controls": controls, "examples": examples, "paint": paint, "cancel": cancel,
        "restored": restored,
    }  # fmt: skip


def _settings(controls: dict[str, Any]) -> dict[str, Any]:
    """Adds to the controls."""
    with gr.Row():
        controls["size"] = _dropdown("size", "Size", custom=True)
        controls["num_images"] = _slider("num_images", "Images", 1)
    with gr.Row():
        controls["steps"] = _slider("steps", "Steps", 1)
        controls["guidance_scale"] = _slider("guidance_scale", "Guidance", 0.1)
    with gr.Row(elem_id="tb-seeds"):
        controls["seed"] = gr.Textbox(
            label="Seed", placeholder="random", max_lines=1, elem_id="tb-seed", min_width=140,
            scale=3,
        )  # fmt: skip
        dice = gr.Button("⚄ New", elem_id="tb-dice", min_width=80, scale=1)
        keep = gr.Checkbox(label="Keep", elem_id="tb-keep", min_width=80, scale=1)
    with gr.Row():
        controls["sampler"] = _dropdown("sampler", "Sampler")
        controls["priority"] = _dropdown("priority", "Priority")
    controls["lora"] = gr.Textbox(
        label="LoRAs", placeholder="none", max_lines=1, visible=False, elem_id="tb-lora"
    )
    with gr.Accordion("More settings", open=False, elem_id="tb-more"):
        _more(controls)
    with gr.Accordion("Settings from a picture", open=False, elem_id="tb-from"):
        file = gr.File(
            label="Picture made by Twinbrush", file_types=PICTURES, height=160, elem_id="tb-file",
        )  # fmt: skip
    return {"dice": dice, "keep": keep, "file": file, "others": gr.State({})}


def _more(controls: dict[str, Any]) -> None:
    with gr.Row():
        controls["image_format"] = _dropdown("image_format", "File format", help_text=None)
        controls["sigma_schedule"] = _dropdown("sigma_schedule", "Noise levels")
    controls["prompt_syntax"] = _dropdown("prompt_syntax", "Prompt syntax")
    with gr.Row():
        controls["guidance_start"] = _slider("guidance_start", "Guidance from", 0.05)
        controls["guidance_end"] = _slider("guidance_end", "Guidance to", 0.05)
    with gr.Row():
        controls["guidance_rescale"] = _slider("guidance_rescale", "Guidance rescale", 0.05)
        controls["eta"] = gr.Number(
            label="Eta", info=HELP["eta"], placeholder="sampler's own", elem_id="tb-eta",
            min_width=140,
        )  # fmt: skip
    controls["deterministic"] = gr.Checkbox(
        label="Deterministic", info=HELP["deterministic"], elem_id="tb-deterministic"
    )


def _dropdown(name: str, label: str, custom: bool = False, help_text: str | None = "") -> Any:
    words = HELP.get(name) if help_text == "" and name not in ("priority", "sampler") else help_text
    return gr.Dropdown(
        [], label=label, info=words or None, allow_custom_value=custom, min_width=140,
        elem_id=f"tb-{name}",
    )  # fmt: skip


def _slider(name: str, label: str, step: float) -> Any:
    return gr.Slider(
        0, 1, 0, step=step, label=label, min_width=140, elem_id=f"tb-{name}", buttons=[],
        elem_classes="tb-slider",
    )  # fmt: skip
