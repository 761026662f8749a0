#include "format/framework_layouts_testing.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "format/layout.h"
#include "format/planner.h"
#include "format/writer_assignment.h"
#include "gtest/gtest.h"

namespace holdfast::frameworks {
namespace {

constexpr uint64_t kSeed = 20261126;
constexpr int kRounds = 40;

std::string Quoted(const std::string& text) { return absl::StrCat("\"", text, "\""); }

template <typename T>
std::string ListJson(const std::vector<T>& values) {
  return absl::StrCat("[", absl::StrJoin(values, ","), "]");
}

std::string AxisJson(const std::string& axis) {
  const std::vector<std::string> names = absl::StrSplit(axis, ',');
  if (names.size() == 1) return Quoted(axis);
  return absl::StrCat("[\"", absl::StrJoin(names, "\",\""), "\"]");
}

std::string MeshJson(const MeshSizes& mesh) {
  std::vector<std::string> axes;
  for (const auto& [axis, size] : mesh) {
    axes.push_back(absl::StrCat(R"({"axis":")", axis, R"(","size":)", size, "}"));
  }
  return ListJson(axes);
}

void AddTo(std::string& list, const std::string& item) {
  absl::StrAppend(&list, list.empty() ? "" : ",\n  ", item);
}

}  // namespace

// ---- Documents ----

std::string Shard(size_t dim, const std::string& axis, const std::string& rule, uint64_t grain) {
  return absl::StrCat(R"({"op":"shard","dim":)", dim, R"(,"axis":)", AxisJson(axis), R"(,"rule":")",
                      rule, grain == 1 ? "\"" : absl::StrCat("\",\"grain\":", grain), "}");
}

std::string ShardSizes(size_t dim, const std::string& axis, const std::vector<uint64_t>& sizes) {
  return absl::StrCat(R"({"op":"shard","dim":)", dim, R"(,"axis":)", AxisJson(axis),
                      R"(,"rule":"sizes","sizes":)", ListJson(sizes), "}");
}

std::string FlatCut(const std::string& axis, const std::string& rule) {
  return absl::StrCat(R"({"op":"flat","axis":)", AxisJson(axis), R"(,"rule":")", rule, "\"}");
}

std::string FlatSizes(const std::string& axis, const std::vector<uint64_t>& sizes) {
  return absl::StrCat(R"({"op":"flat","axis":)", AxisJson(axis), R"(,"rule":"sizes","sizes":)",
                      ListJson(sizes), "}");
}

std::string View(const std::vector<int64_t>& shape) {
  return absl::StrCat(R"({"op":"view","shape":)", ListJson(shape), "}");
}

std::string Perm(const std::vector<uint64_t>& dims) {
  return absl::StrCat(R"({"op":"perm","dims":)", ListJson(dims), "}");
}

std::string Pad(size_t dim, uint64_t multiple, const std::string& axis) {
  return absl::StrCat(R"({"op":"pad","dim":)", dim, R"(,"multiple":)", multiple, R"(,"axis":)",
                      AxisJson(axis), "}");
}

std::string PlaceAt(const std::string& axis, const std::vector<int64_t>& coordinates) {
  return absl::StrCat(R"({"op":"place","axis":)", AxisJson(axis), R"(,"coordinates":)",
                      ListJson(coordinates), "}");
}

std::string PlaceIndex(const std::string& axis, uint64_t index, uint64_t count,
                       uint64_t virtual_stages) {
  return absl::StrCat(R"({"op":"place","axis":)", AxisJson(axis), R"(,"index":)", index,
                      R"(,"count":)", count, R"(,"rule":"even","virtual":)", virtual_stages, "}");
}

std::string PlaceIndexSizes(const std::string& axis, uint64_t index,
                            const std::vector<uint64_t>& sizes) {
  uint64_t count = 0;
  for (uint64_t size : sizes) count += size;
  return absl::StrCat(R"({"op":"place","axis":)", AxisJson(axis), R"(,"index":)", index,
                      R"(,"count":)", count, R"(,"rule":"sizes","sizes":)", ListJson(sizes), "}");
}

std::string Pack(const std::string& name) {
  return absl::StrCat(R"({"op":"pack","pack":")", name, "\"}");
}

