// Explain() against an oracle that tries every set of causes, on every set of bad edges of small
// rings; FindOddOnes() by enumeration: every fault of a list, at every place, in jobs of 1 to 9
// nodes, with measurements that scatter as real ones do.
#include "preflight/odd.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "preflight/pairing.h"

namespace holdfast::preflight {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using Subject = Finding::Subject;
using Edges = std::vector<std::pair<size_t, size_t>>;

// ---- Explain ----

// A set of causes as bits: vertices first, then edges.
struct Smallest {
  int size = 0;
  std::vector<uint32_t> sets;
};

Smallest TryAllCauses(size_t vertex_count, const Edges& edges, uint32_t bad) {
  const size_t cause_count = vertex_count + edges.size();
  std::vector<uint32_t> explains(cause_count, 0);  // by cause: bits of edges
  for (size_t vertex = 0; vertex < vertex_count; ++vertex) {
    uint32_t own = 0;
    for (size_t edge = 0; edge < edges.size(); ++edge) {
      if (edges[edge].first == vertex || edges[edge].second == vertex) own |= 1U << edge;
    }
    // An end is a cause only if all of its pairs, two at least, are bad.
    if ((own & bad) == own && std::popcount(own) >= 2) explains[vertex] = own;
  }
  for (size_t edge = 0; edge < edges.size(); ++edge) {
    if ((bad >> edge & 1) != 0) explains[vertex_count + edge] = 1U << edge;
  }
  Smallest smallest{static_cast<int>(cause_count) + 1, {}};
  for (uint32_t set = 0; set < 1U << cause_count; ++set) {
    const int size = std::popcount(set);
    if (size > smallest.size) continue;
    uint32_t explained = 0;
    bool all_explain = true;
    for (size_t cause = 0; cause < cause_count; ++cause) {
      if ((set >> cause & 1) == 0) continue;
      all_explain = all_explain && explains[cause] != 0;
      explained |= explains[cause];
    }
    if (!all_explain || explained != bad) continue;
    if (size < smallest.size) smallest = {size, {}};
    smallest.sets.push_back(set);
  }
  return smallest;
}

// Goal: what Explain is sure of is in every smallest explanation and nothing else is; what it
// leaves undecided holds, in every one, at least one of the named vertices; and only vertices that
// are in one are named.
void ExpectExplainedAsByOracle(size_t vertex_count, const Edges& edges, uint32_t bad) {
  const std::vector<bool> flags = [&] {
    std::vector<bool> result;
    for (size_t edge = 0; edge < edges.size(); ++edge) result.push_back((bad >> edge & 1) != 0);
    return result;
  }();
  const Explanation explanation = Explain(vertex_count, edges, flags);
  const Smallest smallest = TryAllCauses(vertex_count, edges, bad);
  uint32_t in_all = ~0U;
  uint32_t in_any = 0;
  for (const uint32_t set : smallest.sets) {
    in_all &= set;
    in_any |= set;
  }
  uint32_t sure = 0;
  for (const size_t vertex : explanation.vertices) sure |= 1U << vertex;
  for (const size_t edge : explanation.edges) sure |= 1U << (vertex_count + edge);
  EXPECT_EQ(sure, bad == 0 ? 0 : in_all) << "bad edges " << bad;
  uint32_t named = sure;
  for (const Explanation::Undecided& undecided : explanation.undecided) {
    uint32_t vertices = 0;
    for (const size_t vertex : undecided.vertices) vertices |= 1U << vertex;
    named |= vertices;
    for (const uint32_t set : smallest.sets) EXPECT_NE(set & vertices, 0U) << "bad edges " << bad;
  }
  const uint32_t vertices_mask = (1U << vertex_count) - 1;
  EXPECT_EQ(named & vertices_mask, in_any & vertices_mask) << "bad edges " << bad;
}

TEST(ExplainTest, AgreesWithAnOracleOnEverySetOfBadEdgesOfARing) {
  for (size_t size = 3; size <= 7; ++size) {
    Edges edges;
    for (size_t at = 0; at < size; ++at) edges.emplace_back(at, (at + 1) % size);
    for (uint32_t bad = 0; bad < 1U << size; ++bad) {
      ExpectExplainedAsByOracle(size, edges, bad);
    }
  }
}

TEST(ExplainTest, AgreesWithAnOracleOnPathsOfWhichAPairIsMissing) {
  for (size_t size = 2; size <= 7; ++size) {
    Edges edges;
    for (size_t at = 0; at + 1 < size; ++at) edges.emplace_back(at, at + 1);
    for (uint32_t bad = 0; bad < 1U << edges.size(); ++bad) {
      ExpectExplainedAsByOracle(size, edges, bad);
    }
  }
}

// ---- FindOddOnes ----

// A healthy job whose values scatter by `scatter` (a factor is e to the power of so much at most).
JobMeasurements Healthy(uint32_t node_count, uint32_t seed, double scatter) {
  std::mt19937 random(seed);
  const auto about = [&](double value) {
    std::uniform_real_distribution<double> exponent(-scatter, scatter);
    return value * std::exp(exponent(random));
  };
  JobMeasurements job;
  for (uint32_t rank = 0; rank < node_count; ++rank) {
    NodeMeasurements node;
    node.host = "node-" + std::to_string(rank);
    node.values = {about(2e11), about(3e10), about(4e8), about(2e9), about(2e-4), about(5e9)};
    node.clock_offset_seconds = about(1e-3) - 1e-3;
    node.clock_offset_error_seconds = 2e-5;
    job.nodes.push_back(std::move(node));
  }
  const std::vector<std::vector<Pair>> rounds = RoundsOf(node_count);
  for (uint32_t round = 0; round < rounds.size(); ++round) {
    for (const Pair& pair : rounds[round]) {
      PairMeasurements measured;
      measured.a = pair.a;
      measured.b = pair.b;
      measured.round = round;
      measured.round_trip_seconds = about(4e-5);
      measured.round_trip_p99_seconds = about(1e-4);
      measured.one_way = {about(3e9), about(3e9)};
      measured.both_ways = {about(2.5e9), about(2.5e9)};
      job.pairs.push_back(measured);
    }
  }
  return job;
}

std::string Describe(const std::vector<Finding>& findings, const JobMeasurements& job) {
  std::string text;
  for (const Finding& finding : findings) text += Sentence(finding, job) + "\n";
  return text;
}

constexpr double kScatter = 0.05;
constexpr uint32_t kNodesMax = 9;

TEST(FindOddOnesTest, FindsNothingInHealthyJobs) {
  for (uint32_t node_count = 0; node_count <= 64; ++node_count) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const JobMeasurements job = Healthy(node_count, seed, kScatter);
      const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
      EXPECT_THAT(findings, IsEmpty()) << "seed " << seed << ": " << Describe(findings, job);
    }
  }
}

