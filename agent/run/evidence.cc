#include "agent/run/evidence.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "agent/run/rank_output.h"
#include "agent/run/run_spec.h"
#include "agent/run/small_files.h"
#include "agent/witness/helper.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

// The last of a file; empty if it cannot be read.
std::string TailOf(const std::string& path, size_t bytes_max) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info {};
  if (!file || fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) return "";
  const size_t count = std::min(bytes_max, static_cast<size_t>(info.st_size));
  std::string text(count, '\0');
  size_t done = 0;
  while (done < count) {
    const off_t at = info.st_size - static_cast<off_t>(count - done);
    const ssize_t got = pread(file.get(), text.data() + done, count - done, at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  text.resize(done);
  return text;
}

class Folder {
 public:
  explicit Folder(const std::string& path) : path_(path), status_(MakeDirectories(path)) {}
  void Write(const std::string& name, const std::string& contents) {
    const absl::Status written = ReplaceFile(absl::StrCat(path_, "/", name), contents);
    if (status_.ok()) status_ = written;
  }
  const absl::Status& status() const { return status_; }

 private:
  const std::string path_;
  absl::Status status_;
};

}  // namespace

absl::Status Collect(const Evidence& evidence) {
  Folder folder(evidence.directory);
  folder.Write("summary.txt", evidence.summary);
  folder.Write("status.json", evidence.status_json);
  std::vector<std::vector<std::string>> runs;
  std::vector<uint32_t> of_rank;
  for (const Evidence::RankPlace& place : evidence.ranks) {
    const std::string name = absl::StrCat("rank-", place.rank);
    folder.Write(
        absl::StrCat(name, ".stdout"),
        TailOf(absl::StrCat(place.log_directory, "/", kLogNames[0]), Evidence::kLogTailBytes));
    folder.Write(
        absl::StrCat(name, ".stderr"),
        TailOf(absl::StrCat(place.log_directory, "/", kLogNames[1]), Evidence::kLogTailBytes));
    const std::string error =
        TailOf(absl::StrCat(place.log_directory, "/", kErrorFileName), Evidence::kLogTailBytes);
    if (!error.empty()) folder.Write(absl::StrCat(name, ".", kErrorFileName), error);
    if (place.process == 0) continue;
    runs.push_back({"stacks", absl::StrCat(place.process)});
    of_rank.push_back(place.rank);
  }
  if (runs.empty()) return folder.status();
  const std::vector<absl::StatusOr<std::string>> stacks =
      RunHelpers(HelperPath(), runs, evidence.stacks_deadline);
  for (size_t i = 0; i < stacks.size(); ++i) {
    folder.Write(absl::StrCat("rank-", of_rank[i], ".stacks"),
                 stacks[i].ok() ? *stacks[i] : absl::StrCat(stacks[i].status().ToString(), "\n"));
  }
  return folder.status();
}

}  // namespace holdfast
