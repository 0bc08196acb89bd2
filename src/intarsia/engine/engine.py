"""The engine: many requests at once through one model, a step at a time.

    engine = Engine(model, tokenizer)
    handle = engine.submit(Request(tuple(tokenizer.encode("The sea was")), max_new_tokens=32))
    while engine.step():
        pass
    print(handle.answers[0].text)

`submit` and `cancel` may be called from any thread; `step` from one. A step admits what fits, moves every running
sequence on by a piece (a generated token, or a stretch of its prompt), and draws tokens. In float32 every answer is bit
for bit what its request gives alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.engine.batch import Piece, is_exact, run_pieces
from intarsia.engine.memory import Storage, tokens_that_fit
from intarsia.engine.prefix import PrefixTree
from intarsia.engine.replay import Replay
from intarsia.engine.request import Delta, Handle, Request
from intarsia.engine.sampling import token_logprob
from intarsia.engine.scheduler import Scheduler
from intarsia.engine.sequence import Sequence
from intarsia.engine.speculate import MOST, Drafter, ModelDrafter, check_draft, verified
from intarsia.engine.statistics import Statistics
from intarsia.engine.text import Decodes
from intarsia.model import Decoder


class Engine:
    """Continuous batching over a `Decoder`.

    `budget_bytes` are for caches: `max_batch` + `snapshots` slots of recurrent state (snapshots: as many as max_batch
    if None) and, of what is left, pages of `page` tokens. `chunk`, a multiple of `page`, is where prefixes are cut;
    `read`, a multiple of it, how many tokens of prompts a step reads (None: two chunks; a float32 model reads one
    chunk at a time, for its numbers depend on where a prompt is cut). `prefix_bytes` (None: whatever is free) is the
    most that the memory of read prompts may hold. `draft`, a smaller model of the same vocabulary or a
    `speculate.Drafter`, guesses up to `draft_tokens` tokens ahead; a draft model's own memory comes on top of the
    budget. `replay` gives decoding steps fixed shapes, which a GPU records and replays (None: on a GPU). Raises
    `IntarsiaError` when the budget is too small for one page.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Decodes | None = None,
        budget_bytes: int = 1 << 30,
        max_batch: int = 16,
        chunk: int = 256,
        page: int = 32,
        snapshots: int | None = None,
        prefix_bytes: int | None = None,
        draft: Decoder | Drafter | None = None,
        draft_tokens: int = 4,
        replay: bool | None = None,
        read: int | None = None,
    ):
        read = chunk if is_exact(model) else 2 * chunk if read is None else read
        if min(max_batch, chunk, page, read) < 1 or chunk % page or read % chunk:
            raise IntarsiaError(
                f"max_batch {max_batch}, read {read}, chunk {chunk} and page {page} are not possible together: all are "
                "at least 1, what is read a multiple of the chunk and the chunk of the page."
            )
        self.model, self.tokenizer, self.arch = model, tokenizer, model.arch
        slots = max_batch + (max_batch if snapshots is None else snapshots)
        tokens = tokens_that_fit(model.arch, page, model.dtype, budget_bytes, slots)
        tokens = min(tokens, -(-model.arch.max_positions // page) * page * slots)
        replay = model.device.type == "cuda" if replay is None else replay
        self.storage = Storage(model.arch, tokens, slots, page, model.dtype, model.device, max_batch, read, replay)
        self.storage.replay = Replay(model, self.storage, max_batch) if replay else None
        self.tree = PrefixTree(self.storage, chunk, budget_bytes if prefix_bytes is None else prefix_bytes)
        self.scheduler = Scheduler(self.storage, self.tree, max_batch, chunk, read, keep_answers=not is_exact(model))
        self.max_batch, self.draft_tokens = max_batch, draft_tokens
        if not 1 <= draft_tokens <= MOST:
            raise IntarsiaError(f"{draft_tokens} draft tokens are not possible: choose 1 to {MOST}.")
        if isinstance(draft, Decoder):
            check_draft(draft, model)
            draft = ModelDrafter(draft, tokens, max_batch, page, chunk)
        self._drafter = draft
        self.statistics = Statistics()
        self._inbox: deque[Handle] = deque()
        self._leaving: deque[Handle] = deque()
        self._wake = threading.Event()

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Handle:
        """Queue a request; its handle fills with answers. Raises `IntarsiaError` for what can never be answered."""
        self.check(request)
        handle = Handle(request, on_delta)
        self._inbox.append(handle)
        self._wake.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Stop a request at the next step; its answers end with "cancelled"."""
        self._leaving.append(handle)
        self._wake.set()

    def generate(self, requests: Iterable[Request]) -> list[Handle]:
        """Submit and step until all are answered."""
        handles = [self.submit(r) for r in requests]
        while self.step():
            pass
        return handles

    def check(self, request: Request) -> None:
        """Raise `IntarsiaError` for a request that can never be answered."""
        prompt, total = request.prompt, len(request.prompt) + request.max_new_tokens
        least = 0 if request.prompt_logprobs is not None else 1
        if not prompt or request.max_new_tokens < least:
            raise IntarsiaError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones is nothing to do: give at "
                "least 1 of each, or ask for the prompt's log-probabilities."
            )
        if min(prompt) < 0 or max(prompt) >= self.arch.vocab_size:
            raise IntarsiaError(
                f"the prompt holds ids from {min(prompt)} to {max(prompt)}, but the model knows 0 to "
                f"{self.arch.vocab_size - 1}: use the model's own tokenizer."
            )
        if total > self.arch.max_positions:
            raise IntarsiaError(
                f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones are {total}, but the model's "
                f"context is {self.arch.max_positions}: shorten the prompt or ask for fewer."
            )
        if not 1 <= request.n <= self.max_batch:
            raise IntarsiaError(f"{request.n} answers are not possible: ask for 1 to {self.max_batch}.")
        if request.stop and self.tokenizer is None:
            raise IntarsiaError("stop strings need a tokenizer, and this engine has none: stop at ids.")
        for window, pages in self.scheduler.most_pages(total).items():
            room = self.storage.pages[window].size
            if pages > room:
                raise IntarsiaError(
                    f"{total} tokens need {pages} pages of cache and there are {room}: ask for at most "
                    f"{room * self.storage.page} tokens, or give the engine a larger budget."
                )

    @property
    def idle(self) -> bool:
        return not (self._inbox or self._leaving or self.scheduler.queue or self.scheduler.running)

    def wait(self, seconds: float) -> None:
        """Sleep until there is something to do, at most so long."""
        if self.idle:
            self._wake.wait(seconds)
        self._wake.clear()

    def wake(self) -> None:
        """End a `wait`."""
        self._wake.set()

    def step(self) -> bool:
        """One step; whether there is more to do."""
        self._open_inbox()
        self.scheduler.admit()
        if self._drafter is not None:
            self._guess(self._drafter)
        planned = self.scheduler.plan()
        if planned:
            began = time.perf_counter()
            passes = run_pieces(self.model, self.storage, [piece for _, piece in planned])
            self.statistics.step(planned, passes, time.perf_counter() - began)
            self._read(planned)
        return not self.idle

    def stats(self) -> dict[str, float]:
        """Counters since the start and what is held now, by name."""
        scheduler, tree = self.scheduler, self.tree
        used, capacity = self.storage.bytes, self.storage.capacity
        return self.statistics.as_dict() | {
            "queued": len(scheduler.queue) + len(self._inbox),
            "running": len(scheduler.running),
            "preemptions": scheduler.preemptions,
            "page_bytes": used["pages"],
            "page_bytes_capacity": capacity["pages"],
            "state_bytes": used["slots"],
            "state_bytes_capacity": capacity["slots"],
            "prefix_page_bytes": tree.bytes["pages"],
            "prefix_state_bytes": tree.bytes["states"],
        }

    def fail(self, error: Exception) -> None:
        """End every request that is on its way with an error, and forget all memory but the weights."""
        self._open_inbox()
        for sequence in [*self.scheduler.queue, *self.scheduler.running]:
            sequence.handle.error = error
            self.cancel(sequence.handle)
        self._open_inbox()
        self.tree.clear()

    def _open_inbox(self) -> None:
        while self._inbox:
            handle = self._inbox.popleft()
            seed = handle.request.sampling.seed
            seed = int.from_bytes(os.urandom(8)) if seed is None else seed
            answers = [Sequence(handle, i, seed, self.arch.vocab_size, self.tokenizer) for i in range(handle.request.n)]
            answers[0].followers = answers[1:]
            self.scheduler.queue.append(answers[0])
            self.statistics.requests += 1
            self.statistics.prompt_tokens += len(handle.request.prompt)
        while self._leaving:
            self._remove(self._leaving.popleft())

    def _remove(self, handle: Handle) -> None:
        leaving = [s for s in (*self.scheduler.queue, *self.scheduler.running) if s.handle is handle]
        for sequence in leaving:
            if sequence in self.scheduler.running:
                self.scheduler.finish(sequence)
            else:
                self.scheduler.queue.remove(sequence)
            for each in (sequence, *sequence.followers):
                self._tell(each, each.end("cancelled"))

    def _read(self, planned: list[tuple[Sequence, Piece]]) -> None:
        """What a step's logits say: log-probabilities of prompts, and next tokens."""
        likeliest = self._likeliest(planned)
        for (sequence, piece), best in zip(planned, likeliest):
            if sequence.drafted:
                self._verify(sequence, piece, best)
            else:
                sequence.computed += len(piece.tokens)
                self._tell_prompt(sequence, piece)
            self.scheduler.remember(sequence)
            self.storage.leave_behind(sequence.held, sequence.computed)
            if sequence.computed == len(sequence.tokens):
                followers, sequence.followers = sequence.followers, []
                self._next(sequence, piece.logits[-1], best[-1])
                for follower in followers:
                    self._follow(sequence, follower, piece.logits[-1], best[-1])
            if sequence.finish:
                self.scheduler.finish(sequence)

    def _guess(self, drafter: Drafter) -> None:
        """Ask for guesses at the next tokens of all that are about to generate one."""
        ready = [s for s in self.scheduler.running if s.computed == len(s.tokens) - 1 and not s.reading]
        left = [s.request.max_new_tokens - s.generated - 1 for s in ready]
        drafts = drafter.propose(ready, [min(self.draft_tokens, count) for count in left])
        for sequence, draft in zip(ready, drafts):
            sequence.drafted, sequence.drawn_from = draft.tokens, draft.probs
            self.statistics.drafted_tokens += len(draft.tokens)

    def _verify(self, sequence: Sequence, piece: Piece, best: list[int]) -> None:
        """Keep the guesses that stand, and draw one token after them."""
        guesses, sequence.drafted, accepted = sequence.drafted, [], 0
        for row, likeliest in enumerate(best):
            guess = guesses[row] if row < len(guesses) else None
            drawn_from = None if guess is None else sequence.drawn_from[row]
            self._next(sequence, piece.logits[row], likeliest, guess, drawn_from)
            if sequence.tokens[-1] != guess or sequence.finish:
                break
            accepted += 1
        self.statistics.accepted_tokens += accepted
        sequence.computed += 1 + accepted
        sequence.held.pending = 1 + accepted

    def _likeliest(self, planned: list[tuple[Sequence, Piece]]) -> list[list[int]]:
        """For every piece the likeliest token at each of its wanted rows: one answer from the device for all."""
        wanted = [piece.best for _, piece in planned if piece.want]
        found = iter(torch.cat(wanted).tolist() if wanted else [])
        return [[next(found) for _ in range(piece.want)] for _, piece in planned]

    def _next(
        self,
        sequence: Sequence,
        logits: torch.Tensor,
        best: int,
        guess: int | None = None,
        drawn_from: np.ndarray | None = None,
    ) -> None:
        """Draw one token, from the model's `logits` (V,), of which `best` is the likeliest; there may be a guess."""
        if sequence.request.max_new_tokens == 0:
            self._tell(sequence, sequence.end("length"))
            return
        row = None if sequence.greedy and sequence.request.logprobs is None else logits.float().cpu().numpy()
        if sequence.greedy:
            token = best
        elif guess is None:
            token = sequence.choose(row)
        else:
            token = verified(sequence, row, guess, drawn_from)
        self._tell(sequence, sequence.append(token, row))

    def _follow(self, leader: Sequence, follower: Sequence, logits: torch.Tensor, best: int) -> None:
        """Another answer to the same prompt: from the leader's memory if there is room, else from the queue."""
        if not self.scheduler.fork(leader, follower):
            self.scheduler.queue.appendleft(follower)
            return
        if follower in self.scheduler.running:
            self._next(follower, logits, best)
            if follower.finish:
                self.scheduler.finish(follower)

    def _tell_prompt(self, sequence: Sequence, piece: Piece) -> None:
        """Log-probabilities of the prompt's tokens, those of the first answer alone, once."""
        top, told = sequence.request.prompt_logprobs, sequence.handle.prompt_logprobs
        if top is None or sequence.index or piece.steps:
            return
        if not told:
            told.append(None)
        following = sequence.tokens[piece.start + 1 : min(piece.start + piece.want + 1, sequence.prompt_length)]
        for row, token in enumerate(following):
            if len(told) == piece.start + row + 1:  # not again after a preemption
                told.append(token_logprob(piece.logits[row].float().cpu().numpy(), token, top))

    def _tell(self, sequence: Sequence, delta: Delta) -> None:
        self.statistics.told(sequence, delta)
        sequence.handle.put(delta)
