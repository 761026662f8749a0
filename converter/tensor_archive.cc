#include "converter/tensor_archive.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/pickle_writer.h"
#include "base/zip_crc32.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kDataAlignment = 64;
constexpr uint32_t kLarge = UINT32_MAX;  // a size that stands in the ZIP64 field instead
constexpr size_t kLocalHeaderBytes = 30;
constexpr uint16_t kUtf8Name = 0x0800;
constexpr uint16_t kDescriptorFollows = 0x0008;
constexpr uint16_t kVersionNeeded = 45;  // ZIP64
constexpr uint16_t kZip64Field = 0x0001;
constexpr uint16_t kPaddingField = 0x4246;  // "FB", torch's own

struct StorageClass {
  Dtype dtype;
  std::string_view name;
};

// torch's typed storages; every other dtype is in an untyped one.
constexpr StorageClass kStorages[] = {
    {Dtype::kBool, "BoolStorage"},
    {Dtype::kUint8, "ByteStorage"},
    {Dtype::kInt8, "CharStorage"},
    {Dtype::kInt16, "ShortStorage"},
    {Dtype::kInt32, "IntStorage"},
    {Dtype::kInt64, "LongStorage"},
    {Dtype::kFloat16, "HalfStorage"},
    {Dtype::kBfloat16, "BFloat16Storage"},
    {Dtype::kFloat32, "FloatStorage"},
    {Dtype::kFloat64, "DoubleStorage"},
    {Dtype::kComplex64, "ComplexFloatStorage"},
    {Dtype::kComplex128, "ComplexDoubleStorage"},
};

void Append(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

uint32_t Crc32Of(std::string_view text) {
  return ExtendZipCrc32(0, std::as_bytes(std::span(text.data(), text.size())));
}

void AppendSizes(PickleWriter& out, std::span<const uint64_t> sizes) {
  out.Mark();
  for (const uint64_t size : sizes) out.Int(static_cast<int64_t>(size));
  out.Tuple();
}

// The pickle of torch.save(tensor): a call of _rebuild_tensor_v2, or v3 for dtypes without a
// storage of their own.
std::string TensorPickle(Dtype dtype, std::span<const uint64_t> shape, uint64_t elements) {
  std::string_view storage;
  for (const StorageClass& known : kStorages) {
    if (known.dtype == dtype) storage = known.name;
  }
  std::vector<uint64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * (shape[d] == 0 ? 1 : shape[d]);
  }
  PickleWriter out;
  out.Global("torch._utils", storage.empty() ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  out.Mark();
  out.Mark();
  out.String("storage");
  if (storage.empty()) {
    out.Global("torch.storage", "UntypedStorage");
  } else {
    out.Global("torch", storage);
  }
  out.String("0");
  out.String("cpu");
  // An untyped storage counts bytes.
  out.Int(static_cast<int64_t>(storage.empty() ? elements * ElementBytes(dtype) : elements));
  out.Tuple();
  out.PersistentId();
  out.Int(0);  // offset
  AppendSizes(out, shape);
  AppendSizes(out, strides);
  out.Bool(false);  // requires_grad
  out.Global("collections", "OrderedDict");
  out.Tuple(0);
  out.Reduce();
  if (storage.empty()) out.Global("torch", DtypeName(dtype));
  out.Tuple();
  out.Reduce();
  return std::move(out).Finish();
}

// `extra`: the extra field, whole.
void AppendLocalHeader(std::string& out, std::string_view name, uint16_t flags, uint32_t crc32,
                       uint32_t bytes, std::string_view extra) {
  Append(out, 0x04034b50, 4);
  Append(out, kVersionNeeded, 2);
  Append(out, flags, 2);
  Append(out, 0, 2);  // stored
  Append(out, 0, 4);  // time and date
  Append(out, crc32, 4);
  Append(out, bytes, 4);
  Append(out, bytes, 4);
  Append(out, name.size(), 2);
  Append(out, extra.size(), 2);
  out.append(name);
  out.append(extra);
}

}  // namespace

TensorArchive::TensorArchive(Dtype dtype, std::span<const uint64_t> shape) {
  uint64_t elements = 1;
  for (const uint64_t size : shape) elements *= size;
  data_bytes_ = elements * ElementBytes(dtype);
  CHECK(data_bytes_ <= kTensorBytesMax);
  AddSmall("archive/data.pkl", TensorPickle(dtype, shape, elements), head_, entries_, 0);
  AddSmall("archive/byteorder", "little", head_, entries_, 0);
  BeginData();
}

