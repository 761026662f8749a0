// What a key of a state dictionary means: of which tensor it is which state. Frameworks nest
// dictionaries and join their keys with dots ("app.optim.state.emb.weight.exp_avg"); the rules here
// are those by which PyTorch's optimizers and the tools around them build such dictionaries, not a
// list of prefixes:
//
//   An optimizer's dictionary has `state` and, beside it, `param_groups`. Below `state` stands the
//   parameter (a name, or the number of an unnamed one), below it the state's name. Flattened ones
//   (flatten_optimizer_state_dict) have all three in one key.
//   A model's dictionary is one level whose keys are the parameters' names, which have dots of
//   their own. It is known by what holds it ("model", "state_dict", ...) or by the optimizer,
//   which names the same parameters.
//   Everything else keeps its whole key as its name.
#ifndef HOLDFAST_CONVERTER_STATE_NAMES_H_
#define HOLDFAST_CONVERTER_STATE_NAMES_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace holdfast::converter {

struct StateKey {
  std::string key = {};                // the parts, joined by dots
  std::vector<std::string> path = {};  // the parts; empty: not known, then `key` has no seams
};

struct StateName {
  std::string name;
  std::string state;  // "param" (buffers too: the key does not tell), "other", or the optimizer's
  // Of an optimizer state whose parameter is a number: that number, and the key before it
  // ("optim.state"). `name` is then the key without the state's name, until somebody knows better.
  std::optional<uint64_t> parameter_number;
  std::string optimizer;
};

// Of each of `tensors`, in order; (name, state) pairs are distinct if the keys are. `others` are
// the keys beside them that are no tensors: they show where optimizers are.
std::vector<StateName> NameStates(std::span<const StateKey> tensors,
                                  std::span<const StateKey> others);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_STATE_NAMES_H_
