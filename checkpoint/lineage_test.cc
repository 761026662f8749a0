#include "checkpoint/lineage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <random>
#include <set>
#include <vector>

namespace holdfast {
namespace {

using testing::ElementsAre;
using Outcome = Lineage::Outcome;

CheckpointId Id(uint32_t attempt, uint64_t step) { return {Attempt{attempt}, Step{step}}; }

LineageNode Node(CheckpointId id, std::optional<CheckpointId> parent) {
  return {.id = id, .parent = parent};
}

std::optional<CheckpointId> NewestOf(const std::vector<LineageNode>& nodes,
                                     const Lineage& lineage) {
  return lineage.newest.has_value() ? std::optional(nodes[*lineage.newest].id) : std::nullopt;
}

TEST(Lineage, OfNothingIsNothing) {
  const Lineage lineage = FindLineage({}, std::nullopt);
  EXPECT_EQ(lineage.outcome, Outcome::kNone);
  EXPECT_FALSE(lineage.newest.has_value());
}

TEST(Lineage, TheGreatestAttemptAndStepIsTheNewestAndItsAncestorsAreTheBranch) {
  // Attempt 2 went on from step 10; step 20 of attempt 1 was left behind.
  const std::vector<LineageNode> nodes = {Node(Id(2, 15), Id(1, 10)), Node(Id(1, 10), std::nullopt),
                                          Node(Id(1, 20), Id(1, 10))};
  const Lineage lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(lineage.outcome, Outcome::kFound);
  EXPECT_EQ(NewestOf(nodes, lineage), Id(2, 15));
  EXPECT_THAT(lineage.branch, ElementsAre(Branch::kCurrent, Branch::kCurrent, Branch::kAbandoned));
}

TEST(Lineage, AnAttemptsCheckpointsAreALineWhateverTheirParentsSay) {
  // Step 10 was visible although its save had failed, so step 20 does not name it.
  const std::vector<LineageNode> nodes = {Node(Id(1, 10), std::nullopt),
                                          Node(Id(1, 20), std::nullopt)};
  EXPECT_THAT(FindLineage(nodes, std::nullopt).branch,
              ElementsAre(Branch::kCurrent, Branch::kCurrent));
}

TEST(Lineage, ADamagedNewestIsNotPassedOver) {
  std::vector<LineageNode> nodes = {Node(Id(1, 10), std::nullopt), Node(Id(1, 20), Id(1, 10))};
  nodes[1].damaged = true;
  nodes[1].parent.reset();
  const Lineage lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(lineage.outcome, Outcome::kDamaged);
  EXPECT_EQ(NewestOf(nodes, lineage), Id(1, 20));
  EXPECT_THAT(lineage.branch, ElementsAre(Branch::kCurrent, Branch::kCurrent));
}

TEST(Lineage, AMarkedOneIsPassedOverForTheNextOfItsBranch) {
  std::vector<LineageNode> nodes = {Node(Id(1, 10), std::nullopt), Node(Id(1, 30), Id(1, 10)),
                                    Node(Id(2, 20), Id(1, 10))};
  nodes[2].marked_bad = true;
  Lineage lineage = FindLineage(nodes, std::nullopt);
  // Not step 30 of attempt 1, which attempt 2 had left behind.
  EXPECT_EQ(NewestOf(nodes, lineage), Id(1, 10));
  nodes[0].marked_bad = true;
  lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(lineage.outcome, Outcome::kAllBad);
  EXPECT_FALSE(lineage.newest.has_value());
}

TEST(Lineage, AMissingParentLeavesWhatIsOlderUnknown) {
  std::vector<LineageNode> nodes = {Node(Id(1, 10), std::nullopt), Node(Id(3, 40), Id(2, 30))};
  Lineage lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(NewestOf(nodes, lineage), Id(3, 40));
  EXPECT_THAT(lineage.branch, ElementsAre(Branch::kUnknown, Branch::kCurrent));
  // Marked bad, nothing may be chosen: it might have been abandoned.
  nodes[1].marked_bad = true;
  lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(lineage.outcome, Outcome::kUnknown);
  // The missing one's attempt is known: its line goes on.
  nodes.push_back(Node(Id(2, 20), Id(1, 10)));
  lineage = FindLineage(nodes, std::nullopt);
  EXPECT_EQ(NewestOf(nodes, lineage), Id(2, 20));
  EXPECT_THAT(lineage.branch, ElementsAre(Branch::kCurrent, Branch::kCurrent, Branch::kCurrent));
}

TEST(Lineage, AParentThatIsNotOlderIsNoParent) {
  const std::vector<LineageNode> nodes = {Node(Id(1, 10), Id(1, 10)), Node(Id(1, 20), Id(5, 1))};
  EXPECT_EQ(NewestOf(nodes, FindLineage(nodes, std::nullopt)), Id(1, 20));
}

Head MakeHead(std::optional<CheckpointId> to, uint32_t up_to) {
  Head head;
  head.number = 1;
  head.to = to;
  head.abandons_attempts_up_to = Attempt{up_to};
  return head;
}

TEST(Lineage, AHeadStartsTheBranchAnew) {
  std::vector<LineageNode> nodes = {Node(Id(1, 10), std::nullopt), Node(Id(1, 20), Id(1, 10)),
                                    Node(Id(2, 30), Id(1, 20))};
  const Head head = MakeHead(Id(1, 10), 2);
  Lineage lineage = FindLineage(nodes, head);
  EXPECT_EQ(NewestOf(nodes, lineage), Id(1, 10));
  EXPECT_THAT(lineage.branch,
              ElementsAre(Branch::kCurrent, Branch::kAbandoned, Branch::kAbandoned));
  // The next attempt goes on from it.
  nodes.push_back(Node(Id(3, 15), Id(1, 10)));
  EXPECT_EQ(NewestOf(nodes, FindLineage(nodes, head)), Id(3, 15));
  // One whose manifest cannot be read counts, because it may.
  nodes.push_back(Node(Id(4, 25), std::nullopt));
  nodes.back().damaged = true;
  lineage = FindLineage(nodes, head);
  EXPECT_EQ(lineage.outcome, Outcome::kDamaged);
}

TEST(Lineage, AHeadWhoseTargetIsGoneIsNoLicenceToBeginFromNothing) {
  const std::vector<LineageNode> nodes = {Node(Id(1, 20), Id(1, 10))};
  EXPECT_EQ(FindLineage(nodes, MakeHead(Id(1, 10), 1)).outcome, Outcome::kUnknown);
  EXPECT_EQ(FindLineage(nodes, MakeHead(std::nullopt, 1)).outcome, Outcome::kNone);
}

// Random histories, told by somebody who was there: attempts begin at a checkpoint of the current
// branch or at none, and commit some steps.
TEST(Lineage, AgreesWithTheHistory) {
  const uint64_t seed = 20'240'117;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  for (int history = 0; history < 2000; ++history) {
    std::vector<LineageNode> nodes;
    std::vector<CheckpointId> branch;  // oldest first
    const uint32_t attempts = 1 + random() % 6;
    for (uint32_t attempt = 1; attempt <= attempts; ++attempt) {
      // Where it starts: the newest; or, with a reason that is not told, an older one.
      if (!branch.empty() && random() % 3 == 0) branch.resize(random() % (branch.size() + 1));
      const uint64_t first = branch.empty() ? 0 : Value(branch.back().step);
      const size_t commits = random() % 4;
      for (size_t i = 0; i < commits; ++i) {
        const CheckpointId id = Id(attempt, first + i + 1);
        nodes.push_back(Node(id, branch.empty() ? std::nullopt : std::optional(branch.back())));
        branch.push_back(id);
      }
      if (commits == 0 && !nodes.empty()) {
        // It left nothing: what it went on from is forgotten, the newest is the greatest again.
        const auto greatest = std::max_element(
            nodes.begin(), nodes.end(),
            [](const LineageNode& a, const LineageNode& b) { return a.id < b.id; });
        branch.clear();
        for (std::optional<CheckpointId> at = greatest->id; at.has_value();) {
          branch.insert(branch.begin(), *at);
          at = std::find_if(nodes.begin(), nodes.end(), [&](const LineageNode& node) {
                 return node.id == *at;
               })->parent;
        }
      }
    }
    std::shuffle(nodes.begin(), nodes.end(), random);
    const Lineage lineage = FindLineage(nodes, std::nullopt);
    ASSERT_EQ(NewestOf(nodes, lineage),
              branch.empty() ? std::nullopt : std::optional(branch.back()));
    const std::set<CheckpointId> expected(branch.begin(), branch.end());
    for (size_t i = 0; i < nodes.size(); ++i) {
      ASSERT_EQ(lineage.branch[i] == Branch::kCurrent, expected.contains(nodes[i].id));
    }
  }
}

}  // namespace
}  // namespace holdfast
