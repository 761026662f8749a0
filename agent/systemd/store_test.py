"""What systemd keeps for the agent: images, sessions and ranks live on when both processes die.

Usage: store_test.py HOLDFASTD HOLDFAST DRILL_TRAINER

The test plays systemd: it starts the real holdfastd as the main process of a unit, reads what that
says on its NOTIFY_SOCKET, keeps the descriptors, and gives them to the next process of the unit.
"""
import ctypes
import fcntl
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

HOLDFASTD, HOLDFAST, TRAINER = sys.argv[1:4]
del sys.argv[1:4]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / 'tests' / 'support'))
from waiting import TIMEOUT_SECONDS, wait_until  # noqa: E402  (the path comes first)

JOB = 'job'
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_CHILD_SUBREAPER = 36
KCMP = {'x86_64': 312, 'aarch64': 272}
ENVIRONMENT = ('NOTIFY_SOCKET', 'FDSTORE', 'WATCHDOG_PID', 'WATCHDOG_USEC', 'SYSTEMD_EXEC_PID', 'LISTEN_PID',
               'LISTEN_FDS', 'LISTEN_FDNAMES')


def is_same_file(one, other):
    """As systemd decides whether it has a descriptor already: by kcmp(2); without it by the inode,
    which all pidfds may share."""
    result = LIBC.syscall(KCMP.get(platform.machine(), -1), os.getpid(), os.getpid(), 0, one, other)
    if result >= 0:
        return result == 0

    def inode(fd):
        info = os.fstat(fd)
        pid = [line for line in pathlib.Path('/proc/self/fdinfo/%d' % fd).read_text().splitlines()
               if line.startswith('Pid:')]
        return info.st_dev, info.st_ino, pid

    return inode(one) == inode(other)


def is_alive(pid):
    try:
        stat = pathlib.Path('/proc/%d/stat' % pid).read_text(encoding='utf-8')
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(')', 1)[1].split()[0] not in 'ZX'


class Systemd:
    """The store of one unit, and its notify socket, which is read all the time."""

    def __init__(self, place):
        self.address = str(place / 'notify')
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind(self.address)
        self.descriptors_max = 3000
        self.changed = threading.Condition()
        self.store = []  # (name, descriptor), the newest first
        self.said = []  # what was no descriptor's
        self.problems = []
        self.most = 0
        threading.Thread(target=self.read, daemon=True).start()

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.stop()

    def read(self):
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 8)
            except OSError:
                return
            if not data:
                return
            with self.changed:
                self.take(data.decode(), descriptors)
                self.changed.notify_all()

    def take(self, text, descriptors):
        fields = dict(line.split('=', 1) for line in text.splitlines())
        if 'FDSTORE' in fields:
            if len(descriptors) != 1 or fields.get('FDPOLL') != '0' or not fields.get('FDNAME'):
                self.problems.append((text, len(descriptors)))
            for one in descriptors:
                if len(self.store) >= self.descriptors_max or any(is_same_file(one, kept)
                                                                  for _, kept in self.store):
                    os.close(one)
                else:
                    self.store.insert(0, (fields['FDNAME'], one))
            self.most = max(self.most, len(self.store))
            return
        for one in descriptors:  # of a BARRIER
            os.close(one)
        if 'FDSTOREREMOVE' in fields:
            for name, one in self.store:
                if name == fields['FDNAME']:
                    os.close(one)
            self.store = [entry for entry in self.store if entry[0] != fields['FDNAME']]
        elif 'BARRIER' in fields:
            if text != 'BARRIER=1' or len(descriptors) != 1:
                self.problems.append((text, len(descriptors)))
        self.said.append(text)

    def names(self):
        with self.changed:
            return sorted(name for name, _ in self.store)

    def count(self, text):
        with self.changed:
            return self.said.count(text)

    def stop(self):
        """The unit: nothing is kept."""
        with self.changed:
            for _, one in self.store:
                os.close(one)
            self.store = []


class StoreTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = pathlib.Path(directory.name)
        os.chmod(self.place, 0o700)
        (self.place / 'root').mkdir()
        self.path = self.place / 'agent.sock'
        self.log = self.place / 'log'
        self.systemd = Systemd(self.place)
        self.addCleanup(self.systemd.close)
        # Whoever dies leaves its children to us: none of them is anybody else's.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.processes = []
        self.addCleanup(self.end_everything)
        self.variables = {key: value for key, value in os.environ.items()
                          if not key.startswith('HOLDFAST') and key not in ENVIRONMENT}
        self.variables.update(
            HOLDFAST_SOCKET=str(self.path), HOLDFAST_ROOT=str(self.place / 'root'), HOLDFAST_MONITOR='off',
            HOLDFAST_STATE_DIRECTORY=str(self.place / 'state'), HOLDFAST_HOST_MEMORY='64MiB',
            HOLDFAST_DRAIN_DEADLINE='2s', HOLDFAST_LOG_FILE=str(self.log))

    def end_everything(self):
        for process in self.processes:
            process.kill()
            process.wait()
        # Again and again: somebody may just be starting somebody else.
        while True:
            children = pathlib.Path('/proc/self/task/%d/children' % os.getpid()).read_text().split()
            if not children:
                return
            for child in map(int, children):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    # ---- The unit

    def spawn(self, extra=(), **environment):
        """The unit's main process: what systemd's child does before it becomes ours."""
        with self.systemd.changed:
            given = [*extra, *self.systemd.store]
            pid = os.fork()
            if pid > 0:
                return pid
        try:
            # Out of the way first: the numbers that are given may be somebody else's now.
            high = [fcntl.fcntl(one, fcntl.F_DUPFD, 3 + len(given)) for _, one in given]
            for number, one in enumerate(high, 3):
                os.dup2(one, number)
            os.closerange(3 + len(given), 4096)
            variables = {**self.variables, 'NOTIFY_SOCKET': self.systemd.address,
                         'FDSTORE': str(self.systemd.descriptors_max), 'SYSTEMD_EXEC_PID': str(os.getpid())}
            if given:
                variables.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)),
                                 LISTEN_FDNAMES=':'.join(name for name, _ in given))
            variables.update(environment)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            os.execve(HOLDFASTD, ['holdfastd'], variables)
        finally:
            os._exit(127)

    def start(self, extra=(), **environment):
        """Returns when it is ready: the number of its main process."""
        before = self.systemd.count('READY=1')
        pid = self.spawn(extra, **environment)
        self.until(lambda: self.systemd.count('READY=1') > before or not is_alive(pid), 'READY=1')
        self.assertTrue(is_alive(pid), self.log_text())
        return pid

    def end_of(self, pid):
        """Waits for it: its exit code, or -signal."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def await_lock(self):
        """Until no process of the agent lives."""
        def is_free():
            with open(str(self.path) + '.lock', 'rb') as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            return True
        self.until(is_free, 'the end of both processes')

    def kill_both(self, keeper):
        worker = self.status()['agent']['worker_pid']
        for pid in (keeper, worker):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.assertEqual(pid, worker)  # it dies with its keeper
        self.assertEqual(self.end_of(keeper), -signal.SIGKILL)
        self.await_lock()

    # ---- What is seen

    def until(self, condition, what):
        try:
            return wait_until(condition, what)
        except Exception:
            print(self.log_text(), self.systemd.said[-20:], self.systemd.names(), sep='\n', file=sys.stderr)
            raise

    def log_text(self):
        return self.log.read_text(encoding='utf-8') if self.log.exists() else ''

    def status(self):
        result = subprocess.run([HOLDFAST, 'status', '--json'], env=self.variables, capture_output=True, text=True,
                                timeout=TIMEOUT_SECONDS)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def newest_committed(self):
        jobs = (self.status() or {}).get('jobs', [])
        return jobs[0]['newest_committed']['step'] if jobs and jobs[0].get('newest_committed') else 0

    # ---- Trainers

    def train(self, steps, every, milliseconds=0):
        output = self.place / ('trainer-%d' % len(self.processes))
        with output.open('w') as file:
            process = subprocess.Popen([TRAINER, self.place / 'root', JOB, '0', '1', str(steps), str(every),
                                        str(milliseconds)], env=self.variables, stdout=file,
                                       stderr=subprocess.STDOUT)
        process.output = output
        self.processes.append(process)
        return process

    @staticmethod
    def committed(trainer):
        return max([int(line.split()[1]) for line in trainer.output.read_text().splitlines()
                    if line.startswith('committed ')], default=0)

    # ---- Tests

    def test_an_image_that_only_memory_had_is_committed_and_restored(self):
        # The worker dies when the record says that the whole image is there, before storage has it; the
        # keeper when it is about to start the next one.
        keeper = self.start(HOLDFAST_KILL_AT='keeper.worker_starting:2,capture.sealed')
        trainer = self.train(2, 2)
        self.assertEqual(self.end_of(keeper), -signal.SIGKILL, self.log_text())
        trainer.kill()
        trainer.wait()
        self.await_lock()
        self.assertEqual(list(self.place.rglob('MANIFEST.json')), [])
        names = self.systemd.names()
        self.assertEqual(len(names), len(set(names)), names)
        kinds = {name.split('/')[0] + '/' + name.rsplit('/', 1)[1] for name in names}
        for kind in ('agent/config', 'agent/listener', 'session/identity', 'session/page', 'session/process',
                     'session/document', 'session/memory', 'session/record'):
            self.assertIn(kind, kinds)

        keeper = self.start()
        self.until(lambda: self.newest_committed() == 2, 'the commit of step 2')
        self.assertNotIn('refused', self.log_text())
        trainer = self.train(2, 2)
        self.assertEqual(trainer.wait(TIMEOUT_SECONDS), 0, trainer.output.read_text())
        self.assertIn('restored 2 1\n', trainer.output.read_text())
        os.kill(keeper, signal.SIGTERM)
        self.assertEqual(self.end_of(keeper), 0, self.log_text())
        self.assertEqual(self.systemd.count('STOPPING=1'), 1)
        self.assertEqual(self.systemd.problems, [])

    def test_a_trainer_goes_on_whoever_dies_and_when_the_unit_is_restarted(self):
        keeper = self.start()
        steps = 400
        trainer = self.train(steps, 2, milliseconds=10)
        for step, both in ((4, False), (12, True)):
            self.until(lambda step=step: self.committed(trainer) >= step, 'step %d' % step)
            os.kill(trainer.pid, signal.SIGSTOP)
            worker = self.status()['agent']['worker_pid']
            if both:
                self.kill_both(keeper)
            else:
                os.kill(keeper, signal.SIGKILL)
                self.assertEqual(self.end_of(keeper), -signal.SIGKILL)
                self.until(lambda worker=worker: not is_alive(worker), 'the end of the worker with its keeper')
            keeper = self.start()
            status = self.status()
            self.assertEqual([(one['pid'], one['open']) for one in status['sessions']], [(trainer.pid, True)])
            self.assertEqual((status['agent']['worker_restarts'], status['agent']['keeper_restarts']), (0, 0))
            # A worker alone is its keeper's business.
            os.kill(status['agent']['worker_pid'], signal.SIGKILL)
            self.until(lambda: (self.status() or {'agent': {'worker_restarts': 0}})['agent']['worker_restarts'] == 1,
                       'the next worker')
            os.kill(trainer.pid, signal.SIGCONT)
        self.until(lambda: self.committed(trainer) >= 20, 'step 20')
        os.kill(keeper, signal.SIGTERM)
        # 7: what it had begun to save was not committed; systemd has it.
        self.assertIn(self.end_of(keeper), (0, 7), self.log_text())
        # Whoever connects meanwhile waits for the next one.
        self.assertTrue(self.path.exists())
        self.assertIn('agent/listener', self.systemd.names())
        keeper = self.start()
        self.assertEqual(trainer.wait(TIMEOUT_SECONDS), 0, trainer.output.read_text() + self.log_text())
        self.assertIn('finished %d\n' % steps, trainer.output.read_text())
        self.assertNotIn('trouble', trainer.output.read_text())
        names = self.systemd.names()
        self.assertEqual(len(names), len(set(names)), names)
        # A stop of the unit: systemd forgets everything, and the next agent knows of nothing.
        os.kill(keeper, signal.SIGTERM)
        self.assertEqual(self.end_of(keeper), 0, self.log_text())
        self.systemd.stop()
        self.start()
        self.assertEqual(self.status()['sessions'], [])
        self.assertEqual(self.systemd.problems, [])

    def test_ranks_of_a_run_go_on(self):
        keeper = self.start()
        end = self.place / 'end'
        script = 'echo $$ > %s/pid-$RANK; while [ ! -e %s ]; do sleep 0.05; done' % (self.place, end)
        with (self.place / 'run-output').open('w') as output:
            run = subprocess.Popen([HOLDFAST, 'run', '--nproc-per-node', '2', '--no-python', '--', 'sh', '-c', script],
                                   env={**self.variables, 'HOLDFAST_JOB': JOB}, stdout=output,
                                   stderr=subprocess.STDOUT)
        self.processes.append(run)

        def ranks():
            texts = [path.read_text().strip() for path in sorted(self.place.glob('pid-?'))]
            return [int(text) for text in texts if text]
        pids = self.until(lambda: ranks() if len(ranks()) == 2 else None, 'two ranks')
        for pid in pids:
            variables = pathlib.Path('/proc/%d/environ' % pid).read_bytes().split(b'\0')
            self.assertFalse([one for one in variables if one.split(b'=')[0].decode() in ENVIRONMENT])
        self.kill_both(keeper)
        self.start()
        self.until(lambda: '2 ranks were found' in self.log_text(), 'the ranks')
        self.assertEqual(ranks(), pids)
        self.assertTrue(all(map(is_alive, pids)))
        end.touch()
        self.assertEqual(run.wait(TIMEOUT_SECONDS), 0, (self.place / 'run-output').read_text())

    def test_what_is_not_the_agents_is_refused_by_name(self):
        session = 'session/0000000000000001/'
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.place / 'other'))
        listener.listen()
        self.addCleanup(listener.close)
        files = {}

        def memory(text=b'garbage'):
            one = os.memfd_create('test', os.MFD_ALLOW_SEALING)
            os.write(one, text)
            return one
        plain = os.open(HOLDFASTD, os.O_RDONLY)
        for name, one in (('stored', plain), ('agent/lock', memory()), ('session/UPPER/identity', memory()),
                          (session + 'process', plain), (session + 'page', plain),
                          ('agent/listener', listener.fileno()), ('memory/0000000000000001', memory())):
            files[name] = one
        wrong = list(files.items()) + [('memory/0000000000000001', memory())]
        self.start(extra=wrong)
        log = self.log_text()
        for expected in ('"stored": nothing that the agent keeps is called so',
                         '"agent/lock": nothing that the agent keeps is called so',
                         '"session/UPPER/identity": nothing that the agent keeps is called so',
                         '"%sprocess": expected a pidfd, found mode 100' % session,
                         '"%spage": expected a memfd, found mode 100' % session,
                         'agent/listener: it does not listen on %s' % self.path,
                         '"memory/0000000000000001": another one is called so',
                         'refused all 1 descriptors that systemd has kept'):
            self.assertIn(expected, log)
        for name in files:
            self.assertGreaterEqual(self.systemd.count('FDSTOREREMOVE=1\nFDNAME=' + name), 1, name)
        self.assertEqual(self.systemd.names(), ['agent/config', 'agent/listener'])
        self.assertEqual(self.newest_committed(), 0)

    def test_garbage_in_the_right_place_is_dropped_where_it_is_read(self):
        keeper = self.start()
        self.kill_both(keeper)
        session = 'session/0000000000000001/'

        def memory():
            one = os.memfd_create('test', os.MFD_ALLOW_SEALING)
            os.write(one, b'garbage' * 1000)
            return one
        process = os.pidfd_open(os.getpid())
        names = {session + 'identity': memory(), session + 'page': memory(), session + 'process': process,
                 'session/0000000000000002/identity': memory(), 'memory/0000000000000003': memory(),
                 'agent/monitor/1/board': memory(), 'agent/monitor/1/process-7': process,
                 'agent/monitor/none': memory(), 'agent/monitor/2/process-none': process}
        self.start(extra=list(names.items()))
        status = self.status()
        self.assertEqual(status['sessions'], [])
        self.assertTrue(any('session 1 was dropped' in one for one in status['warnings']), status['warnings'])
        self.assertEqual(self.systemd.names(), ['agent/config', 'agent/listener'])
        # Nor does a configuration that is none bring anything down.
        keeper = int(status['agent']['keeper_pid'])
        self.kill_both(keeper)
        with self.systemd.changed:
            self.systemd.take('FDSTOREREMOVE=1\nFDNAME=agent/config', [])
        self.start(extra=[('agent/config', memory()), ('memory/0000000000000003', memory())])
        self.assertIn('the configuration that systemd has kept: expected a value of roots', self.log_text())

    def test_sessions_keep_their_root_and_block_size(self):
        keeper = self.start()
        trainer = self.train(2, 2)
        self.assertEqual(trainer.wait(TIMEOUT_SECONDS), 0, trainer.output.read_text())
        self.kill_both(keeper)
        (self.place / 'other').mkdir()
        keeper = self.start(HOLDFAST_ROOT=str(self.place / 'other'), HOLDFAST_BLOCK_BYTES='64KiB',
                            HOLDFAST_FLUSH_WRITES='3')
        self.assertIn('not in effect before the unit is stopped and started: roots = %s/other' % self.place,
                      self.log_text())
        agent = self.status()['agent']
        self.assertEqual(agent['root'], str((self.place / 'root').resolve()))
        self.assertEqual(agent['config']['block_bytes']['origin'], 'of the sessions that systemd has kept')
        self.assertEqual(agent['config']['flush_writes']['value'], '3')
        # A configuration that cannot be used keeps systemd trying, not forgetting.
        self.kill_both(keeper)
        self.assertEqual(self.end_of(self.spawn(HOLDFAST_ROOT='relative')), 75)
        self.systemd.stop()
        self.assertEqual(self.end_of(self.spawn(HOLDFAST_ROOT='relative')), 2)

    def test_the_watchdog_and_the_limit_of_the_store(self):
        self.systemd.descriptors_max = 4
        self.start(WATCHDOG_USEC='30000')
        self.until(lambda: self.systemd.count('WATCHDOG=1') >= 3, 'the third answer to the watchdog')
        trainer = self.train(4, 2)
        self.assertEqual(trainer.wait(TIMEOUT_SECONDS), 0, trainer.output.read_text())
        self.assertIn('systemd keeps 4 descriptors for this unit', self.log_text())
        # The last place is only for the next one while it takes the place of another.
        self.assertIn(self.systemd.most, (3, 4))

    def test_another_units_variables_are_not_ours(self):
        keeper = self.spawn(SYSTEMD_EXEC_PID='1')
        self.until(self.status, 'an agent')
        os.kill(keeper, signal.SIGTERM)
        self.assertEqual(self.end_of(keeper), 0, self.log_text())
        self.assertFalse(self.path.exists())
        self.assertEqual(self.systemd.said, [])
        self.assertEqual(self.systemd.names(), [])


if __name__ == '__main__':
    if not hasattr(os, 'pidfd_open'):
        print('skipped: this Python has no os.pidfd_open')
        sys.exit(77)
    unittest.main()
