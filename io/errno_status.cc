#include "io/errno_status.h"

#include <string.h>

#include <cerrno>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {
namespace {

struct Meaning {
  absl::StatusCode code;
  const char* text;
};

Meaning MeaningOf(int error_number) {
  using enum absl::StatusCode;
  switch (error_number) {
    case ENOENT:
      return {kNotFound, "no such file or directory"};
    case ENOTDIR:
      return {kNotFound, "a component of the path is not a directory"};
    case EEXIST:
      return {kAlreadyExists, "the name exists already"};
    case ENOSPC:
      return {kResourceExhausted, "no space left on the device"};
    case EDQUOT:
      return {kResourceExhausted, "the disk quota is used up"};
    case EFBIG:
      return {kResourceExhausted, "the file would exceed the file size limit"};
    case EMFILE:
      return {kResourceExhausted, "this process has no descriptors left (RLIMIT_NOFILE)"};
    case ENFILE:
      return {kResourceExhausted, "the system has no descriptors left"};
    case ENOMEM:
      return {kResourceExhausted, "the kernel has no memory left for this"};
    case EMLINK:
      return {kResourceExhausted, "the file has as many links as the file system allows"};
    case EACCES:
    case EPERM:
      return {kPermissionDenied, "access is denied to this user"};
    case EROFS:
      return {kPermissionDenied, "the file system is mounted read-only"};
    case EIO:
      return {kDataLoss, "the device refused (input/output error)"};
    case EBADMSG:
    case EUCLEAN:
      return {kDataLoss, "the file system found its own structures damaged"};
    case EAGAIN:
    case EINTR:
    case EBUSY:
    case ETIMEDOUT:
    case ESTALE:
    case ENXIO:
    case ENODEV:
    case ENOTCONN:
    case EHOSTDOWN:
    case EHOSTUNREACH:
      return {kUnavailable, "the storage does not answer now"};
    case ELOOP:
      return {kInvalidArgument, "a symbolic link, which is never followed"};
    case EISDIR:
      return {kInvalidArgument, "a directory, not a file"};
    case ENAMETOOLONG:
      return {kInvalidArgument, "the name is too long"};
    case EXDEV:
      return {kInvalidArgument, "the two names are on different file systems"};
    case EINVAL:
      return {kInvalidArgument, "the file system refuses the arguments"};
    case EOPNOTSUPP:
    case ENOSYS:
      return {kUnimplemented, "the file system or the kernel does not offer this"};
    default:
      return {kInternal, "unexpected error"};
  }
}

}  // namespace

std::string ErrnoName(int error_number) {
  const char* name = strerrorname_np(error_number);
  return name != nullptr ? std::string(name) : absl::StrFormat("errno %d", error_number);
}

absl::Status ErrnoStatus(int error_number, std::string_view operation, std::string_view path) {
  CHECK(error_number > 0);
  const Meaning meaning = MeaningOf(error_number);
  return absl::Status(meaning.code, absl::StrFormat("%s %s: %s (%s)", operation, path, meaning.text,
                                                    ErrnoName(error_number)));
}

}  // namespace holdfast
