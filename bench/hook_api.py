"""The C ABI of the hook library through ctypes, as far as the benchmarks need it."""

import ctypes
import json
import os

FOREVER = 2**63 - 1
ALL_GROUPS = -1
SURVIVE_POWER = 2
LAST_STEP = 2**64 - 1


class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 1020)]


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", ctypes.c_size_t), ("job", ctypes.c_char_p), ("rank", ctypes.c_int64),
        ("world_size", ctypes.c_int64), ("local_rank", ctypes.c_int64),
        ("attempt_key", ctypes.c_char_p), ("root", ctypes.c_char_p), ("socket", ctypes.c_char_p),
        ("private_agent", ctypes.c_int32), ("check_source", ctypes.c_int32),
        ("copy_threads", ctypes.c_int32), ("deadline_ns", ctypes.c_int64)]


class Buffer(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64),
                ("group", ctypes.c_uint32)]


class RestoreResult(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", ctypes.c_size_t), ("step", ctypes.c_uint64), ("attempt", ctypes.c_uint32),
        ("world_size", ctypes.c_uint32), ("bytes", ctypes.c_uint64),
        ("bytes_from_memory", ctypes.c_uint64), ("nanoseconds", ctypes.c_int64)]


class SaveReport(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", ctypes.c_size_t), ("step", ctypes.c_uint64), ("state", ctypes.c_int),
        ("image_bytes", ctypes.c_uint64), ("blocks", ctypes.c_uint64),
        ("blocks_captured", ctypes.c_uint64), ("blocks_flushed", ctypes.c_uint64),
        ("call_ns", ctypes.c_int64), ("blocked_ns", ctypes.c_int64), ("capture_ns", ctypes.c_int64),
        ("flush_ns", ctypes.c_int64), ("commit_ns", ctypes.c_int64), ("error", Error)]


class HoldfastError(RuntimeError):
    def __init__(self, code, text):
        super().__init__(f"{text} (code {code})")
        self.code = code


class Job:
    """One rank of a job of one rank: `arrays` is a list of (name, address, bytes), all of them
    one-dimensional uint8 tensors."""

    def __init__(self, library, job, root, arrays, copy_threads=1, check_source=0):
        self.api = ctypes.CDLL(library)
        self.handle = ctypes.c_void_p()
        options = OpenOptions(ctypes.sizeof(OpenOptions), job.encode(), 0, 1, 0, None, root.encode(),
                              None, 1, check_source, copy_threads, 0)
        self._call(self.api.hf_open, ctypes.byref(options), ctypes.byref(self.handle))
        layout = {
            "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 1}],
            "tensors": [{"name": name, "shape": [size],
                         "states": [{"state": "param", "dtype": "uint8"}]}
                        for name, _, size in arrays]}
        buffers = (Buffer * len(arrays))(*[
            Buffer(f"param/{name}".encode(), address, size, 0) for name, address, size in arrays])
        self._call(self.api.hf_register, self.handle, json.dumps(layout).encode(), buffers,
                   ctypes.c_size_t(len(arrays)), None, ctypes.c_size_t(0), ctypes.c_int64(FOREVER))

    def _call(self, function, *arguments):
        error = Error()
        code = function(*arguments, ctypes.byref(error))
        if code != 0:
            raise HoldfastError(code, error.text.decode(errors="replace"))

    def save(self, step):
        self._call(self.api.hf_save, self.handle, ctypes.c_uint64(step), None)

    def wait_captured(self):
        self._call(self.api.hf_wait_captured, self.handle, ctypes.c_int32(ALL_GROUPS),
                   ctypes.c_int64(FOREVER))

    def wait_committed(self, step):
        self._call(self.api.hf_wait_committed, self.handle, ctypes.c_uint64(step),
                   ctypes.c_uint32(SURVIVE_POWER), ctypes.c_int64(600 * 10**9))

    def restore(self):
        result = RestoreResult(ctypes.sizeof(RestoreResult))
        self._call(self.api.hf_restore, self.handle, ctypes.byref(result),
                   ctypes.c_int64(600 * 10**9))
        return result

    def report(self, step=LAST_STEP):
        report = SaveReport(ctypes.sizeof(SaveReport))
        code = self.api.hf_report(self.handle, ctypes.c_uint64(step), ctypes.byref(report))
        if code != 0:
            raise HoldfastError(code, f"no report of step {step}")
        return report

    def close(self):
        self.api.hf_close(self.handle)
        self.handle = ctypes.c_void_p()


def environment(build, directory):
    """What a private agent of this build in `directory` needs."""
    os.environ["HOLDFASTD"] = os.path.join(build, "agent", "holdfastd")
    os.environ["HOLDFAST_RUNTIME_DIR"] = directory
    os.environ["HOLDFAST_LINGER"] = "1s"
    return os.path.join(build, "hook", "libholdfast.so")