// Calls `spoil(job, rank)` for every rank of jobs of three nodes and more, and expects that exactly
// this rank is named, as a node, for `metric`.
template <typename Spoil>
void ExpectEveryNodeIsNamed(const std::string& metric, const Spoil& spoil) {
  for (uint32_t node_count = 3; node_count <= kNodesMax; ++node_count) {
    for (uint32_t rank = 0; rank < node_count; ++rank) {
      JobMeasurements job = Healthy(node_count, 100 * node_count + rank, kScatter);
      spoil(job, rank);
      const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
      ASSERT_THAT(findings, SizeIs(1))
          << metric << " of rank " << rank << " of " << node_count << ":\n"
          << Describe(findings, job);
      EXPECT_EQ(findings[0].subject, Subject::kNode);
      EXPECT_THAT(findings[0].ranks, ElementsAre(rank));
      std::vector<std::string> metrics;
      for (const Evidence& evidence : findings[0].evidence) metrics.push_back(evidence.metric);
      EXPECT_THAT(metrics, Contains(metric));
    }
  }
}

TEST(FindOddOnesTest, NamesANodeThatIsSlowByItself) {
  const std::vector<std::pair<NodeMetric, double>> faults = {
      {NodeMetric::kMemory, 0.6},    {NodeMetric::kCpu, 0.6},     {NodeMetric::kSlowestCore, 0.6},
      {NodeMetric::kDiskWrite, 0.3}, {NodeMetric::kDiskSync, 10}, {NodeMetric::kDiskRead, 0.3},
  };
  for (const auto& [metric, factor] : faults) {
    ExpectEveryNodeIsNamed(RuleOf(metric).name, [index = static_cast<size_t>(metric), by = factor](
                                                    JobMeasurements& job, uint32_t rank) {
      *job.nodes[rank].values[index] *= by;
    });
  }
}

