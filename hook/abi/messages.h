// The local protocol between a training process and the agent: fixed-size messages on a
// SOCK_SEQPACKET unix socket, descriptors by SCM_RIGHTS, everything large in sealed memfds.
//
// Every message is a MessageHeader and one body struct, one datagram. A request carries a
// request_id that its reply repeats; messages without a request (kImageMap, kRestoreDone) carry 0.
// The agent validates all that it receives; the trainer trusts the agent.
//
// Plain data, std only: this header is shared by a process that must have no dependencies. Sizes
// are asserted; a change of any struct is a new kProtocolVersion, and the agent refuses what it
// does not speak with both numbers in the text.
#ifndef HOLDFAST_HOOK_ABI_MESSAGES_H_
#define HOLDFAST_HOOK_ABI_MESSAGES_H_

#include <cstddef>
#include <cstdint>

namespace holdfast::abi {

inline constexpr uint32_t kProtocolMagic = 0x31464c48;  // "HLF1" in memory
inline constexpr uint16_t kProtocolVersion = 3;
inline constexpr size_t kMessageBytesMax = 4096;
inline constexpr size_t kMessageFdsMax = 4;

inline constexpr size_t kJobNameBytesMax = 128;
inline constexpr size_t kAttemptKeyBytesMax = 255;
inline constexpr size_t kPathBytesMax = 1023;
inline constexpr uint64_t kNoStep = UINT64_MAX;
// In the place of the attempt that fenced this one: another job is in the directory of this one.
inline constexpr uint32_t kJobReplaced = UINT32_MAX;

enum class MessageType : uint16_t {
  kOpen = 1,            // trainer -> agent, fds: [doorbell eventfd]
  kOpenReply = 2,       // fds: [rank page memfd], none when resumed
  kRegister = 3,        // fds: [registration document, sealed memfd]
  kRegisterReply = 4,   // fds: [rank memory, registration memory, capture plan (sealed)]
  kRestore = 5,         // fds: [restore selection, sealed memfd], none for everything
  kImageMap = 6,        // agent -> trainer, before kRestoreReply; fds: [memory, read-only]
  kRestoreReply = 7,    // fds: [restore operations (sealed), blobs (sealed)], none on error
  kRestoreDone = 8,     // agent -> trainer: after the last entry was consumed, or at an error
  kClose = 9,           // trainer -> agent; the agent closes the connection in answer
  kQuery = 10,          // any client of the same user (CLI); no kOpen needed
  kQueryReply = 11,     // fds: [JSON text, sealed memfd]
  kRestoreCancel = 12,  // trainer -> agent: it waits for no restore any more; no body, no reply
  kMonitor = 13,        // trainer -> agent, no kOpen needed; fds: [monitor board, memfd]
  kMonitorReply = 14,   // an agent that does not know kMonitor closes the connection instead
  kMonitorWindow =
      15,          // any client of the same user (CLI); answered by kQueryReply when it is over
  kRankExit = 16,  // launcher -> agent, no kOpen needed: docs/MONITOR.md
  kRankExitReply = 17,  // as kMonitorReply
  kWitness = 18,        // trainer -> agent, no kOpen needed; fds: a memfd per part that it answers
  kWitnessReply = 19,   // when the agent asks something: it may take for ever
  kMonitorQuery = 20,   // any client of the same user (CLI); answered by kQueryReply
  kMonitorEvent = 21,   // agent -> client that follows, records or runs; fds: [text, sealed memfd]
  kRun = 22,  // `holdfast run` -> agent; fds: [what to run, sealed memfd]; answered by kQueryReply
  kRunCommand = 23,  // any client of the same user (CLI); answered by kQueryReply
};

struct MessageHeader {
  uint32_t magic;
  uint16_t version;
  MessageType type;
  uint32_t request_id;
  uint32_t body_bytes;
};
static_assert(sizeof(MessageHeader) == 16);

// The outcome in every reply. `code` as in holdfast.h (those of absl::StatusCode).
struct ReplyStatus {
  int32_t code;
  char text[1020];  // NUL-terminated
};
static_assert(sizeof(ReplyStatus) == 1024);

struct OpenRequest {
  char job[136];            // NUL-terminated, as all texts here
  char attempt_key[256];    // empty: none
  char root[1024];          // empty: the agent's own; else must be one that the agent writes to
  char restore_from[1024];  // absolute; empty: none. As hf_open_options has it
  char node[72];            // host name, for people
  uint32_t rank;
  uint32_t world_size;
  uint32_t local_rank;
  // 0: a new open. Else this process was open already, in this attempt and session, and has lost
  // the connection: the agent resumes the session if it still knows it (its worker was restarted),
  // or, if the attempt is still the job's newest, makes a new session in it (the agent itself is
  // new).
  uint32_t resume_attempt;
  uint64_t resume_session_id;
  uint64_t resume_registration_id;  // 0: none
};
static_assert(sizeof(OpenRequest) == 2544);

struct OpenReply {
  ReplyStatus status;
  uint64_t session_id;
  uint32_t attempt;
  uint32_t resumed;  // 1: rank page, registration and images are those that the process has mapped
  uint64_t block_bytes;
  uint64_t rank_page_bytes;
  char job_uuid[40];
};
static_assert(sizeof(OpenReply) == 1096);

// Who captures a tensor that several ranks hold; the numbers of hf_open_options.
enum class Copies : uint32_t {
  kOnce = 0,     // one of them
  kPerNode = 1,  // one on every node that holds it; one agent is one node: as kOnce
  kAll = 2,      // all of them: one copy goes into an image, the others stay in memory
};

// The registration document (a memfd sealed against every change): this header, then at the offsets
// given the layout JSON, `buffer_count` x DocumentBuffer, `blob_count` x DocumentBlob, and names.
struct RegistrationDocument {
  uint32_t magic;  // kProtocolMagic
  uint32_t version;
  uint64_t total_bytes;
  uint64_t layout_offset;
  uint64_t layout_bytes;
  uint64_t buffers_offset;  // 8-aligned
  uint64_t buffer_count;
  uint64_t blobs_offset;  // 8-aligned
  uint64_t blob_count;
  Copies copies;  // the same on all ranks
  uint32_t reserved;
};
static_assert(sizeof(RegistrationDocument) == 72);

struct DocumentBuffer {
  uint64_t name_offset;
  uint32_t name_bytes;
  uint32_t group;  // 0 to 63
  uint64_t bytes;
};
static_assert(sizeof(DocumentBuffer) == 24);

struct DocumentBlob {
  uint64_t name_offset;
  uint32_t name_bytes;
  uint32_t scope;  // 0 global, 1 rank
  uint64_t capacity_bytes;
};
static_assert(sizeof(DocumentBlob) == 24);

struct RegisterRequest {
  uint64_t document_bytes;
};
static_assert(sizeof(RegisterRequest) == 8);

struct RegisterReply {
  ReplyStatus status;
  uint64_t registration_id;
  uint64_t memory_bytes;               // of the rank memory memfd
  uint64_t registration_memory_bytes;  // of the memory described in shared_memory.h
  uint64_t capture_plan_bytes;
  uint64_t image_bytes;  // a multiple of block_bytes, without extra copies
  uint64_t block_bytes;
};
static_assert(sizeof(RegisterReply) == 1072);

// The capture plan (sealed memfd): header, then capture_op_count x CaptureOp sorted by image
// offset, then blob_count x BlobArea in the order of the registration. Behind the image, in the
// slot's further blocks, lie the extra copies: their offsets go on from image_bytes.
struct CapturePlan {
  uint32_t magic;
  uint32_t version;
  uint64_t op_count;
  uint64_t blob_count;
  uint64_t image_bytes;
  uint64_t slot_bytes;  // a multiple of block_bytes: image and extra copies
};
static_assert(sizeof(CapturePlan) == 40);

// Copies `count` runs of `run_bytes` from the buffer, `buffer_stride` bytes apart, to the image,
// where they lie one behind the other.
struct CaptureOp {
  uint64_t image_offset;
  uint64_t buffer_offset;
  uint64_t run_bytes;
  uint64_t count;
  uint64_t buffer_stride;
  uint32_t buffer_index;  // in the order of the registration
  uint32_t group;
};
static_assert(sizeof(CaptureOp) == 48);

// Where the bytes of a blob go. A global blob of another rank than 0 is not stored: capacity 0 and
// offset UINT64_MAX.
struct BlobArea {
  uint64_t image_offset;
  uint64_t capacity_bytes;
};
static_assert(sizeof(BlobArea) == 16);

struct RestoreRequest {
  uint64_t registration_id;
  uint64_t selection_bytes;  // 0: everything
};
static_assert(sizeof(RestoreRequest) == 16);

// The restore selection (a memfd sealed against every change): this header, pattern_count x
// SelectionPattern, then a text of its own for each. What they mean: hf_restore_options.
struct RestoreSelection {
  uint32_t magic;  // kProtocolMagic
  uint32_t version;
  uint64_t pattern_count;
};
static_assert(sizeof(RestoreSelection) == 16);

struct SelectionPattern {
  static constexpr uint32_t kTensors = 0;
  static constexpr uint32_t kStates = 1;
  uint64_t text_offset;
  uint32_t text_bytes;
  uint32_t of;  // kTensors: of names of tensors; kStates: of states
};
static_assert(sizeof(SelectionPattern) == 16);

struct ImageMap {
  uint32_t map_id;  // 1 and up; 0 is the rank's own memory, already mapped
  uint32_t reserved;
  uint64_t bytes;
};
static_assert(sizeof(ImageMap) == 16);

struct RestoreReply {
  ReplyStatus status;  // HF_NOT_FOUND: no checkpoint, and none was named in kOpen
  uint64_t step;
  uint32_t attempt;
  uint32_t world_size;
  uint64_t op_count;  // in the operations memfd: op_count x RestoreOp
  uint64_t operations_bytes;
  uint64_t blobs_bytes;
  uint64_t bytes;                   // that will reach this rank's buffers
  uint64_t tensor_states;           // of this rank: filled
  uint64_t tensor_states_left_out;  // of this rank: not chosen
  uint32_t restore_from;            // hf_restore_from
  uint32_t reserved;
};
static_assert(sizeof(RestoreReply) == 1096);

// Copies `count` runs from a delivered piece (RestoreEntry in shared_memory.h) to a buffer.
struct RestoreOp {
  uint64_t source_offset;  // from the beginning of the delivered piece
  uint64_t buffer_offset;
  uint64_t run_bytes;
  uint64_t count;
  uint64_t source_stride;
  uint64_t buffer_stride;
  uint32_t buffer_index;
  uint32_t reserved;
};
static_assert(sizeof(RestoreOp) == 56);

// The blobs memfd: header, blob_count x RestoredBlob, then names and bytes.
struct RestoredBlobs {
  uint32_t magic;
  uint32_t version;
  uint64_t blob_count;
};
static_assert(sizeof(RestoredBlobs) == 16);

struct RestoredBlob {
  uint64_t name_offset;
  uint64_t data_offset;
  uint64_t data_bytes;
  uint32_t name_bytes;
  uint32_t scope;  // 0 global, 1 rank
  uint32_t rank;   // that saved it
  uint32_t reserved;
};
static_assert(sizeof(RestoredBlob) == 40);

struct RestoreDone {
  ReplyStatus status;
  uint64_t bytes;
  uint64_t bytes_from_memory;
};
static_assert(sizeof(RestoreDone) == 1040);

// A process offers its monitor board (monitor.h): the agent maps it for reading and keeps it after
// the process has died. Offering it again is harmless.
struct MonitorOffer {
  char job[136];
  char attempt_key[256];
  char node[136];       // HOLDFAST_NODE, else the host name
  uint32_t rank;        // UINT32_MAX: not known
  uint32_t process_id;  // as the process sees it
  uint64_t board_bytes;
};
static_assert(sizeof(MonitorOffer) == 544);

struct MonitorReply {
  ReplyStatus status;
};
static_assert(sizeof(MonitorReply) == 1024);

// Asks for what a rank's processes record from now on, for a while (monitor.h, BoardRequests). The
// answer is JSON lines (docs/MONITOR.md).
struct MonitorWindowRequest {
  char job[136];
  uint32_t rank;
  uint32_t milliseconds;  // 1 to 1000 * kWindowSecondsMax
};
static_assert(sizeof(MonitorWindowRequest) == 144);

// A process waits to be asked for what only it can tell of itself (WitnessAsk), and answers with
// its next wait. Each memfd is sealed against every change.
inline constexpr uint32_t kWitnessFlightRecord = 1;  // PyTorch's: a pickle or JSON
inline constexpr uint32_t kWitnessPythonStacks = 2;  // faulthandler's text
inline constexpr uint32_t kWitnessParts = 2;

struct WitnessWait {
  char job[136];
  char attempt_key[256];
  uint32_t rank;
  uint32_t world_size;  // 0: not known
  uint64_t number;      // of the WitnessAsk that is answered; 0: none
  uint32_t parts;       // that are answered: a descriptor each, by ascending bit
  uint32_t reserved;
  uint64_t bytes[kWitnessParts];  // of each part, by its bit; 0: none
  char trouble[512];              // why a part that was asked for is missing; empty: none is
};
static_assert(sizeof(WitnessWait) == 944);

struct WitnessAsk {
  ReplyStatus status;
  uint64_t number;  // 1 and up
  uint32_t parts;
  uint32_t reserved;
};
static_assert(sizeof(WitnessAsk) == 1040);

// Whoever started a rank says how it ended, which only a parent gets to know. Ranks that show no
// board are known by it too.
struct RankExit {
  char job[136];          // HOLDFAST_JOB of the rank; empty: none
  char attempt_key[256];  // its HOLDFAST_ATTEMPT_KEY or torchrun's; empty: none
  char node[136];         // its HOLDFAST_NODE, else the host name
  uint32_t rank;
  uint32_t world_size;   // 0: not known
  uint32_t process_id;   // of the child, as its parent sees it; 0: not known
  int32_t wait_status;   // as waitpid(2) gives it
  uint32_t was_stopped;  // 1: the launcher had told it to end
  uint32_t reserved;     // 0
};
static_assert(sizeof(RankExit) == 552);

struct RankExitReply {
  ReplyStatus status;
};
static_assert(sizeof(RankExitReply) == 1024);

enum class QueryKind : uint32_t {
  kStatus = 1,      // jobs, sessions, images with their counters, roots, memory: docs/OPERATING.md
  kWitnesses = 16,  // asks all witnesses of all jobs now, and says what they say: docs/MONITOR.md
};

struct QueryRequest {
  QueryKind kind;
  uint32_t reserved;
};
static_assert(sizeof(QueryRequest) == 8);

struct QueryReply {
  ReplyStatus status;
  uint64_t text_bytes;
};
static_assert(sizeof(QueryReply) == 1032);

// What `holdfast monitor` asks; the answers are JSON, listed in docs/MONITOR.md.
enum class MonitorQueryKind : uint32_t {
  kStatus = 1,    // communicators, ranks, how blind the analysis is, open findings
  kWaits = 2,     // who waits for whom
  kMatrix = 3,    // the delay matrix
  kFindings = 4,  // all that are kept, newest first
  kExplain = 5,   // one of them
  // After these the agent sends a kMonitorEvent whenever there is something, until the connection
  // ends; the reply is that of kFindings, or empty.
  kFollow = 6,  // findings, as they change
  kRecord = 7,  // steps, as monitor/recording.h encodes them
};

struct MonitorQuery {
  MonitorQueryKind kind;
  uint32_t reserved;
  uint64_t communicator;  // of kMatrix; 0: all
  char job[136];          // empty: all
  char finding[48];       // of kExplain
};
static_assert(sizeof(MonitorQuery) == 200);

struct MonitorEvent {
  uint64_t text_bytes;
  uint64_t lost;  // events before this one that the client was too slow for
};
static_assert(sizeof(MonitorEvent) == 16);

// Begins a run (agent/run/run_spec.h), or comes back to it: a client that has lost its connection
// sends the same again. The answer is the run's state as JSON (docs/RUN.md), and so is each
// kMonitorEvent after it, whenever the state has changed. The client is the run's owner: if its
// process dies, the run is stopped.
struct RunRequest {
  uint64_t spec_bytes;
};
static_assert(sizeof(RunRequest) == 8);

enum class RunCommandKind : uint32_t {
  kView = 1,     // the state; what follows changes something and answers with the state, too
  kSignal = 2,   // `number`: SIGINT or SIGTERM, that the owner got; SIGUSR1: the allocation ends
  kStop = 3,     //
  kSave = 4,     //
  kApprove = 5,  // `text`: what was proposed
  kVeto = 6,     // the same
  kHold = 7,     // `number`: seconds; 0 ends it. `text`: why
  kReadmit = 8,  // `number`: of the GPU; `text`: its node, empty: the job's own
};

struct RunCommand {
  RunCommandKind kind;
  uint32_t reserved;
  uint64_t number;
  char job[136];  // empty: the only one that runs
  char text[512];
};
static_assert(sizeof(RunCommand) == 664);

}  // namespace holdfast::abi

#endif  // HOLDFAST_HOOK_ABI_MESSAGES_H_
