#include "format/manifest.h"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "format/layout.h"

namespace holdfast {
namespace {

// ---- Writing ----

std::string Quoted(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted.push_back('\\');
      quoted.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(&quoted, "\\u%04x", static_cast<unsigned char>(c));
    } else {
      quoted.push_back(c);
    }
  }
  quoted.push_back('"');
  return quoted;
}

std::string CheckpointJson(const std::optional<CheckpointId>& id) {
  if (!id.has_value()) return "null";
  return absl::StrFormat("{\"attempt\": %d, \"step\": %d}", Value(id->attempt), Value(id->step));
}

std::string TimeJson(absl::Time time) {
  return Quoted(absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", time, absl::UTCTimeZone()));
}

// `{`, the members one per line, and the line with the checksum.
using Members = std::vector<std::pair<const char*, std::string>>;
std::string Seal(const Members& members) {
  std::string text = "{\n";
  for (const auto& [key, value] : members) absl::StrAppend(&text, "\"", key, "\": ", value, ",\n");
  const uint32_t crc = Crc32c(std::as_bytes(std::span(text)));
  absl::StrAppendFormat(&text, "\"crc32c\": \"%08x\"}\n", crc);
  return text;
}

// ---- Reading ----

absl::Status Damaged(const std::string& where, const std::string& what) {
  return absl::DataLossError(absl::StrCat(where, ": ", what));
}

constexpr size_t kSealBytes = sizeof("\"crc32c\": \"00000000\"}\n") - 1;

// Checks the last line, which is all that the checksum itself does not cover, byte for byte.
absl::Status CheckSeal(std::string_view bytes, const std::string& where) {
  if (bytes.size() < kSealBytes + 1) {
    return Damaged(where, absl::StrFormat("expected at least %d bytes, found %d", kSealBytes + 1,
                                          bytes.size()));
  }
  const std::string_view sealed = bytes.substr(0, bytes.size() - kSealBytes);
  const std::string_view found = bytes.substr(sealed.size());
  const uint32_t crc = Crc32c(std::as_bytes(std::span(sealed)));
  const std::string expected = absl::StrFormat("\"crc32c\": \"%08x\"}\n", crc);
  if (found != expected) {
    return Damaged(where, absl::StrFormat("checksum of the first %d bytes: expected the last line "
                                          "`%s`, found `%s`",
                                          sealed.size(), absl::CHexEscape(expected),
                                          absl::CHexEscape(std::string(found))));
  }
  return absl::OkStatus();
}

// Turns an error of the JSON reader into one about stored bytes.
absl::Status AsDamage(const std::string& where, const absl::Status& status) {
  return Damaged(where, std::string(status.message()));
}

// The members of one sealed object. The first error is kept, and later calls return defaults, so
// that decoders read as a list of members.
class Reader {
 public:
  Reader(std::string where, JsonValue value) : where_(std::move(where)), value_(value) {}

  const absl::Status& status() const { return status_; }
  void Fail(const absl::Status& status) {
    if (status_.ok() && !status.ok()) status_ = AsDamage(where_, status);
  }

  JsonValue Get(std::string_view key) { return Take(value_.Get(key)); }
  bool Has(std::string_view key) const { return status_.ok() && value_.Find(key).present(); }
  Reader Object(std::string_view key, std::initializer_list<std::string_view> known) {
    Reader reader(where_, Get(key));
    reader.status_ = status_;
    if (status_.ok()) reader.Fail(reader.value_.ExpectKeys(known));
    return reader;
  }

  void Keys(std::initializer_list<std::string_view> known) { Fail(value_.ExpectKeys(known)); }
  uint64_t Number(std::string_view key, uint64_t max) {
    const JsonValue value = Get(key);
    if (!status_.ok()) return 0;
    const uint64_t number = Take(value.Uint64());
    if (number > max) Fail(value.Mismatch(absl::StrFormat("at most %d", max)));
    return number;
  }
  std::string Text(std::string_view key, size_t bytes_max) {
    const JsonValue value = Get(key);
    if (!status_.ok()) return "";
    const std::string_view text = Take(value.String());
    if (text.size() > bytes_max) {
      Fail(value.Mismatch(absl::StrFormat("at most %d bytes", bytes_max)));
    }
    return std::string(text);
  }
  uint32_t Checksum(std::string_view key) {
    const std::string text = Text(key, 8);
    uint32_t value = 0;
    for (const char c : text) {
      const bool digit = c >= '0' && c <= '9';
      const bool letter = c >= 'a' && c <= 'f';
      if (!digit && !letter) break;
      value = value << 4 | static_cast<uint32_t>(digit ? c - '0' : c - 'a' + 10);
    }
    if (status_.ok() && absl::StrFormat("%08x", value) != text) {
      Fail(Get(key).Mismatch("8 small hexadecimal digits"));
    }
    return value;
  }
  absl::Time Time(std::string_view key) {
    const std::string text = Text(key, 64);
    absl::Time time;
    std::string error;
    if (status_.ok() && (!absl::ParseTime("%Y-%m-%dT%H:%M:%SZ", text, &time, &error) ||
                         TimeJson(time) != Quoted(text))) {
      Fail(Get(key).Mismatch("a time like 2026-01-31T23:59:59Z"));
    }
    return time;
  }
  std::optional<CheckpointId> Checkpoint(std::string_view key) {
    const JsonValue value = Get(key);
    if (!status_.ok() || value.type() == JsonValue::Type::kNull) return std::nullopt;
    Reader reader = Object(key, {"attempt", "step"});
    const CheckpointId id = reader.CheckpointMembers();
    Fail(reader.status());
    return id;
  }
  uint32_t FileNumber(std::string_view key) {
    const uint64_t number = Number(key, UINT32_MAX);
    if (status_.ok() && number == 0) Fail(Get(key).Mismatch("at least 1"));
    return static_cast<uint32_t>(number);
  }
  CheckpointId CheckpointMembers() {
    return {Attempt{static_cast<uint32_t>(Number("attempt", UINT32_MAX))},
            Step{Number("step", UINT64_MAX)}};
  }
  void Version(std::string_view key) {
    const JsonValue value = Get(key);
    if (!status_.ok()) return;
    if (Take(value.Uint64()) != kFormatVersion) {
      Fail(value.Mismatch(absl::StrFormat("format version %d", kFormatVersion)));
    }
  }

 private:
  template <typename T>
  T Take(absl::StatusOr<T> value) {
    if (!status_.ok()) return T();
    if (value.ok()) return *std::move(value);
    Fail(value.status());
    return T();
  }

  std::string where_;
  JsonValue value_;
  absl::Status status_;
};

absl::StatusOr<std::unique_ptr<JsonDocument>> OpenSealed(std::string_view bytes, uint64_t bytes_max,
                                                         const std::string& where) {
  if (bytes.size() > bytes_max) {
    return Damaged(where,
                   absl::StrFormat("expected at most %d bytes, found %d", bytes_max, bytes.size()));
  }
  RETURN_IF_ERROR(CheckSeal(bytes, where));
  JsonLimits limits;
  limits.bytes_max = bytes_max;
  limits.depth_max = 4;
  absl::StatusOr<std::unique_ptr<JsonDocument>> document =
      JsonDocument::Parse(std::string(bytes), limits);
  if (!document.ok()) return AsDamage(where, document.status());
  return document;
}

// The encoder's end of "what we write we can read": our bug if not.
std::string Checked(std::string text, const absl::Status& decoded) {
  CHECK_OK(decoded);
  return text;
}

// ---- MANIFEST.json ----

std::string SurvivesJson(const FaultSet& faults) {
  std::string json = "[";
  const auto add = [&json](const std::string& fault) {
    absl::StrAppend(&json, json.size() > 1 ? ", " : "", Quoted(fault));
  };
  if (faults.process) add("process");
  if (faults.power) add("power");
  if (faults.nodes > 0) add(absl::StrCat("nodes=", faults.nodes));
  return json + "]";
}

// Strict: what SurvivesJson writes, in its order.
FaultSet ReadSurvives(Reader& reader) {
  FaultSet faults;
  const JsonValue value = reader.Get("survives");
  if (!reader.status().ok()) return faults;
  const absl::StatusOr<size_t> count = value.ArraySize();
  if (!count.ok()) {
    reader.Fail(count.status());
    return faults;
  }
  std::string json = "[";
  for (size_t i = 0; i < *count; ++i) {
    const absl::StatusOr<std::string_view> text = value[i].String();
    if (!text.ok()) {
      reader.Fail(text.status());
      return faults;
    }
    absl::StrAppend(&json, i > 0 ? ", " : "", Quoted(*text));
    const std::string_view fault = *text;
    if (fault == "process") faults.process = true;
    if (fault == "power") faults.power = true;
    constexpr std::string_view kNodes = "nodes=";
    if (fault.substr(0, kNodes.size()) == kNodes) {
      const std::string number(fault.substr(kNodes.size()));
      if (!absl::SimpleAtoi(number, &faults.nodes)) faults.nodes = 0;
    }
  }
  if (json + "]" != SurvivesJson(faults)) {
    reader.Fail(
        value.Mismatch("some of \"process\", \"power\", \"nodes=<n>\", in this order, each "
                       "once"));
  }
  return faults;
}

constexpr std::string_view kVerificationNames[] = {"none", "sample", "all"};

Verification ReadVerification(Reader& reader) {
  const std::string text = reader.Text("verification", 16);
  for (size_t i = 0; i < std::size(kVerificationNames); ++i) {
    if (text == kVerificationNames[i]) return static_cast<Verification>(i);
  }
  if (reader.status().ok()) {
    reader.Fail(reader.Get("verification").Mismatch("one of \"none\", \"sample\", \"all\""));
  }
  return Verification::kNone;
}

std::string ImagesJson(std::span<const ManifestImage> images) {
  std::string json = "[";
  for (const ManifestImage& image : images) {
    absl::StrAppendFormat(&json, "%s\n{\"file\": %s, \"bytes\": %d, \"checksum_root\": \"%08x\"}",
                          json.size() > 1 ? "," : "", Quoted(image.file), image.bytes,
                          image.checksum_root);
  }
  return json + "]";
}

std::vector<ManifestImage> ReadImages(Reader& reader, const std::string& where,
                                      uint32_t world_size) {
  std::vector<ManifestImage> images;
  const JsonValue value = reader.Get("images");
  if (!reader.status().ok()) return images;
  const absl::StatusOr<size_t> count = value.ArraySize();
  if (!count.ok()) {
    reader.Fail(count.status());
    return images;
  }
  if (*count != world_size) {
    reader.Fail(value.Mismatch(absl::StrFormat("one image for each of %d ranks", world_size)));
    return images;
  }
  std::set<std::string> files;
  for (size_t i = 0; i < *count && reader.status().ok(); ++i) {
    Reader member(where, value[i]);
    member.Keys({"file", "bytes", "checksum_root"});
    ManifestImage image;
    image.file = member.Text("file", 255);
    image.bytes = member.Number("bytes", INT64_MAX);
    image.checksum_root = member.Checksum("checksum_root");
    if (member.status().ok()) member.Fail(CheckFileName(image.file));
    if (member.status().ok() && !files.insert(image.file).second) {
      member.Fail(value[i].Mismatch(
          absl::StrFormat("another file for every rank, not %s again", image.file)));
    }
    reader.Fail(member.status().ok() ? absl::OkStatus()
                                     : absl::InvalidArgumentError(absl::StrFormat(
                                           "image of rank %d: %s", i, member.status().message())));
    images.push_back(std::move(image));
  }
  return images;
}

absl::StatusOr<Manifest> ReadManifest(const JsonDocument& document, const std::string& where) {
  Reader reader(where, document.root());
  reader.Keys({"holdfast_manifest", "job", "job_uuid", "attempt", "step", "parent", "world_size",
               "survives", "index", "images", "verification", "created_by", "created_at",
               "crc32c"});
  reader.Version("holdfast_manifest");
  Manifest manifest;
  manifest.job = reader.Text("job", kJobNameBytesMax);
  manifest.job_uuid = reader.Text("job_uuid", 36);
  manifest.checkpoint = reader.CheckpointMembers();
  manifest.parent = reader.Checkpoint("parent");
  manifest.world_size = static_cast<uint32_t>(reader.Number("world_size", kWorldSizeMax));
  manifest.survives = ReadSurvives(reader);
  Reader index = reader.Object("index", {"bytes", "crc32c"});
  manifest.index_bytes = index.Number("bytes", INT64_MAX);
  manifest.index_crc32c = index.Checksum("crc32c");
  reader.Fail(index.status());
  manifest.images = ReadImages(reader, where, manifest.world_size);
  manifest.verification = ReadVerification(reader);
  manifest.created_by = reader.Text("created_by", 256);
  manifest.created_at = reader.Time("created_at");
  if (reader.status().ok()) reader.Fail(CheckJobName(manifest.job));
  if (reader.status().ok()) reader.Fail(CheckJobUuid(manifest.job_uuid));
  if (reader.status().ok() && manifest.world_size == 0) {
    reader.Fail(reader.Get("world_size").Mismatch("at least 1"));
  }
  if (reader.status().ok() && manifest.parent.has_value() &&
      *manifest.parent >= manifest.checkpoint) {
    reader.Fail(reader.Get("parent").Mismatch("an earlier checkpoint"));
  }
  RETURN_IF_ERROR(reader.status());
  return manifest;
}

}  // namespace

