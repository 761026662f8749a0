"""Runs of tiny_lm by examples/launch, for the tests: where a job keeps its things, what it printed."""
import json
import os
import pathlib
import subprocess
import tempfile

TIMEOUT_SECONDS = 100


def whole_digests(pieces_of_ranks):
    """(state, tensor): (digest, elements) of the whole tensor. All copies must agree."""
    copies = {}
    for pieces in pieces_of_ranks:
        for piece in pieces:
            key = piece['state'], piece['tensor'], piece['replica']
            digest, count = copies.get(key, (0, 0))
            copies[key] = ((digest + int(piece['digest'], 16)) % 2 ** 64, count + piece['count'])
    whole = {}
    for (state, tensor, replica), found in copies.items():
        if whole.setdefault((state, tensor), found) != found:
            raise AssertionError('copy %d of %s %s: expected %s, found %s' % (
                replica, tensor, state, whole[state, tensor], found))
    return whole


class Run:
    """One job run by examples/launch, with a log directory of its own."""

    def __init__(self, programs, place, name, world, *flags, restarts=0, on_failure='stop', **environment):
        """`programs`: paths of launch, tiny_lm, holdfastd (or None) and the corpus. `on_failure`: launch's."""
        launch, tiny_lm, holdfastd, corpus = programs
        self.logs = pathlib.Path(place, name)
        self.launch_log = pathlib.Path(place, name + '.events')
        variables = {key: value for key, value in os.environ.items()
                     if not key.startswith('HOLDFAST')}
        if holdfastd is None:
            flags = ('--no-holdfast',) + flags
        else:
            variables.update(
                HOLDFAST_JOB='test', HOLDFAST_ROOT=os.path.join(place, 'root'),
                HOLDFAST_RUNTIME_DIR=os.path.join(place, 'run'), HOLDFASTD=holdfastd,
                HOLDFAST_HOST_MEMORY='256MiB', HOLDFAST_LINGER='1s')
        variables.update(environment)
        self.process = subprocess.Popen(
            ['/usr/bin/python3', launch, '--nproc', str(world), '--max-restarts', str(restarts),
             '--on-failure', on_failure, '--log-dir', self.logs, '--events', self.launch_log,
             '--', tiny_lm, '--corpus', corpus, '--check-restore', '--save-wait-ms', '20000', *flags],
            env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True)

    def finish(self):
        _, errors = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return self.process.returncode, errors + self.standard_errors()

    def standard_errors(self):
        return ''.join(path.read_text() for path in sorted(self.logs.rglob('*.err')))

    def events(self, name, restart=0):
        """Events of that name of one start, by rank. Lines that are being written are left out."""
        found = {}
        for path in sorted(self.logs.glob('restart-%d/*.out' % restart)):
            for line in path.read_text().split('\n')[:-1]:
                event = json.loads(line)
                if event['event'] == name:
                    found.setdefault(event['rank'], []).append(event)
        return found

    def starts(self):
        return [event for event in map(json.loads, self.launch_log.read_text().splitlines())
                if event['event'] == 'start']

    def losses(self, restart=0):
        """step: loss, a hexadecimal float. All ranks must agree."""
        losses = {}
        for events in self.events('step', restart).values():
            for event in events:
                assert losses.setdefault(event['step'], event['loss']) == event['loss'], event
        return losses

    def digests(self, name, restart=0):
        """whole_digests() of the events of that name, of which every rank has one."""
        return whole_digests(events[0]['pieces']
                             for events in self.events(name, restart).values())

    def pid(self, rank):
        return [event['pid'] for event in self.starts() if event['rank'] == rank][-1]


def undisturbed_losses(launch, tiny_lm, corpus, steps):
    """The losses of one rank that trains so many steps without Holdfast."""
    with tempfile.TemporaryDirectory() as place:
        run = Run((launch, tiny_lm, None, corpus), place, 'reference', 1, '--steps', str(steps))
        status, errors = run.finish()
        assert status == 0, errors
        losses = run.losses()
    assert sorted(losses) == list(range(1, steps + 1))
    return losses
