"""Estimates the time that a study still takes, from the kinds of its jobs and the durations of finished jobs."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from statistics import fmean
from typing import NamedTuple


class Job(NamedTuple):
    """A job that has started."""

    rule: str
    start: float
    """When the job started, in seconds."""
    end: float | None = None
    """When the job ended, in seconds; None while the job runs."""


def seconds_left(counts: Mapping[str, int], jobs: Collection[Job], now: float) -> float:
    """Returns the estimated time until all jobs have finished, in seconds.

    A job is expected to take as long as the finished jobs of its rule on average, or as all finished jobs if none of
    its rule has finished. The jobs of a rule are expected to run as many at once as jobs have run until now on average,
    but not more than there are.

    Args:
        counts: rule -> number of all its jobs.
        jobs: jobs that have started. At least one has finished.
        now: present time, in seconds.
    """
    durations: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if job.end is not None:
            durations[job.rule].append(job.end - job.start)
    mean = fmean(duration for of_rule in durations.values() for duration in of_rule)
    busy = sum((now if job.end is None else job.end) - job.start for job in jobs)
    at_once = busy / (now - min(job.start for job in jobs))
    seconds = 0.0
    for rule, count in counts.items():
        expected = fmean(durations[rule] or [mean])
        started = [job for job in jobs if job.rule == rule]
        running = [max(expected - (now - job.start), 0) for job in started if job.end is None]
        left = [expected] * (count - len(started)) + running
        if left:
            seconds += sum(left) / min(at_once, len(left))
    return seconds


def in_words(seconds: float) -> str:
    """Returns a duration as text, such as "about 3 min" or "about 2 h 10 min"."""
    minutes = round(seconds / 60)
    if not minutes:
        return "less than a minute"
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h {rest} min" if hours else f"about {minutes} min"
