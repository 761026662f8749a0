#include "examples/tiny_lm/state.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {

uint64_t DigestOf(const Piece& piece) {
  uint64_t sum = 0;
  const std::byte* data = piece.data;
  const uint64_t end = piece.begin + piece.count;
  for (uint64_t local = piece.begin; local < end;) {
    // A stretch of elements that lie one behind the other in the tensor too.
    const uint64_t count = std::min(end - local, piece.index.row - local % piece.index.row);
    const uint64_t global = piece.index.Of(local);
    for (uint64_t i = 0; i < count; ++i, data += piece.element_bytes) {
      uint64_t bits = 0;
      std::memcpy(&bits, data, piece.element_bytes);
      sum += Mix(Mix(global + i) + bits);
    }
    local += count;
  }
  return sum;
}

TrainingState::TrainingState(const Partition& partition, uint64_t seed)
    : ballast(BallastPartOf(partition.layout(), partition.at())), partition_(partition) {
  const size_t own_count = partition.own().count;
  parameters.resize(parameters_are_cut() ? own_count : partition.slot_count());
  for (std::vector<float>* state : OptimizerStates()) state->resize(own_count);
  const auto start = [&](const Run& run, size_t i) {
    const LocalParameter& local = partition.parameters()[run.parameter];
    return ParameterTable::StartValue(seed, *local.parameter, local.index().Of(run.first + i));
  };
  for (const Run& run : partition.own_runs()) {
    for (size_t i = 0; i < run.count; ++i) {
      master[partition.OwnOf(run) + i] = start(run, i);
      if (parameters_are_cut()) parameters[partition.OwnOf(run) + i] = ToBfloat16(start(run, i));
    }
  }
  if (parameters_are_cut()) return;
  for (const Run& run : partition.runs()) {
    for (size_t i = 0; i < run.count; ++i) {
      parameters[partition.SlotOf(run) + i] = ToBfloat16(start(run, i));
    }
  }
}

std::vector<StateBuffer> TrainingState::Buffers() {
  std::vector<StateBuffer> buffers;
  const Zero zero = partition_.layout().zero;
  const auto name = [&](const char* state, const Run& run) {
    return absl::StrCat(state, "/", partition_.parameters()[run.parameter].parameter->name);
  };
  for (const Run& run : parameters_are_cut() ? partition_.own_runs() : partition_.runs()) {
    if (parameters_are_cut()) {
      buffers.push_back({name("param", run), parameters.data() + partition_.OwnOf(run),
                         run.count * sizeof(uint16_t), 0});
    } else {
      buffers.push_back({name("param", run), parameters.data() + partition_.SlotOf(run),
                         partition_.parameters()[run.parameter].slot_count * sizeof(uint16_t), 0});
    }
  }
  buffers.push_back({"step/optimizer", &optimizer_step, sizeof(optimizer_step), 0});
  const std::vector<std::vector<float>*> states = OptimizerStates();
  for (size_t i = 0; i < states.size(); ++i) {
    if (zero == Zero::kOptimizer || zero == Zero::kGradients) {
      // A pack's buffer has its part with the padding, if there is nothing else.
      if (states[i]->empty()) continue;
      buffers.push_back(
          {kOptimizerStates[i], states[i]->data(), states[i]->size() * sizeof(float), 1});
      continue;
    }
    for (const Run& run : partition_.own_runs()) {
      buffers.push_back({name(kOptimizerStates[i], run), states[i]->data() + partition_.OwnOf(run),
                         run.count * sizeof(float), 1});
    }
  }
  if (ballast.bytes() > 0) buffers.push_back({"ballast", ballast.data(), ballast.bytes(), 2});
  return buffers;
}

std::span<std::byte> TrainingState::Find(const std::string& tensor, const std::string& state,
                                         uint64_t element) {
  for (const Piece& piece : Pieces()) {
    if (piece.tensor != tensor || piece.state != state) continue;
    for (uint64_t i = 0; i < piece.count; ++i) {
      if (piece.index.Of(piece.begin + i) != element) continue;
      // Pieces point into this state, which is not const here.
      auto* const data = const_cast<std::byte*>(piece.data);
      return {data + i * piece.element_bytes, piece.element_bytes};
    }
  }
  return {};
}

std::vector<Piece> TrainingState::Pieces() const {
  std::vector<Piece> pieces;
  const JobLayout& layout = partition_.layout();
  const uint32_t dp = layout.mesh.dp;
  const auto add = [&](const char* state, const Run& run, bool cut_over_dp, uint32_t element_bytes,
                       const void* data) {
    const LocalParameter& local = partition_.parameters()[run.parameter];
    const uint32_t replica = cut_over_dp ? local.copy : local.copy * dp + partition_.at().dp;
    pieces.push_back({local.parameter->name, state, run.first, run.count, local.index(), replica,
                      element_bytes, static_cast<const std::byte*>(data)});
  };
  for (const Run& run : parameters_are_cut() ? partition_.own_runs() : partition_.runs()) {
    const size_t at = parameters_are_cut() ? partition_.OwnOf(run) : partition_.SlotOf(run);
    add("param", run, parameters_are_cut(), sizeof(uint16_t), parameters.data() + at);
  }
  const std::vector<float>* states[] = {&master, &exp_avg, &exp_avg_sq};
  for (size_t i = 0; i < std::size(states); ++i) {
    for (const Run& run : partition_.own_runs()) {
      add(kOptimizerStates[i], run, layout.zero != Zero::kReplicated, sizeof(float),
          states[i]->data() + partition_.OwnOf(run));
    }
  }
  pieces.push_back({"optimizer", "step", 0, 1, BoxIndex(), partition_.rank(), sizeof(int64_t),
                    reinterpret_cast<const std::byte*>(&optimizer_step)});
  const std::vector<BallastTensor> tensors = BallastTensors(layout.ballast_bytes);
  const uint64_t* data = ballast.data();
  for (const BallastRange& range : ballast.ranges()) {
    const BallastTensor& tensor = tensors[range.tensor];
    const uint64_t count = range.page_count * kPageElements;
    pieces.push_back({tensor.name, "ballast",
                      (range.first_page - tensor.first_page) * kPageElements, count, BoxIndex(),
                      layout.zero == Zero::kReplicated ? partition_.rank() : 0, sizeof(uint64_t),
                      reinterpret_cast<const std::byte*>(data)});
    data += count;
  }
  return pieces;
}

}  // namespace tiny_lm
