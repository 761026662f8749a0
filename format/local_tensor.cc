#include "format/local_tensor.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {
namespace {

// Of a local tensor with padding: so places * element bytes never overflows. Without padding there
// are at most as many places as the tensor has elements.
constexpr uint64_t kPlacesMax = kTensorBytesMax / 8;

// Exact up to kTensorBytesMax, and greater above; 0 if any size is 0.
uint64_t Product(std::span<const uint64_t> sizes) {
  if (std::find(sizes.begin(), sizes.end(), uint64_t{0}) != sizes.end()) return 0;
  uint64_t product = 1;
  for (uint64_t size : sizes) {
    if (product > kTensorBytesMax / size) return kTensorBytesMax + 1;
    product *= size;
  }
  return product;
}

std::string SizesText(std::span<const uint64_t> sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) absl::StrAppend(&text, d ? ", " : "", sizes[d]);
  return text + "]";
}

// Neighbouring dimensions of two shapes of one volume that have the same product.
struct DimGroup {
  size_t from_begin = 0;
  size_t from_end = 0;
  size_t to_begin = 0;
  size_t to_end = 0;
};

// The shortest groups, in order. No size is 0.
std::vector<DimGroup> GroupDims(std::span<const uint64_t> from, std::span<const uint64_t> to) {
  std::vector<DimGroup> groups;
  size_t i = 0;
  size_t j = 0;
  while (i < from.size() || j < to.size()) {
    DimGroup group{i, i, j, j};
    uint64_t a = i < from.size() ? from[i++] : 1;
    uint64_t b = j < to.size() ? to[j++] : 1;
    while (a != b) {
      // Equal volumes: the smaller product is never at its end.
      if (a < b) {
        a *= from[i++];
      } else {
        b *= to[j++];
      }
    }
    group.from_end = i;
    group.to_end = j;
    groups.push_back(group);
  }
  return groups;
}

// `count` elements of a 1-D array from `first` on, at `place`, `place + stride`, ...
struct Run {
  uint64_t first = 0;
  uint64_t count = 1;
  uint64_t place = 0;
  uint64_t stride = 0;
};

// A box of dimensions `sizes`, with its strides among the places, as runs of the array that these
// dimensions are row-major. False: more than runs_max.
bool FlattenBox(std::span<const uint64_t> sizes, std::span<const uint64_t> lo,
                std::span<const uint64_t> count, std::span<const uint64_t> strides, size_t runs_max,
                std::vector<Run>& runs) {
  runs = {Run{}};
  uint64_t inner = 1;  // elements per step of the dimension
  for (size_t d = sizes.size(); d-- > 0; inner *= sizes[d]) {
    Run& only = runs[0];
    const bool spans = runs.size() == 1 && only.first == 0 && only.count == inner;
    if (count[d] == 1) {
      for (Run& run : runs) run.first += lo[d] * inner;
    } else if (spans && (inner == 1 || strides[d] == inner * only.stride)) {
      only.stride = inner == 1 ? strides[d] : only.stride;
      only.first = lo[d] * inner;
      only.count = count[d] * inner;
    } else {
      if (runs.size() > runs_max / count[d]) return false;
      std::vector<Run> all;
      all.reserve(runs.size() * count[d]);
      for (uint64_t x = 0; x < count[d]; ++x) {
        for (const Run& run : runs) {
          all.push_back(
              {run.first + (lo[d] + x) * inner, run.count, run.place + x * strides[d], run.stride});
        }
      }
      runs = std::move(all);
    }
  }
  return true;
}

}  // namespace

LocalTensor::LocalTensor(std::span<const uint64_t> shape) : dims_(shape.size()) {
  std::fill_n(lo_.begin(), shape.size(), uint64_t{0});
  std::copy(shape.begin(), shape.end(), size_.begin());
}

uint64_t LocalTensor::places() const {
  if (!held_) return 0;
  return flat_ ? end_ - begin_ : Product(sizes());
}

