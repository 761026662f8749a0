"""`holdfast run` as a person uses it: a job of real ranks, under an agent of its own.

Usage: run_test.py HOLDFAST HOLDFASTD TINY_LM CORPUS PLUGIN

Whoever is killed, the losses are those of an undisturbed run, bit by bit.
"""
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HOLDFAST, HOLDFASTD, TINY_LM, CORPUS, PLUGIN = sys.argv[1:6]
del sys.argv[1:6]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'support'))
from waiting import TIMEOUT_SECONDS, wait_until  # noqa: E402  (the path comes first)

STEPS = 60
SEED = int(os.environ.get('RUN_TEST_SEED', random.randrange(2 ** 32)))
# Many restarts in a row are what is tested here.
RECOVERY = """
[recovery]
max_restarts = 20
restarts_in_window = 64
pause_first = "10ms"
pause_max = "10ms"
"""


def is_alive(pid):
    try:
        stat = pathlib.Path('/proc/%d/stat' % pid).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(')', 1)[1].split()[0] not in 'ZX'


def pids(place, program):
    """Processes of that program whose environment names `place`."""
    found = []
    for entry in pathlib.Path('/proc').iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / 'cmdline').read_bytes().split(b'\0')
            environment = (entry / 'environ').read_bytes()
        except OSError:
            continue
        if os.path.basename(command[0]).decode() == program and str(place).encode() in environment:
            found.append((int(entry.name), command))
    return found


class Job:
    """One run; its checkpoints and logs are below `place`."""

    def __init__(self, place, *flags_and_command, config=RECOVERY, **environment):
        self.place = pathlib.Path(place)
        self.logs = pathlib.Path(tempfile.mkdtemp(dir=place, prefix='logs.'))
        configuration = self.place / 'holdfast.toml'
        configuration.write_text(config)
        variables = {key: value for key, value in os.environ.items()
                     if not key.startswith(('HOLDFAST', 'PET_'))}
        variables.update(
            HOLDFAST_JOB='test', HOLDFAST_ROOT=str(self.place / 'root'),
            HOLDFAST_RUNTIME_DIR=str(self.place / 'run'), HOLDFASTD=HOLDFASTD,
            HOLDFAST_HOST_MEMORY='256MiB', XDG_STATE_HOME=str(self.place / 'state'),
            HOLDFAST_MONITOR='off')
        variables.update(environment)
        self.variables = variables
        # Files, because nobody reads while the test does something else.
        self.output = self.logs / 'output'
        self.errors = self.logs / 'errors'
        with self.output.open('w') as output, self.errors.open('w') as errors:
            self.process = subprocess.Popen(
                [HOLDFAST, 'run', '--config', configuration, '--log-dir', self.logs,
                 *flags_and_command],
                env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)

    def finish(self):
        status = self.process.wait(TIMEOUT_SECONDS)
        return status, self.output.read_text(), self.errors.read_text()

    def log(self, attempt, rank, name='stdout.log'):
        found = list(self.logs.glob('*/attempt_%d/%d/%s' % (attempt, rank, name)))
        return found[0].read_text() if found else ''

    def errors_of_ranks(self):
        return ''.join(path.read_text() for path in sorted(self.logs.rglob('stderr.log')))

    def attempts(self):
        return len(list(self.logs.glob('*/attempt_*')))

    def events(self, name, attempt, rank=0):
        events = []
        for line in self.log(attempt, rank).split('\n')[:-1]:
            event = json.loads(line)
            if event['event'] == name:
                events.append(event)
        return events

    def last_step(self, attempt, rank=0):
        return max((event['step'] for event in self.events('step', attempt, rank)), default=0)

    def losses(self):
        """step: the losses that any rank had for it in any attempt."""
        losses = {}
        for path in self.logs.rglob('stdout.log'):
            for line in path.read_text().split('\n')[:-1]:
                event = json.loads(line)
                if event['event'] == 'step':
                    losses.setdefault(event['step'], set()).add(event['loss'])
        return losses

    def rank_pid(self, rank):
        """The child of the rank's shim; of the newest launch, None while it has none."""
        for path in sorted(self.place.glob('run/*/runs/test/launch-*/rank-%d/shim' % rank))[-1:]:
            try:
                shim = int(path.read_text())
                children = pathlib.Path('/proc/%d/task/%d/children' % (shim, shim)).read_text().split()
            except (FileNotFoundError, ProcessLookupError, ValueError):  # it has gone, or is not there yet
                return None
            return int(children[0]) if children else None
        return None


