#include "converter/sharded_value.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/shard_pieces.h"

namespace holdfast::converter {
namespace {

using Kind = TorchValue::Kind;

// `torch.distributed._tensor.api.DTensor` before 2.5.
bool IsDTensor(std::string_view name) {
  return name == "torch.distributed.tensor.DTensor" ||
         name == "torch.distributed._tensor.api.DTensor";
}

constexpr std::string_view kShardedTensor =
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor";

// "Shard" of torch.distributed.tensor.placement_types.Shard and of the older
// _tensor.placement_types.
std::string_view PlacementName(std::string_view name) {
  for (const std::string_view module : {"torch.distributed.tensor.placement_types.",
                                        "torch.distributed._tensor.placement_types."}) {
    if (name.starts_with(module)) return name.substr(module.size());
  }
  return "";
}

// The product of a shape that is an integer or a tuple of some (an axis of size 1 is `()`).
absl::StatusOr<uint64_t> ProductOf(TorchValue value) {
  if (value.Is(Kind::kInteger)) return value.Uint64();
  ASSIGN_OR_RETURN(const std::vector<uint64_t> factors, value.Uint64s());
  uint64_t product = 1;
  for (const uint64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return value.Mismatch("a mesh of fewer than 2^64 ranks");
    }
  }
  return product;
}

// Ranks per mesh dimension.
absl::StatusOr<std::vector<uint64_t>> MeshShape(TorchValue mesh) {
  // torch <= 2.8 pickles the mesh as a tensor of ranks.
  if (const TorchValue ranks = mesh.Find("mesh"); ranks.present()) {
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, ranks.Tensor());
    return tensor->shape;
  }
  ASSIGN_OR_RETURN(const TorchValue layout, mesh.Get("_layout"));
  std::vector<uint64_t> sizes;
  // 2.13: axes, each with its shape; before it, one nested shape.
  if (const TorchValue axes = layout.Find("axes"); axes.present()) {
    ASSIGN_OR_RETURN(const size_t count, axes.ArraySize());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const TorchValue shape, axes[i].Get("shape"));
      ASSIGN_OR_RETURN(sizes.emplace_back(), ProductOf(shape));
    }
    return sizes;
  }
  ASSIGN_OR_RETURN(const TorchValue shape, layout.Get("shape"));
  if (shape.Is(Kind::kInteger)) {
    ASSIGN_OR_RETURN(sizes.emplace_back(), shape.Uint64());
    return sizes;
  }
  ASSIGN_OR_RETURN(const size_t count, shape.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(sizes.emplace_back(), ProductOf(shape[i]));
  }
  return sizes;
}

absl::StatusOr<Placement> ReadPlacement(TorchValue value) {
  const std::string name = value.ClassName();
  const std::string_view kind = PlacementName(name);
  Placement placement;
  if (kind == "Replicate") return placement;
  if (kind == "Partial" || kind == "_Partial" || kind == "_NormPartial" || kind == "_MaskPartial") {
    return absl::UnimplementedError(absl::StrFormat(
        "expected a shard or a replica, found the placement %s: only a sum over the ranks", kind));
  }
  if (kind != "Shard" && kind != "_StridedShard") return value.Mismatch("a placement of DTensor");
  ASSIGN_OR_RETURN(const TorchValue dim, value.Get("dim"));
  ASSIGN_OR_RETURN(placement.dim, dim.Uint64());
  placement.kind = Placement::Kind::kShard;
  if (kind == "_StridedShard") {
    placement.kind = Placement::Kind::kStridedShard;
    ASSIGN_OR_RETURN(const TorchValue factor, value.Get("split_factor"));
    ASSIGN_OR_RETURN(placement.split_factor, factor.Uint64());
  }
  return placement;
}

std::string DescribeLayout(const std::vector<MeshDim>& mesh, TorchValue names,
                           const std::vector<Placement>& placements) {
  std::vector<std::string> sizes;
  std::vector<std::string> words;
  for (size_t i = 0; i < mesh.size(); ++i) {
    sizes.push_back(absl::StrCat(mesh[i].ranks));
    const Placement& placement = placements[i];
    words.push_back(
        placement.kind == Placement::Kind::kReplicate ? "Replicate"
        : placement.kind == Placement::Kind::kShard
            ? absl::StrFormat("Shard(%d)", placement.dim)
            : absl::StrFormat("StridedShard(%d, %d)", placement.dim, placement.split_factor));
  }
  std::vector<std::string> axes;
  const size_t count = names.present() ? names.ArraySize().value_or(0) : 0;
  for (size_t i = 0; i < count; ++i) axes.emplace_back(names[i].String().value_or("?"));
  return absl::StrFormat("mesh (%s)%s%s: [%s]", absl::StrJoin(sizes, ", "), axes.empty() ? "" : " ",
                         absl::StrJoin(axes, ", "), absl::StrJoin(words, ", "));
}

