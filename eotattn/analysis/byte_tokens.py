"""Bytes as tokens: what the project's own language models read, in the form that an analysis asks of tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eotattn.checks import require

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """A text's UTF-8 bytes, 0 to 255, one token each.

    Args:
        model_max_length: Longest text, tokens; the positions of the model.
        beginning: Token that every text begins with, for models that were trained with one; none by default.

    Example:
        >>> tokenizer = ByteTokenizer(64)
        >>> tokenizer("a b")["input_ids"], tokenizer.convert_ids_to_tokens([97, 32, 10])
        (tensor([[97, 32, 98]]), ['a', '␣', '⏎'])
    """

    def __init__(self, model_max_length: int, *, beginning: int | None = None) -> None:
        self.model_max_length = model_max_length
        self.beginning = beginning

    def __call__(self, text: str, *, max_length: int | None = None, **options: Any) -> dict[str, Tensor]:
        """``{"input_ids": (1, L)}``, cut to ``max_length``; takes and needs no other option of tokenizers."""
        known = {"truncation", "return_tensors", "verbose"}
        unknown = sorted(set(options) - known)
        require(not unknown, "ByteTokenizer", "options", f"be among {sorted(known)}", unknown, "Drop them")
        first = [] if self.beginning is None else [self.beginning]
        return {"input_ids": torch.tensor([[*first, *text.encode()][:max_length]], dtype=torch.int64)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Visible characters for ASCII, the byte's number for others, "<begin>" for the token before the text."""
        names = {32: "␣", 10: "⏎", 9: "⇥", self.beginning: "<begin>"}
        return [names.get(i, chr(i) if 32 < i < 127 else f"<{i}>") for i in ids]
