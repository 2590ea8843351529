"""What every test runs under: no network, one thread, fixed seeds."""

import gc
import ipaddress
import os
import random
import socket

os.environ["HF_HUB_OFFLINE"] = "0" if "MM_CB_FAKE_HUB" in os.environ else "1"  # see test_hub.py
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["NO_PROXY"] = "127.0.0.1,localhost"  # where stand-ins for servers are
os.environ.pop("MM_CB_API_KEY", None)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files that hold slow tests come first: at the end one worker must not wait for what another has just begun."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Leave what all test files have imported out of every later garbage collection, and collect more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # from 700, 10 and 10: a twentieth of the time


_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _refuse_network(address):
    host = address[0] if isinstance(address, tuple) else None
    if host is None or host == "localhost":
        return  # a Unix socket, or this machine
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise OSError(f"tests have no network: connection to {host!r} refused")


def _guarded(original):
    def connect(self, address):
        _refuse_network(address)
        return original(self, address)

    return connect


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    if request.node.get_closest_marker("network") is None:
        monkeypatch.setattr(socket.socket, "connect", _guarded(_connect))
        monkeypatch.setattr(socket.socket, "connect_ex", _guarded(_connect_ex))


@pytest.fixture(autouse=True)
def fixed_seeds_and_one_thread():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # a demo sets its own; two workers of two threads each wait for each other
