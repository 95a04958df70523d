"""What a VQGAN learns from: colours as eyes weigh them, perception, and a discriminator.

Knows nothing of autoencoders: everything here compares pictures (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from transformers import CLIPVisionModelWithProjection

# Rows: lightness, red against green, yellow against blue; orthogonal, hue twice as large.
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [2.0], [2.0]])


def opponent(picture: Tensor) -> Tensor:
    """RGB (B, 3, H, W) in opponent colours."""
    return torch.einsum("oc,bchw->bohw", OPPONENT.to(picture.device), picture)


def rgb(picture: Tensor) -> Tensor:
    """Opponent colours (B, 3, H, W) in RGB."""
    back = torch.linalg.inv(OPPONENT).to(picture.device)
    return torch.einsum("co,bohw->bchw", back, picture)


def reconstruction(y: Tensor, x: Tensor) -> Tensor:
    """Squared and absolute error of RGB pictures in opponent colours."""
    y, x = opponent(y), opponent(x)
    return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x)


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x))


class Perception:
    """Distances as a vision tower sees them (after LPIPS, arXiv:1801.03924, equation 1)."""

    def __init__(self, tower: CLIPVisionModelWithProjection):
        self._tower = tower.requires_grad_(False).eval()
        self._patch = tower.config.patch_size

    def __call__(self, y: Tensor, x: Tensor, shift: tuple[int, int]) -> Tensor:
        """Mean squared distance of unit features over layers; `shift` moves the patch grid."""
        with torch.no_grad():
            wanted = self._features(x, shift)
        pairs = zip(self._features(y, shift), wanted, strict=True)
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in pairs]).mean()

    def _features(self, picture: Tensor, shift: tuple[int, int]) -> list[Tensor]:
        moved = picture.roll([s % self._patch for s in shift], dims=(2, 3))
        states = self._tower(moved, output_hidden_states=True).hidden_states[1:]
        return [F.normalize(state[:, 1:].float(), dim=-1) for state in states]


class Discriminator(nn.Sequential):
    """Judges overlapping patches of 22 pixels: (B, 3, H, W) to (B, 1, H/4 - 1, W/4 - 1)."""

    def __init__(self, width: int = 32):
        super().__init__(
            spectral_norm(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 4 * width, 4, 1, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1),
        )  # fmt: skip


def hinge(judge: nn.Module, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge losses: what `y` pays for being seen through, and what the judge pays for errors.

    The first does not reach the judge's weights, the second does not reach `y`.
    """
    judge.requires_grad_(False)
    fooling = -judge(y).float().mean()
    judge.requires_grad_(True)
    judging = F.relu(1 - judge(x).float()).mean() + F.relu(1 + judge(y.detach()).float()).mean()
    return fooling, judging


def adaptive_weight(loss: Tensor, fooling: Tensor, last: Tensor) -> Tensor:
    """How much larger the gradient of `loss` at the last layer is (arXiv:2012.09841, equation 7).

    At most 100.
    """
    a, b = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (loss, fooling))
    return (a.norm() / (b.norm() + 1e-6)).clamp(max=100).detach()
