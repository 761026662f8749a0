#include "checkpoint/replicas.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "format/image.h"

namespace holdfast {
namespace {

// A part of a replica on its way to its place.
struct Part {
  uint32_t place = 0;  // index into Replicas::places
  Segment segment;
};

}  // namespace

std::span<const PlacedPiece> Replicas::PlacesOf(size_t replica) const {
  const size_t first = replicas[replica].first_place;
  const size_t last =
      replica + 1 < replicas.size() ? replicas[replica + 1].first_place : places.size();
  return std::span(places).subspan(first, last - first);
}

absl::StatusOr<Replicas> PlaceReplicas(const RankShare& share,
                                       const std::vector<TensorState>& tensor_states,
                                       std::span<const uint64_t> stored_offsets,
                                       std::span<const uint32_t> group_of_buffer,
                                       uint64_t begin_bytes, std::vector<ExtraCopy>& extra) {
  CHECK(stored_offsets.size() == share.stored.segments.size());
  CHECK(group_of_buffer.size() == share.stored.buffers.size());
  Replicas result;
  result.holder_sets = share.holder_sets;
  std::vector<Part> parts;
  for (const Replica& replica : share.replicas) {
    const Segment& segment = replica.segment;
    const Piece& piece = segment.piece;
    const uint64_t element_bytes = ElementBytes(tensor_states[piece.tensor_state].dtype);
    const auto number = static_cast<uint32_t>(result.replicas.size());
    result.replicas.push_back(
        {piece, replica.holders, static_cast<uint32_t>(result.places.size())});
    const auto add = [&](uint64_t begin, uint64_t end, uint64_t image_offset_bytes) {
      PlacedPiece placed{piece, image_offset_bytes};
      placed.piece.begin = begin;
      placed.piece.end = end;
      result.places.push_back(placed);
      result.replica_of_place.push_back(number);
    };
    const auto add_extra = [&](uint64_t begin, uint64_t end) {
      if (begin == end) return;
      parts.push_back({static_cast<uint32_t>(result.places.size()),
                       PartOf(segment, begin - piece.begin, end - piece.begin, element_bytes)});
      add(begin, end, 0);
    };
    add_extra(piece.begin, replica.written_begin);
    if (replica.written_begin < replica.written_end) {
      const Piece& stored = share.stored.segments[replica.stored].piece;
      CHECK(stored.tensor_state == piece.tensor_state && stored.box == piece.box &&
            stored.begin <= replica.written_begin && replica.written_end <= stored.end);
      add(replica.written_begin, replica.written_end,
          stored_offsets[replica.stored] + (replica.written_begin - stored.begin) * element_bytes);
    }
    add_extra(replica.written_end, piece.end);
  }

  std::stable_sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) {
    return group_of_buffer[a.segment.buffer] < group_of_buffer[b.segment.buffer];
  });
  uint64_t at = begin_bytes;
  for (const Part& part : parts) {
    PlacedPiece& placed = result.places[part.place];
    placed.image_offset_bytes = at;
    extra.push_back({part.segment, at});
    const uint64_t bytes =
        placed.piece.ElementCount() * ElementBytes(tensor_states[placed.piece.tensor_state].dtype);
    if (at > kImageBytesMax || bytes > kImageBytesMax - at) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "image and extra copies (copies = all): expected at most %d bytes, found more",
          kImageBytesMax));
    }
    at += (bytes + kImageAlignmentBytes - 1) / kImageAlignmentBytes * kImageAlignmentBytes;
  }
  return result;
}

}  // namespace holdfast
