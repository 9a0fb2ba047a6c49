"""A vision transformer whose knowledge of positions is chosen by name.

Legend: B batch, Ch channels, E embedding width, G patches along a side, H heads, L = 1 + G^2 tokens, R frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention import PriorAttention
from eotattn.checks import check_choice, check_positive, check_positive_int, require
from eotattn.priors import ClassTokenPrior, FourierPrior, GridPrior, LogPrior, SinkPrior, SumPrior, grid_positions

__all__ = ["POSITION_KINDS", "POSITION_UNITS", "VisionConfig", "VisionTransformer"]

#: How a vision transformer can know positions.
POSITION_KINDS = ("goat", "learned", "sinusoidal", "none")
#: What one unit of a position is: a patch, or a patch of a training image, so that positions span the same range.
POSITION_UNITS = ("patch", "image")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision transformer and the name of its position knowledge; the names share every other size.

    Args:
        positions: A name in :data:`POSITION_KINDS`.
        num_classes: Number of labels.
        channels: Channels Ch of an image.
        patch_size: Rows and columns of a patch, pixels.
        train_grid: Patches G along the side of a training image.
        num_layers: Blocks.
        embed_dim: Width E, a multiple of 4 and of ``num_heads``.
        num_heads: Heads of every block.
        num_frequencies: Frequencies of ``"goat"``, shared evenly by the two axes.
        num_key_frequencies: Wave frequencies of its key-only part, on each axis.
        min_period: Shortest period of its relative part, patches.
        max_period: Longest period, patches.
        unit: A name in :data:`POSITION_UNITS`: what the positions of ``"goat"`` and ``"sinusoidal"`` are counted in on
            images larger than those of training. A learned table is always stretched to the image.

    Example:
        >>> VisionConfig("goat", num_classes=10).train_grid
        8
    """

    positions: str
    num_classes: int
    channels: int = 1
    patch_size: int = 1
    train_grid: int = 8
    num_layers: int = 2
    embed_dim: int = 32
    num_heads: int = 4
    num_frequencies: int = 16
    num_key_frequencies: int = 2
    min_period: float = 2.5
    max_period: float = 32.0
    unit: str = "patch"

    def __post_init__(self) -> None:
        owner = "VisionConfig"
        check_choice(owner, "positions", self.positions, POSITION_KINDS)
        check_choice(owner, "unit", self.unit, POSITION_UNITS)
        sizes = ("num_classes", "channels", "patch_size", "train_grid", "num_layers", "embed_dim", "num_heads")
        for name in (*sizes, "num_frequencies"):
            check_positive_int(owner, name, getattr(self, name))
        check_positive_int(owner, "num_key_frequencies", self.num_key_frequencies, minimum=0)
        for name in ("min_period", "max_period"):
            check_positive(owner, name, getattr(self, name))
        fits = self.embed_dim % math.lcm(4, self.num_heads) == 0
        rule = f"be a multiple of 4 and of num_heads = {self.num_heads}"
        require(fits, owner, "embed_dim", rule, self.embed_dim, "Change one of them")
        even = self.num_frequencies % 2 == 0
        require(even, owner, "num_frequencies", "be even, to serve two axes", self.num_frequencies, "Add one")


