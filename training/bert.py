"""`python -m training.bert`: BERT on masked words (arXiv:1810.04805, 3.1), from scratch.

The WordPiece tokenizer is trained here too. Writes `tokenizer_2/` and `text_encoder_2/` of
the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)

from training import data
from training.cli import stage_cli
from training.loop import Trainer


def train(checkpoint: Path, runs: Path, steps: int, batch: int, bf16: bool) -> None:
    tokenizer = BertTokenizer().train_new_from_iterator(data.corpus(seed=2, count=4000), 1000)
    tokenizer.save_pretrained(checkpoint / "tokenizer_2")
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
            num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=data.MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25, seed=step)
        scenes, rng = data.scenes(20_000_000 + step, batch)
        ids, mask = data.token_ids(tokenizer, data.captions(scenes, rng))
        masked = collate(
            [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
        )
        out = model(**masked)
        wanted = masked["labels"] != -100
        hit = out.logits.argmax(-1)[wanted] == masked["labels"][wanted]
        return {"loss": out.loss, "accuracy": hit.float().mean()}

    trained = Trainer(model, runs / "bert", steps, 1e-3, 0.99, bf16=bf16).run(loss_at)
    trained.bert.save_pretrained(checkpoint / "text_encoder_2")


if __name__ == "__main__":
    stage_cli(train, steps=800, batch=96)
