// Writes a checkpoint as Megatron-LM's torch_dist, with the optimizer's states in the form
// `fully_reshardable`: what megatron.core.dist_checkpointing.load reads into any layout.
//
//   latest_checkpointed_iteration.txt
//   iter_0000007/__0_<n>.distcp, .metadata, common.pt, metadata.json
//
// Keys are Megatron's: layers and experts of equal shape are axes of one tensor, each a chunk of
// its own, whole; norms of Megatron's own layers have TransformerEngine's names. Masters are
// `optimizer.state.param.<key>`; where the source has none they are the weights, in float32. What
// the source's Megatron files hold besides (args, schedulers, random and extra states) is written
// as it was. A source that is not Megatron's keeps its own names.
//
// Sources: megatron/core/transformer/transformer_block.py, moe/experts.py,
// dist_checkpointing/strategies/{common,torch}.py, optimizer/distrib_optimizer.py of 0.16.1.
#ifndef HOLDFAST_CONVERTER_MEGATRON_DIST_WRITER_H_
#define HOLDFAST_CONVERTER_MEGATRON_DIST_WRITER_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/dcp_writer.h"
#include "converter/torch_output.h"
#include "io/file_system.h"

namespace holdfast::converter {

struct MegatronDistPlan {
  std::string prefix;  // "iter_0000007/", of the names in `sharded`
  DcpPlan sharded;
  TorchFilesPlan others;  // common.pt and what announces the checkpoint
  uint64_t tensor_count = 0;

  uint64_t bytes() const { return sharded.bytes + others.bytes; }
};

// Errors: kFailedPrecondition that names what has no place: states that are none of a model or an
// optimizer, a state of another shape than its weights, steps that differ, a part of the experts, a
// tied output layer that is not the embedding. kDataLoss; those of reading. `config`: as for
// PlanMegatronLegacy, with its errors.
absl::StatusOr<MegatronDistPlan> PlanMegatronDist(ConversionSource& source,
                                                  const DcpWriteOptions& options,
                                                  const std::string& config);

// Writes all files of the plan below `directory`, which exists and has none of them. After OK they
// are durable; their names in `directory` itself are not.
absl::Status WriteMegatronDist(FileSystem& file_system, const std::string& directory,
                               ConversionSource& source, const MegatronDistPlan& plan,
                               const ConversionProgress& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_DIST_WRITER_H_
