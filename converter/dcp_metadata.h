// What a `.metadata` file of torch.distributed.checkpoint says: which tensors there are, into which
// boxes they are cut, and where each box lies. It is a pickle of PyTorch's own dataclasses:
//
//   Metadata(state_dict_metadata: {key: TensorStorageMetadata | BytesStorageMetadata},
//            planner_data: {key: (str | int, ...)} | anything,
//            storage_data: {MetadataIndex(key, offset, index): _StorageInfo},
//            storage_meta: StorageMeta, version: str)
//   TensorStorageMetadata(properties: TensorProperties, size, chunks: [ChunkStorageMetadata])
//   ChunkStorageMetadata(offsets, sizes)
//   _StorageInfo(relative_path, offset, length[, transform_descriptors])
//
// Sources: torch/distributed/checkpoint/{metadata,filesystem}.py of 2.13, _shard/checkpoint
// of 1.13. The items themselves are for converter/dcp_reader.h.
#ifndef HOLDFAST_CONVERTER_DCP_METADATA_H_
#define HOLDFAST_CONVERTER_DCP_METADATA_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast::converter {

inline constexpr size_t kDcpMetadataBytesMax = size_t{512} << 20;

// Where an item lies: a box of a tensor, or an object.
struct DcpItem {
  uint64_t offset_bytes = 0;
  uint64_t stored_bytes = 0;
  uint32_t file = 0;        // index into DcpMetadata::files
  uint32_t transforms = 0;  // index into DcpMetadata::transforms
};

inline constexpr uint32_t kNoItem = UINT32_MAX;

// The box [offsets, offsets + sizes) of a tensor.
struct DcpChunk {
  size_t offsets = 0;       // place in DcpMetadata::numbers; the sizes stand behind the offsets
  uint32_t item = kNoItem;  // index into DcpMetadata::items
};

struct DcpTensor {
  std::string key = {};
  std::vector<std::string> path = {};  // the key's parts; empty if the planner kept none
  std::string dtype = {};              // as torch names it: "float32"
  bool requires_grad = false;
  std::vector<uint64_t> shape = {};
  size_t chunks_begin = 0;  // in DcpMetadata::chunks
  size_t chunks_end = 0;
};

struct DcpObject {
  std::string key = {};
  std::vector<std::string> path = {};
  uint32_t item = kNoItem;
};

struct DcpMetadata {
  std::string version;  // "1.0.0"; empty before 2.9 or so
  std::string module;   // that of the class Metadata: says which generation of PyTorch wrote it
  std::vector<DcpTensor> tensors;  // both in the order of state_dict_metadata
  std::vector<DcpObject> objects;
  std::vector<DcpChunk> chunks;
  std::vector<uint64_t> numbers;
  std::vector<DcpItem> items;
  std::vector<std::string> files;                    // relative paths, as they stand there
  std::vector<std::vector<std::string>> transforms;  // of items; [0] is the empty list
  // Keys in the order of planner_data: the order of the state dictionary of one rank. Empty if the
  // planner kept none.
  std::vector<std::string> planner_order;

  std::span<const uint64_t> OffsetsOf(const DcpTensor& tensor, const DcpChunk& chunk) const {
    return std::span(numbers).subspan(chunk.offsets, tensor.shape.size());
  }
  std::span<const uint64_t> SizesOf(const DcpTensor& tensor, const DcpChunk& chunk) const {
    return std::span(numbers).subspan(chunk.offsets + tensor.shape.size(), tensor.shape.size());
  }
};

// Reads the pickle. `name` is the file's, for errors. Nothing is called: classes are compared by
// name with a list of those above (of every module they have lived in), and any other class where a
// value is needed is refused. What the pickle says of its parts is checked: every chunk has as many
// dimensions as its tensor and lies in it, every item belongs to a key.
//
// Errors: kInvalidArgument (no such pickle; what was expected, what was found), kPermissionDenied
// (a class that is not on the list, by name), kDataLoss (the parts contradict each other),
// kResourceExhausted (beyond a limit).
absl::StatusOr<DcpMetadata> ParseDcpMetadata(std::string bytes, std::string_view name);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_METADATA_H_
