// Reads `universal_checkpoint_info` (DeepSpeed checkpoint/constants.py, affine_ir_spec.md).
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/deepspeed_states.h"

namespace holdfast::converter {
namespace {

constexpr int64_t kAffineVersionMax = 1;
constexpr size_t kAffinePiecesMax = size_t{1} << 22;

bool IsNothing(const TorchValue& value) {
  return !value.present() || value.Is(TorchValue::Kind::kNone);
}

absl::Status In(std::string_view where, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(std::string(where), ": ", status.message()));
}

absl::StatusOr<std::vector<std::string>> Patterns(const TorchValue& info, std::string_view key) {
  std::vector<std::string> patterns;
  const TorchValue list = info.Find(key);
  if (IsNothing(list)) return patterns;
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view pattern, list[i].String());
    patterns.emplace_back(pattern);
  }
  return patterns;
}

absl::StatusOr<SubParameters> ReadSubParameters(const TorchValue& rule) {
  SubParameters sub;
  ASSIGN_OR_RETURN(sub.patterns, Patterns(rule, "patterns"));
  ASSIGN_OR_RETURN(const TorchValue shape, rule.Get("shape"));
  ASSIGN_OR_RETURN(const TorchValue dimension, rule.Get("partition_dim"));
  ASSIGN_OR_RETURN(sub.dimension, dimension.Uint64());
  ASSIGN_OR_RETURN(const size_t dims, shape.ArraySize());
  if (sub.dimension >= dims || dims > kTensorDimsMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "partition_dim: expected one of %d dimensions, found %d", dims, sub.dimension));
  }
  for (size_t d = 0; d < dims; ++d) {
    if (shape[d].Is(TorchValue::Kind::kInteger)) {
      ASSIGN_OR_RETURN(const int64_t size, shape[d].Int64());
      sub.shape.push_back(size);
      continue;
    }
    // Sizes of several sub-parameters. Elsewhere than at partition_dim only their sum counts.
    ASSIGN_OR_RETURN(const Shape sizes, shape[d].Uint64s());
    uint64_t sum = 0;
    for (uint64_t size : sizes) sum += std::min(size, kTensorBytesMax / kTensorDimsMax);
    if (sum > kTensorBytesMax / 8) return absl::InvalidArgumentError("shape: too many elements");
    sub.shape.push_back(static_cast<int64_t>(sum));
    if (d == sub.dimension) sub.sizes = sizes;
  }
  return sub;
}

// `[offset, [strides]]`
absl::Status ReadSide(const TorchValue& side, uint64_t& offset, Shape& strides) {
  ASSIGN_OR_RETURN(const size_t count, side.ArraySize());
  if (count != 2) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected an offset and strides, found %d values", count));
  }
  ASSIGN_OR_RETURN(offset, side[0].Uint64());
  ASSIGN_OR_RETURN(strides, side[1].Uint64s());
  return absl::OkStatus();
}

absl::StatusOr<AffinePiece> ReadAffinePiece(const TorchValue& value) {
  AffinePiece piece;
  ASSIGN_OR_RETURN(const TorchValue shape, value.Get("shape"));
  ASSIGN_OR_RETURN(piece.shape, shape.Uint64s());
  ASSIGN_OR_RETURN(const TorchValue source, value.Get("source"));
  RETURN_IF_ERROR(ReadSide(source, piece.source_offset, piece.source_strides));
  ASSIGN_OR_RETURN(const TorchValue dest, value.Get("dest"));
  RETURN_IF_ERROR(ReadSide(dest, piece.dest_offset, piece.dest_strides));
  if (const TorchValue scale = value.Find("scale"); !IsNothing(scale)) {
    ASSIGN_OR_RETURN(const double factor, scale.Double());
    if (factor != 1.0) {
      return absl::UnimplementedError(absl::StrFormat(
          "its shards are stored multiplied by %g, which only arithmetic takes back", factor));
    }
  }
  return piece;
}

absl::StatusOr<AffineParameter> ReadAffineParameter(std::string_view pattern,
                                                    const TorchValue& value, size_t& pieces_left) {
  AffineParameter parameter;
  parameter.pattern = std::string(pattern);
  ASSIGN_OR_RETURN(const TorchValue logical, value.Get("logical_shape"));
  ASSIGN_OR_RETURN(parameter.logical_shape, logical.Uint64s());
  ASSIGN_OR_RETURN(const TorchValue ranks, value.Get("ranks"));
  ASSIGN_OR_RETURN(const size_t rank_count, ranks.EntryCount());
  for (size_t r = 0; r < rank_count; ++r) {
    AffineParameter::OfRank of;
    ASSIGN_OR_RETURN(of.rank, ranks.Key(r).Uint64());
    ASSIGN_OR_RETURN(const TorchValue shape, ranks.Entry(r).Get("shard_shape"));
    ASSIGN_OR_RETURN(of.shard_shape, shape.Uint64s());
    ASSIGN_OR_RETURN(const TorchValue pieces, ranks.Entry(r).Get("pieces"));
    ASSIGN_OR_RETURN(const size_t count, pieces.ArraySize());
    if (count > pieces_left) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d pieces, found more", kAffinePiecesMax));
    }
    pieces_left -= count;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(AffinePiece piece, ReadAffinePiece(pieces[i]));
      of.pieces.push_back(std::move(piece));
    }
    parameter.ranks.push_back(std::move(of));
  }
  return parameter;
}

