#include "checkpoint/block_reader.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

// A missing file of a committed checkpoint is damage, as is what the device refuses to give.
bool IsDamage(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kNotFound;
}

absl::Status CheckImageFile(FileSystem& file_system, const std::string& path, const Index& index,
                            uint32_t image) {
  const absl::StatusOr<FileInfo> info = file_system.Stat(path);
  if (!info.ok()) {
    return IsDamage(info.status()) ? absl::DataLossError(info.status().message()) : info.status();
  }
  const uint64_t expected = index.images[image].bytes;
  if (info->kind != FileInfo::Kind::kFile) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected a file of %d bytes, found no regular file", path, expected));
  }
  if (info->size_bytes == expected) return absl::OkStatus();
  std::string text =
      absl::StrFormat("%s: expected %d bytes, found %d", path, expected, info->size_bytes);
  if (info->size_bytes < expected) {
    const std::vector<std::string> tensors =
        TensorsAt(index, image, info->size_bytes, expected, kFindingTensorsMax);
    absl::StrAppendFormat(&text, "; from offset %d on lies: %s", info->size_bytes,
                          tensors.empty() ? "no tensor" : absl::StrJoin(tensors, ", "));
  }
  return absl::DataLossError(text);
}

}  // namespace

void FreeBlockMemory::operator()(std::byte* bytes) const { std::free(bytes); }

BlockMemory AllocateBlockMemory(uint64_t bytes) {
  CHECK(bytes % kBlockBytesMin == 0);
  // Alignments of direct transfers are at most a page; a block is never smaller.
  return BlockMemory(static_cast<std::byte*>(std::aligned_alloc(kBlockBytesMin, bytes)));
}

absl::StatusOr<std::unique_ptr<BlockReader>> BlockReader::Open(FileSystem& file_system,
                                                               ReadAt read_at,
                                                               std::string directory,
                                                               const Index& index,
                                                               Caching caching) {
  std::unique_ptr<BlockReader> reader(
      new BlockReader(file_system, std::move(read_at), std::move(directory), index, caching));
  for (uint32_t image = 0; image < index.images.size(); ++image) {
    RETURN_IF_ERROR(CheckImageFile(file_system, reader->Path(image), index, image));
  }
  return reader;
}

BlockReader::BlockReader(FileSystem& file_system, ReadAt read_at, std::string directory,
                         const Index& index, Caching caching)
    : file_system_(file_system),
      read_at_(std::move(read_at)),
      directory_(std::move(directory)),
      index_(index),
      caching_(caching),
      files_(index.images.size()) {}

std::string BlockReader::Path(uint32_t image) const {
  return absl::StrCat(directory_, "/", index_.images[image].file);
}

absl::StatusOr<std::shared_ptr<BlockReader::OpenImage>> BlockReader::FileOf(uint32_t image,
                                                                            Caching caching) const {
  {
    MutexLock lock(mutex_);
    const std::shared_ptr<OpenImage>& file = files_[image];
    // One that turned out not to take direct reads stays buffered.
    if (file != nullptr && (file->caching == caching || file->caching == Caching::kBuffered)) {
      return file;
    }
  }
  const std::string path = Path(image);
  absl::StatusOr<std::unique_ptr<IoFile>> opened = file_system_.OpenForRead(path, caching);
  if (opened.status().code() == absl::StatusCode::kInvalidArgument && caching == Caching::kDirect) {
    caching = Caching::kBuffered;
    opened = file_system_.OpenForRead(path, caching);
  }
  RETURN_IF_ERROR(opened.status());
  auto file = std::make_shared<OpenImage>();
  file->file = *std::move(opened);
  file->caching = caching;
  std::shared_ptr<OpenImage> closed;  // outside of the lock
  MutexLock lock(mutex_);
  if (files_[image] == nullptr) {
    if (opened_.size() == kImagesOpenMax) {
      closed = std::move(files_[opened_.front()]);
      files_[opened_.front()] = nullptr;
      opened_.pop_front();
    }
    opened_.push_back(image);
  } else {
    closed = std::move(files_[image]);  // another thread's, or the direct one
  }
  files_[image] = file;
  return file;
}

absl::Status BlockReader::ReadFrom(const OpenImage& file, uint32_t image, uint64_t block,
                                   std::span<std::byte> out) const {
  RETURN_IF_ERROR(read_at_(*file.file, block * out.size(), out));
  const uint32_t expected = index_.images[image].block_crc32c[block];
  const uint32_t found = Crc32c(out);
  if (found == expected) return absl::OkStatus();
  return absl::DataLossError(absl::StrFormat("expected CRC32C %08x, found %08x", expected, found));
}

absl::Status BlockReader::Read(uint32_t image, uint64_t block, std::span<std::byte> out) const {
  CHECK(image < index_.images.size());
  const IndexImage& facts = index_.images[image];
  CHECK(block < facts.block_crc32c.size() && out.size() == facts.block_bytes);
  absl::Status status;
  for (Caching caching : {caching_, Caching::kBuffered}) {
    const absl::StatusOr<std::shared_ptr<OpenImage>> file = FileOf(image, caching);
    status = file.ok() ? ReadFrom(**file, image, block, out) : file.status();
    // Some file systems take O_DIRECT and refuse the transfer for its alignment.
    if (status.code() != absl::StatusCode::kInvalidArgument || !file.ok() ||
        (*file)->caching == Caching::kBuffered) {
      break;
    }
  }
  if (status.ok()) return status;
  if (!IsDamage(status)) {
    return absl::Status(status.code(), absl::StrFormat("%s: %s", Path(image), status.message()));
  }
  const uint64_t begin = block * facts.block_bytes;
  return absl::DataLossError(
      BadBlockText(facts, Path(image), block, std::string(status.message()),
                   TensorsAt(index_, image, begin, begin + facts.block_bytes, kFindingTensorsMax)));
}

}  // namespace holdfast
