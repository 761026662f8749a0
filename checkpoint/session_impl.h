// What session.cc and session_recovery.cc share: the bytes of a session's identity, and what a
// session has of one registration.
#ifndef HOLDFAST_CHECKPOINT_SESSION_IMPL_H_
#define HOLDFAST_CHECKPOINT_SESSION_IMPL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "checkpoint/session.h"

namespace holdfast {

// The identity memfd: constant but for the flags behind the checksum.
struct IdentityBytes {
  uint64_t magic;
  uint32_t version;
  uint32_t attempt;
  uint64_t session_id;
  uint32_t rank;
  uint32_t world_size;
  uint32_t local_rank;
  uint32_t process_id;
  uint32_t user_id;
  uint32_t reserved;
  char job[136];  // NUL-terminated, as all texts here
  char job_uuid[40];
  char attempt_key[256];
  char node[72];
  uint32_t crc32c;  // of all before
  uint32_t closed;  // 1 after Close()
  uint32_t fenced;  // 1 after Fence()
  uint32_t unused;
};
static_assert(sizeof(IdentityBytes) == 48 + 504 + 16);

// A text that is longer than its field is cut; the engine has checked the lengths before.
void EncodeIdentity(const SessionIdentity& identity, IdentityBytes& bytes);
// kDataLoss: magic, checksum; kFailedPrecondition: another version.
absl::StatusOr<SessionIdentity> DecodeIdentity(const IdentityBytes& bytes);

struct Session::Registered {
  std::shared_ptr<const Registration> registration;
  std::shared_ptr<RankMemory> memory;
  std::shared_ptr<SharedMapping> shared;
  UniqueFd document;
  UniqueFd capture_plan;  // sealed
  std::unique_ptr<RankImages> images;
  RankMemory::ListenerId listener = 0;
  bool is_writer = false;  // counted in memory->writer_count()

  ~Registered();
};

// Descriptors of one session that the keeper held, by what is behind "session/<id>/".
struct Session::Found {
  uint64_t id = 0;
  std::map<std::string, UniqueFd> fds;
};

// "session/000000000000002a/"
std::string SessionPrefix(SessionId session);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SESSION_IMPL_H_
