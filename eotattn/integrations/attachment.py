"""Attach: a model of Hugging Face transformers, with priors of ours in its attention."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from eotattn.attention import AttentionSinks
from eotattn.checks import check_indices, check_installed, fail, require, speaking_as
from eotattn.compat import attention_implementation, set_attention_implementation, uncompiled
from eotattn.integrations.frames import is_cross_attention, looks_like_attention
from eotattn.integrations.hugging_face import configurations
from eotattn.integrations.prior_interface import (
    ATTRIBUTE,
    IMPLEMENTATION,
    LayerChange,
    layer_changes,
    register_attention,
)
from eotattn.priors import LogPrior, ScaledPrior
from eotattn.priors.base import check_prior

__all__ = ["Attached", "GivenPrior", "attach", "attention_layers", "base_model", "num_heads", "spoken_of"]

OWNER = "attach"

#: Sinks of which every layer gets a copy, their logits, what makes them from a number of heads, or those of each layer.
GivenSinks: TypeAlias = (
    "AttentionSinks | Tensor | Callable[[int], AttentionSinks] | Mapping[str, AttentionSinks | Tensor] | None"
)
#: One prior, of which every layer gets a copy; what makes one from a number of heads; or one for each layer by name.
GivenPrior: TypeAlias = "LogPrior | Callable[[int], LogPrior] | Mapping[str, LogPrior] | None"


@dataclass(eq=False, repr=False)
class Attached:
    """A model whose attention runs through :func:`eotattn.prior_attention`; a context that ends that, if entered.

    Attributes:
        model: The model, without the shells of adapters and compilers.
    """

    model: nn.Module
    _implementations: list[tuple[Any, str | None]] = field(default_factory=list)
    _frozen: list[nn.Parameter] = field(default_factory=list)

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Layer -> heads that its prior speaks of."""
        return {name: spoken_of(prior) for name, prior in self.priors.items()}

    @property
    def priors(self) -> dict[str, LogPrior]:
        """Layer -> its log-prior of all H heads."""
        changes = layer_changes(self.model)
        return {name: change.prior for name, change in changes.items() if change.prior is not None}

    @property
    def sinks(self) -> dict[str, AttentionSinks]:
        """Layer -> what was attached to attend to instead of keys."""
        changes = layer_changes(self.model)
        return {name: change.sinks for name, change in changes.items() if change.sinks is not None}

    def parameters(self) -> list[nn.Parameter]:
        """The learned numbers of priors and sinks."""
        return [parameter for change in layer_changes(self.model).values() for parameter in change.parameters()]

    def detach(self) -> nn.Module:
        """Give the model its own attention back, and its parameters their gradients; returns it."""
        for name in layer_changes(self.model):
            delattr(self.model.get_submodule(name), ATTRIBUTE)
        for config, implementation in self._implementations:
            set_attention_implementation(config, implementation)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._implementations, self._frozen = [], []
        return self.model

    def __repr__(self) -> str:
        """The model by name, and what each layer was given."""
        changes = layer_changes(self.model)
        named = [
            f"{name}: {' and '.join(type(part).__name__ for part in (change.prior, change.sinks) if part is not None)}"
            for name, change in changes.items()
        ]
        return f"Attached({', '.join([type(self.model).__name__, *named])})"

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@speaking_as(OWNER)
def attach(
    model: nn.Module,
    prior: GivenPrior = None,
    *,
    layers: Sequence[str | int] | None = None,
    heads: Sequence[int] | None = None,
    sinks: GivenSinks = None,
    positional: bool = False,
    freeze_content: bool = False,
) -> Attached:
    """Run the attention of a transformers model through :func:`eotattn.prior_attention`, with priors of your own.

    Masks, caches, grouped heads, windows, soft caps and position biases stay as they are, and so does what the model
    computes as long as the prior is neutral. Priors become parts of the attention modules: they move, train, and are
    saved with the model. Positions count from the first token of every sequence that is not padding. Soft-capped
    scores are computed as one table of Q x K. Cross-attention keeps its scores. Compiled models compute the same, in a
    graph that breaks at every mask.

    Args:
        model: A model that calls the attention interface; also within PEFT's or the compiler's shell.
        prior: A log-prior of H heads, of which every chosen layer gets a copy; or what makes one from the number of
            heads, e.g. ``goat_prior``; or one for each layer by name. Of positions alone: one that reads the tokens
            needs :class:`~eotattn.PriorAttention`. Without one the attention function alone changes.
        layers: Names (as in ``named_modules``) or numbers of self-attention layers; all by default.
        heads: Heads that the prior speaks of, all by default; ``prior`` has as many heads, or is made for as many.
        sinks: What queries of every chosen layer may attend to instead of keys: :class:`AttentionSinks` or (H,) logits,
            of which every layer gets a copy; what makes them from the number of heads; or those of each layer by name.
        positional: Whether the heads that the prior speaks of attend by it alone: their content and biases are left
            out. Masks, windows and sinks stay.
        freeze_content: Whether nothing but priors and sinks trains.

    Returns:
        :class:`Attached`. ``with attach(...)`` ends with the block; otherwise ``detach()`` does.

    Raises:
        NotImplementedError: If attention of the model does not go through the interface.
        ValueError: For layers, heads or priors that do not fit, or if priors are attached already.
        ModuleNotFoundError: If transformers is not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eotattn import RecencyPrior
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> with attach(model, RecencyPrior, layers=[1]) as attached:
        ...     list(attached.priors)
        ['model.layers.1.self_attn']
    """
    check_installed(OWNER, "analysis", "transformers")
    is_module = isinstance(model, nn.Module)
    require(is_module, OWNER, "model", "be a module", type(model), "Load it first", error=TypeError)
    model = base_model(model)
    modules = attention_layers(model)
    taken = list(layer_changes(model))
    require(not taken, OWNER, "model", "have no priors yet", taken, "Detach them first")
    is_for_all = layers is None and not isinstance(prior, Mapping) and not isinstance(sinks, Mapping)
    _check_all_attachable(model, modules, is_for_all=is_for_all)
    for argument, value in (("heads", heads), ("positional", positional or None)):
        require(value is None or prior is not None, OWNER, argument, "come with a prior", value, "Pass one")
    idle = layers is not None and prior is None and sinks is None
    require(not idle, OWNER, "layers", "come with a prior or sinks", layers, "Pass one")
    named = {
        argument: list(given) for argument, given in (("prior", prior), ("sinks", sinks)) if isinstance(given, Mapping)
    }
    for argument, names in named.items():
        require(layers is None, OWNER, "layers", f"be left out where {argument} names them", layers, "Drop them")
        _chosen(modules, names, argument)
    by_name = [name for names in named.values() for name in names]
    chosen = [name for name in modules if name in by_name] if by_name else _chosen(modules, layers, "layers")
    changes: dict[str, LayerChange] = {}
    for name in chosen if prior is not None or sinks is not None else []:
        own = _layer_prior(name, modules[name], prior, heads)
        alone = spoken_of(own) if own is not None and positional else ()
        changes[name] = LayerChange(own, _layer_sinks(name, modules[name], sinks, positional=positional), alone)
    register_attention()
    configs = configurations(model)
    attached = Attached(model, _implementations=[(config, attention_implementation(config)) for config in configs])
    if freeze_content:
        attached._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
    for name, change in changes.items():
        setattr(modules[name], ATTRIBUTE, change)
    for config in configs:
        set_attention_implementation(config, IMPLEMENTATION)
    return attached