std::string ZeroCut(const std::string& rule) {
  return absl::StrCat(R"({"op":"zero","rule":")", rule, "\"}");
}

std::string ZeroPack(const std::string& pack) {
  return absl::StrCat(R"({"op":"zero","pack":")", pack, "\"}");
}

std::string Place(const std::vector<std::string>& ops) { return ListJson(ops); }

std::string PlaceOn(const std::string& mesh, const std::vector<std::string>& ops) {
  return absl::StrCat(R"({"mesh":")", mesh, R"(","ops":)", ListJson(ops), "}");
}

Listed& Listed::Add(const std::vector<uint64_t>& ranks, const Shape& lo, const Shape& size,
                    uint64_t offset_bytes, const Shape& strides) {
  if (Numel(size) == 0) return *this;
  AddTo(segments_, absl::StrCat(R"({"ranks":)", ListJson(ranks), R"(,"lo":)", ListJson(lo),
                                R"(,"size":)", ListJson(size), R"(,"offset_bytes":)", offset_bytes,
                                strides.empty() ? "" : R"(,"strides":)",
                                strides.empty() ? "" : ListJson(strides), "}"));
  return *this;
}

std::string Listed::Json() const { return absl::StrCat("[", segments_, "]"); }

Document::Document(const MeshSizes& mesh) : mesh_(MeshJson(mesh)) {}

Document& Document::Mesh(const std::string& name, const MeshSizes& mesh) {
  AddTo(meshes_, absl::StrCat(Quoted(name), ":", MeshJson(mesh)));
  return *this;
}

Document& Document::AddPack(const std::string& name, const std::string& axis,
                            uint64_t align_elements, uint64_t multiple_elements,
                            const std::string& mesh) {
  AddTo(packs_, absl::StrCat(R"({"pack":")", name, R"(","axis":)", AxisJson(axis),
                             mesh.empty() ? "" : absl::StrCat(R"(,"mesh":)", Quoted(mesh)),
                             R"(,"align_elements":)", align_elements, R"(,"multiple_elements":)",
                             multiple_elements, R"(,"buffer":)", Quoted(name), "}"));
  return *this;
}

Document& Document::Zero(uint64_t stage, const std::string& axis) {
  zero_ = absl::StrCat(R"("zero":{"stage":)", stage, R"(,"axis":)", AxisJson(axis), "},\n ");
  return *this;
}

Document& Document::Tensor(const Named& tensor, const std::vector<StateLine>& states) {
  std::vector<std::string> lines;
  for (const StateLine& state : states) {
    std::string line =
        absl::StrCat(R"({"state":")", state.state, R"(","dtype":")", state.dtype, "\"");
    if (!state.place.empty()) absl::StrAppend(&line, ",\"place\":", state.place);
    if (!state.segments.empty()) absl::StrAppend(&line, ",\"segments\":", state.segments);
    if (!state.buffer.empty()) absl::StrAppend(&line, ",\"buffer\":", Quoted(state.buffer));
    if (state.offset_bytes > 0) absl::StrAppend(&line, ",\"offset_bytes\":", state.offset_bytes);
    lines.push_back(absl::StrCat(line, "}"));
  }
  AddTo(tensors_, absl::StrCat(R"({"name":")", tensor.name, R"(","shape":)", ListJson(tensor.shape),
                               R"(,"states":)", ListJson(lines), "}"));
  return *this;
}

std::string Document::Json() const {
  return absl::StrCat("{\"holdfast_layout\":1,\n \"mesh\":", mesh_, ",\n \"meshes\":{", meshes_,
                      "},\n ", zero_, "\"packs\":[", packs_, "],\n \"tensors\":[", tensors_, "]}");
}

// ---- Comparison ----

