"""Dense CRF over a validation set in worker processes, with a time-out per image.

Each worker process is tended by a thread of the main process: it hands over one image, waits for the answer,
and kills and replaces the process when it dies or runs out of time. This module does not import torch, so
that a worker starts as fast as its implementation can be imported.
"""

import collections
import functools
import importlib
import multiprocessing
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

Array = Any  # a numpy array or a torch tensor
Impl = str | Callable[[np.ndarray, np.ndarray], Array]

IN_FLIGHT_PER_WORKER = 2
"""Images held at once per worker: one under way, one ready to follow."""
START_TIMEOUT = 300.0
"""Longest time for a worker process to start and import the implementation [s]."""
ALIVE_CHECK = 1.0
"""Interval at which a silent worker is checked to be alive [s]."""
LISTED = 10
"""Images named in the report; the rest are counted."""


@dataclass(frozen=True)
class CRFTask:
    """One image for the CRF; its arrays must not be changed before its result arrives."""

    name: str
    """Named in the report if the CRF fails."""
    image: Array
    """(H, W, 3) uint8 RGB."""
    scores: tuple[Array, ...]
    """Score maps (C, H, W), logits or log-probabilities; C may differ between maps."""
    payload: Any = None
    """Anything that should come back with the result; never sent to a worker."""


@dataclass(frozen=True)
class CRFResult:
    """Labels of one image."""

    name: str
    labels: tuple[np.ndarray, ...]
    """(H, W) int64 for each score map."""
    failure: str | None
    """None, or why `labels` are those without CRF."""
    payload: Any = None


class _Hung(Exception):
    """The worker did not answer in time."""


class _Died(Exception):
    """The worker process ended without an answer."""


def crf_available(impl: Impl = "pydensecrf") -> str | None:
    """None if the CRF can run, else one line that says why it is skipped and what to install."""
    if impl != "pydensecrf":
        return None
    from ppap.kernels.dense_crf.pydensecrf_impl import unavailable_reason

    reason = unavailable_reason()
    return None if reason is None else f"dense CRF skipped: {reason}"


class CRFPool:
    """Worker processes that turn score maps into label maps; use as a context manager.

    Workers are spawned, so a script that uses them needs the usual ``if __name__ == "__main__":`` guard.

    Args:
        workers: number of processes; 0 = in the main process, without a time-out.
        timeout: longest time for all score maps of one image [s], > 0. An image over it gets its labels
            without CRF.
        impl: name for :func:`ppap.kernels.dense_crf`, or an importable function (image, scores) ->
            q (C, H, W) that takes and gives arrays.

    Attributes:
        failures: (name, why) of each image that kept its labels without CRF, in order.

    Raises:
        ValueError: a negative number of workers or a time-out that is not positive.

    Example:
        >>> with CRFPool(workers=2, timeout=60) as pool:
        ...     for result in pool.run(CRFTask(name, image, (scores,)) for name, image, scores in batches):
        ...         matrix.update(result.labels[0], truth[result.name])
        ...     print(pool.report() or "every image done")
    """

    def __init__(self, workers: int, timeout: float, impl: Impl = "pydensecrf") -> None:
        if workers < 0:
            raise ValueError(f"CRFPool: workers is {workers}; give 0 or more")
        if not timeout > 0:
            raise ValueError(f"CRFPool: timeout is {timeout}; give a positive number of seconds")
        self.workers = workers
        self.timeout = timeout
        self.impl = impl
        self.failures: list[tuple[str, str]] = []
        self._images = 0
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._live: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._closing = False

    def __enter__(self) -> "CRFPool":
        if self.workers:
            # Started from a thread it would lift the blocking of SIGINT below.
            resource_tracker.ensure_running()
            self._threads = ThreadPoolExecutor(self.workers, "ppap-crf", initializer=_block_interrupts)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._closing = True
            live = list(self._live)
        for worker in live:
            worker.kill()  # its thread sees the end of the connection and returns
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterable[CRFTask]) -> Iterator[CRFResult]:
        """Yield the results in the order of `tasks`, which are drawn only as fast as workers take them.

        An exception inside the implementation, as for non-finite scores, is raised here.

        Raises:
            RuntimeError: the pool was not entered, or a worker cannot start.
        """
        if self._closing or (self.workers and self._threads is None):
            raise RuntimeError("CRFPool.run: use the pool inside its with block")
        waiting: collections.deque = collections.deque()
        for task in tasks:
            if self.workers == 0:
                yield self._finish(task, _infer(self.impl, *_arrays(task)), None)
                continue
            waiting.append((task, self._threads.submit(self._handle, task)))
            while len(waiting) >= IN_FLIGHT_PER_WORKER * self.workers or (waiting and waiting[0][1].done()):
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def report(self) -> str | None:
        """One line that counts and names the images without CRF; None if there are none."""
        if not self.failures:
            return None
        named = [f"{name} ({why})" for name, why in self.failures[:LISTED]]
        more = len(self.failures) - len(named)
        return (
            f"dense CRF: {len(self.failures)} of {self._images} images kept their labels without CRF: "
            f"{', '.join(named)}{f' and {more} more' if more else ''}"
        )

    def _next(self, waiting: collections.deque) -> CRFResult:
        task, future = waiting.popleft()
        return self._finish(task, *future.result())

    def _finish(self, task: CRFTask, labels: tuple[np.ndarray, ...], failure: str | None) -> CRFResult:
        self._images += 1
        if failure is not None:
            self.failures.append((task.name, failure))
        return CRFResult(task.name, tuple(part.astype(np.int64) for part in labels), failure, task.payload)

    def _handle(self, task: CRFTask) -> tuple[tuple[np.ndarray, ...], str | None]:
        """Runs in a thread: labels of one image, and why they are without CRF."""
        image, scores = _arrays(task)
        failure = None
        # Twice, since a worker may die for a passing reason, such as a shortage of memory; a hang stays one.
        for _ in range(2):
            worker = self._take_worker()
            try:
                labels = worker.ask((image, scores), self.timeout)
            except _Hung:
                self._drop(worker)
                failure = f"over {self.timeout:g} s"
                break
            except _Died as death:
                self._drop(worker)
                failure = f"its worker died twice, {death}"
                continue
            self._idle.put(worker)
            if isinstance(labels, Exception):
                raise labels
            return labels, None
        return tuple(_small(part.argmax(axis=0), part.shape[0]) for part in scores), failure

    def _take_worker(self) -> "_Worker":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        with self._lock:  # so that closing either sees the new process or prevents it
            if self._closing:
                raise RuntimeError("CRFPool: the pool was closed")
            worker = _Worker(self.impl, self.timeout)
            self._live.add(worker)
        try:
            worker.wait_until_ready()
        except (_Hung, _Died) as error:
            self._drop(worker)
            raise RuntimeError(
                f"a dense CRF worker process cannot start ({error}); if a script of your own starts the "
                'evaluation, guard it with `if __name__ == "__main__":`, or set --eval.crf-workers 0'
            ) from None
        return worker

    def _drop(self, worker: "_Worker") -> None:
        worker.kill()
        worker.connection.close()
        with self._lock:
            self._live.discard(worker)


