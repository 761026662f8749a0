#include "hook/test_agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>

namespace holdfast::hook {
namespace {

constexpr std::chrono::seconds kPatience{120};

// Broken set-up of a test: there is nothing to go on with.
void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "test agent: %s: %s\n", what, strerror(errno));
  abort();
}

template <typename T>
T ReadAt(const std::byte* data, uint64_t offset) {
  T value;
  std::memcpy(&value, data + offset, sizeof(T));
  return value;
}

uint64_t AlignUp(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

void SetStatus(abi::ReplyStatus* status, hf_code code, const char* text) {
  status->code = code;
  std::snprintf(status->text, sizeof(status->text), "%s", text);
}

}  // namespace

std::shared_ptr<TestMemory> TestMemory::Make(uint64_t bytes) {
  UniqueFd fd(memfd_create("holdfast-test", MFD_CLOEXEC));
  Require(fd.valid() && ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0, "memfd");
  return std::make_shared<TestMemory>(std::move(fd), bytes);
}

TestMemory::TestMemory(UniqueFd fd, uint64_t bytes) : fd_(std::move(fd)), bytes_(bytes) {
  if (bytes == 0) return;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  Require(data != MAP_FAILED, "mmap");
  data_ = static_cast<std::byte*>(data);
}

TestMemory::~TestMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

TestAgent::TestAgent() {
  char name[] = "/tmp/holdfast-hook-test-XXXXXX";
  Require(mkdtemp(name) != nullptr, "mkdtemp");
  directory_ = name;
  socket_path_ = directory_ + "/agent.sock";
  Result<UniqueFd> wake = MakeEventFd();
  Require(wake.ok(), "eventfd");
  wake_ = std::move(wake.value());
  make_plan_ = [](const TestDocument&) { return TestPlan(); };
  Listen();
  thread_ = std::thread([this] { Run(); });
}

TestAgent::~TestAgent() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  Poke();
  thread_.join();
  unlink(socket_path_.c_str());
  rmdir(directory_.c_str());
}

void TestAgent::Listen() {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path_.c_str());
  unlink(socket_path_.c_str());
  listener_.Reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  Require(
      bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
          listen(listener_.get(), 16) == 0,
      "listen");
}

// ---- The script and events: from the test's thread

void TestAgent::SetPlan(std::function<TestPlan(const TestDocument&)> plan) {
  std::lock_guard lock(mutex_);
  make_plan_ = std::move(plan);
}

void TestAgent::SetRestore(TestRestore restore) {
  std::lock_guard lock(mutex_);
  restore_ = std::move(restore);
}

void TestAgent::FailNext(abi::MessageType type, Fault fault) {
  std::lock_guard lock(mutex_);
  faults_[type] = fault;
}

void TestAgent::MutateRegister(
    std::function<void(abi::RegisterReply&, TestMemory&, TestMemory&)> mutate) {
  std::lock_guard lock(mutex_);
  mutate_register_ = std::move(mutate);
}

void TestAgent::EndConnection() {
  connection_.reset();
  doorbell_.Reset(-1);
  delivering_ = false;
}

void TestAgent::RestartWorker() {
  {
    std::lock_guard lock(mutex_);
    EndConnection();
  }
  Poke();
}

void TestAgent::ReplaceAgent() {
  {
    std::lock_guard lock(mutex_);
    EndConnection();
    session_id_ = 0;
    registration_id_ = 0;
    page_.reset();
    memory_.reset();
    shared_.reset();
  }
  Poke();
}

void TestAgent::Vanish() {
  {
    std::lock_guard lock(mutex_);
    listener_.Reset(-1);
    EndConnection();
  }
  Poke();
}

void TestAgent::Return() {
  {
    std::lock_guard lock(mutex_);
    Listen();
  }
  Poke();
}

void TestAgent::WakeTrainer() {
  abi::RankPage& rank_page = page();
  rank_page.agent_events.fetch_add(1, std::memory_order_release);
  FutexWakeAll(rank_page.agent_events, FutexScope::kShared);
}

