// holdfast-shim: one per rank of `holdfast run`. Started by the agent with the number of a memfd.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "agent/run/fields.h"
#include "agent/run/shim.h"
#include "agent/run/shim_protocol.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

std::optional<std::string> ReadAll(int fd) {
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size <= 0 ||
      static_cast<size_t>(info.st_size) > Fields::kBytesMax) {
    return std::nullopt;
  }
  std::string bytes(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        pread(fd, bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return std::nullopt;
    done += static_cast<size_t>(got);
  }
  return bytes;
}

int Main(int argc, char** argv) {
  std::optional<ShimSpec> spec;
  if (argc == 2) {
    const UniqueFd file(std::atoi(argv[1]));
    if (const std::optional<std::string> bytes = ReadAll(file.get())) {
      spec = DecodeShimSpec(*bytes);
    }
  }
  if (!spec.has_value()) {
    std::fprintf(stderr, "holdfast-shim: runs one rank for the agent; not for people\n");
    return 2;
  }
  return Shim(*std::move(spec)).Run();
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) { return holdfast::Main(argc, argv); }
