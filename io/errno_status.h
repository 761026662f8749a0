// The one place where an errno becomes an absl::Status, for the real file system, both rings and
// the simulated disk, so that the same trouble has the same code and words everywhere.
#ifndef HOLDFAST_IO_ERRNO_STATUS_H_
#define HOLDFAST_IO_ERRNO_STATUS_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace holdfast {

// "<operation> <path>: <what the number means> (ENOSPC)". `error_number` is a positive errno, not
// 0. Codes as listed in io/file_system.h; a number that nobody expects here is kInternal.
absl::Status ErrnoStatus(int error_number, std::string_view operation, std::string_view path);

// "ENOSPC", or "errno 999" for a number without a name.
std::string ErrnoName(int error_number);

}  // namespace holdfast

#endif  // HOLDFAST_IO_ERRNO_STATUS_H_
