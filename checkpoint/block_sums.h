// Checksum and fingerprints of the blocks of an image in one pass.
#ifndef HOLDFAST_CHECKPOINT_BLOCK_SUMS_H_
#define HOLDFAST_CHECKPOINT_BLOCK_SUMS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "checkpoint/registration.h"
#include "format/fingerprint.h"
#include "format/image_fingerprints.h"

namespace holdfast {

// The CRC32C of the bytes of a slot from `offset_bytes` on; appends what they add to `sums` to
// `parts`. Each byte is read once, so both are of the same bytes even if somebody writes them
// meanwhile.
uint32_t SumBytes(const ImageFingerprints& sums, uint64_t offset_bytes,
                  std::span<const std::byte> bytes, std::vector<FingerprintPart>& parts);

// The sums of a whole image, one per tensor state of the layout. Empty if a block does not have its
// checksum.
std::optional<std::vector<Fingerprint>> SumImage(const Registration& registration,
                                                 std::span<const std::span<const std::byte>> blocks,
                                                 std::span<const uint32_t> block_crc32c);

// The sums of the replicas in a slot, one per replica of the registration. Reads only the blocks in
// which a part of one lies. Empty if one of these does not have its checksum.
std::optional<std::vector<Fingerprint>> SumReplicas(
    const Registration& registration, std::span<const std::span<const std::byte>> blocks,
    std::span<const uint32_t> block_crc32c);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_BLOCK_SUMS_H_
