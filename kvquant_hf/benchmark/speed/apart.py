"""Peak memory of one cache at one context, in a process that does nothing else.

The child loads the model, lets it read a few tokens (so that weights are resident and libraries are set up), and starts
to watch; then it reads the prompt in chunks and decodes a few tokens.  It is given its work as a pickle on stdin and
answers with one line of JSON.
"""

import json
import os
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import torch

from ..contenders import choose
from ..machine import PeakWatch
from ..subject import Load
from .race import Deadline, forward, prefill

WARM_UP_TOKENS, STEPS = 16, 8
# Importing and loading, which the limit of a cell does not count.
LOADING_SECONDS = 300.0
_PROGRAM = "from kvquant_hf.benchmark.speed.apart import main; main()"


class Job(NamedTuple):
    """Work for one child; ``ids`` are those of the prompt, ``cache`` a policy if it is one of ``ours``."""

    load: Load
    dtype: str
    cache: str
    ours: bool
    ids: list[int]
    context: int
    chunk: int
    threads: int
    timeout: float


class Peak(NamedTuple):
    """Bytes above the loaded model, of the process and on the GPU; ``how``: how it was found, or why it was not."""

    peak_bytes: int | None
    how: str
    cuda_peak_bytes: int | None = None


def measure(job: Job) -> Peak:
    """Do the work in this process.

    Raises:
        OSError: the system does not say how much memory a process has.
    """
    torch.set_num_threads(job.threads)
    policies, baselines = ([job.cache], []) if job.ours else ([], [job.cache])
    contender = next(c for c in choose(policies, baselines) if c.name == job.cache)
    model = job.load(job.dtype)
    prompt = torch.tensor([job.ids], device=model.device)
    cuda = model.device.type == "cuda"
    with torch.inference_mode():
        warm = prompt[:, :WARM_UP_TOKENS]
        model(warm, use_cache=False)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with PeakWatch() as watch:
            filled = prefill(model, contender, prompt, job.context, job.chunk, Deadline(job.timeout))
            token = filled.logits.argmax(-1).view(1, 1)
            for _ in range(min(STEPS, job.context - prompt.shape[1])):
                token = forward(model, token, filled.cache).argmax(-1).view(1, 1)
            int(token)
            peak = watch.peak()
    return Peak(peak, watch.how, torch.cuda.max_memory_allocated() - before if cuda else None)


def measure_apart(job: Job) -> Peak:
    """Do the work in a new process; whatever goes wrong there is the answer's reason."""
    if not sys.platform.startswith("linux"):
        return Peak(None, "the peak of a process is measured on Linux only")
    try:
        work = pickle.dumps(job)
    except Exception as error:
        return Peak(None, f"the model cannot be loaded in another process: {error}")
    limit = job.timeout + LOADING_SECONDS
    # -P: the working directory is no place to import from.
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-c", _PROGRAM]
    try:
        done = subprocess.run(command, input=work, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Peak(None, f"took more than {limit:g} s")
    return read_answer(done.returncode, done.stdout, done.stderr)


def read_answer(code: int, out: bytes, err: bytes) -> Peak:
    """What a child's exit status, stdout and stderr say."""
    if code == 0:
        try:
            return Peak(**json.loads(out))
        except (TypeError, ValueError):
            return Peak(None, "its process answered nonsense")
    if code < 0:
        return Peak(None, f"its process was killed by signal {-code}, as happens when memory runs out")
    lines: list[str] = err.decode("utf-8", "replace").strip().splitlines() or ["no message"]
    return Peak(None, lines[-1])


def main() -> None:
    """The child."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the answer
    job: Any = pickle.load(sys.stdin.buffer)
    json.dump(measure(job)._asdict(), answer)
    answer.close()
