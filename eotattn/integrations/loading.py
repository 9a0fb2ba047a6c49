"""Load models from local folders: library classes and safetensors only, never pickles, never remote code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eotattn.checks import check_choice, check_device, check_installed, fail, require

__all__ = ["check_files", "load_local_model"]

OWNER = "load_local_model"
#: Dtypes that models compute in.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def load_local_model(
    folder: str | Path | None, *, device: str = "cpu", dtype: str = "float32", tokenizer_folder: Path | None = None
) -> tuple[nn.Module, Any]:
    """Load a Hugging Face model and its tokenizer from a folder.

    Args:
        folder: Holds ``config.json``, the tokenizer's files and ``*.safetensors``. The class is the library's own: a
            causal language model where the configuration names one, else the bare model.
        device: Where the model goes.
        dtype: Of the weights: "float16", "bfloat16", "float32" or "float64".
        tokenizer_folder: Holds the tokenizer's files instead.

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
    check_files(path)
    config = _read_config(path)
    own_code = "auto_map" in config
    require(not own_code, OWNER, "model", "need no code of its own", config.get("auto_map"), "Use a library class")
    check_installed(OWNER, "analysis", "transformers", "safetensors")
    import transformers
    from safetensors import SafetensorError

    kind_of_model, remedy = config.get("model_type"), "Save a model of the library"
    known = kind_of_model in transformers.CONFIG_MAPPING
    require(known, OWNER, "model", "be of a kind that transformers knows", kind_of_model, remedy)
    names = config.get("architectures") or [""]
    is_causal = names[0].endswith(("ForCausalLM", "LMHeadModel"))
    make = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    loading = {"use_safetensors": True, "dtype": kind, "output_loading_info": True}
    try:
        with _bars_on_terminals_only():
            tokenizer = _read_tokenizer(tokenizer_folder or path, options)
            _check_tokenizer(tokenizer_folder or path, tokenizer)
            model, info = make.from_pretrained(path, **loading, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fail(OWNER, "model", f"be readable ({reason})", str(path), "Save it again")
    unread = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # what comes after attention may lack
    remedy = "Save the whole model; weights that are not there would be random"
    require(not unread, OWNER, "model", "hold every weight of its class", unread[:5], remedy)
    return model.eval().to(device), tokenizer


def _read_tokenizer(path: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except ValueError:  # what it raises without the files, beside many lines of advice
        fail(OWNER, "model", "hold the files of its tokenizer", str(path), "Save the tokenizer there too")


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "Save the model again"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # of JSON or of UTF-8
        fail(OWNER, "model", "hold a config.json that is JSON", str(path), remedy)
    require(isinstance(config, dict), OWNER, "model", "hold a config.json of an object", str(path), remedy)
    return dict(config)


def _check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Without its files a class makes an empty tokenizer, for which every word is unknown."""
    files = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    there = not type(tokenizer).vocab_files_names or any((path / name).is_file() for name in files)
    require(there, OWNER, "model", "hold the files of its tokenizer", str(path), "Save the tokenizer there too")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_files(path: Path) -> None:
    """Raise unless a folder holds a configuration and safetensors."""
    require(path.is_dir(), OWNER, "model", "be a local folder", str(path), "Download the model first")
    has_config = (path / "config.json").is_file()
    require(has_config, OWNER, "model", "hold config.json", str(path), "Point at the folder of the model")
    has_weights = any(path.glob("*.safetensors"))
    require(has_weights, OWNER, "model", "hold safetensors", str(path), "Convert the weights; pickles are refused")
