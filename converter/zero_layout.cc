#include "converter/zero_layout.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kElementsMax = kTensorBytesMax / 8;

absl::Status Add(uint64_t more, uint64_t& sum) {
  if (sum > kElementsMax || more > kElementsMax - sum) {
    return absl::InvalidArgumentError(
        absl::StrFormat("flat buffer: expected at most %d elements, found %d and %d more",
                        kElementsMax, sum, more));
  }
  sum += more;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PackedGroup> PackedGroup::Create(std::vector<uint64_t> parameter_elements,
                                                std::span<const uint64_t> paddings) {
  if (!paddings.empty() && paddings.size() != parameter_elements.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("param_alignment_paddings: expected one of each of %d parameters, found %d",
                        parameter_elements.size(), paddings.size()));
  }
  std::vector<uint64_t> offsets;
  offsets.reserve(parameter_elements.size());
  uint64_t at = 0;
  for (size_t i = 0; i < parameter_elements.size(); ++i) {
    offsets.push_back(at);
    RETURN_IF_ERROR(Add(parameter_elements[i], at));
    if (!paddings.empty()) RETURN_IF_ERROR(Add(paddings[i], at));
  }
  return AtOffsets(std::move(parameter_elements), std::move(offsets));
}

absl::StatusOr<PackedGroup> PackedGroup::AtOffsets(std::vector<uint64_t> parameter_elements,
                                                   std::vector<uint64_t> offsets) {
  CHECK(parameter_elements.size() == offsets.size());
  PackedGroup group;
  group.sizes_ = std::move(parameter_elements);
  group.offsets_ = std::move(offsets);
  for (uint32_t i = 0; i < group.sizes_.size(); ++i) {
    if (group.sizes_[i] > 0) group.order_.push_back(i);
  }
  std::sort(group.order_.begin(), group.order_.end(),
            [&group](uint32_t a, uint32_t b) { return group.offsets_[a] < group.offsets_[b]; });
  for (uint32_t i : group.order_) {
    if (group.offsets_[i] < group.elements_) {
      return absl::InvalidArgumentError(
          absl::StrFormat("flat buffer: expected parameters that do not overlap, found one at "
                          "element %d and another that ends at %d",
                          group.offsets_[i], group.elements_));
    }
    group.elements_ = group.offsets_[i];
    RETURN_IF_ERROR(Add(group.sizes_[i], group.elements_));
  }
  return group;
}

absl::StatusOr<uint64_t> PackedGroup::PartitionElements(
    std::span<const uint64_t> stored_by_rank) const {
  CHECK(!stored_by_rank.empty());
  const uint64_t ranks = stored_by_rank.size();
  // A partition that is stored whole, or that holds no padding, is the largest. If all that hold
  // anything were stripped, there is only one, and what it has is all there is.
  const uint64_t size = *std::max_element(stored_by_rank.begin(), stored_by_rank.end());
  if (size < (elements_ + ranks - 1) / ranks) {
    return absl::DataLossError(absl::StrFormat(
        "flat buffer: its parameters have %d elements; expected partitions of at least %d on each "
        "of %d ranks, found at most %d",
        elements_, (elements_ + ranks - 1) / ranks, ranks, size));
  }
  for (uint64_t rank = 0; rank < ranks; ++rank) {
    const uint64_t begin = size != 0 && rank > elements_ / size ? elements_ : rank * size;
    const uint64_t real = std::min(elements_ - std::min(begin, elements_), size);
    if (stored_by_rank[rank] != size && stored_by_rank[rank] != real) {
      return absl::DataLossError(
          absl::StrFormat("flat buffer of %d elements in partitions of %d: expected %d of rank %d "
                          "(with padding: %d), found %d",
                          elements_, size, real, rank, size, stored_by_rank[rank]));
    }
  }
  return size;
}

