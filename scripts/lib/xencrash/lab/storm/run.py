"""Many experiments, each on a separate machine from one snapshot, until all are done or time is up."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from xencrash.lab.errors import LabError
from xencrash.lab.storm.begin import Scenery
from xencrash.lab.storm.course import Course, End
from xencrash.lab.storm.drive import Driver
from xencrash.lab.storm.experiment import Experiment, describe, shrink
from xencrash.lab.storm.judge import Outcome, Verdict, judge
from xencrash.lab.storm.snapshot import Live

Progress = Callable[[str], None]
_TELL_EVERY = 10.0  # seconds
_AGAIN = 20  # failures that are run once more, and shrunk


@dataclass(frozen=True)
class Budget:
    """The limits of a run; None for no limit."""

    seconds: float | None = None
    experiments: int | None = None
    jobs: int = 2


@dataclass(frozen=True)
class Result:
    number: int  # in the order of the plan
    experiment: Experiment
    id: str
    outcome: Outcome
    seconds: float
    unfired: int = 0  # events whose place was not reached
    exact: bool | None = None  # whether a second run had the same outcome; None if it was not tried
    shrunk: str | None = None  # fewer events that fail, too


def attempt(scenery: Scenery, experiment: Experiment, using: Callable[[Live], None]) -> Course:
    """One experiment. Raises LabError if the lab failed."""
    with scenery.snapshot.machine() as live:
        using(live)
        return Driver(live, scenery.scene, experiment).run()


def run_one(
    scenery: Scenery,
    number: int,
    experiment: Experiment,
    using: Callable[[Live], None] = lambda _: None,
) -> Result:
    begun = time.monotonic()
    unfired = 0
    try:
        course = attempt(scenery, experiment, using)
        outcome, unfired = judge(course, scenery.scene), len(course.unfired)
    except (LabError, OSError) as error:
        outcome = Outcome(Verdict.UNDECIDED, "lab", str(error))
    seconds = time.monotonic() - begun
    return Result(number, experiment, describe(experiment, scenery.scene.symbols), outcome, round(seconds, 3), unfired)


class Storm:
    """A run. Ctrl-C, SIGTERM, and whoever sets `ended`, end it: what is under way is dropped, what is done is kept."""

    def __init__(self, scenery: Scenery, budget: Budget, progress: Progress) -> None:
        self.scenery, self.budget, self.progress = scenery, budget, progress
        self.results: list[Result] = []
        self.ended = threading.Event()
        self.interrupted = False
        self._error: BaseException | None = None  # a worker's: of ours, not of the lab's
        self._lock = threading.Lock()
        self._live: set[Live] = set()
        self._begun = time.monotonic()

    @contextlib.contextmanager
    def endable(self) -> Iterator[None]:
        """Ctrl-C, and the signals of which the lab makes a SystemExit, end what is inside and no more."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.interrupted = True

    def run(self, plan: Iterable[Experiment], planned: int | None) -> list[Result]:
        """The results, in the plan's order."""
        self._begun = time.monotonic()
        numbered = itertools.islice(enumerate(plan), self.budget.experiments)
        workers = [threading.Thread(target=self._work, args=(numbered,)) for _ in range(self.budget.jobs)]
        for worker in workers:
            worker.start()
        try:
            with self.endable():
                self._watch(workers, planned)
        finally:
            self.ended.set()
            with self._lock:
                for live in self._live:
                    live.kill()
            for worker in workers:
                worker.join()
        if self._error is not None:
            raise self._error
        self.results.sort(key=lambda result: result.number)
        return self.results

    def _watch(self, workers: list[threading.Thread], planned: int | None) -> None:
        told = 0.0  # the first estimate comes with the first result
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.1)
            now = time.monotonic()
            if self.budget.seconds is not None and now - self._begun > self.budget.seconds:
                return
            if self.results and now - told > _TELL_EVERY:
                told = now
                self.progress(self._state(now, planned))

    def _state(self, now: float, planned: int | None) -> str:
        with self._lock:
            done = len(self.results)
            failed = sum(result.outcome.verdict is Verdict.FAIL for result in self.results)
        rate = done / (now - self._begun)
        wanted = min((n for n in (planned, self.budget.experiments) if n is not None), default=None)
        parts = [f"{done}" + (f" of {wanted}" if wanted is not None else "") + " experiments", f"{rate:.1f} a second"]
        left = [(wanted - done) / rate] if wanted is not None and rate else []
        left += [self.budget.seconds - (now - self._begun)] if self.budget.seconds is not None else []
        if left:
            parts.append(f"{min(left):.0f} s left")
        return ", ".join([*parts, f"{failed} failed"])

    def _work(self, numbered: Iterator[tuple[int, Experiment]]) -> None:
        try:
            self._make(numbered)
        except BaseException as error:
            if not self.ended.is_set():  # if its machine was killed meanwhile, any error may result
                self._error = error
            self.ended.set()

    def _make(self, numbered: Iterator[tuple[int, Experiment]]) -> None:
        while not self.ended.is_set():
            with self._lock:
                following = next(numbered, None)
            if following is None:
                return
            live: list[Live] = []
            result = run_one(self.scenery, *following, using=functools.partial(self._uses, live))
            with self._lock:
                self._live.difference_update(live)
                if self.ended.is_set():
                    return
                self.results.append(result)
            if result.outcome.verdict in (Verdict.FAIL, Verdict.UNDECIDED):
                self.progress(f"{result.outcome.verdict}: {result.id}: {result.outcome.says}")

    def _uses(self, mine: list[Live], one: Live) -> None:
        with self._lock:
            mine.append(one)
            self._live.add(one)
        if self.ended.is_set():
            one.kill()

    def repeat(self, experiment: Experiment, count: int) -> None:
        """One experiment, again and again; each result says whether all are the same."""
        with self.endable():
            for number in range(count):
                self.results.append(run_one(self.scenery, number, experiment))
        if len(self.results) > 1:
            exact = len({result.outcome for result in self.results}) == 1
            self.results = [replace(result, exact=exact) for result in self.results]

    def look_again(self) -> None:
        """Run failures once more, to see whether the outcome is the same, and reduce them to what they need."""
        with self.endable():
            self._look_again()

    def _look_again(self) -> None:
        failures = [result for result in self.results if result.outcome.verdict is Verdict.FAIL][:_AGAIN]
        for result in failures:
            self.progress(f"again: {result.id}")
            again = run_one(self.scenery, result.number, result.experiment)
            shrunk = None
            if len(result.experiment.events) > 1:
                shrunk = describe(shrink(result.experiment, self._fails_as(result)), self.scenery.scene.symbols)
            self._replace(
                result,
                exact=again.outcome == result.outcome,
                shrunk=shrunk if shrunk != result.id else None,
            )

    def _fails_as(self, result: Result) -> Callable[[Experiment], bool]:
        def fails(smaller: Experiment) -> bool:
            outcome = run_one(self.scenery, result.number, smaller).outcome
            return (outcome.verdict, outcome.what) == (result.outcome.verdict, result.outcome.what)

        return fails

    def _replace(self, result: Result, exact: bool, shrunk: str | None) -> None:
        self.results[self.results.index(result)] = replace(result, exact=exact, shrunk=shrunk)


def plain_crash(scenery: Scenery) -> None:
    """Raise LabError if the crash without any event fails: the other results would mean nothing."""
    course = attempt(scenery, Experiment(), lambda _: None)
    outcome = judge(course, scenery.scene)
    if course.end is not End.HANDOVER:
        raise LabError(f"storm: the crash fails without any event: {outcome.says}")
