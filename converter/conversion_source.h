// What a writer reads: the selected tensors of a checkpoint, whole, in the dtypes in which they are
// written.
#ifndef HOLDFAST_CONVERTER_CONVERSION_SOURCE_H_
#define HOLDFAST_CONVERTER_CONVERSION_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/extent_reader.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/selection.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::converter {

// Threads: one. Lifetime: the folder outlives it; it owns the index.
class ConversionSource {
 public:
  ConversionSource(const ForeignFolder& folder, Selection selection);
  // All of the index, as it is stored.
  ConversionSource(const ForeignFolder& folder, ForeignIndex index);
  ConversionSource(const ConversionSource&) = delete;
  ConversionSource& operator=(const ConversionSource&) = delete;

  // Its tensor states have the dtypes that are written.
  const ForeignIndex& index() const { return written_.has_value() ? *written_ : stored_; }

  using Sink = WholeTensorReader::Sink;
  // All bytes of a tensor state, in order, in blocks. Errors: WholeTensorReader's, the sink's.
  absl::Status Read(uint32_t tensor_state, const Sink& sink);
  // Elements [begin, end) of its row-major order, in this dtype (IsCastable, if it is another one
  // than the state's).
  absl::Status ReadElements(uint32_t tensor_state, uint64_t begin, uint64_t end, Dtype dtype,
                            const Sink& sink);
  // All bytes of ForeignIndex::blobs[blob].
  absl::Status ReadBlob(uint32_t blob, const Sink& sink);

  // Finite numbers that casts have made infinite so far, with the first tensor that had some.
  uint64_t became_infinite() const { return became_infinite_; }
  const std::string& first_infinite() const { return first_infinite_; }

  // Bytes of the buffers through which everything passes, each (there are at most four).
  void set_window_bytes(uint64_t bytes);

 private:
  void Cast(uint32_t tensor_state, Dtype from, Dtype to, std::span<const std::byte> in,
            std::vector<std::byte>& out);

  ForeignIndex stored_;
  std::optional<ForeignIndex> written_;  // if a dtype is another; without pieces
  WholeTensorReader tensors_;
  ExtentReader extents_;
  uint64_t window_bytes_ = WholeTensorReader::kWindowBytes;
  std::vector<std::byte> window_;
  std::vector<std::byte> cast_;
  std::vector<std::byte> cast_again_;
  uint64_t became_infinite_ = 0;
  std::string first_infinite_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_CONVERSION_SOURCE_H_
