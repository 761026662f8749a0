// What a layout document may say, what is refused and by which words, and the worked examples of
// docs/layout-grammar.md, which are read from there.
#include "format/layout.h"

#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "format/writer_assignment.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

std::string ErrorOf(const std::string& json) {
  const auto layout = Layout::Parse(json);
  return layout.ok() ? "accepted" : std::string(layout.status().message());
}

// A document with the given mesh, packs, placements and one tensor's states.
std::string Document(const std::string& mesh, const std::string& states,
                     const std::string& shape = "[8,6]", const std::string& more = "") {
  return absl::StrCat(R"({"holdfast_layout":1,"mesh":)", mesh, more,
                      R"(,"tensors":[{"name":"w","shape":)", shape, R"(,"states":)", states, "}]}");
}
constexpr char kMesh[] = R"([{"axis":"dp","size":2},{"axis":"tp","size":4}])";

std::string Placed(const std::string& ops, const std::string& shape = "[8,6]",
                   const std::string& more = "") {
  return Document(kMesh, absl::StrCat(R"([{"state":"param","dtype":"float32","place":)", ops, "}]"),
                  shape, more);
}

// One line per buffer and segment of every rank, as the examples of the grammar print them.
std::string Render(const Layout& layout) {
  std::string text;
  for (uint32_t rank = 0; rank < layout.world_size(); ++rank) {
    const auto held = layout.ForRank(Rank{rank});
    if (!held.ok()) return std::string(held.status().message());
    absl::StrAppend(&text, "rank ", rank, "\n");
    for (uint32_t b = 0; b < held->buffers.size(); ++b) {
      absl::StrAppend(&text, "  ", held->buffers[b].name, ": ", held->buffers[b].bytes, " bytes\n");
      for (const Segment& segment : held->segments) {
        if (segment.buffer != b) continue;
        const TensorState& state = layout.tensor_states()[segment.piece.tensor_state];
        absl::StrAppend(&text, "    byte ", segment.buffer_offset_bytes, ": ", state.tensor, " ",
                        state.state, " ", Describe(segment.piece, held->boxes));
        if (segment.strides != kContiguous) {
          absl::StrAppend(&text, ", strides ",
                          absl::StrJoin(held->strides_bytes[segment.strides], " "), " bytes");
        }
        absl::StrAppend(&text, "\n");
      }
    }
  }
  return text;
}

TEST(Layout, ExamplesOfTheGrammarMeanWhatTheySay) {
  std::ifstream file(HOLDFAST_SOURCE_DIRECTORY "/docs/layout-grammar.md");
  std::string line;
  std::string block;
  std::string kind;  // "json", "text", or empty between blocks
  std::string document;
  int examples = 0;
  while (std::getline(file, line)) {
    if (!line.starts_with("```")) {
      if (!kind.empty()) absl::StrAppend(&block, line, "\n");
      continue;
    }
    if (kind.empty()) {
      kind = line.substr(3);
      block.clear();
      continue;
    }
    if (kind == "json") document = block;
    if (kind == "text") {
      const auto layout = Layout::Parse(document);
      ASSERT_TRUE(layout.ok()) << layout.status().ToString();
      EXPECT_EQ(Render(**layout), block);
      ++examples;
    }
    kind.clear();
  }
  EXPECT_EQ(examples, 7);
}

