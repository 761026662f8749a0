#include "converter/dcp_metadata.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/pickle_reader.h"
#include "base/status_macros.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

using Type = PickleValue::Type;

enum class Kind : uint8_t {
  kUnknown,
  kOther,
  kMetadata,
  kTensor,
  kBytes,
  kChunk,
  kProperties,
  kIndex,
  kStorageInfo,
  kSize,
};

struct KnownClass {
  std::string_view module;
  std::string_view name;
  Kind kind;
};

constexpr std::string_view kNew = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kOld = "torch.distributed._shard.checkpoint.metadata";  // torch <= 1.13

constexpr KnownClass kClasses[] = {
    {kNew, "Metadata", Kind::kMetadata},
    {kOld, "Metadata", Kind::kMetadata},
    {"megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata", Kind::kMetadata},
    {kNew, "TensorStorageMetadata", Kind::kTensor},
    {kOld, "TensorStorageMetadata", Kind::kTensor},
    {kNew, "BytesStorageMetadata", Kind::kBytes},
    {kOld, "BytesStorageMetadata", Kind::kBytes},
    {kNew, "ChunkStorageMetadata", Kind::kChunk},
    {kOld, "ChunkStorageMetadata", Kind::kChunk},
    {kNew, "TensorProperties", Kind::kProperties},
    // torch <= 2.2
    {"torch.distributed._shard.sharded_tensor.metadata", "TensorProperties", Kind::kProperties},
    {kNew, "MetadataIndex", Kind::kIndex},
    {kOld, "MetadataIndex", Kind::kIndex},
    {"torch.distributed.checkpoint.filesystem", "_StorageInfo", Kind::kStorageInfo},
    {"torch.distributed._shard.checkpoint.filesystem", "_StorageInfo", Kind::kStorageInfo},
    {"torch", "Size", Kind::kSize},
};

bool IsIdentifier(std::string_view name) {
  return !name.empty() && std::ranges::all_of(name, [](char c) {
    return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  });
}

// Lists of transform descriptors that differ; a checkpoint has one or two.
constexpr size_t kTransformsMax = 1024;

class MetadataParser {
 public:
  MetadataParser(const PickleDocument& document, std::string_view name)
      : document_(document), name_(name), kinds_(document.value_count(), Kind::kUnknown) {}

  absl::StatusOr<DcpMetadata> Parse() {
    const PickleValue root = document_.root();
    ASSIGN_OR_RETURN(const PickleValue fields, StateOf(root, Kind::kMetadata, "Metadata"));
    metadata_.module = root.callee().module();
    metadata_.transforms.emplace_back();
    ASSIGN_OR_RETURN(const PickleValue states, DictAt(fields, "state_dict_metadata"));
    RETURN_IF_ERROR(ReadStates(states));
    ReadPlannerData(fields.Find("planner_data"));
    ASSIGN_OR_RETURN(const PickleValue storage, DictAt(fields, "storage_data"));
    RETURN_IF_ERROR(ReadStorage(storage));
    const PickleValue version = fields.Find("version");
    if (version.Is(Type::kString)) metadata_.version = *version.String();
    return std::move(metadata_);
  }

 private:
  absl::Status Broken(std::string_view what) const {
    return absl::DataLossError(absl::StrFormat("%s: %s", name_, what));
  }

  // `status` with the file's name before it.
  absl::Status Named(const absl::Status& status) const {
    return absl::Status(status.code(), absl::StrFormat("%s: %s", name_, status.message()));
  }

  Kind KindOf(PickleValue global) {
    if (!global.Is(Type::kGlobal)) return Kind::kOther;
    Kind& kind = kinds_[global.number()];
    if (kind == Kind::kUnknown) {
      kind = Kind::kOther;
      for (const KnownClass& known : kClasses) {
        if (global.IsGlobal(known.module, known.name)) kind = known.kind;
      }
    }
    return kind;
  }

  // The state that BUILD gave an object of this class.
  absl::StatusOr<PickleValue> StateOf(PickleValue object, Kind kind, std::string_view expected) {
    if (!object.Is(Type::kObject) || KindOf(object.callee()) != kind) {
      return Named(object.Mismatch(absl::StrFormat("a %s", expected)));
    }
    const PickleValue state = object.state();
    if (!state.present()) return Broken(absl::StrFormat("a %s without fields", expected));
    return state;
  }

  absl::StatusOr<PickleValue> DictAt(PickleValue fields, std::string_view key) {
    const PickleValue value = fields.Find(key);
    if (!value.Is(Type::kDict)) return Named(value.Mismatch(absl::StrFormat("a dict in %s", key)));
    return value;
  }

