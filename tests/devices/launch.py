"""A program of this folder in two processes that talk to each other, as ``torchrun`` starts them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PROCESSES = 2
LIMIT = 240  # seconds, on a machine that does other things too


def torchrun(program: str, *arguments: str | Path) -> str:
    """Run ``tests/devices/<program>`` in ``PROCESSES`` processes on this machine's CPU; the port is a free one.

    Returns:
        What they printed, errors included.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, f"--nproc-per-node={PROCESSES}", TESTS / "devices" / program, *arguments]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        start_new_session=True,  # a group of its own, so that no process of it is left
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-4000:]
    return output
