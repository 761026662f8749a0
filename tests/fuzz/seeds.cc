#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/packet.h"
#include "base/check.h"
#include "base/pickle_writer.h"
#include "checkpoint/image_record.h"
#include "checkpoint/sealed_json.h"
#include "converter/dcp_encoding.h"
#include "converter/dcp_metadata.h"
#include "converter/foreign_index.h"
#include "converter/test_zip.h"
#include "format/checkpoint_names.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/writer_assignment.h"
#include "hook/abi/messages.h"
#include "hook/abi/monitor.h"
#include "monitor/recording.h"
#include "monitor/testimony.h"
#include "tests/fuzz/targets.h"
#include "tests/support/scripted_trainer.h"

namespace holdfast::fuzz {
namespace {

using Seeds = std::vector<std::string>;

const std::string kSource = HOLDFAST_SOURCE_DIR;
const std::string kGolden = kSource + "/tests/data/golden-v1/";
const std::string kGoldenCheckpoint = kGolden + "golden.job-1/s000000000042.a0003/";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::string Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The examples of the grammar, and one document of every operation.
Seeds LayoutDocuments() {
  Seeds documents;
  const std::string text = ReadFile(kSource + "/docs/layout-grammar.md");
  constexpr std::string_view kFence = "```json\n";
  for (size_t at = text.find(kFence); at != std::string::npos; at = text.find(kFence, at)) {
    at += kFence.size();
    documents.push_back(text.substr(at, text.find("```", at) - at));
  }
  documents.push_back(
      R"({"holdfast_layout":1,"mesh":[{"axis":"a","size":2},{"axis":"b","size":3}],
"packs":[{"pack":"p","axis":["b"],"buffer":"p","align_elements":4,"multiple_elements":2}],
"placements":{"q":[{"op":"shard","dim":0,"axis":"a","rule":"sizes","sizes":[5,1]},{"op":"pack","pack":"p"}]},
"tensors":[{"name":"t","shape":[6,4],"states":[
{"state":"s","dtype":"int8","place":"q"},
{"state":"u","dtype":"int8","place":[{"op":"pack","pack":"p"}]},
{"state":"v","dtype":"float32","place":[{"op":"shard","dim":0,"axis":"a","rule":"balanced","grain":2,"blocks":[4,2]},
{"op":"flat","axis":"b","rule":"ceil"}]},
{"state":"w","dtype":"float64","place":[{"op":"view","shape":[3,2,-1]},{"op":"perm","dims":[2,0,1]},
{"op":"pad","dim":1,"multiple":2,"axis":"a","size":5},{"op":"shard","dim":1,"axis":"a","rule":"even"},
{"op":"place","axis":"b","index":1,"count":5,"rule":"ceil","virtual":2}]}]}]})");
  for (const std::string& document : documents) CHECK_OK(Layout::Parse(document).status());
  return documents;
}

Seeds RulesAndChanges() {
  Seeds seeds;
  for (const std::string& document : LayoutDocuments()) {
    // The first axis of each.
    std::string to = "dp=3,tp=1,zero=2";
    const auto layout = Layout::Parse(document);
    if (!(*layout)->mesh().empty()) to = absl::StrCat((*layout)->mesh()[0].name, "=2");
    seeds.push_back(absl::StrCat(document, std::string(1, '\0'), to));
  }
  seeds.push_back(absl::StrCat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":4}],"meshes":{"e":[{"axis":"ep","size":4}]},
"zero":{"stage":1,"axis":"dp","states":{"m":2}},"tensors":[{"name":"t","shape":[5],"states":[
{"state":"m","dtype":"int8","place":[{"op":"zero","rule":"ceil"}]},
{"state":"n","dtype":"int8","place":{"mesh":"e","ops":[{"op":"place","axis":"ep","coordinates":[0,-1]}]}}]}]})",
      std::string(1, '\0'), "dp=2,e.ep=2,zero=3"));
  seeds.push_back(
      R"({"holdfast_layout_rules":1,"mesh":[{"axis":"pp","size":2}],"rules":[
{"tensors":"layers.{layer}.*","states":["param"],"place":[{"op":"place","axis":"pp","index":"{layer}","count":12,"rule":"even"}]},
{"tensors":"*{n}b"},{"tensors":"*"}]})");
  return seeds;
}

