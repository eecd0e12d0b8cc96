"""A tape that stands for CUDA's graph where there is no CUDA.

It does to torch's operations what a graph does to kernels: it notes each one with the memory it read and wrote, and
repeats them on that memory without calling any of our code. So what was read on the host while it was recorded, and
what has moved since, shows in the results as it would on CUDA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Tape", "place"]


class Tape(TorchDispatchMode):
    """Records operations and repeats them in place."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> Any:
        with self:
            result = function()
        for tensor in self.made():  # a recording computes nothing
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        return result

    def made(self) -> list[Tensor]:
        """What the operations gave out that is no view of something from before."""
        given: set[int] = set()
        found: dict[int, Tensor] = {}
        for _, args, kwargs, result in self.calls:
            given |= {place(tensor) for tensor in tensors((args, kwargs))} - found.keys()
            found |= {place(tensor): tensor for tensor in tensors(result) if place(tensor) not in given}
        return list(found.values())

    def read(self) -> set[int]:
        """The memory that was there before."""
        made = {place(tensor) for tensor in self.made()}
        return {place(tensor) for _, args, kwargs, _ in self.calls for tensor in tensors((args, kwargs))} - made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tensors(made), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
