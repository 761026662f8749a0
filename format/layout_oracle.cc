#include "format/layout_oracle.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace holdfast::oracle {
namespace {

// A local tensor: the global element numbers, row-major, with the local shape.
struct Local {
  std::vector<uint64_t> shape;
  std::vector<uint64_t> elements;
};

// Indices 0..n-1 dealt to k hands, in order; nothing if the rule does not fit.
std::optional<std::vector<std::vector<uint64_t>>> Deal(const Op& op, uint64_t n, uint64_t k) {
  std::vector<std::vector<uint64_t>> hands(k);
  if (op.rule == "sizes") {
    uint64_t next = 0;
    for (uint64_t hand = 0; hand < k; ++hand) {
      for (uint64_t i = 0; i < op.sizes[hand]; ++i) hands[hand].push_back(next++);
    }
    if (next != n) return std::nullopt;
    return hands;
  }
  std::vector<std::vector<uint64_t>> grains;
  for (uint64_t i = 0; i < n; ++i) {
    if (i % op.grain == 0) grains.emplace_back();
    grains.back().push_back(i);
  }
  if (op.rule == "even") {
    if (n % op.grain != 0 || grains.size() % k != 0) return std::nullopt;
  }
  if (op.rule == "balanced") {
    // One grain at a time tells how many each gets; then they are dealt in order.
    std::vector<uint64_t> count(k, 0);
    for (size_t i = 0; i < grains.size(); ++i) ++count[i % k];
    size_t next = 0;
    for (uint64_t hand = 0; hand < k; ++hand) {
      for (uint64_t i = 0; i < count[hand]; ++i, ++next) {
        hands[hand].insert(hands[hand].end(), grains[next].begin(), grains[next].end());
      }
    }
    return hands;
  }
  // torch.chunk: chunks of ceil(n / k) until nothing is left.
  uint64_t chunk = 0;
  while (chunk * k < grains.size()) ++chunk;
  for (size_t i = 0; i < grains.size(); ++i) {
    std::vector<uint64_t>& hand = hands[i / chunk];
    hand.insert(hand.end(), grains[i].begin(), grains[i].end());
  }
  return hands;
}

Local Select(const Local& local, size_t dim, const std::vector<uint64_t>& indices) {
  Local out;
  out.shape = local.shape;
  out.shape[dim] = indices.size();
  const uint64_t outer =
      std::accumulate(local.shape.begin(), local.shape.begin() + static_cast<long>(dim),
                      uint64_t{1}, std::multiplies<>());
  const uint64_t inner = std::accumulate(local.shape.begin() + static_cast<long>(dim) + 1,
                                         local.shape.end(), uint64_t{1}, std::multiplies<>());
  for (uint64_t o = 0; o < outer; ++o) {
    for (uint64_t index : indices) {
      for (uint64_t i = 0; i < inner; ++i) {
        out.elements.push_back(local.elements[(o * local.shape[dim] + index) * inner + i]);
      }
    }
  }
  return out;
}

template <typename T>
const T& Pick(Random& random, const std::vector<T>& from) {
  return from[random() % from.size()];
}

bool Chance(Random& random, int percent) { return static_cast<int>(random() % 100) < percent; }

Op RandomCut(Random& random, const Document& document, const std::vector<uint64_t>& shape,
             bool behind_flat, size_t axis) {
  Op op;
  op.axis = axis;
  const bool flat = shape.empty() || Chance(random, behind_flat ? 50 : 25);
  op.kind = flat ? "flat" : "shard";
  if (!flat && !behind_flat) op.dim = random() % shape.size();
  op.rule = Pick<std::string>(random, {"ceil", "ceil", "balanced", "balanced", "even", "sizes"});
  const uint64_t parts = document.mesh[axis].second;
  if (op.rule == "sizes") {
    uint64_t left = flat || behind_flat ? std::accumulate(shape.begin(), shape.end(), uint64_t{1},
                                                          std::multiplies<>())
                                        : shape[op.dim];
    for (uint64_t i = 0; i + 1 < parts; ++i) {
      op.sizes.push_back(random() % (left + 1));
      left -= op.sizes.back();
    }
    op.sizes.push_back(left);
    std::shuffle(op.sizes.begin(), op.sizes.end(), random);
  } else if (Chance(random, 20)) {
    op.grain = 1 + random() % 4;
  }
  return op;
}

std::string OpJson(const Document& document, const Op& op) {
  if (op.kind == "pack") {
    return absl::StrCat(R"({"op":"pack","pack":")", document.packs[op.pack].name, "\"}");
  }
  std::string json =
      absl::StrCat("{\"op\":\"", op.kind, "\",\"axis\":\"", document.mesh[op.axis].first, "\"");
  if (op.kind == "place") {
    return absl::StrCat(json, ",\"coordinates\":[", absl::StrJoin(op.coordinates, ","), "]}");
  }
  if (op.kind == "shard") absl::StrAppend(&json, ",\"dim\":", op.dim);
  absl::StrAppend(&json, ",\"rule\":\"", op.rule, "\"");
  if (op.grain != 1) absl::StrAppend(&json, ",\"grain\":", op.grain);
  if (op.rule == "sizes") {
    absl::StrAppend(&json, ",\"sizes\":[", absl::StrJoin(op.sizes, ","), "]");
  }
  return json + "}";
}

}  // namespace

