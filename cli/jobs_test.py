"""`holdfast` without a verb, and `holdfast why`: what a person sees of real jobs.

Usage: jobs_test.py HOLDFAST HOLDFASTD TINY_LM CORPUS PLUGIN
"""
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import tempfile
import unittest

import run_test
from run_test import HOLDFAST, HOLDFASTD, TINY_LM, CORPUS, Job, wait_until

ASK = """
[recovery]
mode = "ask"
pause_first = "10ms"
"""
NEVER_ENDS = ('--nproc-per-node', '2', '--', TINY_LM, '--corpus', CORPUS, '--save-wait-ms', '20000',
              '--steps', '1000000', '--save-every', '4', '--device-ms', '40')
PHASES = ('detect', 'diagnose', 'wait', 'stop', 'start', 'load', 'step')


class JobsTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = directory.name
        self.addCleanup(run_test.RunCase.end_everything, self)

    def environment(self):
        variables = {key: value for key, value in os.environ.items()
                     if not key.startswith(('HOLDFAST', 'PET_'))}
        variables.update(HOLDFAST_RUNTIME_DIR=self.place + '/run', XDG_STATE_HOME=self.place + '/state',
                         XDG_RUNTIME_DIR=self.place + '/none')
        return variables

    def holdfast(self, *arguments, status=0):
        result = subprocess.run([HOLDFAST, *arguments], env=self.environment(), capture_output=True,
                                text=True, timeout=60)
        self.assertEqual(result.returncode, status, result.stdout + result.stderr)
        return result.stdout if status == 0 else result.stderr

    def agent_socket(self):
        return json.loads(self.holdfast('--json'))['jobs'][0]['agent']

    def until_first_line(self, pattern):
        def look():
            lines = self.holdfast().splitlines()
            match = re.search(pattern, lines[0])
            if match:
                return match, lines
            self.seen = lines
            return None
        try:
            return wait_until(look, pattern)
        except AssertionError as error:
            raise AssertionError('%s; last seen: %s' % (error, self.seen)) from error

    def test_without_a_job_it_says_so(self):
        self.assertEqual(self.holdfast(),
                         'NO JOB. No agent of this user answers on this machine. You: nothing.\n')
        self.assertEqual(json.loads(self.holdfast('--json')),
                         {'schema_version': 1, 'agents': 0, 'jobs': [], 'past': []})
        self.assertIn(self.place, self.holdfast('--socket', self.place + '/none.sock', status=75))
        self.assertIn('no run of this user', self.holdfast('why', status=5))
        self.assertIn('ATTEMPT', self.holdfast('why', '0', status=2))
        # A slip is no job.
        self.assertNotEqual(self.holdfast('statsu', status=2), '')

    def test_a_job_from_its_start_over_a_question_to_its_end(self):
        job = Job(self.place, *NEVER_ENDS, config=ASK)
        _, lines = self.until_first_line(r'^RUNNING [0-9].*\. Step [0-9,]+\. You: nothing\.$')
        self.assertEqual(lines[-1], 'Job test.')
        for slip, why in ((['approve', 'p9'], "now nothing, found 'p9'"), (['veto', ''], "found ''"),
                          (['hold', '721h'], 'at most 720h'), (['hold', 'soon'], 'soon'),
                          (['readmit', '7'], '(GPU 0, GPU 1), or one that was excluded, found GPU 7')):
            self.assertIn(why, self.holdfast(*slip, status=2))
        wait_until(lambda: 'newest checkpoint: step' in self.holdfast(), 'a checkpoint')
        os.kill(wait_until(lambda: job.rank_pid(1), 'the rank'), signal.SIGKILL)
        # State, suspect, loss and human step stand in the first line.
        asked, lines = self.until_first_line(
            r'^WAITING FOR APPROVAL [0-9].* Suspect rank 1 \(GPU 1\), rank 1 .*\. '
            r'Loses .* \((step [0-9,]+|from nothing)\)\. You: (holdfast approve p[0-9]+ --job test)\.$')
        self.assertRegex(lines[1], r'^Why: Rank 1 .*signal 9')
        shown = json.loads(self.holdfast('--json'))['jobs'][0]
        self.assertEqual((shown['state'], shown['you'], shown['supervised']),
                         ('waiting for approval', asked.group(2), True))
        self.assertIn(asked.group(2).split()[2] + ' (Restart in place? ', self.holdfast('veto', 'p77', status=2))
        # It can be copied and run.
        self.holdfast(*shlex.split(asked.group(2))[1:])
        self.until_first_line(r'^RUNNING ')
        wait_until(lambda: re.search(r'Last: rank 1 .* ago: resumed\.', self.holdfast()), 'the first new step')

        why = json.loads(self.holdfast('why', '--json'))
        self.assertEqual(len(why['incidents']), 1)
        incident = why['incidents'][0]
        seconds = incident['seconds']
        self.assertEqual((incident['cause'], incident['outcome'], incident['suspects'][0]['rank']),
                         ('process dead', 'resumed', 1))
        # Every phase was measured, and they add up.
        self.assertAlmostEqual(sum(seconds[phase] for phase in PHASES) + seconds['lost'],
                               seconds['total'], 5)
        for phase in ('wait', 'start', 'load', 'step'):
            self.assertGreater(seconds[phase], 0, seconds)
        self.assertEqual(why['seconds'], seconds)
        text = self.holdfast('why')
        self.assertRegex(text, r'\n +all( +[0-9a-z.]+( s)?){9}\n')
        self.assertRegex(text, r'\nIncident 1, attempt 1, 20.* UTC: rank 1 .*; suspect rank 1 \(GPU 1\)\.\n')
        self.assertRegex(text, r' [0-9.]+ s from its onset to the end of the first new step: detect ')
        print(text)
        self.assertEqual(json.loads(self.holdfast('why', '--json', '1'))['incidents'], why['incidents'])
        self.assertEqual(json.loads(self.holdfast('why', '--json', '2'))['incidents'], [])

        with subprocess.Popen([HOLDFAST, '--watch', '--json'], env=self.environment(),
                              stdout=subprocess.PIPE, text=True) as watch:
            for _ in range(2):
                self.assertEqual(json.loads(watch.stdout.readline())['jobs'][0]['job'], 'test')
            watch.kill()
        self.holdfast('stop')
        self.assertEqual(job.finish()[0], 75)
        # Its agent has gone with it: what has happened is on disk.
        text = wait_until(lambda: (lambda shown: shown.startswith('NO JOB') and shown)(self.holdfast()),
                          'the end of the agent')
        self.assertRegex(text, r'^NO JOB\. .*\n\njob test, .* ago\nGIVEN UP\. Exit code 75: .* '
                               r'You: nothing\.\n$')
        self.assertEqual(json.loads(self.holdfast('why', '--job', 'test', '--json'))['incidents'],
                         why['incidents'])
        self.assertIn('from its onset to the end', self.holdfast('why'))

    def test_every_auto_saves_and_says_why(self):
        config = ASK + 'failure_prior = "2s"\n'
        job = Job(self.place, '--every', 'auto', '--', TINY_LM, '--corpus', CORPUS, '--save-wait-ms', '20000',
                  '--steps', '1000000', '--device-ms', '20', config=config)
        # Assumed is a second a save, and a failure in 2 s: saves come often.
        wait_until(lambda: 'newest checkpoint: step' in self.holdfast(), 'a checkpoint')
        measured = re.compile(r'^every = auto: a save every [0-9,]+ steps .*: a save takes [0-9.]+ s from '
                              r'training, and a failure is expected every .* in 2.00 s assumed\)')
        line = wait_until(lambda: next(filter(measured.match, self.holdfast().splitlines()), None),
                          'what a save takes')
        print(line)
        status = json.loads(self.holdfast('status', '--json', '--socket', self.agent_socket()))
        self.assertRegex(status['jobs'][0]['every'], measured)
        self.holdfast('stop')
        self.assertEqual(job.finish()[0], 75)
        code, _, errors = Job(self.place, '--every', 'often', '--', 'true', HOLDFAST_JOB='other').finish()
        self.assertEqual((code, 'or auto' in errors), (2, True), errors)

    def test_several_jobs_have_a_screen_each_and_no_order_falls_upon_the_wrong_one(self):
        jobs = [Job(self.place, '--', 'sleep', '1000', HOLDFAST_JOB=name) for name in ('one', 'two')]
        shown = wait_until(lambda: (lambda all: len(all['jobs']) == 2 and all)(
            json.loads(self.holdfast('--json'))), 'both jobs')
        self.assertEqual({job['job'] for job in shown['jobs']}, {'one', 'two'})
        self.assertEqual(sorted(re.findall(r'(?m)^job (\w+)\n(?:STARTING|RUNNING) ', self.holdfast())), ['one', 'two'])
        self.assertRegex(self.holdfast('--job', 'two'), r'(?s)^(STARTING|RUNNING) .*\nJob two\.\n$')
        refused = self.holdfast('stop', status=2)
        self.assertIn('one', refused)
        self.assertIn('two', refused)
        for name, job in zip(('one', 'two'), jobs):
            self.holdfast('stop', '--job', name)
            self.assertEqual(job.finish()[0], 75)

    def trainer(self, **variables):
        """A rank that nobody has started but us: under a private agent of its own."""
        variables = dict(self.environment(), HOLDFASTD=HOLDFASTD, HOLDFAST_JOB='solo', RANK='0',
                         LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='1',
                         HOLDFAST_ROOT=self.place + '/root', HOLDFAST_MONITOR='off',
                         HOLDFAST_HOST_MEMORY='256MiB', **variables)
        with open(self.place + '/output', 'w', encoding='utf-8') as output:
            trainer = subprocess.Popen(
                [TINY_LM, '--corpus', CORPUS, '--steps', '1000000', '--save-every', '4',
                 '--device-ms', '20'], env=variables, stdout=output, stderr=output)
        self.addCleanup(trainer.wait)
        self.addCleanup(trainer.kill)
        return trainer

    def test_a_job_of_another_launcher_has_a_screen_too(self):
        trainer = self.trainer()
        _, lines = self.until_first_line(
            r'^RUNNING\. Step [0-9,]+\. Its own launcher restarts it\. You: nothing\.$')
        self.assertRegex(lines[1], r'^Attempt 1, 1 of 1 ranks open here; newest checkpoint: ')
        self.assertIn('The monitor is blind', lines[2])
        trainer.kill()
        self.until_first_line(r'^NOT RUNNING\. No rank is open\. You: nothing\.$')

    def test_of_another_launchers_job_holdfast_explains_what_it_did_and_gives_no_orders(self):
        configuration = self.place + '/holdfast.toml'
        pathlib.Path(configuration).write_text('[recovery]\nhang_timeout = "5s"\nevidence_wait = "1s"\n',
                                               encoding='utf-8')
        variables = {'HOLDFAST_SIDECAR': 'act', 'HOLDFAST_CONFIG': configuration, 'HOLDFAST_LINGER': '1h'}
        trainer = self.trainer(HOLDFAST_ATTEMPT_KEY='run/1', **variables)
        self.until_first_line(r'^RUNNING\. Step [0-9,]+\. Its own launcher restarts it, after a hang because a rank is '
                              r'killed\. You: nothing\.$')
        wait_until(lambda: 'newest checkpoint: step' in self.holdfast(), 'a checkpoint')
        for order in (['stop'], ['save'], ['hold', '1h'], ['approve', 'p1'], ['readmit', '0'],
                      ['stop', '--job', 'solo']):
            self.assertIn('job solo was started by another launcher', self.holdfast(*order, status=1))
        self.assertIn("a checkpoint's directory", self.holdfast('mark-bad', '4', status=1))
        os.kill(trainer.pid, signal.SIGSTOP)
        self.assertEqual(trainer.wait(run_test.TIMEOUT_SECONDS), -signal.SIGKILL)
        # We are the launcher.
        self.trainer(HOLDFAST_ATTEMPT_KEY='run/2', **variables)

        def resumed():
            why = json.loads(self.holdfast('why', '--json'))
            return why['incidents'][-1]['outcome'] == 'resumed' and why
        why = wait_until(resumed, 'the first new step')
        self.assertFalse(why['supervised'])
        seconds = why['incidents'][-1]['seconds']
        self.assertEqual([phase for phase in PHASES if seconds[phase] is None], [], seconds)
        self.assertAlmostEqual(sum(seconds[phase] for phase in PHASES) + seconds['lost'], seconds['total'], 5)
        text = self.holdfast('why')
        self.assertRegex(text, r'^job solo: ')
        self.assertRegex(text, r'\nIncident 1, attempt 1, 20.* UTC: no heartbeat within the time-out\.\n')
        self.assertRegex(text, r'\n  Done: restart in place, from step [0-9,]+, .* done again; resumed\.\n')
        print(text)


if __name__ == '__main__':
    unittest.main()
