"""Equal and nearly equal texts.

Keys are hashes, so that a million texts are remembered in megabytes: two different texts have the same 64-bit key
with a chance of 1 in 37 million among a million texts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

Name = TypeVar("Name", bound=Hashable)

_WORDS = re.compile(r"\w+")


def exact_key(*parts: str) -> int:
    """A 64-bit key of the texts in their order: ("ab", "c") and ("a", "bc") have different ones."""
    hashed = xxhash.xxh3_64()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.intdigest()


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation: what loose comparisons compare."""
    return _WORDS.findall(text.casefold())


def shingles(text: str, size: int = 3) -> set[str]:
    """Runs of `size` words of `text` (all words where it has fewer); what `NearDuplicates` compares."""
    found = words(text)
    return {" ".join(found[i : i + size]) for i in range(max(len(found) - size + 1, 1))} - {""}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


class NearDuplicates(Generic[Name]):
    """Remembers texts and finds earlier ones whose word shingles are nearly the same (MinHash, datasketch).

    Args:
        threshold: the Jaccard similarity of shingles from which two texts are near duplicates. Candidates are
            found by locality-sensitive hashing and kept if their estimated similarity reaches it.
        permutations: length of a signature. The estimate is off by about 1/sqrt(permutations).
        shingle: words in a shingle.

    Only hashes are kept: 2.5 KB and 0.7 ms a text of 300 words, so for 100,000 texts rather than for millions.
    """

    def __init__(self, threshold: float = 0.8, permutations: int = 128, shingle: int = 3) -> None:
        from datasketch import MinHash, MinHashLSH

        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, got {threshold}")
        self.threshold, self.shingle = threshold, shingle
        self._empty = MinHash(permutations, hashfunc=xxhash.xxh32_intdigest)
        best = MinHashLSH(threshold, permutations)  # asked for the bands that miss and mistake the least
        self._bands = [slice(i * best.r, (i + 1) * best.r) for i in range(best.b)]
        self._names: list[Name] = []
        self._signatures: list[NDArray[np.uint32]] = []
        # Hash of a band and its number -> the text that has it, or several.
        self._buckets: dict[int, int | list[int]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str) -> list[Name]:
        """Names of the remembered texts that are nearly `text`, in the order in which they were added."""
        signature = self._signature(text)
        return [] if signature is None else self._near(signature, self._keys(signature))

    def add(self, name: Name, text: str) -> list[Name]:
        """As `find`, and remember `text` under `name`. A text without words is like no other and not kept."""
        signature = self._signature(text)
        if signature is None:
            return []
        keys = self._keys(signature)
        near = self._near(signature, keys)
        number = len(self._names)
        self._names.append(name)
        self._signatures.append(signature)
        for key in keys:
            there = self._buckets.setdefault(key, number)
            if isinstance(there, list):
                there.append(number)
            elif there != number:
                self._buckets[key] = [there, number]
        return near

    def _signature(self, text: str) -> NDArray[np.uint32] | None:
        parts = shingles(text, self.shingle)
        if not parts:
            return None
        signature = self._empty.copy()
        signature.update_batch([part.encode("utf-8", "surrogatepass") for part in parts])
        return np.asarray(signature.hashvalues, dtype=np.uint32)

    def _keys(self, signature: NDArray[np.uint32]) -> list[int]:
        return [xxhash.xxh3_64_intdigest(signature[b].tobytes(), seed=i) for i, b in enumerate(self._bands)]

    def _near(self, signature: NDArray[np.uint32], keys: list[int]) -> list[Name]:
        candidates: set[int] = set()
        for key in keys:
            there = self._buckets.get(key, ())
            candidates.update((there,) if isinstance(there, int) else there)
        similar = (n for n in sorted(candidates) if np.mean(self._signatures[n] == signature) >= self.threshold)
        return [self._names[number] for number in similar]
