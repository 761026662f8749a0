// What every caller of libhdf5 needs: identifiers that close themselves, errors as statuses, the
// types of tensors, attributes and groups. Inside of format/hdf5_*: this header includes libhdf5's.
//
// Threads: libhdf5 has one global lock, and an error stack per thread.
#ifndef HOLDFAST_FORMAT_HDF5_OBJECT_H_
#define HOLDFAST_FORMAT_HDF5_OBJECT_H_

#include <hdf5.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/dtype.h"
#include "format/hdf5_view.h"

namespace holdfast::hdf5 {

// Before any other call of libhdf5 in a function that uses it.
void Prepare();

// Closes an HDF5 identifier. Negative: none.
class Handle {
 public:
  Handle() = default;
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() { Close(); }
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      Close();
      id_ = std::exchange(other.id_, -1);
      close_ = other.close_;
    }
    return *this;
  }

  bool ok() const { return id_ >= 0; }
  hid_t get() const { return id_; }
  // False if libhdf5 reported an error, e.g. of a write that it had put off.
  bool Close() {
    const hid_t id = std::exchange(id_, -1);
    return id < 0 || close_(id) >= 0;
  }

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

// kInternal "HDF5: cannot `what`: ..." with the calling thread's error stack, which it empties.
absl::Status Error(const std::string& what);

// Types and spaces: none (not ok()) if libhdf5 refuses. A type that HDF5 has as opaque bytes has no
// byte order (HasHdf5Order): with kBig it is none.
Handle MakeType(Dtype dtype, Hdf5Order order);
Handle MakeTextType(size_t bytes);                    // fixed length, UTF-8
Handle MakeSpace(std::span<const uint64_t> extents);  // empty: a scalar

absl::Status WriteAttribute(hid_t object, const Hdf5Attribute& attribute);

// All groups of a plan, in its order, with their attributes; no times are tracked.
absl::StatusOr<std::vector<Handle>> CreateGroups(hid_t file, const std::vector<Hdf5Group>& groups);

}  // namespace holdfast::hdf5

#endif  // HOLDFAST_FORMAT_HDF5_OBJECT_H_
