"""Attention maps from anywhere: arrays and files, checked, as statistics by layer.

Legend: H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics import weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_indices, check_installed, check_no_nan, check_positive_int, fail, require

__all__ = ["map_statistics", "read_maps"]

OWNER = "read_maps"
#: Largest admissible |sum of a row - 1|; 16-bit maps round.
ROW_BOUND = 1e-2

Maps = Mapping[str, Tensor]


def read_maps(
    attention: Tensor | NDArray[np.floating] | Mapping[str, object] | str | Path, *, sink: bool = False
) -> dict[str, Tensor]:
    """Bring attention maps from anywhere into one form.

    Args:
        attention: Weights (H, Q, K) or (layers, H, Q, K) as a tensor or array, such arrays by layer name, or a file of
            them: ``.npy``, ``.npz`` or ``.safetensors``; pickles are refused. Rows sum to one, or to zero where no key
            is admissible.
        sink: Whether rows may sum to less than one, because an explicit sink has the rest (gpt-oss).

    Returns:
        Layer name -> (H, Q, K), in the dtype in which it is stored.

    Raises:
        ValueError: For shapes that do not fit, NaN, weights outside [0, 1], rows that do not sum to one, or a file of
            another kind or none.

    Example:
        >>> {name: tuple(p.shape) for name, p in read_maps(torch.full((2, 1, 4, 4), 0.25)).items()}
        {'0': (1, 4, 4), '1': (1, 4, 4)}
    """
    arrays = _load(Path(attention)) if isinstance(attention, (str, Path)) else attention
    entries = dict(arrays) if isinstance(arrays, Mapping) else {"": arrays}
    require(len(entries) > 0, OWNER, "attention", "hold at least one map", attention, "Check the file")
    maps: dict[str, Tensor] = {}
    for name, array in entries.items():
        is_array = isinstance(array, (Tensor, np.ndarray))
        require(
            is_array,
            OWNER,
            f"attention{name and f'[{name!r}]'}",
            "be an array",
            type(array),
            "Convert it",
            error=TypeError,
        )
        numbers = isinstance(array, Tensor) or np.asarray(array).dtype.kind in "biufc"
        require(numbers, OWNER, "the maps", "be numbers", array, "Pass the weights", error=TypeError)
        weights = array if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array))
        is_real = not weights.is_complex()
        require(is_real, OWNER, "the maps", "be real numbers", weights, "Pass the weights")
        fits = weights.dim() in (3, 4) and weights.numel() > 0
        require(fits, OWNER, "the maps", "have shape (H, Q, K) or (layers, H, Q, K)", weights, "Add the head axis")
        layers = [(name or "0", weights)] if weights.dim() == 3 else _numbered(name, weights)
        for layer, weights_of_layer in layers:
            maps[layer] = _checked(layer, weights_of_layer, sink)
    return maps


def map_statistics(
    maps: Maps,
    *,
    heads: Sequence[int] | None = None,
    sink_positions: Sequence[int] = (0,),
    is_causal: bool | None = None,
    window: int | None = None,
    sink: bool = False,
) -> dict[str, SequenceStatistics]:
    """Compute the statistics of maps, as :func:`eotattn.integrations.capture` does of a running model.

    Args:
        maps: Layer name -> (H, Q, K), from :func:`read_maps`; each layer is one sequence. Queries are the last ones
            where there are fewer of them than keys.
        heads: Indices of heads to keep; all by default.
        sink_positions: Chosen keys, counted from the first.
        is_causal: Whether only keys up to the query are admissible. By default that is read off: of maps in 32 and 64
            bits, keys of weight zero are inadmissible. 16 bits round weights to zero; there later keys are inadmissible
            if none has weight, and so are keys that no query of the layer attends to.
        window: Keys this many or more tokens before the query are inadmissible; goes with ``is_causal``.
        sink: Whether what a row lacks to one is the mass of an explicit sink (gpt-oss).

    Returns:
        Layer name -> statistics of one sequence. Logits are ln p: content and prior are not told apart.

    Raises:
        ValueError: If a map has weight where the pattern admits none, or heads do not exist.

    Example:
        >>> stats = map_statistics(read_maps(torch.full((1, 2, 4, 4), 0.25)))
        >>> stats["0"].sums["entropy"] / stats["0"].num_queries
        tensor([[1.3863, 1.3863]], dtype=torch.float64)
    """
    remedy = "Pass what read_maps returns"
    require(isinstance(maps, Mapping), "map_statistics", "maps", "map names to maps", maps, remedy, error=TypeError)
    owner, remedy = "map_statistics", "Say is_causal=True or False as well"
    require(window is None or is_causal is not None, owner, "window", "come with is_causal", window, remedy)
    window = None if window is None else check_positive_int(owner, "window", window)
    statistics = {}
    for name, weights in maps.items():
        queries, keys = weights.shape[1:]
        start = max(0, keys - queries)
        query_at, key_at = (torch.arange(count, device=weights.device) for count in (queries, keys))
        lag = start + query_at[:, None] - key_at
        admissible = _read_off(weights, lag) if is_causal is None else _pattern(lag, is_causal, window)
        if admissible is not None:
            outside = float(weights.float().masked_fill(admissible, 0.0).amax())
            rule = f"have weight only where is_causal={is_causal} and window={window} admit it"
            require(outside == 0, owner, f"the map {name!r}", rule, outside, "Say the pattern of the model")
        chosen = weights if heads is None else weights[check_indices(owner, "heads", heads, weights.shape[0])]
        pattern: dict[str, Any] = {"admissible": admissible, "has_sink": sink, "query_start": start}
        statistics[name] = SequenceStatistics.of(weight_statistics(chosen[None], keys=tuple(sink_positions), **pattern))
    return statistics


def _pattern(lag: Tensor, is_causal: bool, window: int | None) -> Tensor:
    """(Q, K) admissible keys by lag, tokens."""
    seen = lag >= 0 if is_causal else torch.ones_like(lag, dtype=torch.bool)
    return seen if window is None else seen & (lag < window)


def _read_off(weights: Tensor, lag: Tensor) -> Tensor | None:
    """(Q, K) keys that rounding alone can have brought to zero, of maps (H, Q, K) in 16 bits."""
    if weights.dtype in (torch.float32, torch.float64):
        return None
    seen = (weights > 0).any(0)
    return _pattern(lag, not bool(seen[lag < 0].any()), None) & seen.any(0) & seen.any(1, keepdim=True)


def _numbered(name: str, weights: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{index}" if name else str(index), layer) for index, layer in enumerate(weights)]


def _checked(layer: str, weights: Tensor, sink: bool) -> Tensor:
    weights = weights if weights.is_floating_point() else weights.float()
    wide = weights.double() if weights.dtype == torch.float64 else weights.float()
    check_no_nan(OWNER, f"the map {layer!r}", wide)
    low, high = float(wide.min()), float(wide.max())
    remedy = "Pass the weights after softmax"
    require(low >= 0 and high <= 1 + ROW_BOUND, OWNER, f"the map {layer!r}", "lie in [0, 1]", (low, high), remedy)
    sums = wide.sum(-1)
    off = (sums - 1).clamp(min=0) if sink else torch.minimum((sums - 1).abs(), sums.abs())
    worst = sums.flatten()[off.argmax()].item()
    rule = "have rows that sum to one (or zero, without admissible key)"
    remedy += ", or sink=True for rows that share with an explicit sink"
    require(float(off.max()) <= ROW_BOUND, OWNER, f"the map {layer!r}", rule, f"a sum of {worst:.4f}", remedy)
    return weights


def _load(path: Path) -> object:
    require(path.is_file(), OWNER, "attention", "be an existing file", str(path), "Check the path")
    known = path.suffix in (".npy", ".npz", ".safetensors")
    require(known, OWNER, "attention", "end in .npy, .npz or .safetensors", path.name, "Convert it")
    unreadable: tuple[type[Exception], ...] = (ValueError, OSError, EOFError, BadZipFile)
    if path.suffix == ".safetensors":
        check_installed(OWNER, "analysis", "safetensors")
        from safetensors import SafetensorError

        unreadable = (*unreadable, SafetensorError)
    try:
        return _arrays(path)
    except unreadable:
        fail(OWNER, "attention", f"be a {path.suffix} file of numbers, without pickles", str(path), "Save it again")


def _arrays(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as archive:
        return {name: archive[name] for name in archive.files}
