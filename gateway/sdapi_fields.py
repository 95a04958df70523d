"""The body of A1111's `txt2img`: what it asks of a server, and what nobody here can do.

Tools send every field that they know, most at a value that asks for nothing. Those are taken. A
field of A1111's that asks for what is not served is refused by name; one that A1111 does not know
is ignored, as there, and the answer warns of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gateway import sampler_names
from gateway.errors import ApiError, invalid, shown
from twinbrush_client import ServerInfo

# Fields that are not served, and their values, besides null, that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": (), "restore_faces": (), "tiling": (), "enable_hr": (), "firstphase_width": (),
    "firstphase_height": (), "firstpass_image": (), "init_images": (), "mask": (),
    "subseed_strength": (), "s_churn": (), "s_min_uncond": (), "infotext": (),
    "seed_resize_from_h": (-1,), "seed_resize_from_w": (-1,), "s_noise": (1,),
    "clip_skip": (1, -1), "script_name": ("None",), "refiner_checkpoint": ("None",),
}  # fmt: skip
# Of what is not done here, such as saving on the server, or matters with another field alone.
WITHOUT_EFFECT = {
    "subseed", "denoising_strength", "do_not_save_samples", "do_not_save_grid", "save_images",
    "override_settings_restore_afterwards", "script_args", "force_task_id", "comments",
    "disable_extra_networks", "refiner_switch_at", "s_tmin", "s_tmax",
}  # fmt: skip
HIGH_RESOLUTION = "hr_"  # fields of `enable_hr`, which is refused
CHECKPOINT, FORMAT = "sd_model_checkpoint", "samples_format"  # settings that are served
# Settings that change pictures and are not served, as `NEUTRAL`; others have no effect here.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (1,), "sd_vae": ("Automatic", "None"),
    "sd_hypernetwork": ("None",), "sd_lora": ("None",), "forge_additional_modules": (),
    "eta_noise_seed_delta": (), "eta_ddim": (), "eta_ancestral": (1,), "s_churn": (),
    "s_noise": (1,), "s_min_uncond": (), "tiling": (), "face_restoration": (),
    "sd_noise_schedule": ("Default",), "emphasis": ("Original",), "token_merging_ratio": (),
}  # fmt: skip
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
ZERO_CHANGES = ("eta_ancestral", "s_noise")  # settings whose 0 changes pictures
WITH_ETA = ("ddim", "tcd")  # samplers that take A1111's eta
# Those whose eta is 1 here, and what they are in A1111 at an eta of 0; others have none there.
WITHOUT_NOISE = {"euler_a": "euler", "dpmpp_2m_sde": "dpmpp_2m"}
WITH_S_NOISE = "dpmpp_2m_sde"  # the one whose picture A1111's `s_noise` of 0 changes
# What A1111 reads in prompts beside `prompt_syntax`: [a:b:0.5], [a|b], AND.
NOT_READ = re.compile(r"\[[^\[\]]*:\s*[\d.]+\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\bAND\b")
LORA = re.compile(r"\s*<lora:([^<>]*)>")  # `<lora:NAME>` or `<lora:NAME:SCALE>`
TITLE_HASH = re.compile(r"\s*\[[0-9a-fA-F]+\]\s*$")
FILE_ENDING = re.compile(r"\.(safetensors|ckpt)$")
HASH = re.compile(r"[0-9a-f]{10,64}")
# What a server calls a field, and what this door does.
NAMES = {"num_images": "batch_size", "sampler": "sampler_name", "sigma_schedule": "scheduler",
         "guidance_scale": "cfg_scale"}  # fmt: skip


class TextToImage(BaseModel):
    """What `POST /sdapi/v1/txt2img` takes; what is left out takes the checkpoint's value."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"prompt": "a red ring", "steps": 8}]}
    )

    prompt: str = Field("", max_length=8000, description="What to paint.", examples=["a red ring"])
    negative_prompt: str | None = Field(None, max_length=8000)
    seed: int | None = Field(None, ge=-1, le=2**63 - 1, description="-1 is random.")
    steps: int | None = Field(None, ge=1, le=50)
    cfg_scale: float | None = Field(None, ge=0, le=50, allow_inf_nan=False)
    width: int | None = Field(None, ge=1, le=2**20)
    height: int | None = Field(None, ge=1, le=2**20)
    sampler_name: str | None = Field(None, max_length=64, description="A name of /samplers.")
    sampler_index: str | None = Field(None, max_length=64, description="Older sampler_name.")
    scheduler: str | None = Field(None, max_length=64, description="A name of /schedulers.")
    batch_size: int | None = Field(None, ge=1, le=16)
    n_iter: int | None = Field(None, ge=1, le=16, description="Batches; 16 images in all.")
    eta: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="Of DDIM and TCD.")
    send_images: bool | None = Field(None, description="false leaves the images out.")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="Scripts are not served.")
    override_settings: dict[str, Any] | None = Field(
        None, description="sd_model_checkpoint and samples_format."
    )

    def check(self) -> None:
        """Raises ApiError where a field asks for what is not served, or cannot be answered."""
        try:  # the answer repeats the body
            json.dumps(self.model_dump(), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            text = "The body has NaN, Infinity, half of a surrogate pair, or too many brackets."
            raise ApiError(400, text, code="invalid_json") from None
        for name, value in (self.model_extra or {}).items():
            _check_neutral(name, value, NEUTRAL)
        for name, script in (self.alwayson_scripts or {}).items():
            if _is_on(script):
                raise _not_served(f"alwayson_scripts.{name}", script)
        check_settings(self.override_settings or {}, "override_settings.")

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings of this request alone."""
        given = self.override_settings or {}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def images(self) -> int:
        return (self.batch_size or 1) * (self.n_iter or 1)

    @property
    def painted_prompt(self) -> str:
        """The prompt without its LoRAs."""
        return LORA.sub("", self.prompt).strip()

    @property
    def warnings(self) -> list[str]:
        """What is not as A1111 would do it, though it is taken."""
        found = [f"ignored: {', '.join(map(shown, self.ignored))}"] if self.ignored else []
        for name in ("prompt", "negative_prompt"):
            if part := NOT_READ.search(getattr(self, name) or ""):
                found.append(f"{name}: {shown(part[0])} is read as text")
        return found

    @property
    def ignored(self) -> list[str]:
        """Fields that neither A1111 nor this door knows."""
        return [
            name
            for name in self.model_extra or {}
            if name not in NEUTRAL | dict.fromkeys(WITHOUT_EFFECT)
            and not name.startswith(HIGH_RESOLUTION)
        ]

    def fields(self, info: ServerInfo, image_format: str) -> dict[str, Any]:
        """The fields of a server's request; those that are None take its defaults."""
        if self.images > 16:
            raise invalid("n_iter", self.n_iter, "batch_size times n_iter must be at most 16")
        name = self.sampler_name or self.sampler_index
        sampler, schedule = sampler_names.chosen(name, self.scheduler, info.samplers)
        sampler = self._with_noise(sampler or info.defaults["sampler"], info.samplers) or sampler
        takes_eta = (sampler or info.defaults["sampler"]) in WITH_ETA
        steps = self.steps or info.defaults["steps"]
        return {
            "negative_prompt": self.negative_prompt,
            "prompt_syntax": "a1111",
            "lora": ",".join(LORA.findall(self.prompt)) or None,
            "seed": None if self.seed in (None, -1) else self.seed,
            "steps": steps,
            "guidance_scale": self.cfg_scale,
            "width": self.width or info.defaults["width"],
            "height": self.height or info.defaults["height"],
            "sampler": sampler,
            "sigma_schedule": schedule,
            "eta": self.eta if takes_eta else None,
            "num_images": self.images,
            "image_format": image_format,
            "preview_every": max(1, steps // 10),
        }

    def _with_noise(self, sampler: str, served: Sequence[str]) -> str | None:
        """The sampler that `eta` makes of an ancestral one; None where it stays the same.

        Raises:
            ApiError: no sampler is served that adds so much noise.
        """
        if sampler == WITH_S_NOISE and (self.model_extra or {}).get("s_noise") == 0:
            raise _not_served("s_noise", 0)
        if sampler not in WITHOUT_NOISE or self.eta in (None, 1):
            return None
        if self.eta == 0 and WITHOUT_NOISE[sampler] in served:
            return WITHOUT_NOISE[sampler]
        raise invalid("eta", self.eta, f"{sampler_names.TITLES[sampler]} is served at 1 alone")


def image_format(name: object) -> str:
    """The format that A1111's `samples_format` names."""
    if not isinstance(name, str) or name not in FORMATS:
        raise invalid("samples_format", name, f"must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def named_checkpoint(name: object, hashes: Mapping[str, str]) -> str | None:
    """The checkpoint that A1111's `sd_model_checkpoint` names; None is the first.

    A1111 also takes a title's hash in brackets and the file's ending, and a hash alone.

    Args:
        name: as a tool has sent it.
        hashes: of the checkpoints that are served, by name; "" where it is not known.

    Returns:
        The name of one that is served, or `name` itself where none is meant.

    Raises:
        ApiError: it is no text.
    """
    if not isinstance(name, str | None):
        raise invalid(CHECKPOINT, name, "must be a title of /sdapi/v1/sd-models")
    if not name or name in hashes:
        return name or None
    title = TITLE_HASH.sub("", name).strip()
    for wanted in (title, FILE_ENDING.sub("", title)):
        if wanted in hashes:
            return wanted
    short = title.lower()
    if HASH.fullmatch(short):
        return next((known for known, sha256 in hashes.items() if sha256.startswith(short)), name)
    return name


def check_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ApiError where a setting asks for what is not served."""
    for name, value in settings.items():
        if name in ZERO_CHANGES and value == 0:
            raise _not_served(prefix + name, value)
        _check_neutral(name, value, SETTINGS, prefix)


def _check_neutral(
    name: str, value: Any, neutral: dict[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    wanted = any(value) if isinstance(value, list) else value
    if name in neutral and wanted and value not in neutral[name]:
        raise _not_served(prefix + name, value)


def _is_on(script: Any) -> bool:
    """Whether a script has arguments that ask for something; most begin with whether it runs."""
    arguments = script.get("args") if isinstance(script, dict) else script
    if not isinstance(arguments, list):
        return bool(arguments)
    if not arguments or arguments[0] is False:
        return False
    return any(a and not (isinstance(a, dict) and a.get("enabled") is False) for a in arguments)


def _not_served(param: str, value: Any) -> ApiError:
    error = invalid(param, value, "it is not served; leave it out")
    error.code = "unsupported_value"
    return error
