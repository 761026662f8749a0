// tiny_lm: trains a small character-level language model and keeps it alive with Holdfast.
//
// One process per rank, started by torchrun or examples/launch. Prints one JSON object per line.
// Exit status: 0 trained to the last step, 1 a failure, 2 wrong usage.
#include <algorithm>
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
  const absl::StatusOr<tiny_lm::TrainerOptions> options = tiny_lm::ParseFlags(arguments);
  if (!options.ok()) {
    std::cerr << "tiny_lm: " << options.status().message() << "\n";
    return 2;
  }
  absl::StatusOr<std::unique_ptr<tiny_lm::Trainer>> trainer = tiny_lm::Trainer::Create(*options);
  const absl::Status status = trainer.ok() ? (*trainer)->Run() : trainer.status();
  if (!status.ok()) {
    std::cerr << "tiny_lm: " << status.ToString() << "\n";
    return 1;
  }
  return 0;
}
