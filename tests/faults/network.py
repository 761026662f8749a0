"""A network of our own: a namespace per node, all joined by a bridge that has a namespace, too.

    with Network("a", 8) as network:
        network.slow_sender(3, 20_000_000)
        subprocess.Popen([...], ...) inside network.namespace(3)
        network.heal()

Every node has one NIC, `eth0`, which sends and receives at RATE_BITS: queues (tbf) at both of its
ends. A fault changes one queue or one rule, so that what is slow or cut is a fact about the network,
and nobody who takes part is told. Nothing of this touches the machine's own namespace: with the
namespaces go devices, queues, rules and, as every process of a test runs inside of one, the
processes.

One user at a time (`Exclusive`); whoever comes next removes what a killed one left behind
(`remove_leftovers`), by the prefix of the names.

Needs root, iproute2 and nftables.
"""
import contextlib
import ctypes
import fcntl
import os
import pathlib
import signal
import subprocess
import time

PREFIX = "hff-"  # of every namespace
NAMESPACES = pathlib.Path("/run/netns")
LOCK = pathlib.Path("/run/lock/holdfast-faults.lock")
SUBNET = "10.213.77"  # inside the namespaces alone
NODES_MAX = 64
RATE_BITS = 200_000_000  # what a healthy NIC does, in each direction
# What a queue lets through at once: above the largest packet that a sender gives to its device
# (64 KiB), or tbf would have to cut it.
BURST_BYTES = 128 << 10
# Short: acknowledgements wait in it behind data, so that a slow direction delays the other one, too.
QUEUE_BYTES = 256 << 10
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


class CannotRun(Exception):
    """What is missing here, in a sentence."""


def tool(*command, text=None):
    """Runs a tool that is expected to work; returns what it printed."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: status {result.returncode}: "
                           f"{result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def check_possible():
    """Raises CannotRun where namespaces cannot be made."""
    if os.geteuid() != 0:
        raise CannotRun("network namespaces need root")
    for name in ("ip", "tc", "nft", "nsenter"):
        if not any((pathlib.Path(place) / name).exists()
                   for place in ("/usr/sbin", "/sbin", "/usr/bin", "/bin")):
            raise CannotRun(f"{name} is not installed (packages iproute2, nftables, util-linux)")
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise CannotRun(f"no network namespaces here: {probe.stderr.strip()}")


@contextlib.contextmanager
def Exclusive():
    """Holds the lock of all users of namespaces with our prefix, and begins and ends with none of
    them. Raises CannotRun if somebody else holds it."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotRun(f"another run holds {LOCK}") from None
        remove_leftovers()
        try:
            yield
        finally:
            remove_leftovers()


def namespaces(prefix=PREFIX):
    if not NAMESPACES.is_dir():
        return []
    return sorted(path.name for path in NAMESPACES.iterdir() if path.name.startswith(prefix))


@contextlib.contextmanager
def may_be_gone(namespace):
    """Another thread may be removing the same one."""
    try:
        yield
    except RuntimeError:
        if (NAMESPACES / namespace).exists():
            raise


def processes_in(namespace):
    with may_be_gone(namespace):
        return [int(pid) for pid in tool("ip", "netns", "pids", namespace).split()]
    return []


