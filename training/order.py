"""`python -m training.order`: BERT says how two objects stand of which captions say the same.

"A star left of a square; a ring is left of the square" leaves open where the ring is to the star,
and a painter that has to decide it from noise often paints a mixture of both, twice. So of the
object that is named last BERT learns to say what it says where the caption spells it out, "a ring
is below the star" (context distillation, arXiv:2209.15189): the first named comes first, from above
or from the left. All else it says as before, so the fusion head and the UNets stay as they are.
Writes `text_encoder_2/`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import BertModel, BertTokenizer

from export.checkpoint import load_part
from training.cli import stage_cli
from training.data import BadInput, knows_truth, requests_of, token_ids
from training.run import Run, check_trained, save_part
from training.scenes import spelled_out

STEPS, BATCH = 1000, 96
LEARNING_RATE, EMA_DECAY = 1e-3, 0.99


def train(run: Run) -> None:
    check_trained(run.checkpoint, "tokenizer_2", "text_encoder_2")
    if not knows_truth(run.source):
        raise BadInput("--data: training.order needs scenes, whose truth is known")
    folder = run.checkpoint / "text_encoder_2"
    tokenizer = BertTokenizer.from_pretrained(run.checkpoint / "tokenizer_2")
    bert = load_part(folder, BertModel, add_pooling_layer=False).to(run.device)
    before = copy.deepcopy(bert).requires_grad_(False)
    trainer = run.trainer(bert.requires_grad_(True), "order", LEARNING_RATE, EMA_DECAY)
    batches = requests_of(run.source).batches(
        87_000_000 + run.first([folder]), run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        spelled = [*map(spelled_out, drawn.scenes, drawn.captions)]
        ids, mask = token_ids(tokenizer, drawn.captions, run.device)
        told, told_mask = token_ids(tokenizer, spelled, run.device)
        wanted, begun = targets(before, (ids, mask), (told, told_mask))
        error = (states(bert, ids, mask) - wanted).square().mean((0, 3))
        said, kept = error[begun], error[~begun & mask.bool()]
        means = {"said": said.sum() / max(1, len(said)), "kept": kept.mean()}
        return {"loss": torch.cat([said, kept]).mean(), **means}

    save_part(trainer.run(loss_at, batches), folder)


@torch.no_grad()
def targets(
    bert: BertModel, caption: tuple[Tensor, Tensor], spelled: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What BERT is to say of captions, and the tokens of which it said something else: (B, L).

    Up to where a caption that is spelled out says something else, after the last name, its last
    hidden state is what BERT says of that one. All else is what BERT says of the caption: lower
    layers cannot tell yet whether it leaves anything open.

    Args:
        caption, spelled: ids and mask, both (B, L).
    """
    same = caption[0] == spelled[0]
    begun = same.cumprod(1).bool() & ~same.all(1, keepdim=True)
    wanted = states(bert, *caption)
    wanted[-1][begun] = states(bert, *spelled)[-1][begun]
    return wanted, begun


def states(bert: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of every layer, the embeddings first: (layers + 1, B, L, width)."""
    return torch.stack(bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states)


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
