"""Classification with labels that are left out. Knows nothing of models."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label that torch's cross entropy leaves out


def cross_entropy(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy of scores (N, choices) over labels that are not `IGNORED`.

    Both are 0 if no label counts.
    """
    n = max(1, int((labels != IGNORED).sum()))
    hits = scores.argmax(-1) == labels
    return F.cross_entropy(scores.float(), labels, reduction="sum") / n, hits.sum() / n
