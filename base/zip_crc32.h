// The CRC32 of zip and gzip, by ISA-L.
#ifndef HOLDFAST_BASE_ZIP_CRC32_H_
#define HOLDFAST_BASE_ZIP_CRC32_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace holdfast {

// Of `data` behind bytes whose CRC is `crc` (of nothing: 0): ITU-T V.42, reflected 0x04C11DB7.
uint32_t ExtendZipCrc32(uint32_t crc, std::span<const std::byte> data);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_ZIP_CRC32_H_