uint64_t Document::WorldSize() const {
  uint64_t size = 1;
  for (const auto& axis : mesh) size *= axis.second;
  return size;
}

uint64_t ValueOf(size_t number, uint64_t element) {
  return element + 37 * number + (uint64_t{number} << 40);
}

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

Document RandomDocument(Random& random, std::vector<Tensor> tensors) {
  Document document;
  const std::vector<std::string> axes = {"dp", "tp", "pp", "ep"};
  for (size_t i = random() % 5; i > 0; --i) {
    const uint64_t size = Pick<uint64_t>(random, {1, 2, 2, 3, 4, 5});
    if (document.WorldSize() * size <= 16) document.mesh.emplace_back(axes[i - 1], size);
  }
  if (!document.mesh.empty()) {
    for (size_t i = random() % 3; i > 0; --i) {
      document.packs.push_back({absl::StrCat("pack", i), random() % document.mesh.size(),
                                1 + random() % 4, 1 + random() % 5, absl::StrCat("flat", i)});
    }
  }
  std::vector<std::string> pack_dtypes;
  for (size_t i = 0; i < document.packs.size(); ++i) {
    pack_dtypes.push_back(Pick<std::string>(random, {"int64", "int64", "float32"}));
  }
  std::map<std::string, uint64_t> arenas;  // bytes given away
  for (Tensor& tensor : tensors) {
    for (State& state : tensor.states) {
      std::vector<size_t> order(document.mesh.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::shuffle(order.begin(), order.end(), random);
      size_t pack = document.packs.size();
      if (!document.packs.empty() && Chance(random, 60)) {
        pack = random() % document.packs.size();
        if (pack_dtypes[pack] != state.dtype) pack = document.packs.size();
      }
      bool flat = false;
      for (size_t axis : order) {
        if (pack < document.packs.size() && document.packs[pack].axis == axis) continue;
        if (Chance(random, 40)) continue;  // replicated
        if (Chance(random, 20)) {
          Op op;
          op.kind = "place";
          op.axis = axis;
          for (uint64_t c = 0; c < document.mesh[axis].second; ++c) {
            if (Chance(random, 50)) op.coordinates.push_back(c);
          }
          if (!op.coordinates.empty()) state.ops.push_back(op);
          continue;
        }
        state.ops.push_back(RandomCut(random, document, tensor.shape, flat, axis));
        flat = flat || state.ops.back().kind == "flat";
      }
      if (pack < document.packs.size()) {
        Op op;
        op.kind = "pack";
        op.pack = pack;
        op.axis = document.packs[pack].axis;
        state.ops.push_back(op);
      } else if (Chance(random, 25)) {
        state.buffer = Pick<std::string>(random, {"arena/a", "arena/b"});
        state.offset_bytes = arenas[state.buffer] + random() % 20;
        uint64_t bytes = state.element_bytes;
        for (uint64_t size : tensor.shape) bytes *= size;
        arenas[state.buffer] = state.offset_bytes + bytes;
      }
    }
  }
  document.tensors = std::move(tensors);
  return document;
}

std::string ToJson(const Document& document, Random& random) {
  std::string mesh;
  for (const auto& [name, size] : document.mesh) {
    absl::StrAppend(&mesh, mesh.empty() ? "" : ",", R"({"axis":")", name, R"(","size":)", size,
                    "}");
  }
  std::string packs;
  for (const Pack& pack : document.packs) {
    absl::StrAppend(&packs, packs.empty() ? "" : ",", R"({"pack":")", pack.name, R"(","axis":")",
                    document.mesh[pack.axis].first, R"(","align_elements":)", pack.align,
                    R"(,"multiple_elements":)", pack.multiple, R"(,"buffer":")", pack.buffer,
                    "\"}");
  }
  std::string placements;
  std::string tensors;
  size_t placement_count = 0;
  for (const Tensor& tensor : document.tensors) {
    std::string states;
    for (const State& state : tensor.states) {
      std::vector<std::string> ops;
      for (const Op& op : state.ops) ops.push_back(OpJson(document, op));
      std::string place = absl::StrCat("[", absl::StrJoin(ops, ","), "]");
      if (Chance(random, 50)) {
        const std::string name = absl::StrCat("p", placement_count++);
        absl::StrAppend(&placements, placements.empty() ? "" : ",", "\"", name, "\":", place);
        place = absl::StrCat("\"", name, "\"");
      }
      absl::StrAppend(&states, states.empty() ? "" : ",", R"({"state":")", state.name,
                      R"(","dtype":")", state.dtype, "\"");
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
  return absl::StrCat(R"({"holdfast_layout":1,"mesh":[)", mesh, R"(],"packs":[)", packs,
                      R"(],"placements":{)", placements, R"(},"tensors":[)", tensors, "]}");
}

