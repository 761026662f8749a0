#include <cstdio>
#include <holdfast.hpp>

// Opens a job: with the agent that is installed beside the library, which the library starts.
int main() {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  options.job = "consumer", options.rank = 0, options.world_size = 1;
  holdfast::Result<holdfast::Job> job = holdfast::Job::Open(options);
  std::printf("%s: %s\n", hf_version(), job.ok() ? "open" : job.error().text().c_str());
  return job.ok() ? 0 : 1;
}