std::string LocalTensor::Apply(const PlacementOp& op, const Mesh& mesh,
                               std::span<const uint32_t> coordinates) {
  switch (op.kind) {
    case PlacementOp::Kind::kShard:
    case PlacementOp::Kind::kFlat:
      return Shard(op, mesh, coordinates);
    case PlacementOp::Kind::kPlace:
      held_ = held_ && std::binary_search(op.coordinates.begin(), op.coordinates.end(),
                                          coordinates[op.axes[0]]);
      return "";
    case PlacementOp::Kind::kView:
      return View(op);
    case PlacementOp::Kind::kPerm:
      return Perm(op);
    case PlacementOp::Kind::kPad:
      return Pad(op);
    case PlacementOp::Kind::kPack:
      break;
  }
  CHECK(false);
  return "";
}

std::string LocalTensor::Shard(const PlacementOp& op, const Mesh& mesh,
                               std::span<const uint32_t> coordinates) {
  if (op.kind == PlacementOp::Kind::kFlat) Flatten();
  const size_t dims = flat_ ? 1 : dims_;
  if (op.dim >= dims) {
    return absl::StrFormat(
        "expected a tensor with dimension %d to cut over axis %s, found %d "
        "dimensions",
        op.dim, AxesText(mesh, op.axes), dims);
  }
  if (!op.blocks.empty()) return ShardBlocks(op, mesh, coordinates);
  const uint64_t size = flat_ ? end_ - begin_ : size_[op.dim];
  const uint32_t count = mesh.SizeOf(op.axes);
  if (const std::string expected = CheckCut(op.rule, size, count); !expected.empty()) {
    const bool one_flat = flat_ || op.kind == PlacementOp::Kind::kFlat;
    return absl::StrFormat("expected %s in %s to cut over axis %s, found %d", expected,
                           one_flat ? "the flat range" : absl::StrCat("dimension ", op.dim),
                           AxesText(mesh, op.axes), size);
  }
  const auto [first, last] = Cut(op.rule, size, count, mesh.JointCoordinate(op.axes, coordinates));
  Narrow(op.dim, first, last);
  return "";
}

std::string LocalTensor::ShardBlocks(const PlacementOp& op, const Mesh& mesh,
                                     std::span<const uint32_t> coordinates) {
  KeepSteps();
  uint64_t sum = 0;  // at most 2^62 (the parser)
  for (uint64_t width : op.blocks) sum += width;
  if (sum != size_[op.dim]) {
    return absl::StrFormat("expected the sum of the blocks, %d elements, in dimension %d, found %d",
                           sum, op.dim, size_[op.dim]);
  }
  const uint32_t count = mesh.SizeOf(op.axes);
  const uint32_t coordinate = mesh.JointCoordinate(op.axes, coordinates);
  Step step{.kind = Step::Kind::kBlocks, .dim = op.dim};
  uint64_t begin = 0;
  uint64_t size = 0;
  for (size_t i = 0; i < op.blocks.size(); ++i) {
    const uint64_t width = op.blocks[i];
    if (const std::string expected = CheckCut(op.rule, width, count); !expected.empty()) {
      return absl::StrFormat(
          "expected %s in block %d of dimension %d to cut over axis %s, found %d", expected, i,
          op.dim, AxesText(mesh, op.axes), width);
    }
    const auto [first, last] = Cut(op.rule, width, count, coordinate);
    if (first < last) step.ranges.push_back({begin + first, last - first});
    begin += width;
    size += last - first;
  }
  size_[op.dim] = size;
  steps_.push_back(std::move(step));
  return "";
}

void LocalTensor::Narrow(size_t dim, uint64_t first, uint64_t last) {
  if (keeps_steps_) {
    steps_.push_back({.kind = Step::Kind::kSlice, .dim = dim, .first = first});
    size_[dim] = last - first;
  } else if (flat_) {
    end_ = begin_ + last;
    begin_ += first;
  } else {
    lo_[dim] += first;
    size_[dim] = last - first;
  }
}

