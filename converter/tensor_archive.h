// A torch file of one contiguous tensor, as torch.save writes it: what stands before the tensor's
// bytes, and what stands behind them. DCP's .distcp files are such archives one behind the other.
#ifndef HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_
#define HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_

#include <cstdint>
#include <span>
#include <string>

#include "converter/torch_archive.h"
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
  uint64_t data_bytes_ = 0;
  TorchArchive archive_;  // up to the storage's bytes
  std::string head_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TENSOR_ARCHIVE_H_