TEST(Layout, RefusesViewsMeshesZeroAndListedSegmentsByPathAndWords) {
  const auto listed = [](const std::string& segments, const std::string& shape = "[8,6]") {
    return Document(kMesh,
                    absl::StrCat(R"([{"state":"p","dtype":"float32","segments":)", segments, "}]"),
                    shape);
  };
  const std::string zero = R"(,"zero":{"stage":1,"axis":"dp"})";
  const std::string meshes = R"(,"meshes":{"e":[{"axis":"ep","size":8}]})";
  const std::string pack = R"(,"packs":[{"pack":"m","axis":"dp","buffer":"flat"}])";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {Placed(R"([{"op":"view","shape":[2,4,5]}])"),
       "place: expected 40 elements, as the view [2, 4, 5] has, found 48 in [8, 6]"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"even","blocks":[4,2]}])"),
       "expected the sum of the blocks, 6 elements, in dimension 0, found 8"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"tp","rule":"even","blocks":[4,2,2]}])"),
       "expected a multiple of 4 elements in block 1 of dimension 0 to cut over axis \"tp\", found "
       "2"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"even","blocks":[]}])"),
       "blocks: expected 1 to 4096 blocks"},
      {Placed(
           R"([{"op":"shard","dim":0,"axis":"dp","rule":"sizes","sizes":[4,4],"blocks":[4,4]}])"),
       "blocks: expected none beside sizes"},
      {Placed(R"([{"op":"view","shape":[-1,5]}])"),
       "expected a multiple of 5 elements to derive a size of the view, found 48 in [8, 6]"},
      {Placed(R"([{"op":"view","shape":[-1,-1]}])"), "shape[1]: expected a size of at most 2^62"},
      {Placed(R"([{"op":"perm","dims":[1,1]}])"),
       "dims[1]: expected each of the dimensions 0 to 1"},
      {Placed(R"([{"op":"perm","dims":[0]}])"), "expected 1 dimensions, as the perm has, found 2"},
      {Placed(R"([{"op":"pad","dim":0}])"), "expected \"multiple\", \"axis\" or \"size\""},
      {Placed(R"([{"op":"pad","dim":2,"size":9}])"),
       "expected a tensor with dimension 2 to pad, found 2 dimensions"},
      {Placed(R"([{"op":"pad","dim":0,"size":4611686018427387904}])"),
       "expected at most 2^59 places"},
      {Placed(R"([{"op":"partial","axis":"dp"}])"), "a partial sum is no state that can be stored"},
      {Placed(R"([{"op":"vew","shape":[48]}])"), "unknown op \"vew\"; did you mean \"view\"?"},
      {Placed(R"([{"op":"shard","dim":0,"axis":["dp","dp"],"rule":"ceil"}])"),
       "axis[1]: expected distinct axes"},
      {Placed(R"([{"op":"shard","dim":0,"axis":["dp","tq"],"rule":"ceil"}])"),
       "axis[1]: unknown axis \"tq\"; did you mean \"tp\"?"},
      {Placed(R"([{"op":"shard","dim":0,"axis":["dp","tp"],"rule":"sizes","sizes":[4,4]}])"),
       "one size for each of the 8 ranks of axis \"dp\" x \"tp\""},
      {Placed(R"([{"op":"place","axis":"tp","coordinates":[-5]}])"), "found the number -5"},
      {Placed(R"([{"op":"place","axis":"tp","index":4,"count":4,"rule":"even"}])"),
       "index: expected an index below 4"},
      {Placed(R"([{"op":"place","axis":"tp","index":0,"count":6,"rule":"even"}])"),
       "expected a multiple of 4 elements to place over axis \"tp\", found 6"},
      {Placed(R"([{"op":"place","axis":"tp","coordinates":[0],"count":6}])"),
       "unknown key \"count\""},
      {Placed(R"([{"op":"zero","rule":"ceil"}])"), "expected \"zero\" in the document"},
      {Placed(R"([{"op":"zero","rule":"ceil"},{"op":"pad","dim":0,"size":9}])", "[8,6]", zero),
       "place[1]: expected nothing behind the zero rule"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"ceil"},{"op":"zero","rule":"ceil"}])",
              "[8,6]", zero),
       "axis \"dp\" is used by an earlier operation"},
      {Placed("[]", "[8,6]", R"(,"zero":{"stage":4,"axis":"dp"})"),
       "zero.stage: expected a stage of 0 to 3"},
      {Placed("[]", "[8,6]", R"(,"meshes":{"e":[{"axis":"ep","size":4}]})"),
       "meshes.e: expected axes of 8 ranks in all, as \"mesh\" has, found 4"},
      {Placed(R"({"mesh":"f","ops":[]})", "[8,6]", meshes), "mesh: unknown mesh \"f\""},
      {Placed(R"({"mesh":"e","ops":[{"op":"flat","axis":"dp","rule":"ceil"}]})", "[8,6]", meshes),
       "unknown axis of mesh \"e\" \"dp\""},
      {Placed(R"({"mesh":"e","ops":[{"op":"pack","pack":"m"}]})", "[8]", meshes + pack),
       "pack \"m\" is cut over mesh \"\", this placement is over mesh \"e\""},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,5]}])"),
       "segments: expected boxes of all 48 elements, found 40"},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,5]},{"ranks":[1],"lo":[0,4],"size":[8,2]}])"),
       "expected boxes that are equal or apart, found [0:8, 0:5] and [0:8, 4:6]"},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,7]}])"),
       "expected a box that is not empty within 6 elements of dimension 1, found [0, 0 + 7)"},
      {listed(R"([{"ranks":[8],"lo":[0,0],"size":[8,6]}])"), "expected a rank below 8"},
      {listed(R"([{"ranks":[0,0],"lo":[0,0],"size":[8,6]}])"), "expected distinct ranks"},
      {listed(R"([{"lo":[0,0],"size":[8,6]}])"), "expected either \"ranks\" or \"where\""},
      {listed(R"([{"where":{"tq":[0]},"lo":[0,0],"size":[8,6]}])"), "unknown axis \"tq\""},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,6],"strides":[1,0]}])"),
       "strides[1]: expected at least 1, in elements"},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,6],"strides":[4611686018427387904,1]}])"),
       "that the last element lies below 2^62 bytes"},
      {listed(R"([{"ranks":[0],"lo":[0,0],"size":[8,6]},{"ranks":[0],"lo":[0,0],"size":[8,6]}])"),
       "rank 0 holds this box already"},
      {Document(kMesh, R"([{"state":"p","dtype":"bool","segments":[],"place":[]}])", "[0]"),
       "place: expected none beside \"segments\""},
  };
  for (const auto& [json, expected] : cases) {
    EXPECT_THAT(ErrorOf(json), HasSubstr(expected)) << json;
  }
}

