"""Freed memory that stays with the process."""

import json
import platform
import subprocess
import sys

import pytest

from jaxlstm.training import malloc

PROGRAM = """
import json, resource
from concurrent.futures import ThreadPoolExecutor
from jaxlstm import memory

def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

print(json.dumps([touched(), touched(), malloc.keep_freed(), touched(), touched()]))
with ThreadPoolExecutor(1) as pool:
    print(json.dumps([pool.submit(touched).result() for _ in range(3)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_freed_memory_is_not_fetched_again():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (first, second, kept, third, fourth), elsewhere = map(json.loads, found.stdout.splitlines())
    assert kept is True
    # Pages of 64 MiB, unless the system hands out huge ones, which count as one each.
    assert min(first, second, third) > 2**26 // 1024
    assert fourth < third / 8
    assert elsewhere[2] < third / 8  # in another thread, as XLA's are


def test_other_systems_have_no_such_choice(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert malloc.keep_freed() is False
