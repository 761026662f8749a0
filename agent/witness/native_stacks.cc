#include "agent/witness/native_stacks.h"

#include <cxxabi.h>
#include <dirent.h>
#include <elfutils/libdwfl.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace holdfast {
namespace {

constexpr size_t kThreadsMax = 256;
constexpr size_t kFramesMax = 128;
constexpr size_t kNameBytesMax = 160;
constexpr std::string_view kUnnamed = "(anonymous namespace)";
constexpr absl::Duration kStopDeadline = absl::Milliseconds(200);

int NoDebugInformation(Dwfl_Module*, void**, const char*, Dwarf_Addr, const char*, const char*,
                       GElf_Word, char**) {
  return -1;
}

constexpr Dwfl_Callbacks kCallbacks = {
    .find_elf = dwfl_linux_proc_find_elf,
    .find_debuginfo = NoDebugInformation,
    .section_address = nullptr,
    .debuginfo_path = nullptr,
};

struct DwflEnd {
  void operator()(Dwfl* dwfl) const { dwfl_end(dwfl); }
};

int LoadUnwindTable(Dwfl_Module* module, void**, const char*, Dwarf_Addr, void*) {
  Dwarf_Addr bias = 0;
  dwfl_module_eh_cfi(module, &bias);
  return DWARF_CB_OK;
}

int AddFrame(Dwfl_Frame* frame, void* argument) {
  auto& counters = *static_cast<std::vector<Dwarf_Addr>*>(argument);
  Dwarf_Addr counter = 0;
  bool is_activation = false;
  if (!dwfl_frame_pc(frame, &counter, &is_activation)) return DWARF_CB_ABORT;
  // A return address may already belong to the next function.
  counters.push_back(is_activation ? counter : counter - 1);
  return counters.size() < kFramesMax ? DWARF_CB_OK : DWARF_CB_ABORT;
}

// "c10d::ProcessGroupGloo::runLoop(int)" -> without arguments, and of a bearable length.
std::string ShortName(const char* symbol) {
  int status = 0;
  const std::unique_ptr<char, decltype(&free)> demangled(
      abi::__cxa_demangle(symbol, nullptr, nullptr, &status), &free);
  std::string name = demangled == nullptr ? symbol : demangled.get();
  if (demangled != nullptr) {
    size_t arguments = name.find('(');
    while (arguments != std::string::npos &&
           name.compare(arguments, kUnnamed.size(), kUnnamed) == 0) {
      arguments = name.find('(', arguments + kUnnamed.size());
    }
    if (arguments != std::string::npos && arguments > 0) name.resize(arguments);
  }
  return name.substr(0, kNameBytesMax);
}

std::string FrameText(Dwfl* dwfl, Dwarf_Addr counter) {
  Dwfl_Module* const module = dwfl_addrmodule(dwfl, counter);
  if (module == nullptr) return "? (no module)";
  const char* const path =
      dwfl_module_info(module, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
  const std::string_view file = path == nullptr ? "?" : path;
  const size_t slash = file.rfind('/');
  const std::string base(slash == std::string_view::npos ? file : file.substr(slash + 1));
  const char* const symbol = dwfl_module_addrname(module, counter);
  return absl::StrCat(symbol == nullptr ? "?" : ShortName(symbol), " (", base, ")");
}

std::vector<pid_t> ThreadsOf(pid_t process) {
  std::vector<pid_t> threads;
  struct Close {
    void operator()(DIR* directory) const { closedir(directory); }
  };
  const std::unique_ptr<DIR, Close> directory(
      opendir(absl::StrFormat("/proc/%d/task", process).c_str()));
  if (directory == nullptr) return threads;
  while (const dirent* entry = readdir(directory.get())) {
    pid_t thread = 0;
    if (absl::SimpleAtoi(entry->d_name, &thread)) threads.push_back(thread);
  }
  // The main thread, whose id is the process's, first.
  std::sort(threads.begin(), threads.end(), [&](pid_t a, pid_t b) {
    return std::pair(a != process, a) < std::pair(b != process, b);
  });
  if (threads.size() > kThreadsMax) threads.resize(kThreadsMax);
  return threads;
}

// Waits until the seized thread stands. Returns its wait status, or -1.
int WaitUntilStopped(pid_t thread) {
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  const absl::Duration end = RealClock().Elapsed() + kStopDeadline;
  for (;;) {
    int status = 0;
    const pid_t found = waitpid(thread, &status, __WALL | WNOHANG);
    if (found == thread) return WIFSTOPPED(status) ? status : -1;
    if (found < 0 && errno != EINTR) return -1;
    const absl::Duration left = end - RealClock().Elapsed();
    if (left <= absl::ZeroDuration()) return -1;
    const timespec timeout = absl::ToTimespec(left);
    sigtimedwait(&child, nullptr, &timeout);  // whatever it returns: look again
  }
}

// Its program counters, innermost first; nothing if it did not stand in time.
std::vector<Dwarf_Addr> Unwind(Dwfl* dwfl, pid_t thread, absl::Duration& held_max) {
  std::vector<Dwarf_Addr> counters;
  const absl::Duration begin = RealClock().Elapsed();
  if (ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr) != 0) return counters;
  const int status = WaitUntilStopped(thread);
  if (status == -1) return counters;
  dwfl_getthread_frames(dwfl, thread, AddFrame, &counters);  // what it found before an error counts
  // A signal that was on its way goes on its way.
  const bool is_ours = status >> 16 == PTRACE_EVENT_STOP;
  const intptr_t signal_number = is_ours ? 0 : WSTOPSIG(status);
  ptrace(PTRACE_DETACH, thread, nullptr, reinterpret_cast<void*>(signal_number));
  held_max = std::max(held_max, RealClock().Elapsed() - begin);
  return counters;
}

}  // namespace

