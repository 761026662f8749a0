// What a DeepSpeed checkpoint says of its tensor and pipeline parallelism, as facts of a
// ForeignIndex (its scalars): so that a conversion can cut the same model again, for other degrees.
// The reader puts them there (converter/deepspeed_model.h), the writer takes them
// (converter/deepspeed_ranks.h). Both speak of the names of the source.
#ifndef HOLDFAST_CONVERTER_PARALLEL_FACTS_H_
#define HOLDFAST_CONVERTER_PARALLEL_FACTS_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/layout_file.h"
#include "converter/parallel_rules.h"

namespace holdfast::converter {

// In DeepSpeed's own words, without what holds for one number of ranks only (affine maps, widths).
inline constexpr char kParallelInfoFact[] = "universal_checkpoint_info";
// {"stages": [0, 4], "tied": {"embed": {"layers": [0], "stages": [0, 1]}}}
inline constexpr char kPipelineFact[] = "pipeline_layers";

// Of a pipeline that was read.
struct PipelineFacts {
  std::vector<uint64_t> first_layers;  // of every stage, ascending; empty: not known
  struct Tied {
    std::vector<uint64_t> layers;  // that have a file of it: not all that use it
    std::vector<uint64_t> stages;  // that hold it
  };
  std::map<std::string, Tied> tied;  // by key
};

void AddParallelFact(const ParallelInfo& info, ForeignIndex& index);
void AddPipelineFact(const PipelineFacts& facts, ForeignIndex& index);

// What the index says; nothing where it says nothing. kFailedPrecondition: a fact that is none.
absl::StatusOr<ParallelInfo> ParallelInfoOf(const ForeignIndex& index);
absl::StatusOr<PipelineFacts> PipelineFactsOf(const ForeignIndex& index);

// What counts of a model that is written: the rules of the layout file, then what the source said
// of itself, else the preset. Errors: those of all three.
absl::StatusOr<ParallelInfo> ParallelInfoToWrite(const ForeignIndex& index,
                                                 const std::string& preset,
                                                 const LayoutFile& layout);

// To be called when tensors get other names.
void ForgetParallelFacts(ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_PARALLEL_FACTS_H_
