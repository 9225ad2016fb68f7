# After any end - Ctrl-C, SIGTERM, SIGKILL, a power cut - no job is left, and the same command goes on.
import contextlib
import os
import platform
import signal
import threading
import time

import psutil
from snakemake.dag import DAG

os.environ["PACT_OFFLINE_ENDS_WITH"] = str(os.getpid())  # a job ends when this process is gone
check_incomplete = DAG.check_incomplete


async def make_anew_what_is_incomplete(dag):
    """What a killed job has left is made anew, as with --rerun-incomplete, and not asked about.

    The settings that say so are not there yet when a Snakefile is read."""
    dag.workflow.dag_settings.force_incomplete = True
    await check_incomplete(dag)


DAG.check_incomplete = make_anew_what_is_incomplete


def jobs_among(processes):
    """Those that run this project's command line."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "pact_offline" in process.cmdline():
                yield process


def jobs_left():
    """Jobs in this directory whose Snakemake is gone."""
    for job in jobs_among(psutil.process_iter()):
        with contextlib.suppress(psutil.Error, ValueError):
            owner = job.environ().get("PACT_OFFLINE_ENDS_WITH", "")
            if owner and job.cwd() == os.getcwd() and not psutil.pid_exists(int(owner)):
                yield job


def hold_directory():
    """Say, for as long as this process lives, that Snakemake runs here. Where none did, what a
    killed one left is cleared away first; its locks would stay for ever.

    Returns:
        the open file that says so; none where files cannot be locked.
    """
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        Path(".snakemake").mkdir(exist_ok=True)
        file = open(".snakemake/running", "a+")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clear_away(file)
        fcntl.flock(file, fcntl.LOCK_SH)
        return file


def clear_away(file):
    """Remove what a killed Snakemake of this machine left; one of another machine may still run,
    as not every shared disk knows of its locks there."""
    locks = list(Path(".snakemake/locks").glob("*.lock"))
    file.seek(0)
    if locks and file.read() != platform.node():
        return
    if locks:
        print("pact-offline: the last run here was killed; this one goes on", file=sys.stderr)
    for lock in locks:
        lock.unlink(missing_ok=True)
    for job in jobs_left():
        print(f"pact-offline: ending a job that it left ({job.pid})", file=sys.stderr)
        with contextlib.suppress(psutil.Error):
            job.terminate()
            job.wait()
    file.truncate(0)
    file.write(platform.node())
    file.flush()


if workflow.is_main_process:
    RUNNING = hold_directory()


def end_jobs(number, frame):
    """End the jobs, for which Snakemake would wait, however long they take."""

    def end():
        if number == signal.SIGINT:
            time.sleep(2)  # Ctrl-C reaches them too: let them end by it
        ended = set()
        while True:  # a job may be just starting
            for job in jobs_among(psutil.Process().children(recursive=True)):
                if job not in ended:
                    ended.add(job)
                    with contextlib.suppress(psutil.Error):
                        job.terminate()
            time.sleep(0.5)

    print("pact-offline: ending the jobs; the same command goes on from here", file=sys.stderr)
    threading.Thread(target=end, daemon=True).start()
    raise KeyboardInterrupt


onstart:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_jobs)
