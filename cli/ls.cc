// holdfast ls: what a root holds, what it costs, and how many more saves fit.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"

namespace holdfast::cli {
namespace {

struct JobListing {
  JobPath path;
  Catalog catalog;
  std::vector<uint64_t> entry_bytes;  // of catalog.entries
  uint64_t bytes = 0;
  // Saves of the newest checkpoint's size that fit into what is free; empty: no size is known.
  std::optional<uint64_t> saves_that_fit;
};

absl::StatusOr<JobListing> ListJob(FileSystem& file_system, const JobPath& path,
                                   const Space& space) {
  JobListing listing;
  listing.path = path;
  ASSIGN_OR_RETURN(listing.catalog, ReadCatalog(file_system, path.root, path.job));
  for (const CatalogEntry& entry : listing.catalog.entries) {
    ASSIGN_OR_RETURN(const uint64_t bytes, DirectoryBytes(file_system, entry.directory));
    listing.entry_bytes.push_back(bytes);
    listing.bytes += bytes;
    if (entry.state == CatalogEntry::State::kCommitted && bytes > 0) {
      listing.saves_that_fit = space.available_bytes / bytes;
    }
  }
  return listing;
}

nlohmann::ordered_json IdJson(const CheckpointId& id) {
  return {{"step", Value(id.step)}, {"attempt", Value(id.attempt)}};
}

nlohmann::ordered_json ToJson(const JobListing& listing) {
  nlohmann::ordered_json job = {{"job", listing.path.job},
                                {"uuid", listing.catalog.job.job_uuid},
                                {"source", nullptr},
                                {"bytes", listing.bytes},
                                {"saves_that_fit", nullptr},
                                {"newest", nullptr},
                                {"checkpoints", nlohmann::ordered_json::array()},
                                {"warnings", listing.catalog.warnings}};
  if (const std::optional<JobSource>& source = listing.catalog.job.source; source.has_value()) {
    job["source"] = IdJson(source->checkpoint);
    job["source"]["job"] = source->job;
    job["source"]["uuid"] = source->job_uuid;
    job["source"]["directory"] = source->directory;
  }
  if (listing.saves_that_fit.has_value()) job["saves_that_fit"] = *listing.saves_that_fit;
  if (listing.catalog.newest.has_value()) {
    job["newest"] = IdJson(listing.catalog.entries[*listing.catalog.newest].id);
  }
  for (size_t i = 0; i < listing.catalog.entries.size(); ++i) {
    const CatalogEntry& entry = listing.catalog.entries[i];
    nlohmann::ordered_json item = IdJson(entry.id);
    item["state"] = StateText(entry);
    item["bytes"] = listing.entry_bytes[i];
    item["directory"] = entry.directory;
    if (entry.manifest.has_value()) {
      item["survives"] = Describe(entry.manifest->survives);
      item["world_size"] = entry.manifest->world_size;
      item["parent"] = entry.manifest->parent.has_value() ? IdJson(*entry.manifest->parent)
                                                          : nlohmann::ordered_json(nullptr);
    }
    if (!entry.why.empty()) item["why"] = entry.why;
    job["checkpoints"].push_back(std::move(item));
  }
  return job;
}

void PrintText(const JobListing& listing) {
  std::printf("%s\n", listing.path.job.c_str());
  if (const std::optional<JobSource>& source = listing.catalog.job.source; source.has_value()) {
    std::printf("  made from step %llu of attempt %u of job %s (%s), %s\n",
                static_cast<unsigned long long>(Value(source->checkpoint.step)),
                Value(source->checkpoint.attempt), source->job.c_str(), source->job_uuid.c_str(),
                Printable(source->directory).c_str());
  }
  std::printf("  %12s %8s  %-22s %10s %6s  %s\n", "step", "attempt", "state", "bytes", "ranks",
              "survives");
  for (size_t i = 0; i < listing.catalog.entries.size(); ++i) {
    const CatalogEntry& entry = listing.catalog.entries[i];
    const bool newest = listing.catalog.newest == i;
    std::printf("%s %12llu %8u  %-22s %10s", newest ? "*" : " ",
                static_cast<unsigned long long>(Value(entry.id.step)), Value(entry.id.attempt),
                StateText(entry).c_str(), HumanBytes(listing.entry_bytes[i]).c_str());
    if (entry.manifest.has_value()) {
      std::printf(" %6u  %s", entry.manifest->world_size,
                  Describe(entry.manifest->survives).c_str());
    }
    std::printf("%s%s\n", entry.why.empty() ? "" : "  ", Printable(entry.why).c_str());
  }
  std::printf("  %s in all", HumanBytes(listing.bytes).c_str());
  if (listing.saves_that_fit.has_value()) {
    std::printf("; %llu more saves fit", static_cast<unsigned long long>(*listing.saves_that_fit));
  }
  std::printf("\n");
  for (const std::string& warning : listing.catalog.warnings) {
    std::printf("  warning: %s\n", Printable(warning).c_str());
  }
}

absl::Status Run(Invocation& invocation, const std::string& path) {
  FileSystem& file_system = invocation.file_system;
  std::vector<JobPath> paths;
  // ROOT/JOB, or ROOT with all its jobs.
  if (file_system.Stat(path + "/" + kJobFileName).ok()) {
    ASSIGN_OR_RETURN(const JobPath job, SplitJobPath(path));
    paths.push_back(job);
  } else {
    ASSIGN_OR_RETURN(const std::vector<std::string> jobs, ListJobs(file_system, path));
    for (const std::string& job : jobs) paths.push_back({path, job});
  }
  ASSIGN_OR_RETURN(const Space space, file_system.SpaceOf(path));
  nlohmann::ordered_json output = {{"schema_version", 1},
                                   {"path", path},
                                   {"available_bytes", space.available_bytes},
                                   {"jobs", nlohmann::ordered_json::array()}};
  absl::Status first_error;
  for (const JobPath& job : paths) {
    const absl::StatusOr<JobListing> listing = ListJob(file_system, job, space);
    if (!listing.ok()) {
      // The other jobs are still worth listing; the first error is reported at the end.
      first_error.Update(listing.status());
    } else if (invocation.json) {
      output["jobs"].push_back(ToJson(*listing));
    } else {
      PrintText(*listing);
    }
  }
  if (invocation.json) {
    std::printf("%s\n", JsonText(output).c_str());
  } else {
    if (paths.empty()) std::printf("no jobs in %s\n", Printable(path).c_str());
    std::printf("%s free\n", HumanBytes(space.available_bytes).c_str());
  }
  return first_error;
}

}  // namespace

void AddLs(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("ls", "List jobs and checkpoints, with bytes and room left");
  auto path = std::make_shared<std::string>(".");
  verb->add_option("path", *path, "ROOT, or ROOT/JOB (default: here)");
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, path] {
    invocation.run = [&invocation, path] { return Report(Run(invocation, *path)); };
  });
}

}  // namespace holdfast::cli
