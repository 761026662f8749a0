#include "examples/tiny_lm/layout_document.h"

#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "examples/tiny_lm/ballast.h"
#include "examples/tiny_lm/events.h"
#include "examples/tiny_lm/state.h"

namespace tiny_lm {
namespace {

using Operations = std::vector<std::string>;

std::string List(const std::vector<std::string>& members) {
  return absl::StrCat("[", absl::StrJoin(members, ","), "]");
}

std::string Shard(size_t dimension, const char* axis, size_t grain) {
  return absl::StrFormat(
      "{\"op\":\"shard\",\"dim\":%d,\"axis\":\"%s\",\"rule\":\"ceil\",\"grain\":%d}", dimension,
      axis, grain);
}

std::string Pack(const std::string& pack) {
  return absl::StrFormat("{\"op\":\"pack\",\"pack\":\"%s\"}", pack);
}

// By the number of the layer, or as the first or the last stage, so that the document can be
// resized to another number of stages (holdfast reshard --to).
std::string Place(const JobLayout& layout, const Home& home) {
  if (!home.layer.has_value()) {
    std::vector<std::string> stages;
    if (home.first_stage) stages.push_back("0");
    if (home.last_stage) stages.push_back("-1");
    return absl::StrFormat("{\"op\":\"place\",\"axis\":\"pp\",\"coordinates\":%s}", List(stages));
  }
  const std::vector<uint32_t>& sizes = layout.stage_layers;
  const std::string rule =
      layout.has_even_stages()
          ? "\"rule\":\"balanced\""
          : absl::StrFormat("\"rule\":\"sizes\",\"sizes\":[%s]", absl::StrJoin(sizes, ","));
  return absl::StrFormat("{\"op\":\"place\",\"axis\":\"pp\",\"index\":%d,\"count\":%d,%s}",
                         *home.layer, std::accumulate(sizes.begin(), sizes.end(), size_t{0}), rule);
}

// What tensor and pipeline parallelism leave of a parameter on a rank; all its states share it.
Operations LocalPart(const JobLayout& layout, const Parameter& parameter) {
  Operations operations;
  if (parameter.cut.has_value()) {
    operations.push_back(Shard(parameter.cut->dimension, "tp", parameter.cut->grain));
  }
  operations.push_back(Place(layout, parameter.home));
  return operations;
}

// What data parallelism cuts of that, if the stage of the document's zero rule says so: the
// optimizer keeps its states in packs, unless the parameters are cut too, each by itself.
std::string DataParallel(Zero zero, const std::string& state) {
  if (state != "param" && zero != Zero::kParameters) {
    return absl::StrFormat("{\"op\":\"zero\",\"pack\":\"%s\"}", state);
  }
  return "{\"op\":\"zero\",\"rule\":\"ceil\"}";
}

std::string State(const std::string& state, const char* dtype, const Operations& operations) {
  return absl::StrFormat("{\"state\":\"%s\",\"dtype\":\"%s\",\"place\":%s}", state, dtype,
                         List(operations));
}

std::string Tensor(const std::string& name, const std::vector<size_t>& shape,
                   const std::vector<std::string>& states) {
  return absl::StrFormat("{\"name\":%s,\"shape\":[%s],\"states\":%s}", JsonString(name),
                         absl::StrJoin(shape, ","), List(states));
}

std::string ParameterTensor(const JobLayout& layout, const Parameter& parameter) {
  std::vector<std::string> states;
  const auto add = [&](const char* state, const char* dtype) {
    Operations operations = LocalPart(layout, parameter);
    operations.push_back(DataParallel(layout.zero, state));
    states.push_back(State(state, dtype, operations));
  };
  add("param", "bfloat16");
  for (const char* state : kOptimizerStates) add(state, "float32");
  return Tensor(parameter.name, parameter.shape, states);
}

std::string BallastTensorText(Zero zero, const BallastTensor& tensor) {
  const std::vector<size_t> shape = {tensor.page_count, kPageElements};
  if (zero != Zero::kReplicated) {
    return Tensor(
        tensor.name, shape,
        {State("ballast", "uint64", {Shard(0, "pp", 1), Shard(0, "tp", 1), Pack("ballast")})});
  }
  return Tensor(tensor.name, shape,
                {absl::StrFormat("{\"state\":\"ballast\",\"dtype\":\"uint64\","
                                 "\"buffer\":\"ballast\",\"offset_bytes\":%d}",
                                 tensor.first_page * kPageBytes)});
}

std::string Packs(const JobLayout& layout) {
  std::vector<std::string> packs;
  const auto add = [&](const std::string& name, size_t multiple) {
    packs.push_back(
        absl::StrFormat("{\"pack\":\"%s\",\"axis\":\"dp\",\"align_elements\":%d,"
                        "\"multiple_elements\":%d,\"buffer\":\"%s\"}",
                        name, multiple, multiple, name));
  };
  if (layout.zero != Zero::kParameters) {
    for (const char* state : kOptimizerStates) add(state, 1);
  }
  if (layout.zero != Zero::kReplicated && layout.ballast_bytes > 0) add("ballast", kPageElements);
  return List(packs);
}

std::string MeshText(const Mesh& mesh) {
  return absl::StrFormat(
      "[{\"axis\":\"pp\",\"size\":%d},{\"axis\":\"dp\",\"size\":%d},{\"axis\":\"tp\",\"size\":%d}]",
      mesh.pp, mesh.dp, mesh.tp);
}

}  // namespace

std::string LayoutDocument(const ParameterTable& table, const JobLayout& layout) {
  std::vector<std::string> tensors;
  for (const Parameter& parameter : table.parameters()) {
    tensors.push_back(ParameterTensor(layout, parameter));
  }
  tensors.push_back(Tensor("optimizer", {}, {State("step", "int64", {})}));
  for (const BallastTensor& tensor : BallastTensors(layout.ballast_bytes)) {
    tensors.push_back(BallastTensorText(layout.zero, tensor));
  }
  return absl::StrFormat(
      "{\"holdfast_layout\":1,\"mesh\":%s,\"zero\":{\"stage\":%d,\"axis\":\"dp\"},\"packs\":%s,"
      "\"tensors\":%s}",
      MeshText(layout.mesh), static_cast<int>(layout.zero), Packs(layout), List(tensors));
}

}  // namespace tiny_lm