class _Worker:
    """One worker process and the main process's end of its connection."""

    def __init__(self, impl: Impl, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")  # never fork: torch's threads do not survive it
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, impl, timeout), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's end is the only one, and its death is seen as end of file

    def wait_until_ready(self) -> None:
        self._receive(START_TIMEOUT)

    def ask(self, work: Any, timeout: float) -> Any:
        """Send `work`, return the answer. Raises _Hung or _Died."""
        try:
            self.connection.send(work)
        except OSError:
            raise _Died(self._last_words()) from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        try:
            end = time.monotonic() + timeout
            while not self.connection.poll(max(0.0, min(ALIVE_CHECK, end - time.monotonic()))):
                if time.monotonic() >= end:
                    raise _Hung(f"no answer within {timeout:g} s")
                # A process forked meanwhile (a data loader's) may hold a copy of the worker's end of the
                # connection: its death then shows no end of file.
                if not self.process.is_alive() and not self.connection.poll(0):
                    raise EOFError
            return self.connection.recv()
        except (EOFError, OSError):
            raise _Died(self._last_words()) from None

    def _last_words(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        return f"by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def kill(self) -> None:
        # SIGKILL: a worker holds nothing to save, and native code that hangs does not see a polite signal.
        self.process.kill()
        self.process.join(10)


def _block_interrupts() -> None:
    # Processes started from this thread inherit it: a Ctrl-C during their first imports prints no traceback.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _serve(connection: Any, impl: Impl, timeout: float) -> None:
    """Main function of a worker process: answer until the main process closes the connection."""
    # Ctrl-C reaches the whole process group; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(impl, str):
        import torch

        torch.set_num_threads(1)
        importlib.import_module("ppap.kernels.dense_crf")  # before the clock of the first image starts
    try:
        connection.send("ready")
        while True:
            image, scores = connection.recv()
            _set_alarm(2 * timeout + 10)
            try:
                answer = _infer(impl, image, scores)
            except Exception as error:
                answer = _picklable(error)
            _set_alarm(0)
            connection.send(answer)
    except (EOFError, OSError):
        return


def _set_alarm(seconds: float) -> None:
    # Ends a worker that hangs after its main process was killed and can no longer end it.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _infer(impl: Impl, image: np.ndarray, scores: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Label map of each score map, in a small integer type."""
    if isinstance(impl, str):
        from ppap.kernels.dense_crf import dense_crf

        impl = functools.partial(dense_crf, impl=impl)
    return tuple(_small(np.asarray(impl(image, part)).argmax(axis=0), part.shape[0]) for part in scores)


def _arrays(task: CRFTask) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Image and float32 score maps as numpy arrays."""
    image = task.image.cpu().numpy() if hasattr(task.image, "cpu") else np.asarray(task.image)
    # numpy knows no bfloat16, hence float() first.
    scores = [
        part.detach().float().cpu().numpy() if hasattr(part, "detach") else part for part in task.scores
    ]
    return image, tuple(np.asarray(part, dtype=np.float32) for part in scores)


def _small(labels: np.ndarray, classes: int) -> np.ndarray:
    return labels.astype(np.uint8 if classes <= 256 else np.int64)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
