// Foreign checkpoints of torch: pickles, zip directories, and what is made of both.
#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/pickle_reader.h"
#include "base/utf8.h"
#include "converter/byte_source.h"
#include "converter/foreign_index.h"
#include "converter/torch_file.h"
#include "converter/torch_index.h"
#include "converter/torch_reader.h"
#include "converter/zip_reader.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

using converter::ForeignIndex;
using converter::MemorySource;
using converter::TorchFile;
using converter::TorchStorage;
using converter::TorchTensor;
using converter::ZipDirectory;
using converter::ZipEntry;

__extension__ typedef unsigned __int128 Uint128;

// Damaged, unsafe, known and not read, beyond a limit; and the text can be shown.
void CheckError(const absl::Status& status) {
  CHECK(status.code() == absl::StatusCode::kDataLoss ||
        status.code() == absl::StatusCode::kPermissionDenied ||
        status.code() == absl::StatusCode::kUnimplemented ||
        status.code() == absl::StatusCode::kResourceExhausted);
  CHECK(!status.message().empty());
}

// Every element lies in the storage, by arithmetic that cannot overflow.
void CheckTensor(const TorchFile& file, const TorchTensor& tensor, uint64_t source_bytes) {
  CHECK(tensor.storage < file.storages().size());
  const TorchStorage& storage = file.storages()[tensor.storage];
  CHECK(storage.offset <= source_bytes && storage.bytes <= source_bytes - storage.offset);
  CHECK(tensor.shape.size() == tensor.strides.size());
  if (tensor.ElementCount() == 0) return;
  Uint128 last = tensor.offset;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    last += static_cast<Uint128>(tensor.shape[i] - 1) * tensor.strides[i];
  }
  CHECK((last + 1) * ElementBytes(tensor.dtype) <= storage.bytes);
}

}  // namespace

bool FuzzPickle(Input input) {
  PickleOptions options;
  options.classes = PickleOptions::Classes::kOpaque;
  const auto document = PickleDocument::Parse(std::string(input.begin(), input.end()), options);
  if (!document.ok()) {
    CHECK(document.status().code() == absl::StatusCode::kInvalidArgument ||
          document.status().code() == absl::StatusCode::kPermissionDenied);
    return false;
  }
  size_t seen = 0;
  (*document)->Walk([&](PickleValue value) {
    CHECK(++seen <= (*document)->value_count());
    CHECK(value.Describe().size() < 1000);
    if (value.Is(PickleValue::Type::kDict)) {
      for (size_t i = 0; i < *value.EntryCount(); ++i) {
        const auto key = value.Key(i).String();
        if (key.ok()) CHECK(value.Find(*key).number() == value.Entry(i).number());
      }
    }
    return PickleDocument::Step::kInto;
  });
  // What follows is allowed there, and the same is read before it.
  options.following = PickleOptions::Following::kAllowed;
  const auto followed =
      PickleDocument::Parse(std::string(input.begin(), input.end()) + "more", options);
  CHECK(followed.ok() && (*followed)->consumed_bytes() == input.size());
  return true;
}

bool FuzzZip(Input input) {
  const MemorySource source("x.zip", std::string(input.begin(), input.end()));
  const auto directory = ZipDirectory::Read(source);
  if (!directory.ok()) {
    CheckError(directory.status());
    return false;
  }
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const ZipEntry& entry : directory->entries()) {
    CHECK(directory->Find(entry.name) == &entry);
    CHECK(IsUtf8(entry.name) && !entry.name.empty() && entry.name[0] != '/');
    CHECK(entry.data_offset <= input.size());
    CHECK(entry.stored_bytes <= input.size() - entry.data_offset);
    ranges.emplace_back(entry.data_offset, entry.data_offset + entry.stored_bytes);
    const auto content = ReadZipEntry(source, entry, uint64_t{1} << 16, converter::ZipCheck::kNone);
    CHECK(!content.ok() || content->size() == entry.bytes);
    if (!content.ok()) CheckError(content.status());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) CHECK(ranges[i - 1].second <= ranges[i].first);
  return true;
}

bool FuzzTorch(Input input) {
  const MemorySource source("x.pt", std::string(input.begin(), input.end()));
  const auto file = TorchFile::Open(source);
  if (!file.ok()) {
    CheckError(file.status());
    return false;
  }
  for (const TorchTensor& tensor : (*file)->tensors()) CheckTensor(**file, tensor, input.size());
  CHECK(IsUtf8(converter::TorchJson((*file)->root(), 1000)));
  // What is brought into an index is an index.
  absl::StatusOr<ForeignIndex> index = converter::IndexOfTorchFile(**file);
  if (!index.ok()) {
    CheckError(index.status());
    return false;
  }
  index->files = {{"x.pt", input.size()}};
  const absl::Status finished = converter::Finish(*index);
  CHECK(finished.ok() || finished.code() == absl::StatusCode::kResourceExhausted);
  return true;
}

}  // namespace holdfast::fuzz
