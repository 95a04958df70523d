"""`python -m training.bert`: BERT on masked words (arXiv:1810.04805, 3.1), from scratch.

Where the truth of the captions is known, half of them stay whole, and every word of an object's
name is asked what the object is and where it stands: see `grounding`. The WordPiece tokenizer
is trained here too. Writes `tokenizer_2/` and `text_encoder_2/` of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)

from training import data
from training.cli import stage_cli
from training.grounding import QUESTIONS, UNASKED, word_answers
from training.run import Run
from training.tokenizers import trained_tokenizer

STEPS, BATCH = 1200, 96
WIDTH = 128
CHOICES = [len(choices) for choices in QUESTIONS.values()]


class Grounded(nn.Module):
    """BERT with a head for masked words and one for the questions of `grounding`."""

    def __init__(self, vocabulary: int, padding: int):
        super().__init__()
        # Hardly a caption is drawn twice, so nothing is dropped out.
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
            num_hidden_layers=4, num_attention_heads=4, pad_token_id=padding,
            max_position_embeddings=data.MAX_TOKENS,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.words = BertForMaskedLM(config)
        self.answers = nn.Linear(WIDTH, sum(CHOICES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states: (B, L, width)."""
        return self.words.bert(ids, attention_mask=mask).last_hidden_state


def train(run: Run) -> None:
    tokenizer = trained_tokenizer(BertTokenizer, run.source, 2, run.runs / "bert")
    tokenizer.save_pretrained(run.checkpoint / "tokenizer_2")
    torch.manual_seed(0)
    model = Grounded(len(tokenizer), tokenizer.pad_token_id).to(run.device)
    batches = run.source.batches(20_000_000, run.batch, run.device, captions_only=True)

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        encoded = tokenizer(
            drawn.captions, padding="max_length", truncation=True, max_length=data.MAX_TOKENS,
            return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        ids, words = encoded["input_ids"], torch.full_like(encoded["input_ids"], UNASKED)
        holed = (len(ids) + 1) // 2 if drawn.scenes else len(ids)  # captions with masked words
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25, seed=step)
        masked = collate([{"input_ids": one} for one in ids[:holed]])
        ids[:holed], words[:holed] = masked["input_ids"], masked["labels"]
        hidden = model(ids.to(run.device), encoded["attention_mask"].to(run.device))
        words = words.to(run.device)
        asked = words != UNASKED
        loss, accuracy = _answered(model.words.cls(hidden[asked]), words[asked])
        measured = {"words": loss, "accuracy": accuracy}
        if drawn.scenes:
            offsets = encoded["offset_mapping"].numpy()
            right = torch.from_numpy(word_answers(drawn.scenes, drawn.captions, offsets))
            right[:holed] = UNASKED
            right = right.to(run.device)
            asked = right[..., 0] != UNASKED
            scores = model.answers(hidden[asked]).split(CHOICES, dim=-1)
            for name, given, wanted in zip(QUESTIONS, scores, right[asked].T, strict=True):
                one, measured[name] = _answered(given, wanted)
                loss = loss + one
        return {"loss": loss, **measured}

    trained = run.trainer(model, "bert", 1e-3, 0.99).run(loss_at, batches)
    trained.words.bert.save_pretrained(run.checkpoint / "text_encoder_2")


def _answered(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy of scores (N, choices); 0 where nothing was asked."""
    n = max(1, len(right))
    hits = scores.argmax(-1) == right
    return F.cross_entropy(scores.float(), right, reduction="sum") / n, hits.sum() / n


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
