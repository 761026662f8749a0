#include "checkpoint/block_sums.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/crc32c.h"

namespace holdfast {
namespace {

// Stays in the cache between the copy, the checksum and the sums.
constexpr size_t kCopyBytes = size_t{64} << 10;

// Calls `add` for every part of those blocks that `is_read` says. False if one of them does not
// have its checksum.
template <typename IsRead, typename Add>
bool SumBlocks(const ImageFingerprints& sums, uint64_t block_bytes,
               std::span<const std::span<const std::byte>> blocks,
               std::span<const uint32_t> block_crc32c, IsRead is_read, Add add) {
  CHECK(blocks.size() == block_crc32c.size());
  std::vector<FingerprintPart> parts;
  for (size_t block = 0; block < blocks.size(); ++block) {
    CHECK(blocks[block].size() == block_bytes);
    if (!is_read(block)) continue;
    parts.clear();
    if (SumBytes(sums, block * block_bytes, blocks[block], parts) != block_crc32c[block]) {
      return false;
    }
    for (const FingerprintPart& part : parts) add(part);
  }
  return true;
}

// Of the slot's blocks, those in which a part of a replica lies.
std::vector<bool> BlocksOfReplicas(const Registration& registration) {
  const uint64_t block_bytes = registration.block_bytes();
  std::vector<bool> holds(registration.slot_block_count(), false);
  for (const PlacedPiece& place : registration.replicas().places) {
    const uint64_t bytes =
        place.piece.ElementCount() *
        ElementBytes(registration.layout().tensor_states()[place.piece.tensor_state].dtype);
    if (bytes == 0) continue;
    const uint64_t last = (place.image_offset_bytes + bytes - 1) / block_bytes;
    for (uint64_t block = place.image_offset_bytes / block_bytes; block <= last; ++block) {
      holds.at(block) = true;
    }
  }
  return holds;
}

}  // namespace

uint32_t SumBytes(const ImageFingerprints& sums, uint64_t offset_bytes,
                  std::span<const std::byte> bytes, std::vector<FingerprintPart>& parts) {
  const auto copy = std::make_unique_for_overwrite<std::byte[]>(std::min(kCopyBytes, bytes.size()));
  uint32_t crc32c = 0;
  for (size_t at = 0; at < bytes.size(); at += kCopyBytes) {
    const std::span<std::byte> part(copy.get(), std::min(kCopyBytes, bytes.size() - at));
    std::ranges::copy(bytes.subspan(at, part.size()), part.begin());
    crc32c = ExtendCrc32c(crc32c, part);
    sums.AppendParts(offset_bytes + at, part, parts);
  }
  return crc32c;
}

std::optional<std::vector<Fingerprint>> SumImage(const Registration& registration,
                                                 std::span<const std::span<const std::byte>> blocks,
                                                 std::span<const uint32_t> block_crc32c) {
  CHECK(blocks.size() == registration.block_count());
  std::vector<Fingerprint> sums(registration.layout().tensor_states().size());
  const bool intact = SumBlocks(
      registration.fingerprints(), registration.block_bytes(), blocks, block_crc32c,
      [](size_t) { return true; },
      [&](const FingerprintPart& part) { sums[part.tensor_state] += part.sum; });
  return intact ? std::optional(std::move(sums)) : std::nullopt;
}

std::optional<std::vector<Fingerprint>> SumReplicas(
    const Registration& registration, std::span<const std::span<const std::byte>> blocks,
    std::span<const uint32_t> block_crc32c) {
  CHECK(blocks.size() == registration.slot_block_count());
  const Replicas& replicas = registration.replicas();
  std::vector<Fingerprint> sums(replicas.replicas.size());
  const std::vector<bool> holds = BlocksOfReplicas(registration);
  const bool intact = SumBlocks(
      registration.replica_sums(), registration.block_bytes(), blocks, block_crc32c,
      [&](size_t block) { return holds[block]; },
      [&](const FingerprintPart& part) {
        sums[replicas.replica_of_place[part.piece]] += part.sum;
      });
  return intact ? std::optional(std::move(sums)) : std::nullopt;
}

}  // namespace holdfast
