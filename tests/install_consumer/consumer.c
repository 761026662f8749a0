#include <holdfast.h>
#include <stdio.h>

int main(void) {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  hf_job* job = NULL;
  hf_error error;
  options.job = "consumer", options.rank = 0, options.world_size = 1;
  options.socket = "/nonexistent/agent.sock";
  printf("%d\n", hf_open(&options, &job, &error));
  return error.code == HF_UNAVAILABLE && job == NULL ? 0 : 1;
}
