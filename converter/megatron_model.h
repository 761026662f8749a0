// The model of a legacy Megatron checkpoint: from the `model_optim_rng.pt` of all model-parallel
// ranks, global names (layers are numbered by each stage, experts by each rank), shards of every
// parameter, and the weights as tensor states. The optimizer is converter/megatron_optimizer.h's.
#ifndef HOLDFAST_CONVERTER_MEGATRON_MODEL_H_
#define HOLDFAST_CONVERTER_MEGATRON_MODEL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/megatron_files.h"
#include "converter/megatron_layout.h"
#include "converter/piece_table.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

struct MegatronTensor {
  std::string local;  // as the file has it
  std::string global;
  uint32_t chunk = 0;  // of the virtual pipeline
  bool expert = false;
  bool buffer = false;
  StoredTensor stored;
};

// What a module has stored beside its tensors (`..._extra_state`), whatever it is: it may be None.
struct MegatronExtra {
  std::string local;
  std::string global;
  uint32_t chunk = 0;
  TorchValue value;
};

struct MegatronRank {
  const MegatronRankFiles* files = nullptr;
  uint32_t tensor = 0;
  uint32_t stage = 0;
  uint32_t expert = 0;
  std::unique_ptr<TorchFile> torch = nullptr;
  std::vector<MegatronTensor> tensors = {};  // in the order of the model
  std::vector<MegatronExtra> extras = {};
};

// Threads: one. Lifetime: folder, files and table outlive it.
class MegatronModel {
 public:
  // Opens every rank's file. Errors: kDataLoss (a rank is missing; files contradict each other),
  // kPermissionDenied, kUnimplemented and kResourceExhausted of the files.
  static absl::StatusOr<std::unique_ptr<MegatronModel>> Read(const ForeignFolder& folder,
                                                             const MegatronFiles& files,
                                                             PieceTable& table);

  const MegatronArguments& arguments() const { return arguments_; }
  const std::vector<MegatronRank>& ranks() const { return ranks_; }

  // What a file itself says of a parameter's cut: it counts more than the rules of names. Before
  // AddWeights.
  void Tell(const std::string& global, const MegatronCut& cut) { told_[global] = cut; }
  // State `param` (or `buffer`) of everything. A parameter of which nobody says how it was cut is
  // `unreadable`. Errors: kDataLoss (a rank lacks a parameter; shapes contradict the rule).
  absl::Status AddWeights();
  // The part of the parameter that this rank holds; null if it is unreadable. After AddWeights.
  const ShardMap* ShardOf(const MegatronTensor& tensor, const MegatronRank& rank) const;

 private:
  explicit MegatronModel(PieceTable& table) : table_(table) {}

  absl::Status PlaceRanks();
  absl::Status CheckComplete() const;
  absl::Status CollectTensors(MegatronRank& rank);
  absl::Status NameGlobally();
  absl::Status ResolveShards();
  absl::StatusOr<std::optional<MegatronCut>> CutOf(const std::string& global) const;
  // The rank among those that cut this tensor.
  uint32_t ShardRank(bool expert, uint32_t tensor_rank) const;

  PieceTable& table_;
  MegatronArguments arguments_;
  bool old_attention_ = false;  // checkpoint_version < 2: queries, keys and values in other orders
  uint32_t tensor_ranks_ = 1;
  uint32_t expert_tensor_ranks_ = 1;
  uint32_t expert_ranks_ = 1;
  std::vector<MegatronRank> ranks_;
  std::map<std::string, MegatronCut> told_;
  std::map<std::string, std::map<uint32_t, Shape>> shapes_;  // by global name and shard rank
  std::map<std::string, std::vector<ShardMap>> shards_;      // empty: unreadable
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_MODEL_H_
