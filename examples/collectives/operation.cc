#include "examples/collectives/operation.h"

#include <cstring>
#include <utility>

namespace collectives {
namespace {

// Nobody may have written a 64-bit element at its natural alignment, so elements go through memcpy,
// which compiles to plain loads and stores.
template <typename Element, typename Sum>
void AddTo(std::span<std::byte> into, std::span<const std::byte> from, Sum sum) {
  for (size_t at = 0; at + sizeof(Element) <= from.size(); at += sizeof(Element)) {
    Element a, b;
    std::memcpy(&a, into.data() + at, sizeof(a));
    std::memcpy(&b, from.data() + at, sizeof(b));
    const Element result = sum(a, b);
    std::memcpy(into.data() + at, &result, sizeof(result));
  }
}

}  // namespace

void CombineBytes(Combine combine, std::span<std::byte> into, std::span<const std::byte> from) {
  switch (combine) {
    case Combine::kCopy:
      if (!from.empty()) std::memcpy(into.data(), from.data(), from.size());
      break;
    case Combine::kSumInt64:
      // Unsigned: an overflow wraps, so that the sum stays associative.
      AddTo<uint64_t>(into, from, [](uint64_t a, uint64_t b) { return a + b; });
      break;
    case Combine::kSumFloat32:
      AddTo<float>(into, from, [](float a, float b) { return a + b; });
      break;
  }
}

void Operation::Finish(absl::Status status) {
  MutexLock lock(mutex_);
  if (done_) return;
  done_ = true;
  status_ = std::move(status);
  finished_.SignalAll();
}

bool Operation::Done() const {
  MutexLock lock(mutex_);
  return done_;
}

absl::Status Operation::Wait() const {
  MutexLock lock(mutex_);
  while (!done_) finished_.Wait(mutex_);
  return status_;
}

}  // namespace collectives