// What the ranks of a document store, as a commit writes it.
std::string IndexOf(const std::string& document) {
  const auto layout = Layout::Parse(document);
  CHECK_OK(layout.status());
  const uint32_t world_size = (*layout)->world_size();
  Index index;
  index.job = "job";
  index.job_uuid = "01234567-89ab-cdef-0123-456789abcdef";
  index.checkpoint = {Attempt{2}, Step{30}};
  index.world_size = world_size;
  index.layouts = {document};
  index.tensor_states = (*layout)->tensor_states();
  index.facts.resize(index.tensor_states.size());
  const WriterAssignment writers = WriterAssignment::Create(**layout);
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    const auto stored = writers.ForRank(Rank{rank}, {});
    CHECK_OK(stored.status());
    uint64_t offset = 0;
    for (const Segment& segment : stored->segments) {
      IndexPiece piece{segment.piece, rank, offset};
      if (segment.piece.box != kWholeTensor) {
        const BoxView box = stored->boxes[segment.piece.box];
        piece.piece.box = index.boxes.Add(box.lo, box.size);
      }
      offset += segment.piece.ElementCount() *
                ElementBytes(index.tensor_states[segment.piece.tensor_state].dtype);
      index.pieces.push_back(piece);
    }
    index.images.push_back({ImageFileName(Rank{rank}), Rank{rank}, 0, 4096, 4096, {rank}});
    index.blobs.push_back({BlobScope::kRank, Rank{rank}, "rng", rank, 64, 16});
  }
  SortIndex(index);
  const auto bytes = EncodeIndex(index);
  CHECK_OK(bytes.status());
  return Text(*bytes);
}

Seeds Indexes() {
  Seeds seeds = {ReadFile(kGoldenCheckpoint + "INDEX")};
  const Seeds documents = LayoutDocuments();
  // Every second one: boxes, strided buffers and listed segments are among them.
  for (size_t i = 0; i < documents.size(); i += 2) seeds.push_back(IndexOf(documents[i]));
  return seeds;
}

Seeds SealedFiles() {
  return {ReadFile(kGoldenCheckpoint + "MANIFEST.json"),
          ReadFile(kGolden + "golden.job-1/JOB.json"), ReadFile(kGolden + "golden.job-1/HEAD.1"),
          ReadFile(kGolden + "BAD.1"), SealJson({"\"a\": [1, {}]", "\"b\": \"\\u00e9\""})};
}

Seeds Names() {
  return {"s000000001000.a0004",
          "s18446744073709551615.a4294967295",
          "rank-00000.h5",
          "rank-123456.r12.h5",
          "BAD.1",
          "HEAD.4294967295",
          "job.name-1",
          "01234567-89ab-cdef-0123-456789abcdef"};
}

std::string Record(uint32_t slot_count) {
  RecordHeader header;
  header.registration_id = 3;
  header.block_bytes = 4096;
  header.slot_count = slot_count;
  header.block_count = 3;
  header.blob_count = 2;
  const auto record = ImageRecord::Create(header);
  CHECK_OK(record.status());
  SlotRecord slot;
  slot.state = SlotRecord::State::kSealed;
  slot.file = SlotRecord::File::kDurable;
  slot.generation = 5;
  slot.step = 40;
  slot.path = "/root/job/rank-00000.h5";
  slot.block_table = {4, 0, 7};
  slot.blob_bytes = {16, UINT64_MAX};
  (*record)->Update(0, slot);
  // Two pages have all of it.
  std::string bytes(64 << 10, '\0');
  const ssize_t size = pread((*record)->fd(), bytes.data(), bytes.size(), 0);
  CHECK(size > 0 && static_cast<size_t>(size) < bytes.size());
  bytes.resize(static_cast<size_t>(size));
  return bytes;
}

// The same with the layout as its end, so that it can grow.
std::string LayoutLast(std::string document) {
  abi::RegistrationDocument header;
  std::memcpy(&header, document.data(), sizeof(header));
  const std::string layout = document.substr(header.layout_offset, header.layout_bytes);
  header.layout_offset = document.size();
  header.total_bytes = document.size() + layout.size();
  std::memcpy(document.data(), &header, sizeof(header));
  return document + layout;
}

