"""A pretended GPU, for tests on machines without one.

Tensors say that they are on `pretend:0`; their numbers lie on the host, and the CPU computes.
What a CUDA device refuses is refused here too, and what costs time there is counted, by the line of
this program that caused it:

```python
with pretended_device() as counters:
    run(recipe)  # teacher.device = "pretend", student.device = "pretend"
assert count_within(counters.synchronisations, LayerwiseForward.run) <= 12
```

It refuses:

- an operation on tensors of the host and of the device; only a host tensor without dimensions may
  meet the device's, in element-wise operations
- to write a result of the device into a tensor of the host, except by a copy
- a device index into a host tensor (a host index into a device tensor is allowed, and copied)
- a random generator of the host for numbers of the device
- numpy of a device tensor
- float64 anywhere, with `float64=False`, as Apple's MPS does

It does not see:

- kernels that a GPU lacks, such as one for bfloat16 or for a decomposition
- autocast: the context is accepted, and nothing is cast
- time, memory, streams, and races after a copy with `non_blocking=True`
- the generator of the device: random numbers come from the host's default generator

A blocking copy to the device makes the host wait too; `to_device` counts it, `synchronisations`
does not. `item()` copies one number; `synchronisations` counts it, `to_host` does not.

This is a wrapper subclass on torch's Python-only PrivateUse1 backend, an experimental part of
torch. A process registers the device once and for good; outside of the context it is unavailable.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _python_dispatch, backend_registration

from rotdistill_core.errors import SetupError

PRETENDED = "pretend"
"""Name of the device, for recipes and for `torch.device`."""

_aten: Any = torch.ops.aten
_with_new_shape: Any = _python_dispatch.return_and_correct_aliasing
_Library: Any = torch.library.Library
_COPIES = frozenset({_aten._to_copy.default, _aten.copy_.default, _aten.copy.default})
"""The operations that may join host and device."""
_INDEXING = frozenset(
    {
        _aten.index.Tensor,
        _aten._unsafe_index.Tensor,
        _aten.index_put.default,
        _aten.index_put_.default,
        _aten._unsafe_index_put.default,
        _aten._index_put_impl_.default,
    }
)
"""The operations that take a list of indices, which may be on the host."""
_REFUSES_SCALARS = frozenset(
    {_aten.cat.default, _aten.stack.default, _aten.gather.default, _aten.index_select.default}
)
"""Operations that take no host tensor at all, not even one without dimensions."""
_SYNCHRONISING = frozenset(
    {
        _aten._local_scalar_dense.default,
        _aten.item.default,
        _aten.is_nonzero.default,
        _aten.equal.default,
        _aten.nonzero.default,
        _aten.masked_select.default,
        _aten._unique.default,
        _aten._unique2.default,
        _aten.unique_dim.default,
        _aten.unique_consecutive.default,
        _aten.unique_dim_consecutive.default,
        _aten.bincount.default,
        _aten._linalg_check_errors.default,
    }
)
"""Operations whose result, or the size of it, the host must wait for."""
_RESIZING_FACTORIES = (
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
    "logspace",
    "randperm",
    "randperm.generator",
    "tril_indices",
    "triu_indices",
)
"""Factories that resize an empty tensor, which a wrapper cannot do."""


class DeviceError(RuntimeError):
    """A GPU would refuse this operation; the message names the line."""


class Line(NamedTuple):
    """A line of source code."""

    file: str
    """Such as `rotdistill_core/forward/layerwise.py`."""
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class DeviceCounters:
    """What a GPU would have had to do, each with its number by the line that caused it."""

    to_device: Counter[Line] = field(default_factory=Counter)
    """Copies of tensors from host to device, those of indices included."""
    to_host: Counter[Line] = field(default_factory=Counter)
    """Copies of tensors from device to host."""
    synchronisations: Counter[Line] = field(default_factory=Counter)
    """Waits of the host for the device: `item()`, `bool(x)`, `tolist()`, `nonzero()`, boolean
    masks, `unique()`, and copies to the host without `non_blocking`."""
    float64_operations: Counter[Line] = field(default_factory=Counter)
    """Operations on float64 tensors with dimensions; copies and views do not count."""
    mismatches: Counter[str] = field(default_factory=Counter)
    """What a GPU would have refused, with the line. With `strict` the first one raises."""


def count_within(counts: Mapping[Line, int], function: Callable[..., Any]) -> int:
    """Return how much of `counts` the lines of a function or method caused."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    file = _module_file(function.__module__)
    return sum(
        count
        for line, count in counts.items()
        if line.file == file and first <= line.line < first + len(lines)
    )


