"""From a folder of books to tokens: cleaned, without copies, whole authors held out, encoded by a trained tokenizer.

A prepared corpus is a folder: ``tokenizer.json``, the parts as uint16 arrays (``train-0.npy``, ``train-1.npy``, ...,
``validation.npy``, ``test.npy``), and ``corpus.json`` with counts, the lengths of documents and a hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eotattn.checks import check_installed, check_positive_int, require
from eotattn.provenance import check_writable, write_atomically

__all__ = ["BEGINNING", "END", "Book", "clean", "find_books", "prepare_books", "without_copies"]

#: Tokens that no text holds: what a window begins with, and what stands after every document.
BEGINNING, END = 0, 1
#: Their names in the tokenizer.
SPECIAL = ("<bos>", "<end>")

PART_TOKENS = 45_000_000  # of a file of the training part
BOOKS_AT_ONCE = 16  # that are encoded side by side
MIN_CHARACTERS = 20_000
LONG_LINE = 80  # characters; shorter paragraphs recur by chance
COMMON_WORDS = frozenset(["the", "and", "of", "to", "in", "that", "was", "his"])
MIN_COMMON = 0.15

_HEAD = re.compile(r"\*{3}\s*START OF TH[^*]*\*{3}", re.IGNORECASE)
_TAIL = re.compile(r"\*{3}\s*END OF TH", re.IGNORECASE)
_SPACES_AT_LINE_ENDS = re.compile(r"[ \t]+\n")
_LINE_WRAP = re.compile(r"(?<!\n)\n(?!\n)")
_BLANK_LINES = re.compile(r"\n{3,}")
_SPACES = re.compile(r"[ \t]{2,}")


@dataclass(frozen=True)
class Book:
    """One text.

    Args:
        author: Folder that it lies in; books of one author never serve two parts.
        title: Path below the corpus folder.
        text: Cleaned, a paragraph a line.
    """

    author: str
    title: str
    text: str

    @property
    def paragraphs(self) -> set[bytes]:
        """Hashes of its long lines: what two copies of a text have in common."""
        lines = (line for line in self.text.split("\n") if len(line) > LONG_LINE)
        return {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines}


def clean(raw: bytes) -> str:
    """Text of a book, a paragraph a line: without Project Gutenberg's frame, line wraps and runs of spaces.

    Example:
        >>> clean(b"*** START OF THIS BOOK ***  It was  late. *** END OF THIS BOOK ***")
        'It was late.'
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    head = _HEAD.search(text, 0, 40_000)
    text = text[head.end() if head else 0 :]
    tail = _TAIL.search(text)
    text = _SPACES_AT_LINE_ENDS.sub("\n", text[: tail.start() if tail else None])
    text = _LINE_WRAP.sub(" ", _BLANK_LINES.sub("\n\n", text))
    return _SPACES.sub(" ", text).strip()


def is_english(text: str) -> bool:
    """Whether common English words make up their usual share of its beginning."""
    words = re.findall(r"[a-z]+", text[:200_000].lower())
    return sum(word in COMMON_WORDS for word in words) >= MIN_COMMON * max(1, len(words))


def find_books(folder: Path) -> Iterator[Book]:
    """The English books of a folder of authors' folders, authors in an order that a hash of their names gives.

    Texts that lie in ``folder`` itself are authors of their own. Short texts and other languages are left out.
    """
    files: dict[str, list[Path]] = {}
    for file in folder.rglob("*.txt"):
        files.setdefault(file.relative_to(folder).parts[0], []).append(file)
    for author in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        for file in sorted(files[author]):
            text = clean(file.read_bytes())
            if len(text) >= MIN_CHARACTERS and is_english(text):
                yield Book(author, file.relative_to(folder).as_posix(), text)


def without_copies(books: Iterable[Book], seen: set[bytes], *, share: float) -> Iterator[Book]:
    """The books that share at most this share of their long paragraphs with those before them.

    Args:
        books: Any books.
        seen: Paragraphs of earlier books; those of the kept ones are added.
        share: Between 0 and 1.
    """
    for book in books:
        paragraphs = book.paragraphs
        if len(paragraphs & seen) <= share * len(paragraphs):
            seen |= paragraphs
            yield book