namespace {

std::string Describe(const Cell& cell) {
  return cell.tensor.empty() ? "padding" : absl::StrCat(cell.tensor, "[", cell.element, "]");
}

struct PlacedElement {
  size_t place = 0;  // in the buffer, in elements
  Cell cell;
};

// Every element of a segment, one by one.
std::vector<PlacedElement> ElementsOf(const std::vector<TensorState>& tensor_states,
                                      const RankLayout& layout, const Segment& segment) {
  const TensorState& state = tensor_states[segment.piece.tensor_state];
  const uint64_t element_bytes = ElementBytes(state.dtype);
  const bool whole = segment.piece.box == kWholeTensor;
  Shape lo(state.shape.size(), 0);
  Shape size = state.shape;
  if (!whole) {
    const BoxView box = layout.boxes[segment.piece.box];
    lo.assign(box.lo.begin(), box.lo.end());
    size.assign(box.size.begin(), box.size.end());
  }
  EXPECT_EQ(segment.buffer_offset_bytes % element_bytes, 0u);
  std::vector<PlacedElement> elements;
  for (uint64_t e = segment.piece.begin; e < segment.piece.end; ++e) {
    uint64_t rest = e;
    uint64_t element = 0;
    uint64_t weight = 1;
    uint64_t at = segment.buffer_offset_bytes;
    for (size_t d = size.size(); d-- > 0;) {
      const uint64_t x = rest % size[d];
      rest /= size[d];
      element += (lo[d] + x) * weight;
      weight *= state.shape[d];
      if (segment.strides != kContiguous) at += x * layout.strides_bytes[segment.strides][d];
    }
    if (segment.strides == kContiguous) at += (e - segment.piece.begin) * element_bytes;
    elements.push_back({at / element_bytes, {state.tensor, element}});
  }
  return elements;
}

using Buffers = std::map<std::string, Buffer>;

// The cells of all buffers that `layout` says; `bytes` of the elements of each state.
Buffers Expand(const std::vector<TensorState>& tensor_states, const RankLayout& layout,
               const Buffers& simulated, const std::map<std::string, uint64_t>& bytes) {
  Buffers buffers;
  for (const BufferNeed& need : layout.buffers) {
    const auto found = simulated.find(need.name);
    // A state lies in one buffer name; one that nobody simulated has no cells to compare.
    if (found == simulated.end()) {
      EXPECT_EQ(need.bytes, 0u) << "buffer " << need.name << " is not in the simulated world";
      continue;
    }
    const auto element_bytes = bytes.find(found->second.state);
    EXPECT_NE(element_bytes, bytes.end()) << "no tensor has the state " << found->second.state;
    if (element_bytes == bytes.end()) continue;
    EXPECT_EQ(need.bytes % element_bytes->second, 0u) << need.name;
    Buffer& buffer = buffers[need.name];
    buffer.state = found->second.state;
    buffer.cells.resize(need.bytes / element_bytes->second);
  }
  for (const Segment& segment : layout.segments) {
    const auto found = buffers.find(layout.buffers[segment.buffer].name);
    if (found == buffers.end()) continue;
    EXPECT_EQ(tensor_states[segment.piece.tensor_state].state, found->second.state);
    for (const PlacedElement& each : ElementsOf(tensor_states, layout, segment)) {
      if (each.place >= found->second.cells.size()) {
        ADD_FAILURE() << found->first << ": place " << each.place << " is behind the buffer's end";
        continue;
      }
      Cell& cell = found->second.cells[each.place];
      EXPECT_TRUE(cell.tensor.empty()) << found->first << ": place " << each.place << " twice";
      cell = each.cell;
    }
  }
  return buffers;
}

size_t CompareRank(uint64_t rank, const Buffers& said, const Buffers& simulated) {
  size_t elements = 0;
  for (const auto& [name, buffer] : simulated) {
    const auto found = said.find(name);
    const std::vector<Cell> nothing;
    const std::vector<Cell>& cells = found == said.end() ? nothing : found->second.cells;
    EXPECT_EQ(cells.size(), buffer.cells.size()) << "rank " << rank << " buffer " << name;
    for (size_t i = 0; i < std::min(cells.size(), buffer.cells.size()); ++i) {
      elements += buffer.cells[i].tensor.empty() ? 0 : 1;
      if (cells[i] == buffer.cells[i]) continue;
      ADD_FAILURE() << "rank " << rank << " buffer " << name << " place " << i
                    << ": the document says " << Describe(cells[i]) << ", the framework has "
                    << Describe(buffer.cells[i]);
      return elements;
    }
  }
  return elements;
}

// What the writers of all ranks store lies where the rank has it, and is everything, once.
class StoredByAll {
 public:
  explicit StoredByAll(const Layout& layout)
      : layout_(layout), writers_(WriterAssignment::Create(layout)) {}