def tiny_lm(*flags, save_every=4, steps=STEPS):
    return [TINY_LM, '--corpus', CORPUS, '--check-restore', '--save-wait-ms', '20000', '--steps',
            str(steps), '--save-every', str(save_every), *flags]


def slow_at_first(milliseconds, attempts=1):
    """Around a command: steps that the test must not miss are slow, those of the attempts after that are not."""
    return ('sh', '-c', 'ms=5; [ $TORCHELASTIC_RESTART_COUNT -lt %d ] && ms=%d; exec "$@" --device-ms $ms' %
            (attempts, milliseconds), 'sh')


def undisturbed():
    with tempfile.TemporaryDirectory() as place:
        job = Job(place, '--', *tiny_lm('--no-holdfast'))
        status, _, errors = job.finish()
        assert status == 0, errors + job.errors_of_ranks()
        losses = job.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


class RunCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        print('seed %d' % SEED)
        cls.random = random.Random(SEED)
        cls.reference = undisturbed()

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = directory.name
        self.addCleanup(self.end_everything)

    def end_everything(self):
        for _ in range(200):
            left = [pid for name in ('holdfast', 'holdfastd', 'holdfast-shim', 'tiny_lm', 'sh',
                                     'sleep') for pid, _ in pids(self.place, name)]
            if not left:
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)

    def assert_all_gone(self):
        for program in ('tiny_lm', 'holdfast-shim', 'holdfastd'):
            wait_until(lambda program=program: not pids(self.place, program),
                       'the end of ' + program)

    # ---- What a rank finds, and what a person sees


