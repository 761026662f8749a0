// Random documents over everything that the grammar says, and their JSON.
#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "format/layout_oracle.h"
#include "format/layout_oracle_local.h"

namespace holdfast::oracle {
namespace {

template <typename T>
const T& Pick(Random& random, const std::vector<T>& from) {
  return from[random() % from.size()];
}

bool Chance(Random& random, int percent) { return static_cast<int>(random() % 100) < percent; }

// ---- Random operations ----

Op RandomCut(Random& random, const Mesh& mesh, const std::vector<uint64_t>& shape, bool behind_flat,
             std::vector<size_t> axes) {
  Op op;
  op.axes = std::move(axes);
  const bool flat = shape.empty() || Chance(random, behind_flat ? 50 : 25);
  op.kind = flat ? "flat" : "shard";
  if (!flat && !behind_flat) op.dim = random() % shape.size();
  op.rule = Pick<std::string>(random, {"ceil", "ceil", "balanced", "balanced", "even", "sizes"});
  const uint64_t parts = SizeOf(mesh, op.axes);
  if (op.rule == "sizes") {
    uint64_t left = flat || behind_flat ? Volume(shape) : shape[op.dim];
    for (uint64_t i = 0; i + 1 < parts; ++i) {
      op.sizes.push_back(random() % (left + 1));
      left -= op.sizes.back();
    }
    op.sizes.push_back(left);
    std::shuffle(op.sizes.begin(), op.sizes.end(), random);
  } else if (Chance(random, 20)) {
    op.grain = 1 + random() % 4;
  }
  if (op.kind == "shard" && !behind_flat && op.rule != "sizes" && Chance(random, 25)) {
    uint64_t left = shape[op.dim];
    for (uint64_t i = random() % 3; i > 0; --i) {
      op.blocks.push_back(random() % (left + 1));
      left -= op.blocks.back();
    }
    op.blocks.push_back(left);
  }
  return op;
}

// Splits a dimension in two, joins two, or both; by chance with a size that is derived.
Op RandomView(Random& random, const std::vector<uint64_t>& shape) {
  Op op;
  op.kind = "view";
  std::vector<uint64_t> sizes = shape;
  if (sizes.size() > 1 && Chance(random, 30)) {
    const size_t dim = random() % (sizes.size() - 1);
    sizes[dim] *= sizes[dim + 1];
    sizes.erase(sizes.begin() + static_cast<long>(dim) + 1);
  }
  if (!sizes.empty() && Chance(random, 80)) {
    const size_t dim = random() % sizes.size();
    std::vector<uint64_t> factors;
    for (uint64_t f = 1; f <= sizes[dim]; ++f) {
      if (sizes[dim] % f == 0) factors.push_back(f);
    }
    const uint64_t factor = factors.empty() ? 1 : Pick(random, factors);
    sizes[dim] /= factor;
    sizes.insert(sizes.begin() + static_cast<long>(dim), factor);
  }
  op.view.assign(sizes.begin(), sizes.end());
  if (!op.view.empty() && Chance(random, 30)) op.view[random() % op.view.size()] = -1;
  return op;
}

Op RandomPad(Random& random, const Mesh& mesh, const std::vector<uint64_t>& shape) {
  Op op;
  op.kind = "pad";
  op.dim = random() % shape.size();
  if (Chance(random, 70)) op.multiple = 1 + random() % 5;
  if (!mesh.empty() && Chance(random, 50)) op.multiple_axes = {random() % mesh.size()};
  if (Chance(random, 30)) op.size_min = shape[op.dim] + random() % 4;
  if (op.multiple == 1 && op.multiple_axes.empty() && op.size_min == 0) op.size_min = 1;
  return op;
}

Op RandomPlace(Random& random, const Mesh& mesh, size_t axis) {
  Op op;
  op.kind = "place";
  op.axes = {axis};
  const uint64_t size = mesh[axis].second;
  if (Chance(random, 40)) {
    op.count = 1 + random() % 12;
    op.index = random() % op.count;
    op.rounds = 1 + random() % 3;
    op.rule = Pick<std::string>(random, {"ceil", "balanced", "even"});
    return op;
  }
  for (uint64_t c = 0; c < size; ++c) {
    if (!Chance(random, 50)) continue;
    op.coordinates.push_back(static_cast<int64_t>(c) -
                             (Chance(random, 30) ? static_cast<int64_t>(size) : 0));
  }
  if (op.coordinates.empty()) op.coordinates.push_back(-1);
  return op;
}

// The tensor cut by a random grid, every box on random ranks.
std::vector<ListedSegment> RandomListed(Random& random, const Document& document,
                                        const Tensor& tensor, const std::string& buffer) {
  std::vector<ListedSegment> listed;
  if (Volume(tensor.shape) == 0) return listed;
  listed.push_back({{}, std::vector<uint64_t>(tensor.shape.size(), 0), tensor.shape, "", 0, {}});
  for (size_t cut = random() % 4; cut > 0 && !tensor.shape.empty(); --cut) {
    const size_t which = random() % listed.size();
    const size_t dim = random() % tensor.shape.size();
    if (listed[which].size[dim] < 2) continue;
    ListedSegment right = listed[which];
    const uint64_t left = 1 + random() % (right.size[dim] - 1);
    listed[which].size[dim] = left;
    right.lo[dim] += left;
    right.size[dim] -= left;
    listed.push_back(right);
  }
  uint64_t at = 0;
  std::vector<ListedSegment> all;
  for (const ListedSegment& box : listed) {
    std::vector<uint64_t> ranks;
    for (uint64_t rank = 0; rank < document.WorldSize(); ++rank) {
      if (Chance(random, 50)) ranks.push_back(rank);
    }
    if (ranks.empty()) ranks.push_back(random() % document.WorldSize());
    // Each rank may have it elsewhere.
    while (!ranks.empty()) {
      ListedSegment segment = box;
      const size_t count = 1 + random() % ranks.size();
      segment.ranks.assign(ranks.end() - static_cast<long>(count), ranks.end());
      ranks.resize(ranks.size() - count);
      segment.buffer = buffer;
      segment.offset_bytes = at + random() % 7;
      uint64_t elements = Volume(box.size);
      if (Chance(random, 60)) {
        // Dimensions in any order, with gaps.
        std::vector<size_t> order(box.size.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::shuffle(order.begin(), order.end(), random);
        segment.strides.resize(box.size.size());
        uint64_t stride = 1;
        for (size_t dim : order) {
          segment.strides[dim] = stride;
          stride = stride * box.size[dim] + random() % 2;
        }
        elements = stride;
      }
      at = segment.offset_bytes + elements * 8;
      all.push_back(segment);
    }
  }
  return all;
}

// ---- JSON ----

std::string AxisJson(const Mesh& mesh, const std::vector<size_t>& axes) {
  std::vector<std::string> names;
  for (size_t axis : axes) names.push_back(absl::StrCat("\"", mesh[axis].first, "\""));
  return axes.size() == 1 ? names[0] : absl::StrCat("[", absl::StrJoin(names, ","), "]");
}

std::string OpJson(const Document& document, const Mesh& mesh, const Op& op) {
  if (op.pack.has_value()) {
    return absl::StrCat("{\"op\":\"", op.kind, "\",\"pack\":\"", document.packs[*op.pack].name,
                        "\"}");
  }
  if (op.kind == "view") {
    return absl::StrCat(R"({"op":"view","shape":[)", absl::StrJoin(op.view, ","), "]}");
  }
  if (op.kind == "perm") {
    return absl::StrCat(R"({"op":"perm","dims":[)", absl::StrJoin(op.perm, ","), "]}");
  }
  std::string json = absl::StrCat("{\"op\":\"", op.kind, "\"");
  if (op.kind == "pad") {
    absl::StrAppend(&json, ",\"dim\":", op.dim);
    if (op.multiple != 1) absl::StrAppend(&json, ",\"multiple\":", op.multiple);
    if (!op.multiple_axes.empty()) {
      absl::StrAppend(&json, ",\"axis\":", AxisJson(mesh, op.multiple_axes));
    }
    if (op.size_min != 0) absl::StrAppend(&json, ",\"size\":", op.size_min);
    return json + "}";
  }
  if (op.kind != "zero") absl::StrAppend(&json, ",\"axis\":", AxisJson(mesh, op.axes));
  if (op.kind == "place" && op.count == 0) {
    return absl::StrCat(json, ",\"coordinates\":[", absl::StrJoin(op.coordinates, ","), "]}");
  }
  if (op.kind == "place") {
    absl::StrAppend(&json, ",\"index\":", op.index, ",\"count\":", op.count);
    if (op.rounds != 1) absl::StrAppend(&json, ",\"virtual\":", op.rounds);
  }
  if (op.kind == "shard") absl::StrAppend(&json, ",\"dim\":", op.dim);
  absl::StrAppend(&json, ",\"rule\":\"", op.rule, "\"");
  if (op.grain != 1) absl::StrAppend(&json, ",\"grain\":", op.grain);
  if (op.rule == "sizes") {
    absl::StrAppend(&json, ",\"sizes\":[", absl::StrJoin(op.sizes, ","), "]");
  }
  if (!op.blocks.empty()) {
    absl::StrAppend(&json, ",\"blocks\":[", absl::StrJoin(op.blocks, ","), "]");
  }
  return json + "}";
}

std::string MeshJson(const Mesh& mesh) {
  std::string json;
  for (const auto& [name, size] : mesh) {
    absl::StrAppend(&json, json.empty() ? "" : ",", R"({"axis":")", name, R"(","size":)", size,
                    "}");
  }
  return absl::StrCat("[", json, "]");
}

std::string ListedJson(const std::vector<ListedSegment>& listed) {
  std::string json;
  for (const ListedSegment& segment : listed) {
    absl::StrAppend(&json, json.empty() ? "" : ",", R"({"ranks":[)",
                    absl::StrJoin(segment.ranks, ","), R"(],"lo":[)",
                    absl::StrJoin(segment.lo, ","), R"(],"size":[)",
                    absl::StrJoin(segment.size, ","), R"(],"buffer":")", segment.buffer,
                    R"(","offset_bytes":)", segment.offset_bytes);
    if (!segment.strides.empty()) {
      absl::StrAppend(&json, R"(,"strides":[)", absl::StrJoin(segment.strides, ","), "]");
    }
    json += "}";
  }
  return absl::StrCat("[", json, "]");
}

}  // namespace

std::vector<Tensor> RandomTensors(Random& random) {
  struct Type {
    std::string name;
    uint64_t bytes;
  };
  const std::vector<Type> types = {{"int64", 8},   {"int64", 8},    {"int64", 8}, {"float32", 4},
                                   {"float64", 8}, {"bfloat16", 2}, {"bool", 1}};
  std::vector<Tensor> tensors(1 + random() % 5);
  // Some large enough that writers share a replicated tensor.
  const uint64_t elements_max = Chance(random, 10) ? 8000 : 600;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].name = absl::StrCat("layer.", i, i % 2 ? "/weight" : "");
    uint64_t volume = 1;
    for (size_t d = random() % 6; d > 0; --d) {
      const uint64_t size = Pick<uint64_t>(random, {1, 2, 3, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 0});
      if (volume * size > elements_max) continue;
      if (size == 0 && Chance(random, 70)) continue;
      volume *= size;
      tensors[i].shape.push_back(size);
    }
    const size_t states = 1 + random() % 2;
    for (size_t s = 0; s < states; ++s) {
      const Type& type = Pick(random, types);
      State state;
      state.name = s == 0 ? "param" : "exp_avg";
      state.dtype = type.name;
      state.element_bytes = type.bytes;
      tensors[i].states.push_back(state);
    }
  }
  return tensors;
}

