// The child:
//   1. resource limits, no new privileges;
//   2. Landlock: reading below the directory;
//   3. seccomp, last: what it forbids is needed for 1 and 2;
//   4. `work`;
//   5. its result into the memfd, which it seals. Then it ends at once, without running what the
//      parent registered for its own end.
// Which layers were missing stands at the front of the result: one byte of bits. A child that was
// taken over can lie about that and about everything: the parent takes the result as untrusted.
#include "converter/sandbox.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <span>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_format.h"
#include "base/byte_codec.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/transfer.h"
#include "io/unique_fd.h"

namespace holdfast::converter {
namespace {

constexpr Envelope kEnvelope = {"sandbox result", "HFSB", 1, (size_t{1} << 30) + (size_t{1} << 20)};
constexpr size_t kMessageBytesMax = size_t{64} << 10;
constexpr uint8_t kNoLandlock = 1;
constexpr uint8_t kNoSeccomp = 2;
constexpr uint8_t kNoLimits = 4;
constexpr int kNoMemoryExit = 3;
constexpr char kOutOfMemory[] = "holdfast/sandbox-out-of-memory";  // a payload of that error
constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

// What the child hands over, in both directions of base/byte_codec.h.
struct Result {
  uint8_t missing = 0;
  int code = 0;  // absl::StatusCode
  std::string text;
};

template <typename Walker>
void Walk(Walker& walker, Result& result) {
  walker.Number("missing layers", result.missing, kNoLandlock | kNoSeccomp | kNoLimits);
  walker.Number("status", result.code, 16);
  walker.Text("result", result.text, kEnvelope.bytes_max);
}

bool SetLimit(int what, uint64_t value) {
  rlimit limit{};
  if (getrlimit(static_cast<__rlimit_resource>(what), &limit) != 0) return false;
  limit.rlim_max = std::min<rlim_t>(limit.rlim_max, value);
  limit.rlim_cur = limit.rlim_max;
  return setrlimit(static_cast<__rlimit_resource>(what), &limit) == 0;
}

// Of this process, now: a sanitizer has reserved terabytes of it.
uint64_t AddressSpaceBytes() {
  const UniqueFd file(open("/proc/self/statm", O_RDONLY | O_CLOEXEC));
  char text[32] = {};
  if (file.get() < 0 || read(file.get(), text, sizeof(text) - 1) <= 0) return 0;
  return std::strtoull(text, nullptr, 10) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

bool ApplyLimits(const SandboxLimits& limits) {
  const uint64_t address_space = AddressSpaceBytes();
  // Without knowing what there is, no limit of it can be said. All are tried, whichever fails.
  const bool applied[] = {
      address_space > 0 && SetLimit(RLIMIT_AS, address_space + limits.memory_bytes),
      SetLimit(RLIMIT_CPU, limits.cpu_seconds), SetLimit(RLIMIT_FSIZE, limits.result_bytes),
      SetLimit(RLIMIT_NOFILE, 256), SetLimit(RLIMIT_CORE, 0)};
  return std::all_of(std::begin(applied), std::end(applied), [](bool each) { return each; });
}

// Every access that this kernel's Landlock knows is handled, so denied; reading is allowed below
// the directory.
bool ApplyLandlock(const std::string& directory) {
  const long abi =
      syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
  if (abi < 1) return false;
  // The first 13 rights are of version 1; 13 is REFER (2), 14 TRUNCATE (3), 15 IOCTL_DEV (5).
  uint64_t handled = (uint64_t{1} << 13) - 1;
  if (abi >= 2) handled |= uint64_t{1} << 13;
  if (abi >= 3) handled |= uint64_t{1} << 14;
  if (abi >= 5) handled |= uint64_t{1} << 15;
  landlock_ruleset_attr rules{};
  rules.handled_access_fs = handled;
  const UniqueFd ruleset(static_cast<int>(
      syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules.handled_access_fs), 0)));
  const UniqueFd parent(open(directory.c_str(), O_PATH | O_CLOEXEC));
  if (ruleset.get() < 0 || parent.get() < 0) return false;
  landlock_path_beneath_attr below{};
  below.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
  below.parent_fd = parent.get();
  return syscall(SYS_landlock_add_rule, ruleset.get(), LANDLOCK_RULE_PATH_BENEATH, &below, 0) ==
             0 &&
         syscall(SYS_landlock_restrict_self, ruleset.get(), 0) == 0;
}

// What is allowed; everything else fails with EPERM. Opening for writing too, whatever the path.
constexpr int kAllowed[] = {
    SYS_read,
    SYS_pread64,
    SYS_readv,
    SYS_preadv,
    SYS_write,
    SYS_pwrite64,
    SYS_lseek,
    SYS_close,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_getdents64,
    SYS_readlinkat,
    SYS_fcntl,
    SYS_ftruncate,
    SYS_mmap,
    SYS_munmap,
    SYS_mremap,
    SYS_mprotect,
    SYS_madvise,
    SYS_brk,
    SYS_futex,
    SYS_getpid,
    SYS_gettid,
    SYS_tgkill,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_clock_gettime,
    SYS_getrandom,
    SYS_sched_yield,
    SYS_exit,
    SYS_exit_group,
    SYS_restart_syscall,
    SYS_getcwd,
    SYS_rseq,
    SYS_sched_getaffinity,
#ifdef SYS_readlink
    SYS_readlink,
    SYS_stat,
    SYS_lstat,
#endif
};

#if defined(__x86_64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_AARCH64;
#else
constexpr uint32_t kArchitecture = 0;  // then there is no filter
#endif

sock_filter Statement(uint16_t code, uint32_t k) { return {code, 0, 0, k}; }
sock_filter Jump(uint16_t code, uint32_t k, uint8_t yes, uint8_t no) { return {code, yes, no, k}; }

bool ApplySeccomp() {
  if (kArchitecture == 0) return false;
  std::vector<sock_filter> program;
  const auto load = [&](size_t offset) {
    program.push_back(Statement(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset)));
  };
  load(offsetof(seccomp_data, arch));
  program.push_back(Jump(BPF_JMP | BPF_JEQ | BPF_K, kArchitecture, 1, 0));
  program.push_back(Statement(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS));
  load(offsetof(seccomp_data, nr));
  // openat: the lower half of the flags (little-endian) has no bit of writing.
  program.push_back(Jump(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 4));
  load(offsetof(seccomp_data, args) + 2 * sizeof(uint64_t));
  program.push_back(Jump(BPF_JMP | BPF_JSET | BPF_K, O_WRONLY | O_RDWR | O_CREAT | O_TRUNC, 0, 1));
  program.push_back(Statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));
  program.push_back(Statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  for (const int number : kAllowed) {
    program.push_back(Jump(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0, 1));
    program.push_back(Statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  }
  program.push_back(Statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));
  sock_fprog filter{};
  filter.len = static_cast<unsigned short>(program.size());
  filter.filter = program.data();
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

// What the child hands over, sealed.
std::string SealedOutcome(const SandboxLimits& limits, Result result,
                          const std::function<absl::StatusOr<std::string>()>& work) {
  absl::StatusOr<std::string> outcome = work();
  if (outcome.ok() && outcome->size() > limits.result_bytes) {
    outcome = absl::ResourceExhaustedError(absl::StrFormat(
        "expected a result of at most %d bytes, found %d", limits.result_bytes, outcome->size()));
  }
  if (outcome.ok()) {
    result.text = *std::move(outcome);
  } else {
    result.code = static_cast<int>(outcome.status().code());
    result.text = std::string(outcome.status().message().substr(0, kMessageBytesMax));
  }
  std::string bytes;
  OpenEnvelope(kEnvelope, bytes);
  ByteWriter writer(&bytes);
  Walk(writer, result);
  SealEnvelope(kEnvelope, bytes);
  return bytes;
}

// Other exceptions than for memory end the child here (SIGABRT): behind this function are the
// parent's.
[[noreturn]] void RunChild(const std::string& directory, const SandboxLimits& limits,
                           const std::function<absl::StatusOr<std::string>()>& work,
                           int memory) noexcept {
  Result result;
  const bool privileges = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
  if (!ApplyLimits(limits)) result.missing |= kNoLimits;
  if (!privileges || !ApplyLandlock(directory)) result.missing |= kNoLandlock;
  if (!privileges || !ApplySeccomp()) result.missing |= kNoSeccomp;
  try {
    const std::string bytes = SealedOutcome(limits, std::move(result), work);
    const bool written = WriteAll(memory, 0, std::as_bytes(std::span(bytes))).ok() &&
                         fcntl(memory, F_ADD_SEALS, kSeals) == 0;
    _exit(written ? 0 : 1);
  } catch (const std::bad_alloc&) {
    _exit(kNoMemoryExit);
  }
}

absl::Status Killed(int status) {
  if (WIFSIGNALED(status)) {
    return absl::DataLossError(absl::StrFormat("the process that read it ended by signal %d (%s)",
                                               WTERMSIG(status), strsignal(WTERMSIG(status))));
  }
  return absl::DataLossError(
      absl::StrFormat("the process that read it ended with %d", WEXITSTATUS(status)));
}

absl::StatusOr<Result> TakeResult(int memory) {
  if (fcntl(memory, F_GET_SEALS) != kSeals) {
    return absl::DataLossError("the process that read it did not seal its result");
  }
  struct stat info {};
  if (fstat(memory, &info) != 0) return ErrnoStatus(errno, "stat", "the result");
  const auto size = static_cast<size_t>(info.st_size);
  if (size > kEnvelope.bytes_max) {
    return absl::DataLossError("the process that read it returned too much");
  }
  std::string bytes(size, '\0');
  RETURN_IF_ERROR(ReadAll(memory, 0, std::as_writable_bytes(std::span(bytes))));
  ASSIGN_OR_RETURN(const auto fields, FieldsIn(kEnvelope, std::as_bytes(std::span(bytes))));
  Result result;
  ByteReader reader(kEnvelope.name, fields);
  Walk(reader, result);
  RETURN_IF_ERROR(reader.Finish());
  return result;
}

}  // namespace

