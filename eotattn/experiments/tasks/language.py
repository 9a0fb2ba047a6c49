"""Language: the bytes of text files, split by file; by default the running interpreter's own standard library.

Legend: B batch, L tokens, W window. A token is a byte, 0 to 255; byte 0 separates training files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator
from eotattn.experiments.tasks.c4 import read_c4, to_bytes
from eotattn.experiments.tasks.parts import check_open

__all__ = ["PYTHON_STDLIB", "LanguageTask", "TextSplit", "find_texts", "split_by_file"]

#: Name of the corpus that every installation has: the .py files of the interpreter's standard library.
PYTHON_STDLIB = "python-stdlib"


class TextSplit(NamedTuple):
    """Which files serve what; relative paths, sorted. No file serves twice.

    Attributes:
        train: Read by training batches.
        validation: For choices, such as learning rates.
        held_out: For the numbers that are reported; nothing is chosen by them.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    held_out: tuple[Path, ...]


def find_texts(corpus: str) -> tuple[Path, list[Path]]:
    """The folder of ``"python-stdlib"``, or the one named, and its .py and .txt files, relative, in a fixed order."""
    is_stdlib = corpus == PYTHON_STDLIB
    folder = Path(sysconfig.get_path("stdlib")) if is_stdlib else Path(corpus)
    remedy = f"Pass {PYTHON_STDLIB!r}, or a folder of .txt or .py files"
    require(folder.is_dir(), "find_texts", "corpus", "be a folder that exists", corpus, remedy)
    suffixes = {".py"} if is_stdlib else {".py", ".txt"}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    texts = sorted(path for path in found if not {"site-packages", "dist-packages"} & set(path.parts))
    require(len(texts) > 0, "find_texts", "corpus", "hold .txt or .py files", corpus, remedy)
    return folder, texts


def split_by_file(texts: Iterable[Path], *, percent: int = 5) -> TextSplit:
    """Split files by a hash of their relative path, so that the split is the same on every machine.

    Example:
        >>> split = split_by_file([Path("ast.py"), Path("json/decoder.py"), Path("heapq.py")], percent=40)
        >>> [path.name for path in split.held_out]
        ['heapq.py']
    """
    check_positive_int("split_by_file", "percent", percent)
    require(percent < 50, "split_by_file", "percent", "be below 50", percent, "Use e.g. 5")
    parts: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for path in sorted(texts):
        digest = hashlib.sha256(path.as_posix().encode()).digest()
        place = int.from_bytes(digest[:8], "big") % 100
        parts[2 if place < percent else 1 if place < 2 * percent else 0].append(path)
    return TextSplit(*(tuple(part) for part in parts))


@dataclass(frozen=True, eq=False)
class LanguageTask:
    """Next-byte prediction on texts; windows for choices and for reports come from files that training never sees.

    Args:
        train_bytes: (N,) uint8, the training files one after another.
        validation_files: One (n,) uint8 tensor a file.
        held_out_files: One (n,) uint8 tensor a file.
        length: Tokens L of a training window.
        fingerprint: What identifies the corpus: a hash over names and bytes, and counts.

    Example:
        >>> task = LanguageTask.from_corpus("python-stdlib", length=64)
        >>> task.batch(2, seed=0, step=0).inputs.shape
        torch.Size([2, 64])
    """

    train_bytes: Tensor
    validation_files: tuple[Tensor, ...]
    held_out_files: tuple[Tensor, ...]
    length: int
    fingerprint: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive_int("LanguageTask", "length", self.length)
        enough = self.train_bytes.numel() > self.length
        rule = f"hold more than length = {self.length} bytes"
        require(enough, "LanguageTask", "train_bytes", rule, self.train_bytes, "Use more text or a shorter length")

    @classmethod
    def from_corpus(cls, corpus: str, *, length: int, percent: int = 5) -> LanguageTask:
        """Of a corpus of :func:`find_texts` or :func:`read_c4`; ``percent`` of its files validate, as many report."""
        if corpus.partition(":")[0] == "c4":
            train_bytes, validation_text, held_out_text, fingerprint = read_c4(corpus)
            return cls(train_bytes, validation_text, held_out_text, length, fingerprint)
        folder, texts = find_texts(corpus)
        split = split_by_file(texts, percent=percent)
        counts = ", ".join(f"{len(part)} {name}" for name, part in zip(split._fields, split, strict=True))
        remedy = "Use a corpus of more files, or another percent"
        require(all(split), "LanguageTask", "corpus", "have files for every part", counts, remedy)
        contents = {path: (folder / path).read_bytes() for path in texts}
        train = b"\0".join(contents[path] for path in split.train)
        validation, held_out = (tuple(to_bytes(contents[path]) for path in part) for part in split[1:])
        return cls(to_bytes(train), validation, held_out, length, _fingerprint(corpus, contents, split))

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw training windows at random offsets.

        Returns:
            A :class:`Batch` of (B, L) bytes and their successors.
        """
        starts = torch.randint(
            self.train_bytes.numel() - self.length, (batch_size,), generator=step_generator(seed, step)
        )
        windows = self.train_bytes[starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def held_out_windows(self, window_length: int, count: int) -> Tensor:
        """Non-overlapping windows for reports, each inside one held-out file; the same ones at every call.

        Files take turns, so that as many files as possible are represented.

        Returns:
            (count, W + 1) int64.
        """
        owner = "LanguageTask.held_out_windows"
        check_open(owner)
        return _windows(self.held_out_files, owner, window_length, count)

    def validation_windows(self, window_length: int, count: int) -> Tensor:
        """The same for choices, from the validation files."""
        return _windows(self.validation_files, "LanguageTask.validation_windows", window_length, count)


def _windows(files: Iterable[Tensor], owner: str, window_length: int, count: int) -> Tensor:
    check_positive_int(owner, "window_length", window_length)
    check_positive_int(owner, "count", count)
    size = window_length + 1
    per_file = [file[: file.numel() // size * size].view(-1, size) for file in files]
    turns = range(max((windows.shape[0] for windows in per_file), default=0))
    found = [windows[turn] for turn in turns for windows in per_file if turn < windows.shape[0]]
    rule = f"be at most the number of windows of {size} bytes, {len(found)}"
    require(count <= len(found), owner, "count", rule, count, "Ask for fewer or shorter windows, or use more files")
    return torch.stack(found[:count]).long()


def _fingerprint(corpus: str, contents: Mapping[Path, bytes], split: TextSplit) -> dict[str, str | int]:
    """Hash over names and bytes, and how many files and bytes every part has."""
    digest = hashlib.sha256()
    for path, content in contents.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    counts = {f"{name}_files": len(part) for name, part in zip(split._fields, split, strict=True)}
    sizes = {
        f"{name}_bytes": sum(len(contents[path]) for path in part)
        for name, part in zip(split._fields, split, strict=True)
    }
    name = corpus if corpus == PYTHON_STDLIB else Path(corpus).name
    return {"corpus": name, "sha256": digest.hexdigest(), **counts, **sizes}