std::vector<FlatRun> PackedGroup::Partition(uint32_t rank, uint64_t partition_elements) const {
  std::vector<FlatRun> runs;
  if (partition_elements == 0 || rank > elements_ / partition_elements) return runs;
  const uint64_t begin = rank * partition_elements;
  const uint64_t end = begin + std::min(partition_elements, elements_ - begin);
  auto first = std::partition_point(order_.begin(), order_.end(), [this, begin](uint32_t i) {
    return offsets_[i] + sizes_[i] <= begin;
  });
  for (; first != order_.end() && offsets_[*first] < end; ++first) {
    const uint64_t lo = std::max(begin, offsets_[*first]);
    const uint64_t hi = std::min(end, offsets_[*first] + sizes_[*first]);
    runs.push_back({.parameter = *first,
                    .parameter_begin = lo - offsets_[*first],
                    .buffer_begin = lo - begin,
                    .count = hi - lo});
  }
  return runs;
}

std::vector<FlatRun> PackedGroup::WholeParameters(uint32_t rank,
                                                  uint64_t partition_elements) const {
  std::vector<FlatRun> runs = Partition(rank, partition_elements);
  uint64_t at = 0;
  for (FlatRun& run : runs) {
    run = {.parameter = run.parameter,
           .parameter_begin = 0,
           .buffer_begin = at,
           .count = sizes_[run.parameter]};
    at += run.count;
  }
  return runs;
}

absl::StatusOr<PartitionedParameters> PartitionedParameters::Create(
    std::vector<uint64_t> parameter_elements, uint32_t ranks) {
  if (ranks == 0 || ranks > kZeroRanksMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("ZeRO-3: expected 1 to %d ranks, found %d", kZeroRanksMax, ranks));
  }
  PartitionedParameters parameters;
  parameters.ranks_ = ranks;
  for (uint64_t elements : parameter_elements) {
    parameters.offsets_.push_back(parameters.elements_per_rank_);
    if (elements > kElementsMax) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "ZeRO-3: expected parameters of at most %d elements, found %d", kElementsMax, elements));
    }
    RETURN_IF_ERROR(Add((elements + ranks - 1) / ranks, parameters.elements_per_rank_));
  }
  parameters.sizes_ = std::move(parameter_elements);
  return parameters;
}

std::vector<FlatRun> PartitionedParameters::Partition(uint32_t rank) const {
  std::vector<FlatRun> runs;
  for (uint32_t i = 0; i < sizes_.size(); ++i) {
    const uint64_t width = (sizes_[i] + ranks_ - 1) / ranks_;
    if (width == 0 || rank > sizes_[i] / width) continue;  // the product does not overflow
    const uint64_t begin = rank * width;
    const uint64_t count = std::min(width, sizes_[i] - std::min(begin, sizes_[i]));
    if (count == 0) continue;
    runs.push_back(
        {.parameter = i, .parameter_begin = begin, .buffer_begin = offsets_[i], .count = count});
  }
  return runs;
}

std::vector<PartRun> SplitAtParts(std::span<const FlatRun> runs,
                                  std::span<const uint64_t> part_elements) {
  std::vector<PartRun> out;
  uint32_t part = 0;
  uint64_t part_begin = 0;
  for (FlatRun run : runs) {
    while (run.count > 0) {
      CHECK(part < part_elements.size() && run.buffer_begin >= part_begin);
      const uint64_t part_end = part_begin + part_elements[part];
      if (run.buffer_begin >= part_end) {
        part_begin = part_end;
        ++part;
        continue;
      }
      FlatRun head = run;
      head.count = std::min(run.count, part_end - run.buffer_begin);
      head.buffer_begin -= part_begin;
      out.push_back({.part = part, .run = head});
      run.parameter_begin += head.count;
      run.buffer_begin += head.count;
      run.count -= head.count;
    }
  }
  return out;
}

std::vector<uint32_t> RoundRobinOrder(uint32_t count, uint32_t ranks) {
  CHECK(ranks > 0);
  std::vector<uint32_t> order;
  order.reserve(count);
  for (uint32_t first = 0; first < ranks && first < count; ++first) {
    for (uint64_t i = first; i < count; i += ranks) order.push_back(static_cast<uint32_t>(i));
  }
  return order;
}

}  // namespace holdfast::converter
