// The operating system's file system.
#ifndef HOLDFAST_IO_POSIX_FILE_SYSTEM_H_
#define HOLDFAST_IO_POSIX_FILE_SYSTEM_H_

#include <memory>

#include "io/file_system.h"

namespace holdfast {

// Holds no state: any number of them may exist. Files are created 0600 and directories 0700, less
// the umask. Descriptors are close-on-exec. Directories given to List and SyncDirectory may be
// reached through symbolic links (a user's root often is one); files never are.
std::unique_ptr<FileSystem> NewPosixFileSystem();

}  // namespace holdfast

#endif  // HOLDFAST_IO_POSIX_FILE_SYSTEM_H_
