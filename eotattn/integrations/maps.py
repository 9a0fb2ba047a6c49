"""Attention maps from anywhere: arrays and files, checked, as statistics by layer.

Legend: H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics import weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_indices, check_installed, check_no_nan, fail, require

__all__ = ["map_statistics", "read_maps"]

OWNER = "read_maps"
#: Largest admissible |sum of a row - 1|; 16-bit maps round.
ROW_BOUND = 1e-2

Maps = Mapping[str, Tensor]


def read_maps(attention: Tensor | NDArray[np.floating] | Mapping[str, object] | str | Path) -> dict[str, Tensor]:
    """Bring attention maps from anywhere into one form.

    Args:
        attention: Weights (H, Q, K) or (layers, H, Q, K) as a tensor or array, such arrays by layer name, or a file of
            them: ``.npy``, ``.npz`` or ``.safetensors``; pickles are refused. Rows sum to one, or to zero where no key
            is admissible.

    Returns:
        Layer name -> (H, Q, K).

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
            maps[layer] = _checked(layer, weights_of_layer)
    return maps


def map_statistics(
    maps: Maps, *, heads: Sequence[int] | None = None, keys: Sequence[int] = (0,)
) -> dict[str, SequenceStatistics]:
    """Compute the statistics of maps, as :func:`eotattn.integrations.capture` does of a running model.

    Args:
        maps: Layer name -> (H, Q, K), from :func:`read_maps`; each layer is one sequence. Queries are the last ones
            where there are fewer of them than keys.
        heads: Indices of heads to keep; all by default.
        keys: Chosen keys, counted from the first.

    Returns:
        Layer name -> statistics of one sequence. Logits are ln p: content and prior are not told apart.

    Example:
        >>> stats = map_statistics(read_maps(torch.full((1, 2, 4, 4), 0.25)))
        >>> stats["0"].sums["entropy"] / stats["0"].num_queries
        tensor([[1.3863, 1.3863]], dtype=torch.float64)
    """
    remedy = "Pass what read_maps returns"
    require(isinstance(maps, Mapping), "map_statistics", "maps", "map names to maps", maps, remedy, error=TypeError)
    statistics = {}
    for name, weights in maps.items():
        count = weights.shape[0]
        chosen = weights if heads is None else weights[check_indices("map_statistics", "heads", heads, count)]
        start = max(0, chosen.shape[2] - chosen.shape[1])
        rows = weight_statistics(chosen[None], query_start=start, keys=tuple(keys))
        statistics[name] = SequenceStatistics.of(rows)
    return statistics


def _numbered(name: str, weights: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{index}" if name else str(index), layer) for index, layer in enumerate(weights)]


def _checked(layer: str, weights: Tensor) -> Tensor:
    wide = weights if weights.dtype in (torch.float32, torch.float64) else weights.float()
    check_no_nan(OWNER, f"the map {layer!r}", wide)
    low, high = float(wide.min()), float(wide.max())
    remedy = "Pass the weights after softmax"
    require(low >= 0 and high <= 1 + ROW_BOUND, OWNER, f"the map {layer!r}", "lie in [0, 1]", (low, high), remedy)
    sums = wide.sum(-1)
    off = torch.minimum((sums - 1).abs(), sums.abs())
    worst = sums.flatten()[off.argmax()].item()
    rule = "have rows that sum to one (or zero, without admissible key)"
    require(float(off.max()) <= ROW_BOUND, OWNER, f"the map {layer!r}", rule, f"a sum of {worst:.4f}", remedy)
    return wide


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
