"""`python -m examples.scenes.order`: BERT says where objects stand of which captions leave it open.

"A star left of a square; a ring is left of the square" leaves open where the ring is to the star,
and a painter that has to decide it from noise often paints a mixture of both, twice. So of the
object that is named last BERT learns to say what it says where the caption spells it out, "a ring
is below the star" (context distillation, arXiv:2209.15189): the first named comes first, from above
or from the left. "A ring between a star and a square" may be a row or a column, and both are rare
in training; BERT learns to say "a ring below a star; a square is below the ring". For the same
reason one object is large where captions leave its size open, and several are small. All else it
says as before, so the fusion head and the UNets stay as they are. Writes `text_encoder_2/`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter

import torch
from torch import Tensor
from transformers import BertModel, BertTokenizer

from examples.scenes.scenes import SIZES, Scene, says_between, sizes_named, spelled_out
from networks.loading import load_part
from training.cli import stage_cli
from training.data import MAX_TOKENS, BadInput, Batch, knows_truth, requests_of, token_ids
from training.diffusion import BERT_LAYERS
from training.run import Run, check_trained, save_part

STEPS, BATCH = 500, 96
LEARNING_RATE, EMA_DECAY = 1e-3, 0.99
KEPT = 6.0  # weight of what stays: without it other captions are painted worse
# Words around "between" and before names, and those in their place where it is spelled out.
STANDS_FOR = {"between": "below", "and": ";", "them": "it", "an": "a"}


def train(run: Run) -> None:
    check_trained(run.checkpoint, "tokenizer_2", "text_encoder_2")
    if not knows_truth(run.source):
        raise BadInput("--data: examples.scenes.order needs scenes, whose truth is known")
    folder = run.checkpoint / "text_encoder_2"
    tokenizer = BertTokenizer.from_pretrained(run.checkpoint / "tokenizer_2")
    bert = load_part(folder, BertModel, add_pooling_layer=False).to(run.device)
    before = copy.deepcopy(bert).requires_grad_(False)
    bert.requires_grad_(True)
    trainer = run.trainer(bert, "order", LEARNING_RATE, EMA_DECAY, [folder])
    batches = requests_of(run.source).batches(
        87_000_000 + run.first([folder]), run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        spelled = [
            sizes_named(scene, spelled_out(scene, caption))
            for scene, caption in zip(drawn.scenes, drawn.captions, strict=True)
        ]
        asked, told = (token_ids(tokenizer, c, run.device) for c in (drawn.captions, spelled))
        sources, layers = same_words(tokenizer, drawn, spelled)
        wanted, said = targets(before, asked, told, sources.to(run.device), layers.to(run.device))
        error = (states(bert, *asked) - wanted).square().mean((0, 3))
        there = asked[1].bool()
        means = {
            "said": error[said].sum() / max(1, int(said.sum())),
            "kept": error[~said & there].mean(),
        }
        return {"loss": torch.where(said, error, KEPT * error)[there].mean(), **means}

    save_part(trainer.run(loss_at, batches), folder)


def same_words(tokenizer: BertTokenizer, batch: Batch, spelled: list[str]) -> tuple[Tensor, Tensor]:
    """Where captions are spelled out, which token there says what a token of a caption is to say.

    It is the same word, of the same object if it is in a name; up to the last name, as what comes
    after may be worded otherwise. One object between two others is named elsewhere, and of the
    words beside the names each has one that stands for it. All that can be told there in the last
    layer alone, as lower ones do not know yet whether a caption leaves anything open; the word
    "between" they all see.

    Returns:
        Indices of tokens, -1 where a token is to say what it says: (B, `MAX_TOKENS`). And whether
        a caption is to say it in every layer that the fusion head reads, (B,).
    """
    sources = torch.full((len(spelled), MAX_TOKENS), -1)
    between = [says_between(caption) for caption in batch.captions]
    for row, (scene, caption, told) in enumerate(
        zip(batch.scenes, batch.captions, spelled, strict=True)
    ):
        if told == caption:
            continue
        here, there = (words(tokenizer, scene, text) for text in (caption, told))
        if not between[row]:
            here = here[: 1 + max(i for i, (name, *_) in enumerate(here) if name >= 0)]
        found = [there.index(word) if word in there else -1 for word in here]
        sources[row, : len(found)] = torch.tensor(found)
    return sources, torch.tensor(between)


def words(tokenizer: BertTokenizer, scene: Scene, caption: str) -> list[tuple[int, str, int]]:
    """Of every token: the name that it is in or -1, its word, how often both came before."""
    encoded, sizes = tokenizer(caption, return_offsets_mapping=True), f"(?:{'|'.join(SIZES)})"
    names = [
        next(re.finditer(f"(an? )?({sizes} )?{item.colour} {item.shape}", caption)).span()
        for item in scene.items
    ]
    seen: Counter[tuple[int, str]] = Counter()
    found = []
    for token, (start, end) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        whose = [k for k, (first, past) in enumerate(names) if first <= start < end <= past]
        word = (whose[0] if whose else -1, STANDS_FOR.get(token, token))
        found.append((*word, seen[word]))
        seen[word] += 1
    return found


@torch.no_grad()
def targets(
    bert: BertModel,
    caption: tuple[Tensor, Tensor],
    spelled: tuple[Tensor, Tensor],
    sources: Tensor,
    all_layers: Tensor,
) -> tuple[Tensor, Tensor]:
    """What BERT is to say of captions, in every layer, and which tokens change: (B, L).

    Args:
        caption, spelled: ids and mask, both (B, L).
        sources, all_layers: as `same_words` has them.
    """
    wanted, told = states(bert, *caption), states(bert, *spelled)
    said = sources >= 0
    rows = torch.arange(len(sources), device=sources.device)[:, None]
    for layer in BERT_LAYERS:
        here = said if layer == BERT_LAYERS[-1] else said & all_layers[:, None]
        wanted[layer][here] = told[layer][rows, sources.clamp(min=0)][here]
    return wanted, said


def states(bert: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of every layer, the embeddings first: (layers + 1, B, L, width)."""
    return torch.stack(bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states)


if __name__ == "__main__":
    stage_cli(train, STEPS, BATCH)
