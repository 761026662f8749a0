// Short documents that ask for huge things: each is refused by the limit that it passes, or
// lowered; either way within the memory and the time that a document may cost.
#include "format/layout_cost.h"

#include <cstdio>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "format/layout.h"
#include "format/writer_assignment.h"
#include "tests/support/allocation_meter.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

constexpr uint64_t kMillion = uint64_t{1} << 20;
// What a document may cost: docs/PROMISES.md.
constexpr size_t kCostBytesMax = size_t{512} << 20;
constexpr size_t kCostPerByteMax = 128;

std::string Mesh(const std::vector<std::pair<std::string, uint64_t>>& axes) {
  return absl::StrCat("[",
                      absl::StrJoin(axes, ",",
                                    [](std::string* out, const auto& axis) {
                                      absl::StrAppendFormat(out, R"({"axis":"%s","size":%d})",
                                                            axis.first, axis.second);
                                    }),
                      "]");
}

// Tensors t0, t1, ... of one state each.
struct Tensor {
  std::string shape;
  std::string dtype;
  std::string rest;  // of the state: `,"place":[...]`
};
std::string Document(const std::string& mesh, const std::vector<Tensor>& tensors,
                     const std::string& more = "") {
  std::string text = absl::StrCat(R"({"holdfast_layout":1,"mesh":)", mesh, more, R"(,"tensors":[)");
  for (size_t i = 0; i < tensors.size(); ++i) {
    absl::StrAppendFormat(&text,
                          R"(%s{"name":"t%d","shape":%s,"states":[{"state":"s","dtype":"%s"%s}]})",
                          i ? "," : "", i, tensors[i].shape, tensors[i].dtype, tensors[i].rest);
  }
  return text + "]}";
}

std::string Shard(int dim, const std::string& axis, const std::string& rule = "\"ceil\"") {
  return absl::StrFormat(R"({"op":"shard","dim":%d,"axis":%s,"rule":%s})", dim, axis, rule);
}

std::string Place(const std::vector<std::string>& ops) {
  return absl::StrCat(R"(,"place":[)", absl::StrJoin(ops, ","), "]");
}

struct Case {
  std::string name;
  std::string document;
  std::string refusal;  // of Parse; empty: it is accepted
};

Case EveryRankHasItsPart() {
  return {"a part for each of a million ranks",
          Document(Mesh({{"dp", kMillion}}),
                   {{"[1048576]", "int8", Place({Shard(0, "\"dp\"")})}, {"[7]", "int8", ""}}),
          ""};
}

Case ListedSizes() {
  const size_t count = size_t{1} << 18;
  const std::string sizes =
      absl::StrCat("\"sizes\",\"sizes\":[", absl::StrJoin(std::vector<int>(count, 1), ","), "]");
  return {
      "one size for each of 262,144 ranks",
      Document(Mesh({{"dp", count}}), {{"[262144]", "int8", Place({Shard(0, "\"dp\"", sizes)})}}),
      ""};
}

Case ManyShapes() {
  std::vector<Tensor> tensors;
  for (int i = 1; i <= 100; ++i) {
    tensors.push_back({absl::StrFormat("[%d]", i), "int8", Place({Shard(0, "\"dp\"")})});
  }
  return {"many shapes over a million ranks", Document(Mesh({{"dp", kMillion}}), tensors),
          "operations on local tensors of all ranks"};
}

Case ManyHolderSets() {
  std::vector<std::pair<std::string, uint64_t>> axes;
  for (int i = 0; i < 16; ++i) axes.emplace_back(absl::StrCat("a", i), i < 12 ? 2 : 4);
  std::vector<Tensor> tensors;
  for (int a = 0; a < 12; ++a) {
    for (int b = 0; b < a; ++b) {
      tensors.push_back(
          {"[4]", "int8", Place({Shard(0, absl::StrFormat(R"(["a%d","a%d"])", a, b))})});
    }
  }
  return {"other holders for each pair of axes", Document(Mesh(axes), tensors),
          "ranks in sets of ranks that hold the same"};
}

Case ViewThatSaturates() {
  return {"a view of 2^60 of 2^61 elements",
          Document("[]", {{"[2305843009213693952]", "uint8",
                           Place({R"({"op":"view","shape":[1152921504606846976]})"})}}),
          "expected 1152921504606846976 elements"};
}

Case PaddedPack() {
  const std::string place =
      Place({R"({"op":"pad","dim":0,"size":576460752303423488})", R"({"op":"pack","pack":"p"})"});
  return {"a pack of 40 tensors of 2^59 places",
          Document(Mesh({{"dp", 2}}), std::vector<Tensor>(40, {"[1]", "uint8", place}),
                   R"(,"packs":[{"pack":"p","axis":"dp","buffer":"p"}])"),
          "at most 2^62 bytes in pack"};
}

// The tensors of 1024 stages are of 1024 sizes, so the common one behind them is cut at other
// elements by each.
Case PackCutEverywhere() {
  std::vector<uint64_t> sizes;
  uint64_t sum = 0;
  for (uint64_t i = 1; i <= 1024; ++i) {
    sizes.push_back(i);
    sum += i;
  }
  const std::string rule = absl::StrCat("\"sizes\",\"sizes\":[", absl::StrJoin(sizes, ","), "]");
  const std::string pack = R"({"op":"pack","pack":"p"})";
  return {"a pack that 1024 x 1024 ranks cut at other elements",
          Document(Mesh({{"pp", 1024}, {"dp", 1024}}),
                   {{absl::StrFormat("[%d]", sum), "int8", Place({Shard(0, "\"pp\"", rule), pack})},
                    {"[1000000007]", "int8", Place({pack})}},
                   R"(,"packs":[{"pack":"p","axis":"dp","buffer":"p"}])"),
          "ranks that hold a part of a pack"};
}

Case PackOfAMillionStages() {
  return {
      "40 packed tensors on a million stages",
      Document(Mesh({{"pp", kMillion}}),
               std::vector<Tensor>(
                   40, {"[5]", "int8", Place({Shard(0, "\"pp\""), R"({"op":"pack","pack":"p"})"})}),
               R"(,"packs":[{"pack":"p","axis":[],"buffer":"p"}])"),
      "tensors in packs"};
}

// Finding the padding in a part of a tensor of 30 dimensions looks at hundreds of boxes.
Case PackOfManyDimensions() {
  const std::string place =
      Place({absl::StrCat(R"({"op":"perm","dims":[)",
                          absl::StrJoin(std::vector<int>({1,  0,  3,  2,  5,  4,  7,  6,  9,  8,
                                                          11, 10, 13, 12, 15, 14, 17, 16, 19, 18,
                                                          21, 20, 23, 22, 25, 24, 27, 26, 29, 28}),
                                        ","),
                          "]}"),
             R"({"op":"pack","pack":"p"})"});
  const std::string shape = absl::StrCat("[", absl::StrJoin(std::vector<int>(30, 3), ","), "]");
  return {"a packed tensor of 30 dimensions on a million ranks",
          Document(Mesh({{"dp", kMillion}}), {{shape, "int8", place}},
                   R"(,"packs":[{"pack":"p","axis":"dp","buffer":"p"}])"),
          "ranks that hold a part of a pack"};
}

Case PackOfManyBlocks() {
  const std::string blocks =
      absl::StrCat(R"({"op":"shard","dim":0,"axis":"tp","rule":"ceil","blocks":[)",
                   absl::StrJoin(std::vector<int>(4096, 1), ","), "]}");
  return {"packed tensors of 4096 blocks on 16,384 ranks",
          Document(Mesh({{"tp", 16384}}),
                   std::vector<Tensor>(
                       2, {"[4096]", "int8", Place({blocks, R"({"op":"pack","pack":"p"})"})}),
                   R"(,"packs":[{"pack":"p","axis":[],"buffer":"p"}])"),
          "operations on"};
}

Case ManyTensorsOfManyBlocks() {
  std::vector<int> blocks(4096, 0);
  blocks[0] = 1;
  const std::string placements = absl::StrCat(
      R"(,"placements":{"p":[{"op":"shard","dim":0,"axis":"tp","rule":"ceil","blocks":[)",
      absl::StrJoin(blocks, ","), "]}]}");
  return {"17,000 tensors of 4096 blocks",
          Document(Mesh({{"tp", 2}}),
                   std::vector<Tensor>(17'000, {"[1]", "int8", R"(,"place":"p")"}), placements),
          "operations on all tensors of a rank"};
}

Case ListedEverywhere() {
  return {"segments on all of a million ranks",
          Document(Mesh({{"dp", kMillion}}),
                   std::vector<Tensor>(
                       8, {"[2]", "int8", R"(,"segments":[{"where":{},"lo":[0],"size":[2]}])"})),
          "at most 4000000 segments in the document"};
}

Case PiecesOfPadding() {
  // Columns of a matrix that is mostly padding: 32,768 boxes on each rank, all of them dropped.
  const std::string place = Place({R"({"op":"pad","dim":0,"size":34359738368})",
                                   R"({"op":"view","shape":[32768,1048576]})",
                                   R"({"op":"perm","dims":[1,0]})", Shard(0, "\"dp\"")});
  return {"pieces that are only padding",
          Document(Mesh({{"dp", kMillion}}), {{"[1]", "uint8", place}}),
          "operations on local tensors of all ranks"};
}

Case PiecesOfManyTensors() {
  const std::string place =
      Place({R"({"op":"view","shape":[65536,2]})", R"({"op":"perm","dims":[1,0]})"});
  return {"70 tensors in 65,536 pieces each",
          Document("[]", std::vector<Tensor>(70, {"[131072]", "uint8", place})),
          "pieces of all tensors on one rank"};
}

Case ManyBytes() {
  return {"8 tensors of 2^60 elements of 8 bytes",
          Document("[]", std::vector<Tensor>(8, {"[576460752303423488]", "float64", ""})),
          "bytes of all tensors together"};
}

Case ManyStates(size_t count, size_t name_bytes, const std::string& refusal) {
  std::string text = absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[],"tensors":[{"name":"%s","shape":[],"states":[)",
      std::string(name_bytes, 'n'));
  for (size_t i = 0; i < count; ++i) {
    absl::StrAppendFormat(&text, R"(%s{"state":"s%d","dtype":"int8"})", i ? "," : "", i);
  }
  return {absl::StrFormat("%d states of one tensor", count), text + "]}]}", refusal};
}

std::vector<Case> Cases() {
  return {EveryRankHasItsPart(),
          ListedSizes(),
          ManyShapes(),
          ManyHolderSets(),
          ViewThatSaturates(),
          PaddedPack(),
          PackCutEverywhere(),
          PackOfAMillionStages(),
          PackOfManyDimensions(),
          PackOfManyBlocks(),
          ManyTensorsOfManyBlocks(),
          ListedEverywhere(),
          PiecesOfPadding(),
          PiecesOfManyTensors(),
          ManyBytes(),
          ManyStates(256, 100, ""),
          ManyStates(257, 100, "1 to 256 states"),
          ManyStates(256, 4096, "at most 8 times as long as")};
}

void Lower(const Layout& layout) {
  uint64_t bytes = 0;
  for (const HolderLoad& load : layout.HolderLoads()) bytes += load.bytes;
  uint64_t expected = 0;
  for (const TensorState& state : layout.tensor_states()) expected += state.Bytes();
  EXPECT_EQ(bytes, expected);
  const Rank last{layout.world_size() - 1};
  EXPECT_OK(WriterAssignment::Create(layout).ForRank(last, {}).status());
}

TEST(LayoutCost, AShortDocumentIsRefusedByItsLimitOrCostsLittle) {
  for (const Case& each : Cases()) {
    SCOPED_TRACE(each.name);
    const size_t bytes_max = kCostBytesMax + kCostPerByteMax * each.document.size();
    try {
      const AllocationMeter meter(bytes_max);
      const auto layout = Layout::Parse(each.document);
      if (layout.ok()) Lower(**layout);
      EXPECT_EQ(layout.ok(), each.refusal.empty()) << layout.status();
      EXPECT_THAT(std::string(layout.status().message()), HasSubstr(each.refusal));
      std::printf("%s: %zu bytes of text, %zu MB allocated\n", each.name.c_str(),
                  each.document.size(), meter.GrowthPeak() / 1'000'000);
    } catch (const std::bad_alloc&) {
      ADD_FAILURE() << "allocates more than " << bytes_max << " bytes";
    }
  }
}

// Each transposed matrix is one copy a row; of three dimensions it is one for each pair of the
// outer two.
TEST(LayoutCost, StridedTensorsThatTakeTooManyCopiesAreRefusedForTheirRank) {
  const auto document = [](const std::string& shape) {
    return Document("[]", {{shape, "uint8", Place({R"({"op":"perm","dims":[2,1,0]})"})}});
  };
  ASSERT_OK_AND_ASSIGN(const auto small, Layout::Parse(document("[64,32,16]")));
  EXPECT_OK(small->ForRank(Rank{0}).status());
  ASSERT_OK_AND_ASSIGN(const auto large, Layout::Parse(document("[131072,262144,262144]")));
  const AllocationMeter meter(kCostBytesMax);
  EXPECT_THAT(
      large->ForRank(Rank{0}).status(),
      StatusIs(absl::StatusCode::kInvalidArgument,
               AllOf(HasSubstr("rank 0: tensor \"t0\""), HasSubstr("at most 4194304 copies"))));
}

}  // namespace
}  // namespace holdfast
