"""Freed memory is kept by the process."""

import json
import platform
import subprocess
import sys

import pytest

from jaxlstm.training import malloc

PROGRAM = """
import json, resource
from concurrent.futures import ThreadPoolExecutor
from jaxlstm.training import malloc

def fetched_bytes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

print(json.dumps([fetched_bytes(), fetched_bytes(), malloc.keep_freed_memory(), fetched_bytes(), fetched_bytes()]))
with ThreadPoolExecutor(1) as pool:
    print(json.dumps([pool.submit(fetched_bytes).result() for _ in range(3)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_keep_freed_memory_avoids_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (first, second, kept, third, fourth), in_thread = map(json.loads, done.stdout.splitlines())
    assert kept is True
    # Pages of 64 MiB; huge pages count as one page fault each.
    assert min(first, second, third) > 2**26 // 1024
    assert fourth < third / 8
    assert in_thread[2] < third / 8  # XLA allocates in threads


def test_keep_freed_memory_reports_systems_without_mallopt(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert malloc.keep_freed_memory() is False