Seeds Registrations() {
  constexpr uint64_t kBufferBytes = 1 << 20;
  Seeds seeds;
  const Seeds documents = LayoutDocuments();
  for (const std::string& document : documents) {
    const auto layout = Layout::Parse(document);
    std::vector<TrainerBuffer> buffers;
    const auto held = (*layout)->ForRank(Rank{0});
    CHECK_OK(held.status());
    // Large enough for other shapes and dtypes, too.
    for (const BufferNeed& need : held->buffers) buffers.push_back({need.name, kBufferBytes, 1});
    for (const abi::Copies copies : {abi::Copies::kOnce, abi::Copies::kAll}) {
      seeds.push_back(
          LayoutLast(EncodeDocument(document, buffers, {{"rng", 1, 100}, {"args", 0, 7}}, copies)));
    }
  }
  seeds.push_back(LayoutLast(EncodeDocument(
      R"({"holdfast_layout":1,"mesh":[],"tensors":[{"name":"t","shape":[4,6],"states":[{"state":"s","dtype":"int8","place":[{"op":"perm","dims":[1,0]}]}]}]})",
      {{"s/t", kBufferBytes, 0}}, {})));
  return seeds;
}

template <typename Body>
std::string PacketOf(abi::MessageType type, const Body& body) {
  const abi::MessageHeader header{abi::kProtocolMagic, abi::kProtocolVersion, type, 1,
                                  sizeof(Body)};
  return Text(std::as_bytes(std::span(&header, 1))) + Text(BodyBytes(body));
}

Seeds Packets() {
  abi::OpenRequest open{};
  std::strcpy(open.job, "job");
  std::strcpy(open.attempt_key, "key");
  std::strcpy(open.node, "node");
  std::strcpy(open.restore_from, "/root/job");
  open.world_size = 2;
  return {PacketOf(abi::MessageType::kOpen, open),
          PacketOf(abi::MessageType::kRegister, abi::RegisterRequest{100}),
          PacketOf(abi::MessageType::kRestore, abi::RestoreRequest{3, 100}),
          PacketOf(abi::MessageType::kQuery, abi::QueryRequest{}),
          PacketOf(abi::MessageType::kMonitorQuery, abi::MonitorQuery{}),
          PacketOf(abi::MessageType::kRankExit, abi::RankExit{}),
          PacketOf(abi::MessageType::kWitness, abi::WitnessWait{})};
}

// As fuzz_board.cc reads them: words of a board, and their values.
Seeds Boards() {
  std::string bytes;
  const auto put = [&](uint64_t at, uint64_t value) {
    const auto word = static_cast<uint32_t>((at - offsetof(abi::BoardHeader, drops)) / 8);
    bytes += Text(std::as_bytes(std::span(&word, 1))) + Text(std::as_bytes(std::span(&value, 1)));
  };
  const uint64_t communicator = sizeof(abi::BoardHeader);
  const uint64_t keys = communicator + sizeof(abi::Communicator) * abi::kBoardCommunicators;
  const uint64_t slots = keys + sizeof(uint64_t) * abi::kBoardSlots;
  put(communicator, static_cast<uint64_t>(abi::CommunicatorState::kOpen) | uint64_t{1} << 32);
  put(communicator + offsetof(abi::Communicator, hash), 7);
  put(communicator + offsetof(abi::Communicator, ranks), 4 | uint64_t{2} << 32);
  put(communicator + offsetof(abi::Communicator, enqueued), 2);
  put(communicator + offsetof(abi::Communicator, kind_count) + 8, 2);
  put(communicator + offsetof(abi::Communicator, kind_started) + 8, 1);
  put(offsetof(abi::BoardHeader, slots_taken), 1);
  uint64_t slot = 0;
  for (const abi::SlotDirection direction :
       {abi::SlotDirection::kSend, abi::SlotDirection::kReceive, abi::SlotDirection::kKernel,
        abi::SlotDirection::kProxyThread, abi::SlotDirection::kPeerSends}) {
    put(keys + 8 * slot, abi::EncodeSlotKey({0, 1, 3, 1, direction}));
    put(slots + sizeof(abi::Slot) * slot, uint64_t{5} << 32);
    put(slots + sizeof(abi::Slot) * slot + offsetof(abi::Slot, operation), 2);
    ++slot;
  }
  return {bytes};
}