class RunTest(RunCase):
    def test_ranks_find_torchruns_environment(self):
        names = ('RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE '
                 'GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR TORCHELASTIC_RESTART_COUNT '
                 'TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID OMP_NUM_THREADS HOLDFAST_JOB '
                 'HOLDFAST_RUN_ID').split()
        program = self.place + '/show.py'
        pathlib.Path(program).write_text(
            'import json, os, sys\n'
            'print(json.dumps([{n: os.environ.get(n) for n in %r}, os.environ["MASTER_PORT"],\n'
            '      os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]), sys.argv[1:],\n'
            '      os.environ["HOLDFAST_ATTEMPT_KEY"]]))\n'
            'print("an error of", os.environ["RANK"], file=sys.stderr)\n' % names)
        # A launcher's own variables, as in a job inside of another one, must not shine through.
        job = Job(self.place, '--nproc_per_node', '2', '--max-restarts=3', '--rdzv_id', 'me',
                  '--standalone', '--nnodes', '1:1', '--role', 'trainer', '--tee', '1',
                  '--redirects', '0:2', program, '--nproc-per-node', 'x',
                  RANK='77', TORCHELASTIC_RESTART_COUNT='9', GROUP_RANK='5')
        status, output, errors = job.finish()
        self.assertEqual(status, 0, errors)
        lines = sorted(output.splitlines())
        self.assertEqual([line[:11] for line in lines], ['[trainer0]:', '[trainer1]:'])
        shown = [json.loads(line[11:]) for line in lines]
        for rank, (variables, port, _, arguments, key) in enumerate(shown):
            run_id = variables.pop('HOLDFAST_RUN_ID')
            self.assertEqual(variables, {
                'RANK': str(rank), 'LOCAL_RANK': str(rank), 'GROUP_RANK': '0',
                'ROLE_RANK': str(rank), 'ROLE_NAME': 'trainer', 'WORLD_SIZE': '2',
                'LOCAL_WORLD_SIZE': '2', 'GROUP_WORLD_SIZE': '1', 'ROLE_WORLD_SIZE': '2',
                'MASTER_ADDR': '127.0.0.1', 'TORCHELASTIC_RESTART_COUNT': '0',
                'TORCHELASTIC_MAX_RESTARTS': '3', 'TORCHELASTIC_RUN_ID': 'me',
                'OMP_NUM_THREADS': '1', 'HOLDFAST_JOB': 'test'})
            self.assertEqual(port, shown[0][1])
            self.assertEqual(key, run_id + ':1')
            self.assertEqual(arguments, ['--nproc-per-node', 'x'])
        # Of rank 0 standard error is not shown, of rank 1 it is; the logs have both.
        self.assertNotIn('an error of 0', errors)
        self.assertIn('an error of 1', errors)
        self.assertEqual(job.log(0, 0, 'stderr.log'), 'an error of 0\n')
        self.assert_all_gone()

    def test_variables_stand_for_flags_and_what_means_several_nodes_is_refused(self):
        job = Job(self.place, 'sh', '-c', 'echo $RANK of $WORLD_SIZE', PET_NPROC_PER_NODE='3')
        status, output, _ = job.finish()
        self.assertEqual((status, sorted(output.split('\n'))), (0, ['', '0 of 3', '1 of 3', '2 of 3']))
        for flags, words in ((['--nnodes', '2'], 'nnodes'), (['--rdzv-endpoint', 'far:1'], 'far'),
                             (['--rdzv-backend', 'etcd'], 'etcd'), (['--node-rank=1'], 'node-rank'),
                             (['--nproc-per-nod', '2'], 'nproc-per-nod'), (['--tee', '9'], 'tee'),
                             (['-m', '--no-python'], 'no-python'), (['--run_path'], '--run-path: not offered'),
                             (['--numa-binding', 'node'], 'numactl'), (['--shutdown-timeout=-1'], 'shutdown-timeout')):
            status, output, errors = Job(self.place, *flags, 'true').finish()
            self.assertEqual((status, output), (2, ''), errors)
            self.assertIn(words, errors)
        status, _, errors = Job(self.place, 'true', PET_VIRTUAL_LOCAL_RANK='1').finish()
        self.assertEqual(status, 2, errors)
        self.assertIn('--virtual-local-rank: not offered', errors)
        status, _, errors = Job(self.place, '--nproc-per-node', '2', '--').finish()
        self.assertEqual(status, 2)
        self.assertIn('no command', errors)

    def test_the_command_ends_as_the_job_did(self):
        for command, expected in ((['true'], 0), (['sh', '-c', 'exit 93'], 93)):
            status, _, errors = Job(self.place, '--max-restarts', '1', '--', *command).finish()
            self.assertEqual(status, expected, errors)
        # A program that cannot be started, and one that always fails.
        status, _, errors = Job(self.place, '--', self.place + '/none').finish()
        self.assertEqual(status, 93, errors)
        self.assertIn('No such file', errors)
        job = Job(self.place, '--max-restarts', '2', '--', 'sh', '-c', 'exit 7')
        status, _, errors = job.finish()
        self.assertEqual((status, job.attempts()), (1, 3), errors)
        self.assertIn('rank 0 ended with status 7', errors)
        self.assert_all_gone()

    # ---- Deaths

    def test_a_killed_rank_costs_no_step_and_no_bit(self):
        job = Job(self.place, '--nproc-per-node', '4', '--', *slow_at_first(150, 2), *tiny_lm('--zero', '1'))
        for attempt in range(2):
            # From step 6 on everybody has what it was to save of step 4: it comes before the update of step 5.
            at = self.random.randrange(6, 12)
            victim = self.random.randrange(4)
            wait_until(lambda: job.last_step(attempt) >= at * (attempt + 1), 'step %d' % at)
            os.kill(wait_until(lambda: job.rank_pid(victim), 'the rank'), signal.SIGKILL)
            wait_until(lambda: job.attempts() > attempt + 1, 'a restart')
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.attempts(), 3, errors)
        self.assertEqual(job.losses(), self.reference)
        for attempt in (1, 2):
            restored = job.events('restored', attempt)[0]
            self.assertGreater(restored['step'], 0)
        print(''.join(line + '\n' for line in errors.splitlines() if 'is over;' in line), end='')
        self.assert_all_gone()

    def test_a_stopped_rank_is_found_by_the_monitor_and_costs_no_bit(self):
        kernel_log = pathlib.Path(self.place, 'kern.log')
        kernel_log.write_text('of long ago\n')
        job = Job(self.place, '--nproc-per-node', '3', '--', *tiny_lm('--device-ms', '150'),
                  HOLDFAST_MONITOR='light', NCCL_PROFILER_PLUGIN=PLUGIN, HOLDFAST_KERNEL_LOG=str(kernel_log),
                  API_KEY='hush-hush', HOLDFAST_ON_VERDICT='true hush-hush')
        wait_until(lambda: job.last_step(0) >= 20, 'step 20')
        os.kill(wait_until(lambda: job.rank_pid(1), 'the rank'), signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: job.attempts() > 1, 'a restart')
        print('stopped to started again: %.1f s' % (time.monotonic() - stopped))
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.attempts(), 2, errors)
        self.assertEqual(job.losses(), self.reference)
        # What was seen before anything was stopped is kept.
        kept = pathlib.Path(self.place, 'state/holdfast/jobs/test/incidents/1')
        self.assertIn('rank 1', (kept / 'summary.txt').read_text().lower())
        self.assertTrue((kept / 'rank-1.stdout').read_text())
        json.loads((kept / 'status.json').read_text())
        # Where processes may not be looked at, the summary says so.
        self.assertTrue((kept / 'rank-0.stacks').exists() or 'rank-0.stacks: ' in (kept / 'summary.txt').read_text())
        self.assertIn('NCCL_PROFILER_PLUGIN=' + PLUGIN, (kept / 'environment.txt').read_text())
        self.assertEqual([path for path in kept.iterdir() if b'hush-hush' in path.read_bytes()], [])
        self.assertEqual((kept / 'kernel.log').read_text(), 'of long ago\n')
        incident = json.loads((kept / 'incident.json').read_text())
        self.assertEqual((incident['outcome'], [one['rank'] for one in incident['suspects']]), ('resumed', [1]))
        self.show_incident(kept, incident)

    def show_incident(self, kept, incident):
        """One file of it, which says the same elsewhere: with nothing but the file."""
        file = self.place + '/incident'
        environment = {'XDG_STATE_HOME': self.place + '/state', 'PATH': '/usr/bin:/bin'}
        verb = [HOLDFAST, 'incident', 'save', file]
        subprocess.run(verb, env=environment, check=True, stdout=subprocess.DEVNULL)
        self.assertEqual(subprocess.run(verb, env=environment, stderr=subprocess.DEVNULL).returncode, 1)
        self.assertEqual(subprocess.run([*verb[:-1], file + '.2', '2'], env=environment,
                                        stderr=subprocess.DEVNULL).returncode, 5)
        subprocess.run([*verb[:-1], file + '.3', '1', '--job', 'test'], env=environment, check=True,
                       stdout=subprocess.DEVNULL)
        self.assertEqual(pathlib.Path(file).read_bytes(), pathlib.Path(file + '.3').read_bytes())
        shutil.rmtree(kept.parent)
        shown = json.loads(subprocess.run([HOLDFAST, '--json', 'incident', 'show', file], check=True,
                                          capture_output=True, text=True, env={}).stdout)
        self.assertEqual(shown['incident'], incident)
        self.assertEqual((shown['replay']['same'], shown['replay']['trouble']), (True, None))
        found = shown['replay']['finding']
        self.assertEqual((found['id'], found['fault'], [one['rank'] for one in found['suspects']]),
                         (incident['finding'], 'stopped', [1]))
        text = subprocess.run([HOLDFAST, 'incident', 'show', file], check=True, capture_output=True,
                              text=True, env={}).stdout
        self.assertIn('Suspect: rank 1', text)
        self.assertIn('give the same verdict', text)
        pathlib.Path(file).write_bytes(pathlib.Path(file).read_bytes()[:-1])
        self.assertEqual(subprocess.run([HOLDFAST, 'incident', 'show', file], env={}, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL).returncode, 4)

    def test_silence_is_found_without_the_monitor_by_the_time_out(self):
        faults = pathlib.Path(self.place, 'faults')
        faults.write_text('never-enter rank=1 from_step=30\n')
        go = pathlib.Path(self.place, 'go')
        job = Job(self.place, '--nproc-per-node', '2', '--', 'sh', '-c',
                  'if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then exec "$@" --faults %s; fi; '
                  'until [ -e %s ]; do sleep 0.01; done; exec "$@"' % (faults, go), 'sh',
                  *tiny_lm('--device-ms', '20'), config=RECOVERY + 'hang_timeout = "4s"\n')
        wait_until(lambda: 'beyond the time-out of ' in job.errors.read_text(), 'the time-out')
        done = subprocess.run([HOLDFAST, '--json', 'why'], env=job.variables, capture_output=True,
                              text=True, timeout=TIMEOUT_SECONDS)
        go.touch()
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.losses(), self.reference)
        shown = json.loads(done.stdout)['timeouts'][0]
        self.assertEqual(shown['of'], 'heartbeat')
        self.assertGreaterEqual(shown['seconds'], 4)

    def test_a_stopped_rank_that_nobody_watches_is_found_by_the_silence_of_all_and_costs_no_bit(self):
        job = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm('--device-ms', '40'),
                  config=RECOVERY + 'hang_timeout = "3s"\nstop_wait = "500ms"\nevidence_wait = "1s"\n')
        wait_until(lambda: job.last_step(0) >= 10, 'step 10')
        os.kill(wait_until(lambda: job.rank_pid(1), 'the rank'), signal.SIGSTOP)
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.losses(), self.reference)
        self.assertIn(', and as long rank ', errors)
        # Which of them stands nobody can say, and no GPU is to blame. (A machine that itself stands still for so long
        # looks the same.)
        shown = subprocess.run([HOLDFAST, '--json', 'why'], env=job.variables, capture_output=True, text=True,
                               timeout=TIMEOUT_SECONDS)
        incidents = json.loads(shown.stdout)['incidents']
        self.assertEqual({(one['cause'], one['what'], len(one['suspects']), one['action']) for one in incidents},
                         {('hang', 'all ranks silent', 0, 'restart in place')}, incidents)
        self.assertEqual(incidents[-1]['outcome'], 'resumed', incidents)
        self.assertFalse(pathlib.Path(self.place, 'state/holdfast/lemons.json').exists())
        print(errors.splitlines()[-1])

    def test_an_xid_takes_the_gpu_of_its_process_out_of_use_until_it_is_readmitted(self):
        log = pathlib.Path(self.place, 'kernel.log')
        log.write_text('')
        job = Job(self.place, '--nproc-per-node', '2', '--', *slow_at_first(200), *tiny_lm(),
                  config='kernel_log = "%s"\n%scapacity_wait = "1h"\n' % (log, RECOVERY), HOLDFAST_NODE='n1')
        wait_until(lambda: job.last_step(0) >= 10, 'step 10')
        victim = wait_until(lambda: job.rank_pid(1), 'the rank')
        with log.open('a') as lines:
            # Of somebody else's process, and one that says nothing of the GPU.
            lines.write('NVRM: Xid (PCI:0000:5e:00): 79, pid=1, name=init, gone\n')
            lines.write('NVRM: Xid (PCI:0000:3b:00): 43, pid=%d, name=tiny_lm, Ch 1\n' % victim)
            lines.write('NVRM: Xid (PCI:0000:3b:00): 79, pid=%d, name=tiny_lm, GPU has fallen off '
                        'the bus.\n' % victim)
        # There is none in its place.
        step = 'You: holdfast readmit 1 --job test.'
        wait_until(lambda: step in subprocess.run([HOLDFAST], env=job.variables, capture_output=True, text=True,
                                                  timeout=TIMEOUT_SECONDS).stdout, 'a job that waits for a GPU')
        path = pathlib.Path(self.place, 'state/holdfast/lemons.json')

        def lemons():
            return [(lemon['node'], lemon['gpu']) for lemon in json.loads(path.read_text())['lemons']]
        self.assertEqual(lemons(), [('n1', 1)])

        def readmit(gpu):
            done = subprocess.run([HOLDFAST, 'readmit', gpu, '--job', 'test'], env=job.variables,
                                  capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            return done.returncode, done.stderr
        for wrong, why in (('n2/1', 'a node of the job (n1), found n2'), ('n1/', "found 'n1/'"),
                           ('/1', "found '/1'"), ('-1', ''), ('n1/x', "found 'n1/x'")):
            status, errors = readmit(wrong)
            self.assertEqual(status, 2, errors)
            self.assertIn(why, errors)
        self.assertEqual(lemons(), [('n1', 1)])
        self.assertEqual(readmit('n1/1'), (0, ''))
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(lemons(), [])
        self.assertIn('GPU 1: Xid 79', errors)
        self.assertNotIn('GPU 0', errors)
        self.assertEqual(job.losses(), self.reference)

    def test_a_rank_that_ends_while_the_worker_is_dead_is_known_to_have(self):
        job = Job(self.place, '--max-restarts', '0', '--', 'sh', '-c',
                  'echo begun; read line <%s/go; exit 42' % self.place)
        os.mkfifo(self.place + '/go')
        wait_until(lambda: 'begun' in job.log(0, 0), 'the rank')
        workers = [pid for pid, command in pids(self.place, 'holdfastd') if b'--worker' in command]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # it cannot hear of the exit
        pathlib.Path(self.place, 'go').write_text('\n')
        wait_until(lambda: list(pathlib.Path(self.place, 'run').rglob('exit')), 'the record')
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        status, _, errors = job.finish()
        self.assertEqual(status, 1, errors)
        self.assertIn('status 42', errors)

    def test_a_checkpoint_that_crashed_twice_is_not_tried_a_third_time(self):
        # Steps 4 and 8 are on storage.
        before = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm(steps=8))
        status, _, errors = before.finish()
        self.assertEqual(status, 0, errors + before.errors_of_ranks())
        # Whoever begins from step 8 dies, every time.
        faults = pathlib.Path(self.place, 'faults')
        faults.write_text('exit rank=1 status=7 from_step=10\n')
        job = Job(self.place, '--nproc-per-node', '2', '--', 'sh', '-c',
                  'if [ $TORCHELASTIC_RESTART_COUNT -lt 2 ]; then exec "$@" --faults %s; fi; '
                  'exec "$@"' % faults, 'sh', *tiny_lm())
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual([job.events('restored', attempt)[0]['step'] for attempt in range(3)],
                         [8, 8, 4], errors)
        self.assertIn('passed over: step 8 (crashed 2 times)', errors)
        losses = job.losses()
        for step, values in before.losses().items():
            losses.setdefault(step, set()).update(values)
        self.assertEqual(losses, self.reference)

    def test_a_marked_checkpoint_is_not_restored_until_that_is_taken_back(self):
        def verb(*arguments):
            return subprocess.run([HOLDFAST, *arguments], env=job.variables, capture_output=True,
                                  text=True, timeout=TIMEOUT_SECONDS)

        def checkpoints():
            done = verb('--json', 'why')
            return [] if done.returncode != 0 else [
                one['step'] for one in json.loads(done.stdout).get('checkpoints', [])]

        before = job = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm(steps=8))
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        newest = self.place + '/root/test/s000000000008.a0001'
        self.assertEqual(verb('mark-bad', newest, '--reason', 'the loss was NaN').returncode, 0)
        # By its step only of a job that runs, or of one whose agent still lives.
        self.assert_all_gone()
        self.assertEqual(verb('mark-bad', '4').returncode, 5)

        # It saves step 12 and stands still behind it.
        faults = pathlib.Path(self.place, 'faults')
        faults.write_text('never-enter rank=all from_step=14\n')
        job = Job(self.place, '--nproc-per-node', '2', '--', 'sh', '-c',
                  'if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then exec "$@" --faults %s; fi; '
                  'exec "$@"' % faults, 'sh', *tiny_lm(save_every=12))
        wait_until(lambda: 12 in checkpoints(), 'step 12')
        self.assertEqual(job.events('restored', 0)[0]['step'], 4)
        done = verb('mark-bad', '7')
        self.assertEqual(done.returncode, 5)
        self.assertIn('step 7, found as the newest 4, ', done.stderr)
        for flags in (('12',), ('--undo', '12'), ('12', '--reason', 'a spike')):
            done = verb('mark-bad', *flags)
            self.assertEqual(done.returncode, 0, done.stderr)
        os.kill(wait_until(lambda: job.rank_pid(1), 'the rank'), signal.SIGKILL)
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.events('restored', 1)[0]['step'], 4, errors)
        self.assertIn('passed over: step 12 (marked bad)', errors)
        losses = job.losses()
        for step, values in before.losses().items():
            losses.setdefault(step, set()).update(values)
        self.assertEqual(losses, self.reference)

    # ---- Ends that are wanted

    def test_a_signal_saves_and_ends_with_75_and_the_job_goes_on_from_there(self):
        # No save of its own would come before the end.
        job = Job(self.place, '--nproc-per-node', '2', '--',
                  *tiny_lm('--device-ms', '150', save_every=0))
        wait_until(lambda: job.last_step(0) >= 15, 'step 15')
        job.process.send_signal(signal.SIGTERM)
        status, _, errors = job.finish()
        self.assertEqual(status, 75, errors + job.errors_of_ranks())
        ended = job.last_step(0)
        self.assertLess(ended, STEPS)
        self.assert_all_gone()
        again = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm())
        status, _, errors = again.finish()
        self.assertEqual(status, 0, errors + again.errors_of_ranks())
        restored = again.events('restored', 0)[0]['step']
        self.assertGreaterEqual(restored, 15)
        self.assertLessEqual(restored, ended)
        losses = again.losses()
        for step, values in job.losses().items():
            losses.setdefault(step, set()).update(values)
        self.assertEqual(losses, self.reference)

    def test_a_command_that_is_killed_leaves_no_orphans(self):
        job = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm('--device-ms', '40'))
        wait_until(lambda: job.last_step(0) >= 3, 'step 3')
        job.process.kill()
        job.process.wait()
        self.assert_all_gone()


