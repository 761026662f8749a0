#include "checkpoint/restore_source.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/shared_mapping.h"
#include "checkpoint/verify.h"

namespace holdfast {
namespace {

// Memory for one block of an image, aligned for direct reads.
std::shared_ptr<std::byte> AlignedBlock(uint64_t bytes) {
  BlockMemory memory = AllocateBlockMemory(bytes);
  CHECK(memory != nullptr);
  return memory;
}

// Direct where that works, else through the page cache.
absl::StatusOr<std::unique_ptr<IoFile>> OpenImage(FileSystem& file_system, const std::string& path,
                                                  Caching caching, uint64_t bytes) {
  absl::StatusOr<std::unique_ptr<IoFile>> file = file_system.OpenForRead(path, caching);
  if (file.status().code() == absl::StatusCode::kInvalidArgument && caching == Caching::kDirect) {
    file = file_system.OpenForRead(path, Caching::kBuffered);
  }
  if (!file.ok()) return file;
  if ((*file)->size_bytes() != bytes) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected %d bytes, found %d", path, bytes, (*file)->size_bytes()));
  }
  return file;
}

}  // namespace

std::shared_ptr<RestoreSource> RestoreSource::Create(RestoreSourceParts parts,
                                                     const RestoreSourceWorld& world) {
  CHECK(parts.memory.size() == parts.index.images.size());
  return std::shared_ptr<RestoreSource>(new RestoreSource(std::move(parts), world));
}

RestoreSource::RestoreSource(RestoreSourceParts parts, const RestoreSourceWorld& world)
    : parts_(std::move(parts)), world_(world), files_(parts_.index.images.size()) {}

RestoreSource::~RestoreSource() {
  if (parts_.release) parts_.release();
}

const SharedMapping* RestoreSource::in_place(uint32_t image) const {
  const std::optional<MemoryImage>& memory = parts_.memory[image];
  return memory.has_value() && !memory->trainer_alive ? memory->mapping.get() : nullptr;
}

uint32_t RestoreSource::ExpectedCrc32c(uint32_t image, uint64_t block) const {
  return parts_.index.images[image].block_crc32c[block];
}

std::string RestoreSource::Path(uint32_t image) const {
  return absl::StrCat(parts_.directory, "/", parts_.index.images[image].file);
}

void RestoreSource::VerifyInPlace(uint32_t image, uint64_t block,
                                  std::function<void(absl::StatusOr<uint64_t>)> done) {
  CHECK(in_place(image) != nullptr);
  const auto crc32c = std::make_shared<uint32_t>(0);
  const std::span<const std::byte> bytes = parts_.memory[image]->blocks[block];
  world_.pool.Run(
      [self = shared_from_this(), bytes, crc32c] { *crc32c = Crc32c(bytes); },
      [self = shared_from_this(), crc32c, image, block, done = std::move(done)] {
        if (*crc32c == self->ExpectedCrc32c(image, block)) {
          done(self->parts_.memory[image]->memory_offsets[block]);
        } else {
          done(absl::UnavailableError("the block in memory does not match its checksum"));
        }
      });
}

void RestoreSource::Fetch(uint32_t image, uint64_t block, std::vector<std::span<std::byte>> targets,
                          std::function<void(absl::StatusOr<From>)> done) {
  size_t target_bytes = 0;
  for (const std::span<std::byte> target : targets) target_bytes += target.size();
  CHECK(target_bytes == parts_.index.images[image].block_bytes);
  auto request = std::make_shared<Request>();
  request->image = image;
  request->block = block;
  request->targets = std::move(targets);
  request->done = std::move(done);
  if (parts_.memory[image].has_value()) {
    CopyFromMemory(request);
  } else {
    FetchFromStorage(request);
  }
}

