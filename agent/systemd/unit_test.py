"""systemd understands the unit that is installed, and warns of nothing in it.

Usage: unit_test.py UNIT HOLDFASTD
"""
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

UNIT, HOLDFASTD = sys.argv[1:3]
SKIPPED = 77


def verify(text):
    """What systemd-analyze has to say about `text` as our unit."""
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place, 'holdfastd@.service')
        path.write_text(text, encoding='utf-8')
        result = subprocess.run(['systemd-analyze', 'verify', '--man=no', path], capture_output=True,
                                text=True, timeout=120)
    said = [line for line in (result.stdout + result.stderr).splitlines() if 'holdfastd@' in line]
    return result.returncode, said


def main():
    if shutil.which('systemd-analyze') is None:
        print('skipped: there is no systemd-analyze here')
        return SKIPPED
    text = pathlib.Path(UNIT).read_text(encoding='utf-8')
    # The program is looked for where it will be installed: here it is not.
    text, count = re.subn(r'(?m)^ExecStart=\S+/holdfastd ', 'ExecStart=%s ' % HOLDFASTD, text)
    assert count == 1, 'expected one ExecStart of holdfastd in ' + UNIT
    code, said = verify(text)
    assert code == 0 and not said, said
    # It would have found a slip.
    for old, new in (('KillMode=process', 'KillMode=proces'), ('LimitNOFILE=', 'LimitNOFILES='),
                     (HOLDFASTD, HOLDFASTD + '-none')):
        assert old in text, old
        code, said = verify(text.replace(old, new))
        assert code != 0 or said, 'nothing was said about ' + new
    settings = dict(re.findall(r'(?m)^(\w+)=(.*)$', text))
    store = settings['FileDescriptorStoreMax']
    assert 'Environment=FDSTORE=%s\n' % store in text, 'FDSTORE is not FileDescriptorStoreMax, %s' % store
    # What the agent's promises rest upon.
    expected = {'Type': 'notify', 'NotifyAccess': 'all', 'TimeoutStartSec': 'infinity',
                'User': '%i', 'KillMode': 'process', 'RuntimeDirectoryMode': '0700', 'UMask': '0077',
                'RuntimeDirectoryPreserve': 'yes', 'Restart': 'always', 'LimitMEMLOCK': 'infinity', 'OOMPolicy': 'continue'}
    found = {key: settings.get(key) for key in expected}
    assert found == expected, found
    return 0


if __name__ == '__main__':
    sys.exit(main())
