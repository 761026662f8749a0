"""The HTTP port of a real agent: its pages against the document and the status, and hostile clients
beside a job that saves.

Usage: http_live_test.py HOLDFASTD HOLDFAST TINY_LM CORPUS OPERATING
"""
import http.client
import json
import os
import pathlib
import re
import socket
import stat
import subprocess
import sys
import tempfile
import unittest

from prometheus_client.parser import text_string_to_metric_families

HOLDFASTD, HOLDFAST, TINY_LM, CORPUS, OPERATING = sys.argv[1:6]
del sys.argv[1:6]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'support'))
from waiting import TIMEOUT_SECONDS, wait_until  # noqa: E402  (the path comes first)


class HttpTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = pathlib.Path(directory.name)
        os.chmod(self.place, 0o700)
        self.token_file = self.place / 'state' / 'http-token'

    def environment(self, **more):
        variables = {key: value for key, value in os.environ.items() if not key.startswith('HOLDFAST')}
        variables.update(HOLDFAST_SOCKET=str(self.place / 'agent.sock'),
                         HOLDFAST_ROOT=str(self.place / 'root'), HOLDFAST_MONITOR='off',
                         HOLDFAST_STATE_DIRECTORY=str(self.place / 'state'),
                         HOLDFAST_HOST_MEMORY='256MiB', **more)
        return variables

    def start(self, *flags):
        (self.place / 'root').mkdir(exist_ok=True)
        log = open(self.place / 'log', 'w', encoding='utf-8')
        self.addCleanup(log.close)
        agent = subprocess.Popen([HOLDFASTD, *flags], env=self.environment(), stderr=log)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.terminate)
        return wait_until(self.status, 'an agent')

    def status(self):
        result = subprocess.run([HOLDFAST, 'status', '--json'], env=self.environment(),
                                capture_output=True, text=True, timeout=60)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def get(self, address, path, token=None, method='GET'):
        host, port = address.rsplit(':', 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            connection.request(method, path,
                               headers={'Authorization': 'Bearer ' + token} if token else {})
            response = connection.getresponse()
            return response.status, response.getheader('Content-Type'), response.read().decode()
        finally:
            connection.close()

    def train(self, *flags):
        return subprocess.run(
            [TINY_LM, '--corpus', CORPUS, '--steps', '40', '--save-every', '10', '--save-wait-ms', '20000',
             *flags], capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
            env=self.environment(HOLDFAST_JOB='job', RANK='0', LOCAL_RANK='0', WORLD_SIZE='1',
                                 MASTER_ADDR='127.0.0.1', MASTER_PORT='1'))

    def test_pages_tokens_and_the_document(self):
        agent = self.start('--http', '127.0.0.1:0')['agent']
        self.assertNotIn('http_problem', agent)
        address = agent['http']
        self.assertEqual(stat.S_IMODE(self.token_file.stat().st_mode), 0o600)
        token = self.token_file.read_text(encoding='utf-8').strip()
        self.assertEqual(self.get(address, '/healthz')[::2], (200, 'ok\n'))
        self.assertEqual(self.get(address, '/readyz')[::2], (200, 'ready\n'))
        for path in ('/metrics', '/v1/status'):
            self.assertEqual(self.get(address, path)[0], 401)
            self.assertEqual(self.get(address, path, token[:-1] + 'x')[0], 401)
        self.assertEqual(self.get(address, '/', token)[0], 404)
        trained = self.train()
        self.assertEqual(trained.returncode, 0, trained.stderr)

        def committed():
            jobs = self.status()['jobs']
            return jobs and jobs[0]['newest_committed'] and jobs[0]['newest_committed']['step'] == 40
        wait_until(committed, 'the last commit')
        # An answer may be a second old.
        code, kind, text = wait_until(
            lambda: (lambda got: 'holdfast_job_committed_step{job="job"} 40' in got[2] and got)(
                self.get(address, '/metrics', token)), 'fresh metrics')
        self.assertEqual((code, kind), (200, 'text/plain; version=0.0.4; charset=utf-8'))
        families = {family.name + ('_total' if family.type == 'counter' else ''): family
                    for family in text_string_to_metric_families(text)}
        # Document and output name the same ones.
        document = pathlib.Path(OPERATING).read_text(encoding='utf-8')
        listed = dict(re.findall(r'^\| `(holdfast_\w+)` \| (\w+) \|', document, re.M))
        self.assertEqual({name: family.type for name, family in families.items()}, listed)
        values = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
                  for family in families.values() for sample in family.samples}
        job = (('job', 'job'),)
        self.assertEqual(values['holdfast_agent_ready', ()], 1)
        self.assertEqual(values['holdfast_job_ranks_open', job], 0)
        self.assertEqual(values['holdfast_http_answers_total',
                                (('code', '401'), ('path', '/metrics'))], 2)
        self.assertGreater(values['holdfast_agent_resident_bytes', ()], 1 << 20)
        self.assertEqual(values['holdfast_job_committed_step', job], 40)
        code, kind, text = self.get(address, '/v1/status', token)
        self.assertEqual((code, kind), (200, 'application/json'))
        self.assertEqual(set(json.loads(text)), set(self.status()))
        self.assertEqual(json.loads(text)['agent']['socket'], agent['socket'])

    def test_what_is_wrong_with_it_is_said_and_the_agent_serves_on(self):
        with socket.create_server(('127.0.0.1', 0)) as other:
            taken = '127.0.0.1:%d' % other.getsockname()[1]
            agent = self.start('--http', taken)['agent']
            self.assertEqual(agent['http'], 'off')
            self.assertRegex(agent['http_problem'],
                             r'^http = %s \(flag --http\): .*%s' % (re.escape(taken), re.escape(taken)))
            self.assertIn(agent['http_problem'] + '; the agent serves without it',
                          (self.place / 'log').read_text(encoding='utf-8'))
            trained = self.train()
            self.assertEqual(trained.returncode, 0, trained.stderr)

    def test_a_token_that_others_may_read_is_refused(self):
        self.token_file.parent.mkdir()
        self.token_file.write_text('0123456789abcdef\n', encoding='utf-8')
        self.token_file.chmod(0o644)
        agent = self.start('--http', '127.0.0.1:0')['agent']
        self.assertEqual(agent['http'], 'off')
        self.assertIn('mode 0600', agent['http_problem'])

    def test_hostile_clients_cost_little_and_hold_up_no_save(self):
        status = self.start('--http', '127.0.0.1:0')
        address = status['agent']['http']
        host, port = address.rsplit(':', 1)
        process = pathlib.Path('/proc/%d/status' % status['agent']['worker_pid'])

        def peak():
            return int(re.search(r'VmHWM:\s+(\d+) kB', process.read_text(encoding='utf-8')).group(1)) << 10
        before = peak()
        clients = []
        # Of the 16 that are served at once, twelve that say nothing more.
        for number in range(12):
            clients.append(socket.create_connection((host, int(port)), timeout=60))
            clients[-1].sendall([b'', b'GET /metrics HT'][number % 2])
        # And those that send as much as is taken of them.
        much = 64 << 20
        for start in (b'', b'GET /', b'GET /metrics HTTP/1.1\r\nHost: x\r\nX-Y: ',
                      b'POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n'):
            with socket.create_connection((host, int(port)), timeout=60) as client:
                try:
                    client.sendall(start + b'a' * much)
                except ConnectionError:
                    pass  # it has had enough
        self.assertEqual(self.get(address, '/healthz')[0], 200)
        self.assertLess(peak() - before, much / 4)
        flood = subprocess.Popen(
            [sys.executable, '-c', '''if True:
            import socket, sys
            while True:
                with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as client:
                    try:
                        client.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                        client.settimeout(1)
                        client.recv(100)
                    except OSError:
                        pass
            ''', host, port], stderr=subprocess.DEVNULL)
        self.addCleanup(flood.wait)
        self.addCleanup(flood.kill)
        trained = self.train()
        self.assertEqual(trained.returncode, 0, trained.stderr)
        self.assertEqual(wait_until(lambda: (lambda step: step == 40 and step)(
            (self.status()['jobs'][0]['newest_committed'] or {}).get('step')), 'the last commit'), 40)
        flood.kill()
        for client in clients:
            client.close()
        self.assertEqual(wait_until(lambda: self.get(address, '/healthz'), 'an answer')[0], 200)


if __name__ == '__main__':
    unittest.main()
