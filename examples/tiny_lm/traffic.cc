#include "examples/tiny_lm/traffic.h"

#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace tiny_lm {
namespace {

size_t Elements(uint64_t bytes) { return (bytes + sizeof(int64_t) - 1) / sizeof(int64_t); }

// What a rank gives to a sum.
int64_t Given(uint64_t rank, uint64_t step, size_t index) {
  return static_cast<int64_t>(rank * 1'000'003 + step + index);
}

// What one rank sends to another.
int64_t Sent(uint64_t from, uint64_t to, uint64_t step, size_t index) {
  return static_cast<int64_t>(from << 48 ^ to << 32 ^ step << 16 ^ index);
}

}  // namespace

Traffic::Traffic(collectives::Communicator& ranks, uint64_t all_reduce_bytes,
                 uint64_t all_to_all_bytes)
    : ranks_(ranks),
      reduced_(Elements(all_reduce_bytes)),
      sent_(Elements((all_to_all_bytes + ranks.size() - 1) / ranks.size()) * ranks.size()),
      received_(sent_.size()) {}

absl::Status Traffic::Run(uint64_t step) {
  if (!reduced_.empty()) {
    for (size_t i = 0; i < reduced_.size(); ++i) reduced_[i] = Given(ranks_.rank(), step, i);
    RETURN_IF_ERROR(ranks_.AllReduce(std::span(reduced_)).Wait());
    RETURN_IF_ERROR(CheckReduced(step));
  }
  if (!sent_.empty()) {
    const size_t block = sent_.size() / ranks_.size();
    for (size_t i = 0; i < sent_.size(); ++i) {
      sent_[i] = Sent(ranks_.rank(), i / block, step, i % block);
    }
    RETURN_IF_ERROR(
        ranks_
            .AllToAll(std::as_bytes(std::span(sent_)), std::as_writable_bytes(std::span(received_)))
            .Wait());
    RETURN_IF_ERROR(CheckExchanged(step));
  }
  return absl::OkStatus();
}

absl::Status Traffic::CheckReduced(uint64_t step) const {
  const uint64_t size = ranks_.size();
  for (size_t i = 0; i < reduced_.size(); ++i) {
    const int64_t expected =
        static_cast<int64_t>(size * (size - 1) / 2 * 1'000'003 + size * (step + i));
    if (reduced_[i] == expected) continue;
    return absl::DataLossError(
        absl::StrFormat("all-reduce of step %d, element %d: expected %d, "
                        "found %d",
                        step, i, expected, reduced_[i]));
  }
  return absl::OkStatus();
}

absl::Status Traffic::CheckExchanged(uint64_t step) const {
  const size_t block = received_.size() / ranks_.size();
  for (size_t i = 0; i < received_.size(); ++i) {
    const int64_t expected = Sent(i / block, ranks_.rank(), step, i % block);
    if (received_[i] == expected) continue;
    return absl::DataLossError(
        absl::StrFormat("all-to-all of step %d, from rank %d, element %d: expected %d, found %d",
                        step, i / block, i % block, expected, received_[i]));
  }
  return absl::OkStatus();
}

}  // namespace tiny_lm
