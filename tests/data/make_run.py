"""Draw the run folder `run/` that the report's tests read. Its numbers are invented, in the shape and size of a real
run of SmolLM2-135M; none of them is a measurement. `python tests/data/make_run.py` writes it anew, always the same."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from intarsia.arch import (
    Architecture,
    Attention,
    FeedForward,
    Linear,
    block_parameters,
    block_to_dict,
    parameters,
)

HERE = Path(__file__).parent / "run"
LAYERS, D = 30, 576
ATTENTION, FFN = Attention(9, 3, 64), FeedForward(1536)
PARENT = Architecture.transformer(
    LAYERS, ATTENTION, FFN, hidden_size=D, vocab_size=49152, tied_embeddings=True, max_positions=8192
)
OPTIONS = {
    "attention": [ATTENTION, Attention(9, 1, 64), Attention(3, 1, 64), Linear(), None],
    "ffn": [FFN, *(FeedForward(w) for w in (1280, 1024, 768, 512, 256)), Linear(), None],
}
FIXED = 0.22  # seconds of embedding, head and norm in the scenario
dice = random.Random(7)


def name(block) -> str:
    return "absent" if block is None else block.label


def cost(block) -> tuple[float, float]:
    if block is None:
        return 0.0, 0.0
    weights = block_parameters(block, D) / 2.65e6
    return 0.0006 + 0.0043 * weights + (0.0012 if isinstance(block, Attention) else 0), 0.0024 + 0.0123 * weights


def left(slot: str, block) -> float:
    return 0.0 if block is None else block_parameters(block, D) / block_parameters(OPTIONS[slot][0], D)


def options() -> list[dict]:
    rows = []
    for layer in range(LAYERS):
        ends = 1 + 1.4 * math.exp(-layer / 2) + 0.9 * math.exp((layer - 29) / 3)
        for slot, blocks in OPTIONS.items():
            site = ends * dice.uniform(0.35, 1.9) * (0.16 if slot == "attention" else 0.24)
            for block in blocks:
                gone = 1 - left(slot, block)
                kl = site * gone**1.65 * dice.uniform(0.9, 1.1)
                if layer == 0 and gone > 0.5:
                    kl *= 60 if slot == "attention" else 210
                before = min(1.0, gone * dice.uniform(0.75, 1.0) + 0.02) if gone else 0.0
                prefill, decode = cost(block)
                rows.append(
                    {
                        "layer": layer,
                        "slot": slot,
                        "option": name(block),
                        "loss_before": round(before, 4),
                        "loss_after": 1.0 if block is None else round(before * dice.uniform(0.42, 0.6), 4),
                        "kl": round(kl, 5),
                        "kl_se": round(kl * 0.06 + 0.0002 * (gone > 0), 5),
                        "prefill_seconds": round(prefill, 6),
                        "decode_seconds": round(decode, 6),
                        "weight_bytes": 0 if block is None else 2 * block_parameters(block, D),
                    }
                )
    return rows


def sites(pick, rows) -> list[dict]:
    known = {(r["layer"], r["slot"], r["option"]): r for r in rows}
    result = []
    for layer in range(LAYERS):
        row = {"layer": layer}
        for slot in OPTIONS:
            block = pick(layer, slot)
            row[slot] = {"option": name(block), "block": None if block is None else block_to_dict(block)}
            row[f"kl_{slot}"] = known.get((layer, slot, name(block)), {"kl": None})["kl"]
        both = [v for v in (row["kl_attention"], row["kl_ffn"]) if v is not None]
        row["kl"], row["kl_se"] = round(0.8 * sum(both), 5), round(0.05 * sum(both), 5)
        result.append(row)
    return result


def searched(rows):
    """Cheapest KL for the time it frees, until the target is met: near enough to what the search does."""
    choice = {(layer, slot): OPTIONS[slot][0] for layer in range(LAYERS) for slot in OPTIONS}
    known = {(r["layer"], r["slot"], r["option"]): r for r in rows}

    def figures(layer, slot, block):
        return known[layer, slot, name(block)]["kl"], sum(cost(block))

    total = sum(sum(cost(b)) for b in choice.values())
    while FIXED + sum(sum(cost(b)) for b in choice.values()) > (FIXED + total) / 1.33:
        moves = []
        for (layer, slot), block in choice.items():
            kl, time = figures(layer, slot, block)
            for other in OPTIONS[slot]:
                more, less = figures(layer, slot, other)
                if less < time:
                    moves.append(((more - kl) / (time - less), layer, slot, other))
        _, layer, slot, other = min(moves, key=lambda m: m[0])
        choice[layer, slot] = other
    return lambda layer, slot: choice[layer, slot]


def bits(more: float) -> dict:
    base = {"code": 0.78, "docs": 0.93, "encyclopedia": 0.88, "stories": 1.02, "all": 0.90}
    return {
        k: {"value": round(v + more * dice.uniform(0.9, 1.1), 4), "se": 0.006 if k == "all" else 0.012}
        for k, v in base.items()
    }


def task_figures(less: float) -> dict:
    base = {"piqa": 0.665, "hellaswag": 0.425, "arc_easy": 0.585, "lambada": 0.40}
    return {
        k: {"value": round((v - less) * 200) / 200, "se": round(math.sqrt(v * (1 - v) / 200), 4), "n": 200}
        for k, v in base.items()
    }


def controls(rows) -> dict:
    def drawn(layer, slot):
        return random.Random(f"{layer}{slot}").choice(OPTIONS[slot][:-1] if layer else OPTIONS[slot][:2])

    def greedy(layer, slot):
        if slot == "attention":
            return OPTIONS[slot][2 if layer % 3 == 1 else 0]
        return OPTIONS[slot][(0, 3, 4, 1)[layer % 4]] if layer else FFN

    gone = set(range(19, 28))
    plans = {
        "uniform": (
            "every FFN at 832 channels",
            lambda _, slot: ATTENTION if slot == "attention" else FeedForward(832),
            1.335,
            0.47,
            1.31,
            0.075,
        ),
        "depth": (
            "layers 19 to 27 removed",
            lambda layer, slot: None if layer in gone else OPTIONS[slot][0],
            1.352,
            0.71,
            2.6,
            0.12,
        ),
        "greedy": ("equal budgets, easiest layers first", greedy, 1.338, 0.41, 0.98, 0.06),
        "random": ("drawn from the library at the same speed", drawn, 1.331, 0.98, 3.4, 0.17),
    }
    return {
        key: {
            "description": words,
            "speedup_measured": speed,
            "speedup_predicted": round(speed * dice.uniform(0.98, 1.02), 3),
            "speedup_measured_spread": [round(speed - 0.02, 3), round(speed + 0.02, 3)],
            "kl": kl,
            "kl_se": round(0.02 * kl + 0.004, 4),
            "kl_before_distillation": before,
            "bits_per_byte": bits(worse),
            "tasks": task_figures(worse / 2),
            "sites": sites(pick, rows),
        }
        for key, (words, pick, speed, kl, before, worse) in plans.items()
    }


def weight(rows) -> int:
    gone = sum(block_parameters(OPTIONS[s][0], D) * (1 - left(s, _block(r[s]))) for r in rows for s in OPTIONS)
    return round(parameters(PARENT) - gone)


def _block(described):
    from intarsia.arch import block_from_dict

    return block_from_dict(described["block"]) if described["block"] else None


def summary() -> dict:
    rows = options()
    child = sites(searched(rows), rows)
    total = FIXED + LAYERS * (sum(cost(ATTENTION)) + sum(cost(FFN)))
    distilled = [
        {"tokens": 40960 * i, "kl": round(0.33 + 0.31 * math.exp(-i / 3.2) - 0.0012 * i, 4)} for i in range(13)
    ]
    return {
        "format": 1,
        "intarsia": "0.1.0",
        "finished": "2026-11-22T03:00:00",
        "command": "intarsia compress smollm2-135m --preset demo --controls --out runs/demo",
        "parent": {
            "name": "SmolLM2-135M-Instruct",
            "path": "smollm2-135m.gguf",
            "parameters": parameters(PARENT),
            "weight_bytes": 2 * parameters(PARENT),
            "architecture": PARENT.to_dict(),
            "note": "Q4_1 projections, Q8_0 embedding, F32 norms",
        },
        "scenario": {"batch": 1, "prompt": 512, "generated": 64},
        "target": {"speedup": 1.3},
        "device": "2-core x86 with AMX bf16",
        "dtype": "bfloat16",
        "child": {"parameters": weight(child), "weight_bytes": 2 * weight(child), "sites": child},
        "options": rows,
        "cost": {
            "parent": {
                "prefill_seconds": {"median": 0.31, "iqr": 0.006},
                "decode_seconds": {"median": 0.98, "iqr": 0.012},
                "total_seconds": {"median": round(total, 3), "iqr": 0.015},
            },
            "blocks": [
                {
                    "option": name(b),
                    "prefill_seconds": round(cost(b)[0], 6),
                    "decode_seconds": round(cost(b)[1], 6),
                    "spread": 0.02,
                }
                for s in OPTIONS
                for b in OPTIONS[s]
                if b is not None and (s, name(b)) != ("ffn", "linear")
            ],
            "calibration": {
                "scale": 1.04,
                "error": 0.021,
                "points": [
                    {"name": "uniform 1024", "predicted": 0.982, "measured": 0.994},
                    {"name": "uniform 512", "predicted": 0.771, "measured": 0.760},
                    {"name": "20 layers", "predicted": 0.868, "measured": 0.851},
                ],
            },
        },
        "speedup_measured": 1.34,
        "speedup_measured_spread": [1.315, 1.365],
        "speedup_predicted": 1.33,
        "memory_bytes": {"parent": 289_200_000, "child": 214_800_000, "predicted": 212_300_000},
        "kl_predicted": 0.58,
        "kl_before_distillation": 0.64,
        "kl": 0.32,
        "kl_se": 0.011,
        "top1": 0.714,
        "top1_se": 0.006,
        "distillation": distilled,
        "bits_per_byte": {"parent": bits(0), "child": bits(0.045)},
        "tasks": {
            k: {"parent": p, "child": c} for (k, p), c in zip(task_figures(0).items(), task_figures(0.03).values())
        },
        "controls": controls(rows),
        "alternatives": [
            {
                "speedup_predicted": round(1 + 0.04 * i, 3),
                "kl_predicted": round(0.012 * (1.55 * i) ** 1.52, 4),
            }
            for i in range(1, 26)
        ],
        "seconds": {
            "load": 4.1,
            "importance": 11.8,
            "library": 171.0,
            "score": 96.4,
            "cost": 38.2,
            "search": 3.6,
            "distill": 148.9,
            "controls": 402.0,
            "evaluate": 61.5,
        },
        "peak_rss_bytes": 3_120_000_000,
        "sample": {
            "prompt": "The harbour was quiet until",
            "parent": " the storm came. The fishermen pulled their boats up the sand and waited for the wind to turn.",
            "child": " the morning came. The boats were tied to the stones, and the men were waiting for the wind.",
        },
    }


def main() -> None:
    for stage, took in {"importance": 11.8, "library": 171.0, "score": 96.4}.items():
        (HERE / "stages" / stage).mkdir(parents=True, exist_ok=True)
        done = {"fingerprint": "0123456789abcdef", "seconds": took, "finished": "2026-11-22T02:40:00"}
        (HERE / "stages" / stage / "done.json").write_text(json.dumps(done) + "\n")
    (HERE / "recipe.toml").write_text(
        "seed = 0\n\n[scenario]\nbatch = 1\nprompt = 512\ngenerated = 64\n\n[target]\nspeedup = 1.3\n"
        "\n[library]\ntokens = 400000\n"
    )
    (HERE / "environment.json").write_text(
        json.dumps(
            {
                "intarsia": "0.1.0",
                "python": "3.13.1",
                "torch": "2.13.0",
                "cpu": {"model": "x86", "flags": ["amx_bf16", "avx512_bf16"]},
                "threads": 2,
            }
        )
        + "\n"
    )
    text = json.dumps(summary(), separators=(",", ":"))
    (HERE / "summary.json").write_text(text.replace('},{"layer"', '},\n{"layer"') + "\n")


if __name__ == "__main__":
    main()
