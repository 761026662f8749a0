// The other end of the hook library's socket, for its tests: a scripted peer that speaks the real
// protocol over a real socket and real shared memory, in a thread of the test.
//
// Model: sessions, rank pages, registrations with rank memory, granted slots, restore deliveries,
// saves' reports; a worker that dies and comes back with everything (RestartWorker), an agent that
// dies and comes back without (ReplaceAgent) or not at all (Vanish).
// Not modelled: checksums, storage, other ranks, validation of what the trainer writes. It does
// what the test says, also wrong things (garbage, silence, a connection that ends).
#ifndef HOLDFAST_HOOK_TEST_AGENT_H_
#define HOLDFAST_HOOK_TEST_AGENT_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"
#include "hook/os.h"
#include "hook/socket.h"

namespace holdfast::hook {

// Reading and writing memory of a memfd, mapped by the test's side.
class TestMemory {
 public:
  static std::shared_ptr<TestMemory> Make(uint64_t bytes);
  explicit TestMemory(UniqueFd fd, uint64_t bytes);
  ~TestMemory();
  int fd() const { return fd_.get(); }
  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// What the agent makes of a registration.
struct TestPlan {
  uint64_t block_bytes = 4096;
  uint32_t block_count = 0;
  uint32_t slot_count = 2;
  uint32_t granted = 2;  // slots [0, granted) are granted at once
  std::vector<abi::CaptureOp> ops;
  std::vector<abi::BlobArea> blobs;
  uint32_t shuffle_seed = 1;  // of the blocks in the memory
};

// A registration document, read back.
struct TestDocument {
  std::string layout;
  std::vector<std::string> buffer_names;
  std::vector<abi::DocumentBuffer> buffers;
  std::vector<std::string> blob_names;
  std::vector<abi::DocumentBlob> blobs;
};

// What a restore delivers.
struct TestRestore {
  struct Piece {
    uint32_t map_id = 0;
    std::vector<std::byte> bytes;  // written to the memory before it is delivered
    uint64_t offset = 0;
    std::vector<abi::RestoreOp> ops;
  };
  struct Blob {
    std::string name;
    hf_blob_scope scope;
    uint32_t rank;
    std::string data;
  };
  uint64_t step = 0;
  uint32_t attempt = 1;
  uint32_t world_size = 1;
  uint64_t tensor_states = 0;
  uint64_t tensor_states_left_out = 0;
  uint32_t restore_from = 0;
  std::vector<uint64_t> map_bytes;  // of memories 1 and up
  std::vector<Piece> pieces;
  std::vector<Blob> blobs;
  hf_code reply_code = HF_OK;
  hf_code done_code = HF_OK;
  bool never_ends = false;    // no kRestoreDone
  bool map_is_short = false;  // the memories are of one page, whatever map_bytes says
  // The worker dies, and comes back, after this many pieces were consumed (once).
  std::optional<uint32_t> die_after;
};

class TestAgent {
 public:
  // What to do with a message instead of serving it, once.
  enum class Fault {
    kSilence,        // no answer
    kEndConnection,  // the worker dies before it answers, and comes back at once
    kVanish,         // the agent dies before it answers, for good
    kGarbage,        // an answer that is no message
    kShortReply,     // a reply whose body is too short
    kWrongVersion,   // a reply of another protocol version
    kNoFds,          // a reply without its descriptors
    kRefuse,         // an error
    kFence,          // the error that ends a session for good
    kEnding,         // the error of an agent that takes nobody any more, and ends
  };

  TestAgent();
  ~TestAgent();
  const std::string& socket_path() const { return socket_path_; }

  // ---- The script
  void SetPlan(std::function<TestPlan(const TestDocument&)> plan);
  void SetRestore(TestRestore restore);
  void FailNext(abi::MessageType type, Fault fault);  // once
  void FailAlways(abi::MessageType type, Fault fault) {
    std::lock_guard lock(mutex_);
    lasting_faults_[type] = fault;
  }
  // Ends both.
  void FailNoMore(abi::MessageType type) {
    std::lock_guard lock(mutex_);
    faults_.erase(type);
    lasting_faults_.erase(type);
  }
  void SetDueEvery(uint64_t steps) { due_every_ = steps; }
  // Changes a reply before it is sent.
  void MutateRegister(
      std::function<void(abi::RegisterReply&, TestMemory& shared, TestMemory& plan)>);

