// The headers of safetensors files, and the index that a reader's process hands to its parent.
#include <limits>
#include <string>

#include "base/byte_codec.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "converter/foreign_index.h"
#include "converter/safetensors.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {

// The first two bytes say how many bytes of data stand behind the header. What is accepted fills
// them without holes, and makes an index.
bool FuzzSafetensors(Input input) {
  if (input.size() < 2) return false;
  const uint64_t data_bytes = input[0] | uint64_t{input[1]} << 8;
  std::string text(reinterpret_cast<const char*>(input.data()) + 2, input.size() - 2);
  const uint64_t begin = 8 + text.size();
  const uint64_t file_bytes = begin + data_bytes;
  const auto header = converter::ParseSafetensorsHeader(std::move(text), file_bytes, "input");
  if (!header.ok()) {
    CHECK(header.status().code() == absl::StatusCode::kDataLoss);
    return false;
  }
  uint64_t end = begin;
  converter::ForeignIndex index;
  index.files = {{"input", file_bytes}};
  for (const converter::SafetensorsTensor& tensor : header->tensors) {
    CHECK(tensor.offset_bytes == end);
    end += tensor.bytes;
    converter::AddSafetensor(tensor, 0, "tensor", index);
  }
  CHECK(end == file_bytes);
  const absl::Status finished = converter::Finish(index);
  CHECK(finished.ok() || finished.code() == absl::StatusCode::kDataLoss);  // names, dimensions
  return true;
}

// The fields; the envelope around them is put right. What decodes is valid, and is encoded to the
// same bytes but for the order of pieces.
bool FuzzForeignIndex(Input input) {
  std::string bytes("HFFI\1", 5);
  bytes.append(reinterpret_cast<const char*>(input.data()), input.size());
  const uint32_t checksum = Crc32c(std::as_bytes(std::span(bytes)));
  for (int i = 0; i < 4; ++i) bytes += static_cast<char>(checksum >> (8 * i) & 0xFF);
  auto index = converter::DecodeForeignIndex(std::as_bytes(std::span(bytes)));
  if (!index.ok()) {
    CHECK(index.status().code() == absl::StatusCode::kDataLoss ||
          index.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  for (const converter::ForeignPiece& piece : index->pieces) {
    const auto end = converter::EndOf(piece, *index);
    CHECK_OK(end.status());
    CHECK(*end <= index->extents[piece.extent].decoded_bytes);
  }
  const auto encoded = converter::EncodeForeignIndex(*index);
  CHECK_OK(encoded.status());
  auto again = converter::DecodeForeignIndex(std::as_bytes(std::span(*encoded)));
  CHECK_OK(again.status());
  CHECK(*converter::EncodeForeignIndex(*again) == *encoded);
  return true;
}

}  // namespace holdfast::fuzz
