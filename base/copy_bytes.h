// memcpy for sizes that may be zero: std::memcpy(nullptr, nullptr, 0) is undefined, and an empty
// vector's data() is often null.
#ifndef HOLDFAST_BASE_COPY_BYTES_H_
#define HOLDFAST_BASE_COPY_BYTES_H_

#include <cstddef>
#include <cstring>

namespace holdfast {

inline void CopyBytes(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

}  // namespace holdfast

#endif  // HOLDFAST_BASE_COPY_BYTES_H_
