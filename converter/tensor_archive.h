// A torch file of one contiguous tensor, as torch.save writes it: what stands before the tensor's
// bytes, and what stands behind them. DCP's .distcp files are such archives one behind the other.
//
// A zip of stored entries: archive/data.pkl, byteorder, data/0 (its bytes at a multiple of 64, its
// CRC32 and sizes in a descriptor behind it, because they are known only then) and version. ZIP64
// where a size needs it. Source: torch/serialization.py, caffe2/serialize/inline_container.cc,
// PKWARE APPNOTE 6.3.10.
#ifndef HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_
#define HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "format/dtype.h"

namespace holdfast::converter {

// Equal arguments give equal bytes.
//
// Threads: any, once made. Lifetime: owns everything.
class TensorArchive {
 public:
  // CHECKs that the tensor has at most kTensorBytesMax bytes.
  TensorArchive(Dtype dtype, std::span<const uint64_t> shape);

  // The archive is head(), data_bytes() of the tensor, and Tail(their CRC32).
  const std::string& head() const { return head_; }
  uint64_t data_bytes() const { return data_bytes_; }
  // Of any CRC it has the same length.
  std::string Tail(uint32_t data_crc32) const;
  uint64_t bytes() const { return head_.size() + data_bytes_ + Tail(0).size(); }

 private:
  struct Entry {
    std::string name;
    uint64_t bytes = 0;
    uint32_t crc32 = 0;
    uint64_t offset = 0;  // of the local header
    bool has_descriptor = false;
  };

  void AddSmall(std::string_view name, std::string_view content, std::string& out,
                std::vector<Entry>& entries, uint64_t begin) const;
  void BeginData();
  static std::string Directory(const std::vector<Entry>& entries, uint64_t begin);

  uint64_t data_bytes_ = 0;
  std::string head_;
  std::vector<Entry> entries_;  // of the head; the last one is the data's
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_
