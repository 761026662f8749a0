"""The table of what is done to jobs and what shall be said of it: cases.toml, read and checked."""
import dataclasses
import hashlib
import json
import pathlib
import random
import re
import tomllib

TABLE = pathlib.Path(__file__).resolve().with_name("cases.toml")
CLASSES = ("unknown", "late-data", "late-compute", "pause-overdue", "link", "sender-end",
           "receiver-end", "starved-proxy", "never-entered", "gpu-hang", "deadlock", "mismatch",
           "never-joined", "stopped", "node-silent", "dead")
SCOPES = ("process", "gpu", "host", "rank-late", "node", "sender-nic", "receiver-nic", "path",
          "sender-nic-or-path", "receiver-nic-or-path", "connection", "program",
          "behind-blind-rank", "communicator")


class WrongTable(Exception):
    """Which line of the table is wrong, what was expected, what was found."""


@dataclasses.dataclass(frozen=True)
class Expected:
    classes: tuple
    scopes: tuple
    suspects: tuple  # of "victim", "victim>peer", ... or, filled in, of (rank, peer)
    # May be named besides, in a suspicion.
    also: tuple = ()

    def filled_in(self, victim, peer):
        def one(text):
            ranks = [{"victim": victim, "peer": peer}[role] for role in text.split(">")]
            return ranks[0], ranks[-1]
        return dataclasses.replace(self, suspects=tuple(map(one, self.suspects)),
                                   also=tuple(map(one, self.also)))


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    runs: int  # in the series
    verdict_seconds: float  # a right verdict comes within
    verdict_not_before_seconds: float  # else it is premature


@dataclasses.dataclass(frozen=True)
class Severity:
    """How hard the fault is: values from mild to hard of one number in the case's arguments, or of
    NAME=NUMBER in their lines."""

    argument: str
    values: tuple


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: Kind
    job: str
    fault: str
    arguments: dict
    expected: Expected | None  # None: nothing may be said
    watch_seconds: float  # how long to look if nothing is (or has to be) said
    warm_seconds: float  # of undisturbed training before the onset
    in_ci: bool
    evidence: tuple  # parts that the verdict's evidence has in the end
    digest: str  # of the case as it is written: a result is of one table
    severity: Severity | None = None

    def at(self, value):
        """The same with this value in place of its own severity."""
        name = self.severity.argument
        arguments = dict(self.arguments)
        if name in arguments:
            arguments[name] = value
        else:
            arguments["lines"] = [_number_of(name).sub(rf"\g<1>{value:g}", line)
                                  for line in arguments["lines"]]
        digest = hashlib.sha256(json.dumps([self.digest, value]).encode()).hexdigest()[:16]
        return dataclasses.replace(self, name=f"{self.name}, {name} {value:g}", arguments=arguments,
                                   severity=None, in_ci=False, digest=digest)

    def roles(self, run, ranks):
        """Who is the victim and who its peer (the next one in the ring) in run `run`."""
        # Not hash(): that differs from process to process.
        victim = random.Random(f"{self.name} {run}").randrange(ranks)
        return victim, (victim + 1) % ranks


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    program: str
    ranks: int
    arguments: tuple
    environment: dict


@dataclasses.dataclass(frozen=True)
class Table:
    jobs: dict
    kinds: dict
    cases: tuple

    def case(self, name):
        for case in self.cases:
            if case.name == name:
                return case
        known = ", ".join(case.name for case in self.cases)
        raise WrongTable(f"no case '{name}'; there are: {known}")


def read(path=TABLE):
    return parse(path.read_text(encoding="utf-8"))


def parse(text):
    document = tomllib.loads(text)
    _keys("the table", document, {"job", "kind", "case"})
    kinds = {name: Kind(name, **_typed(f"kind {name}", row, {
        "runs": int, "verdict_seconds": (int, float), "verdict_not_before_seconds": (int, float)},
        optional={"verdict_not_before_seconds": 0})) for name, row in document["kind"].items()}
    jobs = {}
    for name, row in document["job"].items():
        row = _typed(f"job {name}", row, {"program": str, "ranks": int, "arguments": list,
                                          "environment": dict}, optional={"environment": {}})
        row["arguments"] = tuple(row["arguments"])
        jobs[name] = Job(name, **row)
    cases = tuple(_case(row, kinds, jobs) for row in document["case"])
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise WrongTable(f"case {name}: expected one of this name, found {names.count(name)}")
    return Table(jobs, kinds, cases)


