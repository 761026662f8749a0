// CRC32C (Castagnoli), the checksum of blocks, INDEX and MANIFEST. Computed by ISA-L at about the
// speed of memory.
#ifndef HOLDFAST_BASE_CRC32C_H_
#define HOLDFAST_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace holdfast {

// The CRC32C of `data`, in the usual form (initial and final inversion): of "123456789" it is
// 0xE3069283, of nothing 0.
uint32_t Crc32c(std::span<const std::byte> data);

// The CRC32C of A followed by `data`, given the CRC32C of A.
uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> data);

// The CRC32C of A followed by B, given both and the length of B in bytes. O(log b_bytes): x^(8 n)
// modulo the polynomial by squaring (the method of zlib's crc32_combine).
uint32_t CombineCrc32c(uint32_t crc_a, uint32_t crc_b, uint64_t b_bytes);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_CRC32C_H_
