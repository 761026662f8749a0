// The model of a DeepSpeed checkpoint: from the model-state files of all model-parallel ranks, the
// names, shapes and shards of every parameter, and the weights and buffers as tensor states. Native
// checkpoints and universal folders share it: both have these files.
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_MODEL_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_MODEL_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/deepspeed_files.h"
#include "converter/deepspeed_states.h"
#include "converter/format_reader.h"
#include "converter/piece_table.h"

namespace holdfast::converter {

// `<prefix>deepspeed_experts.<number>.<suffix>`: files number experts per rank, or globally.
struct ExpertName {
  std::string_view prefix;
  uint64_t number = 0;
  std::string_view suffix;
};
std::optional<ExpertName> ParseExpertName(std::string_view name);
inline constexpr uint64_t kExpertsMax = 1'000'000;  // of one layer

// Threads: one. Lifetime: folder and files outlive it.
class DeepSpeedModel {
 public:
  // Reads all model-state files (of ZeRO-3 those of data-parallel rank 0) and finds the degrees of
  // pipeline and tensor parallelism. Errors: kDataLoss (a rank is missing; files contradict each
  // other), those of the files and of ParallelRules.
  static absl::StatusOr<DeepSpeedModel> Read(const ForeignFolder& folder,
                                             const DeepSpeedFiles& files,
                                             const ReadOptions& options, PieceTable& table);

  uint32_t tensor_ranks() const { return tensor_ranks_; }
  uint32_t pipeline_ranks() const { return pipeline_ranks_; }
  uint32_t ranks() const { return static_cast<uint32_t>(states_.size()); }  // model parallel
  uint32_t TensorRank(uint32_t mp) const { return mp % tensor_ranks_; }
  const ModelStates& states(uint32_t mp) const { return states_[mp]; }
  // Of this rank's `module`, by name.
  const std::map<std::string_view, const StoredTensor*>& module(uint32_t mp) const {
    return modules_[mp];
  }
  // Weights are not in the model files: placeholders stand there (ZeRO-3).
  bool partitioned() const { return partitioned_; }

  // The shard of a parameter on model-parallel rank mp. Errors: those of ParallelRules; kDataLoss
  // (another tensor-parallel rank does not have it; several pipeline stages do, and nothing says
  // that they share it).
  absl::StatusOr<const ShardMap*> Shard(const std::string& parameter, uint32_t mp);
  // The same of an expert's parameter by its local name on this rank.
  absl::StatusOr<const ShardMap*> ExpertShard(const std::string& local, const std::string& global,
                                              uint32_t mp);
  // So many expert-parallel ranks share the flat buffers of the group: what NameParameterGroups
  // goes by. Of groups that nobody says it of, the files of experts tell.
  void SetExpertRanks(uint32_t mp, size_t group, uint64_t expert_ranks);
  // The global name of an expert's parameter on a rank of its expert-parallel group.
  std::string GlobalExpertName(const std::string& local, uint32_t mp, uint32_t expert_rank) const;

  // The dtype in which the model holds its weights: of this parameter, or in general.
  std::optional<Dtype> WeightDtype(const std::string& parameter) const;
  // The name itself, and those that share its tensor.
  std::vector<std::string> NamesOf(const std::string& owner) const;
  // Whether the optimizer owns it: its name is in param_shapes.
  bool IsOptimized(std::string_view parameter) const { return optimized_.contains(parameter); }

  // Weights and buffers as the files have them: states `param` and `buffer`. Of ZeRO-3 only
  // buffers and frozen parameters: the rest is in the optimizer's files. Files of layers and of
  // experts that are not there are losses, or where masters have their weights repairs.
  absl::Status AddWeights();
  // State `param` of a parameter (and its aliases) of which only the master weights, state `fp32`,
  // are in the files: those, rounded to the model's dtype. Nothing where it is there already, or
  // where nothing says what that dtype is.
  absl::Status AddRoundedWeights(const std::string& parameter);
  // Aliases, once the states of their owners are there.
  void AddAliases();
  // Puts the names of the optimizer's parameters, in its own order, into the fact "param_groups",
  // where DeepSpeed has the numbers of flat buffers. Best effort: what has been cut stays as it is.
  void NameParameterGroups();

 private:
  DeepSpeedModel(const ForeignFolder& folder, const DeepSpeedFiles& files, PieceTable& table)
      : folder_(folder), files_(files), table_(table) {}

  // What only some tensor-parallel ranks of this model have.
  absl::Status NotEverywhere(const std::string& name) const;
  absl::Status FindDegrees();
  absl::Status CollectShapes();
  absl::Status AddModule(uint32_t mp);
  void NameMissingLayers(const std::set<std::string>& found_tied);
  absl::Status AddLayers();
  absl::Status CheckExpertFiles() const;
  void NameMissingExperts();
  void NameMissingExpertOptimizers();
  absl::Status AddExperts();
  // How many ranks share the experts of this parameter; 1 of what is none.
  uint64_t ExpertRanks(std::string_view local, uint32_t mp, size_t group) const;
  absl::Status AddFrozenFragments();
  void AddParallelFacts(const ParallelInfo& told);
  void AddPipelineFacts();
  std::string OwnerOf(const std::string& name) const;
  bool IsPlaceholder(const std::string& name) const;

  const ForeignFolder& folder_;
  const DeepSpeedFiles& files_;
  PieceTable& table_;
  std::vector<ModelStates> states_;  // by mp
  std::vector<std::map<std::string_view, const StoredTensor*>> modules_;
  uint32_t tensor_ranks_ = 1;
  uint32_t pipeline_ranks_ = 1;
  bool partitioned_ = false;
  std::optional<ParallelRules> rules_;
  // Of every parameter, by pipeline stage and name: shard shapes by tensor-parallel rank.
  std::map<std::string, std::map<uint32_t, std::vector<std::optional<Shape>>>> shapes_;
  std::map<std::pair<std::string, uint32_t>, std::vector<ShardMap>> shards_;  // by name and stage
  std::map<std::string, Dtype> dtypes_;
  std::map<std::string, std::string> owners_;                // by alias
  std::map<std::string, std::vector<std::string>> aliases_;  // by owner
  std::set<std::string, std::less<>> buffers_;
  std::set<std::string, std::less<>> optimized_;
  std::map<std::string, std::vector<uint64_t>> tied_layers_;        // that have files, by key
  std::map<std::string, std::set<uint64_t>, std::less<>> experts_;  // that have files, by prefix
  std::map<std::pair<uint32_t, size_t>, uint64_t> expert_ranks_;    // by mp and group
  // Local experts of every prefix, by mp.
  std::vector<std::map<std::string, uint64_t, std::less<>>> local_experts_;
};

// Readers of converter/formats.cc.
absl::StatusOr<bool> RecognizesDeepSpeed(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadDeepSpeed(const ForeignFolder& folder, const ReadOptions& options);
absl::StatusOr<ForeignIndex> ReadUniversalFiles(const ForeignFolder& folder,
                                                const DeepSpeedFiles& files,
                                                const ReadOptions& options);
absl::StatusOr<bool> RecognizesUniversal(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadUniversal(const ForeignFolder& folder, const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_MODEL_H_
