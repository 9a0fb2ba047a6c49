"""Sampling from a decoder with a cache: each token is computed once.

Legend: B batch, L prompt tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.experiments.networks import Decoder

__all__ = ["sample_continuations"]


@torch.no_grad()
def sample_continuations(network: Decoder, prompts: Tensor, length: int, *, seed: int, num_tokens: int) -> Tensor:
    """Draw what follows prompts from the network's own distribution, token by token.

    Returns:
        (B, length) int64, on the CPU.

    Example:
        >>> from eotattn.experiments.networks import DecoderConfig
        >>> network = Decoder(DecoderConfig("alibi", vocabulary_size=5, num_layers=1, embed_dim=16, num_heads=2)).eval()
        >>> sample_continuations(network, torch.zeros(2, 3, dtype=torch.long), 4, seed=0, num_tokens=4).shape
        torch.Size([2, 4])
    """
    owner = "sample_continuations"
    check_positive_int(owner, "length", length)
    require(not network.training, owner, "network", "be in evaluation mode", "training mode", "Call network.eval()")
    fits = 1 <= num_tokens <= network.config.vocabulary_size
    rule = f"lie between 1 and the vocabulary's {network.config.vocabulary_size}"
    require(fits, owner, "num_tokens", rule, num_tokens, "Count the tokens")
    device = next(network.parameters()).device
    draws = torch.rand(length, prompts.shape[0], 1, generator=torch.Generator().manual_seed(seed)).to(device)
    caches = network.make_caches(prompts.shape[0], prompts.shape[1] + length)
    tokens, drawn = prompts.to(device), []
    for t in range(length):
        logits = network(tokens, num_targets=1, caches=caches)[:, 0, :num_tokens].double()
        cumulative = logits.softmax(-1).cumsum(-1)
        tokens = (draws[t] >= cumulative).sum(-1, keepdim=True).clamp(max=num_tokens - 1)
        drawn.append(tokens)
    return torch.cat(drawn, dim=1).cpu()
