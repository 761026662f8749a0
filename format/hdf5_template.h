// Lays out an HDF5 file without its payload: libhdf5 builds it once in a scratch sparse file, and
// what comes out is the bytes of all metadata, which lie in one run at the front, and the offset of
// every dataset. The only code that calls libhdf5 (its header stays in the .cc file).
//
// It knows groups, contiguous datasets and attributes, and nothing of checkpoints: format/image.cc
// says what to put into them.
#ifndef HOLDFAST_FORMAT_HDF5_TEMPLATE_H_
#define HOLDFAST_FORMAT_HDF5_TEMPLATE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "format/dtype.h"

namespace holdfast {

// Text is a fixed-length UTF-8 string, never empty; numbers are unsigned 64-bit little-endian, a
// scalar or a vector.
struct Hdf5Attribute {
  const char* name;
  std::variant<std::string_view, uint64_t, std::vector<uint64_t>> value;
};

struct Hdf5Group {
  std::string path;  // absolute, after that of its parent; the first must be "/", which exists
  std::vector<Hdf5Attribute> attributes;  // at most 8
  uint64_t names_bytes_hint = 0;          // of all links in it together
};

struct Hdf5Dataset {
  uint32_t group = 0;  // index into Hdf5Plan::groups
  std::string name;
  // Not empty: the dataset is a scalar string with this value and belongs to the head.
  std::string_view text;
  // Else: elements whose payload somebody else will write.
  Dtype dtype = Dtype::kUint8;
  std::vector<uint64_t> shape;            // empty: a scalar
  std::vector<Hdf5Attribute> attributes;  // at most 8
};

struct Hdf5Plan {
  std::vector<Hdf5Group> groups;
  size_t dataset_count = 0;
  // Dataset i < dataset_count; those with text come first. Called several times for each, so that
  // 100,000 need not exist at once; must give the same every time. What it views must outlive the
  // build.
  std::function<Hdf5Dataset(size_t)> dataset;
  uint64_t alignment_bytes = 64;
  uint64_t head_bytes_max = 0;
};

struct Hdf5Layout {
  std::vector<std::byte> head;            // all metadata and text datasets; nothing else in front
  std::vector<uint64_t> dataset_offsets;  // in order of the plan; head.size() for empty datasets
  uint64_t end_bytes = 0;                 // of the last dataset
};

// Payload lies behind the head in the order of the datasets, each at a multiple of alignment_bytes,
// with gaps smaller than that. The same plan gives the same bytes.
// Errors: kInvalidArgument (what HDF5 refuses), kResourceExhausted (head above head_bytes_max),
// kUnavailable (scratch file), kInternal (libhdf5, with its error text).
absl::StatusOr<Hdf5Layout> BuildHdf5Layout(const Hdf5Plan& plan,
                                           const std::string& scratch_directory);

// The release of libhdf5 in use, "1.10.8".
std::string Hdf5LibraryVersion();

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_HDF5_TEMPLATE_H_
