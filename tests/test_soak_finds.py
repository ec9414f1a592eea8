"""What the soak (bench/soak.py) and make fuzz have found, each fault as a test of its own."""

import sys
import threading
import time

import pytest
from conftest import ROOT, run

from fastdisco import models
from fastdisco.config import UserError
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


def test_a_pickle_that_asks_for_a_long_name_is_told_in_a_short_sentence(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(b"\x80\x02c" + b"9" * 5000 + b"\x1b[31m\nx\n.")
    with pytest.raises(UserError, match="its pickle asks for 9999") as e:
        models.read(file)
    assert len(str(e.value)) < 2000 and "\x1b" not in str(e.value)


LEAVES = """
import atexit, sys
from fastdisco.common import leaving
leaving.prepare()
atexit.register(print, "registered later")
class Held:
    def __del__(self):
        print("freed")
held = Held()
sys.stdout.write("buffered ")
sys.exit(leaving.with_code(75))
"""


def test_a_rank_ends_without_freeing_everything_first():
    """After "stopped as asked" a rank took two more seconds of a core, ten times that on a busy one."""
    said = run(sys.executable, "-c", LEAVES, code=75, env={"PYTHONPATH": str(ROOT)})
    assert said == "buffered registered later\n"
    assert "leaving.with_code(main())" in (ROOT / "fastdisco/train.py").read_text()
