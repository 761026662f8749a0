// libholdfast.so as a trainer gets it: what it exports and needs, that it can be loaded and
// unloaded, that hf_save allocates nothing and makes at most two system calls, and forked children.
//
// The test program counts allocations by replacing malloc, and system calls with ptrace.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "hook/dynamic_symbols_testing.h"
#include "hook/holdfast.h"
#include "hook/sanitized_testing.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace {
// Allocations of all threads while counting is on.
std::atomic<bool> counting_allocations{false};
std::atomic<int> allocation_count{0};
}  // namespace

#ifdef HOLDFAST_TEST_SANITIZED
// The process's monitor board outlives an unloaded library (process_monitor.h), and then nothing
// that the sanitizer can see refers to it.
extern "C" const char* __lsan_default_options() { return "detect_leaks=0"; }
#endif

#ifndef HOLDFAST_TEST_SANITIZED
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* old, size_t bytes);

void* malloc(size_t bytes) {
  if (counting_allocations.load(std::memory_order_relaxed)) ++allocation_count;
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  if (counting_allocations.load(std::memory_order_relaxed)) ++allocation_count;
  return __libc_calloc(count, bytes);
}
void* realloc(void* old, size_t bytes) {
  if (counting_allocations.load(std::memory_order_relaxed)) ++allocation_count;
  return __libc_realloc(old, bytes);
}
}
#endif

