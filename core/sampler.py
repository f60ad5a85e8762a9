"""Continuous batching: requests of any adapters, one new token each per step, over the training modules themselves.

Prompts are computed in passes of their own, up to their last token; that one is the first input of decoding. A prompt that
several sequences share is computed once, whoever asks. Only the engine's thread calls `step`.
"""

from __future__ import annotations

import random
import secrets
import weakref
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from core.captured import Flight, Load, Step, Steps
from core.datum import SampledSequence, SampleResponse
from core.decoder import Decoder
from core.exact import TILE, ExactAttention
from core.exact_step import Row, exact_step
from core.head import UNEMBED
from core.inference import Attention, CachedRows, Decode, Prefill, run
from core.kv_cache import KvCache, Pool, Slabs
from core.lora import ComputeCopies, Segment, Weights, add_lora
from core.native_step import FewStep
from core.native_wide import WideStep, fast_rows
from core.packing import bins, make_segment
from core.paged import PAGE, PagedPrefill, Pages, page_table
from core.request import Continuation, SampleRequest
from core.sampling import Choice, Head, pick
from core.stacked import StackedRows, Stacks
from core.token_stream import StreamedToken, tell

PREFILL_ROWS = {"cpu": 1024, "cuda": 8192}  # new prompt tokens per pass; decoding goes on between passes
DIVERGED = "the model's logits are not finite: the adapter has diverged"


