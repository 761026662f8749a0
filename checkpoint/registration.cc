#include "checkpoint/registration.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"

namespace holdfast {
namespace {

// Blob capacities are summed without overflow.
constexpr uint64_t kBlobCapacityMax = uint64_t{1} << 40;

// Names are quoted whole up to this many bytes.
std::string Quoted(std::string_view name) {
  constexpr size_t kShownMax = 120;
  if (name.size() <= kShownMax) return absl::StrCat("\"", std::string(name), "\"");
  return absl::StrCat("\"", std::string(name.substr(0, kShownMax)), "...\" (", name.size(),
                      " bytes)");
}

absl::Status Invalid(const std::string& text) {
  return absl::InvalidArgumentError("registration document: " + text);
}

}  // namespace

// Fills a Registration step by step, in the order of Build.
class RegistrationBuilder {
 public:
  RegistrationBuilder(std::string document, const RegistrationOwner& owner, LayoutCache* layouts)
      : document_(std::move(document)), layouts_(layouts), result_(new Registration) {
    result_->owner_ = owner;
  }

  absl::StatusOr<std::shared_ptr<const Registration>> Build(const std::string& scratch_directory) {
    RETURN_IF_ERROR(ReadHeader());
    RETURN_IF_ERROR(ReadBuffers());
    RETURN_IF_ERROR(ReadBlobs());
    RETURN_IF_ERROR(ReadLayout());
    RETURN_IF_ERROR(MatchBuffers());
    RETURN_IF_ERROR(BuildImage(scratch_directory));
    RETURN_IF_ERROR(PlaceCopies());
    RETURN_IF_ERROR(PlanCapture());
    FindGaps();
    return std::shared_ptr<const Registration>(std::move(result_));
  }

 private:
  std::string_view Text(uint64_t offset, uint64_t bytes) const {
    return std::string_view(document_).substr(offset, bytes);
  }

  // OK if [offset, offset + count * item_bytes) lies in the document behind the header.
  absl::Status CheckRange(const char* what, uint64_t offset, uint64_t count, uint64_t item_bytes,
                          uint64_t alignment) const {
    const uint64_t size = document_.size();
    if (offset < sizeof(header_) || offset > size || count > (size - offset) / item_bytes) {
      return Invalid(absl::StrFormat("%s: %d x %d bytes at offset %d, found %d bytes in all", what,
                                     count, item_bytes, offset, size));
    }
    if (offset % alignment != 0) {
      return Invalid(absl::StrFormat("%s: expected an offset that is a multiple of %d, found %d",
                                     what, alignment, offset));
    }
    return absl::OkStatus();
  }

  absl::Status ReadHeader() {
    if (document_.size() < sizeof(header_)) {
      return Invalid(absl::StrFormat("expected at least %d bytes, found %d", sizeof(header_),
                                     document_.size()));
    }
    std::memcpy(&header_, document_.data(), sizeof(header_));
    if (header_.magic != abi::kProtocolMagic || header_.version != abi::kProtocolVersion) {
      return Invalid(absl::StrFormat("expected magic 0x%08x, version %d, found 0x%08x, %d",
                                     abi::kProtocolMagic, abi::kProtocolVersion, header_.magic,
                                     header_.version));
    }
    if (header_.total_bytes != document_.size()) {
      return Invalid(absl::StrFormat("expected total_bytes %d, found %d", document_.size(),
                                     header_.total_bytes));
    }
    if (header_.buffer_count > kRegisteredBuffersMax || header_.blob_count > kRegisteredBlobsMax) {
      return Invalid(absl::StrFormat("at most %d buffers and %d blobs, found %d and %d",
                                     kRegisteredBuffersMax, kRegisteredBlobsMax,
                                     header_.buffer_count, header_.blob_count));
    }
    if (header_.copies > abi::Copies::kAll) {
      return Invalid(absl::StrFormat("expected copies 0 (once), 1 (per-node) or 2 (all), found %d",
                                     static_cast<uint32_t>(header_.copies)));
    }
    result_->copies_ = header_.copies;
    RETURN_IF_ERROR(CheckRange("layout", header_.layout_offset, header_.layout_bytes, 1, 1));
    RETURN_IF_ERROR(CheckRange("buffers", header_.buffers_offset, header_.buffer_count,
                               sizeof(abi::DocumentBuffer), 8));
    return CheckRange("blobs", header_.blobs_offset, header_.blob_count, sizeof(abi::DocumentBlob),
                      8);
  }