namespace holdfast::hook {
namespace {

// ---- The file

TEST(LibraryFileTest, ExportsTheApiAndNeedsOnlyLibc) {
  const DynamicSymbols symbols = ReadDynamicSymbols(HOLDFAST_TEST_LIBRARY);
  const std::set<std::string> api = {"hf_close",
                                     "hf_due",
                                     "hf_get_info",
                                     "hf_heartbeat",
                                     "hf_open",
                                     "hf_register",
                                     "hf_report",
                                     "hf_restore",
                                     "hf_restore_partial",
                                     "hf_restored_blob",
                                     "hf_save",
                                     "hf_section_begin",
                                     "hf_section_end",
                                     "hf_version",
                                     "hf_wait_captured",
                                     "hf_wait_committed",
                                     "hf_monitor_communicator",
                                     "hf_monitor_close",
                                     "hf_monitor_thread",
                                     "hf_operation_begin",
                                     "hf_operation_start",
                                     "hf_operation_end",
                                     "hf_transfer_begin",
                                     "hf_transfer_end",
                                     "hf_step_begin",
                                     "hf_step_wait",
                                     "hf_step_end"};
  EXPECT_EQ(symbols.defined, api);
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "a sanitizer build needs the sanitizer's library";
#endif
  EXPECT_EQ(symbols.undefined, std::set<std::string>());
  for (const std::string& library : symbols.needed) {
    EXPECT_TRUE(library == "libc.so.6" || library.rfind("ld-linux", 0) == 0) << library;
  }
}

// ---- The library, loaded

#define HOLDFAST_TEST_EACH(use)                                                              \
  use(hf_open) use(hf_close) use(hf_register) use(hf_due) use(hf_save) use(hf_wait_captured) \
      use(hf_wait_committed) use(hf_restore) use(hf_restore_partial) use(hf_restored_blob)   \
          use(hf_get_info) use(hf_report) use(hf_heartbeat) use(hf_section_begin)            \
              use(hf_section_end) use(hf_version)

// The calls of the loaded library. (This program also contains its objects, for the test agent.)
struct Library {
  Library() : handle(dlopen(HOLDFAST_TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL)) {
    if (handle == nullptr) ADD_FAILURE() << dlerror();
#define HOLDFAST_TEST_FIND(name) name = reinterpret_cast<decltype(&::name)>(dlsym(handle, #name));
    HOLDFAST_TEST_EACH(HOLDFAST_TEST_FIND)
#undef HOLDFAST_TEST_FIND
  }
  ~Library() { EXPECT_EQ(dlclose(handle), 0); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  void* handle;
#define HOLDFAST_TEST_DECLARE(name) decltype(&::name) name;
  HOLDFAST_TEST_EACH(HOLDFAST_TEST_DECLARE)
#undef HOLDFAST_TEST_DECLARE
};

hf_open_options OpenOptions(const TestAgent& agent) {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  options.job = "library";
  options.rank = 0;
  options.world_size = 1;
  options.socket = agent.socket_path().c_str();
  return options;
}

TEST(LibraryTest, LoadsWorksAndUnloads) {
  for (int round = 0; round < 3; ++round) {
    TestAgent agent;
    auto loaded = std::make_unique<Library>();
    Library& library = *loaded;
    EXPECT_STREQ(library.hf_version(), "0.1.0");
    const hf_open_options options = OpenOptions(agent);
    hf_job* job = nullptr;
    hf_error error;
    ASSERT_EQ(library.hf_open(&options, &job, &error), HF_OK) << error.text;
    EXPECT_STREQ(error.text, "");
    library.hf_heartbeat(job, 3);
    EXPECT_EQ(agent.page().heartbeat_step.load(), 3u);
    library.hf_close(job);
    loaded.reset();
#ifndef HOLDFAST_TEST_SANITIZED
    EXPECT_EQ(dlopen(HOLDFAST_TEST_LIBRARY, RTLD_NOW | RTLD_NOLOAD), nullptr) << "still loaded";
#endif
  }
}

TEST(LibraryTest, CallsWithoutAJobOrWithWrongStructsAreErrors) {
  Library library;
  hf_error error;
  EXPECT_EQ(library.hf_open(nullptr, nullptr, &error), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_register(nullptr, "", nullptr, 0, nullptr, 0, 0, &error),
            HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_due(nullptr, 1), 0);
  EXPECT_EQ(library.hf_save(nullptr, 1, nullptr, &error), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_wait_captured(nullptr, -1, 0, &error), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_wait_committed(nullptr, 1, 0, 0, &error), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_restore(nullptr, nullptr, 0, nullptr), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_restore_partial(nullptr, nullptr, nullptr, 0, nullptr), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_restored_blob(nullptr, "", -1, nullptr, nullptr, &error),
            HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_get_info(nullptr, nullptr), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_report(nullptr, 1, nullptr), HF_INVALID_ARGUMENT);
  library.hf_heartbeat(nullptr, 1);
  library.hf_section_begin(nullptr, "x");
  library.hf_section_end(nullptr);
  library.hf_close(nullptr);

  TestAgent agent;
  hf_open_options options = OpenOptions(agent);
  hf_job* job = nullptr;
  for (const size_t wrong : {size_t{0}, sizeof(options) + 1}) {
    options.struct_bytes = wrong;
    EXPECT_EQ(library.hf_open(&options, &job, &error), HF_INVALID_ARGUMENT);
    EXPECT_EQ(job, nullptr);
  }
  options.struct_bytes = sizeof(options);
  ASSERT_EQ(library.hf_open(&options, &job, &error), HF_OK) << error.text;
  EXPECT_EQ(library.hf_register(job, "{}", nullptr, 1, nullptr, 0, 0, &error), HF_INVALID_ARGUMENT);
  EXPECT_EQ(library.hf_register(job, nullptr, nullptr, 0, nullptr, 0, 0, &error),
            HF_INVALID_ARGUMENT);
  hf_info info = {};
  EXPECT_EQ(library.hf_get_info(job, &info), HF_INVALID_ARGUMENT);
  // An older caller's shorter struct is filled as far as it goes.
  info.struct_bytes = offsetof(hf_info, connected);
  info.connected = 77;
  EXPECT_EQ(library.hf_get_info(job, &info), HF_OK);
  EXPECT_EQ(info.attempt, 1u);
  EXPECT_EQ(info.connected, 77u);
  library.hf_close(job);
}

// ---- What hf_save costs

constexpr uint32_t kBuffers = 10'000;

// While it lives every buffer is in device memory, of a driver that costs nothing. Its copies move
// nothing, so nothing is compared.
struct NullDriver {
  NullDriver() { setenv("HOLDFAST_CHECK_SOURCE", "none", 1); }
  ~NullDriver() {
    unsetenv("HOLDFAST_CHECK_SOURCE");
    if (handle != nullptr) dlclose(handle);
  }
  void* handle = dlopen(HOLDFAST_TEST_NULL_CUDA, RTLD_NOW | RTLD_LOCAL);
};

// A registered job with many small buffers and a blob.
struct ManyBuffers {
  ManyBuffers(const Library& used, uint32_t count) : library(used) {
    std::mt19937 random(1);
    TestPlan plan;
    for (uint32_t i = 0; i < count; ++i) {
      buffers.Add("t" + std::to_string(i), 16, 0, random);
      plan.ops.push_back({uint64_t{i} * 16, 0, 16, 1, 0, i, 0});
    }
    plan.block_count = count * 16 / 4096 + 1;
    plan.blobs = {{plan.block_count * plan.block_bytes, 64}};
    ++plan.block_count;
    agent.SetPlan([plan](const TestDocument&) { return plan; });
    const hf_open_options options = OpenOptions(agent);
    const std::vector<hf_buffer> list = buffers.List();
    const hf_blob_slot slot = {"rng", HF_BLOB_RANK, 64};
    ok = library.hf_open(&options, &job, &error) == HF_OK &&
         library.hf_register(job, "{}", list.data(), list.size(), &slot, 1, kPatienceNs, &error) ==
             HF_OK;
    for (const hf_buffer& buffer : list) pointers.push_back(buffer.data);
  }
  ~ManyBuffers() { library.hf_close(job); }
  hf_code Save(uint64_t step) {
    const hf_blob blob = {"rng", "0123", 4};
    hf_save_options options = {};
    options.struct_bytes = sizeof(options);
    options.pointers = pointers.data();
    options.blobs = &blob;
    options.blob_count = 1;
    return library.hf_save(job, step, &options, &error);
  }
  hf_code Wait() { return library.hf_wait_captured(job, HF_ALL_GROUPS, kPatienceNs, &error); }

