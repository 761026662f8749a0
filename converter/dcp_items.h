// Opens the items of DCP's .distcp files: where they lie, whether as they are or compressed.
#ifndef HOLDFAST_CONVERTER_DCP_ITEMS_H_
#define HOLDFAST_CONVERTER_DCP_ITEMS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/dcp_metadata.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/shard_pieces.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

struct OpenedItem {
  std::unique_ptr<TorchFile> torch;
  TorchPlace place;
  uint32_t extent = 0;  // of the item as a whole: its bytes as torch.save wrote them
};

// Threads: one. Lifetime: the folder, the metadata and the index outlive it.
class DcpItems {
 public:
  // `directory`: that of the metadata file, `name` its path, both relative to the folder.
  DcpItems(const ForeignFolder& folder, const DcpMetadata& metadata, std::string directory,
           std::string name, ForeignIndex& index);

  // The file of the item; none if it is missing, which is noted once per file. Errors:
  // kPermissionDenied (it leads out of the folder).
  absl::StatusOr<std::optional<uint32_t>> FileOf(const DcpItem& item);

  // Opens the torch file that the item is. `file`: what FileOf said. Errors: kDataLoss (not within
  // the file; a compressed stream that is damaged; no torch file), kUnimplemented (a transform
  // that is not zstd, by name), kResourceExhausted (it decodes to more than decoded_bytes_max);
  // those of TorchFile::Open.
  absl::StatusOr<OpenedItem> Open(const DcpItem& item, uint32_t file, uint64_t decoded_bytes_max);

 private:
  enum class Lookup : uint8_t { kNotYet, kFound, kMissing };
  struct File {
    Lookup lookup = Lookup::kNotYet;
    uint32_t number = 0;
  };

  const ForeignFolder& folder_;
  const DcpMetadata& metadata_;
  const std::string directory_;
  const std::string name_;
  ForeignIndex& index_;
  std::vector<File> files_;
};

// Of an object that cannot be read, because nothing says where it is or its file is missing: a
// sentence for ForeignIndex::losses. `name`: that of the metadata file.
std::string LostObject(const DcpMetadata& metadata, std::string_view name, const DcpObject& object);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_ITEMS_H_
