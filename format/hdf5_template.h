// Lays out an HDF5 file without its payload: libhdf5 builds it once in a scratch sparse file, and
// what comes out is the bytes of all metadata, which lie in one run at the front, and the offset of
// every dataset. The only code that calls libhdf5 (its header stays in the .cc file).
//
// It knows groups, contiguous datasets and attributes, and nothing of Holdfast: format/image.cc
// says what to put into them.
#ifndef HOLDFAST_FORMAT_HDF5_TEMPLATE_H_
#define HOLDFAST_FORMAT_HDF5_TEMPLATE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/dtype.h"

namespace holdfast {

// Text is a fixed-length UTF-8 string; numbers are unsigned 64-bit little-endian, a scalar or a
// vector. Names are constants of the caller's.
struct Hdf5Attribute {
  const char* name;
  std::variant<std::string_view, uint64_t, std::span<const uint64_t>> value;
};

struct Hdf5Group {
  std::string path;  // absolute; parents come first in the list; "/" is allowed for its attributes
  std::vector<Hdf5Attribute> attributes;
};

struct Hdf5Dataset {
  uint32_t group = 0;  // index into Hdf5Plan::groups
  std::string name;
  Dtype dtype = Dtype::kUint8;
  std::vector<uint64_t> shape;  // empty: a scalar
  std::vector<Hdf5Attribute> attributes;
};

struct Hdf5Plan {
  std::vector<Hdf5Group> groups;
  // Calls back for dataset i < dataset_count, in order, so that 100,000 of them need not exist at
  // once; what it returns is used before the next call. Must return the same at every call.
  size_t dataset_count = 0;
  virtual Hdf5Dataset Dataset(size_t index) const = 0;
  // The first dataset_with_contents_count datasets are part of the head, with these bytes.
  std::vector<std::string_view> contents;
  uint64_t alignment_bytes = 64;
  uint64_t head_bytes_max = 0;
  virtual ~Hdf5Plan() = default;
};

struct Hdf5Layout {
  std::vector<std::byte> head;            // metadata and the datasets with contents
  std::vector<uint64_t> dataset_offsets;  // UINT64_MAX: an empty dataset has no place
  uint64_t end_bytes = 0;                 // of the file as libhdf5 leaves it
};

// Errors: kInvalidArgument (names or sizes that HDF5 refuses), kResourceExhausted (head above
// head_bytes_max), kUnavailable (scratch file), kInternal (libhdf5, with its error text).
absl::StatusOr<Hdf5Layout> BuildHdf5Layout(const Hdf5Plan& plan,
                                           const std::string& scratch_directory);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_HDF5_TEMPLATE_H_
