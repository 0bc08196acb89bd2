"""What a run remembers of its parent's files."""

import os

from intarsia.compress.text import sampled_hash


def test_a_small_file_is_hashed_whole_and_a_large_one_all_over(tmp_path):
    file = tmp_path / "weights"
    for length in (1000, 64 * 256, 64 * 256 + 1, 1 << 20):
        data = bytearray(os.urandom(length))
        file.write_bytes(data)
        first = sampled_hash(file, samples=64, size=256)
        assert sampled_hash(file, samples=64, size=256) == first
        step = max(1, length // 64)  # a stretch that long holds at least a part of one sample
        for start in (0, length // 3, length - step):
            changed = bytearray(data)
            for n in range(start, min(length, start + step + 256)):
                changed[n] ^= 1
            file.write_bytes(changed)
            assert sampled_hash(file, samples=64, size=256) != first
