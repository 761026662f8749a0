#include "hook/profiler/chain.h"

#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>

#include <string>

namespace holdfast::profiler {
namespace {

using hook::Error;
using hook::Token;
using hook::TokenKind;

constexpr auto kRelaxed = std::memory_order_relaxed;

// As NCCL does: the literal value, then libnccl-profiler-<value>.so if it is a bare name.
void* Open(const std::string& value, std::string* tried) {
  void* handle = dlopen(value.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr) return handle;
  const char* error = dlerror();
  *tried = error == nullptr ? value : error;
  const bool file_name = value.rfind("lib", 0) == 0 && value.size() > 3 &&
                         value.compare(value.size() - 3, 3, ".so") == 0;
  if (value.find('/') != std::string::npos || file_name) return nullptr;
  handle = dlopen(("libnccl-profiler-" + value + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    error = dlerror();
    *tried += "; ";
    *tried += error == nullptr ? "not found" : error;
  }
  return handle;
}

}  // namespace

struct Chain::Tables {
  Held communicators[abi::kBoardCommunicators];
  Held operations[hook::kOperationEntries];
  Held transfers[hook::kTransferEntries];
  Held steps[hook::kTransferEntries][hook::kStepsOpen];
  Held kernels[hook::kKernelEntries];
  Held proxy_threads[abi::kBoardSlots];
  Held others[hook::kOtherEntries];
};

hook::Result<std::unique_ptr<Chain>> Chain::Load(const char* value, int version, const void* own) {
  std::string tried;
  void* library = Open(value, &tried);
  if (library == nullptr) {
    return Error(HF_NOT_FOUND, "$HOLDFAST_PROFILER_CHAIN: '%s' cannot be loaded: %s", value,
                 tried.c_str());
  }
  std::unique_ptr<Chain> chain(new Chain());
  const int oldest = version == 4 ? 4 : 5;
  const void* symbol = nullptr;
  for (int i = version; symbol == nullptr && i >= oldest; --i) {
    symbol = dlsym(library, ("ncclProfiler_v" + std::to_string(i)).c_str());
    chain->version_ = i;
  }
  if (symbol == nullptr || symbol == own) {
    dlclose(library);
    if (symbol == own && own != nullptr) {
      return Error(HF_INVALID_ARGUMENT, "$HOLDFAST_PROFILER_CHAIN: '%s' is this plugin itself",
                   value);
    }
    return Error(HF_NOT_FOUND,
                 "$HOLDFAST_PROFILER_CHAIN: '%s' exports none of ncclProfiler_v%d to v%d", value,
                 version, oldest);
  }
  void* memory =
      mmap(nullptr, sizeof(Tables), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    dlclose(library);
    return Error(HF_RESOURCE_EXHAUSTED, "mmap of the chain's tables (%zu bytes): %s",
                 sizeof(Tables), strerror(errno));
  }
  chain->tables_ = static_cast<Tables*>(memory);
  const auto adopt = [&](const auto* profiler) {
    chain->name_ = profiler->name == nullptr ? "?" : profiler->name;
    chain->start_ = profiler->start;
    chain->stop_ = profiler->stop;
    chain->record_ = profiler->record;
    chain->finalize_ = profiler->finalize;
  };
  if (version == 4) {
    chain->v4_ = static_cast<const ProfilerV4*>(symbol);
    adopt(chain->v4_);
  } else {
    chain->v5_ = static_cast<const ProfilerV5*>(symbol);
    adopt(chain->v5_);
  }
  return chain;
}

Chain::~Chain() {
  if (tables_ != nullptr) munmap(tables_, sizeof(Tables));
}

uint64_t Chain::mask() const {
  const int mask = mask_.load(kRelaxed);
  return WithAncestors(static_cast<uint32_t>(mask)) & KnownEvents(version_);
}

bool Chain::Init(const InitCall& call, Token communicator) {
  static_assert(sizeof(std::atomic<int>) == sizeof(int) && std::atomic<int>::is_always_lock_free);
  int* const mask = reinterpret_cast<int*>(&mask_);
  void* context = nullptr;
  const NcclResult result = v4_ != nullptr
                                ? v4_->init(&context, mask, call.name, call.id, call.nodes,
                                            call.ranks, call.rank, call.logger)
                                : v5_->init(&context, call.id, mask, call.name, call.nodes,
                                            call.ranks, call.rank, call.logger);
  if (result != kNcclSuccess) return false;
  Held* held = Find(communicator);
  held->communicator.store(communicator, kRelaxed);
  held->handle.store(context, std::memory_order_release);
  return true;
}

void Chain::Finalize(Token communicator) {
  Held* held = Find(communicator);
  if (held == nullptr || held->communicator.load(kRelaxed) != communicator) return;
  void* context = held->handle.exchange(nullptr);
  if (context != nullptr) finalize_(context);
}

Chain::Held* Chain::Find(Token token) const {
  const uint32_t place = hook::PlaceOf(token);
  switch (hook::KindOf(token)) {
    case TokenKind::kCommunicator:
      return place < abi::kBoardCommunicators ? &tables_->communicators[place] : nullptr;
    case TokenKind::kOperation:
      return place < hook::kOperationEntries ? &tables_->operations[place] : nullptr;
    case TokenKind::kTransfer:
      return place < hook::kTransferEntries ? &tables_->transfers[place] : nullptr;
    case TokenKind::kStep:
      return place < hook::kTransferEntries ? &tables_->steps[place][token % hook::kStepsOpen]
                                            : nullptr;
    case TokenKind::kKernel:
      return place < hook::kKernelEntries ? &tables_->kernels[place] : nullptr;
    case TokenKind::kProxyThread:
      return place < abi::kBoardSlots ? &tables_->proxy_threads[place] : nullptr;
    case TokenKind::kOther:
      return place < hook::kOtherEntries ? &tables_->others[place] : nullptr;
  }
  return nullptr;
}

void* Chain::HandleOf(const hook::MonitorEvents& events, Token token, Use use) const {
  if (token == 0) return nullptr;
  const Held* held = Find(token);
  if (held == nullptr || held->token.load(std::memory_order_acquire) != token) return nullptr;
  const bool outlives_its_stop =
      hook::KindOf(token) == TokenKind::kOperation || hook::KindOf(token) == TokenKind::kOther;
  if (held->stopped.load(kRelaxed) && (use != Use::kParent || !outlives_its_stop)) return nullptr;
  // After the finalize of its communicator a plugin may have freed everything.
  return events.Live(held->communicator.load(kRelaxed)) ? held->handle.load(kRelaxed) : nullptr;
}

void Chain::Forget(Token token) {
  Held* held = Find(token);
  if (held != nullptr) held->token.store(0, kRelaxed);
}

void Chain::StartCopy(Token communicator, Token token, void* descriptor) {
  Held* held = Find(token);
  const Held* context = Find(communicator);
  if (held == nullptr) return;
  if (context == nullptr || hook::TagOf(communicator) != hook::TagOf(token) ||
      context->communicator.load(kRelaxed) != communicator) {
    return;
  }
  void* const its_context = context->handle.load(std::memory_order_acquire);
  if (its_context == nullptr) return;
  void* handle = nullptr;
  start_(its_context, &handle, descriptor);
  held->communicator.store(communicator, kRelaxed);
  held->handle.store(handle, kRelaxed);
  held->stopped.store(false, kRelaxed);
  held->token.store(token, std::memory_order_release);
}

void Chain::Record(const hook::MonitorEvents& events, Token token, int state,
                   StateArguments* arguments) {
  void* const handle = HandleOf(events, token, Use::kStopOrRecord);
  if (handle != nullptr) record_(handle, state, arguments);
}

void Chain::Stop(const hook::MonitorEvents& events, Token token) {
  void* const handle = HandleOf(events, token, Use::kStopOrRecord);
  if (handle == nullptr) return;
  Find(token)->stopped.store(true, kRelaxed);
  stop_(handle);
}

}  // namespace holdfast::profiler
