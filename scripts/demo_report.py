"""What a demo expected and what it found, for people on the way and for machines at the end."""

import json
import pathlib
import time


class Report:
    def __init__(self):
        self.events = []
        self.missed = []
        self.figures = {}
        self.begun = time.monotonic()

    def check(self, scenario, what, expected, found):
        return self._add(scenario, what, expected, found, expected == found)

    def check_between(self, scenario, what, least, found, most):
        return self._add(scenario, what, {"least": least, "most": most}, found, least <= found <= most)

    def _add(self, scenario, what, expected, found, holds):
        self.events.append({"scenario": scenario, "event": what, "expected": expected, "found": found,
                            "holds": holds})
        mark = "ok " if holds else "BAD"
        shown = f"{found}" if holds else f"expected {expected}, found {found}"
        print(f"  {mark} {what}: {shown}", flush=True)
        return holds

    def miss(self, scenario, found):
        """A kill that did not hit its place proves nothing and is repeated."""
        self.missed.append({"scenario": scenario, "found": found})
        print(f"      the kill missed ({found}); once more", flush=True)

    def note(self, text):
        print(f"      {text}", flush=True)

    def heading(self, text):
        print(f"\n[{time.monotonic() - self.begun:5.1f} s] {text}", flush=True)

    @property
    def failures(self):
        return [event for event in self.events if not event["holds"]]

    def finish(self, stopped_by, path=None):
        """Says how it ended, writes JSON to `path`, and returns whether all is as it should be."""
        if stopped_by is not None:
            print(f"\nThe demo stopped: {stopped_by}", flush=True)
        if path:
            pathlib.Path(path).write_text(json.dumps(
                {"schema_version": 1, "events": self.events, "missed": self.missed,
                 "figures": self.figures, "stopped_by": stopped_by}, indent=1) + "\n", encoding="utf-8")
        failures = self.failures
        print(f"\n{len(self.events) - len(failures)} of {len(self.events)} expectations hold")
        return not failures and stopped_by is None
