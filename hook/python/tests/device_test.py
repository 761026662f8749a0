"""Arrays in the memory of a CUDA device, here of the fake driver, through Job and a real agent.

Usage: device_test.py HOLDFASTD LIBCUDA        ($HOLDFAST_LIBRARY: the library)
"""
import ctypes
import sys
import types
import unittest

import holdfast
from holdfast import InvalidArgument
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


class DeviceTest(unittest.TestCase):
    def test_device_and_host_arrays_are_saved_and_restored_together(self):
        cuda = Cuda()
        cuda.use(0)
        on_device, in_host = bytes(range(256)) * 500, bytearray(b"host" * 1000)
        tensor = Tensor(cuda, on_device)
        Place(self.addCleanup, DAEMON).use()
        arrays = {"param/a": holdfast.memory_of(tensor), "param/b": holdfast.memory_of(in_host)}
        self.assertEqual(arrays["param/a"].device, 0)
        with holdfast.Job("device", rank=0, world_size=1) as job:
            job.register(holdfast.replicated(arrays, 1), list(arrays.items()))
            for step, streams in ((1, None), (2, [cuda.stream()])):
                job.save(step, streams=streams, wait=30)
                job.wait_captured()
                report = job.report(step)
                self.assertEqual(report.device_bytes, len(on_device))
                self.assertEqual(report.unpinned_bytes, 0)
                self.assertGreater(report.device_ns, 0)
                job.wait_committed(step)
        tensor.write(bytes(len(on_device)))
        in_host[:] = bytes(len(in_host))
        with holdfast.Job("device", rank=0, world_size=1) as job:
            job.register(holdfast.replicated(arrays, 1), list(arrays.items()))
            restored = job.restore()
            self.assertEqual((restored.step, restored.bytes), (2, len(on_device) + len(in_host)))
            self.assertEqual(tensor.read(), on_device)
            self.assertEqual(in_host, b"host" * 1000)
            # A stream of another device, which holds nothing.
            cuda.use(1)
            with self.assertRaisesRegex(InvalidArgument, "stream 0 belongs to a CUDA context"):
                job.save(3, streams=[cuda.stream()], wait=30)


if __name__ == "__main__":
    unittest.main()
