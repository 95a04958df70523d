"""A1111's names of samplers and schedulers, and what Twinbrush calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.errors import invalid

TITLES = {
    "euler_a": "Euler a", "euler": "Euler", "heun": "Heun", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "ddim": "DDIM", "ddpm": "DDPM",
    "pndm": "PLMS", "unipc": "UniPC", "deis": "DEIS", "lcm": "LCM", "tcd": "TCD",
}  # fmt: skip
# Besides the names themselves, also behind `k_`; tools of ComfyUI say `euler_ancestral`.
ALIASES = {"pndm": ["PNDM"], "euler_a": ["euler_ancestral", "k_euler_ancestral"]}
SCHEDULERS = {
    "default": "Automatic", "normal": "Normal", "karras": "Karras", "exponential": "Exponential",
    "beta": "Beta", "sgm_uniform": "SGM Uniform",
}  # fmt: skip
# A1111's default of most samplers, and what Twinbrush's pictures say.
SCHEDULER_ALIASES = {"uniform": "default", "default": "default"}


def samplers(served: Sequence[str]) -> list[dict[str, Any]]:
    """What `/sdapi/v1/samplers` lists of the samplers that a server has."""
    return [
        {"name": title, "aliases": [name, f"k_{name}", *ALIASES.get(name, ())], "options": {}}
        for name, title in TITLES.items()
        if name in served
    ]


def schedulers() -> list[dict[str, Any]]:
    """What `/sdapi/v1/schedulers` lists."""
    return [
        {"name": _public(name), "label": label, "aliases": None, "default_rho": -1,
         "need_inner_model": False}
        for name, label in SCHEDULERS.items()
    ]  # fmt: skip


def chosen(
    sampler: str | None, scheduler: str | None, served: Sequence[str]
) -> tuple[str | None, str | None]:
    """Twinbrush's sampler and sigma schedule of A1111's names; None is the checkpoint's own.

    Raises:
        ApiError: a name is not known.
    """
    name, combined = _split(sampler or "")
    schedule = _schedule(scheduler) if scheduler else None
    if schedule in (None, "default") and combined:
        schedule = combined
    if not name:
        return None, schedule
    known = {_plain(own): own for own in served}
    known |= {_plain(f"k_{own}"): own for own in served}
    known |= {_plain(TITLES[own]): own for own in served if own in TITLES}
    known |= {_plain(a): own for own, aliases in ALIASES.items() if own in served for a in aliases}
    if (found := known.get(_plain(name))) is None:
        titles = ", ".join(TITLES.get(own, own) for own in served)
        raise invalid("sampler_name", sampler, f"must be one of {titles}")
    return found, schedule


def _split(sampler: str) -> tuple[str, str | None]:
    """`DPM++ 2M Karras` is a sampler and a schedule, of which older tools make one name."""
    sampler = sampler.strip()
    for own, label in SCHEDULERS.items():
        for name in (label, _public(own)):
            if sampler.lower().endswith(f" {name.lower()}"):
                return sampler[: -len(name)].strip(), own
    return sampler, None


def _schedule(scheduler: str) -> str:
    known = {_plain(_public(name)): name for name in SCHEDULERS}
    known |= {_plain(label): name for name, label in SCHEDULERS.items()}
    known |= {_plain(alias): name for alias, name in SCHEDULER_ALIASES.items()}
    if (found := known.get(_plain(scheduler))) is None:
        allowed = f"must be one of {', '.join(SCHEDULERS.values())}"
        raise invalid("scheduler", scheduler, allowed)
    return found


def _public(name: str) -> str:
    return "automatic" if name == "default" else name


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c not in " _-")
