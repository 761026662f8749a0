#include "converter/torch_output.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "base/zip_crc32.h"
#include "converter/torch_archive.h"

namespace holdfast::converter {
namespace {

constexpr size_t kZeroBlockBytes = size_t{64} << 10;
constexpr uint64_t kRepeatedWindowBytes = uint64_t{1} << 20;

class StorageWriter {
 public:
  StorageWriter(ConversionSource& source, OutputFiles& files) : source_(source), files_(files) {}

  absl::Status Write(const PlannedStorage& storage) {
    for (const ElementRange& range : storage.ranges) {
      if (range.tensor_state == kGivenElements) {
        RETURN_IF_ERROR(Append(std::as_bytes(std::span(storage.given))));
      } else if (range.tensor_state == kZeroElements) {
        RETURN_IF_ERROR(WriteZeros((range.end - range.begin) * ElementBytes(storage.dtype)));
      } else if (range.repeat_count != 1) {
        RETURN_IF_ERROR(WriteRepeated(range, storage.dtype));
      } else {
        RETURN_IF_ERROR(
            source_.ReadElements(range.tensor_state, range.begin, range.end, storage.dtype,
                                 [this](std::span<const std::byte> b) { return Append(b); }));
      }
    }
    return absl::OkStatus();
  }

  uint32_t crc32() const { return crc32_; }

 private:
  absl::Status Append(std::span<const std::byte> bytes) {
    crc32_ = ExtendZipCrc32(crc32_, bytes);
    return files_.Append(bytes);
  }

  // Reads what lies between the parts too, in windows of whole strides: one read instead of many
  // small ones.
  absl::Status WriteRepeated(const ElementRange& range, Dtype dtype) {
    const uint64_t element_bytes = ElementBytes(dtype);
    const uint64_t width = range.end - range.begin;
    const uint64_t stride_bytes = std::max<uint64_t>(range.repeat_stride * element_bytes, 1);
    const uint64_t step = std::max<uint64_t>(kRepeatedWindowBytes / stride_bytes, 1);
    for (uint64_t at = 0; at < range.repeat_count; at += step) {
      const uint64_t count = std::min(step, range.repeat_count - at);
      const uint64_t begin = range.begin + at * range.repeat_stride;
      window_.clear();
      RETURN_IF_ERROR(source_.ReadElements(
          range.tensor_state, begin, begin + (count - 1) * range.repeat_stride + width, dtype,
          [this](std::span<const std::byte> bytes) {
            window_.insert(window_.end(), bytes.begin(), bytes.end());
            return absl::OkStatus();
          }));
      parts_.clear();
      for (uint64_t i = 0; i < count; ++i) {
        const auto part = std::span(window_).subspan(i * range.repeat_stride * element_bytes,
                                                     width * element_bytes);
        parts_.insert(parts_.end(), part.begin(), part.end());
      }
      RETURN_IF_ERROR(Append(parts_));
    }
    return absl::OkStatus();
  }

  absl::Status WriteZeros(uint64_t bytes) {
    const std::vector<std::byte> zeros(std::min<uint64_t>(bytes, kZeroBlockBytes));
    for (uint64_t left = bytes; left > 0;) {
      const uint64_t now = std::min<uint64_t>(left, zeros.size());
      RETURN_IF_ERROR(Append(std::span(zeros).first(now)));
      left -= now;
    }
    return absl::OkStatus();
  }

