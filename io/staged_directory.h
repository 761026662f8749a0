// A directory, or a file, that appears whole or not at all: it is filled under a name of its own
// beside the final one, and renamed at the end. For output that people make with a command: a
// folder of weights, an exported checkpoint. (Our own checkpoints are published by their manifest.)
#ifndef HOLDFAST_IO_STAGED_DIRECTORY_H_
#define HOLDFAST_IO_STAGED_DIRECTORY_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// Threads: one. The destructor removes what was not published, as far as can be.
class StagedDirectory {
 public:
  enum class Existing { kRefuse, kReplace };
  // What gets the final name: the directory, or the file in it that has the final name's last part.
  enum class Result { kDirectory, kFile };

  // `final_path`: its parent exists. `unique`: letters of this process alone. Errors:
  // kAlreadyExists (something has the final name, and kRefuse; or it is a directory where a file is
  // to be, or the other way round), those of the system.
  static absl::StatusOr<std::unique_ptr<StagedDirectory>> Create(
      const std::string& final_path, const std::string& unique, Existing existing,
      Result result = Result::kDirectory);
  ~StagedDirectory();
  StagedDirectory(const StagedDirectory&) = delete;
  StagedDirectory& operator=(const StagedDirectory&) = delete;

  // Where to write: `.<name>.partial.<unique>`, mode 0700.
  const std::string& path() const { return staged_path_; }

  // After OK the result has its final name, durably, if the files in it were synced by whoever
  // wrote them. What had that name before is removed (kReplace), after the new one is there: at no
  // time is neither. Errors: kAlreadyExists (it has appeared meanwhile, and kRefuse), those of the
  // system; then the destructor removes all.
  absl::Status Publish();

 private:
  StagedDirectory(std::string final_path, std::string staged_path, Existing existing, Result result)
      : final_path_(std::move(final_path)),
        staged_path_(std::move(staged_path)),
        existing_(existing),
        result_(result) {}

  const std::string final_path_;
  const std::string staged_path_;
  const Existing existing_;
  const Result result_;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_STAGED_DIRECTORY_H_
