#!/usr/bin/python3
"""Other witnesses all the way, with nothing simulated: a ring of tiny_lm ranks with the profiler plugin, a real
agent, one rank that is stopped where its stack shows it, and a line in the file that the agent was given as the
kernel's log. What the witnesses say is in the verdict's evidence, and a replay of the recording says the same.

    live_test.py HOLDFASTD HOLDFAST WITNESS LAUNCH TINY_LM PLUGIN CORPUS
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HOLDFASTD, HOLDFAST, WITNESS, LAUNCH, TINY_LM, PLUGIN, CORPUS = sys.argv[1:8]
RANKS = 4
DEADLINE = 60
# What the analysis needs to have learned before it gives verdicts about standing still.
OPERATIONS = 30


class LiveTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix='hf-witness-')
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.socket = self.directory / 'agent.sock'
        self.log = self.directory / 'agent.log'
        self.kernel_log = self.directory / 'kern.log'
        self.kernel_log.write_text('NVRM: Xid (PCI:0000:3b:00): 79, pid=1, name=x, of long ago\n')
        variables = {name: value for name, value in os.environ.items()
                     if not name.startswith(('HOLDFAST', 'NCCL', 'COLLECTIVES', 'TORCHELASTIC'))}
        self.agent = self.start(
            HOLDFASTD, '--socket', self.socket, '--root', self.directory / 'root', '--state-directory',
            self.directory / 'state', '--log-file', self.log, '--host-memory', '64MiB', '--kernel-log',
            self.kernel_log, '--ras-address', 'off', env=variables)
        self.until('an agent', lambda: self.ask('status') is not None)
        self.recording = self.directory / 'run.hfmr'
        self.recorder = self.start(HOLDFAST, 'monitor', 'record', self.recording, '--socket', self.socket,
                                   stdout=subprocess.DEVNULL, env=variables)
        self.until('a recording', self.recording.exists)
        # Every rank is a node by itself, as in a network namespace of its own.
        self.job = self.start(
            sys.executable, LAUNCH, '--nproc', RANKS, '--run-id', 'live', '--on-failure', 'wait', '--log-dir',
            self.directory / 'logs', '--', 'sh', '-c', 'HOLDFAST_NODE=n$RANK exec "$0" "$@"', TINY_LM, '--corpus',
            CORPUS, '--steps', 1000000, '--device-ms', 100, '--all-reduce', '64K', '--no-holdfast',
            env={**variables, 'HOLDFAST_SOCKET': str(self.socket), 'HOLDFAST_JOB': 'ring',
                 'NCCL_PROFILER_PLUGIN': PLUGIN, 'COLLECTIVES_LOST_PEER': 'hang'})

    def start(self, *command, **options):
        process = subprocess.Popen([*map(str, command)], **options)

        def end():
            process.terminate()
            process.wait(DEADLINE)

        self.addCleanup(end)
        return process

    def until(self, what, holds):
        end = time.monotonic() + DEADLINE
        while not (value := holds()):
            if time.monotonic() > end:
                logs = ''.join(path.read_text()[-2000:] for path in self.directory.rglob('*.err'))
                self.fail(f"{what}: not within {DEADLINE} s\n{self.log.read_text()}\n{logs}\n"
                          f"{self.ask('monitor', 'status')}")
            time.sleep(0.05)
        return value

    def ask(self, *words):
        result = subprocess.run([HOLDFAST, '--json', *words, '--socket', self.socket], capture_output=True, text=True,
                                timeout=DEADLINE, check=False)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def is_watched(self):
        jobs = self.ask('monitor', 'status')['jobs']
        return (jobs and jobs[0]['sight']['whole'] and jobs[0]['world_size'] == RANKS and
                min(one['finished'] for one in jobs[0]['communicators'] or [{'finished': 0}]) >= OPERATIONS)

    def pid_of(self, rank):
        return next(board['process_id'] for board in self.ask('status')['monitor'] if board['rank'] == rank)

    def main_stack(self, pid):
        text = subprocess.run([WITNESS, 'stacks', str(pid)], capture_output=True, text=True, check=True).stdout
        return text[text.index(' main\n'):].split('\nthread ')[0]

    def stop_outside_of_collectives(self, rank):
        """Most of a step is the device's time; the stack says whether it was."""
        pid = self.pid_of(rank)
        for _ in range(100):
            os.kill(pid, signal.SIGSTOP)
            if 'collectives::' not in self.main_stack(pid):
                return pid
            os.kill(pid, signal.SIGCONT)
        self.fail('the rank was always inside a collective')

    def verdict(self, fault):
        return next((one for one in self.ask('monitor', 'verdicts')['findings']
                     if one['grade'] == 'verdict' and one['fault'] == fault), None)

    def verdict_with(self, fault, part):
        """Witnesses may speak behind the verdict: with this part in its evidence."""
        found = self.verdict(fault)
        return found if found and any(part in line for line in found['evidence']) else None

    def test_what_the_witnesses_say_is_evidence(self):
        self.until('operations of all ranks', self.is_watched)
        self.assertEqual(self.ask('monitor', 'verdicts')['findings'], [])

        # One stands elsewhere than the others: its native stack says where.
        pid = self.stop_outside_of_collectives(2)
        found = self.until('a verdict with a stack', lambda: self.verdict_with('stopped', 'stacks: rank 2 stands in '))
        self.assertEqual([one['rank'] for one in found['suspects']], [2])
        stack, = [line for line in found['evidence'] if line.startswith('stacks: ')]
        self.assertIn(f'the {RANKS - 1} others in ', stack)
        # Who could not be heard is said, and why.
        found = self.until('who is absent', lambda: self.verdict_with('stopped', 'ras was not heard on '))
        evidence = '\n'.join(found['evidence'])
        self.assertIn('ras_address = off', evidence)
        self.assertRegex(evidence, r'flight-recorder was not heard on \S+: no process of the job waits')
        # Of a machine without GPUs; with some it is heard.
        witnesses = {one['source']: one for one in self.ask('status')['witnesses']}
        self.assertEqual(set(witnesses), {'flight-recorder', 'stacks', 'ras', 'kernel-log', 'nvml'})
        self.assertEqual('nvml was not heard' in evidence, not witnesses['nvml']['heard'])
        self.assertTrue(witnesses['kernel-log']['heard'])
        explained = subprocess.run([HOLDFAST, 'monitor', 'explain', found['id'], '--socket', self.socket], check=True,
                                   capture_output=True, text=True).stdout
        self.assertIn('stacks: rank 2 stands in ', explained)
        self.assertIn('ras was not heard on ', explained)
        status = subprocess.run([HOLDFAST, 'monitor', 'status', '--socket', self.socket], check=True,
                                capture_output=True, text=True).stdout
        self.assertIn('ras was not heard on ', status)
        os.kill(pid, signal.SIGCONT)

        # The driver's word about a GPU: a verdict at once.
        with self.kernel_log.open('a') as log:
            log.write(f'kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid={self.pid_of(1)}, name=tiny_lm, GPU has fallen '
                      'off the bus.\n')
        fault = self.until('a verdict on the GPU',
                           lambda: self.verdict_with('gpu-fault', 'kernel-log: the driver reported Xid 79'))
        self.assertEqual([one['rank'] for one in fault['suspects']], [1])
        self.assertIn('kernel log: job ring: the driver reported Xid 79', self.log.read_text())

        # The same on another day.
        self.recorder.send_signal(signal.SIGINT)
        self.assertEqual(self.recorder.wait(DEADLINE), 0)
        replayed = json.loads(subprocess.run([HOLDFAST, '--json', 'monitor', 'replay', self.recording], check=True,
                                             capture_output=True, text=True).stdout)
        again = {one['id']: one for one in replayed['findings']}
        self.assertEqual(again[fault['id']]['suspects'], fault['suspects'])
        self.assertIn(stack, again[found['id']]['evidence'])
        self.assertIsNone(self.job.poll())


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
