"""Every private name of PyTorch and of transformers that this package uses, behind a function that says what it is for.

Private names may move with any release. ``tests/test_compat.py`` calls each one by itself, so that it names what moved.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "attention_implementation",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cudnn_attention",
    "efficient_attention",
    "efficient_attention_backward",
    "forget_attention_implementation",
    "fused_attention_choice",
    "has_forward_hooks",
    "in_backward_pass",
    "is_intercepted",
    "map_tensors",
    "names_attention_implementation",
    "no_torch_function",
    "raw_stream",
    "set_attention_implementation",
    "tensor_version",
    "without_fake_tensors",
    "wrapper_tensor",
]

Wrapper = TypeVar("Wrapper", bound=Tensor)


# PyTorch: tensors and modes ---------------------------------------------------------------------------------------


def tensor_version(tensor: Tensor) -> int:
    """How often the tensor was written to in place; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_intercepted() -> bool:
    """Whether a dispatch mode (e.g. fake tensors) or a function transform (e.g. vmap) sees every operation."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None or torch._C._functorch.peek_interpreter_stack() is not None


def without_fake_tensors() -> AbstractContextManager[Any]:
    """A block in which tensors are real although fake ones are being traced."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def in_backward_pass() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something else runs before or after a module's own ``forward``."""
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


def cpu_flash_attention(*operands: Any, scale: float) -> tuple[Tensor, Tensor]:
    """``(query, key, value, dropout, is_causal)`` -> output and log-sum-exp, on a CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, scale=scale)


def cpu_flash_attention_backward(*operands: Any, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad, query, key, value, output, log_sum_exp, dropout, is_causal)`` -> gradients of the operands."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*operands, scale=scale)


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