void TestAgent::Grant(uint32_t slot) {
  abi::RegistrationMemory& registration = shared();
  std::byte* done = shared_->data() + registration.block_done_offset;
  for (uint32_t block = 0; block < registration.block_count; ++block) {
    reinterpret_cast<std::atomic<uint8_t>*>(done)[slot * registration.block_count + block].store(0);
  }
  abi::ImageSlot& image = registration.slots[slot];
  image.generation.fetch_add(1);
  image.captured_ns.store(0);
  image.state.store(abi::SlotState::kGranted, std::memory_order_release);
  WakeTrainer();
}

void TestAgent::Fence(uint32_t by_attempt) {
  page().fenced_by.store(by_attempt);
  WakeTrainer();
}

void TestAgent::Report(uint64_t step, hf_save_state state, hf_code code, const char* text) {
  abi::RankPage& rank_page = page();
  uint32_t index = rank_page.next_report_index.load();
  bool fresh = true;
  for (uint32_t i = 0; i < abi::kReportCount; ++i) {
    if (rank_page.reports[i].step.load() != step) continue;
    index = i;
    fresh = false;
  }
  abi::SaveReport& report = rank_page.reports[index % abi::kReportCount];
  report.sequence.fetch_add(1);
  report.step.store(step);
  report.state.store(state);
  report.code.store(code);
  std::snprintf(report.text, sizeof(report.text), "%s", text);
  report.sequence.fetch_add(1, std::memory_order_release);
  if (fresh) rank_page.next_report_index.store((index + 1) % abi::kReportCount);
  if (state == HF_SAVE_COMMITTED_PROCESS || state == HF_SAVE_COMMITTED_POWER) {
    rank_page.committed_process_step.store(step);
  }
  if (state == HF_SAVE_COMMITTED_POWER) rank_page.committed_power_step.store(step);
  WakeTrainer();
}

void TestAgent::Hold(const std::function<void()>& body) {
  std::lock_guard lock(mutex_);
  body();
}

// ---- Looking

bool TestAgent::Await(const std::function<bool()>& condition) {
  std::unique_lock lock(mutex_);
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    // Shared memory changes without a signal to this condition: look again soon.
    changed_.wait_for(lock, std::chrono::milliseconds(1));
    if (std::chrono::steady_clock::now() > end) return condition();
  }
  return true;
}

bool TestAgent::AwaitSlot(uint32_t slot, abi::SlotState state) {
  return Await([&] {
    return shared_ != nullptr &&
           shared().slots[slot].state.load(std::memory_order_acquire) == state;
  });
}

bool TestAgent::AwaitMessages(abi::MessageType type, int count) {
  return Await([&] { return counts_[type] >= count; });
}

abi::RegistrationMemory& TestAgent::shared() const {
  return *reinterpret_cast<abi::RegistrationMemory*>(shared_->data());
}

abi::RankPage& TestAgent::page() const { return *reinterpret_cast<abi::RankPage*>(page_->data()); }

std::vector<std::pair<uint32_t, std::string>> TestAgent::last_selection() const {
  std::lock_guard lock(mutex_);
  return last_selection_;
}

abi::OpenRequest TestAgent::last_open() const {
  std::lock_guard lock(mutex_);
  return last_open_;
}

int TestAgent::messages(abi::MessageType type) const {
  std::lock_guard lock(mutex_);
  const auto found = counts_.find(type);
  return found == counts_.end() ? 0 : found->second;
}

uint32_t TestAgent::BlockIndex(uint32_t slot, uint32_t block) const {
  return ReadAt<uint32_t>(shared_->data(),
                          shared().block_table_offset +
                              (uint64_t{slot} * shared().block_count + block) * sizeof(uint32_t));
}

void TestAgent::SetBlockIndex(uint32_t slot, uint32_t block, uint32_t index) {
  std::memcpy(shared_->data() + shared().block_table_offset +
                  (uint64_t{slot} * shared().block_count + block) * sizeof(uint32_t),
              &index, sizeof(index));
}

