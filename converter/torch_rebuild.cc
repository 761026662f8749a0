// What the objects of a torch pickle stand for: the list of functions and classes that are
// understood, each by what torch and Python make of its arguments. Nothing is called. What is not
// here stays an opaque node.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/torch_file.h"
#include "converter/torch_file_builder.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

using Type = PickleValue::Type;

// A note is made of storages that are larger than this and than four times what is used of them.
constexpr uint64_t kBloatBytesMin = uint64_t{1} << 20;

struct StorageType {
  std::string_view name;
  std::optional<Dtype> dtype;  // none: its elements mean something only with scale and zero point
  uint8_t element_bytes;
};

// torch/storage.py, _dtype_to_storage_type_map.
constexpr StorageType kStorageTypes[] = {
    {"DoubleStorage", Dtype::kFloat64, 8},
    {"FloatStorage", Dtype::kFloat32, 4},
    {"HalfStorage", Dtype::kFloat16, 2},
    {"BFloat16Storage", Dtype::kBfloat16, 2},
    {"LongStorage", Dtype::kInt64, 8},
    {"IntStorage", Dtype::kInt32, 4},
    {"ShortStorage", Dtype::kInt16, 2},
    {"CharStorage", Dtype::kInt8, 1},
    {"ByteStorage", Dtype::kUint8, 1},
    {"BoolStorage", Dtype::kBool, 1},
    {"ComplexDoubleStorage", Dtype::kComplex128, 16},
    {"ComplexFloatStorage", Dtype::kComplex64, 8},
    {"QInt8Storage", std::nullopt, 1},
    {"QUInt8Storage", std::nullopt, 1},
    {"QInt32Storage", std::nullopt, 4},
    {"QUInt4x2Storage", std::nullopt, 1},
    {"QUInt2x4Storage", std::nullopt, 1},
};

bool IsComplex(Dtype dtype) {
  return dtype == Dtype::kComplex32 || dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128;
}

bool IsBuiltin(PickleValue callee, std::string_view name) {
  return callee.IsGlobal("builtins", name) || callee.IsGlobal("__builtin__", name);
}

// Integers that are not negative; booleans are none.
absl::StatusOr<std::vector<uint64_t>> Sizes(PickleValue value) {
  // torch.Size((2, 3))
  if (value.IsCallOf("torch", "Size") && value.args().present() && *value.args().ArraySize() == 1) {
    value = value.args()[0];
  }
  ASSIGN_OR_RETURN(const size_t count, value.ArraySize());
  if (count > kTorchDimsMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected at most %d dimensions, found %d", kTorchDimsMax, count));
  }
  std::vector<uint64_t> sizes(count);
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(sizes[i], value[i].Uint64());
  }
  return sizes;
}

// The bytes of text in which every character stands for one (Python's latin1); nothing if one does
// not.
std::optional<std::string> Latin1(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    if (lead < 0x80) {
      bytes.push_back(text[i]);
    } else if (lead == 0xC2 || lead == 0xC3) {
      const uint8_t low = static_cast<uint8_t>(text[++i]);
      bytes.push_back(static_cast<char>((lead & 0x03) << 6 | (low & 0x3F)));
    } else {
      return std::nullopt;
    }
  }
  return bytes;
}

// numpy.dtype('f8', False, True), with state (3, '<', ...) for a byte order: its letters, "<f8".
std::string NumpyDtype(PickleValue value) {
  if (!value.IsCallOf("numpy", "dtype") || *value.args().ArraySize() == 0 ||
      !value.args()[0].Is(Type::kString)) {
    return "";
  }
  std::string order = "|";
  const PickleValue state = value.state();
  if (state.Is(Type::kTuple) && *state.ArraySize() > 1 && state[1].Is(Type::kString)) {
    order = *state[1].String();
  }
  return absl::StrCat(order, std::string(*value.args()[0].String()));
}

}  // namespace