  template <typename Item>
  Item ItemAt(uint64_t offset, uint64_t index) const {
    Item item;
    std::memcpy(&item, document_.data() + offset + index * sizeof(Item), sizeof(Item));
    return item;
  }

  absl::StatusOr<std::string> ReadName(const char* what, uint64_t index, uint64_t offset,
                                       uint64_t bytes) const {
    if (bytes > kNameBytesMax) {
      return Invalid(absl::StrFormat("%s %d: a name of %d bytes, at most %d are allowed", what,
                                     index, bytes, kNameBytesMax));
    }
    RETURN_IF_ERROR(
        CheckRange(absl::StrFormat("name of %s %d", what, index).c_str(), offset, bytes, 1, 1));
    std::string name(Text(offset, bytes));
    RETURN_IF_ERROR(CheckName(what, name));
    return name;
  }

  absl::Status ReadBuffers() {
    result_->buffers_.reserve(header_.buffer_count);
    for (uint64_t index = 0; index < header_.buffer_count; ++index) {
      const auto item = ItemAt<abi::DocumentBuffer>(header_.buffers_offset, index);
      ASSIGN_OR_RETURN(std::string name,
                       ReadName("buffer", index, item.name_offset, item.name_bytes));
      if (item.group >= kCaptureGroupCount) {
        return Invalid(absl::StrFormat("buffer %s: expected a group below %d, found %d",
                                       Quoted(name), kCaptureGroupCount, item.group));
      }
      if (item.bytes > kTensorBytesMax) {
        return Invalid(absl::StrFormat("buffer %s: %d bytes, at most %d are allowed", Quoted(name),
                                       item.bytes, kTensorBytesMax));
      }
      result_->buffers_.push_back({std::move(name), item.bytes, item.group});
    }
    buffer_index_.reserve(result_->buffers_.size());
    for (uint32_t index = 0; index < result_->buffers_.size(); ++index) {
      const std::string& name = result_->buffers_[index].name;
      if (!buffer_index_.emplace(name, index).second) {
        return Invalid(absl::StrFormat("buffer %s is registered twice", Quoted(name)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadBlobs() {
    std::unordered_set<std::string> names;
    for (uint64_t index = 0; index < header_.blob_count; ++index) {
      const auto item = ItemAt<abi::DocumentBlob>(header_.blobs_offset, index);
      ASSIGN_OR_RETURN(std::string name,
                       ReadName("blob", index, item.name_offset, item.name_bytes));
      if (item.scope > static_cast<uint32_t>(BlobScope::kRank)) {
        return Invalid(absl::StrFormat("blob %s: expected scope 0 (global) or 1 (rank), found %d",
                                       Quoted(name), item.scope));
      }
      if (item.capacity_bytes > kBlobCapacityMax) {
        return Invalid(absl::StrFormat("blob %s: capacity of %d bytes, at most %d are allowed",
                                       Quoted(name), item.capacity_bytes, kBlobCapacityMax));
      }
      const auto scope = static_cast<BlobScope>(item.scope);
      // Also in two scopes: hf_restored_blob asks by name.
      if (!names.insert(name).second) {
        return Invalid(absl::StrFormat("blob %s is registered twice", Quoted(name)));
      }
      result_->blobs_.push_back({std::move(name), scope, item.capacity_bytes, std::nullopt});
    }
    return absl::OkStatus();
  }

  absl::Status ReadLayout() {
    std::string text(Text(header_.layout_offset, header_.layout_bytes));
    ASSIGN_OR_RETURN(result_->layout_, layouts_ == nullptr ? SharedLayout::Make(std::move(text))
                                                           : layouts_->Get(std::move(text)));
    const RegistrationOwner& owner = result_->owner_;
    const Layout& layout = result_->layout();
    if (layout.world_size() != owner.world_size) {
      return absl::InvalidArgumentError(
          absl::StrFormat("layout: its mesh has %d ranks, the job was opened with world size %d",
                          layout.world_size(), owner.world_size));
    }
    // Of no more use, and as large as the layout.
    document_ = std::string();
    CHECK(Value(owner.rank) < owner.world_size);
    ASSIGN_OR_RETURN(result_->holdings_, layout.ForRank(owner.rank));
    return absl::OkStatus();
  }

  // Every buffer that the layout needs on this rank is registered, large enough; no other is.
  absl::Status MatchBuffers() {
    const std::vector<BufferNeed>& needs = result_->holdings_.buffers;
    std::vector<bool> used(result_->buffers_.size());
    for (const BufferNeed& need : needs) {
      const auto found = buffer_index_.find(need.name);
      if (found == buffer_index_.end()) {
        if (need.bytes > 0) return MissingBuffer(need);
        result_->buffer_of_need_.push_back(Registration::kNoBuffer);
        group_of_need_.push_back(0);
        continue;
      }
      const RegisteredBuffer& buffer = result_->buffers_[found->second];
      if (buffer.bytes < need.bytes) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "buffer %s: on rank %d the layout places %d bytes in it, registered are %d",
            Quoted(need.name), Value(result_->owner_.rank), need.bytes, buffer.bytes));
      }
      used[found->second] = true;
      result_->buffer_of_need_.push_back(found->second);
      group_of_need_.push_back(buffer.group);
    }
    for (size_t index = 0; index < used.size(); ++index) {
      if (!used[index]) return UnknownBuffer(result_->buffers_[index].name);
    }
    return absl::OkStatus();
  }

  absl::Status MissingBuffer(const BufferNeed& need) const {
    return absl::InvalidArgumentError(
        absl::StrFormat("buffer %s is not registered; on rank %d the layout places %d bytes in it",
                        Quoted(need.name), Value(result_->owner_.rank), need.bytes));
  }

  absl::Status UnknownBuffer(const std::string& name) const {
    std::vector<std::string_view> known;
    constexpr size_t kCandidatesMax = 10'000;
    for (const BufferNeed& need : result_->holdings_.buffers) {
      if (known.size() < kCandidatesMax) known.push_back(need.name);
    }
    return absl::InvalidArgumentError(
        absl::StrFormat("buffer %s is registered, but the layout places nothing in it on rank %d%s",
                        Quoted(name), Value(result_->owner_.rank), DidYouMean(name, known)));
  }

  absl::Status BuildImage(const std::string& scratch_directory) {
    const RegistrationOwner& owner = result_->owner_;
    const Layout& layout = result_->layout();
    ASSIGN_OR_RETURN(share_, result_->layout_->writers.ShareOf(owner.rank, group_of_need_));
    const RankLayout& stored = share_.stored;
    std::vector<Piece> pieces;
    pieces.reserve(stored.segments.size());
    for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);

    ImageSpec spec;
    spec.job = owner.job;
    spec.job_uuid = owner.job_uuid;
    spec.rank = owner.rank;
    spec.world_size = owner.world_size;
    spec.block_bytes = owner.block_bytes;
    spec.layout_json = layout.text();
    spec.tensor_states = layout.tensor_states();
    spec.pieces = pieces;
    spec.boxes = &stored.boxes;
    for (const RegisteredBlob& blob : result_->blobs_) {
      if (IsStored(blob)) spec.blobs.push_back({blob.scope, blob.name, blob.capacity_bytes});
    }
    ASSIGN_OR_RETURN(result_->image_, ImageTemplate::Build(spec, scratch_directory));
    const ImageTemplate& image = *result_->image_;
    RETURN_IF_ERROR(CheckBlockCount("an image", image.image_bytes()));
    CHECK(image.block_bytes() == owner.block_bytes && image.image_bytes() > 0);
    CHECK(image.piece_offsets().size() == pieces.size());

    size_t stored_index = 0;
    for (RegisteredBlob& blob : result_->blobs_) {
      if (IsStored(blob)) blob.image_offset_bytes = image.blob_offsets()[stored_index++];
    }
    for (size_t i = 0; i < pieces.size(); ++i) {
      result_->stored_pieces_.push_back({pieces[i], image.piece_offsets()[i]});
    }
    result_->stored_boxes_ = stored.boxes;
    result_->fingerprints_.emplace(layout.tensor_states(), result_->stored_boxes_,
                                   result_->stored_pieces_);
    return absl::OkStatus();
  }

  absl::Status CheckBlockCount(const char* what, uint64_t bytes) const {
    if (bytes / result_->owner_.block_bytes <= kImageBlocksMax) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrFormat("%s of %d bytes has more than %d blocks of %d bytes", what, bytes,
                        kImageBlocksMax, result_->owner_.block_bytes));
  }

