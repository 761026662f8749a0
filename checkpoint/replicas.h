// The replicated segments of a rank whose every holder captures its replica (copies = all), and
// where their bytes lie in the rank's slot: the part that this rank writes for all of them in its
// image, the rest, the extra copies, in blocks behind it, which stay in memory and are never
// flushed. docs/decisions/0007-extra-copies.md says why.
//
// Who compares them: checkpoint/replica_vote.h.
#ifndef HOLDFAST_CHECKPOINT_REPLICAS_H_
#define HOLDFAST_CHECKPOINT_REPLICAS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "format/image_fingerprints.h"
#include "format/layout.h"
#include "format/writer_assignment.h"

namespace holdfast {

// One segment that several ranks hold. The n-th with these holders is, on every one of them, of the
// same elements in the same order (format/writer_assignment.h).
struct HeldReplica {
  Piece piece;               // the whole segment; its box is one of the rank's stored boxes
  uint32_t holders = 0;      // index into Replicas::holder_sets
  uint32_t first_place = 0;  // up to the next one's: the parts of it, in order of their elements
};

struct Replicas {
  std::vector<HeldReplica> replicas;               // in document order
  std::vector<std::vector<uint32_t>> holder_sets;  // ranks, ascending
  // Together all elements of all replicas, each once; offsets are in the slot. No part is empty.
  std::vector<PlacedPiece> places;
  std::vector<uint32_t> replica_of_place;

  std::span<const PlacedPiece> PlacesOf(size_t replica) const;
};

// A part of a replica that is captured into the blocks behind the image.
struct ExtraCopy {
  Segment segment;  // in the terms of RankShare::stored
  uint64_t slot_offset_bytes = 0;
};

// Places the extra copies from `begin_bytes` on, each aligned as the payload of an image is,
// ordered by the capture group of their buffer (`group_of_buffer`: of each of the stored layout's
// buffers). `stored_offsets`: of share.stored.segments, in the image. Appends them to `extra`.
// Errors: kInvalidArgument (image and copies have more than kImageBytesMax bytes).
absl::StatusOr<Replicas> PlaceReplicas(const RankShare& share,
                                       const std::vector<TensorState>& tensor_states,
                                       std::span<const uint64_t> stored_offsets,
                                       std::span<const uint32_t> group_of_buffer,
                                       uint64_t begin_bytes, std::vector<ExtraCopy>& extra);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_REPLICAS_H_