std::vector<std::byte> TestAgent::Image(uint32_t slot) const {
  const uint64_t block_bytes = shared().block_bytes;
  std::vector<std::byte> image(shared().block_count * block_bytes);
  for (uint32_t block = 0; block < shared().block_count; ++block) {
    std::memcpy(image.data() + block * block_bytes,
                memory_->data() + BlockIndex(slot, block) * block_bytes, block_bytes);
  }
  return image;
}

bool TestAgent::BlockDone(uint32_t slot, uint32_t block) const {
  std::byte* done = shared_->data() + shared().block_done_offset;
  return reinterpret_cast<std::atomic<uint8_t>*>(done)[slot * shared().block_count + block].load(
             std::memory_order_acquire) == 1;
}

uint64_t TestAgent::BlobBytes(uint32_t slot, uint32_t blob) const {
  return ReadAt<uint64_t>(shared_->data(),
                          shared().blob_bytes_offset +
                              (uint64_t{slot} * shared().blob_count + blob) * sizeof(uint64_t));
}

// ---- The agent's thread

void TestAgent::Poke() {
  RingEventFd(wake_.get());
  changed_.notify_all();
}

void TestAgent::Run() {
  for (;;) {
    int connection_fd = -1;
    int listener_fd = -1;
    int doorbell_fd = -1;
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
      if (connection_ != nullptr) connection_fd = connection_->fd();
      listener_fd = listener_.get();
      doorbell_fd = doorbell_.get();
    }
    pollfd ready[4] = {{wake_.get(), POLLIN, 0},
                       {connection_fd, POLLIN, 0},
                       {connection_fd < 0 ? listener_fd : -1, POLLIN, 0},
                       {doorbell_fd, POLLIN, 0}};
    poll(ready, 4, -1);
    std::lock_guard lock(mutex_);
    DrainEventFd(wake_.get());
    if (doorbell_.valid() && (ready[3].revents & POLLIN) != 0) {
      DrainEventFd(doorbell_.get());
      ++doorbell_rings_;
      Deliver();
    }
    if (connection_ != nullptr && (ready[1].revents & (POLLIN | POLLHUP)) != 0) {
      Message message;
      const Error error = connection_->Receive(&message, -1, Deadline::After(0));
      if (error.ok()) {
        Serve(std::move(message));
      } else if (error.code() != HF_DEADLINE_EXCEEDED) {
        EndConnection();
      }
    }
    if (connection_ == nullptr && listener_.valid() && (ready[2].revents & POLLIN) != 0) {
      UniqueFd accepted(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (accepted.valid()) connection_ = std::make_unique<Channel>(std::move(accepted));
    }
    changed_.notify_all();
  }
}

template <typename T>
void TestAgent::Reply(abi::MessageType type, uint32_t request_id, const T& body,
                      std::vector<int> fds) {
  if (connection_ == nullptr) return;
  // A trainer that has gone away in between is part of some tests.
  (void)connection_->Send(type, request_id, BodyOf(body), fds, Deadline::After(kNsPerSecond));
}

// True if the message was dealt with.
bool TestAgent::ApplyFault(Fault fault, abi::MessageType reply_type, uint32_t request_id) {
  const uint64_t few_bytes = 7;
  switch (fault) {
    case Fault::kSilence:
      return true;
    case Fault::kEndConnection:
      EndConnection();
      return true;
    case Fault::kVanish:
      listener_.Reset(-1);
      EndConnection();
      return true;
    case Fault::kGarbage:
      (void)send(connection_->fd(), "garbage, certainly no message", 29, MSG_NOSIGNAL);
      return true;
    case Fault::kShortReply:
      Reply(reply_type, request_id, few_bytes, {});
      return true;
    case Fault::kWrongVersion: {
      abi::MessageHeader header = {abi::kProtocolMagic, 77, reply_type, request_id, 0};
      (void)send(connection_->fd(), &header, sizeof(header), MSG_NOSIGNAL);
      return true;
    }
    case Fault::kNoFds:
    case Fault::kRefuse:
    case Fault::kFence:
    case Fault::kEnding:
      return false;
  }
  return false;
}

