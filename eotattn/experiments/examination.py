"""How well a decoder answers: retrieval accuracy by context length and depth.

Legend: N sequences, A answer tokens, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eotattn.checks import check_positive_int
from eotattn.experiments.networks import Decoder
from eotattn.experiments.records import Row
from eotattn.experiments.tasks import Haystack, RetrievalTask

__all__ = ["correct_answers", "examine"]


@torch.no_grad()
def correct_answers(
    network: Decoder, haystack: Haystack, *, length: int, depth: float, count: int, batch_tokens: int = 32_768
) -> Tensor:
    """Which answer tokens a decoder gets right, each given the true ones before it.

    A row that is right throughout is what greedy decoding would have written, so exact matches need no decoding.

    Returns:
        (N, A) boolean.
    """
    check_positive_int("correct_answers", "batch_tokens", batch_tokens)
    tokens = RetrievalTask(length, (haystack,)).examination(haystack, count, depth=depth)
    device, answer = next(network.parameters()).device, haystack.answer_length
    found = []
    for rows in tokens.split(max(1, batch_tokens // length)):
        logits = network(rows[:, :-1].to(device), num_targets=answer)
        found.append(logits.argmax(-1).cpu() == rows[:, -answer:])
    return torch.cat(found)


def examine(
    network: Decoder, haystacks: Sequence[Haystack], *, lengths: Sequence[int], depths: Sequence[float], count: int
) -> list[Row]:
    """Accuracy of a decoder at every length and depth.

    Returns:
        Two rows a haystack, length and depth: the share of exact matches and the share of right answer tokens.
    """
    rows: list[Row] = []
    for haystack in haystacks:
        for length in lengths:
            for depth in depths:
                right = correct_answers(network, haystack, length=length, depth=depth, count=count)
                place = {"task": haystack.name, "length": length, "depth": depth, "count": count, "unit": "fraction"}
                exact = float(right.all(-1).double().mean())
                rows.append({"quantity": "exact_match", "value": exact} | place)
                rows.append({"quantity": "token_accuracy", "value": float(right.double().mean())} | place)
    return rows
