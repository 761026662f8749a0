#!/usr/bin/python3
"""holdfast/memory.py: every dtype, every way to offer memory, every reason to refuse it by name."""
import array
import ctypes
import itertools
import json
import mmap
import pathlib
import types
import unittest

import numpy

from holdfast import InvalidArgument, Memory, memory_of
from holdfast.memory import DTYPES

# Numpy has no others.
NUMPY_DTYPES = [name for name in DTYPES
                if not name.startswith(("bfloat", "float4", "float8", "bits", "complex32"))]
SCHEMA = pathlib.Path(__file__).resolve().parents[3] / "docs" / "layout.schema.json"
SHAPES = [(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (1, 1, 7), (2, 1, 2, 1)]


class OnlyDlpack:
    """Offers nothing else."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device, self.streams = array, device, []

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


class FakeTensor:
    """What torch's tensors offer, as far as it is asked for."""

    def __init__(self, **changes):
        self.memory = ctypes.create_string_buffer(24)
        self.shape, self.dtype, self.layout = (2, 3), "torch.float32", "torch.strided"
        self.device = types.SimpleNamespace(type="cpu")
        self.contiguous = True
        self.__dict__.update(changes)

    def data_ptr(self):
        return ctypes.addressof(self.memory)

    def is_contiguous(self):
        return self.contiguous

    def stride(self):
        return (1, 2)


class CudaArray:
    """What CuPy's and Numba's arrays offer, as far as it is asked for."""

    def __init__(self, device=None, **changes):
        self.__cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3,
                                         **changes}
        if device is not None:
            self.device = device


class MlDtype:
    """ml_dtypes' arrays: the interface says V2, the dtype object knows the name."""

    def __init__(self, name):
        self.array = numpy.zeros(3, numpy.uint16)
        self.dtype = types.SimpleNamespace(name=name)
        self.__array_interface__ = dict(self.array.__array_interface__, typestr="<V2")


