#include "checkpoint/group_index.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/sealed_json.h"

namespace holdfast {
namespace {

// A few bytes of `text` around `at`, quoted.
std::string Around(const std::string& text, size_t at) {
  constexpr size_t kBytes = 24;
  return JsonString(std::string_view(text).substr(at - std::min(at, kBytes), 2 * kBytes));
}

void AddPieces(const Registration& registration, uint32_t image, Index& index) {
  // Boxes of this rank get new numbers in the one table.
  std::vector<uint32_t> box_of(registration.stored_boxes().size());
  for (uint32_t box = 0; box < box_of.size(); ++box) {
    const BoxView view = registration.stored_boxes()[box];
    box_of[box] = index.boxes.Add(view.lo, view.size);
  }
  for (const PlacedPiece& stored : registration.stored_pieces()) {
    IndexPiece piece{stored.piece, image, stored.image_offset_bytes};
    if (piece.piece.box != kWholeTensor) piece.piece.box = box_of.at(piece.piece.box);
    index.pieces.push_back(piece);
  }
}

void AddBlobs(const GroupPart& part, uint32_t image, Index& index) {
  const std::span<const RegisteredBlob> blobs = part.registration->blobs();
  CHECK(part.image.blob_bytes.size() == blobs.size());
  for (size_t i = 0; i < blobs.size(); ++i) {
    if (!blobs[i].image_offset_bytes.has_value() || part.image.blob_bytes[i] == kBlobAbsent) {
      continue;
    }
    index.blobs.push_back({.scope = blobs[i].scope,
                           .rank = part.image.rank,
                           .name = blobs[i].name,
                           .image = image,
                           .offset_bytes = *blobs[i].image_offset_bytes,
                           .bytes = part.image.blob_bytes[i]});
  }
}

// Before SortIndex: tensor states are in the order of the layout.
void AddFingerprints(const std::vector<GroupPart>& parts, Index& index) {
  std::vector<bool> is_known(index.tensor_states.size(), true);
  for (const GroupPart& part : parts) {
    if (part.fingerprints.has_value()) {
      CHECK(part.fingerprints->size() == index.tensor_states.size());
      continue;
    }
    for (const PlacedPiece& stored : part.registration->stored_pieces()) {
      is_known[stored.piece.tensor_state] = false;
    }
  }
  index.facts.resize(index.tensor_states.size());
  for (size_t i = 0; i < index.facts.size(); ++i) {
    if (!is_known[i]) continue;
    Fingerprint sum = FingerprintOfShape(index.tensor_states[i]);
    for (const GroupPart& part : parts) {
      if (part.fingerprints.has_value()) sum += (*part.fingerprints)[i];
    }
    index.facts[i].fingerprint = sum;
  }
}

}  // namespace

absl::Status CheckRegisteredAlike(const Registration& a, const Registration& b) {
  if (a.copies() != b.copies()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "rank %d has registered with copies = %s, rank %d with copies = %s: expected the same on "
        "all ranks",
        Value(b.owner().rank), CopiesName(b.copies()), Value(a.owner().rank),
        CopiesName(a.copies())));
  }
  if (a.layout().hash() == b.layout().hash()) return absl::OkStatus();
  const std::string& text_a = a.layout().text();
  const std::string& text_b = b.layout().text();
  const size_t common = static_cast<size_t>(
      std::mismatch(text_a.begin(), text_a.end(), text_b.begin(), text_b.end()).first -
      text_a.begin());
  return absl::InvalidArgumentError(absl::StrFormat(
      "rank %d has registered another layout than rank %d: the documents have %d and %d bytes and "
      "differ from byte %d on: expected %s, found %s",
      Value(b.owner().rank), Value(a.owner().rank), text_b.size(), text_a.size(), common,
      Around(text_a, common), Around(text_b, common)));
}

absl::StatusOr<Index> BuildIndex(CheckpointId checkpoint, const std::vector<GroupPart>& parts) {
  CHECK(!parts.empty());
  const Registration& first = *parts.front().registration;
  Index index;
  index.job = first.owner().job;
  index.job_uuid = first.owner().job_uuid;
  index.checkpoint = checkpoint;
  index.world_size = static_cast<uint32_t>(parts.size());
  index.layouts = {first.layout().text()};
  index.tensor_states = first.layout().tensor_states();
  for (uint32_t i = 0; i < parts.size(); ++i) {
    const GroupPart& part = parts[i];
    CHECK(part.image.rank == Rank{i} && part.image.checkpoint == checkpoint);
    RETURN_IF_ERROR(CheckRegisteredAlike(first, *part.registration));
    index.images.push_back({.file = part.file,
                            .rank = part.image.rank,
                            .layout = 0,
                            .bytes = part.image.image_bytes,
                            .block_bytes = part.image.block_bytes,
                            .block_crc32c = part.image.block_crc32c});
    AddPieces(*part.registration, i, index);
    AddBlobs(part, i, index);
  }
  AddFingerprints(parts, index);
  SortIndex(index);
  RETURN_IF_ERROR(CheckIndex(index));
  return index;
}

}  // namespace holdfast
