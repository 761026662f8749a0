#include "converter/shard_ranges.h"

#include <algorithm>
#include <cstddef>

namespace holdfast::converter {
namespace {

// The rows of a box: what lies one behind the other both in the box and in the tensor.
class BoxRows {
 public:
  BoxRows(const Shape& shape, const ShardBlock& block) : block_(block), strides_(shape.size(), 1) {
    for (size_t d = shape.size(); d-- > 1;) strides_[d - 1] = strides_[d] * shape[d];
    const auto is_full = [&](size_t d) { return block.lo[d] == 0 && block.size[d] == shape[d]; };
    if (shape.empty()) return;
    cut_ = shape.size() - 1;
    while (cut_ > 0 && is_full(cut_)) --cut_;
    for (size_t d = cut_; d < shape.size(); ++d) elements_ *= block.size[d];
    // Rows at one distance from each other: those of dimension cut_ - 1, and of all dimensions
    // before it as long as the ones behind them are full.
    for (size_t d = cut_; d-- > 0;) {
      alike_ *= block.size[d];
      if (!is_full(d)) break;
    }
  }

  uint64_t elements() const { return elements_; }  // of each row
  uint64_t distance() const { return cut_ == 0 ? 0 : strides_[cut_ - 1]; }
  // How many rows from this one on are at distance() from each other.
  uint64_t AlikeFrom(uint64_t row) const { return alike_ - row % alike_; }

  // The tensor's element with which a row begins.
  uint64_t Begin(uint64_t row) const {
    if (strides_.empty()) return 0;
    uint64_t begin = block_.lo[cut_] * strides_[cut_];
    for (size_t d = cut_; d-- > 0;) {
      begin += (block_.lo[d] + row % block_.size[d]) * strides_[d];
      row /= block_.size[d];
    }
    return begin;
  }

 private:
  const ShardBlock& block_;
  Shape strides_;
  size_t cut_ = 0;  // the last dimension of which the box has a part
  uint64_t elements_ = 1;
  uint64_t alike_ = 1;
};

void AppendBox(const Shape& shape, const ShardBlock& block, uint32_t tensor_state, uint64_t begin,
               uint64_t end, std::vector<ElementRange>& ranges) {
  const BoxRows rows(shape, block);
  while (begin < end) {
    const uint64_t row = begin / rows.elements();
    const uint64_t from = begin % rows.elements();
    const uint64_t left = end - begin;
    ElementRange range{.tensor_state = tensor_state, .begin = rows.Begin(row) + from, .end = 0};
    if (from > 0 || left < rows.elements()) {
      range.end = range.begin + std::min(left, rows.elements() - from);
    } else {
      range.end = range.begin + rows.elements();
      range.repeat_count = std::min(left / rows.elements(), rows.AlikeFrom(row));
      if (range.repeat_count > 1) range.repeat_stride = rows.distance();
    }
    begin += range.ElementCount();
    ranges.push_back(range);
  }
}

}  // namespace

void AppendShard(const ShardMap& map, uint32_t tensor_state, uint64_t begin, uint64_t end,
                 std::vector<ElementRange>& ranges) {
  const auto fill = [&ranges](uint64_t from, uint64_t to) {
    if (from < to) ranges.push_back({.tensor_state = kZeroElements, .begin = from, .end = to});
  };
  uint64_t at = begin;
  for (const BlockRange& part : RangesOf(map, begin, end)) {
    fill(at, part.shard_begin);
    AppendBox(map.shape, map.blocks[part.block], tensor_state, part.begin, part.end, ranges);
    at = part.shard_begin + (part.end - part.begin);
  }
  fill(at, end);
}

}  // namespace holdfast::converter
