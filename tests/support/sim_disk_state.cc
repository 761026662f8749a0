#include "tests/support/sim_disk_state.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {
namespace {

void WriteInto(std::string& file, uint64_t offset_bytes, std::string_view bytes, char stale) {
  if (bytes.empty()) return;
  if (file.size() < offset_bytes + bytes.size()) file.resize(offset_bytes + bytes.size(), stale);
  file.replace(offset_bytes, bytes.size(), bytes);
}

}  // namespace

SimDiskState::SimDiskState(uint64_t sector_bytes, char stale)
    : sector_bytes_(sector_bytes), stale_(stale) {
  CHECK(sector_bytes > 0);
  CHECK(NewDirectory() == kRoot);
  nodes_.at(kRoot).link_count = 1;
}

uint64_t SimDiskState::Find(std::string_view path) const {
  uint64_t id = kRoot;
  while (true) {
    path.remove_prefix(std::min(path.find_first_not_of('/'), path.size()));
    if (path.empty()) return id;
    const std::string_view component = path.substr(0, path.find('/'));
    path.remove_prefix(component.size());
    const Node& directory = nodes_.at(id);
    if (!directory.is_directory) return 0;
    const auto entry = directory.names.find(std::string(component));
    if (entry == directory.names.end()) return 0;
    id = entry->second;
  }
}

std::string SimDiskState::PathOf(uint64_t id) const {
  if (id == kRoot) return "/";
  for (const auto& [parent, node] : nodes_) {
    for (const auto& [name, child] : node.names) {
      if (child != id) continue;
      const std::string directory = PathOf(parent);
      return absl::StrCat(directory, directory == "/" ? "" : "/", name);
    }
  }
  return "(unlinked)";
}

uint64_t SimDiskState::NewFile() {
  const uint64_t id = next_node_++;
  nodes_[id];
  return id;
}

uint64_t SimDiskState::NewDirectory() {
  const uint64_t id = NewFile();
  nodes_.at(id).is_directory = true;
  return id;
}

void SimDiskState::AddItem(SimItem item) {
  item.sequence = next_sequence_++;
  items_.push_back(std::move(item));
}

void SimDiskState::SetName(uint64_t directory, const std::string& name, uint64_t target) {
  nodes_.at(directory).names[name] = target;
  ++nodes_.at(target).link_count;
  AddItem({.kind = SimItem::Kind::kName, .object = directory, .name = name, .target = target});
}

void SimDiskState::RemoveName(uint64_t directory, const std::string& name) {
  const auto entry = nodes_.at(directory).names.find(name);
  CHECK(entry != nodes_.at(directory).names.end());
  --nodes_.at(entry->second).link_count;
  nodes_.at(directory).names.erase(entry);
  AddItem({.kind = SimItem::Kind::kName, .object = directory, .name = name, .target = 0});
}

void SimDiskState::Extend(uint64_t file, uint64_t size_bytes) {
  std::string& visible = nodes_.at(file).visible;
  visible.resize(std::max<size_t>(visible.size(), size_bytes), stale_);
  AddItem({.kind = SimItem::Kind::kSize, .object = file, .size_bytes = size_bytes});
}

void SimDiskState::Write(uint64_t file, uint64_t offset_bytes, std::string_view bytes) {
  WriteInto(nodes_.at(file).visible, offset_bytes, bytes, stale_);
  WriteInFlight(file, offset_bytes, bytes);
}

void SimDiskState::WriteInFlight(uint64_t file, uint64_t offset_bytes, std::string_view bytes) {
  if (bytes.empty()) return;
  AddItem({.kind = SimItem::Kind::kWrite,
           .object = file,
           .offset_bytes = offset_bytes,
           .bytes = std::string(bytes)});
}

void SimDiskState::Sync(uint64_t object, uint64_t sequence) {
  for (const SimItem& item : items_) {
    if (item.object == object && item.sequence <= sequence) Apply(item, UnitsOf(item));
  }
  LoseUnsynced(object, sequence);
}