class MemoryTest(unittest.TestCase):
    def check(self, memory, address, dtype, shape, device=None):
        count = 1
        for size in shape:
            count *= size
        expected = Memory(address if count else 0, count * DTYPES[dtype], dtype, tuple(shape),
                          device=device)
        self.assertEqual(memory, expected)

    def refused(self, value, *expected):
        with self.assertRaises(InvalidArgument) as caught:
            memory_of(value, "array 'param/w'")
        for text in ("array 'param/w'", *expected):
            self.assertIn(text, str(caught.exception))

    def test_dtypes_are_those_of_layout_documents(self):
        schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
        self.assertEqual(sorted(DTYPES), sorted(schema["$defs"]["state"]["properties"]["dtype"]["enum"]))

    def test_numpy_arrays_of_every_dtype_and_shape(self):
        for dtype, shape in itertools.product(NUMPY_DTYPES, SHAPES):
            with self.subTest(dtype=dtype, shape=shape):
                value = numpy.zeros(shape, dtype)
                memory = memory_of(value)
                self.check(memory, value.ctypes.data, dtype, shape)
                if memory.bytes:
                    ctypes.memset(memory.address, 1, memory.bytes)
                    self.assertEqual(value.tobytes(), b"\1" * memory.bytes)

    def test_dlpack_of_every_dtype_and_shape(self):
        # numpy 1.24 exports neither bool nor arrays without elements.
        for dtype, shape in itertools.product(NUMPY_DTYPES, SHAPES):
            if dtype == "bool" or 0 in shape:
                continue
            with self.subTest(dtype=dtype, shape=shape):
                value = numpy.zeros(shape, dtype)
                self.check(memory_of(OnlyDlpack(value)), value.ctypes.data, dtype, shape)

    def test_buffers_of_every_format(self):
        for code, dtype in (("b", "int8"), ("B", "uint8"), ("h", "int16"), ("H", "uint16"),
                            ("i", "int32"), ("I", "uint32"), ("l", "int64"), ("L", "uint64"),
                            ("q", "int64"), ("Q", "uint64"), ("f", "float32"), ("d", "float64")):
            with self.subTest(code=code):
                value = array.array(code, range(5))
                self.check(memory_of(value), value.buffer_info()[0], dtype, (5,))
        data = bytearray(12)
        memory = memory_of(data)
        ctypes.memset(memory.address, 7, 12)
        self.assertEqual(data, b"\7" * 12)
        with self.assertRaises(BufferError):
            data.append(1)  # it may not move while somebody has its address
        self.check(memory_of(bytearray()), 0, "uint8", (0,))
        view = memoryview(data).cast("B", (3, 4))
        self.check(memory_of(view), memory.address, "uint8", (3, 4))
        self.assertEqual(memory_of(mmap.mmap(-1, 4096)).bytes, 4096)

    def test_tensors_with_a_data_pointer(self):
        for name in DTYPES:
            tensor = FakeTensor(dtype=f"torch.{name}")
            self.check(memory_of(tensor), tensor.data_ptr(), name, (2, 3))
        value = MlDtype("bfloat16")
        self.check(memory_of(value), value.array.ctypes.data, "bfloat16", (3,))
        self.refused(MlDtype("float8_e5m2"), "1 bytes", "<V2")

    def test_the_owner_is_kept(self):
        value = numpy.zeros(3)
        self.assertIs(memory_of(value).owner, value)
        self.assertIs(memory_of(memory_of(value)).owner, value)

    def test_numpy_arrays_that_would_need_a_copy_are_refused(self):
        value = numpy.zeros((4, 6), numpy.float32)
        for strided in (value.T, value[:, ::2], value[::-1], value[:, :3],
                        numpy.broadcast_to(numpy.zeros(3), (2, 3))):
            self.refused(strided, "expected")
        read_only = numpy.zeros(3)
        read_only.flags.writeable = False
        self.refused(read_only, "writable", "read-only")
        self.refused(numpy.zeros(3, ">f4"), "byte order", ">f4")
        self.refused(numpy.zeros(3, numpy.clongdouble), "dtype", "complex256")
        self.refused(numpy.zeros(3, numpy.float128), "float128")
        self.refused(numpy.zeros(3, "M8[s]"), "M8")
        self.refused(numpy.array([object()]), "dtype")
        self.refused(numpy.zeros(3, [("a", "f4")]), "dtype")
        self.refused(numpy.float32(3), "scalar")
        # Strides that say nothing are no reason.
        self.assertEqual(memory_of(value[:1].T[:6].reshape(6, 1)[:, :1]).shape, (6, 1))
        self.assertEqual(memory_of(numpy.zeros((0, 4)).T).bytes, 0)

    def test_tensors_on_cuda_devices_name_their_device(self):
        self.assertIsNone(memory_of(FakeTensor()).device)
        for index, device in ((0, 0), (3, 3), (None, 0)):
            tensor = FakeTensor(device=types.SimpleNamespace(type="cuda", index=index))
            memory = memory_of(tensor)
            self.assertEqual((memory.device, memory.address), (device, tensor.data_ptr()))

    def test_cuda_arrays_and_dlpack_on_cuda_devices_are_taken(self):
        for device, index in ((None, 0), (1, 1), (types.SimpleNamespace(id=2), 2), ("a device", 0)):
            self.check(memory_of(CudaArray(device)), 4096, "float32", (2, 3), index)
        self.check(memory_of(CudaArray(shape=(3,), typestr="|u1", strides=(1,))), 4096, "uint8", (3,), 0)
        value = numpy.zeros(3, numpy.int16)
        for kind in (2, 13):
            exporter = OnlyDlpack(value, device=(kind, 1))
            self.assertEqual(memory_of(exporter).device, 1)
            self.assertEqual(exporter.streams, [-1])  # nobody is waited for
        pinned = OnlyDlpack(value, device=(3, 0))
        self.assertIsNone(memory_of(pinned).device)
        self.assertEqual(pinned.streams, [None])

    def test_cuda_arrays_that_would_need_a_copy_are_refused(self):
        self.refused(CudaArray(strides=(4, 8)), "contiguous", "(4, 8)")
        self.refused(CudaArray(data=(4096, True)), "writable", "read-only")
        self.refused(CudaArray(typestr=">f4"), "byte order", ">f4")
        self.refused(CudaArray(typestr="<M8[s]"), "M8")
        self.refused(CudaArray(mask=object()), "masked")

    def test_tensors_that_would_need_a_copy_are_refused(self):
        self.refused(FakeTensor(device=types.SimpleNamespace(type="mps")), "on a CUDA device")
        self.refused(FakeTensor(layout="torch.sparse_coo"), "dense", "sparse_coo")
        self.refused(FakeTensor(contiguous=False), "contiguous", "(1, 2)")
        self.refused(FakeTensor(dtype="torch.quint8"), "quint8")
        self.refused(FakeTensor(is_neg=lambda: True), "is_neg")
        self.refused(FakeTensor(to_local=lambda: None), "layout document")

    def test_buffers_and_dlpack_that_would_need_a_copy_are_refused(self):
        self.refused(b"bytes", "writable", "read-only bytes")
        self.refused(memoryview(bytearray(9))[::2], "contiguous")
        self.refused((ctypes.c_longdouble * 2)(), "format")
        self.refused((ctypes.c_float.__ctype_be__ * 2)(), "byte order")
        self.refused(OnlyDlpack(numpy.zeros((2, 3)).T), "contiguous")
        self.refused(OnlyDlpack(numpy.zeros(3), device=(10, 0)), "device 10")
        self.refused(OnlyDlpack(numpy.zeros(3, ">f4")), "DLPack")

    def test_anything_else_is_refused(self):
        for value in (None, 3, "text", [1.0], object()):
            self.refused(value, "expected", type(value).__name__)


if __name__ == "__main__":
    unittest.main()
