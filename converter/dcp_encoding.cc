#include "converter/dcp_encoding.h"

#include <algorithm>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/pickle_writer.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kModule = "torch.distributed.checkpoint.metadata";

class MetadataEncoder {
 public:
  explicit MetadataEncoder(const DcpMetadata& metadata) : metadata_(metadata) {}

  std::string Encode() && {
    Object(kModule, "Metadata");
    Fields([&] {
      out_.String("state_dict_metadata");
      Dict([&] {
        for (const DcpTensor& tensor : metadata_.tensors) Tensor(tensor);
        for (const DcpObject& object : metadata_.objects) {
          out_.String(object.key);
          Object(kModule, "BytesStorageMetadata");
        }
      });
      out_.String("planner_data");
      PlannerData();
      out_.String("storage_data");
      Dict([&] { Storage(); });
      out_.String("storage_meta");
      Object(kModule, "StorageMeta");
      Fields([&] {
        for (const std::string_view field : {"checkpoint_id", "save_id", "load_id"}) {
          out_.String(field);
          out_.None();
        }
        out_.String("modules");
        out_.EmptyList();
      });
      out_.String("version");
      out_.String(metadata_.version);
    });
    return std::move(out_).Finish();
  }

 private:
  // An object as its class's __new__ makes it.
  void Object(std::string_view module, std::string_view name) {
    out_.Global(module, name);
    out_.Tuple(0);
    out_.NewObject();
  }

  template <typename Items>
  void Dict(Items items) {
    out_.EmptyDict();
    out_.Mark();
    items();
    out_.SetItems();
  }

  // The state of the object before it.
  template <typename Items>
  void Fields(Items items) {
    Dict(items);
    out_.Build();
  }

  void Size(std::span<const uint64_t> sizes) {
    out_.Global("torch", "Size");
    out_.Mark();
    for (const uint64_t size : sizes) out_.Int(static_cast<int64_t>(size));
    out_.Tuple();
    out_.Tuple(1);
    out_.Reduce();
  }

  void Tensor(const DcpTensor& tensor) {
    out_.String(tensor.key);
    Object(kModule, "TensorStorageMetadata");
    Fields([&] {
      out_.String("properties");
      Object(kModule, "TensorProperties");
      out_.Mark();
      out_.Global("torch", tensor.dtype);
      out_.Global("torch.serialization", "_get_layout");
      out_.String("torch.strided");
      out_.Tuple(1);
      out_.Reduce();
      out_.Bool(tensor.requires_grad);
      out_.Global(kModule, "_MEM_FORMAT_ENCODING");
      out_.Int(0);  // TORCH_CONTIGUOUS_FORMAT
      out_.Tuple(1);
      out_.Reduce();
      out_.Bool(false);  // pin_memory
      out_.Tuple();
      out_.Build();
      out_.String("size");
      Size(tensor.shape);
      out_.String("chunks");
      out_.EmptyList();
      out_.Mark();
      CHECK(tensor.chunks_end <= metadata_.chunks.size());
      for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
        Object(kModule, "ChunkStorageMetadata");
        Fields([&] {
          out_.String("offsets");
          Size(metadata_.OffsetsOf(tensor, metadata_.chunks[c]));
          out_.String("sizes");
          Size(metadata_.SizesOf(tensor, metadata_.chunks[c]));
        });
      }
      out_.Appends();
    });
  }

  // As Megatron, None where no key has a path.
  void PlannerData() {
    const auto has_path = [](const auto& entry) { return !entry.path.empty(); };
    if (std::ranges::none_of(metadata_.tensors, has_path) &&
        std::ranges::none_of(metadata_.objects, has_path)) {
      return out_.None();
    }
    Dict([&] {
      for (const DcpTensor& tensor : metadata_.tensors) Path(tensor.key, tensor.path);
      for (const DcpObject& object : metadata_.objects) Path(object.key, object.path);
    });
  }

  void Path(const std::string& key, const std::vector<std::string>& path) {
    if (path.empty()) return;
    out_.String(key);
    out_.Mark();
    for (const std::string& part : path) out_.String(part);
    out_.Tuple();
  }

  void Storage() {
    for (const DcpTensor& tensor : metadata_.tensors) {
      for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
        const DcpChunk& chunk = metadata_.chunks[c];
        if (chunk.item == kNoItem) continue;
        Object(kModule, "MetadataIndex");
        Fields([&] {
          out_.String("fqn");
          out_.String(tensor.key);
          out_.String("index");
          out_.Int(static_cast<int64_t>(c - tensor.chunks_begin));
          out_.String("offset");
          Size(metadata_.OffsetsOf(tensor, chunk));
        });
        Item(chunk.item);
      }
    }
    for (const DcpObject& object : metadata_.objects) {
      if (object.item == kNoItem) continue;
      Object(kModule, "MetadataIndex");
      Fields([&] {
        out_.String("fqn");
        out_.String(object.key);
        out_.String("index");
        out_.None();
      });
      Item(object.item);
    }
  }

  void Item(uint32_t number) {
    CHECK(number < metadata_.items.size());
    const DcpItem& item = metadata_.items[number];
    CHECK(item.file < metadata_.files.size());
    Object("torch.distributed.checkpoint.filesystem", "_StorageInfo");
    Fields([&] {
      out_.String("relative_path");
      out_.String(metadata_.files[item.file]);
      out_.String("offset");
      out_.Int(static_cast<int64_t>(item.offset_bytes));
      out_.String("length");
      out_.Int(static_cast<int64_t>(item.stored_bytes));
      if (item.transforms == 0) return;  // PyTorch leaves the field out
      CHECK(item.transforms < metadata_.transforms.size());
      out_.String("transform_descriptors");
      out_.EmptyList();
      out_.Mark();
      for (const std::string& descriptor : metadata_.transforms[item.transforms]) {
        out_.String(descriptor);
      }
      out_.Appends();
    });
  }

  const DcpMetadata& metadata_;
  PickleWriter out_;
};

}  // namespace

std::string EncodeDcpMetadata(const DcpMetadata& metadata) {
  return MetadataEncoder(metadata).Encode();
}

}  // namespace holdfast::converter
