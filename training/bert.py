"""`python -m training.bert`: BERT on masked words (arXiv:1810.04805, 3.1), from scratch.

If the source has an objective of its own, half of the captions stay whole and BERT also learns
that. The WordPiece tokenizer is trained here too. Writes `bert_tokenizer/` and `bert/` of the
checkpoint. With `--init` both are those of a checkpoint, and BERT learns further.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from training import data
from training.cli import stage_cli
from training.losses import IGNORED, cross_entropy
from training.run import Run, load_start, save_part, starting_from
from training.tokenizers import trained_tokenizer

STEPS, BATCH = 1000, 96
WIDTH = 128


class Learner(nn.Module):
    """BERT with a head for masked words and one for the source's own objective."""

    def __init__(self, vocabulary: int, padding: int, objective: data.Objective | None):
        super().__init__()
        # Hardly a caption is drawn twice, so nothing is dropped out.
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
            num_hidden_layers=4, num_attention_heads=4, pad_token_id=padding,
            max_position_embeddings=data.MAX_TOKENS,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.words = BertForMaskedLM(config)
        self.objective = objective.module(WIDTH) if objective else None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states: (B, L, width)."""
        return self.words.bert(ids, attention_mask=mask).last_hidden_state


def train(run: Run) -> None:
    if run.init:
        with starting_from(run.init / "bert_tokenizer", "tokenizer"):
            tokenizer = BertTokenizer.from_pretrained(run.init / "bert_tokenizer")
    else:
        tokenizer = trained_tokenizer(BertTokenizer, run.source, 2, run.runs / "bert")
    torch.manual_seed(run.seed)
    objective = run.source.objective
    model = Learner(len(tokenizer), tokenizer.pad_token_id, objective)
    if run.init:
        load_start(model.words.bert, run.init / "bert" / SAFE_WEIGHTS_NAME, "BERT")
    model.to(run.device)
    reads = [run.init / "bert"] if run.init else []
    first = run.first(reads)
    batches = run.source.batches(20_000_000 + first, run.batch, run.device, captions_only=True)

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        ids, mask = data.token_ids(tokenizer, drawn.captions)
        labels = torch.full_like(ids, IGNORED)
        holed = (len(ids) + 1) // 2 if objective else len(ids)  # captions with masked words
        collate = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=0.25, seed=first + step
        )
        masked = collate([{"input_ids": row} for row in ids[:holed]])
        ids[:holed], labels[:holed] = masked["input_ids"], masked["labels"]
        hidden = model(ids.to(run.device), mask.to(run.device))
        labels = labels.to(run.device)
        counted = labels != IGNORED
        loss, accuracy = cross_entropy(model.words.cls(hidden[counted]), labels[counted])
        measured = {"words": loss, "accuracy": accuracy}
        if objective:
            targets = objective.targets(tokenizer, drawn.captions, drawn.truth)[holed:]
            further, accuracies = objective.loss(
                model.objective, hidden[holed:], targets.to(run.device)
            )
            loss, measured = loss + further, measured | accuracies
        return {"loss": loss, **measured}

    trained = run.trainer(model, "bert", 1e-3, 0.99, reads).run(loss_at, batches)
    tokenizer.save_pretrained(run.checkpoint / "bert_tokenizer")
    save_part(trained.words.bert, run.checkpoint / "bert")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