void TestAgent::Serve(Message message) {
  const abi::MessageType type = message.header.type;
  ++counts_[type];
  std::optional<Fault> fault;
  if (const auto found = faults_.find(type); found != faults_.end()) {
    fault = found->second;
    faults_.erase(found);
  } else if (const auto lasting = lasting_faults_.find(type); lasting != lasting_faults_.end()) {
    fault = lasting->second;
  }
  if (fault.has_value()) {
    const auto reply_type = static_cast<abi::MessageType>(
        static_cast<uint16_t>(type) + (type == abi::MessageType::kRestore ? 2 : 1));
    if (ApplyFault(*fault, reply_type, message.header.request_id)) return;
  }
  const bool no_fds = fault == Fault::kNoFds;
  if (fault == Fault::kRefuse || fault == Fault::kFence || fault == Fault::kEnding || no_fds) {
    const uint32_t id = message.header.request_id;
    hf_code code = no_fds ? HF_OK : HF_INVALID_ARGUMENT;
    if (fault == Fault::kFence) code = HF_FAILED_PRECONDITION;
    if (fault == Fault::kEnding) code = HF_UNAVAILABLE;
    if (type == abi::MessageType::kOpen) {
      abi::OpenReply reply = {};
      SetStatus(&reply.status, code, "refused by the script");
      reply.session_id = 1;
      reply.rank_page_bytes = sizeof(abi::RankPage);
      Reply(abi::MessageType::kOpenReply, id, reply, {});
    } else if (type == abi::MessageType::kRegister) {
      abi::RegisterReply reply = {};
      SetStatus(&reply.status, code, "refused by the script");
      Reply(abi::MessageType::kRegisterReply, id, reply, {});
    } else if (type == abi::MessageType::kRestore) {
      abi::RestoreReply reply = {};
      SetStatus(&reply.status, code, "refused by the script");
      Reply(abi::MessageType::kRestoreReply, id, reply, {});
    }
    return;
  }
  if (type == abi::MessageType::kOpen) ServeOpen(message);
  if (type == abi::MessageType::kRegister) ServeRegister(message);
  if (type == abi::MessageType::kRestore) ServeRestore(message);
  if (type == abi::MessageType::kRestoreCancel) delivering_ = false;
  if (type == abi::MessageType::kClose) EndConnection();
}

void TestAgent::ServeOpen(const Message& message) {
  abi::OpenRequest request;
  Require(message.Read(&request, 1, "kOpen").ok(), "kOpen");
  last_open_ = request;
  doorbell_.Reset(fcntl(message.fds[0].get(), F_DUPFD_CLOEXEC, 0));
  abi::OpenReply reply = {};
  reply.attempt = attempt_;
  reply.block_bytes = plan_.block_bytes;
  reply.rank_page_bytes = sizeof(abi::RankPage);
  if (request.resume_session_id != 0 && request.resume_session_id == session_id_ &&
      request.resume_registration_id == registration_id_) {
    reply.resumed = 1;
    reply.session_id = session_id_;
    Reply(abi::MessageType::kOpenReply, message.header.request_id, reply, {});
    return;
  }
  session_id_ = next_session_id_++;
  registration_id_ = 0;
  page_ = TestMemory::Make(sizeof(abi::RankPage));
  abi::RankPage& rank_page = page();
  rank_page.magic = abi::kRankPageMagic;
  rank_page.version = abi::kProtocolVersion;
  rank_page.session_id = session_id_;
  rank_page.due_every_steps = due_every_;
  rank_page.committed_process_step.store(abi::kNoStep);
  rank_page.committed_power_step.store(abi::kNoStep);
  for (abi::SaveReport& report : rank_page.reports) report.step.store(abi::kNoStep);
  reply.session_id = session_id_;
  Reply(abi::MessageType::kOpenReply, message.header.request_id, reply, {page_->fd()});
}

