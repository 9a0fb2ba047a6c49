"""Analyse a trained model on texts, or stored attention maps: one call, one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eotattn.analysis.analysis_report import Analysis, summarize
from eotattn.analysis.findings import findings
from eotattn.analysis.folder import PAGE, check_folder, write_analysis
from eotattn.analysis.shards import Shards, shards
from eotattn.analysis.summary import Subject, TextFindings
from eotattn.analysis.texts import EncodedTexts, GivenText, check_texts, encode
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
    texts: Sequence[GivenText] = (),
    *,
    tokenizer: Any = None,
    attention: Any = None,
    out: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    max_length: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    report: Callable[[str], object] | None = print,
) -> Analysis:
    """Run a model on texts and say where its sinks are, what they are made of, and how much of each head is a prior.

    Under torchrun the processes share the texts, and every one returns what a single one would.

    Args:
        model: A Hugging Face model, or the folder of one (``config.json``, tokenizer, safetensors; library classes
            only, never pickles or remote code), or any module that takes token ids (1, L).
        texts: At least one text of at least two tokens. Of vision, speech and encoder-decoder models: what their
            processor or tokenizer makes of one sample, with tensors, e.g. ``pixel_values``, or ``input_ids`` and
            ``decoder_input_ids``; passed on by name.
        tokenizer: Of a model that is given as an object; :class:`ByteTokenizer` for models of bytes. Of the folder of a
            model: the folder of its tokenizer, where that is another.
        attention: Instead of model and texts: attention maps as :func:`eotattn.integrations.read_maps` takes them.
        out: Folder for tables, figures and ``report.html``; written when all is done. Nothing is written without.
        layers: Names or indices of layers; all by default.
        heads: Indices of heads; all by default.
        max_length: Longer texts are cut here, tokens; whole texts by default.
        batch_size: Texts that run together where neighbours are equally long; results are the same.
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
    check_positive_int(OWNER, "batch_size", batch_size)
    check_texts(texts)
    given_model = model
    with shards() as processes:
        if isinstance(model, (str, Path)):
            rule = "not be given with the folder of a model, unless as a folder too"
            is_place = tokenizer is None or isinstance(tokenizer, (str, Path))
            require(is_place, OWNER, "tokenizer", rule, tokenizer, "Drop it")
            model, tokenizer = load_local_model(
                model,
                device=processes.device(device or "cpu"),
                dtype=dtype or "float32",
                tokenizer_folder=None if tokenizer is None else Path(tokenizer),
            )
        else:
            _check_idle({"device": device, "dtype": dtype}, "with a model object")
        assert model is not None
        _check_model(model, tokenizer, texts)
        subject = Subject.today(_name_of(model, folder=given_model))
        encoded = encode(model, tokenizer, texts, max_length)
        result = _run(model, encoded, encoded.batches(batch_size), layers, heads, processes, subject)
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


def _check_model(model: nn.Module, tokenizer: Any, texts: Sequence[GivenText]) -> None:
    is_module, remedy = isinstance(model, nn.Module), "Load it first, or name its folder"
    require(is_module, OWNER, "model", "be a module or the folder of one", model, remedy, error=TypeError)
    if not any(isinstance(text, str) for text in texts):
        return
    require(tokenizer is not None, OWNER, "tokenizer", "be given with a model object", None, "Pass its tokenizer")
    is_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    remedy = "Pass what its tokenizer makes, input_ids and decoder_input_ids, instead of texts"
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
    batches: list[list[int]],
    layers: Sequence[str | int] | None,
    heads: Sequence[int] | None,
    processes: Shards,
    subject: Subject,
) -> Analysis:
    """Run this process's texts; an interruption keeps the finished ones."""
    found: dict[int, TextFindings] = {}
    was_training, own = model.training, processes.own(batches)
    model.eval()
    try:
        for number, places in tqdm(
            own, desc="texts", unit="batch", leave=False, disable=None if processes.rank == 0 else True
        ):
            rows = PICTURED_ROWS if places[0] < PICTURED_TEXTS else 0
            inputs = [texts.inputs[place] for place in places]
            part = _run_batch(model, inputs, layers, heads, certify=number == 0, top_key_rows=rows)
            found[number] = replace(part, tokens=tuple(texts.tokens[place] for place in places), count=len(places))
    except KeyboardInterrupt:
        if not found and processes.count == 1:
            raise
    finally:
        model.train(was_training)
    parts = processes.gathered(found)
    if not parts:
        raise KeyboardInterrupt
    counts = {"num_given": len(texts.inputs), "num_cut": texts.num_cut}
    return summarize(parts, subject=subject, chosen_heads=heads, **counts)


@torch.no_grad()
def _run_batch(
    model: nn.Module,
    inputs: Sequence[Tensor | Mapping[str, Tensor]],
    layers: Sequence[str | int] | None,
    heads: Sequence[int] | None,
    **options: Any,
) -> TextFindings:
    """Texts of one length, or what a processor made of one; options are those of the capture."""
    device = next(model.parameters()).device
    ids = torch.cat([given for given in inputs if isinstance(given, Tensor)]) if isinstance(inputs[0], Tensor) else None
    with residuals(model) as norms, capture(model, layers, heads, token_scores=True, **options) as captured:
        if ids is not None:
            output = model(ids.to(device))
        else:
            output = model(
                **{name: value.to(device) for name, value in cast("Mapping[str, Tensor]", inputs[0]).items()}
            )
    return TextFindings(
        captured.layers,
        captured.values,
        captured.certificates,
        norms,
        captured.numbers,
        captured.token_scores,
        captured.top_keys,
        loss=() if ids is None else _next_token_losses(model, output, ids),
    )


def _next_token_losses(model: nn.Module, output: Any, ids: Tensor) -> tuple[float, ...]:
    """Mean nats of the tokens after the first, a text, of a causal language model of transformers; else nothing."""
    logits, name = getattr(output, "logits", None), type(base_model(model)).__name__
    if logits is None or not name.endswith(("ForCausalLM", "LMHeadModel")):
        return ()
    targets = ids[:, 1:].to(logits.device)
    each = [functional.cross_entropy(row[:-1].float(), target) for row, target in zip(logits, targets, strict=True)]
    return tuple(map(float, each))