std::string Describe(const FaultSet& faults) {
  std::string text;
  const auto add = [&text](const std::string& fault) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", fault);
  };
  if (faults.process) add("process");
  if (faults.power) add("power");
  if (faults.nodes > 0) add(absl::StrCat("nodes=", faults.nodes));
  return text.empty() ? "nothing" : text;
}

// ---- MANIFEST.json ----

std::string EncodeManifest(const Manifest& manifest) {
  const std::string index = absl::StrFormat("{\"bytes\": %d, \"crc32c\": \"%08x\"}",
                                            manifest.index_bytes, manifest.index_crc32c);
  const auto verification = static_cast<size_t>(manifest.verification);
  CHECK(verification < std::size(kVerificationNames));
  std::string text = Seal({
      {"holdfast_manifest", absl::StrCat(kFormatVersion)},
      {"job", Quoted(manifest.job)},
      {"job_uuid", Quoted(manifest.job_uuid)},
      {"attempt", absl::StrCat(Value(manifest.checkpoint.attempt))},
      {"step", absl::StrCat(Value(manifest.checkpoint.step))},
      {"parent", CheckpointJson(manifest.parent)},
      {"world_size", absl::StrCat(manifest.world_size)},
      {"survives", SurvivesJson(manifest.survives)},
      {"index", index},
      {"images", ImagesJson(manifest.images)},
      {"verification", Quoted(kVerificationNames[verification])},
      {"created_by", Quoted(manifest.created_by)},
      {"created_at", TimeJson(manifest.created_at)},
  });
  return Checked(text, DecodeManifest(text, kManifestFileName).status());
}

