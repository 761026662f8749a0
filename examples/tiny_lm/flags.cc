#include "examples/tiny_lm/flags.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "examples/collectives/status_macros.h"

namespace tiny_lm {
namespace {

constexpr uint32_t kAxisMax = 1024;
constexpr uint32_t kLayersMax = 1024;
constexpr const char* kBitFlipForm =
    "rank=R,step=S,tensor=NAME,element=E,bit=B and perhaps state=NAME";

// Sets an option from the flag's value, which is empty for a flag without one.
using Setter = std::function<absl::Status(TrainerOptions&, const std::string&)>;

struct Flag {
  const char* name;
  const char* value_name;  // or null: the flag takes no value
  const char* help;
  Setter set;
};

absl::Status Expected(const char* what, const std::string& found) {
  return absl::InvalidArgumentError(absl::StrFormat("expected %s, found '%s'", what, found));
}

Setter Count(uint64_t TrainerOptions::*member, uint64_t min, uint64_t max) {
  return [=](TrainerOptions& options, const std::string& text) -> absl::Status {
    uint64_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || value < min || value > max) {
      return Expected(absl::StrFormat("a number from %d to %d", min, max).c_str(), text);
    }
    options.*member = value;
    return absl::OkStatus();
  };
}

Setter Real(double TrainerOptions::*member) {
  return [=](TrainerOptions& options, const std::string& text) -> absl::Status {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !(value >= 0 && value <= 1e9)) {
      return Expected("a number from 0 to 1e9", text);
    }
    options.*member = value;
    return absl::OkStatus();
  };
}

Setter Milliseconds(int64_t CheckpointingOptions::*nanoseconds) {
  return [=](TrainerOptions& options, const std::string& text) -> absl::Status {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !(value >= 0 && value <= 1e9)) {
      return Expected("milliseconds from 0 to 1e9", text);
    }
    options.checkpointing.*nanoseconds = static_cast<int64_t>(value * 1e6);
    return absl::OkStatus();
  };
}

Setter Switch(bool TrainerOptions::*member, bool value) {
  return [=](TrainerOptions& options, const std::string&) {
    options.*member = value;
    return absl::OkStatus();
  };
}

Setter Size(uint64_t TrainerOptions::*member) {
  return [=](TrainerOptions& options, const std::string& text) -> absl::Status {
    ASSIGN_OR_RETURN(options.*member, ParseSize(text));
    return absl::OkStatus();
  };
}

Setter Ranks(uint32_t ParallelOptions::*member) {
  return [=](TrainerOptions& options, const std::string& text) -> absl::Status {
    uint32_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || value < 1 || value > kAxisMax) {
      return Expected(absl::StrFormat("a number from 1 to %d", kAxisMax).c_str(), text);
    }
    options.parallel.*member = value;
    return absl::OkStatus();
  };
}

absl::Status SetZero(TrainerOptions& options, const std::string& text) {
  if (text.size() != 1 || text[0] < '0' || text[0] > '3') return Expected("0, 1, 2 or 3", text);
  options.parallel.zero = static_cast<Zero>(text[0] - '0');
  return absl::OkStatus();
}

absl::Status SetStageLayers(TrainerOptions& options, const std::string& text) {
  options.parallel.pp_layers.clear();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    uint32_t count = 0;
    if (!absl::SimpleAtoi(part, &count) || count > kLayersMax) {
      return Expected("numbers of layers, as 3,2,1", text);
    }
    options.parallel.pp_layers.push_back(count);
  }
  return absl::OkStatus();
}

absl::Status AddBitFlip(TrainerOptions& options, const std::string& text) {
  BitFlip flip;
  std::set<std::string> given;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<std::string, std::string> item = absl::StrSplit(part, absl::MaxSplits('=', 1));
    const auto& [key, value] = item;
    const bool is_valid = (key == "rank" && absl::SimpleAtoi(value, &flip.rank)) ||
                          (key == "step" && absl::SimpleAtoi(value, &flip.step)) ||
                          (key == "element" && absl::SimpleAtoi(value, &flip.element)) ||
                          (key == "bit" && absl::SimpleAtoi(value, &flip.bit)) ||
                          ((key == "tensor" || key == "state") && !value.empty());
    if (key == "tensor") flip.tensor = value;
    if (key == "state") flip.state = value;
    if (!is_valid || !given.insert(key).second) return Expected(kBitFlipForm, text);
  }
  given.erase("state");
  if (given.size() != 5) return Expected(kBitFlipForm, text);
  options.bit_flips.push_back(std::move(flip));
  return absl::OkStatus();
}

