"""
An accelerator without a chip, to find what works on a CPU only.

    with fake_accelerator(devices=2) as device:
        model.to("fake:0")

Tensors on `fake:N` know their device, and their data are on the CPU. As on a real
accelerator an operation on tensors of two devices raises, and so does `.numpy()`.
Speed, memory and the numerics of a chip are not imitated.

PyTorch's slot for backends of others (PrivateUse1) is registered when this module is
imported, for autograd looks at the devices once, before its first backward pass.
Outside the context it is not available and takes no part. Autograd itself runs on the
first device only.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["FAKE", "DeviceMix", "FakeDevice", "fake_accelerator", "on_host"]

FAKE = "fake"
FREE, TOTAL = 2**33, 2**34  # bytes that a device says it has
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
MIXING = (*COPIES, aten.is_same_size.default)
# These take indices from the host.
INDEXING = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# Device tensor -> CPU tensor with its data. By identity: others change the class.
_DATA = WeakIdKeyDictionary()


class DeviceMix(RuntimeError):
    """An operation got tensors of two devices."""


class _Handle(torch.Tensor):
    """A device tensor, seen from the host."""

    device_in_use: "FakeDevice | None" = None

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{on_host(self)!r} on {self.device}"

    @staticmethod
    def __torch_dispatch__(
        func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        if _Handle.device_in_use is None:
            raise RuntimeError(f"{func} on a tensor of a device that is gone")
        # in another thread than that of the context
        return _Handle.device_in_use.run(func, args, dict(kwargs or {}))


class _Backend(backend_registration._DummyBackendModule):
    """What is `torch.fake`, as `torch.cuda` is for CUDA."""

    devices = 0

    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def get_device_name(self, device: Any = None) -> str:
        return "Fake 1"

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the data are on the CPU."""

    set_rng_state = manual_seed = set_device = synchronize = empty_cache = _nothing


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _BACKEND.is_available()


_BACKEND = _Backend()
backend_registration._setup_privateuseone_for_python_backend(
    FAKE, backend_module=_BACKEND, hook=_Hooks()
)


class FakeDevice(TorchDispatchMode):
    """
    Runs operations on fake devices.

    :param float64: whether they have it, which Apple's have not
    :ivar log: "to device", "to host" and "between devices": number of copies;
        "bytes to device"; "operations" on a device
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self._float64 = float64
        self.log: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        return self.run(func, args, dict(kwargs or {}))

    def run(self, func: Any, args: Sequence, kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_tensor(x)]
        wanted = _device(kwargs.get("device"))
        if not any(map(_is_fake, tensors)) and not _is_fake_device(wanted):
            return func(*args, **kwargs)
        if func not in MIXING:
            _check_devices(func, args, tensors)
        target = _target(func, args, wanted, tensors)
        self._count(func, args, target)
        if _is_fake_device(wanted):
            kwargs["device"] = torch.device("cpu")
        owners = {id(on_host(x)): x for x in tensors if _is_fake(x)}
        output = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if not self._float64 and _is_fake_device(target):
            _check_narrow(func, output)
        return tree_map(lambda x: _returned(x, owners, target), output)

    def _count(self, func: Any, args: Sequence, target: torch.device) -> None:
        self.log["operations"] += _is_fake_device(target)
        if func is aten._local_scalar_dense.default:
            self.log["to host"] += 1
        if func not in COPIES:
            return
        source = args[func is aten.copy_.default]
        if not _is_fake(source):
            self.log["to device"] += 1
            self.log["bytes to device"] += source.nbytes
        elif not _is_fake_device(target):
            self.log["to host"] += 1
        else:
            self.log["between devices"] += source.device != target


def on_host(value: Any) -> Any:
    """The CPU tensor behind a device tensor; anything else as it is."""
    return _DATA[value] if _is_tensor(value) and _is_fake(value) else value


@contextmanager
def fake_accelerator(devices: int = 1, float64: bool = True) -> Iterator[FakeDevice]:
    """Within the context `fake:0` … are there, and torch.accelerator knows them."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(_BACKEND, "devices", devices))
        for name, replacement in _ACCELERATOR.items():
            stack.enter_context(patch.object(torch.accelerator, name, replacement))
        for name, method in _METHODS.items():
            stack.enter_context(patch.object(torch.Tensor, name, method, create=True))
        for name, function in _FACTORIES.items():
            stack.enter_context(patch.object(torch, name, function))
        device = FakeDevice(float64)
        stack.enter_context(patch.object(_Handle, "device_in_use", device))
        yield stack.enter_context(device)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_fake(tensor: torch.Tensor) -> bool:
    return tensor in _DATA


