"""Two hosts on this machine: network namespaces joined by a cable. Needs root and `ip`.

Used by test_hosts.py; by hand, `python two_hosts.py COMMAND ...` runs a command on both, {rank} replaced by 0 and 1,
and {address} by that of host 0.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryFile

ADDRESS = "10.213.7.1"


def available() -> bool:
    """Whether this machine lets us make one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"kvprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return made


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """For each host the words to put before a command that is to run there."""
    names, ends = [f"kv{os.getpid()}h{i}" for i in (0, 1)], [f"v{os.getpid()}a", f"v{os.getpid()}b"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, end) in enumerate(zip(names, ends)):
            ip("link", "set", end, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"{ADDRESS[:-1]}{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


HUNG = -signal.SIGABRT


def run_on_both(command: list[str], environment: dict[str, str], seconds: float = 200) -> list[tuple[int, str]]:
    """Exit code and output of a command on each host; {rank} and {address} in its words are replaced.

    A host that has not ended after so many seconds is aborted: its code is HUNG, and its output ends with where every
    thread stood.
    """
    settings = {**environment, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONFAULTHANDLER": "1"}
    with two_hosts() as hosts, ExitStack() as open_files:
        outputs = [open_files.enter_context(TemporaryFile("w+")) for _ in hosts]  # a pipe that is full stops its host
        started = []
        for rank, (prefix, output) in enumerate(zip(hosts, outputs)):
            words = [word.replace("{rank}", str(rank)).replace("{address}", ADDRESS) for word in command]
            started.append(subprocess.Popen([*prefix, *words], env=settings, stdout=output, stderr=subprocess.STDOUT))
        end = time.monotonic() + seconds
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < end:
                time.sleep(0.1)
            codes = [HUNG if process.poll() is None else process.returncode for process in started]
        finally:
            for prefix in hosts:
                abort_all(prefix[-1])
        for process, output in zip(started, outputs):
            process.wait()
            output.seek(0)
        return [(code, output.read()) for code, output in zip(codes, outputs)]


def abort_all(name: str) -> None:
    """Ends what runs in a namespace, workers before the launchers that started them."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in sorted(map(int, pids), reverse=True):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
            time.sleep(1)  # for its words


if __name__ == "__main__":
    for code, output in run_on_both(sys.argv[1:], dict(os.environ)):
        print(f"exit {code}\n{output}")