std::string Selection(const Seeds& tensors, const Seeds& states) {
  const abi::RestoreSelection header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                        tensors.size() + states.size()};
  std::string entries;
  std::string texts;
  const uint64_t texts_offset =
      sizeof(header) + header.pattern_count * sizeof(abi::SelectionPattern);
  const auto add = [&](const std::string& text, uint32_t of) {
    const abi::SelectionPattern entry = {texts_offset + texts.size(),
                                         static_cast<uint32_t>(text.size()), of};
    entries += Text(std::as_bytes(std::span(&entry, 1)));
    texts += text;
  };
  for (const std::string& text : tensors) add(text, abi::SelectionPattern::kTensors);
  for (const std::string& text : states) add(text, abi::SelectionPattern::kStates);
  return Text(std::as_bytes(std::span(&header, 1))) + entries + texts;
}

// Of names that fuzz_selection.cc has.
Seeds Selections() {
  return {Selection({}, {}), Selection({"*"}, {}), Selection({}, {"exp_*"}),
          Selection({"layers.{n}.w", "wte"}, {"param", "exp_avg*"}),
          Selection({"layers.1*", "**w*"}, {})};
}

// What torch wrote: tests/data/flight/make.py.
Seeds FlightRecords() {
  Seeds seeds;
  for (const char* name : {"never-entered.0.pickle", "subgroup.0.pickle", "kind.3.pickle"}) {
    seeds.push_back(ReadFile(kSource + "/tests/data/flight/" + name));
  }
  seeds.push_back(ReadFile(kSource + "/tests/data/flight/never-entered.2.json"));
  return seeds;
}

// A state dict as torch.save writes it: a tensor, a parameter, an object of a class.
std::string TorchPickle() {
  PickleWriter writer;
  const auto tensor = [&writer](const char* function) {
    writer.Global("torch._utils", function);
    writer.Mark();
    writer.Mark();
    writer.String("storage");
    writer.Global("torch", "FloatStorage");
    writer.String("0");
    writer.String("cpu");
    writer.Int(4);
    writer.Tuple();
    writer.PersistentId();
    writer.Int(0);
    for (const int64_t value : {int64_t{2}, int64_t{1}}) {
      writer.Int(2);
      writer.Int(value);
      writer.Tuple(2);
    }
    writer.Bool(false);
    writer.Global("collections", "OrderedDict");
    writer.Tuple(0);
    writer.Reduce();
    writer.Tuple();
    writer.Reduce();
  };
  writer.EmptyDict();
  writer.Mark();
  writer.String("w");
  tensor("_rebuild_tensor_v2");
  writer.String("p");
  writer.Global("torch._utils", "_rebuild_parameter");
  tensor("_rebuild_tensor_v2");
  writer.Bool(true);
  writer.None();
  writer.Tuple(3);
  writer.Reduce();
  writer.String("args");
  writer.Global("argparse", "Namespace");
  writer.Tuple(0);
  writer.NewObject();
  writer.EmptyDict();
  writer.Mark();
  writer.String("lr");
  writer.Float(0.5);
  writer.SetItems();
  writer.Build();
  writer.SetItems();
  return std::move(writer).Finish();
}

std::string TorchZip() {
  converter::TestZip zip;
  zip.entries = {{.name = "x/data.pkl", .data = TorchPickle()},
                 {.name = "x/byteorder", .data = "little"},
                 {.name = "x/data/0", .data = std::string(16, 'd')},
                 {.name = "x/version", .data = "3\n"}};
  return zip.Bytes();
}