class Sampler:
    """The requests of one engine. `submit` is for the engine too: it hands over what clients have queued."""

    def __init__(
        self, decoder: Decoder, copies: ComputeCopies, kv_tokens: int, paged: bool | None = None, capture: bool = True
    ) -> None:
        """`paged`: keys and values in pages, by default on CUDA; there steps are captured as graphs if `capture`."""
        self.decoder, self.copies = decoder, copies
        sizes = len(decoder.layers), decoder.heads, decoder.dtype, decoder.device
        on_cuda = decoder.device.type == "cuda"
        self.exact = decoder.exact
        paged = (on_cuda if paged is None else paged) and not self.exact
        self.pages = Pages(*sizes, kv_tokens) if paged else None
        self.steps = Steps(decoder, self.pages, capture and on_cuda) if self.pages is not None else None

        def slabs(capacity: int, most: int) -> Pool:
            return Slabs(capacity, most, *sizes)

        self.cache = KvCache(self.pages.new_pool if self.pages is not None else slabs, kv_tokens // PAGE * PAGE)
        self.page_width = 1 + min(decoder.max_length, kv_tokens) // PAGE  # a step may go one token too far
        self._waiting: deque[Continuation] = deque()
        self._filling: list[Continuation] = []
        self._running: list[Continuation] = []
        self._batch: Batch | Ahead | None = None
        self.few = None if paged else fast_rows(decoder, copies)
        self._stacks = Stacks(copies, stay=self.pages is not None)
        self._alive: weakref.WeakValueDictionary[Hashable, Weights] = weakref.WeakValueDictionary()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._filling or self._running)

    def submit(self, request: SampleRequest) -> None:
        seed, weights = request.params.seed, request.weights
        if weights.key not in self._alive and not torch.linalg.vector_norm(weights.params) < float("inf"):
            request.future.set_exception(FloatingPointError(DIVERGED))  # in a shared product its neighbours would see 0 * NaN
            return
        self._alive[weights.key] = weights
        for i in range(request.num_samples):
            generator = random.Random(secrets.randbits(64) if seed is None else f"{seed} {i}")
            request.sequences.append(Continuation(request, i, list(request.prompt), generator.random))
        self._waiting.extend(request.sequences)

    def fail_all(self, error: BaseException) -> None:
        self._batch = None
        for sequence in [*self._waiting, *self._filling, *self._running]:
            sequence.request.future.set_exception(error)
        self._drop_ended()
        self._forget_adapters()

    def _forget_adapters(self) -> None:
        self._stacks.clear()
        if self.few is not None:
            self.few.forget()

    @torch.no_grad()
    def step(self) -> None:
        """Admit what fits, one pass over prompts if any wait, and one new token for what runs."""
        self._drop_ended()
        self._admit()
        if self._filling:
            self._prefill()
        if len(self._running) > len(self._filling):  # else more rows will share a step soon
            self._decode()
        self._drop_ended()
        if not self.busy:
            self._forget_adapters()

    # ---- coming and going

    def _admit(self) -> None:
        """In the order of arrival; a prompt that another sequence is computing right now is waited for."""
        for slot in self.cache.slots():
            if not slot.busy and slot.tokens and slot.weights not in self._alive:
                slot.tokens, slot.weights = [], None
        in_progress = {(s.request.weights.key, tuple(s.request.prompt)) for s in self._filling}
        expected = Counter(self.cache.capacity_for(s.request.num_tokens) for s in self._waiting)
        for sequence in list(self._waiting):
            request = sequence.request
            name = (request.weights.key, tuple(request.prompt))
            if name in in_progress and not self.exact:
                continue
            capacity = self.cache.capacity_for(request.num_tokens)
            known = [] if self.exact else request.prompt[:-1]  # whose computation may have had other shapes
            taken = self.cache.take(known, request.num_tokens, request.weights.key, expected[capacity])
            if taken is None:
                break
            expected[capacity] -= 1
            request.future.begin()
            sequence.slot, common = taken
            self._waiting.remove(sequence)
            if common == len(request.prompt) - 1:  # all but the last token, which decoding begins with
                self._running.append(sequence)
                self._settle()
            else:
                self._filling.append(sequence)
                in_progress.add(name)

    def _drop_ended(self) -> None:
        """Sequences that are done, failed or cancelled give up their slots."""
        if any(_over(sequence) for sequence in [*self._filling, *self._running]):
            self._settle()
            ended = [s for s in [*self._filling, *self._running] if _over(s)]  # asked once: clients cancel at any moment
            for sequence in ended:
                assert sequence.slot is not None
                self.cache.leave(sequence.slot, spoilt=sequence.stop_reason == "failed")
                sequence.slot = None
            self._filling = [s for s in self._filling if s not in ended]
            self._running = [s for s in self._running if s not in ended]
        if any(_over(sequence) for sequence in self._waiting):
            self._waiting = deque(s for s in self._waiting if not _over(s))

    def _finish(self, sequence: Continuation, reason: str) -> None:
        sequence.stop_reason = reason
        request = sequence.request
        if all(s.stop_reason is not None for s in request.sequences):
            found = [SampledSequence(s.sampled, s.logprobs, str(s.stop_reason)) for s in request.sequences]
            request.future.set_result(SampleResponse(found, *(request.prompt_logprobs or (None, None))))

    # ---- prompts

    def _prefill(self) -> None:
        """The next tokens of the prompts being computed, as many as a pass takes, of few adapters, the oldest first."""
        chosen: list[tuple[Continuation, int, int]] = []  # sequence, from, to
        room = PREFILL_ROWS[self.decoder.device.type]
        place: dict[Hashable, int] = {}
        for sequence in sorted(self._filling, key=lambda s: place.setdefault(s.request.weights.key, len(place))):
            assert sequence.slot is not None
            start, end = len(sequence.slot.tokens), len(sequence.request.prompt) - 1
            stop = min(end, start + room)
            chosen.append((sequence, start, stop))
            room -= stop - start
            if room == 0:
                break
        chosen.sort(key=lambda part: _adapter_order(part[0]))
        parts, tokens, positions = [], [], []
        for sequence, start, stop in chosen:
            assert sequence.slot is not None
            parts.append((sequence.slot, stop - start, start))
            tokens += sequence.tokens[start:stop]
            positions += range(start, stop)
        device = self.decoder.device
        segments = self._segments([(s.request.weights, stop - start) for s, start, stop in chosen])
        add = partial(add_lora, segments=segments, exact=self.exact)
        work: Sequence[Attention]
        if self.pages is not None:
            work = [PagedPrefill(self.pages, parts)]
        elif self.exact:
            work = [ExactAttention(parts)]
            filling = -len(tokens) % TILE
            tokens, positions = tokens + [0] * filling, positions + [0] * filling
        else:
            work = Prefill.of(parts)
        run(self.decoder, torch.tensor(tokens, device=device), torch.tensor(positions, device=device), add, work)
        for sequence, _, stop in chosen:
            assert sequence.slot is not None
            sequence.slot.tokens = sequence.tokens[:stop]
            if stop == len(sequence.request.prompt) - 1:
                self._filling.remove(sequence)
                self._running.append(sequence)
                self._settle()

    # ---- decoding

    def _decode(self) -> None:
        if self.exact:
            self._decode_exactly()
            return
        if self._batch is None:
            self._batch = self._make_batch()
        if isinstance(self._batch, Ahead):
            self._decode_ahead(self._batch)
        else:
            self._decode_now(self._batch)

    def _decode_ahead(self, batch: Ahead) -> None:
        """The device begins the next step before the host has looked at this one's tokens."""
        flight = batch.flight or batch.go()
        batch.flight = batch.go() if batch.most_go_on else None
        self._land(batch, flight)

    def _land(self, batch: Ahead, flight: Flight) -> None:
        for sequence, token, logprob in zip(batch.sequences, *flight.wait(), strict=True):
            if sequence.stop_reason is None and (logprob != logprob or not sequence.request.future.done()):
                self._advance(sequence, token, logprob)

    def _settle(self) -> None:
        """Before others run: the batch goes, and what it has under way is taken in."""
        batch, self._batch = self._batch, None
        if isinstance(batch, Ahead) and batch.flight is not None:
            self._land(batch, batch.flight)

    def _decode_exactly(self) -> None:
        taken, self._running = self._running[:TILE], self._running[TILE:]
        self._running += taken  # the others' turn comes next
        taken.sort(key=_adapter_order)
        rows = [
            Row(s.slot, s.tokens[-1], len(s.tokens) - 1, s.request.params, s.uniform(), s.shift)
            for s in taken
            if s.slot is not None
        ]
        found = exact_step(self.decoder, rows, self._segments([(s.request.weights, 1) for s in taken]))
        for sequence, token, logprob, shift in zip(taken, *found, strict=True):
            sequence.shift = shift
            self._advance(sequence, token, logprob)

    def _decode_now(self, batch: Batch) -> None:
        device = self.decoder.device
        x = batch.stream(self.decoder)
        head = Head(self.decoder, x, batch.adapters)
        if batch.fresh:
            self._first_shift(head, batch)
        uniform = torch.tensor([s.uniform() for s in batch.sequences], dtype=torch.float64, device=device)
        picked = pick(head, batch.shift, batch.choice, uniform)
        batch.tokens, batch.shift = picked.tokens, picked.shift
        batch.positions += 1
        tokens, logprobs = picked.tokens.tolist(), picked.logprobs.tolist()
        for sequence, token, logprob in zip(batch.sequences, tokens, logprobs, strict=True):
            self._advance(sequence, token, logprob)
        if any(s.stop_reason is not None for s in batch.sequences):
            for sequence, shift in zip(batch.sequences, batch.shift.tolist(), strict=True):
                sequence.shift = shift

    def _advance(self, sequence: Continuation, token: int, logprob: float) -> None:
        assert sequence.slot is not None
        request = sequence.request
        if logprob != logprob:
            sequence.stop_reason = "failed"
            request.future.set_exception(FloatingPointError(DIVERGED))
            return
        sequence.slot.tokens.append(sequence.tokens[-1])
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if request.on_token is not None:
            tell(request.future, request.on_token, StreamedToken(sequence.number, token, logprob))
        if request.ends(sequence.sampled):
            self._finish(sequence, "stop")
        elif len(sequence.logprobs) >= request.max_tokens:
            self._finish(sequence, "length")

    def _make_batch(self) -> Batch | Ahead:
        """Rows sorted by adapter, then by slot, so that each adapter's rows are one segment."""
        for sequence in self._running:
            assert sequence.slot is not None
            sequence.slot = self.cache.moved_down(sequence.slot)
        self._running.sort(key=lambda s: (_adapter_order(s), _slot_order(s)))
        sequences, device = list(self._running), self.decoder.device
        tensor = partial(torch.tensor, device=device)
        tokens, positions = tensor([s.tokens[-1] for s in sequences]), tensor([len(s.tokens) - 1 for s in sequences])
        slots = [s.slot for s in sequences if s.slot is not None]
        owners = [s.request.weights for s in sequences]
        few = self.few.step(slots, owners) if self.few is not None and len(slots) <= self.few.most else None
        stacked = few is None or any(UNEMBED in weights.geometry.sites for weights in owners)
        adapters = self._stacks.rows_of(_counted((weights, 1) for weights in owners), device) if stacked else []
        choice = Choice.of([s.request.params for s in sequences], device)
        if self.steps is not None:
            load = Load(tokens, positions, page_table(slots, self.page_width).to(device), adapters, choice)
            self.steps.forget_others(self._stacks.kept)
            return Ahead(sequences, self.steps.loaded(load), choice)
        shift = tensor([s.shift or 0.0 for s in sequences], dtype=torch.float32)
        fresh = [row for row, s in enumerate(sequences) if s.shift is None]
        parts = Decode.of(slots, positions) if few is None else []
        return Batch(sequences, tokens, positions, adapters, parts, choice, shift, fresh, few)

    def _first_shift(self, head: Head, batch: Batch) -> None:
        """A sequence's first logits have no shift yet: find their largest."""
        largest = head.logits(torch.zeros_like(batch.shift)).amax(0).float()
        fresh = torch.tensor(batch.fresh, device=largest.device)
        batch.shift = batch.shift.index_copy(0, fresh, largest[fresh])
        batch.fresh = []

    def _segments(self, owners: Sequence[tuple[Weights, int]]) -> list[Segment]:
        """Segments of rows given with their owners, which are sorted by rank and key."""
        counts = _counted(owners)
        rows_of = {weights.key: rows for weights, rows in counts}
        segments, start = [], 0
        together = [[weights] for weights, _ in counts] if self.exact else bins(counts, self.decoder.device.type == "cpu")
        for members in together:
            of_rows, at = [], 0
            for weights in members:
                rows = rows_of[weights.key]
                of_rows.append((weights, at, at + rows))
                at += rows
            segments.append(make_segment(start, start + at, members, of_rows, self.copies, with_grad=False))
            start += at
        return segments


