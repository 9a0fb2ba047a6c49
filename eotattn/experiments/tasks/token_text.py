"""Text as tokens: a prepared corpus of books, or the bytes of the standard library, with a first token at every window.

Legend: B batch, L tokens of context, N windows, T scored tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.checks import check_choice, check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator
from eotattn.experiments.tasks.books import BEGINNING
from eotattn.experiments.tasks.language import PYTHON_STDLIB, LanguageTask
from eotattn.experiments.tasks.parts import check_open

__all__ = ["BOOKS", "DATA_VARIABLE", "TokenText", "Windows"]

#: Name of the corpus that :func:`prepare_books` makes.
BOOKS = "books"
#: Variable of the environment that names its folder, for processes that are started too.
DATA_VARIABLE = "EOTATTN_DATA"
#: The first token of windows of bytes: the number after the last byte.
BYTE_BEGINNING = 256


class Windows(NamedTuple):
    """Pieces of documents that are scored at their ends.

    Attributes:
        tokens: (N, L + 1) int64.
        documents: (N,) int64, which document each comes from.
    """

    tokens: Tensor
    documents: Tensor


@dataclass(frozen=True, eq=False)
class TokenText:
    """Next-token prediction; no author, or file, serves two parts.

    Args:
        train: (N,) tokens, the training documents one after another.
        documents: ``"validation"`` and ``"test"`` -> tokens of every document.
        beginning: The token that windows may begin with.
        vocabulary_size: Number of tokens, ``beginning`` included.
        fingerprint: What identifies the corpus.

    Example:
        >>> text = TokenText.open("python-stdlib")
        >>> text.vocabulary_size, int(text.training(64, begins=True).batch(2, seed=0, step=0).inputs[0, 0])
        (257, 256)
    """

    train: NDArray[Any]
    documents: dict[str, list[NDArray[Any]]]
    beginning: int
    vocabulary_size: int
    fingerprint: dict[str, Any]

    @classmethod
    def open(cls, corpus: str) -> TokenText:
        """Read the bytes of ``"python-stdlib"``, or the ``"books"`` in the folder that ``EOTATTN_DATA`` names.

        Training files that ``corpus.json`` names and the folder lacks are left out, the last ones first: a part of a
        corpus is a corpus. The fingerprint tells.
        """
        check_choice("TokenText", "corpus", corpus, (PYTHON_STDLIB, BOOKS))
        if corpus == PYTHON_STDLIB:
            return cls._of_bytes()
        folder = os.environ.get(DATA_VARIABLE, "")
        remedy = f"Pass --data FOLDER to eotattn train or set {DATA_VARIABLE}; eotattn prepare makes one"
        require(folder != "", "TokenText", "data", "name a folder of prepared books", "nothing", remedy)
        return cls._of_folder(Path(folder))

    @classmethod
    @functools.cache
    def _of_bytes(cls) -> TokenText:
        task = LanguageTask.from_corpus(PYTHON_STDLIB, length=1)
        documents = {
            "validation": [file.numpy() for file in task.validation_files],
            "test": [file.numpy() for file in task.held_out_files],
        }
        return cls(task.train_bytes.numpy(), documents, BYTE_BEGINNING, BYTE_BEGINNING + 1, dict(task.fingerprint))

    @classmethod
    def _of_folder(cls, folder: Path) -> TokenText:
        about, remedy = folder / "corpus.json", "Make one: eotattn prepare FOLDER --out DIR"
        require(about.is_file(), "TokenText", "data", "be a folder with a corpus.json", str(folder), remedy)
        try:
            facts = json.loads(about.read_text(encoding="utf-8"))
        except ValueError:
            facts = None
        whole = isinstance(facts, dict) and {"sha256", "vocabulary_size", "validation", "test"} <= facts.keys()
        require(whole, "TokenText", "data", "have the corpus.json that eotattn prepare wrote", str(folder), remedy)
        train = [folder / name for name in facts["sha256"] if name.startswith("train-")]
        while train and not train[-1].is_file():
            train.pop()
        files = [*train, folder / "validation.npy", folder / "test.npy"]
        missing = [file.name for file in files if not file.is_file()]
        require(bool(train) and not missing, "TokenText", "data", "hold the files of its corpus.json", missing, remedy)
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        damaged = [name for name, value in hashes.items() if facts["sha256"][name] != value]
        require(not damaged, "TokenText", "data", "hold whole files", damaged, "Copy them again")
        arrays = {file.name: np.load(file, allow_pickle=False) for file in files}
        documents = {
            name: np.split(arrays[f"{name}.npy"], np.cumsum(facts[name]["lengths"])[:-1])
            for name in ("validation", "test")
        }
        tokens = np.concatenate([arrays[file.name] for file in train])
        digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        fingerprint = {"corpus": BOOKS, "sha256": digest, "train_tokens": len(tokens)}
        fingerprint |= {f"{name}_documents": len(each) for name, each in documents.items()}
        fingerprint |= {f"{name}_tokens": sum(map(len, each)) for name, each in documents.items()}
        return cls(tokens, documents, BEGINNING, facts["vocabulary_size"], fingerprint)

    def training(self, length: int, *, begins: bool) -> TrainingWindows:
        """The task of training on windows of ``length`` tokens, which begin with the first token or do not."""
        return TrainingWindows(self.train, length, self.beginning if begins else None)

    def check_long_enough(self, part: str, length: int) -> None:
        """Raise unless some document of a part holds a window of ``length`` predicted tokens."""
        longest = max(map(len, self.documents[part]), default=0)
        rule = f"fit into a document of the {part} part, of {longest} tokens at most"
        require(length < longest, "TokenText.windows", "length", rule, length, "Use shorter windows")

    def windows(self, part: Literal["validation", "test"], length: int, *, per_document: int, limit: int) -> Windows:
        """Windows of ``length`` predicted tokens, spread evenly over every document that is long enough."""
        check_choice("TokenText.windows", "part", part, ("validation", "test"))
        if part == "test":
            check_open("TokenText.windows")
        check_positive_int("TokenText.windows", "length", length)
        self.check_long_enough(part, length)
        pieces: list[tuple[int, int, NDArray[Any]]] = []
        for k, document in enumerate(self.documents[part]):
            count = min(per_document, len(document) // (length + 1))
            starts = np.linspace(0, len(document) - length - 1, count + 2)[1:-1].astype(np.int64)
            pieces += [(turn, k, document[start : start + length + 1]) for turn, start in enumerate(starts)]
        chosen = sorted(pieces, key=lambda piece: piece[:2])[:limit]
        tokens = np.stack([piece for _, _, piece in chosen]).astype(np.int64)
        return Windows(torch.from_numpy(tokens), torch.tensor([k for _, k, _ in chosen]))


@dataclass(frozen=True, eq=False)
class TrainingWindows:
    """Batches of windows at random places.

    Args:
        tokens: (N,) the training documents one after another.
        length: Tokens L of a window.
        beginning: What stands in place of a window's first token, or None: it is left as it is. Targets are the same.
    """

    tokens: NDArray[Any]
    length: int
    beginning: int | None

    def __post_init__(self) -> None:
        enough, rule = len(self.tokens) > self.length + 1, f"hold more than length = {self.length} tokens"
        require(enough, "TrainingWindows", "tokens", rule, len(self.tokens), "Use more text or a shorter length")

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Batch of ``batch_size`` windows; equal (seed, step) give equal batches."""
        generator = step_generator(seed, step)
        starts = torch.randint(len(self.tokens) - self.length, (batch_size,), generator=generator)
        at = starts.numpy()[:, None] + np.arange(self.length + 1)
        return begin(torch.from_numpy(self.tokens[at].astype(np.int64)), self.beginning)


def begin(windows: Tensor, beginning: int | None) -> Batch:
    """Inputs and targets of windows (B, L + 1), the first input replaced by ``beginning``."""
    inputs, targets = windows[:, :-1].clone(), windows[:, 1:].contiguous()
    if beginning is not None:
        inputs[:, 0] = beginning
    return Batch(inputs, targets)