const std::vector<Flag>& Flags() {
  constexpr uint64_t kMax = std::numeric_limits<uint32_t>::max();
  static const std::vector<Flag> flags = {
      {"corpus", "PATH", "a text file, or a directory of *.md and *.h; may be repeated",
       [](TrainerOptions& options, const std::string& text) {
         options.corpus_paths.push_back(text);
         return absl::OkStatus();
       }},
      {"steps", "N", "train to this step", Count(&TrainerOptions::steps, 1, kMax)},
      {"save-every", "K", "save every K steps; 0 (the default): when a save is due",
       Count(&TrainerOptions::save_every, 0, kMax)},
      {"tp", "N",
       "tensor parallel: cut heads, hidden units and vocabulary over N ranks (default 1)",
       Ranks(&ParallelOptions::tp)},
      {"pp", "N", "pipeline parallel: cut the layers into N stages (default 1)",
       Ranks(&ParallelOptions::pp)},
      {"pp-layers", "N,N,...", "layers of each stage, as 3,2,1; may be 0 (default: even)",
       SetStageLayers},
      {"zero", "0|1|2|3",
       "cut over the data-parallel ranks: 0 nothing; 1 (the default) optimizer states and ballast; "
       "2 gradients too; 3 parameters too",
       SetZero},
      {"layers", "N", "layers of the model (default 2)",
       Count(&TrainerOptions::layers, 1, kLayersMax)},
      {"tied", nullptr, "the head is the token embedding", Switch(&TrainerOptions::tied, true)},
      {"batch", "N", "samples of a step, of all ranks together",
       Count(&TrainerOptions::batch, 1, 4096)},
      {"micro-batch", "N", "samples that go through the model at once (default 4)",
       Count(&TrainerOptions::micro_batch, 1, 4096)},
      {"seed", "N", "of the data's order and the first parameters",
       Count(&TrainerOptions::seed, 0, std::numeric_limits<uint64_t>::max())},
      {"device-ms", "MS", "what forward and backward shall take; the rest is waited",
       Real(&TrainerOptions::device_ms)},
      {"device-jitter", "PERCENT", "up to so much longer",
       Real(&TrainerOptions::device_jitter_percent)},
      {"bytes", "SIZE",
       "ballast of the whole job, as 512M: on every rank with --zero 0, else cut over all ranks",
       Size(&TrainerOptions::ballast_bytes)},
      {"all-reduce", "SIZE", "traffic besides: each step sums so many bytes over all ranks",
       Size(&TrainerOptions::all_reduce_bytes)},
      {"all-to-all", "SIZE", "and each rank exchanges so many with all others",
       Size(&TrainerOptions::all_to_all_bytes)},
      {"faults", "FILE",
       "faults that this job makes itself, read before every step (default: $COLLECTIVES_FAULTS)",
       [](TrainerOptions& options, const std::string& text) {
         options.faults_path = text;
         return absl::OkStatus();
       }},
      {"device", nullptr,
       "tensors are in the memory of a CUDA device (libcuda.so.1, by LOCAL_RANK), fetched before "
       "each step and stored behind it; what computes is the processor",
       Switch(&TrainerOptions::use_device, true)},
      {"no-holdfast", nullptr, "train without checkpoints",
       Switch(&TrainerOptions::use_holdfast, false)},
      {"check-restore", nullptr, "print digests of all states after a restore, and at the end",
       Switch(&TrainerOptions::check_restore, true)},
      {"no-wait-committed-at-end", nullptr, "leave without saving and committing the last step",
       Switch(&TrainerOptions::wait_committed_at_end, false)},
      {"flip-bit", "rank=R,...",
       "a fault: rank=R,step=S,tensor=NAME[,state=NAME],element=E,bit=B flips one bit in one "
       "rank's memory behind step S, before it is saved; may be repeated",
       AddBitFlip},
      {"save-wait-ms", "MS", "how long a save may wait for image memory (default 0)",
       Milliseconds(&CheckpointingOptions::save_wait_ns)},
      {"capture-deadline-ms", "MS", "of hf_wait_captured",
       Milliseconds(&CheckpointingOptions::capture_deadline_ns)},
      {"commit-deadline-ms", "MS", "of the commit at the end",
       Milliseconds(&CheckpointingOptions::commit_deadline_ns)},
      {"restore-deadline-ms", "MS", "of hf_register and of hf_restore",
       Milliseconds(&CheckpointingOptions::restore_deadline_ns)},
  };
  return flags;
}

}  // namespace

