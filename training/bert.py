"""`python -m training.bert`: BERT on masked words (arXiv:1810.04805, 3.1), from scratch.

The WordPiece tokenizer is trained here too. Writes `tokenizer_2/` and `text_encoder_2/` of
the checkpoint.
"""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)

from training import data
from training.cli import stage_cli
from training.run import Run
from training.tokenizers import trained_tokenizer

STEPS, BATCH = 1200, 96


def train(run: Run) -> None:
    tokenizer = trained_tokenizer(BertTokenizer, run.source, 2, run.runs / "bert")
    tokenizer.save_pretrained(run.checkpoint / "tokenizer_2")
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512,
            num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=data.MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
        )
    ).to(run.device)  # fmt: skip
    batches = run.source.batches(20_000_000, run.batch, run.device, captions_only=True)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25, seed=step)
        ids, mask = data.token_ids(tokenizer, batches.at(step).captions)
        masked = collate(
            [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
        )
        masked = {name: tensor.to(run.device) for name, tensor in masked.items()}
        out = model(**masked)
        wanted = masked["labels"] != -100
        hit = out.logits.argmax(-1)[wanted] == masked["labels"][wanted]
        return {"loss": out.loss, "accuracy": hit.float().mean()}

    trained = run.trainer(model, "bert", 1e-3, 0.99).run(loss_at, batches)
    trained.bert.save_pretrained(run.checkpoint / "text_encoder_2")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
