"""What a training step of a decoder costs on many GPUs: operations, bytes on links and memory, and the time they take.

A model with few parts: matrix products and attention at measured rates; keys and values around a ring of GPUs that
share sequences; gradients summed over all GPUs. A step takes at least the longer of computing and sending, and at most
their sum. The rates are the caller's, who knows which of them were measured.

Legend: L tokens of a sequence, E model width, D head width, N parameters, R GPUs of a ring.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from eotattn.benchmarks.timing import Row
from eotattn.checks import check_positive_int, require

__all__ = ["DecoderSizes", "Machine", "StepCost", "step_cost", "stored_table", "with_appended"]

#: Bytes of a number in bfloat16 and in float32.
HALF, SINGLE = 2, 4
#: Bytes that a parameter holds: weight, gradient and two moments of AdamW in float32.
STATE = 4 * SINGLE


@dataclass(frozen=True)
class DecoderSizes:
    """A decoder with SwiGLU blocks without biases, as the study of sinks trains.

    Args:
        layers: Blocks.
        width: Model width E.
        heads: Query heads; D is ``width / heads``.
        vocabulary: Tokens; the tables at both ends are separate.
        kv_heads: Heads of keys and values; as many as query heads by default.
        appended: Columns that lanes add to queries and keys of a head; 0 where they are reserved from its width.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    appended: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocabulary"):
            check_positive_int("DecoderSizes", name, getattr(self, name))
        fits = self.width % self.heads == 0
        require(fits, "DecoderSizes", "width", f"be a multiple of heads = {self.heads}", self.width, "Change one")

    @property
    def block_parameters(self) -> int:
        """Of all blocks: projections of attention and of the gated MLP, and the weights of two norms each."""
        hidden = 64 * -(-8 * self.width // (3 * 64))
        kv_width = self.width // self.heads * (self.kv_heads or self.heads)
        projections = 2 * self.width * (self.width + kv_width) + 3 * self.width * hidden
        return self.layers * (projections + 2 * self.width)

    @property
    def parameters(self) -> int:
        """Of the whole decoder without priors."""
        return self.block_parameters + self.width + 2 * self.vocabulary * self.width

    def matrix_operations(self, *, recompute: bool = False) -> float:
        """Floating-point operations a token of all matrix products, forward and backward: six a weight.

        Args:
            recompute: Whether blocks keep their inputs alone and compute the rest again in the backward pass.
        """
        blocks = self.block_parameters - 2 * self.layers * self.width
        return 6.0 * (blocks + self.vocabulary * self.width) + 2.0 * blocks * recompute

    def attention_operations(self, length: int, *, recompute: bool = False) -> float:
        """Floating-point operations a token of causal attention, forward and backward.

        Seven products over half of the square: scores and outputs; in the backward pass scores once more, and the
        gradients of values, weights, queries and keys. Lanes widen four of them: the scores and what follows from them.
        """
        wider = 1 + self.appended * self.heads / self.width
        return self.layers * length * self.width * (3 + 4 * wider + (1 + wider) * recompute)

    def ring_bytes(self, length: int, ring: int, *, recompute: bool = False) -> float:
        """Bytes that each of ``ring`` GPUs sends for one sequence.

        Keys and values go round in bfloat16, once forward and once backward; their gradients go round in float32, and
        home, as in PyTorch's ``context_parallel``.
        """
        if ring == 1:
            return 0.0
        return self.layers * length * self.kv_numbers * ((2 + recompute) * HALF * (ring - 1) / ring + SINGLE)

    @property
    def kv_numbers(self) -> int:
        """Of the key, with its lanes, and the value of a token in one block."""
        return (2 * self.width // self.heads + self.appended) * (self.kv_heads or self.heads)


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links.

    Args:
        matrix_rate: Operations a second of a training step's matrix products and all that runs between them.
        attention_rate: Operations a second of fused attention, forward and backward.
        near: Bytes a second that a GPU sends to one of its host.
        far: Bytes a second that a GPU sends to one of another host.
        host: GPUs of a host.
    """

    matrix_rate: float
    attention_rate: float
    near: float
    far: float
    host: int = 8

    def link(self, gpus: int) -> float:
        """Bytes a second around a ring of GPUs: as fast as its slowest part."""
        return self.near if gpus <= self.host else self.far


@dataclass(frozen=True)
class StepCost:
    """One training step.

    Attributes:
        matrices: Seconds of matrix products.
        attention: Seconds of attention.
        ring: Seconds that keys, values and their gradients are on links.
        gradients: Seconds that gradients of weights are on links.
        state_gib: Memory of weights, gradients and moments on each GPU, GiB.
        kept_gib: Memory of what the backward pass waits for, at least: the inputs of blocks, and the keys, values and
            their gradients of one block, which every GPU of a ring gathers, GiB.
    """

    matrices: float
    attention: float
    ring: float
    gradients: float
    state_gib: float
    kept_gib: float

    @property
    def least(self) -> float:
        """Seconds, if all that is sent is sent while something is computed."""
        return max(self.matrices + self.attention, self.ring + self.gradients)

    @property
    def most(self) -> float:
        """Seconds, if nothing is."""
        return self.matrices + self.attention + self.ring + self.gradients


def step_cost(
    sizes: DecoderSizes,
    machine: Machine,
    *,
    length: int,
    tokens: int,
    gpus: int,
    ring: int = 1,
    recompute: bool = False,
    sharded: bool = False,
) -> StepCost:
    """A step over ``tokens`` tokens in sequences of ``length``, each shared by ``ring`` of ``gpus`` GPUs.

    Args:
        sizes: Of the decoder.
        machine: Rates.
        length: Tokens of a sequence L.
        tokens: Tokens of a step, all GPUs together.
        gpus: Number of GPUs.
        ring: GPUs that share a sequence; divides ``gpus``.
        recompute: Whether blocks keep their inputs alone; a GPU then computes one sequence, or its share, at a time.
        sharded: Whether weights, gradients and moments are shared out over the GPUs (FSDP): then weights are gathered
            twice in bfloat16 and gradients are scattered in float32, once a step.

    Raises:
        ValueError: If the rings, or the sequences, do not share out evenly.
    """
    require(gpus % ring == 0, "step_cost", "ring", f"divide gpus = {gpus}", ring, "Change one")
    even = tokens % (length * (gpus // ring)) == 0
    rule = f"be a multiple of length times rings, {length * (gpus // ring)}"
    require(even, "step_cost", "tokens", rule, tokens, "Use more tokens a step, or larger rings")
    share = tokens / gpus
    sequences = tokens / length / (gpus // ring)
    once = (gpus - 1) / gpus * sizes.parameters
    sent = once * (2 * HALF + SINGLE) if sharded else once * 2 * SINGLE
    return StepCost(
        matrices=share * sizes.matrix_operations(recompute=recompute) / machine.matrix_rate,
        attention=share * sizes.attention_operations(length, recompute=recompute) / machine.attention_rate,
        ring=sequences * sizes.ring_bytes(length, ring, recompute=recompute) / machine.link(ring),
        gradients=sent / machine.link(gpus),
        state_gib=STATE * sizes.parameters / (gpus if sharded else 1) / 2**30,
        kept_gib=length * (sizes.layers * sizes.width * HALF / ring + sizes.kv_numbers * (HALF + SINGLE)) / 2**30,
    )


def with_appended(
    sizes: DecoderSizes, machine: Machine, *, columns: int, slowdown: float
) -> tuple[DecoderSizes, Machine]:
    """The same decoder with lanes appended, at the measured slowdown of the kernel instead of the operations' share.

    Args:
        sizes: With reserved lanes.
        machine: Its attention rate is that of the plain head width.
        columns: That lanes add to a head.
        slowdown: Time of forward and backward of a kernel with such columns over that of one without, as measured.
    """
    wider = replace(sizes, appended=columns)
    more = wider.attention_operations(1) / sizes.attention_operations(1)
    return wider, replace(machine, attention_rate=machine.attention_rate * more / slowdown)


def stored_table(folder: Path, name: str) -> list[Row] | None:
    """Rows of ``<name>.csv`` in ``folder``, numbers as numbers and empty cells left out; None if it is not stored."""
    file = folder / f"{name}.csv"
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as lines:
        return [{key: _number(cell) for key, cell in row.items() if cell} for row in csv.DictReader(lines)]


def _number(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell
