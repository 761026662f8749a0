// That every byte has one writer is proved by format/layout_oracle_test.cc, for random layouts;
// here: that the load is even, and that it does not depend on anything but the layout.
#include "format/writer_assignment.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

std::vector<uint64_t> LoadsOf(const Layout& layout) {
  const WriterAssignment writers = WriterAssignment::Create(layout);
  std::vector<uint64_t> loads;
  for (uint32_t rank = 0; rank < layout.world_size(); ++rank) {
    const auto stored = writers.ForRank(Rank{rank}, {});
    EXPECT_TRUE(stored.ok()) << stored.status().ToString();
    uint64_t bytes = 0;
    for (const Segment& segment : stored->segments) {
      bytes += segment.piece.ElementCount() *
               ElementBytes(layout.tensor_states()[segment.piece.tensor_state].dtype);
    }
    loads.push_back(bytes);
  }
  return loads;
}

// No rank stores more than an even share, or than what it alone holds if that is more, and one
// grain for each set of holders that it is in.
void ExpectEven(const std::string& json, uint64_t sets_per_rank) {
  const auto layout = Layout::Parse(json);
  ASSERT_TRUE(layout.ok()) << layout.status().ToString();
  uint64_t distinct = 0;
  for (const TensorState& state : (*layout)->tensor_states()) distinct += state.Bytes();
  const uint64_t share = distinct / (*layout)->world_size();
  uint64_t alone_most = 0;
  uint64_t held = 0;
  for (const HolderLoad& load : (*layout)->HolderLoads()) {
    if (load.ranks.size() == 1) alone_most = std::max(alone_most, load.bytes);
    held += load.bytes;
  }
  EXPECT_EQ(held, distinct);
  const std::vector<uint64_t> loads = LoadsOf(**layout);
  EXPECT_LE(*std::max_element(loads.begin(), loads.end()),
            std::max(share, alone_most) + sets_per_rank * kWriterGrainBytes)
      << json;
  EXPECT_EQ(std::accumulate(loads.begin(), loads.end(), uint64_t{0}), distinct);
}

std::string Job(const std::string& mesh, const std::string& tensors,
                const std::string& packs = "[]") {
  return absl::StrCat(R"({"holdfast_layout":1,"mesh":)", mesh, R"(,"packs":)", packs,
                      R"(,"tensors":[)", tensors, "]}");
}
std::string Tensor(const std::string& name, const std::string& shape, const std::string& place) {
  return absl::StrCat(R"({"name":")", name, R"(","shape":)", shape,
                      R"(,"states":[{"state":"p","dtype":"float32","place":)", place, "}]}");
}

TEST(WriterAssignment, OneLargeReplicatedTensorIsSharedEvenly) {
  ExpectEven(Job(R"([{"axis":"dp","size":7}])", Tensor("w", "[1000003]", "[]")), 1);
}

TEST(WriterAssignment, ManySmallReplicatedTensorsAreSharedEvenly) {
  std::string tensors;
  for (int i = 0; i < 500; ++i) {
    absl::StrAppend(&tensors, i ? "," : "",
                    Tensor(absl::StrCat("t", i), absl::StrCat("[", 1 + i % 900, "]"), "[]"));
  }
  ExpectEven(Job(R"([{"axis":"dp","size":6}])", tensors), 1);
}

TEST(WriterAssignment, ShardedAndReplicatedTogetherAreSharedEvenly) {
  ExpectEven(
      Job(R"([{"axis":"dp","size":4},{"axis":"tp","size":3}])",
          absl::StrCat(
              Tensor("row", "[100,300]", R"([{"op":"shard","dim":1,"axis":"tp","rule":"even"}])"),
              ",", Tensor("norm", "[20000]", "[]"), ",",
              Tensor("opt", "[70001]", R"([{"op":"flat","axis":"dp","rule":"ceil"}])"))),
      3);
}

// Rank 0 alone holds much; what all hold goes to the others first.
TEST(WriterAssignment, ReplicatedBytesGoWhereLittleIsUnique) {
  ExpectEven(Job(R"([{"axis":"pp","size":4}])",
                 absl::StrCat(Tensor("embedding", "[100000]",
                                     R"([{"op":"place","axis":"pp","coordinates":[0]}])"),
                              ",", Tensor("shared", "[500000]", "[]"))),
             2);
}

TEST(WriterAssignment, AStageAndATiedTensorInTwoPacksAreSharedEvenly) {
  const std::string packed = R"({"op":"pack","pack":"m"}])";
  ExpectEven(Job(R"([{"axis":"pp","size":2},{"axis":"dp","size":3}])",
                 absl::StrCat(Tensor("a", "[90000]",
                                     R"([{"op":"place","axis":"pp","coordinates":[0]},)" + packed),
                              ",", Tensor("e", "[300000]", "[" + packed), ",",
                              Tensor("b", "[120000]",
                                     R"([{"op":"place","axis":"pp","coordinates":[1]},)" + packed)),
                 R"([{"pack":"m","axis":"dp","buffer":"m"}])"),
             4);
}

TEST(WriterAssignment, PiecesFollowGroupsThenTheDocument) {
  const auto layout =
      Layout::Parse(Job("[]", absl::StrCat(Tensor("a", "[3]", "[]"), ",", Tensor("b", "[3]", "[]"),
                                           ",", Tensor("c", "[3]", "[]"))));
  ASSERT_TRUE(layout.ok());
  const WriterAssignment writers = WriterAssignment::Create(**layout);
  const auto order = [&](std::vector<uint32_t> groups) {
    std::string names;
    const auto stored = writers.ForRank(Rank{0}, groups);
    for (const Segment& segment : stored->segments) {
      names += (*layout)->tensor_states()[segment.piece.tensor_state].tensor;
    }
    return names;
  };
  EXPECT_EQ(order({}), "abc");
  EXPECT_EQ(order({0, 0, 0}), "abc");
  EXPECT_EQ(order({2, 1, 2}), "bac");
  EXPECT_EQ(order({1, 1, 0}), "cab");
}

}  // namespace
}  // namespace holdfast
