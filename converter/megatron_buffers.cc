#include "converter/megatron_buffers.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kStartMultiple = 64;
constexpr uint64_t kElementsMax = kTensorBytesMax / 8;
constexpr uint64_t kWindowElements = 512;

// Of numbers that are far below 2^63.
uint64_t RoundUp(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// All of [begin, begin + count), as bytes; nothing if a part is missing or is not little-endian.
absl::StatusOr<std::optional<std::vector<std::byte>>> ReadFlat(const ForeignFolder& folder,
                                                               const FlatParts& parts,
                                                               uint64_t begin, uint64_t count) {
  std::vector<std::byte> bytes(count * ElementBytes(parts.dtype()));
  const uint64_t element_bytes = ElementBytes(parts.dtype());
  uint64_t found = 0;
  for (const FlatParts::Run& run : parts.Find(begin, begin + count)) {
    if (run.stored->dtype != parts.dtype() || run.stored->file == kInline ||
        run.stored->byte_order != ByteOrder::kLittle || run.stored->negate ||
        run.stored->conjugate) {
      return std::nullopt;
    }
    RETURN_IF_ERROR(folder.ReadAt(
        run.stored->file, run.stored->offset_bytes + run.stored_begin * element_bytes,
        std::span(bytes).subspan((run.begin - begin) * element_bytes, run.count * element_bytes)));
    found += run.count;
  }
  if (found != count) return std::nullopt;
  return bytes;
}

// Weights are their masters, rounded; or they were once, and have been cast to another dtype since.
constexpr std::array<Dtype, 2> kByBfloat16 = {Dtype::kBfloat16, Dtype::kFloat16};
constexpr std::array<Dtype, 2> kByFloat16 = {Dtype::kFloat16, Dtype::kBfloat16};
constexpr std::array<std::span<const Dtype>, 5> kWays = {
    std::span<const Dtype>(), std::span(kByBfloat16).first(1), std::span(kByFloat16).first(1),
    std::span(kByBfloat16), std::span(kByFloat16)};

// From type to type.
std::vector<std::byte> Cast(Dtype from, std::span<const Dtype> way, Dtype to,
                            std::vector<std::byte> bytes) {
  const auto cast = [&](Dtype next) {
    if (next == from) return;
    std::vector<std::byte> out(bytes.size() / ElementBytes(from) * ElementBytes(next));
    CastElements(from, next, bytes, out);
    bytes = std::move(out);
    from = next;
  };
  for (const Dtype next : way) cast(next);
  cast(to);
  return bytes;
}

}  // namespace

uint64_t BucketEndMultiple(uint64_t data_ranks, bool wide_padding) {
  if (data_ranks == 0 || data_ranks > (uint64_t{1} << 32)) return 0;
  return std::lcm(data_ranks, uint64_t{wide_padding ? 65536u : 128u});
}

uint64_t BufferStart(uint64_t end) { return RoundUp(end, kStartMultiple); }

uint64_t BufferLayout::padded_elements() const {
  return buckets.empty() ? 0 : buckets.back().begin + buckets.back().padded;
}

uint64_t BufferLayout::elements() const {
  uint64_t sum = 0;
  for (const Bucket& bucket : buckets) sum += bucket.elements;
  return sum;
}

absl::StatusOr<BufferLayout> LayOutBuffer(std::span<const BufferParameter> parameters,
                                          const BufferRule& rule) {
  if (rule.end_multiple == 0 || rule.end_multiple > (uint64_t{1} << 48)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "expected buckets of a multiple of 1 to 2^48, found %d", rule.end_multiple));
  }
  BufferLayout layout;
  uint64_t bucket_begin = 0;
  uint64_t cursor = 0;
  uint64_t paddings = 0;
  bool open = false;  // whether the current bucket has a parameter
  const auto close = [&](uint64_t end) {
    const uint64_t padded_end = RoundUp(end, rule.end_multiple);
    layout.buckets.push_back({.begin = bucket_begin,
                              .elements = end - bucket_begin,
                              .padded = padded_end - bucket_begin});
    paddings += padded_end - end;
    bucket_begin = cursor = padded_end;
    open = false;
  };
  for (const BufferParameter& parameter : parameters) {
    if (parameter.elements > kElementsMax || cursor > kElementsMax) {
      return absl::InvalidArgumentError(
          absl::StrFormat("expected a buffer of at most %d elements, found more", kElementsMax));
    }
    cursor = BufferStart(cursor);
    if (parameter.shared_embedding && open) close(cursor);
    layout.begins.push_back(cursor);
    layout.paddings.push_back(paddings);
    layout.bucket_of.push_back(static_cast<uint32_t>(layout.buckets.size()));
    cursor += parameter.elements;
    open = true;
    if (parameter.shared_embedding ||
        (rule.bucket_elements.has_value() && cursor - bucket_begin >= *rule.bucket_elements)) {
      close(cursor);
    }
  }
  if (open) close(cursor);
  return layout;
}