// A view that makes pieces of single elements would cost what it likes.
TEST(Layout, APlacementThatBreaksTensorsIntoTooManyPiecesIsRefused) {
  // Transposed twice across a seam: every row of the last view is 3 pieces of other rows.
  const auto transposed = [](uint64_t rows) {
    return Placed(absl::StrCat(R"([{"op":"perm","dims":[1,0]},{"op":"view","shape":[-1,2]},
                                   {"op":"perm","dims":[1,0]},{"op":"view","shape":[-1]}])"),
                  absl::StrCat("[", rows, ",3]"));
  };
  EXPECT_EQ(ErrorOf(transposed(1000)), "accepted");
  EXPECT_THAT(ErrorOf(transposed(2'000'001 * 2)), HasSubstr("expected at most 65536 pieces"));
}

// Tensors may interleave in a buffer; sharing a byte is refused, whatever the strides.
TEST(Layout, StridedSegmentsOfABufferAreApart) {
  const auto layout = [](uint64_t second_offset) {
    return absl::StrCat(
        R"({"holdfast_layout":1,"mesh":[],"tensors":[
            {"name":"a","shape":[4,2],"states":[{"state":"p","dtype":"int8","buffer":"b",
             "segments":[{"ranks":[0],"lo":[0,0],"size":[4,2],"strides":[4,1]}]}]},
            {"name":"b","shape":[4,2],"states":[{"state":"p","dtype":"int8","buffer":"b",
             "segments":[{"ranks":[0],"lo":[0,0],"size":[4,2],"strides":[4,1],"offset_bytes":)",
        second_offset, "}]}]}]}");
  };
  for (const uint64_t offset : {uint64_t{2}, uint64_t{16}, uint64_t{0}}) {  // 0: tied
    const auto parsed = Layout::Parse(layout(offset));
    ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
    EXPECT_TRUE((*parsed)->ForRank(Rank{0}).ok()) << offset;
  }
  for (const uint64_t offset : {uint64_t{1}, uint64_t{3}, uint64_t{5}}) {
    const auto parsed = Layout::Parse(layout(offset));
    ASSERT_TRUE(parsed.ok());
    EXPECT_THAT(std::string((*parsed)->ForRank(Rank{0}).status().message()),
                HasSubstr("expected that they are apart"))
        << offset;
  }
}

TEST(Layout, RefusesByPathAndTensorAndWords) {
  const auto state = [](const std::string& more) {
    return Document(kMesh, absl::StrCat(R"([{"state":"param","dtype":"float32")", more, "}]"));
  };
  const std::string pack = R"(,"packs":[{"pack":"m","axis":"dp","buffer":"flat"}])";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "JSON line 1, column 1"},
      {"[]", "$: expected an object, found an array of 0"},
      {"{}", "expected the key \"holdfast_layout\""},
      {R"({"holdfast_layout":2,"mesh":[],"tensors":[]})",
       "holdfast_layout: expected version 1 of the grammar, found the number 2"},
      {R"({"holdfast_layout":1,"mesh":[]})", "expected the key \"tensors\""},
      {R"({"holdfast_layout":1,"mesh":[],"tensor":[]})", "did you mean \"tensors\"?"},
      {Document("[{\"axis\":\"dp\",\"size\":0}]", "[]"), "mesh[0].size: expected at least 1"},
      {Document(R"([{"axis":"a","size":1048576},{"axis":"b","size":2}])", "[]"),
       "mesh[1].size: expected at least 1, and at most 1048576 ranks"},
      {Document(R"([{"axis":"a","size":1},{"axis":"a","size":2}])", "[]"),
       "axis \"a\" is there twice"},
      {Document(R"([{"axis":"","size":1}])", "[]"),
       "mesh[0].axis: axis: expected a name, found none"},
      {Document(kMesh, "[]"), "tensors[0].states: expected 1 to 256 states, found an array of 0"},
      {Document(kMesh, "[{}]"),
       "tensors[0].states[0]: expected the key \"state\", found none (tensor \"w\")"},
      {state(R"(,"dtyp":1)"), "unknown key \"dtyp\"; did you mean \"dtype\"?"},
      {Document(kMesh, R"([{"state":"param","dtype":"float3"}])"),
       "tensors[0].states[0].dtype: unknown dtype \"float3\"; did you mean \"float32\"?"},
      {Document(kMesh, R"([{"state":"p","dtype":"bool"},{"state":"p","dtype":"bool"}])"),
       "state \"p\" is there twice"},
      {Document(kMesh, R"([{"state":"p","dtype":"bool"}])", "[4294967296,4294967296]"),
       "expected at most 2^62 bytes"},
      {Document(kMesh, R"([{"state":"p","dtype":"int64"}])", "[4611686018427387904]"),
       "expected at most 2^62 bytes"},
      {Document(kMesh, R"([{"state":"p","dtype":"bool"}])", "[18446744073709551616]"),
       "tensors[0].shape[0]: expected an integer"},
      {Document(kMesh, R"([{"state":"p","dtype":"bool"}])", "[-1]"), "tensors[0].shape[0]"},
      {state(R"(,"place":"columns")"), "unknown placement \"columns\""},
      {state(R"(,"place":5)"),
       "expected the name of a placement, an array of operations, or an object"},
      {state(R"(,"offset_bytes":4611686018427387905)"), "at most 2^62 bytes"},
      {Placed(R"([{"op":"shart"}])"), "place[0]: unknown op \"shart\"; did you mean \"shard\"?"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"pp","rule":"ceil"}])"),
       "unknown axis \"pp\"; did you mean"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"tp"}])"), "expected the key \"rule\""},
      {Placed(R"([{"op":"shard","dim":0,"axis":"tp","rule":"evn"}])"),
       "unknown rule \"evn\"; did you mean \"even\""},
      {Placed(R"([{"op":"shard","dim":1,"axis":"tp","rule":"even"}])"),
       "place: expected a multiple of 4 elements in dimension 1 to cut over axis \"tp\", found 6 "
       "(tensor \"w\")"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"tp","rule":"even","grain":3}])"),
       "expected a multiple of 12 elements (4 ranks x grain 3) in dimension 0"},
      {Placed(
           R"([{"op":"shard","dim":0,"axis":"tp","rule":"ceil"},{"op":"shard","dim":0,"axis":"dp","rule":"even"}])",
           "[7]"),
       "expected a multiple of 2 elements in dimension 0 to cut over axis \"dp\", found 1"},
      {Placed(R"([{"op":"shard","dim":2,"axis":"tp","rule":"ceil"}])"),
       "expected a tensor with dimension 2 to cut over axis \"tp\", found 2 dimensions"},
      {Placed(R"([{"op":"shard","dim":32,"axis":"tp","rule":"ceil"}])"),
       "expected a dimension below 32"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"sizes","sizes":[3,4]}])"),
       "expected the sum of the sizes, 7 elements in dimension 0"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"sizes","sizes":[8]}])"),
       "one size for each of the 2 ranks of axis \"dp\""},
      {Placed(
           R"([{"op":"shard","dim":0,"axis":"dp","rule":"sizes","sizes":[4611686018427387904,1]}])"),
       "a sum of at most 2^62"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"ceil","sizes":[4,4]}])"),
       "expected no sizes but with the rule"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"sizes","sizes":[4,4],"grain":2}])"),
       "expected no grain beside sizes"},
      {Placed(R"([{"op":"shard","dim":0,"axis":"dp","rule":"ceil","grain":0}])"),
       "expected 1 to 2^32"},
      {Placed(R"([{"op":"flat","dim":0,"axis":"dp","rule":"ceil"}])"), "unknown key \"dim\""},
      {Placed(
           R"([{"op":"flat","axis":"dp","rule":"ceil"},{"op":"flat","axis":"dp","rule":"ceil"}])"),
       "place[1]: axis \"dp\" is used by an earlier operation"},
      {Placed(
           R"([{"op":"flat","axis":"dp","rule":"ceil"},{"op":"shard","dim":1,"axis":"tp","rule":"ceil"}])"),
       "expected dimension 0, the only one behind a flat cut, found 1"},
      {Placed(R"([{"op":"place","axis":"tp","coordinates":[]}])"),
       "expected at least one coordinate"},
      {Placed(R"([{"op":"place","axis":"tp","coordinates":[4]}])"),
       "coordinates[0]: expected a coordinate of axis \"tp\", below 4, or from -1 on backwards, "
       "found the number 4"},
      {Placed(R"([{"op":"place","axis":"tp","coordinates":[1,1]}])"),
       "expected distinct coordinates"},
      {Placed(R"([{"op":"pack","pack":"n"}])", "[8]", pack),
       "unknown pack \"n\"; did you mean \"m\"?"},
      {Placed(R"([{"op":"pack","pack":"m"},{"op":"flat","axis":"tp","rule":"ceil"}])", "[8]", pack),
       "expected nothing behind a pack"},
      {Placed(R"([{"op":"flat","axis":"dp","rule":"ceil"},{"op":"pack","pack":"m"}])", "[8]", pack),
       "axis \"dp\" is used by an earlier operation"},
      {Document(kMesh,
                R"([{"state":"p","dtype":"bool","place":[{"op":"pack","pack":"m"}],"buffer":"b"}])",
                "[8]", pack),
       "states[0].buffer: expected none: a packed state lies in the pack's buffer"},
      {Document(
           kMesh,
           R"([{"state":"p","dtype":"bool","place":[{"op":"pack","pack":"m"}]},{"state":"q","dtype":"int8","place":[{"op":"pack","pack":"m"}]}])",
           "[8]", pack),
       "expected the dtype of the others in pack \"m\", bool, found int8"},
      {Placed(
           "[]", "[8]",
           R"(,"packs":[{"pack":"m","axis":"dp","buffer":"x"},{"pack":"m","axis":"tp","buffer":"y"}])"),
       "pack \"m\" is there twice"},
      {Placed("[]", "[8]", R"(,"packs":[{"pack":"m","axis":"dp"}])"),
       "expected the key \"buffer\""},
      {Placed("[]", "[8]",
              R"(,"placements":{"a":[{"op":"flat","axis":"dp","rule":"ceil","x":1}]})"),
       "placements.a[0]: unknown key \"x\""},
  };
  for (const auto& [json, expected] : cases)
    EXPECT_THAT(ErrorOf(json), HasSubstr(expected)) << json;
}

