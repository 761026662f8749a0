// What HuggingFaceStorageWriter(save_distributed=True) of torch.distributed.checkpoint leaves:
// safetensors files, per rank and numbered, each of which holds boxes of tensors. There is no file
// that describes the whole. Where a box lies stands in the header of its file, as JSON in
// `__metadata__`: "DCP_SHARDING_INFO": {name: {"saved_offsets": [...]}}; how large the tensor is
// follows from its boxes. Source: torch/distributed/checkpoint/{hf_storage,_hf_utils}.py of 2.13.
#ifndef HOLDFAST_CONVERTER_DCP_SHARDS_H_
#define HOLDFAST_CONVERTER_DCP_SHARDS_H_

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {

// Whether the folder is of such files.
bool HoldsDcpShards(const ForeignFolder& folder);
// Errors: those of FormatReader::read.
absl::StatusOr<ForeignIndex> ReadDcpShards(const ForeignFolder& folder);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_SHARDS_H_
