"""DNA: the next base of windows of a genome, made of isochores, read from a FASTA file or from the Hub.

Legend: B batch, L tokens, M held-out, V validation and N training blocks, S bases of a block, W window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator
from eotattn.experiments.tasks.dna_records import BASES, DnaRecord, read_fasta, read_hub
from eotattn.experiments.tasks.isochores import IsochoreModel
from eotattn.experiments.tasks.parts import check_open

__all__ = ["HUB", "DnaTask", "IsochoreGenome", "StoredGenome", "gc_fraction", "open_genome"]

#: Prefix of corpora that come from the Hugging Face Hub.
HUB = "hub:"
#: Token of a base that is not known.
UNKNOWN = BASES.index("N")


def open_genome(corpus: str) -> Iterable[DnaRecord]:
    """Records of a FASTA file, or of ``"hub:"`` and what :func:`read_hub` takes."""
    return read_hub(corpus.removeprefix(HUB)) if corpus.startswith(HUB) else read_fasta(corpus)


def gc_fraction(tokens: Tensor, window: int) -> Tensor:
    """Share of G and C among the known bases of consecutive windows of (..., L) tokens.

    Returns:
        (..., L / window) float64; NaN where a window knows no base.

    Example:
        >>> gc_fraction(torch.tensor([1, 2, 0, 0, 4, 1]), 2).tolist()
        [1.0, 0.0, 1.0]
    """
    check_positive_int("gc_fraction", "window", window)
    fits = tokens.shape[-1] % window == 0
    require(fits, "gc_fraction", "tokens", f"be a multiple of window = {window} long", tokens, "Crop them")
    windows = tokens.unflatten(-1, (-1, window))
    strong = ((windows == BASES.index("G")) | (windows == BASES.index("C"))).sum(-1)
    return strong.double() / (windows != UNKNOWN).sum(-1)


@dataclass(frozen=True, eq=False)
class DnaTask:
    """Next-base prediction; windows for choices and for reports come from blocks that training never sees.

    Args:
        train_blocks: (N, S) uint8, each block one stretch of a genome.
        validation_blocks: (V, S) uint8, for choices.
        held_out_blocks: (M, S) uint8, for reports.
        length: Tokens L of a training window, below S.

    Example:
        >>> blocks = IsochoreModel().sample(4, 40, seed=0)
        >>> task = DnaTask(blocks[:2], blocks[2:3], blocks[3:], length=16)
        >>> task.batch(2, seed=0, step=0).inputs.shape
        torch.Size([2, 16])
    """

    train_blocks: Tensor
    validation_blocks: Tensor
    held_out_blocks: Tensor
    length: int

    def __post_init__(self) -> None:
        check_positive_int("DnaTask", "length", self.length)
        for name in ("train_blocks", "validation_blocks", "held_out_blocks"):
            blocks = getattr(self, name)
            fits = blocks.dim() == 2 and blocks.shape[0] > 0 and blocks.shape[1] > self.length
            rule = f"be (blocks, bases) with more than length = {self.length} bases"
            require(fits, "DnaTask", name, rule, blocks, "Use longer blocks or shorter windows")

    @classmethod
    def from_records(
        cls, records: Iterable[DnaRecord], *, length: int, block_length: int = 65_536, held_out_percent: int = 5
    ) -> DnaTask:
        """Cut records into blocks and set aside those whose hash says so: the same ones on every machine.

        What is left at the end of a record, and blocks that are unknown for more than a half, are dropped.
        """
        check_positive_int("DnaTask", "block_length", block_length)
        check_positive_int("DnaTask", "held_out_percent", held_out_percent)
        require(held_out_percent < 50, "DnaTask", "held_out_percent", "be below 50", held_out_percent, "Use e.g. 5")
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for record in records:
            whole = record.tokens.numel() // block_length * block_length
            for k, block in enumerate(record.tokens[:whole].view(-1, block_length)):
                if 2 * int((block == UNKNOWN).sum()) <= block_length:
                    place = _hash_percent(f"{record.name}:{k}")
                    parts[2 if place < held_out_percent else 1 if place < 2 * held_out_percent else 0].append(block)
        counts = "{} training, {} validation and {} held-out blocks".format(*map(len, parts))
        counts += f" of {block_length} bases"
        remedy = "Use a longer genome, a shorter block_length or another held_out_percent"
        require(all(parts), "DnaTask", "records", "fill blocks of all parts of the split", counts, remedy)
        train, validation, held_out = (torch.stack(part) for part in parts)
        return cls(train, validation, held_out, length)

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What identifies the data."""
        parts = {name: getattr(self, f"{name}_blocks") for name in ("train", "validation", "held_out")}
        digest = hashlib.sha256()
        for blocks in parts.values():
            digest.update(f"{tuple(blocks.shape)}".encode())
            digest.update(blocks.contiguous().numpy().tobytes())
        return {"sha256": digest.hexdigest()} | {f"{name}_bases": blocks.numel() for name, blocks in parts.items()}

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw training windows from random blocks at random offsets.

        Returns:
            A :class:`Batch` of (B, L) bases and their successors.
        """
        generator = step_generator(seed, step)
        count, size = self.train_blocks.shape
        rows = torch.randint(count, (batch_size,), generator=generator)
        starts = torch.randint(size - self.length, (batch_size,), generator=generator)
        windows = self.train_blocks[rows[:, None], starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def held_out_windows(self, window_length: int, count: int) -> Tensor:
        """Non-overlapping windows for reports, each inside one held-out block; the same ones at every call.

        Blocks take turns, so that as many of them as possible are represented.

        Returns:
            (count, W + 1) int64.
        """
        check_open("DnaTask.held_out_windows")
        return _windows(self.held_out_blocks, "DnaTask.held_out_windows", window_length, count)

    def validation_windows(self, window_length: int, count: int) -> Tensor:
        """The same for choices, from the validation blocks."""
        return _windows(self.validation_blocks, "DnaTask.validation_windows", window_length, count)


def _windows(blocks: Tensor, owner: str, window_length: int, count: int) -> Tensor:
    check_positive_int(owner, "window_length", window_length)
    check_positive_int(owner, "count", count)
    size = window_length + 1
    turns = blocks.shape[1] // size
    windows = blocks[:, : turns * size].view(blocks.shape[0], turns, size).transpose(0, 1).flatten(0, 1)
    rule = f"be at most the number of windows of {size} bases, {len(windows)}"
    require(count <= len(windows), owner, "count", rule, count, "Ask for fewer or shorter windows, or hold out more")
    return windows[:count].long()


def _hash_percent(text: str) -> int:
    """A number 0 to 99 that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


