// The vote itself: every way in which up to five copies can agree or not, many replicas and sets of
// holders at once against a slow oracle; and the sums that are taken when nobody has them. What is
// said of a difference: checkpoint/replicas_engine_test.cc.
#include "checkpoint/replica_vote.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "base/crc32c.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// One replica of elements [0, 8) of tensor state `tensor_state`.
HeldReplica Of(uint32_t tensor_state, uint32_t holders = 0) {
  return {{tensor_state, kWholeTensor, 0, 8}, holders, 0};
}

Fingerprint Sum(uint64_t value) { return Fingerprint(absl::MakeUint128(value, 77)); }

// The votes of `count` ranks that all hold one replica; votes[i] is what rank i holds.
std::vector<ReplicaDifference> VotesOf(const std::vector<uint64_t>& votes) {
  Replicas replicas;
  replicas.replicas = {Of(0)};
  replicas.holder_sets.emplace_back();
  for (uint32_t rank = 0; rank < votes.size(); ++rank) replicas.holder_sets[0].push_back(rank);
  std::vector<std::vector<Fingerprint>> sums;
  for (const uint64_t vote : votes) sums.push_back({Sum(vote)});
  std::vector<ReplicaBallot> ballots;
  for (const std::vector<Fingerprint>& sum : sums) ballots.push_back({replicas, sum});
  return CountVotes(ballots);
}

// By the definition, for every assignment of contents to copies.
TEST(CountVotes, EveryWayInWhichUpToFiveCopiesDiffer) {
  size_t with_majority = 0;
  size_t without = 0;
  for (uint32_t count = 2; count <= 5; ++count) {
    uint64_t combinations = 1;
    for (uint32_t i = 0; i < count; ++i) combinations *= count;
    for (uint64_t combination = 0; combination < combinations; ++combination) {
      std::vector<uint64_t> votes;
      for (uint64_t rest = combination; votes.size() < count; rest /= count) {
        votes.push_back(rest % count);
      }
      const std::vector<ReplicaDifference> found = VotesOf(votes);
      std::map<uint64_t, std::vector<uint32_t>> of_vote;
      for (uint32_t rank = 0; rank < count; ++rank) of_vote[votes[rank]].push_back(rank);
      SCOPED_TRACE(testing::PrintToString(votes));
      if (of_vote.size() == 1) {
        EXPECT_THAT(found, IsEmpty());
        continue;
      }
      ASSERT_EQ(found.size(), 1u);
      const ReplicaDifference& difference = found[0];
      EXPECT_THAT(difference.replica_of_party, testing::SizeIs(of_vote.size()));
      std::set<std::vector<uint32_t>> expected;
      size_t most = 0;
      for (const auto& [vote, ranks] : of_vote) {
        expected.insert(ranks);
        most = std::max(most, ranks.size());
      }
      EXPECT_EQ(std::set(difference.parties.begin(), difference.parties.end()), expected);
      EXPECT_TRUE(std::is_sorted(difference.parties.begin(), difference.parties.end(),
                                 [](const auto& a, const auto& b) {
                                   return a.size() != b.size() ? a.size() > b.size() : a < b;
                                 }));
      EXPECT_EQ(difference.has_majority, most > count - most);
      (difference.has_majority ? with_majority : without) += 1;
    }
  }
  printf("%zu votes with a majority, %zu without\n", with_majority, without);
  EXPECT_GT(with_majority, 900u);
  EXPECT_GT(without, 900u);
}

TEST(CountVotes, TwoCopiesNameNobody) {
  const std::vector<ReplicaDifference> found = VotesOf({1, 2});
  ASSERT_EQ(found.size(), 1u);
  EXPECT_FALSE(found[0].has_majority);
  EXPECT_THAT(found[0].parties, ElementsAre(ElementsAre(0), ElementsAre(1)));
}

TEST(CountVotes, NoRanksAndNoReplicasAgree) {
  EXPECT_THAT(CountVotes({}), IsEmpty());
  const Replicas none;
  const std::vector<ReplicaBallot> ballots = {{none, {}}, {none, {}}};
  EXPECT_THAT(CountVotes(ballots), IsEmpty());
}

