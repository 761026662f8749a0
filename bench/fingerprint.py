"""Fingerprints: bytes per second of one core, beside what memcpy does there in the same minute."""

import json
import subprocess

import pairs

GOAL = 2.0  # GB/s


def rows(place):
    def rate(what):
        result = subprocess.run([place.build / "bench" / "bench_fingerprint", what], check=True,
                                capture_output=True, text=True)
        return json.loads(result.stdout)["gigabytes_per_second"]

    found = []
    for what, name in (("float32", "fingerprint of float32"), ("bfloat16", "fingerprint of bfloat16"),
                       ("portable", "fingerprint of float32 without AVX2")):
        row = pairs.compare(name, "GB/s", lambda kind=what: rate(kind), lambda: rate("memcpy"), None,
                            note="one core, against memcpy")
        if what != "portable":
            row.goal, row.holds = f">= {GOAL:g} GB/s", row.value >= GOAL
        found.append(row)
    return found
