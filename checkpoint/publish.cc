#include "checkpoint/publish.h"

#include <algorithm>
#include <memory>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

// In a directory of a root: more than any that Holdfast fills.
constexpr size_t kNamesMax = 4'000'000;
// How often other writers of the same name may be in the way.
constexpr int kRoomTries = 16;
// Between the name and the writer, of a marker.
constexpr char kMarkerPart[] = ".exclusive.";

// Creates, fills and syncs.
absl::Status WriteNew(FileSystem& file_system, const std::string& path, std::string_view bytes,
                      const std::function<void()>& on_visible) {
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, file_system.CreateNew(path));
  RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(bytes))));
  if (on_visible) on_visible();
  return file->Sync();
}

void RemovePartial(FileSystem& file_system, const std::string& path) {
  // Dropped on purpose: what stays behind is named after this writer and in nobody's way.
  file_system.Unlink(path).IgnoreError();
}

absl::StatusOr<std::vector<std::string>> MarkersOf(FileSystem& file_system,
                                                   const std::string& directory,
                                                   std::string_view name) {
  ASSIGN_OR_RETURN(std::vector<std::string> names, file_system.List(directory, kNamesMax));
  const std::string prefix = absl::StrCat(std::string(name), kMarkerPart);
  std::erase_if(names, [&](const std::string& other) {
    return other.compare(0, prefix.size(), prefix) != 0;
  });
  return names;
}

// A publication without links, which owns its marker.
class ExclusivePublication {
 public:
  ExclusivePublication(FileSystem& file_system, const std::string& directory,
                       const std::string& name, const PublishOptions& options)
      : file_system_(file_system),
        directory_(directory),
        name_(name),
        options_(options),
        path_(absl::StrCat(directory, "/", name)),
        marker_(absl::StrCat(name, kMarkerPart, options.writer)) {}

  absl::Status Run(std::string_view bytes) {
    RETURN_IF_ERROR(MakeMarker(bytes));
    for (int tries_left = kRoomTries; tries_left > 0; --tries_left) {
      const absl::Status written = WriteNew(file_system_, path_, bytes, nullptr);
      if (written.ok()) return Finish();
      // Torn, perhaps: the marker stays and says so, and the next try makes room.
      if (written.code() != absl::StatusCode::kAlreadyExists) return written;
      const absl::Status room = MakeRoom();
      if (room.code() == absl::StatusCode::kAlreadyExists) RemovePartial(file_system_, Marker());
      RETURN_IF_ERROR(room);
    }
    return absl::UnavailableError(
        absl::StrFormat("%s: other writers were faster %d times", path_, kRoomTries));
  }

 private:
  std::string Marker() const { return absl::StrCat(directory_, "/", marker_); }

  absl::Status MakeMarker(std::string_view bytes) {
    // Filled, so that a full disk shows here, where nothing is torn by it.
    const absl::Status made = WriteNew(file_system_, Marker(), bytes, nullptr);
    // An earlier try of this very writer failed: what is torn, it has torn.
    may_be_torn_ = made.code() == absl::StatusCode::kAlreadyExists;
    if (!made.ok() && !may_be_torn_) {
      RemovePartial(file_system_, Marker());
      return made;
    }
    // Its name must be durable before the final name can be.
    const absl::Status synced = file_system_.SyncDirectory(directory_);
    if (!synced.ok() && !may_be_torn_) RemovePartial(file_system_, Marker());
    return synced;
  }

  absl::Status Taken() const {
    return absl::AlreadyExistsError(absl::StrFormat("%s: exists", path_));
  }

  // Who wrote it may have died before he synced it. Who takes it for his own relies on that.
  absl::Status WholeTaken(bool owner_may_be_dead) const {
    if (owner_may_be_dead || may_be_torn_) {
      RETURN_IF_ERROR(file_system_.SyncFile(path_));
      RETURN_IF_ERROR(file_system_.SyncDirectory(directory_));
    }
    return Taken();
  }

  // Whether nothing, or nothing whole, has the name.
  absl::StatusOr<bool> IsFreeOrBroken() const {
    const absl::StatusOr<std::string> found = file_system_.ReadSmallFile(path_, options_.bytes_max);
    if (found.status().code() == absl::StatusCode::kNotFound) return true;
    // Larger than any file of this name can be.
    if (found.status().code() == absl::StatusCode::kResourceExhausted) return true;
    RETURN_IF_ERROR(found.status());
    return !options_.is_whole(*found);
  }