@contextmanager
def pretended_device(
    *,
    strict: bool = True,
    float64: bool = True,
    capability: tuple[int, int] = (9, 0),
    free_bytes: int = 1 << 36,
) -> Iterator[DeviceCounters]:
    """Make the device `pretend` available, and yield what it counts.

    Args:
        strict: raise where a GPU would refuse; otherwise go on with the CPU's numbers.
        float64: whether the device knows float64.
        capability: the compute capability that it states: 9.0 is an H100, with fast float64.
        free_bytes: free memory that it states; nothing is ever too large for it.

    Raises:
        DeviceError: a GPU would refuse an operation.
        SetupError: this torch has no Python-only backends.
    """
    backend = _backend()
    if backend.device is not None:
        raise DeviceError("a pretended device is open already")
    backend.device = _Device(strict, float64, capability, free_bytes)
    try:
        # A process counts its devices when it first computes gradients, and gives each a thread.
        # In one thread they are computed on a device that came later, too.
        with torch.autograd.set_multithreading_enabled(False):
            yield backend.device.counters
    finally:
        backend.device = None


class _Device:
    """The rules and the counters of one context."""

    def __init__(
        self, strict: bool, float64: bool, capability: tuple[int, int], free_bytes: int
    ) -> None:
        self.counters = DeviceCounters()
        self.strict = strict
        self.float64 = float64
        self.capability = capability
        self.free_bytes = free_bytes
        self._lock = threading.Lock()  # weights are read in another thread

    def count(self, counter: Counter[Line], times: int = 1) -> None:
        """Count something that the line now running causes."""
        if times:
            line = _current_line()
            with self._lock:
                counter[line] += times

    def refuse(self, reason: str) -> None:
        """Record a mismatch.

        Raises:
            DeviceError: if the device is strict.
        """
        message = f"{_current_line()}: a GPU refuses {reason}"
        with self._lock:
            self.counters.mismatches[message] += 1
        if self.strict:
            raise DeviceError(message)

    def compute(self, call: _Call) -> Any:
        """Carry out an operation on the host, and return its result where the operation puts it."""
        reason = _refusal(call)
        if reason is not None:
            self.refuse(reason)
        self._count_copies(call)
        self.count(self.counters.synchronisations, _waits(call))
        args, kwargs = call.on_host()
        result = call.func(*args, **kwargs)
        if not call.lands_on_device:
            return result
        made = _mapped(functools.partial(self._placed, call), result)
        if self._is_float64_work(call, made):
            self.count(self.counters.float64_operations)
        if torch.Tag.inplace_view in call.func.tags:
            return _with_new_shape(call.func, call.args, call.kwargs, made)
        return made

    def place(self, host: Tensor) -> PretendedTensor:
        """Return a tensor of the device that holds the numbers of a host tensor."""
        if host.dtype == torch.float64 and not self.float64:
            self.refuse("float64")
        return PretendedTensor(host)

    def _placed(self, call: _Call, tensor: Tensor) -> Tensor:
        """Return a result on the device; what was written in place is the argument itself."""
        for far in call.far:
            if tensor is far.host:
                return far
        written = isinstance(tensor, PretendedTensor) or any(tensor is near for near in call.near)
        return tensor if written else self.place(tensor)

    def _is_float64_work(self, call: _Call, made: Any) -> bool:
        if call.func in _COPIES or call.func.is_view:
            return False
        tensors = (*call.far, *_tensors_in(made))
        return any(tensor.dtype == torch.float64 and tensor.ndim for tensor in tensors)

    def _count_copies(self, call: _Call) -> None:
        counters = self.counters
        if call.copies_to_host:
            self.count(counters.to_host)
        elif call.func is _aten.copy_.default:
            self.count(counters.to_device, len(call.near))
        elif call.func in _INDEXING and isinstance(call.args[0], PretendedTensor):
            self.count(counters.to_device, sum(t in call.near_ids for t in map(id, call.indices)))


class _Call:
    """An operation and its arguments.

    Args:
        func: the operation.
        args, kwargs: its arguments.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.tensors = list(_tensors_in((args, kwargs)))
        self.far = [tensor for tensor in self.tensors if isinstance(tensor, PretendedTensor)]
        """Tensors of the device."""
        self.near = [tensor for tensor in self.tensors if tensor.device.type == "cpu"]
        """Tensors of the host."""
        self.near_ids = {id(tensor) for tensor in self.near}

    @property
    def indices(self) -> list[Tensor]:
        """The indices of an indexing operation."""
        return [index for index in self.args[1] if index is not None]

    @property
    def target(self) -> str | None:
        """Type of the device that is asked for, if any is."""
        device = self.kwargs.get("device")
        return None if device is None else torch.device(device).type

    @property
    def lands_on_device(self) -> bool:
        """Whether new tensors are on the device."""
        return self.target in (None, PRETENDED)

    @property
    def copies_to_host(self) -> bool:
        """Whether a tensor of the device is copied to the host."""
        if self.func is _aten._to_copy.default:
            return self.target == "cpu" and bool(self.far)
        into_host = self.func is _aten.copy_.default and self.args[0].device.type == "cpu"
        return into_host and isinstance(self.args[1], PretendedTensor)

    @property
    def blocks(self) -> bool:
        """Whether a copy waits until it is done."""
        position = 2  # of non_blocking in copy_
        named = self.kwargs.get("non_blocking", False)
        return not (named or (len(self.args) > position and self.args[position]))

    def on_host(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the numbers of the device's tensors in their place."""
        args, kwargs = _mapped(_host_of, (self.args, self.kwargs))
        if self.target == PRETENDED:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return args, kwargs


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries; torch's own walk is slow."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested lists, tuples and dictionaries with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        changed = [_mapped(change, inner) for inner in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: _mapped(change, inner) for key, inner in value.items()}
    return value


