// The bytes of extents as a stream of random reads: raw ones straight from their file, compressed
// ones through a decoder that goes on where it was.
#ifndef HOLDFAST_CONVERTER_EXTENT_READER_H_
#define HOLDFAST_CONVERTER_EXTENT_READER_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {

// Threads: one. Lifetime: folder and index outlive it. Memory: at most 8 decoders of 8 MiB.
class ExtentReader {
 public:
  ExtentReader(const ForeignFolder& folder, const ForeignIndex& index);
  ~ExtentReader();

  // Fills `out` with decoded bytes from offset_bytes on. Of a compressed extent a read that goes
  // back begins anew; reads in order cost one decoding in all. Errors: kDataLoss (truncated,
  // damaged, or of another decoded length than the index says), kResourceExhausted (a compressed
  // extent that is read in such disorder that it would be decoded more than kDecodingsMax times).
  absl::Status Read(uint32_t extent, uint64_t offset_bytes, std::span<std::byte> out);

  static constexpr uint64_t kDecodingsMax = 64;

 private:
  class Decoder;

  absl::Status ReadDecoded(uint32_t extent, uint64_t offset_bytes, std::span<std::byte> out);

  const ForeignFolder& folder_;
  const ForeignIndex& index_;
  std::list<std::unique_ptr<Decoder>> decoders_;  // the last used one first
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_EXTENT_READER_H_
