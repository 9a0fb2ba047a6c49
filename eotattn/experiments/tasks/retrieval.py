"""Retrieval: an answer hidden in random filler, asked for at the end: passkey and needle in a haystack.

Legend: B batch, L tokens, A answer tokens. A token is a character of :data:`ALPHABET`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.experiments.tasks.batches import IGNORED, Batch, step_generator
from eotattn.experiments.tasks.parts import check_open

__all__ = ["ALPHABET", "NEEDLE", "PASSKEY", "Haystack", "RetrievalTask"]

#: The characters; a token is an index into them.
ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789.:?[]"

#: Seeds of examinations start here, so that no examination meets a training batch.
_EXAMINATION = 1 << 30


@dataclass(frozen=True)
class Haystack:
    """How a hidden answer is written: preamble, filler, marker + answer + end at a depth, filler, question, answer.

    Args:
        name: Name in tables.
        filler: Characters that the filler is drawn from.
        symbols: Characters that the answer is drawn from.
        answer_length: Characters A of the answer.
        preamble: Start of the text.
        marker: Stands before the hidden answer.
        end: Stands after the hidden answer.
        question: Stands before the answer at the end.
        train_depths: Depths are drawn uniformly between these in training, 0 to 1.

    Example:
        >>> PASSKEY.answer_length, NEEDLE.answer_length
        (8, 12)
    """

    name: str
    filler: str
    symbols: str
    answer_length: int
    preamble: str
    marker: str
    end: str
    question: str
    train_depths: tuple[float, float]

    @property
    def shortest(self) -> int:
        """Characters of everything but the filler."""
        texts = (self.preamble, self.marker, self.end, self.question)
        return sum(len(text) for text in texts) + 2 * self.answer_length


#: Eight digits in letters and spaces.
PASSKEY = Haystack(
    name="passkey",
    filler=ALPHABET[:27],
    symbols="0123456789",
    answer_length=8,
    preamble="read on. ",
    marker="passkey: ",
    end=". ",
    question="? passkey: ",
    train_depths=(0.0, 0.8),
)

#: Twelve of four letters in the same four letters: only the brackets tell the needle from the hay.
NEEDLE = Haystack(
    name="needle",
    filler="acgt",
    symbols="acgt",
    answer_length=12,
    preamble="",
    marker="[",
    end="]",
    question="?[",
    train_depths=(0.0, 1.0),
)


@dataclass(frozen=True)
class RetrievalTask:
    """Sequences that end in a question and its answer; the loss is on the answer alone.

    Rows of a batch take turns between the haystacks, so that one network learns all of them.

    Args:
        length: Tokens L that the model sees.
        haystacks: At least one.

    Source:
        The protocol of figure 3 in Litman and Guo 2026 (arXiv 2601.15380), restated; the wording, and how a needle is
        marked, are ours.

    Example:
        >>> batch = RetrievalTask(length=64).batch(4, seed=0, step=0)
        >>> batch.inputs.shape, (batch.targets >= 0).sum(-1).tolist()
        (torch.Size([4, 64]), [8, 12, 8, 12])
    """

    length: int = 256
    haystacks: tuple[Haystack, ...] = (PASSKEY, NEEDLE)

    def __post_init__(self) -> None:
        check_positive_int("RetrievalTask", "length", self.length)
        least = max((haystack.shortest for haystack in self.haystacks), default=0)
        some = len(self.haystacks) > 0
        require(some, "RetrievalTask", "haystacks", "hold at least one", self.haystacks, "Pass (PASSKEY,)")
        fits = self.length >= least
        require(fits, "RetrievalTask", "length", f"be at least {least}", self.length, "Use longer sequences")

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw training sequences.

        Returns:
            A :class:`Batch` of (B, L) tokens and their successors, which count only where they belong to the answer.
        """
        generator = step_generator(seed, step)
        tokens = torch.empty(batch_size, self.length + 1, dtype=torch.int64)
        targets = torch.full((batch_size, self.length), IGNORED)
        for turn, haystack in enumerate(self.haystacks):
            mine = slice(turn, None, len(self.haystacks))
            low, high = haystack.train_depths
            count = tokens[mine].shape[0]
            depths = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
            tokens[mine] = _hide(haystack, self.length, depths, generator)
            targets[mine, -haystack.answer_length :] = tokens[mine, -haystack.answer_length :]
        return Batch(tokens[:, :-1].contiguous(), targets)

    def examination(self, haystack: Haystack, count: int, *, depth: float, seed: int = 0) -> Tensor:
        """Sequences to be examined on, never seen in training; their last ``answer_length`` tokens are the answer.

        Returns:
            (B, L + 1) int64 tokens: L inputs and the successor of the last one.
        """
        owner, remedy = "RetrievalTask.examination", "Pass a share of the text"
        check_open(owner)
        check_positive_int(owner, "count", count)
        require(0 <= depth <= 1, owner, "depth", "lie between 0 and 1", depth, remedy)
        generator = step_generator(_EXAMINATION + seed, round(1000 * depth))
        return _hide(haystack, self.length, torch.full((count,), depth, dtype=torch.float64), generator)


def _hide(haystack: Haystack, length: int, depths: Tensor, generator: torch.Generator) -> Tensor:
    """(B, L + 1) tokens of one haystack with the answers at ``depths`` (B,)."""
    count = depths.shape[0]
    tokens = _draw(haystack.filler, (count, length + 1), generator)
    answer = _draw(haystack.symbols, (count, haystack.answer_length), generator)
    marker, end, question, preamble = (
        _encode(text).expand(count, -1)
        for text in (haystack.marker, haystack.end, haystack.question, haystack.preamble)
    )
    statement = torch.cat([marker, answer, end], dim=1)
    ending = torch.cat([question, answer], dim=1)
    tokens[:, : preamble.shape[1]] = preamble
    tokens[:, -ending.shape[1] :] = ending
    room = length + 1 - haystack.shortest
    start = preamble.shape[1] + (depths * room).round().long()
    return tokens.scatter(1, start[:, None] + torch.arange(statement.shape[1]), statement)


def _encode(text: str) -> Tensor:
    """(n,) int64 tokens of a text."""
    return torch.tensor([ALPHABET.index(character) for character in text], dtype=torch.int64)


def _draw(characters: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Tokens drawn uniformly from ``characters``."""
    return _encode(characters)[torch.randint(len(characters), shape, generator=generator)]
