"""`python -m training.bert`: BERT on masked words (arXiv:1810.04805, 3.1), from scratch.

Where the truth of the captions is known, half of them stay whole, and every word of an object's
name is asked what the object is and where it stands: see `grounding`. Of scenes it reads requests,
whose captions let nobody conclude from what a thing is to its size. The WordPiece tokenizer
is trained here too. Writes `tokenizer_2/` and `text_encoder_2/` of the checkpoint. With
`--init` both are those of a checkpoint, and BERT learns further.
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

from examples.scenes.grounding import UNASKED, Questions, cross_entropy, word_answers
from training import data
from training.cli import stage_cli
from training.run import Run, load_start, save_part, starting_from
from training.tokenizers import trained_tokenizer

STEPS, BATCH = 1000, 96
WIDTH = 128


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
        self.questions = Questions(WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states: (B, L, width)."""
        return self.words.bert(ids, attention_mask=mask).last_hidden_state


def train(run: Run) -> None:
    if run.init:
        with starting_from(run.init / "tokenizer_2", "tokenizer"):
            tokenizer = BertTokenizer.from_pretrained(run.init / "tokenizer_2")
    else:
        tokenizer = trained_tokenizer(BertTokenizer, run.source, 2, run.runs / "bert")
    torch.manual_seed(run.seed)
    model = Grounded(len(tokenizer), tokenizer.pad_token_id)
    if run.init:
        load_start(model.words.bert, run.init / "text_encoder_2" / SAFE_WEIGHTS_NAME, "BERT")
    model.to(run.device)
    reads = [run.init / "text_encoder_2"] if run.init else []
    first = run.first(reads)
    batches = data.requests_of(run.source).batches(
        20_000_000 + first, run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        ids, mask = data.token_ids(tokenizer, drawn.captions)
        words = torch.full_like(ids, UNASKED)
        holed = (len(ids) + 1) // 2 if drawn.scenes else len(ids)  # captions with masked words
        collate = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=0.25, seed=first + step
        )
        masked = collate([{"input_ids": one} for one in ids[:holed]])
        ids[:holed], words[:holed] = masked["input_ids"], masked["labels"]
        hidden = model(ids.to(run.device), mask.to(run.device))
        words = words.to(run.device)
        asked = words != UNASKED
        loss, accuracy = cross_entropy(model.words.cls(hidden[asked]), words[asked])
        measured = {"words": loss, "accuracy": accuracy}
        if drawn.scenes:
            answers = word_answers(tokenizer, drawn.captions, drawn.scenes)[holed:]
            grounding, accuracies = model.questions.losses(hidden[holed:], answers.to(run.device))
            loss, measured = loss + grounding, measured | accuracies
        return {"loss": loss, **measured}

    trained = run.trainer(model, "bert", 1e-3, 0.99, reads).run(loss_at, batches)
    tokenizer.save_pretrained(run.checkpoint / "tokenizer_2")
    save_part(trained.words.bert, run.checkpoint / "text_encoder_2")


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH, warm_start=True)
