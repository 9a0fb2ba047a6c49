"""C4: web pages, streamed from the Hugging Face Hub or read from its shards on this machine, as bytes.

A token is a byte; byte 0 separates documents. Documents of the data set's validation split take turns in validating
and in being held out.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.checks import check_installed, require
from eotattn.experiments.tasks.hub import open_data_set

__all__ = ["C4Bytes", "read_c4", "to_bytes"]

#: Bytes to train on where nothing else is said: as many tokens as the paper trains on.
TRAIN_BYTES = 4_000_000_000
#: Bytes of validating documents, and of held-out ones, at most.
EVALUATION_BYTES = 16_000_000
#: Name on the Hub and configuration.
HUB_NAME = ("allenai/c4", "en")
#: Files of a split in a folder, as the Hub names them; JSON lines with a field ``text``, packed or not.
SHARDS = "c4-{split}.*.json*"


class C4Bytes(NamedTuple):
    """Bytes of three parts, and what identifies them."""

    train: Tensor
    validation: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    fingerprint: dict[str, str | int]


@lru_cache(maxsize=1)
def read_c4(corpus: str) -> C4Bytes:
    """The first bytes of ``"c4"`` on the Hub, of shards ``"c4:FOLDER"``, or so many: ``"c4:FOLDER:BYTES"``.

    Once in a process, since every run of a study asks for them. Validation and held-out documents are joined, because
    few of them are as long as a long context.
    """
    _, folder, count = [*corpus.split(":"), "", ""][:3]
    plain = count.isdecimal() or not count
    require(plain, "read_c4", "corpus", "end with a number of bytes", corpus, "Write e.g. 'c4::1000000'")
    splits = {split: _texts(folder, split) for split in ("train", "validation")}
    train = _join(splits["train"], int(count) if count else TRAIN_BYTES)
    turns: tuple[list[str], list[str]] = ([], [])
    size = 0
    for number, text in enumerate(splits["validation"]):
        turns[number % 2].append(text)
        size += len(text)
        if size > 2 * EVALUATION_BYTES:
            break
    validation, held_out = (_join(iter(texts), EVALUATION_BYTES) for texts in turns)
    parts = {"train": train, "validation": validation, "held_out": held_out}
    digest = hashlib.sha256()
    for content in parts.values():
        digest.update(f"{len(content)}\0".encode())
        digest.update(content)
    sizes: dict[str, str | int] = {f"{name}_bytes": len(content) for name, content in parts.items()}
    fingerprint = {"corpus": "c4", "sha256": digest.hexdigest()} | sizes
    return C4Bytes(to_bytes(train), (to_bytes(validation),), (to_bytes(held_out),), fingerprint)


def _texts(folder: str, split: str) -> Iterator[str]:
    """Documents of a split; opened at once, so that what is missing is said before anything is computed."""
    check_installed("read_c4", "data", "datasets")
    import datasets

    if folder:
        files = sorted(str(file) for file in Path(folder).glob(SHARDS.format(split=split)))
        rule = f"hold shards named {SHARDS.format(split=split)}"
        require(len(files) > 0, "read_c4", "the folder", rule, folder, "Download some of allenai/c4's en files")
        with _whole_shards(folder):
            rows: Any = datasets.load_dataset("json", data_files={split: files}, split=split, streaming=True)
    else:
        remedy = "download some of its en/ files into a folder and pass 'c4:FOLDER'"
        rows = open_data_set("read_c4", *HUB_NAME, split=split, remedy=remedy)
    return _read(rows, folder or HUB_NAME[0])


def _read(rows: Iterable[Any], folder: str) -> Iterator[str]:
    with _whole_shards(folder):
        yield from (row["text"] for row in rows)


@contextmanager
def _whole_shards(folder: str) -> Iterator[None]:
    """Say in one sentence what is wrong with damaged shards."""
    try:
        yield
    except (EOFError, OSError, ValueError, LookupError, zlib.error) as error:
        reason = f"{folder!r} ({type(error).__name__}: {error})"
        message = f"read_c4: every shard must be whole, with a field 'text'; got {reason}. Download its files again."
        raise ValueError(message) from error


def _join(texts: Iterator[str], count: int) -> bytes:
    """The first ``count`` bytes of documents with a zero byte between them."""
    content = bytearray()
    for text in texts:
        content += text.encode() + b"\0"
        if len(content) >= count:
            break
    return bytes(content[:count] if len(content) > count else content[:-1])


def to_bytes(text: bytes) -> Tensor:
    """(n,) uint8 tensor of a byte string, which may be empty."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
