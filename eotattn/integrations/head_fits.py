"""The implicit priors of all heads of a model, fitted to a few texts.

Legend: H heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eotattn.checks import require
from eotattn.diagnostics import ImplicitPriorReport, fit_prior
from eotattn.integrations.attachment import attention_layers
from eotattn.integrations.capture import capture

__all__ = ["Head", "HeadFits", "fit_heads"]

#: Name of a layer, and a head of it.
Head = tuple[str, int]


@dataclass(frozen=True, eq=False)
class HeadFits:
    """What every head of a model does by position alone.

    Attributes:
        reports: Layer -> its implicit priors.
    """

    reports: dict[str, ImplicitPriorReport]

    @property
    def heads(self) -> list[Head]:
        """Every head, layer by layer."""
        return [(layer, head) for layer, report in self.reports.items() for head in range(len(report.explained))]

    @property
    def ranked(self) -> list[tuple[float, Head]]:
        """Held-out explained share and head, the best first; heads without one are left out."""
        shares = np.concatenate([report.explained for report in self.reports.values()])
        pairs = [(float(share), head) for share, head in zip(shares, self.heads, strict=True) if share == share]
        return sorted(pairs, key=lambda pair: -pair[0])

    def above(self, share: float) -> list[Head]:
        """Heads of which the prior explains more than ``share`` on texts that it was not fitted to."""
        return [head for explained, head in self.ranked if explained > share]

    def least(self, count: int) -> list[Head]:
        """The ``count`` heads that their priors explain least."""
        return [head for _, head in self.ranked[-count:]] if count else []


@torch.no_grad()
def fit_heads(model: nn.Module, texts: Sequence[Tensor]) -> HeadFits:
    """Fit the implicit prior of every self-attention head.

    Args:
        model: A causal model of transformers that takes token ids.
        texts: (1, L) ids each; at least two, so that the shares are held out.
    """
    require(len(texts) > 1, "fit_heads", "texts", "be at least two", len(texts), "Pass more texts")
    names = list(attention_layers(model))
    with capture(model, names, values=False) as captured:
        for ids in texts:
            model(ids)
    layers = captured.layers
    return HeadFits({name: fit_prior(layers[name], num_bootstraps=1) for name in names})