void LocalTensor::Flatten() {
  if (flat_) return;
  if (!keeps_steps_) {
    end_ = Product(sizes());
    begin_ = 0;
    flat_ = true;
    return;
  }
  if (dims_ != 1) AddFlatView();
}

void LocalTensor::AddFlatView() {
  Step step{.kind = Step::Kind::kView};
  step.from.assign(sizes().begin(), sizes().end());
  step.to = {Product(sizes())};
  SetSizes(step.to);
  steps_.push_back(std::move(step));
}

void LocalTensor::SetSizes(std::span<const uint64_t> sizes) {
  dims_ = sizes.size();
  std::copy(sizes.begin(), sizes.end(), size_.begin());
}

// From a range of a box to the steps that make it.
void LocalTensor::KeepSteps() {
  if (keeps_steps_) return;
  keeps_steps_ = true;
  for (size_t d = 0; d < dims_; ++d) {
    steps_.push_back({.kind = Step::Kind::kSlice, .dim = d, .first = lo_[d]});
  }
  if (!flat_) return;
  flat_ = false;
  const uint64_t first = begin_;
  const uint64_t last = end_;
  AddFlatView();
  Narrow(0, first, last);
}

std::string LocalTensor::View(const PlacementOp& op) {
  KeepSteps();
  Step step{.kind = Step::Kind::kView};
  step.from.assign(sizes().begin(), sizes().end());
  step.to = op.view;
  const uint64_t volume = Product(step.from);
  const auto derived = std::find(step.to.begin(), step.to.end(), kDerivedSize);
  if (derived != step.to.end()) {
    *derived = 1;
    const uint64_t others = Product(step.to);
    if (others == 0 || volume % others != 0) {
      return absl::StrFormat(
          "expected a multiple of %d elements to derive a size of the view, found %d in %s", others,
          volume, SizesText(step.from));
    }
    *derived = volume / others;
  }
  if (Product(step.to) != volume) {
    return absl::StrFormat("expected %d elements, as the view %s has, found %d in %s",
                           Product(step.to), SizesText(step.to), volume, SizesText(step.from));
  }
  SetSizes(step.to);
  steps_.push_back(std::move(step));
  return "";
}

std::string LocalTensor::Perm(const PlacementOp& op) {
  KeepSteps();
  if (op.perm.size() != dims_) {
    return absl::StrFormat("expected %d dimensions, as the perm has, found %d", op.perm.size(),
                           dims_);
  }
  Step step{.kind = Step::Kind::kPerm};
  step.perm = op.perm;
  std::vector<uint64_t> sizes(dims_);
  for (size_t d = 0; d < dims_; ++d) sizes[d] = size_[op.perm[d]];
  SetSizes(sizes);
  steps_.push_back(std::move(step));
  return "";
}

std::string LocalTensor::Pad(const PlacementOp& op) {
  KeepSteps();
  if (op.dim >= dims_) {
    return absl::StrFormat("expected a tensor with dimension %d to pad, found %d dimensions",
                           op.dim, dims_);
  }
  const uint64_t size = size_[op.dim];
  const uint64_t least = std::max(size, op.pad_size_min);
  const uint64_t multiples = least / op.pad_multiple + (least % op.pad_multiple != 0 ? 1 : 0);
  if (multiples > kPlacesMax / op.pad_multiple) {
    return absl::StrFormat(
        "expected at most 2^59 places with the padding, found more in dimension "
        "%d",
        op.dim);
  }
  size_[op.dim] = multiples * op.pad_multiple;
  if (Product(sizes()) > kPlacesMax) return "expected at most 2^59 places with the padding";
  steps_.push_back({.kind = Step::Kind::kPad, .dim = op.dim, .size = size});
  return "";
}

