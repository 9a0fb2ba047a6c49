"""Which modules of a model run right now, what they were told, and whose attention did not arrive.

Legend: B batch, Q queries, K keys, L tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["Frame", "Frames", "attends_by_hand", "base_name", "is_cross_attention", "looks_like_attention"]

#: Class names of modules that look like attention.
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
#: Attention whose queries and keys belong to different sequences, by the names that models give it.
CROSS = re.compile(r"cross|encoder_attn|encdecattention", re.IGNORECASE)


def is_cross_attention(layer: str) -> bool:
    """Whether queries and keys of a layer belong to different sequences, by its name."""
    return bool(CROSS.search(layer))


def base_name(layer: str) -> str:
    """The name of the module behind a layer that is one of its passes or calls."""
    return re.sub(r"( \((pass|call) \d+\))+$", "", layer)


@dataclass(eq=False)
class Frame:
    """One run of a module.

    Args:
        name: As in ``named_modules``.
        module: It.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        asks_weights: Whether its weights are returned for the sake of the capture alone.
        arrived: Whether an attention call was recorded while it runs.
        holds_attention: Whether a module that looks like attention ran inside.
        calls: Name -> number of calls so far and the last one's query and key.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    asks_weights: bool = False
    arrived: bool = False
    holds_attention: bool = False
    calls: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict)

    def argument(self, name: str) -> tuple[bool, Any]:
        """Whether the module takes an argument of this name, and its value."""
        names = _parameters(type(self.module).forward)
        if name in self.kwargs:
            return True, self.kwargs[name]
        place = names.index(name) if name in names else -1
        return place >= 0, self.args[place] if 0 <= place < len(self.args) else None

    @property
    def is_attention(self) -> bool:
        """Whether it looks like attention, and nothing that ran inside does."""
        return looks_like_attention(self.module) and not self.holds_attention

    def asking_weights(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, with ``output_attentions`` set."""
        names = _parameters(type(self.module).forward)
        place = names.index("output_attentions")
        self.asks_weights = not self.argument("output_attentions")[1]
        if place < len(self.args):
            self.args = (*self.args[:place], True, *self.args[place + 1 :])
        else:
            self.kwargs = {**self.kwargs, "output_attentions": True}
        return self.args, self.kwargs


class Frames:
    """The stack of running modules.

    Attributes:
        stack: From the outermost module to the innermost.
        num_forwards: Runs of the outermost module.
        silent: Names of modules that ran, look like attention, and from which nothing arrived.
    """

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.num_forwards = 0
        self.silent: dict[str, None] = {}
        self._repeats: dict[str, int] = {}
        self._outputs: dict[str, ref[Tensor]] = {}

    def enter(self, frame: Frame) -> None:
        """A module starts to run; one that reads its own last output is a further layer of shared weights."""
        last = self._outputs.get(frame.name) if self.stack and frame.args else None
        repeats = last is not None and last() is frame.args[0]
        self._repeats[frame.name] = self._repeats.get(frame.name, 0) + 1 if repeats else 0
        if not self.stack:
            self.num_forwards += 1
        elif frame.is_attention:
            for outer in self.stack:
                outer.holds_attention = True
        self.stack.append(frame)

    def leave(self, output: Any) -> Frame:
        """The innermost module returned ``output``."""
        frame = self.stack.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self._outputs[frame.name] = ref(first)
        if frame.is_attention and not frame.arrived:
            self.silent[frame.name] = None
        return frame

    def arrived(self) -> None:
        """An attention call of the running modules was recorded."""
        for frame in self.stack:
            frame.arrived = True

    def layer_name(self, name: str, query: Tensor, key: Tensor) -> str:
        """Name a call of module ``name`` as a layer: with its number where one run of the module makes several.

        Calls on consecutive parts of one tensor, as models split images or windows, are one call.
        """
        if self.stack:
            number, before, before_key = self.stack[-1].calls.get(name, (0, query, key))
            if number == 0 or not (_follows(before, query) and _follows(before_key, key)):
                number += 1
            self.stack[-1].calls[name] = number, query, key
            repeats = sum(self._repeats[frame.name] for frame in self.stack)
            name += f" (pass {repeats + 1})" if repeats else ""
            name += f" (call {number})" if number > 1 else ""
        return name

    def told(self, argument: str, fits: Callable[[Tensor], bool]) -> Tensor | None:
        """What the innermost module that knows was given as ``argument``; ``None`` in a module that got none."""
        for frame in reversed(self.stack):
            takes, value = frame.argument(argument)
            if isinstance(value, Tensor) and fits(value):
                return value
            if takes and value is None:
                return None
        return None

    def real_tokens(self, batch: int) -> Tensor | None:
        """(B, L) true at tokens that the model was not told to be padding, by an ``attention_mask`` of two axes."""
        mask = self.told("attention_mask", lambda given: given.dim() == 2 and given.shape[0] == batch)
        is_flag = mask is not None and bool(((mask == 0) | (mask == 1)).all())
        return mask.bool() if mask is not None and is_flag else None

    def token_ids(self, batch: int) -> Tensor | None:
        """(B, L) token ids that the innermost module was given that reads any."""

        def fits(given: Any) -> bool:
            is_integer = isinstance(given, Tensor) and given.dtype in (torch.int32, torch.int64)
            return is_integer and given.dim() == 2 and given.shape[0] == batch

        for frame in reversed(self.stack):
            for given in (frame.argument("input_ids")[1], *frame.args[:1]):
                if fits(given):
                    return given
        return None


def looks_like_attention(module: nn.Module) -> bool:
    """By the name of its class, if it takes anything at all: sinks do not."""
    return bool(ATTENTION.search(type(module).__name__) and _parameters(type(module).forward))


def attends_by_hand(module: nn.Module) -> bool:
    """Whether a module that looks like attention computes softmax itself, and returns weights if asked to."""
    inner = any(looks_like_attention(part) for part in module.modules() if part is not module)
    if inner or not looks_like_attention(module):
        return False
    forward: Any = inspect.unwrap(type(module).forward)
    calls = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"} & set(forward.__code__.co_names)
    return not calls and "output_attentions" in _parameters(type(module).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _follows(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors are consecutive parts of one, along the batch or along the tokens."""
    if before.dim() < 3 or before.stride() != after.stride():
        return False
    if before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
        return False
    step, token = after.storage_offset() - before.storage_offset(), before.stride(-2)
    if step == before.shape[0] * before.stride(0):
        return True
    head = before.stride(-3)  # heads in a loop lie as far apart as tokens do
    apart = head < token or (before.shape[-2] + after.shape[-2]) * token <= head
    return step == before.shape[-2] * token and apart
