#include "converter/torch_leaves.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

using Kind = TorchValue::Kind;
using Visit = absl::FunctionRef<absl::Status(const std::vector<std::string>&, TorchValue)>;

std::string KeyText(TorchValue key) {
  if (key.Is(Kind::kString)) return std::string(*key.String());
  if (const auto number = key.Int64(); number.ok()) return absl::StrCat(*number);
  return "?";
}

// A list or tuple of nothing that could be, or hold, a tensor.
bool IsPlain(TorchValue list) {
  for (size_t i = 0; i < *list.ArraySize(); ++i) {
    const Kind kind = list[i].kind();
    if (kind != Kind::kNone && kind != Kind::kBool && kind != Kind::kInteger &&
        kind != Kind::kFloat && kind != Kind::kString && kind != Kind::kBytes) {
      return false;
    }
  }
  return true;
}

class LeafWalk {
 public:
  explicit LeafWalk(Visit visit) : visit_(visit) {}

  absl::Status Walk(TorchValue value) {
    if (value.Is(Kind::kDict) && *value.EntryCount() > 0) {
      for (size_t i = 0; i < *value.EntryCount(); ++i) {
        RETURN_IF_ERROR(Into(KeyText(value.Key(i)), value.Entry(i)));
      }
      return absl::OkStatus();
    }
    if ((value.Is(Kind::kList) || value.Is(Kind::kTuple)) && !IsPlain(value)) {
      for (size_t i = 0; i < *value.ArraySize(); ++i) {
        RETURN_IF_ERROR(Into(absl::StrCat(i), value[i]));
      }
      return absl::OkStatus();
    }
    if (++leaves_ > kTorchLeavesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d values, found more", kTorchLeavesMax));
    }
    return visit_(path_, value);
  }

 private:
  absl::Status Into(std::string key, TorchValue value) {
    if (path_.size() >= kTorchNestingMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d levels, found more", kTorchNestingMax));
    }
    path_.push_back(std::move(key));
    RETURN_IF_ERROR(Walk(value));
    path_.pop_back();
    return absl::OkStatus();
  }

  const Visit visit_;
  std::vector<std::string> path_;
  size_t leaves_ = 0;
};

}  // namespace

absl::Status VisitTorchLeaves(TorchValue root, Visit visit) { return LeafWalk(visit).Walk(root); }

}  // namespace holdfast::converter