void TensorArchive::AddSmall(std::string_view name, std::string_view content, std::string& out,
                             std::vector<Entry>& entries, uint64_t begin) const {
  const Entry entry{.name = std::string(name),
                    .bytes = content.size(),
                    .crc32 = Crc32Of(content),
                    .offset = begin + out.size(),
                    .has_descriptor = false};
  AppendLocalHeader(out, name, kUtf8Name, entry.crc32, static_cast<uint32_t>(entry.bytes), "");
  out.append(content);
  entries.push_back(entry);
}

void TensorArchive::BeginData() {
  Entry entry{.name = "archive/data/0",
              .bytes = data_bytes_,
              .crc32 = 0,
              .offset = head_.size(),
              .has_descriptor = data_bytes_ > 0};
  std::string extra;
  if (data_bytes_ >= kLarge) {
    Append(extra, kZip64Field, 2);
    Append(extra, 16, 2);
    Append(extra, data_bytes_, 8);
    Append(extra, data_bytes_, 8);
  }
  const uint64_t begin = head_.size() + kLocalHeaderBytes + entry.name.size() + extra.size() + 4;
  const uint64_t fill = (kDataAlignment - begin % kDataAlignment) % kDataAlignment;
  Append(extra, kPaddingField, 2);
  Append(extra, fill, 2);
  extra.append(fill, 'Z');
  AppendLocalHeader(head_, entry.name,
                    entry.has_descriptor ? kUtf8Name | kDescriptorFollows : kUtf8Name, 0, 0, extra);
  entries_.push_back(std::move(entry));
}

std::string TensorArchive::Tail(uint32_t data_crc32) const {
  std::string tail;
  std::vector<Entry> entries = entries_;
  Entry& data = entries.back();
  data.crc32 = data_crc32;
  if (data.has_descriptor) {
    const int size_bytes = data_bytes_ >= kLarge ? 8 : 4;
    Append(tail, 0x08074b50, 4);
    Append(tail, data_crc32, 4);
    Append(tail, data_bytes_, size_bytes);
    Append(tail, data_bytes_, size_bytes);
  }
  const uint64_t begin = head_.size() + data_bytes_;
  AddSmall("archive/version", "3\n", tail, entries, begin);
  return tail + Directory(entries, begin + tail.size());
}

std::string TensorArchive::Directory(const std::vector<Entry>& entries, uint64_t begin) {
  std::string out;
  for (const Entry& entry : entries) {
    std::string extra;
    const bool large = entry.bytes >= kLarge;
    const bool far = entry.offset >= kLarge;
    if (large || far) {
      Append(extra, kZip64Field, 2);
      Append(extra, (large ? 16 : 0) + (far ? 8 : 0), 2);
      if (large) Append(extra, entry.bytes, 8);
      if (large) Append(extra, entry.bytes, 8);
      if (far) Append(extra, entry.offset, 8);
    }
    Append(out, 0x02014b50, 4);
    Append(out, kVersionNeeded, 2);
    Append(out, kVersionNeeded, 2);
    Append(out, entry.has_descriptor ? kUtf8Name | kDescriptorFollows : kUtf8Name, 2);
    Append(out, 0, 2);
    Append(out, 0, 4);
    Append(out, entry.crc32, 4);
    Append(out, large ? kLarge : entry.bytes, 4);
    Append(out, large ? kLarge : entry.bytes, 4);
    Append(out, entry.name.size(), 2);
    Append(out, extra.size(), 2);
    Append(out, 0, 2);  // comment
    Append(out, 0, 2);  // disk
    Append(out, 0, 2);  // internal attributes
    Append(out, 0, 4);  // external attributes
    Append(out, far ? kLarge : entry.offset, 4);
    out += entry.name;
    out += extra;
  }
  const uint64_t directory_bytes = out.size();
  const uint64_t end = begin + directory_bytes;  // of the directory
  // The end record's ZIP64 form and its locator, always, as torch.
  Append(out, 0x06064b50, 4);
  Append(out, 44, 8);
  Append(out, kVersionNeeded, 2);
  Append(out, kVersionNeeded, 2);
  Append(out, 0, 8);  // disks
  Append(out, entries.size(), 8);
  Append(out, entries.size(), 8);
  Append(out, directory_bytes, 8);
  Append(out, begin, 8);
  Append(out, 0x07064b50, 4);
  Append(out, 0, 4);
  Append(out, end, 8);
  Append(out, 1, 4);
  Append(out, 0x06054b50, 4);
  Append(out, 0, 4);
  Append(out, entries.size(), 2);
  Append(out, entries.size(), 2);
  Append(out, directory_bytes, 4);
  Append(out, begin >= kLarge ? kLarge : begin, 4);
  Append(out, 0, 2);
  return out;
}

}  // namespace holdfast::converter
