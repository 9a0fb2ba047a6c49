"""Attached priors as one file: safetensors, with a card that says which model, layers and heads they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention import AttentionSinks
from eotattn.checks import check_installed, require, speaking_as
from eotattn.integrations.attachment import base_model, spoken_of
from eotattn.integrations.prior_interface import LayerChange, layer_changes
from eotattn.priors import LogPrior
from eotattn.provenance import check_writable, write_atomically

__all__ = ["load_prior", "save_prior"]

#: Key of the card among the metadata of the file.
CARD = "eotattn"
#: Largest relative difference of the norms of two copies of one embedding: what a cast to bfloat16 changes, ten times.
SAME_WEIGHTS = 1e-4


@speaking_as("save_prior")
def save_prior(model: nn.Module, path: str | Path) -> Path:
    """Write the priors that are attached to a model, and nothing else of it.

    Args:
        model: A model that :func:`attach` gave priors.
        path: The file, e.g. ``prior.safetensors``; its folder is made where it is missing.

    Returns:
        The path.

    Raises:
        ValueError: If no priors are attached, or the file cannot be written.
    """
    check_installed("save_prior", "analysis", "safetensors")
    from safetensors.torch import save

    model, path = base_model(model), Path(path)
    changes = _attached(model, "save_prior", "Attach some first")
    numbers = {
        f"{layer}.{name}": value.detach().cpu().clone().contiguous()
        for layer, change in changes.items()
        for name, value in change.state_dict().items()
    }
    check_writable("save_prior", path.parent, given=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(numbers, metadata={CARD: json.dumps(_card(model, changes))}))
    return path


@speaking_as("load_prior")
def load_prior(model: nn.Module, path: str | Path) -> None:
    """Read priors into a model to which priors of the same kind are attached.

    Args:
        model: As the file's card says: the same model, and the same priors on the same layers and heads.
        path: What :func:`save_prior` wrote.

    Raises:
        ValueError: If the file is none of priors, or its card and the model differ; nothing is changed then.
    """
    check_installed("load_prior", "analysis", "safetensors")
    from safetensors import SafetensorError, safe_open

    model, path = base_model(model), Path(path)
    changes = _attached(model, "load_prior", "Attach priors of the same kind first")
    require(path.is_file(), "load_prior", "path", "be an existing file", str(path), "Check the path")
    remedy = "Pass a file that save_prior wrote"
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CARD)
            numbers: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        text, numbers = None, {}
    require(text is not None, "load_prior", "path", "hold priors and their card", str(path), remedy)
    _check_card(json.loads(str(text)), _card(model, changes))
    for layer, change in changes.items():
        start = f"{layer}."
        own = {name[len(start) :]: value for name, value in numbers.items() if name.startswith(start)}
        change.load_state_dict(own)


def _attached(model: nn.Module, owner: str, remedy: str) -> dict[str, LayerChange]:
    changes = layer_changes(model)
    require(len(changes) > 0, owner, "model", "have priors attached", type(model).__name__, remedy)
    return changes


def _card(model: nn.Module, changes: dict[str, LayerChange]) -> dict[str, Any]:
    """What a reader must agree with, and the name of the base model for people."""
    config: Any = getattr(model, "config", None)
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)
    weight = getattr(embedding(), "weight", None)
    return {
        "base_model": str(getattr(config, "name_or_path", "")),
        "class": type(model).__name__,
        "embedding_norm": None if weight is None else float(weight.detach().double().norm()),
        "layers": list(changes),
        "heads": {name: list(spoken_of(change.prior)) for name, change in changes.items() if change.prior is not None},
        "priors": {name: _told(change) for name, change in changes.items()},
    }


def _told(change: LayerChange) -> str:
    """Classes and constants of a prior, its parts and sinks: what a state dict leaves out."""
    parts = []
    for name, part in change.named_modules():
        if isinstance(part, (LogPrior, AttentionSinks)):
            constants = {
                key: value
                for key, value in sorted(vars(part).items())
                if not key.startswith("_") and isinstance(value, (int, float, str, tuple)) and key != "training"
            }
            parts.append(f"{name}: {type(part).__name__}({constants})")
    shapes = {name: tuple(value.shape) for name, value in change.state_dict().items()}
    return "; ".join([*parts, str(shapes)])


def _check_card(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise at the first difference that matters; the name of the base model may differ, its weights may not."""
    remedy = f"They belong to {theirs['base_model'] or 'a model without a name'}; attach as they were attached there"
    for entry in ("class", "layers", "heads"):
        same = theirs[entry] == ours[entry]
        require(same, "load_prior", entry, f"be {theirs[entry]}, as the file says", ours[entry], remedy)
    for layer, told in theirs["priors"].items():
        same = told == ours["priors"][layer]
        require(same, "load_prior", f"prior of {layer}", f"be {told}", ours["priors"][layer], remedy)
    norms = [torch.nan if card["embedding_norm"] is None else card["embedding_norm"] for card in (theirs, ours)]
    same = theirs["embedding_norm"] == ours["embedding_norm"] or abs(norms[0] / norms[1] - 1) <= SAME_WEIGHTS
    rule = f"have the embedding of the base model, of norm {norms[0]:.6g}"
    require(same, "load_prior", "model", rule, f"{norms[1]:.6g}", remedy)