absl::StatusOr<Manifest> DecodeManifest(std::string_view bytes, const std::string& where) {
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   OpenSealed(bytes, kManifestBytesMax, where));
  return ReadManifest(*document, where);
}

// ---- JOB.json ----

namespace {

std::string SourceJson(const JobSource& source) {
  return absl::StrFormat(
      "{\"job\": %s, \"job_uuid\": %s, \"attempt\": %d, \"step\": %d, \"directory\": %s}",
      Quoted(source.job), Quoted(source.job_uuid), Value(source.checkpoint.attempt),
      Value(source.checkpoint.step), Quoted(source.directory));
}

JobSource ReadSource(Reader& reader) {
  Reader member = reader.Object("source", {"job", "job_uuid", "attempt", "step", "directory"});
  JobSource source;
  source.job = member.Text("job", kJobNameBytesMax);
  source.job_uuid = member.Text("job_uuid", 36);
  source.checkpoint = member.CheckpointMembers();
  source.directory = member.Text("directory", kSourceBytesMax);
  if (member.status().ok()) member.Fail(CheckJobName(source.job));
  if (member.status().ok()) member.Fail(CheckJobUuid(source.job_uuid));
  reader.Fail(member.status());
  return source;
}

}  // namespace

std::string EncodeJobRecord(const JobRecord& record) {
  Members members = {
      {"holdfast_job", absl::StrCat(kFormatVersion)},
      {"job", Quoted(record.job)},
      {"job_uuid", Quoted(record.job_uuid)},
  };
  if (record.source.has_value()) members.emplace_back("source", SourceJson(*record.source));
  members.emplace_back("created_by", Quoted(record.created_by));
  members.emplace_back("created_at", TimeJson(record.created_at));
  std::string text = Seal(members);
  return Checked(text, DecodeJobRecord(text, kJobFileName).status());
}

