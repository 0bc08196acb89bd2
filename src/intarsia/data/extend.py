"""Long conversations out of short ones, whose parts need each other (Nemotron-H, arXiv 2504.03624, section 5).

Conversations about like things are joined until a sample is full, and turns are put between them that can only be
answered from what stands far before. Which are joined, and what is asked, is a function of the conversations and a
seed. A system prompt stands once, and only conversations with the same one are joined.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from intarsia.data.conversations import Message

WORD = re.compile(r"\w{4,}")  # shorter ones say little about a topic
COMMON = 64  # conversations that may share a word before it is looked at how many there are
OPENING = 24  # words that are quoted of a turn


@dataclass(frozen=True)
class Extension:
    """`length` tokens of a joined conversation at most; `share` of the conversations are joined, `turns` is how often
    a turn that asks about earlier ones follows a part; likeness is looked for among `window` conversations."""

    length: int
    share: float = 0.5
    turns: float = 0.5
    window: int = 4096
    seed: int = 0


def extended(
    conversations: Iterable[list[Message]], count: Callable[[list[Message]], int], settings: Extension
) -> Iterator[list[Message]]:
    """The conversations, each of them once: those that stay alone as they come, the others joined.

    `count` says how many tokens a conversation has; one that is too long to be joined stays alone.
    """
    waiting: dict[str, list[tuple[list[Message], int]]] = defaultdict(list)
    for messages in conversations:
        text = json.dumps([settings.seed, messages], sort_keys=True)
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2.0**64
        size = count(messages) if draw < settings.share else settings.length
        if size >= settings.length:
            yield messages
            continue
        group = waiting[messages[0]["content"] if messages[0]["role"] == "system" else ""]
        group.append((messages, size))
        if len(group) >= settings.window:
            yield from _joined(group, count, settings)
            group.clear()
    for group in waiting.values():
        yield from _joined(group, count, settings)


def _joined(
    group: list[tuple[list[Message], int]], count: Callable[[list[Message]], int], settings: Extension
) -> Iterator[list[Message]]:
    """Samples of at most `settings.length` tokens: every part the likest to the one before that still fits."""
    nearest, left = _Nearest([messages for messages, _ in group]), dict.fromkeys(range(len(group)))
    while left:
        part, sample, room = next(iter(left)), [], settings.length
        draw = random.Random(f"{settings.seed} {json.dumps(group[part][0], sort_keys=True)}")
        while part is not None:
            del left[part]
            messages, size = group[part]
            added = messages[1:] if sample and messages[0]["role"] == "system" else messages
            asked = reference(sample, draw) if draw.random() < settings.turns else []
            sample, room = sample + added, room - size
            if asked and (needed := count(asked)) <= room:
                sample, room = sample + asked, room - needed
            part = nearest.to(part, [i for i in left if group[i][1] <= room])
        yield sample


def reference(before: list[Message], draw: random.Random) -> list[Message]:
    """A question about one of the turns `before`, and its answer; nothing where there is none to ask about."""
    exchanges = [(a["content"], b["content"]) for a, b in itertools.pairwise(before)
                 if (a["role"], b["role"]) == ("user", "assistant")]  # fmt: skip
    if not exchanges:
        return []
    number = draw.randrange(len(exchanges))
    question, answer = map(opening, exchanges[number])
    if draw.random() < 0.5:
        asked, said = f"What was question number {number + 1} of this conversation? Repeat how it began.", question
    else:
        asked, said = f'Earlier I wrote: "{question}" How did your answer begin?', answer
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def opening(text: str) -> str:
    """The first words of a text as they stand there."""
    found = re.match(rf"\s*((?:\S+\s+){{0,{OPENING - 1}}}\S+)", text)
    return found[1] if found else text


class _Nearest:
    """Which conversation shares the most telling words with another: the sum of their inverse document frequencies."""

    def __init__(self, conversations: list[list[Message]]):
        self.words = [{word for m in c if m["role"] != "system" for word in WORD.findall(m["content"].lower())}
                      for c in conversations]  # fmt: skip
        known = Counter(word for words in self.words for word in words)
        total = len(conversations)
        # Of many conversations, a word of a tenth of them says little, and would be looked up for all of those.
        self.weights = {w: math.log(total / n) for w, n in known.items() if 1 < n <= max(COMMON, total // 10)}
        self.holders: dict[str, list[int]] = defaultdict(list)
        for number, words in enumerate(self.words):
            for word in words & self.weights.keys():
                self.holders[word].append(number)

    def to(self, number: int, candidates: list[int]) -> int | None:
        """Of the candidates the likest to conversation `number`, the earliest of equals; None without any."""
        likeness = dict.fromkeys(candidates, 0.0)
        for word in sorted(self.words[number] & self.weights.keys()):
            for other in self.holders[word]:
                if other in likeness:
                    likeness[other] += self.weights[word]
        return max(likeness, key=likeness.get, default=None)
