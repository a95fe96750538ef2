"""The tables of one run's parts, as Markdown, with the aims beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Content = dict[str, Any]  # of a JSON file

OVER_FLOOR, FEW_MICROSECONDS = 1.5, 4.0
OVER_PEFT, SHARE_OF_PEAK, MEMORY_WITHIN = 1.3, 0.5, 0.1


def section(name: str, part: Content) -> str:
    """What one part measured."""
    results = part.get("results", {})
    lines = PARTS[name](results) if results else []
    return f"### {name.capitalize()}\n\n" + "\n".join(lines or ["Nothing was measured."]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown, with an empty line after them."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)] + [""]


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _ratio(ratio: Content) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"


def _correctness(results: Content) -> list[str]:
    lines = _fused(results)
    rows = [
        [
            row["name"],
            *(f"{row[name]:.1e}" for name in ("float32_plain", "float32")),
            f"{row['same_decisions']:.0%}",
            f"{row['kl']:.1e}",
            "yes" if row["packs"] else "no",
        ]
        for row in results.get("models", ())
    ]
    lines.append("Logits against the CPU's in float32 (largest difference over the largest logit; at most 1e-4):\n")
    head = ["model", "float32, plain", "float32, shortcuts", "bfloat16: same decisions", "bfloat16: KL, nats", "packed"]
    return lines + table(head, rows)


def _fused(results: Content) -> list[str]:
    if "fused" not in results:
        return []
    fused = results["fused"]
    counts = ", ".join(f"{number} {outcome}" for outcome, number in fused["counts"].items())
    ended = "all were run" if fused["finished"] else "the time was up before all were run"
    failed = [f"* failed: `{row['test']}`" for row in fused["failed"]]
    return [f"Tests of the kernel, compiled for this GPU: {counts}; {ended}.", *failed, ""]


def _ceilings(results: Content) -> list[str]:
    if "ceilings" not in results:
        return []
    most = results["ceilings"]
    return [
        f"Measured ceilings: a copy within device memory {most['bandwidth'] / 1e12:.2f} TB/s (read and written), bfloat16 "
        f"products {most['half'] / 1e12:.0f} TFLOP/s, the smallest kernel {_micro(most['launch'])} µs.",
        "",
    ]


def _kernel(results: Content) -> list[str]:
    lines, rows, met = _ceilings(results), [], []
    launch = results.get("ceilings", {}).get("launch", 0.0)
    for row in results.get("forms", ()):
        seconds, floor = row["seconds"], row["floor"]
        source = row.get("replayed", seconds)
        added = source["ours"] - source["base"]
        aim = ""
        if row["rows"] >= 2048:
            met.append(added <= OVER_FLOOR * floor)
            aim = "met" if met[-1] else "missed"
        elif row["rows"] <= 64:
            met.append(added <= launch + FEW_MICROSECONDS / 1e6)
            aim = "met" if met[-1] else "missed"
        overheads = [f"{seconds[name] / seconds['base'] - 1:+.1%}" for name in ("ours", "four operations", "peft")]
        cells = [f"{row['rows']:,}", f"{row['d']:,}", str(row["rank"]), _micro(seconds["base"]), *overheads, _micro(added)]
        rows.append([*cells, _micro(floor), f"{added / floor:.2f}", f"{row['share_of_bandwidth']:.0%}", aim])
    head = [
        "M",
        "d",
        "rank",
        "base, µs",
        "ours",
        "four operations",
        "PEFT's form",
        "added, µs",
        "floor, µs",
        "added / floor",
    ]
    lines += table([*head, "of the bandwidth, alone", "aim"], rows)
    lines.append(
        f"Aims: at most {OVER_FLOOR} times the floor at M ≥ 2,048, at most {FEW_MICROSECONDS:.0f} µs above the smallest "
        f"kernel at M ≤ 64; met in {sum(met)} of {len(met)} rows. Up to 256 rows `added` is from replays of a CUDA graph.\n"
    )
    return lines + _shapes(results.get("launch_shapes", ()))


def _shapes(rows: Sequence[Content]) -> list[str]:
    """The table's launch shape beside the fastest one that was tried."""
    lines = []
    for case in dict.fromkeys((row["rows"], row["rank"]) for row in rows):
        tried = [row for row in rows if (row["rows"], row["rank"]) == case and "seconds" in row]
        if not tried:
            continue
        best = min(tried, key=lambda row: row["seconds"])
        ours = next((row for row in tried if row["table"]), None)
        shape = ", ".join(f"{name} {size}" for name, size in best["shape"].items())
        share = f"{ours['seconds'] / best['seconds']:.2f} times its time" if ours else "not measured"
        lines.append([f"{case[0]:,}", str(case[1]), str(len(tried)), _micro(best["seconds"]), shape, share])
    return (
        table(["M", "rank", "shapes tried", "fastest, µs", "its shape", "the table's shape takes"], lines) if lines else []
    )


