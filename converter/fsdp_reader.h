// FSDP checkpoints that are torch files, one per rank or one of everything (converter/fsdp_files.h
// has their names), brought into a ForeignIndex. How the ranks' tensors belong together stands in
// the pickles: DTensor and ShardedTensor describe their whole (converter/sharded_value.h), plain
// tensors are replicas. Only FSDP1's flat parameters say nothing, and need ReadOptions::names
// (converter/names_file.h); without names they are kept as they are.
#ifndef HOLDFAST_CONVERTER_FSDP_READER_H_
#define HOLDFAST_CONVERTER_FSDP_READER_H_

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"

namespace holdfast::converter {

// See FormatReader.
absl::StatusOr<bool> RecognizesFsdp(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadFsdp(const ForeignFolder& folder, const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FSDP_READER_H_
