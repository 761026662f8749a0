// The view of a foreign checkpoint: an HDF5 file in which every tensor is whole, while its bytes
// stay where the framework has written them: in the records of torch's zip files, in `.distcp`
// items, in safetensors files. For readers that know HDF5 and no framework. Names and attributes
// are those of a view of ours (format/tensor_view.h); what differs is in docs/FORMAT.md.
//
// How a tensor is shown:
//   - pieces that are ranges of it, one behind the other: one dataset whose external storage is
//     those ranges of bytes (ZeRO's flat partitions, shards of dimension 0, whole tensors);
//   - boxes, strides, pieces of both byte orders: a Virtual Dataset over parts, each of which is a
//     range of bytes. Of strides, the dimensions that a grid in the file can have in the order of
//     the tensor are one part; over the others it loops, a part for each combination;
//   - numbers that a format writes as text (an optimizer's step): the only bytes that are copied.
// What no HDF5 type or place can say is left out, by name and with the reason, in the view too.
#ifndef HOLDFAST_CONVERTER_FOREIGN_VIEW_H_
#define HOLDFAST_CONVERTER_FOREIGN_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "format/tensor_view.h"

namespace holdfast::converter {

// Parts that one piece may need. The matrix of this height that is stored transposed is shown.
inline constexpr uint64_t kViewPartsOfPieceMax = 4096;

struct ForeignViewOptions {
  std::string source;  // noted in the view: an absolute path
  std::string
      prefix;  // of the files' names, as open(2) and HDF5_EXTFILE_PREFIX take it; ends in "/"
  uint64_t bytes_max = kViewBytesMax;
};

struct ForeignView {
  std::vector<std::byte> bytes;
  uint64_t tensor_count = 0;  // shown
  uint64_t in_parts_count = 0;
  uint64_t copied_bytes = 0;  // of numbers that the format writes as text
  struct LeftOut {
    std::string tensor;
    std::string state;   // empty: the reader already could make no tensor of it
    std::string reason;  // "is stored compressed (zstd)"
  };
  std::vector<LeftOut> left_out;
};

// `index` has passed Finish. Errors: kDataLoss (elements that are missing, or in two pieces that
// are not equal: named), kFailedPrecondition (there are tensors, and not one can be shown: the
// first is named), kResourceExhausted (above bytes_max; CheckCover's), kInternal (libhdf5).
absl::StatusOr<ForeignView> BuildForeignView(const ForeignIndex& index,
                                             const ForeignViewOptions& options);

// Elements at strides, as datasets over the file that HDF5 can have: inside of foreign_view.cc, and
// for its test.
struct StridedPart {
  uint64_t offset_elements = 0;  // of the part's first element, from the box's corner
  std::vector<uint64_t> shape;   // of the part: all elements that its grid passes over
  std::vector<uint64_t> take;    // of each dimension of the part, so many from the first on
  Hdf5Box box;                   // where they go, in order
};
// `size` and `strides` (elements) of a box at `lo`, no size 0. Nothing if it takes more than
// kViewPartsOfPieceMax parts. Parts cover the box exactly once.
std::optional<std::vector<StridedPart>> CutStrides(std::span<const uint64_t> lo,
                                                   std::span<const uint64_t> size,
                                                   std::span<const uint64_t> strides);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FOREIGN_VIEW_H_