absl::StatusOr<std::string> RunSandboxed(const std::string& readable_directory,
                                         const SandboxLimits& limits,
                                         const std::function<absl::StatusOr<std::string>()>& work,
                                         SandboxReport* report) {
  report->missing.clear();
  const UniqueFd memory(memfd_create("holdfast-index", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (memory.get() < 0) return ErrnoStatus(errno, "create", "a memfd");
  std::fflush(nullptr);  // or the child would have our unwritten lines too
  const pid_t child = fork();
  if (child < 0) return ErrnoStatus(errno, "start", "the process that reads");
  if (child == 0) RunChild(readable_directory, limits, work, memory.get());
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return ErrnoStatus(errno, "wait for", "the process that reads");
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoMemoryExit) {
    absl::Status exhausted = absl::ResourceExhaustedError(
        absl::StrFormat("the process that reads it expected more than the %d bytes of memory that "
                        "it may have",
                        limits.memory_bytes));
    exhausted.SetPayload(kOutOfMemory, absl::Cord());
    return exhausted;
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return Killed(status);
  absl::StatusOr<Result> taken = TakeResult(memory.get());
  if (!taken.ok()) return absl::DataLossError(std::string(taken.status().message()));
  if ((taken->missing & kNoLandlock) != 0) report->missing.push_back("Landlock");
  if ((taken->missing & kNoSeccomp) != 0) report->missing.push_back("seccomp");
  if ((taken->missing & kNoLimits) != 0) report->missing.push_back("resource limits");
  if (taken->code != 0)
    return absl::Status(static_cast<absl::StatusCode>(taken->code), taken->text);
  return std::move(taken->text);
}

bool IsOutOfMemory(const absl::Status& status) {
  return status.GetPayload(kOutOfMemory).has_value();
}

}  // namespace holdfast::converter
