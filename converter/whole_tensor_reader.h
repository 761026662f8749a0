// Any tensor state of a foreign checkpoint as its whole, contiguous, row-major, little-endian
// bytes, however it is cut, strided, byte-swapped, conjugated or compressed; in bounded memory.
// Everything that looks at values goes through here: sha256, fingerprints, verify, the writers.
#ifndef HOLDFAST_CONVERTER_WHOLE_TENSOR_READER_H_
#define HOLDFAST_CONVERTER_WHOLE_TENSOR_READER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "converter/extent_reader.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "format/planner.h"
#include "format/planner_source.h"

namespace holdfast::converter {

// Threads: one. Lifetime: folder and index (which passed Finish) outlive it.
class WholeTensorReader {
 public:
  WholeTensorReader(const ForeignFolder& folder, const ForeignIndex& index);
  ~WholeTensorReader();

  // Gets the tensor's bytes in order, at most kWindowBytes at a time; its error ends the read.
  using Sink = std::function<absl::Status(std::span<const std::byte> bytes)>;
  static constexpr uint64_t kWindowBytes = uint64_t{8} << 20;

  // All bytes of a tensor state. Errors: kDataLoss (an element is missing, pieces overlap without
  // being equal, a file is truncated or damaged), kResourceExhausted (StateSource's and
  // ExtentReader's), those of reading, and the sink's. Of replicas the first one is read.
  absl::Status Read(uint32_t tensor_state, const Sink& sink);

  // Elements [begin, end) of its row-major order; `out` has their bytes.
  absl::Status ReadRange(uint32_t tensor_state, uint64_t begin, uint64_t end,
                         std::span<std::byte> out);

  // Elements [begin, end) of one piece, counted from its first one in the order of its box: for
  // comparing replicas.
  absl::Status ReadPiece(const ForeignPiece& piece, uint64_t begin, uint64_t end,
                         std::span<std::byte> out);

 private:
  struct Prepared;

  absl::Status Prepare(uint32_t tensor_state);
  absl::Status ReadRounded(const ForeignPiece& piece, uint64_t begin, uint64_t end,
                           std::span<std::byte> out);
  absl::Status CopyBox(const ForeignPiece& piece, const ElementBox& box, const Affine& target,
                       std::span<std::byte> out);
  absl::Status CopySpan(const ForeignPiece& piece, std::span<const size_t> order,
                        const ElementBox& box, const Affine& source, const Affine& target,
                        std::span<std::byte> out);

  const ForeignIndex& index_;
  ExtentReader extents_;
  std::unique_ptr<Prepared> prepared_;  // of the state that was asked for last
  std::vector<std::byte> window_;
  std::vector<std::byte> span_;
  std::vector<std::byte> rounded_;
};

// Makes stored elements what they are on a little-endian machine with nothing left to conjugate or
// negate. `bytes`: whole elements.
void Normalize(Dtype dtype, const ForeignPiece& piece, std::span<std::byte> bytes);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_WHOLE_TENSOR_READER_H_
