"""Capture: stream statistics from every attention call of a model while it runs, without changing what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eotattn.attention.statistics import AttentionStatistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive_int, require
from eotattn.compat import uncompiled
from eotattn.diagnostics.grid_statistics import GridStatistics
from eotattn.diagnostics.token_statistics import TokenStatistics
from eotattn.diagnostics.top_keys import TopKeys
from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.integrations import hugging_face, prior_calls
from eotattn.integrations.frames import Frame, attends_by_hand, base_name
from eotattn.integrations.recorder import Recorder
from eotattn.integrations.torch_calls import TorchCalls
from eotattn.priors import LogPrior

__all__ = ["Capture", "capture"]


@dataclass(frozen=True, eq=False)
class Capture:
    """What a capture has collected so far; grows while the model runs.

    Args:
        recorder: Where the calls arrive.
    """

    recorder: Recorder

    @property
    def layers(self) -> dict[str, SequenceStatistics]:
        """Statistics by layer, in the order of the first call."""
        return dict(self.recorder.statistics)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each of those layers among all layers of the model, in the order of the first call."""
        return {name: self.recorder.seen[name] for name in self.recorder.statistics}

    @property
    def priors(self) -> dict[str, LogPrior | None]:
        """Log-priors of the layers that were called through :func:`eotattn.prior_attention`."""
        return dict(self.recorder.priors)

    @property
    def values(self) -> dict[str, ValueStatistics]:
        """Drains, contributions and ranks of the layers whose output projection was seen to read their output."""
        probe = self.recorder.value_probe
        found = {} if probe is None else probe.statistics
        return {name: found[name] for name in self.recorder.statistics if name in found}

    @property
    def token_scores(self) -> dict[str, TokenStatistics]:
        """Weights on keys whose token repeats, of the layers whose token ids were seen, where that was asked for."""
        return dict(self.recorder.token_scores or {})

    @property
    def top_keys(self) -> dict[str, TopKeys]:
        """Strongest keys of the first queries of whole sequences, by layer, where that was asked for."""
        return dict(self.recorder.top_keys)

    @property
    def from_weights(self) -> tuple[str, ...]:
        """Layers that compute softmax by hand: their statistics are those of the weights that they returned."""
        return tuple(self.recorder.from_weights)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Modules that ran and look like attention, and from which nothing arrived."""
        seen = {base_name(name) for name in self.recorder.seen}
        return tuple(name for name in self.recorder.frames.silent if name not in seen)

    @property
    def certificates(self) -> dict[str, Tensor]:
        """Largest duality gap (N, H) of the last rows of every certified call, by layer, nats."""
        return dict(self.recorder.certificates)

    @property
    def grids(self) -> dict[str, GridStatistics]:
        """Sums by lag in two axes, by layer, where a grid was named; see :func:`eotattn.diagnostics.fit_grid_prior`."""
        return dict(self.recorder.grids)


@contextmanager
def capture(  # noqa: PLR0913  (one argument an option of the watch)
    model: nn.Module,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    sink_positions: Sequence[int] = (0,),
    values: bool = True,
    token_scores: bool = False,
    top_key_rows: int = 0,
    on_rows: Callable[[str, AttentionStatistics], None] | None = None,
    certify: bool = False,
    grid: tuple[int, int] | None = None,
) -> Iterator[Capture]:
    """Stream statistics from every attention call that ``model`` makes inside the ``with`` block.

    The model's outputs do not change: its own functions compute them. Memory is O(L d) a call: where a Hugging Face
    model runs eager attention on long input, its function is called on blocks of rows and returns no maps. Listens to
    the attention interface of Hugging Face transformers (functions and masks), to :func:`eotattn.prior_attention`, to
    ``scaled_dot_product_attention`` and to ``nn.MultiheadAttention``. The last rows of every call are compared with the
    model's own output, so that a kind of attention that is not understood raises instead of being misread. A module
    that computes softmax by hand is read by the weights that it returns, with ``output_attentions`` where it has that
    argument; a warning names those modules, and those that look like attention and show nothing.

    Prompts accumulate, batches are sequences; a pass that continues a cache continues its sequences. Queries that are
    padding do not count where the model was told of padding. A block that reads its own last output, as models that
    share weights over depth have it, is one layer a pass: "name", "name (pass 2)", ...; further calls of one run of a
    module are "name (call 2)", ... Compiled code runs uncompiled inside the block.

    Args:
        model: Any module; it keeps its weights, configuration and attention implementation. Modules outside it are not
            recorded.
        layers: Names (as in ``named_modules``) or indices (in the order of first calls) of layers to keep; all by
            default.
        heads: Indices of heads to keep; all by default.
        sink_positions: Chosen keys, counted from the first token of each sequence; the first one is the sink of margins
            and values.
        values: Whether to look at values and output projections. A projection that is no plain linear layer (with an
            adapter, quantised, or kept elsewhere until it runs) is run once more a call, on the identity.
        token_scores: Whether to sum weights over keys whose token repeats, for duplicate-token and induction scores:
            a second pass over the scores, of calls over whole sequences of a model that is given token ids.
        top_key_rows: First queries of every whole sequence whose strongest keys are kept; none by default.
        on_rows: Called with (layer name, row statistics) after every call, e.g. to keep rows.
        certify: Also certify the weights of the last rows of every call, as the model's own kernel makes them. That
            takes K / V more calls, so calls of more than 1024 keys are left out.
        grid: Rows and columns of the patches of a vision model, to collect their lags in two axes as well; a class
            token may come before them. Takes a second pass over the scores.

    Yields:
        :class:`Capture`; read ``layers`` at any time, also after the block.

    Raises:
        NotImplementedError: If the model ran and no attention call arrived, one is not understood, or tokens are taken
            back (speculative decoding).
        ValueError: If layers or heads do not exist.

    Example:
        >>> import torch
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> with capture(layer) as captured:
        ...     _ = layer(x := torch.ones(1, 3, 8), x, x)
        >>> [stats.num_heads for stats in captured.layers.values()]
        [2]
    """
    require(
        isinstance(model, nn.Module), "capture", "model", "be a module", type(model), "Load it first", error=TypeError
    )
    for key in sink_positions:
        check_positive_int("capture", "sink_positions", key, minimum=0)
    require(len(sink_positions) > 0, "capture", "sink_positions", "name at least one key", sink_positions, "Pass (0,)")
    check_positive_int("capture", "top_key_rows", top_key_rows, minimum=0)
    require(layers is None or len(layers) > 0, "capture", "layers", "name at least one", layers, "Pass None for all")
    recorder = Recorder(
        layers,
        heads,
        tuple(sink_positions),
        values=values,
        token_scores=token_scores,
        top_key_rows=top_key_rows,
        on_rows=on_rows,
        certify=certify,
        grid=grid,
    )
    captured, model = Capture(recorder), uncompiled(model)
    with ExitStack() as stack:
        if "flex_attention" not in hugging_face.implementations(model):  # which is a table of L x L unless compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_following(model, recorder))
        stack.enter_context(hugging_face.listen(model, recorder))
        stack.enter_context(prior_calls.listen(recorder))
        stack.enter_context(TorchCalls(recorder))
        yield captured
    _check_arrivals(model, captured)


@contextmanager
def _following(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep track of the module that is running, so that calls get its name."""
    handles: list[RemovableHandle] = []

    def enter(name: str, by_hand: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return recorder.enter(Frame(name, module, args, kwargs), ask_weights=by_hand)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return recorder.leave(output)

    try:
        for prefix, module in model.named_modules():
            name = prefix or type(module).__name__
            handles.append(
                module.register_forward_pre_hook(enter(name, attends_by_hand(module)), prepend=True, with_kwargs=True)
            )
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_arrivals(model: nn.Module, captured: Capture) -> None:
    """Raise if the model ran without an attention call, or wanted layers never came; name what was not seen."""
    recorder, unseen = captured.recorder, ", ".join(captured.unseen)
    if recorder.frames.num_forwards == 0:
        return
    if not recorder.seen:
        configs = len(hugging_face.configurations(model))
        silent = f" Modules that look like attention: {unseen}." if unseen else ""
        raise NotImplementedError(
            f"capture: {type(model).__name__} ran and no attention call arrived. Tried the attention interface of "
            f"Hugging Face transformers ({configs} configurations found), eotattn.prior_attention, "
            f"scaled_dot_product_attention, nn.MultiheadAttention and the weights that modules return.{silent} Analyse "
            f"its attention maps instead."
        )
    known = {*recorder.seen, *map(base_name, recorder.seen), *recorder.seen.values()}
    missing = [layer for layer in recorder.wanted or () if layer not in known]
    names = ", ".join(f"{index}: {name}" for name, index in recorder.seen.items())
    require(not missing, "capture", "layers", f"be among {{{names}}}", missing, "Choose layers that the model has")
    if unseen:
        text = f"capture: these modules look like attention, and no call of theirs was seen: {unseen}. They are missing"
        warnings.warn(f"{text} from every result.", UserWarning, stacklevel=4)
    if captured.from_weights:
        names, text = (
            ", ".join(captured.from_weights),
            "capture: these layers compute softmax by hand, and were read by",
        )
        warnings.warn(f"{text} the L x L weights that they return, without values: {names}.", UserWarning, stacklevel=4)