TEST(Layout, AStateMayHaveAShapeOfItsOwn) {
  const auto layout = Layout::Parse(Document(
      kMesh,
      R"([{"state":"param","dtype":"float32","place":[{"op":"shard","dim":0,"axis":"tp","rule":"even"}]},)"
      R"({"state":"step","dtype":"int64","shape":[]},)"
      R"({"state":"rows","dtype":"float32","shape":[8],"place":[{"op":"shard","dim":0,"axis":"tp","rule":"even"}]}])"));
  ASSERT_TRUE(layout.ok()) << layout.status();
  const auto& states = (*layout)->tensor_states();
  ASSERT_EQ(states.size(), 3u);
  EXPECT_EQ(states[0].shape, (std::vector<uint64_t>{8, 6}));
  EXPECT_EQ(states[1].shape, std::vector<uint64_t>{});
  EXPECT_EQ(states[2].shape, std::vector<uint64_t>{8});
  const auto held = (*layout)->ForRank(Rank{1});
  ASSERT_TRUE(held.ok());
  uint64_t bytes = 0;
  for (const BufferNeed& buffer : held->buffers) bytes += buffer.bytes;
  EXPECT_EQ(bytes, 2u * 6 * 4 + 8 + 2 * 4);
  // A placement has to fit that shape.
  EXPECT_FALSE(
      Layout::Parse(Document(kMesh, R"([{"state":"param","dtype":"float32"},{"state":"step",)"
                                    R"("dtype":"int64","shape":[],"place":[{"op":"shard",)"
                                    R"("dim":0,"axis":"tp","rule":"even"}]}])"))
          .ok());
}

