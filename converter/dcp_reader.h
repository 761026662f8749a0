// torch.distributed.checkpoint (DCP) folders, brought into a ForeignIndex:
//
//   .metadata and __<rank>_<n>.distcp   dcp.save; each item of a file is a torch file of its own
//   __<rank>.metadata                   dcp.save(use_collectives=False): every rank knows its own
//   shard-*.safetensors                 HuggingFaceStorageWriter(save_distributed=True)
//   pytorch_model_fsdp_0/, optimizer_0/ accelerate: a DCP folder each, together one checkpoint
//   <anything>-<step>/                  several checkpoints of one run; ReadOptions::tag chooses
//
// Names of tensors and states come from the keys (converter/state_names.h). Objects that are no
// tensors are kept byte for byte, and shown where they are plain.
#ifndef HOLDFAST_CONVERTER_DCP_READER_H_
#define HOLDFAST_CONVERTER_DCP_READER_H_

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"

namespace holdfast::converter {

// See FormatReader. A chunk whose file is missing is left out and noted: which tensors have holes
// is for verify to say. kPermissionDenied: an item that leads out of the folder.
absl::StatusOr<bool> RecognizesDcp(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadDcp(const ForeignFolder& folder, const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_READER_H_
