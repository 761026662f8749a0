// Folders of Hugging Face's transformers: config.json, and the weights in one file or in shards
// with an index, as safetensors or as torch files (`.bin`, of older releases).
#ifndef HOLDFAST_CONVERTER_HF_H_
#define HOLDFAST_CONVERTER_HF_H_

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"

namespace holdfast::converter {

// See FormatReader. A folder with an index of shards, or with config.json (adapter_config.json) and
// a file of weights beside it. Where there are both kinds of weights, safetensors are read and a
// note names what was not.
absl::StatusOr<bool> RecognizesHf(const ForeignFolder& folder);
// A shard that the index names and that is not there, and a tensor that is not in its shard, are
// losses: the rest is read.
absl::StatusOr<ForeignIndex> ReadHf(const ForeignFolder& folder, const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_HF_H_