def prepare_books(
    folder: str,
    out: str,
    *,
    vocabulary_size: int = 16_384,
    held_out_characters: int = 12_000_000,
    train_characters: int = 400_000_000,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prepare a folder of books for training.

    Authors come in the order of a hash of their names: first those of the test part, then validation, then training.
    A training book that shares more than a hundredth of its long paragraphs with a held-out one is left out, and so is
    any book that shares more than three tenths with earlier ones of its part.

    Args:
        folder: Folder of authors' folders of ``.txt`` files, as Project Gutenberg's mirrors have.
        out: Folder of the prepared corpus; made if it is missing.
        vocabulary_size: Of the byte-pair encoding, trained on the training part alone; at most 65 536.
        held_out_characters: Size from which on the test part takes no further author; validation takes half as much.
        train_characters: Likewise for training; its last author is cut at the book.
        report: Receives one line a step.

    Returns:
        What ``corpus.json`` holds.
    """
    owner = "prepare_books"
    check_installed(owner, "data", "tokenizers")
    source, target = Path(folder), Path(out)
    require(source.is_dir(), owner, "folder", "be a folder that exists", folder, "Pass one of .txt files")
    check_writable(owner, target, given=out)
    check_positive_int(owner, "vocabulary_size", vocabulary_size, minimum=512)
    require(vocabulary_size <= 2**16, owner, "vocabulary_size", "fit 16 bits", vocabulary_size, "Use at most 65536")
    check_positive_int(owner, "held_out_characters", held_out_characters, minimum=2)
    check_positive_int(owner, "train_characters", train_characters)
    limits = {"test": held_out_characters, "validation": held_out_characters // 2, "train": train_characters}
    parts = _split(find_books(source), limits)
    require(all(parts.values()), owner, "folder", "hold enough authors for three parts", folder, "Add books")
    target.mkdir(parents=True, exist_ok=True)
    for name, books in parts.items():
        report(f"{name}: {len(books)} books, {sum(len(book.text) for book in books) / 1e6:.1f} M characters")
    tokenizer = _train_tokenizer([book.text for book in parts["train"]], vocabulary_size)
    write_atomically(target / "tokenizer.json", tokenizer.to_str().encode())
    report(f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    about: dict[str, Any] = {"vocabulary_size": tokenizer.get_vocab_size(), "beginning": BEGINNING, "end": END}
    files = [target / "tokenizer.json"]
    for name, books in parts.items():
        written, lengths = _encode(tokenizer, books, target, name)
        files += written
        titles = [book.title for book in books] if name != "train" else []
        about[name] = {"books": len(books), "tokens": sum(lengths), "lengths": lengths, "titles": titles}
        report(f"{name}: {sum(lengths) / 1e6:.1f} M tokens in {len(written)} files")
    about["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    write_atomically(target / "corpus.json", (json.dumps(about, indent=1) + "\n").encode())
    return about


def _split(books: Iterable[Book], limits: dict[str, int]) -> dict[str, list[Book]]:
    """Books of every part, filled in the order of ``limits``; all but the last one take whole authors."""
    parts: dict[str, list[Book]] = {name: [] for name in limits}
    held_out: set[bytes] = set()
    seen: set[bytes] = set()
    waiting = list(limits)
    size, last_author = 0, ""
    for book in books:
        name = waiting[0]
        if size >= limits[name] and (len(waiting) == 1 or book.author != last_author):
            if len(waiting) == 1:
                break
            waiting.pop(0)
            name, size = waiting[0], 0
            held_out |= seen
            seen = set()
        last_author = book.author
        if not list(without_copies([book], set(held_out & book.paragraphs), share=0.01)):
            continue
        for kept in without_copies([book], seen, share=0.3):
            parts[name].append(kept)
            size += len(kept.text)
    return parts


def _train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Any:
    """A byte-level byte-pair encoding, trained on about fifty million characters from all over the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    every = max(1, sum(map(len, texts)) // 50_000_000)
    tokenizer.train_from_iterator(texts[::every], trainer)
    return tokenizer


def _encode(tokenizer: Any, books: Sequence[Book], target: Path, name: str) -> tuple[list[Path], list[int]]:
    """Write the tokens of all books, :data:`END` after each; the files, and the tokens of every book."""
    lengths: list[int] = []
    files: list[Path] = []
    pending: list[np.ndarray[Any, np.dtype[np.uint16]]] = []

    def flush() -> None:
        file = target / (f"{name}-{len(files)}.npy" if name == "train" else f"{name}.npy")
        np.save(file, np.concatenate(pending))
        files.append(file)
        pending.clear()

    for start in range(0, len(books), BOOKS_AT_ONCE):
        for encoding in tokenizer.encode_batch([book.text for book in books[start : start + BOOKS_AT_ONCE]]):
            pending.append(np.array([*encoding.ids, END], dtype=np.uint16))
            lengths.append(len(pending[-1]))
        if name == "train" and sum(map(len, pending)) >= PART_TOKENS:
            flush()
    if pending:
        flush()
    return files, lengths
