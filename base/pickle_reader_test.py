#!/usr/bin/python3
"""The pickle reader against a second one, driven by Python's own pickletools.genops: pickles of real objects in
every protocol, random programs of opcodes, mutations of both, and the pickles of ../shared/fixtures where they are.
What the C++ reader accepts, the second one accepts, as the same values; what Python wrote, the C++ reader accepts.
Usage: pickle_reader_test.py PROGRAM [--count N] [--seed N]"""

import argparse
import collections
import io
import pathlib
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import zipfile

MARK = object()
MARKS_MAX = 64
FIXTURES = pathlib.Path(__file__).resolve().parents[2] / "shared" / "fixtures"
# What pickletools knows and the reader refuses by name.
REFUSED = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "STRING", "UNICODE"}


class Refused(Exception):
    pass


class Node:
    """A container, an object or a persistent id. Scalars are Python's own; globals are pairs."""

    def __init__(self, kind, items=()):
        self.kind, self.items = kind, list(items)
        self.parts = {}  # of objects


class Global(tuple):
    pass


class Machine:
    """What the opcodes do, without bounds and without errors that speak; by Python's words for them."""

    def __init__(self, data):
        self.stack, self.memo, self.data = [], {}, data
        self.empty_tuple = Node("tuple")  # Python has one
        self.has_header = data[:1] == b"\x80"

    def run(self):
        for opcode, argument, position in pickletools.genops(io.BytesIO(self.data)):
            if opcode.name in REFUSED or (not self.has_header and opcode.name in ("PUT", "GET")):
                raise Refused(opcode.name)
            if opcode.name == "PROTO":
                if position != 0 or not 1 <= argument <= 5:
                    raise Refused("PROTO")
            elif opcode.name == "STOP":
                if len(self.stack) != 1 or self.stack[0] is MARK or position + 1 != len(self.data):
                    raise Refused("end")
                return self.stack[0]
            else:
                if opcode.name == "GLOBAL":  # pickletools joins the two lines by a space
                    argument = [part.decode() for part in self.data[position + 1:].split(b"\n", 2)[:2]]
                self.step(opcode.name, argument)
        raise Refused("no STOP")

    def pop(self):
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("value")
        return self.stack.pop()

    def take(self, count):
        if count > len(self.stack) or any(x is MARK for x in self.stack[len(self.stack) - count:]):
            raise Refused("values")
        items = self.stack[len(self.stack) - count:]
        del self.stack[len(self.stack) - count:]
        return items

    def take_to_mark(self):
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is MARK:
                items = self.stack[i + 1:]
                del self.stack[i:]
                return items
        raise Refused("mark")

    def add(self, kind, items):
        """To the list or dict on top, or to what an object on top was given."""
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("container")
        top = self.stack[-1]
        if isinstance(top, Node) and top.kind == "object":
            part = "items" if kind == "list" else "entries"
            top = top.parts.setdefault(part, Node(kind))
        if not isinstance(top, Node) or top.kind != kind or (kind == "dict" and len(items) % 2):
            raise Refused("container")
        top.items += items

    def step(self, name, argument):
        push = self.stack.append
        if name in ("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINUNICODE",
                    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"):
            push(argument)
        elif name == "BYTEARRAY8":
            push(bytearray(argument))
        elif name in ("BINSTRING", "SHORT_BINSTRING"):
            raw = argument.encode("latin-1")
            try:
                push(raw.decode("utf-8"))
            except UnicodeDecodeError:
                push(raw)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name == "EMPTY_TUPLE":
            push(self.empty_tuple)
        elif name.startswith("EMPTY_"):
            push(Node(name[6:].lower()))
        elif name == "MARK":
            if sum(x is MARK for x in self.stack) >= MARKS_MAX:
                raise Refused("marks")
            push(MARK)
        elif name == "POP":
            if not self.stack:
                raise Refused("POP")
            self.stack.pop()
        elif name == "POP_MARK":
            self.take_to_mark()
        elif name == "DUP":
            push(self.pop())
            push(self.stack[-1])
        elif name in ("LIST", "TUPLE", "DICT", "FROZENSET"):
            items = self.take_to_mark()
            if name == "DICT" and len(items) % 2:
                raise Refused("DICT")
            push(Node(name.lower(), items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(Node("tuple", self.take(int(name[5]))))
        elif name == "APPEND":
            self.add("list", self.take(1))
        elif name == "SETITEM":
            self.add("dict", self.take(2))
        elif name == "APPENDS":
            self.add("list", self.take_to_mark())
        elif name == "SETITEMS":
            self.add("dict", self.take_to_mark())
        elif name == "ADDITEMS":
            items = self.take_to_mark()
            if self.stack and isinstance(self.stack[-1], Node) and self.stack[-1].kind == "set":
                self.stack[-1].items += items
            elif self.stack and isinstance(self.stack[-1], Node) and self.stack[-1].kind == "object":
                self.add("list", items)
            else:
                raise Refused("ADDITEMS")
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            value = self.pop()
            push(value)
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = value
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in self.memo:
                raise Refused("GET")
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(Global(argument))
        elif name == "STACK_GLOBAL":
            module, symbol = self.take(2)
            if not isinstance(module, str) or not isinstance(symbol, str):
                raise Refused("STACK_GLOBAL")
            push(Global((module, symbol)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self.make(name)
        elif name == "BUILD":
            target, state = self.take(2)
            if not isinstance(target, Node) or target.kind != "object":
                raise Refused("BUILD")
            target.parts["state"] = state
            target.parts["builds"] += 1
            push(target)
        elif name == "BINPERSID":
            push(Node("persistent", [self.pop()]))
        elif name != "FRAME":
            raise Refused(name)

    def make(self, name):
        kwargs = None
        if name == "NEWOBJ_EX":
            callee, arguments, kwargs = self.take(3)
            if not isinstance(kwargs, Node) or kwargs.kind != "dict":
                raise Refused(name)
        else:
            callee, arguments = self.take(2)
        is_callee = isinstance(callee, Global) or (isinstance(callee, Node) and callee.kind in ("object", "persistent"))
        if not is_callee or not isinstance(arguments, Node) or arguments.kind != "tuple":
            raise Refused(name)
        node = Node("object")
        node.parts = {"making": "r" if name == "REDUCE" else "n", "callee": callee, "args": arguments, "builds": 0}
        if kwargs is not None:
            node.parts["kwargs"] = kwargs
        self.stack.append(node)


def entries_of(items):
    """Python's rule: one key is one entry, with the first key and the last value."""
    entries = {}
    for key, value in zip(items[::2], items[1::2]):
        if isinstance(key, (Node, Global)) or key != key:
            word = ("id", id(key))  # equal to nothing else
        elif isinstance(key, bytearray):
            word = ("bytearray", bytes(key))
        elif isinstance(key, (int, float)):
            word = ("number", key)
        else:
            word = (type(key).__name__, key)
        first = entries[word][0] if word in entries else key
        entries[word] = (first, value)
    return entries.values()


class Printer:
    def __init__(self):
        self.printed = {}

    def print(self, root):
        out, todo = [], [root]
        while todo:
            x = todo.pop()
            if isinstance(x, Text):
                out.append(x)
            else:
                out.append(self.scalar(x) if not isinstance(x, Node) else self.node(x, todo))
        return "".join(out)

    def scalar(self, x):
        if x is None or x is True or x is False:
            return {None: "N", True: "T", False: "F"}[x]
        if isinstance(x, Global):
            return "g%s.%s;" % tuple(part.encode("utf-8").hex() for part in x)
        if isinstance(x, int):
            if -2**63 <= x < 2**63:
                return "i%d;" % x
            length = (x if x >= 0 else -x - 1).bit_length() // 8 + 1
            return "h%s;" % x.to_bytes(length, "little", signed=True).hex()
        if isinstance(x, float):
            return "d%s;" % struct.pack(">d", x).hex()
        if isinstance(x, str):
            return "s%s;" % x.encode("utf-8", "surrogatepass").hex()
        return ("B" if isinstance(x, bytearray) else "b") + bytes(x).hex() + ";"

    def node(self, x, todo):
        if id(x) in self.printed:
            return "#%d;" % self.printed[id(x)]
        self.printed[id(x)] = len(self.printed)
        parts = []
        if x.kind == "object":
            get = x.parts.get
            parts = [x.parts["callee"], x.parts["args"], get("kwargs", Text("-")), get("state", Text("-")),
                     Text("%d;" % x.parts["builds"]), get("items", Text("-")), get("entries", Text("-"))]
            begin, end = "o(" + x.parts["making"], ")"
        elif x.kind == "dict":
            for key, value in entries_of(x.items):
                parts += [key, Text(":"), value]
            begin, end = "%", "%"
        else:
            parts = x.items
            begin, end = {"list": "[]", "tuple": "()", "set": "{}", "frozenset": "<>"}.get(x.kind, ("p(", ")"))
        todo.append(Text(end))
        todo += reversed(parts)
        return begin


class Text(str):
    pass


def second_reader(data):
    """What the pickle holds, or why it is refused; None: pickletools wants ASCII in a global's name,
    where Python's unpickler, and ours, take UTF-8."""
    try:
        return Printer().print(Machine(data).run())
    except (Refused, ValueError, IndexError, struct.error, OverflowError) as e:
        if isinstance(e, UnicodeDecodeError) and e.encoding == "ascii":
            return None
        return "refused %s %s" % (type(e).__name__, e)


# ---- what is read ----


class Plain:
    pass


class Slots:
    __slots__ = ("a", "b")


class Listed(list):
    pass


class Keyed(dict):
    pass


class Arguments:
    def __new__(cls, *a, **k):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1, "x"), {"k": None}


class Reduced:
    def __reduce__(self):
        return (divmod, (7, 2), {"state": 1})


class WithIds(pickle.Pickler):
    def persistent_id(self, x):
        return ("storage", x.__dict__.get("key", 0)) if type(x) is Plain else None


def random_object(r, depth=0, seen=None):
    seen = [] if seen is None else seen
    if seen and r.random() < 0.15:
        return r.choice(seen)
    kind = r.randrange(10 if depth > 4 else 22)
    if kind < 3:
        return r.choice([None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**31, -2**31, 2**63 - 1, -2**63])
    if kind == 3:
        return r.randint(-2**r.choice([4, 30, 63, 70, 300, 2100]), 2**r.choice([4, 30, 63, 70, 300, 2100]))
    if kind == 4:
        return r.choice([0.0, -0.0, 1.5, float("inf"), -1e300, 5e-324, r.random()])
    if kind < 7:
        return "".join(r.choice("ab\xe9\u20ac\U0001f600\ud800\n") for _ in range(r.choice([0, 1, 3, 300])))
    if kind < 9:
        raw = bytes(r.randrange(256) for _ in range(r.choice([0, 1, 5, 300])))
        return raw if r.random() < 0.7 else bytearray(raw)
    if kind == 9:
        return collections.OrderedDict
    def inner():
        return random_object(r, depth + 1, seen)

    def hashable():
        x = random_object(r, 9, [])
        return repr(x) if isinstance(x, bytearray) else x

    if kind < 12:
        x = Listed() if kind == 11 and r.random() < 0.3 else []
        seen.append(x)
        x.extend(inner() for _ in range(r.choice([0, 1, 2, 5])))
        if r.random() < 0.05:
            x.append(x)
        return x
    if kind < 15:
        return tuple(inner() for _ in range(r.choice([0, 1, 2, 3, 4, 7])))
    if kind < 18:
        x = Keyed() if kind == 17 else collections.OrderedDict() if r.random() < 0.3 else {}
        seen.append(x)
        for _ in range(r.choice([0, 1, 2, 6, 40])):
            x[hashable()] = inner()
        return x
    if kind == 18:
        x = {r.randint(-9, 2**70) for _ in range(r.randrange(4))}  # text would be in another order every time
        return frozenset(x) if r.random() < 0.5 else x
    if kind == 19:
        x = r.choice([Plain, Slots])()
        x.a = inner()
        return x
    return r.choice([Arguments, Reduced])()


def pickle_of(r):
    while True:
        x = random_object(r)
        out = io.BytesIO()
        try:
            (WithIds if r.random() < 0.5 else pickle.Pickler)(out, protocol=r.randint(1, 5)).dump(x)
        except (pickle.PicklingError, RecursionError, TypeError):
            continue  # what this protocol has no words for
        return out.getvalue()


OPCODES = [o for o in pickletools.opcodes if o.name not in REFUSED | {"PROTO", "STOP"}]


def argument_of(r, opcode):
    """Bytes of an argument of this kind, mostly good ones."""
    text = r.choice([b"", b"a", b"key", b"\xc3\xa9", b"\xed\xa0\x80", b"\xff"])
    name = opcode.arg.name if opcode.arg else ""
    small = r.choice([0, 1, 2, 3, 200])
    forms = {
        "uint1": lambda: bytes([small]), "uint2": lambda: struct.pack("<H", small), "uint4": lambda: struct.pack("<I", small),
        "int4": lambda: struct.pack("<i", r.choice([0, -1, 7, -2**31])), "uint8": lambda: struct.pack("<Q", r.choice([0, 0, 1, 2**40])),
        "float8": lambda: struct.pack(">d", r.choice([0.0, 1.0, -2.5])), "floatnl": lambda: r.choice([b"1.5", b"-0", b"inf", b"x"]) + b"\n",
        "decimalnl_short": lambda: r.choice([b"0", b"1", b"00", b"01", b"-7", b"9223372036854775808"]) + b"\n",
        "decimalnl_long": lambda: r.choice([b"0L", b"12", b"-99999999999999999999L"]) + b"\n",
        "long1": lambda: (lambda b: bytes([len(b)]) + b)(r.choice([b"", b"\1", b"\xff" * 9, b"\0" * 9 + b"\x80", b"\x80\x00"])),
        "long4": lambda: (lambda b: struct.pack("<i", len(b)) + b)(r.choice([b"", b"\1\2", b"\x80" * 12])),
        "stringnl_noescape_pair": lambda: b"m\n" + r.choice([b"n", b"a.b"]) + b"\n",
    }
    for prefix, form in (("1", "<B"), ("4", "<I"), ("8", "<Q")):
        for kind in ("string", "bytes", "unicodestring", "bytearray"):
            forms[kind + prefix] = lambda form=form: struct.pack(form, len(text)) + text
    return forms[name]() if name else b""


def program_of(r):
    """Random opcodes, of which many programs are good: what needs values finds some on the stack."""
    out = r.choice([b"", b"\x80\x02", b"\x80\x04"])
    for _ in range(r.choice([3, 10, 40])):
        opcode = r.choice(OPCODES)
        need = {"REDUCE": b"cm\nn\n)", "NEWOBJ": b"cm\nn\n)", "NEWOBJ_EX": b"cm\nn\n)}", "BUILD": b"cm\nn\n)RN", "STACK_GLOBAL": b"U\1mU\1n",
                "APPEND": b"]N", "SETITEM": b"}NN", "APPENDS": b"](NN", "SETITEMS": b"}(NNK\1N", "ADDITEMS": b"\x8f(N",
                "TUPLE": b"(", "LIST": b"(", "DICT": b"(NN", "FROZENSET": b"(", "POP_MARK": b"(", "BINGET": b"Nq\1"}.get(opcode.name, b"")
        if r.random() < 0.8:
            out += need
        out += opcode.code.encode("latin-1") + argument_of(r, opcode)
    if r.random() < 0.8:
        out = out[:2] + b"(" + out[2:] + b"t" if out[:1] == b"\x80" else b"(" + out + b"t"
    return out + b"."


def mutation_of(r, data):
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(len(data))
        what = r.randrange(4)
        if what == 0:
            data[at] = r.randrange(256)
        elif what == 1:
            del data[at:at + r.choice([1, 4])]
        elif what == 2:
            data[at:at] = data[:r.randrange(8)]
        else:
            data[at] ^= 1 << r.randrange(8)
        if not data:
            return b"N."
    return bytes(data)


def fixture_pickles():
    """data.pkl of every zip, and whatever else is a pickle as a whole."""
    for path in sorted(FIXTURES.rglob("*")):
        if not path.is_file() or path.suffix == ".json":
            continue
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PK\3\4":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        with archive.open(name) as record:
                            record._expected_crc = None  # torch can be told not to write it
                            yield str(path), record.read()
        elif head[:1] == b"\x80":
            data = path.read_bytes()
            while data[:1] == b"\x80":  # before torch 1.6: five in a row
                stream = io.BytesIO(data)
                try:
                    collections.deque(pickletools.genops(stream), maxlen=0)
                except ValueError:
                    break
                yield str(path), data[:stream.tell()]
                data = data[stream.tell():]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=20261126)
    arguments = parser.parse_args()
    print("seed", arguments.seed)
    failures = 0
    counts = collections.Counter()

    def compare(batch):
        nonlocal failures
        feed = b"".join(struct.pack("<Q", len(data)) + data for _, data in batch)
        lines = subprocess.run([arguments.program], input=feed, capture_output=True, check=True).stdout.decode().splitlines()
        assert len(lines) == len(batch), (len(lines), len(batch))
        for (what, data), line in zip(batch, lines):
            expected = second_reader(data)
            if expected is None and what == "mutation":
                counts["mutation", "not compared"] += 1
                continue
            refused = line.startswith("refused")
            counts["fixture" if what.startswith("/") else what, "refused" if refused else "accepted"] += 1
            # What Python wrote has to be read; of other bytes, what is read is read alike.
            wrong = line != expected if what in ("python",) or what.startswith("/") else not refused and line != expected
            if wrong:
                failures += 1
                if failures <= 10:
                    print("%s: %s\n  first reader  %s\n  second reader %s" % (what, data[:400], line[:600], expected[:600]))

    r = random.Random(arguments.seed)
    done = 0
    while done < arguments.count:
        batch = []
        for _ in range(min(2000, arguments.count - done)):
            kind = r.randrange(4)
            data = pickle_of(r) if kind % 2 == 0 else program_of(r)
            batch.append((("python", "program")[kind % 2], data) if kind < 2 else ("mutation", mutation_of(r, data)))
        done += len(batch)
        compare(batch)
    fixtures = list(fixture_pickles())
    print("%d pickles of fixtures" % len(fixtures) if fixtures else "SKIPPED: no %s" % FIXTURES)
    compare(fixtures)
    print({" ".join(k): v for k, v in sorted(counts.items())})
    if not failures and not all(counts[k, "accepted"] > arguments.count // 200 for k in ("python", "program", "mutation")):
        print("expected more pickles that are accepted")
        failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