def _host_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, which lie on the host."""
    return tensor.host if isinstance(tensor, PretendedTensor) else tensor


def _refusal(call: _Call) -> str | None:
    """Return what a GPU would refuse of an operation, in words; None if nothing."""
    generator = call.kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        return f"a generator of the host for numbers of the device ({call.func})"
    if call.func in _COPIES or not call.far:
        return None
    if call.func in _INDEXING:
        return _indexing_refusal(call)
    kept_apart = len(call.tensors) > len(call.far) and not all(
        isinstance(tensor, PretendedTensor) or _may_meet_device(tensor, call.func)
        for tensor in call.tensors
    )
    if kept_apart or _writes_to_host(call):
        return f"tensors of two devices in {call.func}: {_described(call.tensors)}"
    return None


def _indexing_refusal(call: _Call) -> str | None:
    """Return what a GPU would refuse of an indexing operation."""
    where = _described(call.tensors)
    if not isinstance(call.args[0], PretendedTensor):
        return f"an index or values of the device for a tensor of the host: {where}"
    values = call.args[2] if len(call.args) > len(("self", "indices")) else None
    if isinstance(values, Tensor) and values.device.type == "cpu" and values.ndim:
        return f"values of the host for a tensor of the device: {where}"
    return None


def _may_meet_device(tensor: Tensor, func: Any) -> bool:
    """Whether a tensor of the host or of no device may be in one operation with the device's."""
    return tensor.device.type == "cpu" and tensor.ndim == 0 and func not in _REFUSES_SCALARS


def _writes_to_host(call: _Call) -> bool:
    """Whether an operation on the device writes into a tensor of the host."""
    if not call.near:
        return False
    arguments = zip(call.func._schema.arguments, call.args, strict=False)
    named = ((argument, call.kwargs.get(argument.name)) for argument in call.func._schema.arguments)
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument, value in (*arguments, *named)
        if id(value) in call.near_ids
    )


def _waits(call: _Call) -> int:
    """Return how often the host waits for an operation of the device."""
    if not call.far:
        return 0
    if call.copies_to_host:
        return int(call.blocks)
    if call.func is _aten.repeat_interleave.Tensor:
        return int(call.kwargs.get("output_size") is None)
    if call.func in _INDEXING:
        return int(_counts_a_mask(call))
    return int(call.func in _SYNCHRONISING)


def _counts_a_mask(call: _Call) -> bool:
    """Whether the host must know how many entries of a mask are true."""
    masks = [
        index
        for index in call.indices
        if isinstance(index, PretendedTensor) and index.dtype == torch.bool
    ]
    # One value for all places of a mask is filled in without counting them.
    values = call.args[2] if len(call.args) > len(("self", "indices")) else None
    return bool(masks) and not (isinstance(values, Tensor) and values.numel() == 1)


def _described(tensors: list[Tensor]) -> str:
    return ", ".join(
        f"{'device' if isinstance(tensor, PretendedTensor) else tensor.device.type} "
        f"{list(tensor.shape)}"
        for tensor in tensors
    )


# Which line is running.


def _current_line() -> Line:
    """Return the innermost line of this program that is running, outside of this module.

    Where none of this program is running, it is the innermost line outside of torch.
    """
    here = sys._getframe()
    everywhere = next(_lines(here, ("",)), Line("?", 0))
    return next(_lines(here, ("rotdistill",)), everywhere)


