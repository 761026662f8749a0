// Time to stamp the head of an image of 10,000 tensors: what a save costs the agent before the
// first byte of a tensor. Prints {"milliseconds": m}, the median of 21. Usage: bench_stamp_head
// SCRATCH_DIR
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "base/check.h"
#include "format/image.h"

int main(int argc, char** argv) {
  using namespace holdfast;
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s SCRATCH_DIR\n", argv[0]);
    return 2;
  }
  constexpr uint32_t kTensors = 10'000;
  std::vector<TensorState> states(kTensors);
  std::vector<Piece> pieces(kTensors);
  for (uint32_t i = 0; i < kTensors; ++i) {
    states[i] = {"layer." + std::to_string(i) + ".weight", "param", Dtype::kFloat32, {256}};
    pieces[i] = {i, kWholeTensor, 0, 256};
  }
  const BoxTable boxes;
  ImageSpec spec;
  spec.job = "bench";
  spec.job_uuid = "00000000-0000-4000-8000-000000000000";
  spec.world_size = 1;
  spec.block_bytes = uint64_t{4} << 20;
  spec.layout_json = "{}";
  spec.tensor_states = states;
  spec.pieces = pieces;
  spec.boxes = &boxes;
  const absl::StatusOr<ImageTemplate> image = ImageTemplate::Build(spec, argv[1]);
  CHECK_OK(image.status());
  std::vector<std::byte> head(image->head_bytes());
  std::vector<double> milliseconds;
  for (uint64_t step = 0; step < 21; ++step) {
    const auto begun = std::chrono::steady_clock::now();
    image->StampHead({{Attempt{1}, Step{step}}, {}}, 0, head);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begun;
    milliseconds.push_back(took.count());
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + 10, milliseconds.end());
  std::printf("{\"milliseconds\": %.4f}\n", milliseconds[10]);
  return 0;
}
