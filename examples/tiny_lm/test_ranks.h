// For tests: ranks as threads of one process, each with a real context of its own.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_TEST_RANKS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_TEST_RANKS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "examples/collectives/collectives.h"
#include "examples/collectives/wire.h"
#include "gtest/gtest.h"

namespace tiny_lm {

// Runs `body` as every rank; returns when all have.
inline void RunRanks(
    uint32_t world_size,
    const std::function<void(collectives::Context& context, uint32_t rank)>& body) {
  collectives::Socket listener = *collectives::Listen({0x7f000001, 0});
  collectives::Options options;
  options.world_size = world_size;
  options.master_port = collectives::LocalEndpoint(listener)->port;
  options.token = "test";
  options.operation_timeout = absl::Seconds(120);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    options.rank = rank;
    options.master_listener_fd = rank == 0 ? listener.Release() : -1;
    threads.emplace_back([options, rank, &body] {
      const auto context = collectives::Context::Create(options);
      ASSERT_TRUE(context.ok()) << context.status();
      body(**context, rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Null if there would be one rank only.
inline std::unique_ptr<collectives::Communicator> Communicate(collectives::Context& context,
                                                              const std::string& name,
                                                              const std::vector<uint32_t>& ranks) {
  if (ranks.size() < 2) return nullptr;
  auto communicator = context.CreateCommunicator(name, ranks);
  EXPECT_TRUE(communicator.ok()) << communicator.status();
  return *std::move(communicator);
}

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_TEST_RANKS_H_