absl::StatusOr<JobRecord> DecodeJobRecord(std::string_view bytes, const std::string& where) {
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   OpenSealed(bytes, kSmallRecordBytesMax, where));
  Reader reader(where, document->root());
  reader.Keys({"holdfast_job", "job", "job_uuid", "source", "created_by", "created_at", "crc32c"});
  reader.Version("holdfast_job");
  JobRecord record;
  record.job = reader.Text("job", kJobNameBytesMax);
  record.job_uuid = reader.Text("job_uuid", 36);
  if (reader.Has("source")) record.source = ReadSource(reader);
  record.created_by = reader.Text("created_by", 256);
  record.created_at = reader.Time("created_at");
  if (reader.status().ok()) reader.Fail(CheckJobName(record.job));
  if (reader.status().ok()) reader.Fail(CheckJobUuid(record.job_uuid));
  RETURN_IF_ERROR(reader.status());
  return record;
}

// ---- BAD.<n> ----

std::string EncodeBadMark(const BadMark& mark) {
  std::string text = Seal({
      {"holdfast_bad", absl::StrCat(kFormatVersion)},
      {"bad", absl::StrCat(mark.number)},
      {"job_uuid", Quoted(mark.job_uuid)},
      {"attempt", absl::StrCat(Value(mark.checkpoint.attempt))},
      {"step", absl::StrCat(Value(mark.checkpoint.step))},
      {"reason", Quoted(mark.reason)},
      {"created_by", Quoted(mark.created_by)},
      {"created_at", TimeJson(mark.created_at)},
  });
  return Checked(text, DecodeBadMark(text, BadFileName(mark.number)).status());
}

