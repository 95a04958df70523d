"""Which channels of a network can go, what each is worth, and which go first.

Channels that only one layer reads can go without a change to anything else: attention heads,
feed-forward widths, the channels between the two convolutions of a residual block. Residual
streams, inputs and outputs keep their widths. torch-pruning finds in the traced graph which
layers must narrow together. Knows nothing of checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks.pruned import head_attribute

MULTIPLE = 8  # widths without heads or norms fall by multiples of this, for matrix units


@dataclass(eq=False)
class ChannelGroup:
    """Channels that one layer reads.

    Attributes:
        graph: that the layers were found in.
        reader: the layer that reads the channels.
        writers: the layers that write them, with the outputs of each for one channel: GEGLU
            has two.
        head_width: channels of a head, where they belong to an attention layer.
        norm_groups: of the GroupNorm on the way, where there is one.
        attention_macs: of scores and weighted values, for one channel.
        units: channels that go together, least important first, and the importance of each.
    """

    graph: tp.DependencyGraph
    reader: nn.Module
    writers: dict[nn.Module, int]
    head_width: int | None
    norm_groups: int | None
    attention_macs: int = 0
    units: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.reader.weight.shape[1]

    @property
    def heads(self) -> int:
        return self.width // self.head_width if self.head_width else 0

    def remove(self, channels: list[int]) -> None:
        _coupled(self.graph, self.reader, channels).prune()


def channel_groups(module: nn.Module, example: Mapping[str, Tensor]) -> list[ChannelGroup]:
    """All groups of a network; `example` are inputs to trace it with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(module, example_inputs=dict(example))
    return list(_groups(graph, module))


def _groups(graph: tp.DependencyGraph, module: nn.Module) -> Iterator[ChannelGroup]:
    parents = {child: layer for layer in module.modules() for child in layer.children()}
    for reader in module.modules():
        if not _narrows(reader) or reader not in graph.module2node:
            continue
        writers: dict[nn.Module, int] = {}
        norms, private = [], True
        for dependency, indices in _coupled(graph, reader, [0]):
            layer = dependency.target.module
            if isinstance(layer, nn.GroupNorm):
                norms.append(layer.num_groups)
            elif isinstance(layer, nn.LayerNorm | nn.Embedding):
                private = False  # a residual stream of tokens
            elif _narrows(layer) and graph.is_out_channel_pruning_fn(dependency.handler):
                writers[layer] = len(indices)
            elif _narrows(layer) and layer is not reader:
                private = False  # another layer reads it too
        if not writers or not private:
            continue
        owner = parents[next(iter(writers))]
        attention = head_attribute(owner) if len(writers) >= 3 else None
        head_width = reader.weight.shape[1] // getattr(owner, attention) if attention else None
        yield ChannelGroup(graph, reader, writers, head_width, max(norms, default=None))


def _narrows(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _coupled(graph: tp.DependencyGraph, reader: nn.Module, channels: list[int]) -> tp.Group:
    linear = isinstance(reader, nn.Linear)
    cut = tp.prune_linear_in_channels if linear else tp.prune_conv_in_channels
    return graph.get_pruning_group(reader, cut, channels)


def importances(
    module: nn.Module, groups: list[ChannelGroup], rows: Mapping[str, Tensor]
) -> list[Tensor]:
    """Group Fisher information (arXiv:2108.00708, 3.2) of channels, or of heads.

    With a gate on each channel where it is read, the squared change of the output when the
    gate closes is, to first order, the squared norm of the output's slope along the gate. The
    slope along a random direction of the output estimates that without bias, so each row of
    inputs costs one backward pass and no labels are needed.

    Returns:
        one tensor a group: (heads,) where it has them, else (width,).
    """
    module.requires_grad_(False)
    weights = [group.reader.weight.requires_grad_(True) for group in groups]
    totals = [torch.zeros(group.heads or group.width) for group in groups]
    draw = torch.Generator().manual_seed(0)
    count = len(next(iter(rows.values())))
    for k in range(count):
        output = module(**{name: tensor[k : k + 1] for name, tensor in rows.items()})
        direction = torch.randn(output.shape, generator=draw)
        slopes = torch.autograd.grad(output, weights, direction, allow_unused=True)
        for total, weight, slope in zip(totals, weights, slopes, strict=True):
            if slope is not None:  # None where the output does not depend on the layer
                gates = (weight * slope).detach().transpose(0, 1).flatten(1).sum(1)
                total += gates.view(len(total), -1).sum(1) ** 2 / count
    module.requires_grad_(True)
    return totals


def units(group: ChannelGroup, importance: Tensor) -> list[tuple[float, list[int]]]:
    """Channels that go together, least important first.

    A head; as many channels of each group of a GroupNorm, so that every other channel keeps
    its group; or `MULTIPLE` channels.
    """
    if group.heads:
        chosen = torch.arange(group.width).view(group.heads, -1)[importance.argsort()]
        worth = importance.sort().values
    else:
        rows = importance.view(group.norm_groups or 1, -1)  # (norm groups, channels of each)
        together = 1 if group.norm_groups else MULTIPLE
        first = torch.arange(0, group.width, rows.shape[1])[:, None]
        order = rows.argsort(dim=1)[:, : rows.shape[1] // together * together]
        chosen = (order + first).unflatten(1, (-1, together)).transpose(0, 1).flatten(1)
        worth = importance[chosen].sum(1)
    return [(float(w), unit.tolist()) for w, unit in zip(worth, chosen, strict=True)]


def choose(
    groups: list[ChannelGroup], positions: Mapping[nn.Module, int], wanted: int
) -> tuple[dict[ChannelGroup, list[int]], int]:
    """Channels to remove, in the order of importance over MACs, until `wanted` MACs are gone.

    Every group keeps its most important unit.

    Args:
        positions: tokens or pixels that each layer gives.

    Returns:
        the channels by group, and the MACs that go: fewer than `wanted` where no more can.
    """
    layers = {layer for group in groups for layer in (group.reader, *group.writers)}
    sizes = {layer: list(layer.weight.shape[:2]) for layer in layers}  # outputs, inputs
    saved = partial(_saved, sizes, positions)
    ranked = sorted(
        (worth / saved(group, len(unit)), i, j)
        for i, group in enumerate(groups)
        for j, (worth, unit) in enumerate(group.units[:-1])
    )
    gone: dict[ChannelGroup, list[int]] = {}
    removed = 0
    for _, i, j in ranked:
        if removed >= wanted:
            break
        group, unit = groups[i], groups[i].units[j][1]
        removed += saved(group, len(unit))
        sizes[group.reader][1] -= len(unit)
        for layer, outputs in group.writers.items():
            sizes[layer][0] -= len(unit) * outputs
        gone.setdefault(group, []).extend(unit)
    return gone, removed


def _saved(
    sizes: Mapping[nn.Module, list[int]],
    positions: Mapping[nn.Module, int],
    group: ChannelGroup,
    channels: int,
) -> int:
    """MACs that go with so many channels, at the widths that layers have left."""
    reader = group.reader
    each = group.attention_macs + positions[reader] * sizes[reader][0] * _kernel(reader)
    for layer, outputs in group.writers.items():
        each += outputs * positions[layer] * sizes[layer][1] * _kernel(layer)
    return channels * each


def _kernel(layer: nn.Module) -> int:
    return layer.weight[0, 0].numel()
