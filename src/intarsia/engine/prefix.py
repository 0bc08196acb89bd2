"""What the engine remembers of texts that it has read: a tree whose nodes are chunks of tokens.

A node shares the pages of its chunk with the sequences that read it, and may hold a snapshot of the Mamba blocks' state
after it. Pages and snapshots are counted and evicted apart: in a hybrid a snapshot is as large as thousands of tokens
of keys and values, so there are few of them, where they are likely to be found again: at the last whole chunk of a
prompt, and where prompts have parted before (Marconi, arXiv 2411.19379, section 4.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from intarsia.engine.memory import Held, Storage, Window


class Node:
    """A chunk of tokens after its parent's. `pages[w]` are its pages in the blocks of window w."""

    def __init__(self, tokens: tuple[int, ...], parent: Node | None, pages: dict[Window, list[int]]):
        self.tokens, self.parent, self.pages = tokens, parent, pages
        self.children: dict[tuple[int, ...], Node] = {}
        self.snapshot: int | None = None  # a slot
        self.used = 0  # when, on the tree's clock
        self.alive = True

    @property
    def end(self) -> int:
        """Tokens from the beginning of the text to the end of this chunk."""
        node, count = self, 0
        while node.parent is not None:
            node, count = node.parent, count + len(node.tokens)
        return count


class PrefixTree:
    """Whole chunks of read texts, the least recently used evicted first, within `budget` bytes."""

    def __init__(self, storage: Storage, chunk: int, budget: int):
        self.storage, self.chunk, self.budget = storage, chunk, budget
        self.root = Node((), None, {})
        self.bytes = {"pages": 0, "states": 0}
        self._clock = itertools.count(1)

    def path(self, tokens: Sequence[int]) -> list[Node]:
        """The nodes along a text, as far as the tree knows it; at least one token is left to be read."""
        found, node = [], self.root
        for start in range(0, len(tokens) - self.chunk, self.chunk):
            node = node.children.get(tuple(tokens[start : start + self.chunk]))
            if node is None:
                break
            found.append(node)
        return found

    def usable(self, path: list[Node]) -> list[Node]:
        """The part of a path whose end a sequence can start from: where there is a snapshot, if states are needed."""
        if self.storage.recurrent:
            while path and path[-1].snapshot is None:
                path = path[:-1]
        return path

    def restore(self, path: list[Node], held: Held) -> int:
        """Let a new sequence, which has its slot, go on from the end of a usable path; the tokens it need not read."""
        length, size = len(path) * self.chunk, self.storage.page
        for node in path:
            node.used = next(self._clock)
        for window, pool in self.storage.pages.items():
            pages = [page for node in path for page in node.pages[window]]
            gone = 0 if window is None else max(0, length - window + 1) // size
            held.tables[window], held.gone[window] = pages, gone
            for page in pages[gone:]:
                pool.share(page)
        if path and path[-1].snapshot is not None:
            self.storage.copy_slot(path[-1].snapshot, held.slot)
        return length

    def insert(self, parent: Node, tokens: Sequence[int], held: Held) -> Node:
        """The node for a chunk after `parent` that a sequence has just read; it shares the sequence's pages."""
        key = tuple(tokens)
        node = parent.children.get(key)
        if node is None:
            first, each = parent.end // self.storage.page, self.chunk // self.storage.page
            pages = {w: held.tables[w][first : first + each] for w in self.storage.pages}
            for window, places in pages.items():
                for place in places:
                    self.storage.pages[window].share(place)
            node = parent.children[key] = Node(key, parent, pages)
            self.bytes["pages"] += self._page_bytes(node)
        node.used = next(self._clock)
        self._keep_budget(node)
        return node

    def keep_state(self, node: Node, slot: int) -> None:
        """Remember the state after a node, if a slot can be had for it."""
        if node.snapshot is not None or not self.storage.recurrent or not node.alive:
            return
        place = self.storage.slots.take()
        if place is None and self.evict_snapshot():
            place = self.storage.slots.take()
        if place is not None:
            self.storage.copy_slot(slot, place)
            node.snapshot = place
            self.bytes["states"] += self.storage.slot_bytes
            self._keep_budget(node)

    def evict_snapshot(self) -> bool:
        """Give the least recently used snapshot's slot back; False if there is none."""
        held = [n for n in self._nodes() if n.snapshot is not None]
        if not held:
            return False
        node = min(held, key=lambda n: n.used)
        self._drop_snapshot(node)
        while node.parent is not None and not node.children and node.snapshot is None:  # nobody can start from it
            parent = node.parent
            self._remove(node)
            node = parent
        return True

    def evict_chunk(self) -> bool:
        """Give up the least recently used leaf, rather one that nobody reads; False if nothing would become free."""
        leaves = [n for n in self._nodes() if not n.children]
        idle = [n for n in leaves if self._idle(n)]
        if not idle:
            return False
        self._remove(min(idle, key=lambda n: n.used))
        return True

    def evictable(self, window: Window) -> int:
        """Pages that evicting everything would free."""
        holders = self.storage.pages[window].holders
        return sum(holders[page] == 1 for node in self._nodes() for page in node.pages[window])

    def clear(self) -> None:
        """Forget everything."""
        for node in list(self._nodes()):
            self._remove(node)

    def _idle(self, node: Node) -> bool:
        return all(self.storage.pages[w].holders[p] == 1 for w, pages in node.pages.items() for p in pages)

    def _keep_budget(self, fresh: Node) -> None:
        """Evict leaves, oldest first, until the budget holds; the fresh one last."""
        while sum(self.bytes.values()) > self.budget:
            leaves = [n for n in self._nodes() if not n.children]
            self._remove(min(leaves, key=lambda n: (n is fresh, n.used)))

    def _nodes(self) -> Iterator[Node]:
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def _remove(self, node: Node) -> None:
        """Take a node out. What stands below it, if anything, is removed with it by `clear` alone."""
        for window, places in node.pages.items():
            for place in places:
                self.storage.pages[window].drop(place)
        self.bytes["pages"] -= self._page_bytes(node)
        self._drop_snapshot(node)
        node.parent.children.pop(node.tokens, None)
        node.alive = False

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self.storage.slots.drop(node.snapshot)
            node.snapshot = None
            self.bytes["states"] -= self.storage.slot_bytes

    def _page_bytes(self, node: Node) -> int:
        return sum(len(places) * self.storage.page_bytes[w] for w, places in node.pages.items())
