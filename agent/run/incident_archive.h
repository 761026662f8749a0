// The files of an incident (evidence.h) as one file, which can be carried elsewhere.
//
//   file = zstd frame of: member*, 1024 zero bytes
//   member = a POSIX ustar header, contents, zeros up to a multiple of 512
//
// Any tar reads it (`tar --zstd -xf`). The same files give the same bytes: members are in the order
// of their names, owned by 0:0, of mode 0600 and of the time 0. The reader takes exactly that and
// nothing else, so that it need not be afraid of what tar can say: no paths, links, devices, sparse
// files, long names or extensions.
#ifndef HOLDFAST_AGENT_RUN_INCIDENT_ARCHIVE_H_
#define HOLDFAST_AGENT_RUN_INCIDENT_ARCHIVE_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// Limits: the writer keeps them, the reader refuses what is above.
inline constexpr size_t kIncidentFilesMax = 16'384;
inline constexpr size_t kIncidentNameBytesMax = 99;
inline constexpr size_t kIncidentBytesMax = size_t{256} << 20;  // of the tar
inline constexpr size_t kIncidentArchiveBytesMax = size_t{260} << 20;

// Those that programs read.
inline constexpr char kIncidentFile[] = "incident.json";
inline constexpr char kSummaryFile[] = "summary.txt";
inline constexpr char kMonitorFile[] = "monitor.json";
inline constexpr char kRecordingFile[] = "monitor.hfmr";

struct IncidentFile {
  std::string name;  // of letters, digits, '.', '_' and '-'; does not begin with a dot
  std::string contents;
  friend bool operator==(const IncidentFile&, const IncidentFile&) = default;
};

bool IsIncidentFileName(std::string_view name);

// Errors: kInvalidArgument (a name, or two of the same), kResourceExhausted (beyond a limit).
absl::StatusOr<std::string> PackIncident(std::vector<IncidentFile> files);

// Errors: kDataLoss: where, what was expected, what was found; kResourceExhausted.
absl::StatusOr<std::vector<IncidentFile>> UnpackIncident(std::string_view archive);

// The same without the compression.
absl::StatusOr<std::vector<IncidentFile>> ReadIncidentTar(std::string_view tar);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_INCIDENT_ARCHIVE_H_