  // The name was taken. OK: it may be free now.
  absl::Status MakeRoom() {
    if (options_.is_whole == nullptr) return Taken();
    ASSIGN_OR_RETURN(const bool is_broken, IsFreeOrBroken());
    ASSIGN_OR_RETURN(const std::vector<std::string> markers,
                     MarkersOf(file_system_, directory_, name_));
    if (!is_broken) return WholeTaken(markers.size() > 1);
    for (const std::string& marker : markers) {
      if (marker == marker_) continue;
      const absl::Status removed = file_system_.Unlink(absl::StrCat(directory_, "/", marker));
      if (removed.code() == absl::StatusCode::kNotFound) return absl::OkStatus();
      RETURN_IF_ERROR(removed);
      may_be_torn_ = true;
    }
    if (!may_be_torn_) return Taken();  // damaged
    ASSIGN_OR_RETURN(const bool is_still_broken, IsFreeOrBroken());
    if (!is_still_broken) return WholeTaken(/*owner_may_be_dead=*/true);
    const absl::Status removed = file_system_.Unlink(path_);
    if (!removed.ok() && removed.code() != absl::StatusCode::kNotFound) return removed;
    return file_system_.SyncDirectory(directory_);
  }

  absl::Status Finish() {
    RETURN_IF_ERROR(file_system_.SyncDirectory(directory_));
    const absl::Status removed = file_system_.Unlink(Marker());
    if (removed.code() == absl::StatusCode::kNotFound) {
      return absl::UnavailableError(
          absl::StrFormat("%s: another writer took it for torn while it was published", path_));
    }
    RETURN_IF_ERROR(removed);
    return file_system_.SyncDirectory(directory_);
  }

  FileSystem& file_system_;
  const std::string& directory_;
  const std::string& name_;
  const PublishOptions& options_;
  const std::string path_;
  const std::string marker_;  // its name
  // A broken file under the name is one that a publication has torn.
  bool may_be_torn_ = false;
};

}  // namespace

absl::Status PublishFile(FileSystem& file_system, const std::string& directory,
                         const std::string& name, std::string_view bytes,
                         const PublishOptions& options) {
  CHECK(!options.writer.empty());
  const std::string path = absl::StrCat(directory, "/", name);
  const std::string partial = absl::StrCat(path, ".partial.", options.writer);
  // Contents before name: a name that reaches the disk first would publish an empty file.
  absl::Status written = WriteNew(file_system, partial, bytes, options.on_visible);
  if (written.code() == absl::StatusCode::kAlreadyExists) {
    // An earlier try of this very writer failed, and so did the removal of what it left.
    RemovePartial(file_system, partial);
    written = WriteNew(file_system, partial, bytes, options.on_visible);
  }
  if (!written.ok()) {
    RemovePartial(file_system, partial);
    return written;
  }
  if (options.on_durable) options.on_durable();
  const absl::Status linked = file_system.Link(partial, path);
  RemovePartial(file_system, partial);
  if (linked.code() == absl::StatusCode::kUnimplemented) {
    return ExclusivePublication(file_system, directory, name, options).Run(bytes);
  }
  return linked;
}

bool PublicationWasCutOff(const std::vector<std::string>& names, std::string_view name) {
  const std::string prefix = absl::StrCat(std::string(name), kMarkerPart);
  return std::any_of(names.begin(), names.end(), [&](const std::string& other) {
    return other.compare(0, prefix.size(), prefix) == 0;
  });
}

absl::StatusOr<bool> PublicationWasCutOff(FileSystem& file_system, const std::string& directory,
                                          std::string_view name) {
  ASSIGN_OR_RETURN(const std::vector<std::string> markers, MarkersOf(file_system, directory, name));
  return !markers.empty();
}

absl::Status RemoveMarkers(FileSystem& file_system, const std::string& directory,
                           std::string_view name) {
  ASSIGN_OR_RETURN(const std::vector<std::string> markers, MarkersOf(file_system, directory, name));
  if (markers.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(file_system.SyncFile(absl::StrCat(directory, "/", std::string(name))));
  for (const std::string& marker : markers) {
    const absl::Status removed = file_system.Unlink(absl::StrCat(directory, "/", marker));
    if (!removed.ok() && removed.code() != absl::StatusCode::kNotFound) return removed;
  }
  return file_system.SyncDirectory(directory);
}

absl::Status EnsureDirectory(FileSystem& file_system, const std::string& parent,
                             const std::string& name) {
  const absl::Status created = file_system.CreateDirectory(absl::StrCat(parent, "/", name));
  if (!created.ok() && created.code() != absl::StatusCode::kAlreadyExists) return created;
  return file_system.SyncDirectory(parent);
}

}  // namespace holdfast
