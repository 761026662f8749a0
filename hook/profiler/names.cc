#include "hook/profiler/names.h"

#include <strings.h>

namespace holdfast::profiler {
namespace {

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

// The commonest first; NCCL has spelt AlltoAll in more than one way.
constexpr Named<abi::OperationKind> kOperations[] = {
    {"AllReduce", abi::OperationKind::kAllReduce},
    {"AllGather", abi::OperationKind::kAllGather},
    {"ReduceScatter", abi::OperationKind::kReduceScatter},
    {"Send", abi::OperationKind::kSend},
    {"Recv", abi::OperationKind::kReceive},
    {"Broadcast", abi::OperationKind::kBroadcast},
    {"Reduce", abi::OperationKind::kReduce},
    {"AlltoAll", abi::OperationKind::kAllToAll},
    {"Gather", abi::OperationKind::kGather},
    {"Scatter", abi::OperationKind::kScatter},
};

constexpr Named<abi::DataType> kDataTypes[] = {
    {"ncclBfloat16", abi::DataType::kBfloat16},     {"ncclFloat32", abi::DataType::kFloat32},
    {"ncclFloat16", abi::DataType::kFloat16},       {"ncclInt8", abi::DataType::kInt8},
    {"ncclUint8", abi::DataType::kUint8},           {"ncclInt32", abi::DataType::kInt32},
    {"ncclUint32", abi::DataType::kUint32},         {"ncclInt64", abi::DataType::kInt64},
    {"ncclUint64", abi::DataType::kUint64},         {"ncclFloat64", abi::DataType::kFloat64},
    {"ncclFloat8e4m3", abi::DataType::kFloat8E4m3}, {"ncclFloat8e5m2", abi::DataType::kFloat8E5m2},
};

template <typename Value, size_t kCount>
Value Find(const Named<Value> (&table)[kCount], const char* name) {
  if (name == nullptr) return Value::kUnknown;
  for (const Named<Value>& entry : table) {
    if (strcasecmp(entry.name, name) == 0) return entry.value;
  }
  return Value::kUnknown;
}

}  // namespace

abi::OperationKind OperationKindOf(const char* name) { return Find(kOperations, name); }

abi::DataType DataTypeOf(const char* name) { return Find(kDataTypes, name); }

uint64_t BytesOf(abi::DataType type) {
  switch (type) {
    case abi::DataType::kInt8:
    case abi::DataType::kUint8:
    case abi::DataType::kFloat8E4m3:
    case abi::DataType::kFloat8E5m2:
      return 1;
    case abi::DataType::kFloat16:
    case abi::DataType::kBfloat16:
      return 2;
    case abi::DataType::kInt32:
    case abi::DataType::kUint32:
    case abi::DataType::kFloat32:
      return 4;
    case abi::DataType::kInt64:
    case abi::DataType::kUint64:
    case abi::DataType::kFloat64:
      return 8;
    case abi::DataType::kUnknown:
      return 0;
  }
  return 0;
}

}  // namespace holdfast::profiler
