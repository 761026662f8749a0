"""For tests that wait for what another process does."""

import time

TIMEOUT_SECONDS = 120


def wait_until(condition, what):
    """What the condition says once it is true of it; never waits for longer than TIMEOUT_SECONDS."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError('gave up waiting for ' + what)
        time.sleep(0.005)
