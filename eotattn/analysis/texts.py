"""Texts of an analysis: read from files, checked, cut where that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from eotattn.checks import fail, require, speaking_as

__all__ = ["EncodedTexts", "GivenText", "check_texts", "encode", "read_texts"]

OWNER = "analyze"
#: A text, or what a model's tokenizer or processor made of one text, image or sound.
GivenText: TypeAlias = "str | Mapping[str, Tensor]"
#: Tokenizers without a limit say 10^30.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class EncodedTexts:
    """What a model is given for every text.

    Args:
        inputs: (1, L) int64 ids a text; or named inputs of one sample, as they were passed.
        num_cut: Texts that were longer than asked for.
        tokens: Tokens of every text, for labels; none where they are not known.
    """

    inputs: tuple[Tensor | Mapping[str, Tensor], ...]
    num_cut: int
    tokens: tuple[tuple[str, ...], ...]

    def batches(self, size: int) -> list[list[int]]:
        """Places of texts that run together: up to ``size`` neighbours of one length, so that nothing is padded.

        The first runs alone: its weights are certified.
        """
        found: list[list[int]] = []
        for place, given in enumerate(self.inputs):
            before = self.inputs[place - 1] if place > 1 else None
            alike = isinstance(given, Tensor) and isinstance(before, Tensor) and given.shape == before.shape
            if alike and len(found[-1]) < size:
                found[-1].append(place)
            else:
                found.append([place])
        return found


@speaking_as("read_texts")
def read_texts(text: str | Path | None, texts: str | Path | None) -> list[str]:
    """Texts of a plain file (one text) or of a JSON-lines file (strings, or objects with a key ``text``).

    Raises:
        ValueError: If neither or both are given, the file does not exist, or a line holds no text.
    """
    require(
        (text is None) != (texts is None), OWNER, "texts", "come from one file", (text, texts), "Pass one of the two"
    )
    path, name = Path(str(text if text is not None else texts)), "texts" if text is None else "text"
    require(path.is_file(), OWNER, name, "be an existing file", str(path), "Check the path")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(OWNER, name, "be UTF-8", str(path), "Convert the file")
    if text is not None:
        return [content]
    return [_text_of(line, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _text_of(line: str, number: int) -> str:
    remedy = 'Write {"text": "..."}'
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        fail(OWNER, f"line {number} of texts", "be JSON", line[:40], remedy)
    found = found.get("text") if isinstance(found, dict) else found
    require(isinstance(found, str), OWNER, f"line {number} of texts", "hold a text", found, remedy)
    return str(found)


def check_texts(texts: Sequence[GivenText]) -> None:
    """Raise unless there is a text, and none is empty: what can be said before a model is loaded."""
    remedy = "Pass a list of strings"
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    require(is_list, OWNER, "texts", "be a list of texts", type(texts), remedy, error=TypeError)
    require(len(texts) > 0, OWNER, "texts", "hold at least one text", texts, "Pass a text")
    for number, text in enumerate(texts):
        if isinstance(text, Mapping):
            sizes = {name: value.shape[:1] for name, value in text.items() if isinstance(value, Tensor)}
            one = len(sizes) == len(text) > 0 and all(size == (1,) for size in sizes.values())
            rule, remedy = "hold tensors of one sample", 'Pass what a processor returns with return_tensors="pt"'
            require(
                one,
                OWNER,
                f"texts[{number}]",
                rule,
                {n: tuple(getattr(v, "shape", ())) for n, v in text.items()},
                remedy,
            )
            continue
        require(isinstance(text, str), OWNER, f"texts[{number}]", "be a text", text, remedy, error=TypeError)
        require(bool(text.strip()), OWNER, f"texts[{number}]", "not be empty", text[:20], "Drop it")


def encode(model: nn.Module, tokenizer: Any, texts: Sequence[GivenText], max_length: int | None) -> EncodedTexts:
    """Turn texts into tokens, whole, or cut to ``max_length``; what a processor made stays as it is.

    Raises:
        ValueError: If a text is shorter than two tokens, or longer than the model's positions.
    """
    limit = _positions(model, tokenizer)
    rule = f"be at most the model's {limit} positions"
    require(max_length is None or max_length <= limit, OWNER, "max_length", rule, max_length, "Lower it")
    found, num_cut = list[Tensor | Mapping[str, Tensor]](), 0
    for number, text in enumerate(texts):
        if isinstance(text, Mapping):
            require(
                max_length is None, OWNER, "max_length", f"not be given with texts[{number}]", max_length, "Drop it"
            )
            found.append(dict(text))
            continue
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        whole = ids.shape[1]
        if max_length is not None and whole > max_length:
            ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
            num_cut += 1
        rule = "have at least two tokens"
        require(ids.shape[1] >= 2, OWNER, f"texts[{number}]", rule, ids.shape[1], "Pass a longer text")
        rule, remedy = f"fit into the model's {limit} positions", f"Cut it with max_length={limit} (--max-length)"
        require(ids.shape[1] <= limit, OWNER, f"texts[{number}]", rule, f"{whole} tokens", remedy)
        found.append(ids)
    return EncodedTexts(tuple(found), num_cut, tuple(_tokens_of(given, tokenizer) for given in found))


def _tokens_of(given: Tensor | Mapping[str, Tensor], tokenizer: Any) -> tuple[str, ...]:
    """Tokens of ids, for names; none of what a processor made, where keys may be patches or another text's."""
    if not isinstance(given, Tensor):
        return ()
    return tuple(map(_label, tokenizer.convert_ids_to_tokens(given[0].tolist())))


def _label(token: object) -> str:
    """A token with plain blanks and line breaks in place of the letters that tokenizers write for them."""
    return str(token).translate({ord("Ġ"): " ", ord("▁"): " ", ord("Ċ"): "⏎"})


def _positions(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that model and tokenizer can take; positions that a model counts from after its padding are not there."""
    of_model = int(getattr(getattr(model, "config", None), "max_position_embeddings", None) or NO_LIMIT)
    tables = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    padding = [part.padding_idx for name, part in tables if "position" in name and part.num_embeddings == of_model]
    skipped = max((index + 1 for index in padding if index is not None), default=0)
    return min(of_model - skipped, int(getattr(tokenizer, "model_max_length", NO_LIMIT)))