def _case(row, kinds, jobs):
    where = f"case {row.get('name', '?')}"
    told = _typed(where, row, {
        "name": str, "kind": str, "job": str, "fault": str, "arguments": dict, "expected": (dict, str),
        "watch_seconds": (int, float), "warm_seconds": (int, float), "ci": bool, "severity": dict,
        "evidence": list},
        optional={"arguments": {}, "warm_seconds": 6.0, "ci": False, "severity": {}, "evidence": []})
    # Of what decides a result.
    deciding = {key: value for key, value in row.items() if key not in ("ci", "severity")}
    digest = hashlib.sha256(json.dumps([deciding, dataclasses.asdict(jobs[row["job"]])
                                        if row["job"] in jobs else None],
                                       sort_keys=True).encode()).hexdigest()[:16]
    for what, known in (("kind", kinds), ("job", jobs)):
        if told[what] not in known:
            raise WrongTable(f"{where}: {what}: expected one of {', '.join(known)}, "
                             f"found '{told[what]}'")
    return Case(name=told["name"], kind=kinds[told["kind"]], job=told["job"], fault=told["fault"],
                arguments=told["arguments"], expected=_expected(where, told["expected"]),
                watch_seconds=told["watch_seconds"], warm_seconds=told["warm_seconds"],
                in_ci=told["ci"], evidence=tuple(told["evidence"]), digest=digest,
                severity=_severity(where, told["severity"], told["arguments"]))


def _number_of(name):
    return re.compile(rf"(\b{re.escape(name)}=)[0-9.]+")


def _severity(where, row, arguments):
    if not row:
        return None
    told = _typed(f"{where}: severity", row, {"argument": str, "values": list})
    name, values = told["argument"], told["values"]
    places = (name in arguments) + sum(len(_number_of(name).findall(line))
                                       for line in arguments.get("lines", ()))
    if places != 1:
        raise WrongTable(f"{where}: severity: argument: expected one '{name}' in the arguments, "
                         f"found {places}")
    if (not values or any(isinstance(value, bool) or not isinstance(value, (int, float))
                          for value in values)):
        raise WrongTable(f"{where}: severity: values: expected numbers, found {values!r}")
    return Severity(name, tuple(values))


def _expected(where, row):
    if row == "nothing":
        return None
    if not isinstance(row, dict):
        raise WrongTable(f"{where}: expected: expected \"nothing\" or a table, found '{row}'")
    row = _typed(where, row, {"class": (str, list), "scope": (str, list), "suspects": list,
                              "also": list}, optional={"also": []})
    lists = {key: tuple([row[key]] if isinstance(row[key], str) else row[key])
             for key in ("class", "scope", "suspects", "also")}
    for key, known in (("class", CLASSES), ("scope", SCOPES)):
        for value in lists[key]:
            if value not in known:
                raise WrongTable(f"{where}: {key}: expected one of {', '.join(known)}, "
                                 f"found '{value}'")
    for key in ("suspects", "also"):
        for value in lists[key]:
            if any(role not in ("victim", "peer") for role in value.split(">")):
                raise WrongTable(f"{where}: {key}: expected victim, peer, or two of them joined by >, "
                                 f"found '{value}'")
    if not lists["suspects"]:
        raise WrongTable(f"{where}: suspects: expected at least one")
    return Expected(lists["class"], lists["scope"], lists["suspects"], lists["also"])


def _keys(where, row, known):
    for key in row:
        if key not in known:
            raise WrongTable(f"{where}: unknown key '{key}'; expected {', '.join(sorted(known))}")


def _typed(where, row, types, optional=None):
    optional = optional or {}
    _keys(where, row, set(types))
    result = {}
    for key, kind in types.items():
        if key not in row and key not in optional:
            raise WrongTable(f"{where}: expected a key '{key}'")
        value = row.get(key, optional.get(key))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise WrongTable(f"{where}: {key}: expected {kind}, found {value!r}")
        result[key] = value
    return result
