// NCCL's names of functions and data types, as it spells them in descriptors.
#ifndef HOLDFAST_HOOK_PROFILER_NAMES_H_
#define HOLDFAST_HOOK_PROFILER_NAMES_H_

#include <cstdint>

#include "hook/abi/monitor.h"

namespace holdfast::profiler {

// NULL, or a name of a later NCCL: kUnknown.
abi::OperationKind OperationKindOf(const char* name);
abi::DataType DataTypeOf(const char* name);
// 0: not known.
uint64_t BytesOf(abi::DataType type);

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_NAMES_H_
