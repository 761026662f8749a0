#include "hook/monitor_board.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace holdfast::hook {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

// How long the time-stamp counter's rate is measured: its error is then some 1e-4, until a reader
// finds it exactly.
constexpr int64_t kCalibrationNs = kNsPerMs;
// Two clocks are read at one instant if so little passes meanwhile; if that never happens (the
// thread loses its processor again and again), the shortest of so many tries is taken.
constexpr int64_t kInstantWidthNs = 500;
constexpr int kInstantTries = 20;

// Leaf 0x80000007, EDX bit 8: it ticks at one rate in all power states, and all cores have one.
bool HasInvariantTsc() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0x80000007, &eax, &ebx, &ecx, &edx) != 0 && (edx & 1u << 8) != 0;
}

std::string Variable(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

uint32_t NumberOr(const char* name, uint32_t otherwise) {
  const std::string text = Variable(name);
  char* end = nullptr;
  errno = 0;
  const unsigned long value = strtoul(text.c_str(), &end, 10);
  const bool number = !text.empty() && errno == 0 && *end == '\0' && text[0] != '-';
  return number && value < UINT32_MAX ? static_cast<uint32_t>(value) : otherwise;
}

void CopyText(const std::string& from, char* to, size_t capacity) {
  const size_t bytes = Utf8PrefixBytes(from.data(), from.size(), capacity - 1);
  std::memcpy(to, from.data(), bytes);
  to[bytes] = '\0';
}

// A name as words, so that a reader at the same time sees torn text at worst.
void StoreText(const char* text, std::atomic<uint64_t>* words, size_t capacity) {
  for (size_t i = 0; i < capacity / 8; ++i) words[i].store(0, kRelease);
  if (text == nullptr) return;
  const size_t bytes = Utf8PrefixBytes(text, strnlen(text, capacity), capacity - 1);
  for (size_t at = 0; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text + at, std::min<size_t>(8, bytes - at));
    words[at / 8].store(word, kRelease);
  }
}

}  // namespace

MonitorIdentity ReadMonitorIdentity() {
  MonitorIdentity identity;
  identity.job = Variable("HOLDFAST_JOB");
  identity.attempt_key = Variable("HOLDFAST_ATTEMPT_KEY");
  if (identity.attempt_key.empty() && getenv("TORCHELASTIC_RUN_ID") != nullptr) {
    identity.attempt_key =
        Variable("TORCHELASTIC_RUN_ID") + ":" + Variable("TORCHELASTIC_RESTART_COUNT");
  }
  identity.node = Variable("HOLDFAST_NODE");
  if (identity.node.empty()) {
    char host[128] = {};
    if (gethostname(host, sizeof(host) - 1) == 0) identity.node = host;
  }
  identity.rank = NumberOr("RANK", UINT32_MAX);
  identity.world_size = NumberOr("WORLD_SIZE", 0);
  identity.local_rank = NumberOr("LOCAL_RANK", 0);
  return identity;
}

Result<abi::MonitorLevel> ReadMonitorLevel() {
  const std::string text = Variable("HOLDFAST_MONITOR");
  if (text.empty() || text == "light") return abi::MonitorLevel::kLight;
  if (text == "full") return abi::MonitorLevel::kFull;
  if (text == "off") return abi::MonitorLevel::kOff;
  return Error(HF_INVALID_ARGUMENT, "$HOLDFAST_MONITOR: expected off, light or full, found '%.64s'",
               text.c_str());
}

