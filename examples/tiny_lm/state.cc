#include "examples/tiny_lm/state.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "examples/tiny_lm/events.h"
#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {
namespace {

constexpr uint64_t kBallastTensorPages = 16384;  // 64 MiB
constexpr const char* kOptimizerStates[] = {"master", "exp_avg", "exp_avg_sq"};

uint64_t PagesOf(uint64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes; }

Ballast MakeBallast(const Layout& layout) {
  const uint64_t pages = PagesOf(layout.ballast_bytes);
  const Slice slice = SliceOf(layout, pages * kPageElements, kPageElements);
  const uint64_t first = std::min<uint64_t>(slice.begin / kPageElements, pages);
  const uint64_t room = slice.count / kPageElements;
  return Ballast(first, std::min(room, pages - first), room);
}

std::string Shape(const std::vector<size_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ","), "]");
}

}  // namespace

Slice SliceOf(const Layout& layout, size_t element_count, size_t multiple) {
  if (layout.zero == Zero::kReplicated) return {0, element_count};
  const size_t unit = multiple * layout.world_size;
  const size_t count = (element_count + unit - 1) / unit * multiple;
  return {layout.rank * count, count};
}

uint64_t DigestOf(const Piece& piece) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < piece.count; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, piece.data + i * piece.element_bytes, piece.element_bytes);
    sum += Mix(Mix(piece.begin + i) + bits);
  }
  return sum;
}

TrainingState::TrainingState(const ParameterTable& table, const Layout& layout, uint64_t seed)
    : ballast(MakeBallast(layout)),
      table_(table),
      layout_(layout),
      own_(SliceOf(layout, table.element_count(), 1)) {
  const size_t padded =
      layout.zero == Zero::kReplicated ? table.element_count() : own_.count * layout.world_size;
  parameters.resize(padded);
  for (std::vector<float>* state : {&master, &exp_avg, &exp_avg_sq}) state->resize(own_.count);
  for (const Parameter& parameter : table.parameters()) {
    for (size_t i = parameter.offset; i < parameter.offset + parameter.count; ++i) {
      const float value = ParameterTable::StartValue(seed, parameter, i);
      parameters[i] = ToBfloat16(value);
      if (i >= own_.begin && i < own_.begin + own_.count) master[i - own_.begin] = value;
    }
  }
  const uint64_t pages = PagesOf(layout.ballast_bytes);
  for (uint64_t page = 0; page < pages; page += kBallastTensorPages) {
    const uint64_t count = std::min(kBallastTensorPages, pages - page);
    ballast_tensors_.push_back({absl::StrFormat("ballast.%04d", page / kBallastTensorPages),
                                page * kPageElements, count * kPageElements});
  }
}

std::string TrainingState::PacksJson() const {
  if (layout_.zero == Zero::kReplicated) return "[]";
  std::vector<std::string> packs;
  const auto add = [&](const std::string& name, size_t multiple) {
    packs.push_back(
        absl::StrFormat("{\"pack\":\"%s\",\"axis\":\"dp\",\"align_elements\":%d,"
                        "\"multiple_elements\":%d,\"buffer\":\"%s\"}",
                        name, multiple, multiple, name));
  };
  for (const char* state : kOptimizerStates) add(state, 1);
  if (!ballast_tensors_.empty()) add("ballast", kPageElements);
  return absl::StrCat("[", absl::StrJoin(packs, ","), "]");
}

std::string TrainingState::ParameterJson(const Parameter& parameter) const {
  std::string states = "{\"state\":\"param\",\"dtype\":\"bfloat16\"}";
  for (const char* state : kOptimizerStates) {
    absl::StrAppend(&states, ",{\"state\":\"", state, "\",\"dtype\":\"float32\",");
    if (layout_.zero == Zero::kReplicated) {
      absl::StrAppendFormat(&states, "\"buffer\":\"%s\",\"offset_bytes\":%d}", state,
                            parameter.offset * sizeof(float));
    } else {
      absl::StrAppendFormat(&states, "\"place\":[{\"op\":\"pack\",\"pack\":\"%s\"}]}", state);
    }
  }
  return absl::StrFormat("{\"name\":%s,\"shape\":%s,\"states\":[%s]}", JsonString(parameter.name),
                         Shape(parameter.shape), states);
}

