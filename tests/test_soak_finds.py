"""What the soak has found (bench/soak.py), each fault as a test of its own."""

import threading
import time

from fastdisco.run import watchdog


def test_two_threads_ask_for_a_file_at_once(monkeypatch):
    """A rank ended with a traceback in start-up: the watchdog's thread and the training's wrote the
    first heartbeat in the same moment."""
    usual, told, errors = threading.Thread.start, [], []

    def slowly(self):
        if self.name == "watchdog's files":
            time.sleep(0.1)
        usual(self)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    bounded = watchdog._Bounded()

    def ask(n):
        try:
            bounded.run(lambda: told.append(n))
        except RuntimeError as e:
            errors.append(e)

    asking = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not errors and told