void TestAgent::FillDocument(const Message& message) {
  abi::RegisterRequest request;
  Require(message.Read(&request, 1, "kRegister").ok(), "kRegister");
  const int fd = message.fds[0].get();
  constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
  Require(fcntl(fd, F_GET_SEALS) == kSeals, "the document is not sealed");
  std::vector<std::byte> bytes(request.document_bytes);
  Require(pread(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), "pread");
  const auto header = ReadAt<abi::RegistrationDocument>(bytes.data(), 0);
  Require(header.magic == abi::kProtocolMagic && header.total_bytes == bytes.size() &&
              header.buffers_offset % 8 == 0 && header.blobs_offset % 8 == 0,
          "document header");
  const auto text = [&](uint64_t offset, uint64_t size) {
    Require(offset + size <= bytes.size(), "document offsets");
    return std::string(reinterpret_cast<const char*>(bytes.data() + offset), size);
  };
  document_ = TestDocument();
  document_.layout = text(header.layout_offset, header.layout_bytes);
  for (uint64_t i = 0; i < header.buffer_count; ++i) {
    const auto buffer = ReadAt<abi::DocumentBuffer>(bytes.data(), header.buffers_offset + 24 * i);
    document_.buffers.push_back(buffer);
    document_.buffer_names.push_back(text(buffer.name_offset, buffer.name_bytes));
  }
  for (uint64_t i = 0; i < header.blob_count; ++i) {
    const auto blob = ReadAt<abi::DocumentBlob>(bytes.data(), header.blobs_offset + 24 * i);
    document_.blobs.push_back(blob);
    document_.blob_names.push_back(text(blob.name_offset, blob.name_bytes));
  }
}

void TestAgent::MakeRegistrationMemory() {
  const uint64_t all_blocks = uint64_t{plan_.slot_count} * plan_.block_count;
  const uint64_t table = AlignUp(sizeof(abi::RegistrationMemory), 64);
  const uint64_t done = AlignUp(table + all_blocks * 4, 64);
  const uint64_t blobs = AlignUp(done + all_blocks, 64);
  shared_ = TestMemory::Make(blobs + plan_.slot_count * plan_.blobs.size() * 8);
  memory_ = TestMemory::Make(all_blocks * plan_.block_bytes);
  if (all_blocks > 0) std::memset(memory_->data(), 0xee, memory_->bytes());
  abi::RegistrationMemory& registration = shared();
  registration.magic = abi::kRegistrationMemoryMagic;
  registration.version = abi::kProtocolVersion;
  registration.registration_id = registration_id_;
  registration.slot_count = plan_.slot_count;
  registration.block_count = plan_.block_count;
  registration.blob_count = static_cast<uint32_t>(plan_.blobs.size());
  registration.block_bytes = plan_.block_bytes;
  registration.block_table_offset = table;
  registration.block_done_offset = done;
  registration.blob_bytes_offset = blobs;
  std::vector<uint32_t> order(all_blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(plan_.shuffle_seed));
  for (uint32_t slot = 0; slot < plan_.slot_count; ++slot) {
    for (uint32_t block = 0; block < plan_.block_count; ++block) {
      SetBlockIndex(slot, block, order[uint64_t{slot} * plan_.block_count + block]);
    }
  }
  for (uint32_t slot = 0; slot < plan_.granted; ++slot) Grant(slot);
}