void SimDiskState::LoseUnsynced(uint64_t object, uint64_t sequence) {
  std::erase_if(items_, [&](const SimItem& item) {
    return item.object == object && item.sequence <= sequence;
  });
}

uint64_t SimDiskState::UsedBytes() const {
  uint64_t used = 0;
  for (const auto& [id, node] : nodes_) {
    if (node.link_count == 0 && node.open_count == 0) continue;
    used += (node.visible.size() + sector_bytes_ - 1) / sector_bytes_ * sector_bytes_;
  }
  return used;
}

uint32_t SimDiskState::UnitsOf(const SimItem& item) const {
  if (item.kind != SimItem::Kind::kWrite) return 1;
  const uint64_t first = item.offset_bytes / sector_bytes_;
  const uint64_t last = (item.offset_bytes + item.bytes.size() - 1) / sector_bytes_;
  return static_cast<uint32_t>(last - first + 1);
}

void SimDiskState::Apply(const SimItem& item, uint32_t kept_units) {
  if (kept_units == 0) return;
  Node& node = nodes_.at(item.object);
  switch (item.kind) {
    case SimItem::Kind::kSize:
      node.durable.resize(std::max<size_t>(node.durable.size(), item.size_bytes), stale_);
      break;
    case SimItem::Kind::kWrite: {
      const uint64_t end_of_kept =
          (item.offset_bytes / sector_bytes_ + kept_units) * sector_bytes_ - item.offset_bytes;
      WriteInto(node.durable, item.offset_bytes,
                std::string_view(item.bytes).substr(0, end_of_kept), stale_);
      break;
    }
    case SimItem::Kind::kName:
      if (item.target == 0) {
        node.durable_names.erase(item.name);
      } else {
        node.durable_names[item.name] = item.target;
      }
      break;
  }
}

std::string SimDiskState::Describe(size_t index) const {
  const SimItem& item = items_[index];
  const std::string path = PathOf(item.object);
  switch (item.kind) {
    case SimItem::Kind::kSize:
      return absl::StrFormat("#%d size %s = %d", index, path, item.size_bytes);
    case SimItem::Kind::kWrite:
      return absl::StrFormat("#%d write %s [%d, %d)", index, path, item.offset_bytes,
                             item.offset_bytes + item.bytes.size());
    case SimItem::Kind::kName:
      return absl::StrFormat("#%d %s %s in %s", index, item.target == 0 ? "unlink" : "name",
                             item.name, path);
  }
  CHECK(false);
}

std::vector<std::string> SimDiskState::DescribeItems() const {
  std::vector<std::string> texts;
  for (size_t i = 0; i < items_.size(); ++i) texts.push_back(Describe(i));
  return texts;
}

// Collects choices, each effect once.
class SurvivorsLister {
 public:
  using Kept = std::vector<uint32_t>;

  SurvivorsLister(const SimDiskState& state, bool every_tear)
      : state_(state), every_tear_(every_tear), none_(state.items_.size(), 0) {
    for (const SimItem& item : state.items_) all_.push_back(state.UnitsOf(item));
  }

  std::vector<Survivors> List() {
    Add("none", none_);
    Add("all", all_);
    AddOneKind("names only", SimItem::Kind::kName, none_, all_);
    AddOneKind("data only", SimItem::Kind::kName, all_, none_);
    std::set<uint64_t> objects;
    for (size_t i = 0; i < all_.size(); ++i) {
      Kept kept = all_;
      kept[i] = 0;
      Add(absl::StrCat("all but ", state_.Describe(i)), kept);
      kept = none_;
      kept[i] = all_[i];
      Add(absl::StrCat("only ", state_.Describe(i)), kept);
      AddTears(i);
      objects.insert(state_.items_[i].object);
    }
    for (const uint64_t object : objects) AddPrefixes(object);
    return std::move(choices_);
  }

