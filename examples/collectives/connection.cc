#include "examples/collectives/connection.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

FrameHeader HeaderOf(const FlowInProxy& flow, const Chunk& chunk) {
  FrameHeader header;
  header.kind = flow.operation->kind();
  header.step = chunk.step;
  header.sequence = flow.operation->sequence;
  header.message_bytes = chunk.message_bytes;
  header.offset_bytes = chunk.offset_bytes;
  header.payload_bytes = static_cast<uint32_t>(chunk.bytes());
  return header;
}

void Begin(CommunicatorTrace& trace, FlowInProxy& flow) {
  if (std::exchange(flow.in_progress, true)) return;
  trace.Record(flow.event, EventState::kProxyOpInProgress);
}

// Opens steps as far as there may be any. True if it did.
bool PostSteps(CommunicatorTrace& trace, FlowInProxy& flow, EventState state) {
  bool moved = false;
  while (flow.posted < flow.flow->chunk_count() && flow.posted < flow.done + kCredits) {
    void*& step = flow.steps[flow.posted % kCredits];
    step = trace.StartStep(flow.operation->event_mask, flow.event, flow.posted);
    trace.Record(step, state);
    ++flow.posted;
    moved = true;
  }
  return moved;
}

// The step of the chunk that is done.
void StopStep(CommunicatorTrace& trace, FlowInProxy& flow) {
  trace.Stop(std::exchange(flow.steps[flow.done % kCredits], nullptr));
  ++flow.done;
}

// Removes the first flow if it is over. True if it was.
bool PopFinished(CommunicatorTrace& trace, std::deque<FlowInProxy>& flows) {
  if (flows.front().done < flows.front().flow->chunk_count()) return false;
  trace.Stop(flows.front().event);
  flows.pop_front();
  return true;
}

}  // namespace

// ---- Send

void SendConnection::Push(FlowInProxy flow) {
  flow.base = chunk_count_;
  chunk_count_ += flow.flow->chunk_count();
  flows.push_back(std::move(flow));
}

bool SendConnection::Post(FlowInProxy& flow) {
  return PostSteps(trace_, flow, EventState::kSendGpuWait);
}

bool SendConnection::Transmit(FlowInProxy& flow) {
  bool moved = false;
  while (flow.middle < flow.posted && flow.flow->produced.load(kAcquire) > flow.middle) {
    void* const step = flow.steps[flow.middle % kCredits];
    // At every try, as NCCL does.
    trace_.Record(step, EventState::kSendPeerWait);
    if (is_silent || link->queued() >= link->posted()) break;
    const Chunk& chunk = flow.flow->chunks[flow.middle];
    link->Queue(HeaderOf(flow, chunk), chunk.from);
    trace_.Record(step, EventState::kSendWait, chunk.bytes());
    ++flow.middle;
    moved = true;
  }
  return moved;
}

bool SendConnection::Complete(FlowInProxy& flow, bool& tells_device) {
  if (is_silent) return false;
  bool moved = false;
  const auto written = static_cast<uint32_t>(link->written() - flow.base);
  if (flow.flow->written.load() != written) {
    flow.flow->written.store(written, kRelease);
    tells_device = tells_device || written == flow.flow->chunk_count();
  }
  const uint64_t completed = link->arrived() - flow.base;
  while (flow.done < flow.middle && flow.done < completed) {
    StopStep(trace_, flow);
    moved = true;
  }
  if (moved) {
    // The device cares if it had no place for its next chunk. Stored here before `produced` is
    // read, and the other way round there, in one order for both: one of the two sees the other.
    const uint32_t limit = flow.flow->completed.load() + kCredits;
    flow.flow->completed.store(flow.done);
    tells_device =
        tells_device || (limit < flow.flow->chunk_count() && flow.flow->produced.load() >= limit);
  }
  return moved;
}

absl::Status SendConnection::Progress(Progressed& progressed) {
  while (!flows.empty()) {
    FlowInProxy& flow = flows.front();
    Begin(trace_, flow);
    const absl::Status pumped = is_silent ? absl::OkStatus() : link->Pump();
    bool moved = Complete(flow, progressed.tells_device);
    // A receiver that has all it wanted may close its end.
    if (!pumped.ok() && flow.done < flow.flow->chunk_count()) return pumped;
    moved = Post(flow) || moved;
    const bool transmitted = Transmit(flow);
    if (transmitted) RETURN_IF_ERROR(link->Pump());
    moved = moved || transmitted;
    if (moved) progressed.moved = true;
    if (!PopFinished(trace_, flows) && !moved) break;
  }
  return absl::OkStatus();
}