absl::StatusOr<TorchFileBuilder::StorageId> TorchFileBuilder::ReadStorageId(
    PickleValue value) const {
  const PickleValue id = value.persistent_id();
  const bool legacy = file_->container_ == TorchFile::Container::kLegacy;
  const size_t count_expected = legacy ? 6 : 5;
  const bool is_tuple = id.Is(Type::kTuple);
  if (!is_tuple || *id.ArraySize() < 5 || *id.ArraySize() > count_expected ||
      !id[0].Is(Type::kString) || *id[0].String() != "storage") {
    return Broken(
        absl::StrFormat("expected a storage ('storage', type, key, location, count), "
                        "found %s",
                        is_tuple ? "another tuple" : value.Describe()));
  }
  StorageId storage;
  const PickleValue type = id[1];
  const StorageType* found = nullptr;
  for (const StorageType& known : kStorageTypes) {
    if (type.IsGlobal("torch", known.name) || type.IsGlobal("torch.cuda", known.name)) {
      found = &known;
    }
  }
  if (found != nullptr) {
    storage.dtype = found->dtype;
    storage.element_bytes = found->element_bytes;
  } else if (!type.IsGlobal("torch.storage", "UntypedStorage")) {
    return absl::PermissionDeniedError(absl::StrFormat(
        "%s: expected the type of a storage, found %s", file_->name_, type.Describe()));
  }
  const absl::StatusOr<std::string_view> key = id[2].String();
  if (!key.ok()) return WithName(key.status(), "key of a storage");
  storage.key = *key;
  const absl::StatusOr<std::string_view> location = id[3].String();
  if (!location.ok()) return WithName(location.status(), "location of a storage");
  storage.location = *location;
  const absl::StatusOr<uint64_t> count = id[4].Uint64();
  if (!count.ok()) return WithName(count.status(), "element count of a storage");
  storage.count = *count;
  if (storage.count > kTensorBytesMax / storage.element_bytes) {
    return Broken(
        absl::StrFormat("storage \"%s\": %d elements are too many", storage.key, storage.count));
  }
  storage.bytes = storage.count * storage.element_bytes;
  if (*id.ArraySize() == 6 && !id[5].Is(Type::kNone)) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: storage \"%s\": is a view of another one, as torch 0.1 to 0.3 wrote "
                        "it: load it with torch and save it again",
                        file_->name_, storage.key));
  }
  return storage;
}

absl::StatusOr<uint32_t> TorchFileBuilder::StorageOf(const StorageId& id) {
  const auto known = storage_by_key_.find(id.key);
  if (known != storage_by_key_.end()) {
    if (const uint64_t bytes = file_->storages_[known->second].bytes; bytes != id.bytes) {
      return Broken(absl::StrFormat("storage \"%s\": has %d bytes in one place and %d in another",
                                    id.key, bytes, id.bytes));
    }
    return known->second;
  }
  const auto record = records_.find(id.key);
  if (record == records_.end()) {
    return Broken(absl::StrFormat("storage \"%s\": is not in the file", id.key));
  }
  if (record->second.deflated) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: storage \"%s\": is deflated", file_->name_, id.key));
  }
  if (record->second.bytes != id.bytes) {
    return Broken(absl::StrFormat("storage \"%s\": expected %d bytes, found %d", id.key, id.bytes,
                                  record->second.bytes));
  }
  TorchStorage storage;
  storage.key = id.key;
  storage.location = id.location;
  storage.offset = record->second.offset;
  storage.bytes = id.bytes;
  storage.crc32 = record->second.crc32;
  storage.written = !unwritten_;
  const uint32_t number = static_cast<uint32_t>(file_->storages_.size());
  file_->storages_.push_back(std::move(storage));
  storage_by_key_.emplace(id.key, number);
  return number;
}