# A death every step or two, for a whole training: a minute or more, so scripts/nightly's.
class AgentDeathsTest(RunCase):
    def test_deaths_of_worker_and_keeper_lose_no_step_and_no_exit(self):
        job = Job(self.place, '--nproc-per-node', '2', '--', *tiny_lm('--device-ms', '40'))
        killed = set()

        def agent():
            """The pids of each role, once there are both: one death at a time is what is promised."""
            found = {b'--worker': [], b'--keeper': []}
            for pid, command in pids(self.place, 'holdfastd'):
                # The first keeper has other arguments.
                found[b'--worker' if b'--worker' in command else b'--keeper'].append(pid)
            return found if all(found.values()) else None

        while job.process.poll() is None and job.last_step(0) < STEPS - 5:
            for role in self.random.sample([b'--worker', b'--keeper'], 2):
                there = wait_until(lambda: agent() or job.process.poll() is not None, 'the agent')
                if job.process.poll() is not None:
                    break
                for pid in there[role]:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(role)
                step = job.last_step(0)
                wait_until(lambda: job.last_step(0) > step or job.process.poll() is not None,
                           'the next step')
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(killed, {b'--worker', b'--keeper'})
        self.assertEqual(job.attempts(), 1, errors)
        self.assertEqual(job.losses(), self.reference)


