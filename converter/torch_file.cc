// The containers of torch.save. What the pickle in them means is torch_rebuild.cc's.
#include "converter/torch_file.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "converter/torch_file_builder.h"

namespace holdfast::converter {
namespace {

// The first pickle of a legacy file, the magic number 0x1950a86a20f9469cfc6c as LONG1, in protocol
// 2 to 5; protocol 1 writes it in decimal.
constexpr std::string_view kMagicLong = "\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
constexpr std::string_view kMagicBytes = "\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
constexpr std::string_view kMagicDecimal = "L119547037146038801333356L\n.";
constexpr int64_t kLegacyVersion = 1001;
constexpr uint64_t kVersionMax = 10;  // caffe2/serialize/versions.h
constexpr size_t kTarMagicOffset = 257;
constexpr size_t kFirstPickleBytes = size_t{64} << 10;
constexpr size_t kSmallRecordBytes = 64;

PickleOptions TreeOptions(PickleOptions::Following following) {
  PickleOptions options;
  options.bytes_max = kTorchPickleBytesMax;
  options.values_max = kTorchValuesMax;
  options.classes = PickleOptions::Classes::kOpaque;
  options.following = following;
  return options;
}

// The number of `data`, or 0.
uint64_t VersionOf(const std::string& text) {
  uint64_t version = 0;
  const absl::string_view digits =
      absl::StripSuffix(absl::string_view(text.data(), text.size()), "\n");
  return absl::SimpleAtoi(digits, &version) ? version : 0;
}

}  // namespace

TorchFileBuilder::TorchFileBuilder(std::string name) : file_(new TorchFile) {
  file_->name_ = std::move(name);
}

absl::Status TorchFileBuilder::Broken(std::string_view what) const {
  return absl::DataLossError(absl::StrFormat("%s: %s", file_->name_, what));
}

// The pickle reader's errors, with the names of file and record; a broken pickle is a broken file.
absl::Status TorchFileBuilder::WithName(const absl::Status& status, std::string_view where) const {
  const bool broken = status.code() == absl::StatusCode::kInvalidArgument ||
                      status.code() == absl::StatusCode::kOutOfRange;
  return absl::Status(
      broken ? absl::StatusCode::kDataLoss : status.code(),
      absl::StrFormat("%s: %s: %s", file_->name_, where, std::string(status.message())));
}

absl::Status TorchFileBuilder::ReadZip(const ByteSource& source) {
  file_->container_ = TorchFile::Container::kZip;
  ASSIGN_OR_RETURN(const ZipDirectory zip, ZipDirectory::Read(source));
  const ZipEntry* pickle = nullptr;
  for (const ZipEntry& entry : zip.entries()) {
    const size_t slash = entry.name.find('/');
    const std::string_view record =
        slash == std::string::npos ? "" : std::string_view(entry.name).substr(slash + 1);
    if (record == "constants.pkl") {
      return absl::UnimplementedError(
          absl::StrCat(file_->name_,
                       ": is a TorchScript archive, a program and not a checkpoint: "
                       "load it with torch.jit.load and save its state_dict()"));
    }
    if (record == "archive_format") {
      return absl::UnimplementedError(
          absl::StrCat(file_->name_,
                       ": is a .pt2 archive of torch.export, a program and not a "
                       "checkpoint: save the model's state_dict()"));
    }
    if (record != "data.pkl") continue;
    if (pickle != nullptr) return Broken("has two archives: two records data.pkl");
    pickle = &entry;
  }
  if (pickle == nullptr) {
    return Broken("is a zip, but no file of torch.save: expected a record <prefix>/data.pkl");
  }
  const std::string prefix = pickle->name.substr(0, pickle->name.size() - 8);
  return ReadZipRecords(source, zip, prefix, *pickle);
}

absl::Status TorchFileBuilder::ReadZipRecords(const ByteSource& source, const ZipDirectory& zip,
                                              const std::string& prefix, const ZipEntry& pickle) {
  const ZipEntry* version = zip.Find(absl::StrCat(prefix, "version"));
  if (version == nullptr) version = zip.Find(absl::StrCat(prefix, ".data/version"));
  if (version != nullptr) {
    ASSIGN_OR_RETURN(const std::string text,
                     ReadZipEntry(source, *version, kSmallRecordBytes, ZipCheck::kNone));
    if (const uint64_t found = VersionOf(text); found < 1 || found > kVersionMax) {
      return Broken(
          absl::StrFormat("record version: expected 1 to %d, found \"%s\"", kVersionMax, text));
    }
  }
  if (const ZipEntry* const order = zip.Find(absl::StrCat(prefix, "byteorder")); order != nullptr) {
    ASSIGN_OR_RETURN(const std::string text,
                     ReadZipEntry(source, *order, kSmallRecordBytes, ZipCheck::kNone));
    if (text != "little" && text != "big") {
      return Broken(
          absl::StrFormat("record byteorder: expected little or big, found \"%s\"", text));
    }
    file_->big_endian_ = text == "big";
  }
  const std::string data = absl::StrCat(prefix, "data/");
  bool all_zero = true;
  for (const ZipEntry& entry : zip.entries()) {
    if (!entry.name.starts_with(data)) continue;
    Record record;
    record.offset = entry.data_offset;
    record.bytes = entry.bytes;
    record.crc32 = entry.crc32;
    record.deflated = entry.method == ZipEntry::Method::kDeflated;
    all_zero = all_zero && (entry.bytes == 0 || entry.crc32 == 0);
    if (entry.bytes != 0) unwritten_ = true;  // if the rest of this file agrees
    records_.emplace(entry.name.substr(data.size()), record);
  }
  unwritten_ = unwritten_ && all_zero && pickle.crc32 != 0;
  if (unwritten_) {
    file_->warnings_.push_back(
        absl::StrCat(file_->name_,
                     ": its data were never written (torch.serialization.skip_data): they read as "
                     "zeros"));
  }
  ASSIGN_OR_RETURN(std::string bytes,
                   ReadZipEntry(source, pickle, kTorchPickleBytesMax, ZipCheck::kCrc32UnlessZero));
  // torch itself ignores what stands behind the pickle.
  absl::StatusOr<std::unique_ptr<PickleDocument>> document =
      PickleDocument::Parse(std::move(bytes), TreeOptions(PickleOptions::Following::kAllowed));
  if (!document.ok()) return WithName(document.status(), "data.pkl");
  file_->document_ = *std::move(document);
  return absl::OkStatus();
}

absl::Status TorchFileBuilder::ReadPickle(std::string bytes) {
  absl::StatusOr<std::unique_ptr<PickleDocument>> document =
      PickleDocument::Parse(std::move(bytes), TreeOptions(PickleOptions::Following::kRefused));
  if (!document.ok()) return WithName(document.status(), "pickle");
  file_->document_ = *std::move(document);
  return absl::OkStatus();
}

// The pickle that begins at `at`, which then is where it ends. How long it is nothing says: more is
// read until it ends.
absl::StatusOr<std::unique_ptr<PickleDocument>> TorchFileBuilder::NextPickle(
    const ByteSource& source, uint64_t& at, std::string_view what) const {
  const uint64_t rest = source.size_bytes() - at;
  for (uint64_t window = kFirstPickleBytes;; window *= 4) {
    const size_t bytes = std::min({window, rest, uint64_t{kTorchPickleBytesMax}});
    ASSIGN_OR_RETURN(std::string text, source.ReadText(at, bytes));
    absl::StatusOr<std::unique_ptr<PickleDocument>> document =
        PickleDocument::Parse(std::move(text), TreeOptions(PickleOptions::Following::kAllowed));
    if (document.ok()) {
      at += (*document)->consumed_bytes();
      return document;
    }
    const bool may_be_cut = document.status().code() == absl::StatusCode::kOutOfRange;
    if (!may_be_cut || bytes < window || bytes == rest) return WithName(document.status(), what);
  }
}

absl::Status TorchFileBuilder::ReadLegacy(const ByteSource& source) {
  file_->container_ = TorchFile::Container::kLegacy;
  uint64_t at = 0;
  ASSIGN_OR_RETURN(const std::unique_ptr<PickleDocument> magic,
                   NextPickle(source, at, "magic number"));
  const absl::StatusOr<std::string_view> found = magic->root().BigInteger();
  if (!found.ok() || *found != kMagicBytes) {
    return Broken("is no file of torch.save: expected its magic number");
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<PickleDocument> version,
                   NextPickle(source, at, "version"));
  const absl::StatusOr<int64_t> number = version->root().Int64();
  if (!number.ok() || *number != kLegacyVersion) {
    return Broken(
        absl::StrFormat("expected version %d of the format before torch 1.6", kLegacyVersion));
  }
  // What machine wrote it: the data are little-endian all the same.
  RETURN_IF_ERROR(NextPickle(source, at, "system information").status());
  ASSIGN_OR_RETURN(file_->document_, NextPickle(source, at, "object"));
  ASSIGN_OR_RETURN(const std::unique_ptr<PickleDocument> keys,
                   NextPickle(source, at, "list of storages"));
  return ReadLegacyStorages(source, *keys, at);
}

// Behind the list: for each key, in its order, a count of elements and the elements. What an
// element takes stands in the persistent ids of the object.
absl::Status TorchFileBuilder::ReadLegacyStorages(const ByteSource& source,
                                                  const PickleDocument& keys, uint64_t at) {
  std::map<std::string_view, StorageId> ids;
  absl::Status status;
  file_->document_->Walk([&](PickleValue value) {
    if (!value.Is(Type::kPersistent)) return PickleDocument::Step::kInto;
    const PickleValue id = value.persistent_id();
    const bool is_module = id.Is(Type::kTuple) && *id.ArraySize() != 0 && id[0].Is(Type::kString) &&
                           *id[0].String() == "module";
    if (is_module) return PickleDocument::Step::kSkip;  // a class, and the text of its source
    const absl::StatusOr<StorageId> storage = ReadStorageId(value);
    if (!storage.ok()) {
      status = storage.status();
      return PickleDocument::Step::kStop;
    }
    ids.emplace(storage->key, *storage);
    return PickleDocument::Step::kInto;
  });
  RETURN_IF_ERROR(status);
  const absl::StatusOr<size_t> count = keys.root().ArraySize();
  if (!count.ok()) return WithName(count.status(), "list of storages");
  for (size_t i = 0; i < *count; ++i) {
    const absl::StatusOr<std::string_view> key = keys.root()[i].String();
    if (!key.ok()) return WithName(key.status(), "list of storages");
    const auto id = ids.find(*key);
    if (id == ids.end()) {
      return Broken(absl::StrFormat("storage \"%s\": is listed, but no tensor has it", *key));
    }
    ASSIGN_OR_RETURN(const std::string head, source.ReadText(at, 8));
    uint64_t elements = 0;
    for (size_t byte = 8; byte-- > 0;) elements = elements << 8 | static_cast<uint8_t>(head[byte]);
    if (elements != id->second.count) {
      return Broken(absl::StrFormat("storage \"%s\": expected %d elements, found %d", *key,
                                    id->second.count, elements));
    }
    at += 8;
    if (id->second.bytes > source.size_bytes() - at) {
      return Broken(absl::StrFormat("storage \"%s\": expected %d bytes at %d, found the end at %d",
                                    *key, id->second.bytes, at, source.size_bytes()));
    }
    Record record;
    record.offset = at;
    record.bytes = id->second.bytes;
    if (!records_.emplace(std::string(*key), record).second) {
      return Broken(absl::StrFormat("storage \"%s\": is listed twice", *key));
    }
    at += record.bytes;
  }
  return absl::OkStatus();
}

bool TorchFile::BeginsLikeTorch(std::string_view head) {
  if (ZipDirectory::BeginsLikeZip(head)) return true;
  return head.starts_with(kMagicDecimal) ||
         (head.size() > 2 && head[0] == '\x80' &&
          head.substr(2, head.size()).substr(0, kMagicLong.size()) == kMagicLong) ||
         (head.size() > 11 && head[0] == '\x80' && head[2] == '\x95' &&
          head.substr(11).starts_with(kMagicLong));  // protocol 4: in a frame
}

absl::StatusOr<std::unique_ptr<TorchFile>> TorchFile::Open(const ByteSource& source) {
  TorchFileBuilder builder(source.name());
  const size_t head_bytes = std::min<uint64_t>(source.size_bytes(), kTarMagicOffset + 5);
  ASSIGN_OR_RETURN(const std::string head, source.ReadText(0, head_bytes));
  if (std::string_view(head).substr(std::min(head.size(), kTarMagicOffset)) == "ustar") {
    return absl::UnimplementedError(absl::StrCat(
        source.name(), ": is a tar file, as torch 0.1 wrote them: save it again with torch 1.6"));
  }
  const bool legacy = BeginsLikeTorch(head) && !ZipDirectory::BeginsLikeZip(head);
  if (legacy || (!head.empty() && head[0] == '\x80')) {
    RETURN_IF_ERROR(builder.ReadLegacy(source));
  } else {
    RETURN_IF_ERROR(builder.ReadZip(source));
  }
  return builder.Build();
}

absl::StatusOr<std::unique_ptr<TorchFile>> TorchFile::OpenPickle(std::string name,
                                                                 std::string bytes) {
  TorchFileBuilder builder(std::move(name));
  RETURN_IF_ERROR(builder.ReadPickle(std::move(bytes)));
  return builder.Build();
}

}  // namespace holdfast::converter
