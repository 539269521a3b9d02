"""Several jobs side by side: worker processes, joblib's loky, or Ray; the same jobs either way."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kajiya.config.options import NoOptions, RayLauncher
from kajiya.config.schema import LauncherConfig
from kajiya.config.tables import is_options, resolve
from kajiya.errors import MissingExtraError
from kajiya.run.process import quiet_ray

T = TypeVar("T")
R = TypeVar("R")


def launch(launcher: LauncherConfig, work: Callable[[T], R], jobs: Sequence[T], parallel: int) -> Iterator[R]:
    """Results of `work(job)` as they come, at most `parallel` at once; one at a time they run in this process.

    `work` and the jobs must be picklable. An exception of a job ends the whole; a job that may fail says so in its result.
    """
    if parallel == 1 and launcher.name != "ray":
        yield from map(work, jobs)
        return
    start, options = resolve("launcher", launcher.name, launcher.options, "tune.launcher")
    yield from start(work, jobs, parallel, options) if is_options(options) else start(work, jobs, parallel, **options)


def by_process(work: Callable[[T], R], jobs: Sequence[T], parallel: int, _options: NoOptions) -> Iterator[R]:
    """Plain worker processes of the standard library; an interruption ends them, and each lets its job go."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def by_joblib(work: Callable[[T], R], jobs: Sequence[T], parallel: int, _options: NoOptions) -> Iterator[R]:
    """joblib's loky: a pool of worker processes."""
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError as error:
        raise MissingExtraError("joblib", "tune", "Running several at once") from error
    pool = Parallel(
        n_jobs=parallel, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=parallel
    )
    yield from pool(delayed(work)(job) for job in jobs)


def by_ray(work: Callable[[T], R], jobs: Sequence[T], parallel: int, options: RayLauncher) -> Iterator[R]:
    """Ray tasks, never tried again by Ray itself: a job's failure is the job's result."""
    quiet_ray()
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray", "The launcher ray") from error

    # Ray takes a plain function, and no partial one.
    def call(job: T) -> R:
        return work(job)

    with _cluster(ray, parallel, options):
        remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0)(call)
        waiting: list[Any] = []
        rest = list(jobs)
        while rest or waiting:
            while rest and len(waiting) < parallel:
                waiting.append(remote.remote(rest.pop(0)))
            done, waiting = ray.wait(waiting, num_returns=1)
            yield from ray.get(done)


@contextlib.contextmanager
def _cluster(ray: Any, parallel: int, options: RayLauncher) -> Iterator[None]:
    """A connection to the cluster, or one of this machine's own that ends with the block."""
    if ray.is_initialized():
        yield
        return
    size = {} if options.address else {"num_cpus": max(1, round(parallel * options.cpus)), "include_dashboard": False}
    # Without an address Ray would join whatever cluster a variable or a file in /tmp names.
    ray.init(address=options.address or "local", logging_level=logging.WARNING, log_to_driver=False, **size)
    try:
        yield
    finally:
        ray.shutdown()