  absl::StatusOr<std::string_view> StringAt(PickleValue fields, std::string_view key) {
    const PickleValue value = fields.Find(key);
    if (!value.Is(Type::kString))
      return Named(value.Mismatch(absl::StrFormat("a string in %s", key)));
    return value.String();
  }

  absl::StatusOr<uint64_t> NumberAt(PickleValue fields, std::string_view key) {
    const PickleValue value = fields.Find(key);
    const absl::StatusOr<uint64_t> number = value.Uint64();
    if (!number.ok()) return Named(value.Mismatch(absl::StrFormat("a size in %s", key)));
    return number;
  }

  // Appends the numbers of a torch.Size, tuple or list to metadata_.numbers; gives their count.
  absl::StatusOr<size_t> AppendNumbers(PickleValue value, std::string_view field) {
    if (value.Is(Type::kObject) && KindOf(value.callee()) == Kind::kSize) {
      const PickleValue args = value.args();
      if (args.present() && *args.ArraySize() == 1) value = args[0];
    }
    if (!value.Is(Type::kTuple) && !value.Is(Type::kList)) {
      return Named(value.Mismatch(absl::StrFormat("a torch.Size in %s", field)));
    }
    const size_t count = *value.ArraySize();
    if (count > kTensorDimsMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: expected at most %d dimensions in %s, found %d", name_,
                          kTensorDimsMax, field, count));
    }
    for (size_t i = 0; i < count; ++i) {
      const absl::StatusOr<uint64_t> number = value[i].Uint64();
      if (!number.ok()) return Named(value[i].Mismatch(absl::StrFormat("a size in %s", field)));
      metadata_.numbers.push_back(*number);
    }
    return count;
  }

  absl::Status ReadStates(PickleValue states) {
    const size_t count = *states.EntryCount();
    for (size_t i = 0; i < count; ++i) {
      const PickleValue key = states.Key(i);
      if (!key.Is(Type::kString)) return Named(key.Mismatch("a key of state_dict_metadata"));
      const std::string_view text = *key.String();
      const PickleValue value = states.Entry(i);
      if (value.Is(Type::kObject) && KindOf(value.callee()) == Kind::kBytes) {
        place_of_[text] = {.object = true,
                           .number = static_cast<uint32_t>(metadata_.objects.size())};
        metadata_.objects.push_back({.key = std::string(text)});
        continue;
      }
      place_of_[text] = {.object = false,
                         .number = static_cast<uint32_t>(metadata_.tensors.size())};
      RETURN_IF_ERROR(ReadTensor(text, value));
    }
    return absl::OkStatus();
  }

  absl::Status ReadTensor(std::string_view key, PickleValue value) {
    ASSIGN_OR_RETURN(const PickleValue fields,
                     StateOf(value, Kind::kTensor, "TensorStorageMetadata"));
    DcpTensor tensor{.key = std::string(key)};
    RETURN_IF_ERROR(ReadProperties(fields.Find("properties"), tensor));
    const size_t begin = metadata_.numbers.size();
    RETURN_IF_ERROR(AppendNumbers(fields.Find("size"), "size").status());
    tensor.shape.assign(metadata_.numbers.begin() + static_cast<std::ptrdiff_t>(begin),
                        metadata_.numbers.end());
    metadata_.numbers.resize(begin);
    const PickleValue chunks = fields.Find("chunks");
    if (!chunks.Is(Type::kList)) return Named(chunks.Mismatch("a list of chunks"));
    tensor.chunks_begin = metadata_.chunks.size();
    const size_t count = *chunks.ArraySize();
    for (size_t i = 0; i < count; ++i) RETURN_IF_ERROR(ReadChunk(chunks[i], tensor));
    tensor.chunks_end = metadata_.chunks.size();
    metadata_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  absl::Status ReadProperties(PickleValue value, DcpTensor& tensor) {
    ASSIGN_OR_RETURN(const PickleValue state,
                     StateOf(value, Kind::kProperties, "TensorProperties"));
    // (dtype, layout, requires_grad, memory format, pin_memory); the rest is deprecated.
    if (!state.Is(Type::kTuple) || *state.ArraySize() < 3) {
      return Named(state.Mismatch("the tuple of TensorProperties"));
    }
    const PickleValue dtype = state[0];
    if (!dtype.Is(Type::kGlobal) || dtype.module() != "torch") {
      return Named(dtype.Mismatch("a torch.dtype"));
    }
    tensor.dtype = dtype.name();
    if (!IsIdentifier(tensor.dtype)) return Broken("a torch.dtype whose name is no identifier");
    tensor.requires_grad = state[2].Is(Type::kBool) && *state[2].Bool();
    return absl::OkStatus();
  }

  absl::Status ReadChunk(PickleValue value, const DcpTensor& tensor) {
    ASSIGN_OR_RETURN(const PickleValue fields,
                     StateOf(value, Kind::kChunk, "ChunkStorageMetadata"));
    const DcpChunk chunk{.offsets = metadata_.numbers.size()};
    const size_t dims = tensor.shape.size();
    ASSIGN_OR_RETURN(const size_t offsets, AppendNumbers(fields.Find("offsets"), "offsets"));
    ASSIGN_OR_RETURN(const size_t sizes, AppendNumbers(fields.Find("sizes"), "sizes"));
    if (offsets != dims || sizes != dims) {
      return Broken(absl::StrFormat("%s: expected chunks of %d dimensions, found %d and %d",
                                    tensor.key, dims, offsets, sizes));
    }
    const uint64_t* const numbers = metadata_.numbers.data() + chunk.offsets;
    for (size_t d = 0; d < dims; ++d) {
      if (numbers[d] > tensor.shape[d] || numbers[dims + d] > tensor.shape[d] - numbers[d]) {
        return Broken(absl::StrFormat(
            "%s: expected a chunk within %d in dimension %d, found [%d, %d + %d)", tensor.key,
            tensor.shape[d], d, numbers[d], numbers[d], numbers[dims + d]));
      }
    }
    metadata_.chunks.push_back(chunk);
    return absl::OkStatus();
  }

  // Only the default planner's mapping is of use; whatever else stands there is left alone.
  void ReadPlannerData(PickleValue planner) {
    if (!planner.Is(Type::kDict)) return;
    const size_t count = *planner.EntryCount();
    for (size_t i = 0; i < count; ++i) {
      const PickleValue key = planner.Key(i);
      const PickleValue parts = planner.Entry(i);
      if (!key.Is(Type::kString) || !parts.Is(Type::kTuple)) continue;
      std::vector<std::string> path;
      for (size_t p = 0; p < *parts.ArraySize(); ++p) {
        const PickleValue part = parts[p];
        if (part.Is(Type::kString)) {
          path.emplace_back(*part.String());
        } else if (part.Is(Type::kInteger)) {
          path.push_back(absl::StrCat(*part.Int64()));
        } else {
          path.clear();
          break;
        }
      }
      const auto place = place_of_.find(*key.String());
      if (place == place_of_.end() || path.empty()) continue;
      metadata_.planner_order.emplace_back(*key.String());
      (place->second.object ? metadata_.objects[place->second.number].path
                            : metadata_.tensors[place->second.number].path) = std::move(path);
    }
  }

  absl::Status ReadStorage(PickleValue storage) {
    const size_t count = *storage.EntryCount();
    if (count >= kNoItem)
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: expected fewer than %d items, found %d", name_, kNoItem, count));
    metadata_.items.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const PickleValue index,
                       StateOf(storage.Key(i), Kind::kIndex, "MetadataIndex"));
      ASSIGN_OR_RETURN(const std::string_view key, StringAt(index, "fqn"));
      ASSIGN_OR_RETURN(const DcpItem item, ReadItem(storage.Entry(i)));
      const auto place = place_of_.find(key);
      if (place == place_of_.end()) {
        return Broken(
            absl::StrFormat("an item of %s, which state_dict_metadata does not name", key));
      }
      const auto number = static_cast<uint32_t>(metadata_.items.size());
      metadata_.items.push_back(item);
      if (place->second.object) {
        metadata_.objects[place->second.number].item = number;
        continue;
      }
      ASSIGN_OR_RETURN(DcpChunk * chunk, ChunkAt(place->second.number, index));
      chunk->item = number;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<DcpItem> ReadItem(PickleValue value) {
    ASSIGN_OR_RETURN(const PickleValue fields, StateOf(value, Kind::kStorageInfo, "_StorageInfo"));
    DcpItem item;
    ASSIGN_OR_RETURN(const std::string_view path, StringAt(fields, "relative_path"));
    ASSIGN_OR_RETURN(item.offset_bytes, NumberAt(fields, "offset"));
    ASSIGN_OR_RETURN(item.stored_bytes, NumberAt(fields, "length"));
    const auto [file, added] =
        file_of_.try_emplace(path, static_cast<uint32_t>(metadata_.files.size()));
    if (added) metadata_.files.emplace_back(path);
    item.file = file->second;
    const PickleValue transforms = fields.Find("transform_descriptors");
    if (transforms.present() && !transforms.Is(Type::kNone)) {
      ASSIGN_OR_RETURN(item.transforms, TransformsOf(transforms));
    }
    return item;
  }

  absl::StatusOr<uint32_t> TransformsOf(PickleValue value) {
    const auto known = transforms_of_.find(value.number());
    if (known != transforms_of_.end()) return known->second;
    if (!value.Is(Type::kList) && !value.Is(Type::kTuple)) {
      return Named(value.Mismatch("a list of transform descriptors"));
    }
    std::vector<std::string> descriptors;
    for (size_t i = 0; i < *value.ArraySize(); ++i) {
      if (!value[i].Is(Type::kString)) return Named(value[i].Mismatch("a transform descriptor"));
      descriptors.emplace_back(*value[i].String());
    }
    const auto begin = metadata_.transforms.begin();
    const auto equal = std::find(begin, metadata_.transforms.end(), descriptors);
    const auto number = static_cast<uint32_t>(equal - begin);
    if (equal == metadata_.transforms.end()) {
      if (number >= kTransformsMax)
        return absl::ResourceExhaustedError(absl::StrFormat(
            "%s: expected at most %d lists of transforms, found more", name_, kTransformsMax));
      metadata_.transforms.push_back(std::move(descriptors));
    }
    transforms_of_[value.number()] = number;
    return number;
  }

  // The chunk that a MetadataIndex means: by its offset; the index is only a hint.
  absl::StatusOr<DcpChunk*> ChunkAt(uint32_t tensor_number, PickleValue index) {
    const DcpTensor& tensor = metadata_.tensors[tensor_number];
    const size_t count = tensor.chunks_end - tensor.chunks_begin;
    const size_t begin = metadata_.numbers.size();
    const PickleValue value = index.Find("offset");
    size_t dims = tensor.shape.size();
    if (value.present() && !value.Is(Type::kNone)) {
      ASSIGN_OR_RETURN(dims, AppendNumbers(value, "offset"));
    } else {
      metadata_.numbers.resize(begin + dims);  // none: the whole tensor
    }
    std::array<uint64_t, kTensorDimsMax> numbers;
    const std::span offset = std::span(numbers).first(dims);
    std::copy_n(metadata_.numbers.begin() + static_cast<std::ptrdiff_t>(begin), dims,
                offset.begin());
    metadata_.numbers.resize(begin);
    DcpChunk* const chunks = metadata_.chunks.data() + tensor.chunks_begin;
    const auto at = [&](size_t i) { return metadata_.OffsetsOf(tensor, chunks[i]); };
    const absl::StatusOr<uint64_t> hint = index.Find("index").Uint64();
    if (hint.ok() && *hint < count && std::ranges::equal(at(*hint), offset)) {
      return &chunks[*hint];
    }
    std::vector<uint32_t>& order = chunk_order_[tensor_number];
    if (order.size() != count) {
      order.resize(count);
      std::iota(order.begin(), order.end(), 0);
      std::ranges::sort(order, [&](uint32_t a, uint32_t b) {
        return std::ranges::lexicographical_compare(at(a), at(b));
      });
    }
    const auto found = std::ranges::partition_point(
        order, [&](uint32_t i) { return std::ranges::lexicographical_compare(at(i), offset); });
    if (found == order.end() || !std::ranges::equal(at(*found), offset)) {
      return Broken(absl::StrCat(tensor.key, ": an item at an offset at which no chunk begins"));
    }
    return &chunks[*found];
  }

  struct Place {
    bool object = false;
    uint32_t number = 0;  // in tensors or objects
  };

  const PickleDocument& document_;
  const std::string_view name_;
  std::vector<Kind> kinds_;  // of globals, by value number
  std::unordered_map<std::string_view, Place> place_of_;
  std::unordered_map<std::string_view, uint32_t> file_of_;
  std::unordered_map<uint32_t, uint32_t> transforms_of_;             // by value number
  std::unordered_map<uint32_t, std::vector<uint32_t>> chunk_order_;  // by offsets
  DcpMetadata metadata_;
};

}  // namespace

absl::StatusOr<DcpMetadata> ParseDcpMetadata(std::string bytes, std::string_view name) {
  if (bytes.size() > kDcpMetadataBytesMax) {
    return absl::ResourceExhaustedError(absl::StrFormat("%s: expected at most %d bytes, found %d",
                                                        name, kDcpMetadataBytesMax, bytes.size()));
  }
  // A value takes a byte at least.
  const PickleOptions options{.bytes_max = kDcpMetadataBytesMax,
                              .values_max = bytes.size(),
                              .classes = PickleOptions::Classes::kOpaque};
  absl::StatusOr<std::unique_ptr<PickleDocument>> document =
      PickleDocument::Parse(std::move(bytes), options);
  if (!document.ok()) {
    return absl::Status(document.status().code(),
                        absl::StrFormat("%s: %s", name, document.status().message()));
  }
  return MetadataParser(**document, name).Parse();
}

}  // namespace holdfast::converter
