#include "monitor/witness/flight_record.h"

#include <algorithm>
#include <memory>
#include <set>
#include <string_view>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/json_reader.h"
#include "base/pickle_reader.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

constexpr std::string_view kDefaultGroup = "default_pg";
constexpr size_t kDimensionsMax = 16;
constexpr size_t kShapesMax = 4;  // of one operation that are compared
constexpr size_t kNameBytesMax = 128;

// What of an operation must be equal on all ranks. Of the others a rank may have its own share.
bool SizesAreEqual(std::string_view call) {
  for (const std::string_view same : {"all_reduce", "allreduce", "reduce", "broadcast",
                                      "all_gather", "allgather", "reduce_scatter"}) {
    if (call == same) return true;
  }
  return false;
}

std::string Cut(std::string_view text) {
  return CutText(std::string(text.substr(0, kNameBytesMax)));
}

template <typename Value>
std::string TextOr(const Value& value, std::string_view otherwise) {
  const auto text = value.String();
  return Cut(text.ok() ? *text : otherwise);
}

// "nccl:all_reduce" -> "all_reduce"
std::string CallOf(std::string_view profiling_name) {
  const size_t colon = profiling_name.find(':');
  if (colon != std::string_view::npos) profiling_name.remove_prefix(colon + 1);
  while (!profiling_name.empty() && profiling_name.front() == '_') profiling_name.remove_prefix(1);
  return Cut(profiling_name);
}

template <typename Value>
std::string ShapeOf(const Value& entry) {
  const Value sizes = entry.Find("input_sizes");
  const Value types = entry.Find("input_dtypes");
  const auto count = sizes.ArraySize();
  std::string shape;
  for (size_t i = 0; count.ok() && i < std::min(*count, kShapesMax); ++i) {
    const Value size = sizes[i];
    const auto dimensions = size.ArraySize();
    std::vector<int64_t> lengths;
    for (size_t d = 0; dimensions.ok() && d < std::min(*dimensions, kDimensionsMax); ++d) {
      lengths.push_back(size[d].Int64().value_or(-1));
    }
    absl::StrAppend(&shape, i > 0 ? ", " : "", "[", absl::StrJoin(lengths, ", "), "]");
  }
  const auto type_count = types.ArraySize();
  if (type_count.ok() && *type_count > 0) absl::StrAppend(&shape, " ", TextOr(types[0], "?"));
  return shape;
}