std::string Usage() {
  std::string text =
      "Usage: tiny_lm --corpus PATH [flags]\n"
      "Trains a small character-level language model with Holdfast; one process per rank, started "
      "by\n"
      "torchrun or examples/launch. Prints one JSON object per line.\n\n";
  for (const Flag& flag : Flags()) {
    const std::string left =
        flag.value_name == nullptr ? flag.name : absl::StrCat(flag.name, " ", flag.value_name);
    absl::StrAppendFormat(&text, "  --%-26s %s\n", left, flag.help);
  }
  return text;
}

absl::StatusOr<uint64_t> ParseSize(const std::string& text) {
  const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  std::string unit = text.substr(digits);
  uint64_t value = 0;
  if (unit.ends_with("B")) unit.pop_back();
  if (unit.ends_with("i") && unit.size() == 2) unit.pop_back();
  const std::string units = "KMG";
  const size_t power = unit.empty() ? 0 : units.find(unit[0]) + 1;  // npos + 1 == 0
  const uint64_t factor = uint64_t{1} << (10 * power);
  if (unit.size() > 1 || (unit.size() == 1 && power == 0) ||
      !absl::SimpleAtoi(text.substr(0, digits), &value) || value > (uint64_t{1} << 50) / factor) {
    return Expected("a size up to 1048576G, as 4096, 512M or 2G", text);
  }
  return value * factor;
}

absl::Status ApplyLayout(const std::string& text, uint32_t world_size, ParallelOptions& options) {
  ParallelOptions changed = options;
  uint32_t dp = 0;  // not named
  std::set<std::string> given;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<std::string, std::string> item = absl::StrSplit(part, absl::MaxSplits('=', 1));
    uint32_t value = 0;
    const bool is_zero = item.first == "zero";
    uint32_t* const axis = item.first == "pp"   ? &changed.pp
                           : item.first == "dp" ? &dp
                           : item.first == "tp" ? &changed.tp
                                                : nullptr;
    const bool is_valid =
        absl::SimpleAtoi(item.second, &value) &&
        (is_zero ? value <= 3 : axis != nullptr && value >= 1 && value <= kAxisMax);
    if (!is_valid || !given.insert(item.first).second) {
      return Expected("AXIS=SIZE,... of pp, dp and tp, and zero=STAGE, each once", text);
    }
    if (is_zero) {
      changed.zero = static_cast<Zero>(value);
    } else {
      *axis = value;
    }
  }
  if (dp != 0 && uint64_t{dp} * changed.pp * changed.tp != world_size) {
    return Expected(absl::StrFormat("a layout of %d ranks", world_size).c_str(), text);
  }
  if (given.count("pp") != 0) changed.pp_layers.clear();
  options = std::move(changed);
  return absl::OkStatus();
}

absl::StatusOr<TrainerOptions> ParseFlags(const std::vector<std::string>& arguments) {
  TrainerOptions options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const auto flag = std::find_if(Flags().begin(), Flags().end(), [&](const Flag& candidate) {
      return name == absl::StrCat("--", candidate.name);
    });
    if (flag == Flags().end()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("unknown argument '%s'; --help lists the flags", argument));
    }
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (flag->value_name != nullptr && i + 1 < arguments.size()) {
      value = arguments[++i];
    }
    if (value.empty() != (flag->value_name == nullptr)) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: expected %s", name, flag->value_name == nullptr ? "no value" : flag->value_name));
    }
    if (const absl::Status status = flag->set(options, value); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(status.message())));
    }
  }
  if (options.corpus_paths.empty()) {
    return absl::InvalidArgumentError("--corpus: expected at least one");
  }
  return options;
}

}  // namespace tiny_lm
