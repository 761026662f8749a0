// What frameworks leave in the memory of every rank, dealt out element by element.
//
// Model: the published rules of DeepSpeed, PyTorch and Megatron-LM on arrays whose elements know
// where they come from, by the few operations of torch in which those rules are written (chunk,
// split, cat, narrow, permute, view). Nothing here knows of layout documents, or uses their code:
// it is the second opinion on what a document means. Slow: every element is an object. Not
// modelled: values; files.
#ifndef HOLDFAST_FORMAT_FRAMEWORK_SIMULATORS_H_
#define HOLDFAST_FORMAT_FRAMEWORK_SIMULATORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace holdfast::frameworks {

// An element, by its row-major number in its tensor; padding if there is no tensor.
struct Cell {
  std::string tensor;
  uint64_t element = 0;

  friend bool operator==(const Cell&, const Cell&) = default;
};

using Shape = std::vector<uint64_t>;

uint64_t Numel(const Shape& shape);

struct Named {
  std::string name;
  Shape shape;
};

// Row-major.
struct Array {
  Shape shape;
  std::vector<Cell> cells;
};

Array Whole(const Named& tensor);
std::vector<Array> WholeOfEach(const std::vector<Named>& tensors);

// As torch's functions of these names.
Array Reshape(const Array& array, const Shape& shape);
Array Flatten(const Array& array);
Array Permute(const Array& array, const std::vector<size_t>& dims);
Array Narrow(const Array& array, size_t dim, uint64_t start, uint64_t count);
Array Cat(const std::vector<Array>& arrays, size_t dim);
std::vector<Array> Split(const Array& array, const std::vector<uint64_t>& sizes, size_t dim);
// Chunks of ceil(n / count), the last ones short or empty: always `count` of them.
std::vector<Array> Chunk(const Array& array, uint64_t count, size_t dim);
// Padding behind dimension `dim`, up to `size`.
Array PadTo(const Array& array, size_t dim, uint64_t size);

// The memory of all ranks.
struct Buffer {
  std::string state;
  std::vector<Cell> cells;
};

struct World {
  explicit World(uint64_t rank_count) : ranks(rank_count) {}

  // Appends the array, row-major, to a buffer.
  void Put(uint64_t rank, const std::string& buffer, const std::string& state, const Array& array);
  // To the buffer that a tensor has for itself: "STATE/NAME".
  void PutAlone(uint64_t rank, const std::string& state, const std::string& tensor,
                const Array& array);

  std::vector<std::map<std::string, Buffer>> ranks;
};

// ---- DeepSpeed ----

struct ZeroFlatRule {
  bool round_robin = false;         // round_robin_gradients
  uint64_t alignment_elements = 1;  // parameter_alignment: every parameter starts at a multiple
};

// ZeRO-1 and -2 (runtime/zero/stage_1_and_2.py): the flat buffer of a parameter group.
std::vector<Cell> ZeroFlatGroup(const std::vector<Array>& group, uint64_t dp,
                                const ZeroFlatRule& rule);
// Its partitions, one per rank, padding included.
std::vector<Array> ZeroPartitions(const std::vector<Array>& group, uint64_t dp,
                                  const ZeroFlatRule& rule);

// ZeRO-3 (runtime/zero/stage3.py): of each rank its flat tensor of every sub-group.
std::vector<std::vector<Array>> Zero3SubGroups(const std::vector<Array>& parameters, uint64_t dp,
                                               uint64_t sub_group_size);

// Muon keeps whole parameters: those that touch the rank's partition of the flat group, one behind
// the other, without padding.
std::vector<Array> MuonMomentum(const std::vector<Array>& group, uint64_t dp);

// ---- PyTorch ----

// FSDP1: the shards of the flat parameter of a unit, padding included.
std::vector<Array> Fsdp1Shards(const std::vector<Array>& unit, uint64_t world, bool use_orig_params,
                               uint64_t element_bytes);

// What coordinate `coordinate` of `count` keeps under _StridedShard(dim, split_factor): of each of
// the split_factor chunks its own chunk.
Array StridedShard(const Array& array, size_t dim, uint64_t split_factor, uint64_t count,
                   uint64_t coordinate);

// RaggedShard: the array, flat, in units of equal size, of which every rank takes as many as is
// listed.
std::vector<Array> RaggedShards(const Array& array, const std::vector<uint64_t>& local_units);

// ---- Megatron-LM ----

struct MegatronParameter {
  std::string name;
  Array local;
  bool shared_embedding = false;
};

struct MegatronBufferRule {
  uint64_t dp = 1;
  uint64_t bucket_size = 0;  // elements; 0: one bucket (without overlap_grad_reduce)
  bool pad_for_high_nccl_busbw = false;
};

struct MegatronBucket {
  std::vector<std::string> names;  // of its parameters, in order
  std::vector<Cell> cells;         // padding included; each of the dp ranks owns an equal part
};

// distrib_optimizer.py _compute_per_buffer_param_layout; parameters in the module's order.
std::vector<MegatronBucket> MegatronBuckets(const std::vector<MegatronParameter>& parameters,
                                            const MegatronBufferRule& rule);
Array MegatronShard(const MegatronBucket& bucket, uint64_t dp, uint64_t dp_rank);

// The layers of each stage, in the order of its chunks (interleaved 1F1B; vpp 1: one chunk).
std::vector<std::vector<uint64_t>> MegatronStages(uint64_t layers, uint64_t pp, uint64_t vpp);

// The tensor-parallel part of a vocabulary: padded to a multiple of divisible_by * tp.
Array MegatronVocabulary(const Array& embedding, uint64_t divisible_by, uint64_t tp, uint64_t rank);

// ---- The language of universal checkpoints, and affine maps ----

// Restores what `tp` ranks have of a parameter that consists of sub-parameters, of these widths
// along dim: a chunk of each.
Array UcpSubParameters(const Array& full, size_t dim, const std::vector<uint64_t>& widths,
                       uint64_t tp, uint64_t rank);
// The same with sub_param_shard_widths: of each sub-parameter the width on each rank.
Array UcpShardWidths(const Array& full, size_t dim,
                     const std::vector<std::vector<uint64_t>>& widths, uint64_t rank);

struct AffinePiece {
  Shape shape;
  uint64_t source = 0;  // offset and strides in the full tensor, in elements
  Shape source_strides;
  uint64_t dest = 0;  // in the rank's shard
  Shape dest_strides;
  std::vector<uint64_t> locations;  // ranks that hold the block
};

// The shard that these pieces fill: as_strided on both sides.
Array AffineShard(const Array& full, const Shape& shard_shape,
                  const std::vector<AffinePiece>& pieces);

}  // namespace holdfast::frameworks

#endif  // HOLDFAST_FORMAT_FRAMEWORK_SIMULATORS_H_
