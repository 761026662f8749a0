#include "agent/run/shim_client.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/run/fields.h"
#include "agent/runtime_directory.h"
#include "base/status_macros.h"
#include "io/program_path.h"

namespace holdfast {
namespace {

constexpr size_t kRecordBytesMax = 4096;

std::string SocketOf(const std::string& directory) {
  return absl::StrCat(directory, "/", kShimSocketName);
}

}  // namespace

std::string ShimPath() { return ProgramBeside(kShimProgramName); }

absl::StatusOr<Child> StartShim(const std::string& program, ShimSpec spec) {
  ASSIGN_OR_RETURN(const UniqueFd listener, Listen(SocketOf(spec.directory)));
  spec.listener = listener.get();
  const std::string bytes = EncodeShimSpec(spec);
  if (bytes.size() > Fields::kBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("rank %d: command and environment: expected at most %d bytes, found %d",
                        spec.rank, Fields::kBytesMax, bytes.size()));
  }
  ASSIGN_OR_RETURN(const UniqueFd memory, SealedMemfd("holdfast shim", bytes));
  const std::array<int, 2> inherited = {listener.get(), memory.get()};
  return SpawnDetached(program, {kShimProgramName, absl::StrCat(memory.get())}, inherited);
}

absl::StatusOr<UniqueFd> ConnectToShim(const std::string& directory) {
  return ConnectTo(SocketOf(directory));
}

ShimMessage ReceiveFromShim(int connection) {
  ShimMessage message;
  ssize_t got = 0;
  do {
    got = recv(connection, &message.state, sizeof(message.state), MSG_DONTWAIT);
  } while (got < 0 && errno == EINTR);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return message;
  const bool is_state = got == static_cast<ssize_t>(sizeof(message.state)) &&
                        message.state.magic == kShimMagic && message.state.version == kShimVersion;
  message.kind = is_state ? ShimMessage::Kind::kState : ShimMessage::Kind::kEnd;
  return message;
}

bool SendToShim(int connection, ShimRequestType type, int signal_number) {
  const ShimRequest request{kShimMagic, kShimVersion, type, signal_number, /*reserved=*/0};
  return send(connection, &request, sizeof(request), MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(sizeof(request));
}

std::optional<ExitRecord> ReadExitRecord(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kExitRecordName);
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!file) return std::nullopt;
  const absl::StatusOr<std::string> text = ReadAll(file.get(), kRecordBytesMax);
  if (!text.ok()) return std::nullopt;
  return DecodeExitRecord(*text);
}

}  // namespace holdfast