// ---- Receive

void ReceiveConnection::Push(FlowInProxy flow) {
  flow.base = chunk_count_;
  chunk_count_ += flow.flow->chunk_count();
  flows.push_back(std::move(flow));
}

bool ReceiveConnection::Post(FlowInProxy& flow) {
  const bool moved = PostSteps(trace_, flow, EventState::kReceiveWait);
  credit_.posted = flow.base + flow.posted;
  return moved;
}

std::byte* ReceiveConnection::TakePlace() {
  if (free_places_.empty()) {
    places_.push_back(std::make_unique<std::byte[]>(chunk_bytes_));
    return places_.back().get();
  }
  std::byte* const place = free_places_.back();
  free_places_.pop_back();
  return place;
}

absl::Status ReceiveConnection::CheckHeader(const FlowInProxy& flow, const Chunk& chunk) const {
  const FrameHeader& found = link->header();
  const FrameHeader expected = HeaderOf(flow, chunk);
  if (found.kind != expected.kind || found.sequence != expected.sequence ||
      found.step != expected.step || found.message_bytes != expected.message_bytes) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "ranks disagree: expected %s #%d step %d of %d bytes, found %s #%d step %d of %d bytes",
        Name(expected.kind), expected.sequence, expected.step, expected.message_bytes,
        Name(found.kind), found.sequence, found.step, found.message_bytes));
  }
  if (found.offset_bytes != expected.offset_bytes ||
      found.payload_bytes != expected.payload_bytes) {
    return absl::DataLossError(absl::StrFormat("chunk of %d bytes at %d: expected %d at %d",
                                               found.payload_bytes, found.offset_bytes,
                                               expected.payload_bytes, expected.offset_bytes));
  }
  return absl::OkStatus();
}

absl::Status ReceiveConnection::Arrive(FlowInProxy& flow, Progressed& progressed) {
  uint32_t arrived = flow.flow->arrived.load();
  while (arrived < flow.posted) {
    const Chunk& chunk = flow.flow->chunks[arrived];
    if (!has_header_) {
      ASSIGN_OR_RETURN(has_header_, link->ReceiveHeader());
      if (!has_header_) break;
      RETURN_IF_ERROR(CheckHeader(flow, chunk));
      // Before the device has come to the operation, memory may be another operation's.
      const bool in_place =
          chunk.combine == Combine::kCopy && flow.operation->kernel_started_ns.load(kAcquire) != 0;
      std::byte* const place = in_place ? nullptr : TakePlace();
      flow.flow->staged[arrived % kCredits] = place;
      arriving_into_ = in_place ? chunk.into : std::span(place, chunk.into.size());
    }
    ASSIGN_OR_RETURN(const bool is_whole, link->ReceivePayload(arriving_into_));
    if (!is_whole) break;
    has_header_ = false;
    trace_.Record(flow.steps[arrived % kCredits], EventState::kReceiveFlushWait, chunk.bytes());
    ++arrived;
    ++credit_.arrived;
    flow.flow->arrived.store(arrived, kRelease);
    progressed.moved = progressed.tells_device = true;
    progressed.device_bytes += chunk.bytes();
  }
  return absl::OkStatus();
}

bool ReceiveConnection::Consume(FlowInProxy& flow) {
  bool moved = false;
  const uint32_t consumed = flow.flow->consumed.load(kAcquire);
  const uint32_t flushed = flow.flow->flushed.load(kAcquire);
  while (flow.middle < flushed) {
    trace_.Record(flow.steps[flow.middle % kCredits], EventState::kReceiveGpuWait,
                  flow.flow->chunks[flow.middle].bytes());
    ++flow.middle;
    moved = true;
  }
  while (flow.done < consumed) {
    std::byte*& place = flow.flow->staged[flow.done % kCredits];
    if (place != nullptr) free_places_.push_back(std::exchange(place, nullptr));
    StopStep(trace_, flow);
    moved = true;
  }
  return moved;
}

absl::Status ReceiveConnection::Progress(Progressed& progressed) {
  while (!flows.empty()) {
    FlowInProxy& flow = flows.front();
    Begin(trace_, flow);
    bool moved = Consume(flow);
    moved = Post(flow) || moved;
    if (link.has_value() && !is_silent) RETURN_IF_ERROR(Arrive(flow, progressed));
    if (moved) progressed.moved = true;
    if (!PopFinished(trace_, flows) && !moved) break;
  }
  return link.has_value() && !is_silent ? link->GiveCredit(credit_) : absl::OkStatus();
}

}  // namespace collectives
