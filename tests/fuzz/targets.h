// What reads bytes that nobody vouches for, one function each: FuzzXxx gives it any bytes at all
// and CHECKs what must hold of the outcome. No outcome may be a crash, an endless loop or memory
// without bound; an error must be of the kind that the reader's header promises; what is accepted
// must be usable in full.
//
// They are driven twice: by tests/fuzz/hostile_test.cc everywhere, over seeds and mutations of
// them, and by libFuzzer (libfuzzer.cc, scripts/fuzz), which looks for new ones.
//
// There is no target for the head of an image: nothing in Holdfast parses one. Readers go by INDEX,
// and libhdf5 only ever makes heads (FuzzImage gives it hostile names, shapes and pieces).
#ifndef HOLDFAST_TESTS_FUZZ_TARGETS_H_
#define HOLDFAST_TESTS_FUZZ_TARGETS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast::fuzz {

using Input = std::span<const uint8_t>;

bool FuzzJson(Input input);          // base/json_reader.h
bool FuzzLayout(Input input);        // format/layout.h, format/writer_assignment.h
bool FuzzLayoutRules(Input input);   // format/layout_rules.h: two texts, a NUL between
bool FuzzIndex(Input input);         // format/index.h, format/planner.h
bool FuzzSealedFiles(Input input);   // format/manifest.h, checkpoint/sealed_json.h
bool FuzzNames(Input input);         // format/checkpoint_names.h
bool FuzzImage(Input input);         // format/image.h
bool FuzzImageRecord(Input input);   // checkpoint/image_record.h
bool FuzzRegistration(Input input);  // checkpoint/registration.h
bool FuzzPacket(Input input);        // agent/packet.h
bool FuzzBoard(Input input);         // agent/monitor/board_reader.h, monitor/summary.h
bool FuzzSelection(Input input);     // checkpoint/restore_selection.h
bool FuzzRecordedStep(Input input);  // monitor/recording.h, monitor/job_analysis.h
bool FuzzRecording(Input input);     // monitor/recording.h, base/zstd_codec.h: a file
bool FuzzDcpMetadata(Input input);   // converter/dcp_metadata.h, converter/dcp_encoding.h
bool FuzzFlightRecord(Input input);  // base/pickle_reader.h, monitor/witness/flight_record.h
bool FuzzSafetensors(Input input);   // converter/safetensors.h
bool FuzzForeignIndex(Input input);  // converter/foreign_index.h
bool FuzzShardRules(Input input);    // converter/layout_file.h, converter/parallel_rules.h
bool FuzzMapping(Input input);       // converter/mapping_rules.h, converter/mapping.h
bool FuzzRenames(Input input);       // converter/rename_rules.h, converter/selection.h
bool FuzzRas(Input input);           // monitor/witness/ras.h
bool FuzzPickle(Input input);        // base/pickle_reader.h, classes as inert nodes
bool FuzzZip(Input input);           // converter/zip_reader.h
bool FuzzTorch(Input input);         // converter/torch_file.h, converter/torch_reader.h
bool FuzzStacks(Input input);        // monitor/witness/stacks.h, monitor/witness/xid.h

// How inputs are mutated, and what is put right afterwards, so that what lies behind a checksum is
// reached (tests/fuzz/mutator.h).
enum class Form { kBinary, kText, kSealedText, kIndex, kImageRecord, kRegistration };

struct Target {
  std::string_view name;
  bool (*run)(Input input);
  Form form;
  // Bound of what one input may allocate at once: base + factor x its bytes.
  size_t memory_base_bytes;
  size_t memory_factor;
  // What hostile_test tries: whether all that can be enumerated, and so many random mutations.
  bool enumerates;
  size_t random_cases;
};

std::span<const Target> Targets();
const Target* FindTarget(std::string_view name);  // null if there is none

// Good inputs, as our own encoders make them: what others are made of.
std::vector<std::string> SeedsOf(const Target& target);

// Inputs that once did harm or took long: corpus/NAME/, by the names of their files.
struct CorpusInput {
  std::string name;
  std::string bytes;
};
std::vector<CorpusInput> CorpusOf(const Target& target);

}  // namespace holdfast::fuzz

#endif  // HOLDFAST_TESTS_FUZZ_TARGETS_H_
