#include <cstdio>
#include <holdfast.hpp>

int main() {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  options.job = "consumer", options.rank = 0, options.world_size = 1;
  options.socket = "/nonexistent/agent.sock";
  holdfast::Result<holdfast::Job> job = holdfast::Job::Open(options);
  std::printf("%s: %s\n", hf_version(), job.error().text().c_str());
  return job.error().code() == HF_UNAVAILABLE ? 0 : 1;
}
