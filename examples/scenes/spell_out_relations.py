"""Stage `spell_out_relations`: BERT fills in the relations that captions leave open.

"A star left of a square; a ring is left of the square" leaves open how the ring relates to the
star, and a UNet that has to decide it from noise often paints a mixture of both, twice. So the
hidden states of the object that is named last become those that BERT gives if the caption spells it
out, "a ring is below the star" (context distillation, arXiv:2209.15189): the first named comes
first, from above or from the left. "A ring between a star and a square" may be a row or a column,
and both are rare in training; it becomes "a ring below a star; a square is below the ring". For the
same reason a single object becomes large if the caption leaves its size open, and several become
small. All other hidden states stay, so the fusion head and the UNets need no training. Writes
`bert/`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter

import torch
from torch import Tensor
from transformers import BertModel, BertTokenizer

from examples.scenes.scenes import SIZES, Scene, says_between, sizes_named, spelled_out
from examples.scenes.world import knows_truth
from networks.loading import load_part
from training.data import MAX_TOKENS, BadInput, Batch, token_ids
from training.diffusion import BERT_LAYERS
from training.run import Run, check_trained, save_part

STEPS, BATCH = 500, 96
LEARNING_RATE, EMA_DECAY = 1e-3, 0.99
KEPT = 6.0  # weight of states that stay: without it other captions are painted worse
# Words around "between" and before names, and their counterparts in the spelled-out caption.
COUNTERPARTS = {"between": "below", "and": ";", "them": "it", "an": "a"}


def train(run: Run) -> None:
    check_trained(run.checkpoint, "bert_tokenizer", "bert")
    if not knows_truth(run.source):
        raise BadInput("--data: the stage spell_out_relations needs scenes, whose truth is known")
    folder = run.checkpoint / "bert"
    tokenizer = BertTokenizer.from_pretrained(run.checkpoint / "bert_tokenizer")
    bert = load_part(folder, BertModel, add_pooling_layer=False).to(run.device)
    before = copy.deepcopy(bert).requires_grad_(False)
    bert.requires_grad_(True)
    trainer = run.trainer(bert, "spell_out_relations", LEARNING_RATE, EMA_DECAY, [folder])
    batches = run.source.batches(
        87_000_000 + run.first([folder]), run.batch, run.device, captions_only=True
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = batches.at(step)
        spelled = [
            sizes_named(scene, spelled_out(scene, caption))
            for scene, caption in zip(drawn.truth, drawn.captions, strict=True)
        ]
        short, full = (token_ids(tokenizer, c, run.device) for c in (drawn.captions, spelled))
        sources, layers = same_words(tokenizer, drawn, spelled)
        wanted, changed = targets(
            before, short, full, sources.to(run.device), layers.to(run.device)
        )
        error = (states(bert, *short) - wanted).square().mean((0, 3))
        present = short[1].bool()
        means = {
            "changed": error[changed].sum() / max(1, int(changed.sum())),
            "kept": error[~changed & present].mean(),
        }
        return {"loss": torch.where(changed, error, KEPT * error)[present].mean(), **means}

    save_part(trainer.run(loss_at, batches), folder)


def same_words(tokenizer: BertTokenizer, batch: Batch, spelled: list[str]) -> tuple[Tensor, Tensor]:
    """For each token of a caption, the token of the spelled-out caption whose state it takes.

    It is the same word, of the same object if it is in a name; up to the last name, as later words
    may differ. One object between two others is named elsewhere, and of the words beside the names
    each has a counterpart. Only the last layer can take these states, as lower ones do not know yet
    whether a caption leaves anything open; the word "between" they all see.

    Returns:
        Indices of tokens, -1 for a token that keeps its state: (B, `MAX_TOKENS`). And whether a
        caption takes states in every layer that the fusion head reads, (B,).
    """
    sources = torch.full((len(spelled), MAX_TOKENS), -1)
    between = [says_between(caption) for caption in batch.captions]
    for row, (scene, caption, full) in enumerate(
        zip(batch.truth, batch.captions, spelled, strict=True)
    ):
        if full == caption:
            continue
        here, there = (words(tokenizer, scene, text) for text in (caption, full))
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
        owners = [k for k, (first, past) in enumerate(names) if first <= start < end <= past]
        word = (owners[0] if owners else -1, COUNTERPARTS.get(token, token))
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
    """The hidden states that BERT learns for captions, of every layer, and which change: (B, L).

    Args:
        caption, spelled: ids and mask, both (B, L).
        sources, all_layers: as `same_words` returns them.
    """
    wanted, full = states(bert, *caption), states(bert, *spelled)
    changed = sources >= 0
    rows = torch.arange(len(sources), device=sources.device)[:, None]
    for layer in BERT_LAYERS:
        here = changed if layer == BERT_LAYERS[-1] else changed & all_layers[:, None]
        wanted[layer][here] = full[layer][rows, sources.clamp(min=0)][here]
    return wanted, changed


def states(bert: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of every layer, the embeddings first: (layers + 1, B, L, width)."""
    return torch.stack(bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states)