def _engine(results: Content) -> list[str]:
    lines, rows = _ceilings(results), []
    for row in results.get("methods", ()):
        seconds = [f"{1e3 * value:.1f}" for value in row["seconds_per_input"].values()]
        share = row["share_of_peak"]["all features"]
        peak = row.get("peak_bytes", {})
        cells = [row["model"], str(row["tokens"]), str(row["num_samples"]), *seconds, _ratio(row["over_peft"])]
        cells += [_ratio(row["over_loop"]), f"{share:.0%}", f"{peak.get('all features', 0) / 2**30:.2f}"]
        rows.append([*cells, f"{row['largest_difference']:.0e}"])
    head = ["model", "tokens", "K", "padded, ms / input", "PEFT", "loop", "ours", "over PEFT", "over the loop"]
    lines += table([*head, "of the peak", "GiB of the pass", "probabilities within"], rows)
    lines.append(
        f"Aims at 7B and 512 tokens: {OVER_PEFT} times PEFT's batch and {SHARE_OF_PEAK:.0%} of the measured peak.\n"
    )
    for kind, title in (("trunk", "Adapter on the last third of the blocks"), ("prefix", "Prefix cache, 80% alike")):
        cells_of = [
            [
                row["model"],
                str(row["tokens"]),
                str(row["num_samples"]),
                _ratio(row["ratio"]),
                ", ".join(f"{form}: {1e3 * value:.1f}" for form, value in row["seconds_per_input"].items()),
            ]
            for row in results.get(kind, ())
        ]
        if cells_of:
            lines += [f"{title}:\n", *table(["model", "tokens", "K", "times as fast", "ms / input"], cells_of)]
    memory = [
        [
            row["model"],
            f"{row['tokens']:,}",
            *(f"{row[name] / 2**30:.2f}" for name in ("predicted", "measured")),
            f"{row['predicted'] / row['measured'] - 1:+.1%}",
        ]
        for row in results.get("memory", ())
    ]
    if memory:
        lines += [f"Memory in use after a large pass, predicted from smaller ones; aim: within {MEMORY_WITHIN:.0%}.\n"]
        lines += table(["model", "tokens", "predicted, GiB", "measured, GiB", "difference"], memory)
    return lines


def _server(results: Content) -> list[str]:
    lines = []
    if "ready_seconds" in results:
        lines.append(f"* Ready {results['ready_seconds']:.1f} s after its start.")
    if "client" in results:
        client = results["client"]
        lines.append(
            f"* One client: {1e3 * client['wall']['median']:.1f} ms (median), of which "
            f"{1e3 * client['stages']['inference_seconds']['median']:.1f} the pass; the server adds "
            f"{1e3 * client['added']['median']:.2f} ms (95%: {1e3 * client['added']['p95']:.2f})."
        )
    if "saturation" in results:
        lines.append(f"* Saturation: {results['saturation']['server']['median']:.1f} requests per second.")
    for row in results.get("levels", ()):
        times = row["seconds"]
        lines.append(
            f"* At {row['share']}% of it: p50 {1e3 * times['median']:.1f} ms, p99 {1e3 * times['p99']:.1f} ms; "
            + ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
            + "."
        )
    return lines


def _profile(results: Content) -> list[str]:
    lines = []
    for row in results.get("passes", ()):
        busy = min(1.0, row["busy_seconds"] / row["seconds"])
        lines.append(
            f"{row['name']}: {1e3 * row['seconds']:.1f} ms, {row['kernels']} kernels, busy {busy:.0%} of the time, "
            f"{row['synchronisations']} synchronisations.\n"
        )
        rows = [
            [
                f"`{kernel['name'][:80]}`".replace("|", "/"),
                str(kernel["calls"]),
                f"{1e3 * kernel['seconds']:.2f}",
                f"{kernel['seconds'] / max(row['busy_seconds'], 1e-12):.1%}",
            ]
            for kernel in row["rows"][:12]
        ]
        lines += table(["kernel", "calls", "ms", "share"], rows)
    return lines


# Part -> its lines.
PARTS: dict[str, Callable[[Content], list[str]]] = {
    "correctness": _correctness,
    "kernel": _kernel,
    "engine": _engine,
    "server": _server,
    "profile": _profile,
    "more": _fused,
}
