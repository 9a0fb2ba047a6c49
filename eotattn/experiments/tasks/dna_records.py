"""Where DNA comes from: FASTA files and data sets of the Hugging Face Hub, read piece by piece.

A token is a base: 0 A, 1 C, 2 G, 3 T, 4 anything else (N). Case, which marks repeats, is dropped.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.checks import fail, require
from eotattn.experiments.tasks.hub import open_data_set

__all__ = ["BASES", "DnaRecord", "decode_bases", "encode_bases", "read_fasta", "read_hub"]

#: Letters by token.
BASES = "ACGTN"

#: IUPAC letters for bases that are not known for certain, and gaps: all become N. RNA's U is a T.
_AMBIGUOUS = b"NRYSWKMBDHVX-."
_UNKNOWN = 255
#: Columns under which data sets keep sequences and their names, in the order of preference.
_SEQUENCE_COLUMNS = ("sequence", "seq", "text")
_NAME_COLUMNS = ("id", "name", "chromosome", "chrom", "record")


class DnaRecord(NamedTuple):
    """One named sequence, e.g. a chromosome.

    Attributes:
        name: Unique in its file.
        tokens: (n,) uint8.
    """

    name: str
    tokens: Tensor


def _token_table() -> Tensor:
    table = torch.full((256,), _UNKNOWN, dtype=torch.uint8)
    for token, letters in enumerate((b"A", b"C", b"G", b"TU", _AMBIGUOUS)):
        for letter in letters + letters.lower():
            table[letter] = token
    return table


_TOKENS = _token_table()


def encode_bases(text: bytes, *, owner: str = "encode_bases", where: str = "text") -> Tensor:
    """Letters to tokens: (n,) uint8.

    Example:
        >>> encode_bases(b"acgTNr").tolist()
        [0, 1, 2, 3, 4, 4]
    """
    if not text:
        return torch.empty(0, dtype=torch.uint8)
    raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tokens = _TOKENS[raw.long()]
    if bool((tokens == _UNKNOWN).any()):
        letter = chr(int(raw[tokens == _UNKNOWN][0]))
        fail(owner, where, "hold bases A, C, G, T, N and other IUPAC letters", letter, "Pass nucleotides, not proteins")
    return tokens


def decode_bases(tokens: Tensor) -> str:
    """Tokens to letters.

    Example:
        >>> decode_bases(torch.tensor([0, 1, 2, 3, 4]))
        'ACGTN'
    """
    return "".join(BASES[token] for token in tokens.tolist())


# FASTA --------------------------------------------------------------------------------------------------------------


def read_fasta(path: str | Path) -> Iterator[DnaRecord]:
    """Read a FASTA file record by record; never more than one record is in memory.

    Yields:
        Records in the order of the file; a name is the first word after ``>``.
    """
    file = Path(path)
    remedy = "Pass a .fa or .fa.gz file"
    require(file.is_file(), "read_fasta", "path", "be a file that exists", str(path), remedy)
    name: str | None = None
    parts: list[Tensor] = []
    found = False
    for number, line in _lines(file):
        where = f"line {number} of {file.name}"
        if line.startswith(b">"):
            if name is not None:
                yield _record(name, parts, file)
            words = line[1:].split()
            require(len(words) > 0, "read_fasta", where, "name its record after '>'", line.decode("latin-1"), "Name it")
            name, parts, found = words[0].decode("utf-8", "replace"), [], True
        elif line and not line.startswith(b";"):
            shown = line[:40].decode("latin-1")
            require(name is not None, "read_fasta", where, "begin a record with '>'", shown, remedy)
            parts.append(encode_bases(line, owner="read_fasta", where=where))
    require(found, "read_fasta", "path", "hold at least one record", file.name, remedy)
    assert name is not None
    yield _record(name, parts, file)


def _record(name: str, parts: list[Tensor], file: Path) -> DnaRecord:
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    where = f"record {name!r} of {file.name}"
    require(tokens.numel() > 0, "read_fasta", where, "hold bases", "none", "Drop the record or restore its sequence")
    return DnaRecord(name, tokens)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends, unpacked on the way."""
    with file.open("rb") as raw:
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line.strip()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            message = f"read_fasta: path must be a whole gzip file; got {file.name} ({error}). Download it again."
            raise ValueError(message) from error


# Data sets of the Hub -----------------------------------------------------------------------------------------------


def read_hub(name: str) -> Iterator[DnaRecord]:
    """Stream a data set of the Hugging Face Hub, or a local folder in the same format, sequence by sequence.

    The human reference genome is ``"GenerTeam/hg38"``: a chromosome a row. All splits are read one after the other.
    There must be a column ``sequence`` (or ``seq``, ``text``) in any case; a column ``id`` (or ``name``) is read too.
    """
    remedy = "download the genome as a FASTA file and pass its path"
    splits = open_data_set("read_hub", name, remedy=remedy)
    count = 0
    for split, rows in splits.items():
        for row in rows:
            sequence, label = _columns(name, row)
            record = str(row[label]) if label else f"{split}-{count}"
            text = str(row[sequence]).encode()
            yield DnaRecord(record, encode_bases(text, owner="read_hub", where=f"record {record!r} of {name}"))
            count += 1


def _columns(name: str, row: dict[str, Any]) -> tuple[str, str | None]:
    """Names of the sequence column and of the name column, if there is one."""
    known = {column.lower(): column for column in row}
    sequence = next((known[column] for column in _SEQUENCE_COLUMNS if column in known), None)
    rule = "have a column named " + " or ".join(_SEQUENCE_COLUMNS)
    if sequence is None:
        fail("read_hub", f"the data set {name!r}", rule, sorted(row), "Rename its column in a copy of it")
    return sequence, next((known[column] for column in _NAME_COLUMNS if column in known), None)
