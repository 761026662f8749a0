#include "converter/state_names.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "converter/decimal.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kGroups = "param_groups";
constexpr std::string_view kState = "state";
constexpr std::string_view kParam = "param";
constexpr std::string_view kOther = "other";

// What a dictionary of parameters is called by those who hold it.
constexpr std::string_view kModelWords[] = {"model",       "module",           "state_dict",
                                            "model_state", "model_state_dict", "ema_model"};

bool IsModelWord(std::string_view word) {
  return std::ranges::find(kModelWords, word) != std::end(kModelWords);
}

// "optim", "optimizer", "optimizers", "optimizer_0", "optimizer_states", "AdamOptimizer" ...
bool IsOptimizerWord(std::string_view word) {
  return word.find("optim") != std::string_view::npos ||
         word.find("Optim") != std::string_view::npos;
}

// The last part of a dotted text.
std::string_view LastPart(std::string_view text) {
  const size_t dot = text.rfind('.');
  return dot == std::string_view::npos ? text : text.substr(dot + 1);
}

// The place in `key` at which the whole part `part` begins, from `from` on; npos if there is none.
size_t FindPart(std::string_view key, std::string_view part, size_t from) {
  for (size_t at = key.find(part, from); at != std::string_view::npos;
       at = key.find(part, at + 1)) {
    const size_t end = at + part.size();
    if ((at == 0 || key[at - 1] == '.') && (end == key.size() || key[end] == '.')) return at;
  }
  return std::string_view::npos;
}

// Whether a seam between parts of the path is at this place of the key.
bool IsSeam(const StateKey& key, size_t at) {
  size_t seam = 0;
  for (size_t i = 0; i + 1 < key.path.size(); ++i) {
    seam += key.path[i].size();
    if (seam == at) return true;
    if (seam++ > at) return false;
  }
  return false;
}

class Namer {
 public:
  Namer(std::span<const StateKey> tensors, std::span<const StateKey> others) : tensors_(tensors) {
    for (const StateKey& key : tensors) FindOptimizer(key);
    for (const StateKey& key : others) FindOptimizer(key);
  }

  std::vector<StateName> Name() {
    std::vector<StateName> names(tensors_.size());
    std::vector<bool> done(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i)
      done[i] = NameOptimizerState(tensors_[i], names[i]);
    FindModels(done);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!done[i]) NameOther(tensors_[i], names[i]);
    }
    KeepApart(names);
    return names;
  }

 private:
  // "app.optim.param_groups.0.lr": "app.optim." is an optimizer.
  void FindOptimizer(const StateKey& key) {
    const size_t at = FindPart(key.key, kGroups, 0);
    if (at != std::string_view::npos) optimizers_.insert(key.key.substr(0, at));
  }

  bool NameOptimizerState(const StateKey& key, StateName& named) {
    const std::string_view text = key.key;
    for (size_t at = FindPart(text, kState, 0); at != std::string_view::npos;
         at = FindPart(text, kState, at + 1)) {
      const size_t begin = at + kState.size() + 1;  // of the parameter
      if (begin >= text.size()) return false;
      const std::string before(text.substr(0, at));
      const bool is_optimizer =
          optimizers_.contains(before) ||
          (!before.empty() && IsOptimizerWord(LastPart(text.substr(0, at - 1))));
      if (!is_optimizer) continue;
      // Where the parameter's name ends: at a seam if the path has one, else at the last dot.
      size_t end = std::string_view::npos;
      if (IsSeam(key, begin - 1)) {
        for (size_t dot = text.find('.', begin); dot != std::string_view::npos;
             dot = text.find('.', dot + 1)) {
          if (IsSeam(key, dot)) {
            end = dot;
            break;
          }
        }
      } else {
        end = text.rfind('.');
      }
      if (end == std::string_view::npos || end <= begin || end + 1 >= text.size()) return false;
      const std::string_view parameter = text.substr(begin, end - begin);
      named.state = text.substr(end + 1);
      named.optimizer = text.substr(0, begin - 1);
      if (const std::optional<uint64_t> number = ParseDecimal(parameter); number.has_value()) {
        named.parameter_number = number;
        named.name = text.substr(0, end);
      } else {
        named.name = parameter;
        parameters_.insert(named.name);
      }
      return true;
    }
    return false;
  }

  // What holds a key, with its dot: known by the path's last seam, else by where a name that the
  // optimizer knows begins.
  std::string_view HolderOf(const StateKey& key) const {
    const std::string_view text = key.key;
    if (!key.path.empty()) return text.substr(0, text.size() - key.path.back().size());
    if (parameters_.contains(key.key)) return "";
    for (size_t dot = text.find('.'); dot != std::string_view::npos;
         dot = text.find('.', dot + 1)) {
      if (parameters_.contains(std::string(text.substr(dot + 1)))) return text.substr(0, dot + 1);
    }
    return "";
  }

  void FindModels(const std::vector<bool>& done) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (done[i]) continue;
      const std::string_view holder = HolderOf(tensors_[i]);
      const std::string name = tensors_[i].key.substr(holder.size());
      if (parameters_.contains(name) ||
          (!holder.empty() && IsModelWord(LastPart(holder.substr(0, holder.size() - 1))))) {
        models_.insert(std::string(holder));
      }
    }
  }

  void NameOther(const StateKey& key, StateName& named) const {
    // Without a path a buffer's holder cannot be seen in its own key, but its model is known.
    std::string_view holder = HolderOf(key);
    if (key.path.empty() && holder.empty()) {
      for (const std::string& model : models_) {
        if (key.key.starts_with(model) && model.size() > holder.size()) holder = model;
      }
    }
    if (models_.contains(std::string(holder)) && holder.size() < key.key.size()) {
      named.name = key.key.substr(holder.size());
      named.state = kParam;
    } else {
      named.name = key.key;
      named.state = kOther;
    }
  }

  // Two models with a parameter of one name, two optimizers of the same parameters: all that such a
  // dictionary holds keeps its whole key, so that no tensor stands for another.
  void KeepApart(std::vector<StateName>& names) const {
    std::unordered_set<std::string> apart;
    for (bool changed = true; changed;) {
      changed = false;
      std::unordered_map<std::string, size_t> first;
      for (size_t i = 0; i < names.size(); ++i) {
        const auto [other, added] = first.try_emplace(names[i].name + '\0' + names[i].state, i);
        if (added) continue;
        changed |= apart.insert(DictionaryOf(names[i], tensors_[i])).second;
        changed |= apart.insert(DictionaryOf(names[other->second], tensors_[other->second])).second;
      }
      for (size_t i = 0; changed && i < names.size(); ++i) {
        if (!apart.contains(DictionaryOf(names[i], tensors_[i]))) continue;
        const std::string& key = tensors_[i].key;
        names[i].name = names[i].optimizer.empty()
                            ? key
                            : key.substr(0, key.size() - names[i].state.size() - 1);
      }
    }
  }

  std::string DictionaryOf(const StateName& named, const StateKey& key) const {
    return named.optimizer.empty() ? std::string(HolderOf(key)) : named.optimizer;
  }

  const std::span<const StateKey> tensors_;
  std::unordered_set<std::string> optimizers_;  // what stands before "param_groups", with its dot
  std::unordered_set<std::string> parameters_;  // that optimizers name
  std::unordered_set<std::string> models_;      // what stands before a parameter's name
};

}  // namespace

std::vector<StateName> NameStates(std::span<const StateKey> tensors,
                                  std::span<const StateKey> others) {
  return Namer(tensors, others).Name();
}

}  // namespace holdfast::converter
