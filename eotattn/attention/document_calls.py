"""Packed documents as calls of their own, for backends that know no documents.

Legend: B batch, H query heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Positions

__all__ = ["document_calls"]


def document_calls(call: AttentionCall) -> Iterator[AttentionCall]:
    """Every document of a call as a call of one sample; each lies in one row of the batch."""
    documents, start, length = call.masks.documents, 0, call.query.shape[2]
    assert documents is not None
    for count in documents.lengths:
        sample, first = divmod(start, length)
        start += count

        def of(side: Tensor | None, axis: int, sample: int = sample, first: int = first, count: int = count) -> Any:
            if side is None:
                return None
            row = side if side.shape[0] == 1 else side.narrow(0, sample, 1)
            return row.narrow(axis, first, count)

        at = Positions(None, 0, count, call.query.device)
        yield replace(
            call,
            query=of(call.query, 2),
            key=of(call.key, 2),
            value=of(call.value, 2),
            query_positions=at,
            key_positions=at,
            masks=replace(call.masks, documents=None, key_bias=of(call.masks.key_bias, -1)),
            key_bias=of(call.key_bias, -1),
            query_bias=of(call.query_bias, -1),
        )
