"""The monitor's part of gpu_check.py: the NCCL profiler plugin in real jobs, watched by a real agent."""

import contextlib
import json
import os
import pathlib
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time

import pairs

HERE = pathlib.Path(__file__).resolve().parent
READY_SECONDS = 45    # from the start of a rank to its first collective: imports, CUDA, NCCL
ANSWER_SECONDS = 30   # a command that takes seconds
RAS = ("127.0.0.1", 28028)
PEER_STATES = ("receive_data", "send_peer")


class Failure(Exception):
    """Something that was to hold does not."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(seconds, what, attempt):
    """The first result of `attempt` that is true. It looks again and again: boards have no event."""
    end = time.monotonic() + seconds
    while True:
        found = attempt()
        if found:
            return found
        if time.monotonic() > end:
            raise Failure(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


def ask_ras(text_format):
    """What NCCL's own RAS says; empty if it does not answer."""
    try:
        with socket.create_connection(RAS, timeout=3) as client:
            client.settimeout(8)
            client.sendall(f"SET FORMAT {text_format}\nVERBOSE STATUS\n".encode())
            answer = b""
            while data := client.recv(1 << 16):
                answer += data
            return answer.decode("utf-8", "replace")
    except OSError:
        return ""


class Agent:
    """A holdfastd of the bundle, and the holdfast command that asks it."""

    def __init__(self, directory):
        self.socket = str(directory / "agent.sock")
        self.environment = dict(os.environ, LD_LIBRARY_PATH=str(HERE / "lib"))
        self.log = open(directory / "agent.log", "wb")
        self.process = subprocess.Popen(
            [HERE / "bin" / "holdfastd", "--socket", self.socket, "--root", directory / "root",
             "--state-directory", directory / "state", "--host-memory", "64MiB"],
            env=self.environment, stdout=self.log, stderr=self.log)
        try:
            until(20, "the agent answers", lambda: self.ask("status", check=False) is not None)
        except Failure:
            self.close()
            raise

    def ask(self, *arguments, check=True):
        """The JSON that `holdfast ARGUMENTS` prints; None if it fails and that is allowed."""
        result = self.run(*arguments)
        if result.returncode != 0:
            if not check:
                return None
            raise Failure(f"holdfast {' '.join(arguments)}: {result.stderr.strip()}")
        return json.loads(result.stdout)

    def run(self, *arguments):
        return subprocess.run([HERE / "bin" / "holdfast", *arguments, "--socket", self.socket],
                              env=self.environment, capture_output=True, text=True, timeout=60)

    def run_offline(self, *arguments):
        return subprocess.run([HERE / "bin" / "holdfast", *arguments], env=self.environment, capture_output=True,
                              text=True, timeout=60)

    def boards(self, job):
        """The living boards of a job by rank."""
        return {board["rank"]: board for board in self.ask("status")["monitor"]
                if board["job"] == job and board["alive"]}

    @contextlib.contextmanager
    def recording(self, path, job):
        """What the analysis is told of a job meanwhile (holdfast monitor record)."""
        recorder = subprocess.Popen(
            [HERE / "bin" / "holdfast", "monitor", "record", path, "--job", job, "--socket", self.socket],
            env=self.environment, stdout=self.log, stderr=self.log)
        try:
            yield
        finally:
            recorder.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                recorder.wait(10)
            recorder.kill()
            recorder.wait()

    def close(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()
        self.log.close()


class Job:
    """Ranks of gpu_check_job.py that share GPU 0."""

    def __init__(self, name, ranks, directory, backend, environment):
        self.name, self.ranks, self.backend = name, ranks, backend
        self.processes, self.commands, self.answers, self.logs = [], [], [], []
        self.partial = {}
        port = str(free_port())
        for rank in range(ranks):
            reading, writing = os.pipe()
            log = open(directory / f"{name}-rank-{rank}.log", "wb")
            # Hosts of their own: NCCL takes no second rank on a GPU of one host before 2.30.
            # Then all of it goes through the network transport and its proxy.
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HOLDFAST_JOB": name,
                   "HOLDFAST_NODE": f"host-{rank}", "NCCL_HOSTID": f"gpu-check-{rank}",
                   "NCCL_DEBUG_FILE": str(directory / f"{name}-rank-{rank}.nccl"),
                   "GPU_CHECK_ANSWERS": str(writing)}
            self.processes.append(subprocess.Popen(
                [sys.executable, str(HERE / "gpu_check_job.py"), "--backend", backend],
                env={**os.environ, **NCCL_ENVIRONMENT, **environment, **own}, stdin=subprocess.PIPE,
                stdout=log, stderr=log, pass_fds=[writing]))
            os.close(writing)
            os.set_blocking(reading, False)
            self.answers.append(reading)
            self.logs.append(log)
            self.partial[rank] = b""

    def tell(self, do, only=None, **members):
        for rank in range(self.ranks) if only is None else only:
            line = json.dumps({"do": do, **members}) + "\n"
            self.processes[rank].stdin.write(line.encode())
            self.processes[rank].stdin.flush()

    def answers_of(self, seconds, only=None):
        """One answer of each rank. Failure: a rank has ended, or does not answer in time."""
        waiting = set(range(self.ranks) if only is None else only)
        found, end = {}, time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for rank in waiting:
                selector.register(self.answers[rank], selectors.EVENT_READ, rank)
            while waiting:
                for rank in sorted(waiting):
                    line, newline, rest = self.partial[rank].partition(b"\n")
                    if newline:
                        self.partial[rank] = rest
                        found[rank] = json.loads(line)
                        waiting.discard(rank)
                        selector.unregister(self.answers[rank])
                if not waiting:
                    break
                left = end - time.monotonic()
                if left <= 0:
                    raise Failure(f"job {self.name}: no answer of ranks {sorted(waiting)}")
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        raise Failure(f"job {self.name}: rank {key.data} ended "
                                      f"({self.processes[key.data].wait()}); see its log")
                    self.partial[key.data] += data
        return found

    def do(self, name, seconds=ANSWER_SECONDS, **members):
        self.tell(name, **members)
        return self.answers_of(seconds)

    def quit(self):
        """As a program ends that is done: communicators are destroyed."""
        self.do("quit", seconds=20)
        for process in self.processes:
            process.stdin.close()
            process.wait(20)
        self.kill()

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reading in self.answers:
            os.close(reading)
        self.answers = []
        for log in self.logs:
            log.close()


