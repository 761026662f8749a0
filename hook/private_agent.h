// The embedded default: an agent for one job on this node, started by the first rank that finds
// none.
//
// Protocol. Under an exclusive flock of <runtime directory>/agent.lock:
//   1. connect once more (another rank may have started it in between);
//   2. start `holdfastd --private --socket S --job J [--root R]` in a session of its own, with all
//      other descriptors closed; it detaches itself, and its foreground process exits with 0 when
//      the socket listens, else with another status and one line on its standard error;
//   3. connect.
// The lock is released in any case; a rank that dies in between releases it by dying.
#ifndef HOLDFAST_HOOK_PRIVATE_AGENT_H_
#define HOLDFAST_HOOK_PRIVATE_AGENT_H_

#include <string>

#include "hook/deadline.h"
#include "hook/error.h"
#include "hook/os.h"
#include "hook/settings.h"

namespace holdfast::hook {

// A connection to settings.socket_path; starts the private agent if nobody listens there and
// settings.private_agent allows it. Errors: HF_UNAVAILABLE (nobody listens; there is no holdfastd;
// or it did not start: its line is in the text), HF_PERMISSION_DENIED (the runtime directory is not
// only ours), HF_DEADLINE_EXCEEDED.
Result<UniqueFd> ConnectOrStartAgent(const Settings& settings, Deadline deadline);

// Makes the directory and its parent with mode 0700 if they are not there, and checks that they are
// directories, belong to this user and are open to nobody else (the parent: not writable).
Error PrepareRuntimeDirectory(const std::string& directory);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_PRIVATE_AGENT_H_