// "[0, 1, 5]", as torch writes lists of ranks; empty if it is none.
std::vector<Rank> RanksIn(std::string_view text) {
  std::vector<Rank> ranks;
  if (text.size() < 2 || text.front() != '[' || text.back() != ']') return ranks;
  text = text.substr(1, text.size() - 2);
  for (const absl::string_view part :
       absl::StrSplit(absl::string_view(text.data(), text.size()), ',', absl::SkipWhitespace())) {
    uint32_t rank = 0;
    if (!absl::SimpleAtoi(part, &rank) || rank >= kFlightRankMax) return {};
    ranks.push_back(Rank{rank});
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

// While a dump is read: all operations of a group, by number.
struct Reading {
  FlightGroup group;
  std::map<uint64_t, std::pair<FlightOperation, int64_t>> operations;  // and when it was created
};

template <typename Value>
absl::Status ReadEntry(const Value& entry, std::map<std::string, Reading>& readings) {
  const auto p2p = entry.Find("is_p2p").Bool();
  if (p2p.ok() && *p2p) return absl::OkStatus();
  const Value group = entry.Find("process_group");
  ASSIGN_OR_RETURN(const size_t parts, group.ArraySize());
  if (parts < 1) return absl::InvalidArgumentError("flight record: process_group: no name");
  const std::string name = TextOr(group[0], "");
  if (!readings.contains(name) && readings.size() >= kFlightGroupsMax) return absl::OkStatus();
  FlightOperation operation;
  ASSIGN_OR_RETURN(operation.sequence, entry.Find("collective_seq_id").Uint64());
  operation.call = CallOf(TextOr(entry.Find("profiling_name"), "?"));
  if (SizesAreEqual(operation.call)) operation.shape = ShapeOf(entry);
  const auto retired = entry.Find("retired").Bool();
  const auto state = entry.Find("state").String();
  operation.retired = (retired.ok() && *retired) || (state.ok() && *state == "completed");
  const int64_t created = entry.Find("time_created_ns").Int64().value_or(0);
  Reading& reading = readings[name];
  reading.group.name = name;
  if (parts > 1) reading.group.description = TextOr(group[1], "");
  const uint64_t sequence = operation.sequence;
  // The ring may hold a number twice after a wrap; the later entry counts.
  reading.operations.insert_or_assign(sequence, std::pair(std::move(operation), created));
  return absl::OkStatus();
}

FlightGroup GroupOf(Reading& reading) {
  FlightGroup& group = reading.group;
  int64_t before = 0;
  for (auto& [sequence, entry] : reading.operations) {
    auto& [operation, created] = entry;
    group.enqueued = std::max(group.enqueued, sequence);
    if (operation.retired) group.retired = std::max(group.retired, sequence);
    // A clock that was set back gives no gap.
    if (before > 0 && created > before) {
      group.longest_gap = std::max(group.longest_gap, absl::Nanoseconds(created - before));
    }
    before = created;
    group.operations.push_back(std::move(operation));
  }
  if (group.operations.size() > kFlightOperationsMax) {
    group.operations.erase(group.operations.begin(), group.operations.end() - kFlightOperationsMax);
  }
  return std::move(group);
}

template <typename Value>
absl::StatusOr<FlightRecord> ReadRecord(Rank rank, const Value& root) {
  std::map<std::string, Reading> readings;
  const Value entries = root.Find("entries");
  // With nothing recorded there is no such key.
  if (entries.present()) {
    ASSIGN_OR_RETURN(const size_t count, entries.ArraySize());
    for (size_t i = 0; i < count; ++i) RETURN_IF_ERROR(ReadEntry(entries[i], readings));
  } else if (!root.Find("version").present()) {
    return absl::InvalidArgumentError("flight record: expected the key version, found none");
  }
  const Value groups = root.Find("pg_config");
  if (const auto names = groups.Keys(); names.ok()) {
    for (const std::string_view name : *names) {
      const auto found = readings.find(Cut(name));
      if (found == readings.end()) continue;
      const auto ranks = groups.Find(name).Find("ranks").String();
      if (ranks.ok()) found->second.group.members = RanksIn(*ranks);
    }
  }
  FlightRecord record;
  record.rank = rank;
  for (auto& [name, reading] : readings) record.groups.push_back(GroupOf(reading));
  return record;
}

const FlightOperation* Find(const FlightGroup& group, uint64_t sequence) {
  for (const FlightOperation& operation : group.operations) {
    if (operation.sequence == sequence) return &operation;
  }
  return nullptr;
}

// The first operation that has not ended: 0 if all have.
uint64_t FirstOpen(const FlightGroup& group) {
  for (const FlightOperation& operation : group.operations) {
    if (!operation.retired) return operation.sequence;
  }
  return 0;
}

std::string RanksText(const std::vector<Rank>& ranks) {
  constexpr size_t kNamedMax = 8;
  std::vector<std::string> names;
  for (const Rank rank : ranks) {
    if (names.size() == kNamedMax) {
      names.push_back("...");
      break;
    }
    names.push_back(absl::StrCat(Value(rank)));
  }
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(names, ", "));
}

std::string CallText(const FlightOperation& operation) {
  return operation.shape.empty() ? operation.call
                                 : absl::StrCat(operation.call, " of ", operation.shape);
}

// Where one rank is in one group.
struct Standing {
  Rank rank{};
  const FlightGroup* group = nullptr;  // null: it has no entry of it
  absl::Duration since = {};
};

// All that is said of one group.
class GroupWitness {
 public:
  GroupWitness(absl::Duration now, uint64_t learn_operations_min, std::vector<Standing> members)
      : now_(now), learn_operations_min_(learn_operations_min), members_(std::move(members)) {}

  void Testify(std::vector<Testimony>& out) {
    for (const Standing& member : members_) {
      if (member.group == nullptr) continue;
      named_ = member.group;
      longest_gap_ = std::max(longest_gap_, member.group->longest_gap);
      ended_ = std::max(ended_, member.group->retired);
      const uint64_t open = FirstOpen(*member.group);
      if (open > 0) open_ = open_ == 0 ? open : std::min(open_, open);
    }
    if (open_ == 0) return;  // nobody waits in it
    std::vector<Standing> outside, inside, done;
    for (const Standing& member : members_) {
      const FlightGroup* const group = member.group;
      if (group == nullptr || group->enqueued < open_) {
        outside.push_back(member);
      } else if (const FlightOperation* operation = Find(*group, open_);
                 operation == nullptr || operation->retired) {
        done.push_back(member);
      } else {
        inside.push_back(member);
      }
    }
    const std::string group = absl::StrCat(
        "process group ", named_->name,
        named_->description.empty() ? "" : absl::StrCat(" (", named_->description, ")"));
    const FlightOperation& operation = *Find(*inside.front().group, open_);
    const std::string where = absl::StrFormat("%s %d of %s", CallText(operation), open_, group);
    if (!outside.empty()) {
      Add(Claim::kNeverEntered, outside, inside, 0.9,
          absl::StrFormat("%s never entered %s, in which %d others wait", RanksText(Ranks(outside)),
                          where, inside.size()),
          out);
      Add(Claim::kEntered, inside, {}, 0.9,
          absl::StrCat(RanksText(Ranks(inside)), " entered ", where), out);
      return;
    }
    if (AddDiffering(inside, group, out)) return;
    Add(Claim::kEntered, inside, {}, 0.8,
        absl::StrFormat("%s entered %s, and it does not end", RanksText(Ranks(inside)), where),
        out);
    if (!done.empty()) {
      Add(Claim::kCompleted, done, {}, 0.8,
          absl::StrCat(RanksText(Ranks(done)), " completed ", where), out);
    }
  }

 private:
  static std::vector<Rank> Ranks(const std::vector<Standing>& members) {
    std::vector<Rank> ranks;
    for (const Standing& member : members) ranks.push_back(member.rank);
    return ranks;
  }

  bool AddDiffering(const std::vector<Standing>& inside, const std::string& group,
                    std::vector<Testimony>& out) {
    std::map<std::string, std::vector<Standing>> calls;
    for (const Standing& member : inside) {
      calls[CallText(*Find(*member.group, open_))].push_back(member);
    }
    if (calls.size() < 2) return false;
    const auto most = std::max_element(
        calls.begin(), calls.end(),
        [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
    const bool tie = std::count_if(calls.begin(), calls.end(), [&](const auto& entry) {
                       return entry.second.size() == most->second.size();
                     }) > 1;
    std::vector<Standing> odd;
    std::vector<std::string> texts;
    for (const auto& [call, ranks] : calls) {
      if (!tie && call == most->first) continue;
      odd.insert(odd.end(), ranks.begin(), ranks.end());
      texts.push_back(absl::StrCat(call, " by ", RanksText(Ranks(ranks))));
    }
    std::sort(odd.begin(), odd.end(),
              [](const Standing& a, const Standing& b) { return a.rank < b.rank; });
    Add(Claim::kDiffers, odd, {}, tie ? 0.5 : 0.95,
        absl::StrFormat("operation %d of %s is %s%s", open_, group, absl::StrJoin(texts, ", "),
                        tie ? "" : absl::StrCat(", and ", most->first, " by all others")),
        out);
    return true;
  }

  // `waiting`: those whose standing counts besides.
  void Add(Claim claim, const std::vector<Standing>& who, const std::vector<Standing>& waiting,
           double certainty, std::string sentence, std::vector<Testimony>& out) {
    Testimony testimony;
    testimony.source = Source::kFlightRecorder;
    testimony.claim = claim;
    testimony.ranks = Ranks(who);
    if (testimony.ranks.size() > kTestimonyRanksMax) testimony.ranks.resize(kTestimonyRanksMax);
    testimony.group = CutText(named_->name);
    testimony.operation = open_;
    testimony.standing = absl::InfiniteDuration();
    for (const auto* members : {&who, &waiting}) {
      for (const Standing& member : *members) {
        testimony.standing = std::min(testimony.standing, now_ - member.since);
      }
    }
    if (ended_ >= learn_operations_min_) testimony.normal = longest_gap_;
    testimony.certainty = certainty;
    testimony.sentence = CutText(std::move(sentence));
    if (out.size() < kTestimoniesMax) out.push_back(std::move(testimony));
  }

  const absl::Duration now_;
  const uint64_t learn_operations_min_;
  const std::vector<Standing> members_;
  const FlightGroup* named_ = nullptr;
  uint64_t open_ = 0;  // the oldest operation that somebody is inside of
  uint64_t ended_ = 0;
  absl::Duration longest_gap_;
};

}  // namespace

absl::StatusOr<FlightRecord> ParseFlightRecord(Rank rank, std::string dump) {
  if (dump.size() > kFlightDumpBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "flight record: expected at most %d bytes, found %d", kFlightDumpBytesMax, dump.size()));
  }
  if (!dump.empty() && dump.front() == '{') {
    ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                     JsonDocument::Parse(std::move(dump)));
    return ReadRecord(rank, document->root());
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<PickleDocument> document,
                   PickleDocument::Parse(std::move(dump)));
  return ReadRecord(rank, document->root());
}