void RestoreSource::CopyFromMemory(const std::shared_ptr<Request>& request) {
  world_.pool.Run(
      [self = shared_from_this(), request] {
        std::span<const std::byte> source =
            self->parts_.memory[request->image]->blocks[request->block];
        uint32_t crc32c = 0;
        for (const std::span<std::byte> target : request->targets) {
          std::memcpy(target.data(), source.data(), target.size());
          source = source.subspan(target.size());
          // Of the copy: whoever may still write the source cannot change it any more.
          crc32c = ExtendCrc32c(crc32c, target);
        }
        request->found_crc32c = crc32c;
      },
      [self = shared_from_this(), request] {
        const uint32_t expected = self->ExpectedCrc32c(request->image, request->block);
        if (request->found_crc32c == expected) {
          request->done(From::kMemory);
          return;
        }
        request->memory_error =
            self->BadBlock(*request, absl::StrFormat("in memory: expected CRC32C %08x, found %08x",
                                                     expected, request->found_crc32c));
        self->FetchFromStorage(request);
      });
}

void RestoreSource::FetchFromStorage(const std::shared_ptr<Request>& request) {
  if (parts_.directory.empty()) {
    CHECK(!request->memory_error.ok());  // the maker of the source gave every image a place
    request->done(request->memory_error);
    return;
  }
  OpenFile(request->image, [self = shared_from_this(), request] {
    const ImageFile& file = self->files_[request->image];
    if (file.error.ok()) {
      self->ReadParts(request);
    } else {
      request->done(file.error);
    }
  });
}

void RestoreSource::OpenFile(uint32_t image, std::function<void()> opened) {
  ImageFile& file = files_[image];
  if (file.file != nullptr || !file.error.ok()) {
    world_.loop.Post(std::move(opened));
    return;
  }
  file.waiting.push_back(std::move(opened));
  if (file.opening) return;
  file.opening = true;
  const auto result = std::make_shared<absl::StatusOr<std::unique_ptr<IoFile>>>();
  world_.pool.Run(
      [self = shared_from_this(), image, result] {
        *result = OpenImage(self->world_.file_system, self->Path(image), self->world_.caching,
                            self->parts_.index.images[image].bytes);
      },
      [self = shared_from_this(), image, result] {
        ImageFile& opened_file = self->files_[image];
        opened_file.opening = false;
        if (result->ok()) {
          opened_file.file = *std::move(*result);
        } else {
          opened_file.error = result->status();
        }
        for (const std::function<void()>& waiter : std::exchange(opened_file.waiting, {})) waiter();
      });
}

void RestoreSource::ReadParts(const std::shared_ptr<Request>& request) {
  const std::shared_ptr<IoFile> file = files_[request->image].file;
  uint64_t offset = request->block * parts_.index.images[request->image].block_bytes;
  request->reads_in_flight = request->targets.size();
  for (const std::span<std::byte> target : request->targets) {
    world_.ring.Read(*file, offset, target,
                     [self = shared_from_this(), request, file](absl::Status status) {
                       if (request->read_error.ok()) request->read_error = std::move(status);
                       if (--request->reads_in_flight > 0) return;
                       if (request->read_error.ok()) {
                         self->VerifyRead(request);
                       } else {
                         request->done(request->read_error);
                       }
                     });
    offset += target.size();
  }
}

void RestoreSource::VerifyRead(const std::shared_ptr<Request>& request) {
  world_.pool.Run(
      [request] {
        request->found_crc32c = 0;
        for (const std::span<std::byte> target : request->targets) {
          request->found_crc32c = ExtendCrc32c(request->found_crc32c, target);
        }
      },
      [self = shared_from_this(), request] {
        const uint32_t expected = self->ExpectedCrc32c(request->image, request->block);
        if (request->found_crc32c == expected) {
          request->done(From::kStorage);
        } else {
          request->done(self->BadBlock(*request, absl::StrFormat("expected CRC32C %08x, found %08x",
                                                                 expected, request->found_crc32c)));
        }
      });
}

bool RestoreSource::is_sound() const {
  return blobs_error_.ok() && std::all_of(files_.begin(), files_.end(),
                                          [](const ImageFile& file) { return file.error.ok(); });
}

// ---- Blobs ----