// The five pickles of torch before 1.6, and a storage.
std::string TorchLegacy() {
  PickleWriter version, information, keys;
  version.Int(1001);
  information.EmptyDict();
  keys.EmptyList();
  keys.Mark();
  keys.String("0");
  keys.Appends();
  const std::string magic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  const std::string count("\x04\0\0\0\0\0\0\0", 8);
  return magic + std::move(version).Finish() + std::move(information).Finish() + TorchPickle() +
         std::move(keys).Finish() + count + std::string(16, 'd');
}

Seeds Zips() {
  converter::TestZip deflated;
  deflated.zip64_end = false;
  deflated.entries = {{.name = "a",
                       .data = std::string("\x4b\x4c\xa4\x3d\0\0", 6),
                       .method = 8,
                       .inflated_size = 100},
                      {.name = "b/c", .data = "x", .zip64_sizes = true}};
  return {TorchZip(), deflated.Bytes(), converter::TestZip().Bytes()};
}

// What torch wrote (tests/interop/sharded_make.py), and one of ours with all that there is.
Seeds DcpMetadataFiles() {
  converter::DcpMetadata metadata;
  metadata.version = "1.0.0";
  metadata.transforms = {{}, {"stream.zstd/1"}};
  metadata.files = {"__0_0.distcp", "__1_0.distcp"};
  metadata.numbers = {0, 0, 2, 3, 2, 0, 2, 3};
  metadata.chunks = {{.offsets = 0, .item = 0}, {.offsets = 4, .item = 1}};
  metadata.items = {{.offset_bytes = 100, .stored_bytes = 1577, .file = 0},
                    {.offset_bytes = 0, .stored_bytes = 7, .file = 1, .transforms = 1},
                    {.offset_bytes = 0, .stored_bytes = 100, .file = 0}};
  metadata.tensors = {{.key = "model.w",
                       .path = {"model", "w"},
                       .dtype = "bfloat16",
                       .requires_grad = true,
                       .shape = {4, 3},
                       .chunks_begin = 0,
                       .chunks_end = 2}};
  metadata.objects = {{.key = "lr", .path = {"lr"}, .item = 2}};
  return {converter::EncodeDcpMetadata(metadata),
          ReadFile(kSource + "/tests/data/sharded/dcp_rank_metadata/ckpt/__0.metadata")};
}

Seeds ShardRules() {
  return {
      R"({"rules":[{"parameters":"a\\.w","cut":0,"blocks":[4,2]},{"parameters":".*b$","cut":1,"blocks":2},
{"parameters":"","cut":"replicated","rows":1}],"pipeline_replicated":["a"]})",
      R"({"rules":[{"parameters":"a","cut":0,"rows":3}]})"};
}

// Every operation and statement, on the names of fuzz_mapping.cc; without and with padding.
Seeds MappingFiles() {
  return {
      R"(# all
transpose(x) = a
y = b
qkv.{n} = interleave(groups, heads * h.{n}.q, groups * h.{n}.k, groups * h.{n}.v)
all = stack(e, e.{e})
concat(2 * bias.0, 1 * bias.1) = bias
s = scale
"no ne" = none
one = transpose(deep)
shape h.{n}.q [q hidden]
require args.swiglu true
require config.hidden_act "silu"
)",
      R"(transpose(pad(x)) = rotary(heads, a)
pad(y, 4, 9) = b
rotary(2, c.{n}) = h.{n}.q
concat(k, v) = stack(n, concat(h.{n}.k,
  h.{n}.v))
drop e.{e}
drop bias
drop scale)"};
}

Seeds RenameFiles() {
  return {
      "# a wrapper\nprefix h. layers.\nsuffix .q \".q w\"\nregex ^layers\\.(\\d+)\\. \\1.x.\n"
      "name bias first # one\n",
      "regex (.*)(\\d) \\2\\1\\0\nname a \"\\u00e9\"\nprefix \"\" p.\n"};
}

