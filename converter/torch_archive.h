// The container of a torch file, as torch.save writes it: what stands before, between and behind
// the bytes of its storages.
//
// A zip of stored entries: <name>/data.pkl, byteorder, data/0, data/1, ... (each at a multiple of
// 64, its CRC32 and sizes in a descriptor behind it, because they are known only then) and version.
// ZIP64 where a size or an offset needs it. Source: torch/serialization.py,
// caffe2/serialize/inline_container.cc, PKWARE APPNOTE 6.3.10.
#ifndef HOLDFAST_CONVERTER_TORCH_ARCHIVE_H_
#define HOLDFAST_CONVERTER_TORCH_ARCHIVE_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast::converter {

// One archive, from front to back: what each call returns is to be written where the one before and
// the storage's bytes end. Equal arguments give equal bytes.
//
// Threads: one. Lifetime: owns everything.
class TorchArchive {
 public:
  // `pickle`: the contents of data.pkl, in which the storages are called "0", "1", ... CHECKs that
  // it has less than 4 GiB.
  explicit TorchArchive(std::string_view pickle);

  // Before the bytes of the next storage, and behind them.
  std::string BeginStorage(uint64_t bytes);
  std::string EndStorage(uint32_t crc32);
  // Behind the last storage.
  std::string Finish();

  // The size of the archive of these.
  static uint64_t Bytes(std::string_view pickle, std::span<const uint64_t> storage_bytes);

 private:
  struct Entry {
    std::string name;
    uint64_t bytes = 0;
    uint32_t crc32 = 0;
    uint64_t offset = 0;  // of the local header
    bool has_descriptor = false;
  };

  void AddSmall(std::string_view name, std::string_view content);
  std::string Directory() const;
  std::string Take();  // what was made since the last call

  std::string made_;
  uint64_t position_ = 0;  // in the archive, of the end of made_
  uint64_t storages_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_ARCHIVE_H_
