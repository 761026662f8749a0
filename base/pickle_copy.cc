#include "base/pickle_copy.h"

#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using Type = PickleValue::Type;

constexpr uint32_t kUnfinished = UINT32_MAX;           // of a value that is being copied
constexpr std::string_view kBuiltins = "__builtin__";  // Python's own at this protocol

bool IsScalar(Type type) {
  return type == Type::kNone || type == Type::kBool || type == Type::kInteger ||
         type == Type::kFloat || type == Type::kString || type == Type::kBytes ||
         type == Type::kBigInteger || type == Type::kGlobal;
}

}  // namespace

absl::Status PickleCopier::Copy(PickleValue value) {
  ASSIGN_OR_RETURN(const bool taken, special_(value));
  if (taken) return absl::OkStatus();
  if (IsScalar(value.type())) return CopyNew(value);
  const auto [known, is_new] = known_.emplace(value.number(), kUnfinished);
  if (!is_new) {
    if (known->second == kUnfinished) {
      return absl::UnimplementedError(absl::StrCat(value.Describe(), " that holds itself"));
    }
    out_.Recall(known->second);
    return absl::OkStatus();
  }
  if (depth_ == kPickleCopyDepthMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("expected at most %d values in values, found more", kPickleCopyDepthMax));
  }
  ++depth_;
  RETURN_IF_ERROR(CopyNew(value));
  --depth_;
  known_[value.number()] = out_.Remember();
  return absl::OkStatus();
}

absl::Status PickleCopier::CopyNew(PickleValue value) {
  switch (value.type()) {
    case Type::kNone:
      out_.None();
      return absl::OkStatus();
    case Type::kBool:
      out_.Bool(*value.Bool());
      return absl::OkStatus();
    case Type::kInteger:
      out_.Int(*value.Int64());
      return absl::OkStatus();
    case Type::kBigInteger:
      out_.BigInteger(*value.BigInteger());
      return absl::OkStatus();
    case Type::kFloat:
      out_.Float(*value.Double());
      return absl::OkStatus();
    case Type::kString:
      out_.String(*value.String());
      return absl::OkStatus();
    case Type::kBytes:
      out_.Bytes(*value.Bytes());
      return absl::OkStatus();
    case Type::kByteArray:
      out_.Global(kBuiltins, "bytearray");
      out_.Bytes(*value.Bytes());
      out_.Tuple(1);
      out_.Reduce();
      return absl::OkStatus();
    case Type::kList:
      out_.EmptyList();
      out_.Mark();
      RETURN_IF_ERROR(CopyItems(value));
      out_.Appends();
      return absl::OkStatus();
    case Type::kTuple:
      if (*value.ArraySize() == 0) {
        out_.Tuple(0);
        return absl::OkStatus();
      }
      out_.Mark();
      RETURN_IF_ERROR(CopyItems(value));
      out_.Tuple();
      return absl::OkStatus();
    case Type::kSet:
    case Type::kFrozenSet:
      out_.Global(kBuiltins, value.type() == Type::kSet ? "set" : "frozenset");
      out_.EmptyList();
      out_.Mark();
      RETURN_IF_ERROR(CopyItems(value));
      out_.Appends();
      out_.Tuple(1);
      out_.Reduce();
      return absl::OkStatus();
    case Type::kDict:
      out_.EmptyDict();
      out_.Mark();
      RETURN_IF_ERROR(CopyEntries(value));
      out_.SetItems();
      return absl::OkStatus();
    case Type::kGlobal: {
      // Protocol 2 ends names at a line break, and has no way into a class.
      const std::string_view module = value.module();
      const std::string_view name = value.name();
      if (module.find('\n') != std::string_view::npos ||
          name.find_first_of("\n.") != std::string_view::npos) {
        return absl::UnimplementedError(absl::StrCat(value.Describe(), ", a class in a class"));
      }
      out_.Global(module, name);
      return absl::OkStatus();
    }
    case Type::kObject:
      return CopyObject(value);
    case Type::kPersistent:
      break;
  }
  return absl::UnimplementedError(absl::StrCat(value.Describe(), " of another file"));
}

absl::Status PickleCopier::CopyItems(PickleValue array) {
  const size_t count = *array.ArraySize();
  for (size_t i = 0; i < count; ++i) RETURN_IF_ERROR(Copy(array[i]));
  return absl::OkStatus();
}

absl::Status PickleCopier::CopyEntries(PickleValue dict) {
  const size_t count = *dict.EntryCount();
  for (size_t i = 0; i < count; ++i) {
    RETURN_IF_ERROR(Copy(dict.Key(i)));
    RETURN_IF_ERROR(Copy(dict.Entry(i)));
  }
  return absl::OkStatus();
}

absl::Status PickleCopier::CopyObject(PickleValue object) {
  if (object.kwargs().present() || object.state_count() > 1 || !object.callee().present() ||
      !object.args().Is(Type::kTuple)) {
    return absl::UnimplementedError(
        absl::StrCat(object.Describe(), " with keyword arguments or several states"));
  }
  RETURN_IF_ERROR(Copy(object.callee()));
  RETURN_IF_ERROR(Copy(object.args()));
  if (object.making() == PickleValue::Making::kNew) {
    out_.NewObject();
  } else {
    out_.Reduce();
  }
  if (object.items().present() && *object.items().ArraySize() > 0) {
    out_.Mark();
    RETURN_IF_ERROR(CopyItems(object.items()));
    out_.Appends();
  }
  if (object.entries().present() && *object.entries().EntryCount() > 0) {
    out_.Mark();
    RETURN_IF_ERROR(CopyEntries(object.entries()));
    out_.SetItems();
  }
  if (object.state().present()) {
    RETURN_IF_ERROR(Copy(object.state()));
    out_.Build();
  }
  return absl::OkStatus();
}

}  // namespace holdfast
