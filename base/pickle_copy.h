// Writes a value of a pickle anew: what Python would make of the copy is what it would make of the
// original: the same values, classes and calls, in the same order, and one object where there was
// one. Nothing is called or found on the way. So a part of another program's pickle survives in a
// pickle of ours although nobody here knows what its classes mean.
#ifndef HOLDFAST_BASE_PICKLE_COPY_H_
#define HOLDFAST_BASE_PICKLE_COPY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/pickle_reader.h"
#include "base/pickle_writer.h"

namespace holdfast {

inline constexpr size_t kPickleCopyDepthMax = 200;

// Threads: one. Lifetime: the writer and the document of all values outlive it.
class PickleCopier {
 public:
  // Asked first for every value: true if it has pushed one in its stead. It may call Copy.
  using Special = std::function<absl::StatusOr<bool>(PickleValue value)>;

  PickleCopier(PickleWriter& out, Special special) : out_(out), special_(std::move(special)) {}

  // Pushes the value. All values of one copier are of one document: what is shared between two of
  // them is shared between the copies. After an error nothing that the writer has is of use.
  // Errors: kUnimplemented (a value that holds itself, a persistent id, keyword arguments, a class
  // in a class), kResourceExhausted (deeper than kPickleCopyDepthMax), those of `special`.
  absl::Status Copy(PickleValue value);

 private:
  absl::Status CopyNew(PickleValue value);
  absl::Status CopyItems(PickleValue array);
  absl::Status CopyEntries(PickleValue dict);
  absl::Status CopyObject(PickleValue object);

  PickleWriter& out_;
  const Special special_;
  size_t depth_ = 0;
  std::unordered_map<uint32_t, uint32_t> known_;  // by number of the value: where it is remembered
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_PICKLE_COPY_H_
