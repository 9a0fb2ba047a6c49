"""PackedDocuments: several documents laid end to end in one batch, each of which attends to itself alone.

Legend: B batch, L tokens of a row, T = B * L tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, fail, require
from eotattn.priors.memory import is_plain

__all__ = ["PackedDocuments"]


class PackedDocuments:
    """Lengths of the documents of a packed batch, row after row; positions start again at 0 in every document.

    The lengths are known on the host, so that no call waits for the device. Make the object once a batch and hand it to
    every layer. Padding at the end of a row is one more document, whose output is to be ignored.

    Args:
        lengths: Tokens of each document; no document goes on from one row of the batch to the next.

    Example:
        >>> documents = PackedDocuments([3, 2])
        >>> documents.positions(1, 5, torch.device("cpu"))
        tensor([[0, 1, 2, 0, 1]])
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        are_many, remedy = isinstance(lengths, Iterable), "Pass a list, also for one document"
        require(are_many, "PackedDocuments", "lengths", "be several numbers", lengths, remedy, error=TypeError)
        self.lengths = tuple(check_positive_int("PackedDocuments", "lengths", length) for length in lengths)
        require(len(self.lengths) > 0, "PackedDocuments", "lengths", "not be empty", self.lengths, "Pass some lengths")
        counts, numbers = torch.tensor(self.lengths), torch.arange(len(self.lengths))
        self.total = int(counts.sum())
        starts = counts.cumsum(0) - counts
        self._ids = numbers.repeat_interleave(counts)
        self._positions = torch.arange(self.total) - starts.repeat_interleave(counts)
        self._offsets = torch.cat([starts, counts.sum(0, keepdim=True)]).to(torch.int32)
        self._made: dict[tuple[Hashable, torch.device], Tensor] = {}

    @classmethod
    def from_ids(cls, ids: Tensor) -> PackedDocuments:
        """Documents of (B, L) or (L,) integer ids: a run of equal ids in a row is a document. Waits for the device.

        Example:
            >>> PackedDocuments.from_ids(torch.tensor([[7, 7, 7, 9], [9, 9, 2, 2]])).lengths
            (3, 1, 2, 2)
        """
        is_ids = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2) and ids.numel() > 0
        rule = "be an integer tensor (B, L) or (L,)"
        require(is_ids, "PackedDocuments", "ids", rule, ids, "Number the documents of each row", error=TypeError)
        lengths: list[int] = []
        for row in torch.atleast_2d(ids):
            lengths += torch.unique_consecutive(row, return_counts=True)[1].tolist()
        return cls(lengths)

    def __repr__(self) -> str:
        return f"PackedDocuments({len(self.lengths)} of {min(self.lengths)} to {max(self.lengths)} tokens)"

    def check(self, owner: str, batch: int, length: int) -> None:
        """Raise unless the documents fill ``batch`` rows of ``length`` tokens and respect their ends."""
        fits = self.total == batch * length
        if fits and not torch.compiler.is_compiling():  # a graph serves all packings of its shape
            starts = set(self._offsets.tolist())
            fits = all(row * length in starts for row in range(batch))
        if not fits:
            rule, got = f"fill {batch} rows of {length} tokens", f"{len(self.lengths)} documents of {self.total} tokens"
            fail(owner, "documents", rule, got, "End a document with its row; add one for padding")

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def bound(self, length: int) -> int:
        """At least the tokens of the longest document in rows of ``length``; a graph serves all packings."""
        return length if torch.compiler.is_compiling() else self.longest

    def offsets(self, device: torch.device) -> Tensor:
        """(N + 1,) int32: where each document begins among the T tokens, and where the last one ends."""
        return self.remembered("offsets", device, lambda: self._offsets)

    def positions(self, batch: int, length: int, device: torch.device) -> Tensor:
        """(B, L) int64: the position of each token in its document."""
        return self.remembered("positions", device, lambda: self._positions).view(batch, length)

    def ids(self, batch: int, length: int, device: torch.device) -> Tensor:
        """(B, L) int64: which document each token is of."""
        return self.remembered("ids", device, lambda: self._ids).view(batch, length)

    def mask(self, batch: int, length: int, device: torch.device) -> Tensor:
        """(B, 1, L, L) boolean: true where query and key are of one document."""
        ids = self.ids(batch, length, device)
        return (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1)

    def remembered(self, name: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made once and moved once to each device."""
        if not is_plain():
            return make().to(device)
        if (name, device) not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[name, device] = make().to(device)
        return self._made[name, device]
