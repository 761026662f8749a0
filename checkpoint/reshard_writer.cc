#include "checkpoint/reshard_writer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// Heads go out in pieces of at most this.
constexpr uint64_t kHeadPieceBytes = uint64_t{1} << 20;

}  // namespace

// ---- PageBuffer ----

absl::StatusOr<PageBuffer> PageBuffer::Create(uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return ErrnoStatus(errno, "map", absl::StrFormat("%d bytes of buffers", bytes));
  }
  PageBuffer buffer;
  buffer.bytes_ = {static_cast<std::byte*>(memory), bytes};
  // Dropped: smaller pages serve too.
  (void)madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 0, bytes);
  return buffer;
}

PageBuffer::PageBuffer(PageBuffer&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

PageBuffer& PageBuffer::operator=(PageBuffer&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

PageBuffer::~PageBuffer() {
  if (!bytes_.empty()) CHECK(munmap(bytes_.data(), bytes_.size()) == 0);
}

// ---- ReshardWriter ----

ReshardWriter::ReshardWriter(const ReshardStorage& storage, const ReshardPlan& plan,
                             const ReshardSchedule& schedule, const BlockReader& reader,
                             std::string directory, CheckpointId id, const ReshardOptions& options)
    : storage_(storage),
      plan_(plan),
      schedule_(schedule),
      reader_(reader),
      directory_(std::move(directory)),
      id_(id),
      options_(options) {
  for (const ReshardImage& image : plan.images()) {
    block_crc32c_.emplace_back(image.image_bytes / plan.block_bytes(), 0);
  }
  sums_.resize(plan.layout().tensor_states().size());
}

absl::Status ReshardWriter::Run() {
  RETURN_IF_ERROR(CreateImages());
  RETURN_IF_ERROR(WriteUnits());
  for (const Image& image : images_) RETURN_IF_ERROR(storage_.sync(*image.file));
  return absl::OkStatus();
}

void ReshardWriter::RemoveImages() {
  Close();
  for (const std::string& path : created_) {
    // Dropped on purpose: the error that led here is the one to report, and what stays has no
    // manifest.
    storage_.file_system.Unlink(path).IgnoreError();
  }
  created_.clear();
}

void ReshardWriter::Close() {
  for (Image& image : images_) image.file.reset();
  memory_ = PageBuffer();
}

absl::Status ReshardWriter::CreateImages() {
  // Before the other buffers, so that a head and they are not there at once.
  ASSIGN_OR_RETURN(const PageBuffer buffer,
                   PageBuffer::Create(std::max(kHeadPieceBytes, plan_.block_bytes())));
  images_.resize(plan_.images().size());
  for (uint32_t rank = 0; rank < images_.size(); ++rank) {
    RETURN_IF_ERROR(CreateImage(Rank{rank}, buffer.bytes()));
  }
  return absl::OkStatus();
}

absl::Status ReshardWriter::CreateImage(Rank rank, std::span<std::byte> buffer) {
  const ReshardImage& planned = plan_.images()[Value(rank)];
  Image& image = images_[Value(rank)];
  ASSIGN_OR_RETURN(const ImageTemplate head, plan_.BuildImage(rank));
  // Built twice, and the same: the plan relies on it.
  CHECK(head.image_bytes() == planned.image_bytes && head.head_bytes() == planned.head_bytes);
  std::vector<uint64_t> blob_bytes;
  for (const ReshardBlob& blob : planned.blobs) blob_bytes.push_back(blob.bytes);
  const ImageStamp stamp{id_, blob_bytes};

  const std::string path = absl::StrCat(directory_, "/", ImageFileName(rank));
  ASSIGN_OR_RETURN(image.file, storage_.file_system.CreateSized(path, planned.image_bytes,
                                                                options_.target_caching));
  created_.push_back(path);
  const uint64_t piece_bytes = std::min<uint64_t>(buffer.size(), plan_.block_bytes());
  for (uint64_t begin = 0; begin < planned.units_begin;) {
    const uint64_t end = std::min(planned.units_begin, begin + piece_bytes);
    const std::span<std::byte> piece = buffer.first(end - begin);
    head.StampHead(stamp, begin, piece);
    AddChecksum(Value(rank), begin, piece);
    RETURN_IF_ERROR(storage_.write_at(*image.file, begin, piece));
    begin = end;
  }
  image.head_tail.resize(planned.head_bytes - planned.units_begin);
  head.StampHead(stamp, planned.units_begin, image.head_tail);
  image.fingerprints.emplace(plan_.layout().tensor_states(), plan_.boxes(), planned.pieces);
  return absl::OkStatus();
}

absl::Status ReshardWriter::WriteUnits() {
  ASSIGN_OR_RETURN(memory_, PageBuffer::Create(schedule_.buffer_bytes()));
  const std::span<std::byte> memory = memory_.bytes();
  const uint64_t slots_bytes = schedule_.slot_count * schedule_.slot_bytes;
  cache_.emplace(reader_, plan_.source(), memory.first(slots_bytes), schedule_.slot_bytes);
  const auto unit_of = [&](uint32_t thread) {
    return memory.subspan(slots_bytes + thread * schedule_.unit_bytes, schedule_.unit_bytes);
  };
  std::vector<std::thread> threads;
  try {
    for (uint32_t i = 1; i < schedule_.thread_count; ++i) {
      threads.emplace_back([this, unit = unit_of(i)] { RunThread(unit, /*reports=*/false); });
    }
  } catch (const std::system_error& error) {
    Fail(absl::ResourceExhaustedError(absl::StrFormat(
        "start thread %d of %d: %s", threads.size() + 1, schedule_.thread_count, error.what())));
  }
  RunThread(unit_of(0), /*reports=*/true);
  for (std::thread& thread : threads) thread.join();
  MutexLock lock(mutex_);
  return status_;
}

void ReshardWriter::RunThread(std::span<std::byte> unit, bool reports) {
  Thread thread;
  thread.unit = unit;
  thread.total.resize(plan_.layout().tensor_states().size());
  while (const std::optional<size_t> number = Next()) {
    if (const absl::Status done = DoUnit(schedule_.units[*number], thread); !done.ok()) {
      Fail(done);
      return;
    }
    if (!reports || options_.progress == nullptr) continue;
    uint64_t bytes_done = 0;
    {
      MutexLock lock(mutex_);
      bytes_done = bytes_done_;
    }
    if (!options_.progress(bytes_done, plan_.image_bytes())) {
      Fail(absl::CancelledError("the reshard was stopped"));
    }
  }
  MutexLock lock(mutex_);
  for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += thread.total[i];
}

std::optional<size_t> ReshardWriter::Next() {
  MutexLock lock(mutex_);
  if (!status_.ok() || next_unit_ == schedule_.units.size()) return std::nullopt;
  return next_unit_++;
}

absl::Status ReshardWriter::DoUnit(const ReshardUnit& unit, Thread& thread) {
  const std::span<std::byte> out = thread.unit.first(unit.end_bytes - unit.begin_bytes);
  RETURN_IF_ERROR(Copy(unit, thread, out));

  const Image& image = images_[unit.image];
  thread.sums.clear();
  image.fingerprints->AppendParts(unit.begin_bytes, out, thread.sums);
  uint64_t expected_bytes = BlobBytesIn(unit);
  for (const FingerprintPart& part : thread.sums) {
    thread.total[part.tensor_state] += part.sum;
    expected_bytes += part.bytes;
  }
  uint64_t copied_bytes = 0;
  for (const ReshardPart& part : thread.parts) copied_bytes += part.op.Bytes();
  CHECK(copied_bytes == expected_bytes);

  AddChecksum(unit.image, unit.begin_bytes, out);
  return storage_.write_at(*image.file, unit.begin_bytes, out);
}

absl::Status ReshardWriter::Copy(const ReshardUnit& unit, Thread& thread,
                                 std::span<std::byte> out) {
  plan_.PartsOf(unit, thread.parts);
  const ReshardImage& planned = plan_.images()[unit.image];
  const std::vector<std::byte>& head_tail = images_[unit.image].head_tail;
  const bool begins_with_head = unit.begin_bytes == planned.units_begin;
  uint64_t covered_bytes = begins_with_head ? head_tail.size() : 0;
  for (const ReshardPart& part : thread.parts) covered_bytes += part.op.Bytes();
  // Gaps, the rest of the last block.
  if (covered_bytes < out.size()) std::memset(out.data(), 0, out.size());
  if (begins_with_head) std::ranges::copy(head_tail, out.begin());

  for (size_t i = 0; i < thread.parts.size();) {
    const uint32_t image = thread.parts[i].image;
    const uint64_t block = thread.parts[i].block;
    ASSIGN_OR_RETURN(const SourceBlockCache::Pin pin, cache_->Get(image, block));
    for (; i < thread.parts.size() && thread.parts[i].image == image &&
           thread.parts[i].block == block;
         ++i) {
      const CopyOp& op = thread.parts[i].op;
      CHECK(op.ImageEnd() <= pin.bytes().size());
      CHECK(op.buffer_offset_bytes + (op.count - 1) * op.buffer_stride_bytes + op.run_bytes <=
            out.size());
      const std::byte* from = pin.bytes().data() + op.image_offset_bytes;
      std::byte* to = out.data() + op.buffer_offset_bytes;
      for (uint64_t run = 0; run < op.count; ++run) {
        std::memcpy(to + run * op.buffer_stride_bytes, from + run * op.image_stride_bytes,
                    op.run_bytes);
      }
    }
  }
  return absl::OkStatus();
}

uint64_t ReshardWriter::BlobBytesIn(const ReshardUnit& unit) const {
  uint64_t bytes = 0;
  for (const ReshardBlob& blob : plan_.images()[unit.image].blobs) {
    const uint64_t begin = std::max(unit.begin_bytes, blob.offset_bytes);
    const uint64_t end = std::min(unit.end_bytes, blob.offset_bytes + blob.bytes);
    bytes += end > begin ? end - begin : 0;
  }
  return bytes;
}

void ReshardWriter::AddChecksum(uint32_t image, uint64_t begin, std::span<const std::byte> bytes) {
  // A unit may have more than a block, or less.
  const uint64_t block_bytes = plan_.block_bytes();
  while (!bytes.empty()) {
    const uint64_t block = begin / block_bytes;
    const uint64_t block_end = (block + 1) * block_bytes;
    const uint64_t taken = std::min<uint64_t>(bytes.size(), block_end - begin);
    const uint32_t crc = Crc32c(bytes.first(taken));
    const uint32_t in_block = CombineCrc32c(crc, 0, block_end - begin - taken);
    {
      MutexLock lock(mutex_);
      block_crc32c_[image][block] ^= in_block;
      bytes_done_ += taken;
    }
    begin += taken;
    bytes = bytes.subspan(taken);
  }
}

void ReshardWriter::Fail(const absl::Status& status) {
  MutexLock lock(mutex_);
  status_.Update(status);
}

std::vector<std::vector<uint32_t>> ReshardWriter::TakeChecksums() {
  MutexLock lock(mutex_);
  CHECK(bytes_done_ == plan_.image_bytes());  // every byte once
  return std::move(block_crc32c_);
}

std::vector<Fingerprint> ReshardWriter::sums() const {
  MutexLock lock(mutex_);
  return sums_;
}

uint64_t ReshardWriter::bytes_read() const { return cache_.has_value() ? cache_->bytes_read() : 0; }

}  // namespace holdfast