absl::StatusOr<ShardedValue> ReadDTensor(TorchValue value, ShardedValue whole) {
  whole.kind = ShardedValue::Kind::kDTensor;
  ASSIGN_OR_RETURN(const TorchValue local, value.Get("_local_tensor"));
  ASSIGN_OR_RETURN(const TorchValue spec, value.Get("_spec"));
  ASSIGN_OR_RETURN(const TorchValue mesh, spec.Get("mesh"));
  ASSIGN_OR_RETURN(const TorchValue written, spec.Get("placements"));
  ASSIGN_OR_RETURN(const size_t count, written.ArraySize());
  std::vector<Placement> placements;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(placements.emplace_back(), ReadPlacement(written[i]));
  }
  ASSIGN_OR_RETURN(const std::vector<uint64_t> sizes, MeshShape(mesh));
  // None on a rank that is not of the mesh: it holds nothing.
  const TorchValue own = mesh.Find("_coordinate_on_dim");
  if (!own.present() || own.Is(Kind::kNone)) return whole;
  ASSIGN_OR_RETURN(const std::vector<uint64_t> coordinate, own.Uint64s());
  if (coordinate.size() != sizes.size()) {
    return own.Mismatch(absl::StrFormat("a coordinate in %d mesh dimensions", sizes.size()));
  }
  std::vector<MeshDim> dims;
  for (size_t i = 0; i < sizes.size(); ++i) dims.push_back({sizes[i], coordinate[i]});
  ShardedPart part;
  ASSIGN_OR_RETURN(part.local, local.Tensor());
  ASSIGN_OR_RETURN(part.runs, ShardRuns(whole.shape, dims, placements));
  whole.parts.push_back(std::move(part));
  whole.layout =
      DescribeLayout(dims,
                     mesh.Find("_mesh_dim_names").present() ? mesh.Find("_mesh_dim_names")
                                                            : mesh.Find("mesh_dim_names"),
                     placements);
  return whole;
}

absl::StatusOr<ShardedValue> ReadShardedTensor(TorchValue value, ShardedValue whole) {
  whole.kind = ShardedValue::Kind::kShardedTensor;
  // ([Shard], ShardedTensorMetadata, process group, sharding spec, init_rrefs)
  const TorchValue state = value.state();
  ASSIGN_OR_RETURN(const size_t parts, state.ArraySize());
  if (parts < 2) return state.Mismatch("the state of a ShardedTensor");
  const TorchValue shards = state[0];
  ASSIGN_OR_RETURN(const size_t count, shards.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const TorchValue tensor, shards[i].Get("tensor"));
    ASSIGN_OR_RETURN(const TorchValue metadata, shards[i].Get("metadata"));
    ASSIGN_OR_RETURN(const TorchValue offsets, metadata.Get("shard_offsets"));
    ASSIGN_OR_RETURN(const TorchValue sizes, metadata.Get("shard_sizes"));
    ASSIGN_OR_RETURN(const std::vector<uint64_t> lo, offsets.Uint64s());
    ASSIGN_OR_RETURN(const std::vector<uint64_t> size, sizes.Uint64s());
    if (lo.size() != whole.shape.size() || size.size() != whole.shape.size()) {
      return offsets.Mismatch(absl::StrFormat("a box of %d dimensions", whole.shape.size()));
    }
    for (size_t d = 0; d < lo.size(); ++d) {
      if (lo[d] > whole.shape[d] || size[d] > whole.shape[d] - lo[d]) {
        return offsets.Mismatch(
            absl::StrFormat("a box within %d in dimension %d", whole.shape[d], d));
      }
    }
    ShardedPart part{.local = nullptr, .runs = RunsOfBox(lo, size)};
    ASSIGN_OR_RETURN(part.local, tensor.Tensor());
    whole.parts.push_back(std::move(part));
  }
  return whole;
}

}  // namespace

absl::StatusOr<std::optional<ShardedValue>> ReadShardedValue(TorchValue value) {
  if (value.Is(Kind::kTensor)) {
    ShardedValue plain;
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, value.Tensor());
    plain.dtype = tensor->dtype;
    plain.shape = tensor->shape;
    const std::vector<uint64_t> zeros(plain.shape.size());
    plain.parts.push_back({tensor, RunsOfBox(zeros, plain.shape)});
    return plain;
  }
  const std::string wrapper = value.WrapperClass();
  if (wrapper.empty()) return std::nullopt;
  if (!IsDTensor(wrapper) && wrapper != kShardedTensor) {
    return value.Mismatch("a DTensor or a ShardedTensor");
  }
  // (class, dtype, size, strides, storage offset, layout, device, requires_grad)
  const TorchValue args = value.args();
  ASSIGN_OR_RETURN(const size_t count, args.ArraySize());
  if (count < 3) return args.Mismatch("the arguments of a wrapper tensor");
  ShardedValue whole;
  ASSIGN_OR_RETURN(whole.dtype, args[1].ElementType());
  ASSIGN_OR_RETURN(whole.shape, args[2].Uint64s());
  if (IsDTensor(wrapper)) return ReadDTensor(value, std::move(whole));
  return ReadShardedTensor(value, std::move(whole));
}

}  // namespace holdfast::converter
