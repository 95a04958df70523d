"""Stage `reward`: a differentiable network that reads scenes back from latents.

It reads finished latents as the VQGAN's nearest codes, and noisy ones as they are at the ends of
the distilled UNet's steps, where its answers are likelihoods. For every cell it predicts whether an
object has its centre there, and what the object is. It learns from true pictures of the training
world, crowded ones too. `align` lets a UNet follow its gradient. `examples.scenes.reader`, which
counts in the end, is a program of its own. Writes `reward_model/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from examples.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    middle_item,
    relation,
    sample_crowd,
    says_between,
)
from examples.scenes.world import knows_truth, scene_latents
from networks.loading import load_part
from training.data import BadInput
from training.distill import PHASE, PHASES, alpha_sigma, ddim_scheduler
from training.latents import LATENT_CELL
from training.losses import IGNORED
from training.run import Run, check_trained, save_part

STEPS, BATCH = 800, 128
PICTURES = 30_000
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
CHOICES = [1, *map(len, ATTRIBUTES.values()), len(BACKGROUNDS)]
REACH = 7.0  # pixels from an object's centre within which a cell can tell what the object is
LEVELS = PHASES - 1  # of noise that can be read; where the first phase ends there is little to see
NOISE = 0.5  # of the latents' spread, at most, on half of the finished latents
FLOOR = 0.02  # chance of an object below which it is only missed
APART = 8.0  # pixels by which one object shall come before another
COUNT_WEIGHT = 3.0


class Readout(NamedTuple):
    """What is seen in each of the cells, as logits.

    Attributes:
        centre: an object has its centre in it, (B, h, w).
        shape, colour, size: of the object that covers it, (B, choices, h, w).
        background: of the whole picture, (B, choices).
    """

    centre: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    background: Tensor


class SceneReader(ModelMixin, ConfigMixin):
    """Residual convolutions over latents, with an embedding of the phases of noise in them."""

    @register_to_config
    def __init__(self, channels: int = 8, width: int = 96, blocks: int = 4):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.level_embedding = nn.Embedding(LEVELS, width)
        self.residual = nn.ModuleList(
            nn.Sequential(*_activated(width, 3), *_activated(width, 3)) for _ in range(blocks)
        )
        self.conv_out = nn.Sequential(*_activated(width, 1, sum(CHOICES)))

    def forward(self, x_t: Tensor, level: Tensor) -> Readout:
        """Reads latents (B, channels, h, w).

        Args:
            x_t: as the UNet knows them, finished ones as `nearest_codes` leaves them.
            level: phases that are still to come, 0 to `LEVELS` - 1: (B,).
        """
        h = self.conv_in(x_t) + self.level_embedding(level)[:, :, None, None]
        for block in self.residual:
            h = h + block(h)
        logits = self.conv_out(h).float().split(CHOICES, dim=1)
        centre, shape, colour, size, background = logits
        return Readout(centre[:, 0], shape, colour, size, background.mean((2, 3)))


def _activated(width: int, kernel: int, out: int | None = None) -> list[nn.Module]:
    conv = nn.Conv2d(width, out or width, kernel, padding=kernel // 2)
    return [nn.GroupNorm(8, width), nn.SiLU(), conv]


def nearest_codes(vae: VQModel, x0: Tensor) -> Tensor:
    """The codes nearest to finished latents (B, C, h, w), with a gradient straight through."""
    scale = cast(Any, vae.config).scaling_factor
    with torch.autocast(x0.device.type, enabled=False):
        codes = vae.quantize(x0 / scale)[0]
    return codes * scale


@torch.no_grad()
def left_at(
    vae: VQModel, x0: Tensor, level: Tensor, noise: Tensor, amount: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Latents (B, C, h, w) of true pictures, with as much noise as there is at their levels.

    Args:
        level: as in `SceneReader`, (B,).
        amount: of noise in finished ones, as a UNet's are not without faults: (B, 1, 1, 1).
    """
    alpha, sigma = alpha_sigma(level * PHASE - 1, alphas_cumprod)
    finished = nearest_codes(vae, x0 + amount * noise)
    return torch.where((level == 0)[:, None, None, None], finished, alpha * x0 + sigma * noise)


class Truth(NamedTuple):
    """What a `Readout` shall be.

    Attributes:
        centre: 1 in the cells of centres, (B, h, w).
        attributes: index of shape, colour and size, `IGNORED` away from objects, (B, h, w, 3).
        background: (B,).
    """

    centre: Tensor
    attributes: Tensor
    background: Tensor