// As NCCL 2.30.7 prints them.
Seeds RasReports() {
  return {R"({"communicators":[{"hash":"0xa1","secondary_hash":"0x1:0x2","size":2,
"ranks":[{"rank":0,"host":"10.0.0.1","pid":11,"status":{"async_error":0},"collective_counts":{"AllReduce":5}}],
"missing_ranks":[{"rank":1,"host":"10.0.0.2","pid":12,"status":{"unresponsive":true,"considered_dead":false}}]}]})",
          "NCCL version 2.30.7\nDEAD\n  Process 12 on node 10.0.0.2 managing GPU 0\n"
          "#0-0 (00000000000000a1) INCOMPLETE\n  Rank 1 -- GPU 0 managed by process 12 on node h\n"
          "Warnings\n#0-0 (00000000000000a1) MISMATCH\n"
          "  Communicator ranks have different AllReduce operation counts\n"
          "  3 ranks have launched up to operation 7\n"
          "  Rank 0 has not launched any operations -- GPU 0 managed by process 11 on node h\n"};
}

Seeds Stacks() {
  return {
      "holdfast main thread 0x7f01\nCurrent thread 0x1 (most recent call first):\n"
      "  File \"a/b.py\", line 1 in f\nThread 0x7f01 (most recent call first):\n"
      "  File \"/x/torch/distributed/c10d.py\", line 9 in g\n  File \"/x/y/z.py\", line 2 in m\n",
      "thread 7 main\n  poll (libc.so.6)\n  step (app)\nthread 8\n  poll (libc.so.6)\n",
      "NVRM: Xid (PCI:0000:3b:00): 79, pid=12, GPU has fallen off the bus.\n"};
}

// Two nodes of two ranks, one of which has ended; a place in a layout; a loss.
Seeds RecordedSteps() {
  monitor::RecordedStep recorded;
  recorded.job = "job";
  recorded.step.elapsed = absl::Seconds(7);
  recorded.step.receiver_gap = absl::Milliseconds(3);
  recorded.step.roles = {{0, 1}, {1, 0}};
  for (uint32_t node = 0; node < 2; ++node) {
    monitor::NodeSummary summary;
    summary.sequence = 1;
    summary.clock_us = 5'000'000;
    monitor::RankReport& rank = summary.ranks.emplace_back();
    rank.rank = Rank{node};
    rank.exit = node == 0 ? monitor::ExitKind::kNone : monitor::ExitKind::kKilled;
    recorded.step.reports.push_back(
        {"job", "run/0", 2, node == 0 ? "a" : "b", monitor::EncodeSummary(summary)});
  }
  monitor::Testimony testimony;
  testimony.ranks = {Rank{1}};
  testimony.sentence = "rank 1 is odd";
  recorded.step.testimonies = {monitor::EncodeTestimonies(std::span(&testimony, 1))};
  return {monitor::EncodeRecorded(recorded), monitor::EncodeRecorded(monitor::RecordedLoss{4})};
}

Seeds Recordings() {
  monitor::RecordingWriter writer;
  std::string file = writer.Begin();
  for (const std::string& payload : RecordedSteps()) file += writer.Append(payload);
  const std::string cut = file;
  return {file + writer.End(), cut};
}

// Read by tests/fuzz/input_reader.h.
Seeds Images() {
  std::string seed = "\x0C\x02{}";
  absl::StrAppend(&seed, "\x01", "\x03w/.", "\x05param", "\x0B", "\x02\x04\x06");
  absl::StrAppend(&seed, "\x01", "b", "\x01s", "\x01", std::string(1, '\0'));
  absl::StrAppend(&seed, "\x02", std::string("\x00\x00\x00\x08", 4));
  absl::StrAppend(&seed, std::string("\x00\x01\x01\x02\x02\x03\x00\x06", 8));
  absl::StrAppend(&seed, "\x01\x01\x03rng\x0F");
  return {seed, std::string(200, '\xC1'), std::string(64, '\x05')};
}

// Headers with two bytes in front that say how many bytes of data stand behind.
Seeds SafetensorsHeaders() {
  return {std::string("\0\0", 2) + "{}",
          std::string("\x19\0", 2) +
              R"({"__metadata__":{"format":"pt","b":"a"},"a":{"dtype":"F32","shape":[2,3],)"
              R"("data_offsets":[0,24]},"e":{"dtype":"I64","shape":[0,4],"data_offsets":[24,24]},)"
              R"("s":{"dtype":"BOOL","shape":[],"data_offsets":[24,25]}}  )",
          std::string("\x09\0", 2) + R"({"f":["F4",[3,4],[0,6]],"g":{"x":[1],"dtype":"F6_E2M3",)"
                                     R"("shape":[4],"data_offsets":[6,9]}})"};
}

