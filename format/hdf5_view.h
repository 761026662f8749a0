// An HDF5 file whose datasets are whole to a reader, while their elements lie in other files: in
// datasets of theirs (Virtual Datasets), or as ranges of their bytes (external storage), whatever
// files those are. Made in memory; who asked for it writes the bytes. No other file is opened.
//
// Like format/hdf5_template.h it knows nothing of checkpoints: format/tensor_view.cc and
// converter/foreign_view.cc say what to put in. What libhdf5 (1.10.8) does with such a file, and
// what follows from it:
// - All source files that a read touches stay open until the virtual dataset is closed. Where one
//   cannot be opened, for lack of descriptors too, elements silently have the fill value. Views of
//   views do not help: the inner ones keep their sources open as long. So a dataset may have
//   *parts* instead: hidden contiguous datasets of the same file, whose storage is a range of bytes
//   of the source file (external storage). Those are opened one at a time, whatever their number,
//   and a file that is not there is an error. (One that is too short reads as zeros.)
// - A source file that is not found under an absolute name is looked for under its last component,
//   beside the view and in the working directory. All checkpoints name their images alike: another
//   checkpoint would be read in the place of one that is gone. A name that begins with ".." is
//   looked for as it is. Makers of a view mind that; here names are taken as they are.
#ifndef HOLDFAST_FORMAT_HDF5_VIEW_H_
#define HOLDFAST_FORMAT_HDF5_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "format/dtype.h"
#include "format/hdf5_template.h"

namespace holdfast {

// Of stored numbers.
enum class Hdf5Order : uint8_t { kLittle, kBig };

// Whether HDF5 knows the numbers of this dtype, so that they can be stored in either order. All
// others are opaque bytes to it.
bool HasHdf5Order(Dtype dtype);

// A box of a virtual dataset, of as many dimensions; of a scalar none.
struct Hdf5Box {
  std::vector<uint64_t> lo;
  std::vector<uint64_t> size;
};

// Where elements of a dataset lie.
struct Hdf5ViewSource {
  std::string file;
  std::string dataset;                   // kDatasets: absolute path in the file
  std::vector<uint64_t> shape;           // of that dataset, or of the part
  uint64_t offset_bytes = 0;             // kParts, kRanges: in the file
  uint64_t bytes = 0;                    // kRanges
  Hdf5Order order = Hdf5Order::kLittle;  // kParts: of the part
  // kDatasets, kParts: where the elements go. None is empty.
  std::vector<Hdf5Box> boxes;
  // Which elements of the source: of the one box. Empty: the boxes take all elements of the source,
  // one behind the other.
  std::vector<Hdf5Box> from;
};

enum class Hdf5Storage : uint8_t {
  kDatasets,  // virtual: in datasets of other files
  kParts,     // virtual: in parts
  kRanges,  // external: the sources are ranges of bytes that hold its elements one behind the other
  kInside,  // the bytes are in the view itself
};

struct Hdf5ViewDataset {
  uint32_t group = 0;  // index into Hdf5ViewPlan::groups
  std::string name;
  // Not empty: the dataset is a scalar string with this value, and has nothing that follows.
  std::string_view text;
  Dtype dtype = Dtype::kUint8;
  std::vector<uint64_t> shape;
  std::vector<Hdf5Attribute> attributes;  // at most 8
  Hdf5Storage storage = Hdf5Storage::kDatasets;
  std::vector<Hdf5ViewSource> sources;  // disjoint; none: a dataset without elements
  std::span<const std::byte> bytes;     // kInside: all elements
  // kRanges, kInside: of the elements. kBig only where HasHdf5Order.
  Hdf5Order order = Hdf5Order::kLittle;
};

// A dataset of kRanges has at most so many sources: their table must fit into 64 KiB.
inline constexpr size_t kHdf5RangesMax = 1024;

struct Hdf5ViewPlan {
  std::vector<Hdf5Group> groups;  // as in Hdf5Plan
  uint32_t parts_group = 0;       // where the parts go, with numbers as names
  size_t dataset_count = 0;
  // Called once for each, in order. What it views must live until the next call.
  std::function<Hdf5ViewDataset(size_t)> dataset;
  uint64_t bytes_max = 0;
};

// What a reader finds where a source is missing: NaN in all floating-point types (0x7f in
// float8_e4m3fn, 0x80 in the fnuz types, 0xff in all that HDF5 has as opaque besides), the least
// value of signed integers, the greatest of unsigned ones, TRUE. The same plan gives the same
// bytes. Errors: kResourceExhausted (more than bytes_max), kInternal (libhdf5, with its error
// text).
absl::StatusOr<std::vector<std::byte>> BuildHdf5View(const Hdf5ViewPlan& plan);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_HDF5_VIEW_H_
