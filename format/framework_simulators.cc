#include "format/framework_simulators.h"

#include <algorithm>
#include <numeric>

namespace holdfast::frameworks {
namespace {

constexpr uint64_t kNothing = UINT64_MAX;  // instead of an index: padding

uint64_t CeilDiv(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// What lies at these indices of a dimension.
Array Select(const Array& array, size_t dim, const std::vector<uint64_t>& indices) {
  uint64_t outer = 1;
  uint64_t inner = 1;
  for (size_t d = 0; d < array.shape.size(); ++d) {
    if (d < dim) outer *= array.shape[d];
    if (d > dim) inner *= array.shape[d];
  }
  Array out;
  out.shape = array.shape;
  out.shape[dim] = indices.size();
  for (uint64_t o = 0; o < outer; ++o) {
    for (uint64_t index : indices) {
      for (uint64_t i = 0; i < inner; ++i) {
        out.cells.push_back(
            index == kNothing ? Cell{} : array.cells[(o * array.shape[dim] + index) * inner + i]);
      }
    }
  }
  return out;
}

void PadToMultiple(std::vector<Cell>& cells, uint64_t multiple) {
  while (cells.size() % multiple != 0) cells.emplace_back();
}

void Append(std::vector<Cell>& cells, const Array& array) {
  cells.insert(cells.end(), array.cells.begin(), array.cells.end());
}

Array Flat(std::vector<Cell> cells) {
  Array array;
  array.shape = {cells.size()};
  array.cells = std::move(cells);
  return array;
}

std::vector<Array> CutEvenly(const std::vector<Cell>& cells, uint64_t count) {
  std::vector<std::vector<Cell>> parts(count);
  for (size_t i = 0; i < cells.size(); ++i) {
    parts[i / (cells.size() / count)].push_back(cells[i]);
  }
  std::vector<Array> arrays;
  for (std::vector<Cell>& part : parts) arrays.push_back(Flat(std::move(part)));
  return arrays;
}

}  // namespace

uint64_t Numel(const Shape& shape) {
  uint64_t numel = 1;
  for (uint64_t size : shape) numel *= size;
  return numel;
}

Array Whole(const Named& tensor) {
  Array array;
  array.shape = tensor.shape;
  for (uint64_t i = 0; i < Numel(tensor.shape); ++i) array.cells.push_back({tensor.name, i});
  return array;
}

std::vector<Array> WholeOfEach(const std::vector<Named>& tensors) {
  std::vector<Array> arrays;
  for (const Named& tensor : tensors) arrays.push_back(Whole(tensor));
  return arrays;
}

Array Reshape(const Array& array, const Shape& shape) { return {shape, array.cells}; }

Array Flatten(const Array& array) { return {{array.cells.size()}, array.cells}; }

Array Permute(const Array& array, const std::vector<size_t>& dims) {
  Shape steps(array.shape.size());  // of the old dimensions
  uint64_t step = 1;
  for (size_t d = steps.size(); d-- > 0;) {
    steps[d] = step;
    step *= array.shape[d];
  }
  Array out;
  for (size_t dim : dims) out.shape.push_back(array.shape[dim]);
  Shape at(dims.size(), 0);
  for (size_t i = 0; i < array.cells.size(); ++i) {
    uint64_t old = 0;
    for (size_t d = 0; d < dims.size(); ++d) old += at[d] * steps[dims[d]];
    out.cells.push_back(array.cells[old]);
    for (size_t d = dims.size(); d-- > 0;) {  // the next coordinates, as an odometer
      if (++at[d] < out.shape[d]) break;
      at[d] = 0;
    }
  }
  return out;
}

Array Narrow(const Array& array, size_t dim, uint64_t start, uint64_t count) {
  std::vector<uint64_t> indices(count);
  std::iota(indices.begin(), indices.end(), start);
  return Select(array, dim, indices);
}

Array Cat(const std::vector<Array>& arrays, size_t dim) {
  Array out;
  out.shape = arrays[0].shape;
  out.shape[dim] = 0;
  uint64_t outer = 1;
  for (size_t d = 0; d < dim; ++d) outer *= out.shape[d];
  for (const Array& array : arrays) out.shape[dim] += array.shape[dim];
  for (uint64_t o = 0; o < outer; ++o) {
    for (const Array& array : arrays) {
      const uint64_t slab = array.cells.size() / outer;
      for (uint64_t i = 0; i < slab; ++i) out.cells.push_back(array.cells[o * slab + i]);
    }
  }
  return out;
}

std::vector<Array> Split(const Array& array, const std::vector<uint64_t>& sizes, size_t dim) {
  std::vector<Array> parts;
  uint64_t start = 0;
  for (uint64_t size : sizes) {
    parts.push_back(Narrow(array, dim, start, size));
    start += size;
  }
  return parts;
}

std::vector<Array> Chunk(const Array& array, uint64_t count, size_t dim) {
  std::vector<uint64_t> sizes;
  const uint64_t size = CeilDiv(array.shape[dim], count);
  uint64_t left = array.shape[dim];
  for (uint64_t i = 0; i < count; ++i) {
    sizes.push_back(std::min(size, left));
    left -= sizes.back();
  }
  return Split(array, sizes, dim);
}

Array PadTo(const Array& array, size_t dim, uint64_t size) {
  std::vector<uint64_t> indices(array.shape[dim]);
  std::iota(indices.begin(), indices.end(), uint64_t{0});
  indices.resize(size, kNothing);
  return Select(array, dim, indices);
}

void World::Put(uint64_t rank, const std::string& buffer, const std::string& state,
                const Array& array) {
  Buffer& to = ranks[rank][buffer];
  to.state = state;
  Append(to.cells, array);
}

void World::PutAlone(uint64_t rank, const std::string& state, const std::string& tensor,
                     const Array& array) {
  Put(rank, state + "/" + tensor, state, array);
}

// ---- DeepSpeed ----

std::vector<Cell> ZeroFlatGroup(const std::vector<Array>& group, uint64_t dp,
                                const ZeroFlatRule& rule) {
  std::vector<const Array*> order;
  if (rule.round_robin) {
    for (uint64_t j = 0; j < dp; ++j) {
      for (uint64_t i = j; i < group.size(); i += dp) order.push_back(&group[i]);
    }
  } else {
    for (const Array& parameter : group) order.push_back(&parameter);
  }
  std::vector<Cell> flat;
  for (const Array* parameter : order) {
    PadToMultiple(flat, rule.alignment_elements);
    Append(flat, *parameter);
  }
  PadToMultiple(flat, 2 * dp);  // nccl_start_alignment_factor
  return flat;
}

std::vector<Array> ZeroPartitions(const std::vector<Array>& group, uint64_t dp,
                                  const ZeroFlatRule& rule) {
  return CutEvenly(ZeroFlatGroup(group, dp, rule), dp);
}

std::vector<std::vector<Array>> Zero3SubGroups(const std::vector<Array>& parameters, uint64_t dp,
                                               uint64_t sub_group_size) {
  std::vector<std::vector<Array>> ranks(dp);
  for (uint64_t rank = 0; rank < dp; ++rank) {
    std::vector<Cell> flat;
    for (size_t p = 0; p < parameters.size(); ++p) {
      const std::vector<Cell>& cells = parameters[p].cells;
      const uint64_t partition = CeilDiv(cells.size(), dp);
      for (uint64_t i = rank * partition; i < (rank + 1) * partition; ++i) {
        flat.push_back(i < cells.size() ? cells[i] : Cell{});
      }
      if (flat.size() >= sub_group_size || p + 1 == parameters.size()) {
        ranks[rank].push_back(Flat(std::move(flat)));
        flat.clear();
      }
    }
  }
  return ranks;
}

std::vector<Array> MuonMomentum(const std::vector<Array>& group, uint64_t dp) {
  std::vector<Array> ranks;
  for (const Array& partition : ZeroPartitions(group, dp, {})) {
    std::vector<Cell> momentum;
    for (const Array& parameter : group) {
      const bool touches =
          std::any_of(partition.cells.begin(), partition.cells.end(), [&](const Cell& cell) {
            return !parameter.cells.empty() && cell.tensor == parameter.cells[0].tensor;
          });
      if (touches) Append(momentum, parameter);
    }
    ranks.push_back(Flat(std::move(momentum)));
  }
  return ranks;
}

// ---- PyTorch ----

std::vector<Array> Fsdp1Shards(const std::vector<Array>& unit, uint64_t world, bool use_orig_params,
                               uint64_t element_bytes) {
  std::vector<Cell> flat;
  for (const Array& parameter : unit) {
    if (use_orig_params) PadToMultiple(flat, 16 / element_bytes);
    Append(flat, parameter);
  }
  PadToMultiple(flat, world);
  return CutEvenly(flat, world);
}

Array StridedShard(const Array& array, size_t dim, uint64_t split_factor, uint64_t count,
                   uint64_t coordinate) {
  std::vector<Array> parts;
  for (const Array& piece : Chunk(array, split_factor, dim)) {
    parts.push_back(Chunk(piece, count, dim)[coordinate]);
  }
  return Cat(parts, dim);
}

std::vector<Array> RaggedShards(const Array& array, const std::vector<uint64_t>& local_units) {
  uint64_t units = 0;
  for (uint64_t count : local_units) units += count;
  std::vector<Array> shards;
  size_t next = 0;
  for (uint64_t count : local_units) {
    std::vector<Cell> cells;
    for (uint64_t unit = 0; unit < count; ++unit) {
      for (uint64_t i = 0; i < array.cells.size() / units; ++i)
        cells.push_back(array.cells[next++]);
    }
    shards.push_back(Flat(std::move(cells)));
  }
  return shards;
}

// ---- Megatron-LM ----

std::vector<MegatronBucket> MegatronBuckets(const std::vector<MegatronParameter>& parameters,
                                            const MegatronBufferRule& rule) {
  uint64_t end_multiple = std::lcm(rule.dp, uint64_t{128});
  if (rule.pad_for_high_nccl_busbw) end_multiple = std::lcm(end_multiple, uint64_t{65536});
  std::vector<MegatronBucket> buckets;
  MegatronBucket bucket;
  const auto close = [&] {
    PadToMultiple(bucket.cells, end_multiple);
    buckets.push_back(std::move(bucket));
    bucket = {};
  };
  for (size_t i = parameters.size(); i-- > 0;) {
    const MegatronParameter& parameter = parameters[i];
    // Buckets begin at multiples of 128 of the buffer: the start of a parameter is aligned in the
    // bucket if it is in the buffer.
    PadToMultiple(bucket.cells, 64);
    if (parameter.shared_embedding && !bucket.names.empty()) close();
    bucket.names.push_back(parameter.name);
    Append(bucket.cells, parameter.local);
    const bool full = rule.bucket_size > 0 && bucket.cells.size() >= rule.bucket_size;
    if (full || parameter.shared_embedding) close();
  }
  if (!bucket.names.empty()) close();
  return buckets;
}

Array MegatronShard(const MegatronBucket& bucket, uint64_t dp, uint64_t dp_rank) {
  return CutEvenly(bucket.cells, dp)[dp_rank];
}

std::vector<std::vector<uint64_t>> MegatronStages(uint64_t layers, uint64_t pp, uint64_t vpp) {
  std::vector<std::vector<uint64_t>> stages(pp);
  const uint64_t per_chunk = layers / (pp * vpp);
  for (uint64_t p = 0; p < pp; ++p) {
    for (uint64_t c = 0; c < vpp; ++c) {
      const uint64_t begin = (c * pp + p) * per_chunk;
      for (uint64_t i = 0; i < per_chunk; ++i) stages[p].push_back(begin + i);
    }
  }
  return stages;
}

Array MegatronVocabulary(const Array& embedding, uint64_t divisible_by, uint64_t tp,
                         uint64_t rank) {
  uint64_t padded = embedding.shape[0];
  while (padded % (divisible_by * tp) != 0) ++padded;
  return Narrow(PadTo(embedding, 0, padded), 0, rank * (padded / tp), padded / tp);
}

// ---- The language of universal checkpoints, and affine maps ----

Array UcpSubParameters(const Array& full, size_t dim, const std::vector<uint64_t>& widths,
                       uint64_t tp, uint64_t rank) {
  std::vector<Array> parts;
  for (const Array& sub : Split(full, widths, dim)) parts.push_back(Chunk(sub, tp, dim)[rank]);
  return Cat(parts, dim);
}

Array UcpShardWidths(const Array& full, size_t dim,
                     const std::vector<std::vector<uint64_t>>& widths, uint64_t rank) {
  std::vector<Array> parts;
  uint64_t start = 0;
  for (const std::vector<uint64_t>& of_ranks : widths) {
    for (uint64_t r = 0; r < of_ranks.size(); ++r) {
      if (r == rank) parts.push_back(Narrow(full, dim, start, of_ranks[r]));
      start += of_ranks[r];
    }
  }
  return Cat(parts, dim);
}

Array AffineShard(const Array& full, const Shape& shard_shape,
                  const std::vector<AffinePiece>& pieces) {
  Array shard;
  shard.shape = shard_shape;
  shard.cells.resize(Numel(shard_shape));
  for (const AffinePiece& piece : pieces) {
    for (uint64_t i = 0; i < Numel(piece.shape); ++i) {
      uint64_t rest = i;
      uint64_t from = piece.source;
      uint64_t to = piece.dest;
      for (size_t d = piece.shape.size(); d-- > 0;) {
        from += rest % piece.shape[d] * piece.source_strides[d];
        to += rest % piece.shape[d] * piece.dest_strides[d];
        rest /= piece.shape[d];
      }
      shard.cells[to] = full.cells[from];
    }
  }
  return shard;
}

}  // namespace holdfast::frameworks
