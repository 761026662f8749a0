#include "checkpoint/block_sums.h"

#include <algorithm>
#include <memory>

#include "base/check.h"
#include "base/crc32c.h"

namespace holdfast {
namespace {

// Stays in the cache between the copy, the checksum and the sums.
constexpr size_t kCopyBytes = size_t{64} << 10;

}  // namespace

uint32_t SumBlock(const Registration& registration, uint64_t block,
                  std::span<const std::byte> bytes, std::vector<FingerprintPart>& parts) {
  CHECK(bytes.size() == registration.block_bytes());
  const uint64_t begin = block * registration.block_bytes();
  const auto copy = std::make_unique_for_overwrite<std::byte[]>(std::min(kCopyBytes, bytes.size()));
  uint32_t crc32c = 0;
  for (size_t at = 0; at < bytes.size(); at += kCopyBytes) {
    const std::span<std::byte> part(copy.get(), std::min(kCopyBytes, bytes.size() - at));
    std::ranges::copy(bytes.subspan(at, part.size()), part.begin());
    crc32c = ExtendCrc32c(crc32c, part);
    registration.fingerprints().AppendParts(begin + at, part, parts);
  }
  return crc32c;
}

std::optional<std::vector<Fingerprint>> SumImage(const Registration& registration,
                                                 std::span<const std::span<const std::byte>> blocks,
                                                 std::span<const uint32_t> block_crc32c) {
  CHECK(blocks.size() == block_crc32c.size() && blocks.size() == registration.block_count());
  std::vector<Fingerprint> sums(registration.layout().tensor_states().size());
  std::vector<FingerprintPart> parts;
  for (size_t block = 0; block < blocks.size(); ++block) {
    parts.clear();
    if (SumBlock(registration, block, blocks[block], parts) != block_crc32c[block]) {
      return std::nullopt;
    }
    for (const FingerprintPart& part : parts) sums[part.tensor_state] += part.sum;
  }
  return sums;
}

}  // namespace holdfast
