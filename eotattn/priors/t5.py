"""T5Prior: a learned number for every bucket of lags; buckets grow with the logarithm of the lag."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_positive_int, check_shape, require
from eotattn.priors.memory import constants
from eotattn.priors.relative_bias import LagTablePrior

__all__ = ["T5Prior", "t5_buckets"]


def t5_buckets(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The bucket of the lags 0, 1, 2, ... on one side, up to the first lag of the last bucket; others are in it too.

    With e = num_buckets // 2 the first e lags have buckets of their own, and a lag n beyond is in bucket
    e + floor((num_buckets - e) log(n / e) / log(max_distance / e)), compared here in whole numbers.

    Source:
        Raffel et al. 2020 (arXiv 1910.10683), section 2.1, and their published code.

    Example:
        >>> t5_buckets(6, 12)
        (0, 1, 2, 3, 3, 4, 4, 4, 5)
    """
    exact, rest = num_buckets // 2, num_buckets - num_buckets // 2
    buckets = list(range(exact))
    for bucket in range(exact, num_buckets - 1):
        step = bucket - exact + 1  # the next bucket starts at n with (n / e)^rest >= (max_distance / e)^step
        lag = len(buckets)
        while lag**rest * exact**step < max_distance**step * exact**rest:
            buckets.append(bucket)
            lag += 1
    return (*buckets, num_buckets - 1)


class T5Prior(LagTablePrior):
    """T5's relative bias: log_prior = table[head, bucket(key_position - query_position)]; T5 attends with scale 1.

    Bidirectional: half of the buckets are for keys after the query. Causal: all are for keys at or before it, and keys
    after it have the bucket of lag zero. Starts neutral.

    Args:
        num_heads: Number of query heads H.
        num_buckets: Buckets N, at least 4, even where both directions share them.
        max_distance: Lags from here on share the last bucket, tokens.
        bidirectional: Whether keys after the query have buckets of their own, as in encoders.

    Attributes:
        table: (H, N) nats.

    Source:
        Raffel et al. 2020 (arXiv 1910.10683), section 2.1.

    Example:
        >>> T5Prior(8).reach, T5Prior(8, bidirectional=False).reach
        (91, 113)
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True
    ) -> None:
        owner, sides = "T5Prior", 2 if bidirectional else 1
        check_positive_int(owner, "num_buckets", num_buckets, minimum=2 * sides)
        even, remedy = num_buckets % sides == 0, "Half of them are for keys after the query"
        require(even, owner, "num_buckets", "be even where it is bidirectional", num_buckets, remedy)
        self.num_buckets, self.bidirectional = num_buckets, bidirectional
        exact = num_buckets // sides // 2
        self.max_distance = check_positive_int(owner, "max_distance", max_distance, minimum=exact + 1)
        past = t5_buckets(num_buckets // sides, max_distance)
        future = [bucket + num_buckets // 2 for bucket in past[1:]] if bidirectional else [0] * (len(past) - 1)
        self.entries = (*future[::-1], *past)
        super().__init__(num_heads, num_buckets, len(past) - 1)

    @classmethod
    def from_t5(
        cls, weight: Tensor, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> T5Prior:
        """The prior of a trained T5: ``relative_attention_bias.weight`` of its first layer, copied.

        Args:
            weight: (N, H) nats.
            num_buckets: ``relative_attention_num_buckets`` N of its configuration.
            max_distance: ``relative_attention_max_distance`` of its configuration, tokens.
            bidirectional: True for its encoder, false for its decoder.

        Raises:
            ValueError: If the table is not of that shape.
        """
        check_floating("T5Prior.from_t5", "weight", weight)
        remedy = "Pass relative_attention_bias.weight and its num_buckets"
        check_shape("T5Prior.from_t5", "weight", weight, (num_buckets, None), remedy)
        prior = cls(weight.shape[1], num_buckets, max_distance, bidirectional=bidirectional).to(weight.device)
        with torch.no_grad():
            prior.table.copy_(weight.T)
        return prior

    def entry(self, lag: Tensor) -> Tensor:
        """The lag's bucket."""
        return constants(self.entries, lag.device, torch.int64)[lag + self.reach]