  ConversionSource& source_;
  OutputFiles& files_;
  std::vector<std::byte> window_;
  std::vector<std::byte> parts_;
  uint32_t crc32_ = 0;
};

}  // namespace

uint64_t PlannedStorage::ElementCount() const {
  uint64_t elements = 0;
  for (const ElementRange& range : ranges) elements += range.ElementCount();
  return elements;
}

void TorchFilesPlan::Add(PlannedFile file) {
  bytes += file.bytes;
  files.push_back(std::move(file));
}

void TorchFilesPlan::AddText(std::string path, std::string text) {
  PlannedFile file;
  file.path = std::move(path);
  file.bytes = text.size();
  file.text = std::move(text);
  Add(std::move(file));
}

TorchDraft::TorchDraft(const ForeignIndex& index, std::string path) : index_(index) {
  file_.path = std::move(path);
}

uint32_t TorchDraft::AddStorage(PlannedStorage storage) {
  for (const ElementRange& range : storage.ranges) {
    if (range.tensor_state < kGivenElements) used_.push_back(range.tensor_state);
  }
  file_.storages.push_back(std::move(storage));
  return static_cast<uint32_t>(file_.storages.size() - 1);
}

void TorchDraft::Whole(uint32_t tensor_state, bool requires_grad) {
  const TensorState& state = index_.tensor_states[tensor_state];
  const uint64_t elements = state.ElementCount();
  auto known = whole_.find(tensor_state);
  if (known == whole_.end()) {
    const uint32_t storage =
        AddStorage({.dtype = state.dtype, .ranges = {{tensor_state, 0, elements}}, .given = {}});
    known = whole_.emplace(tensor_state, storage).first;
  }
  pickle_.Tensor(state.dtype, state.shape,
                 {.storage = known->second, .storage_elements = elements, .offset = 0},
                 requires_grad);
}

void TorchDraft::WholeAs(uint32_t tensor_state, Dtype dtype, Form form) {
  const TensorState& state = index_.tensor_states[tensor_state];
  const uint64_t elements = state.ElementCount();
  const std::vector<uint64_t> flat = {elements};
  Ranges(dtype, form == Form::kFlat ? flat : state.shape, {{tensor_state, 0, elements}});
}

void TorchDraft::Ranges(Dtype dtype, std::span<const uint64_t> shape,
                        std::vector<ElementRange> ranges, bool requires_grad) {
  const uint32_t storage = AddStorage({.dtype = dtype, .ranges = std::move(ranges), .given = {}});
  const uint64_t elements = file_.storages[storage].ElementCount();
  pickle_.Tensor(dtype, shape, {.storage = storage, .storage_elements = elements, .offset = 0},
                 requires_grad);
}

void TorchDraft::View(Dtype dtype, uint64_t elements, std::vector<ElementRange> ranges) {
  const uint32_t storage = AddStorage({.dtype = dtype, .ranges = std::move(ranges), .given = {}});
  const uint64_t all = file_.storages[storage].ElementCount();
  CHECK(elements <= all);
  const std::vector<uint64_t> shape = {elements};
  pickle_.Tensor(dtype, shape, {.storage = storage, .storage_elements = all, .offset = 0});
}

uint32_t TorchDraft::Buffer(Dtype dtype, std::vector<ElementRange> ranges) {
  return AddStorage({.dtype = dtype, .ranges = std::move(ranges), .given = {}});
}

void TorchDraft::ViewOf(uint32_t buffer, std::span<const uint64_t> shape, uint64_t begin) {
  const uint64_t elements = file_.storages[buffer].ElementCount();
  pickle_.Tensor(file_.storages[buffer].dtype, shape,
                 {.storage = buffer, .storage_elements = elements, .offset = begin});
}

void TorchDraft::Given(Dtype dtype, std::span<const uint64_t> shape, std::string bytes) {
  const uint64_t elements = bytes.size() / ElementBytes(dtype);
  const uint32_t storage = AddStorage(
      {.dtype = dtype, .ranges = {{kGivenElements, 0, elements}}, .given = std::move(bytes)});
  pickle_.Tensor(dtype, shape, {.storage = storage, .storage_elements = elements, .offset = 0});
}

PlannedFile TorchDraft::Finish() && {
  file_.pickle = std::move(pickle_).Finish();
  std::vector<uint64_t> sizes;
  for (const PlannedStorage& storage : file_.storages) sizes.push_back(storage.Bytes());
  file_.bytes = TorchArchive::Bytes(file_.pickle, sizes);
  return std::move(file_);
}

std::string TorchFileBytes(const PlannedFile& file) {
  TorchArchive archive(file.pickle);
  std::string bytes;
  for (const PlannedStorage& storage : file.storages) {
    std::string elements;
    for (const ElementRange& range : storage.ranges) {
      CHECK(range.tensor_state >= kGivenElements);
      if (range.tensor_state == kGivenElements) elements += storage.given;
      if (range.tensor_state == kZeroElements) {
        elements.append((range.end - range.begin) * ElementBytes(storage.dtype), '\0');
      }
    }
    bytes += archive.BeginStorage(elements.size()) + elements;
    bytes += archive.EndStorage(ExtendZipCrc32(0, std::as_bytes(std::span(elements))));
  }
  return bytes + archive.Finish();
}

absl::Status WriteTorchFile(OutputFiles& files, ConversionSource& source, const PlannedFile& file) {
  if (file.pickle.empty()) return files.WriteWhole(file.path, file.text);
  RETURN_IF_ERROR(files.Open(file.path));
  TorchArchive archive(file.pickle);
  for (const PlannedStorage& storage : file.storages) {
    RETURN_IF_ERROR(files.Append(archive.BeginStorage(storage.Bytes())));
    StorageWriter writer(source, files);
    RETURN_IF_ERROR(writer.Write(storage));
    RETURN_IF_ERROR(files.Append(archive.EndStorage(writer.crc32())));
  }
  RETURN_IF_ERROR(files.Append(archive.Finish()));
  return files.Close();
}

absl::Status WriteTorchFiles(FileSystem& file_system, const std::string& directory,
                             ConversionSource& source, const TorchFilesPlan& plan,
                             const ConversionProgress& progress) {
  OutputFiles files(file_system, directory, plan.bytes, progress);
  for (const PlannedFile& file : plan.files) RETURN_IF_ERROR(WriteTorchFile(files, source, file));
  return files.Finish();
}

}  // namespace holdfast::converter