  const Library& library;
  TestAgent agent;
  TestBuffers buffers;
  std::vector<void*> pointers;
  hf_job* job = nullptr;
  hf_error error = {};
  bool ok = false;
};

void ExpectNoAllocations(uint64_t device_bytes) {
  Library library;
  ManyBuffers many(library, kBuffers);
  ASSERT_TRUE(many.ok) << many.error.text;
  const auto count = [&](const std::function<hf_code()>& call) {
    allocation_count = 0;
    counting_allocations = true;
    const hf_code code = call();
    counting_allocations = false;
    EXPECT_EQ(code, HF_OK) << many.error.text;
    return allocation_count.load();
  };
  // The counter counts.
  EXPECT_GT(count([] {
              delete new std::string(1000, 'x');
              return HF_OK;
            }),
            0);
  for (uint64_t step = 1; step <= 5; ++step) {
    // The agent's thread would be counted too, when the doorbell wakes it: it is held.
    int allocations = -1;
    many.agent.Hold([&] {
      allocations = count([&] {
        const hf_code code = many.Save(step);
        return code == HF_OK ? many.Wait() : code;
      });
    });
    EXPECT_EQ(allocations, 0) << "save " << step;
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    EXPECT_EQ(library.hf_report(many.job, step, &report), HF_OK);
    EXPECT_EQ(report.device_bytes, device_bytes);
    many.agent.Grant(static_cast<uint32_t>(step - 1) % 2);
    many.agent.Grant(static_cast<uint32_t>(step) % 2);
  }
  // Nor does a save that fails.
  many.agent.shared().slots[0].state.store(abi::SlotState::kEmpty);
  many.agent.shared().slots[1].state.store(abi::SlotState::kEmpty);
  EXPECT_EQ(count([&] { return many.Save(6) == HF_RESOURCE_EXHAUSTED ? HF_OK : HF_INTERNAL; }), 0);
}

TEST(LibraryTest, SaveAndCaptureAllocateNothing) {
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "malloc is the sanitizer's";
#endif
  ExpectNoAllocations(0);
}

TEST(LibraryTest, SaveAndCaptureOfDeviceTensorsAllocateNothing) {
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "malloc is the sanitizer's";
#endif
  const NullDriver driver;
  ASSERT_NE(driver.handle, nullptr) << dlerror();
  ExpectNoAllocations(kBuffers * 16);
}

// Marks for the tracer: a harmless prctl with an option that does not exist.
constexpr int kMarkBegin = 0x48460001;
constexpr int kMarkEnd = 0x48460002;
constexpr uint64_t kTracedSaves = 5;

enum class Memory { kHost, kDevice };

[[noreturn]] void TracedChild(uint32_t buffers, Memory memory) {
  std::optional<NullDriver> driver;
  if (memory == Memory::kDevice && driver.emplace().handle == nullptr) _exit(6);
  Library library;
  auto* many = new ManyBuffers(library, buffers);
  if (!many->ok) _exit(3);
  if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(4);
  raise(SIGSTOP);
  for (uint64_t step = 1; step <= kTracedSaves; ++step) {
    prctl(kMarkBegin);
    const hf_code code = many->Save(step);
    prctl(kMarkEnd);
    if (code != HF_OK || many->Wait() != HF_OK) _exit(5);
    many->agent.Grant(0);
    many->agent.Grant(1);
  }
  _exit(0);
}

void ExpectAtMostTwoSystemCalls(uint32_t buffers, Memory memory) {
  SCOPED_TRACE(std::to_string(buffers) + " buffers" +
               (memory == Memory::kDevice ? " on a device" : ""));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) TracedChild(buffers, memory);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSTOPPED(status)) << "child ended with status " << status;
  ASSERT_EQ(ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL),
            0);
  bool inside = false;
  uint64_t saves = 0;
  int calls = 0;
  long signal = 0;
  for (;;) {
    ASSERT_EQ(ptrace(PTRACE_SYSCALL, child, nullptr, signal), 0);
    ASSERT_EQ(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) || WIFSIGNALED(status)) break;
    signal = 0;
    if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
      signal = WSTOPSIG(status);
      continue;
    }
    __ptrace_syscall_info info = {};
    ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof(info), &info);
    if (info.op != PTRACE_SYSCALL_INFO_ENTRY) continue;
    const bool mark = info.entry.nr == SYS_prctl;
    if (mark && info.entry.args[0] == kMarkBegin) {
      inside = true;
      calls = 0;
    } else if (mark && info.entry.args[0] == kMarkEnd) {
      inside = false;
      ++saves;
      EXPECT_LE(calls, 2) << "save " << saves;
      EXPECT_GE(calls, 1) << "the doorbell was not rung";
    } else if (inside) {
      ++calls;
    }
  }
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(saves, kTracedSaves);
}

