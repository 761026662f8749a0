// The files of one foreign checkpoint, as an untrusted folder: a list made once, and reads by the
// number of a file. Nothing here leaves the folder: not by `..`, not by an absolute name, not by a
// symbolic link. What the bytes mean is converter/format_reader.h's.
#ifndef HOLDFAST_CONVERTER_FOREIGN_FOLDER_H_
#define HOLDFAST_CONVERTER_FOREIGN_FOLDER_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "io/file_system.h"

namespace holdfast::converter {

inline constexpr size_t kFolderFilesMax = size_t{1} << 18;
inline constexpr size_t kFolderDepthMax = 8;  // of directories in directories
inline constexpr size_t kPathBytesMax = 4096;

struct FolderFile {
  std::string path;  // relative to the folder, components joined by '/'
  uint64_t bytes = 0;
};

// Threads: any. Lifetime: the FileSystem outlives it. Keeps at most 64 files open.
class ForeignFolder {
 public:
  // `path`: a directory, or a file, which is then the only one. Symbolic links in `path` itself are
  // followed: they are the user's words. Those inside are followed if they lead to a file inside;
  // any other is left out of files() and named in refused().
  // Errors: kNotFound; kResourceExhausted (more files or levels than the limits); kInvalidArgument
  // (neither file nor directory); those of the FileSystem.
  static absl::StatusOr<std::unique_ptr<ForeignFolder>> Open(FileSystem& file_system,
                                                             const std::string& path);
  ~ForeignFolder();

  // Absolute, without symbolic links; of a single file: the directory that holds it.
  const std::string& root() const { return root_; }
  bool single_file() const { return single_file_; }

  // Sorted by path.
  std::span<const FolderFile> files() const { return files_; }
  // Of all directories inside, relative, sorted; not the folder itself.
  std::span<const std::string> directories() const { return directories_; }
  // `name: why` of each entry that is there and not in files().
  std::span<const std::string> refused() const { return refused_; }

  // The number of the file with this relative path, if it is there.
  std::optional<uint32_t> Find(std::string_view path) const;
  // The same for a name that stands in a file of the checkpoint, relative to `directory` ("" for
  // the folder). Errors: kPermissionDenied if the name is absolute or leads outside, kNotFound if
  // there is no such file; both name it, and `where` (the file in which it stands).
  absl::StatusOr<uint32_t> Resolve(std::string_view directory, std::string_view name,
                                   std::string_view where) const;
  // Numbers of the files directly in `directory` ("" for the folder itself), by name.
  std::vector<uint32_t> FilesIn(std::string_view directory) const;

  // Fills `out` from offset_bytes. Errors: kDataLoss (past the end: expected and found, named),
  // kFailedPrecondition (the user may not read it), kPermissionDenied (it leads outside now),
  // others of the FileSystem.
  absl::Status ReadAt(uint32_t file, uint64_t offset_bytes, std::span<std::byte> out) const;
  // All of a file of at most bytes_max, else kResourceExhausted with both numbers.
  absl::StatusOr<std::string> ReadAll(uint32_t file, uint64_t bytes_max) const;
  // The first bytes of a file, at most `bytes_max`; fewer if it is shorter.
  absl::StatusOr<std::string> ReadHead(uint32_t file, uint64_t bytes_max) const;

 private:
  ForeignFolder(FileSystem& file_system, std::string root)
      : file_system_(file_system), root_(std::move(root)) {}

  absl::Status AddDirectory(const std::string& relative, size_t depth);
  void AddLink(const std::string& relative);
  absl::StatusOr<std::shared_ptr<IoFile>> Handle(uint32_t file) const;

  FileSystem& file_system_;
  const std::string root_;
  bool single_file_ = false;
  std::vector<FolderFile> files_;
  std::vector<std::string> directories_;
  std::vector<std::string> refused_;

  mutable Mutex mutex_;
  mutable std::list<uint32_t> recent_ ABSL_GUARDED_BY(mutex_);  // the last used one first
  struct OpenFile {
    std::shared_ptr<IoFile> file;
    std::list<uint32_t>::iterator place;
  };
  mutable std::unordered_map<uint32_t, OpenFile> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FOREIGN_FOLDER_H_
