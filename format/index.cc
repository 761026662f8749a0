#include "format/index.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <string_view>
#include <tuple>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "base/utf8.h"
#include "format/layout.h"

namespace holdfast {
namespace {

auto OrderOf(const TensorState& tensor_state) {
  return std::tie(tensor_state.tensor, tensor_state.state);
}
auto OrderOf(const IndexPiece& piece) {
  return std::tie(piece.piece.tensor_state, piece.image, piece.offset_bytes);
}
auto OrderOf(const IndexBlob& blob) { return std::tie(blob.scope, blob.name, blob.rank); }

absl::Status Wrong(const std::string& text) {
  return absl::DataLossError(absl::StrCat("INDEX: ", text));
}

// An error of a check of plain values, as one about the index.
absl::Status In(const std::string& where, const absl::Status& status) {
  if (status.ok()) return status;
  return Wrong(absl::StrFormat("%s: %s", where, status.message()));
}

std::string NameOf(const char* table, size_t index) {
  return absl::StrFormat("%s[%d]", table, index);
}

// OK if [offset, offset + bytes) lies in image `image`.
absl::Status CheckExtent(const Index& index, uint32_t image, uint64_t offset_bytes,
                         uint64_t bytes) {
  if (image >= index.images.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("image: expected less than %d, found %d", index.images.size(), image));
  }
  const uint64_t image_bytes = index.images[image].bytes;
  if (offset_bytes > image_bytes || bytes > image_bytes - offset_bytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected to lie in the %d bytes of %s, found %d bytes at offset %d",
                        image_bytes, index.images[image].file, bytes, offset_bytes));
  }
  return absl::OkStatus();
}