TEST(FindOddOnesTest, NamesANodeWhoseDiskFailsOrWhoseClockIsWrongOrWasSet) {
  ExpectEveryNodeIsNamed("disk", [](JobMeasurements& job, uint32_t rank) {
    job.nodes[rank].disk_error = "the device refused";
    job.nodes[rank].values[static_cast<size_t>(NodeMetric::kDiskWrite)].reset();
  });
  for (const double offset : {-3600.0, -1.0, 1.0}) {
    ExpectEveryNodeIsNamed("clock_offset", [offset](JobMeasurements& job, uint32_t rank) {
      job.nodes[rank].clock_offset_seconds += offset;
    });
  }
  for (const double step : {-30.0, 0.5}) {
    ExpectEveryNodeIsNamed("clock_step", [step](JobMeasurements& job, uint32_t rank) {
      job.nodes[rank].clock_step_seconds = step;
    });
  }
}

// Multiplies what `rank` sends and receives by these.
void SlowDown(JobMeasurements& job, uint32_t rank, double sending, double receiving) {
  for (PairMeasurements& pair : job.pairs) {
    for (const size_t direction : {0, 1}) {
      const uint32_t sender = direction == 0 ? pair.a : pair.b;
      const uint32_t receiver = direction == 0 ? pair.b : pair.a;
      const double factor = (sender == rank ? sending : 1) * (receiver == rank ? receiving : 1);
      pair.one_way[direction] *= factor;
      pair.both_ways[direction] *= factor;
    }
  }
}

TEST(FindOddOnesTest, NamesANodeThatSendsOrReceivesSlowlyOrAnswersLate) {
  for (const double factor : {0.6, 0.1, 0.0}) {
    ExpectEveryNodeIsNamed("one_way", [factor](JobMeasurements& job, uint32_t rank) {
      SlowDown(job, rank, factor, 1);
    });
    ExpectEveryNodeIsNamed("both_ways", [factor](JobMeasurements& job, uint32_t rank) {
      SlowDown(job, rank, 1, factor);
    });
    ExpectEveryNodeIsNamed("one_way", [factor](JobMeasurements& job, uint32_t rank) {
      SlowDown(job, rank, factor, factor);
    });
  }
  ExpectEveryNodeIsNamed("round_trip", [](JobMeasurements& job, uint32_t rank) {
    for (PairMeasurements& pair : job.pairs) {
      if (pair.a == rank || pair.b == rank) pair.round_trip_seconds *= 10;
    }
  });
  ExpectEveryNodeIsNamed("round_trip_p99", [](JobMeasurements& job, uint32_t rank) {
    for (PairMeasurements& pair : job.pairs) {
      if (pair.a == rank || pair.b == rank) pair.round_trip_p99_seconds = 0.2;
    }
  });
}

TEST(FindOddOnesTest, NamesANodeThatNobodyReaches) {
  ExpectEveryNodeIsNamed("connection", [](JobMeasurements& job, uint32_t rank) {
    for (PairMeasurements& pair : job.pairs) {
      if (pair.a == rank || pair.b == rank) pair.error = "no answer";
    }
  });
}

TEST(FindOddOnesTest, NamesAPairThatIsSlowOrBroken) {
  for (uint32_t node_count = 3; node_count <= kNodesMax; ++node_count) {
    const size_t pair_count = Healthy(node_count, 0, kScatter).pairs.size();
    for (size_t at = 0; at < pair_count; ++at) {
      for (const int fault : {0, 1, 2, 3, 4}) {
        JobMeasurements job = Healthy(node_count, static_cast<uint32_t>(at), kScatter);
        PairMeasurements& pair = job.pairs[at];
        if (fault == 0 || fault == 2) pair.one_way[0] *= 0.2;
        if (fault == 1 || fault == 2) pair.one_way[1] *= 0.2;
        if (fault == 3) pair.round_trip_seconds *= 10;
        if (fault == 4) pair.error = "no route to host";
        const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
        ASSERT_THAT(findings, SizeIs(1))
            << "fault " << fault << " of pair " << at << " of " << node_count << ":\n"
            << Describe(findings, job);
        EXPECT_EQ(findings[0].subject, Subject::kPair);
        EXPECT_THAT(findings[0].ranks, ElementsAre(pair.a, pair.b));
      }
    }
  }
}