TEST(Layout, RefusesDuplicateTensors) {
  const std::string tensor = R"({"name":"a/b","shape":[],"states":[{"state":"p","dtype":"bool"}]})";
  EXPECT_THAT(ErrorOf(absl::StrCat(R"({"holdfast_layout":1,"mesh":[],"tensors":[)", tensor, ",",
                                   tensor, "]}")),
              HasSubstr("tensors[1]: tensor \"a/b\" is there twice"));
}

TEST(Layout, LimitsAreExact) {
  const std::string state = R"([{"state":"p","dtype":"bool"}])";
  const auto shape = [](int dims) {
    std::string text = "[1";
    for (int i = 1; i < dims; ++i) text += ",1";
    return text + "]";
  };
  EXPECT_EQ(ErrorOf(Document(kMesh, state, shape(32))), "accepted");
  EXPECT_THAT(ErrorOf(Document(kMesh, state, shape(33))), HasSubstr("at most 32 dimensions"));
  const auto named = [&state](const std::string& name) {
    return absl::StrReplaceAll(Document(kMesh, state), {{"\"w\"", absl::StrCat("\"", name, "\"")}});
  };
  EXPECT_EQ(ErrorOf(named(std::string(4096, 'x'))), "accepted");
  EXPECT_THAT(ErrorOf(named(std::string(4097, 'x'))), HasSubstr("at most 4096 bytes, found 4097"));
  EXPECT_EQ(ErrorOf(named("模型/层.0")), "accepted");
  EXPECT_THAT(ErrorOf(named("a\\u0000b")), HasSubstr("without NUL"));
  const auto axes = [&state](int count) {
    std::string mesh;
    for (int i = 0; i < count; ++i) {
      absl::StrAppend(&mesh, i ? "," : "", "{\"axis\":\"a", i, "\",\"size\":1}");
    }
    return Document(absl::StrCat("[", mesh, "]"), state);
  };
  EXPECT_EQ(ErrorOf(axes(16)), "accepted");
  EXPECT_THAT(ErrorOf(axes(17)), HasSubstr("at most 16 axes"));
  EXPECT_EQ(ErrorOf(Document(kMesh, state, "[4611686018427387904]")), "accepted");
  EXPECT_THAT(ErrorOf(Document(kMesh, state, "[4611686018427387905]")), HasSubstr("2^62"));
  EXPECT_EQ(ErrorOf(R"({"holdfast_layout":1,"mesh":[],"tensors":[]})"), "accepted");
}