absl::StatusOr<BadMark> DecodeBadMark(std::string_view bytes, const std::string& where) {
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   OpenSealed(bytes, kSmallRecordBytesMax, where));
  Reader reader(where, document->root());
  reader.Keys({"holdfast_bad", "bad", "job_uuid", "attempt", "step", "reason", "created_by",
               "created_at", "crc32c"});
  reader.Version("holdfast_bad");
  BadMark mark;
  mark.number = reader.FileNumber("bad");
  mark.job_uuid = reader.Text("job_uuid", 36);
  mark.checkpoint = reader.CheckpointMembers();
  mark.reason = reader.Text("reason", kReasonBytesMax);
  mark.created_by = reader.Text("created_by", 256);
  mark.created_at = reader.Time("created_at");
  if (reader.status().ok()) reader.Fail(CheckJobUuid(mark.job_uuid));
  RETURN_IF_ERROR(reader.status());
  return mark;
}

// ---- HEAD.<n> ----

std::string EncodeHead(const Head& head) {
  std::string text = Seal({
      {"holdfast_head", absl::StrCat(kFormatVersion)},
      {"head", absl::StrCat(head.number)},
      {"job_uuid", Quoted(head.job_uuid)},
      {"to", CheckpointJson(head.to)},
      {"abandons_attempts_up_to", absl::StrCat(Value(head.abandons_attempts_up_to))},
      {"reason", Quoted(head.reason)},
      {"created_by", Quoted(head.created_by)},
      {"created_at", TimeJson(head.created_at)},
  });
  return Checked(text, DecodeHead(text, HeadFileName(head.number)).status());
}

absl::StatusOr<Head> DecodeHead(std::string_view bytes, const std::string& where) {
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   OpenSealed(bytes, kSmallRecordBytesMax, where));
  Reader reader(where, document->root());
  reader.Keys({"holdfast_head", "head", "job_uuid", "to", "abandons_attempts_up_to", "reason",
               "created_by", "created_at", "crc32c"});
  reader.Version("holdfast_head");
  Head head;
  head.number = reader.FileNumber("head");
  head.job_uuid = reader.Text("job_uuid", 36);
  head.to = reader.Checkpoint("to");
  head.abandons_attempts_up_to =
      Attempt{static_cast<uint32_t>(reader.Number("abandons_attempts_up_to", UINT32_MAX))};
  head.reason = reader.Text("reason", kReasonBytesMax);
  head.created_by = reader.Text("created_by", 256);
  head.created_at = reader.Time("created_at");
  if (reader.status().ok()) reader.Fail(CheckJobUuid(head.job_uuid));
  RETURN_IF_ERROR(reader.status());
  return head;
}

// ---- Lineage ----

std::vector<CheckpointId> CurrentBranch(std::span<const LineageEntry> entries,
                                        const std::optional<Head>& head) {
  std::map<CheckpointId, std::optional<CheckpointId>> parents;
  for (const LineageEntry& entry : entries) parents.emplace(entry.checkpoint, entry.parent);

  std::set<CheckpointId> branch;
  if (!head.has_value()) {
    for (const auto& [checkpoint, parent] : parents) branch.insert(checkpoint);
    return {branch.begin(), branch.end()};
  }
  if (head->to.has_value()) {
    // A parent is always earlier (DecodeManifest checks it), so this ends.
    for (auto at = parents.find(*head->to); at != parents.end();) {
      branch.insert(at->first);
      if (!at->second.has_value() || *at->second >= at->first) break;
      at = parents.find(*at->second);
    }
  }
  for (const auto& [checkpoint, parent] : parents) {  // parents come before children
    if (checkpoint.attempt <= head->abandons_attempts_up_to) continue;
    const bool abandoned =
        parent.has_value() && parents.contains(*parent) && !branch.contains(*parent);
    if (!abandoned) branch.insert(checkpoint);
  }
  return {branch.begin(), branch.end()};
}

}  // namespace holdfast
