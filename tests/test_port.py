"""MASTER_PORT that another program has."""

import os
import socket
import threading

from conftest import ranks, tiny
from training import _fails

from fastdisco import engine
from fastdisco.config import Engine


def taken():
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("", 0))
    listening.listen()
    return listening


def _as_rank_0(port):
    """Without torchrun's store, so that this rank opens the port."""
    os.environ.update(WORLD_SIZE="1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")


def _refused(args):
    other = taken()
    _as_rank_0(port := other.getsockname()[1])
    return port, *_fails(args)


def test_a_port_that_stays_taken_is_one_sentence(folder, tmp_path):
    [(port, code, text)] = ranks(1, _refused, tiny(folder, tmp_path))
    assert code == 2 and text.strip().count("\n") == 0, text
    assert f"MASTER_PORT={port}: another program listens on this port" in text


def _waited(cfg):
    other = taken()
    _as_rank_0(other.getsockname()[1])
    threading.Timer(1.0, other.close).start()
    engine.start(cfg)
    engine.stop()
    return True


def test_a_port_that_is_still_closing_is_waited_for():
    assert ranks(1, _waited, Engine()) == [True]
