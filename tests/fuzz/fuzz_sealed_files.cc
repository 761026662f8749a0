// The small files under a checksum line. What decodes can be encoded, and decodes to the same
// again.
#include <string>

#include "base/check.h"
#include "checkpoint/sealed_json.h"
#include "format/manifest.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

// Spaces between values are the writer's choice, so the first encoding may differ from the input;
// the second may not differ from the first.
template <typename Decode, typename Encode>
bool IsFixedPoint(const std::string& bytes, Decode decode, Encode encode) {
  const auto record = decode(bytes, "F");
  if (!record.ok()) {
    CHECK(record.status().code() == absl::StatusCode::kDataLoss);
    return false;
  }
  const std::string encoded = encode(*record);
  const auto again = decode(encoded, "F");
  CHECK_OK(again.status());
  CHECK(encode(*again) == encoded);
  return true;
}

}  // namespace

bool FuzzSealedFiles(Input input) {
  const std::string bytes(input.begin(), input.end());
  const auto document = UnsealJson(bytes, "F");
  CHECK(document.ok() || document.status().code() == absl::StatusCode::kDataLoss);
  const bool is_manifest = IsFixedPoint(bytes, DecodeManifest, EncodeManifest);
  const bool is_job = IsFixedPoint(bytes, DecodeJobRecord, EncodeJobRecord);
  const bool is_bad = IsFixedPoint(bytes, DecodeBadMark, EncodeBadMark);
  const bool is_head = IsFixedPoint(bytes, DecodeHead, EncodeHead);
  CHECK(is_manifest + is_job + is_bad + is_head <= 1);
  return document.ok();
}

}  // namespace holdfast::fuzz
