// Which parameters the model has, and the rules by which each may be cut. Of the whole model: what
// of it is on a rank is partition.h.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_PARAMETERS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_PARAMETERS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "examples/tiny_lm/corpus.h"

namespace tiny_lm {

// width = heads * a multiple of kBlock.
struct ModelConfig {
  size_t context = 32;  // tokens of a sample
  size_t width = 32;
  size_t heads = 4;
  size_t layers = 2;
  size_t hidden = 128;  // of the MLP, a multiple of kBlock
  size_t vocabulary = kVocabularySize;
  bool tied = false;  // the head is the token embedding

  size_t head_size() const { return width / heads; }
};

// Tensor parallelism cuts `dimension` by rule "ceil" in grains of `grain` elements.
struct TensorCut {
  size_t dimension = 0;
  size_t grain = 1;
  // Ranks keep room for as much as the first one has: the vocabulary's padding.
  bool padded = false;
};

// Where pipeline parallelism puts a parameter.
struct Home {
  std::optional<size_t> layer;  // with this layer
  bool first_stage = false;     // with the embedding
  bool last_stage = false;      // with the head
};

struct Parameter {
  std::string name;
  std::vector<size_t> shape;
  Home home;
  std::optional<TensorCut> cut;  // none: replicated over tp
  // At the start: `start` plus random values of this deviation.
  float start = 0;
  float deviation = 0;
  size_t offset = 0;  // elements, in the whole model's order
  size_t count = 0;
};

class ParameterTable {
 public:
  explicit ParameterTable(const ModelConfig& config);
  const std::vector<Parameter>& parameters() const { return parameters_; }
  size_t element_count() const { return element_count_; }
  // The first value of an element of a parameter: a function of seed and its index in the whole
  // model, so that every rank can make its own part.
  static float StartValue(uint64_t seed, const Parameter& parameter, size_t index_in_parameter);

 private:
  void Add(Parameter parameter);
  void AddLayer(const ModelConfig& config, size_t layer);
  std::vector<Parameter> parameters_;
  size_t element_count_ = 0;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_PARAMETERS_H_
