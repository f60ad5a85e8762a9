"""What reading the rows found: how many are usable, what was wrong with the others and where, how long they are."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook.errors import UsageError
from cookbook.rows import RowProblem

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cookbook.data import TokenSequence

FIRST = 3  # places named for each reason


@dataclass
class Reason:
    """One line of the table."""

    verdict: str  # rejected | fixed | overlong
    count: int = 0
    first: list[str] = field(default_factory=list)  # labels of the first rows
    detail: str = ""  # of the first row


@dataclass
class RowReport:
    """Verdicts over rows, lengths over the sequences made from the usable ones."""

    name: str = ""
    detected: list[str] = field(default_factory=list)  # a line per source
    ok: int = 0  # usable rows, the fixed ones among them
    fixed: int = 0
    rejected: int = 0
    overlong: int = 0  # dropped for max_length: a choice, not a defect
    reasons: dict[str, Reason] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)  # rows per source of a mixture
    lengths: array = field(default_factory=lambda: array("l"))  # tokens of each sequence
    trained_tokens: int = 0
    duplicate_prompts: int = 0
    flags_used: int = 0  # usable rows whose per-message `train` or `weight` says what is trained
    flags_ignored: int = 0  # those whose data.train_on says something else
    _prompts: set[int] = field(default_factory=set, repr=False)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)  # of all sequences so far

    @property
    def total(self) -> int:
        return self.ok + self.rejected + self.overlong

    @property
    def bad_share(self) -> float:
        return self.rejected / max(self.total, 1)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(sum(self.lengths), 1)

    def reject(self, label: str, problem: RowProblem) -> None:
        self.rejected += 1
        self._count("rejected", problem.reason, label, problem.detail)

    def drop_overlong(self, label: str, num_tokens: int, max_length: int) -> None:
        self.overlong += 1
        self._count("overlong", f"longer than max_length={max_length}", label, f"{num_tokens} tokens")

    def accept(self, label: str, fixes: tuple[str, ...], prompt: str) -> None:
        self.ok += 1
        self.fixed += bool(fixes)
        for fix in fixes:
            self._count("fixed", fix, label, "")
        key = hash(prompt)
        self.duplicate_prompts += key in self._prompts
        self._prompts.add(key)

    def count_flags(self, train_on: str | None) -> None:
        """One usable row with flags."""
        self.flags_used += train_on in (None, "flags")
        self.flags_ignored += train_on not in (None, "flags")

    def measure(self, sequence: TokenSequence) -> None:
        """One sequence made from the row just accepted."""
        self.lengths.append(len(sequence.tokens))
        self.trained_tokens += sum(weight > 0 for weight in sequence.weights[1:])
        self._digest.update(len(sequence.tokens).to_bytes(8) + sequence.tokens.tobytes() + sequence.weights.tobytes())

    @property
    def fingerprint(self) -> dict[str, object]:
        """Of what has been read so far: equal for the same tokens with the same weights in the same order."""
        return {"rows": self.ok, "sha256": self._digest.hexdigest()[:16]}

    def _count(self, verdict: str, reason: str, label: str, detail: str) -> None:
        entry = self.reasons.setdefault(reason, Reason(verdict, detail=detail))
        entry.count += 1
        if len(entry.first) < FIRST:
            entry.first.append(label)

    def refuse_bad(self, max_bad: float) -> None:
        """Raise UsageError when no row is usable or more than `max_bad` of them are unreadable."""
        if self.total == 0:
            raise UsageError(f"{self.name} holds no rows")
        if self.rejected and (self.ok == 0 or self.bad_share > max_bad):
            reason, worst = max(self.worst_first("rejected"), key=lambda pair: pair[1].count)
            detail = f", {worst.detail}" if worst.detail else ""
            ceiling = "" if self.ok == 0 else f" (above data.max_bad={max_bad:g})"
            raise UsageError(
                f"{self.name}: {self.rejected} of {self.total} rows unusable, {self.bad_share:.0%}{ceiling};"
                f" most often: {reason} ({worst.count} of them, first {worst.first[0]}{detail});"
                " `cook data check` lists them all"
            )
        if self.ok == 0:
            raise UsageError(
                f"{self.name}: all {self.total} rows are longer than max_length;"
                " raise max_length or set data.overlong=truncate"
            )

    def worst_first(self, *verdicts: str) -> list[tuple[str, Reason]]:
        chosen = [(reason, entry) for reason, entry in self.reasons.items() if entry.verdict in verdicts]
        return sorted(chosen, key=lambda pair: -pair[1].count)

    def length_quantiles(self) -> dict[str, int]:
        """Tokens per sequence, by rank: {"min", "p50", "p90", "p99", "max"}."""
        lengths = sorted(self.lengths) or [0]
        at = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        return {name: lengths[round(share * (len(lengths) - 1))] for name, share in at.items()}

    def lines(self) -> list[str]:
        """The short account: what was detected, counts, lengths."""
        counts = f"{self.total:,} rows: {self.ok:,} usable"
        counts += f" ({self.fixed:,} of them fixed)" if self.fixed else ""
        counts += f", {self.rejected:,} rejected" if self.rejected else ""
        counts += f", {self.overlong:,} overlong" if self.overlong else ""
        lengths = " ".join(f"{name} {tokens:,}" for name, tokens in self.length_quantiles().items())
        lines = [*self.detected, counts]
        if len(self.used) > 1:
            lines.append("mixed: " + ", ".join(f"{name} {count:,}" for name, count in self.used.items()))
        if self.lengths:
            lines.append(
                f"tokens per sequence: {lengths}; {self.trained_share:.0%} of {sum(self.lengths):,} tokens trained"
            )
        if self.flags_used:
            lines.append(f"rows whose train/weight flags choose the trained replies: {self.flags_used:,}")
        if self.flags_ignored:
            lines.append(f"IGNORED: the train/weight flags of {self.flags_ignored:,} rows; leave data.train_on out to use them")
        return lines

    def account(self) -> list[str]:
        """The lines, and one for each reason: the table without its frame."""
        reasons = (
            f"{entry.verdict}: {reason}: {entry.count:,} rows, first {', '.join(entry.first)}"
            for reason, entry in self.worst_first("rejected", "overlong", "fixed")
        )
        return [*self.lines(), *reasons]

    def table(self) -> RenderableType | None:
        """Reasons with counts and first places; None when every row was fine."""
        if not self.reasons:
            return None
        from rich.table import Table

        table = Table("verdict", "reason", "rows", "first seen", "there", box=None, pad_edge=False)
        table.columns[2].justify = "right"
        for reason, entry in self.worst_first("rejected", "overlong", "fixed"):
            more = ", ..." if entry.count > len(entry.first) else ""
            table.add_row(entry.verdict, reason, f"{entry.count:,}", ", ".join(entry.first) + more, entry.detail)
        return table
