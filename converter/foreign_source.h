// A foreign checkpoint, read: the folder and the index that a sandboxed child made of it.
#ifndef HOLDFAST_CONVERTER_FOREIGN_SOURCE_H_
#define HOLDFAST_CONVERTER_FOREIGN_SOURCE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"
#include "converter/sandbox.h"
#include "io/file_system.h"

namespace holdfast::converter {

struct ForeignSource {
  bool recognized = false;  // else there is the folder only
  std::unique_ptr<ForeignFolder> folder;
  ForeignIndex index;  // of these files: CheckFiles held
  SandboxReport sandbox;
};

// Recognizes and reads what lies at `path`. OK with recognized false: no reader knows it, though
// each file of a folder may be something on its own. Errors: kNotFound (no such path),
// kPermissionDenied (unsafe content, refused), others of the reader, those of the sandbox,
// kDataLoss (files changed meanwhile). All name the path.
absl::StatusOr<ForeignSource> OpenForeignSource(FileSystem& file_system, const std::string& path,
                                                const ReadOptions& options,
                                                const SandboxLimits& limits = {});

// For those to whom nothing less is of use: kNotFound, with the formats that were looked for;
// kDataLoss (files of a DCP folder without the one that says what is in them), kPermissionDenied
// (nothing in the folder but what it refuses).
absl::Status NotRecognized(const std::string& path, const ForeignSource& source);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FOREIGN_SOURCE_H_
