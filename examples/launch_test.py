#!/usr/bin/python3
"""What examples/launch promises, with small ranks written in Python.

Usage: launch_test.py LAUNCH
"""
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

LAUNCH = sys.argv.pop(1)
TORCHRUN = ('LOCAL_RANK RANK GROUP_RANK ROLE_RANK LOCAL_WORLD_SIZE WORLD_SIZE ROLE_WORLD_SIZE '
            'MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS '
            'TORCHELASTIC_RUN_ID').split()
PREFIX = 'import json, os, signal, sys; rank = int(os.environ["RANK"]); '
PREFIX += 'restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])\n'


class LaunchTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.events_path = os.path.join(self.directory.name, 'events')

    def command(self, body, *flags):
        return ['/usr/bin/python3', LAUNCH, '--events', self.events_path, *flags, '--',
                '/usr/bin/python3', '-c', PREFIX + body]

    def run_ranks(self, body, *flags):
        return subprocess.run(self.command(body, *flags), capture_output=True, text=True,
                              timeout=120)

    def events(self):
        with open(self.events_path) as file:
            return [json.loads(line) for line in file]

    def test_ranks_get_torchruns_variables(self):
        result = self.run_ranks('print(json.dumps(dict(os.environ)))', '--nproc', '3')
        self.assertEqual(result.returncode, 0, result.stderr)
        environments = {}
        for line in result.stdout.splitlines():
            rank, text = line.split(' ', 1)
            environments[rank] = json.loads(text)
        self.assertEqual(sorted(environments), ['[0]', '[1]', '[2]'])
        for label, environment in environments.items():
            self.assertEqual('[%s]' % environment['RANK'], label)
            self.assertEqual(environment['LOCAL_RANK'], environment['RANK'])
            self.assertEqual(environment['WORLD_SIZE'], '3')
            self.assertLessEqual(set(TORCHRUN), set(environment))
        for name in ('MASTER_PORT', 'TORCHELASTIC_RUN_ID'):
            self.assertEqual(len({e[name] for e in environments.values()}), 1)

    def test_a_port_that_is_given_is_told_to_all(self):
        result = self.run_ranks('print(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])',
                                '--nproc', '2', '--master-addr', '192.0.2.1', '--master-port', '1234')
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(sorted(result.stdout.splitlines()),
                         ['[0] 192.0.2.1 1234', '[1] 192.0.2.1 1234'])

    def test_one_failure_restarts_all_ranks(self):
        result = self.run_ranks(
            'if restart < 2 and rank == 1: sys.exit(3)\n'
            'if restart < 2: signal.pause()\n', '--nproc', '3', '--max-restarts', '2')
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn('rank 1 ended with status 3', result.stderr)
        starts = [e for e in self.events() if e['event'] == 'start']
        exits = [e for e in self.events() if e['event'] == 'exit']
        self.assertEqual([(e['restart'], e['rank']) for e in starts],
                         [(restart, rank) for restart in range(3) for rank in range(3)])
        self.assertEqual(len({e['run_id'] for e in starts}), 1)
        self.assertEqual(len(exits), 9)
        for event in exits:
            if event['restart'] == 2:
                self.assertEqual(event['status'], 0)
            elif event['rank'] == 1:
                self.assertEqual((event['status'], event['stopped']), (3, False))
            else:
                self.assertEqual((event['signal'], event['stopped']), ('SIGTERM', True))

    def test_without_restarts_left_it_fails_and_nobody_survives(self):
        result = self.run_ranks(
            'if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n'
            'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
            'while True: signal.pause()\n', '--nproc', '3', '--term-timeout', '0.2')
        self.assertEqual(result.returncode, 1)
        self.assertIn('rank 2 ended with signal SIGKILL', result.stderr)
        exits = {e['rank']: e for e in self.events() if e['event'] == 'exit'}
        self.assertEqual({e['signal'] for e in exits.values()} - {'SIGTERM'}, {'SIGKILL'})
        self.assertEqual(len(exits), 3)

    def test_on_failure_wait_leaves_the_others_alone(self):
        body = ('if rank == 1: sys.exit(3)\n'
                'while "exit" not in open(%r).read(): pass\n'  # written when rank 1 has ended
                'print("done")\n' % self.events_path)
        result = self.run_ranks(body, '--nproc', '3', '--on-failure', 'wait')
        self.assertEqual(result.returncode, 1)
        self.assertEqual(sorted(result.stdout.splitlines()), ['[0] done', '[2] done'])
        self.assertEqual({(e['rank'], e['status'], e['stopped']) for e in self.events()
                          if e['event'] == 'exit'}, {(0, 0, False), (1, 3, False), (2, 0, False)})

    def test_logs_are_kept_per_restart_and_rank(self):
        logs = os.path.join(self.directory.name, 'logs')
        result = self.run_ranks(
            'print("out", rank, restart); print("err", rank, file=sys.stderr); sys.stdout.flush()\n'
            'sys.exit(restart == 0)', '--nproc', '1', '--max-restarts', '1', '--log-dir', logs)
        self.assertEqual(result.returncode, 0, result.stderr)
        for restart in range(2):
            stem = os.path.join(logs, 'restart-%d' % restart, 'rank-0')
            with open(stem + '.out') as out, open(stem + '.err') as err:
                self.assertEqual(out.read(), 'out 0 %d\n' % restart)
                self.assertEqual(err.read(), 'err 0\n')

    def start_and_wait_for_ranks(self):
        process = subprocess.Popen(
            self.command('print(os.getpid(), flush=True)\nwhile True: signal.pause()\n',
                         '--nproc', '2'), stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        return process, [os.pidfd_open(pid) for pid in pids]

    def assert_ranks_end(self, pidfds):
        for pidfd in pidfds:
            self.assertTrue(select.select([pidfd], [], [], 120)[0], 'a rank lives on')
            os.close(pidfd)

    def test_ranks_end_with_a_launcher_that_is_killed(self):
        process, pidfds = self.start_and_wait_for_ranks()
        process.kill()
        process.wait()
        self.assert_ranks_end(pidfds)

    def test_a_launcher_that_is_terminated_stops_its_ranks_and_says_so(self):
        process, pidfds = self.start_and_wait_for_ranks()
        process.terminate()
        self.assertEqual(process.wait(120), 128 + signal.SIGTERM)
        self.assert_ranks_end(pidfds)
        exits = [e for e in self.events() if e['event'] == 'exit']
        self.assertEqual([e['stopped'] for e in exits], [True, True])

    # ---- What the agent is told (docs/MONITOR.md)

    HEADER = struct.Struct('<IHHII')
    EXIT = struct.Struct('<136s256s136sIIIiII')

    def listen(self, answer=True):
        """A listener where the agent would be: its path, and what it was told, once the launcher is over."""
        path = os.path.join(self.directory.name, 'agent.sock')
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(listener.close)
        place = os.open(self.directory.name, os.O_PATH)
        listener.bind('/proc/self/fd/%d/agent.sock' % place)
        os.close(place)
        listener.listen()
        told, open_ones = [], []

        def serve():
            while True:
                connection, _ = listener.accept()
                open_ones.append(connection)
                message = connection.recv(4096)
                if message == b'end':
                    return
                told.append(message)
                if answer:
                    connection.send(b'a reply')

        thread = threading.Thread(target=serve)
        thread.start()

        def finish():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                place = os.open(path, os.O_PATH)
                end.connect('/proc/self/fd/%d' % place)
                os.close(place)
                end.send(b'end')
            thread.join()
            for connection in open_ones:
                connection.close()
            return told

        return path, finish

    def parse(self, message):
        magic, version, kind, request, size = self.HEADER.unpack_from(message)
        self.assertEqual((magic, version, kind, request), (0x31464c48, 3, 16, 1))
        self.assertEqual(size, self.EXIT.size)
        self.assertEqual(len(message), self.HEADER.size + self.EXIT.size)
        job, key, node, rank, world, pid, status, stopped, reserved = self.EXIT.unpack_from(
            message, self.HEADER.size)
        self.assertEqual(reserved, 0)
        return {'job': job.rstrip(b'\0'), 'key': key.rstrip(b'\0'), 'node': node.rstrip(b'\0'),
                'rank': rank, 'world': world, 'pid': pid, 'status': status, 'stopped': stopped}

    def run_told(self, body, path, *flags, **variables):
        return subprocess.run(
            self.command(body, *flags), capture_output=True, text=True, timeout=120,
            env={**os.environ, 'HOLDFAST_SOCKET': path, **variables})

    def test_the_agent_is_told_how_each_rank_ended(self):
        path, finish = self.listen()
        pipe = os.path.join(self.directory.name, 'pipe')
        os.mkfifo(pipe)
        result = self.run_told(
            # The kernel closes rank 0's end of the pipe when it ends: rank 1 fails behind that.
            'if rank == 0: os.open(os.environ["PIPE"], os.O_WRONLY); sys.exit(0)\n'
            'if rank == 1:\n'
            '    open(os.environ["PIPE"]).read()\n'
            '    os.kill(os.getpid(), signal.SIGSEGV)\n'
            'signal.pause()\n', path, '--nproc', '3', '--run-id', 'run', HOLDFAST_JOB='a-job',
            HOLDFAST_NODE='n7', PIPE=pipe)
        self.assertEqual(result.returncode, 1)
        told = {exit['rank']: exit for exit in map(self.parse, finish())}
        pids = {e['rank']: e['pid'] for e in self.events() if e['event'] == 'start'}
        self.assertEqual(sorted(told), [0, 1, 2])
        for rank, exit in told.items():
            self.assertEqual(exit['pid'], pids[rank])
            self.assertEqual((exit['job'], exit['key'], exit['node'], exit['world']),
                             (b'a-job', b'run:0', b'n7', 3))
        self.assertTrue(os.WIFEXITED(told[0]['status']))
        self.assertEqual((os.WTERMSIG(told[1]['status']), told[1]['stopped']),
                         (signal.SIGSEGV, 0))
        self.assertEqual((os.WTERMSIG(told[2]['status']), told[2]['stopped']),
                         (signal.SIGTERM, 1))

    def test_an_attempt_key_of_its_own_and_a_private_agents_place_are_used(self):
        # FNV-1a-64 of "a", as hook/settings.cc names the directory.
        directory = os.path.join(self.directory.name, 'af63dc4c8601ec8c')
        path, finish = self.listen()
        os.mkdir(directory)
        os.symlink(path, os.path.join(directory, 'agent.sock'))
        result = self.run_told('sys.exit(3)', '', '--nproc', '1', HOLDFAST_JOB='a',
                               HOLDFAST_RUNTIME_DIR=self.directory.name,
                               HOLDFAST_ATTEMPT_KEY='mine')
        self.assertEqual(result.returncode, 1)
        told = [self.parse(message) for message in finish()]
        self.assertEqual([(exit['key'], os.WEXITSTATUS(exit['status'])) for exit in told],
                         [(b'mine', 3)])

    def test_an_agent_that_does_not_answer_holds_up_for_two_seconds_altogether(self):
        path, finish = self.listen(answer=False)
        result = self.run_told('pass', path, '--nproc', '4')
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len(finish()), 1)  # whoever was silent once is not asked again, 4 times 2 s

    def test_a_command_that_is_missing_is_an_error(self):
        result = subprocess.run(['/usr/bin/python3', LAUNCH, '--nproc', '1', '--', '/nowhere/cmd'],
                                capture_output=True, text=True, timeout=120)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn('/nowhere/cmd', result.stderr)


if __name__ == '__main__':
    unittest.main()