  // The slot ends behind the last block that has a copy.
  absl::Status PlaceCopies() {
    const uint64_t block_bytes = result_->block_bytes();
    uint64_t end_bytes = result_->image_bytes();
    if (result_->copies_ == abi::Copies::kAll) {
      ASSIGN_OR_RETURN(
          result_->replicas_,
          PlaceReplicas(share_, result_->layout().tensor_states(), result_->image_->piece_offsets(),
                        group_of_need_, result_->image_bytes(), extra_));
    }
    for (const PlacedPiece& placed : result_->replicas_.places) {
      end_bytes = std::max(
          end_bytes,
          placed.image_offset_bytes +
              placed.piece.ElementCount() *
                  ElementBytes(result_->layout().tensor_states()[placed.piece.tensor_state].dtype));
    }
    end_bytes = (end_bytes + block_bytes - 1) / block_bytes * block_bytes;
    RETURN_IF_ERROR(CheckBlockCount("an image with its extra copies", end_bytes));
    result_->slot_block_count_ = static_cast<uint32_t>(end_bytes / block_bytes);
    result_->replica_sums_.emplace(result_->layout().tensor_states(), result_->stored_boxes_,
                                   result_->replicas_.places);
    return absl::OkStatus();
  }

  // A global blob is rank 0's.
  bool IsStored(const RegisteredBlob& blob) const {
    return blob.scope == BlobScope::kRank || Value(result_->owner_.rank) == 0;
  }

