#include "format/listed_segments.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "format/planner_geometry.h"

namespace holdfast {
namespace {

constexpr size_t kCopiesMax = 16'000'000;  // of one tensor state: segments times their ranks

using BoxKey = std::pair<std::vector<uint64_t>, std::vector<uint64_t>>;  // lo, size

std::string BoxText(const std::vector<uint64_t>& lo, const std::vector<uint64_t>& size) {
  std::string text = "[";
  for (size_t d = 0; d < lo.size(); ++d) {
    absl::StrAppend(&text, d ? ", " : "", lo[d], ":", lo[d] + size[d]);
  }
  return text + "]";
}

absl::StatusOr<std::vector<uint64_t>> Numbers(const JsonValue& list, size_t count,
                                              const std::string& what) {
  ASSIGN_OR_RETURN(const size_t found, list.ArraySize());
  if (found != count) return list.Mismatch(absl::StrFormat("%d %s", count, what));
  std::vector<uint64_t> numbers(count);
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(numbers[i], list[i].Uint64());
    if (numbers[i] > kTensorBytesMax) return list[i].Mismatch("at most 2^62");
  }
  return numbers;
}

absl::StatusOr<BoxKey> ParseBox(const JsonValue& value, const TensorState& tensor_state) {
  const size_t dims = tensor_state.shape.size();
  BoxKey box;
  ASSIGN_OR_RETURN(const JsonValue lo, value.Get("lo"));
  ASSIGN_OR_RETURN(box.first, Numbers(lo, dims, "numbers, one for each dimension"));
  ASSIGN_OR_RETURN(const JsonValue size, value.Get("size"));
  ASSIGN_OR_RETURN(box.second, Numbers(size, dims, "sizes, one for each dimension"));
  for (size_t d = 0; d < dims; ++d) {
    if (box.second[d] < 1 || box.first[d] > tensor_state.shape[d] ||
        box.second[d] > tensor_state.shape[d] - box.first[d]) {
      return RefuseLayout(value, absl::StrFormat("expected a box that is not empty within %d "
                                                 "elements of dimension %d, found [%d, %d + %d)",
                                                 tensor_state.shape[d], d, box.first[d],
                                                 box.first[d], box.second[d]));
    }
  }
  return box;
}

// Where the box lies; of the rank nothing is set. The strides are 0 only where there is one
// element.
absl::StatusOr<ListedSegment::Copy> ParseAddress(const JsonValue& value, const BoxKey& box,
                                                 const TensorState& tensor_state,
                                                 const std::string& buffer,
                                                 PlacementParser& placements) {
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  ListedSegment::Copy copy;
  std::string name = buffer;
  if (value.Find("buffer").present()) {
    ASSIGN_OR_RETURN(name, ParseLayoutName(value, "buffer"));
  }
  copy.buffer = placements.InternBuffer(name);
  const JsonValue offset = value.Find("offset_bytes");
  if (offset.present()) {
    ASSIGN_OR_RETURN(copy.offset_bytes, offset.Uint64());
    if (copy.offset_bytes > kTensorBytesMax) return offset.Mismatch("at most 2^62 bytes");
  }
  const JsonValue strides = value.Find("strides");
  if (!strides.present()) return copy;
  ASSIGN_OR_RETURN(copy.strides_bytes,
                   Numbers(strides, box.second.size(), "strides, one for each dimension"));
  uint64_t last = 0;  // element, of the box's last one
  for (size_t d = 0; d < box.second.size(); ++d) {
    const uint64_t steps = box.second[d] - 1;
    if (steps > 0 && copy.strides_bytes[d] == 0) {
      return strides[d].Mismatch("at least 1, in elements");
    }
    if (steps > 0 && copy.strides_bytes[d] > (kTensorBytesMax / element_bytes - last) / steps) {
      return strides.Mismatch("that the last element lies below 2^62 bytes");
    }
    last += steps * copy.strides_bytes[d];
    copy.strides_bytes[d] *= element_bytes;
  }
  return copy;
}

absl::Status CheckBoxes(const JsonValue& list, const TensorState& tensor_state,
                        const std::vector<ListedSegment>& segments) {
  std::vector<ElementBox> boxes;
  std::vector<uint32_t> numbers;
  uint64_t elements = 0;
  for (const ListedSegment& segment : segments) {
    ElementBox box;
    box.dims = segment.lo.size();
    std::copy(segment.lo.begin(), segment.lo.end(), box.lo.begin());
    std::copy(segment.size.begin(), segment.size.end(), box.size.begin());
    elements += box.Volume();
    numbers.push_back(static_cast<uint32_t>(boxes.size()));
    boxes.push_back(box);
  }
  const BoxIndex index(boxes, numbers);
  for (uint32_t i = 0; i < boxes.size(); ++i) {
    uint32_t other = i;
    index.Visit(boxes[i], [&](uint32_t number, const ElementBox&) {
      if (number != i) other = number;
    });
    if (other == i) continue;
    return RefuseLayout(list,
                        absl::StrFormat("expected boxes that are equal or apart, found %s and %s",
                                        BoxText(segments[i].lo, segments[i].size),
                                        BoxText(segments[other].lo, segments[other].size)));
  }
  // Disjoint: so a sum that is too small is all that can be wrong.
  if (elements != tensor_state.ElementCount()) {
    return RefuseLayout(list, absl::StrFormat("expected boxes of all %d elements, found %d",
                                              tensor_state.ElementCount(), elements));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ListedState> ParseListedSegments(const JsonValue& list,
                                                const TensorState& tensor_state,
                                                const std::string& buffer,
                                                PlacementParser& placements) {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  std::map<BoxKey, std::map<uint32_t, ListedSegment::Copy>> boxes;
  size_t copies = 0;
  for (size_t i = 0; i < count; ++i) {
    const JsonValue value = list[i];
    RETURN_IF_ERROR(value.ExpectKeys(
        {"ranks", "where", "mesh", "lo", "size", "buffer", "offset_bytes", "strides"}));
    ASSIGN_OR_RETURN(BoxKey box, ParseBox(value, tensor_state));
    ASSIGN_OR_RETURN(ListedSegment::Copy copy,
                     ParseAddress(value, box, tensor_state, buffer, placements));
    ASSIGN_OR_RETURN(const std::vector<uint32_t> ranks, placements.RanksOf(value));
    copies += ranks.size();
    if (copies > kCopiesMax) {
      return list.Mismatch(
          absl::StrFormat("at most %d segments, each counted once a rank", kCopiesMax));
    }
    std::map<uint32_t, ListedSegment::Copy>& of_box = boxes[std::move(box)];
    for (uint32_t rank : ranks) {
      copy.rank = rank;
      if (!of_box.emplace(rank, copy).second) {
        return RefuseLayout(value, absl::StrFormat("rank %d holds this box already", rank));
      }
    }
  }
  ListedState state;
  for (auto& [box, of_box] : boxes) {
    ListedSegment& segment = state.segments.emplace_back();
    segment.lo = box.first;
    segment.size = box.second;
    for (auto& [rank, copy] : of_box) segment.copies.push_back(std::move(copy));
  }
  RETURN_IF_ERROR(CheckBoxes(list, tensor_state, state.segments));
  return state;
}

}  // namespace holdfast