absl::Status ReadAffineMap(const TorchValue& map, ParallelInfo& info) {
  if (IsNothing(map)) return absl::OkStatus();
  if (const TorchValue version = map.Find("version"); version.present()) {
    ASSIGN_OR_RETURN(const int64_t number, version.Int64());
    if (number > kAffineVersionMax) {
      return absl::UnimplementedError(
          absl::StrFormat("version: expected at most %d, found %d", kAffineVersionMax, number));
    }
  }
  const TorchValue params = map.Find("params");
  if (IsNothing(params)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, params.EntryCount());
  size_t pieces_left = kAffinePiecesMax;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view pattern, params.Key(i).String());
    absl::StatusOr<AffineParameter> parameter =
        ReadAffineParameter(pattern, params.Entry(i), pieces_left);
    if (!parameter.ok()) return In(pattern, parameter.status());
    info.affine.push_back(*std::move(parameter));
  }
  return absl::OkStatus();
}

absl::Status ReadWidths(const TorchValue& widths, ParallelInfo& info) {
  if (IsNothing(widths)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, widths.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view pattern, widths.Key(i).String());
    ASSIGN_OR_RETURN(const size_t subs, widths.Entry(i).ArraySize());
    std::vector<Shape> of_subs;
    for (size_t s = 0; s < subs; ++s) {
      ASSIGN_OR_RETURN(Shape of_ranks, widths.Entry(i)[s].Uint64s());
      of_subs.push_back(std::move(of_ranks));
    }
    info.widths.emplace_back(pattern, std::move(of_subs));
  }
  return absl::OkStatus();
}

absl::StatusOr<ParallelInfo> Read(const TorchValue& value) {
  ParallelInfo info;
  if (const TorchValue version = value.Find("universal_checkpoint_version"); !IsNothing(version)) {
    ASSIGN_OR_RETURN(info.version, version.Double());
  }
  ASSIGN_OR_RETURN(info.vocabulary, Patterns(value, "vocabulary_parameter_patterns"));
  ASSIGN_OR_RETURN(info.replicated, Patterns(value, "tp_replicated_parameter_patterns"));
  ASSIGN_OR_RETURN(info.averaged, Patterns(value, "parameter_to_average_patterns"));
  ASSIGN_OR_RETURN(info.row, Patterns(value, "parameter_with_row_parallelism_patterns"));
  ASSIGN_OR_RETURN(info.two_sub_parameters,
                   Patterns(value, "parameter_with_2_sub_params_cat_dim_0"));
  ASSIGN_OR_RETURN(info.pipeline_replicated,
                   Patterns(value, "pipeline_replicated_parameter_patterns"));
  if (const TorchValue rules = value.Find("parameter_with_sub_params"); !IsNothing(rules)) {
    ASSIGN_OR_RETURN(const size_t count, rules.ArraySize());
    for (size_t i = 0; i < count; ++i) {
      absl::StatusOr<SubParameters> rule = ReadSubParameters(rules[i]);
      if (!rule.ok()) return In("parameter_with_sub_params", rule.status());
      info.sub_parameters.push_back(*std::move(rule));
    }
  }
  if (const absl::Status status = ReadWidths(value.Find("sub_param_shard_widths"), info);
      !status.ok()) {
    return In("sub_param_shard_widths", status);
  }
  if (const TorchValue size = value.Find("original_vocab_size"); !IsNothing(size)) {
    ASSIGN_OR_RETURN(info.original_vocabulary, size.Uint64());
  }
  if (const TorchValue unsupported = value.Find("autotp_unsupported_parameter_patterns");
      unsupported.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(const size_t count, unsupported.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view pattern, unsupported.Key(i).String());
      const absl::StatusOr<std::string_view> reason = unsupported.Entry(i).String();
      info.unsupported.emplace_back(pattern,
                                    reason.ok() ? *reason : unsupported.Entry(i).Describe());
    }
  }
  if (const absl::Status status = ReadAffineMap(value.Find("affine_map"), info); !status.ok()) {
    return In("affine_map", status);
  }
  return info;
}

}  // namespace

absl::StatusOr<ParallelInfo> ReadParallelInfo(const TorchValue& info) {
  absl::StatusOr<ParallelInfo> read = Read(info);
  if (!read.ok()) return In("universal_checkpoint_info", read.status());
  return read;
}

}  // namespace holdfast::converter
