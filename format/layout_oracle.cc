#include "format/layout_oracle.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "format/layout_oracle_local.h"

namespace holdfast::oracle {

uint64_t Document::WorldSize() const {
  uint64_t size = 1;
  for (const auto& axis : meshes[0]) size *= axis.second;
  return size;
}

uint64_t ValueOf(size_t number, uint64_t element) {
  return element + 37 * number + (uint64_t{number} << 40);
}

uint64_t Volume(const std::vector<uint64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
}

uint64_t SizeOf(const Mesh& mesh, const std::vector<size_t>& axes) {
  uint64_t size = 1;
  for (size_t axis : axes) size *= mesh[axis].second;
  return size;
}

namespace {

std::optional<std::vector<std::vector<uint64_t>>> DealOne(const Op& op, uint64_t n, uint64_t k) {
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

}  // namespace

std::optional<std::vector<std::vector<uint64_t>>> Deal(const Op& op, uint64_t n, uint64_t k) {
  if (op.blocks.empty()) return DealOne(op, n, k);
  std::vector<std::vector<uint64_t>> hands(k);
  uint64_t begin = 0;
  for (uint64_t width : op.blocks) {
    const auto of_block = DealOne(op, width, k);
    if (!of_block.has_value()) return std::nullopt;
    for (uint64_t hand = 0; hand < k; ++hand) {
      for (uint64_t index : (*of_block)[hand]) hands[hand].push_back(begin + index);
    }
    begin += width;
  }
  if (begin != n) return std::nullopt;
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

bool View(const Op& op, Local& local) {
  std::vector<uint64_t> shape;
  uint64_t others = 1;
  for (int64_t size : op.view) {
    if (size >= 0) others *= static_cast<uint64_t>(size);
  }
  for (int64_t size : op.view) {
    if (size < 0 && (others == 0 || local.elements.size() % others != 0)) return false;
    shape.push_back(size < 0 ? local.elements.size() / others : static_cast<uint64_t>(size));
  }
  if (Volume(shape) != local.elements.size()) return false;
  local.shape = shape;
  return true;
}

bool Perm(const Op& op, Local& local) {
  if (op.perm.size() != local.shape.size()) return false;
  Local out;
  for (size_t dim : op.perm) out.shape.push_back(local.shape[dim]);
  for (uint64_t i = 0; i < local.elements.size(); ++i) {
    std::vector<uint64_t> at(local.shape.size());  // in the old order
    uint64_t rest = i;
    for (size_t d = op.perm.size(); d-- > 0;) {
      at[op.perm[d]] = rest % out.shape[d];
      rest /= out.shape[d];
    }
    uint64_t old = 0;
    for (size_t d = 0; d < at.size(); ++d) old = old * local.shape[d] + at[d];
    out.elements.push_back(local.elements[old]);
  }
  local = out;
  return true;
}

bool Pad(const Mesh& mesh, const Op& op, Local& local) {
  if (op.dim >= local.shape.size()) return false;
  const uint64_t old = local.shape[op.dim];
  uint64_t size = std::max(old, op.size_min);
  while (size % (op.multiple * SizeOf(mesh, op.multiple_axes)) != 0) ++size;
  Local out;
  out.shape = local.shape;
  out.shape[op.dim] = size;
  const uint64_t inner =
      Volume({local.shape.begin() + static_cast<long>(op.dim) + 1, local.shape.end()});
  const uint64_t outer =
      Volume({local.shape.begin(), local.shape.begin() + static_cast<long>(op.dim)});
  for (uint64_t o = 0; o < outer; ++o) {
    for (uint64_t x = 0; x < size; ++x) {
      for (uint64_t i = 0; i < inner; ++i) {
        out.elements.push_back(x < old ? local.elements[(o * old + x) * inner + i] : kPadding);
      }
    }
  }
  local = out;
  return true;
}

namespace {

// The last axis varies fastest.
uint64_t Joint(const Mesh& mesh, const std::vector<size_t>& axes,
               const std::vector<uint64_t>& coordinates) {
  uint64_t joint = 0;
  for (size_t axis : axes) joint = joint * mesh[axis].second + coordinates[axis];
  return joint;
}

std::vector<uint64_t> CoordinatesOf(const Mesh& mesh, uint64_t rank) {
  std::vector<uint64_t> coordinates(mesh.size());
  for (size_t axis = mesh.size(); axis-- > 0;) {
    coordinates[axis] = rank % mesh[axis].second;
    rank /= mesh[axis].second;
  }
  return coordinates;
}

// Whether a place is held here; nothing if the rule does not fit.
std::optional<bool> Placed(const Mesh& mesh, const Op& op, uint64_t coordinate) {
  const int64_t size = static_cast<int64_t>(mesh[op.axes[0]].second);
  if (op.count == 0) {
    return std::any_of(op.coordinates.begin(), op.coordinates.end(), [&](int64_t c) {
      return static_cast<uint64_t>(c < 0 ? c + size : c) == coordinate;
    });
  }
  const uint64_t slots = op.rounds * static_cast<uint64_t>(size);
  const auto hands = Deal(op, op.count, slots);
  if (!hands.has_value()) return std::nullopt;
  for (uint64_t slot = 0; slot < slots; ++slot) {
    for (uint64_t each : (*hands)[slot]) {
      if (each == op.index) return slot % static_cast<uint64_t>(size) == coordinate;
    }
  }
  return std::nullopt;
}

struct PackCell {
  bool padding = true;
  uint64_t value = 0;
};

// What the buffers of one rank hold, tensor state by tensor state.
class Lowering {
 public:
  Lowering(const Document& document, uint64_t rank)
      : document_(document),
        rank_(rank),
        packs_(document.packs.size()),
        pack_element_bytes_(document.packs.size(), 0) {}

  bool Add(const Tensor& tensor, const State& state, size_t number) {
    if (state.listed.has_value()) {
      for (const ListedSegment& segment : *state.listed) AddListed(tensor, state, segment, number);
      return true;
    }
    const Mesh& mesh = document_.meshes[state.mesh];
    const std::vector<uint64_t> coordinates = CoordinatesOf(mesh, rank_);
    Local local;
    local.shape = tensor.shape;
    local.elements.resize(Volume(tensor.shape));
    std::iota(local.elements.begin(), local.elements.end(), uint64_t{0});
    bool held = true;
    for (Op op : state.ops) {
      if (op.kind == "zero") {
        const auto& from = document_.zero->from;
        const auto named = from.find(state.name);
        if (document_.zero->stage < (named == from.end() ? from.at("*") : named->second)) continue;
        op.kind = op.pack.has_value() ? "pack" : "flat";
      }
      if (op.kind == "place") {
        const auto placed = Placed(mesh, op, coordinates[op.axes[0]]);
        if (!placed.has_value()) return false;
        held = held && *placed;
      } else if (op.kind == "view") {
        if (!View(op, local)) return false;
      } else if (op.kind == "perm") {
        if (!Perm(op, local)) return false;
      } else if (op.kind == "pad") {
        if (!Pad(mesh, op, local)) return false;
      } else if (op.kind == "pack") {
        if (held) AddToPack(*op.pack, local, state, number);
        return true;
      } else {
        if (op.kind == "flat") local.shape = {local.elements.size()};
        if (op.dim >= local.shape.size()) return false;
        const auto hands = Deal(op, local.shape[op.dim], SizeOf(mesh, op.axes));
        if (!hands.has_value()) return false;
        local = Select(local, op.dim, (*hands)[Joint(mesh, op.axes, coordinates)]);
      }
    }
    if (held) AddLocal(tensor, state, local, number);
    return true;
  }

  std::map<std::string, std::vector<uint8_t>> Finish() {
    for (size_t i = 0; i < packs_.size(); ++i) {
      if (pack_element_bytes_[i] == 0) continue;
      const Pack& pack = document_.packs[i];
      const Mesh& mesh = document_.meshes[pack.mesh];
      const uint64_t parts = SizeOf(mesh, pack.axes);
      while (packs_[i].size() % (pack.multiple * parts) != 0) packs_[i].emplace_back();
      const uint64_t slice = packs_[i].size() / parts;
      const uint64_t mine = Joint(mesh, pack.axes, CoordinatesOf(mesh, rank_));
      std::vector<uint8_t>& buffer = buffers_[pack.buffer];
      for (uint64_t e = 0; e < slice; ++e) {
        const PackCell& cell = packs_[i][mine * slice + e];
        for (uint64_t b = 0; b < pack_element_bytes_[i]; ++b) {
          buffer.push_back(cell.padding ? kNothing : static_cast<uint8_t>(cell.value >> (8 * b)));
        }
      }
    }
    return std::move(buffers_);
  }

 private:
  static void Put(std::vector<uint8_t>& buffer, uint64_t at, const State& state, uint64_t value) {
    for (uint64_t b = 0; b < state.element_bytes; ++b) {
      buffer[at + b] = static_cast<uint8_t>(value >> (8 * b));
    }
  }

  void AddLocal(const Tensor& tensor, const State& state, const Local& local, size_t number) {
    const std::string name =
        state.buffer.empty() ? absl::StrCat(state.name, "/", tensor.name) : state.buffer;
    std::vector<uint8_t>& buffer = buffers_[name];
    if (local.elements.empty()) return;
    const uint64_t end = state.offset_bytes + local.elements.size() * state.element_bytes;
    if (buffer.size() < end) buffer.resize(end, kNothing);
    uint64_t at = state.offset_bytes;
    for (uint64_t element : local.elements) {
      if (element != kPadding) Put(buffer, at, state, ValueOf(number, element));
      at += state.element_bytes;
    }
  }

  void AddToPack(size_t index, const Local& local, const State& state, size_t number) {
    std::vector<PackCell>& pack = packs_[index];
    pack_element_bytes_[index] = state.element_bytes;
    while (pack.size() % document_.packs[index].align != 0) pack.emplace_back();
    for (uint64_t element : local.elements) {
      if (element == kPadding) {
        pack.emplace_back();
      } else {
        pack.push_back({false, ValueOf(number, element)});
      }
    }
  }

  void AddListed(const Tensor& tensor, const State& state, const ListedSegment& segment,
                 size_t number) {
    if (std::count(segment.ranks.begin(), segment.ranks.end(), rank_) == 0) return;
    std::vector<uint8_t>& buffer = buffers_[segment.buffer];
    for (uint64_t i = 0; i < Volume(segment.size); ++i) {
      uint64_t rest = i;
      uint64_t place = segment.strides.empty() ? i : 0;
      uint64_t element = 0;
      uint64_t weight = 1;
      for (size_t d = segment.size.size(); d-- > 0;) {
        const uint64_t x = rest % segment.size[d];
        rest /= segment.size[d];
        if (!segment.strides.empty()) place += x * segment.strides[d];
        element += (segment.lo[d] + x) * weight;
        weight *= tensor.shape[d];
      }
      const uint64_t at = segment.offset_bytes + place * state.element_bytes;
      if (buffer.size() < at + state.element_bytes) {
        buffer.resize(at + state.element_bytes, kNothing);
      }
      Put(buffer, at, state, ValueOf(number, element));
    }
  }

  const Document& document_;
  const uint64_t rank_;
  std::map<std::string, std::vector<uint8_t>> buffers_;
  std::vector<std::vector<PackCell>> packs_;
  std::vector<uint64_t> pack_element_bytes_;  // 0: nothing held
};

}  // namespace

std::optional<std::map<std::string, std::vector<uint8_t>>> Lower(const Document& document,
                                                                 uint64_t rank) {
  Lowering lowering(document, rank);
  size_t number = 0;
  for (const Tensor& tensor : document.tensors) {
    for (const State& state : tensor.states) {
      if (!lowering.Add(tensor, state, number++)) return std::nullopt;
    }
  }
  return lowering.Finish();
}

}  // namespace holdfast::oracle
