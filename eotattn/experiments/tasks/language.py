"""Language: the bytes of text files, split by file; by default the running interpreter's own standard library.

Legend: B batch, L tokens, W window. A token is a byte, 0 to 255; byte 0 separates training files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator

__all__ = ["PYTHON_STDLIB", "LanguageTask", "TextSplit", "find_texts", "split_by_file"]

#: Name of the corpus that every installation has: the .py files of the interpreter's standard library.
PYTHON_STDLIB = "python-stdlib"


class TextSplit(NamedTuple):
    """Files to train on and files that no training batch ever touches; relative paths, sorted."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]


def find_texts(corpus: str) -> tuple[Path, list[Path]]:
    """Find the text files of a corpus.

    Args:
        corpus: ``"python-stdlib"``, or a folder; of a folder every ``.py`` and ``.txt`` file below it is taken.

    Returns:
        The folder, and the relative paths of its files in a fixed order.

    Raises:
        ValueError: If the folder is missing or holds no such file.
    """
    is_stdlib = corpus == PYTHON_STDLIB
    folder = Path(sysconfig.get_path("stdlib")) if is_stdlib else Path(corpus)
    remedy = f"Pass {PYTHON_STDLIB!r}, or a folder of .txt or .py files"
    require(folder.is_dir(), "find_texts", "corpus", "be a folder that exists", corpus, remedy)
    suffixes = {".py"} if is_stdlib else {".py", ".txt"}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    texts = sorted(path for path in found if not {"site-packages", "dist-packages"} & set(path.parts))
    require(len(texts) > 0, "find_texts", "corpus", "hold .txt or .py files", corpus, remedy)
    return folder, texts


def split_by_file(texts: Iterable[Path], *, held_out_percent: int = 5) -> TextSplit:
    """Split files by a hash of their relative path, so that the split is the same on every machine.

    Args:
        texts: Relative paths.
        held_out_percent: Share of the hash range that is held out, 1 to 99.

    Example:
        >>> split = split_by_file([Path("ast.py"), Path("json/decoder.py"), Path("heapq.py")], held_out_percent=40)
        >>> [path.name for path in split.held_out]
        ['heapq.py']
    """
    check_positive_int("split_by_file", "held_out_percent", held_out_percent)
    require(held_out_percent < 100, "split_by_file", "held_out_percent", "be below 100", held_out_percent, "Use e.g. 5")
    train: list[Path] = []
    held_out: list[Path] = []
    for path in sorted(texts):
        digest = hashlib.sha256(path.as_posix().encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") % 100 < held_out_percent else train).append(path)
    return TextSplit(tuple(train), tuple(held_out))


@dataclass(frozen=True, eq=False)
class LanguageTask:
    """Next-byte prediction on files; windows for evaluation come from files that training never sees.

    Args:
        train_bytes: (N,) uint8, the training files one after another.
        held_out_files: One (n,) uint8 tensor a held-out file.
        length: Tokens L of a training window.
        split: Which files went where.

    Example:
        >>> task = LanguageTask.from_corpus("python-stdlib", length=64)
        >>> task.batch(2, seed=0, step=0).inputs.shape
        torch.Size([2, 64])
    """

    train_bytes: Tensor
    held_out_files: tuple[Tensor, ...]
    length: int
    split: TextSplit = field(default_factory=lambda: TextSplit((), ()))

    def __post_init__(self) -> None:
        check_positive_int("LanguageTask", "length", self.length)
        enough = self.train_bytes.numel() > self.length
        rule = f"hold more than length = {self.length} bytes"
        require(enough, "LanguageTask", "train_bytes", rule, self.train_bytes, "Use more text or a shorter length")

    @classmethod
    def from_corpus(cls, corpus: str, *, length: int, held_out_percent: int = 5) -> LanguageTask:
        """Read a corpus, split by files.

        Args:
            corpus: As in :func:`find_texts`.
            length: Tokens of a training window.
            held_out_percent: Share of the files held out, as in :func:`split_by_file`.
        """
        folder, texts = find_texts(corpus)
        split = split_by_file(texts, held_out_percent=held_out_percent)
        remedy = "Use a corpus of more files or another held_out_percent"
        both = len(split.train) > 0 and len(split.held_out) > 0
        counts = f"{len(split.train)} training and {len(split.held_out)} held-out files"
        require(both, "LanguageTask", "corpus", "have files on both sides of the split", counts, remedy)
        train = b"\0".join((folder / path).read_bytes() for path in split.train)
        held_out = tuple(_to_bytes((folder / path).read_bytes()) for path in split.held_out)
        return cls(_to_bytes(train), held_out, length, split)

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw training windows at random offsets.

        Args:
            batch_size: Number of windows B.
            seed: Seed of the stream.
            step: Position in the stream; equal (seed, step) give equal batches.

        Returns:
            A :class:`Batch` of (B, L) bytes and their successors.
        """
        starts = torch.randint(
            self.train_bytes.numel() - self.length, (batch_size,), generator=step_generator(seed, step)
        )
        windows = self.train_bytes[starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def held_out_windows(self, window_length: int, count: int) -> Tensor:
        """Non-overlapping windows, each inside one held-out file; the same ones at every call.

        Files take turns, so that as many files as possible are represented.

        Args:
            window_length: Predicted tokens W of a window; a window holds one byte more.
            count: Number of windows.

        Returns:
            (count, W + 1) int64.

        Raises:
            ValueError: If the held-out files are too short for so many windows.
        """
        check_positive_int("LanguageTask.held_out_windows", "window_length", window_length)
        check_positive_int("LanguageTask.held_out_windows", "count", count)
        size = window_length + 1
        per_file = [file[: file.numel() // size * size].view(-1, size) for file in self.held_out_files]
        turns = range(max((windows.shape[0] for windows in per_file), default=0))
        found = [windows[turn] for turn in turns for windows in per_file if turn < windows.shape[0]]
        rule = f"be at most the number of held-out windows of {size} bytes, {len(found)}"
        remedy = "Ask for fewer or shorter windows, or hold out more files"
        require(count <= len(found), "LanguageTask.held_out_windows", "count", rule, count, remedy)
        return torch.stack(found[:count]).long()


def _to_bytes(text: bytes) -> Tensor:
    """(n,) uint8 tensor of a byte string, which may be empty."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
