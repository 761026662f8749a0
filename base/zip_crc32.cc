#include "base/zip_crc32.h"

#include <isa-l.h>

namespace holdfast {

uint32_t ExtendZipCrc32(uint32_t crc, std::span<const std::byte> data) {
  return crc32_gzip_refl(crc, reinterpret_cast<const unsigned char*>(data.data()), data.size());
}

}  // namespace holdfast