@dataclass(frozen=True)
class IsochoreGenome:
    """An artificial genome; its other blocks are as long as a window, so that their likelihood is exact.

    Args:
        model: What the genome is made by.
        num_blocks: Training blocks.
        block_length: Bases of a training block.
        num_held_out: Held-out blocks.
        seed: Seed of the training blocks; the others are the same for all.
    """

    model: IsochoreModel
    num_blocks: int
    block_length: int
    num_held_out: int
    seed: int = 0

    def task(self, length: int) -> DnaTask:
        """The task with training windows of ``length`` tokens; made once in a process."""
        return _isochore_task(self, length)


@lru_cache(maxsize=1)
def _isochore_task(genome: IsochoreGenome, length: int) -> DnaTask:
    train = genome.model.sample(genome.num_blocks, genome.block_length, seed=genome.seed)
    held_out, validation = (
        genome.model.sample(genome.num_held_out, length + 1, seed=seed) for seed in (2**31 - 1, 2**31 - 2)
    )
    return DnaTask(train, validation, held_out, length)


@dataclass(frozen=True)
class StoredGenome:
    """A genome in a file or on the Hub.

    Args:
        corpus: As in :func:`open_genome`.
        block_length: Bases of a block, see :meth:`DnaTask.from_records`.
        held_out_percent: Share of the blocks held out, and share that validates.
    """

    corpus: str
    block_length: int = 65_536
    held_out_percent: int = 5

    def task(self, length: int) -> DnaTask:
        """The task with training windows of ``length`` tokens; read once in a process."""
        return _stored_task(self, length)


@lru_cache(maxsize=1)
def _stored_task(genome: StoredGenome, length: int) -> DnaTask:
    options = {"block_length": genome.block_length, "held_out_percent": genome.held_out_percent}
    return DnaTask.from_records(open_genome(genome.corpus), length=length, **options)
