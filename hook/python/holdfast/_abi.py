"""hook/holdfast.h for ctypes: the structs, constants and functions of the C ABI, and nothing else.

Names, order and types are the header's; abi_test.py compares every size, offset and number with
what a C compiler makes of the header. The contracts stand there, too.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p

VERSION_MAJOR = 0
VERSION_MINOR = 1

FOREVER = 2**63 - 1
ALL_GROUPS = -1
LAST_STEP = 2**64 - 1
NO_STEP = 2**64 - 1
SURVIVE_PROCESS = 1
SURVIVE_POWER = 2
BLOB_GLOBAL = 0
BLOB_RANK = 1
RESTORE_FROM_NOT_GIVEN = 0
RESTORE_FROM_USED = 1
RESTORE_FROM_IGNORED = 2
COPIES_ONCE = 0
COPIES_PER_NODE = 1
COPIES_ALL = 2


class hf_error(ctypes.Structure):
    _fields_ = [("code", c_int), ("text", c_char * 1020)]


class hf_open_options(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("job", c_char_p), ("rank", c_int64), ("world_size", c_int64),
        ("local_rank", c_int64), ("attempt_key", c_char_p), ("root", c_char_p),
        ("socket", c_char_p), ("private_agent", c_int32), ("check_source", c_int32),
        ("copy_threads", c_int32), ("deadline_ns", c_int64), ("restore_from", c_char_p),
        ("copies", c_int32)]


class hf_buffer(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("bytes", c_uint64), ("group", c_uint32)]


class hf_blob_slot(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("scope", c_int), ("capacity_bytes", c_uint64)]


class hf_blob(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("bytes", c_uint64)]


class hf_save_options(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("pointers", POINTER(c_void_p)), ("blobs", POINTER(hf_blob)),
        ("blob_count", c_size_t), ("wait_ns", c_int64), ("streams", POINTER(c_void_p)),
        ("stream_count", c_size_t)]


class hf_restore_result(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("step", c_uint64), ("attempt", c_uint32),
        ("world_size", c_uint32), ("bytes", c_uint64), ("bytes_from_memory", c_uint64),
        ("nanoseconds", c_int64), ("tensor_states", c_uint64),
        ("tensor_states_left_out", c_uint64), ("restore_from", c_int)]


class hf_restore_options(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("tensors", POINTER(c_char_p)), ("tensor_count", c_size_t),
        ("states", POINTER(c_char_p)), ("state_count", c_size_t), ("streams", POINTER(c_void_p)),
        ("stream_count", c_size_t)]


class hf_info(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("attempt", c_uint32), ("fenced", c_uint32),
        ("connected", c_uint32), ("reconnect_count", c_uint32),
        ("committed_process_step", c_uint64), ("committed_power_step", c_uint64),
        ("image_bytes", c_uint64), ("block_bytes", c_uint64)]


class hf_save_report(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("step", c_uint64), ("state", c_int), ("image_bytes", c_uint64),
        ("blocks", c_uint64), ("blocks_captured", c_uint64), ("blocks_flushed", c_uint64),
        ("call_ns", c_int64), ("blocked_ns", c_int64), ("capture_ns", c_int64),
        ("flush_ns", c_int64), ("commit_ns", c_int64), ("error", hf_error),
        ("device_bytes", c_uint64), ("unpinned_bytes", c_uint64), ("gate_ns", c_int64),
        ("device_ns", c_int64)]


class hf_communicator_options(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_size_t), ("id", c_uint64), ("name", c_char_p), ("ranks", c_uint32),
        ("rank", c_uint32), ("nodes", c_uint32)]


STRUCTS = (hf_error, hf_open_options, hf_buffer, hf_blob_slot, hf_blob, hf_save_options,
           hf_restore_result, hf_restore_options, hf_info, hf_save_report, hf_communicator_options)

_JOB = c_void_p
_ERROR = POINTER(hf_error)

# name: (result, arguments)
FUNCTIONS = {
    "hf_open": (c_int, (POINTER(hf_open_options), POINTER(_JOB), _ERROR)),
    "hf_close": (None, (_JOB,)),
    "hf_register": (c_int, (_JOB, c_char_p, POINTER(hf_buffer), c_size_t, POINTER(hf_blob_slot),
                            c_size_t, c_int64, _ERROR)),
    "hf_due": (c_int, (_JOB, c_uint64)),
    "hf_save": (c_int, (_JOB, c_uint64, POINTER(hf_save_options), _ERROR)),
    "hf_wait_captured": (c_int, (_JOB, c_int32, c_int64, _ERROR)),
    "hf_wait_committed": (c_int, (_JOB, c_uint64, c_uint32, c_int64, _ERROR)),
    "hf_restore": (c_int, (_JOB, POINTER(hf_restore_result), c_int64, _ERROR)),
    "hf_restore_partial": (c_int, (_JOB, POINTER(hf_restore_options), POINTER(hf_restore_result),
                                   c_int64, _ERROR)),
    "hf_restored_blob": (c_int, (_JOB, c_char_p, c_int64, POINTER(c_void_p), POINTER(c_uint64),
                                 _ERROR)),
    "hf_get_info": (c_int, (_JOB, POINTER(hf_info))),
    "hf_report": (c_int, (_JOB, c_uint64, POINTER(hf_save_report))),
    "hf_heartbeat": (None, (_JOB, c_uint64)),
    "hf_section_begin": (None, (_JOB, c_char_p)),
    "hf_section_end": (None, (_JOB,)),
    "hf_monitor_communicator": (c_uint64, (POINTER(hf_communicator_options),)),
    "hf_monitor_close": (None, (c_uint64,)),
    "hf_monitor_thread": (None, (c_uint64,)),
    "hf_operation_begin": (c_uint64, (c_uint64, c_int, c_uint64, c_uint32)),
    "hf_operation_start": (None, (c_uint64,)),
    "hf_operation_end": (None, (c_uint64,)),
    "hf_transfer_begin": (c_uint64, (c_uint64, c_uint64, c_uint32, c_uint32, c_int, c_uint32)),
    "hf_step_begin": (c_uint64, (c_uint64, c_uint32)),
    "hf_step_wait": (None, (c_uint64, c_int, c_uint64)),
    "hf_step_end": (None, (c_uint64,)),
    "hf_transfer_end": (None, (c_uint64,)),
    "hf_version": (c_char_p, ()),
}


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives every function its types. AttributeError: the library lacks one."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