TEST(FindOddOnesTest, NamesTwoBadNodesWhereverTheyAre) {
  for (uint32_t node_count = 5; node_count <= kNodesMax; ++node_count) {
    for (uint32_t first = 0; first < node_count; ++first) {
      for (uint32_t second = first + 1; second < node_count; ++second) {
        JobMeasurements job = Healthy(node_count, first, kScatter);
        SlowDown(job, first, 0.2, 1);
        SlowDown(job, second, 0.2, 1);
        std::set<uint32_t> named;
        const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
        for (const Finding& finding : findings) {
          EXPECT_EQ(finding.subject, Subject::kNode) << Describe(findings, job);
          named.insert(finding.ranks.begin(), finding.ranks.end());
        }
        EXPECT_THAT(named, ElementsAre(first, second)) << node_count << ":\n"
                                                       << Describe(findings, job);
      }
    }
  }
}

// One sends slowly, its partner's partner receives slowly: three bad directions in a row, which one
// bad node and a bad pair explain as well.
TEST(FindOddOnesTest, SaysWhereBlameCannotBeToldApart) {
  for (uint32_t node_count = 4; node_count <= kNodesMax; ++node_count) {
    for (uint32_t rank = 0; rank < node_count; ++rank) {
      JobMeasurements job = Healthy(node_count, rank, kScatter);
      const uint32_t partner = (rank + 1) % node_count;
      SlowDown(job, rank, 0.2, 1);
      SlowDown(job, partner, 1, 0.2);
      const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
      ASSERT_THAT(findings, SizeIs(1)) << Describe(findings, job);
      EXPECT_EQ(findings[0].subject, Subject::kUndecided);
      EXPECT_THAT(findings[0].ranks, ElementsAre(std::min(rank, partner), std::max(rank, partner)));
      EXPECT_THAT(Sentence(findings[0], job), HasSubstr("at least one of"));
    }
  }
}

TEST(FindOddOnesTest, WithTwoNodesNobodyIsBlamed) {
  std::vector<JobMeasurements> jobs;
  for (size_t metric = 0; metric < kNodeMetricCount; ++metric) {
    JobMeasurements job = Healthy(2, 1, kScatter);
    *job.nodes[1].values[metric] *= metric == static_cast<size_t>(NodeMetric::kDiskSync) ? 10 : 0.1;
    jobs.push_back(std::move(job));
  }
  for (const int fault : {0, 1, 2, 3}) {
    JobMeasurements job = Healthy(2, 1, kScatter);
    if (fault == 0) job.pairs[0].one_way[0] *= 0.1;
    if (fault == 1) job.pairs[0].both_ways[1] *= 0.1;
    if (fault == 2) job.pairs[0].error = "refused";
    if (fault == 3) job.nodes[0].clock_offset_seconds = 10;
    jobs.push_back(std::move(job));
  }
  for (const JobMeasurements& job : jobs) {
    const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
    ASSERT_THAT(findings, SizeIs(1));
    EXPECT_EQ(findings[0].subject, Subject::kUndecided);
    EXPECT_THAT(findings[0].ranks, ElementsAre(0, 1));
    EXPECT_THAT(Sentence(findings[0], job), HasSubstr("with two nodes"));
  }
}

TEST(FindOddOnesTest, OfTwoNodesOneMayStillBeOddByItself) {
  JobMeasurements job = Healthy(2, 1, kScatter);
  job.nodes[1].clock_step_seconds = -5;
  job.nodes[0].disk_error = "read-only";
  const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
  ASSERT_THAT(findings, SizeIs(2));
  EXPECT_EQ(findings[0].subject, Subject::kNode);
  EXPECT_THAT(findings[0].ranks, ElementsAre(0));
  EXPECT_THAT(findings[1].ranks, ElementsAre(1));
}

