#include "format/planner_geometry.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {
namespace {

constexpr uint32_t kLeafBoxesMax = 4;

// Elements [begin, end) of the row-major order of dimensions d.. of `box`; those before d are fixed
// in `prefix`.
void CutFrom(size_t d, BoxView box, uint64_t begin, uint64_t end, ElementBox prefix,
             std::vector<ElementBox>& out) {
  if (begin >= end) return;
  const size_t dims = box.size.size();
  if (d == dims) {
    out.push_back(prefix);
    return;
  }
  uint64_t row = 1;  // elements of one index of dimension d
  for (size_t i = d + 1; i < dims; ++i) row *= box.size[i];
  const auto rows = [&](uint64_t first, uint64_t count) {
    prefix.lo[d] = box.lo[d] + first;
    prefix.size[d] = count;
  };
  uint64_t first = begin / row;
  const uint64_t last = end / row;
  if (first == last) {
    rows(first, 1);
    return CutFrom(d + 1, box, begin % row, end % row, prefix, out);
  }
  if (begin % row != 0) {
    rows(first, 1);
    CutFrom(d + 1, box, begin % row, row, prefix, out);
    ++first;
  }
  if (first < last) {
    rows(first, last - first);
    for (size_t i = d + 1; i < dims; ++i) {
      prefix.lo[i] = box.lo[i];
      prefix.size[i] = box.size[i];
    }
    out.push_back(prefix);
  }
  if (end % row != 0) {
    rows(last, 1);
    CutFrom(d + 1, box, 0, end % row, prefix, out);
  }
}

}  // namespace

uint64_t ElementBox::Volume() const {
  uint64_t volume = 1;
  for (size_t d = 0; d < dims; ++d) volume *= size[d];
  return volume;
}

ElementBox Intersect(const ElementBox& a, BoxView b) {
  ElementBox both;
  both.dims = a.dims;
  for (size_t d = 0; d < a.dims; ++d) {
    const uint64_t begin = std::max(a.lo[d], b.lo[d]);
    const uint64_t end = std::min(a.lo[d] + a.size[d], b.lo[d] + b.size[d]);
    both.lo[d] = begin;
    both.size[d] = end > begin ? end - begin : 0;
  }
  return both;
}

void CutIntoBoxes(BoxView box, uint64_t begin, uint64_t end, std::vector<ElementBox>& out) {
  ElementBox prefix;
  prefix.dims = box.size.size();
  CutFrom(0, box, begin, end, prefix, out);
}

uint64_t Affine::At(std::span<const uint64_t> x) const {
  uint64_t at = offset;
  for (size_t d = 0; d < x.size(); ++d) at += x[d] * strides[d];
  return at;
}

Affine RowMajor(BoxView box, uint64_t begin, uint64_t offset_bytes, uint64_t element_bytes) {
  Affine affine;
  uint64_t stride = element_bytes;
  affine.offset = offset_bytes - begin * element_bytes;
  for (size_t d = box.size.size(); d-- > 0;) {
    affine.strides[d] = stride;
    affine.offset -= box.lo[d] * stride;
    stride *= box.size[d];
  }
  return affine;
}

namespace {

// Of the copy of a box: nested loops around a run of bytes.
struct Loop {
  uint64_t count;
  uint64_t image_stride;
  uint64_t buffer_stride;
};
struct Loops {
  uint64_t run_bytes = 0;
  std::vector<Loop> loops;  // inner ones first
};

// A loop that goes on where the one inside it ends is one loop with it.
Loops LoopsOf(const ElementBox& box, const Affine& image, const Affine& buffer,
              uint64_t element_bytes) {
  Loops all;
  all.run_bytes = element_bytes;
  std::vector<Loop>& loops = all.loops;
  for (size_t d = box.dims; d-- > 0;) {
    if (box.size[d] == 1) continue;
    const Loop loop{box.size[d], image.strides[d], buffer.strides[d]};
    if (loops.empty() && loop.image_stride == all.run_bytes &&
        loop.buffer_stride == all.run_bytes) {
      all.run_bytes *= loop.count;
    } else if (!loops.empty() &&
               loop.image_stride == loops.back().image_stride * loops.back().count &&
               loop.buffer_stride == loops.back().buffer_stride * loops.back().count) {
      loops.back().count *= loop.count;
    } else {
      loops.push_back(loop);
    }
  }
  return all;
}

}  // namespace

uint64_t CountRuns(const ElementBox& box, const Affine& image, const Affine& buffer,
                   uint64_t element_bytes) {
  const Loops all = LoopsOf(box, image, buffer, element_bytes);
  uint64_t count = 1;
  // The innermost loop is the count of an op.
  for (size_t i = 1; i < all.loops.size(); ++i) count *= all.loops[i].count;
  return count;
}

