// Writes the weights of a checkpoint as a folder of Hugging Face's: safetensors in shards, with an
// index where there are several. Only tensors are written; what the format cannot hold is refused
// by name, or dropped where the caller says so.
#ifndef HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_
#define HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "io/file_system.h"

namespace holdfast::converter {

inline constexpr char kSafetensorsIndexName[] = "model.safetensors.index.json";

struct SafetensorsExportOptions {
  uint64_t shard_bytes = 5'000'000'000;  // of tensors, as transformers cuts by default
  // States that are left out, besides those of weights being the only ones that are written:
  // "exp_avg", "fp32". "*": all that are no weights.
  std::vector<std::string> drop_states;
  bool drop_unreadable = false;
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
  std::vector<std::string> left_out;  // what was dropped, in words
};

// Weights are states param, buffer, tensor, other and ema. Of tied weights one name is written, and
// __metadata__ has {dropped: kept}, as the library's save_model does.
// Errors: kFailedPrecondition that names what the format cannot hold, or what would be lost (an
// optimizer's state, an unreadable tensor) without being dropped; two states of one tensor that are
// both weights.
absl::StatusOr<SafetensorsPlan> PlanSafetensors(const ForeignIndex& index,
                                                const SafetensorsExportOptions& options);

// Writes all files of the plan into `directory`, which exists and has none of them. After OK they
// are durable; their names are not. `progress` is called now and then with bytes written and bytes
// in all; false stops: kCancelled.
absl::Status WriteSafetensors(FileSystem& file_system, const std::string& directory,
                              const ForeignFolder& folder, const ForeignIndex& index,
                              const SafetensorsPlan& plan,
                              const std::function<bool(uint64_t, uint64_t)>& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SAFETENSORS_WRITER_H_
