// The view of a checkpoint: one HDF5 file in which every tensor state is a whole dataset, while the
// bytes stay in the images. For readers that know HDF5 and nothing of Holdfast; never part of a
// commit. Names, attributes, and what a reader must know: docs/FORMAT.md.
//
// Made from INDEX alone: no image is opened (format/hdf5_template.h says why).
#ifndef HOLDFAST_FORMAT_TENSOR_VIEW_H_
#define HOLDFAST_FORMAT_TENSOR_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "format/hdf5_view.h"
#include "format/index.h"

namespace holdfast {

inline constexpr uint64_t kViewBytesMax = uint64_t{1} << 30;
// A tensor state that lies in more images than this is put together from parts
// (format/hdf5_view.h): a reader may usually open 1,024 files, and have a few datasets open.
inline constexpr size_t kViewFilesMax = 256;
// Directories between the root and a view with absolute paths: these go up so many times.
inline constexpr size_t kViewDepthMax = 64;

// How the view names what it reads from. Both end in "/"; the name of an image follows.
struct ViewPaths {
  std::string datasets;  // for HDF5's search for source files
  std::string parts;     // for open(2)
};

// The view may be moved (to where it is not deeper than kViewDepthMax), the checkpoint may not.
// `checkpoint` is an absolute path without links.
ViewPaths AbsoluteViewPaths(const std::string& checkpoint);
// They may be moved together. Both are absolute paths without links.
ViewPaths RelativeViewPaths(const std::string& checkpoint, const std::string& view_directory);

// The groups that every view has, in this order, and behind them one for each state: room for names
// that HDF5 can have.
//
// Lifetime: refers to what it is made of.
class ViewGroups {
 public:
  static constexpr uint32_t kHoldfast = 2;  // /holdfast
  static constexpr uint32_t kParts = 3;     // /holdfast/parts

  // All tensor states, before any other call.
  void Add(const TensorState& tensor_state);
  // Their groups, with these attributes of `/`.
  std::vector<Hdf5Group> Make(std::vector<Hdf5Attribute> root);
  // Of a tensor state that was added, after Make.
  uint32_t Of(const TensorState& tensor_state) const;

 private:
  struct State {
    uint32_t group = 0;
    uint64_t names_bytes = 0;
  };
  std::map<std::string_view, State> states_;
};

// Where the elements of a piece go, in their order. Not of an empty one.
std::vector<Hdf5Box> ViewBoxesOf(const Piece& piece, const TensorState& tensor_state,
                                 const BoxTable& boxes);

struct TensorView {
  std::vector<std::byte> bytes;
  uint64_t tensor_count = 0;
  // Tensor states in parts: in more than kViewFilesMax images, or with empty pieces among others,
  // so that it is not known which dataset of its image a piece is. And the most images that one
  // lies in.
  uint64_t in_parts_count = 0;
  uint64_t files_of_one_max = 0;
};

// The pieces of `index` cover every tensor exactly once, equal ones aside (CheckCover).
// `checkpoint` is noted in the view. Errors: kResourceExhausted (above bytes_max), kInternal
// (libhdf5).
absl::StatusOr<TensorView> BuildTensorView(const Index& index, const std::string& checkpoint,
                                           const ViewPaths& paths,
                                           uint64_t bytes_max = kViewBytesMax);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_TENSOR_VIEW_H_