std::string TrainingState::BallastJson(const BallastTensor& tensor) const {
  const std::string where = layout_.zero == Zero::kReplicated
                                ? absl::StrFormat("\"buffer\":\"ballast\",\"offset_bytes\":%d",
                                                  tensor.begin * sizeof(uint64_t))
                                : std::string("\"place\":[{\"op\":\"pack\",\"pack\":\"ballast\"}]");
  return absl::StrFormat(
      "{\"name\":\"%s\",\"shape\":[%d,%d],\"states\":[{\"state\":\"ballast\",\"dtype\":\"uint64\","
      "%s}]}",
      tensor.name, tensor.count / kPageElements, kPageElements, where);
}

std::string TrainingState::LayoutJson() const {
  std::vector<std::string> tensors;
  for (const Parameter& parameter : table_.parameters()) {
    tensors.push_back(ParameterJson(parameter));
  }
  tensors.push_back(
      "{\"name\":\"optimizer\",\"shape\":[],\"states\":[{\"state\":\"step\",\"dtype\":\"int64\"}]"
      "}");
  for (const BallastTensor& tensor : ballast_tensors_) tensors.push_back(BallastJson(tensor));
  return absl::StrFormat(
      "{\"holdfast_layout\":1,\"mesh\":[{\"axis\":\"dp\",\"size\":%d}],\"packs\":%s,"
      "\"tensors\":[%s]}",
      layout_.world_size, PacksJson(), absl::StrJoin(tensors, ","));
}

std::vector<StateBuffer> TrainingState::Buffers() {
  std::vector<StateBuffer> buffers;
  for (const Parameter& parameter : table_.parameters()) {
    buffers.push_back({absl::StrCat("param/", parameter.name), parameters.data() + parameter.offset,
                       parameter.count * sizeof(uint16_t), 0});
  }
  buffers.push_back({"step/optimizer", &optimizer_step, sizeof(optimizer_step), 0});
  if (own_.begin < table_.element_count()) {
    const uint64_t bytes = own_.count * sizeof(float);
    buffers.push_back({"master", master.data(), bytes, 1});
    buffers.push_back({"exp_avg", exp_avg.data(), bytes, 1});
    buffers.push_back({"exp_avg_sq", exp_avg_sq.data(), bytes, 1});
  }
  if (ballast.page_count() > 0) {
    const Slice slice =
        SliceOf(layout_, PagesOf(layout_.ballast_bytes) * kPageElements, kPageElements);
    buffers.push_back({"ballast", ballast.data(), slice.count * sizeof(uint64_t), 2});
  }
  return buffers;
}

// Adds the part of a tensor that begins at `tensor_begin` of a flat array of which `held` is here.
void TrainingState::AddPiece(std::vector<Piece>& pieces, Piece whole, size_t tensor_begin,
                             Slice held, const void* data) const {
  const size_t begin = std::max(tensor_begin, held.begin);
  const size_t end = std::min(tensor_begin + whole.count, held.begin + held.count);
  if (begin >= end) return;
  whole.begin = begin - tensor_begin;
  whole.count = end - begin;
  whole.data = static_cast<const std::byte*>(data) + (begin - held.begin) * whole.element_bytes;
  pieces.push_back(std::move(whole));
}

std::vector<Piece> TrainingState::Pieces() const {
  std::vector<Piece> pieces;
  const bool replicated = layout_.zero == Zero::kReplicated;
  const Slice everything{0, table_.element_count()};
  for (const Parameter& parameter : table_.parameters()) {
    const std::string& name = parameter.name;
    const size_t offset = parameter.offset;
    const size_t count = parameter.count;
    AddPiece(pieces, {name, "param", 0, count, sizeof(uint16_t), true, nullptr}, offset, everything,
             parameters.data());
    const std::pair<const char*, const std::vector<float>*> states[] = {
        {"master", &master}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
    for (const auto& [state, values] : states) {
      AddPiece(pieces, {name, state, 0, count, sizeof(float), replicated, nullptr}, offset, own_,
               values->data());
    }
  }
  AddPiece(pieces, {"optimizer", "step", 0, 1, sizeof(int64_t), true, nullptr}, 0, {0, 1},
           &optimizer_step);
  const Slice held{ballast.first_page() * kPageElements, ballast.page_count() * kPageElements};
  for (const BallastTensor& tensor : ballast_tensors_) {
    AddPiece(pieces,
             {tensor.name, "ballast", 0, tensor.count, sizeof(uint64_t), replicated, nullptr},
             tensor.begin, held, ballast.data());
  }
  return pieces;
}

}  // namespace tiny_lm