uint64_t LocalTensor::ElementCount(uint64_t begin, uint64_t end) const {
  if (!keeps_steps_) return end - begin;
  std::vector<LocalPart> parts;
  CHECK(PartsOf(begin, end, kLocalPartsMax * 64, parts));  // as in format/layout.cc
  uint64_t elements = 0;
  for (const LocalPart& part : parts) elements += part.ElementCount();
  return elements;
}

bool LocalTensor::PartsOf(uint64_t begin, uint64_t end, size_t parts_max,
                          std::vector<LocalPart>& out, uint64_t* work) const {
  CHECK(begin <= end && end <= places());
  if (begin == end) return true;
  if (!keeps_steps_) {
    LocalPart part;
    part.box.dims = dims_;
    std::copy_n(lo_.begin(), dims_, part.box.lo.begin());
    std::copy_n(size_.begin(), dims_, part.box.size.begin());
    part.begin = begin_ + begin;
    part.end = begin_ + end;
    part.place = begin;
    out.push_back(part);
    return true;
  }
  // Row-major strides of the local tensor itself.
  Coordinates strides;
  uint64_t stride = 1;
  for (size_t d = dims_; d-- > 0; stride *= size_[d]) strides[d] = stride;
  const Coordinates zeros = {};
  std::vector<ElementBox> cut;
  CutIntoBoxes({{zeros.data(), dims_}, sizes()}, begin, end, cut);
  std::vector<Strided> boxes;
  for (const ElementBox& box : cut) {
    Strided strided{box, 0, strides};
    for (size_t d = 0; d < dims_; ++d) strided.place += box.lo[d] * strides[d];
    boxes.push_back(strided);
  }
  uint64_t boxes_seen = 0;
  bool fits = true;
  for (size_t i = steps_.size(); fits && i-- > 0;) {
    fits = LeadBack(steps_[i], parts_max, boxes, boxes_seen);
  }
  if (work != nullptr) *work += boxes_seen;
  if (!fits) return false;
  for (const Strided& strided : boxes) {
    LocalPart part;
    part.box = strided.box;
    part.end = strided.box.Volume();
    part.place = strided.place;
    part.strides = strided.strides;
    uint64_t expected = 1;
    for (size_t d = part.box.dims; d-- > 0; expected *= part.box.size[d]) {
      part.contiguous = part.contiguous && (part.box.size[d] == 1 || part.strides[d] == expected);
    }
    out.push_back(part);
  }
  return true;
}

// Replaces `boxes` by what they were before the step; drops padding. False: more than parts_max.
bool LocalTensor::LeadBack(const Step& step, size_t parts_max, std::vector<Strided>& boxes,
                           uint64_t& work) {
  std::vector<Strided> out;
  out.reserve(boxes.size());
  for (Strided& strided : boxes) {
    work += 1 + step.ranges.size();
    switch (step.kind) {
      case Step::Kind::kSlice:
        strided.box.lo[step.dim] += step.first;
        out.push_back(strided);
        break;
      case Step::Kind::kBlocks: {
        const uint64_t lo = strided.box.lo[step.dim];
        const uint64_t hi = lo + strided.box.size[step.dim];
        uint64_t at = 0;  // of the range, in what the step made
        for (const Range& range : step.ranges) {
          const uint64_t first = std::max(lo, at);
          const uint64_t last = std::min(hi, at + range.size);
          if (first < last) {
            Strided part = strided;
            part.box.lo[step.dim] = range.first + (first - at);
            part.box.size[step.dim] = last - first;
            part.place += (first - lo) * strided.strides[step.dim];
            out.push_back(part);
          }
          at += range.size;
        }
        break;
      }
      case Step::Kind::kPerm: {
        Strided before = strided;
        for (size_t d = 0; d < step.perm.size(); ++d) {
          before.box.lo[step.perm[d]] = strided.box.lo[d];
          before.box.size[step.perm[d]] = strided.box.size[d];
          before.strides[step.perm[d]] = strided.strides[d];
        }
        out.push_back(before);
        break;
      }
      case Step::Kind::kPad: {
        uint64_t& size = strided.box.size[step.dim];
        const uint64_t lo = strided.box.lo[step.dim];
        if (lo >= step.size) break;
        size = std::min(size, step.size - lo);
        out.push_back(strided);
        break;
      }
      case Step::Kind::kView:
        if (!LeadViewBack(step, strided, parts_max, out, work)) return false;
        break;
    }
    if (out.size() > parts_max) return false;
  }
  boxes = std::move(out);
  return true;
}

