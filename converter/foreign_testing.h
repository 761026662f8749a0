// For tests: checkpoints opened and read back.
#ifndef HOLDFAST_CONVERTER_FOREIGN_TESTING_H_
#define HOLDFAST_CONVERTER_FOREIGN_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/sha256.h"
#include "base/status_macros.h"
#include "converter/foreign_folder.h"
#include "converter/format_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {

struct Opened {
  std::unique_ptr<ForeignFolder> folder;
  ForeignIndex index;
};

// kNotFound: no reader knows it.
inline absl::StatusOr<Opened> OpenCheckpoint(FileSystem& file_system, const std::string& path) {
  Opened opened;
  ASSIGN_OR_RETURN(opened.folder, ForeignFolder::Open(file_system, path));
  ASSIGN_OR_RETURN(const FormatReader* const reader, RecognizeFormat(*opened.folder));
  if (reader == nullptr) return absl::NotFoundError("no reader knows it");
  ASSIGN_OR_RETURN(opened.index, ReadFormat(*reader, *opened.folder, {}));
  return opened;
}

// Of the bytes of one tensor state, in hexadecimal. `reader`: a WholeTensorReader, or a
// ConversionSource.
template <typename Reader>
absl::StatusOr<std::string> Sha256Of(Reader& reader, uint32_t tensor_state) {
  Sha256 hash;
  RETURN_IF_ERROR(reader.Read(tensor_state, [&](std::span<const std::byte> bytes) {
    hash.Add(bytes);
    return absl::OkStatus();
  }));
  return Hex(hash.Finish());
}

// Dtype, shape and SHA-256 of one tensor state.
template <typename Reader>
std::string RecordOf(Reader& reader, const ForeignIndex& index, uint32_t tensor_state) {
  const TensorState& state = index.tensor_states[tensor_state];
  const absl::StatusOr<std::string> sha256 = Sha256Of(reader, tensor_state);
  EXPECT_THAT(sha256, IsOk()) << Describe(state);
  return std::string(DtypeName(state.dtype)) + " " + testing::PrintToString(state.shape) + " " +
         (sha256.ok() ? *sha256 : "");
}

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FOREIGN_TESTING_H_
