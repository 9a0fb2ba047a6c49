"""A mask that looks like a tensor and has no elements until someone asks for them.

Legend: B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eotattn.compat import map_tensors, no_torch_function, wrapper_tensor

__all__ = ["LazyMask"]


class LazyMask(Tensor):
    """The mask (B, 1, Q, K) that a model asked for, as the recipe for it.

    Models pass masks through; whatever operation one performs on it first makes the elements, exactly those that the
    model would have had. Attributes, whole slices and copies make none.

    Args:
        make: The model's own mask function: keyword arguments -> mask or ``None``.
        boolean: The mask function that gives boolean masks, true where a query may attend.
        arguments: Keyword arguments of both: ``batch_size``, ``q_length``, ``kv_length``, ``q_offset``, ``kv_offset``,
            ``attention_mask`` (padding), ...
        dtype: Of the elements.
    """

    make: Callable[..., Tensor | None]
    boolean: Callable[..., Any]
    arguments: dict[str, Any]
    made: list[Tensor | None]

    @staticmethod
    def __new__(
        cls: type[LazyMask],
        make: Callable[..., Tensor | None],
        boolean: Callable[..., Any],
        arguments: dict[str, Any],
        dtype: torch.dtype,
    ) -> LazyMask:
        """A wrapper without storage."""
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        device = arguments.get("device", "cpu")
        mask = wrapper_tensor(cls, shape, dtype=dtype, device=torch.device(device))
        mask.make, mask.boolean, mask.arguments, mask.made = make, boolean, arguments, []
        return mask

    __torch_function__ = no_torch_function()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass copies and whole slices through; make the elements for everything else."""
        aten = torch.ops.aten
        if func in (aten.alias.default, aten.detach.default):
            return args[0]._again()
        if func is aten.slice.Tensor and isinstance(args[0], LazyMask) and _is_whole(args[0], *args[1:]):
            return args[0]._again()

        def made(value: Any) -> Any:
            return value.elements() if isinstance(value, LazyMask) else value

        return func(*map_tensors(made, args), **map_tensors(made, kwargs or {}))

    def _again(self) -> LazyMask:
        """Another name for the same mask: a view may not be its base."""
        other = LazyMask(self.make, self.boolean, self.arguments, self.dtype)
        other.made = self.made
        return other

    def original(self) -> Tensor | None:
        """What the model's own mask function returns, made once; ``None`` where it needs no mask."""
        if not self.made:
            self.made.append(self.make(**self.arguments))
        return self.made[0]

    def elements(self) -> Tensor:
        """All elements, in the mask's dtype."""
        made = self.original()
        if made is None:
            made = self.rows(0, self.shape[2])
            if self.dtype != torch.bool:
                made = torch.zeros(made.shape, dtype=self.dtype).masked_fill(~made, torch.finfo(self.dtype).min)
        return made

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as booleans (B, 1, stop - start, K), true where a query may attend."""
        return self.boolean(**self._of_rows(start, stop), allow_is_causal_skip=False, allow_is_bidirectional_skip=False)

    def original_rows(self, start: int, stop: int) -> Tensor | None:
        """Rows of the mask that the model's own function makes."""
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return self.make(**self._of_rows(start, stop), **skips)

    def _of_rows(self, start: int, stop: int) -> dict[str, Any]:
        arguments = {k: v for k, v in self.arguments.items() if not k.startswith("allow_is_")}
        arguments["q_offset"] = self.arguments.get("q_offset", 0) + start
        arguments["q_length"] = stop - start
        return arguments

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype."""
        return f"LazyMask(shape={tuple(self.shape)}, dtype={self.dtype})"


def _is_whole(mask: Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> bool:
    size = mask.shape[dim]
    return (start or 0) == 0 and (stop is None or stop >= size) and step == 1
