"""KerplePrior: learned smooth decay with the lag, logarithmic or a power."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_choice
from eotattn.priors.base import LogPrior
from eotattn.priors.far_form import FarForm, Tail

__all__ = ["KerplePrior"]

#: Beyond these tokens a sum of a few exponentials is the decay.
SMOOTH_FROM = 128


class KerplePrior(LogPrior):
    """KERPLE: log_prior = -amplitude log(1 + rate |lag|), or -amplitude |lag|^exponent with an exponent of at most 2.

    Amplitudes, rates and exponents are the sizes of their parameters, with a gradient at zero too. Heads start
    spread: amplitudes from 0 to 2, slow decays first in rates from 0 to 1 or exponents from 0 to 2.

    Args:
        num_heads: Number of query heads H.
        form: ``"log"`` or ``"power"``.

    Attributes:
        amplitude: (H,) nats.
        rate: (H,) a token, of the form ``"log"``.
        exponent: (H,) dimensionless, of the form ``"power"``.

    Source:
        Chi, Fan, Ramadge and Rudnicky 2022 (arXiv 2205.09921), the two variants that they train.

    Example:
        >>> KerplePrior(1).dense(torch.tensor([2]), torch.tensor([0, 4, 5]))
        tensor([[[-0.6931, -0.6931, -0.9163]]], grad_fn=<ToCopyBackward0>)
    """

    is_relative = True

    def __init__(self, num_heads: int, form: str = "log") -> None:
        super().__init__(num_heads)
        self.form = check_choice("KerplePrior", "form", form, ("log", "power"))
        self.amplitude = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.register_parameter("rate" if form == "log" else "exponent", nn.Parameter(torch.empty(num_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads spread over the ranges."""
        spread = (torch.arange(self.num_heads) + 0.5) / self.num_heads
        amplitude, shape = self.parameters()
        with torch.no_grad():
            amplitude.copy_(2 * spread.flip(0))
            shape.copy_(spread if self.form == "log" else 2 * spread)

    def decay(self, head: Tensor, distance: Tensor) -> Tensor:
        """The log-prior at distances of at least zero tokens, in nats, in their dtype."""
        amplitude, shape = (_size(parameter).to(distance.dtype)[head] for parameter in self.parameters())
        if self.form == "log":
            return -amplitude * torch.log1p(shape * distance)
        tiny = torch.finfo(distance.dtype).tiny  # a power of zero has no derivative
        return -amplitude * torch.where(distance > 0, distance.clamp(min=tiny) ** shape.clamp(max=2.0), 0.0)

    def far_form(self) -> FarForm:
        """The decay, far enough away to be smooth."""
        heads = torch.arange(self.num_heads, device=self.amplitude.device)[:, None]
        tail = Tail(decay=lambda distance: self.decay(heads, distance))
        return FarForm(SMOOTH_FROM, tail, tail)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The decay of the lag's size, in nats."""
        return self.decay(head, (query_position - key_position).abs())


def _size(parameter: Tensor) -> Tensor:
    return torch.where(parameter >= 0, parameter, -parameter)  # unlike abs, has a gradient at zero
