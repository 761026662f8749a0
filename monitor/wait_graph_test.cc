#include "monitor/wait_graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace holdfast::monitor {
namespace {

using Matrix = std::vector<std::vector<bool>>;

Matrix Reachability(uint32_t nodes, const std::vector<WaitEdge>& edges) {
  Matrix reach(nodes, std::vector<bool>(nodes, false));
  for (const WaitEdge& edge : edges) reach[edge.waiter][edge.awaited] = true;
  for (uint32_t k = 0; k < nodes; ++k) {
    for (uint32_t i = 0; i < nodes; ++i) {
      for (uint32_t j = 0; j < nodes; ++j) {
        if (reach[i][k] && reach[k][j]) reach[i][j] = true;
      }
    }
  }
  return reach;
}

// The definitions, word by word, over the transitive closure.
void ExpectAsDefined(uint32_t nodes, uint32_t counted, const std::vector<WaitEdge>& edges) {
  const Matrix reach = Reachability(nodes, edges);
  std::vector<std::pair<uint32_t, uint32_t>> sinks;
  std::vector<std::vector<uint32_t>> deadlocks;
  for (uint32_t i = 0; i < nodes; ++i) {
    uint32_t waiters = 0;
    bool waits = false, leaves = false, awaited = false;
    std::vector<uint32_t> mutual;
    for (uint32_t j = 0; j < nodes; ++j) {
      if (j != i && j < counted && reach[j][i]) ++waiters;
      if (j != i && reach[j][i]) awaited = true;
      if (reach[i][j]) waits = true;
      if (reach[i][j] && !reach[j][i]) leaves = true;
      if (reach[i][j] && reach[j][i]) mutual.push_back(j);
    }
    if (!waits && awaited) sinks.emplace_back(i, waiters);
    if (mutual.size() > 1 && !leaves && mutual.front() == i) deadlocks.push_back(mutual);
  }
  const WaitRoots found = FindWaitRoots(nodes, counted, edges);
  std::vector<std::pair<uint32_t, uint32_t>> found_sinks;
  for (const auto& sink : found.sinks) found_sinks.emplace_back(sink.node, sink.waiters);
  ASSERT_EQ(found_sinks, sinks);
  ASSERT_EQ(found.deadlocks, deadlocks);
}

TEST(WaitGraphTest, EveryGraphOfUpToFourRanksIsAsDefined) {
  uint32_t graphs = 0;
  for (uint32_t nodes = 1; nodes <= 4; ++nodes) {
    std::vector<WaitEdge> all;
    for (uint32_t i = 0; i < nodes; ++i) {
      for (uint32_t j = 0; j < nodes; ++j) {
        if (i != j) all.push_back({i, j});
      }
    }
    for (uint32_t set = 0; set < uint32_t{1} << all.size(); ++set, ++graphs) {
      std::vector<WaitEdge> edges;
      for (size_t e = 0; e < all.size(); ++e) {
        if (set >> e & 1) edges.push_back(all[e]);
      }
      ASSERT_NO_FATAL_FAILURE(ExpectAsDefined(nodes, (nodes + set) % (nodes + 1), edges))
          << nodes << " ranks, set " << set;
    }
  }
  EXPECT_EQ(graphs, 1u + 4u + 64u + 4096u);
}

TEST(WaitGraphTest, RandomGraphsAreAsDefined) {
  constexpr uint32_t kSeed = 20240607;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  for (int round = 0; round < 3000; ++round) {
    const uint32_t nodes = 2 + random() % 12;
    std::vector<WaitEdge> edges;
    for (uint32_t e = random() % (2 * nodes); e > 0; --e) {
      const WaitEdge edge{static_cast<uint32_t>(random() % nodes),
                          static_cast<uint32_t>(random() % nodes)};
      if (edge.waiter != edge.awaited) edges.push_back(edge);
    }
    ASSERT_NO_FATAL_FAILURE(ExpectAsDefined(nodes, random() % (nodes + 1), edges))
        << "round " << round;
  }
}

TEST(WaitGraphTest, AChainOfAHundredThousandRanksHasOneSink) {
  constexpr uint32_t kNodes = 100'000;
  std::vector<WaitEdge> edges;
  for (uint32_t i = 0; i + 1 < kNodes; ++i) edges.push_back({i, i + 1});
  const WaitRoots roots = FindWaitRoots(kNodes, kNodes, edges);
  ASSERT_EQ(roots.sinks.size(), 1u);
  EXPECT_EQ(roots.sinks[0].node, kNodes - 1);
  EXPECT_EQ(roots.sinks[0].waiters, kNodes - 1);
  EXPECT_TRUE(roots.deadlocks.empty());
}

}  // namespace
}  // namespace holdfast::monitor
