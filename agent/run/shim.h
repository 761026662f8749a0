// What holdfast-shim does: runs one rank, and knows how it ended, whatever becomes of the agent.
//
//   1. It becomes a child subreaper, so that nothing its rank starts ever leaves its tree.
//   2. It starts the rank in a session of its own, with standard output and error as pipes to
//   itself
//      and standard input from nowhere. The rank dies with the shim (PR_SET_PDEATHSIG): a rank that
//      nobody can end must not be.
//   3. What the rank writes goes to its log files (rank_output.h).
//   4. When the rank has ended, what it wrote before is read first; then the exit is written to
//   disk
//      (a temporary name, then rename: enough for the death of any process, not for a power cut,
//      after which there is nothing to go on from anyway); then whoever is connected is told.
//   5. It ends when the agent has released it, or when the exit is on disk and nobody has come for
//      `linger_seconds`; in both cases only when nothing of the tree is left.
//
// It asks nothing of the agent and waits for it nowhere; it ignores every signal that can be
// ignored (a TERM for a whole session or control group is the agent's to judge). Std only: the less
// there is, the less it can die of.
#ifndef HOLDFAST_AGENT_RUN_SHIM_H_
#define HOLDFAST_AGENT_RUN_SHIM_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "agent/run/rank_output.h"
#include "agent/run/shim_protocol.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: one.
class Shim {
 public:
  static constexpr size_t kConnectionsMax = 4;
  // Between two passes over a tree that is to end.
  static constexpr int64_t kKillEveryNs = 20'000'000;
  // So long a log's storage may take for the last of the rank's output before the exit is told all
  // the same.
  static constexpr int64_t kLastOutputNs = 2'000'000'000;

  explicit Shim(ShimSpec spec);
  ~Shim();

  // Until the end. The shim's own exit status, which nobody needs.
  int Run();

 private:
  struct Pipe {
    UniqueFd read_end;
    Stream stream{};
  };

  bool BlockSignals();
  void StartRank();
  void Wait();
  int PollMilliseconds(int64_t now_ns) const;
  void Accept();
  void Serve(size_t index);
  void Obey(const ShimRequest& request);
  void Tell();
  bool TellOne(int connection);
  void ReadPipe(Pipe& pipe, size_t bytes_max);
  void ReadWhatIsThere();
  void Reap();
  void RankEnded(int wait_status);
  void CheckRecord();
  bool WriteRecord();
  void KillTreeIfDue();
  bool IsOver() const;

  const ShimSpec spec_;
  UniqueFd listener_;
  UniqueFd signals_;
  RankOutput output_;
  std::vector<Pipe> pipes_;
  std::vector<UniqueFd> connections_;
  ShimState state_{};
  pid_t rank_ = 0;        // 0: not started
  bool is_told_ = false;  // that it has ended, to all that are connected
  bool kills_tree_ = false;
  bool is_released_ = false;
  int64_t next_kill_ns_ = 0;
  int64_t told_ns_ = 0;  // when the exit was on disk
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SHIM_H_