std::optional<std::map<std::string, std::vector<uint8_t>>> Lower(const Document& document,
                                                                 uint64_t rank) {
  std::vector<uint64_t> coordinates(document.mesh.size());
  for (size_t axis = document.mesh.size(); axis-- > 0;) {
    coordinates[axis] = rank % document.mesh[axis].second;
    rank /= document.mesh[axis].second;
  }
  std::map<std::string, std::vector<uint8_t>> buffers;
  struct PackCell {
    bool padding = true;
    uint64_t value = 0;
  };
  std::vector<std::vector<PackCell>> packs(document.packs.size());
  std::vector<uint64_t> pack_element_bytes(document.packs.size(), 0);  // 0: nothing held
  size_t number = 0;
  for (const Tensor& tensor : document.tensors) {
    for (const State& state : tensor.states) {
      const size_t mine = number++;
      Local local;
      local.shape = tensor.shape;
      local.elements.resize(std::accumulate(tensor.shape.begin(), tensor.shape.end(), uint64_t{1},
                                            std::multiplies<>()));
      std::iota(local.elements.begin(), local.elements.end(), uint64_t{0});
      bool held = true;
      bool packed = false;
      for (const Op& op : state.ops) {
        if (op.kind == "place") {
          held = held &&
                 std::count(op.coordinates.begin(), op.coordinates.end(), coordinates[op.axis]) > 0;
        } else if (op.kind == "pack") {
          packed = true;
          if (!held) break;
          std::vector<PackCell>& pack = packs[op.pack];
          pack_element_bytes[op.pack] = state.element_bytes;
          while (pack.size() % document.packs[op.pack].align != 0) pack.emplace_back();
          for (uint64_t element : local.elements) pack.push_back({false, ValueOf(mine, element)});
        } else {
          if (op.kind == "flat") local.shape = {local.elements.size()};
          if (op.dim >= local.shape.size()) return std::nullopt;
          const auto hands = Deal(op, local.shape[op.dim], document.mesh[op.axis].second);
          if (!hands.has_value()) return std::nullopt;
          local = Select(local, op.dim, (*hands)[coordinates[op.axis]]);
        }
      }
      if (!held || packed) continue;
      const std::string name =
          state.buffer.empty() ? absl::StrCat(state.name, "/", tensor.name) : state.buffer;
      std::vector<uint8_t>& buffer = buffers[name];
      const uint64_t end = local.elements.empty()
                               ? 0
                               : state.offset_bytes + local.elements.size() * state.element_bytes;
      if (buffer.size() < end) buffer.resize(end, kNothing);
      uint64_t at = state.offset_bytes;
      for (uint64_t element : local.elements) {
        for (uint64_t b = 0; b < state.element_bytes; ++b) {
          buffer[at++] = static_cast<uint8_t>(ValueOf(mine, element) >> (8 * b));
        }
      }
    }
  }
  for (size_t i = 0; i < packs.size(); ++i) {
    if (pack_element_bytes[i] == 0) continue;
    const uint64_t parts = document.mesh[document.packs[i].axis].second;
    while (packs[i].size() % (document.packs[i].multiple * parts) != 0) packs[i].emplace_back();
    const uint64_t slice = packs[i].size() / parts;
    std::vector<uint8_t>& buffer = buffers[document.packs[i].buffer];
    for (uint64_t e = 0; e < slice; ++e) {
      const PackCell& cell = packs[i][coordinates[document.packs[i].axis] * slice + e];
      for (uint64_t b = 0; b < pack_element_bytes[i]; ++b) {
        buffer.push_back(cell.padding ? kNothing : static_cast<uint8_t>(cell.value >> (8 * b)));
      }
    }
  }
  return buffers;
}

}  // namespace holdfast::oracle
