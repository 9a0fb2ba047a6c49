"""Capture: stream statistics from every attention call of a model while it runs, without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eotattn.attention.statistics import AttentionStatistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive_int, require
from eotattn.diagnostics.grid_statistics import GridStatistics
from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.integrations import hugging_face, prior_calls
from eotattn.integrations.recorder import Recorder
from eotattn.integrations.torch_calls import TorchCalls
from eotattn.priors import LogPrior

__all__ = ["Capture", "capture"]


@dataclass(frozen=True, eq=False)
class Capture:
    """What a capture has collected so far; grows while the model runs.

    Args:
        recorder: Where the calls arrive.
        keys: Chosen keys, counted from the start of each sequence.
    """

    recorder: Recorder
    keys: tuple[int, ...]

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
        return self.recorder.values

    @property
    def certificates(self) -> dict[str, Tensor]:
        """Largest duality gap (N, H) of the last rows of every certified call, by layer, nats."""
        return dict(self.recorder.certificates)

    @property
    def grids(self) -> dict[str, GridStatistics]:
        """Sums by lag in two axes, by layer, where a grid was named; see :func:`eotattn.diagnostics.fit_grid_prior`."""
        return dict(self.recorder.grids)


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    keys: Sequence[int] = (0,),
    on_rows: Callable[[str, AttentionStatistics], None] | None = None,
    certify: bool = False,
    grid: tuple[int, int] | None = None,
) -> Iterator[Capture]:
    """Stream statistics from every attention call that ``model`` makes inside the ``with`` block.

    The model's outputs do not change: its own functions compute them. Memory is O(L d) a call: where a Hugging Face
    model runs eager attention on long input, its function is called on blocks of rows and returns no maps. Listens to
    the attention interface of Hugging Face transformers (functions and masks), to :func:`eotattn.prior_attention`, to
    ``scaled_dot_product_attention`` and to ``nn.MultiheadAttention``. The last rows of every call are compared with the
    model's own output, so that a kind of attention that is not understood raises instead of being misread.

    Prompts accumulate, batches are sequences; a pass that continues a cache continues its sequences. Queries that are
    padding do not count where the model was told of padding. A block that reads its own last output, as models that
    share weights over depth have it, is one layer a pass: "name", "name (pass 2)", ...

    Args:
        model: Any module; it keeps its weights, configuration and attention implementation.
        layers: Names (as in ``named_modules``) or indices (in the order of first calls) of layers to keep; all by
            default.
        heads: Indices of heads to keep; all by default.
        keys: Chosen keys, counted from the first token of each sequence; the first one is the sink of margins.
        on_rows: Called with (layer name, row statistics) after every call, e.g. to keep rows.
        certify: Also certify the weights of the last rows of every call, as the model's own kernel makes them. That
            takes K / V more calls, so calls of more than 1024 keys are left out.
        grid: Rows and columns of the patches of a vision model, to collect their lags in two axes as well; a class
            token may come before them. Takes a second pass over the scores.

    Yields:
        :class:`Capture`; read ``layers`` at any time, also after the block.

    Raises:
        NotImplementedError: If the model ran and no attention call arrived, or one is not understood.
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
    for key in keys:
        check_positive_int("capture", "keys", key, minimum=0)
    require(len(keys) > 0, "capture", "keys", "name at least one key", keys, "Pass keys=(0,)")
    require(layers is None or len(layers) > 0, "capture", "layers", "name at least one", layers, "Pass None for all")
    recorder = Recorder(layers, heads, tuple(keys), on_rows, certify, grid)
    with ExitStack() as stack:
        stack.enter_context(_following(model, recorder))
        stack.enter_context(hugging_face.listen(model, recorder))
        stack.enter_context(prior_calls.listen(recorder))
        stack.enter_context(TorchCalls(recorder))
        yield Capture(recorder, tuple(keys))
    _check_arrivals(model, recorder)


@contextmanager
def _following(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep track of the module that is running, so that calls get its name."""
    handles: list[RemovableHandle] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            recorder.enter(name, inputs)
            recorder.value_probe.entered(module, inputs)

        return hook

    def leave(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: recorder.leave(name, output)

    try:
        for prefix, module in model.named_modules():
            name = prefix or type(module).__name__
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_arrivals(model: nn.Module, recorder: Recorder) -> None:
    """Raise if the model ran without an attention call, or wanted layers never came."""
    if recorder.num_forwards == 0:
        return
    if not recorder.seen:
        configs = len(hugging_face.configurations(model))
        raise NotImplementedError(
            f"capture: {type(model).__name__} ran and no attention call arrived. Tried the attention interface of "
            f"Hugging Face transformers ({configs} configurations found), eotattn.prior_attention, "
            f"scaled_dot_product_attention and nn.MultiheadAttention. Analyse its attention maps instead."
        )
    known = {*recorder.seen, *recorder.seen.values()}
    missing = [layer for layer in recorder.wanted or () if layer not in known]
    names = ", ".join(f"{index}: {name}" for name, index in recorder.seen.items())
    require(not missing, "capture", "layers", f"be among {{{names}}}", missing, "Choose layers that the model has")
