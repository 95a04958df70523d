"""`python -m training.clip`: CLIP's two towers, contrastively (arXiv:2103.00020), from scratch.

A source that can draws near misses beside each picture, so that telling captions apart takes
every word of them. The tokenizer is trained here too. Writes
`tokenizer/`, `text_encoder/` and `image_encoder/` of the checkpoint.
"""

from __future__ import annotations

import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from training import data
from training.cli import stage_cli
from training.run import Run, save_part
from training.sheets import similarities
from training.tokenizers import trained_tokenizer

STEPS, BATCH = 700, 192

TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


def train(run: Run) -> None:
    tokenizer = trained_tokenizer(CLIPTokenizer, run.source, 1, run.runs / "clip")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TOWER | special | {
        "vocab_size": len(tokenizer), "max_position_embeddings": data.MAX_TOKENS,
        "num_attention_heads": 4, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = TOWER | {"num_attention_heads": 4, "image_size": run.source.side,
              "patch_size": 8, "projection_dim": 128}  # fmt: skip
    torch.manual_seed(run.seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    model.to(run.device)
    batches = run.source.batches(10_000_000 + run.first(), run.batch, run.device, near=True)
    shown = data.on_device(run.source.sample(19_999_999, 12), run.device)
    shown_ids, _ = data.token_ids(tokenizer, shown.captions, run.device)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        drawn = batches.at(step)
        ids, _ = data.token_ids(tokenizer, drawn.captions, run.device)
        out = model(input_ids=ids, pixel_values=drawn.pictures, return_loss=True)
        hit = out.logits_per_text.argmax(1) == torch.arange(len(ids), device=run.device)
        return {"loss": out.loss, "accuracy": hit.float().mean()}

    def samples(averaged: CLIPModel) -> Image.Image:
        out = averaged(input_ids=shown_ids, pixel_values=shown.pictures)
        cosines = out.logits_per_text / averaged.logit_scale.exp()
        return similarities(cosines, shown.pictures, shown.captions)

    trained = run.trainer(model, "clip", 1e-3, 0.99).run(loss_at, batches, samples)
    tokenizer.save_pretrained(run.checkpoint / "tokenizer")
    save_part(trained.text_model, run.checkpoint / "text_encoder")
    image_encoder = CLIPVisionModelWithProjection(trained.config.vision_config)
    image_encoder.vision_model.load_state_dict(trained.vision_model.state_dict())
    image_encoder.visual_projection.load_state_dict(trained.visual_projection.state_dict())
    save_part(image_encoder, run.checkpoint / "image_encoder")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
