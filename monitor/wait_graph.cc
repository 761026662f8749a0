#include "monitor/wait_graph.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace holdfast::monitor {
namespace {

constexpr uint32_t kUnseen = UINT32_MAX;

// Edges by one of their ends, as offsets into one array.
struct Adjacency {
  std::vector<uint32_t> begin;
  std::vector<uint32_t> other;
};

template <typename From, typename To>
Adjacency Group(uint32_t node_count, const std::vector<WaitEdge>& edges, From from, To to) {
  Adjacency result;
  result.begin.assign(node_count + 1, 0);
  for (const WaitEdge& edge : edges) ++result.begin[from(edge) + 1];
  for (uint32_t i = 0; i < node_count; ++i) result.begin[i + 1] += result.begin[i];
  result.other.resize(edges.size());
  std::vector<uint32_t> next(result.begin.begin(), result.begin.end() - 1);
  for (const WaitEdge& edge : edges) result.other[next[from(edge)]++] = to(edge);
  return result;
}

class Components {
 public:
  explicit Components(const Adjacency& out)
      : out_(out),
        order_(out.begin.size() - 1, kUnseen),
        low_(out.begin.size() - 1),
        component_(out.begin.size() - 1, kUnseen),
        next_edge_(out.begin.begin(), out.begin.end() - 1) {
    for (uint32_t node = 0; node < order_.size(); ++node) {
      if (order_[node] == kUnseen) Visit(node);
    }
  }
  uint32_t of(uint32_t node) const { return component_[node]; }
  uint32_t count() const { return count_; }

 private:
  void Visit(uint32_t root) {
    Enter(root);
    while (!path_.empty()) {
      const uint32_t node = path_.back();
      if (next_edge_[node] < out_.begin[node + 1]) {
        const uint32_t target = out_.other[next_edge_[node]++];
        if (order_[target] == kUnseen) {
          Enter(target);
        } else if (component_[target] == kUnseen) {
          low_[node] = std::min(low_[node], order_[target]);
        }
        continue;
      }
      path_.pop_back();
      if (!path_.empty()) low_[path_.back()] = std::min(low_[path_.back()], low_[node]);
      if (low_[node] == order_[node]) Close(node);
    }
  }
  void Enter(uint32_t node) {
    order_[node] = low_[node] = entered_++;
    path_.push_back(node);
    open_.push_back(node);
  }
  void Close(uint32_t node) {
    uint32_t member = kUnseen;
    while (member != node) {
      member = open_.back();
      open_.pop_back();
      component_[member] = count_;
    }
    ++count_;
  }

  const Adjacency& out_;
  std::vector<uint32_t> order_;
  std::vector<uint32_t> low_;
  std::vector<uint32_t> component_;
  std::vector<uint32_t> next_edge_;
  std::vector<uint32_t> path_;
  std::vector<uint32_t> open_;
  uint32_t entered_ = 0;
  uint32_t count_ = 0;
};

uint32_t CountReaching(const Adjacency& in, uint32_t node, uint32_t counted_nodes,
                       std::vector<uint32_t>& mark) {
  uint32_t count = 0;
  std::vector<uint32_t> queue = {node};
  mark[node] = node;
  for (size_t next = 0; next < queue.size(); ++next) {
    for (uint32_t i = in.begin[queue[next]]; i < in.begin[queue[next] + 1]; ++i) {
      if (std::exchange(mark[in.other[i]], node) == node) continue;
      queue.push_back(in.other[i]);
      if (in.other[i] < counted_nodes) ++count;
    }
  }
  return count;
}

}  // namespace

WaitRoots FindWaitRoots(uint32_t node_count, uint32_t counted_nodes,
                        const std::vector<WaitEdge>& edges) {
  for (const WaitEdge& edge : edges) {
    CHECK(edge.waiter < node_count && edge.awaited < node_count && edge.waiter != edge.awaited);
  }
  const auto waiter = [](const WaitEdge& edge) { return edge.waiter; };
  const auto awaited = [](const WaitEdge& edge) { return edge.awaited; };
  const Adjacency out = Group(node_count, edges, waiter, awaited);
  const Adjacency in = Group(node_count, edges, awaited, waiter);
  const Components components(out);

  std::vector<bool> left(components.count(), false);
  for (const WaitEdge& edge : edges) {
    if (components.of(edge.waiter) != components.of(edge.awaited)) {
      left[components.of(edge.waiter)] = true;
    }
  }
  std::vector<std::vector<uint32_t>> ends(components.count());
  for (uint32_t node = 0; node < node_count; ++node) {
    const bool touched =
        out.begin[node] < out.begin[node + 1] || in.begin[node] < in.begin[node + 1];
    if (touched && !left[components.of(node)]) ends[components.of(node)].push_back(node);
  }
  WaitRoots roots;
  std::vector<uint32_t> mark(node_count, kUnseen);
  for (std::vector<uint32_t>& nodes : ends) {
    if (nodes.size() == 1) {
      roots.sinks.push_back({nodes[0], CountReaching(in, nodes[0], counted_nodes, mark)});
    }
    if (nodes.size() > 1) roots.deadlocks.push_back(std::move(nodes));
  }
  std::sort(roots.sinks.begin(), roots.sinks.end(),
            [](const auto& a, const auto& b) { return a.node < b.node; });
  std::sort(roots.deadlocks.begin(), roots.deadlocks.end());
  return roots;
}

}  // namespace holdfast::monitor