@dataclass
class Batch:
    """The running sequences as tensors, kept while nobody comes or goes."""

    sequences: list[Continuation]
    tokens: torch.Tensor  # [n] the next inputs
    positions: torch.Tensor
    adapters: list[StackedRows]
    parts: list[Decode | CachedRows]  # they read `positions`
    choice: Choice
    shift: torch.Tensor  # [n] fp32
    fresh: list[int]  # rows without a shift
    few: FewStep | WideStep | None  # what computes the stream then, without `parts`

    def stream(self, decoder: Decoder) -> torch.Tensor:
        """The residual stream after the last layer, [n, d] fp32."""
        if self.few is not None:
            return self.few.run(self.tokens, self.positions)
        for part in self.parts:
            part.ready(decoder.dtype)
        return run(decoder, self.tokens, self.positions, self.add, self.parts)

    def add(self, x: torch.Tensor, y: torch.Tensor, site: str) -> None:
        for adapters in self.adapters:
            adapters.add(x, y, site)


@dataclass
class Ahead:
    """The running sequences in a step that can be begun before the last one's tokens are known here."""

    sequences: list[Continuation]
    step: Step
    choice: Choice
    flight: Flight | None = None  # begun, not looked at

    def go(self) -> Flight:
        return self.step.go([s.uniform() for s in self.sequences], self.choice)

    @property
    def most_go_on(self) -> bool:
        """After the step under way, as far as max_tokens tells."""
        return 2 * sum(len(s.logprobs) + 1 < s.request.max_tokens for s in self.sequences) > len(self.sequences)


def _over(sequence: Continuation) -> bool:
    if sequence.request.future.done():
        sequence.request.sequences.clear()  # a circle of references would keep the weights until someone collects it
        return True
    return sequence.stop_reason is not None


def _counted(owners: Iterable[tuple[Weights, int]]) -> list[tuple[Weights, int]]:
    """Each adapter once, with its rows, in the order of first appearance."""
    counts: dict[tuple[int, int], tuple[Weights, int]] = {}
    for weights, rows in owners:
        counts[weights.key] = (weights, counts.get(weights.key, (weights, 0))[1] + rows)
    return list(counts.values())


def _adapter_order(continuation: Continuation) -> tuple[int, tuple[int, int]]:
    return continuation.request.weights.config.rank, continuation.request.weights.key


def _slot_order(sequence: Continuation) -> tuple[int, int]:
    assert sequence.slot is not None
    return sequence.slot.pool.capacity, sequence.slot.index
