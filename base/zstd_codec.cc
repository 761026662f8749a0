#include "base/zstd_codec.h"

#include <zstd.h>

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

constexpr int kLevel = 6;
// Far enough back to see the reports of several seconds before; what a reader must hold.
constexpr int kWindowLog = 23;

}  // namespace

struct ZstdCompressor::State {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ~State() { ZSTD_freeCCtx(context); }

  void Run(std::string_view data, ZSTD_EndDirective directive, std::string& out) {
    ZSTD_inBuffer input{data.data(), data.size(), 0};
    std::array<char, 16 << 10> buffer;
    size_t left = 0;
    do {
      ZSTD_outBuffer output{buffer.data(), buffer.size(), 0};
      left = ZSTD_compressStream2(context, &output, &input, directive);
      CHECK(ZSTD_isError(left) == 0);  // it has all that it needs
      out.append(buffer.data(), output.pos);
    } while (left > 0 || input.pos < input.size);
  }
};

ZstdCompressor::ZstdCompressor() : state_(std::make_unique<State>()) {
  CHECK(state_->context != nullptr);
  for (const auto& [parameter, value] :
       {std::pair{ZSTD_c_compressionLevel, kLevel}, {ZSTD_c_windowLog, kWindowLog}}) {
    CHECK(ZSTD_isError(ZSTD_CCtx_setParameter(state_->context, parameter, value)) == 0);
  }
}

ZstdCompressor::~ZstdCompressor() = default;

void ZstdCompressor::Compress(std::string_view data, std::string& out) {
  state_->Run(data, ZSTD_e_flush, out);
}

void ZstdCompressor::Finish(std::string& out) { state_->Run({}, ZSTD_e_end, out); }

struct ZstdDecompressor::State {
  explicit State(std::string_view bytes) : input{bytes.data(), bytes.size(), 0} { Begin(); }
  explicit State(std::function<absl::StatusOr<std::string_view>()> function)
      : more(std::move(function)) {
    Begin();
  }
  ~State() { ZSTD_freeDCtx(context); }
  void Begin() {
    CHECK(context != nullptr);
    CHECK(ZSTD_isError(ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, kWindowLog)) == 0);
  }

  std::function<absl::StatusOr<std::string_view>()> more;  // may be empty
  ZSTD_DCtx* context = ZSTD_createDCtx();
  ZSTD_inBuffer input{nullptr, 0, 0};
  bool frame_ended = false;
};

ZstdDecompressor::ZstdDecompressor(std::string_view bytes)
    : state_(std::make_unique<State>(bytes)) {}

ZstdDecompressor::ZstdDecompressor(std::function<absl::StatusOr<std::string_view>()> more)
    : state_(std::make_unique<State>(std::move(more))) {}

ZstdDecompressor::~ZstdDecompressor() = default;

absl::Status ZstdDecompressor::Read(std::span<char> out, size_t* count) {
  ZSTD_outBuffer output{out.data(), out.size(), 0};
  *count = 0;
  while (output.pos < output.size && !state_->frame_ended) {
    if (state_->input.pos == state_->input.size && state_->more) {
      ASSIGN_OR_RETURN(const std::string_view input, state_->more());
      state_->input = {input.data(), input.size(), 0};
    }
    const size_t read_before = state_->input.pos;
    const size_t written_before = output.pos;
    const size_t left = ZSTD_decompressStream(state_->context, &output, &state_->input);
    *count = output.pos;
    if (ZSTD_isError(left) != 0) {
      return absl::DataLossError(absl::StrCat("zstd: ", ZSTD_getErrorName(left)));
    }
    state_->frame_ended = left == 0;
    if (state_->input.pos == read_before && output.pos == written_before) break;  // ends inside
  }
  return absl::OkStatus();
}

bool ZstdDecompressor::ended() const {
  return state_->frame_ended && state_->input.pos == state_->input.size;
}

}  // namespace holdfast