def base_model(model: nn.Module) -> nn.Module:
    """The model within the shells of the compiler and of PEFT."""
    model = uncompiled(model)
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every self-attention of the model that calls the attention interface, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if calls_interface(module) and not is_cross_attention(name)
    }


def calls_interface(module: nn.Module) -> bool:
    """Whether a module's own forward pass looks an attention function up."""
    forward: Any = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _check_all_attachable(model: nn.Module, modules: Mapping[str, nn.Module], *, is_for_all: bool) -> None:
    leaves = [
        name
        for name, module in model.named_modules()
        if looks_like_attention(module)
        and not any(looks_like_attention(part) for part in module.modules() if part is not module)
    ]
    by_hand = [name for name in leaves if name not in modules and not is_cross_attention(name)]
    if not modules or (by_hand and is_for_all):
        named = f": {', '.join(by_hand[:4])}" if by_hand else ""
        remedy = "Name the layers that may change" if modules else "Nothing can be attached to it"
        raise NotImplementedError(
            f"{OWNER}: {type(model).__name__} has attention that does not go through the interface of "
            f"transformers{named}. {remedy}."
        )


def _chosen(modules: Mapping[str, nn.Module], layers: Sequence[str | int] | None, argument: str) -> list[str]:
    """Names of the chosen layers."""
    if layers is None:
        return list(modules)
    is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
    require(is_list, OWNER, argument, "be a list of names and numbers", layers, "Put it into a list", error=TypeError)
    names = list(modules)
    known = all(layer in modules or (type(layer) is int and 0 <= layer < len(names)) for layer in layers)
    listed = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
    require(
        known and len(layers) > 0,
        OWNER,
        argument,
        f"be among {{{listed}}}",
        list(layers),
        "Choose layers that are there",
    )
    found = [layer if isinstance(layer, str) else names[layer] for layer in layers]
    require(len(set(found)) == len(found), OWNER, argument, "name each layer once", list(layers), "Drop one")
    return found