TEST(Layout, HashTellsTextsApart) {
  const auto hash = [](const std::string& json) { return (*Layout::Parse(json))->hash(); };
  const std::string a = R"({"holdfast_layout":1,"mesh":[],"tensors":[]})";
  EXPECT_EQ(hash(a), hash(a));
  EXPECT_NE(hash(a), hash(a + " "));
  EXPECT_NE(hash(a), hash(absl::StrReplaceAll(a, {{",\"mesh", " ,\"mesh"}})));
  EXPECT_NE(hash(R"({"holdfast_layout":1,"mesh":[{"axis":"a","size":1}],"tensors":[]})"),
            hash(R"({"holdfast_layout":1,"mesh":[{"axis":"b","size":1}],"tensors":[]})"));
}

std::string TwoTensors(const std::string& a, const std::string& b) {
  return absl::StrCat(
      R"({"holdfast_layout":1,"mesh":[],"tensors":[{"name":"a","shape":[4],"states":[)", a,
      R"(]},{"name":"b","shape":[4],"states":[)", b, "]}]}");
}

TEST(Layout, TiedTensorsShareBytesAndOtherOverlapsAreRefused) {
  const std::string a = R"({"state":"p","dtype":"float32","buffer":"m","offset_bytes":8})";
  const auto tied = Layout::Parse(TwoTensors(a, a));
  ASSERT_TRUE(tied.ok());
  const auto held = (*tied)->ForRank(Rank{0});
  ASSERT_TRUE(held.ok()) << held.status().ToString();
  ASSERT_EQ(held->segments.size(), 2u);
  EXPECT_EQ(held->segments[0].buffer_offset_bytes, held->segments[1].buffer_offset_bytes);
  EXPECT_EQ(held->buffers.size(), 1u);
  EXPECT_EQ(held->buffers[0].bytes, 24u);
  for (const char* b : {R"({"state":"p","dtype":"float32","buffer":"m","offset_bytes":20})",
                        R"({"state":"p","dtype":"int32","buffer":"m","offset_bytes":8})",
                        R"({"state":"p","dtype":"int8","buffer":"m","offset_bytes":8})",
                        R"({"state":"p","dtype":"int8","buffer":"m","offset_bytes":23})",
                        R"({"state":"p","dtype":"int64","buffer":"m"})"}) {
    const auto layout = Layout::Parse(TwoTensors(a, b));
    ASSERT_TRUE(layout.ok());
    EXPECT_THAT(std::string((*layout)->ForRank(Rank{0}).status().message()),
                HasSubstr("rank 0: buffer \"m\": tensor \""))
        << b;
  }
  for (const char* b : {R"({"state":"p","dtype":"float32","buffer":"m","offset_bytes":24})",
                        R"({"state":"p","dtype":"int16","buffer":"m"})"}) {
    EXPECT_TRUE((*Layout::Parse(TwoTensors(a, b)))->ForRank(Rank{0}).ok()) << b;
  }
}

