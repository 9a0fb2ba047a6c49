"""What a trained decoder loses when something is taken from it: u(j), eight of sixteen bits, the first tokens.

Legend: N windows, L tokens, T scored tokens.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.experiments.networks import Decoder
from eotattn.experiments.tasks.token_text import begin
from eotattn.priors import SinkPrior

__all__ = ["in_eight_bits", "keys_beyond", "target_losses", "without_key_only"]


@torch.no_grad()
def target_losses(
    network: Decoder,
    windows: Tensor,
    *,
    length: int,
    num_targets: int,
    beginning: int | None,
    hidden_keys: Tensor | None = None,
    batch_tokens: int = 65_536,
) -> Tensor:
    """Loss on the last tokens of every window, read with ``length`` tokens; the same tokens whatever the length.

    Returns:
        (N,) float64, mean nats a token.
    """
    device = network.embedding.weight.device
    losses = []
    for rows in windows[:, -(length + 1) :].split(max(1, batch_tokens // length)):
        inputs, targets = begin(rows.to(device), beginning)
        logits = network(inputs, num_targets=num_targets, hidden_keys=hidden_keys).float()
        each = functional.cross_entropy(logits.transpose(1, 2), targets[:, -num_targets:], reduction="none")
        losses.append(each.double().mean(-1))
    return torch.cat(losses).cpu()


def without_key_only(network: Decoder) -> Decoder | None:
    """A copy whose u(j) is zero; None where there is none."""
    changed = copy.deepcopy(network)
    parts = [module for module in changed.modules() if isinstance(module, SinkPrior)]
    for part in parts:
        part.reset_parameters()
    return changed if parts else None


def in_eight_bits(network: Decoder) -> Decoder:
    """A copy whose blocks multiply 8-bit matrices with 8-bit activations, both rounded by the largest entry.

    One scale a weight matrix and one an activation tensor: what a single outlier stretches, all entries lose.
    """
    changed = copy.deepcopy(network)
    for block in changed.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = _rounded(module.weight.data)
                module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0]),))
    return changed


def _rounded(x: Tensor) -> Tensor:
    """To 255 equally spaced numbers, the outermost of which is the largest entry."""
    step = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / step).round() * step


def keys_beyond(length: int, reach: int, *, keeps_first: bool, device: torch.device | None = None) -> Tensor:
    """(L, L) boolean, true for keys ``reach`` and more tokens back; the first one is spared if ``keeps_first``.

    Example:
        >>> keys_beyond(4, 2, keeps_first=True).int().tolist()[3]
        [0, 1, 0, 0]
    """
    position = torch.arange(length, device=device)
    hidden = position[:, None] - position >= reach
    hidden[:, 0] &= not keeps_first
    return hidden