  // ---- Events
  void RestartWorker();  // ends every connection; remembers everything
  void ReplaceAgent();   // ends every connection; remembers nothing
  void Vanish();         // ends every connection; nobody listens any more
  void Return();         // listens again after Vanish
  void Grant(uint32_t slot);
  void Fence(uint32_t by_attempt);
  // Writes a save's report, and commits if the state says so.
  void Report(uint64_t step, hf_save_state state, hf_code code = HF_OK, const char* text = "");

  // Runs `body` while the agent's thread can do nothing.
  void Hold(const std::function<void()>& body);

  // ---- Looking. All wait for at most 2 minutes, and say whether it came true.
  bool Await(const std::function<bool()>& condition);
  bool AwaitSlot(uint32_t slot, abi::SlotState state);
  bool AwaitMessages(abi::MessageType type, int count);

  abi::RegistrationMemory& shared() const;
  abi::RankPage& page() const;
  TestMemory& memory() const { return *memory_; }
  TestMemory& registration_memory() const { return *shared_; }
  TestMemory& plan_memory() const { return *plan_memory_; }
  const TestPlan& plan() const { return plan_; }
  const TestDocument& document() const { return document_; }
  abi::OpenRequest last_open() const;
  // The patterns that came with the last kRestore, and of what; empty: everything.
  std::vector<std::pair<uint32_t, std::string>> last_selection() const;
  int messages(abi::MessageType type) const;
  int doorbell_rings() const { return doorbell_rings_; }
  // The image of a slot, gathered through its block table.
  std::vector<std::byte> Image(uint32_t slot) const;
  bool BlockDone(uint32_t slot, uint32_t block) const;
  uint64_t BlobBytes(uint32_t slot, uint32_t blob) const;
  uint32_t BlockIndex(uint32_t slot, uint32_t block) const;
  void SetBlockIndex(uint32_t slot, uint32_t block, uint32_t index);

 private:
  void Run();
  void Serve(Message message);
  bool ApplyFault(Fault fault, abi::MessageType reply_type, uint32_t request_id);
  void ServeOpen(const Message& message);
  void ServeRegister(const Message& message);
  void ServeRestore(const Message& message);
  void FillSelection(const Message& message);
  void Deliver();
  void Listen();
  void EndConnection();
  void Poke();
  void FillDocument(const Message& message);
  void MakeRegistrationMemory();
  void WakeTrainer();
  template <typename T>
  void Reply(abi::MessageType type, uint32_t request_id, const T& body, std::vector<int> fds);

  std::string directory_;
  std::string socket_path_;
  UniqueFd wake_;
  std::thread thread_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  UniqueFd listener_;
  std::unique_ptr<Channel> connection_;
  UniqueFd doorbell_;
  std::atomic<int> doorbell_rings_{0};
  std::atomic<uint64_t> due_every_{0};

  std::function<TestPlan(const TestDocument&)> make_plan_;
  std::function<void(abi::RegisterReply&, TestMemory&, TestMemory&)> mutate_register_;
  std::map<abi::MessageType, Fault> faults_;  // once
  std::map<abi::MessageType, Fault> lasting_faults_;
  std::map<abi::MessageType, int> counts_;

  uint64_t session_id_ = 0;
  uint64_t next_session_id_ = 100;
  uint32_t attempt_ = 1;
  abi::OpenRequest last_open_ = {};
  std::vector<std::pair<uint32_t, std::string>> last_selection_;
  std::shared_ptr<TestMemory> page_;
  uint64_t registration_id_ = 0;
  uint64_t next_registration_id_ = 1000;
  TestDocument document_;
  TestPlan plan_;
  std::shared_ptr<TestMemory> memory_;
  std::shared_ptr<TestMemory> shared_;
  std::shared_ptr<TestMemory> plan_memory_;

  std::optional<TestRestore> restore_;
  std::vector<std::shared_ptr<TestMemory>> restore_maps_;
  bool delivering_ = false;
  size_t delivered_ = 0;
  uint32_t first_entry_ = 0;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_TEST_AGENT_H_
