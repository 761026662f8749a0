// Any plugin under the driver: this one, or the one that $HOLDFAST_DRIVE_PLUGIN names (NVIDIA's
// example, say), in every version that it exports, from two threads per rank and in two processes
// at once. It must take all that NCCL would call, and answer each call with success.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "hook/profiler/events_testing.h"
#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {
namespace {

std::string PluginPath() {
  const char* path = getenv("HOLDFAST_DRIVE_PLUGIN");
  return path == nullptr ? HOLDFAST_TEST_PLUGIN : path;
}

// Empty, with a failure that says why, if it cannot be loaded as NCCL loads it.
std::vector<int> ExportedVersions(const std::string& path) {
  std::vector<int> versions;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    ADD_FAILURE() << dlerror();
    return versions;
  }
  for (const int version : kVersions) {
    const std::string name = "ncclProfiler_v" + std::to_string(version);
    if (dlsym(library, name.c_str()) != nullptr) versions.push_back(version);
  }
  dlclose(library);
  return versions;
}

// Each rank has a thread for its program and one for its proxy.
size_t DriveWithThreads(const std::string& path, int version, uint64_t id) {
  constexpr int kOperations = 20;
  Library library(path, version);
  Job job(library, {.id = id, .ranks = 2});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&job, rank] {
      for (int i = 0; i < kOperations; ++i) job.rank(rank).Enqueue();
    });
    threads.emplace_back([&job, rank] {
      while (job.rank(rank).finished() < kOperations) {
        if (!job.rank(rank).Progress()) std::this_thread::yield();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  job.FinalizeAll();
  return job.rank(0).calls().size() + job.rank(1).calls().size();
}

TEST(DriveTest, APluginTakesWhatNcclCallsFromThreadsAndProcesses) {
  const std::string path = PluginPath();
  const std::vector<int> versions = ExportedVersions(path);
  EXPECT_FALSE(versions.empty()) << path << " exports none of ncclProfiler_v4 to v7";
  for (const int version : versions) {
    SCOPED_TRACE(version);
    int child_status = 0;
    // Forks while this process has one thread; then both are at work.
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      const size_t calls = DriveWithThreads(path, version, 2);
      _exit(testing::Test::HasFailure() || calls == 0 ? 1 : 0);
    }
    const size_t calls = DriveWithThreads(path, version, 1);
    EXPECT_GT(calls, 0u) << "it asks for no events";
    EXPECT_EQ(waitpid(child, &child_status, 0), child);
    EXPECT_EQ(child_status, 0);
    std::printf("%s, version %d: %zu calls\n", path.c_str(), version, calls);
  }
}

}  // namespace
}  // namespace holdfast::profiler
