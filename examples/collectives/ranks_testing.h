// Ranks for tests: as threads with a Context each, or as processes.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_RANKS_TESTING_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_RANKS_TESTING_H_

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "examples/collectives/collectives.h"
#include "examples/collectives/wire.h"
#include "gtest/gtest.h"

namespace collectives {

struct World {
  explicit World(uint32_t size) {
    listener = *Listen({0x7f000001, 0});
    options.world_size = size;
    options.master_port = LocalEndpoint(listener)->port;
    options.chunk_bytes = 64;
    options.token = "test";
    options.rendezvous_timeout = absl::Seconds(120);
    options.operation_timeout = absl::Seconds(120);
  }
  Options ForRank(uint32_t rank) {
    Options result = options;
    result.rank = rank;
    if (rank == 0) result.master_listener_fd = listener.Release();
    return result;
  }
  Socket listener;
  Options options;
};

// Runs `body` as every rank, each in a thread.
inline void RunRanks(World& world, const std::function<void(Context&, uint32_t rank)>& body) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < world.options.world_size; ++rank) {
    threads.emplace_back([&, options = world.ForRank(rank), rank] {
      absl::StatusOr<std::unique_ptr<Context>> context = Context::Create(options);
      ASSERT_TRUE(context.ok()) << context.status();
      body(**context, rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// What rank `rank` holds at `index` before an operation. Small integers: exact as floats too.
template <typename Element>
Element Value(size_t rank, size_t index) {
  return static_cast<Element>((rank + 1) * (index % 251 + 1));
}
template <typename Element>
std::vector<Element> Filled(size_t rank, size_t count) {
  std::vector<Element> data(count);
  for (size_t i = 0; i < count; ++i) data[i] = Value<Element>(rank, i);
  return data;
}
template <typename Element>
std::vector<Element> Sum(size_t ranks, size_t count) {
  std::vector<Element> data(count, 0);
  for (size_t rank = 0; rank < ranks; ++rank) {
    for (size_t i = 0; i < count; ++i) data[i] += Value<Element>(rank, i);
  }
  return data;
}

// Ranks as processes; each may write lines into a pipe.
struct Children {
  std::vector<pid_t> pids;
  std::vector<int> reports;

  ~Children() {
    for (const pid_t pid : pids) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
    for (const int fd : reports) close(fd);
  }
  // Blocks until the child has written a line, or has ended.
  std::string ReadLine(size_t rank) const {
    std::string line;
    char c = 0;
    while (read(reports[rank], &c, 1) == 1 && c != '\n') line += c;
    return line;
  }
};

inline void Report(int fd, const std::string& text) {
  const std::string line = text + "\n";
  ASSERT_EQ(write(fd, line.data(), line.size()), static_cast<ssize_t>(line.size()));
}

inline void Fork(World& world, Children& children,
                 const std::function<void(const Options&, int report)>& body) {
  for (uint32_t rank = 0; rank < world.options.world_size; ++rank) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    const pid_t pid = fork();
    if (pid == 0) {
      body(world.ForRank(rank), ends[1]);
      _exit(0);
    }
    close(ends[1]);
    children.pids.push_back(pid);
    children.reports.push_back(ends[0]);
  }
  world.listener.Close();
}

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_RANKS_TESTING_H_
