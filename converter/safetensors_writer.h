// Writes the weights of a checkpoint as a folder of Hugging Face's: safetensors in shards, with an
// index where there are several. Only tensors are written; what the format cannot hold is refused
// by name.
#ifndef HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_
#define HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/foreign_index.h"
#include "converter/output_files.h"
#include "io/file_system.h"

namespace holdfast::converter {

inline constexpr char kSafetensorsIndexName[] = "model.safetensors.index.json";

struct SafetensorsExportOptions {
  uint64_t shard_bytes = 5'000'000'000;  // of tensors, as transformers cuts by default
};

// One file to be written.
struct SafetensorsShard {
  std::string name;
  std::string header;            // with its length in front, padded
  std::vector<uint32_t> states;  // of the index, in the order of their bytes
  uint64_t bytes = 0;            // of the file
};

struct SafetensorsPlan {
  std::vector<SafetensorsShard> shards;
  std::string index_json;             // of several shards; else empty
  uint64_t bytes = 0;                 // of all files
  std::vector<std::string> left_out;  // what the format has no place for, in words
};

// Weights are states param, buffer, tensor, other and ema. Of tied weights one name is written, and
// __metadata__ has {dropped: kept}, as the library's save_model does.
// Errors: kFailedPrecondition that names what the format cannot hold (an optimizer's state, a
// dtype); two states of one tensor that are both weights.
absl::StatusOr<SafetensorsPlan> PlanSafetensors(const ForeignIndex& index,
                                                const SafetensorsExportOptions& options);

// Writes all files of the plan into `directory`, which exists and has none of them. `source` has
// the index of the plan. After OK they are durable; their names are not.
absl::Status WriteSafetensors(FileSystem& file_system, const std::string& directory,
                              ConversionSource& source, const SafetensorsPlan& plan,
                              const ConversionProgress& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_
