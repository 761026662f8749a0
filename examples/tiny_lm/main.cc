// tiny_lm: trains a small character-level language model and keeps it alive with Holdfast.
//
// One process per rank, started by torchrun or examples/launch. Prints one JSON object per line.
// Exit status: 0 trained to the last step, 1 a failure, 2 wrong usage.
#include <stdlib.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "examples/tiny_lm/flags.h"
#include "examples/tiny_lm/trainer.h"

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::cout << tiny_lm::Usage();
    return 0;
  }
  absl::StatusOr<tiny_lm::TrainerOptions> options = tiny_lm::ParseFlags(arguments);
  if (!options.ok()) {
    std::cerr << "tiny_lm: " << options.status().message() << "\n";
    return 2;
  }
  const char* const faults = std::getenv("COLLECTIVES_FAULTS");
  if (options->faults_path.empty() && faults != nullptr) options->faults_path = faults;
  if (const char* const layout = std::getenv("HOLDFAST_LAYOUT"); layout != nullptr) {
    const char* const world_size = std::getenv("WORLD_SIZE");
    const absl::Status taken = tiny_lm::ApplyLayout(
        layout, world_size == nullptr ? 1 : static_cast<uint32_t>(std::atoi(world_size)),
        options->parallel);
    if (!taken.ok()) {
      std::cerr << "tiny_lm: HOLDFAST_LAYOUT: " << taken.message() << "\n";
      return 2;
    }
  }
  // Before there are threads: whatever of Holdfast is in this process names the same job.
  setenv("HOLDFAST_JOB", "tiny_lm", 0);
  absl::StatusOr<std::unique_ptr<tiny_lm::Trainer>> trainer = tiny_lm::Trainer::Create(*options);
  const absl::Status status = trainer.ok() ? (*trainer)->Run() : trainer.status();
  if (!status.ok()) {
    std::cerr << "tiny_lm: " << status.ToString() << "\n";
    return 1;
  }
  return 0;
}