// (storage, offset, size, strides, requires_grad, hooks[, dtype][, metadata]); hooks are functions
// of a training process, which nobody needs here.
absl::Status TorchFileBuilder::DenseTensor(PickleValue args, bool has_dtype, TorchTensor& tensor) {
  const size_t count = *args.ArraySize();
  const size_t metadata_at = has_dtype ? 7 : 6;
  // _rebuild_tensor of torch 0.1 has the first four only.
  if (count < 4 || (has_dtype && count < 7) || count > metadata_at + 1) {
    return Broken(absl::StrFormat("tensor: expected %d arguments, found %d", metadata_at, count));
  }
  if (!args[0].Is(Type::kPersistent)) {
    return Broken(absl::StrCat("tensor: expected a storage, found ", args[0].Describe()));
  }
  ASSIGN_OR_RETURN(const StorageId id, ReadStorageId(args[0]));
  ASSIGN_OR_RETURN(tensor.storage, StorageOf(id));
  const std::string where = absl::StrFormat("tensor in storage \"%s\"", id.key);
  std::optional<Dtype> dtype = id.dtype;
  if (has_dtype) {
    dtype = args[6].module() == "torch" ? DtypeFromName(args[6].name()) : std::nullopt;
    if (!dtype.has_value()) {
      return WithName(args[6].Mismatch("a dtype of torch"), where);
    }
  }
  if (!dtype.has_value()) {
    return Broken(absl::StrCat(where, ": expected a storage with a dtype"));
  }
  tensor.dtype = *dtype;
  const absl::StatusOr<uint64_t> offset = args[1].Uint64();
  if (!offset.ok()) return WithName(offset.status(), absl::StrCat(where, ": offset"));
  tensor.offset = *offset;
  absl::StatusOr<std::vector<uint64_t>> shape = Sizes(args[2]);
  if (!shape.ok()) return WithName(shape.status(), absl::StrCat(where, ": size"));
  tensor.shape = *std::move(shape);
  absl::StatusOr<std::vector<uint64_t>> strides = Sizes(args[3]);
  if (!strides.ok()) return WithName(strides.status(), absl::StrCat(where, ": strides"));
  tensor.strides = *std::move(strides);
  if (tensor.strides.size() != tensor.shape.size()) {
    return Broken(absl::StrFormat("%s: has %d dimensions and %d strides", where,
                                  tensor.shape.size(), tensor.strides.size()));
  }
  if (count > 4 && args[4].Is(Type::kBool)) tensor.requires_grad = *args[4].Bool();
  if (count > metadata_at) {
    if (const absl::Status flags = ReadFlags(args[metadata_at], tensor); !flags.ok()) {
      return WithName(flags, where);
    }
  }
  const absl::Status reach = CheckReach(tensor, id.bytes);
  return reach.ok() ? reach : WithName(reach, where);
}

// {'conj': True}, {'neg': True}: anything else could change the numbers in a way that is not known.
absl::Status TorchFileBuilder::ReadFlags(PickleValue metadata, TorchTensor& tensor) const {
  if (metadata.Is(Type::kNone)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, metadata.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view key, metadata.Key(i).String());
    ASSIGN_OR_RETURN(const bool value, metadata.Entry(i).Bool());
    if (key != "conj" && key != "neg") {
      return absl::UnimplementedError(
          absl::StrFormat("expected the flags conj and neg, found \"%s\"", key.substr(0, 100)));
    }
    (key == "conj" ? tensor.conj : tensor.neg) = value;
  }
  if (tensor.conj && !IsComplex(tensor.dtype)) {
    return absl::InvalidArgumentError("expected complex numbers to be conjugated");
  }
  return absl::OkStatus();
}

// That all elements lie in the storage, without a product or sum that overflows.
absl::Status TorchFileBuilder::CheckReach(const TorchTensor& tensor, uint64_t storage_bytes) const {
  const uint64_t element_bytes = ElementBytes(tensor.dtype);
  const uint64_t elements_max = kTensorBytesMax / element_bytes;
  uint64_t elements = 1;  // as if there were no empty dimension
  bool empty = false;
  for (const uint64_t size : tensor.shape) {
    empty = empty || size == 0;
    if (size == 0) continue;
    if (elements > elements_max / size) {
      return absl::InvalidArgumentError("expected at most 2^62 bytes");
    }
    elements *= size;
  }
  if (empty) return absl::OkStatus();
  const uint64_t available = storage_bytes / element_bytes;
  uint64_t last = tensor.offset;
  bool reaches = last < available;
  for (size_t i = 0; reaches && i < tensor.shape.size(); ++i) {
    const uint64_t steps = tensor.shape[i] - 1;
    if (steps == 0 || tensor.strides[i] == 0) continue;
    reaches = steps <= (available - 1 - last) / tensor.strides[i];
    if (reaches) last += steps * tensor.strides[i];
  }
  if (reaches) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "its elements reach past the end of the storage, which has %d of them", available));
}