// A fast node does not make its pairs fast: the slower end decides. Two that are near each other
// have a fast pair; of three nodes the third is then odd indeed.
TEST(FindOddOnesTest, FasterIsNotOdd) {
  for (uint32_t node_count = 4; node_count <= kNodesMax; ++node_count) {
    for (uint32_t rank = 0; rank < node_count; ++rank) {
      JobMeasurements job = Healthy(node_count, rank, kScatter);
      for (size_t metric = 0; metric < kNodeMetricCount; ++metric) {
        *job.nodes[rank].values[metric] *=
            metric == static_cast<size_t>(NodeMetric::kDiskSync) ? 0.01 : 100;
      }
      PairMeasurements& pair = job.pairs[rank];
      pair.one_way = pair.both_ways = {1e12, 1e12};
      pair.round_trip_seconds = pair.round_trip_p99_seconds = 1e-6;
      const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
      EXPECT_THAT(findings, IsEmpty()) << node_count << ":\n" << Describe(findings, job);
    }
  }
}

TEST(FindOddOnesTest, ARatioBelowTheAskedOneIsNotOddNorADifferenceThatNobodyNotices) {
  JobMeasurements job = Healthy(6, 3, kScatter);
  *job.nodes[2].values[static_cast<size_t>(NodeMetric::kMemory)] *= 0.5;
  EXPECT_THAT(FindOddOnes(job, kSlowRatio), SizeIs(1));
  EXPECT_THAT(FindOddOnes(job, 3), IsEmpty());
  job = Healthy(6, 3, kScatter);
  job.pairs[1].round_trip_seconds = 8e-5;  // twice the others', and 40 us more
  EXPECT_THAT(FindOddOnes(job, kSlowRatio), IsEmpty());
  job.pairs[1].round_trip_seconds = 1.5e-4;
  EXPECT_THAT(FindOddOnes(job, kSlowRatio), SizeIs(1));
}

TEST(FindOddOnesTest, AJobThatScattersWidelyHasNoOddNodeWithinTheScatter) {
  JobMeasurements job = Healthy(9, 5, 0);
  for (uint32_t rank = 0; rank < 9; ++rank) {
    // 100, 88, 76 ... of something: no node is far from its neighbours.
    *job.nodes[rank].values[0] *= 1 - 0.06 * rank;
  }
  EXPECT_THAT(FindOddOnes(job, kSlowRatio), IsEmpty());
}

// Goal: one sentence names everything that is wrong with a node.
TEST(FindOddOnesTest, ANodeIsNamedOnceWithAllEvidence) {
  JobMeasurements job = Healthy(6, 7, kScatter);
  SlowDown(job, 4, 0.1, 0.1);
  *job.nodes[4].values[static_cast<size_t>(NodeMetric::kCpu)] *= 0.3;
  // Only one of its two pairs is late: that is the node's doing too.
  job.pairs[2].round_trip_seconds = 1e-3;
  ASSERT_EQ(job.pairs[2].a, 4U);
  const std::vector<Finding> findings = FindOddOnes(job, kSlowRatio);
  ASSERT_THAT(findings, SizeIs(1)) << Describe(findings, job);
  EXPECT_THAT(findings[0].ranks, ElementsAre(4));
  const std::string sentence = Sentence(findings[0], job);
  for (const char* part : {"rank 4 (node-4) is odd", "CPU", "one way", "both ways", "round trip"}) {
    EXPECT_THAT(sentence, HasSubstr(part));
  }
}

TEST(ValueTextTest, HasUnits) {
  EXPECT_EQ(ValueText(Unit::kBytesPerSecond, 12.5e9), "12.50 GB/s");
  EXPECT_EQ(ValueText(Unit::kBytesPerSecond, 2e6), "2.00 MB/s");
  EXPECT_EQ(ValueText(Unit::kStepsPerSecond, 438e6), "438 M/s");
  EXPECT_EQ(ValueText(Unit::kSeconds, 14.6e-6), "14.6 us");
  EXPECT_EQ(ValueText(Unit::kSeconds, 0.2), "200.00 ms");
}

}  // namespace
}  // namespace holdfast::preflight
