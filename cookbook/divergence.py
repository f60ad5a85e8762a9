"""When a job of a sweep has diverged, told from the rows of its metrics.jsonl as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Row = Mapping[str, float]  # of metrics.jsonl

STEPS = {"train/nll": 3, "train/loss": 3, "dpo/loss": 3, "dpo/chosen_shift": 3, "env/all/reward": 5}  # on end that are too many
TIE = math.log(2)  # the loss of a policy without a preference: SimPO's first batch may lie far below it by luck
LOST = -10.0  # nats per token: about what drawing one from the whole vocabulary costs; KTO's loss is bounded and cannot tell
LEAST_ENTROPY, MOST_ENTROPY = 0.1, 2.0  # times the first: the same tokens always, or any


@dataclass
class Watch:
    """Takes the rows of one run in their order; `diverged` stays once it is set, whatever comes then."""

    diverged: bool = False
    _first: dict[str, float] = field(default_factory=dict)  # value of each metric
    _bad: Counter[str] = field(default_factory=Counter)  # steps on end

    def see(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._first = dict(row) | self._first
            for name in STEPS.keys() & row.keys():
                self._bad[name] = self._bad[name] + 1 if _is_bad(name, self._first, row) else 0
                self.diverged |= self._bad[name] >= STEPS[name] or not math.isfinite(row[name])


def has_diverged(rows: Iterable[Row]) -> bool:
    watch = Watch()
    watch.see(rows)
    return watch.diverged


def _is_bad(name: str, first: Row, now: Row) -> bool:
    if name == "dpo/chosen_shift":
        return now[name] < LOST
    if name == "env/all/reward":  # of one batch it is noisy: a run that only has no luck samples as it did
        return now[name] < first[name] - abs(first[name]) / 2 and _samples_otherwise(first, now)
    return now[name] > 2 * max(abs(first[name]), TIE if name == "dpo/loss" else 0.0)


def _samples_otherwise(first: Row, now: Row) -> bool:
    key = "sampling/entropy"
    return key in now and not LEAST_ENTROPY * first[key] <= now[key] <= MOST_ENTROPY * first[key]