// The fields of an index with something of everything.
Seeds ForeignIndexes() {
  converter::ForeignIndex index;
  index.format = "test";
  index.variant = "variant";
  index.has_step = true;
  index.step = 7;
  index.layout = {{"dp", "2"}};
  index.files = {{"a/b", 1000}, {"c", 10}};
  const uint32_t whole = index.AddState({"t", "param", Dtype::kFloat32, {2, 3}});
  const uint32_t cut = index.AddState({"u", "exp_avg", Dtype::kComplex64, {4, 6}});
  index.AddWholePiece(whole, index.AddRaw(0, 100, 24), 0);
  index.AddWholePiece(whole, index.AddInline(std::string(24, 'x')), 0);
  index.extents.push_back({0, 200, 50, converter::Codec::kZstd, 500});
  const uint64_t lo[] = {0, 3};
  const uint64_t size[] = {4, 3};
  index.strides = {{1, 5}};
  converter::ForeignPiece piece;
  piece.piece = {cut, index.boxes.Add(lo, size), 0, 12};
  piece.extent = 2;
  piece.offset_bytes = 8;
  piece.strides = 0;
  piece.byte_order = converter::ByteOrder::kBig;
  piece.conjugate = true;
  index.pieces.push_back(piece);
  index.aliases = {{0, 1}};
  index.scalars = {{"lr", "0.5"}};
  index.blobs = {{"rng", 1}};
  index.opaque_classes = {{"os.system", 1}};
  index.unreadable = {{"q", "is quantised"}};
  index.notes = {"a note"};
  index.repairs = {"a repair"};
  index.losses = {"a loss"};
  CHECK_OK(converter::Finish(index));
  const auto bytes = converter::EncodeForeignIndex(index);
  CHECK_OK(bytes.status());
  return {bytes->substr(5, bytes->size() - 9)};
}

}  // namespace

std::vector<std::string> SeedsOf(const Target& target) {
  const std::string_view name = target.name;
  if (name == "json" || name == "layout") return LayoutDocuments();
  if (name == "layout_rules") return RulesAndChanges();
  if (name == "index") return Indexes();
  if (name == "sealed_files") return SealedFiles();
  if (name == "names") return Names();
  if (name == "image") return Images();
  if (name == "image_record") return {Record(1), Record(2)};
  if (name == "registration") return Registrations();
  if (name == "selection") return Selections();
  if (name == "recorded_step") return RecordedSteps();
  if (name == "recording") return Recordings();
  if (name == "flight_record") return FlightRecords();
  if (name == "pickle") {
    return {TorchPickle(), "}(I01\nL123456789012345678901L\nU\x01kF2.5\nu.",
            ReadFile(kSource + "/tests/data/flight/subgroup.0.pickle")};
  }
  if (name == "zip") return Zips();
  if (name == "torch") return {TorchZip(), TorchLegacy()};
  if (name == "safetensors") return SafetensorsHeaders();
  if (name == "foreign_index") return ForeignIndexes();
  if (name == "dcp_metadata") return DcpMetadataFiles();
  if (name == "shard_rules") return ShardRules();
  if (name == "mapping") return MappingFiles();
  if (name == "renames") return RenameFiles();
  if (name == "ras") return RasReports();
  if (name == "stacks") return Stacks();
  if (name == "board") return Boards();
  CHECK(name == "packet");
  return Packets();
}

std::vector<CorpusInput> CorpusOf(const Target& target) {
  const std::filesystem::path corpus =
      absl::StrCat(kSource, "/tests/fuzz/corpus/", std::string(target.name));
  std::vector<CorpusInput> inputs;
  if (!std::filesystem::exists(corpus)) return inputs;
  for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
    inputs.push_back({entry.path().filename().string(), ReadFile(entry.path().string())});
  }
  std::sort(inputs.begin(), inputs.end(),
            [](const CorpusInput& a, const CorpusInput& b) { return a.name < b.name; });
  return inputs;
}

}  // namespace holdfast::fuzz