void RestoreSource::Blobs(BlobsDone done) {
  if (blobs_ != nullptr) {
    world_.loop.Post([done = std::move(done), blobs = blobs_] { done(blobs); });
    return;
  }
  blobs_waiting_.push_back(std::move(done));
  if (blobs_waiting_.size() > 1) return;  // being read
  const Index& index = parts_.index;
  auto load = std::make_shared<BlobLoad>();
  load->frame = FrameRestoredBlobs(index);
  for (const IndexBlob& blob : index.blobs) {
    if (blob.bytes == 0) continue;
    const uint64_t block_bytes = index.images[blob.image].block_bytes;
    const uint64_t last = (blob.offset_bytes + blob.bytes - 1) / block_bytes;
    for (uint64_t block = blob.offset_bytes / block_bytes; block <= last; ++block) {
      load->blocks.emplace_back(blob.image, block);
    }
  }
  std::sort(load->blocks.begin(), load->blocks.end());
  load->blocks.erase(std::unique(load->blocks.begin(), load->blocks.end()), load->blocks.end());
  LoadBlobs(load);
}

void RestoreSource::LoadBlobs(const std::shared_ptr<BlobLoad>& load) {
  if (load->next == load->blocks.size()) {
    SealBlobs(load);
    return;
  }
  const auto [image, block] = load->blocks[load->next];
  const uint64_t block_bytes = parts_.index.images[image].block_bytes;
  const std::shared_ptr<std::byte> memory = AlignedBlock(block_bytes);
  const std::span<std::byte> bytes(memory.get(), block_bytes);
  Fetch(image, block, {bytes},
        [self = shared_from_this(), load, memory, bytes](absl::StatusOr<From> from) {
          if (!from.ok()) {
            self->BlobsEnded(from.status());
            return;
          }
          self->CopyBlobs(*load, bytes);
          ++load->next;
          self->LoadBlobs(load);
        });
}

void RestoreSource::CopyBlobs(BlobLoad& load, std::span<const std::byte> block) const {
  const auto [image, number] = load.blocks[load.next];
  const uint64_t begin = number * block.size();
  const uint64_t end = begin + block.size();
  const std::vector<IndexBlob>& blobs = parts_.index.blobs;
  for (size_t i = 0; i < blobs.size(); ++i) {
    if (blobs[i].image != image) continue;
    const uint64_t first = std::max(begin, blobs[i].offset_bytes);
    const uint64_t last = std::min(end, blobs[i].offset_bytes + blobs[i].bytes);
    if (first >= last) continue;
    std::memcpy(
        load.frame.bytes.data() + load.frame.data_offsets[i] + (first - blobs[i].offset_bytes),
        block.data() + (first - begin), last - first);
  }
}

void RestoreSource::SealBlobs(const std::shared_ptr<BlobLoad>& load) {
  world_.pool.Run([load] { load->sealed = SealedMemory("holdfast-blobs", load->frame.bytes); },
                  [self = shared_from_this(), load] {
                    if (!load->sealed.ok()) {
                      self->BlobsEnded(load->sealed.status());
                      return;
                    }
                    auto blobs = std::make_shared<SealedBlobs>();
                    blobs->fd = *std::move(load->sealed);
                    blobs->bytes = load->frame.bytes.size();
                    self->BlobsEnded(std::shared_ptr<const SealedBlobs>(std::move(blobs)));
                  });
}

void RestoreSource::BlobsEnded(absl::StatusOr<std::shared_ptr<const SealedBlobs>> blobs) {
  if (blobs.ok()) {
    blobs_ = *blobs;
  } else {
    blobs_error_ = blobs.status();
  }
  for (const BlobsDone& done : std::exchange(blobs_waiting_, {})) done(blobs);
}

absl::Status RestoreSource::BadBlock(const Request& request, const std::string& what) const {
  const IndexImage& image = parts_.index.images[request.image];
  const uint64_t begin = request.block * image.block_bytes;
  const uint64_t end = begin + image.block_bytes;
  return absl::DataLossError(BadBlockText(
      image, parts_.directory.empty() ? image.file : Path(request.image), request.block, what,
      TensorsAt(parts_.index, request.image, begin, end, kFindingTensorsMax)));
}

}  // namespace holdfast
