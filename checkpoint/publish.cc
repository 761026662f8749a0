#include "checkpoint/publish.h"

#include <memory>
#include <span>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

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

absl::Status PublishExclusively(FileSystem& file_system, const std::string& directory,
                                const std::string& name, std::string_view bytes,
                                const PublishOptions& options) {
  const std::string marker = absl::StrCat(directory, "/", name, ".exclusive.", options.writer);
  RETURN_IF_ERROR(WriteNew(file_system, marker, bytes, nullptr));
  // The marker's name must be durable before the final name can be.
  if (absl::Status synced = file_system.SyncDirectory(directory); !synced.ok()) {
    RemovePartial(file_system, marker);
    return synced;
  }
  const absl::Status written =
      WriteNew(file_system, absl::StrCat(directory, "/", name), bytes, nullptr);
  if (written.code() == absl::StatusCode::kAlreadyExists) {
    RemovePartial(file_system, marker);
    return written;
  }
  RETURN_IF_ERROR(written);
  RETURN_IF_ERROR(file_system.SyncDirectory(directory));
  RETURN_IF_ERROR(file_system.Unlink(marker));
  return file_system.SyncDirectory(directory);
}

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
    return PublishExclusively(file_system, directory, name, bytes, options);
  }
  return linked;
}

bool PublicationWasCutOff(const std::vector<std::string>& names, std::string_view name) {
  const std::string prefix = absl::StrCat(std::string(name), ".exclusive.");
  for (const std::string& other : names) {
    if (other.compare(0, prefix.size(), prefix) == 0) return true;
  }
  return false;
}

absl::StatusOr<bool> PublicationWasCutOff(FileSystem& file_system, const std::string& directory,
                                          std::string_view name, size_t names_max) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, file_system.List(directory, names_max));
  return PublicationWasCutOff(names, name);
}

absl::Status EnsureDirectory(FileSystem& file_system, const std::string& parent,
                             const std::string& name) {
  const absl::Status created = file_system.CreateDirectory(absl::StrCat(parent, "/", name));
  if (!created.ok() && created.code() != absl::StatusCode::kAlreadyExists) return created;
  return file_system.SyncDirectory(parent);
}

}  // namespace holdfast
