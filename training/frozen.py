"""A checkpoint's networks, frozen, from captions and latents to the loss of its fusion head.

Stable Diffusion's layout has one CLIP, whose last hidden state the fusion head reads. Stable
Diffusion XL's has two: the head reads their hidden states before the last layer, side by side, and
the UNet also takes the second one's pooled vector and the picture's size. Knows nothing of data,
of optimisers and of files that are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from export import bert, clip_text, fusion
from export.checkpoint import Checkpoint
from export.part import Part, TensorSpec
from export.scheduler import BETAS, SAMPLER_OF
from export.tokenizer import load_tokenizer
from networks.fusion_head import FusionHead
from networks.loading import CheckpointError
from training.latents import LatentBatch, encoded, noised
from twinbrush.engine.guidance import guidance_embedding

SECOND = ("text_encoder_2", "tokenizer_2")  # SDXL's second CLIP
PREDICTIONS = ("epsilon", "v_prediction", "sample")
UNGUIDED = 1.0  # the guidance scale at which a distilled UNet predicts what an undistilled one does


@dataclass(frozen=True)
class Conditions:
    """The text inputs of the fusion head and the UNet, for B captions.

    Attributes:
        clip_tokens: (B, L, D).
        bert_tokens: (B, levels, Lb, Db), and their `attention_mask` (B, Lb).
        pooled: SDXL's `text_embeds`, (B, Dp); None for other UNets.
    """

    clip_tokens: Tensor
    bert_tokens: Tensor
    attention_mask: Tensor
    pooled: Tensor | None = None


class ClipPair(nn.Module):
    """SDXL's two CLIP text encoders."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Their states before the last layer, (B, L, D + D2), and the second's vector, (B, Dp)."""
        first = self.first(input_ids=input_ids, output_hidden_states=True)
        second = self.second(input_ids=input_ids_2, output_hidden_states=True)
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return tokens.float(), second.text_embeds.float()


class TextEncoders:
    """The frozen text encoders of a checkpoint and their tokenizers.

    Attributes:
        clip, bert: as `export` serves them; `clip` is also that of two encoders.

    Raises:
        CheckpointError: an encoder or tokenizer cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.device, self.two = device, has_two_clips(checkpoint)
        names = ["tokenizer", "bert_tokenizer"]
        if self.two:
            checkpoint = _with_second(checkpoint)
            names.append("tokenizer_2")
        self._tokenizers = {name: load_tokenizer(checkpoint, name) for name in names}
        for tokenizer in self._tokenizers.values():
            tokenizer.padding_side = "right"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self.clip = _clip_pair(checkpoint) if self.two else clip_text.part(checkpoint)
        self.bert = bert.part(checkpoint)
        for part in (self.clip, self.bert):
            part.module.requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Conditions:
        length = self.clip.inputs["input_ids"].axes[0]
        ids, _ = self._tokens("tokenizer", texts, length)
        pooled = None
        if self.two:
            tokens, pooled = self.clip.module(ids, self._tokens("tokenizer_2", texts, length)[0])
        else:
            tokens = self.clip.module(ids)
        ids, mask = self._tokens("bert_tokenizer", texts, self.bert.inputs["input_ids"].axes[0])
        return Conditions(tokens, self.bert.module(ids, mask), mask, pooled)

    def _tokens(self, name: str, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (B, length); one padding token counts where a text has none."""
        rows = self._tokenizers[name](
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        mask = rows["attention_mask"]
        mask[mask.sum(dim=1) == 0, 0] = 1
        return rows["input_ids"].to(self.device), mask.to(self.device)


@dataclass
class Frozen:
    """The networks around a fusion head.

    Attributes:
        texts: the text encoders.
        alphas_cumprod: of the checkpoint's own noise schedule, (timesteps,).
        prediction: what the UNet predicts, of `PREDICTIONS`.

    Raises:
        CheckpointError: a network cannot be loaded, or its inputs are not known here.
    """

    checkpoint: Checkpoint
    device: torch.device
    texts: TextEncoders = field(init=False)
    unet: UNet2DConditionModel = field(init=False)
    vae: VQModel | AutoencoderKL = field(init=False)
    alphas_cumprod: Tensor = field(init=False)
    prediction: str = field(init=False)

    def __post_init__(self) -> None:
        self.alphas_cumprod, self.prediction = _schedule(self.checkpoint)
        self.alphas_cumprod = self.alphas_cumprod.to(self.device)
        self.texts = TextEncoders(self.checkpoint, self.device)
        self.unet = self.checkpoint.load("unet", UNet2DConditionModel)
        _check_unet(self.unet, self.texts)
        vae_class = getattr(diffusers, self.checkpoint.classes["vae"])
        self.vae = self.checkpoint.load("vae", vae_class)
        for module in (self.unet, self.vae):
            module.requires_grad_(False).to(self.device)

    def head(self) -> FusionHead:
        """The checkpoint's fusion head, or a new one, which gives CLIP's tokens unchanged.

        Raises:
            CheckpointError: its widths are not those of the encoders.
        """
        head = fusion.part(self.checkpoint, [self.texts.clip], self.texts.bert).module.head
        return head.requires_grad_(True).train().to(self.device)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents as the UNet knows them, (B, C, h, w), of pictures in [-1, 1], (B, 3, H, W)."""
        return encoded(self.vae, pictures)

    def loss(self, head: nn.Module | None, batch: LatentBatch, draw: int) -> Tensor:
        """The diffusion loss (arXiv:2006.11239, equation 14) of a batch; same draw, same noise.

        Args:
            head: the fusion head; None conditions the UNet on CLIP's tokens alone.
        """
        x0, conditions = batch.latents, self.texts(batch.dropped())
        generator = torch.Generator().manual_seed(draw)
        t = torch.randint(len(self.alphas_cumprod), (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        t = t.to(self.device)
        alpha_bar = self.alphas_cumprod[t]
        hidden = conditions.clip_tokens
        if head is not None:
            hidden = head(hidden, conditions.bert_tokens, conditions.attention_mask)
        further = self._further_inputs(conditions, x0)
        output = self.unet(
            noised(x0, noise, alpha_bar), t, encoder_hidden_states=hidden, **further
        ).sample
        target = {
            "epsilon": noise, "v_prediction": noised(noise, -x0, alpha_bar), "sample": x0,
        }[self.prediction]  # fmt: skip
        return F.mse_loss(output.float(), target)

    def _further_inputs(self, conditions: Conditions, x0: Tensor) -> dict[str, Any]:
        """What a distilled UNet, or SDXL's, takes beside latents, timesteps and tokens."""
        inputs: dict[str, Any] = {}
        if width := self.unet.config.time_cond_proj_dim:
            row = torch.from_numpy(guidance_embedding(UNGUIDED, width)).to(self.device)
            inputs["timestep_cond"] = row.expand(len(x0), -1)
        if conditions.pooled is not None:
            scale = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
            height, width = (scale * side for side in x0.shape[-2:])
            size = [height, width, 0, 0, height, width]  # original size, crop, target size
            inputs["added_cond_kwargs"] = {
                "text_embeds": conditions.pooled,
                "time_ids": torch.tensor([size], device=self.device).expand(len(x0), -1),
            }
        return inputs


def has_two_clips(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has SDXL's second text encoder."""
    entry = checkpoint.index.get(SECOND[0])
    return isinstance(entry, list) and entry[-1] == CLIPTextModelWithProjection.__name__


def _with_second(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the folders of its second CLIP.

    Raises:
        CheckpointError: a folder is missing.
    """
    root = checkpoint.folders["unet"].parent
    folders = {part: root / part for part in SECOND}
    for part, folder in folders.items():
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {checkpoint.name} lacks its part {part}/")
    return replace(checkpoint, folders=checkpoint.folders | folders)


def _clip_pair(checkpoint: Checkpoint) -> Part:
    first = checkpoint.load("text_encoder", CLIPTextModel)
    second = checkpoint.load("text_encoder_2", CLIPTextModelWithProjection)
    lengths = [encoder.config.max_position_embeddings for encoder in (first, second)]
    if lengths[0] != lengths[1]:
        raise CheckpointError(
            f"text_encoder takes {lengths[0]} tokens and text_encoder_2 {lengths[1]}: both must"
            " take as many"
        )
    ids = TensorSpec(torch.int64, (lengths[0],))
    width = first.config.hidden_size + second.config.hidden_size
    return Part(
        name="clip_text",
        module=ClipPair(first, second),
        inputs={"input_ids": ids, "input_ids_2": ids},
        outputs={"clip_tokens": TensorSpec(torch.float32, (lengths[0], width))},
        example=lambda batch, size: {},
    )


def _schedule(checkpoint: Checkpoint) -> tuple[Tensor, str]:
    """`alphas_cumprod` and prediction type of the checkpoint's scheduler.

    Raises:
        CheckpointError: it is none that export serves, or predicts something else.
    """
    name = checkpoint.classes["scheduler"]
    if name not in SAMPLER_OF:
        allowed = ", ".join(SAMPLER_OF)
        raise CheckpointError(f"scheduler is a {name}, which is not served: {allowed} are")
    config = getattr(diffusers, name).from_config(checkpoint.config("scheduler")).config
    if config.prediction_type not in PREDICTIONS:
        raise CheckpointError(
            f"scheduler has prediction_type {config.prediction_type!r}: allowed are"
            f" {', '.join(PREDICTIONS)}"
        )
    exact = DDIMScheduler(
        **{beta: config[beta] for beta in BETAS},
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
    )
    return exact.alphas_cumprod, config.prediction_type


def _check_unet(unet: UNet2DConditionModel, texts: TextEncoders) -> None:
    """Raises CheckpointError if a UNet does not fit the encoders or needs other inputs."""
    config, width = unet.config, texts.clip.output[1].axes[-1]
    if config.cross_attention_dim != width:
        raise CheckpointError(
            f"unet has cross_attention_dim {config.cross_attention_dim}, the text encoders have"
            f" width {width}"
        )
    added = "text_time" if texts.two else None
    for name, allowed in (
        ("addition_embed_type", added), ("class_embed_type", None), ("encoder_hid_dim_type", None),
    ):  # fmt: skip
        if config.get(name) != allowed:
            raise CheckpointError(
                f"unet has {name} {config.get(name)}: {allowed} is supported with"
                f" {'two CLIP encoders' if texts.two else 'one CLIP encoder'}"
            )
    if config.in_channels != config.out_channels:
        raise CheckpointError(
            f"unet has in_channels {config.in_channels} and out_channels {config.out_channels}:"
            " only UNets that paint from noise alone are supported"
        )