std::vector<Testimony> FlightHistory::Testify(absl::Duration now, uint32_t world_size,
                                              std::span<const FlightRecord> records,
                                              uint64_t learn_operations_min) {
  ++look_;
  std::map<std::string, std::set<Rank>> members;
  std::map<Rank, const FlightRecord*> by_rank;
  for (const FlightRecord& record : records) {
    if (Value(record.rank) < world_size) by_rank[record.rank] = &record;
  }
  for (const auto& [rank, record] : by_rank) {
    for (const FlightGroup& group : record->groups) {
      std::set<Rank>& of_group = members[group.name];
      of_group.insert(rank);
      of_group.insert(group.members.begin(), group.members.end());
      if (group.description != kDefaultGroup) continue;
      for (const auto& [other, unused] : by_rank) of_group.insert(other);
    }
  }
  std::vector<Testimony> said;
  for (const auto& [name, ranks] : members) {
    std::vector<Standing> standing;
    for (const Rank rank : ranks) {
      const auto record = by_rank.find(rank);
      if (record == by_rank.end()) continue;
      Standing one{.rank = rank};
      for (const FlightGroup& group : record->second->groups) {
        if (group.name == name) one.group = &group;
      }
      const uint64_t enqueued = one.group == nullptr ? 0 : one.group->enqueued;
      const uint64_t retired = one.group == nullptr ? 0 : one.group->retired;
      Place& place = places_[{rank, name}];
      if (place.look == 0 || place.enqueued != enqueued || place.retired != retired) {
        place = {enqueued, retired, now, look_};
      }
      place.look = look_;
      one.since = place.since;
      standing.push_back(one);
    }
    GroupWitness(now, learn_operations_min, std::move(standing)).Testify(said);
  }
  std::erase_if(places_, [&](const auto& entry) { return entry.second.look != look_; });
  return said;
}

}  // namespace holdfast::monitor