def num_heads(name: str, module: nn.Module) -> int:
    """Query heads of an attention module."""
    for owner in (module, getattr(module, "config", None)):
        for attribute in ("num_heads", "num_attention_heads", "n_heads"):
            number = getattr(owner, attribute, None)
            if isinstance(number, int):
                return number
    raise NotImplementedError(f"{OWNER}: the number of heads of {name} is not known. Attach to other layers.")


def spoken_of(prior: LogPrior) -> tuple[int, ...]:
    """Heads that an attached prior speaks of: those that no factor of zero leaves uniform."""
    factors = prior.factor if isinstance(prior, ScaledPrior) and isinstance(prior.factor, tuple) else None
    return tuple(head for head in range(prior.num_heads) if factors is None or factors[head] != 0)


def _layer_prior(name: str, module: nn.Module, given: GivenPrior, heads: Sequence[int] | None) -> LogPrior | None:
    """The prior that a layer gets, on its device."""
    if given is None or (isinstance(given, Mapping) and name not in given):
        return None
    total = num_heads(name, module)
    chosen = range(total) if heads is None else check_indices(OWNER, "heads", heads, total, where=f" of {name}")
    prior = given[name] if isinstance(given, Mapping) else given
    if not isinstance(prior, LogPrior) and callable(prior):
        prior = prior(len(chosen))
    check_prior(OWNER, "prior", prior)
    assert isinstance(prior, LogPrior)
    prior = copy.deepcopy(prior)
    rule, remedy = "read positions alone", "Build the layers of PriorAttention, which hands it the tokens"
    require(not prior.reads_tokens, OWNER, "prior", rule, type(prior).__name__, remedy)
    on_line, remedy = prior.num_coordinates == 1, "Pass a prior of one coordinate"
    require(on_line, OWNER, "prior", "lie on a sequence", type(prior).__name__, remedy)
    rule, remedy = "read positions alone", "Priors that read the tokens are for PriorAttention"
    require(not prior.reads_tokens, OWNER, "prior", rule, type(prior).__name__, remedy)
    if prior.num_heads != len(chosen):
        fail(OWNER, "prior", f"have {len(chosen)} heads for {name}", prior.num_heads, "Build it for its query heads")
    if len(chosen) < total:
        places = {head: place for place, head in enumerate(chosen)}
        prior = prior.heads([places.get(head, 0) for head in range(total)])
        prior = prior * tuple(1.0 if head in places else 0.0 for head in range(total))
    return prior.to(_device(name, module))


def _layer_sinks(name: str, module: nn.Module, given: GivenSinks, *, positional: bool) -> AttentionSinks | None:
    """The sinks that a layer gets, on its device."""
    if given is None or (isinstance(given, Mapping) and name not in given):
        return None
    total = num_heads(name, module)
    made = given[name] if isinstance(given, Mapping) else given
    made = made(total) if callable(made) and not isinstance(made, (nn.Module, Tensor)) else made
    made = AttentionSinks(logits=made) if isinstance(made, Tensor) else made
    if not isinstance(made, AttentionSinks):
        remedy = "Pass AttentionSinks.logit(num_heads)"
        fail(OWNER, "sinks", "be AttentionSinks or a tensor of logits", made, remedy, error=TypeError)
    fits = made.logits is None or len(made.logits) == total
    require(fits, OWNER, "sinks", f"have {total} logits for {name}", made.logits, "One a query head")
    rule = "have no keys where content is left out"
    require(made.key is None or not positional, OWNER, "sinks", rule, made.key, "Pass logits")
    return copy.deepcopy(made).to(_device(name, module))


def _device(name: str, module: nn.Module) -> torch.device:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    rule = f"hold the weights of {name}"
    require(device.type != "meta", OWNER, "model", rule, "none (offloaded)", "Load the model onto its device")
    return device