def remove_leftovers(prefix=PREFIX):
    """Kills whatever runs in namespaces with this prefix, and deletes them."""
    names = namespaces(prefix)
    deadline = time.monotonic() + 20
    # Again and again: an agent's keeper and worker start each other.
    while pids := [pid for name in names for pid in processes_in(name)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"these processes do not die: {pids}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for name in names:
        with may_be_gone(name):
            tool("ip", "netns", "delete", name)


@contextlib.contextmanager
def inside(namespace):
    """The calling thread is in `namespace` during the block: so are the sockets that it makes and
    the processes that it starts."""
    with open("/proc/thread-self/ns/net", "rb") as own, open(NAMESPACES / namespace, "rb") as other:
        _enter(other)
        try:
            yield
        finally:
            _enter(own)


def _enter(file):
    if LIBC.setns(file.fileno(), CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """`nodes` nodes. Several networks (other names) live side by side and do not see each other."""

    def __init__(self, name, nodes, rate_bits=RATE_BITS):
        if not 1 <= nodes <= NODES_MAX:
            raise ValueError(f"expected 1 to {NODES_MAX} nodes, found {nodes}")
        self.prefix = f"{PREFIX}{name}-"
        self.nodes = nodes
        self.rate_bits = rate_bits
        self.switch = self.prefix + "switch"
        self.host = self.prefix + "host"  # for what has no address, as the agent
        self._shaped = {}  # (namespace, device): what its queue is told now
        self._has_cuts = False

    def namespace(self, node):
        return f"{self.prefix}{node}"

    @staticmethod
    def address(node):
        return f"{SUBNET}.{node + 1}"

    @staticmethod
    def _port(node):
        return f"port{node}"

    def __enter__(self):
        # Whatever made this name before is gone; a half-made network goes, too.
        remove_leftovers(self.prefix)
        try:
            self._make()
        except BaseException:
            remove_leftovers(self.prefix)
            raise
        return self

    def __exit__(self, *exception):
        remove_leftovers(self.prefix)

    def _make(self):
        for name in (self.switch, self.host, *map(self.namespace, range(self.nodes))):
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
        tool("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        tool("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for node in range(self.nodes):
            own, port = self.namespace(node), self._port(node)
            tool("ip", "-n", self.switch, "-batch", "-", text=(
                f"link add {port} type veth peer name eth0 netns {own}\n"
                f"link set {port} master bridge up\n"))
            tool("ip", "-n", own, "-batch", "-", text=(
                f"address add {self.address(node)}/24 dev eth0\nlink set eth0 up\n"))
            self._shape(own, "eth0", self.rate_bits)
            self._shape(self.switch, port, self.rate_bits)

    def _shape(self, namespace, device, rate_bits):
        """One queue for everything that `device` sends."""
        told = ("root", "tbf", "rate", f"{rate_bits}bit", "burst", str(BURST_BYTES),
                "limit", str(QUEUE_BYTES))
        if self._shaped.get((namespace, device)) == told:
            return
        # Of the same kind it is changed in place, and loses no packet.
        tool("tc", "-n", namespace, "qdisc", "replace", "dev", device, *told)
        self._shaped[(namespace, device)] = told

    # ---- Faults. Each holds until `heal`.

    def slow_sender(self, node, rate_bits):
        """A row: everything that the node sends."""
        self._shape(self.namespace(node), "eth0", rate_bits)

    def slow_receiver(self, node, rate_bits):
        """A column: everything that the node receives, as it leaves the bridge."""
        self._shape(self.switch, self._port(node), rate_bits)

    def slow_path(self, sender, receiver, rate_bits):
        """A point: what one node sends to one other; its other traffic keeps its rate. So do packets
        of less than 256 bytes: acknowledgements that wait behind data would make the other direction
        slow as well, and rightly found so."""
        own = self.namespace(sender)
        whole, slow = f"{self.rate_bits}bit", f"{rate_bits}bit"
        burst = ("burst", str(BURST_BYTES), "cburst", str(BURST_BYTES), "quantum", "60000")
        tool("tc", "-n", own, "qdisc", "replace", "dev", "eth0", "root", "handle", "1:", "htb",
             "default", "2")
        tool("tc", "-n", own, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1",
             "htb", "rate", whole, *burst)
        tool("tc", "-n", own, "class", "add", "dev", "eth0", "parent", "1:1", "classid", "1:2",
             "htb", "rate", whole, *burst)
        tool("tc", "-n", own, "class", "add", "dev", "eth0", "parent", "1:1", "classid", "1:3",
             "htb", "rate", slow, "ceil", slow, *burst)
        tool("tc", "-n", own, "qdisc", "add", "dev", "eth0", "parent", "1:3", "bfifo", "limit",
             str(BURST_BYTES))
        to_receiver = ("u32", "match", "ip", "dst", f"{self.address(receiver)}/32")
        small = ("match", "u16", "0", "0xff00", "at", "2")  # the total length, in IP's header
        for priority, match, flow in (("1", small, "1:2"), ("2", (), "1:3")):
            tool("tc", "-n", own, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip",
                 "prio", priority, *to_receiver, *match, "flowid", flow)
        self._shaped[(own, "eth0")] = "htb"

    def cut(self, sender, receiver):
        """One way: nothing from `sender` reaches `receiver` any more, and neither is told."""
        self._nft("add table bridge faults\n"
                  "add chain bridge faults forward { type filter hook forward priority 0; }\n"
                  f"add rule bridge faults forward ip saddr {self.address(sender)} "
                  f"ip daddr {self.address(receiver)} drop\n")
        self._has_cuts = True

    def cut_both_ways(self, one, other):
        self.cut(one, other)
        self.cut(other, one)

    def heal(self):
        """Every NIC and every path as at the beginning."""
        for namespace, device in list(self._shaped):
            self._shape(namespace, device, self.rate_bits)
        if self._has_cuts:
            self._nft("delete table bridge faults\n")
            self._has_cuts = False

    def _nft(self, commands):
        with inside(self.switch):
            tool("nft", "-f", "-", text=commands)