absl::StatusOr<BufferLayout> FitBuffer(std::span<const BufferParameter> parameters,
                                       std::span<const uint64_t> bucket_elements,
                                       std::span<const uint64_t> bucket_padded) {
  CHECK(bucket_elements.size() == bucket_padded.size());
  BufferLayout layout;
  size_t next = 0;
  uint64_t bucket_begin = 0;
  uint64_t paddings = 0;
  for (size_t b = 0; b < bucket_elements.size(); ++b) {
    const uint64_t elements = bucket_elements[b];
    if (bucket_padded[b] < elements || bucket_padded[b] > kElementsMax ||
        bucket_begin > kElementsMax) {
      return absl::DataLossError(
          absl::StrFormat("bucket %d: expected at least its %d elements with padding, found %d", b,
                          elements, bucket_padded[b]));
    }
    uint64_t cursor = 0;
    while (next < parameters.size()) {
      const uint64_t start = BufferStart(cursor);
      // An empty one is where the next begins.
      if (start > elements || parameters[next].elements > elements - start ||
          (start == elements && parameters[next].elements > 0)) {
        break;
      }
      layout.begins.push_back(bucket_begin + start);
      layout.paddings.push_back(paddings);
      layout.bucket_of.push_back(static_cast<uint32_t>(b));
      cursor = start + parameters[next].elements;
      ++next;
    }
    if (cursor != elements && BufferStart(cursor) != elements) {
      return absl::DataLossError(absl::StrFormat(
          "bucket %d: expected parameters of %d elements, found %d where the next one (%d) does "
          "not fit",
          b, elements, cursor, next < parameters.size() ? parameters[next].elements : 0));
    }
    layout.buckets.push_back(
        {.begin = bucket_begin, .elements = elements, .padded = bucket_padded[b]});
    paddings += bucket_padded[b] - elements;
    bucket_begin += bucket_padded[b];
  }
  if (next < parameters.size()) {
    return absl::DataLossError(
        absl::StrFormat("expected %d parameters in %d buckets, found room for %d",
                        parameters.size(), bucket_elements.size(), next));
  }
  return layout;
}

void FlatParts::Add(uint64_t begin, const StoredTensor& stored, uint64_t stored_begin,
                    uint64_t count) {
  if (count == 0) return;
  parts_.push_back({.begin = begin,
                    .end = begin + count,
                    .stored = stored_.size(),
                    .stored_begin = stored_begin});
  stored_.push_back(stored);
  sorted_ = false;
}

void FlatParts::Sort() const {
  if (sorted_) return;
  std::ranges::stable_sort(parts_, {}, &Part::begin);
  sorted_ = true;
}

std::vector<FlatParts::Run> FlatParts::Find(uint64_t begin, uint64_t end) const {
  Sort();
  std::vector<Run> runs;
  // Parts are disjoint but for damage, so the one before the first that begins later is enough.
  auto part = std::ranges::upper_bound(parts_, begin, {}, &Part::begin);
  if (part != parts_.begin()) --part;
  uint64_t at = begin;
  for (; part != parts_.end() && part->begin < end; ++part) {
    const uint64_t from = std::max(at, part->begin);
    const uint64_t to = std::min(end, part->end);
    if (from >= to) continue;
    runs.push_back({.begin = from,
                    .count = to - from,
                    .stored = &stored_[part->stored],
                    .stored_begin = part->stored_begin + (from - part->begin)});
    at = to;
  }
  return runs;
}

uint64_t FlatParts::CountIn(uint64_t begin, uint64_t end) const {
  uint64_t count = 0;
  for (const Run& run : Find(begin, end)) count += run.count;
  return count;
}

absl::StatusOr<uint64_t> AddFlatParts(const FlatParts& parts, uint64_t begin, uint64_t count,
                                      const ShardMap& shard, uint32_t tensor_state,
                                      PieceTable& table) {
  uint64_t added = 0;
  for (const FlatParts::Run& run : parts.Find(begin, begin + count)) {
    RETURN_IF_ERROR(table.AddShardRange(tensor_state, shard, run.begin - begin, *run.stored,
                                        run.stored_begin, run.count));
    added += run.count;
  }
  return added;
}

absl::StatusOr<MasterMatch> CompareMaster(const ForeignFolder& folder, const FlatParts& masters,
                                          uint64_t master_begin, const FlatParts& weights,
                                          uint64_t weight_begin, uint64_t count) {
  if (masters.empty() || weights.empty() || count == 0) return MasterMatch::kUnknown;
  const Dtype from = masters.dtype();
  const Dtype to = weights.dtype();
  if (from != to && !CanRound(from, to)) return MasterMatch::kUnknown;
  const uint64_t window = std::min(count, kWindowElements);
  std::vector<std::byte> of_masters;
  std::vector<std::byte> of_weights;
  for (const uint64_t at : {uint64_t{0}, (count - window) / 2, count - window}) {
    ASSIGN_OR_RETURN(const auto master, ReadFlat(folder, masters, master_begin + at, window));
    ASSIGN_OR_RETURN(const auto weight, ReadFlat(folder, weights, weight_begin + at, window));
    if (!master.has_value() || !weight.has_value()) return MasterMatch::kUnknown;
    of_masters.insert(of_masters.end(), master->begin(), master->end());
    of_weights.insert(of_weights.end(), weight->begin(), weight->end());
  }
  for (const std::span<const Dtype> way : kWays) {
    if (!way.empty() && from != Dtype::kFloat32) continue;
    if (Cast(from, way, to, of_masters) == of_weights) return MasterMatch::kEqual;
  }
  return MasterMatch::kDifferent;
}

}  // namespace holdfast::converter
