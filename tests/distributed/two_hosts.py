"""Two hosts on this machine: network namespaces joined by a cable. Needs root and `ip`.

Used by test_hosts.py; by hand, `python two_hosts.py COMMAND ...` runs a command on both, {rank} replaced by 0 and 1,
and {address} by that of host 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def run_on_both(command: list[str], environment: dict[str, str], seconds: float = 300) -> list[tuple[int, str]]:
    """Exit code and output of a command on each host; {rank} and {address} in its words are replaced."""
    with two_hosts() as hosts:
        started = []
        for rank, prefix in enumerate(hosts):
            words = [word.replace("{rank}", str(rank)).replace("{address}", ADDRESS) for word in command]
            started.append(subprocess.Popen(
                [*prefix, *words], env={**environment, "GLOO_SOCKET_IFNAME": "eth0"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ))  # fmt: skip
        try:
            outputs = [process.communicate(timeout=seconds)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs)]


if __name__ == "__main__":
    for code, output in run_on_both(sys.argv[1:], dict(os.environ)):
        print(f"exit {code}\n{output}")
