#include "checkpoint/lineage.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/check.h"

namespace holdfast {
namespace {

// Walks from the newest checkpoint to older ones.
class Walk {
 public:
  Walk(const std::vector<LineageNode>& nodes, const std::set<CheckpointId>& selected)
      : nodes_(nodes), selected_(selected) {
    for (size_t i = 0; i < nodes.size(); ++i) {
      CHECK(by_id_.emplace(nodes[i].id, i).second);
    }
  }

  // Indices of the line, newest first. `broken_at`: what is older than this and not in the line is
  // not known.
  std::vector<size_t> Line(CheckpointId newest, std::optional<CheckpointId>& broken_at) const {
    std::vector<size_t> line;
    std::optional<size_t> at = by_id_.at(newest);
    while (at.has_value()) {
      line.push_back(*at);
      const LineageNode& node = nodes_[*at];
      const bool parent_known =
          !node.damaged && (!node.parent.has_value() || *node.parent < node.id);
      // Whatever the parent: an older one of the same attempt is an ancestor.
      at = OlderOfAttempt(node.id);
      if (parent_known && node.parent.has_value()) {
        if (const std::optional<size_t> parent = Find(*node.parent);
            parent.has_value() && (!at.has_value() || nodes_[*at].id < *node.parent)) {
          at = parent;
        }
        // Of a parent that is not there, the attempt at least is known: its line goes on.
        if (!at.has_value()) at = OlderOfAttempt(*node.parent);
        if (!at.has_value()) broken_at = node.parent;
      } else if (!parent_known && !at.has_value()) {
        broken_at = node.id;
      }
    }
    return line;
  }

 private:
  std::optional<size_t> Find(CheckpointId id) const {
    const auto found = by_id_.find(id);
    if (found == by_id_.end() || !selected_.contains(id)) return std::nullopt;
    return found->second;
  }
  std::optional<size_t> OlderOfAttempt(CheckpointId id) const {
    auto found = by_id_.lower_bound(id);
    if (found == by_id_.begin()) return std::nullopt;
    --found;
    if (found->first.attempt != id.attempt) return std::nullopt;
    return Find(found->first);
  }

  const std::vector<LineageNode>& nodes_;
  const std::set<CheckpointId>& selected_;
  std::map<CheckpointId, size_t> by_id_;
};

// What HEAD leaves: as CurrentBranch says, and besides what an attempt after the HEAD has made if a
// missing or damaged manifest hides where it comes from (attempts begin on the current branch).
std::set<CheckpointId> Selected(const std::vector<LineageNode>& nodes,
                                const std::optional<Head>& head) {
  std::vector<LineageEntry> entries;
  std::map<CheckpointId, const LineageNode*> by_id;
  for (const LineageNode& node : nodes) {
    entries.push_back({node.id, node.parent});
    by_id.emplace(node.id, &node);
  }
  const std::vector<CheckpointId> branch = CurrentBranch(entries, head);
  std::set<CheckpointId> selected(branch.begin(), branch.end());
  if (!head.has_value()) return selected;

  std::set<CheckpointId> hidden;
  for (const auto& [id, node] : by_id) {  // parents come before their children
    if (selected.contains(id) || id.attempt <= head->abandons_attempts_up_to) continue;
    const std::optional<CheckpointId>& parent = node->parent;
    if (node->damaged || (parent.has_value() && (*parent >= id || !by_id.contains(*parent) ||
                                                 hidden.contains(*parent)))) {
      hidden.insert(id);
    }
  }
  selected.insert(hidden.begin(), hidden.end());
  return selected;
}

}  // namespace

Lineage FindLineage(const std::vector<LineageNode>& nodes, const std::optional<Head>& head) {
  Lineage lineage;
  lineage.branch.assign(nodes.size(), Branch::kAbandoned);
  const std::set<CheckpointId> selected = Selected(nodes, head);
  if (selected.empty()) {
    // A HEAD to a checkpoint that is not there any more is no licence to begin from nothing.
    if (head.has_value() && head->to.has_value()) lineage.outcome = Lineage::Outcome::kUnknown;
    return lineage;
  }

  std::optional<CheckpointId> broken_at;
  const Walk walk(nodes, selected);
  const std::vector<size_t> line = walk.Line(*selected.rbegin(), broken_at);
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (broken_at.has_value() && nodes[i].id < *broken_at && selected.contains(nodes[i].id)) {
      lineage.branch[i] = Branch::kUnknown;
    }
  }
  for (const size_t i : line) lineage.branch[i] = Branch::kCurrent;
  const bool unknown_left =
      std::count(lineage.branch.begin(), lineage.branch.end(), Branch::kUnknown) > 0;

  const auto newest =
      std::find_if(line.begin(), line.end(), [&](size_t i) { return !nodes[i].marked_bad; });
  if (newest == line.end()) {
    lineage.outcome = unknown_left ? Lineage::Outcome::kUnknown : Lineage::Outcome::kAllBad;
    return lineage;
  }
  lineage.newest = *newest;
  lineage.outcome = nodes[*newest].damaged ? Lineage::Outcome::kDamaged : Lineage::Outcome::kFound;
  return lineage;
}

}  // namespace holdfast
