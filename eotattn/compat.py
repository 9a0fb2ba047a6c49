"""Every private name of PyTorch and of transformers that this package uses, behind a function that says what it is for.

Private names may move with any release. ``tests/test_compat.py`` calls each one by itself, so that it names what moved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes, _len_torch_dispatch_stack

__all__ = [
    "admitted",
    "allows_tf32",
    "attention_implementation",
    "constant_in_graphs",
    "context_parallel_region",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cudnn_attention",
    "efficient_attention",
    "efficient_attention_backward",
    "first_parameter",
    "forget_attention_implementation",
    "fused_attention_choice",
    "has_forward_hooks",
    "in_backward_pass",
    "in_export",
    "is_intercepted",
    "is_transformed",
    "known_size",
    "lasting",
    "listed",
    "map_tensors",
    "names_attention_implementation",
    "no_torch_function",
    "plain_tensors",
    "raw_stream",
    "set_attention_implementation",
    "tensor_version",
    "uncompiled",
    "wrapper_tensor",
]

Wrapper = TypeVar("Wrapper", bound=Tensor)
Function = TypeVar("Function", bound=Callable[..., Any])
#: The call as it is where nobody has replaced it.
_PLAIN_ATTENTION = functional.scaled_dot_product_attention


# PyTorch: tensors and modes ---------------------------------------------------------------------------------------


def tensor_version(tensor: Tensor) -> int:
    """How often the tensor was written to in place; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_intercepted() -> bool:
    """Whether a dispatch mode (e.g. fake tensors) or a function transform (e.g. vmap) sees every operation."""
    return _len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Whether a function transform (e.g. vmap, or the gradient of :mod:`torch.func`) sees every operation."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def plain_tensors() -> Iterator[None]:
    """A block whose new tensors outlive it: real, on the CPU, and fit for training, whatever is traced around it."""
    with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield


def admitted(tensor: Tensor) -> Tensor:
    """The tensor itself, or a fake of it where a mode of fake tensors refuses real ones beside them."""
    mode = None if torch.compiler.is_compiling() else active_fake_mode()
    return tensor if mode is None or mode.allow_non_fake_inputs else mode.from_tensor(tensor)


def constant_in_graphs(function: Function) -> Function:
    """Let graphs take what a function returns as a constant, without the second that importing the compiler takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def known_size(size: int) -> int | None:
    """A size of at least zero as a number; ``None`` where a graph is traced that serves several sizes."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    number = 0
    for bit in reversed(range(31)):
        if statically_known_true(size >= number + 2**bit):
            number += 2**bit
    return number if statically_known_true(size == number) else None


def lasting(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, which CUDA graphs then read where it lies instead of copying it at every replay."""
    if tensor is not None:
        torch._dynamo.mark_static_address(tensor)
    return tensor


def in_export() -> bool:
    """Whether ``torch.export`` traces; ``torch.compiler.is_exporting`` is true in every compiled graph before 2.13."""
    return torch.compiler._is_exporting_flag


def allows_tf32() -> bool:
    """Whether the user lets float32 matrix products on a GPU round their operands to 11 digits."""
    return torch._C._get_cublas_allow_tf32()


def in_backward_pass() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, of the one that it returned; any other module itself."""
    return getattr(model, "_orig_mod", model)


def first_parameter(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """The first of ``module.parameters()``, in one step: what every call asks must cost nothing."""
    stack = [module]
    while stack:
        module = stack.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter
        for child in reversed(module._modules.values()):
            if child is not None:
                stack.append(child)  # noqa: PERF401  # a comprehension is a call
    return None


def listed(module: nn.Module, name: str) -> Collection[Any]:
    """What the ``nn.ModuleList`` of that name holds, in one step: what every call asks must cost nothing."""
    held: nn.Module = module._modules[name]  # type: ignore[assignment]
    return held._modules.values()


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its own ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def raw_stream(device: torch.device) -> int:
    """The handle of a CUDA device's current stream, without the object that ``torch.cuda.current_stream`` makes."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def wrapper_tensor(kind: type[Wrapper], shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Wrapper:
    """A tensor of a subclass, without elements."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def no_torch_function() -> Any:
    """What a subclass has as ``__torch_function__`` if ``__torch_dispatch__`` alone tells it of operations."""
    return torch._C._disabled_torch_function_impl


def map_tensors(change: Callable[[Any], Any], arguments: Any) -> Any:
    """Apply ``change`` to every leaf of nested lists, tuples and dictionaries."""
    from torch.utils._pytree import tree_map

    return tree_map(change, arguments)


# PyTorch: fused attention -----------------------------------------------------------------------------------------


def fused_attention_choice(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> str:
    """Name of the kernel that ``scaled_dot_product_attention`` picks for these operands, e.g. "flash_attention"."""
    index = torch._fused_sdp_choice(query, key, value, **options)
    backends = torch.nn.attention.SDPBackend.__members__.items()
    return next(name for name, member in backends if member.value == index).lower()


def context_parallel_region() -> tuple[int, int, bool] | None:
    """Rank, number of processes, and whether shards are balanced, in ``context_parallel``; ``None`` outside of it."""
    attend = functional.scaled_dot_product_attention
    if attend is _PLAIN_ATTENTION:
        return None
    engine = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if engine is None or attend not in engine._replaced_functions:
        return None
    held = dict(zip(attend.__code__.co_freevars, attend.__closure__ or (), strict=True))
    mesh = held["device_mesh"].cell_contents
    return mesh.get_local_rank(), mesh.size(), engine._cp_options.enable_load_balance


def cpu_flash_attention(*operands: Any, scale: float, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(query, key, value, dropout, is_causal)`` -> output and log-sum-exp, on a CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, scale=scale, attn_mask=attn_mask)


def cpu_flash_attention_backward(
    *operands: Any, scale: float, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad, query, key, value, output, log_sum_exp, dropout, is_causal)`` -> gradients of the operands."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operator(*operands, scale=scale, attn_mask=attn_mask)


def cudnn_attention(*operands: Any, scale: float) -> tuple[Any, ...]:
    """``(query, key, value, bias, wants_log_sum_exp, dropout, is_causal, wants_mask)`` -> output, log-sum-exp, ..."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*operands, scale=scale)


def efficient_attention(*operands: Any, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(query, key, value, bias, wants_log_sum_exp, dropout, is_causal)`` -> output, log-sum-exp, seed, offset."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(*operands, scale=scale)


def efficient_attention_backward(*operands: Any, scale: float) -> tuple[Tensor, ...]:
    """``(grad, query, key, value, bias, output, log_sum_exp, seed, offset, dropout, wanted, is_causal)``: gradients."""
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(*operands, scale=scale)


# transformers -----------------------------------------------------------------------------------------------------

#: Attribute of configurations that names the attention function.
_IMPLEMENTATION = "_attn_implementation_internal"


def names_attention_implementation(config: Any) -> bool:
    """Whether an object is a configuration that names the attention function of its model."""
    return hasattr(config, _IMPLEMENTATION)


def attention_implementation(config: Any) -> str | None:
    """The name of the attention function, as the configuration holds it."""
    return getattr(config, _IMPLEMENTATION)


def set_attention_implementation(config: Any, name: str | None) -> None:
    """Name another attention function, without the checks that the public attribute makes."""
    setattr(config, _IMPLEMENTATION, name)


def forget_attention_implementation(name: str) -> None:
    """Take a name off the tables of attention and of mask functions, which have no public way out."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