bool LocalTensor::LeadViewBack(const Step& step, const Strided& box, size_t parts_max,
                               std::vector<Strided>& out, uint64_t& work) {
  std::vector<Strided> done(1);  // all groups so far; coordinates of `from`
  done[0].place = box.place;
  done[0].box.dims = step.from.size();
  for (const DimGroup& group : GroupDims(step.from, step.to)) {
    const size_t count = group.to_end - group.to_begin;
    std::vector<Run> runs;
    if (!FlattenBox(std::span(step.to).subspan(group.to_begin, count),
                    {box.box.lo.data() + group.to_begin, count},
                    {box.box.size.data() + group.to_begin, count},
                    {box.strides.data() + group.to_begin, count}, parts_max, runs)) {
      return false;
    }
    const std::span<const uint64_t> sizes =
        std::span(step.from).subspan(group.from_begin, group.from_end - group.from_begin);
    const std::vector<uint64_t> zeros(sizes.size(), 0);
    std::vector<Strided> next;
    for (const Run& run : runs) {
      std::vector<ElementBox> cut;
      CutIntoBoxes({zeros, sizes}, run.first, run.first + run.count, cut);
      if (done.size() * cut.size() > parts_max - std::min(parts_max, next.size())) return false;
      for (const Strided& before : done) {
        for (const ElementBox& part : cut) {
          Strided joined = before;
          uint64_t first = 0;  // of the part, in the group's array
          for (size_t d = 0; d < sizes.size(); ++d) first = first * sizes[d] + part.lo[d];
          joined.place += run.place + (first - run.first) * run.stride;
          uint64_t stride = run.stride;
          for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) {
            joined.box.lo[group.from_begin + d] = part.lo[d];
            joined.box.size[group.from_begin + d] = part.size[d];
            joined.strides[group.from_begin + d] = stride;
          }
          next.push_back(joined);
        }
      }
    }
    done = std::move(next);
    work += runs.size() + done.size();
  }
  out.insert(out.end(), done.begin(), done.end());
  return out.size() <= parts_max;
}

std::string AxesText(const Mesh& mesh, std::span<const uint32_t> axes) {
  std::string text;
  for (uint32_t axis : axes) {
    absl::StrAppend(&text, text.empty() ? "" : " x ", "\"", mesh.axes[axis].name, "\"");
  }
  return text;
}

LocalTensor TryEvaluate(const LayoutProgram& program, const Placement& placement,
                        std::span<const uint64_t> shape, std::span<const uint32_t> coordinates,
                        std::string& misfit) {
  const Mesh& mesh = program.MeshOf(placement);
  LocalTensor local(shape);
  for (const PlacementOp& op : placement.ops) {
    if (op.kind == PlacementOp::Kind::kPack) break;  // always the last one
    misfit = local.Apply(op, mesh, coordinates);
    if (!misfit.empty()) break;
  }
  return local;
}

LocalTensor Evaluate(const LayoutProgram& program, const Placement& placement,
                     std::span<const uint64_t> shape, std::span<const uint32_t> coordinates) {
  std::string misfit;
  LocalTensor local = TryEvaluate(program, placement, shape, coordinates, misfit);
  CHECK(misfit.empty());
  return local;
}

}  // namespace holdfast
