#include "base/byte_codec.h"

#include "base/crc32c.h"

namespace holdfast {
namespace {

constexpr size_t kChecksumBytes = 4;

uint32_t LoadChecksum(std::span<const std::byte> bytes) {
  uint32_t value = 0;
  for (size_t i = kChecksumBytes; i-- > 0;) value = value << 8 | static_cast<uint32_t>(bytes[i]);
  return value;
}

}  // namespace

void OpenEnvelope(const Envelope& envelope, std::string& bytes) {
  CHECK(bytes.empty());
  bytes += envelope.magic;
  bytes += static_cast<char>(envelope.version);
}

void SealEnvelope(const Envelope& envelope, std::string& bytes) {
  const uint32_t checksum = Crc32c(std::as_bytes(std::span(bytes)));
  for (size_t i = 0; i < kChecksumBytes; ++i) {
    bytes += static_cast<char>(checksum >> (8 * i) & 0xFF);
  }
  CHECK(bytes.size() <= envelope.bytes_max);
}

absl::StatusOr<std::span<const std::byte>> FieldsIn(const Envelope& envelope,
                                                    std::span<const std::byte> bytes) {
  if (bytes.size() > envelope.bytes_max) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: expected at most %d bytes, found %d",
                                                      envelope.name, envelope.bytes_max,
                                                      bytes.size()));
  }
  if (bytes.size() <= envelope.magic.size() + kChecksumBytes) {
    return absl::DataLossError(
        absl::StrFormat("%s: truncated: found %d bytes", envelope.name, bytes.size()));
  }
  const bool magic = std::equal(envelope.magic.begin(), envelope.magic.end(), bytes.begin(),
                                [](char a, std::byte b) { return static_cast<char>(b) == a; });
  if (!magic) {
    return absl::DataLossError(absl::StrFormat("%s: expected the magic %s, found other bytes",
                                               envelope.name, envelope.magic));
  }
  const auto body = bytes.first(bytes.size() - kChecksumBytes);
  const uint32_t expected = Crc32c(body);
  const uint32_t found = LoadChecksum(bytes.last(kChecksumBytes));
  if (expected != found) {
    return absl::DataLossError(
        absl::StrFormat("%s: CRC32C: expected %08x, found %08x", envelope.name, expected, found));
  }
  const auto version = static_cast<uint64_t>(body[envelope.magic.size()]);
  if (version != envelope.version) {
    return absl::UnimplementedError(absl::StrFormat("%s: version: expected %d, found %d",
                                                    envelope.name, envelope.version, version));
  }
  return body.subspan(envelope.magic.size() + 1);
}

}  // namespace holdfast
