"""Which numbers of a network are those of its log-priors."""

from __future__ import annotations

from torch import nn

from eotattn.checks import require
from eotattn.priors.base import LogPrior

__all__ = ["split_parameters"]


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of the content and those of the log-priors, each once, for an optimiser's groups.

    A log-prior's numbers are nats, and AdamW moves a number by its rate a step at most: ten times the content's rate
    lets them go where training wants them. Weight decay would pull them back to where they started.

    Args:
        module: Any module; log-priors anywhere inside it count.

    Returns:
        ``(content, priors)``, in the order of ``module.parameters()``; frozen parameters are in neither.

    Example:
        >>> from eotattn import PriorAttention, goat_prior
        >>> layer = PriorAttention(16, num_heads=4, prior=goat_prior(4), batch_first=True)
        >>> content, priors = split_parameters(layer)
        >>> len(content) + len(priors) == len(list(layer.parameters()))
        True

    Source: original; the ablations measured the rate.
    """
    is_module, remedy = isinstance(module, nn.Module), "Wrap a list: nn.ModuleList"
    require(is_module, "split_parameters", "module", "be a module", module, remedy, error=TypeError)
    of_priors = {id(p) for part in module.modules() if isinstance(part, LogPrior) for p in part.parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) not in of_priors], [p for p in trainable if id(p) in of_priors]
