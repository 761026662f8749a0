// Megatron-LM checkpoints, brought into a ForeignIndex: legacy folders (a file per model-parallel
// rank), torch_dist and fsdp_dtensor ones (DCP files with Megatron's keys). Names are those of the
// model's modules, layers and experts numbered globally; docs/CONVERTER_MEGATRON.md says what
// becomes of what.
//
// A torch_dist folder is a DCP folder too: this reader stands before converter/dcp_reader.h.
#ifndef HOLDFAST_CONVERTER_MEGATRON_READER_H_
#define HOLDFAST_CONVERTER_MEGATRON_READER_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"
#include "converter/megatron_files.h"
#include "converter/megatron_layout.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// See FormatReader.
absl::StatusOr<bool> RecognizesMegatron(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadMegatron(const ForeignFolder& folder, const ReadOptions& options);

// The two kinds of folders.
absl::StatusOr<ForeignIndex> ReadMegatronLegacy(const ForeignFolder& folder,
                                                const MegatronFiles& files,
                                                const ReadOptions& options);
absl::StatusOr<ForeignIndex> ReadMegatronDist(const ForeignFolder& folder,
                                              const MegatronFiles& files,
                                              const ReadOptions& options);

// What both say of the checkpoint as a whole: the degrees of parallelism (layout), the iteration,
// and what a file's dict holds beside tensors (scalars).
void DescribeMegatron(const MegatronFiles& files, const MegatronArguments& arguments,
                      ForeignIndex& index);
absl::Status AddMegatronFacts(const TorchValue& root, ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_READER_H_
