"""Recording what a prefill launches: the graph itself, the memory it reads and writes, and what may not be in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import TensorWeakRef

from btp.anatomy import Anatomy
from btp.errors import BTPError

__all__ = ["Bucket", "Buffers", "Capture", "CaptureError", "CudaCapture", "Loans", "Watch", "same_masks", "standing_in"]

_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"copy_", "_to_copy"}


class CaptureError(BTPError):
    """A prefill cannot be recorded, for the reason in the message."""


class Capture(Protocol):
    """Records what a function launches, and launches it again on the same memory without calling the function."""

    def warm_up(self, function: Callable[[], Any]) -> Any: ...
    def record(self, function: Callable[[], Any]) -> Any: ...
    def replay(self) -> None: ...


class CudaCapture:
    """A CUDA graph with a memory pool of its own, so that no other graph writes to its results."""

    def __init__(self, device: torch.device) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """On the stream of the recording, so that libraries have made their handles and workspaces for it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Any]) -> Any:
        try:
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                return function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"CUDA refused the recording: {str(error).splitlines()[0]}") from error

    def replay(self) -> None:
        with torch.cuda.device(self._stream.device):
            self._graph.replay()


class Bucket:
    """What all inputs of one graph have in common."""

    def __init__(self, anatomy: Anatomy, device: torch.device, inputs: Mapping[str, Any]) -> None:
        self._signature: list[Any] = [str(device), anatomy.attention_kernel]
        self._layout: list[Tensor] = []
        for name, value in sorted(inputs.items()):
            is_tensor = isinstance(value, Tensor)
            self._signature.append((name, (tuple(value.shape), value.dtype) if is_tensor else repr(value)))
            if is_tensor and not value.is_floating_point():
                values = anatomy.image_mask(inputs) if name == "input_ids" else value
                self._layout.append(values.to("cpu", copy=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bucket) or self._signature != other._signature:
            return False
        return all(map(torch.equal, self._layout, other._layout))

    __hash__ = None  # type: ignore[assignment]


class Loans:
    """Tensors that were handed out and lie in a graph's memory, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._lent: list[TensorWeakRef] = []

    def lend(self, tensor: Tensor) -> Tensor:
        handed = tensor.detach()
        self._lent.append(TensorWeakRef(handed))
        return handed

    def settle(self) -> None:
        """Let what is still held own its values, before the graph's memory changes."""
        for reference in self._lent:
            if (held := reference()) is not None:
                held.data = held.clone()
        self._lent.clear()


class Buffers:
    """The memory of a graph's floating-point inputs; integers are the bucket's, and stay what they were."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def fill(self, tree: Any) -> Any:
        """Copy the inputs in, and give them back with the memory in their place."""
        came = [leaf for leaf in tree_leaves(tree) if _is_data(leaf)]
        if self._held:
            torch._foreach_copy_(self._held, came)
        else:
            self._held = [tensor.clone() for tensor in came]
        held = iter(self._held)
        return tree_map(lambda leaf: next(held) if _is_data(leaf) else leaf, tree)


class Watch(TorchDispatchMode):
    """Within it, what makes the host wait for the device or a shape depend on a value raises CaptureError.

    outside: what was read and there before, weights and tables, a tensor a storage: a recording holds addresses alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outside: dict[int, Tensor] = {}
        self._made: set[int] = set()

    @property
    def outside(self) -> list[Tensor]:
        return list(self._outside.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        came = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in came:
            if (storage := tensor.untyped_storage()._cdata) not in self._made:
                self._outside.setdefault(storage, tensor)
        if _waits(func, came, args, kwargs):
            raise CaptureError(f"{func} reads a value on the host, or takes a shape from one")
        result = func(*args, **kwargs)
        storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self._made |= storages - self._outside.keys()
        return result


def _waits(func: Any, came: list[Tensor], args: Any, kwargs: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name in _INDEXED:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1]))
    if name in _COPIES:
        devices = {tensor.device.type for tensor in came if tensor.numel()}
        if devices and (goal := kwargs.get("device")) is not None:
            devices.add(torch.device(goal).type)
        return len(devices) > 1
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, `forward` is called between the module's hooks in place of its own."""
    shadowed = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if shadowed is not None:
            module.forward = shadowed


@contextmanager
def same_masks(anatomy: Anatomy) -> Iterator[None]:
    """Within it every layer gets, before `prune` slices it, the mask it got in the first forward."""
    masks: dict[int, Any] = {}

    def hand_out(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": masks.setdefault(index, kwargs.get("attention_mask"))}

    with ExitStack() as cleanup:
        for index, layer in enumerate(anatomy.layers):
            hook = partial(hand_out, index)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            cleanup.callback(handle.remove)
        yield


def _is_data(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
