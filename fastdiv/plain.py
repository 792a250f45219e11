"""Which tensors have memory that a kernel may read by its address, and who else wants to see an operator run.

The one place that refuses the others: by operator, argument and what came.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def check(operator: str, tensors: Mapping[str, object]) -> None:
    """Raise for tensors without memory of their own: wrappers such as DTensor, nested or sparse ones, and those of
    transforms that are not supported.  What is no tensor is left to others, and all of it to a compiler's trace."""
    if torch.compiler.is_compiling():
        return
    differentiated = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        kind = type(tensor)
        if tensor.is_nested:
            raise TypeError(
                f"{operator}: {name} must not be a nested tensor; pass its values(), whose rows are the tokens"
            )
        if kind not in _PLAIN and _wraps(tensor):
            raise TypeError(
                f"{operator}: {name} must be a plain tensor with its own memory, got {kind.__name__}; pass what it "
                "holds, e.g. to_local() or full_tensor() of a DTensor"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{operator}: {name} must be dense, got layout {tensor.layout}; pass its to_dense()")
        if differentiated:
            _check_transforms(operator, name, tensor)


def _wraps(tensor: Tensor) -> bool:
    """Whether a subclass stands for other tensors; a fake tensor is none, it goes to the operators' shapes."""
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor)


def _check_transforms(operator: str, name: str, tensor: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(f"{operator}: forward-mode differentiation (jvp) of {name} is not supported")
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise RuntimeError(
                f"{operator}: vmap over {name} is not supported; leading dimensions are free, so one call takes all"
            )
        tensor = torch._C._functorch.get_unwrapped(tensor)


def transformed() -> bool:
    """Whether torch.func transforms an eager call."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def watched(*tensors: Tensor | None) -> bool:
    """Whether the custom operator must be seen: a compiler, a transform, a dispatch mode, tensors without
    memory, or with memory that does not hold their values."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if (type(tensor) not in _PLAIN and _fake(tensor)) or tensor.is_meta or tensor.is_neg():
            return True
    return False


def _fake(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
