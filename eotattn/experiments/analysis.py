"""Analyse a trained model on texts, or stored attention maps: one call, one folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from eotattn.attention.running import SequenceStatistics
from eotattn.checks import check_positive_int, require
from eotattn.diagnostics.heads import HeadReport, head_report
from eotattn.diagnostics.implicit_prior import ImplicitPriorReport, fit_prior
from eotattn.experiments.analysis_folder import check_folder, write_analysis
from eotattn.integrations.capture import capture
from eotattn.integrations.loading import load_local_model
from eotattn.integrations.maps import map_statistics, read_maps
from eotattn.integrations.residuals import residuals

__all__ = ["Analysis", "analyze", "read_texts"]

OWNER = "analyze"


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that was found.

    Attributes:
        heads: The table of all heads.
        priors: Layer -> two-part prior of its heads; layers whose rows have explicit sinks are missing.
        statistics: Layer -> sums by sequence.
        tokens: Tokens of the first text, for labels.
        residual_norms: Column -> list with one entry a block: mean norms of the first token and of the others.
        num_texts: Texts that were finished.
    """

    heads: HeadReport
    priors: dict[str, ImplicitPriorReport]
    statistics: dict[str, SequenceStatistics]
    tokens: tuple[str, ...] = ()
    residual_norms: dict[str, list[float]] = field(default_factory=dict)
    num_texts: int = 0

    def explained(self) -> NDArray[np.float64]:
        """(layers, heads) explained divergence: held out where there are several sequences, else in sample."""
        grid = np.full_like(self.heads.mean["entropy"], np.nan)
        for a, layer in enumerate(self.heads.layers):
            if layer in self.priors:
                report = self.priors[layer]
                values = report.explained_in_sample if np.isnan(report.explained).all() else report.explained
                grid[a, : len(values)] = values
        return grid

    def __str__(self) -> str:
        """The table of heads, averaged by layer."""
        return str(self.heads)


def analyze(
    model: nn.Module | str | Path | None = None,
    texts: Sequence[str] = (),
    *,
    tokenizer: Any = None,
    attention: Any = None,
    out: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    max_length: int = 512,
) -> Analysis:
    """Run a model on texts and say where its sinks are, what they are made of, and how much of each head is a prior.

    Args:
        model: A Hugging Face model, or the folder of one (``config.json``, tokenizer, safetensors; library classes
            only, never pickles or remote code). A model keeps its device and dtype.
        texts: At least one text of at least two tokens; the first one's tokens label the report.
        tokenizer: Of a model that is given as an object.
        attention: Instead of model and texts: attention maps as :func:`eotattn.integrations.read_maps` takes them.
        out: Folder for tables, figures and ``report.html``; written when all is done. Nothing is written without.
        layers: Names or indices of layers; all by default.
        heads: Indices of heads; all by default.
        max_length: Longer texts are cut here, tokens; also by the model's number of positions.

    Returns:
        :class:`Analysis`. An interruption (Ctrl-C) ends the run and keeps the texts that were finished.

    Raises:
        ValueError: For texts, folders, layers or heads that do not fit.

    Example:
        >>> print(str(analyze(attention=torch.full((1, 2, 4, 4), 0.25))).split()[0])
        layer
    """
    given = (attention is None) != (model is None)
    require(given, OWNER, "model", "be given if and only if attention is not", model, "Pass one of the two")
    folder = None if out is None else check_folder(OWNER, Path(out))
    if attention is not None:
        require(len(texts) == 0, OWNER, "texts", "not be given with attention maps", len(texts), "Drop them")
        result = _finished(map_statistics(read_maps(attention), heads=heads), (), {}, 1)
    else:
        check_positive_int(OWNER, "max_length", max_length, minimum=2)
        assert model is not None
        if isinstance(model, (str, Path)):
            model, tokenizer = load_local_model(model)
        require(tokenizer is not None, OWNER, "tokenizer", "be given with a model object", None, "Pass its tokenizer")
        encoded = _encoded(model, tokenizer, texts, max_length)
        result = _run(model, tokenizer, encoded, layers, heads)
    if folder is not None:
        write_analysis(folder, result)
    return result


def read_texts(text: str | Path | None, texts: str | Path | None) -> list[str]:
    """Texts of a plain file (one text) or of a JSON-lines file (strings, or objects with a key ``text``).

    Raises:
        ValueError: If neither or both are given, the file does not exist, or a line holds no text.
    """
    require(
        (text is None) != (texts is None), OWNER, "texts", "come from one file", (text, texts), "Pass one of the two"
    )
    path = Path(str(text if text is not None else texts))
    require(path.is_file(), OWNER, "texts", "be an existing file", path.name, "Check the path")
    content = path.read_text(encoding="utf-8")
    if text is not None:
        return [content]
    found = [json.loads(line) for line in content.splitlines() if line.strip()]
    strings = [line.get("text") if isinstance(line, dict) else line for line in found]
    for number, line in enumerate(strings, 1):
        require(isinstance(line, str), OWNER, f"line {number}", "hold a text", line, 'Write {"text": "..."}')
    return [str(line) for line in strings]


def _encoded(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Tensor]:
    require(not isinstance(texts, str), OWNER, "texts", "be a list of texts", type(texts), "Wrap it", error=TypeError)
    require(len(texts) > 0, OWNER, "texts", "hold at least one text", list(texts), "Pass a text")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or max_length
    encoded = []
    for number, text in enumerate(texts):
        require(bool(text.strip()), OWNER, f"texts[{number}]", "not be empty", text[:20], "Drop it")
        ids = tokenizer(text, truncation=True, max_length=min(max_length, limit), return_tensors="pt")["input_ids"]
        rule = "have at least two tokens"
        require(ids.shape[1] >= 2, OWNER, f"texts[{number}]", rule, tuple(ids.shape), "Pass a longer text")
        encoded.append(ids)
    return encoded


def _run(
    model: nn.Module,
    tokenizer: Any,
    encoded: Iterable[Tensor],
    layers: Sequence[str | int] | None,
    heads: Sequence[int] | None,
) -> Analysis:
    """Run every text; an interruption keeps the finished ones."""
    encoded = list(encoded)
    device = next(model.parameters()).device
    done, was_training = 0, model.training
    model.eval()
    statistics: dict[str, SequenceStatistics] = {}
    try:
        with torch.no_grad(), residuals(model) as norms:
            for ids in tqdm(encoded, desc="texts", unit="text", leave=False):
                with capture(model, layers, heads) as captured:
                    model(input_ids=ids.to(device))
                for name, stats in captured.layers.items():
                    statistics[name] = statistics[name] + stats if name in statistics else stats
                done += 1
    except KeyboardInterrupt:
        if done == 0:
            raise
    finally:
        model.train(was_training)
    tokens = tuple(tokenizer.convert_ids_to_tokens(encoded[0][0].tolist()))
    means = {
        "first token": [float(np.mean(values)) for values in norms.first_token.values()],
        "other tokens": [float(np.mean(values)) for values in norms.other_tokens.values()],
    }
    return _finished(statistics, tokens, means, done)


def _finished(
    statistics: dict[str, SequenceStatistics], tokens: tuple[str, ...], norms: dict[str, list[float]], count: int
) -> Analysis:
    priors = {}
    for layer, stats in statistics.items():
        if float(stats.sums["explicit_sink_mass"].sum()) == 0 and int(stats.num_queries.max()) > 1:
            priors[layer] = fit_prior(stats)
    return Analysis(head_report(statistics), priors, statistics, tokens, norms, count)
