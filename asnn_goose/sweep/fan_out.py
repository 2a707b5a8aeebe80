"""Members spread over workers, through submitit: processes of this machine, or Slurm jobs where there is ``srun``.

Workers of this machine: one for each GPU; without one, as many as there are physical cores and WORKER_BYTES of free
memory, each with an equal share of the cores as threads. On two cores two workers of one thread get 1.3 times as much
done as one of two threads. Of Slurm jobs all members are one each; sbatch's own variables, such as SBATCH_PARTITION and
SBATCH_GPUS, say the rest.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
from submitit import AutoExecutor, Job
from submitit.core.utils import FailedJobError, UncompletedJobError, environment_variables

from asnn_goose.errors import UserError
from asnn_goose.sweep.members import Member
from asnn_goose.sweep.progress import Progress
from asnn_goose.sweep.state import Places
from asnn_goose.sweep.work import Session, train_member, work

ROOT = Path(__file__).resolve().parents[2]
WORKER_BYTES = 9 * 2**30
"""Free memory for each worker; versions peak at 7 to 9 GiB of resident pages, stored targets among them (v13: 13)."""
SLURM_CORES, SLURM_GB, SLURM_MINUTES = 4, 16, 24 * 60
YEAR_MINUTES = 365 * 24 * 60
POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Crew(NamedTuple):
    """Who runs the members."""

    cluster: str
    """local or slurm."""
    workers: int
    """Members at a time."""
    threads: int
    """Of each."""
    devices: tuple[str, ...] = ()
    """CUDA devices, each for every len(devices)-th worker."""


def hire(members: Sequence[Member], workers: int | None = None, cluster: str | None = None) -> Crew:
    """As many workers as asked for, or as the module's docstring says, and no more than there are members.

    Raises:
        UserError: Slurm is asked for where there is none.
    """
    if cluster == "slurm" and AutoExecutor.which() != "slurm":
        raise UserError("--cluster slurm: there is no srun here, so drop it, or start the ladder where Slurm is")
    if (cluster or AutoExecutor.which()) == "slurm":
        return Crew("slurm", min(workers or len(members), len(members)), SLURM_CORES)
    on_cpu = all(member.experiment.train.device == "cpu" for member in members)
    devices = () if on_cpu else cuda_devices()
    usable = len(os.sched_getaffinity(0))
    cores = min(psutil.cpu_count(logical=False) or usable, usable)
    room = psutil.virtual_memory().available // WORKER_BYTES
    count = min(workers or len(devices) or max(1, min(cores, room)), len(members))
    return Crew("local", count, max(1, cores // count), devices)


def cuda_devices() -> tuple[str, ...]:
    """Names for CUDA_VISIBLE_DEVICES. A process of its own asks torch, whose memory the workers can use better."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = named.split(",") if named is not None else map(str, range(int(done.stdout)))
    return tuple(names)[: int(done.stdout)]


def fan_out(members: Sequence[Member], places: Places, crew: Crew, session: Session = train_member) -> dict[str, str]:
    """Run members under one progress bar; returns name -> reason of those that failed, which keep no other.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers of this machine have saved what they were at, and have ended;
            Slurm jobs are told to.
    """
    executor = AutoExecutor(places.ladder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}", cluster=crew.cluster)
    executor.update_parameters(
        timeout_min=YEAR_MINUTES, slurm_time=SLURM_MINUTES, slurm_cpus_per_task=SLURM_CORES, slurm_mem_gb=SLURM_GB
    )
    waiting, failed = deque(members), {}
    running: dict[int, tuple[Job[str | None], Member]] = {}
    with _sigterm_as_ctrl_c(), contextlib.closing(Progress(members, places)) as progress:
        try:
            while waiting or running:
                for slot in set(range(crew.workers)) - running.keys():
                    if not waiting:
                        break
                    member = waiting.popleft()
                    device = crew.devices[slot % len(crew.devices)] if crew.devices else None
                    try:
                        with _for_workers(crew.threads):
                            running[slot] = executor.submit(work, member, places, device, session), member
                    except (FailedJobError, OSError) as error:
                        failed[member.name] = f"{crew.cluster} does not take it: {' '.join(str(error).split())}"
                        progress.end(member, failed[member.name])
                time.sleep(POLL_SECONDS)
                progress.look(member for _, member in running.values())
                for slot, (job, member) in list(running.items()):
                    if job.done():
                        del running[slot]
                        reason = _reason(job)
                        if reason is not None:
                            failed[member.name] = reason
                        progress.end(member, reason)
        except KeyboardInterrupt:
            _log.info("stopping %d workers, which save what they are at", len(running))
            _stop([job for job, _ in running.values()], crew.cluster)
            raise
    return failed


@contextlib.contextmanager
def _for_workers(threads: int) -> Iterator[None]:
    """Within it a new process gets its threads, finds the project, and ignores Ctrl-C until it says otherwise."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with environment_variables(OMP_NUM_THREADS=threads, NUMBA_NUM_THREADS=threads, PYTHONPATH=path):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(job: Job[str | None]) -> str | None:
    try:
        reason = job.result()
    except FailedJobError as error:
        reason = f"its process could not begin: {_last_of_trace(str(error))}"
    except UncompletedJobError:
        reason = "its process ended without a result, as it does when memory runs out"
    return None if reason is None else f"{reason} (log: {job.paths.stderr})"


def _last_of_trace(told: str) -> str:
    """The exception in what submitit tells, whose trace stands between two dashed lines."""
    trace = told.partition("---\n")[2].partition("\n---")[0] or told
    return trace.strip().splitlines()[-1]


def _stop(jobs: Sequence[Job[str | None]], cluster: str) -> None:
    """Tell workers to stop, and wait until they have; of Slurm jobs Slurm sees to it."""
    if cluster == "slurm":
        for job in jobs:
            job.cancel(check=False)
        return
    # Said again and again, since a process that is only starting may not hear it.
    while left := [job for job in jobs if not job.done()]:
        for job in left:
            os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(POLL_SECONDS)