void TestAgent::ServeRegister(const Message& message) {
  FillDocument(message);
  registration_id_ = next_registration_id_++;
  plan_ = make_plan_(document_);
  MakeRegistrationMemory();
  abi::CapturePlan header = {};
  header.magic = abi::kProtocolMagic;
  header.version = abi::kProtocolVersion;
  header.op_count = plan_.ops.size();
  header.blob_count = plan_.blobs.size();
  header.image_bytes = plan_.block_bytes * plan_.block_count;
  header.slot_bytes = header.image_bytes;
  const uint64_t ops_bytes = plan_.ops.size() * sizeof(abi::CaptureOp);
  const uint64_t blobs_bytes = plan_.blobs.size() * sizeof(abi::BlobArea);
  plan_memory_ = TestMemory::Make(sizeof(header) + ops_bytes + blobs_bytes);
  std::byte* at = plan_memory_->data();
  std::memcpy(at, &header, sizeof(header));
  if (ops_bytes > 0) std::memcpy(at + sizeof(header), plan_.ops.data(), ops_bytes);
  if (blobs_bytes > 0) {
    std::memcpy(at + sizeof(header) + ops_bytes, plan_.blobs.data(), blobs_bytes);
  }
  abi::RegisterReply reply = {};
  reply.registration_id = registration_id_;
  reply.memory_bytes = memory_->bytes();
  reply.registration_memory_bytes = shared_->bytes();
  reply.capture_plan_bytes = plan_memory_->bytes();
  reply.image_bytes = header.image_bytes;
  reply.block_bytes = plan_.block_bytes;
  if (mutate_register_) mutate_register_(reply, *shared_, *plan_memory_);
  Reply(abi::MessageType::kRegisterReply, message.header.request_id, reply,
        {memory_->fd(), shared_->fd(), plan_memory_->fd()});
}

void TestAgent::FillSelection(const Message& message) {
  abi::RestoreRequest request;
  Require(message.Read(&request, message.fd_count, "kRestore").ok(), "kRestore");
  Require(message.fd_count == (request.selection_bytes > 0 ? 1 : 0), "descriptors of kRestore");
  last_selection_.clear();
  if (request.selection_bytes == 0) return;
  const int fd = message.fds[0].get();
  constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
  Require(fcntl(fd, F_GET_SEALS) == kSeals, "the selection is not sealed");
  std::vector<std::byte> bytes(request.selection_bytes);
  Require(pread(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), "pread");
  const auto header = ReadAt<abi::RestoreSelection>(bytes.data(), 0);
  Require(header.magic == abi::kProtocolMagic, "selection header");
  for (uint64_t i = 0; i < header.pattern_count; ++i) {
    const auto entry = ReadAt<abi::SelectionPattern>(bytes.data(), sizeof(header) + 16 * i);
    Require(entry.text_offset + entry.text_bytes <= bytes.size(), "selection offsets");
    last_selection_.emplace_back(
        entry.of, std::string(reinterpret_cast<const char*>(bytes.data() + entry.text_offset),
                              entry.text_bytes));
  }
}

void TestAgent::ServeRestore(const Message& message) {
  const uint32_t id = message.header.request_id;
  FillSelection(message);
  abi::RestoreReply reply = {};
  if (!restore_.has_value() || restore_->reply_code != HF_OK) {
    SetStatus(&reply.status, restore_.has_value() ? restore_->reply_code : HF_NOT_FOUND,
              "nothing to restore, says the script");
    Reply(abi::MessageType::kRestoreReply, id, reply, {});
    return;
  }
  const TestRestore& script = *restore_;
  abi::RestoreRing& ring = shared().restore;
  ring.produced.store(ring.consumed.load());
  restore_maps_.clear();
  for (uint32_t i = 0; i < script.map_bytes.size(); ++i) {
    restore_maps_.push_back(TestMemory::Make(script.map_is_short ? 4096 : script.map_bytes[i]));
    const abi::ImageMap map = {i + 1, 0, script.map_bytes[i]};
    Reply(abi::MessageType::kImageMap, 0, map, {restore_maps_.back()->fd()});
  }
  std::vector<abi::RestoreOp> ops;
  for (const TestRestore::Piece& piece : script.pieces) {
    ops.insert(ops.end(), piece.ops.begin(), piece.ops.end());
  }
  auto operations = TestMemory::Make(ops.size() * sizeof(abi::RestoreOp));
  if (!ops.empty()) std::memcpy(operations->data(), ops.data(), operations->bytes());

  uint64_t blob_bytes =
      sizeof(abi::RestoredBlobs) + script.blobs.size() * sizeof(abi::RestoredBlob);
  uint64_t at = blob_bytes;
  for (const TestRestore::Blob& blob : script.blobs) {
    blob_bytes += blob.name.size() + blob.data.size();
  }
  auto blobs = TestMemory::Make(blob_bytes);
  const abi::RestoredBlobs header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                     script.blobs.size()};
  std::memcpy(blobs->data(), &header, sizeof(header));
  for (size_t i = 0; i < script.blobs.size(); ++i) {
    const TestRestore::Blob& blob = script.blobs[i];
    abi::RestoredBlob entry = {};
    entry.name_offset = at;
    entry.name_bytes = static_cast<uint32_t>(blob.name.size());
    entry.data_offset = at + blob.name.size();
    entry.data_bytes = blob.data.size();
    entry.scope = static_cast<uint32_t>(blob.scope);
    entry.rank = blob.rank;
    std::memcpy(blobs->data() + sizeof(header) + i * sizeof(entry), &entry, sizeof(entry));
    std::memcpy(blobs->data() + at, blob.name.data(), blob.name.size());
    std::memcpy(blobs->data() + entry.data_offset, blob.data.data(), blob.data.size());
    at += blob.name.size() + blob.data.size();
  }
  reply.step = script.step;
  reply.attempt = script.attempt;
  reply.world_size = script.world_size;
  reply.tensor_states = script.tensor_states;
  reply.tensor_states_left_out = script.tensor_states_left_out;
  reply.restore_from = script.restore_from;
  reply.op_count = ops.size();
  reply.operations_bytes = operations->bytes();
  reply.blobs_bytes = blobs->bytes();
  Reply(abi::MessageType::kRestoreReply, id, reply, {operations->fd(), blobs->fd()});
  delivering_ = true;
  delivered_ = 0;
  first_entry_ = ring.consumed.load();
  Deliver();
}