namespace {

// Another factorisation of as many ranks.
Mesh RandomMesh(Random& random, uint64_t world_size, const std::vector<std::string>& names) {
  Mesh mesh;
  for (const std::string& name : names) {
    std::vector<uint64_t> factors;
    for (uint64_t f = 1; f <= world_size; ++f) {
      if (world_size % f == 0) factors.push_back(f);
    }
    const uint64_t size = &name == &names.back() ? world_size : Pick(random, factors);
    mesh.emplace_back(name, size);
    world_size /= size;
  }
  return mesh;
}

void RandomOps(Random& random, const Document& document,
               const std::vector<std::string>& pack_dtypes, const Tensor& tensor, State& state) {
  const Mesh& mesh = document.meshes[state.mesh];
  std::optional<size_t> pack;
  if (!document.packs.empty() && Chance(random, 60)) {
    pack = random() % document.packs.size();
    if (pack_dtypes[*pack] != state.dtype || document.packs[*pack].mesh != state.mesh) pack.reset();
  }
  std::vector<bool> used(mesh.size(), false);
  if (pack.has_value()) {
    for (size_t axis : document.packs[*pack].axes) used[axis] = true;
  }
  // As the rank at coordinates 0 sees it; other ranks may find that something does not fit.
  Local local;
  local.shape = tensor.shape;
  local.elements.resize(Volume(tensor.shape));
  const auto add = [&](Op op) {
    if (op.kind == "view") {
      if (!View(op, local)) return;
    } else if (op.kind == "perm") {
      if (!Perm(op, local)) return;
    } else if (op.kind == "pad") {
      if (!Pad(mesh, op, local)) return;
    } else if (op.kind != "place") {
      if (op.kind == "flat") local.shape = {local.elements.size()};
      if (op.dim >= local.shape.size()) return;
      const auto hands = Deal(op, local.shape[op.dim], SizeOf(mesh, op.axes));
      if (!hands.has_value()) return;
      local = Select(local, op.dim, (*hands)[0]);
    }
    state.ops.push_back(std::move(op));
  };
  const bool plain = Chance(random, 50);  // narrows only
  bool flat = false;
  std::vector<size_t> order(mesh.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  const auto rearrange = [&] {
    if (plain || flat || !Chance(random, 50)) return;
    const int kind = static_cast<int>(random() % 3);
    if (kind == 0) add(RandomView(random, local.shape));
    if (kind == 1) {
      Op op;
      op.kind = "perm";
      op.perm.resize(local.shape.size());
      std::iota(op.perm.begin(), op.perm.end(), size_t{0});
      std::shuffle(op.perm.begin(), op.perm.end(), random);
      add(op);
    }
    if (kind == 2 && !local.shape.empty() && local.elements.size() < 2000) {
      add(RandomPad(random, mesh, local.shape));
    }
  };
  rearrange();
  rearrange();
  for (size_t axis : order) {
    if (used[axis] || Chance(random, 35)) continue;  // replicated
    used[axis] = true;
    if (Chance(random, 20)) {
      add(RandomPlace(random, mesh, axis));
      continue;
    }
    std::vector<size_t> axes = {axis};
    for (size_t other : order) {
      if (!used[other] && Chance(random, 15)) {
        used[other] = true;
        axes.push_back(other);
      }
    }
    add(RandomCut(random, mesh, local.shape, flat, axes));
    flat = flat || (!state.ops.empty() && state.ops.back().kind == "flat");
    rearrange();
  }
  Op last;
  last.pack = pack;
  if (pack.has_value()) {
    last.kind = "pack";
    last.axes = document.packs[*pack].axes;
    if (document.zero.has_value() && Chance(random, 50)) last.kind = "zero";
    state.ops.push_back(last);
  } else if (document.zero.has_value() && Chance(random, 50)) {
    for (const std::string& name : document.zero->axes) {
      size_t axis = 0;
      while (axis < mesh.size() && mesh[axis].first != name) ++axis;
      if (axis == mesh.size() || used[axis]) return;
      last.axes.push_back(axis);
    }
    last.kind = "zero";
    last.rule = Pick<std::string>(random, {"ceil", "balanced"});
    state.ops.push_back(last);
  }
}

}  // namespace

Document RandomDocument(Random& random, std::vector<Tensor> tensors) {
  Document document;
  document.meshes.emplace_back();
  const std::vector<std::string> axes = {"dp", "tp", "pp", "ep"};
  for (size_t i = random() % 5; i > 0; --i) {
    const uint64_t size = Pick<uint64_t>(random, {1, 2, 2, 3, 4, 5});
    if (document.WorldSize() * size <= 16) document.meshes[0].emplace_back(axes[i - 1], size);
  }
  while (Chance(random, 30)) {
    document.meshes.push_back(RandomMesh(random, document.WorldSize(),
                                         Chance(random, 50)
                                             ? std::vector<std::string>{"pp", "edp", "ep"}
                                             : std::vector<std::string>{"tp", "dp"}));
  }
  if (!document.meshes[0].empty() && Chance(random, 50)) {
    document.zero = Zero{random() % 4, {}, {{"param", 3}, {"grad", 2}, {"*", 1}}};
    for (const auto& [name, size] : document.meshes[0]) {
      if (document.zero->axes.empty() || Chance(random, 20)) document.zero->axes.push_back(name);
    }
    if (Chance(random, 30)) document.zero->from["exp_avg"] = 1 + random() % 3;
  }
  for (size_t i = random() % 3; i > 0; --i) {
    const size_t mesh = random() % document.meshes.size();
    if (document.meshes[mesh].empty()) continue;
    std::vector<size_t> pack_axes = {random() % document.meshes[mesh].size()};
    for (size_t axis = 0; axis < document.meshes[mesh].size(); ++axis) {
      if (axis != pack_axes[0] && Chance(random, 15)) pack_axes.push_back(axis);
    }
    if (Chance(random, 10)) pack_axes.clear();  // not cut
    document.packs.push_back({absl::StrCat("pack", i), mesh, pack_axes, 1 + random() % 4,
                              1 + random() % 5, absl::StrCat("flat", i)});
  }
  std::vector<std::string> pack_dtypes;
  for (size_t i = 0; i < document.packs.size(); ++i) {
    pack_dtypes.push_back(Pick<std::string>(random, {"int64", "int64", "float32"}));
  }
  std::map<std::string, uint64_t> arenas;  // bytes given away
  for (Tensor& tensor : tensors) {
    for (State& state : tensor.states) {
      if (Chance(random, 12)) {
        state.listed = RandomListed(random, document, tensor,
                                    absl::StrCat("listed/", state.name, "/", tensor.name));
        continue;
      }
      state.mesh = random() % document.meshes.size();
      RandomOps(random, document, pack_dtypes, tensor, state);
      const bool packed = !state.ops.empty() && state.ops.back().pack.has_value();
      if (!packed && Chance(random, 25)) {
        state.buffer = Pick<std::string>(random, {"arena/a", "arena/b"});
        state.offset_bytes = arenas[state.buffer] + random() % 20;
        // Padding and all: what any rank has there.
        arenas[state.buffer] = state.offset_bytes + uint64_t{1'000'000};
      }
    }
  }
  document.tensors = std::move(tensors);
  return document;
}

std::string ToJson(const Document& document, Random& random) {
  std::string meshes;
  for (size_t i = 1; i < document.meshes.size(); ++i) {
    absl::StrAppend(&meshes, i > 1 ? "," : "", "\"m", i, "\":", MeshJson(document.meshes[i]));
  }
  std::string zero;
  if (document.zero.has_value()) {
    std::string states;
    for (const auto& [name, from] : document.zero->from) {
      absl::StrAppend(&states, states.empty() ? "" : ",", "\"", name, "\":", from);
    }
    zero = absl::StrCat(R"("zero":{"stage":)", document.zero->stage, R"(,"axis":[")",
                        absl::StrJoin(document.zero->axes, "\",\""), R"("],"states":{)", states,
                        "}},");
  }
  std::string packs;
  for (const Pack& pack : document.packs) {
    absl::StrAppend(&packs, packs.empty() ? "" : ",", R"({"pack":")", pack.name, R"(","axis":)",
                    AxisJson(document.meshes[pack.mesh], pack.axes),
                    pack.mesh == 0 ? "" : absl::StrCat(R"(,"mesh":"m)", pack.mesh, "\""),
                    R"(,"align_elements":)", pack.align, R"(,"multiple_elements":)", pack.multiple,
                    R"(,"buffer":")", pack.buffer, "\"}");
  }
  std::string placements;
  std::string tensors;
  size_t placement_count = 0;
  for (const Tensor& tensor : document.tensors) {
    std::string states;
    for (const State& state : tensor.states) {
      absl::StrAppend(&states, states.empty() ? "" : ",", R"({"state":")", state.name,
                      R"(","dtype":")", state.dtype, "\"");
      if (state.listed.has_value()) {
        absl::StrAppend(&states, R"(,"segments":)", ListedJson(*state.listed), "}");
        continue;
      }
      std::vector<std::string> ops;
      for (const Op& op : state.ops) {
        ops.push_back(OpJson(document, document.meshes[state.mesh], op));
      }
      std::string place = absl::StrCat("[", absl::StrJoin(ops, ","), "]");
      if (state.mesh != 0) {
        place = absl::StrCat(R"({"mesh":"m)", state.mesh, R"(","ops":)", place, "}");
      }
      if (Chance(random, 50)) {
        const std::string name = absl::StrCat("p", placement_count++);
        absl::StrAppend(&placements, placements.empty() ? "" : ",", "\"", name, "\":", place);
        place = absl::StrCat("\"", name, "\"");
      }
      if (!state.ops.empty() || Chance(random, 50)) absl::StrAppend(&states, ",\"place\":", place);
      if (!state.buffer.empty()) {
        absl::StrAppend(&states, ",\"buffer\":\"", state.buffer,
                        "\",\"offset_bytes\":", state.offset_bytes);
      }
      states += "}";
    }
    absl::StrAppend(&tensors, tensors.empty() ? "" : ",", R"({"name":")", tensor.name,
                    R"(","shape":[)", absl::StrJoin(tensor.shape, ","), R"(],"states":[)", states,
                    "]}");
  }
  return absl::StrCat(R"({"holdfast_layout":1,"mesh":)", MeshJson(document.meshes[0]),
                      R"(,"meshes":{)", meshes, "},", zero, R"("packs":[)", packs,
                      R"(],"placements":{)", placements, R"(},"tensors":[)", tensors, "]}");
}

}  // namespace holdfast::oracle
