// Small Megatron checkpoints for tests, of any degrees of parallelism, with the truth beside them:
// written from Megatron's rules by straightforward loops that share nothing with the reader.
//
// Model: GPT with Megatron's own layers, weights in bfloat16 or float32, Adam with fp32 masters.
// Not modelled: TransformerEngine's modules, context parallelism, stages of other layouts than a
// first and a last one that differ from the rest.
#ifndef HOLDFAST_CONVERTER_MEGATRON_SAMPLE_H_
#define HOLDFAST_CONVERTER_MEGATRON_SAMPLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "converter/torch_sample.h"
#include "format/dtype.h"

namespace holdfast::converter {

struct MegatronSampleConfig {
  uint32_t tp = 1, pp = 1, vpp = 1, ep = 1, etp = 1, dp = 2;
  uint32_t layers_per_chunk = 1;
  std::optional<uint32_t> first = {}, last = {};  // layers of that stage, all chunks together
  uint32_t experts = 0;                           // 0: dense
  bool gated = true;
  bool tied = false;
  bool bias = false;
  Dtype weights = Dtype::kBfloat16;
  bool distributed = true;  // DistributedOptimizer
  std::optional<uint64_t> bucket = {};
  bool free_layout = false;  // args do not say how many layers a stage has
  uint64_t seed = 1;
};

class MegatronSample {
 public:
  explicit MegatronSample(const MegatronSampleConfig& config);

  uint64_t Layers() const { return FirstLayer(0, config_.vpp); }

  using Files = std::map<std::string, std::string>;  // by path
  Files Legacy() const;
  enum class Form { kReshardable, kShifted, kBuckets, kGathered };
  // torch_dist: states by parameter; the same as Megatron 0.15 to 0.19 damages them; buckets; or
  // whole buffers, each rank's in one object (dp_zero_gather_scatter).
  Files TorchDist(Form form) const;

  struct Truth {
    Dtype dtype;
    std::vector<uint64_t> shape;
    std::string bytes;
  };
  // By tensor and state, no more and no fewer. `legacy`: a tied embedding's copy is listed in any
  // case where it is one.
  std::map<std::pair<std::string, std::string>, Truth> Expected() const;

 private:
  enum class Cut { kWhole, kRows, kColumns, kHalves };
  struct Parameter {
    std::string name;
    std::string key;  // of torch_dist, without layer and expert
    std::optional<uint32_t> layer;
    std::optional<uint32_t> expert;
    Cut cut;
    std::vector<uint64_t> shape;
    std::map<std::string, std::vector<float>> states;  // fp32, exp_avg, exp_avg_sq
    bool shared = false;                               // a tied embedding, or its copy
  };
  // A parameter as a rank has it.
  struct Local {
    const Parameter* parameter;
    std::string name;  // layers and experts numbered locally
    uint32_t rank, ranks;
    std::vector<uint64_t> shape;
  };
  struct Layout {
    std::vector<uint64_t> begins;    // by Local in the order of the model
    std::vector<uint64_t> paddings;  // before its bucket
    std::vector<uint64_t> bucket_begins, bucket_ends, bucket_padded_ends;
    uint64_t padded = 0;
    uint64_t unpadded = 0;
  };

  void Add(std::string name, Cut cut, std::vector<uint64_t> shape, std::optional<uint32_t> layer,
           std::optional<uint32_t> expert);
  std::string Bytes(const std::vector<float>& values, Dtype dtype) const;
  static std::vector<float> Part(const std::vector<float>& values,
                                 const std::vector<uint64_t>& shape, Cut cut, uint32_t rank,
                                 uint32_t ranks);
  // Model order. `experts`: only those, or only the others, where experts have their own buffers.
  std::vector<Local> Locals(uint32_t stage, uint32_t chunk, uint32_t tensor, uint32_t expert_rank,
                            std::optional<bool> experts) const;
  Layout LayOut(const std::vector<Local>& locals, uint32_t stage, uint32_t chunk,
                bool experts) const;
  std::vector<float> Buffer(const std::vector<Local>& locals, const Layout& layout,
                            const std::string& state) const;
  static std::vector<float> WithoutPadding(const std::vector<float>& buffer, const Layout& layout);
  uint32_t LayersOf(uint32_t stage) const;  // in each of its chunks
  // Of a chunk of a stage; of one beyond the last: of all.
  uint32_t FirstLayer(uint32_t stage, uint32_t chunk) const;

  void Arguments(PickleWriter& pickle) const;
  void Groups(PickleWriter& pickle, bool experts,
              const std::vector<std::vector<int64_t>>* ids) const;
  std::string ModelFile(uint32_t stage, uint32_t tensor, uint32_t expert) const;
  enum class Dense { kHere, kElsewhere };  // states of the dense parameters
  std::string OptimizerFile(uint32_t stage, uint32_t tensor, uint32_t expert, Dense dense) const;
  // What one optimizer of a rank gathers: `experts` as for Locals.
  void Gathered(TorchSample& torch, uint32_t stage, uint32_t tensor, uint32_t expert,
                std::optional<bool> experts) const;
  void OrdinaryOptimizer(TorchSample& torch, const std::vector<Local>& locals, bool experts) const;
  std::string CommonFile(Form form) const;

  MegatronSampleConfig config_;
  std::vector<Parameter> parameters_;  // in the order of the model
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_SAMPLE_H_