absl::Status CheckHeader(const Index& index) {
  RETURN_IF_ERROR(In("checkpoint", CheckJobName(index.job)));
  RETURN_IF_ERROR(In("checkpoint", CheckJobUuid(index.job_uuid)));
  if (index.world_size == 0 || index.world_size > kWorldSizeMax) {
    return Wrong(
        absl::StrFormat("world size: expected 1 to %d, found %d", kWorldSizeMax, index.world_size));
  }
  if (index.blob_world_size > kWorldSizeMax || index.blob_world_size == index.world_size) {
    return Wrong(absl::StrFormat(
        "world size of the blobs: expected 0, which stands for the world size of %d, or another of "
        "at most %d, found %d",
        index.world_size, kWorldSizeMax, index.blob_world_size));
  }
  std::set<std::string_view> layouts;
  for (size_t i = 0; i < index.layouts.size(); ++i) {
    if (index.layouts[i].empty() || !layouts.insert(index.layouts[i]).second) {
      return Wrong(
          absl::StrFormat("%s: expected a document that differs from those before, found "
                          "an %s one",
                          NameOf("layouts", i), index.layouts[i].empty() ? "empty" : "equal"));
    }
    if (!IsUtf8(index.layouts[i])) {
      return Wrong(absl::StrFormat("%s: expected UTF-8, found other bytes", NameOf("layouts", i)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckImages(const Index& index) {
  if (index.images.size() != index.world_size) {
    return Wrong(absl::StrFormat("images: expected one for each of %d ranks, found %d",
                                 index.world_size, index.images.size()));
  }
  std::set<std::string_view> files;
  for (size_t i = 0; i < index.images.size(); ++i) {
    const IndexImage& image = index.images[i];
    const std::string where = NameOf("images", i);
    RETURN_IF_ERROR(In(where, CheckFileName(image.file)));
    RETURN_IF_ERROR(In(where, CheckBlockBytes(image.block_bytes)));
    if (!files.insert(image.file).second) {
      return Wrong(absl::StrFormat("%s: file %s is that of another image", where, image.file));
    }
    if (Value(image.rank) != i) {
      return Wrong(absl::StrFormat("%s: expected rank %d, found %d", where, i, Value(image.rank)));
    }
    if (image.layout >= index.layouts.size()) {
      return Wrong(absl::StrFormat("%s: layout: expected less than %d, found %d", where,
                                   index.layouts.size(), image.layout));
    }
    if (image.bytes == 0 || image.bytes % image.block_bytes != 0 ||
        image.bytes / image.block_bytes != image.block_crc32c.size()) {
      return Wrong(absl::StrFormat("%s: expected the bytes of %d blocks of %d, found %d", where,
                                   image.block_crc32c.size(), image.block_bytes, image.bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTensorStates(const Index& index) {
  if (index.facts.size() != index.tensor_states.size()) {
    return Wrong(absl::StrFormat("facts: expected one for each of %d tensor states, found %d",
                                 index.tensor_states.size(), index.facts.size()));
  }
  for (size_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& tensor_state = index.tensor_states[i];
    RETURN_IF_ERROR(In(NameOf("tensor_states", i), CheckTensorState(tensor_state)));
    if (i > 0 && OrderOf(index.tensor_states[i - 1]) >= OrderOf(tensor_state)) {
      return Wrong(absl::StrFormat("%s: expected one greater than %s, found %s",
                                   NameOf("tensor_states", i), Describe(index.tensor_states[i - 1]),
                                   Describe(tensor_state)));
    }
    if (index.facts[i].fingerprint.has_value() &&
        index.facts[i].undefined_fingerprint.has_value()) {
      return Wrong(
          absl::StrFormat("%s: expected at most one fingerprint, found 2", NameOf("facts", i)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPieces(const Index& index) {
  for (size_t i = 0; i < index.pieces.size(); ++i) {
    const IndexPiece& piece = index.pieces[i];
    absl::Status status = CheckPiece(piece.piece, index.tensor_states, index.boxes);
    if (status.ok()) {
      const Dtype dtype = index.tensor_states[piece.piece.tensor_state].dtype;
      status = CheckExtent(index, piece.image, piece.offset_bytes,
                           piece.piece.ElementCount() * ElementBytes(dtype));
    }
    RETURN_IF_ERROR(In(NameOf("pieces", i), status));
    if (i > 0 && OrderOf(piece) < OrderOf(index.pieces[i - 1])) {
      return Wrong(
          absl::StrFormat("%s: expected the order of tensor state, image and offset, found "
                          "one that is less than the one before",
                          NameOf("pieces", i)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckBlobs(const Index& index) {
  for (size_t i = 0; i < index.blobs.size(); ++i) {
    const IndexBlob& blob = index.blobs[i];
    const std::string where = NameOf("blobs", i);
    RETURN_IF_ERROR(In(where, CheckName("blob", blob.name)));
    RETURN_IF_ERROR(In(where, CheckExtent(index, blob.image, blob.offset_bytes, blob.bytes)));
    if (blob.scope != BlobScope::kGlobal && blob.scope != BlobScope::kRank) {
      return Wrong(absl::StrFormat("%s: scope: expected 0 or 1, found %d", where,
                                   static_cast<int>(blob.scope)));
    }
    if (Value(blob.rank) >= index.BlobWorldSize()) {
      return Wrong(absl::StrFormat("%s: rank: expected less than %d, found %d", where,
                                   index.BlobWorldSize(), Value(blob.rank)));
    }
    if (i > 0 && OrderOf(index.blobs[i - 1]) >= OrderOf(blob)) {
      return Wrong(
          absl::StrFormat("%s: expected one greater than the one before, by scope, name "
                          "and rank; found \"%s\" of rank %d",
                          where, absl::CHexEscape(blob.name.substr(0, 200)), Value(blob.rank)));
    }
  }
  return absl::OkStatus();
}

absl::Status Differ(const std::string& what, const std::string& in_manifest,
                    const std::string& in_index) {
  return absl::DataLossError(
      absl::StrFormat("%s: MANIFEST.json says %s, INDEX says %s", what, in_manifest, in_index));
}

}  // namespace

uint32_t ChecksumRoot(std::span<const uint32_t> block_crc32c) {
  uint32_t root = 0;
  for (const uint32_t crc : block_crc32c) {
    const std::byte bytes[4] = {static_cast<std::byte>(crc), static_cast<std::byte>(crc >> 8),
                                static_cast<std::byte>(crc >> 16),
                                static_cast<std::byte>(crc >> 24)};
    root = ExtendCrc32c(root, bytes);
  }
  return root;
}

std::pair<size_t, size_t> Index::PiecesOf(uint32_t tensor_state) const {
  const auto by_state = [](const IndexPiece& piece) { return piece.piece.tensor_state; };
  const auto range = std::ranges::equal_range(pieces, tensor_state, {}, by_state);
  return {static_cast<size_t>(range.begin() - pieces.begin()),
          static_cast<size_t>(range.end() - pieces.begin())};
}

std::optional<uint32_t> Index::FindTensorState(const std::string& tensor,
                                               const std::string& state) const {
  const auto at = std::lower_bound(
      tensor_states.begin(), tensor_states.end(), std::tie(tensor, state),
      [](const TensorState& entry, const auto& key) { return OrderOf(entry) < key; });
  if (at == tensor_states.end() || OrderOf(*at) != std::tie(tensor, state)) return std::nullopt;
  return static_cast<uint32_t>(at - tensor_states.begin());
}

void SortIndex(Index& index) {
  const size_t count = index.tensor_states.size();
  index.facts.resize(count);
  std::vector<uint32_t> order(count);  // old number at each new place
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&index](uint32_t a, uint32_t b) {
    return OrderOf(index.tensor_states[a]) < OrderOf(index.tensor_states[b]);
  });
  std::vector<uint32_t> place(count);  // new place of each old number
  std::vector<TensorState> states(count);
  std::vector<TensorFacts> facts(count);
  for (uint32_t i = 0; i < count; ++i) {
    place[order[i]] = i;
    states[i] = std::move(index.tensor_states[order[i]]);
    facts[i] = index.facts[order[i]];
  }
  index.tensor_states = std::move(states);
  index.facts = std::move(facts);
  for (IndexPiece& piece : index.pieces) {
    // One that names no tensor state stays as it is, for CheckIndex to name.
    if (piece.piece.tensor_state < count) {
      piece.piece.tensor_state = place[piece.piece.tensor_state];
    }
  }
  // Beyond the order asked for, so that equal indexes have equal bytes.
  const auto full_order = [](const IndexPiece& entry) {
    return std::tie(entry.piece.tensor_state, entry.image, entry.offset_bytes, entry.piece.box,
                    entry.piece.begin, entry.piece.end);
  };
  std::sort(
      index.pieces.begin(), index.pieces.end(),
      [&](const IndexPiece& a, const IndexPiece& b) { return full_order(a) < full_order(b); });
  std::sort(index.blobs.begin(), index.blobs.end(),
            [](const IndexBlob& a, const IndexBlob& b) { return OrderOf(a) < OrderOf(b); });
}

absl::Status CheckIndex(const Index& index) {
  RETURN_IF_ERROR(CheckHeader(index));
  RETURN_IF_ERROR(CheckImages(index));
  RETURN_IF_ERROR(CheckTensorStates(index));
  RETURN_IF_ERROR(CheckPieces(index));
  return CheckBlobs(index);
}

absl::Status CheckConsistent(const Manifest& manifest, const Index& index) {
  if (manifest.job != index.job) return Differ("job", manifest.job, index.job);
  if (manifest.job_uuid != index.job_uuid) {
    return Differ("job uuid", manifest.job_uuid, index.job_uuid);
  }
  const auto describe = [](CheckpointId id) {
    return absl::StrFormat("attempt %d, step %d", Value(id.attempt), Value(id.step));
  };
  if (manifest.checkpoint != index.checkpoint) {
    return Differ("checkpoint", describe(manifest.checkpoint), describe(index.checkpoint));
  }
  if (manifest.world_size != index.world_size) {
    return Differ("world size", absl::StrCat(manifest.world_size), absl::StrCat(index.world_size));
  }
  if (manifest.images.size() != index.images.size()) {
    return Differ("images", absl::StrCat(manifest.images.size()),
                  absl::StrCat(index.images.size()));
  }
  for (size_t i = 0; i < index.images.size(); ++i) {
    const ManifestImage& in_manifest = manifest.images[i];
    const IndexImage& in_index = index.images[i];
    const std::string what = absl::StrFormat("image of rank %d", i);
    if (in_manifest.file != in_index.file) return Differ(what, in_manifest.file, in_index.file);
    if (in_manifest.bytes != in_index.bytes) {
      return Differ(absl::StrCat(what, ", bytes"), absl::StrCat(in_manifest.bytes),
                    absl::StrCat(in_index.bytes));
    }
    const uint32_t root = ChecksumRoot(in_index.block_crc32c);
    if (in_manifest.checksum_root != root) {
      return Differ(absl::StrCat(what, ", checksum root"),
                    absl::StrFormat("%08x", in_manifest.checksum_root),
                    absl::StrFormat("%08x", root));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckIndexBytes(const Manifest& manifest, std::span<const std::byte> index_bytes) {
  if (index_bytes.size() != manifest.index_bytes) {
    return Wrong(absl::StrFormat("expected %d bytes, as MANIFEST.json says; found %d",
                                 manifest.index_bytes, index_bytes.size()));
  }
  const uint32_t crc = Crc32c(index_bytes);
  if (crc != manifest.index_crc32c) {
    return Wrong(absl::StrFormat("expected the CRC32C %08x, as MANIFEST.json says; found %08x",
                                 manifest.index_crc32c, crc));
  }
  return absl::OkStatus();
}

}  // namespace holdfast