// Six ranks, overlapping sets of holders numbered differently on every rank, and a random copy of a
// random replica changed: what is found is exactly that.
TEST(CountVotes, FindsExactlyTheReplicasThatDiffer) {
  const uint64_t seed = 4;
  printf("seed %lu\n", seed);
  std::mt19937_64 random(seed);
  constexpr uint32_t kRanks = 6;
  size_t differences = 0;
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE(round);
    // Document order: each replica with its holders.
    struct Made {
      uint32_t tensor_state;
      std::vector<uint32_t> holders;
      std::map<uint32_t, uint64_t> votes;
    };
    std::vector<std::vector<uint32_t>> sets;
    for (int i = 0; i < 4; ++i) {
      std::vector<uint32_t> ranks;
      for (uint32_t rank = 0; rank < kRanks; ++rank) {
        if (random() % 2 == 0) ranks.push_back(rank);
      }
      if (ranks.size() > 1) sets.push_back(ranks);
    }
    std::vector<Made> made;
    for (uint32_t i = 0; !sets.empty() && i < 12; ++i) {
      made.push_back({i / 2, sets[random() % sets.size()], {}});
      for (const uint32_t rank : made.back().holders) made.back().votes[rank] = i;
      if (random() % 3 == 0) {
        made.back().votes[made.back().holders[random() % made.back().holders.size()]] = 100 + i;
      }
    }
    std::vector<Replicas> replicas(kRanks);
    std::vector<std::vector<Fingerprint>> sums(kRanks);
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      replicas[rank].holder_sets = {{rank}};  // what it alone holds
      for (const Made& replica : made) {
        if (!replica.votes.contains(rank)) continue;
        std::vector<std::vector<uint32_t>>& known = replicas[rank].holder_sets;
        const auto at = std::find(known.begin(), known.end(), replica.holders);
        const auto number = static_cast<uint32_t>(at - known.begin());
        if (at == known.end()) known.push_back(replica.holders);
        replicas[rank].replicas.push_back(Of(replica.tensor_state, number));
        sums[rank].push_back(Sum(replica.votes.at(rank)));
      }
    }
    std::vector<ReplicaBallot> ballots;
    for (uint32_t rank = 0; rank < kRanks; ++rank) ballots.push_back({replicas[rank], sums[rank]});
    std::multiset<std::pair<uint32_t, std::vector<uint32_t>>> expected;  // tensor state, odd ranks
    for (uint32_t i = 0; i < made.size(); ++i) {
      std::vector<uint32_t> odd;
      for (const auto& [rank, vote] : made[i].votes) {
        if (vote != i) odd.push_back(rank);
      }
      if (!odd.empty()) expected.emplace(made[i].tensor_state, made[i].holders);
    }
    std::multiset<std::pair<uint32_t, std::vector<uint32_t>>> found;
    uint32_t last = 0;
    for (const ReplicaDifference& difference : CountVotes(ballots)) {
      ASSERT_EQ(difference.parties.size(), 2u);
      const uint32_t first = difference.parties[0][0];
      const HeldReplica& replica = replicas[first].replicas[difference.replica_of_party[0]];
      std::vector<uint32_t> all = difference.parties[0];
      all.insert(all.end(), difference.parties[1].begin(), difference.parties[1].end());
      std::sort(all.begin(), all.end());
      EXPECT_EQ(all, replicas[first].holder_sets[replica.holders]);
      EXPECT_EQ(difference.has_majority, all.size() > 2);
      EXPECT_GE(replica.piece.tensor_state, last);
      last = replica.piece.tensor_state;
      found.emplace(replica.piece.tensor_state, all);
      ++differences;
    }
    EXPECT_EQ(found, expected);
    if (testing::Test::HasFailure()) break;
  }
  EXPECT_GT(differences, 3000u);
}

// A slot with more of its own than of replicas: each of its blocks spoilt in turn.
TEST(TakeSums, ReadsTheBlocksThatHoldReplicasAndNoOthers) {
  constexpr size_t kBlockBytes = 4096;
  RegistrationOwner owner;
  owner.job = "job";
  owner.job_uuid = kTestUuid;
  owner.rank = Rank{1};
  owner.world_size = 2;
  owner.block_bytes = kBlockBytes;
  const std::string document = EncodeDocument(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":2}],"tensors":[
      {"name":"shared","shape":[5000],"states":[{"state":"s","dtype":"float32"}]},
      {"name":"own","shape":[2,5000],"states":[{"state":"s","dtype":"float64",
        "place":[{"op":"shard","dim":0,"axis":"dp","rule":"even"}]}]}]})",
      {{"s/shared", 20'000, 0}, {"s/own", 40'000, 0}}, {}, abi::Copies::kAll);
  ReplicaHolder holder;
  ASSERT_OK_AND_ASSIGN(holder.registration,
                       Registration::Build(document, owner, TestScratchDirectory()));
  std::vector<std::byte> slot(holder.registration->slot_bytes());
  std::mt19937_64 random(4);
  for (std::byte& byte : slot) byte = static_cast<std::byte>(random());
  for (size_t at = 0; at < slot.size(); at += kBlockBytes) {
    holder.blocks.push_back(std::span(slot).subspan(at, kBlockBytes));
    holder.block_crc32c.push_back(Crc32c(holder.blocks.back()));
  }
  // The oracle asks every block what of replicas is in it.
  const Replicas& replicas = holder.registration->replicas();
  std::vector<Fingerprint> expected(replicas.replicas.size());
  std::vector<bool> is_read;
  for (size_t block = 0; block < holder.blocks.size(); ++block) {
    std::vector<FingerprintPart> parts;
    holder.registration->replica_sums().AppendParts(block * kBlockBytes, holder.blocks[block],
                                                    parts);
    is_read.push_back(!parts.empty());
    for (const FingerprintPart& part : parts) {
      expected[replicas.replica_of_place[part.piece]] += part.sum;
    }
  }
  EXPECT_GE(std::count(is_read.begin(), is_read.end(), true), 5);
  EXPECT_GE(std::count(is_read.begin(), is_read.end(), false), 10);
  for (size_t block = 0; block < holder.blocks.size(); ++block) {
    SCOPED_TRACE(block);
    holder.sums.reset();
    slot[block * kBlockBytes] ^= std::byte{1};
    const absl::Status taken = TakeSums(Rank{1}, holder);
    slot[block * kBlockBytes] ^= std::byte{1};
    if (is_read[block]) {
      EXPECT_THAT(taken, StatusIs(absl::StatusCode::kAborted,
                                  testing::HasSubstr("what rank 1 captured has changed")));
      EXPECT_FALSE(holder.sums.has_value());
    } else {
      EXPECT_OK(taken);
      EXPECT_EQ(holder.sums, expected);
    }
  }
  // Known ones are not taken again.
  holder.sums = expected;
  slot.assign(slot.size(), std::byte{0});
  EXPECT_OK(TakeSums(Rank{1}, holder));
}

}  // namespace
}  // namespace holdfast
