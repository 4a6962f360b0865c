"""A device that is no CPU and no CUDA: tensors that say `npu:0`, whose numbers are kept on the CPU.

Every operation whose tensors are not all there is an error, but for single numbers, as on a real device. Made
with `torch.utils.rename_privateuse1_backend`, which torch_npu does too; nothing is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
_COPIES = {"aten._to_copy.default", "aten.copy_.default", "aten._copy_from.default"}


class OnDevice(Tensor):
    """A tensor of the device; `numbers` are those it stands for."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatched(function, args, kwargs or {})

    def tolist(self) -> list:
        return self.numbers.tolist()

    def new_tensor(self, data, **kwargs) -> "OnDevice":
        return OnDevice(self.numbers.new_tensor(data, **kwargs))

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self):
        return self.numbers.untyped_storage()


def dispatched(function, args, kwargs):
    """Run an operation on the numbers; RuntimeError where it mixes devices."""
    wanted = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(t, OnDevice) for t in tensors]
    mixed = [t for t, on in zip(tensors, there, strict=True) if not on and t.ndim]
    if any(there) and mixed and str(function) not in _COPIES:
        raise RuntimeError(f"{function}: {len(mixed)} tensor(s) of {mixed[0].device} beside those of {NAME}")
    kwargs = kwargs | ({"device": "cpu"} if wanted is not None else {})
    out = function(*unwrapped(args), **unwrapped(kwargs))
    target = any(there) if wanted is None else torch.device(wanted).type == NAME
    if str(function) == "aten.copy_.default":
        return args[0]
    if not target:
        return out
    given = {id(t.numbers): t for t in tensors if isinstance(t, OnDevice)}  # in place: the very same tensor
    return tree_map(
        lambda x: (given[id(x)] if id(x) in given else OnDevice(x)) if isinstance(x, Tensor) else x, out
    )


def unwrapped(tree):
    return tree_map(lambda x: x.numbers if isinstance(x, OnDevice) else x, tree)


class _Factories(TorchDispatchMode):
    """`torch.zeros(..., device="npu")` and `.to("npu")` of CPU tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatched(function, args, kwargs or {})


class _FromPython(TorchFunctionMode):
    """`torch.tensor(..., device="npu")`, which PyTorch makes before any dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device", "cpu")).type == NAME:
            return OnDevice(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)


_CPUs = torch.Generator


def _generator(where="cpu") -> torch.Generator:
    """The device draws the CPU's random numbers."""
    return _CPUs("cpu" if torch.device(where).type == NAME else where)


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, while it is used."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)  # renames it, and says which device is current
    torch.Generator = _generator
    try:
        with _Factories(), _FromPython(), torch.no_grad():
            yield torch.device(NAME, 0)
    finally:
        torch.Generator = _CPUs


def moved(model: nn.Module) -> nn.Module:
    """`model` with its weights on the device, in place."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(OnDevice(weight.detach()), requires_grad=False)
        for name, values in module._buffers.items():
            if values is not None:
                module._buffers[name] = OnDevice(values)
    return model