# Runs of a job, one for each instant: two minutes or more, so scripts/nightly's.
class KillPointsTest(RunCase):
    """The worker dies at each named instant (base/kill_point.h) of the first attempt, of its end, or of
    the second one, whichever comes to it first."""
    # What every such run must come to, or nothing was shown.
    MET = {'worker.started', 'worker.recovered', 'request.received', 'reply.sending', 'reply.sent',
           'open.attempt_begun', 'open.session_made', 'register.memory_made', 'capture.begun',
           'capture.sealed', 'flush.durable', 'commit.manifest_durable', 'commit.reported',
           'restore.point_decided', 'restore.planned', 'restore.ended', 'run.launch_starting',
           'run.rank_started'}

    def test_a_worker_that_dies_anywhere_costs_no_step_and_no_bit(self):
        header = pathlib.Path(__file__).resolve().parent.parent / 'base' / 'kill_point.h'
        points = [line.split('"')[1] for line in header.read_text().splitlines()
                  if line.startswith('    "') and '.' in line.split('"')[1]]
        self.assertGreater(len(points), 30)
        met = set()
        for point in points:
            if point.startswith('keeper.'):
                continue
            with self.subTest(point), tempfile.TemporaryDirectory() as place:
                self.place = place
                met |= {point} if self.dies_at(point) else set()
                self.end_everything()
        print('not met: ' + ', '.join(sorted(set(points) - met)))
        self.assertLessEqual(self.MET, met)

    def dies_at(self, point):
        faults = pathlib.Path(self.place, 'faults')
        faults.write_text('exit rank=1 status=7 from_step=10\n')
        job = Job(self.place, '--nproc-per-node', '2', '--', 'sh', '-c',
                  'if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then exec "$@" --faults %s; fi; '
                  'exec "$@"' % faults, 'sh', *tiny_lm(), HOLDFAST_KILL_AT=point)
        status, _, errors = job.finish()
        self.assertEqual(status, 0, errors + job.errors_of_ranks())
        self.assertEqual(job.attempts(), 2, errors)
        self.assertEqual(job.losses(), self.reference)
        self.assertGreater(job.events('restored', 1)[0]['step'], 0)
        logs = ''.join(log.read_text() for log in pathlib.Path(self.place).rglob('agent.log'))
        return 'kill point %s reached' % point in logs


if __name__ == '__main__':
    unittest.main()
