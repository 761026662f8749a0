// What stays below the agent's `state_directory`: the history of each job, of what happened in all
// its runs and while it ran under another launcher; and the list of GPUs that made trouble, of all
// jobs.
#ifndef HOLDFAST_AGENT_RUN_STATE_FILES_H_
#define HOLDFAST_AGENT_RUN_STATE_FILES_H_

#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "agent/recovery/gpus.h"
#include "agent/recovery/history.h"
#include "agent/run/small_files.h"
#include "base/status_macros.h"

namespace holdfast {

inline std::string HistoryPath(const std::string& job_directory) {
  return absl::StrCat(job_directory, "/history");
}

// An empty one if there is no file. Errors: of the disk, and DecodeHistory's.
inline absl::StatusOr<recovery::History> ReadHistory(const std::string& job_directory) {
  absl::StatusOr<std::string> bytes =
      ReadFile(HistoryPath(job_directory), recovery::History::kBytesMax);
  if (absl::IsNotFound(bytes.status())) return recovery::History();
  RETURN_IF_ERROR(bytes.status());
  return recovery::DecodeHistory(std::as_bytes(std::span(*bytes)));
}

// An empty one if there is no file. Errors: of the disk, and LemonList::Decode's.
inline absl::StatusOr<recovery::LemonList> ReadLemons(const std::string& path) {
  absl::StatusOr<std::string> bytes = ReadFile(path, recovery::LemonList::kFileBytesMax);
  if (absl::IsNotFound(bytes.status())) return recovery::LemonList();
  RETURN_IF_ERROR(bytes.status());
  return recovery::LemonList::Decode(*bytes, path);
}

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_STATE_FILES_H_
