"""Arrays in the memory of a CUDA device, here of the fake driver, through Job and a real agent.

Usage: device_test.py HOLDFASTD LIBCUDA        ($HOLDFAST_LIBRARY: the library)
"""
import ctypes
import sys
import types
import unittest

import holdfast
from holdfast import InvalidArgument, memory
from support import Place

DAEMON, LIBCUDA = sys.argv.pop(1), sys.argv.pop(1)


class Cuda:
    """As much of the driver as a program that trains has used before it saves."""

    def __init__(self):
        self.library = ctypes.CDLL(LIBCUDA, mode=ctypes.RTLD_GLOBAL)
        self.call("cuInit", 0)

    def call(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name}: {result}")

    def use(self, device):
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxPushCurrent_v2", context)

    def stream(self):
        stream = ctypes.c_void_p()
        self.call("cuStreamCreateWithPriority", ctypes.byref(stream), 1, 0)
        return stream.value


class Tensor:
    """What torch's tensors offer, as far as it is asked for, of bytes on the current device."""

    def __init__(self, cuda, data):
        self.cuda, self.size = cuda, len(data)
        self.shape, self.dtype, self.layout = (len(data),), "torch.uint8", "torch.strided"
        self.device = types.SimpleNamespace(type="cuda", index=0)
        self.pointer = ctypes.c_uint64()
        cuda.call("cuMemAlloc_v2", ctypes.byref(self.pointer), ctypes.c_size_t(self.size))
        self.write(data)

    def data_ptr(self):
        return self.pointer.value

    def is_contiguous(self):
        return True

    def write(self, data):
        self.cuda.call("cuMemcpyHtoD_v2", self.pointer, data, ctypes.c_size_t(self.size))

    def read(self):
        data = ctypes.create_string_buffer(self.size)
        self.cuda.call("cuMemcpyDtoH_v2", data, self.pointer, ctypes.c_size_t(self.size))
        return data.raw


class CudaArray:
    """What CuPy's and Numba's arrays offer."""

    def __init__(self, tensor):
        self.tensor, self.device = tensor, 0
        self.__cuda_array_interface__ = {"shape": tensor.shape, "typestr": "|u1", "version": 3,
                                         "data": (tensor.data_ptr(), False)}


class DlpackArray:
    """What JAX's arrays offer, and everybody's else."""

    class Managed(ctypes.Structure):
        _fields_ = [("tensor", memory._DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]

    def __init__(self, tensor):
        self.tensor = tensor
        self.shape = (ctypes.c_int64 * 1)(tensor.size)
        self.managed = self.Managed(memory._DLTensor(
            data=tensor.data_ptr(), device_type=memory.DLPACK_CUDA, device_id=0, ndim=1, code=1, bits=8, lanes=1,
            shape=self.shape))

    def __dlpack_device__(self):
        return (memory.DLPACK_CUDA, 0)

    def __dlpack__(self, stream=None):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor", None)


class DeviceTest(unittest.TestCase):
    def test_device_and_host_arrays_are_saved_and_restored_together(self):
        cuda = Cuda()
        cuda.use(0)
        on_device, in_host = bytes(range(256)) * 500, bytearray(b"host" * 1000)
        tensors = [Tensor(cuda, bytes([i]) + on_device[1:]) for i in range(3)]
        Place(self.addCleanup, DAEMON).use()
        arrays = {f"param/{i}": holdfast.memory_of(value) for i, value in enumerate(
            (tensors[0], CudaArray(tensors[1]), DlpackArray(tensors[2]), in_host))}
        self.assertEqual([array.device for array in arrays.values()], [0, 0, 0, None])
        with holdfast.Job("device", rank=0, world_size=1) as job:
            job.register(holdfast.replicated(arrays, 1), list(arrays.items()))
            for step, streams in ((1, None), (2, [cuda.stream()])):
                job.save(step, streams=streams, wait=30)
                job.wait_captured()
                report = job.report(step)
                self.assertEqual(report.device_bytes, 3 * len(on_device))
                self.assertEqual(report.unpinned_bytes, 0)
                self.assertGreater(report.device_ns, 0)
                self.assertEqual(report.device_bytes_per_second, report.device_bytes / report.device_ns * 1e9)
                self.assertEqual(report.hidden_ns, max(0, report.capture_ns - report.blocked_ns))
                job.wait_committed(step)
        for tensor in tensors:
            tensor.write(bytes(len(on_device)))
        in_host[:] = bytes(len(in_host))
        with holdfast.Job("device", rank=0, world_size=1) as job:
            job.register(holdfast.replicated(arrays, 1), list(arrays.items()))
            restored = job.restore()
            self.assertEqual((restored.step, restored.bytes), (2, 3 * len(on_device) + len(in_host)))
            for i, tensor in enumerate(tensors):
                self.assertEqual(tensor.read(), bytes([i]) + on_device[1:])
            self.assertEqual(in_host, b"host" * 1000)
            # A stream of another device, which holds nothing.
            cuda.use(1)
            with self.assertRaisesRegex(InvalidArgument, "stream 0 belongs to a CUDA context"):
                job.save(3, streams=[cuda.stream()], wait=30)


if __name__ == "__main__":
    unittest.main()
