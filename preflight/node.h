// One node's part: finds rank 0, and does what it says until it says how it ended. Rank 0 is a node
// like the others, and has a coordinator besides (coordinator.h).
#ifndef HOLDFAST_PREFLIGHT_NODE_H_
#define HOLDFAST_PREFLIGHT_NODE_H_

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "io/file_system.h"
#include "io/tcp.h"
#include "preflight/handshake.h"
#include "preflight/messages.h"

namespace holdfast::preflight {

struct NodeOptions {
  Identity identity;
  std::string host;              // what this node calls itself
  std::string disk_directory;    // empty: no disk is measured
  std::vector<Endpoint> rank_0;  // where rank 0 may be; tried in turn
  absl::Duration join_within;    // how long to look for it, and to wait for the others
  bool loopback_only = false;    // all nodes are processes of this machine
};

struct Ending {
  Outcome outcome = Outcome::kFailed;
  std::string text;  // why, if it failed
};

// Blocks until it is over; every wait has a deadline, but those for the node's own disk.
Ending RunNode(FileSystem& file_system, const NodeOptions& options);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_NODE_H_