TEST(LibraryTest, SaveMakesAtMostTwoSystemCalls) {
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "the sanitizer makes system calls of its own";
#endif
  for (const uint32_t buffers : {0u, 1u, kBuffers}) {
    ExpectAtMostTwoSystemCalls(buffers, Memory::kHost);
  }
  ExpectAtMostTwoSystemCalls(kBuffers, Memory::kDevice);
}

// ---- Forked children

bool MapsMention(const char* text) {
  std::ifstream maps("/proc/self/maps");
  std::stringstream all;
  all << maps.rdbuf();
  return all.str().find(text) != std::string::npos;
}

// What goes wrong in the child, or 0.
int CallEverything(const Library& library, hf_job* job) {
  hf_error error;
  hf_info info = {};
  info.struct_bytes = sizeof(info);
  hf_save_report report = {};
  report.struct_bytes = sizeof(report);
  const void* data = nullptr;
  uint64_t bytes = 0;
  if (library.hf_register(job, "{}", nullptr, 0, nullptr, 0, HF_FOREVER, &error) !=
      HF_FAILED_PRECONDITION) {
    return 10;
  }
  if (std::string(error.text).find("forked child") == std::string::npos) return 11;
  if (library.hf_due(job, 4) != 0) return 12;
  if (library.hf_save(job, 2, nullptr, &error) != HF_FAILED_PRECONDITION) return 13;
  if (library.hf_wait_captured(job, -1, HF_FOREVER, &error) != HF_FAILED_PRECONDITION) return 14;
  if (library.hf_wait_committed(job, 1, 1, HF_FOREVER, &error) != HF_FAILED_PRECONDITION) return 15;
  if (library.hf_restore(job, nullptr, HF_FOREVER, &error) != HF_FAILED_PRECONDITION) return 16;
  if (library.hf_restore_partial(job, nullptr, nullptr, HF_FOREVER, &error) !=
      HF_FAILED_PRECONDITION) {
    return 21;
  }
  if (library.hf_restored_blob(job, "a", -1, &data, &bytes, &error) != HF_FAILED_PRECONDITION) {
    return 17;
  }
  if (library.hf_get_info(job, &info) != HF_FAILED_PRECONDITION) return 18;
  if (library.hf_report(job, 1, &report) != HF_FAILED_PRECONDITION) return 19;
  library.hf_heartbeat(job, 1);
  library.hf_section_begin(job, "x");
  library.hf_section_end(job);
  library.hf_close(job);
  return 0;
}

