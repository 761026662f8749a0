#include "preflight/odd.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace holdfast::preflight {
namespace {

// Disks differ in what they cache, so only gross differences count. A round trip that is longer by
// less than the differences below is a matter of hops, not of faults; a lost packet costs at least
// 200 ms (Linux: TCP_RTO_MIN).
constexpr MetricRule kNodeRules[kNodeMetricCount] = {
    {"memory", "memory", Unit::kBytesPerSecond, 1.25, 0},
    {"cpu", "CPU", Unit::kStepsPerSecond, 1.25, 0},
    {"slowest_core", "slowest core", Unit::kStepsPerSecond, 1.25, 0},
    {"disk_write", "disk write", Unit::kBytesPerSecond, 2, 0},
    {"disk_sync", "disk sync", Unit::kSeconds, 4, 1e-3},
    {"disk_read", "disk read", Unit::kBytesPerSecond, 2, 0},
};
constexpr MetricRule kPairRules[kPairMetricCount] = {
    {"one_way", "one way", Unit::kBytesPerSecond, 1.25, 0},
    {"both_ways", "both ways at once", Unit::kBytesPerSecond, 1.25, 0},
    {"round_trip", "round trip", Unit::kSeconds, 2, 50e-6},
    {"round_trip_p99", "round trip, 99th percentile", Unit::kSeconds, 5, 2e-3},
};

double Median(std::vector<double> values) {
  CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// Greater is worse; a factor is a distance.
double Badness(Unit unit, double value) {
  const double logarithm = std::log(std::max(value, 1e-12));
  return unit == Unit::kSeconds ? logarithm : -logarithm;
}

double ValueOf(Unit unit, double badness) {
  return std::exp(unit == Unit::kSeconds ? badness : -badness);
}

// Says of single values whether they are bad beside those that it was made from.
class Comparison {
 public:
  Comparison(const MetricRule& rule, double slow_ratio, const std::vector<double>& badness_values)
      : rule_(rule),
        ratio_(std::max(rule.ratio, slow_ratio)),
        difference_min_(rule.difference_min * std::max(1.0, slow_ratio / kSlowRatio)),
        median_(Median(badness_values)) {
    std::vector<double> deviations;
    for (const double badness : badness_values) deviations.push_back(std::abs(badness - median_));
    deviation_ = std::max(1.4826 * Median(deviations), kDeviationMin);
  }

  bool IsBad(double value) const {
    return DiffersEnough(value) && Badness(rule_.unit, value) - median_ >= kDeviations * deviation_;
  }
  // Without regard to deviations: of two values there are none.
  bool DiffersEnough(double value) const {
    return Badness(rule_.unit, value) - median_ >= std::log(ratio_) &&
           std::abs(value - ValueOf(rule_.unit, median_)) >= difference_min_;
  }
  std::string ReferenceText() const { return ValueText(rule_.unit, ValueOf(rule_.unit, median_)); }

 private:
  const MetricRule& rule_;
  const double ratio_;
  const double difference_min_;
  const double median_;
  double deviation_ = 0;
};

// Collects evidence by subject.
class Cases {
 public:
  void AddNode(uint32_t rank, Evidence evidence) { nodes_[rank].push_back(std::move(evidence)); }
  // Evidence from pairs: what else is found in this node's pairs is then explained by the node.
  void AddNodeByPairs(uint32_t rank, Evidence evidence) {
    named_by_pairs_.insert(rank);
    AddNode(rank, std::move(evidence));
  }
  void AddPair(uint32_t a, uint32_t b, Evidence evidence) {
    pairs_[{std::min(a, b), std::max(a, b)}].push_back(std::move(evidence));
  }
  void AddUndecided(std::set<uint32_t> ranks, Evidence evidence) {
    undecided_[std::move(ranks)].push_back(std::move(evidence));
  }

  std::vector<Finding> Finish() {
    for (auto undecided = undecided_.begin(); undecided != undecided_.end();) {
      undecided = Fold(undecided->first, undecided->second) ? undecided_.erase(undecided)
                                                            : std::next(undecided);
    }
    for (auto pair = pairs_.begin(); pair != pairs_.end();) {
      pair = Fold({pair->first.first, pair->first.second}, pair->second) ? pairs_.erase(pair)
                                                                         : std::next(pair);
    }
    std::vector<Finding> findings;
    for (auto& [rank, evidence] : nodes_) {
      findings.push_back({Finding::Subject::kNode, {rank}, std::move(evidence)});
    }
    for (auto& [pair, evidence] : pairs_) {
      findings.push_back({Finding::Subject::kPair, {pair.first, pair.second}, std::move(evidence)});
    }
    for (auto& [ranks, evidence] : undecided_) {
      findings.push_back({Finding::Subject::kUndecided,
                          std::vector<uint32_t>(ranks.begin(), ranks.end()), std::move(evidence)});
    }
    return findings;
  }

 private:
  bool Fold(const std::set<uint32_t>& ranks, const std::vector<Evidence>& evidence) {
    bool folded = false;
    for (const uint32_t rank : ranks) {
      if (!named_by_pairs_.contains(rank)) continue;
      nodes_[rank].insert(nodes_[rank].end(), evidence.begin(), evidence.end());
      folded = true;
    }
    return folded;
  }

  std::map<uint32_t, std::vector<Evidence>> nodes_;
  std::set<uint32_t> named_by_pairs_;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<Evidence>> pairs_;
  std::map<std::set<uint32_t>, std::vector<Evidence>> undecided_;
};

void CompareNodes(const JobMeasurements& job, NodeMetric metric, double slow_ratio, Cases& cases) {
  const MetricRule& rule = RuleOf(metric);
  const auto index = static_cast<size_t>(metric);
  std::vector<uint32_t> ranks;
  std::vector<double> badness;
  for (uint32_t rank = 0; rank < job.nodes.size(); ++rank) {
    const std::optional<double>& value = job.nodes[rank].values[index];
    if (!value.has_value()) continue;
    ranks.push_back(rank);
    badness.push_back(Badness(rule.unit, *value));
  }
  if (ranks.size() < 2) return;
  const auto value_of = [&](uint32_t rank) { return *job.nodes[rank].values[index]; };
  if (ranks.size() == 2) {
    const size_t worse = badness[0] > badness[1] ? 0 : 1;
    const Comparison with_other(rule, slow_ratio, {badness[1 - worse]});
    if (with_other.DiffersEnough(value_of(ranks[worse]))) {
      cases.AddUndecided(
          {ranks[0], ranks[1]},
          {rule.name, absl::StrFormat("%s %s on rank %d, %s on rank %d", rule.text,
                                      ValueText(rule.unit, value_of(ranks[0])), ranks[0],
                                      ValueText(rule.unit, value_of(ranks[1])), ranks[1])});
    }
    return;
  }
  const Comparison comparison(rule, slow_ratio, badness);
  for (const uint32_t rank : ranks) {
    if (!comparison.IsBad(value_of(rank))) continue;
    cases.AddNode(rank, {rule.name, absl::StrFormat("%s %s, the job's median %s", rule.text,
                                                    ValueText(rule.unit, value_of(rank)),
                                                    comparison.ReferenceText())});
  }
}

// A measurement between two ends. For what has a direction a node is two ends, its sending and its
// receiving one.
struct Edge {
  size_t from_vertex = 0;
  size_t to_vertex = 0;
  uint32_t from_rank = 0;
  uint32_t to_rank = 0;
  double value = 0;
};

bool HasDirection(PairMetric metric) {
  return metric == PairMetric::kOneWay || metric == PairMetric::kBothWays;
}

std::vector<Edge> EdgesOf(const JobMeasurements& job, PairMetric metric) {
  const size_t node_count = job.nodes.size();
  std::vector<Edge> edges;
  for (const PairMeasurements& pair : job.pairs) {
    if (!pair.error.empty()) continue;
    if (HasDirection(metric)) {
      const std::array<double, 2>& values =
          metric == PairMetric::kOneWay ? pair.one_way : pair.both_ways;
      edges.push_back({pair.a, node_count + pair.b, pair.a, pair.b, values[0]});
      edges.push_back({pair.b, node_count + pair.a, pair.b, pair.a, values[1]});
    } else {
      edges.push_back({pair.a, pair.b, pair.a, pair.b,
                       metric == PairMetric::kRoundTrip ? pair.round_trip_seconds
                                                        : pair.round_trip_p99_seconds});
    }
  }
  return edges;
}

std::string EdgeText(const MetricRule& rule, PairMetric metric, const Edge& edge) {
  return absl::StrFormat("%s from rank %d %s rank %d", ValueText(rule.unit, edge.value),
                         edge.from_rank, HasDirection(metric) ? "to" : "to and from", edge.to_rank);
}

std::string EdgesText(const MetricRule& rule, PairMetric metric, const std::vector<Edge>& edges,
                      const std::vector<size_t>& chosen) {
  return absl::StrJoin(chosen, ", ", [&](std::string* text, size_t edge) {
    text->append(EdgeText(rule, metric, edges[edge]));
  });
}

std::vector<std::pair<size_t, size_t>> VerticesOf(const std::vector<Edge>& edges) {
  std::vector<std::pair<size_t, size_t>> vertices;
  for (const Edge& edge : edges) vertices.emplace_back(edge.from_vertex, edge.to_vertex);
  return vertices;
}

// Two nodes: the two directions are all that can be compared.
void CompareDirections(const MetricRule& rule, const std::vector<Edge>& edges, double slow_ratio,
                       Cases& cases) {
  if (edges.size() != 2) return;
  const size_t worse =
      Badness(rule.unit, edges[0].value) > Badness(rule.unit, edges[1].value) ? 0 : 1;
  const Comparison with_other(rule, slow_ratio, {Badness(rule.unit, edges[1 - worse].value)});
  if (!with_other.DiffersEnough(edges[worse].value)) return;
  cases.AddUndecided(
      {0, 1}, {rule.name, absl::StrFormat("%s: %s, %s", rule.text,
                                          EdgeText(rule, PairMetric::kOneWay, edges[worse]),
                                          EdgeText(rule, PairMetric::kOneWay, edges[1 - worse]))});
}

void ComparePairs(const JobMeasurements& job, PairMetric metric, double slow_ratio, Cases& cases) {
  const MetricRule& rule = RuleOf(metric);
  const size_t node_count = job.nodes.size();
  const std::vector<Edge> edges = EdgesOf(job, metric);
  if (edges.empty()) return;
  if (node_count == 2) return CompareDirections(rule, edges, slow_ratio, cases);

  std::map<size_t, double> best;  // by vertex
  for (const Edge& edge : edges) {
    const double badness = Badness(rule.unit, edge.value);
    for (const size_t vertex : {edge.from_vertex, edge.to_vertex}) {
      const auto [known, is_new] = best.emplace(vertex, badness);
      if (!is_new) known->second = std::min(known->second, badness);
    }
  }
  std::vector<double> references;
  for (const auto& [vertex, badness] : best) references.push_back(badness);
  const Comparison comparison(rule, slow_ratio, references);

  std::vector<bool> bad;
  for (const Edge& edge : edges) bad.push_back(comparison.IsBad(edge.value));
  const Explanation explanation = Explain(2 * node_count, VerticesOf(edges), bad);
  const auto evidence = [&](const std::vector<size_t>& chosen) {
    return Evidence{rule.name, absl::StrFormat("%s: %s; the job's median %s", rule.text,
                                               EdgesText(rule, metric, edges, chosen),
                                               comparison.ReferenceText())};
  };
  for (const size_t vertex : explanation.vertices) {
    std::vector<size_t> chosen;
    for (size_t edge = 0; edge < edges.size(); ++edge) {
      if (edges[edge].from_vertex == vertex || edges[edge].to_vertex == vertex) {
        chosen.push_back(edge);
      }
    }
    cases.AddNodeByPairs(static_cast<uint32_t>(vertex % node_count), evidence(chosen));
  }
  for (const size_t edge : explanation.edges) {
    cases.AddPair(edges[edge].from_rank, edges[edge].to_rank, evidence({edge}));
  }
  for (const Explanation::Undecided& undecided : explanation.undecided) {
    std::set<uint32_t> ranks;
    for (const size_t vertex : undecided.vertices) {
      ranks.insert(static_cast<uint32_t>(vertex % node_count));
    }
    cases.AddUndecided(std::move(ranks), evidence(undecided.edges));
  }
}

// Pairs that could not be measured at all.
void CompareConnections(const JobMeasurements& job, Cases& cases) {
  std::vector<std::pair<size_t, size_t>> edges;
  std::vector<bool> bad;
  for (const PairMeasurements& pair : job.pairs) {
    edges.emplace_back(pair.a, pair.b);
    bad.push_back(!pair.error.empty());
  }
  const auto evidence = [&](const std::vector<size_t>& chosen) {
    return Evidence{"connection", absl::StrJoin(chosen, "; ", [&](std::string* text, size_t edge) {
                      const PairMeasurements& pair = job.pairs[edge];
                      absl::StrAppendFormat(text, "ranks %d and %d could not be measured: %s",
                                            pair.a, pair.b, pair.error);
                    })};
  };
  const Explanation explanation = Explain(job.nodes.size(), edges, bad);
  for (const size_t vertex : explanation.vertices) {
    std::vector<size_t> chosen;
    for (size_t edge = 0; edge < edges.size(); ++edge) {
      if (edges[edge].first == vertex || edges[edge].second == vertex) chosen.push_back(edge);
    }
    cases.AddNodeByPairs(static_cast<uint32_t>(vertex), evidence(chosen));
  }
  for (const size_t edge : explanation.edges) {
    if (job.nodes.size() == 2) {
      cases.AddUndecided({0, 1}, evidence({edge}));
    } else {
      cases.AddPair(job.pairs[edge].a, job.pairs[edge].b, evidence({edge}));
    }
  }
  for (const Explanation::Undecided& undecided : explanation.undecided) {
    std::set<uint32_t> ranks;
    for (const size_t vertex : undecided.vertices) ranks.insert(static_cast<uint32_t>(vertex));
    cases.AddUndecided(std::move(ranks), evidence(undecided.edges));
  }
}

// `how_wrong`: beyond what the reading of the clocks over a network can explain.
void CompareClocks(const JobMeasurements& job, Cases& cases) {
  std::vector<double> offsets;
  for (uint32_t rank = 0; rank < job.nodes.size(); ++rank) {
    const NodeMeasurements& node = job.nodes[rank];
    offsets.push_back(node.clock_offset_seconds);
    if (std::abs(node.clock_step_seconds) > kClockStepMaxSeconds) {
      cases.AddNode(rank, {"clock_step", absl::StrFormat("its wall clock was set by %+.3f s "
                                                         "while preflight ran",
                                                         node.clock_step_seconds)});
    }
  }
  if (job.nodes.size() < 2) return;
  const double median = Median(offsets);
  const auto is_wrong = [&](const NodeMeasurements& node, double reference) {
    return std::abs(node.clock_offset_seconds - reference) - node.clock_offset_error_seconds >
           kClockOffsetMaxSeconds;
  };
  if (job.nodes.size() == 2) {
    if (is_wrong(job.nodes[1], offsets[0])) {
      cases.AddUndecided({0, 1}, {"clock_offset", absl::StrFormat("their wall clocks are %.3f s "
                                                                  "apart",
                                                                  offsets[1] - offsets[0])});
    }
    return;
  }
  for (uint32_t rank = 0; rank < job.nodes.size(); ++rank) {
    if (!is_wrong(job.nodes[rank], median)) continue;
    cases.AddNode(rank, {"clock_offset", absl::StrFormat("its wall clock is %+.3f s from the "
                                                         "job's median",
                                                         offsets[rank] - median)});
  }
}

}  // namespace

const MetricRule& RuleOf(NodeMetric metric) { return kNodeRules[static_cast<size_t>(metric)]; }
const MetricRule& RuleOf(PairMetric metric) { return kPairRules[static_cast<size_t>(metric)]; }

std::string ValueText(Unit unit, double value) {
  switch (unit) {
    case Unit::kBytesPerSecond:
      return value >= 1e8 ? absl::StrFormat("%.2f GB/s", value / 1e9)
                          : absl::StrFormat("%.2f MB/s", value / 1e6);
    case Unit::kStepsPerSecond:
      return absl::StrFormat("%.0f M/s", value / 1e6);
    case Unit::kSeconds:
      return value >= 1e-3 ? absl::StrFormat("%.2f ms", value * 1e3)
                           : absl::StrFormat("%.1f us", value * 1e6);
  }
  return "";
}

const char* Name(Finding::Subject subject) {
  switch (subject) {
    case Finding::Subject::kNode:
      return "node";
    case Finding::Subject::kPair:
      return "pair";
    case Finding::Subject::kUndecided:
      return "undecided";
  }
  return "";
}

std::string Sentence(const Finding& finding, const JobMeasurements& job) {
  const std::string who =
      absl::StrJoin(finding.ranks, " and ", [&](std::string* text, uint32_t rank) {
        absl::StrAppendFormat(text, "rank %d (%s)", rank, job.nodes[rank].host);
      });
  const std::string why = absl::StrJoin(
      finding.evidence, "; ",
      [](std::string* text, const Evidence& evidence) { text->append(evidence.text); });
  switch (finding.subject) {
    case Finding::Subject::kNode:
      return absl::StrCat(who, " is odd: ", why);
    case Finding::Subject::kPair:
      return absl::StrCat("between ", who, " something is odd: ", why);
    case Finding::Subject::kUndecided:
      return absl::StrCat("at least one of ", who, " is odd, which one cannot be told",
                          job.nodes.size() == 2 ? " with two nodes" : "", ": ", why);
  }
  return "";
}

std::vector<Finding> FindOddOnes(const JobMeasurements& job, double slow_ratio) {
  for (const PairMeasurements& pair : job.pairs) {
    CHECK(pair.a < pair.b && pair.b < job.nodes.size());
  }
  Cases cases;
  for (size_t metric = 0; metric < kNodeMetricCount; ++metric) {
    CompareNodes(job, static_cast<NodeMetric>(metric), slow_ratio, cases);
  }
  for (uint32_t rank = 0; rank < job.nodes.size(); ++rank) {
    if (job.nodes[rank].disk_error.empty()) continue;
    cases.AddNode(rank, {"disk", absl::StrCat("its disk could not be measured: ",
                                              job.nodes[rank].disk_error)});
  }
  CompareClocks(job, cases);
  CompareConnections(job, cases);
  for (size_t metric = 0; metric < kPairMetricCount; ++metric) {
    ComparePairs(job, static_cast<PairMetric>(metric), slow_ratio, cases);
  }
  return cases.Finish();
}

Explanation Explain(size_t vertex_count, const std::vector<std::pair<size_t, size_t>>& edges,
                    const std::vector<bool>& bad) {
  CHECK(edges.size() == bad.size());
  std::vector<std::vector<size_t>> bad_edges_of(vertex_count);
  for (size_t edge = 0; edge < edges.size(); ++edge) {
    if (!bad[edge]) continue;
    bad_edges_of[edges[edge].first].push_back(edge);
    bad_edges_of[edges[edge].second].push_back(edge);
  }
  std::vector<bool> seen(edges.size(), false);
  // Follows bad edges from `vertex` to the end of the path, or around the cycle.
  struct Walk {
    std::vector<size_t> vertices;  // one more than edges; in a cycle the first is also the last
    std::vector<size_t> edges;
  };
  const auto walk_from = [&](size_t vertex) {
    Walk walk{{vertex}, {}};
    for (bool moved = true; moved;) {
      moved = false;
      for (const size_t edge : bad_edges_of[vertex]) {
        if (seen[edge]) continue;
        seen[edge] = true;
        vertex = edges[edge].first == vertex ? edges[edge].second : edges[edge].first;
        walk.vertices.push_back(vertex);
        walk.edges.push_back(edge);
        moved = true;
        break;
      }
    }
    return walk;
  };

  Explanation explanation;
  for (size_t vertex = 0; vertex < vertex_count; ++vertex) {
    CHECK(bad_edges_of[vertex].size() <= 2);
    if (bad_edges_of[vertex].size() != 1 || seen[bad_edges_of[vertex][0]]) continue;
    const Walk path = walk_from(vertex);
    const size_t length = path.edges.size();
    if (length == 1) {
      explanation.edges.push_back(path.edges[0]);
    } else if (length % 2 == 0) {
      // Every second vertex, beginning with the second: any other choice needs one cause more.
      for (size_t at = 1; at < length; at += 2) explanation.vertices.push_back(path.vertices[at]);
    } else {
      explanation.undecided.push_back(
          {{path.vertices.begin() + 1, path.vertices.end() - 1}, path.edges});
    }
  }
  // What is left are cycles, of which any two (or more) choices are equally small.
  for (size_t vertex = 0; vertex < vertex_count; ++vertex) {
    if (bad_edges_of[vertex].empty() || seen[bad_edges_of[vertex][0]]) continue;
    const Walk cycle = walk_from(vertex);
    explanation.undecided.push_back(
        {{cycle.vertices.begin() + 1, cycle.vertices.end()}, cycle.edges});
  }
  return explanation;
}

}  // namespace holdfast::preflight
