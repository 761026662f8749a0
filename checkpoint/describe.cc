#include "checkpoint/describe.h"

#include "absl/strings/str_format.h"

namespace holdfast {

std::string Describe(CheckpointId id) {
  return absl::StrFormat("step %d of attempt %d", Value(id.step), Value(id.attempt));
}

}  // namespace holdfast
