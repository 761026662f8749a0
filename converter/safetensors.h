// safetensors (github.com/huggingface/safetensors, README "Format"): eight bytes of length, a JSON
// header, then the tensors' bytes without holes or overlaps. Everything that the library 0.8.0
// refuses is refused; of what it accepts, only a name that is there twice is.
#ifndef HOLDFAST_CONVERTER_SAFETENSORS_H_
#define HOLDFAST_CONVERTER_SAFETENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"

namespace holdfast::converter {

inline constexpr uint64_t kSafetensorsHeaderBytesMax = 100'000'000;

struct SafetensorsTensor {
  std::string name;   // any UTF-8, also empty or with NUL
  std::string dtype;  // as the file spells it: "F32"
  std::vector<uint64_t> shape;
  uint64_t offset_bytes = 0;  // in the file
  uint64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsTensor> tensors;  // in the order of their bytes
  bool has_metadata = false;
  std::vector<std::pair<std::string, std::string>> metadata;  // in the order of the header
};

// Whether the file begins as a safetensors file does: a length that it can hold, and `{` behind
// it, whitespace apart. Says nothing of the rest.
absl::StatusOr<bool> LooksLikeSafetensors(const ForeignFolder& folder, uint32_t file);

// Errors: kDataLoss that names file, tensor, expected and found; kResourceExhausted.
absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(const ForeignFolder& folder, uint32_t file);
// The same of a header's text, of a file of `file_bytes`; `name` begins every error.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string text, uint64_t file_bytes,
                                                         std::string_view name);

// "F32" -> kFloat32; nothing for F6_E2M3 and F6_E3M2, of which torch has no dtype either.
std::optional<Dtype> DtypeOfSafetensors(std::string_view name);
// The inverse; nothing for what the format cannot hold.
std::optional<std::string_view> SafetensorsDtype(Dtype dtype);

// Adds the tensor to the index as `state` of it, or to `unreadable`. The shape is torch's: two
// float4 are one element.
void AddSafetensor(const SafetensorsTensor& tensor, uint32_t file, std::string_view state,
                   ForeignIndex& index);

// One file on its own (FormatReader).
absl::StatusOr<bool> RecognizesSafetensors(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadSafetensors(const ForeignFolder& folder,
                                             const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SAFETENSORS_H_
