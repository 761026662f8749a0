// How a TorchFile is made: the container is taken apart (torch_file.cc), then every object of the
// pickle that is understood gets its meaning (torch_rebuild.cc). Internal to the torch reader.
#ifndef HOLDFAST_CONVERTER_TORCH_FILE_BUILDER_H_
#define HOLDFAST_CONVERTER_TORCH_FILE_BUILDER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/pickle_reader.h"
#include "converter/byte_source.h"
#include "converter/torch_file.h"
#include "converter/zip_reader.h"

namespace holdfast::converter {

// Threads: one.
class TorchFileBuilder {
 public:
  explicit TorchFileBuilder(std::string name);

  absl::Status ReadZip(const ByteSource& source);
  absl::Status ReadLegacy(const ByteSource& source);
  absl::Status ReadPickle(std::string bytes);
  // Gives the objects their meanings. After one of the above.
  absl::StatusOr<std::unique_ptr<TorchFile>> Build();

 private:
  using Meaning = TorchFile::Meaning;
  using Kind = TorchValue::Kind;
  using Type = PickleValue::Type;

  // Where the bytes of a storage are, by its key; and how many elements of its type its own head
  // says it has (legacy files only).
  struct Record {
    uint64_t offset = 0;
    uint64_t bytes = 0;
    uint32_t crc32 = 0;
    bool deflated = false;
  };
  // A persistent id ('storage', type, key, location, count).
  struct StorageId {
    std::string_view key;
    std::string_view location;
    std::optional<Dtype> dtype;  // none: untyped
    uint64_t element_bytes = 1;  // of the type
    uint64_t count = 0;          // in elements of the type
    uint64_t bytes = 0;
  };

  absl::Status Broken(std::string_view what) const;
  absl::Status WithName(const absl::Status& status, std::string_view where) const;

  // torch_file.cc
  absl::Status ReadZipRecords(const ByteSource& source, const ZipDirectory& zip,
                              const std::string& prefix, const ZipEntry& pickle);
  absl::StatusOr<std::unique_ptr<PickleDocument>> NextPickle(const ByteSource& source, uint64_t& at,
                                                             std::string_view what) const;
  absl::Status ReadLegacyStorages(const ByteSource& source, const PickleDocument& keys,
                                  uint64_t at);

  // torch_rebuild.cc
  absl::StatusOr<StorageId> ReadStorageId(PickleValue value) const;
  absl::StatusOr<uint32_t> StorageOf(const StorageId& id);
  absl::Status Interpret(PickleValue object);
  absl::Status InterpretTensor(PickleValue object, std::string_view function, PickleValue args,
                               Meaning& meaning, bool& understood);
  absl::Status DenseTensor(PickleValue args, bool has_dtype, TorchTensor& tensor);
  absl::Status CheckReach(const TorchTensor& tensor, uint64_t storage_bytes) const;
  absl::Status ReadFlags(PickleValue metadata, TorchTensor& tensor) const;
  absl::Status AddTensor(TorchTensor tensor, Meaning& meaning);
  bool InterpretContainer(PickleValue object, Meaning& meaning) const;
  bool InterpretScalar(PickleValue object, Meaning& meaning) const;
  void WarnOfBloat();

  std::unique_ptr<TorchFile> file_;
  std::map<std::string, Record, std::less<>> records_;  // by storage key
  std::map<std::string, uint32_t, std::less<>> storage_by_key_;
  bool unwritten_ = false;  // the records of all storages have CRC32 0, and others have not
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_FILE_BUILDER_H_