def _axis_prior(config: VisionConfig) -> LogPrior:
    """Waves of the lag along one axis, and a key-only part; both start at exactly zero."""
    relative = FourierPrior(config.num_heads, config.num_frequencies // 2, config.min_period, config.max_period)
    shortest = min(16.0, 2.0 * config.train_grid)
    return relative + SinkPrior(config.num_heads, config.num_key_frequencies, float(config.train_grid), shortest)


def _grid_prior(config: VisionConfig) -> LogPrior:
    """The paper's prior on a grid: a sum over the axes, a class token without relative lanes, a uniform start."""
    return GridPrior(_axis_prior(config), _axis_prior(config)) + ClassTokenPrior(config.num_heads)


class EncoderBlock(nn.Module):
    """One pre-norm block without a mask: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.embed_dim
        prior = _grid_prior(config) if config.positions == "goat" else None
        self.attention_norm = nn.LayerNorm(width)
        self.attention = PriorAttention(width, config.num_heads, prior=prior, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Map (B, L, E) hidden states at (L, 2) positions to (B, L, E)."""
        normed = self.attention_norm(hidden)
        attended, _ = self.attention(normed, need_weights=False, query_positions=positions)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class VisionTransformer(nn.Module):
    """A vision transformer with a class token: images of any resolution in, logits of the classes out.

    All kinds of positions have the same content path, so the same start for one seed.

    Args:
        config: Sizes and the name of the position knowledge.

    Example:
        >>> network = VisionTransformer(VisionConfig("goat", num_classes=10, num_layers=1))
        >>> network(torch.zeros(2, 1, 8, 8)).shape, network(torch.zeros(2, 1, 16, 16)).shape
        (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patches = nn.Conv2d(config.channels, width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.blocks = cast("Sequence[EncoderBlock]", blocks)
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, config.num_classes)
        if config.positions == "learned":  # last, so that everything before it starts alike in every kind
            self.table = nn.Parameter(torch.randn(1, width, config.train_grid, config.train_grid) * 0.1)

    @property
    def priors(self) -> list[SumPrior]:
        """The learned log-priors of a GOAT network, one a block: of the grid, then of the class token."""
        found = [block.attention.prior for block in self.blocks]
        return [prior for prior in found if isinstance(prior, SumPrior)]

    def forward(self, images: Tensor, *, unit: str | None = None) -> Tensor:
        """Classify images.

        Returns:
            (B, num_classes) logits.
        """
        size, patch = images.shape[-1], self.config.patch_size
        square = images.dim() == 4 and images.shape[-2] == size and size % patch == 0
        rule = f"be square, with sides that are multiples of patch_size = {patch}"
        require(square, "VisionTransformer", "images", rule, images, "Crop or resize them")
        unit = check_choice("VisionTransformer", "unit", self.config.unit if unit is None else unit, POSITION_UNITS)
        grid = size // patch
        scale = self.config.train_grid / grid if unit == "image" else 1.0
        hidden = self.patches(images) + self._embedding(grid, scale)
        hidden = hidden.flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_token.expand(len(images), -1, -1), hidden], dim=1)
        positions = self._positions(grid, scale) if self.config.positions == "goat" else None
        for block in self.blocks:
            hidden = block(hidden, positions)
        return self.readout(self.norm(hidden[:, 0]))

    def _positions(self, grid: int, scale: float) -> Tensor:
        """(L, 2) positions of the class token and of the patches; the first patch lies at zero."""
        positions = grid_positions(grid, grid, class_token=True, device=self.class_token.device)
        return positions if scale == 1 else torch.where(positions < 0, positions, positions * scale)

    def _embedding(self, grid: int, scale: float) -> Tensor:
        """(1, E, G, G) or a scalar, added to the patches' embeddings; the class token gets none."""
        if self.config.positions == "learned":
            if grid == self.config.train_grid:
                return self.table
            return functional.interpolate(self.table, size=(grid, grid), mode="bicubic", align_corners=False)
        if self.config.positions != "sinusoidal":
            return torch.zeros((), device=self.class_token.device)
        place = (torch.arange(grid, device=self.class_token.device) + 0.5) * scale - 0.5
        quarter = self.config.embed_dim // 4
        frequency = 10_000.0 ** (-torch.arange(quarter, device=place.device) / quarter)
        wave = place[:, None] * frequency
        axis = torch.cat([wave.sin(), wave.cos()], dim=-1).T  # (E / 2, G)
        rows = axis[:, :, None].expand(-1, -1, grid)
        return torch.cat([rows, axis[:, None, :].expand(-1, grid, -1)]).unsqueeze(0)