def truth_of(scenes: Sequence[Scene], cells: int) -> Truth:
    """Of pictures of `cells` by `cells` latents."""
    centre = torch.zeros(len(scenes), cells, cells)
    attributes = torch.full((len(scenes), cells, cells, len(ATTRIBUTES)), IGNORED)
    y, x = (np.mgrid[0:cells, 0:cells] + 0.5) * LATENT_CELL
    for row, scene in enumerate(scenes):
        for item in scene.items:
            centre[row, int(item.y // LATENT_CELL), int(item.x // LATENT_CELL)] = 1
            near = torch.from_numpy(np.hypot(x - item.x, y - item.y) < REACH)
            attributes[row, near] = torch.tensor(_indices(item))
    backgrounds = list(BACKGROUNDS)
    return Truth(
        centre, attributes, torch.tensor([backgrounds.index(s.background) for s in scenes])
    )


def _indices(item: Item) -> list[int]:
    return [choices.index(getattr(item, name)) for name, choices in ATTRIBUTES.items()]


def reading_losses(read: Readout, truth: Truth) -> dict[str, Tensor]:
    """Their sum is `loss`; `count` is by how many objects pictures are misjudged."""
    centre = F.binary_cross_entropy_with_logits(read.centre, truth.centre, reduction="sum")
    parts = {"centre": centre / len(truth.centre)}
    for i, name in enumerate(ATTRIBUTES):
        parts[name] = F.cross_entropy(getattr(read, name), truth.attributes[..., i])
    parts["background"] = F.cross_entropy(read.background, truth.background)
    seen, there = (cells.sum((1, 2)) for cells in (read.centre.sigmoid(), truth.centre))
    return {
        "loss": torch.stack([*parts.values()]).sum(),
        **parts,
        "count": (seen - there).abs().mean(),
    }


def faults(read: Readout, scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Tensor]:
    """What pictures lack of what their captions say, differentiable, each mean over pictures.

    `missing` is by the logarithm of how likely each object is there, `count` by how many too many
    or too few there are, `relation` by how far an object is from the right side of another, and
    `background` by the logarithm of its likelihood.

    Args:
        scenes: what the captions are true of.
    """
    pixels = (torch.arange(read.centre.shape[-1], device=read.centre.device) + 0.5) * LATENT_CELL
    centre = F.logsigmoid(read.centre)
    likelihoods = {name: getattr(read, name).log_softmax(1) for name in ATTRIBUTES}
    backgrounds = read.background.log_softmax(1)
    found: dict[str, list[Tensor]] = {"missing": [], "count": [], "relation": [], "background": []}
    for row, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        places = []
        for item in scene.items:
            there = centre[row]
            for (name, answers), index in zip(likelihoods.items(), _indices(item), strict=True):
                if name != "size" or f"{item.size} {item.colour} {item.shape}" in caption:
                    there = there + answers[row, index]
            likely = there.flatten().logsumexp(0).exp().clamp(max=1)
            found["missing"].append(-torch.log((likely + FLOOR) / (1 + FLOOR)))
            where = there.flatten().softmax(0).view_as(there)
            places.append(((where.sum(0) * pixels).sum(), (where.sum(1) * pixels).sum()))
        count = read.centre[row].sigmoid().sum()
        wanted = torch.full_like(count, len(scene.items))
        found["count"].append(COUNT_WEIGHT * F.smooth_l1_loss(count, wanted, beta=0.3))
        found["relation"].extend(_out_of_order(scene, caption, places))
        if scene.background in caption:
            found["background"].append(-backgrounds[row, list(BACKGROUNDS).index(scene.background)])
    zero = read.centre.new_zeros(())
    return {name: sum(parts, zero) / len(scenes) for name, parts in found.items()}


def _out_of_order(
    scene: Scene, caption: str, places: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """By how much each named relation is violated; "between" may be in a row or a column."""

    def late(before: int, after: int, axis: int) -> Tensor:
        return F.relu(APART - (places[after][axis] - places[before][axis])) / APART

    if says_between(caption):
        middle = middle_item(scene)
        assert middle is not None, "describe says between only where it is so"
        a, b = (i for i in range(3) if i != middle)
        ways = [
            late(first, middle, axis) + late(middle, last, axis)
            for axis in (0, 1)
            for first, last in ((a, b), (b, a))
        ]
        return [torch.stack(ways).min()]
    wrong = []
    for i, j in itertools.pairwise(range(len(scene.items))):
        link = relation(scene.items[i], scene.items[j])
        before, after = (i, j) if link in ("left of", "above") else (j, i)
        wrong.append(late(before, after, 0 if link in ("left of", "right of") else 1))
    return wrong


def train(run: Run) -> None:
    check_trained(run.checkpoint, "vae")
    if not knows_truth(run.source):
        raise BadInput("--data: the stage reward needs scenes, whose truth is known")
    first = run.first()
    rng = np.random.default_rng(70_000_000 + first)
    scenes = [sample_crowd(rng) for _ in range(PICTURES)]
    vae = load_part(run.checkpoint / "vae", VQModel).to(run.device)
    clean = scene_latents(run.checkpoint, run.runs, scenes, run.device)
    spread = clean.std()
    truth = Truth(*(part.to(run.device) for part in truth_of(scenes, clean.shape[-1])))
    alphas_cumprod = ddim_scheduler().alphas_cumprod.to(run.device)
    torch.manual_seed(run.seed)
    reader = SceneReader(clean.shape[1])
    nn.Module.to(reader, run.device)

    def loss_at(step: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(first + step)
        chosen = torch.randint(PICTURES, (run.batch,), generator=draw)
        noise = torch.randn(run.batch, *clean.shape[1:], generator=draw)
        amount = NOISE * (2 * torch.rand(run.batch, 1, 1, 1, generator=draw) - 1).clamp(min=0)
        level = torch.arange(run.batch, device=run.device) % LEVELS
        noise, amount = noise.to(run.device), spread * amount.to(run.device)
        x_t = left_at(vae, clean[chosen], level, noise, amount, alphas_cumprod)
        return reading_losses(reader(x_t, level), Truth(*(part[chosen] for part in truth)))

    trained = run.trainer(reader, "reward", 1.5e-3, 0.99, [run.checkpoint / "vae"]).run(loss_at)
    save_part(trained.half(), run.checkpoint / "reward_model")
