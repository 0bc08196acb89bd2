"""Who runs, who waits, and what each does next.

First come, first served. A sequence is admitted when its prompt fits what is free; pages for what it generates are
taken as it grows. When none is left, the tree of prefixes gives way, then the youngest sequence: it goes back to the
front of the queue and reads its text again later, so no request is lost, and the oldest always gets on.
"""

from __future__ import annotations

from collections import deque

from intarsia.engine.batch import TILE, Piece
from intarsia.engine.memory import Storage, Window, pages_within
from intarsia.engine.prefix import PrefixTree
from intarsia.engine.sequence import Sequence


class Scheduler:
    """`running` in order of admission. `read` tokens of prompts are read a step, in pieces cut at multiples of `chunk`.

    `keep_answers`: generated tokens may stand in for read ones in later prompts. Not in exact mode, where the two are
    computed in passes of other sizes.
    """

    def __init__(self, storage: Storage, tree: PrefixTree, max_batch: int, chunk: int, read: int, keep_answers: bool):
        self.storage, self.tree, self.max_batch, self.chunk = storage, tree, max_batch, chunk
        self.read, self.keep_answers = read, keep_answers
        self.queue: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._full = False  # after a preemption nobody is admitted until somebody has finished

    def most_pages(self, tokens: int) -> dict[Window, int]:
        """Pages that a text of so many tokens holds at once."""
        size = self.storage.page
        whole = -(-tokens // size)
        reach = max(self.read, TILE)
        return {w: whole if w is None else min(whole, pages_within(w, size, reach)) for w in self.storage.pages}

    def admit(self) -> None:
        """Move sequences from the queue to the running ones while there is room."""
        if not self.running:
            self._full = False
        while self.queue and len(self.running) < self.max_batch and not self._full:
            if not self._start(self.queue[0]):
                return
            self.running.append(self.queue.popleft())

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence its slot and what the tree knows of its text; False if its prompt does not fit now."""
        held = sequence.held
        held.slot = self.take_slot()  # first, for it may cost the tree a snapshot
        if held.slot is None:
            return False
        self.storage.clear_slot(held.slot)
        path = self.tree.path(sequence.tokens[: sequence.prompt_length])
        known = [] if sequence.request.prompt_logprobs is not None else self.tree.usable(path)
        sequence.computed = self.tree.restore(known, held)
        needed = self.most_pages(len(sequence.tokens) + 1)
        for window, count in needed.items():
            count -= len(held.tables[window]) - held.gone[window]
            free = self.storage.pages[window].free
            if count > free and count > free + self.tree.evictable(window):
                self.stop(sequence)
                return False
        sequence.node, sequence.remembered = known[-1] if known else self.tree.root, sequence.computed
        sequence.latest = None
        ends = (sequence.prompt_length - 1, sequence.prompt_length)  # this prompt again, or one that goes on from it
        sequence.snapshots_at = {len(path) * self.chunk, *(end // self.chunk * self.chunk for end in ends)}
        sequence.handle.cached_tokens = max(sequence.handle.cached_tokens, sequence.computed)
        return True

    def take_slot(self) -> int | None:
        """A slot, if need be that of a snapshot."""
        place = self.storage.slots.take()
        if place is None and self.tree.evict_snapshot():
            place = self.storage.slots.take()
        return place

    def plan(self) -> list[tuple[Sequence, Piece]]:
        """The next piece of every running sequence that has pages for it."""
        planned, read = [], 0
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for an older one
                continue
            if sequence.reading and read >= self.read:
                continue
            piece = self._piece(sequence)
            if self.make_room(sequence, piece.start + len(piece.tokens)):
                planned.append((sequence, piece))
                read += 0 if piece.steps else len(piece.tokens)
        return planned

    def _piece(self, sequence: Sequence) -> Piece:
        start, length = sequence.computed, len(sequence.tokens)
        if sequence.reading:
            piece = Piece(sequence.held, start, sequence.tokens[start : self._cut(sequence)])
        else:
            tokens = sequence.tokens[start : start + TILE]
            tentative = bool(sequence.drafted)
            piece = Piece(sequence.held, start, tokens + sequence.drafted, steps=True, tentative=tentative)
        if sequence.request.prompt_logprobs is not None and sequence.reading:
            piece.want = len(piece.tokens)
        elif piece.start + len(piece.tokens) >= length:
            piece.want = 1 + len(sequence.drafted)
        return piece

    def _cut(self, sequence: Sequence) -> int:
        """Where the next piece of a prompt ends: behind whole chunks, and where its state is to be kept."""
        start = sequence.computed
        end = min(start // self.chunk * self.chunk + self.read, sequence.prompt_length)
        kept = sequence.snapshots_at if self.storage.recurrent else ()
        return min([end, *(place for place in kept if place > start)])

    def make_room(self, sequence: Sequence, length: int) -> bool:
        """Pages for the first `length` tokens of a running sequence; False if it had to give way itself."""
        for window, pool in self.storage.pages.items():
            table = sequence.held.tables[window]
            while len(table) * self.storage.page < length:
                place = pool.take()
                if place is not None:
                    table.append(place)
                elif not self.tree.evict_chunk():
                    youngest = self.running[-1]
                    self.preempt(youngest)
                    if youngest is sequence:
                        return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, with nothing in memory."""
        self.running.remove(sequence)
        self.stop(sequence)
        self.queue.appendleft(sequence)
        self.preemptions += 1
        self._full = True

    def stop(self, sequence: Sequence) -> None:
        """Take a sequence's memory away."""
        self.storage.release(sequence.held)
        sequence.computed, sequence.drafted = 0, []

    def finish(self, sequence: Sequence) -> None:
        """A running sequence is done."""
        self.running.remove(sequence)
        self.stop(sequence)
        self._full = False

    def remember(self, sequence: Sequence) -> None:
        """Put the chunks that a sequence has filled into the tree, and its state where it is worth keeping.

        What was generated is kept only if `self.keep_answers`; of its states the latest alone, for the turn to come.
        """
        end = sequence.computed if self.keep_answers else min(sequence.computed, sequence.prompt_length)
        while sequence.remembered + self.chunk <= end and sequence.node.alive:
            start = sequence.remembered
            chunk = sequence.tokens[start : start + self.chunk]
            if any(gone * self.storage.page > start for gone in sequence.held.gone.values()):
                return  # part of the chunk has left a window already
            sequence.node = self.tree.insert(sequence.node, chunk, sequence.held)
            sequence.remembered += self.chunk
        if sequence.computed != sequence.remembered or sequence.held.pending:
            return
        if sequence.computed in sequence.snapshots_at:
            self.tree.keep_state(sequence.node, sequence.held.slot)
        elif sequence.computed > sequence.prompt_length and sequence.node is not sequence.latest:
            if sequence.latest is not None:
                self.tree.drop_state(sequence.latest)
            had = sequence.node.snapshot is not None
            self.tree.keep_state(sequence.node, sequence.held.slot)
            sequence.latest = None if had else sequence.node

    def fork(self, leader: Sequence, follower: Sequence) -> bool:
        """Let a follower run from the leader's memory of their prompt: whole pages shared, the rest copied."""
        if len(self.running) >= self.max_batch or self._full:
            return False
        held, length, size = follower.held, leader.prompt_length, self.storage.page
        held.slot = self.take_slot()
        if held.slot is None:
            return False
        self.storage.copy_slot(leader.held.slot, held.slot)
        for window, pool in self.storage.pages.items():
            gone, table = leader.held.gone[window], leader.held.tables[window]
            whole = length // size
            held.tables[window] = table[:gone] + [pool.share(p) for p in table[gone:whole]]
            held.gone[window] = gone
        follower.computed, follower.node, follower.remembered = length, leader.node, leader.remembered
        self.running.append(follower)
        if not self.make_room(follower, length):
            return True  # it waits in front of the queue
        for window in self.storage.pages if length % size else ():
            place = length // size
            self.storage.copy_page(window, leader.held.tables[window][place], held.tables[window][place])
        return True