absl::Status TorchFileBuilder::AddTensor(TorchTensor tensor, Meaning& meaning) {
  if (file_->tensors_.size() >= kTorchTensorsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: expected at most %d tensors", file_->name_, kTorchTensorsMax));
  }
  meaning.kind = Kind::kTensor;
  meaning.parameter = tensor.parameter;
  meaning.tensor = static_cast<uint32_t>(file_->tensors_.size());
  file_->tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

// The functions of torch._utils and torch._tensor that make tensors. `understood` stays false for
// those that make another kind (sparse, quantised, nested, on meta, wrapper subclasses).
absl::Status TorchFileBuilder::InterpretTensor(PickleValue object, std::string_view function,
                                               PickleValue args, Meaning& meaning,
                                               bool& understood) {
  const size_t count = *args.ArraySize();
  if (function == "_rebuild_tensor" || function == "_rebuild_tensor_v2" ||
      function == "_rebuild_tensor_v3") {
    TorchTensor tensor;
    RETURN_IF_ERROR(DenseTensor(args, function == "_rebuild_tensor_v3", tensor));
    understood = true;
    return AddTensor(std::move(tensor), meaning);
  }
  if ((function == "_rebuild_parameter" || function == "_rebuild_parameter_with_state") &&
      count >= 3) {
    const auto inner = file_->meanings_.find(args[0].number());
    if (inner != file_->meanings_.end() && inner->second.kind == Kind::kTensor) {
      TorchTensor tensor = file_->tensors_[inner->second.tensor];
      tensor.parameter = true;
      if (args[1].Is(Type::kBool)) tensor.requires_grad = *args[1].Bool();
      meaning.attributes = count > 3 ? args[3] : inner->second.attributes;
      understood = true;
      return AddTensor(std::move(tensor), meaning);
    }
    if (args[0].Is(Type::kObject)) {  // a parameter around what is not dense
      meaning.parameter = true;
      meaning.value = args[0];
      understood = true;
    }
    return absl::OkStatus();
  }
  if ((function == "_rebuild_from_type_v2" || function == "_rebuild_from_type") && count == 4 &&
      args[0].module() == "torch._utils" && args[2].Is(Type::kTuple)) {
    // A plain tensor or parameter with attributes. Of any other class nobody knows what its numbers
    // mean.
    const PickleValue type = args[1];
    const bool plain = type.IsGlobal("torch", "Tensor") ||
                       type.IsGlobal("torch._tensor", "Tensor") ||
                       type.IsGlobal("torch.nn.parameter", "Parameter") ||
                       type.IsGlobal("torch.nn.parameter", "Buffer");
    const bool nested = args[0].name().starts_with("_rebuild_from_type");
    if (!plain || nested) return absl::OkStatus();
    RETURN_IF_ERROR(InterpretTensor(object, args[0].name(), args[2], meaning, understood));
    meaning.attributes = args[3];
  }
  return absl::OkStatus();
}

// Containers of Python's library: what they hold is a container of the pickle.
bool TorchFileBuilder::InterpretContainer(PickleValue object, Meaning& meaning) const {
  const PickleValue callee = object.callee();
  const PickleValue args = object.args();
  const size_t count = *args.ArraySize();
  const auto is = [&](Kind kind, PickleValue value) {
    meaning.kind = kind;
    meaning.value = value;
    return true;
  };
  if (callee.IsGlobal("collections", "OrderedDict") ||
      callee.IsGlobal("collections", "defaultdict") || callee.IsGlobal("collections", "Counter")) {
    // Counter is called with its dict; the entries of the others are set afterwards.
    const bool called_with = count == 1 && args[0].Is(Type::kDict);
    if (object.entries().present() && called_with) return false;
    return is(Kind::kDict, called_with ? args[0] : object.entries());
  }
  if (callee.IsGlobal("collections", "deque")) {
    const bool empty = count == 0 || (args[0].Is(Type::kList) && *args[0].ArraySize() == 0) ||
                       (count == 1 && args[0].Is(Type::kTuple) && *args[0].ArraySize() == 0);
    return empty && is(Kind::kList, object.items());
  }
  if (count != 1) return false;
  const bool sequence = args[0].Is(Type::kTuple) || args[0].Is(Type::kList);
  if (callee.IsGlobal("torch", "Size")) return sequence && is(Kind::kTuple, args[0]);
  if (IsBuiltin(callee, "set") || IsBuiltin(callee, "frozenset")) {
    return sequence && is(Kind::kSet, args[0]);
  }
  return false;
}

// Bytes as protocol 2 writes them, bytearrays, and numpy's scalars.
bool TorchFileBuilder::InterpretScalar(PickleValue object, Meaning& meaning) const {
  const PickleValue callee = object.callee();
  const PickleValue args = object.args();
  const size_t count = *args.ArraySize();
  const auto bytes_of = [&](PickleValue value) -> std::optional<std::string> {
    if (const auto bytes = value.Bytes(); bytes.ok()) return std::string(*bytes);
    const auto known = file_->meanings_.find(value.number());
    if (value.Is(Type::kObject) && known != file_->meanings_.end() &&
        known->second.kind == Kind::kBytes) {
      return known->second.bytes;
    }
    return std::nullopt;
  };
  std::optional<std::string> bytes;
  if (callee.IsGlobal("_codecs", "encode") && count == 2 && args[0].Is(Type::kString) &&
      args[1].Is(Type::kString) &&
      (*args[1].String() == "latin1" || *args[1].String() == "latin-1")) {
    bytes = Latin1(*args[0].String());
  } else if (IsBuiltin(callee, "bytes") && count == 0) {
    bytes = "";
  } else if (IsBuiltin(callee, "bytearray")) {
    if (count == 0) bytes = "";
    if (count == 1) bytes = bytes_of(args[0]);
    if (count == 2 && args[0].Is(Type::kString)) bytes = Latin1(*args[0].String());
  }
  if (bytes.has_value()) {
    meaning.kind = Kind::kBytes;
    meaning.bytes = *std::move(bytes);
    return true;
  }
  const bool is_scalar = callee.IsGlobal("numpy._core.multiarray", "scalar") ||
                         callee.IsGlobal("numpy.core.multiarray", "scalar");
  if (!is_scalar || count != 2) return false;
  const std::string dtype = NumpyDtype(args[0]);
  const std::optional<std::string> raw = bytes_of(args[1]);
  if (dtype.size() < 3 || !raw.has_value() || dtype[0] == '>' || raw->size() > 8 ||
      absl::StrCat(raw->size()) != dtype.substr(2)) {
    return false;
  }
  uint64_t bits = 0;
  std::memcpy(&bits, raw->data(), raw->size());
  const unsigned unused = static_cast<unsigned>(64 - 8 * raw->size());
  if (dtype[1] == 'f' && raw->size() == 8) {
    meaning.real = std::bit_cast<double>(bits);
  } else if (dtype[1] == 'f' && raw->size() == 4) {
    meaning.real = std::bit_cast<float>(static_cast<uint32_t>(bits));
  } else if (dtype[1] == 'i') {
    meaning.integer = static_cast<int64_t>(bits << unused) >> unused;
  } else if (dtype[1] == 'b' || (dtype[1] == 'u' && bits <= INT64_MAX)) {
    meaning.integer = static_cast<int64_t>(bits);
  } else {
    return false;
  }
  meaning.kind = dtype[1] == 'f' ? Kind::kFloat : dtype[1] == 'b' ? Kind::kBool : Kind::kInteger;
  return true;
}

absl::Status TorchFileBuilder::Interpret(PickleValue object) {
  const PickleValue callee = object.callee();
  Meaning meaning;
  bool understood = false;
  if (callee.module() == "torch._utils" || callee.module() == "torch._tensor") {
    RETURN_IF_ERROR(InterpretTensor(object, callee.name(), object.args(), meaning, understood));
  } else {
    understood = InterpretContainer(object, meaning) || InterpretScalar(object, meaning);
  }
  if (understood) file_->meanings_.emplace(object.number(), std::move(meaning));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TorchFile>> TorchFileBuilder::Build() {
  // Arguments come before what is made of them.
  std::vector<PickleValue> objects;
  file_->document_->Walk([&objects](PickleValue value) {
    if (value.Is(Type::kObject)) objects.push_back(value);
    return PickleDocument::Step::kInto;
  });
  std::sort(objects.begin(), objects.end(),
            [](PickleValue a, PickleValue b) { return a.number() < b.number(); });
  for (const PickleValue object : objects) RETURN_IF_ERROR(Interpret(object));
  WarnOfBloat();
  return std::move(file_);
}

// A small view keeps its whole storage in the file.
void TorchFileBuilder::WarnOfBloat() {
  std::vector<uint64_t> used(file_->storages_.size());
  for (const TorchTensor& tensor : file_->tensors_) {
    uint64_t& bytes = used[tensor.storage];
    bytes += std::min(tensor.Bytes(), file_->storages_[tensor.storage].bytes);
  }
  for (size_t i = 0; i < used.size(); ++i) {
    const TorchStorage& storage = file_->storages_[i];
    if (storage.bytes >= kBloatBytesMin && used[i] < storage.bytes / 4) {
      file_->warnings_.push_back(
          absl::StrFormat("%s: storage \"%s\" has %d bytes, of which tensors use %d", file_->name_,
                          storage.key, storage.bytes, used[i]));
    }
  }
}

}  // namespace holdfast::converter