absl::StatusOr<std::string> NativeStacks(pid_t process) {
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child, nullptr);

  const std::unique_ptr<Dwfl, DwflEnd> dwfl(dwfl_begin(&kCallbacks));
  if (dwfl == nullptr) return absl::UnavailableError(absl::StrCat("libdw: ", dwfl_errmsg(-1)));
  const std::vector<pid_t> threads = ThreadsOf(process);
  if (threads.empty()) return absl::NotFoundError(absl::StrCat("no process ", process));
  // Asked first: what is not permitted is told as such, and not as a missing file.
  if (ptrace(PTRACE_SEIZE, threads.front(), nullptr, nullptr) != 0) {
    if (errno == ESRCH) return absl::NotFoundError(absl::StrCat("no process ", process));
    return absl::PermissionDeniedError(absl::StrFormat(
        "ptrace of process %d: %s; it needs the same user and kernel.yama.ptrace_scope = 0, or "
        "CAP_SYS_PTRACE",
        process, strerror(errno)));
  }
  if (const int error = dwfl_linux_proc_report(dwfl.get(), process); error != 0) {
    return absl::UnavailableError(absl::StrFormat("the modules of process %d: %s", process,
                                                  error > 0 ? strerror(error) : dwfl_errmsg(-1)));
  }
  dwfl_report_end(dwfl.get(), nullptr, nullptr);
  dwfl_getmodules(dwfl.get(), LoadUnwindTable, nullptr, 0);
  if (dwfl_linux_proc_attach(dwfl.get(), process, /*assume_ptrace_stopped=*/true) != 0) {
    return absl::UnavailableError(
        absl::StrFormat("unwinding process %d: %s", process, dwfl_errmsg(-1)));
  }

  std::string text;
  absl::Duration held_max;
  for (const pid_t thread : threads) {
    // It may have ended since, or be held by a debugger.
    if (thread != threads.front() && ptrace(PTRACE_SEIZE, thread, nullptr, nullptr) != 0) continue;
    const std::vector<Dwarf_Addr> counters = Unwind(dwfl.get(), thread, held_max);
    absl::StrAppend(&text, "thread ", thread, thread == process ? " main\n" : "\n");
    for (const Dwarf_Addr counter : counters) {
      absl::StrAppend(&text, "  ", FrameText(dwfl.get(), counter), "\n");
    }
  }
  absl::StrAppendFormat(&text, "# held %d us at most\n", absl::ToInt64Microseconds(held_max));
  return text;
}

}  // namespace holdfast
