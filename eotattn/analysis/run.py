"""Analyse a trained model on texts, or stored attention maps: one call, one folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eotattn.analysis.analysis_report import Analysis, summarize
from eotattn.analysis.findings import findings
from eotattn.analysis.folder import PAGE, check_folder, write_analysis
from eotattn.analysis.shards import Shards, shards
from eotattn.analysis.summary import Subject, TextFindings
from eotattn.analysis.texts import EncodedTexts, check_texts, encode
from eotattn.attention.statistics.score_rows import WeightRows
from eotattn.checks import check_positive_int, require, speaking_as
from eotattn.diagnostics import TopKeys
from eotattn.integrations.attachment import base_model
from eotattn.integrations.capture import capture
from eotattn.integrations.loading import load_local_model
from eotattn.integrations.maps import map_statistics, read_maps
from eotattn.integrations.residuals import residuals

__all__ = ["analyze"]

OWNER = "analyze"
#: Texts, and first queries of each, whose strongest keys are kept for pictures of single heads.
PICTURED_TEXTS, PICTURED_ROWS = 4, 256


@speaking_as(OWNER)
def analyze(  # noqa: PLR0913  (one argument an option of the command)
    model: nn.Module | str | Path | None = None,
    texts: Sequence[str] = (),
    *,
    tokenizer: Any = None,
    attention: Any = None,
    out: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    report: Callable[[str], object] | None = print,
) -> Analysis:
    """Run a model on texts and say where its sinks are, what they are made of, and how much of each head is a prior.

    Under torchrun the processes share the texts, and every one returns what a single one would.

    Args:
        model: A Hugging Face model, or the folder of one (``config.json``, tokenizer, safetensors; library classes
            only, never pickles or remote code), or any module that takes token ids (1, L).
        texts: At least one text of at least two tokens.
        tokenizer: Of a model that is given as an object; :class:`ByteTokenizer` for models of bytes. Of the folder of a
            model: the folder of its tokenizer, where that is another.
        attention: Instead of model and texts: attention maps as :func:`eotattn.integrations.read_maps` takes them.
        out: Folder for tables, figures and ``report.html``; written when all is done. Nothing is written without.
        layers: Names or indices of layers; all by default.
        heads: Indices of heads; all by default.
        max_length: Longer texts are cut here, tokens; whole texts by default.
        device: Where the model of a folder runs, "cpu" by default; a model object stays where it is.
        dtype: Dtype of the weights of a folder, "float32" by default; a model object keeps its own.
        report: Told, at the end, what was found in three sentences and where the page is; where ``out`` is given.

    Returns:
        :class:`Analysis`. An interruption (Ctrl-C) ends the run and keeps the texts that were finished.

    Raises:
        ValueError: For texts, folders, layers or heads that do not fit.
        KeyboardInterrupt: If no text was finished.

    Example:
        >>> print(str(analyze(attention=torch.full((1, 2, 4, 4), 0.25))).split()[0])
        layer
    """
    given = (attention is None) != (model is None)
    require(given, OWNER, "model", "be given if and only if attention is not", model, "Pass one of the two")
    if layers is not None:
        is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
        require(
            is_list, OWNER, "layers", "be a list of names and numbers", layers, "Put it into a list", error=TypeError
        )
    folder = None if out is None else check_folder(OWNER, Path(out))
    if attention is not None:
        idle = {"texts": texts or None, "max_length": max_length, "device": device, "dtype": dtype}
        _check_idle(idle | {"tokenizer": tokenizer}, "with attention maps")
        kind = f"attention maps of {Path(attention).name}" if isinstance(attention, (str, Path)) else "attention maps"
        subject = Subject.today(kind)
        result = summarize([_map_findings(attention, layers, heads)], subject=subject, chosen_heads=heads)
        _write(folder, result, Shards(), report, out)
        return result
    if max_length is not None:
        check_positive_int(OWNER, "max_length", max_length, minimum=2)
    check_texts(texts)
    given_model = model
    with shards() as processes:
        if isinstance(model, (str, Path)):
            rule, remedy = "be a folder beside the folder of a model", "Drop it"
            is_place = tokenizer is None or isinstance(tokenizer, (str, Path))
            require(is_place, OWNER, "tokenizer", rule, type(tokenizer), remedy)
            model, tokenizer = load_local_model(
                model,
                device=processes.device(device or "cpu"),
                dtype=dtype or "float32",
                tokenizer_folder=None if tokenizer is None else Path(tokenizer),
            )
        else:
            _check_idle({"device": device, "dtype": dtype}, "with a model object")
        assert model is not None
        _check_model(model, tokenizer)
        subject = Subject.today(_name_of(model, folder=given_model))
        result = _run(model, encode(model, tokenizer, texts, max_length), layers, heads, processes, subject)
        _write(folder, result, processes, report, out)
    return result


def _write(
    folder: Path | None,
    result: Analysis,
    processes: Shards,
    report: Callable[[str], object] | None,
    given: str | Path | None,
) -> None:
    """Write, and say what was found, in the first process alone; ``given`` is the folder as the user named it."""
    if folder is None or processes.rank > 0:
        return
    write_analysis(folder, result)
    if report is not None:
        for line in (*findings(result), f"Page, with what each quantity is: {given}/{PAGE}"):
            report(line)


def _check_idle(arguments: dict[str, Any], where: str) -> None:
    """An argument that would have no effect raises."""
    for name, value in arguments.items():
        require(value is None, OWNER, name, f"not be given {where}", value, "Drop it")


def _check_model(model: nn.Module, tokenizer: Any) -> None:
    is_module, remedy = isinstance(model, nn.Module), "Load it first, or name its folder"
    require(is_module, OWNER, "model", "be a module or the folder of one", model, remedy, error=TypeError)
    require(tokenizer is not None, OWNER, "tokenizer", "be given with a model object", None, "Pass its tokenizer")
    is_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    remedy = "Capture its calls with eotattn.integrations.capture, or pass its encoder"
    require(not is_pair, OWNER, "model", "be an encoder or a decoder, not both", type(model).__name__, remedy)


def _name_of(model: nn.Module, folder: object) -> str:
    """Class and name: that of the folder, or the one that the configuration has."""
    known = getattr(getattr(model, "config", None), "name_or_path", "")
    name = Path(str(folder if isinstance(folder, (str, Path)) else known)).name
    return f"{type(model).__name__} {name}".strip()


def _map_findings(attention: Any, layers: Sequence[str | int] | None, heads: Sequence[int] | None) -> TextFindings:
    """Statistics of the chosen layers and heads of stored maps."""
    maps = read_maps(attention)
    numbers = {name: number for number, name in enumerate(maps)}
    if layers is not None:
        names = list(maps)
        known = all(layer in names or (isinstance(layer, int) and 0 <= layer < len(names)) for layer in layers)
        listed = ", ".join(f"{index}: {name}" for index, name in enumerate(names))
        require(known, OWNER, "layers", f"be among {{{listed}}}", list(layers), "Choose layers that the maps have")
        chosen = {layer if layer in names else names[int(layer)] for layer in layers}
        maps = {name: weights for name, weights in maps.items() if name in chosen}
    statistics = map_statistics(maps, heads=heads)
    top_keys = {name: TopKeys.of(WeightRows(weights[None]), rows=PICTURED_ROWS) for name, weights in maps.items()}
    top_keys = top_keys if heads is None else {name: kept.heads(list(heads)) for name, kept in top_keys.items()}
    return TextFindings(statistics, numbers=numbers, top_keys=top_keys)


def _run(
    model: nn.Module,
    texts: EncodedTexts,
    layers: Sequence[str | int] | None,
    heads: Sequence[int] | None,
    processes: Shards,
    subject: Subject,
) -> Analysis:
    """Run this process's texts; an interruption keeps the finished ones."""
    found: dict[int, TextFindings] = {}
    was_training, own = model.training, processes.own(texts.ids)
    model.eval()
    try:
        for place, ids in tqdm(
            own, desc="texts", unit="text", leave=False, disable=None if processes.rank == 0 else True
        ):
            rows = PICTURED_ROWS if place < PICTURED_TEXTS else 0
            part = _run_text(model, ids, layers, heads, certify=place == 0, top_key_rows=rows)
            found[place] = replace(part, tokens=texts.tokens[place])
    except KeyboardInterrupt:
        if not found and processes.count == 1:
            raise
    finally:
        model.train(was_training)
    parts = processes.gathered(found)
    if not parts:
        raise KeyboardInterrupt
    counts = {"num_given": len(texts.ids), "num_cut": texts.num_cut}
    return summarize(parts, subject=subject, chosen_heads=heads, **counts)


@torch.no_grad()
def _run_text(
    model: nn.Module,
    ids: Tensor,
    layers: Sequence[str | int] | None,
    heads: Sequence[int] | None,
    **options: Any,
) -> TextFindings:
    """One text; options are those of the capture."""
    device = next(model.parameters()).device
    with residuals(model) as norms, capture(model, layers, heads, token_scores=True, **options) as captured:
        output = model(ids.to(device))
    return TextFindings(
        captured.layers,
        captured.values,
        captured.certificates,
        norms,
        captured.numbers,
        captured.token_scores,
        captured.top_keys,
        loss=_next_token_loss(model, output, ids),
    )


def _next_token_loss(model: nn.Module, output: Any, ids: Tensor) -> float:
    """Mean nats of the tokens after the first, of a causal language model of transformers; else NaN."""
    logits, name = getattr(output, "logits", None), type(base_model(model)).__name__
    if logits is None or not name.endswith(("ForCausalLM", "LMHeadModel")):
        return math.nan
    return float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)))
