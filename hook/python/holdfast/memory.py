"""Where a tensor lies: address, bytes, dtype, shape and device of whatever the user calls an array.

Neither torch nor numpy is imported; objects are recognised by what they offer, in this order:
  1. `data_ptr()`, `dtype`, `shape`, `is_contiguous()`: torch tensors and their like, also on a CUDA
     device,
  2. `__array_interface__`: numpy arrays (also with ml_dtypes' bfloat16 and float8s),
  3. `__cuda_array_interface__`: arrays of CuPy, Numba and others, on a CUDA device,
  4. the buffer protocol: bytearray, array.array, mmap, memoryview,
  5. DLPack (`__dlpack__`) in host memory or on a CUDA device (JAX and others).
What is taken must be contiguous, row-major, writable (restore writes there) and native in byte
order. Nothing is copied, ever: an array that would need a copy is refused by name, because a copy
would be saved once and never change again. Nor is a stream waited for: which streams write to an
array is said at the save (`streams`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import sys
from typing import Any, Callable, Optional, Tuple

from .errors import InvalidArgument

# The dtypes of layout documents (docs/layout-grammar.md), and bytes per element.
DTYPES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8,
    "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1, "complex32": 4, "complex64": 8, "complex128": 16, "bits8": 1, "bits16": 2,
    "bits1x8": 1, "bits2x4": 1, "bits4x2": 1,
}

# DLDeviceType of dlpack.h.
DLPACK_CPU, DLPACK_CUDA, DLPACK_CUDA_HOST, DLPACK_CUDA_MANAGED = 1, 2, 3, 13
# Do not make a stream wait for the producer's: https://dmlc.github.io/dlpack/latest/python_spec.html
DLPACK_NO_WAIT = -1


@dataclasses.dataclass(frozen=True)
class Memory:
    """A contiguous, row-major array in this process's memory.

    address: of the first byte; 0 if bytes is 0. dtype: one of DTYPES. shape: () is one element.
    owner: what keeps the memory alive; held as long as it is registered or captured. device: the
    CUDA device in whose memory it lies; None: host memory. (What counts in the end is what the CUDA
    driver says of the address.)
    """

    address: int
    bytes: int
    dtype: str
    shape: Tuple[int, ...]
    owner: Any = dataclasses.field(default=None, repr=False, compare=False)
    device: Optional[int] = None


def memory_of(value: Any, what: str = "array") -> Memory:
    """Where `value` lies; a Memory is returned as it is. Raises InvalidArgument, naming `what`,
    with what was expected and found."""
    if isinstance(value, Memory):
        return value
    if callable(getattr(value, "data_ptr", None)):
        return _of_torch(value, what)
    if getattr(value, "__array_interface__", None) is not None:
        return _of_array_interface(value, what)
    if getattr(value, "__cuda_array_interface__", None) is not None:
        return _of_cuda_array_interface(value, what)
    try:
        view = memoryview(value)
    except (TypeError, BufferError, ValueError):
        view = None
    if view is not None:
        return _of_buffer(view, what)
    if callable(getattr(value, "__dlpack__", None)):
        return _of_dlpack(value, what)
    raise InvalidArgument(
        f"{what}: expected a torch tensor, a numpy or CUDA array, a writable buffer or DLPack, found "
        f"{_type_name(value)}")


def _type_name(value: Any) -> str:
    cls = type(value)
    prefix = "" if cls.__module__ == "builtins" else cls.__module__ + "."
    return prefix + cls.__qualname__


def _refuse(what: str, expected: str, found: Any) -> InvalidArgument:
    return InvalidArgument(f"{what}: expected {expected}, found {found}")


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a CUDA device; 0, the default stream, without torch."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_stream(device).cuda_stream) if torch is not None else 0


def _make(what: str, address: int, dtype: str, shape: Any, owner: Any,
          device: Optional[int] = None) -> Memory:
    if dtype not in DTYPES:
        raise _refuse(what, f"a dtype of {', '.join(DTYPES)}", dtype)
    sizes = tuple(int(size) for size in shape)
    size_bytes = DTYPES[dtype]
    for size in sizes:
        size_bytes *= size
    return Memory(address if size_bytes > 0 else 0, size_bytes, dtype, sizes, owner, device)


def _of_torch(tensor: Any, what: str) -> Memory:
    if callable(getattr(tensor, "to_local", None)):
        raise InvalidArgument(
            f"{what}: a {_type_name(tensor)} lies on many ranks: give this rank's part "
            "(to_local()) and a layout document that places it")
    device = _device_of_torch(tensor, what)
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if layout != "torch.strided":
        raise _refuse(what, "a dense tensor", f"layout {layout}")
    for lazy in ("is_conj", "is_neg"):
        test: Optional[Callable[[], bool]] = getattr(tensor, lazy, None)
        if test is not None and test():
            raise _refuse(what, "plain memory", f"a lazy view ({lazy}()); resolve it first")
    if not tensor.is_contiguous():
        strides = tuple(tensor.stride()) if callable(getattr(tensor, "stride", None)) else "others"
        raise _refuse(what, f"a contiguous, row-major tensor of shape {tuple(tensor.shape)}",
                      f"strides {strides}; give tensor.contiguous() and keep it, if that is what "
                      "you train with")
    dtype = str(tensor.dtype).rpartition(".")[2]
    return _make(what, tensor.data_ptr(), dtype, tensor.shape, tensor, device)


def _device_of_torch(tensor: Any, what: str) -> Optional[int]:
    device = getattr(tensor, "device", None)
    kind = getattr(device, "type", "cpu")
    # A torch made for ROCm calls its devices cuda, too.
    torch_version = getattr(sys.modules.get("torch"), "version", None)
    if kind == "cuda" and getattr(torch_version, "hip", None) is None:
        index = getattr(device, "index", None)
        return 0 if index is None else int(index)
    if kind != "cpu":
        raise _refuse(what, "a tensor in host memory or on a CUDA device", f"device {device}")
    return None


def _of_array_interface(array: Any, what: str) -> Memory:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(array, numpy.generic):
        raise _refuse(what, "an array", f"the numpy scalar {_type_name(array)}, which has no "
                      "memory that can be restored; use a 0-d array")
    interface = array.__array_interface__
    shape = tuple(interface["shape"])
    dtype, size = _dtype_of_typestr(interface["typestr"], array, what)
    if interface.get("data") is None:
        return _of_buffer(memoryview(array), what)
    address, read_only = interface["data"]
    if read_only:
        raise _refuse(what, "writable memory", "a read-only array")
    _check_strides(what, shape, interface.get("strides"), size)
    return _make(what, address, dtype, shape, array)


def _of_cuda_array_interface(array: Any, what: str) -> Memory:
    """Version 2 or 3 (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html)."""
    interface = array.__cuda_array_interface__
    shape = tuple(interface["shape"])
    dtype, size = _dtype_of_typestr(interface["typestr"], array, what)
    if interface.get("mask") is not None:
        raise _refuse(what, "plain memory", "a masked array")
    address, read_only = interface["data"]
    if read_only:
        raise _refuse(what, "writable memory", "a read-only array")
    _check_strides(what, shape, interface.get("strides"), size)
    return _make(what, address, dtype, shape, array, _device_of_array(array))


def _device_of_array(array: Any) -> int:
    """The interface does not say which device: CuPy's and Numba's own ways do. What counts in the end
    is the address (see Memory); this is whose current stream represents it."""
    device = getattr(array, "device", None)
    for candidate in (device, getattr(device, "id", None), getattr(device, "device_id", None)):
        if isinstance(candidate, int):
            return candidate
    return 0


def _dtype_of_typestr(typestr: str, array: Any, what: str) -> Tuple[str, int]:
    """The dtype, and bytes per element."""
    match = re.fullmatch(r"([<>|=])([a-zA-Z])(\d+)", typestr)
    if match is None:  # dates have a unit behind
        raise _refuse(what, f"a dtype of {', '.join(DTYPES)}", typestr)
    order, kind, size = match.group(1), match.group(2), int(match.group(3))
    native = "<" if sys.byteorder == "little" else ">"
    if order not in (native, "|"):
        raise _refuse(what, "native byte order", f"dtype {typestr}")
    if kind == "V":  # ml_dtypes: only the dtype object knows the name
        dtype = getattr(getattr(array, "dtype", None), "name", typestr)
    else:
        dtype = {"b": "bool", "i": f"int{8 * size}", "u": f"uint{8 * size}",
                 "f": f"float{8 * size}", "c": f"complex{8 * size}"}.get(kind, typestr)
    if DTYPES.get(dtype, size) != size:
        raise _refuse(what, f"{DTYPES[dtype]} bytes per {dtype}", f"dtype {typestr}")
    return dtype, size


def _check_strides(what: str, shape: Tuple[int, ...], strides: Any, unit: int) -> None:
    """`unit`: the stride of one element. None as strides means contiguous. The stride of a
    dimension of size 1 says nothing, nor does any of an empty array."""
    if strides is None or 0 in shape:
        return
    expected = unit
    for size, stride in zip(reversed(shape), reversed(tuple(strides))):
        if size != 1 and stride != expected:
            raise _refuse(what, f"a contiguous, row-major array of shape {shape}",
                          f"strides {tuple(strides)}")
        expected *= size


# Format characters of the buffer protocol; integers by their size.
_FORMATS = {"?": "bool", "c": "uint8", "e": "float16", "f": "float32", "d": "float64"}


def _of_buffer(view: memoryview, what: str) -> Memory:
    native = "<" if sys.byteorder == "little" else ">"
    form = view.format[1:] if view.format[:1] in ("@", "=", native) else view.format
    if len(form) == 1 and form in "bhilqn":
        dtype = f"int{8 * view.itemsize}"
    elif len(form) == 1 and form in "BHILQN":
        dtype = f"uint{8 * view.itemsize}"
    elif form in _FORMATS:
        dtype = _FORMATS[form]
    else:
        raise _refuse(what, "plain numbers in native byte order", f"format '{view.format}'")
    if view.readonly:
        raise _refuse(what, "writable memory", f"read-only {_type_name(view.obj)}")
    if not view.c_contiguous:
        raise _refuse(what, f"a contiguous, row-major buffer of shape {view.shape}",
                      f"strides {view.strides}")
    if view.nbytes == 0:
        return _make(what, 0, dtype, view.shape, view)
    # The exported object pins the memory: a bytearray cannot be resized while it lives.
    pin = (ctypes.c_char * view.nbytes).from_buffer(view)
    return _make(what, ctypes.addressof(pin), dtype, view.shape, pin)


class _DLTensor(ctypes.Structure):
    # dlpack.h, version 0.8 (https://dmlc.github.io/dlpack/latest/c_api.html); a DLManagedTensor
    # begins with it.
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


def _of_dlpack(value: Any, what: str) -> Memory:
    kind, index = getattr(value, "__dlpack_device__", lambda: (DLPACK_CPU, 0))()
    on_device = int(kind) in (DLPACK_CUDA, DLPACK_CUDA_MANAGED)
    if not on_device and int(kind) not in (DLPACK_CPU, DLPACK_CUDA_HOST):
        raise _refuse(what, "host memory or a CUDA device (DLPack devices 1, 2, 3, 13)",
                      f"DLPack device {int(kind)}")
    try:
        capsule = value.__dlpack__(stream=DLPACK_NO_WAIT) if on_device else value.__dlpack__()
    except Exception as error:  # the exporter's own refusal, whatever its class
        raise InvalidArgument(f"{what}: {_type_name(value)} gives no DLPack: {error}") from error
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    _check_strides(what, shape, strides, 1)
    number = _DLPACK_KINDS.get(tensor.code, f"DLPack type {tensor.code} of ")
    dtype = "bool" if number == "bool" else f"{number}{tensor.bits}"
    if tensor.lanes != 1:
        dtype += f"x{tensor.lanes}"
    # The capsule still owns the tensor: its destructor gives the memory back to the exporter.
    return _make(what, (tensor.data or 0) + tensor.byte_offset, dtype, shape, (capsule, value),
                 int(index) if on_device else None)