  void AddOps(const Segment& segment, uint64_t offset_bytes, std::vector<abi::CaptureOp>& ops) {
    for (const CopyOp& op : PlanSegment(result_->layout().tensor_states(), share_.stored, segment,
                                        /*image=*/0, offset_bytes)) {
      if (op.run_bytes == 0 || op.count == 0) continue;
      // Runs lie one behind the other in the slot, and inside what was registered.
      CHECK(op.count == 1 || op.image_stride_bytes == op.run_bytes);
      const uint32_t buffer = result_->buffer_of_need_[op.buffer];
      CHECK(buffer != Registration::kNoBuffer);
      CHECK(op.buffer_offset_bytes + (op.count - 1) * op.buffer_stride_bytes + op.run_bytes <=
            result_->buffers_[buffer].bytes);
      ops.push_back({op.image_offset_bytes, op.buffer_offset_bytes, op.run_bytes, op.count,
                     op.buffer_stride_bytes, buffer, result_->buffers_[buffer].group});
    }
  }

  absl::Status PlanCapture() {
    std::vector<abi::CaptureOp> ops;
    for (size_t i = 0; i < share_.stored.segments.size(); ++i) {
      AddOps(share_.stored.segments[i], result_->stored_pieces_[i].image_offset_bytes, ops);
    }
    for (const ExtraCopy& copy : extra_) AddOps(copy.segment, copy.slot_offset_bytes, ops);
    std::sort(ops.begin(), ops.end(), [](const abi::CaptureOp& a, const abi::CaptureOp& b) {
      return a.image_offset < b.image_offset;
    });

    abi::CapturePlan header = {};
    header.magic = abi::kProtocolMagic;
    header.version = abi::kProtocolVersion;
    header.op_count = ops.size();
    header.blob_count = result_->blobs_.size();
    header.image_bytes = result_->image_bytes();
    header.slot_bytes = result_->slot_bytes();
    Append(std::span(&header, 1));
    Append(std::span(ops));
    for (const RegisteredBlob& blob : result_->blobs_) {
      const abi::BlobArea area = {blob.image_offset_bytes.value_or(UINT64_MAX),
                                  blob.image_offset_bytes ? blob.capacity_bytes : 0};
      Append(std::span(&area, 1));
    }
    return absl::OkStatus();
  }

