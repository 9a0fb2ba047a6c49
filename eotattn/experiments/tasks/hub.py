"""Data sets of the Hugging Face Hub, streamed by the library ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eotattn.checks import check_installed

__all__ = ["open_data_set"]


def open_data_set(owner: str, name: str, *configuration: str, remedy: str, **options: Any) -> Any:
    """A data set of the Hub, or a folder of parquet, CSV or JSON files, as a stream of rows."""
    check_installed(owner, "data", "datasets")
    import datasets
    import huggingface_hub

    try:
        if not Path(name).is_dir():
            huggingface_hub.HfApi().dataset_info(name, timeout=10)  # once, without the long patience of downloads
        return datasets.load_dataset(name, *configuration, streaming=True, **options)
    except Exception as error:  # which class it is depends on the versions of the library and of its transport
        reason = (str(error).strip().splitlines() or ["no details"])[0][:160]
        message = (
            f"{owner}: the data set {name!r} must be reachable on the Hugging Face Hub; got {type(error).__name__}: "
            f"{reason}. Connect to the network, or {remedy}."
        )
        raise ValueError(message) from error
