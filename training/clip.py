"""`python -m training.clip`: CLIP's two towers, contrastively (arXiv:2103.00020), from scratch.

Every scene comes with near misses (another shape or colour, colours or places traded), so that
telling captions apart takes every word of them. The tokenizer is trained here too. Writes
`tokenizer/`, `text_encoder/` and `image_encoder/` of the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from training import data
from training.cli import stage_cli
from training.loop import Trainer
from training.scenes import near_misses

TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


def train(checkpoint: Path, runs: Path, steps: int, batch: int, bf16: bool) -> None:
    tokenizer = CLIPTokenizer().train_new_from_iterator(data.corpus(seed=1, count=4000), 1000)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TOWER | special | {
        "vocab_size": len(tokenizer), "max_position_embeddings": data.MAX_TOKENS,
        "num_attention_heads": 4, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = TOWER | {"num_attention_heads": 4, "image_size": 64, "patch_size": 8,
              "projection_dim": 128}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        bases, rng = data.scenes(10_000_000 + step, batch // 4)
        scenes = [scene for base in bases for scene in (base, *near_misses(base, rng))]
        ids, _ = data.token_ids(tokenizer, data.captions(scenes, rng))
        out = model(input_ids=ids, pixel_values=data.pictures(scenes), return_loss=True)
        hit = out.logits_per_text.argmax(1) == torch.arange(len(scenes))
        return {"loss": out.loss, "accuracy": hit.float().mean()}

    trained = Trainer(model, runs / "clip", steps, 1e-3, 0.99, bf16=bf16).run(loss_at)
    trained.text_model.save_pretrained(checkpoint / "text_encoder")
    image_encoder = CLIPVisionModelWithProjection(trained.config.vision_config)
    image_encoder.vision_model.load_state_dict(trained.vision_model.state_dict())
    image_encoder.visual_projection.load_state_dict(trained.visual_projection.state_dict())
    image_encoder.save_pretrained(checkpoint / "image_encoder")


if __name__ == "__main__":
    stage_cli(train, steps=400, batch=192)