  template <typename T, size_t kExtent>
  void Append(std::span<T, kExtent> items) {
    const auto bytes = std::as_bytes(items);
    result_->capture_plan_.insert(result_->capture_plan_.end(), bytes.begin(), bytes.end());
  }

  // Whatever no op and no blob area covers behind the head is the agent's to zero.
  void FindGaps() {
    std::vector<ImageRange> taken = {{0, result_->image_->head_bytes()}};
    result_->writers_.assign(result_->slot_block_count(), Registration::Writer::kAgent);
    for (const RegisteredBlob& blob : result_->blobs_) {
      if (!blob.image_offset_bytes || blob.capacity_bytes == 0) continue;
      taken.push_back({*blob.image_offset_bytes, *blob.image_offset_bytes + blob.capacity_bytes});
      SetWriter(taken.back(), Registration::Writer::kBlobs);
    }
    for (const abi::CaptureOp& op : result_->capture_ops()) {
      taken.push_back({op.image_offset, op.image_offset + op.run_bytes * op.count});
      SetWriter(taken.back(), Registration::Writer::kOps);
    }
    std::sort(taken.begin(), taken.end(),
              [](const ImageRange& a, const ImageRange& b) { return a.begin < b.begin; });
    uint64_t covered = 0;
    for (const ImageRange& range : taken) {
      CHECK(range.begin >= covered);  // two writers of one byte would be our bug
      if (range.begin > covered) result_->gaps_.push_back({covered, range.begin});
      covered = range.end;
    }
    CHECK(covered <= result_->slot_bytes());
    if (covered < result_->slot_bytes()) result_->gaps_.push_back({covered, result_->slot_bytes()});
  }

  void SetWriter(const ImageRange& range, Registration::Writer writer) {
    const uint64_t block_bytes = result_->block_bytes();
    for (uint64_t block = range.begin / block_bytes; block * block_bytes < range.end; ++block) {
      result_->writers_[block] = writer;
    }
  }

  std::string document_;
  LayoutCache* const layouts_;
  std::unique_ptr<Registration> result_;
  abi::RegistrationDocument header_ = {};
  std::unordered_map<std::string_view, uint32_t> buffer_index_;
  std::vector<uint32_t> group_of_need_;
  RankShare share_;
  std::vector<ExtraCopy> extra_;
};

std::string_view CopiesName(abi::Copies copies) {
  switch (copies) {
    case abi::Copies::kOnce:
      return "once";
    case abi::Copies::kPerNode:
      return "per-node";
    case abi::Copies::kAll:
      return "all";
  }
  CHECK(false);
}

absl::StatusOr<std::shared_ptr<const Registration>> Registration::Build(
    std::string document, const RegistrationOwner& owner, const std::string& scratch_directory,
    LayoutCache* layouts) {
  if (owner.world_size == 0 || Value(owner.rank) >= owner.world_size) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank %d of a world of size %d", Value(owner.rank), owner.world_size));
  }
  RETURN_IF_ERROR(CheckBlockBytes(owner.block_bytes));
  return RegistrationBuilder(std::move(document), owner, layouts).Build(scratch_directory);
}

std::span<const abi::CaptureOp> Registration::capture_ops() const {
  abi::CapturePlan header;
  std::memcpy(&header, capture_plan_.data(), sizeof(header));
  // Allocated memory is aligned for it, and so are the sizes of header and ops.
  static_assert(sizeof(abi::CapturePlan) % alignof(abi::CaptureOp) == 0);
  return {reinterpret_cast<const abi::CaptureOp*>(capture_plan_.data() + sizeof(header)),
          header.op_count};
}

std::vector<uint64_t> Registration::StoredBlobBytes(std::span<const uint64_t> blob_bytes) const {
  CHECK(blob_bytes.size() == blobs_.size());
  std::vector<uint64_t> stored;
  for (size_t i = 0; i < blobs_.size(); ++i) {
    if (blobs_[i].image_offset_bytes) stored.push_back(blob_bytes[i]);
  }
  return stored;
}

}  // namespace holdfast