TEST(LibraryTest, InAForkedChildEveryCallIsHarmless) {
  Library library;
  TestAgent agent;
  agent.SetDueEvery(4);
  TestPlan plan;
  plan.block_count = 1;
  agent.SetPlan([plan](const TestDocument&) { return plan; });
  const hf_open_options options = OpenOptions(agent);
  hf_job* job = nullptr;
  hf_error error;
  ASSERT_EQ(library.hf_open(&options, &job, &error), HF_OK) << error.text;
  ASSERT_EQ(library.hf_register(job, "{}", nullptr, 0, nullptr, 0, kPatienceNs, &error), HF_OK);
  ASSERT_EQ(library.hf_save(job, 1, nullptr, &error), HF_OK);
  ASSERT_EQ(library.hf_due(job, 4), 1);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const int wrong = CallEverything(library, job);
    if (wrong != 0) _exit(wrong);
    // A grandchild too.
    const pid_t grandchild = fork();
    if (grandchild == 0) _exit(CallEverything(library, job));
    int status = 0;
    waitpid(grandchild, &status, 0);
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 20);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  // The parent's job is as good as before.
  EXPECT_EQ(library.hf_wait_captured(job, -1, kPatienceNs, &error), HF_OK);
  EXPECT_EQ(library.hf_save(job, 2, nullptr, &error), HF_OK);
  library.hf_close(job);
  EXPECT_TRUE(agent.AwaitMessages(abi::MessageType::kClose, 1));
  EXPECT_EQ(agent.messages(abi::MessageType::kClose), 1);
}

TEST(LibraryTest, AForkedChildInheritsNoMappingAndMayOpenAJobOfItsOwn) {
#ifdef HOLDFAST_TEST_SANITIZED
  GTEST_SKIP() << "sanitizers start no threads in a forked child";
#endif
  Library library;
  TestAgent agent;
  const hf_open_options options = OpenOptions(agent);
  hf_job* job = nullptr;
  hf_error error;
  ASSERT_EQ(library.hf_open(&options, &job, &error), HF_OK) << error.text;
  ASSERT_EQ(library.hf_register(job, "{}", nullptr, 0, nullptr, 0, kPatienceNs, &error), HF_OK);
  const auto count_maps = [] {
    std::ifstream maps("/proc/self/maps");
    int count = 0;
    for (std::string line; std::getline(maps, line);) {
      count += line.find("memfd:holdfast-test") != std::string::npos ? 1 : 0;
    }
    return count;
  };
  // Page and registration memory twice: the agent's view, which this test does not protect, and
  // the library's.
  const int in_parent = count_maps();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (!MapsMention("memfd:holdfast-test") || count_maps() != in_parent / 2) _exit(1);
    hf_open_options own = options;
    hf_job* own_job = nullptr;
    TestAgent own_agent;
    own.socket = own_agent.socket_path().c_str();
    if (library.hf_open(&own, &own_job, &error) != HF_OK) _exit(2);
    library.hf_heartbeat(own_job, 5);
    if (own_agent.page().heartbeat_step.load() != 5) _exit(3);
    library.hf_close(own_job);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  library.hf_close(job);
}

TEST(LibraryTest, ThreadsOfTheLibraryTakeNoSignals) {
  Library library;
  TestAgent agent;
  const hf_open_options options = OpenOptions(agent);
  hf_job* job = nullptr;
  hf_error error;
  ASSERT_EQ(library.hf_open(&options, &job, &error), HF_OK) << error.text;
  int ours = 0;
  for (const char* name : {"holdfast-link", "holdfast-copy0"}) {
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
      const std::string task = entry.path().string();
      std::string comm;
      std::ifstream(task + "/comm") >> comm;
      if (comm != name) continue;
      ++ours;
      std::ifstream status(task + "/status");
      for (std::string line; std::getline(status, line);) {
        if (line.rfind("SigBlk:", 0) != 0) continue;
        // All but SIGKILL, SIGSTOP and the two that glibc keeps for itself.
        EXPECT_EQ(std::stoull(line.substr(8), nullptr, 16) | 0x1'8000'0000 | 0x4'0100,
                  0xffff'ffff'ffff'ffff)
            << name << " " << line;
      }
    }
  }
  EXPECT_EQ(ours, 2);
  library.hf_close(job);
}

}  // namespace
}  // namespace holdfast::hook