class Mps:
    """NVIDIA's Multi-Process Service for the processes that are given its environment: their kernels run side by
    side, not in time slices. Its own pipe, so nobody else's; gone at the end."""

    def __init__(self, directory):
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(directory / "mps"),
                            "CUDA_MPS_LOG_DIRECTORY": str(directory / "mps")}
        (directory / "mps").mkdir()
        if shutil.which("nvidia-cuda-mps-control") is None:
            raise Failure("there is no nvidia-cuda-mps-control here")
        self.control("-d")

    def control(self, *arguments, text=""):
        result = subprocess.run(["nvidia-cuda-mps-control", *arguments], env={**os.environ, **self.environment},
                                input=text, capture_output=True, text=True, timeout=30)
        if result.returncode != 0:
            raise Failure(f"nvidia-cuda-mps-control: {result.stderr.strip()}")

    def close(self):
        with contextlib.suppress(Failure, subprocess.TimeoutExpired):
            self.control(text="quit\n")


NCCL_ENVIRONMENT = {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_ALGO": "RING",
    "NCCL_PROTO": "SIMPLE", "NCCL_MIN_NCHANNELS": "2", "NCCL_MAX_NCHANNELS": "2",
    "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET,PROFILE",
    # A killed rank is to be seen by the monitor, not to end the others.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class Monitor:
    """The plugin in real jobs, watched by an agent of their own."""

    def __init__(self, report, directory, files, arguments):
        self.report = report
        self.rehearse = arguments.rehearse
        self.mps = arguments.mps
        self.backend = "gloo" if arguments.rehearse else "nccl"
        self.directory = directory
        self.files = files    # what is kept
        self.with_itself = 0  # operations of each rank with itself, so far
        self.agent = Agent(directory)

    def plugin(self, level, **more):
        if self.rehearse:
            # Gloo has no plugin to be left out; level off is as near as it gets.
            return {"HOLDFAST_LIBRARY": str(HERE / "lib" / "libholdfast.so"),
                    "PYTHONPATH": str(HERE / "python"), "HOLDFAST_SOCKET": self.agent.socket,
                    "HOLDFAST_MONITOR": level, **more}
        return {"NCCL_PROFILER_PLUGIN": str(HERE / "lib" / "libnccl-profiler-holdfast.so"),
                "HOLDFAST_SOCKET": self.agent.socket, "HOLDFAST_MONITOR": level, **more}

    def start(self, name, counts, environment):
        """A job of as many ranks as NCCL takes."""
        for ranks in counts:
            job = Job(name, ranks, self.files, self.backend, environment)
            try:
                about = job.answers_of(READY_SECONDS)[0]
                self.report.about.update({key: about[key] for key in ("torch", "nccl", "device")})
                return job
            except Failure as failure:
                job.kill()
                self.report.say("note", f"{ranks} ranks on one GPU", str(failure))
            except BaseException:
                job.kill()
                raise
        raise Failure(f"job {name}: NCCL does not start")

    def found(self, job, seconds):
        """What the agent's analysis says, once it says something, in one line. For the record, no check: the job is
        seconds old, so the analysis has little to compare with."""
        def open_findings():
            answer = self.agent.ask("--json", "monitor", "verdicts", "--job", job.name)
            return "; ".join(f"{finding['grade']} {finding['fault']}: {finding['sentence']}"
                             for finding in answer["findings"] if finding.get("state") == "open")
        begin = time.monotonic()
        try:
            text = until(seconds, "the analysis finds something", open_findings)
        except Failure:
            return f"the analysis has found nothing within {seconds} s"
        return f"the analysis after {time.monotonic() - begin:.1f} s: {text}"

    def replayed(self, path):
        """The recording, analysed again as it would be anywhere."""
        result = self.agent.run_offline("--json", "monitor", "replay", path)
        if result.returncode != 0:
            raise Failure(f"replay: {result.stderr.strip()}")
        return f"{path.stat().st_size} bytes; findings {len(json.loads(result.stdout)['findings'])}"

    # ---- What the boards show

    def counters(self, job):
        """Per rank: enqueued, started, finished, over its communicators."""
        boards = self.agent.boards(job.name)
        if len(boards) != job.ranks:
            raise Failure(f"the agent has boards of ranks {sorted(boards)}, expected {job.ranks}")
        return {rank: [sum(c[key] for c in board["communicators"])
                       for key in ("enqueued", "started", "finished")]
                for rank, board in boards.items()}

    def waits_for_peers(self, job, at_least_seconds=0.0):
        """Ranks with a connection that has waited so long for data or credit of a peer."""
        return {rank for rank, board in self.agent.boards(job.name).items()
                if any(board["waits"].get(state, {"longest_seconds": -1.0})["longest_seconds"] >= at_least_seconds
                       for state in PEER_STATES)}

    def keep(self, job, when):
        """What the agent says at this moment, and the boards themselves."""
        directory = self.files / f"{job.name}-{when}"
        directory.mkdir()
        (directory / "status.json").write_text(json.dumps(self.agent.ask("status"), indent=1))
        if not self.rehearse and when in ("slow", "stop", "die"):
            for text_format in ("text", "json"):
                (directory / f"ras.{text_format}").write_text(ask_ras(text_format))
        for rank, process in enumerate(job.processes):
            with contextlib.suppress(OSError):
                for link in sorted(pathlib.Path(f"/proc/{process.pid}/fd").iterdir()):
                    if os.readlink(link).startswith("/memfd:holdfast-monitor"):
                        shutil.copyfile(link, directory / f"board-{rank}.bin")

    # ---- Checks of a job that is watched

    def clean(self, job):
        before = self.counters(job)
        verified = job.do("verify", elements=1 << 20)
        if not all(answer["right"] for answer in verified.values()):
            raise Failure("a sum is wrong")
        seconds = max(answer["seconds"] for answer in job.do("reduce", elements=1 << 20, times=20).values())
        self.seconds_per_operation = seconds / 20
        after = until(5, "every operation has finished", lambda: self.all_finished(job))
        for rank, (enqueued, _, _) in after.items():
            if enqueued - before[rank][0] != 21:
                raise Failure(f"rank {rank}: {enqueued - before[rank][0]} operations on the board, made were 21")
        if self.waits_for_peers(job):
            raise Failure("somebody waits, though all is done")
        self.keep(job, "clean")
        return f"21 all-reduces on every board, all finished; {1e3 * seconds / 20:.2f} ms each"

    def all_finished(self, job):
        """The counters, once all is finished that has a part to be seen: an operation with itself has none, so it
        does not start."""
        counters = self.counters(job)
        done = all(enqueued - self.with_itself == started == finished
                   for enqueued, started, finished in counters.values())
        return counters if done or job.ranks == 1 else None

    def exchange(self, job):
        before = self.counters(job)
        job.do("exchange", elements=1 << 18)
        if not self.rehearse:
            self.with_itself += 2  # of an all-to-all, a send and a receive
        after = until(5, "every operation has finished", lambda: self.all_finished(job))
        added = {rank: after[rank][0] - before[rank][0] for rank in after}
        expected = 0 if self.rehearse or job.ranks == 1 else 2 + 2 * job.ranks
        if set(added.values()) != {expected}:
            raise Failure(f"operations on the board, by rank: {added}, made were {expected}")
        return f"{expected} operations on every board, finished but for a send and a receive of a rank with itself"

    def slow(self, job, rank):
        """A kernel of 4 s in front of one rank's all-reduce: the boards alone say which rank."""
        job.tell("reduce", only=[r for r in range(job.ranks) if r != rank], elements=1 << 20, times=2)
        job.tell("reduce", only=[rank], elements=1 << 20, times=2, sleep_seconds=4.0)
        try:
            until(3.5, f"all but rank {rank} wait for a peer",
                  lambda: self.waits_for_peers(job, 0.5) == set(range(job.ranks)) - {rank})
            self.keep(job, "slow")
            own = self.agent.boards(job.name)[rank]["waits"]
        finally:
            job.answers_of(ANSWER_SECONDS)
        until(5, "every operation has finished", lambda: self.all_finished(job))
        return f"rank {rank} alone waits for no peer; its own waits: {', '.join(own) or 'none'}"

    def graph(self, job):
        before = self.counters(job)
        times, replays = 2, 5
        answer = job.do("graph", elements=1 << 18, times=times, replays=replays)
        after = self.counters(job)
        shown = [after[0][i] - before[0][i] for i in range(3)]
        self.keep(job, "graph")
        return (f"{times} all-reduces captured, {replays} replays, one before: enqueued, started, finished on the "
                f"board {shown}; {1e3 * answer[0]['seconds'] / replays:.2f} ms a replay")

    def stop(self, job, rank):
        times = max(20, int(4.0 / max(self.seconds_per_operation, 1e-4)))
        begun = self.counters(job)[rank][2]
        job.tell("reduce", elements=1 << 20, times=times)
        until(5, "the job runs", lambda: self.counters(job)[rank][2] > begun + 2)
        os.kill(job.processes[rank].pid, signal.SIGSTOP)
        others = set(range(job.ranks)) - {rank}
        try:
            until(6, "all others wait for a peer for 2 s",
                  lambda: self.waits_for_peers(job, 2.0) >= others)
            stopped = pathlib.Path(f"/proc/{job.processes[rank].pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            self.keep(job, "stop")
            waits = {r: board["waits"] for r, board in self.agent.boards(job.name).items()}
            found = self.found(job, 8)
        finally:
            os.kill(job.processes[rank].pid, signal.SIGCONT)
            job.answers_of(ANSWER_SECONDS + 10)
        until(5, "every operation has finished", lambda: self.all_finished(job))
        text = "; ".join(f"{r}: {', '.join(waits[r]) or 'none'}" for r in sorted(waits))
        return f"process state {stopped}; waits by rank: {text}; afterwards all went on and finished; {found}"

    def window(self, job, rank):
        """Records of one rank for a second, asked for from outside."""
        times = max(20, int(2.0 / max(self.seconds_per_operation, 1e-4)))
        job.tell("reduce", elements=1 << 20, times=times)
        try:
            result = self.agent.run("monitor", "window", "--job", job.name, "--rank", str(rank), "--seconds", "1")
        finally:
            job.answers_of(ANSWER_SECONDS)
        if result.returncode != 0:
            raise Failure(result.stderr.strip())
        (self.files / f"{job.name}-window.jsonl").write_text(result.stdout)
        kinds = {}
        *records, whole = [json.loads(line) for line in result.stdout.splitlines()]
        for record in records:
            kinds[record["kind"]] = kinds.get(record["kind"], 0) + 1
        if not records:
            raise Failure("no record")
        return f"{whole['records']} records of rank {rank}, {whole['missed']} missed: {kinds}"

    def die(self, job, rank):
        times = max(20, int(6.0 / max(self.seconds_per_operation, 1e-4)))
        begun = self.counters(job)[rank][2]
        job.tell("reduce", elements=1 << 20, times=times)
        until(5, "the job runs", lambda: self.counters(job)[rank][2] > begun + 2)
        job.processes[rank].kill()

        def dead():
            return [board for board in self.agent.ask("status")["monitor"]
                    if board["job"] == job.name and board["rank"] == rank and not board["alive"]]
        board = until(5, "the agent keeps the board of the dead rank", dead)[0]
        found = self.found(job, 8)
        self.keep(job, "die")
        alive = [r for r, process in enumerate(job.processes) if process.poll() is None]
        waits = {r: list(b["waits"]) for r, b in self.agent.boards(job.name).items()}
        return (f"its board is kept ({', '.join(board['waits']) or 'no waits'}); still there: ranks {alive}; "
                f"waits by rank: {waits}; {found}")

    # ---- The whole of NCCL's calls, to be replayed

    def streams(self, counts):
        directory = self.files / "streams"
        directory.mkdir()
        job = self.start("streams", counts, self.plugin(
            "full", HOLDFAST_PROFILER_CHAIN=str(HERE / "lib" / "libnccl-profiler-recorder.so"),
            HOLDFAST_RECORD_STREAM=str(directory)))
        try:
            job.do("reduce", elements=1_000_000, times=3)
            counters = self.counters(job)
        finally:
            with contextlib.suppress(Failure, subprocess.TimeoutExpired):
                job.quit()
            job.kill()
        starts = {}
        calls = 0
        for path in sorted(directory.glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                call = json.loads(line)
                calls += 1
                if call["call"] == "start":
                    starts[call["type"]] = starts.get(call["type"], 0) + 1
        if not starts:
            raise Failure("the chained recorder saw nothing")
        return f"{job.ranks} ranks, {calls} callbacks; starts by type {starts}; counters {counters[0]}"

    # ---- What it costs

    def cost_with_mps(self, counts):
        mps = Mps(self.directory)
        try:
            return self.cost(counts, "mps-", mps.environment)
        finally:
            mps.close()

    def cost(self, counts, prefix="", more=None):
        """Three jobs at once, of which one runs at a time, in turn: with no plugin, light and full."""
        arms = {}
        try:
            for name, environment in (
                    ("none", self.plugin("off") if self.rehearse else {"NCCL_PROFILER_PLUGIN": "none"}),
                    ("light", self.plugin("light")), ("full", self.plugin("full"))):
                arms[name] = self.start(f"{prefix}cost-{name}", counts, {**environment, **(more or {})})
            details = []
            for elements in (2048, 1 << 20):
                details.append(self.compare(arms, elements, prefix))
            return "; ".join(details)
        finally:
            for job in arms.values():
                job.kill()

    def compare(self, arms, elements, prefix, burst_seconds=0.3, rounds_max=30, seconds=35):
        once = max(a["seconds"] for a in arms["none"].do("reduce", elements=elements, times=20).values()) / 20
        times = max(5, int(burst_seconds / once))
        seconds_of = {name: [] for name in arms}
        enqueue_of = {name: [] for name in arms}
        end = min(self.report.end, time.monotonic() + seconds)
        for turn in range(rounds_max):
            if time.monotonic() > end:
                break
            names = list(arms)
            for name in names[turn % 3:] + names[:turn % 3]:
                answers = arms[name].do("reduce", elements=elements, times=times)
                seconds_of[name].append(max(a["seconds"] for a in answers.values()) / times)
                enqueue_of[name].append(max(a["enqueue_seconds"] for a in answers.values()))
        if not seconds_of["none"]:
            raise Failure("no time left (--seconds)")
        parts = []
        for level in ("light", "full"):
            for what, values in (("time", seconds_of), ("time to enqueue", enqueue_of)):
                ratio, low, high = pairs.paired_ratio(values[level], values["none"])
                base = sorted(values["none"])[len(values["none"]) // 2]
                self.report.rows.append({"processes": "MPS" if prefix else "time slices", "elements": elements, "level": level, "what": what, "ratio": ratio,
                                  "low": low, "high": high, "microseconds_without": 1e6 * base,
                                  "pairs": len(values["none"])})
                parts.append(f"{level} {what} {100 * (ratio - 1):+.2f}% ({100 * (low - 1):+.2f} to "
                             f"{100 * (high - 1):+.2f})")
        return (f"{4 * elements} bytes, {1e6 * once:.0f} us, {len(seconds_of['none'])} pairs of {times}: "
                + ", ".join(parts))

    def event_cost(self):
        plugin = HERE / "lib" / "libnccl-profiler-holdfast.so"
        found = {}
        for mix, caches in (("pipeline", "hot"), ("serial", "hot"), ("polls", "hot"), ("pipeline", "cold")):
            result = subprocess.run([HERE / "bin" / "bench_profiler", plugin, mix, caches], capture_output=True,
                                    text=True, timeout=60, check=True)
            found[f"{mix} {caches}"] = json.loads(result.stdout)["nanoseconds_per_event"]
        self.report.rows.append({"what": "nanoseconds per event", **found})
        return ", ".join(f"{name} {ns:.1f} ns" for name, ns in found.items())

    def watched(self, job, several):
        suspect = job.ranks // 2
        if not self.report.step("clean", lambda: self.clean(job)):
            self.keep(job, "broken")
            return
        self.report.step("a window of records", lambda: self.window(job, 0))
        self.report.step("point-to-point and all-to-all", lambda: self.exchange(job))
        if several:
            self.report.step("a slow kernel", lambda: self.slow(job, suspect))
            self.report.step("SIGSTOP", lambda: self.stop(job, suspect))
        else:
            self.report.say("skipped", "slow kernel, SIGSTOP, SIGKILL",
                     "they show in connections, of which there are none here")
        if not self.rehearse:
            self.report.step("graph capture", lambda: self.graph(job))
        if several:
            self.report.step("SIGKILL", lambda: self.die(job, suspect))

    def run(self):
        self.report.step("an event, driven without NCCL", self.event_cost)
        try:
            job = self.start("watched", (4, 2, 1), self.plugin("light"))
        except Failure as failure:
            self.report.say("FAILED", "NCCL with the plugin", str(failure))
            return
        several = job.ranks > 1
        about = {key: self.report.about[key] for key in ("torch", "nccl", "device")}
        self.report.say("ok", "NCCL with the plugin",
                 f"{about}, {job.ranks} rank{'s, as hosts of their own,' if several else ''} on one GPU; "
                 + ("all through the network transport" if several else "one rank has no connections"))
        recording = self.files / "watched.recording"
        try:
            with self.agent.recording(recording, job.name):
                self.watched(job, several)
        finally:
            job.kill()
        self.report.step("the recording, replayed", lambda: self.replayed(recording))
        counts = (2, 1) if several else (1,)
        if not self.rehearse:
            self.report.step("all callbacks, recorded", lambda: self.streams(counts))
        if self.mps:
            self.report.step("cost, under MPS", lambda: self.cost_with_mps(counts))
        else:
            self.report.step("cost", lambda: self.cost(counts))