void AppendRuns(const ElementBox& box, const Affine& image, const Affine& buffer,
                uint64_t element_bytes, const CopyOp& numbers, std::vector<CopyOp>& out) {
  const Loops all = LoopsOf(box, image, buffer, element_bytes);
  const std::vector<Loop>& loops = all.loops;
  const std::span<const uint64_t> corner(box.lo.data(), box.dims);
  CopyOp op = numbers;
  op.run_bytes = all.run_bytes;
  op.count = 1;
  op.image_stride_bytes = 0;
  op.buffer_stride_bytes = 0;
  size_t outer_begin = 0;
  if (!loops.empty()) {
    op.count = loops[0].count;
    op.image_stride_bytes = loops[0].image_stride;
    op.buffer_stride_bytes = loops[0].buffer_stride;
    outer_begin = 1;
  }
  op.image_offset_bytes = image.At(corner);
  op.buffer_offset_bytes = buffer.At(corner);
  // An odometer over the other loops; the inner ones turn first.
  std::vector<uint64_t> turns(loops.size(), 0);
  for (;;) {
    out.push_back(op);
    size_t i = outer_begin;
    for (; i < loops.size(); ++i) {
      op.image_offset_bytes += loops[i].image_stride;
      op.buffer_offset_bytes += loops[i].buffer_stride;
      if (++turns[i] < loops[i].count) break;
      op.image_offset_bytes -= loops[i].image_stride * loops[i].count;
      op.buffer_offset_bytes -= loops[i].buffer_stride * loops[i].count;
      turns[i] = 0;
    }
    if (i >= loops.size()) return;
  }
}

void BoxIndex::Add(const ElementBox& box, uint32_t number) {
  CHECK(box.dims == dims_ && nodes_.empty() && numbers_.size() < UINT32_MAX);
  values_.insert(values_.end(), box.lo.begin(), box.lo.begin() + dims_);
  values_.insert(values_.end(), box.size.begin(), box.size.begin() + dims_);
  numbers_.push_back(number);
}

void BoxIndex::Build() {
  order_.resize(numbers_.size());
  std::iota(order_.begin(), order_.end(), 0u);
  if (!order_.empty()) BuildNode(0, static_cast<uint32_t>(order_.size()));
}

uint32_t BoxIndex::BuildNode(uint32_t begin, uint32_t end) {
  const uint32_t index = static_cast<uint32_t>(nodes_.size());
  nodes_.push_back({begin, end, 0});
  bounds_.resize(bounds_.size() + 2 * dims_);
  uint64_t* const bounds = bounds_.data() + index * 2 * dims_;
  size_t widest = 0;
  uint64_t widest_spread = 0;
  for (size_t d = 0; d < dims_; ++d) {
    uint64_t low = UINT64_MAX;
    uint64_t low_max = 0;
    uint64_t high = 0;
    for (uint32_t i = begin; i < end; ++i) {
      const uint64_t* const box = Lo(order_[i]);
      low = std::min(low, box[d]);
      low_max = std::max(low_max, box[d]);
      high = std::max(high, box[d] + box[dims_ + d]);
    }
    bounds[d] = low;
    bounds[dims_ + d] = high - low;
    if (low_max - low > widest_spread) {
      widest_spread = low_max - low;
      widest = d;
    }
  }
  if (end - begin <= kLeafBoxesMax || widest_spread == 0) return index;
  const uint32_t middle = begin + (end - begin) / 2;
  std::nth_element(order_.begin() + begin, order_.begin() + middle, order_.begin() + end,
                   [&](uint32_t a, uint32_t b) {
                     const uint64_t x = Lo(a)[widest];
                     const uint64_t y = Lo(b)[widest];
                     return x != y ? x < y : a < b;
                   });
  BuildNode(begin, middle);
  const uint32_t right = BuildNode(middle, end);
  nodes_[index].right = right;
  return index;
}

ElementBox BoxIndex::BoxAt(uint32_t box) const {
  ElementBox result;
  result.dims = dims_;
  std::copy_n(Lo(box), dims_, result.lo.begin());
  std::copy_n(Lo(box) + dims_, dims_, result.size.begin());
  return result;
}

bool BoxIndex::Intersects(const ElementBox& box, const uint64_t* other, ElementBox& both) const {
  for (size_t d = 0; d < dims_; ++d) {
    const uint64_t begin = std::max(box.lo[d], other[d]);
    const uint64_t end = std::min(box.lo[d] + box.size[d], other[d] + other[dims_ + d]);
    if (begin >= end) return false;
    both.lo[d] = begin;
    both.size[d] = end - begin;
  }
  return true;
}

uint64_t BoxIndex::Visit(const ElementBox& box,
                         const std::function<void(uint32_t, const ElementBox&)>& visit) const {
  if (nodes_.empty()) return 0;
  uint64_t steps = 0;
  ElementBox both;
  both.dims = dims_;
  std::vector<uint32_t> open = {0};
  while (!open.empty()) {
    const uint32_t index = open.back();
    open.pop_back();
    const Node& node = nodes_[index];
    ++steps;
    if (!Intersects(box, bounds_.data() + index * 2 * dims_, both)) continue;
    if (node.right != 0) {
      open.push_back(node.right);
      open.push_back(index + 1);
      continue;
    }
    for (uint32_t i = node.begin; i < node.end; ++i) {
      ++steps;
      if (Intersects(box, Lo(order_[i]), both)) visit(numbers_[order_[i]], both);
    }
  }
  return steps;
}

absl::StatusOr<BoxIndex::Overlap> BoxIndex::FindOverlap(uint32_t first_number) const {
  const uint64_t steps_max = kStepsMin + kStepsOfBoxMax * size();
  uint64_t steps = 0;
  for (uint32_t i = 0; i < size(); ++i) {
    const uint32_t number = numbers_[i];
    if (number < first_number) continue;
    uint32_t other = number;
    steps += Visit(BoxAt(i), [&](uint32_t each, const ElementBox&) {
      if (each != number) other = each;
    });
    if (other != number) return Overlap({number, other});
    if (steps > steps_max) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "expected to see within %d steps whether %d boxes overlap: they are long, "
          "thin, and lie across each other",
          steps_max, size()));
    }
  }
  return Overlap();
}

}  // namespace holdfast
