// tiny_lm: trains a small character-level language model and keeps it alive with Holdfast.
//
// One process per rank, started by torchrun or examples/launch. Prints one JSON object per line.
#include <cstdio>
#include <iostream>

#include "CLI/CLI.hpp"
#include "examples/tiny_lm/trainer.h"

namespace {

constexpr double kNanosecondsPerMillisecond = 1e6;

int64_t Nanoseconds(double milliseconds) {
  return static_cast<int64_t>(milliseconds * kNanosecondsPerMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  tiny_lm::TrainerOptions options;
  int zero = 1;
  bool no_holdfast = false;
  double capture_deadline_ms = 60'000;
  double commit_deadline_ms = 300'000;
  double restore_deadline_ms = 300'000;
  double save_wait_ms = 0;

  CLI::App app("Trains a small character-level language model with Holdfast.");
  app.add_option("--corpus", options.corpus_paths,
                 "Text files, or directories of *.md and *.h; may be repeated")
      ->required();
  app.add_option("--steps", options.steps, "Train to this step")->capture_default_str();
  app.add_option("--save-every", options.save_every, "Save every so many steps; 0: when it is due")
      ->capture_default_str();
  app.add_option("--zero", zero, "0: replicate all; 1: cut optimizer states and ballast over ranks")
      ->check(CLI::Range(0, 1))
      ->capture_default_str();
  app.add_option("--batch", options.batch, "Samples of a step, of all ranks together")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Of data order and first parameters")
      ->capture_default_str();
  app.add_option("--device-ms", options.device_ms,
                 "What forward and backward shall take; the rest is waited")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--device-jitter", options.device_jitter_percent, "Up to so many percent longer")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option(
         "--bytes", options.ballast_bytes,
         "Ballast of the whole job, as 512M: cut over the ranks with --zero 1, on every rank "
         "with --zero 0")
      ->transform(CLI::AsSizeValue(false));
  app.add_flag("--no-holdfast", no_holdfast, "Train without checkpoints");
  app.add_flag("--check-restore", options.check_restore,
               "Print digests of all states after a restore, and at the end");
  app.add_flag("--wait-committed-at-end,!--no-wait-committed-at-end", options.wait_committed_at_end,
               "Save and commit the last step before leaving");
  app.add_option("--save-wait-ms", save_wait_ms, "How long a save may wait for image memory")
      ->capture_default_str();
  app.add_option("--capture-deadline-ms", capture_deadline_ms, "Of hf_wait_captured")
      ->capture_default_str();
  app.add_option("--commit-deadline-ms", commit_deadline_ms, "Of the commit at the end")
      ->capture_default_str();
  app.add_option("--restore-deadline-ms", restore_deadline_ms, "Of hf_register and hf_restore")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  options.zero = static_cast<tiny_lm::Zero>(zero);
  options.use_holdfast = !no_holdfast;
  options.checkpointing = {Nanoseconds(capture_deadline_ms), Nanoseconds(commit_deadline_ms),
                           Nanoseconds(restore_deadline_ms), Nanoseconds(save_wait_ms)};

  absl::StatusOr<std::unique_ptr<tiny_lm::Trainer>> trainer = tiny_lm::Trainer::Create(options);
  const absl::Status status = trainer.ok() ? (*trainer)->Run() : trainer.status();
  if (!status.ok()) {
    std::cerr << "tiny_lm: " << status.ToString() << std::endl;
    return 1;
  }
  return 0;
}