Result<std::unique_ptr<MonitorBoard>> MonitorBoard::Create(abi::BoardWriter writer,
                                                           abi::MonitorLevel level,
                                                           const MonitorIdentity& identity,
                                                           Clock clock) {
  std::unique_ptr<MonitorBoard> board(new MonitorBoard());
  board->fd_ = UniqueFd(memfd_create("holdfast-monitor", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!board->fd_.valid()) {
    return Error(HF_RESOURCE_EXHAUSTED, "memfd_create: %s", strerror(errno));
  }
  if (ftruncate(board->fd(), static_cast<off_t>(abi::kBoardBytes)) != 0 ||
      fcntl(board->fd(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    return Error(HF_RESOURCE_EXHAUSTED, "sizing the monitor's memfd to %llu bytes: %s",
                 static_cast<unsigned long long>(abi::kBoardBytes), strerror(errno));
  }
  Result<Mapping> mapped =
      Mapping::Map(board->fd(), abi::kBoardBytes, Mapping::Access::kReadWrite, "monitor board");
  if (!mapped.ok()) return mapped.error();
  board->memory_ = std::move(mapped.value());
  // Small pages: most of the board is never touched. Dropped: it is a wish.
  madvise(board->memory_.data(), abi::kBoardBytes, MADV_NOHUGEPAGE);
  board->WriteHeader(writer, level, identity, clock == Clock::kBest && HasInvariantTsc());
  return board;
}

void MonitorBoard::WriteHeader(abi::BoardWriter writer, abi::MonitorLevel level,
                               const MonitorIdentity& identity, bool tsc) {
  // The objects of a fresh memfd are all zeros, which is what each of them begins with.
  std::byte* const data = memory_.data();
  header_ = reinterpret_cast<abi::BoardHeader*>(data);
  uint64_t at = sizeof(abi::BoardHeader);
  header_->communicators_offset = static_cast<uint32_t>(at);
  communicators_ = reinterpret_cast<abi::Communicator*>(data + at);
  at += sizeof(abi::Communicator) * abi::kBoardCommunicators;
  header_->keys_offset = static_cast<uint32_t>(at);
  keys_ = reinterpret_cast<std::atomic<uint64_t>*>(data + at);
  at += sizeof(uint64_t) * abi::kBoardSlots;
  header_->slots_offset = static_cast<uint32_t>(at);
  slots_ = reinterpret_cast<abi::Slot*>(data + at);
  at += sizeof(abi::Slot) * abi::kBoardSlots;
  header_->rings_offset = static_cast<uint32_t>(at);
  rings_ = reinterpret_cast<abi::Ring*>(data + at);
  requests_ = reinterpret_cast<const abi::BoardRequests*>(data + abi::kBoardRequestsAt);
  header_->total_bytes = abi::kBoardBytes;
  header_->communicator_count = abi::kBoardCommunicators;
  header_->slot_count = abi::kBoardSlots;
  header_->ring_count = abi::kBoardRings;
  header_->ring_record_count = abi::kRingRecords;
  header_->writer = writer;
  header_->process_id = static_cast<uint32_t>(getpid());
  header_->level = level;
  const bool full = level == abi::MonitorLevel::kFull;
  header_->window.store(full ? 1 : 0, kRelaxed);
  window_until_.store(full ? UINT64_MAX : 0, kRelaxed);
  header_->rank = identity.rank;
  header_->world_size = identity.world_size;
  header_->local_rank = identity.local_rank;
  CopyText(identity.job, header_->job, sizeof(header_->job));
  CopyText(identity.attempt_key, header_->attempt_key, sizeof(header_->attempt_key));
  CopyText(identity.node, header_->node, sizeof(header_->node));

  tsc_ = tsc;
  header_->clock = tsc ? abi::BoardClock::kTsc : abi::BoardClock::kMonotonicNs;
  const Instant start = BothClocks();
  header_->start_monotonic_ns = start.monotonic_ns;
  header_->start_ticks = start.ticks;
  header_->ticks_per_second = kNsPerSecond;
  if (tsc) {
    Instant end = start;
    while (end.monotonic_ns - start.monotonic_ns < kCalibrationNs) end = BothClocks();
    const double passed_ns = static_cast<double>(end.monotonic_ns - start.monotonic_ns);
    const double ticks = static_cast<double>(end.ticks - start.ticks);
    header_->ticks_per_second = static_cast<uint64_t>(ticks / passed_ns * 1e9);
  }
  foreign_idle_ticks_ = header_->ticks_per_second * kForeignIdleSeconds;
  header_->version = abi::kBoardVersion;
  header_->magic = abi::kBoardMagic;
}

MonitorBoard::Instant MonitorBoard::BothClocks() const {
  Instant best = {};
  int64_t best_width_ns = INT64_MAX;
  for (int i = 0; i < kInstantTries && best_width_ns > kInstantWidthNs; ++i) {
    const int64_t before_ns = MonotonicNs();
    const uint64_t ticks = Now();
    const int64_t width_ns = MonotonicNs() - before_ns;
    if (width_ns >= best_width_ns) continue;
    best_width_ns = width_ns;
    best = {before_ns, tsc_ ? ticks : static_cast<uint64_t>(before_ns)};
  }
  return best;
}

void MonitorBoard::Reset(abi::Communicator& place, const CommunicatorInfo& info, uint64_t token,
                         bool foreign) const {
  place.token.store(token, kRelease);
  place.hash.store(info.hash, kRelease);
  place.ranks.store(info.ranks, kRelease);
  place.rank.store(info.rank, kRelease);
  place.nodes.store(info.nodes, kRelease);
  place.foreign.store(foreign ? 1 : 0, kRelease);
  place.closed_ticks.store(0, kRelease);
  StoreText(info.name, place.name, abi::kCommunicatorNameBytes);
  for (std::atomic<uint64_t>* word :
       {&place.enqueued, &place.started, &place.finished, &place.last_started, &place.last_finished,
        &place.enqueued_ticks, &place.started_ticks, &place.finished_ticks, &place.api_calls,
        &place.kernel_launches, &place.collectives, &place.last_collective_finished,
        &place.running_ticks, &place.running_since}) {
    word->store(0, kRelease);
  }
  for (uint32_t kind = 0; kind < abi::kOperationKinds; ++kind) {
    place.kind_count[kind].store(0, kRelease);
    place.kind_started[kind].store(0, kRelease);
    place.kind_finished[kind].store(0, kRelease);
    place.kind_nccl_sequence[kind].store(0, kRelease);
  }
  for (abi::RecentOperation& recent : place.recent) recent.number.store(0, kRelease);
  place.opened_ticks.store(Now(), kRelease);
}

uint32_t MonitorBoard::OpenCommunicator(const CommunicatorInfo& info, uint64_t token_prefix,
                                        int index_shift, int generation_shift) const {
  constexpr uint32_t kOwn = abi::kBoardCommunicators - abi::kBoardForeignCommunicators;
  // Fresh places first, then the one that was closed longest ago: evidence stays long. A place that
  // somebody else takes in between is skipped; after as many rounds as places nothing is left.
  for (uint32_t round = 0; round < kOwn; ++round) {
    uint32_t best = kNoPlace;
    uint64_t best_closed = UINT64_MAX;
    for (uint32_t i = 0; i < kOwn; ++i) {
      const abi::CommunicatorState state = communicators_[i].state.load(kAcquire);
      uint64_t closed = 0;
      if (state == abi::CommunicatorState::kClosed) {
        closed = communicators_[i].closed_ticks.load(kAcquire);
      } else if (state != abi::CommunicatorState::kEmpty) {
        continue;
      }
      if (best == kNoPlace || closed < best_closed) {
        best = i;
        best_closed = closed;
      }
      if (closed == 0) break;
    }
    if (best == kNoPlace) break;
    abi::Communicator& place = communicators_[best];
    abi::CommunicatorState state = place.state.load(kAcquire);
    if (state != abi::CommunicatorState::kEmpty && state != abi::CommunicatorState::kClosed) {
      continue;
    }
    if (!place.state.compare_exchange_strong(state, abi::CommunicatorState::kChanging)) continue;
    const uint32_t generation = place.generation.load(kRelaxed) + 1;
    place.generation.store(generation, kRelease);
    Reset(place, info,
          token_prefix | uint64_t{best} << index_shift |
              uint64_t{generation & 0xffff} << generation_shift,
          false);
    place.state.store(abi::CommunicatorState::kOpen, kRelease);
    return best;
  }
  CountDrop(abi::Drop::kCommunicators);
  return kNoPlace;
}

void MonitorBoard::CloseCommunicator(uint32_t index) const {
  communicators_[index].closed_ticks.store(Now(), kRelease);
  communicators_[index].state.store(abi::CommunicatorState::kClosed, kRelease);
}

uint32_t MonitorBoard::ForeignCommunicator(uint64_t token) const {
  constexpr uint32_t kFirst = abi::kBoardCommunicators - abi::kBoardForeignCommunicators;
  const uint64_t now = Now();
  const uint32_t start = static_cast<uint32_t>(token * 0x9e3779b97f4a7c15u >> 58);
  uint32_t take = kNoPlace;
  uint64_t take_used = UINT64_MAX;
  for (uint32_t probe = 0; probe < kForeignProbes; ++probe) {
    const uint32_t index = kFirst + (start + probe) % abi::kBoardForeignCommunicators;
    abi::Communicator& place = communicators_[index];
    const abi::CommunicatorState state = place.state.load(kAcquire);
    if (state == abi::CommunicatorState::kChanging) continue;
    const uint64_t used =
        state == abi::CommunicatorState::kOpen ? place.started_ticks.load(kAcquire) : 0;
    if (state == abi::CommunicatorState::kOpen && place.token.load(kAcquire) == token) {
      place.started_ticks.store(now, kRelease);
      return index;
    }
    if (used < take_used) {
      take = index;
      take_used = used;
    }
  }
  const bool idle = take_used == 0 || now - take_used > foreign_idle_ticks_;
  if (take == kNoPlace || !idle) {
    CountDrop(abi::Drop::kForeign);
    return kNoPlace;
  }
  abi::Communicator& place = communicators_[take];
  abi::CommunicatorState state = place.state.load(kAcquire);
  if (state == abi::CommunicatorState::kChanging ||
      !place.state.compare_exchange_strong(state, abi::CommunicatorState::kChanging)) {
    CountDrop(abi::Drop::kForeign);
    return kNoPlace;
  }
  place.generation.store(place.generation.load(kRelaxed) + 1, kRelease);
  Reset(place, CommunicatorInfo(), token, true);
  place.started_ticks.store(now, kRelease);
  place.state.store(abi::CommunicatorState::kOpen, kRelease);
  return take;
}

// Whether a key's communicator is still there.
bool MonitorBoard::Live(uint64_t key) const {
  const abi::SlotKey decoded = abi::DecodeSlotKey(key);
  const abi::Communicator& communicator = communicators_[decoded.communicator];
  return communicator.state.load(kAcquire) == abi::CommunicatorState::kOpen &&
         (communicator.generation.load(kAcquire) & 0xffff) == decoded.generation;
}

bool MonitorBoard::TakeSlot(uint32_t place, uint64_t found, uint64_t key) const {
  // Busy while it is emptied: no reader pairs the new key with the old contents.
  if (!keys_[place].compare_exchange_strong(found, abi::kBusyKey)) return false;
  abi::Slot& slot = slots_[place];
  SlotChange change(slot);
  for (std::atomic<uint64_t>* word : {&slot.operation, &slot.steps, &slot.bytes, &slot.waited[0],
                                      &slot.waited[1], &slot.waited[2]}) {
    word->store(0, kRelease);
  }
  change.SetState(abi::WaitState::kNone, 0, abi::OperationKind::kUnknown, Now());
  for (std::atomic<uint64_t>& waited : slot.waited) waited.store(0, kRelease);
  change.Commit();
  keys_[place].store(key, kRelease);
  // Release: who sees the count sees the key.
  header_->slots_taken.fetch_add(1, kRelease);
  return true;
}

uint32_t MonitorBoard::FindSlot(uint32_t communicator, uint32_t channel, uint32_t peer,
                                abi::SlotDirection direction) const {
  const uint64_t key =
      abi::EncodeSlotKey({communicator, communicators_[communicator].generation.load(kAcquire),
                          channel, peer, direction});
  // The slots of a communicator lie together, so that little of the board is ever touched; where
  // one has more than fit there (all-to-all with many peers), the others lie anywhere.
  const uint32_t near =
      communicator * 512 + (channel & 63) * 8 + (peer & 3) * 2 + static_cast<uint32_t>(direction);
  const uint32_t far = static_cast<uint32_t>(key * 0x9e3779b97f4a7c15u >> 32);
  // A second time if another thread took the place in between.
  for (int attempt = 0; attempt < 2; ++attempt) {
    uint32_t take = kNoPlace;
    uint64_t take_key = 0;
    for (uint32_t probe = 0; probe < 2 * kSlotProbes; ++probe) {
      const uint32_t place = ((probe < kSlotProbes ? near : far) + probe) % abi::kBoardSlots;
      const uint64_t found = keys_[place].load(kAcquire);
      if (found == key) return place;
      if (found == abi::kBusyKey) continue;
      if (take == kNoPlace && (found == 0 || !Live(found))) {
        take = place;
        take_key = found;
      }
      if (found == 0) break;  // nothing was ever put behind an empty place
    }
    if (take == kNoPlace) break;
    if (TakeSlot(take, take_key, key)) return take;
  }
  CountDrop(abi::Drop::kSlots);
  return kNoPlace;
}

abi::Ring* MonitorBoard::FindRing() const {
  // The thread's control block: an address that no other living thread has. A later thread at the
  // same address goes on in the ring of the one that has ended.
  const uint64_t self = reinterpret_cast<uint64_t>(__builtin_thread_pointer());
  const uint32_t start = static_cast<uint32_t>(self * 0x9e3779b97f4a7c15u >> 59);
  static_assert(abi::kBoardRings == 1u << 5);
  for (uint32_t probe = 0; probe < abi::kBoardRings; ++probe) {
    abi::Ring& ring = rings_[(start + probe) % abi::kBoardRings];
    uint64_t owner = ring.thread.load(kRelaxed);
    if (owner == self) return &ring;
    if (owner == 0 && ring.thread.compare_exchange_strong(owner, self)) return &ring;
  }
  return nullptr;
}

void MonitorBoard::Record(const RecordInfo& info, uint64_t now) const {
  if (!recording()) return;
  if (now > window_until_.load(kRelaxed)) {
    header_->window.store(0, kRelaxed);
    return;
  }
  abi::Ring* ring = FindRing();
  if (ring == nullptr) {
    CountDrop(abi::Drop::kRings);
    return;
  }
  const uint64_t index = ring->written.load(kRelaxed);
  abi::Record& record = ring->records[index % abi::kRingRecords];
  record.ticks.store(now, kRelease);
  record.what.store(static_cast<uint64_t>(info.kind) | uint64_t{info.detail} << 8 |
                        uint64_t{info.place & 0xffff} << 16 | uint64_t{info.step} << 32,
                    kRelease);
  record.operation.store(info.operation, kRelease);
  record.value.store(info.value, kRelease);
  ring->written.store(index + 1, kRelease);
}

// Two threads may be here, and a third may close the window that was before: then the next call
// opens it again, as it finds it closed before its time.
void MonitorBoard::OpenWindow(uint64_t until, uint64_t now) const {
  const bool longer = until > window_until_.load(kRelaxed);
  if (!longer && header_->window.load(kRelaxed) != 0) return;
  if (until - now > header_->ticks_per_second * abi::kWindowSecondsMax) return;
  window_until_.store(until, kRelaxed);
  header_->window.store(1, kRelaxed);
}

void MonitorBoard::StepDone(uint64_t step) const {
  header_->step.store(step, kRelaxed);
  header_->step_ticks.store(Now(), kRelaxed);
  // Release: who reads the count reads this step and time, or later ones.
  header_->step_count.fetch_add(1, kRelease);
}

void MonitorBoard::SetSection(uint32_t depth, const char* name) const {
  if (depth < abi::kBoardSectionDepth) {
    StoreText(name, header_->section_names[depth], abi::kBoardSectionNameBytes);
  }
  SetSectionDepth(depth + 1);
}

void MonitorBoard::SetSectionDepth(uint32_t depth) const {
  header_->section_ticks.store(Now(), kRelaxed);
  header_->section_depth.store(depth, kRelease);
}

}  // namespace holdfast::hook