  void Add(uint32_t rank, const Buffers& simulated) {
    const auto stored = writers_.ForRank(Rank{rank}, {});
    ASSERT_TRUE(stored.ok()) << stored.status().ToString();
    for (const Segment& segment : stored->segments) {
      const std::vector<Cell>& cells = simulated.at(stored->buffers[segment.buffer].name).cells;
      for (const PlacedElement& each : ElementsOf(layout_.tensor_states(), *stored, segment)) {
        ASSERT_LT(each.place, cells.size());
        EXPECT_EQ(Describe(each.cell), Describe(cells[each.place])) << "stored by rank " << rank;
      }
      Piece piece = segment.piece;
      if (piece.box != kWholeTensor) {
        const BoxView box = stored->boxes[piece.box];
        piece.box = boxes_.Add(box.lo, box.size);
      }
      elements_ += piece.ElementCount();
      pieces_.push_back({piece, rank, 0});
    }
  }

  void ExpectEverythingOnce() const {
    const absl::Status cover = CheckCover({layout_.tensor_states(), boxes_, pieces_});
    EXPECT_TRUE(cover.ok()) << cover.ToString();
    uint64_t elements = 0;
    for (const TensorState& state : layout_.tensor_states()) elements += state.ElementCount();
    EXPECT_EQ(elements_, elements) << "each element has one writer";
  }

 private:
  const Layout& layout_;
  WriterAssignment writers_;
  BoxTable boxes_;
  std::vector<StoredPiece> pieces_;
  uint64_t elements_ = 0;
};

}  // namespace

size_t ExpectSays(const Document& document, const World& world) {
  const std::string json = document.Json();
  const auto layout = Layout::Parse(json);
  if (!layout.ok()) {
    ADD_FAILURE() << layout.status().ToString() << "\n" << json;
    return 0;
  }
  SCOPED_TRACE(json);
  EXPECT_EQ((*layout)->world_size(), world.ranks.size());
  if ((*layout)->world_size() != world.ranks.size()) return 0;
  const std::vector<TensorState>& states = (*layout)->tensor_states();
  std::map<std::string, uint64_t> bytes;
  for (const TensorState& state : states) bytes[state.state] = ElementBytes(state.dtype);
  StoredByAll stored(**layout);
  size_t elements = 0;
  for (uint32_t rank = 0; rank < world.ranks.size(); ++rank) {
    const auto held = (*layout)->ForRank(Rank{rank});
    if (!held.ok()) {
      ADD_FAILURE() << held.status().ToString();
      return elements;
    }
    elements +=
        CompareRank(rank, Expand(states, *held, world.ranks[rank], bytes), world.ranks[rank]);
    if (testing::Test::HasFailure()) return elements;
    stored.Add(rank, world.ranks[rank]);
  }
  stored.ExpectEverythingOnce();
  return elements;
}

// ---- Sizes ----

uint64_t Draw::Of(std::initializer_list<uint64_t> choices) {
  return choices.begin()[Below(choices.size())];
}

std::vector<Named> Draw::Tensors(size_t dims_min) {
  std::vector<Named> tensors(1 + Below(6));
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].name = absl::StrCat("t", i);
    const size_t dims = dims_min + Below(4 - dims_min);
    for (size_t d = 0; d < dims; ++d) tensors[i].shape.push_back(Size());
  }
  return tensors;
}

std::vector<uint64_t> Draw::Parts(uint64_t sum, uint64_t count) {
  std::vector<uint64_t> cuts = {0, sum};
  for (uint64_t i = 0; i + 1 < count; ++i) cuts.push_back(Below(sum + 1));
  std::sort(cuts.begin(), cuts.end());
  std::vector<uint64_t> parts;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) parts.push_back(cuts[i + 1] - cuts[i]);
  return parts;
}

void ForManySizes(const std::function<size_t(Draw&)>& round) {
  printf("seeds %llu and on\n", static_cast<unsigned long long>(kSeed));
  size_t elements = 0;
  for (int i = 0; i < kRounds; ++i) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed + static_cast<uint64_t>(i)));
    Draw draw(kSeed + static_cast<uint64_t>(i));
    elements += round(draw);
    if (testing::Test::HasFailure()) return;
  }
  EXPECT_GT(elements, size_t{kRounds} * 10) << "elements compared";
}

}  // namespace holdfast::frameworks
