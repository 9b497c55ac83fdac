"""Commands of kv-trainer, one after another: warm.py JOB.json. Not a test: test_faults.py starts it.

JOB.json: [{"arguments", "output", "largest_file"}]; `output` gets what the command writes to stderr, `output`.status
its exit status. Every command is a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import kv_trainer.run
from kv_trainer.cli import main


def carry_out(job: dict[str, Any]) -> None:
    """In a fork: never returns."""
    code = 1
    try:
        log = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        code = main(job["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    assert kv_trainer.run
    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if not child:
            carry_out(job)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(job["output"] + ".status").write_text(str(status))