 private:
  void Add(std::string description, const Kept& kept) {
    if (!seen_.insert(kept).second) return;
    choices_.push_back(Survivors(std::move(description), Survivors::Default::kListed, kept));
  }

  // Items of `kind` as in `of_kind`, the rest as in `others`.
  void AddOneKind(const char* description, SimItem::Kind kind, const Kept& others,
                  const Kept& of_kind) {
    Kept kept = others;
    for (size_t i = 0; i < kept.size(); ++i) {
      if (state_.items_[i].kind == kind) kept[i] = of_kind[i];
    }
    Add(description, kept);
  }

  // A write of several sectors that came in part: alone, and as the last that its file got.
  void AddTears(size_t index) {
    for (uint32_t sectors = 1; sectors < all_[index]; ++sectors) {
      if (!every_tear_ && sectors != 1 && sectors != all_[index] - 1) continue;
      Kept kept = all_;
      kept[index] = sectors;
      const std::string text =
          absl::StrFormat("%d of %d sectors of %s", sectors, all_[index], state_.Describe(index));
      Add(absl::StrCat("all, but only ", text), kept);
      for (size_t i = index + 1; i < kept.size(); ++i) {
        if (state_.items_[i].object == state_.items_[index].object) kept[i] = 0;
      }
      Add(absl::StrCat("others all, torn after ", text), kept);
    }
  }

  void AddPrefixes(uint64_t object) {
    const size_t count = static_cast<size_t>(
        std::count_if(state_.items_.begin(), state_.items_.end(),
                      [&](const SimItem& item) { return item.object == object; }));
    for (const bool others_survive : {true, false}) {
      for (size_t length = 0; length <= count; ++length) {
        Kept kept = others_survive ? all_ : none_;
        size_t seen = 0;
        for (size_t i = 0; i < kept.size(); ++i) {
          if (state_.items_[i].object == object) kept[i] = seen++ < length ? all_[i] : 0;
        }
        Add(absl::StrFormat("the first %d of %d changes of %s, %s of the others", length, count,
                            state_.PathOf(object), others_survive ? "all" : "none"),
            kept);
      }
    }
  }

  const SimDiskState& state_;
  const bool every_tear_;
  Kept none_;
  Kept all_;
  std::set<Kept> seen_;
  std::vector<Survivors> choices_;
};

std::vector<Survivors> SimDiskState::LegalSurvivors(const Enumeration& enumeration) const {
  return SurvivorsLister(*this, enumeration.every_tear).List();
}

SimDiskState SimDiskState::Rebooted(const Survivors& survivors) const {
  SimDiskState after = *this;
  if (survivors.default_ == Survivors::Default::kListed) {
    CHECK(survivors.kept_.size() == items_.size());  // the choice was made for this very state
  }
  for (size_t i = 0; i < items_.size(); ++i) {
    switch (survivors.default_) {
      case Survivors::Default::kNone:
        break;
      case Survivors::Default::kAll:
        after.Apply(items_[i], UnitsOf(items_[i]));
        break;
      case Survivors::Default::kListed:
        after.Apply(items_[i], survivors.kept_[i]);
        break;
    }
  }
  after.items_.clear();
  for (auto& [id, node] : after.nodes_) {
    node.visible = node.durable;
    node.names = node.durable_names;
    node.open_count = 0;
  }
  after.CountLinksAndCollect();
  return after;
}

void SimDiskState::CountLinksAndCollect() {
  std::set<uint64_t> reached = {kRoot};
  std::vector<uint64_t> to_visit = {kRoot};
  for (auto& [id, node] : nodes_) node.link_count = id == kRoot ? 1 : 0;
  while (!to_visit.empty()) {
    const uint64_t id = to_visit.back();
    to_visit.pop_back();
    for (const auto& [name, child] : nodes_.at(id).names) {
      ++nodes_.at(child).link_count;
      if (reached.insert(child).second) to_visit.push_back(child);
    }
  }
  std::erase_if(nodes_, [&](const auto& entry) { return !reached.contains(entry.first); });
}

}  // namespace holdfast
