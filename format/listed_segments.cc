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

constexpr size_t kCopiesMax = 4'000'000;  // of a document: segments times their ranks

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

// Where the box lies. The strides are 0 only where there is one element.
absl::StatusOr<ListedAddress> ParseAddress(const JsonValue& value, const BoxKey& box,
                                           const TensorState& tensor_state,
                                           const std::string& buffer, PlacementParser& placements) {
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  ListedAddress address;
  std::string name = buffer;
  if (value.Find("buffer").present()) {
    ASSIGN_OR_RETURN(name, ParseLayoutName(value, "buffer"));
  }
  address.buffer = placements.InternBuffer(name);
  const JsonValue offset = value.Find("offset_bytes");
  if (offset.present()) {
    ASSIGN_OR_RETURN(address.offset_bytes, offset.Uint64());
    if (address.offset_bytes > kTensorBytesMax) return offset.Mismatch("at most 2^62 bytes");
  }
  const JsonValue strides = value.Find("strides");
  if (!strides.present()) return address;
  ASSIGN_OR_RETURN(address.strides_bytes,
                   Numbers(strides, box.second.size(), "strides, one for each dimension"));
  uint64_t last = 0;  // element, of the box's last one
  for (size_t d = 0; d < box.second.size(); ++d) {
    const uint64_t steps = box.second[d] - 1;
    if (steps > 0 && address.strides_bytes[d] == 0) {
      return strides[d].Mismatch("at least 1, in elements");
    }
    if (steps > 0 && address.strides_bytes[d] > (kTensorBytesMax / element_bytes - last) / steps) {
      return strides.Mismatch("that the last element lies below 2^62 bytes");
    }
    last += steps * address.strides_bytes[d];
    address.strides_bytes[d] *= element_bytes;
  }
  return address;
}

absl::Status CheckBoxes(const JsonValue& list, const TensorState& tensor_state,
                        const std::vector<ListedSegment>& segments) {
  BoxIndex index(tensor_state.shape.size());
  uint64_t elements = 0;
  for (uint32_t i = 0; i < segments.size(); ++i) {
    ElementBox box;
    box.dims = segments[i].lo.size();
    std::copy(segments[i].lo.begin(), segments[i].lo.end(), box.lo.begin());
    std::copy(segments[i].size.begin(), segments[i].size.end(), box.size.begin());
    elements += box.Volume();
    index.Add(box, i);
  }
  index.Build();
  const absl::StatusOr<BoxIndex::Overlap> overlap = index.FindOverlap(0);
  if (!overlap.ok()) return RefuseLayout(list, std::string(overlap.status().message()));
  if (overlap->has_value()) {
    const auto [a, b] = **overlap;
    return RefuseLayout(list,
                        absl::StrFormat("expected boxes that are equal or apart, found %s and %s",
                                        BoxText(segments[a].lo, segments[a].size),
                                        BoxText(segments[b].lo, segments[b].size)));
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
                                                PlacementParser& placements, size_t& copy_count) {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  ListedState state;
  std::map<BoxKey, std::vector<ListedSegment::Copy>> boxes;
  for (size_t i = 0; i < count; ++i) {
    const JsonValue value = list[i];
    RETURN_IF_ERROR(value.ExpectKeys(
        {"ranks", "where", "mesh", "lo", "size", "buffer", "offset_bytes", "strides"}));
    ASSIGN_OR_RETURN(BoxKey box, ParseBox(value, tensor_state));
    ASSIGN_OR_RETURN(ListedAddress address,
                     ParseAddress(value, box, tensor_state, buffer, placements));
    ASSIGN_OR_RETURN(const std::vector<uint32_t> ranks, placements.RanksOf(value));
    copy_count += ranks.size();
    if (copy_count > kCopiesMax) {
      return list.Mismatch(absl::StrFormat(
          "at most %d segments in the document, each counted once a rank", kCopiesMax));
    }
    std::vector<ListedSegment::Copy>& copies = boxes[std::move(box)];
    for (uint32_t rank : ranks) {
      copies.push_back({rank, static_cast<uint32_t>(state.addresses.size())});
    }
    state.addresses.push_back(std::move(address));
  }
  for (auto& [box, copies] : boxes) {
    std::stable_sort(copies.begin(), copies.end(),
                     [](const auto& a, const auto& b) { return a.rank < b.rank; });
    const auto twice =
        std::adjacent_find(copies.begin(), copies.end(),
                           [](const auto& a, const auto& b) { return a.rank == b.rank; });
    if (twice != copies.end()) {
      // Addresses are in the order of the list.
      return RefuseLayout(list[(twice + 1)->address],
                          absl::StrFormat("rank %d holds this box already", twice->rank));
    }
    state.segments.push_back({box.first, box.second, std::move(copies)});
  }
  RETURN_IF_ERROR(CheckBoxes(list, tensor_state, state.segments));
  return state;
}

}  // namespace holdfast
