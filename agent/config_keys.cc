// The table of the configuration's keys. docs/CONFIGURATION.md repeats it (config_test compares).
#include <iterator>

#include "absl/strings/str_cat.h"
#include "agent/config.h"

namespace holdfast {
namespace {

constexpr ConfigKey kKeys[] = {
    {"roots", "--root", "HOLDFAST_ROOT", "<state_directory>/checkpoints",
     "Directory of all checkpoints: a list of exactly one path. Made if only its last part is "
     "missing."},
    {"socket", "--socket", "HOLDFAST_SOCKET", "/run/holdfast/agent.sock",
     "Where the agent listens. Users other than root: $XDG_RUNTIME_DIR/holdfast/agent.sock, or "
     "/tmp/holdfast-UID/agent.sock without it."},
    {"state_directory", "--state-directory", "HOLDFAST_STATE_DIRECTORY", "/var/lib/holdfast",
     "What the agent keeps for itself (results of mount trials, scratch files). Users other than "
     "root: $XDG_STATE_HOME/holdfast, or ~/.local/state/holdfast."},
    {"host_memory", "--host-memory", "HOLDFAST_HOST_MEMORY", "25%",
     "Memory for images, of all jobs together: a size (64GiB) or a share of what the machine and "
     "the control group have. A hard limit."},
    {"every", "--every", "HOLDFAST_EVERY", "0",
     "A save is due every so many steps (hf_due); 0: never by itself; auto: as often as pays, from "
     "what saves and failures cost."},
    {"images_in_memory", "--images-in-memory", "HOLDFAST_IMAGES_IN_MEMORY", "2",
     "Images per rank that may be in memory at once, 1 to 4; fewer where host_memory is short."},
    {"block_bytes", "--block-bytes", "HOLDFAST_BLOCK_BYTES", "4MiB",
     "Unit of checksum and flush: a power of two from 4KiB to 64MiB."},
    {"flush_writes", "--flush-writes", "HOLDFAST_FLUSH_WRITES", "8",
     "Writes in flight per image, 1 to 256."},
    {"threads", "--threads", "HOLDFAST_THREADS", "auto",
     "Threads for checksums, copies and blocking calls, 1 to 256; auto: one per processor, at "
     "most 4."},
    {"ring", "--ring", "HOLDFAST_RING", "auto",
     "How images are written and read: io_uring, threads, or auto (io_uring where it is granted)."},
    {"direct", "--direct", "HOLDFAST_DIRECT", "auto",
     "Past the page cache (O_DIRECT): on, off, or auto (where the mount can)."},
    {"linger", "--linger", "HOLDFAST_LINGER", "60s",
     "A private agent ends when everything is flushed and no rank has been open for so long."},
    {"drain_deadline", "--drain-deadline", "HOLDFAST_DRAIN_DEADLINE", "30s",
     "How long the agent goes on flushing after SIGTERM before it ends all the same."},
    {"on_verdict", "--on-verdict", "HOLDFAST_ON_VERDICT", "",
     "A command for /bin/sh, run for every verdict of the monitor, with the finding as JSON on "
     "standard input. Empty: none."},
    {"verdicts_keep", "--verdicts-keep", "HOLDFAST_VERDICTS_KEEP", "720h",
     "How long findings of the monitor are kept after their last change; at most 1024 of them."},
    {"ras_address", "--ras-address", "HOLDFAST_RAS_ADDRESS", "127.0.0.1:28028",
     "Where NCCL's RAS answers on this node (NCCL_RAS_ADDR of the job), asked when something is "
     "suspected: host:port, or off."},
    {"kernel_log", "--kernel-log", "HOLDFAST_KERNEL_LOG", "/dev/kmsg",
     "Where the driver's Xid lines appear: /dev/kmsg, a file that lines are appended to, or off."},
    {"http", "--http", "HOLDFAST_HTTP", "off",
     "Where /metrics, /healthz, /readyz and /v1/status are served: a numeric ADDRESS:PORT "
     "(127.0.0.1:9470), or off."},
    {"http_token_file", "--http-token-file", "HOLDFAST_HTTP_TOKEN_FILE",
     "<state_directory>/http-token",
     "The token that /metrics and /v1/status ask for, in a file of mode 0600, which is made if it "
     "is not there; off: none, on loopback only."},
    {"topology", "--topology", "HOLDFAST_TOPOLOGY", "",
     "A JSON document that tells the monitor which NIC, rail and switch each GPU of each node has. "
     "Empty: none, and a NIC is never named."},
    {"sidecar", "--sidecar", "HOLDFAST_SIDECAR", "off",
     "What is done about a hang in a job that another launcher has started: act (a rank is killed, "
     "so that the launcher restarts the job), observe (evidence), or off."},
    {"log_file", "--log-file", "HOLDFAST_LOG_FILE", "",
     "The log; at 8 MiB it becomes FILE.1. Empty: standard error; a private agent writes agent.log "
     "beside its socket."},
    {"log_level", "--log-level", "HOLDFAST_LOG_LEVEL", "info",
     "The least that is logged: debug, info, warning or error."},
};

}  // namespace

std::span<const ConfigKey> ConfigKeys() { return kKeys; }

std::string ConfigTable() {
  std::string table =
      "| key | flag | variable | default | meaning |\n"
      "|---|---|---|---|---|\n";
  for (const ConfigKey& key : kKeys) {
    absl::StrAppend(&table, "| `", key.name, "` | `", key.flag, "` | `", key.variable, "` | ",
                    *key.default_text == '\0' ? "" : absl::StrCat("`", key.default_text, "`"),
                    " | ", key.help, " |\n");
  }
  return table;
}

}  // namespace holdfast