// Two pipeline stages hold the tied tensor "e", beside tensors of other sizes, so that their packs
// are cut at other elements of it: no piece of one is a piece of the other.
TEST(Layout, PacksThatAreCutElsewhereAreCutUntilHoldersAgree) {
  const auto layout = Layout::Parse(R"({"holdfast_layout":1,
    "mesh":[{"axis":"pp","size":2},{"axis":"dp","size":2}],
    "packs":[{"pack":"m","axis":"dp","buffer":"m"}],
    "tensors":[
     {"name":"a","shape":[4],"states":[{"state":"m","dtype":"int8","place":[{"op":"place","axis":"pp","coordinates":[0]},{"op":"pack","pack":"m"}]}]},
     {"name":"e","shape":[10],"states":[{"state":"m","dtype":"int8","place":[{"op":"pack","pack":"m"}]}]}]})");
  ASSERT_TRUE(layout.ok()) << layout.status().ToString();
  // Stage 0: a[4] e[10] cut at 7: e [0,3) and [3,10). Stage 1: e[10] cut at 5.
  using Held = std::pair<std::string, std::vector<uint32_t>>;
  const auto held_by = [&](uint32_t rank) {
    std::vector<Held> out;
    const RankHoldings held = (*layout)->HeldByRank(Rank{rank});
    for (size_t i = 0; i < held.layout.segments.size(); ++i) {
      const Piece& piece = held.layout.segments[i].piece;
      out.emplace_back(absl::StrCat((*layout)->tensor_states()[piece.tensor_state].tensor, " ",
                                    Describe(piece, held.layout.boxes)),
                       held.holder_sets[held.holders[i]]);
    }
    return out;
  };
  EXPECT_EQ(held_by(0),
            (std::vector<Held>{{"a elements [0, 4)", {0}}, {"e elements [0, 3)", {0, 2}}}));
  EXPECT_EQ(held_by(1),
            (std::vector<Held>{{"e elements [3, 5)", {1, 2}}, {"e elements [5, 10)", {1, 3}}}));
  EXPECT_EQ(held_by(2),
            (std::vector<Held>{{"e elements [0, 3)", {0, 2}}, {"e elements [3, 5)", {1, 2}}}));
  EXPECT_EQ(held_by(3), (std::vector<Held>{{"e elements [5, 10)", {1, 3}}}));
}