def _is_fake_device(device: torch.device | None) -> bool:
    return device is not None and device.type == FAKE


def _device(device: Any) -> torch.device | None:
    if device is None:
        return None
    device = torch.device(device)
    if device.type == FAKE:
        index = device.index or 0
        if index >= _BACKEND.devices:
            raise RuntimeError(f"{FAKE}:{index}: there are {_BACKEND.devices} devices")
        return torch.device(FAKE, index)
    return device


def _check_devices(func: Any, args: Sequence, tensors: list[torch.Tensor]) -> None:
    # scalars of the host may take part in everything, as indices may in indexing
    taking_part = [x for x in tensors if x.dim() > 0 or _is_fake(x)]
    if func in INDEXING:
        indices = {id(x) for x in tree_leaves(args[1])}
        taking_part = [x for x in taking_part if id(x) not in indices or _is_fake(x)]
    if len({x.device for x in taking_part}) > 1:
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise DeviceMix(f"{func} takes tensors of one device, got {found}")


def _check_narrow(func: Any, output: Any) -> None:
    if any(_is_tensor(x) and x.dtype == torch.float64 for x in tree_leaves(output)):
        raise TypeError(f"{func}: the device doesn't support float64")


def _target(
    func: Any, args: Sequence, wanted: torch.device | None, tensors: list[torch.Tensor]
) -> torch.device:
    """Where the result lies."""
    if wanted is not None:
        return wanted
    if func in INDEXING or func is aten.copy_.default:
        return args[0].device
    return next(x.device for x in tensors if _is_fake(x))


def _returned(
    value: Any, owners: Mapping[int, torch.Tensor], target: torch.device
) -> Any:
    """What an operation on the host returned, as one on the device would."""
    if not _is_tensor(value):
        return value
    if id(value) in owners:  # changed in place
        return owners[id(value)]
    if value.device.type == "cpu" and _is_fake_device(target):
        return _handle(value, target)
    return value


def _handle(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    handle = torch.Tensor._make_wrapper_subclass(
        _Handle,
        data.size(),
        strides=data.stride(),
        storage_offset=data.storage_offset(),
        dtype=data.dtype,
        layout=data.layout,
        device=device,
    )
    _DATA[handle] = data
    return handle


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    _SET_DATA(tensor, value)
    if value in _DATA:
        _DATA[tensor] = _DATA[value]


_SET_DATA = torch.Tensor.data.__set__
# Torch notes its factories once; those of the context below would stay noted.
_device_constructors()


def _by_copy(factory: Callable) -> Callable:
    """A factory whose C++ does not ask the mode: made on the host, then copied."""

    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if not _is_fake_device(_device(device)):
            return factory(*args, device=device, **kwargs)
        return factory(*args, **kwargs).to(device)

    return make


_FACTORIES = {name: _by_copy(getattr(torch, name)) for name in ("tensor", "as_tensor")}
_METHODS: dict[str, Any] = {
    "pin_memory": lambda x: x.clone(),
    "data": property(torch.Tensor.data.__get__, _set_data),
    "data_ptr": lambda x, f=torch.Tensor.data_ptr: f(on_host(x)),
    "tolist": lambda x, f=torch.Tensor.tolist: f(x.cpu() if _is_fake(x) else x),
}
_ACCELERATOR: dict[str, Callable] = {
    "get_memory_info": lambda *_: (FREE, TOTAL),
    "max_memory_allocated": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda *_: None,
    "empty_host_cache": lambda: None,
    "synchronize": lambda *_: None,
    "current_device_index": lambda *_: 0,
}
