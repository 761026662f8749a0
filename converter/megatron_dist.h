// What a torch_dist or fsdp_dtensor checkpoint of Megatron holds, tensor by tensor: the keys of its
// `.metadata` taken apart into parameters and states of the optimizer, with every chunk that is
// stored of them; and the anonymous buckets of `dp_reshardable`. Putting buckets and damaged states
// together is converter/megatron_dist_optimizer.cc's.
#ifndef HOLDFAST_CONVERTER_MEGATRON_DIST_H_
#define HOLDFAST_CONVERTER_MEGATRON_DIST_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/megatron_buffers.h"
#include "converter/megatron_layout.h"
#include "converter/piece_table.h"

namespace holdfast::converter {

// A box of a tensor, or elements [begin, begin + those of `stored`) of the box in row-major order.
struct MegatronFragment {
  Shape lo;
  Shape size;
  uint64_t begin = 0;
  StoredTensor stored;
};

struct MegatronDistTensor {
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  std::vector<MegatronFragment> fragments = {};
};

// A flat buffer of DistributedOptimizer: of one optimizer, model-parallel rank, and number.
struct MegatronBufferKey {
  uint32_t optimizer = 0;  // of a ChainedOptimizer
  uint32_t rank = 0;       // model-parallel rank of the group
  uint32_t buffer = 0;
  auto operator<=>(const MegatronBufferKey&) const = default;
};
struct MegatronBucket {
  uint64_t elements = 0;
  bool coalesced = false;                        // all buckets of the buffer, one behind the other
  std::map<std::string, FlatParts> states = {};  // by key: "param", "exp_avg", ...
};

struct MegatronDist {
  MegatronArguments arguments;
  // By name. Weights and buffers of the model; states of the optimizer by (name, state).
  std::map<std::string, MegatronDistTensor> weights;
  std::map<std::pair<std::string, std::string>, MegatronDistTensor> states;
  std::map<MegatronBufferKey, std::map<uint32_t, MegatronBucket>> buffers;  // and by bucket
  std::set<uint32_t> expert_optimizers;  // numbers of those whose groups are of experts
  std::optional<StoredTensor> step;      // of dense parameters, and of experts
  std::optional<StoredTensor> expert_step;
  std::vector<std::string> names;  // of --names: the model's parameters, in its order
};

// What of a checkpoint's optimizer one model-parallel rank has. Threads: one. Lifetime: all
// arguments outlive it.
class MegatronDistOptimizer {
 public:
  MegatronDistOptimizer(const ForeignFolder& folder, MegatronDist& dist, PieceTable& table)
      : folder_(folder), dist_(dist), table_(table) {}

  // Adds states from the buckets of `dp_reshardable`, or the buffers of `dp_zero_gather_scatter`:
  // named by the order of the model's parameters, proven by the buckets' sizes and the weights.
  // What is not proven is `unreadable`.
  absl::Status AddBuckets();
  // megatron-core 0.15 to 0.19 cuts the states of `fully_reshardable` out of an array without the
  // padding of buckets by offsets that count it (Megatron-LM#5077). Where masters, rounded, are not
  // the weights, the array is put together again, and cut as it should have been: those states
  // leave dist.states. What no state of the file has is a loss.
  absl::Status MendShiftedStates();

 private:
  // A parameter as a rank has it.
  struct Local {
    std::string name;
    std::string weights;  // name of its weights: another one for a tied embedding
    ShardMap shard;
    FlatParts values;
    bool shared_embedding = false;
  };
  struct LocalBuffer {
    uint32_t chunk = 0;              // of the virtual pipeline
    std::vector<Local> locals = {};  // in the order of the buffer
  };
  struct Place {
    bool expert = false;
    uint32_t stage = 0;
    uint32_t tensor = 0;  // among those that cut it
    uint32_t expert_rank = 0;
  };

  absl::StatusOr<std::vector<LocalBuffer>> BuffersOf(const Place& place, bool experts_apart) const;
  std::vector<std::string> NamesOf(const Place& place, uint32_t chunk, bool experts_apart,
                                   const std::vector<uint64_t>& layers) const;
  // Layers of each chunk and stage (megatron_layout.h): what the arguments say, or, if they do not,
  // what the buckets have room for.
  absl::StatusOr<std::vector<uint64_t>> Layers(bool experts_apart) const;
  std::optional<std::vector<uint64_t>> FittedLayers(uint64_t layer_count, bool experts_apart) const;
  absl::StatusOr<Local> LocalOf(const std::string& name, const std::string& weights,
                                const Place& place) const;
  absl::StatusOr<ShardMap> ShardOf(const std::string& name, const MegatronDistTensor& tensor,
                                   uint32_t rank, uint32_t ranks) const;
  static FlatParts ValuesOf(const MegatronDistTensor& tensor, const ShardMap& shard);
  uint32_t TensorRanks(bool expert) const;
  Place PlaceOf(uint32_t rank, bool expert) const;

  absl::Status AddRankBuckets(const Place& place, const std::vector<MegatronBufferKey>& keys,
                              bool experts_apart);
  // Of these those whose masters are in the buckets, in this order.
  absl::StatusOr<std::vector<Local>> TrainedOf(
      const std::vector<Local>& locals, const std::map<uint32_t, MegatronBucket>& buckets) const;
  absl::Status AddBuffer(const std::vector<Local>& locals, const BufferRule& rule,
                         const std::map<uint32_t, MegatronBucket>& buckets);
  static absl::StatusOr<BufferLayout> LayoutOf(const std::vector<BufferParameter>& parameters,
                                               const BufferRule& rule,
                                               const std::vector<const MegatronBucket*>& buckets);
  // By the arguments, for the buffers of a model chunk.
  BufferRule RuleOf(const Place& place, uint32_t chunk) const;

  struct Mended {
    ShardMap shard;
    std::shared_ptr<const FlatParts> parts;  // of the whole buffer
    uint64_t begin = 0;
    uint64_t count = 0;
  };
  absl::Status MendRank(const Place& place, bool experts_apart);
  absl::Status MendBuffer(const std::vector<Local>& locals, const BufferLayout& layout);
  absl::Status AddMended();

  const ForeignFolder& folder_;
  MegatronDist& dist_;
  PieceTable& table_;
  std::map<std::pair<std::string, std::string>, std::vector<Mended>> mended_;
  std::set<std::string> mended_names_;
  mutable std::optional<std::vector<uint64_t>> layers_;  // once they are known
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_DIST_H_