def _lines(frame: FrameType | None, packages: tuple[str, ...]) -> Iterator[Line]:
    """Yield the lines of a stack that belong to modules whose names begin so, innermost first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        ours = module != __name__ and not module.startswith(("torch", "functools"))
        if ours and module.startswith(packages):
            yield Line(_module_file(module) or frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back


def _module_file(module: str) -> str:
    """Return the file of a module, from the folder of its top package on."""
    path = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    parts = module.count(".") + 1 + (path.stem == "__init__")
    return "/".join(path.parts[-parts:])


# Tensors of the device.


class PretendedTensor(Tensor):
    """A tensor that says it is on the device; `host` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls: type[PretendedTensor], host: Tensor) -> PretendedTensor:
        """Return a tensor of the device that holds the numbers of a host tensor."""
        make: Any = Tensor._make_wrapper_subclass
        made: PretendedTensor = make(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(PRETENDED, 0),
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry out an operation by the rules of the device."""
        del types
        return _backend().opened().compute(_Call(func, args, dict(kwargs or {})))

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, PretendedTensor):
            # CUDA takes it: the parameter is then on the host, and its layer fails.
            _backend().opened().refuse("data of the host for a tensor of the device")
            value = _backend().opened().place(value)
        inherited: Any = Tensor.data  # swaps what torch knows of the wrapper
        inherited.__set__(self, value)
        self.host = _host_of(value)

    def tolist(self) -> Any:
        """Return the numbers as lists; the host waits for a copy."""
        return self.to("cpu").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as a GPU does without `force`."""
        if force:
            return self.detach().to("cpu").numpy()
        return self._refuse_numpy()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse_numpy()

    def _refuse_numpy(self) -> NoReturn:
        _backend().opened().refuse("numpy of a tensor of the device")
        raise DeviceError("numpy has no array of a tensor of the device")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:  # type: ignore[override]  # nothing else is shown
        return f"PretendedTensor({list(self.shape)}, {self.dtype})"

    # A wrapper has no memory; who asks for its address wants to know what is one tensor.

    def untyped_storage(self) -> Any:
        """Return the memory of the numbers."""
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.host.data_ptr()


# What torch asks of a backend.


class _Backend:
    """The device module that torch knows, and the one device that is open."""

    def __init__(self) -> None:
        self.device: _Device | None = None
        self.libraries: list[Any] = []
        """Kernels that torch forgets with these objects."""

    def opened(self) -> _Device:
        """Return the open device.

        Raises:
            DeviceError: none is open.
        """
        if self.device is None:
            raise DeviceError("a tensor of the pretended device is used outside of its context")
        return self.device

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.device is not None

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        del device
        return self.opened().capability

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        del device
        return self.opened().free_bytes, self.opened().free_bytes

    def synchronize(self, device: Any = None) -> None:
        del device

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        del seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        del device
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        del state, device

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _backend() -> _Backend:
    """Register the device with torch, which a process can do once, and return its module."""
    register: Any = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is None:
        raise SetupError(
            f"torch {torch.__version__} has no backends in Python, which the pretended device is; "
            "install the torch that constraints.txt names."
        )
    backend = _Backend()
    base: Any = torch._C._acc.PrivateUse1Hooks

    class Hooks(base):  # type: ignore[misc]
        def is_available(self) -> bool:
            return backend.device is not None

        def has_primary_context(self, _: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    register(PRETENDED, backend, Hooks())
    _register_kernels(backend)
    return backend


def _register_kernels(backend: _Backend) -> None:
    """Register what torch chooses by device before it asks the tensors."""
    library = _Library("aten", "IMPL")
    every_autocast = _Library("_", "IMPL")
    backend.libraries += [library, every_autocast]

    def empty(size: Any, **options: Any) -> Tensor:
        return backend.opened().place(torch.empty(size, dtype=options.get("dtype")))

    def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
        dtype = options.get("dtype")
        return backend.opened().place(torch.empty_strided(size, stride, dtype=dtype))

    def factory(func: Any, *args: Any, **options: Any) -> Tensor:
        device = torch.device(PRETENDED, 0)
        call = _Call(func, args, {**options, "device": device})
        return backend.opened().compute(call)  # type: ignore[no-any-return]

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        call = _Call(_aten.copy_.default, (target, source, non_blocking), {})
        backend.opened().compute(call)
        return target

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **options: Any
    ) -> Any:
        tensors = [x for x in (query, key, value, attn_mask) if x is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                # The formula adds its mask.
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                    ~attn_mask, -torch.inf
                )
            formula = _aten._scaled_dot_product_attention_math.default
            return formula(query, key, value, attn_mask, *args, **options)[0]
        func = _aten.scaled_dot_product_attention.default
        return backend.opened().compute(_Call(func, (*tensors[:3], attn_mask, *args), options))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that kernels are replaced
        library.impl("empty.memory_format", empty, "PrivateUse1")
        library.impl("empty_strided", empty_strided, "PrivateUse1")
        library.impl("_copy_from", copy_from, "PrivateUse1")
        for name in _RESIZING_FACTORIES:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(_aten, packet), overload or "default")
            library.impl(name, functools.partial(factory, func), "PrivateUse1")
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            library.impl("scaled_dot_product_attention", attention, key)
        every_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
