#include "format/planner_geometry.h"

#include <algorithm>
#include <numeric>
#include <utility>

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

void AppendRuns(const ElementBox& box, const Affine& image, const Affine& buffer,
                uint64_t element_bytes, const CopyOp& numbers, std::vector<CopyOp>& out) {
  struct Loop {
    uint64_t count;
    uint64_t image_stride;
    uint64_t buffer_stride;
  };
  // Inner loops first. A loop that goes on where the one inside it ends is one loop with it.
  std::vector<Loop> loops;
  uint64_t run = element_bytes;
  for (size_t d = box.dims; d-- > 0;) {
    if (box.size[d] == 1) continue;
    const Loop loop{box.size[d], image.strides[d], buffer.strides[d]};
    if (loops.empty() && loop.image_stride == run && loop.buffer_stride == run) {
      run *= loop.count;
    } else if (!loops.empty() &&
               loop.image_stride == loops.back().image_stride * loops.back().count &&
               loop.buffer_stride == loops.back().buffer_stride * loops.back().count) {
      loops.back().count *= loop.count;
    } else {
      loops.push_back(loop);
    }
  }
  const std::span<const uint64_t> corner(box.lo.data(), box.dims);
  CopyOp op = numbers;
  op.run_bytes = run;
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

BoxIndex::BoxIndex(std::vector<ElementBox> boxes, std::vector<uint32_t> numbers)
    : boxes_(std::move(boxes)), numbers_(std::move(numbers)), order_(boxes_.size()) {
  std::iota(order_.begin(), order_.end(), 0u);
  if (!boxes_.empty()) Build(0, static_cast<uint32_t>(boxes_.size()));
}

uint32_t BoxIndex::Build(uint32_t begin, uint32_t end) {
  const uint32_t index = static_cast<uint32_t>(nodes_.size());
  Node node;
  node.begin = begin;
  node.end = end;
  node.bounds = boxes_[order_[begin]];
  size_t widest = 0;
  uint64_t widest_spread = 0;
  for (size_t d = 0; d < node.bounds.dims; ++d) {
    uint64_t low = UINT64_MAX;
    uint64_t low_max = 0;
    uint64_t high = 0;
    for (uint32_t i = begin; i < end; ++i) {
      const ElementBox& box = boxes_[order_[i]];
      low = std::min(low, box.lo[d]);
      low_max = std::max(low_max, box.lo[d]);
      high = std::max(high, box.lo[d] + box.size[d]);
    }
    node.bounds.lo[d] = low;
    node.bounds.size[d] = high - low;
    if (low_max - low > widest_spread) {
      widest_spread = low_max - low;
      widest = d;
    }
  }
  nodes_.push_back(node);
  if (end - begin <= kLeafBoxesMax || widest_spread == 0) return index;
  const uint32_t middle = begin + (end - begin) / 2;
  std::nth_element(order_.begin() + begin, order_.begin() + middle, order_.begin() + end,
                   [&](uint32_t a, uint32_t b) {
                     return boxes_[a].lo[widest] != boxes_[b].lo[widest]
                                ? boxes_[a].lo[widest] < boxes_[b].lo[widest]
                                : a < b;
                   });
  Build(begin, middle);
  const uint32_t right = Build(middle, end);
  nodes_[index].right = right;
  return index;
}

void BoxIndex::Visit(const ElementBox& box,
                     const std::function<void(uint32_t, const ElementBox&)>& visit) const {
  if (nodes_.empty()) return;
  std::vector<uint32_t> open = {0};
  while (!open.empty()) {
    const uint32_t index = open.back();
    open.pop_back();
    const Node& node = nodes_[index];
    if (Intersect(box, node.bounds.View()).Volume() == 0) continue;
    if (node.right != 0) {
      open.push_back(node.right);
      open.push_back(index + 1);
      continue;
    }
    for (uint32_t i = node.begin; i < node.end; ++i) {
      const ElementBox both = Intersect(box, boxes_[order_[i]].View());
      if (both.Volume() > 0) visit(numbers_[order_[i]], both);
    }
  }
}

}  // namespace holdfast