// Puts as many pieces into the ring as fit; ends the restore when all were consumed.
void TestAgent::Deliver() {
  if (!delivering_) return;
  TestRestore& script = *restore_;
  abi::RestoreRing& ring = shared().restore;
  const uint32_t consumed = ring.consumed.load(std::memory_order_acquire);
  uint64_t first_op = 0;
  for (size_t i = 0; i < delivered_; ++i) first_op += script.pieces[i].ops.size();
  while (delivered_ < script.pieces.size() &&
         ring.produced.load() - consumed < abi::kRestoreEntries) {
    const TestRestore::Piece& piece = script.pieces[delivered_];
    TestMemory& memory = piece.map_id == 0 || piece.map_id > restore_maps_.size()
                             ? *memory_
                             : *restore_maps_[piece.map_id - 1];
    if (piece.offset <= memory.bytes() && piece.bytes.size() <= memory.bytes() - piece.offset &&
        !piece.bytes.empty()) {
      std::memcpy(memory.data() + piece.offset, piece.bytes.data(), piece.bytes.size());
    }
    abi::RestoreEntry entry = {};
    entry.offset = piece.offset;
    entry.bytes = piece.bytes.size();
    entry.first_op = first_op;
    entry.op_count = piece.ops.size();
    entry.map_id = piece.map_id;
    ring.entries[ring.produced.load() % abi::kRestoreEntries] = entry;
    ring.produced.fetch_add(1, std::memory_order_release);
    first_op += piece.ops.size();
    ++delivered_;
  }
  FutexWakeAll(ring.produced, FutexScope::kShared);
  if (script.die_after.has_value()) {
    if (ring.consumed.load() - first_entry_ < *script.die_after) return;
    script.die_after.reset();
    EndConnection();
    return;
  }
  if (script.never_ends) return;
  if (delivered_ == script.pieces.size() && ring.consumed.load() == ring.produced.load()) {
    delivering_ = false;
    abi::RestoreDone done = {};
    SetStatus(&done.status, script.done_code, "the script's end of the restore");
    for (const TestRestore::Piece& piece : script.pieces) {
      for (const abi::RestoreOp& op : piece.ops) done.bytes += op.run_bytes * op.count;
    }
    done.bytes_from_memory = done.bytes / 2;
    Reply(abi::MessageType::kRestoreDone, 0, done, {});
  }
}

}  // namespace holdfast::hook
