"""Load models from local folders: library classes and safetensors only, never pickles, never remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eotattn.checks import check_choice, check_device, require

__all__ = ["load_local_model"]

OWNER = "load_local_model"
#: Dtypes that models compute in.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def load_local_model(
    folder: str | Path | None, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[nn.Module, Any]:
    """Load a Hugging Face model and its tokenizer from a folder.

    Args:
        folder: Holds ``config.json``, the tokenizer's files and ``*.safetensors``. The class is the library's own: a
            causal language model where the configuration names one, else the bare model.
        device: Where the model goes.
        dtype: Of the weights: "float16", "bfloat16", "float32" or "float64".

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        ValueError: If the folder lacks a file, or wants code of its own.
        ModuleNotFoundError: If transformers is not installed.
    """
    require(folder is not None, OWNER, "model", "be given", folder, "Name the folder of a model")
    path = Path(str(folder))
    kind = getattr(torch, check_choice(OWNER, "dtype", dtype, DTYPES))
    check_device(OWNER, "device", device)
    _check_files(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    own_code = "auto_map" in config
    require(not own_code, OWNER, "model", "need no code of its own", config.get("auto_map"), "Use a library class")
    import transformers
    from safetensors import SafetensorError

    names = config.get("architectures") or [""]
    is_causal = names[0].endswith(("ForCausalLM", "LMHeadModel"))
    make = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model, info = make.from_pretrained(path, use_safetensors=True, dtype=kind, output_loading_info=True, **options)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{OWNER}: model must be readable; got {path.name!r}: {reason}. Save it again.") from error
    unread = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # what comes after attention may lack
    remedy = "Save the whole model; weights that are not there would be random"
    require(not unread, OWNER, "model", "hold every weight of its class", unread[:5], remedy)
    return model.eval().to(device), tokenizer


def _check_files(path: Path) -> None:
    require(path.is_dir(), OWNER, "model", "be a local folder", path.name, "Download the model first")
    has_config = (path / "config.json").is_file()
    require(has_config, OWNER, "model", "hold config.json", path.name, "Point at the folder of the model")
    has_weights = any(path.glob("*.safetensors"))
    require(has_weights, OWNER, "model", "hold safetensors", path.name, "Convert the weights; pickles are refused")