void PrintTimes(const char* what, const std::string& json, uint32_t rank) {
  const absl::Time begin = absl::Now();
  const auto layout = Layout::Parse(json);
  ASSERT_TRUE(layout.ok()) << layout.status().ToString();
  const absl::Time parsed = absl::Now();
  const auto held = (*layout)->ForRank(Rank{rank});
  ASSERT_TRUE(held.ok());
  const absl::Time lowered = absl::Now();
  const WriterAssignment writers = WriterAssignment::Create(**layout);
  const absl::Time assigned = absl::Now();
  const auto stored = writers.ForRank(Rank{rank}, {});
  ASSERT_TRUE(stored.ok());
  const absl::Time end = absl::Now();
  printf(
      "%s, %zu MB of JSON: parse %s, lower one rank %s (%zu segments), all writers %s, one rank's "
      "pieces %s (%zu)\n",
      what, json.size() >> 20, absl::FormatDuration(parsed - begin).c_str(),
      absl::FormatDuration(lowered - parsed).c_str(), held->segments.size(),
      absl::FormatDuration(assigned - lowered).c_str(),
      absl::FormatDuration(end - assigned).c_str(), stored->segments.size());
  EXPECT_GT(stored->segments.size(), 0u);
}

TEST(Layout, LargeJobsLowerRankByRank) {
  const auto tensors = [](int count, const std::string& states) {
    std::string text;
    for (int i = 0; i < count; ++i) {
      absl::StrAppend(&text, i ? "," : "", R"({"name":"model.layers.)", i, R"(.weight","shape":[)",
                      64 + i % 13, ",1024],\"states\":[", states, "]}");
    }
    return text;
  };
  PrintTimes(
      "dp 1000 x 10,000 tensors packed",
      absl::StrCat(
          R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":1000}],"packs":[)",
          R"({"pack":"m","axis":"dp","buffer":"m","multiple_elements":2}],"tensors":[)",
          tensors(10'000, R"({"state":"param","dtype":"bfloat16"},)"
                          R"({"state":"m","dtype":"float32","place":[{"op":"pack","pack":"m"}]})"),
          "]}"),
      517);
  PrintTimes(
      "8 ranks x 100,000 tensors",
      absl::StrCat(
          R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":4},{"axis":"tp","size":2}],)",
          R"("placements":{"row":[{"op":"shard","dim":1,"axis":"tp","rule":"even"}],)",
          R"("zero":[{"op":"shard","dim":1,"axis":"tp","rule":"even"},{"op":"flat","axis":"dp","rule":"ceil"}]},)",
          R"("tensors":[)",
          tensors(100'000, R"({"state":"param","dtype":"bfloat16","place":"row"},)"
                           R"({"state":"exp_avg","dtype":"float32","place":"zero"},)"
                           R"({"state":"exp_avg_sq","dtype":"float32","place":"zero"})"),
          "]}"),
      5);
}

}  // namespace
}  // namespace holdfast
